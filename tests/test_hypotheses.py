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
from mlpipe.solve import degrees

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


def test_equations_that_contradict_each_other(cake: mp.LMMFit) -> None:
    for text in ("temp = 0, temp = 1", "temp = recipeB = 0, temp - recipeB = 1"):
        with pytest.raises(mp.ConfigError, match="contradict"):
            cake.test(text)
    assert one(cake.test("temp = 1, 2 * temp = 2"))["df"] == 1
    with pytest.raises(mp.ConfigError, match="too large"):
        cake.test("temp = 1e400")


def test_least_squares_has_f_tests_over_its_degrees_of_freedom() -> None:
    """Those of a linear hypothesis: the rise of the residual sum of squares; of one coefficient the square of its t; of clusters over their
    number less one."""
    frame = pl.read_parquet(DATA / "sleepstudy.parquet").head(25).with_columns(odd=pl.col("Days") % 2)
    fit, small = mp.ols("Reaction ~ Days + odd", frame), mp.ols("Reaction ~ 1", frame)
    row = one(fit.test("Days = odd = 0"))
    f = (small.rss - fit.rss) / 2 / (fit.rss / 22)
    assert (row["test"], row["df"], row["df_denominator"]) == ("F", 2, 22.0)
    assert (row["statistic"], row["p_value"]) == pytest.approx((f, stats.f.sf(f, 2, 22)))
    clustered = mp.ols("Reaction ~ Days + odd", frame, cluster="Subject")
    row, alone = one(clustered.test("Days = 0")), clustered.tidy().to_pylist()[1]
    assert row["df_denominator"] == 2.0 and row["p_value"] == pytest.approx(alone["p_value"])


def test_more_equations_than_clusters_tell_apart() -> None:
    frame = pl.read_parquet(DATA / "sleepstudy.parquet").head(20).with_columns(odd=pl.col("Days") % 2)
    fit = mp.ols("Reaction ~ Days + odd", frame, cluster="Subject")
    assert one(fit.test("Days = 0"))["df"] == 1
    with pytest.raises(mp.ConfigError, match="does not tell 2 equations apart"):
        fit.test("Days = odd = 0")
    assert np.isnan(fit.f_statistic()["f"]) and np.isnan(fit.f_statistic()["p_value"])
    assert "F-statistic: none" in str(fit)


def test_the_units_of_covariates_do_not_matter_to_a_joint_test() -> None:
    frame = pl.read_parquet(DATA / "sleepstudy.parquet").with_columns(odd=(pl.col("Days") % 2).cast(float))
    for ddf in ("wald", "satterthwaite", "kenward-roger"):
        plain = one(mp.lmm("Reaction ~ Days + odd + (1 | Subject)", frame).test("Days = odd = 0", ddf=ddf))
        wild = one(mp.lmm("Reaction ~ Days + odd + (1 | Subject)", frame.with_columns(pl.col.odd * 1e9)).test("Days = odd = 0", ddf=ddf))
        assert wild["df"] == 2 and wild["statistic"] == pytest.approx(plain["statistic"], rel=1e-6)
        assert wild["p_value"] == pytest.approx(plain["p_value"], rel=1e-4)


def test_a_coefficient_that_was_dropped_is_told() -> None:
    with pytest.warns(mp.RankWarning):
        fit = mp.ols("Reaction ~ Days + I(2 * Days)", DATA / "sleepstudy.parquet")
    with pytest.raises(mp.ConfigError, match="was dropped"):
        fit.test("I(2 * Days) = 0")


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


def test_joint_degrees_of_freedom_do_not_lose_what_varies_little() -> None:
    rng = np.random.default_rng(4)
    g = np.arange(120) % 12
    x = rng.normal(size=120) + rng.normal(size=12)[g]
    y = 2.0 + x + 0.8 * rng.normal(size=12)[g] + rng.normal(size=120)
    near = mp.lmm("y ~ x + (1 | g)", pl.DataFrame({"y": y, "x": x, "g": g}))
    far = mp.lmm("y ~ x + (1 | g)", pl.DataFrame({"y": y, "x": 1e3 * x + 1e5, "g": g}))
    first = np.array([1.0, -100.0])  # the far intercept, whose standard deviation is 1e5 that of the far slope and more
    second = np.array([[0.0, -1.0], [1.0, 0.0]]) @ near.vcov() @ first  # uncorrelated with it
    want = degrees.joint(np.array([one(near.test(row, ddf="satterthwaite"))["df_denominator"] for row in (first, second)]))
    found = [one(far.test(L, ddf="satterthwaite"))["df_denominator"] for L in (np.eye(2), np.array([[2.0, 1.0], [1.0, 3.0]]))]
    assert found == pytest.approx([want] * 2, rel=1e-5)


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


