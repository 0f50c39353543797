"""Statistics over features -> least squares: pooled, within factors (their effects absorbed), between them."""
from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConvergenceError
from .features import Recipe
from .formula import Formula
from .levels import Levels
from .rank import COLLINEAR
from .reduction import Coding, Fixed, fixed_part, response_vector, responses_of
from .stats import SuffStats

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from .factors import Crossed
    from .solve.absorb import Cells

Array = np.ndarray


@dataclass(frozen=True)
class Projection:
    """What is left of the features' cross-products once the effects of factors are taken out (`gram`), the `rank` of these factors
    together, and with several of them the levels and their effects on every feature, and their `cells`."""

    gram: Array
    groups: tuple[str, ...] = ()
    rank: int = 0
    effects: tuple[tuple[Levels, Array], ...] = ()
    notes: tuple[str, ...] = ()
    cells: Cells | None = None

    @property
    def n(self) -> float:
        """For `fixed_part`: the scale of the cross-products does not matter."""
        return 1.0

    def counted(self, apart: Collection[str]) -> int:
        """The rank of the constant and of the effects of the factors that are not `apart`; 0 where nothing is absorbed."""
        kept = [k for k, group in enumerate(self.groups) if group not in apart]
        if len(kept) == len(self.groups):
            return self.rank
        if not kept:
            return 1
        assert self.cells is not None
        return self.cells.among(kept).rank()[0]


@dataclass(frozen=True)
class Solution:
    """A fit in the solver's coordinates: `beta` (p,) of columns F Q, `gamma` (F,) with F gamma = X beta (the mean effect of what is
    absorbed included), `e` (F,) the residual over features, `rss` and `tss`, the latter about the mean where there is one."""

    fixed: Fixed
    beta: Array
    gamma: Array
    e: Array
    bread: Array
    rss: float
    tss: float
    centred: bool
    within_tss: float
    absorbed: tuple[str, ...]
    response: str

    @property
    def coefficients(self) -> Array:
        """In the user's coordinates."""
        return np.asarray(np.linalg.solve(self.fixed.R, self.beta)) if len(self.beta) else np.zeros(0)

    def raw(self, covariance: Array) -> Array:
        """A covariance (p, p) in the user's coordinates."""
        return self.fixed.spread(covariance).raw


def pooled(stats: SuffStats) -> Projection:
    """Nothing taken out."""
    return Projection(stats.gram)


def block_products(stats: SuffStats, weight: Callable[[Array], Array]) -> Array:
    """Σ weight(n) s s' (F, F) over the blocks of one grouping factor, s their sums of features and n of the constant."""
    recipe = stats.recipe
    constant = recipe.features.index(())
    where = {pair: k for k, pair in enumerate(recipe.pairs())}
    at = [where[(constant, j)] if (constant, j) in where else where[(j, constant)] for j in range(len(recipe.features))]
    out = np.zeros((len(at), len(at)))
    assert stats.blocks is not None
    if (clusters := stats.blocks.clusters) is not None and len(clusters.count):
        out += np.einsum("gij,g->ij", clusters.products[:, at][:, :, at], weight(clusters.mean()[at[constant]]))
    for sums in stats.blocks.arrays():
        s = sums[at]
        out += (s * weight(s[constant])) @ s.T
    return out


def within(stats: SuffStats) -> Projection:
    """The effects of the statistics' grouping factors taken out: X'X - Σ s s'/n for one, by conjugate gradients for several.

    Raises ConvergenceError where these do not reach their tolerance.
    """
    recipe = stats.recipe
    constant = recipe.features.index(())
    if stats.crossed is None:
        assert stats.blocks is not None
        found = Projection(stats.gram - block_products(stats, lambda n: 1.0 / n), (":".join(recipe.groups),), stats.blocks.n_blocks)
    else:
        found = _within_several(stats)
    gram = found.gram.copy()
    gram[constant] = gram[:, constant] = 0.0  # exactly taken out
    return replace(found, gram=gram)


def cells_of(stats: SuffStats) -> tuple[Cells, list[Array]]:
    """The weights of levels and pairs of levels of several factors, and per factor the sums of features (m, F)."""
    from .solve.absorb import Cells

    crossed, recipe = stats.crossed, stats.recipe
    assert crossed is not None
    constant, pairs = recipe.features.index(()), {pair: k for k, pair in enumerate(recipe.pairs())}
    at = [pairs[(constant, j)] if (constant, j) in pairs else pairs[(j, constant)] for j in range(len(recipe.features))]
    sums = [factor.sums[at].T for factor in crossed.factors]
    return Cells([s[:, constant] for s in sums], _cross(crossed, constant)), sums


def _within_several(stats: SuffStats) -> Projection:
    crossed = stats.crossed
    assert crossed is not None
    cells, sums = cells_of(stats)
    solved = cells.solve(sums)
    if not solved.converged:
        raise ConvergenceError(f"the effects of {len(sums)} factors were not found in {solved.steps:,} steps of conjugate gradients")
    gram = stats.gram - sum((s.T @ effects for s, effects in zip(sums, solved.effects, strict=True)), np.zeros_like(stats.gram))
    notes = [f"effects of {' and '.join(f.levels.group for f in crossed.factors)} absorbed in {solved.steps} steps of conjugate gradients"]
    if not solved.exact:
        notes.append("redundant levels among three and more factors were counted in pairs: the degrees of freedom may be too few")
    effects = tuple((factor.levels, found) for factor, found in zip(crossed.factors, solved.effects, strict=True))
    groups = tuple(factor.levels.group for factor in crossed.factors)
    return Projection((gram + gram.T) / 2.0, groups, solved.rank, effects, tuple(notes), cells)


