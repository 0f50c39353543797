"""The sections of a report on one fit, each HTML: tables and figures with what they say."""
from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import display, page, variance
from .covariates import random_terms
from .drawing import svg
from .effects import KEPT, coefficient_names
from .errors import DataError
from .estimating_result import GEEFit
from .layout import coefficients, formatted, one_line, p_value, ratio, to_decimals
from .linear_result import OLSFit
from .plot import EXTREMES, MOST_LEVELS, Plot, diagnostics
from .reading import number, ratio_name, response, shares

if TYPE_CHECKING:
    from .history import Run
    from .options import Options
    from .result import MixedFit

WIDTH, HALF = 620, 270  # pixels of a figure, and of one of two
MOST_COEFFICIENTS = 60  # drawn
MARKS = 1_500  # of the residuals
MOST_FIGURES = 4  # caterpillars of one grouping factor
MISSING = "–"
NO_MODES = ("no_modes", "no_source", "not_collected")


# -- head


def head(fit: MixedFit, run: Run | None) -> str:
    """What was fitted to what, and its state in a few words."""
    title, lines = _heading(fit)
    named = [line.partition(":") for line in lines if not line.startswith("Formula:")]
    said = [f"{page.text(name.strip())} {page.code(value.strip())}" for name, _, value in named]
    levels = [f"{n:,} levels of {page.text(group)}" for group, n in fit.levels.items()] if fit.terms else []
    size = [f"{fit.nobs:,.15g} rows", *levels, *([f"run of {run.started:%d %B %Y, %H:%M} UTC"] if run else [])]
    facts = "".join(f'<p class="meta">{" · ".join(part)}</p>' for part in (size, said) if part)
    formula = one_line(fit.formula)
    return f'<header><p class="kicker">{page.text(title)}</p>\n<h1>{page.code(formula)}</h1>{facts}\n{page.status(_chips(fit))}</header>'


def _heading(fit: MixedFit) -> tuple[str, list[str]]:
    """The head of what `print` shows: its title, and its other lines."""
    title, *lines = fit.summary().split("\n\n")[0].split("\n")
    return title, lines


def _chips(fit: MixedFit) -> list[tuple[str, str]]:
    out = [("good", "Converged")] if fit.converged else [("bad", "Not converged")]
    out += [("warn", "Singular fit")] if fit.singular else []
    out += [("bad", "Separation")] if fit.info.get("separation") else []
    out += [("warn", f"{len(fit.dropped)} repeated columns left out")] if fit.dropped else []
    dropped = int(fit.info.get("rows_dropped") or 0)
    return out + ([("warn", f"{dropped:,} rows left out")] if dropped else [])


# -- coefficients


def fixed(fit: MixedFit) -> str:
    """The coefficients with intervals, as a table and drawn."""
    rows = [row for row in fit.tidy().to_pylist() if row["effect"] == "fixed"]
    if not rows:
        return ""
    return page.section("Coefficients" if not random_terms(fit) else "Fixed effects", _fixed_table(fit, rows), _fixed_figure(fit, rows))


def _fixed_table(fit: MixedFit, rows: Sequence[dict[str, Any]]) -> str:
    letter = "t" if any(row["df"] is not None for row in rows) else "z"
    shown = coefficients([_real(row[name]) for name in ("estimate", "std_error") for row in rows])
    times = ratio_name(fit)
    columns = [[page.code(row["term"]) for row in rows], shown[: len(rows)], shown[len(rows) :], [_interval(row) for row in rows]]
    if times:
        columns += [[_times(row, "estimate") for row in rows], [_times(row, "conf_low", "conf_high") for row in rows]]
    columns += [[to_decimals(_real(row["statistic"]), 3) for row in rows], [page.text(p_value(_real(row["p_value"]))) for row in rows]]
    names = ["Coefficient", "Estimate", "Std. error", "95% interval", *([times, "95% interval"] if times else []), letter, "p"]
    tests = f" {letter}: estimate over standard error; p: the chance of one as far from zero if there were no effect."
    of = f"{page.text(times)}: what one unit more multiplies {'the odds' if fit.link == 'logit' else 'the mean'} by." if times else ""
    return page.table(names, list(zip(*columns, strict=True)), f"{of}{tests}".strip())


def _interval(row: dict[str, Any]) -> str:
    """The limits, to two significant digits of the standard error."""
    error = row["std_error"]
    if not error or row["conf_low"] is None:
        return MISSING
    places = 1 - math.floor(math.log10(error))
    if not -6 <= places <= 6:
        return f"{number(row['conf_low'])} to {number(row['conf_high'])}"
    return " to ".join(f"{round(row[name], places):.{max(places, 0)}f}" for name in ("conf_low", "conf_high"))


