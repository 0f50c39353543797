"""The exact solver for several grouping factors against dense matrices: likelihood, score, traces, information, inverse."""
from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import scipy.sparse as sp

from mlpipe.solve.crossed import Exact, flat, per_level
from mlpipe.solve.elimination import Dense, Next
from mlpipe.solve.glmm import GLMMProblem, solve_glmm
from mlpipe.solve.nested import Nested

from .dense_several import DenseSeveral, Grouping

Codes = list[np.ndarray]


def _crossed(rng: np.random.Generator, *levels: int, rows: int = 90) -> Codes:
    """Independent codes, each level at least once."""
    return [rng.permutation(np.concatenate([np.arange(m), rng.integers(0, m, rows - m)])) for m in levels]


def _nested(rng: np.random.Generator, *fans: int, rows: int = 96) -> Codes:
    """Levels within levels, innermost first."""
    inner = np.arange(rows) % int(np.prod(fans))
    return [inner // int(np.prod(fans[len(fans) - k :])) for k in range(len(fans))]


def _partial(rng: np.random.Generator) -> Codes:
    """Each level of the first meets two neighbours of the second."""
    a = np.arange(90) % 18
    return [a, (a // 3 + rng.integers(0, 2, 90)) % 6]


def _disconnected(rng: np.random.Generator) -> Codes:
    """Two sets of levels that never meet."""
    half = np.arange(80) % 2
    return [half * 6 + rng.integers(0, 6, 80), half * 4 + rng.integers(0, 4, 80)]


def _dominated(rng: np.random.Generator) -> Codes:
    """One level of the second has most of the rows."""
    a, b = _crossed(rng, 12, 6)
    return [a, np.where(np.arange(90) < 70, 0, b)]


def _once(rng: np.random.Generator) -> Codes:
    """Most levels of the first occur in one row."""
    a = np.append(np.arange(40), rng.integers(0, 3, 30))
    return [a, rng.integers(0, 7, 70)]


def _forked(rng: np.random.Generator) -> Codes:
    """Small groups within one level each of two crossed factors."""
    group = np.arange(96) % 32
    return [group, (group * 5 // 4) % 8, group % 6]


DESIGNS: dict[str, tuple[Callable[[np.random.Generator], Codes], tuple[tuple[int, ...], ...]]] = {
    "crossed": (lambda rng: _crossed(rng, 12, 7), ((1,), (1,))),
    "smaller first": (lambda rng: _crossed(rng, 5, 11), ((1,), (1,))),
    "three crossed": (lambda rng: _crossed(rng, 11, 7, 4), ((1,), (1,), (1,))),
    "crossed slopes": (lambda rng: _crossed(rng, 9, 6), ((2,), (1, 1))),
    "three terms": (lambda rng: _crossed(rng, 7, 5, 4, rows=120), ((2, 1), (1,), (1, 1, 1))),
    "nested": (lambda rng: _nested(rng, 6, 4), ((1,), (1,))),
    "nested depth 3": (lambda rng: _nested(rng, 3, 3, 4), ((1,), (1,), (1,))),
    "nested depth 3, slopes": (lambda rng: _nested(rng, 3, 2, 3), ((2,), (1, 1), (2, 1))),
    "nested depth 4": (lambda rng: _nested(rng, 2, 2, 3, 3), ((1,), (1,), (2,), (1,))),
    "partially crossed": (_partial, ((1,), (2,))),
    "disconnected": (_disconnected, ((1,), (1, 1))),
    "one dominating level": (_dominated, ((2,), (1,))),
    "levels that occur once": (_once, ((1,), (1,))),
    "nested in two crossed": (_forked, ((1,), (2,), (1,))),
    "one factor": (lambda rng: _crossed(rng, 8), ((2, 1),)),
}
SPARSE = {name for name in DESIGNS if name.startswith("nested") and name != "nested in two crossed"} | {"one factor"}


@cache
def model(name: str, reml: bool, weights: bool = False, p: int = 2) -> DenseSeveral:
    rng = np.random.default_rng(len(name))
    make, sizes = DESIGNS[name]
    codes = make(rng)
    n, q = len(codes[0]), max(map(sum, sizes))
    columns = np.column_stack([np.ones(n), rng.normal(size=(n, max(p, q)))])
    factors = [Grouping(code, columns[:, : sum(size)], size) for code, size in zip(codes, sizes, strict=True)]
    w = rng.uniform(0.3, 3.0, n) if weights else np.ones(n)
    out = DenseSeveral(columns[:, :p], np.zeros(n), w, factors, reml)
    b = rng.normal(size=out.Z.shape[1])
    out.y = columns[:, :p] @ rng.normal(size=p) + out.Z @ b + rng.normal(size=n) / np.sqrt(w)
    return out


def lambda_of(truth: DenseSeveral, kind: str) -> np.ndarray:
    """A Λ: of full rank, with columns of zeros, with one factor out, or zero."""
    problem, rng = truth.problem(), np.random.default_rng(7)
    out = np.zeros((problem.offsets[-1],) * 2)
    for i, j in problem.entries:
        out[i, j] = rng.uniform(0.4, 1.2) if i == j else rng.normal() * 0.4
    if kind == "zero columns":
        out[:, [b - 1 for b in problem.offsets[1:]]] = 0.0
    elif kind == "one factor out":
        out[: problem.offsets[1]] = 0.0
    elif kind == "nothing":
        out[:] = 0.0
    return out


KINDS = ("regular", "zero columns", "one factor out", "nothing")
every_design = pytest.mark.parametrize("name", DESIGNS)
every_lambda = pytest.mark.parametrize("kind", KINDS)
either = pytest.mark.parametrize("reml", [True, False])


@every_design
@every_lambda
@pytest.mark.parametrize(("reml", "weights", "p"), [(True, True, 2), (False, True, 1), (False, False, 0)])
def test_the_likelihood_and_what_it_is_made_of(name: str, kind: str, reml: bool, weights: bool, p: int) -> None:
    truth = model(name, reml, weights, p)
    lambda_, problem = lambda_of(truth, kind), truth.problem()
    at, _ = Exact(problem).evaluate(lambda_)
    beta, rss, information = truth.gls(lambda_)
    assert at.loglik == pytest.approx(truth.loglik(lambda_), abs=1e-9)
    assert at.s2 == pytest.approx(rss / truth.degrees, rel=1e-10)
    np.testing.assert_allclose(at.beta, beta, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(at.C, np.linalg.inv(information) if p else np.zeros((0, 0)), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(at.u, truth.modes(lambda_), atol=1e-9)
    assert at.M.logdet == pytest.approx(np.linalg.slogdet(truth.M(lambda_))[1], abs=1e-9)


@pytest.mark.thinned(3)
@every_design
@every_lambda
@either
def test_the_score_is_the_derivative_of_the_likelihood(name: str, kind: str, reml: bool) -> None:
    truth = model(name, reml, weights=reml)
    problem, lambda_ = truth.problem(), lambda_of(truth, kind)
    look = Exact(problem).look(lambda_)
    slope = truth.score(lambda_, problem.entries)
    np.testing.assert_allclose(look.score, slope, atol=1e-7 * max(1.0, np.abs(slope).max()))
    assert look.loglik == pytest.approx(truth.loglik(lambda_), abs=1e-9)


@every_design
@every_lambda
def test_traces_also_where_lambda_is_singular(name: str, kind: str) -> None:
    truth = model(name, True, weights=True)
    exact, lambda_ = Exact(truth.problem()), lambda_of(truth, kind)
    want, M = truth.traces(lambda_), exact.factored(lambda_)
    for k, (got, direct) in enumerate(zip(exact.traces(lambda_, M), want, strict=True)):
        size = np.abs(direct).max() + 1.0
        np.testing.assert_allclose(np.tril(got), np.tril(direct), atol=1e-9 * size)
        np.testing.assert_allclose(exact._direct(lambda_, M, k), direct, atol=1e-9 * size)


def test_both_forms_of_the_traces_agree_where_lambda_is_small() -> None:
    """Above and below the diagonal from which Λ is taken to be invertible."""
    truth = model("crossed", True)
    exact = Exact(truth.problem())
    for size in (1e-4, 3e-4, 1e-3, 3e-3):
        lambda_ = size * np.eye(2)
        for got, want in zip(exact.traces(lambda_, exact.factored(lambda_)), truth.traces(lambda_), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-8)


@every_design
@every_lambda
@either
def test_the_average_information(name: str, kind: str, reml: bool) -> None:
    truth = model(name, reml, weights=not reml)
    problem, lambda_ = truth.problem(), lambda_of(truth, kind)
    got, want = Exact(problem).look(lambda_).outer, truth.average_information(lambda_, problem.entries)
    np.testing.assert_allclose(got, want, atol=1e-9 * max(1.0, np.abs(want).max()))
    assert np.linalg.eigvalsh(got)[0] > -1e-9 * max(1.0, np.abs(want).max())


@every_design
@every_lambda
def test_diagonal_blocks_of_the_inverse(name: str, kind: str) -> None:
    truth = model(name, True)
    lambda_ = lambda_of(truth, kind)
    want = truth.diagonal(np.linalg.inv(truth.M(lambda_)))
    for got, block in zip(Exact(truth.problem()).factored(lambda_).inverse_blocks(), want, strict=True):
        np.testing.assert_allclose(got, block, atol=1e-10)


@every_design
@every_lambda
def test_inner_products_with_the_inverse(name: str, kind: str) -> None:
    truth, rng = model(name, True), np.random.default_rng(11)
    lambda_, problem = lambda_of(truth, kind), truth.problem()
    M, inverse = Exact(problem).factored(lambda_), np.linalg.inv(truth.M(lambda_))
    P = [(a + a.T) / 2.0 for a in (rng.normal(size=(f.q, f.q)) for f in problem.factors)]
    blocks = truth.diagonal(inverse)
    for chosen in [[k] for k in range(len(P))] + [list(range(len(P)))]:
        given = [P[k] if k in chosen else None for k in range(len(P))]
        assert M.inner(given) == pytest.approx(sum(np.einsum("ab,abm->", P[k], blocks[k]) for k in chosen), abs=1e-9)
    own = {k: rng.normal(size=f.S.shape) for k, f in enumerate(problem.factors)}
    own = {k: (a + a.transpose(1, 0, 2)) / 2.0 for k, a in own.items()}
    cross = {pair: problem.cross(pair, *(rng.normal(size=(problem.factors[k].q,) * 2) for k in pair)) for pair in problem.cells}
    want = sum(float((own[k] * blocks[k]).sum()) for k in own)
    starts = np.cumsum([0, *(f.size for f in problem.factors)])
    for (k, h), a in cross.items():
        want += 2.0 * float((a.toarray() * inverse[starts[k] : starts[k + 1], starts[h] : starts[h + 1]]).sum())
    assert M.inner_blocks(own, cross) == pytest.approx(want, abs=1e-9 * (1.0 + abs(want)))


@every_design
def test_nested_designs_stay_sparse(name: str) -> None:
    truth = model(name, True)
    exact, rest = Exact(truth.problem()), Exact(truth.problem()).factored(lambda_of(truth, "regular")).rest
    assert exact.problem.stays_sparse == (name in SPARSE)
    seen = []
    while rest is not None:
        seen.append(type(rest))
        rest = rest.rest if isinstance(rest, Next | Nested) else None
    assert (Dense in seen) == (name not in SPARSE)
    assert len(seen) == len(truth.factors) - 1 or Dense in seen
    assert (Next in seen) == (name == "nested in two crossed")
    assert (Nested in seen) == (name in SPARSE and len(truth.factors) > 1)


def test_solving_multiplies_back() -> None:
    for name in DESIGNS:
        truth = model(name, True, weights=True)
        lambda_ = lambda_of(truth, "regular")
        b = np.random.default_rng(3).normal(size=(truth.Z.shape[1], 3))
        np.testing.assert_allclose(truth.M(lambda_) @ Exact(truth.problem()).factored(lambda_).solve(b), b, atol=1e-9)
        Z = truth.Z
        np.testing.assert_allclose(Exact(truth.problem()).times(b), Z.T @ (Z * truth.w[:, None]) @ b, atol=1e-9)


def test_single_effects_and_levels_are_each_others_inverse() -> None:
    values = np.arange(24.0).reshape(2, 3, 4)  # q, k, m
    assert flat(values).shape == (8, 3)
    assert flat(values)[0].tolist() == values[0, :, 0].tolist()
    assert flat(values)[1].tolist() == values[1, :, 0].tolist()
    np.testing.assert_array_equal(per_level(flat(values), 2), values)


def test_cells_in_any_order_give_the_same_matrix() -> None:
    truth = model("crossed slopes", True)
    problem = truth.problem()
    cells = problem.cells[0, 1]
    turned = np.random.default_rng(2).permutation(len(cells.rows))
    other = truth.problem()
    other.cells[0, 1] = type(cells)(cells.rows[turned], cells.columns[turned], cells.values[:, :, turned])
    left, right = np.array([[1.0, 0.0], [0.4, 0.7]]), np.diag([0.8, 0.3])
    a, b = problem.cross((0, 1), left, right), other.cross((0, 1), left, right)
    assert isinstance(a, sp.csr_matrix)
    np.testing.assert_allclose(a.toarray(), b.toarray())


def test_a_lambda_beyond_reason_is_refused_not_raised() -> None:
    """The search halves its step from a look without a likelihood."""
    truth = model("crossed", True)
    look = Exact(truth.problem()).look(np.full((2, 2), np.nan))
    assert not np.isfinite(look.loglik)


@pytest.mark.thinned(3)
@every_design
@either
def test_the_search_ends_where_no_dense_search_does_better(name: str, reml: bool) -> None:
    import scipy.optimize as so

    truth = model(name, reml)
    problem = truth.problem()
    start = np.array([1.0 if i == j else 0.0 for i, j in problem.entries])
    search = GLMMProblem(Exact(problem), np.zeros((0, 0)), problem.entries, problem.offsets[-1], False, problem.typical)
    found = solve_glmm(search, start, tol=1e-8, max_evaluations=200)
    assert found.converged
    assert found.loglik == pytest.approx(truth.loglik(found.lambda_), abs=1e-9)
    if name in ("three terms", "nested depth 3, slopes"):  # a dense search there would take longer than all other tests
        return

    def minus(theta: np.ndarray) -> float:
        lambda_ = np.zeros((problem.offsets[-1],) * 2)
        for (i, j), value in zip(problem.entries, theta, strict=True):
            lambda_[i, j] = value
        return -truth.loglik(lambda_)

    best = -so.minimize(minus, start, method="BFGS", options={"gtol": 1e-5}).fun
    assert found.loglik >= best - 1e-7
