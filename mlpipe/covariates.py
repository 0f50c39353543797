"""The covariates of a fit at rows of a source or at given values, as arrays: features, offset, and what these become when one column
changes. All that is averaged over rows reads them here, streamed, in one scan."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from . import expr
from .arrays import column
from .derivative import derivative, substituted
from .design import Atom, Monomial, Variable
from .effects import reopened
from .errors import ConfigError, DataError
from .features import Recipe
from .formula import parse_expression
from .predictions import scorable, value_names
from .reduction import Coding
from .scoring import found

if TYPE_CHECKING:
    from sqlglot import exp

    from .engines.base import Engine
    from .options import Options
    from .result import MixedFit, RandomTerm
    from .sql import Names

    Array = np.ndarray

NULL = 1e-8  # relative to the largest, below which a direction of the design is not there
ALIASED = 1e-5  # of f'N (see `undetermined`), from which a combination is not estimable


@dataclass(frozen=True)
class Change:
    """What happens to one expression of the data, mostly a column: `to` stands in its place, or, if None, the derivative by it."""

    node: expr.Node
    to: expr.Node | None = None


@dataclass
class Rows:
    """A batch of n rows: features `F` (m, n); `offset`, `freq` (n,) or None; per change the features after it, or their derivatives, and
    in `offsets` the offset likewise where the change, by its number, reaches it; `more`: further columns by name."""

    F: Array
    offset: Array | None
    freq: Array | None
    changed: list[Array] = field(default_factory=list)
    offsets: dict[int, Array] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """The number of rows."""
        return int(self.F.shape[1])


@dataclass(frozen=True)
class Scan:
    """An open source with the columns of a fit; `own`: it is the fit's, whose used rows are known to be complete in the response too."""

    engine: Engine
    names: Names
    recipe: Recipe
    own: bool

    @property
    def where(self) -> exp.Expr:
        """True for the rows that count: those of the fit, of other data those with all covariates."""
        from .statements import usable

        if self.own:
            return usable(self.recipe, self.names)
        from .sql import both

        known = [scorable(self.recipe, self.names)]
        return both([*known, *(self.names.present(name) for name in _frequency_names(self.recipe))])

    def rows(
        self, changes: Sequence[Change] = (), more: Mapping[str, exp.Expr] | None = None, *, only: exp.Expr | None = None,
        sizes: Sequence[str] = (), order: bool = False,
    ) -> Iterator[Rows]:  # fmt: skip
        """The rows, batch by batch, `only` those where it holds; `more`: further columns, by names of their own, which read the source's
        `sizes` too; `order`: in the source's order."""
        from sqlglot import exp

        from .engines.base import Columns
        from .sql import feature, named, numeric, skeleton

        recipe, names = self.recipe, self.names
        covariates = recipe.features[: recipe.n_covariates]
        columns = [named(feature(f, recipe, names), f"f{i}") for i, f in enumerate(covariates) if f]
        reached = [touched(change, recipe) for change in changes]
        for k, (change, places) in enumerate(zip(changes, reached, strict=True)):
            columns += [named(_after(change, recipe.features[i], recipe, names), f"g{k}_{i}") for i in places]
        offset = offset_of(recipe)
        if offset is not None:
            columns.append(named(numeric(offset, names), "offset"))
            for k, change in enumerate(changes):
                moved = _of_offset(change, offset)
                if moved is not None:
                    columns.append(named(numeric(moved, names), f"offset_{k}"))
        if recipe.freq:
            columns.append(named(numeric(parse_expression(recipe.freq), names), "q"))
        columns += [named(node, name) for name, node in (more or {}).items()]
        columns = columns or [named(exp.Literal.number(1), "present")]
        statement = skeleton("rows").select(*columns, append=False, copy=False).where(self.where, copy=False)
        if only is not None:
            statement = statement.where(only, copy=False)
        if order:
            statement = statement.order_by(exp.column("rn"), copy=False)
        wanted = Columns(self.positions([*self.recipe.kinds, *sizes]), self.positions(self.recipe.keys), row_number=order)
        for batch in self.engine.query(statement, wanted):
            if batch.num_rows:
                yield self._made(batch, reached, list(more or {}))

    def positions(self, wanted: Iterable[str]) -> frozenset[int]:
        """Where those of these columns stand that the source has."""
        return frozenset(self.names.positions[name] for name in wanted if name in self.names.positions)

    def _made(self, batch: Any, reached: list[list[int]], more: list[str]) -> Rows:
        F = np.ones((self.recipe.n_covariates, batch.num_rows))
        for i, f in enumerate(self.recipe.features[: self.recipe.n_covariates]):
            if f:
                F[i] = column(batch, f"f{i}")
        held = set(batch.schema.names)
        rows = Rows(F, column(batch, "offset") if "offset" in held else None, column(batch, "q") if "q" in held else None)
        for k, places in enumerate(reached):
            rows.changed.append(np.stack([column(batch, f"g{k}_{i}") for i in places]) if places else np.zeros((0, batch.num_rows)))
            if f"offset_{k}" in held:
                rows.offsets[k] = column(batch, f"offset_{k}")
        rows.more = {name: batch.column(name) for name in more}
        return rows


