"""Cluster-robust errors of mixed models against whole covariance matrices."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import mlpipe as mp

from . import dense_linear as dense
from .conftest import as_data


def simulated(seed: int = 3) -> pl.DataFrame:
    """Pupils in classes in schools, errors whose spread differs between classes."""
    rng = np.random.default_rng(seed)
    n, school = 360, np.repeat(np.arange(9), 40)
    klass = school * 4 + rng.integers(0, 4, n)
    x = rng.normal(size=n)
    effects = 1.5 * rng.normal(size=9)[school] + rng.normal(size=36)[klass] + 0.4 * x * rng.normal(size=36)[klass]
    y = 1.0 + 0.5 * x + effects + rng.normal(size=n) * (1 + klass % 3)
    return pl.DataFrame({"y": y, "x": x, "klass": klass, "school": school, "w": rng.uniform(0.5, 2.0, n), "t": rng.integers(0, 4, n)})


FRAME = simulated()


def whitened(fit: mp.LMMFit, Z: list[np.ndarray], w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """V^(-1/2) X and V^(-1/2) y, V in units of sigma²."""
    V = np.diag(1.0 / w)
    for term, z in zip(fit.terms, Z, strict=True):
        code = np.unique(FRAME[term.group].to_numpy(), return_inverse=True)[1]
        same = code[:, None] == code[None]
        V += same * (z @ term.factor @ term.factor.T @ z.T)
    X = np.column_stack([np.ones(len(FRAME)), FRAME["x"]])
    L = np.linalg.cholesky(V)
    return np.linalg.solve(L, X), np.linalg.solve(L, FRAME["y"].to_numpy())


@pytest.mark.parametrize("kind", ["CR0", "CR1", "CR2"])
@pytest.mark.parametrize("cluster", ["klass", "school"])
@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("weights", [None, "w"])
def test_one_factor(kind: str, cluster: str, slopes: bool, weights: str | None) -> None:
    formula = "y ~ x + (1 + x | klass)" if slopes else "y ~ x + (1 | klass)"
    fit = mp.lmm(formula, FRAME, weights=weights, cluster=cluster, vcov=kind)
    z = np.column_stack([np.ones(len(FRAME)), FRAME["x"]])[:, : 2 if slopes else 1]
    w = FRAME["w"].to_numpy() if weights else np.ones(len(FRAME))
    X, y = whitened(fit, [z], w)
    want = whitened_by_cluster(fit, z, w, cluster) if kind == "CR2" else None
    V = want if want is not None else dense.one_way(X, y, np.ones(len(y)), FRAME[cluster].to_numpy(), kind, None)
    np.testing.assert_allclose(fit.vcov(), V, rtol=1e-6)
    assert fit.info["robust"]["clusters"] == FRAME[cluster].n_unique() and f"({kind})" in str(fit)
    assert fit.loglik == pytest.approx(mp.lmm(formula, FRAME, weights=weights).loglik, rel=1e-10)


def whitened_by_cluster(fit: mp.LMMFit, z: np.ndarray, w: np.ndarray, cluster: str) -> np.ndarray:
    """CR2 with the symmetric root of each cluster's V (any root gives the same)."""
    X, y = np.column_stack([np.ones(len(FRAME)), FRAME["x"]]), FRAME["y"].to_numpy()
    klass, code = FRAME["klass"].to_numpy(), FRAME[cluster].to_numpy()
    Xs, ys = X.copy(), y.copy()
    for g in np.unique(code):
        rows = code == g
        same = klass[rows][:, None] == klass[rows][None]
        V = np.diag(1.0 / w[rows]) + same * (z[rows] @ fit.terms[0].factor @ fit.terms[0].factor.T @ z[rows].T)
        root = dense.inverse_root(V)
        Xs[rows], ys[rows] = root @ X[rows], root @ y[rows]
    return dense.one_way(Xs, ys, np.ones(len(y)), code, "CR2", None)


