"""Tables of estimates: fixed effects and variance parameters, with standard errors from the exact information."""
from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from .reduction import lower_factor
from .wald import check_level

if TYPE_CHECKING:
    import pyarrow as pa

    from .result import MixedFit

Row = dict[str, Any]


def standard_errors(fit: MixedFit) -> np.ndarray:
    """Of the fixed effects (p,); NaN where the information was not positive."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sqrt(np.diag(fit.covariance)))


def covariances(fit: MixedFit) -> list[np.ndarray]:
    """The covariance matrix of each random term's effects."""
    return [fit.effect_scale**2 * term.factor @ term.factor.T for term in fit.terms]


def varcorr(fit: MixedFit) -> pa.Table:
    """One row a variance, then a covariance, the residual last (see `LMMFit.varcorr`)."""
    import pyarrow as pa

    rows: list[Row] = []
    for term, psi in zip(fit.terms, covariances(fit), strict=True):
        sd = np.sqrt(np.diag(psi))
        for i, name in enumerate(term.names):
            rows.append(_variance(term.group, name, None, psi[i, i], sd[i]))
        for j in range(len(sd)):
            for i in range(j + 1, len(sd)):
                cor = psi[i, j] / (sd[i] * sd[j]) if sd[i] * sd[j] > 0 else math.nan
                rows.append(_variance(term.group, term.names[j], term.names[i], psi[i, j], cor))
    if fit.has_residual:
        rows.append(_variance("Residual", None, None, fit.sigma**2, fit.sigma))
    text, real = pa.string(), pa.float64()
    schema = pa.schema([("group", text), ("term1", text), ("term2", text), ("variance", real), ("sd", real)])
    return pa.Table.from_pylist(rows, schema=schema)


def _variance(group: str, term1: str | None, term2: str | None, variance: float, sd: float) -> Row:
    return {"group": group, "term1": term1, "term2": term2, "variance": float(variance), "sd": float(sd)}


def spreads(fit: MixedFit, gram: np.ndarray, n: float) -> dict[str, float]:
    """The variance (n - 1) over n rows of the fixed part, and the mean of z'Ψz, from the features' cross-products; nothing where these
    lack the constant."""
    recipe = fit.recipe
    m, z = recipe.n_covariates, list(recipe.z)
    if () not in recipe.features[:m]:
        return {}
    g, total = fit.gamma[:m], gram[:m, :m]
    half = fit.effect_scale * np.hstack([term.Q @ term.star for term in fit.terms])
    random = float(np.einsum("iq,ij,jq->", half, total[np.ix_(z, z)], half)) / n
    return {"fixed_variance": about_mean(g, total, total[recipe.features.index(())], n) / max(n - 1.0, 1.0), "random_variance": random}


def about_mean(g: np.ndarray, gram: np.ndarray, sums: np.ndarray, n: float) -> float:
    """Σ (F'g - its mean)² over n rows, from the features' cross-products (m, m) and sums (m,). It is the features that are centred: the
    constant is then zero, however far the mean is from it."""
    about = gram - np.outer(sums, sums) / n
    still = np.diag(about) <= 1e-14 * np.diag(gram)
    about[still] = about[:, still] = 0.0
    return max(float(g @ about @ g), 0.0)


def tidy(fit: MixedFit, conf_level: float, ddf: str) -> pa.Table:
    """See `LMMFit.tidy`. Raises ConfigError for a confidence level outside (0, 1) or degrees of freedom that the fit has not."""
    import pyarrow as pa

    check_level(conf_level)
    z = NormalDist().inv_cdf(0.5 + conf_level / 2)
    rows = _wald(fit, z) if ddf == "wald" else _with_degrees(fit, conf_level, ddf)
    for (group, name, estimate), se in zip(random_parameters(fit), random_errors(fit), strict=True):
        rows.append(estimate_row("ran_pars", group, name, estimate, se, z))
    rows += [estimate_row("ran_pars", *parameter, z) for parameter in fit.family_parameters()]
    return pa.Table.from_pylist(rows, schema=tidy_schema())


def _wald(fit: MixedFit, z: float) -> list[Row]:
    rows = []
    for name, estimate, se in zip(fit.names, fit.beta, standard_errors(fit), strict=True):
        row = estimate_row("fixed", None, name, estimate, se, z)
        if se > 0:
            statistic = float(estimate / se)
            row |= {"statistic": statistic, "p_value": math.erfc(abs(statistic) / math.sqrt(2))}
        rows.append(row)
    return rows


