"""Small simulated fits with known truth: how often 95 % Wald intervals hold it, where the likelihood is exact (many quadrature nodes).

    python benchmarks/recovery.py [--fits 4000] [--nagq 15] [--blocks 150] [--rows 8] [--checked 50] [--compared 200]

Bernoulli-logit, one random intercept; seeds 0, 1, 2, …. Prints per parameter the coverage with its Monte Carlo error, the mean error and
its spread in standard errors, and how many fits did not converge or were singular; then, on the first `compared` fits, how far the
estimates of Laplace's approximation are from those of dense quadrature on the same data: maximum likelihood by scipy of an integral on a
fixed grid of 200 nodes, which shares no code with the library.

The numbers go straight into the solver, as the statements before it would be nine tenths of a small fit's time; the first `checked` data
sets go through `mlpipe.glmm` too, and the program fails where the two differ by more than 1e-6 standard errors.
"""
from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.optimize import minimize

import mlpipe as mp
from mlpipe.solve.density import density
from mlpipe.solve.family import Cells
from mlpipe.solve.glm import GLMLook, glm_look, solve_glm
from mlpipe.solve.glmm import GLMMProblem, solve_glmm
from mlpipe.solve.kernel import Chunk, Kernel, Look, Point, Rows

TRUTH = {"(Intercept)": -0.5, "x": 0.8, "sd__(Intercept)": 1.0}
TRUE = np.array(list(TRUTH.values()))
FORMULA = "y ~ x + (1 | g)"
Z95 = 1.959963984540054


@dataclass
class Estimates:
    """One fit: estimates and standard errors (3,), in TRUTH's order."""

    value: np.ndarray
    error: np.ndarray
    converged: bool
    singular: bool


def simulated(seed: int, blocks: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block, covariate and response of one data set."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(blocks), rows)
    x = rng.standard_normal(len(g))
    eta = TRUE[0] + TRUE[1] * x + TRUE[2] * rng.standard_normal(blocks)[g]
    return g, x, (rng.random(len(g)) < 1 / (1 + np.exp(-eta))).astype(float)


def solved(x: np.ndarray, y: np.ndarray, starts: np.ndarray, nagq: int) -> Estimates:
    """The shipped solver on rows in memory, from a GLM and a standard deviation of 1."""
    made = density("binomial", "logit")
    rows = Rows(np.stack([np.ones_like(x), x]), None, Cells(y), starts)
    chunk, kernel = Chunk((rows,), 0, len(starts)), Kernel(made, (0,), np.eye(1), ((0, 0),), nagq)
    modes = np.zeros((1, len(starts)))

    def plain(psi: np.ndarray, safe: bool) -> GLMLook:
        return glm_look(made, rows, psi, 0.0, safe=safe)

    def scan(points: Sequence[Point], keep: bool) -> list[Look]:
        nonlocal modes
        if not keep:
            return [kernel.look(chunk, point, modes, outer=False)[0] for point in points]
        look, modes = kernel.look(chunk, points[0], modes)
        return [look]

    beta = solve_glm(plain, np.zeros(2), shape=False, tol=1e-3).psi
    typical = kernel.moments(chunk, Point(beta, np.zeros((1, 1)), 0.0))[2] / len(starts)
    problem = GLMMProblem(scan, np.eye(2), kernel.entries, 1, False, typical)
    solution = solve_glmm(problem, np.append(beta, 1.0))
    return Estimates(solution.psi, np.sqrt(np.diag(solution.vcov)), solution.converged, solution.singular)


def through_the_library(g: np.ndarray, x: np.ndarray, y: np.ndarray, nagq: int) -> Estimates:
    """The same by `mlpipe.glmm`."""
    fit = mp.glmm(FORMULA, pl.DataFrame({"g": g, "x": x, "y": y}), family="binomial", nagq=nagq)
    rows = {row["term"]: row for row in fit.tidy().to_pylist()}
    value, error = (np.array([rows[name][kind] or math.nan for name in TRUTH]) for kind in ("estimate", "std_error"))
    return Estimates(value, error, fit.converged, fit.singular)


def dense(x: np.ndarray, y: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Maximum likelihood estimates (3,) by the trapezoidal rule with 200 nodes between -8 and 8 standard deviations."""
    u = np.linspace(-8.0, 8.0, 200)
    log_weight = np.log(u[1] - u[0]) - 0.5 * u * u - 0.5 * math.log(2.0 * math.pi)

    def negative(psi: np.ndarray) -> tuple[float, np.ndarray]:
        eta = (psi[0] + psi[1] * x)[:, None] + psi[2] * u
        each = np.add.reduceat(y[:, None] * eta - np.logaddexp(0.0, eta), starts, axis=0) + log_weight
        top = each.max(axis=1, keepdims=True)
        share = np.exp(each - top)
        total = share.sum(axis=1, keepdims=True)
        share = np.repeat(share / total, np.diff(starts, append=len(x)), axis=0)
        residual = share * (y[:, None] - 1.0 / (1.0 + np.exp(-eta)))
        by_row = residual.sum(axis=1)
        return -float((top + np.log(total)).sum()), -np.array([by_row.sum(), by_row @ x, (residual @ u).sum()])

    return np.asarray(minimize(negative, TRUE, jac=True, method="BFGS", options={"gtol": 1e-7}).x)


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"fits": 4000, "nagq": 15, "blocks": 150, "rows": 8, "checked": 50, "compared": 200}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    starts = np.arange(asked.blocks) * asked.rows
    z, fits, gaps, spent = np.empty((asked.fits, 3)), list[Estimates](), list[np.ndarray](), 0.0
    for seed in range(asked.fits):
        g, x, y = simulated(seed, asked.blocks, asked.rows)
        began = time.process_time()
        fit = solved(x, y, starts, asked.nagq)
        spent += time.process_time() - began
        z[seed] = (fit.value - TRUE) / fit.error
        fits.append(fit)
        if seed < asked.checked:
            other = through_the_library(g, x, y, asked.nagq)
            np.testing.assert_allclose((other.value - fit.value) / fit.error, 0.0, atol=1e-6)
            np.testing.assert_allclose(other.error, fit.error, rtol=1e-4)
        if seed < asked.compared:
            exact = dense(x, y, starts)
            gaps.append(np.stack([solved(x, y, starts, 1).value - exact, fit.value - exact]) / fit.error)
    for k, name in enumerate(TRUTH):
        coverage = (np.abs(z[:, k]) < Z95).mean()
        spread = math.sqrt(coverage * (1 - coverage) / len(z))
        shape = f"mean {np.nanmean(z[:, k]):+.3f}, sd {np.nanstd(z[:, k]):.3f}"
        print(f"{name:18s} coverage {coverage:.4f} ± {spread:.4f}  error in se: {shape}")
    failed, singular = sum(not fit.converged for fit in fits), sum(fit.singular for fit in fits)
    print(f"{failed} of {asked.fits} fits did not converge, {singular} were singular; {1e3 * spent / asked.fits:.1f} ms of CPU each")
    for which, name in enumerate(("Laplace", f"nagq={asked.nagq}") if gaps else ()):
        found = np.array(gaps)[:, which]
        print(f"{name} less dense quadrature, in se: mean {found.mean(axis=0).round(5)}, largest {np.abs(found).max(axis=0).round(5)}")


if __name__ == "__main__":
    main()
