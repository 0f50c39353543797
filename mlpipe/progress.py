"""What runs right now: a line on a terminal with rows, passes, objective and the time left, and one structured log record a stage."""
from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .engines.base import Engine
    from .options import Options

LOGGER = logging.getLogger("mlpipe")
PATIENCE = 1.0  # seconds a stage may take before it is shown
TICK = 0.25  # seconds between two looks at it
WIPE = "\r\x1b[K"
USUAL = 6  # evaluations of a fit of many rows, as a rule: it starts from estimates on some of them


class Live(NamedTuple):
    """What a stage says of itself while it runs: phrases, and the seconds left, where it can tell."""

    phrases: tuple[str, ...] = ()
    left: float | None = None


class Watch:
    """Where an iterative fit stands: passes over the rows, evaluations, and the objective of the last one; called, it gives `Live`.

    `constant`: what a solver's log-likelihood lacks of the model's; NaN where it is none, and not shown.
    The time left is a guess, from the evaluations that such a fit takes as a rule (`expected`); beyond these nothing is guessed.
    """

    def __init__(self, passes: Callable[[], float] | None = None, constant: float = 0.0, expected: int = USUAL) -> None:
        self.passes, self.constant, self.expected = passes, constant, expected
        self.first = passes() if passes is not None else 0.0
        self.evaluations = 0
        self.loglik = math.nan
        self.began = self.last = time.perf_counter()

    def told(self, loglik: float = math.nan) -> None:
        """One more evaluation, and its log-likelihood (by REML the restricted one) where it has one."""
        self.evaluations, self.loglik, self.last = self.evaluations + 1, loglik, time.perf_counter()

    def over(self, scan: Callable[[Any, bool], list[Any]]) -> Callable[[Any, bool], list[Any]]:
        """The scan of a `GLMMProblem`, watched."""

        def watched(points: Any, main: bool) -> list[Any]:
            looks = scan(points, main)
            self.told(looks[0].loglik if main else self.loglik)
            return looks

        return watched

    def __call__(self, _: float) -> Live:
        """What there is to show now."""
        phrases = [f"evaluation {self.evaluations + 1}"]
        if self.passes is not None:
            phrases.append(f"{self.passes() - self.first:.1f} passes")
        objective = -2.0 * (self.loglik + self.constant)
        if math.isfinite(objective):
            phrases.append(f"-2 log L {objective:,.2f}")
        return Live(tuple(phrases), self._left())

    def _left(self) -> float | None:
        if not 0 < self.evaluations < self.expected:
            return None
        each = (self.last - self.began) / self.evaluations
        return max(each * (self.expected - self.evaluations) - (time.perf_counter() - self.last), 0.0)


class Written:
    """How many of a source's rows have their predictions, by the `info` of the fit that scores them. The time left is counted from the
    first rows: what an engine does before these tells nothing of it."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info
        self.first: tuple[float, int] | None = None

    def __call__(self, elapsed: float) -> Live:
        """What there is to show after so many seconds."""
        done, total = self.info.get("scored", {}).get("rows", 0), self.info.get("rows_to_score")
        if not total:
            return Live((f"{done:,} rows",))
        if done and self.first is None:
            self.first = elapsed, done
        since, before = self.first or (elapsed, done)
        left = (elapsed - since) * (total - done) / (done - before) if done > before else None
        return Live((f"{done:,} of {total:,} rows",), left)


@contextmanager
def stage(
    name: str, seconds: dict[str, float], engine: Engine | None = None, options: Options | None = None, *, rows: int | None = None,
    live: Callable[[float], Live] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Times one stage into `seconds[name]`, shows it where the options or a terminal ask for it, and logs it.

    `rows`: how many the engine's query reads; `live`: tells what to show, after so many seconds, in place of the engine. The yielded dict
    takes further fields of the log record: `stage`, `seconds`, and `failed` (the error's class) after an error.
    """
    began = time.perf_counter()
    fields: dict[str, Any] = {"stage": name}
    wanted = options.progress if options is not None else None
    live = live or (lambda elapsed: _of_engine(engine, rows, elapsed))
    try:
        with _shown(name, live, began) if (_on_terminal() if wanted is None else wanted) else nullcontext():
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
def _shown(name: str, live: Callable[[float], Live], began: float) -> Iterator[None]:
    """A thread that keeps one line up to date while the stage runs; it is gone, and its line wiped, before anything else is written."""
    done = threading.Event()
    ticker = threading.Thread(target=_tick, args=(name, live, began, done), daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()


def _tick(name: str, live: Callable[[float], Live], began: float, done: threading.Event) -> None:
    if done.wait(PATIENCE):
        return
    # a terminal that has gone away must not take the fit with it
    with suppress(OSError, ValueError, AttributeError):
        while True:
            elapsed = time.perf_counter() - began
            _write(WIPE + _line(name, elapsed, live(elapsed), _width()))
            if done.wait(TICK):
                break
        _write(WIPE)


def _of_engine(engine: Engine | None, rows: int | None, elapsed: float) -> Live:
    """The part of a query that is done, and the rows that it is of."""
    share = engine.progress() if engine is not None else None
    if not share or not 0.0 < share < 1.0:
        return Live((f"{rows:,} rows",) if rows else ())
    return Live(((f"{share * rows:,.0f} of {rows:,} rows", f"{share:.0%}") if rows else (f"{share:.0%}",)), elapsed * (1.0 - share) / share)


def _line(name: str, elapsed: float, live: Live, width: int) -> str:
    """`blocks 12 s, about 18 s left, 2,000,000 of 5,000,000 rows, 40%`, as much of it as fits into the terminal's width."""
    left = [f"about {_duration(live.left)} left"] if live.left is not None else []
    return ", ".join([f"{name.replace('_', ' ')} {_duration(elapsed)}", *left, *live.phrases])[: width - 1]


def _duration(seconds: float) -> str:
    """`45 s`, `3:07 min`, `1:02 h`."""
    if seconds < 100.0:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60.0)
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min" if seconds < 6000.0 else f"{minutes // 60}:{minutes % 60:02d} h"


def _width() -> int:
    """Columns of the terminal, or 80: a line that wraps could not be wiped."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
