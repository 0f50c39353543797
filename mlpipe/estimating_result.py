"""Fits by generalized estimating equations: estimates with their names again."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import coefficients, display
from .errors import ConfigError, did_you_mean
from .generalized_result import GeneralizedFit, common
from .layout import coefficients as digits
from .layout import printable
from .robust import few
from .solve.sandwich import covariance

if TYPE_CHECKING:
    import pyarrow as pa

    from .options import Options
    from .passes import Model
    from .solve.gee import GEESolution

    Array = np.ndarray

KINDS = ("robust", "model", "kauermann-carroll", "mancl-derouen")


@dataclass(kw_only=True, repr=False)
class GEEFit(GeneralizedFit):
    """A population-averaged fit; see MixedFit.

    Further fields: `corr`; `alpha`, the working correlation's parameters (of an unstructured one by pairs of `times`, the upper triangle
    by rows); `scale`, phi by Pearson moments without degrees of freedom taken off; `kind` of `vcov()`; `covariances` of all kinds:
    "robust" (Liang and Zeger 1986), "model", "kauermann-carroll" (2001) and "mancl-derouen" (2001); `quasi`, the quasi-likelihood over
    phi = 1, and `penalty`, the trace in QIC.
    """

    more: ClassVar[tuple[str, ...]] = (*GeneralizedFit.more, "corr", "alpha", "scale", "kind", "covariances", "times", "quasi", "penalty")
    corr: str = "exchangeable"
    alpha: Any = ()
    scale: float = 1.0
    kind: str = "robust"
    covariances: dict[str, Any] = field(default_factory=dict)
    times: Any = ()
    quasi: float = math.nan
    penalty: float = math.nan

    def __post_init__(self) -> None:
        self.alpha = np.asarray(self.alpha, dtype=float)

    @classmethod
    def from_solution(
        cls, text: str, model: Model, solution: GEESolution, data: Any, options: Options, family: str, corr: str, kind: str, times: Array
    ) -> GEEFit:
        """The fit from a solver's solution, in the user's coordinates."""
        p = len(model.fixed.names)
        stars = {name: covariance(solution.bread, meat) for name, meat in solution.look.meats.items()}
        stars["model"] = solution.bread * solution.phi
        missing = np.full((p, p), math.nan)
        made = {name: common(text, model, solution.beta, stars.get(name, missing), data, options) for name in KINDS}
        known = "robust" in stars and solution.phi > 0.0
        penalty = float(np.trace(solution.look.independence @ stars["robust"])) / solution.phi if known else math.nan
        fit = cls(
            **made[kind], terms=(), loglik=math.nan, converged=solution.converged, singular=False, score=solution.score,
            evaluations=solution.passes, message=solution.message, theta_covariance=np.zeros((0, 0)), corr=corr, alpha=solution.alpha,
            scale=solution.phi, kind=kind, covariances={name: made[name]["spread"].raw.tolist() for name in KINDS},
            times=_shown(times, model), quasi=solution.look.quasi, penalty=penalty,
        )  # fmt: skip
        fit.family = family
        fit.sigma = math.sqrt(solution.phi) if fit.has_residual else math.nan
        fit.info |= {"evaluations": solution.passes, "score": solution.score}
        return fit

    @property
    def dispersion(self) -> float:
        """phi, the scale."""
        return self.scale

    @property
    def n_params(self) -> int:
        """Coefficients, correlation parameters and the scale."""
        return len(self.names) + len(self.alpha) + 1

    @property
    def groups(self) -> list[str]:
        """There are no random effects; blocks are of `recipe.groups`."""
        return []

    def family_parameters(self) -> list[tuple[str, str, float, float]]:
        """None that has a standard error."""
        return []

    def vcov(self, kind: str | None = None) -> Array:
        """The covariance of the coefficients (p, p); `kind`: another than that of the fit, one of "robust", "model",
        "kauermann-carroll", "mancl-derouen". Raises ConfigError for others, DataError for a sandwich of one block."""
        if kind is None:
            return self.covariance
        if kind not in KINDS:
            raise ConfigError(f"kind = {kind!r} is not known", hint=did_you_mean(str(kind), list(KINDS)))
        if kind != "model":
            few(kind, [self.n_blocks])
        return np.array(self.covariances[kind])

    def correlation(self) -> pa.Table:
        """The working correlation: `time1`, `time2`, `estimate` of an unstructured one, else one row a parameter."""
        import pyarrow as pa

        if self.corr != "unstructured":
            return pa.table({"term": pa.array([self.corr] * len(self.alpha), pa.string()), "estimate": self.alpha})
        rows, columns = np.triu_indices(len(self.times), 1)
        first, second = ([self.times[i] for i in at] for at in (rows, columns))
        return pa.table({"time1": first, "time2": second, "estimate": self.alpha})

    def qic(self) -> dict[str, float]:
        """Pan's (2001) criterion "qic" = -2 Q + 2 tr(Ω V), Q over phi = 1 as in geepack; "qicu" with 2p in place of the trace "cic".

        Ω, the information of independence, is at this fit's beta and phi; geepack takes it from another fit, with independence.
        """
        out = {"qic": -2.0 * self.quasi + 2.0 * self.penalty, "qicu": -2.0 * self.quasi + 2.0 * len(self.names)}
        return out | {"cic": self.penalty, "quasi_likelihood": self.quasi}

    def tidy(self, conf_level: float = 0.95, ddf: str = "wald") -> pa.Table:
        """Estimates, standard errors, Wald tests and intervals."""
        if ddf != "wald":
            raise ConfigError(f"ddf = {ddf!r} is for linear mixed models", hint='ddf="wald"')
        return coefficients.tidy(self, conf_level, math.inf)

    def confint(self, method: str = "wald", level: float = 0.95, *, draws: int = 1000) -> pa.Table:
        """`term`, `conf_low`, `conf_high`."""
        return coefficients.intervals(self, method, level, math.inf)

    def r2(self, data: Any = None, *, options: Options | None = None) -> dict[str, float]:
        """There is none. Raises ConfigError."""
        raise ConfigError("a fit by estimating equations has no R²", hint="compare by qic()")

    def icc(self, at: Mapping[str, Any] | None = None, level: float | None = None) -> dict[str, Any]:
        """There is none. Raises ConfigError."""
        raise ConfigError("a fit by estimating equations has no random effects", hint="alpha is its working correlation")

    def summary(self) -> str:
        """The text that `print` shows."""
        return coefficients.text(self._head(), coefficients.text_rows(self, math.inf), self._foot(), display.notes_of(self))

    def _repr_html_(self) -> str:
        return coefficients.html(self._head(), coefficients.text_rows(self, math.inf), self._foot(), display.notes_of(self))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.formula!r}: {self.nobs:,.0f} rows, {self.n_blocks:,} blocks, {self.corr}>"

    def _head(self) -> list[str]:
        out = display.head(self, "Generalized estimating equations (population-averaged)")
        order = self.recipe.time or ("the order of rows" if self.recipe.by_row else None)
        by = f", by {printable(order)}" if order else ""
        errors = {"robust": "sandwich", "model": "model-based"}.get(self.kind, f"sandwich, corrected by {self.kind.title()}")
        return [*out, f"Working correlation: {self.corr}{by}", f"Standard errors: {errors}"]

    def _foot(self) -> list[str]:
        out = [f"Scale (phi): {digits([self.scale])[0]}"]
        if 0 < len(self.alpha) <= 1:
            out.append(f"Correlation (alpha): {digits([float(self.alpha[0])])[0]}")
        elif len(self.alpha):
            low, high = self.alpha.min(), self.alpha.max()
            out.append(f"Correlations: {len(self.alpha)} between {len(self.times)} times, from {low:.3f} to {high:.3f}")
        found = self.qic()
        blocks = f"{self.n_blocks} blocks of {printable(':'.join(self.recipe.groups))}"
        return [*out, f"QIC: {found['qic']:.1f}, QICu: {found['qicu']:.1f}", f"Number of obs: {self.nobs:.15g}, {blocks}"]


def _shown(times: Array, model: Model) -> list[Any]:
    """The levels of time as the user has them."""
    waves = model.plan.recipe.waves
    return [waves[int(t)] for t in times] if waves else [float(t) for t in times]
