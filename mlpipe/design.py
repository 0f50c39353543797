"""Formula, column kinds and levels to coded design columns: R's model.matrix without the data.

A design column is an exact linear combination of *monomials*: products of numeric columns and of indicators
[variable = level], one for every level. Contrasts, base levels and the marginality rule are only the coefficients.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from . import expr
from .basis import Basis, parse_basis
from .errors import ColumnNotFoundError, ConfigError, DataError, FormulaError, did_you_mean
from .expr import Call, Column, Logical, Node, Number, Text, label, unwrap
from .formula import Formula, Term

Level = str | bool | int | float
CONTRASTS = ("treatment", "sum", "helmert", "poly")
MAX_POLY_LEVELS = 95  # as R: beyond it the polynomials are not accurate


@dataclass(frozen=True)
class Variable:
    """One of R's variables of a formula, numeric (one or several columns) or a category.

    `expression` is what a category compares with its levels, or a basis' argument; `columns` and `suffixes` are the
    numeric columns and what their names append to the label. `levels`, `columns` of a basis and `constants` are
    filled in by `with_levels` and `with_constants`. `order`: the labels of levels in the order that the user or the type
    declares, those without rows included. `ref` is the base level asked for, by its label.
    """

    label: str
    kind: str
    expression: Node
    columns: tuple[Node, ...] = ()
    suffixes: tuple[str, ...] = ()
    levels: tuple[Level, ...] = ()
    order: tuple[str, ...] | None = None
    contrast: str = "treatment"
    ref: str | None = None
    basis: Basis | None = None
    constants: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True, order=True)
class Atom:
    """A numeric column, `part` its number from 1, or the indicator of a level, `part` its label."""

    variable: str
    part: str


# Sorted, at most one atom of each variable; the empty product is the constant 1.
Monomial = tuple[Atom, ...]
Combination = tuple[tuple[Monomial, float], ...]


@dataclass(frozen=True)
class DesignColumn:
    """A column of the design: R's name and its monomials with coefficients other than zero."""

    name: str
    combination: Combination


def level_label(level: Level) -> str:
    """A level as R's as.character writes it."""
    if isinstance(level, bool):
        return "TRUE" if level else "FALSE"
    return expr.number_text(level) if isinstance(level, float) else str(level)


def ordered_levels(levels: Iterable[Level], order: Sequence[str] | None) -> tuple[Level, ...]:
    """Levels in the order of these labels, others after them; without an order by value, text by its UTF-8 bytes."""
    by_value = sorted(levels, key=lambda level: level.encode() if isinstance(level, str) else level)
    rank = {label: i for i, label in enumerate(order or ())}
    return tuple(sorted(by_value, key=lambda level: rank.get(level_label(level), len(rank))))


def called(factor: Variable) -> tuple[str, ...]:
    """By what names `levels` may call a factor: its label, and its column where it is one: that of I(f == "b") has other levels."""
    return (factor.label, factor.expression.name) if isinstance(factor.expression, Column) else (factor.label,)


def check_orders(levels: Mapping[str, Sequence[Any]], variables: Iterable[Variable]) -> None:
    """Raises ConfigError for `levels` of what is no factor, that are not several values, or that repeat one."""
    known = {name for v in categorical(variables) for name in called(v)}
    for name, order in levels.items():
        if name not in known:
            raise ConfigError(f"levels names {name!r}, which is no factor of the formula", hint=did_you_mean(name, sorted(known)))
        if isinstance(order, str):
            raise ConfigError(f"levels of {name!r} are a list, not the text {order!r}", column=name)
        labels = [level_label(level) for level in order]
        if twice := [text for k, text in enumerate(labels) if text in labels[:k]]:
            raise ConfigError(f"levels of {name!r} name {twice[0]!r} twice", column=name)


# ---- variables


def variables_of(formula: Formula, kinds: Mapping[str, str], contrasts: Mapping[str, str] | None) -> tuple[Variable, ...]:
    """All variables of the fixed and random terms, each once, in order of appearance.

    `kinds` gives each column's kind ("number", "logical", "text"); `contrasts` names a contrast by a variable's label or
    a column. Levels are not yet known, bases not yet fitted.

    Raises: FormulaError, pointing into the formula, where a use does not fit a column's kind or a basis' arguments are
    wrong; ColumnNotFoundError; ConfigError for a contrast that is unknown, or of what is no category.
    """
    nodes = {label(node): node for node in formula.variables}
    try:
        variables = tuple(_variable(node, kinds) for node in nodes.values())
    except (FormulaError, ColumnNotFoundError) as error:
        raise expr.pointed(error, formula.text) from None
    return with_contrasts(variables, contrasts or {})


def categorical(variables: Iterable[Variable]) -> tuple[Variable, ...]:
    """The variables that need levels."""
    return tuple(variable for variable in variables if variable.kind == "category")


def bases(variables: Iterable[Variable]) -> tuple[Variable, ...]:
    """The variables that need constants."""
    return tuple(variable for variable in variables if variable.basis is not None)


