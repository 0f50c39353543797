"""What a fit prints, against lme4's own print and R's rules for digits and abbreviations."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

import mlpipe as mp
from mlpipe.display import html, summary
from mlpipe.layout import abbreviated, formatted, printable

SLEEP = mp.datasets.path("sleepstudy")

# lme4's summary of the same model, but for the scaled residuals, its t values and one column of ours (and 612.10, 24.741:
# lme4 stops a little short of the optimum)
REML = """\
Linear mixed model fit by REML
Formula: reaction ~ days + (1 + days | subject)

REML criterion at convergence: 1743.6

Random effects:
 Groups   Name        Variance Std.Dev. Corr
 subject  (Intercept) 612.09   24.740
          days         35.07    5.922    0.07
 Residual             654.94   25.592
Number of obs: 180, groups: subject, 18

Fixed effects:
            Estimate Std. Error z value Pr(>|z|)
(Intercept)  251.405      6.825  36.838   <2e-16
days          10.467      1.546   6.771 1.27e-11

Correlation of Fixed Effects:
     (Intr)
days -0.138"""

ML = """\
Linear mixed model fit by maximum likelihood
Formula: reaction ~ days + (1 + days || subject)
Weights: days + 1
Offset: days

   AIC    BIC logLik deviance df.resid
