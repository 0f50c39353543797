"""The spool: the rows of an iterative fit in the order of their blocks, in chunks of whole blocks, in memory or in a mapped file."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .arrays import arrow, column, plain_interval
from .scratch import Scratch, spilling
from .solve.family import Cells
from .solve.kernel import Chunk, Rows

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 32_768  # rows of a chunk: what is made of them stays in the processor's cache
PIECE_ROWS = 262_144  # rows of a piece of a block that is longer than that

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """What the stored `columns` are: first the features that are not constant, with their `places` among all `n_features`, then the
    response's; `n_statistics`: how many further functions of the response the family has."""

    columns: tuple[str, ...]
    places: tuple[int, ...]
    n_features: int
    n_statistics: int

    def rows(self, columns: Mapping[str, np.ndarray], starts: np.ndarray) -> Rows:
        """Rows of stored columns (n,); the features are copied side by side, the others taken as they are."""
        y = columns["y"]
        F = np.ones((self.n_features, len(y)))
        for place, name in zip(self.places, self.columns, strict=False):
            F[place] = columns[name]
        statistics = tuple(columns[f"t{k}"] if f"t{k}" in columns else np.zeros(len(y)) for k in range(self.n_statistics))
        return Rows(F, columns.get("offset"), Cells(y, columns.get("size"), columns.get("w"), statistics), starts, columns.get("time"))


@dataclass
class _Part:
    """One piece: stored columns in memory (then as `made`), or the number of its batch in the file."""

    starts: np.ndarray
    rows: int
    data: np.ndarray | None
    batch: int = -1
    made: Rows | None = None


@dataclass
class Spool:
    """Chunks of whole blocks; close it, or use it in a `with`, and its file is gone.

    Attributes: `n_rows` of cells, `n_blocks`, `constant` of the log-likelihood, `keys` one row a block (None without blocks),
    `mapped` whether the rows are in a file, `rows_read` so far.
    """

    layout: Layout
    threads: int
    directory: Scratch | None = None
    n_rows: int = 0
    n_blocks: int = 0
    constant: float = 0.0
    keys: pa.Table | None = None
    parts: list[tuple[list[_Part], int, int]] = field(default_factory=list)
    rows_read: int = 0
    _file: Any = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the file."""
        self._file, self.parts = None, []
        if self.directory is not None:
            self.directory.cleanup()

    @property
    def mapped(self) -> bool:
        """Whether the rows are in a file."""
        return self._file is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the stored columns."""
        return self.n_rows * len(self.layout.columns) * 8

    def chunk(self, i: int) -> Chunk:
        """One chunk; its arrays are views of the file where the spool is mapped."""
        pieces, first, n_blocks = self.parts[i]
        return Chunk(tuple(self._rows(part) for part in pieces), first, n_blocks)

    def _rows(self, part: _Part) -> Rows:
        if part.made is not None:
            return part.made
        batch = self._file.get_batch(part.batch)
        return self.layout.rows({name: column(batch, name) for name in self.layout.columns}, part.starts)

    def map(self, work: Callable[[Chunk], T], chosen: Sequence[int] | None = None) -> list[T]:
        """`work` over chunks (all, or those chosen), in threads, results in the chunks' order: one pass."""
        indices = range(len(self.parts)) if chosen is None else chosen

        def one(i: int) -> T:
            return work(self.chunk(i))

        if self.threads == 1 or len(indices) <= 1:
            return self._counted(indices, map(one, indices))
        with ThreadPoolExecutor(self.threads) as pool:
            return self._counted(indices, pool.map(one, indices))

    def _counted(self, indices: Sequence[int], results: Iterator[T]) -> list[T]:
        """The results, whose rows are counted as they come."""
        out = []
        for i, result in zip(indices, results, strict=True):
            self.rows_read += sum(part.rows for part in self.parts[i][0])
            out.append(result)
        return out

    @property
    def passes(self) -> float:
        """How many times all rows were read so far."""
        return self.rows_read / max(self.n_rows, 1)

    def some(self, share: float, least: int) -> list[int]:
        """Chunks evenly spread over all, about a share of them but at least `least`."""
        n = len(self.parts)
        wanted = min(n, max(least, round(n * share)))
        return sorted({round(i * (n - 1) / max(wanted - 1, 1)) for i in range(wanted)})


