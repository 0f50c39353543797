"""Profile likelihood: -2ℓ with one quantity pinned, minimized over the rest, and the limits where its signed root is a normal quantile
(Bates et al. 2015, section 5.1; Venzon and Moolgavkar 1988).
"""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mlpipe.errors import ConvergenceError

from .blocks import Array
from .pinned import Pin
from .surfaces import Linear, Surface

DECREMENT = 1e-7  # of -2ℓ that Newton's step still promises, at which a pinned minimum is found
CLOSE = 2e-4  # of the signed root from its quantile, at which a limit is found: 1e-4 of half the interval
BETTER = 1e-3  # by which a pinned -2ℓ may not fall below the least one
MOST_STEPS, MOST_POINTS, MOST_ESCAPES = 200, 60, 10
MOST_HALVINGS = 30
PROBE = 1e-2  # of a covariance's free number, in units of what a level tells, by which it is moved to see what a zero gradient hides
CURVED = 1.0  # the least curvature of -2ℓ by such a number that is believed


class _Point(NamedTuple):
    """x, -2ℓ, derivatives by x and by v."""

    x: Array
    value: float
    gradient: Array
    slope: float


class Profile:
    """The profile of one pin over a surface; `curvature` (φ, φ) is the Hessian of -2ℓ at the estimate.

    `first`: the inverse Hessian by x there; `tangent`: how x follows v, and `error`, v's standard error, by the curvature unless the pin
    knows its error: then x does not follow at first.
    """

    def __init__(self, surface: Surface, pin: Pin, curvature: Array, least: float) -> None:
        self.surface, self.pin, self.least = surface, pin, least
        J, by_v = pin.jacobian()
        H, cross = J.T @ curvature @ J, J.T @ curvature @ by_v
        self.first = self.inverse = _inverse(H, pin.inside)
        if math.isfinite(pin.error):
            self.tangent, self.error = np.zeros(len(H)), pin.error
        else:
            self.tangent = -self.first @ cross
            bent = float(by_v @ curvature @ by_v + cross @ self.tangent)
            self.error = math.sqrt(2.0 / bent) if bent > 0.0 else max(abs(pin.estimate), 0.1 * pin.unit)
        self.known = {pin.estimate: _Point(pin.start, least, np.zeros(len(H)), 0.0)}

    def _at(self, x: Array, v: float) -> _Point:
        pin = self.pin
        condition = None if pin.condition is None else Linear(pin.condition, v)
        try:
            look = self.surface.look(pin.expand(x, v), condition)
        except OverflowError:  # far out
            return _Point(x, math.inf, np.zeros(len(x)), 0.0)
        by_x, by_v = pin.pull(x, v, look.gradient)
        return _Point(x, look.value, by_x, look.slope if condition is not None else by_v)

    def minimum(self, v: float) -> _Point:
        """The least -2ℓ at v, from what is known nearby. Raises ConvergenceError."""
        return self._found(self._begun(v), v)

    def _found(self, at: _Point, v: float) -> _Point:
        """The least -2ℓ at v that is known once there is one from here."""
        H = self.inverse
        for _ in range(MOST_ESCAPES):
            at, H = self._descended(at, H, v)
            lower = self._escaped(at, v)
            if lower is None:
                break
            at, H = lower, self.first
        if v not in self.known or at.value < self.known[v].value:
            self.known[v] = at
        self.inverse = H
        return self.known[v]

    def _begun(self, v: float) -> _Point:
        """Where the path from the estimate through the last points before v leads, or the last of them."""
        inner = [known for known in self.known if _between(self.pin.estimate, known, v) and known != v]
        near, *others = sorted(inner, key=lambda known: abs(known - v))[:2]
        x, path, reach = self.known[near].x, self.tangent, self.error
        if others:
            path, reach = (x - self.known[others[0]].x) / (near - others[0]), abs(near - others[0])
        ahead = self._at(x + path * float(np.clip(v - near, -2.0 * reach, 2.0 * reach)), v)
        at = ahead if math.isfinite(ahead.value) else self._at(x, v)
        if not math.isfinite(at.value):
            raise ConvergenceError(f"the likelihood is not finite at the profiled value {v:g}")
        return at

    def _descended(self, at: _Point, H: Array, v: float) -> tuple[_Point, Array]:
        """The minimum that BFGS finds from a point, and the inverse Hessian there. Raises ConvergenceError."""
        for _ in range(MOST_STEPS):
            step = -H @ at.gradient
            promise = float(-at.gradient @ step)
            if promise < DECREMENT:
                return at, H
            new = self._line(at, step, v, promise)
            if new is None:
                if promise < 1e3 * DECREMENT:  # at the limit of rounding
                    return at, self.first
                if H is self.first:
                    break
                H = self.first
                continue
            H = _updated(H, new.x - at.x, new.gradient - at.gradient)
            at = new
        raise ConvergenceError(f"the profile did not converge at the value {v:g}")

    def _line(self, at: _Point, step: Array, v: float, promise: float) -> _Point | None:
        length = 1.0
        for _ in range(MOST_HALVINGS):
            new = self._at(at.x + length * step, v)
            if new.value <= at.value - 1e-4 * length * promise or (promise < 1e-5 and new.value <= at.value + 1e-9 * abs(at.value)):
                return new
            length *= 0.4
        return None

    def _escaped(self, at: _Point, v: float) -> _Point | None:
        """A lower point in a direction that a gradient of zero hides, None where there is none."""
        hidden = self.pin.hidden(at.x)
        if not len(hidden):
            return None
        H = np.array([self._at(at.x + PROBE * one, v).gradient for one in hidden]) @ hidden.T / PROBE
        values, vectors = np.linalg.eigh((H + H.T) / 2.0)
        if not values[0] < 0.0:
            return None
        lower = self._at(at.x + PROBE * (vectors[:, 0] @ hidden), v)
        return lower if lower.value < at.value - DECREMENT else None

    def _elsewhere(self, v: float) -> bool:
        """Whether a singular covariance with its correlations turned leads to a clearly lower minimum at v; it is known then."""
        before = self.known[v]
        x = self.pin.mirrored(before.x)
        return x is not None and self._found(self._at(x, v), v).value < before.value - CLOSE

    def root(self, v: float) -> tuple[float, float]:
        """The signed root ζ of the excess of -2ℓ at v, and dζ/dv."""
        at = self.minimum(v)
        excess = at.value - self.least
        if excess < -BETTER:
            raise ConvergenceError(
                f"profiling found a better fit (by {-excess / 2:.3g} in the log-likelihood)", hint="fit again from other values of start="
            )
        zeta = math.sqrt(max(excess, 0.0))
        sign = math.copysign(1.0, v - self.pin.estimate)
        return sign * zeta, sign * at.slope / (2.0 * zeta) if zeta > 0.0 else 0.0

    def limit(self, z: float, upper: bool) -> float:
        """The value at which ζ is z (or -z); the end of the domain where it stays below. Raises ConvergenceError."""
        pin, sign = self.pin, 1.0 if upper else -1.0
        end = pin.most if upper else pin.least
        if pin.estimate == end:
            return end
        bracket, v = _Bracket(pin.estimate, end, sign, self.error, pin.closed), pin.estimate + sign * z * self.error
        v = bracket.inside(v)
        for _ in range(MOST_POINTS):
            zeta, slope = self.root(v)
            short = z - sign * zeta
            if abs(short) < CLOSE and self._elsewhere(v):
                bracket.outer = math.inf * sign
                continue
            if abs(short) < CLOSE or (v == end and short > 0.0):
                return v
            following = bracket.following(v, short, slope)
            if bracket.width < 1e-9 * max(pin.unit, abs(v)):
                if bracket.inner == pin.estimate:  # where it is 0 by definition: the minima so near to it are none
                    raise ConvergenceError(f"the profile did not converge at the value {v:g}")
                return v
            v = following
        raise ConvergenceError("no limit of the profile was found")


