"""The block kernel of GLMMs against brute-force integrals, dense Laplace approximations and differences."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mlpipe.solve import small
from mlpipe.solve.density import density
from mlpipe.solve.family import FAMILIES
from mlpipe.solve.kernel import Chunk, Kernel, Look, Point, Rows, folded
from mlpipe.solve.link import Array
from tests.dense_glmm import PAIRS, DenseGLMM, centre, gradient, packed, simulate

CASES = [(*pair, expected) for pair in PAIRS for expected in (False, True) if FAMILIES[pair[0]].expected or not expected]
SCORES = [  # q = 2 with several nodes is dear: one curvature for each number of nodes
    (family, link, expected, q, nagq)
    for family, link, expected in CASES
    for q, nagq in [(1, 1), (1, 3), (1, 5), (2, 1), (2, 3), (2, 5)]
    if (q, nagq) not in ((2, 3), (2, 5)) or expected == (nagq == 3) or not FAMILIES[family].expected
]
STARTS = [  # without those on the other side of zero where the link gives a mean of the same kind again, and so another mode
    (family, link, start)
    for family, link in PAIRS
    for start in (-20.0, -3.0, 3.0, 20.0)
    if start > -10.0 or link != "sqrt" and (family, link) != ("gaussian", "inverse")
]
LAMBDAS = {  # singular ones, in units of the spread
    "zero": [[0.0, 0.0], [0.0, 0.0]],
    "no slope": [[1.0, 0.0], [0.0, 0.0]],
    "rank one": [[1.0, 0.0], [0.5, 0.0]],
    "no intercept": [[0.0, 0.0], [0.0, 0.8]],
    "zero above": [[0.0, 0.0], [0.7, 0.8]],
    "negative": [[-0.6, 0.0], [0.3, -0.4]],
}


def entries(q: int) -> tuple[tuple[int, int], ...]:
    """The lower triangle by columns."""
    return tuple((i, j) for j in range(q) for i in range(j, q))


def kernel(model: DenseGLMM, nagq: int = 1) -> Kernel:
    """The kernel of a model whose features are [X, Z]."""
    q, m = model.Z.shape[1], model.X.shape[1]
    made = density(model.family, model.link, expected=model.expected)
    return Kernel(made, tuple(range(m, m + q)), np.eye(q), entries(q), nagq)


def zeros(chunk: Chunk, q: int) -> Array:
    return np.zeros((q, chunk.n_blocks))


def look(model: DenseGLMM, nagq: int = 1, point: Point | None = None, chunk: Chunk | None = None) -> Look:
    """A look from zero modes."""
    chunk = model.chunk() if chunk is None else chunk
    return kernel(model, nagq).look(chunk, model.point if point is None else point, zeros(chunk, model.Z.shape[1]))[0]


def parameters(model: DenseGLMM) -> tuple[Array, Callable[[Array], Point], Array]:
    """Gamma (over X and Z), the elements of Λ and tau as a vector, the way back, and a small step of each."""
    point, free = model.point, entries(model.Z.shape[1])
    m, spread = len(point.gamma), centre(model.family, model.link)[1]
    shape = FAMILIES[model.family].shape
    psi = np.r_[point.gamma, [point.lambda_[i, j] for i, j in free], [model.tau] * shape]

    def back(psi: Array) -> Point:
        lambda_ = np.zeros_like(point.lambda_)
        for (i, j), value in zip(free, psi[m:], strict=False):
            lambda_[i, j] = value
        return Point(psi[:m], lambda_, float(psi[-1]) if shape else 0.0)

    return psi, back, np.r_[np.full(m + len(free), 0.01 * spread), [0.01] * shape]


def assert_same(found: Look, true: Look, tolerance: float = 1e-10) -> None:
    scale = np.sqrt(np.abs(np.diag(true.outer)))
    np.testing.assert_allclose(found.loglik, true.loglik, rtol=tolerance)
    np.testing.assert_allclose(found.score, true.score, rtol=tolerance, atol=tolerance * scale.max())
    np.testing.assert_allclose(found.outer, true.outer, rtol=tolerance, atol=tolerance * scale.max() ** 2)
    assert found.rough == true.rough


# ---- likelihood


@pytest.mark.parametrize(("family", "link"), PAIRS)
@pytest.mark.parametrize(("q", "nodes", "nagq"), [(1, 401, 25), (2, 121, 17)])
def test_integral(family: str, link: str, q: int, nodes: int, nagq: int) -> None:
    model = simulate(family, link, q, seed=q, blocks=2)
    model.lambda_ = 0.6 * model.lambda_
    true = sum(block.integral(nodes, 6.5) for block in model.blocks)
    np.testing.assert_allclose(look(model, nagq).loglik, true, rtol=2e-8)


def test_integral_of_three_effects() -> None:
    model = simulate("binomial", "logit", 3, seed=5, blocks=1, rows=(5, 6))
    np.testing.assert_allclose(look(model, 9).loglik, model.integral(41), rtol=1e-7)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("family", "link", "expected"), CASES)
@pytest.mark.parametrize("q", [1, 2])
def test_laplace(family: str, link: str, expected: bool, q: int) -> None:
    model = simulate(family, link, q, seed=10 + q, expected=expected)
    found = look(model)
    np.testing.assert_allclose(found.loglik, sum(block.laplace() for block in model.blocks), rtol=1e-8)
    assert found.rough == 0


def test_gaussian_with_identity_is_exact_at_any_number_of_nodes() -> None:
    model = simulate("gaussian", "identity", 2, seed=4)
    values = [look(model, nagq).loglik for nagq in (1, 2, 5)]
    true = 0.0
    for block in model.blocks:
        ZL = block.Z @ model.lambda_
        V = ZL @ ZL.T + np.diag(1.0 / (block.weight * np.exp(model.tau)))
        r = block.y - block.X @ model.gamma - block.offset
        true -= 0.5 * (len(r) * np.log(2 * np.pi) + np.linalg.slogdet(V)[1] + r @ np.linalg.solve(V, r))
    np.testing.assert_allclose(values, true, rtol=1e-12)


@pytest.mark.parametrize("nagq", [1, 5])
@pytest.mark.parametrize(("family", "link"), PAIRS)
def test_no_random_effect_is_the_plain_likelihood(family: str, link: str, nagq: int) -> None:
    model = replace(simulate(family, link, 2, seed=6), lambda_=np.zeros((2, 2)))
    true = model.log_f(model.eta(np.zeros((2, 1)))).sum()
    np.testing.assert_allclose(look(model, nagq).loglik, true, rtol=1e-11)


# ---- score


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("family", "link", "expected", "q", "nagq"), SCORES)
def test_score(family: str, link: str, expected: bool, q: int, nagq: int) -> None:
    model = simulate(family, link, q, seed=20 + q, expected=expected)
    psi, back, h = parameters(model)
    m = len(model.gamma)
    used = [*range(m), *range(m + q, len(psi))]  # without the features that only Z needs
    directions = np.diag(h)[:, used]
    if nagq > 1:  # dear: all elements at once, twice
        directions = directions @ np.random.default_rng(0).uniform(0.5, 1.0, (len(used), 2)) * [1.0, 0.7]
        directions[m + q :, 1] *= -1.0

    def value(t: Array) -> float:
        return look(model, nagq, back(psi + directions @ t)).loglik

    k = directions.shape[1]
    np.testing.assert_allclose(look(model, nagq).score @ directions, gradient(value, np.zeros(k), np.ones(k)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("lambda_", LAMBDAS.values(), ids=LAMBDAS.keys())
@pytest.mark.parametrize(("family", "link"), [("binomial", "logit"), ("gamma", "log"), ("negbinomial", "sqrt")])
@pytest.mark.parametrize("nagq", [1, 3])
def test_score_where_lambda_is_singular(family: str, link: str, nagq: int, lambda_: list[list[float]]) -> None:
    model = simulate(family, link, 2, seed=31)
    model.lambda_ = centre(family, link)[1] * np.array(lambda_)
    psi, back, h = parameters(model)
    h = 0.2 * h
    found = look(model, nagq).score * h
    np.testing.assert_allclose(found, gradient(lambda v: look(model, nagq, back(v)).loglik, psi, h) * h, rtol=1e-6, atol=1e-9)


def test_score_with_three_effects_and_a_partial_triangle() -> None:
    model = simulate("poisson", "log", 3, seed=8)
    free = ((0, 0), (1, 0), (1, 1), (2, 2))
    model.lambda_[2, :2] = 0.0
    chunk = model.chunk()
    made = replace(kernel(model, 3), entries=free)

    def value(theta: Array) -> float:
        lambda_ = np.zeros((3, 3))
        for (i, j), v in zip(free, theta, strict=True):
            lambda_[i, j] = v
        return made.look(chunk, replace(model.point, lambda_=lambda_), zeros(chunk, 3))[0].loglik

    theta = np.array([model.lambda_[i, j] for i, j in free])
    found = made.look(chunk, model.point, zeros(chunk, 3))[0].score[-4:]
    np.testing.assert_allclose(found, gradient(value, theta, np.full(4, 0.005)), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("family", "link"), [("binomial", "log"), ("binomial", "identity"), ("poisson", "identity"), ("inverse_gaussian", "1/mu^2")]
)
@pytest.mark.parametrize(("q", "nagq"), [(1, 25), (2, 9)])
def test_nodes_outside_the_domain_count_nothing(family: str, link: str, q: int, nagq: int) -> None:
    """A spread so wide that the grid leaves the domain."""
    model = simulate(family, link, q, seed=40)
    model.lambda_ = 6.0 * model.lambda_
    chunk = model.chunk()
    with np.errstate(all="ignore"):
        found, modes = kernel(model, nagq).look(chunk, model.point, zeros(chunk, q))
        small = [block.joint(u[:, None])[0] for block, u in zip(model.blocks, modes.T, strict=True)]
    assert np.isfinite(small).all() and found.rough == 0
    assert np.isfinite(found.loglik) and np.isfinite(found.score).all() and np.isfinite(found.outer).all()


# ---- sums over blocks


@pytest.mark.parametrize(
    ("family", "link", "expected"), [("binomial", "probit", True), ("negbinomial1", "log", False), ("beta", "logit", True)]
)
@pytest.mark.parametrize(("q", "nagq"), [(1, 1), (1, 5), (2, 1), (2, 3)])
def test_any_chunking_gives_the_same_sums(family: str, link: str, expected: bool, q: int, nagq: int) -> None:
    model = simulate(family, link, q, seed=50, blocks=7, expected=expected)
    whole = look(model, nagq)
    single = [look(block, nagq) for block in model.blocks]
    assert_same(folded(single), whole)
    np.testing.assert_allclose(whole.outer, sum(np.outer(one.score, one.score) for one in single), rtol=1e-10, atol=1e-10)
    for cut in (1, 3, 6):
        parts = [look(model.rows(model.block < cut), nagq), look(model.rows(model.block >= cut), nagq)]
        assert_same(folded(parts), whole)


@pytest.mark.parametrize(("family", "link", "expected"), [case for case in CASES if case[1] in ("logit", "log", "identity", "1/mu^2")])
@pytest.mark.parametrize(("q", "nagq"), [(1, 1), (2, 3)])
def test_a_long_block_in_pieces(family: str, link: str, expected: bool, q: int, nagq: int) -> None:
    model = simulate(family, link, q, seed=60, blocks=1, rows=(30, 31), expected=expected)
    n = len(model.y)
    pieces = tuple(model.rows(np.arange(a, b)).library_rows() for a, b in ((0, 11), (11, 12), (12, n)))
    assert_same(look(model, nagq, chunk=Chunk(pieces, 0, 1)), look(model, nagq), 1e-9)
    made, start = kernel(model, nagq), np.zeros((q, 1))
    for in_pieces, whole in zip(
        made.posterior(Chunk(pieces, 0, 1), model.point, start), made.posterior(model.chunk(), model.point, start), strict=True
    ):
        np.testing.assert_allclose(in_pieces, whole, rtol=1e-9, atol=1e-11)


def test_blocks_keep_their_place() -> None:
    """Modes come in the order of the blocks, and a chunk knows where its blocks stand."""
    model = simulate("poisson", "log", 1, seed=3, blocks=4)
    chunk = model.chunk(first=5)
    _, u = kernel(model).look(chunk, model.point, zeros(chunk, 1))
    assert chunk.blocks == slice(5, 9)
    np.testing.assert_allclose(u[0], [block.mode()[0] for block in model.blocks], rtol=1e-7, atol=1e-9)


# ---- data


@pytest.mark.parametrize(("family", "link", "expected"), CASES)
@pytest.mark.parametrize(("q", "nagq"), [(1, 1), (2, 3)])
def test_cells_are_repeated_rows(family: str, link: str, expected: bool, q: int, nagq: int) -> None:
    model = simulate(family, link, q, seed=70, blocks=3, expected=expected)
    repeats = 1 + np.arange(len(model.y)) % 4
    cell = np.repeat(np.arange(len(repeats)), repeats)
    rows = model.rows(cell)
    kind = FAMILIES[family]
    if not kind.keyed:  # the rows of a cell share all but the response
        rng = np.random.default_rng(1)
        match family:
            case "binomial":
                rows.y = rng.binomial(rows.size.astype(int), 0.4) / rows.size
            case "poisson":
                rows.y = rows.y + rng.integers(0, 5, len(cell))
            case "beta":
                rows.y = rng.uniform(0.1, 0.9, len(cell))
            case _:
                rows.y = rows.y * rng.uniform(0.7, 1.4, len(cell))
    cells = packed(family, rows.y, rows.size, rows.weight, cell)
    chunk = Chunk((replace(model.library_rows(), cells=cells),), 0, 3)
    assert_same(look(model, nagq, chunk=chunk), look(rows, nagq), 1e-9)


@pytest.mark.parametrize("nagq", [1, 3])
def test_an_offset_is_a_feature_with_coefficient_one(nagq: int) -> None:
    model = simulate("poisson", "log", 2, seed=80)
    rows, point = model.library_rows(), model.point
    with_feature = Rows(np.vstack([rows.F, model.offset]), None, rows.cells, rows.starts)
    found = look(model, nagq, replace(point, gamma=np.r_[point.gamma, 1.0]), Chunk((with_feature,), 0, 3))
    true = look(model, nagq)
    kept = [k for k in range(len(found.score)) if k != len(rows.F)]
    assert_same(Look(found.loglik, found.score[kept], found.outer[np.ix_(kept, kept)]), true)


@pytest.mark.parametrize("nagq", [1, 3])
def test_random_columns_as_a_map_of_features(nagq: int) -> None:
    """Z = z_map'F[z], as of a shifted and scaled column."""
    model = simulate("binomial", "cloglog", 2, seed=81)
    z_map = np.array([[1.0, -0.7], [0.0, 2.5]])
    mapped = replace(model, Z=model.Z @ z_map)
    chunk = model.chunk()
    made = replace(kernel(model, nagq), z_map=z_map)
    assert made.q == 2
    found, u = made.look(chunk, model.point, zeros(chunk, 2))
    true = look(mapped, nagq)
    np.testing.assert_allclose(found.loglik, true.loglik, rtol=1e-12)
    gamma = len(model.gamma)
    np.testing.assert_allclose(np.delete(found.score, [gamma, gamma + 1]), np.delete(true.score, [gamma, gamma + 1]), rtol=1e-9)
    np.testing.assert_allclose(found.score[gamma : gamma + 2] @ z_map, true.score[gamma : gamma + 2], rtol=1e-9)


