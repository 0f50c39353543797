"""Jobs that are killed, stopped, or run out of disk: what was there stays, the next run cleans up and ends as any other."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlpipe.scratch import LOCK, ScratchDirectory, swept

KILLS = str(Path(__file__).parent / "kills.py")


@pytest.mark.parametrize(
    "what", [["points", "--points", "8"], ["points", "--points", "2", "--database"], ["stopped"], ["full"], ["vanished"]]
)
def test_a_job_survives(what: list[str]) -> None:
    """In a process of its own, without the threads that other tests have started: it forks (see `kills`)."""
    done = subprocess.run([sys.executable, KILLS, *what], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def test_directories_of_dead_processes_go_and_others_stay(tmp_path: Path) -> None:
    code = "import os, sys; from mlpipe.scratch import ScratchDirectory as S; d = S(sys.argv[1]); print(d.name, flush=True); os._exit(1)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    dead, alive = Path(done.stdout.strip()), ScratchDirectory(str(tmp_path))
    assert (dead / LOCK).exists() is False  # making the second removed the first
    for name in ("mlpipe-of-someone-else", "other"):
        (tmp_path / name).mkdir()
    swept(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {Path(alive.name).name, "mlpipe-of-someone-else", "other"}
    alive.cleanup()
    alive.cleanup()
    assert not Path(alive.name).exists()
