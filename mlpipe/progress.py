"""What runs right now: a line on a terminal, and one structured log record a stage."""
from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engines.base import Engine
    from .options import Options

LOGGER = logging.getLogger("mlpipe")
PATIENCE = 1.0  # seconds a stage may take before it is shown
TICK = 0.25  # seconds between two looks at it
WIPE = "\r\x1b[K"


@contextmanager
def stage(name: str, seconds: dict[str, float], engine: Engine | None = None, options: Options | None = None) -> Iterator[dict[str, Any]]:
    """Times one stage into `seconds[name]`, shows it where the options or a terminal ask for it, and logs it.

    The yielded dict takes further fields of the log record: `stage`, `seconds`, and `failed` (the error's class) after an error.
    """
    began = time.perf_counter()
    fields: dict[str, Any] = {"stage": name}
    wanted = options.progress if options is not None else None
    try:
        with _shown(name, engine, began) if (_on_terminal() if wanted is None else wanted) else nullcontext():
            yield fields
    except BaseException as error:
        fields["failed"] = type(error).__name__
        raise
    finally:
        seconds[name] = time.perf_counter() - began
        LOGGER.info(name, extra={"fields": fields | {"seconds": round(seconds[name], 4)}})


class LogLines(logging.Formatter):
    """One line a record: `kind` "json" for an object, "text" for key=value. Times are UTC, numbers that JSON has not are null."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def format(self, record: logging.LogRecord) -> str:
        """The record's `fields`, or its message, after the time."""
        time_ = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {"time": time_, **getattr(record, "fields", {"message": record.getMessage()})}
        if self.kind == "json":
            return json.dumps({key: _json_value(value) for key, value in fields.items()})
        return " ".join(f"{key}={value}" for key, value in fields.items())


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    return (value if math.isfinite(value) else None) if isinstance(value, float) else str(value)


def _on_terminal() -> bool:
    """Whether standard error is a terminal that can rewrite a line."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def _shown(name: str, engine: Engine | None, began: float) -> Iterator[None]:
    """A thread that keeps one line up to date while the stage runs; it is gone, and its line wiped, before anything else is written."""
    done = threading.Event()
    ticker = threading.Thread(target=_tick, args=(name, engine, began, done), daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()


def _tick(name: str, engine: Engine | None, began: float, done: threading.Event) -> None:
    if done.wait(PATIENCE):
        return
    # a terminal that has gone away must not take the fit with it
    with suppress(OSError, ValueError, AttributeError):
        while True:
            _write(WIPE + _line(name, time.perf_counter() - began, engine.progress() if engine is not None else None))
            if done.wait(TICK):
                break
        _write(WIPE)


def _line(name: str, elapsed: float, share: float | None) -> str:
    """`blocks 12 s, 40%, about 18 s left`; without the share where the engine does not know it."""
    text = f"{name.replace('_', ' ')} {elapsed:.0f} s"
    return f"{text}, {share:.0%}, about {elapsed * (1 - share) / share:.0f} s left" if share and 0 < share < 1 else text


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
