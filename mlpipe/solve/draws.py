"""Simulated responses of every family."""
from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .density import Density
from .family import Cells
from .link import Array

SUMMED = ("binomial", "poisson")  # families in which a sum of rows that share a mean is of the family again


def responses(density: Density, mu: Array, tau: float, size: Array | None, weight: Array | None, rng: np.random.Generator) -> Array:
    """Responses (n,) with means mu: of the binomial family proportions of `size` trials, of the Poisson means of `size` counts.

    NaN where a mean is not one of the family.
    """
    family = density.family
    ok = np.isfinite(mu) & (mu >= family.low) & (mu <= family.high)
    m = np.where(ok, mu, 0.5)
    scale = math.exp(tau) * (weight if weight is not None else np.ones(1))
    n = np.ones(len(m)) if size is None else size
    y: Array | np.ndarray
    match family.name:
        case "binomial":
            trials = np.rint(n).astype(np.int64)
            y = rng.binomial(trials, m) / np.maximum(trials, 1)
        case "poisson":
            y = rng.poisson(n * m) / np.where(n > 0.0, n, 1.0)
        case "negbinomial":
            y = rng.poisson(rng.gamma(math.exp(tau), m / math.exp(tau)))
        case "negbinomial1":
            y = rng.poisson(rng.gamma(np.maximum(m / math.exp(tau), 1e-300), math.exp(tau)))
        case "gamma":
            y = rng.gamma(scale, m / scale)
        case "inverse_gaussian":
            y = rng.wald(np.maximum(m, 1e-300), np.broadcast_to(scale, m.shape))
        case "gaussian":
            y = m + rng.normal(size=len(m)) / np.sqrt(scale)
        case _:
            y = rng.beta(m * math.exp(tau), (1.0 - m) * math.exp(tau))
            y = np.clip(y, np.finfo(float).tiny, 1.0 - np.finfo(float).epsneg)
    return np.where(ok, np.asarray(y, dtype=float), np.nan)


def cells_of(density: Density, eta: Array, cells: Cells, tau: float, rng: np.random.Generator) -> Cells:
    """Rows with simulated responses at linear predictors eta (n,)."""
    y = responses(density, density.link.means(eta).mu, tau, cells.size, cells.weight, rng)
    return replace(cells, y=y, statistics=tuple(_statistic(name, y) for name in density.family.statistics))


def _statistic(name: str, y: Array) -> Array:
    """A further function of single responses; the variance within a cell of one row is 0."""
    if name == "log":
        return np.log(y)
    if name == "log1m":
        return np.log1p(-y)
    return 1.0 / y if name == "inverse" else np.zeros(len(y))
