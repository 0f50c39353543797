"""How often the Monte Carlo error that iterative fits report holds their true one: the distance from the exact optimum, over probe seeds.

    python benchmarks/probe_coverage.py InstEval.parquet [--seeds 200] [--first 0] [--formula FORMULA]

The formula (default: `FORMULA` below) is fitted exactly once; then each seed's probes find their own root of the score from there. The
reported error is one standard deviation, estimated from k probes, so that an interval of 95 % is Student's with k - 1 degrees of freedom:
±2.1 for 16 probes. Prints a line per seed, then per θ (in the solver's order) the root mean square of the true error and the mean
reported one, in standard errors of θ, and the shares of seeds within that interval and within 1, 2 and 3 reported errors. The
program fails where an interval holds fewer than 95 % of seeds by more than twice the binomial error of that share, or where a
seed does not converge.
"""
from __future__ import annotations

import argparse
import math
import time

import numpy as np
from scipy.stats import t

import mlpipe as mp
from mlpipe.solve.crossed import CrossedProblem
from mlpipe.solve.iterative import solve_iterative

FORMULA = "y ~ service + (1 | s) + (1 | d) + (1 | dept)"
LEVEL = 0.95


def errors(problem: CrossedProblem, exact: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """True and reported errors (θ,) in standard errors of one seed, and its probes."""
    found = solve_iterative(problem, exact, None, tol=1e-8, max_evaluations=200, seed=seed, threads=1)
    if not found.solution.converged:
        raise SystemExit(f"seed {seed}: {found.solution.message}")
    se = np.sqrt(np.diag(found.solution.vcov))
    return (found.solution.psi - exact) / se, found.error, found.probes


def main() -> None:
    """Reads the command line, fits, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--formula", default=FORMULA)
    arguments = parser.parse_args()
    fit = mp.lmm(arguments.formula, arguments.data, method="exact")
    problem = fit.held.problem
    assert isinstance(problem, CrossedProblem)
    lambda_ = fit.held.lambda_([term.star for term in fit.terms])
    exact = np.array([lambda_[i, j] for i, j in problem.entries])
    began, rows = time.process_time(), []
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        rows.append(errors(problem, exact, seed))
        ratios = " ".join(f"{ratio:5.2f}" for ratio in rows[-1][0] / rows[-1][1])
        print(f"seed {seed}: {rows[-1][2]} probes, true over reported error {ratios}", flush=True)
    spent = (time.process_time() - began) / len(rows)
    true, reported = (np.array([row[k] for row in rows]) for k in (0, 1))
    probes = np.array([row[2] for row in rows])
    print(f"{len(rows)} seeds, {spent:.2f} s of CPU each, {probes.min()} to {probes.max()} probes")
    print(f"{'theta':>5} {'rms true':>9} {'reported':>9} {'in 95 %':>8} {'within 1':>8} {'2':>7} {'3':>7}")
    quantile = t.ppf((1.0 + LEVEL) / 2.0, probes - 1)[:, None]
    share = (np.abs(true) <= quantile * reported).mean(axis=0)
    for k in range(true.shape[1]):
        within = [(np.abs(true[:, k]) <= width * reported[:, k]).mean() for width in (1, 2, 3)]
        figures = f"{math.sqrt((true[:, k] ** 2).mean()):9.5f} {reported[:, k].mean():9.5f} {share[k]:8.3f}"
        print(f"{k:5d} {figures} {within[0]:8.3f} {within[1]:7.3f} {within[2]:7.3f}")
    if (share < LEVEL - 2.0 * math.sqrt(LEVEL * (1.0 - LEVEL) / len(rows))).any():
        raise SystemExit("the reported Monte Carlo error is too small")


if __name__ == "__main__":
    main()
