"""The only writer of SQL: recipes and expressions to sqlglot nodes, completing the skeletons in `sql/`.

A statement reads the table `src`, whose columns are named by position (c3 a value, k3 a key): the source's own names
never reach an engine's resolver. Literals are written by sqlglot, numbers in exponent form (a bare `1.0` is a DECIMAL).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import reduce
from typing import TYPE_CHECKING

from sqlglot import exp, parse_one

from . import expr
from .design import Atom, Level, Monomial, Variable, level_label
from .features import Recipe
from .sql_files import read_sql

if TYPE_CHECKING:
    from .engines.base import ColumnType

Expression = exp.Expr


def skeleton(name: str) -> exp.Select:
    """The parsed statement of `sql/<name>.sql`, comments included."""
    tree = parse_one(read_sql(name), dialect="duckdb")
    assert isinstance(tree, exp.Select)
    return tree


def number(value: float) -> Expression:
    """A DOUBLE literal; non-finite values by a cast from text, which every engine reads."""
    value = float(value)
    if not math.isfinite(value):
        return exp.cast(exp.Literal.string(str(value)), "double")
    text = repr(abs(value))
    literal = exp.Literal.number(text if "e" in text else text + "e0")
    return exp.Paren(this=exp.Neg(this=literal)) if value < 0 else literal


def _operand(node: Expression) -> Expression:
    return exp.Paren(this=node) if isinstance(node, exp.Binary | exp.Unary) and not isinstance(node, exp.Paren | exp.Dot) else node


def binary(kind: type[Expression], left: Expression, right: Expression) -> Expression:
    """left <kind> right, with parentheses where either side is itself an operation."""
    return kind(this=_operand(left), expression=_operand(right))


def plus(left: Expression, right: Expression) -> Expression:
    """left + right."""
    return binary(exp.Add, left, right)


def summed(parts: Sequence[Expression]) -> Expression:
    """The sum of parts, 0 of none; added in pairs, as parsers and generators of SQL recurse into what is nested."""
    parts = list(parts) or [number(0)]
    while len(parts) > 1:
        parts = [plus(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


def minus(left: Expression, right: Expression) -> Expression:
    """left - right."""
    return binary(exp.Sub, left, right)


def times(left: Expression, right: Expression) -> Expression:
    """left * right."""
    return binary(exp.Mul, left, right)


def ratio(left: Expression, right: Expression) -> Expression:
    """left / right."""
    return binary(exp.Div, left, right)


def total(node: Expression, name: str, comment: str | None = None) -> Expression:
    """sum(node) as name."""
    return named(exp.Sum(this=node), name, comment)


def named(node: Expression, name: str, comment: str | None = None) -> Expression:
    """node as name, with the true name in a comment."""
    alias = exp.Alias(this=node, alias=exp.to_identifier(name, quoted=False))
    if comment:
        alias.comments = [comment]
    return alias


def finite(node: Expression) -> Expression:
    """True where the value is neither NULL, NaN nor infinite, on every engine: only then is its product with 0 equal to 0.

    A comparison with a bound would be folded by the minimum and maximum in a Parquet file, which leave NaN out.
    """
    return exp.EQ(this=times(node, number(0)), expression=number(0))


def both(conditions: Iterable[Expression]) -> Expression:
    """The conjunction of conditions; TRUE of none."""
    return exp.and_(*conditions) if (conditions := list(conditions)) else exp.true()


def case(branches: Iterable[tuple[Expression, Expression]], default: Expression | None) -> Expression:
    """case when … then … else default end."""
    ifs = [exp.If(this=condition, true=value) for condition, value in branches]
    return exp.Case(ifs=ifs, default=default)


class Names:
    """Where the source's columns stand and what they hold: name -> (position, kind). `finite`: columns without NaN and infinities, such as
    those of integers, which are asked for NULL alone; `untyped`: those of nothing but nulls, without a type; `complete`: every row is known
    to be usable, so that statements need not look for missing values again (which costs half as much as reading the rows)."""

    def __init__(
        self, positions: Mapping[str, int], kinds: Mapping[str, str], *, finite: Set[str] = frozenset(), untyped: Set[str] = frozenset(),
        complete: bool = False,
    ) -> None:  # fmt: skip
        self.positions, self.kinds, self.finite, self.untyped, self.complete = positions, kinds, finite, untyped, complete

    @classmethod
    def of(cls, schema: Mapping[str, ColumnType], kinds: Mapping[str, str] | None = None) -> Names:
        """Of all columns of a source; `kinds`, where a fit knows them already."""
        whole = frozenset(name for name, column in schema.items() if column.exact_integer)
        untyped = frozenset(name for name, column in schema.items() if column.untyped)
        known = {name: column.kind for name, column in schema.items()} if kinds is None else kinds
        return cls({name: i for i, name in enumerate(schema)}, known, finite=whole, untyped=untyped)

    def known(self, *, complete: bool, finite: Set[str] = frozenset()) -> Names:
        """The same where it is known whether every row is usable, and of more columns that they are finite."""
        return Names(self.positions, self.kinds, finite=self.finite | finite, untyped=self.untyped, complete=complete)

    def value(self, name: str) -> Expression:
        """The column as a covariate."""
        column = exp.column(f"c{self.positions[name]}")
        # Polars has no logarithm, say, of a column without a type
        return exp.cast(column, "double") if name in self.untyped and self.kinds[name] == "number" else column

    def key(self, name: str) -> exp.Column:
        """The column as a grouping key, in the source's own type."""
        return exp.column(f"k{self.positions[name]}")

    def present(self, name: str, *, key: bool = False) -> Expression:
        """True where the column has a usable value, or `key`."""
        if self.kinds[name] == "number" and name not in self.finite:
            return finite(self.value(name))
        return exp.Not(this=exp.Is(this=self.key(name) if key else self.value(name), expression=exp.Null()))


