"""M = Λ'Z'wZΛ + I of several grouping factors, factored: one factor after the other is eliminated while its levels do not meet, the rest
is dense.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from . import small
from .link import Array
from .small import flat, per_level

LEVELS_AT_ONCE = 4_096  # levels whose rows of V are multiplied by a dense inverse at once


class Eliminated:
    """M with its first factor eliminated block by block: D = LL', V = L⁻¹A, and the rest S = M_22 - V'V."""

    def __init__(self, diagonals: list[Array], cross: dict[tuple[int, int], sp.csr_matrix], make: Callable[..., Rest]) -> None:
        self.q, self.size = len(diagonals[0]), diagonals[0].shape[0] * diagonals[0].shape[2]
        self.L = small.cholesky(diagonals[0])
        self.K, self.widths = len(diagonals), [len(D) for D in diagonals]
        self.V = [self._down(cross[0, h]) for h in range(1, self.K)]
        self.sizes = [self.size, *(d.shape[0] * d.shape[2] for d in diagonals[1:])]
        others = {(k - 1, h - 1): a for (k, h), a in cross.items() if k > 0}
        self.rest: Rest | None = make(self, diagonals[1:], others) if self.K > 1 else None

    @property
    def logdet(self) -> float:
        """log|M|."""
        return float(small.logdet(self.L).sum()) + (self.rest.logdet if self.rest is not None else 0.0)

    def _down(self, a: sp.csr_matrix) -> sp.csr_matrix:
        """L⁻¹a for a sparse matrix with the factor's effects as rows."""
        if self.q == 1:
            return sp.csr_matrix((a.data / np.repeat(self.L[0, 0], np.diff(a.indptr)), a.indices, a.indptr), shape=a.shape)
        return sp.csr_matrix(_block_diagonal(small.inverse_factor(self.L)) @ a)

    def down(self, b: Array) -> Array:
        """L⁻¹b for b (size, k)."""
        return flat(small.forward(self.L, per_level(b, self.q)))

    def up(self, b: Array) -> Array:
        """L⁻ᵀb."""
        return flat(small.backward(self.L, per_level(b, self.q)))

    def times(self, x: Array) -> Array:
        """V x for x over the other factors."""
        out, at = np.zeros((self.size, x.shape[1])), 0
        for V in self.V:
            out += V @ x[at : at + V.shape[1]]
            at += V.shape[1]
        return out

    def transposed(self, y: Array) -> Array:
        """V'y."""
        return np.concatenate([V.T @ y for V in self.V])

    def solve(self, b: Array) -> Array:
        """M⁻¹b for b (size of all, k)."""
        y = self.down(b[: self.size])
        if self.rest is None:
            return self.up(y)
        x = self.rest.solve(b[self.size :] - self.transposed(y))
        return np.concatenate([self.up(y - self.times(x)), x])

    def inner(self, P: list[Array | None]) -> float:
        """Σ over levels of tr(P_k (M⁻¹)_ki,ki) for symmetric P_k (q_k, q_k) of each factor, None for zero."""
        return self._inner(P[0], [None if Q is None else _repeated(Q, size) for Q, size in zip(P[1:], self.sizes[1:], strict=True)], {})

    def inner_blocks(self, blocks: dict[int, Array], cross: dict[tuple[int, int], sp.csr_matrix]) -> float:
        """tr(M⁻¹P) for symmetric P with diagonal blocks (q_k, q_k, m_k) of some factors and `cross` blocks of pairs."""
        others = [_block_diagonal(blocks[k]) if k in blocks else None for k in range(1, self.K)]
        return self._inner(blocks.get(0), others, cross)

    def sums(self, k: int) -> Array:
        """Σ over levels (q_k, q_k) of the diagonal blocks of M⁻¹ of factor k."""
        q = self.widths[k]
        out = np.zeros((q, q))
        for a in range(q):
            for b in range(a + 1):
                every: list[Array | None] = [None] * self.K
                every[k] = np.zeros((q, q))
                every[k][a, b] = every[k][b, a] = 1.0 if a == b else 0.5  # type: ignore[index]
                out[a, b] = out[b, a] = self.inner(every)
        return out

    def inverse_blocks(self) -> list[Array]:
        """The diagonal blocks (q_k, q_k, m_k) of M⁻¹ of every factor."""
        W = small.inverse_factor(self.L)
        if self.rest is None:
            return [np.einsum("kib,kjb->ijb", W, W)]
        V = sp.csr_matrix(sp.hstack(self.V))
        G = self.rest.inverse_on(abs(V).T @ abs(V))
        return [self._own(W, V, G), *self.rest.inverse_blocks()]

    def _own(self, W: Array, V: sp.csr_matrix, G: sp.csr_matrix | Array) -> Array:
        """L⁻ᵀ(I + V_i G V_i')L⁻¹ per level, G being the rest's inverse where V_i V_i' needs it."""
        inner = np.empty((self.q, self.q, W.shape[2]))
        for first in range(0, W.shape[2], LEVELS_AT_ONCE):
            rows = slice(first * self.q, (first + LEVELS_AT_ONCE) * self.q)
            part = V[rows]
            product = part @ G
            for a in range(self.q):
                for b in range(self.q):
                    both = part[a :: self.q].multiply(product[b :: self.q])
                    inner[a, b, first : first + LEVELS_AT_ONCE] = np.asarray(both.sum(axis=1)).ravel()
        inner += np.eye(self.q)[:, :, None]
        return np.asarray(np.einsum("kib,klb,ljb->ijb", W, inner, W))

    def _inner(
        self, own: Array | sp.csr_matrix | None, diagonals: list[sp.csr_matrix | None], cross: dict[tuple[int, int], sp.csr_matrix]
    ) -> float:
        """tr(M⁻¹P) for P with blocks `own` of the first factor, `diagonals` of the others and `cross` (k, h) of pairs, k < h."""
        total = 0.0
        middle: sp.csr_matrix | None = None  # L⁻¹ P_11 L⁻ᵀ
        if own is not None:
            W = small.inverse_factor(self.L)
            if isinstance(own, np.ndarray):
                blocks = np.einsum("iab,ac,jcb->ijb", W, own, W) if own.ndim == 2 else np.einsum("iab,acb,jcb->ijb", W, own, W)
                total += float(np.einsum("iib->", blocks))
                middle = _block_diagonal(blocks)
            else:
                lower = _block_diagonal(W)
                middle = sp.csr_matrix(lower @ own @ lower.T)
                total += float(middle.diagonal().sum())
        if self.rest is None:
            return total
        return total + self.rest.inner_sparse(self._reduced(middle, diagonals, cross))

    def _reduced(
        self, middle: sp.csr_matrix | None, diagonals: list[sp.csr_matrix | None], cross: dict[tuple[int, int], sp.csr_matrix]
    ) -> dict[tuple[int, int], sp.csr_matrix]:
        """P_rr + V' middle V - (V'L⁻¹P_1r + its transpose), by pairs of the other factors."""
        out: dict[tuple[int, int], sp.csr_matrix] = {}
        down = {h: self._down(a) for (k, h), a in cross.items() if k == 0}
        for k in range(1, self.K):
            for h in range(k, self.K):
                part: sp.csr_matrix | None = diagonals[k - 1] if k == h else cross.get((k, h))
                Vk, Vh = self.V[k - 1], self.V[h - 1]
                if middle is not None:
                    part = _plus(part, Vk.T @ (middle @ Vh))
                if h in down:
                    part = _plus(part, -(Vk.T @ down[h]))
                if k in down:
                    part = _plus(part, -(down[k].T @ Vh))
                if part is not None:
                    out[k - 1, h - 1] = sp.csr_matrix(part)
        return out


