"""Keys of any scalar type through fit, random effects, predictions and disk; factors with hundreds of levels; what is refused."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

import mlpipe as mp
from mlpipe import collect
from mlpipe.engines.dialects import render
from mlpipe.plans import Plan
from mlpipe.sql import number, summed

from .conftest import as_data

FORMULA = "y ~ x + (1 | g)"
pytestmark = pytest.mark.filterwarnings("ignore::mlpipe.MlpipeWarning")


def data(rows: int = 200, groups: int = 12) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    g, x = rng.integers(0, groups, rows), rng.normal(size=rows)
    return pl.DataFrame({"y": x + rng.normal(size=groups)[g] + rng.normal(size=rows), "x": x, "g": g})


def stored(key: str) -> mp.sources.Table:
    con = duckdb.connect()
    frame = data().to_arrow()  # noqa: F841 - read by name
    con.execute(f"create table t as select y, x, {key} as g from frame")
    return mp.table("t", con)


KEYS = {
    "g::hugeint + (1::hugeint << 80)": pa.decimal128(38, 0),
    "g::uhugeint": pa.decimal128(38, 0),
    "g::decimal(38, 3)": pa.decimal128(38, 3),
    "('00000000-0000-0000-0000-0000000000' || (10 + g)::varchar)::uuid": pa.string(),
    "to_days(g::int)": pa.duration("us"),
    "to_months(g::int)": pa.duration("us"),
    "(time '10:00:00' + to_seconds(g::int))": pa.time64("us"),
    "(g::varchar)::blob": pa.binary(),
    "g::json": pa.string(),
    "(timestamp '2020-01-01' + to_days(g::int))::timestamp_s": pa.timestamp("s"),
    "(timestamp '2020-01-01' + to_days(g::int))::timestamp_ns": pa.timestamp("ns"),
    "(timestamptz '2020-01-01 00:00:00+00' + to_days(g::int))": pa.timestamp("us", "Etc/UTC"),
    "(g % 2 = 0)": pa.bool_(),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_this_type_is_found_again(key: str, tmp_path: Path) -> None:
    """In the rows it came from, after a round trip through a directory and a database, and in merged statistics."""
    source = stored(key)
    fit = mp.lmm(FORMULA, source)
    assert str(fit.ranef().schema.field("g").type) == str(KEYS[key])
    want = fit.predict(source).read_all()["predicted"]
    assert fit.info["scored"]["unseen_levels"] == 0 and fit.augment().read_all()["fitted"].equals(want)
    for target in (tmp_path / "fit", tmp_path / "fit.duckdb"):
        fit.write(target)
        loaded = mp.load(target)
        assert loaded.predict(source).read_all()["predicted"].equals(want) and loaded.info["scored"]["unseen_levels"] == 0
    stats = mp.suffstats(FORMULA, source)
    stats.save(tmp_path / "stats")
    both = mp.SuffStats.load(tmp_path / "stats").update(source)
    assert both.blocks is not None and both.blocks.n_blocks == fit.n_blocks and both.rows == 400


@pytest.mark.parametrize("key", ["g::bit", "g::bignum", "('10:00:' || (10 + g)::varchar || '+02')::timetz", "[g]", "{'a': g}"])
def test_a_key_that_arrow_cannot_hold_is_refused(key: str) -> None:
    with pytest.raises(mp.DataError, match="'g' of type .* cannot be a grouping key") as caught:
        mp.lmm(FORMULA, stored(key))
    assert (caught.value.code, caught.value.column) == ("column_type", "g")


@pytest.mark.parametrize("kind", ["polars", "lazy", "path"])
@pytest.mark.parametrize("dtype", [pl.Int128, pl.UInt64, pl.Duration("ms"), pl.Datetime("ns"), pl.Binary, pl.Categorical])
def test_keys_of_polars_types(kind: str, dtype: pl.DataType, tmp_path: Path) -> None:
    frame = data()
    key = pl.col("g").cast(pl.String).cast(dtype) if dtype in (pl.Binary, pl.Categorical) else (pl.col("g") + 2**40).cast(dtype)
    source = as_data(frame.with_columns(g=key), kind, tmp_path)
    fit = mp.lmm(FORMULA, source)
    assert any("not known" in note for note in fit.info["notes"]) == (kind == "path" and dtype == pl.Int128)
    assert fit.loglik == pytest.approx(mp.lmm(FORMULA, frame).loglik, abs=1e-8)
    fit.predict(source).read_all()
    assert fit.info["scored"]["unseen_levels"] == 0


def test_wide_whole_numbers_are_compared_exactly(tmp_path: Path) -> None:
    """Keys a few units apart beyond 2^53, signed where they were fitted, unsigned where they are scored."""
    frame = data().with_columns(g=pl.col("g") + 2**62)
    fit = mp.lmm(FORMULA, frame)
    want = fit.predict(frame).read_all()["predicted"]
    for kind in ("polars", "path", "arrow"):
        source = as_data(frame.with_columns(pl.col("g").cast(pl.UInt64)), kind, tmp_path)
        np.testing.assert_allclose(fit.predict(source).read_all()["predicted"], want, rtol=1e-12)
        assert fit.info["scored"]["unseen_levels"] == 0


def test_a_sum_of_thousands_of_terms_is_not_deep() -> None:
    text = render(summed([number(i) for i in range(3_000)]), "duckdb")
    assert duckdb.sql(f"select {text}").fetchall() == [(2999 * 1500.0,)]
    assert float(render(summed([]), "duckdb")) == 0.0


@pytest.mark.parametrize("kind", ["polars", "path"])
def test_an_infinite_key_is_an_error_and_a_nan_is_missing(kind: str, tmp_path: Path) -> None:
    def with_key(value: float) -> pl.DataFrame:
        return data().with_columns(g=pl.when(pl.col("g") == 3).then(value).otherwise(pl.col("g").cast(pl.Float64)))

    count = int((data()["g"] == 3).sum())
    with pytest.raises(mp.DataError, match=f"'g' is infinite in {count} rows") as caught:
        mp.lmm(FORMULA, as_data(with_key(-float("inf")), kind, tmp_path))
    assert (caught.value.code, caught.value.column) == ("infinite_values", "g")
    assert mp.lmm(FORMULA, as_data(with_key(float("nan")), kind, tmp_path)).info["dropped"] == {"g": count}


@pytest.mark.parametrize("column", ["y", "x"])
def test_values_too_large_to_be_squared(column: str) -> None:
    """Their sums of squares would be infinite: the covariate was called collinear, the response failed in the solver."""
    with pytest.raises(mp.DataError, match=f"^{column} has values of [1-9]e[+]16[01], too large to be squared") as caught:
        mp.lmm(FORMULA, data().with_columns(pl.col(column) * 1e160))
    assert (caught.value.code, caught.value.column) == ("overflow", column)


@pytest.mark.parametrize(("rows", "message"), [(0, "there are no rows"), (3, "none of the 3 rows can be used: 'y' is missing in all")])
def test_a_file_without_values_has_no_rows_rather_than_text(rows: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,x,g\n" + ",1.5,2\n" * rows)
    for fit in (lambda d: mp.lmm(FORMULA, d), lambda d: mp.glmm(FORMULA, d, family="poisson")):
        with pytest.raises(mp.DataError, match=message) as caught:
            fit(tmp_path / "a.csv")
        assert caught.value.code == "no_rows"


def put(column: str, value: object, rows: int = 3) -> pl.DataFrame:
    """The data with one value in the first rows of a column."""
    held = pl.col(column).cast(pl.Float64) if isinstance(value, float) else pl.col(column)
    return data().with_columns(pl.when(pl.int_range(pl.len()) < rows).then(pl.lit(value)).otherwise(held).alias(column))


LEVELS = pl.select(y=pl.int_range(100_000) % 7, x=1.5, g=pl.int_range(100_000) % 5, f=pl.format("l{}", pl.int_range(100_000)))
BAD = {  # formula, data, arguments, code, column, message
    "missing column": ("y ~ X + (1 | g)", data(), {}, "column_not_found", "X", "(?s)there is no column 'X'.*did you mean 'x'"),
    "missing key": ("y ~ x + (1 | gg)", data(), {}, "column_not_found", "gg", "(?s)no column 'gg'.*did you mean 'g'"),
    "response all null": (FORMULA, put("y", None, 200), {}, "no_rows", "y", "none of the 200 rows can be used: 'y' is missing in 200"),
    "response all NaN": (FORMULA, put("y", float("nan"), 200), {}, "no_rows", "y", "'y' is missing in 200"),
    "group all null": (FORMULA, put("g", None, 200), {}, "no_rows", "g", "none of the 200 rows can be used: 'g' is missing in 200"),
    "one level": (FORMULA, put("g", 1, 200), {}, "one_level", "g", "g has fewer than two levels"),
    "a level a row": (FORMULA, data().with_columns(g=pl.int_range(200)), {}, "unidentified", "g", "as many levels as there are rows .200."),
    "infinite response": (FORMULA, put("y", float("inf")), {}, "infinite_values", "y", "'y' is infinite in 3 rows"),
    "infinite covariate": (FORMULA, put("x", -float("inf")), {}, "infinite_values", "x", "'x' is infinite in 3 rows"),
    "a logarithm of 0": ("y ~ log(x) + (1 | g)", put("x", 0.0, 200), {}, "not_finite", "x", r"log\(x\) is not finite in 200 rows.*x = 0"),
    "text response": ("f ~ x + (1 | g)", LEVELS, {}, "response_type", "f", "the response f is not numeric"),
    "a list": (FORMULA, data().with_columns(x=pl.concat_list("x")), {}, "column_type", "x", "'x' of type .* cannot be a covariate"),
    "no rows": (FORMULA, data().head(0), {}, "no_rows", None, "^there are no rows$"),
    "100,000 levels": ("y ~ f + (1 | g)", LEVELS, {}, "too_many_levels", "f", r"(?s)f has 100,000 levels.*random effect, \(1 \| f\)"),
    "negative weights": (FORMULA, data(), {"weights": "x"}, "negative_weights", None, "the weight 'x' is negative in [0-9]+ rows"),
    "missing values": (FORMULA, put("x", None), {"na": "raise"}, "missing_values", "x", "3 rows have missing values: 'x' is missing in 3"),
    "nothing left": (FORMULA, put("y", 2.0, 200), {}, "no_residual", None, "fitted exactly"),
    "little memory": (FORMULA, data(), {"options": mp.Options(memory_limit="1MB")}, "memory_limit", None, "1 MB cannot hold the plan"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["polars", "path"])
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what: str, kind: str, tmp_path: Path) -> None:
    formula, frame, arguments, code, column, message = BAD[what]
    expected = mp.ResourceError if code == "memory_limit" else mp.DataError
    with pytest.raises(expected, match=message) as caught:
        mp.lmm(formula, as_data(frame, kind, tmp_path), **arguments)
    assert caught.value.code == code and (column is None or caught.value.column == column)


def test_a_factor_with_many_levels() -> None:
    """Statements as long as that must not be as deep: parsers and generators of SQL recurse."""
    frame = pl.concat([data(400), data(400)]).with_columns(f=pl.format("l{}", pl.int_range(pl.len()) % 150))
    fit = mp.lmm("y ~ x + f + (1 | g)", frame)
    assert len(fit.fixef()) == 151 and fit.ranef().num_rows == 12
    scored = fit.augment(columns=["y"]).read_all()
    np.testing.assert_allclose(np.add(scored["fitted"], scored["resid"]), scored["y"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("column", ["x", "y", "g"])
@pytest.mark.parametrize("value", ["null", "'nan'::double", "'inf'::double"])
def test_a_value_that_goes_missing_between_the_passes_is_noticed(column: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of the second pass tell."""
    con = duckdb.connect()
    frame = data().with_columns(pl.col("g").cast(pl.Float64)).to_arrow()  # noqa: F841 - read by name
    con.execute("create table t as from frame")
    untouched = collect._blocks

    def later(plan: Plan, parts: object) -> object:
        con.execute(f"update t set {column} = {value} where rowid = 17")
        return untouched(plan, parts)  # type: ignore[arg-type]

    monkeypatch.setattr(collect, "_blocks", later)
    with pytest.raises(mp.DataError) as caught:
        mp.lmm(FORMULA, mp.table("t", con))
    assert caught.value.code == "source_changed"


