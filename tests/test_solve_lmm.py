"""The solver for one grouping factor against dense algebra, scipy and lme4."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.optimize as so

from mlpipe.errors import DataError
from mlpipe.solve.blocks import Array, BlockChunk, pseudo_blocks
from mlpipe.solve.likelihood import LMMProblem, _least_squares, evaluate
from mlpipe.solve.lmm import information, solve
from mlpipe.solve.optimize import MAX_RADIUS
from tests.dense import Dense, simulate

REFERENCE = Path(__file__).parent / "reference"
SHAPES = [(1,), (2,), (3,), (4,), (1, 1), (2, 1), (1, 2, 1)]


def central(f: Any, x: Array, h: float = 1e-5) -> Array:
    """Central differences of a function of a vector, along the last axis."""
    return np.stack([(f(x + d) - f(x - d)) / (2 * h) for d in np.eye(len(x)) * h], axis=-1)


def compress(chunk: BlockChunk) -> BlockChunk:
    """Blocks with equal S replaced by pseudo-blocks."""
    q, p1, _ = chunk.C.shape
    distinct, owner = np.unique(chunk.S.reshape(q * q, -1).T.round(9), axis=0, return_inverse=True)
    rows = chunk.C.reshape(q * p1, -1).T
    products = np.stack([rows[owner == k].T @ rows[owner == k] for k in range(len(distinct))])
    count = np.bincount(owner).astype(float)
    made, of = pseudo_blocks(count, products)
    S = np.ascontiguousarray(distinct.T).reshape(q, q, -1)
    return BlockChunk(S, count, np.ascontiguousarray(made.T).reshape(q, p1, -1), of)


def split(chunk: BlockChunk, sizes: list[int]) -> list[BlockChunk]:
    stops = np.cumsum([0, *sizes, chunk.S.shape[2]])
    return [
        BlockChunk(chunk.S[:, :, a:b], chunk.count[a:b], chunk.C[:, :, a:b])
        for a, b in zip(stops[:-1], stops[1:], strict=True)
    ]


def multistart(model: Dense, problem: LMMProblem, starts: list[Array]) -> float:
    """The least −2ℓ that scipy's BFGS finds."""
    def f(theta: Array) -> tuple[float, Array]:
        lambda_ = model.lambda_(theta)
        at = evaluate(problem, lambda_)
        return at.objective, at.gradient(lambda_)[model.free()]

    return min(so.minimize(f, theta, jac=True, method="BFGS", options={"gtol": 1e-5}).fun for theta in starts)


# ---- one evaluation


@pytest.mark.parametrize("reml", [False, True])
@pytest.mark.parametrize("p", [0, 1, 4])
@pytest.mark.parametrize("sizes", SHAPES)
def test_evaluate_is_the_dense_likelihood(sizes: tuple[int, ...], p: int, reml: bool) -> None:
    model = simulate(sum(sizes) + p, blocks=9, rows=(1, 7), p=p, sizes=sizes, reml=reml, weights=True)
    problem = model.problem()
    theta = np.random.default_rng(p).normal(size=len(model.free()[0]))

    def deviance(theta: Array) -> float:
        lambda_ = model.lambda_(theta)
        return model.deviance(lambda_ @ lambda_.T)

    for scale in (0.0, 1e-3, 1.0, 30.0):
        lambda_ = model.lambda_(theta * scale)
        at = evaluate(problem, lambda_)
        beta, rss, xvx = model.gls(lambda_ @ lambda_.T)
        assert at.objective == pytest.approx(deviance(theta * scale), rel=1e-11)
        assert at.beta == pytest.approx(beta, rel=1e-8)
        assert at.rss == pytest.approx(rss, rel=1e-9)
        assert at.r_inverse @ at.r_inverse.T @ xvx == pytest.approx(np.eye(p), abs=1e-8)
        step = 1e-5 * max(scale, 1e-1)
        gradient = at.gradient(lambda_)[model.free()]
        assert gradient == pytest.approx(central(deviance, theta * scale, step), rel=1e-5, abs=1e-5)
        fixed = evaluate(problem, lambda_, 0.37)
        assert fixed.objective == pytest.approx(model.deviance(lambda_ @ lambda_.T, 0.37), rel=1e-11)


