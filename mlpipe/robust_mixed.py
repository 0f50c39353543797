"""Cluster-robust covariances of the fixed effects of mixed models (FORMULAS R10; Liang and Zeger 1986).

With V_i the marginal covariance of a block, the score of a cluster is X'V⁻¹r = X'w(r - Zb): the rows' conditional residuals do. Clusters
must therefore hold whole blocks. CR2 (Bell and McCaffrey 2002) is that of the rows whitened by V (Pustejovsky and Tipton 2018).
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from . import effects, robust, statements
from .arrays import column
from .errors import ConfigError, DataError
from .levels import levels_of
from .looks import used_columns
from .robust import Source
from .solve.sandwich import cluster_factor, corrected, covariance, half

if TYPE_CHECKING:
    from .levels import Levels
    from .reduction import Fixed
    from .result import MixedFit
    from .stats import SuffStats

    Array = np.ndarray


def checked(cluster: Any, vcov: str | None, known: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """The cluster column and the kind of covariance of a mixed model. Raises ConfigError for others than it has."""
    clusters = robust.names_of(cluster, "cluster")
    if len(clusters) > 1:
        raise ConfigError("a mixed model takes one cluster column", code="cluster", hint="mlpipe.ols takes several")
    if vcov is not None and not clusters:
        raise ConfigError(f"vcov = {vcov!r} of a mixed model needs cluster=", code="vcov")
    kind = robust.checked(vcov, True) if clusters else None
    if kind is not None and kind not in known:
        raise ConfigError(f"vcov = {vcov!r} is not one of {', '.join(known)}, those of this model", code="vcov")
    return clusters, kind


def settle(fit: MixedFit, kind: str, cluster: tuple[str, ...], fixed: Fixed, scores: Array, grams: Array | None) -> None:
    """Puts the sandwich of clusters' scores (p, G) (and X'V⁻¹X (p, p, G) for CR2) over the columns F Q in place of the covariance."""
    if scores.shape[1] < 2:
        robust.few(kind, [scores.shape[1]])
    m = len(fit.gamma_covariance)
    back = np.linalg.pinv(fixed.Q[:m])
    bread = back @ fit.gamma_covariance @ back.T / fit.effect_scale**2
    if grams is not None:
        scores = corrected(scores, grams, half(bread))
    meat = cluster_factor(kind, scores.shape[1], fit.nobs, len(fit.names)) * scores @ scores.T
    star = covariance(bread, meat)
    fit.covariance, fit.gamma_covariance = fixed.raw(star), fixed.over(star)[:m, :m]
    noted(fit, kind, cluster, scores.shape[1])


def noted(fit: MixedFit, kind: str, cluster: tuple[str, ...], clusters: int) -> None:
    """What the standard errors are, in `info`."""
    fit.info["robust"] = {"kind": kind, "cluster": list(cluster), "clusters": clusters}
    note = f"standard errors of the fixed effects: cluster-robust ({kind}), {clusters:,} clusters of {':'.join(cluster)}"
    fit.info["notes"] = [*fit.info.get("notes", []), note]


# -- one grouping factor -----------------------------------------------------------------------------------------------


def one_factor(fit: MixedFit, fixed: Fixed, source: Source, kind: str, cluster: tuple[str, ...]) -> None:
    """The covariance by one grouped query over the blocks. Raises DataError where a block lies in several clusters."""
    recipe = fit.recipe
    keys = tuple(dict.fromkeys((*recipe.groups, *cluster)))
    own = set(keys) == set(recipe.groups) == set(cluster)
    levels = None if own else robust.levels_of(source, recipe, cluster)
    total = _Total(fixed, len(levels) if levels is not None else None, kind)
    seen = 0
    for batch, r, P in _sums(fit, source, keys, kind):
        code = None if levels is None else _codes(batch, levels, source)
        seen += batch.num_rows
        total.add(*_block_scores(fit, fixed, r, P, kind), code)
    if seen != fit.n_blocks:
        message = f"blocks of {':'.join(recipe.groups)} lie in several clusters of {':'.join(cluster)}"
        raise DataError(message, code="not_nested", column=cluster[0], hint="cluster by the grouping factor, or by what it lies within")
    settle(fit, kind, cluster, fixed, *total.finished())


def of_statistics(fit: MixedFit, stats: SuffStats, fixed: Fixed, kind: str, cluster: tuple[str, ...]) -> None:
    """The same from statistics that hold each block's X'X, where the cluster is the grouping factor, or one of its columns.

    Raises DataError where they do not, or are over blocks of something else.
    """
    recipe, m, residual = stats.recipe, stats.recipe.n_covariates, effects.residual_vector(fit)
    if stats.crossed is not None or not set(cluster) <= set(recipe.groups):
        shown = ", ".join(":".join(groups) for groups in recipe.factors or (recipe.groups,))
        hint = f'pass the rows, or statistics over one factor, {cluster[0]!r}, with collect="blocks+xx"'
        message = f"the statistics are over {shown} and do not tell the clusters of {':'.join(cluster)}"
        raise DataError(message, code="not_collected", column=cluster[0], hint=hint)
    products = stats.covariate_products()
    assert stats.blocks is not None and stats.blocks.table is not None
    levels, code = levels_of(cluster, stats.blocks.table.select(stats.blocks.keys).rename_columns(list(recipe.groups)))
    total, place = _Total(fixed, len(levels), kind), 0
    for _, _, C in products:
        P = np.moveaxis(C, 0, -1)
        total.add(*_block_scores(fit, fixed, np.einsum("ijb,j->ib", P, residual), P[:, :m], kind), code[place : place + len(C)])
        place += len(C)
    settle(fit, kind, cluster, fixed, *total.finished())


def _codes(batch: Any, levels: Levels, source: Source) -> np.ndarray:
    return levels.codes([batch.column(source.names.key(name).name) for name in levels.columns])


def _sums(fit: MixedFit, source: Source, keys: tuple[str, ...], kind: str) -> Iterator[tuple[Any, Array, Array]]:
    """Per batch of blocks Σ w f_j r (features, B) and the cross-products Σ w f_i f_j (features, features, B) that are needed."""
    recipe = fit.recipe
    used = range(recipe.n_covariates)
    pairs = {(min(i, j), max(i, j)) for i in (used if kind == "CR2" else recipe.z) for j in used}
    residual = effects.residual_vector(fit).tolist()
    statement = statements.cluster_sums(recipe, source.names, keys, sorted(pairs), residual)
    for batch in source.engine.query(statement, used_columns(recipe, source.names)):
        if not batch.num_rows:
            continue
        P = np.zeros((len(used), len(used), batch.num_rows))
        for i, j in pairs:
            P[i, j] = P[j, i] = column(batch, f"p_{i}_{j}")
        yield batch, np.stack([column(batch, f"r_{j}") for j in used]), P


def _block_scores(fit: MixedFit, fixed: Fixed, r: Array, P: Array, kind: str) -> tuple[Array, Array | None]:
    """X'V⁻¹r (p, B) and, for CR2, X'V⁻¹X (p, p, B) of blocks, V in units of sigma²."""
    z, Q = list(fit.recipe.z), fixed.Q[: len(r)]
    half_map = np.column_stack([term.Q @ term.star for term in fit.terms])
    S, C = np.moveaxis(P[np.ix_(z, z)], -1, 0), np.einsum("ajb,jp->bap", P[z], Q)
    M = half_map.T @ S @ half_map + np.eye(half_map.shape[1])
    left = half_map.T @ C  # (B, q, p)
    u = np.linalg.solve(M, (half_map.T @ r[z]).T[:, :, None])
    scores = Q.T @ r - np.einsum("bqp,bq->pb", left, u[:, :, 0])
    if kind != "CR2":
        return scores, None
    grams = np.einsum("ia,ijb,jc->acb", Q, P, Q, optimize=True) - np.moveaxis(np.swapaxes(left, 1, 2) @ np.linalg.solve(M, left), 0, -1)
    return scores, grams


class _Total:
    """Scores and cross-products of clusters, in place by their codes, or of blocks that are clusters, in the order they come."""

    def __init__(self, fixed: Fixed, clusters: int | None, kind: str) -> None:
        p = len(fixed.names)
        self.scores = None if clusters is None else np.zeros((p, clusters))
        self.grams = None if clusters is None or kind != "CR2" else np.zeros((p, p, clusters))
        self.parts: list[tuple[Array, Array | None]] = []

    def add(self, scores: Array, grams: Array | None, code: np.ndarray | None) -> None:
        """Takes in some blocks."""
        if code is None or self.scores is None:
            self.parts.append((scores, grams))
            return
        np.add.at(self.scores.T, code, scores.T)
        if self.grams is not None and grams is not None:
            np.add.at(np.moveaxis(self.grams, -1, 0), code, np.moveaxis(grams, -1, 0))

    def finished(self) -> tuple[Array, Array | None]:
        """All clusters' scores and cross-products."""
        if self.scores is not None:
            return self.scores, self.grams
        grams = [part for _, part in self.parts if part is not None]
        return np.hstack([part for part, _ in self.parts]), np.concatenate(grams, axis=2) if grams else None


