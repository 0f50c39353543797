"""Conditional modes of the random effects (BLUPs): one grouped query, solved block by block as it streams.

b_i = Λ M_i⁻¹ Λ' Z_i'w(y - X beta)_i with M_i = Λ'Z_i'wZ_iΛ + I, and given theta and beta
Var(b_i | y) = σ² Λ M_i⁻¹ Λ' (Bates et al. 2015, equations 56 and 58; Henderson 1975).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .arrays import arrow, column, in_type, plain_interval
from .errors import DataError
from .levels import places
from .reduction import response_vector

if TYPE_CHECKING:
    import pyarrow as pa

    from .engines.base import Engine
    from .levels import Levels
    from .options import Options
    from .result import MixedFit

KEPT = 1_000_000  # levels whose modes are kept for further calls


@contextmanager
def reopened(fit: MixedFit, options: Options | None = None) -> Iterator[Engine]:
    """The fit's own source again, after a check that it is unchanged: files by their marks, other sources by their rows' number.

    Raises DataError where it is gone or changed.
    """
    from .sources import open_source, row_count
    from .stats import SuffStats

    if fit.source is None or isinstance(fit.source, SuffStats):
        raise DataError("the rows that this fit came from are not at hand", code="no_source", hint="pass the data")
    engine = open_source(fit.source, options=options or fit.options)
    try:
        if engine.identity().fingerprint != fit.info.get("fingerprint"):
            raise DataError("the source changed since the fit", code="source_changed", hint="fit it again")
        if not engine.identity().files and (rows := row_count(engine)) != (read := fit.info.get("rows_read", rows)):
            message = f"the source changed since the fit: it has {rows:,} rows, and the fit read {read:,}"
            raise DataError(message, code="source_changed", hint="fit it again")
        yield engine
        engine.check_unchanged()
    finally:
        engine.close()


def ranef(fit: MixedFit, *, wide: bool, stream: bool, group: str | None = None) -> pa.Table | pa.RecordBatchReader:
    """See `LMMFit.ranef`: a table sorted by the keys, or a stream in the engine's order. Tables of up to KEPT levels stay with the fit."""
    import pyarrow as pa

    if fit.recipe.factors:
        shaped = _of_group(fit, group or fit.groups[0], wide)
        return shaped.to_reader() if stream else shaped
    if not stream or fit.effects_table is not None:
        table = fit.effects_table if fit.effects_table is not None else table_of(fit, _computed(fit))
        if len(table) <= KEPT:
            fit.effects_table = table
        shaped = table if wide else long(fit, table)
        return shaped.to_reader() if stream else shaped
    tables = (table if wide else long(fit, table) for table in _computed(fit))
    first = next(tables)
    return pa.RecordBatchReader.from_batches(first.schema, (batch for table in (first, *tables) for batch in table.to_batches()))


def mode_table(terms: Sequence[Named], levels: Levels, modes: np.ndarray, sds: np.ndarray) -> pa.Table:
    """The key columns of a factor's levels, and per coefficient of its terms the modes and conditional standard deviations (q, m)."""
    import pyarrow as pa

    columns: dict[str, Any] = dict(zip(key_names(terms, levels.columns), levels.keys.columns, strict=True))
    for name, mode, sd in zip(coefficient_names(terms), modes, sds, strict=True):
        columns |= {name: arrow(mode), f"{name}_se": arrow(sd)}
    return pa.table(columns)


def in_own_types(fit: MixedFit, rows: pa.Table | pa.RecordBatchReader) -> pa.Table | pa.RecordBatchReader:
    """Tables of modes with their key columns in the source's own types, as far as the fit still knows them and Arrow converts."""
    import pyarrow as pa

    known = fit.info.get("key_types", {})
    names = dict(zip(key_names(fit.terms, list(known)), known.values(), strict=True)) if known else {}
    if not any(name in rows.schema.names and rows.schema.field(name).type != kind for name, (kind, _) in names.items()):
        return rows
    if isinstance(rows, pa.Table):
        return _converted(rows, names)
    tables = (_converted(pa.Table.from_batches([batch]), names) for batch in rows)
    empty = _converted(rows.schema.empty_table(), names)
    return pa.RecordBatchReader.from_batches(empty.schema, (batch for table in tables for batch in table.to_batches()))


