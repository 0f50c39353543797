"""Sufficient statistics of a linear mixed model: a commutative monoid that outlives its rows.

Statistics of disjoint sets of rows add up to those of their union, block by block. What is held are sums over
*features* (see `features`), so that other contrasts, base levels, shifts and new levels are exact linear maps.
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arrays import arrow, column
from .blocks import BATCH, Blocks, stack
from .design import Level, Monomial, ordered_levels
from .errors import ConfigError, DataError
from .features import CONSTANT, Coordinates, Recipe, extended, multiplied

if TYPE_CHECKING:
    import pyarrow as pa

    from .factors import Crossed
    from .options import Options

FORMAT = "mlpipe.suffstats/1"
PRODUCTS = 64 << 20  # bytes of whole cross-products that are unpacked at once


class BlockProducts(NamedTuple):
    """A batch of B blocks: `keys` (the grouping columns, in the order of `Recipe.groups`), `rows` (B,), `n` (B,) the same with
    frequency weights counted, `sum_log_w` (B,), `gram` (B, features, features)."""

    keys: list[pa.Array]
    rows: np.ndarray
    n: np.ndarray
    sum_log_w: np.ndarray
    gram: np.ndarray


@dataclass(frozen=True)
class SuffStats:
    """Sufficient statistics of one or several responses over one grouping factor.

    Attributes:
        recipe: what was summed: formula, features, shifts and scales, levels.
        rows: rows that entered.
        n: the same with frequency weights counted.
        sum_log_w: sum of the logarithms of the precision weights.
        gram: (features, features) cross-products over all rows, weighted.
        blocks: per-block sums in the order of `recipe.pairs()`; None without a grouping factor.
        collect: "fit" (second level; does not merge), "blocks", "blocks+xx" (each block's own cross-products too).
        info: rows read, dropped by cause, passes, seconds by stage, choices made.
        crossed: sums and cells of several grouping factors, in place of blocks.
    """

    recipe: Recipe
    rows: int
    n: float
    sum_log_w: float
    gram: np.ndarray
    blocks: Blocks | None
    collect: str
    info: dict[str, Any] = field(default_factory=dict)
    crossed: Crossed | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory held; a mapped file's pages are not counted."""
        return int(self.gram.nbytes) + (self.blocks.nbytes if self.blocks else 0) + (self.crossed.nbytes if self.crossed else 0)

    def __repr__(self) -> str:
        blocks = f", {self.blocks.n_blocks:,} blocks" if self.blocks else ""
        if self.crossed:
            blocks = "".join(f", {factor.levels.group}: {len(factor.levels):,} levels" for factor in self.crossed.factors)
        return f"<SuffStats of {self.recipe.formula.text!r}: {self.rows:,} rows{blocks}, {self.nbytes:,} bytes>"

    def __add__(self, other: SuffStats) -> SuffStats:
        """The statistics of the union of two disjoint sets of rows."""
        if not isinstance(other, SuffStats):
            return NotImplemented
        return merge(self, other)

    def update(self, data: Any, *, options: Options | None = None) -> SuffStats:
        """These statistics and those of further rows of the same shape, as new statistics; bases and shifts stay as they are.

        Data without any row change nothing and are counted in `info["empty_updates"]`.
        """
        from .collect import collect_like

        try:
            return merge(self, collect_like(self, data, options))
        except DataError as error:
            if error.code != "empty":
                raise
            return replace(self, info={**self.info, "empty_updates": self.info.get("empty_updates", 0) + 1})

    def block_products(self) -> Iterator[BlockProducts]:
        """Each block's own cross-products F'wF over the features, batch by batch, in the order in which the blocks are held.

        With `W` (features, p + 1) of `reduction.coded`, W' F'wF W is the block's `[X* y*]'w[X* y*]`. Raises DataError where they were
        not collected (collect="blocks+xx").
        """
        if self.collect != "blocks+xx" or self.blocks is None:
            raise DataError("the statistics hold no X'X per block", code="not_collected", hint='collect with collect="blocks+xx"')
        return _block_products(self.recipe, self.blocks)

    def covariate_products(self) -> Iterator[tuple[list[pa.Array], np.ndarray, np.ndarray]]:
        """Batches of blocks: their keys, their rows (B,) and the part (B, covariate features, features) of F'wF that all questions about
        fixed effects take. Raises DataError where it was not collected: neither collect="blocks+xx" nor are all covariates random ones.
        """
        recipe, m = self.recipe, self.recipe.n_covariates
        if self.collect == "blocks+xx" and self.blocks is not None:
            return ((part.keys, part.rows, part.gram[:, :m]) for part in self.block_products())
        if self.blocks is None or self.blocks.table is None or self.collect == "fit" or set(recipe.z) != set(range(m)):
            hint = 'collect with collect="blocks+xx", or pass the data'
            raise DataError(f"collect={self.collect!r} keeps no cross-products of each block's covariates", code="not_collected", hint=hint)
        return _all_random(recipe, self.blocks, m)

    def save(self, path: str | Path) -> None:
        """Writes one Arrow file. Raises DataError where only the second level was kept (collect="fit")."""
        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> SuffStats:
        """Reads what `save` wrote. Raises DataError where the file is something else."""
        return load(Path(path))


def check_settled(stats: SuffStats, arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError for arguments that were settled when the statistics were collected."""
    for name in ("weights", "freq", "offset", "na"):
        held = {"weights": stats.recipe.weights, "freq": stats.recipe.freq, "offset": stats.recipe.offset}.get(name)
        if arguments[name] is not None and arguments[name] not in ("drop", held):
            raise ConfigError(f"{name} was settled when the statistics were collected", hint="leave it out")


def change(source: Recipe, target: Recipe) -> np.ndarray:
    """The map M (source features x target features) with target features = source features @ M.

    Shifts, scales, the omitted level and the set of levels may differ; a level that the source lacks is zero there.
    """
    position = {feature: i for i, feature in enumerate(source.features)}
    out = np.zeros((len(source.features), len(target.features)))
    for j, feature in enumerate(target.features):
        for monomial, coefficient in _rewritten(feature, source.coordinates, target.coordinates).items():
            if monomial not in position:
                raise DataError("the statistics were collected for different terms and cannot be merged", code="not_mergeable")
            out[position[monomial], j] += coefficient
    return out


def _rewritten(feature: Monomial, source: Coordinates, target: Coordinates) -> dict[Monomial, float]:
    """A target feature as a combination of source features."""
    product: dict[Monomial, float] = {CONSTANT: 1.0}
    for atom in feature:
        if atom in target.scalings:
            (shift, scale), raw = target.scalings[atom], source.affine(atom)
            parts = {monomial: value / scale for monomial, value in raw.items()}
            parts[CONSTANT] = (raw.get(CONSTANT, 0.0) - shift) / scale
        else:
            parts = source.affine(atom) if atom.part in source.levels[atom.variable] else {}
        product = multiplied(product, {monomial: value for monomial, value in parts.items() if value})
    return product


def union_recipe(a: Recipe, b: Recipe) -> Recipe:
    """The first recipe with the levels of both; raises DataError where they are not of one formula."""
    same = ("kinds", "contrasts", "responses", "weights", "freq", "offset", "groups", "factors")
    units = [one.units for one in (a, b) if one.units is not None]
    if a.formula.text != b.formula.text or units[1:] != units[:-1] or any(getattr(a, name) != getattr(b, name) for name in same):
        raise DataError("statistics of different formulas, column types or weights cannot be merged", code="not_mergeable")
    variables, new = dict(a.variables), dict[str, tuple[Level, ...]]()
    for label, variable in a.variables.items():
        other = b.variables[label]
        if variable.constants != other.constants:
            raise DataError(
                f"the data-dependent basis {label} differs between the statistics",
                code="not_mergeable",
                hint="collect further rows with stats.update(data), which keeps the basis",
            )
        new[label] = tuple(level for level in other.levels if level not in variable.levels)
        if other.order is not None and other.order != variable.order:
            order = tuple(dict.fromkeys((variable.order or ()) + other.order))
            variables[label] = replace(variable, order=order, levels=ordered_levels(variable.levels, order))
    return extended(replace(a, variables=variables), new)


def merge(a: SuffStats, b: SuffStats) -> SuffStats:
    """The statistics of the union of two disjoint sets of rows.

    Raises DataError where they are of different formulas or hold the second level only (collect="fit").
    """
    if a.collect != b.collect and "fit" not in (a.collect, b.collect):
        raise DataError(f'collect="{a.collect}" and collect="{b.collect}" do not merge', code="not_mergeable", hint="collect both alike")
    if "fit" in (a.collect, b.collect):
        raise DataError('the second level of compression does not merge', code="not_mergeable", hint='collect with collect="blocks"')
    recipe = union_recipe(a.recipe, b.recipe)
    left, right = transformed(a, recipe), transformed(b, recipe)
    blocks = None
    if left.blocks is not None and right.blocks is not None:
        blocks = _merged_blocks(left, right)
    info = {key: a.info.get(key, 0) + b.info.get(key, 0) for key in ("rows_read", "rows_dropped")}
    crossed = _merged_factors(left.crossed, right.crossed) if left.crossed is not None and right.crossed is not None else None
    gram = left.gram + right.gram
    return SuffStats(recipe, a.rows + b.rows, a.n + b.n, a.sum_log_w + b.sum_log_w, gram, blocks, a.collect, info, crossed)


def _merged_factors(a: Crossed, b: Crossed) -> Crossed:
    from .factors import merged
    from .options import Options

    return merged(a, b, budget=Options().memory_bytes // 4, parent=None)


def transformed(stats: SuffStats, recipe: Recipe) -> SuffStats:
    """The same statistics over the features of another recipe of the same formula."""
    if recipe is stats.recipe or recipe == stats.recipe:
        return stats
    M = change(stats.recipe, recipe)
    blocks = _mapped(stats.blocks, stats.recipe, recipe, M) if stats.blocks is not None and stats.blocks.table is not None else None
    crossed = stats.crossed
    if crossed is not None:
        from .factors import transformed as over

        left = M[list(stats.recipe.z)][:, list(recipe.z)]
        crossed = over(crossed, pair_map(stats.recipe, left, M, recipe.pairs(), recipe.z), left, recipe.z)
    return replace(stats, recipe=recipe, gram=M.T @ stats.gram @ M, blocks=blocks, crossed=crossed)


def _mapped(blocks: Blocks, source: Recipe, target: Recipe, M: np.ndarray) -> Blocks:
    """The blocks over the features of another recipe, target features = source features @ M."""
    import pyarrow as pa

    assert blocks.table is not None
    kept = [*blocks.keys, "row_count"]
    names, rest = [f"s{k}" for k in range(len(target.pairs()))], []
    if blocks.rest:
        own = len(source.rest())
        rest = [*(f"x{k}" for k in range(len(target.rest()))), *blocks.rest[own:]]
    schema = pa.schema([*(blocks.table.schema.field(name) for name in kept), *(pa.field(name, pa.float64()) for name in [*names, *rest])])
    sums = _whole_sums(blocks, source, target, M) if rest else _pair_sums(blocks, source, target, M)
    parts = [
        pa.RecordBatch.from_arrays([*(batch.column(name) for name in kept), *map(arrow, new)], schema=schema) for batch, new in sums
    ]
    return replace(blocks, names=names, rest=rest, table=pa.Table.from_batches(parts, schema), directory=None)


def _pair_sums(blocks: Blocks, source: Recipe, target: Recipe, M: np.ndarray) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """Batches of blocks, with the sums (K, B) of the target's pairs."""
    assert blocks.table is not None
    V = pair_map(source, M[list(source.z)][:, list(target.z)], M, target.pairs(), target.z)
    for batch in blocks.table.to_batches():
        yield batch, V @ stack(batch, blocks.names)


def _whole_sums(blocks: Blocks, source: Recipe, target: Recipe, M: np.ndarray) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """The same with the target's rest, and what follows it as it is."""
    i, j = np.array([*target.pairs(), *target.rest()]).T
    more = blocks.rest[len(source.rest()) :]
    for batch in _batches(blocks, max(source.matrix_bytes, target.matrix_bytes)):
        gram = M.T @ _grams(source, blocks, batch) @ M
        yield batch, np.vstack([gram[:, i, j].T, *(column(batch, name) for name in more)])


def _block_products(recipe: Recipe, blocks: Blocks) -> Iterator[BlockProducts]:
    more = blocks.rest[len(recipe.rest()) :]
    for batch in _batches(blocks, recipe.matrix_bytes):
        rows = column(batch, "row_count")
        n = column(batch, "n") if "n" in more else rows.astype(float)
        logs = column(batch, "sum_log_w") if "sum_log_w" in more else np.zeros(len(rows))
        yield BlockProducts([batch.column(key) for key in blocks.keys], rows, n, logs, _grams(recipe, blocks, batch))


def _all_random(recipe: Recipe, blocks: Blocks, m: int) -> Iterator[tuple[list[pa.Array], np.ndarray, np.ndarray]]:
    """`SuffStats.covariate_products` where each of the m covariate features stands among the random ones."""
    V = full_map(recipe, np.eye(m)[:, [recipe.z.index(i) for i in range(m)]], np.eye(len(recipe.features)))
    for batch in _batches(blocks, recipe.matrix_bytes):
        C = np.einsum("ijk,kb->bij", V, stack(batch, blocks.names), optimize=True)
        yield [batch.column(key) for key in blocks.keys], column(batch, "row_count"), C


def _batches(blocks: Blocks, each: int) -> list[pa.RecordBatch]:
    """The blocks in batches whose cross-products, of `each` bytes a block, take PRODUCTS at most."""
    assert blocks.table is not None
    batches: list[pa.RecordBatch] = blocks.table.to_batches(max_chunksize=max(1, min(BATCH, PRODUCTS // each)))
    return batches


def _grams(recipe: Recipe, blocks: Blocks, batch: pa.RecordBatch) -> np.ndarray:
    """The blocks' own cross-products (B, features, features)."""
    pairs = [*recipe.pairs(), *recipe.rest()]
    out = np.empty((batch.num_rows, len(recipe.features), len(recipe.features)))
    for (i, j), name in zip(pairs, [*blocks.names, *blocks.rest[: len(recipe.rest())]], strict=True):
        out[:, i, j] = out[:, j, i] = column(batch, name)
    return out


def pair_map(recipe: Recipe, left: np.ndarray, right: np.ndarray, pairs: list[tuple[int, int]], z: tuple[int, ...]) -> np.ndarray:
    """The map V (len(pairs), K) with (left' C right)[pairs] = V @ sums, for a block's C = Z'wF held as K distinct sums.

    `left` (z features, a), `right` (features, b); each pair is (a position in z's numbering of the target, column of right).
    """
    row = {feature: i for i, feature in enumerate(z)}
    full = full_map(recipe, left, right)
    return np.stack([full[row[a], j] for a, j in pairs])


def full_map(recipe: Recipe, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The map (a, b, K) with left' C right = map @ sums, C (z features, features) held as K distinct sums."""
    where = {pair: k for k, pair in enumerate(recipe.pairs())}
    spread = np.zeros((len(recipe.z), len(recipe.features), len(where)))
    for i, a in enumerate(recipe.z):
        for j in range(len(recipe.features)):
            spread[i, j, where[(a, j)] if (a, j) in where else where[(j, a)]] = 1.0
    return np.asarray(np.einsum("ia,ijk,jb->abk", left, spread, right, optimize=True))


def _merged_blocks(a: SuffStats, b: SuffStats) -> Blocks:
    """The blocks of both, those that occur in both added up."""
    import pyarrow as pa

    from .levels import stacked

    assert a.blocks is not None and b.blocks is not None
    one, other = a.blocks.table, b.blocks.table
    assert one is not None and other is not None
    names, rest, keys = a.blocks.names, a.blocks.rest, a.blocks.keys
    held = ["row_count", *names, *rest]
    both, bare = stacked(one.select(keys), other.select(b.blocks.keys), ":".join(a.recipe.groups))
    sums = pa.concat_tables([one.select(held), other.select(held)], promote_options="permissive")
    for i, name in enumerate(bare.column_names):
        sums = sums.append_column(f"key {i}", bare.column(name))
    sums = sums.append_column("place", arrow(np.arange(len(both)), pa.int64()))
    by = [f"key {i}" for i in range(len(keys))]
    summed = sums.group_by(by, use_threads=False).aggregate([*((name, "sum") for name in held), ("place", "min")])
    first = both.take(summed.column("place_min"))
    table = pa.table([*first.columns, *(summed.column(f"{name}_sum") for name in held)], names=[*keys, *held])
    rows = column(table, "row_count")
    return Blocks(names, len(table), table, largest=float(rows.max()), smallest=float(rows.min()), rest=rest)


def save(stats: SuffStats, path: Path) -> None:
    """See `SuffStats.save`."""
    import pyarrow as pa

    if stats.collect == "fit":
        raise DataError('statistics of collect="fit" cannot be saved', code="not_mergeable", hint='collect with collect="blocks"')
    table = stats.blocks.table if stats.blocks is not None and stats.blocks.table is not None else pa.table({})
    if stats.crossed is not None:
        from .factors import to_arrow

        table = to_arrow(stats.crossed)
    head = {
        "format": FORMAT,
        "recipe": stats.recipe.to_json(),
        "rows": stats.rows,
        "n": stats.n,
        "sum_log_w": stats.sum_log_w,
        "gram": stats.gram.tolist(),
        "names": stats.blocks.names if stats.blocks else None,
        "rest": stats.blocks.rest if stats.blocks else [],
        "collect": stats.collect,
        "info": {key: stats.info[key] for key in ("rows_read", "rows_dropped") if key in stats.info},
    }
    schema = table.schema.with_metadata({"mlpipe": json.dumps(head)})
    unfinished = path.with_name(path.name + ".partial")
    try:
        with pa.ipc.new_file(str(unfinished), schema) as writer:
            writer.write_table(table.cast(schema))
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ConfigError(f"cannot write {path}: {error.strerror}", code="not_writable") from error


def opened(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The mapped table of a state's file, and what its head says. Raises DataError where it is none."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        head = dict(json.loads(table.schema.metadata[b"mlpipe"]))
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}", code="file_not_found") from error
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise _no_statistics(path) from error
    return table.replace_schema_metadata(None), head


def _no_statistics(path: Path) -> DataError:
    return DataError(f"{path} does not hold statistics that this version can read", code="not_statistics")


def load(path: Path) -> SuffStats:
    """See `SuffStats.load`."""
    table, head = opened(path)
    if head.get("format") != FORMAT:
        raise _no_statistics(path)
    return loaded(table, head)


def loaded(table: pa.Table, head: Mapping[str, Any]) -> SuffStats:
    """The statistics that `save` wrote, over the mapped table."""
    blocks = None
    if head["names"] is not None:
        rows = column(table, "row_count").astype(float)
        largest, smallest = float(rows.max(initial=0)), float(rows.min(initial=np.inf))
        blocks = Blocks(head["names"], len(table), table, largest=largest, smallest=smallest, rest=head.get("rest", []))
        keys = {key: f"k{i}" for i, key in enumerate(blocks.keys)}
        blocks.table = table.rename_columns([keys.get(name, name) for name in table.column_names])
    recipe, gram = Recipe.from_json(head["recipe"]), np.array(head["gram"])
    crossed = None
    if recipe.factors:
        from .factors import from_arrow

        crossed = from_arrow(table, recipe.factors, recipe.z)
    return SuffStats(recipe, head["rows"], head["n"], head["sum_log_w"], gram, blocks, head["collect"], dict(head["info"]), crossed)
