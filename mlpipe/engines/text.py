"""CSV and JSON files as DuckDB reads them, with names and types found once, from whole files."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from sqlglot import exp

from ..errors import ColumnNotFoundError, DataError, did_you_mean
from .dialects import call, cast, render, widens
from .files import Merged, Variant, merge, refuse_case
from .parquet import FileTable, literals

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_DIALECT = ("Delimiter", "Quote", "Escape", "NewLineDelimiter", "Comment", "SkipRows", "HasHeader", "DateFormat", "TimestampFormat")
_NONE = "(empty)"


class _Csv(NamedTuple):
    """One file: how it is written, and the type of each column by exact name, in the file's order."""

    file: str
    dialect: tuple[object, ...]
    types: dict[str, str]


def csv_table(con: DuckDBPyConnection, files: Sequence[str], types: Mapping[str, str]) -> FileTable:
    """The table of CSV files; `types` (name to DuckDB type) win over those found. Raises DataError, ColumnNotFoundError."""
    found = [_sniffed(con, file, types) for file in files]
    merged = merge([Variant((csv.file,), csv.types) for csv in found])
    _check_types(types, merged)
    widest = _widest(con, merged)
    groups = [list(group) for _, group in groupby(found, key=lambda csv: (csv.dialect, tuple(csv.types)))]
    parts = [_csv_part(group, widest) for group in groups]
    union = parts[0] if len(parts) == 1 else exp.union(*parts, distinct=False)
    return FileTable(union.subquery(), tuple(widest), problems=merged.problems, notes=merged.notes)


def _sniffed(con: DuckDBPyConnection, file: str, types: Mapping[str, str]) -> _Csv:
    sniff = call("sniff_csv", literals([file]).expressions[0], exp.EQ(this=exp.column("sample_size"), expression=exp.Literal.number(-1)))
    row = con.sql(render(exp.select("*").from_(sniff), "duckdb"))
    values = dict(zip(row.columns, row.fetchall()[0], strict=True))
    dialect = tuple("" if values[key] == _NONE else values[key] for key in _DIALECT)
    shown = [(column["name"], column["type"]) for column in values["Columns"]]
    names = [name for name, _ in shown]
    if values["HasHeader"]:
        header = con.sql(render(_csv_read([file], dialect, dict.fromkeys(map(str, range(len(shown))), "VARCHAR"), header=False), "duckdb"))
        names = _exact_names(header.limit(1).fetchall()[0], names)
    return _Csv(file, dialect, {name: types.get(name, kind) for name, (_, kind) in zip(names, shown, strict=True)})


def _exact_names(header: Sequence[str | None], shown: Sequence[str]) -> list[str]:
    """The names as the header writes them: DuckDB renames `X` beside `x`, and what is empty or repeated."""
    names: list[str] = []
    for name, other in zip(header, shown, strict=True):
        names.append(other if not name or name in names else name)
    return names


def _csv_part(group: Sequence[_Csv], widest: Mapping[str, str]) -> exp.Select:
    """The files of one dialect, their columns in the order of the whole table; NULL for those they lack."""
    types = {name: widest[name] for name in group[0].types}
    place = {name: i for i, name in enumerate(types)}
    read = _csv_read([csv.file for csv in group], group[0].dialect, types)
    columns = [exp.column(f"f{place[n]}") if n in place else cast(exp.null(), widest[n]) for n in widest]
    chosen = [exp.alias_(column, f"r{i}") for i, column in enumerate(columns)]
    return exp.select(*chosen).from_(read.subquery("f"))