def _cross(crossed: Crossed, constant: int) -> dict[tuple[int, int], csr_matrix]:
    """The weights of pairs of levels, for each pair of factors."""
    from scipy.sparse import coo_matrix

    sizes, place, out = [len(factor.levels) for factor in crossed.factors], crossed.pairs.index((constant, constant)), {}
    for k in range(len(sizes)):
        for j in range(k + 1, len(sizes)):
            held = crossed.between(k, j)
            out[k, j] = coo_matrix((held.products[place].astype(float), (held.rows, held.columns)), shape=(sizes[k], sizes[j])).tocsr()
    return out


def solved(
    stats: SuffStats,
    formula: Formula,
    left: Projection,
    contrasts: Mapping[str, str] | None = None,
    levels: Mapping[str, Sequence[Any]] | None = None,
) -> Solution:
    """Least squares on what a projection leaves; columns that repeat others, or that the absorbed effects explain, are dropped.

    Raises DataError where the statistics lack a term or the response.
    """
    recipe = stats.recipe
    coding = Coding(recipe, formula, contrasts, levels or {})
    response = responses_of(recipe, formula)
    target = response_vector(recipe, response)
    columns = list(coding.columns(formula.fixed))
    absorbed: list[str] = []
    if left.groups:
        T = recipe.matrix(columns)
        kept = [j for j in range(len(columns)) if _varies(stats.gram, left.gram, T[:, j], recipe)]
        absorbed = [columns[j].name for j in range(len(columns)) if j not in kept and columns[j].name != "(Intercept)"]
        columns = [columns[j] for j in kept]
        target = _without_constant(target, recipe)
    fixed = fixed_part(left, columns, recipe, constant=not left.groups)
    offset = np.linalg.lstsq(fixed.Q, target, rcond=None)[0] if len(fixed.names) else np.zeros(0)
    t = target - fixed.Q @ offset
    A = fixed.Q.T @ left.gram @ fixed.Q
    g = fixed.Q.T @ left.gram @ t
    bread = np.linalg.inv((A + A.T) / 2.0) if len(A) else A
    step = np.linalg.solve(A, g) if len(A) else g
    e = t - fixed.Q @ step
    rss = max(float(e @ left.gram @ e), 0.0)
    beta = offset + step
    gamma = fixed.Q @ beta
    if left.groups:
        gamma = gamma + _mean_effect(stats, response_vector(recipe, response) - gamma)
    centred = bool(left.groups) or _has_constant(fixed, recipe)
    total = _without_constant(response_vector(recipe, response), recipe) if centred else response_vector(recipe, response)
    tss = _about_mean(stats.gram, total, recipe) if centred else float(total @ stats.gram @ total)
    within_tss = float(target @ left.gram @ target) if left.groups else tss
    e = response_vector(recipe, response) - gamma if not left.groups else e
    return Solution(fixed, beta, gamma, e, bread, rss, tss, centred, within_tss, tuple(absorbed), response)


def _varies(gram: Array, inside: Array, column: Array, recipe: Recipe) -> bool:
    """Whether a column varies within the absorbed factors, for its size about the mean."""
    total = _about_mean(gram, column, recipe)
    return bool(float(column @ inside @ column) > 10.0 * COLLINEAR * total > 0.0)


def _about_mean(gram: Array, column: Array, recipe: Recipe) -> float:
    if () not in recipe.features:
        return float(column @ gram @ column)
    constant = recipe.features.index(())
    v = _without_constant(column, recipe)
    return max(float(v @ gram @ v - (v @ gram[constant]) ** 2 / gram[constant, constant]), 0.0)


def _without_constant(column: Array, recipe: Recipe) -> Array:
    out = column.copy()
    if () in recipe.features:
        out[recipe.features.index(())] = 0.0
    return out


def _has_constant(fixed: Fixed, recipe: Recipe) -> bool:
    """Whether the columns span the constant."""
    if () not in recipe.features or not len(fixed.names):
        return False
    constant = np.zeros(len(recipe.features))
    constant[recipe.features.index(())] = 1.0
    found = np.linalg.lstsq(fixed.Q, constant, rcond=None)[0]
    return bool(np.abs(fixed.Q @ found - constant).max() < 1e-9)


def _mean_effect(stats: SuffStats, residual: Array) -> Array:
    """The mean of a combination of features, as a multiple of the constant."""
    constant = stats.recipe.features.index(())
    out = np.zeros(len(residual))
    out[constant] = float(stats.gram[constant] @ residual) / stats.gram[constant, constant]
    return out


def loglik(rss: float, n: float, sum_log_w: float) -> float:
    """The normal log-likelihood at its maximum (R's logLik of an lm)."""
    return -0.5 * (n * (math.log(2.0 * math.pi * rss / n) + 1.0) - sum_log_w) if rss > 0.0 else math.inf