def _converted(table: pa.Table, kinds: dict[str, tuple[pa.DataType, tuple[str, ...] | None]]) -> pa.Table:
    for i, name in enumerate(table.column_names):
        if name in kinds:
            table = table.set_column(i, name, in_type(table.column(i), *kinds[name]))
    return table


def _of_group(fit: MixedFit, group: str, wide: bool) -> pa.Table:
    """The modes of one of several factors, which stay with the fit."""
    import pyarrow as pa

    if group not in fit.effects_tables:
        hint = 'write the fit with ranef=True, or predict with effects="population"'
        raise DataError("the fit was written without its conditional modes (BLUPs)", code="no_modes", hint=hint)
    table = fit.effects_tables[group]
    for i, field in enumerate(table.schema):
        if pa.types.is_interval(field.type):
            table = table.set_column(i, field.name, plain_interval(table.column(i).combine_chunks()))
    return table if wide else long(fit, table, group)


def table_of(fit: MixedFit, tables: Iterator[pa.Table]) -> pa.Table:
    """The batches as one table, sorted by the keys."""
    import pyarrow as pa

    return _sorted(pa.concat_tables(tables), key_names(fit.terms, fit.recipe.groups))


def _sorted(table: pa.Table, keys: list[str]) -> pa.Table:
    """Sorted by the keys; those of a type that has no order stay in the engine's."""
    table = table.unify_dictionaries().combine_chunks()
    order = places(table, keys)
    return table if order is None else table.take(order)


def key_names(terms: Sequence[Named], columns: Sequence[str]) -> list[str]:
    """The names of the key columns: the source's own, or `<name>_key` where that is one of ours."""
    taken = {"group", "term", "estimate", "std_error", "reliability"}
    taken |= {column for name in coefficient_names(terms) for column in (name, f"{name}_se")}
    out: list[str] = []
    for name in columns:
        while name in taken:
            name = f"{name}_key"
        taken.add(name)
        out.append(name)
    return out


def _computed(fit: MixedFit) -> Iterator[pa.Table]:
    from .stats import SuffStats

    if fit.source is None:
        hint = 'write the fit with ranef=True, or predict with effects="population"'
        raise DataError("the fit was written without its conditional modes (BLUPs)", code="no_modes", hint=hint)
    if isinstance(fit.source, SuffStats):
        yield from _from_statistics(fit, fit.source)
    else:
        with reopened(fit) as engine:
            yield from from_rows(fit, engine)


def residual_vector(fit: MixedFit) -> np.ndarray:
    """The combination of features that is y - X beta."""
    return np.asarray(response_vector(fit.recipe, fit.response) - fit.gamma)


def from_rows(fit: MixedFit, engine: Engine) -> Iterator[pa.Table]:
    """The modes by one grouped query over the rows: a wide table a batch."""
    from . import statements
    from .looks import used_columns
    from .sql import Names

    recipe = fit.recipe
    schema = engine.schema()
    names = Names.of(schema, recipe.kinds)
    statement = statements.blup_sums(recipe, names, residual_vector(fit).tolist())
    keys = [names.key(group).name for group in recipe.groups]
    for batch in engine.query(statement, used_columns(recipe, names)):
        S = np.empty((batch.num_rows, len(recipe.z), len(recipe.z)))
        for i, a in enumerate(recipe.z):
            for j, b in enumerate(recipe.z[i:], start=i):
                S[:, i, j] = S[:, j, i] = column(batch, f"s_{a}_{b}")
        r = np.column_stack([column(batch, f"r_{a}") for a in recipe.z])
        yield _table(fit, [batch.column(key) for key in keys], S, r)


def _from_statistics(fit: MixedFit, stats: Any) -> Iterator[pa.Table]:
    """The same from per-block sums that were kept with their keys."""
    from .blocks import stack
    from .stats import full_map

    if stats.collect == "fit":
        hint = 'collect with collect="blocks"'
        raise DataError('collect="fit" keeps no blocks to compute conditional modes from', code="not_collected", hint=hint)
    recipe, table = stats.recipe, stats.blocks.table
    identity = np.eye(len(recipe.z))
    every = np.zeros((len(recipe.features), len(recipe.z)))
    every[list(recipe.z)] = identity
    S_map = full_map(recipe, identity, every)
    r_map = full_map(recipe, identity, residual_vector(fit)[:, None])[:, 0]
    keys = stats.blocks.keys
    for batch in table.to_batches(max_chunksize=65_536):
        sums = stack(batch, stats.blocks.names)
        S = np.einsum("abk,kn->nab", S_map, sums)
        yield _table(fit, [batch.column(key) for key in keys], S, (r_map @ sums).T)


