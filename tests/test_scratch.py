"""Temporary directories: nothing stays behind, whoever dies."""
from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import mlpipe as mp
from mlpipe.scratch import Scratch

HOLDER = """
import sys, time
from mlpipe.scratch import Scratch
held = Scratch(sys.argv[1])
print(held.name, flush=True)
time.sleep(60)
"""
# A fit whose spool is a file, told to be slow once it is there.
FIT = """
import sys, time
import mlpipe as mp
from mlpipe import gather, passes, spool
build, solved = spool.build, passes.solved
gather.build = lambda *a, budget, **k: build(*a, budget=100, **k)

def slow(*arguments):
    print("fitting", flush=True)
    time.sleep(60)

import mlpipe.generalized
mlpipe.generalized.solved = slow
mp.glmm("y ~ x + (1 | g)", sys.argv[1], family="poisson", options=mp.Options(temp_directory=sys.argv[2]))
"""


def started(code: str, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A process, and the first line it says."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def ended(process: subprocess.Popen[str], how: int) -> None:
    process.send_signal(how)
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()


def test_it_goes_when_told_or_when_nobody_holds_it(tmp_path: Path) -> None:
    one, two = Scratch(str(tmp_path)), Scratch(str(tmp_path))
    (Path(one.name) / "file").write_text("x")
    assert len(os.listdir(tmp_path)) == 2
    one.cleanup()
    one.cleanup()
    del two
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_a_killed_run_is_swept_by_the_next_and_a_living_one_is_not(tmp_path: Path) -> None:
    dead, left = started(HOLDER, str(tmp_path))
    living, kept = started(HOLDER, str(tmp_path))
    (Path(left) / "inside").mkdir()
    ended(dead, signal.SIGKILL)
    assert {str(path) for path in tmp_path.iterdir()} == {left, kept}
    held = Scratch(str(tmp_path))
    assert {str(path) for path in tmp_path.iterdir()} == {kept, held.name}
    ended(living, signal.SIGKILL)
    held.cleanup()


def test_what_others_called_alike_stays(tmp_path: Path) -> None:
    for name in ("mlpipe-results", "mlpipe-abcdefgh", "abcdefgh.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "mlpipe-abcdefgh.tmp").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mlpipe-bcdefghi.tmp").symlink_to(tmp_path / "elsewhere")
    before = set(os.listdir(tmp_path))
    Scratch(str(tmp_path)).cleanup()
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("after", ["mkdir", "open"])
def test_a_signal_while_it_is_made_leaves_nothing(after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = getattr(os, after)

    def interrupted(*arguments: object) -> None:
        call(*arguments)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(os, after, interrupted)
        Scratch(str(tmp_path))
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_taken_stays_and_another_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "mlpipe-aaaaaaaa.tmp"
    taken.write_text("not ours")
    names = iter(["aaaaaaaa", "bbbbbbbb"])
    monkeypatch.setattr("mlpipe.scratch.secrets.token_hex", lambda n: next(names))
    Scratch(str(tmp_path)).cleanup()
    assert os.listdir(tmp_path) == [taken.name]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Scratch(str(tmp_path / "no"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_fit_that_dies_leaves_nothing_to_the_next(how: signal.Signals, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"g": np.repeat(np.arange(20), 10), "x": rng.normal(size=200), "y": rng.poisson(2.0, 200)})
    data, temp = tmp_path / "data.parquet", tmp_path / "temp"
    frame.write_parquet(data)
    temp.mkdir()
    process, said = started(FIT, str(data), str(temp))
    assert said == "fitting" and any(path.suffix == ".arrow" for path in temp.rglob("*"))
    ended(process, how)
    before = os.listdir(temp)
    fit = mp.glmm("y ~ x + (1 | g)", frame.to_arrow().to_reader(), family="poisson", options=mp.Options(temp_directory=str(temp)))
    assert fit.n_blocks == 20 and before and os.listdir(temp) == []
