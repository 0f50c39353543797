"""Linear algebra on many small matrices at once: arrays (q, q, B) with the block index last, loops over q only."""
from __future__ import annotations

import numpy as np

from .link import Array

ZERO: Array = np.zeros(())  # what sums of arrays start from


def cholesky(H: Array) -> Array:
    """Lower factors L (q, q, B) with LL' = H; NaN for blocks that are not positive definite."""
    q = len(H)
    L = np.zeros_like(H)
    with np.errstate(invalid="ignore", divide="ignore"):
        for j in range(q):
            pivot = H[j, j] - (L[j, :j] ** 2).sum(axis=0)
            L[j, j] = np.sqrt(np.where(pivot > 0.0, pivot, np.nan))
            for i in range(j + 1, q):
                L[i, j] = (H[i, j] - (L[i, :j] * L[j, :j]).sum(axis=0)) / L[j, j]
    return L


def multiply(L: Array, v: Array) -> Array:
    """L v for v (q, B) or (q, k, B)."""
    out = np.empty_like(v)
    for i in range(len(L)):
        out[i] = sum((L[i, j] * v[j] for j in range(i + 1)), ZERO)
    return out


def forward(L: Array, v: Array) -> Array:
    """L⁻¹v for v (q, B) or (q, k, B)."""
    out = np.empty_like(v)
    for i in range(len(L)):
        rest = v[i]
        for j in range(i):
            rest = rest - L[i, j] * out[j]
        out[i] = rest / L[i, i]
    return out


def backward(L: Array, v: Array) -> Array:
    """L⁻ᵀv for v (q, B) or (q, k, B)."""
    out = np.empty_like(v)
    for i in reversed(range(len(L))):
        rest = v[i]
        for j in range(i + 1, len(L)):
            rest = rest - L[j, i] * out[j]
        out[i] = rest / L[i, i]
    return out


def solve(L: Array, v: Array) -> Array:
    """(LL')⁻¹v."""
    return backward(L, forward(L, v))


def inverse_factor(L: Array) -> Array:
    """L⁻¹ (q, q, B), lower."""
    q, blocks = len(L), L.shape[2]
    return forward(L, np.repeat(np.eye(q)[:, :, None], blocks, axis=2))


def logdet(L: Array) -> Array:
    """log|LL'| (B,)."""
    return np.asarray(2.0 * np.log(np.einsum("iib->ib", L)).sum(axis=0))


def flat(values: Array) -> Array:
    """(q, k, m) per level -> (m q, k) over single effects."""
    return np.ascontiguousarray(values.transpose(2, 0, 1).reshape(-1, values.shape[1]))


def per_level(values: Array, q: int) -> Array:
    """The inverse of `flat`: (m q, k) -> (q, k, m)."""
    return values.reshape(-1, q, values.shape[1]).transpose(1, 2, 0)
