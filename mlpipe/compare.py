"""A random-intercept model beside its alternatives, from the statistics of one scan: pooled, between, within, random effects; Hausman's and
Mundlak's tests of whether the covariates and the blocks' effects are uncorrelated."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import effects, robust
from .coefficients import critical
from .errors import ConfigError, DataError
from .layout import aligned, printable, to_decimals
from .layout import p_value as shown_p
from .least_squares import Projection, Solution, block_products, pooled, solved, within
from .options import Options
from .robust import Fitted, Source
from .solve.sandwich import cluster_factor, covariance, half
from .stats import SuffStats

if TYPE_CHECKING:
    import pyarrow as pa

    from .result import LMMFit

    Array = np.ndarray

ESTIMATORS = ("pooled", "pooled, cluster-robust", "between", "within", "random effects")


@dataclass(frozen=True)
class Estimate:
    """One estimator: coefficients by name with standard errors and the degrees of freedom of their t-tests (infinite: normal)."""

    names: tuple[str, ...]
    beta: Array
    covariance: Array
    degrees: float


@dataclass(frozen=True)
class Comparison:
    """What `LMMFit.compare` gives; print it. `estimates`: `estimator`, `term`, `estimate`, `std_error`, `statistic`, `df`, `p_value`,
    `conf_low`, `conf_high`; `tests`: `test`, `statistic`, `df`, `p_value`; `notes`: a sentence on each estimator, and what was read."""

    estimates: pa.Table
    tests: pa.Table
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = self.estimates.to_pylist()
        names = list(dict.fromkeys(row["term"] for row in rows))
        found = {(row["estimator"], row["term"]): row for row in rows}
        used = [name for name in ESTIMATORS if any(key[0] == name for key in found)]
        table = [["", *used]]
        for term in names:
            cells = (found.get((name, term)) for name in used)
            table.append([term, *("" if c is None else f"{c['estimate']:.5g} ({c['std_error']:.2g})" for c in cells)])
        tests = [["", "chi2", "df", "Pr(>chi2)"]]
        for row in self.tests.to_pylist():
            tests.append([row["test"], to_decimals(row["statistic"], 3), f"{row['df']:.0f}", shown_p(row["p_value"])])
        lines = ["Estimates (standard errors):", *aligned(table, left=1), "", *aligned(tests, left=1), ""]
        return "\n".join([*lines, *(printable(note) for note in self.notes)])


def compare(fit: LMMFit, conf_level: float) -> Comparison:
    """See `LMMFit.compare`."""
    _check(fit)
    stats, read = _statistics(fit)
    notes = list(read)
    formula = fit.parsed
    whole, inside = pooled(stats), within(stats)
    ordinary, fixed_effects = solved(stats, formula, whole), solved(stats, formula, inside)
    assert stats.blocks is not None
    m, n, p = stats.blocks.n_blocks, stats.n, len(ordinary.beta)
    s2 = ordinary.rss / (n - p)
    found = {"pooled": Estimate(ordinary.fixed.names, ordinary.coefficients, ordinary.raw(ordinary.bread) * s2, n - p)}
    clustered, how = _clustered(fit, stats, ordinary)
    notes += how
    if clustered is not None:
        found["pooled, cluster-robust"] = Estimate(ordinary.fixed.names, ordinary.coefficients, clustered, m - 1.0)
    if left_out := fixed_effects.fixed.dropped:
        notes.append(f"Within leaves out {', '.join(left_out)}, which the others tell once the blocks' means are taken off.")
    found |= _between(stats, fit, m)
    df = n - m - len(fixed_effects.beta)
    if len(fixed_effects.beta) and df > 0:
        V = fixed_effects.raw(fixed_effects.bread) * fixed_effects.rss / df
        found["within"] = Estimate(fixed_effects.fixed.names, fixed_effects.coefficients, V, df)
    found["random effects"] = Estimate(fit.names, fit.beta, fit.covariance, math.inf)
    return Comparison(_table(found, conf_level), _tests(fit, stats, ordinary, fixed_effects), (*_sentences(fit, found, n, m, df), *notes))


def _check(fit: LMMFit) -> None:
    if len(fit.terms) != 1 or fit.terms[0].names != ("(Intercept)",):
        raise ConfigError("compare is for models with one random intercept, (1 | group)", code="compare")


def _statistics(fit: LMMFit) -> tuple[SuffStats, list[str]]:
    """The fit's statistics: those it keeps, or collected again by one scan."""
    if fit.held is not None and not fit.held.stats.recipe.explained:  # else the response there is a residual
        return fit.held.stats, []
    from .collect import collect
    from .planning import prepare
    from .plans import Request

    recipe = fit.recipe
    with effects.reopened(fit) as engine:
        request = Request(
            fit.formula, weights=recipe.weights, freq=recipe.freq, offset=recipe.offset, contrasts=recipe.contrasts,
            responses=recipe.extra_responses, options=fit.options or Options(),
        )  # fmt: skip
        return collect(prepare(engine, request, like=recipe)), ["The statistics were not at hand: the rows were read again for them."]


