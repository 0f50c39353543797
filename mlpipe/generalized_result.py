"""Fits of generalized models, mixed and plain: estimates with their names again."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import marginal
from .arrays import arrow
from .passes import first_tau
from .reduction import lower_factor, stacked_inverse
from .result import MixedFit, RandomTerm
from .solve.density import density
from .solve.glm import inverse

if TYPE_CHECKING:
    import pyarrow as pa

    from .options import Options
    from .passes import Model
    from .predictions import Output
    from .solve.glm import GLMSolution
    from .solve.glmm import GLMMSolution

    Array = np.ndarray

EXACT = 23.0  # fall of log dispersion that only an exact fit gives
SCALED = ("gaussian", "gamma", "inverse_gaussian")  # families with a residual scale
PARAMETER = {  # the family's parameter as a function of tau, and its name
    "gaussian": ("sd__Observation", -0.5), "gamma": ("shape", 1.0), "inverse_gaussian": ("shape", 1.0),
    "negbinomial": ("k", 1.0), "negbinomial1": ("alpha", 1.0), "beta": ("precision", 1.0),
}  # fmt: skip


@dataclass(kw_only=True, repr=False)
class GeneralizedFit(MixedFit):
    """What both kinds share: `family`, `link`, `nagq`, `curvature`; `tau`, log of the family's parameter, with its variance
    `tau_variance`."""

    family: str
    link: str
    nagq: int = 1
    curvature: str = "observed"
    tau: float = 0.0
    tau_variance: float = math.nan

    more: ClassVar[tuple[str, ...]] = ("family", "link", "nagq", "curvature", "tau", "tau_variance")
    residual_scaled = False

    @property
    def density(self) -> Any:
        """The family with its link."""
        return density(self.base_family, self.link)

    @property
    def base_family(self) -> str:
        """The family whose likelihood was maximized."""
        return self.recipe.family or self.family

    @property
    def dispersion(self) -> float:
        """phi where the variance is phi V(mu) / w (gaussian, gamma, inverse Gaussian, quasi families); the shape k, alpha or precision
        of the others; else 1."""
        if self.base_family in SCALED:
            return math.exp(-self.tau)
        if self.family != self.base_family:
            return self.sigma**2
        return math.exp(self.tau) if self.base_family in PARAMETER else 1.0

    @property
    def has_residual(self) -> bool:
        """Whether the family has a residual scale."""
        return self.base_family in SCALED

    def output(self, what: str) -> Output:
        """See MixedFit: means by the inverse link, marginal ones by integration, residuals on the scale of the response."""
        from .predictions import Output

        if what == "marginal":
            return Output(("population", "variance"), lambda eta, variance: marginal.mean(self, eta, variance))
        if what == "residual":
            best = "conditional" if self.terms else "population"
            return Output(("observed", best), lambda y, eta: y - marginal.mean(self, eta))
        return Output((what,), lambda eta: marginal.mean(self, eta))

    def influence(self, top: int = 20, data: Any = None, *, group: str | None = None, options: Options | None = None) -> pa.Table:
        """See MixedFit; by one Newton step from the estimates."""
        from . import influence_generalized

        return influence_generalized.influence(self, top, data, options, group)

    @property
    def n_params(self) -> int:
        """Coefficients, covariance parameters and the family's."""
        return len(self.names) + len(self.theta) + (self.base_family in PARAMETER)

    def family_parameters(self) -> list[tuple[str, str, float, float]]:
        """(group, term, value, standard error) of the family's parameter, if it has one."""
        if self.base_family not in PARAMETER:
            return []
        name, power = PARAMETER[self.base_family]
        value = math.exp(power * self.tau)
        return [("Residual", name, value, abs(power) * value * math.sqrt(max(self.tau_variance, 0.0)))]


@dataclass(kw_only=True, repr=False)
class GLMMFit(GeneralizedFit):
    """A fitted generalized linear mixed model; see MixedFit. `joint`: the covariance of (beta*, theta*, tau) together, beta* as in
    `Spread`, as it is written; None where it is not known."""

    more = (*GeneralizedFit.more, "joint")
    joint: list[list[float]] | None = None

    @property
    def joint_covariance(self) -> Array | None:
        """The same of beta itself, the solver's theta and tau."""
        if self.joint is None:
            return None
        p, out = len(self.names), np.array(self.joint)
        out[:p] = np.linalg.solve(self.spread.R, out[:p])
        out[:, :p] = np.linalg.solve(self.spread.R, out[:, :p].T).T
        return out

    @classmethod
    def from_solution(cls, text: str, model: Model, solution: GLMMSolution, data: Any, options: Options) -> GLMMFit:
        """The fit from a solver's solution, in the user's coordinates; needs the spool for the conditional modes."""
        p, shape = len(model.fixed.names), model.density.family.shape
        stars = _split(solution.lambda_, model)
        terms = tuple(
            RandomTerm(term.group, term.names, lower_factor(np.linalg.solve(term.R, star)), term.Q, term.R, star)
            for term, star in zip(model.random, stars, strict=True)
        )
        theta = slice(p, p + len(model.kernel.entries))
        fit = cls(
            **common(text, model, solution.psi[:p], solution.vcov[:p, :p], data, options),
            terms=terms,
            loglik=solution.loglik + model.rows.spool.constant,
            converged=solution.converged and not solution.rough,
            singular=solution.singular,
            score=solution.score,
            evaluations=solution.evaluations,
            message=_message(model, solution),
            theta_covariance=solution.vcov[theta, theta],
            nagq=model.kernel.nagq,
            curvature=options.curvature,
            tau=float(solution.psi[-1]) if shape else 0.0,
            tau_variance=float(solution.vcov[-1, -1]) if shape else math.nan,
        )
        fit.sigma = math.sqrt(fit.dispersion) if fit.has_residual else math.nan
        fit.joint = solution.vcov.tolist()
        fit.info |= {"evaluations": solution.evaluations, "score": solution.score, "information": solution.information}
        fit.effects_table = _modes(fit, model, solution)
        return fit


