"""Per-block sums of a random part: held in memory, in a mapped Arrow file, or as clusters of blocks that share Z'wZ."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .arrays import column
from .scratch import Scratch

if TYPE_CHECKING:
    import pyarrow as pa

SIGNIFICANT = 10  # digits of Z'wZ that must agree for blocks to share it
BATCH = 65_536  # blocks handed on at once
ENOUGH = 4_096  # blocks that do not repeat, after which no more are tried


@dataclass
class Clusters:
    """Blocks that share Z'wZ (the second level of compression).

    Attributes, for G clusters and K sums per block: `count` (G,) blocks; `sums` (K, G) totals of the blocks' sums s;
    `products` (G, K, K) totals of s s'.
    """

    count: np.ndarray
    sums: np.ndarray
    products: np.ndarray

    def mean(self) -> np.ndarray:
        """The blocks' mean sums (K, G); for Z'wZ these are what every block of the cluster has."""
        return np.asarray(self.sums / self.count)

    @classmethod
    def of(cls, sums: np.ndarray, inverse: np.ndarray, size: int) -> Clusters:
        """The clusters of blocks `sums` (K, B) with cluster numbers `inverse` (B,) below `size`."""
        order = np.argsort(inverse, kind="stable")
        starts = np.searchsorted(inverse[order], np.arange(size + 1))
        sorted_ = np.ascontiguousarray(sums[:, order])
        count = np.diff(starts).astype(float)
        products = np.stack([sorted_[:, a:b] @ sorted_[:, a:b].T for a, b in zip(starts[:-1], starts[1:], strict=True)])
        return cls(count, np.add.reduceat(sorted_, starts[:-1], axis=1), products)

    def add(self, other: Clusters, where: np.ndarray, size: int) -> None:
        """Adds clusters `other` at positions `where`, below the new number of clusters `size`."""
        grown = size - len(self.count)
        if grown:
            k = len(self.sums)
            self.count = np.concatenate([self.count, np.zeros(grown)])
            self.sums = np.hstack([self.sums, np.zeros((k, grown))])
            self.products = np.concatenate([self.products, np.zeros((grown, k, k))])
        self.count[where] += other.count
        self.sums[:, where] += other.sums
        self.products[where] += other.products


@dataclass
class Blocks:
    """All blocks of one grouping factor.

    `names`: columns of the sums Z'wW in `table`; `table`: one row a block (keys, row_count, sums), in memory or mapped;
    `clusters`: blocks already compressed; `n_blocks`: how many blocks both hold; `directory`: where the mapped file is, if any
    (it goes with this object); `rest`: columns of what completes a block's own cross-products (collect="blocks+xx"), in the order of
    `Recipe.rest()`, then `n` and `sum_log_w` where rows have frequencies and weights.
    """

    names: list[str]
    n_blocks: int = 0
    table: pa.Table | None = None
    clusters: Clusters | None = None
    directory: Scratch | None = None
    largest: float = 0.0
    smallest: float = field(default=float("inf"))
    rest: list[str] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Columns of the keys in `table`, in the order of `Recipe.groups`."""
        held = {*self.names, *self.rest, "row_count"}
        return [name for name in self.table.column_names if name not in held] if self.table is not None else []

    def arrays(self) -> Iterator[np.ndarray]:
        """The sums (K, B) of the blocks that are not compressed, batch by batch."""
        if self.table is None:
            return
        for batch in self.table.select(self.names).to_batches(max_chunksize=BATCH):
            if batch.num_rows:
                yield stack(batch, self.names)

    def totals(self) -> np.ndarray:
        """The sums (K + rest,) over all blocks, in the order of `names`, then of `rest`."""
        out = np.zeros(len(self.names) + len(self.rest))
        if self.clusters is not None:
            out[: len(self.names)] += self.clusters.sums.sum(axis=1)
        if self.table is not None:
            wanted = [*self.names, *self.rest]
            for batch in self.table.select(wanted).to_batches(max_chunksize=BATCH):
                out += stack(batch, wanted).sum(axis=1)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, a mapped file's pages not counted."""
        held = self.table.nbytes if self.table is not None and self.directory is None else 0
        return held + (self.clusters.products.nbytes if self.clusters is not None else 0)


def with_key_names(batch: pa.RecordBatch, keys: Sequence[str]) -> pa.RecordBatch:
    """The batch with its key columns named by their place among the grouping columns: where these stand in one source is no business
    of another's whose statistics are merged."""
    own = {key: f"k{i}" for i, key in enumerate(keys)}
    return batch.rename_columns([own.get(name, name) for name in batch.schema.names])


