"""The preparatory looks at a source: levels, data-dependent bases, and a shift and scale per numeric column."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import expr, statements
from .basis import Summary, chebyshev_terms
from .design import Atom, Level, Variable, called, check_orders, level_label, ordered_levels, with_constants, with_levels
from .engines.base import Columns, Engine
from .errors import DataError
from .features import Coordinates, Recipe, level_labels
from .quantiles import Selector
from .sql import Expression, Names, both

MAX_LEVELS = 1_000
HUGE = 1e150  # beyond which squares and their sums overflow
UNSHIFTED = 4.0  # a column whose mean lies within so many spreads of 0 keeps its digits without a shift


class Looks:
    """One source, looked at for one recipe. `rows` that enter the fit are those of the recipe's shell."""

    def __init__(self, engine: Engine, names: Names, shell: Recipe, levels: Mapping[str, Sequence[Any]] | None) -> None:
        self.engine, self.names, self.shell, self.levels = engine, names, shell, dict(levels or {})
        self.notes: list[str] = []
        self.counts: dict[str, dict[str, int]] = {}
        self.not_finite: set[str] = set()  # columns that hold a NaN or an infinity in the sample
        self.columns = used_columns(shell, names)

    def used(self) -> Expression:
        """True for the rows that enter the fit."""
        return statements.usable(self.shell, self.names)

    def settled(self, variables: Mapping[str, Variable]) -> dict[str, Variable]:
        """The variables with their levels and the constants of their bases."""
        check_orders(self.levels, variables.values())
        levels = self._levels([v for v in variables.values() if v.kind == "category"])
        out = {}
        for label, variable in variables.items():
            if variable.kind == "category":
                out[label] = replace(with_levels(variable, levels[label]), order=self._order(variable))
            elif variable.basis is not None:
                out[label] = with_constants(variable, self._constants(variable))
            else:
                out[label] = variable
        return out

    def new_levels(self, variables: Mapping[str, Variable]) -> dict[str, tuple[Level, ...]]:
        """The levels of the used rows that the variables do not know yet. Raises DataError (code "empty") without any row."""
        count = statements.missing((), (), {}, self.names)
        if not any(self._row(count, sample=sample)["row_count"] for sample in (True, False)):
            raise DataError("there are no rows", code="empty")
        found = self._levels([v for v in variables.values() if v.kind == "category"])
        return {label: tuple(level for level in levels if level not in variables[label].levels) for label, levels in found.items()}

    def _levels(self, factors: Sequence[Variable]) -> dict[str, tuple[Level, ...]]:
        """The levels of each factor that occur among the used rows, in the contract's order."""
        counts: dict[str, dict[Level, int]] = {factor.label: {} for factor in factors}
        if not factors:
            return {}
        for batch in self.engine.query(statements.levels(factors, self.names, self.used()), self.columns):
            rows = batch.column("row_count").to_pylist()
            for k, factor in enumerate(factors):
                found = counts[factor.label]
                found.update((level, n) for level, n in zip(batch.column(f"v{k}").to_pylist(), rows, strict=True) if level is not None)
        for factor in factors:
            self._check_count(factor, len(counts[factor.label]))
        self.counts = {label: {level_label(level): n for level, n in found.items()} for label, found in counts.items()}
        return {factor.label: self._ordered(factor, list(counts[factor.label])) for factor in factors}

    def _check_count(self, factor: Variable, count: int) -> None:
        if count > MAX_LEVELS:
            raise DataError(
                f"the factor {factor.label} has {count:,} levels, too many for fixed effects (at most {MAX_LEVELS:,})",
                code="too_many_levels",
                column=next(iter(expr.columns(factor.expression)), None),
                hint=f"make it a random effect, (1 | {factor.label}), or group its levels",
            )

    def _order(self, variable: Variable) -> tuple[str, ...] | None:
        """The labels of a factor's levels in the order that the user or the column's type declares."""
        named = next((self.levels[name] for name in called(variable) if name in self.levels), None)
        if named is not None:
            return tuple(map(level_label, named))
        return self.engine.schema()[variable.expression.name].levels if isinstance(variable.expression, expr.Column) else None

    def _ordered(self, variable: Variable, found: list[Level]) -> tuple[Level, ...]:
        order = self._order(variable)
        unknown = [label for label in map(level_label, found) if label not in order] if order is not None else []
        if unknown:
            raise DataError(
                f"the factor {variable.label} has the level {unknown[0]!r}, which is not among the given or declared levels",
                code="unknown_level",
                column=next(iter(expr.columns(variable.expression)), None),
            )
        return ordered_levels(found, order)

    def _constants(self, variable: Variable) -> Any:
        """The constants of poly, bs, ns, scale or center from all rows that enter the fit."""
        basis = variable.basis
        assert basis is not None
        requests, argument = basis.requests, basis.argument
        row = self._row(statements.moments([argument], self.names, self.used()), sample=False)
        if not row["count_0"]:
            raise DataError(f"no usable rows to compute {variable.label}", code="no_rows")
        low, high = float(row["min_0"]), float(row["max_0"])
        chebyshev: tuple[float, ...] = ()
        if requests.chebyshev:
            terms = chebyshev_terms(argument, low, high, requests.chebyshev)
            sums = self._row(statements.sums(terms, self.names, self.used()), sample=False)
            chebyshev = tuple(float(sums[f"t_{k}"]) for k in range(len(terms)))
        points: tuple[float, ...] = ()
        if requests.quantiles:
            select = Selector(self.engine, argument, self.names, self.used(), self.columns)
            points = select.quantiles(requests.quantiles, int(row["count_0"]), low, high)
        summary = Summary(
            n=int(row["count_0"]),
            mean=self._mean(argument, row) if requests.moments else float(row["mean_0"]),
            sd=float(row["sd_0"]) if row["sd_0"] is not None else math.nan,
            minimum=low,
            maximum=high,
            chebyshev=chebyshev,
            quantiles=points,
        )
        return basis.constants(summary)

    def _mean(self, argument: expr.Node, row: Mapping[str, Any]) -> float:
        """The mean from sums about a first mean: the plain one has lost digits where the column is far from zero."""
        first = float(row["mean_0"])
        shifted = expr.Binary("-", argument, expr.Number(first))
        sums = self._row(statements.sums([shifted], self.names, self.used()), sample=False)
        return first + float(sums["t_0"]) / int(row["count_0"])

    def _row(self, statement: Any, *, sample: bool) -> dict[str, Any]:
        return dict(self.engine.query(statement, self.columns, sample=sample).read_all().to_pylist()[0])

    def coordinates(self, variables: Mapping[str, Variable]) -> Coordinates:
        """A shift and scale per collected numeric atom from a cheap sample, and each factor's most frequent level."""
        atoms = [(Atom(v.label, str(k + 1)), node) for v in variables.values() if v.kind == "numeric" for k, node in enumerate(v.columns)]
        scalings: dict[Atom, tuple[float, float]] = {}
        if atoms:
            nodes = [node for _, node in atoms]
            row = self._row(statements.moments(nodes, self.names, both([])), sample=True)
            self._note_wide_integers(nodes, row)
            self._refuse_huge(nodes, row)
            bad = [node for k, node in enumerate(nodes) if row[f"count_{k}"] < row[f"present_{k}"]]
            self.not_finite = {name for node in bad for name in expr.columns(node)}
            scalings = {atom: scaling(row, k) for k, (atom, _) in enumerate(atoms)}
        # of levels that are as frequent one that does not depend on the order in which the scan gave them
        omitted = {label: max(sorted(counts, key=str), key=lambda level: counts[level]) for label, counts in self.counts.items() if counts}
        covariates = [v for label, v in variables.items() if label not in self.shell.responses]
        return Coordinates(scalings, level_labels(variables.values()), omitted).with_products(covariates)

    def _refuse_huge(self, nodes: Sequence[expr.Node], row: Mapping[str, Any]) -> None:
        for k, node in enumerate(nodes):
            largest = max(abs(float(row[f"max_{k}"])), abs(float(row[f"min_{k}"]))) if row[f"count_{k}"] else 0.0
            if largest > HUGE:
                raise DataError(
                    f"{expr.label(node)} has values of {largest:.0e}, too large to be squared",
                    code="overflow", hint="rescale it", column=next(iter(expr.columns(node)), None),
                )  # fmt: skip

    def _note_wide_integers(self, nodes: Sequence[expr.Node], row: Mapping[str, Any]) -> None:
        schema = self.engine.schema()
        for k, node in enumerate(nodes):
            if isinstance(node, expr.Column) and schema[node.name].exact_integer and row[f"count_{k}"]:
                if max(abs(float(row[f"max_{k}"])), abs(float(row[f"min_{k}"]))) > 2**53:
                    self.notes.append(f"{node.name!r} holds whole numbers beyond 2^53, which lose their last digits as DOUBLE")


