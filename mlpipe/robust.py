"""Scores of clusters and rows from one more look at the rows: the meat of robust covariances."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from . import statements
from .arrays import column
from .engines.base import Engine
from .errors import ConfigError, DataError, did_you_mean
from .features import Recipe
from .levels import Levels
from .looks import used_columns
from .solve.sandwich import CR, HC, corrected, row_meat
from .sql import Names

if TYPE_CHECKING:
    import pyarrow as pa

    from .solve.absorb import Leverages
    from .stats import SuffStats

    Array = np.ndarray

TOGETHER = 200_000  # rows that are worked on at once


@dataclass(frozen=True)
class Source:
    """Where the rows are: an open engine, and where their columns stand."""

    engine: Engine
    names: Names


@dataclass
class Meat:
    """The sum over clusters (or rows) of outer products of scores (p, p), and how many `clusters` there were (0 for rows)."""

    matrix: Array
    clusters: int = 0


@dataclass(frozen=True)
class Fitted:
    """A least-squares fit over features: columns F Q (`Q` (F, p)), residual F e (`e` (F,)), bread LL' = (X'WX)⁻¹ (`L` (p, p)).

    `absorbed`: per factor its levels and their effects on every feature (m, F), where effects were absorbed; `leverages`, what these add
    to those of the rows.
    """

    recipe: Recipe
    Q: Array
    e: Array
    L: Array
    absorbed: tuple[tuple[Levels, Array], ...] = ()
    leverages: Leverages | None = None


@dataclass
class Clusters:
    """Sums over the clusters of one clustering, grown as rows come: codes by `levels`."""

    levels: Levels
    scores: Array
    grams: Array | None
    owner: list[Array] = field(default_factory=list)  # per absorbed factor: the cluster of each level, -1 not seen, -2 several


def checked(vcov: str | None, clustered: bool) -> str | None:
    """The kind of covariance that is meant: CR1 with clusters and none given. Raises ConfigError for one that does not fit."""
    known = CR if clustered else HC
    if vcov is not None and vcov not in known:
        other = vcov in (HC if clustered else CR)
        why = ("the rows are clustered" if clustered else "there is no cluster=") if other else did_you_mean(str(vcov), list(known))
        raise ConfigError(f"vcov = {vcov!r} is not one of {', '.join(known)}", hint=why, code="vcov")
    return vcov or ("CR1" if clustered else None)


def names_of(value: str | Sequence[str] | None, what: str) -> tuple[str, ...]:
    """Column names given as one or as several. Raises ConfigError for anything else, and for a name twice."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else () if value is None else (value,)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{what} = {value!r}: it must be a column or a list of columns", code=what)
    if len(set(names)) < len(names):
        raise ConfigError(f"{what} names a column twice", code=what)
    return names


# -- rows --------------------------------------------------------------------------------------------------------------


def batches(source: Source, recipe: Recipe, *, keys: bool) -> Iterator[tuple[pa.Table, Array, Array | None, Array | None]]:
    """The used rows: their table, features F (features, n), precision weights and frequencies."""
    import pyarrow as pa

    reader = source.engine.query(statements.used_rows(recipe, source.names, keys=keys), used_columns(recipe, source.names))
    held: list[pa.RecordBatch] = []
    for batch in reader:
        held += [batch] if batch.num_rows else []
        if sum(part.num_rows for part in held) >= TOGETHER:
            yield _matrix(pa.Table.from_batches(held), recipe)
            held = []
    if held:
        yield _matrix(pa.Table.from_batches(held), recipe)


def _matrix(table: pa.Table, recipe: Recipe) -> tuple[pa.Table, Array, Array | None, Array | None]:
    F = np.ones((len(recipe.features), len(table)))
    for i, monomial in enumerate(recipe.features):
        if monomial:
            F[i] = column(table, f"f{i}")
    weights = statements.weight_columns(recipe)
    return table, F, column(table, "w") if "w" in weights else None, column(table, "q") if "q" in weights else None


