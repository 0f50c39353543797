"""R's design matrices: names, values and order; variables; what is refused."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from mlpipe.design import (
    Atom,
    DesignColumn,
    bases,
    categorical,
    code,
    level_label,
    variables_of,
    with_constants,
    with_levels,
)
from mlpipe.errors import ColumnNotFoundError, ConfigError, DataError, FormulaError
from mlpipe.expr import columns as columns_of
from mlpipe.formula import parse

from .numpy_oracle import kinds_of, matrix, settle

CODING = json.loads((Path(__file__).parent / "reference" / "coding.json").read_text())
DATA = {name: np.array([row[name] for row in CODING["data"]]) for name in CODING["data"][0]}
KINDS = kinds_of(DATA)


def names_of(text: str, **kwargs: Any) -> list[str]:
    formula = parse(text)
    return [column.name for column in code(formula.fixed, settle(formula, DATA, CODING["levels"], **kwargs))]


@pytest.mark.parametrize("case", CODING["cases"], ids=lambda case: case["formula"] + str(case.get("contrasts", "")))
def test_model_matrix_is_that_of_r(case: dict[str, Any]) -> None:
    formula = parse(case["formula"])
    # The reference's ordered factor carries contr.poly by itself; ours is asked for by name.
    ordered = any(CODING["ordered"] in columns_of(node) for node in formula.variables)
    contrasts = case.get("contrasts") or ({CODING["ordered"]: "poly"} if ordered else None)
    variables = settle(formula, DATA, CODING["levels"], contrasts)
    columns = code(formula.fixed, variables)
    names = case["names"] if isinstance(case["names"], list) else [case["names"]]
    assert [column.name for column in columns] == names
    np.testing.assert_allclose(matrix(columns, variables, DATA), np.array(case["matrix"]), rtol=1e-9, atol=1e-9)


NAMES = [
    ('~ C(a, ref = "mid")', ["(Intercept)", 'C(a, ref = "mid")lo', 'C(a, ref = "mid")hi']),
    ("~ C(factor(k), ref = 2)", ["(Intercept)", "C(factor(k), ref = 2)1", "C(factor(k), ref = 2)3"]),
    ("~ C(a, sum)", ["(Intercept)", "C(a, sum)1", "C(a, sum)2"]),
    ("~ C(a, contr.helmert)", ["(Intercept)", "C(a, contr.helmert)1", "C(a, contr.helmert)2"]),
    ('~ C(k, "poly")', ["(Intercept)", 'C(k, "poly").L', 'C(k, "poly").Q']),
    ('~ I(a == "lo")', ["(Intercept)", 'I(a == "lo")TRUE']),
    ('~ 0 + I(a == "lo" & x > 0)', ['I(a == "lo" & x > 0)FALSE', 'I(a == "lo" & x > 0)TRUE']),
    ("~ x > 0", ["(Intercept)", "x > 0TRUE"]),
    ("~ poly(x, 1)", ["(Intercept)", "poly(x, 1)"]),
    ("~ poly(x, 2, raw = TRUE)", ["(Intercept)", "poly(x, 2, raw = TRUE)1", "poly(x, 2, raw = TRUE)2"]),
    ("~ 0 + a:x + a:b", ["alo:x", "amid:x", "ahi:x", "alo:byes", "amid:byes", "ahi:byes"]),
    ("~ 0 + x + a:x", ["x", "x:alo", "x:amid", "x:ahi"]),
    ("~ poly(x, 2):b", ["(Intercept)", "poly(x, 2)1:bno", "poly(x, 2)2:bno", "poly(x, 2)1:byes", "poly(x, 2)2:byes"]),
    ("~ flag:b", ["(Intercept)", "flagFALSE:bno", "flagTRUE:bno", "flagFALSE:byes", "flagTRUE:byes"]),
    ("~ 0 + center(x)", ["center(x)"]),
    ("~ (x)", ["(Intercept)", "x"]),
    ("~ 0", []),
]


@pytest.mark.parametrize(("text", "expected"), NAMES, ids=lambda value: value if isinstance(value, str) else "")
def test_names(text: str, expected: list[str]) -> None:
    assert names_of(text) == expected


def test_random_terms_are_coded_like_fixed_ones() -> None:
    formula = parse("y ~ x + a + (0 + a | b) + (a || w) + (x:a | flag)")
    variables = settle(formula, DATA, CODING["levels"])
    coded = [[column.name for column in code(term.terms, variables)] for term in formula.random]
    assert coded == [["alo", "amid", "ahi"], ["(Intercept)"], ["alo", "amid", "ahi"], ["(Intercept)", "x:alo", "x:amid", "x:ahi"]]
    assert len(variables) == 2


def test_combinations_are_exact_and_sparse() -> None:
    formula = parse("~ a*x")
    columns = code(formula.fixed, settle(formula, DATA, CODING["levels"], {"a": "sum"}))
    lo, hi, x = Atom("a", "lo"), Atom("a", "hi"), Atom("x", "1")
    assert columns[0] == DesignColumn("(Intercept)", (((), 1.0),))
    assert columns[1] == DesignColumn("a1", (((lo,), 1.0), ((hi,), -1.0)))
    assert columns[4] == DesignColumn("a1:x", (((lo, x), 1.0), ((hi, x), -1.0)))


def test_polynomial_contrasts_are_orthonormal_at_every_size() -> None:
    formula = parse("~ C(k, poly)")
    variable = with_levels(variables_of(formula, KINDS, None)[0], list(range(95)))
    columns = code(formula.fixed, {variable.label: variable})
    weights = np.zeros((95, 95))
    for j, column in enumerate(columns):
        for monomial, weight in column.combination:
            weights[int(monomial[0].part) if monomial else slice(None), j] = weight
    weights[:, 0] = 95**-0.5
    np.testing.assert_allclose(weights.T @ weights, np.eye(95), atol=1e-12)
    assert [column.name for column in columns[1:5]] == [f"C(k, poly){suffix}" for suffix in (".L", ".Q", ".C", "^4")]


def test_variables_are_found_once_and_updated_without_change() -> None:
    variables = variables_of(parse("y ~ x + a + scale(z) + (x + a | b)"), KINDS, {"a": "sum"})
    assert [variable.label for variable in variables] == ["x", "a", "scale(z)"]
    assert [variable.label for variable in categorical(variables)] == ["a"]
    assert [variable.label for variable in bases(variables)] == ["scale(z)"]
    scaled = with_constants(variables[2], {"center": 1.0, "scale": 2.0})
    assert variables[2].columns == () and len(scaled.columns) == 1 and scaled.constants == {"center": 1.0, "scale": 2.0}
    assert variables[1].contrast == "sum" and hash(scaled) is not None
    with pytest.raises(ValueError, match="no basis"):
        with_constants(variables[0], {})


@pytest.mark.parametrize(
    ("level", "text"),
    [(True, "TRUE"), (False, "FALSE"), (2, "2"), (2.0, "2"), (0.5, "0.5"), (0.1 + 0.2, "0.3"), (1e5, "1e+05"), (100000, "100000"),
     (1e-4, "1e-04"), (123456.7, "123456.7"), (-1.5, "-1.5"), ("NA", "NA"), ("", ""), (1 / 3, "0.333333333333333")],
)  # fmt: skip
def test_level_labels_are_those_of_r(level: Any, text: str) -> None:
    assert level_label(level) == text


BAD_VARIABLES = [
    ("y ~ log(a)", {}, FormulaError, "log() needs a number, but a is text", (8, 9)),
    ("y ~ x + poly(a, 2)", {}, FormulaError, "needs a number, but a is text", (13, 14)),
    ("y ~ I(a + 1)", {}, FormulaError, "+ needs a number, but a is text", (6, 7)),
    ("y ~ I(a > 1)", {}, FormulaError, "a is text and cannot be compared with a number", (6, 11)),
    ("y ~ poly(x, 1.5)", {}, FormulaError, "the degree must be a whole number", (12, 15)),
    ("y ~ factor(x + 1)", {}, FormulaError, "takes a column or a comparison", (4, 17)),
    ("y ~ factor(k, levels = 3)", {}, FormulaError, "factor() takes one argument", (4, 25)),
    ("y ~ C(a, foo)", {}, FormulaError, "unknown contrast 'foo'", (9, 12)),
    ("y ~ C(a, base = 2)", {}, FormulaError, "no argument 'base'", (16, 17)),
    ('y ~ C(a, sum, ref = "lo")', {}, FormulaError, "ref has no meaning for sum", (20, 24)),
    ("y ~ C(a, ref = x)", {}, FormulaError, "ref takes a level", (15, 16)),
    ("y ~ C(a, sum, 3)", {}, FormulaError, "C() takes a column", (4, 16)),
    ("y ~ x + xx", {}, ColumnNotFoundError, "no column 'xx'", (8, 10)),
    ("y ~ x", {"a": "sum"}, ConfigError, "'a', which is no factor", None),
    ("y ~ x", {"x": "sum"}, ConfigError, "'x', which is numeric", None),
    ('y ~ C(a, ref = "hi")', {"a": "sum"}, ConfigError, "'a', whose coding the formula sets", None),
    ("y ~ a", {"a": "sums"}, ConfigError, "unknown contrast 'sums'", None),
]


@pytest.mark.parametrize(("text", "contrasts", "error", "message", "span"), BAD_VARIABLES, ids=[case[0] for case in BAD_VARIABLES])
def test_bad_uses_point_at_their_place(text: str, contrasts: Any, error: Any, message: str, span: Any) -> None:
    with pytest.raises(error) as caught:
        variables_of(parse(text), KINDS, contrasts)
    assert message in caught.value.message and caught.value.span == span
    if span:
        assert caught.value.message.endswith(f"{text}\n  {' ' * span[0]}{'^' * (span[1] - span[0])}")


def test_contrasts_by_label_or_column() -> None:
    by_column = variables_of(parse("~ factor(k) + C(a, helmert) + a"), KINDS, {"k": "sum", "a": "poly"})
    assert [variable.contrast for variable in by_column] == ["sum", "helmert", "poly"]
    assert [variable.contrast for variable in variables_of(parse("~ C(a)"), KINDS, {"a": "sum"})] == ["sum"]
    by_label = variables_of(parse("~ C(a, helmert) + a"), KINDS, {"C(a, helmert)": "sum"})
    assert [variable.contrast for variable in by_label] == ["sum", "treatment"]


def test_levels_too_few_or_not_there() -> None:
    formula = parse('y ~ C(a, ref = "mid")')
    (variable,) = variables_of(formula, KINDS, None)
    with pytest.raises(FormulaError, match="'mid' is not a level"):
        with_levels(variable, ["lo", "hi"])
    with pytest.raises(DataError, match="fewer than two levels"):
        code(formula.fixed, {variable.label: with_levels(variable, ["mid"])})
    (many,) = variables_of(parse("~ C(a, poly)"), KINDS, None)
    with pytest.raises(DataError, match="too many for polynomial"):
        code(parse("~ C(a, poly)").fixed, {many.label: with_levels(many, [str(k) for k in range(96)])})


# ---- against formulaic, which shares R's algebra of terms but not its order or names

OPERANDS = st.sampled_from(["a", "b", "w", "x", "z"])


def _join(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    joined = st.tuples(parts, st.sampled_from([" + ", ":", " * ", " - ", "/"]), parts).map("".join)
    return st.one_of(joined.map("({})".format), parts.map("({})^2".format))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.recursive(OPERANDS, _join, max_leaves=5), st.booleans())
def test_columns_span_what_formulaic_spans(right: str, intercept: bool) -> None:
    from formulaic import model_matrix
    from pandas import DataFrame

    text = f"~ {right}" if intercept else f"~ 0 + {right}"
    try:
        expected = np.asarray(model_matrix(text, DataFrame(DATA), output="numpy", ensure_full_rank=True), dtype=float)
    except TypeError:
        reject()  # formulaic cannot nest in nothing: (a - a)/b
    formula = parse(text)
    variables = settle(formula, DATA, CODING["levels"])
    ours = matrix(code(formula.fixed, variables), variables, DATA)
    rank, rank_expected, rank_both = (
        int(np.linalg.matrix_rank(values)) if values.size else 0 for values in (ours, expected, np.hstack([ours, expected]))
    )
    assert rank_both == rank_expected
    # R codes b by contrasts in 0 + a:x + a:b although a:x does not span a; formulaic does not, and there spans more.
    if len({variable.kind for variable in variables.values()}) == 1:
        assert rank == rank_expected