def _csv_read(files: Sequence[str], dialect: Sequence[object], types: Mapping[str, str], header: bool | None = None) -> exp.Select:
    """Reads files without looking at them again: columns f0, f1, … by position."""
    delimiter, quote, escape, newline, comment, skip, has_header, date, timestamp = dialect
    given = {
        "auto_detect": False, "delim": delimiter, "quote": quote, "escape": escape or quote, "new_line": newline, "comment": comment,
        "skip": skip, "header": has_header if header is None else header, "dateformat": date, "timestampformat": timestamp,
    }  # fmt: skip
    options = [exp.EQ(this=exp.column(key), expression=exp.convert(value)) for key, value in given.items() if value not in (None, "")]
    if not quote:
        options.append(exp.EQ(this=exp.column("quote"), expression=exp.Literal.string("")))
    columns = exp.Struct(
        expressions=[
            exp.PropertyEQ(this=exp.to_identifier(f"f{i}"), expression=exp.Literal.string(kind)) for i, kind in enumerate(types.values())
        ]
    )
    options.append(exp.EQ(this=exp.column("columns"), expression=columns))
    return exp.select("*").from_(call("read_csv", literals(files), *options))


def json_table(con: DuckDBPyConnection, files: Sequence[str], types: Mapping[str, str]) -> FileTable:
    """The table of JSON files, objects one a line or in an array; `types` win over those found."""
    variants = [Variant((file,), _json_types(con, file, types)) for file in files]
    refuse_case(variants)
    merged = merge(variants)
    _check_types(types, merged)
    widest = _widest(con, merged)
    columns = exp.Struct(
        expressions=[exp.PropertyEQ(this=exp.to_identifier(n, quoted=True), expression=exp.Literal.string(t)) for n, t in widest.items()]
    )
    read = call("read_json", literals(files), exp.EQ(this=exp.column("columns"), expression=columns))
    return FileTable(read, tuple(widest), problems=merged.problems, notes=merged.notes)


def _json_types(con: DuckDBPyConnection, file: str, types: Mapping[str, str]) -> dict[str, str]:
    sample = exp.EQ(this=exp.column("sample_size"), expression=exp.Literal.number(-1))
    found = con.sql(render(exp.select("*").from_(call("read_json", literals([file]), sample)), "duckdb"))
    _refuse_renamed(con, file, found.columns)
    return {name: types.get(name, "VARCHAR" if str(t) == '"NULL"' else str(t)) for name, t in zip(found.columns, found.types, strict=True)}


def _refuse_renamed(con: DuckDBPyConnection, file: str, names: Sequence[str]) -> None:
    """DuckDB calls the key `X` beside `x` `X_1`, and could read only one of them by its type."""
    lower = {name.lower() for name in names}
    if not any(name.rpartition("_")[2].isdigit() and name.rpartition("_")[0].lower() in lower for name in names):
        return
    keys = exp.select(call("unnest", call("json_keys", exp.column("json")))).distinct()
    found = [str(key) for (key,) in con.sql(render(keys.from_(call("read_json_objects", literals([file]))), "duckdb")).fetchall()]
    folded: dict[str, str] = {}
    for key in found:
        if (other := folded.setdefault(key.lower(), key)) != key:
            raise DataError(
                f"{file}: the keys {other!r} and {key!r} differ only by case", code="column_case", column=key, hint="rename one of them"
            )


def _check_types(types: Mapping[str, str], merged: Merged) -> None:
    for name in types:
        if name not in merged.types:
            raise ColumnNotFoundError(
                f"types names a column {name!r} that the files do not have", column=name, hint=did_you_mean(name, list(merged.types))
            )


def _widest(con: DuckDBPyConnection, merged: Merged) -> dict[str, str]:
    """The type in which each column is read: the widest as DuckDB has it, text where there is none (such a column has a problem)."""
    out = {}
    for name, kinds in merged.types.items():
        if len(kinds) == 1:
            out[name] = kinds[0]
        elif not widens(kinds):
            out[name] = "VARCHAR"
        else:
            nulls = [exp.select(cast(exp.null(), kind)) for kind in kinds]
            out[name] = str(con.sql(render(exp.union(*nulls, distinct=False), "duckdb")).types[0])
    return out
