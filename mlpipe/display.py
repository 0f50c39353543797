"""What a fit prints: lme4's summary, in lme4's order and with R's rule for digits; HTML in notebooks."""
from __future__ import annotations

import html as markup
import math
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import variance

if TYPE_CHECKING:
    from .result import LMMFit

DIGITS = 4  # significant digits of every number in a column, at least, as in lme4's summary
WIDEST_CORRELATION = 20  # coefficients above which the correlation matrix is left out, as in lme4
MAX_NOTED = 8
ZERO_WEIGHT = "weight 0 in "


def summary(fit: LMMFit, *, correlation: bool) -> str:
    """The text of a fit; `correlation`: with the correlation matrix of the fixed effects, if it is not too large."""
    random = _random_rows(fit)
    lines = [*_head(fit), "", *_criterion(fit), "", "Random effects:", *_aligned(random, left=len(random[0]), indent=" ")]
    lines += [f"Number of obs: {fit.nobs:.15g}, groups: {printable(fit.terms[0].group)}, {fit.n_blocks}", ""]
    lines += ["Fixed effects:", *_aligned(_fixed_rows(fit), left=1)] if fit.names else ["No fixed effect coefficients"]
    if correlation and len(fit.names) > WIDEST_CORRELATION:
        lines += ["", f"Correlation matrix not shown, as p = {len(fit.names)} > {WIDEST_CORRELATION}; fit.vcov() has the covariances"]
    elif correlation and len(fit.names) > 1:
        lines += ["", "Correlation of Fixed Effects:", *_aligned(_correlations(fit), left=1)]
    notes = [f"note: {note}" for note in _notes(fit)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def html(fit: LMMFit) -> str:
    """The tables of the summary for notebooks; everything that comes from the user is escaped."""
    title, *facts = [markup.escape(line) for line in _head(fit)]
    facts.append(f"{fit.nobs:.15g} rows, {fit.n_blocks} levels of {markup.escape(printable(fit.terms[0].group))}")
    facts.append(f"log-likelihood {fit.loglik:.4f}")
    tables = _html_table("Random effects", _random_rows(fit)) + (_html_table("Fixed effects", _fixed_rows(fit)) if fit.names else "")
    notes = "".join(f"<p>note: {markup.escape(note)}</p>" for note in _notes(fit))
    return f"<div><p><b>{title}</b><br>{'<br>'.join(facts)}</p>{tables}{notes}</div>"


def _head(fit: LMMFit) -> list[str]:
    out = [f"Linear mixed model fit by {'REML' if fit.reml else 'maximum likelihood'}", f"Formula: {_one_line(fit.formula)}"]
    out += [f"   Data: {printable(os.fspath(fit.source))}"] if isinstance(fit.source, str | os.PathLike) else []
    given = (("Weights", fit.recipe.weights), ("Frequencies", fit.recipe.freq), ("Offset", fit.recipe.offset))
    return out + [f"{name}: {_one_line(text)}" for name, text in given if text]


def _criterion(fit: LMMFit) -> list[str]:
    if fit.reml:
        return [f"REML criterion at convergence: {-2 * fit.loglik:.1f}"]
    row = fit.glance().to_pylist()[0]
    values = [f"{row[name]:.1f}" for name in ("aic", "bic", "loglik", "deviance")]
    return _aligned([["AIC", "BIC", "logLik", "deviance", "df.resid"], [*values, f"{fit.nobs - fit.n_params:.15g}"]], left=0)


def _random_rows(fit: LMMFit) -> list[list[str]]:
    """Groups, Name, Variance, Std.Dev. and, where a term has several coefficients, the lower triangle of their correlations."""
    widest = max(len(term.names) for term in fit.terms)
    names, variances, correlations = [], [], []
    for term, psi in zip(fit.terms, variance.covariances(fit), strict=True):
        sd = np.sqrt(np.diag(psi))
        for i, name in enumerate(term.names):
            names.append((term.group if i == 0 else "", name))
            variances.append(float(psi[i, i]))
            correlations.append([_ratio(psi[i, j], sd[i] * sd[j]) for j in range(i)])
    names.append(("Residual", ""))
    variances.append(fit.sigma**2)
    columns = [_filled(_formatted(values), False) for values in (variances, [math.sqrt(value) for value in variances])]
    rows = [["Groups", "Name", "Variance", "Std.Dev.", *(["Corr"] if widest > 1 else [])]]
    rows += [[*name, *values, *cors] for name, *values, cors in zip(names, *columns, [*correlations, []], strict=True)]
    return [row + [""] * (3 + widest - len(row)) for row in rows] if widest > 1 else rows


def _ratio(covariance: float, product: float) -> str:
    return f"{covariance / product:5.2f}" if product > 0 else "  NaN"


def _fixed_rows(fit: LMMFit) -> list[list[str]]:
    """Estimates and standard errors with common decimals, as R's printCoefmat, and Wald tests."""
    errors = np.sqrt(np.diag(fit.covariance))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = fit.beta / errors
    numbers = _coefficients([*fit.beta.tolist(), *errors.tolist()])
    p = [_p_value(math.erfc(abs(value) / math.sqrt(2))) for value in z]
    rows = [["", "Estimate", "Std. Error", "z value", "Pr(>|z|)"]]
    columns = (fit.names, numbers[: len(z)], numbers[len(z) :], (_decimals(value, 3) for value in z), p)
    return rows + [list(row) for row in zip(*columns, strict=True)]


def _coefficients(values: Sequence[float]) -> list[str]:
    """R's printCoefmat: rounded to DIGITS significant digits of the smallest, which then keeps them all."""
    sizes = [math.floor(math.log10(abs(value))) for value in values if value and math.isfinite(value)]
    places = max(1, DIGITS - 1 - min(sizes, default=0))
    return _formatted([round(value, places) if math.isfinite(value) else value for value in values])


def _formatted(values: Sequence[float], digits: int = DIGITS) -> list[str]:
    """R's format(): as few common decimals as show each value to `digits` significant digits; an exponent where that is shorter."""
    significant, exponents = [1], [0]
    for value in values:
        if value and math.isfinite(value):
            mantissa, exponent = f"{abs(value):.{digits - 1}e}".split("e")
            significant.append(len(mantissa.rstrip("0").replace(".", "")))
            exponents.append(int(exponent))
    decimals = max(0, *(s - e - 1 for s, e in zip(significant, exponents, strict=True)))
    fixed = max(exponents) + 1 + (decimals + 1 if decimals else 0)
    places = max(significant) - 1
    if fixed <= places + (2 if places else 1) + 4:
        return [_decimals(value, decimals) for value in values]
    return [f"{value:.{places}e}" if math.isfinite(value) else _decimals(value, 0) for value in values]


def _decimals(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if math.isfinite(value) else "NaN" if math.isnan(value) else "-Inf" if value < 0 else "Inf"


def _p_value(p: float) -> str:
    return "NaN" if math.isnan(p) else "<2e-16" if p < 2e-16 else f"{p:.3g}"


def _correlations(fit: LMMFit) -> list[list[str]]:
    """The lower triangle under abbreviated names."""
    sd = np.sqrt(np.diag(fit.covariance))
    across, down = abbreviated(fit.names, 6), abbreviated(fit.names, 11)
    rows = [["", *across[:-1]]]
    for i in range(1, len(sd)):
        cells = [_decimals(fit.covariance[i, j] / (sd[i] * sd[j]), 3) if sd[i] * sd[j] > 0 else "NaN" for j in range(i)]
        rows.append([down[i], *cells, *[""] * (len(sd) - 1 - i)])
    return rows


def abbreviated(names: Sequence[str], length: int) -> list[str]:
    """Names of about `length` characters that stay distinct, as R's abbreviate(): `(Intercept)` becomes `(Intr)`.

    Lower-case vowels go first, then lower-case letters, then the rest, each from the end; the first character stays. Names that come
    out alike are given one character more until they differ.
    """
    out = [_shortened(name, length) for name in names]
    for more in range(length + 1, max(map(len, names), default=0) + 1):
        if len(set(out)) == len(out):
            break
        out = [_shortened(name, more) if out.count(short) > 1 else short for name, short in zip(names, out, strict=True)]
    return out


def _shortened(name: str, length: int) -> str:
    groups: tuple[Callable[[str], bool], ...] = (lambda c: c in "aeiou", str.islower, lambda c: True)
    for goes in groups:
        for i in range(len(name) - 1, 0, -1):
            if len(name) <= length:
                return name
            if goes(name[i]):
                name = name[:i] + name[i + 1 :]
    return name


def _notes(fit: LMMFit) -> list[str]:
    out = []
    if dropped := fit.info.get("rows_dropped", 0):
        out.append(f"{dropped} of {fit.info.get('rows_read', fit.rows + dropped)} rows dropped{_causes(fit.info.get('dropped', {}))}")
    if fit.dropped:
        out.append(f"fixed-effect columns dropped because they repeat others: {', '.join(fit.dropped)}")
    if fit.singular:
        out.append("boundary (singular) fit: a random-effects covariance matrix is not of full rank")
    if not fit.converged:
        out.append(f"NOT CONVERGED: {fit.message} (scaled score {fit.score:.2g} after {fit.evaluations} evaluations)")
    return [printable(note) for note in (*out, *fit.info.get("notes", []))]


def _causes(counts: dict[str, int]) -> str:
    """Missing values and zero weights by column; a row may have several."""
    parts = [f"{name} ({n})" if name.startswith(ZERO_WEIGHT) else f"{name} missing ({n})" for name, n in counts.items()]
    shown = ", ".join(parts[:MAX_NOTED]) + (f", and {len(parts) - MAX_NOTED} more" if len(parts) > MAX_NOTED else "")
    return f": {shown}" if shown else ""


def _one_line(text: str) -> str:
    """A formula written over several lines, on one."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", text.strip()))


def printable(text: str) -> str:
    """Control characters as escapes: a column's name must not move the cursor, nor break a table."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _width(text: str) -> int:
    """Columns on a terminal: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _aligned(rows: Sequence[Sequence[str]], *, left: int, indent: str = "") -> list[str]:
    """Columns of equal width: the first `left` flush left, the others flush right."""
    cells = [[printable(cell) for cell in row] for row in rows]
    sides = [j < left for j in range(len(cells[0]))]
    columns = [_filled(column, flush_left) for column, flush_left in zip(zip(*cells, strict=True), sides, strict=True)]
    return [(indent + " ".join(row)).rstrip() for row in zip(*columns, strict=True)]


def _filled(cells: Sequence[str], flush_left: bool) -> list[str]:
    """Cells of one width."""
    width = max(map(_width, cells))
    spaces = [" " * (width - _width(cell)) for cell in cells]
    return [cell + space if flush_left else space + cell for cell, space in zip(cells, spaces, strict=True)]


def _html_table(caption: str, rows: list[list[str]]) -> str:
    head = "".join(f"<th>{markup.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{markup.escape(printable(cell))}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
