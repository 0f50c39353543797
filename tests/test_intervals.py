"""Profile and Wald intervals against dense matrices and direct search."""
from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.optimize as so
import scipy.stats as st

import mlpipe as mp
from mlpipe.solve.pinned import Pin
from mlpipe.solve.profile import Profile
from mlpipe.solve.surfaces import BlockSurface, LevelSurface, Linear, Look

from .dense import Dense, simulate
from .dense_profile import DenseProfile
from .dense_several import DenseSeveral, Grouping

DATA = Path(__file__).parent / "reference" / "data"
Z = 1.959963984540054


def frame_of(model: Dense) -> pl.DataFrame:
    columns = {f"x{k}": model.X[:, k] for k in range(1, model.X.shape[1])}
    return pl.DataFrame({"y": model.y, "g": model.block, "w": model.w, **columns})


def limits(fit: Any, method: str = "profile", draws: int = 1000) -> dict[str, tuple[float, float]]:
    return {row["term"]: (row["conf_low"], row["conf_high"]) for row in fit.confint(method=method, draws=draws).to_pylist()}


def dense_limit(model: Dense, pinned: str, v: float) -> float:
    """The least ML −2ℓ with a quantity pinned, by BFGS over absolute covariances of (1, x1)."""

    def deviance(x: np.ndarray) -> float:
        s1, s2, r, sigma = math.exp(x[0]), math.exp(x[1]), math.tanh(x[2]), math.exp(x[3])
        s1, s2, r, sigma = (v if pinned == name else value for name, value in (("sd1", s1), ("sd2", s2), ("cor", r), ("sigma", sigma)))
        psi = np.array([[s1 * s1, r * s1 * s2], [r * s1 * s2, s2 * s2]]) / sigma**2
        part = Dense(model.X, model.Z, model.y, model.w, model.block, model.sizes, False)
        if pinned == "beta":
            part = Dense(np.delete(model.X, 1, axis=1), model.Z, model.y - v * model.X[:, 1], model.w, model.block, model.sizes, False)
        return part.deviance(psi, sigma**2)

    return min(float(so.minimize(deviance, np.full(4, start), method="BFGS").fun) for start in (0.0, 0.4))


def test_profile_limits_are_where_the_dense_deviance_says() -> None:
    model = simulate(5, blocks=12, rows=(4, 8), p=2, sizes=(2,), reml=False, weights=True, theta=np.array([1.0, 0.3, 0.8]))
    fit = mp.lmm("y ~ x1 + (1 + x1 | g)", frame_of(model), weights="w")
    found = limits(fit)
    least = dense_limit(model, "", 0.0)
    names = {"sd1": "sd_(Intercept)|g", "sd2": "sd_x1|g", "cor": "cor_x1.(Intercept)|g", "sigma": "sigma", "beta": "x1"}
    for pinned, name in names.items():
        for end in found[name]:
            assert math.sqrt(dense_limit(model, pinned, end) - least) == pytest.approx(Z, abs=2e-3), name


def test_gradients_of_surfaces_are_exact() -> None:
    model = simulate(2, blocks=9, rows=(3, 6), p=2, sizes=(2,), reml=False, weights=True)
    rng = np.random.default_rng(1)
    n = 60
    codes = [rng.integers(0, 8, n), rng.integers(0, 4, n)]
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    groupings = [Grouping(codes[0], X, (2,)), Grouping(codes[1], X[:, :1], (1,))]
    several = DenseSeveral(X, rng.normal(size=n), rng.uniform(0.5, 2.0, n), groupings, False)
    cases = [
        (BlockSurface(model.problem()), np.array([0.9, -0.3, 0.2, 0.6, 0.1])),
        (BlockSurface(model.problem()), np.array([0.3, -0.6, -0.1, 0.2, 0.1])),  # without rank
        (LevelSurface(several.problem()), np.array([0.9, -0.3, 0.2, 0.6, 0.7, 0.1])),
        (LevelSurface(several.problem()), np.array([0.3, -0.6, -0.1, 0.2, 0.0, 0.1])),
    ]
    for surface, phi in cases:
        for condition in (None, Linear(np.array([0.4, 1.0]), 0.7)):
            at, h = surface.look(phi, condition), 1e-6
            for k, step in enumerate(np.eye(len(phi)) * h):
                slope = (surface.look(phi + step, condition).value - surface.look(phi - step, condition).value) / (2 * h)
                assert at.gradient[k] == pytest.approx(slope, rel=1e-5, abs=1e-4)
            if condition is not None:
                ends = [surface.look(phi, Linear(condition.c, condition.value + s * h)).value for s in (1, -1)]
                assert at.slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-4)