@pytest.mark.parametrize("reml", [False, True])
def test_psi_gradient_is_the_derivative_in_psi_at_singular_and_regular_points(reml: bool) -> None:
    model = simulate(3, blocks=10, rows=(2, 6), p=2, sizes=(2, 1), reml=reml, weights=True)
    for theta in ([0.0, 0, 0, 0], [0.7, 0.3, 0, 0.4], [0, 0.5, 0.2, 0], [0.7, 0.3, 0.5, 0.4]):
        lambda_ = model.lambda_(np.array(theta))
        G = evaluate(model.problem(), lambda_).psi_gradient()
        for i, j in zip(*model.free(), strict=True):
            D = np.zeros((3, 3))
            D[i, j] = D[j, i] = 1.0
            difference = central(lambda x, D=D, psi=lambda_ @ lambda_.T: model.deviance(psi + x[0] * D), np.zeros(1), 1e-5)[0]
            assert np.sum(G * D) == pytest.approx(difference, rel=1e-5, abs=1e-5)


def test_nearly_singular_and_huge_factors_lose_no_digits() -> None:
    """Λ⁻¹ is used for regular Λ only; both ways agree where both are accurate."""
    model = simulate(5, blocks=12, rows=(3, 6), p=2, sizes=(2,), reml=True)
    problem = model.problem()
    for first, last in ((1.0, 1e-3), (1.0, 1e-7), (1.0, 0.0), (1e-7, 1.0), (0.0, 1.0), (1e-5, 1e-5), (1e3, 1e3), (1e3, 1.0)):
        lambda_ = np.array([[first, 0.0], [0.4, last]])
        at = evaluate(problem, lambda_)
        assert at.objective == pytest.approx(model.deviance(lambda_ @ lambda_.T), rel=1e-8)
        nudged = lambda_ * (1 + 1e-7)
        change = evaluate(problem, nudged).objective - at.objective
        assert change == pytest.approx(np.sum(at.gradient(lambda_) * lambda_) * 1e-7, rel=1e-2, abs=1e-7)


def test_chunks_and_their_order_do_not_matter() -> None:
    model = simulate(2, blocks=1500, rows=(1, 3), p=3, sizes=(2,), reml=True)
    whole = model.chunk()
    parts = split(whole, [1, 700, 0, 77])
    lambda_ = np.array([[0.7, 0.0], [0.2, 0.4]])
    W = np.column_stack([model.X, model.y])
    one = LMMProblem(lambda: [whole], W.T @ W, float(len(W)), 0.0, (2,), True)
    many = replace(one, chunks=lambda: reversed(parts))
    a, b = evaluate(one, lambda_), evaluate(many, lambda_)
    assert a.objective == pytest.approx(b.objective, rel=1e-13)
    assert a.psi_gradient() == pytest.approx(b.psi_gradient(), rel=1e-10)
    assert solve(one).theta == pytest.approx(solve(many).theta, rel=1e-7)


# ---- compression


@pytest.mark.parametrize("q", [1, 2])
def test_compressed_blocks_are_the_blocks(q: int) -> None:
    model = simulate(7, blocks=120, rows=(5, 7), p=2, sizes=(q,), reml=True)
    if q == 2:  # the same times in every block of a size
        time = np.concatenate([np.arange(n) - 2.0 for n in np.bincount(model.block)])
        model.X[:, 1] = model.Z[:, 1] = time
        model.y += (model.Z * np.random.default_rng(0).normal(size=(120, 2))[model.block]).sum(axis=1)
    chunk = compress(model.chunk())
    assert chunk.S.shape[2] == 3 and chunk.C.shape[2] <= 3 * q * 3
    expanded, compressed = model.problem(), model.problem([chunk])
    lambda_ = np.tril(np.full((q, q), 0.6))
    a, b = evaluate(expanded, lambda_), evaluate(compressed, lambda_)
    assert b.objective == pytest.approx(a.objective, rel=1e-12)
    assert b.gradient(lambda_) == pytest.approx(a.gradient(lambda_), rel=1e-10, abs=1e-9)
    x, y = solve(expanded), solve(compressed)
    assert y.theta == pytest.approx(x.theta, rel=1e-7)
    assert information(compressed, y).matrix == pytest.approx(information(expanded, x).matrix, rel=1e-5, abs=1e-5)


