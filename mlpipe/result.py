"""Fit objects: estimates with their names again. Methods are one-line delegates to the modules that do the work."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import variance
from .errors import ConfigError, did_you_mean
from .features import Recipe
from .formula import Formula
from .reduction import Reduced, Spread, theta_of
from .stats import SuffStats

if TYPE_CHECKING:
    import pyarrow as pa

    from .compare import Comparison
    from .held import Held
    from .options import Options
    from .plot import Plots
    from .predictions import Output
    from .solve.lmm import LMMSolution

    Array = np.ndarray


@dataclass(frozen=True)
class RandomTerm:
    """One random term: its group and coefficient names, Λ in the user's coordinates (q, q), and how it stands in the
    solver's: columns F_z `Q` with b = `R`⁻¹ b*, relative factor `star`."""

    group: str
    names: tuple[str, ...]
    factor: Array
    Q: Array
    R: Array
    star: Array

    @property
    def design(self) -> Array:
        """The map (z features, q) that gives the term's columns."""
        return np.asarray(self.Q @ self.R)


@dataclass(repr=False)
class MixedFit:
    """A fitted mixed model.

    Fields: `formula`; `recipe`, `response` (what was summed, which response); `reml`; `names`, `dropped` (coefficients kept, and dropped as
    repeats); `beta` (p,), `spread`, their covariance given theta; `gamma` (features,), X beta over features; `terms`, the random part;
    `sigma`; `loglik` (restricted if `reml`); `nobs`, `rows`, `n_blocks`; `converged`, `singular`, `score`, `evaluations`, `message`;
    `theta_covariance`, covariance of the solver's (theta, log sigma), NaN on the boundary; `seconds`; `info`.
    `source` is the data it came from (None after `mp.load`), `options` how it was read, `effects_table` the BLUPs where they were kept,
    `effects_tables` those of several factors, by group. `written`: the run, model and values by which result tables tell its rows.
    """

    formula: str
    recipe: Recipe
    response: str
    reml: bool
    names: tuple[str, ...]
    dropped: tuple[str, ...]
    beta: Array
    spread: Spread
    gamma: Array
    terms: tuple[RandomTerm, ...]
    sigma: float
    loglik: float
    nobs: float
    rows: int
    n_blocks: int
    converged: bool
    singular: bool
    score: float
    evaluations: int
    message: str
    theta_covariance: Array
    seconds: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)
    source: Any = None
    options: Options | None = None
    effects_table: pa.Table | None = None
    effects_tables: dict[str, pa.Table] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)

    family = "gaussian"
    link = "identity"
    more: ClassVar[tuple[str, ...]] = ()  # further fields that are written with the fit
    residual_scaled = True  # whether Λ is relative to sigma, as in a linear mixed model

    @property
    def covariance(self) -> Array:
        """The covariance (p, p) of the fixed effects given theta."""
        return self.spread.raw

    @property
    def effect_scale(self) -> float:
        """What the terms' factors are relative to."""
        return self.sigma if self.residual_scaled else 1.0

    @property
    def dispersion(self) -> float:
        """The residual variance, phi of the Gaussian family."""
        return self.sigma**2

    @property
    def has_residual(self) -> bool:
        """Whether there is a residual scale."""
        return True

    def family_parameters(self) -> list[tuple[str, str, float, float]]:
        """(group, term, value, standard error) of parameters that are neither fixed effects nor Λ's."""
        return [("Residual", "sd__Observation", self.sigma, self.sigma * math.sqrt(self.theta_covariance[-1, -1]))]

    def output(self, what: str) -> Output:
        """How "conditional", "population", "marginal" means and the "residual" are made of what scoring computes by SQL."""
        from .predictions import Output

        return Output(("population" if what == "marginal" else what,))

    @property
    def theta(self) -> Array:
        """Relative covariance parameters, lower triangles by column, terms in order (as lme4 with one factor)."""
        return theta_of([term.factor for term in self.terms])

    @property
    def parsed(self) -> Formula:
        """The formula read again."""
        from .formula import parse

        return parse(self.formula)

    @property
    def n_params(self) -> int:
        """Coefficients, covariance parameters and the residual variance."""
        return len(self.names) + len(self.theta) + 1

    def fixef(self) -> dict[str, float]:
        """The fixed effects by name."""
        return dict(zip(self.names, self.beta.tolist(), strict=True))

    def vcov(self) -> Array:
        """Their covariance (p, p), with theta taken as known (as lme4)."""
        return self.covariance

    def varcorr(self) -> pa.Table:
        """Variances and covariances of the random effects, and the residual variance last."""
        return variance.varcorr(self)

    def tidy(self, conf_level: float = 0.95, ddf: str = "wald") -> pa.Table:
        """Estimates, standard errors, tests and intervals of fixed effects and of variance parameters.

        `ddf`: "wald" (z), "satterthwaite" (Giesbrecht and Burns 1985) or "kenward-roger" (1997, standard errors adjusted too; needs
        REML), which give `df` and t tests of the fixed effects of linear mixed models, from the statistics that the fit keeps.
        """
        return variance.tidy(self, conf_level, ddf)

    def confint(self, method: str = "wald", level: float = 0.95, *, draws: int = 1000) -> pa.Table:
        """Confidence intervals `term`, `conf_low`, `conf_high` of the fixed effects and, with R's names, the variance parameters.

        `method`: "wald"; "profile", where the signed root of the (ML or Laplace/AGQ) deviance is a normal quantile (Bates et al. 2015,
        section 5.1), from the statistics that a linear fit keeps, by passes over a spool made once for a generalized one; "boot",
        percentiles of `draws` parametric bootstrap fits (Efron and Tibshirani 1993; `options.seed`).
        Raises ConvergenceError where a profile has no limit, DataError where what is needed is gone.
        """
        from . import intervals

        return intervals.confint(self, method, level, draws)

    def test(self, hypothesis: Any, ddf: str = "wald") -> pa.Table:
        """Wald test of linear hypotheses on the fixed effects: `statistic` is χ² with `df`, or F with `df` and `df_denominator` (those
        of least squares have F, over the degrees of freedom of their t tests).

        `hypothesis`: text such as "x1 = x2 = 0" or "x1 - 2 * x2 = 1, x3 = 0", or a matrix (k, p) of contrasts that are zero.
        `ddf`: as in `tidy`; Satterthwaite's joint degrees of freedom are Fai and Cornelius's (1996).
        Raises ConfigError for what cannot be read or names no coefficient, for equations that contradict each other, and for more of
        them than the covariance can tell apart.
        """
        from . import hypotheses

        return hypotheses.test(self, hypothesis, ddf)

    def drop1(self) -> pa.Table:
        """Likelihood-ratio tests of the fixed terms that marginality lets go, each dropped alone: `term`, `n_params`, `loglik`, `aic`,
        `statistic`, `df`, `p_value`. Linear models by ML from their statistics, generalized ones by one more fit a term.
        """
        from . import hypotheses

        return hypotheses.drop1(self)

    def glance(self) -> pa.Table:
        """One row: nobs, likelihood, information criteria, status; null what the fit has not."""
        import pyarrow as pa

        known = {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in self.facts().items()}
        types = {name: pa.float64() for name, value in known.items() if value is None}
        return pa.table({name: pa.array([value], types.get(name)) for name, value in known.items()})

    def facts(self) -> dict[str, Any]:
        """What `glance` shows, by column."""
        deviance, k = -2 * self.loglik, self.n_params
        return {
            "nobs": int(self.nobs) if float(self.nobs).is_integer() else self.nobs,
            "n_dropped": int(self.info.get("rows_dropped", 0)),
            "n_params": k,
            "sigma": self.sigma if self.has_residual else None,
            "loglik": self.loglik,
            "deviance": deviance,
            "aic": deviance + 2 * k,
            "bic": deviance + k * math.log(self.nobs),
            "reml": self.reml,
            "converged": self.converged,
            "singular": self.singular,
            "passes": float(self.info.get("passes", 0)),
            "seconds": self.seconds,
        }

    def icc(self, at: Mapping[str, Any] | None = None, level: float | None = None) -> dict[str, Any]:
        """Intraclass correlation per grouping factor: the share of the intercept variance (random slopes at zero), or, where `at` gives
        values of all columns of the random part, of z'Ψz there (a list for lists). Generalized: on the latent scale. Raises ConfigError
        where there is none, and without `at` where a factor has no intercept.

        `level`: (share, low, high) in place of a share, by the delta method on the logit scale.
        """
        from . import quality

        return quality.icc(self, at, level)

    def r2(self, data: Any = None, *, options: Options | None = None) -> dict[str, float]:
        """Marginal and conditional R² (Nakagawa and Schielzeth 2013; with random slopes Johnson 2014; generalized: on the latent scale,
        Nakagawa, Johnson and Schielzeth 2017), a proportion counted as its trials. From the fit's sums; with precision weights, or for
        other `data`, by one scan."""
        from . import quality

        return quality.r2(self, data, options)

    def residuals(self, data: Any = None, *, options: Options | None = None) -> pa.Table:
        """Response and Pearson residuals given the random effects in summary: n, moments (excess kurtosis), quartiles; one scan. Each row
        counts once, whatever its `freq`.

        Quartiles are exact up to 16,384 rows, then from a sketch whose ranks are good to 0.1 % of the rows.
        """
        from . import quality

        return quality.residuals(self, data, options)

    def influence(self, top: int = 20, data: Any = None, *, group: str | None = None, options: Options | None = None) -> pa.Table:
        """The blocks whose deletion moves the fixed effects most, variances held: keys, `rows`, `leverage`, `cooks_distance` and, per
        coefficient, `dfbetas_<term>` (Cook 1977; Belsley, Kuh and Welsch 1980; for mixed models Christensen, Pearson and Johnson 1992).

        By decreasing distance; before all others, with nulls, blocks without which a coefficient is not determined. One scan; none
        over statistics of collect="blocks+xx". `group`: the factor whose levels are deleted, where there are several. Generalized models
        by one Newton step (Pregibon 1981), of several factors in the working linear model, from a spool made for it.
        """
        from . import influence

        return influence.influence(self, top, data, options, group)

    def normality(self) -> pa.Table:
        """Per random coefficient the standardized conditional modes in summary, and their correlation with normal quantiles.

        Standardized is b / sqrt(Var(b) - Var(b | y)), of variance 1 where the model holds (Lange and Ryan 1989).
        """
        from . import quality

        return quality.normality(self)

    def qq(self, of: str = "residuals", *, points: int = 200, data: Any = None, options: Options | None = None) -> pa.Table:
        """Sample against normal quantiles of Pearson residuals (one scan), or of a group's standardized conditional modes."""
        from . import quality

        return quality.qq(self, of, points, data, options)

    @property
    def groups(self) -> list[str]:
        """The grouping factors."""
        return list(dict.fromkeys(term.group for term in self.terms))

    @property
    def levels(self) -> dict[str, int]:
        """The number of levels of each grouping factor."""
        counts = self.info.get("levels") or dict.fromkeys(self.groups, self.n_blocks)
        return {group: int(counts[group]) for group in self.groups}

    def ranef(self, group: str | None = None, wide: bool = False, stream: bool = False) -> pa.Table | pa.RecordBatchReader:
        """Conditional modes (BLUPs) with conditional standard deviations and reliabilities; keys in the source's own types.

        Raises ConfigError where there are several factors and none is named.
        """
        from . import effects

        groups = self.groups
        if not groups:
            raise ConfigError("the model has no random effects", code="no_random_effects")
        if group is not None and group not in groups:
            raise ConfigError(f"there is no grouping factor {group!r}", hint=did_you_mean(group, groups))
        if len(groups) > 1 and group is None:
            raise ConfigError(f"several grouping factors: {', '.join(groups)}", code="several_factors", hint="name one, or use ranefs()")
        return effects.in_own_types(self, effects.ranef(self, wide=wide, stream=stream, group=group or groups[0]))

    def ranefs(self) -> dict[str, pa.Table]:
        """The conditional modes of every grouping factor."""
        return {group: self.ranef(group) for group in self.groups}

    def predict(
        self,
        data: Any,
        *,
        effects: str | Sequence[str] = "conditional",
        kind: str = "response",
        interval: str | None = None,
        level: float = 0.95,
        new_levels: str = "population",
        ordered: bool = True,
        prefix: str = "",
        options: Options | None = None,
    ) -> pa.RecordBatchReader:
        """The rows of `data`, in their order, and `predicted`.

        `effects`: "conditional" on the random effects, "population" (random effects zero), "marginal" (the mean over them), or a list of
        factors. `kind`: "response" or "link". `new_levels`: "population", "null" or "raise" where the fit has not seen a level.
        `ordered=False` allows the rows in any order; it is kept all the same, since it costs nothing. A connection of the user's with
        `preserve_insertion_order` off has no order to keep.

        `interval` adds `lower` and `upper`: "confidence" from the covariance of the fixed effects, and for conditional predictions the
        conditional variances of the random effects given theta (their covariance with the fixed effects left out; factors with several
        coefficients a level have none); on the link scale, then transformed. "prediction" (linear models) adds the residual variance
        (over the weight), and of levels that are not known, and factors left out, the variance of the random part. theta and sigma are
        taken as known.
        """
        from . import scoring

        return scoring.predict(
            self, data, effects=effects, kind=kind, interval=interval, level=level, new_levels=new_levels, prefix=prefix, options=options,
        )  # fmt: skip

    def augment(
        self, data: Any = None, columns: Sequence[str] | None = None, prefix: str = "", *, options: Options | None = None
    ) -> pa.RecordBatchReader:
        """The rows of `data` (the fit's own by default) with `fitted`, `resid` and `fitted_fixed`."""
        from . import scoring

        return scoring.augment(self, data, columns=columns, prefix=prefix, options=options)

    @property
    def plot(self) -> Plots:
        """`coefficients()`, `caterpillar()`, `residuals()`, `qq()`, `influence()`: each a table ready to draw, and an Altair chart."""
        from .plot import Plots

        return Plots(self)

    def effects(self, data: Any = None, conf_level: float = 0.95, *, options: Options | None = None) -> pa.Table:
        """Coefficients given the random effects ("subject_specific"), those of the means over them ("population_average"), and mean
        effects on these means over the rows ("average_marginal"). One scan of the fit's source, or of `data`.

        A numeric covariate's effect is the derivative by its column, in all terms; a factor's level is compared with the base level.
        """
        from . import averaged

        return averaged.effects(self, data, conf_level, options)

    def marginal(
        self, data: Any, block: Any = None, *, prefix: str = "", options: Options | None = None
    ) -> pa.Table | pa.RecordBatchReader:
        """The rows of `data` with `mean` and `variance` of the response, the random effects integrated out; or, of the rows of one block,
        `covariance` and `correlation`, a row each pair (`row1`, `row2` from 1 in the source's order; up to 1,000 rows).

        `block`: the value of the grouping column (a tuple of several), or a dict of grouping columns to values.
        """
        from . import implied

        return implied.rows(self, data, prefix, options) if block is None else implied.block(self, data, block, options)

    def means(
        self, term: str | Sequence[str], *, kind: str = "response", effects: str = "population",
        at: Mapping[str, Any] | None = None, ddf: str = "wald", data: Any = None, conf_level: float = 0.95,
        options: Options | None = None,
    ) -> pa.Table:  # fmt: skip
        """Marginal means over the levels of a factor, or of combinations of factors (Searle, Speed and Milliken 1980), as R's emmeans.

        Over a grid of all factors' levels, equally weighted, with numeric covariates at their means over the rows (one scan, kept with
        the fit) or as in `at`. Averages are of linear predictors; kind="response" transforms them back, with their intervals, and keeps
        their tests. effects="marginal" integrates the random effects out and averages means; its tests and intervals are by the link of
        these. `ddf`: as in `tidy`, with t tests and intervals on `df` degrees of freedom. What is not estimable is null.
        """
        from . import means

        return means.means(self, term, kind=kind, effects=effects, at=at, ddf=ddf, data=data, conf_level=conf_level, options=options)

    def contrasts(
        self, term: str | Sequence[str], method: str | Mapping[str, Sequence[float]] = "pairwise", *, adjust: str | None = None,
        kind: str = "response", effects: str = "population", at: Mapping[str, Any] | None = None, ddf: str = "wald", data: Any = None,
        conf_level: float = 0.95, options: Options | None = None,
    ) -> pa.Table:  # fmt: skip
        """Contrasts of `means`: differences of all pairs, of each level from the base level ("reference"), or named coefficients.

        `adjust`: "tukey" (the default for pairs), "bonferroni", "holm" (intervals by Bonferroni's) or "none" (the default else). `ddf`: as
        in `tidy`; each contrast has its own degrees of freedom.
        """
        from . import means

        return means.contrasts(
            self, term, method, adjust=adjust, kind=kind, effects=effects, at=at, ddf=ddf, data=data, conf_level=conf_level,
            options=options,
        )  # fmt: skip

    def simulate(self, n: int = 1, seed: int | None = None, *, prefix: str = "") -> pa.RecordBatchReader:
        """The rows of the fit's own source, in their order, with n simulated responses `sim_1`, `sim_2`, …: new random effects and new
        residuals at the estimates. Where there are trials, numbers of successes; null where a row was not used.

        `seed`: `options.seed` if None. Raises DataError where the source is gone or changed.
        """
        from . import simulation

        return simulation.simulate(self, n, seed, prefix)

    def write(
        self, target: Any, *, prefix: str = "mlpipe", mode: str = "error", run_id: str | None = None, ranef: bool = True
    ) -> None:
        """Writes the fit to a directory (`runs/<run_id>/*.parquet` and `fit.json`, the commit point), or as tables `<prefix>_…` to a
        DuckDB file (`.duckdb`, `.db`) or connection, in one transaction; `mode`: "error" (a fit is there), "overwrite", "append".

        A connection with a transaction open is refused by a ConfigError.
        """
        from . import store

        store.write(self, target, prefix=prefix, mode=mode, run_id=run_id, ranef=ranef)

    def scoring_sql(
        self, dialect: str = "duckdb", *, source: str = "data", effects: str | Sequence[str] = "conditional", kind: str = "response",
        new_levels: str = "population", prefix: str = "mlpipe",
    ) -> str:  # fmt: skip
        """A SELECT that predicts inside a warehouse as `predict` does: all columns of the table `source`, and `predicted`.

        `dialect`: "duckdb", "postgres", "snowflake", "bigquery" or "spark" (4 or later). Conditional predictions join the tables
        `<prefix>_ranef_<group>` that `write` leaves (`prefix` may start with a schema), of the run that the fit was written or loaded as.
        Raises ConfigError for columns that differ only by case, and for marginal means that have no SQL (random slopes with the links
        cauchit, inverse, sqrt, 1/mu^2).
        """
        from . import scoring_sql

        return scoring_sql.scoring_sql(
            self, dialect, source=source, effects=effects, kind=kind, new_levels=new_levels, prefix=prefix
        )

    def summary(self) -> str:
        """The text that `print` shows, with the correlation of the fixed effects."""
        from . import display

        return display.summary(self, correlation=True)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.formula!r}: {self.nobs:,.0f} rows, loglik {self.loglik:.6g}>"

    def _repr_html_(self) -> str:
        from . import display

        return display.html(self)


