"""DuckDB: files, database tables, relations of the user's, Arrow data.

A source is a FROM item, or a relation read under the name `mlpipe_source`; the statement gets it as a common table
expression `src` that names columns by position. Nothing is created, set or registered on a user's connection.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
from sqlglot import exp

from ..errors import ConfigError, DataError, ResourceError, did_you_mean
from .base import BATCH_ROWS, Columns, ColumnType, Identity, buffered, fingerprint, noted, spread
from .catalog import found_table, is_ordered
from .dialects import duckdb_type, render
from .failures import translating
from .files import Merged, Snapshot, Workspace, is_database
from .memory import MOST_BITS, ROWS_PER_SLOT, SETTINGS, direct_bits, distinct_keys, ranges, table_room
from .origin import RELATION, Origin, select_all, source_rows, with_source

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection, DuckDBPyRelation
    from duckdb.sqltypes import DuckDBPyType

    from ..options import Options

T = TypeVar("T")
_TURN_SECONDS = 0.2
LAST_WHOLE = 2**53  # up to here a DOUBLE holds every whole number
_UNREADABLE = r"CSV Error on Line: (\d+).*column \"mlpipe_(\d+)\"\. Could not convert string \"(.*?)\" to '(.*?)'\n"
_RESERVED = ("memory", "system", "temp")


class DuckDBEngine:
    """The Engine over an Origin."""

    dialect, spills = "duckdb", True

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._running: list[DuckDBPyConnection] = []
        self.ran: list[str] = []

    def schema(self) -> dict[str, ColumnType]:
        """Exact names and types, in the source's order."""
        return dict(self._origin.columns)

    def identity(self) -> Identity:
        """See Identity."""
        return self._origin.identity

    def row_count(self) -> int | None:
        """The number of rows of Parquet files and Arrow tables; None for other sources."""
        return self._origin.rows

    def without_nulls(self, positions: Iterable[int]) -> bool:
        """Of Parquet files, whose footers count them."""
        names, counted = list(self._origin.columns), self._origin.without_nulls
        with self._checked():
            return counted is not None and {names[i] for i in positions} <= counted()

    def table_room(self) -> int | None:
        """See Engine."""
        return table_room(self.query(SETTINGS, Columns()).read_all())

    def key_ranges(self, statement: exp.Query, columns: Columns, key: int, rows: int) -> list[tuple[int, int]]:
        """Of Parquet files, where DuckDB itself would address a table by what it knows of the key. See Engine."""
        origin = self._origin
        if origin.rows is None or origin.options is None or not list(origin.columns.values())[key].exact_integer:
            return []
        if not self._addressable(statement, columns):
            return []
        ends = exp.select(*(exp.alias_(end(this=exp.column(f"k{key}")), end.key) for end in (exp.Min, exp.Max))).from_("src")
        (row,) = self.query(ends, Columns(keys=frozenset({key}))).read_all().to_pylist()
        low, high = int(row["min"]), int(row["max"])
        narrow = (high - low + 1) * ROWS_PER_SLOT <= rows
        return ranges(low, high, direct_bits(statement, origin.rows, origin.options)) if narrow else []

    def _addressable(self, statement: exp.Query, columns: Columns) -> bool:
        """Whether DuckDB would plan the statement with a table addressed by the key, were there memory enough."""
        sql = render(with_source(statement, source_rows(self._origin, columns, False)), "duckdb", copy=False)
        con = self._connection(statement)
        assert con is not None
        with self._checked(), closing(con):
            con.execute(f"set perfect_ht_threshold = {MOST_BITS}")
            return "PERFECT_HASH_GROUP_BY" in str(con.execute(f"explain (format json) {sql}").fetchall())

    def key_count(self, keys: Sequence[int]) -> int:
        """See Engine."""
        return int(self.query(distinct_keys(keys), Columns(keys=frozenset(keys))).read_all()["keys"][0].as_py())

    def check_columns(self, columns: Columns) -> None:
        """Raises DataError (code "column_files") for a column that cannot be read as one from all files."""
        names = list(self._origin.columns)
        for i in sorted(columns.values | columns.keys):
            problem = self._origin.problems.get(names[i])
            if problem is None and i in columns.keys and names[i] in self._origin.key_problems and self._exceeds_double(i):
                problem = self._origin.key_problems[names[i]]
            if problem is not None:
                hint = "write the files with one type that holds its values; of CSV and JSON files give mp.source types"
                raise DataError(problem, code="column_files", column=names[i], hint=hint)

    def _exceeds_double(self, key: int) -> bool:
        largest = exp.Max(this=exp.Abs(this=exp.column(f"k{key}")))
        found = self.query(exp.select(exp.alias_(largest, "largest")).from_("src"), Columns(keys=frozenset({key}))).read_all()
        return bool((found["largest"][0].as_py() or 0) >= LAST_WHOLE)

    def check_unchanged(self) -> None:
        """Raises DataError (code "source_changed") when a file is not as it was at open; other sources pass."""
        if self._origin.snapshot is not None:
            self._origin.snapshot.check()

    def query(self, statement: exp.Query, columns: Columns, *, sample: bool = False) -> pa.RecordBatchReader:
        """See Engine. A result of up to 32 MB is read before this returns, and the connection free again; a larger one streams,
        and holds a user's connection until it is read out or dropped."""
        source = source_rows(self._origin, columns, sample)
        sql = render(with_source(statement, source), "duckdb", copy=False)
        noted(self.ran, sql)
        with self._checked():
            con = self._connection(statement)
            relation = _bound(sql, self._origin, con)
            # one thread for all batches: those of ever new threads come from new memory, which cost half as much again as the scan
            thread = ThreadPoolExecutor(1)
            reader = self._guarded(con, thread, lambda: relation.to_arrow_reader(BATCH_ROWS))
            return buffered(reader.schema, self._batches(con, thread, reader))

    def cancel(self) -> None:
        """Interrupt the running queries; the thread that waits for one gets a ResourceError (code "interrupted")."""
        for con in tuple(self._running):
            con.interrupt()

    def progress(self) -> float | None:
        """The part done of the query that runs; None on a user's connection, where it is not measured."""
        shares = [share for con in tuple(self._running) if self._origin.own and (share := _progress(con)) is not None]
        return max(shares, default=None)

    def close(self) -> None:
        """Close a connection of ours and remove its temporary files; a user's connection stays as it is."""
        if self._origin.own and self._origin.con is not None:
            self._origin.con.close()
        if self._origin.workspace is not None:
            self._origin.workspace.close()

    def _connection(self, statement: exp.Query) -> DuckDBPyConnection | None:
        if not self._origin.own or self._origin.con is None:
            return self._origin.con
        con = self._origin.con.cursor()
        con.execute("set enable_progress_bar = true")
        con.execute("set enable_progress_bar_print = false")
        if self._origin.rows is not None and self._origin.options is not None:
            con.execute(f"set perfect_ht_threshold = {direct_bits(statement, self._origin.rows, self._origin.options)}")
        if self._origin.use:
            con.execute(self._origin.use)
        return con

    def _batches(self, con: DuckDBPyConnection | None, thread: ThreadPoolExecutor, reader: Any) -> Iterator[pa.RecordBatch]:
        try:
            with self._checked():
                while (batch := self._guarded(con, thread, lambda: next(reader, None))) is not None:
                    yield batch
        finally:
            reader.close()
            thread.shutdown(wait=False)
            if self._origin.own and con is not None:
                con.close()

    def _guarded(self, con: DuckDBPyConnection | None, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        """Works on another thread, so that Ctrl-C reaches this one at once and interrupts the query."""
        future = thread.submit(work)
        if con is not None:
            self._running.append(con)
        try:
            # in turns: where another library's handler restarts a wait, Python sees the signal only between two of them
            while not wait([future], timeout=_TURN_SECONDS).done:
                pass
            return future.result()
        except KeyboardInterrupt:
            if con is not None:
                con.interrupt()
            wait([future])
            if future.exception() is None and hasattr(future.result(), "close"):
                future.result().close()  # type: ignore[attr-defined]
            raise
        finally:
            if con is not None:
                self._running.remove(con)

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Errors of DuckDB become ours; one over files that have changed says so."""
        try:
            with translating():
                yield
        except (DataError, ResourceError) as error:
            if isinstance(error.__cause__, duckdb.Error):
                self.check_unchanged()
                self._explain_field(error.__cause__)
            raise

    def _explain_field(self, error: duckdb.Error) -> None:
        """Raises DataError (code "column_value") where a value of a CSV file is not of the type its column is read as."""
        if found := re.search(_UNREADABLE, str(error), re.DOTALL):
            line, field, value, kind = found.groups()
            columns = self._origin.columns
            alike = [name for name, column in columns.items() if column.name == kind]
            name = list(columns)[int(field)]
            if name not in alike:  # DuckDB counts otherwise where it casts to an ENUM
                if len(alike) != 1:
                    return
                (name,) = alike
            message = f"the column {name!r} is read as {kind}, and line {line} holds {value!r}"
            raise DataError(message, code="column_value", column=name, hint="give mp.source another type for it") from error


def _progress(con: DuckDBPyConnection) -> float | None:
    try:
        percent = con.query_progress()
    except duckdb.Error:
        return None
    return percent / 100 if percent >= 0 else None


def _bound(sql: str, origin: Origin, con: DuckDBPyConnection | None) -> DuckDBPyRelation:
    if origin.relation is not None:
        found = origin.relation(con).query(RELATION, sql)
    else:
        assert con is not None
        found = con.sql(sql)
    assert found is not None
    return found


def connect(options: Options, workspace: Workspace) -> DuckDBPyConnection:
    """A connection of ours within the options' limits."""
    settings: dict[str, Any] = {
        "memory_limit": f"{options.engine_bytes}B", "temp_directory": os.path.join(workspace.path(), "spill"),
        "autoinstall_known_extensions": False, "parquet_metadata_cache": True,
    }  # fmt: skip
    if options.threads is not None:
        settings["threads"] = options.threads
    with translating(workspace):
        return duckdb.connect(config=settings)


def open_files(
    files: list[str], hive: bool, form: str, options: Options, types: Mapping[str, str], workspace: Workspace | None = None,
    keys: Mapping[str, str] | None = None
) -> DuckDBEngine:  # fmt: skip
    """Parquet, CSV or JSON files; `types` are DuckDB's, by exact name, `keys` those of folders `key=value`.

    Raises DataError naming what cannot be read.
    """
    workspace = workspace or Workspace(options.temp_directory)
    con = connect(options, workspace)
    with translating(con, workspace):
        snapshot = Snapshot.of(dict.fromkeys(files))
        if form == "parquet":
            from . import parquet

            try:
                table = parquet.parquet_table(con, files, hive, keys or {})
            except duckdb.Error as error:
                parquet.refuse_other(files, error)
                raise
        else:
            from . import text

            _check_types(con, types)
            try:
                table = (text.csv_table if form == "csv" else text.json_table)(con, files, {**types, **(keys or {})}, hive)
            except duckdb.Error as error:
                text.refuse_other(files, error)
                raise
        bound = con.sql(render(select_all(table.from_, table.raw, len(table.names)), "duckdb"))
        columns = _columns(table.names, bound, table.levels)
        identity = Identity(snapshot.fingerprint, True, True, snapshot.bytes, tuple(files), table.notes)
        return DuckDBEngine(
            Origin(
                table.from_, con, True, columns, identity, rows=table.rows, raw=table.raw, row_number=table.row_number,
                sample=table.sample, problems=table.problems, key_problems=table.key_problems, snapshot=snapshot, workspace=workspace,
                options=options, without_nulls=table.without_nulls,
            )
        )  # fmt: skip


def _check_types(con: DuckDBPyConnection, types: Mapping[str, str]) -> None:
    for name, kind in types.items():
        try:
            con.dtype(kind)
        except (duckdb.Error, TypeError) as error:
            hint = did_you_mean(str(kind), ["BIGINT", "BOOLEAN", "DATE", "DOUBLE", "INTEGER", "TIMESTAMP", "VARCHAR"])
            raise ConfigError(f"types gives {name!r} the type {kind!r}, which DuckDB does not have", code="types", hint=hint) from error


def open_dataset(files: list[str], form: str, options: Options, *, hive: bool = False, filesystem: Any = None) -> DuckDBEngine:
    """Arrow ("ipc") or Parquet files through a pyarrow dataset. Raises DataError for files that cannot be read."""
    from . import arrow

    data, merged = arrow.file_dataset(files, form, filesystem, hive)
    return open_arrow(data, options, merged)


def open_arrow(data: Any, options: Options, merged: Merged | None = None) -> DuckDBEngine:
    """Arrow data: tables, pandas and narwhals frames as they lie, datasets (of `merged` files) streamed, any other stream spooled
    to disk once."""
    from . import arrow

    merged = merged or Merged({})
    workspace = Workspace(options.temp_directory)
    with translating(workspace):
        table, own, levels, again = arrow.rows_of(data, workspace, merged.problems)
        con = connect(options, workspace)
        columns = _columns(table.schema.names, con.from_arrow(table), levels)
        columns = {name: replace(kind, own=field.type) for (name, kind), field in zip(columns.items(), own, strict=True)}
    snapshot = Snapshot.of(table.files, table.filesystem) if hasattr(table, "files") else None
    rows = getattr(table, "num_rows", None)
    identity = Identity(
        snapshot.fingerprint if snapshot else fingerprint(table.schema, rows), again, True,
        snapshot.bytes if snapshot else getattr(table, "nbytes", None), tuple(snapshot.states) if snapshot else (), merged.notes,
    )  # fmt: skip
    return DuckDBEngine(
        Origin(
            exp.to_table(RELATION), con, True, columns, identity, lambda cursor: (cursor or con).from_arrow(table), rows,
            problems=merged.problems, key_problems=merged.key_problems, snapshot=snapshot, workspace=workspace,
        )
    )  # fmt: skip


def open_relation(relation: DuckDBPyRelation) -> DuckDBEngine:
    """A relation of the user's, on its own connection."""
    # there is no public way from a relation to its connection; without it Ctrl-C waits for the end of the query
    con = getattr(relation, "_con", None)
    with translating():
        sql = re.sub(r"(unnamed_relation|arrow_object|__duckdb_\w+?)_[0-9a-f_]+", r"\1", relation.sql_query())
        return DuckDBEngine(_relation_origin(relation, con, False, sql, None))


def open_query(sql: str, con: DuckDBPyConnection, workspace: Workspace | None = None, use: str | None = None) -> DuckDBEngine:
    """One SELECT on a connection, of ours if it comes with a workspace (`use`: as in Origin).

    Raises DataError (code "query") for other statements.
    """
    with translating():
        statements = con.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise DataError("mp.query takes one SELECT statement", code="query")
        # in parentheses DuckDB refuses a SELECT whose common table expressions write
        relation = con.sql(f"select * from (\n{statements[0].query.rstrip().rstrip(';')}\n)")
        return DuckDBEngine(_relation_origin(relation, con, workspace is not None, sql, workspace, use))


def _relation_origin(
    relation: DuckDBPyRelation, con: DuckDBPyConnection | None, own: bool, sql: str, workspace: Workspace | None, use: str | None = None
) -> Origin:
    columns = _columns(relation.columns, relation, {})
    shown = [(name, kind.name) for name, kind in columns.items()]
    identity = Identity(fingerprint(sql, shown), True, is_ordered(sql))
    again = (lambda cursor: cursor.sql(relation.sql_query())) if own else (lambda _: relation)
    return Origin(exp.to_table(RELATION), con, own, columns, identity, again, workspace=workspace, use=use, collates=True)


def open_table(name: str, con: DuckDBPyConnection, workspace: Workspace | None = None, use: str | None = None) -> DuckDBEngine:
    """A table or view on a connection, of ours if it comes with a workspace (`use`: as in Origin).

    Raises DataError (code "table_not_found").
    """
    with translating():
        table = found_table(name, con)
        bound = con.sql(render(exp.select("*").from_(table), "duckdb"))
        columns = _columns(bound.columns, bound, {})
        identity = Identity(fingerprint(name, [(n, kind.name) for n, kind in columns.items()]), True, True)
        sample = _table_sample(table, con)
        own = workspace is not None
        return DuckDBEngine(Origin(table, con, own, columns, identity, sample=sample, workspace=workspace, use=use, collates=True))


def _table_sample(table: exp.Table, con: DuckDBPyConnection) -> exp.Expr | None:
    """Slices by row id, evenly spread over a stored table; None for a view and for what the head holds whole."""
    last = exp.select(exp.Max(this=exp.column("rowid", "q"))).from_(exp.alias_(table.copy(), "q", table=True))
    try:
        (total,) = con.execute(render(last, "duckdb")).fetchall()[0]
    except duckdb.BinderException:
        return None
    ranges = spread((total or 0) + 1)
    if len(ranges) == 1:
        return None
    number = exp.Literal.number
    return exp.or_(*(exp.Between(this=exp.column("rowid", "q"), low=number(a), high=number(b - 1)) for a, b in ranges))


def open_database(path: str, options: Options, *, table: str | None = None, sql: str | None = None) -> DuckDBEngine:
    """A table of, or a query on, a database file opened read-only. Raises DataError where there is no such file."""
    if not os.path.isfile(path):
        raise DataError(f"there is no database file {path}", code="file_not_found")
    if not is_database(path):
        raise DataError(f"{path} is not a DuckDB database", code="file_format")
    workspace = Workspace(options.temp_directory)
    con = connect(options, workspace)
    with translating(con, workspace):
        # attached to an instance of ours, so that several engines can read one file, each within its own limits
        stem = os.path.splitext(os.path.basename(path))[0]
        name = render(exp.to_identifier(f"{stem}_" if stem.lower() in _RESERVED else stem, quoted=True), "duckdb")
        con.execute(f"attach {render(exp.Literal.string(path), 'duckdb')} as {name} (read_only)")
        use = f"use {name}"
        con.execute(use)
        return open_table(table, con, workspace, use) if table is not None else open_query(sql or "", con, workspace, use)


def _columns(names: Iterable[str], bound: DuckDBPyRelation, levels: Mapping[str, tuple[str, ...]]) -> dict[str, ColumnType]:
    """Exact names with their types; a name that repeats gets DuckDB's number for it."""
    out: dict[str, ColumnType] = {}
    for name, other, kind in zip(names, bound.columns, bound.types, strict=True):
        declared = _enum_levels(kind) if kind.id == "enum" else levels.get(name)
        out[name if name not in out else f"{other}_{len(out)}"] = duckdb_type(str(kind), declared)
    if not out:
        raise DataError("the source has no columns", code="no_columns")
    return out


def _enum_levels(kind: DuckDBPyType) -> tuple[str, ...]:
    values = dict(kind.children)["values"]
    return tuple(map(str, values)) if isinstance(values, list) else ()