def test_rows_and_weights_that_differ_are_refused() -> None:
    """As many rows, but others: the response's mean tells."""
    frame = pl.read_parquet(DATA / "sleepstudy.parquet").with_row_index("i").with_columns(w=1.0 + pl.col.i % 3, odd=pl.col.i % 2)
    frame = frame.with_columns(early=pl.when(pl.col.i > 4).then("Days"), late=pl.when(pl.col.i < 175).then("odd"))
    for function, end in ((mp.lmm, " + (1 | Subject)"), (mp.glm, "")):
        more = {"family": "gaussian"} if function is mp.glm else {}
        first, second = (function(f"Reaction ~ {name}{end}", frame, **more) for name in ("early", "late"))
        assert first.rows == second.rows
        with pytest.raises(mp.ConfigError, match="same response and rows"):
            mp.anova(first, second)
        weighted = function(f"Reaction ~ Days + odd{end}", frame, weights="w", **more)
        with pytest.raises(mp.ConfigError, match="different weights: None and w"):
            mp.anova(function(f"Reaction ~ Days{end}", frame, **more), weighted)
    with pytest.raises(mp.ConfigError, match="different responses"):
        mp.anova(mp.ols("Reaction ~ Days", frame), mp.ols("log(Reaction) ~ Days", frame))
    with pytest.raises(mp.ConfigError, match="anova compares fits, not int"):
        mp.anova(first, 3)  # type: ignore[arg-type]


def test_models_that_are_not_nested_are_told() -> None:
    frame = pl.read_parquet(DATA / "sleepstudy.parquet").with_columns(odd=pl.col("Days") % 2, week=pl.col("Days") // 5)
    plain = mp.lmm("Reaction ~ Days + (1 | Subject)", frame)
    with pytest.warns(mp.SingularFitWarning):
        other = mp.lmm("Reaction ~ Days + odd + (1 | week)", frame)
    assert "random effects are not nested" in mp.anova(plain, other).to_pylist()[1]["note"]
    moved = mp.lmm("Reaction ~ Days + odd + offset(odd) + (1 | Subject)", frame)
    assert mp.anova(plain, moved).to_pylist()[1]["note"] == "the offsets differ: the test holds only if the models are nested"


def test_a_correlation_of_zero_is_not_on_the_boundary() -> None:
    frame = pl.read_parquet(DATA / "sleepstudy.parquet")
    row = mp.anova(*(mp.lmm(f"Reaction ~ Days + (Days {bar} Subject)", frame, reml=False) for bar in ("||", "|"))).to_pylist()[1]
    assert row["df"] == 1 and row["note"] is None and row["p_boundary"] is None
    assert row["p_value"] == pytest.approx(stats.chi2.sf(row["statistic"], 1))


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


def two_levels() -> pl.DataFrame:
    rng = np.random.default_rng(3)
    n, g = 160, np.arange(160) % 16
    x, f = rng.normal(size=n), rng.choice(["a", "b", "c"], n)
    won = rng.uniform(size=n) < 1.0 - np.exp(-np.exp(0.8 * x + 0.5 * (f == "b") - 0.5 + 0.7 * rng.normal(size=16)[g]))
    return pl.DataFrame({"x": x, "f": f, "g": g, "won": won, "r": np.where(won, "lost", "won")})


@pytest.mark.parametrize("random", ["", " + (1 | g)"])
def test_the_outcome_that_is_modelled_stays_when_rows_are_read_again(random: str) -> None:
    """`levels` may say that the level that comes first by its bytes is the one modelled; refits of the rows have it too."""
    frame = two_levels()
    made: Any = mp.glmm if random else mp.glm
    want = made(f"won ~ x + f{random}", frame, family="binomial", link="cloglog")
    fit = made(f"r ~ x + f{random}", frame, family="binomial", link="cloglog", levels={"r": ["won", "lost"]})
    assert fit.recipe.success == "lost" and fit.fixef() == pytest.approx(want.fixef())
    asked: list[Any] = [lambda one: one.drop1(), lambda one: one.confint("profile"), lambda one: one.confint("boot", draws=3)]
    for question in [*asked, *([lambda one: one.influence(2)] if random else [])]:
        found, expected = ([v for row in question(one).to_pylist() for v in row.values() if isinstance(v, float)] for one in (fit, want))
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["ols", "glm", "glmm"])
def test_contrasts_of_a_dropped_factor_are_dropped(kind: str) -> None:
    """Also where another column's name holds the factor's."""
    frame = two_levels().rename({"x": "fx"})
    given: dict[str, Any] = {} if kind == "ols" else {"family": "binomial"}
    formula = "won ~ f + fx" + (" + (1 | g)" if kind == "glmm" else "")
    fits = [getattr(mp, kind)(formula, frame, contrasts=contrasts, **given) for contrasts in ({"f": "sum"}, None)]
    for a, b in zip(*(fit.drop1().to_pylist() for fit in fits), strict=True):
        assert a["loglik"] == pytest.approx(b["loglik"], abs=1e-6) and a["df"] == b["df"]


