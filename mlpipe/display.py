"""What a fit prints: lme4's summary, in lme4's order and with R's rule for digits; HTML in notebooks."""
from __future__ import annotations

import html as markup
import math
import os
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from . import expr, variance
from .layout import abbreviated, aligned, coefficients, filled, formatted, one_line, p_value, printable, ratio, to_decimals

if TYPE_CHECKING:
    from .generalized_result import GeneralizedFit, GLMFit
    from .result import MixedFit

WIDEST_CORRELATION = 20  # coefficients above which the correlation matrix is left out, as in lme4
MAX_NOTED = 8
ZERO_WEIGHT = "weight 0 in "


def summary(fit: MixedFit, *, correlation: bool) -> str:
    """The text of a fit; `correlation`: with the correlation matrix of the fixed effects, if it is not too large."""
    lines = _plain(fit) if _is_plain(fit) else _mixed(fit, correlation)
    notes = [f"note: {note}" for note in notes_of(fit)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _mixed(fit: MixedFit, correlation: bool) -> list[str]:
    """lme4's summary of a model with random effects."""
    random = _random_rows(fit)
    lines = [*head(fit), "", *_criterion(fit), "", "Random effects:", *aligned(random, left=len(random[0]), indent=" ")]
    lines += [*_family_parameters(fit), f"Number of obs: {fit.nobs:.15g}, groups: {_groups(fit)}", ""]
    lines += ["Fixed effects:", *aligned(_fixed_rows(fit), left=1)] if fit.names else ["No fixed effect coefficients"]
    if correlation and len(fit.names) > WIDEST_CORRELATION:
        lines += ["", f"Correlation matrix not shown, as p = {len(fit.names)} > {WIDEST_CORRELATION}; fit.vcov() has the covariances"]
    elif correlation and len(fit.names) > 1:
        lines += ["", "Correlation of Fixed Effects:", *aligned(_correlations(fit), left=1)]
    return lines


def _groups(fit: MixedFit) -> str:
    """Each grouping factor and how many levels it has."""
    return "; ".join(f"{printable(group)}, {n}" for group, n in fit.levels.items())


def _plain(fit: GLMFit) -> list[str]:
    """The summary of a model without random effects, after R's of a glm."""
    lines = [*head(fit), ""]
    lines += ["Coefficients:", *aligned(_fixed_rows(fit), left=1)] if fit.names else ["No coefficients"]
    return [*lines, "", _dispersion(fit), *_family_parameters(fit), *_fit_of(fit)]


def _dispersion(fit: GLMFit) -> str:
    quasi, scaled = _is_quasi(fit), fit.has_residual
    value = coefficients([fit.dispersion])[0] if quasi or scaled else "1"
    how = "estimated from Pearson residuals as" if quasi else "estimated by maximum likelihood as" if scaled else "taken to be"
    return f"(Dispersion parameter for the {fit.family} family {how} {value})"


def _fit_of(fit: GLMFit) -> list[str]:
    """How many rows, how likely; a quasi family has no likelihood."""
    size = f"Number of obs: {fit.nobs:.15g}, residual degrees of freedom: {fit.nobs - len(fit.names):.15g}"
    if _is_quasi(fit):
        return [size]
    row = fit.facts()
    return [size, f"Log-likelihood: {fit.loglik:.1f} with {fit.n_params} parameters, AIC: {row['aic']:.1f}, BIC: {row['bic']:.1f}"]


def html(fit: MixedFit) -> str:
    """The tables of the summary for notebooks; everything that comes from the user is escaped."""
    title, *facts = [markup.escape(line) for line in head(fit)]
    levels = "".join(f", {n} levels of {markup.escape(printable(group))}" for group, n in fit.levels.items())
    facts.append(f"{fit.nobs:.15g} rows{levels}")
    facts += [f"log-likelihood {fit.loglik:.4f}"] if math.isfinite(fit.loglik) else []
    facts += [markup.escape(line) for line in _family_parameters(fit)]
    tables = _html_table("Random effects", _random_rows(fit)) if fit.terms else ""
    tables += _html_table("Fixed effects" if fit.terms else "Coefficients", _fixed_rows(fit)) if fit.names else ""
    notes = "".join(f"<p>note: {markup.escape(note)}</p>" for note in notes_of(fit))
    return f"<div><p><b>{title}</b><br>{'<br>'.join(facts)}</p>{tables}{notes}</div>"


def _is_generalized(fit: MixedFit) -> TypeGuard[GeneralizedFit]:
    return fit.recipe.family is not None


def _is_plain(fit: MixedFit) -> TypeGuard[GLMFit]:
    return not fit.terms


def _is_quasi(fit: GLMFit) -> bool:
    return fit.family != fit.base_family


def head(fit: MixedFit, title: str | None = None) -> list[str]:
    """Method (or another title), family, formula, data and what else was given."""
    out = [title or _title(fit)]
    out += [f" Family: {fit.family}  ( {fit.link} )"] if _is_generalized(fit) else []
    out += [f"Formula: {one_line(fit.formula)}"]
    out += [f"   Data: {printable(os.fspath(fit.source))}"] if isinstance(fit.source, str | os.PathLike) else []
    recipe = fit.recipe
    given = (("Weights", recipe.weights), ("Frequencies", recipe.freq), ("Trials", recipe.trials), ("Offset", recipe.offset))
    out += [f"{name}: {one_line(text)}" for name, text in given if text]
    out += [f"Modelled: {_modelled(fit)}"] if _modelled(fit) else []
    return out + ([_robust(fit)] if title is None and _is_plain(fit) and fit.robust else [])


def _title(fit: MixedFit) -> str:
    if not _is_generalized(fit):
        return f"Linear mixed model fit by {'REML' if fit.reml else 'maximum likelihood'}"
    if _is_plain(fit):
        return f"Generalized linear model fit by {'quasi-' if _is_quasi(fit) else 'maximum '}likelihood"
    rule = "Laplace Approximation" if fit.nagq == 1 else f"Adaptive Gauss-Hermite Quadrature, nagq = {fit.nagq}"
    curvature = "" if fit.curvature == "observed" else f", {fit.curvature} curvature"
    return f"Generalized linear mixed model fit by maximum likelihood ({rule}{curvature})"


def _modelled(fit: MixedFit) -> str:
    """Of what a binomial model gives the probability, where the response does not say it itself."""
    node, success = fit.recipe.formula.response, fit.recipe.success
    if node is None:
        return ""
    if success is not None:
        return f"the probability that {printable(expr.label(node))} is {printable(success)!r}"
    if isinstance(node, expr.Call) and node.function == "cbind":
        return f"the probability of {printable(expr.label(node.args[0]))}"
    return ""


def _robust(fit: GLMFit) -> str:
    if not fit.recipe.groups:
        return f"Standard errors: heteroskedasticity-robust ({fit.robust})"
    return f"Standard errors: cluster-robust ({fit.robust}), {fit.n_blocks} clusters of {printable(':'.join(fit.recipe.groups))}"


def _family_parameters(fit: MixedFit) -> list[str]:
    """The shape, k, alpha or precision; a standard deviation stands among the variances, or as the dispersion."""
    named = [parameter for parameter in fit.family_parameters() if not parameter[1].startswith("sd__")]
    out = []
    for _, name, value, error in named:
        shown, *known = coefficients([value, error]) if math.isfinite(error) else coefficients([value])
        out.append(f"Family parameter: {name} = {shown}{f' (std. error {known[0]})' if known else ''}")
    return out


def _criterion(fit: MixedFit) -> list[str]:
    if fit.reml:
        return [f"REML criterion at convergence: {-2 * fit.loglik:.1f}"]
    row = fit.facts()
    values = [f"{row[name]:.1f}" for name in ("aic", "bic", "loglik", "deviance")]
    return aligned([["AIC", "BIC", "logLik", "deviance", "df.resid"], [*values, f"{fit.nobs - fit.n_params:.15g}"]], left=0)


def _random_rows(fit: MixedFit) -> list[list[str]]:
    """Groups, Name, Variance, Std.Dev. and, where a term has several coefficients, the lower triangle of their correlations."""
    widest = max(len(term.names) for term in fit.terms)
    names, variances, correlations = [], [], []
    for term, psi in zip(fit.terms, variance.covariances(fit), strict=True):
        sd = np.sqrt(np.diag(psi))
        for i, name in enumerate(term.names):
            names.append((term.group if i == 0 else "", name))
            variances.append(float(psi[i, i]))
            correlations.append([ratio(psi[i, j], sd[i] * sd[j]) for j in range(i)])
    if fit.has_residual:
        names.append(("Residual", ""))
        variances.append(fit.sigma**2)
        correlations.append([])
    columns = [filled(formatted(values), False) for values in (variances, [math.sqrt(value) for value in variances])]
    rows = [["Groups", "Name", "Variance", "Std.Dev.", *(["Corr"] if widest > 1 else [])]]
    rows += [[*name, *values, *cors] for name, *values, cors in zip(names, *columns, correlations, strict=True)]
    return [row + [""] * (3 + widest - len(row)) for row in rows] if widest > 1 else rows


def _fixed_rows(fit: MixedFit) -> list[list[str]]:
    """Estimates and standard errors with common decimals, as R's printCoefmat, and Wald tests."""
    errors = variance.standard_errors(fit)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = fit.beta / errors
    numbers = coefficients([*fit.beta.tolist(), *errors.tolist()])
    p = [p_value(math.erfc(abs(value) / math.sqrt(2))) for value in z]
    rows = [["", "Estimate", "Std. Error", "z value", "Pr(>|z|)"]]
    columns = (fit.names, numbers[: len(z)], numbers[len(z) :], (to_decimals(value, 3) for value in z), p)
    return rows + [list(row) for row in zip(*columns, strict=True)]


def _correlations(fit: MixedFit) -> list[list[str]]:
    """The lower triangle under abbreviated names."""
    sd = variance.standard_errors(fit)
    across, down = abbreviated(fit.names, 6), abbreviated(fit.names, 11)
    rows = [["", *across[:-1]]]
    for i in range(1, len(sd)):
        cells = [to_decimals(fit.covariance[i, j] / (sd[i] * sd[j]), 3) if sd[i] * sd[j] > 0 else "NaN" for j in range(i)]
        rows.append([down[i], *cells, *[""] * (len(sd) - 1 - i)])
    return rows


def notes_of(fit: MixedFit) -> list[str]:
    """What the printed fit says below its tables: rows and columns dropped, a singular fit, no convergence, the notes of `info`."""
    out = []
    if dropped := fit.info.get("rows_dropped", 0):
        out.append(f"{dropped} of {fit.info.get('rows_read', fit.rows + dropped)} rows dropped{_causes(fit.info.get('dropped', {}))}")
    if fit.dropped:
        out.append(f"fixed-effect columns dropped because they repeat others: {', '.join(fit.dropped)}")
    if fit.singular:
        out.append("boundary (singular) fit: a random-effects covariance matrix is not of full rank")
    if not fit.converged:
        out.append(f"NOT CONVERGED: {fit.message} (scaled score {fit.score:.2g} after {fit.evaluations} evaluations)")
    return [printable(note) for note in (*out, *fit.info.get("notes", []), *_meaning(fit))]


def _meaning(fit: MixedFit) -> list[str]:
    """What a generalized fit's numbers rest on: separation, blocks that do not vary, and the quadrature for blocks of this size."""
    info, out = fit.info, []
    if separated := info.get("separation"):
        out.append(f"separation: {', '.join(separated)} predict the outcome exactly, and have no finite estimates")
    if flat := info.get("blocks_without_variation"):
        out.append(f"the response is the same throughout {flat:,} of {fit.n_blocks:,} blocks")
    if not _is_generalized(fit) or "per_block" not in info or any("nagq" in note for note in info.get("notes", [])):
        return out
    if (fit.base_family, fit.link) == ("gaussian", "identity"):  # exact with any number of nodes
        return out
    size = f"{info['per_block']:.3g} {'trials' if fit.base_family == 'binomial' else 'rows'} on average"
    if fit.nagq == 1:
        return [*out, f"nagq = 1 takes a block's likelihood from its mode and curvature alone: better the larger blocks are (here {size})"]
    return [*out, f"nagq = {fit.nagq} nodes a random effect: the smaller blocks are (here {size}), the more of them matter"]


def _causes(counts: dict[str, int]) -> str:
    """Missing values and zero weights by column; a row may have several."""
    parts = [f"{name} ({n})" if name.startswith(ZERO_WEIGHT) else f"{name} missing ({n})" for name, n in counts.items()]
    shown = ", ".join(parts[:MAX_NOTED]) + (f", and {len(parts) - MAX_NOTED} more" if len(parts) > MAX_NOTED else "")
    return f": {shown}" if shown else ""


def _html_table(caption: str, rows: list[list[str]]) -> str:
    head = "".join(f"<th>{markup.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{markup.escape(printable(cell))}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