def used_columns(recipe: Recipe, names: Names) -> Columns:
    """The positions that a recipe's statements use as values and as keys; numeric keys are both: only values can be told finite."""
    numeric_keys = (name for name in recipe.keys if recipe.kinds[name] == "number")
    values = frozenset(names.positions[name] for name in (*statements.raw_columns(recipe), *numeric_keys))
    return Columns(values, frozenset(names.positions[name] for name in recipe.keys), row_number=recipe.by_row)


def scaling(row: Mapping[str, Any], k: int) -> tuple[float, float]:
    """Shift and scale of column k of a moments row.

    The shift is a multiple, the scale a power of two times, the column's grain (1 for whole numbers), so that sums of
    whole numbers stay exact and do not depend on their order.
    """
    if not row[f"count_{k}"]:
        return 0.0, 1.0
    mean, sd = float(row[f"mean_{k}"]), row[f"sd_{k}"]
    constant = sd is None or not math.isfinite(float(sd)) or row[f"min_{k}"] == row[f"max_{k}"]
    sd = 0.0 if constant else float(sd)
    largest = max(abs(float(row[f"max_{k}"])), abs(float(row[f"min_{k}"])))
    return shift_and_scale(mean, sd, whole=not row[f"fractions_{k}"], largest=largest)


def shift_and_scale(mean: float, sd: float, *, whole: bool, largest: float) -> tuple[float, float]:
    """A shift near the mean (0 where the mean is near 0 for the spread) and a power of two near the spread."""
    spread = sd or abs(largest - mean) or max(abs(mean), 1.0) * 1e-3
    if sd == 0.0 and mean == 0.0:
        return 0.0, 1.0
    shift = 0.0 if abs(mean) <= UNSHIFTED * sd else mean
    scale = 2.0 ** float(np.clip(round(math.log2(spread)), -1000, 1000))
    if whole:
        shift, scale = float(round(shift)), max(scale, 1.0)
    return shift, scale