1801.0 1817.0 -895.5   1791.0      175
"""


@pytest.fixture(scope="module")
def fit() -> mp.LMMFit:
    return mp.lmm("reaction ~ days + (1 + days | subject)", pl.read_parquet(SLEEP))


def noise(names: list[str], rows: int = 120, group: str = "g") -> pl.DataFrame:
    """Covariates of white noise, a response and ten groups."""
    rng = np.random.default_rng(5)
    data = {name: rng.normal(size=rows) for name in names}
    groups = np.arange(rows) % 10
    return pl.DataFrame({**data, "y": rng.normal(size=rows) + rng.normal(size=10)[groups], group: groups})


def section(text: str, title: str) -> list[str]:
    """The lines under a title, up to an empty one."""
    return text.split(f"{title}\n", 1)[1].split("\n\n", 1)[0].split("\n")


def test_reml_as_lme4_prints_it(fit: mp.LMMFit) -> None:
    assert str(fit) == fit.summary() == REML
    assert summary(fit, correlation=False) == REML.split("\n\nCorrelation")[0]


def test_maximum_likelihood_has_the_criteria() -> None:
    fit = mp.lmm("reaction ~ days + (1 + days || subject)", SLEEP, reml=False, weights="days + 1", offset="days")
    text = str(fit).replace(f"   Data: {SLEEP}\n", "")
    head, row = text.split("   AIC", 1)[0], section("\n" + text, "deviance df.resid")[0].split()
    assert head == ML.split("   AIC", 1)[0]
    one = fit.glance().to_pylist()[0]
    assert row == [*(f"{one[name]:.1f}" for name in ("aic", "bic", "loglik", "deviance")), "175"]


def test_each_term_names_its_factor() -> None:
    text = str(mp.lmm("reaction ~ days + (1 | subject) + (0 + days | subject)", SLEEP))
    assert section(text, "Random effects:")[:3] == [
        " Groups   Name        Variance Std.Dev.",
        " subject  (Intercept) 627.57   25.051",
        " subject  days         35.86    5.988",
    ]


def test_correlations_of_several_coefficients_form_a_triangle() -> None:
    frame = noise(["x1", "x2"], 600).with_columns(y=pl.col("y") + pl.col("g") % 3 * pl.col("x1") - pl.col("g") % 4 * pl.col("x2"))
    fit = mp.lmm("y ~ 1 + (1 + x1 + x2 | g)", frame)
    rows = section(str(fit), "Random effects:")
    assert rows[0].endswith("Std.Dev. Corr")
    assert [len(row.split()) for row in rows[1:5]] == [4, 4, 5, 3]
    start, psi = rows[0].index("Corr"), [f"{row['sd']:5.2f}" for row in fit.varcorr().to_pylist() if row["term2"]]
    assert [rows[2][start:], rows[3][start : start + 5], rows[3][start + 6 :]] == psi


def test_a_model_without_fixed_effects() -> None:
    text = str(mp.lmm("reaction ~ 0 + (1 | subject)", SLEEP))
    assert text.endswith("groups: subject, 18\n\nNo fixed effect coefficients")


@pytest.mark.parametrize(("n", "shown"), [(19, True), (20, False)])
def test_the_correlation_matrix_of_many_coefficients_is_left_out(n: int, shown: bool) -> None:
    names = [f"x{i}" for i in range(n)]
    text = str(mp.lmm(f"y ~ {' + '.join(names)} + (1 | g)", noise(names)))
    assert ("Correlation of Fixed Effects:" in text) == shown
    assert ("Correlation matrix not shown, as p = 21 > 20; fit.vcov() has the covariances" in text) != shown


def test_columns_are_aligned_whatever_the_names() -> None:
    names = ["x", "a_very_long_name_of_a_covariate", "体重", "e\u0301tat", "größe"]
    formula = "y ~ " + " + ".join(f"`{name}`" for name in names) + " + (1 | g)"
    rows = section(str(mp.lmm(formula, noise(names))), "Fixed effects:")
    places = {"体重": -2, "e\u0301tat": 1}  # characters that the terminal shows in two columns, or none
    widths = {len(row) - next((extra for name, extra in places.items() if name in row), 0) for row in rows}
    assert len(rows) == 7 and len(widths) == 1


def test_names_that_would_move_the_cursor_are_escaped() -> None:
    names = ["a\x1b[31m", "line\nbreak", "tab\t"]
    formula = "y ~ " + " + ".join(f"`{name}`" for name in names) + "\n  + (1 | g)"
    text = str(mp.lmm(formula, noise(names)))
    assert "\x1b" not in text and "\t" not in text and "`line\\nbreak`" in text
    assert len(section(text, "Fixed effects:")) == 5
    assert printable("a\u202eb\ud800") == "a\\u202eb\\ud800"


def test_a_formula_over_several_lines_is_printed_on_one() -> None:
    text = str(mp.lmm("reaction ~ days +\n    (1 | subject)\n", SLEEP))
    assert text.split("\n")[1:3] == ["Formula: reaction ~ days + (1 | subject)", f"   Data: {SLEEP}"]


def test_where_the_data_came_from(fit: mp.LMMFit) -> None:
    assert "   Data: sleep.parquet\n" in str(replace(fit, source="sleep.parquet"))
    assert "   Data:" not in str(fit)


def test_frequencies_count() -> None:
    text = str(mp.lmm("reaction ~ days + (1 | subject)", SLEEP, freq="1.5"))
    assert "Frequencies: 1.5\n" in text and "Number of obs: 270, groups: subject, 18" in text


# ---- notes


def notes(fit: mp.LMMFit) -> list[str]:
    return [line for line in str(fit).split("\n") if line.startswith("note: ")]


def test_dropped_rows_are_told_by_cause() -> None:
    frame = noise(["x", "w"], 200).with_columns(
        x=pl.when(pl.int_range(200) < 3).then(None).otherwise("x"),
        g=pl.when(pl.int_range(200) == 9).then(None).otherwise("g"),
        w=pl.int_range(200) % 50,
    )
    fit = mp.lmm("y ~ x + (1 | g)", frame, weights="w")
    assert notes(fit) == ["note: 7 of 200 rows dropped: x missing (3), g missing (1), weight 0 in w (4)"]
    assert "rows dropped" not in str(replace(fit, info={}))


def test_many_causes_are_cut_short(fit: mp.LMMFit) -> None:
    info = {"rows_dropped": 20, "rows_read": 200, "dropped": {f"x{i}": 2 for i in range(10)}}
    (note,) = notes(replace(fit, info=info))
    assert note.endswith("x7 missing (2), and 2 more")


def test_the_state_of_the_fit_is_told() -> None:
    frame = noise(["x"], 40).with_columns(y=pl.int_range(40) // 10 % 2 + pl.int_range(40) % 3, z=2 * pl.col("x"))
    with pytest.warns(mp.MlpipeWarning):
        fit = mp.lmm("y ~ x + z + (1 | g)", frame.with_columns(y=pl.col("y") * 1.0))
    assert notes(replace(fit, singular=True)) == [
        "note: fixed-effect columns dropped because they repeat others: z",
        "note: boundary (singular) fit: a random-effects covariance matrix is not of full rank",
    ]
    unfinished = replace(fit, singular=False, dropped=(), converged=False, score=0.25, evaluations=3, message="out of evaluations")
    assert notes(unfinished) == ["note: NOT CONVERGED: out of evaluations (scaled score 0.25 after 3 evaluations)"]
    told = replace(fit, singular=False, dropped=(), info={"notes": ["x is INTEGER in a, DOUBLE in b"]})
    assert notes(told) == ["note: x is INTEGER in a, DOUBLE in b"]


def test_a_variance_of_zero_has_no_correlation(fit: mp.LMMFit) -> None:
    term = replace(fit.terms[0], factor=np.array([[0.0, 0.0], [0.0, 0.25]]))
    assert [row.split() for row in section(str(replace(fit, terms=(term,))), "Random effects:")[1:3]] == [
        ["subject", "(Intercept)", "0.00", "0.000"],
        ["days", "40.93", "6.398", "NaN"],
    ]


def test_a_standard_error_of_zero(fit: mp.LMMFit) -> None:
    rows = section(str(replace(fit, spread=fit.spread.of(np.zeros((2, 2))))), "Fixed effects:")
    assert rows[1].split() == ["(Intercept)", "251.41", "0.00", "Inf", "<2e-16"]


# ---- R's rules


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([612.1002, 35.07171, 654.9400], ["612.10", "35.07", "654.94"]),
        ([1.0, 10.0, 100.0], ["1", "10", "100"]),
        ([0.0, 612.1], ["0.0", "612.1"]),
        ([0.0], ["0"]),
        ([0.1, 0.25], ["0.10", "0.25"]),
        ([0.00001, 123456.0], ["1.000e-05", "1.235e+05"]),
        ([1e10], ["1e+10"]),
        ([123456789.0], ["123456789"]),
        ([-1.5, float("nan"), float("inf"), float("-inf")], ["-1.5", "NaN", "Inf", "-Inf"]),
        ([99999.7], ["1e+05"]),
    ],
)
def test_numbers_are_formatted_as_by_r(values: list[float], text: list[str]) -> None:
    assert formatted(values) == text


@pytest.mark.parametrize(
    ("names", "length", "short"),
    [
        (["(Intercept)", "days"], 6, ["(Intr)", "days"]),
        (["Alabama", "Alaska", "Arizona", "Arkansas", "California", "Connecticut"], 4, ["Albm", "Alsk", "Arzn", "Arkn", "Clfr", "Cnnc"]),
        (["factor(period)3", "factor(period)2"], 6, ["fct()3", "fct()2"]),
        (["temperature_a", "temperature_b"], 6, ["temprtr_", "tmprtr_b"]),
        (["x", "x"], 6, ["x", "x"]),
    ],
)
def test_names_are_abbreviated_as_by_r_and_stay_distinct(names: list[str], length: int, short: list[str]) -> None:
    assert abbreviated(names, length) == short


# ---- HTML


def test_html_holds_the_tables(fit: mp.LMMFit) -> None:
    text = fit._repr_html_()
    parts = ("Linear mixed model fit by REML", "<td>251.405</td>", "<td>&lt;2e-16</td>", "18 levels of subject")
    assert "Random effects</caption>" in text
    assert all(part in text for part in parts)
    assert "Fixed effects" not in html(mp.lmm("reaction ~ 0 + (1 | subject)", SLEEP))


def test_html_escapes_what_users_name() -> None:
    bad = "<script>alert('1')</script>&"
    frame = noise([bad], group=f"{bad}g").with_columns(f=pl.lit("<b>") + (pl.int_range(120) % 3).cast(pl.String))
    fit = mp.lmm(f"y ~ `{bad}` + f + (1 | `{bad}g`)", frame)
    text = html(replace(fit, source=bad, info={"rows_dropped": 1, "dropped": {bad: 1}, "notes": [bad]}))
    assert "<script" not in text and "<b>0" not in text and text.count("&lt;script&gt;alert(&#x27;1&#x27;)") >= 6


# ---- generalized models

CBPP = mp.datasets.path("cbpp")
COUNTS = "cbind(incidence, size - incidence) ~ period"

# lme4's summary of the same model, but for its line of scaled residuals, ours of what is modelled, and digits that lme4's optimiser leaves
GLMM = f"""\
Generalized linear mixed model fit by maximum likelihood (Laplace Approximation)
 Family: binomial  ( logit )
