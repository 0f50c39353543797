"""The most influential blocks of a linear mixed model: what the fixed effects would be without each of them, the variances held.

With A = Σ A_i, A_i = X_i'V_i⁻¹X_i and s_i = X_i'V_i⁻¹(y_i - X_i beta), deleting block i moves beta by -(A - A_i)⁻¹ s_i exactly
(Christensen, Pearson and Johnson 1992, by V's block structure); A_i and s_i come from the block's cross-products alone.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import influence_several
from .arrays import column
from .covariates import note_scan, random_terms, scanned
from .deletion import Deletion, Part, check_top, chosen, most
from .effects import residual_vector
from .errors import ConfigError
from .stats import SuffStats

if TYPE_CHECKING:
    import pyarrow as pa
    from sqlglot import exp

    from .covariates import Scan
    from .options import Options
    from .result import MixedFit

    Array = np.ndarray


class Block(NamedTuple):
    """Sums of B blocks: `keys`, `rows` (B,), `G` = F'wF (B, m, m) and `g` = F'wr (B, m), r the residual of the fixed part."""

    keys: list[Any]
    rows: Array
    G: Array
    g: Array


def influence(fit: MixedFit, top: int, data: Any, options: Options | None, group: str | None) -> pa.Table:
    """See `MixedFit.influence`, of linear mixed models."""
    check_top(top)
    if not random_terms(fit):
        raise ConfigError("influence by deletion of blocks is for mixed models", code="not_available")
    columns = chosen(fit, group)
    with ExitStack() as stack:
        if fit.recipe.factors:
            return influence_several.table(fit, stack.enter_context(scanned(fit, data, options, more=_more(fit))), columns, top, options)
        if data is None and isinstance(fit.source, SuffStats):
            blocks = partial(_held, fit, fit.source)
        else:
            blocks = partial(_summed, fit, stack.enter_context(scanned(fit, data, options, more=_more(fit))))
        found = _deleted(fit, blocks, top)
        if not isinstance(fit.source, SuffStats) or data is not None:
            note_scan(fit, "influence", data)
    return found


def _deleted(fit: MixedFit, blocks: Callable[[], Iterator[Block]], top: int) -> pa.Table:
    """The table of a linear model, in the coordinates X* = X R⁻¹."""
    Q, R = fit.spread.Q[: fit.recipe.n_covariates], fit.spread.R
    half, s2 = np.hstack([term.Q @ term.star for term in fit.terms]), fit.sigma**2
    parts = partial(map, partial(_told, list(fit.recipe.z), half, Q))
    if fit.info.get("robust"):  # its covariance is not the inverse of the information: that comes by a further look at the blocks
        A = np.sum([part.A.sum(axis=0) for part in parts(blocks())], axis=0)
    else:
        A = s2 * np.linalg.inv(fit.spread.star)
    return most(Deletion(fit, R, A, s2, fit.recipe.groups), parts(blocks()), top)


def _told(z: list[int], H: Array, Q: Array, blocks: Block) -> Part:
    """A_i and s_i of blocks, V relative to sigma²."""
    C = np.einsum("zq,bzm->bqm", H, blocks.G[:, z, :])
    M = np.eye(H.shape[1]) + C[:, :, z] @ H
    c = blocks.g[:, z] @ H
    solved = np.linalg.solve(M, np.concatenate([C, c[:, :, None]], axis=2))
    G = blocks.G - C.transpose(0, 2, 1) @ solved[:, :, :-1]
    g = blocks.g - np.einsum("bqm,bq->bm", C, solved[:, :, -1])
    A = Q.T @ G @ Q
    return Part(blocks.keys, blocks.rows, (A + A.transpose(0, 2, 1)) / 2.0, g @ Q)


def _more(fit: MixedFit) -> list[str]:
    """The columns of other data that are read beside its covariates."""
    from .statements import raw_columns

    return list(dict.fromkeys([*raw_columns(fit.recipe), *fit.recipe.groups]))


def _held(fit: MixedFit, stats: SuffStats) -> Iterator[Block]:
    """The sums of all blocks, from statistics that hold each block's X'X. Raises DataError where they do not."""
    m, residual = stats.recipe.n_covariates, residual_vector(fit)
    for keys, rows, C in stats.covariate_products():
        yield Block(keys, rows.astype(float), C[:, :, :m], C @ residual)


def _summed(fit: MixedFit, scan: Scan) -> Iterator[Block]:
    """The sums of all blocks, by one grouped query."""
    from .engines.base import Columns

    m = fit.recipe.n_covariates
    keys = [scan.names.key(group) for group in fit.recipe.groups]
    wanted = Columns(scan.positions(fit.recipe.kinds), scan.positions(fit.recipe.keys))
    for batch in scan.engine.query(_statement(fit, scan, keys), wanted):
        if not batch.num_rows:
            continue
        G = np.empty((batch.num_rows, m, m))
        for i in range(m):
            for j in range(i, m):
                G[:, i, j] = G[:, j, i] = column(batch, f"g_{i}_{j}")
        g = np.column_stack([column(batch, f"r_{i}") for i in range(m)])
        yield Block([batch.column(key.name) for key in keys], column(batch, "row_count").astype(float), G, g)


def _statement(fit: MixedFit, scan: Scan, keys: list[exp.Column]) -> exp.Select:
    """Per block: keys, row_count, g_i_j of F'wF (i <= j) and r_i of F'wr, r the residual of the fixed part."""
    from sqlglot import exp

    from .sql import named, number, over, skeleton, total, weighted
    from .statements import combination, used_rows, weight_columns

    recipe, weights = scan.recipe, list(weight_columns(scan.recipe))
    covariates = recipe.features[: recipe.n_covariates]
    inner = used_rows(recipe, scan.names, keys=True)
    columns: list[Any] = [*(key.copy() for key in keys), *(exp.column(name) for name in weights)]
    columns += [exp.column(f"f{i}") for i, f in enumerate(covariates) if f]
    residual = named(combination(residual_vector(fit).tolist(), recipe, scan.names, inside=True), "residual")
    rows = exp.select(*columns, residual).from_(inner.subquery("used", copy=False))

    def product(*factors: str) -> exp.Expr:
        held = [*weights, *factors]
        return weighted(held, ()) if held else number(1)

    names = [f"f{i}" if f else "" for i, f in enumerate(covariates)]
    sums = []
    for i, a in enumerate(names):
        sums += [total(product(*filter(None, (a, b))), f"g_{i}_{j}") for j, b in enumerate(names) if j >= i]
        sums.append(total(product("residual", *filter(None, (a,))), f"r_{i}"))
    statement = skeleton("influence").select(*keys, *sums, copy=False).group_by(*(key.copy() for key in keys), copy=False)
    return over(statement, rows, "used")
