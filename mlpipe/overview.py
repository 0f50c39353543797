"""A report on the many fits of one run: which are sound, and how their coefficients differ from value to value."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import page
from .drawing import svg
from .layout import one_line, p_value
from .plot import EXTREMES, MOST_LEVELS, ranked
from .reading import number
from .sections import WIDTH, statements
from .store import matching

if TYPE_CHECKING:
    import pyarrow as pa

LISTED, DRAWN = 200, 8  # fits in the table of a model, and coefficients that are drawn


def whole(tables: Mapping[str, pa.Table], wanted: Mapping[str, Any], sql: Sequence[str]) -> str:
    """The page on the fits of a run that have these values, from its tables `fit` and `coef`; "" where there are none."""
    fits = matching(tables["fit"], wanted)
    if not len(fits):
        return ""
    by = _by(fits)
    rows = _plain(fits, by)
    models = list(dict.fromkeys(row["model"] for row in rows))
    coefficients = matching(tables["coef"], wanted) if "coef" in tables else None
    parts = [_head(rows, models, by), page.section("How to read it", page.bullets(_reading(rows, by)))]
    for k, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        drawn = _drawn(coefficients, model, by, k) if by and coefficients is not None else []
        parts.append(page.section(one_line(model) if len(models) > 1 else "Coefficients by value", *drawn))
        parts.append(page.section("Fits" if len(models) == 1 else f"Fits of {one_line(model)}", _fits(own, by)))
    parts.append(page.section("What was run", *statements(sql)))
    return page.document(one_line(models[0]), [*parts, page.footer()])


def _by(fits: pa.Table) -> list[str]:
    """The columns that a model was fitted by: they stand between `model` and our first own one."""
    names = fits.column_names
    own = max(i for i, name in enumerate(names) if name.rstrip("_") == "formula")
    return list(names[2:own])


def _plain(table: pa.Table, by: Sequence[str]) -> list[dict[str, Any]]:
    """Rows under our own names, which have an underscore more beside a `by` column of the same; the values as a text, `value`."""
    stays = {"run_id", "model", *by}
    rows = table.to_pylist()
    own = [{name.rstrip("_"): value for name, value in row.items() if name not in stays} for row in rows]
    return [plain | {"model": row["model"], "value": _value(row, by)} for plain, row in zip(own, rows, strict=True)]


def _value(row: Mapping[str, Any], by: Sequence[str]) -> str:
    return ", ".join("–" if row[name] is None else str(row[name]) for name in by)  # a model that was fitted to no value


def _head(rows: Sequence[Mapping[str, Any]], models: Sequence[str], by: Sequence[str]) -> str:
    title = "One model for each value of " + ", ".join(map(page.code, by)) if by else "Several models"
    count = f"{len(rows):,} fits" + (f" of {len(models)} models" if len(models) > 1 else "")
    started = rows[0]["started"]
    failed = sum(row["message"] is not None and row["loglik"] is None for row in rows)
    loose = sum(not row["converged"] for row in rows) - failed
    singular = sum(bool(row["singular"]) for row in rows)
    chips = [("good", f"{len(rows) - failed - loose:,} converged")]
    chips += [("warn", f"{singular:,} singular")] if singular else []
    chips += [("bad", f"{loose:,} not converged")] if loose else []
    chips += [("bad", f"{failed:,} could not be fitted")] if failed else []
    names = "<br>".join(page.code(one_line(model)) for model in models[:6]) + ("<br>…" if len(models) > 6 else "")
    meta = f"{count} · {started:%d %B %Y, %H:%M} UTC"
    return f'<header><p class="kicker">{title}</p>\n<h1>{names}</h1><p class="meta">{meta}</p>\n{page.status(chips)}</header>'


def _reading(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> list[str]:
    name = f"{page.code('mlpipe report FIT --model NAME --by COLUMN=VALUE')} shows one of the fits whole."
    if not by:
        read = {(row["source_fingerprint"], row["nobs"]) for row in rows if row["loglik"] is not None}
        apart = "The models were not fitted to rows chosen alike, so their likelihoods need not compare."
        return [f"{apart if len(read) > 1 else 'Each model was fitted to the same rows.'} {name}"]
    of = ", ".join(map(page.code, by))
    return [
        f"Each value of {of} has a model of its own, fitted to its rows alone: nothing is shared between values, and estimates are not "
        f"pulled towards each other. {name}",
        "The most extreme estimates are partly the least certain ones: read them with their intervals. Of a hundred intervals about five "
        "leave out the truth by chance.",
    ]


# -- coefficients


def _drawn(coefficients: pa.Table, model: str, by: Sequence[str], k: int) -> list[str]:
    """A caterpillar over the values for each coefficient."""
    rows = [row for row in _plain(matching(coefficients, {"model": model}), by) if row["effect"] == "fixed"]
    terms = sorted(dict.fromkeys(row["term"] for row in rows), key="(Intercept)".__eq__)
    out = []
    for j, term in enumerate(terms[:DRAWN]):
        own = [row for row in rows if row["term"] == term and row["std_error"]]
        if len(own) > 1:
            out.append(_figure(own, term, by, f"values-{k}-{j}"))
    return out + ([f"<p>{len(terms) - DRAWN} more coefficients are in the tables.</p>"] if len(terms) > DRAWN else [])


def _figure(rows: Sequence[Mapping[str, Any]], term: str, by: Sequence[str], key: str) -> str:
    import pyarrow as pa

    estimates, errors = (np.array([row[name] for row in rows], dtype=float) for name in ("estimate", "std_error"))
    plot = ranked(pa.table({"value": [row["value"] for row in rows], "estimate": estimates, "estimate_se": errors}), "estimate")
    shown = f"; the {EXTREMES} lowest and highest one by one, the others as a band of means" if len(rows) > MOST_LEVELS else ""
    caption = f"{page.code(term)} by {', '.join(map(page.code, by))}, in order, with 95% intervals{shown}. {_spread(estimates, errors)}"
    return page.figure(svg(plot, key, f"{term} by {', '.join(by)}", width=WIDTH), caption)


def _spread(estimates: np.ndarray, errors: np.ndarray) -> str:
    """Whether estimates differ by more than their errors (Cochran 1954, Q), and their weighted mean."""
    from scipy.special import chdtrc

    weights = 1.0 / errors**2
    mean = float(weights @ estimates / weights.sum())
    q, degrees = float(weights @ (estimates - mean) ** 2), len(estimates) - 1
    p = float(chdtrc(degrees, q))
    found = f"Q = {number(q)} on {degrees:,} degrees of freedom, p = {page.text(p_value(p))}"
    verdict = "They differ by more than their errors explain" if p < 0.05 else "They differ by no more than their errors explain"
    return f"{verdict} ({found}); their mean, weighted by precision, is {number(mean)}."


# -- fits


def _fits(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> str:
    """The fits, those with something to say first."""
    order = sorted(rows, key=lambda row: (bool(row["converged"]), not row["singular"]))
    cells = [
        [
            page.text(row["value"]) if by else page.code(one_line(row["model"])), _state(row), f"{row['nobs'] or 0:,.15g}",
            f"{row['loglik']:,.1f}" if row["loglik"] is not None and math.isfinite(row["loglik"]) else "–",
        ]
        for row in order[:LISTED]
    ]  # fmt: skip
    caption = f"The first {LISTED} of {len(rows):,} fits, those with something to say before the others." if len(rows) > LISTED else ""
    first = page.text(", ".join(by)) if by else "Model"
    return page.table([first, "State", "Rows used", "Log-likelihood"], cells, caption, left=2)


def _state(row: Mapping[str, Any]) -> str:
    if row["loglik"] is None:
        return f'<span class="bad">could not be fitted: {page.text(row["message"])}</span>'
    if not row["converged"]:
        return f'<span class="bad">not converged: {page.text(row["message"])}</span>'
    return '<span class="warn">singular</span>' if row["singular"] else "converged"
