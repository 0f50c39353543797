"""Time that is over: parsed lengths, and work that is stopped and says so."""
from __future__ import annotations

import signal
import time

import pytest

from mlpipe.deadline import parse_seconds, within
from mlpipe.errors import ConfigError, ResourceError


@pytest.mark.parametrize(
    ("text", "seconds"), [(90, 90.0), (0.5, 0.5), ("90", 90.0), ("90s", 90.0), ("45 min", 2700.0), ("1.5H", 5400.0), (" 1d ", 86400.0)]
)
def test_lengths_of_time(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", [0, -1, True, "", "soon", "5 minutes", "1h30", "1e3", float("nan"), float("inf"), 1e12, "0s"])
def test_what_is_no_length_of_time(text: str | float) -> None:
    with pytest.raises(ConfigError, match="is not a length of time") as caught:
        parse_seconds(text)
    assert caught.value.code == "timeout"


@pytest.mark.parametrize(("limit", "told"), [(0.05, "0.05 s"), ("0.05s", "0.05s")])
def test_work_that_takes_too_long(limit: str | float, told: str) -> None:
    before = signal.getsignal(signal.SIGALRM)
    cleaned = []
    with pytest.raises(ResourceError, match=f"the timeout of {told} is over") as caught, within(limit):
        try:
            time.sleep(10)
        finally:
            cleaned.append(True)
    assert caught.value.code == "timeout" and cleaned
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_work_that_is_done_in_time_or_stopped_otherwise() -> None:
    with within(60), within(None):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with pytest.raises(KeyboardInterrupt), within(60):
        raise KeyboardInterrupt
    with pytest.raises(ValueError), within(60):
        raise ValueError
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
