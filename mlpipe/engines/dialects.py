"""Types and functions that differ between engines: one table each, and the rendering of nodes to text."""
from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from sqlglot import exp

from ..errors import ConfigError
from .base import ColumnType, Kind

Convert = Callable[[exp.Expr], exp.Expr]


def call(name: str, *arguments: exp.Expr) -> exp.Expr:
    """A function under exactly this name, past sqlglot's own ideas of it."""
    return exp.Anonymous(this=name, expressions=list(arguments))


def cast(node: exp.Expr, to: str) -> exp.Expr:
    """CAST(node AS to), `to` a DuckDB type."""
    return exp.Cast(this=node, to=exp.DataType.build(to, dialect="duckdb"))


def _double(column: exp.Expr) -> exp.Expr:
    return cast(column, "DOUBLE")


def _instant(column: exp.Expr) -> exp.Expr:
    # epoch() of an infinite time is NULL, which would pass for a missing value; its text is a DOUBLE's infinity
    return exp.Coalesce(this=call("epoch", column), expressions=[_double(cast(column.copy(), "VARCHAR"))])


def _days(column: exp.Expr) -> exp.Expr:
    return exp.Div(this=_instant(column), expression=exp.Literal.number("86400e0"))


class Family(NamedTuple):
    """DuckDB types that convert alike and widen into each other: a covariate's kind, and its value as an expression."""

    name: str
    kind: Kind
    value: Convert


UNTYPED = '"NULL"'  # of a Parquet column that was written without a value
INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT", "BIGNUM")
_OTHER = Family("other", "other", lambda column: column)
_FAMILIES = {
    Family("number", "number", _double): (*INTEGERS, "FLOAT", "DOUBLE", "DECIMAL"),
    Family("untyped", "number", lambda column: column): (UNTYPED,),
    Family("date", "number", _days): ("DATE",),
    Family("timestamp", "number", _instant): (
        "TIMESTAMP", "TIMESTAMP WITH TIME ZONE", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS",
    ),
    Family("duration", "number", lambda column: call("epoch", column)): ("INTERVAL",),
    Family("time", "number", lambda column: call("epoch", column)): ("TIME", "TIME_NS"),
    Family("logical", "logical", lambda column: column): ("BOOLEAN",),
    Family("text", "text", lambda column: cast(column, "VARCHAR")): ("VARCHAR", "ENUM", "UUID"),
}  # fmt: skip
_FAMILY_OF = {name: family for family, names in _FAMILIES.items() for name in names}
UNITS = ("date", "timestamp", "duration", "time")  # families whose numbers are of one another's kind, and mean something else
_WIDENING = ({"date", "timestamp"},)


def duckdb_family(type_name: str) -> Family:
    """The family of a DuckDB type by its name, "other" for lists, structs, binary and the rest."""
    return _OTHER if type_name.endswith("]") else _FAMILY_OF.get(type_name.partition("(")[0], _OTHER)


def duckdb_type(type_name: str, levels: tuple[str, ...] | None) -> ColumnType:
    """The ColumnType of a DuckDB type."""
    family = duckdb_family(type_name)
    unit = family.name if family.name in UNITS else ""
    return ColumnType(family.kind, type_name, levels, type_name in INTEGERS, untyped=type_name == UNTYPED, unit=unit)


_BEYOND_DOUBLE = {"BIGINT", "UBIGINT", "HUGEINT", "UHUGEINT", "DECIMAL"}
_IN_FLOAT = {"FLOAT", "TINYINT", "UTINYINT", "SMALLINT", "USMALLINT"}


def widens(types: Collection[str]) -> bool:
    """Whether columns of these DuckDB types are one column, in its widest type, without a change of meaning."""
    typed = set(types) - {UNTYPED}
    families = {duckdb_family(name).name for name in typed}
    if "FLOAT" in typed and "DOUBLE" not in typed and not typed <= _IN_FLOAT:  # DuckDB would read them as FLOAT, which loses digits
        return False
    if "other" in families:
        return len(typed) == 1
    return len(families) == 1 or any(families <= group for group in _WIDENING)


def merges_keys(types: Collection[str]) -> bool:
    """Whether in the widest of these DuckDB types different whole numbers can become equal: DOUBLE holds those up to 2^53."""
    bare = {name.partition("(")[0] for name in types}
    return "DOUBLE" in bare and not bare.isdisjoint(_BEYOND_DOUBLE)


# Functions of the DuckDB dialect that Polars' SQL has under another name (by node), and those it lacks (by rendered name).
_POLARS_NAMES: dict[type[exp.Expr], str] = {exp.AnyValue: "max", exp.LogicalAnd: "min", exp.LogicalOr: "max"}
_POLARS_LACKS = frozenset(
    ("hash", "isnan", "isfinite", "isinf", "epoch", "bit_xor", "stddev_pop", "var_pop", "tanh", "sinh", "cosh", "expm1", "list_extract")
)


def _to_polars(node: exp.Expr) -> exp.Expr:
    if isinstance(node, exp.CTE):
        node.set("materialized", None)
    name = (node.name if isinstance(node, exp.Anonymous) else node.sql_name() if isinstance(node, exp.Func) else "").lower()
    if name in _POLARS_LACKS or (isinstance(node, exp.Log) and node.expression is None):
        raise ConfigError(f"Polars SQL has no function {name}()", code="engine_lacks", hint="read the data through DuckDB")
    if isinstance(node, exp.IgnoreNulls) and isinstance(node.this, exp.AnyValue):
        node = node.this
    if renamed := _POLARS_NAMES.get(type(node)):
        return call(renamed, node.this)
    return node


def render(node: exp.Expr, dialect: str, pretty: bool = False, *, copy: bool = True) -> str:
    """The text of a node for an engine ("duckdb" or "polars"; other names are sqlglot's own); `copy=False`: the node is used up.

    Polars takes DuckDB's text with its own names for some functions; ConfigError (code "engine_lacks") for one it lacks.
    """
    if dialect != "polars":
        return node.sql(dialect=dialect, pretty=pretty, copy=copy)
    return node.transform(_to_polars).sql(dialect="duckdb", pretty=pretty)