@dataclass(kw_only=True, repr=False)
class GLMFit(GeneralizedFit):
    """A fitted generalized linear model; `robust`: the kind of sandwich covariance, None for the model's own."""

    more = (*GeneralizedFit.more, "robust")
    robust: str | None = None

    @classmethod
    def from_glm(
        cls, text: str, model: Model, solution: GLMSolution, data: Any, options: Options, family: str, robust: str | None
    ) -> GLMFit:
        """The fit from a solver's solution; needs the spool for a sandwich covariance."""
        p, shape = len(model.fixed.names), model.density.family.shape
        quasi = family != model.density.family.name
        bread = inverse(solution.information)
        pearson = marginal.pearson(model, solution.psi) / max(model.rows.nobs - p, 1.0) if quasi else 1.0
        covariance = bread[:p, :p] * pearson
        if robust is not None:
            covariance = marginal.sandwich(model, solution.psi, bread, robust)[:p, :p]
        fit = cls(
            **common(text, model, solution.psi[:p], covariance, data, options),
            terms=(),
            loglik=math.nan if quasi else solution.loglik + model.rows.spool.constant,
            converged=solution.converged,
            singular=False,
            score=solution.score,
            evaluations=solution.passes,
            message=solution.message,
            theta_covariance=np.zeros((0, 0)),
            tau=float(solution.psi[-1]) if shape else 0.0,
            tau_variance=float(bread[-1, -1]) if shape and bread[-1, -1] > 0.0 else math.nan,
            robust=robust,
        )
        fit.family = family
        fit.sigma = math.sqrt(pearson) if quasi else math.sqrt(fit.dispersion) if fit.has_residual else math.nan
        fit.info |= {"evaluations": solution.passes, "score": solution.score, "information": solution.information}
        return fit


def common(text: str, model: Model, beta: Array, covariance: Array, data: Any, options: Options) -> dict[str, Any]:
    """What does not depend on the kind of fit."""
    recipe, rows, R = model.plan.recipe, model.rows, model.fixed.R
    info = {name: value for name, value in rows.info.items() if name != "modes"}
    return {
        "formula": text, "recipe": recipe, "response": recipe.responses[0], "reml": False, "names": model.fixed.names,
        "dropped": model.fixed.dropped, "beta": np.linalg.solve(R, beta), "spread": model.fixed.spread(covariance),
        "gamma": model.fixed.Q @ beta, "sigma": math.nan, "nobs": rows.nobs, "rows": rows.rows,
        "n_blocks": rows.spool.n_blocks if recipe.groups else 0, "info": info, "source": data if info["rescannable"] else None,
        "options": options, "family": model.density.family.name, "link": model.density.link.name,
    }  # fmt: skip


def _message(model: Model, solution: GLMMSolution) -> str:
    """How the search ended, and what may have kept it from going on."""
    message = f"{solution.rough} blocks have no proper mode" if solution.rough else solution.message
    if not solution.converged and model.density.leaves:
        message += f"; the link {model.density.link.name!r} can give means that the family has not"
    family = model.density.family
    if not solution.converged and family.shape and not family.vanishing and solution.psi[-1] > first_tau(model) + EXACT:
        message += "; the response is fitted exactly, its dispersion goes to zero"
    return message


def _split(lam: Array, model: Model) -> list[Array]:
    stops = np.cumsum([0, *(len(term.names) for term in model.random)])
    return [lam[a:b, a:b] for a, b in zip(stops[:-1], stops[1:], strict=True)]


def _modes(fit: GLMMFit, model: Model, solution: GLMMSolution) -> pa.Table:
    """The conditional modes and standard deviations of all blocks, in one more pass."""
    import pyarrow as pa

    from .effects import coefficient_names, key_names
    from .solve.kernel import Point

    kernel, spool, u = model.kernel, model.rows.spool, model.rows.info["modes"]
    point = Point(model.Q @ solution.psi[: model.Q.shape[1]], solution.lambda_, fit.tau)
    back = stacked_inverse([term.R for term in fit.terms])
    parts = spool.map(lambda chunk: kernel.posterior(chunk, point, u[:, chunk.blocks]))
    modes = back @ solution.lambda_ @ np.concatenate([part[0] for part in parts], axis=1)
    factor = np.einsum("ij,jkb->ikb", back, np.concatenate([part[1] for part in parts], axis=2))
    sds = np.sqrt((factor**2).sum(axis=1))
    assert spool.keys is not None
    columns: dict[str, Any] = dict(zip(key_names(fit.terms, fit.recipe.groups), spool.keys.columns, strict=True))
    for k, name in enumerate(coefficient_names(fit.terms)):
        columns |= {name: arrow(modes[k]), f"{name}_se": arrow(sds[k])}
    return pa.table(columns)
