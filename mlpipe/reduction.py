"""Statistics over features -> the solver's problem in well-conditioned coordinates, and the way back (formulas R4).

A design matrix is features @ T with a small exact T. The solver works on features @ Q, Q an orthonormal basis of T's
columns: whatever far-off shifts or wild scales T holds, they come back through triangular maps only at the very end.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from .blocks import Clusters
from .design import (
    Atom,
    DesignColumn,
    Level,
    Variable,
    called,
    categorical,
    check_orders,
    code,
    level_label,
    variables_of,
    with_contrasts,
    with_levels,
)
from .errors import ConfigError, DataError, FormulaError
from .expr import columns as columns_of
from .expr import label
from .features import Recipe
from .formula import Formula, RandomTerm, Term, parse_expression
from .outcome import response_label
from .rank import adds, column_rank, determined, new_direction, orthogonal
from .solve.blocks import BlockChunk, pseudo_blocks
from .solve.likelihood import LMMProblem
from .stats import SuffStats, full_map


@dataclass(frozen=True)
class Spread:
    """The covariance of a fit's coefficients: `star` (p, p), of those of the columns F Q (features, p), where X = F Q R.

    There it keeps its digits. Of columns far from zero, such as the square of a year, `raw` is for the most part cancellation: what
    averages over rows, predicts or deletes starts from `star`.
    """

    Q: np.ndarray
    R: np.ndarray
    star: np.ndarray

    @cached_property
    def raw(self) -> np.ndarray:
        """The covariance (p, p) of the user's coefficients."""
        half = np.linalg.solve(self.R, self.star)
        out = np.linalg.solve(self.R, half.T)
        return np.asarray((out + out.T) / 2.0)

    def of(self, star: np.ndarray) -> Spread:
        """Another covariance of the same coefficients."""
        return replace(self, star=(star + star.T) / 2.0)

    def between(self, L: np.ndarray) -> np.ndarray:
        """The covariance (k, k) of Lβ for L (k, p) over the user's coefficients."""
        half = np.linalg.solve(self.R.T, L.T).T
        return np.asarray(half @ self.star @ half.T)

    def half(self, L: np.ndarray) -> np.ndarray:
        """A factor H (k, p) of it, HH': with the digits of what varies little beside what varies much."""
        values, vectors = np.linalg.eigh(self.star)
        return np.asarray(np.linalg.solve(self.R.T, L.T).T @ (vectors * np.sqrt(np.maximum(values, 0.0))))


@dataclass(frozen=True)
class Fixed:
    """The fixed part: names of kept and dropped columns, X = F T, T = Q R with Q'Q = I."""

    names: tuple[str, ...]
    dropped: tuple[str, ...]
    T: np.ndarray
    Q: np.ndarray
    R: np.ndarray

    def spread(self, star: np.ndarray) -> Spread:
        """What is known of coefficients whose covariance over F Q is `star` (p, p)."""
        return Spread(self.Q, self.R, (star + star.T) / 2.0)


@dataclass(frozen=True)
class Random:
    """One random term: Z = F_z T, T = Q R; coefficients b = R⁻¹ b*, covariance R⁻¹ Ψ* R⁻ᵀ."""

    group: str
    names: tuple[str, ...]
    Q: np.ndarray
    R: np.ndarray

    def raw(self, lambda_star: np.ndarray) -> np.ndarray:
        """The lower factor, diagonal >= 0, of the covariance in the user's coordinates."""
        return lower_factor(np.linalg.solve(self.R, lambda_star))