def test_variances_that_may_be_zero_have_zero_as_lower_limit() -> None:
    fit = mp.lmm("distance ~ Sex * I(age - 11) + (I(age - 11) | Subject)", DATA / "Orthodont.parquet", reml=False)
    found = limits(fit)
    assert found["sd_I(age - 11)|Subject"][0] == 0.0
    assert found["cor_I(age - 11).(Intercept)|Subject"] == (-1.0, 1.0)


@pytest.mark.filterwarnings("ignore::mlpipe.MlpipeWarning")
def test_a_singular_fit_has_profile_intervals() -> None:
    rng = np.random.default_rng(4)
    frame = pl.DataFrame({"y": rng.normal(size=120), "x": rng.normal(size=120), "g": np.repeat(np.arange(12), 10)})
    frame = frame.with_columns(y=pl.col("y") - pl.col("y").mean().over("g"))
    fit = mp.lmm("y ~ x + (1 | g)", frame)
    assert fit.singular
    found = limits(fit)
    assert found["sd_(Intercept)|g"][0] == 0.0 < found["sd_(Intercept)|g"][1] < 0.5
    assert found["x"][0] < fit.fixef()["x"] < found["x"][1]


def test_wald_intervals_are_those_of_tidy_and_names_are_those_of_r() -> None:
    fit = mp.lmm("strength ~ 1 + (1 | batch/cask)", DATA / "Pastes.parquet")
    found = limits(fit, "wald")
    assert list(found) == ["sd_(Intercept)|cask:batch", "sd_(Intercept)|batch", "sigma", "(Intercept)"]
    rows = {(row["group"], row["term"]): row for row in fit.tidy().to_pylist()}
    for name, row in (("(Intercept)", rows[None, "(Intercept)"]), ("sigma", rows["Residual", "sd__Observation"])):
        assert found[name] == pytest.approx((row["conf_low"], row["conf_high"]))


def test_glmm_profiles_make_the_spool_once() -> None:
    rng = np.random.default_rng(8)
    g = np.repeat(np.arange(30), 6)
    x = rng.normal(size=180)
    y = rng.gamma(3.0, np.exp(0.4 + 0.5 * x + 0.4 * rng.normal(size=30)[g]) / 3.0)
    fit = mp.glmm("y ~ x + (1 | g)", pl.DataFrame({"y": y, "x": x, "g": g}), family="gamma", link="log")
    found = limits(fit)
    assert fit.info["notes"].count("the rows were read once more for inference") == 1
    wald = limits(fit, "wald")
    for name in ("x", "shape", "sd_(Intercept)|g"):
        for mine, theirs in zip(found[name], wald[name], strict=True):
            assert mine == pytest.approx(theirs, abs=0.35 * (wald[name][1] - wald[name][0]))
        assert found[name] != wald[name]


def plain_deviance(family: str, y: np.ndarray, eta: np.ndarray, tau: float) -> float:
    """−2ℓ by scipy's densities."""
    if family == "binomial":
        return -2.0 * float(st.bernoulli(1 / (1 + np.exp(-eta))).logpmf(y).sum())
    if family == "poisson":
        return -2.0 * float(st.poisson(np.exp(eta)).logpmf(y).sum())
    return -2.0 * float(st.gamma(np.exp(tau), scale=np.exp(eta - tau)).logpdf(y).sum())


