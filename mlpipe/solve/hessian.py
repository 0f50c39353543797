"""Exact second derivatives of Laplace's approximation with one random effect a block, where the density gives its own up to the fourth.

Per block, with s = ℓ', w = -ℓ'', t = ∂w/∂eta, r = ∂²w/∂eta² at the mode û, S = Σz²w, T = Σz³t, h = 1 + λ²S and e_j = (x_j, z_j û) the
direct derivative of eta_j by psi = (gamma, λ), differentiating the mode's equation λΣzs = û once and twice gives

    a = dû/dpsi = (c e_λ - λ Σ z w e) / h,   c = Σzs          d_j = d eta_j/dpsi = e_j + λ z_j a
    d²ℓ = Σ κ d d' - a a' + ½ (dh/h)(dh/h)' + e_λ y' + y e_λ' - (S/h) e_λ e_λ'
    κ = -w - ½ (λ²/h) z² r + ½ (λ⁴T/h²) z t          dh = 2λS e_λ + λ² Σ z² t d
    y = c a - (λ/h) Σ z² t d - ½ (λ²/h) T a + ½ (λ³T/h²)(Σ z w d + λ S a)

(the second differential of Σ log f - û²/2 - ½ log h; Kristensen et al. 2016 have its first). It costs about two looks, where differences
of scores take one or two a parameter.
"""
from __future__ import annotations

import numpy as np

from . import small
from .density import Curvatures
from .kernel import Chunk, Kernel, Piece, Point, Work
from .link import Array


def has_hessian(kernel: Kernel) -> bool:
    """Whether `hessian` knows this kernel's model."""
    return kernel.q == 1 and kernel.nagq == 1 and kernel.density.fourth


def hessian(kernel: Kernel, chunk: Chunk, point: Point, u: Array) -> Array:
    """Second derivatives (m + 1, m + 1) of the chunk's log-likelihood by gamma and λ, from u (1, B) near the modes."""
    with np.errstate(all="ignore"):  # what is not finite is refused where it is used
        work = Work(kernel, chunk, point)
        u, _ = work.modes(u)
        pieces = [_Piece(work, piece, u) for piece in work.pieces] if work.single else None
        return _second(work, u, pieces)


class _Piece:
    """One piece's derivatives at the modes, times powers of its random column."""

    def __init__(self, work: Work, piece: Piece, u: Array) -> None:
        self.rows, self.times = piece.rows, piece.times
        self.at: Curvatures = work.density.curvatures(work.eta(piece, u), piece.rows.cells)

    def z(self, v: Array, power: int) -> Array:
        """z^power v."""
        for _ in range(power):
            v = self.times(0, v)
        return v

    def by_block(self, v: Array) -> Array:
        """Σ F v per block (m, B)."""
        return self.rows.sums(self.rows.F * v)


def _second(work: Work, u: Array, kept: list[_Piece] | None) -> Array:
    lam, m = float(work.point.lambda_[0, 0]), len(work.point.gamma)
    c = S = T = small.ZERO
    zwx = zztx = small.ZERO
    for p in kept or (_Piece(work, piece, u) for piece in work.pieces):
        sums, zw, zzt = p.rows.sums, p.z(p.at.w, 1), p.z(p.at.slope, 2)
        c, S, T = c + sums(p.z(p.at.score, 1)), S + sums(p.z(zw, 1)), T + sums(p.z(zzt, 1))
        zwx, zztx = zwx + p.by_block(zw), zztx + p.by_block(zzt)
    h = 1.0 + lam**2 * S
    a = np.vstack([-lam * zwx, (c - lam * S * u[0])[None]]) / h
    b = lam * a
    b[m] += u[0]
    zwd, zztd = S * b, T * b
    zwd[:m] += zwx
    zztd[:m] += zztx
    dh = lam**2 * zztd
    dh[m] += 2.0 * lam * S
    dh /= h
    y = (c - 0.5 * lam**2 * T / h) * a - lam / h * zztd + 0.5 * lam**3 * T / h**2 * (zwd + lam * S * a)
    y_sum = y.sum(axis=1)
    out = 0.5 * dh @ dh.T - a @ a.T
    out[m] += y_sum
    out[:, m] += y_sum
    out[m, m] -= float((S / h).sum())
    by_r, by_t = 0.5 * lam**2 / h, 0.5 * lam**4 * T / h**2
    for p in kept or (_Piece(work, piece, u) for piece in work.pieces):
        spread, F = p.rows.spread, p.rows.F
        kappa = p.z(spread(by_t) * p.at.slope, 1) - p.z(spread(by_r) * p.at.bend, 2) - p.at.w
        z_kappa = p.z(kappa, 1)
        cross = p.by_block(z_kappa) @ b.T
        out[:m, :m] += (F * kappa) @ F.T
        out[:m] += cross
        out[:, :m] += cross.T
        out += (b * p.rows.sums(p.z(z_kappa, 1))) @ b.T
    return np.asarray(out)
