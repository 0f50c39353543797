"""Many models from the scans of one: each must be what a fit of its own rows alone gives."""
from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest

import mlpipe as mp
from mlpipe import collect
from mlpipe.engines import duckdb as engine
from mlpipe.many import Fits, Fitted, Model, fit_many
from mlpipe.options import Options
from mlpipe.plans import Request

FORMULA = "y ~ x + f + (1 + x | g)"


def rows(n: int = 3000, seed: int = 0) -> pl.DataFrame:
    """Five regions; "b" lacks the factor's first level, "c" its most frequent one; some values are missing."""
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({
        "region": rng.choice(["a", "b", "c", "d", "e"], n), "year": rng.integers(2020, 2022, n), "g": rng.integers(0, 15, n),
        "x": rng.normal(10, 3, n), "f": rng.choice(["p", "q", "r"], n, p=[0.2, 0.5, 0.3]), "w": rng.uniform(0.5, 2, n),
        "e": rng.normal(size=n),
    })  # fmt: skip
    effect = pl.Series(rng.normal(size=15))
    fixed = 0.3 * pl.col("x") + (pl.col("f") == "q") * 0.5
    frame = frame.with_columns(y=fixed + effect[frame["g"].to_numpy()] + pl.col("e"), z=-pl.col("e"))
    frame = frame.filter(~((pl.col("region") == "b") & (pl.col("f") == "p")), ~((pl.col("region") == "c") & (pl.col("f") == "q")))
    return frame.with_columns(x=pl.when(pl.int_range(len(frame)) % 40 > 0).then("x"))


def fits_of(frame: Any, models: list[Model], by: tuple[str, ...], **settings: Any) -> Fits:
    return fit_many(models, frame, Request("", by=by, options=Options(threads=None), **settings))


def alike(one: Fitted, alone: mp.LMMFit) -> None:
    fit = one.fit
    assert fit is not None and fit.names == alone.names and (fit.rows, fit.n_blocks) == (alone.rows, alone.n_blocks)
    assert np.abs((fit.beta - alone.beta) / np.sqrt(np.diag(alone.covariance))).max() < 1e-7
    assert abs(fit.loglik - alone.loglik) < 1e-8 + 1e-12 * abs(alone.loglik)
    assert fit.vcov() == pytest.approx(alone.vcov(), rel=1e-6)
    assert fit.info["rows_read"] == alone.info["rows_read"] and fit.info["rows_dropped"] == alone.info["rows_dropped"]


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("settings", [{}, {"weights": "w"}, {"contrasts": {"f": "sum"}}])
def test_one_model_per_value_is_a_fit_of_its_rows(settings: dict[str, Any]) -> None:
    frame = rows()
    made = fits_of(frame, [Model("m", FORMULA, reml=False)], ("region",), **settings)
    assert [one.by for one in made.fits] == [{"region": name} for name in "abcde"]
    assert made.info["passes"] == 3 and made.by.names == ["region"]
    for one in made.fits:
        alike(one, mp.lmm(FORMULA, frame.filter(pl.col("region") == one.by["region"]), reml=False, **settings))


def test_several_columns_of_their_own_types() -> None:
    frame = rows().with_columns(day=pl.date(2026, 1, 1) + pl.duration(days=pl.col("year") - 2020))
    made = fits_of(frame.lazy(), [Model("m", "y ~ x + (1 | g)")], ("region", "day"))
    assert len(made.fits) == 10 and made.fits[1].by == {"region": "a", "day": datetime.date(2026, 1, 2)}
    for one in made.fits[::4]:
        alike(one, mp.lmm("y ~ x + (1 | g)", frame.filter(pl.col("region") == one.by["region"], pl.col("day") == one.by["day"])))


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
def test_several_formulas_and_responses_share_the_scans() -> None:
    frame = rows().drop_nulls()
    models = [
        Model("one", "y ~ x + (1 | g)"), Model("two", "z ~ f * x + (0 + x | g)"), Model("three", "y ~ 0 + f + (1 + x | g)", reml=False),
        Model("four", "y ~ I(x^2) + x + (x || g)"),
    ]  # fmt: skip
    made = fits_of(frame, models, ())
    assert [one.model for one in made.fits] == ["one", "two", "three", "four"] and made.info["passes"] == 3
    for one, model in zip(made.fits, models, strict=True):
        alike(one, mp.lmm(model.formula, frame, reml=model.reml))
    both = fits_of(frame, models[:2], ("region",))
    for one in both.fits[:4]:
        formula = {model.name: model.formula for model in models}[one.model]
        alike(one, mp.lmm(formula, frame.filter(pl.col("region") == one.by["region"])))


