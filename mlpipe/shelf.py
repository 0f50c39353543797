"""Where a store keeps partition states: a folder, or two tables of a DuckDB file. One record is the only commit point.

States are written first, under names that no committed record knows; the record that names them replaces the old one in one step.
What a killed job left is in no record, and the next job removes it.
"""
from __future__ import annotations

import json
import os
from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import stats
from .atomic import replacing, synced, writing
from .errors import ConfigError, DataError, ResourceError
from .scratch import Scratch
from .stats import SuffStats

if TYPE_CHECKING:
    from .compressed import Compressed
    from .engines.target import Database
    from .options import Options

    State = SuffStats | Compressed

FORMAT = "mlpipe.store/1"
DATABASES = (".duckdb", ".db")
LOCK, INDEX, STATES = ".lock", "store.json", "states"
_FIELDS = {"model", "recipe", "types", "partitions", "merged", "fits"}  # of a record
REBUILD = "rebuild it: mlpipe run --rebase"


class Shelf(Protocol):
    """One store, held by this process alone."""

    name: str

    def record(self) -> dict[str, Any] | None:
        """The committed record, None of a new store. Raises DataError for what is no store of ours."""

    def load(self, state: str) -> State:
        """A committed or saved state. Raises DataError where it cannot be read."""

    def save(self, state: str, content: State) -> None:
        """Keeps a state until a record names it, or for good. Raises ResourceError where the disk fails."""

    def commit(self, record: dict[str, Any], states: Set[str]) -> None:
        """Replaces the record, then forgets every state that is not among those named."""


@contextmanager
def opened(path: str, options: Options) -> Iterator[Shelf]:
    """The store at a path, made where there is none. Raises ResourceError while another job holds it, ConfigError for another thing."""
    target = Path(os.path.expanduser(path))
    if target.suffix.lower() in DATABASES and not target.is_dir():
        with _database(target, options) as shelf:
            yield shelf
    else:
        with _folder(target) as shelf:
            yield shelf


# -- a folder -----------------------------------------------------------------------------------------------------------


@contextmanager
def _folder(folder: Path) -> Iterator[FolderShelf]:
    import fcntl

    if folder.exists() and not _is_ours(folder):
        raise ConfigError(f"{folder} exists and is no store", code="store", hint="choose another path for [store]")
    with _disk(folder):
        (folder / STATES).mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(f"another job is using the store {folder}", code="locked", hint="try again when it is done") from error
        yield FolderShelf(folder)


def _is_ours(folder: Path) -> bool:
    """Whether a folder is free, holds a store, or what a job left that was killed before its first record."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return INDEX in names or names <= {LOCK, STATES, f".{INDEX}.partial"}


class FolderShelf:
    """`store.json` and `states/<state>.arrow`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)
        held = self.record()
        self._forget(named(held) if held is not None else set())

    def record(self) -> dict[str, Any] | None:
        """See Shelf."""
        index = self.folder / INDEX
        return checked(index.read_bytes(), self.name) if index.exists() else None

    def _file(self, state: str) -> Path:
        return self.folder / STATES / f"{state}.arrow"

    def load(self, state: str) -> State:
        """See Shelf."""
        return _loaded(self._file(state), self.name)

    def save(self, state: str, content: State) -> None:
        """See Shelf."""
        path = self._file(state)
        with _disk(self.folder):
            _written(content, path)
            synced(path)

    def commit(self, record: dict[str, Any], states: Set[str]) -> None:
        """See Shelf."""
        with _disk(self.folder):
            synced(self.folder / STATES)
            with replacing(self.folder / INDEX) as file:
                file.write(json.dumps(record).encode())
            synced(self.folder)
        self._forget(states)

    def _forget(self, states: Set[str]) -> None:
        for path in (self.folder / STATES).iterdir():
            if path.name.removesuffix(".arrow") not in states:
                path.unlink(missing_ok=True)


# -- tables of a DuckDB file --------------------------------------------------------------------------------------------

RECORDS, BLOBS = "mlpipe_target.main.mlpipe_store", "mlpipe_target.main.mlpipe_store_states"  # in the database as it is attached


