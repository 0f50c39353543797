"""What a fit prints, against lme4's own print and R's rules for digits and abbreviations."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

import mlpipe as mp
from mlpipe.display import _formatted, abbreviated, html, printable, summary

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
    rows = section(str(replace(fit, covariance=np.zeros((2, 2)))), "Fixed effects:")
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
    assert _formatted(values) == text


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
