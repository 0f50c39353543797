"""Links, families and densities against scipy.stats, differences and sums over rows."""
from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.integrate as si
import scipy.special as sp
import scipy.stats as st

from mlpipe.solve.density import Density, density
from mlpipe.solve.family import FAMILIES, Cells
from mlpipe.solve.link import LINKS, Array
from tests.dense_glmm import COUNTS, MEANS, PAIRS, TAU, centre, constant, difference, draw, information, log_density, packed, statistics

CURVATURES = [(*pair, expected) for pair in PAIRS for expected in (False, True) if FAMILIES[pair[0]].expected or not expected]
WHOLE_LINE = ("logit", "probit", "cloglog", "cauchit", "log")  # links of which every eta is a proper mean of every row
TAILS = [pair for pair in PAIRS if pair[1] in WHOLE_LINE and pair != ("binomial", "log") and pair != ("beta", "log")]
N = 40


def sample(family: str, link: str, n: int = N, seed: int = 0) -> tuple[Array, Cells]:
    """Linear predictors in the domain, and responses that may be far from their means."""
    rng = np.random.default_rng(seed)
    eta, spread = centre(family, link)
    etas = eta + 2.0 * spread * rng.uniform(-1.0, 1.0, n)
    size = rng.integers(1, 9, n).astype(float) if family == "binomial" else rng.uniform(0.5, 3.0, n)
    weight = rng.uniform(0.5, 2.0, n)
    y = draw(rng, family, MEANS[link](eta + 0 * etas), size, weight, TAU.get(family, 0.0))
    return etas, Cells(y, size, weight, statistics(family, y))


def truth(family: str, link: str, eta: Array, c: Cells, tau: float) -> Array:
    """log f by scipy.stats, without the constant."""
    assert c.size is not None and c.weight is not None
    return log_density(family, MEANS[link](eta), c.y, c.size, c.weight, tau) - constant(family, c.y, c.size)


def close(found: Array, true: Array, tolerance: float = 1e-9, scale: float = 0.0) -> None:
    """Equal, relative to the size of the larger ones of `true`, or to `scale` where they may be zero."""
    np.testing.assert_allclose(found, true, rtol=tolerance, atol=tolerance * max(np.abs(true).max(), scale))


# ---- links


@pytest.mark.parametrize("name", LINKS)
def test_link_and_its_derivatives(name: str) -> None:
    eta = np.linspace(0.05, 3.0, 30) if name in ("inverse", "1/mu^2", "sqrt") else np.linspace(-4.0, 1.2, 30)
    m = LINKS[name].means(eta)
    close(m.mu, MEANS[name](eta), 1e-14)
    close(m.nu, 1.0 - m.mu, 1e-14)
    np.testing.assert_allclose([LINKS[name].function(v) for v in m.mu], eta, rtol=1e-9, atol=1e-12)
    width = eta.clip(0.01, 1.0)
    for found, lower in ((m.d1, "mu"), (m.d2, "d1"), (m.d3, "d2")):
        close(found, difference(lambda t, k=lower: getattr(LINKS[name].means(eta + t * width), k), 1e-3) / width, 1e-9)


@pytest.mark.parametrize(
    ("name", "log_mu", "log_nu"),
    [
        ("logit", sp.log_expit, lambda eta: sp.log_expit(-eta)),
        ("probit", sp.log_ndtr, lambda eta: sp.log_ndtr(-eta)),
        ("cloglog", lambda eta: np.log(-np.expm1(-np.exp(eta))), lambda eta: -np.exp(eta)),
        ("cauchit", st.cauchy.logcdf, st.cauchy.logsf),
    ],
)
def test_small_means_keep_their_digits(name: str, log_mu: object, log_nu: object) -> None:
    eta = np.linspace(-36.0, 36.0, 73) if name != "cloglog" else np.linspace(-36.0, 6.0, 73)
    m = LINKS[name].means(eta)
    np.testing.assert_allclose(np.log(m.mu), log_mu(eta), rtol=1e-12, atol=1e-15)  # type: ignore[operator]
    np.testing.assert_allclose(np.log(m.nu), log_nu(eta), rtol=1e-12, atol=1e-15)  # type: ignore[operator]


@pytest.mark.parametrize(("family", "link"), PAIRS)
def test_domains(family: str, link: str) -> None:
    """Outside the family's domain log f is minus infinity and the derivatives are zero; rows inside are as they were."""
    d, (eta, c) = density(family, link), sample(family, link)
    tau = TAU.get(family, 0.0)
    outer = np.array([v for v in (-50.0, -5.0, 0.0, 5.0, 50.0) if not _inside(family, link, v)])
    for value in outer:
        mixed = np.where(np.arange(N) == 3, value, eta)
        terms, plain = d.terms(mixed, c, tau), d.terms(eta, c, tau)
        assert terms.value[3] == -np.inf and d.loglik(mixed, c, tau)[3] == -np.inf
        for found, before in zip(terms, plain, strict=True):
            if found is not None and before is not None:
                np.testing.assert_array_equal(np.delete(found, 3), np.delete(before, 3))
        assert all(v is None or v[3] == 0.0 for v in terms[1:])
        assert all(v[3] == 0.0 for v in d.newton(mixed, c, tau)) and d.safe_curvature(mixed, c, tau)[3] == 0.0


