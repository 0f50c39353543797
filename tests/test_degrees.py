"""Degrees of freedom against dense matrices and differences, and what users see of them."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.linalg as la

import mlpipe as mp
from mlpipe.solve import degrees
from mlpipe.solve.crossed import Exact
from mlpipe.solve.lmm import information, solve

from .dense import simulate
from .dense_several import DenseSeveral, Grouping

SLEEP = Path(__file__).parent / "reference" / "data" / "sleepstudy.parquet"


def dense_satterthwaite(deviance: Any, covariance: Any, at: np.ndarray, L: np.ndarray) -> np.ndarray:
    """2 v² / Var(v) from differences of functions of x = (θ, log σ): −2ℓ and the covariance of β."""
    h, d = 2e-3, len(at)
    unit = np.eye(d) * h
    H = np.empty((d, d))
    for i in range(d):
        for j in range(d):
            f = [deviance(at + s * unit[i] + t * unit[j]) for s, t in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
            H[i, j] = (f[0] - f[1] - f[2] + f[3]) / (4 * h * h)
    A = 2 * np.linalg.inv(H)
    v = np.einsum("ir,rs,is->i", L, covariance(at), L)
    g = [(np.einsum("ir,rs,is->i", L, covariance(at + e) - covariance(at - e), L)) / (2 * h) for e in unit]
    return 2 * v**2 / np.einsum("id,de,ie->i", np.array(g).T, A, np.array(g).T)


def dense_kenward_roger(X: np.ndarray, G: list[np.ndarray], V: np.ndarray, L: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Kenward and Roger (1997) written out: adjusted covariance, df of each row of L, (df, scale) of all rows together."""
    Vi = la.inv(V)
    Phi = la.inv(X.T @ Vi @ X)
    P = [-X.T @ Vi @ g @ Vi @ X for g in G]
    Q = [[X.T @ Vi @ g @ Vi @ h @ Vi @ X for h in G] for g in G]
    proj = Vi - Vi @ X @ Phi @ X.T @ Vi
    W = 2 * la.inv(np.array([[np.trace(proj @ g @ proj @ h) for h in G] for g in G]))
    U = sum(W[i, j] * (Q[i][j] - P[i] @ Phi @ P[j]) for i in range(len(G)) for j in range(len(G)))

    def test(rows: np.ndarray) -> tuple[float, float]:
        T = rows.T @ la.inv(rows @ Phi @ rows.T) @ rows
        k = len(rows)
        A1 = sum(W[i, j] * np.trace(T @ Phi @ P[i] @ Phi) * np.trace(T @ Phi @ P[j] @ Phi) for i in range(len(G)) for j in range(len(G)))
        A2 = sum(W[i, j] * np.trace(T @ Phi @ P[i] @ Phi @ T @ Phi @ P[j] @ Phi) for i in range(len(G)) for j in range(len(G)))
        B = (A1 + 6 * A2) / (2 * k)
        g = ((k + 1) * A1 - (k + 4) * A2) / ((k + 2) * A2)
        c1, c2, c3 = g / (3 * k + 2 * (1 - g)), (k - g) / (3 * k + 2 * (1 - g)), (k + 2 - g) / (3 * k + 2 * (1 - g))
        E = 1 / (1 - A2 / k)
        var = 2 / k * (1 + c1 * B) / ((1 - c2 * B) ** 2 * (1 - c3 * B))
        rho = var / (2 * E**2)
        m = 4 + (k + 2) / (k * rho - 1)
        return m, m / (E * (m - 2))

    m, scale = test(L)
    return Phi + 2 * Phi @ U @ Phi, np.array([test(row[None])[0] for row in L]), m, scale


ONE = [((1,), True, False), ((2,), True, True), ((2,), False, False), ((1, 1), True, False)]


