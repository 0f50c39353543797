"""Formula + source -> Plan: what will be read, how often, and in which form it will be summed."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import expr
from .design import Variable, code, variables_of
from .engines.base import Columns, Engine
from .errors import ColumnNotFoundError, ConfigError, DataError, FormulaError, did_you_mean
from .features import Coordinates, Recipe, closure, extended, level_labels, needed, response_column, response_variables
from .formula import Formula, parse, parse_expression
from .looks import Looks, used_columns
from .options import Options

if TYPE_CHECKING:
    from .sql import Names

NESTED = ("LIST", "[", "STRUCT", "MAP", "ARRAY", "OBJECT", "UNION")  # in the names of types that cannot be grouped by
WIDE = 25  # features above which BLAS on streamed rows beats sums in SQL
FLOOR = 256 << 20  # bytes: interpreter, libraries and the engine's least working memory


@dataclass(frozen=True)
class Request:
    """What the user asked for, as text and plain values."""

    formula: str
    weights: str | None = None
    freq: str | None = None
    offset: str | None = None
    levels: Mapping[str, Sequence[Any]] | None = None
    contrasts: Mapping[str, str] | None = None
    na: str = "drop"
    responses: Sequence[str] | None = None
    collect: str = "fit"
    options: Options = field(default_factory=Options)


@dataclass
class Plan:
    """What a fit will do. `print(plan)` explains it; `plan.sql` holds the statements that will run.

    Attributes: `recipe`, what is summed; `path`, how the blocks are summed ("second level", "blocks", "none");
    `names`, where the columns stand; `notes`, choices made and why.
    """

    engine: Engine
    request: Request
    recipe: Recipe
    names: Names
    path: str
    notes: list[str] = field(default_factory=list)

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

        rows = statements.used_rows(self.recipe, self.names, keys=False)
        ungrouped = rows if self.wide else statements.cross_products(self.recipe, self.names)
        out = {"cross_products": render(ungrouped, self.engine.dialect, pretty=True)}
        if self.path != "none":
            grouped = statements.second_level if self.path == "second level" else statements.block_sums
            out[self.path.replace(" ", "_")] = render(grouped(self.recipe, self.names), self.engine.dialect, pretty=True)
        return out

    def bytes_needed(self) -> int:
        """The least memory in bytes that the plan can run in."""
        sums = len(self.recipe.pairs())
        cluster = 64 * sums * sums * 8 if self.path != "none" else 0
        return FLOOR + 4 * len(self.recipe.features) ** 2 * 8 + 4 * 65_536 * sums * 8 + cluster

    def __str__(self) -> str:
        recipe, limit = self.recipe, self.request.options.memory_bytes
        read, passes = len(self.columns.values | self.columns.keys), 1 if self.path == "none" else 2
        summed = {
            "second level": "blocks compressed by their size inside the engine",
            "blocks": f"{len(recipe.pairs())} sums per block, compressed here where blocks share Z'wZ",
            "none": "no grouping factor",
        }[self.path]
        lines = [
            f"formula: {recipe.formula.text}",
            f"engine:  {self.engine.dialect}",
            f"reads:   {read} of {len(self.names.positions)} columns, {passes} full passes",
            f"sums:    {len(recipe.features)} features {'by BLAS on streamed rows' if self.wide else 'in SQL'}; {summed}",
            f"memory:  at least {self.bytes_needed() / 1e6:,.0f} MB of {limit / 1e6:,.0f} MB; "
            "per-block sums above a quarter of the limit go to a mapped file",
        ]
        lines += [f"note:    {note}" for note in self.notes]
        for name, text in self.sql.items():
            lines += ["", f"-- {name}", text]
        return "\n".join(lines)


def prepare(engine: Engine, request: Request, like: Recipe | None = None) -> Plan:
    """Looks at the source (types, levels, bases, a sample) and settles what will be summed.

    `like`: keep this recipe's bases, shifts and scales and only add levels.
    Raises FormulaError, ConfigError, DataError or ColumnNotFoundError, ResourceError where the memory limit is too small.
    """
    from .errors import ResourceError

    formula = parse(request.formula)
    names, notes = _names(engine, formula, request)
    _check_request(request)
    variables = {v.label: v for v in variables_of(formula, names.kinds, request.contrasts)}
    responses = response_variables(formula, names.kinds, request.offset, request.responses or ())
    shell = _shell(formula, request, names, variables | responses, tuple(responses))
    engine.check_columns(sorted(used_columns(shell, names).values | used_columns(shell, names).keys))
    looks = Looks(engine, names, shell, request.levels)
    if like is None:
        variables = looks.settled(variables)
        recipe = settle(shell, variables, responses, looks.coordinates(variables | responses), request.collect)
    else:
        recipe = extended(like, looks.new_levels(like.variables))
    unweighted = request.weights is None and request.freq is None and len(recipe.z) == 1 and not recipe.features[recipe.z[0]]
    second = unweighted and request.collect == "fit" and len(recipe.features) <= WIDE
    path = "none" if not recipe.groups else "second level" if second else "blocks"
    plan = Plan(engine, request, recipe, names, path, [*notes, *engine.identity().notes, *looks.notes])
    limit = request.options.memory_bytes
    if plan.bytes_needed() > limit:
        raise ResourceError(
            f"the memory limit of {limit / 1e6:,.0f} MB cannot hold the plan, which needs {plan.bytes_needed() / 1e6:,.0f} MB",
            code="memory_limit",
            hint="raise memory_limit, or use fewer terms",
        )
    return plan


def _check_request(request: Request) -> None:
    for name, allowed in (("na", ("drop", "raise")), ("collect", ("fit", "blocks"))):
        value = getattr(request, name)
        if value not in allowed:
            hint = did_you_mean(str(value), list(allowed))
            raise ConfigError(f"{name} = {value!r} is not one of {', '.join(map(repr, allowed))}", hint=hint)


def _names(engine: Engine, formula: Formula, request: Request) -> tuple[Names, list[str]]:
    """Where the columns stand; raises for columns that are missing or of a type that cannot be used."""
    from .sql import Names

    schema = engine.schema()
    keys = [group for bar in formula.random for group in bar.groups]
    values = [name for node in _nodes(formula, request) for name in expr.columns(node)]
    for name in (*values, *keys):
        if name not in schema:
            raise ColumnNotFoundError(f"there is no column {name!r}", hint=did_you_mean(name, list(schema)), column=name)
    for name in values:
        if schema[name].kind == "other":
            raise DataError(f"the column {name!r} of type {schema[name].name} cannot be a covariate", code="column_type", column=name)
    for name in keys:
        if schema[name].kind == "other" and any(part in schema[name].name.upper() for part in NESTED):
            raise DataError(f"the column {name!r} of type {schema[name].name} cannot be a grouping key", code="column_type", column=name)
    positions = {name: i for i, name in enumerate(schema)}
    return Names(positions, {name: column.kind for name, column in schema.items()}), []


def _nodes(formula: Formula, request: Request) -> list[expr.Node]:
    """Every expression whose columns enter as values."""
    nodes = [node for term in formula.fixed for node in term.variables] + list(formula.offsets)
    nodes += [node for bar in formula.random for term in bar.terms for node in term.variables]
    nodes += [formula.response] if formula.response is not None else []
    texts = (request.weights, request.freq, request.offset, *(request.responses or ()))
    return nodes + [parse_expression(text) for text in texts if text is not None]


def _used_names(formula: Formula, request: Request) -> tuple[str, ...]:
    keys = [group for bar in formula.random for group in bar.groups]
    return tuple(dict.fromkeys([*(name for node in _nodes(formula, request) for name in expr.columns(node)), *keys]))


def _shell(formula: Formula, request: Request, names: Names, variables: Mapping[str, Variable], responses: tuple[str, ...]) -> Recipe:
    """A recipe without features, for statements that only need to know which rows enter."""
    groups = {bar.groups for bar in formula.random}
    if len(groups) > 1:
        raise FormulaError(
            "several grouping factors: " + ", ".join(sorted(":".join(g) for g in groups)) + "; this version fits one",
            code="several_factors",
        )
    return Recipe(
        formula=formula,
        kinds={name: names.kinds[name] for name in _used_names(formula, request)},
        extra_responses=tuple(request.responses or ()),
        contrasts=dict(request.contrasts) if request.contrasts else None,
        responses=responses,
        weights=request.weights,
        freq=request.freq,
        offset=request.offset,
        groups=next(iter(groups), ()),
        variables=variables,
        coordinates=Coordinates({}, {}, {}),
        features=(),
        z=(),
    )


def settle(
    shell: Recipe, variables: Mapping[str, Variable], responses: Mapping[str, Variable], coordinates: Coordinates, collect: str
) -> Recipe:
    """The recipe with its features: the least a plain fit needs, or a set closed under every change of coding."""
    from dataclasses import replace

    formula = shell.formula
    fixed = code(formula.fixed, variables)
    random = [column for bar in formula.random for column in code(bar.terms, variables)]
    outcome = [response_column(label) for label in responses]
    covariates, z = needed([*fixed, *random], coordinates), needed(random, coordinates)
    atoms = [feature for feature in needed(outcome, coordinates) if feature]
    extra = [()] if any(coordinates.scalings[a][0] for feature in atoms for a in feature) else []
    if collect == "blocks":
        covariates, z = closure(covariates), closure(z) if z else []
    covariates = sorted(dict.fromkeys([*extra, *covariates]), key=len)
    return replace(
        shell,
        variables={**variables, **responses},
        coordinates=replace(coordinates, levels=level_labels(variables.values())),
        features=(*covariates, *atoms),
        z=tuple(covariates.index(feature) for feature in z),
    )
