"""CSV and JSON files as DuckDB reads them, with names and types found once, from whole files."""
from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from sqlglot import exp

from ..errors import ColumnNotFoundError, DataError, did_you_mean
from .dialects import UNTYPED, call, cast, render, widens
from .files import Merged, Variant, merge, refuse_case
from .parquet import FileTable, check_hive, literals, struct

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_DIALECT = ("Delimiter", "Quote", "Escape", "NewLineDelimiter", "Comment", "SkipRows", "HasHeader", "DateFormat", "TimestampFormat")
_NONE = "(empty)"
FIELD = "mlpipe_"  # and the position in the table: what DuckDB calls a column of a CSV file


class _Csv(NamedTuple):
    """One file: how it is written, and the type of each column by exact name, in the file's order."""

    file: str
    dialect: tuple[object, ...]
    types: dict[str, str]


def refuse_other(files: Sequence[str], cause: Exception) -> None:
    """Raises DataError (code "file_format") where DuckDB's error says that a file is not what its suffix says, or not UTF-8."""
    message = str(cause)
    named = re.search(r"file = (.*)", message)
    file = named[1].strip() if named else next((file for file in files if file in message), files[0])
    if "is not utf-8 encoded" in message:
        line = re.search(r"CSV Error on Line: (\d+)", message)
        where = f" in line {line[1]}" if line else ""
        raise DataError(f"{file} is not UTF-8 text{where}", code="file_format", hint="convert it, for example by iconv -t UTF-8") from cause
    if re.search(r"gzip|zstd", message, re.IGNORECASE):
        what = f"{file} is cut off, or not compressed as its suffix says"
        raise DataError(what, code="file_format", hint="write it again") from cause


def csv_table(con: DuckDBPyConnection, files: Sequence[str], types: Mapping[str, str], hive: bool) -> FileTable:
    """The table of CSV files; `types` (name to DuckDB type) win over those found. Raises DataError, ColumnNotFoundError."""
    found = [_sniffed(con, file, types) for file in files]
    _settle_empty(con, found)
    merged = merge([Variant((csv.file,), csv.types) for csv in found])
    keys = _hive_keys(con, files, types, merged) if hive else {}
    _check_types(types, [*merged.types, *keys])
    widest = _widest(con, merged) | keys
    groups = [list(group) for _, group in groupby(found, key=lambda csv: (csv.dialect, tuple(csv.types)))]
    parts = [_csv_part(group, widest, keys) for group in groups]
    union = parts[0] if len(parts) == 1 else exp.union(*parts, distinct=False)
    key_problems = _large_keys(widest, {*types, *keys}) | merged.key_problems
    return FileTable(union.subquery(), tuple(widest), problems=merged.problems, key_problems=key_problems, notes=merged.notes)


def _settle_empty(con: DuckDBPyConnection, found: Sequence[_Csv]) -> None:
    """A column without values is text to DuckDB: beside files in which it has another type it takes that of the first."""
    for name in dict.fromkeys(name for csv in found for name in csv.types):
        kinds = list(dict.fromkeys(csv.types[name] for csv in found if name in csv.types))
        if len(kinds) == 1 or "VARCHAR" not in kinds:
            continue
        other = next(kind for kind in kinds if kind != "VARCHAR")
        for csv in found:
            if csv.types.get(name) == "VARCHAR":
                place = list(csv.types).index(name)
                read = _csv_read([csv.file], csv.dialect, dict.fromkeys(range(len(csv.types)), "VARCHAR"))
                count = exp.select(exp.Count(this=exp.column(f"{FIELD}{place}"))).from_(read.subquery("f"))
                if con.sql(render(count, "duckdb")).fetchall() == [(0,)]:
                    csv.types[name] = other


def _hive_keys(con: DuckDBPyConnection, files: Sequence[str], types: Mapping[str, str], merged: Merged) -> dict[str, str]:
    """The keys of `key=value` directories, which win over columns of their name, and the types of their values over all files."""
    check_hive(files, merged.types)
    bound = con.sql(render(_csv_read(files, None, {0: "VARCHAR"}, hive=True), "duckdb"))
    found = dict(zip(bound.columns[1:], map(str, bound.types[1:]), strict=True))
    for name in found:
        merged.problems.pop(name, None)
        merged.key_problems.pop(name, None)
    return {name: types.get(name, kind) for name, kind in found.items()}


def _sniffed(con: DuckDBPyConnection, file: str, types: Mapping[str, str]) -> _Csv:
    sniff = call("sniff_csv", literals([file]).expressions[0], exp.EQ(this=exp.column("sample_size"), expression=exp.Literal.number(-1)))
    row = con.sql(render(exp.select("*").from_(sniff), "duckdb"))
    values = dict(zip(row.columns, row.fetchall()[0], strict=True))
    dialect = tuple("" if values[key] == _NONE else values[key] for key in _DIALECT)
    shown = [(column["name"], column["type"]) for column in values["Columns"]]
    names = [name for name, _ in shown]
    if values["HasHeader"] or {kind for _, kind in shown} <= {"VARCHAR", "BOOLEAN"}:
        as_text = _csv_read([file], dialect, dict.fromkeys(range(len(shown)), "VARCHAR"), header=False)
        first = con.sql(render(as_text, "duckdb")).limit(2).fetchall()
        if values["HasHeader"] or len(first) == 1:  # one line of text is a header without rows (`t` and `f` may be names too)
            names = _exact_names(first[0], names)
            shown = shown if values["HasHeader"] else [(name, "VARCHAR") for name in names]
            dialect = tuple(key == "HasHeader" or value for key, value in zip(_DIALECT, dialect, strict=True))
    if len(names) == 1 and values["Quote"] == _NONE and (found := re.search(r"[,;|\t]", names[0])):
        what = f"{file}: its lines differ in the number of values between {found[0]!r}, so that its header is one column, {names[0]!r}"
        raise DataError(what, code="file_format", hint="mend the lines, or read the file by Polars and pass the frame")
    return _Csv(file, dialect, {name: types.get(name, kind) for name, (_, kind) in zip(names, shown, strict=True)})