@pytest.mark.parametrize(("sizes", "reml", "weights"), ONE)
def test_one_factor_against_dense(sizes: tuple[int, ...], reml: bool, weights: bool) -> None:
    theta = np.array([1.0, 0.3, 0.8]) if sizes == (2,) else 0.9
    model = simulate(7, blocks=14, rows=(3, 9), p=3, sizes=sizes, reml=reml, weights=weights, theta=theta)
    problem = model.problem()
    solution = solve(problem)
    free, L = problem.free(), np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, -1.0]])
    at = degrees.of_blocks(problem, solution.lambda_, solution.sigma2, second=True)
    got = degrees.satterthwaite(at, solution.lambda_, free, information(problem, solution).vcov, L)

    def deviance(x: np.ndarray) -> float:
        lam = model.lambda_(x[:-1])
        return model.deviance(lam @ lam.T, np.exp(2 * x[-1]))

    def covariance(x: np.ndarray) -> np.ndarray:
        lam = model.lambda_(x[:-1])
        return np.exp(2 * x[-1]) * la.inv(model.gls(lam @ lam.T)[2])

    want = dense_satterthwaite(deviance, covariance, np.append(solution.theta, np.log(solution.sigma2) / 2), L)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    same = model.block[:, None] == model.block
    G = [np.diag(1.0 / model.w)]
    for i, j in zip(*free, strict=True):
        a = np.zeros((problem.q, problem.q))
        a[i, j] = a[j, i] = 1.0
        G.append(np.where(same, model.Z @ a @ model.Z.T, 0.0))
    psi = solution.lambda_ @ solution.lambda_.T
    check_kenward_roger(degrees.kenward_roger(at, free), dense_kenward_roger(model.X, G, solution.sigma2 * model.V(psi), L[:2]), L[:2])


def check_kenward_roger(got: degrees.KenwardRoger, want: tuple[np.ndarray, np.ndarray, float, float], L: np.ndarray) -> None:
    np.testing.assert_allclose(got.adjusted, want[0], rtol=1e-7, atol=1e-10 * np.abs(want[0]).max())
    np.testing.assert_allclose([got.test(row[None])[0] for row in L], want[1], rtol=1e-6)
    np.testing.assert_allclose(got.test(L), want[2:], rtol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_several_factors_against_dense(nested: bool) -> None:
    rng = np.random.default_rng(3)
    n = 120
    first = rng.integers(0, 12, n)
    second = first // 3 if nested else rng.integers(0, 5, n)
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    model = DenseSeveral(X, np.zeros(n), rng.uniform(0.5, 2.0, n), [Grouping(first, X, (2,)), Grouping(second, X[:, :1], (1,))], True)
    problem = model.problem()
    lambda_ = np.array([[0.9, 0.0, 0.0], [0.2, 0.5, 0.0], [0.0, 0.0, 0.7]])
    s2, entries = 1.7, problem.entries
    free = tuple(np.array(entries).T)
    L = np.array([[1.0, 0.0], [0.3, 1.0]])
    model.y[:] = rng.normal(size=n)
    exact = Exact(model.problem())
    at = degrees.of_levels(exact, lambda_, s2, second=True)
    A = np.diag(rng.uniform(0.1, 0.5, len(entries) + 1))
    got = degrees.satterthwaite(at, lambda_, free, A, L)  # the covariance of θ is tested elsewhere

    def covariance(x: np.ndarray) -> np.ndarray:
        lam = np.zeros((3, 3))
        lam[free] = x[:-1]
        return np.exp(2 * x[-1]) * la.inv(model.gls(lam)[2])

    x, h = np.append(lambda_[free], np.log(s2) / 2), 1e-5
    v = np.einsum("ir,rs,is->i", L, covariance(x), L)
    g = np.array([np.einsum("ir,rs,is->i", L, covariance(x + e) - covariance(x - e), L) / (2 * h) for e in np.eye(len(x)) * h]).T
    np.testing.assert_allclose(got, 2 * v**2 / np.einsum("id,de,ie->i", g, A, g), rtol=1e-6)
    G = [np.diag(1.0 / model.w)]
    for i, j in entries:
        a = np.zeros((3, 3))
        a[i, j] = a[j, i] = 1.0
        Z = model.Z
        parts = [np.kron(np.eye(f.levels), a[s, s]) for f, s in zip(model.factors, (slice(0, 2), slice(2, 3)), strict=True)]
        G.append(Z @ la.block_diag(*parts) @ Z.T)
    check_kenward_roger(degrees.kenward_roger(at, free), dense_kenward_roger(X, G, s2 * model.V(lambda_), L), L)


def test_joint_degrees_of_freedom_are_fai_and_cornelius() -> None:
    assert degrees.joint(np.array([12.0, 12.0])) == 12.0
    assert degrees.joint(np.array([1.5, 30.0])) == 2.0
    nu = np.array([8.0, 20.0])
    expected = (nu / (nu - 2)).sum()
    assert degrees.joint(nu) == pytest.approx(2 * expected / (expected - 2))


def fixed(fit: mp.LMMFit, ddf: str) -> list[dict[str, Any]]:
    return [row for row in fit.tidy(ddf=ddf).to_pylist() if row["effect"] == "fixed"]


def test_tidy_has_t_tests_and_intervals() -> None:
    fit = mp.lmm("Reaction ~ Days + (Days | Subject)", SLEEP)
    for ddf in ("satterthwaite", "kenward-roger"):
        days = fixed(fit, ddf)[1]
        assert days["df"] == pytest.approx(17.0, rel=1e-6)
        assert days["p_value"] == pytest.approx(3.26378807e-06, rel=1e-5)
        assert days["conf_high"] - days["estimate"] == pytest.approx(2.109815578 * days["std_error"], rel=1e-6)
    assert fixed(fit, "wald")[1]["df"] is None


def test_what_has_no_such_degrees_of_freedom_is_refused() -> None:
    fit = mp.lmm("Reaction ~ Days + (1 | Subject)", SLEEP, reml=False)
    with pytest.raises(mp.ConfigError, match="restricted") as error:
        fit.tidy(ddf="kenward-roger")
    assert error.value.code == "ddf"
    with pytest.raises(mp.ConfigError, match="not one of") as error:
        fit.tidy(ddf="satterthwait")
    assert "satterthwaite" in str(error.value.hint)
    glm = mp.glm("days ~ 1", pl.DataFrame({"days": [1, 2, 3, 0, 2]}), family="poisson")
    with pytest.raises(mp.ConfigError, match="linear mixed"):
        glm.tidy(ddf="satterthwaite")


def test_robust_covariances_have_no_such_degrees_of_freedom() -> None:
    fit = mp.lmm("reaction ~ days + (1 | subject)", mp.datasets.path("sleepstudy"), cluster="subject")
    for ddf in ("satterthwaite", "kenward-roger"):
        for ask in (fit.tidy, lambda ddf: fit.test("days = 0", ddf=ddf)):
            with pytest.raises(mp.ConfigError, match="cluster-robust"):
                ask(ddf=ddf)
    assert fit.test("days = 0")["df_denominator"][0].as_py() is None


def test_large_crossed_factors_are_refused_with_what_is_lost() -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"y": rng.normal(size=4000), "a": rng.integers(0, 900, 4000), "b": rng.integers(0, 800, 4000)})
    fit = mp.lmm("y ~ 1 + (1 | a) + (1 | b)", frame, options=mp.Options(memory_limit="400MB"))
    fit.options = mp.Options(memory_limit="100MB")
    with pytest.raises(mp.ResourceError, match=r"1,6\d\d random effects") as error:
        fit.tidy(ddf="kenward-roger")
    assert "z differ by about 0.00" in str(error.value.hint)


