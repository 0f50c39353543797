"""A simulated month: daily partitions, a store that has all but the last, and the last day's `mlpipe run` against a full fit.

    python benchmarks/incremental.py FOLDER [--family gaussian] [--days 30] [--rows 3000000] [--blocks 100000] [--threads 1] [--runs 3]

With `--family binomial` the model is a generalized one of 0/1 responses whose covariates have few values: its rows compress. The engine's
stages are then those that read rows, and merge and order compressed ones.

Every run is a process of its own: CPU seconds of the whole process and of the engine's stages, bytes read by system calls during these
(`rchar` of /proc/self/io: the source's files; states are mapped), partitions read, and how far the estimates are from the full fit's.
"""
from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb

STATEMENT = """
copy (
    with blocks as (select range as g, sin(range * 12.9898) * 1.4 as b0 from range({blocks})),
    rows as (
        select floor(random() * {blocks})::bigint as g, random() * 2 - 1 as x1, random() + random() - 1 as x2, random() * 10 as x3,
            (2000 + floor(random() * 20))::double as x4, random() + random() + random() as x5,
            random() + random() + random() + random() - 2 as e
        from range({rows})
    )
    select rows.g, x1, x2, x3, x4, x5, 1 + 0.5 * x1 - 0.2 * x2 + 0.1 * x3 + 0.02 * (x4 - 2000) + 0.3 * x5 + b0 + e as y
    from rows join blocks using (g)
) to '{out}' (format parquet)
"""
BINOMIAL = """
copy (
    with blocks as (select range as g, sin(range * 12.9898) * 1.4 as b0 from range({blocks})),
    rows as (
        select floor(random() * {blocks})::bigint as g, floor(random() * 5)::double as x1, floor(random() * 3)::double as x2,
            floor(random() * 2)::double as x3, random() as u
        from range({rows})
    )
    select rows.g, x1, x2, x3, (u < 1 / (1 + exp(1 - 0.3 * x1 - 0.2 * x2 + 0.4 * x3 - b0)))::bigint as y
    from rows join blocks using (g)
) to '{out}' (format parquet)
"""
MODELS = {  # the rows of a day, and the job's [model]
    "gaussian": (STATEMENT, 'formula = "y ~ x1 + x2 + x3 + x4 + x5 + (1 | g)"'),
    "binomial": (BINOMIAL, 'kind = "glmm"\nfamily = "binomial"\nformula = "y ~ x1 + x2 + x3 + (1 | g)"'),
}
PROCESS = """
import json, sys, time
from contextlib import contextmanager
from pathlib import Path
import mlpipe.collect, mlpipe.cli, mlpipe.gather, mlpipe.incremental, mlpipe.keeping
from mlpipe.progress import stage as timed
cost = {"cpu": 0.0, "bytes": 0}
def read():
    return int(Path("/proc/self/io").read_text().split()[1])
@contextmanager
def stage(*arguments, **keywords):
    cpu, before = time.process_time(), read()
    with timed(*arguments, **keywords) as fields:
        yield fields
    cost["cpu"] += time.process_time() - cpu
    cost["bytes"] += read() - before
mlpipe.collect.stage = stage
if sys.argv[2] != "gaussian":
    mlpipe.gather.stage = mlpipe.keeping.stage = mlpipe.incremental.stage = stage
sys.argv = ["mlpipe", "run", sys.argv[1]]
try:
    mlpipe.cli.main()
finally:
    import resource
    used = resource.getrusage(resource.RUSAGE_SELF)
    record = {"process": used.ru_utime + used.ru_stime, "engine": cost["cpu"], "bytes": cost["bytes"], "memory": used.ru_maxrss * 1024}
    print(json.dumps(record), file=sys.stderr)
"""


def main() -> None:
    """Makes the month where it is not there yet, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=list(MODELS), default="gaussian")
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    folder, family = arguments.folder, arguments.family
    month(folder / "month", arguments.days, arguments.rows, arguments.blocks, MODELS[family][0])
    last = folder / "month" / f"day{arguments.days:03d}.parquet"
    aside = folder / last.name
    job(folder, "store", arguments.threads, family, store=True)
    job(folder, "full", arguments.threads, family, store=False)
    shutil.rmtree(folder / "store", ignore_errors=True)
    last.rename(aside)
    report("first run, all days but the last", run(folder / "store.toml", family))
    shutil.copytree(folder / "store", folder / "before", dirs_exist_ok=True)
    aside.rename(last)
    daily, full = [], []
    for _ in range(arguments.runs):
        shutil.rmtree(folder / "store")
        shutil.copytree(folder / "before", folder / "store")
        daily.append(run(folder / "store.toml", family))
        full.append(run(folder / "full.toml", family))
    shutil.rmtree(folder / "before")
    ours, theirs = (report(name, *runs) for name, runs in (("the last day's run", daily), ("full fit", full)))
    print("ratio:", {name: round(ours[name] / theirs[name], 4) for name in ("process", "engine", "bytes")})
    print("largest difference in standard errors, in log-likelihood, tolerance:", *compared(folder))


def month(folder: Path, days: int, rows: int, blocks: int, statement: str) -> None:
    """The files of the days that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    con = duckdb.connect(config={"threads": 1, "preserve_insertion_order": False})
    for number in range(1, days + 1):
        path = folder / f"day{number:03d}.parquet"
        if not path.exists():
            con.execute(f"select setseed({number / (days + 1)})")
            con.execute(statement.format(blocks=blocks, rows=rows, out=path))


def job(folder: Path, name: str, threads: int, family: str, *, store: bool) -> None:
    """A job file over the month, with a store or without."""
    lines = ["[source]", f'path = "{folder}/month/*.parquet"', "[model]", MODELS[family][1]]
    lines += ["[output]", f'target = "{folder}/{name}_out"', 'mode = "overwrite"', "ranef = false", "[limits]", f"threads = {threads}"]
    lines += ["[store]", f'path = "{folder}/store"'] if store else []
    (folder / f"{name}.toml").write_text("\n".join(lines) + "\n")


def run(path: Path, family: str) -> dict[str, Any]:
    """What one process used."""
    command = [sys.executable, "-c", PROCESS, str(path), family]
    done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stderr.strip().splitlines()[-1])
    return found


def report(name: str, *runs: dict[str, Any]) -> dict[str, float]:
    """Prints and returns the medians."""
    middle = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
    print(f"{name}: process {middle['process']:.2f} s CPU, engine {middle['engine']:.2f} s CPU, {middle['bytes'] / 1e6:,.0f} MB read, "
          f"peak {middle['memory'] / 1e6:,.0f} MB", flush=True)  # fmt: skip
    return middle


def compared(folder: Path) -> tuple[float, float, float]:
    """How far the two results are apart: coefficients and theta in standard errors, log-likelihoods, and what is allowed of these."""
    import numpy as np

    import mlpipe as mp

    ours, full = mp.load(folder / "store_out"), mp.load(folder / "full_out")
    away = np.abs(ours.beta - full.beta) / np.sqrt(np.diag(full.covariance))
    theta = np.abs(ours.theta - full.theta) / np.sqrt(np.diag(full.theta_covariance))[: len(full.theta)]
    return float(max(away.max(), theta.max())), abs(ours.loglik - full.loglik), 1e-8 + 1e-12 * abs(full.loglik)


if __name__ == "__main__":
    main()