def build(
    batches: Iterator[pa.RecordBatch], layout: Layout, keys: Sequence[str], *, budget: int, parent: str | None, threads: int | None
) -> Spool:
    """The spool of cells that arrive in the order of their blocks; above `budget` bytes they go to a file under `parent`.

    Raises ResourceError where the disk is full.
    """
    writer = _Writer(layout, list(keys), budget, parent)
    with spilling("the spool", writer.abandon):
        for batch in batches:
            if batch.num_rows:
                writer.add(batch)
        return writer.finish(threads or os.cpu_count() or 1)


def _plain(values: pa.Array) -> np.ndarray | None:
    """Whole or real numbers as numpy sees them; None for other types, whose functions take 0.15 s to import."""
    import pyarrow as pa

    numeric = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    return np.from_dlpack(values) if numeric else None


def _differ(values: pa.Array) -> np.ndarray:
    """Where each value (n - 1,) is not the one before it."""
    import pyarrow as pa

    values = values.indices if pa.types.is_dictionary(values.type) else values
    if (plain := _plain(values)) is not None:
        return np.asarray(plain[1:] != plain[:-1])
    import pyarrow.compute as pc

    return np.from_dlpack(pc.not_equal(values[1:], values[:-1]).cast(pa.uint8())).astype(bool)


def _taken(values: pa.Array, at: np.ndarray) -> pa.Array:
    """The values at these places."""
    import pyarrow as pa

    plain = _plain(values)
    return arrow(plain[at], values.type) if plain is not None else values.take(arrow(at, pa.int64()))


