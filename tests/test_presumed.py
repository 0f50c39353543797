"""First passes that take all rows for usable, or all values for finite: the sums must tell where they are not."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import mlpipe as mp


def clean() -> pl.DataFrame:
    rng = np.random.default_rng(4)
    n = 200
    x, z = rng.normal(size=n), rng.normal(size=n)
    t = [["a", "b", "c"][i] for i in rng.integers(0, 3, n)]
    y, g, k = x + 0.5 * z + rng.normal(size=n), rng.integers(0, 9, n), rng.integers(0, 9, n) * 1.0
    return pl.DataFrame({"y": y, "x": x, "z": z, "t": t, "g": g, "k": k})


SEEN = (3, 150)
UNSEEN = (3_000, 30_000)  # of 40,000 rows: between the slices of the sample


def long() -> pl.DataFrame:
    """40,000 rows, most of them outside the sample."""
    return pl.concat([clean()] * 200)


def spoiled(frame: pl.DataFrame, name: str, value: Any, rows: tuple[int, int] = SEEN) -> pl.DataFrame:
    """With the value in two rows."""
    row = pl.int_range(pl.len())
    return frame.with_columns(pl.when(row.is_in(rows)).then(pl.lit(value, frame[name].dtype)).otherwise(pl.col(name)).alias(name))


def passes(formula: str, path: Path) -> tuple[int, int, mp.OLSFit]:
    fit = mp.ols(formula, path)
    return fit.info["passes"], fit.info["rows_dropped"], fit


def test_a_clean_file_is_not_looked_through_for_missing_values(tmp_path: Path) -> None:
    clean().write_parquet(tmp_path / "clean.parquet")
    assert " = 0.0e0" not in mp.plan("ols", "y ~ x + t", tmp_path / "clean.parquet").sql["cross_products"]
    found = passes("y ~ x + t", tmp_path / "clean.parquet")
    assert found[:2] == (1, 0)
    np.testing.assert_allclose(found[2].beta, mp.ols("y ~ x + t", clean().lazy()).beta, rtol=1e-10)


MISSING = pytest.mark.parametrize(
    ("formula", "column", "value", "count"),
    [
        ("y ~ x + t", "x", math.nan, 2), ("y ~ x + t", "y", math.nan, 2), ("y ~ x + z:t", "z", math.nan, 2),
        ("y ~ x + I(z > 0)", "z", math.nan, 1), ("y ~ x + offset(z)", "z", math.nan, 1), ("y ~ x + abs(z)", "z", math.nan, 1),
        ("y ~ x + t", "x", None, 1), ("y ~ x + t", "t", None, 1), ("y ~ poly(x, 2)", "x", math.nan, 1),
    ],
)  # fmt: skip


@MISSING
def test_what_is_missing_is_found(formula: str, column: str, value: Any, count: int, tmp_path: Path) -> None:
    """A NaN that a column of its own shows costs a second pass; where none would show it, or a NULL is counted, the first looks for it."""
    spoiled(long(), column, value, UNSEEN).write_parquet(tmp_path / "rows.parquet")
    found = passes(formula, tmp_path / "rows.parquet")
    assert found[:2] == (count, 2)
    kept = long().filter(~pl.int_range(pl.len()).is_in(UNSEEN))
    np.testing.assert_allclose(found[2].beta, mp.ols(formula, kept).beta, rtol=1e-8)


@MISSING
def test_where_the_sample_shows_it_one_pass_is_enough(formula: str, column: str, value: Any, count: int, tmp_path: Path) -> None:
    spoiled(clean(), column, value).write_parquet(tmp_path / "rows.parquet")
    found = passes(formula, tmp_path / "rows.parquet")
    assert found[:2] == (1, 2)
    kept = clean().filter(~pl.int_range(pl.len()).is_in(SEEN))
    np.testing.assert_allclose(found[2].beta, mp.ols(formula, kept).beta, rtol=1e-8)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_of_any_source_values_are_taken_for_finite(value: float | None) -> None:
    """Where NULLs are not counted beforehand, values are asked for NULL alone, in this pass and in later ones, unless the sums tell."""
    whole = long().with_columns(pl.when(pl.int_range(pl.len()) % 7 == 5).then(None).otherwise(pl.col("z")).alias("z"))
    assert " * 0.0e0 = " not in mp.plan("lmm", "y ~ x + z + (1 | g)", whole.lazy()).sql["cross_products"]
    frame = spoiled(whole, "x", value, (17_000, 30_000))  # a lazy frame's sample is its head
    if value == math.inf:
        with pytest.raises(mp.DataError, match="'x' is infinite in 2 rows"):
            mp.lmm("y ~ x + z + (1 | g)", frame.lazy())
        return
    fit = mp.lmm("y ~ x + z + (1 | g)", frame.lazy())
    want = mp.lmm("y ~ x + z + (1 | g)", frame.drop_nulls().filter(pl.col("x").is_not_nan()))
    assert fit.info["passes"] == (2 if value is None else 3)
    assert fit.rows == want.rows
    assert math.isclose(fit.loglik, want.loglik, rel_tol=1e-10)
    assert [" * 0.0e0 = " in text for text in fit.info["sql"] if " GROUP BY " in text] == [value is not None]


def test_infinities_are_named(tmp_path: Path) -> None:
    spoiled(clean(), "x", math.inf).write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(mp.DataError, match="'x' is infinite in 2 rows"):
        mp.ols("y ~ x", tmp_path / "rows.parquet")
    clean().write_parquet(tmp_path / "log.parquet")
    with pytest.raises(mp.DataError, match="log.*not finite"):
        mp.ols("y ~ x + log(k)", tmp_path / "log.parquet")


@pytest.mark.parametrize("key", ["g", "k"])
def test_keys(key: str, tmp_path: Path) -> None:
    """A key that may be NaN is looked at; one of whole numbers is not."""
    frame = clean() if key == "g" else spoiled(clean(), "k", math.nan)
    frame.write_parquet(tmp_path / "rows.parquet")
    fit = mp.lmm(f"y ~ x + (1 | {key})", tmp_path / "rows.parquet")
    assert (fit.info["passes"], fit.info["rows_dropped"]) == (2, 0 if key == "g" else 2)
    kept = frame.filter(pl.col(key).is_not_nan()) if key == "k" else frame
    np.testing.assert_allclose(fit.beta, mp.lmm(f"y ~ x + (1 | {key})", kept.lazy()).beta, rtol=1e-8)


def test_weights_are_looked_at(tmp_path: Path) -> None:
    clean().with_columns(w=pl.when(pl.col.g == 0).then(0.0).otherwise(1.0)).write_parquet(tmp_path / "rows.parquet")
    fit = mp.ols("y ~ x", tmp_path / "rows.parquet", weights="w")
    assert fit.info["rows_dropped"] == int((clean()["g"] == 0).sum())


def test_later_passes_after_dropped_rows_leave_them_out_too(tmp_path: Path) -> None:
    frame = spoiled(long(), "x", math.nan, UNSEEN)
    frame.write_parquet(tmp_path / "rows.parquet")
    fit = mp.ols("y ~ x", tmp_path / "rows.parquet", cluster="g")
    want = mp.ols("y ~ x", frame.filter(pl.col.x.is_not_nan()), cluster="g")
    np.testing.assert_allclose(fit.vcov(), want.vcov(), rtol=1e-8)
    assert fit.info["passes"] == 3
