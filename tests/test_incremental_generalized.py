"""Stores of compressed rows: runs of generalized mixed models against full fits of the same rows."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import mlpipe as mp
from mlpipe import passes, shelf
from mlpipe.options import Options

from .lakes import Run, runner

FORMULA = "y ~ dose + f + (1 | g)"
BINOMIAL = {"kind": "glmm", "formula": FORMULA, "family": "binomial"}
BLOCKS = 25


def day(number: int, rows: int = 500) -> pl.DataFrame:
    """One day's rows: few distinct design rows a block; the factor `f` has its level "d" from the fifth day on."""
    rng = np.random.default_rng(number)
    g = rng.integers(0, BLOCKS, rows)
    effects = np.random.default_rng(0).normal(size=BLOCKS)
    dose = rng.integers(0, 4, rows)
    f = rng.choice(["a", "b"] if number < 5 else ["a", "b", "d"], rows)
    h = rng.integers(0, 8, rows)
    eta = -0.7 + 0.4 * dose + effects[g] + 0.5 * (f == "b") - (f == "d") + np.sin(5.0 * h)
    y = (rng.random(rows) < 1 / (1 + np.exp(-eta))).astype(int)
    count = rng.poisson(np.exp(eta / 2))
    more = {"n": rng.integers(1, 5, rows), "x": rng.normal(size=rows), "size": rng.gamma(2.0, np.exp(eta / 4) / 2.0)}
    frame = pl.DataFrame({"g": g, "dose": dose, "f": f, "y": y, "count": count, **more, "h": h})
    return frame.with_columns(hits=(pl.col("n") * pl.lit(rng.random(rows))).floor(), said=pl.col("y").replace_strict({0: "no", 1: "yes"}))


def lake(folder: Path, first: int, last: int, change: Callable[[pl.DataFrame], pl.DataFrame] = lambda frame: frame) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(first, last + 1):
        change(day(number)).write_parquet(folder / f"d{number:02d}.parquet")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return runner(tmp_path, BINOMIAL)


def full(data: Any, **model: Any) -> mp.GLMMFit:
    """The fit of all rows together, without a store."""
    settings = {key: value for key, value in {**BINOMIAL, **model}.items() if key not in ("kind", "formula")}
    return mp.glmm({**BINOMIAL, **model}["formula"], data, options=Options(threads=1), **settings)


def same(fit: mp.GLMMFit, other: mp.GLMMFit) -> None:
    """DESIGN's exactness: 1e-7 standard errors, 1e-8 + 1e-12 |l| in the log-likelihood."""
    assert fit.names == other.names and (fit.rows, fit.nobs, fit.n_blocks) == (other.rows, other.nobs, other.n_blocks)
    assert fit.converged and other.converged
    assert np.abs((fit.beta - other.beta) / np.sqrt(np.diag(other.covariance))).max() < 1e-7
    assert abs(fit.loglik - other.loglik) < 1e-8 + 1e-12 * abs(other.loglik)
    spread = np.sqrt(np.diag(np.atleast_2d(other.theta_covariance)))
    assert np.abs((fit.theta - other.theta) / np.where(np.isfinite(spread), spread, 1.0)).max() < 1e-7
    assert abs(fit.tau - other.tau) < 1e-6
    for group in fit.groups:
        ours, theirs = (pl.DataFrame(one.ranef(group, wide=True)) for one in (fit, other))
        keys = list(next((f for f in fit.recipe.factors if ":".join(f) == group), fit.recipe.groups))
        both = ours.join(theirs, on=keys, suffix="_full", how="full", coalesce=True)
        assert len(both) == len(ours) == len(theirs)
        for name in ours.columns[len(keys) :]:
            np.testing.assert_allclose(both[name].to_numpy(), both[f"{name}_full"].to_numpy(), rtol=0, atol=1e-6)


def names(fit: mp.GLMMFit, key: str = "read") -> list[str]:
    return [Path(name).stem for name in fit.info["store"][key]]


def test_a_new_day_reads_one_partition_and_agrees_with_a_full_fit(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 3)
    first = run()
    assert names(first) == ["d01", "d02", "d03"] and "drift" not in first.info
    same(first, full(files))
    lake(files, 4, 4)
    second = run()
    assert names(second) == ["d04"] and second.info["bytes"] == (files / "d04.parquet").stat().st_size
    same(second, full(files))
    assert second.info["cells"] < 220 and any("2,000 rows are kept as 200 cells" in note for note in second.info["notes"])
    expected = (second.beta - first.beta) / np.sqrt(np.diag(second.covariance))
    assert [one["drift"] for one in second.info["drift"]["terms"]] == pytest.approx(expected)
    again = run()
    assert names(again) == [] and again.info["bytes"] == 0 and again.evaluations == second.evaluations
    assert again.tidy().equals(second.tidy()) and again.info["drift"] == second.info["drift"]