def _times(row: dict[str, Any], *names: str) -> str:
    """What one unit more multiplies by: the estimate, or an interval of it."""
    if row["term"] == "(Intercept)" or any(row[name] is None for name in names):
        return MISSING
    return " to ".join(number(math.exp(row[name]) if row[name] < 700.0 else math.inf) for name in names)


def _fixed_figure(fit: MixedFit, rows: Sequence[dict[str, Any]]) -> str:
    plot = fit.plot.coefficients()
    if not len(plot.table):
        return ""
    caption = "Estimates with 95% intervals, without the intercept. An interval that crosses the dashed line leaves the direction open"
    if len(plot.table) > MOST_COEFFICIENTS:
        size = {row["term"]: abs(row["statistic"] or 0.0) for row in rows}
        order = sorted(range(len(plot.table)), key=lambda i: -size[plot.table["term"][i].as_py()])[:MOST_COEFFICIENTS]
        plot = Plot(plot.table.take(sorted(order)), plot.drawn)
        caption += f"; the {MOST_COEFFICIENTS} clearest of {len(rows)} coefficients"
    units = "Each is per unit of its own variable, so lengths compare only between variables with like units."
    scale = f" On the scale of the {page.text(fit.link)} link." if fit.recipe.family is not None and fit.link != "identity" else ""
    return page.figure(svg(plot, "coefficients", "Coefficients with intervals", width=WIDTH - 110), f"{caption}. {units}{scale}")


# -- random effects


def random(fit: MixedFit) -> str:
    """Variance components, shares of variance, and each factor's effects in order."""
    if not random_terms(fit):
        return ""
    return page.section("Random effects", _components(fit), _shares(fit), *(_caterpillars(fit, group) for group in fit.groups))


def _components(fit: MixedFit) -> str:
    errors = dict(zip([(g, t) for g, t, _ in variance.random_parameters(fit)], variance.random_errors(fit), strict=True))
    rows: list[list[str]] = []
    variances: list[float] = []
    found: list[float] = []
    widest = max(len(term.names) for term in fit.terms)
    for term, psi in zip(fit.terms, variance.covariances(fit), strict=True):
        sd = [math.sqrt(max(float(psi[i, i]), 0.0)) for i in range(len(psi))]
        for i, c in enumerate(term.names):
            cells = [ratio(psi[i, j], sd[i] * sd[j]).strip() for j in range(i)]
            rows.append([page.code(term.group) if i == 0 else "", page.code(c), *cells, *[""] * (widest - 1 - len(cells))])
            variances.append(float(psi[i, i]))
            found.append(float(errors[term.group, f"sd__{c}"]))
    if fit.has_residual:
        rows.append(["Residual", "", *[""] * (widest - 1)])
        variances.append(fit.sigma**2)
        found.append(next((error for _, name, _, error in fit.family_parameters() if name == "sd__Observation"), math.nan))
    numbers = zip(formatted(variances), formatted([math.sqrt(v) for v in variances]), _errors(found), strict=True)
    correlations = ["Correlation", *[""] * (widest - 2)] if widest > 1 else []
    lines = [[*row[:2], *values, *row[2:]] for row, values in zip(rows, numbers, strict=True)]
    caption = "How much levels, and rows of one level, differ beyond what the fixed effects say."
    return page.table(["Group", "Coefficient", "Variance", "Std. dev.", "Its std. error", *correlations], lines, caption, left=2)


def _errors(values: Sequence[float]) -> list[str]:
    known = iter(formatted([value for value in values if math.isfinite(value)]))
    return [next(known) if math.isfinite(value) else MISSING for value in values]


def _shares(fit: MixedFit) -> str:
    found = shares(fit)
    if not found or sum(found.values()) <= 0.0:
        return ""
    rest = "rows of one level" if len(found) == 1 else "rows of the same levels"
    parts = [(f"between levels of {page.code(group)}", share) for group, share in found.items()]
    slopes = any(c != "(Intercept)" for term in fit.terms for c in term.names)
    where = ", where the variables with varying effects are zero" if slopes else ""
    latent = ", on the scale of the linear predictor" if fit.recipe.family is not None and fit.link != "identity" else ""
    bar = page.shares([*parts, (f"between {rest}", max(1.0 - sum(found.values()), 0.0))])
    return f'<h3>Where the variance is</h3>{bar}<p class="meta">Shares of what the fixed effects leave{where}{latent}.</p>'


def _caterpillars(fit: MixedFit, group: str) -> str:
    names = coefficient_names([term for term in fit.terms if term.group == group])
    title = f"<h3>Levels of {page.code(group)}</h3>"
    try:
        if not fit.recipe.factors and fit.levels[group] <= KEPT:
            fit.ranef(group, wide=True)  # stays with the fit, and is not computed from the rows for each figure
        plots = [fit.plot.caterpillar(group, name) for name in names[:MOST_FIGURES]]
    except DataError as error:
        if error.code not in NO_MODES:
            raise
        return title + "<p>The fit was written without the effects of its levels, so they cannot be shown.</p>"
    at = fit.groups.index(group)
    figures = [_caterpillar(fit, group, name, plot, f"levels-{at}-{k}") for k, (name, plot) in enumerate(zip(names, plots, strict=False))]
    more = f"<p>{len(names) - MOST_FIGURES} more coefficients vary by {page.code(group)}.</p>" if len(names) > MOST_FIGURES else ""
    return title + "".join(figures) + more


