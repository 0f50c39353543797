"""Expressions: R's spelling, the columns used, what is allowed, kinds."""
from __future__ import annotations

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlpipe import expr
from mlpipe.errors import ColumnNotFoundError, FormulaError
from mlpipe.expr import Binary, Case, Column, Node, Number, Text, Unary, columns, kind, label, number_text
from mlpipe.formula import parse, parse_expression

KINDS = {"x": "number", "z": "number", "flag": "logical", "grp": "text", "odd name": "text"}

LABELS = [
    ("I( x**2 )", "I(x^2)"),
    ("log( z+1 )", "log(z + 1)"),
    ("x/z", "x/z"),
    ("x*z-1", "x * z - 1"),
    ("(x+1)*2", "(x + 1) * 2"),
    ("((x))", "((x))"),
    ("-x^2", "-x^2"),
    ("(-x)^2", "(-x)^2"),
    ("x %% 2", "x%%2"),
    ("x%/%2L", "x%/%2L"),
    ("!flag&x>=0|z!=1", "!flag & x >= 0 | z != 1"),
    ("`odd name` == 'a\"b'", '`odd name` == "a\\"b"'),
    ("`x`", "x"),
    ("`if` + `1x` + `a\\`b` + `_y`", "`if` + `1x` + `a\\`b` + `_y`"),
    ("größe + .x_1 + `.1`", "größe + .x_1 + `.1`"),
    ("1e5 + 0.00001 + 123456 + 0.1 + 1.50", "1e+05 + 1e-05 + 123456 + 0.1 + 1.5"),
    ("x == TRUE", "x == TRUE"),
]


@pytest.mark.parametrize(("text", "expected"), LABELS)
def test_labels_are_spelled_as_r_deparses(text: str, expected: str) -> None:
    assert label(parse_expression(text)) == expected


@pytest.mark.parametrize("text", ["bs(x, knots = c(-0.5, 0.5))", "poly(x, 2, raw = TRUE)", 'C(x, ref = "b")', "ns(log(x), df = 3)"])
def test_calls_of_a_formula_keep_their_label(text: str) -> None:
    assert label(parse(f"~ {text}").fixed[1].variables[0]) == text


def test_built_expressions_get_the_parentheses_they_need() -> None:
    x, one = Column("x"), Number(1.0)
    assert label(expr.multiply(expr.add(x, one), expr.subtract(x, expr.subtract(one, x)))) == "(x + 1) * (x - (1 - x))"
    assert label(expr.divide(Unary("-", expr.add(x, one)), Binary("^", Binary("^", x, one), one))) == "-(x + 1)/(x^1)^1"
    assert label(Case(((Binary("<", x, one), x),), one)) == "ifelse(x < 1, x, 1)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (1e15, "1e+15"), (123456789.0, "123456789"), (1e-300, "1e-300"), (1 / 3, "0.333333333333333"),
     (-2.5, "-2.5"), (1e5, "1e+05"), (0.0001, "1e-04"), (0.00012, "0.00012"), (math.inf, "Inf"), (-math.inf, "-Inf"), (math.nan, "NaN")],
)  # fmt: skip
def test_numbers_are_spelled_as_in_r(value: float, text: str) -> None:
    assert number_text(value) == text


def test_columns_in_order_of_first_use() -> None:
    assert columns(parse_expression("log(z + x) * z - `odd name`")) == ("z", "x", "odd name")
    assert columns(parse("~ C(grp, sum)").fixed[1].variables[0]) == ("grp",)
    assert columns(Case(((Binary("<", Column("x"), Number(1)), Column("z")),), Column("w"))) == ("x", "z", "w")


def test_places_do_not_count_in_comparisons() -> None:
    first, second = parse_expression("x + 1"), parse_expression("   x  +  1")
    assert first == second and hash(first) == hash(second) and first.span != second.span


