"""Means by the linear predictor as portable SQL: inverse links, and their means over normal random effects.

Only + - * /, CASE, exp, sqrt, abs and, for cauchit, atan: no engine's erf. Values stay in the range of doubles, as Postgres refuses an
underflow.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
from sqlglot import exp

from .errors import ConfigError
from .marginal import REACH, trapezoid
from .solve.link import LARGEST, LINKS
from .sql import Expression, case, minus, number, plus, ratio, summed, times

ETA, VARIANCE = "mlpipe_eta", "mlpipe_variance"
_X, _Z, _TAIL, _SD, _SCALED, _UNIT = (f"mlpipe_{name}" for name in ("x", "z", "tail", "sd", "scaled", "unit"))
HELD = 500.0  # |eta| up to which exp(eta) times a node's factor is finite
WIDE = 2.0  # spread from which a mean is split into a step's and the rest's
NARROW_STEP = {"logit": 0.3, "cloglog": 0.15}  # of the trapezoidal rule up to that spread: error 1e-13
WIDE_STEP = {"logit": 0.12, "cloglog": 0.08}  # of the double exponential one beyond it: 1e-13, 1e-14
LOWEST, HIGHEST = -3.6, 3.7  # its range

# Rational approximations of erf and erfc to 1e-16, highest power first (Cody 1969, Math. Comp. 23: 631-637; x <= 0.46875, <= 4, beyond).
_ERF = (
    (1.85777706184603153e-1, 3.16112374387056560, 1.13864154151050156e2, 3.77485237685302021e2, 3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3),
)
_ERFC = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594, 6.61191906371416295e1, 2.98635138197400131e2,
     8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3, 3.29079923573345963e3,
     4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
)  # fmt: skip
_FAR = (
    (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1, 1.60837851487422766e-2,
     6.58749161529837803e-4),
    (1.0, 2.56852019228982242, 1.87295284992346725, 5.27905102951428412e-1, 6.05183413124413191e-2, 2.33520497626869185e-3),
)  # fmt: skip

Stage = dict[str, Expression]


class Mean(NamedTuple):
    """`stages`: columns to compute first, each stage from those before it; `value`: the mean from all of them, anything where ETA is
    NULL."""

    stages: tuple[Stage, ...]
    value: Expression


def mean(link: str) -> Mean:
    """The mean at the linear predictor, which is finite or NULL."""
    eta = exp.column(ETA)
    if link == "logit":
        return Mean(({_X: _held(eta, HELD)},), _logistic(exp.column(_X)))
    if link == "probit":
        return _normal(eta)
    if link == "cloglog":
        return Mean(({_X: exp.Exp(this=_held(eta, LARGEST))},), _complement(exp.column(_X)))
    if link == "log":
        return Mean((), exp.Exp(this=_held(eta, LARGEST)))
    return Mean((), _plain(link, eta))


def marginal_mean(link: str, variance: float | None) -> Mean:
    """The mean over normal random effects of this variance, or of that in the column VARIANCE, as `marginal.mean`.

    Raises ConfigError for links whose mean has no formula where the variance changes from row to row.
    """
    eta = exp.column(ETA)
    held = exp.column(VARIANCE) if variance is None else number(variance)
    if link == "identity":
        return Mean((), eta)
    if link == "log":
        shifted = plus(eta, times(number(0.5), held))
        return Mean(({_X: shifted},), exp.Exp(this=_held(exp.column(_X), LARGEST)))
    if link == "probit":
        return _normal(ratio(eta, exp.Sqrt(this=plus(number(1), held))))
    if link not in NARROW_STEP:
        return _constant(link, variance)
    if variance is None:
        return _varying(link)
    return _narrow(link, math.sqrt(variance)) if variance <= WIDE**2 else _wide(link, number(math.sqrt(variance)))


def _plain(link: str, eta: Expression) -> Expression:
    """The means of links that need no column of their own."""
    one, zero = number(1), number(0)
    match link:
        case "identity":
            return eta
        case "inverse":
            return ratio(one, exp.Nullif(this=eta, expression=zero))
        case "sqrt":
            return case([(_above(eta, 0.0), times(eta.copy(), eta.copy()))], None)
        case "1/mu^2":
            return case([(_above(eta, 0.0), ratio(one, exp.Sqrt(this=eta.copy())))], None)
        case "cauchit":
            near = plus(number(0.5), ratio(exp.Atan(this=eta), number(math.pi)))
            far = ratio(exp.Atan(this=ratio(number(-1), eta.copy())), number(math.pi))  # of the lower tail, without cancellation
            return case([(exp.LT(this=_operand(eta.copy()), expression=number(-1)), far)], near)
    raise ConfigError(f"the link {link!r} has no SQL", code="link")


def _constant(link: str, variance: float | None) -> Mean:
    """By the nodes of `marginal.mean`, written out."""
    if variance is None:
        message = f"with random slopes the marginal mean of the link {link!r} is not available as SQL"
        raise ConfigError(message, code="no_marginal_sql", hint='use fit.predict, or effects="population"')
    sd, eta = math.sqrt(variance), exp.column(ETA)
    nodes = zip(*trapezoid(link, sd), strict=True)
    value = summed([times(number(weight), _plain(link, plus(eta.copy(), number(sd * node)))) for node, weight in nodes])
    return Mean((), case([(_above(exp.Abs(this=eta.copy()), REACH * sd), value)], None) if link == "inverse" else value)


def _narrow(link: str, sd: float) -> Mean:
    """The same for a constant spread: the exponential of the linear predictor is computed once, a node's is a constant factor of it."""
    x, terms = exp.column(_X), []
    sign = -1.0 if link == "logit" else 1.0
    for node, weight in zip(*trapezoid(link, sd), strict=True):
        terms.append(times(number(weight), _at_factor(link, x, math.exp(sign * sd * node))))
    held = _held(exp.column(ETA), HELD if link == "logit" else LARGEST)
    return Mean(({_X: exp.Exp(this=exp.Neg(this=_operand(held)) if link == "logit" else held)},), summed(terms))


