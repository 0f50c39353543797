"""Estimating equations against whole matrices and geepack: correlations, gaps, weights, corrections, engines."""
from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import mlpipe as mp
from mlpipe import spool

from .conftest import TYPED_KINDS, as_data
from .dense_gee import Dense

REFERENCE = Path(__file__).parent / "reference"
LINK = {"binomial": "logit", "poisson": "log", "gaussian": "identity", "gamma": "log", "inverse_gaussian": "log"}
KINDS = ("robust", "model", "kauermann-carroll", "mancl-derouen")


def simulated(family: str, seed: int = 0, blocks: int = 120) -> pl.DataFrame:
    """Up to five visits a subject, a third of them missed, in no order; responses that share a subject's effect."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(blocks), 5)
    t = np.tile(np.array([1.0, 2.0, 4.0, 5.0, 9.0]), blocks)
    x, o = rng.normal(size=len(g)), 0.2 * rng.normal(size=len(g))
    eta = 0.3 + 0.4 * x + o + 0.6 * rng.normal(size=blocks)[g]
    m = rng.integers(1, 5, len(g)).astype(float)
    y = {
        "binomial": lambda: rng.binomial(m.astype(int), 1 / (1 + np.exp(-eta))) / m, "poisson": lambda: rng.poisson(np.exp(eta)),
        "gaussian": lambda: eta + rng.normal(size=len(g)), "gamma": lambda: rng.gamma(3.0, np.exp(eta) / 3.0),
    }[family]().astype(float)  # fmt: skip
    frame = pl.DataFrame({"g": g, "t": t, "x": x, "o": o, "m": m, "y": y, "w": rng.uniform(0.5, 2.0, len(g))})
    kept = rng.uniform(size=len(g)) < 0.7
    kept[::5] = True
    shuffled = frame.filter(pl.Series(kept)).sample(fraction=1.0, shuffle=True, seed=1)
    return shuffled.with_columns(wave=pl.format("visit {}", pl.col("t").cast(int)))


def extra(family: str) -> dict[str, Any]:
    return {"trials": "m"} if family == "binomial" else {"weights": "w"} if family in ("gaussian", "gamma") else {}


def dense(frame: pl.DataFrame, family: str, corr: str) -> Dense:
    w = frame["m"] if family == "binomial" else frame["w"] if family in ("gaussian", "gamma") else pl.Series(np.ones(len(frame)))
    X = np.column_stack([np.ones(len(frame)), frame["x"]])
    made = Dense(X, *(frame[c].to_numpy() for c in ("y", "g", "t")), w.to_numpy(), frame["o"].to_numpy(), family, LINK[family], corr)
    return made.fit(np.array([0.3, 0.4]))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("corr", ["independence", "exchangeable", "ar1", "unstructured"])
@pytest.mark.parametrize("family", ["gaussian", "binomial", "poisson", "gamma"])
def test_against_whole_matrices(family: str, corr: str) -> None:
    frame = simulated(family)
    want = dense(frame, family, corr)
    fit = mp.gee("y ~ x", frame, groups="g", family=family, link=LINK[family], corr=corr, time="t", offset="o", **extra(family))
    assert fit.converged
    np.testing.assert_allclose(fit.beta, want.beta, atol=1e-8)
    np.testing.assert_allclose(fit.scale, want.phi, rtol=1e-7)
    np.testing.assert_allclose(fit.alpha, want.alpha if corr != "independence" else [], atol=1e-7)
    for kind in KINDS:
        np.testing.assert_allclose(fit.vcov(kind), want.covariance(kind), rtol=1e-6)


@pytest.mark.parametrize("corr", ["exchangeable", "ar1", "unstructured"])
def test_pieces_chunks_and_files_change_nothing(corr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = simulated("gaussian", blocks=60)
    want = mp.gee("y ~ x", frame, groups="g", corr=corr, time="t")
    monkeypatch.setattr(spool, "CHUNK_ROWS", 20)
    fit = mp.gee("y ~ x", frame.to_arrow(), groups="g", corr=corr, time="t", options=mp.Options(threads=2))
    np.testing.assert_allclose(fit.beta, want.beta, rtol=1e-9)
    np.testing.assert_allclose(fit.vcov("mancl-derouen"), want.vcov("mancl-derouen"), rtol=1e-7)
    np.testing.assert_allclose(fit.alpha, want.alpha, atol=1e-9)


@pytest.mark.parametrize("corr", ["exchangeable", "ar1"])
def test_blocks_in_pieces(corr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    n = 240
    e = np.zeros(n)
    for i in range(1, n):
        e[i] = (0.6 * e[i - 1] if i % 80 else 0.0) + rng.normal()
    frame = pl.DataFrame({"g": np.arange(n) // 80, "x": rng.normal(size=n), "t": np.arange(n) % 80})
    frame = frame.with_columns(y=pl.col("x") + pl.Series(e))
    want = mp.gee("y ~ x", frame, groups="g", corr=corr, time="t")
    monkeypatch.setattr(spool, "CHUNK_ROWS", 16)
    monkeypatch.setattr(spool, "PIECE_ROWS", 16)
    monkeypatch.setattr("mlpipe.engines.arrange.BATCH_ROWS", 10)
    fit = mp.gee("y ~ x", frame, groups="g", corr=corr, time="t")
    np.testing.assert_allclose(fit.beta, want.beta, rtol=1e-9)
    np.testing.assert_allclose(fit.alpha, want.alpha, rtol=1e-8)
    np.testing.assert_allclose(fit.vcov("kauermann-carroll"), want.vcov("kauermann-carroll"), rtol=1e-6)


def test_times_that_are_text() -> None:
    frame = simulated("poisson")
    want = mp.gee("y ~ x", frame, groups="g", family="poisson", corr="unstructured", time="t")
    fit = mp.gee("y ~ x", frame, groups="g", family="poisson", corr="unstructured", time="wave")
    np.testing.assert_allclose(fit.alpha, want.alpha, atol=1e-9)
    assert fit.correlation().to_pylist()[0] == {"time1": "visit 1", "time2": "visit 2", "estimate": pytest.approx(want.alpha[0])}
    turned = {"wave": [f"visit {t}" for t in (9, 5, 4, 2, 1)]}
    back = mp.gee("y ~ x", frame, groups="g", family="poisson", corr="unstructured", time="wave", levels=turned)
    assert back.times[0] == "visit 9" and back.alpha[-1] == pytest.approx(want.alpha[0])


def test_row_order_without_a_time() -> None:
    frame = simulated("gaussian").sort("g", "t")
    want = mp.gee("y ~ x", frame, groups="g", corr="ar1", time="t")
    for data in (frame, frame.lazy(), frame.to_arrow()):
        fit = mp.gee("y ~ x", data, groups="g", corr="ar1")
        np.testing.assert_allclose(fit.beta, want.beta, rtol=1e-9)
        assert any("order" in note for note in fit.info["notes"])
    assert abs(mp.gee("y ~ x", frame.sample(fraction=1.0, shuffle=True, seed=3), groups="g", corr="ar1").alpha[0] - want.alpha[0]) > 1e-3


def test_frequencies_are_repeated_rows() -> None:
    frame = simulated("poisson").with_columns(q=pl.int_range(pl.len()) % 3 + 1)
    long = frame.select(pl.all().repeat_by("q").explode())
    for corr in ("independence", "exchangeable"):
        short = mp.gee("y ~ x", frame, groups="g", family="poisson", corr=corr, freq="q")
        full = mp.gee("y ~ x", long, groups="g", family="poisson", corr=corr)
        np.testing.assert_allclose(short.beta, full.beta, rtol=1e-8)
        for kind in KINDS:
            np.testing.assert_allclose(short.vcov(kind), full.vcov(kind), rtol=1e-6)
        np.testing.assert_allclose(list(short.qic().values()), list(full.qic().values()), rtol=1e-8)


@pytest.mark.parametrize("kind", TYPED_KINDS)
def test_engines_agree(kind: str, tmp_path: Path) -> None:
    frame = simulated("binomial")
    want = mp.gee("y ~ x", frame, groups="g", family="binomial", corr="ar1", time="t", trials="m")
    fit = mp.gee("y ~ x", as_data(frame, kind, tmp_path), groups="g", family="binomial", corr="ar1", time="t", trials="m")
    np.testing.assert_allclose(fit.beta, want.beta, rtol=1e-9)
    np.testing.assert_allclose(fit.vcov(), want.vcov(), rtol=1e-7)


def test_results(tmp_path: Path) -> None:
    frame = simulated("binomial")
    model = {"groups": "g", "family": "binomial", "corr": "unstructured", "time": "wave", "trials": "m"}
    fit = mp.gee("y ~ x + offset(o)", frame, vcov="mancl-derouen", **model)
    np.testing.assert_array_equal(fit.vcov(), fit.vcov("mancl-derouen"))
    assert "Mancl-Derouen" in str(fit) and "unstructured, by wave" in str(fit) and "<table>" in fit._repr_html_()
    table = pl.from_arrow(fit.augment(frame).read_all())
    mu = 1 / (1 + np.exp(-(fit.beta[0] + fit.beta[1] * frame["x"] + frame["o"]).to_numpy()))
    np.testing.assert_allclose(table["fitted"], mu, rtol=1e-10)
    np.testing.assert_allclose(table["resid"], frame["y"].to_numpy() - mu, atol=1e-10)
    assert pl.from_arrow(fit.predict(frame.drop("wave", "y")).read_all())["predicted"].to_numpy() == pytest.approx(mu)
    fit.write(tmp_path / "fit")
    again = mp.load(tmp_path / "fit")
    assert type(again) is mp.GEEFit and again.times == fit.times and again.qic() == fit.qic()
    np.testing.assert_array_equal(again.alpha, fit.alpha)
    np.testing.assert_array_equal(again.vcov("robust"), fit.vcov("robust"))
    assert fit.tidy().to_pylist()[1]["p_value"] > 0 and len(fit.confint()) == 2
    quasi = mp.gee("y ~ x", frame, groups="g", family="quasibinomial", trials="m")
    np.testing.assert_allclose(quasi.beta, mp.gee("y ~ x", frame, groups="g", family="binomial", trials="m").beta)


def test_two_rows_at_one_time() -> None:
    frame = simulated("gaussian")
    twice = pl.concat([frame, frame.head(3)])
    for corr in ("ar1", "unstructured", "exchangeable"):
        with pytest.raises(mp.DataError, match="3 rows are at the same t"):
            mp.gee("y ~ x", twice, groups="g", corr=corr, time="t")
    mp.gee("y ~ x", twice, groups="g")


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"corr": "ar2"}, mp.ConfigError, "ar1"),
        ({"family": "beta"}, mp.ConfigError, "beta"),
        ({"corr": "unstructured"}, mp.ConfigError, "time="),
        ({"vcov": "HC0"}, mp.ConfigError, "mancl-derouen"),
        ({"groups": "gg"}, mp.ColumnNotFoundError, "g"),
        ({"groups": []}, mp.ConfigError, "groups"),
        ({"time": "tt"}, mp.ColumnNotFoundError, "t"),
        ({"freq": "m", "corr": "ar1", "time": "t"}, mp.ConfigError, "freq"),
        ({"weights": "w", "family": "binomial"}, mp.ConfigError, "trials"),
        ({"formula": "y ~ x + (1 | g)"}, mp.ConfigError, "random"),
        ({"family": "poisson", "formula": "I(y - 9) ~ x"}, mp.DataError, "poisson"),
    ],
)
def test_bad_requests(arguments: dict[str, Any], error: Any, text: str) -> None:
    settings = {"groups": "g"} | arguments
    with pytest.raises(error) as caught:
        mp.gee(settings.pop("formula", "y ~ x"), simulated("gaussian"), **settings)
    assert text in f"{caught.value} {caught.value.hint}"


def test_a_missing_time_drops_the_row() -> None:
    frame = simulated("gaussian").with_columns(t=pl.when(pl.col("t") == 4.0).then(None).otherwise("t"))
    fit = mp.gee("y ~ x", frame, groups="g", corr="unstructured", time="t")
    assert fit.times == [1.0, 2.0, 5.0, 9.0] and fit.info["dropped"]["t"] == frame["t"].null_count()


@pytest.mark.parametrize("corr", ["exchangeable", "ar1"])
def test_against_geepack(corr: str) -> None:
    spec = json.loads((REFERENCE / "fits" / f"epil_gee_{corr}.json").read_text())
    frame, want = pl.read_parquet(REFERENCE / spec["data"]["file"]), spec["results"]
    schema = json.loads((REFERENCE / spec["data"]["schema"]).read_text())
    frame = frame.with_columns(pl.col(c["name"]).cast(pl.Enum(c["levels"])) for c in schema["columns"] if c.get("levels"))
    fit = mp.gee(spec["model"]["formula"], frame, groups="subject", family="poisson", corr=corr)
    se = np.array(want["fixef"]["se"])
    assert np.abs((fit.beta - want["fixef"]["estimate"]) / se).max() < 1e-6
    np.testing.assert_allclose(np.sqrt(np.diag(fit.vcov())), se, rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.diag(fit.vcov("model"))), want["se_model_based"], rtol=1e-6)
    np.testing.assert_allclose(fit.alpha, want["alpha"], atol=1e-6)
    assert fit.scale == pytest.approx(want["scale_phi"], rel=1e-6) and fit.qic()["qicu"] == pytest.approx(want["qic"]["QICu"], rel=1e-6)


def test_one_block_has_no_sandwich() -> None:
    """Its score is zero at the estimates, and so would be all standard errors."""
    rng = np.random.default_rng(3)
    frame = pl.DataFrame({"g": ["a"] * 30, "x": rng.normal(size=30), "y": rng.normal(size=30)})
    for vcov in (None, "mancl-derouen"):
        with pytest.raises(mp.DataError, match="fewer than two clusters"):
            mp.gee("y ~ x", frame, groups="g", corr="independence", vcov=vcov)
    fit = mp.gee("y ~ x", frame, groups="g", corr="independence", vcov="model")
    assert fit.vcov()[1, 1] > 1e-3
    with pytest.raises(mp.DataError, match="fewer than two clusters"):
        fit.vcov("robust")
    with pytest.raises(mp.DataError, match="fewer than two clusters"):
        mp.glm("y ~ x", frame, family="gaussian", cluster="g")


def plain(blocks: int = 40, seed: int = 1) -> pl.DataFrame:
    """Four visits a subject; `u` is the subject's own."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(blocks), 4)
    frame = pl.DataFrame({"g": g, "t": np.tile(np.arange(4), blocks), "x": rng.normal(size=len(g)), "u": rng.normal(size=blocks)[g]})
    return frame.with_columns(y=1.0 + pl.col("x") + pl.col("u") + pl.Series(rng.normal(size=len(g))))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("corr", ["exchangeable", "ar1"])
