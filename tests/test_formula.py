"""Formulas: R's algebra of terms, random terms, and errors that point."""
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpipe.errors import FormulaError
from mlpipe.expr import Call, label
from mlpipe.formula import Formula, RandomTerm, Term, parse, parse_expression


def written(terms: tuple[Term, ...]) -> str:
    return " + ".join(":".join(label(node) for node in term.variables) or "1" for term in terms)


def random_part(formula: Formula) -> list[str]:
    return [f"{written(term.terms)} | {term.group_label}" for term in formula.random]


# The fixed terms, in the order of R's terms.formula.
FIXED = [
    ("y ~ x", "1 + x"),
    ("y ~ 1", "1"),
    ("y ~ 0", ""),
    ("y ~ -1 + x", "x"),
    ("y ~ x - 1 + 1", "1 + x"),
    ("y ~ x - 0", "1 + x"),
    ("y ~ +x + -(-1)", "1 + x"),
    ("y ~ x + 0 + z", "x + z"),
    ("y ~ a*b + c", "1 + a + b + c + a:b"),
    ("y ~ a:b + a", "1 + a + a:b"),
    ("y ~ b:a + a:b", "1 + b:a"),
    ("y ~ a:a", "1 + a"),
    ("y ~ a/b/c", "1 + a + a:b + a:b:c"),
    ("y ~ (a + b)/c", "1 + a + b + a:b:c"),
    ("y ~ a/(b + c)", "1 + a + a:b + a:c"),
    ("y ~ a %in% (b + c)", "1 + a:b:c"),
    ("y ~ (a + b + c)^2", "1 + a + b + c + a:b + a:c + b:c"),
    ("y ~ (a + b)**3", "1 + a + b + a:b"),
    ("y ~ (a + b)^1000000000", "1 + a + b + a:b"),
    ("y ~ (z + l:f + x)^2", "1 + z + x + z:x + l:f + z:l:f + l:f:x"),
    ("y ~ x^2", "1 + x"),
    ("y ~ a*b*c - a:b:c", "1 + a + b + c + a:b + a:c + b:c"),
    ("y ~ a*b - (a + b)", "1 + a:b"),
    ("y ~ a - b", "1 + a"),
    ("y ~ a + b:c + d", "1 + a + d + b:c"),
    ("y ~ a + (b - 1)", "a + b"),
    ("y ~ y:x", "1 + y:x"),
    ("y ~ log(x) + log( x ) + I((x))", "1 + log(x) + I((x))"),
    ("y ~ x > 0 ", "1 + x > 0"),
    ("y ~ !flag", "1 + !flag"),
    ("y ~ `odd name`*`x`", "1 + `odd name` + x + `odd name`:x"),
    ("y\n ~\tx", "1 + x"),
]


@pytest.mark.parametrize(("text", "expected"), FIXED)
def test_fixed_terms(text: str, expected: str) -> None:
    formula = parse(text)
    assert written(formula.fixed) == expected and not formula.random and formula.text == text


RANDOM = [
    ("(1 | g)", ["1 | g"]),
    ("(x | g)", ["1 + x | g"]),
    ("(0 + x | g)", ["x | g"]),
    ("(x - 1 | g)", ["x | g"]),
    ("(x || g)", ["1 | g", "x | g"]),
    ("(x*z || g)", ["1 | g", "x | g", "z | g", "x:z | g"]),
    ("(0 + x || g)", ["x | g"]),
    ("(1 || g)", ["1 | g"]),
    ("(1 | g:h)", ["1 | g:h"]),
    ("(1 | a/b)", ["1 | a", "1 | a:b"]),
    ("(1 | a/b/c)", ["1 | a", "1 | a:b", "1 | a:b:c"]),
    ("(1 | a/b:c)", ["1 | a", "1 | a:b:c"]),
    ("(1 | (a:b)/c)", ["1 | a:b", "1 | a:b:c"]),
    ("(x || a/b)", ["1 | a", "x | a", "1 | a:b", "x | a:b"]),
    ("(1 | g:g)", ["1 | g"]),
    ("(1 | factor(k))", ["1 | k"]),
    ("(1 | `odd name`:factor(k))", ["1 | odd name:k"]),
    ("((1 | g)) + ((x + z) | h)", ["1 | g", "1 + x + z | h"]),
    ("(x + (1 | g)) + (0 + x | g)", ["1 | g", "x | g"]),
]


