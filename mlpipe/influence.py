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

from .arrays import column
from .covariates import design, note_scan, random_terms, scanned
from .effects import key_names, residual_vector
from .errors import ConfigError, DataError
from .stats import SuffStats

if TYPE_CHECKING:
    import pyarrow as pa
    from sqlglot import exp

    from .covariates import Scan
    from .options import Options
    from .result import MixedFit

    Array = np.ndarray

DETERMINED = 1e-10  # share of the information on a direction that must remain without a block


class Block(NamedTuple):
    """Sums of B blocks: `keys`, `rows` (B,), `G` = F'wF (B, m, m) and `g` = F'wr (B, m), r the residual of the fixed part."""

    keys: list[Any]
    rows: Array
    G: Array
    g: Array


def influence(fit: MixedFit, top: int, data: Any, options: Options | None) -> pa.Table:
    """See `MixedFit.influence`."""
    import pyarrow as pa

    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ConfigError(f"top = {top!r} is not a whole number from 1")
    if not fit.residual_scaled or not random_terms(fit):
        raise ConfigError("influence by deletion of blocks is for linear mixed models", code="not_available")
    if fit.recipe.factors:
        raise ConfigError("influence by deletion of blocks needs one grouping factor", code="several_factors")
    found: pa.Table | None = None
    with ExitStack() as stack:
        if data is None and isinstance(fit.source, SuffStats):
            blocks = partial(_held, fit, fit.source)
        else:
            blocks = partial(_summed, fit, stack.enter_context(scanned(fit, data, options, more=_more(fit))))
        deletion = _Deletion(fit, blocks)
        for part in blocks():
            table = deletion.table(part)
            found = _most(pa.concat_tables([found, table]) if found is not None else table, top)
        if not isinstance(fit.source, SuffStats) or data is not None:
            note_scan(fit, "influence", data)
    if found is None:
        raise DataError("there are no rows", code="no_rows")
    return found.drop_columns(["order"])


def _more(fit: MixedFit) -> list[str]:
    """The columns of other data that are read beside its covariates."""
    from .statements import raw_columns

    return list(dict.fromkeys([*raw_columns(fit.recipe), *fit.recipe.groups]))


def _most(table: pa.Table, top: int) -> pa.Table:
    """The `top` rows of greatest distance."""
    order = np.argsort(-column(table, "order"), kind="stable")[:top]
    return table.take(order)


class _Deletion:
    """The fit in the coordinates X* = X R⁻¹, and what the deletion of blocks does to it."""

    def __init__(self, fit: MixedFit, blocks: Callable[[], Iterator[Block]]) -> None:
        self.fit = fit
        self.Q, self.R = np.linalg.qr(design(fit))
        self.half = np.hstack([term.Q @ term.star for term in fit.terms])
        self.s2, self.p = fit.sigma**2, len(fit.names)
        if fit.info.get("robust"):  # its covariance is not the inverse of the information: that comes by a further look at the blocks
            self.A = np.sum([self._of_blocks(part)[0].sum(axis=0) for part in blocks()], axis=0)
        else:
            covariance = self.R @ fit.covariance @ self.R.T
            self.A = self.s2 * np.linalg.inv((covariance + covariance.T) / 2.0)
        self.L = np.linalg.cholesky(self.A)

    def table(self, blocks: Block) -> pa.Table:
        """One row a block, and `order`, by which they are ranked."""
        import pyarrow as pa

        A_i, s_i = self._of_blocks(blocks)
        rest = self.A - A_i
        white = np.linalg.solve(self.L, np.linalg.solve(self.L, A_i).transpose(0, 2, 1))  # L⁻¹ A_i L⁻ᵀ
        leverage = np.trace(white, axis1=1, axis2=2)
        known = np.linalg.eigvalsh(white)[:, -1] < 1.0 - DETERMINED
        rest = np.where(known[:, None, None], rest, self.A)
        delta = np.linalg.solve(rest, s_i[:, :, None])[:, :, 0]
        cook = ((delta @ self.L) ** 2).sum(axis=1) / (self.p * self.s2)
        back = np.linalg.solve(rest, np.broadcast_to(np.linalg.inv(self.R).T, rest.shape))  # (A - A_i)⁻¹ R⁻ᵀ
        variance = np.einsum("jk,bkj->bj", np.linalg.inv(self.R), back)
        with np.errstate(invalid="ignore", divide="ignore"):
            dfbetas = np.linalg.solve(self.R, delta.T).T / np.sqrt(self.s2 * variance)
        names = key_names(self.fit.terms, self.fit.recipe.groups)
        columns: dict[str, Any] = dict(zip(names, blocks.keys, strict=True))
        columns |= {"rows": pa.array(blocks.rows.astype(np.int64)), "leverage": pa.array(leverage)}
        columns["cooks_distance"] = pa.array(cook, mask=~known)
        for name, values in zip(self.fit.names, dfbetas.T, strict=True):
            columns[f"dfbetas_{name}"] = pa.array(values, mask=~(known & np.isfinite(values)))
        columns["order"] = pa.array(np.where(known, cook, np.inf))
        return pa.table(columns)

    def _of_blocks(self, blocks: Block) -> tuple[Array, Array]:
        """A_i (B, p, p) and s_i (B, p), V relative to sigma²."""
        z, H = list(self.fit.recipe.z), self.half
        C = np.einsum("zq,bzm->bqm", H, blocks.G[:, z, :])
        M = np.eye(H.shape[1]) + C[:, :, z] @ H
        c = blocks.g[:, z] @ H
        solved = np.linalg.solve(M, np.concatenate([C, c[:, :, None]], axis=2))
        G = blocks.G - C.transpose(0, 2, 1) @ solved[:, :, :-1]
        g = blocks.g - np.einsum("bqm,bq->bm", C, solved[:, :, -1])
        A = self.Q.T @ G @ self.Q
        return (A + A.transpose(0, 2, 1)) / 2.0, g @ self.Q


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
    wanted = Columns(scan.positions(fit.recipe.kinds), scan.positions(fit.recipe.groups))
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
