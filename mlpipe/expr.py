"""Scalar expressions over columns: the nodes, their text in R's spelling, the functions we know, and their kinds.

Nodes carry the characters of the source they came from (`span`), so that an error found late can still point
at its place in the formula; `parens` counts the parentheses a user wrote round them, which R keeps in names.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from .errors import ColumnNotFoundError, FormulaError, MlpipeError, did_you_mean

Span = tuple[int, int]


@dataclass(frozen=True)
class Node:
    """Base of all expressions; two nodes are equal when they mean the same, wherever they stand."""

    span: Span = field(default=(0, 0), compare=False, kw_only=True, repr=False)
    parens: int = field(default=0, compare=False, kw_only=True, repr=False)


@dataclass(frozen=True)
class Column(Node):
    """A column of the data, by its exact name."""

    name: str


@dataclass(frozen=True)
class Number(Node):
    """A numeric constant; an int is R's integer literal (`2L`)."""

    value: float | int


@dataclass(frozen=True)
class Text(Node):
    """A string constant."""

    value: str


@dataclass(frozen=True)
class Logical(Node):
    """TRUE or FALSE."""

    value: bool


@dataclass(frozen=True)
class Unary(Node):
    """`-`, `+` or `!` before an operand."""

    op: str
    operand: Node


@dataclass(frozen=True)
class Binary(Node):
    """An operator between two operands; arithmetic, comparison and logic where a value is meant."""

    op: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Call(Node):
    """A function with positional and named arguments."""

    function: str
    args: tuple[Node, ...]
    named: tuple[tuple[str, Node], ...] = ()


@dataclass(frozen=True)
class Case(Node):
    """The value of the first branch whose condition holds, else the default; made by bases, never parsed."""

    branches: tuple[tuple[Node, Node], ...]
    default: Node


ARITHMETIC = frozenset(("+", "-", "*", "/", "^", "%%", "%/%"))
COMPARISON = frozenset(("==", "!=", "<", "<=", ">", ">="))
LOGIC = frozenset(("&", "|"))
BASES = frozenset(("poly", "bs", "ns", "scale", "center"))
FACTORS = frozenset(("C", "factor"))
# Scalar functions: fewest and most arguments.
SCALARS: Mapping[str, tuple[int, int]] = {
    "log": (1, 2), "log2": (1, 1), "log10": (1, 1), "log1p": (1, 1), "exp": (1, 1),
    "expm1": (1, 1), "sqrt": (1, 1), "abs": (1, 1), "I": (1, 1),
}
KNOWN = (*SCALARS, "C", "factor", "poly", "bs", "ns", "scale", "center", "offset", "cbind")
MISPLACED: Mapping[str, str] = {
    **dict.fromkeys(BASES, "makes a term of its own and cannot stand inside another expression"),
    **dict.fromkeys(FACTORS, "makes a categorical variable and cannot stand inside another expression"),
    "offset": "belongs to the right-hand side, added as a term of its own",
    "cbind": "belongs to the left-hand side: cbind(successes, failures) ~ ...",
    "c": "lists numbers for knots and cannot stand elsewhere",
}
RESERVED = frozenset(
    ("if", "else", "repeat", "while", "function", "for", "next", "break", "in", "TRUE", "FALSE", "NULL", "Inf", "NaN", "NA")
)
NAME = re.compile(r"(?:[^\W\d_]|\.(?![0-9]))[\w.]*")
# R's precedence, loosest first; what the parser binds and what `label` puts parentheses round.
PRECEDENCE: Mapping[str, int] = {
    "~": 5, "|": 10, "||": 10, "&": 15, "&&": 15, **dict.fromkeys(COMPARISON, 25), "+": 30, "-": 30,
    "*": 35, "/": 35, "%": 40, ":": 45, "^": 55,
}  # fmt: skip
NOT, SIGN = 20, 50


def precedence(op: str) -> int:
    """How tightly a binary operator binds in R; every %op% binds alike."""
    return PRECEDENCE["%" if op.startswith("%") else op]


def children(node: Node) -> tuple[Node, ...]:
    """The direct sub-expressions, in reading order."""
    match node:
        case Unary(op=_, operand=operand):
            return (operand,)
        case Binary(op=_, left=left, right=right):
            return (left, right)
        case Call(function=_, args=args, named=named):
            return (*args, *(value for _, value in named))
        case Case(branches=branches, default=default):
            return (*(part for branch in branches for part in branch), default)
    return ()


def height(node: Node) -> int:
    """Levels of nesting, found without recursion so that it can guard what recurses."""
    level, count = [node], 0
    while level:
        level, count = [child for parent in level for child in children(parent)], count + 1
    return count


