"""What a generalized fit says on the scale of the response: means with the random effects integrated out, latent variances, sandwiches."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError
from .solve.kernel import Chunk

if TYPE_CHECKING:
    from .generalized_result import GeneralizedFit
    from .passes import Model
    from .result import MixedFit

    Array = np.ndarray

STEP, REACH = 0.5, 8.5  # of the quadrature over the linear predictor, in units of the spread or of 1
LATENT = {"logit": math.pi**2 / 3.0, "probit": 1.0, "cloglog": math.pi**2 / 6.0}


def mean(fit: GeneralizedFit, eta: Array, variance: Array | None = None) -> Array:
    """E g⁻¹(eta + e), e ~ N(0, variance): closed for identity, log and probit, else by quadrature; without a variance the
    mean at eta."""
    density = fit.density
    if variance is None or fit.link == "identity":
        return np.asarray(density.link.means(eta).mu)
    if fit.link == "log":
        return np.asarray(density.link.means(eta + 0.5 * variance).mu)
    if fit.link == "probit":
        return np.asarray(density.link.means(eta / np.sqrt(1.0 + variance)).mu)
    sd, out = np.sqrt(variance), np.zeros_like(eta)
    for node, weight in zip(*trapezoid(float(np.nanmax(sd, initial=0.0))), strict=True):
        out += weight * density.link.means(eta + sd * node).mu
    return out


def trapezoid(sd: float) -> tuple[Array, Array]:
    """Nodes and weights for the mean over a standard normal of a function with poles no nearer than 1 / sd: for such functions the
    trapezoidal rule converges geometrically in the step (Trefethen and Weideman 2014), where Gauss-Hermite's fails for large sd."""
    step = min(STEP, STEP / max(sd, 1e-300))
    x = step * np.arange(-round(REACH / step), round(REACH / step) + 1)
    w = np.exp(-0.5 * x * x)
    return x, w / w.sum()


def latent_variance(fit: MixedFit, tau: float | None = None) -> float:
    """The residual variance on the scale of the linear predictor (Nakagawa, Johnson and Schielzeth 2017), at the fit's family
    parameter or another. Raises ConfigError where the family and link have none."""
    if fit.residual_scaled:
        return fit.sigma**2
    family, tau = fit.base_family, fit.tau if tau is None else tau  # type: ignore[attr-defined]
    if fit.link in LATENT and family == "binomial":
        return LATENT[fit.link]
    if fit.link == "identity" and family == "gaussian":
        return math.exp(-tau)
    if fit.link == "log" and family in ("poisson", "negbinomial", "negbinomial1", "gamma"):
        return _log_scale(family, float(fit.info["mean_response"]), tau)
    raise ConfigError(f"there is no latent variance for family {fit.family!r} with link {fit.link!r}", code="no_latent_scale")


def _log_scale(family: str, mean: float, tau: float) -> float:
    """The observation-level variance on the log scale by the trigamma function (Nakagawa, Johnson and Schielzeth 2017, table 1)."""
    from scipy.special import polygamma

    shape = {
        "poisson": mean, "negbinomial": 1.0 / (1.0 / mean + 1.0 / math.exp(tau)), "negbinomial1": mean / (1.0 + math.exp(tau)),
        "gamma": math.exp(tau),
    }[family]  # fmt: skip
    return float(polygamma(1, shape))


def spreads(model: Model, gamma: Array, terms: Any) -> dict[str, float]:
    """The variance over rows of the fixed part, and the mean of z'Ψz, from the features' cross-products."""
    rows, recipe = model.rows, model.plan.recipe
    g = gamma[: recipe.n_covariates]
    average = float(g @ rows.sums) / rows.size
    fixed = max(float(g @ rows.gram @ g) / rows.size - average**2, 0.0)
    random, z = 0.0, list(recipe.z)
    for term in terms:
        half = term.Q @ term.star
        random += float(np.trace(half.T @ rows.gram[np.ix_(z, z)] @ half)) / rows.size
    return {"fixed_variance": fixed, "random_variance": random, "mean_response": rows.mean}


def pearson(model: Model, psi: Array) -> float:
    """Σ (y - mu)² / V(mu), the response's variance inside compressed cells included for counts and proportions."""
    gamma, density = model.Q @ psi[: model.Q.shape[1]], model.density

    def look(chunk: Chunk) -> float:
        total = 0.0
        for rows in chunk.pieces:
            eta = gamma @ rows.F + (0.0 if rows.offset is None else rows.offset)
            means = density.link.means(eta)
            information = density.family.information(means, rows.cells, 0.0)[0]
            size = 1.0 if rows.cells.size is None else rows.cells.size
            total += float((size * (rows.cells.y - means.mu) ** 2 * information).sum())
        return total

    return math.fsum(model.rows.spool.map(look))


def sandwich(model: Model, psi: Array, bread: Array, kind: str) -> Array:
    """bread · Σ s s' · bread with s the score of a block of rows (CR) or of a row (HC), in the solver's coordinates (Liang and Zeger
    1986)."""
    Q, density = model.Q, model.density
    gamma, tau = Q @ psi[: Q.shape[1]], float(psi[-1]) if density.family.shape else 0.0
    clustered = kind.startswith("CR")

    def look(chunk: Chunk) -> Array:
        scores: list[Array] = []
        total: Any = 0.0
        for rows in chunk.pieces:
            eta = gamma @ rows.F + (0.0 if rows.offset is None else rows.offset)
            terms = density.terms(eta, rows.cells, tau)
            each = Q.T @ (rows.F * terms.score)
            each = np.vstack([each, terms.shape]) if terms.shape is not None else each
            if clustered:
                scores.append(rows.sums(each))
            else:
                q = rows.cells.size if model.plan.recipe.freq else None  # a row that stands for q has the score of one, q times
                total = total + (each if q is None else each / q) @ each.T
        if not clustered:
            return np.asarray(total)
        s = np.sum(scores, axis=0) if len(scores) > 1 else scores[0]
        return np.asarray(s @ s.T)

    meat = sum(model.rows.spool.map(look))
    n, p, G = model.rows.nobs, Q.shape[1], model.rows.spool.n_blocks
    factor = {"CR0": 1.0, "CR1": G / max(G - 1.0, 1.0) * (n - 1.0) / (n - p), "HC0": 1.0, "HC1": n / (n - p)}[kind]
    return np.asarray(factor * bread @ meat @ bread)
