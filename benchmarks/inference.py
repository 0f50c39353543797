"""What inference costs once the rows were scanned, and whether simulated statistics are as good as simulated rows.

    python benchmarks/inference.py speed DATA.parquet [--draws 1000]
    python benchmarks/inference.py distribution [--draws 2000]

`speed`: on rows of generate.py, CPU seconds of Satterthwaite's degrees of freedom for a random slope, and of the bootstrap of a random
intercept, refits included; no scan besides the fits' own. `distribution`: estimates refitted to statistics that were simulated against
estimates refitted to rows that were, by two-sample Kolmogorov-Smirnov tests per parameter (random slope, and random intercept with
blocks of few sizes, so that blocks are drawn together).
"""
from __future__ import annotations

import argparse
import time

import numpy as np
from scipy.stats import ks_2samp

import mlpipe as mp
from mlpipe.solve.blocks import BlockChunk, pseudo_blocks
from mlpipe.solve.likelihood import LMMProblem
from mlpipe.solve.lmm import solve
from mlpipe.solve.simulate import BlockSimulator

FIXED = "x1 + x2 + x3 + x4 + x5"


def speed(path: str, draws: int) -> None:
    """Prints CPU seconds."""
    for formula in (f"y ~ {FIXED} + (1 + x1 | g)", f"y ~ {FIXED} + (1 | g)"):
        began = time.process_time()
        fit = mp.lmm(formula, path, options=mp.Options(threads=1))
        print(f"{formula}: {fit.rows:,} rows, {fit.n_blocks:,} blocks, fit {time.process_time() - began:.2f} s of CPU")
        passes = fit.info["passes"]
        for ddf in ("satterthwaite", "kenward-roger"):
            began = time.process_time()
            fit.tidy(ddf=ddf)
            print(f"  {ddf}: {time.process_time() - began:.2f} s of CPU, {fit.info['passes'] - passes} more scans")
        if "x1 | g" not in formula:
            began = time.process_time()
            fit.confint(method="boot", draws=draws)
            print(f"  bootstrap, {draws} draws: {time.process_time() - began:.1f} s of CPU, {fit.info['bootstrap']['failed']} failed")


def rows(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """X (n, 2) and the starts of blocks of a small unbalanced data set."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 7, 40) if kind == "slope" else np.repeat([2, 3, 5], [20, 20, 20])
    n = int(lengths.sum())
    return np.column_stack([np.ones(n), rng.normal(size=n)]), np.concatenate([[0], np.cumsum(lengths)[:-1]])


def problem(X: np.ndarray, y: np.ndarray, starts: np.ndarray, q: int, shared: bool) -> LMMProblem:
    """Block statistics; `shared`: blocks of equal Z'Z as one."""
    W = np.column_stack([X, y])
    products = np.add.reduceat(W[:, :, None] * W[:, None, :], starts, axis=0)
    S, C = (np.ascontiguousarray(part.transpose(1, 2, 0)) for part in (products[:, :q, :q], products[:, :q]))
    chunk = BlockChunk(S, np.ones(len(starts)), C)
    if shared:
        sizes, where = np.unique(S[0, 0], return_inverse=True)
        flat = C.reshape(q * 3, -1)
        count = np.bincount(where).astype(float)
        CC = np.stack([flat[:, where == k] @ flat[:, where == k].T for k in range(len(sizes))])
        found, owner = pseudo_blocks(count, CC)
        chunk = BlockChunk(sizes[None, None], count, np.ascontiguousarray(found.T).reshape(q, 3, -1), owner)
    return LMMProblem(lambda: [chunk], W.T @ W, float(len(y)), 0.0, (q,), True)


def distribution(draws: int) -> None:
    """Prints p-values."""
    beta, sigma = np.array([1.0, 0.5]), 1.0
    for kind, lambda_ in (("slope", np.array([[0.8, 0.0], [0.1, 0.5]])), ("intercept", np.array([[0.8]]))):
        X, starts = rows(kind)
        q, rng = len(lambda_), np.random.default_rng(7)
        lengths = np.diff(starts, append=len(X))
        made = BlockSimulator(problem(X, rng.normal(size=len(X)), starts, q, kind == "intercept"), lambda_, sigma, beta)
        found: list[list[np.ndarray]] = [[], []]
        for _ in range(draws):
            b = np.repeat(sigma * rng.normal(size=(len(starts), q)) @ lambda_.T, lengths, axis=0)
            y = X @ beta + (X[:, :q] * b).sum(axis=1) + sigma * rng.normal(size=len(X))
            for out, drawn in zip(found, (made.draw(rng), problem(X, y, starts, q, False)), strict=True):
                fit = solve(drawn)
                psi = fit.sigma2 * fit.lambda_ @ fit.lambda_.T
                out.append(np.concatenate([fit.beta, np.sqrt(np.diag(psi)), [psi[-1, 0], np.sqrt(fit.sigma2)]]))
        names = ["(Intercept)", "x", *(f"sd {k}" for k in range(q)), "covariance" if q > 1 else "variance", "sigma"]
        left, right = (np.array(part) for part in found)
        tests = [ks_2samp(left[:, k], right[:, k]).pvalue for k in range(len(names))]
        print(f"{kind}, {draws} draws each:", ", ".join(f"{name} p = {p:.2f}" for name, p in zip(names, tests, strict=True)))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "distribution"])
    parser.add_argument("data", nargs="?")
    parser.add_argument("--draws", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.what == "speed":
        speed(arguments.data, arguments.draws)
    else:
        distribution(arguments.draws)


if __name__ == "__main__":
    main()
