"""collect="blocks+xx": every block's own cross-products, against sums over its rows in numpy."""
from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import mlpipe as mp
from mlpipe import blocks, collect, stats
from mlpipe.formula import parse
from mlpipe.reduction import coded

FORMULA = "y ~ x * f + z + (1 + x | g)"
WEIGHTINGS: list[dict[str, Any]] = [{}, {"weights": "w"}, {"freq": "n"}, {"weights": "w", "freq": "n"}]
pytestmark = pytest.mark.filterwarnings("ignore::mlpipe.MlpipeWarning")


def data(seed: int = 1, rows: int = 400, groups: int = 25) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    g, f = rng.integers(0, groups, rows), rng.choice(["low", "mid", "top"], rows, p=[0.5, 0.3, 0.2])
    x, z = rng.normal(1e4, 3.0, rows), rng.normal(size=rows)
    y = 0.7 * x + z - 2.0 * (f == "top") + rng.normal(size=groups)[g] + rng.normal(size=rows)
    weights = {"w": rng.uniform(0.5, 2.0, rows), "n": rng.integers(1, 4, rows)}
    return pl.DataFrame({"y": y, "x": x, "z": z, "f": f, "g": g, **weights})


def columns(frame: pl.DataFrame) -> np.ndarray:
    """(rows, p + 1): what R's model matrix holds for FORMULA, and y."""
    x, z, f = (frame[name].to_numpy() for name in "xzf")
    mid, top = (f == "mid").astype(float), (f == "top").astype(float)
    return np.column_stack([np.ones(len(x)), x, mid, top, z, x * mid, x * top, frame["y"].to_numpy()])


def blocks_of(held: mp.SuffStats) -> dict[Any, tuple[int, float, float, np.ndarray]]:
    """Key -> rows, n, sum of log weights, cross-products of [X y] in raw coordinates, by the maps of a fit."""
    parts = coded(held, parse(FORMULA), None, None)
    p = len(parts.fixed.names)
    assert parts.fixed.names == ("(Intercept)", "x", "fmid", "ftop", "z", "x:fmid", "x:ftop")
    raw = np.zeros((p + 1, p + 1))  # [X y] = [X* y*] raw
    raw[:p, :p], raw[:p, p], raw[p, p] = parts.fixed.R, parts.offset, parts.scale
    out = {}
    for keys, rows, n, log_w, gram in held.block_products():
        made = raw.T @ parts.W.T @ gram @ parts.W @ raw
        out.update(zip(keys[0].to_pylist(), zip(rows.tolist(), n.tolist(), log_w.tolist(), made, strict=True), strict=True))
    return out


def check(held: mp.SuffStats, frame: pl.DataFrame, weighting: dict[str, Any]) -> None:
    found = blocks_of(held)
    assert sorted(found) == sorted(frame["g"].unique())
    size = np.sqrt((columns(frame) ** 2).sum(axis=0))
    for (key,), part in frame.group_by("g"):
        W = columns(part)
        w = part["w"].to_numpy() if "weights" in weighting else np.ones(len(W))
        q = part["n"].to_numpy() if "freq" in weighting else np.ones(len(W))
        rows, n, log_w, gram = found[key]
        assert (rows, n) == (part.height, q.sum()) and log_w == pytest.approx((q * np.log(w)).sum(), abs=1e-10)
        np.testing.assert_allclose(gram / np.outer(size, size), (W.T * (w * q)) @ W / np.outer(size, size), rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=["plain", "weights", "freq", "both"])
@pytest.mark.parametrize("engine", ["polars", "duckdb"])
def test_the_cross_products_of_each_block(weighting: dict[str, Any], engine: str) -> None:
    frame = data()
    source = frame if engine == "polars" else frame.to_arrow()
    check(mp.suffstats(FORMULA, source, collect="blocks+xx", **weighting), frame, weighting)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=["plain", "weights", "freq", "both"])