def _table(fit: MixedFit, keys: list[Any], S: np.ndarray, r: np.ndarray) -> pa.Table:
    """Modes and conditional standard deviations of a batch of blocks from Z'wZ (B, z, z) and Z'w(y - X beta) (B, z)."""
    import pyarrow as pa

    modes, sds = solved(fit, S, r)
    columns, names = [plain_interval(key) for key in keys], key_names(fit.terms, fit.recipe.groups)
    for k, name in enumerate(coefficient_names(fit.terms)):
        columns += [pa.array(modes[:, k]), pa.array(sds[:, k])]
        names = [*names, name, f"{name}_se"]
    return pa.table(dict(zip(names, columns, strict=True)))


def coefficient_names(terms: Sequence[Named]) -> list[str]:
    """The coefficients of a factor's terms, in order; a name that occurs in two of them gets its term's number."""
    flat = [name for term in terms for name in term.names]
    return [name if flat.count(name) == 1 else f"{name}.{k + 1}" for k, term in enumerate(terms) for name in term.names]


def solved(fit: MixedFit, S: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Modes (B, q) and their conditional standard deviations (B, q) in the user's coordinates; of absorbed intercepts, whose variance is
    infinite, means and their standard errors given beta."""
    if np.isinf(fit.terms[0].factor).any():
        at = int(np.flatnonzero(fit.terms[0].Q[:, 0])[0])
        return r[:, at : at + 1] / S[:, at, at : at + 1], fit.sigma / np.sqrt(S[:, at, at : at + 1])
    Q = np.column_stack([term.Q for term in fit.terms])
    lambda_, back = _block_diagonal([term.star for term in fit.terms]), _block_diagonal([np.linalg.inv(term.R) for term in fit.terms])
    half = Q @ lambda_
    M = half.T @ S @ half + np.eye(half.shape[1])
    out = back @ lambda_
    L = np.linalg.cholesky(M)
    u = np.linalg.solve(M, (r @ half)[:, :, None])[:, :, 0]
    P = np.linalg.solve(L, np.broadcast_to(out.T, (len(S), *out.T.shape)))
    return u @ out.T, fit.effect_scale * np.sqrt((P**2).sum(axis=1))


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    size = sum(len(block) for block in blocks)
    out, at = np.zeros((size, size)), 0
    for block in blocks:
        out[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return out


def long(fit: MixedFit, table: pa.Table, group: str | None = None) -> pa.Table:
    """One row a level and coefficient: group, keys, term, estimate, std_error, reliability (1 - Var(b|y) / Var(b))."""
    import pyarrow as pa

    terms = [term for term in fit.terms if group is None or term.group == group]
    names, n = coefficient_names(terms), len(table)
    keys = table.column_names[: table.num_columns - 2 * len(names)]
    labels = [name for term in terms for name in term.names]
    prior = np.concatenate([fit.effect_scale * np.sqrt((term.factor**2).sum(axis=1)) for term in terms])
    estimate = np.column_stack([column(table, name) for name in names])
    se = np.column_stack([column(table, f"{name}_se") for name in names])
    with np.errstate(invalid="ignore", divide="ignore"):
        reliability = np.clip(1 - (se / prior) ** 2, 0.0, 1.0)
    repeat = np.repeat(np.arange(n), len(names))
    columns: dict[str, Any] = {"group": pa.array([terms[0].group] * len(repeat), pa.string())}
    columns |= {key: table.column(key).take(pa.array(repeat)) for key in keys}
    columns |= {
        "term": pa.array(labels * n, pa.string()),
        "estimate": estimate.ravel(),
        "std_error": se.ravel(),
        "reliability": pa.array(reliability.ravel(), from_pandas=True),
    }
    return pa.table(columns)


class Named(Protocol):
    """A random term: its coefficients' names."""

    @property
    def names(self) -> tuple[str, ...]: ...