KIND = [
    ("x", "number"), ("flag", "logical"), ("grp", "text"), ("I(flag)", "logical"), ("I(x^2)", "number"), ("-flag", "number"),
    ("!flag", "logical"), ("x > 0 & flag", "logical"), ('grp == "a"', "logical"), ('"a" != `odd name`', "logical"), ("flag + 1", "number"),
    ("log(x, 2)", "number"), ("abs(x > z)", "number"), ("TRUE", "logical"), ("flag == TRUE", "logical"), ("x %% 2 == 0", "logical"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), KIND)
def test_kinds(text: str, expected: str) -> None:
    assert kind(parse_expression(text), KINDS) == expected


def test_the_kind_of_a_case_is_that_of_its_values() -> None:
    x = Column("x")
    assert kind(Case(((Binary("<", x, Number(1)), x),), x), KINDS) == "number"
    with pytest.raises(FormulaError, match="a case needs a logical value"):
        kind(Case(((x, x),), x), KINDS)


BAD_KIND = [
    ("log(grp)", "log() needs a number, but grp is text", "grp"),
    ("1 + sqrt(x + grp)", "+ needs a number, but grp is text", "grp"),
    ("!x", "! needs a logical value, but x is a number", "x"),
    ("x & flag", "& needs a logical value, but x is a number", "x"),
    ("grp == 1", "grp is text and cannot be compared with a number", "grp"),
    ("flag == grp", "grp is text and cannot be compared with a logical", "grp"),
    ('grp < "b"', 'text has no order here: grp < "b"', None),
]


@pytest.mark.parametrize(("text", "message", "column"), BAD_KIND)
def test_misfits_name_the_culprit(text: str, message: str, column: str | None) -> None:
    with pytest.raises(FormulaError) as caught:
        kind(parse_expression(text), KINDS)
    assert caught.value.message == message and caught.value.column == column and caught.value.span


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(ColumnNotFoundError, match="no column 'flga'") as caught:
        kind(parse_expression("x + flga"), KINDS)
    assert caught.value.hint == "did you mean 'flag'?" and caught.value.span == (4, 8)


BAD_EXPRESSION = [
    ("sine(x)", "unknown function sine()", "known functions: log"),
    ("logg(x)", "unknown function logg()", "did you mean 'log'?"),
    ("log(poly(x, 2))", "poly() makes a term of its own", ""),
    ("factor(x)", "factor() makes a categorical variable", ""),
    ("c(1, 2)", "c() lists numbers", ""),
    ("exp(x, 2)", "exp() takes one argument, not 2", ""),
    ("log()", "log() takes 1 or 2 arguments, not 0", ""),
    ("log(x, base = 2)", "log() takes no named argument", "log(x, 2)"),
    ("x:z", ": has no meaning inside an expression", ""),
    ("x || z", "|| has no meaning inside an expression", "write |"),
    ("x ~ z", "~ has no meaning", ""),
    ("", "the text is empty", ""),
    ("x y", "unexpected 'y'", ""),
]


@pytest.mark.parametrize(("text", "message", "hint"), BAD_EXPRESSION)
def test_what_is_no_scalar_expression(text: str, message: str, hint: str) -> None:
    with pytest.raises(FormulaError) as caught:
        parse_expression(text)
    assert message in caught.value.message and hint in (caught.value.hint or "") and caught.value.message.endswith("^")


def _joined(parts: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    binary = st.builds(Binary, st.sampled_from(sorted(expr.ARITHMETIC | expr.COMPARISON | expr.LOGIC)), parts, parts)
    unary = st.builds(Unary, st.sampled_from("+-!"), parts)
    call = st.builds(lambda node: expr.Call("log", (node,)), parts)
    return st.one_of(binary, unary, call)


LEAVES = st.one_of(
    st.builds(Column, st.text(min_size=1)),
    st.builds(Text, st.text()),
    st.builds(Number, st.floats(0, 1e300).map(lambda value: float(f"{value:.15g}"))),
    st.builds(expr.Logical, st.booleans()),
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@example(Column("."))
@given(st.recursive(LEAVES, _joined, max_leaves=6))
def test_a_label_reads_back_as_the_expression(node: Node) -> None:
    assert parse_expression(label(node)) == node
