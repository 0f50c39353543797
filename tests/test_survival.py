"""Jobs that are killed, stopped, or run out of disk: what was there stays, the next run cleans up and ends as any other."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

KILLS = str(Path(__file__).parent / "kills.py")


@pytest.mark.parametrize(
    "what",
    [
        ["points", "--points", "4"], ["points", "--points", "1", "--database"], ["points", "--points", "2", "--binomial"], ["stopped"],
        ["full"], ["vanished"],
    ],
)
def test_a_job_survives(what: list[str]) -> None:
    """In a process of its own, without the threads that other tests have started: it forks (see `kills`)."""
    done = subprocess.run([sys.executable, KILLS, *what], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