def test_residuals_that_repeat_each_other_have_no_correlation_below_one(corr: str, sign: float) -> None:
    frame = plain().filter(pl.col("t") < 2).with_columns(y=pl.col("u") * pl.when(pl.col("t") == 0).then(1.0).otherwise(sign))
    with pytest.warns(mp.ConvergenceWarning, match="not positive definite"):
        fit = mp.gee("y ~ 1", frame, groups="g", corr=corr, time="t")
    assert not fit.converged


def test_a_correlation_close_to_one() -> None:
    u = np.random.default_rng(3).normal(size=(40, 4))
    for k in range(1, 4):
        u[:, k] = 0.999 * u[:, k - 1] + np.sqrt(1.0 - 0.999**2) * u[:, k]
    frame = plain().with_columns(y=pl.Series(u.ravel()))
    fit = mp.gee("y ~ x", frame, groups="g", corr="ar1", time="t")
    assert fit.converged and 0.999 < fit.alpha[0] < 1.0
    X = np.column_stack([np.ones(160), frame["x"]])
    ones = np.ones(160)
    want = Dense(X, frame["y"].to_numpy(), frame["g"].to_numpy(), frame["t"].to_numpy(), ones, 0 * ones, "gaussian", "identity", "ar1")
    want.fit(fit.beta)
    np.testing.assert_allclose(fit.beta, want.beta, rtol=1e-8)
    np.testing.assert_allclose(fit.vcov(), want.covariance("robust"), rtol=1e-6)