@pytest.mark.parametrize(("text", "expected"), RANDOM)
def test_random_terms(text: str, expected: list[str]) -> None:
    assert random_part(parse("y ~ " + text)) == expected


def test_parts_of_a_formula() -> None:
    formula = parse("cbind(s, n - s) ~ x + offset(log(t)) + offset(u) + ( 1 + x |a/b)")
    assert isinstance(formula.response, Call) and label(formula.response) == "cbind(s, n - s)"
    assert [label(node) for node in formula.offsets] == ["log(t)", "u"]
    (intercept, x) = formula.fixed
    assert formula.random == (RandomTerm((intercept, x), ("a",), "1 + x |a/b"), RandomTerm((intercept, x), ("a", "b"), "1 + x |a/b"))
    assert parse("~ x").response is None
    scaled = parse("log(y + 1)/2 ~ x").response
    assert scaled and label(scaled) == "log(y + 1)/2"
    assert [label(node) for node in parse("y ~ x + (z | g)").variables] == ["x", "z"]


def test_variables_of_a_random_term_have_their_own_order() -> None:
    assert random_part(parse("y ~ a:b + (0 + b:a | g)")) == ["b:a | g"]


def test_expressions() -> None:
    assert label(parse_expression("log(t)")) == "log(t)"
    assert label(parse_expression("`odd name`")) == "`odd name`"


# The text, a part of the message, and what the carets stand under.
BAD = [
    ("", "the formula is empty", (0, 1)),
    ("   ", "the formula is empty", (0, 1)),
    ("y + x", "has no ~", (0, 5)),
    ("y ~ x ~ z", "more than one ~", (6, 7)),
    ("y + (~ x)", "must separate", (5, 6)),
    ("y ~", "something is missing at the end", (3, 4)),
    ("y ~ x +", "something is missing at the end", (7, 8)),
    ("y ~ x + * z", "unexpected '*'", (8, 9)),
    ("y ~ (x + z", "never closed", (4, 5)),
    ("y ~ log(x", "never closed", (7, 8)),
    ("y ~ x)", "unexpected ')'", (5, 6)),
    ("y ~ ()", "unexpected ')'", (5, 6)),
    ("y ~ x z", "unexpected 'z'", (6, 7)),
    ("y ~ 2x", "unexpected 'x'", (5, 6)),
    ("y ~ x # z", "unexpected character '#'", (6, 7)),
    ("y ~ x[1]", "unexpected character '['", (5, 6)),
    ("y ~ _x", "unexpected character '_'", (4, 5)),
    ("y ~ `x", "never closed", (4, 5)),
    ("y ~ ``", "backticks are empty", (4, 6)),
    ("y ~ if", "is a word of R", (4, 6)),
    ("y ~ .", "not supported", (4, 5)),
    ("y ~ . - x", "not supported", (4, 5)),
    ("y ~ 2 + x", "2 is not a term", (4, 5)),
    ("y ~ 1:x", "1 cannot be an operand of :", (4, 5)),
    ("y ~ x/2", "2 cannot be an operand of /", (6, 7)),
    ("y ~ 1e999", "too large", (4, 9)),
    ("y ~ 'a'", "uses no column", (4, 7)),
    ("y ~ TRUE", "uses no column", (4, 8)),
    ("y ~ I(1)", "uses no column", (4, 8)),
    ("1 ~ x", "uses no column", (0, 1)),
    ("y ~ x^z", "whole number", (6, 7)),
    ("y ~ x^0.5", "whole number", (6, 9)),
    ("y ~ x^-1", "whole number", (6, 8)),
    ("y ~ sine(x)", "unknown function sine()", (4, 11)),
    ("y ~ x + I(foo(z))", "unknown function foo()", (10, 16)),
    ("y ~ I(a:b)", ": has no meaning", (6, 9)),
    ("y ~ scale(poly(x, 2))", "poly() makes a term", (10, 20)),
    ("y ~ poly()", "needs a column", (4, 10)),
    ("y ~ cbind(a, b)", "belongs to the left-hand side", (4, 15)),
    ("cbind(a) ~ x", "cbind() takes two columns", (0, 8)),
    ("scale(y) ~ x", "makes a term of its own", (0, 8)),
    ("y ~ x*offset(z)", "can only be added", (6, 15)),
    ("y ~ x - offset(z)", "can only be added", (8, 17)),
    ("y ~ offset(a, b)", "takes one argument", (4, 16)),
    ("y ~ y + x", "the response is also a term", (4, 5)),
    ("y ~ a < b < c", "unexpected '<'", (10, 11)),
    ("y ~ a && b", "&& has no meaning", (4, 10)),
    ("y ~ x + 1 | g", "needs parentheses", (4, 13)),
    ("y | g ~ x", "belongs to the right-hand side", (0, 5)),
    ("y ~ x*(1 | g)", "can only be added", (6, 13)),
    ("y ~ x - (1 | g)", "can only be added", (8, 15)),
    ("y ~ ((1 | g) | h)", "can only be added", (5, 12)),
    ("y ~ (0 | g)", "no coefficient", (5, 6)),
    ("y ~ (1 | a + b)", "a grouping factor is a column", (9, 14)),
    ("y ~ (1 | a*b)", "a grouping factor is a column", (9, 12)),
    ("y ~ (1 | a:(b/c))", "a grouping factor is a column", (9, 16)),
    ("y ~ (1 | log(g))", "a grouping factor is a column", (9, 15)),
    ("y ~ (1 | 1)", "a grouping factor is a column", (9, 10)),
    ("y ~ (1 | g) + (x | h) + (1 | g)", "over g repeats", (24, 31)),
    ("y ~ (1 | g:h) + (1 | h:g)", "over h:g repeats", (16, 25)),
    ("y ~ (1 | g:h) + (x | `g:h`)", "two grouping factors are called g:h", (16, 27)),
    ("y ~ (1 | `g:h`/i) + (1 | g:h:i)", "two grouping factors are called g:h:i", (20, 31)),
    ("y ~ (offset(z) | g)", "can only be added", (5, 14)),
    ("y ~ " + "(" * 200, "nested too deeply", (63, 64)),
    ("y ~ I(" + "+".join("x" * 200) + ")", "nested too deeply", (4, 406)),
    ("y ~ " + "*".join("abcdefghijklmnop"), "more than 10000 terms", (4, 31)),
]