_ARITHMETIC: dict[str, type[Expression]] = {"+": exp.Add, "-": exp.Sub, "*": exp.Mul, "/": exp.Div}
_COMPARISON: dict[str, type[Expression]] = {"==": exp.EQ, "!=": exp.NEQ, "<": exp.LT, "<=": exp.LTE, ">": exp.GT, ">=": exp.GTE}


def scalar(node: expr.Node, names: Names) -> Expression:
    """The SQL of one scalar expression: a DOUBLE, or a BOOLEAN or VARCHAR where R's value would be logical or text."""
    if isinstance(node, expr.Column):
        return names.value(node.name)
    if isinstance(node, expr.Number):
        return number(node.value)
    if isinstance(node, expr.Text):
        return exp.Literal.string(node.value)
    if isinstance(node, expr.Logical):
        return exp.Boolean(this=node.value)
    if isinstance(node, expr.Unary):
        return _unary(node, names)
    if isinstance(node, expr.Binary):
        return _binary(node, names)
    if isinstance(node, expr.Case):
        return case([(scalar(c, names), numeric(v, names)) for c, v in node.branches], numeric(node.default, names))
    assert isinstance(node, expr.Call)
    return scalar(node.args[0], names) if node.function == "I" else _FUNCTIONS[node.function](*(numeric(a, names) for a in node.args))


def numeric(node: expr.Node, names: Names) -> Expression:
    """The same, with logical values as 0 and 1."""
    sql = scalar(node, names)
    return exp.cast(sql, "double") if expr.kind(node, names.kinds) == "logical" else sql


def _unary(node: expr.Unary, names: Names) -> Expression:
    if node.op == "!":
        return exp.Not(this=exp.Paren(this=scalar(node.operand, names)))
    inner = numeric(node.operand, names)
    return exp.Neg(this=_operand(inner)) if node.op == "-" else inner


def _binary(node: expr.Binary, names: Names) -> Expression:
    op = node.op
    if op in ("&", "|"):
        return binary(exp.And if op == "&" else exp.Or, scalar(node.left, names), scalar(node.right, names))
    if op in _COMPARISON:
        textual = "text" in (expr.kind(node.left, names.kinds), expr.kind(node.right, names.kinds))
        side: Callable[[expr.Node, Names], Expression] = scalar if textual else numeric
        return binary(_COMPARISON[op], side(node.left, names), side(node.right, names))
    left, right = numeric(node.left, names), numeric(node.right, names)
    if op == "^":
        return _power(node.right, left, right)
    if op in ("%%", "%/%"):
        whole = exp.Floor(this=ratio(left, right))
        return whole if op == "%/%" else minus(left, times(right.copy(), whole))
    return binary(_ARITHMETIC[op], left, right)


