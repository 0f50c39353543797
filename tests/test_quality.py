"""R², ICC, residual and random-effect summaries, quantile sketches: against written-out formulas and exact quantiles."""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats as st

import mlpipe as mp
from mlpipe import datasets
from mlpipe.reading import shares
from mlpipe.sketch import Sketch

from .dense_glmm import variance
from .test_glmm import arguments, simulated

SLEEP = datasets.path("sleepstudy")


@pytest.fixture(scope="module")
def sleep() -> Any:
    return mp.lmm("reaction ~ days + (1 + days | subject)", SLEEP)


def test_r2_with_random_slopes(sleep: Any) -> None:
    """MuMIn's r.squaredGLMM of lme4's example: 0.2786511 and 0.7992199."""
    found = sleep.r2()
    assert round(found["marginal"], 5) == 0.27865 and round(found["conditional"], 4) == 0.7992
    days = pl.read_parquet(SLEEP)["days"].to_numpy()
    psi = sleep.sigma**2 * sleep.terms[0].factor @ sleep.terms[0].factor.T
    random = float(np.mean(psi[0, 0] + 2 * days * psi[0, 1] + days**2 * psi[1, 1]))
    fixed = float(np.var(sleep.beta[1] * days, ddof=1))
    total = fixed + random + sleep.sigma**2
    assert found == pytest.approx({"marginal": fixed / total, "conditional": (fixed + random) / total})
    assert "extra_scans" not in sleep.info
    assert sleep.r2(SLEEP) == pytest.approx(found)  # by a scan


@pytest.mark.parametrize("family", [None, "gaussian"])
def test_responses_far_from_zero(family: str | None) -> None:
    frame = pl.read_parquet(SLEEP)
    fits = [
        mp.glmm("y ~ days + (1 | subject)", f, family=family) if family else mp.lmm("y ~ days + (1 | subject)", f)
        for f in (frame.with_columns(y=pl.col.reaction + far) for far in (0.0, 1e9))
    ]
    near, far = (fit.r2() for fit in fits)
    assert far == pytest.approx(near, rel=1e-6)
    near, far = (np.array(fit.marginal(frame).read_all()["variance"]) for fit in fits)
    np.testing.assert_allclose(far, near, rtol=1e-6)
    near, far = (np.array(fit.marginal(frame, block="308")["correlation"]) for fit in fits)
    np.testing.assert_allclose(far, near, rtol=1e-6)


def test_r2_with_weights_counts_each_row_once() -> None:
    frame = pl.read_parquet(SLEEP).with_columns(w=pl.int_range(pl.len()) % 3 + 1)
    fit = mp.lmm("reaction ~ days + (1 | subject)", frame, weights="w")
    fixed, between = np.var(fit.beta[1] * frame["days"].to_numpy(), ddof=1), fit.sigma**2 * fit.theta[0] ** 2
    assert fit.r2()["marginal"] == pytest.approx(fixed / (fixed + between + fit.sigma**2))
    assert fit.info["extra_scans"] == ["R²: one scan of the fit's source"]
    fit.r2()
    assert len(fit.info["extra_scans"]) == 1
    counted = mp.lmm("reaction ~ days + (1 | subject)", frame, freq="w")
    repeated = mp.lmm("reaction ~ days + (1 | subject)", frame.select(pl.all().repeat_by("w")).explode(pl.all()))
    assert counted.r2() == pytest.approx(repeated.r2(), rel=1e-6)


def test_r2_of_trials_is_that_of_their_single_rows() -> None:
    rng = np.random.default_rng(8)
    x, g, n = rng.normal(size=120), np.repeat(np.arange(12), 10), rng.integers(1, 9, 120)
    eta = x * (1 + rng.normal(size=12)[g]) + rng.normal(size=12)[g]
    frame = pl.DataFrame({"x": x, "g": g, "n": n, "k": rng.binomial(n, 1 / (1 + np.exp(-eta)))})
    single = frame.select("x", "g", y=pl.concat_list(pl.lit(1).repeat_by("k"), pl.lit(0).repeat_by(pl.col("n") - pl.col("k")))).explode("y")
    fit = mp.glmm("cbind(k, n - k) ~ x + (1 + x | g)", frame, family="binomial")
    rows = mp.glmm("y ~ x + (1 + x | g)", single, family="binomial")
    fixed = float(np.var(rows.beta[1] * single["x"].to_numpy(), ddof=1))
    psi, z = rows.terms[0].factor @ rows.terms[0].factor.T, np.column_stack([np.ones(len(single)), single["x"]])
    random = float(np.einsum("ij,jk,ik->", z, psi, z)) / len(z)
    want = {"marginal": fixed / (fixed + random + np.pi**2 / 3), "conditional": (fixed + random) / (fixed + random + np.pi**2 / 3)}
    for found in (rows.r2(), rows.r2(single), fit.r2(), fit.r2(frame)):
        assert found == pytest.approx(want, rel=1e-5)