def _clustered(fit: LMMFit, stats: SuffStats, ordinary: Solution) -> tuple[Array | None, list[str]]:
    """CR1 of pooled least squares: from statistics that hold each block's X'X, else by one scan."""
    recipe = stats.recipe
    fitted = Fitted(recipe, ordinary.fixed.Q, ordinary.e, half(ordinary.bread))
    read: list[str] = []
    if stats.collect == "blocks+xx":
        meat = robust.of_statistics(stats, fitted, "CR1", within=False)
    else:
        from .sql import Names

        try:
            with effects.reopened(fit) as engine:
                names = Names.of(engine.schema(), recipe.kinds)
                meat = robust.of_clusters(Source(engine, names), fitted, recipe.groups, "CR1")
        except DataError as error:
            if error.code != "no_source":
                raise
            return None, ['Cluster-robust errors need the rows, or statistics with collect="blocks+xx": neither is at hand.']
        read = ["The rows were read once more for the cluster-robust errors."]
    factor = cluster_factor("CR1", meat.clusters, stats.n, len(ordinary.beta))
    return ordinary.raw(covariance(ordinary.bread, meat.matrix)) * factor, read


def _between(stats: SuffStats, fit: LMMFit, m: int) -> dict[str, Estimate]:
    """Least squares on the blocks' means, each block once; none without degrees of freedom."""
    means = block_products(stats, lambda n: 1.0 / n**2)
    solution = solved(stats, fit.parsed, Projection(means))
    p = len(solution.beta)
    if m <= p:
        return {}
    return {"between": Estimate(solution.fixed.names, solution.coefficients, solution.raw(solution.bread) * solution.rss / (m - p), m - p)}


def _table(found: dict[str, Estimate], conf_level: float) -> pa.Table:
    import pyarrow as pa
    from scipy.special import ndtr, stdtr

    rows: list[dict[str, Any]] = []
    for name, e in found.items():
        width = critical(conf_level, e.degrees)
        for term, b, se in zip(e.names, e.beta.tolist(), np.sqrt(np.diag(e.covariance)).tolist(), strict=True):
            t = b / se if se > 0.0 else math.nan
            p = 2.0 * float(ndtr(-abs(t)) if math.isinf(e.degrees) else stdtr(e.degrees, -abs(t)))
            row = {"estimator": name, "term": term, "estimate": b, "std_error": se, "statistic": t, "p_value": p}
            row["df"] = None if math.isinf(e.degrees) else float(e.degrees)
            rows.append(row | {"conf_low": b - width * se, "conf_high": b + width * se})
    reals = ("estimate", "std_error", "statistic", "df", "p_value", "conf_low", "conf_high")
    schema = pa.schema([("estimator", pa.string()), ("term", pa.string()), *((name, pa.float64()) for name in reals)])
    return pa.Table.from_pylist(rows, schema=schema)


def _tests(fit: LMMFit, stats: SuffStats, ordinary: Solution, inside: Solution) -> pa.Table:
    """Hausman's (1978) test with one sigma² and Mundlak's (1978) Wald test of the block means: the same number by two ways."""
    import pyarrow as pa
    from scipy.special import chdtrc

    found = {"Hausman": hausman(fit, stats, ordinary, inside), "Mundlak": mundlak(fit, stats, ordinary, inside)}
    rows: list[dict[str, Any]] = [{"test": name, "statistic": x, "df": float(df)} for name, (x, df) in found.items()]
    for row, (x, df) in zip(rows, found.values(), strict=True):
        row["p_value"] = float(chdtrc(df, x)) if df else 1.0
    schema = pa.schema([("test", pa.string()), ("statistic", pa.float64()), ("df", pa.float64()), ("p_value", pa.float64())])
    return pa.Table.from_pylist(rows, schema=schema)