class Dense:
    """The rest as one dense matrix."""

    def __init__(self, S: Array) -> None:
        from scipy.linalg import cho_factor

        self.factor = cho_factor(S, lower=True, overwrite_a=True, check_finite=False)
        self.offsets: list[int] = []
        self.widths: list[int] = []

    @property
    def logdet(self) -> float:
        """log|S|."""
        return float(2.0 * np.log(np.diag(self.factor[0])).sum())

    def solve(self, b: Array) -> Array:
        """S⁻¹b."""
        from scipy.linalg import cho_solve

        return np.asarray(cho_solve(self.factor, b, check_finite=False))

    @cached_property
    def inverse(self) -> Array:
        """S⁻¹."""
        from scipy.linalg.lapack import dpotri

        lower, _ = dpotri(self.factor[0], lower=1)
        return np.asarray(np.tril(lower) + np.tril(lower, -1).T)

    def inverse_on(self, pattern: sp.csr_matrix) -> Array:
        """S⁻¹, whole."""
        return self.inverse

    def inverse_blocks(self) -> list[Array]:
        """The diagonal blocks of S⁻¹ of every factor."""
        out = []
        for first, last, q in zip(self.offsets[:-1], self.offsets[1:], self.widths, strict=True):
            at = np.arange(first, last).reshape(-1, q)
            out.append(self.inverse[at[:, :, None], at[:, None, :]].transpose(1, 2, 0))
        return out

    def inner_sparse(self, P: dict[tuple[int, int], sp.csr_matrix]) -> float:
        """tr(S⁻¹P) for P by pairs of factors."""
        total = 0.0
        for (k, h), block in P.items():
            coo = block.tocoo()
            values = self.inverse[coo.row + self.offsets[k], coo.col + self.offsets[h]]
            total += (1.0 if k == h else 2.0) * float(values @ coo.data)
        return total


