"""Ratings of items by users, two crossed random intercepts, activity and popularity heavy-tailed: deterministic for a seed.

    python benchmarks/generate_crossed.py --rows 10000000 --users 100000 --items 20000 --out data.parquet [--seed 0] [--binary] [--ratings]

Columns user, item, x1, x2, y = 3.5 + 0.3 x1 - 0.2 x2 + u + v + e with sd(u) = 0.45, sd(v) = 0.5, sd(e) = 0.85; `--binary`: y Bernoulli with
logit -0.5 + 0.3 x1 - 0.2 x2 + u + v. Items are drawn with probability 1 / rank^0.9 (Zipf-like), users by a lognormal activity.
`--ratings`: as ratings of films are, items by a lognormal popularity with sigma 2.8, at most 0.33 % of the rows each; of 84,000 items
thousands then occur once in 32 million rows.
"""
from __future__ import annotations

import argparse

import numpy as np
import polars as pl
import pyarrow.parquet as pq

PART = 2_000_000


def main() -> None:
    """Reads the command line and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--users", type=int, required=True)
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--binary", action="store_true")
    parser.add_argument("--ratings", action="store_true")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    activity = np.cumsum(rng.lognormal(0.0, 1.2, arguments.users))
    zipf = 1.0 / np.arange(1, arguments.items + 1) ** 0.9
    popularity = np.cumsum(rated(rng, arguments.items) if arguments.ratings else rng.permutation(zipf))
    u, v = 0.45 * rng.standard_normal(arguments.users), 0.5 * rng.standard_normal(arguments.items)
    writer = None
    for first in range(0, arguments.rows, PART):
        n = min(PART, arguments.rows - first)
        user = np.searchsorted(activity, rng.random(n) * activity[-1])
        item = np.searchsorted(popularity, rng.random(n) * popularity[-1])
        x1, x2 = rng.standard_normal(n), rng.random(n)
        mean = 0.3 * x1 - 0.2 * x2 + u[user] + v[item]
        if arguments.binary:
            y = (rng.random(n) < 1 / (1 + np.exp(0.5 - mean))).astype(np.int64)
        else:
            y = 3.5 + mean + 0.85 * rng.standard_normal(n)
        table = pl.DataFrame({"user": user, "item": item, "x1": x1, "x2": x2, "y": y}).to_arrow()
        writer = writer or pq.ParquetWriter(arguments.out, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def rated(rng: np.random.Generator, items: int) -> np.ndarray:
    """Popularity of films."""
    weights = rng.lognormal(0.0, 2.8, items)
    for _ in range(50):  # the cap is a share of the sum, which falls with it
        weights = np.minimum(weights, 0.0033 * weights.sum())
    return weights


if __name__ == "__main__":
    main()
