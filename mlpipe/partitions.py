"""The partitions of a source: its files, or the rows that share a value of one column; each with a mark of its content."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from sqlglot import exp

from .engines.base import Columns, fingerprint
from .engines.dialects import call
from .errors import ColumnNotFoundError, ConfigError, DataError, did_you_mean
from .options import Options
from .sources import PathSource, Subset, open_source

MOST = 100_000  # partitions by column: more are no partitions but keys


@dataclass(frozen=True)
class Partition:
    """One part of a source.

    `name`: the absolute path of its file, or the text of its value; `data`: what opens its rows alone; `mark`: differs when the content
    does, as far as size, time and first and last bytes tell of a file, by count and hashes of all used columns of a table; `bytes` of
    the file; `rows` of a part of a table.
    """

    name: str
    data: Any
    mark: str
    bytes: int | None = None
    rows: int | None = None


def partitions(data: Any, by: str, columns: Sequence[str], options: Options) -> list[Partition]:
    """The partitions of a source in their order: files by path, values by their own order.

    `by`: "file" or a column; `columns`: those whose content counts. Raises ConfigError, DataError.
    """
    where = data.where if isinstance(data, Subset) else None
    inner = data.data if isinstance(data, Subset) else data
    found = _files(inner) if by == "file" else _values(data, by, columns, options)
    return [replace(part, data=Subset(part.data, where)) for part in found] if where is not None and by == "file" else found


def _files(data: Any) -> list[Partition]:
    from .engines import files

    if isinstance(data, str | os.PathLike | list | tuple):
        data = PathSource(data)
    if not isinstance(data, PathSource):
        hint = "name a column: the rows that share its value are a partition"
        raise ConfigError('partition_by = "file" is for files', code="partition_by", hint=hint)
    given = [os.fspath(path) for path in ([data.path] if isinstance(data.path, str | os.PathLike) else data.path)]
    if any("://" in path for path in given):
        raise ConfigError('partition_by = "file" is for files of this machine', code="partition_by")
    found = [os.path.abspath(file) for path in given for file in files.locate(path)]
    if twice := [file for file, times in Counter(found).items() if times > 1]:
        raise ConfigError(f"the source names the file {twice[0]} twice", code="source_type", hint="list each partition once")
    hive = files.is_hive(found, given)
    states = sorted(files.Snapshot.of(found).states.items())
    return [Partition(file, PathSource([file], data.types, hive), _mark(state, data.types), state[0]) for file, state in states]


def _mark(state: Sequence[object], types: Mapping[str, str]) -> str:
    """What tells one content of a file from another: read with other types it is another."""
    return fingerprint(*state, *(f"{name}={kind}" for name, kind in sorted(types.items())))


def typed(data: Any, types: Mapping[str, str]) -> Any:
    """The data of a file below `key=value` folders with these types of their columns, where a folder's value alone does not tell them:
    of texts it may look like a number, and there may be none."""
    from .engines import files

    inner = _source(data)
    if not isinstance(inner, PathSource) or not inner.hive:
        return data
    values = files.hive_values(_paths(data))
    told = {name for name, texts in values.items() if texts and types.get(name) in ("BIGINT", "DATE")}
    return _over(data, replace(inner, keys={name: types[name] for name in values if name in types and name not in told}))


def is_text(data: Any) -> bool:
    """Whether data are CSV or JSON files, whose types are those that their values look like."""
    from .engines import files

    inner = _source(data)
    return isinstance(inner, PathSource) and files.one_format(_paths(data)) in ("csv", "json")


def read_as(data: Any, types: Mapping[str, str]) -> Any:
    """CSV or JSON files with further types."""
    inner = _source(data)
    return _over(data, replace(inner, types={**types, **inner.types}))


def unchanged(part: Partition) -> bool:
    """Whether the file of a partition is still what was listed."""
    from .engines import files

    if part.bytes is None:
        return True
    (path,) = _paths(part.data)
    try:
        return _mark(files.Snapshot.of([path]).states[path], _source(part.data).types) == part.mark
    except DataError:
        return False


def _values(data: Any, by: str, columns: Sequence[str], options: Options) -> list[Partition]:
    with closing(open_source(data, options=options)) as engine:
        schema = engine.schema()
        positions = {name: i for i, name in enumerate(schema)}
        for name in (by, *columns):
            if name not in schema:
                raise ColumnNotFoundError(f"there is no column {name!r}", hint=did_you_mean(name, list(schema)), column=name)
        kind = schema[by]
        if kind.kind == "other" or kind.name in ("FLOAT", "DOUBLE"):
            hint = "use a date, a text or a whole number"
            raise DataError(f"the column {by!r} of type {kind.name} cannot partition", code="column_type", column=by, hint=hint)
        key = exp.column(f"k{positions[by]}")
        used = [exp.column(f"k{positions[name]}") for name in sorted(set(columns))]
        # sums of hashes do not depend on the order of the rows, and repeats do not cancel
        hashes = exp.Sum(this=exp.cast(call("hash", *(used or [key.copy()])), "hugeint"))
        statement = exp.select(
            exp.alias_(exp.cast(key, "varchar"), "value"), exp.alias_(exp.Count(this=exp.Star()), "row_count"),
            exp.alias_(exp.cast(hashes, "varchar"), "content"),
        ).from_("src").group_by(key.copy()).order_by(exp.Ordered(this=key.copy(), nulls_first=True))  # fmt: skip
        read = Columns(keys=frozenset(positions[name] for name in (by, *columns)))
        rows = engine.query(statement, read).read_all().to_pylist()
        if len(rows) > MOST:
            raise DataError(f"the column {by!r} has {len(rows):,} values, too many for partitions", code="partition_by", column=by)
        return [
            Partition(_name(by, row["value"]), _part(data, by, row["value"]), fingerprint(*row.values()), rows=int(row["row_count"]))
            for row in rows
        ]


def _name(by: str, value: str | None) -> str:
    return f"{by} is null" if value is None else f"{by}={value}"


def _part(data: Any, by: str, value: str | None) -> Subset:
    return replace(data, keys={**data.keys, by: (value,)}) if isinstance(data, Subset) else Subset(data, keys={by: (value,)})


def together(parts: Sequence[Partition]) -> Any:
    """Data that hold the rows of all these partitions of one source."""
    first = parts[0].data
    inner = _source(first)
    if isinstance(inner, PathSource) and not (isinstance(first, Subset) and first.keys):
        files = [path for part in parts for path in _paths(part.data)]
        return _over(first, replace(inner, path=files))
    by = next(reversed(first.keys))
    values = tuple(value for part in parts for value in part.data.keys[by])
    return replace(first, keys={**first.keys, by: values})


def _source(data: Any) -> Any:
    return data.data if isinstance(data, Subset) else data


def _over(data: Any, inner: Any) -> Any:
    """The data with another source."""
    return replace(data, data=inner) if isinstance(data, Subset) else inner


def _paths(data: Any) -> list[Any]:
    return list(_source(data).path)
