"""Robust covariances: V = B M B with B the inverse of X'WX and M, the meat, a sum over clusters or rows.

White (1980) and MacKinnon and White (1985) for rows (HC0 to HC3), Liang and Zeger (1986) for clusters (CR0, CR1), Bell and McCaffrey
(2002) for CR2, Cameron, Gelbach and Miller (2011) for clusters in several ways.
"""
from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]
T = TypeVar("T")

CERTAIN = 1e-10  # 1 minus a leverage, below which rows or directions are fitted exactly: their residuals are zero and stay so
HC = ("HC0", "HC1", "HC2", "HC3")
LEVERED = ("HC2", "HC3")  # those that need the leverages of rows
CR = ("CR0", "CR1", "CR2")


def half(bread: Array) -> Array:
    """A factor L (p, p) with LL' = bread."""
    d = np.sqrt(np.diag(bread))
    return np.asarray(np.linalg.cholesky(bread / np.outer(d, d)) * d[:, None]) if len(bread) else bread


def corrected(scores: Array, grams: Array, L: Array, *, whole: bool = False) -> Array:
    """X_g'(I - H_g)^(-1/2) e_g (p, B) of clusters from their scores X_g'e_g (p, B) and X_g'X_g (p, p, B), H_g = X_g LL' X_g'; with the
    `whole` inverse, X_g'(I - H_g)⁻¹ e_g.

    With L'X_g'X_gL = U diag(d) U' this is v + X_g'X_g L U diag(((1 - d)^(-1/2) - 1) / d) U'L'v: no matrix of a cluster's rows is formed.
    Directions with d = 1 have no residual (the pseudo-inverse of Pustejovsky and Tipton 2018).
    """
    M = np.moveaxis(grams, -1, 0)
    d, U = np.linalg.eigh(L.T @ M @ L)
    d = np.clip(d, 0.0, 1.0)
    left = np.maximum(1.0 - d, CERTAIN)
    root = np.sqrt(left)
    more = 1.0 / left if whole else 1.0 / (root * (1.0 + root))  # ((1 - d)^(-1/2) - 1) / d, or with -1, without cancellation
    factor = np.where(1.0 - d > CERTAIN, more, -1.0)
    along = factor * np.einsum("bij,ib->bj", L @ U, scores)
    return np.asarray(scores + np.einsum("bij,bj->ib", M @ L @ U, along))


def row_meat(X: Array, e: Array, L: Array, kind: str, freq: Array | None = None, absorbed: Array | float = 0.0) -> Array:
    """Σ x x' e² / (1 - h)^k over rows (p, n) with leverages h = |L'x|² + `absorbed`, those of effects taken out of x; k = 0 (HC0, HC1), 1
    (HC2), 2 (HC3); `freq`: rows that stand for several."""
    squares = e**2
    if kind in LEVERED:
        left = 1.0 - ((L.T @ X) ** 2).sum(axis=0) - absorbed
        fitted = left < CERTAIN
        left = np.where(fitted, 1.0, left)
        squares = np.where(fitted, 0.0, squares / (left if kind == "HC2" else left**2))
    return np.asarray((X * (squares if freq is None else squares * freq)) @ X.T)


def row_factor(kind: str, n: float, k: float) -> float:
    """The factor of a row meat: n / (n - k) for HC1."""
    return n / (n - k) if kind == "HC1" else 1.0


def cluster_factor(kind: str, clusters: float, n: float, k: float) -> float:
    """The factor of a cluster meat: G/(G - 1) (n - 1)/(n - k) for CR1."""
    return clusters / max(clusters - 1.0, 1.0) * (n - 1.0) / (n - k) if kind == "CR1" else 1.0


def ways(keys: Sequence[T]) -> list[tuple[tuple[T, ...], float]]:
    """The clusterings whose meats add up to that of several ways, with their signs: every non-empty set of keys, + for odd sizes."""
    return [(chosen, 1.0 if size % 2 else -1.0) for size in range(1, len(keys) + 1) for chosen in combinations(keys, size)]


def covariance(bread: Array, meat: Array) -> Array:
    """bread · meat · bread, symmetric."""
    out = bread @ meat @ bread
    return np.asarray((out + out.T) / 2.0)
