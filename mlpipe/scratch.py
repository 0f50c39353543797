"""Temporary directories that outlive nothing: removed when their owner is done or the process ends, by the next run if it was killed."""
from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import suppress

PREFIX, SUFFIX = "mlpipe-", ".tmp"


class Scratch:
    """One temporary directory, `name`. Its owner holds a lock on it that the kernel releases when the process dies: an unlocked one is
    what a killed run left, and goes when another is made beside it."""

    def __init__(self, parent: str | None) -> None:
        """Makes the directory under `parent` (None: the system's). Raises OSError where it cannot."""
        parent = parent or tempfile.gettempdir()
        _sweep(parent)
        while True:
            self.name = tempfile.mkdtemp(prefix=PREFIX, suffix=SUFFIX, dir=parent)
            with suppress(FileNotFoundError):  # swept away before it was locked
                handle = os.open(self.name, os.O_RDONLY)
                if _locked(handle) is not False and os.path.exists(self.name):
                    break
                os.close(handle)
        self._remove = weakref.finalize(self, _remove, self.name, handle)

    def cleanup(self) -> None:
        """Removes the directory and what is in it."""
        self._remove()


def _remove(path: str, handle: int) -> None:
    shutil.rmtree(path, True)
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
            ours = name.startswith(PREFIX) and name.endswith(SUFFIX) and len(name) == len(PREFIX) + 8 + len(SUFFIX)
            if ours and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                yield entry.path