def with_levels(variable: Variable, levels: Sequence[Level]) -> Variable:
    """The variable with these levels, in this order; raises FormulaError where its `ref` is none of them."""
    labels = [level_label(level) for level in levels]
    if variable.ref is not None and variable.ref not in labels:
        column = next(iter(expr.columns(variable.expression)), None)
        raise FormulaError(f"{variable.label}: {variable.ref!r} is not a level", hint=did_you_mean(variable.ref, labels), column=column)
    return replace(variable, levels=tuple(levels))


def with_constants(variable: Variable, constants: Mapping[str, Any]) -> Variable:
    """The variable with the columns that its basis has under these constants."""
    if variable.basis is None:
        raise ValueError(f"{variable.label} has no basis")
    return replace(variable, columns=variable.basis.columns(constants), constants=constants)


def _variable(node: Node, kinds: Mapping[str, str]) -> Variable:
    if isinstance(node, Call) and node.function in expr.FACTORS:
        return _factor(node, kinds)
    if isinstance(node, Call) and node.function in expr.BASES:
        basis = parse_basis(node)
        # Adding is a use as a number: it finds the text column in poly(name, 2).
        expr.kind(expr.Unary("+", basis.argument, span=basis.argument.span), kinds)
        return Variable(label(node), "numeric", basis.argument, suffixes=basis.suffixes, basis=basis)
    inner = unwrap(node)
    if expr.kind(inner, kinds) == "number":
        return Variable(label(node), "numeric", inner, columns=(inner,), suffixes=("",))
    return Variable(label(node), "category", inner)


def _factor(node: Call, kinds: Mapping[str, str]) -> Variable:
    """factor(k), C(x), C(x, sum), C(x, ref = "b"), C(factor(k), ...)."""
    inner = unwrap(node.args[0])
    if isinstance(inner, Call) and inner.function in expr.FACTORS:
        base = replace(_factor(inner, kinds), label=label(node))
    else:
        if expr.kind(inner, kinds) == "number" and not isinstance(inner, Column):
            hint = "compute it as a column of the data"
            raise FormulaError(f"{node.function}() takes a column or a comparison", hint=hint, span=node.span)
        base = Variable(label(node), "category", inner)
    if node.function == "factor":
        if len(node.args) > 1 or node.named:
            raise FormulaError("factor() takes one argument", hint="the order of the levels is given by levels=", span=node.span)
        return base
    return _coded(node, base)


def _coded(node: Call, base: Variable) -> Variable:
    given = dict(node.named)
    if len(node.args) == 2 and "contr" not in given:
        given["contr"] = node.args[1]
    elif len(node.args) > 1:
        raise FormulaError('C() takes a column, a contrast and ref: C(x, sum), C(x, ref = "b")', span=node.span)
    for name, value in given.items():
        if name not in ("ref", "contr"):
            raise FormulaError(f"C() has no argument {name!r}", hint=did_you_mean(name, ["ref", "contr"]), span=value.span)
    if "contr" in given:
        base = replace(base, contrast=_contrast_name(given["contr"]))
    if "ref" in given:
        if base.contrast != "treatment":
            raise FormulaError(f"ref has no meaning for {base.contrast} contrasts", span=given["ref"].span)
        base = replace(base, ref=_level_text(given["ref"]))
    return base


def _contrast_name(node: Node) -> str:
    name = node.name if isinstance(node, Column) else node.value if isinstance(node, Text) else label(node)
    name = name.removeprefix("contr.")
    if name not in CONTRASTS:
        raise FormulaError(f"unknown contrast {name!r}", hint=did_you_mean(name, list(CONTRASTS)), span=node.span)
    return name


def _level_text(node: Node) -> str:
    if isinstance(node, Text | Logical | Number):
        return level_label(float(node.value) if isinstance(node, Number) else node.value)
    raise FormulaError(f'ref takes a level, as in ref = "b", not {label(node)}', span=node.span)


def with_contrasts(variables: Sequence[Variable], contrasts: Mapping[str, str]) -> tuple[Variable, ...]:
    """The variables with other contrasts, by label or column name. Raises ConfigError for unknown names and kinds."""
    out = {variable.label: variable for variable in variables}
    for name, contrast in contrasts.items():
        if contrast not in CONTRASTS:
            raise ConfigError(f"unknown contrast {contrast!r} for {name!r}", hint=did_you_mean(contrast, list(CONTRASTS)), column=name)
        named = [v for v in variables if v.label == name] or [v for v in variables if name in expr.columns(v.expression)]
        if not named:
            known = [v.label for v in categorical(variables)]
            raise ConfigError(f"contrasts names {name!r}, which is no factor of the formula", hint=did_you_mean(name, known), column=name)
        factors = [v for v in named if v.kind == "category"]
        if not factors:
            raise ConfigError(f"contrasts names {name!r}, which is numeric", hint=f"write factor({name}) in the formula", column=name)
        # What the formula says itself, C(x, sum), goes before what a column is given here.
        coded = [v for v in factors if v.ref is None and (v.label == name or v.contrast == "treatment")]
        if not coded:
            raise ConfigError(f"contrasts names {name!r}, whose coding the formula sets in {factors[0].label}", column=name)
        out |= {v.label: replace(v, contrast=contrast) for v in coded}
    return tuple(out.values())