def test_icc_by_hand(sleep: Any) -> None:
    psi = sleep.sigma**2 * sleep.terms[0].factor @ sleep.terms[0].factor.T
    assert sleep.icc() == pytest.approx({"subject": psi[0, 0] / (psi[0, 0] + sleep.sigma**2)})

    def at(days: float) -> float:
        random = psi[0, 0] + 2 * days * psi[0, 1] + days**2 * psi[1, 1]
        return float(random / (random + sleep.sigma**2))

    assert sleep.icc(at={"days": 4}) == pytest.approx({"subject": at(4)})
    assert sleep.icc(at={"days": [0, 2.5, 9]})["subject"] == pytest.approx([at(0), at(2.5), at(9)])


def test_icc_interval(sleep: Any) -> None:
    """Of a random intercept: logit(ICC) = log θ², so that its standard error is 2 se(θ)/θ."""
    fit = mp.lmm("reaction ~ days + (1 | subject)", SLEEP)
    value, low, high = fit.icc(level=0.9)["subject"]
    centre, half = math.log(value / (1 - value)), st.norm.ppf(0.95) * 2 * math.sqrt(fit.theta_covariance[0, 0]) / fit.theta[0]
    assert (low, high) == pytest.approx((1 / (1 + math.exp(half - centre)), 1 / (1 + math.exp(-half - centre))), rel=1e-6)
    lower, upper = (sleep.icc(at={"days": 3}, level=level)["subject"][1] for level in (0.99, 0.9))
    assert lower < upper < sleep.icc(at={"days": 3})["subject"]


@pytest.mark.parametrize(("family", "link"), [("binomial", "logit"), ("gamma", "log"), ("negbinomial", "log")])
def test_icc_interval_on_the_latent_scale(family: str, link: str) -> None:
    fit = mp.glmm("p ~ x + (1 | g)", simulated(family, link, blocks=40), family=family, link=link, **arguments(family))
    value, low, high = fit.icc(level=0.95)["g"]
    assert 0 < low < value < high < 1 and fit.icc()["g"] == value
    if family == "binomial":  # the residual variance is known: se of log θ² alone
        half = st.norm.ppf(0.975) * 2 * math.sqrt(fit.theta_covariance[0, 0]) / fit.theta[0]
        assert math.log(high / (1 - high)) - math.log(value / (1 - value)) == pytest.approx(half, rel=1e-6)


def test_icc_of_several_factors() -> None:
    fit = mp.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", datasets.path("penicillin"))
    sd = {row["group"]: row["variance"] for row in fit.varcorr().to_pylist()}
    total = sum(sd.values())
    assert fit.icc() == pytest.approx({group: sd[group] / total for group in ("plate", "sample")})
    for group, (value, low, high) in fit.icc(level=0.95).items():
        assert low < value < high and value == fit.icc()[group]


@pytest.mark.parametrize(
    ("at", "message"),
    [({"reaction": 1}, "no random term"), ({}, "lacks 'days'"), ({"days": []}, "differ"), ({"days": None}, "not one finite number")],
)
def test_bad_points(sleep: Any, at: dict[str, Any], message: str) -> None:
    with pytest.raises(mp.ConfigError, match=message):
        sleep.icc(at=at)