def test_statistics_that_are_gone_are_collected_once_more(tmp_path: Path) -> None:
    fit = mp.lmm("Reaction ~ Days + (Days | Subject)", SLEEP)
    want, passes = fixed(fit, "satterthwaite"), fit.info["passes"]
    fit.held = None
    assert fixed(fit, "satterthwaite")[1]["df"] == pytest.approx(want[1]["df"], rel=1e-6)
    assert fit.info["passes"] > passes and "read once more" in fit.info["notes"][-1]
    fit.write(tmp_path / "fit")
    with pytest.raises(mp.DataError, match="neither its statistics nor its data") as error:
        mp.load(tmp_path / "fit").tidy(ddf="satterthwaite")
    assert 'collect="blocks"' in str(error.value.hint)


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    frame = pl.read_parquet(SLEEP)
    frame.write_parquet(tmp_path / "data.parquet")
    fit = mp.lmm("Reaction ~ Days + (1 | Subject)", tmp_path / "data.parquet")
    fit.held = None
    frame.head(150).write_parquet(tmp_path / "data.parquet")
    with pytest.raises(mp.DataError, match="changed"):
        fit.tidy(ddf="satterthwaite")


def test_saved_statistics_and_a_residual_pass_answer_too(tmp_path: Path) -> None:
    stats = mp.suffstats("Reaction ~ Days + (Days | Subject)", SLEEP, collect="blocks")
    stats.save(tmp_path / "stats.arrow")
    fit = mp.lmm("Reaction ~ Days + (Days | Subject)", mp.SuffStats.load(tmp_path / "stats.arrow"))
    assert fixed(fit, "kenward-roger")[0]["df"] == pytest.approx(17.0, rel=1e-6)
    frame = pl.read_parquet(SLEEP).with_columns(shifted=pl.col("Reaction") + 1e5 * pl.col("Days"))
    far = mp.lmm("shifted ~ Days + (Days | Subject)", frame)
    assert any("residuals were summed" in note for note in far.info["notes"])
    assert fixed(far, "satterthwaite")[1]["df"] == pytest.approx(17.0, rel=1e-5)
