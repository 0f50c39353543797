"""Exact second derivatives of the Laplace approximation against differences of the exact score."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlpipe.solve.density import density
from mlpipe.solve.hessian import has_hessian, hessian
from mlpipe.solve.kernel import Chunk, Kernel, Point
from mlpipe.solve.link import Array
from tests.dense_glmm import PAIRS, DenseGLMM, gradient, simulate

FOURTH = [("binomial", "logit"), ("poisson", "log")]


def model_of(family: str, link: str, slope: bool, seed: int = 0) -> DenseGLMM:
    """One random effect a block, of a constant or of a covariate."""
    model = simulate(family, link, 1, seed=seed, blocks=5, rows=(3, 9))
    if slope:
        model.Z = np.random.default_rng(seed).uniform(-1.5, 1.5, model.Z.shape)
    return model


def kernel(model: DenseGLMM, nagq: int = 1) -> Kernel:
    return Kernel(density(model.family, model.link), (model.X.shape[1],), np.eye(1), ((0, 0),), nagq)


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("lambda_", [0.9, -0.4, 0.0, 4.0])
@pytest.mark.parametrize(("family", "link"), FOURTH)
def test_second_derivatives(family: str, link: str, lambda_: float, slope: bool) -> None:
    model = replace(model_of(family, link, slope), lambda_=np.array([[lambda_]]))
    made, chunk, zeros = kernel(model), model.chunk(), np.zeros((1, 5))

    def score(psi: Array) -> Array:
        return made.look(chunk, Point(psi[:-1], psi[-1:, None], 0.0), zeros)[0].score

    psi = np.r_[model.point.gamma, lambda_]
    found = hessian(made, chunk, model.point, zeros)
    np.testing.assert_allclose(found, found.T, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found, gradient(score, psi, np.full(len(psi), 5e-4)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("family", "link"), FOURTH)
def test_a_long_block_in_pieces(family: str, link: str) -> None:
    model = simulate(family, link, 1, seed=3, blocks=1, rows=(30, 31))
    n = len(model.y)
    pieces = tuple(model.rows(np.arange(a, b)).library_rows() for a, b in ((0, 11), (11, 12), (12, n)))
    whole, parts = (hessian(kernel(model), chunk, model.point, np.zeros((1, 1))) for chunk in (model.chunk(), Chunk(pieces, 0, 1)))
    np.testing.assert_allclose(parts, whole, rtol=1e-10)


def test_who_has_them() -> None:
    for family, link in PAIRS:
        model = model_of(family, link, False)
        assert has_hessian(kernel(model)) == ((family, link) in FOURTH)
        assert not has_hessian(kernel(model, 3))
        assert not has_hessian(replace(kernel(model), z=(2, 3), z_map=np.eye(2)))
