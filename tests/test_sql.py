"""The SQL that runs: its text per dialect as golden files, and names, levels and values that try to break out of it.

After a change that is meant, `python -m tests.test_sql` writes the golden files again; read the diff before committing it.
"""
from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sqlglot import exp, parse

import mlpipe as mp
from mlpipe import expr, statements
from mlpipe.engines.base import Columns
from mlpipe.engines.dialects import render
from mlpipe.formula import parse_expression
from mlpipe.plans import Plan
from mlpipe.predictions import statement_of
from mlpipe.sources import open_source
from mlpipe.sql import Names, named, number, numeric, skeleton

from .conftest import as_data

GOLDEN = Path(__file__).parent / "golden"
DIALECTS = ("duckdb", "polars")

FRAME = pl.DataFrame(
    {
        "y": [1.0, 2.0, 3.5, 4.0, 5.0, 7.5, 3.0, 2.5],
        "year": [2001, 2002, 2003, 2004, 2005, 2006, 2007, 2008],
        "it's": ["a", "b", "it's", "a", "b", "it's", "a", "b"],
        "g": [1, 1, 2, 2, 3, 3, 4, 4],
        "site": ["u", "v", "u", "v", "u", "v", "u", "v"],
        "w": [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0],
        "n": [1, 1, 2, 2, 1, 1, 1, 1],
    }
)


def slopes() -> Plan:
    return mp.plan("lmm", "log(y) ~ year * `it's` + (1 + year | g)", FRAME, weights="w", freq="n")


def intercepts() -> Plan:
    return mp.plan("lmm", "y ~ I(year > 2004) + offset(w) + (1 | g:site)", FRAME)


def scored(plan: Plan, *parts: str) -> exp.Query:
    """The scoring statement of a fit with given coefficients: estimates would differ in their last digits."""
    fit = mp.lmm("y ~ year + (1 | g:site)", pl.concat([FRAME, FRAME.with_columns(pl.col("y") + pl.col("n"))]))
    covariates = plan.recipe.n_covariates
    gamma = np.concatenate([0.5 + np.arange(covariates), np.zeros(len(plan.recipe.features) - covariates)])
    fit = replace(fit, recipe=plan.recipe, response=plan.recipe.responses[0], gamma=gamma)
    return statement_of(fit, plan.names, {"y": 0, "g": 3}, parts)


def used(plan: Plan) -> Any:
    return statements.usable(plan.recipe, plan.names)


def missing(plan: Plan) -> exp.Query:
    recipe = plan.recipe
    return statements.missing(statements.raw_columns(recipe), recipe.groups, statements.weight_columns(recipe), plan.names)


def levels(plan: Plan) -> exp.Query:
    return statements.levels([v for v in plan.recipe.variables.values() if v.kind == "category"], plan.names, used(plan))


def part_of(plan: Plan, condition: Callable[[Plan], exp.Expr]) -> exp.Query:
    return statements.block_sums(plan.recipe, plan.names, condition(plan))


YEAR = expr.Column("year")
STATEMENTS: dict[str, Callable[[], exp.Query]] = {
    "levels": lambda: levels(slopes()),
    "moments": lambda: statements.moments([YEAR], slopes().names, used(intercepts())),
    "sums": lambda: statements.sums([expr.Binary("^", YEAR, expr.Number(2.0))], slopes().names, used(intercepts())),
    "histogram": lambda: statements.histogram(YEAR, slopes().names, used(intercepts()), 2001, 2008, 4),
    "values": lambda: statements.values(YEAR, slopes().names, used(intercepts())),
    "missing": lambda: missing(slopes()),
    "offenders": lambda: statements.offenders(parse_expression("log(y)"), slopes().recipe, slopes().names),
    "cross_products": lambda: statements.cross_products(intercepts().recipe, intercepts().names),
    "second_level": lambda: statements.second_level(intercepts().recipe, intercepts().names),
    "block_sums": lambda: statements.block_sums(slopes().recipe, slopes().names),
    "cluster_sums": lambda: statements.cluster_sums(slopes().recipe, slopes().names, ["g"], [(0, 1)], [0.5, -1.0, 0, 0, 0, 0, 2.0]),
    "block_sums_part": lambda: part_of(intercepts(), lambda plan: statements.by_hash(plan.recipe, plan.names, 4)[1]),
    "block_sums_range": lambda: part_of(slopes(), lambda plan: statements.by_range(plan.recipe, plan.names, [(-(2**63), 3)])[0]),
    "raw_rows": lambda: statements.raw_rows(intercepts().recipe, intercepts().names),
    "used_rows": lambda: statements.used_rows(slopes().recipe, slopes().names, keys=True),
    "blup_sums": lambda: statements.blup_sums(intercepts().recipe, intercepts().names, [-0.5, 0.0, 1.0]),
    "population": lambda: scored(slopes(), "population", "z1"),
    "residual": lambda: scored(intercepts(), "population", "residual"),
}