@pytest.mark.parametrize("corr", ["independence", "exchangeable", "ar1", "unstructured"])
def test_an_exact_fit_is_told(corr: str) -> None:
    with pytest.warns(mp.ConvergenceWarning, match="fitted exactly"):
        fit = mp.gee("y ~ x", plain().with_columns(y=1.0 + 2.0 * pl.col("x")), groups="g", corr=corr, time="t")
    assert not fit.converged and fit.evaluations < 20


@pytest.mark.thinned(3)
@pytest.mark.parametrize("corr", ["independence", "exchangeable", "ar1", "unstructured"])
@pytest.mark.parametrize("family", ["binomial", "poisson"])
@pytest.mark.parametrize("blocks", [40, 1000])
def test_a_level_without_events_is_named(family: str, corr: str, blocks: int) -> None:
    """A rare one too; the sandwich of such a coefficient is small and says nothing."""
    rng = np.random.default_rng(2)
    frame = plain(blocks).with_columns(f=pl.when(pl.col("g") < 8).then(pl.lit("none")).otherwise(pl.lit("a")))
    y = rng.poisson(np.exp(0.3 * frame["x"].to_numpy())) if family == "poisson" else rng.integers(0, 2, len(frame))
    frame = frame.with_columns(y=pl.when(pl.col("f") == "none").then(0).otherwise(pl.Series(y)))
    with pytest.warns(mp.SeparationWarning, match="fnone"):
        fit = mp.gee("y ~ x + f", frame, groups="g", corr=corr, time="t", family=family)
    assert fit.info["separation"] == ["fnone"] and "separation: fnone" in str(fit)