def _caterpillar(fit: MixedFit, group: str, name: str, plot: Plot, key: str) -> str:
    n = fit.levels[group]
    rows = [row for row in plot.table.to_pylist() if row["kind"] == "level"]
    what = "level" if name == "(Intercept)" else f"effect of {page.code(name)}"
    caption = f"How each {page.code(group)} deviates from the common {what}, in order, with 95% intervals"
    if n > MOST_LEVELS:
        caption += f": the {EXTREMES} lowest and {EXTREMES} highest of {n:,} one by one, the others as a band of means"
    else:
        apart = sum(row["conf_low"] > 0.0 or row["conf_high"] < 0.0 for row in rows)
        caption += f"; {apart} of {n:,} intervals leave out zero"
    ends = f"Lowest: {page.code(rows[0]['level'])}, highest: {page.code(rows[-1]['level'])}." if rows else ""
    pulled = "Estimates are pulled towards zero, the more so the fewer rows a level has."
    return page.figure(svg(plot, key, f"{name} by {group}", width=WIDTH), f"{caption}. {ends} {pulled}")


# -- what fits, and whether


def statistics(fit: MixedFit) -> str:
    """The numbers that describe the fit as a whole."""
    row = fit.facts()
    pairs = [("Rows used", f"{fit.nobs:,.15g}"), ("Parameters", f"{row['n_params']:,}")]
    if math.isfinite(fit.loglik):
        pairs += [("Restricted log-likelihood" if fit.reml else "Log-likelihood", f"{fit.loglik:,.1f}")]
        pairs += [("REML criterion" if fit.reml else "Deviance", f"{-2 * fit.loglik:,.1f}")]
        pairs += [("AIC", f"{row['aic']:,.1f}"), ("BIC", f"{row['bic']:,.1f}")]
    if fit.has_residual and math.isfinite(fit.sigma):
        pairs.append(("Residual standard deviation", coefficients([fit.sigma])[0]))
    for _, name, value, error in fit.family_parameters():
        if not name.startswith("sd__"):
            pairs.append((f"Family parameter {page.text(name)}", f"{coefficients([value])[0]} (std. error {number(error)})"))
    return page.section("Fit as a whole", page.facts([*pairs, *_of_kind(fit), *_explained(fit)]), _notes(fit))


def _of_kind(fit: MixedFit) -> list[tuple[str, str]]:
    """What only some kinds of fits have."""
    if isinstance(fit, GEEFit):
        found = fit.qic()
        alpha = [("Working correlation", ", ".join(number(float(a)) for a in fit.alpha[:6]))] if len(fit.alpha) else []
        return [("Scale", number(fit.scale)), *alpha, ("QIC", f"{found['qic']:,.1f}"), ("QICu", f"{found['qicu']:,.1f}")]
    if isinstance(fit, OLSFit) and any(name != "(Intercept)" for name in fit.names):
        f = fit.f_statistic()
        return [("F", f"{f['f']:.4g} on {f['df1']:.0f} and {f['df2']:.15g} df, p {page.text(p_value(f['p_value']))}")]
    return []


def _explained(fit: MixedFit) -> list[tuple[str, str]]:
    """R², where it takes no scan."""
    if isinstance(fit, GEEFit) or not (isinstance(fit, OLSFit) or "fixed_variance" in fit.info):
        return []
    if random_terms(fit) and not shares(fit):  # nor has a family without a latent scale
        return []
    names = {
        "marginal": "R², fixed effects alone", "conditional": "R², with random effects", "r2": "R²", "adjusted": "R², adjusted",
        "within": "R², within levels",
    }  # fmt: skip
    return [(names[name], f"{value:.3f}") for name, value in fit.r2().items()]


def _notes(fit: MixedFit) -> str:
    notes = display.notes_of(fit)
    return f"<h3>Notes</h3>{page.bullets(map(page.text, notes))}" if notes else ""


def checks(fit: MixedFit, data: Any, options: Options | None) -> str:
    """Residuals and random effects against what the model takes them to be."""
    return page.section("Do the assumptions hold?", _residuals(fit, data, options), *(_normal(fit, group) for group in fit.groups))


