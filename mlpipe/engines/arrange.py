"""Grouping and sorting used rows within the memory limit: in DuckDB, whatever engine the rows come from."""
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .base import BATCH_ROWS
from .dialects import render
from .duckdb import connect
from .failures import translating
from .files import Workspace

if TYPE_CHECKING:
    import pyarrow as pa
    from duckdb import DuckDBPyConnection
    from sqlglot import exp

    from ..options import Options


class Arranger:
    """A connection of ours for statements one after the other, made with the first; close it, or use it in a `with`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.con: DuckDBPyConnection | None = None
        self.workspace: Workspace | None = None

    def __enter__(self) -> Arranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, rows: pa.RecordBatchReader | pa.Table, statement: exp.Query) -> Iterator[pa.RecordBatch]:
        """The batches of a statement over the table `used`: rows of another engine, read once, or of a store."""
        if self.con is None or self.workspace is None:
            self.workspace = Workspace(self.options.temp_directory)
            self.con = connect(self.options, self.workspace)
        with translating(self.con, self.workspace):
            self.con.register("used", rows)
            yield from self.con.sql(render(statement, "duckdb")).to_arrow_reader(BATCH_ROWS)
            self.con.unregister("used")

    def close(self) -> None:
        """Releases the connection and its temporary files."""
        if self.con is not None and self.workspace is not None:
            self.con.close()
            self.workspace.close()


def arranged(rows: pa.RecordBatchReader | pa.Table, statement: exp.Query, options: Options) -> Iterator[pa.RecordBatch]:
    """The batches of one statement over the table `used`."""
    with Arranger(options) as arrange:
        yield from arrange(rows, statement)