@contextmanager
def _database(path: Path, options: Options) -> Iterator[DatabaseShelf]:
    from .engines import target

    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            database = stack.enter_context(target.opened(path, options, read_only=False))
        except ResourceError as error:
            if error.code != "locked":
                raise
            raise ResourceError(f"another job is using the store {path}", code="locked", hint=error.hint) from error
        yield DatabaseShelf(database, path, options)


class DatabaseShelf:
    """Tables `mlpipe_store` (one row, the record) and `mlpipe_store_states` (the states as Arrow files)."""

    def __init__(self, database: Database, path: Path, options: Options) -> None:
        self.database, self.name, self.parent = database, str(path), options.temp_directory
        held = self.record()
        if held is not None:
            self._forget(named(held))

    def _run(self, sql: str, *values: Any) -> list[Any]:
        return self.database.con.execute(sql, list(values)).fetchall()

    def record(self) -> dict[str, Any] | None:
        """See Shelf."""
        if "mlpipe_store" not in self.database.columns():
            return None
        rows = self._run(f"select record from {RECORDS}")
        return checked(rows[0][0], self.name) if rows else None

    def load(self, state: str) -> State:
        """See Shelf."""
        rows = self._run(f"select content from {BLOBS} where state = ?", state)
        if not rows:
            raise DataError(f"the store {self.name} has lost a state", code="store", hint=REBUILD)
        with _disk(Path(self.name)), _scratch(self.parent) as folder:
            path = folder / "state.arrow"
            path.write_bytes(rows[0][0])
            return _loaded(path, self.name)

    def save(self, state: str, content: State) -> None:
        """See Shelf."""
        with _disk(Path(self.name)), _scratch(self.parent) as folder:
            path = folder / "state.arrow"
            _written(content, path)
            self._run(f"create table if not exists {BLOBS} (state varchar, content blob)")
            self._run(f"delete from {BLOBS} where state = ?", state)
            self._run(f"insert into {BLOBS} values (?, ?)", state, path.read_bytes())

    def commit(self, record: dict[str, Any], states: Set[str]) -> None:
        """See Shelf."""
        from .engines.target import transaction

        with transaction(self.database.con):
            self._run(f"create table if not exists {RECORDS} (record varchar)")
            self._run(f"delete from {RECORDS}")
            self._run(f"insert into {RECORDS} values (?)", json.dumps(record))
        self._forget(states)

    def _forget(self, states: Set[str]) -> None:
        if "mlpipe_store_states" in self.database.columns():
            self._run(f"delete from {BLOBS} where not list_contains(?::varchar[], state)", sorted(states))


# -- both ---------------------------------------------------------------------------------------------------------------


def named(record: dict[str, Any]) -> set[str]:
    """The states that a record names."""
    parts = (*record["partitions"], *record.get("pending", ()))
    return {part["state"] for part in parts if part["state"] is not None} | set(record["merged"])


def checked(text: str | bytes, name: str) -> dict[str, Any]:
    """A record from its text. Raises DataError where it is none that this version can read."""
    try:
        record = json.loads(text)
        if record["format"] != FORMAT or not _FIELDS <= record.keys():
            raise KeyError(record["format"])
        return dict(record)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is no store that this version can read", code="store", hint="name another path") from error


def _written(content: State, path: Path) -> None:
    try:
        content.save(path)
    except ConfigError as error:  # what is wrong with a store's own file is no mistake of the request
        raise ResourceError(error.message, code=error.code) from error.__cause__


def _loaded(path: Path, name: str) -> State:
    try:
        table, head = stats.opened(path)
        if head.get("format") == stats.FORMAT:
            return stats.loaded(table, head)
        from .compressed import Compressed

        return Compressed.of(table, head)
    except (KeyError, TypeError, ValueError) as error:
        why = error.message if isinstance(error, DataError) else f"{path.name} is none that this version can read"
        raise DataError(f"the store {name} has lost a state: {why}", code="store", hint=REBUILD) from error


@contextmanager
def _scratch(parent: str | None) -> Iterator[Path]:
    scratch = Scratch(parent)
    try:
        yield Path(scratch.name)
    finally:
        scratch.cleanup()


def _disk(place: Path) -> AbstractContextManager[None]:
    return writing(f"the store {place}")
