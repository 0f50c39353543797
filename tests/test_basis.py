"""Bases: R's values (those of coding.json are in test_design), their constants, and what is refused."""
from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.interpolate import BSpline

from mlpipe.basis import Basis, Requests, Summary, chebyshev_terms, parse_basis
from mlpipe.errors import DataError, FormulaError
from mlpipe.expr import Call, Column, label
from mlpipe.formula import parse

from .numpy_oracle import evaluate, summarize

RNG = np.random.default_rng(20)
X = RNG.gamma(2.0, 3.0, 400)


def basis_of(text: str) -> Basis:
    node = parse(f"~ {text}").fixed[1].variables[0]
    assert isinstance(node, Call)
    return parse_basis(node)


def values(text: str, x: np.ndarray = X, at: np.ndarray | None = None) -> np.ndarray:
    """The columns with constants from x, after a round trip through JSON, evaluated at other points if given."""
    basis = basis_of(text)
    constants = json.loads(json.dumps(basis.constants(summarize(basis, {"x": x}))))
    points = x if at is None else at
    columns = basis.columns(constants)
    assert len(columns) == len(basis.suffixes)
    return np.column_stack([np.broadcast_to(evaluate(node, {"x": points}), points.shape) for node in columns])


REQUESTS = [
    ("poly(x, 3)", Requests(range=True, chebyshev=6), ("1", "2", "3")),
    ("poly(x)", Requests(range=True, chebyshev=2), ("",)),
    ("poly(x, degree = 2, raw = TRUE)", Requests(), ("1", "2")),
    ("scale(x)", Requests(moments=True, range=True), ("",)),
    ("scale(x, scale = FALSE)", Requests(moments=True), ("",)),
    ("scale(x, FALSE, 2)", Requests(), ("",)),
    ("center(x)", Requests(moments=True), ("",)),
    ("bs(x)", Requests(range=True), ("1", "2", "3")),
    ("bs(x, 5)", Requests(range=True, quantiles=(1 / 3, 2 / 3)), ("1", "2", "3", "4", "5")),
    ("bs(x, df = 5, intercept = TRUE)", Requests(range=True, quantiles=(0.5,)), ("1", "2", "3", "4", "5")),
    ("bs(x, knots = 3, degree = 1)", Requests(range=True), ("1", "2")),
    ("ns(x, df = 1)", Requests(range=True), ("",)),
    ("ns(x, df = 4)", Requests(range=True, quantiles=(0.25, 0.5, 0.75)), ("1", "2", "3", "4")),
    ("ns(x, knots = c(2, 3), intercept = TRUE)", Requests(range=True), ("1", "2", "3", "4")),
]


@pytest.mark.parametrize(("text", "requests", "suffixes"), REQUESTS)
def test_what_a_basis_asks_for(text: str, requests: Requests, suffixes: tuple[str, ...]) -> None:
    basis = basis_of(text)
    assert (basis.requests, basis.suffixes, label(basis.argument)) == (requests, suffixes, "x")
    assert basis.function == text.split("(")[0]


