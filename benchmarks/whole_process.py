"""Whole processes in turn: a fit from Parquet to printed summary against a plain scan of the same columns, or a peer package.

    python benchmarks/whole_process.py data.parquet [--threads 1] [--runs 5] [--cases scan intercept slope glmm …] [--memory-limit 2GB]

Prints for each case the median CPU and wall seconds, the largest resident memory, the largest anonymous memory, and the
CPU ratio to the first scan. Every case is run once before it counts.
"""
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

COVARIATES = ("x1", "x2", "x3", "x4", "x5")
FIXED = " + ".join(COVARIATES)
SCAN = """
import duckdb
con = duckdb.connect(config={{"threads": {threads}}})
print(con.sql("select sum(g), {sums} from read_parquet('{data}')").fetchall())
"""
FIT = """
import sys
from mlpipe.cli import main
sys.argv[1:] = ["fit", "y ~ {fixed} + ({random} | g)", "{data}", "--threads", "{threads}", "--memory-limit", "{memory}"]
main()
"""
LOGIT = """
import mlpipe as mp
fit = mp.glmm("y ~ {fixed} + (1 | g)", "{data}", family="binomial", options=mp.Options(threads={threads}, memory_limit="{memory}"))
print(fit, fit.info["passes"], fit.info["spool"])
"""
# Of benchmarks/generate_nested.py and generate_crossed.py; each against the plain scan of its own columns.
NESTED = """
import mlpipe as mp
formula = "y ~ x1 + x2 + (1 | district/school/student)"
print(mp.lmm(formula, "{data}", options=mp.Options(threads={threads}, memory_limit="{memory}")))
"""
CROSSED = NESTED.replace("(1 | district/school/student)", "(1 | user) + (1 | item)")
# What holding rows as cells is measured against: the grouped query alone, its result streamed.
GROUPED = """
import duckdb
con = duckdb.connect(config={{"threads": {threads}, "memory_limit": "{memory}"}})
reader = con.sql(
    "select g, {covariates}, count(*), sum(y) from read_parquet('{data}') group by g, {covariates}"
).to_arrow_reader(65536)
print(sum(batch.num_rows for batch in reader))
"""
CASES = {
    "scan": SCAN,
    "intercept": FIT.replace("{random}", "1"),
    "slope": FIT.replace("{random}", "1 + x1"),
    "logit": LOGIT,
    "grouped": GROUPED,
    "nested": NESTED,
    "scan_nested": SCAN.replace("sum(g), {sums}", "sum(district + school + student), sum(x1), sum(x2), sum(y)"),
    "crossed": CROSSED,
    "scan_crossed": SCAN.replace("sum(g), {sums}", "sum(user + item), sum(x1), sum(x2), sum(y)"),
}


def peers() -> dict[str, str]:
    """The cases of packages whose script lies in benchmarks/peers/NAME.py."""
    folder = Path(__file__).parent / "peers"
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.py"))}


def run(script: str) -> tuple[float, float, int, int, int]:
    """CPU seconds, wall seconds, peak resident and anonymous memory in MB, exit status of one process."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1"), "POLARS_MAX_THREADS": "2"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    anonymous = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, anonymous), daemon=True)
    watcher.start()
    assert process.stdout is not None
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        print(output[-1500:], file=sys.stderr)
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - began, usage.ru_maxrss // 1024, anonymous[0] // 1024, status


def _watch(pid: int, largest: list[int]) -> None:
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        largest[0] = max([largest[0], *(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))])
        time.sleep(0.02)


def main() -> None:
    """Reads the command line, runs the cases in turn, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory-limit", default="2GB")
    parser.add_argument("--cases", nargs="+", default=["scan", "intercept", "slope"])
    arguments = parser.parse_args()
    known = CASES | peers()
    sums = ", ".join(f"sum({name})" for name in (*COVARIATES, "y"))
    values = {"data": arguments.data, "threads": arguments.threads, "memory": arguments.memory_limit}
    values |= {"fixed": FIXED, "covariates": ", ".join(COVARIATES), "sums": sums}
    scripts = {case: known[case].format(**values) for case in arguments.cases}
    results: dict[str, list[tuple[float, float, int, int, int]]] = {case: [] for case in scripts}
    for turn in range(arguments.runs + 1):
        for case, script in scripts.items():
            result = run(script)
            if turn:
                results[case].append(result)
    print(f"{'case':<12} {'cpu s':>8} {'wall s':>8} {'rss MB':>8} {'anon MB':>8} {'cpu / scan':>10}")
    scan = next((case for case in results if case.startswith("scan")), None)
    base = statistics.median(r[0] for r in results[scan]) if scan else float("nan")
    for case, rows in results.items():
        cpu, wall = (statistics.median(r[k] for r in rows) for k in (0, 1))
        failed = "  FAILED" if any(r[4] for r in rows) else ""
        resident, anonymous = (max(r[k] for r in rows) for k in (2, 3))
        print(f"{case:<12} {cpu:8.2f} {wall:8.2f} {resident:8d} {anonymous:8d} {cpu / base:10.2f}{failed}", flush=True)


if __name__ == "__main__":
    main()
