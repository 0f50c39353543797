"""The response of a generalized model as plain columns: successes, trials, offset."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

from . import expr
from .design import Level, Variable
from .errors import ConfigError, DataError, FormulaError
from .formula import Formula, parse_expression

TRIALS, OFFSET, TIME = "trials =~", "offset =~", "time =~"  # labels that no response can have


def response_label(label: str) -> str:
    """The variable label of a response, apart from covariates of the same name."""
    return f"{label} ~"


def outcome_variables(
    formula: Formula, kinds: Mapping[str, str], family: str, offset: str | None, trials: str | None, success: str | None,
    time: str | None = None, waves: Sequence[Level] = (),
) -> dict[str, Variable]:  # fmt: skip
    """The response (with trials: successes), trials, offset and time as numeric variables.

    `success`: the level of a two-level text response that is modelled; `waves`: the levels of a time that is text, in
    order. Raises FormulaError or DataError for a response that cannot be one.
    """
    node = formula.response
    if node is None:
        raise FormulaError("the formula has no response", hint="write it as response ~ terms")
    name, of = expr.label(node), None
    if isinstance(node, expr.Call) and node.function == "cbind":
        node, of = _counts(node, family, trials)
    elif expr.kind(node, kinds) == "text":
        node = _level(node, name, family, success)
    if trials is not None:
        if family != "binomial":
            raise ConfigError(f"trials belongs to family='binomial', not {family!r}")
        of = parse_expression(trials)
        node = expr.multiply(node, of)
    out = {response_label(name): _numeric(response_label(name), node)}
    if of is not None:
        out[TRIALS] = _numeric(TRIALS, of)
    offsets = [*formula.offsets, *([parse_expression(offset)] if offset else [])]
    if offsets:
        total = offsets[0]
        for more in offsets[1:]:
            total = expr.Binary("+", total, more)
        out[OFFSET] = _numeric(OFFSET, total)
    if time is not None:
        out[TIME] = _numeric(TIME, _time(parse_expression(time), waves))
    return out


def _time(node: expr.Node, waves: Sequence[Level]) -> expr.Node:
    """A time that is a number as it is, one that is text as its level's place from 0."""
    if not waves:
        return node
    branches = tuple((expr.Binary("==", node, expr.Text(str(wave))), expr.Number(float(i))) for i, wave in enumerate(waves))
    return expr.Case(branches, expr.Number(-1.0))


def _counts(node: expr.Call, family: str, trials: str | None) -> tuple[expr.Node, expr.Node]:
    if family != "binomial":
        raise FormulaError("cbind(successes, failures) is a response of family='binomial'", span=node.span)
    if len(node.args) != 2 or trials is not None:
        raise FormulaError("cbind takes successes and failures, and no trials beside it", span=node.span)
    successes, failures = node.args
    return successes, expr.Binary("+", successes, failures)


def _level(node: expr.Node, name: str, family: str, success: str | None) -> expr.Node:
    if family != "binomial" or success is None:
        hint = "it is read as text: are there values such as '1,5' or 'n/a' among numbers?"
        raise DataError(f"the response {name} is not numeric", code="response_type", column=next(iter(expr.columns(node)), None), hint=hint)
    return expr.Binary("==", node, expr.Text(success))


def _numeric(label: str, node: expr.Node) -> Variable:
    return Variable(label=label, kind="numeric", expression=node, columns=(node,), suffixes=("",))
