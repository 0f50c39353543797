"""Result tables in a DuckDB database: a file, or a connection of the user's. One transaction a write, all or nothing.

On a user's connection nothing but SELECT and the statements of that transaction runs; one that has a transaction open is
refused, since ours could neither be rolled back alone nor be committed without theirs.
"""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
from sqlglot import exp

from ..errors import ConfigError, DataError, ResourceError
from .dialects import render
from .duckdb import connect
from .failures import translating
from .files import Workspace, is_database

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection

    from ..options import Options

_ATTACHED = "mlpipe_target"
_HEADERS = 3 * 4_096  # bytes that a database has at least
_MANIFEST = ("run_id", "tables", "record")
_ROWS = exp.select("*").from_(exp.to_table("mlpipe_result_rows"))


@dataclass(frozen=True)
class Run:
    """One run as the manifest has it: its tables' names and the fit as JSON text."""

    run_id: str
    tables: tuple[str, ...]
    record: str


class Database:
    """One schema of a database, on a connection: what it holds, and the statements that change it."""

    def __init__(self, con: DuckDBPyConnection, catalog: str, schema: str) -> None:
        self.con, self._catalog, self._schema = con, catalog, schema

    def columns(self) -> dict[str, dict[str, str]]:
        """The columns and their types of each table and view, by its name in lower case: DuckDB is blind to case."""
        known = self.con.execute(
            "select table_name, column_name, data_type from duckdb_columns() where database_name = ? and schema_name = ?",
            [self._catalog, self._schema],
        ).fetchall()
        out: dict[str, dict[str, str]] = {}
        for table, column, kind in known:
            out.setdefault(table.lower(), {})[column] = kind
        return out

    def runs(self, manifest: str) -> list[Run]:
        """The runs that a manifest lists, in the order they were written; none where there is no manifest of ours."""
        if not set(_MANIFEST) <= self.columns().get(manifest.lower(), {}).keys():
            return []
        query = exp.select(*(exp.column(name, quoted=True) for name in _MANIFEST)).from_(self._table(manifest)).order_by("rowid")
        return [Run(run, tuple(tables), record) for run, tables, record in self.con.execute(render(query, "duckdb")).fetchall()]

    def rows(self, table: str, run: str) -> pa.Table:
        """The rows of one run, in the order they were written."""
        mine = exp.column("run_id", quoted=True).eq(exp.Literal.string(run))
        query = exp.select("*").from_(self._table(table)).where(mine).order_by("rowid")
        return self.con.sql(render(query, "duckdb")).to_arrow_table()

    def drop(self, table: str) -> None:
        """Removes a table."""
        self.con.execute(render(exp.Drop(kind="TABLE", tables=[self._table(table)]), "duckdb"))

    def create(self, table: str, rows: pa.Table) -> None:
        """A new table of these rows."""
        mlpipe_result_rows = rows  # noqa: F841 - DuckDB finds the table of this name among the local variables here
        self.con.execute(render(exp.Create(kind="TABLE", this=self._table(table), expression=_ROWS.copy()), "duckdb"))

    def append(self, table: str, rows: pa.Table, held: Mapping[str, str]) -> None:
        """Adds rows to a table that holds these columns, with further columns where it lacks some.

        Raises ConfigError for a column of another type, or of a name that differs only by case.
        """
        mlpipe_result_rows = rows  # noqa: F841 - as above
        shape = self.con.sql(render(_ROWS, "duckdb"))
        spelt = {name.lower(): name for name in held}
        for name, kind in zip(shape.columns, map(str, shape.types), strict=True):
            there = spelt.get(name.lower())
            if there is None:
                column = exp.ColumnDef(this=exp.to_identifier(name, quoted=True), kind=exp.DataType.build(kind, dialect="duckdb"))
                self.con.execute(render(exp.Alter(kind="TABLE", this=self._table(table), actions=[column]), "duckdb"))
            elif (there, held[there]) != (name, kind):
                raise ConfigError(
                    f"the table {table!r} has a column {there!r} of type {held[there]}, this run's is {name!r} of type {kind}",
                    code="target_columns", column=name, hint="write this fit under another prefix",
                )  # fmt: skip
        self.con.execute(render(exp.Insert(this=self._table(table), expression=_ROWS.copy(), by_name=True), "duckdb"))

    def _table(self, name: str) -> exp.Table:
        return exp.table_(name, db=self._schema, catalog=self._catalog, quoted=True)


