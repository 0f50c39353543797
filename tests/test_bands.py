"""Intervals around predictions and simulated rows."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import mlpipe as mp

DATA = Path(__file__).parent / "reference" / "data"
Z = 1.959963984540054


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return pl.read_parquet(DATA / "sleepstudy.parquet").with_columns(w=1.0 + pl.col("Days") / 3)


@pytest.fixture(scope="module")
def slope(frame: pl.DataFrame) -> mp.LMMFit:
    return mp.lmm("Reaction ~ Days + (Days | Subject)", frame, weights="w")


def scored(fit: Any, data: Any, **keywords: Any) -> pl.DataFrame:
    return pl.DataFrame(fit.predict(data, **keywords).read_all())


def test_population_bands_are_those_of_the_design(slope: mp.LMMFit, frame: pl.DataFrame) -> None:
    table = scored(slope, frame, effects="population", interval="confidence")
    X = np.column_stack([np.ones(frame.height), frame["Days"].to_numpy()])
    half = Z * np.sqrt(np.einsum("ni,ij,nj->n", X, slope.vcov(), X))
    np.testing.assert_allclose(table["predicted"], X @ slope.beta, rtol=1e-9)
    np.testing.assert_allclose(table["upper"] - table["predicted"], half, rtol=1e-8)
    np.testing.assert_allclose(table["predicted"] - table["lower"], half, rtol=1e-8)
    psi = slope.sigma**2 * slope.terms[0].factor @ slope.terms[0].factor.T
    whole = (half / Z) ** 2 + np.einsum("ni,ij,nj->n", X, psi, X) + slope.sigma**2 / frame["w"].to_numpy()
    for effects in ("population", "marginal"):
        wide = scored(slope, frame, effects=effects, interval="prediction", level=0.8, prefix="p_")
        np.testing.assert_allclose(wide["p_upper"] - wide["p_predicted"], 1.2815515655446004 * np.sqrt(whole), rtol=1e-8)


@pytest.mark.parametrize("several", [False, True])
def test_conditional_bands_have_the_modes_variances(several: bool) -> None:
    formula = "diameter ~ 1 + (1 | plate) + (1 | sample)" if several else "diameter ~ sample + (1 | plate)"
    data = pl.read_parquet(DATA / "Penicillin.parquet")
    fit = mp.lmm(formula, data)
    table = scored(fit, data, interval="confidence")
    variance = np.zeros(data.height)
    for group in fit.groups:
        modes = pl.DataFrame(fit.ranef(group)).select(pl.col(group).cast(pl.String), pl.col("std_error") ** 2)
        keys = data.select(pl.col(group).cast(pl.String))
        variance += keys.join(modes, on=group, how="left", maintain_order="left")["std_error"].to_numpy()
    fixed = scored(fit, data, effects="population", interval="confidence")
    variance += ((fixed["upper"] - fixed["predicted"]).to_numpy() / Z) ** 2
    np.testing.assert_allclose(table["predicted"], scored(fit, data)["predicted"], rtol=1e-12)
    np.testing.assert_allclose(table["upper"] - table["predicted"], Z * np.sqrt(variance), rtol=1e-7)
    wide = scored(fit, data, interval="prediction")
    np.testing.assert_allclose(wide["predicted"] - wide["lower"], Z * np.sqrt(variance + fit.sigma**2), rtol=1e-7)


@pytest.mark.parametrize("left_out", ["(1 | a)", "(1 + x | a)"])
def test_factors_left_out_are_part_of_what_is_not_known(left_out: str) -> None:
    rng = np.random.default_rng(2)
    n = 240
    data = pl.DataFrame({"a": rng.integers(0, 20, n), "b": rng.integers(0, 8, n), "x": rng.normal(size=n)})
    effects = [rng.normal(size=20), 0.5 * rng.normal(size=20), rng.normal(size=8)]
    y = effects[0][data["a"]] + effects[1][data["a"]] * data["x"].to_numpy() + effects[2][data["b"]] + rng.normal(size=n)
    data = data.with_columns(y=y)
    fit = mp.lmm(f"y ~ x + {left_out} + (1 | b)", data)
    some = scored(fit, data, effects=["b"], interval="prediction")
    certain = scored(fit, data, effects=["b"], interval="confidence")
    term = next(term for term in fit.terms if term.group == "a")
    z = np.column_stack([np.ones(n), data["x"]])[:, : len(term.names)]
    variance = ((certain["upper"] - certain["predicted"]).to_numpy() / Z) ** 2 + fit.sigma**2
    variance += fit.sigma**2 * ((z @ term.factor) ** 2).sum(axis=1)
    np.testing.assert_allclose(some["upper"] - some["predicted"], Z * np.sqrt(variance), rtol=1e-7)


def test_bands_of_means_stay_in_their_range(tmp_path: Path) -> None:
    data = pl.read_parquet(DATA / "cbpp.parquet")
    fit = mp.glmm("cbind(incidence, size - incidence) ~ period + (1 | herd)", data, family="binomial")
    link, mean = (scored(fit, data, effects="population", kind=kind, interval="confidence") for kind in ("link", "response"))
    for name in ("predicted", "lower", "upper"):
        np.testing.assert_allclose(mean[name], 1 / (1 + np.exp(-link[name].to_numpy())), rtol=1e-9)
    conditional = scored(fit, data, interval="confidence")
    assert ((conditional["lower"] > 0) & (conditional["lower"] < conditional["predicted"]) & (conditional["upper"] < 1)).all()
    fit.write(tmp_path / "fit")
    again = scored(mp.load(tmp_path / "fit"), data, effects="population", interval="confidence")
    np.testing.assert_allclose(again["lower"], mean["lower"], rtol=1e-9)
    falling = mp.glm("y ~ x", pl.DataFrame({"y": [1.0, 0.7, 0.5, 0.45, 0.3], "x": [1.0, 2, 3, 4, 5]}), family="gamma", link="inverse")
    table = scored(falling, pl.DataFrame({"x": [2.0]}), interval="confidence")
    assert table["lower"][0] < table["predicted"][0] < table["upper"][0]


def test_bands_that_make_no_sense(slope: mp.LMMFit, frame: pl.DataFrame) -> None:
    with pytest.raises(mp.ConfigError, match="covariances that the fit does not keep"):
        slope.predict(frame, interval="confidence")
    with pytest.raises(mp.ConfigError, match="not one of confidence, prediction"):
        slope.predict(frame, effects="population", interval="credible")
    with pytest.raises(mp.ConfigError, match="between 0 and 1"):
        slope.predict(frame, effects="population", interval="confidence", level=2)
    counts = mp.glm("n ~ 1", pl.DataFrame({"n": [1, 2, 3, 0]}), family="poisson")
    with pytest.raises(mp.ConfigError, match="no prediction interval"):
        counts.predict(pl.DataFrame({"n": [1]}), interval="prediction")


def test_simulated_rows_have_the_model_s_moments(slope: mp.LMMFit, frame: pl.DataFrame) -> None:
    n = 600
    table = pl.DataFrame(slope.simulate(n, seed=3).read_all())
    assert table.columns[: frame.width] == frame.columns and table.select(frame.columns).equals(frame)
    y = table.select(pl.selectors.starts_with("sim_")).to_numpy()[:10]  # one subject
    X, w = np.column_stack([np.ones(10), np.arange(10.0)]), frame["w"].to_numpy()[:10]
    psi = slope.sigma**2 * slope.terms[0].factor @ slope.terms[0].factor.T
    V = X @ psi @ X.T + np.diag(slope.sigma**2 / w)
    r = np.linalg.solve(np.linalg.cholesky(V), y - (X @ slope.beta)[:, None])
    assert np.abs(r.mean(axis=1)).max() < 5 / np.sqrt(n)
    assert np.abs(r @ r.T / n - np.eye(10)).max() < 6 / np.sqrt(n)
    again = pl.DataFrame(slope.simulate(n, seed=3).read_all())
    assert again.equals(table) and not pl.DataFrame(slope.simulate(2, seed=4).read_all())["sim_1"].equals(table["sim_1"])


def test_simulated_counts_of_trials_and_unused_rows() -> None:
    unused = pl.when(pl.int_range(pl.len()) == 4).then(None).otherwise(pl.col("size"))
    data = pl.read_parquet(DATA / "cbpp.parquet").with_columns(size=unused)
    fit = mp.glmm("cbind(incidence, size - incidence) ~ period + (1 | herd)", data, family="binomial", options=mp.Options(seed=9))
    table = pl.DataFrame(fit.simulate(40).read_all())
    y = table.select(pl.selectors.starts_with("sim_")).to_numpy()
    assert np.isnan(y[4]).all()
    kept, size = np.delete(y, 4, axis=0), np.delete(data["size"].to_numpy(), 4)
    assert np.isfinite(kept).all() and (kept <= size[:, None] + 1e-9).all() and np.abs(kept - np.rint(kept)).max() < 1e-9
    assert abs(np.nansum(y) / 40 / data["incidence"].sum() - 1) < 0.25
    with pytest.raises(mp.ConfigError, match="whole number"):
        fit.simulate(0)


def test_simulation_needs_the_source(tmp_path: Path, slope: mp.LMMFit) -> None:
    slope.write(tmp_path / "fit")
    with pytest.raises(mp.DataError, match="not at hand"):
        mp.load(tmp_path / "fit").simulate()


FAR = {
    "ols": lambda d: mp.ols("y ~ x + f", d, cluster="g", vcov="CR2"), "glm": lambda d: mp.glm("n ~ x + f", d, family="poisson"),
    "gee": lambda d: mp.gee("n ~ x + f", d, groups="g", family="poisson"), "lmm": lambda d: mp.lmm("y ~ x + f + (1 + x | g)", d),
    "crossed": lambda d: mp.lmm("y ~ x + f + (1 | g) + (1 | h)", d), "glmm": lambda d: mp.glmm("n ~ x + f + (1 | g)", d, family="poisson"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAR)
def test_far_covariates_take_no_digits_from_intervals(kind: str, tmp_path: Path) -> None:
    """Seconds since 1970: nothing may come from the intercept's variance, which is 1e18 times that of a mean."""
    rng = np.random.default_rng(3)
    g, x = rng.integers(0, 20, 300), np.round(rng.normal(size=300) * 2**20) / 2**20
    y = 1.0 + x + rng.normal(size=20)[g] + rng.normal(size=300)
    columns = {"y": y, "x": x, "g": g, "f": rng.choice(["a", "b"], 300), "h": rng.integers(0, 6, 300), "n": rng.poisson(np.exp(0.3 * x))}
    near = pl.DataFrame(columns)
    far = near.with_columns(x=pl.col("x") + 1.75 * 2**30)
    fits = [FAR[kind](data) for data in (near, far)]
    fits[1].write(tmp_path / "fit")
    for fit in (fits[1], mp.load(tmp_path / "fit")):
        bands = [scored(one, data, effects="population", interval="confidence") for one, data in ((fits[0], near), (fit, far))]
        for name in ("lower", "upper"):
            np.testing.assert_allclose(bands[1][name], bands[0][name], rtol=1e-5)
    for ask in (lambda fit: fit.means("f"), lambda fit: fit.contrasts("f"), lambda fit: fit.effects()):
        errors = [pl.DataFrame(ask(fit))["std_error"].to_numpy() for fit in fits]
        at = slice(None) if len(errors[0]) < 4 else slice(-2, None)  # of effects the averages
        np.testing.assert_allclose(errors[1][at], errors[0][at], rtol=1e-5)
    if kind == "lmm":
        np.testing.assert_allclose(fits[1].influence()["leverage"], fits[0].influence()["leverage"], rtol=1e-5)