def _with_degrees(fit: MixedFit, conf_level: float, ddf: str) -> list[Row]:
    """Fixed effects by t tests; the standard errors are the adjusted ones of Kenward and Roger's method."""
    from .inference import Tests, t_quantile, t_tail

    tests, rows = Tests(fit, ddf), []
    found = tests.each(np.eye(len(fit.names)))
    for name, estimate, se, df in zip(fit.names, fit.beta, np.sqrt(np.diag(tests.covariance)), found, strict=True):
        statistic, df = float(estimate / se), float(df)
        row = estimate_row("fixed", None, name, estimate, se, t_quantile(conf_level, df))
        rows.append(row | {"statistic": statistic, "df": df, "p_value": t_tail(statistic, df)})
    return rows


def tidy_schema() -> pa.Schema:
    """The columns of `tidy`."""
    import pyarrow as pa

    texts = ("effect", "group", "term")
    reals = ("estimate", "std_error", "statistic", "df", "p_value", "conf_low", "conf_high")
    return pa.schema([(name, pa.string()) for name in texts] + [(name, pa.float64()) for name in reals])


def estimate_row(effect: str, group: str | None, term: str, estimate: float, se: float, z: float) -> Row:
    """One row of `tidy`; an interval of `z` standard errors where these are known."""
    known = se is not None and math.isfinite(se)
    row: Row = {"effect": effect, "group": group, "term": term, "estimate": float(estimate), "std_error": float(se) if known else None}
    return row | ({"conf_low": float(estimate - z * se), "conf_high": float(estimate + z * se)} if known else {})


def random_parameters(fit: MixedFit) -> list[tuple[str, str, float]]:
    """(group, term, value) of the standard deviations and correlations, named as broom.mixed does."""
    out: list[tuple[str, str, float]] = []
    for term, psi in zip(fit.terms, covariances(fit), strict=True):
        values = _sd_cor(psi)
        names = [f"sd__{name}" for name in term.names]
        names += [f"cor__{term.names[j]}.{term.names[i]}" for j in range(len(psi)) for i in range(j + 1, len(psi))]
        out += [(term.group, name, value) for name, value in zip(names, values, strict=True)]
    return out


def _sd_cor(psi: np.ndarray) -> list[float]:
    sd = np.sqrt(np.diag(psi))
    pairs = [(i, j) for j in range(len(psi)) for i in range(j + 1, len(psi))]
    cor = [float(psi[i, j] / (sd[i] * sd[j])) if sd[i] * sd[j] > 0 else math.nan for i, j in pairs]
    return [*sd.tolist(), *cor]


def random_errors(fit: MixedFit) -> np.ndarray:
    """Standard errors of `random_parameters` by the delta method, from the covariance of theta* (and of log sigma where Λ is relative
    to it)."""
    if not fit.terms:
        return np.zeros(0)
    stars = [term.star for term in fit.terms]
    at = np.concatenate([*(star.T[np.triu_indices(len(star))] for star in stars), [math.log(fit.sigma)] if fit.residual_scaled else []])

    def parameters(x: np.ndarray) -> np.ndarray:
        values, place = [], 0
        scale = math.exp(2 * x[-1]) if fit.residual_scaled else 1.0
        for term, star in zip(fit.terms, stars, strict=True):
            k = len(star)
            lower = np.zeros((k, k))
            lower.T[np.triu_indices(k)] = x[place : place + k * (k + 1) // 2]
            place += k * (k + 1) // 2
            raw = lower_factor(np.linalg.solve(term.R, lower))
            values += _sd_cor(scale * raw @ raw.T)
        return np.array(values)

    J = jacobian(parameters, at, units(fit))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sqrt(np.einsum("ij,jk,ik->i", J, fit.theta_covariance, J)))


def units(fit: MixedFit) -> np.ndarray:
    """What is not small of each of the solver's theta: the largest element of its term's factor."""
    sizes = [(len(term.star) * (len(term.star) + 1) // 2, float(np.abs(term.star).max())) for term in fit.terms]
    return np.concatenate([np.full(n, size if size > 0.0 else 1.0) for n, size in sizes])


def jacobian(function: Callable[[np.ndarray], np.ndarray], at: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Central differences with steps of 1e-6 of each coordinate's size, or of a hundredth of its `unit`: of the first coordinates, 1 of
    the others, which are logarithms."""
    columns = []
    for i in range(len(at)):
        step = np.zeros(len(at))
        step[i] = 1e-6 * max(abs(at[i]), 1e-2 * (unit[i] if i < len(unit) else 1.0))
        columns.append((function(at + step) - function(at - step)) / (2 * step[i]))
    return np.column_stack(columns)