@contextmanager
def opened(target: Any, options: Options, *, read_only: bool) -> Iterator[Database]:
    """A database file, attached to an instance of ours, or the current schema of a user's connection.

    Raises ConfigError for a connection that has a transaction open, unless it is only read.
    """
    if not isinstance(target, str | os.PathLike):
        with translating():
            if not read_only and _in_transaction(target):
                hint = "commit it or roll it back first"
                raise ConfigError("the connection has a transaction open", code="transaction_open", hint=hint)
            ((catalog, schema),) = target.execute("select current_database(), current_schema()").fetchall()
            yield Database(target, catalog, schema)
        return
    if not read_only:
        check(target)
    workspace, fresh = Workspace(options.temp_directory), not Path(target).exists()
    con = connect(options, workspace)
    try:
        with translating():
            try:
                con.execute(f"attach {render(exp.Literal.string(os.fspath(target)), 'duckdb')} as {_ATTACHED}{' (read_only)' * read_only}")
            except duckdb.Error as error:
                if fresh and "lock" not in str(error):  # that of another job is being made
                    _remove_stump(Path(target))
                raise
            yield Database(con, _ATTACHED, "main")
    finally:
        con.close()
        workspace.close()


def check(target: str | os.PathLike[str]) -> None:
    """Raises ConfigError for a target that is there and is no database."""
    if os.path.isfile(target) and os.path.getsize(target) and not is_database(os.fspath(target)):
        raise ConfigError(f"{os.fspath(target)} exists and is no database", code="target_exists", hint="choose another target")


def _remove_stump(file: Path) -> None:
    """Removes what a full disk left of a new database: less than its headers, which nothing could open again."""
    with suppress(FileNotFoundError):
        if file.stat().st_size < _HEADERS:
            file.unlink()


def write(target: Any, tables: Mapping[str, pa.Table], manifest: str, mode: str, run: str, options: Options) -> None:
    """Writes the tables of a run, by full name, all or nothing; `manifest` names the one among them that lists runs.

    Raises ConfigError where mode "error" finds a fit, for a run that is there already, for a table that is not a fit's and for a
    connection that has a transaction open; ResourceError where the database cannot be written.
    """
    file = Path(target) if isinstance(target, str | os.PathLike) else None
    fresh = file is not None and not file.exists()
    try:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        with opened(target, options, read_only=False) as database:
            try:
                with transaction(database.con):
                    _write(database, tables, manifest, mode, run)
            except BaseException:
                if file is not None and fresh:  # while it is locked: nobody else can have begun to fill it
                    for left in (file, file.with_name(f"{file.name}.wal")):
                        left.unlink(missing_ok=True)
                raise
    except DataError as error:
        if isinstance(error.__cause__, duckdb.Error):
            raise ResourceError(error.message, code="not_writable") from error.__cause__
        raise


@contextmanager
def transaction(con: DuckDBPyConnection) -> Iterator[None]:
    """One transaction: committed at the end, rolled back after an error."""
    con.execute("begin transaction")
    try:
        yield
        con.execute("commit")
    except BaseException:
        with suppress(duckdb.Error):  # what failed is told; DuckDB has rolled back itself where this fails
            con.execute("rollback")
        raise


def _in_transaction(con: DuckDBPyConnection) -> bool:
    """Whether a transaction is open: only then do two statements have one number. (A second BEGIN would abort it.)"""
    try:
        first, second = (con.execute("select txid_current()").fetchall() for _ in range(2))
    except duckdb.TransactionException:  # one that has failed and waits for its end
        return True
    return first == second


def _write(database: Database, tables: Mapping[str, pa.Table], manifest: str, mode: str, run: str) -> None:
    runs, held = database.runs(manifest), database.columns()
    ours = {name.lower(): name for known in runs for name in known.tables}
    for name in tables:
        if name.lower() in held and name.lower() not in ours:
            raise ConfigError(f"there is a table {name!r} that is no fit's", code="target_exists", hint="choose another prefix")
    if runs and mode == "error":
        raise ConfigError(f"{manifest!r} already lists a fit", code="target_exists", hint='mode="overwrite" or "append", or another prefix')
    if mode == "append" and run in [known.run_id for known in runs]:
        raise ConfigError(f"{manifest!r} already lists the run {run!r}", code="run_exists")
    if mode == "overwrite":
        for name in ours.keys() & held.keys():
            database.drop(ours[name])
            del held[name]
    for name, rows in tables.items():
        if name.lower() in held:
            database.append(name, rows, held[name.lower()])
        else:
            database.create(name, rows)