def _at_factor(link: str, x: Expression, factor: float) -> Expression:
    scaled = times(number(factor), x.copy())
    if link == "logit":
        return ratio(number(1), plus(number(1), scaled))
    below = exp.LT(this=x.copy(), expression=number(HELD / factor))
    return case([(below, minus(number(1), exp.Exp(this=exp.Neg(this=_operand(scaled)))))], number(1))


def _varying(link: str) -> Mean:
    """For a spread that changes from row to row: by its size in one of two ways."""
    sd, eta = exp.column(_SD), exp.column(_X)
    terms = []
    x = NARROW_STEP[link] * np.arange(-round(REACH / NARROW_STEP[link]), round(REACH / NARROW_STEP[link]) + 1)
    w = np.exp(-0.5 * x * x)
    for node, weight in zip(x, w / w.sum(), strict=True):
        at = plus(eta.copy(), times(number(node), sd.copy()))
        value = _logistic(at) if link == "logit" else _falling(at)
        terms.append(times(number(weight), value))
    wide = _wide(link, sd)
    first = {_SD: exp.Sqrt(this=exp.column(VARIANCE)), _X: _held(exp.column(ETA), HELD if link == "logit" else LARGEST)}
    total = case([(exp.LTE(this=sd.copy(), expression=number(WIDE)), summed(terms))], wide.value)
    return Mean((first, *wide.stages), total)


def _falling(eta: Expression) -> Expression:
    """1 - exp(-exp(eta)), 1 from where exp(eta) is HELD."""
    inner = minus(number(1), exp.Exp(this=exp.Neg(this=exp.Exp(this=eta.copy()))))
    return case([(exp.LT(this=_operand(eta.copy()), expression=number(math.log(HELD))), inner)], number(1))


