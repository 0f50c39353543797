"""Files: which ones a path means, whether they stayed as they were, and how their schemas join into one."""
from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote

from ..errors import DataError, ResourceError
from ..scratch import Scratch
from .base import fingerprint
from .dialects import merges_keys, widens

SUFFIXES = {
    ".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".ndjson": "json", ".jsonl": "json",
    ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
}  # fmt: skip
_COMPRESSED = (".gz", ".zst")
DATABASES = (".duckdb", ".db", ".ddb")
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"  # the value of a directory whose rows have NULL
_MAGIC = b"DUCK"
_END_BYTES = 4_096
ACCEPTED = "parquet, csv, tsv, json, ndjson, arrow and feather files (csv and json also as .gz or .zst)"


class Workspace:
    """A temporary directory of our own, made at first use and removed by `close`, at the latest when the process ends."""

    def __init__(self, parent: str | None) -> None:
        self._parent = parent
        self._scratch: Scratch | None = None

    def path(self) -> str:
        """The directory. Raises ResourceError (code "temp_directory") where it cannot be made."""
        if self._scratch is None:
            try:
                self._scratch = Scratch(self._parent)
            except OSError as error:
                what = f"no temporary directory in {self._parent!r}: {error.strerror or error}"
                raise ResourceError(what, code="temp_directory") from error
        return self._scratch.name

    def close(self) -> None:
        """Remove the directory and what is in it."""
        if self._scratch is not None:
            self._scratch.cleanup()


def format_of(path: str) -> str:
    """The format of a file by its suffix. Raises DataError, for a database naming mp.table."""
    name = path.lower()
    stem, suffix = os.path.splitext(name)
    if suffix in DATABASES:
        raise DataError(
            f"{path} is a database, of which one table or query must be named", code="source_type",
            hint=f'mp.table("…", {path!r}), in the shell --table NAME',
        )
    packed = suffix in _COMPRESSED
    found = SUFFIXES.get(os.path.splitext(stem)[1] if packed else suffix)
    if found is None or (packed and found not in ("csv", "json")):
        raise DataError(f"{path}: the suffix {suffix!r} is not known", code="source_type", hint=f"accepted are {ACCEPTED}")
    return found


def one_format(files: Sequence[str]) -> str:
    """The format of all files. Raises DataError (code "source_type") where there are several."""
    formats = list(dict.fromkeys(format_of(file) for file in files))
    if len(formats) > 1:
        raise DataError(f"the files are of several formats: {', '.join(formats)}", code="source_type", hint="pass files of one format")
    return formats[0]