@contextmanager
def scanned(fit: MixedFit, data: Any, options: Options | None = None, more: Sequence[str] = ()) -> Iterator[Scan]:
    """The fit's own source (`data` None), or other data with its covariates and the columns `more`.

    Raises DataError where the fit's source is gone or changed, ColumnNotFoundError or DataError for columns of other data.
    """
    from .sources import open_source
    from .sql import Names

    recipe = fit.recipe
    if data is None:
        with reopened(fit, options) as engine:
            names = Names.of(engine.schema(), recipe.kinds)
            yield Scan(engine, names, recipe, own=True)
        return
    with closing(open_source(data, options=options or fit.options)) as engine:
        names = found(engine, recipe, list(dict.fromkeys([*value_names(recipe, False), *_frequency_names(recipe), *more])))
        yield Scan(engine, names, replace(recipe, clusters=()), own=False)


def evaluated(fit: MixedFit, table: Mapping[str, Sequence[Any]], of: Sequence[int] | None = None) -> Rows:
    """The features and offset at values of the covariates, one row each, in order; `of`: the features that are needed, if not all.

    Raises DataError where a value is of another kind than the fit's, or a level that it does not know, or where a term is not finite there.
    """
    import pyarrow as pa

    from .sources import open_source

    given = pa.table({name: pa.array(list(values)) for name, values in table.items()})
    recipe = replace(fit.recipe, freq=None, weights=None, units=None)  # dates, too, are held at numbers
    with closing(open_source(given)) as engine:
        scan = Scan(engine, found(engine, recipe, value_names(recipe, False)), recipe, own=False)
        batches = list(scan.rows(order=True))
    if sum(rows.n for rows in batches) < len(given):
        raise DataError("a value is missing, or a level that the fit does not know", code="unknown_level")
    offset = None if batches[0].offset is None else np.concatenate([rows.offset for rows in batches if rows.offset is not None])
    F = np.hstack([rows.F for rows in batches])
    for i in range(len(F)) if of is None else of:
        if not np.isfinite(F[i]).all():
            term = ":".join(atom.variable for atom in recipe.features[i])
            raise DataError(f"{term} is not a finite number at the values given", code="not_finite")
    if of is None and offset is not None and not np.isfinite(offset).all():
        raise DataError("the offset is not a finite number at the values given", code="not_finite")
    return Rows(F, offset, None)