def test_correlations_that_no_pair_of_rows_speaks_of() -> None:
    frame = plain()
    for corr in ("exchangeable", "ar1", "unstructured"):
        fit = mp.gee("y ~ x", frame.with_columns(g=pl.int_range(pl.len())), groups="g", corr=corr, time="t")
        assert any("no block has two rows" in note for note in fit.info["notes"])
    some = frame.filter(~((pl.col("t") == 3) & (pl.col("g") % 2 == 0)) & ~((pl.col("t") == 0) & (pl.col("g") % 2 == 1)))
    fit = mp.gee("y ~ x", some, groups="g", corr="unstructured", time="t")
    assert "no block has rows at both of 1 pairs of times: their correlations are taken as 0" in fit.info["notes"]


@pytest.mark.parametrize("family", ["gaussian", "poisson", "gamma", "binomial"])
def test_the_scale_is_part_of_the_variance(family: str) -> None:
    frame = simulated(family)
    fit = mp.gee("y ~ x", frame, groups="g", family=family, link=LINK[family], **extra(family))
    assert fit.glance().to_pylist()[0]["sigma"] == (pytest.approx(math.sqrt(fit.scale)) if family in ("gaussian", "gamma") else None)
    assert [row["variance"] for row in fit.varcorr().to_pylist()] == ([pytest.approx(fit.scale)] if family in ("gaussian", "gamma") else [])
    table = pl.DataFrame(fit.marginal(frame))
    mu, size = table["mean"].to_numpy(), table["m"].to_numpy() if family == "binomial" else table["w"].to_numpy()
    unit = {"gaussian": mu**0 / size, "poisson": mu, "gamma": mu**2 / size, "binomial": mu * (1.0 - mu) / size}[family]
    np.testing.assert_allclose(table["variance"], fit.scale * unit, rtol=1e-10)
    pearson = fit.residuals().to_pylist()[1]
    assert pearson["sd"] == pytest.approx(1.0, abs=0.02)  # phi is their mean square


