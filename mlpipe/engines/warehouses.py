"""SQL that runs where mlpipe does not: what warehouses lack, refuse or name otherwise, one table, and the rendering of nodes to text."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sqlglot import exp

from ..errors import ConfigError, did_you_mean


class Warehouse(NamedTuple):
    """`literals`: whether `1.5e0` is a DOUBLE (else a decimal number that is cast); `except_`: whether `t.*` can leave columns out."""

    literals: bool
    except_: bool


WAREHOUSES = {
    "duckdb": Warehouse(literals=True, except_=True),
    "postgres": Warehouse(literals=False, except_=False),
    "snowflake": Warehouse(literals=False, except_=True),
    "bigquery": Warehouse(literals=True, except_=True),
    "spark": Warehouse(literals=True, except_=True),
}
LARGEST_EXP = 709.0  # above it exp overflows: an error in Postgres and BigQuery
SMALLEST_EXP = -700.0  # below it exp is as good as 0: an underflow is an error in Postgres


def warehouse(dialect: str) -> Warehouse:
    """What is known of a dialect. Raises ConfigError for others."""
    if dialect not in WAREHOUSES:
        raise ConfigError(f"there is no dialect {dialect!r}", code="dialect", hint=did_you_mean(str(dialect), list(WAREHOUSES)))
    return WAREHOUSES[dialect]


def guarded(tree: exp.Expr) -> exp.Expr:
    """The expression with NULL where a function has no finite value, which most warehouses refuse with an error, and logical values as
    numbers by CASE, which most cannot cast."""
    root = exp.Tuple(expressions=[tree])
    for node in reversed(list(root.walk())):
        if guard := _GUARDS.get(type(node)):
            node.replace(guard(node))
    out: exp.Expr = root.expressions[0]
    return out


def _number(value: float) -> exp.Expr:
    literal = exp.Literal.number(f"{abs(value)!r}e0")
    return exp.Neg(this=literal) if value < 0 else literal


def _where(condition: exp.Expr, value: exp.Expr) -> exp.Expr:
    """The value where the condition holds, else NULL."""
    return exp.Case(ifs=[exp.If(this=condition, true=value)])


def _ln(node: exp.Expr) -> exp.Expr:
    constant = isinstance(node.this, exp.Literal)
    return node.copy() if constant else _where(exp.GT(this=_operand(node.this), expression=_number(0.0)), node.copy())


def _sqrt(node: exp.Expr) -> exp.Expr:
    return _where(exp.GTE(this=_operand(node.this), expression=_number(0.0)), node.copy())


def _exp(node: exp.Expr) -> exp.Expr:
    small = exp.If(this=exp.LT(this=_operand(node.this), expression=_number(SMALLEST_EXP)), true=_number(0.0))
    fits = exp.If(this=exp.LTE(this=_operand(node.this), expression=_number(LARGEST_EXP)), true=node.copy())
    return exp.Case(ifs=[small, fits])


def _pow(node: exp.Expr) -> exp.Expr:
    base, power, zero = _operand(node.this), _operand(node.expression), _number(0.0)
    whole = exp.EQ(this=exp.Floor(this=node.expression.copy()), expression=power)
    negative = exp.And(this=exp.LT(this=base, expression=zero), expression=whole)
    at_zero = exp.And(this=exp.EQ(this=base.copy(), expression=zero.copy()), expression=exp.GTE(this=power.copy(), expression=zero.copy()))
    positive = exp.GT(this=base.copy(), expression=zero.copy())
    return _where(exp.or_(positive, negative, at_zero), node.copy())


def _div(node: exp.Expr) -> exp.Expr:
    right = node.expression
    if isinstance(right, exp.Literal) and float(right.this) != 0.0:
        return node.copy()
    return exp.Div(this=node.this.copy(), expression=exp.Nullif(this=right.unnest().copy(), expression=_number(0.0)))


def _cast(node: exp.Expr) -> exp.Expr:
    value = node.this.unnest()
    no = exp.If(this=exp.Not(this=exp.Paren(this=value.copy())), true=_number(0.0))
    return exp.Paren(this=exp.Case(ifs=[exp.If(this=value.copy(), true=_number(1.0)), no]))


_GUARDS: dict[type[exp.Expr], Callable[[exp.Expr], exp.Expr]] = {
    exp.Ln: _ln, exp.Sqrt: _sqrt, exp.Exp: _exp, exp.Pow: _pow, exp.Div: _div, exp.Cast: _cast,
}  # fmt: skip


def _operand(node: exp.Expr) -> exp.Expr:
    bare = isinstance(node, exp.Paren | exp.Column | exp.Literal | exp.Func) and not isinstance(node, exp.And | exp.Or)
    return node.copy() if bare else exp.Paren(this=node.copy())


def handed_on(dialect: str, table: str, row: str, hidden: Sequence[str]) -> exp.Expr:
    """All columns of `table` that came with its rows: those not `hidden`, or the fields of `row`, where that holds the whole row."""
    if not warehouse(dialect).except_:
        return exp.Dot(this=exp.Paren(this=exp.column(row, table=table)), expression=exp.Star())
    left_out = [exp.to_identifier(name) for name in hidden]
    return exp.Column(this=exp.Star(except_=left_out), table=exp.to_identifier(table))


def render(tree: exp.Expr, dialect: str) -> str:
    """The text of a statement, which is used up; every number a DOUBLE and no division one of whole numbers."""
    literals = warehouse(dialect).literals
    for node in list(tree.walk()):
        if isinstance(node, exp.Div):
            node.set("typed", True)
        elif isinstance(node, exp.Literal) and not node.is_string and not literals and not _beside_double(node):
            node.replace(exp.cast(node.copy(), "double"))
    return tree.sql(dialect=dialect, pretty=True, copy=False)


def _beside_double(node: exp.Expr) -> bool:
    """Whether a number meets a DOUBLE in an operation, which makes it one."""
    parent = node.parent
    while isinstance(parent, exp.Paren | exp.Neg):
        node, parent = parent, parent.parent
    if not isinstance(parent, exp.Add | exp.Sub | exp.Mul | exp.Div | exp.EQ | exp.NEQ | exp.LT | exp.LTE | exp.GT | exp.GTE):
        return False
    other = parent.expression if parent.this is node else parent.this
    while isinstance(other, exp.Paren | exp.Neg):
        other = other.this
    return not isinstance(other, exp.Literal | exp.Cast) or isinstance(other, exp.Cast) and not isinstance(other.this, exp.Literal)
