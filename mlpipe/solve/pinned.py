"""Coordinates of a model with one quantity pinned: free numbers x that, with the pinned value v, give φ (`surfaces`).

A term's factor is F = B T Q with fixed matrices B and Q orthogonal but for B's units and, S symmetric,

    T = [[N, 0], [τ, S]].

N holds what is pinned: nothing; a standard deviation; or two of them, free, with their correlation. S, unlike a Cholesky factor, does not
turn where the covariance loses rank: a direction without variance is one in which S is zero, whatever the others are. There the gradient by
S is zero too, at maxima and minima: `hidden` directions, for whoever wants to know which it is.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from .blocks import Array

FLAT = 1e-3  # of an eigenvalue of S, in units of what a level tells, that may be hidden in a zero gradient
EDGE = 1e-6  # √(1 - ρ²) below which ρ is -1 or 1


class Covariance:
    """One term: `F` (q, q) its factor, `unit` K (q, q), a factor of a covariance of which a level tells about one unit in each direction,
    `rows` (h, q) the combinations of its coefficients that are pinned (h = 0: none; 1: a standard deviation; 2: a correlation), `scale`
    their unit. `start` are the free numbers, `estimate` the pinned one; `size`: the pinned standard deviation of a factor that is K."""

    def __init__(self, F: Array, unit: Array, rows: Array, scale: float) -> None:
        self.q, self.h = len(F), len(rows)
        turn, L = _lq(rows @ unit, mode="complete") if self.h else (np.eye(self.q), np.zeros((0, 0)))
        self.L, self.B = L[:, : self.h], unit @ turn.T
        turn, T = _lq(np.asarray(np.linalg.solve(self.B, F), dtype=np.float64))
        U, s, W = np.linalg.svd(T[self.h :, self.h :])
        self.Q = np.vstack([turn[: self.h], U @ W @ turn[self.h :]])
        self.size = scale * float(self.L[0, 0]) if self.h else math.nan
        self.estimate, heads = _pinned(self.L @ T[: self.h, : self.h] * scale)
        self.start = np.concatenate([heads, T[self.h :, : self.h].ravel(), _lower_of((U * s) @ U.T)])

    def factor(self, x: Array, v: float, scale: float) -> Array:
        """F (q, q) at the free numbers."""
        return np.asarray(self.B @ self._T(x, v, scale) @ self.Q)

    def pull(self, x: Array, v: float, scale: float, by_factor: Array) -> tuple[Array, float, float]:
        """The derivatives by x, v and log `scale` of what has these by F."""
        G, h = self.B.T @ by_factor @ self.Q.T, self.h
        S = G[h:, h:] + G[h:, h:].T
        S[np.diag_indices(len(S))] /= 2.0
        by_x, by_v, by_scale = [G[h:, :h].ravel(), _lower_of(S)], 0.0, 0.0
        if h:
            N, moves, along = _head(x, v, h)
            G = np.linalg.solve(self.L.T, G[:h, :h]) / scale
            by_x.insert(0, np.array([float((G * move).sum()) for move in moves]))
            by_v, by_scale = float((G * along).sum()), -float((G * N).sum())
        return np.concatenate(by_x), by_v, by_scale

    def hidden(self, x: Array) -> Array:
        """Directions (k, len(x)) in which x moves eigenvalues of S that are about zero."""
        values, vectors = np.linalg.eigh(self._S(x))
        flat = vectors[:, np.abs(values) < FLAT].T
        pairs = [(a, b) for i, a in enumerate(flat) for b in flat[: i + 1]]
        out = np.zeros((len(pairs), len(x)))
        for row, (a, b) in zip(out, pairs, strict=True):
            row[len(x) - self._s :] = _lower_of((np.outer(a, b) + np.outer(b, a)) / 2.0)
        return out

    def mirrored(self, x: Array) -> Array:
        """x with the sign of one coefficient, the pinned one if there is one, turned against the others."""
        out = x.copy()
        if self.h == 1:
            out[: self.q - 1] *= -1.0
        elif not self.h:
            rows, columns = np.tril_indices(self.q)
            out[(columns == 0) & (rows > 0)] *= -1.0
        return out

    @property
    def _s(self) -> int:
        """The free numbers of S."""
        return (self.q - self.h) * (self.q - self.h + 1) // 2

    def _S(self, x: Array) -> Array:
        S = np.zeros((self.q - self.h,) * 2)
        S[np.tril_indices(len(S))] = x[len(x) - self._s :]
        return S + np.tril(S, -1).T

    def _T(self, x: Array, v: float, scale: float) -> Array:
        T, h = np.zeros((self.q, self.q)), self.h
        heads = h * (h - 1)
        if h:
            T[:h, :h] = np.linalg.solve(self.L, _head(x, v, h)[0]) / scale
        T[h:, :h] = x[heads : len(x) - self._s].reshape(self.q - h, h)
        T[h:, h:] = self._S(x)
        return T


def _lq(A: Array, mode: Literal["reduced", "complete"] = "reduced") -> tuple[Array, Array]:
    """Q orthogonal and L lower triangular with diagonal >= 0, A = LQ."""
    Q, R = np.linalg.qr(A.T, mode=mode)
    signs = np.ones(Q.shape[1])
    signs[: len(A)] = np.where(np.diag(R) < 0.0, -1.0, 1.0)
    return (Q * signs).T, R.T * signs


def _lower_of(S: Array) -> Array:
    return np.asarray(S[np.tril_indices(len(S))])


def _pinned(H: Array) -> tuple[float, Array]:
    """The pinned value, and the logarithms of the sizes of two pinned rows, from their factor (h, h)."""
    if len(H) < 2:
        return float(abs(H[0, 0])) if len(H) else math.nan, np.zeros(0)
    sizes = np.hypot(H[:, 0], H[:, 1])
    edge = abs(float(H[1, 1])) < EDGE * sizes[1]
    rho = math.copysign(1.0, H[1, 0]) if edge else float(H[1, 0] / sizes[1])
    return rho, np.log(sizes)


def _head(x: Array, v: float, h: int) -> tuple[Array, list[Array], Array]:
    """The factor of the pinned rows (h, h), and its derivatives by the free numbers and by v."""
    if h == 1:
        return np.array([[v]]), [], np.ones((1, 1))
    (a, b), c = np.exp(x[:2]), math.sqrt(max(1.0 - v * v, 0.0))
    one, other = np.array([[a, 0.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [v * b, c * b]])
    return one + other, [one, other], np.array([[0.0, 0.0], [b, -v * b / max(c, EDGE)]])


@dataclass(frozen=True)
class Pin:
    """A quantity that is pinned at a value v.

    `terms` of the random part, one of which may hold it; e = `basis` x_e + `along` v, or + `along` log v if `logarithmic`; `relative`: e
    ends with log σ, to which the factors are relative; `scale`: of the response. `start` of x_e; `estimate` of v, `error` its standard
    error where that does not follow from the curvature; `least`, `most`: the ends of its domain, which are models themselves if `closed`;
    `condition`: the c of a linear condition on β, in place of v in `expand`; `unit`: a size of v that is neither small nor large.
    """

    terms: tuple[Covariance, ...]
    basis: Array
    along: Array
    e_start: Array
    estimate: float
    unit: float
    error: float = math.nan
    least: float = -math.inf
    most: float = math.inf
    condition: Array | None = None
    closed: bool = True
    logarithmic: bool = False
    relative: bool = False
    scale: float = 1.0

    @cached_property
    def start(self) -> Array:
        """x at the estimate."""
        return np.concatenate([*(term.start for term in self.terms), self.e_start])

    @cached_property
    def inside(self) -> int:
        """How many of x belong to covariances; they come first."""
        return sum(len(term.start) for term in self.terms)

    @cached_property
    def _ends(self) -> list[int]:
        return [sum(len(term.start) for term in self.terms[:k]) for k in range(len(self.terms) + 1)]

    def _parts(self, x: Array) -> list[tuple[Covariance, Array]]:
        return [(term, x[a:b]) for term, a, b in zip(self.terms, self._ends[:-1], self._ends[1:], strict=True)]

    def _e(self, x: Array, v: float) -> Array:
        moved = math.log(v) if self.logarithmic else v
        return np.asarray(self.basis @ x[self.inside :] + self.along * moved if self.along.any() else self.basis @ x[self.inside :])

    def _scale(self, e: Array) -> float:
        return self.scale * (math.exp(e[-1]) if self.relative else 1.0)

    def expand(self, x: Array, v: float) -> Array:
        """φ."""
        e = self._e(x, v)
        scale = self._scale(e)
        return np.concatenate([*(term.factor(own, v, scale).ravel() for term, own in self._parts(x)), e])

    def pull(self, x: Array, v: float, gradient: Array) -> tuple[Array, float]:
        """The derivatives by x and by v of what has `gradient` by φ."""
        e, place = self._e(x, v), 0
        scale, by_e, by_x, by_v = self._scale(e), gradient[len(gradient) - len(e) :].copy(), [], 0.0
        for term, own in self._parts(x):
            G = gradient[place : place + term.q**2].reshape(term.q, term.q)
            place += term.q**2
            of_x, of_v, of_scale = term.pull(own, v, scale, G)
            by_x.append(of_x)
            by_v += of_v
            if self.relative:
                by_e[-1] += of_scale
        by_v += float(self.along @ by_e) / (v if self.logarithmic else 1.0)
        return np.concatenate([*by_x, self.basis.T @ by_e]), by_v

    def jacobian(self) -> tuple[Array, Array]:
        """(φ, x) and (φ,) derivatives of `expand` at the estimate."""
        size = sum(term.q**2 for term in self.terms) + len(self.along)
        rows = [self.pull(self.start, self.estimate, row) for row in np.eye(size)]
        return np.array([by_x for by_x, _ in rows]).reshape(size, -1), np.array([by_v for _, by_v in rows])

    def mirrored(self, x: Array) -> Array | None:
        """x with correlations turned in the terms that are singular, where another minimum may be; None where there are none."""
        out = x.copy()
        for (term, own), at in zip(self._parts(x), self._ends[:-1], strict=True):
            if len(term.hidden(own)):
                out[at : at + len(own)] = term.mirrored(own)
        return None if (out == x).all() else out

    def hidden(self, x: Array) -> Array:
        """Directions (k, len(x)) along which gradients by x are zero whatever -2ℓ is: see `Covariance.hidden`."""
        out = [np.zeros((0, len(x)))]
        for (term, own), at in zip(self._parts(x), self._ends[:-1], strict=True):
            found = term.hidden(own)
            out.append(np.pad(found, ((0, 0), (at, len(x) - at - len(own)))))
        return np.vstack(out)