def test_merged_updated_saved_and_loaded(weighting: dict[str, Any], tmp_path: Path) -> None:
    """Levels of f that the first part lacks come with the second, blocks with the third."""
    frame = data()
    first = frame.filter((pl.col("f") != "low") & (pl.col("g") < 15))
    second = frame.filter((pl.col("f") == "low") & (pl.col("g") < 15))
    third = frame.filter(pl.col("g") >= 15)
    held = mp.suffstats(FORMULA, first, collect="blocks+xx", **weighting)
    held.save(tmp_path / "first")
    held = mp.SuffStats.load(tmp_path / "first").update(second) + mp.suffstats(FORMULA, third, collect="blocks+xx", **weighting)
    held.save(tmp_path / "all")
    again = mp.SuffStats.load(tmp_path / "all")
    assert again.collect == "blocks+xx"
    check(again, frame, weighting)
    fit, plain = mp.lmm(FORMULA, again), mp.lmm(FORMULA, frame, **weighting)
    assert fit.loglik == pytest.approx(plain.loglik, abs=1e-8)
    np.testing.assert_allclose(fit.ranef()["estimate"], plain.ranef()["estimate"], rtol=1e-6, atol=1e-7)


def test_a_block_less_than_all_is_the_fit_without_it() -> None:
    """What block deletion needs: the sums of the others are all minus the block's."""
    frame = data()
    held = mp.suffstats(FORMULA, frame, collect="blocks+xx")
    parts = list(held.block_products())
    total = sum(part.gram.sum(axis=0) for part in parts)
    np.testing.assert_allclose(total, held.gram, rtol=1e-12, atol=1e-9)
    key = parts[0].keys[0][0].as_py()
    others = mp.suffstats(FORMULA, frame.filter(pl.col("g") != key), collect="blocks+xx")
    mapped = stats.transformed(others, held.recipe) if others.recipe != held.recipe else others
    np.testing.assert_allclose(held.gram - parts[0].gram[0], mapped.gram, rtol=1e-9, atol=1e-9)


def test_a_mapped_file_in_small_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frame, options = data(), mp.Options(temp_directory=str(tmp_path), memory_limit="1GB")
    small = lambda *args, **kwargs: blocks.Collector(*args, **(kwargs | {"budget": 100}))  # noqa: E731
    monkeypatch.setattr(collect, "Collector", small)
    monkeypatch.setattr(stats, "PRODUCTS", 4 * 8 * 8 * 8)
    held = mp.suffstats(FORMULA, frame.to_arrow(), collect="blocks+xx", options=options)
    assert held.blocks is not None and held.blocks.directory is not None and held.blocks.nbytes == 0
    assert max(len(part.rows) for part in held.block_products()) <= 4
    check(held, frame, {})
    check(held + mp.suffstats(FORMULA, frame.with_columns(g=pl.col("g") + 100), collect="blocks+xx"),
          pl.concat([frame, frame.with_columns(g=pl.col("g") + 100)]), {})  # fmt: skip
    del held
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_what_does_not_hold_them_says_so() -> None:
    frame = data()
    plain = mp.suffstats(FORMULA, frame)
    with pytest.raises(mp.DataError, match="no X'X per block") as caught:
        plain.block_products()
    assert caught.value.code == "not_collected" and "blocks+xx" in str(caught.value.hint)
    with pytest.raises(mp.DataError, match="do not merge") as caught:
        plain + mp.suffstats(FORMULA, frame, collect="blocks+xx")
    assert caught.value.code == "not_mergeable"
    with pytest.raises(mp.ConfigError, match="one grouping factor"):
        mp.suffstats("y ~ x + (1 | g) + (1 | f)", frame, collect="blocks+xx")
    with pytest.raises(mp.ConfigError, match="blocks\\+xx"):
        mp.suffstats(FORMULA, frame, collect="blocks+x")


def test_the_plan_counts_and_shows_them() -> None:
    frame = data()
    kept, whole = (mp.plan("suffstats", FORMULA, frame, collect=kind) for kind in ("blocks", "blocks+xx"))
    assert "15 sums per block" in str(kept) and "36 sums per block" in str(whole)
    assert whole.bytes_needed() > kept.bytes_needed()
    assert "x0" in whole.sql["blocks"] and "x0" not in kept.sql["blocks"]
