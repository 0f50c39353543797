"""Cluster-robust least squares and estimating equations: CPU seconds beside a plain scan of the same columns.

    python benchmarks/alternatives.py ols data.parquet
    python benchmarks/alternatives.py gee b1m.parquet
"""
from __future__ import annotations

import resource
import sys

import duckdb

import mlpipe as mp

SCAN = "select count(*), sum(g), sum(x1), sum(x2), sum(x3), sum(x4), sum(x5), sum(y) from read_parquet('{path}')"
RIGHT = "x1 + x2 + x3 + x4 + x5"


def cpu() -> float:
    """User and system seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(what: str, path: str) -> None:
    """Prints the figures of one case, best of three."""
    con = duckdb.connect()
    options = mp.Options(threads=1)
    con.execute("set threads = 1")
    best: dict[str, float] = {}
    for _ in range(3):
        began = cpu()
        con.execute(SCAN.format(path=path)).fetchall()
        best["scan"] = min(best.get("scan", 1e9), cpu() - began)
        for kind in ("plain", "CR1", "CR2") if what == "ols" else ("gee",):
            began = cpu()
            if what == "gee":
                fit = mp.gee(f"y ~ {RIGHT}", path, groups="g", family="binomial", options=options)
            else:
                fit = mp.ols(f"y ~ {RIGHT}", path, options=options, **({} if kind == "plain" else {"cluster": "g", "vcov": kind}))
            best[kind] = min(best.get(kind, 1e9), cpu() - began)
            print(kind, {name: round(value, 2) for name, value in fit.info["seconds"].items()}, "passes", fit.info["passes"], flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print({name: round(value, 2) for name, value in best.items()}, f"peak {peak:.0f} MB")
    print("estimates", [round(value, 6) for value in fit.beta], [round(float(value), 6) for value in fit.vcov().diagonal() ** 0.5])
    if what == "gee":
        print("alpha", fit.alpha.tolist())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
