"""The naive truth for profiles of models with one (1 + x | g) on blocks of equal size: -2ℓ by whole matrices, minimized by box-constrained
searches from several corners."""
from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np
import scipy.optimize as so
import scipy.special as sp

from mlpipe.solve.link import Array

SD0, SD1, COR, BETA0, BETA1, LOG_SIGMA = range(6)  # of what may be pinned


@dataclass
class DenseProfile:
    """y (G, n) and x (G, n) of the model; a Gaussian one by its likelihood, binomial and Poisson ones by Laplace's approximation."""

    family: str
    y: Array
    x: Array

    @property
    def Z(self) -> Array:
        """Columns 1 and x (G, n, 2), of the fixed and of the random part."""
        return np.stack([np.ones_like(self.x), self.x], axis=2)

    def deviance(self, at: Array) -> float:
        """-2ℓ at (sd0, sd1, cor, beta0, beta1, log sigma)."""
        a, b, r = at[:3]
        half = np.array([[a, 0.0], [r * b, math.sqrt(max(1.0 - r * r, 0.0)) * b]])
        ZL, eta = self.Z @ half, self.Z @ at[3:5]
        return self._gaussian(ZL, eta, math.exp(at[5])) if self.family == "gaussian" else self._laplace(ZL, eta)

    def _gaussian(self, ZL: Array, eta: Array, sigma: float) -> float:
        V = ZL @ ZL.transpose(0, 2, 1) + sigma**2 * np.eye(ZL.shape[1])
        r = self.y - eta
        return float(np.linalg.slogdet(2.0 * math.pi * V)[1].sum() + (r * np.linalg.solve(V, r[:, :, None])[:, :, 0]).sum())

    def _laplace(self, ZL: Array, eta: Array) -> float:
        u = np.zeros((len(ZL), 2))
        for _ in range(100):
            value, mean, weight = self._terms(eta + (ZL @ u[:, :, None])[:, :, 0])
            H = np.eye(2) + ZL.transpose(0, 2, 1) @ (weight[:, :, None] * ZL)
            g = ((self.y - mean)[:, None, :] @ ZL)[:, 0] - u
            step = np.linalg.solve(H, g[:, :, None])[:, :, 0]
            if np.abs(step).max() < 1e-9:
                break
            u = u + step * min(1.0, 3.0 / np.abs(step).max())
        return float(-2.0 * value.sum() + (u * u).sum() + np.linalg.slogdet(H)[1].sum())

    def _terms(self, eta: Array) -> tuple[Array, Array, Array]:
        if self.family == "binomial":
            mean = sp.expit(eta)
            return self.y * eta - np.logaddexp(0.0, eta), mean, mean * (1.0 - mean)
        mean = np.exp(np.minimum(eta, 30.0))  # far out
        return self.y * eta - mean - sp.gammaln(self.y + 1.0), mean, mean

    def least(self, pinned: int | None = None, v: float = 0.0) -> float:
        """The least -2ℓ with a parameter at v, or of all."""
        m, s, size = self.x.mean(), self.x.std(), self.y.std() if self.family == "gaussian" else 1.0
        far = math.hypot(1.0, m / s)  # of the intercept, seen from where the rows are
        rate = {"gaussian": self.y.mean(), "binomial": sp.logit(self.y.mean()), "poisson": np.log(self.y.mean())}[self.family]

        def at(z: Array) -> Array:
            out = np.array([z[0] * size * far, z[1] * size / s, z[2], (z[3] - z[4] * m / s) * size, z[4] * size / s, z[5]])
            if pinned is not None:
                out[pinned] = v
            return out

        bounds = [(0.0, 6.0), (0.0, 6.0), (-1.0, 1.0), (-20.0, 20.0), (-20.0, 20.0), (-6.0, 6.0)]
        found = []
        for corner, sd in product((-0.95, 0.95), (0.1, 0.6)):
            start = np.array([sd, sd, corner, rate / size, 0.1, math.log(size)])
            options = {"gtol": 1e-5, "ftol": 1e-12}
            end = so.minimize(lambda z: self.deviance(at(z)), start, method="L-BFGS-B", bounds=bounds, options=options)
            if far > 3.0:  # the covariances lie in a narrow valley
                more = {"maxiter": 3000, "xatol": 1e-5, "fatol": 1e-6}
                end = so.minimize(lambda z: self.deviance(at(z)), end.x, method="Nelder-Mead", bounds=bounds, options=more)
            found.append(float(end.fun))
        return min(found)
