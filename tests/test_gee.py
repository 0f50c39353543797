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


@pytest.mark.parametrize("corr", ["independence", "exchangeable", "ar1", "unstructured"])
@pytest.mark.parametrize("noise", [0.0, 1e-12, 1e-9])
def test_a_response_that_is_fitted_exactly_or_nearly(corr: str, noise: float) -> None:
    """Scores cannot be smaller than the rounding errors of residuals make them; nor do these tell a correlation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    frame = pl.DataFrame({"x": x, "y": 1.3 + 2.7 * x + noise * rng.normal(size=60), "g": np.repeat(np.arange(12), 5)})
    frame = frame.with_columns(t=pl.int_range(60) % 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = mp.gee("y ~ x", frame, groups="g", corr=corr, time="t" if corr in ("ar1", "unstructured") else None)
    assert fit.converged and fit.beta == pytest.approx([1.3, 2.7], abs=1e-14 + noise)
    assert fit.scale == pytest.approx(noise**2, rel=0.5, abs=1e-30)
    if noise:
        assert corr == "independence" or fit.alpha.any()
    else:
        assert fit.message == "the response is fitted exactly" and not fit.alpha.any()


def test_residuals_that_are_zero() -> None:
    frame = pl.DataFrame({"x": [0.0, 1.0, 2.0, 4.0] * 3, "y": [1] * 12, "g": [0, 0, 1, 1] * 3})
    fit = mp.gee("y ~ x", frame, groups="g", family="poisson")
    assert fit.converged and fit.scale == 0.0 and not fit.vcov().any() and math.isnan(fit.qic()["qic"])