def number_at(name: str, value: Any) -> float:
    """The value at which `at` holds a numeric covariate. Raises ConfigError for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise ConfigError(f"at holds the covariate {name!r} at {value!r}, which is not one finite number", code="at", column=name)
    return float(value)


def values_at(chosen: Any) -> list[Any]:
    """The values that `at` gives for one column: one, or several."""
    return list(chosen) if isinstance(chosen, Iterable) and not isinstance(chosen, str) else [chosen]


def covariate_means(fit: MixedFit, wanted: Sequence[str], data: Any, options: Options | None) -> dict[str, float]:
    """The means of source columns over the rows, weighted by frequencies: one SQL aggregate, kept with the fit."""
    from sqlglot import exp

    from .engines.base import Columns
    from .sql import named, number, numeric, times, total

    known = dict(fit.info.get("covariate_means", {})) if data is None else {}
    missing = [name for name in wanted if name not in known]
    if missing:
        with scanned(fit, data, options) as scan:
            recipe, names = scan.recipe, scan.names
            weight = numeric(parse_expression(recipe.freq), names) if recipe.freq else number(1)
            columns = [named(names.value(name), f"x{k}") for k, name in enumerate(missing)]
            inner = exp.select(named(weight, "q"), *columns).from_("src").where(scan.where, copy=False)
            sums = [total(times(exp.column("q"), exp.column(f"x{k}")), f"t{k}") for k in range(len(missing))]
            statement = exp.select(total(exp.column("q"), "n"), *sums).from_(inner.subquery("used", copy=False))
            read = Columns(scan.positions(recipe.kinds), scan.positions(recipe.keys))
            row = scan.engine.query(statement, read).read_all().to_pylist()[0]
        if not row["n"]:
            raise DataError("no row has all covariates", code="no_rows")
        known |= {name: float(row[f"t{k}"]) / float(row["n"]) for k, name in enumerate(missing)}
        note_scan(fit, "means of the covariates", data)
        if data is None:
            fit.info["covariate_means"] = known
    return {name: known[name] for name in wanted}


def note_scan(fit: MixedFit, what: str, data: Any) -> None:
    """Says in `info` that a question took one more scan."""
    source = "of the fit's source" if data is None else "of other data"
    fit.info["extra_scans"] = [*fit.info.get("extra_scans", []), f"{what}: one scan {source}"]


def _frequency_names(recipe: Recipe) -> tuple[str, ...]:
    return expr.columns(parse_expression(recipe.freq)) if recipe.freq else ()


def offset_of(recipe: Recipe) -> expr.Node | None:
    """The sum of all offsets."""
    nodes = [*recipe.formula.offsets, *([parse_expression(recipe.offset)] if recipe.offset else [])]
    return reduce(expr.add, nodes) if nodes else None


# -- what changes


def touched(change: Change, recipe: Recipe) -> list[int]:
    """The positions of the features that a change reaches, in the order of `Rows.changed`."""
    out = []
    for i, feature in enumerate(recipe.features[: recipe.n_covariates]):
        if any(_reaches(change, recipe.variables[atom.variable], atom, recipe) for atom in feature):
            out.append(i)
    return out


def _reaches(change: Change, variable: Variable, atom: Atom, recipe: Recipe) -> bool:
    numeric = atom in recipe.coordinates.scalings
    node = variable.columns[int(atom.part) - 1] if numeric else variable.expression
    if change.to is None:
        assert isinstance(change.node, expr.Column)
        return numeric and derivative(node, change.node.name) is not None
    return substituted(node, change.node, change.to) != node


def _after(change: Change, feature: Monomial, recipe: Recipe, names: Names) -> exp.Expr:
    from . import sql

    if change.to is None:
        assert isinstance(change.node, expr.Column)
        return _slope(change.node.name, feature, recipe, names)
    variables = {label: _moved(variable, change.node, change.to) for label, variable in recipe.variables.items()}
    return sql.feature(feature, replace(recipe, variables=variables), names)


def _of_offset(change: Change, offset: expr.Node) -> expr.Node | None:
    """The offset after a change, or its derivative; None where it is as before, or does not depend on the column."""
    if change.to is None:
        assert isinstance(change.node, expr.Column)
        return derivative(offset, change.node.name)
    moved = substituted(offset, change.node, change.to)
    return None if moved == offset else moved


def _moved(variable: Variable, node: expr.Node, to: expr.Node) -> Variable:
    columns = tuple(substituted(c, node, to) for c in variable.columns)
    return replace(variable, expression=substituted(variable.expression, node, to), columns=columns)


def _slope(name: str, feature: Monomial, recipe: Recipe, names: Names) -> exp.Expr:
    """The derivative of a feature by a column: the product rule over its numeric atoms, where its indicators hold."""
    from .sql import feature as written
    from .sql import number, numeric, plus, times

    terms = []
    for i, atom in enumerate(feature):
        if atom not in recipe.coordinates.scalings:
            continue
        node = derivative(recipe.variables[atom.variable].columns[int(atom.part) - 1], name)
        if node is not None:
            slope = times(numeric(node, names), number(1.0 / recipe.coordinates.scalings[atom][1]))
            others = feature[:i] + feature[i + 1 :]  # of a square one factor stays
            terms.append(times(slope, written(others, recipe, names)) if others else slope)
    return reduce(plus, terms)


# -- the design


def undetermined(fit: MixedFit, gram: Array, n: float) -> Array:
    """Directions N (covariate features, k) that n rows with Σ F F' = `gram` do not determine: a combination of coefficients by features f
    is estimable where f'N is zero (Searle, Speed and Milliken 1980), which else is about 1 in size."""
    coding, m = fit.info.get("coding") or {}, fit.recipe.n_covariates
    columns = Coding(fit.recipe, fit.parsed, coding.get("contrasts"), coding.get("levels") or {}).columns(fit.parsed.fixed)
    T = fit.recipe.matrix(columns)[:m]
    Q = np.linalg.qr(T / np.linalg.norm(T, axis=0))[0]
    G = Q.T @ gram @ Q / n
    scale = np.sqrt(np.maximum(np.diag(G), 0.0))
    scale[scale < 1e-12 * scale.max()] = 1.0  # of an empty cell's column
    values, vectors = np.linalg.eigh(G / np.outer(scale, scale))
    return np.asarray(Q @ (vectors[:, values < NULL * values[-1]] / scale[:, None]))


def random_terms(fit: MixedFit) -> tuple[RandomTerm, ...]:
    """The random terms; none where the fit's terms are effects without a distribution (of absorbed factors)."""
    return fit.terms if all(np.isfinite(term.factor).all() for term in fit.terms) else ()


def half_factor(fit: MixedFit) -> Array:
    """The map (random features, q) with z'Ψz = |half' F_z|², all terms side by side."""
    if not fit.terms:
        return np.zeros((len(fit.recipe.z), 0))
    return np.asarray(fit.effect_scale * np.hstack([term.Q @ term.star for term in fit.terms]))