class Next(Eliminated):
    """A further factor that stays block-diagonal."""

    def inverse_on(self, pattern: sp.csr_matrix) -> sp.csr_matrix:
        """The inverse where `pattern` has entries, which must be among those of the rest of an elimination."""
        W = small.inverse_factor(self.L)
        own_only = self.rest is None
        if own_only:
            return _block_diagonal(np.einsum("kib,kjb->ijb", W, W))
        V = sp.csr_matrix(sp.hstack(self.V))
        G = self.rest.inverse_on(abs(V).T @ abs(V) + abs(pattern[self.size :, self.size :]))  # type: ignore[union-attr]
        B = -(_block_diagonal(W.transpose(1, 0, 2)) @ V) @ G
        own = _block_diagonal(self._own(W, V, G))
        whole = sp.csr_matrix(sp.block_array([[own, sp.csr_matrix(B)], [sp.csr_matrix(B).T, sp.csr_matrix(G)]]))
        return sp.csr_matrix(whole.multiply(pattern != 0))

    def inner_sparse(self, P: dict[tuple[int, int], sp.csr_matrix]) -> float:
        """tr(S⁻¹P) for P by pairs of factors."""
        diagonals: list[sp.csr_matrix | None] = [P.get((k, k)) for k in range(1, self.K)]
        return self._inner(P.get((0, 0)), diagonals, {pair: a for pair, a in P.items() if pair[0] != pair[1]})


Rest = Dense | Next


def _plus(a: sp.csr_matrix | None, b: sp.csr_matrix) -> sp.csr_matrix:
    return b if a is None else a + b


def _repeated(P: Array, size: int) -> sp.csr_matrix:
    """P on the diagonal, once a level."""
    return sp.csr_matrix(sp.kron(sp.identity(size // len(P)), P, format="csr"))


def _block_diagonal(blocks: Array) -> sp.csr_matrix:
    """Blocks (q, q, m) as one sparse matrix."""
    q, _, m = blocks.shape
    if q == 1:
        return sp.csr_matrix(sp.diags_array(blocks[0, 0]))
    return sp.csr_matrix(sp.bsr_matrix((blocks.transpose(2, 0, 1), np.arange(m), np.arange(m + 1))))


def _blocks_of(a: sp.csr_matrix, q: int) -> Array | None:
    """The diagonal blocks (q, q, m) of a matrix that has no others, else None."""
    coo = a.tocoo()
    level = coo.row // q
    if (coo.col // q != level)[coo.data != 0.0].any():
        return None
    out = np.zeros((q, q, a.shape[0] // q))
    np.add.at(out, (coo.row % q, coo.col % q, level), coo.data)
    return out


def eliminate(diagonals: list[Array], cross: dict[tuple[int, int], sp.csr_matrix]) -> Eliminated:
    """M factored: diagonal blocks (q_k, q_k, m_k) and cross blocks by pairs, the factors in the order given."""
    return Eliminated(diagonals, cross, _rest)


def _rest(first: Eliminated, diagonals: list[Array], cross: dict[tuple[int, int], sp.csr_matrix]) -> Rest:
    """What is left: the next factor eliminated too where it stays block-diagonal, else dense."""
    V = first.V
    left: list[Array] = []
    for k, D in enumerate(diagonals):
        blocks = _blocks_of(sp.csr_matrix(V[k].T @ V[k]), len(D)) if not left or len(left) == k else None
        if blocks is None:
            break
        left.append(D - blocks)
    if left:  # at least the next one: those that would fill in are dense further down
        reduced = {(k, h): sp.csr_matrix(a - V[k].T @ V[h]) for (k, h), a in cross.items()}
        if len(left) == len(diagonals):
            return Next(left, reduced, _rest)
    return _dense(V, diagonals, cross)


def _dense(V: list[sp.csr_matrix], diagonals: list[Array], cross: dict[tuple[int, int], sp.csr_matrix]) -> Dense:
    offsets = np.concatenate([[0], np.cumsum([d.shape[0] * d.shape[2] for d in diagonals])]).tolist()
    S = np.zeros((offsets[-1],) * 2)
    for k, D in enumerate(diagonals):
        for h in range(k, len(diagonals)):
            block = _block_diagonal(D) if k == h else cross[k, h]
            at = slice(offsets[k], offsets[k + 1]), slice(offsets[h], offsets[h + 1])
            S[at] = (block - V[k].T @ V[h]).toarray()
            if k != h:
                S[at[::-1]] = S[at].T
    out = Dense(S)
    out.offsets, out.widths = offsets, [len(D) for D in diagonals]
    return out
