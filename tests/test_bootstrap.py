"""Statistics that are simulated against rows that are, and the bootstrap that is made of them."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import mlpipe as mp
from mlpipe.again import again
from mlpipe.bootstrap import _Redrawn, _responses
from mlpipe.solve.blocks import Array, BlockChunk, pseudo_blocks
from mlpipe.solve.crossed import CrossedProblem
from mlpipe.solve.density import density
from mlpipe.solve.draws import responses
from mlpipe.solve.likelihood import LMMProblem, evaluate
from mlpipe.solve.simulate import BlockSimulator, LevelSimulator

from .dense import Dense, simulate
from .dense_several import DenseSeveral, Grouping

SLEEP = Path(__file__).parent / "reference" / "data" / "sleepstudy.parquet"
DRAWS = 400


def agree(drawn: Callable[[np.random.Generator], Array], rows: Callable[[np.random.Generator], Array]) -> None:
    """Means and second moments of two samplers, entry by entry, within five of their standard errors."""
    rng = np.random.default_rng(11)
    a, b = (np.array([sample(rng) for _ in range(DRAWS)]) for sample in (drawn, rows))
    centre, size = b.mean(axis=0), b.std(axis=0)
    a, b = (a - centre) / size, (b - centre) / size
    for power in (lambda x: x, lambda x: np.einsum("ni,nj->nij", x, x)):
        left, right = power(a), power(b)
        error = np.sqrt((left.var(axis=0) + right.var(axis=0)) / DRAWS)
        assert (np.abs(left.mean(axis=0) - right.mean(axis=0)) < 5.0 * error + 1e-9).all()


def one_statistics(problem: LMMProblem, lambda_: Array) -> Array:
    """What the likelihood sees of a response: y'y, X'y, and weighted sums over blocks of C_y's products."""
    at = evaluate(problem, lambda_, 1.0).sums
    p = problem.p
    return np.concatenate([problem.A[p], at.hh[:, :, :, p].ravel(), at.uu[p]])


def shared(problem: LMMProblem) -> LMMProblem:
    """The same problem with blocks of equal S held as clusters."""
    chunk = next(iter(problem.chunks()))
    q, p1, _ = chunk.C.shape
    keys, inverse = np.unique(chunk.S.reshape(q * q, -1).round(9), axis=1, return_inverse=True)
    vec = chunk.C.reshape(q * p1, -1)
    count = np.bincount(inverse).astype(float)
    CC = np.stack([vec[:, inverse == k] @ vec[:, inverse == k].T for k in range(len(count))])
    rows, owner = pseudo_blocks(count, CC)
    C = np.ascontiguousarray(rows.T).reshape(q, p1, -1)
    return replace(problem, chunks=lambda: [BlockChunk(np.ascontiguousarray(keys.reshape(q, q, -1)), count, C, owner)])


@pytest.mark.parametrize("kind", ["blocks", "weighted slope", "shared", "shared slope", "few of a kind"])
def test_statistics_of_one_factor_are_drawn_as_rows_would_give_them(kind: str) -> None:
    slope = "slope" in kind
    blocks, rows = (30, (4, 4)) if kind == "shared slope" else (30, (1, 5)) if kind == "shared" else (9, (1, 6))
    model = simulate(3, blocks=blocks, rows=rows, p=3, sizes=(2,) if slope else (1,), reml=True, weights=kind == "weighted slope")
    if kind == "shared slope":
        model.Z[:, 1] = np.tile([-1.0, 0.0, 0.5, 2.0], blocks)
        model.X[:, 1] = model.Z[:, 1]
    problem = model.problem()
    base = shared(problem) if kind in ("shared", "shared slope", "few of a kind") else problem
    lambda_ = np.array([[0.8, 0.0], [0.3, 0.5]]) if slope else np.array([[0.7]])
    beta, sigma = np.array([1.0, -0.5, 0.3]), 1.3
    made = BlockSimulator(base, lambda_, sigma, beta)
    by_rows = Dense(model.X, model.Z, model.y, model.w, model.block, model.sizes, True)

    def from_rows(rng: np.random.Generator) -> Array:
        b = sigma * rng.normal(size=(blocks, len(lambda_))) @ lambda_.T
        by_rows.y = model.X @ beta + (model.Z * b[model.block]).sum(axis=1) + sigma * rng.normal(size=len(model.y)) / np.sqrt(model.w)
        return one_statistics(by_rows.problem(), lambda_)

    agree(lambda rng: one_statistics(made.draw(rng), lambda_), from_rows)


