"""Temporary directories that a killed process leaves behind, and that the next one removes."""
from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

PREFIX, LOCK = "mlpipe-", ".lock"


class ScratchDirectory(tempfile.TemporaryDirectory[str]):
    """A directory `name` that goes with this object. A lock in it, which the kernel releases when its process dies, tells that it is used.

    Making one removes those of dead processes beside it. Raises OSError where it cannot be made.
    """

    def __init__(self, parent: str | None) -> None:
        swept(parent)
        super().__init__(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True)
        self._lock = _locked(Path(self.name))

    def cleanup(self) -> None:
        """Removes the directory and what is in it; may be called again."""
        self._lock.close()
        super().cleanup()


def _locked(folder: Path) -> IO[bytes]:
    """The lock of a new directory, which nobody can see before it is held."""
    unseen = folder / f"{LOCK}.new"
    file = unseen.open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    unseen.rename(folder / LOCK)
    return file


def swept(parent: str | None) -> None:
    """Removes the directories of processes that are gone; what is not ours, or in use, stays."""
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another process may be sweeping too, or it is another user's
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
