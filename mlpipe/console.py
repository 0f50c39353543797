"""Where a command's words go: results to standard output, log, warnings and errors to standard error."""
from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from .errors import MlpipeError, MlpipeWarning, ResourceError, exit_code


class Console:
    """Where a command's words go: results to standard output, all else to standard error. A reader that has gone is no error."""

    def __init__(self) -> None:
        self.log: str | None = None

    def out(self, text: str) -> None:
        """A result. Raises ResourceError where standard output cannot take it."""
        try:
            click.echo(text)
        except BrokenPipeError:
            _silence(sys.stdout)
        except OSError as error:
            _silence(sys.stdout)
            raise ResourceError(f"cannot write to standard output: {error.strerror}", code="not_writable") from error

    def say(self, text: str) -> None:
        """Anything that is not a result."""
        try:
            click.echo(text, err=True)
        except OSError:
            _silence(sys.stderr)

    def log_to(self, kind: str | None) -> None:
        """One line a stage from now on: "text", "json" (then warnings and errors are objects too), or None."""
        self.log = kind
        if kind is None:
            return
        from .progress import LOGGER, LogLines

        handler = _Handler(sys.stderr)
        handler.setFormatter(LogLines(kind))
        LOGGER.handlers = [handler]
        LOGGER.setLevel(logging.INFO)

    def warn(self, message: Warning | str, category: type[Warning]) -> None:
        """One of our warnings."""
        if self.log == "json":
            self._record({"warning": category.__name__, "message": str(message)})
        else:
            self.say(f"warning: {message}")

    def fail(self, error: BaseException) -> int:
        """Says what went wrong and returns the exit status; a traceback only for what is a mistake of ours."""
        if isinstance(error, MemoryError):
            error = ResourceError("out of memory", code="out_of_memory")
        elif isinstance(error, OSError):
            error = ResourceError(str(error), code="io")
        elif not isinstance(error, MlpipeError):
            self.say("".join(traceback.format_exception(error)).rstrip())
            error = MlpipeError(f"a bug in mlpipe: {error!r}", code="bug")
        if self.log == "json" and isinstance(error, MlpipeError):
            self._record({"error": error.code, "message": error.message, "hint": error.hint})
        else:
            self.say(f"error: {error}")
        return exit_code(error)

    def _record(self, fields: dict[str, Any]) -> None:
        from .progress import LOGGER

        LOGGER.warning(fields["message"], extra={"fields": fields})


class _Handler(logging.StreamHandler[Any]):
    def handleError(self, record: logging.LogRecord) -> None:
        """A log that cannot be written does not stop the work."""


def _silence(stream: IO[str]) -> None:
    """Sends what is still to be written nowhere, so that the interpreter's last flush does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def warnings_to(console: Console) -> Iterator[None]:
    """Our warnings go to the console, those of others nowhere."""

    def show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        console.warn(message, category)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", MlpipeWarning)
        warnings.showwarning = show_warning
        yield
