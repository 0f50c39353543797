"""How well a fit fits: R², ICCs with intervals, residuals and random effects in summary."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from . import expr
from .arrays import column, doubles
from .averaged import parameter_covariance
from .covariates import evaluated, half_factor, note_scan, number_at, random_terms, scanned, values_at
from .effects import coefficient_names, ranef
from .errors import ConfigError, did_you_mean
from .integrals import moments, variance_coefficients
from .marginal import latent_variance
from .outcome import TRIALS
from .predictions import Output, size_names, value_names
from .sketch import Sketch
from .variance import jacobian, units
from .wald import check_level

if TYPE_CHECKING:
    import pyarrow as pa

    from .options import Options
    from .result import MixedFit

    Array = np.ndarray

QUANTILES = {"min": 0.0, "q1": 0.25, "median": 0.5, "q3": 0.75, "max": 1.0}
QQ_POINTS = 200


# -- R²


def r2(fit: MixedFit, data: Any, options: Options | None) -> dict[str, float]:
    """See `MixedFit.r2`."""
    found = fit.info if data is None and "fixed_variance" in fit.info else _scanned_spreads(fit, data, options)
    fixed, random = float(found["fixed_variance"]), float(found["random_variance"])
    total = fixed + random + latent_variance(fit)
    return {"marginal": fixed / total, "conditional": (fixed + random) / total}


def _scanned_spreads(fit: MixedFit, data: Any, options: Options | None) -> dict[str, float]:
    """The same by a scan of the rows, each counted once, or by its frequency and its trials, whatever its precision weight."""
    from .sql import numeric

    trials = fit.recipe.variables.get(TRIALS)
    sizes = size_names(fit.recipe) if trials is not None else []
    m, gamma, half = fit.recipe.n_covariates, fit.gamma[: fit.recipe.n_covariates], half_factor(fit)
    n, mean, squares, random = 0.0, 0.0, 0.0, 0.0
    with scanned(fit, data, options, more=sizes) as scan:
        more = {"trials": numeric(trials.expression, scan.names)} if trials is not None else {}
        for rows in scan.rows(more=more, sizes=sizes):
            q = np.ones(rows.n) if rows.freq is None else rows.freq
            q = q * doubles(rows.more["trials"]) if more else q
            q = np.where(np.isfinite(q), q, 0.0)
            eta, size = gamma[:m] @ rows.F, float(q.sum())
            average = float(q @ eta) / size
            squares += float(q @ (eta - average) ** 2) + n * size / (n + size) * (average - mean) ** 2
            mean, n = mean + size / (n + size) * (average - mean), n + size
            random += float(q @ ((half.T @ rows.F[list(fit.recipe.z)]) ** 2).sum(axis=0))
    note_scan(fit, "R²", data)
    found = {"fixed_variance": squares / max(n - 1.0, 1.0), "random_variance": random / n}
    if data is None:
        fit.info |= found
    return found


# -- ICC


def icc(fit: MixedFit, at: Mapping[str, Any] | None, level: float | None) -> dict[str, Any]:
    """See `MixedFit.icc`."""
    _check_random(fit)
    if level is not None:
        check_level(level, "level")
    if at is None:
        _check_intercepts(fit)
        made = _shares(fit, [_intercepts(fit)])
        return {group: _shown(fit, share, 0, level) for group, share in made.items()}
    points, single = _points(fit, at)
    made = _shares(fit, points)
    out = {group: [_shown(fit, share, i, level) for i in range(len(points))] for group, share in made.items()}
    return {group: values[0] if single else values for group, values in out.items()}


def _check_random(fit: MixedFit) -> None:
    """Raises ConfigError where there are no random effects."""
    if not random_terms(fit):
        raise ConfigError("the model has no random effects", code="no_random_effects")


def _check_intercepts(fit: MixedFit) -> None:
    """Raises ConfigError for a factor whose random part has no intercept: where its share is meant is then not said."""
    for group in fit.groups:
        if not any("(Intercept)" in term.names for term in fit.terms if term.group == group):
            names = ", ".join(f"{name!r}: …" for name in _random_columns(fit))
            message = f"the random part of {group} has no intercept: its share depends on the covariates"
            raise ConfigError(message, code="at", hint=f"at={{{names}}}")


def _intercepts(fit: MixedFit) -> list[Array]:
    """Per term the vector that takes the intercept of its coefficients, if it has one."""
    return [np.array([1.0 if name == "(Intercept)" else 0.0 for name in term.names]) for term in fit.terms]


def _points(fit: MixedFit, at: Mapping[str, Any]) -> tuple[list[list[Array]], bool]:
    """Per point of `at` and per term the row z of the term's design; whether there is one point, given as scalars."""
    needed = _random_columns(fit)
    for name in at:
        if name not in needed:
            raise ConfigError(f"at names {name!r}, which is in no random term", hint=did_you_mean(name, needed))
    for name in needed:
        if name not in at:
            raise ConfigError(f"at lacks {name!r}, which the random part uses", code="at", column=name)
    lists = {name: values_at(v) for name, v in at.items()}
    sizes = {len(v) for v in lists.values()}
    if len(sizes - {1}) > 1 or 0 in sizes:
        raise ConfigError("the values in at differ in number")
    size = max(sizes, default=1)
    given = {name: values * size if len(values) == 1 else values for name, values in lists.items()}
    recipe, table = fit.recipe, dict[str, list[Any]]()
    for name in value_names(recipe, False):
        if name in given:
            table[name] = [number_at(name, v) if recipe.kinds[name] == "number" else v for v in given[name]]
        else:  # of no matter to the random part
            table[name] = [_any_value(fit, name)] * size
    F = evaluated(fit, table, recipe.z).F[list(recipe.z)]
    # z raw = design' F_z with design = Q R, one row of values a term
    rows = [[term.R.T @ (term.Q.T @ F[:, i]) for term in fit.terms] for i in range(size)]
    return rows, all(isinstance(v, str) or not isinstance(v, Iterable) for v in at.values())