@pytest.mark.parametrize("family", ["binomial", "poisson", "gamma"])
def test_profiles_of_plain_models_are_where_the_dense_deviance_says(family: str) -> None:
    rng = np.random.default_rng(11)
    x, o = rng.normal(size=60), 0.3 * rng.normal(size=60)
    X = np.column_stack([np.ones(60), x])
    eta = 0.2 + 0.8 * x + o
    y = {"binomial": rng.random(60) < 1 / (1 + np.exp(-eta)), "poisson": rng.poisson(np.exp(eta)), "gamma": rng.gamma(2.0, np.exp(eta) / 2)}
    frame = pl.DataFrame({"y": y[family].astype(float), "x": x, "o": o})
    fit = mp.glm("y ~ x", frame, family=family, link="logit" if family == "binomial" else "log", offset="o")
    found = limits(fit)

    def least(k: int, v: float) -> float:
        def deviance(free: np.ndarray) -> float:
            at = np.insert(free, k, v)
            return plain_deviance(family, frame["y"].to_numpy(), X @ at[:2] + o, float(at[-1]))

        start = np.delete(np.append(fit.beta, [fit.tau] if family == "gamma" else []), k)
        return float(so.minimize(deviance, start, method="BFGS", options={"gtol": 1e-6}).fun)

    names = ["(Intercept)", "x", *(["shape"] if family == "gamma" else [])]
    assert set(found) == set(names)
    for k, name in enumerate(names):
        for end in found[name]:
            excess = least(k, math.log(end) if name == "shape" else end) + 2.0 * fit.loglik
            assert math.sqrt(excess) == pytest.approx(Z, abs=2e-3), name
    assert fit.info["notes"] == ["the rows were read once more for inference"]


def test_profiles_of_several_factors_are_those_of_the_linear_model() -> None:
    """The Laplace approximation of a Gaussian model is exact."""
    rng = np.random.default_rng(12)
    a, b, x = rng.integers(0, 8, 80), rng.integers(0, 6, 80), rng.normal(size=80)
    y = 1 + 0.5 * x + 1.5 * rng.normal(size=8)[a] + 1.5 * rng.normal(size=6)[b] + rng.normal(size=80)
    frame = pl.DataFrame({"y": y, "x": x, "a": a, "b": b})
    general, linear = mp.glmm("y ~ x + (1 | b) + (1 | a)", frame, family="gaussian"), mp.lmm("y ~ x + (1 | b) + (1 | a)", frame)
    found, wanted = limits(general), limits(linear)
    assert list(found) == list(wanted)
    for name, ends in wanted.items():
        assert found[name] == pytest.approx(ends, abs=1e-3 * (ends[1] - ends[0])), name


@pytest.mark.parametrize("method", ["profile", "boot"])
def test_what_has_no_likelihood_to_profile(method: str) -> None:
    frame = pl.DataFrame({"y": [0, 2, 1, 4, 3, 1, 0, 5], "x": list(range(8)), "a": [0, 1] * 4, "b": [0, 0, 1, 1] * 2})
    with pytest.raises(mp.ConfigError, match="quasipoisson.*no likelihood"):
        mp.glm("y ~ x", frame, family="quasipoisson").confint(method=method)
    fit = mp.glm("y ~ x", frame, family="poisson")
    fit.info["method"] = "iterative"
    with pytest.raises(mp.ConfigError, match="Monte Carlo"):
        fit.confint(method=method)


def test_requests_that_make_no_sense() -> None:
    fit = mp.lmm("Reaction ~ Days + (1 | Subject)", DATA / "sleepstudy.parquet")
    with pytest.raises(mp.ConfigError, match="not one of wald, profile, boot"):
        fit.confint(method="profil")
    with pytest.raises(mp.ConfigError, match="between 0 and 1"):
        fit.confint(level=95)
    fit.held = fit.source = None
    with pytest.raises(mp.DataError, match="neither its statistics nor its data"):
        fit.confint(method="profile")


@pytest.mark.parametrize("scale", [1e8, 1e-8])
@pytest.mark.parametrize("flat", [False, True])
def test_profiles_do_not_depend_on_the_units_of_the_response(scale: float, flat: bool) -> None:
    frame = pl.read_parquet(mp.datasets.path("sleepstudy"))
    if flat:  # a variance of zero
        frame = frame.with_columns(pl.col("reaction") - pl.col("reaction").mean().over("subject"))
    formula = f"reaction ~ days + ({'1' if flat else 'days'} | subject)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.SingularFitWarning)
        plain = limits(mp.lmm(formula, frame))
        other = limits(mp.lmm(formula, frame.with_columns(pl.col("reaction") * scale)))
    for name, ends in plain.items():
        unit = 1.0 if name.startswith("cor") else scale
        assert np.array(other[name]) / unit == pytest.approx(np.array(ends), rel=1e-5, abs=1e-5), name