@pytest.mark.parametrize("nested", [False, True])
def test_statistics_of_several_factors_are_drawn_as_rows_would_give_them(nested: bool) -> None:
    rng = np.random.default_rng(5)
    n = 40
    codes = rng.permutation(np.concatenate([np.arange(8), rng.integers(0, 8, n - 8)]))
    other = codes // 2 if nested else np.concatenate([np.arange(4), rng.integers(0, 4, n - 4)])
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    one = np.ones((n, 1))
    model = DenseSeveral(X, rng.normal(size=n), np.ones(n), [Grouping(codes, one, (1,)), Grouping(other, one, (1,))], True)
    lambda_, beta, sigma = np.diag([0.7, 0.9]), np.array([1.0, 0.5]), 1.2
    made = LevelSimulator(model.problem(), lambda_, sigma, beta, lambda rng: model.Z.T @ rng.normal(size=n))

    def sums(problem: CrossedProblem) -> Array:
        Zy = [f.C[0, -1] for f in problem.factors]
        return np.concatenate([problem.WW[-1], Zy[0][:3], Zy[1][:3]])

    def from_rows(rng: np.random.Generator) -> Array:
        b = sigma * model.spread(lambda_) @ rng.normal(size=model.Z.shape[1])
        model.y = X @ beta + model.Z @ b + sigma * rng.normal(size=n)
        return sums(model.problem())

    agree(lambda rng: sums(made.draw(rng)), from_rows)


def intervals(fit: mp.LMMFit, draws: int) -> dict[str, tuple[float, float]]:
    return {row["term"]: (row["conf_low"], row["conf_high"]) for row in fit.confint(method="boot", draws=draws).to_pylist()}


def test_bootstrap_intervals_are_near_the_profile_ones_and_repeat() -> None:
    """The correlation's upper limits differ by 0.21 of the width with 4,000 draws, by 0.05 less or more with 250."""
    fit = mp.lmm("Reaction ~ Days + (Days | Subject)", SLEEP, options=mp.Options(seed=5))
    found = intervals(fit, 250)
    assert fit.info["bootstrap"]["draws"] == 250
    assert intervals(fit, 20) == intervals(fit, 20)
    for row in fit.confint(method="profile").to_pylist():
        low, high = found[row["term"]]
        width = row["conf_high"] - row["conf_low"]
        assert abs(low - row["conf_low"]) < 0.25 * width and abs(high - row["conf_high"]) < 0.25 * width, row["term"]


def test_bootstrap_of_several_factors() -> None:
    fit = mp.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", SLEEP.parent / "Penicillin.parquet")
    found = intervals(fit, 25)
    assert found["sd_(Intercept)|plate"][0] > 0.4 and found["sd_(Intercept)|plate"][1] < 1.4
    assert found["sigma"][0] < fit.sigma < found["sigma"][1]


def test_draws_must_be_a_number() -> None:
    fit = mp.lmm("Reaction ~ Days + (1 | Subject)", SLEEP)
    with pytest.raises(mp.ConfigError, match="draws"):
        fit.confint(method="boot", draws=1)


@pytest.mark.parametrize("family", ["binomial", "poisson", "negbinomial", "negbinomial1", "gamma", "inverse_gaussian", "gaussian", "beta"])
def test_simulated_responses_have_the_family_s_moments(family: str) -> None:
    made, n, tau = density(family, "logit" if family in ("binomial", "beta") else "log"), 40_000, 0.7
    mu, scale = (0.3 if family in ("binomial", "beta") else 1.8), np.exp(tau)
    size = np.full(n, 4.0) if family == "binomial" else None
    y = responses(made, np.full(n, mu), tau, size, None, np.random.default_rng(1))
    variance = {
        "binomial": mu * (1 - mu) / 4, "poisson": mu, "negbinomial": mu + mu**2 / scale, "negbinomial1": mu * (1 + scale),
        "gamma": mu**2 / scale, "inverse_gaussian": mu**3 / scale, "gaussian": 1 / scale, "beta": mu * (1 - mu) / (1 + scale),
    }[family]  # fmt: skip
    assert abs(y.mean() - mu) < 5 * np.sqrt(variance / n)
    assert y.var() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("kind", ["slope", "intercept", "several", "counts", "plain"])
