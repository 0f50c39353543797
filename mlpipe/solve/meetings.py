"""Pairs of levels that occur together, and the inverse of M = Λ'Z'WZΛ + I on them: all that leverages need (FORMULAS R8).

An element of M⁻¹ between levels that never meet is never multiplied by anything, so no other is computed.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from . import small
from .elimination import Dense, Eliminated
from .link import Array

GATHERED = 4_000_000  # elements of the dense rest's inverse that are copied out at once


@dataclass(frozen=True)
class Pattern:
    """The cells of two factors: levels `rows` and `columns` (c,), sorted by row, then column; `shape` (q_k, q_h), `levels` (m_k, m_h)."""

    rows: np.ndarray
    columns: np.ndarray
    shape: tuple[int, int]
    levels: tuple[int, int]

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Row starts and columns over single effects, and where each value stands in (q_k, q_h, c) (None: as it is)."""
        (qk, qh), n = self.shape, self.levels[0] * self.shape[0]
        i = (self.rows[None, None] * qk + np.arange(qk)[:, None, None] + np.zeros((1, qh, 1), dtype=np.intp)).ravel()
        j = (self.columns[None, None] * qh + np.arange(qh)[None, :, None] + np.zeros((qk, 1, 1), dtype=np.intp)).ravel()
        order = np.lexsort((j, i)) if qk * qh > 1 else None
        starts = np.concatenate([[0], np.cumsum(np.bincount(i, minlength=n))])
        return starts, j if order is None else j[order], order

    @cached_property
    def over_levels(self) -> sp.csr_matrix:
        """Ones where levels meet."""
        starts = np.concatenate([[0], np.cumsum(np.bincount(self.rows, minlength=self.levels[0]))])
        return sp.csr_matrix((np.ones(len(self.rows)), self.columns, starts), shape=self.levels)

    def matrix(self, values: Array) -> sp.csr_matrix:
        """The blocks (q_k, q_h, c) as a matrix over single effects."""
        starts, columns, order = self._places
        flat = values.ravel()
        shape = (self.levels[0] * self.shape[0], self.levels[1] * self.shape[1])
        return sp.csr_matrix((flat if order is None else flat[order], columns, starts), shape=shape)


Pairs = dict[tuple[int, int], Pattern]


def stays_sparse(pairs: Pairs) -> bool:
    """Whether elimination meets no dense rest: each level of a factor meets at most one of each later factor (nested designs)."""
    return all(len(np.unique(pattern.rows)) == len(pattern.rows) for pattern in pairs.values())


@dataclass
class Inverse:
    """M⁻¹ where it is needed: its diagonal blocks (q_k, q_k, m_k) of every factor, and its blocks (q_k, q_h, c) on the cells of pairs."""

    blocks: list[Array]
    cells: dict[tuple[int, int], Array]