def test_pseudo_blocks_keep_small_entries_and_drop_what_is_not_there() -> None:
    rng = np.random.default_rng(0)
    scale = 10.0 ** np.array([-8, -3, 0, 4, 8])
    blocks = [rng.normal(size=(n, 5)) * scale for n in (1, 3, 40, 0)]
    rank_two = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 5)) * scale
    CC = np.stack([b.T @ b for b in [*blocks, rank_two]])
    rows, owner = pseudo_blocks(np.array([1.0, 3, 40, 0, 30]), CC)
    assert np.bincount(owner, minlength=5).tolist() == [1, 3, 5, 0, 2]
    assert (np.diff(owner) >= 0).all()
    for k, products in enumerate(CC):
        made = rows[owner == k]
        assert made.T @ made / np.outer(scale, scale) == pytest.approx(products / np.outer(scale, scale), rel=1e-11, abs=1e-11)


# ---- the optimum


@pytest.mark.parametrize("reml", [False, True])
@pytest.mark.parametrize("sizes", SHAPES[:6])
def test_solve_finds_the_dense_optimum(sizes: tuple[int, ...], reml: bool) -> None:
    model = simulate(11 + len(sizes), blocks=14, rows=(2, 5), p=2, sizes=sizes, reml=reml, weights=True)
    fit = solve(model.problem())
    assert fit.converged
    psi = fit.lambda_ @ fit.lambda_.T
    beta, rss, xvx = model.gls(psi)
    dof = len(model.y) - 2 * reml
    assert fit.objective == pytest.approx(model.deviance(psi), rel=1e-11)
    assert fit.objective <= model.optimum([fit.theta + 0.05]) + 1e-7
    assert fit.loglik == -fit.objective / 2
    assert fit.sigma2 == pytest.approx(rss / dof)
    assert fit.beta == pytest.approx(beta)
    assert fit.vcov == pytest.approx(fit.sigma2 * np.linalg.inv(xvx))
    assert model.lambda_(fit.theta) == pytest.approx(fit.lambda_)
    assert (np.diagonal(fit.lambda_) >= 0).all()


@pytest.mark.thinned(5)
@pytest.mark.parametrize("first", range(0, 300, 60))
def test_small_fits_converge_and_none_is_beaten(first: int) -> None:
    evaluations = []
    for seed in range(first, first + 60):
        rng = np.random.default_rng(seed)
        theta = rng.normal(size=3) * rng.choice([0.0, 0.3, 1.0], size=3)
        model = simulate(seed, blocks=int(rng.integers(5, 25)), rows=(2, 7), p=2, sizes=(2,), reml=bool(seed % 2), theta=theta)
        problem = model.problem()
        fit = solve(problem)
        assert fit.converged, (seed, fit.message)
        starts = [fit.theta + 0.1, np.array([1.0, -0.4, 0.6])]
        assert fit.objective <= multistart(model, problem, starts) + 1e-7, seed
        evaluations.append(fit.evaluations)
    assert np.median(evaluations) <= 8
    assert max(evaluations) <= 25


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1e2, 1e4])
@pytest.mark.parametrize("theta", [(1.0, 0.5, 0.0), (1.0, 0.5, 0.4), (1.0, 0.0, 1e-4)])
def test_variances_of_any_size(scale: float, theta: tuple[float, ...]) -> None:
    for seed in range(4):
        rows = 400 if scale < 1e-3 else 8
        model = simulate(seed, blocks=12, rows=(5, rows), p=2, sizes=(2,), reml=True, theta=np.array(theta) * scale)
        fit = solve(model.problem())
        assert fit.converged, (fit.message, fit.score)
        assert fit.evaluations <= 30
        if scale > 1:
            assert fit.lambda_[0, 0] == pytest.approx(theta[0] * scale, rel=0.9)