def _inside(family: str, link: str, eta: float) -> bool:
    with np.errstate(all="ignore"):
        mu = MEANS[link](np.array([eta]))[0]
    return family == "gaussian" or link in WHOLE_LINE[:4] or bool(FAMILIES[family].low < mu < FAMILIES[family].high)


# ---- log-densities


@pytest.mark.parametrize(("family", "link"), PAIRS)
@pytest.mark.parametrize("bare", [False, True])
def test_log_density(family: str, link: str, bare: bool) -> None:
    eta, c = sample(family, link)
    ones = np.ones(N)
    full = replace(c, size=ones if family != "binomial" else c.size, weight=ones) if bare else c
    given = replace(full, size=None if family != "binomial" else c.size, weight=None) if bare else c
    for tau in (TAU.get(family, 0.0), -1.0) if family in TAU else (0.0,):
        true = truth(family, link, eta, full, tau)
        close(density(family, link).loglik(eta, given, tau), true, 1e-11)
        close(density(family, link).terms(eta, given, tau).value, true, 1e-11)


# ---- derivatives


@pytest.mark.parametrize(("family", "link", "expected"), CURVATURES)
def test_derivatives_by_eta(family: str, link: str, expected: bool) -> None:
    d, (eta, c), tau = density(family, link, expected=expected), sample(family, link), TAU.get(family, 0.0)
    h = 0.01 * centre(family, link)[1]
    terms = d.terms(eta, c, tau)

    def at(name: str) -> Array:
        return difference(lambda t: getattr(d.terms(eta + t, c, tau), name), h)

    close(terms.score, difference(lambda t: truth(family, link, eta + t, c, tau), h), 1e-7)
    close(terms.observed, -at("score"), 1e-7)
    close(terms.slope, at("curvature"), 1e-6, np.abs(terms.observed).max() / centre(family, link)[1])
    close(np.stack(d.newton(eta, c, tau)), np.stack([terms.score, terms.observed]), 1e-13)
    assert expected or terms.curvature is terms.observed
    assert (d.safe_curvature(eta, c, tau) >= 0.0).all()


@pytest.mark.parametrize(("family", "link"), [pair for pair in PAIRS if FAMILIES[pair[0]].expected])
def test_expected_curvature(family: str, link: str) -> None:
    eta, c = sample(family, link)
    tau, h = TAU.get(family, 0.0), 0.01 * centre(family, link)[1]
    slope = difference(lambda t: MEANS[link](eta + t), h)
    assert c.size is not None and c.weight is not None
    true = c.size * information(family, MEANS[link](eta), c.weight, tau) * slope**2
    d = density(family, link, expected=True)
    close(d.terms(eta, c, tau).curvature, true, 1e-8)
    close(d.safe_curvature(eta, c, tau), true, 1e-8)


def test_expected_curvature_of_beta_is_the_mean_of_the_observed() -> None:
    eta = np.array([0.4])
    d, k = density("beta", "probit", expected=True), TAU["beta"]
    mu, shape = MEANS["probit"](eta)[0], np.exp(k)

    def weighted(y: float) -> float:
        terms = d.terms(eta, Cells(np.array([y]), None, None, statistics("beta", np.array([y]))), k)
        return float(terms.observed[0] * st.beta.pdf(y, mu * shape, (1.0 - mu) * shape))

    found = si.quad(weighted, 0.0, 1.0)[0]
    y = np.array([0.3])
    np.testing.assert_allclose(d.terms(eta, Cells(y, None, None, statistics("beta", y)), k).curvature[0], found, rtol=1e-8)


@pytest.mark.parametrize(("family", "link", "expected"), [case for case in CURVATURES if FAMILIES[case[0]].shape])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0])
def test_derivatives_by_shape(family: str, link: str, expected: bool, shift: float) -> None:
    d, (eta, c), tau = density(family, link, expected=expected), sample(family, link), TAU[family] + shift
    h = 0.005
    terms, by_shape = d.terms(eta, c, tau), d.by_shape(eta, c, tau)

    def at(name: str) -> Array:
        return difference(lambda t: getattr(d.terms(eta, c, tau + t), name), h)

    assert terms.shape is not None and terms.score_shape is not None and terms.curvature_shape is not None
    close(terms.shape, difference(lambda t: truth(family, link, eta, c, tau + t), h), 1e-7)
    close(terms.score_shape, at("score"), 1e-7)
    close(terms.curvature_shape, at("curvature"), 1e-7)
    close(by_shape.first, terms.shape, 1e-13)
    close(by_shape.score, terms.score_shape, 1e-13)
    close(by_shape.curvature, -at("observed"), 1e-7)
    close(by_shape.second, at("shape"), 1e-7)


