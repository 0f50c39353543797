"""Several grouping factors from Python: the model that is fitted against dense matrices, every engine, every table and prediction."""
from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import scipy.linalg as la

import mlpipe as mp
from mlpipe import crossing

from .conftest import as_data
from .dense_several import DenseSeveral, Grouping

pytestmark = pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
NAMES = ["it's", 'q"x', "", "é", "日本", "B", "a b"]  # levels of b, as they must survive SQL, files and keys
SIMPLE = "y ~ x + (1 | a) + (1 | b)"


def data(seed: int = 1, rows: int = 180) -> pl.DataFrame:
    """Unbalanced: `a` has one dominating level and one that occurs once; `c` counts anew within each `a`."""
    rng = np.random.default_rng(seed)
    a = np.append(np.where(rng.random(rows - 1) < 0.25, 0, rng.integers(0, 9, rows - 1)), 9) * 7 - 21
    b, c, f = rng.integers(0, len(NAMES), rows), rng.integers(0, 3, rows), rng.integers(0, 3, rows)
    x, z = rng.normal(2.0, 1.0, rows), rng.normal(size=rows)
    u, v, inner = (rng.normal(size=(10, 2)), rng.normal(size=(len(NAMES), 2)), rng.normal(size=(10, 3)))
    at = (a + 21) // 7
    y = 5.0 + 0.5 * x + u[at, 0] + 0.6 * u[at, 1] * x + v[b, 0] + 0.5 * v[b, 1] * z + 0.8 * inner[at, c] + rng.normal(size=rows)
    columns = {"y": y, "x": x, "z": z, "a": a, "b": [NAMES[i] for i in b], "c": c, "f": np.array(["r", "s", "t"])[f]}
    more = {"w": rng.uniform(0.4, 3.0, rows), "o": rng.normal(size=rows), "n": rng.integers(1, 4, rows), "g": [NAMES[0]] * rows}
    return pl.DataFrame({**columns, **more})


FRAME = data()


@cache
def fit(formula: str = SIMPLE, **arguments: Any) -> mp.LMMFit:
    return mp.lmm(formula, FRAME, **arguments)


# ---- against the naive truth

Columns = Callable[[pl.DataFrame], list[Any]]
ONE: Columns = lambda d: [np.ones(len(d))]  # noqa: E731
SLOPE: Columns = lambda d: [np.ones(len(d)), d["x"]]  # noqa: E731
LEVELS: Columns = lambda d: [d["f"] == level for level in "rst"]  # noqa: E731
RANDOM: dict[str, dict[str, tuple[Columns, tuple[int, ...]]]] = {
    "(1 | a) + (1 | b)": {"a": (ONE, (1,)), "b": (ONE, (1,))},
    "(1 | b) + (1 | a)": {"b": (ONE, (1,)), "a": (ONE, (1,))},
    "(1 | a/c)": {"a": (ONE, (1,)), "a:c": (ONE, (1,))},
    "(1 | a:c) + (1 | b)": {"a:c": (ONE, (1,)), "b": (ONE, (1,))},
    "(1 | a/c) + (1 | b)": {"a": (ONE, (1,)), "a:c": (ONE, (1,)), "b": (ONE, (1,))},
    "(1 | a/c/f)": {"a": (ONE, (1,)), "a:c": (ONE, (1,)), "a:c:f": (ONE, (1,))},
    "(x | a) + (1 + z || b)": {"a": (SLOPE, (2,)), "b": (lambda d: [np.ones(len(d)), d["z"]], (1, 1))},
    "(0 + f | a) + (1 | b)": {"a": (LEVELS, (3,)), "b": (ONE, (1,))},
    "(1 | a) + (0 + x | a) + (0 + x | b)": {"a": (SLOPE, (1, 1)), "b": (lambda d: [d["x"]], (1,))},
    "(1 | a) + (1 | b) + (f | c)": {
        "a": (ONE, (1,)), "b": (ONE, (1,)), "c": (lambda d: [np.ones(len(d)), d["f"] == "s", d["f"] == "t"], (3,)),
    },
}  # fmt: skip


def key(frame: pl.DataFrame, group: str) -> list[tuple[Any, ...]]:
    return list(zip(*(frame[name] for name in group.split(":")), strict=True))


def dense(frame: pl.DataFrame, random: str, *, reml: bool = True, w: np.ndarray | None = None, offset: str | None = None) -> DenseSeveral:
    """Levels are numbered as they sort."""
    factors = []
    for group, (columns, sizes) in RANDOM[random].items():
        keys = key(frame, group)
        place = {value: i for i, value in enumerate(sorted(set(keys), key=str))}
        codes = np.array([place[value] for value in keys])
        factors.append(Grouping(codes, np.column_stack([np.asarray(c, float) for c in columns(frame)]), sizes))
    X, n = np.column_stack([np.ones(len(frame)), frame["x"]]), len(frame)
    y = frame["y"].to_numpy() - (frame[offset].to_numpy() if offset else 0.0)
    return DenseSeveral(X, y, np.ones(n) if w is None else w, factors, reml)


def lambda_of(fitted: mp.LMMFit, random: str) -> np.ndarray:
    return np.asarray(la.block_diag(*(term.factor for group in RANDOM[random] for term in fitted.terms if term.group == group)))