def columns(node: Node) -> tuple[str, ...]:
    """The columns an expression uses, in order of first use."""
    return tuple(dict.fromkeys(_columns(node)))


def _columns(node: Node) -> Iterator[str]:
    if isinstance(node, Column):
        yield node.name
    # In C(x, sum) only the first argument is data.
    parts = node.args[:1] if isinstance(node, Call) and node.function == "C" else children(node)
    for part in parts:
        yield from _columns(part)


def unwrap(node: Node) -> Node:
    """The expression inside any I(...) round it."""
    while isinstance(node, Call) and node.function == "I":
        node = node.args[0]
    return node


# ---- text


def label(node: Node) -> str:
    """The expression as R's deparse writes it, which names its column of the design."""
    text = _bare(node)
    return "(" * node.parens + text + ")" * node.parens


def _bare(node: Node) -> str:
    match node:
        case Column(name=name):
            return quoted_name(name)
        case Number(value=value):
            return f"{value}L" if isinstance(value, int) else number_text(value)
        case Text(value=value):
            return '"' + value.translate(_ESCAPES) + '"'
        case Logical(value=flag):
            return "TRUE" if flag else "FALSE"
        case Unary(op=op, operand=operand):
            return op + _within(operand, NOT if op == "!" else SIGN)
        case Binary(op=op):
            return _binary_text(node)
        case Call(function=function, args=args, named=named):
            given = [label(argument) for argument in args] + [f"{key} = {label(value)}" for key, value in named]
            return f"{function}({', '.join(given)})"
        case Case(branches=branches, default=default):
            tests = "".join(f"ifelse({label(test)}, {label(value)}, " for test, value in branches)
            return tests + label(default) + ")" * len(branches)
    raise TypeError(f"not an expression: {node!r}")


def _binary_text(node: Binary) -> str:
    level, tight = precedence(node.op), node.op in ("/", "^", ":", "%%", "%/%")
    # ^ groups from the right, comparisons not at all, the others from the left.
    left = _within(node.left, level + (node.op == "^" or node.op in COMPARISON))
    right = _within(node.right, level + (node.op != "^"))
    return left + (node.op if tight else f" {node.op} ") + right


def _within(node: Node, level: int) -> str:
    """The operand's text, in parentheses where it binds more loosely than its place asks."""
    own = level
    if isinstance(node, Binary):
        own = precedence(node.op)
    elif isinstance(node, Unary):
        own = NOT if node.op == "!" else SIGN
    return f"({label(node)})" if own < level and not node.parens else label(node)


_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"})