@dataclass(frozen=True)
class Reduced:
    """A model over statistics: the solver's problem and the maps back to the user's coordinates.

    `scale`, `offset`: y = scale * y* + X* offset for the solver's response y* and columns X*.
    """

    problem: LMMProblem
    fixed: Fixed
    random: tuple[Random, ...]
    recipe: Recipe
    scale: float
    offset: np.ndarray
    response: str

    def beta(self, beta_star: np.ndarray) -> np.ndarray:
        """Coefficients (p,) in the user's coordinates."""
        return np.asarray(np.linalg.solve(self.fixed.R, self.scale * beta_star + self.offset))

    def objective(self, value: float) -> float:
        """-2 log-likelihood (or REML criterion) of the response and columns as the user has them."""
        p = len(self.fixed.names)
        rows = self.problem.n - (p if self.problem.reml else 0)
        value += 2 * rows * np.log(self.scale)
        return float(value + (2 * np.log(np.abs(np.diag(self.fixed.R))).sum() if self.problem.reml else 0.0))

    def factors(self, lambda_star: np.ndarray) -> list[np.ndarray]:
        """The relative covariance factor of each random term in the user's coordinates."""
        return [term.raw(block) for term, block in zip(self.random, self.split(lambda_star), strict=True)]

    def split(self, lambda_star: np.ndarray) -> list[np.ndarray]:
        """The diagonal blocks of the solver's Λ, one per random term."""
        stops = np.cumsum([0, *self.problem.sizes])
        return [lambda_star[a:b, a:b] for a, b in zip(stops[:-1], stops[1:], strict=True)]

    def star(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """The solver's Λ for factors in the user's coordinates (the inverse of `factors`)."""
        q = sum(self.problem.sizes)
        out, at = np.zeros((q, q)), 0
        for term, factor in zip(self.random, factors, strict=True):
            k = len(factor)
            out[at : at + k, at : at + k] = lower_factor(term.R @ factor)
            at += k
        return out

    def theta_star(self, theta: Sequence[float]) -> np.ndarray:
        """The solver's theta for one in the user's coordinates, lower triangles by column, terms in order."""
        return theta_of(self.split(self.star(start_factors(theta, self.problem.sizes))))

    def linear_predictor(self, beta_star: np.ndarray) -> np.ndarray:
        """The combination of features (F,) that is X beta, in the units of y."""
        return np.asarray(self.fixed.Q @ (self.scale * beta_star + self.offset))


def theta_of(factors: Sequence[np.ndarray]) -> np.ndarray:
    """The free elements of lower triangular factors by column, one term after the other (lme4's order)."""
    return np.concatenate([f.T[np.triu_indices(len(f))] for f in factors]) if factors else np.zeros(0)


def lower_factor(a: np.ndarray) -> np.ndarray:
    """The lower triangular L with non-negative diagonal and LL' = aa' (LQ; exact for singular a)."""
    r = np.asarray(np.linalg.qr(a.T, mode="r")).T
    return np.asarray(np.tril(r * np.where(np.diag(r) < 0, -1.0, 1.0)))


def response_vector(recipe: Recipe, response: str) -> np.ndarray:
    """The combination of features (F,) that is the response."""
    shift, scale = recipe.coordinates.scalings[Atom(response, "1")]
    out = np.zeros(len(recipe.features))
    out[recipe.features.index((Atom(response, "1"),))] = scale
    if shift:
        out[recipe.features.index(())] = shift
    for feature, coefficient in recipe.explained.items():
        out[recipe.features.index(feature)] += coefficient
    return out


def reduce(stats: SuffStats, parts: Coded, *, reml: bool) -> Reduced:
    """The solver's problem for the parts of a formula over statistics."""
    problem = LMMProblem(
        chunks=_chunks(stats, stats.recipe, parts.random, parts.W),
        A=parts.W.T @ stats.gram @ parts.W,
        n=stats.n,
        sum_log_w=stats.sum_log_w,
        sizes=tuple(len(term.names) for term in parts.random),
        reml=reml,
    )
    return Reduced(problem, parts.fixed, parts.random, stats.recipe, parts.scale, parts.offset, parts.response)


class Coded(NamedTuple):
    """A formula over collected features: `W` (features, p + 1) gives [X* y*]; `scale`, `offset` as in Reduced."""

    fixed: Fixed
    random: tuple[Random, ...]
    W: np.ndarray
    scale: float
    offset: np.ndarray
    response: str

    def pooled(self, stats: SuffStats) -> Pooled:
        """Least squares of the fixed effects alone."""
        A, p = self.W.T @ stats.gram @ self.W, len(self.fixed.names)
        d = np.sqrt(np.diag(A))[:p]
        beta = np.linalg.solve(A[:p, :p] / np.outer(d, d), A[:p, p] / d) / d if p else np.zeros(0)
        v = np.append(-beta, 1.0)
        return Pooled(self.fixed.Q @ (self.scale * beta + self.offset), float(v @ A @ v / A[-1, -1]))


class Pooled(NamedTuple):
    """`gamma` (features,): what fixed effects alone explain; `left`: the share of the response's sum of squares that they leave."""

    gamma: np.ndarray
    left: float


def _constant(stats: SuffStats, response: str, left: np.ndarray) -> bool:
    """Whether the response has one value, of which the constant leaves nothing but rounding: the same in all rows, and tiny."""
    features, gram, target = stats.recipe.features, stats.gram, response_vector(stats.recipe, response)
    if () not in features or left @ gram @ left > 2.0**-80 * (target @ gram @ target):
        return False
    one, own = features.index(()), features.index((Atom(response, "1"),))
    return bool(gram[own, own] - gram[one, own] ** 2 / gram[one, one] <= 1e-12 * gram[own, own])


def coded(
    stats: SuffStats, formula: Formula, contrasts: Mapping[str, str] | None, levels: Mapping[str, Sequence[Any]] | None
) -> Coded:
    """The maps of a formula's parts over statistics collected for it or for a larger model.

    `contrasts`, `levels`: other codings and level orders than those the statistics were collected with.
    Raises DataError where the statistics lack a term, the response or the grouping factor.
    """
    coding = Coding(stats.recipe, formula, contrasts, levels or {})
    recipe = stats.recipe
    response = responses_of(recipe, formula)
    target = response_vector(recipe, response)
    fixed = fixed_part(stats, coding.columns(formula.fixed), recipe)
    offset = np.linalg.lstsq(fixed.Q, target, rcond=None)[0]
    t = target - fixed.Q @ offset
    scale = float(np.sqrt(max(t @ stats.gram @ t, 0.0) / stats.n))
    if scale == 0.0 or _constant(stats, response, t):
        raise DataError("the response is fitted exactly by the fixed effects", code="no_residual")
    random = tuple(random_part(stats, bar, coding.columns(bar.terms), recipe) for bar in formula.random)
    return Coded(fixed, random, np.column_stack([fixed.Q, t / scale]), scale, offset, response)


class Coding:
    """A formula's variables over collected ones: each factor may be coded anew over the same collected levels."""

    def __init__(
        self, recipe: Recipe, formula: Formula, contrasts: Mapping[str, str] | None, levels: Mapping[str, Sequence[Any]]
    ) -> None:
        for name in (name for node in formula.variables for name in columns_of(node)):
            if name not in recipe.kinds:
                raise DataError(f"the statistics hold nothing of the column {name!r}", code="not_collected", column=name)
        own = variables_of(formula, recipe.kinds, None)
        known = {name for v in categorical(own) for name in (v.label, *columns_of(v.expression))}
        kept = {name: kind for name, kind in (recipe.contrasts or {}).items() if name in known} if contrasts is None else contrasts
        self.variables: dict[str, Variable] = {}
        self.collected: dict[str, str] = {}
        check_orders(levels, own)
        for variable in with_contrasts(own, kept):
            base = self._base(recipe, variable)
            self.collected[variable.label] = base.label
            self.variables[variable.label] = with_levels(variable, _ordered(base, variable, levels)) if base.kind == "category" else base

    def _base(self, recipe: Recipe, variable: Variable) -> Variable:
        """The collected variable of the same label, else the same factor under another coding."""
        collected = [held for held in recipe.variables.values() if held.kind == variable.kind and held.label not in recipe.responses]
        same = [held for held in collected if held.label == variable.label]
        same += [held for held in collected if held.kind == "category" and held.expression == variable.expression]
        if same:
            return same[0]
        raise DataError(f"the statistics hold nothing of the term {variable.label}", code="not_collected")

    def columns(self, terms: Sequence[Term]) -> tuple[DesignColumn, ...]:
        """The coded columns, over the collected variables' atoms."""
        return tuple(
            replace(column, combination=tuple((tuple(sorted(map(self._atom, m))), weight) for m, weight in column.combination))
            for column in code(terms, self.variables)
        )

    def _atom(self, atom: Atom) -> Atom:
        return Atom(self.collected[atom.variable], atom.part)


def _ordered(base: Variable, variable: Variable, levels: Mapping[str, Sequence[Any]]) -> tuple[Level, ...]:
    named = next((levels[name] for name in called(variable) if name in levels), None)
    if named is None:
        return base.levels
    rank = {level_label(level): i for i, level in enumerate(named)}
    for level in base.levels:
        if level_label(level) not in rank:
            raise DataError(f"the factor {variable.label} has the level {level_label(level)!r}, which is not among the given levels")
    return tuple(sorted(base.levels, key=lambda level: rank[level_label(level)]))


def responses_of(recipe: Recipe, formula: Formula) -> str:
    """The label of the formula's response among the collected ones. Raises DataError where it is not one of them, or less other offsets."""
    if formula.response is None:
        raise FormulaError("the formula has no response", hint="write it as response ~ terms")
    response = response_label(label(formula.response))
    if response not in recipe.responses:
        held = ", ".join(r.removesuffix(" ~") for r in recipe.responses)
        raise DataError(f"the statistics hold no response {label(formula.response)}", code="not_collected", hint=f"they hold {held}")
    _check_offsets(recipe, formula)
    return response


def _check_offsets(recipe: Recipe, formula: Formula) -> None:
    """Responses were summed less the offsets of the collected formula and `offset=`, which a formula may state or leave out."""
    held, asked = Counter(recipe.formula.offsets), Counter(formula.offsets)
    settled = Counter([parse_expression(recipe.offset)] if recipe.offset else [])
    if asked in (held, held + settled):
        return
    terms = " + ".join(f"offset({label(node)})" for node in recipe.formula.offsets) or "no offset"
    raise DataError(f"the statistics were collected with {terms}", code="not_collected", hint="a formula over them has the same offsets")


class Gram(Protocol):
    """Cross-products (features, features) of `n` rows."""

    @property
    def gram(self) -> np.ndarray: ...

    @property
    def n(self) -> float: ...


def fixed_part(stats: Gram, columns: Sequence[DesignColumn], recipe: Recipe, *, constant: bool = True) -> Fixed:
    """Keeps each column that adds to the earlier ones, as lme4 does: later ones go. Without `constant`, columns are as far as they are no
    multiple of it: the effects of absorbed factors have that part."""
    T = recipe.matrix(columns)
    if not constant:
        T[recipe.features.index(())] = 0.0
    kept: list[int] = []
    lengths: list[float] = []
    Q = np.zeros((len(T), 0))
    for j in range(T.shape[1]):
        found = new_direction(T[:, j], Q)
        if found is not None and adds(stats.gram, Q, found[0]):
            Q = np.column_stack([Q, found[0]])
            kept.append(j)
            lengths.append(found[1])
    names = tuple(columns[j].name for j in kept)
    dropped = tuple(column.name for j, column in enumerate(columns) if j not in kept)
    R = np.triu(Q.T @ T[:, kept], 1) + np.diag(lengths)
    if kept:
        Q, R = orthogonal(Q, R, Q.T @ stats.gram @ Q / stats.n)
    return Fixed(names, dropped, T[:, kept], Q, R)


def random_part(stats: Gram, bar: RandomTerm, columns: Sequence[DesignColumn], recipe: Recipe) -> Random:
    """The random term over the recipe's features. Raises DataError for another grouping factor, FormulaError for columns that repeat."""
    if tuple(bar.groups) not in (recipe.factors or (recipe.groups,)):
        held = ", ".join(":".join(groups) for groups in recipe.factors or (recipe.groups,)) or "no grouping factor"
        raise DataError(f"the statistics are over {held}, not {bar.group_label}", code="not_collected")
    T = recipe.matrix(columns)
    rest = np.delete(np.arange(len(T)), list(recipe.z))
    if np.abs(T[rest]).max(initial=0.0) > 0.0:
        raise DataError(f"the statistics hold no per-block sums for the random term ({bar.text})", code="not_collected")
    Q, R = np.linalg.qr(T[list(recipe.z)])
    if T.shape[1] > len(recipe.z) or column_rank(T) < T.shape[1]:
        raise FormulaError(f"the columns of the random term ({bar.text}) repeat each other", code="random_rank")
    G = Q.T @ stats.gram[np.ix_(recipe.z, recipe.z)] @ Q / stats.n
    if determined(G):  # columns that nearly repeat each other would cost the score its digits, whatever the coordinates of b
        Q, R = orthogonal(Q, R, G)
    return Random(bar.group_label, tuple(column.name for column in columns), Q, R)


class _chunks:
    """The solver's view of the blocks, re-iterable; kept where the statistics are in memory."""

    def __init__(self, stats: SuffStats, recipe: Recipe, random: Sequence[Random], W: np.ndarray) -> None:
        assert stats.blocks is not None
        self.blocks = stats.blocks
        Z = np.column_stack([term.Q for term in random])
        self.q, self.p1 = Z.shape[1], W.shape[1]
        inner = np.zeros((len(recipe.features), self.q))
        inner[list(recipe.z)] = Z
        V = full_map(recipe, Z, np.column_stack([inner, W]))
        self.S_map = V[:, : self.q].reshape(self.q * self.q, -1)
        self.C_map = V[:, self.q :].reshape(self.q * self.p1, -1)
        self.kept = list(self._made()) if self.blocks.directory is None else None

    def __call__(self) -> Iterable[BlockChunk]:
        return self.kept if self.kept is not None else self._made()

    def _made(self) -> Iterator[BlockChunk]:
        if self.blocks.clusters is not None and len(self.blocks.clusters.count):
            yield self._clusters(self.blocks.clusters)
        for sums in self.blocks.arrays():
            yield BlockChunk(self._S(sums), np.ones(sums.shape[1]), self._C(sums))

    def _S(self, sums: np.ndarray) -> np.ndarray:
        return np.asarray(self.S_map @ sums).reshape(self.q, self.q, -1)

    def _C(self, sums: np.ndarray) -> np.ndarray:
        return np.asarray(self.C_map @ sums).reshape(self.q, self.p1, -1)

    def _clusters(self, clusters: Clusters) -> BlockChunk:
        rows, owner = pseudo_blocks(clusters.count, clusters.products)
        return BlockChunk(self._S(clusters.mean()), clusters.count, self._C(rows.T), owner)


def check_levels(group: str, column: str, levels: int) -> None:
    """Raises DataError (code "one_level") where a grouping factor has fewer than two levels."""
    if levels < 2:
        raise DataError(f"the grouping factor {group} has fewer than two levels", code="one_level", column=column)


def check_separable(group: str, column: str, levels: int, coefficients: int, rows: float) -> None:
    """Raises DataError (code "unidentified") where the random effects of a term are as many as the rows, as lme4 does."""
    if levels * coefficients < rows:
        return
    what = (
        f"the grouping factor {group} has as many levels as there are rows ({rows:,.0f}): its variance and the residual one"
        if levels >= rows
        else f"a term of {coefficients} coefficients over {levels:,} levels of {group} has as many random effects as there are rows "
        f"({rows:,.0f}): their covariance and the residual variance"
    )
    hint = None if levels >= rows else "leave out coefficients, or their correlations by ||"
    raise DataError(f"{what} are not separable", code="unidentified", column=column, hint=hint)


def start_factors(theta: Sequence[float], sizes: Sequence[int]) -> list[np.ndarray]:
    """The lower triangular factors (k, k), by column in `theta`, of terms of these sizes. Raises ConfigError for anything else."""
    wanted = sum(k * (k + 1) // 2 for k in sizes)
    try:
        values = np.asarray(theta, dtype=float)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"start = {theta!r} are no numbers", code="start") from error
    if values.shape != (wanted,) or not np.isfinite(values).all():
        raise ConfigError(f"start must be the {wanted} finite numbers of theta, not {theta!r}", code="start")
    out, at = [], 0
    for k in sizes:
        out.append(np.zeros((k, k)))
        out[-1].T[np.triu_indices(k)] = values[at : at + k * (k + 1) // 2]
        at += k * (k + 1) // 2
    return out


def stacked_inverse(factors: Sequence[np.ndarray]) -> np.ndarray:
    """The inverses of square matrices, such as the R of each random term, block-diagonal."""
    size = sum(len(R) for R in factors)
    out, at = np.zeros((size, size)), 0
    for R in factors:
        k = len(R)
        out[at : at + k, at : at + k] = np.linalg.inv(R)
        at += k
    return out