def locate(path: str) -> list[str]:
    """The files a path, glob or directory means, sorted. Raises DataError where there are none or one is empty."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = _inside(path)
    elif os.path.exists(path):
        found = [path]
    else:
        found = [match for match in sorted(glob.glob(path, recursive=True)) if os.path.isfile(match)]
    if not found:
        inside = f"no file in the directory {path} has a suffix that is known"
        message, hint = (inside, f"accepted are {ACCEPTED}") if os.path.isdir(path) else (f"no file matches {path}", None)
        hint = "the formula comes first, then the data" if "~" in path else hint
        raise DataError(message, code="file_not_found", hint=hint)
    for file in found:
        if not os.path.isfile(file):
            raise DataError(f"{file} is no file that can be read twice", code="source_type", hint="write what it holds to a file")
        format_of(file)
        if os.path.getsize(file) == 0:
            raise DataError(f"{file} is empty", code="file_empty")
    return found


def _inside(directory: str) -> list[str]:
    if os.path.isdir(os.path.join(directory, "_delta_log")) or glob.glob(os.path.join(directory, "metadata", "*.metadata.json")):
        raise DataError(
            f"{directory} is a Delta or Iceberg table, whose files are not all part of it",
            code="source_type", hint="pass what its own reader gives, for example a polars LazyFrame or an Arrow dataset",
        )  # fmt: skip
    files = []
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_")))
        files += [os.path.join(folder, name) for name in names if not name.startswith((".", "_"))]
    known = sorted(file for file in files if is_known(file))
    return [file for file in known if format_of(file) == "parquet"] or known


def is_known(path: str) -> bool:
    """Whether the suffix is one that can be read."""
    stem, suffix = os.path.splitext(path.lower())
    return (os.path.splitext(stem)[1] if suffix in _COMPRESSED else suffix) in SUFFIXES


def is_database(path: str) -> bool:
    """Whether a file is a DuckDB database."""
    with open(path, "rb") as file:
        return file.read(12)[8:] == _MAGIC  # behind a checksum of eight bytes


def is_hive(files: Sequence[str], given: Sequence[str]) -> bool:
    """Whether the directories below what was given are `key=value`."""
    if len(files) == 1 and files[0] in given:
        return False
    return all("=" in Path(file).parent.name for file in files)


def hive_values(files: Iterable[str | os.PathLike[str]]) -> dict[str, set[str]]:
    """The values of each key among the directories `key=value` that lead to files, without that which stands for NULL."""
    out: dict[str, set[str]] = {}
    for part in dict.fromkeys(part for file in files for part in PurePath(file).parent.parts if "=" in part):
        key, _, value = part.partition("=")
        out.setdefault(unquote(key), set()).add(unquote(value))
    return {key: values - {HIVE_NULL} for key, values in out.items()}


@dataclass(frozen=True)
class Snapshot:
    """What files were at open: size, modification time and, of local ones, a digest of their first and last bytes.

    `filesystem`: pyarrow's, None for local files.
    """

    states: Mapping[str, tuple[int, int, str]]
    filesystem: Any = None

    @classmethod
    def of(cls, files: Iterable[str], filesystem: Any = None) -> Snapshot:
        """The state of the files now. Raises DataError (code "file_unreadable") for one that cannot be opened."""
        remote = None if type(filesystem).__name__ == "LocalFileSystem" else filesystem
        states = {}
        for file in files:
            try:
                states[file] = _state(file, remote)
            except OSError as error:
                raise DataError(f"cannot read {file}: {error.strerror or error}", code="file_unreadable") from error
        return cls(states, remote)

    @property
    def bytes(self) -> int:
        """The size of the files together."""
        return sum(size for size, _, _ in self.states.values())

    @property
    def fingerprint(self) -> str:
        """Equal for files that did not change."""
        return fingerprint(*((os.path.abspath(file), *state) for file, state in self.states.items()))

    def check(self) -> None:
        """Raises DataError (code "source_changed") naming the first file that is not as it was."""
        for file, state in self.states.items():
            try:
                same = _state(file, self.filesystem) == state
            except OSError:
                same = False
            if not same:
                raise DataError(f"the source changed while it was read: {file}", code="source_changed", hint="fit again")


def _state(file: str, filesystem: Any) -> tuple[int, int, str]:
    if filesystem is not None:
        info = filesystem.get_file_info(file)
        return info.size or 0, info.mtime_ns or 0, ""
    with open(file, "rb") as stream:
        status = os.fstat(stream.fileno())
        digest = hashlib.blake2b(stream.read(_END_BYTES), digest_size=16)
        stream.seek(max(0, status.st_size - _END_BYTES))
        digest.update(stream.read())
    return status.st_size, status.st_mtime_ns, digest.hexdigest()


@dataclass(frozen=True)
class Variant:
    """Files of one schema: exact column names and the DuckDB names of their types."""

    files: tuple[str, ...]
    types: Mapping[str, str]


@dataclass(frozen=True)
class Merged:
    """Schemas joined by exact name: `types` per name (one or several), `problems` per name, `key_problems` of columns whose
    large keys would fall together, `notes` on types that differ."""

    types: dict[str, tuple[str, ...]]
    problems: dict[str, str] = field(default_factory=dict)
    key_problems: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def merge(variants: Sequence[Variant]) -> Merged:
    """One schema of several; a column that cannot be read as one from all files gets a problem, told when it is used."""
    names = list(dict.fromkeys(name for variant in variants for name in variant.types))
    merged = Merged({name: tuple(dict.fromkeys(v.types[name] for v in variants if name in v.types)) for name in names})
    notes = []
    for name, types in merged.types.items():
        where = "; ".join(f"{t} in {_listed([v for v in variants if v.types.get(name) == t])}" for t in types)
        if absent := [v for v in variants if name not in v.types]:
            merged.problems[name] = f"column {name!r} is absent from {_listed(absent)}"
        elif len(types) > 1 and widens(types):
            notes.append(f"column {name!r} is {where}: read as the widest of these")
            if merges_keys(types):
                merged.key_problems[name] = f"column {name!r} is {where}: read as DOUBLE, its keys beyond 2^53 would fall together"
        elif len(types) > 1:
            merged.problems[name] = f"column {name!r} has no type common to all files: {where}"
    return replace(merged, notes=tuple(notes))


def refuse_case(variants: Sequence[Variant]) -> None:
    """Raises DataError (code "column_case") for names that differ only by case, unless all files hold both in one order:
    readers that join files by name and are blind to case would mix them."""
    names = list(dict.fromkeys(name for variant in variants for name in variant.types))
    same_order = len({tuple(variant.types) for variant in variants}) == 1
    folded: dict[str, str] = {}
    for name in names:
        other = folded.setdefault(name.lower(), name)
        if other != name and not same_order:
            raise DataError(
                f"columns {other!r} and {name!r} differ only by case, and the files do not hold both in the same order: "
                f"{_listed([v for v in variants if other in v.types])} against {_listed([v for v in variants if name in v.types])}",
                code="column_case", hint="rename one of them", column=name,
            )  # fmt: skip


def _listed(variants: Sequence[Variant]) -> str:
    files = [file for variant in variants for file in variant.files]
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def agree(orders: Iterable[tuple[str, ...] | None]) -> tuple[str, ...] | None:
    """The longest of several orders of levels if all others are parts of it in the same order, else None."""
    known = [order for order in orders if order is not None]
    longest = max(known, key=len, default=None)
    if longest is None:
        return None
    rank = {level: i for i, level in enumerate(longest)}
    places = [[rank.get(level, -1) for level in order] for order in known]
    return longest if all(-1 not in place and place == sorted(place) for place in places) else None