def test_coding_over_statistics_of_a_dropped_factor_is_dropped() -> None:
    frame = two_levels().with_columns(y=pl.col("x") + pl.col("won"))
    stats = mp.suffstats("y ~ f + x + (1 | g)", frame)
    recoded = mp.lmm("y ~ f + x + (1 | g)", stats, contrasts={"f": "sum"}, levels={"f": ["c", "a", "b"]})
    for a, b in zip(recoded.drop1().to_pylist(), mp.lmm("y ~ f + x + (1 | g)", frame).drop1().to_pylist(), strict=True):
        assert a["loglik"] == pytest.approx(b["loglik"], abs=1e-8) and a["df"] == b["df"]


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("random", ["(1 | g)", "(1 | g) + (1 | h)"])
def test_drop1_where_nearly_all_is_explained(random: str) -> None:
    """The response was summed less what the dropped term explains, too."""
    rng = np.random.default_rng(1)
    x, z, g, h = rng.normal(size=300), rng.normal(size=300), rng.integers(0, 15, 300), rng.integers(0, 7, 300)
    noise = z + rng.normal(size=15)[g] + rng.normal(size=7)[h] + rng.normal(size=300)
    frame = pl.DataFrame({"x": x, "z": z, "g": g, "h": h, "y": 3.0 + 2.0 * x + 1e-3 * noise})
    fit = mp.lmm(f"y ~ x + z + {random}", frame)
    logliks = {row["term"]: row["loglik"] for row in fit.drop1().to_pylist()}
    for term, rest in {"<none>": "x + z", "x": "z", "z": "x"}.items():
        assert logliks[term] == pytest.approx(mp.lmm(f"y ~ {rest} + {random}", frame, reml=False).loglik, abs=1e-6)
    compared = mp.anova(mp.lmm(f"y ~ z + {random}", frame), fit)["statistic"][1].as_py()
    assert compared == pytest.approx(2 * (logliks["<none>"] - logliks["x"]))


def test_formulas_without_a_term() -> None:
    formula = parse("log(y) ~ a * b + `odd name` + offset(z) + (1 + x || g) + (1 | a/h)")
    assert [without(formula, term) for term in droppable(formula)] == [
        "log(y) ~ 1 + a + b + a:b + (1 + x || g) + (1 | a/h) + offset(z)",
        "log(y) ~ 1 + a + b + `odd name` + (1 + x || g) + (1 | a/h) + offset(z)",
    ]


def test_a_larger_model_at_a_lesser_maximum_is_told() -> None:
    """An optimum that a search missed must not pass for evidence of nothing."""
    frame = pl.read_parquet(DATA / "sleepstudy.parquet").with_columns(odd=pl.col("Days") % 2)
    small, large = (mp.lmm(f"Reaction ~ {fixed} + (1 | Subject)", frame, reml=False) for fixed in ("Days", "Days + odd"))
    large.loglik = small.loglik - 1.0
    row = mp.anova(small, large).to_pylist()[1]
    assert row["statistic"] == 0.0 and "lesser maximum" in row["note"]
    with pytest.warns(mp.ConvergenceWarning, match="without odd.*lesser maximum"):
        large.drop1()
