"""Coefficients with t or normal tests, as a table and as text: what least squares and estimating equations share."""
from __future__ import annotations

import html as markup
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import ConfigError
from .layout import aligned, coefficients, p_value, printable, to_decimals
from .variance import estimate_row, standard_errors, tidy_schema
from .wald import check_level

if TYPE_CHECKING:
    import pyarrow as pa

    from .result import MixedFit


def critical(level: float, degrees: float) -> float:
    """The t (or, for infinite degrees of freedom, normal) quantile of a two-sided interval. Raises ConfigError for no such level."""
    from scipy.special import ndtri, stdtrit

    check_level(level)
    at = 0.5 + level / 2.0
    return float(ndtri(at)) if math.isinf(degrees) else float(stdtrit(degrees, at))


def tests(fit: MixedFit, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Statistics and two-sided p-values (p,)."""
    from scipy.special import ndtr, stdtr

    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = fit.beta / standard_errors(fit)
        p = 2.0 * (ndtr(-np.abs(statistic)) if math.isinf(degrees) else stdtr(degrees, -np.abs(statistic)))
    return statistic, p


def tidy(fit: MixedFit, conf_level: float, degrees: float) -> pa.Table:
    """The columns of `MixedFit.tidy`; `df` is null where the tests are normal."""
    import pyarrow as pa

    width = critical(conf_level, degrees)
    statistic, p = tests(fit, degrees)
    rows = []
    for name, estimate, se, t, value in zip(fit.names, fit.beta, standard_errors(fit), statistic, p, strict=True):
        row = estimate_row("fixed", None, name, estimate, se, width)
        if not math.isnan(t):
            row |= {"statistic": float(t), "p_value": float(value)}
        row["df"] = None if math.isinf(degrees) else float(degrees)
        rows.append(row)
    rows += [estimate_row("ran_pars", *parameter, width) for parameter in fit.family_parameters()]
    return pa.Table.from_pylist(rows, schema=tidy_schema())


def intervals(fit: MixedFit, method: str, level: float, degrees: float) -> pa.Table:
    """`term`, `conf_low`, `conf_high` of every coefficient. Raises ConfigError for a method other than "wald"."""
    import pyarrow as pa

    if method != "wald":
        raise ConfigError(f'method = {method!r}: intervals of this fit are method="wald"')
    width = critical(level, degrees) * standard_errors(fit)
    ends = {"conf_low": fit.beta - width, "conf_high": fit.beta + width}
    return pa.table({"term": pa.array(fit.names, pa.string())} | {name: pa.array(at, mask=np.isnan(at)) for name, at in ends.items()})


def text_rows(fit: MixedFit, degrees: float) -> list[list[str]]:
    """The printed table, with R's rule for digits."""
    letter = "z" if math.isinf(degrees) else "t"
    errors = standard_errors(fit)
    numbers = coefficients([*fit.beta.tolist(), *errors.tolist()])
    statistic, p = tests(fit, degrees)
    columns = (fit.names, numbers[: len(p)], numbers[len(p) :], (to_decimals(v, 3) for v in statistic), map(p_value, p))
    return [["", "Estimate", "Std. Error", f"{letter} value", f"Pr(>|{letter}|)"], *(list(row) for row in zip(*columns, strict=True))]


def text(head: Sequence[str], rows: list[list[str]], foot: Sequence[str], notes: Sequence[str]) -> str:
    """A whole summary."""
    table = ["Coefficients:", *aligned(rows, left=1)] if len(rows) > 1 else ["No coefficients"]
    return "\n".join([*head, "", *table, "", *foot, *([""] if notes else []), *(f"note: {note}" for note in notes)])


def html(head: Sequence[str], rows: list[list[str]], foot: Sequence[str], notes: Sequence[str]) -> str:
    """The same for notebooks, everything escaped."""
    title, *facts = [markup.escape(printable(line)) for line in (*head, *foot)]
    cells = "".join(f"<th>{markup.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{markup.escape(printable(cell))}</td>" for cell in row) + "</tr>" for row in rows[1:])
    table = f"<table><caption>Coefficients</caption><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>" if len(rows) > 1 else ""
    said = "".join(f"<p>note: {markup.escape(note)}</p>" for note in notes)
    return f"<div><p><b>{title}</b><br>{'<br>'.join(facts)}</p>{table}{said}</div>"