# ---- modes


@pytest.mark.parametrize(("family", "link", "expected"), CASES)
@pytest.mark.parametrize("q", [1, 2])
def test_posterior(family: str, link: str, expected: bool, q: int) -> None:
    model = simulate(family, link, q, seed=90 + q, expected=expected)
    chunk = model.chunk()
    u, P = kernel(model).posterior(chunk, model.point, zeros(chunk, q))
    for k, block in enumerate(model.blocks):
        mode = block.mode()
        np.testing.assert_allclose(u[:, k], mode, rtol=1e-6, atol=1e-8)
        true = model.lambda_ @ np.linalg.solve(block.hessian(mode), model.lambda_.T)
        np.testing.assert_allclose(P[:, :, k] @ P[:, :, k].T, true, rtol=1e-6, atol=1e-8 * np.abs(true).max())


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("family", "link", "start"), STARTS)
def test_modes_from_a_bad_start(family: str, link: str, start: float) -> None:
    model = simulate(family, link, 2, seed=100)
    chunk = model.chunk()
    with np.errstate(all="ignore"):
        found, u = kernel(model).look(chunk, model.point, np.full((2, 3), start))
    assert found.rough == 0
    np.testing.assert_allclose(u.T, [block.mode() for block in model.blocks], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("link", ["logit", "probit", "cloglog"])
@pytest.mark.parametrize("start", [-12.0, -4.0, 4.0, 12.0])
def test_modes_of_a_wide_binomial_from_a_bad_start(link: str, start: float) -> None:
    """Linear predictors of 12 to 36, where the mean and its derivatives underflow."""
    model = simulate("binomial", link, 1, seed=101)
    model.lambda_ = np.array([[3.0]])
    chunk = model.chunk()
    with np.errstate(all="ignore"):
        found, u = kernel(model).look(chunk, model.point, np.full((1, 3), start))
    assert found.rough == 0
    np.testing.assert_allclose(u.T, [block.mode() for block in model.blocks], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("y", [0.02, 0.98])
def test_modes_of_extreme_shares(y: float) -> None:
    """The beta density is not concave on the logit scale: responses near an end, a start on the other side."""
    model = simulate("beta", "logit", 1, seed=102)
    model.y = np.full_like(model.y, y)
    model.gamma = np.array([-2.0 * np.sign(y - 0.5), 0.0])
    model.lambda_ = np.array([[2.0]])
    chunk = model.chunk()
    for start in (-2.0, 0.0, 2.0):
        found, u = kernel(model).look(chunk, model.point, np.full((1, 3), start))
        assert found.rough == 0
        np.testing.assert_allclose(u.T, [block.mode() for block in model.blocks], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("nagq", [1, 3])
@pytest.mark.parametrize(
    ("family", "link"), [("poisson", "identity"), ("gamma", "inverse"), ("inverse_gaussian", "1/mu^2"), ("binomial", "log")]
)
def test_a_mean_outside_the_domain_is_no_likelihood(family: str, link: str, nagq: int) -> None:
    """Coefficients that no random effect of plausible size brings back: minus infinity, which a search can refuse, never NaN."""
    model = simulate(family, link, 1, seed=104)
    model.gamma = -model.gamma
    with np.errstate(all="ignore"):
        assert look(model, nagq).loglik == -np.inf


@pytest.mark.parametrize("q", [1, 2, 4])
def test_small_matrices(q: int) -> None:
    rng = np.random.default_rng(q)
    A = rng.normal(size=(5, q, q + 2))
    H = A @ A.transpose(0, 2, 1)
    L, v = small.cholesky(H.transpose(1, 2, 0)), rng.normal(size=(q, 5))
    np.testing.assert_allclose(L.transpose(2, 0, 1), np.linalg.cholesky(H), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(small.solve(L, v).T, np.linalg.solve(H, v.T[:, :, None])[:, :, 0], rtol=1e-8)
    np.testing.assert_allclose(np.einsum("jib,jb->ib", L, small.backward(L, v)), v, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(np.einsum("ijb,jkb->ikb", L, small.inverse_factor(L)), np.eye(q)[:, :, None].repeat(5, 2), atol=1e-10)
    np.testing.assert_allclose(small.logdet(L), np.linalg.slogdet(H)[1], rtol=1e-9, atol=1e-12)
    H[2] -= 2.0 * np.linalg.eigvalsh(H[2])[0] * np.eye(q)
    found = small.cholesky(H.transpose(1, 2, 0))
    assert np.isnan(found[-1, -1]).tolist() == [False, False, True, False, False]


def test_a_good_start_is_not_left() -> None:
    model = simulate("gamma", "inverse", 2, seed=103)
    chunk = model.chunk()
    first, u = kernel(model).look(chunk, model.point, zeros(chunk, 2))
    again, v = kernel(model).look(chunk, model.point, u)
    np.testing.assert_allclose(v, u, rtol=1e-9, atol=1e-12)
    assert_same(again, first)
