"""The random terms of a formula with several grouping factors: whose they are, and in which order a solver and a result have them."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .formula import Formula
from .levels import Levels
from .reduction import Random, check_separable, lower_factor, start_factors


@dataclass(frozen=True)
class TermOrder:
    """`levels` of every factor, `bars`: the terms over it by their places in the formula, `random`: these terms."""

    levels: tuple[Levels, ...]
    bars: tuple[tuple[int, ...], ...]
    random: tuple[Random, ...]

    @classmethod
    def of(cls, levels: Sequence[Levels], columns: Sequence[Sequence[str]], formula: Formula, random: Sequence[Random]) -> TermOrder:
        """From the levels of factors and the columns that make them."""
        bars = tuple(tuple(i for i, bar in enumerate(formula.random) if bar.groups == groups) for groups in columns)
        return cls(tuple(levels), bars, tuple(random))

    @cached_property
    def order(self) -> list[int]:
        """The factors that have terms, by falling number of random effects: the solver's order."""
        sizes = [len(levels) * sum(len(self.random[i].names) for i in bars) for levels, bars in zip(self.levels, self.bars, strict=True)]
        return [k for k in np.argsort(-np.array(sizes), kind="stable").tolist() if self.bars[k]]

    @cached_property
    def solver(self) -> list[int]:
        """The terms in the order of the solver's Λ."""
        return [i for k in self.order for i in self.bars[k]]

    @cached_property
    def sequence(self) -> list[int]:
        """The terms in lme4's order: by falling number of levels, then as they were written."""
        levels = {i: len(self.levels[k]) for k, bars in enumerate(self.bars) for i in bars}
        return sorted(levels, key=lambda i: (-levels[i], i))

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The number of coefficients of each term, by factor in the solver's order."""
        return tuple(tuple(len(self.random[i].names) for i in self.bars[k]) for k in self.order)

    def maps(self) -> list[np.ndarray]:
        """The map from random features to random effects (z, q) of each factor in the solver's order."""
        return [np.hstack([self.random[i].Q for i in self.bars[k]]) for k in self.order]

    def rows(self) -> dict[int, slice]:
        """The rows of the solver's Λ that each term has."""
        stops = np.cumsum([0, *(len(self.random[i].names) for i in self.solver)]).tolist()
        return {i: slice(a, b) for i, a, b in zip(self.solver, stops[:-1], stops[1:], strict=True)}

    def theta_places(self) -> list[int]:
        """Where the elements of the result's theta stand in the solver's."""
        stops = np.cumsum([0, *(_triangle(self.random[i]) for i in self.solver)]).tolist()
        first = dict(zip(self.solver, stops[:-1], strict=True))
        return [first[i] + k for i in self.sequence for k in range(_triangle(self.random[i]))]

    def theta_star(self, theta: Sequence[float]) -> np.ndarray:
        """The solver's theta for one in the user's coordinates and lme4's order. Raises ConfigError where it is none."""
        lowers = start_factors(theta, [len(self.random[i].names) for i in self.sequence])
        stars = {i: lower_factor(self.random[i].R @ lower) for i, lower in zip(self.sequence, lowers, strict=True)}
        return np.concatenate([stars[i].T[np.triu_indices(len(stars[i]))] for i in self.solver])

    def check_separable(self, rows: float) -> None:
        """Raises DataError (code "unidentified") where a term has as many random effects as there are rows."""
        for k, sizes in zip(self.order, self.sizes, strict=True):
            levels = self.levels[k]
            check_separable(levels.group, levels.columns[0], len(levels), max(sizes), rows)

    def nested(self, cells: dict[tuple[int, int], int]) -> list[str]:
        """Which factors lie within which, from how many pairs of levels occur of two factors in the solver's order: as many as levels."""
        out = []
        for (a, b), count in cells.items():
            inner, outer = self.levels[self.order[a]], self.levels[self.order[b]]
            if count == len(inner) and not set(outer.columns) <= set(inner.columns):
                out.append(f"every level of {inner.group} lies within one of {outer.group}: nested, and fitted as such")
        return out


def _triangle(term: Random) -> int:
    return len(term.names) * (len(term.names) + 1) // 2