@pytest.mark.parametrize("kind", ["CR0", "CR1"])
def test_nested_factors(kind: str) -> None:
    fit = mp.lmm("y ~ x + (1 | school) + (1 | klass)", FRAME, cluster="school", vcov=kind)
    ones = np.ones((len(FRAME), 1))
    X, y = whitened(fit, [ones, ones], np.ones(len(FRAME)))
    np.testing.assert_allclose(fit.vcov(), dense.one_way(X, y, np.ones(len(y)), FRAME["school"].to_numpy(), kind, None), rtol=1e-6)


@pytest.mark.parametrize("engine", ["lazy", "duckdb", "path", "reader"])
def test_engines_agree(engine: str, tmp_path: Path) -> None:
    want = mp.lmm("y ~ x + (1 | klass)", FRAME, cluster="school", vcov="CR2")
    fit = mp.lmm("y ~ x + (1 | klass)", as_data(FRAME, engine, tmp_path), cluster="school", vcov="CR2")
    np.testing.assert_allclose(fit.vcov(), want.vcov(), rtol=1e-8)


def test_what_is_refused() -> None:
    with pytest.raises(mp.DataError, match="several clusters"):
        mp.lmm("y ~ x + (1 | klass)", FRAME, cluster="t")
    with pytest.raises(mp.DataError, match="several clusters"):
        mp.lmm("y ~ x + (1 | klass) + (1 | t)", FRAME, cluster="school")
    with pytest.raises(mp.ConfigError, match="one cluster"):
        mp.lmm("y ~ x + (1 | klass)", FRAME, cluster=["school", "klass"])
    with pytest.raises(mp.ConfigError, match="cluster="):
        mp.lmm("y ~ x + (1 | klass)", FRAME, vcov="CR1")
    with pytest.raises(mp.ConfigError, match="grouping factor"):
        mp.glmm("y ~ x + (1 | klass)", FRAME, family="gaussian", cluster="school")


