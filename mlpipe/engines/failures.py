"""Errors of DuckDB as errors of ours."""
from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import duckdb

from ..errors import DataError, MlpipeError, ResourceError

_RESOURCE: tuple[tuple[type[duckdb.Error], str, str | None], ...] = (
    (duckdb.OutOfMemoryException, "out_of_memory", "raise memory_limit, or free space for the spill in temp_directory"),
    (duckdb.InterruptException, "interrupted", None),
    (duckdb.ConnectionException, "connection", None),
    (duckdb.InternalError, "engine", None),
    (duckdb.FatalException, "engine", None),
    (duckdb.IOException, "io", None),
)


def explained(error: duckdb.Error) -> MlpipeError:
    """The error that users see for one of DuckDB's: ResourceError for memory, disk and connection, else DataError."""
    message = re.sub(r"\s+", " ", str(error).split("\n\nLINE")[0]).strip()
    message = message if len(message) <= 300 else message[:299] + "…"
    if "file handle conflict" in message:
        hint = "pass the connection that has it open"
        return ResourceError("the database file is open in this process", code="database_open", hint=hint)
    if "Could not set lock" in message:
        who = re.search(r"\(PID (\d+)\)", message)
        what = f"{_file(message)} is open in another process{f', {who[1]}' if who else ''}"
        return ResourceError(what, code="locked", hint="try again when it is done")
    if "not a valid DuckDB database" in message:
        return DataError(f"{_file(message)} is not a DuckDB database", code="file_format")
    if "Resource In Use" in message:
        hint = "read out or close the result that is still open on the connection"
        return ResourceError("the connection is busy", code="connection_busy", hint=hint)
    if "Failed to commit" in message:  # a TransactionException, of a disk that is full
        return ResourceError(message, code="io")
    for kind, code, hint_ in _RESOURCE:
        if isinstance(error, kind):
            return ResourceError(message, code=code, hint=hint_)
    return DataError(message, code="engine_refused")


def _file(message: str) -> str:
    found = re.search(r'file "(.*?)"', message)
    return found[1] if found else "the database file"


class _Closable(Protocol):
    def close(self) -> None: ...


@contextmanager
def translating(*held: _Closable) -> Iterator[None]:
    """Errors of DuckDB become ours; after any error what was opened so far is closed."""
    try:
        yield
    except BaseException as error:
        for thing in held:
            thing.close()
        if isinstance(error, duckdb.Error):
            raise explained(error) from error
        if isinstance(error, RuntimeError) and str(error) == "Query interrupted":  # DuckDB's word for Ctrl-C
            raise KeyboardInterrupt from error
        raise