def test_a_value_that_cannot_be_fitted_does_not_stop_the_others() -> None:
    frame = rows()
    few = frame.filter(pl.col("region") == "a").with_columns(region=pl.lit("lone"), g=pl.lit(1))
    missing = frame.filter(pl.col("region") == "b").with_columns(region=pl.lit("missing"), x=pl.lit(None, pl.Float64))
    one_level = frame.filter(pl.col("region") == "d").with_columns(region=pl.lit("plain"), f=pl.lit("p"))
    nowhere = frame.head(10).with_columns(region=pl.lit(None, pl.String))
    made = fits_of(pl.concat([frame, few, missing, one_level, nowhere], how="vertical_relaxed"), [Model("m", FORMULA)], ("region",))
    assert {one.by["region"]: one.error.code if one.error else None for one in made.fits} == {
        **dict.fromkeys("abcde"), "lone": "one_level", "missing": "no_rows", "plain": "data",
    }  # fmt: skip
    assert len(made.failed) == 3 and "fewer than two levels" in str(made.failed[0].error)


@pytest.mark.parametrize(("value", "kind"), [(None, pl.String), (float("nan"), pl.Float64)])
def test_rows_without_a_value_are_of_no_model_and_counted(value: Any, kind: Any) -> None:
    frame = rows().with_columns(v=pl.col("year").cast(kind))
    few = frame.with_columns(v=pl.when(pl.int_range(len(frame)) < 17).then(pl.lit(value, kind)).otherwise("v"))
    missing = few[17:]["x"].null_count()
    for data in (few, few.to_arrow()):
        made = fits_of(data, [Model("m", "y ~ x + (1 | g)")], ("v",))
        assert [one.by["v"] for one in made.fits] == frame["v"].unique().sort().to_list() and not made.failed
        assert made.info["dropped"] == {"x": missing, "v": 17} and made.info["rows_nowhere"] == 17
        assert "\n17 rows are of no model: 'v' is missing in 17" in made.told()
        for one in made.fits:
            alike(one, mp.lmm("y ~ x + (1 | g)", few.filter(pl.col("v") == one.by["v"])))
    with pytest.raises(mp.DataError, match="17 rows are of no model: 'v' is missing in 17") as caught:
        fits_of(few, [Model("m", "y ~ e + (1 | g)")], ("v",), na="raise")
    assert caught.value.code == "missing_values" and caught.value.column == "v"


def spoilt(name: str, value: float | None) -> pl.DataFrame:
    """The first row of region "a" has another value of a column."""
    frame = rows().filter(pl.col("x").is_not_null()).sort("region", maintain_order=True)
    return frame.with_columns(pl.when(pl.int_range(len(frame)) == 0).then(pl.lit(value, pl.Float64)).otherwise(name).alias(name))


@pytest.mark.parametrize(
    ("name", "value", "settings", "code", "message"),
    [
        ("x", math.inf, {}, "infinite_values", "the column 'x' is infinite in 1 rows"),
        ("y", -math.inf, {}, "infinite_values", "the column 'y' is infinite in 1 rows"),
        ("w", -1.0, {"weights": "w"}, "negative_weights", "the weight 'w' is negative in 1 rows"),
        ("x", None, {"na": "raise"}, "missing_values", "1 rows have missing values: 'x' is missing in 1"),
        ("e", 0.0, {"weights": "1 / e^2"}, "not_finite", "is not finite in 1 rows, such as e = 0"),
    ],
)
def test_values_that_are_refused(name: str, value: float | None, settings: dict[str, Any], code: str, message: str) -> None:
    """Alone they stop a fit; of many, that of the value whose rows have them."""
    frame = spoilt(name, value)
    with pytest.raises(mp.DataError, match=message) as caught:
        fits_of(frame, [Model("m", "y ~ x + (1 | g)")], (), **settings)
    assert caught.value.code == code
    made = fits_of(frame, [Model("m", "y ~ x + (1 | g)")], ("region",), **settings)
    assert [one.by["region"] for one in made.failed] == ["a"] and len(made.fits) == 5
    error = made.failed[0].error
    assert error is not None and error.code == code and message in error.message
    with pytest.raises(mp.DataError, match=f"no value of region that can be fitted; region=a: .*{message}"):
        fits_of(frame.filter(pl.col("region") == "a"), [Model("m", "y ~ x + (1 | g)")], ("region",), **settings)


