"""The collected columns ("features") and the exact linear maps from them to design columns.

A fit never sums raw design columns. It sums *features*: products of shifted and scaled numeric atoms and of
indicators of every level but the most frequent one. Every raw design column, for every contrast, base level, shift or
scale, is a linear combination of features, so that statistics once collected serve any of them (R4 of the formulas:
the transformation is undone exactly on the coefficients).
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import combinations, combinations_with_replacement
from typing import TYPE_CHECKING, Any

from . import expr
from .design import (
    Atom,
    DesignColumn,
    Level,
    Monomial,
    Variable,
    level_label,
    ordered_levels,
    variables_of,
    with_constants,
    with_levels,
)
from .errors import DataError, FormulaError
from .formula import Formula, parse, parse_expression
from .outcome import outcome_variables, response_label

if TYPE_CHECKING:
    import numpy as np

CONSTANT: Monomial = ()
MAX_DEGREE = 4  # of polynomials that are collected as products


@dataclass(frozen=True)
class Coordinates:
    """How raw atoms are written in collected ones.

    `scalings`: numeric atom -> (shift c, scale d), raw = c + d * collected. `levels`: categorical variable -> the
    labels of its levels. `omitted`: categorical variable -> the level whose indicator is 1 minus all others.
    `polynomials`: numeric atom that is not collected -> the raw monomials of other atoms that it is made of.
    """

    scalings: Mapping[Atom, tuple[float, float]]
    levels: Mapping[str, tuple[str, ...]]
    omitted: Mapping[str, str]
    polynomials: Mapping[Atom, Mapping[Monomial, float]] = field(default_factory=dict)

    def affine(self, atom: Atom) -> dict[Monomial, float]:
        """One raw atom as a combination of features: of the constant and collected atoms, or of their products."""
        if atom in self.polynomials:
            return self._sum(self.polynomials[atom])
        if atom in self.scalings:
            shift, scale = self.scalings[atom]
            return {CONSTANT: shift, (atom,): scale} if shift else {(atom,): scale}
        if atom.part != self.omitted[atom.variable]:
            return {(atom,): 1.0}
        others = (Atom(atom.variable, label) for label in self.levels[atom.variable] if label != atom.part)
        return {CONSTANT: 1.0} | {(other,): -1.0 for other in others}

    def expand(self, monomial: Monomial) -> dict[Monomial, float]:
        """A raw monomial as a combination of features (the product of its atoms' affine maps)."""
        product: dict[Monomial, float] = {CONSTANT: 1.0}
        for atom in monomial:
            product = multiplied(product, self.affine(atom))
        return product

    def _sum(self, polynomial: Mapping[Monomial, float]) -> dict[Monomial, float]:
        out: dict[Monomial, float] = {}
        for monomial, weight in polynomial.items():
            for feature, coefficient in self.expand(monomial).items():
                out[feature] = out.get(feature, 0.0) + weight * coefficient
        return out

    def with_products(self, variables: Sequence[Variable]) -> Coordinates:
        """The same with polynomials in other variables as products, but for those whose coefficients would over- or underflow."""
        trial = replace(self, polynomials=polynomials(variables))
        kept = {atom: terms for atom, terms in trial.polynomials.items() if _representable(trial.affine(atom))}
        return replace(self, scalings={atom: pair for atom, pair in self.scalings.items() if atom not in kept}, polynomials=kept)


@dataclass(frozen=True)
class Recipe:
    """What was collected: enough to write the same SQL again and to code any sub-model's design.

    `features`: covariate features, then one per response. `z`: positions of the features of the random part.
    `responses`: the variable labels of the responses, in the order of their features; `extra_responses`: the texts of those
    that are not the formula's own. `family`: of a generalized model, whose `responses` are the parts of its outcome (response or
    successes, trials, offset); `trials`: as the user wrote them; `success`: the level of a two-level response that is modelled, `failure`
    the other.
    `factors`: the key columns of each of several grouping factors; `groups` are then all of them. `clusters`: key columns of robust
    standard errors, which must not be missing. `time` orders the rows of a block, `waves` are its levels where it is text, `by_row` says
    that the source's own order does. `units`: of the columns that are times, see `ColumnType.unit`; None where it was not noted.
    `explained`: the combination of features that was taken off the response before it was summed.
    """

    formula: Formula
    kinds: Mapping[str, str]
    contrasts: Mapping[str, str] | None
    responses: tuple[str, ...]
    extra_responses: tuple[str, ...]
    weights: str | None
    freq: str | None
    offset: str | None
    groups: tuple[str, ...]
    variables: Mapping[str, Variable]
    coordinates: Coordinates
    features: tuple[Monomial, ...]
    z: tuple[int, ...]
    family: str | None = None
    trials: str | None = None
    success: str | None = None
    failure: str | None = None
    factors: tuple[tuple[str, ...], ...] = ()
    clusters: tuple[str, ...] = ()
    time: str | None = None
    waves: tuple[Level, ...] = ()
    by_row: bool = False
    units: Mapping[str, str] | None = None
    explained: Mapping[Monomial, float] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """All key columns: grouping factors, then clusters."""
        return tuple(dict.fromkeys((*self.groups, *self.clusters)))

    @property
    def n_covariates(self) -> int:
        """The number of features that are not responses."""
        return len(self.features) - len(self.responses)

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one matrix of cross-products."""
        return 8 * max(len(self.features), 1) ** 2

    def pairs(self) -> list[tuple[int, int]]:
        """The distinct (random feature, feature) products that are summed per block."""
        return [(a, j) for i, a in enumerate(self.z) for j in range(len(self.features)) if j not in self.z[:i]]

    def rest(self) -> list[tuple[int, int]]:
        """The products that `pairs` leaves out of a block's own cross-products: those of two features outside the random part."""
        return list(combinations_with_replacement([j for j in range(len(self.features)) if j not in self.z], 2))

    def matrix(self, columns: Sequence[DesignColumn]) -> np.ndarray:
        """The map T (features x columns) with design = features @ T. Raises DataError where a feature is missing."""
        import numpy as np

        position = {feature: i for i, feature in enumerate(self.features)}
        out = np.zeros((len(self.features), len(columns)))
        for j, column in enumerate(columns):
            for monomial, weight in column.combination:
                for feature, coefficient in self.coordinates.expand(monomial).items():
                    if feature not in position:
                        raise DataError(
                            f"the statistics hold nothing for the column {column.name!r}",
                            code="not_collected",
                            hint='collect them with a formula that has this term (collect="blocks" keeps every sub-model)',
                        )
                    out[position[feature], j] += weight * coefficient
        return out

    def residual(self, gamma: Sequence[float], response: str, scale: float) -> Recipe:
        """The recipe that sums the response less the combination `gamma` (features,) of the features, in units of `scale`."""
        node = self.variables[response].expression
        for feature, coefficient in zip(self.features, gamma, strict=True):
            if coefficient:
                node = expr.subtract(node, expr.multiply(expr.Number(float(coefficient)), self._node(feature)))
        variable = replace(self.variables[response], expression=node, columns=(node,))
        scalings = {**self.coordinates.scalings, Atom(response, "1"): (0.0, scale)}
        explained = {feature: value for feature, value in zip(self.features, gamma, strict=True) if value}
        coordinates = replace(self.coordinates, scalings=scalings)
        return replace(self, variables={**self.variables, response: variable}, coordinates=coordinates, explained=explained)

    def _node(self, feature: Monomial) -> expr.Node:
        """A feature as a scalar expression."""
        node: expr.Node = expr.Number(1.0)
        for atom in feature:
            variable = self.variables[atom.variable]
            if atom in self.coordinates.scalings:
                shift, scale = self.coordinates.scalings[atom]
                raw = variable.columns[int(atom.part) - 1]
                factor = expr.multiply(expr.subtract(raw, expr.Number(shift)), expr.Number(1 / scale))
            else:
                level = next(level for level in variable.levels if level_label(level) == atom.part)
                factor = expr.Case(((_is_level(variable.expression, level), expr.Number(1.0)),), expr.Number(0.0))
            node = expr.multiply(node, factor)
        return node

    def to_json(self) -> dict[str, Any]:
        """Everything needed to rebuild it, as plain JSON values."""
        return {
            "formula": self.formula.text,
            "kinds": dict(self.kinds),
            "contrasts": dict(self.contrasts) if self.contrasts else None,
            "responses": list(self.responses),
            "extra_responses": list(self.extra_responses),
            "weights": self.weights,
            "freq": self.freq,
            "offset": self.offset,
            "groups": list(self.groups),
            "levels": {label: list(v.levels) for label, v in self.variables.items() if v.kind == "category"},
            "orders": {label: list(v.order) for label, v in self.variables.items() if v.order is not None},
            "constants": {label: v.constants for label, v in self.variables.items() if v.constants is not None},
            "scalings": [[a.variable, a.part, c, d] for a, (c, d) in self.coordinates.scalings.items()],
            "omitted": dict(self.coordinates.omitted),
            "features": [[[a.variable, a.part] for a in feature] for feature in self.features],
            "z": list(self.z),
            "family": self.family,
            "trials": self.trials,
            "success": self.success,
            "failure": self.failure,
            "factors": [list(groups) for groups in self.factors],
            "clusters": list(self.clusters),
            "time": self.time,
            "waves": list(self.waves),
            "by_row": self.by_row,
            "units": dict(self.units) if self.units is not None else None,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_json`."""
        formula = parse(record["formula"])
        variables = {v.label: v for v in variables_of(formula, record["kinds"], record["contrasts"])}
        for label, levels in record["levels"].items():
            variables[label] = with_levels(variables[label], tuple(levels))
        for label, order in record["orders"].items():
            variables[label] = replace(variables[label], order=tuple(order))
        for label, constants in record["constants"].items():
            variables[label] = with_constants(variables[label], constants)
        products = polynomials(variables.values())
        family, trials, success, time = (record.get(name) for name in ("family", "trials", "success", "time"))
        waves = tuple(record.get("waves", ()))
        if family is None:
            variables |= response_variables(formula, record["kinds"], record["offset"], record["extra_responses"])
        else:
            variables |= outcome_variables(formula, record["kinds"], family, record["offset"], trials, success, time, waves)
        coordinates = Coordinates(
            scalings := {Atom(v, part): (c, d) for v, part, c, d in record["scalings"]},
            level_labels(variables.values()),
            record["omitted"],
            {atom: terms for atom, terms in products.items() if atom not in scalings},
        )
        return cls(
            formula=formula,
            kinds=record["kinds"],
            contrasts=record["contrasts"],
            responses=tuple(record["responses"]),
            extra_responses=tuple(record["extra_responses"]),
            weights=record["weights"],
            freq=record["freq"],
            offset=record["offset"],
            groups=tuple(record["groups"]),
            variables=variables,
            coordinates=coordinates,
            features=tuple(tuple(Atom(*atom) for atom in feature) for feature in record["features"]),
            z=tuple(record["z"]),
            family=family,
            trials=trials,
            success=success,
            failure=record.get("failure"),
            factors=tuple(tuple(groups) for groups in record.get("factors", ())),
            clusters=tuple(record.get("clusters", ())),
            time=time,
            waves=waves,
            by_row=record.get("by_row", False),
            units=record.get("units"),
        )


def multiplied(left: Mapping[Monomial, float], right: Mapping[Monomial, float]) -> dict[Monomial, float]:
    """The product of two combinations of monomials; an atom may occur in one several times."""
    out: dict[Monomial, float] = {}
    for a, x in left.items():
        for b, y in right.items():
            monomial = tuple(sorted(a + b))
            out[monomial] = out.get(monomial, 0.0) + x * y
    return out


def polynomials(variables: Iterable[Variable]) -> dict[Atom, dict[Monomial, float]]:
    """The numeric variables that are polynomials in one other variable, such as I(year^2) beside year.

    Collected as products of the other's shifted and scaled values they keep their digits: 1, year and year² as they are, each
    with its own shift, are all but the same column.
    """
    known = {v.columns[0]: Atom(v.label, "1") for v in variables if v.kind == "numeric" and v.basis is None and len(v.columns) == 1}
    out = {}
    for node, atom in known.items():
        terms = _polynomial(node, {other: held for other, held in known.items() if held != atom})
        if terms is not None and len({a for monomial in terms for a in monomial}) == 1 and max(map(len, terms)) <= MAX_DEGREE:
            out[atom] = terms
    return out


def _polynomial(node: expr.Node, known: Mapping[expr.Node, Atom]) -> dict[Monomial, float] | None:
    """A node as a polynomial in the atoms of known nodes, None where it is none."""
    node = expr.unwrap(node)
    if node in known:
        return {(known[node],): 1.0}
    if isinstance(node, expr.Number):
        return {CONSTANT: float(node.value)}
    if isinstance(node, expr.Unary) and node.op in "+-":
        return _scaled(_polynomial(node.operand, known), 1.0 if node.op == "+" else -1.0)
    if not isinstance(node, expr.Binary):
        return None
    left, right = _polynomial(node.left, known), _polynomial(node.right, known)
    if left is None or right is None:
        return None
    if node.op in "+-":
        signed = _scaled(right, 1.0 if node.op == "+" else -1.0) or {}
        return {monomial: left.get(monomial, 0.0) + signed.get(monomial, 0.0) for monomial in left | signed}
    if node.op == "*":
        return multiplied(left, right)
    power = right.get(CONSTANT, 0.0) if right.keys() == {CONSTANT} else 0.0
    if node.op == "^" and power in range(1, MAX_DEGREE + 1):
        return reduce(multiplied, [left] * int(power))
    return _scaled(left, 1 / power) if node.op == "/" and power else None


def _scaled(terms: dict[Monomial, float] | None, factor: float) -> dict[Monomial, float] | None:
    return None if terms is None else {monomial: factor * weight for monomial, weight in terms.items()}


def _representable(terms: Mapping[Monomial, float]) -> bool:
    """Whether all coefficients are finite and those of the highest degree are not lost."""
    degree = max(map(len, terms))
    return all(math.isfinite(x) and (x != 0.0 or len(monomial) < degree) for monomial, x in terms.items())


def _is_level(node: expr.Node, level: Level) -> expr.Node:
    if isinstance(level, bool):
        return node if level else expr.Unary("!", node)
    return expr.Binary("==", node, expr.Text(level) if isinstance(level, str) else expr.Number(level))


def response_variables(formula: Formula, kinds: Mapping[str, str], offset: str | None, extra: Sequence[str]) -> dict[str, Variable]:
    """The responses as numeric variables, offsets subtracted. Raises FormulaError without any, DataError for text."""
    nodes = [formula.response] if formula.response is not None else []
    nodes += [parse_expression(text) for text in extra]
    if not nodes:
        raise FormulaError("the formula has no response", hint="write it as response ~ terms")
    offsets = [*formula.offsets, *([parse_expression(offset)] if offset else [])]
    out = {}
    for node in nodes:
        text = expr.label(node)
        if expr.kind(node, kinds) == "text":
            hint = "it is read as text: are there values such as '1,5' or 'n/a' among numbers?"
            named = next(iter(expr.columns(node)), None)
            raise DataError(f"the response {text} is not numeric", code="response_type", column=named, hint=hint)
        for shift in offsets:
            node = expr.Binary("-", node, shift)
        label = response_label(text)
        out[label] = Variable(label=label, kind="numeric", expression=node, columns=(node,), suffixes=("",))
    return out


def response_column(label: str) -> DesignColumn:
    """A response as a design column."""
    return DesignColumn(label, (((Atom(label, "1"),), 1.0),))


def level_labels(variables: Iterable[Variable]) -> dict[str, tuple[str, ...]]:
    """The labels of the levels of every categorical variable."""
    return {v.label: tuple(level_label(level) for level in v.levels) for v in variables if v.kind == "category"}


def closure(features: Iterable[Monomial]) -> list[Monomial]:
    """The features and all their sub-products, the constant first, by degree and then by first use.

    Over a closed set every change of shift, scale, base level or contrast is an exact linear map.
    """
    seen: dict[Monomial, None] = {CONSTANT: None}
    for feature in features:
        for size in range(len(feature) + 1):
            seen.update(dict.fromkeys(combinations(feature, size)))
    return sorted(seen, key=len)


def needed(columns: Sequence[DesignColumn], coordinates: Coordinates) -> list[Monomial]:
    """The features that design columns use with a coefficient other than zero, by degree and then by first use."""
    used: dict[Monomial, None] = {}
    for column in columns:
        total: dict[Monomial, float] = {}
        for monomial, weight in column.combination:
            for feature, coefficient in coordinates.expand(monomial).items():
                total[feature] = total.get(feature, 0.0) + weight * coefficient
        used.update(dict.fromkeys(feature for feature, coefficient in total.items() if coefficient))
    return sorted(used, key=len)


def extended(recipe: Recipe, new_levels: Mapping[str, tuple[Level, ...]]) -> Recipe:
    """The recipe with further levels, in their place among the known ones, and the features that these add to its closed set."""
    if not any(new_levels.values()):
        return recipe
    variables = dict(recipe.variables)
    for label, levels in new_levels.items():
        if levels:
            held = variables[label]
            variables[label] = with_levels(held, ordered_levels(held.levels + levels, held.order))
    coordinates = replace(recipe.coordinates, levels=level_labels(variables.values()))
    covariates = recipe.features[: recipe.n_covariates]
    grown = closure(f for feature in covariates for f in _over_levels(feature, coordinates))
    z = dict.fromkeys(f for i in recipe.z for f in _over_levels(recipe.features[i], coordinates))
    return replace(
        recipe,
        variables=variables,
        coordinates=coordinates,
        features=(*grown, *recipe.features[recipe.n_covariates :]),
        z=tuple(i for i, feature in enumerate(grown) if feature in z),
    )


def _over_levels(feature: Monomial, coordinates: Coordinates) -> list[Monomial]:
    """The feature with each indicator replaced by those of all collected levels of its variable."""
    out: list[tuple[Atom, ...]] = [()]
    for atom in feature:
        atoms = [atom]
        if atom not in coordinates.scalings:
            omitted = coordinates.omitted[atom.variable]
            atoms = [Atom(atom.variable, label) for label in coordinates.levels[atom.variable] if label != omitted]
        out = [(*head, a) for head in out for a in atoms]
    return [tuple(sorted(f)) for f in out]