def test_a_zero_variance_is_exactly_zero_and_its_gradient_not_negative() -> None:
    singular = 0
    for seed in range(30):
        model = simulate(seed, blocks=15, rows=(2, 8), p=2, sizes=(1, 1), reml=True, theta=0.0)
        problem = model.problem()
        fit = solve(problem)
        G = evaluate(problem, fit.lambda_).psi_gradient()
        assert fit.converged
        assert fit.singular == (fit.theta == 0.0).any()
        for theta, slope in zip(fit.theta, np.diagonal(G), strict=True):
            assert slope >= -1e-6 if theta == 0.0 else abs(slope) < 1e-4
        singular += fit.singular
    assert 15 <= singular < 30


def test_a_perfect_correlation_satisfies_the_conditions_of_the_boundary() -> None:
    singular = 0
    for seed in range(30):
        model = simulate(seed, blocks=15, rows=(3, 8), p=2, sizes=(2,), reml=True, theta=np.array([1.0, 0.5, 0.0]))
        problem = model.problem()
        fit = solve(problem)
        G = evaluate(problem, fit.lambda_).psi_gradient()
        assert fit.converged
        assert G @ fit.lambda_ == pytest.approx(0.0, abs=1e-5)
        assert np.linalg.eigvalsh(G)[0] > -1e-5
        assert fit.singular == (np.linalg.matrix_rank(fit.lambda_) < 2)
        singular += fit.singular
    assert 10 <= singular < 30


def test_two_blocks_and_many_alike() -> None:
    for seed in range(20):
        model = simulate(seed, blocks=2, rows=(6, 8), p=1, sizes=(2,), reml=True, theta=np.array([1.0, 0.5, 1.0]))
        problem = model.problem()
        fit = solve(problem)
        assert fit.converged
        assert fit.objective <= multistart(model, problem, [fit.theta + 0.1, np.ones(3)]) + 1e-7
    chunk = compress(simulate(1, blocks=40, rows=(5, 6), p=1, sizes=(1,), reml=False).chunk())
    rows = 1e9 * chunk.count @ chunk.S[0, 0]
    between = 1e9 * np.einsum("ajr,akr,r->jk", chunk.C, chunk.C, 1.0 / chunk.S[0, 0, chunk.owner])
    A = between + rows * np.diag([0.0, 1.0])
    many = BlockChunk(chunk.S, chunk.count * 1e9, chunk.C * np.sqrt(1e9), chunk.owner)
    fit = solve(LMMProblem(lambda: [many], A, float(rows), 0.0, (1,), False))
    assert fit.converged and fit.evaluations <= 12


def test_badly_scaled_columns_change_nothing() -> None:
    model = simulate(4, blocks=30, rows=(4, 8), p=4, sizes=(2,), reml=True)
    plain = solve(model.problem())
    column = np.array([1.0, 1e3, 1e-3, 1.0])
    model.X, model.Z = model.X * column, model.Z * np.array([1e3, 1e-3])
    scaled = solve(model.problem())
    assert scaled.evaluations == plain.evaluations
    assert scaled.objective == pytest.approx(plain.objective + 2 * np.log(column).sum(), rel=1e-11)
    assert scaled.beta * column == pytest.approx(plain.beta, rel=1e-7)
    assert np.array([1e3, 1e-3])[:, None] * scaled.lambda_ == pytest.approx(plain.lambda_, rel=1e-6)


def test_columns_of_z_that_repeat_others_or_are_zero_make_a_singular_fit() -> None:
    model = simulate(1, blocks=20, rows=(4, 8), p=2, sizes=(2,), reml=True, theta=np.array([1.0, 0.0, 0.0]))
    for column in (np.zeros(len(model.y)), 2.0 * model.Z[:, 0]):
        model.Z = np.column_stack([model.Z[:, 0], column])
        alone = replace(model, Z=model.Z[:, :1], sizes=(1,))
        fit = solve(model.problem())
        assert fit.converged and fit.singular
        assert fit.objective == pytest.approx(solve(alone.problem()).objective, rel=1e-10)