def _power(exponent: expr.Node, base: Expression, power: Expression) -> Expression:
    """Small whole powers as products: exact for whole numbers and much faster."""
    if isinstance(exponent, expr.Number) and exponent.value in (1, 2, 3, 4):
        return reduce(times, [base.copy() for _ in range(int(exponent.value))])
    return exp.Pow(this=base, expression=power)


def _log(x: Expression, base: Expression | None = None) -> Expression:
    return exp.Ln(this=x) if base is None else ratio(exp.Ln(this=x), exp.Ln(this=base))


def _log1p(x: Expression) -> Expression:
    """ln(1 + x) without cancellation near 0 (Higham 2002, problem 1.5)."""
    u = plus(number(1), x)
    correction = ratio(times(exp.Ln(this=u.copy()), x.copy()), minus(u.copy(), number(1)))
    return case([(exp.EQ(this=exp.Paren(this=u), expression=number(1)), x.copy())], correction)


def _expm1(x: Expression) -> Expression:
    """exp(x) - 1, near 0 by its series."""
    series = times(x, plus(number(1), times(x.copy(), plus(number(0.5), ratio(x.copy(), number(6))))))
    return case([(exp.LT(this=exp.Abs(this=x.copy()), expression=number(1e-5)), series)], minus(exp.Exp(this=x.copy()), number(1)))


_FUNCTIONS: dict[str, Callable[..., Expression]] = {
    "log": _log,
    "log2": lambda x: _log(x, number(2)),
    "log10": lambda x: _log(x, number(10)),
    "log1p": _log1p,
    "exp": lambda x: exp.Exp(this=x),
    "expm1": _expm1,
    "sqrt": lambda x: exp.Sqrt(this=x),
    "abs": lambda x: exp.Abs(this=x),
}


def is_level(variable: Variable, level: Level, names: Names) -> Expression:
    """True where the variable has this level."""
    value = scalar(variable.expression, names)
    if isinstance(level, bool):
        return value if level else exp.Not(this=exp.Paren(this=value))
    return binary(exp.EQ, value, exp.Literal.string(level) if isinstance(level, str) else number(level))


def star(atom: Atom, recipe: Recipe, names: Names) -> Expression:
    """A collected numeric atom: (raw - shift) / scale, the division as an exact multiplication by a power of two."""
    shift, scale = recipe.coordinates.scalings[atom]
    variable = recipe.variables[atom.variable]
    raw = numeric(variable.columns[int(atom.part) - 1], names)
    shifted = minus(raw, number(shift)) if shift else raw
    return times(shifted, number(1 / scale)) if scale != 1 else shifted


def feature(monomial: Monomial, recipe: Recipe, names: Names) -> Expression:
    """A feature: the product of its numeric atoms where all its indicators hold, else 0."""
    numbers = [star(a, recipe, names) for a in monomial if a in recipe.coordinates.scalings]
    flags = [_flag(a, recipe, names) for a in monomial if a not in recipe.coordinates.scalings]
    product = reduce(times, numbers) if numbers else number(1)
    return case([(both(flags), product)], number(0)) if flags else product


def _flag(atom: Atom, recipe: Recipe, names: Names) -> Expression:
    variable = recipe.variables[atom.variable]
    level = next(level for level in variable.levels if level_label(level) == atom.part)
    return is_level(variable, level, names)


def feature_label(monomial: Monomial) -> str:
    """A readable name of a feature, for comments and messages."""
    return ":".join(f"{a.variable}[{a.part}]" for a in monomial) or "1"


def weighted(product: Sequence[str], weight: Sequence[str]) -> Expression:
    """The product of named columns."""
    columns: list[Expression] = [exp.column(name) for name in (*weight, *product)]
    return reduce(times, columns)


def subquery(inner: exp.Select, name: str) -> exp.Subquery:
    """A select as a derived table."""
    return inner.subquery(name, copy=False)


def over(statement: exp.Select, inner: exp.Select | exp.Subquery, name: str) -> exp.Select:
    """The statement with its table `name` replaced by a derived table."""
    for table in list(statement.find_all(exp.Table)):
        if table.name == name:
            table.replace(subquery(inner, name) if isinstance(inner, exp.Select) else inner)
    return statement
