"""M = Λ'Z'wZΛ + I of nested grouping factors, factored: a tree, from the innermost levels out.

Each level of a factor meets one level of each later one, its ancestors. Eliminating a factor then adds to the blocks of its ancestors
alone, so that nothing fills in and all work is sums over children: linear in the levels, whatever the depth.
"""
from __future__ import annotations

from functools import cached_property

import numpy as np
import scipy.sparse as sp

from . import small
from .link import Array
from .small import flat, per_level


class Children:
    """Sums over the children of each of `count` parents; `parent` (m,) of each child."""

    def __init__(self, parent: np.ndarray, count: int) -> None:
        self.parent, self.count = parent, count
        ascending = bool((parent[1:] >= parent[:-1]).all())
        self.starts = np.searchsorted(parent, np.arange(count)) if ascending and len(np.unique(parent)) == count else None

    def sums(self, x: Array) -> Array:
        """(…, m) -> (…, count)."""
        if self.starts is not None:
            return np.asarray(np.add.reduceat(x, self.starts, axis=-1))
        rows = [np.bincount(self.parent, row, minlength=self.count) for row in x.reshape(-1, x.shape[-1])]
        return np.asarray(rows, dtype=np.float64).reshape(*x.shape[:-1], self.count)


Family = dict[tuple[int, int], Children]


class Nested:
    """M factored: `diagonals` (q_k, q_k, m_k) of each factor, innermost first, and `cross` (q_k, q_h, m_k) of factor k with its ancestor h.

    D = LL' is the first factor's part, V = L⁻¹A its rows' part with their ancestors, `rest` the same of S = M_22 - V'V.
    """

    def __init__(self, diagonals: list[Array], cross: dict[tuple[int, int], Array], family: Family, first: int = 0) -> None:
        self.first, self.family = first, family
        self.q, self.levels = len(diagonals[0]), diagonals[0].shape[2]
        self.size = self.q * self.levels
        self.L = small.cholesky(diagonals[0])
        self.ancestors = range(first + 1, first + len(diagonals))
        self.V = {h: small.forward(self.L, cross[first, h]) for h in self.ancestors}
        self.rest: Nested | None = None
        if self.V:
            left = [D - self._met(h, h, h) for h, D in zip(self.ancestors, diagonals[1:], strict=True)]
            others = {(k, h): A - self._met(k, h, k) for (k, h), A in cross.items() if k > first}
            self.rest = Nested(left, others, family, first + 1)

    def _met(self, k: int, h: int, nearest: int) -> Array:
        """V_k'V_h summed over the children of the nearer ancestor."""
        return self._children(nearest).sums(np.einsum("iam,ibm->abm", self.V[k], self.V[h]))

    def _children(self, h: int) -> Children:
        return self.family[self.first, h]

    @property
    def logdet(self) -> float:
        """log|M|."""
        return float(small.logdet(self.L).sum()) + (self.rest.logdet if self.rest is not None else 0.0)

    def solve(self, b: Array) -> Array:
        """M⁻¹b for b (size of all, k)."""
        return np.concatenate([flat(x) for x in self._solved(self._split(b))])

    def _split(self, b: Array) -> list[Array]:
        own = np.ascontiguousarray(per_level(b[: self.size], self.q))
        return [own, *self.rest._split(b[self.size :])] if self.rest is not None else [own]

    def _solved(self, b: list[Array]) -> list[Array]:
        """b and M⁻¹b by factors (q, k, m)."""
        y = small.forward(self.L, b[0])
        if self.rest is None:
            return [small.backward(self.L, y)]
        met = (self._children(h).sums(_transposed_times(self.V[h], y)) for h in self.ancestors)
        x = self.rest._solved([part - own for part, own in zip(b[1:], met, strict=True)])
        for h, part in zip(self.ancestors, x, strict=True):
            y -= _times(self.V[h], part[:, :, self._children(h).parent])
        return [small.backward(self.L, y), *x]

    @cached_property
    def _line(self) -> tuple[Array, Array, Array]:
        """M⁻¹ by levels: of a level's own effects (q, q, m), with its ancestors' (q, Q - q, m), and of these alone."""
        W = small.inverse_factor(self.L)
        own = np.einsum("kim,kjm->ijm", W, W) if self.q > 1 else W * W
        if self.rest is None:
            return own, np.zeros((self.q, 0, self.levels)), np.zeros((0, 0, self.levels))
        above = self.rest.lines[:, :, self._children(self.first + 1).parent]
        V = np.concatenate([self.V[h] for h in self.ancestors], axis=1)
        V = np.einsum("kim,kam->iam", W, V) if self.q > 1 else W * V  # L⁻ᵀV
        across = -np.einsum("iam,abm->ibm", V, above)
        return own - np.einsum("iam,jam->ijm", across, V), across, above

    @cached_property
    def lines(self) -> Array:
        """M⁻¹ over each level and its ancestors together (Q, Q, m), the level's own effects first."""
        own, across, above = self._line
        return np.concatenate([np.concatenate([own, across], axis=1), np.concatenate([across.transpose(1, 0, 2), above], axis=1)])

    def inverse_blocks(self) -> list[Array]:
        """The diagonal blocks (q_k, q_k, m_k) of M⁻¹ of every factor."""
        own = self._line[0]
        return [own, *self.rest.inverse_blocks()] if self.rest is not None else [own]

    def sums(self, k: int) -> Array:
        """Σ over levels (q_k, q_k) of the diagonal blocks of M⁻¹ of factor k."""
        return np.asarray(self.inverse_blocks()[k - self.first].sum(axis=2))

    def inner(self, P: list[Array | None]) -> float:
        """Σ over levels of tr(P_k (M⁻¹)_ki,ki) for symmetric P_k (q_k, q_k) of each factor, None for zero."""
        return sum(float((Q * self.sums(self.first + k)).sum()) for k, Q in enumerate(P) if Q is not None)

    def inner_blocks(self, blocks: dict[int, Array], cross: dict[tuple[int, int], sp.csr_matrix]) -> float:
        """tr(M⁻¹P) for symmetric P with diagonal blocks (q_k, q_k, m_k) of some factors and `cross` blocks of pairs."""
        own = blocks.get(self.first)
        total = float(np.einsum("abm,abm->", own, self._line[0])) if own is not None else 0.0
        for h in self.ancestors:
            if (self.first, h) in cross:
                at, width = self._place(h), self.V[h].shape[1]
                P = cross[self.first, h].data.reshape(self.levels, self.q, width)
                total += 2.0 * float(np.einsum("mab,abm->", P, self._line[1][:, at : at + width]))
        return total + (self.rest.inner_blocks(blocks, cross) if self.rest is not None else 0.0)

    def _place(self, h: int) -> int:
        """Where ancestor h begins among all ancestors."""
        return sum(int(self.V[g].shape[1]) for g in self.ancestors if g < h)


def _times(V: Array, x: Array) -> Array:
    """V x by levels: V (i, a, m), x (a, k, m)."""
    return np.asarray(V * x if V.shape[:2] == (1, 1) else np.einsum("iam,akm->ikm", V, x))


def _transposed_times(V: Array, y: Array) -> Array:
    """V'y by levels: V (i, a, m), y (i, k, m)."""
    return np.asarray(V * y if V.shape[:2] == (1, 1) else np.einsum("iam,ikm->akm", V, y))