def test_points_where_a_term_is_not_finite(sleep: Any) -> None:
    frame = pl.read_parquet(SLEEP).with_columns(d=pl.col.days + 1.0)
    fit = mp.lmm("reaction ~ log(d) + I(1 / (days + 1)) + (1 + log(d) | subject)", frame)
    with pytest.raises(mp.DataError, match=r"log\(d\) is not a finite number"):
        fit.icc(at={"d": 0})
    assert fit.icc(at={"d": np.int64(2)}) == fit.icc(at={"d": 2})
    with pytest.raises(mp.DataError, match="is not a finite number"):
        mp.lmm("reaction ~ log(d) + fct + (1 | subject)", frame.with_columns(fct=pl.col("days").gt(4).cast(pl.String))).means(
            "fct", at={"d": -1}
        )


def test_bad_levels(sleep: Any) -> None:
    with pytest.raises(mp.ConfigError, match="level"):
        sleep.icc(level=95)
    with pytest.raises(mp.ConfigError, match="no random effects"):
        mp.glm("p ~ x", simulated("poisson", "log"), family="poisson").icc()


# ---- residuals


def close(row: dict[str, Any], values: np.ndarray) -> None:
    want = {"n": len(values), "mean": values.mean(), "sd": values.std(ddof=1), "skewness": st.skew(values), "kurtosis": st.kurtosis(values)}
    want |= dict(zip(("min", "q1", "median", "q3", "max"), np.quantile(values, [0, 0.25, 0.5, 0.75, 1]), strict=True))
    assert {name: row[name] for name in want} == pytest.approx(want, rel=1e-7, abs=1e-9)


def test_residuals_of_a_linear_model(sleep: Any) -> None:
    response, pearson = sleep.residuals().to_pylist()
    e = pl.DataFrame(sleep.augment())["resid"].to_numpy()
    close(response, e)
    close(pearson, e / sleep.sigma)
    assert (response["residual"], pearson["residual"]) == ("response", "pearson")


@pytest.mark.parametrize(
    ("family", "link"),
    [("binomial", "logit"), ("poisson", "log"), ("negbinomial", "log"), ("negbinomial1", "log"), ("gamma", "log"),
     ("inverse_gaussian", "log"), ("gaussian", "log"), ("beta", "logit")],
)  # fmt: skip
def test_pearson_residuals(family: str, link: str) -> None:
    frame = simulated(family, link)
    fit = mp.glmm("p ~ x + (1 | g)", frame, family=family, link=link, offset="o", **arguments(family))
    kept = frame.with_columns(x=pl.when(pl.int_range(pl.len()) == 3).then(None).otherwise(pl.col.x))
    close_to = [row for row in fit.residuals(kept).to_pylist() if row["residual"] == "pearson"][0]
    got = pl.DataFrame(fit.augment(frame))
    mu, size = got["fitted"].to_numpy(), (frame["m"] if family == "binomial" else frame["v"]).to_numpy()
    per_row = variance(family, mu, size, fit.tau) / (size if family == "binomial" else 1.0)
    e = got["resid"].to_numpy() / np.sqrt(per_row)
    close(close_to, np.delete(e, 3))


def test_pearson_residuals_of_estimating_equations() -> None:
    """Scaled by phi, so that their mean square is 1 (phi has no degrees of freedom taken off)."""
    fit = mp.gee("reaction ~ days", SLEEP, groups="subject")
    response, found = fit.residuals().to_pylist()
    assert found["n"] == 180 and found["sd"] == pytest.approx(response["sd"] / math.sqrt(fit.scale))
    assert found["sd"] ** 2 * 179 / 180 + found["mean"] ** 2 == pytest.approx(1.0)


def test_residuals_of_weighted_and_plain_models() -> None:
    frame = pl.read_parquet(SLEEP).with_columns(w=pl.int_range(pl.len()) % 3)
    fit = mp.lmm("reaction ~ days + (1 | subject)", frame, weights="w")
    used = frame.filter(pl.col.w > 0)
    e = pl.DataFrame(fit.augment(used))["resid"].to_numpy()
    close(fit.residuals().to_pylist()[1], e * np.sqrt(used["w"].to_numpy()) / fit.sigma)
    plain = mp.glm("p ~ x", simulated("poisson", "log"), family="quasipoisson")
    got = pl.DataFrame(plain.augment())
    close(plain.residuals().to_pylist()[1], (got["resid"] / (got["fitted"] ** 0.5 * plain.sigma)).to_numpy())