@pytest.mark.parametrize("formula", ["y ~ x1 + (1 | g)", "y ~ x1 + (1 | g) + (1 | h)"])
def test_units_of_weights_do_not_matter(formula: str) -> None:
    model = simulate(3, blocks=15, rows=(3, 8), p=2, sizes=(1,), reml=True, weights=True)
    frame = frame_of(model).with_columns(h=pl.int_range(pl.len()) % 7).with_columns(pl.col.y + (2.0 * pl.col.h).sin())
    plain, *others = (mp.lmm(formula, frame, weights=f"w * {unit}") for unit in ("1", "1e10", "1e-10"))
    want = limits(plain)
    degrees = plain.tidy(ddf="kenward-roger")["df"].to_pylist()[:2]
    for fit, unit in zip(others, (1e5, 1e-5), strict=True):
        assert fit.tidy(ddf="kenward-roger")["df"].to_pylist()[:2] == pytest.approx(degrees, rel=1e-6)
        for name, ends in limits(fit).items():
            scale = unit if name == "sigma" else 1.0
            assert np.array(ends) / scale == pytest.approx(want[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("flat", [False, True])
def test_profiles_of_generalized_models_do_not_depend_on_units(flat: bool) -> None:
    rng = np.random.default_rng(4)
    g, x = np.repeat(np.arange(20), 6), rng.uniform(size=120)
    mu = 1.0 / (0.9 + 0.5 * x + (0.0 if flat else 0.15) * rng.normal(size=20)[g])
    y = mu * (1.0 + 0.1 * np.sin(7.0 * np.arange(120))) if flat else rng.gamma(30.0, mu / 30.0)
    frame = pl.DataFrame({"g": g, "x": x, "y": y})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.SingularFitWarning)
        plain, other = (
            limits(mp.glmm("y ~ x + (1 | g)", frame.with_columns(pl.col.y * s), family="gamma", link="inverse")) for s in (1.0, 1e6)
        )
    for name, ends in plain.items():
        assert ends[0] < ends[1]
        assert np.array(other[name]) * (1.0 if name == "shape" else 1e6) == pytest.approx(np.array(ends), rel=1e-4, abs=1e-4), name


def test_a_limit_that_falls_on_the_estimate_is_none() -> None:
    class Wall:
        sizes, typical = (), np.zeros((0, 0))

        def look(self, phi: np.ndarray, condition: Linear | None) -> Look:
            return Look(100.0, np.zeros(len(phi)))

    pin = Pin((), np.eye(2)[:, :1], np.eye(2)[1], np.zeros(1), 0.0, 1.0)
    with pytest.raises(mp.ConvergenceError, match="did not converge"):
        Profile(Wall(), pin, np.eye(2), 0.0).limit(Z, upper=True)


def counts(less: bool) -> pl.DataFrame:
    """Counts of 30 blocks, as good as Poisson's or less dispersed."""
    rng = np.random.default_rng(5)
    g, x = np.repeat(np.arange(30), 6), rng.normal(size=180)
    eta = 0.3 * x + rng.normal(0.0, 0.3, 30)[g]
    y = rng.binomial(8, 0.3 * np.exp(eta - eta.max() + 0.5)) if less else rng.negative_binomial(20, 20 / (20 + np.exp(eta)))
    return pl.DataFrame({"g": g, "x": x, "y": y})


@pytest.mark.parametrize("less", [False, True])
@pytest.mark.parametrize(("family", "parameter"), [("negbinomial", "k"), ("negbinomial1", "alpha")])
def test_overdispersion_may_have_no_limit_on_the_side_of_poisson(family: str, parameter: str, less: bool) -> None:
    """Where the deviance of Poisson is within the quantile the interval of k has no upper end, that of alpha begins at 0."""
    frame = counts(less)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.ConvergenceWarning)
        fit = mp.glmm("y ~ x + (1 | g)", frame, family=family)
        boot = limits(mp.glmm("y ~ x + (1 | g)", frame, family=family, options=mp.Options(seed=1)), "boot", 20) if less else {}
    poisson = mp.glmm("y ~ x + (1 | g)", frame, family="poisson")
    assert fit.loglik - poisson.loglik < Z**2 / 2
    found, plain = limits(fit), limits(poisson)
    low, high = found.pop(parameter)
    assert (high == math.inf and low > 1.0) if parameter == "k" else (low == 0.0 and 0.0 < high < 1.0)
    if less:  # the rest is Poisson's
        assert fit.loglik == pytest.approx(poisson.loglik, abs=1e-4) and "infinity" in fit.message
        assert fit.beta == pytest.approx(poisson.beta, abs=1e-4)
        assert set(boot) == {*found, parameter}
    for name, ends in found.items():
        assert ends == pytest.approx(plain[name], abs=1e-4 if less else 0.1), name