def _residuals(fit: MixedFit, data: Any, options: Options | None) -> str:
    from .stats import SuffStats

    if data is None and (fit.source is None or isinstance(fit.source, SuffStats)):
        how = f"{page.code('mlpipe report FIT DATA')}, or {page.code('mp.report(fit, path, data=…)')}"
        return f"<p>Residuals need the rows, which are not kept with a fit: {how} reads them once and shows them here.</p>"
    scatter, normal, n = diagnostics(fit, data, options, MARKS)
    if not n:
        return "<p>No row of the data has a residual.</p>"
    other = f" These are {n:,} rows, and not the {fit.rows:,} of the fit." if n != fit.rows else ""
    counted = ", the stronger the colour the more of them" if "fitted_to" in scatter.table.column_names else ""
    what = f"Pearson residuals of {n:,} rows{counted}"
    spread = "Points should scatter around the dashed line without a trend and with like spread from left to right."
    size: dict[str, Any] = {"width": HALF, "height": HALF}
    figures = [
        page.figure(svg(scatter, "residuals", "Residuals by fitted value", legend=False, **size), f"{what}. {spread}{other}"),
        page.figure(svg(normal, "normal", "Normal plot of the residuals", **size), _normal_words(fit)),
    ]
    return f"<h3>Residuals</h3>{page.pair(figures)}"


def _normal_words(fit: MixedFit) -> str:
    if (fit.recipe.family or "gaussian") == "gaussian":
        return "Residuals against a normal distribution. Ends that leave the line are rows further out than the model expects."
    return (
        f"Residuals against a normal distribution. For {response(fit)} they need not be normal: look for single rows far from the rest, "
        "not for a straight line."
    )


def _normal(fit: MixedFit, group: str) -> str:
    if not random_terms(fit):
        return ""
    try:
        plot = fit.plot.qq(group)
    except DataError as error:
        if error.code not in NO_MODES:
            raise
        return ""
    if not len(plot.table):
        return ""
    few = " With this few levels nothing finer shows." if fit.levels[group] < 30 else ""
    caption = (
        f"The deviations of the levels of {page.code(group)}, standardized, against a normal distribution. Points far off the line "
        f"are levels unlike the others; a bend at both ends means more extreme levels than normal.{few}"
    )
    drawing = svg(plot, f"normal-{fit.groups.index(group)}", f"Normal plot of {group}", width=HALF * 1.4, height=HALF)
    return f"<h3>Levels of {page.code(group)}</h3>{page.figure(drawing, caption)}"


# -- what was run


def provenance(fit: MixedFit, run: Run | None, sql: Sequence[str]) -> str:
    """What was read, what it took, and the statements."""
    info = fit.info
    pairs = [(label, f"{info[key]:,}") for key, label in (("rows_read", "Rows read"), ("rows_dropped", "Rows left out")) if key in info]
    pairs += [(_cause(cause), f"{count:,}") for cause, count in list(info.get("dropped", {}).items())[: display.MAX_NOTED]]
    pairs += [("Passes over the rows", f"{info['passes']:.3g}")] if "passes" in info else []
    pairs += [("Bytes of what was read", f"{info['bytes']:,}")] if info.get("bytes") else []
    pairs += [("Engine", page.text(info["engine"]))] if "engine" in info else []
    pairs += [("Evaluations", f"{fit.evaluations:,}")]
    if run is not None:
        pairs += [("Run", page.text(run.run_id)), ("Seconds", f"{fit.seconds:.2f}")]
        pairs += [("Version", f"mlpipe {page.text(run.facts['version'])}")]
        pairs += [("Fingerprint of the source", page.text(run.facts["source_fingerprint"]))] if run.facts["source_fingerprint"] else []
    return page.section("What was run", page.facts(pairs), *statements(sql))


def _cause(cause: str) -> str:
    """Why rows were left out: a weight of zero, or a column where they have no value."""
    return page.text(cause) if cause.startswith(display.ZERO_WEIGHT) else f"Missing in {page.code(cause)}"


def statements(sql: Sequence[str]) -> list[str]:
    """The SQL that ran."""
    shown = [page.statement(_pretty(text), f"Statement {k} of {len(sql)}{_purpose(text)}") for k, text in enumerate(sql, 1)]
    intro = "<h3>The SQL that ran</h3><p>Columns of the source stand by position, their names in comments.</p>"
    return [intro, *shown] if shown else []


def _pretty(sql: str) -> str:
    import sqlglot

    try:
        return sqlglot.parse_one(sql, read="duckdb").sql(dialect="duckdb", pretty=True)
    except sqlglot.errors.SqlglotError:
        return sql


def _purpose(sql: str) -> str:
    """What the statement's own first comment says of it."""
    found = re.search(r"/\* (.*?)(?:\. [A-Z].*?|\.)? \*/", sql.replace(" */ /* ", " "))
    return f": {page.text(found[1])}" if found else ": a look at the engine"


# -- numbers


def _real(value: float | None) -> float:
    return math.nan if value is None else value