# ---- coding


def code(terms: Sequence[Term], variables: Mapping[str, Variable]) -> tuple[DesignColumn, ...]:
    """The design columns of a formula part, with the values, names and order of R's model.matrix.

    A category in a term is coded by contrasts where an earlier term contains the term without it, else by indicators
    of all levels; without an intercept the first category is coded by indicators (R's terms.formula and model.matrix).

    Raises: DataError for a category with fewer than two levels where it is coded by contrasts.
    """
    labelled = [tuple(label(node) for node in term.variables) for term in terms]
    indicators_due = () not in labelled
    earlier: list[set[str]] = []
    out: list[DesignColumn] = []
    for names in labelled:
        if not names:
            out.append(DesignColumn("(Intercept)", (((), 1.0),)))
            continue
        parts = []
        for name in names:
            rest = set(names) - {name}
            full = bool(rest) and not any(rest <= other for other in earlier)
            if indicators_due and variables[name].kind == "category":
                full, indicators_due = True, False
            parts.append(_coded_columns(variables[name], full))
        earlier.append(set(names))
        # R lets the first variable's columns vary fastest.
        out += [_interaction(combination[::-1]) for combination in product(*reversed(parts))]
    return tuple(out)


def _interaction(factors: Sequence[DesignColumn]) -> DesignColumn:
    combination: dict[Monomial, float] = {(): 1.0}
    for factor in factors:
        combination = {
            tuple(sorted(left + right)): a * b for left, a in combination.items() for right, b in factor.combination
        }
    return DesignColumn(":".join(factor.name for factor in factors), tuple(combination.items()))


def _coded_columns(variable: Variable, full: bool) -> list[DesignColumn]:
    """The columns that one variable brings to a term."""
    if variable.kind == "numeric":
        return [
            DesignColumn(variable.label + suffix, (((Atom(variable.label, str(k + 1)),), 1.0),))
            for k, suffix in enumerate(variable.suffixes)
        ]
    labels = [level_label(level) for level in variable.levels]
    size = len(labels)
    if full:
        names, rows = labels, [[float(i == j) for i in range(size)] for j in range(size)]
    else:
        names, rows = _contrast(variable, labels)
    atoms = [(Atom(variable.label, text),) for text in labels]
    return [
        DesignColumn(variable.label + name, tuple((atom, weight) for atom, weight in zip(atoms, row, strict=True) if weight))
        for name, row in zip(names, rows, strict=True)
    ]


def _contrast(variable: Variable, labels: Sequence[str]) -> tuple[list[str], list[list[float]]]:
    """R's contrast matrix, one row of level weights a column, and the columns' names."""
    size = len(labels)
    column = next(iter(expr.columns(variable.expression)), None)
    if not size:
        raise DataError(f"none of the rows can be used: {variable.label} has no level among them", code="no_rows", column=column)
    if size < 2:
        raise DataError(f"{variable.label} has fewer than two levels among the rows used", hint="leave it out", column=column)
    numbers = [str(k) for k in range(1, size)]
    if variable.contrast == "treatment":
        kept = [text for text in labels if text != (labels[0] if variable.ref is None else variable.ref)]
        return kept, [[float(text == name) for text in labels] for name in kept]
    if variable.contrast == "sum":
        return numbers, [[float(i == k) if i < size - 1 else -1.0 for i in range(size)] for k in range(size - 1)]
    if variable.contrast == "helmert":
        return numbers, [[-1.0 if i < k else float(k) if i == k else 0.0 for i in range(size)] for k in range(1, size)]
    if size > MAX_POLY_LEVELS:
        raise DataError(f"{variable.label} has {size} levels, too many for polynomial contrasts (at most {MAX_POLY_LEVELS})")
    return [{1: ".L", 2: ".Q", 3: ".C"}.get(k, f"^{k}") for k in range(1, size)], _orthogonal_polynomials(size)


def _orthogonal_polynomials(size: int) -> list[list[float]]:
    """R's contr.poly: orthonormal polynomials of degree 1 ... size - 1 over equally spaced scores."""
    scores = [k - (size - 1) / 2 for k in range(size)]
    rows = [[1 / math.sqrt(size)] * size]
    for _ in range(1, size):
        row = [score * value for score, value in zip(scores, rows[-1], strict=True)]
        # Twice is enough: orthogonal to rounding error at any degree.
        for previous in rows * 2:
            along = math.fsum(a * b for a, b in zip(row, previous, strict=True))
            row = [a - along * b for a, b in zip(row, previous, strict=True)]
        norm = math.hypot(*row)
        rows.append([value / norm for value in row])
    return rows[1:]