Formula: {COUNTS} + (1 | herd)
   Data: {CBPP}
Modelled: the probability of incidence

  AIC   BIC logLik deviance df.resid
194.1 204.2  -92.0    184.1       51

Random effects:
 Groups Name        Variance Std.Dev.
 herd   (Intercept) 0.4125   0.6423
Number of obs: 56, groups: herd, 15

Fixed effects:
            Estimate Std. Error z value Pr(>|z|)
(Intercept)  -1.3985     0.2325  -6.016 1.79e-09
period2      -0.9923     0.3066  -3.236  0.00121
period3      -1.1287     0.3266  -3.455 0.000549
period4      -1.5803     0.4274  -3.697 0.000218

Correlation of Fixed Effects:
        (Intr) perid2 perid3
period2 -0.364
period3 -0.340  0.278
period4 -0.261  0.212  0.196

note: nagq = 1 takes a block's likelihood from its mode and curvature alone: better the larger blocks are (here 56.1 trials on average)"""

GLM = """\
Generalized linear model fit by maximum likelihood
 Family: poisson  ( log )
Formula: count ~ x
Offset: o
Standard errors: cluster-robust (CR1), 40 clusters of g

Coefficients:
"""


def responses() -> pl.DataFrame:
    """600 rows of 40 blocks with a response for each family."""
    rng = np.random.default_rng(1)
    g, x = np.arange(600) % 40, rng.normal(size=600)
    mean = np.exp(0.3 + 0.5 * x + 0.5 * rng.normal(size=40)[g])
    columns = {"count": rng.negative_binomial(2, 2 / (2 + mean)), "size": rng.gamma(3, mean / 3)}
    columns |= {"real": np.log(mean) + rng.normal(size=600)}
    share = {"share": rng.beta(2, 3, size=600), "is": np.where(rng.random(600) < mean / (1 + mean), "ye<s", "no")}
    return pl.DataFrame({"g": g, "x": x, "o": 0.1 * x, **columns, **share})