class _Bracket:
    """Where a limit is: from `inner`, at first the estimate, toward `end`, to `outer`, infinite while that is not known."""

    def __init__(self, start: float, end: float, sign: float, error: float, closed: bool) -> None:
        self.start, self.end, self.sign, self.error, self.closed = start, end, sign, error, closed
        self.inner, self.outer, self.short = start, math.inf * sign, 0.0
        self.again = set[float]()

    @property
    def width(self) -> float:
        """How far apart inner and outer are."""
        return abs(self.outer - self.inner)

    def following(self, v: float, short: float, slope: float) -> float:
        """The value to try after v, where ζ, of this slope, is `short` of its quantile.

        Newton's, between inner and outer, or the middle where it is slow. An outer point that Newton would pass was perhaps reached
        along a path to another minimum: it is tried again, from inside.
        """
        if short <= 0.0:
            self.outer = v
        else:
            self.inner, self.outer = v, math.inf * self.sign if v == self.outer else self.outer
        slow = short * self.short > 0.0 and abs(short) > 0.5 * abs(self.short)
        self.short = short
        ahead = v + self.sign * short / slope if slope > 0.0 else math.inf * self.sign
        if math.isinf(self.outer):
            return self.inside(self._outward(ahead))
        if short > 0.0 and (ahead - self.outer) * self.sign > 0.0 and (self.outer not in self.again or self._jumps):
            self.again.add(self.outer)
            return self.outer
        return ahead if _between(self.inner, ahead, self.outer) and ahead != v and not slow else 0.5 * (self.inner + self.outer)

    @property
    def _jumps(self) -> bool:
        """Whether ζ is too far from its quantile for a bracket as narrow as this."""
        return self.short > 50.0 * CLOSE and self.width < 1e-3 * abs(self.outer - self.start)

    def _outward(self, v: float) -> float:
        """v within a few standard errors of inner."""
        far = self.inner + self.sign * 4.0 * max(self.error, 0.1 * abs(self.inner))
        if not math.isfinite(v):
            return self.inner + self.sign * self.error
        return min(max(v, min(self.inner, far)), max(self.inner, far))

    def inside(self, v: float) -> float:
        """v, the end if v is beyond it, or half the way there where it is no model."""
        if (v - self.end) * self.sign < 0.0:
            return v
        return self.end if self.closed else 0.5 * (self.inner + self.end)


def _between(start: float, v: float, end: float) -> bool:
    """Whether v is not beyond the end, seen from the start."""
    return min(start, end) <= v <= max(start, end)


def _inverse(H: Array, inside: int) -> Array:
    """The inverse of a Hessian by x, made positive definite; the first `inside` numbers are a covariance's."""
    if not len(H):
        return H
    size = np.sqrt(np.maximum(np.diag(H), np.where(np.arange(len(H)) < inside, CURVED, 1e-300)))
    values, vectors = np.linalg.eigh(H / np.outer(size, size))
    return np.asarray((vectors / np.maximum(values, 1e-4)) @ vectors.T / np.outer(size, size))


def _updated(H: Array, s: Array, y: Array) -> Array:
    """BFGS's update of the inverse Hessian."""
    sy = float(s @ y)
    if sy <= 1e-10 * math.sqrt(float(s @ s) * float(y @ y)):
        return H
    Hy = H @ y
    return np.asarray(H + np.outer(s, s) * (1.0 + float(y @ Hy) / sy) / sy - (np.outer(Hy, s) + np.outer(s, Hy)) / sy)
