"""`mlpipe predict` against a DuckDB copy of the same rows, whole processes in turn.

    python benchmarks/predict.py data.parquet [--threads 4] [--runs 3] [--random 1]

The data are generate.py's. The copy keeps the rows' order, as predictions do. Prints median CPU and wall seconds, peak resident memory, and
the ratios to the copy.
"""
from __future__ import annotations

import argparse
import os
import statistics
import tempfile

from whole_process import run

import mlpipe as mp

COPY = """
import duckdb
con = duckdb.connect(config={{"threads": {threads}}})
con.execute("copy (from read_parquet('{data}')) to '{out}' (format parquet)")
"""
PREDICT = """
import sys
from mlpipe.cli import main
sys.argv[1:] = ["predict", {fit!r}, {data!r}, "--out", {out!r}, "--threads", "{threads}"]
main()
"""


def main() -> None:
    """Reads the command line, fits, times, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--random", default="1")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fit, out = os.path.join(folder, "fit"), os.path.join(folder, "out.parquet")
        mp.lmm(f"y ~ x1 + x2 + x3 + x4 + x5 + ({arguments.random} | g)", arguments.data).write(fit)
        scripts = {
            "copy": COPY.format(threads=arguments.threads, data=arguments.data, out=out),
            "predict": PREDICT.format(threads=arguments.threads, data=arguments.data, out=out, fit=fit),
        }
        results: dict[str, list[tuple[float, float, int, int, int]]] = {case: [] for case in scripts}
        for turn in range(arguments.runs + 1):
            for case, script in scripts.items():
                result = run(script)
                assert result[4] == 0
                if turn:
                    results[case].append(result)
                os.remove(out)
    print(f"{'case':<8} {'cpu s':>8} {'wall s':>8} {'rss MB':>8} {'cpu':>6} {'wall':>6}")
    base = [statistics.median(r[k] for r in results["copy"]) for k in (0, 1)]
    for case, rows in results.items():
        cpu, wall = (statistics.median(r[k] for r in rows) for k in (0, 1))
        print(f"{case:<8} {cpu:8.2f} {wall:8.2f} {max(r[2] for r in rows):8d} {cpu / base[0]:6.2f} {wall / base[1]:6.2f}")


if __name__ == "__main__":
    main()