def test_a_seed_draws_the_same_in_whatever_order_blocks_or_rows_come(kind: str) -> None:
    """Engines hand them over as their threads are done: here names of blocks, or rows, are shuffled instead."""
    rng = np.random.default_rng(6)
    n, g = 600, rng.integers(0, 40, 600)
    x, u = rng.normal(size=n).round(1), rng.normal(size=40)
    frame = pl.DataFrame({"x": x, "g": g, "h": rng.integers(0, 8, n), "y": 1.0 + x + u[g] + rng.normal(size=n)})
    frame = frame.with_columns(c=pl.Series(rng.poisson(np.exp(0.3 + 0.3 * x + 0.4 * u[g]))))
    fitted: dict[str, Any] = {
        "slope": lambda data: mp.lmm("y ~ x + (1 + x | g)", data),
        "intercept": lambda data: mp.lmm("y ~ x + (1 | g)", data),
        "several": lambda data: mp.lmm("y ~ x + (1 | g) + (1 | h)", data),
        "counts": lambda data: mp.glmm("c ~ x + (1 | g)", data, family="poisson"),
        "plain": lambda data: mp.glm("c ~ x", data, family="poisson"),
    }
    want = intervals(fitted[kind](frame), 3)
    named = frame.with_columns(g=pl.format("k{}", 17 * pl.col("g") % 40))
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=1)
    for data in (named if kind in ("slope", "intercept") else frame if kind == "several" else shuffled, frame.to_arrow()):
        found = intervals(fitted[kind](data), 3)
        assert all(found[name] == pytest.approx(limits, rel=1e-5, abs=1e-6) for name, limits in want.items())


def test_bootstrap_of_a_generalized_fit() -> None:
    fit = mp.glmm("cbind(incidence, size - incidence) ~ period + (1 | herd)", SLEEP.parent / "cbpp.parquet", family="binomial")
    found = intervals(fit, 100)
    assert intervals(fit, 10) == intervals(fit, 10)
    for row in fit.confint(method="profile").to_pylist():
        width, (low, high) = row["conf_high"] - row["conf_low"], found[row["term"]]
        assert abs(low - row["conf_low"]) < 0.35 * width and abs(high - row["conf_high"]) < 0.35 * width, row["term"]


def test_bootstrap_of_a_plain_model() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=200)
    fit = mp.glm("y ~ x", pl.DataFrame({"y": rng.poisson(np.exp(0.3 + 0.4 * x)), "x": x}), family="poisson")
    found = intervals(fit, 200)
    for name, row in zip(fit.names, fit.confint().to_pylist(), strict=True):
        width = row["conf_high"] - row["conf_low"]
        assert found[name] == pytest.approx((row["conf_low"], row["conf_high"]), abs=0.25 * width)


def crossed(n: int = 90) -> mp.GLMMFit:
    rng = np.random.default_rng(6)
    a, b, x = rng.integers(0, 8, n), rng.integers(0, 5, n), rng.normal(size=n)
    y = 1 + 0.5 * x + (0.9 * rng.normal(size=8))[a] + (0.7 * rng.normal(size=5))[b] + 0.5 * rng.normal(size=n)
    frame = pl.DataFrame({"y": y, "x": x, "a": a, "b": b})
    return mp.glmm("y ~ x + (1 | b) + (1 | a)", frame, family="gaussian")


def test_draws_of_several_factors() -> None:
    """Simulated responses have the model's covariance, and a refit to them is the fit to rows with these responses."""
    fit, rng = crossed(), np.random.default_rng(2)
    sd = dict(zip(fit.varcorr()["group"].to_pylist(), fit.varcorr()["sd"].to_pylist(), strict=True))
    with again(fit, compress=False) as found:
        spool = found.model.rows.spool
        chunk = spool.chunk(0)
        rows = chunk.pieces[0]
        a, b = found.joint.codes_of(chunk, rows)
        draws = np.array([_responses(found, rng)[chunk.first][0].y for _ in range(1_000)])
        V = sd["a"] ** 2 * (a[:, None] == a) + sd["b"] ** 2 * (b[:, None] == b) + sd["Residual"] ** 2 * np.eye(len(a))
        error = np.sqrt((np.outer(np.diag(V), np.diag(V)) + V**2) / len(draws))
        assert np.abs((np.cov(draws.T) - V) / error).max() < 5.5
        np.testing.assert_allclose(draws.mean(axis=0), found.model.Q @ found.best.beta @ rows.F, atol=5 * np.sqrt(V[0, 0] / len(draws)))
        drawn = _responses(found, rng)
        made = found.refitted(_Redrawn.over(spool, drawn))
        frame = pl.DataFrame({"y": drawn[chunk.first][0].y, "x": rows.F[1], "a": a, "b": b})
        want = mp.glmm("y ~ x + (1 | a) + (1 | b)", frame, family="gaussian")
        np.testing.assert_allclose(np.abs(np.diag(made.lambda_)), want.theta, rtol=1e-5)
        np.testing.assert_allclose(made.psi[-1], want.tau, rtol=1e-5)
    names = intervals(fit, 3)
    assert list(names) == ["sd_(Intercept)|a", "sd_(Intercept)|b", "sigma", "(Intercept)", "x"]
    assert fit.info["bootstrap"] == {"draws": 3, "failed": 0}
