"""What the nodes of a block give to its log-likelihood and gradient: one at the mode for Laplace, a grid around it for adaptive
Gauss-Hermite quadrature (FORMULAS R8; Pinheiro and Chao 2006)."""
from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from . import small
from .density import Terms
from .link import Array

if TYPE_CHECKING:
    from .kernel import Work

MAX_NAGQ = 300  # nodes a random effect: beyond about 370 the weights underflow
NODE_ROWS = 16_384  # rows times nodes looked at together


@dataclass(frozen=True)
class Nodes:
    """A product Gauss-Hermite grid: nodes (q, K), and log(weight) + |node|² (K,)."""

    z: Array
    log_weight: Array


def nodes(nagq: int, q: int) -> Nodes:
    """The grid of nagq^q nodes of the weight exp(-|z|²)."""
    x, w = np.polynomial.hermite.hermgauss(nagq)
    grid = np.array(list(product(range(nagq), repeat=q)), dtype=int).T
    return Nodes(x[grid], (np.log(w)[grid] + x[grid] ** 2).sum(axis=0))


class Laplace:
    """The parts of R8's gradient that the quadrature changes, for one node at the mode."""

    def __init__(self, work: Work, u: Array) -> None:
        self.u = u
        self.log_ratio: Array | float = 0.0
        self.v: Array | float = 0.0

    def spread(self, L: Array) -> Array:
        """Q̄ = H⁻¹ (q, q, B)."""
        V = small.inverse_factor(L)
        return np.asarray(np.einsum("kib,kjb->ijb", V, V))

    def cross(self, c: Array) -> Array:
        """Σ_r π_r c_r u_r' (q, q, B)."""
        return c[:, None] * self.u[None]

    def shape(self, at_mode: Array) -> Array:
        """Σ_r π_r Σ_j ∂ log f_j / ∂tau."""
        return at_mode

    def row_score(self, piece: int, terms: Terms) -> Array:
        """Σ_r π_r ℓ'_r at each row."""
        return terms.score


class Quadrature(Laplace):
    """The same for adaptive Gauss-Hermite nodes u_r = û + √2 L⁻ᵀ z_r with normalised weights π_r.

    As many nodes are looked at together as make NODE_ROWS rows: arrays then carry the node before the row, or the block, index.
    """

    def __init__(self, work: Work, u: Array, L: Array, base: Array) -> None:
        super().__init__(work, u)
        grid, lam = work.kernel.nodes, work.point.lambda_
        scores = [np.zeros(piece.rows.F.shape[1]) for piece in work.pieces]
        total = self._cross = self._shape = small.ZERO
        self.v, self.B = np.zeros_like(u), np.zeros((work.q, work.q, work.n_blocks))
        together = max(NODE_ROWS // max(piece.rows.F.shape[1] for piece in work.pieces), 1)
        for first in range(0, grid.z.shape[1], together):
            z = grid.z[:, first : first + together, None]
            u_r = u[:, None] + math.sqrt(2.0) * small.backward(L, np.broadcast_to(z, (*z.shape[:2], work.n_blocks)))
            kept = list(work.terms(u_r)) if work.single else []
            value = sum((p.rows.sums(terms.value) for p, terms in zip(work.pieces, kept or work.terms(u_r), strict=True)), small.ZERO)
            g = value - 0.5 * (u_r * u_r).sum(axis=0)
            log_weight = grid.log_weight[first : first + together, None]
            weight = np.exp(np.where(np.isfinite(g), g - base + log_weight, -np.inf))
            c_r, shape_r = np.zeros_like(u_r), small.ZERO
            for k, (piece, terms) in enumerate(zip(work.pieces, kept or work.terms(u_r), strict=True)):
                scores[k] += (piece.rows.spread(weight) * terms.score).sum(axis=0)
                c_r += piece.z_sums(terms.score)
                if terms.shape is not None:
                    shape_r = shape_r + piece.rows.sums(terms.shape)
            g_r = np.einsum("ij,irb->jrb", lam, c_r) - u_r
            total = total + weight.sum(axis=0)
            self._cross = self._cross + np.einsum("rb,irb,jrb->ijb", weight, c_r, u_r)
            self._shape = self._shape + (weight * shape_r).sum(axis=0)
            self.v += np.einsum("rb,irb->ib", weight, g_r)
            self.B += np.einsum("rb,ir,jrb->ijb", weight, math.sqrt(2.0) * z[:, :, 0], small.forward(L, g_r))
        self.total = total
        self.v, self.B = self.v / self.total, self.B / self.total
        self.scores = [s / piece.rows.spread(self.total) for s, piece in zip(scores, work.pieces, strict=True)]
        self.log_ratio = np.log(self.total) - 0.5 * work.q * math.log(math.pi)

    def spread(self, L: Array) -> Array:
        """Q̄ = L⁻ᵀ(I + Φ(B) + Φ(B)')L⁻¹, Φ the strict lower triangle and half the diagonal."""
        q = len(L)
        phi = np.tril(np.ones((q, q)), -1)[:, :, None] * self.B + 0.5 * np.eye(q)[:, :, None] * self.B
        inner = np.eye(q)[:, :, None] + phi + np.swapaxes(phi, 0, 1)
        V = small.inverse_factor(L)
        return np.asarray(np.einsum("kib,klb,ljb->ijb", V, inner, V))

    def cross(self, c: Array) -> Array:
        return np.asarray(self._cross / self.total)

    def shape(self, at_mode: Array) -> Array:
        return np.asarray(self._shape / self.total)

    def row_score(self, piece: int, terms: Terms) -> Array:
        return self.scores[piece]
