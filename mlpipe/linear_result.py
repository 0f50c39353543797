"""Fits by least squares: estimates with their names again."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from . import coefficients, display
from .errors import ConfigError
from .layout import coefficients as digits
from .layout import p_value, printable
from .result import MixedFit, RandomTerm

if TYPE_CHECKING:
    import pyarrow as pa

    from .options import Options
    from .predictions import Output


@dataclass(kw_only=True, repr=False)
class OLSFit(MixedFit):
    """A fit by (weighted) least squares, pooled or with the effects of factors absorbed; see MixedFit.

    Further fields: `robust`, the kind of robust covariance (None: sigma² (X'WX)⁻¹); `cluster`, the columns that cluster the rows and
    `n_clusters` of each; `df_residual` = n - p - rank of what is absorbed; `df_test` of its t-tests (the least number of clusters - 1 with
    clusters, as Stata and fixest have it); `rss`, `tss` (about the mean if `centred`), `within_tss`; `absorbed_rank`.
    `terms` are the absorbed factors: intercepts of infinite variance. `ranef` gives their estimates, about the mean effect.
    """

    robust: str | None = None
    cluster: tuple[str, ...] = ()
    n_clusters: tuple[int, ...] = ()
    df_residual: float = math.nan
    df_test: float = math.nan
    rss: float = math.nan
    tss: float = math.nan
    within_tss: float = math.nan
    centred: bool = True
    absorbed_rank: int = 0

    more: ClassVar[tuple[str, ...]] = (
        "robust", "cluster", "n_clusters", "df_residual", "df_test", "rss", "tss", "within_tss", "centred", "absorbed_rank",
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.cluster, self.n_clusters = tuple(self.cluster), tuple(self.n_clusters)  # lists where they were read from a file

    @property
    def n_params(self) -> int:
        """Coefficients, absorbed effects and the residual variance."""
        return len(self.names) + self.absorbed_rank + 1

    @property
    def theta(self) -> np.ndarray:
        """There are no random effects."""
        return np.zeros(0)

    @property
    def absorb(self) -> tuple[str, ...]:
        """The factors whose effects were absorbed."""
        return tuple(term.group for term in self.terms)

    def family_parameters(self) -> list[tuple[str, str, float, float]]:
        """The residual standard deviation, its error by the normal theory."""
        return [("Residual", "sd__Observation", self.sigma, self.sigma / math.sqrt(2.0 * self.df_residual))]

    def output(self, what: str) -> Output:
        """See MixedFit; without random effects a marginal mean is the population's."""
        from .predictions import Output

        return Output(("population" if what == "marginal" else what,))

    def varcorr(self) -> pa.Table:
        """The residual variance."""
        import pyarrow as pa

        text, real = pa.string(), pa.float64()
        schema = pa.schema([("group", text), ("term1", text), ("term2", text), ("variance", real), ("sd", real)])
        return pa.Table.from_pylist([{"group": "Residual", "variance": self.sigma**2, "sd": self.sigma}], schema=schema)

    def tidy(self, conf_level: float = 0.95, ddf: str = "wald") -> pa.Table:
        """Estimates, standard errors, t-tests on `df_test` degrees of freedom and intervals."""
        if ddf != "wald":
            raise ConfigError(f"ddf = {ddf!r} is for mixed models", hint="least squares has exact or cluster degrees of freedom")
        return coefficients.tidy(self, conf_level, self.df_test)

    def confint(self, method: str = "wald", level: float = 0.95, *, draws: int = 1000) -> pa.Table:
        """`term`, `conf_low`, `conf_high` from t-quantiles."""
        return coefficients.intervals(self, method, level, self.df_test)

    def icc(self, at: Mapping[str, Any] | None = None, level: float | None = None) -> dict[str, Any]:
        """There is none. Raises ConfigError."""
        raise ConfigError("a fit by least squares has no intraclass correlation", hint="fit it by lmm", code="no_random_effects")

    def r2(self, data: Any = None, *, options: Options | None = None) -> dict[str, float]:
        """R² ("r2"), adjusted for degrees of freedom ("adjusted"), and of what varies within absorbed factors ("within")."""
        lost = self.rss / self.tss
        out = {"r2": 1.0 - lost, "adjusted": 1.0 - lost * (self.nobs - self.centred) / self.df_residual}
        return out | ({"within": 1.0 - self.rss / self.within_tss} if self.terms else {})

    def f_statistic(self) -> dict[str, float]:
        """Wald's F of all slopes: "f", "df1", "df2", "p_value"; by `vcov()`, so robust where that is. NaN where that has not their rank, as
        with fewer clusters than slopes."""
        from scipy.special import fdtrc

        slopes = [i for i, name in enumerate(self.names) if name != "(Intercept)"]
        if not slopes:
            raise ConfigError("the model has no slopes to test")
        b, V = self.beta[slopes], self.covariance[np.ix_(slopes, slopes)]
        d = np.sqrt(np.maximum(np.diag(V), 1e-300))
        whole = np.linalg.eigvalsh(V / np.outer(d, d))[0] > 1e-12
        f = float((b / d) @ np.linalg.solve(V / np.outer(d, d), b / d)) / len(slopes) if whole else math.nan
        return {"f": f, "df1": float(len(slopes)), "df2": self.df_test, "p_value": float(fdtrc(len(slopes), self.df_test, f))}

    def summary(self) -> str:
        """The text that `print` shows, after R's of an lm."""
        return coefficients.text(self._head(), coefficients.text_rows(self, self.df_test), self._foot(), display.notes_of(self))

    def _repr_html_(self) -> str:
        return coefficients.html(self._head(), coefficients.text_rows(self, self.df_test), self._foot(), display.notes_of(self))

    def _head(self) -> list[str]:
        title = "Linear model fit by least squares" if self.recipe.weights is None else "Linear model fit by weighted least squares"
        out = display.head(self, title)
        if self.terms:
            out.append(f"Absorbed: {'; '.join(f'{printable(group)}, {n} levels' for group, n in self.levels.items())}")
        if self.robust is None:
            return out
        if not self.cluster:
            return [*out, f"Standard errors: heteroskedasticity-robust ({self.robust})"]
        of = " and ".join(f"{n} clusters of {printable(name)}" for name, n in zip(self.cluster, self.n_clusters, strict=False))
        return [*out, f"Standard errors: cluster-robust ({self.robust}), {of}"]

    def _foot(self) -> list[str]:
        shares = self.r2()
        names = {"r2": "R-squared", "adjusted": "adjusted", "within": "within"}
        out = [
            f"Residual standard error: {digits([self.sigma])[0]} on {self.df_residual:.15g} degrees of freedom, {self.nobs:.15g} rows",
            ", ".join(f"{names[name]}: {value:.4f}" for name, value in shares.items()),
        ]
        if any(name != "(Intercept)" for name in self.names):
            found = self.f_statistic()
            degrees = f"{found['df1']:.0f} and {found['df2']:.15g}"
            known = f"{found['f']:.4g} on {degrees} df, p-value: {p_value(found['p_value'])}"
            out.append(f"F-statistic: {'none: too few clusters for all slopes' if math.isnan(found['f']) else known}")
        return out


def absorbed_term(group: str, recipe: Any) -> RandomTerm:
    """The intercepts of an absorbed factor: random effects of infinite variance."""
    Q = np.array([[1.0 if not recipe.features[i] else 0.0] for i in recipe.z])
    infinite = np.full((1, 1), math.inf)
    return RandomTerm(group, ("(Intercept)",), infinite, Q, np.ones((1, 1)), infinite)
