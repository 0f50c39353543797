"""Scoring SQL: run on DuckDB and Polars against `fit.predict`, special functions against scipy, golden text for the other dialects.

After a change that is meant, `python -m tests.test_scoring_sql` writes the golden files again; read the diff before committing it.
"""
from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
from sqlglot import exp, parse_one

import mlpipe as mp
from mlpipe import mean_sql
from mlpipe.engines.warehouses import WAREHOUSES, guarded, render
from mlpipe.formula import parse_expression
from mlpipe.marginal import mean as marginal_mean
from mlpipe.mean_sql import ETA, VARIANCE, Mean
from mlpipe.scoring_sql import _staged
from mlpipe.solve.link import LINKS
from mlpipe.sql import Names, named, numeric
from mlpipe.tables import factor_names

GOLDEN = Path(__file__).parent / "golden_scoring"

def data(n: int = 240) -> pl.DataFrame:
    rng = np.random.default_rng(11)
    g, h = np.arange(n) % 12, rng.integers(0, 5, n)
    x, f = rng.normal(size=n), rng.integers(0, 3, n)
    eta = 0.3 + 0.5 * x + np.array([0.0, 0.4, -0.3])[f] + rng.normal(size=12)[g] + 0.4 * rng.normal(size=5)[h]
    return pl.DataFrame(
        {
            "id": np.arange(n), "x": x, "when": 2000 + rng.integers(0, 20, n), "f": np.array(["a", "it's", "c\\d"])[f],
            "flag": rng.random(n) < 0.5, "g": g, "h": np.array(list("pqrst"))[h], "e": rng.random(n), "y": eta + rng.normal(size=n),
            "b": (rng.random(n) < 1 / (1 + np.exp(-eta))).astype(int), "k": rng.poisson(np.exp(np.minimum(eta, 2))),
            "positive": rng.gamma(3.0, np.exp(0.3 * eta) / 3.0),
        }
    )  # fmt: skip


FRAME = data()
# rows that cannot be used, unseen levels, missing keys
ODD = pl.concat(
    [
        FRAME.head(40),
        FRAME.slice(40, 6).with_columns(
            x=pl.Series([None, float("nan"), 1.0, 1.0, 1.0, 1e3]), f=pl.Series(["a", "a", "new", None, "a", "a"]),
            g=pl.Series([1, 1, 1, 1, None, 99]), h=pl.Series(["p", "p", "p", "p", "unseen", None]),
        ),
    ]
).with_columns(id=pl.int_range(46, dtype=pl.Int64))  # fmt: skip


def on_duckdb(fit: Any, rows: pl.DataFrame, **asked: Any) -> pl.DataFrame:
    """The text's rows in the order of the source, the modes from the tables that `write` leaves."""
    con = duckdb.connect()
    con.register("given", rows.to_arrow())
    con.execute("create table data as from given")
    if fit.terms:
        fit.write(con)
    return con.sql(fit.scoring_sql("duckdb", **asked)).pl().sort("id")


def agrees(got: pl.DataFrame, fit: Any, rows: pl.DataFrame, *, empty: bool = False, **asked: Any) -> None:
    want = pl.from_arrow(fit.predict(rows, **asked).read_all())
    assert got.columns == want.columns
    assert got.drop("predicted").equals(rows)
    assert got["predicted"].is_null().to_list() == want["predicted"].is_null().to_list()
    a, b = (frame["predicted"].drop_nulls().to_numpy() for frame in (got, want))
    assert len(a) > 0 or empty
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