@pytest.mark.parametrize("random", ["(1 + sample | plate)", "(1 + sample | plate) + (1 | sample)"])
def test_as_many_random_effects_as_rows_are_refused(random: str) -> None:
    """A likelihood without a maximum; fewer effects over the same levels can be fitted."""
    data = pl.read_parquet(mp.datasets.path("penicillin"))
    message = "6 coefficients over 24 levels of plate has as many random effects as there are rows .144."
    with pytest.raises(mp.DataError, match=message) as caught:
        mp.lmm(f"diameter ~ 1 + {random}", data)
    assert caught.value.code == "unidentified" and caught.value.column == "plate"
    held = mp.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", data)
    assert held.converged


@pytest.mark.parametrize("name", ["x", "f", "b", "g"])
def test_rows_to_predict_with_a_column_without_a_type(name: str, tmp_path: Path) -> None:
    """What Polars and pandas write where all of its values are missing."""
    rng = np.random.default_rng(4)
    frame = data().with_columns(f=pl.Series([f"l{i}" for i in rng.integers(0, 3, 200)]), b=pl.Series(rng.random(200) < 0.5))
    frame = frame.with_columns(pl.col("g").cast(pl.String))
    fit = mp.lmm("y ~ x * f + b + (x | g)", frame)
    rows = frame.head(20).with_columns(pl.lit(None).alias(name))
    rows.write_parquet(tmp_path / "rows.parquet")
    for source in (tmp_path / "rows.parquet", rows, rows.to_arrow(), rows.lazy()):
        found = fit.predict(source).read_all()["predicted"]
        assert found.null_count == (0 if name == "g" else 20)
        assert fit.info["scored"]["unseen_levels"] == (20 if name == "g" else 0)
        if name == "g":
            np.testing.assert_allclose(found, fit.predict(source, effects="population").read_all()["predicted"])