@dataclass(repr=False)
class LMMFit(MixedFit):
    """A fitted linear mixed model; see MixedFit. `held`: its statistics, while they are in memory or mapped."""

    held: Held | None = None

    def compare(self, conf_level: float = 0.95) -> Comparison:
        """A random-intercept fit beside pooled, cluster-robust, between and within estimates, with Hausman's (1978) and Mundlak's (1978)
        tests; from the statistics of the fit, and one more scan for the cluster-robust errors where these hold no block's X'X.

        Raises ConfigError for other random parts, DataError where statistics and source are gone or the source changed.
        """
        from .compare import compare

        return compare(self, conf_level)

    @classmethod
    def from_solution(
        cls,
        text: str,
        formula: Formula,
        stats: SuffStats,
        reduced: Reduced,
        solution: LMMSolution,
        theta_covariance: Array,
        data: Any,
        options: Options | None = None,
        held: Held | None = None,
    ) -> LMMFit:
        """The fit from a solver's solution, in the user's coordinates."""
        factors, stars = reduced.factors(solution.lambda_), reduced.split(solution.lambda_)
        terms = tuple(
            RandomTerm(term.group, term.names, factor, term.Q, term.R, star)
            for term, factor, star in zip(reduced.random, factors, stars, strict=True)
        )
        return cls(
            formula=text,
            recipe=stats.recipe,
            response=reduced.response,
            reml=reduced.problem.reml,
            names=reduced.fixed.names,
            dropped=reduced.fixed.dropped,
            beta=reduced.beta(solution.beta),
            spread=reduced.fixed.spread(solution.vcov * reduced.scale**2),
            gamma=reduced.linear_predictor(solution.beta),
            terms=terms,
            sigma=math.sqrt(solution.sigma2) * reduced.scale,
            loglik=-reduced.objective(solution.objective) / 2,
            nobs=stats.n,
            rows=stats.rows,
            n_blocks=stats.blocks.n_blocks if stats.blocks else 0,
            converged=solution.converged,
            singular=solution.singular,
            score=solution.score,
            evaluations=solution.evaluations,
            message=solution.message,
            theta_covariance=theta_covariance,
            info={**stats.info, "evaluations": solution.evaluations, "score": solution.score},
            source=data,
            options=options,
            held=held,
        )


def load(path: Any, *, prefix: str = "mlpipe", model: str | None = None, by: Mapping[str, Any] | None = None) -> Any:
    """The fit that `fit.write` wrote last to a directory, a DuckDB file or connection (there, under `prefix`), without data.

    Of a job with several fits, `model` and `by`, the values it is for, say which. Raises DataError where there is none, ConfigError
    where several match.
    """
    from . import store

    return store.load(path, prefix, model, by)
