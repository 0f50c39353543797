"""Plots: their tables against what they show, few marks whatever the rows, charts that Altair accepts."""
from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats as st

import mlpipe as mp
from mlpipe import datasets
from mlpipe.grid import Grid

SLEEP = datasets.path("sleepstudy")


@pytest.fixture(scope="module")
def sleep() -> Any:
    return mp.lmm("reaction ~ days + (1 + days | subject)", SLEEP)


@pytest.fixture(scope="module")
def many() -> tuple[Any, pl.DataFrame]:
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(1500), 8)
    x = rng.normal(size=len(g))
    frame = pl.DataFrame({"y": x + rng.normal(size=1500)[g] + rng.normal(size=len(g)), "x": x, "g": g})
    return mp.lmm("y ~ x + (1 | g)", frame), frame


def test_coefficients(sleep: Any) -> None:
    row = sleep.plot.coefficients().table.to_pylist()
    want = next(r for r in sleep.tidy().to_pylist() if r["term"] == "days")
    assert row == [{name: want[name] for name in ("term", "estimate", "conf_low", "conf_high")}]
    assert len(sleep.plot.coefficients(intercept=True).table) == 2


def test_few_levels_one_by_one(sleep: Any) -> None:
    table = pl.DataFrame(sleep.plot.caterpillar(term="days", conf_level=0.9).table)
    wide = pl.DataFrame(sleep.ranef(wide=True)).sort("days")
    assert table["level"].to_list() == wide["subject"].to_list() and table["rank"].to_list() == list(range(1, 19))
    np.testing.assert_allclose(table["estimate"], wide["days"])
    np.testing.assert_allclose(table["conf_high"] - table["conf_low"], 2 * st.norm.ppf(0.95) * wide["days_se"])
    assert set(table["kind"]) == {"level"}


def test_extremes_and_a_band_of_many_levels(many: tuple[Any, pl.DataFrame]) -> None:
    fit, _ = many
    table, wide = pl.DataFrame(fit.plot.caterpillar().table), pl.DataFrame(fit.ranef(wide=True)).sort("(Intercept)")
    levels, band = table.filter(kind="level"), table.filter(kind="band")
    ends = pl.concat([wide.head(50), wide.tail(50)])
    assert levels["level"].to_list() == [str(g) for g in ends["g"]] and len(band) == 200
    np.testing.assert_allclose(levels["estimate"], ends["(Intercept)"])
    assert levels["rank"].to_list() == [*range(1, 51), *range(1451, 1501)] and table["rank"].is_sorted()
    np.testing.assert_allclose(band["estimate"].to_numpy()[0], wide["(Intercept)"][50:57].mean())
    assert band["estimate"].is_sorted() and band["rank"][0] == 54.0
    assert (band["conf_low"] < band["estimate"]).all()


def test_residuals_of_few_rows_are_points(sleep: Any) -> None:
    table = pl.DataFrame(sleep.plot.residuals().table)
    augmented = pl.DataFrame(sleep.augment())
    np.testing.assert_allclose(table["fitted"].sort(), augmented["fitted"].sort())
    np.testing.assert_allclose(table["residual"].sort(), (augmented["resid"] / sleep.sigma).sort())


def test_residuals_of_many_rows_are_counts(many: tuple[Any, pl.DataFrame]) -> None:
    fit, frame = many
    table = pl.DataFrame(fit.plot.residuals().table)
    assert 500 < len(table) <= 5000 and table["count"].sum() == len(frame)
    augmented = pl.DataFrame(fit.augment())
    x, y = augmented["fitted"].to_numpy(), (augmented["resid"] / fit.sigma).to_numpy()
    for row in table.sample(20, seed=1).to_dicts():
        inside = (x >= row["fitted"]) & (x < row["fitted_to"]) & (y >= row["residual"]) & (y < row["residual_to"])
        assert abs(inside.sum() - row["count"]) <= 1  # a value on an edge may round either way


def test_influence_and_qq(sleep: Any) -> None:
    table, want = sleep.plot.influence(top=4).table.to_pylist(), sleep.influence(top=4).to_pylist()
    assert [row["level"] for row in table] == [row["subject"] for row in want]
    assert sleep.plot.qq("subject").table.equals(sleep.qq("subject"))
    with pytest.raises(mp.ConfigError, match="points"):
        sleep.plot.qq(points=6000)


def test_bad_requests(sleep: Any) -> None:
    for asked, message in (({"group": "herd"}, "herd"), ({"term": "x"}, "'x'"), ({"conf_level": 0}, "conf_level")):
        with pytest.raises(mp.ConfigError, match=message):
            sleep.plot.caterpillar(**asked)
    several = mp.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", datasets.path("penicillin"))
    with pytest.raises(mp.ConfigError, match="several grouping factors"):
        several.plot.caterpillar()
    assert len(several.plot.caterpillar("sample").table) == 6


def test_without_altair_there_is_the_table(sleep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "altair":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    plot = sleep.plot.coefficients()
    monkeypatch.setattr(builtins, "__import__", missing)
    assert len(plot.table) == 1
    with pytest.raises(mp.ConfigError, match="Altair") as caught:
        _ = plot.chart
    assert "mlpipe[plot]" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["coefficients", "caterpillar", "residuals", "qq", "influence"])
def test_charts(sleep: Any, many: tuple[Any, pl.DataFrame], name: str, tmp_path: Path) -> None:
    pytest.importorskip("altair")
    for fit in (sleep, many[0]):
        plot = getattr(fit.plot, name)()
        plot.save(tmp_path / "chart.json")
        chart = json.loads((tmp_path / "chart.json").read_text())
        shown = [rows for rows in [chart.get("data", {}), *(layer.get("data", {}) for layer in chart.get("layer", []))] if rows]
        assert any(len(rows["values"]) == len(plot.table) for rows in shown if "values" in rows)
        assert len(plot.table) <= 5000 and "vega-lite" in chart["$schema"]


# ---- grids


@pytest.mark.parametrize("seed", range(3))
def test_a_grid_counts_every_point(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=5000) * 10.0**seed, rng.standard_cauchy(5000)
    grid = Grid(200)
    for at in np.array_split(np.arange(5000), 13):
        grid.add(np.append(x[at], np.nan), np.append(y[at], 1.0))
    assert grid.width is not None and len(grid.cells) <= 200 and grid.count.sum() == 5000
    cells = np.floor(np.column_stack([x, y]) / grid.width).astype(int)
    want, count = np.unique(cells, axis=0, return_counts=True)
    np.testing.assert_array_equal(grid.cells, want)
    np.testing.assert_array_equal(grid.count, count)


def test_a_grid_of_one_value() -> None:
    grid = Grid()
    grid.add(np.full(9, 2.5), np.zeros(9))
    grid.add(np.zeros(0), np.zeros(0))
    assert len(grid.cells) == 1 and grid.count[0] == 9