def check(fitted: mp.LMMFit, truth: DenseSeveral, random: str, frame: pl.DataFrame) -> None:
    lambda_ = lambda_of(fitted, random)
    beta, rss, information = truth.gls(lambda_)
    s2 = rss / truth.degrees
    np.testing.assert_allclose(fitted.beta, beta, rtol=1e-8)
    assert fitted.sigma**2 == pytest.approx(s2, rel=1e-9)
    np.testing.assert_allclose(fitted.vcov(), s2 * np.linalg.inv(information), rtol=1e-8)
    assert fitted.loglik == pytest.approx(truth.loglik(lambda_), abs=1e-8)
    modes = truth.spread(lambda_) @ truth.modes(lambda_)
    spread, at = truth.spread(lambda_), 0
    sds = np.sqrt(s2 * np.diag(spread @ np.linalg.solve(truth.M(lambda_), spread.T)))
    for group, f in zip(RANDOM[random], truth.factors, strict=True):
        wide = fitted.ranef(group, wide=True)
        keys = group.split(":")
        levels = sorted(set(key(frame, group)), key=str)
        order = [levels.index(row) for row in zip(*(wide[name].to_pylist() for name in keys), strict=True)]
        values = np.column_stack([wide.column(len(keys) + k) for k in range(2 * f.q)])
        for got, want in ((values[:, ::2], modes), (values[:, 1::2], sds)):
            np.testing.assert_allclose(got, want[at : at + f.levels * f.q].reshape(-1, f.q)[order], atol=1e-7)
        at += f.levels * f.q
    fixed = frame["y"].to_numpy() - truth.y + truth.X @ beta  # the offset included
    augmented = fitted.augment(frame).read_all()
    np.testing.assert_allclose(augmented["fitted_fixed"], fixed, rtol=1e-8)
    np.testing.assert_allclose(augmented["fitted"], fixed + truth.Z @ modes, rtol=1e-7)
    np.testing.assert_allclose(augmented["resid"], frame["y"].to_numpy() - augmented["fitted"].to_numpy(), atol=1e-8)


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("reml", "weights", "offset"), [(True, None, None), (False, "w", None), (True, "w", "o")])
@pytest.mark.parametrize("random", RANDOM)
def test_the_naive_truth(random: str, reml: bool, weights: str | None, offset: str | None) -> None:
    fitted = mp.lmm(f"y ~ x + {random}", FRAME, reml=reml, weights=weights, offset=offset)
    w = FRAME[weights].to_numpy() if weights else None
    truth = dense(FRAME, random, reml=reml, w=w, offset=offset)
    assert fitted.converged
    check(fitted, truth, random, FRAME)
    if not fitted.singular:
        entries = truth.problem().entries
        scale = np.sqrt(np.diag(truth.average_information(lambda_of(fitted, random), entries)))
        assert np.abs(truth.score(lambda_of(fitted, random), entries) / scale).max() < 1e-4


@pytest.mark.parametrize("random", ["(1 | a) + (1 | b)", "(x | a) + (1 + z || b)", "(1 | a/c)"])
def test_frequencies_stand_for_rows(random: str) -> None:
    rows = FRAME.select(pl.all().repeat_by("n")).explode(pl.all())
    fitted, repeated = mp.lmm(f"y ~ x + {random}", FRAME, freq="n"), mp.lmm(f"y ~ x + {random}", rows)
    same(fitted, repeated)
    assert fitted.nobs == len(rows)
    check(repeated, dense(rows, random), random, rows)


def test_rows_with_missing_values_are_dropped() -> None:
    holes = FRAME.with_row_index("i").with_columns(
        y=pl.when(pl.col("i") == 3).then(None).otherwise("y"), x=pl.when(pl.col("i") == 5).then(float("nan")).otherwise("x"),
        a=pl.when(pl.col("i") == 7).then(None).otherwise("a"), b=pl.when(pl.col("i") == 11).then(None).otherwise("b"),
    ).drop("i")  # fmt: skip
    whole = holes.filter(pl.col("y").is_not_null() & pl.col("x").is_not_nan() & pl.col("a").is_not_null() & pl.col("b").is_not_null())
    for frame in (holes, holes.to_arrow()):
        fitted = mp.lmm(SIMPLE, frame)
        same(fitted, mp.lmm(SIMPLE, whole))
        assert fitted.glance()["n_dropped"].to_pylist() == [4]
        out = pl.from_arrow(fitted.augment(frame).read_all())
        assert len(out) == len(holes)
        assert np.flatnonzero(out["resid"].is_null()).tolist() == [3, 5]  # rows without a key lack only that factor's part
        assert out["fitted"][7] != out["fitted_fixed"][7]
    with pytest.raises(mp.DataError, match="missing"):
        mp.lmm(SIMPLE, holes, na="raise")


# ---- the same data, however it comes


def same(one: mp.LMMFit, other: mp.LMMFit, *, effects: bool = True) -> None:
    assert one.loglik == pytest.approx(other.loglik, abs=1e-8)
    np.testing.assert_allclose(one.beta, other.beta, rtol=1e-6)
    np.testing.assert_allclose(one.theta, other.theta, atol=1e-6)
    assert one.varcorr()["group"].to_pylist() == other.varcorr()["group"].to_pylist()
    assert one.levels == other.levels
    for group in one.groups if effects else ():
        np.testing.assert_allclose(_estimates(one, group), _estimates(other, group), atol=1e-6)


