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
from .reduction import Reduced, theta_of
from .stats import SuffStats

if TYPE_CHECKING:
    import pyarrow as pa

    from .options import Options
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
    repeats); `beta` (p,), `covariance` (p, p) given theta; `gamma` (features,), X beta over features; `terms`, the random part; `sigma`;
    `loglik` (restricted if `reml`); `nobs`, `rows`, `n_blocks`; `converged`, `singular`, `score`, `evaluations`, `message`;
    `theta_covariance`, covariance of the solver's (theta, log sigma), NaN on the boundary; `seconds`; `info`.
    `source` is the data it came from (None after `mp.load`), `options` how it was read, `effects_table` the BLUPs where they were kept,
    `effects_tables` those of several factors, by group.
    """

    formula: str
    recipe: Recipe
    response: str
    reml: bool
    names: tuple[str, ...]
    dropped: tuple[str, ...]
    beta: Array
    covariance: Array
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

    family = "gaussian"
    more: ClassVar[tuple[str, ...]] = ()  # further fields that are written with the fit
    residual_scaled = True  # whether Λ is relative to sigma, as in a linear mixed model

    @property
    def effect_scale(self) -> float:
        """What the terms' factors are relative to."""
        return self.sigma if self.residual_scaled else 1.0

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
        """Estimates, standard errors, Wald tests and intervals of fixed effects and of variance parameters."""
        return variance.tidy(self, conf_level, ddf)

    def glance(self) -> pa.Table:
        """One row: nobs, likelihood, information criteria, status."""
        import pyarrow as pa

        table = pa.Table.from_pylist([self.facts()])
        at = table.schema.get_field_index("sigma")
        return table.set_column(at, "sigma", table.column(at).cast(pa.float64()))

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

    def icc(self) -> dict[str, float]:
        """Intraclass correlation per grouping factor: the share of the intercept variance (random slopes at zero)."""
        return variance.icc(self)

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
        return effects.ranef(self, wide=wide, stream=stream, group=group or groups[0])

    def ranefs(self) -> dict[str, pa.Table]:
        """The conditional modes of every grouping factor."""
        return {group: self.ranef(group) for group in self.groups}

    def predict(
        self,
        data: Any,
        *,
        effects: str | Sequence[str] = "conditional",
        kind: str = "response",
        new_levels: str = "population",
        ordered: bool = True,
        prefix: str = "",
        options: Options | None = None,
    ) -> pa.RecordBatchReader:
        """The rows of `data`, in their order, and `predicted`.

        `effects`: "conditional" on the random effects, "population" (random effects zero), "marginal" (the mean over them), or a list of
        factors. `kind`: "response" or "link". `new_levels`: "population", "null" or "raise" where the fit has not seen a level.
        """
        from . import scoring

        return scoring.predict(
            self, data, effects=effects, kind=kind, new_levels=new_levels, ordered=ordered, prefix=prefix, options=options
        )

    def augment(
        self, data: Any = None, columns: Sequence[str] | None = None, prefix: str = "", *, options: Options | None = None
    ) -> pa.RecordBatchReader:
        """The rows of `data` (the fit's own by default) with `fitted`, `resid` and `fitted_fixed`."""
        from . import scoring

        return scoring.augment(self, data, columns=columns, prefix=prefix, options=options)

    def write(
        self, target: Any, *, prefix: str = "mlpipe", mode: str = "error", run_id: str | None = None, ranef: bool = True
    ) -> None:
        """Writes the fit to a directory (`runs/<run_id>/*.parquet` and `fit.json`, the commit point), or as tables `<prefix>_…` to a
        DuckDB file (`.duckdb`, `.db`) or connection, in one transaction; `mode`: "error" (a fit is there), "overwrite", "append".

        A connection with a transaction open is refused by a ConfigError.
        """
        from . import store

        store.write(self, target, prefix=prefix, mode=mode, run_id=run_id, ranef=ranef)

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
    """A fitted linear mixed model; see MixedFit."""

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
            covariance=reduced.vcov(solution.vcov),
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
        )


def load(path: Any, *, prefix: str = "mlpipe", model: str | None = None, by: Mapping[str, Any] | None = None) -> Any:
    """The fit that `fit.write` wrote last to a directory, a DuckDB file or connection (there, under `prefix`), without data.

    Of a job with several fits, `model` and `by`, the values it is for, say which. Raises DataError where there is none, ConfigError
    where several match.
    """
    from . import store

    return store.load(path, prefix, model, by)
