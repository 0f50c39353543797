"""Formula + source -> Plan: what will be read, how often, and in which form it will be summed."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import expr
from .design import Atom, Level, Variable, code, level_label, variables_of
from .engines.base import Columns, ColumnType, Engine
from .errors import ColumnNotFoundError, ConfigError, DataError, did_you_mean
from .features import Coordinates, Recipe, closure, extended, level_labels, needed, response_column, response_variables
from .formula import Formula, parse, parse_expression
from .looks import Looks, used_columns
from .outcome import TIME, outcome_variables, response_label
from .plans import WIDE, Plan, Request

if TYPE_CHECKING:

    from .sql import Names

# in the names of types that cannot be grouped by: nested ones, and those whose values Arrow cannot hold
UNGROUPABLE = ("LIST", "[", "STRUCT", "MAP", "ARRAY", "OBJECT", "UNION", "VARIANT", "BIT", "TIME WITH TIME ZONE")
COLLECTS = ("fit", "blocks", "blocks+xx")


def prepare(engine: Engine, request: Request, like: Recipe | None = None) -> Plan:
    """Looks at the source (types, levels, bases, a sample) and settles what will be summed.

    `like`: keep this recipe's bases, shifts and scales and only add levels.
    Raises FormulaError, ConfigError, DataError or ColumnNotFoundError, ResourceError where the memory limit is too small.
    """
    from .errors import ResourceError

    formula = parse(request.formula)
    names, notes = _names(engine, formula, request)
    _check_request(request)
    schema = engine.schema()
    if like is not None:
        check_types(schema, like, like.kinds)
    variables = {v.label: v for v in variables_of(formula, names.kinds, request.contrasts)}
    responses, (failure, success), waves = _responses(engine, formula, names, request, variables, like)
    shell = _shell(formula, request, names, variables | responses, tuple(responses))
    units = {name: schema[name].unit for name in shell.kinds if schema[name].unit}
    shell = replace(shell, success=success, failure=failure, waves=waves, units=units)
    engine.check_columns(used_columns(shell, names))
    own = {expr.label(formula.response)} if success is not None and formula.response is not None else set()
    own |= {expr.label(parse_expression(request.time))} if waves and request.time is not None else set()
    looks = Looks(engine, names, shell, {name: order for name, order in (request.levels or {}).items() if name not in own})
    if like is None:
        variables = looks.settled(variables)
        coordinates = looks.coordinates(variables | responses)
        if request.family is not None:  # a density needs the response as it is
            as_is = {Atom(label, "1"): (0.0, 1.0) for label in responses}
            coordinates = replace(coordinates, scalings={**coordinates.scalings, **as_is})
        recipe = settle(shell, variables, responses, coordinates, request.collect)
    else:
        recipe = extended(like, looks.new_levels(like.variables))
    plain = request.weights is None and request.freq is None
    unweighted = plain and bool(recipe.groups) and len(recipe.z) == 1 and not recipe.features[recipe.z[0]]
    second = unweighted and request.collect == "fit" and len(recipe.features) <= WIDE
    path = "none" if not recipe.groups else "second level" if second else "blocks"
    path = "spool" if request.family is not None else "crossed" if recipe.factors else path
    if recipe.factors and request.collect == "blocks+xx":
        raise ConfigError('collect="blocks+xx" is for one grouping factor', code="several_factors", hint='collect="blocks"')
    presumed = _presumed(engine, recipe, names, looks.not_finite) if request.family is None else None
    plan = Plan(engine, request, recipe, names, path, [*notes, *engine.identity().notes, *looks.notes], presumed=presumed)
    limit = request.options.memory_bytes
    if plan.bytes_needed() > limit:
        raise ResourceError(
            f"the memory limit of {limit / 1e6:,.0f} MB cannot hold the plan, which needs {plan.bytes_needed() / 1e6:,.0f} MB",
            code="memory_limit",
            hint="raise memory_limit, or use fewer terms",
        )
    return plan


def _presumed(engine: Engine, recipe: Recipe, names: Names, seen: Set[str]) -> Names:
    """What a first pass may take the columns for, as its sums tell: without NaN and infinities those that are features themselves, but for
    those in which some were `seen` (comparisons, say, would hide them); all rows usable where no column has a NULL either."""
    from .statements import raw_columns, weight_columns

    plain = (v for v in recipe.variables.values() if v.kind == "numeric" and v.basis is None and (Atom(v.label, "1"),) in recipe.features)
    shown = {v.expression.name for v in plain if isinstance(v.expression, expr.Column)} - {*recipe.keys, *seen}
    read = {*raw_columns(recipe), *recipe.keys}
    tellable = all(names.kinds[name] != "number" or name in names.finite or name in shown for name in read)
    complete = tellable and not weight_columns(recipe) and engine.without_nulls({names.positions[name] for name in read})
    return names.known(complete=complete, finite=shown)


Outcomes = tuple[str | None, str | None]  # the two levels of a text response, that of failure first; None of other responses


def _responses(
    engine: Engine, formula: Formula, names: Names, request: Request, variables: Mapping[str, Variable], like: Recipe | None
) -> tuple[dict[str, Variable], Outcomes, tuple[Level, ...]]:
    """The variables of the response, the levels of one that is text (those of `like` where given), and the levels of a time that is."""
    if request.family != "binomial":
        _refuse_no_values(engine, formula.response, names)
    if request.family is None:
        return response_variables(formula, names.kinds, request.offset, request.responses or ()), (None, None), ()
    node = formula.response
    outcomes: Outcomes = (None, None)
    if node is not None and request.family == "binomial" and isinstance(node, expr.Column) and names.kinds[node.name] == "text":
        outcomes = _two_levels(engine, formula, names, request, variables, node, like)
    waves = _waves(engine, formula, names, request, variables)
    made = outcome_variables(formula, names.kinds, request.family, request.offset, request.trials, outcomes[1], request.time, waves)
    return made, outcomes, waves


def _waves(
    engine: Engine, formula: Formula, names: Names, request: Request, variables: Mapping[str, Variable]
) -> tuple[Level, ...]:
    """The levels of a time that is text, in their order."""
    node = parse_expression(request.time) if request.time is not None else None
    if node is None or expr.kind(node, names.kinds) != "text":
        return ()
    name = expr.label(node)
    outcome = Variable(label=name, kind="category", expression=node, columns=(), suffixes=())
    shell = _shell(formula, request, names, {**variables, TIME: outcome}, (TIME,))
    known = {label: order for label, order in (request.levels or {}).items() if label == name}
    return tuple(Looks(engine, names, shell, known).settled({name: outcome})[name].levels)


def _refuse_no_values(engine: Engine, node: expr.Node | None, names: Names) -> None:
    """A column of a CSV or JSON file that has no values is text: that there are none is the truer message."""
    from . import statements

    if isinstance(node, expr.Column) and names.kinds[node.name] == "text":
        statement = statements.missing((node.name,), (), {}, names)
        row = engine.query(statement, Columns(values=frozenset([names.positions[node.name]]))).read_all().to_pylist()[0]
        total, absent = int(row["row_count"]), int(row["missing_0"] or 0)
        if total == absent:
            what = f"none of the {total:,} rows can be used: {node.name!r} is missing in all" if total else "there are no rows"
            raise DataError(what, code="no_rows", column=node.name if total else None)


def _two_levels(
    engine: Engine, formula: Formula, names: Names, request: Request, variables: Mapping[str, Variable], node: expr.Column,
    like: Recipe | None,
) -> Outcomes:  # fmt: skip
    """The two levels of a text response, of which the second counts as success; rows collected `like` others may lack one of theirs."""
    outcome = Variable(label=node.name, kind="category", expression=node, columns=(), suffixes=())
    label = response_label(node.name)
    shell = _shell(formula, request, names, {**variables, label: outcome}, (label,))
    known: dict[str, Sequence[Any]] = {name: order for name, order in (request.levels or {}).items() if name == node.name}
    if like is not None:
        known = {node.name: (like.failure, like.success)}
    levels = Looks(engine, names, shell, known).settled({node.name: outcome})[node.name].levels
    if like is not None:
        return like.failure, like.success
    if len(levels) != 2:
        raise DataError(
            f"the response {node.name!r} has {len(levels)} levels, a binomial response two", code="response_levels", column=node.name
        )
    return level_label(levels[0]), level_label(levels[1])


def check_types(schema: Mapping[str, ColumnType], recipe: Recipe, values: Iterable[str], keys: Iterable[str] = ()) -> None:
    """Raises DataError for a column of another kind than it has in the recipe; for covariates a date and a timestamp, which are numbers
    of days and of seconds, are of different kinds too."""
    for units, names in ((recipe.units, values), (None, keys)):
        for name in names:
            held, wanted = schema[name], recipe.kinds[name]
            kind: str = held.kind
            if units is not None:
                kind, wanted = held.unit or kind, units.get(name, wanted)
            if kind != wanted and not held.untyped:
                raise DataError(
                    f"the column {name!r} is of kind {kind} ({held.name}), the fit had {wanted}", code="column_type", column=name,
                    hint="cast it; for CSV and JSON files give mp.source types",
                )  # fmt: skip


def _check_request(request: Request) -> None:
    for name, allowed in (("na", ("drop", "raise")), ("collect", COLLECTS)):
        value = getattr(request, name)
        if value not in allowed:
            hint = did_you_mean(str(value), list(allowed))
            raise ConfigError(f"{name} = {value!r} is not one of {', '.join(map(repr, allowed))}", hint=hint)


def _names(engine: Engine, formula: Formula, request: Request) -> tuple[Names, list[str]]:
    """Where the columns stand; raises for columns that are missing or of a type that cannot be used."""
    from .sql import Names

    schema = engine.schema()
    keys = _keys(formula, request)
    values = [name for node in _nodes(formula, request) for name in expr.columns(node)]
    for name in (*values, *keys):
        if name not in schema:
            raise ColumnNotFoundError(f"there is no column {name!r}", hint=did_you_mean(name, list(schema)), column=name)
    for name in values:
        if schema[name].kind == "other":
            raise DataError(f"the column {name!r} of type {schema[name].name} cannot be a covariate", code="column_type", column=name)
    for name in keys:
        kind = schema[name]
        if kind.name == "BIGNUM" or (kind.kind == "other" and any(part in kind.name.upper() for part in UNGROUPABLE)):
            message = f"the column {name!r} of type {kind.name} cannot be a grouping key"
            raise DataError(message, code="column_type", column=name, hint="cast it")
    return Names.of(schema), []


def _nodes(formula: Formula, request: Request) -> list[expr.Node]:
    """Every expression whose columns enter as values."""
    nodes = [node for term in formula.fixed for node in term.variables] + list(formula.offsets)
    nodes += [node for bar in formula.random for term in bar.terms for node in term.variables]
    nodes += [formula.response] if formula.response is not None else []
    texts = (request.weights, request.freq, request.offset, request.trials, request.time, *(request.responses or ()))
    return nodes + [parse_expression(text) for text in texts if text is not None]


def _keys(formula: Formula, request: Request) -> list[str]:
    groups = [group for bar in formula.random for group in bar.groups]
    return [*groups, *request.groups, *request.clusters, *request.by]


def used_names(formula: Formula, request: Request) -> tuple[str, ...]:
    """The source's columns that a request uses."""
    names = [name for node in _nodes(formula, request) for name in expr.columns(node)]
    return tuple(dict.fromkeys([*names, *_keys(formula, request)]))


