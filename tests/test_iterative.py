"""The iterative solver of crossed models against the exact one: operators, traces, log-likelihood, estimates within their stated error."""
from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import mlpipe as mp
from mlpipe.solve.columns import Columns
from mlpipe.solve.crossed import Cells, CrossedProblem, Exact, Factor
from mlpipe.solve.glmm import GLMMProblem, solve_glmm
from mlpipe.solve.iterative import ERROR, MOST_SAMPLES, SD_ERROR, Iterative, IterativeSolution, solve_iterative
from mlpipe.solve.several_factors import SeveralFactors

from .test_reference import SEVERAL, SPECS, fitted

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [
    ((60, 25), (1, 1), 1500),
    ((80, 30, 20), (1, 1, 1), 2500),
    ((60, 30), (2, 1), 2500),
    ((50, 30, 10), (1, 2, 1), 2500),
]


def problem(levels: tuple[int, ...], widths: tuple[int, ...], n: int, seed: int = 0, reml: bool = True) -> CrossedProblem:
    """Crossed factors with intercepts and slopes, built from dense columns."""
    rng = np.random.default_rng(seed)
    X = np.column_stack([np.ones(n), rng.standard_normal(n)])
    y = X @ [1.0, 0.5] + rng.standard_normal(n)
    codes, Zs = [rng.integers(0, m, n) for m in levels], []
    for code, m, q in zip(codes, levels, widths, strict=True):
        Z = np.zeros((n, m * q))
        for a in range(q):
            Z[np.arange(n), code * q + a] = X[:, a]
        y = y + 0.7 * Z @ rng.standard_normal(m * q)
        Zs.append(Z)
    W = np.column_stack([X, y])
    factors = []
    for Z, m, q in zip(Zs, levels, widths, strict=True):
        S = (Z.T @ Z).reshape(m, q, m, q)[np.arange(m), :, np.arange(m), :].transpose(1, 2, 0)
        factors.append(Factor(np.ascontiguousarray(S), (Z.T @ W).reshape(m, q, -1).transpose(1, 2, 0)))
    cells = {}
    for k, h in itertools.combinations(range(len(levels)), 2):
        pairs = np.unique(codes[k] * levels[h] + codes[h])
        rows, columns = pairs // levels[h], pairs % levels[h]
        block = (Zs[k].T @ Zs[h]).reshape(levels[k], widths[k], levels[h], widths[h])
        cells[k, h] = Cells(rows, columns, block[rows, :, columns, :].transpose(1, 2, 0))
    return CrossedProblem(tuple(factors), cells, W.T @ W, float(n), 0.0, reml, tuple((q,) for q in widths))


def lambda_of(made: CrossedProblem, seed: int = 1) -> np.ndarray:
    """Some Λ inside the parameter space."""
    rng = np.random.default_rng(seed)
    out = np.zeros((made.offsets[-1],) * 2)
    for i, j in made.entries:
        out[i, j] = rng.uniform(0.4, 1.0) if i == j else rng.uniform(-0.3, 0.3)
    return out


def solved(made: CrossedProblem, start: np.ndarray, seed: int) -> IterativeSolution:
    """The fit from a start; what the conditional variances are sampled from does not matter here."""
    size = sum(f.size for f in made.factors)
    return solve_iterative(made, start, lambda rng: rng.standard_normal(size), tol=1e-8, max_evaluations=100, seed=seed, threads=1)


def exact_fit(made: CrossedProblem) -> Any:
    search = GLMMProblem(Exact(made), np.zeros((0, 0)), made.entries, made.offsets[-1], False, made.typical)
    return solve_glmm(search, np.array([0.5 if i == j else 0.0 for i, j in made.entries]))


@pytest.mark.parametrize(("levels", "widths", "n"), SHAPES)
def test_operator_solves_as_the_factor_does(levels: tuple[int, ...], widths: tuple[int, ...], n: int) -> None:
    made = problem(levels, widths, n)
    lam = lambda_of(made)
    b = np.random.default_rng(2).standard_normal((sum(f.size for f in made.factors), 5))
    for threads in (1, 3):
        M = Iterative(made, 0, threads).operator(lam)
        np.testing.assert_allclose(M.solve(b, 1e-13), Exact(made).factored(lam).solve(b), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("levels", "widths", "n"), SHAPES)