LINEAR = {
    "slopes": "y ~ x + f + (1 + x | g)",
    "contrasts": "y ~ C(f, sum) * flag + C(h, ref = \"q\") + factor(when > 2010) + (1 | g)",
    "poly": "y ~ poly(when, 2) + I(x^2) + (1 | g)",
    "splines": "y ~ bs(x, df = 5) + ns(when, df = 3) + (1 | g)",
    "scaled": "y ~ scale(when) + center(x) + log(e) + offset(x) + I(when %% 4) + (1 | g)",
    "functions": "y ~ log1p(e) + sqrt(e) + exp(x) + I(1 / e) + I(e^0.5) + abs(x) + expm1(x) + (0 + x | g)",
    "several": "y ~ x + f + (1 + x | g) + (1 | h)",
    "pair of keys": "y ~ x + (1 | g:h)",
    "independent": "y ~ x + (1 + x || g)",
}


@functools.cache
def linear(name: str) -> Any:
    return mp.lmm(LINEAR[name], FRAME)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_models(name: str) -> None:
    agrees(on_duckdb(linear(name), ODD), linear(name), ODD)


@pytest.mark.parametrize("asked", [{"effects": "population"}, {"effects": "marginal"}, {"effects": ["h"]}, {"new_levels": "null"}])
def test_what_is_asked_for(asked: dict[str, Any]) -> None:
    agrees(on_duckdb(linear("several"), ODD, **asked), linear("several"), ODD, **asked)


GENERALIZED = {
    "logit": ("b ~ x + f + (1 | g)", "binomial"), "probit": ("b ~ x + (1 + x | g)", "binomial"), "cloglog": ("b ~ x + (1 | g)", "binomial"),
    "cauchit": ("b ~ x + (1 | g)", "binomial"), "log": ("k ~ x + offset(log(e + 1)) + (1 + x | g)", "poisson"),
    "inverse": ("positive ~ e + (1 | g)", "gamma"), "sqrt": ("k ~ e + (1 | g)", "poisson"), "identity": ("positive ~ e + (1 | g)", "gamma"),
    "1/mu^2": ("positive ~ e + (1 | g)", "inverse_gaussian"),
}  # fmt: skip


@functools.cache
def generalized(link: str) -> Any:
    formula, family = GENERALIZED[link]
    return mp.glmm(formula, FRAME, family=family, link=link)


@pytest.mark.filterwarnings("ignore::mlpipe.errors.MlpipeWarning")
@pytest.mark.parametrize("link", GENERALIZED)
def test_every_link(link: str) -> None:
    fit = generalized(link)
    asked: dict[str, Any]
    for asked in ({}, {"effects": "population"}, {"kind": "link"}):
        agrees(on_duckdb(fit, ODD, **asked), fit, ODD, **asked)
    partial = LINKS[link].partial  # where the normal distribution of the effects reaches values without a mean, there is no marginal one
    agrees(on_duckdb(fit, ODD, effects="marginal"), fit, ODD, effects="marginal", empty=partial)


@pytest.mark.filterwarnings("ignore::mlpipe.errors.MlpipeWarning")
@pytest.mark.parametrize("link", ["logit", "cloglog"])
def test_marginal_means_with_slopes(link: str) -> None:
    """A row with x = 1000 has a spread far beyond what the nodes of the others serve."""
    fit = mp.glmm("b ~ x + (1 + x | g)", FRAME, family="binomial", link=link)
    want = fit.predict(ODD.filter(pl.col("x").abs() < 100), effects="marginal")
    got = on_duckdb(fit, ODD, effects="marginal").filter(pl.col("x").abs() < 100)
    np.testing.assert_allclose(got["predicted"].drop_nulls(), pl.from_arrow(want.read_all())["predicted"].drop_nulls(), rtol=1e-10)
    agrees(on_duckdb(fit, ODD, effects="marginal"), fit, ODD, effects="marginal")


def test_a_plain_glm() -> None:
    fit = mp.glm("b ~ x + f", FRAME, family="binomial")
    agrees(on_duckdb(fit, ODD), fit, ODD)


