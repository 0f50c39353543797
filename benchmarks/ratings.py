"""A ratings-shaped crossed fit against its truth, and the score at its solution by fresh probes in double precision.

    python benchmarks/generate_crossed.py --rows 32000000 --users 200000 --items 84000 --ratings --seed 0 --out ratings.parquet
    python benchmarks/ratings.py ratings.parquet --threads 2 --memory-limit 8GB [--probes 256]

Prints CPU and wall seconds, the peak of anonymous memory, estimates minus truth in standard errors, and with `--probes` the scaled score
(length of the Newton step in standard errors) at the solution by so many probes that the fit has not seen, solved to 1e-10.
"""
from __future__ import annotations

import argparse
import math
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import mlpipe as mp

TRUTH = {"(Intercept)": 3.5, "x1": 0.3, "x2": -0.2, "user": 0.45, "item": 0.5, "Residual": 0.85}
TOGETHER = 32  # probes that are solved side by side


def main() -> None:
    """Reads the command line, fits, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-limit", default="8GB")
    parser.add_argument("--probes", type=int, default=0)
    arguments = parser.parse_args()
    peak = [0]
    threading.Thread(target=_watch, args=(peak,), daemon=True).start()
    began = time.perf_counter()
    options = mp.Options(threads=arguments.threads, memory_limit=arguments.memory_limit)
    fit = mp.lmm("y ~ x1 + x2 + (1 | user) + (1 | item)", arguments.data, options=options)
    print(fit)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(f"CPU {usage.ru_utime + usage.ru_stime:.1f} s, wall {time.perf_counter() - began:.1f} s, anonymous memory {peak[0]} MB at most")
    print(fit.info["seconds"], fit.info["monte_carlo"], "evaluations", fit.info["evaluations"])
    for row in fit.tidy().to_pylist():
        off = (row["estimate"] - TRUTH[row["group"] or row["term"]]) / row["std_error"]
        print(f"{row['group'] or '':9} {row['term']:16} {off:+.2f} standard errors from the truth")
    if arguments.probes:
        print(f"scaled score by {arguments.probes} fresh probes: {fresh_score(fit, arguments.probes, arguments.threads):.4f}")


def fresh_score(fit: Any, probes: int, threads: int) -> float:
    """The length of Newton's step at the fit's Λ, in standard errors, by probes of another seed, all in double precision."""
    from mlpipe.solve import small
    from mlpipe.solve.conjugate import Operator
    from mlpipe.solve.crosses import by_size
    from mlpipe.solve.iterative import Iterative

    problem, _ = by_size(fit.held.problem)
    solver = Iterative(problem, 2**31 - 1, threads)
    lambda_ = fit.held.lambda_([term.star for term in fit.terms])
    M: Operator = solver.operator(lambda_)
    c = solver.spherical(lambda_)
    U = M.solve(c, 1e-10)
    at = solver.estimates(c, U, M)
    t, H = solver.residual_sums(lambda_, at, U)
    sums = [np.zeros((f.q, f.q)) for f in problem.factors]
    for _ in range(0, probes, TOGETHER):
        fresh = solver.rng.integers(0, 2, (len(solver.probes), TOGETHER)) * 2.0 - 1.0
        solved = M.solve_rest(M.by_blocks(small.multiply, fresh), 1e-10).x
        for total, part in zip(sums, solver.traces_by_probe(M, M, fresh, solved), strict=True):
            total += part.sum(axis=2) / probes
    score = solver.score_from(at, U, t, H, solver.gaps(lambda_, sums))
    AI = solver.information_from(lambda_, at, t, H, solver.working(lambda_, at, t), lambda b: M.solve(b, 1e-10))
    return math.sqrt(float(score @ np.linalg.solve(AI, score)))


def _watch(peak: list[int]) -> None:
    while True:
        lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
        peak[0] = max(peak[0], sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) // 1024)
        time.sleep(0.05)


if __name__ == "__main__":
    main()