def test_refits_that_fail_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpipe import bootstrap

    fit, made = mp.lmm("reaction ~ days + (1 | subject)", mp.datasets.path("sleepstudy")), bootstrap._refitted
    outcomes = iter([True, False, True])
    monkeypatch.setattr(bootstrap, "_refitted", lambda *given: made(*given) * (1.0 if next(outcomes) else math.nan))
    with pytest.warns(mp.ConvergenceWarning, match="1 of 3 bootstrap refits"):
        fit.confint("boot", draws=3)
    monkeypatch.setattr(bootstrap, "_refitted", lambda *given: made(*given) * math.nan)
    with pytest.raises(mp.ConvergenceError, match="no bootstrap refit"):
        fit.confint("boot", draws=2)


def test_a_profile_along_singular_matrices() -> None:
    """There a Cholesky factor's elements turn at once; the limits are by a dense search over the correlation and the rest."""
    frame = pl.read_parquet(mp.datasets.path("sleepstudy"))
    frame = frame.with_columns(pl.col("reaction") - pl.col("reaction").mean().over("subject"))
    with pytest.warns(mp.SingularFitWarning):
        fit = mp.lmm("reaction ~ days + (days | subject)", frame)
    assert limits(fit)["sd_days|subject"][0] == pytest.approx(3.921114, abs=2e-4)


def slopes(kind: str, family: str, seed: int) -> pl.DataFrame:
    """Blocks whose fitted covariance is singular: random intercepts without slopes; responses that vary less between blocks than chance
    has it ("flat"); a block's mean of zero, x far from there ("far")."""
    rng = np.random.default_rng(seed)
    blocks, rows = (15, 8) if kind == "intercept" else (12, 10)
    g = np.repeat(np.arange(blocks), rows)
    if kind == "intercept":
        x, b = rng.normal(size=len(g)), 0.7 * rng.normal(size=blocks)
        rng.normal(size=blocks)
        eta, chance = 0.3 + 0.5 * x + b[g], rng.normal(size=len(g)) if family == "gaussian" else rng.random(len(g))
    else:
        x = np.tile(np.linspace(-1, 1, rows), blocks) + 0.2 * rng.normal(size=len(g))
        eta = 0.1 + 0.05 * rng.normal(size=blocks)[g] * x if kind == "far" else 0.2 + 0.3 * x
        strata = (rng.permuted(np.tile(np.arange(rows), (blocks, 1)), axis=1) + rng.random((blocks, rows))) / rows
        chance = rng.normal(size=len(g)) if kind == "far" else strata.ravel()
    y = {"gaussian": eta + chance, "binomial": chance < 1 / (1 + np.exp(-eta)), "poisson": st.poisson.ppf(chance, np.exp(eta))}[family]
    frame = pl.DataFrame({"y": y.astype(float), "x": x + 10.0 * (kind == "far"), "g": g})
    return frame.with_columns(pl.col("y") - pl.col("y").mean().over("g")) if kind == "far" else frame


PINNED = {"sd_(Intercept)|g": 0, "sd_x|g": 1, "cor_x.(Intercept)|g": 2, "(Intercept)": 3, "x": 4, "sigma": 5}


