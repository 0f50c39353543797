"""Subject-specific against population-average effects: both coefficient sets, and average marginal effects, in one scan.

The population-average mean of a row is E g⁻¹(x'beta + z'b) over the random effects (Zeger, Liang and Albert 1988). Its coefficients are
the least-squares projection of g(mean) on the model's own columns; the average marginal effect of a covariate is the mean over rows of
the mean's derivative by it, or of the difference between a level and the base level. Standard errors are by the delta method from the
covariance of (beta, theta), covariates taken as given.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import expr
from .covariates import ALIASED, Change, Rows, half_factor, note_scan, random_terms, scanned, touched, undetermined
from .design import Variable, level_label
from .formula import Formula
from .integrals import Integrated, integrated, linked
from .solve.link import LINKS
from .wald import check_level, roots, wald_table

if TYPE_CHECKING:
    import pyarrow as pa

    from .features import Recipe
    from .options import Options
    from .result import MixedFit

    Array = np.ndarray

STEP = 1e-4  # of the linear predictor, in central differences of the derivatives of means over random effects
APART = "delta-method errors of means over the random effects take coefficients and covariance parameters as independent"
KINDS = ("subject_specific", "population_average", "average_marginal")


@dataclass
class Target:
    """What an average marginal effect is of: its name, and the changes it compares (one: a derivative; two: a level and the base)."""

    term: str
    changes: tuple[Change, ...]


class Means:
    """Population means of rows and their gradient by the parameters (beta*, theta*), beta* = R beta over the columns F Q of the fit's
    `spread`; without `integrate` the means with random effects zero, and their gradient by beta*."""

    def __init__(self, fit: MixedFit, integrate: bool = True) -> None:
        self.fit, self.link, self.z = fit, fit.link, list(fit.recipe.z)
        self.Q, self.R = fit.spread.Q[: fit.recipe.n_covariates], fit.spread.R
        self.gamma = np.asarray(fit.gamma[: fit.recipe.n_covariates])
        curved = integrate and bool(random_terms(fit)) and fit.link != "identity"
        self.half = half_factor(fit) if curved else None
        self.terms = fit.terms if curved else ()

    @property
    def covariance(self) -> Array:
        """Of (beta*, theta*); theta on the boundary is taken as known."""
        p = len(self.fit.names)
        k = sum(len(t.names) * (len(t.names) + 1) // 2 for t in self.terms)
        if k and _apart(self.fit) and APART not in self.fit.info.get("notes", []):
            self.fit.info["notes"] = [*self.fit.info.get("notes", []), APART]
        return parameter_covariance(self.fit)[: p + k, : p + k]

    def at(self, F: Array, offset: Array | None) -> tuple[Integrated, Array]:
        """Means of rows with features F (m, n), and their gradient (parameters, n)."""
        eta = self.gamma @ F + (0.0 if offset is None else offset)
        h = self.half.T @ F[self.z] if self.half is not None else None
        means = integrated(self.link, eta, None if h is None else (h**2).sum(axis=0))
        gradient = [(self.Q.T @ F) * means.by_eta]
        if h is not None:
            gradient.append(self._variance_slopes(F, h) * means.by_variance)
        return means, np.vstack(gradient)

    def _variance_slopes(self, F: Array, h: Array) -> Array:
        """2 (Q'F_z)_i h_j, which is d z'Ψz / d theta* for h = half' F_z: entries of each lower triangle by column."""
        out, at = [], 0
        for term in self.terms:
            k, scaled = len(term.names), self.fit.effect_scale * term.Q.T @ F[self.z]
            out += [2.0 * scaled[i] * h[at + j] for j in range(k) for i in range(j, k)]
            at += k
        return np.stack(out)

    def along(self, F: Array, D: Array, offset: Array | None, moved: Array | None) -> tuple[Array, Array]:
        """The derivative (n,) of the mean along the direction D of the features and `moved` of the offset, and its gradient."""
        eta = self.gamma @ F + (0.0 if offset is None else offset)
        slope = self.gamma @ D + (0.0 if moved is None else moved)
        if self.half is None:
            at = integrated(self.link, eta, None)
            return at.by_eta * slope, (self.Q.T @ F) * (2.0 * at.by_variance * slope) + (self.Q.T @ D) * at.by_eta
        h, d = self.half.T @ F[self.z], self.half.T @ D[self.z]
        at = integrated(self.link, eta, (h**2).sum(axis=0))
        by_eta, by_variance = self._second(eta, slope, h, d)
        along_d = self._variance_slopes(F, d) + self._variance_slopes(D, h)
        over_theta = self._variance_slopes(F, h) * by_variance + along_d * at.by_variance
        value = at.by_eta * slope + at.by_variance * 2.0 * (h * d).sum(axis=0)
        return value, np.vstack([(self.Q.T @ F) * by_eta + (self.Q.T @ D) * at.by_eta, over_theta])

    def _second(self, eta: Array, slope: Array, h: Array, d: Array) -> tuple[Array, Array]:
        """Derivatives of the mean's by eta and by the variance |h|² along (slope, d), by a central difference whose step moves each row's
        linear predictor and random part by STEP, relative to their size where that is less than 1 and the link ends at 0."""
        speed = np.abs(slope) + np.sqrt((d**2).sum(axis=0))
        size = np.minimum(np.abs(eta), 1.0) if LINKS[self.link].partial else 1.0
        t = STEP * size / np.where(speed > 0.0, speed, 1.0)
        up, down = (integrated(self.link, eta + step * slope, ((h + step * d) ** 2).sum(axis=0)) for step in (t, -t))
        return (up.by_eta - down.by_eta) / (2.0 * t), (up.by_variance - down.by_variance) / (2.0 * t)


def parameter_covariance(fit: MixedFit) -> Array:
    """The covariance of (beta*, theta*, …), beta* as in `Spread`: the joint one where the fit has it, else beta* (by its robust covariance
    where it has one) and theta apart; what is on the boundary counts as known."""
    p, k = len(fit.names), len(fit.theta_covariance)
    V: Array = np.zeros((p + k, p + k))
    if _apart(fit):
        V[p:, p:] = fit.theta_covariance
    else:
        V = np.array(fit.joint)  # type: ignore[attr-defined]
    V[:p, :p] = fit.spread.star
    on_boundary = p + np.flatnonzero(np.isnan(np.diag(V)[p:]))
    V[on_boundary] = V[:, on_boundary] = 0.0
    return V


def _apart(fit: MixedFit) -> bool:
    """Whether coefficients and covariance parameters have no joint covariance."""
    return getattr(fit, "joint", None) is None or bool(fit.info.get("robust"))


def effects(fit: MixedFit, data: Any, conf_level: float, options: Options | None) -> pa.Table:
    """See `MixedFit.effects`."""
    check_level(conf_level)
    means, goals = Means(fit), targets(fit.recipe, fit.parsed)
    total = _Sums(len(fit.names), len(means.covariance), len(goals))
    reach = _Reach(fit, len(goals)) if fit.dropped else None
    with scanned(fit, data, options) as scan:
        changes = list(dict.fromkeys(change for goal in goals for change in goal.changes))
        places = {change: touched(change, fit.recipe) for change in changes}
        for rows in scan.rows(changes):
            total.add(means, rows, goals, places)
            if reach is not None:
                reach.add(rows, goals, places)
    note_scan(fit, "effects", data)
    V = means.covariance
    texts: dict[str, list[str]] = {"effect": [], "term": []}
    estimates, errors = [], []
    for kind, names, estimate, covariance in (
        (KINDS[0], list(fit.names), fit.beta, fit.covariance),
        (KINDS[1], list(fit.names), *((fit.beta, fit.covariance) if fit.link == "identity" else total.projected(means, V))),
        (KINDS[2], [goal.term for goal in goals], *total.averages(V)),
    ):
        texts["effect"] += [kind] * len(names)
        texts["term"] += names
        estimates.append(np.array(estimate, dtype=float))
        errors.append(roots(np.diag(covariance)))
    if reach is not None:
        unknown = reach.unknown(total.n)
        estimates[-1][unknown] = errors[-1][unknown] = np.nan
    degrees = float(getattr(fit, "df_test", np.inf))  # least squares' own
    return wald_table(texts, np.concatenate(estimates), np.concatenate(errors), conf_level, degrees)


class _Sums:
    """What the scan adds up: X*'X*, X*'g(mean), the latter's gradient; and per target the mean effect and its gradient."""

    def __init__(self, p: int, k: int, targets: int) -> None:
        self.gram, self.rhs, self.slopes = np.zeros((p, p)), np.zeros(p), np.zeros((p, k))
        self.n, self.effect, self.gradient = 0.0, np.zeros(targets), np.zeros((targets, k))

    def add(self, means: Means, rows: Rows, goals: list[Target], places: dict[Change, list[int]]) -> None:
        q = np.ones(rows.n) if rows.freq is None else rows.freq
        at, gradient = means.at(rows.F, rows.offset)
        X = means.Q.T @ rows.F
        target = linked(means.link, at.mu, at.nu)
        unlinked = LINKS[means.link].means(target).d1
        self.gram += (X * q) @ X.T
        self.rhs += X @ (q * (target if rows.offset is None else target - rows.offset))
        self.slopes += (X * (q / unlinked)) @ gradient.T
        self.n += float(q.sum())
        changed = _Changed(means, rows, places)
        for i, goal in enumerate(goals):
            value, slope = changed.effect(goal)
            self.effect[i] += float(q @ value)
            self.gradient[i] += slope @ q

    def projected(self, means: Means, V: Array) -> tuple[Array, Array]:
        """The projected coefficients and their covariance, in the user's coordinates."""
        J = np.linalg.solve(means.R, np.linalg.solve(self.gram, self.slopes))
        return np.linalg.solve(means.R, np.linalg.solve(self.gram, self.rhs)), J @ V @ J.T

    def averages(self, V: Array) -> tuple[Array, Array]:
        """The average marginal effects and their covariance."""
        J = self.gradient / self.n
        return self.effect / self.n, J @ V @ J.T


class _Reach:
    """Σ F F' of the rows, and per target that of the features which its effects compare: their difference where the link is the identity,
    else both sides. Where these lean on what the rows do not determine, as an empty cell, the effect is not estimable."""

    def __init__(self, fit: MixedFit, targets: int) -> None:
        m = fit.recipe.n_covariates
        self.fit, self.gram, self.of = fit, np.zeros((m, m)), np.zeros((targets, m, m))

    def add(self, rows: Rows, goals: list[Target], places: dict[Change, list[int]]) -> None:
        """Takes in a batch of rows."""
        q = np.ones(rows.n) if rows.freq is None else rows.freq
        self.gram += (rows.F * q) @ rows.F.T
        order = {change: k for k, change in enumerate(places)}
        for i, goal in enumerate(goals):
            sides = []
            for change in goal.changes:
                D = rows.F.copy() if len(goal.changes) == 2 else np.zeros_like(rows.F)
                D[places[change]] = rows.changed[order[change]]
                sides.append(D)
            for D in [sides[0] - sides[1]] if len(sides) == 2 and self.fit.link == "identity" else sides:
                self.of[i] += (D * q) @ D.T

    def unknown(self, n: float) -> Array:
        """Which targets' effects are not estimable."""
        N = undetermined(self.fit, self.gram, n)
        return np.asarray(np.einsum("mk,imj,jk->ik", N, self.of, N).max(axis=1, initial=0.0) > ALIASED**2 * n)


class _Changed:
    """Means of a batch of rows after each change; a base level's, which several targets compare with, once."""

    def __init__(self, means: Means, rows: Rows, places: dict[Change, list[int]]) -> None:
        self.means, self.rows, self.places = means, rows, places
        self.order = {change: k for k, change in enumerate(places)}
        self.held: dict[Change, tuple[Array, Array]] = {}

    def effect(self, goal: Target) -> tuple[Array, Array]:
        """The effect (n,) at each row and its gradient."""
        if len(goal.changes) == 1:
            change = goal.changes[0]
            D = np.zeros_like(self.rows.F)
            D[self.places[change]] = self.rows.changed[self.order[change]]
            return self.means.along(self.rows.F, D, self.rows.offset, self._offset(change))
        (level, g_level), (base, g_base) = (self._after(change) for change in goal.changes)
        return level - base, g_level - g_base

    def _after(self, change: Change) -> tuple[Array, Array]:
        if change not in self.held:
            F, offset = self.rows.F.copy(), self._offset(change)
            F[self.places[change]] = self.rows.changed[self.order[change]]
            at, gradient = self.means.at(F, self.rows.offset if offset is None else offset)
            self.held[change] = at.mu, gradient
        return self.held[change]

    def _offset(self, change: Change) -> Array | None:
        """The offset after the change, or its derivative; None where the change does not reach it."""
        return self.rows.offsets.get(self.order[change])


# -- what has an effect


def targets(recipe: Recipe, formula: Formula) -> list[Target]:
    """The covariates of the fixed part, in order: a derivative by each numeric column, a difference from the base for each other level."""
    labels = [expr.label(node) for term in formula.fixed for node in term.variables]
    variables = [recipe.variables[label] for label in dict.fromkeys(labels)]
    out: dict[expr.Node, list[Target]] = {}
    for variable in variables:
        if variable.kind == "category":
            out.setdefault(variable.expression, _levels(variable))
    discrete = set(out)
    for variable in variables:
        if variable.kind == "category":
            continue
        for name in dict.fromkeys(name for node in variable.columns for name in expr.columns(node)):
            column = expr.Column(name)
            if column not in discrete and column not in out:
                out[column] = _numeric(column, recipe.kinds[name])
    order = [node for v in variables for node in ([v.expression] if v.kind == "category" else _columns(v))]
    return [target for node in dict.fromkeys(order) for target in out.get(node, [])]


def _columns(variable: Variable) -> list[expr.Node]:
    return [expr.Column(name) for node in variable.columns for name in expr.columns(node)]


def _numeric(column: expr.Column, kind: str) -> list[Target]:
    if kind == "logical":
        true, false = (Change(column, expr.Logical(flag)) for flag in (True, False))
        return [Target(expr.label(column) + "TRUE", (true, false))]
    return [Target(expr.label(column), (Change(column),))] if kind == "number" else []


def _levels(variable: Variable) -> list[Target]:
    base = variable.ref if variable.ref is not None else level_label(variable.levels[0])
    nodes = {level_label(level): literal(level) for level in variable.levels}
    return [
        Target(variable.label + text, (Change(variable.expression, node), Change(variable.expression, nodes[base])))
        for text, node in nodes.items()
        if text != base
    ]


def literal(level: Any) -> expr.Node:
    """A level as an expression."""
    if isinstance(level, bool):
        return expr.Logical(level)
    return expr.Text(level) if isinstance(level, str) else expr.Number(level)