HASHED = ("block_sums_part",)  # Polars SQL has no hash
TEXTS = [(name, dialect) for name in STATEMENTS for dialect in DIALECTS if dialect == "duckdb" or name not in HASHED]


def text_of(name: str, dialect: str) -> str:
    return render(STATEMENTS[name](), dialect, pretty=True) + "\n"


def golden(name: str, dialect: str) -> Path:
    return GOLDEN / f"{name}.{dialect}.sql"


@pytest.mark.parametrize(("name", "dialect"), TEXTS)
def test_text_is_the_golden_one(name: str, dialect: str) -> None:
    path = golden(name, dialect)
    was = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    diff = difflib.unified_diff(was, text_of(name, dialect).splitlines(), str(path.name), "now", lineterm="")
    changed = "\n".join(diff)
    assert not changed, f"{changed}\n(meant? python -m tests.test_sql)"


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {golden(name, dialect).name for name, dialect in TEXTS}


def test_the_plan_shows_the_statements_that_run() -> None:
    plan = intercepts()
    assert plan.sql == {
        name: render(STATEMENTS[name](), "polars", pretty=True) for name in ("cross_products", "second_level")
    }
    assert all(text in str(plan) for text in plan.sql.values())


@pytest.mark.parametrize("order", range(6))
def test_the_statements_do_not_depend_on_the_order_of_the_rows(order: int) -> None:
    """Of levels that are as frequent always the same one is left out of the sums."""
    shuffled = FRAME.sample(fraction=1.0, shuffle=True, seed=order)
    formula = "y ~ year * `it's` + site + (1 + year | g)"
    assert mp.plan("lmm", formula, shuffled).sql == mp.plan("lmm", formula, FRAME).sql


# ---- nothing that a user's data or formula holds reaches the parser of an engine as SQL

HOSTILE = [
    "'; drop table stored; --",
    '"; drop table stored; --',
    "x*/ select 1 /*",
    "/* x",
    "-- x",
    "^a$",
    ".*",
    "*",
    "a\nb",
    "a\\",
    "é ü 漢字 🙂",
    "c0",
    "src",
    "select",
    " leading",
    "trailing ",
    "a%b_c",
    "{0}",
    "$1",
    "?",
    "NULL",
]
ENGINES = ("polars", "duckdb", "path")


def plain(rows: int = 36) -> pl.DataFrame:
    rng = np.random.default_rng(7)
    level = rng.integers(0, 3, rows)
    group = np.arange(rows) % 6
    y = rng.normal(size=rows) + np.array([0.0, 1.0, -1.0])[level] + rng.normal(size=6)[group]
    return pl.DataFrame({"y": y, "x": rng.normal(size=rows), "f": np.array(["a", "b", "c"])[level], "g": np.array(list("pqrstu"))[group]})


def ticked(name: str) -> str:
    """As R writes it: a backslash escapes."""
    return "`" + name.replace("\\", "\\\\") + "`"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("first", range(0, len(HOSTILE), 4))
