"""Kills, stops and starves a job, and looks at what is left; then runs it again and compares.

    python tests/kills.py points [--points 200] [--seed 0] [--database] [--binomial]     SIGKILL at random moments
    python tests/kills.py stopped | full | vanished                          signals; a full disk; a partition that is gone

Each run is a fork of this process, which has all libraries loaded and no threads: what is killed is the work, not the imports.
"""
from __future__ import annotations

import argparse
import atexit
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent.parent))

# loaded before the fork, so that what a run does is its work
import duckdb  # noqa: F401
import pyarrow.compute  # noqa: F401
import pyarrow.parquet  # noqa: F401
import scipy.linalg  # noqa: F401
import sqlglot.dialects.duckdb  # noqa: F401

import mlpipe as mp
from mlpipe import cli, effects, fit, generalized, incremental, job, reduction, result, shelf, store  # noqa: F401
from mlpipe.engines import target  # noqa: F401
from mlpipe.options import Options
from tests.lakes import lake

DAYS, ROWS = 4, 300
JOB = """
[source]
path = "{folder}/lake/*.parquet"
[model]
{model}
[store]
path = "{folder}/{store}"
[output]
target = "{folder}/{target}"
mode = "overwrite"
[limits]
threads = 1
temp_directory = "{folder}/temp"
"""


LINEAR = 'formula = "y ~ x + f + (1 | g)"'
BINOMIAL = 'kind = "glmm"\nformula = "I(y > 1) ~ f + (1 | g)"\nfamily = "binomial"'


def main() -> None:
    """Reads the command line; raises AssertionError where a job does not survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["points", "stopped", "full", "vanished"])
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", action="store_true", help="store and target are DuckDB files")
    parser.add_argument("--binomial", action="store_true", help="a generalized model, whose store holds compressed rows")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())  # no object that a fork would take along and clean up at its end
    try:
        if arguments.what == "points":
            model = BINOMIAL if arguments.binomial else LINEAR
            print(json.dumps(survived(folder, arguments.points, arguments.seed, arguments.database, model)))
        else:
            {"stopped": stopped, "full": full_disk, "vanished": vanished}[arguments.what](folder, made(folder, ("store", "target")))
    finally:
        shutil.rmtree(folder)


def made(folder: Path, names: tuple[str, str], model: str = LINEAR) -> Path:
    """A job that has run over all days but the last."""
    path = folder / "job.toml"
    path.write_text(JOB.format(folder=folder, model=model, store=names[0], target=names[1]))
    (folder / "temp").mkdir()
    days(folder, 1, DAYS - 1)
    assert ended(started(path)) == 0
    return path


def days(folder: Path, first: int, last: int) -> None:
    """Writes days into the lake, by a process of its own: polars has threads."""
    process = os.fork()
    if not process:
        status = 1
        try:
            lake(folder / "lake", first, last, ROWS)
            status = 0
        finally:
            os._exit(status)
    assert ended(process) == 0


def stopped(folder: Path, path: Path) -> None:
    """SIGTERM and SIGINT end a run with their status, a word, and nothing half done."""
    names, said = ("store", "target"), folder / "said"
    before = left(folder, names)
    for day, (number, code) in enumerate([(signal.SIGTERM, 143), (signal.SIGINT, 130)], DAYS):
        days(folder, day, day)
        process = started(path, said)
        while not list((folder / "temp").iterdir()):
            time.sleep(0.001)
        os.kill(process, number)
        status = ended(process)
        assert (status, said.read_text().strip()) == (code, "interrupted"), (status, said.read_text())
        held, found = left(folder, names)
        rest = list((folder / "temp").iterdir())
        assert found == before[1] and held in (day - 1, day) and not rest, (held, day, rest)
        assert ended(started(path)) == 0
        before = left(folder, names)
        assert before[0] == day
        check_clean(folder, names)


def full_disk(folder: Path, path: Path) -> None:
    """A limit on the size of files stands in for a disk that is full, at the first state and at the index: status 5, nothing lost."""
    names, said = ("store", "target"), folder / "said"

    def starved(limit: int) -> None:
        before = left(folder, names)
        status = ended(started(path, said, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
        assert status == 5 and said.read_text().startswith("error: cannot write"), (limit, status, said.read_text())
        assert left(folder, names) == before

    days(folder, DAYS, DAYS)
    starved(max(file.stat().st_size for file in (folder / "store" / "states").iterdir()) // 2)
    assert ended(started(path)) == 0
    assert left(folder, names)[0] == DAYS
    starved((folder / "target" / "fit.json").stat().st_size // 2)
    assert ended(started(path)) == 0
    check_clean(folder, names)


def vanished(folder: Path, path: Path) -> None:
    """A partition that is gone: status 3, its name, and all as it was."""
    names, said = ("store", "target"), folder / "said"
    before = left(folder, names)
    (folder / "lake" / "d02.parquet").unlink()
    assert ended(started(path, said)) == 3
    assert "no longer has the partition" in said.read_text() and "d02.parquet" in said.read_text()
    assert left(folder, names) == before


def survived(folder: Path, points: int, seed: int, database: bool, model: str) -> dict[str, int]:
    """Counts of what kills left: `finished` before the kill, `new` result or `old` one, `store` that had taken in the last day.

    Raises AssertionError where store or target are not valid, or the next run does not end as an undisturbed one.
    """
    before = folder / "before"
    names = ("store.duckdb", "target.duckdb") if database else ("store", "target")
    path = made(folder, names, model)
    _, old = left(folder, names)
    copied(folder, before, names)
    days(folder, DAYS, DAYS)
    began = time.monotonic()
    assert ended(started(path)) == 0
    length = time.monotonic() - began
    _, new = left(folder, names)
    assert old != new
    counts = {"finished": 0, "new": 0, "old": 0, "store": 0}
    rng = random.Random(seed)
    for point in range(points):
        copied(before, folder, names)
        process = started(path)
        time.sleep(rng.uniform(0.0, 1.1 * length))
        os.kill(process, signal.SIGKILL)
        counts["finished"] += ended(process) == 0
        held, found = left(folder, names)
        assert found in (old, new)
        counts["new" if found == new else "old"] += 1
        counts["store"] += held == DAYS
        began = time.monotonic()
        assert ended(started(path)) == 0
        length += 0.2 * (time.monotonic() - began - length)  # the machine is not always as fast
        assert left(folder, names) == (DAYS, new)
        check_clean(folder, names)
        if (point + 1) % 20 == 0:
            print(f"{point + 1} of {points}: {counts}", file=sys.stderr, flush=True)
    return counts


def started(path: Path, said: Path | None = None, first: Callable[[], None] = lambda: None) -> int:
    """A process that runs the job, without output but of its errors to a file; `first`: what it does before."""
    process = os.fork()
    if process:
        return process
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if said is not None else null, 2)
        first()
        sys.argv = ["mlpipe", "run", str(path)]
        cli.main()
    except SystemExit as leave:
        atexit._run_exitfuncs()  # as at an interpreter's end
        os._exit(int(leave.code or 0))
    finally:
        os._exit(99)


def ended(process: int) -> int:
    """The exit status of a process, negative of a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def copied(source: Path, to: Path, names: tuple[str, str]) -> None:
    """Copies store and target from one folder into another."""
    to.mkdir(exist_ok=True)
    for name in names:
        for path in (to / name, to / f"{name}.wal"):
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, to / name)