def codes(table: pa.Table, levels: Levels, names: Names) -> np.ndarray:
    """The level (n,) of each row. Raises DataError for one that was not there before."""
    code = levels.codes([table.column(names.key(name).name).combine_chunks() for name in levels.columns])
    if (code < 0).any():
        raise DataError("the source changed while it was read", code="source_changed", hint="fit a snapshot of it")
    return code


def _columns(table: pa.Table, F: Array, fitted: Fitted, names: Names) -> tuple[Array, Array, list[np.ndarray]]:
    """X (p, n) and residuals (n,) of some rows, what is absorbed taken out, and the codes of absorbed factors."""
    X, e, held = fitted.Q.T @ F, fitted.e @ F, []
    for levels, effects in fitted.absorbed:
        code = codes(table, levels, names)
        X -= (effects @ fitted.Q).T[:, code]
        e -= (effects @ fitted.e)[code]
        held.append(code)
    return X, e, held


def of_rows(source: Source, fitted: Fitted, kind: str) -> Meat:
    """The meat of HC0 to HC3 (White 1980; MacKinnon and White 1985), in one pass."""
    total = np.zeros((len(fitted.L),) * 2)
    for table, F, w, q in batches(source, fitted.recipe, keys=bool(fitted.absorbed)):
        X, e, held = _columns(table, F, fitted, source.names)
        size = np.ones(1) if w is None else w
        more = 0.0 if fitted.leverages is None else size * fitted.leverages.at(held)
        total += row_meat(X * np.sqrt(size), e * np.sqrt(size), fitted.L, kind, q, more)
    return Meat(total)


# -- clusters ----------------------------------------------------------------------------------------------------------


def of_clusters(source: Source, fitted: Fitted, keys: tuple[str, ...], kind: str, *, within: bool = False) -> Meat:
    """The meat of CR0 to CR2 by one grouped query; `within`: the effects of the clusters themselves were absorbed."""
    recipe = fitted.recipe
    used = range(recipe.n_covariates)
    constant = recipe.features.index(()) if within else -1
    pairs = [(min(constant, j), max(constant, j)) for j in used] if within else []
    pairs = [(i, j) for i in used for j in used[i:]] if kind == "CR2" else pairs
    statement = statements.cluster_sums(recipe, source.names, keys, pairs, fitted.e.tolist())
    total, clusters = np.zeros((len(fitted.L),) * 2), 0
    for batch in source.engine.query(statement, used_columns(recipe, source.names)):
        if not batch.num_rows:
            continue
        r = np.stack([column(batch, f"r_{j}") for j in used]) if used else np.zeros((0, batch.num_rows))
        P = np.zeros((len(used), len(used), batch.num_rows))
        for i, j in pairs:
            P[i, j] = P[j, i] = column(batch, f"p_{i}_{j}")
        if within:  # the clusters' own means taken out
            s, size = P[constant], P[constant, constant]
            r = r - s * (r[constant] / size)
            P = P - s[:, None] * s[None] / size if kind == "CR2" else P
        Q = fitted.Q[: len(used)]
        scores = Q.T @ r
        if kind == "CR2":
            scores = corrected(scores, np.einsum("ia,ijn,jb->abn", Q, P, Q, optimize=True), fitted.L)
        total += scores @ scores.T
        clusters += batch.num_rows
    return Meat(total, clusters)


def of_statistics(stats: SuffStats, fitted: Fitted, kind: str, *, within: bool) -> Meat:
    """The same for the blocks of statistics with `collect="blocks+xx"`."""
    p, total, blocks = len(fitted.L), np.zeros((len(fitted.L),) * 2), 0
    W = np.column_stack([fitted.Q, fitted.e])
    for batch in stats.block_products():
        C = np.einsum("ia,nij,jb->abn", W, batch.gram, W, optimize=True)
        if within:
            constant = stats.recipe.features.index(())
            s = W.T @ batch.gram[:, constant].T
            C = C - s[:, None] * s[None] / batch.gram[:, constant, constant]
        scores = C[:p, p]
        scores = corrected(scores, C[:p, :p], fitted.L) if kind == "CR2" else scores
        total += scores @ scores.T
        blocks += scores.shape[1]
    return Meat(total, blocks)


