"""Rows of a generalized mixed model that outlive their source: as cells of equal design row within a block, or row by row.

Held sets of disjoint rows add up to that of their union: cells of one block with the same design row become one. What a cell
holds is what the likelihood needs of its rows (see `cells`), so a fit of the union is the fit of all rows.
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import cells
from .arrays import arrow, column
from .atomic import writing
from .design import Atom, Monomial
from .errors import DataError
from .features import Recipe
from .present import restricted
from .scratch import Scratch, spilling
from .stats import union_recipe

if TYPE_CHECKING:
    import pyarrow as pa

    from .engines.arrange import Arranger
    from .options import Options

FORMAT = "mlpipe.cells/1"


@dataclass(frozen=True)
class Compressed:
    """Rows of one recipe, in no order.

    `rows` that entered, `n` the same with frequencies counted, `constant` of their log-likelihood; `merges`: whether they are held as
    cells, else row by row; `table`: keys k0, k1, …, then the columns of `cells.columns`; `directory`: of a mapped file, which goes with
    this object; `info`: what was noted when they were read.
    """

    recipe: Recipe
    rows: int
    n: float
    constant: float
    merges: bool
    table: pa.Table
    info: dict[str, Any] = field(default_factory=dict)
    directory: Scratch | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        return int(self.table.nbytes)

    @property
    def keys(self) -> list[str]:
        """The columns of the grouping keys, in the order of `Recipe.groups`."""
        return key_names(self.recipe)

    def joined(self, other: Compressed) -> Compressed:
        """The rows or cells of both, side by side. Raises DataError where they are not of one model and one basis."""
        import pyarrow as pa

        recipe = _union(self.recipe, other.recipe)
        try:
            table = pa.concat_tables([_over(one, recipe) for one in (self, other)], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError("the grouping keys of the statistics have different types", code="not_mergeable") from error
        total = {name: getattr(self, name) + getattr(other, name) for name in ("rows", "n", "constant")}
        return Compressed(recipe, merges=self.merges, table=table, **total)

    def merged(self, other: Compressed, arrange: Arranger) -> Compressed:
        """The same, cells of equal design row within a block added up, within the memory limit."""
        both = self.joined(other)
        if not self.merges:
            return both
        table, directory = held(arrange(both.table, cells.merged(both.recipe, both.keys)), arrange.options)
        return replace(both, table=table, directory=directory)

    def present(self) -> Compressed:
        """The same over the levels of factors that occur in them."""
        levels, omitted = self.recipe.coordinates.levels, self.recipe.coordinates.omitted
        weight: dict[str, dict[str, float]] = {}
        for name, labels in levels.items():
            found = {text: self._occurs(Atom(name, text)) for text in labels if text != omitted[name]}
            weight[name] = {text: found.get(text, self.table.num_rows - sum(found.values())) for text in labels}
        recipe = restricted(self.recipe, weight)
        return replace(self, recipe=recipe, table=_over(self, recipe))

    def _occurs(self, atom: Atom) -> float:
        """In how many rows or cells a level occurs."""
        at = self.recipe.features.index((atom,))
        return float(column(self.table, f"f{at}").sum())

    def save(self, path: Path) -> None:
        """Writes one Arrow file."""
        import pyarrow as pa

        head = {
            "format": FORMAT, "recipe": self.recipe.to_json(), "rows": self.rows, "n": self.n, "constant": self.constant,
            "merges": self.merges,
        }  # fmt: skip
        schema = self.table.schema.with_metadata({"mlpipe": json.dumps(head)})
        unfinished = path.with_name(path.name + ".partial")
        with writing(path):
            try:
                with pa.ipc.new_file(str(unfinished), schema) as writer:
                    for batch in self.table.to_batches():
                        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
                unfinished.replace(path)
            except OSError:
                unfinished.unlink(missing_ok=True)
                raise

    @classmethod
    def of(cls, table: pa.Table, head: Mapping[str, Any]) -> Compressed:
        """What `save` wrote, over the mapped table. Raises KeyError, TypeError or ValueError where it is something else."""
        if head["format"] != FORMAT:
            raise KeyError(head["format"])
        recipe = Recipe.from_json(head["recipe"])
        return cls(recipe, head["rows"], head["n"], head["constant"], head["merges"], table)


def key_names(recipe: Recipe) -> list[str]:
    """The columns of the keys: named by their place among the groups, which other sources share, not by that in one source."""
    return [f"k{i}" for i in range(len(recipe.groups))]


def held(batches: Iterable[pa.RecordBatch], options: Options) -> tuple[pa.Table, Scratch | None]:
    """Batches as a table: in memory within a quarter of the limit, else in a mapped file. Raises ResourceError for a full disk."""
    import pyarrow as pa

    kept: list[pa.RecordBatch] = []
    size, budget = 0, options.memory_bytes // 4
    rest = iter(batches)
    for batch in rest:
        kept.append(batch)
        size += batch.nbytes
        if size > budget:
            return _mapped(_chained(kept, rest), kept[0].schema, options.temp_directory)
    return (pa.Table.from_batches(kept) if kept else pa.table({})), None


def _chained(first: list[pa.RecordBatch], rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    while first:
        yield first.pop(0)
    yield from rest


def _mapped(batches: Iterator[pa.RecordBatch], schema: pa.Schema, parent: str | None) -> tuple[pa.Table, Scratch]:
    import pyarrow as pa

    directory = Scratch(parent)
    path = Path(directory.name) / "cells.arrow"
    with spilling("cells", directory.cleanup), pa.ipc.new_file(str(path), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all(), directory


def _union(a: Recipe, b: Recipe) -> Recipe:
    """The recipe with the levels of both, the same in all else."""
    same = ("family", "trials", "success", "failure")
    scaled = a.coordinates.scalings == b.coordinates.scalings and a.coordinates.omitted == b.coordinates.omitted
    if not scaled or any(getattr(a, name) != getattr(b, name) for name in same):
        raise DataError("rows of different families, shifts or scales cannot be merged", code="not_mergeable")
    return union_recipe(a, b)


def _over(one: Compressed, recipe: Recipe) -> pa.Table:
    """The table over the features of a recipe with other levels: a level that no row has is 0 in all of them."""
    if recipe.features == one.recipe.features:
        return one.table
    old = {feature: f"f{i}" for i, feature in enumerate(one.recipe.features[: one.recipe.n_covariates])}
    columns = {name: one.table.column(name) for name in one.keys}
    for i, feature in enumerate(recipe.features[: recipe.n_covariates]):
        if feature:
            columns[f"f{i}"] = one.table.column(old[feature]) if feature in old else _zeros(feature, one)
    for name in one.table.column_names:
        if name not in columns and name not in old.values():
            columns[name] = one.table.column(name)
    import pyarrow as pa

    return pa.table(columns)


def _zeros(feature: Monomial, one: Compressed) -> pa.Array:
    """The column of a feature that no row has. Raises DataError where the rows may have it."""
    levels = one.recipe.coordinates.levels
    if all(atom.part in levels.get(atom.variable, (atom.part,)) for atom in feature):
        raise DataError("the rows were collected for different terms and cannot be merged", code="not_mergeable")
    return arrow(np.zeros(one.table.num_rows))


def columns_of(recipe: Recipe, *, merges: bool) -> tuple[str, ...]:
    """The numeric columns that are held; what the log-likelihood's constant adds is kept as its sum."""
    return tuple(name for name in cells.columns(recipe, compressed=merges) if name != "constant")
