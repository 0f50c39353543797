"""Files behind URLs, through pyarrow's filesystems."""
from __future__ import annotations

import fnmatch
import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import DataError, ResourceError
from .files import Workspace, is_known

_GLOB = "*?["


def locate(urls: Sequence[str]) -> tuple[Any, list[str]]:
    """The filesystem of URLs and the files they mean, as a path, a directory or a glob. Raises DataError where there are none,
    or for a scheme that pyarrow does not know, ResourceError where they cannot be reached."""
    from pyarrow import ArrowException

    found: list[str] = []
    filesystem = None
    for url in urls:
        try:
            base = url[: min([url.find(c) for c in _GLOB if c in url], default=len(url))]
            other, root = from_uri(base if base == url else posixpath.dirname(base))
            filesystem = other if filesystem is None else filesystem
            pattern = None if base == url else posixpath.join(root, url[len(posixpath.dirname(base)) + 1 :])
            matches = sorted(_matches(filesystem, root, pattern))
        except (ArrowException, OSError, ValueError) as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError):
                raise ResourceError(f"{url}: {error}", code="io", hint="try again, or look at the network and the credentials") from error
            raise DataError(f"{url}: {error}", code="file_not_found") from error
        if not matches or other.type_name != filesystem.type_name:
            raise DataError(f"no file matches {url}" if not matches else "URLs of several schemes", code="file_not_found")
        found += matches
    return filesystem, found


def from_uri(url: str) -> tuple[Any, str]:
    """The filesystem of a URL and the path in it."""
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(url)
    return filesystem, path


def _matches(filesystem: Any, root: str, pattern: str | None) -> Iterator[str]:
    from pyarrow import fs

    info = filesystem.get_file_info(root)
    if info.type == fs.FileType.File:
        yield root
    elif info.type == fs.FileType.Directory:
        for entry in filesystem.get_file_info(fs.FileSelector(root, recursive=True)):
            if entry.is_file and (fnmatch.fnmatchcase(entry.path, pattern) if pattern else is_known(entry.path)):
                yield entry.path


def _keyed(file: str) -> list[str]:
    """The folders of a path that are `key=value`, and the file's name."""
    *folders, name = file.split("/")
    return [*(folder for folder in folders if "=" in folder), name]


def copied(filesystem: Any, files: Sequence[str], workspace: Workspace) -> list[str]:
    """Copies of the files in the workspace, below their `key=value` folders. Raises ResourceError, and closes it, where that fails."""
    from pyarrow import fs

    copies = [posixpath.join(workspace.path(), str(i), *_keyed(file)) for i, file in enumerate(files)]
    try:
        for file, copy in zip(files, copies, strict=True):
            os.makedirs(posixpath.dirname(copy))
            fs.copy_files(file, copy, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
    except OSError as error:
        workspace.close()
        raise ResourceError(f"the files could not be copied: {error}", code="io") from error
    return copies
