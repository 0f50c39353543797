"""The block kernel of a GLMM: conditional modes, the (adaptive quadrature or Laplace) log-likelihood of each block and
its exact gradient, for a chunk of whole blocks at a time (FORMULAS R8; Pinheiro and Chao 2006; Kristensen et al. 2016).

Arrays carry the row, or the block, index last: a step over the small dimensions is one numpy call on a long contiguous axis.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from . import small
from .density import Density, Terms
from .family import Cells
from .link import Array
from .quadrature import Laplace, Nodes, Quadrature, nodes

STEP_TOLERANCE = 3e-6  # of u, whose prior spread is 1: Newton's next error is its square
MAX_STEPS = 100
MAX_NODES = 4_096


@dataclass(frozen=True)
class Rows:
    """Rows or cells ordered by block: features `F` (m, n), `offset` (n,) or None, `cells`, and where blocks start (B,); `time` (n,) where
    the rows of a block are ordered by it."""

    F: Array
    offset: Array | None
    cells: Cells
    starts: np.ndarray
    time: Array | None = None

    @cached_property
    def lengths(self) -> np.ndarray:
        """Rows per block (B,)."""
        return np.diff(self.starts, append=self.F.shape[1])

    def sums(self, v: Array) -> Array:
        """Sums per block (…, B) of values (…, n)."""
        return np.add.reduceat(v, self.starts, axis=-1)

    def spread(self, v: Array) -> Array:
        """Values per block (…, B) at each of its rows."""
        return np.repeat(v, self.lengths, axis=-1)


@dataclass(frozen=True)
class Chunk:
    """Whole blocks first, first + 1, …: one piece, or one long block in several."""

    pieces: tuple[Rows, ...]
    first: int
    n_blocks: int

    @property
    def blocks(self) -> slice:
        """Where its blocks stand among all."""
        return slice(self.first, self.first + self.n_blocks)


@dataclass(frozen=True)
class Point:
    """Parameters: `gamma` (m,) over features, `lambda_` (q, q), lower triangular but on the paths of profiles, `tau`."""

    gamma: Array
    lambda_: Array
    tau: float


@dataclass
class Look:
    """What one evaluation leaves behind: `loglik`; `score` (m + r + t,) by gamma, the elements of Λ in `Kernel.entries`, and tau;
    `outer`, the sum of outer products of block scores; `rough`, blocks without a proper mode."""

    loglik: float
    score: Array
    outer: Array
    rough: int = 0

    def __add__(self, other: Look) -> Look:
        return Look(self.loglik + other.loglik, self.score + other.score, self.outer + other.outer, self.rough + other.rough)


@dataclass(frozen=True)
class Kernel:
    """The model's shape: `density`; random columns Z = Z_map' F[z]; `entries`, the free elements (i, j) of Λ; `nagq` nodes a
    dimension, 1 for Laplace."""

    density: Density
    z: tuple[int, ...]
    z_map: Array
    entries: tuple[tuple[int, int], ...]
    nagq: int = 1

    @property
    def q(self) -> int:
        """The number of random effects of a block."""
        return int(self.z_map.shape[1])

    @cached_property
    def nodes(self) -> Nodes:
        """See Nodes."""
        return nodes(self.nagq, self.q)

    def look(self, chunk: Chunk, point: Point, u: Array, *, outer: bool = True) -> tuple[Look, Array]:
        """Log-likelihood, score and (if `outer`) its blocks' outer products over a chunk; and the modes, from u (q, B) nearby."""
        with np.errstate(all="ignore"):  # what is not finite ends as a likelihood of zero
            work = Work(self, chunk, point)
            u, rough = work.modes(u)
            return replace(work.finished(u, outer=outer), rough=rough), u

    def block_scores(self, chunk: Chunk, point: Point, u: Array) -> tuple[Array, Array]:
        """The score of each block (m + r + t, B), see Look, and the modes, from u (q, B) nearby; NaN where a block has no proper mode."""
        with np.errstate(all="ignore"):
            work = Work(self, chunk, point)
            u, _ = work.modes(u)
            parts = work.parts(u, blocks=True)
            return np.full((len(point.gamma), work.n_blocks), np.nan) if parts is None else np.concatenate(parts[1]), u

    def moments(self, chunk: Chunk, point: Point) -> tuple[Array, Array, Array, int]:
        """At Λ = 0: Σ (c_k² - S_kk) and Σ S_kk² (q,), ΣS (q, q) over blocks, and their number; c = Z'ℓ', S = Z'WZ."""
        with np.errstate(all="ignore"):
            work = Work(self, chunk, point)
            c = S = small.ZERO
            for piece, terms in zip(work.pieces, work.terms(np.zeros((self.q, work.n_blocks))), strict=True):
                c, S = c + piece.z_sums(terms.score), S + work.gram(piece, terms.curvature)
            diagonal = np.einsum("iib->ib", S)
            return (c**2 - diagonal).sum(axis=1), (diagonal**2).sum(axis=1), S.sum(axis=2), work.n_blocks

    def posterior(self, chunk: Chunk, point: Point, u: Array) -> tuple[Array, Array]:
        """The modes (q, B) and the factor P (q, q, B) of the conditional covariance of b = Λu, PP' = ΛH⁻¹Λ'."""
        with np.errstate(all="ignore"):
            work = Work(self, chunk, point)
            u, _ = work.modes(u)
            curvature = [terms.curvature for terms in work.terms(u)]
            L = work.factor(sum((work.gram(rows, w) for rows, w in zip(work.pieces, curvature, strict=True)), small.ZERO))
            return u, np.einsum("ij,jkb->ikb", point.lambda_, np.swapaxes(small.inverse_factor(L), 0, 1))