def quoted_name(name: str) -> str:
    """The column's name, in backticks where R would need them."""
    if NAME.fullmatch(name) and name not in RESERVED and name != ".":  # a lone dot means all other columns
        return name
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def number_text(value: float) -> str:
    """A double as R's as.character writes it: up to 15 significant digits, the shorter of fixed and scientific."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"
    digits = len(f"{value:.14e}".split("e")[0].lstrip("-").rstrip("0").replace(".", "")) or 1
    scientific = f"{value:.{digits - 1}e}"
    exponent = int(scientific.split("e")[1])
    fixed = f"{value:.{max(0, digits - 1 - exponent)}f}"
    return fixed if len(fixed) <= len(scientific) else scientific


# ---- errors that point


def pointed(error: MlpipeError, text: str) -> MlpipeError:
    """The same error with the line of `text` it is about and carets under the place, where it has a span."""
    if error.span is None:
        return error
    start, stop = error.span
    begin = text.rfind("\n", 0, start) + 1
    # Of a very long line only the neighbourhood is shown.
    begin = max(begin, start - 60)
    line = text[begin:].split("\n", 1)[0][:120]
    width = max(1, min(stop, begin + len(line)) - start)
    shown = "".join(" " if char.isspace() else char for char in line)
    message = f"{error.message}\n  {shown}\n  {' ' * (start - begin)}{'^' * width}"
    return type(error)(message, code=error.code, hint=error.hint, column=error.column, span=error.span)


# ---- what is allowed


def check(node: Node) -> None:
    """Refuse what is not a plain scalar expression.

    Raises: FormulaError, with the span at fault, for unknown or misplaced functions, a wrong number of
    arguments, and operators that have a meaning only between terms.
    """
    if height(node) > 100:
        raise FormulaError("the expression is nested too deeply", span=node.span)
    _check(node)


def _check(node: Node) -> None:
    if isinstance(node, Call):
        _check_call(node)
    elif isinstance(node, Binary) and node.op not in ARITHMETIC | COMPARISON | LOGIC:
        hint = {"||": "write | for a logical or", "&&": "write & for a logical and"}.get(node.op)
        raise FormulaError(f"{node.op} has no meaning inside an expression", hint=hint, span=node.span)
    for child in children(node):
        _check(child)


def _check_call(node: Call) -> None:
    name = node.function
    if name in MISPLACED:
        raise FormulaError(f"{name}() {MISPLACED[name]}", span=node.span)
    if name not in SCALARS:
        raise unknown_function(node)
    fewest, most = SCALARS[name]
    if node.named:
        hint = "write log(x, 2)" if name == "log" else None
        raise FormulaError(f"{name}() takes no named argument: {node.named[0][0]} =", hint=hint, span=node.span)
    if not fewest <= len(node.args) <= most:
        allowed = "one argument" if most == 1 else f"{fewest} or {most} arguments"
        raise FormulaError(f"{name}() takes {allowed}, not {len(node.args)}", span=node.span)


def unknown_function(node: Call) -> FormulaError:
    """The error for a function we do not have, naming the nearest one and all that we have."""
    close = did_you_mean(node.function, list(KNOWN)) or ""
    guess = close + " " if close.startswith("did") else ""
    return FormulaError(f"unknown function {node.function}()", hint=f"{guess}known functions: {', '.join(KNOWN)}", span=node.span)


# ---- kinds


def kind(node: Node, kinds: Mapping[str, str]) -> str:
    """What an expression's values are: "number", "logical" or "text", given each column's kind.

    Raises: FormulaError, with the span at fault, where a value does not fit its use (the log of a text column);
    ColumnNotFoundError for a column that `kinds` lacks.
    """
    match node:
        case Column(name=name):
            return _column_kind(node, name, kinds)
        case Number():
            return "number"
        case Text():
            return "text"
        case Logical():
            return "logical"
        case Unary(op=op, operand=operand):
            return _require(operand, kinds, op, "logical") if op == "!" else _require(operand, kinds, op, "number")
        case Binary():
            return _binary_kind(node, kinds)
        case Call():
            return _call_kind(node, kinds)
        case Case(branches=branches, default=default):
            for test, _ in branches:
                _require(test, kinds, "a case", "logical")
            return kind(default, kinds)
    raise TypeError(f"not an expression: {node!r}")


def _column_kind(node: Node, name: str, kinds: Mapping[str, str]) -> str:
    if name not in kinds:
        raise ColumnNotFoundError(f"there is no column {name!r}", hint=did_you_mean(name, list(kinds)), column=name, span=node.span)
    return kinds[name]


def _call_kind(node: Call, kinds: Mapping[str, str]) -> str:
    if node.function == "I":
        return kind(node.args[0], kinds)
    if node.function not in SCALARS:
        raise FormulaError(f"{node.function}() {MISPLACED.get(node.function, 'is not known')}", span=node.span)
    for argument in children(node):
        _require(argument, kinds, f"{node.function}()", "number")
    return "number"


def _binary_kind(node: Binary, kinds: Mapping[str, str]) -> str:
    if node.op in COMPARISON:
        return _comparison_kind(node, kinds)
    wanted = "logical" if node.op in LOGIC else "number"
    _require(node.left, kinds, node.op, wanted)
    return _require(node.right, kinds, node.op, wanted)


def _comparison_kind(node: Binary, kinds: Mapping[str, str]) -> str:
    left, right = kind(node.left, kinds), kind(node.right, kinds)
    if (left == "text") != (right == "text"):
        text, other = (node.left, right) if left == "text" else (node.right, left)
        raise FormulaError(f"{label(text)} is text and cannot be compared with a {other}", span=node.span, column=_culprit(text, kinds))
    if left == "text" and node.op not in ("==", "!="):
        raise FormulaError(f"text has no order here: {label(node)}", hint="compare text by == or !=", span=node.span)
    return "logical"


def _require(node: Node, kinds: Mapping[str, str], use: str, wanted: str) -> str:
    found = kind(node, kinds)
    # Logical values count as 0 and 1 where numbers are wanted.
    if found == wanted or (found, wanted) == ("logical", "number"):
        return wanted
    article = "a logical value" if wanted == "logical" else "a number"
    raise FormulaError(f"{use} needs {article}, but {label(node)} is {_KIND_NAMES[found]}", span=node.span, column=_culprit(node, kinds))


_KIND_NAMES = {"text": "text", "number": "a number", "logical": "a logical value"}


def _culprit(node: Node, kinds: Mapping[str, str]) -> str | None:
    return next((name for name in columns(node) if kinds.get(name) == "text"), next(iter(columns(node)), None))


# ---- building


def _operator(op: str) -> Callable[[Node, Node], Node]:
    """The constructor of `left op right`, for code that writes expressions."""

    def build(left: Node, right: Node) -> Node:
        return Binary(op, left, right)

    return build


add, subtract, multiply, divide = map(_operator, "+-*/")
