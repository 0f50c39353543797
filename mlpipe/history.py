"""How a fit's coefficients moved: over the runs that its target keeps, and since the fit before in a store of statistics."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from . import page
from .drawing import svg
from .plot import history as drawn
from .reading import number
from .store import of_entry, tables_of_runs

if TYPE_CHECKING:
    from .result import MixedFit

SHOWN, MOST_RUNS = 8, 60  # coefficients drawn, and the last runs of them
LARGE = 2.0  # standard errors, from which a change is worth a look


@dataclass(frozen=True)
class Run:
    """A run that a target keeps: when it `started`, its `facts` (the row of `_fit`) and `manifest`, and its coefficients by term."""

    run_id: str
    started: datetime
    facts: Mapping[str, Any]
    manifest: Mapping[str, Any]
    coefficients: Mapping[str, Mapping[str, Any]]


def runs_of(target: Any, prefix: str, stamps: Mapping[str, Any]) -> list[Run]:
    """The runs that hold a fit of this model and these values, in the order they were written."""
    out = []
    for tables in tables_of_runs(target, prefix, ("fit", "coef", "manifest")):
        if "coef" not in tables or any(name not in tables["coef"].column_names for name in stamps):
            continue
        run = tables["fit"]["run_id"][0].as_py()
        facts, coefficients, manifest = (of_entry(tables[name], stamps).to_pylist() for name in ("fit", "coef", "manifest"))
        if facts and coefficients:
            # what is written beside a column of the same name has one more underscore
            rows = [{name.rstrip("_"): value for name, value in row.items()} for row in coefficients]
            fixed = {row["term"]: row for row in rows if row["effect"] == "fixed"}
            out.append(Run(run, facts[0]["started"], facts[0], manifest[0], fixed))
    return out


def section(fit: MixedFit, runs: Sequence[Run]) -> str:
    """The section on drift; "" where nothing is known of earlier fits."""
    moved = _moved(fit, runs)
    parts = [_store(fit), _sentence(fit, runs, moved), _figure(fit, runs[-MOST_RUNS:], moved), _table(moved)]
    return page.section("Drift over runs", *parts)


def _moved(fit: MixedFit, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each coefficient's change since the fit before, in standard errors of this one; the largest first."""
    found: list[dict[str, Any]] = list(fit.info.get("drift", {}).get("terms", ()))
    if not found and len(runs) > 1:
        before, now = runs[-2].coefficients, runs[-1].coefficients
        pairs = [(name, before[name]["estimate"], row["estimate"], row["std_error"]) for name, row in now.items() if name in before]
        names = ("term", "previous", "estimate", "std_error")
        found = [dict(zip(names, p, strict=True)) | {"drift": (p[2] - p[1]) / p[3] if p[3] else 0.0} for p in pairs]
    return sorted(found, key=lambda row: -abs(row["drift"]))


def _sentence(fit: MixedFit, runs: Sequence[Run], moved: Sequence[Mapping[str, Any]]) -> str:
    if not moved:
        return ""
    noted = fit.info.get("drift", {}).get("since")
    since = datetime.fromisoformat(noted) if noted else runs[-2].started
    worst = moved[0]
    verdict = (
        "That is more than chance would move it between fits that share most of their rows: look at what arrived."
        if abs(worst["drift"]) >= LARGE
        else "That is within what chance moves."
    )
    return (
        f"<p>Since the fit of {since:%d %B %Y, %H:%M} UTC the coefficient that moved most is {page.code(worst['term'])}: from "
        f"{number(worst['previous'])} to {number(worst['estimate'])}, {abs(worst['drift']):.2f} of its standard errors. {verdict}</p>"
    )


def _figure(fit: MixedFit, runs: Sequence[Run], moved: Sequence[Mapping[str, Any]]) -> str:
    if len(runs) < 2:
        return ""
    terms = [row["term"] for row in moved][:SHOWN] or list(fit.names)[:SHOWN]
    rows = [
        {"term": term, "run": when, "number": k, **_interval(run.coefficients[term])}
        for term in terms
        for k, (run, when) in enumerate(zip(runs, _times(runs), strict=True), 1)
        if term in run.coefficients
    ]
    of = "coefficients" if len(terms) == len(fit.names) else f"{len(terms)} coefficients that moved most"
    caption = f"The {of} in the last {len(runs)} runs, with 95% intervals; each has a scale of its own."
    return page.figure(svg(drawn(rows), "drift", "Coefficients over runs"), caption)


def _times(runs: Sequence[Run]) -> list[str]:
    """When each run was, as short as tells them apart."""
    for form in ("%d %b", "%d %b %Y", "%d %b %H:%M", "%d %b %H:%M:%S"):
        out = [run.started.strftime(form) for run in runs]
        if len(set(out)) == len(out):
            return out
    return [f"{when} ({k})" for k, when in enumerate(out, 1)]


def _interval(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("estimate", "conf_low", "conf_high")}


def _table(moved: Sequence[Mapping[str, Any]]) -> str:
    if not moved:
        return ""
    rows = [
        [page.code(row["term"]), *(number(row[name]) for name in ("previous", "estimate", "std_error")), f"{row['drift']:+.2f}"]
        for row in moved[:SHOWN]
    ]
    caption = "" if len(moved) <= SHOWN else f"The {SHOWN} of {len(moved)} coefficients that moved most."
    return page.table(["Coefficient", "Before", "Now", "Std. error", "Change in std. errors"], rows, caption)


def _store(fit: MixedFit) -> str:
    """What a run with a store of statistics read, and how the inputs of fixed bases moved."""
    store = fit.info.get("store")
    if store is None:
        return ""
    words = {"replaced": "replaced", "dropped": "no longer counted", "vanished": "gone from the source and kept"}
    more = "".join(f", {len(store[key])} {word}" for key, word in words.items() if store[key])
    stopped = f" ({len(resumed)} of them by a run that was stopped)" if (resumed := store.get("resumed")) else ""
    read = len(store["read"]) + len(store.get("resumed", ()))
    said = f"{read} of {store['total']} partitions were read for this fit{stopped}{more}; of the others the sums were kept."
    for label, input_ in fit.info.get("input_drift", {}).items():
        beyond = ", and values lie beyond the range of then" if input_["outside"] else ""
        said += (
            f" Since the store was made the mean of {page.code(label)} moved by {input_['shift']:+.2f} of its standard deviations, "
            f"whose size is now {input_['spread']:.2f} of what it was{beyond}."
        )
    return f"<p>{said}</p>"
