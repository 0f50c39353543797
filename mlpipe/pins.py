"""The quantities of a model that can be profiled, as pins over the solver's parameters φ (`solve.surfaces`), with R's names."""
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .reduction import Random
from .solve.boundary import metric_root
from .solve.pinned import Covariance, Pin
from .solve.several_factors import spans
from .solve.surfaces import Surface, curvature

Array = np.ndarray
REACH = 16.0  # of a parameter's logarithm, from which it is as good as 0 or infinite
STEP = 1e-3  # of a difference of gradients: of a factor in units of what a level tells, of e in standard errors


@dataclass(frozen=True)
class Parametrisation:
    """How φ is laid out on a `surface`: `random` terms in the solver's order, the factors' estimate `lambda_` (q, q); `e`: one log σ, to
    which Λ is relative, if `relative`, else (β*, τ…); `errors`: their standard errors, at most REACH of a logarithm that is not
    determined. `scale`: of the response."""

    surface: Surface
    random: tuple[Random, ...]
    lambda_: Array
    e: Array
    errors: Array
    relative: bool
    scale: float = 1.0

    @cached_property
    def units(self) -> list[Array]:
        """For each term the K (q, q) of `Covariance`."""
        return [np.linalg.inv(metric_root(self.surface.typical[at, at])).T for at in self._spans]

    @property
    def _spans(self) -> list[slice]:
        return spans(self.surface.sizes)

    def curvature(self) -> Array:
        """The Hessian of -2ℓ by φ at the estimate."""
        factors = [self.lambda_[at, at] for at in self._spans]
        steps = [np.repeat(STEP * np.linalg.norm(K, axis=1), len(K)) for K in self.units]
        phi = np.concatenate([*(F.ravel() for F in factors), self.e])
        H = curvature(self.surface, phi, np.concatenate([*steps, STEP * self.errors]))
        at = np.arange(len(phi) - len(self.e), len(phi))
        H[at, at] = np.maximum(H[at, at], 2.0 / self.errors**2)  # as it is where all is known; not so where -2ℓ has no digits
        return H

    def _pin(self, estimate: float, unit: float, **given: object) -> Pin:
        """A pin of nothing in the random part, and of nothing in e unless `given`."""
        n = len(self.e)
        whole = {"basis": np.eye(n), "along": np.zeros(n), "e_start": self.e, "terms": self._terms()}
        return Pin(**(whole | given), estimate=estimate, unit=unit, relative=self.relative, scale=self.scale)  # type: ignore[arg-type]

    def _terms(self, pinned: int = -1, rows: Array | None = None) -> tuple[Covariance, ...]:
        """The random terms, of which one has `rows` of its coefficients (h, q) pinned."""
        out = []
        scale = self.scale * (math.exp(self.e[-1]) if self.relative else 1.0)
        for k, (at, K) in enumerate(zip(self._spans, self.units, strict=True)):
            held = rows if rows is not None and k == pinned else np.zeros((0, len(K)))
            out.append(Covariance(self.lambda_[at, at], K, held, scale))
        return tuple(out)

    def whole(self, condition: Array, estimate: float, error: float) -> Pin:
        """A combination c'β of coefficients that the surface eliminates."""
        return self._pin(estimate, error, condition=condition, error=error)

    def coefficient(self, c: Array, estimate: float, error: float) -> Pin:
        """A combination c'β* of coefficients that are part of e."""
        p, n = len(c), len(self.e)
        free = np.linalg.qr(np.column_stack([c, np.eye(p)]))[0][:, 1:p] if p > 1 else np.zeros((1, 0))
        basis, along = np.zeros((n, n - 1)), np.zeros(n)
        basis[:p, : p - 1], basis[p:, p - 1 :] = free, np.eye(n - p)
        along[:p] = c / float(c @ c)
        return self._pin(estimate, error, basis=basis, along=along, e_start=basis.T @ self.e)

    def sigma(self) -> Pin:
        """The residual standard deviation in units of `scale`, where e is its logarithm."""
        estimate = math.exp(float(self.e[-1]))
        return self._last(estimate, estimate, least=0.0, closed=False, logarithmic=True)

    def logarithm(self) -> Pin:
        """The last element of e as it is, the logarithm of a parameter, within REACH of its estimate."""
        estimate = float(self.e[-1])
        return self._last(estimate, 1.0, least=estimate - REACH, most=estimate + REACH)

    def _last(self, estimate: float, unit: float, **given: object) -> Pin:
        n = len(self.e)
        return self._pin(estimate, unit, basis=np.eye(n)[:, :-1], along=np.eye(n)[-1], e_start=self.e[:-1], **given)

    def sd(self, k: int, i: int) -> Pin:
        """The standard deviation of coefficient i of term k."""
        terms = self._terms(k, np.linalg.inv(self.random[k].R)[[i]])
        return self._pin(terms[k].estimate, terms[k].size, terms=terms, least=0.0)

    def cor(self, k: int, i: int, j: int) -> Pin:
        """The correlation of coefficients i and j of term k, neither of which has a variance of zero."""
        terms = self._terms(k, np.linalg.inv(self.random[k].R)[[j, i]])
        at_end = abs(terms[k].estimate) == 1.0  # where -2ℓ has a slope
        return self._pin(terms[k].estimate, 1.0, terms=terms, error=0.5 if at_end else math.nan, least=-1.0, most=1.0)