@pytest.mark.parametrize(("family", "link", "y"), [
    ("gamma", "inverse", [0.1, 5.0, 0.3, 9.0, 0.2, 2.0, 12.0, 0.5]), ("gaussian", "inverse", [5.0, 2.0, -3.0, -1.0, 4.0, 3.0, -1.0, 0.5]),
    ("poisson", "sqrt", [0, 0, 1, 0, 1, 0, 0, 2]), ("inverse_gaussian", "1/mu^2", [0.1, 5.0, 0.3, 9.0, 0.2, 2.0, 12.0, 0.5]),
])  # fmt: skip
def test_bands_that_reach_where_a_link_is_not_defined(family: str, link: str, y: list[float]) -> None:
    """The means beyond the inverse link's pole are not those next to the estimate: that end is not known, the other is."""
    frame = pl.DataFrame({"y": y, "f": list("abababab")})
    fit = mp.glm("y ~ f", frame, family=family, link=link)
    for level in (0.3, 0.999):
        mean, eta = (scored(fit, frame, kind=kind, interval="confidence", level=level) for kind in ("response", "link"))
        found = {row["level"]: row for row in fit.means("f", conf_level=level).to_pylist()}
        for row, at in zip(mean.to_dicts(), eta.to_dicts(), strict=True):
            assert row["lower"] is None or row["lower"] <= row["predicted"]
            assert row["upper"] is None or row["upper"] >= row["predicted"]
            crossed = at["lower"] * at["upper"] <= 0.0
            assert (row["lower"] is None) + (row["upper"] is None) == crossed
            far = at["upper"] if at["predicted"] > 0.0 else at["lower"]
            end = row["upper"] if link == "sqrt" or (link == "inverse" and far < 0.0) else row["lower"]
            assert end == pytest.approx({"inverse": 1.0 / far, "sqrt": far**2, "1/mu^2": abs(far) ** -0.5}[link])
            ends = [found[row["f"]][name] for name in ("conf_low", "conf_high")]
            assert ends == pytest.approx([row["lower"], row["upper"]], nan_ok=True)
        assert level < 0.5 or any(None in (row["lower"], row["upper"]) for row in mean.to_dicts())
