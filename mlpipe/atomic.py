"""Files that appear whole or not at all."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import ConfigError, ResourceError


def regular(path: str | os.PathLike[str]) -> Path:
    """What a path stands for as a target of `replacing`, links resolved. Raises ResourceError for what is there and is no file."""
    target = Path(os.path.realpath(path))  # a link keeps pointing where it does
    if target.exists() and not target.is_file():
        raise ResourceError(f"cannot write {os.fspath(path)}: it is not a regular file", code="not_writable")
    return target


def apart(target: str | os.PathLike[str], *read: object) -> None:
    """Raises ConfigError (code "target") for a target that is one of the files, given by path or in lists of such, that are read, or one
    that a directory of runs consists of."""
    for given in read:
        if isinstance(given, list | tuple):
            apart(target, *given)
        elif isinstance(given, str | os.PathLike) and os.path.isfile(target) and _holds(given, target):
            raise ConfigError(f"{os.fspath(target)} is what is read, and would be replaced", code="target", hint="name another file")


def _holds(given: str | os.PathLike[str], file: str | os.PathLike[str]) -> bool:
    if not os.path.isdir(given):
        return os.path.isfile(given) and os.path.samefile(file, given)
    inside = os.path.relpath(os.path.realpath(file), os.path.realpath(given))
    return inside in ("fit.json", "predictions.json") or Path(inside).parts[0] == "runs"


@contextmanager
def writing(place: object) -> Iterator[None]:
    """Work that writes `place`. Raises ResourceError (code "not_writable") where the system refuses it."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"cannot write {place}: {error.strerror or error}", code="not_writable") from error


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """An empty file that takes the target's name once it is complete. Raises ResourceError while another job writes one.

    Its own name is always the same and its writer holds a lock that dies with it: what a killed job left is used again.
    """
    path = target.with_name(f".{target.name}.partial")
    with _locked(path, target) as file:
        try:
            file.truncate()
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(path, target)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _locked(path: Path, target: Path) -> IO[bytes]:
    """The file at a path, made where there is none, locked and at its start."""
    import fcntl

    while True:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError as error:
            file.close()
            raise ResourceError(f"another job is writing {target}", code="locked", hint="try again when it is done") from error
        file.close()


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one of this name: its last writer may have renamed or removed it before we had the lock."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def synced(path: Path) -> None:
    """Has the kernel write a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