def test_a_generalized_mixed_model_as_lme4_prints_it() -> None:
    assert str(mp.glmm(f"{COUNTS} + (1 | herd)", CBPP, family="binomial")) == GLMM


def test_the_approximation_is_named() -> None:
    text = str(mp.glmm(f"{COUNTS} + (1 | herd)", CBPP, family="binomial", nagq=5))
    assert text.startswith("Generalized linear mixed model fit by maximum likelihood (Adaptive Gauss-Hermite Quadrature, nagq = 5)\n")
    assert "note: nagq = 5 nodes a random effect: the smaller blocks are (here 56.1 trials on average)" in text
    expected = mp.Options(curvature="expected")
    assert "(Laplace Approximation, expected curvature)\n" in str(
        mp.glmm(f"{COUNTS} + (1 | herd)", CBPP, family="binomial", link="probit", options=expected)
    )


@pytest.mark.parametrize(
    ("response", "family", "parameter", "residual"),
    [
        ("count", "negbinomial", "k", False),
        ("count", "negbinomial1", "alpha", False),
        ("count", "poisson", None, False),
        ("size", "gamma", "shape", True),
        ("share", "beta", "precision", False),
        ("real", "gaussian", None, True),
    ],
)
@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
def test_the_familys_parameter_is_told(response: str, family: str, parameter: str | None, residual: bool) -> None:
    fit = mp.glmm(f"{response} ~ x + (1 | g)", responses(), family=family)
    text = str(fit)
    lines = [line for line in text.split("\n") if line.startswith("Family parameter: ")]
    assert [line.split()[2] for line in lines] == ([parameter] if parameter else [])
    assert all("(std. error " in line for line in lines)
    assert any(line.startswith(" Residual ") for line in section(text, "Random effects:")) == residual
    assert all(line in html(fit) for line in lines)


