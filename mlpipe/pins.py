"""The quantities of a model that can be profiled, as pins over the solver's parameters φ = (θ, e), with R's names."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .reduction import Random, lower_factor
from .solve.profile import Pin

Array = np.ndarray
REACH = 16.0  # of a parameter's logarithm, from which it is as good as 0 or infinite
SMALL = 0.05  # of a typical standard deviation, from which a search leaves a variance of zero


@dataclass(frozen=True)
class Parametrisation:
    """How φ is laid out: `random` terms in the solver's order, their `labels` (the groups' names), the estimate `phi` with its covariance
    (NaN on the boundary); what `e` is: one log σ, to which Λ is relative, if `relative`, else (β*, τ…). `scale`: of the response; `size`:
    of an element of Λ that is neither small nor large, which falls with the root of the rows' weights."""

    random: tuple[Random, ...]
    phi: Array
    covariance: Array
    relative: bool
    scale: float = 1.0
    size: float = 1.0

    @property
    def sizes(self) -> list[int]:
        """Free elements of Λ of each term."""
        return [len(term.names) * (len(term.names) + 1) // 2 for term in self.random]

    def spans(self) -> list[slice]:
        """Where each term's elements are in φ."""
        stops = np.cumsum([0, *self.sizes]).tolist()
        return [slice(a, b) for a, b in zip(stops[:-1], stops[1:], strict=True)]

    @property
    def d(self) -> int:
        """Free elements of Λ in all."""
        return sum(self.sizes)

    def curvature(self) -> Array:
        """The Hessian of -2ℓ by φ; on the boundary, one that makes SMALL a step."""
        out = np.diag(np.append(np.full(self.d, 2.0 / (SMALL * self.size) ** 2), np.full(len(self.phi) - self.d, 2.0 / SMALL**2)))
        inside = np.flatnonzero(np.isfinite(np.diag(self.covariance)))
        if len(inside):
            values, vectors = np.linalg.eigh(self.covariance[np.ix_(inside, inside)])
            out[np.ix_(inside, inside)] = 2.0 * (vectors / np.maximum(values, 1e-12 * values.max())) @ vectors.T
        return out

    def moved(self) -> Array:
        """φ with variances of zero a little above it, where a search can start."""
        out, small = self.phi.copy(), SMALL * self.size
        for term, span in zip(self.random, self.spans(), strict=True):
            star = _lower(out[span], len(term.names))
            diagonal = np.diag(star)
            star[np.diag_indices(len(star))] = np.where(np.abs(diagonal) < 1e-3 * small, small, diagonal)
            out[span] = _elements(star)
        return out

    def _raw(self, k: int) -> Array:
        """The covariance of term k in the user's coordinates."""
        term = self.random[k]
        half = np.linalg.solve(term.R, _lower(self.phi[self.spans()[k]], len(term.names))) * self._unit(self.phi)
        return half @ half.T

    def _unit(self, phi: Array) -> float:
        return self.scale * (math.exp(phi[-1]) if self.relative else 1.0)

    # -- pins ----------------------------------------------------------------------------------------------------------

    def whole(self, condition: Array, estimate: float, error: float) -> Pin:
        """A combination c'β of coefficients that the surface eliminates."""
        return Pin(lambda x, v: x, self.moved(), estimate, error, condition=condition, unit=error)

    def coefficient(self, c: Array, estimate: float, error: float) -> Pin:
        """A combination c'β* of coefficients that are part of e."""
        p, d, phi = len(c), self.d, self.moved()
        basis = np.linalg.qr(np.column_stack([c, np.eye(p)]))[0][:, 1:p] if p > 1 else np.zeros((1, 0))
        along = c / float(c @ c)
        start = np.concatenate([phi[:d], basis.T @ phi[d : d + p], phi[d + p :]])

        def expand(x: Array, v: float) -> Array:
            return np.concatenate([x[:d], basis @ x[d : d + p - 1] + along * v, x[d + p - 1 :]])

        return Pin(expand, start, estimate, error, unit=error)

    def element(self, at: int, value: Callable[[float], float], inverse: Callable[[float], float], error: float) -> Pin:
        """A positive function of one element of e, `value` and its `inverse`."""
        phi = self.moved()

        def expand(x: Array, v: float) -> Array:
            return np.insert(x, at, inverse(v))

        estimate = value(self.phi[at])
        return Pin(expand, np.delete(phi, at), estimate, error, least=0.0, closed=False, unit=estimate)

    def logarithm(self, at: int, error: float) -> Pin:
        """An element of e that is the logarithm of a parameter, within REACH of its estimate."""
        phi, estimate = self.moved(), float(self.phi[at])
        return Pin(lambda x, v: np.insert(x, at, v), np.delete(phi, at), estimate, error, estimate - REACH, estimate + REACH)

    def sd(self, k: int, i: int) -> Pin:
        """The standard deviation of coefficient i of term k: it comes first in T, whose first element it then is."""
        q = len(self.random[k].names)
        typical = float(np.linalg.norm(np.linalg.inv(self.random[k].R)[i])) * self._unit(self.phi) * self.size
        pin = self._of_term(k, [i, *(j for j in range(q) if j != i)], _sd_rows, math.sqrt(self._raw(k)[i, i]), 0.0, math.inf)
        return replace(pin, unit=typical)

    def cor(self, k: int, i: int, j: int) -> Pin:
        """The correlation of coefficients i and j of term k: they come first in T."""
        q, raw = len(self.random[k].names), self._raw(k)
        size = math.sqrt(raw[i, i] * raw[j, j])
        estimate = float(np.clip(raw[i, j] / size, -1.0, 1.0)) if size > 0.0 else 0.0
        return self._of_term(k, [j, i, *(h for h in range(q) if h not in (i, j))], _cor_rows, estimate, -1.0, 1.0)

    def _of_term(
        self, k: int, order: Sequence[int], rows: Callable[[Array, float, int], Array], estimate: float, least: float, most: float
    ) -> Pin:
        """A pin of term k by T, PΨP' = TT' in the user's coordinates and units, P putting coefficients in `order`; `rows` makes T."""
        term, span, phi, q = self.random[k], self.spans()[k], self.moved(), len(self.random[k].names)
        place = np.eye(q)[list(order)].T  # P'
        B = term.R @ place
        half = place.T @ np.linalg.solve(term.R, _lower(phi[span], q)) * self._unit(phi)
        T = lower_factor(half)
        size = np.sqrt((T**2).sum(axis=1))
        entries = _elements(T / size[:, None])
        rest = np.concatenate([phi[: span.start], phi[span.stop :]])
        kept = len(entries) - 1
        start = np.concatenate([_without(entries, rows), rest])
        scaled = np.where(size > 0.0, size, 1.0)

        def expand(x: Array, v: float) -> Array:
            others = x[kept:]
            unit = self.scale * (math.exp(others[-1]) if self.relative else 1.0)
            made = rows(x[:kept], v / scaled[0] if rows is _sd_rows else v, q) * scaled[:, None]
            star = lower_factor(B @ made / unit)
            return np.concatenate([others[: span.start], _elements(star), others[span.start :]])

        return Pin(expand, start, estimate, self._error(k, order, rows), least, most)

    def _error(self, k: int, order: Sequence[int], rows: Callable[[Array, float, int], Array]) -> float:
        """The standard error by the delta method."""
        span, q = self.spans()[k], len(self.random[k].names)
        index = np.r_[np.arange(span.start, span.stop), [len(self.phi) - 1] if self.relative else []].astype(np.intp)

        def value(x: Array) -> float:
            unit = self.scale * (math.exp(x[-1]) if self.relative else 1.0)
            half = np.linalg.solve(self.random[k].R, _lower(x[: span.stop - span.start], q)) * unit
            raw, (a, b) = half @ half.T, (order[0], order[1] if q > 1 else order[0])
            return math.sqrt(raw[a, a]) if rows is _sd_rows else float(raw[a, b] / math.sqrt(raw[a, a] * raw[b, b]))

        at, gradient = self.phi[index], []
        try:
            for n in range(len(at)):
                step = np.zeros(len(at))
                step[n] = 1e-6 * max(abs(at[n]), 1e-2 * (self.size if n < span.stop - span.start else 1.0))
                gradient.append((value(at + step) - value(at - step)) / (2 * step[n]))
            g = np.array(gradient)
            return math.sqrt(float(g @ self.covariance[np.ix_(index, index)] @ g))
        except (ValueError, ZeroDivisionError):
            return math.nan


def _lower(values: Array, q: int) -> Array:
    out = np.zeros((q, q))
    out.T[np.triu_indices(q)] = values
    return out


def _elements(lower: Array) -> Array:
    return lower.T[np.triu_indices(len(lower))]


def _without(entries: Array, rows: Callable[[Array, float, int], Array]) -> Array:
    """The free numbers at the estimate: T's elements by columns without the first; for a correlation the two rows' sizes, then the rest."""
    if rows is _sd_rows:
        return entries[1:]
    q = (math.isqrt(8 * len(entries) + 1) - 1) // 2
    T = _lower(entries, q)
    sizes = [math.hypot(*T[0]), math.hypot(*T[1])]
    return np.array([*sizes, *(T[i, j] for j in range(q) for i in range(max(j, 2), q))])


def _sd_rows(x: Array, v: float, q: int) -> Array:
    """T with first element v."""
    return _lower(np.concatenate([[v], x]), q)


def _cor_rows(x: Array, v: float, q: int) -> Array:
    """T whose first two rows have sizes x[0], x[1] and correlation v."""
    T = np.zeros((q, q))
    T[0, 0] = x[0]
    T[1, 0], T[1, 1] = v * x[1], math.sqrt(max(1.0 - v * v, 0.0)) * x[1]
    places = [(i, j) for j in range(q) for i in range(max(j, 2), q)]
    for (i, j), value in zip(places, x[2:], strict=True):
        T[i, j] = value
    return T
