"""Plain generalized linear models against iteratively reweighted least squares in numpy, scipy's optimizer and direct formulas."""
from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.optimize as so

import mlpipe as mp
from tests.conftest import as_data
from tests.dense_glmm import MEANS, PAIRS, TAU, centre, draw, log_density, variance

from . import dense_linear

REFERENCE = Path(__file__).parent / "reference"
PLAIN = mp.Options(threads=1)
SHAPED = tuple(TAU)


def simulated(family: str, link: str, seed: int = 0, n: int = 250) -> pl.DataFrame:
    """One covariate x, trials m (1 but for binomial), weights v, offset o, clusters g, response y: successes for a binomial."""
    rng = np.random.default_rng(seed)
    eta, spread = centre(family, link)
    x, o = rng.uniform(-1.0, 1.0, n), spread * rng.uniform(-0.3, 0.3, n)
    m = rng.integers(1, 6, n).astype(float) if family == "binomial" else np.ones(n)
    v = rng.uniform(0.5, 2.0, n) if family in ("gamma", "inverse_gaussian", "gaussian") else np.ones(n)
    y = draw(rng, family, MEANS[link](eta + 0.5 * spread * x + o), m, v, TAU.get(family, 0.0))
    return pl.DataFrame({"x": x, "o": o, "m": m, "v": v, "y": y * m, "p": y, "g": rng.integers(0, 25, n)})


def arguments(family: str) -> dict[str, Any]:
    if family == "binomial":
        return {"trials": "m"}
    return {"weights": "v"} if family in ("gamma", "inverse_gaussian", "gaussian") else {}


def loglik(frame: pl.DataFrame, family: str, link: str, psi: np.ndarray) -> float:
    """The log-likelihood with its constants at (intercept, slope, tau)."""
    x, o, m, v, p = (frame[name].to_numpy() for name in ("x", "o", "m", "v", "p"))
    mu = MEANS[link](psi[0] + psi[1] * x + o)
    with np.errstate(all="ignore"):
        return float(log_density(family, mu, p, m, v, psi[2]).sum())


@pytest.mark.parametrize(("family", "link"), PAIRS)
def test_the_maximum_of_the_likelihood(family: str, link: str) -> None:
    frame = simulated(family, link)
    fit = mp.glm("p ~ x", frame, family=family, link=link, offset="o", **arguments(family))
    assert fit.converged and fit.score < 1e-8 and not fit.info["separation"]
    psi = np.r_[fit.beta, fit.tau]
    at = loglik(frame, family, link, psi)
    assert abs(fit.loglik - at) < 1e-8 * (1 + abs(at))
    free = 2 + (family in SHAPED)
    steps = np.sqrt(np.r_[np.diag(fit.vcov()), fit.tau_variance])[:free]

    def beyond(t: np.ndarray) -> float:
        moved = psi.copy()
        moved[:free] += steps * t
        return -loglik(frame, family, link, moved)

    gradient = so.approx_fprime(np.zeros(free), beyond, 1e-4) - 0.5e-4 * np.ones(free)
    assert np.abs(gradient).max() < 1e-3
    assert so.minimize(beyond, np.full(free, 0.3), method="Nelder-Mead").fun > -at - 1e-8