def _exact_names(header: Sequence[str | None], shown: Sequence[str]) -> list[str]:
    """The names as the header writes them: DuckDB renames `X` beside `x`, and what is empty or repeated."""
    names: list[str] = []
    for name, other in zip(header, shown, strict=True):
        names.append(other if not name or name in names else name)
    return names


def _csv_part(group: Sequence[_Csv], widest: Mapping[str, str], keys: Mapping[str, str]) -> exp.Select:
    """The files of one dialect, their columns in the order of the whole table; NULL for those they lack."""
    place = {name: i for i, name in enumerate(widest)}
    types = {place[name]: widest[name] for name in group[0].types}
    read = _csv_read([csv.file for csv in group], group[0].dialect, types, hive=bool(keys), keys=keys)
    held = {name: exp.column(f"{FIELD}{place[name]}") for name in group[0].types} | {name: exp.column(name, quoted=True) for name in keys}
    columns = [held[name] if name in held else cast(exp.null(), widest[name]) for name in widest]
    chosen = [exp.alias_(column, f"r{i}") for i, column in enumerate(columns)]
    return exp.select(*chosen).from_(read.subquery("f"))


def _csv_read(
    files: Sequence[str], dialect: Sequence[object] | None, types: Mapping[int, str], *, header: bool | None = None, hive: bool = False,
    keys: Mapping[str, str] | None = None
) -> exp.Select:  # fmt: skip
    """Reads files without looking at them again: columns FIELD and their place, then the keys of the directories."""
    delimiter, quote, escape, newline, comment, skip, has_header, date, timestamp = dialect or (None,) * len(_DIALECT)
    given = {
        "auto_detect": False, "delim": delimiter, "quote": quote, "escape": escape or quote, "new_line": newline, "comment": comment,
        "skip": skip, "header": has_header if header is None else header, "dateformat": date, "timestampformat": timestamp,
    }  # fmt: skip
    options = [exp.EQ(this=exp.column(key), expression=exp.convert(value)) for key, value in given.items() if value not in (None, "")]
    if not quote:
        options.append(exp.EQ(this=exp.column("quote"), expression=exp.Literal.string("")))
    options.append(exp.EQ(this=exp.column("columns"), expression=struct({f"{FIELD}{i}": kind for i, kind in types.items()})))
    return exp.select("*").from_(call("read_csv", literals(files), *options, *_partitioning(hive, keys)))


def _partitioning(hive: bool, keys: Mapping[str, str] | None = None) -> list[exp.Expr]:
    """Whether directories are columns: said in every read, as DuckDB else decides by the paths."""
    said: list[exp.Expr] = [exp.EQ(this=exp.column("hive_partitioning"), expression=exp.convert(hive))]
    return [*said, exp.EQ(this=exp.column("hive_types"), expression=struct(keys))] if keys else said


def json_table(con: DuckDBPyConnection, files: Sequence[str], types: Mapping[str, str], hive: bool) -> FileTable:
    """The table of JSON files, objects one a line or in an array; `types` win over those found."""
    found = [_json_types(con, file, types) for file in files]
    first: dict[str, str] = {}  # what a column without values is: the first file's type that has some, or text
    for name, kind in ((name, kind) for each in found for name, kind in each.items() if kind != UNTYPED):
        first.setdefault(name, kind)
    settled = [{name: first.get(name, "VARCHAR") if kind == UNTYPED else kind for name, kind in each.items()} for each in found]
    variants = [Variant((file,), each) for file, each in zip(files, settled, strict=True)]
    refuse_case(variants)
    merged = merge(variants)
    keys = _hive_keys(con, files, types, merged) if hive else {}
    _check_types(types, [*merged.types, *keys])
    widest = _widest(con, merged)
    columns = exp.EQ(this=exp.column("columns"), expression=struct(widest))
    read = call("read_json", literals(files), columns, *_partitioning(bool(keys), keys))
    key_problems = _large_keys(widest, {*types, *keys}) | merged.key_problems
    return FileTable(read, tuple(widest | keys), problems=merged.problems, key_problems=key_problems, notes=merged.notes)


def _large_keys(kinds: Mapping[str, str], given: Container[str]) -> dict[str, str]:
    """What is wrong with large keys of columns whose type was found to be DOUBLE: whole numbers beside fractions, in JSON also any that are
    wider than 64 bits."""
    problem = "is read as DOUBLE, its keys beyond 2^53 would fall together"
    return {name: f"column {name!r} {problem}" for name, kind in kinds.items() if kind == "DOUBLE" and name not in given}


def _json_types(con: DuckDBPyConnection, file: str, types: Mapping[str, str]) -> dict[str, str]:
    sample = exp.EQ(this=exp.column("sample_size"), expression=exp.Literal.number(-1))
    found = con.sql(render(exp.select("*").from_(call("read_json", literals([file]), sample, *_partitioning(False))), "duckdb"))
    _refuse_renamed(con, file, found.columns)
    return {name: types.get(name, str(t)) for name, t in zip(found.columns, found.types, strict=True)}


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


def _check_types(types: Mapping[str, str], names: Sequence[str]) -> None:
    for name in types:
        if name not in names:
            raise ColumnNotFoundError(
                f"types names a column {name!r} that the files do not have", column=name, hint=did_you_mean(name, list(names))
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
