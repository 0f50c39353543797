"""A limit on the time that work may take: when it is over, the work is stopped as by Ctrl-C and fails with an error of its own."""
from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import ConfigError, ResourceError

_UNITS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}
_LONGEST = 1e9  # seconds, about 30 years


def parse_seconds(text: str | float) -> float:
    """The seconds that `"90s"`, `"45min"`, `"1.5h"`, `"1d"` or a plain number stands for.

    Raises ConfigError (code "timeout") for anything else, and for what is not above zero.
    """
    match = None if isinstance(text, bool) else re.fullmatch(r"(\d+(?:\.\d*)?)\s*([a-z]*)", str(text).strip().lower())
    seconds = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else 0.0
    if not 0.0 < seconds <= _LONGEST:
        raise ConfigError(f"{text!r} is not a length of time", code="timeout", hint='write for example 90, "45min" or "2h"')
    return seconds


@contextmanager
def within(limit: str | float | None) -> Iterator[None]:
    """Work that may take `limit`, as `parse_seconds` reads it; None: as long as it likes. For the main thread.

    Raises ResourceError (code "timeout") when the time is over: queries are cancelled and temporary files gone by then, as after Ctrl-C.
    """
    if limit is None:
        yield
        return
    seconds = parse_seconds(limit)
    over, running = False, True

    def stop(*_: Any) -> None:
        nonlocal over
        if running:
            over = True
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
        running = False
    except KeyboardInterrupt as error:
        if not over:
            raise
        raise ResourceError(f"the timeout of {_told(limit)} is over", code="timeout", hint="allow more time") from error
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _told(limit: str | float) -> str:
    text = str(limit).strip()
    return text if text[-1].isalpha() else f"{text} s"