def test_functions_of_a_column_without_a_type() -> None:
    """Polars has none of these for its Null."""
    frame = data().with_columns(pl.col("x").abs() + 0.5)
    fit = mp.lmm("y ~ log(x) + I(x^0.5) + abs(x) + exp(x) + (1 | g)", frame)
    empty = frame.with_columns(x=None)
    for rows in (empty, empty.lazy(), empty.to_arrow()):
        assert fit.predict(rows).read_all()["predicted"].null_count == 200
        for fitted in (lambda rows: mp.ols("y ~ g", rows, weights="x"), lambda rows: mp.gee("y ~ 1", rows, groups="g", time="log(x)")):
            with pytest.raises(mp.DataError, match="none of the 200 rows can be used: 'x' is missing in 200") as caught:
                fitted(rows)
            assert (caught.value.code, caught.value.column) == ("no_rows", "x")


@pytest.mark.parametrize("name", ["x", "f", "g", "y"])
def test_rows_to_fit_with_a_column_without_a_type(name: str, tmp_path: Path) -> None:
    frame = data().with_columns(f=pl.when(pl.col("x") > 0).then(pl.lit("a")).otherwise(pl.lit("b"))).with_columns(pl.lit(None).alias(name))
    frame.write_parquet(tmp_path / "rows.parquet")
    for source in (tmp_path / "rows.parquet", frame, frame.to_arrow()):
        for formula in ("y ~ x + (1 | g)", "y ~ x + f + (1 | g)"):
            if name in formula:
                with pytest.raises(mp.DataError, match="none of the .*rows can be used") as caught:
                    mp.lmm(formula, source)
                assert caught.value.code == "no_rows"


@pytest.mark.parametrize("kind", [pl.Datetime("us"), pl.Int32])
def test_a_fit_over_dates_predicts_from_dates_alone(kind: Any, tmp_path: Path) -> None:
    """Timestamps are seconds where dates are days: predictions from them would be far off, and nothing would show it."""
    frame = pl.DataFrame({"g": [0, 1, 2] * 8, "y": [float(i % 5) for i in range(24)], "t": list(range(24))})
    frame = frame.with_columns(pl.col("t").cast(pl.Int32).cast(pl.Date))
    mp.lmm("y ~ t + (1 | g)", frame).write(tmp_path / "fit")
    fit = mp.load(tmp_path / "fit")
    frame.write_parquet(tmp_path / "rows.parquet")
    assert fit.predict(tmp_path / "rows.parquet").read_all()["predicted"].null_count == 0
    with pytest.raises(mp.DataError, match="the column 't' is of kind .*, the fit had date") as caught:
        fit.predict(frame.with_columns(pl.col("t").cast(kind)))
    assert caught.value.column == "t"