def _psi(fit: LMMFit) -> float:
    return float(fit.terms[0].factor[0, 0]) ** 2


def hausman(fit: LMMFit, stats: SuffStats, ordinary: Solution, inside: Solution) -> tuple[float, int]:
    """(b_W - b_RE)'[V_W - V_RE]⁻¹(b_W - b_RE) over the slopes that vary within blocks, both covariances with the model's sigma²; b_RE as
    the within regression of the fitted values has it, so that without an intercept the effects of a factor are differences in both."""
    psi, Q, M = _psi(fit), ordinary.fixed.Q, inside.fixed.Q
    A = stats.gram - block_products(stats, lambda n: psi / (1.0 + psi * n))
    G = within(stats).gram
    P = inside.bread @ (M.T @ G @ Q)
    V = inside.bread - P @ np.linalg.inv(Q.T @ A @ Q) @ P.T
    return _wald(inside.beta - P @ (ordinary.fixed.R @ fit.beta), V * fit.sigma**2)


def mundlak(fit: LMMFit, stats: SuffStats, ordinary: Solution, inside: Solution) -> tuple[float, int]:
    """The Wald test of the block means of these covariates, added to the model at its variance parameters."""
    psi = _psi(fit)
    A = stats.gram - block_products(stats, lambda n: psi / (1.0 + psi * n))
    C = block_products(stats, lambda n: 1.0 / n - psi / (1.0 + psi * n))  # x̄'V⁻¹x
    X, M = ordinary.fixed.Q, inside.fixed.Q
    y = ordinary.e + ordinary.gamma
    over = np.linalg.solve(X.T @ A @ X, X.T @ np.column_stack([C @ M, A @ y]))
    S = M.T @ C @ M - M.T @ C @ X @ over[:, :-1]  # what the means add to the model: gamma = S⁻¹g, and gamma'V⁻¹gamma = g'S⁻¹g
    g = M.T @ C @ y - M.T @ C @ X @ over[:, -1]
    d = np.sqrt(np.diag(M.T @ stats.gram @ M))
    values, vectors = np.linalg.eigh(S / np.outer(d, d))
    kept = values > 1e-9
    along = vectors[:, kept].T @ (g / d)
    return float((along**2 / values[kept]).sum()) / fit.sigma**2, int(kept.sum())


def _wald(difference: Array, V: Array) -> tuple[float, int]:
    """d'V⁻d and the rank of V."""
    if not len(difference):
        return 0.0, 0
    d = np.sqrt(np.maximum(np.diag(V), 0.0))
    d[d == 0.0] = 1.0
    values, vectors = np.linalg.eigh(V / np.outer(d, d))
    kept = values > 1e-9
    along = vectors[:, kept].T @ (difference / d)
    return float((along**2 / values[kept]).sum()), int(kept.sum())


def _sentences(fit: LMMFit, found: dict[str, Estimate], n: float, m: int, df: float) -> list[str]:
    """What each estimator assumes and how it differs."""
    psi = _psi(fit)
    share = psi * n / m / (1.0 + psi * n / m)
    out = [
        "Pooled: ignores the blocks; its coefficients mix what holds within and between them, its plain errors take rows as independent.",
        "Cluster-robust: the same coefficients, with errors that allow any correlation within a block (Liang and Zeger 1986).",
        f"Between: least squares on the {m:,} block means; says how blocks differ, and takes on whatever else differs between them.",
        "Within: each block has its own mean, so nothing constant in a block can bias it, and no coefficient of such a covariate is there.",
    ]
    if df > 0:
        out.append(
            f"Neyman and Scott (1948): those {m:,} means cost degrees of freedom; residual variance by maximum likelihood would come out "
            f"{1.0 - df / n:.1%} too small however many blocks there are, so that N - blocks - p = {df:,.0f} divides here."
        )
    out.append(
        f"Random effects: weighs both; a block of average size has {share:.0%} of its own mean taken off. Efficient if block effects and "
        "covariates are uncorrelated, which the tests below question: a small p-value speaks for within, or for adding block means."
    )
    return [line for line in out if not (line.startswith("Cluster") and "pooled, cluster-robust" not in found)]