def _shell(formula: Formula, request: Request, names: Names, variables: Mapping[str, Variable], responses: tuple[str, ...]) -> Recipe:
    """A recipe without features, for statements that only need to know which rows enter. Raises DataError for weights that are text."""
    kinds = {name: names.kinds[name] for name in used_names(formula, request)}
    for what, text in (("weights", request.weights), ("freq", request.freq)):
        if text is not None and expr.kind(node := parse_expression(text), kinds) == "text":
            raise DataError(f"{what} = {text!r} is not numeric", code="weights_type", column=next(iter(expr.columns(node)), None))
    factors = tuple(dict.fromkeys(bar.groups for bar in formula.random))
    return Recipe(
        formula=formula,
        kinds=kinds,
        extra_responses=tuple(request.responses or ()),
        contrasts=dict(request.contrasts) if request.contrasts else None,
        responses=responses,
        weights=request.weights,
        freq=request.freq,
        offset=request.offset,
        groups=(*request.by, *(tuple(dict.fromkeys(key for factor in factors for key in factor)) or request.groups)),
        factors=factors if len(factors) > 1 else (),
        variables=variables,
        coordinates=Coordinates({}, {}, {}),
        features=(),
        z=(),
        family=request.family,
        trials=request.trials,
        clusters=request.clusters,
        time=request.time,
        by_row=request.by_row,
    )


def settle(
    shell: Recipe, variables: Mapping[str, Variable], responses: Mapping[str, Variable], coordinates: Coordinates, collect: str
) -> Recipe:
    """The recipe with its features: the least a plain fit needs, or a set closed under every change of coding."""
    formula = shell.formula
    fixed = code(formula.fixed, variables)
    random = [column for bar in formula.random for column in code(bar.terms, variables)]
    outcome = [response_column(label) for label in responses]
    covariates, z = needed([*fixed, *random], coordinates), needed(random, coordinates)
    atoms = [feature for feature in needed(outcome, coordinates) if feature]
    extra = [()] if any(coordinates.scalings[a][0] for feature in atoms for a in feature) else []
    if collect != "fit":
        covariates, z = closure(covariates), closure(z) if z else []
    covariates = sorted(dict.fromkeys([*extra, *covariates]), key=len)
    return replace(
        shell,
        variables={**variables, **responses},
        coordinates=replace(coordinates, levels=level_labels(variables.values())),
        features=(*covariates, *atoms),
        z=tuple(covariates.index(feature) for feature in z),
    )