@pytest.mark.parametrize("reml", [True, False])
def test_score_is_the_exact_one_up_to_its_noise(levels: tuple[int, ...], widths: tuple[int, ...], n: int, reml: bool) -> None:
    """The mean over probes lies within five of its own standard errors; estimates and average information are exact."""
    made = problem(levels, widths, n, reml=reml)
    lam = lambda_of(made)
    solver = Iterative(made, 3, 1)
    solver.add(112)
    at, score, information, each = solver.newton(lam)
    exact = Exact(made)
    want, (truth, _) = exact.look(lam), exact.evaluate(lam)
    noise = each.std(axis=1, ddof=1) / np.sqrt(each.shape[1])
    assert (np.abs(score - want.score) < 5 * noise + 1e-4 * np.abs(want.score) + 1e-3).all()
    assert each.shape == (len(made.entries), 128)
    np.testing.assert_allclose(information, want.outer, rtol=1e-3, atol=1e-3 * np.abs(want.outer).max())
    np.testing.assert_allclose(at.beta, truth.beta, rtol=1e-7)
    assert at.s2 == pytest.approx(truth.s2, rel=1e-7)


@pytest.mark.parametrize(("levels", "widths", "n"), SHAPES)
def test_log_likelihood_by_lanczos(levels: tuple[int, ...], widths: tuple[int, ...], n: int) -> None:
    made = problem(levels, widths, n)
    lam = lambda_of(made)
    solver = Iterative(made, 4, 1)
    solver.add(48)
    value, error = solver.loglik(lam)
    assert 0 < error < 0.5
    assert abs(value - Exact(made).evaluate(lam)[0].loglik) < 5 * error + 1e-3


@pytest.mark.parametrize(("levels", "widths", "n"), SHAPES)
def test_estimates_agree_within_the_stated_error(levels: tuple[int, ...], widths: tuple[int, ...], n: int) -> None:
    made = problem(levels, widths, n, seed=7)
    want = exact_fit(made)
    start = np.array([0.5 if i == j else 0.0 for i, j in made.entries])
    found = solved(made, start, 0)
    se = np.sqrt(np.diag(want.vcov))
    assert found.solution.converged and found.error.max() <= ERROR
    assert (np.abs(found.solution.psi - want.psi) / se < 3 * found.error + 0.01).all()


@pytest.mark.parametrize("name", sorted(SEVERAL - {"insteval_crossed", "insteval_slope_ml"}))
def test_reference_models_lie_within_three_stated_errors(name: str, tmp_path: Path) -> None:
    """InstEval takes minutes: benchmarks/probe_coverage.py."""
    fit = fitted(SPECS[name], "polars", tmp_path)
    held = fit.held
    assert held is not None and isinstance(held.problem, CrossedProblem)
    theta = held.lambda_([term.star for term in fit.terms])[held.free]
    se = np.sqrt(np.diag(held.in_solver_order(fit.theta_covariance))[:-1])
    found = solved(held.problem, np.where(theta == 0.0, 0.0, 1.2 * theta + 0.05), 0)
    inside = np.isfinite(se)
    assert found.solution.converged and found.error.max() <= ERROR
    off = np.abs(found.solution.psi - theta)
    assert (off[inside] <= 3.0 * found.error[inside] * se[inside] + 1e-7).all()
    assert (off[~inside] < 1e-3).all()


def test_the_stated_error_covers_the_true_one() -> None:
    """Over seeds of the probes: within two stated errors at least nine times out of ten (a normal law has 95 %)."""
    made = problem((120, 40), (1, 1), 1500, seed=11)
    want = exact_fit(made)
    se = np.sqrt(np.diag(want.vcov))
    inside = []
    for seed in range(40):
        found = solved(made, want.psi, seed)
        inside.append(np.abs(found.solution.psi - want.psi) / se < 2 * found.error + 1e-3)
    assert np.mean(inside) >= 0.9