def test_the_start_is_where_the_last_fit_ended(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = lake(tmp_path / "lake", 1, 2)
    first = run()
    begun: list[np.ndarray] = []
    search = passes._problem, passes.solve_glmm

    def problem(model: Any, *rest: Any) -> Any:
        begun.append(model.fixed.R)
        return search[0](model, *rest)

    def solve(problem: Any, start: np.ndarray, **settings: Any) -> Any:
        begun.append(start)
        return search[1](problem, start, **settings)

    monkeypatch.setattr(passes, "_problem", problem)
    monkeypatch.setattr(passes, "solve_glmm", solve)
    lake(files, 3, 3)
    run()
    R, psi = begun
    np.testing.assert_allclose(np.linalg.solve(R, psi[:-1]), first.beta, rtol=1e-12)
    assert psi[-1] == pytest.approx(first.theta[0])


def test_levels_that_come_later_and_a_file_that_changes(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 2)
    run()
    lake(files, 5, 6)
    later = run()
    assert later.info["drift"]["added"] == ["fd"]
    same(later, full(files))
    day(9).write_parquet(files / "d02.parquet")
    changed = run()
    assert names(changed) == names(changed, "replaced") == ["d02"]
    same(changed, full(files))


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("merges", [True, False])
def test_a_window_and_a_partition_that_vanished(merges: bool, run: Run, tmp_path: Path) -> None:
    """Rows whose covariates do not repeat within a block are kept as they are."""
    model = {} if merges else {"formula": "y ~ x + f + (1 + x | g)"}
    files = lake(tmp_path / "lake", 1, 4)
    run(model=model, store={"window": 3})
    lake(files, 5, 5)
    fit = run(model=model, store={"window": 3})
    assert names(fit) == ["d05"] and names(fit, "dropped") == ["d02"]
    same(fit, full([files / f"d0{k}.parquet" for k in (3, 4, 5)], **model))
    note = next(text for text in fit.info["notes"] if " MB" in text)
    assert ("1,500 rows are kept as" if merges else "the store keeps all 1,500 rows, 0.1 MB") in note
    record = json.loads((tmp_path / "store" / "store.json").read_text())
    assert {path.stem for path in (tmp_path / "store" / "states").iterdir()} == shelf.named(record)
    assert record["merges"] == merges and bool(record["merged"]) == merges
    (files / "d04.parquet").unlink()
    with pytest.raises(mp.DataError, match="no longer has the partition .*d04.parquet"):
        run(model=model, store={"window": 3})
    gone = run(model=model, store={"window": 2, "vanished": "drop"})
    same(gone, full([files / f"d0{k}.parquet" for k in (3, 5)], **model))


def test_levels_that_leave_with_the_window(run: Run, tmp_path: Path) -> None:
    """Among them the base of the contrasts and the level that is collected as none of the others."""
    model = {"formula": "y ~ dose * f + (1 | g)"}
    files = lake(tmp_path / "lake", 5, 5, lambda frame: pl.concat([frame, *[frame.filter(pl.col("f") == "a")] * 5]))
    lake(files, 6, 7, lambda frame: frame.filter(pl.col("f") != "a"))
    run(model=model)
    fit = run(model=model, store={"window": 2})
    assert fit.names == ("(Intercept)", "dose", "fd", "dose:fd")
    same(fit, full([files / "d06.parquet", files / "d07.parquet"], **model))


@pytest.mark.parametrize(
    "model",
    [
        {"formula": "count ~ dose + (1 | g)", "family": "poisson", "offset": "log(n)", "nagq": 3},
        {"formula": "count ~ dose + (1 | g)", "family": "negbinomial"},
        {"formula": "size ~ dose + (1 | g)", "family": "gamma", "weights": "n"},
        {"formula": "size ~ dose + (1 | g)", "family": "gaussian", "link": "log"},
        {"formula": "hits / n ~ dose + (1 | g)", "trials": "n", "freq": "n"},
    ],
)
@pytest.mark.filterwarnings("ignore::mlpipe.MlpipeWarning")
def test_every_kind_of_response(model: dict[str, Any], run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 3)
    run(model=model)
    lake(files, 4, 4)
    same(run(model=model), full(files, **model))


def test_several_grouping_factors(run: Run, tmp_path: Path) -> None:
    model = {"formula": "y ~ dose + (1 | g) + (1 | h)"}
    files = lake(tmp_path / "lake", 1, 2)
    run(model=model)
    lake(files, 3, 3, lambda frame: frame.with_columns(h=pl.col("h") + 4))
    fit = run(model=model)
    assert fit.info["levels"] == {"g": BLOCKS, "h": 12}
    same(fit, full(files, **model))


def test_bases_are_fixed_until_a_rebase(run: Run, tmp_path: Path) -> None:
    model = {"formula": "y ~ poly(dose, 2) + (1 | g)"}
    files = lake(tmp_path / "lake", 1, 2)
    run(model=model)
    lake(files, 3, 3, lambda frame: frame.with_columns(dose=pl.col("dose") + 2))
    fit, whole = run(model=model), full(files, **model)
    assert fit.info["input_drift"]["dose"]["outside"] and np.abs(fit.beta - whole.beta).max() > 1e-3
    assert abs(fit.loglik - whole.loglik) < 1e-8  # the same curve
    same(run(model=model, rebase=True), whole)


def test_a_database_holds_the_same(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 2)
    store = {"path": f"{tmp_path}/store.duckdb"}
    run(store=store)
    lake(files, 3, 3)
    fit = run(store=store)
    assert names(fit) == ["d03"]
    same(fit, full(files))


# -- data that are odd ----------------------------------------------------------------------------------------------------


def odd(frame: pl.DataFrame) -> pl.DataFrame:
    """Keys and levels with quotes, line breaks, other scripts, an empty text; names to match."""
    keys = pl.lit("o'neill \"x\"\n☃ ") + pl.col("g").cast(pl.String)
    keys = pl.when(pl.col("g") == 3).then(pl.lit("")).otherwise(keys)
    levels = pl.col("f").replace_strict({"a": "'", "b": "żółw;--", "d": '"'})
    return frame.with_columns(keys.alias('g "1"'), levels.alias("f'"), pl.col("said").replace_strict({"no": "n'", "yes": "ß"}))


def test_labels_with_quotes_and_other_scripts(run: Run, tmp_path: Path) -> None:
    model = {"formula": "said ~ dose + `f'` + (1 | `g \"1\"`)"}
    files = lake(tmp_path / "lake", 4, 4, odd)
    run(model=model)
    lake(files, 5, 5, odd)
    same(run(model=model), full(files, **model))


def test_partitions_that_hold_little(run: Run, tmp_path: Path) -> None:
    """None of these could be fitted, or even compressed, by itself."""
    model = {"formula": "said ~ dose + f + (1 | g)"}
    files = lake(tmp_path / "lake", 1, 3)
    run(model=model)
    days = {
        "d04": day(4).clear(),
        "d05": day(5).with_columns(said=pl.lit(None, pl.String)),
        "d06": day(6).with_columns(g=pl.lit(7, pl.Int64)),
        "d07": day(7).filter(pl.col("y") == 1),
        "d08": day(8).head(1),
    }
    for name, frame in days.items():
        frame.write_parquet(files / f"{name}.parquet")
    fit = run(model=model)
    assert names(fit) == list(days) and fit.info["rows_dropped"] == 500
    same(fit, full(files, **model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.col("y") * 2, "d03.parquet: the response y of family binomial must be 0 or 1"),
        (pl.when(pl.col("y") == 1).then(pl.lit("maybe")).otherwise("said").alias("said"), "has the level 'maybe'"),
        (pl.when(pl.int_range(500) == 3).then(float("inf")).otherwise("x").alias("x"), "'x' is infinite in 1 rows"),
        (pl.col("g").cast(pl.String), "'g' is VARCHAR, it was BIGINT when the store was made"),
    ],
)
def test_bad_partitions_are_named_and_change_nothing(change: pl.Expr, message: str, run: Run, tmp_path: Path) -> None:
    response = "said" if "maybe" in message else "y"
    model = {"formula": f"{response} ~ dose + {'x + ' if 'x' in message[:4] else ''}(1 | g)"}
    files = lake(tmp_path / "lake", 1, 2)
    run(model=model)
    record = (tmp_path / "store" / "store.json").read_text()
    lake(files, 3, 3, lambda frame: frame.with_columns(change))
    with pytest.raises(mp.DataError, match=message) as caught:
        run(model=model)
    assert "d03.parquet" in str(caught.value) and (tmp_path / "store" / "store.json").read_text() == record


def test_another_model_is_refused(run: Run, tmp_path: Path) -> None:
    files, model = lake(tmp_path / "lake", 1, 2), {}
    run()
    for other in ({"formula": "y ~ dose + (1 | g)"}, {"family": "poisson"}, {"link": "probit"}):
        with pytest.raises(mp.ConfigError, match=f"was made with {next(iter(other))}") as caught:
            run(model=(model := other))
        assert caught.value.code == "store_model"
    same(run(model=model, rebase=True), full(files, **model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"kind": "glm", "formula": "y ~ dose"}, "keeps nothing that kind = 'glm'"),
        ({"kind": "gee", "formula": "y ~ dose", "groups": "g"}, "keeps nothing that kind = 'gee'"),
        ({"cluster": "g"}, "keeps no rows for cluster"),
    ],
)
def test_models_without_a_store(model: dict[str, Any], message: str, run: Run, tmp_path: Path) -> None:
    lake(tmp_path / "lake", 1, 1)
    with pytest.raises(mp.ConfigError, match=message) as caught:
        run(model=model)
    assert caught.value.code == "not_available"
