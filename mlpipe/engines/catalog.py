"""Names of tables and statements as a user writes them, before DuckDB runs any."""
from __future__ import annotations

from typing import TYPE_CHECKING

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from ..errors import DataError, did_you_mean

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


def is_ordered(sql: str) -> bool:
    """Whether a statement's rows come in an order of their own: it sorts them, or only filters and computes."""
    try:
        tree = sqlglot.parse_one(sql, dialect="duckdb")
    except SqlglotError:
        return False
    return tree.args.get("order") is not None or tree.find(exp.Join, exp.Group, exp.SetOperation, exp.Distinct, exp.AggFunc) is None


def found_table(name: str, con: DuckDBPyConnection) -> exp.Table:
    """The table's name, quoted, once the catalog has it: DuckDB would also take the name of a file or of a Python variable."""
    try:
        table = exp.to_table(name, dialect="duckdb")
    except SqlglotError:
        table = exp.Table()
    if not isinstance(table.this, exp.Identifier):
        raise DataError(f"{name!r} is not the name of a table", code="table_not_found", hint='quote odd names: \'schema."odd name"\'')
    wanted = [part.name.lower() for part in table.parts]
    known = con.execute(
        "select database_name, schema_name, table_name, internal from duckdb_tables() union all "
        "select database_name, schema_name, view_name, internal from duckdb_views()"
    ).fetchall()
    paths = [[part.lower() for part in row[:3]] for row in known]
    if not any(path[3 - len(wanted) :] == wanted or [path[0], path[2]] == wanted for path in paths):
        names = sorted(".".join(row[3 - max(len(wanted), 1 + (row[1] != "main")) : 3]) for row in known if not row[3])
        raise DataError(f"there is no table {name!r}", code="table_not_found", hint=did_you_mean(name, names))
    for part in table.parts:
        part.set("quoted", True)
    return exp.Table(**{key: table.args[key] for key in ("this", "db", "catalog") if table.args.get(key)})
