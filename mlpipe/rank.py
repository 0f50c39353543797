"""Which columns add to the earlier ones, and coordinates in which those that do are orthogonal (formulas R4)."""
from __future__ import annotations

import numpy as np

STRUCTURAL = 1e-12  # what a column of T must keep of an entry, relative to what was subtracted from it, to be new
COLLINEAR = 1e-11  # 1 - R² on the earlier columns, below which a column of X is dropped


def orthogonal(Q: np.ndarray, R: np.ndarray, G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The map Q R as another Q R, whose columns F Q have unit cross-products, from those of the given ones, G."""
    d = np.sqrt(np.diag(G))
    U = np.linalg.cholesky(G / np.outer(d, d)).T * d
    return np.linalg.solve(U.T, Q.T).T, np.triu(U @ R)


def new_direction(column: np.ndarray, Q: np.ndarray) -> tuple[np.ndarray, float] | None:
    """The unit vector of what a column of T adds to the span of Q, and its length; None where nothing."""
    norm = np.linalg.norm(column)
    if norm == 0.0:
        return None
    v, size = column / norm, np.abs(column / norm)
    for _ in range(2):
        along = Q.T @ v
        v, size = v - Q @ along, size + np.abs(Q) @ np.abs(along)
    v[np.abs(v) <= STRUCTURAL * size] = 0.0
    left = np.linalg.norm(v)
    return (np.asarray(v / left), float(left * norm)) if left > 0 else None


def adds(gram: np.ndarray, Q: np.ndarray, v: np.ndarray) -> bool:
    """Whether the data column of v is more than COLLINEAR away from the span of those of Q."""
    size = float(v @ gram @ v)
    if size <= 0.0:
        return False
    if not Q.shape[1]:
        return True
    G, g = Q.T @ gram @ Q, Q.T @ gram @ v
    d = np.sqrt(np.diag(G))
    half = np.linalg.solve(np.linalg.cholesky(G / np.outer(d, d)), g / d)
    return bool(size - half @ half > COLLINEAR * size)


def determined(G: np.ndarray) -> bool:
    """Whether several columns with these cross-products are so far from repeating each other that they can be made orthogonal."""
    d = np.sqrt(np.diag(G))
    return len(d) > 1 and bool(d.min() > 0 and np.linalg.eigvalsh(G / np.outer(d, d))[0] > COLLINEAR)


def column_rank(T: np.ndarray) -> int:
    """The number of columns of T that add to the earlier ones."""
    Q = np.zeros((len(T), 0))
    for column in T.T:
        found = new_direction(column, Q)
        if found is not None:
            Q = np.column_stack([Q, found[0]])
    return Q.shape[1]
