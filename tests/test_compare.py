"""A random-intercept fit beside its alternatives, against whole matrices."""
from __future__ import annotations

import numpy as np
import polars as pl
import pytest

import mlpipe as mp

from . import dense_linear as dense


def simulated(seed: int = 4) -> pl.DataFrame:
    """Blocks of unequal size whose effects lean on a covariate's mean; `c` is constant within blocks."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(30), rng.integers(2, 12, 30))
    effect = rng.normal(size=30)
    x, z = rng.normal(size=len(g)) + 0.5 * effect[g] + 50.0, rng.normal(size=len(g))
    y = 0.5 * x + z + effect[g] + rng.normal(size=len(g))
    return pl.DataFrame({"y": y, "x": x, "z": z, "c": rng.normal(size=30)[g], "g": g, "w": rng.uniform(0.5, 2.0, len(g))})


FRAME = simulated()
Y, G = FRAME["y"].to_numpy(), FRAME["g"].to_numpy()
X = np.column_stack([np.ones(len(Y)), dense.columns(FRAME, "x", "z", "c")])


def of(table: pl.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    part = table.filter(pl.col("estimator") == name)
    return part["estimate"].to_numpy(), part["std_error"].to_numpy()


@pytest.mark.parametrize("weights", [None, "w"])
def test_estimators(weights: str | None) -> None:
    w = FRAME["w"].to_numpy() if weights else np.ones(len(Y))
    fit = mp.lmm("y ~ x + z + c + (1 | g)", FRAME, weights=weights)
    found = fit.compare()
    table = pl.from_arrow(found.estimates)
    n, m, p = len(Y), 30, 4

    def check(name: str, beta: np.ndarray, V: np.ndarray) -> None:
        b, se = of(table, name)
        np.testing.assert_allclose(b, beta, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(se, np.sqrt(np.diag(V)), rtol=1e-7)

    b = dense.coefficients(X, Y, w)
    check("pooled", b, dense.bread(X, w) * (w @ (Y - X @ b) ** 2) / (n - p))
    check("pooled, cluster-robust", b, dense.one_way(X, Y, w, G, "CR1", None))
    means = np.array([[np.average(v[G == g], weights=w[G == g]) for v in (*X.T, Y)] for g in range(m)])
    ones = np.ones(m)
    b = dense.coefficients(means[:, :p], means[:, p], ones)
    check("between", b, dense.bread(means[:, :p], ones) * ((means[:, p] - means[:, :p] @ b) ** 2).sum() / (m - p))
    D = dense.dummies(G)
    full = np.column_stack([D, X[:, 1:3]])
    b = dense.coefficients(full, Y, w)
    check("within", b[-2:], (dense.bread(full, w) * (w @ (Y - full @ b) ** 2) / (n - m - 2))[-2:, -2:])
    np.testing.assert_allclose(of(table, "random effects")[0], fit.beta)
    assert all(name in str(found) for name in ("Hausman", "Mundlak", "Neyman", "between", "read once more"))


@pytest.mark.parametrize("weights", [None, "w"])
def test_hausman_is_mundlak(weights: str | None) -> None:
    w = FRAME["w"].to_numpy() if weights else np.ones(len(Y))
    fit = mp.lmm("y ~ x + z + c + (1 | g)", FRAME, weights=weights)
    tests = {row["test"]: row for row in fit.compare().tests.to_pylist()}
    psi = float(fit.terms[0].factor[0, 0]) ** 2
    V = np.diag(1 / w) + psi * (G[:, None] == G[None])
    Xbar = np.column_stack([[np.average(v[G == g], weights=w[G == g]) for g in G] for v in X.T[1:3]])
    full = np.column_stack([X, Xbar])
    inner = np.linalg.inv(full.T @ np.linalg.solve(V, full))
    gamma = (inner @ full.T @ np.linalg.solve(V, Y))[4:]
    want = gamma @ np.linalg.solve(inner[4:, 4:] * fit.sigma**2, gamma)
    assert tests["Mundlak"]["statistic"] == pytest.approx(want, rel=1e-6)
    assert tests["Hausman"]["statistic"] == pytest.approx(want, rel=1e-5)
    assert tests["Hausman"]["df"] == tests["Mundlak"]["df"] == 2 and 0 <= tests["Hausman"]["p_value"] < 1


def test_from_statistics_and_after_loading(tmp_path: object) -> None:
    want = mp.lmm("y ~ x + (1 | g)", FRAME).compare()
    full = mp.lmm("y ~ x + (1 | g)", mp.suffstats("y ~ x + (1 | g)", FRAME, collect="blocks+xx")).compare()
    for column in ("estimate", "std_error"):
        np.testing.assert_allclose(full.estimates[column], want.estimates[column], rtol=1e-7)
    less = mp.lmm("y ~ x + (1 | g)", mp.suffstats("y ~ x + (1 | g)", FRAME)).compare()
    assert "pooled, cluster-robust" not in less.estimates["estimator"].to_pylist() and 'collect="blocks+xx"' in str(less)
    fit = mp.lmm("y ~ x + (1 | g)", FRAME)
    fit.held = None
    again = fit.compare()
    np.testing.assert_allclose(again.estimates["estimate"], want.estimates["estimate"], rtol=1e-9)
    assert "read again" in str(again)


def test_other_models_are_refused() -> None:
    with pytest.raises(mp.ConfigError, match="one random intercept"):
        mp.lmm("y ~ x + (1 + z | g)", FRAME).compare()


def test_balanced_covariates_leave_nothing_to_test() -> None:
    found = mp.lmm("reaction ~ days + (1 | subject)", mp.datasets.path("sleepstudy")).compare()
    assert [(row["statistic"], row["df"], row["p_value"]) for row in found.tests.to_pylist()] == [(0.0, 0.0, 1.0)] * 2


@pytest.mark.parametrize("weights", [None, "w"])
def test_hausman_without_an_intercept(weights: str | None) -> None:
    """The levels of a factor are means there, and differences within blocks: what is compared are the differences."""
    rng = np.random.default_rng(3)
    frame = simulated().with_columns(f=pl.Series(rng.choice(["p", "q", "r"], len(simulated()))))
    found = [pl.DataFrame(mp.lmm(f"y ~ {one} + f + x + (1 | g)", frame, weights=weights).compare().tests) for one in ("0", "1")]
    np.testing.assert_allclose(found[0]["statistic"], found[1]["statistic"], rtol=1e-5)
    assert found[0]["statistic"][0] == pytest.approx(found[0]["statistic"][1], rel=1e-6)
    assert found[0]["df"].to_list() == found[1]["df"].to_list()
    notes = mp.lmm("y ~ 0 + f + x + (1 | g)", frame).compare().notes
    assert any("leaves out fr" in note for note in notes)
