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
import warnings

import numpy as np
import polars as pl
from scipy.stats import ks_2samp

import mlpipe as mp
from mlpipe.bootstrap import bootstrap
from mlpipe.intervals import random_names

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


def frame(kind: str) -> pl.DataFrame:
    """A small unbalanced data set."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 7, 40) if kind == "slope" else np.repeat([2, 3, 5], [20, 20, 20])
    g = np.repeat(np.arange(len(lengths)), lengths)
    x = rng.normal(size=len(g))
    b = rng.normal(size=(len(lengths), 2)) * [0.8, 0.5 if kind == "slope" else 0.0]
    return pl.DataFrame({"g": g, "x": x, "y": 1.0 + 0.5 * x + b[g, 0] + b[g, 1] * x + rng.normal(size=len(g))})


def distribution(draws: int) -> None:
    """Prints p-values."""
    warnings.simplefilter("ignore")
    for kind, formula in (("slope", "y ~ x + (1 + x | g)"), ("intercept", "y ~ x + (1 | g)")):
        data = frame(kind)
        fit = mp.lmm(formula, data)
        statistics = bootstrap(fit, draws)
        term, rng = fit.terms[0], np.random.default_rng(7)
        X = np.column_stack([np.ones(len(data)), data["x"].to_numpy()])
        Z, g, rows = X[:, : len(term.names)], data["g"].to_numpy(), []
        for _ in range(draws):
            b = fit.sigma * rng.normal(size=(fit.n_blocks, len(term.names))) @ term.factor.T
            y = X @ fit.beta + (Z * b[g]).sum(axis=1) + fit.sigma * rng.normal(size=len(g))
            again = mp.lmm(formula, data.with_columns(y=pl.Series(y)))
            sds = [row["sd"] for row in again.varcorr().to_pylist() if row["term2"] is None]
            rows.append([*sds[:-1], sds[-1], *again.beta])
        names = [*random_names(fit), "sigma", *fit.names]
        kept = [k for k, name in enumerate(names) if not name.startswith("cor_")]
        tests = [ks_2samp(statistics[:, k], np.array(rows)[:, i]).pvalue for i, k in enumerate(kept)]
        print(formula, f"{draws} draws each:", ", ".join(f"{names[k]} p = {p:.3f}" for k, p in zip(kept, tests, strict=True)))


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
