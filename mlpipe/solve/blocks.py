"""Block statistics, and the one look at them that an evaluation of the likelihood takes.

Arrays carry the block index last, so that every step over the small dimensions q and p + 1 is one numpy call on a
long contiguous axis; pieces of a few thousand blocks stay in the processor's cache between the steps.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
Index: TypeAlias = npt.NDArray[np.intp]

EPS = float(np.finfo(np.float64).eps)
PIECE_FLOATS = 64_000  # numbers of C and S in one piece, so that what is made of them stays in the second-level cache
MAX_CONDITION = 1e4  # of Λ, above which Λ⁻¹ is not used


@dataclass(frozen=True)
class BlockChunk:
    """Statistics of some blocks; float64, the block index LAST in every array and contiguous.

    Attributes:
        S: (q, q, B) Z'wZ of B distinct blocks.
        count: (B,) how many blocks share this S; 1 where not compressed.
        C: (q, p + 1, R) Z'w[X y]; R = B where not compressed.
        owner: (R,) which S each C belongs to, or None for C in the order of S. Where several blocks share an S,
            their C are replaced by pseudo-blocks with the same sum of outer products (see `pseudo_blocks`).
    """

    S: Array
    count: Array
    C: Array
    owner: Index | None = None


@dataclass
class BlockSums:
    """What one look leaves behind at a relative factor Λ: M = Λ'SΛ + I = RR', T = (I + SΛΛ')⁻¹.

    Random effects are in coordinates b = Fc, where F is Λ (c = u is spherical) with unit vectors for columns of zeros, so
    that what is nearly certain and what is nearly unknown about a block do not mix; or I if that cannot be inverted safely.

    Attributes:
        logdet: Σ log|M|.
        uu: (p + 1, p + 1) Σ U'U, U = R⁻¹Λ'C.
        hh: (q, p + 1, q, p + 1) Σ vec(h) vec(h)', h = F'TC.
        e: (q, q) Σ E, E = F'TSF = F'Z'V⁻¹ZF.
        ee: (q, q, q, q) Σ E[i, j] E[k, l].
        weighted: (q, q, q, q) Σ (h QQ' h')[i, j] E[k, l] for a given Q, else zero.
        triple: (q, q, q, p + 1, q, p + 1) Σ E[i, j] vec(h) vec(h)' where asked for, else None.
        F, F_inverse: (q, q) lower triangular.
    """

    logdet: float
    uu: Array
    hh: Array
    e: Array
    ee: Array
    weighted: Array
    F: Array
    F_inverse: Array
    triple: Array | None = None


class _Factors(NamedTuple):
    """Per block: V = R⁻¹ and P = VΛ', both upper triangular (zeros below); N = SΛ; e, the lower triangle of E by rows."""

    V: Array
    P: Array
    N: Array
    e: Array


def pseudo_blocks(count: Array, CC: Array) -> tuple[Array, Index]:
    """Rows whose outer products sum to given cross-products, as few as their ranks allow.

    Args:
        count: (B,) numbers of blocks summed; a matrix gets at most that many rows.
        CC: (B, k, k) Σ vec(C) vec(C)', positive semi-definite, k = q(p + 1), vec by rows of the (q, p + 1) matrix C.

    Returns:
        rows (R, k) and their owner (R,) in 0…B−1, ascending: `BlockChunk(S, count,
        ascontiguousarray(rows.T).reshape(q, p + 1, R), owner)`.

    A Cholesky factorisation with pivoting of the matrices scaled to unit diagonal, so that small entries keep their
    relative accuracy; it stops at pivots that are rounding error.
    """
    k = CC.shape[1]
    scale = np.sqrt(np.maximum(np.diagonal(CC, axis1=1, axis2=2), 0.0))
    inverse = 1.0 / np.where(scale > 0.0, scale, 1.0)
    rest = CC * inverse[:, :, None] * inverse[:, None, :]
    every = np.arange(len(CC))
    found: list[tuple[Array, Index]] = []
    for step in range(k):
        diagonal = np.diagonal(rest, axis1=1, axis2=2)
        pivot = diagonal.argmax(axis=1)
        size = diagonal[every, pivot]
        live = (size > 4 * k * EPS) & (count > step)
        if not live.any():
            break
        row = np.where(live[:, None], rest[every, pivot] / np.sqrt(np.where(live, size, 1.0))[:, None], 0.0)
        rest = rest - row[:, :, None] * row[:, None, :]
        rest[every, pivot, :] = rest[every, :, pivot] = 0.0
        found.append(((row * scale)[live], every[live]))
    if not found:
        return np.zeros((0, k)), np.zeros(0, dtype=np.intp)
    rows, owner = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(owner, kind="stable")
    return rows[order], owner[order]


def block_sums(chunks: Iterable[BlockChunk], lambda_: Array, p1: int, Q: Array | None = None, *, triple: bool = False) -> BlockSums:
    """Takes one look at all blocks (FORMULAS R1).

    Args:
        chunks: all blocks, once.
        lambda_: (q, q) relative factor, lower triangular; may be singular.
        p1: p + 1, the number of columns of each C.
        Q: (p + 1, r) asks for `BlockSums.weighted`.
        triple: asks for `BlockSums.triple`.

    Along a column of F that is Λ's, h is û = M⁻¹Λ'C and E is M⁻¹Λ'SF, without cancellation for any Λ'SΛ; along a unit
    vector h = C − SΛû and E = S − SΛM⁻¹Λ'S, whose relative error along Λ is EPS·‖Λ'SΛ‖.
    """
    q = len(lambda_)
    sums = _Sums(q, p1, triple)
    F = F_inverse = np.eye(q)
    work: _Work | None = None
    for chunk in chunks:
        rows = chunk.C.shape[2]
        size = min(max(chunk.S.shape[2], rows), max(128, PIECE_FLOATS // (q * (p1 + q)) // 16 * 16 + 8))
        if work is None:
            live, F, F_inverse = _coordinates(lambda_, np.einsum("iin->i", chunk.S[:, :, :size]) / max(size, 1))
        if work is None or work.size < size:
            work = _Work(live, p1, size)
        for C, factors in _pieces(sums, chunk, lambda_, work):
            _add_products(sums, C, factors, work, Q)
    return sums.finish(F, F_inverse)


def _coordinates(lambda_: Array, s: Array) -> tuple[list[bool], Array, Array]:
    """Which columns of F are Λ's, F, F⁻¹; s (q,) is the diagonal of a typical S.

    Only the condition of F with columns scaled to unit diagonal counts, since the steps before are accurate column by
    column, and rows scaled by (1/s + ψ)^½, the size of 1/h.
    """
    unit = np.eye(len(lambda_))
    live = np.any(lambda_ != 0.0, axis=0)
    F = np.where(live, lambda_, unit)
    scaled = F / np.sqrt(1.0 / np.where(s > 0.0, s, 1.0) + np.sum(lambda_**2, axis=1))[:, None]
    diagonal = np.diagonal(scaled)
    if np.abs(diagonal).min() > EPS:
        scaled = scaled / diagonal
        if (np.abs(np.linalg.inv(scaled).T) @ np.abs(scaled.T)).max() < MAX_CONDITION:
            return live.tolist(), F, np.asarray(np.linalg.inv(F))
    return [False] * len(lambda_), unit, unit


class _Sums:
    """The sums while they grow, symmetric matrices as lower triangles by rows."""

    def __init__(self, q: int, p1: int, triple: bool) -> None:
        d = q * (q + 1) // 2
        self.q, self.p1, self.logdet = q, p1, 0.0
        self.uu, self.hh = np.zeros((p1, p1)), np.zeros((q * p1, q * p1))
        self.e, self.ee, self.weighted = np.zeros(d), np.zeros((d, d)), np.zeros((d, d))
        self.triple = np.zeros((d, q * p1, q * p1)) if triple else None

    def finish(self, F: Array, F_inverse: Array) -> BlockSums:
        """The sums as full arrays."""
        q = self.q
        rows, columns = np.tril_indices(q)
        place = np.zeros((q, q), dtype=np.intp)
        place[rows, columns] = place[columns, rows] = np.arange(len(rows))
        pairs = place[:, :, None, None], place
        uu, hh = (self.uu + self.uu.T) / 2, (self.hh + self.hh.T) / 2
        hh = hh.reshape(q, self.p1, q, self.p1)
        triple = None if self.triple is None else self.triple[place].reshape(q, q, q, self.p1, q, self.p1)
        return BlockSums(self.logdet, uu, hh, self.e[place], self.ee[pairs], self.weighted[pairs], F, F_inverse, triple)


class _Work:
    """Arrays that every piece uses again: fresh memory costs more than the arithmetic."""

    def __init__(self, live: list[bool], p1: int, size: int) -> None:
        q = len(live)
        self.live, self.size = live, size
        self.M, self.V, self.P, self.N, self.X, self.W = (np.zeros((q, q, size)) for _ in range(6))
        self.e, self.weighted = (np.empty((q * (q + 1) // 2, size)) for _ in range(2))
        self.U, self.h = (np.zeros((q * p1 + 1, size)) for _ in range(2))
        self.scratch = np.empty((max(q + 1, p1), size))


def _pieces(sums: _Sums, chunk: BlockChunk, lambda_: Array, work: _Work) -> Iterator[tuple[Array, _Factors]]:
    """Cuts a chunk's C into pieces with their factors; adds what depends on S alone to the sums."""
    blocks, rows, size = chunk.S.shape[2], chunk.C.shape[2], work.size
    per_block = (
        (at, _add_factors(sums, chunk.S[:, :, at], chunk.count[at], lambda_, work))
        for at in (slice(start, start + size) for start in range(0, blocks, size))
    )
    if chunk.owner is None:
        for at, factors in per_block:
            yield chunk.C[:, :, at], factors
        return
    parts = [[array.copy() for array in factors] for _, factors in per_block]
    if rows:
        whole = [np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True)]
        for start in range(0, rows, size):
            owner = chunk.owner[start : start + size]
            yield chunk.C[:, :, start : start + size], _Factors(*(array[..., owner] for array in whole))


def _add_factors(sums: _Sums, S: Array, count: Array, lambda_: Array, work: _Work) -> _Factors:
    """Factors blocks with the given S; adds log|M|, E and its products."""
    n = S.shape[2]
    M, V, P, N, X, W = (array[:, :, :n] for array in (work.M, work.V, work.P, work.N, work.X, work.W))
    e, scratch = work.e[:, :n], work.scratch[:, :n]
    np.matmul(lambda_.T, S, out=N)
    np.matmul(lambda_.T, N.transpose(1, 0, 2), out=X)
    sums.logdet += 2.0 * float(count @ _inverse_factor(X, M, V, scratch))
    np.matmul(lambda_, V, out=P)
    _lower_e(S, N, X, V, W, e, scratch, work.live)
    weighted = np.multiply(e, count, out=work.weighted[:, :n])
    sums.e += weighted.sum(axis=1)
    sums.ee += weighted @ e.T
    return _Factors(V, P, N, e)


def _lower_e(S: Array, N: Array, X: Array, V: Array, W: Array, e: Array, scratch: Array, live: list[bool]) -> None:
    """e = lower triangle of E: V'(VΛ'SF) in rows or columns of Λ's, S − (VΛ'S)'(VΛ'S) elsewhere; X is Λ'SΛ, then Λ'SF."""
    q = len(S)
    for j in range(q):
        if not live[j]:
            X[:, j] = N[j]
    for i in range(q):
        _combine(V[i, i:], X[i:], W[i], scratch)
    row = 0
    for i in range(q):
        for j in range(i + 1):
            part = e[row + j : row + j + 1]
            if live[i]:
                _combine(V[: i + 1, i], W[: i + 1, j : j + 1], part, scratch)
            elif live[j]:
                _combine(V[: j + 1, j], W[: j + 1, i : i + 1], part, scratch)
            else:
                _combine(W[:, i], W[:, j : j + 1], part, scratch)
                np.subtract(S[i, j], part, out=part)
        row += i + 1


def _add_products(sums: _Sums, C: Array, factors: _Factors, work: _Work, Q: Array | None) -> None:
    """Adds Σ U'U and Σ vec(h) vec(h)' over columns C with the given factors."""
    q, p1, n = C.shape
    U, h = (rows[:-1, :n].reshape(q, p1, n) for rows in (work.U, work.h))
    scratch = work.scratch[:, :n]
    for a in range(q):
        _combine(factors.P[a, a:], C[a:], U[a], scratch)
    for a in range(q):
        sums.uu += _gram(work.U[:, :n], a * p1, p1)
    for a in range(q):
        _combine(factors.V[: a + 1, a], U[: a + 1], h[a], scratch)
    if not all(work.live):
        np.copyto(U, h)
        for a in range(q):
            if not work.live[a]:
                _combine(factors.N[a], U, h[a], scratch)
                np.subtract(C[a], h[a], out=h[a])
    sums.hh += _gram(work.h[:, :n], 0, q * p1)
    if sums.triple is not None:
        rows = work.h[:-1, :n]
        for total, e in zip(sums.triple, factors.e, strict=True):
            total += (rows * e) @ rows.T
    if Q is not None:
        hq = np.matmul(Q.T, h)
        sums.weighted += np.einsum("irn,jrn->ijn", hq, hq)[np.tril_indices(q)] @ factors.e.T


def _gram(rows: Array, start: int, size: int) -> Array:
    """Products of `size` rows with each other; one row more on the left keeps numpy from BLAS's slower syrk."""
    return (rows[start : start + size + 1] @ rows[start : start + size].T)[:size]


def _combine(t: Array, X: Array, out: Array, scratch: Array) -> None:
    """out = Σ_b t[b] X[b] for every block; t (k, n), X (k, w, n), out (w, n)."""
    np.multiply(X[0], t[0], out=out)
    part = scratch[: len(out)]
    for b in range(1, len(t)):
        np.multiply(X[b], t[b], out=part)
        np.add(out, part, out=out)


def _inverse_factor(X: Array, M: Array, V: Array, scratch: Array) -> Array:
    """V = R⁻¹ (upper; below the diagonal untouched) with I + X = RR', X PSD; returns ½ log|I + X|. M is overwritten.

    R is upper triangular so that VΛ' is, too, which saves arithmetic on C.
    """
    q = len(X)
    product: Array = scratch[q]
    part = scratch[:q]
    np.copyto(M, X)
    product[:] = 1.0
    for j in reversed(range(q)):
        pivot, inverse = M[j, j], V[j, j]
        pivot += 1.0
        np.sqrt(pivot, out=pivot)
        np.divide(1.0, pivot, out=inverse)
        np.multiply(product, pivot, out=product)
        M[:j, j] *= inverse
        for i in range(j):
            M[: i + 1, i] -= np.multiply(M[: i + 1, j], M[i, j], out=part[: i + 1])
    for j in range(1, q):
        column = V[:j, j]
        _combine(M[:j, j], V[:j, :j].transpose(1, 0, 2), column, scratch)
        column *= V[j, j]
        np.negative(column, out=column)
    np.log(product, out=product)
    return product