@pytest.mark.filterwarnings("ignore::mlpipe.errors.MlpipeWarning")
@pytest.mark.parametrize("name", ["slopes", "several", "pair of keys"])
def test_on_polars(name: str) -> None:
    fit = linear(name)
    tables: dict[str, Any] = {"data": ODD}
    for group, part in factor_names(fit.groups).items():
        tables[f"mlpipe_ranef_{part}"] = pl.from_arrow(fit.ranef(group, wide=True))
    text = fit.scoring_sql("duckdb")
    stamps = {name: pl.lit(value) for name, value in fit.written.items()}
    tables |= {name: table.with_columns(**stamps) for name, table in tables.items() if name != "data"}
    agrees(pl.SQLContext(tables, eager=True).execute(text).sort("id"), fit, ODD)


def test_the_run_that_was_written(tmp_path: Path) -> None:
    """After mode="append" the tables hold several runs: each fit reads its own."""
    first, second = mp.lmm("y ~ x + (1 | g)", FRAME), mp.lmm("y ~ x + (1 | g)", FRAME.head(150))
    con = duckdb.connect()
    con.register("given", ODD.to_arrow())
    con.execute("create table data as from given")
    first.write(con)
    second.write(con, mode="append")
    for fit in (first, second, mp.load(con)):
        agrees(con.sql(fit.scoring_sql()).pl().sort("id"), fit, ODD)
    first.write(tmp_path / "fit")
    loaded = mp.load(tmp_path / "fit")
    con.execute(f"create or replace table mlpipe_ranef_g as from '{tmp_path}/fit/runs/*/mlpipe_ranef_g.parquet'")
    assert loaded.written == first.written
    agrees(con.sql(loaded.scoring_sql()).pl().sort("id"), loaded, ODD)


def test_the_text_for_postgres_gives_the_same_numbers() -> None:
    """Its whole-row column is all that DuckDB cannot read."""
    fit = linear("slopes")
    con = duckdb.connect()
    con.register("given", ODD.to_arrow())
    con.execute("create table data as from given")
    fit.write(con)
    tree = parse_one(fit.scoring_sql("postgres"), dialect="postgres")
    row = next(node for node in tree.find_all(exp.Dot) if isinstance(node.expression, exp.Star))
    row.replace(exp.Anonymous(this="unnest", expressions=[exp.column("mlpipe_row")]))
    agrees(con.sql(tree.sql("duckdb")).pl().sort("id"), fit, ODD)


HOSTILE = ['a"b', "a`b", "it's", "a\\b", "select", "é 漢字", "a.b", "mlpipe_eta; --", "*/ x /*"]


# BigQuery's columns have no names with a dot
ODD_NAMES = [(name, dialect) for name in HOSTILE for dialect in WAREHOUSES if (name, dialect) != ("a.b", "bigquery")]


@pytest.mark.parametrize(("name", "dialect"), ODD_NAMES)
def test_odd_names_and_levels(name: str, dialect: str) -> None:
    """Names and levels come back from the text as they were, in every dialect; on DuckDB the text runs."""
    ticked = "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"
    rows, fit = _odd(ticked, ticked[:-1] + "2`", name)
    tree = parse_one(fit.scoring_sql(dialect), dialect=dialect)
    assert {name, name + "2"} <= {column.name for column in tree.find_all(exp.Column)}
    texts = {literal.this for literal in tree.find_all(exp.Literal) if literal.is_string}
    assert {name, "it's", "c\\d"} <= texts
    if dialect == "duckdb":
        agrees(on_duckdb(fit, rows), fit, rows)


@functools.cache
def _odd(f: str, g: str, name: str) -> Any:
    rows = FRAME.select("id", "y", "x", pl.col("f").alias(name), pl.col("g").alias(name + "2"))
    rows = rows.with_columns(pl.when(pl.col(name) == "a").then(pl.lit(name)).otherwise(pl.col(name)).alias(name))
    return rows, mp.lmm(f"y ~ x + {f} + (1 | {g})", rows)