def test_what_has_no_likelihood_is_not_simulated() -> None:
    frame = simulated("poisson")
    for fit in (mp.gee("y ~ x", frame, groups="g", family="poisson"), mp.glm("y ~ x", frame, family="quasipoisson")):
        with pytest.raises(mp.ConfigError, match="no likelihood to simulate from"):
            fit.simulate(1, seed=1)
        row = fit.glance().to_pylist()[0]
        assert all(row[name] is None for name in ("loglik", "deviance", "aic", "bic"))
        assert str(fit.glance().schema.field("loglik").type) == "double"


@pytest.mark.parametrize("family", ["gaussian", "binomial"])
@pytest.mark.parametrize("corr", ["independence", "exchangeable", "ar1"])
def test_a_level_of_one_block_has_no_residual_of_its_own(family: str, corr: str) -> None:
    """There I - H is singular: what is left is the pseudo-inverse, as of the symmetric root."""
    rng = np.random.default_rng(1)
    frame = plain().with_columns(f=pl.when(pl.col("g") == 3).then(pl.lit("own")).otherwise(pl.lit("a")))
    frame = frame.with_columns(y=pl.Series(rng.integers(0, 2, len(frame)))) if family == "binomial" else frame
    fit = mp.gee("y ~ x + f", frame, groups="g", corr=corr, time="t", family=family)
    robust, kauermann, mancl = (np.sqrt(np.diag(fit.vcov(kind))) for kind in ("robust", "kauermann-carroll", "mancl-derouen"))
    assert (robust < kauermann).all() and (kauermann < mancl).all() and (mancl < 1.3 * robust).all()


