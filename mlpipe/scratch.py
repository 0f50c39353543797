"""Temporary directories that outlive nothing: removed when their owner is done or the process ends, by the next run if it was killed."""
from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .errors import ResourceError

PREFIX, SUFFIX = "mlpipe-", ".tmp"
_TOKEN_BYTES = 4


class Scratch:
    """One temporary directory, `name`. Its owner holds a lock on it that the kernel releases when the process dies: an unlocked one is
    what a killed run left, and goes when another is made beside it."""

    def __init__(self, parent: str | None) -> None:
        """Makes the directory under `parent` (None: the system's). Raises OSError where it cannot."""
        parent = parent or tempfile.gettempdir()
        _sweep(parent)
        while not self._made(os.path.join(parent, PREFIX + secrets.token_hex(_TOKEN_BYTES) + SUFFIX)):
            pass  # the name is taken, or the directory was swept away before it was locked

    def _made(self, path: str) -> bool:
        """Makes and locks the directory. What removes it is there before it is: a signal in between leaves nothing."""
        handles: list[int] = []
        self.name, self._remove = path, weakref.finalize(self, _remove, path, handles)
        try:
            os.mkdir(path, 0o700)
            handles.append(os.open(path, os.O_RDONLY))
        except OSError as error:
            self._remove.detach()  # what is at the path is not ours
            if isinstance(error, FileExistsError | FileNotFoundError) and os.path.isdir(os.path.dirname(path)):
                return False
            raise
        if _locked(handles[0]) is not False and os.path.exists(path):
            return True
        self._remove.detach()
        os.close(handles[0])
        return False

    def cleanup(self) -> None:
        """Removes the directory and what is in it."""
        self._remove()


@contextmanager
def spilling(what: str, undo: Callable[[], None]) -> Iterator[None]:
    """Work that writes `what` to a temporary file; after any error `undo` is called. Raises ResourceError (code "disk") for a full disk."""
    try:
        yield
    except BaseException as error:
        undo()
        if isinstance(error, OSError):
            message = f"cannot write {what}: {error.strerror or error}"
            raise ResourceError(message, code="disk", hint="free space in temp_directory") from error
        raise


def _remove(path: str, handles: list[int]) -> None:
    shutil.rmtree(path, True)
    for handle in handles:
        os.close(handle)


def _locked(handle: int) -> bool | None:
    """Takes the lock of a directory; None where the file system has none to give."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sweep(parent: str) -> None:
    """Removes what killed runs of this user left."""
    for path in _ours(parent):
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                if _locked(handle):
                    shutil.rmtree(path, True)
            finally:
                os.close(handle)


def _ours(parent: str) -> Iterator[str]:
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            name = entry.name
            ours = name.startswith(PREFIX) and name.endswith(SUFFIX) and len(name) == len(PREFIX) + 2 * _TOKEN_BYTES + len(SUFFIX)
            if ours and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                yield entry.path
