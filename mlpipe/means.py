"""Marginal means over the levels of factors and their contrasts (Searle, Speed and Milliken 1980), as R's emmeans has them.

The reference grid crosses the levels of all factors of the fixed part; numeric covariates are at their means. Means average the linear
predictor over the grid's other factors, equally weighted, and are then transformed back; with the random effects integrated out they
average the means themselves. Standard errors are by the delta method; tests by the degrees of freedom of `ddf`, on the linear predictor.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import expr
from .averaged import Means
from .covariates import ALIASED, covariate_means, evaluated, note_scan, number_at, random_terms, scanned, undetermined, values_at
from .design import Level, Variable, level_label
from .errors import ConfigError, did_you_mean
from .inference import Tests, t_quantile, t_tail
from .integrals import linked
from .predictions import value_names
from .solve.link import LINKS
from .wald import check_level, roots, wald_table

if TYPE_CHECKING:
    import pyarrow as pa

    from .options import Options
    from .result import MixedFit

    Array = np.ndarray

MOST_CELLS = 1_000_000
ADJUSTMENTS = ("tukey", "bonferroni", "holm", "none")
METHODS = ("pairwise", "reference")


class Found(NamedTuple):
    """Means of cells of levels: `term`, the cells' `labels`, where the base levels' is among them (`base`), their estimates (L,) and
    covariance (L, L); `slopes` (L, p) of their linear predictors by the coefficients; `aliased` (L, k), how much these lean on what the
    rows do not determine."""

    term: str
    labels: list[str]
    base: int
    estimate: Array
    covariance: Array
    slopes: Array
    aliased: Array


def means(
    fit: MixedFit, term: str | Sequence[str], *, kind: str, effects: str, at: Mapping[str, Any] | None, ddf: str, data: Any,
    conf_level: float, options: Options | None,
) -> pa.Table:  # fmt: skip
    """See `MixedFit.means`."""
    check_level(conf_level)
    tests = Tests(fit, ddf)
    if fit.terms and not random_terms(fit):
        raise ConfigError("a fit with absorbed effects has no means", hint="it has contrasts", code="not_available")
    found = _found(fit, tests, term, kind, effects, at, data, options)
    texts = {"term": [found.term] * len(found.labels), "level": found.labels}
    unknown, se = _leaning(found.aliased), roots(np.diag(found.covariance))
    estimate, se, df = _without(unknown, found.estimate, se, tests.each(found.slopes))
    table = _tested(texts, estimate, se, df, conf_level)
    return table if kind == "link" or fit.link == "identity" else _on_link(table, fit.link, conf_level)


def contrasts(
    fit: MixedFit, term: str | Sequence[str], method: str | Mapping[str, Sequence[float]], *, adjust: str | None, kind: str, effects: str,
    at: Mapping[str, Any] | None, ddf: str, data: Any, conf_level: float, options: Options | None,
) -> pa.Table:  # fmt: skip
    """See `MixedFit.contrasts`."""
    check_level(conf_level)
    tests = Tests(fit, ddf)
    adjust = adjust or ("tukey" if method == "pairwise" else "none")
    if adjust not in ADJUSTMENTS:
        raise ConfigError(f"adjust = {adjust!r} is not known", hint=did_you_mean(str(adjust), list(ADJUSTMENTS)))
    if adjust == "tukey" and method != "pairwise":
        raise ConfigError('adjust="tukey" is for all pairwise differences', hint='adjust="bonferroni" or "holm"')
    found = _found(fit, tests, term, kind, effects, at, data, options)
    names, K = _coefficients(method, found.labels, found.base)
    se = roots(np.diag(K @ found.covariance @ K.T))
    texts = {"term": [found.term] * len(names), "contrast": names}
    linear = kind == "link" or fit.link == "identity"  # there a difference may be estimable where its means are not
    unknown = _leaning(K @ found.aliased) if linear else (K[:, _leaning(found.aliased)] != 0.0).any(axis=1)
    estimate, se, df = _without(unknown, K @ found.estimate, se, tests.each(K @ found.slopes))
    table = _tested(texts, estimate, se, df, conf_level)
    if adjust == "none" or not names:
        return table
    return _with_tests(table, *_adjusted(adjust, table, df, len(found.labels), conf_level))


def _leaning(aliased: Array) -> Array:
    """Which combinations are not estimable."""
    return np.asarray(np.abs(aliased).max(axis=1, initial=0.0) > ALIASED)


def _without(unknown: Array, *values: Array) -> list[Array]:
    """The values, NaN where they are not estimable."""
    return [np.where(unknown, math.nan, x) for x in values]


def _on_link(table: pa.Table, link: str, conf_level: float) -> pa.Table:
    """Means on the response's scale with the tests of their links' values and the intervals of these put back, as emmeans has them."""
    import pyarrow as pa

    mu, se, df = (_column(table, name) for name in ("estimate", "std_error", "df"))
    df = np.where(np.isfinite(df), df, np.inf)
    means = LINKS[link].means
    with np.errstate(all="ignore"):
        eta = linked(link, mu, 1.0 - mu)
        error = se / np.abs(means(eta).d1)
        half = np.array([t_quantile(conf_level, k) for k in df]) * error
        low, high = LINKS[link].ends(eta, half)
        t = eta / error
    p = np.array([t_tail(each, k) for each, k in zip(t, df, strict=True)])
    for name, values in {"statistic": t, "p_value": p, "conf_low": low, "conf_high": high}.items():
        column = pa.array(values, pa.float64(), mask=~np.isfinite(values))
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _tested(texts: Mapping[str, Sequence[Any]], estimate: Array, se: Array, df: Array, conf_level: float) -> pa.Table:
    """As `wald_table`, by t tests on `df` degrees of freedom, a further column; null where they are infinite."""
    import pyarrow as pa

    table = wald_table(texts, estimate, se, conf_level)
    place = table.schema.get_field_index("p_value")
    table = table.add_column(place, "df", pa.array(df, pa.float64(), mask=~np.isfinite(df)))
    p = np.array([t_tail(t, k) for t, k in zip(_column(table, "statistic"), df, strict=True)])
    return _with_tests(table, p, np.array([t_quantile(conf_level, k) for k in df]))


def _with_tests(table: pa.Table, p: Array, critical: Array) -> pa.Table:
    """The table with other p values and critical values of its intervals."""
    import pyarrow as pa

    estimate, se = _column(table, "estimate"), _column(table, "std_error")
    for name, values in (("p_value", p), ("conf_low", estimate - critical * se), ("conf_high", estimate + critical * se)):
        column = pa.array(values, pa.float64(), mask=~np.isfinite(values))
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _column(table: pa.Table, name: str) -> Array:
    return np.array(table.column(name).to_pylist(), dtype=float)


def _found(
    fit: MixedFit, tests: Tests, term: str | Sequence[str], kind: str, effects: str, at: Mapping[str, Any] | None, data: Any,
    options: Options | None,
) -> Found:  # fmt: skip
    """The means of the cells of `term`."""
    for value, name, known in ((kind, "kind", ("response", "link")), (effects, "effects", ("population", "marginal"))):
        if value not in known:
            raise ConfigError(f"{name} = {value!r} is not known", hint=did_you_mean(str(value), list(known)))
    integrate = effects == "marginal" and bool(fit.terms) and fit.link != "identity"
    if integrate and kind == "link":
        raise ConfigError("a mean over the random effects has no linear predictor", hint='kind="response", or effects="population"')
    wanted = [term] if isinstance(term, str) else list(term)
    grid = _Grid(fit, wanted, at or {}, integrate, data, options)
    rows = evaluated(fit, grid.columns)
    A, model = grid.averaging(), Means(fit, integrate)
    slopes = A @ (model.Q.T @ rows.F).T
    if integrate:
        held, gradient = model.at(rows.F, rows.offset)
        estimate, J = A @ held.mu, A @ gradient.T
    else:
        eta = A @ (model.gamma @ rows.F + (0.0 if rows.offset is None else rows.offset))
        back = LINKS[fit.link].means(eta) if kind == "response" else None
        estimate, J = (eta, slopes) if back is None else (back.mu, back.d1[:, None] * slopes)
    slopes = slopes @ model.R
    covariance = tests.between(slopes) if tests.ddf == "kenward-roger" else J @ model.covariance @ J.T
    aliased = A @ _aliased(fit, rows.F, data, options) if fit.dropped else np.zeros((len(A), 0))
    return Found(":".join(wanted), grid.labels, grid.base, estimate, covariance, slopes, aliased)


class _Grid:
    """The reference grid: `columns` of the data by name, one value a cell; the cells of `wanted`, with `labels`, vary slowest."""

    def __init__(
        self, fit: MixedFit, wanted: list[str], at: Mapping[str, Any], integrate: bool, data: Any, options: Options | None
    ) -> None:
        factors, others = _factors(fit), value_names(fit.recipe, False)
        fixed = _fixed_columns(fit)
        names = {label: name for name, v in factors.items() if name in fixed or integrate for label in (v.label, name)}
        for label in wanted:
            if label not in names:
                raise ConfigError(f"there is no factor {label!r} in the fixed part", hint=did_you_mean(label, sorted(names)))
        if not wanted or len({names[label] for label in wanted}) < len(wanted):
            raise ConfigError("name one factor, or several different ones")
        for name in at:
            if name not in others:
                raise ConfigError(f"at names {name!r}, which is no covariate of the model", hint=did_you_mean(name, others))
        levels = {name: _levels(variable, at.get(name)) for name, variable in factors.items()}
        first = [names[label] for label in wanted]
        for name in factors:
            if name not in fixed and not integrate and name not in at:
                levels[name] = levels[name][:1]  # of the random part alone: no matter for the linear predictor
        order = [*first, *(name for name in levels if name not in first)]
        if math.prod(len(levels[name]) for name in order) > MOST_CELLS:
            raise ConfigError(f"the reference grid has more than {MOST_CELLS:,} cells", hint="hold factors at one level by at=")
        cells = list(product(*(levels[name] for name in order)))
        self.columns: dict[str, list[Any]] = {name: [cell[i] for cell in cells] for i, name in enumerate(order)}
        self.labels = [":".join(map(level_label, cell)) for cell in product(*(levels[name] for name in first))]
        self.base = self.labels.index(":".join(_base(factors[name], levels[name]) for name in first))
        numeric = [name for name in others if name not in levels]
        given = {name: number_at(name, at[name]) for name in numeric if name in at}
        unknown = [name for name in numeric if name not in given]
        given |= covariate_means(fit, unknown, data, options) if unknown else {}
        self.columns |= {name: [given[name]] * len(cells) for name in numeric}
        self.n = len(cells)

    def averaging(self) -> Array:
        """The matrix (labels, cells) that averages over all else."""
        k = len(self.labels)
        return np.repeat(np.eye(k), self.n // k, axis=1) * (k / self.n)


def _factors(fit: MixedFit) -> dict[str, Variable]:
    """The source columns that are factors: those of categories, and logical ones that count as numbers."""
    recipe, out = fit.recipe, dict[str, Variable]()
    held = [v for label, v in recipe.variables.items() if label not in recipe.responses]
    for variable in held:
        if variable.kind == "category" and isinstance(variable.expression, expr.Column):
            out.setdefault(variable.expression.name, variable)
    for name in value_names(recipe, False):
        if recipe.kinds[name] == "logical" and name not in out:
            out[name] = Variable(expr.quoted_name(name), "category", expr.Column(name), levels=(False, True))
    return out


def _base(variable: Variable, levels: Sequence[Level]) -> str:
    """The base level that the formula states, else the first."""
    known = [level_label(level) for level in levels]
    return variable.ref if variable.ref in known else known[0]


def _fixed_columns(fit: MixedFit) -> set[str]:
    nodes = [node for term in fit.parsed.fixed for node in term.variables]
    return {name for node in nodes for name in expr.columns(node)}


def _levels(variable: Variable, chosen: Any) -> list[Level]:
    """The levels of a factor, or those that `at` names. Raises ConfigError for others."""
    levels = list(variable.levels)
    if chosen is None:
        return levels
    known = {level_label(level): level for level in levels}
    texts = [level_label(float(v) if isinstance(v, int | np.integer) and not isinstance(v, bool) else v) for v in values_at(chosen)]
    for text in texts:
        if text not in known:
            raise ConfigError(f"{text!r} is not a level of {variable.label}", hint=did_you_mean(text, list(known)))
    return [known[text] for text in texts]


def _aliased(fit: MixedFit, F: Array, data: Any, options: Options | None) -> Array:
    """How much features F (m, cells) lean on what the rows do not determine, (cells, k): one scan for the features' cross-products."""
    m, n = fit.recipe.n_covariates, 0.0
    gram = np.zeros((m, m))
    with scanned(fit, data, options) as scan:
        for rows in scan.rows():
            gram += rows.F @ rows.F.T
            n += rows.n
    note_scan(fit, "which means are estimable", data)
    return np.asarray(F.T @ undetermined(fit, gram, n))


