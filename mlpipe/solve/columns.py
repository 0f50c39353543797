"""Columns of Λ that a search by scores alone holds at zero.

-2ℓ is even in a column of Λ, so that near zero its score is about as small as the column and the average information smaller still: where
the column should vanish, Newton's steps turn it around again and again. Whether zero is right the score of its elements at a small
diagonal tells, as much of ∂(-2ℓ)/∂Ψ as there is to know (FORMULAS R2).
"""
from __future__ import annotations

import math

import numpy as np

from .link import Array
from .several_factors import SeveralFactors, spans

LARGEST = 1.0  # size of a column, in units of what a level tells, up to which it may be taken for zero
GAIN = 1e-2  # of -2ℓ, about, for which a column leaves zero
MOST_TRIES = 2  # times that a column is held


class Columns:
    """The columns of more than one element of a problem's Λ: `typical` (q, q) Z'wZ of a level, `levels` of each row's factor, `floor`
    (q,) of the diagonal."""

    def __init__(self, problem: SeveralFactors, typical: Array, levels: Array, floor: Array) -> None:
        self.terms = spans(tuple(size for sizes in problem.terms for size in sizes))
        self.typical, self.levels, self.floor = typical, levels, floor
        self.places = [[k for k, (_, column) in enumerate(problem.entries) if column == j] for j in range(len(typical))]
        self.tries = np.zeros(len(typical), dtype=int)
        self.zero: set[int] = set()

    def held(self, count: int) -> np.ndarray:
        """Which elements (count,) are held."""
        out = np.zeros(count, dtype=bool)
        for j in self.zero:
            out[self.places[j]] = True
        return out

    def shut(self, theta: Array, s: Array, step: Array) -> Array | None:
        """theta with a column at its floor that the score s would shrink and the step turns around, None where there is none."""
        for j, at in enumerate(self.places):
            if len(at) == 1 or j in self.zero or self.tries[j] >= MOST_TRIES or float(s[at] @ theta[at]) >= 0.0:
                continue
            T = self.typical[j : j + len(at), j : j + len(at)]
            if theta[at] @ T @ theta[at] < LARGEST**2 and float(theta[at] @ T @ (theta[at] + step[at])) <= 0.0:
                self.zero.add(j)
                self.tries[j] += 1
                return self._at(theta, j, np.zeros(len(at)))
        return None

    def opened(self, theta: Array, s: Array) -> Array | None:
        """theta with a column off zero where that lowers -2ℓ, in the direction that lowers it most; None where none does."""
        for j in sorted(self.zero):
            at = self.places[j]
            unit = 1.0 / np.sqrt(np.maximum(np.diag(self.typical)[j : j + len(at)], 1e-300))
            G = self._gradient(theta, s, j) * np.outer(unit, unit)
            values, vectors = np.linalg.eigh(G)
            if values[0] < 0.0 and values[0] ** 2 / (4.0 * self.levels[j]) > GAIN:
                self.zero.remove(j)
                v = vectors[:, 0] * (-1.0 if vectors[0, 0] < 0.0 else 1.0)
                return self._at(theta, j, min(math.sqrt(-values[0] / self.levels[j]), LARGEST / 2.0) * unit * v)
        return None

    def _at(self, theta: Array, j: int, column: Array) -> Array:
        out = theta.copy()
        out[self.places[j]] = column
        out[self.places[j][0]] = max(column[0], self.floor[j])
        return out

    def _gradient(self, theta: Array, s: Array, j: int) -> Array:
        """∂(-2ℓ)/∂Ψ over the rows of column j, from s = -tril(GΛ), column by column from the last."""
        end = next(term.stop for term in self.terms if term.start <= j < term.stop)
        G = np.zeros((end - j, end - j))
        for k in reversed(range(j, end)):
            at, a = self.places[k], k - j
            column, below = theta[at], slice(a + 1, None)
            G[below, a] = G[a, below] = (-s[at][1:] - G[below, below] @ column[1:]) / column[0]
            G[a, a] = (-s[at][0] - G[a, below] @ column[1:]) / column[0]
        return G
