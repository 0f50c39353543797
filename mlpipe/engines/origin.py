"""What a DuckDB engine reads, and how a statement gets it: the common table expression `src`, by position."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sqlglot import exp

from ..errors import DataError
from .base import Columns, ColumnType, Identity
from .dialects import Convert, call, duckdb_family
from .files import Snapshot, Workspace

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

    from ..options import Options

HEAD_ROWS = 20_000
RELATION = "mlpipe_source"


@dataclass(frozen=True)
class Origin:
    """What an engine reads. `from_`: the FROM item; `relation`: for an item `mlpipe_source`, what it is on a connection;
    `con`: the connection, None for a bare relation; `own`: whether it is ours, so that each query takes a cursor of it;
    `columns`: exact names with DuckDB's types; `raw`, `row_number`, `sample`, `without_nulls`: as in FileTable; `problems`,
    `key_problems`: by exact name;
    `use`: the statement that makes an attached database the current one of a cursor; `options`: of files, whose key ranges are known;
    `collates`: text is compared as a database's columns or a connection's settings say, which may be blind to case or accents."""

    from_: exp.Expr
    con: DuckDBPyConnection | None
    own: bool
    columns: Mapping[str, ColumnType]
    identity: Identity
    relation: Callable[[DuckDBPyConnection | None], DuckDBPyRelation] | None = None
    rows: int | None = None
    raw: Mapping[int, Convert] = field(default_factory=dict)
    row_number: exp.Expr | None = None
    sample: exp.Expr | None = None
    problems: Mapping[str, str] = field(default_factory=dict)
    key_problems: Mapping[str, str] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    workspace: Workspace | None = None
    use: str | None = None
    options: Options | None = None
    without_nulls: Callable[[], frozenset[str]] | None = None
    collates: bool = False


def with_source(statement: exp.Query, source: exp.Select) -> exp.Query:
    """The statement with `src` before its own common table expressions. Not materialized: a table expression read twice would be held
    in memory."""
    statement = statement.copy()
    src = exp.CTE(this=source, alias=exp.TableAlias(this=exp.to_identifier("src")), materialized=False)
    own = statement.args.get("with_")
    statement.set("with_", exp.With(expressions=[src, *(own.expressions if own else [])]))
    return statement


def source_rows(origin: Origin, columns: Columns, sample: bool) -> exp.Select:
    """The columns asked for, named by position. Raises DataError for a value of a type that cannot be a covariate."""
    types = list(origin.columns.values())
    names = list(origin.columns)
    chosen = [exp.alias_(_value(origin, types[i], names[i], i), f"c{i}") for i in sorted(columns.values)]
    chosen += [exp.alias_(_by_bytes(origin, types[i].name, _read(origin.raw, i)), f"k{i}") for i in sorted(columns.keys)]
    chosen += [exp.alias_(_read(origin.raw, i), f"r{i}") for i in range(len(types))] if columns.everything else []
    if columns.row_number:
        chosen.append(exp.alias_(origin.row_number or _window_number(), "rn"))
    out = exp.select(*(chosen or [exp.alias_(exp.true(), "present")])).from_(_aliased(origin.from_.copy(), len(types)))
    if sample:
        out = out.where(origin.sample) if origin.sample is not None else out.limit(HEAD_ROWS)
    return out


def _aliased(item: exp.Expr, width: int) -> exp.Expr:
    alias = exp.TableAlias(this=exp.to_identifier("q"), columns=[exp.to_identifier(f"r{i}") for i in range(width)])
    if not isinstance(item, exp.Table | exp.Subquery):
        return exp.Table(this=item, alias=alias)
    item.set("alias", alias)
    return item


def _read(raw: Mapping[int, Convert], i: int) -> exp.Expr:
    column = exp.column(f"r{i}", "q")
    return raw[i](column) if i in raw else column


def select_all(from_: exp.Expr, raw: Mapping[int, Convert], width: int) -> exp.Select:
    """All columns of a FROM item by position."""
    return exp.select(*(exp.alias_(_read(raw, i), f"r{i}") for i in range(width))).from_(_aliased(from_.copy(), width))


def _value(origin: Origin, kind: ColumnType, name: str, i: int) -> exp.Expr:
    if kind.kind == "other":
        raise DataError(f"column {name!r} has type {kind.name}, which cannot be a covariate", code="column_type", column=name)
    value = duckdb_family(kind.name).value(_read(origin.raw, i))
    return _by_bytes(origin, "VARCHAR", value) if kind.kind == "text" else value


def _by_bytes(origin: Origin, kind: str, value: exp.Expr) -> exp.Expr:
    """The value, text compared byte by byte as everywhere else."""
    return exp.Collate(this=value, expression=exp.var("c")) if origin.collates and kind == "VARCHAR" else value


def _window_number() -> exp.Expr:
    return exp.Sub(this=exp.Window(this=call("row_number")), expression=exp.Literal.number(1))
