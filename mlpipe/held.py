"""What a linear fit keeps of its statistics, so that the next question needs no new scan."""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .reduction import Fixed, Random, Reduced
    from .solve.crossed import CrossedProblem
    from .solve.likelihood import LMMProblem
    from .stats import SuffStats


@dataclass(frozen=True)
class Held:
    """A fit's statistics and its model over them, in the solver's coordinates: y = scale y* + X* offset.

    `stats` and the arrays of `problem` are those of the fit (a mapped file lives as long); nothing is copied. `random`: the terms in the
    solver's order; `order`: where each of the fit's terms stands among them; `coding`: contrasts and levels that the fit was given.
    """

    stats: SuffStats
    problem: LMMProblem | CrossedProblem
    fixed: Fixed
    random: tuple[Random, ...]
    order: tuple[int, ...]
    scale: float
    offset: np.ndarray
    coding: dict[str, Any] = field(default_factory=dict)

    @property
    def terms(self) -> list[slice]:
        """Rows of the solver's Λ of each of `random`."""
        stops = np.cumsum([0, *(len(term.names) for term in self.random)]).tolist()
        return [slice(a, b) for a, b in zip(stops[:-1], stops[1:], strict=True)]

    @property
    def free(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the free elements of the solver's Λ: lower triangles by columns, term after term."""
        pairs = [(i, j) for at in self.terms for j in range(at.start, at.stop) for i in range(j, at.stop)]
        rows, columns = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
        return rows, columns

    def with_reml(self, reml: bool) -> Held:
        """The same for the restricted, or for the whole, likelihood."""
        return replace(self, problem=replace(self.problem, reml=reml))

    def lambda_(self, stars: list[np.ndarray]) -> np.ndarray:
        """The solver's Λ from the factors of the fit's terms."""
        out = np.zeros((self.terms[-1].stop,) * 2)
        for star, place in zip(stars, self.order, strict=True):
            out[self.terms[place], self.terms[place]] = star
        return out

    def in_solver_order(self, covariance: np.ndarray) -> np.ndarray:
        """The covariance of (theta, log sigma), which follows the fit's terms, by the solver's."""
        sizes = [len(term.names) * (len(term.names) + 1) // 2 for term in self.random]
        starts = np.cumsum([0, *(sizes[place] for place in self.order)])
        first = dict(zip(self.order, starts[:-1].tolist(), strict=True))
        index = np.concatenate([*(first[k] + np.arange(size) for k, size in enumerate(sizes)), [starts[-1]]]).astype(np.intp)
        return covariance[np.ix_(index, index)]

    def star_contrasts(self, L: np.ndarray) -> np.ndarray:
        """L* (k, p) with Lβ = L*β* + a constant, for L over the fit's coefficients."""
        return np.asarray(self.scale * np.linalg.solve(self.fixed.R.T, L.T).T)

    def covariance(self, star: np.ndarray) -> np.ndarray:
        """The covariance (p, p) of the fit's coefficients from that of the solver's."""
        return self.fixed.spread(star * self.scale**2).raw


def of_reduced(stats: SuffStats, reduced: Reduced, coding: dict[str, Any]) -> Held:
    """What a fit with one grouping factor keeps."""
    order = tuple(range(len(reduced.random)))
    return Held(stats, reduced.problem, reduced.fixed, reduced.random, order, reduced.scale, reduced.offset, coding)
