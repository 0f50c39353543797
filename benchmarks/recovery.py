"""Small simulated fits with known truth: how often 95 % Wald intervals hold it, where the likelihood is exact (many quadrature nodes).

    python benchmarks/recovery.py [--fits 4000] [--nagq 15] [--blocks 150] [--rows 8]

Bernoulli-logit, one random intercept; seeds 0, 1, 2, …. Prints per parameter the coverage with its Monte Carlo error, the mean error in
standard errors, and how many fits did not converge or were singular; then, on the first fits, how far Laplace estimates are from those of
dense quadrature on the same data.
"""
from __future__ import annotations

import argparse
import math
import warnings

import numpy as np
import polars as pl

import mlpipe as mp

TRUTH = {"(Intercept)": -0.5, "x": 0.8, "sd__(Intercept)": 1.0}
FORMULA = "y ~ x + (1 | g)"
COMPARED = 200  # fits on which Laplace is compared with quadrature


def data(seed: int, blocks: int, rows: int) -> pl.DataFrame:
    """One data set."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(blocks), rows)
    x = rng.standard_normal(len(g))
    eta = TRUTH["(Intercept)"] + TRUTH["x"] * x + TRUTH["sd__(Intercept)"] * rng.standard_normal(blocks)[g]
    return pl.DataFrame({"g": g, "x": x, "y": (rng.random(len(g)) < 1 / (1 + np.exp(-eta))).astype(np.int64)})


def estimates(frame: pl.DataFrame, nagq: int) -> tuple[np.ndarray, np.ndarray, bool, bool]:
    """Estimates, standard errors, converged, singular."""
    fit = mp.glmm(FORMULA, frame, family="binomial", nagq=nagq)
    table = fit.tidy()
    rows = {row["term"]: row for row in table.to_pylist()}
    return (
        np.array([rows[name]["estimate"] for name in TRUTH]),
        np.array([rows[name]["std_error"] or math.nan for name in TRUTH]),
        fit.converged,
        fit.singular,
    )


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=4000)
    parser.add_argument("--nagq", type=int, default=15)
    parser.add_argument("--blocks", type=int, default=150)
    parser.add_argument("--rows", type=int, default=8)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    z = np.empty((arguments.fits, len(TRUTH)))
    failed = singular = 0
    gaps = []
    for seed in range(arguments.fits):
        frame = data(seed, arguments.blocks, arguments.rows)
        estimate, error, converged, boundary = estimates(frame, arguments.nagq)
        z[seed] = (estimate - np.array(list(TRUTH.values()))) / error
        failed, singular = failed + (not converged), singular + boundary
        if seed < COMPARED:
            gaps.append((estimates(frame, 1)[0] - estimate) / error)
    inside = np.abs(z) < 1.959963984540054
    for k, name in enumerate(TRUTH):
        coverage = inside[:, k].mean()
        spread = math.sqrt(coverage * (1 - coverage) / len(z))
        print(f"{name:18s} coverage {coverage:.4f} ± {spread:.4f}  mean error {np.nanmean(z[:, k]):+.3f} se")
    print(f"{failed} of {arguments.fits} fits did not converge, {singular} were singular")
    print("Laplace less quadrature, in standard errors (mean, largest):", np.mean(gaps, axis=0).round(4), np.abs(gaps).max(axis=0).round(4))


if __name__ == "__main__":
    main()
