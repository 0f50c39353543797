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
    from sqlglot import exp

    from ..options import Options


def arranged(rows: pa.RecordBatchReader | pa.Table, statement: exp.Query, options: Options) -> Iterator[pa.RecordBatch]:
    """The batches of a statement over the table `used`, the rows of another engine (read once) or of a store."""
    workspace = Workspace(options.temp_directory)
    con = connect(options, workspace)
    with translating(con, workspace):
        con.register("used", rows)
        reader = con.sql(render(statement, "duckdb")).to_arrow_reader(BATCH_ROWS)
        yield from reader
    con.close()
    workspace.close()
