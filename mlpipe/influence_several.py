"""Deletion of the levels of one of several grouping factors of a linear mixed model, exactly, the variances held.

With M = I + Λ'Z'wZΛ, c = Λ'Z'wW, W = [X*, r], the cross-products of the generalized least squares are A = W'wW - c'M⁻¹c. The rows of a
level touch the random effects T: K = Λ'Z_I'wZ_IΛ over T, c_I alike. Without them M becomes M - EKE', whose inverse is (Woodbury)
M⁻¹ + M⁻¹E K(I - GK)⁻¹ E'M⁻¹ with G = (M⁻¹)_TT, so that, with U = M⁻¹c and Y = U_T - G c_I,

    A_(I) = A - W_I'wW_I + U_T'c_I + c_I'U_T - c_I'G c_I - Y'K(I - GK)⁻¹Y.

All comes from the cross-products of each combination of levels, by one grouped query.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .arrays import column
from .covariates import note_scan
from .deletion import Deletion, Part, most
from .effects import residual_vector
from .engines.base import Columns
from .errors import ResourceError
from .levels import Levels, levels_of
from .options import Options

if TYPE_CHECKING:
    import pyarrow as pa

    from .covariates import Scan
    from .result import MixedFit

    Array = np.ndarray

TOGETHER = 256  # levels whose results become one table


class Factor(NamedTuple):
    """The random effects of one factor: columns Λ'Z = `half`' F_z (features, q), the level `code` of each combination, where its effects
    begin among all."""

    half: Array
    code: np.ndarray
    start: int

    def at(self, level: np.ndarray) -> np.ndarray:
        """Where the effects (n, q) of levels (n,) are."""
        q = self.half.shape[1]
        return np.asarray(self.start + q * level[:, None].astype(np.int64) + np.arange(q))


def table(fit: MixedFit, scan: Scan, group: tuple[str, ...], top: int, options: Options | None) -> pa.Table:
    """The `top` levels of the factor of these key columns. Raises ResourceError where M or the combinations do not fit the memory limit."""
    limit = (options or fit.options or Options()).memory_bytes
    grams, keys, rows = _combinations(fit, scan, limit)
    coded = {columns: levels_of(columns, keys) for columns in fit.recipe.factors}
    factors, size = _factors(fit, coded)
    check_effects(size, limit)
    Q, R = fit.spread.Q[: fit.recipe.n_covariates], fit.spread.R
    W = np.zeros((grams.shape[1], Q.shape[1] + 1))
    W[: len(Q), :-1], W[:, -1] = Q, residual_vector(fit)
    model = Combined(grams, list(fit.recipe.z), factors, size, W)
    levels, code = coded[group]
    note_scan(fit, "influence", None)
    return most(Deletion(fit, R, model.A[:-1, :-1], fit.sigma**2, group), parts(model, levels, code, rows), top)


def check_effects(size: int, limit: int) -> None:
    """Raises ResourceError where M over `size` random effects does not fit the memory limit."""
    if 3 * 8 * size**2 > limit // 2:
        raise ResourceError(
            f"deletion of levels needs {24 * size**2 / 1e6:,.0f} MB of dense matrices over {size:,} random effects, more than half the "
            f"memory limit of {limit / 1e6:,.0f} MB", code="memory_limit", hint="raise memory_limit",
        )  # fmt: skip


def check_combinations(n: int, features: int, limit: int) -> None:
    """Raises ResourceError where the cross-products of n combinations do not fit the memory limit."""
    needed = n * 8 * features**2
    if needed > limit // 2:
        raise ResourceError(
            f"{n:,} combinations of levels need {needed / 1e6:,.0f} MB, more than half the memory limit of {limit / 1e6:,.0f} MB",
            code="memory_limit", hint="raise memory_limit",
        )  # fmt: skip


def _combinations(fit: MixedFit, scan: Scan, limit: int) -> tuple[Array, pa.Table, Array]:
    """Per combination of levels the cross-products of all features (N, F, F), its keys, its rows (N,)."""
    from .statements import block_sums

    recipe = scan.recipe
    wanted = Columns(scan.positions(recipe.kinds), scan.positions(recipe.keys))
    found = scan.engine.query(block_sums(recipe, scan.names, whole=True), wanted).read_all()
    check_combinations(len(found), len(recipe.features), limit)
    grams = np.empty((len(found), len(recipe.features), len(recipe.features)))
    names = [*(f"s{k}" for k in range(len(recipe.pairs()))), *(f"x{k}" for k in range(len(recipe.rest())))]
    for (i, j), name in zip([*recipe.pairs(), *recipe.rest()], names, strict=True):
        grams[:, i, j] = grams[:, j, i] = column(found, name)
    keys = found.select([scan.names.key(name).name for name in recipe.groups]).rename_columns(list(recipe.groups))
    return grams, keys, column(found, "row_count").astype(float)


def _factors(fit: MixedFit, coded: dict[tuple[str, ...], tuple[Levels, np.ndarray]]) -> tuple[list[Factor], int]:
    """The factors, and the number of all random effects."""
    out, start = [], 0
    for columns, (levels, code) in coded.items():
        half = np.hstack([term.Q @ term.star for term in fit.terms if term.group == ":".join(columns)])
        out.append(Factor(half, code, start))
        start += len(levels) * half.shape[1]
    return out, start


class Combined:
    """A fit over its combinations: `grams` (N, F, F) of the features that W (F, p + 1) makes [X*, r] of, `z` the random ones, `factors`
    with `size` effects in all. `inverse` M⁻¹ (u, u), `U` = M⁻¹c, `A`."""

    def __init__(self, grams: Array, z: Sequence[int], factors: list[Factor], size: int, W: Array) -> None:
        self.grams, self.z, self.factors, self.size, self.W = grams, list(z), factors, size, W
        S, c, A = self.sums(np.arange(len(grams)), np.arange(size))
        self.inverse = np.linalg.inv(np.eye(size) + S)
        self.U = self.inverse @ c
        self.A = A - c.T @ self.U

    def sums(self, rows: np.ndarray, effects: np.ndarray) -> tuple[Array, Array, Array]:
        """Λ'Z'wZΛ and Λ'Z'wW over some combinations and the random effects (T,) that these touch, in order, and W'wW."""
        grams = self.grams[rows]
        right = grams @ self.W
        S, c = np.zeros((len(effects),) * 2), np.zeros((len(effects), self.W.shape[1]))
        places = [np.searchsorted(effects, factor.at(factor.code[rows])) for factor in self.factors]
        for factor, place in zip(self.factors, places, strict=True):
            np.add.at(c, place, np.einsum("za,nzw->naw", factor.half, right[:, self.z]))
        inside = grams[:, self.z][:, :, self.z]
        for (one, a), (other, b) in product(zip(self.factors, places, strict=True), repeat=2):
            np.add.at(S, (a[:, :, None], b[:, None, :]), one.half.T @ inside @ other.half)
        return S, c, self.W.T @ right.sum(axis=0)

    def without(self, rows: np.ndarray) -> Array:
        """A without some combinations."""
        effects = np.unique(np.concatenate([factor.at(factor.code[rows]).ravel() for factor in self.factors]))
        K, c, own = self.sums(rows, effects)
        G, U = self.inverse[np.ix_(effects, effects)], self.U[effects]
        Y, crossed = U - G @ c, U.T @ c
        moved = Y.T @ K @ np.linalg.solve(np.eye(len(K)) - G @ K, Y)
        return np.asarray(self.A - own + crossed + crossed.T - c.T @ G @ c - moved)


def parts(model: Combined, levels: Levels, code: np.ndarray, rows: Array) -> Iterator[Part]:
    """What all levels of a factor tell: `code` (N,), the level of each combination, `rows` (N,), its rows."""
    order = np.argsort(code, kind="stable")
    starts = np.searchsorted(code[order], np.arange(len(levels) + 1))
    counts = np.bincount(code, rows, minlength=len(levels))
    for first in range(0, len(levels), TOGETHER):
        last = min(first + TOGETHER, len(levels))
        rest = np.array([model.without(order[starts[k] : starts[k + 1]]) for k in range(first, last)])
        lost = model.A[:-1, :-1] - rest[:, :-1, :-1]
        keys = [column.slice(first, last - first).combine_chunks() for column in levels.keys.columns]
        yield Part(keys, counts[first:last], (lost + lost.transpose(0, 2, 1)) / 2.0, -rest[:, -1, :-1])