def test_hostile_column_names(first: int, engine: str, tmp_path: Path) -> None:
    """Four of the names for the columns of a fit; the others name columns that it must not read."""
    frame = plain()
    used = (HOSTILE * 2)[first : first + 4]
    decoys = [pl.lit(k).alias(name) for k, name in enumerate(HOSTILE) if name not in used]
    renamed = frame.select(*decoys, *(pl.col(old).alias(name) for old, name in zip("yxfg", used, strict=True)))
    want = mp.lmm("y ~ x + f + (1 | g)", frame)
    y, x, f, g = map(ticked, used)
    data = as_data(renamed, engine, tmp_path)
    fit = mp.lmm(f"{y} ~ {x} + {f} + (1 | {g})", data)
    np.testing.assert_allclose(fit.beta, want.beta, rtol=1e-9)
    assert fit.loglik == pytest.approx(want.loglik, abs=1e-9)
    assert fit.terms[0].group == used[3]
    scores = fit.augment(data).read_all()
    assert scores.column_names == [*renamed.columns, "fitted", "resid", "fitted_fixed"]
    np.testing.assert_allclose(scores["resid"], want.augment(frame).read_all()["resid"], atol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_hostile_levels_and_keys(engine: str, tmp_path: Path) -> None:
    """All hostile texts at once, as levels of a fixed factor and as keys of the groups."""
    rows = 8 * len(HOSTILE)
    rng = np.random.default_rng(3)
    code = np.arange(rows) % len(HOSTILE)
    frame = pl.DataFrame({"y": rng.normal(size=rows), "code": rng.permutation(code), "key": np.arange(rows) // 8})
    odd = frame.select("y", *(pl.col(name).map_elements(HOSTILE.__getitem__, pl.String) for name in ("code", "key")))
    data = as_data(odd, engine, tmp_path)
    fit = mp.lmm("y ~ 0 + code + (1 | key)", data, levels={"code": HOSTILE})
    want = mp.lmm("y ~ 0 + factor(code) + (1 | key)", frame)
    assert list(fit.fixef()) == [f"code{text}" for text in HOSTILE]
    np.testing.assert_allclose(fit.beta, want.beta, rtol=1e-8, atol=1e-8)
    assert sorted(fit.ranef()["key"].to_pylist()) == sorted(HOSTILE)
    scores = fit.augment(data).read_all()
    assert fit.info["scored"] == {"rows": rows, "unseen_levels": 0, "null_predictions": 0}
    np.testing.assert_allclose(scores["fitted"], want.augment(frame).read_all()["fitted"], atol=1e-8)
    fit.write(tmp_path / "fit")
    assert mp.load(tmp_path / "fit").fixef() == fit.fixef()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("text", ["'; drop table stored; --", "it's", '"', "a\\'b", "é🙂", "a\nb"])
def test_hostile_literals(text: str, engine: str, tmp_path: Path) -> None:
    """Text in a formula is compared, never run."""
    frame = plain().with_columns(f=pl.when(pl.col("f") == "b").then(pl.lit(text)).otherwise(pl.col("f")))
    quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    fit = mp.lmm(f"y ~ I(f == {quoted}) + (1 | g)", as_data(frame, engine, tmp_path))
    want = mp.lmm('y ~ I(f == "b") + (1 | g)', plain())
    np.testing.assert_allclose(fit.beta, want.beta, rtol=1e-9)


def test_a_users_table_outlives_hostile_names() -> None:
    import duckdb

    con = duckdb.connect()
    name = '"; drop table stored; --'
    con.execute("create table stored as select range % 5 as g, random() as y from range(40)")
    con.execute(f'alter table stored rename column y to "{name.replace(chr(34), chr(34) * 2)}"')
    mp.lmm(f"`{name}` ~ 1 + (1 | g)", mp.table("stored", con))
    assert con.execute("select count(*) from stored").fetchone() == (40,)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_a_comment_stays_in_it(name: str) -> None:
    text, want = (_cross_products(column) for column in (name, "x"))
    assert len(parse(text, dialect="duckdb")) == 1
    assert _without_comments(text) == _without_comments(want)


def _cross_products(name: str) -> str:
    plan = mp.plan("lmm", f"y ~ {ticked(name)} + (1 | g)", plain().rename({"x": name}))
    return render(statements.cross_products(plan.recipe, plan.names), "duckdb", pretty=True)


def _without_comments(text: str) -> str:
    (tree,) = parse(text, dialect="duckdb")
    assert tree is not None
    return tree.sql(dialect="duckdb", comments=False)


# ---- numbers in SQL are the numbers in Python

VALUES = [0.0, 1.0, -1.5, 0.1, 1e22, 1e23, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 2.0**53 + 2, 1 / 3, -1e-5]


@pytest.mark.parametrize("engine", ["polars", "duckdb"])
def test_literals_keep_every_bit(engine: str, tmp_path: Path) -> None:
    source = open_source(as_data(pl.DataFrame({"x": [1.0]}), engine, tmp_path))
    columns = [named(number(value), f"v{k}") for k, value in enumerate(VALUES)]
    table = source.query(skeleton("rows").select(*columns, append=False, copy=False), Columns()).read_all()
    assert [table[f"v{k}"][0].as_py().hex() for k in range(len(VALUES))] == [value.hex() for value in VALUES]
    source.close()


SCALARS = {
    "log1p(x)": np.log1p, "expm1(x)": np.expm1, "log2(abs(x) + 1)": lambda x: np.log2(abs(x) + 1), "x^3": lambda x: x**3,
    "x %% 3": lambda x: np.mod(x, 3), "x %/% 3": lambda x: np.floor_divide(x, 3), "-x^2": lambda x: -(x**2), "2^x": lambda x: 2**x,
    "sqrt(abs(x)) / (1 + x * x)": lambda x: np.sqrt(abs(x)) / (1 + x * x), "x - 1 - 2": lambda x: x - 3, "x / 2 / 3": lambda x: x / 6,
    "(x > 0) + (x <= 2)": lambda x: (x > 0) * 1.0 + (x <= 2), "log(abs(x) + 1, 3)": lambda x: np.log(abs(x) + 1) / np.log(3),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["polars", "duckdb"])
@pytest.mark.parametrize("text", SCALARS)
def test_functions_are_rs(text: str, engine: str, tmp_path: Path) -> None:
    x = np.array([-0.99, -0.5, -1e-9, 0.0, 1e-12, 1e-6, 0.3, 2.0, 7.0])
    source = open_source(as_data(pl.DataFrame({"x": x}), engine, tmp_path))
    value = named(numeric(parse_expression(text), Names({"x": 0}, {"x": "number"})), "v")
    statement = skeleton("rows").select("rn", value, append=False, copy=False).order_by("rn")
    got = source.query(statement, Columns(frozenset([0]), row_number=True)).read_all()["v"]
    source.close()
    np.testing.assert_allclose(got, SCALARS[text](x), rtol=1e-13, atol=1e-300)


if __name__ == "__main__":
    for statement_name, dialect_name in TEXTS:
        golden(statement_name, dialect_name).write_text(text_of(statement_name, dialect_name), encoding="utf-8")