def test_standardized_modes(sleep: Any) -> None:
    wide = pl.DataFrame(sleep.ranef(wide=True))
    prior = np.sqrt(np.diag(sleep.sigma**2 * sleep.terms[0].factor @ sleep.terms[0].factor.T))
    rows = sleep.normality().to_pylist()
    for row, name, sd in zip(rows, ("(Intercept)", "days"), prior, strict=True):
        b = wide[name].to_numpy() / np.sqrt(sd**2 - wide[f"{name}_se"].to_numpy() ** 2)
        close(row, b)
        assert row["qq_correlation"] == pytest.approx(np.corrcoef(np.sort(b), st.norm.ppf((np.arange(18) + 0.5) / 18))[0, 1])
        points = pl.DataFrame(sleep.qq("subject")).filter(pl.col.term == name)
        np.testing.assert_allclose(points["sample"], np.sort(b))
        np.testing.assert_allclose(points["theoretical"], st.norm.ppf((np.arange(18) + 0.5) / 18))
    residuals = sleep.qq(points=50).to_pylist()
    assert len(residuals) == 50 and {row["term"] for row in residuals} == {"pearson"}
    for asked, message in (({"of": "subjects"}, "subjects"), ({"points": 1}, "points")):
        with pytest.raises(mp.ConfigError, match=message):
            sleep.qq(**asked)


def test_a_variance_of_zero_has_no_standardized_modes() -> None:
    with pytest.warns(mp.SingularFitWarning):
        fit = _singular()
    row = fit.normality().to_pylist()[0]
    assert row["n"] == 0 and row["mean"] is None and row["median"] is None and len(fit.qq("g")) == 0
    assert fit.icc(level=0.95)["g"][0] == 0.0


def _singular() -> Any:
    frame = pl.DataFrame({"y": [1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 2.0, 1.0, 3.0], "g": list("aaabbbccc")})
    return mp.lmm("y ~ 1 + (1 | g)", frame)


# ---- sketches


@pytest.mark.parametrize("n", [0, 1, 2, 999, 1000])
def test_a_small_sketch_is_exact(n: int) -> None:
    values, sketch = np.random.default_rng(n).normal(size=n), Sketch(1000)
    for part in np.array_split(np.append(values, math.nan), 7):
        sketch.add(part)
    p = np.linspace(0, 1, 41)
    want = np.quantile(values, p) if n else np.full(41, math.nan)
    np.testing.assert_allclose(sketch.quantiles(p), want, rtol=1e-12)
    assert sketch.n == n and sketch.rank_error == 0.0


@pytest.mark.parametrize("order", ["random", "sorted", "reversed", "zigzag"])
def test_a_large_sketch_keeps_its_bound(order: str) -> None:
    n = 200_000
    values = np.random.default_rng(1).permutation(n).astype(float)
    values = {"random": values, "sorted": np.sort(values), "reversed": np.sort(values)[::-1],
              "zigzag": np.sort(values).reshape(2, -1).T.ravel()}[order]  # fmt: skip
    sketch = Sketch(1000)
    for start in range(0, n, 777):
        sketch.add(values[start : start + 777])
    p = np.linspace(0, 1, 101)
    off = np.abs(sketch.quantiles(p) - p * (n - 1))
    assert off.max() <= sketch.rank_error + 2.0 ** len(sketch.buffers) and sketch.rank_error < 0.006 * n
    assert sum(len(b) * 2**k for k, b in enumerate(sketch.buffers)) == n and sum(map(len, sketch.buffers)) < 10_000
    assert (sketch.n, sketch.low, sketch.high) == (n, 0, n - 1)
    assert (sketch.mean, sketch.sd) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert sketch.kurtosis == pytest.approx(st.kurtosis(values)) and sketch.skewness == pytest.approx(0, abs=1e-9)


def test_a_random_part_without_an_intercept_needs_at() -> None:
    """At zero of a number its share would be 0, and of a factor there is no such place."""
    frame = pl.read_parquet(mp.datasets.path("sleepstudy")).with_columns(late=pl.col("days") > 4)
    for term in ("0 + days", "0 + late"):
        fit = mp.lmm(f"reaction ~ days + ({term} | subject)", frame)
        with pytest.raises(mp.ConfigError, match="no intercept"):
            fit.icc()
        assert shares(fit) == {}  # in a report
        name = term.split()[-1]
        assert 0.0 < fit.icc(at={name: True if name == "late" else 3.0})["subject"] < 1.0