class _Rows:
    """The rows of V = L⁻¹A_12 of the first factor: per level its columns over the other factors, all pairs side by side."""

    def __init__(self, M: Eliminated, pairs: Pairs, cross: dict[tuple[int, int], Array]) -> None:
        self.heads = [(h, pairs[0, h]) for h in range(1, M.K)]
        offsets = np.concatenate([[0], np.cumsum(M.sizes[1:])])
        levels, columns, values = [], [], []
        for h, pattern in self.heads:
            qh = pattern.shape[1]
            levels.append(np.repeat(pattern.rows, qh))
            columns.append((offsets[h - 1] + pattern.columns[:, None] * qh + np.arange(qh)).ravel())
            down = small.forward(M.L[:, :, pattern.rows], cross[0, h])
            values.append(down.transpose(0, 2, 1).reshape(M.q, -1))
        level = np.concatenate(levels)
        self.order = np.argsort(level, kind="stable")
        self.level, self.columns = level[self.order], np.concatenate(columns)[self.order]
        self.values = np.hstack(values)[:, self.order]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(level, minlength=M.L.shape[2]))])

    def matrix(self, a: int, width: int) -> sp.csr_matrix:
        """Row a of each level's block."""
        return sp.csr_matrix((self.values[a], self.columns, self.starts), shape=(len(self.starts) - 1, width))

    def times(self, G: sp.csr_matrix | Array) -> Array:
        """V G (q, …) where V itself has entries."""
        if isinstance(G, np.ndarray):
            return self._times_dense(G)
        out = [np.asarray((self.matrix(a, G.shape[0]) @ G)[self.level, self.columns]).ravel() for a in range(len(self.values))]
        return np.stack(out)

    def _times_dense(self, G: Array) -> Array:
        """The same from a dense G, for levels with equally many columns at once."""
        out, counts = np.empty_like(self.values), np.diff(self.starts)
        for n in np.unique(counts[counts > 0]).tolist():
            same = np.flatnonzero(counts == n)
            width = max(1, GATHERED // n**2)
            for first in range(0, len(same), width):
                at = self.starts[same[first : first + width], None] + np.arange(n)
                columns = self.columns[at]
                inner = G[columns[:, :, None], columns[:, None, :]] if n**2 < GATHERED else G[columns[0]][:, columns[0]][None]
                out[:, at] = np.matmul(self.values[:, at].transpose(1, 0, 2), inner).transpose(1, 0, 2)
        return out

    def split(self, values: Array) -> dict[tuple[int, int], Array]:
        """Values (q, …) as blocks (q, q_h, c) of each pair."""
        back = np.empty_like(values)
        back[:, self.order] = values
        out, at = {}, 0
        for h, pattern in self.heads:
            c, qh = len(pattern.rows), pattern.shape[1]
            out[0, h] = back[:, at : at + c * qh].reshape(len(values), c, qh).transpose(0, 2, 1)
            at += c * qh
        return out


def inverse(M: Eliminated, pairs: Pairs, cross: dict[tuple[int, int], Array]) -> Inverse:
    """M⁻¹ on diagonal blocks and cells; `cross`: M's own blocks (q_k, q_h, c) of every pair."""
    W = small.inverse_factor(M.L)
    if M.rest is None:
        return Inverse([np.einsum("kib,kjb->ijb", W, W)], {})
    V = _Rows(M, pairs, cross)
    width = sum(M.sizes[1:])
    if isinstance(M.rest, Dense):
        G: sp.csr_matrix | Array = M.rest.inverse
    else:
        met = sp.csr_matrix((np.ones(len(V.columns)), V.columns, V.starts), shape=(len(V.starts) - 1, width))
        G = sp.csr_matrix(M.rest.inverse_on(sp.csr_matrix(met.T @ met)))
    VG = V.times(G)
    inner = np.zeros((M.q, M.q, W.shape[2]))
    for a in range(M.q):
        for b in range(a + 1):
            inner[a, b] = inner[b, a] = np.bincount(V.level, V.values[a] * VG[b], minlength=W.shape[2])
    own = np.einsum("kib,klb,ljb->ijb", W, inner + np.eye(M.q)[:, :, None], W)
    cells = {(0, h): -small.backward(M.L[:, :, pairs[0, h].rows], block) for (_, h), block in V.split(VG).items()}
    offsets = np.concatenate([[0], np.cumsum(M.sizes[1:])])
    for (k, h), pattern in pairs.items():
        if k > 0:
            cells[k, h] = _picked(G, pattern, offsets[k - 1], offsets[h - 1])
    blocks = [own]
    for k in range(1, M.K):
        q = pairs[0, k].shape[1]
        at = np.arange(M.sizes[k] // q)
        blocks.append(_picked(G, Pattern(at, at, (q, q), (len(at), len(at))), offsets[k - 1], offsets[k - 1]))
    return Inverse(blocks, cells)


def _picked(G: sp.csr_matrix | Array, pattern: Pattern, row: int, column: int) -> Array:
    """Blocks (q_k, q_h, c) of G at the cells of a pair whose factors start at `row` and `column`."""
    (qk, qh) = pattern.shape
    out = np.empty((qk, qh, len(pattern.rows)))
    for a in range(qk):
        for b in range(qh):
            out[a, b] = np.asarray(G[row + pattern.rows * qk + a, column + pattern.columns * qh + b]).ravel()
    return out