@pytest.mark.parametrize("start", [[0.0, 0.0, 0.0], [50.0, 0.0, 50.0], [1.0, 1.0, 0.0], [-0.7, 0.1, 0.4]])
def test_any_start_leads_to_the_optimum(start: list[float]) -> None:
    model = simulate(6, blocks=25, rows=(3, 8), p=2, sizes=(2,), reml=True)
    problem = model.problem()
    best = solve(problem)
    assert solve(problem, start=best.theta).evaluations <= 2
    fit = solve(problem, start=np.array(start))
    assert fit.converged
    assert fit.theta == pytest.approx(best.theta, rel=1e-6)


def test_the_record_tells_the_way() -> None:
    problem = simulate(6, blocks=25, rows=(3, 8), p=2, sizes=(2,), reml=True).problem()
    fit = solve(problem)
    assert len(fit.trace) == fit.evaluations
    assert fit.message == "converged"
    kept = [step.objective for step in fit.trace if step.accepted]
    assert (np.diff(kept) < 1e-9).all()
    assert fit.trace[-1].score == fit.score <= 1e-8
    assert all(0.0 <= step.step <= MAX_RADIUS * 1.01 for step in fit.trace)
    short = solve(problem, max_evaluations=3)
    assert not short.converged
    assert short.evaluations == 3
    assert "evaluations" in short.message


# ---- no fit


def test_too_few_rows() -> None:
    model = simulate(0, blocks=2, rows=(1, 1), p=2, sizes=(1,), reml=False)
    with pytest.raises(DataError, match="2 rows cannot determine 2 fixed effects"):
        solve(model.problem())


@pytest.mark.parametrize("random", [False, True])
def test_a_response_that_is_fitted_exactly(random: bool) -> None:
    model = simulate(0, blocks=10, rows=(4, 8), p=2, sizes=(2,), reml=True)
    b = np.random.default_rng(0).normal(size=(10, 2))
    model.y = (model.Z * b[model.block.astype(int)]).sum(axis=1) if random else model.X @ np.array([1.0, 2.0])
    with pytest.raises(DataError, match="fitted exactly"):
        solve(model.problem())


def test_an_exact_fit_is_called_so_where_its_variances_make_the_constant_rounding_too() -> None:
    """Sums that the search of such a response came to: whether the constant is left 0 or a little more is a matter of the order of sums."""
    A = np.array([[0.0, 2e-15, 6e-14], [2e-15, 281.0, 1e-15], [6e-14, 1e-15, 6e-14]])
    with pytest.raises(DataError, match="fitted exactly") as caught:
        _least_squares(A, np.array([300.0, 300.0, 300.0]))
    assert caught.value.code == "no_residual"
    A[2, 2] = 1.0  # a response that is left is not what is wrong
    with pytest.raises(DataError, match="not determined"):
        _least_squares(A, np.array([300.0, 300.0, 300.0]))


# ---- information


@pytest.mark.parametrize("reml", [False, True])
@pytest.mark.parametrize(("sizes", "p"), [((1,), 1), ((2,), 3), ((2, 1), 0), ((3,), 2)])
def test_information_is_the_second_derivative(sizes: tuple[int, ...], p: int, reml: bool) -> None:
    model = simulate(9, blocks=60, rows=(5, 7), p=p, sizes=sizes, reml=reml, weights=True)
    fit = solve(model.problem())
    assert not fit.singular

    def gradient(x: Array) -> Array:
        lambda_, s2 = model.lambda_(x[:-1]), float(np.exp(2 * x[-1]))
        at = evaluate(model.problem(), lambda_, s2)
        dof = len(model.y) - p * reml
        return np.append(at.gradient(lambda_)[model.free()] / 2, dof - at.rss / s2)

    x = np.append(fit.theta, np.log(fit.sigma2) / 2)
    made = information(model.problem(), fit)
    expected = central(gradient, x)
    size = np.sqrt(np.diagonal(expected))
    assert made.matrix / np.outer(size, size) == pytest.approx(expected / np.outer(size, size), abs=1e-7)
    assert made.vcov @ made.matrix == pytest.approx(np.eye(len(x)), abs=1e-8)


