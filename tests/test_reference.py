"""lme4's results for every linear mixed model: one grouping factor on three engines, several on one or two; R's design matrices out of SQL.

Units are such that a tolerance reads as "of a standard error" or "of the quantity itself". They are between ten and a
hundred times what is observed, and stricter than what the reference recommends.
"""
from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow.compute as pc
import pytest

import mlpipe as mp
from mlpipe.design import code
from mlpipe.engines.base import Columns, Engine
from mlpipe.features import Coordinates, Recipe, level_labels, needed
from mlpipe.formula import Formula, parse
from mlpipe.sql import Names, feature, named, skeleton

from .conftest import as_data, as_engine
from .numpy_oracle import kinds_of, settle

REFERENCE = Path(__file__).parent / "reference"
ENGINES = ("polars", "duckdb", "path")
SPECS = {path.stem: json.loads(path.read_text()) for path in sorted((REFERENCE / "fits").glob("*.json"))}
SEVERAL = {name for name, spec in SPECS.items() if len(spec["results"].get("ngroups") or {}) > 1}
ELSEWHERE = {("pastes_nested", "duckdb"), ("penicillin_crossed", "path"), ("egsingle_3level", "path")}
CASES = [
    (name, engine)
    for name, spec in SPECS.items() if "lmer" in spec["software"]["engine"] and "glmer" not in spec["software"]["engine"]
    for engine in ENGINES if engine == "polars" or name not in SEVERAL or (name, engine) in ELSEWHERE
]  # fmt: skip
MODEL_WARNINGS = (mp.RankWarning, mp.SingularFitWarning)


class Check(NamedTuple):
    """One comparison: |got - want| / unit must be at most `tolerance` everywhere."""

    what: str
    got: Any
    want: Any
    unit: Any
    tolerance: float

    @property
    def off(self) -> float:
        got, want = np.asarray(self.got, float), np.asarray(self.want, float)
        if got.shape != want.shape:
            return math.inf
        keep = ~np.isnan(want)
        off = np.abs(got - want)[keep] / np.broadcast_to(np.asarray(self.unit, float), want.shape)[keep]
        return float(np.nan_to_num(off, nan=math.inf).max(initial=0.0))


def load(spec: dict[str, Any], *, typed: bool) -> pl.DataFrame:
    """The data; factors as Enum in R's order of levels, or as the plain text that is in the file."""
    frame = pl.read_parquet(REFERENCE / spec["data"]["file"])
    if not typed:
        return frame
    columns = json.loads((REFERENCE / spec["data"]["schema"]).read_text())["columns"]
    factors = {c["name"]: [str(level) for level in c["levels"]] for c in columns if c["type"] in ("factor", "ordered")}
    return frame.with_columns(pl.col(name).cast(pl.String).cast(pl.Enum(levels)) for name, levels in factors.items())


