"""Rows of a generalized mixed model read to be kept, and kept rows made ready for a fit."""
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from . import cells
from .arrays import column
from .blocks import with_key_names
from .collect import dropped_rows
from .compressed import Compressed, held
from .engines.arrange import arranged
from .gather import WORTHWHILE, Gathered, check_finite, check_rows, compression, counts, layout_of, made, surveyed
from .options import Options
from .plans import Plan
from .progress import stage
from .sources import row_count
from .spool import build

if TYPE_CHECKING:
    import pyarrow as pa

MONTH = 30  # partitions that a store without a window is made for


def worthwhile(plan: Plan, parts: int, window: int | None) -> bool:
    """Whether rows are kept as cells: whether these will pay once the store holds as many partitions as it is for, of which the plan's
    source has `parts`."""
    ahead = max((window or MONTH) / max(parts, 1), 1.0)
    return compression(plan, math.ceil(row_count(plan.engine) * ahead)) >= WORTHWHILE


def kept(plan: Plan, *, merges: bool) -> Compressed:
    """Reads the rows of a source; `merges`: as cells of equal design row within a block, else row by row.

    Raises DataError: no usable rows, a response the family cannot give, non-finite terms, rows dropped under na="raise", a source that
    changed; ResourceError for a full disk.
    """
    seconds: dict[str, float] = {}
    engine, options, recipe = plan.engine, plan.request.options, plan.recipe
    total, found = row_count(plan.engine), _Found(columns_of_covariates=cells.covariates(recipe))
    with stage("cells", seconds, engine, options) as fields:
        table, directory = held(found.looked_at(_batches(plan, options, merges=merges)), options)
        fields |= {"cells": found.cells}
    engine.check_unchanged()
    rows, n = counts(plan, found.cells, found.size, compressed=merges) if found.cells else (0, 0.0)
    check_rows(plan, rows, total)
    dropped = dropped_rows(plan, total, rows)
    check_finite(plan, found.response, found.terms)
    info = {
        "rows_read": total, "rows_dropped": total - rows, "dropped": dropped, "passes": 1, "seconds": seconds,
        "notes": list(plan.notes), "engine": engine.dialect,
    }  # fmt: skip
    names = [name for name in table.column_names if name != "constant"]
    return Compressed(recipe, rows, n, found.constant, merges, table.select(names), info, directory)


class _Found:
    """What goes by while rows are read: `cells`, `size` of all, `constant`; whether `response` and `terms` are finite in all of them."""

    def __init__(self, columns_of_covariates: list[str]) -> None:
        self.covariates = [*columns_of_covariates, "offset", "w"]
        self.cells, self.size, self.constant, self.response, self.terms = 0, 0.0, 0.0, True, True

    def looked_at(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if not batch.num_rows and self.cells:
                continue
            self.cells += batch.num_rows
            names = batch.schema.names
            self.size += float(column(batch, "size").sum()) if "size" in names else batch.num_rows
            self.constant += float(column(batch, "constant").sum()) if "constant" in names else 0.0
            self.terms &= all(bool(np.isfinite(column(batch, name)).all()) for name in self.covariates if name in names)
            self.response &= bool(np.isfinite(column(batch, "y")).all())
            yield batch


def _batches(plan: Plan, options: Options, *, merges: bool) -> Iterator[pa.RecordBatch]:
    """The cells or rows, keys named by their place among the groups and freed of dictionaries, which differ from state to state."""
    import pyarrow as pa

    keys = [plan.names.key(group).name for group in plan.recipe.groups]
    for batch in made(plan, cells.unordered(plan.recipe, keys, compressed=merges), options):
        batch = with_key_names(batch, keys)
        for i, name in enumerate(batch.schema.names):
            if pa.types.is_dictionary(batch.schema.field(i).type):
                batch = batch.set_column(i, name, batch.column(i).dictionary_decode())
        yield batch


def spooled(state: Compressed, options: Options) -> Gathered:
    """The rows or cells in the order of their blocks, in a spool; what is noted of them joins their `info`. Raises DataError where they
    cannot be fitted."""
    recipe, keys, info = state.recipe, state.keys, state.info
    with stage("spool", info["seconds"], None, options) as fields:
        batches = arranged(state.table, cells.ordered(recipe, keys, compressed=state.merges), options)
        layout, parent = layout_of(recipe, merges=state.merges), options.temp_directory
        spool = build(batches, layout, keys, budget=options.memory_bytes // 4, parent=parent, threads=options.threads)
        fields |= {"cells": spool.n_rows, "blocks": spool.n_blocks}
    spool.constant = state.constant
    info |= {
        "blocks": spool.n_blocks, "cells": spool.n_rows, "path": "spool", "spool": {"bytes": spool.nbytes, "mapped": spool.mapped},
        "notes": [*info.get("notes", []), _said(state, spool.n_rows)],
    }  # fmt: skip
    return surveyed(recipe, spool, state.rows, state.n, info)


def _said(state: Compressed, held_rows: int) -> str:
    """How the rows are kept, and what that takes."""
    size = f"{state.nbytes / 1e6:,.1f} MB"
    if not state.merges:
        return f"the store keeps all {state.rows:,} rows, {size}: their covariates hardly repeat within a block"
    return f"{state.rows:,} rows are kept as {held_rows:,} cells of equal design row within a block, {size}"