def test_two_blocks_that_are_fitted_exactly() -> None:
    with pytest.warns(mp.ConvergenceWarning, match="fitted exactly"):
        assert not mp.gee("y ~ x", plain().filter((pl.col("t") == 0) & (pl.col("g") < 2)), groups="g").converged


@pytest.mark.parametrize("corr", ["independence", "exchangeable", "ar1", "unstructured"])
@pytest.mark.parametrize("noise", [1e-12, 1e-9])
def test_a_response_that_is_fitted_nearly_exactly(corr: str, noise: float) -> None:
    """Scores cannot be smaller than the rounding errors of residuals make them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    frame = pl.DataFrame({"x": x, "y": 1.3 + 2.7 * x + noise * rng.normal(size=60), "g": np.repeat(np.arange(12), 5)})
    frame = frame.with_columns(t=pl.int_range(60) % 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = mp.gee("y ~ x", frame, groups="g", corr=corr, time="t" if corr in ("ar1", "unstructured") else None)
    assert fit.converged and fit.beta == pytest.approx([1.3, 2.7], abs=1e-14 + noise)
    assert fit.scale == pytest.approx(noise**2, rel=0.5, abs=0.0)
    assert corr == "independence" or fit.alpha.any()


def test_residuals_that_are_zero() -> None:
    frame = pl.DataFrame({"x": [0.0, 1.0, 2.0, 4.0] * 3, "y": [1] * 12, "g": [0, 0, 1, 1] * 3})
    with pytest.warns(mp.ConvergenceWarning, match="fitted exactly"):
        fit = mp.gee("y ~ x", frame, groups="g", family="poisson")
    assert not fit.converged and fit.beta == pytest.approx([0.0, 0.0], abs=1e-14)
    assert fit.scale == 0.0 and not fit.vcov().any() and math.isnan(fit.qic()["qic"])
