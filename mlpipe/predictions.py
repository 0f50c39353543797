"""What scoring computes for a row, in SQL: fixed and random parts, residuals, and the columns these are made of."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import expr
from .arrays import arrow
from .design import Variable
from .features import Recipe
from .formula import parse_expression
from .outcome import TIME, TRIALS

if TYPE_CHECKING:
    import pyarrow as pa
    from sqlglot import exp

    from .result import MixedFit, RandomTerm
    from .sql import Names


@dataclass(frozen=True)
class Output:
    """One output column: the quantities it is made of, each a column that the statement computes, and how (None: as it is)."""

    parts: tuple[str, ...]
    made: Callable[..., np.ndarray] | None = None


def _used_variables(recipe: Recipe) -> list[Variable]:
    return [v for label, v in recipe.variables.items() if label not in recipe.responses]


def _offsets(recipe: Recipe) -> list[expr.Node]:
    return [*recipe.formula.offsets, *([parse_expression(recipe.offset)] if recipe.offset else [])]


def value_names(recipe: Recipe, response: bool) -> list[str]:
    """The columns that scoring reads as values; `response`: those of the response too."""
    nodes = [node for v in _used_variables(recipe) for node in (v.expression, *v.columns)] + _offsets(recipe)
    if response:
        nodes += [recipe.variables[label].expression for label in recipe.responses if label != TIME]
    return list(dict.fromkeys(name for node in nodes for name in expr.columns(node)))


def size_names(recipe: Recipe) -> list[str]:
    """The columns that a row's precision weight, or its number of trials, is made of."""
    nodes = [parse_expression(recipe.weights)] if recipe.weights else []
    nodes += [recipe.variables[TRIALS].expression] if TRIALS in recipe.variables else []
    return list(dict.fromkeys(name for node in nodes for name in expr.columns(node)))


def statement_of(fit: MixedFit, names: Names, shown: dict[str, int], parts: Sequence[str]) -> exp.Select:
    """The statement that scores `src`: columns r…, and the `parts` o0, o1, …, null where a row lacks a covariate; they may be infinite."""
    from sqlglot import exp

    from .sql import case, feature, named, number, skeleton

    recipe = fit.recipe
    fixed = fixed_part(fit, names)
    usable = scorable(recipe, names)
    every = {"population": fixed}
    if "residual" in parts:
        every["residual"] = _residual(fit, names, fixed)
    for k, i in enumerate(recipe.z):
        if f"z{k}" in parts:
            every[f"z{k}"] = feature(recipe.features[i], recipe, names)
    if "variance" in parts:
        every["variance"] = variance_part(fit, names, fit.terms)
    for group in fit.groups:
        if variance_of(group) in parts:
            every[variance_of(group)] = variance_part(fit, names, [term for term in fit.terms if term.group == group])
    if "size" in parts:
        every["size"] = _size(recipe, names)
    if "observed" in parts:
        every["observed"] = _observed(recipe, names)
    for i, monomial in enumerate(recipe.features):
        if f"f{i}" in parts:
            every[f"f{i}"] = feature(monomial, recipe, names) if monomial else number(1)
    columns: list[exp.Expr] = [exp.column(f"r{i}", table="src") for i in shown.values()]
    for k, part in enumerate(parts):
        columns.append(named(case([(usable.copy(), every[part])], None), f"o{k}"))
    return skeleton("predict").select(*columns, append=False, copy=False)


def fixed_part(fit: MixedFit, names: Names) -> exp.Expr:
    """The linear predictor without random effects, offsets included."""
    from .sql import numeric, plus
    from .statements import combination

    fixed = combination(fit.gamma.tolist(), fit.recipe, names, inside=False)
    for offset in _offsets(fit.recipe):
        fixed = plus(fixed, numeric(offset, names))
    return fixed


def random_features(recipe: Recipe) -> list[str]:
    """The names of the random features among the parts of a scoring statement, empty for the constant."""
    return [f"z{k}" if recipe.features[i] else "" for k, i in enumerate(recipe.z)]


def scorable(recipe: Recipe, names: Names) -> exp.Expr:
    """True where a row has all covariates, and of each factor a level that the fit knows."""
    from .sql import both

    return both([*_known_levels(recipe, names), *(names.present(name) for name in value_names(recipe, False))])


def _known_levels(recipe: Recipe, names: Names) -> Iterator[exp.Expr]:
    """For each factor: true where the row has one of its levels."""
    from sqlglot import exp

    from .sql import is_level

    for variable in _used_variables(recipe):
        if variable.kind == "category" and isinstance(variable.expression, expr.Column | expr.Call):
            yield exp.Paren(this=exp.or_(*(is_level(variable, level, names) for level in variable.levels)))


def _residual(fit: MixedFit, names: Names, fitted: exp.Expr) -> exp.Expr:
    """Response minus fitted; offsets are part of both, so the fitted value without them stands against y - offsets."""
    from .sql import minus, numeric, plus

    recipe = fit.recipe
    response = numeric(recipe.variables[fit.response].expression, names)
    for offset in _offsets(recipe):
        response = plus(response, numeric(offset, names))
    return minus(response, fitted.copy())


def _size(recipe: Recipe, names: Names) -> exp.Expr:
    """What divides a row's variance: its precision weight, or the trials of a proportion; NaN where it is not above 0."""
    from .sql import case, number, numeric

    node = parse_expression(recipe.weights) if recipe.weights else recipe.variables[TRIALS].expression
    value = numeric(node, names)
    return case([(_positive(value), value.copy())], number(float("nan")))


def _observed(recipe: Recipe, names: Names) -> exp.Expr:
    """The response of a generalized model as it is modelled: with trials, the proportion of successes."""
    from .sql import case, number, numeric, ratio

    response = numeric(recipe.variables[recipe.responses[0]].expression, names)
    if TRIALS not in recipe.variables:
        return response
    trials = numeric(recipe.variables[TRIALS].expression, names)
    return case([(_positive(trials), ratio(response, trials.copy()))], number(float("nan")))


def _positive(value: exp.Expr) -> exp.Expr:
    """True where the value is above 0."""
    from sqlglot import exp

    from .sql import number

    return exp.GT(this=exp.Paren(this=value.copy()), expression=number(0))


def variance_of(group: str) -> str:
    """The name of the part that is the variance of one factor's effects."""
    return f"variance of {group}"


def variance_part(fit: MixedFit, names: Names, terms: Sequence[RandomTerm]) -> exp.Expr:
    """The variance z'Ψz of these random terms at a row, over the features."""
    from .sql import feature, number, summed, times

    recipe, parts = fit.recipe, []
    half = np.hstack([term.Q @ term.star for term in terms])
    psi = fit.effect_scale**2 * half @ half.T
    for a, i in enumerate(recipe.z):
        for b, j in enumerate(recipe.z[: a + 1]):
            product = number(float(psi[a, b] * (1.0 if a == b else 2.0)))
            for k in (i, j):
                product = times(product, feature(recipe.features[k], recipe, names)) if recipe.features[k] else product
            parts.append(product)
    return summed(parts)


def made(output: Output, parts: Mapping[str, np.ndarray]) -> pa.Array:
    """One output column of a batch from its parts (n,); null where it is not finite."""
    import pyarrow.compute as pc

    values = [parts[name] for name in output.parts]
    with np.errstate(invalid="ignore", over="ignore"):
        found = values[0] if output.made is None else output.made(*values)
    out = arrow(found)
    return out if np.isfinite(found).all() else pc.if_else(pc.is_finite(out), out, None)