def left(folder: Path, names: tuple[str, str]) -> tuple[int, dict[str, Any]]:
    """How many partitions the store has, each of its states read, and what the target says; by a process of its own, as databases
    are read by threads that a fork must not have."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        status = 98
        try:
            with shelf.opened(str(folder / names[0]), Options(threads=1)) as opened:
                record = opened.record()
                assert record is not None
                assert all(opened.load(state).rows > 0 for state in shelf.named(record))
            fit = mp.load(folder / names[1])
            found = {"fixef": fit.fixef(), "loglik": fit.loglik, "theta": fit.theta.tolist(), "modes": fit.ranef().to_pydict()}
            with os.fdopen(write, "w") as pipe:
                pipe.write(json.dumps([len(record["partitions"]), found]))
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert ended(process) == 0, "what was left is not valid"
    held, found = json.loads(text)
    return held, found


def check_clean(folder: Path, names: tuple[str, str]) -> None:
    """Nothing of a killed run is left: no temporary directory, no state that no record names, no run that no index names."""
    assert not list((folder / "temp").iterdir())
    if (folder / names[0]).is_dir():
        record = json.loads((folder / names[0] / "store.json").read_text())
        assert {path.stem for path in (folder / names[0] / "states").iterdir()} == shelf.named(record)
        assert {path.name for path in (folder / names[0]).iterdir()} == {".lock", "states", "store.json"}
        index = json.loads((folder / names[1] / "fit.json").read_text())
        assert {path.name for path in (folder / names[1] / "runs").iterdir()} == {index["run_id"]}
        assert {path.name for path in (folder / names[1]).iterdir()} == {".lock", "runs", "fit.json"}


if __name__ == "__main__":
    main()