def _estimates(fitted: mp.LMMFit, group: str) -> np.ndarray:
    table = pl.from_arrow(fitted.ranef(group)).with_columns(pl.col(group.split(":")).cast(pl.String))
    return table.sort(*group.split(":"), "term")["estimate"].to_numpy()


@pytest.mark.thinned(5)
@pytest.mark.parametrize("formula", [SIMPLE, "y ~ x + (x | a/c) + (1 | b)"])
def test_every_engine_gives_the_same(engine_kind: str, formula: str, tmp_path: Path) -> None:
    frame = FRAME.with_columns(pl.col("b").replace("", "none"))  # an empty field of a CSV file is missing
    fitted, first = mp.lmm(formula, as_data(frame, engine_kind, tmp_path)), mp.lmm(formula, frame)
    same(fitted, first)
    again = as_data(frame, engine_kind, tmp_path)
    got = pl.from_arrow(fitted.predict(again).read_all())
    assert got.columns == [*frame.columns, "predicted"]
    assert got["y"].to_list() == frame["y"].to_list()
    np.testing.assert_allclose(got["predicted"], first.predict(frame).read_all()["predicted"], atol=1e-6)
    assert fitted.info["scored"] == {"rows": len(frame), "unseen_levels": 0, "null_predictions": 0}
    fitted.write(tmp_path / "fit")
    np.testing.assert_array_equal(
        pl.from_arrow(mp.load(tmp_path / "fit").predict(as_data(frame, engine_kind, tmp_path)).read_all())["predicted"], got["predicted"]
    )