def test_bad_requests() -> None:
    fit = linear("slopes")
    for asked, code in (({"dialect": "oracle"}, "dialect"), ({"source": "a b; c"}, "table_name"), ({"source": ""}, "table_name")):
        with pytest.raises(mp.ConfigError) as caught:
            fit.scoring_sql(**asked)
        assert caught.value.code == code
    with pytest.raises(mp.ConfigError, match="raise"):
        fit.scoring_sql(new_levels="raise")
    twice = mp.lmm("y ~ x + X + (1 | g)", FRAME.with_columns(X=pl.col("e")))
    with pytest.raises(mp.ConfigError, match="differ only by case") as caught:
        twice.scoring_sql()
    assert caught.value.column == "X"


def test_names_of_tables() -> None:
    text = linear("slopes").scoring_sql("snowflake", source='db.raw."Rows"', prefix="db.marts.nightly")
    tables = {table.sql("snowflake") for table in parse_one(text, dialect="snowflake").find_all(exp.Table)}
    assert {'db.raw."Rows" AS mlpipe_src', 'db.marts."nightly_ranef_g" AS mlpipe_r0'} <= tables


@pytest.mark.parametrize(("target", "file"), [("out", "out/p_scoring.duckdb.sql"), ("fits.duckdb", "fits_p_scoring.duckdb.sql")])
def test_a_job_writes_the_text_beside_its_result(target: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpipe import job

    monkeypatch.chdir(tmp_path)
    FRAME.write_parquet("rows.parquet")
    output = f'[output]\ntarget = "{target}"\nprefix = "p"\nmode = "overwrite"\nscoring_sql = ["duckdb", "spark"]\n'
    Path("job.toml").write_text(f'[source]\npath = "rows.parquet"\n[model]\nformula = "y ~ x + (1 | g)"\n{output}')
    read = job.read_job("job.toml")
    for _ in range(2):
        fit = job.fit_job(read, {})
        job.write_output(fit, read.output)
    text = Path(file).read_text()
    assert text == fit.scoring_sql("duckdb", prefix="p") and Path(file.replace("duckdb.sql", "spark.sql")).exists()
    assert mp.load(target, prefix="p").scoring_sql("duckdb", prefix="p") == text
    con = duckdb.connect(target if target.endswith(".duckdb") else ":memory:")
    if target == "out":
        con.execute("create table p_ranef_g as from 'out/runs/*/p_ranef_g.parquet'")
    con.execute("create temp table data as from 'rows.parquet'")
    agrees(con.sql(text).pl().sort("id"), fit, FRAME)


@pytest.mark.parametrize(
    ("model", "output", "message"), [('by = ["h"]\n', "", "one fit"), ("", "ranef = false\n", "ranef = false leaves out")]
)
def test_jobs_that_have_no_text(model: str, output: str, message: str, tmp_path: Path) -> None:
    """Of many fits, and where the tables that it would join are not written."""
    from mlpipe import job

    text = f'[source]\npath = "x"\n[model]\nformula = "y ~ x + (1 | g)"\n{model}[output]\ntarget = "out"\nscoring_sql = ["duckdb"]\n'
    (tmp_path / "job.toml").write_text(text + output)
    with pytest.raises(mp.ConfigError, match=message):
        job.read_job(tmp_path / "job.toml")


def test_one_of_many_fits_joins_its_own_levels() -> None:
    """Tables of several models, by the values of a column."""
    from mlpipe.many import Model, fit_many
    from mlpipe.plans import Request
    from mlpipe.store import write_all
    from mlpipe.tables import Entry

    con = duckdb.connect()
    rows = FRAME.with_columns(part=pl.when(pl.col("id") % 2 == 0).then(pl.lit("even")).otherwise(pl.lit("odd")))
    con.register("given", rows.to_arrow())
    con.execute("create table data as from given")
    fits = fit_many([Model("m", "y ~ x + (1 | g)")], rows, Request("", by=("part",)))
    entries = [Entry(one.model, one.fit, one.by) for one in fits.fits]
    write_all(entries, fits.by, con, prefix="mlpipe", mode="error", run_id=None, ranef=True)
    for one in fits.fits:
        agrees(con.sql(one.fit.scoring_sql()).pl().sort("id"), one.fit, rows)


# ---- functions written out, against scipy and by brute force


def evaluated(how: Mean, eta: np.ndarray, variance: np.ndarray | None = None) -> np.ndarray:
    stages = [*how.stages, {"mlpipe_mean": how.value}]
    given = pl.DataFrame({"id": np.arange(len(eta)), ETA: eta} | ({} if variance is None else {VARIANCE: variance}))
    statement = _staged(stages, exp.to_table("given"), [], "duckdb")
    con = duckdb.connect()
    con.register("given", given.to_arrow())
    return con.sql(render(statement, "duckdb")).pl().sort("id")["predicted"].to_numpy()


def test_the_normal_distribution_to_full_precision() -> None:
    from scipy.special import ndtr

    x = np.concatenate([np.linspace(-36, 36, 4001), [0.0, -1e-300, 1e-9, 0.46875 * 2**0.5, 4 * 2**0.5]])
    np.testing.assert_allclose(evaluated(mean_sql.mean("probit"), x), ndtr(x), rtol=1e-12, atol=0)
    np.testing.assert_array_equal(evaluated(mean_sql.mean("probit"), np.array([-1e4, -40.0, 40.0, 1e4])), [0, 0, 1, 1])


@pytest.mark.parametrize("link", LINKS)
def test_inverse_links(link: str) -> None:
    eta = np.concatenate([np.linspace(-30, 30, 601), [1e-8, -1e-8, 600.0, -600.0]])
    want = LINKS[link].means(eta).mu
    np.testing.assert_allclose(evaluated(mean_sql.mean(link), eta), want, rtol=2e-13, atol=1e-200)


def test_the_inverse_link_has_no_mean_across_its_pole() -> None:
    found = evaluated(mean_sql.marginal_mean("inverse", 0.04), np.array([1.69, 1.71, -1.71, -1.69, 0.0]))
    np.testing.assert_array_equal(np.isnan(np.array(found, dtype=float)), [True, False, False, True, True])
    assert found[1] == pytest.approx(-found[2]) and found[1] == pytest.approx(1.0 / 1.71 * (1.0 + 0.04 / 1.71**2), rel=1e-3)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("link", ["logit", "cloglog"])
@pytest.mark.parametrize("sd", [0.0, 0.3, 1.0, 1.99, 2.01, 5.0, 40.0])
def test_means_over_normal_effects(link: str, sd: float) -> None:
    """By both ways, for one spread and for a column of spreads, against a rule with steps 20 times as small."""
    eta = np.concatenate([np.linspace(-12, 12, 97), [-60.0, 60.0]])
    step = 0.02 / max(sd, 1.0)
    x = step * np.arange(-round(9 / step), round(9 / step) + 1)
    w = np.exp(-0.5 * x * x)
    want = LINKS[link].means(eta[:, None] + sd * x).mu @ w / w.sum()
    np.testing.assert_allclose(evaluated(mean_sql.marginal_mean(link, sd**2), eta), want, rtol=0, atol=2e-12)
    np.testing.assert_allclose(evaluated(mean_sql.marginal_mean(link, None), eta, np.full(len(eta), sd**2)), want, rtol=0, atol=2e-12)


@pytest.mark.parametrize("link", ["logit", "cloglog", "cauchit"])
def test_predict_integrates_as_well(link: str) -> None:
    from types import SimpleNamespace

    eta, sd = np.linspace(-6, 6, 49), 1.0
    x = 0.01 * np.arange(-900, 901)
    w = np.exp(-0.5 * x * x)
    want = LINKS[link].means(eta[:, None] + sd * x).mu @ w / w.sum()
    fit: Any = SimpleNamespace(link=link, density=SimpleNamespace(link=LINKS[link]))
    np.testing.assert_allclose(marginal_mean(fit, eta, np.full(49, sd**2)), want, rtol=0, atol=1e-11)


def test_functions_without_a_value_give_null() -> None:
    x = [-1.0, 0.0, 2.0, 1e4]
    columns = [named(guarded(numeric(parse_expression(text), Names({"x": 0}, {"x": "number"}))), f"v{k}") for k, text in enumerate(
        ["log(x)", "sqrt(x)", "exp(x)", "1 / x", "x^0.5", "x^(-1)", "(x > 0) + 1"]
    )]  # fmt: skip
    con = duckdb.connect()
    con.execute("create table t as select unnest($1) as c0", [x])
    got = con.execute(render(exp.select(*columns).from_("t"), "duckdb")).fetchall()
    e = np.exp
    assert got[0] == (None, None, pytest.approx(e(-1.0)), -1.0, None, -1.0, 1.0)
    assert got[1] == (None, 0.0, 1.0, None, 0.0, None, 1.0)
    assert got[3][2] is None and got[3][0] == pytest.approx(np.log(1e4))


# ---- golden text


def given(fit: Any) -> Any:
    """The fit with rounded estimates, which do not differ from machine to machine."""
    from dataclasses import replace

    terms = tuple(replace(term, Q=np.round(term.Q, 3), R=np.round(term.R, 3), star=np.round(term.star, 3)) for term in fit.terms)
    return replace(fit, gamma=np.round(fit.gamma, 3), terms=terms, sigma=1.0, written={"run_id": "run1", "model": fit.formula})


def texts() -> dict[str, tuple[Any, dict[str, Any]]]:
    exact = FRAME.with_columns(x=(pl.col("x") * 4).round() / 4)
    slopes = mp.lmm("y ~ log(when) * f + flag + I(flag & x > 0) + (1 + x | g)", exact)
    herds = mp.glmm("b ~ when + (1 | g:h)", exact, family="binomial", link="probit")
    return {"slopes": (given(slopes), {}), "marginal": (given(herds), {"effects": "marginal", "source": "lake.rows"})}


@functools.cache
def fixed_texts() -> dict[str, str]:
    given = texts().items()
    return {f"{name}.{dialect}.sql": fit.scoring_sql(dialect, **asked) for name, (fit, asked) in given for dialect in WAREHOUSES}


@pytest.mark.parametrize("dialect", WAREHOUSES)
@pytest.mark.parametrize("name", ["slopes", "marginal"])
def test_text_is_the_golden_one(name: str, dialect: str) -> None:
    file = f"{name}.{dialect}.sql"
    assert fixed_texts()[file] == (GOLDEN / file).read_text(encoding="utf-8"), "meant? python -m tests.test_scoring_sql"


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == set(fixed_texts())


@pytest.mark.parametrize("dialect", WAREHOUSES)
def test_only_functions_that_every_engine_has(dialect: str) -> None:
    everywhere = {"ABS", "ATAN", "CASE", "CAST", "COALESCE", "EXP", "FLOOR", "LN", "NULLIF", "POWER", "SQRT"}
    everywhere |= {"AND", "OR", "IF"}  # nodes of sqlglot that are no functions in the text
    everywhere |= {"TRY_CAST"} if dialect == "spark" else set()  # how it reads Spark's CAST
    for file, text in fixed_texts().items():
        if file.endswith(f".{dialect}.sql"):
            tree = parse_one(text, dialect=dialect)
            assert {node.sql_name() for node in tree.find_all(exp.Func)} <= everywhere
            assert not list(tree.find_all(exp.Anonymous))


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file_name, file_text in fixed_texts().items():
        (GOLDEN / file_name).write_text(file_text, encoding="utf-8")
