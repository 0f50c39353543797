"""Daily partitions of a random-intercept model, for tests of incremental fits and of jobs that are stopped."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mlpipe import job as jobs

BLOCKS = 40
Run = Callable[..., Any]


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


def runner(folder: Path, model: dict[str, Any]) -> Run:
    """Runs a job of a model over `lake/*.parquet` in a folder, with a store there; keywords are sections, merged into it."""

    def run(*, rebase: bool = False, **sections: dict[str, Any]) -> Any:
        record: dict[str, dict[str, Any]] = {
            "source": {"path": f"{folder}/lake/*.parquet"}, "model": model, "store": {"path": f"{folder}/store"},
        }  # fmt: skip
        for name, values in sections.items():
            record[name] = values if name == "source" else {**record.get(name, {}), **values}
        path = folder / "job.toml"
        keys = {name: "".join(f"{key} = {json.dumps(value)}\n" for key, value in one.items()) for name, one in record.items()}
        path.write_text("".join(f"[{name}]\n{text}" for name, text in keys.items()))
        read = jobs.read_job(path)
        fit = jobs.fit_job(read, {"threads": 1}, rebase=rebase)
        jobs.check_policy(fit, read.policy)
        return fit

    return run