def streamed(source: Source, fitted: Fitted, ways: Sequence[tuple[str, ...]], kind: str) -> tuple[list[Meat], list[set[str]]]:
    """The meats of several clusterings in one pass over the rows; per clustering the absorbed factors that lie within its clusters."""
    recipe, p = fitted.recipe, len(fitted.L)
    found = []
    for keys in ways:
        levels = levels_of(source, recipe, keys)
        grams = np.zeros((p, p, len(levels))) if kind == "CR2" else None
        owners = [np.full(len(known), -1) for known, _ in fitted.absorbed]
        found.append(Clusters(levels, np.zeros((p, len(levels))), grams, owners))
    for table, F, w, q in batches(source, recipe, keys=True):
        X, e, absorbed = _columns(table, F, fitted, source.names)
        weight = (np.ones(1) if w is None else w) * (np.ones(1) if q is None else q)
        for clusters in found:
            _add(clusters, codes(table, clusters.levels, source.names), X, weight, e, absorbed)
    return [_summed(clusters, fitted, kind) for clusters in found], [_nested(clusters, fitted) for clusters in found]


def _add(clusters: Clusters, code: np.ndarray, X: Array, weight: Array, e: Array, absorbed: list[np.ndarray]) -> None:
    m, weighted = len(clusters.levels), X * weight
    for k, row in enumerate(weighted):
        clusters.scores[k] += np.bincount(code, row * e, minlength=m)
        if clusters.grams is not None:
            for j in range(k + 1):
                sums = np.bincount(code, row * X[j], minlength=m)
                clusters.grams[k, j] += sums
                if j != k:
                    clusters.grams[j, k] += sums
    for owner, level in zip(clusters.owner, absorbed, strict=True):
        owned(owner, level, code)


def owned(owner: np.ndarray, level: np.ndarray, cluster: np.ndarray) -> None:
    """Notes the cluster of each level that rows show: -1 for none yet, -2 for several."""
    fresh = owner[level] == -1
    owner[level[fresh]] = cluster[fresh]
    owner[level[owner[level] != cluster]] = -2


def _summed(clusters: Clusters, fitted: Fitted, kind: str) -> Meat:
    v = clusters.scores
    if kind == "CR2":
        assert clusters.grams is not None
        parts = [slice(a, a + TOGETHER) for a in range(0, v.shape[1], TOGETHER)]
        v = np.hstack([corrected(v[:, part], clusters.grams[:, :, part], fitted.L) for part in parts])
    return Meat(v @ v.T, v.shape[1])


def _nested(clusters: Clusters, fitted: Fitted) -> set[str]:
    return {levels.group for (levels, _), owner in zip(fitted.absorbed, clusters.owner, strict=True) if (owner >= 0).all()}


def levels_of(source: Source, recipe: Recipe, keys: tuple[str, ...]) -> Levels:
    """The combinations of key columns that the used rows have."""
    import pyarrow as pa

    from .sql import skeleton

    columns = [source.names.key(key) for key in keys]
    statement = skeleton("rows").select(*columns, append=False, copy=False).distinct(copy=False)
    statement = statement.where(statements.usable(recipe, source.names), copy=False).order_by(*(c.copy() for c in columns), copy=False)
    table = source.engine.query(statement, used_columns(recipe, source.names)).read_all()
    return Levels(":".join(keys), keys, pa.table({key: table.column(i) for i, key in enumerate(keys)}))


def few(kind: str, clusters: Sequence[int]) -> None:
    """Raises DataError for fewer than two clusters."""
    if min(clusters) < 2:
        raise DataError(f"there are fewer than two clusters: {kind} errors need several", code="one_cluster")

