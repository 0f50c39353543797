"""Jobs that are killed, stopped, or run out of disk: what was there stays, the next run cleans up and ends as any other."""
from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlpipe.scratch import LOCK, ScratchDirectory, swept
from tests.kills import JOB, check_clean, ended, left, started, survived
from tests.lakes import lake

NAMES = ("store", "target")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job over three days that has run once, before a fourth came."""
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(folder=tmp_path, store=NAMES[0], target=NAMES[1]))
    (tmp_path / "temp").mkdir()
    lake(tmp_path / "lake", 1, 3, 300)
    assert ended(started(path)) == 0
    lake(tmp_path / "lake", 4, 4, 300)
    return path


def test_kills_at_any_moment(tmp_path: Path) -> None:
    counts = survived(tmp_path, 8, 5)
    assert counts["old"] + counts["new"] == 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_half_done(number: signal.Signals, code: int, job: Path, tmp_path: Path) -> None:
    before = left(tmp_path, NAMES)
    said = tmp_path / "said"
    process = started(job, said)
    while not list((tmp_path / "temp").iterdir()):
        time.sleep(0.01)
    os.kill(process, number)
    status = ended(process)
    assert status in (code, 0)
    if status:
        assert said.read_text() == "interrupted\n"
        days, found = left(tmp_path, NAMES)
        assert found == before[1] and days in (3, 4) and not list((tmp_path / "temp").iterdir())
    assert ended(started(job)) == 0 and left(tmp_path, NAMES)[0] == 4
    check_clean(tmp_path, NAMES)


@pytest.mark.parametrize("limit", [2_000, 20_000])
def test_a_full_disk_is_told_and_nothing_is_lost(limit: int, job: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a disk that is full: writes beyond it fail alike."""
    before, said = left(tmp_path, NAMES), tmp_path / "said"
    assert ended(started(job, said, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))) == 5
    assert said.read_text().startswith("error: cannot write") and "Traceback" not in said.read_text()
    days, found = left(tmp_path, NAMES)
    assert found == before[1] and days in (3, 4)
    assert ended(started(job)) == 0
    assert left(tmp_path, NAMES)[0] == 4
    check_clean(tmp_path, NAMES)


def test_a_partition_that_vanished_overnight(job: Path, tmp_path: Path) -> None:
    before, said = left(tmp_path, NAMES), tmp_path / "said"
    (tmp_path / "lake" / "d02.parquet").unlink()
    assert ended(started(job, said)) == 3
    assert "no longer has the partition" in said.read_text() and "d02.parquet" in said.read_text()
    assert left(tmp_path, NAMES) == before


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