# -- several -----------------------------------------------------------------------------------------------------------


def several_factors(fit: MixedFit, fixed: Fixed, source: Source, kind: str, cluster: tuple[str, ...]) -> None:
    """The same from the rows' conditional residuals, in one pass. Raises DataError where a level lies in several clusters: they would not
    be independent."""
    from .lookup import Modes

    if kind == "CR2":
        raise ConfigError('vcov = "CR2" is for mixed models with one grouping factor', code="vcov", hint='vcov="CR1"')
    recipe = fit.recipe
    levels = robust.levels_of(source, recipe, cluster)
    modes = [Modes(fit, ":".join(groups), groups) for groups in recipe.factors]
    owners = [np.full(len(mode.levels), -1) for mode in modes]
    scores, residual = np.zeros((len(fixed.names), len(levels))), effects.residual_vector(fit)
    for table, F, w, q in robust.batches(source, recipe, keys=True):
        code = robust.codes(table, levels, source.names)
        e = residual @ F
        for mode, owner in zip(modes, owners, strict=True):
            at = [table.column(source.names.key(name).name).combine_chunks() for name in mode.levels.columns]
            level = mode.levels.codes(at)
            e = e - mode.part(level, F[list(recipe.z)])
            robust.owned(owner, level, code)
        e = e * (1.0 if w is None else w) * (1.0 if q is None else q)
        for k, row in enumerate(fixed.Q.T @ F):
            scores[k] += np.bincount(code, row * e, minlength=len(levels))
    for mode, owner in zip(modes, owners, strict=True):
        if (owner < 0).any():
            message = f"levels of {mode.levels.group} lie in several clusters of {':'.join(cluster)}, which are then not independent"
            raise DataError(message, code="not_nested", column=cluster[0], hint="cluster by what all grouping factors lie within")
    settle(fit, kind, cluster, fixed, scores, None)


def of_lmm(fit: MixedFit, stats: SuffStats, fixed: Fixed, source: Source, kind: str, cluster: tuple[str, ...]) -> None:
    """The robust covariance of a linear mixed model's fixed effects, by one more scan."""
    several = stats.crossed is not None
    (several_factors if several else one_factor)(fit, fixed, source, kind, cluster)
    source.engine.check_unchanged()
    fit.info["passes"] = fit.info.get("passes", 0) + 1