def fixed_factors(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The factors of the fixed part as R had them: text files carry no order of levels, lme4 codes ordered ones by poly."""
    fixed = re.sub(r"\([^()|]*(?:\([^()]*\)[^()|]*)*\|[^()]*\)", "", spec["model"]["formula"])
    factors = spec["model"]["factors"] or {}
    return {name: factor for name, factor in factors.items() if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", fixed)}


def fitted(spec: dict[str, Any], engine: str, folder: Path) -> mp.LMMFit:
    model, factors = spec["model"], fixed_factors(spec)
    contrasts = {name: text.removeprefix("contr.") for name, text in model["contrasts"].items() if name != "default"}
    contrasts |= {name: "poly" for name, factor in factors.items() if factor["ordered"]}
    levels = {name: factor["levels"] for name, factor in factors.items()} if engine == "path" else None
    data = as_data(load(spec, typed=engine != "path"), engine, folder)
    with warnings.catch_warnings():
        for kind in MODEL_WARNINGS:
            warnings.simplefilter("ignore", kind)
        return mp.lmm(
            model["formula"],
            data,
            reml=model["method"] == "REML",
            weights=model["weights"],
            contrasts=contrasts or None,
            levels=levels or None,
        )


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_lme4s_results(name: str, engine: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    want, fit = spec["results"], fitted(spec, engine, tmp_path)
    assert list(fit.fixef()) == want["fixef"]["names"]
    assert list(fit.dropped) == np.atleast_1d(want["dropped_columns"] or []).tolist()
    assert fit.singular == want["is_singular"]
    assert fit.converged
    rows = load(spec, typed=engine != "path").head(max(want["rows"]) + 1)
    checks = [*estimates(fit, want), *variances(fit, want, "results_on_fitted_scale" in spec), *modes(fit, want)]
    fit.write(tmp_path / "fit")
    again = mp.load(tmp_path / "fit")
    (tmp_path / "new").mkdir()  # another file than the fit's own
    checks += [*same(fit, again), *predictions(again, want, as_data(rows, engine, tmp_path / "new"))]
    assert len(checks) >= 12
    beyond = [check for check in checks if not check.off <= check.tolerance]
    failed = [f"{check.what}: off by {check.off:.2g}, allowed {check.tolerance:.2g}" for check in beyond]
    assert not failed, "\n".join(failed)


def estimates(fit: mp.LMMFit, want: dict[str, Any]) -> Iterator[Check]:
    se = np.array(want["fixef"]["se"])
    row = fit.glance().to_pylist()[0]
    yield Check("fixed effects, in se", list(fit.fixef().values()), want["fixef"]["estimate"], se, 1e-7)
    yield Check("standard errors", np.sqrt(np.diag(fit.vcov())), se, se, 1e-7)
    if want["vcov"] is not None:
        yield Check("vcov", fit.vcov(), np.reshape(want["vcov"], (len(se), len(se))), np.outer(se, se), 1e-7)
    yield Check("sigma", row["sigma"], want["sigma"], want["sigma"], 1e-7)
    yield Check("nobs", row["nobs"], want["nobs"], 1, 0)
    yield Check("blocks", list(fit.levels.values()), [want["ngroups"][group] for group in want["ngroups"]], 1, 0)
    yield Check("the most blocks", fit.n_blocks, max(want["ngroups"].values()), 1, 0)
    yield Check("parameters", row["n_params"], want["df"], 1, 0)
    size = 1 + 1e-3 * abs(want["logLik"])
    for ours, theirs in (("loglik", "logLik"), ("aic", "AIC"), ("bic", "BIC"), ("deviance", "minus2_logLik")):
        yield Check(theirs, row[ours], want[theirs], size, 1e-9)


def variances(fit: mp.LMMFit, want: dict[str, Any], far_off: bool) -> Iterator[Check]:
    """Standard deviations and correlations in lme4's rows; `far_off`: 15 digits do not determine theta of a raw intercept far away."""
    got, terms = fit.varcorr().to_pylist(), want["varcorr"]
    yield Check("rows of varcorr", len(got), len(terms), 1, 0)
    for ours, theirs in zip(got, terms, strict=True):
        names = (ours["group"], ours["term1"], ours["term2"])
        assert (set(names[0].split(":")), *names[1:]) == (set(_group(theirs["group"])), theirs["name1"], theirs["name2"])
        size = 1.0 if theirs["name2"] else max(theirs["sdcor"], 1e-6 * want["sigma"])
        yield Check(f"varcorr {names}", ours["sd"], theirs["sdcor"], size, 1e-6)
    if not far_off:
        yield Check("theta", fit.theta, want["theta"]["values"], 1 + np.abs(want["theta"]["values"]), 1e-7)


def _group(name: str) -> list[str]:
    """The keys of one of lme4's groups, which it names from the inside out and numbers where several terms share one."""
    return re.sub(r"\.\d+$", "", name).split(":")


def modes(fit: mp.LMMFit, want: dict[str, Any]) -> Iterator[Check]:
    """BLUPs and conditional standard deviations of the first ten levels, and the sum of squares over all."""
    for group, reference in (want.get("ranef") or {}).items():
        keys = _group(group) if len(fit.recipe.groups) > 1 else [group]
        table = fit.ranef(next((name for name in fit.groups if set(name.split(":")) == set(keys)), None))
        labels = [":".join(map(str, row)) for row in zip(*(table[key].to_pylist() for key in keys), strict=True)]
        at = {(label, term): i for i, (label, term) in enumerate(zip(labels, table["term"].to_pylist(), strict=True))}
        place = np.array([[at[str(level), term] for term in reference["terms"]] for level in reference["levels"]])
        sd = np.array(reference["cond_sd"], float).reshape(place.shape)
        unit = np.maximum(sd, 1e-3 * want["sigma"])
        yield Check("BLUPs, in their sd", table["estimate"].to_numpy()[place], np.reshape(reference["mode"], place.shape), unit, 1e-6)
        yield Check("sds of BLUPs", table["std_error"].to_numpy()[place], sd, unit, 1e-6)
        for term, squares in reference["sum_of_squares"].items():
            estimate = table.filter(pc.equal(table["term"], term))["estimate"].to_numpy()
            yield Check(f"sum of squares of {term}", estimate @ estimate, squares, squares or want["sigma"] ** 2, 1e-6)


def predictions(fit: mp.LMMFit, want: dict[str, Any], data: Any) -> Iterator[Check]:
    rows, unit = want["rows"], max(np.std(want["fitted"]), 1e-3 * want["sigma"])
    augmented = fit.augment(data).read_all()
    yield Check("fitted", augmented["fitted"].to_numpy()[rows], want["fitted"], unit, 1e-7)
    yield Check("fitted_fixed", augmented["fitted_fixed"].to_numpy()[rows], want["population"], unit, 1e-6)
    predicted = fit.predict(data, effects="population").read_all()["predicted"].to_numpy()
    yield Check("population predictions", predicted[rows], want["population"], unit, 1e-6)


def same(fit: mp.LMMFit, again: mp.LMMFit) -> Iterator[Check]:
    for what, ours, theirs in (
        ("fixed effects", fit.beta, again.beta), ("vcov", fit.vcov(), again.vcov()), ("theta", fit.theta, again.theta),
        ("loglik", fit.loglik, again.loglik),
    ):  # fmt: skip
        yield Check(f"{what} after write and load", theirs, ours, 1, 0)
    for group in fit.groups:
        first, second = (f.ranef(group)["estimate"].to_numpy() for f in (fit, again))  # summed twice, by several threads
        yield Check(f"BLUPs of {group} after write and load", second, first, np.abs(first).max(initial=fit.sigma), 1e-11)


# ---- R's design matrices, computed by SQL

CODING = json.loads((REFERENCE / "coding.json").read_text())
ROWS = pl.DataFrame(CODING["data"])
SCALINGS = (0.25, 2.0)  # a shift and scale for every numeric column: the maps must undo them exactly


@pytest.mark.parametrize("engine", ["polars", "duckdb"])
@pytest.mark.parametrize("case", CODING["cases"], ids=lambda case: case["formula"] + str(case.get("contrasts", "")))
def test_sql_computes_rs_design_matrix(case: dict[str, Any], engine: str, tmp_path: Path) -> None:
    formula = parse(case["formula"])
    ordered = any(getattr(node, "name", None) == CODING["ordered"] for term in formula.fixed for node in term.variables)
    contrasts = case.get("contrasts") or ({CODING["ordered"]: "poly"} if ordered else None)
    data = {name: ROWS[name].to_numpy() for name in ROWS.columns}
    variables = settle(formula, {n: v.astype(str) if v.dtype == object else v for n, v in data.items()}, CODING["levels"], contrasts)
    columns = code(formula.fixed, variables)
    recipe = _recipe(formula, variables, columns)
    source = as_engine(ROWS, engine, tmp_path)
    design = _features(recipe, source) @ recipe.matrix(columns)
    source.close()
    assert [column.name for column in columns] == np.atleast_1d(case["names"]).tolist()
    np.testing.assert_allclose(design, np.array(case["matrix"]), rtol=1e-9, atol=1e-9)


def _recipe(formula: Formula, variables: dict[str, Any], columns: list[Any]) -> Recipe:
    from mlpipe.design import Atom

    scalings = {Atom(v.label, str(k + 1)): SCALINGS for v in variables.values() if v.kind == "numeric" for k in range(len(v.columns))}
    levels = level_labels(variables.values())
    coordinates = Coordinates(scalings, levels, {label: labels[len(labels) // 2] for label, labels in levels.items()})
    kinds = kinds_of({name: ROWS[name].to_numpy() for name in ROWS.columns})
    return Recipe(
        formula=formula, kinds=kinds, contrasts=None, responses=(), extra_responses=(), weights=None, freq=None, offset=None,
        groups=(), variables=variables, coordinates=coordinates, features=tuple(needed(columns, coordinates)), z=(),
    )  # fmt: skip


def _features(recipe: Recipe, source: Engine) -> np.ndarray:
    """Every feature's values, in row order."""
    names = Names({name: i for i, name in enumerate(ROWS.columns)}, recipe.kinds)
    selected = [named(feature(monomial, recipe, names), f"f{i}") for i, monomial in enumerate(recipe.features)]
    statement = skeleton("rows").select("rn", *selected, append=False, copy=False).order_by("rn")
    table = source.query(statement, Columns(values=frozenset(range(ROWS.width)), row_number=True)).read_all()
    return np.column_stack([table[f"f{i}"].to_numpy() for i in range(len(selected))] or [np.zeros((ROWS.height, 0))])
