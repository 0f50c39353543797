"""The cells of two grouping factors: the pairs of levels that occur together, and sums for each, in memory or in a mapped file."""
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import ResourceError

CHUNK = 1 << 20  # cells that are worked on at once
LEAST_ROOM = 1 << 12  # pairs that an adder holds before it adds up, however small its budget


@dataclass
class Pairs:
    """The cells in the order of the first factor's levels, then of the second's.

    Attributes:
        starts: (m + 1,) where the cells of each level of the first factor begin.
        columns: (c,) the level of the second factor, int32.
        products: (K, c) sums per cell; counts of rows, where nothing else is summed, in the smallest type that holds them.
        width: the number of levels of the second factor.
        directory: where the mapped file is, if any; it goes with this object.
    """

    starts: np.ndarray
    columns: np.ndarray
    products: np.ndarray
    width: int
    directory: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def rows(self) -> np.ndarray:
        """The level (c,) of the first factor, int32."""
        return np.repeat(np.arange(len(self.starts) - 1, dtype=np.int32), np.diff(self.starts))

    @property
    def nbytes(self) -> int:
        """Bytes of memory held; a mapped file's pages are not counted."""
        return self.starts.nbytes + (0 if self.directory is not None else self.columns.nbytes + self.products.nbytes)

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rows, columns and products (K, n), CHUNK cells at a time."""
        for first in range(0, len(self), CHUNK):
            last = min(first + CHUNK, len(self))
            rows = np.searchsorted(self.starts, np.arange(first, last), side="right") - 1
            yield rows, np.asarray(self.columns[first:last]), np.asarray(self.products[:, first:last])

    def turned(self) -> Pairs:
        """The same with the factors in the other order."""
        from scipy.sparse import csr_matrix

        shape = (len(self.starts) - 1, self.width)
        turned = csr_matrix((np.arange(len(self)), self.columns, self.starts), shape=shape).tocsc()
        return Pairs(turned.indptr, turned.indices.astype(np.int32, copy=False), self.products[:, turned.data], shape[0])

    def only(self, rows: np.ndarray, columns: np.ndarray) -> Pairs:
        """The same over the kept levels (their old places, ascending) of either factor; the others have no cells."""
        place = np.zeros(self.width, dtype=np.int32)
        place[columns] = np.arange(len(columns), dtype=np.int32)
        starts = np.append(self.starts[:-1][rows], self.starts[-1])
        return Pairs(starts, place[self.columns], self.products, len(columns), self.directory)


class PairAdder:
    """Adds up pairs of codes, with values or just counted, into `Pairs`.

    `shape`: levels of both factors; `products`: values a pair; `most`: how many pairs will come, at most; `weighted`: whether values come
    with them; `whole`: whether all values are counts. What exceeds `budget` bytes goes to files below `parent` as sorted runs, merged at
    the end. The same pairs in the same order give the same sums, bit by bit.
    """

    def __init__(
        self, shape: tuple[int, int], products: int, most: int, *, weighted: bool, whole: bool, budget: int, parent: str | None
    ) -> None:
        self.shape, self.products, self.whole, self.parent = shape, products, whole, parent
        width = 8 * (1 + products * weighted)
        self.room = max(min(most, budget // 2 // width), min(LEAST_ROOM, max(most, 1)))
        self.limit = budget // 2
        self.keys = np.empty(self.room, dtype=np.int64)
        self.values = np.empty((products, self.room)) if weighted else None
        self.filled = 0
        self.held: tuple[np.ndarray, np.ndarray] | None = None
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []
        self.directory: tempfile.TemporaryDirectory[str] | None = None

    def add(self, left: np.ndarray, right: np.ndarray, values: np.ndarray | None = None) -> None:
        """Takes in pairs of codes (n,) with their values (products, n)."""
        done = 0
        while done < len(left):
            n = min(len(left) - done, self.room - self.filled)
            part, into = slice(done, done + n), slice(self.filled, self.filled + n)
            keys = self.keys[into]
            np.multiply(left[part], self.shape[1], out=keys, dtype=np.int64)
            keys += right[part]
            if self.values is not None and values is not None:
                self.values[:, into] = values[:, part]
            self.filled, done = self.filled + n, done + n
            if self.filled == self.room and done < len(left):
                self._settle()

    def finish(self) -> Pairs:
        """The cells; the adder is empty then."""
        self._settle(last=True)
        if self.runs:
            return self._merged()
        assert self.held is not None
        keys, sums = self.held
        self.held = None
        starts = np.searchsorted(keys, np.arange(self.shape[0] + 1, dtype=np.int64) * self.shape[1])
        columns = np.empty(len(keys), dtype=np.int32)
        for first in range(0, len(keys), CHUNK):
            part = slice(first, first + CHUNK)
            columns[part] = keys[part] % self.shape[1]
        return Pairs(starts, columns, sums.astype(_narrow(sums), copy=False) if self.whole else sums, self.shape[1])

    def _settle(self, *, last: bool = False) -> None:
        """Adds up what has come since, and puts it to what is held."""
        values = None if self.values is None else self.values[:, : self.filled]
        new = _summed(self.keys[: self.filled], values, self.products)
        self.filled = 0
        if last:
            self.keys, self.values = np.empty(0, dtype=np.int64), None
        else:  # what was counted is still in the buffer
            new = new[0].copy(), new[1]
        if self.held is not None:
            both = np.concatenate([self.held[0], new[0]]), np.concatenate([self.held[1], new[1]], axis=1)
            self.held = None
            new = _reduced(*both, np.argsort(both[0], kind="stable"))
        self.held = new
        if new[0].nbytes + new[1].nbytes > self.limit or (last and self.runs):
            self._spill()

    def _spill(self) -> None:
        assert self.held is not None
        self.directory = self.directory or tempfile.TemporaryDirectory(prefix="mlpipe-", dir=self.parent)
        number = len(self.runs)
        keys, sums = (_mapped(self._path(f"{name}{number}"), array) for name, array in (("keys", self.held[0]), ("sums", self.held[1].T)))
        self.runs.append((keys, sums))
        self.held = None

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return Path(self.directory.name) / name

    def _merged(self) -> Pairs:
        """The sorted runs merged range by range of their keys, written to the files that are mapped."""
        starts = np.zeros(self.shape[0] + 1, dtype=np.int64)
        kind = np.int64 if self.whole else np.float64
        try:
            with self._path("columns").open("wb") as columns_file, self._path("products").open("wb") as products_file:
                for keys, sums in self._ranges():
                    rows = keys // self.shape[1]
                    starts[1:] += np.bincount(rows, minlength=self.shape[0])
                    (keys - rows * self.shape[1]).astype(np.int32).tofile(columns_file)
                    np.ascontiguousarray(sums.T.astype(kind, copy=False)).tofile(products_file)
        except OSError as error:
            raise _full(error) from error
        starts = np.cumsum(starts)
        for number in range(len(self.runs)):
            for name in ("keys", "sums"):
                self._path(f"{name}{number}").unlink()
        self.runs = []
        columns = np.memmap(self._path("columns"), dtype=np.int32, mode="r")
        products = np.memmap(self._path("products"), dtype=kind, mode="r").reshape(-1, self.products).T
        return Pairs(starts, columns, products, self.shape[1], self.directory)

    def _ranges(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Disjoint ranges of keys in order, each small, with the sums over all runs."""
        total = sum(len(keys) for keys, _ in self.runs)
        step = max(self.room // 2, 1)
        samples = np.sort(np.concatenate([keys[:: max(step // 8, 1)] for keys, _ in self.runs]))
        every = max(len(samples) * step // max(total, 1), 1)
        bounds = [*np.unique(samples[every::every]).tolist(), np.iinfo(np.int64).max]
        at = [0] * len(self.runs)
        for bound in bounds:
            ends = [int(np.searchsorted(keys, bound)) for keys, _ in self.runs]
            keys = np.concatenate([run[0][a:b] for run, a, b in zip(self.runs, at, ends, strict=True)])
            if len(keys):
                sums = np.concatenate([run[1][a:b] for run, a, b in zip(self.runs, at, ends, strict=True)]).T
                yield _reduced(keys, sums, np.argsort(keys, kind="stable"))
            at = ends


def _summed(keys: np.ndarray, values: np.ndarray | None, products: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct keys in order and the sums (products, c) of their values, or how often they come; `keys` may be overwritten."""
    if values is not None:
        return _reduced(keys, values, np.argsort(keys, kind="stable"))
    keys.sort()
    counts, filled, before = np.empty(len(keys), dtype=np.int32), 0, 0
    for first in range(0, len(keys), CHUNK):  # in place, as there may be no room for another copy
        part = keys[first : first + CHUNK]
        new = np.flatnonzero(np.concatenate([[first == 0 or part[0] != keys[filled - 1]], part[1:] != part[:-1]]))
        if filled:
            counts[filled - 1] = before + (new[0] if len(new) else len(part))
        kept = part[new]
        counts[filled : filled + len(new)] = np.diff(np.append(new, len(part)))
        keys[filled : filled + len(new)] = kept
        filled += len(new)
        before = int(counts[filled - 1])
    return keys[:filled], np.broadcast_to(counts[:filled], (products, filled))


def _reduced(keys: np.ndarray, values: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones of keys that `order` sorts, and the sums of their values."""
    keys = keys[order]
    first = np.flatnonzero(np.concatenate([np.ones(min(len(keys), 1), dtype=bool), keys[1:] != keys[:-1]]))
    values = values[:, order]
    if len(first) == len(keys):
        return keys, values
    return keys[first], np.add.reduceat(values, first, axis=1)


def _narrow(counts: np.ndarray) -> np.dtype[np.unsignedinteger]:
    return np.min_scalar_type(int(counts.max(initial=0)))


def _mapped(path: Path, array: np.ndarray) -> np.ndarray:
    """The array (n, …) written to a file and mapped."""
    try:
        np.ascontiguousarray(array).tofile(path)
    except OSError as error:
        raise _full(error) from error
    return np.memmap(path, dtype=array.dtype, mode="r", shape=array.shape)


def _full(error: OSError) -> ResourceError:
    return ResourceError(
        f"the cells of the grouping factors cannot be written: {error.strerror}", code="disk", hint="free space, or set temp_directory"
    )