def _random_columns(fit: MixedFit) -> list[str]:
    nodes = [node for bar in fit.parsed.random for term in bar.terms for node in term.variables]
    return list(dict.fromkeys(name for node in nodes for name in expr.columns(node)))


def _any_value(fit: MixedFit, name: str) -> Any:
    """Some value of a column that the fit can code."""
    for variable in fit.recipe.variables.values():
        if variable.kind == "category" and variable.expression == expr.Column(name):
            return variable.levels[0]
    return {"number": 1.0, "logical": False, "text": ""}[fit.recipe.kinds[name]]


def _shares(fit: MixedFit, points: list[list[Array]]) -> dict[str, Callable[[Array], Array]]:
    """Per group a function of the random parameters (theta*, …) that gives its share of the variance at each point."""
    k, scaled = [len(t.names) for t in fit.terms], fit.residual_scaled

    def variances(x: Array) -> tuple[dict[str, Array], Array]:
        place, scale = 0, math.exp(2.0 * x[-1]) if scaled else 1.0
        out: dict[str, Array] = {}
        for i, term in enumerate(fit.terms):
            lower = np.zeros((k[i], k[i]))
            lower.T[np.triu_indices(k[i])] = x[place : place + k[i] * (k[i] + 1) // 2]
            place += k[i] * (k[i] + 1) // 2
            raw = np.linalg.solve(term.R, lower)
            held = np.array([scale * float(((point[i] @ raw) ** 2).sum()) for point in points])
            out[term.group] = out.get(term.group, np.zeros(len(points))) + held
        residual = scale if scaled else latent_variance(fit, float(x[-1]) if len(x) > place else None)
        return out, np.sum(list(out.values()), axis=0) + residual

    def share(group: str) -> Callable[[Array], Array]:
        def of(x: Array) -> Array:
            parts, total = variances(x)
            return np.asarray(parts[group] / total)

        return of

    return {group: share(group) for group in fit.groups}


def _shown(fit: MixedFit, share: Callable[[Array], Array], i: int, level: float | None) -> Any:
    """The share, or with a level (share, low, high): a Wald interval on the logit scale."""
    x = _random_parameters(fit)
    value = float(share(x)[i])
    if level is None:
        return value
    if not 0.0 < value < 1.0:
        return value, math.nan, math.nan
    p = len(fit.names)
    V = parameter_covariance(fit)[p : p + len(x), p : p + len(x)]
    J = jacobian(lambda at: share(at)[i : i + 1], x, units(fit))[0] / (value * (1.0 - value))
    half = NormalDist().inv_cdf(0.5 + level / 2.0) * math.sqrt(max(float(J @ V @ J), 0.0))
    logit = math.log(value / (1.0 - value))
    low, high = (1.0 / (1.0 + math.exp(-(logit + side * half))) for side in (-1.0, 1.0))
    return value, low, high


def _random_parameters(fit: MixedFit) -> Array:
    """(theta*, then log sigma or, where the family has one, tau), as `parameter_covariance` has them after beta."""
    parts = [term.star.T[np.triu_indices(len(term.star))] for term in fit.terms]
    if fit.residual_scaled:
        parts.append(np.array([math.log(fit.sigma)]))
    elif fit.family_parameters() and getattr(fit, "joint", None) is not None:
        parts.append(np.array([fit.tau]))  # type: ignore[attr-defined]
    return np.concatenate(parts)


# -- residuals


def residuals(fit: MixedFit, data: Any, options: Options | None) -> pa.Table:
    """See `MixedFit.residuals`."""
    import pyarrow as pa

    sketches = residual_sketches(fit, data, options)
    rows = [{"residual": kind, **summary(sketch)} for kind, sketch in sketches.items()]
    return pa.Table.from_pylist(rows)


def summary(sketch: Sketch) -> dict[str, float]:
    """n, moments and quartiles."""
    mean = sketch.mean if sketch.n else math.nan
    out = {"n": sketch.n, "mean": mean, "sd": sketch.sd, "skewness": sketch.skewness, "kurtosis": sketch.kurtosis}
    return out | dict(zip(QUANTILES, sketch.quantiles(list(QUANTILES.values())).tolist(), strict=True))


def residual_sketches(fit: MixedFit, data: Any, options: Options | None) -> dict[str, Sketch]:
    """Sketches of response and Pearson residuals, given the random effects, in one scan."""
    out = {"response": Sketch(), "pearson": Sketch()}
    for response, pearson in residual_batches(fit, data, options):
        out["response"].add(response)
        out["pearson"].add(pearson)
    note_scan(fit, "residuals", data)
    return out


def residual_batches(fit: MixedFit, data: Any, options: Options | None) -> Iterator[tuple[Array, Array]]:
    """Response and Pearson residuals of each row, (n,), NaN where a row cannot be used."""
    from .scoring import scored

    outputs = {"response": fit.output("residual"), "pearson": pearson(fit)}
    for batch in scored(fit, data, outputs, fit.groups, options, columns=()):
        yield doubles(batch.column(0)), doubles(batch.column(1))


def pearson(fit: MixedFit) -> Output:
    """(y - mu) / sqrt(Var(y)); of a linear model scaled by sigma."""
    best = "conditional" if fit.terms else "population"
    size = ("size",) if size_names(fit.recipe) else ()
    c, base = variance_coefficients(fit), fit.output("residual")
    k = len(base.parts)

    def made(*parts: Array) -> Array:
        residual = parts[0] if base.made is None else base.made(*parts[:k])
        mu, mu2, mu3 = moments(fit.link, parts[k], None)
        variance = c[0] + c[1] * mu + c[2] * mu2 + c[3] * mu3
        return np.asarray(residual * np.sqrt((parts[k + 1] if size else 1.0) / variance))

    return Output((*base.parts, best, *size), made)


# -- random effects


def effect_sketches(fit: MixedFit, group: str | None = None) -> dict[tuple[str, str], Sketch]:
    """Per group and coefficient a sketch of standardized conditional modes b / sqrt(Var(b) - Var(b | y)), whose variance is 1 where the
    model holds (Lange and Ryan 1989); levels where nothing is known of b are left out."""
    _check_random(fit)
    out: dict[tuple[str, str], Sketch] = {}
    for name in fit.groups if group is None else [group]:
        terms = [term for term in fit.terms if term.group == name]
        prior = np.concatenate([fit.effect_scale**2 * (term.factor**2).sum(axis=1) for term in terms])
        labels = coefficient_names(terms)
        sketches = [out.setdefault((name, label), Sketch()) for label in labels]
        for batch in ranef(fit, wide=True, stream=True, group=name):
            for label, variance, sketch in zip(labels, prior, sketches, strict=True):
                spread = variance - column(batch, f"{label}_se") ** 2
                with np.errstate(invalid="ignore", divide="ignore"):
                    sketch.add(np.where(spread > 1e-8 * variance, column(batch, label) / np.sqrt(spread), math.nan))
    return out


def normality(fit: MixedFit) -> pa.Table:
    """See `MixedFit.normality`."""
    import pyarrow as pa

    rows = []
    for (group, term), sketch in effect_sketches(fit).items():
        found = summary(sketch)
        rows.append({"group": group, "term": term, **found, "qq_correlation": _correlation(sketch)})
    texts = [("group", pa.string()), ("term", pa.string()), ("n", pa.int64())]
    reals = [(name, pa.float64()) for name in ("mean", "sd", "skewness", "kurtosis", *QUANTILES, "qq_correlation")]
    return pa.Table.from_pylist([{k: _finite(v) for k, v in row.items()} for row in rows], schema=pa.schema([*texts, *reals]))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _correlation(sketch: Sketch) -> float:
    """Of sample with normal quantiles (Filliben 1975)."""
    if sketch.n < 3 or not sketch.sd > 0.0:
        return math.nan
    theoretical, sample = qq_points(sketch, min(sketch.n, 1_000))
    return float(np.corrcoef(theoretical, sample)[0, 1])


def qq_points(sketch: Sketch, points: int) -> tuple[Array, Array]:
    """Normal and sample quantiles at (i - 1/2) / points: every value where there are as many points, else evenly spaced ranks."""
    from scipy.special import ndtri

    p = (np.arange(points) + 0.5) / points
    ranks = np.clip((p * sketch.n - 0.5) / max(sketch.n - 1, 1), 0.0, 1.0)
    return np.asarray(ndtri(p)), sketch.quantiles(ranks)


def qq(fit: MixedFit, of: str, points: int, data: Any, options: Options | None) -> pa.Table:
    """See `MixedFit.qq`."""
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ConfigError(f"points = {points!r} is not a whole number from 2")
    known = ["residuals", *fit.groups]
    if of not in known:
        raise ConfigError(f"there is nothing called {of!r} to compare with the normal distribution", hint=did_you_mean(str(of), known))
    if of == "residuals":
        held = {("Residual", "pearson"): residual_sketches(fit, data, options)["pearson"]}
    else:
        held = effect_sketches(fit, of)
    return qq_table(held, points)


def qq_table(held: Mapping[tuple[str, str], Sketch], points: int) -> pa.Table:
    """Sample against normal quantiles of sketches by group and term, at most so many `points` of each."""
    import pyarrow as pa

    parts = []
    for (group, term), sketch in held.items():
        if not sketch.n:
            continue
        theoretical, sample = qq_points(sketch, min(points, sketch.n))
        parts.append(pa.table({"group": [group] * len(sample), "term": [term] * len(sample), "theoretical": theoretical, "sample": sample}))
    schema = pa.schema([("group", pa.string()), ("term", pa.string()), ("theoretical", pa.float64()), ("sample", pa.float64())])
    return pa.concat_tables([schema.empty_table(), *(part.cast(schema) for part in parts)])