SAMPLES = {
    "skewed": X,
    "years": 2000.0 + RNG.integers(0, 20, 500),
    "timestamps": 1.7e9 + RNG.uniform(0, 1e7, 500),
    "outlier": np.r_[RNG.normal(size=500), 40.0],
    "few": np.array([1.0, 2.0, 4.0, 8.0, 9.0]),
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_poly_is_orthonormal_and_that_of_r(sample: str, degree: int) -> None:
    x = SAMPLES[sample]
    ours = values(f"poly(x, {degree})", x)
    # R's algorithm: QR of the centred powers (scaled here), signs such that leading coefficients are positive.
    q, r = np.linalg.qr(np.vander((x - x.mean()) / np.ptp(x), degree + 1, increasing=True))
    np.testing.assert_allclose(ours, (q * np.sign(np.diag(r)))[:, 1:], atol=1e-9)
    np.testing.assert_allclose(ours.T @ ours, np.eye(degree), atol=1e-9)


def test_raw_poly_is_powers() -> None:
    np.testing.assert_allclose(values("poly(x, 3, raw = TRUE)"), X[:, None] ** [1, 2, 3], rtol=1e-14)


def test_chebyshev_terms_are_cosines() -> None:
    u = np.linspace(-1, 1, 101)
    terms = chebyshev_terms(Column("x"), 3.0, 7.0, 24)
    found = [np.broadcast_to(evaluate(node, {"x": 5 + 2 * u}), u.shape) for node in terms]
    np.testing.assert_allclose(found, [np.cos(k * np.arccos(u)) for k in range(25)], atol=1e-12)


SCALES = [
    ("scale(x)", lambda x: (x - x.mean()) / x.std(ddof=1)),
    ("center(x)", lambda x: x - x.mean()),
    ("scale(x, scale = FALSE)", lambda x: x - x.mean()),
    ("scale(x, center = FALSE)", lambda x: x / np.sqrt((x**2).sum() / (len(x) - 1))),
    ("scale(x, center = 3)", lambda x: (x - 3) / np.sqrt(((x - 3) ** 2).sum() / (len(x) - 1))),
    ("scale(x, 1, -2)", lambda x: (x - 1) / -2),
    ("scale(x, FALSE, FALSE)", lambda x: x),
]


@pytest.mark.parametrize(("text", "expected"), SCALES, ids=[text for text, _ in SCALES])
def test_scale(text: str, expected: Any) -> None:
    np.testing.assert_allclose(values(text)[:, 0], expected(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "degree", "inner", "boundary"),
    [
        ("bs(x, knots = c(3, 6, 9), intercept = TRUE)", 3, [3.0, 6.0, 9.0], None),
        ("bs(x, df = 6, intercept = TRUE)", 3, np.quantile(X, [1 / 3, 2 / 3]), None),
        ("bs(x, df = 4, degree = 2, intercept = TRUE)", 2, np.quantile(X, [0.5]), None),
        ("bs(x, knots = c(9, 3), degree = 1, intercept = TRUE, Boundary.knots = c(50, -1))", 1, [3.0, 9.0], (-1.0, 50.0)),
        ("bs(x, knots = c(5, 5, 6), intercept = TRUE, Boundary.knots = c(2, 8))", 3, [5.0, 5.0, 6.0], (2.0, 8.0)),
    ],
)
def test_bs_goes_on_beyond_the_boundary_as_the_outer_polynomials(text: str, degree: int, inner: Any, boundary: Any) -> None:
    low, high = boundary or (X.min(), X.max())
    knots = np.r_[[low] * (degree + 1), inner, [high] * (degree + 1)]
    # R expands the outer pieces in Taylor series; BSpline with extrapolation is the same polynomials.
    points = np.linspace(low - 2, high + 2, 201)
    expected = np.column_stack([BSpline(knots, row, degree)(points) for row in np.eye(len(knots) - degree - 1)])
    np.testing.assert_allclose(values(text, at=points), expected, atol=1e-9, rtol=1e-9)
    np.testing.assert_allclose(values(text, at=points).sum(axis=1), 1.0, atol=1e-9)
    without = text.replace("intercept = TRUE", "intercept = FALSE").replace("df = 6", "df = 5").replace("df = 4", "df = 3")
    np.testing.assert_allclose(values(without, at=points), expected[:, 1:], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("text", ["ns(x, df = 4)", "ns(x, knots = c(3, 6), intercept = TRUE, Boundary.knots = c(1, 10))"])
def test_ns_is_smooth_and_straight_outside(text: str) -> None:
    low, high = (1.0, 10.0) if "Boundary" in text else (X.min(), X.max())
    outside = np.r_[low - np.arange(5.0)[::-1]], np.r_[high + np.arange(5.0)]
    for points in outside:
        np.testing.assert_allclose(np.diff(values(text, at=points), 2, axis=0), 0.0, atol=1e-12)
    step = 1e-3
    for knot in (low, 3.0, 6.0, high):
        near = values(text, at=knot + step * np.array([-2.0, -1.0, 0.0, 1.0, 2.0]))
        assert np.abs(near[0] - 2 * near[1] + 2 * near[3] - near[4]).max() < 10 * step**3


def test_ns_spans_the_natural_splines() -> None:
    """Cubic splines without second derivative at both ends, built another way: truncated powers."""
    knots = np.r_[X.min(), np.quantile(X, [0.25, 0.5, 0.75]), X.max()]

    def slope(k: int) -> np.ndarray:
        cubes = np.maximum(X[:, None] - knots[[k, -1]], 0) ** 3
        return np.asarray((cubes[:, 0] - cubes[:, 1]) / (knots[-1] - knots[k]))

    truncated = np.column_stack([np.ones_like(X), X, *(slope(k) - slope(3) for k in range(3))])
    ours = values("ns(x, df = 5, intercept = TRUE)", X)
    assert ours.shape == truncated.shape
    residual = ours - truncated @ np.linalg.lstsq(truncated, ours, rcond=None)[0]
    assert np.abs(residual).max() < 1e-9


CONSTANT = Summary(5, 2.0, 0.0, 2.0, 2.0, (5.0,) * 9, (2.0,))
BAD_DATA = [
    ("scale(x)", CONSTANT, "no spread"),
    ("scale(x)", Summary(1, 2.0, float("nan"), 2.0, 2.0), "no spread"),
    ("poly(x, 2)", CONSTANT, "more than 2 distinct values"),
    ("bs(x, df = 4)", CONSTANT, "no spline"),
    ("bs(x, knots = 9)", Summary(5, 2.0, 1.0, 0.0, 4.0), "the knot 9 lies outside"),
    ("ns(x, df = 3, Boundary.knots = c(1, 3))", Summary(5, 2.0, 1.0, 0.0, 4.0, (), (1.5, 2.5)), "outside Boundary.knots"),
]


@pytest.mark.parametrize(("text", "summary", "message"), BAD_DATA)
def test_data_that_do_not_allow_a_basis(text: str, summary: Summary, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        basis_of(text).constants(summary)
    assert caught.value.message.startswith(text)


@pytest.mark.parametrize(("distinct", "degree"), [(2, 2), (3, 3), (5, 5), (9, 12)])
def test_poly_needs_more_distinct_values_than_its_degree(distinct: int, degree: int) -> None:
    x = np.repeat(np.linspace(0.1, 7.7, distinct), 300)
    with pytest.raises(DataError, match="distinct values"):
        values(f"poly(x, {degree})", x)
    assert values(f"poly(x, {distinct - 1})", x).shape[1] == distinct - 1


BAD_CALLS = [
    ("poly(x, 0)", "the degree must be a whole number from 1 to 12", (10, 11)),
    ("poly(x, z, 2)", "z is not a number", (10, 11)),
    ("poly(x, 2, simple = TRUE)", "no argument 'simple'", (22, 26)),
    ("poly(x, 2, raw = 1)", "1 is neither TRUE nor FALSE", (19, 20)),
    ("poly(x, degree = 2, degree = 3)", "given an argument twice", (2, 33)),
    ("bs(x, df = 2)", "df must be a whole number from 3", (13, 14)),
    ("bs(x, df = 4, knots = 1)", "exclude each other", (2, 26)),
    ("bs(x, knot = 1)", "no argument 'knot'", (15, 16)),
    ("bs(x, Boundary.knots = c(1, 1))", "two different numbers", (25, 32)),
    ("ns(x, degree = 2)", "no argument 'degree'", (17, 18)),
    ("scale(x, 1, 2, 3)", "at most 3 arguments", (2, 19)),
    ("scale(x, scale = 0)", "the scale is 0", (19, 20)),
    ("center(x, 2)", "at most 1 arguments", (2, 14)),
]


@pytest.mark.parametrize(("text", "message", "span"), BAD_CALLS)
def test_calls_that_cannot_be_understood(text: str, message: str, span: tuple[int, int]) -> None:
    with pytest.raises(FormulaError) as caught:
        basis_of(text)
    assert message in caught.value.message and caught.value.span == span
