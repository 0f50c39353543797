"""Marginal means, variances and within-block covariances against the dense model and brute-force integration."""
from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

import mlpipe as mp
from mlpipe import datasets

from .dense_glmm import MEANS, variance
from .test_glmm import arguments, simulated

SLEEP = datasets.path("sleepstudy")
LINE = np.linspace(-8.0, 8.0, 161)


def test_a_linear_model_has_v() -> None:
    frame = pl.read_parquet(SLEEP).with_columns(w=1.0 + pl.int_range(pl.len()) % 3)
    fit = mp.lmm("reaction ~ days + (1 + days | subject)", frame, weights="w")
    rows = frame.filter(pl.col.subject == "309")
    Z, psi = np.column_stack([np.ones(10), rows["days"]]), fit.sigma**2 * fit.terms[0].factor @ fit.terms[0].factor.T
    V = Z @ psi @ Z.T + np.diag(fit.sigma**2 / rows["w"].to_numpy())
    table = pl.DataFrame(fit.marginal(frame, block="309"))
    np.testing.assert_allclose(table["covariance"].to_numpy().reshape(10, 10), V)
    sd = np.sqrt(np.diag(V))
    np.testing.assert_allclose(table["correlation"].to_numpy().reshape(10, 10), V / np.outer(sd, sd))
    assert table["row1"].to_list() == np.repeat(np.arange(1, 11), 10).tolist()
    streamed = pl.DataFrame(fit.marginal(frame)).filter(pl.col.subject == "309")
    np.testing.assert_allclose(streamed["variance"], np.diag(V))
    np.testing.assert_allclose(streamed["mean"], Z @ fit.beta)
    assert streamed.columns == [*frame.columns, "mean", "variance"]


def test_crossed_factors_share_what_they_share() -> None:
    path = datasets.path("penicillin")
    fit, frame = mp.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", path), pl.read_parquet(path)
    psi = {row["group"]: row["variance"] for row in fit.varcorr().to_pylist()}
    for column in ("plate", "sample"):
        level = frame[column][7]
        rows = frame.filter(pl.col(column) == level)
        same = {name: rows[name].to_numpy()[:, None] == rows[name].to_numpy() for name in ("plate", "sample")}
        V = psi["plate"] * same["plate"] + psi["sample"] * same["sample"] + psi["Residual"] * np.eye(len(rows))
        got = pl.DataFrame(fit.marginal(path, block={column: level}))
        np.testing.assert_allclose(got["covariance"].to_numpy().reshape(V.shape), V)
    with pytest.raises(mp.ConfigError, match="does not say"):
        fit.marginal(path, block="a")


CASES = [
    ("binomial", "logit"), ("binomial", "probit"), ("binomial", "cloglog"), ("poisson", "log"), ("negbinomial", "log"), ("gamma", "log"),
    ("negbinomial1", "sqrt"), ("gaussian", "identity"), ("beta", "logit"), ("inverse_gaussian", "log"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "link"), CASES)
def test_moments_by_brute_force(family: str, link: str) -> None:
    q = 1 if link == "sqrt" else 2
    frame = simulated(family, link, q=q)
    random = "x" if q == 2 else "1"
    fit = mp.glmm(f"p ~ x + ({random} | g)", frame, family=family, link=link, offset="o", **arguments(family))
    rows = frame.filter(pl.col.g == 3).head(6)
    if q == 2:
        u = np.stack([v.ravel() for v in np.meshgrid(LINE, LINE)])
        Z = np.column_stack([np.ones(6), rows["x"]])
    else:
        u, Z = LINE[None], np.ones((6, 1))
    w = np.exp(-0.5 * (u**2).sum(axis=0))
    w /= w.sum()
    eta = (fit.beta[0] + fit.beta[1] * rows["x"].to_numpy() + rows["o"].to_numpy())[:, None] + Z @ fit.terms[0].factor @ u
    mu = MEANS[link](eta)
    mean = mu @ w
    size = (rows["m"] if family == "binomial" else rows["v"]).to_numpy()
    within = variance(family, mu, size[:, None], fit.tau) @ w / (size if family == "binomial" else 1.0)
    V = (mu * w) @ mu.T - np.outer(mean, mean) + np.diag(within)
    got = pl.DataFrame(fit.marginal(frame, block=3)).filter((pl.col.row1 <= 6) & (pl.col.row2 <= 6))
    scale = np.sqrt(np.outer(np.diag(V), np.diag(V)))
    np.testing.assert_allclose(got["covariance"].to_numpy().reshape(6, 6) / scale, V / scale, atol=1e-6)
    np.testing.assert_allclose(got["mean1"].to_numpy().reshape(6, 6)[:, 0], mean, rtol=1e-7)
    streamed = pl.DataFrame(fit.marginal(frame, prefix="m_")).filter(pl.col.g == 3).head(6)
    np.testing.assert_allclose(streamed["m_variance"], np.diag(V), rtol=1e-6)
    np.testing.assert_allclose(streamed["m_mean"], mean, rtol=1e-7)


@pytest.fixture(scope="module")
def poisson() -> tuple[Any, pl.DataFrame]:
    frame = simulated("poisson", "log")
    return mp.glmm("p ~ x + (1 | g)", frame, family="poisson"), frame


def test_plain_models_have_variances_too() -> None:
    frame = simulated("poisson", "log")
    fit = mp.glm("p ~ x", frame, family="poisson")
    got = pl.DataFrame(fit.marginal(frame))
    np.testing.assert_allclose(got["mean"], got["variance"])
    with pytest.raises(mp.ConfigError, match="no random effects"):
        fit.marginal(frame, block=3)


def test_blocks_that_cannot_be(poisson: tuple[Any, pl.DataFrame]) -> None:
    fit, frame = poisson
    with pytest.raises(mp.DataError, match="no rows of the block"):
        fit.marginal(frame, block=99)
    for block, message in ((("a", 1), "does not say"), ({"h": 1}, "no grouping column"), ({}, "no grouping column")):
        with pytest.raises(mp.ConfigError, match=message):
            fit.marginal(frame, block=block)
    long = pl.concat([frame] * 100)
    with pytest.raises(mp.DataError, match="1,000 rows"):
        fit.marginal(long, block=3)
    with pytest.raises(mp.DataError, match="already has a column"):
        fit.marginal(frame.with_columns(mean=1.0))
    assert len(fit.marginal(frame.drop("p"), block=3)) == 144  # the response is not needed
    missing = pl.DataFrame(fit.marginal(frame.with_columns(x=pl.when(pl.col.g == 3).then(None).otherwise(pl.col.x))))
    assert missing.filter(pl.col.g == 3)["variance"].null_count() == 12


@pytest.mark.parametrize("kind", ["lazy", "duckdb", "table", "csv"])
def test_blocks_of_any_source(poisson: tuple[Any, pl.DataFrame], kind: str, tmp_path: Any) -> None:
    from .conftest import as_data

    fit, frame = poisson
    want = pl.DataFrame(fit.marginal(frame, block=3))
    got = pl.DataFrame(fit.marginal(as_data(frame, kind, tmp_path), block={"g": 3}))
    np.testing.assert_allclose(got.sort("covariance")["covariance"], want.sort("covariance")["covariance"], rtol=1e-9)
