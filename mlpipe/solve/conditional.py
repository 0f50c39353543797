"""Conditional covariances of random effects from samples of N(0, M⁻¹), by their means given all other levels (FORMULAS R7)."""
from __future__ import annotations

import math

import numpy as np

from . import small
from .link import Array


def split_covariance(D: Array, rhs: Array, v: Array) -> tuple[Array, Array]:
    """Of samples v (q, k, m) with rhs = Mv and M's diagonal blocks D (q, q, m): D⁻¹, and the sum over samples of the products of each
    level's mean given the others. D⁻¹ and the mean of these products add up to the diagonal blocks of M⁻¹."""
    L = small.cholesky(D)
    shifted, inverse = small.solve(L, rhs - np.einsum("ijm,jkm->ikm", D, v)), small.inverse_factor(L)
    return np.einsum("kam,kbm->abm", inverse, inverse), np.einsum("ikm,jkm->ijm", shifted, shifted)


def sd_error(known: list[Array], sampled: list[Array], samples: int) -> float:
    """Monte Carlo error of the standard deviations from `known` + `sampled` blocks, as a share, in root mean square over the levels of
    the factor where it is largest: the sampled share of the variance times √(1/2n)."""
    worst = 0.0
    for own, part in zip(known, sampled, strict=True):
        share = np.einsum("aam->am", part) / np.einsum("aam->am", own + part)
        worst = max(worst, math.sqrt(float(np.mean(share**2))))
    return worst / math.sqrt(2.0 * samples)
