"""Expressions and design columns evaluated with numpy: the oracle that SQL and the engines are compared with."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlpipe import expr
from mlpipe.basis import Basis, Summary, chebyshev_terms
from mlpipe.design import Atom, DesignColumn, Variable, level_label, variables_of, with_constants, with_levels
from mlpipe.expr import Binary, Call, Case, Column, Node, Unary
from mlpipe.formula import Formula

Data = Mapping[str, np.ndarray]

OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "^": np.power, "%%": np.mod, "%/%": np.floor_divide,
    "==": np.equal, "!=": np.not_equal, "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal,
    "&": np.logical_and, "|": np.logical_or,
}  # fmt: skip
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "log": lambda x, base=np.e: np.log(x) / np.log(base), "log2": np.log2, "log10": np.log10, "log1p": np.log1p,
    "exp": np.exp, "expm1": np.expm1, "sqrt": np.sqrt, "abs": np.abs, "I": lambda x: x,
}  # fmt: skip


def evaluate(node: Node, data: Data) -> Any:
    """The values of an expression: an array, or a scalar for a constant."""
    match node:
        case Column(name=name):
            return data[name]
        case expr.Number(value=value) | expr.Text(value=value) | expr.Logical(value=value):
            return value
        case Unary(op=op, operand=operand):
            value = evaluate(operand, data)
            return np.logical_not(value) if op == "!" else _numeric(value) * (-1 if op == "-" else 1)
        case Binary(op=op, left=left, right=right):
            sides = evaluate(left, data), evaluate(right, data)
            return OPERATORS[op](*(map(_numeric, sides) if op in expr.ARITHMETIC else sides))
        case Call(function=function, args=args):
            return FUNCTIONS[function](*(evaluate(argument, data) for argument in args))
        case Case(branches=branches, default=default):
            tests = [np.asarray(evaluate(test, data)) for test, _ in branches]
            values = [np.broadcast_to(evaluate(value, data), tests[0].shape) for _, value in branches]
            return np.select(tests, values, evaluate(default, data))
    raise TypeError(node)


def _numeric(value: Any) -> Any:
    return np.asarray(value, dtype=float)


def atom(key: Atom, variables: Mapping[str, Variable], data: Data) -> np.ndarray:
    """A numeric column or an indicator, as floats."""
    variable = variables[key.variable]
    if variable.kind == "numeric":
        return np.asarray(evaluate(variable.columns[int(key.part) - 1], data), dtype=float)
    values = evaluate(variable.expression, data)
    return np.array([level_label(value) == key.part for value in values.tolist()], dtype=float)


def matrix(columns: Sequence[DesignColumn], variables: Mapping[str, Variable], data: Data) -> np.ndarray:
    """The design matrix, rows x columns."""
    out = np.zeros((len(next(iter(data.values()))), len(columns)))
    for j, column in enumerate(columns):
        for monomial, weight in column.combination:
            out[:, j] += weight * np.prod([np.ones(len(out)), *(atom(key, variables, data) for key in monomial)], axis=0)
    return out


def summarize(basis: Basis, data: Data) -> Summary:
    """What a basis asks of its argument."""
    x = np.broadcast_to(np.asarray(evaluate(basis.argument, data), dtype=float), len(next(iter(data.values()))))
    requests, low, high = basis.requests, float(x.min()), float(x.max())
    terms = chebyshev_terms(basis.argument, low, high, requests.chebyshev) if requests.chebyshev else ()
    sums = tuple(float(np.sum(np.broadcast_to(evaluate(term, data), x.shape))) for term in terms)
    quantiles = tuple(float(value) for value in np.quantile(x, requests.quantiles)) if requests.quantiles else ()
    sd = float(x.std(ddof=1)) if len(x) > 1 else float("nan")
    return Summary(len(x), float(x.mean()), sd, low, high, sums, quantiles)


def kinds_of(data: Data) -> dict[str, str]:
    """Each column's kind, from its dtype."""
    return {name: {"b": "logical", "U": "text", "O": "text"}.get(values.dtype.kind, "number") for name, values in data.items()}


def settle(
    formula: Formula, data: Data, levels: Mapping[str, Sequence[Any]] | None = None, contrasts: Mapping[str, str] | None = None
) -> dict[str, Variable]:
    """All variables with their levels (the given ones of a column, else sorted) and the constants of their bases."""
    out = {}
    for variable in variables_of(formula, kinds_of(data), contrasts):
        if variable.kind == "category":
            column = expr.columns(variable.expression)[0]
            given = (levels or {}).get(column) if isinstance(variable.expression, Column) else None
            variable = with_levels(variable, given or sorted(set(evaluate(variable.expression, data).tolist())))
        elif variable.basis is not None:
            variable = with_constants(variable, variable.basis.constants(summarize(variable.basis, data)))
        out[variable.label] = variable
    return out