def stack(batch: pa.RecordBatch, names: list[str]) -> np.ndarray:
    """Columns of a batch as one array (K, B)."""
    return np.stack([column(batch, name) for name in names]).astype(float, copy=False)


class Collector:
    """Takes in batches of block sums: compresses those that repeat, keeps the rest within `budget` bytes or in a file.

    `shared`: positions of the sums that make up Z'wZ. `keep_keys`: keep every block with its key (for merging, saving). `rest`: as in
    Blocks.
    """

    def __init__(
        self, names: list[str], shared: list[int], *, keep_keys: bool, budget: int, parent: str | None, rest: Sequence[str] = ()
    ) -> None:
        self.blocks = Blocks(names, rest=list(rest))
        self.shared, self.keep_keys, self.budget, self.parent = shared, keep_keys, budget, parent
        self.known: dict[bytes, int] = {}
        self.repeats = not keep_keys
        self.held: list[pa.RecordBatch] = []
        self.held_bytes = 0
        self.writer: pa.RecordBatchFileWriter | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Takes in one batch: keys, row_count and sums."""
        if not batch.num_rows:
            return
        blocks = self.blocks
        blocks.n_blocks += batch.num_rows
        rows = column(batch, "row_count")
        blocks.largest, blocks.smallest = max(blocks.largest, float(rows.max())), min(blocks.smallest, float(rows.min()))
        if self.repeats and self._compressed(stack(batch, blocks.names)):
            return
        if not self.keep_keys:
            batch = batch.select(blocks.names)
        self._hold(batch)

    def _compressed(self, sums: np.ndarray) -> bool:
        """Compresses a batch where its blocks share few enough Z'wZ for that to save memory and time."""
        keys = _rounded(sums[self.shared])
        distinct, inverse = np.unique(keys, return_inverse=True)
        if len(distinct) > len(self.known) and len(distinct) * len(sums) * 2 > self.blocks.n_blocks:
            self.repeats = sums.shape[1] < ENOUGH
            return False
        labels = [key.tobytes() for key in distinct]
        fresh = sum(label not in self.known for label in labels)
        if (len(self.known) + fresh) * len(sums) * 2 > self.blocks.n_blocks and fresh:
            self.repeats = sums.shape[1] < ENOUGH
            return False
        for label in labels:
            self.known.setdefault(label, len(self.known))
        where = np.array([self.known[label] for label in labels])
        new = Clusters.of(sums, inverse.ravel(), len(distinct))
        k = len(sums)
        if self.blocks.clusters is None:
            self.blocks.clusters = Clusters(np.zeros(0), np.zeros((k, 0)), np.zeros((0, k, k)))
        self.blocks.clusters.add(new, where, len(self.known))
        return True

    def _hold(self, batch: pa.RecordBatch) -> None:
        import pyarrow as pa

        self.held.append(batch)
        self.held_bytes += batch.nbytes
        if self.writer is None and self.held_bytes > self.budget:
            self.blocks.directory = Scratch(self.parent)
            self.writer = pa.ipc.new_file(str(self._path()), batch.schema)
        if self.writer is not None:
            for held in self.held:
                self.writer.write_batch(held)
            self.held = []

    def _path(self) -> Path:
        assert self.blocks.directory is not None
        return Path(self.blocks.directory.name) / "blocks.arrow"

    def finish(self) -> Blocks:
        """The blocks; closes and maps the file if there is one."""
        import pyarrow as pa

        if self.writer is not None:
            self.writer.close()
            self.blocks.table = pa.ipc.open_file(pa.memory_map(str(self._path()))).read_all()
        elif self.held:
            self.blocks.table = pa.Table.from_batches(self.held)
        return self.blocks


def _rounded(shared: np.ndarray) -> np.ndarray:
    """One opaque key a block from its Z'wZ (rows of `shared`), rounded to SIGNIFICANT digits of the largest entry."""
    exponent = np.ceil(np.log10(np.maximum(np.abs(shared).max(axis=0), 1e-300)))
    unit = 10.0 ** (exponent - SIGNIFICANT)
    grid = np.vstack([np.round(shared / unit), exponent]) + 0.0
    return np.ascontiguousarray(grid.T).view(f"V{grid.shape[0] * 8}").ravel()
