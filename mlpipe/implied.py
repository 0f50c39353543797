"""What a fit implies for its responses with the random effects integrated out: each row's mean and variance, and the covariance and
correlation of a block's rows."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import expr
from .arrays import column
from .covariates import half_factor, random_terms, scanned
from .errors import ConfigError, DataError, did_you_mean
from .formula import parse_expression
from .integrals import moments, pair_covariances, response_moments
from .outcome import TRIALS
from .predictions import Output, size_names

if TYPE_CHECKING:
    import pyarrow as pa

    from .options import Options
    from .result import MixedFit

    Array = np.ndarray

MOST_ROWS = 1_000  # of a block whose matrices are written out


def rows(fit: MixedFit, data: Any, prefix: str, options: Options | None) -> pa.RecordBatchReader:
    """See `MixedFit.marginal`, without `block`."""
    from .scoring import scored

    parts = ("population", *(["variance"] if random_terms(fit) else []), *(["size"] if size_names(fit.recipe) else []))

    def variance(*values: Array) -> Array:
        held = dict(zip(parts, values, strict=True))
        return response_moments(fit, held["population"], held.get("variance"), held.get("size", 1.0))[1]

    mean = Output(parts[: 2 if random_terms(fit) else 1], lambda eta, spread=None: moments(fit.link, eta, spread)[0])
    outputs = {f"{prefix}mean": mean, f"{prefix}variance": Output(parts, variance)}
    return scored(fit, data, outputs, (), options, columns=None)


def block(fit: MixedFit, data: Any, key: Any, options: Options | None) -> pa.Table:
    """See `MixedFit.marginal` with `block`."""
    import pyarrow as pa

    F, offset, size, keys = _block_rows(fit, data, _chosen(fit, key), options)
    n = F.shape[1]
    if not n:
        raise DataError(f"there are no rows of the block {key!r}", code="no_rows")
    eta = fit.gamma[: len(F)] @ F + offset
    C = _random_covariance(fit, F, keys)
    v = np.diag(C).copy()
    i, j = np.triu_indices(n)
    mean, variance = response_moments(fit, eta, v, size)
    covariance = np.zeros((n, n))
    covariance[i, j] = pair_covariances(fit.link, (eta[i], eta[j]), (v[i], v[j]), C[i, j])
    covariance = np.triu(covariance, 1) + np.triu(covariance, 1).T + np.diag(variance)
    with np.errstate(invalid="ignore", divide="ignore"):  # links whose means have no integral
        sd = np.sqrt(variance)
        correlation = covariance / np.outer(sd, sd)
    a, b = (x.ravel() for x in np.indices((n, n)))
    reals = {"mean1": mean[a], "mean2": mean[b], "covariance": covariance.ravel(), "correlation": correlation.ravel()}
    columns = {name: pa.array(values, mask=~np.isfinite(values)) for name, values in reals.items()}
    return pa.table({"row1": a + 1, "row2": b + 1} | columns)


def _chosen(fit: MixedFit, key: Any) -> dict[str, Any]:
    """The key columns and their values that single out the block."""
    if not random_terms(fit):
        raise ConfigError("the model has no random effects", code="no_random_effects")
    groups = list(fit.recipe.groups)
    if isinstance(key, Mapping):
        for name in key:
            if name not in groups:
                raise ConfigError(f"block names {name!r}, which is no grouping column", hint=did_you_mean(str(name), groups))
        if not key:
            raise ConfigError("block names no grouping column", hint=f"one of {', '.join(groups)}")
        return dict(key)
    values = key if isinstance(key, tuple) else (key,)
    if len(values) != len(groups):
        raise ConfigError(f"block = {key!r} does not say of which grouping column", hint=f'block={{"{groups[0]}": …}}')
    return dict(zip(groups, values, strict=True))


def _block_rows(fit: MixedFit, data: Any, chosen: dict[str, Any], options: Options | None) -> tuple[Array, Array, Any, list[Any]]:
    """Features (m, n), offsets, sizes and key columns of the rows of one block, in the source's order where it has one."""
    import pyarrow as pa
    from sqlglot import exp

    from .sql import both, numeric

    recipe, sizes = fit.recipe, size_names(fit.recipe)
    F, offsets, held_sizes, keys = [np.zeros((recipe.n_covariates, 0))], [np.zeros(0)], [np.zeros(0)], []
    with scanned(fit, data, options, more=[*sizes, *recipe.groups]) as scan:
        more: dict[str, Any] = {f"key_{k}": scan.names.key(name) for k, name in enumerate(recipe.groups)}
        if sizes:
            node: expr.Node = parse_expression(recipe.weights) if recipe.weights else recipe.variables[TRIALS].expression
            more["size"] = numeric(node, scan.names)
        only = both([exp.EQ(this=scan.names.key(name), expression=exp.convert(value)) for name, value in chosen.items()])
        for rows in scan.rows(more=more, order=scan.engine.identity().ordered, only=only, sizes=sizes):
            F.append(rows.F)
            if sum(f.shape[1] for f in F) > MOST_ROWS:
                message = f"the block {chosen} has more than {MOST_ROWS:,} rows, too many to write out their covariances"
                raise DataError(message, code="too_many_rows")
            offsets.append(np.zeros(rows.n) if rows.offset is None else rows.offset)
            held_sizes.append(column(pa.record_batch({"size": rows.more["size"]}), "size") if sizes else np.ones(rows.n))
            keys.append([rows.more[f"key_{k}"] for k in range(len(recipe.groups))])
    columns = [pa.chunked_array([batch[k] for batch in keys]) for k in range(len(recipe.groups))] if keys else []
    return np.hstack(F), np.concatenate(offsets), np.concatenate(held_sizes) if sizes else 1.0, columns


def _random_covariance(fit: MixedFit, F: Array, keys: list[Any]) -> Array:
    """Cov(z_i'b, z_j'b) (n, n): z_i'Ψz_j of each term whose level both rows share."""
    z, half, place = list(fit.recipe.z), half_factor(fit), 0
    out = np.zeros((F.shape[1], F.shape[1]))
    factors = fit.recipe.factors or (fit.recipe.groups,)
    values = {name: keys[k].to_pylist() for k, name in enumerate(fit.recipe.groups)}
    for term in fit.terms:
        k = len(term.names)
        h = half[:, place : place + k].T @ F[z]
        place += k
        columns = next(groups for groups in factors if ":".join(groups) == term.group)
        labels = list(zip(*(values[name] for name in columns), strict=True))
        code = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        levels = np.array([code[label] for label in labels])
        out += np.where(levels[:, None] == levels[None, :], h.T @ h, 0.0)
    return out