@pytest.mark.parametrize(
    ("function", "formula", "arguments"),
    [
        ("lmm", "y ~ x + (1 | klass)", {"vcov": "CR1"}), ("lmm", "y ~ x + (1 | klass)", {"cluster": ["school", "klass"]}),
        ("lmm", "y ~ x + (1 | klass)", {"cluster": "scholl"}), ("lmm", "y ~ x + (1 | klass)", {"cluster": "school", "vcov": "HC1"}),
        ("glmm", "y ~ x + (1 | klass)", {"family": "gaussian", "cluster": "school"}),
        ("glmm", "y ~ x + (1 | klass)", {"family": "gaussian", "cluster": "klass", "vcov": "CR2"}),
        ("glm", "y ~ x", {"family": "gaussian", "vcov": "CR1"}), ("glm", "y ~ x", {"family": "gaussian", "vcov": "HC9"}),
    ],
)
def test_a_plan_refuses_what_the_fit_would(function: str, formula: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(mp.MlpipeError) as caught:
        getattr(mp, function)(formula, FRAME, **arguments)
    with pytest.raises(type(caught.value)) as planned:
        mp.plan(function, formula, FRAME, **arguments)
    assert str(planned.value) == str(caught.value)


def test_a_plan_tells_the_scan_of_robust_errors() -> None:
    assert "CR2 errors read the rows once more" in str(mp.plan("lmm", "y ~ x + (1 | klass)", FRAME, cluster="school", vcov="CR2"))


@pytest.mark.parametrize("kind", ["CR0", "CR1", "CR2"])
@pytest.mark.parametrize(("formula", "collect"), [("y ~ x + (1 | klass)", "blocks+xx"), ("y ~ x + (1 + x | klass)", "blocks")])
def test_from_statistics(kind: str, formula: str, collect: str, tmp_path: Path) -> None:
    stats = mp.suffstats(formula, FRAME[:200], weights="w", collect=collect).update(FRAME[200:])
    stats.save(tmp_path / "stats.arrow")
    want = mp.lmm(formula, FRAME, weights="w", cluster="klass", vcov=kind)
    fit = mp.lmm(formula, mp.SuffStats.load(tmp_path / "stats.arrow"), cluster="klass", vcov=kind)
    np.testing.assert_allclose(fit.vcov(), want.vcov(), rtol=1e-5)
    assert fit.info["robust"] == want.info["robust"]


def test_statistics_over_a_combination_cluster_by_one_of_its_columns() -> None:
    formula = "y ~ x + (1 | school:klass)"
    fit = mp.lmm(formula, mp.suffstats(formula, FRAME, collect="blocks+xx"), cluster="school", vcov="CR2")
    np.testing.assert_allclose(fit.vcov(), mp.lmm(formula, FRAME, cluster="school", vcov="CR2").vcov(), rtol=1e-6)


@pytest.mark.parametrize(
    ("formula", "collect", "cluster", "message"),
    [
        ("y ~ x + (1 | klass)", "blocks", "klass", "no cross-products"),
        ("y ~ x + (1 | klass)", "blocks+xx", "school", "over klass and do not tell the clusters of school"),
        ("y ~ x + (1 | school) + (1 | klass)", "blocks", "school", "over school, klass"),
    ],
)
def test_statistics_that_do_not_tell(formula: str, collect: str, cluster: str, message: str) -> None:
    with pytest.raises(mp.DataError, match=message) as caught:
        mp.lmm(formula, mp.suffstats(formula, FRAME, collect=collect), cluster=cluster)
    assert "blocks+xx" in str(caught.value.hint)


def test_a_gaussian_glmm_has_nearly_the_linear_models_errors() -> None:
    """The linear model takes theta as known; with all parameters in the sandwich the coefficients' block hardly changes."""
    linear = mp.lmm("y ~ x + (1 | klass)", FRAME, reml=False, cluster="klass", vcov="CR0")
    general = mp.glmm("y ~ x + (1 | klass)", FRAME, family="gaussian", cluster="klass", vcov="CR0")
    np.testing.assert_allclose(np.sqrt(np.diag(general.vcov())), np.sqrt(np.diag(linear.vcov())), rtol=0.03)
    factor = 36 / 35 * 359 / 358
    corrected = mp.glmm("y ~ x + (1 | klass)", FRAME, family="gaussian", cluster="klass")
    np.testing.assert_allclose(corrected.vcov(), factor * general.vcov(), rtol=1e-4)


def test_questions_beside_clusters_of_text() -> None:
    frame = FRAME.with_columns(school=pl.format("school {}", pl.col("school")))
    for formula in ("y ~ x + (1 | klass)", "y ~ x + (1 | school / klass)"):
        fit = mp.lmm(formula, frame, cluster="school")
        plain = mp.lmm(formula, frame)
        assert fit.effects().num_rows == plain.effects().num_rows
        found, want = (pl.DataFrame(one.residuals()).drop("residual").to_numpy() for one in (fit, plain))
        np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)
        group = None if "/" not in formula else "school"
        assert fit.influence(group=group).column("cooks_distance") is not None


def test_the_influence_of_blocks_within_clusters() -> None:
    fit, plain = (mp.lmm("y ~ x + (1 | klass)", FRAME, cluster=cluster) for cluster in ("school", None))
    np.testing.assert_allclose(fit.influence()["leverage"], plain.influence()["leverage"], rtol=1e-8)


@pytest.mark.parametrize("kind", ["CR0", "CR1", "CR2"])
@pytest.mark.parametrize("formula", ["y ~ x + (1 | klass)", "y ~ x + (1 | school / klass)"])
def test_covariates_far_from_zero(kind: str, formula: str) -> None:
    """Seconds since 1970: the intercept's variance has none of the digits that the slope's needs."""
    if "/" in formula and kind == "CR2":
        return
    frame = FRAME.with_columns(x=(pl.col("x") * 2**20).round() / 2**20)
    near, far = (mp.lmm(formula, data, cluster="school", vcov=kind) for data in (frame, frame.with_columns(x=pl.col("x") + 1.75 * 2**30)))
    np.testing.assert_allclose(far.vcov()[1, 1], near.vcov()[1, 1], rtol=1e-6)