class _Writer:
    """Cuts batches into chunks at block boundaries, holds them, or writes them once they exceed the budget."""

    def __init__(self, layout: Layout, keys: list[str], budget: int, parent: str | None) -> None:
        self.layout, self.keys, self.budget, self.parent = layout, keys, budget, parent
        self.spool = Spool(layout, 1)
        self.held = np.empty((len(layout.columns), 0))
        self.starts = np.zeros(0, dtype=np.intp)  # of blocks in what is held
        self.last: pa.RecordBatch | None = None
        self.key_parts: list[pa.RecordBatch] = []
        self.long: list[_Part] = []  # pieces of the block that what is held goes on with
        self.sink: Any = None
        self.written = self.stored = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Takes in one batch, ordered by the keys."""
        before = self.held.shape[1]
        held = np.empty((len(self.layout.columns), before + batch.num_rows))
        held[:, :before] = self.held
        for row, name in zip(held, self.layout.columns, strict=True):
            row[before:] = column(batch, name)
        if "constant" in batch.schema.names:
            self.spool.constant += float(column(batch, "constant").sum())
        self.starts = np.append(self.starts, self._new_blocks(batch) + before)
        self.held = held
        self._cut(CHUNK_ROWS)

    def _new_blocks(self, batch: pa.RecordBatch) -> np.ndarray:
        """Rows of the batch at which a block starts; their keys are kept."""
        if not self.keys:
            return np.zeros(1, dtype=np.intp)  # without blocks any rows are one
        import pyarrow as pa

        batch = pa.record_batch([plain_interval(batch.column(key)) for key in self.keys], names=self.keys)
        changed = np.zeros(batch.num_rows, dtype=bool)
        changed[0] = self.last is None or any(not self.last.column(k)[0].equals(batch.column(k)[0]) for k in self.keys)
        for key in self.keys:
            changed[1:] |= _differ(batch.column(key))
        self.last = batch.slice(batch.num_rows - 1)
        at = np.flatnonzero(changed)
        self.key_parts.append(pa.record_batch([_taken(batch.column(key), at) for key in self.keys], names=self.keys))
        return at

    def _cut(self, least: int) -> None:
        """Moves whole chunks out of what is held; its last block may go on in the next batch."""
        while self.held.shape[1] >= least:
            if self.long and len(self.starts) and self.starts[0] == 0:  # the long block ended with the rows before
                self._end_long()
                continue
            later = self.starts[self.starts > 0]
            if self.long or not len(later):
                if not len(later) and self.held.shape[1] < PIECE_ROWS:
                    return
                self._take_long(int(later[0]) if len(later) else PIECE_ROWS)
                if len(later):
                    self._end_long()
            else:
                k = int(np.searchsorted(later, CHUNK_ROWS, side="right"))
                self._take(int(later[max(k - 1, 0)]))

    def _take(self, stop: int) -> None:
        """The first `stop` rows, whole blocks, as one chunk."""
        n = int(np.searchsorted(self.starts, stop))
        part = self._stored(self.held[:, :stop], self.starts[:n])
        self._chunk([part], n)
        self._drop(stop)

    def _take_long(self, stop: int) -> None:
        """The first `stop` rows as a further piece of one block."""
        self.long.append(self._stored(self.held[:, :stop], np.zeros(1, dtype=np.intp)))
        self._drop(stop)

    def _end_long(self) -> None:
        self._chunk(self.long, 1)
        self.long = []

    def _drop(self, stop: int) -> None:
        self.held = self.held[:, stop:]
        self.starts = self.starts[self.starts >= stop] - stop

    def _chunk(self, parts: list[_Part], n_blocks: int) -> None:
        self.spool.parts.append((parts, self.spool.n_blocks, n_blocks))
        self.spool.n_blocks += n_blocks
        self.spool.n_rows += sum(part.rows for part in parts)

    def _stored(self, data: np.ndarray, starts: np.ndarray) -> _Part:
        part = _Part(starts.astype(np.intp), data.shape[1], np.ascontiguousarray(data))
        self.stored += part.rows
        if self.sink is None and self.stored * data.shape[0] * 8 > self.budget:
            self._open()
        if self.sink is not None:
            self._write(part)
        return part

    def _open(self) -> None:
        import pyarrow as pa

        self.spool.directory = Scratch(self.parent)
        self.schema = pa.schema([(name, pa.float64()) for name in self.layout.columns])
        self.sink = pa.ipc.new_file(str(self._path()), self.schema)
        for parts, _, _ in self.spool.parts:
            for part in parts:
                self._write(part)
        for part in self.long:
            self._write(part)

    def _write(self, part: _Part) -> None:
        import pyarrow as pa

        assert part.data is not None
        self.sink.write_batch(pa.record_batch([arrow(row) for row in part.data], schema=self.schema))
        part.data, part.batch = None, self.written
        self.written += 1

    def _path(self) -> Path:
        assert self.spool.directory is not None
        return Path(self.spool.directory.name) / "rows.arrow"

    def finish(self, threads: int) -> Spool:
        """The spool; closes and maps its file."""
        import pyarrow as pa

        if self.long and self.held.shape[1] and not (len(self.starts) and self.starts[0] == 0):
            later = self.starts[self.starts > 0]
            self._take_long(int(later[0]) if len(later) else self.held.shape[1])
        if self.long:
            self._end_long()
        if self.held.shape[1]:
            self._take(self.held.shape[1])
        if self.sink is not None:
            self.sink.close()
            self.spool._file = pa.ipc.open_file(pa.memory_map(str(self._path())))
        else:
            for part in (part for parts, _, _ in self.spool.parts for part in parts if part.data is not None):
                assert part.data is not None
                other = dict(zip(self.layout.columns, part.data, strict=True))
                features = self.layout.columns[: len(self.layout.places)]
                held = {name: values if name in features else values.copy() for name, values in other.items()}
                part.made, part.data = self.layout.rows(held, part.starts), None
        if self.keys and self.key_parts:
            self.spool.keys = pa.Table.from_batches(self.key_parts)
        self.spool.threads = threads
        return self.spool

    def abandon(self) -> None:
        """Removes what was written."""
        if self.sink is not None:
            self.sink.close()
        self.spool.close()