@pytest.mark.parametrize("formula", [SIMPLE, "y ~ x + (1 + x | a) + (1 | b)"])
def test_neither_order_nor_threads_matter(formula: str) -> None:
    shuffled = FRAME.sample(fraction=1.0, shuffle=True, seed=3)
    for frame in (shuffled, shuffled.to_arrow()):
        same(mp.lmm(formula, frame), fit(formula))
    for threads in (1, 2):
        same(mp.lmm(formula, FRAME.to_arrow(), options=mp.Options(threads=threads)), fit(formula))


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("formula", "more", "duckdb_"),
    [
        (SIMPLE, {}, True), (SIMPLE, {}, False), (SIMPLE, {"weights": "w"}, True), ("y ~ x + (x | a) + (1 | a:c)", {"freq": "n"}, True),
        ("y ~ x + (x | a) + (1 | a:c)", {"weights": "w"}, False), ("y ~ x + (1 + x || a) + (0 + f | b)", {}, True),
        ("y ~ x + (1 + x || a) + (0 + f | b)", {"weights": "w", "freq": "n"}, False),
    ],
)  # fmt: skip
def test_combinations_that_repeat_are_summed_first(
    formula: str, more: dict[str, str], duckdb_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = FRAME.to_arrow() if duckdb_ else FRAME
    fits = []
    for repeated in (0.0, 1e9):
        monkeypatch.setattr(crossing, "REPEATED", repeated)
        fits.append(mp.lmm(formula, frame, **more))
    same(*fits)


def test_keys_that_only_differ_in_the_sign_of_zero_are_one() -> None:
    keys = FRAME["a"].cast(float).replace(0.0, -0.0).to_numpy().copy()
    keys[::2] += 0.0
    for frame in (FRAME.with_columns(a=keys), FRAME.with_columns(a=keys).to_arrow()):
        fitted = mp.lmm(SIMPLE, frame)
        same(fitted, fit(), effects=False)
        assert fitted.predict(frame).read_all().num_rows == len(FRAME)
        assert fitted.info["scored"]["unseen_levels"] == 0


@pytest.mark.parametrize("cast", [pl.UInt64, pl.Int8, pl.Float32, pl.Decimal(10, 2), pl.Date, pl.Datetime("us"), pl.Duration("us")])
def test_keys_of_many_types(cast: Any) -> None:
    frame = FRAME.with_columns((pl.col("a") + 21).cast(pl.Int32).cast(cast))
    for given in (frame, frame.to_arrow()):
        fitted = mp.lmm(SIMPLE, given)
        same(fitted, fit(), effects=False)
        np.testing.assert_allclose(fitted.predict(given).read_all()["predicted"], fit().predict(FRAME).read_all()["predicted"], atol=1e-6)
        assert fitted.info["scored"]["unseen_levels"] == 0


def test_enums_out_of_alphabetical_order(typed_kind: str, tmp_path: Path) -> None:
    frame = FRAME.with_columns(pl.col("b").cast(pl.Enum(["日本", "B", "", "a b", "é", 'q"x', "it's"])))
    fitted = mp.lmm(SIMPLE, as_data(frame, typed_kind, tmp_path))
    same(fitted, fit())
    wanted = dict(zip(*(fit().ranef("b", wide=True)[name].to_pylist() for name in ("b", "(Intercept)")), strict=True))
    got = dict(zip(*(fitted.ranef("b", wide=True)[name].to_pylist() for name in ("b", "(Intercept)")), strict=True))
    assert got == pytest.approx(wanted, abs=1e-6)


# ---- tables and predictions


def test_tables_name_their_factors() -> None:
    fitted = fit("y ~ x + (x | a) + (1 + z || b)")
    assert fitted.groups == ["a", "b"]
    assert fitted.levels == {"a": 10, "b": 7}
    rows = fitted.varcorr().to_pylist()
    assert [(r["group"], r["term1"], r["term2"]) for r in rows] == [
        ("a", "(Intercept)", None), ("a", "x", None), ("a", "(Intercept)", "x"), ("b", "(Intercept)", None), ("b", "z", None),
        ("Residual", None, None),
    ]  # fmt: skip
    assert len(fitted.theta) == 5
    tidy = fitted.tidy().to_pylist()
    assert [(r["group"], r["term"]) for r in tidy if r["effect"] == "ran_pars"] == [
        ("a", "sd__(Intercept)"), ("a", "sd__x"), ("a", "cor__(Intercept).x"), ("b", "sd__(Intercept)"), ("b", "sd__z"),
        ("Residual", "sd__Observation"),
    ]  # fmt: skip
    variances = {(r["group"], r["term1"]): r["variance"] for r in rows if r["term2"] is None}
    total = variances["a", "(Intercept)"] + variances["b", "(Intercept)"] + fitted.sigma**2
    assert fitted.icc() == pytest.approx({group: variances[group, "(Intercept)"] / total for group in "ab"})
    row = fitted.glance().to_pylist()[0]
    assert (row["nobs"], row["n_params"], row["converged"]) == (180, 8, True)
    assert row["aic"] == pytest.approx(2 * 8 - 2 * fitted.loglik)
    assert fitted.info["levels"] == {"a": 10, "b": 7}


def test_nested_ids_written_as_crossed_are_the_nested_model_and_noted() -> None:
    frame = FRAME.with_columns(unique=pl.col("a").cast(pl.String) + "/" + pl.col("c").cast(pl.String))
    crossed_, nested = mp.lmm("y ~ x + (1 | a) + (1 | unique)", frame), fit("y ~ x + (1 | a/c)")
    assert crossed_.loglik == pytest.approx(nested.loglik, abs=1e-8)
    np.testing.assert_allclose(crossed_.theta, nested.theta, atol=1e-6)
    assert any("every level of unique lies within one of a" in note for note in crossed_.info["notes"])
    assert "every level of unique lies within one of a" in str(crossed_)
    for plain in (nested, fit(), fit("y ~ x + (1 | a) + (1 | c)")):
        assert not any("nested" in note for note in plain.info.get("notes", []))


def test_more_levels_come_first() -> None:
    """theta, varcorr and the print are in lme4's order, whatever the formula's."""
    one, other = fit("y ~ x + (1 | b) + (1 | a)"), fit("y ~ x + (1 | a) + (1 | b)")
    assert one.groups == other.groups == ["a", "b"]
    np.testing.assert_allclose(one.theta, other.theta, atol=1e-7)
    assert fit("y ~ x + (1 | a/c)").groups == ["a:c", "a"]


def test_standard_errors_of_spreads_are_those_of_the_likelihood() -> None:
    """Against second differences of the profiled likelihood by log sigma and theta, ML and REML."""
    for reml in (True, False):
        fitted, truth = fit(reml=reml), dense(FRAME, "(1 | a) + (1 | b)", reml=reml)

        def minus(at: np.ndarray, truth: DenseSeveral = truth) -> float:
            lambda_, s2 = np.diag(at[:2]), np.exp(2 * at[2])
            _, rss, information = truth.gls(lambda_)
            out = np.linalg.slogdet(truth.V(lambda_))[1] + truth.degrees * np.log(s2) + rss / s2
            return float(out + (np.linalg.slogdet(information)[1] if truth.reml else 0.0)) / 2.0

        at, h = np.append(np.diag(lambda_of(fitted, "(1 | a) + (1 | b)")), np.log(fitted.sigma)), 1e-4 * np.eye(3)
        hessian = np.array([[minus(at + i + j) - minus(at + i - j) - minus(at - i + j) + minus(at - i - j) for i in h] for j in h]) / 4e-8
        exact = np.sqrt(np.diag(np.linalg.inv(hessian)))
        np.testing.assert_allclose(np.sqrt(np.diag(fitted.theta_covariance)), exact, rtol=1e-3)
        correlation = fitted.theta_covariance / np.outer(exact, exact)
        np.testing.assert_allclose(correlation, np.linalg.inv(hessian) / np.outer(exact, exact), atol=2e-3)


@pytest.mark.parametrize(("formula", "group", "keys"), [(SIMPLE, "a", ["a"]), ("y ~ x + (x | a/c) + (1 | b)", "a:c", ["a", "c"])])
def test_random_effects(formula: str, group: str, keys: list[str]) -> None:
    fitted = fit(formula)
    long, wide = pl.from_arrow(fitted.ranef(group)), pl.from_arrow(fitted.ranef(group, wide=True))
    terms = next(term.names for term in fitted.terms if term.group == group)
    assert long.columns == ["group", *keys, "term", "estimate", "std_error", "reliability"]
    assert wide.columns == [*keys, *(column for name in terms for column in (name, f"{name}_se"))]
    assert wide.select(keys).equals(wide.select(keys).sort(keys))
    assert len(long) == len(terms) * len(wide) == len(terms) * fitted.levels[group]
    assert long.schema[keys[0]] == FRAME.schema[keys[0]]
    assert set(long["group"]) == {group}
    for k, name in enumerate(terms):
        assert long["estimate"].to_list()[k :: len(terms)] == wide[name].to_list()
    assert long["reliability"].is_between(0.0, 1.0).all()
    for wanted in (True, False):
        stream = fitted.ranef(group, wide=wanted, stream=True)
        assert isinstance(stream, pa.RecordBatchReader)
        assert stream.read_all().equals(fitted.ranef(group, wide=wanted))
    assert {name: table.num_rows for name, table in fitted.ranefs().items()} == {
        name: fitted.levels[name] * sum(len(term.names) for term in fitted.terms if term.group == name) for name in fitted.groups
    }


def test_no_factor_named_lists_them() -> None:
    with pytest.raises(mp.ConfigError, match="several grouping factors: a, b") as raised:
        fit().ranef()
    assert raised.value.code == "several_factors"
    with pytest.raises(mp.ConfigError, match="no grouping factor 'A'"):
        fit().ranef("A")


def test_a_key_named_like_ours() -> None:
    frame = FRAME.rename({"a": "term", "b": "estimate"})
    fitted = mp.lmm("y ~ x + (1 | term) + (1 | estimate)", frame)
    assert fitted.ranef("term").column_names == ["group", "term_key", "term", "estimate", "std_error", "reliability"]
    np.testing.assert_allclose(fitted.predict(frame).read_all()["predicted"], fit().predict(FRAME).read_all()["predicted"], atol=1e-6)


def unseen(formula: str = "y ~ x + (x | a) + (1 | b)") -> tuple[mp.LMMFit, pl.DataFrame, dict[str, np.ndarray]]:
    """Rows where no, one or every factor's level is unknown or missing, and each part of the prediction."""
    fitted = fit(formula)
    rows = FRAME.head(6).with_columns(
        a=pl.Series([FRAME["a"][0], 1_000, FRAME["a"][2], 2**40, None, FRAME["a"][5]]),
        b=pl.Series([FRAME["b"][0], FRAME["b"][1], "zzz", "new", FRAME["b"][4], None]),
    )
    modes = {group: pl.from_arrow(fitted.ranef(group, wide=True)) for group in "ab"}
    parts = {"fixed": fitted.beta[0] + fitted.beta[1] * rows["x"].to_numpy()}
    for group, table in modes.items():
        held = {row[0]: row for row in table.iter_rows()}
        found = [held.get(value) for value in rows[group]]
        slope = "x" in table.columns
        parts[group] = np.array([0.0 if m is None else m[1] + (m[3] * x if slope else 0.0) for m, x in zip(found, rows["x"], strict=True)])
        parts[f"no {group}"] = np.array([m is None for m in found])
    return fitted, rows, parts


@pytest.mark.parametrize("duckdb_", [True, False])
@pytest.mark.parametrize("effects", ["conditional", "population", ["a"], ["b"], ["a", "b"], ["b", "a"], []])
@pytest.mark.parametrize("new_levels", ["population", "null", "raise"])
def test_predictions_with_unseen_levels(effects: str | list[str], new_levels: str, duckdb_: bool) -> None:
    fitted, rows, parts = unseen()
    wanted = ["a", "b"] if effects == "conditional" else [] if effects == "population" else effects
    missing = np.any([parts[f"no {group}"] for group in wanted] or [np.zeros(len(rows), bool)], axis=0)
    given = rows.to_arrow() if duckdb_ else rows
    if new_levels == "raise" and missing.any():
        with pytest.raises(mp.DataError, match="at least . rows have a level") as raised:
            fitted.predict(given, effects=effects, new_levels=new_levels).read_all()
        assert raised.value.code == "new_levels"
        return
    got = pl.from_arrow(fitted.predict(given, effects=effects, new_levels=new_levels).read_all())
    value = parts["fixed"] + sum(parts[group] for group in wanted)
    null = missing & (new_levels == "null")
    assert got["predicted"].is_null().to_list() == null.tolist()
    np.testing.assert_allclose(got["predicted"].to_numpy()[~null], value[~null], rtol=1e-8)
    assert got.drop("predicted").equals(rows)
    assert fitted.info["scored"]["null_predictions"] == null.sum()
    if wanted:
        assert fitted.info["scored"]["unseen_levels"] == missing.sum()


def test_keys_of_factors_that_are_left_out_need_not_be_there() -> None:
    fitted, frame, _ = unseen()
    want = fitted.predict(frame, effects=["b"]).read_all()["predicted"]
    assert fitted.predict(frame.drop("a"), effects=["b"]).read_all()["predicted"].equals(want)
    with pytest.raises(mp.ColumnNotFoundError, match="'b'"):
        fitted.predict(frame.drop("b"), effects=["b"])


def test_a_key_of_another_type_is_compared_by_value() -> None:
    """No rounding, no wrapping: 7.5 is not 7, 2^32 - 21 is not -21."""
    fitted = mp.lmm(SIMPLE, FRAME.with_columns(pl.col("a").cast(pl.Int32)))
    rows = FRAME.head(4).with_columns(a=pl.Series([0.0, 7.5, 7.0, -21.0]))
    fitted.predict(rows, new_levels="population").read_all()
    assert fitted.info["scored"]["unseen_levels"] == 1
    fitted.predict(FRAME.head(2).with_columns(a=pl.Series([-21, 2**32 - 21]))).read_all()
    assert fitted.info["scored"]["unseen_levels"] == 1
    with pytest.raises(mp.DataError, match="'a' is of kind text"):
        fitted.predict(FRAME.with_columns(pl.col("a").cast(pl.String)))


def test_augment_keeps_the_rows() -> None:
    for frame in (FRAME, FRAME.to_arrow()):
        fitted = mp.lmm(SIMPLE, frame)
        out = pl.from_arrow(fitted.augment().read_all())
        assert out.select(FRAME.columns).equals(FRAME)
        assert fitted.augment(columns=["y"], prefix="m_").read_all().column_names == ["y", "m_fitted", "m_resid", "m_fitted_fixed"]
    with pytest.raises(mp.DataError, match="already has a column 'fitted'"):
        fit().augment(FRAME.with_columns(fitted=0.0))


def test_a_source_that_is_read_once() -> None:
    fitted = mp.lmm(SIMPLE, FRAME.to_arrow().to_reader())
    same(fitted, fit())
    with pytest.raises(mp.DataError, match="rows"):
        fitted.augment()
    assert fitted.predict(FRAME).read_all().num_rows == len(FRAME)


def test_many_rows_keep_their_order() -> None:
    rng = np.random.default_rng(4)
    many = FRAME.select("y", "x", "a", "b")[rng.integers(0, len(FRAME), 200_000)]
    got = fit().predict(many.to_arrow(), options=mp.Options(threads=2)).read_all()
    assert pl.from_arrow(got).drop("predicted").equals(many)
    np.testing.assert_allclose(got["predicted"], fit().predict(many).read_all()["predicted"], rtol=1e-12)


def test_print_and_html() -> None:
    text, html = str(fit()), fit()._repr_html_()
    assert "Number of obs: 180, groups: a, 10; b, 7" in text
    lines = text.split("Random effects:\n")[1].split("\n")
    assert [line.split()[0] for line in lines[:4]] == ["Groups", "a", "b", "Residual"]
    assert html.count("<table") >= 2
    for word in ("(Intercept)", "Residual", ">a<", ">b<"):
        assert word in html
    nested = str(fit("y ~ x + (1 | a/c)"))
    assert "groups: a:c, 27; a, 10" in nested or "groups: a:c, 28; a, 10" in nested
    assert repr(fit()) == f"<LMMFit '{SIMPLE}': 180 rows, loglik {fit().loglik:.6g}>"


@pytest.mark.parametrize("target", ["fit", "fit.duckdb"])
@pytest.mark.parametrize("formula", [SIMPLE, "y ~ x + (x | a/c) + (1 | b)"])
def test_written_and_loaded(formula: str, target: str, tmp_path: Path) -> None:
    fitted = fit(formula)
    fitted.write(tmp_path / target, run_id="one")
    again = mp.load(tmp_path / target)
    assert again.loglik == fitted.loglik
    np.testing.assert_array_equal(again.theta, fitted.theta)
    for group, table in fitted.ranefs().items():
        assert again.ranef(group).to_pylist() == table.to_pylist()
    assert str(again) == str(fitted)
    np.testing.assert_array_equal(again.predict(FRAME).read_all()["predicted"], fitted.predict(FRAME).read_all()["predicted"])
    assert again.icc() == fitted.icc()
    stems = {f"mlpipe_ranef_{group.replace(':', '__')}" for group in fitted.groups}
    if target == "fit":
        names = {path.stem for path in (tmp_path / "fit" / "runs" / "one").glob("*.parquet")}
    else:
        with duckdb.connect(tmp_path / target, read_only=True) as con:
            names = {name for (name,) in con.execute("select table_name from information_schema.tables").fetchall()}
    assert stems <= names


def test_written_without_random_effects(tmp_path: Path) -> None:
    fit().write(tmp_path / "fit", ranef=False)
    again = mp.load(tmp_path / "fit")
    with pytest.raises(mp.DataError, match="without its conditional modes"):
        again.ranef("a")
    with pytest.raises(mp.DataError, match="without its conditional modes"):
        again.predict(FRAME)
    got = again.predict(FRAME, effects="population").read_all()["predicted"]
    np.testing.assert_allclose(got, fit().augment(FRAME).read_all()["fitted_fixed"])


# ---- the search


@pytest.mark.parametrize("formula", [SIMPLE, "y ~ x + (1 | b) + (x | a)", "y ~ x + (x | a/c) + (1 + z || b)"])
def test_a_start_is_in_the_order_of_theta(formula: str) -> None:
    first = fit(formula)
    again = mp.lmm(formula, FRAME, start=first.theta.tolist())
    same(again, first)
    assert again.evaluations <= 3
    same(mp.lmm(formula, FRAME, start=np.where(first.theta == 0, 0.1, 2.0 * first.theta)), first)


@pytest.mark.parametrize("start", [[1.0], [1.0, 1.0, 1.0], ["x", "y"], [np.nan, 1.0], "ab", [[1.0, 1.0]]])
def test_a_start_that_is_none(start: Any) -> None:
    with pytest.raises(mp.ConfigError, match="start") as raised:
        mp.lmm(SIMPLE, FRAME, start=start)
    assert raised.value.code == "start"


@pytest.mark.parametrize("random", ["(1 | a) + (1 | s)", "(1 | s) + (1 | t)", "(x | s) + (1 | a)", "(1 + x || s) + (1 | a)"])
def test_singular_fits_are_answers(random: str) -> None:
    """s and t have nothing to do with y."""
    rng = np.random.default_rng(12)
    frame = FRAME.with_columns(s=rng.permutation(np.arange(180) % 12), t=rng.permutation(np.arange(180) % 5))
    frame = frame.with_columns(y=pl.col("y") - pl.col("y").mean().over("s") - (pl.col("y") - pl.col("y").mean().over("s")).mean().over("t"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = mp.lmm(f"y ~ x + {random}", frame)
    assert fitted.singular
    assert fitted.converged
    assert mp.SingularFitWarning in {warning.category for warning in caught}
    variances = {(r["group"], r["term1"]): r["variance"] for r in fitted.varcorr().to_pylist() if r["term2"] is None}
    assert variances["s", "(Intercept)"] < 1e-6 * fitted.sigma**2 or "x |" in random
    residual = fitted.tidy().to_pylist()[-1]
    assert residual["std_error"] == pytest.approx(fitted.sigma / np.sqrt(2 * 178), rel=0.2)
    assert np.isfinite(np.asarray(fitted.predict(frame).read_all()["predicted"])).all()
    assert "singular" in str(fitted)


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3, 1e9])
def test_a_response_without_variation_is_refused(value: float) -> None:
    with pytest.raises(mp.DataError) as caught:
        mp.lmm(SIMPLE, FRAME.with_columns(y=pl.lit(value)))
    assert caught.value.code == "no_residual"


def test_dropped_columns() -> None:
    with pytest.warns(mp.RankWarning):
        fitted = mp.lmm("y ~ x + I(2 * x) + (1 | a) + (1 | b)", FRAME)
    assert fitted.dropped == ("I(2 * x)",)
    same(fitted, fit())


def test_far_off_columns_keep_their_digits() -> None:
    far = FRAME.with_columns(x=pl.col("x") * 1e-3 + 2_000.0)
    first, moved = fit("y ~ x + (x | a) + (1 | b)"), mp.lmm("y ~ x + (x | a) + (1 | b)", far)
    assert moved.beta[1] == pytest.approx(first.beta[1] * 1e3, rel=1e-6)
    assert moved.sigma == pytest.approx(first.sigma, rel=1e-7)
    np.testing.assert_allclose(moved.augment(far).read_all()["fitted"], first.augment(FRAME).read_all()["fitted"], rtol=1e-6)


# ---- refused

ERRORS: dict[str, tuple[str, dict[str, Any], type[Exception], str, str]] = {
    "one level": ("y ~ x + (1 | a) + (1 | g)", {}, mp.DataError, "one_level", "g has fewer than two levels"),
    "a level a row": ("y ~ x + (1 | a) + (1 | row)", {}, mp.DataError, "unidentified", "row has as many levels as there are rows"),
    "no column": ("y ~ x + (1 | a) + (1 | nope)", {}, mp.ColumnNotFoundError, "column_not_found", "no column 'nope'"),
    "columns that repeat": ("y ~ x + (1 | b) + (x + I(2 * x) | a)", {}, mp.FormulaError, "random_rank", "repeat each other"),
    "no such method": (SIMPLE, {"method": "dense"}, mp.ConfigError, "", "method = 'dense'"),
    "memory": (SIMPLE, {"options": mp.Options(memory_limit="1MB")}, mp.ResourceError, "memory_limit", "memory limit"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("duckdb_", [True, False])
def test_refused(case: str, duckdb_: bool) -> None:
    formula, arguments, kind, code, message = ERRORS[case]
    frame = FRAME.with_row_index("row")
    with pytest.raises(kind, match=message) as raised:
        mp.lmm(formula, frame.to_arrow() if duckdb_ else frame, **arguments)
    if code and case != "no column":
        assert raised.value.code == code
    if code in ("one_level", "unidentified"):
        assert raised.value.column in ("g", "row")


def test_levels_beyond_the_memory_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are summed: rows, or combinations of keys. Cells go to a file."""
    for repeated in (0.0, 1e9):
        monkeypatch.setattr(crossing, "REPEATED", repeated)
        monkeypatch.setattr(mp.Options, "memory_bytes", 1_000)
        monkeypatch.setattr("mlpipe.planning.Plan.bytes_needed", lambda self: 0)
        with pytest.raises(mp.ResourceError, match=r"levels \(a .*, b 7\)") as raised:
            mp.lmm(SIMPLE, FRAME)
        assert raised.value.code == "memory_limit"


def test_a_level_a_row_with_weights_is_fitted() -> None:
    rng = np.random.default_rng(6)
    w = np.where(rng.random(180) < 0.5, 0.1, 10.0)
    frame = FRAME.with_row_index("row").with_columns(w=w, y=pl.col("y") + 3.0 * rng.normal(size=180) / np.sqrt(w))
    fitted = mp.lmm("y ~ x + (1 | a) + (1 | row)", frame, weights="w")
    assert fitted.converged
    assert fitted.levels == {"row": 180, "a": 10}


# ---- statistics, plans, the command line


@cache
def statistics(collect: str) -> mp.SuffStats:
    return mp.suffstats("y ~ x + z + (x | a) + (1 | b)", FRAME, collect=collect)


@pytest.mark.parametrize("collect", ["fit", "blocks"])
@pytest.mark.parametrize("formula", ["y ~ x + z + (x | a) + (1 | b)", SIMPLE, "y ~ z + (0 + x | a)", "y ~ 1 + (1 | b)"])
def test_statistics_fit_sub_models(collect: str, formula: str) -> None:
    held, whole = mp.lmm(formula, statistics(collect)), mp.lmm(formula, FRAME)
    same(held, whole)
    np.testing.assert_allclose(held.predict(FRAME).read_all()["predicted"], whole.predict(FRAME).read_all()["predicted"], atol=1e-6)
    assert held.groups == whole.groups


def test_statistics_lack_other_factors() -> None:
    with pytest.raises(mp.DataError, match="statistics are over a, b, not c"):
        mp.lmm("y ~ x + (1 | a) + (1 | c)", statistics("fit"))


@pytest.mark.parametrize("duckdb_", [True, False])
def test_the_plan_tells_what_is_summed(duckdb_: bool) -> None:
    plan = mp.plan("lmm", "y ~ x + (x | a) + (1 | b)", FRAME.to_arrow() if duckdb_ else FRAME)
    text = str(plan)
    assert "reads:   4 of 11 columns, 2 full passes" in text
    assert "2 grouping factors, and the cells of levels that meet" in text
    assert re.search(r"levels:  about \d+ of a, \d of b; about \d\d combinations", text)
    assert re.search(r"solver:  exact, with a dense matrix of \d rows at most; about ten evaluations", text)
    assert plan.path == "crossed"
    assert "cross_products" in plan.sql


def test_from_the_command_line(tmp_path: Path) -> None:
    FRAME.write_parquet(tmp_path / "rows.parquet")
    words = ["fit", "y ~ x + (1|a) + (1|b)", str(tmp_path / "rows.parquet"), "--out", str(tmp_path / "fit")]
    run = "import sys; from mlpipe.cli import main; sys.argv[0] = 'mlpipe'; main()"
    done = subprocess.run([sys.executable, "-c", run, *words], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "groups: a, 10; b, 7" in done.stdout
    same(mp.load(tmp_path / "fit"), fit())
    assert json.loads((tmp_path / "fit" / "fit.json").read_text())["fit"]["formula"] == "y ~ x + (1|a) + (1|b)"



@pytest.mark.parametrize("columns", [None, ["x"], ["population"]])
def test_a_key_called_like_a_part_of_the_prediction(columns: list[str] | None) -> None:
    """Shown or not, whatever else the statement computes under that name."""
    rng = np.random.default_rng(5)
    g, x = rng.integers(0, 6, 90), rng.normal(size=90)
    y = x * (1 + rng.normal(size=6)[g]) + rng.normal(size=90)
    frame = pl.DataFrame({"population": g, "z1": rng.integers(0, 4, 90), "x": x, "y": y})
    fit = mp.lmm("y ~ x + (x | population)", frame)
    plain = frame.rename({"population": "g"})
    want = mp.lmm("y ~ x + (x | g)", plain).augment(plain).read_all()["fitted"]
    np.testing.assert_allclose(fit.augment(frame, columns=columns).read_all()["fitted"], want, rtol=1e-9)


def slopes_of_a_factor(seed: int) -> pl.DataFrame:
    """Effects of a factor's levels that are nearly one random number a group."""
    r = np.random.default_rng(seed)
    g, f = r.integers(0, 10, 160), r.choice(["p", "q", "r"], 160)
    effects = r.normal(size=(10, 1)) * 0.3 * r.normal(size=(1, 3))
    eta = 0.5 + effects[g, np.searchsorted(["p", "q", "r"], f)]
    return pl.DataFrame({"g": g, "f": f, "c": r.poisson(np.exp(eta)), "y": eta + r.normal(size=160), "h": r.integers(0, 6, 160)})


@pytest.mark.parametrize(("kind", "seed"), [("lmm", 1), ("lmm", 8), ("lmm", 13), ("glmm", 0), ("glmm", 14)])
def test_a_singular_fit_is_a_maximum_in_every_direction(kind: str, seed: int) -> None:
    """Where a column of Λ ends at zero none of its elements may lead up by itself, and yet several together."""
    frame, more = slopes_of_a_factor(seed), {"family": "poisson"} if kind == "glmm" else {"reml": False}
    formula = "c ~ f + (f | g)" if kind == "glmm" else "y ~ f + (f | g) + (1 | h)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.SingularFitWarning)
        fit = getattr(mp, kind)(formula, frame, **more)
        for k in range(2):
            start = 0.5 * np.random.default_rng(100 + k).normal(size=len(fit.theta))
            assert getattr(mp, kind)(formula, frame, start=start.tolist(), **more).loglik == pytest.approx(fit.loglik, abs=1e-6)


def test_several_variances_may_all_be_zero() -> None:
    frame = pl.DataFrame({"a": np.tile(np.arange(6), 20), "b": np.repeat(np.arange(20), 6)})
    e = np.random.default_rng(4).normal(size=(20, 6))
    e = e - e.mean(axis=0) - e.mean(axis=1, keepdims=True)
    frame = frame.with_columns(y=e.ravel(), x=pl.Series(np.random.default_rng(5).normal(size=120)))
    with pytest.warns(mp.SingularFitWarning):
        fit = mp.lmm("y ~ x + (1 | a) + (1 + x | b)", frame, reml=False)
    assert fit.converged and not fit.theta.any()
    assert fit.loglik == pytest.approx(mp.ols("y ~ x", frame).loglik)