def test_a_variance_of_zero_is_an_answer() -> None:
    rng = np.random.default_rng(3)
    n = 3000
    frame = pl.DataFrame({"a": rng.integers(0, 60, n), "b": np.arange(n) % 30, "x": rng.standard_normal(n)})
    frame = frame.with_columns(e=pl.Series(rng.standard_normal(60))[frame["a"]] + pl.Series(rng.standard_normal(n)))
    frame = frame.with_columns(y=0.5 * pl.col("x") + pl.col("e") - pl.col("e").mean().over("b"))  # levels of b differ less than by chance
    fits = []
    for method in ("exact", "iterative"):
        with pytest.warns(mp.SingularFitWarning):
            fits.append(mp.lmm("y ~ x + (1 | a) + (1 | b)", frame, method=method))
    exact, found = fits
    assert exact.theta[1] == found.theta[1] == 0.0 and found.converged
    assert found.theta[0] == pytest.approx(exact.theta[0], rel=0.02)


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_a_whole_fit_by_either_path(slope: float) -> None:
    """Same tables; modes exact to the solver's tolerance given theta; conditional standard deviations within their sampling error;
    without a variation of its own the slope is a multiple of the intercept, a singular covariance."""
    rng = np.random.default_rng(5)
    n = 6000
    a, b = rng.integers(0, 150, n), rng.integers(0, 40, n)
    x = rng.standard_normal(n)
    slopes = 0.3 * slope * x * rng.standard_normal(40)[b] + (0.5 + 0.3 * x) * rng.standard_normal(40)[b]
    frame = pl.DataFrame({"y": 1 + 0.5 * x + 0.7 * rng.standard_normal(150)[a] + slopes + rng.standard_normal(n), "x": x, "a": a, "b": b})
    formula = "y ~ x + (1 | a) + (1 + x | b)"
    exact, found = (mp.lmm(formula, frame, method=method) for method in ("exact", "iterative"))
    assert found.converged and "iterative" in str(found) and found.info["monte_carlo"]["probes"] >= 16
    assert list(found.fixef()) == list(exact.fixef())
    se = np.sqrt(np.diag(exact.vcov()))
    np.testing.assert_allclose(list(found.fixef().values()), list(exact.fixef().values()), atol=0.02 * se.min())
    for group in ("a", "b"):
        left, right = pl.DataFrame(exact.ranef(group)), pl.DataFrame(found.ranef(group))
        assert (left["estimate"] - right["estimate"]).abs().max() < 0.1 * left["std_error"].mean()
        off = (right["std_error"] / left["std_error"]).to_numpy() - 1.0
        assert math.sqrt((off**2).mean()) < 2.5 * found.info["monte_carlo"]["sd_error"] + 0.01  # theta's own error on top
    assert 0.0 < found.info["monte_carlo"]["sd_error"] <= SD_ERROR or found.info["monte_carlo"]["samples"] == MOST_SAMPLES
    assert found.predict(frame).read_all().num_rows == n


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize(("seed", "formula"), [(0, "y ~ x + (1 | g) + (x | h)"), (3, "y ~ x + (1 | g) + (x + w | h)")])
def test_columns_that_vanish_do_not_use_up_the_evaluations(seed: int, formula: str) -> None:
    rng = np.random.default_rng(seed)
    g, h, x, w = rng.integers(0, 150, 3000), rng.integers(0, 60, 3000), rng.normal(size=3000), rng.normal(size=3000)
    y = 1 + 0.5 * x + rng.normal(size=3000) + 0.5 * rng.normal(size=150)[g]
    y = y + (0.4 if seed == 3 else 0.0) * rng.normal(size=60)[h]
    frame = pl.DataFrame({"y": y, "x": x, "w": w, "g": g, "h": h})
    found, wanted = mp.lmm(formula, frame, method="iterative"), mp.lmm(formula, frame, method="exact")
    assert found.converged and found.singular and wanted.singular and found.info["evaluations"] < 40
    np.testing.assert_allclose(found.theta, wanted.theta, atol=4e-3)
    assert abs(found.loglik - wanted.loglik) < 0.05


@pytest.mark.parametrize("lowest", [-3.0, 0.5])
def test_a_column_held_at_zero_is_let_go_where_that_helps(lowest: float) -> None:
    """The direction is that of the gradient's most negative curvature, though no element of the column may tell by itself."""
    made, levels = SeveralFactors(), 30.0
    made.terms = ((3,), (1,))
    turn = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))[0]
    G = (turn * [lowest, 1.0, 40.0]) @ turn.T * levels * 0.1
    lambda_ = np.diag([1e-3, 0.5, 0.2, 0.4]) + np.diag([0.0, 0.3, 0.0], -1)
    by_lambda = np.zeros((4, 4))
    by_lambda[:3, :3] = -np.tril(G @ lambda_[:3, :3])
    theta, s = (np.array([matrix[i, j] for i, j in made.entries]) for matrix in (lambda_, by_lambda))
    columns = Columns(made, np.eye(4), np.full(4, levels), np.full(4, 1e-3))
    before = theta.copy()
    before[:3] = 0.1, 0.2, -0.1
    shut = columns.shut(before, -before, -1.5 * before)
    assert shut is not None and shut[:3].tolist() == [1e-3, 0.0, 0.0] and columns.held(7).tolist() == [True] * 3 + [False] * 4
    opened = columns.opened(theta, s)
    if lowest > 0.0:
        assert opened is None and columns.zero == {0}
        return
    assert opened is not None and not columns.held(7).any()
    along = opened[:3] / np.linalg.norm(opened[:3])
    assert abs(along @ turn[:, 0]) == pytest.approx(1.0, abs=1e-3) and (opened[3:] == theta[3:]).all()


def test_one_factor_has_no_iterative_path() -> None:
    frame = pl.DataFrame({"y": [1.0, 2.0, 3.0, 5.0], "g": [1, 1, 2, 2]})
    with pytest.raises(mp.ConfigError, match="exactly"):
        mp.lmm("y ~ 1 + (1 | g)", frame, method="iterative")
