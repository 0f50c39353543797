"""Several factors absorbed: least squares on all their indicators by conjugate gradients over cells (Correia 2017).

With D the rows' indicators of all factors, N = D'WD is made of counts of levels and of pairs of levels. Solving N A = D'WF for every
column of F gives what remains of the cross-products, F'WF - (D'WF)'A, and the levels' effects.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from .sandwich import Array

TOLERANCE = 1e-12  # of the residual of the normal equations, relative to the right-hand side
MAX_STEPS = 20_000
DENSE = 2_000  # levels up to which the rank of three and more factors is found exactly


@dataclass
class Absorbed:
    """Effects per factor: `effects` [(m_k, F)], `rank` of the indicators, `exact` whether that rank is exact, `steps`, `converged`."""

    effects: list[Array]
    rank: int
    exact: bool
    steps: int
    converged: bool


class Cells:
    """N of several factors: `diagonal` [(m_k,)], the weight of each level, and `cross`, of pairs of levels, for every (k, j) with k < j."""

    def __init__(self, diagonal: Sequence[Array], cross: Mapping[tuple[int, int], sp.csr_matrix]) -> None:
        self.diagonal, self.sizes = list(diagonal), [len(d) for d in diagonal]
        self.cross = dict(cross) | {(j, k): found.T.tocsr() for (k, j), found in cross.items()}

    def among(self, kept: Sequence[int]) -> Cells:
        """Those of some of the factors."""
        pairs = {(a, b): self.cross[k, kept[b]] for a, k in enumerate(kept) for b in range(a + 1, len(kept))}
        return Cells([self.diagonal[k] for k in kept], pairs)

    def connected(self, k: int, j: int) -> int:
        """The connected parts of the graph of two factors' levels (Abowd, Creecy and Kramarz 2002)."""
        from scipy.sparse.csgraph import connected_components

        graph = sp.bmat([[None, self.cross[k, j]], [self.cross[j, k], None]])
        return int(connected_components(graph, directed=False)[0])

    def rank(self) -> tuple[int, bool]:
        """The rank of all indicators, and whether it is exact: of three and more large factors, each is compared with the first."""
        if len(self.sizes) == 1:
            return self.sizes[0], True
        if len(self.sizes) > 2 and sum(self.sizes) <= DENSE:
            d = np.concatenate([1.0 / np.sqrt(part) for part in self.diagonal])
            N = sp.bmat([[self._block(k, j) for j in range(len(self.sizes))] for k in range(len(self.sizes))]).toarray()
            return int((np.linalg.eigvalsh(N * np.outer(d, d)) > 1e-10).sum()), True
        redundant = sum(self.connected(0, j) for j in range(1, len(self.sizes)))
        return sum(self.sizes) - redundant, len(self.sizes) == 2

    def _block(self, k: int, j: int) -> sp.spmatrix:
        return sp.diags(self.diagonal[k]) if k == j else self.cross[k, j]

    def solve(self, sums: Sequence[Array], tolerance: float = TOLERANCE) -> Absorbed:
        """A with N A = `sums` [(m_k, F)] (consistent, N singular): the largest factor eliminated, the rest by conjugate gradients
        preconditioned by the counts, all columns side by side."""
        first = int(np.argmax(self.sizes))
        rest = [k for k in range(len(self.sizes)) if k != first]
        rank, exact = self.rank()
        D1 = self.diagonal[first][:, None]
        if not rest:
            return Absorbed([sums[0] / D1], rank, exact, 0, True)
        ends = np.cumsum([0, *(self.sizes[k] for k in rest)])
        down = sp.vstack([self.cross[k, first] for k in rest]).tocsr()
        up = down.T.tocsr()
        inner = sp.bmat([[self._block(k, j) for j in rest] for k in rest]).tocsr()
        counts = np.concatenate([self.diagonal[k] for k in rest])[:, None]
        b = np.vstack([sums[k] for k in rest]) - down @ (sums[first] / D1)
        size = np.vstack([sums[k] for k in rest])
        x, steps, converged = _gradients(lambda v: inner @ v - down @ ((up @ v) / D1), b, size, counts, tolerance)
        effects: list[Array] = [np.zeros(0)] * len(self.sizes)
        for place, k in enumerate(rest):
            effects[k] = x[ends[place] : ends[place + 1]]
        effects[first] = (sums[first] - up @ x) / D1
        return Absorbed(effects, rank, exact, steps, converged)


class Leverages:
    """The leverages v'N⁻v of rows by their levels, v the indicators of these: the largest factor eliminated, the rest by a dense matrix."""

    def __init__(self, cells: Cells) -> None:
        self.first = int(np.argmax(cells.sizes))
        self.rest = [k for k in range(len(cells.sizes)) if k != self.first]
        self.own = 1.0 / cells.diagonal[self.first]
        if not self.rest:
            return
        self.starts = np.cumsum([0, *(cells.sizes[k] for k in self.rest)])
        down = sp.vstack([cells.cross[k, self.first] for k in self.rest]).tocsr()
        across = (down @ sp.diags(self.own)).toarray()
        N = sp.bmat([[cells._block(k, j) for j in self.rest] for k in self.rest]).toarray()
        d = 1.0 / np.sqrt(np.diag(N))
        values, vectors = np.linalg.eigh((N - across @ down.T) * np.outer(d, d))
        kept = values > 1e-10
        half = d[:, None] * vectors[:, kept] / np.sqrt(values[kept])
        self.inverse, self.across = half @ half.T, half @ (half.T @ across)
        self.own = self.own + np.einsum("ij,ij->j", across, self.across)

    @staticmethod
    def bytes(sizes: Sequence[int]) -> int:
        """The memory of the dense matrices."""
        rest = sum(sizes) - max(sizes)
        return 8 * rest * (2 * max(sizes) + 4 * rest)

    def at(self, codes: Sequence[np.ndarray]) -> Array:
        """(n,) of rows of these levels, one code (n,) a factor."""
        level = codes[self.first]
        out = self.own[level]
        places = [self.starts[i] + codes[k] for i, k in enumerate(self.rest)]
        for a in places:
            out = out - 2.0 * self.across[a, level]
            for b in places:
                out = out + self.inverse[a, b]
        return np.asarray(out)


def _gradients(
    apply: Callable[[Array], Array], b: Array, size: Array, counts: Array, tolerance: float
) -> tuple[Array, int, bool]:
    """Conjugate gradients on S x = b, columns side by side, preconditioned by `counts`; `size`: what residuals are compared with."""
    x, r = np.zeros_like(b), b.copy()
    z = r / counts
    p, rz = z.copy(), np.einsum("ij,ij->j", r, z)
    bound = tolerance**2 * np.maximum(np.einsum("ij,ij->j", size, size / counts), 1e-300)
    for step in range(MAX_STEPS):
        live = rz > bound
        if not live.any():
            return x, step, True
        Sp = apply(p)
        curvature = np.einsum("ij,ij->j", p, Sp)
        alpha = np.where(live & (curvature > 0.0), rz / np.where(curvature > 0.0, curvature, 1.0), 0.0)
        x += alpha * p
        r -= alpha * Sp
        z = r / counts
        new = np.einsum("ij,ij->j", r, z)
        p = z + np.where(live, new / np.where(rz > 0.0, rz, 1.0), 0.0) * p
        rz = np.where(live, new, rz)
    return x, MAX_STEPS, False
