"""Folded nested designs against dense matrices of all their levels."""
from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from mlpipe.solve.crossed import Exact
from mlpipe.solve.folding import folded
from mlpipe.solve.refit import refit
from mlpipe.solve.several_factors import squares
from mlpipe.solve.surfaces import LevelSurface

from .dense_several import DenseSeveral, Grouping
from .test_crossed import KINDS, lambda_of

DESIGNS = {  # terms of each factor, whether each innermost level has a covariate of its own
    "intercepts": (((1,), (1,), (1,)), False),
    "slopes above": (((1,), (2,), (1, 1)), True),
    "two factors": (((1,), (1,)), False),
    "slope alone": (((1,), (1,), (1,)), True),
}


@cache
def model(name: str, reml: bool) -> DenseSeveral:
    """Three, two or one rows a child, children in parents of several sizes, and one child without brothers."""
    rng = np.random.default_rng(5)
    sizes, own = DESIGNS[name]
    parent = np.sort(np.append(np.arange(6), rng.integers(0, 5, 154)))
    child = np.repeat(np.arange(160), rng.choice([1, 2, 3], 160, p=[0.1, 0.4, 0.5]))
    codes = [child, parent[child], parent[child] // 2][: len(sizes)]
    x = (child % 2 + 1.0) if own else rng.normal(size=len(child))
    columns = np.column_stack([x, np.ones(len(child))] if name == "slope alone" else [np.ones(len(child)), x])
    factors = [Grouping(code, columns[:, : sum(size)], size) for code, size in zip(codes, sizes, strict=True)]
    X = np.column_stack([np.ones(len(child)), rng.normal(size=len(child))])
    y = X @ [1.0, 2.0] + rng.normal(size=6)[parent[child]] + rng.normal(size=160)[child] + rng.normal(size=len(child))
    return DenseSeveral(X, y, np.ones(len(child)), factors, reml)


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reml", [True, False])
def test_likelihood_score_and_information_are_those_of_all_levels(name: str, kind: str, reml: bool) -> None:
    truth = model(name, reml)
    whole, lambda_ = truth.problem(), lambda_of(truth, kind)
    inside = folded(whole)
    assert inside.factors[0].levels < whole.factors[0].levels / 1.5
    assert inside.factors[0].all_levels == whole.factors[0].levels
    np.testing.assert_allclose(inside.typical, whole.typical, rtol=1e-14)
    look, plain = Exact(inside).look(lambda_), Exact(whole).look(lambda_)
    assert look.loglik == pytest.approx(truth.loglik(lambda_), abs=1e-9)
    np.testing.assert_allclose(look.score, plain.score, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(look.outer, plain.outer, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["intercepts", "slopes above"])
def test_profiles_and_refits_of_like_levels(name: str) -> None:
    truth = model(name, False)
    problem, lambda_ = truth.problem(), lambda_of(truth, "regular")
    assert folded(problem) is not problem
    theta = np.array([lambda_[i, j] for i, j in problem.entries])
    surface = LevelSurface(problem)
    phi = np.append([lambda_[i, j] for i, j in squares(surface.sizes)], 0.5 * np.log(truth.gls(lambda_)[1] / truth.degrees))
    at = surface.look(phi, None)
    assert at.value == pytest.approx(-2.0 * truth.loglik(lambda_), abs=1e-8)
    for k, slope in enumerate(at.gradient):
        step = 1e-5 * np.eye(len(phi))[k]
        ahead, behind = (surface.look(phi + sign * step, None).value for sign in (1.0, -1.0))
        assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-5, abs=1e-5)
    found = refit(problem, theta)
    assert found.converged
    assert found.value == pytest.approx(-2.0 * truth.loglik(found.lambda_), abs=1e-8)
    np.testing.assert_allclose(Exact(problem).look(found.lambda_).score, 0.0, atol=1e-4)


def test_levels_in_any_order_fold_alike() -> None:
    truth = model("intercepts", True)
    moved = np.random.default_rng(1).permutation(160)
    factors = [Grouping(moved[truth.factors[0].codes], truth.factors[0].Z, (1,)), *truth.factors[1:]]
    other = DenseSeveral(truth.X, truth.y, truth.w, factors, True)
    lambda_ = lambda_of(truth, "regular")
    look, again = (Exact(folded(part.problem())).look(lambda_) for part in (truth, other))
    np.testing.assert_allclose(again.score, look.score, rtol=1e-10)


@pytest.mark.parametrize("why", ["weights", "crossed", "slopes", "one factor"])
def test_what_has_no_like_levels_is_left_alone(why: str) -> None:
    rng, truth = np.random.default_rng(2), model("intercepts", True)
    n, factors, w = len(truth.y), truth.factors, truth.w
    if why == "weights":
        w = rng.uniform(1.0, 2.0, n)
    elif why == "crossed":
        factors = [factors[0], Grouping(rng.permutation(factors[1].codes), factors[1].Z, (1,))]
    elif why == "slopes":
        factors = [Grouping(factors[0].codes, truth.X, (2,)), *factors[1:]]
    else:
        factors = factors[:1]
    problem = DenseSeveral(truth.X, truth.y, w, factors, True).problem()
    assert folded(problem) is problem