def test_what_is_dropped_is_counted_by_cause() -> None:
    frame = rows().with_columns(w=pl.when(pl.int_range(len(rows())) < 3).then(0.0).otherwise("w"))
    made = fits_of(frame, [Model("m", "y ~ x + (1 | g)")], ("region",), weights="w")
    for one in made.fits:
        alone = mp.lmm("y ~ x + (1 | g)", frame.filter(pl.col("region") == one.by["region"]), weights="w")
        assert one.fit is not None and one.fit.info["dropped"] == alone.info["dropped"]
    assert made.info["dropped"] == mp.lmm("y ~ x + (1 | g)", frame, weights="w").info["dropped"]
    with pytest.raises(mp.DataError, match="none of the 20 rows can be used: 'x' is missing in 20") as caught:
        fits_of(frame.head(20).with_columns(x=pl.lit(None, pl.Float64)), [Model("m", "y ~ x + (1 | g)")], ())
    assert caught.value.column == "x"


def test_hundreds_of_values() -> None:
    rng = np.random.default_rng(1)
    n, values = 5_000, 200
    frame = pl.DataFrame({"v": rng.integers(0, values, n), "g": rng.integers(0, 4, n), "x": rng.normal(size=n), "y": rng.normal(size=n)})
    made = fits_of(frame, [Model("m", "y ~ x + (1 | g)")], ("v",))
    assert len(made.fits) == values and not made.failed and made.info["passes"] == 3
    one = made.fits[133]
    alike(one, mp.lmm("y ~ x + (1 | g)", frame.filter(pl.col("v") == one.by["v"])))


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("by", [(), ("v",)])
def test_models_of_rows_summed_in_parts(by: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ranges of the only key, by hash where there is one of `by` too."""
    rng = np.random.default_rng(1)
    n, path = 2_000, str(tmp_path / "rows.parquet")
    frame = pl.DataFrame({"v": rng.integers(0, 2, n), "g": rng.integers(-50, 50, n), "x": rng.normal(size=n)})
    frame = frame.with_columns(y=pl.Series(rng.normal(size=n)), z=pl.Series(rng.normal(size=n)))
    frame.write_parquet(path)
    models = [Model("one", "y ~ x + (1 | g)"), Model("two", "z ~ x + (1 | g)")]
    monkeypatch.setattr(collect, "SPARED", 0)
    monkeypatch.setattr(engine, "table_room", lambda settings: 5_000)
    monkeypatch.setattr(engine, "direct_bits", lambda *_: 6)
    made = fits_of(path, models, by)
    assert ("2 parts by range of 'g'" if not by else "of about") in made.info["notes"][-1]
    for one in made.fits:
        rows = frame.filter(pl.col("v") == one.by["v"]) if by else frame
        alike(one, mp.lmm({model.name: model.formula for model in models}[one.model], rows))


@pytest.mark.parametrize(
    ("models", "by", "error", "message"),
    [
        ([Model("a", "y ~ x + (1 | g)"), Model("b", "y ~ x + (1 | region)")], (), mp.ConfigError, "different grouping factors"),
        ([Model("a", "y ~ x + (1 | g)"), Model("b", "y ~ x + offset(w) + (1 | g)")], (), mp.ConfigError, "offsets"),
        ([Model("a", "y ~ x")], ("region",), mp.ConfigError, "no random term"),
        ([Model("a", "y ~ x + (1 | g)")], ("nothing",), mp.DataError, "no column 'nothing'"),
        ([Model("a", "y ~ x + (1 | g) + (1 | year)")], ("region",), mp.ConfigError, "different grouping factors"),
        ([Model("a", "y ~ x + (1 | g)")], ("g",), mp.ConfigError, "'g' is the grouping factor"),
        ([Model("a", "y ~ log(x - 10) + (1 | g)")], ("region",), mp.DataError, "is not finite"),
    ],
)
def test_what_is_refused(models: list[Model], by: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fits_of(rows(300), models, by)


@pytest.mark.parametrize("kind", ["region::blob", "to_days(year::int)"])
def test_values_that_no_text_stands_for_are_refused(kind: str) -> None:
    con = duckdb.connect()
    con.register("rows", rows(300).to_arrow())
    with pytest.raises(mp.DataError, match="'v' of type .* cannot say what a model is for"):
        fits_of(mp.query(f"select *, {kind} as v from rows", con), [Model("a", "y ~ x + (1 | g)")], ("v",))
