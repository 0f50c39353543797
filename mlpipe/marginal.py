"""What a generalized fit says on the scale of the response: means with the random effects integrated out, latent variances, sandwiches."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError
from .robust import few
from .solve.glm import definite
from .solve.kernel import Chunk
from .solve.sandwich import CERTAIN, cluster_factor, corrected, half, row_factor
from .variance import about_mean

if TYPE_CHECKING:
    from .generalized_result import GeneralizedFit
    from .passes import Model
    from .result import MixedFit

    Array = np.ndarray

REACH = 8.5  # of the quadrature over the linear predictor, in units of the spread
STEP = {"logit": 0.5}  # of it, in units of the spread or of 1: its error is exp(-2 pi d / STEP), d the distance of the nearest pole
SHORT_STEP = 0.25  # of the other links: d is 1 for cauchit, and cloglog's mean is bounded up to pi / 2
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
    out = np.zeros_like(eta)
    for weight, at in nodes(fit.link, eta, np.sqrt(variance)):
        out += weight * density.link.means(at).mu
    return out


def nodes(link: str, eta: Array, sd: Array) -> Iterator[tuple[float, Array]]:
    """Weights and linear predictors (n,) of the mean over e ~ N(0, sd²) of something at eta + e; NaN where it does not exist, as the
    inverse link's pole lies within REACH. (Other links that are not defined everywhere have no mean there by themselves.)"""
    if link == "inverse":
        eta = np.where(np.abs(eta) > REACH * sd, eta, math.nan)
    for node, weight in zip(*trapezoid(link, float(np.nanmax(sd, initial=0.0))), strict=True):
        yield weight, eta + sd * node


def trapezoid(link: str, sd: float) -> tuple[Array, Array]:
    """Nodes and weights for the mean over a standard normal of a link's means at eta + sd * node: for functions with poles no nearer than
    1 / sd the trapezoidal rule converges geometrically in the step (Trefethen and Weideman 2014), where Gauss-Hermite's fails for large
    sd."""
    step = STEP.get(link, SHORT_STEP) / max(sd, 1.0)
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
    """The variance (n - 1) over n rows, or trials, of the fixed part, and the mean of z'Ψz, from the features' cross-products."""
    rows, recipe = model.rows, model.plan.recipe
    fixed = about_mean(gamma[: recipe.n_covariates], rows.gram, rows.sums, rows.size) / max(rows.size - 1.0, 1.0)
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
    1986). HC2, HC3 and CR2 correct the scores by the leverages of √W X, W the weights of Fisher scoring (McCaffrey and Bell 2006).
    NaN where estimates are infinite. Raises DataError for one cluster."""
    if kind.startswith("CR"):
        few(kind, [model.rows.spool.n_blocks])
    Q, density = model.Q, model.density
    gamma, tau = Q @ psi[: Q.shape[1]], float(psi[-1]) if density.family.shape else 0.0
    clustered, levered = kind.startswith("CR"), kind in ("HC2", "HC3", "CR2")
    information = _fisher(model, gamma, tau) if levered else np.zeros((0, 0))
    if not definite(information):  # estimates that go to infinity leave no leverages
        return np.full_like(bread, math.nan)
    L = half(np.linalg.inv(information)) if levered else information

    def look(chunk: Chunk) -> Array:
        scores: list[Array] = []
        grams: list[Array] = []
        total: Any = 0.0
        for rows in chunk.pieces:
            eta = gamma @ rows.F + (0.0 if rows.offset is None else rows.offset)
            terms = density.terms(eta, rows.cells, tau)
            X = Q.T @ rows.F
            each = X * terms.score
            q = rows.cells.size if model.plan.recipe.freq else None  # a row that stands for q has the score of one, q times
            W = density.safe_curvature(eta, rows.cells, tau) if levered else eta
            if kind in ("HC2", "HC3"):
                left = np.maximum(1.0 - W / (1.0 if q is None else q) * ((L.T @ X) ** 2).sum(axis=0), CERTAIN)
                each = each / (np.sqrt(left) if kind == "HC2" else left)
            each = np.vstack([each, terms.shape]) if terms.shape is not None else each
            if clustered:
                scores.append(rows.sums(each))
                grams += [rows.sums(X[:, None] * (X * W)[None])] if levered else []
            else:
                total = total + (each if q is None else each / q) @ each.T
        if not clustered:
            return np.asarray(total)
        s = np.sum(scores, axis=0) if len(scores) > 1 else scores[0]
        if levered:
            s = np.vstack([corrected(s[: len(L)], np.sum(grams, axis=0), L), s[len(L) :]])
        return np.asarray(s @ s.T)

    meat = sum(model.rows.spool.map(quietly(look)))
    n, p, G = model.rows.nobs, Q.shape[1], model.rows.spool.n_blocks
    factor = cluster_factor(kind, G, n, p) if clustered else row_factor(kind, n, p)
    return np.asarray(factor * bread @ meat @ bread)


def _fisher(model: Model, gamma: Array, tau: float) -> Array:
    """X'WX with the weights of Fisher scoring, in the solver's coordinates."""

    def look(chunk: Chunk) -> Array:
        total = np.zeros((len(gamma),) * 2)
        for rows in chunk.pieces:
            eta = gamma @ rows.F + (0.0 if rows.offset is None else rows.offset)
            total = total + (rows.F * model.density.safe_curvature(eta, rows.cells, tau)) @ rows.F.T
        return total

    return np.asarray(model.Q.T @ sum(model.rows.spool.map(quietly(look))) @ model.Q)


def quietly(look: Callable[[Chunk], Array]) -> Callable[[Chunk], Array]:
    """The same without warnings of what is not finite: infinite estimates make it so."""

    def quiet(chunk: Chunk) -> Array:
        with np.errstate(all="ignore"):
            return look(chunk)

    return quiet
