"""Tests of hypotheses against dense algebra, lme4 and each other."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy import stats

import mlpipe as mp
from mlpipe.formula import parse
from mlpipe.hypotheses import contrasts, droppable, without

REFERENCE = Path(__file__).parent / "reference"
DATA = REFERENCE / "data"


@pytest.fixture(scope="module")
def cake() -> mp.LMMFit:
    return mp.lmm("angle ~ recipe * temp + (1 | recipe:replicate)", DATA / "cake.parquet")


def one(table: Any) -> dict[str, Any]:
    return dict(table.to_pylist()[0])


CASES = [
    ("recipeB = recipeC = 0", [[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]], [0, 0]),
    ("recipeB - recipeC = 0", [[0, 1, -1, 0, 0, 0]], [0]),
    ("2 * recipeB + 1 = (recipeC - 3) / 2", [[0, 2, -0.5, 0, 0, 0]], [-2.5]),
    ("recipeB:temp = recipeC:temp, temp = 0.1", [[0, 0, 0, 0, 1, -1], [0, 0, 0, 1, 0, 0]], [0, 0.1]),
    ("(Intercept) == 30; -temp = 0", [[1, 0, 0, 0, 0, 0], [0, 0, 0, -1, 0, 0]], [30, 0]),
    ([[0, 0, 0, 1, 0, 0]], [[0, 0, 0, 1, 0, 0]], [0]),
]


@pytest.mark.parametrize(("hypothesis", "L", "value"), CASES)
def test_hypotheses_are_read(cake: mp.LMMFit, hypothesis: Any, L: Any, value: Any) -> None:
    got, ends, _ = contrasts(cake, hypothesis)
    np.testing.assert_allclose(got, L)
    np.testing.assert_allclose(ends, value)
    found = one(cake.test(hypothesis))
    L = np.array(L, float)
    gap = L @ cake.beta - np.array(value, float)
    chi2 = gap @ np.linalg.solve(L @ cake.vcov() @ L.T, gap)
    assert found["statistic"] == pytest.approx(chi2) and found["df"] == len(L) and found["df_denominator"] is None
    assert found["p_value"] == pytest.approx(stats.chi2.sf(chi2, len(L)))


WRONG = [
    ("recipeD = 0", "no coefficient 'recipeD'"), ("recipeB", "no equation"), ("1 = 1", "without a coefficient"),
    ("recipeB * recipeC = 0", "not linear"), ("recipeB / 0 = 1", "divides by zero"), ("recipeB + = 0", "cannot be read|no coefficient"),
    ([[1.0, 2.0]], "6 coefficients"), ("(recipeB = 0", "cannot be read|no coefficient"), ([["x"]], "neither text"),
]  # fmt: skip


@pytest.mark.parametrize(("hypothesis", "message"), WRONG)
def test_what_cannot_be_read_is_refused(cake: mp.LMMFit, hypothesis: Any, message: str) -> None:
    with pytest.raises(mp.ConfigError, match=message):
        cake.test(hypothesis)


def test_names_with_operators_are_whole() -> None:
    fit = mp.lmm("distance ~ Sex * I(age - 11) + (1 | Subject)", DATA / "Orthodont.parquet")
    name = next(name for name in fit.names if name.startswith("Sex") and ":" in name)
    L, value, _ = contrasts(fit, f"I(age - 11) - {name} = 0.5")
    assert L[0, fit.names.index("I(age - 11)")] == 1.0 and L[0, fit.names.index(name)] == -1.0 and value[0] == 0.5


def test_f_tests_are_lmertest_s() -> None:
    spec = json.loads((REFERENCE / "fits" / "machines_interaction_group.json").read_text())
    fit = mp.lmm(spec["model"]["formula"], DATA / "Machines.parquet")
    names = [name for name in fit.names if name != "(Intercept)"]
    for ddf, key in (("satterthwaite", "satterthwaite"), ("kenward-roger", "kenward_roger")):
        want = spec["results"][key]["anova_type3"][0]
        found = one(fit.test(" = ".join([*names, "0"]), ddf=ddf))
        assert found["statistic"] == pytest.approx(want["F"], rel=1e-4)
        assert found["df"] == want["num_df"] and found["df_denominator"] == pytest.approx(want["den_df"], rel=1e-4)
        assert found["p_value"] == pytest.approx(want["p"], rel=1e-3)


def test_redundant_contrasts_count_once(cake: mp.LMMFit) -> None:
    twice = one(cake.test("temp = 0, 2 * temp = 0", ddf="satterthwaite"))
    assert twice["df"] == 1
    assert twice["statistic"] == pytest.approx(one(cake.test("temp = 0", ddf="satterthwaite"))["statistic"])


def test_anova_refits_by_ml_and_knows_the_boundary() -> None:
    small = mp.lmm("Reaction ~ Days + (1 | Subject)", DATA / "sleepstudy.parquet")
    large = mp.lmm("Reaction ~ Days + (Days | Subject)", DATA / "sleepstudy.parquet")
    table = mp.anova(large, small).to_pylist()
    by_ml = [mp.lmm(fit.formula, DATA / "sleepstudy.parquet", reml=False).loglik for fit in (small, large)]
    assert [row["loglik"] for row in table] == pytest.approx(by_ml, abs=1e-6)
    assert "refitted" in table[0]["note"] and "½χ²(1) + ½χ²(2)" in table[1]["note"]
    statistic = 2 * (by_ml[1] - by_ml[0])
    assert table[1]["statistic"] == pytest.approx(statistic, abs=1e-5) and table[1]["df"] == 2
    assert table[1]["p_value"] == pytest.approx(stats.chi2.sf(statistic, 2), rel=1e-5)
    assert table[1]["p_boundary"] == pytest.approx(0.5 * stats.chi2.sf(statistic, 1) + 0.5 * stats.chi2.sf(statistic, 2), rel=1e-5)


def test_anova_of_generalized_fits_and_fixed_effects() -> None:
    frame = pl.read_parquet(DATA / "cbpp.parquet")
    formula = "cbind(incidence, size - incidence) ~ {} + (1 | herd)"
    fits = [mp.glmm(formula.format(x), frame, family="binomial") for x in ("1", "period")]
    plain = mp.glm("cbind(incidence, size - incidence) ~ 1", frame, family="binomial")
    rows = mp.anova(plain, *fits).to_pylist()
    assert [row["n_params"] for row in rows] == [1, 2, 5]
    assert "½χ²(0) + ½χ²(1)" in rows[1]["note"] and rows[1]["p_boundary"] == pytest.approx(rows[1]["p_value"] / 2)
    assert rows[2]["note"] is None and rows[2]["p_value"] == pytest.approx(stats.chi2.sf(rows[2]["statistic"], 3))


def test_fits_that_cannot_be_compared() -> None:
    frame = pl.read_parquet(DATA / "sleepstudy.parquet")
    fit = mp.lmm("Reaction ~ Days + (1 | Subject)", frame)
    with pytest.raises(mp.ConfigError, match="two fits"):
        mp.anova(fit)
    with pytest.raises(mp.ConfigError, match="same response and rows"):
        mp.anova(fit, mp.lmm("Reaction ~ 1 + (1 | Subject)", frame.head(160)))


def test_drop1_is_anova_term_by_term(cake: mp.LMMFit) -> None:
    fit = mp.lmm("angle ~ recipe + temp + (1 | recipe:replicate)", DATA / "cake.parquet")
    rows = {row["term"]: row for row in fit.drop1().to_pylist()}
    assert list(rows) == ["<none>", "recipe", "temp"]
    for term, kept in (("recipe", "temp"), ("temp", "recipe")):
        smaller = mp.lmm(f"angle ~ {kept} + (1 | recipe:replicate)", DATA / "cake.parquet")
        want = mp.anova(smaller, fit).to_pylist()[1]
        assert rows[term]["statistic"] == pytest.approx(want["statistic"], abs=1e-6)
        assert rows[term]["p_value"] == pytest.approx(want["p_value"], rel=1e-5)
    assert [row["term"] for row in cake.drop1().to_pylist()] == ["<none>", "recipe:temp"]


def test_drop1_of_least_squares() -> None:
    """Of normal likelihoods the ratio is that of residual sums of squares."""
    frame = pl.read_parquet(DATA / "sleepstudy.parquet").with_columns(odd=pl.col("Days") % 2)
    fit = mp.ols("Reaction ~ Days + odd", frame, cluster="Subject")
    rows = {row["term"]: row for row in fit.drop1().to_pylist()}
    for term, rest in (("Days", "odd"), ("odd", "Days")):
        small = mp.ols(f"Reaction ~ {rest}", frame)
        assert rows[term]["statistic"] == pytest.approx(180 * np.log(small.rss / fit.rss)) and rows[term]["df"] == 1
    with pytest.raises(mp.ConfigError, match="absorbed"):
        mp.ols("Reaction ~ Days", frame, absorb="Subject").drop1()
    with pytest.raises(mp.ConfigError, match="no likelihood"):
        mp.gee("Reaction ~ Days", frame, groups="Subject").drop1()


def test_drop1_of_generalized_fits() -> None:
    frame = pl.read_parquet(DATA / "cbpp.parquet")
    rows = mp.glmm("cbind(incidence, size - incidence) ~ period + (1 | herd)", frame, family="binomial").drop1().to_pylist()
    assert rows[1]["term"] == "period" and rows[1]["df"] == 3 and rows[1]["p_value"] < 1e-4


def test_formulas_without_a_term() -> None:
    formula = parse("log(y) ~ a * b + `odd name` + offset(z) + (1 + x || g) + (1 | a/h)")
    assert [without(formula, term) for term in droppable(formula)] == [
        "log(y) ~ 1 + a + b + a:b + (1 + x || g) + (1 | a/h) + offset(z)",
        "log(y) ~ 1 + a + b + `odd name` + (1 + x || g) + (1 | a/h) + offset(z)",
    ]