def test_information_from_dense_likelihoods() -> None:
    model = simulate(8, blocks=8, rows=(4, 5), p=1, sizes=(1,), reml=True)
    fit = solve(model.problem())

    def loss(x: Array) -> float:
        return model.deviance(np.array([[x[0] ** 2]]), float(np.exp(2 * x[1]))) / 2

    x = np.append(fit.theta, np.log(fit.sigma2) / 2)
    hessian = central(lambda x: central(loss, x, 1e-3), x, 1e-3)
    assert information(model.problem(), fit).matrix == pytest.approx(hessian, rel=1e-4, abs=1e-4)


def test_parameters_on_the_boundary_have_no_information() -> None:
    for seed in range(9):
        model = simulate(seed, blocks=15, rows=(3, 8), p=2, sizes=(2,), reml=True, theta=np.array([1.0, 0.5, 0.0]))
        fit = solve(model.problem())
        made = information(model.problem(), fit)
        assert np.isnan(made.vcov).all(axis=0).tolist() == [False, False, fit.singular, False]
        inside = ~np.isnan(np.diagonal(made.vcov))
        assert made.vcov[np.ix_(inside, inside)] @ made.matrix[np.ix_(inside, inside)] == pytest.approx(np.eye(inside.sum()), abs=1e-9)


# ---- lme4


def reference(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((REFERENCE / "fits" / f"{name}.json").read_text())["results"]
    return results


def sleepstudy(*, sizes: tuple[int, ...] = (2,), reml: bool = True, weights: bool = False) -> Dense:
    frame = pl.read_parquet(REFERENCE / "data" / "sleepstudy.parquet")
    X = np.column_stack([np.ones(len(frame)), frame["Days"].to_numpy()])
    w = frame["w"].to_numpy() if weights else np.ones(len(frame))
    block = np.unique(frame["Subject"].cast(pl.String).to_numpy(), return_inverse=True)[1]
    return Dense(X, X, frame["Reaction"].to_numpy().astype(float), w, block, sizes, reml)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sleepstudy_rs_reml", {}),
        ("sleepstudy_rs_ml", {"reml": False}),
        ("sleepstudy_uncorr_reml", {"sizes": (1, 1)}),
        ("sleepstudy_weights", {"weights": True}),
    ],
)
def test_sleepstudy_is_lme4s(name: str, options: dict[str, Any]) -> None:
    expected = reference(name)
    fit = solve(sleepstudy(**options).problem())
    assert fit.loglik == pytest.approx(expected["logLik"], abs=1e-8)
    assert fit.theta == pytest.approx(np.array(expected["theta"]["values"]), abs=1e-6)
    assert fit.beta == pytest.approx(np.array(expected["fixef"]["estimate"]), rel=1e-9)
    assert np.sqrt(np.diagonal(fit.vcov)) == pytest.approx(np.array(expected["fixef"]["se"]), rel=1e-6)
    assert np.sqrt(fit.sigma2) == pytest.approx(expected["sigma"], rel=1e-6)
    assert fit.evaluations <= 8


def test_dyestuff2_is_singular_as_in_lme4() -> None:
    frame = pl.read_parquet(REFERENCE / "data" / "Dyestuff2.parquet")
    expected = reference("dyestuff2_singular")
    one = np.ones((len(frame), 1))
    block = np.unique(frame["Batch"].cast(pl.String).to_numpy(), return_inverse=True)[1]
    fit = solve(Dense(one, one, frame["Yield"].to_numpy(), one[:, 0], block, (1,), True).problem())
    assert fit.converged and fit.singular
    assert fit.theta == pytest.approx([0.0], abs=0)
    assert fit.loglik == pytest.approx(expected["logLik"], abs=1e-8)
