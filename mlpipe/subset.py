"""Some of the rows of a source: an engine over another one, whose statements see only the rows for which a condition holds."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sqlglot import exp

from . import expr
from .engines.base import Columns, ColumnType, Engine, Identity, fingerprint
from .engines.dialects import cast
from .errors import ColumnNotFoundError, ConfigError, DataError, did_you_mean
from .formula import parse_expression
from .sql import Names, both, scalar

if TYPE_CHECKING:
    import pyarrow as pa


class FilteredEngine:
    """The Engine `inner`, its rows those for which `condition` holds; `read`: the columns that the condition reads."""

    def __init__(self, inner: Engine, condition: exp.Expr, read: Columns, mark: str) -> None:
        self.inner, self.condition, self.read, self.mark = inner, condition, read, mark
        self.dialect, self.spills, self.ran = inner.dialect, inner.spills, inner.ran

    def schema(self) -> dict[str, ColumnType]:
        """Exact names and types, in the source's order."""
        return self.inner.schema()

    def identity(self) -> Identity:
        """The source's, of this part of it."""
        whole = self.inner.identity()
        return replace(whole, fingerprint=fingerprint(whole.fingerprint, self.mark))

    def query(self, statement: exp.Query, columns: Columns, *, sample: bool = False) -> pa.RecordBatchReader:
        """See Engine."""
        return self.inner.query(self._filtered(statement, columns), self._read_too(columns), sample=sample)

    def _read_too(self, columns: Columns) -> Columns:
        return replace(columns, values=columns.values | self.read.values, keys=columns.keys | self.read.keys)

    def _filtered(self, statement: exp.Query, columns: Columns) -> exp.Query:
        """The statement over `kept`, the rows of `src` that fulfil the condition."""
        statement = statement.copy()
        for table in statement.find_all(exp.Table):
            if table.name == "src":
                table.set("this", exp.to_identifier("kept"))
                if not table.alias:
                    table.set("alias", exp.TableAlias(this=exp.to_identifier("src")))
        kept = exp.select(*self._offered(columns)).from_("src").where(self.condition.copy())
        cte = exp.CTE(this=kept, alias=exp.TableAlias(this=exp.to_identifier("kept")), materialized=False)
        own = statement.args.get("with_")
        statement.set("with_", exp.With(expressions=[cte, *(own.expressions if own else [])]))
        return statement

    def _offered(self, columns: Columns) -> list[exp.Expr]:
        """What `src` offers a statement that asks for these columns."""
        names = [f"c{i}" for i in sorted(columns.values)] + [f"k{i}" for i in sorted(columns.keys)]
        names += [f"r{i}" for i in range(len(self.inner.schema()))] if columns.everything else []
        names += ["rn"] if columns.row_number else []
        return [exp.column(name) for name in names] or [exp.alias_(exp.true(), "present")]

    def row_count(self) -> int | None:
        """Not known without a scan."""
        return None

    def without_nulls(self, positions: Iterable[int]) -> bool:
        """See Engine."""
        return self.inner.without_nulls(positions)

    def table_room(self) -> int | None:
        """See Engine."""
        return self.inner.table_room()

    def key_ranges(self, statement: exp.Query, columns: Columns, key: int, rows: int) -> list[tuple[int, int]]:
        """See Engine."""
        return self.inner.key_ranges(self._filtered(statement, columns), self._read_too(columns), key, rows)

    def key_count(self, keys: Sequence[int]) -> int:
        """About how many distinct keys the whole source holds at most."""
        return self.inner.key_count(keys)

    def check_columns(self, columns: Columns) -> None:
        """See Engine."""
        self.inner.check_columns(self._read_too(columns))

    def check_unchanged(self) -> None:
        """See Engine."""
        self.inner.check_unchanged()

    def cancel(self) -> None:
        """See Engine."""
        self.inner.cancel()

    def progress(self) -> float | None:
        """See Engine."""
        return self.inner.progress()

    def close(self) -> None:
        """See Engine."""
        self.inner.close()


def filtered(inner: Engine, where: str | None, keys: Mapping[str, Sequence[str | None]]) -> FilteredEngine:
    """The rows for which the expression `where` is true and each column of `keys` has one of the values that the texts stand for in
    its own type (None: null).

    Raises FormulaError for an expression that is not a condition, ColumnNotFoundError for a column that is not there.
    """
    schema = inner.schema()
    names = Names.of(schema)
    conditions, values = [], set[int]()
    if where is not None:
        node = _condition(where, schema)
        conditions.append(scalar(node, names))
        values = {names.positions[name] for name in expr.columns(node)}
    for name, texts in keys.items():
        _check_column(name, schema)
        conditions.append(_one_of(names.key(name), texts, schema[name].name))
    read = Columns(frozenset(values), frozenset(names.positions[name] for name in keys))
    return FilteredEngine(inner, both(exp.paren(one) for one in conditions), read, repr((where, dict(keys))))


def _one_of(key: exp.Expr, texts: Sequence[str | None], kind: str) -> exp.Expr:
    literals: list[exp.Expr] = [cast(exp.Literal.string(text), kind) for text in texts if text is not None]
    parts: list[exp.Expr] = [exp.Is(this=key.copy(), expression=exp.Null())] if None in texts else []
    if len(literals) == 1:  # an equality, not a list of one, is what readers skip files and row groups by
        parts.append(exp.EQ(this=key.copy(), expression=literals[0]))
    elif literals:
        parts.append(exp.In(this=key.copy(), expressions=literals))
    return exp.or_(*parts)


def _condition(where: str, schema: Mapping[str, ColumnType]) -> expr.Node:
    node = parse_expression(where)
    for name in expr.columns(node):
        _check_column(name, schema)
        if schema[name].kind == "other":
            raise DataError(f"where: the column {name!r} of type {schema[name].name} cannot be compared", code="column_type", column=name)
    if expr.kind(node, {name: column.kind for name, column in schema.items()}) != "logical":
        raise ConfigError(f"where = {where!r} is no condition", code="where", hint='write one, such as year > 2020 & region == "north"')
    return node


def _check_column(name: str, schema: Mapping[str, ColumnType]) -> None:
    if name not in schema:
        raise ColumnNotFoundError(f"there is no column {name!r}", hint=did_you_mean(name, list(schema)), column=name)