def _wide(link: str, sd: Expression) -> Mean:
    """E g⁻¹(eta + e) = Φ(eta / sd), the mean of a unit step at 0, and that of the rest, which falls exponentially on both sides: an
    integral over the half-line by the double exponential rule t = exp(u - exp(-u)) (Takahasi and Mori 1974, section 4)."""
    scaled, unit = exp.column(_SCALED), exp.column(_UNIT)
    # where a spread is 0 the other way is taken, and nothing here may divide by it
    held = case([(exp.GT(this=sd.copy(), expression=number(1)), sd.copy())], number(1)) if isinstance(sd, exp.Column) else sd
    normal = _normal(scaled)
    step, terms = WIDE_STEP[link], []
    for u in step * np.arange(round(LOWEST / step), round(HIGHEST / step) + 1):
        t = math.exp(u - math.exp(-u))
        weight = step * t * (1.0 + math.exp(-u)) / math.sqrt(2.0 * math.pi)
        left, right = LINKS[link].means(np.array([-t])), LINKS[link].means(np.array([t]))
        for value, sign in ((weight * float(left.mu[0]), 1.0), (-weight * float(right.nu[0]), -1.0)):
            if abs(value) > 1e-19:
                terms.append(times(number(value), _density(plus(scaled.copy(), times(number(sign * t), unit.copy())))))
    first = {_SCALED: ratio(exp.column(ETA), held), _UNIT: ratio(number(1), held.copy())}
    return Mean((first, *normal.stages), plus(normal.value, times(unit.copy(), exp.Paren(this=summed(terms)))))


def _density(x: Expression) -> Expression:
    """exp(-x²/2), 0 where it would underflow."""
    half = exp.Exp(this=times(number(-0.5), times(x, x.copy())))
    return case([(exp.LT(this=exp.Abs(this=x.copy()), expression=number(37)), half)], number(0))


def _normal(x: Expression) -> Mean:
    """Φ(x), by erfc(|x| / √2) / 2, the smaller tail."""
    z, tail = exp.column(_Z), exp.column(_TAIL)
    square, inverse = times(z, z.copy()), ratio(number(1), times(z.copy(), z.copy()))
    bell = exp.Exp(this=exp.Neg(this=_operand(square)))
    center = minus(number(0.5), times(times(number(0.5), z.copy()), _rational(_ERF, square)))
    middle = times(times(number(0.5), bell), _rational(_ERFC, z))
    series = minus(number(1.0 / math.sqrt(math.pi)), times(inverse, _rational(_FAR, inverse)))
    far = times(ratio(times(number(0.5), bell.copy()), z.copy()), series)
    branches = [(_up_to(z, 0.46875), center), (_up_to(z, 4.0), middle), (_up_to(z, 26.0), far)]
    stages = ({_Z: times(exp.Abs(this=x), number(math.sqrt(0.5)))}, {_TAIL: case(branches, number(0))})
    below = exp.LT(this=_operand(x.copy()), expression=number(0))
    return Mean(stages, case([(below, tail)], minus(number(1), tail.copy())))


def _up_to(x: Expression, bound: float) -> Expression:
    return exp.LTE(this=x.copy(), expression=number(bound))


def _rational(coefficients: tuple[Sequence[float], Sequence[float]], x: Expression) -> Expression:
    return ratio(*(_horner(side, x) for side in coefficients))


def _horner(coefficients: Sequence[float], x: Expression) -> Expression:
    return reduce(lambda value, c: plus(times(value, x.copy()), number(c)), coefficients[1:], number(coefficients[0]))


def _logistic(eta: Expression) -> Expression:
    return ratio(number(1), plus(number(1), exp.Exp(this=exp.Neg(this=_operand(eta)))))


def _complement(x: Expression) -> Expression:
    """1 - exp(-x) for x > 0, near 0 by its series."""
    series: Expression = number(1)
    for k in (5, 4, 3, 2):
        series = minus(number(1), times(ratio(x.copy(), number(k)), series))
    fall = minus(number(1), exp.Exp(this=exp.Neg(this=x.copy())))
    small = exp.LT(this=x.copy(), expression=number(1e-3))
    middle = exp.LT(this=x.copy(), expression=number(HELD))
    return case([(small, times(x.copy(), series)), (middle, fall)], number(1))


def _held(eta: Expression, bound: float) -> Expression:
    """eta, at most `bound` from 0."""
    low = (exp.LT(this=_operand(eta.copy()), expression=number(-bound)), number(-bound))
    return case([low, (_above(eta, bound), number(bound))], eta.copy())


def _above(x: Expression, bound: float) -> Expression:
    return exp.GT(this=_operand(x.copy()), expression=number(bound))


def _operand(node: Expression) -> Expression:
    return exp.Paren(this=node) if isinstance(node, exp.Binary | exp.Case) and not isinstance(node, exp.Paren) else node
