"""Least squares and its robust covariances by whole matrices: the obvious versions."""
from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np


def bread(X: np.ndarray, w: np.ndarray) -> np.ndarray:
    """(X'WX)⁻¹."""
    return np.asarray(np.linalg.inv(X.T @ (X * w[:, None])))


def coefficients(X: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Weighted least squares."""
    return np.asarray(bread(X, w) @ (X.T @ (w * y)))


def inverse_root(A: np.ndarray) -> np.ndarray:
    """The symmetric inverse square root, zero along null directions."""
    values, vectors = np.linalg.eigh(A)
    kept = values > 1e-9
    return np.asarray((vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T)


def rows_covariance(X: np.ndarray, y: np.ndarray, w: np.ndarray, kind: str, k: int = 0) -> np.ndarray:
    """HC0 to HC3 of √w X; `k` further coefficients for HC1."""
    B, root = bread(X, w), np.sqrt(w)
    Xs, e = X * root[:, None], root * (y - X @ coefficients(X, y, w))
    h = np.einsum("ij,jk,ik->i", Xs, B, Xs)
    n, p = X.shape
    u = e**2 * {"HC0": 1.0, "HC1": n / (n - p - k), "HC2": 1.0 / (1.0 - h), "HC3": 1.0 / (1.0 - h) ** 2}[kind]
    return np.asarray(B @ (Xs.T @ (Xs * u[:, None])) @ B)


def clusters_covariance(
    X: np.ndarray, y: np.ndarray, w: np.ndarray, groups: list[np.ndarray], kind: str, counted: int | None = None
) -> np.ndarray:
    """CR0 to CR2, in several ways by inclusion and exclusion; `counted` coefficients in CR1's factor."""
    total = np.zeros((X.shape[1],) * 2)
    for size in range(1, len(groups) + 1):
        for chosen in combinations(groups, size):
            code = np.unique(np.column_stack(chosen), axis=0, return_inverse=True)[1].ravel()
            total += (1.0 if size % 2 else -1.0) * one_way(X, y, w, code, kind, counted)
    return total


def one_way(X: np.ndarray, y: np.ndarray, w: np.ndarray, code: np.ndarray, kind: str, counted: int | None) -> np.ndarray:
    """CR0 to CR2 with one clustering, each cluster's leverage matrix written out."""
    B, root = bread(X, w), np.sqrt(w)
    Xs, e = X * root[:, None], root * (y - X @ coefficients(X, y, w))
    meat = np.zeros_like(B)
    for g in np.unique(code):
        rows = code == g
        A = inverse_root(np.eye(rows.sum()) - Xs[rows] @ B @ Xs[rows].T) if kind == "CR2" else np.eye(rows.sum())
        v = Xs[rows].T @ A @ e[rows]
        meat += np.outer(v, v)
    n, p, G = len(y), X.shape[1] if counted is None else counted, len(np.unique(code))
    return np.asarray(B @ meat @ B * (G / (G - 1) * (n - 1) / (n - p) if kind == "CR1" else 1.0))


def dummies(*codes: np.ndarray) -> np.ndarray:
    """Indicators of all factors' levels, columns that repeat others left out."""
    kept: list[np.ndarray] = []
    every = [c == level for c in codes for level in np.unique(c)]
    for column in every:
        trial = np.column_stack([*kept, column.astype(float)])
        if np.linalg.matrix_rank(trial) == trial.shape[1]:
            kept.append(column.astype(float))
    return np.column_stack(kept)


def partialled(D: np.ndarray, w: np.ndarray, X: np.ndarray) -> np.ndarray:
    """X less its weighted projection on D."""
    root = np.sqrt(w)
    return np.asarray(X - D @ np.linalg.lstsq(D * root[:, None], (X.T * root).T, rcond=None)[0])


def columns(frame: Any, *names: str) -> np.ndarray:
    """Columns side by side."""
    return np.column_stack([frame[name].to_numpy().astype(float) for name in names])
