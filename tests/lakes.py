"""Daily partitions of a random-intercept model, for tests of incremental fits and of jobs that are stopped."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

BLOCKS = 40


def day(number: int, rows: int = 400) -> pl.DataFrame:
    """The rows of one day; the factor `f` has its level "d" from the fifth day on."""
    rng = np.random.default_rng(number)
    g = rng.integers(0, BLOCKS, rows)
    effects = np.random.default_rng(0).normal(size=BLOCKS)
    x = rng.normal(2000 + number / 10, 2, rows)
    f = rng.choice(["a", "b", "c"] if number < 5 else ["a", "b", "c", "d"], rows)
    y = 1 + 0.3 * (x - 2000) + effects[g] + rng.normal(size=rows) + 0.5 * (f == "b") - (f == "d")
    return pl.DataFrame({"g": g, "x": x, "f": f, "y": y}).with_columns(day=pl.lit(f"2026-01-{number:02d}"))


def lake(folder: Path, first: int, last: int, rows: int = 400) -> Path:
    """Files `d01.parquet` … of these days in a folder; the folder."""
    folder.mkdir(exist_ok=True)
    for number in range(first, last + 1):
        day(number, rows).write_parquet(folder / f"d{number:02d}.parquet")
    return folder