def irls(frame: pl.DataFrame, family: str, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Canonical logit or log by reweighted least squares; coefficients and covariance."""
    X = np.column_stack([np.ones(len(frame)), frame["x"]])
    size, y, o = frame["m"].to_numpy() * q, frame["p"].to_numpy(), frame["o"].to_numpy()
    beta = np.zeros(2)
    for _ in range(50):
        mu = MEANS["logit" if family == "binomial" else "log"](X @ beta + o)
        w = variance(family, mu, np.ones_like(mu), 0.0) * size
        beta = beta + np.linalg.solve(X.T @ (w[:, None] * X), X.T @ (size * (y - mu)))
    return beta, np.linalg.inv(X.T @ (w[:, None] * X))


@pytest.mark.parametrize("family", ["binomial", "poisson"])
@pytest.mark.parametrize("freq", [False, True])
def test_reweighted_least_squares(family: str, freq: bool) -> None:
    frame = simulated(family, "logit" if family == "binomial" else "log").with_columns(q=pl.int_range(pl.len()) % 3 + 1)
    q = frame["q"].to_numpy() if freq else np.ones(len(frame))
    fit = mp.glm("p ~ x + offset(o)", frame, family=family, freq="q" if freq else None, **arguments(family))
    beta, vcov = irls(frame, family, q)
    np.testing.assert_allclose(fit.beta, beta, rtol=1e-9)
    np.testing.assert_allclose(fit.vcov(), vcov, rtol=1e-7)
    assert fit.nobs == q.sum()
    again = mp.glm("p ~ x + offset(o)", frame.select(pl.all().repeat_by("q").explode()), family=family, **arguments(family))
    if freq:
        np.testing.assert_allclose(again.loglik, fit.loglik, rtol=1e-11)
        np.testing.assert_allclose(again.vcov(), fit.vcov(), rtol=1e-8)


@pytest.mark.parametrize("vcov", [None, "CR0", "CR1", "HC0", "HC1"])
@pytest.mark.parametrize("family", ["binomial", "poisson"])
def test_sandwich_errors(family: str, vcov: str | None) -> None:
    frame = simulated(family, "logit" if family == "binomial" else "log")
    clustered = vcov not in ("HC0", "HC1")
    fit = mp.glm("p ~ x + offset(o)", frame, family=family, vcov=vcov, cluster="g" if clustered else None, **arguments(family))
    X = np.column_stack([np.ones(len(frame)), frame["x"]])
    mu = MEANS[fit.link](X @ fit.beta + frame["o"].to_numpy())
    scores = X * (frame["m"].to_numpy() * (frame["p"].to_numpy() - mu))[:, None]
    bread = irls(frame, family, np.ones(len(frame)))[1]
    n, g = len(frame), frame["g"].to_numpy()
    if clustered:
        scores = np.array([scores[g == k].sum(axis=0) for k in np.unique(g)])
    G = len(scores)
    factor = {None: G / (G - 1) * (n - 1) / (n - 2), "CR0": 1.0, "CR1": G / (G - 1) * (n - 1) / (n - 2), "HC0": 1.0, "HC1": n / (n - 2)}
    np.testing.assert_allclose(fit.vcov(), factor[vcov] * bread @ scores.T @ scores @ bread, rtol=1e-7)


@pytest.mark.parametrize("vcov", ["HC2", "HC3", "CR2"])
@pytest.mark.parametrize("family", ["binomial", "poisson"])
def test_corrected_sandwiches(family: str, vcov: str) -> None:
    """Those of the weighted least squares that the last step of Fisher scoring solves."""
    frame = simulated(family, "logit" if family == "binomial" else "log")
    fit = mp.glm("p ~ x + offset(o)", frame, family=family, vcov=vcov, cluster="g" if vcov == "CR2" else None, **arguments(family))
    X = np.column_stack([np.ones(len(frame)), frame["x"]])
    mu = MEANS[fit.link](X @ fit.beta + frame["o"].to_numpy())
    v = variance(family, mu, np.ones_like(mu), 0.0)
    working, w = X @ fit.beta + (frame["p"].to_numpy() - mu) / v, frame["m"].to_numpy() * v
    if vcov == "CR2":
        want = dense_linear.one_way(X, working, w, frame["g"].to_numpy(), vcov, None)
    else:
        want = dense_linear.rows_covariance(X, working, w, vcov)
    np.testing.assert_allclose(fit.vcov(), want, rtol=1e-7)


def test_freq_equals_repeated_rows_in_sandwiches() -> None:
    frame = simulated("poisson", "log").with_columns(q=pl.int_range(pl.len()) % 3 + 1)
    for vcov in ("HC0", "HC1", "HC3", "CR2"):
        cluster = "g" if vcov == "CR2" else None
        short = mp.glm("y ~ x", frame, family="poisson", freq="q", vcov=vcov, cluster=cluster)
        long = mp.glm("y ~ x", frame.select(pl.all().repeat_by("q").explode()), family="poisson", vcov=vcov, cluster=cluster)
        np.testing.assert_allclose(short.vcov(), long.vcov(), rtol=1e-8)


def test_robust_errors_of_a_reference() -> None:
    spec = json.loads((REFERENCE / "glmm" / "contraception_ri.json").read_text())
    frame = pl.read_parquet(REFERENCE / spec["data"]["file"])
    plain = mp.glm("use01 ~ age + urban", frame, family="binomial")
    robust = mp.glm("use01 ~ age + urban", frame, family="binomial", cluster="district")
    assert robust.n_blocks == frame["district"].n_unique() and plain.n_blocks == 0
    np.testing.assert_allclose(plain.beta, robust.beta, rtol=1e-9)
    assert robust.robust == "CR1" and plain.robust is None


@pytest.mark.parametrize(("quasi", "family"), [("quasibinomial", "binomial"), ("quasipoisson", "poisson")])
def test_quasi_families(quasi: str, family: str) -> None:
    frame = simulated(family, "logit" if family == "binomial" else "log")
    fit = mp.glm("p ~ x + offset(o)", frame, family=quasi, **arguments(family))
    base = mp.glm("p ~ x + offset(o)", frame, family=family, **arguments(family))
    mu = MEANS[fit.link](fit.beta[0] + fit.beta[1] * frame["x"].to_numpy() + frame["o"].to_numpy())
    residual = (frame["p"].to_numpy() - mu) ** 2 * frame["m"].to_numpy() / variance(family, mu, np.ones_like(mu), 0.0)
    phi = residual.sum() / (len(frame) - 2)
    assert fit.family == quasi
    assert fit.dispersion == pytest.approx(phi, rel=1e-9)
    np.testing.assert_allclose(fit.beta, base.beta, rtol=1e-10)
    np.testing.assert_allclose(fit.vcov(), phi * base.vcov(), rtol=1e-8)
    assert math.isnan(fit.loglik)
    str(fit), fit.tidy(), fit.glance()


@pytest.mark.parametrize("link", ["identity", "log"])
def test_gaussian_equals_least_squares(link: str) -> None:
    frame = simulated("gaussian", link)
    fit = mp.glm("p ~ x", frame, family="gaussian", link=link)
    if link == "identity":
        X = np.column_stack([np.ones(len(frame)), frame["x"]])
        beta, rss = np.linalg.lstsq(X, frame["p"], rcond=None)[:2]
        np.testing.assert_allclose(fit.beta, beta, rtol=1e-10)
        assert fit.dispersion == pytest.approx(rss[0] / len(frame), rel=1e-9)
        np.testing.assert_allclose(fit.vcov(), fit.dispersion * np.linalg.inv(X.T @ X), rtol=1e-7)
    assert fit.converged


@pytest.mark.parametrize("formula", ["y ~ 0 + x", "y ~ 0 + f", "y ~ 1", "y ~ x * f", "y ~ poly(x, 2)", "y ~ I(x^2) + log(m + 1)"])
def test_designs(formula: str) -> None:
    frame = simulated("poisson", "log").with_columns(f=pl.Series(["a", "b", "c"] * 83 + ["a"]), m=pl.col.x + 2)
    fit = mp.glm(formula, frame, family="poisson")
    assert fit.converged
    fitted = fit.augment(frame).read_all()
    response = frame["y"].to_numpy()
    if "0 + x" not in formula:  # the canonical link's score of the constant
        assert fitted["fitted"].to_numpy().sum() == pytest.approx(response.sum(), rel=1e-9)
    np.testing.assert_allclose(fitted["resid"].to_numpy(), response - fitted["fitted"].to_numpy(), atol=1e-12)


def test_repeated_columns_are_dropped_and_named() -> None:
    frame = simulated("poisson", "log").with_columns(x2=2 * pl.col.x + 1, c=pl.lit(3.0))
    with pytest.warns(mp.RankWarning, match="x2"):
        fit = mp.glm("y ~ x + x2 + c", frame, family="poisson")
    assert fit.dropped == ("x2", "c")
    np.testing.assert_allclose(fit.beta, mp.glm("y ~ x", frame, family="poisson").beta, rtol=1e-9)


@pytest.mark.parametrize("kind", ["lazy", "arrow", "pandas", "reader", "duckdb", "table", "path", "csv"])
def test_every_entry_gives_the_same(kind: str, tmp_path: Path) -> None:
    frame = simulated("gamma", "log").sample(fraction=1.0, shuffle=True, seed=1)
    true = mp.glm("p ~ x", frame, family="gamma", weights="v")
    fit = mp.glm("p ~ x", as_data(frame, kind, tmp_path), family="gamma", weights="v")
    assert np.abs((fit.beta - true.beta) / np.sqrt(np.diag(true.vcov()))).max() < 1e-7
    assert abs(fit.loglik - true.loglik) < 1e-8 + 1e-12 * abs(true.loglik)
    np.testing.assert_allclose(fit.vcov(), true.vcov(), rtol=1e-7)


@pytest.mark.parametrize("link", ["logit", "probit", "cloglog"])
@pytest.mark.parametrize("kind", ["complete", "quasi", "a level"])
def test_separation_is_named(kind: str, link: str) -> None:
    rng = np.random.default_rng(3)
    x, z = rng.normal(size=300), rng.normal(size=300)
    y = rng.binomial(1, 0.5, 300)
    frame = pl.DataFrame({"x": x, "z": z, "y": y}).with_columns(r=((pl.col.y == 1) & (pl.col.z > 1)).cast(pl.Float64))
    frame = frame.with_columns(f=pl.when(pl.col.r == 1).then(pl.lit("bad")).otherwise(pl.lit("a")), s=(pl.col.z > 0.1).cast(pl.Int8))
    formula, named = {"complete": ("s ~ x + z", "z"), "quasi": ("y ~ x + r", "r"), "a level": ("y ~ x + f", "fbad")}[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = mp.glm(formula, frame, family="binomial", link=link)
    assert named in fit.info["separation"] and "x" not in fit.info["separation"]
    kinds = {w.category for w in caught}
    assert mp.SeparationWarning in kinds
    assert RuntimeWarning not in kinds
    assert not math.isnan(fit.score)


def test_a_count_that_is_always_zero_is_reported() -> None:
    frame = simulated("poisson", "log").with_columns(z=pl.lit(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = mp.glm("z ~ x", frame, family="poisson")
        except mp.MlpipeError:
            return
    assert caught or not fit.converged


@pytest.mark.parametrize("family", ["negbinomial", "negbinomial1"])
def test_no_overdispersion_is_reported(family: str) -> None:
    frame = pl.DataFrame({"x": np.linspace(-1, 1, 400), "y": np.random.default_rng(0).binomial(6, 0.5, 400)})
    poisson = mp.glm("y ~ x", frame, family="poisson")
    with pytest.warns(mp.ConvergenceWarning, match="infinity"):
        fit = mp.glm("y ~ x", frame, family=family)
    assert fit.loglik == pytest.approx(poisson.loglik, abs=1e-3)
    np.testing.assert_allclose(fit.beta, poisson.beta, atol=1e-4)
    str(fit), fit.tidy(), fit.glance()


@pytest.mark.parametrize(("name", "make"), {
    "far": lambda x: 1e9 + x,
    "large": lambda x: 1e9 * x,
    "small": lambda x: 1e-9 * x,
    "years": lambda x: 2000.0 + np.round(20 * x),
}.items())  # fmt: skip
def test_wild_scales(name: str, make: Any) -> None:
    frame = simulated("poisson", "log")
    values = make(frame["x"].to_numpy())
    frame = frame.with_columns(w=pl.Series(values), c=pl.Series((values - values.mean()) / values.std()))
    wild, calm = mp.glm("y ~ w", frame, family="poisson"), mp.glm("y ~ c", frame, family="poisson")
    assert wild.converged and not wild.dropped
    assert abs(wild.loglik - calm.loglik) < 1e-7
    assert wild.beta[1] * values.std() == pytest.approx(calm.beta[1], rel=1e-6)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "weights of counts": ({"family": "poisson", "weights": "v"}, mp.ConfigError, "trials=.*freq="),
    "random term": ({"formula": "y ~ x + (1 | g)", "family": "poisson"}, mp.ConfigError, "glmm"),
    "unknown family": ({"family": "poison"}, mp.ConfigError, "poisson"),
    "unknown link": ({"family": "poisson", "link": "lgo"}, mp.ConfigError, "'log'"),
    "HC with cluster": ({"family": "poisson", "cluster": "g", "vcov": "HC0"}, mp.ConfigError, "CR0"),
    "CR without": ({"family": "poisson", "vcov": "CR1"}, mp.ConfigError, "HC0"),
    "no such cluster": ({"family": "poisson", "cluster": "gg"}, mp.ColumnNotFoundError, "gg"),
    "trials of counts": ({"family": "poisson", "trials": "m"}, mp.ConfigError, "binomial"),
    "cbind of counts": ({"formula": "cbind(y, m) ~ x", "family": "poisson"}, mp.FormulaError, "binomial"),
    "no rows": ({"family": "poisson", "data": 0}, mp.DataError, "no rows"),
    "zero trials": ({"family": "binomial", "formula": "z ~ x", "trials": "z"}, mp.DataError, ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    asked, kind, says = REFUSED[case]
    asked = dict(asked)
    frame = simulated("poisson", "log").with_columns(z=pl.lit(0.0)).head(asked.pop("data", 250))
    with pytest.raises(kind) as caught:
        mp.glm(asked.pop("formula", "y ~ x"), frame, **asked)
    assert re.search(says, str(caught.value), re.DOTALL)


def test_results_answer(tmp_path: Path) -> None:
    frame = simulated("negbinomial", "log")
    fit = mp.glm("y ~ x + offset(o)", frame, family="negbinomial")
    assert len(fit.theta) == 0 and fit.varcorr() is not None
    assert fit.facts()["n_params"] == 3
    rows = fit.tidy().to_pylist()
    assert [r["term"] for r in rows if r["effect"] == "fixed"] == ["(Intercept)", "x"]
    for effects in ("population", "conditional", "marginal"):
        got = fit.predict(frame, effects=effects).read_all()["predicted"].to_numpy()
        np.testing.assert_allclose(got, np.exp(fit.beta[0] + fit.beta[1] * frame["x"].to_numpy() + frame["o"].to_numpy()), rtol=1e-10)
    with pytest.raises(mp.ConfigError, match="random"):
        fit.ranef()
    fit.write(tmp_path / "fit")
    again = mp.load(tmp_path / "fit")
    assert type(again) is type(fit) and str(again) == str(fit)
    assert (again.beta == fit.beta).all() and again.loglik == fit.loglik and again.tau == fit.tau


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", ["binomial", "poisson", "quasipoisson"])
@pytest.mark.parametrize(("n", "rare"), [(200, 40), (20_000, 10)])
@pytest.mark.parametrize("cluster", [None, "g"])
def test_a_level_without_events_is_named(family: str, n: int, rare: int, cluster: str | None) -> None:
    """It alone, however rare; the sandwich of such a coefficient may be small."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=n)
    y = rng.binomial(1, 1.0 / (1.0 + np.exp(-x))) if family == "binomial" else rng.poisson(np.exp(0.5 * x))
    y[-rare:] = 0
    frame = pl.DataFrame({"x": 3.0 * x, "y": y, "f": ["a"] * (n - rare) + ["none"] * rare, "g": np.arange(n) % 20})
    with pytest.warns(mp.SeparationWarning, match="fnone"):
        fit = mp.glm("y ~ x + f", frame, family=family, cluster=cluster)
    assert fit.info["separation"] == ["fnone"]


def test_rare_events_are_no_separation() -> None:
    rng = np.random.default_rng(4)
    y = np.zeros(20_000)
    y[:3] = 1.0
    frame = pl.DataFrame({"y": y, "x": rng.normal(size=20_000), "f": ["a", "b"] * 10_000})
    for family in ("binomial", "poisson"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert mp.glm("y ~ x + f", frame, family=family).info["separation"] == []


@pytest.mark.parametrize(("vcov", "cluster"), [("HC2", None), ("HC3", None), ("CR2", "g")])
def test_infinite_estimates_have_no_leverages(vcov: str, cluster: str | None) -> None:
    frame = simulated("binomial", "logit").with_columns(y=(pl.col("x") > 0).cast(pl.Int8), g=pl.int_range(pl.len()) % 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = mp.glm("y ~ x", frame, family="binomial", vcov=vcov, cluster=cluster)
    assert {w.category for w in caught} <= {mp.SeparationWarning, mp.ConvergenceWarning} and fit.info["separation"]
    assert np.isnan(fit.vcov()).all()
    assert all(row["std_error"] is None and row["statistic"] is None and row["p_value"] is None for row in fit.tidy().to_pylist())


@pytest.mark.parametrize("scale", [1e-9, 1e9])
@pytest.mark.parametrize("vcov", [None, "HC3"])
def test_the_unit_of_a_gaussian_response_does_not_matter(scale: float, vcov: str | None) -> None:
    frame = simulated("gaussian", "identity")
    fit, far = (mp.glm("y ~ x", data, family="gaussian", vcov=vcov) for data in (frame, frame.with_columns(y=pl.col("y") * scale)))
    np.testing.assert_allclose(far.beta, fit.beta * scale, rtol=1e-9)
    np.testing.assert_allclose(far.vcov(), fit.vcov() * scale**2, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e9])
@pytest.mark.parametrize("family", ["gaussian", "gamma", "inverse_gaussian"])
def test_the_unit_of_weights_does_not_matter(family: str, scale: float) -> None:
    """Weights that add up to 1 once ended the search, or were told to have converged where they had not."""
    frame = simulated(family, "log").with_columns(g=pl.int_range(pl.len()) % 30)
    pair = (frame, frame.with_columns(pl.col("v") * scale))
    fits = [mp.glm("p ~ x", data, family=family, link="log", weights="v") for data in pair]
    fits += [mp.gee("p ~ x", data, groups="g", family=family, link="log", weights="v") for data in pair]
    for one, two in zip(fits[::2], fits[1::2], strict=True):
        assert two.converged
        np.testing.assert_allclose(two.beta, one.beta, rtol=1e-7)
        np.testing.assert_allclose(two.vcov(), one.vcov(), rtol=1e-6)


EXACT = {
    "gaussian": ("identity", 4.0, 0.5), "gaussian log": ("log", 1.0, 0.2), "gamma": ("log", 1.0, 0.2),
    "gamma inverse": ("inverse", 4.0, 0.5), "inverse_gaussian": ("log", 1.0, 0.2),
    "inverse_gaussian 1/mu^2": ("1/mu^2", 4.0, 0.5),
}  # fmt: skip


def explained(case: str, noise: float) -> tuple[pl.DataFrame, dict[str, str], np.ndarray]:
    """A response that one covariate explains but for a relative error, how to fit it, and its coefficients."""
    (link, *beta), rng = EXACT[case], np.random.default_rng(1)
    x, e = rng.normal(size=(2, 300))
    mu = MEANS[link](beta[0] + beta[1] * x)
    return pl.DataFrame({"x": x, "y": mu * (1.0 + noise * e)}), {"family": case.split()[0], "link": link}, np.array(beta)


@pytest.mark.parametrize("case", EXACT)
def test_an_exact_fit_is_said_so(case: str) -> None:
    """Such fits once ran out of passes."""
    frame, how, beta = explained(case, 0.0)
    with pytest.warns(mp.ConvergenceWarning, match="fitted exactly"):
        fit = mp.glm("y ~ x", frame, **how)  # type: ignore[arg-type]
    np.testing.assert_allclose(fit.beta, beta, rtol=1e-10)
    assert fit.evaluations < 100


@pytest.mark.parametrize("noise", [1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize("case", EXACT)
def test_a_fit_that_leaves_little_converges(case: str, noise: float) -> None:
    frame, how, beta = explained(case, noise)
    fit = mp.glm("y ~ x", frame, **how)  # type: ignore[arg-type]
    assert fit.converged and fit.evaluations < 60
    np.testing.assert_array_less(np.abs(fit.beta - beta), 5.0 * np.sqrt(np.diag(fit.covariance)))
    e = frame["y"].to_numpy() / MEANS[how["link"]](beta[0] + beta[1] * frame["x"].to_numpy()) - 1.0
    if how["family"] == "gamma":
        assert fit.dispersion == pytest.approx(float((e**2).mean()), rel=0.1)


@pytest.mark.parametrize("family", ["gamma", "inverse_gaussian"])
def test_the_unit_of_a_positive_response_does_not_matter(family: str) -> None:
    """Means below 1 / n once were not where the search starts."""
    frame = simulated(family, "log")
    fit, far = (mp.glm("p ~ x", data, family=family, link="log") for data in (frame, frame.with_columns(p=pl.col("p") * 1e-9)))
    np.testing.assert_allclose(far.beta, fit.beta + [math.log(1e-9), 0.0], rtol=1e-9)
    assert far.evaluations <= fit.evaluations + 1


def test_overdispersion_of_large_counts() -> None:
    """var = mu + mu²/k tells k = 1e8 well where mu = 1e9; its derivatives once had no digits there, and k was taken for infinite."""
    rng = np.random.default_rng(3)
    y = rng.poisson(1e9 * rng.gamma(1e8, 1e-8, 400)).astype(float)
    fit = mp.glm("y ~ 1", pl.DataFrame({"y": y}), family="negbinomial")
    assert fit.converged
    assert fit.beta[0] == pytest.approx(math.log(y.mean()), abs=1e-12)
    assert fit.dispersion == pytest.approx(1.0 / (y.var() / y.mean() ** 2 - 1.0 / y.mean()), rel=1e-4)
    frame = pl.DataFrame({"y": rng.poisson(1e9 * rng.gamma(2.0, 0.5, 400)).astype(float)})  # var = mu (1 + alpha), alpha above exp(16)
    other = mp.glm("y ~ 1", frame, family="negbinomial1")
    assert other.converged and other.dispersion == pytest.approx(5e8, rel=0.3)


@pytest.mark.parametrize("family", ["negbinomial", "negbinomial1"])
def test_overdispersion_that_vanishes_leaves_the_poisson_estimates(family: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1.0, 1.0, 200)
    frame = pl.DataFrame({"x": x, "y": rng.binomial(10**9, 0.1 * np.exp(x))})  # less than Poisson's variance
    poisson = mp.glm("y ~ x", frame, family="poisson")
    with pytest.warns(mp.ConvergenceWarning, match="infinity"):
        fit = mp.glm("y ~ x", frame, family=family)
    np.testing.assert_allclose(fit.beta, poisson.beta, rtol=1e-9)
    np.testing.assert_allclose(fit.vcov(), poisson.vcov(), rtol=1e-6)
    assert math.isnan(fit.tau_variance)
