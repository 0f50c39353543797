"""How often 95 % intervals hold the truth in small simulated linear mixed models: Satterthwaite, Kenward-Roger and profile.

    python benchmarks/coverage.py [--fits 4000] [--blocks 40]

y = 1 + 0.5 x + b0 + b1 x + e, blocks of 3 to 8 rows, Var(b0) = 1, Var(b1) = 0.5, correlation 0.3, Var(e) = 1; seeds 0, 1, 2, …. The
solver is driven from block statistics, without data. Prints coverage with its Monte Carlo error; a fit that fails counts as a miss.
"""
from __future__ import annotations

import argparse
import math
import time

import numpy as np

from mlpipe.errors import MlpipeError
from mlpipe.inference import t_quantile
from mlpipe.pins import Parametrisation
from mlpipe.reduction import Random
from mlpipe.solve import degrees
from mlpipe.solve.blocks import BlockChunk
from mlpipe.solve.likelihood import LMMProblem
from mlpipe.solve.lmm import information, solve
from mlpipe.solve.profile import Profile
from mlpipe.solve.refit import refit
from mlpipe.solve.surfaces import BlockSurface

BETA = np.array([1.0, 0.5])
FACTOR = np.linalg.cholesky(np.array([[1.0, 0.3 * math.sqrt(0.5)], [0.3 * math.sqrt(0.5), 0.5]]))
METHODS = ("satterthwaite", "kenward-roger", "profile")
Z = 1.959963984540054


def problem(seed: int, blocks: int) -> LMMProblem:
    """The statistics of one data set."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 9, blocks)
    block = np.repeat(np.arange(blocks), lengths)
    X = np.column_stack([np.ones(len(block)), rng.normal(size=len(block))])
    b = rng.normal(size=(blocks, 2)) @ FACTOR.T
    W = np.column_stack([X, X @ BETA + (X * b[block]).sum(axis=1) + rng.normal(size=len(block))])
    products = np.add.reduceat(W[:, :, None] * W[:, None, :], np.concatenate([[0], np.cumsum(lengths)[:-1]]), axis=0)
    S, C = (np.ascontiguousarray(part.transpose(1, 2, 0)) for part in (products[:, :2, :2], products[:, :2]))
    chunks = [BlockChunk(S, np.ones(blocks), C)]
    return LMMProblem(lambda: chunks, W.T @ W, float(len(block)), 0.0, (2,), True)


def limits(seed: int, blocks: int) -> dict[str, np.ndarray]:
    """(2, 2) limits of both coefficients by each method."""
    model = problem(seed, blocks)
    found = solve(model)
    at = degrees.of_blocks(model, found.lambda_, found.sigma2, second=True)
    L = np.eye(2)
    nu = degrees.satterthwaite(at, found.lambda_, model.free(), information(model, found).vcov, L)
    adjusted = degrees.kenward_roger(at, model.free())
    out = {}
    for name, V, df in (
        ("satterthwaite", found.vcov, nu), ("kenward-roger", adjusted.adjusted, [adjusted.test(row[None])[0] for row in L]),
    ):  # fmt: skip
        half = np.array([t_quantile(0.95, d) for d in df]) * np.sqrt(np.diag(V))
        out[name] = np.column_stack([found.beta - half, found.beta + half])
    surface = BlockSurface(model)
    best = refit(surface.problem, found.theta)
    assert isinstance(best.lambda_, np.ndarray)
    random = (Random("g", ("a", "b"), np.eye(2), np.eye(2)),)
    log_sigma = np.array([math.log(best.s2) / 2])
    how = Parametrisation(surface, random, best.lambda_, log_sigma, np.array([math.sqrt(0.5 / model.n)]), relative=True)
    curvature, profiled = how.curvature(), []
    for c in L:
        pin = how.whole(c, float(c @ best.beta), math.sqrt(float(c @ best.vcov @ c)))
        profile = Profile(surface, pin, curvature, best.value)
        profiled.append([profile.limit(Z, upper=False), profile.limit(Z, upper=True)])
    return out | {"profile": np.array(profiled)}


def main() -> None:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=4000)
    parser.add_argument("--blocks", type=int, default=40)
    arguments = parser.parse_args()
    inside = {method: np.zeros((arguments.fits, 2), dtype=bool) for method in METHODS}
    failed, began = 0, time.process_time()
    for seed in range(arguments.fits):
        try:
            found = limits(seed, arguments.blocks)
        except MlpipeError:
            failed += 1
            continue
        for method, ends in found.items():
            inside[method][seed] = (ends[:, 0] <= BETA) & (BETA <= ends[:, 1])
    for method, hits in inside.items():
        error = math.sqrt(0.95 * 0.05 / arguments.fits)
        print(f"{method:14s} (Intercept) {hits[:, 0].mean():.4f}  x {hits[:, 1].mean():.4f}  (Monte Carlo error {error:.4f})")
    print(f"{failed} of {arguments.fits} failed; {time.process_time() - began:.0f} s of CPU")


if __name__ == "__main__":
    main()
