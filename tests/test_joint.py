"""The joint Laplace approximation of several grouping factors against dense matrices, differences, and the exact path."""
from __future__ import annotations

import numpy as np
import pytest

from mlpipe.solve.coded_rows import Exactly
from mlpipe.solve.joint import Joint
from mlpipe.solve.kernel import Look, Point
from mlpipe.solve.link import Array
from mlpipe.solve.probes import Iterated, Probed

from .dense_glmm import PAIRS, difference
from .dense_joint import DenseJoint, crossed_codes, simulate_joint

CANONICAL = {("binomial", "logit"), ("poisson", "log"), ("gamma", "inverse"), ("gaussian", "identity")}
CASES = [(*pair, False) for pair in PAIRS]
CASES += [(*pair, True) for pair in PAIRS if pair not in CANONICAL and pair[0] != "negbinomial1"]
Structure = tuple[list[np.ndarray], tuple[int, ...]]


def structure(name: str) -> Structure:
    """Level codes of 40 rows, and how many random effects a level has."""
    rng = np.random.default_rng(1)
    inner = rng.permutation(np.arange(40) % 8)
    return {
        "crossed": (crossed_codes(rng, 40, [7, 4]), (1, 1)),
        "slopes": (crossed_codes(rng, 40, [7, 4]), (2, 1)),
        "nested": ([inner, inner // 2, inner // 4], (2, 1, 1)),
        "three": (crossed_codes(rng, 40, [6, 4, 3]), (1, 2, 1)),
        "within": ([rng.permutation(40), *crossed_codes(rng, 40, [6, 4])], (1, 1, 1)),  # a level a row
        "apart": ([inner, np.where(inner < 4, rng.integers(0, 2, 40), rng.integers(2, 4, 40))], (1, 1)),  # two designs that never meet
    }[name]


def made(name: str, family: str = "binomial", link: str = "logit", *, expected: bool = False) -> tuple[DenseJoint, Point, Joint]:
    """A simulated model, its parameters, and the library's evaluations of it, the rows in two parts."""
    codes, q = structure(name)
    model, point = simulate_joint(family, link, codes, q, seed=3, expected=expected, scale=0.5)
    return model, point, Joint(model.problem(parts=2), Exactly())


def look(joint: Joint, point: Point, *, outer: bool = False, u: Array | None = None) -> Look:
    return joint.look(point, joint.u if u is None else u, outer=outer)[0]


def coordinates(joint: Joint, point: Point) -> Array:
    """psi = (beta, theta, tau)."""
    parts = [point.gamma, [point.lambda_[i, j] for i, j in joint.problem.entries]]
    return np.concatenate([*parts, [point.tau]] if joint.problem.density.family.shape else parts)


def back(joint: Joint, psi: Array) -> Point:
    p, size = joint.problem.p, joint.problem.offsets[-1]
    lambda_ = np.zeros((size, size))
    for (i, j), value in zip(joint.problem.entries, psi[p:], strict=False):
        lambda_[i, j] = value
    return Point(psi[:p], lambda_, float(psi[-1]) if joint.problem.density.family.shape else 0.0)


def along(joint: Joint, point: Point, directions: int = 2) -> tuple[Array, Array]:
    """The score along some directions, and the same by differences of the log-likelihood."""
    psi, u = coordinates(joint, point), joint.look(point, joint.u, outer=False)[1]
    rng, score = np.random.default_rng(0), look(joint, point).score
    steps = rng.uniform(0.5, 1.0, (directions, len(psi))) * rng.choice([-1.0, 1.0], (directions, len(psi))) * np.maximum(np.abs(psi), 0.05)
    slopes = [difference(lambda t, v=v: look(joint, back(joint, psi + t * v), u=u).loglik, 1e-3) for v in steps]  # type: ignore[misc]
    return steps @ score, np.array(slopes)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("family", "link", "expected"), CASES)
def test_value_and_score(family: str, link: str, expected: bool) -> None:
    model, point, joint = made("slopes", family, link, expected=expected)
    found = look(joint, point, outer=True)
    assert found.loglik == pytest.approx(model.loglik(point), abs=1e-6)
    assert np.allclose(*along(joint, point), rtol=2e-7, atol=1e-6)
    assert np.linalg.eigvalsh(found.outer)[0] > 0.0
    assert not found.rough


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["crossed", "nested", "three", "within", "apart"])
@pytest.mark.parametrize(("family", "link"), [("binomial", "logit"), ("negbinomial", "log")])
def test_any_structure(name: str, family: str, link: str) -> None:
    model, point, joint = made(name, family, link)
    found = look(joint, point)
    assert found.loglik == pytest.approx(model.loglik(point), abs=1e-7)
    assert np.allclose(*along(joint, point, 3), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("zero", [[0], [2], [0, 1], [1]])
def test_score_where_lambda_is_singular(zero: list[int]) -> None:
    model, point, joint = made("slopes", "poisson", "log")
    point.lambda_[:, zero] = 0.0
    found = look(joint, point)
    assert found.loglik == pytest.approx(model.loglik(point), abs=1e-7)
    assert np.allclose(*along(joint, point, 3), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["slopes", "nested", "three"])
def test_posterior(name: str) -> None:
    model, point, joint = made(name, "poisson", "log")
    u, blocks = joint.posterior(point)
    dense = model.at(point)
    mode = dense.mode()
    assert np.allclose(u, mode, atol=1e-6)
    whole = dense.lambda_ @ np.linalg.inv(dense.hessian(mode)) @ dense.lambda_.T
    at = 0
    for factor, block in zip(model.factors, blocks, strict=True):
        places = at + np.arange(factor.levels * factor.q).reshape(-1, factor.q)
        assert np.allclose(block, whole[places[:, :, None], places[:, None, :]].transpose(1, 2, 0), atol=1e-6)
        at += factor.levels * factor.q


@pytest.mark.parametrize("start", [-6.0, 6.0])
@pytest.mark.parametrize(("family", "link"), [("binomial", "cauchit"), ("gamma", "identity"), ("binomial", "logit"), ("poisson", "log")])
def test_modes_from_a_bad_start(family: str, link: str, start: float) -> None:
    _, point, joint = made("crossed", family, link)
    near = joint.look(point, joint.u, outer=False)
    far = joint.look(point, joint.u + start, outer=False)
    assert np.allclose(near[1], far[1], atol=1e-6)
    assert near[0].loglik == pytest.approx(far[0].loglik, abs=1e-8)


def test_a_mean_outside_the_domain_is_no_likelihood() -> None:
    _, point, joint = made("crossed", "poisson", "identity")
    assert look(joint, Point(point.gamma - 100.0, point.lambda_, 0.0)).loglik == -np.inf


# -- iterative ---------------------------------------------------------------------------------------------------------


def probed(joint: Joint, seed: int, probes: int) -> Joint:
    solver = Probed(joint.problem.ends[-1] - joint.problem.ends[1], seed, threads=1)
    solver.tol = 1e-12
    solver.add(probes - solver.probes.shape[1])
    return Joint(joint.problem, solver)


def score(joint: Joint, point: Point) -> Array:
    with np.errstate(all="ignore"):
        u, _ = joint.mode(point, joint.u)
        return joint.score(joint.state(point, u, outer=True))


def every_sign(joint: Joint) -> Joint:
    """All 2^k sign vectors as probes: their mean has no Monte Carlo error."""
    out = probed(joint, 0, 16)
    assert isinstance(out.solver, Probed)
    k = len(out.solver.probes)
    out.solver.probes = np.array([[1.0 if bits >> i & 1 else -1.0 for bits in range(2**k)] for i in range(k)])
    out.solver.warm = None
    return out


@pytest.mark.parametrize(("name", "family", "link"), [
    ("crossed", "binomial", "logit"), ("slopes", "negbinomial", "log"), ("three", "poisson", "log"), ("within", "gamma", "log"),
])  # fmt: skip
def test_probes_of_every_sign_give_the_exact_score(name: str, family: str, link: str) -> None:
    _, point, joint = made(name, family, link)
    assert np.allclose(score(every_sign(joint), point), look(joint, point).score, rtol=1e-6, atol=1e-6)


def test_the_logdeterminant_by_lanczos() -> None:
    _, point, joint = made("three", "poisson", "log")
    both = [joint, every_sign(joint)]
    states = [each.state(point, each.mode(point, each.u)[0], outer=False) for each in both]
    found, error = states[1].M.lanczos() if isinstance(states[1].M, Iterated) else (0.0, 0.0)
    assert found == pytest.approx(states[0].M.logdet, abs=4.0 * error + 1e-8)


def test_the_stated_error_is_the_true_one() -> None:
    from mlpipe.solve.joint_iterative import _At, _Root

    _, point, joint = made("three", "binomial", "probit")
    exact = look(joint, point).score
    off, said = [], []
    for seed in range(24):
        own = probed(joint, seed, 16)
        assert isinstance(own.solver, Probed)
        psi = coordinates(own, point)
        state = own.state(point, own.mode(point, own.u)[0], outer=True)
        at = _At(psi, state, own.score(state), 0)
        each = _Root(own, own.solver, psi, np.eye(joint.problem.offsets[-1]), None)._each(at)
        off.append(at.score - exact)
        said.append(each.std(axis=1, ddof=1) / np.sqrt(each.shape[1]))
    ratio = np.sqrt(np.mean(np.square(off), axis=0) / np.mean(np.square(said), axis=0))
    assert (ratio > 0.55).all() and (ratio < 1.7).all()


def test_parts_and_order_of_rows_do_not_matter() -> None:
    model, point, joint = made("three", "gamma", "log")
    looks = [look(Joint(model.problem(parts), Exactly()), point, outer=True) for parts in (1, 5)]
    assert looks[0].loglik == pytest.approx(looks[1].loglik, rel=1e-13)
    assert np.allclose(looks[0].score, looks[1].score, rtol=1e-9, atol=1e-9)
    assert np.allclose(looks[0].outer, looks[1].outer, rtol=1e-9, atol=1e-9)