# -- contrasts


def _coefficients(method: str | Mapping[str, Sequence[float]], labels: list[str], base: int) -> tuple[list[str], Array]:
    """Names and coefficients (contrasts, levels). Raises ConfigError."""
    k = len(labels)
    if isinstance(method, Mapping):
        K = np.array([list(row) for row in method.values()], dtype=float) if method else np.zeros((0, k))
        if K.ndim != 2 or K.shape[1] != k or not np.isfinite(K).all():
            raise ConfigError(f"each contrast needs {k} finite coefficients, one a level: {', '.join(labels)}")
        return list(method), K
    if method not in METHODS:
        raise ConfigError(f"method = {method!r} is not known", hint=did_you_mean(str(method), list(METHODS)))
    pairs = list(combinations(range(k), 2)) if method == "pairwise" else [(i, base) for i in range(k) if i != base]
    K = np.zeros((len(pairs), k))
    for row, (i, j) in enumerate(pairs):
        K[row, i], K[row, j] = 1.0, -1.0
    return [f"{labels[i]} - {labels[j]}" for i, j in pairs], K


def _adjusted(adjust: str, table: pa.Table, df: Array, levels: int, conf_level: float) -> tuple[Array, Array]:
    """Adjusted p values, and critical values of intervals: of a family of `levels` means, or of as many tests as are estimable."""
    p = _column(table, "p_value")
    m = max(int(np.isfinite(p).sum()), 1)
    if adjust != "tukey" or levels == 2:
        share = 1 if adjust == "tukey" else m
        critical = np.array([t_quantile(1.0 - (1.0 - conf_level) / share, k) for k in df])
        return (_holm(p) if adjust == "holm" else np.minimum(p * share, 1.0)), critical
    from scipy.stats import studentized_range

    size = np.abs(_column(table, "statistic")) * math.sqrt(2.0)
    df = np.where(np.isnan(df), np.inf, df)
    own, where = np.unique(df, return_inverse=True)  # quantiles take a while
    critical = np.array([studentized_range.ppf(conf_level, levels, k) for k in own])[where] / math.sqrt(2.0)
    return np.clip(studentized_range.sf(size, levels, df), 0.0, 1.0), critical


def _holm(p: Array) -> Array:
    """Holm's step-down p values (Holm 1979)."""
    out = np.full(len(p), math.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    stepped = p[order] * np.arange(len(order), 0, -1)
    out[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return out
