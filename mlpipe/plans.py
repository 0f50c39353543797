"""What was asked for and what will be done about it: Request and Plan, and the plan in words."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .design import code
from .engines.base import Columns, Engine
from .errors import ConfigError
from .features import Recipe
from .formula import check_text
from .looks import used_columns
from .options import Options

if TYPE_CHECKING:
    from sqlglot import exp

    from .sql import Expression, Names

WIDE = 25  # features above which BLAS on streamed rows beats sums in SQL
FLOOR = 256 << 20  # bytes: interpreter, libraries and the engine's least working memory


@dataclass(frozen=True)
class Request:
    """What the user asked for, as text and plain values; `family`, `link`, `trials` and `nagq` of a generalized model, `groups` where the
    formula has none, `clusters` of robust standard errors, `time` that orders the rows of a block or `by_row` for the source's order; `by`:
    columns whose values each have a model of their own."""

    formula: str
    weights: str | None = None
    freq: str | None = None
    offset: str | None = None
    levels: Mapping[str, Sequence[Any]] | None = None
    contrasts: Mapping[str, str] | None = None
    na: str = "drop"
    responses: Sequence[str] | None = None
    collect: str = "fit"
    family: str | None = None
    link: str | None = None
    trials: str | None = None
    nagq: int = 1
    groups: tuple[str, ...] = ()
    clusters: tuple[str, ...] = ()
    time: str | None = None
    by_row: bool = False
    by: tuple[str, ...] = ()
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        """Raises FormulaError or ConfigError, before anything is read, for an argument that is of another kind."""
        check_text(self.formula)
        for name in ("weights", "freq", "offset", "trials", "time"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                what = f"{name} must be the name of a column or an expression, not a value of type {type(value).__name__}"
                raise ConfigError(what, hint="put its values into a column of the data")
        for name in ("levels", "contrasts"):
            value = getattr(self, name)
            if not isinstance(value, Mapping | None):
                what = f"{name} must map factors to theirs, not be of type {type(value).__name__}"
                raise ConfigError(what, hint=f'{name}={{"factor": …}}')
        if not isinstance(self.options, Options):
            raise ConfigError(f"options must be mlpipe.Options, not of type {type(self.options).__name__}")


@dataclass(frozen=True)
class Joint:
    """What a generalized model of several factors will take: about so many `levels` of each, the `path` ("exact", "iterative"), `nbytes`
    of the solver, `evaluations` of the likelihood."""

    levels: dict[str, int]
    path: str
    nbytes: int
    evaluations: int


@dataclass(frozen=True)
class Expected:
    """What the spool of an iterative fit will hold, as far as counts and a sample tell: at most so many `rows`, `ratio` of them a
    cell (1 where rows are not compressed), `nbytes` in all."""

    rows: int
    ratio: float
    nbytes: int
    joint: Joint | None = None


@dataclass
class Plan:
    """What a fit will do. `print(plan)` explains it; `plan.sql` holds the statements that will run.

    Attributes: `recipe`, what is summed; `path`, how the blocks are summed ("second level", "blocks", "none"), or "spool" for iterative
    fits; `names`, where the columns stand; `notes`, choices made and why; `expected`, of the spool, where it was asked for;
    `several`, lines on several factors; `presumed`: what the first pass takes the columns for, as every NaN or infinity would show in
    its sums (it is then repeated with `names`).
    """

    engine: Engine
    request: Request
    recipe: Recipe
    names: Names
    path: str
    notes: list[str] = field(default_factory=list)
    expected: Expected | None = None
    several: Sequence[str] = ()
    presumed: Names | None = None

    @property
    def first_names(self) -> Names:
        """Where the columns stand, for the first pass: see `presumed`."""
        return self.presumed or self.names

    @property
    def columns(self) -> Columns:
        """What the statements of the fit need of the source."""
        return used_columns(self.recipe, self.names)

    @property
    def wide(self) -> bool:
        """Whether the ungrouped cross-products are formed by BLAS on streamed rows."""
        return len(self.recipe.features) > WIDE

    @property
    def sql(self) -> dict[str, str]:
        """The text of each statement, in the engine's dialect, with the source's names in comments."""
        from . import statements
        from .engines.dialects import render

        if self.path == "spool":
            compressed = self.expected is not None and self.expected.ratio > 1.0
            return {"cells": render(self.cells(compressed=compressed), self.engine.dialect, pretty=True)}
        rows = statements.used_rows(self.recipe, self.first_names, keys=False)
        ungrouped = rows if self.wide else statements.cross_products(self.recipe, self.first_names)
        out = {"cross_products": render(ungrouped, self.engine.dialect, pretty=True)}
        if self.path != "none":
            if self.path == "crossed":
                return out
            out[self.path.replace(" ", "_")] = render(self.grouped(), self.engine.dialect, pretty=True)
        return out

    def grouped(self, part: Expression | None = None) -> exp.Select:
        """The statement of the sums per block or, at the second level, per size of blocks; of all blocks, or of one part of them."""
        from .statements import block_sums, second_level

        if self.path == "second level":
            return second_level(self.recipe, self.names, part)
        return block_sums(self.recipe, self.names, part, whole=self.whole)

    def cells(self, *, compressed: bool) -> exp.Select:
        """The statement of an iterative fit's rows, in the order of their blocks."""
        from .cells import arranged
        from .sql import over
        from .statements import used_rows

        keys = [self.names.key(group).name for group in self.recipe.groups]
        return over(arranged(self.recipe, keys, compressed=compressed), used_rows(self.recipe, self.names, keys=True), "used")

    @property
    def whole(self) -> bool:
        """Whether the blocks keep all of their own cross-products."""
        return self.request.collect == "blocks+xx" and self.path == "blocks"

    @property
    def sums_per_block(self) -> int:
        """The number of sums that are made for each block."""
        from .statements import rest_names

        return len(self.recipe.pairs()) + (len(rest_names(self.recipe)) if self.whole else 0)

    def bytes_needed(self) -> int:
        """The least memory in bytes that the plan can run in."""
        sums = len(self.recipe.pairs())
        cluster = 64 * sums * sums * 8 if self.path in ("second level", "blocks") else 0
        return FLOOR + 4 * len(self.recipe.features) ** 2 * 8 + 4 * 65_536 * self.sums_per_block * 8 + cluster

    def __str__(self) -> str:
        recipe, limit = self.recipe, self.request.options.memory_bytes
        if self.path == "spool":
            return self._explained([*self._model(), *self._spool()])
        read, passes = len(self.columns.values | self.columns.keys), 2 if self.path in ("second level", "blocks", "crossed") else 1
        summed = {
            "second level": "blocks compressed by their size inside the engine",
            "blocks": f"{self.sums_per_block} sums per block, "
            + ("compressed here where blocks share Z'wZ" if self.request.collect == "fit" else "kept with their keys"),
            "crossed": f"{len(recipe.pairs())} sums per level of {len(recipe.factors)} grouping factors, and the cells of levels that meet",
            "none": "no grouping factor",
        }[self.path]
        return self._explained([
            f"reads:   {read} of {len(self.names.positions)} columns, {passes} full passes",
            f"sums:    {len(recipe.features)} features {'by BLAS on streamed rows' if self.wide else 'in SQL'}; {summed}",
            *self.several,
            f"memory:  at least {self.bytes_needed() / 1e6:,.0f} MB of {limit / 1e6:,.0f} MB"
            + ("" if self.several else "; per-block sums above a quarter of the limit go to a mapped file"),
        ])  # fmt: skip

    def _explained(self, what: list[str]) -> str:
        """The text of a plan: model and engine, `what` is done, notes, statements."""
        lines = [f"formula: {self.recipe.formula.text}", f"engine:  {self.engine.dialect}", *what]
        lines += [f"note:    {note}" for note in self.notes]
        for name, text in self.sql.items():
            lines += ["", f"-- {name}", text]
        return "\n".join(lines)

    def _model(self) -> list[str]:
        """The family, the quadrature and the parameters of a generalized model."""
        from .cells import family_of

        formula, request = self.recipe.formula, self.request
        fixed = len(code(formula.fixed, self.recipe.variables))
        sizes = [len(code(bar.terms, self.recipe.variables)) for bar in formula.random]
        shape = int(family_of(self.recipe).shape)
        counts = {"fixed": fixed, "of the random part": sum(k * (k + 1) // 2 for k in sizes), "of the family": shape}
        lines = [f"family:  {request.family}, link {request.link}"]
        if sizes:
            effects = "1 random effect" if sum(sizes) == 1 else f"{sum(sizes)} random effects"
            rule = "the mode alone (Laplace)" if request.nagq == 1 else f"{request.nagq ** sum(sizes):,} nodes"
            where = "over all grouping factors, jointly" if self.recipe.factors else "a block"
            lines.append(f"nagq:    {request.nagq} with {effects} {where}: {rule}")
        return [*lines, f"params:  {', '.join(f'{n} {what}' for what, n in counts.items() if n)}"]

    def _spool(self) -> list[str]:
        """What is read, and where the rows of the iterations are kept."""
        read, limit = len(self.columns.values | self.columns.keys), self.request.options.memory_bytes
        lines = [f"reads:   {read} of {len(self.names.positions)} columns in one pass; the likelihood then reads the spool"]
        if self.expected is not None:
            rows, ratio, nbytes = self.expected.rows, self.expected.ratio, self.expected.nbytes
            held = f"as cells of {ratio:.1f} rows" if ratio > 1.0 else "row by row"
            order = "ordered by block, " if self.recipe.groups else ""
            place = "in a mapped file" if nbytes > limit // 4 else "in memory"
            lines += [
                f"spool:   at most {rows:,} rows, {order}{held}",
                f"memory:  about {nbytes / 1e6:,.1f} MB of spool {place}, a quarter of the limit being {limit / 4e6:,.0f} MB",
            ]
            lines += self._joint(self.expected.joint) if self.expected.joint is not None else []
        return lines

    def _joint(self, expected: Joint) -> list[str]:
        """How several factors are solved."""
        levels = ", ".join(f"about {n:,} of {group}" for group, n in expected.levels.items())
        how = {
            "exact": "all random effects jointly, exactly: elimination, and a dense matrix of what is crossed",
            "iterative": "all random effects jointly, by conjugate gradients and probes, with a stated Monte Carlo error",
        }[expected.path]
        return [
            f"levels:  {levels}",
            f"solver:  {expected.path}: {how}; about {expected.nbytes / 1e6:,.1f} MB",
            f"passes:  about {expected.evaluations} evaluations of the likelihood, each a few passes over the spool",
        ]


def key_types(plan: Plan) -> dict[str, tuple[Any, tuple[str, ...] | None]]:
    """The source's own Arrow types of the grouping columns, and the order of levels that they declare."""
    columns = plan.engine.schema()
    return {name: (columns[name].own, columns[name].levels) for name in plan.recipe.groups if columns[name].own is not None}