@pytest.mark.parametrize(("family", "link"), PAIRS)
def test_concave_means_concave(family: str, link: str) -> None:
    d, (eta, c), tau = density(family, link), sample(family, link, 400, seed=3), TAU.get(family, 0.0)
    wide = np.where(np.arange(400) % 2 == 0, eta, eta + 10.0 * (eta - centre(family, link)[0]))
    if d.concave:
        with np.errstate(all="ignore"):
            observed = d.terms(np.where(np.isfinite(d.loglik(wide, c, tau)), wide, eta), c, tau).observed
        assert np.nanmin(observed) >= -1e-12 * np.nanmax(observed)


# ---- tails


def tail(family: str, size: float) -> tuple[Array, Cells]:
    """Both tails, with the extreme responses of the family and one between."""
    shares = {"binomial": [0.0, 0.3, 1.0], "beta": [0.01, 0.3, 0.99]}
    y = np.tile(shares.get(family, [0.0 if family in COUNTS else 0.1, 2.0, 30.0]), 2)
    return np.repeat([-size, size], 3), Cells(y, None, None, statistics(family, y))


def everything(d: Density, eta: Array, c: Cells, tau: float) -> dict[str, Array]:
    """All that a density computes."""
    found = {"loglik": d.loglik(eta, c, tau), "safe": d.safe_curvature(eta, c, tau), "newton": np.stack(d.newton(eta, c, tau))}
    return found | {name: v for name, v in d.terms(eta, c, tau)._asdict().items() if v is not None}


@pytest.mark.parametrize("size", [10.0, 30.0, 37.0, 100.0, 300.0, 700.0])
@pytest.mark.parametrize(("family", "link"), TAILS)
def test_tails_are_finite(family: str, link: str, size: float) -> None:
    eta, c = tail(family, size)
    for expected in (False, True)[: 1 + FAMILIES[family].expected]:
        with np.errstate(all="ignore"):
            found = everything(density(family, link, expected=expected), eta, c, TAU.get(family, 0.0))
        assert [name for name, v in found.items() if not np.isfinite(v).all()] == []


@pytest.mark.parametrize(("family", "link"), TAILS)
def test_tails_do_not_warn(family: str, link: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (5.0, 10.0, 20.0, 30.0):
            for expected in (False, True)[: 1 + FAMILIES[family].expected]:
                everything(density(family, link, expected=expected), *tail(family, size), TAU.get(family, 0.0))


@pytest.mark.parametrize("link", ["logit", "probit", "cloglog", "cauchit"])
def test_binomial_tails_keep_their_digits(link: str) -> None:
    """Successes where the mean is tiny, failures where it is nearly one."""
    logs = {"logit": sp.log_expit, "probit": sp.log_ndtr, "cauchit": st.cauchy.logcdf, "cloglog": lambda v: np.log(-np.expm1(-np.exp(v)))}
    down = np.array([-30.0, -25.0, -20.0, -15.0, -10.0])
    up = np.array([2.0, 3.0, 4.0, 5.0]) if link == "cloglog" else -down
    log_nu = (lambda v: -np.exp(v)) if link == "cloglog" else (lambda v: logs[link](-v))
    d = density("binomial", link)
    for eta, y, log_p in ((down, 1.0, logs[link]), (up, 0.0, log_nu)):
        terms = d.terms(eta, Cells(np.full_like(eta, y)), 0.0)
        np.testing.assert_allclose(terms.value, log_p(eta), rtol=1e-12)
        np.testing.assert_allclose(terms.score, difference(lambda t, f=log_p, x=eta: f(x + t), 1e-3), rtol=1e-8)
        np.testing.assert_allclose(terms.observed, -difference(lambda t, x=eta, y=y: _score(d, x + t, y), 1e-3), rtol=1e-7, atol=1e-9)


def _score(d: Density, eta: Array, y: float) -> Array:
    return d.terms(eta, Cells(np.full_like(eta, y)), 0.0).score


# ---- cells


@pytest.mark.parametrize(("family", "link", "expected"), CURVATURES)
def test_a_cell_is_the_sum_of_its_rows(family: str, link: str, expected: bool) -> None:
    """Rows of equal eta (and weight, and response where the family says so) as one cell."""
    eta, c = sample(family, link)
    kind, tau, d = FAMILIES[family], TAU.get(family, 0.0), density(family, link, expected=expected)
    cell = np.arange(N) // 4
    first = cell * 4
    assert c.size is not None and c.weight is not None
    y, weight = c.y[first] if kind.keyed else c.y, c.weight[first]
    size = c.size if family == "binomial" else np.ones(N)
    found = d.terms(eta[::4], packed(family, y, size, weight, cell), tau)
    by_row = d.terms(eta[first], Cells(y, size, weight, statistics(family, y)), tau)
    scale = max(np.abs(v).max() for v in by_row if v is not None)
    for one, several in zip(found, by_row, strict=True):
        assert (one is None) == (several is None)
        if one is not None and several is not None:
            close(one, np.add.reduceat(several, first[::4]), 1e-12, scale)
