"""Z_k'wZ_l of all pairs of crossed factors as sparse matrices to multiply by: in double and single precision, either way, in threads."""
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import scipy.sparse as sp

from .crossed import Cells, CrossedProblem, Factor, by_effects, csr

Array: TypeAlias = np.ndarray  # of doubles or of singles


@dataclass(frozen=True)
class Cross:
    """One matrix, a run of rows for each thread: sums do not depend on their number."""

    parts: tuple[sp.csr_matrix, ...]

    @classmethod
    def of(cls, whole: sp.csr_matrix, threads: int) -> Cross:
        """The matrix cut where its entries are even."""
        cuts = np.searchsorted(whole.indptr, np.linspace(0, whole.nnz, threads + 1)[1:-1])
        ends = [0, *cuts.tolist(), whole.shape[0]]
        return cls(tuple(_rows(whole, a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)))

    def single(self) -> Cross:
        """The same in single precision; the places of the entries are shared."""
        return Cross(tuple(_with(part, part.data.astype(np.float32)) for part in self.parts))


class Crosses:
    """What no Λ changes: `forward` Z_k'wZ_l (k < l) and `backward`, its transpose, over single effects; `values` (q_k, q_l, c) of the
    blocks of each pair in the order of `patterns`, which are over levels."""

    def __init__(self, problem: CrossedProblem, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self.patterns: dict[tuple[int, int], sp.csr_matrix] = {}
        self.values: dict[tuple[int, int], Array] = {}
        self.forward: dict[tuple[int, int], Cross] = {}
        self.backward: dict[tuple[int, int], Cross] = {}
        for (k, h), cells in problem.cells.items():
            pattern, places = cells.pattern((problem.factors[k].levels, problem.factors[h].levels))
            whole = by_effects(pattern, places, cells.values)
            self.patterns[k, h], self.values[k, h] = pattern, cells.values[:, :, places]
            self.forward[k, h] = Cross.of(whole, threads)
            self.backward[k, h] = Cross.of(sp.csr_matrix(whole.T), threads)

    def single(self) -> Crosses:
        """The same in single precision."""
        out = object.__new__(Crosses)
        out.pool, out.patterns, out.values = self.pool, self.patterns, self.values
        out.forward = {pair: cross.single() for pair, cross in self.forward.items()}
        out.backward = {pair: cross.single() for pair, cross in self.backward.items()}
        return out

    def times(self, k: int, h: int, x: Array) -> Array:
        """Z_k'wZ_h x for x over factor h's effects."""
        cross = self.forward[k, h] if k < h else self.backward[h, k]
        if self.pool is None:
            return np.asarray(cross.parts[0] @ x)
        return np.concatenate(list(self.pool.map(lambda part: part @ x, cross.parts)))

    def squares(self, pair: tuple[int, int], M: Array, *, by_row: bool) -> Array:
        """Σ of z M z' (by rows, M (q_h, q_h, m_h)) or z'M z (by columns, M (q_k, q_k, m_k)) over a level's blocks z, per level."""
        values, pattern = self.values[pair], self.patterns[pair]
        z = values if by_row else values.transpose(1, 0, 2)
        size, inner = z.shape[0], z.shape[1]
        out = np.zeros((size, size, pattern.shape[0 if by_row else 1]))
        for a in range(size):
            for b in range(a + 1):
                for i in range(inner):
                    for j in range(inner):
                        both = _with(pattern, z[a, i] * z[b, j])
                        out[a, b] += (both if by_row else both.T) @ M[i, j]
                out[b, a] = out[a, b]
        return out


def by_size(problem: CrossedProblem) -> tuple[CrossedProblem, list[np.ndarray]]:
    """The problem with the levels of every factor in falling order of what they tell, and that order: products by sparse matrices then
    mostly meet the same few rows of their other side, which stay in the processor's cache."""
    orders = [np.argsort(-np.einsum("aam->m", f.S), kind="stable") for f in problem.factors]
    ranks = [np.argsort(order).astype(np.int32) for order in orders]
    factors = tuple(Factor(f.S[:, :, order], f.C[:, :, order]) for f, order in zip(problem.factors, orders, strict=True))
    cells = {(k, h): Cells(ranks[k][c.rows], ranks[h][c.columns], c.values) for (k, h), c in problem.cells.items()}
    return CrossedProblem(factors, cells, problem.WW, problem.n, problem.sum_log_w, problem.reml, problem.terms), orders


def over_effects(orders: Sequence[np.ndarray], widths: Sequence[int]) -> np.ndarray:
    """The places of reordered single effects among the original ones."""
    parts, at = [], 0
    for order, q in zip(orders, widths, strict=True):
        parts.append((at + order[:, None] * q + np.arange(q)).ravel())
        at += q * len(order)
    return np.concatenate(parts)


def _with(pattern: sp.csr_matrix, data: Array) -> sp.csr_matrix:
    """A matrix of the pattern with other entries."""
    return csr(data, pattern.indices, pattern.indptr, pattern.shape)


def _rows(whole: sp.csr_matrix, first: int, last: int) -> sp.csr_matrix:
    """Rows [first, last), sharing their entries."""
    a, b = whole.indptr[first], whole.indptr[last]
    indptr = whole.indptr[first : last + 1] - a
    return csr(whole.data[a:b], whole.indices[a:b], indptr, (last - first, whole.shape[1]))