def test_the_level_that_is_modelled_is_named() -> None:
    frame = responses()
    fit = mp.glmm("is ~ x + (1 | g)", frame, family="binomial")
    assert "Modelled: the probability that is is 'ye<s'\n" in str(fit) and "&#x27;ye&lt;s&#x27;" in html(fit)
    assert "Modelled: the probability that is is 'no'\n" in str(mp.glm("is ~ x", frame, family="binomial", levels={"is": ["ye<s", "no"]}))
    proportion = str(mp.glm("I(incidence / size) ~ period", CBPP, family="binomial", trials="size"))
    assert "Trials: size\n" in proportion and "Modelled" not in proportion


def test_a_model_without_random_effects() -> None:
    fit = mp.glm("count ~ x", responses(), family="poisson", cluster="g", offset="o")
    text = str(fit)
    assert text.startswith(GLM) and str(fit) == fit.summary()
    assert [row.split()[0] for row in section(text, "Coefficients:")[1:]] == ["(Intercept)", "x"]
    row = fit.glance().to_pylist()[0]
    assert text.endswith(
        "\n\n(Dispersion parameter for the poisson family taken to be 1)\n"
        "Number of obs: 600, residual degrees of freedom: 598\n"
        f"Log-likelihood: {fit.loglik:.1f} with 2 parameters, AIC: {row['aic']:.1f}, BIC: {row['bic']:.1f}"
    )
    shown = html(fit)
    assert "Coefficients</caption>" in shown and "Random effects" not in shown and "600 rows<br>" in shown


def test_dispersions() -> None:
    frame = responses()
    quasi = mp.glm("count ~ x", frame, family="quasipoisson")
    text = str(quasi)
    assert text.startswith("Generalized linear model fit by quasi-likelihood\n Family: quasipoisson  ( log )")
    assert f"estimated from Pearson residuals as {quasi.sigma**2:.4g})" in text
    assert "Log-likelihood" not in text and "log-likelihood" not in html(quasi) and "nan" not in text.lower()
    gamma = mp.glm("size ~ x", frame, family="gamma", vcov="HC1")
    assert f"for the gamma family estimated by maximum likelihood as {gamma.dispersion:.4g})" in str(gamma)
    assert "Standard errors: heteroskedasticity-robust (HC1)\n" in str(gamma) and "Family parameter: shape = " in str(gamma)


def test_a_generalized_model_without_coefficients() -> None:
    fit = mp.glm("count ~ 0", responses(), family="poisson", offset="o")
    assert "\n\nNo coefficients\n\n(Dispersion" in str(fit) and "<table>" not in html(fit)


def test_separation_and_blocks_that_do_not_vary_are_told() -> None:
    frame = responses().with_columns(separated=pl.col("x") > 0)
    with pytest.warns(mp.MlpipeWarning):
        fit = mp.glm("separated ~ x", frame, family="binomial")
    assert any(note.startswith("note: separation: x") for note in notes(fit))
    flat = frame.with_columns(flat=(pl.col("g") < 3) | (pl.col("o") > 0))
    mixed = mp.glmm("flat ~ 1 + (1 | g)", flat, family="binomial")
    assert mixed.info["blocks_without_variation"] >= 3
    assert f"note: the response is the same throughout {mixed.info['blocks_without_variation']} of 40 blocks" in notes(mixed)


def test_few_trials_a_block_are_told_once() -> None:
    frame = responses().with_columns(g=pl.int_range(600) // 3)
    told = [note for note in notes(mp.glmm("is ~ x + (1 | g)", frame, family="binomial")) if "nagq" in note]
    assert len(told) == 1 and "compare nagq=7" in told[0]
