"""Sums over several grouping factors that outlive their rows: per level of each factor, and per cell of each pair of factors.

They add up like those of one factor: levels are told by their keys, never by their numbers.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from .arrays import arrow, column
from .errors import DataError
from .levels import Levels, union
from .pairs import PairAdder, Pairs

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class FactorSums:
    """One factor: its levels, the rows of each (m,), and the sums (K, m) of `Recipe.pairs()` per level."""

    levels: Levels
    rows: np.ndarray
    sums: np.ndarray


@dataclass
class Crossed:
    """Several factors: sums per level, and per pair of factors (k, h) the cells with the sums of products of random features; `pairs`
    names these, and `cells` has each pair of factors once, in either order."""

    factors: list[FactorSums]
    pairs: list[tuple[int, int]]
    cells: dict[tuple[int, int], Pairs]

    @property
    def nbytes(self) -> int:
        """Bytes of memory held; a mapped file's pages are not counted."""
        return sum(f.sums.nbytes + f.rows.nbytes for f in self.factors) + sum(cells.nbytes for cells in self.cells.values())

    def between(self, k: int, h: int) -> Pairs:
        """The cells by levels of factor k, then of h."""
        return self.cells[k, h] if (k, h) in self.cells else self.cells[h, k].turned()


def products_of(z: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs of random features whose products are summed in each cell."""
    return [(a, b) for i, a in enumerate(z) for b in z[i:]]


def oriented(levels: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs of factors, that with more levels first."""
    return [(k, h) if levels[k] >= levels[h] else (h, k) for k, h in combinations(range(len(levels)), 2)]


def transformed(crossed: Crossed, sums: np.ndarray, left: np.ndarray, z: Sequence[int]) -> Crossed:
    """The same over other features: `sums` maps those per level, `left` (old z, new z) the random features, whose new places are `z`."""
    factors = [FactorSums(f.levels, f.rows, np.asarray(sums @ f.sums)) for f in crossed.factors]
    if left.shape[0] == left.shape[1] and np.array_equal(left, np.eye(len(left))):
        return Crossed(factors, products_of(z), crossed.cells)
    old = products_of(range(left.shape[0]))
    V = np.array([[left[i, a] * left[j, b] + (left[j, a] * left[i, b] if i != j else 0.0) for i, j in old]
                  for a, b in products_of(range(left.shape[1]))])  # fmt: skip
    cells = {pair: replace(held, products=V @ held.products, directory=None) for pair, held in crossed.cells.items()}
    return Crossed(factors, products_of(z), cells)


def merged(a: Crossed, b: Crossed, *, budget: int, parent: str | None) -> Crossed:
    """The sums of both, over the same features. Cells above `budget` bytes go to files below `parent`.

    Raises DataError where the keys are of types that cannot be compared.
    """
    factors, places = [], []
    for left, right in zip(a.factors, b.factors, strict=True):
        levels, *place = union(left.levels, right.levels)
        rows, sums = np.zeros(len(levels)), np.zeros((len(left.sums), len(levels)))
        for f, at in zip((left, right), place, strict=True):
            rows[at] += f.rows
            sums[:, at] += f.sums
        factors.append(FactorSums(levels, rows, sums))
        places.append(place)
    sizes = [len(f.levels) for f in factors]
    share = budget // max(len(sizes) * (len(sizes) - 1) // 2, 1)
    cells = {(k, h): _added((a, b), (k, h), places, (sizes[k], sizes[h]), share, parent) for k, h in oriented(sizes)}
    return Crossed(factors, a.pairs, cells)


def _added(
    both: tuple[Crossed, Crossed], pair: tuple[int, int], places: list[list[np.ndarray]], shape: tuple[int, int], budget: int,
    parent: str | None,
) -> Pairs:  # fmt: skip
    k, h = pair
    held = [crossed.cells[pair] if pair in crossed.cells else crossed.cells[h, k] for crossed in both]
    whole = all(cells.products.dtype.kind != "f" for cells in held)
    adder = PairAdder(shape, len(both[0].pairs), sum(map(len, held)), weighted=True, whole=whole, budget=budget, parent=parent)
    for number, (crossed, cells) in enumerate(zip(both, held, strict=True)):
        for rows, columns, products in cells.pieces():
            left, right = (rows, columns) if pair in crossed.cells else (columns, rows)
            adder.add(places[k][number][left], places[h][number][right], products)
    return adder.finish()


# -- as one row of an Arrow table ---------------------------------------------------------------------------------------


def to_arrow(crossed: Crossed) -> pa.Table:
    """One row whose columns are lists: keys, rows and sums of each factor, starts, columns and products of the cells of each pair."""
    import pyarrow as pa

    names, lists = [], []

    def add(name: str, values: pa.Array) -> None:
        names.append(name)
        lists.append(pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values))

    for k, factor in enumerate(crossed.factors):
        for i, keys in enumerate(factor.levels.keys.columns):
            add(f"keys_{k}_{i}", keys.combine_chunks())
        add(f"rows_{k}", arrow(factor.rows))
        add(f"sums_{k}", arrow(factor.sums.ravel()))
    for (k, h), cells in crossed.cells.items():
        add(f"starts_{k}_{h}", arrow(cells.starts.astype(np.int64, copy=False), pa.int64()))
        add(f"columns_{k}_{h}", arrow(np.asarray(cells.columns), pa.int32()))
        products = np.asarray(cells.products).ravel()
        add(f"products_{k}_{h}", arrow(products, pa.from_numpy_dtype(products.dtype)))
    return pa.table(lists, names=names)


def from_arrow(table: pa.Table, columns: Sequence[tuple[str, ...]], z: Sequence[int]) -> Crossed:
    """What `to_arrow` wrote, over the same memory; `columns`: the key columns of each factor."""
    import pyarrow as pa

    values = {name: table.column(name).chunk(0).values for name in table.column_names}

    def numbers(name: str) -> np.ndarray:
        return column(pa.table([values[name]], names=[name]), name)

    factors = []
    for k, groups in enumerate(columns):
        keys = pa.table({name: values[f"keys_{k}_{i}"] for i, name in enumerate(groups)})
        rows = numbers(f"rows_{k}")
        factors.append(FactorSums(Levels(":".join(groups), groups, keys), rows, numbers(f"sums_{k}").reshape(-1, len(rows))))
    cells = {}
    for k, h in ((int(k), int(h)) for _, k, h in (name.split("_") for name in values if name.startswith("columns_"))):
        held = numbers(f"columns_{k}_{h}")
        products = numbers(f"products_{k}_{h}").reshape(-1, len(held))
        cells[k, h] = Pairs(numbers(f"starts_{k}_{h}"), held, products, len(factors[h].levels))
    if not factors or len(cells) != len(factors) * (len(factors) - 1) // 2:
        raise DataError("the statistics lack a factor's sums or cells", code="not_statistics")
    return Crossed(factors, products_of(z), cells)
