"""How to read a fit, in sentences about this very model. Every sentence is HTML, what comes from the user escaped."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from . import expr
from .covariates import random_terms
from .design import Atom, DesignColumn, code, level_label
from .display import ZERO_WEIGHT
from .errors import ConfigError
from .page import code as name
from .page import text
from .variance import covariances

if TYPE_CHECKING:
    from .result import MixedFit

MOST = 3  # coefficients that are put into words
BOUNDARY = 1e-4  # least eigenvalue of a correlation matrix below which it has lost rank
WEAK = 0.2  # correlation, in size, below which it is called weak
NOTABLE = 0.05  # share of rows left out from which it is said
SHRINKING = ("logit", "probit", "cloglog", "cauchit")  # links whose means over random effects differ by less
RATIOS = {"logit": "odds", "log": "mean"}  # what a coefficient multiplies, by link


def sentences(fit: MixedFit) -> list[str]:
    """What the model is, what its largest coefficients say, how its groups differ, and what to be careful about."""
    return [*_cautions(fit), _model(fit), *_coefficients(fit), *_random(fit), *_explained(fit), *_alternatives(fit)]


def number(value: float | None) -> str:
    """Three significant digits, thousands apart; "unknown" for what is not finite."""
    if value is None or not math.isfinite(value):
        return "unknown"
    size = abs(value)
    if value and (size < 1e-3 or size >= 1e7):
        return f"{value:.2e}"
    places = max(0, 2 - math.floor(math.log10(size))) if value else 0
    return f"{value:,.{places}f}"


def response(fit: MixedFit) -> str:
    """What is modelled, as HTML."""
    node = fit.recipe.formula.response
    if node is None:
        return "the response"
    if fit.recipe.family == "binomial":
        return f"the probability {_event(fit, node)}"
    return f"the mean of {name(expr.label(node))}" if fit.recipe.family else name(expr.label(node))


def _event(fit: MixedFit, node: expr.Node) -> str:
    """Of what a binomial model gives the probability."""
    if fit.recipe.success is not None:
        return f"that {name(expr.label(node))} is {name(fit.recipe.success)}"
    return f"of {name(expr.label(node.args[0] if isinstance(node, expr.Call) and node.function == 'cbind' else node))}"


def ratio_name(fit: MixedFit) -> str:
    """What exp(coefficient) is called; "" for links where it means nothing."""
    if fit.recipe.family is None or fit.link not in RATIOS:
        return ""
    if fit.link == "logit":
        return "Odds ratio" if fit.recipe.family == "binomial" else ""
    return "Rate ratio" if fit.recipe.family in ("poisson", "negbinomial", "negbinomial1") else "Ratio of means"


# -- what to be careful about


def _cautions(fit: MixedFit) -> Iterator[str]:
    if not fit.converged:
        why = f": {text(fit.message)}" if fit.message else ""
        yield (
            f"<strong>The search for the estimates did not come to an end{why}.</strong> Do not use these numbers: fit again from other "
            f"starting values, or a simpler model."
        )
    if separated := fit.info.get("separation"):
        them = ", ".join(map(name, separated))
        yield (
            f"<strong>{them} predict the outcome without error in these rows (separation).</strong> No finite estimate exists: read the "
            f"size of {'it' if len(separated) == 1 else 'them'} as “very large”, and not the standard error."
        )
    if fit.singular:
        yield _singular(fit)
    if fit.dropped:
        verbs = ("repeats", "was") if len(fit.dropped) == 1 else ("repeat", "were")
        yield f"{', '.join(map(name, fit.dropped))} {verbs[0]} what other columns already say, and {verbs[1]} left out."
    read, lost = fit.info.get("rows_read") or 0, fit.info.get("rows_dropped") or 0
    weighted = any(cause.startswith(ZERO_WEIGHT) for cause in fit.info.get("dropped", {}))
    if read and lost / read > NOTABLE and not weighted:
        yield (
            f"{100 * lost / read:.0f}% of the rows were left out because a value is missing in them. If what makes a value missing also "
            f"moves {response(fit)}, the estimates are off."
        )


def _singular(fit: MixedFit) -> str:
    found = []
    for term, psi in zip(fit.terms, covariances(fit), strict=True):
        sd = [math.sqrt(max(float(psi[i, i]), 0.0)) for i in range(len(psi))]
        found += [f"the variance of {name(c)} by {name(term.group)} is zero" for c, s in zip(term.names, sd, strict=True) if s == 0.0]
        for i in range(len(psi)):
            for j in range(i):
                if sd[i] * sd[j] > 0.0 and abs(psi[i, j]) > (1.0 - BOUNDARY) * sd[i] * sd[j]:
                    sign = "1" if psi[i, j] > 0 else "-1"
                    found.append(f"{name(term.names[i])} and {name(term.names[j])} by {name(term.group)} are correlated by {sign}")
    what = f" ({'; '.join(found)})" if found else ""
    return (
        f"<strong>The fit is singular{what}.</strong> The rows do not tell this part of the random structure apart from nothing. The "
        f"coefficients can be used; the size of that part, and tests of it, cannot. A simpler random part would fit as well."
    )


# -- the model


def _model(fit: MixedFit) -> str:
    if fit.recipe.groups and not fit.terms and hasattr(fit, "corr"):
        by = name(":".join(fit.recipe.groups))
        return (
            f"The model describes {response(fit)} on average over all {by}, of which there are {fit.n_blocks:,}. Rows of one {by} may "
            f"depend on each other (working correlation: {text(fit.corr)}); the coefficients compare averages, not rows of one {by}."
        )
    terms = random_terms(fit)
    if not terms:
        absorbed = [term.group for term in fit.terms]
        within = f", within levels of {' and '.join(map(name, absorbed))}: what differs between these is taken out" if absorbed else ""
        return f"The model describes {response(fit)} by a single equation for all rows{within}."
    parts = []
    for group in fit.groups:
        own = [c for term in terms if term.group == group for c in term.names]
        slopes = [name(c) for c in own if c != "(Intercept)"]
        level = "its own level" if "(Intercept)" in own else ""
        slope = f"its own effect of {_joined(slopes)}" if slopes else ""
        parts.append(f"each {name(group)} (there are {fit.levels[group]:,}) has {_joined([p for p in (level, slope) if p])}")
    return (
        f"The model describes {response(fit)} by an equation common to all rows, around which {'; '.join(parts)}. These deviations "
        f"are taken to be draws from a normal distribution with mean zero."
    )


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


# -- coefficients


@dataclass(frozen=True)
class _Effect:
    """A column of the design in words: `what` changes (HTML), and whether it stands in an interaction too."""

    what: str
    conditional: bool


def _coefficients(fit: MixedFit) -> Iterator[str]:
    """The clearest coefficients that have a plain meaning; what interactions mean."""
    rows = [row for row in fit.tidy().to_pylist() if row["effect"] == "fixed" and row["term"] != "(Intercept)"]
    meant = _effects(fit)
    plain = [row for row in rows if row["term"] in meant and row["std_error"] is not None and math.isfinite(row["statistic"])]
    plain.sort(key=lambda row: -abs(row["statistic"]))
    for row in plain[:MOST]:
        yield _coefficient(fit, row, meant[row["term"]])
    joint = any(len(monomial) > 1 for c in code(fit.recipe.formula.fixed, fit.recipe.variables) for monomial, _ in c.combination)
    if joint:
        yield "Coefficients whose names have a colon say by how much the effect of one variable changes with the other."
    if (left := len(rows) - len(plain[:MOST])) and len(plain) > MOST:
        yield f"{'The other ' + str(left) + ' coefficients are' if left > 1 else 'One more coefficient is'} in the table below."


def _coefficient(fit: MixedFit, row: dict[str, Any], effect: _Effect) -> str:
    b, low, high = row["estimate"], row["conf_low"], row["conf_high"]
    of = response(fit)
    if ratio_name(fit):
        multiplied = of.replace("the probability", "the odds", 1) + " are" if fit.link == "logit" else f"{of} is"
        says = f"{multiplied} {number(_exp(b))} times as high (95% interval {number(_exp(low))} to {number(_exp(high))})"
    elif fit.recipe.family is not None and fit.link != "identity":
        says = f"{of} changes, on the scale of the {text(fit.link)} link, by {number(b)} (95% interval {number(low)} to {number(high)})"
    else:
        way = "higher" if b > 0 else "lower"
        says = f"{of} is {number(abs(b))} {way} on average (95% interval of the difference {number(low)} to {number(high)})"
    hold = "where what it interacts with is zero or at its base level" if effect.conditional else "all else equal"
    sure = "" if low > 0 or high < 0 else ": the interval includes no effect at all, so its direction is open"
    return f"With {effect.what}, {says}, {hold}{sure}."


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _effects(fit: MixedFit) -> dict[str, _Effect]:
    """The coefficients that have a plain meaning."""
    columns = code(fit.recipe.formula.fixed, fit.recipe.variables)
    joint = {atom.variable for c in columns for monomial, _ in c.combination if len(monomial) > 1 for atom in monomial}
    based = any(c.name == "(Intercept)" for c in columns)
    out = {}
    for c in columns:
        if (atom := _single(c)) is not None and (what := _meant(fit, atom, based)):
            out[c.name] = _Effect(what, atom.variable in joint)
    return out


def _single(column: DesignColumn) -> Atom | None:
    """The one atom of a column that is nothing else."""
    if len(column.combination) != 1:
        return None
    (monomial, factor), = column.combination
    return monomial[0] if len(monomial) == 1 and factor == 1.0 else None


def _meant(fit: MixedFit, atom: Atom, based: bool) -> str:
    variable = fit.recipe.variables[atom.variable]
    if variable.kind != "category":
        return f"one unit more of {name(variable.label)}" if variable.basis is None and len(variable.columns) == 1 else ""
    if variable.contrast != "treatment" or not based:
        return ""
    base = variable.ref if variable.ref is not None else level_label(variable.levels[0])
    shown = expr.label(variable.expression)
    return f"{name(shown)} = {name(atom.part)} rather than {name(base)}"


# -- the random part


def _random(fit: MixedFit) -> Iterator[str]:
    fixed = fit.fixef()
    scale = "" if fit.recipe.family is None or fit.link == "identity" else f" (on the scale of the {text(fit.link)} link)"
    for term, psi in zip(random_terms(fit), covariances(fit), strict=False):
        if degenerate(psi):  # said among the cautions
            continue
        sd = {c: math.sqrt(float(psi[i, i])) for i, c in enumerate(term.names)}
        for c, s in sd.items():
            yield _spread(fit, term.group, c, s, fixed.get(c), scale)
        if len(term.names) == 2:
            yield from _correlated(term.group, term.names, float(psi[1, 0]) / math.prod(sd.values()))


def degenerate(psi: np.ndarray) -> bool:
    """Whether a covariance matrix is on the boundary: some combination of its effects does not vary."""
    sd = np.sqrt(np.maximum(np.diag(psi), 0.0))
    return not (sd > 0.0).all() or float(np.linalg.eigvalsh(psi / np.outer(sd, sd))[0]) < BOUNDARY


def _spread(fit: MixedFit, group: str, c: str, s: float, center: float | None, scale: str) -> str:
    if c == "(Intercept)":
        factor = f", a factor of {number(_exp(s))} either way" if ratio_name(fit) else ""
        return f"The levels of {name(group)} differ: two in three lie within {number(s)}{scale} of the common level{factor}."
    if center is None:
        return f"The effect of {name(c)} varies between levels of {name(group)} with a standard deviation of {number(s)}{scale}."
    low, high = center - 1.96 * s, center + 1.96 * s
    other = NormalDist().cdf(-abs(center) / s)
    turned = f"about {100 * other:.0f}% have an effect of the other sign" if other >= 0.005 else "hardly any has one of the other sign"
    return (
        f"The effect of {name(c)}{scale} is {number(center)} on average and varies between levels of {name(group)}: it is between "
        f"{number(low)} and {number(high)} for 95% of them, and {turned}."
    )


def _correlated(group: str, names: tuple[str, ...], r: float) -> Iterator[str]:
    first, second = ("level" if c == "(Intercept)" else f"effect of {name(c)}" for c in names)
    if abs(r) < WEAK:
        yield f"The {first} of a {name(group)} says little about its {second} (correlation {r:.2f})."
    else:
        way = "higher" if r > 0 else "lower"
        yield f"The higher the {first} of a {name(group)}, the {way} its {second} tends to be (correlation {r:.2f})."


def shares(fit: MixedFit) -> dict[str, float]:
    """The intraclass correlations; none for families whose residuals have no variance on the latent scale, nor without intercepts."""
    try:
        return {group: share for group, share in fit.icc().items() if math.isfinite(share)}
    except ConfigError as error:
        if error.code not in ("no_latent_scale", "at"):
            raise
        return {}


def _explained(fit: MixedFit) -> Iterator[str]:
    if not random_terms(fit):
        return
    latent = "" if fit.recipe.family is None or fit.link == "identity" else " (on the scale of the linear predictor)"
    for group, share in shares(fit).items():
        if share < 0.005:
            yield f"Hardly any of the variance that the fixed part leaves{latent} lies between levels of {name(group)}."
        else:
            slopes = any(c != "(Intercept)" for term in fit.terms for c in term.names)
            where = " (where the variables with slopes of their own are zero)" if slopes else ""
            rows = f": two rows of one {name(group)} are correlated by as much" if not latent and len(fit.groups) == 1 else ""
            yield (
                f"{100 * share:.0f}% of the variance that the fixed part leaves{latent} lies between levels of {name(group)}{where}"
                f"{rows} (intraclass correlation {share:.2f})."
            )


# -- what kind of effects, and what errors


def _alternatives(fit: MixedFit) -> Iterator[str]:
    if random_terms(fit) and fit.recipe.family is not None and fit.link != "identity":
        slopes = any(c != "(Intercept)" for term in fit.terms for c in term.names)
        amount = "less" if fit.link in SHRINKING else "another amount"
        how = f"Averages over all levels differ by {amount}: {name('fit.effects()')} has both."
        if fit.link == "log" and not slopes:
            how = "Ratios between averages over all levels are the same, since only levels vary and the link is the log."
        yield f"These effects compare rows of one and the same {_joined([name(group) for group in fit.groups])}. {how}"
    if robust := getattr(fit, "robust", None):
        yield f"Standard errors are robust ({text(robust)}): they do not rely on the model's own assumption of how rows vary."
    if getattr(fit, "corr", None) is not None and getattr(fit, "kind", None) == "robust":
        yield "Standard errors are sandwich estimates: they hold for many blocks even if the working correlation is wrong."
    if fit.reml:
        yield "The criterion is restricted likelihood (REML): compare its log-likelihood and AIC only with fits of the same fixed part."