class Piece:
    """Rows with their random columns; Z_k is None where it is 1."""

    def __init__(self, rows: Rows, kernel: Kernel) -> None:
        self.rows, self.starts = rows, rows.starts
        self.Z: list[Array | None] = []
        for column in kernel.z_map.T:
            used = np.flatnonzero(column)
            if len(used) == 1 and column[used[0]] == 1.0:
                row = rows.F[kernel.z[used[0]]]
                self.Z.append(None if row[0] == 1.0 and row[-1] == 1.0 and bool((row == 1.0).all()) else row)
            else:
                self.Z.append(column @ rows.F[list(kernel.z)])

    def times(self, k: int, v: Array) -> Array:
        """Z_k v."""
        z = self.Z[k]
        return v if z is None else z * v

    def z_sums(self, v: Array) -> Array:
        """Z'v per block (q, …, B), for v (…, n)."""
        return np.stack([self.rows.sums(self.times(k, v)) for k in range(len(self.Z))])

    def z_rows(self, b: Array) -> Array:
        """Zb at each row (…, n), for b (q, …, B)."""
        out = self.times(0, self.rows.spread(b[0]))
        for k in range(1, len(b)):
            out = out + self.times(k, self.rows.spread(b[k]))
        return out


class Work:
    """One chunk at one point."""

    def __init__(self, kernel: Kernel, chunk: Chunk, point: Point) -> None:
        self.kernel, self.point, self.density = kernel, point, kernel.density
        self.pieces = [Piece(rows, kernel) for rows in chunk.pieces]
        self.single = len(self.pieces) == 1
        self.n_blocks, self.q = chunk.n_blocks, kernel.q
        self.eye = np.eye(self.q)[:, :, None]
        self._fixed = self._linear(self.pieces[0]) if self.single else None

    def _linear(self, piece: Piece) -> Array:
        out = self.point.gamma @ piece.rows.F
        return out if piece.rows.offset is None else out + piece.rows.offset

    def eta(self, piece: Piece, u: Array) -> Array:
        """The linear predictor of a piece."""
        fixed = self._fixed if self._fixed is not None else self._linear(piece)
        return np.asarray(fixed + piece.z_rows(np.einsum("ij,j...->i...", self.point.lambda_, u)))

    def gram(self, piece: Piece, w: Array) -> Array:
        """Z'WZ per block (q, q, B)."""
        out = np.empty((self.q, self.q, self.n_blocks))
        for i in range(self.q):
            left = piece.times(i, w)
            for j in range(i + 1):
                out[i, j] = out[j, i] = piece.rows.sums(piece.times(j, left))
        return out

    def factor(self, S: Array) -> Array:
        """The Cholesky factor of H = I + Λ'SΛ."""
        lam = self.point.lambda_
        return small.cholesky(self.eye + np.einsum("ki,klb,lj->ijb", lam, S, lam))

    def terms(self, u: Array) -> Iterator[Terms]:
        """The terms of each piece at u, made anew for every piece so that a long block needs the memory of one."""
        for piece in self.pieces:
            yield self.density.terms(self.eta(piece, u), piece.rows.cells, self.point.tau)

    # -- modes ---------------------------------------------------------------------------------------------------

    def modes(self, u: Array) -> tuple[Array, int]:
        """The conditional modes by Newton's method with step halving, and how many blocks did not settle.

        For a concave log f the merit is |gradient|², which Newton's direction always lowers; else the joint log-density.
        """
        full, merit = self._newton(u)
        step = full
        for _ in range(MAX_STEPS):
            settled = np.abs(full).max(axis=0) < STEP_TOLERANCE
            if settled.all():
                return u + full, 0
            tried = u + np.where(settled, full, step)
            next_full, next_merit = self._newton(tried)
            with np.errstate(invalid="ignore"):
                better = settled | (next_merit <= self._enough(merit))
            u, merit, full = np.where(better, tried, u), np.where(better, next_merit, merit), np.where(better, next_full, full)
            step = np.where(better, next_full, 0.5 * step)
        return u, int((~(np.abs(full).max(axis=0) < STEP_TOLERANCE)).sum())

    def _enough(self, merit: Array) -> Array:
        """What the merit must fall to for a step to be taken."""
        return merit + 1e-12 * np.abs(merit) if self.by_value else 0.9999 * merit

    @property
    def by_value(self) -> bool:
        """Whether the merit is the joint log-density."""
        return not self.density.concave or self.density.leaves

    def _newton(self, u: Array) -> tuple[Array, Array]:
        """Newton's step (q, B), ascending, and the merit (B,) to be lowered."""
        lam, etas = self.point.lambda_, list[Array | None]()
        c = S = value = small.ZERO
        for piece in self.pieces:
            eta = self.eta(piece, u)
            score, w = self.density.newton(eta, piece.rows.cells, self.point.tau)
            c, S = c + piece.z_sums(score), S + self.gram(piece, w)
            if self.by_value:
                value = value + piece.rows.sums(self.density.loglik(eta, piece.rows.cells, self.point.tau))
            etas.append(eta if self.single else None)
        g = lam.T @ c - u
        L = self.factor(S)
        rough = np.isnan(L[-1, -1])
        if rough.any():
            safe = (
                self.gram(p, self.density.safe_curvature(self.eta(p, u) if eta is None else eta, p.rows.cells, self.point.tau))
                for p, eta in zip(self.pieces, etas, strict=True)
            )
            L = np.where(rough, self.factor(sum(safe, small.ZERO)), L)
        step = small.solve(L, g)
        if self.by_value:
            return step, 0.5 * (u * u).sum(axis=0) - value
        return step, (g * g).sum(axis=0)

    # -- likelihood and score ------------------------------------------------------------------------------------

    def finished(self, u: Array, *, outer: bool) -> Look:
        """The log-likelihood of the chunk and its gradient at the modes."""
        found = self.parts(u, blocks=outer)
        if found is None:
            return self._failed()
        loglik, parts = found
        whole = float(loglik.sum())
        if outer:
            scores = np.concatenate(parts)
            look = Look(whole, scores.sum(axis=1), scores @ scores.T)
        else:
            score = np.concatenate([part.sum(axis=1) for part in parts])
            look = Look(whole, score, np.zeros((len(score),) * 2))
        return look if math.isfinite(whole) and np.isfinite(look.score).all() else self._failed()

    def parts(self, u: Array, *, blocks: bool) -> tuple[Array, list[Array]] | None:
        """The log-likelihood (B,) and the score by gamma, Λ and tau at the modes, (k, B) each; by gamma (m, 1), the sum of all blocks,
        unless `blocks`. None where a block has no proper mode."""
        lam, kept = self.point.lambda_, list[Terms]()
        c = c_shape = value = shape = S = S_o = small.ZERO
        for piece, terms in zip(self.pieces, self.terms(u), strict=True):
            kept = [terms] if self.single else []
            c, S = c + piece.z_sums(terms.score), S + self.gram(piece, terms.curvature)
            S_o = S if terms.observed is terms.curvature else S_o + self.gram(piece, terms.observed)
            value = value + piece.rows.sums(terms.value)
            if terms.shape is not None and terms.score_shape is not None:
                shape, c_shape = shape + piece.rows.sums(terms.shape), c_shape + piece.z_sums(terms.score_shape)
        L = self.factor(S)
        L_o = L if S_o is S else self.factor(S_o)
        bad = np.isnan(L[-1, -1]) | np.isnan(L_o[-1, -1])
        if bad.any():
            return None
        base = value - 0.5 * (u * u).sum(axis=0)
        inner = Laplace(self, u) if self.kernel.nagq == 1 else Quadrature(self, u, L, base)
        Q = inner.spread(L)
        loglik = base - 0.5 * small.logdet(L) + inner.log_ratio
        N = np.einsum("ik,klb,jl->ijb", lam, Q, lam)
        zq = tau_part = small.ZERO
        q_rows: list[Array] = []
        for piece, terms in zip(self.pieces, kept or self.terms(u), strict=True):
            h = self._leverages(piece, N)
            q_rows = [h * terms.slope]
            zq = zq + piece.z_sums(q_rows[0])
            if terms.curvature_shape is not None:
                tau_part = tau_part + piece.rows.sums(h * terms.curvature_shape)
        a = small.solve(L_o, lam.T @ zq - 2.0 * inner.v)
        by_gamma, kappa = self._row_scores(kept, q_rows if self.single else [], N, lam @ a, inner, blocks=blocks)
        by_lambda = inner.cross(c) - 0.5 * (kappa[:, None] * u[None] + c[:, None] * a[None])
        by_lambda -= np.einsum("ilb,lk,kjb->ijb", S, lam, Q)
        parts = [by_gamma, np.stack([by_lambda[i, j] for i, j in self.kernel.entries])]
        if self.density.family.shape:
            by_tau = inner.shape(shape) - 0.5 * tau_part - 0.5 * (a * (lam.T @ c_shape)).sum(axis=0)
            parts.append(by_tau[None])
        return loglik, parts

    def _failed(self) -> Look:
        size = len(self.point.gamma) + len(self.kernel.entries) + self.density.family.shape
        return Look(-math.inf, np.zeros(size), np.zeros((size, size)))

    def _leverages(self, piece: Piece, N: Array) -> Array:
        """h_j = z_j'Nz_j at each row."""
        out: Array | None = None
        for i in range(self.q):
            for k in range(i + 1):
                part = piece.times(i, piece.times(k, piece.rows.spread(N[i, k] if i == k else 2.0 * N[i, k])))
                out = part if out is None else out + part
        assert out is not None
        return out

    def _row_scores(
        self, kept: list[Terms], q_rows: list[Array], N: Array, shift: Array, inner: Laplace, *, blocks: bool
    ) -> tuple[Array, Array]:
        """Σ F (ℓ' - κ/2) per block (m, B), or over all (m, 1), and Z'κ per block (q, B); what a single piece has is `kept`, `q_rows`."""
        total = z_kappa = small.ZERO
        for i, (piece, terms) in enumerate(zip(self.pieces, kept or self.terms(inner.u), strict=True)):
            kappa = q_rows[0] if q_rows else self._leverages(piece, N) * terms.slope
            kappa = kappa - terms.observed * piece.z_rows(shift)
            z_kappa = z_kappa + piece.z_sums(kappa)
            score = inner.row_score(i, terms) - 0.5 * kappa
            total = total + (piece.rows.sums(piece.rows.F * score) if blocks else (piece.rows.F @ score)[:, None])
        return total, z_kappa


def folded(looks: Sequence[Look]) -> Look:
    """The sum in the order given."""
    total = looks[0]
    for look in looks[1:]:
        total = total + look
    return total