@pytest.mark.thinned(2)
@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize(
    ("kind", "family", "seed", "why"),
    [
        ("flat", "poisson", 1, "no variance at all: searches over a Cholesky factor found no way"),
        ("flat", "poisson", 4, "the same"),
        ("flat", "binomial", 3, "the pinned minimum leaves the boundary on which the search starts"),
        ("intercept", "binomial", 1, "two minima, with correlations of 1 and -1"),
        ("intercept", "gaussian", 1, "neither standard deviation may be zero: the correlation has a limit"),
    ],
)
def test_profiles_of_singular_fits_are_where_the_dense_deviance_says(kind: str, family: str, seed: int, why: str) -> None:
    frame = slopes(kind, family, seed)
    fit = mp.lmm("y ~ x + (x | g)", frame, reml=False) if family == "gaussian" else mp.glmm("y ~ x + (x | g)", frame, family=family)
    assert fit.singular
    y, x = (frame[name].to_numpy().reshape(fit.n_blocks, -1) for name in "yx")
    model = DenseProfile(family, y, x)
    least = model.least()
    assert least == pytest.approx(-2.0 * fit.loglik, abs=1e-6)
    for name, ends in limits(fit).items():
        for end in ends:
            excess = model.least(PINNED[name], math.log(end) if name == "sigma" else end) - least
            at_end = name.startswith("cor") and abs(end) == 1.0 or name.startswith("sd") and end == 0.0
            assert excess < Z**2 + 5e-3 and (at_end or excess > Z**2 - 5e-3), (name, end, excess, why)


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
def test_the_limit_of_a_correlation_follows_the_path_from_the_estimate() -> None:
    """Far out, where a model without variances is a minimum too, the way back does not begin there."""
    frame = slopes("far", "gaussian", 21)
    fit = mp.lmm("y ~ x + (x | g)", frame, reml=False)
    found = limits(fit)
    low, high = found["cor_x.(Intercept)|g"]
    assert fit.singular and low == -1.0 < high < -0.9 and 0.0 < found["sd_x|g"][0]
    y, x = (frame[name].to_numpy().reshape(12, -1) for name in "yx")
    model = DenseProfile("gaussian", y, x)
    assert model.least(2, high) + 2.0 * fit.loglik == pytest.approx(Z**2, abs=5e-3)


@pytest.mark.parametrize(("family", "parameter"), [("negbinomial", "k"), ("negbinomial1", "alpha")])
def test_profiles_of_plain_models_whose_overdispersion_vanishes(family: str, parameter: str) -> None:
    frame = pl.DataFrame({"x": np.linspace(-1.0, 1.0, 200), "y": np.random.default_rng(0).binomial(6, 0.5, 200)})
    with pytest.warns(mp.ConvergenceWarning, match="infinity"):
        fit = mp.glm("y ~ x", frame, family=family)
    found, plain = limits(fit), limits(mp.glm("y ~ x", frame, family="poisson"))
    low, high = found.pop(parameter)
    assert (high == math.inf and low > 1.0) if parameter == "k" else (low == 0.0 and 0.0 < high < 1.0)
    for name, ends in found.items():
        assert ends == pytest.approx(plain[name], abs=1e-4), name


@pytest.mark.parametrize(("formula", "ask"), [
    ("y ~ x + (1 | g)", "profile"), ("y ~ x + (1 | g)", "influence"), ("y ~ x + (1 | g) + (1 | h)", "boot"),
    ("y ~ x + (1 | g) + (1 | h)", "influence"), ("y ~ x", "profile"), ("y ~ x", "boot"),
])  # fmt: skip
def test_other_rows_than_those_of_the_fit_are_refused(formula: str, ask: str, tmp_path: Path) -> None:
    """As many as there were, but one response another."""
    rng = np.random.default_rng(4)
    frame = pl.DataFrame({"x": rng.normal(size=200), "g": np.arange(200) % 20, "h": np.arange(200) // 20, "y": rng.poisson(3.0, 200)})
    file = tmp_path / "rows.parquet"
    frame.write_parquet(file)
    fit = (mp.glmm if "|" in formula else mp.glm)(formula, file, family="poisson")
    frame.with_columns(y=pl.when(pl.int_range(pl.len()) == 7).then(pl.col("y") + 1).otherwise("y")).write_parquet(file)
    with pytest.raises(mp.DataError, match="log-likelihood") as caught:
        fit.influence(group="g") if ask == "influence" else fit.confint(method=ask, draws=2)
    assert caught.value.code == "source_changed"