@pytest.mark.parametrize(("text", "message", "span"), BAD, ids=[text[:30] for text, *_ in BAD])
def test_errors_point_at_their_place(text: str, message: str, span: tuple[int, int]) -> None:
    with pytest.raises(FormulaError) as caught:
        parse(text)
    assert message in caught.value.message and caught.value.span == span
    line, carets = caught.value.message.split("\n")[-2:]
    start = carets.index("^")
    assert set(carets.strip()) == {"^"}
    if len(text) <= 60 and text.strip():
        assert (line[2:], start - 2, len(carets)) == (text, span[0], min(span[1], max(len(text), span[0] + 1)) + 2)


def test_the_line_at_fault_of_several_is_shown() -> None:
    with pytest.raises(FormulaError) as caught:
        parse("y ~ a +\n  b ++\n  c c")
    assert caught.value.message.endswith("\n    c c\n      ^")


def test_hints_say_what_to_write() -> None:
    hints = (("y ~ x | g", "(1 + x | g)"), ("y ~ .", "name the columns"), ("y ~ x/2", "I()"), ("y ~ logg(x)", "did you mean 'log'?"))
    for text, hint in hints:
        with pytest.raises(FormulaError) as caught:
            parse(text)
        assert hint in (caught.value.hint or "") and str(caught.value).endswith(caught.value.hint or "-")


def test_long_sums_are_read() -> None:
    assert len(parse("y ~ " + " + ".join(f"x{k}" for k in range(3000))).fixed) == 3001


WORDS = "y x g é ² 0 1 2 1e9 . , = ~ + - * / : ^ ** ( ) | || %in% %% ! & && <= == ` ' \" \\ \n log( I( poly( offset( c( C("
PIECES = st.sampled_from(WORDS.split(" "))
TEXTS = st.one_of(
    st.text(max_size=40), st.lists(PIECES, max_size=14).map("".join), st.lists(PIECES, max_size=12).map(" ".join).map("y ~ {}".format)
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(TEXTS)
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (parse, parse_expression):
        try:
            read(text)
        except FormulaError as error:
            assert error.span is not None and error.message.endswith("^")
