"""The whole fit from Python: the model that is fitted, what is reported about it, and its tables."""
from __future__ import annotations

import datetime as dt
import warnings
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mlpipe as mp
from mlpipe import collect, several
from mlpipe.engines import duckdb as duckdb_engine
from mlpipe.engines import parquet
from mlpipe.reduction import theta_of
from mlpipe.solve.glmm import GLMMSolution
from mlpipe.sources import Subset

from .conftest import as_data
from .dense import Dense


def data(seed: int = 1, groups: int = 12, rows: int = 96) -> pl.DataFrame:
    """Small and unbalanced: one block has a single row."""
    rng = np.random.default_rng(seed)
    g = np.sort(np.append(rng.integers(0, groups - 1, rows - 1), groups - 1))
    x, f = rng.normal(2.0, 1.0, rows), rng.integers(0, 3, rows)
    b = rng.normal(size=(groups, 2)) * [1.0, 0.6]
    y = 5.0 + 0.5 * x + np.array([0.0, 1.0, -1.0])[f] + b[g, 0] + b[g, 1] * x + rng.normal(size=rows)
    columns = {"y": y, "x": x, "f": np.array(["a", "b", "c"])[f], "g": g, "w": rng.uniform(0.4, 3.0, rows), "o": rng.normal(size=rows)}
    return pl.DataFrame({**columns, "h": rng.integers(0, 2, rows), "n": rng.integers(1, 4, rows)})


def close(a: mp.LMMFit, b: mp.LMMFit) -> None:
    np.testing.assert_allclose(a.beta, b.beta, atol=1e-7 * np.sqrt(np.diag(b.vcov())).max(initial=0.0))
    np.testing.assert_allclose(a.theta, b.theta, atol=1e-6)
    assert a.loglik == pytest.approx(b.loglik, abs=1e-8)


# ---- against the naive truth: V as a matrix

X = {
    "1": lambda d: [np.ones(len(d))],
    "x + f": lambda d: [np.ones(len(d)), d["x"], d["f"] == "b", d["f"] == "c"],
    "0 + f": lambda d: [d["f"] == "a", d["f"] == "b", d["f"] == "c"],
    "0": lambda d: [],
}
Z = {
    "(1 | g)": (lambda d: [np.ones(len(d))], (1,)),
    "(x | g)": (lambda d: [np.ones(len(d)), d["x"]], (2,)),
    "(0 + x | g)": (lambda d: [d["x"]], (1,)),
    "(x || g)": (lambda d: [np.ones(len(d)), d["x"]], (1, 1)),
    "(0 + f | g)": (lambda d: [d["f"] == "a", d["f"] == "b", d["f"] == "c"], (3,)),
    "(1 | g) + (0 + f:x | g)": (lambda d: [np.ones(len(d)), *(d["x"] * (d["f"] == level) for level in "abc")], (1, 3)),
}


def dense(frame: pl.DataFrame, fixed: str, random: str, *, reml: bool, weights: str | None = None) -> Dense:
    columns, (z, sizes) = X[fixed](frame), Z[random]
    stacked = [np.column_stack([np.asarray(c, float) for c in part]) if part else np.zeros((len(frame), 0)) for part in (columns, z(frame))]
    w = frame[weights].to_numpy() if weights else np.ones(len(frame))
    return Dense(*stacked, frame["y"].to_numpy(), w, frame["g"].to_numpy(), sizes, reml)


def psi_of(fit: mp.LMMFit) -> np.ndarray:
    """The relative covariance of all random coefficients of a block."""
    out, at = np.zeros((sum(len(term.names) for term in fit.terms),) * 2), 0
    for term in fit.terms:
        k = len(term.names)
        out[at : at + k, at : at + k] = term.factor @ term.factor.T
        at += k
    return out


@pytest.mark.thinned(3)
@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("random", Z)
@pytest.mark.parametrize("fixed", X)
def test_the_naive_truth(fixed: str, random: str, reml: bool, weights: str | None) -> None:
    frame = data(len(fixed) + len(random))
    fit = mp.lmm(f"y ~ {fixed} + {random}", frame, reml=reml, weights=weights)
    truth, psi = dense(frame, fixed, random, reml=reml, weights=weights), psi_of(fit)
    beta, rss, information = truth.gls(psi)
    s2 = rss / (len(frame) - (truth.X.shape[1] if reml else 0))
    np.testing.assert_allclose(fit.beta, beta, rtol=1e-9, atol=1e-9)
    assert fit.sigma**2 == pytest.approx(s2, rel=1e-9)
    np.testing.assert_allclose(fit.vcov(), s2 * np.linalg.inv(information) if len(beta) else np.zeros((0, 0)), rtol=1e-8, atol=1e-10)
    assert -2 * fit.loglik == pytest.approx(truth.deviance(psi), abs=1e-8)
    modes = _modes(truth, psi, beta)
    fitted = truth.X @ beta + (truth.Z * modes[truth.block]).sum(axis=1)
    np.testing.assert_allclose(fit.augment(frame).read_all()["fitted"], fitted, rtol=1e-8)
    wide = fit.ranef(wide=True)
    got = np.column_stack([wide.column(1 + 2 * k) for k in range(modes.shape[1])])
    np.testing.assert_allclose(got, modes, atol=1e-8)


def _modes(truth: Dense, psi: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Ψ Z' V⁻¹ (y − Xβ), block by block."""
    r = np.linalg.solve(truth.V(psi), truth.y - truth.X @ beta)
    return np.stack([psi @ truth.Z[truth.block == g].T @ r[truth.block == g] for g in np.unique(truth.block)])


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("random", ["(1 | g)", "(x | g)", "(x || g)", "(0 + f | g)"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_better_optimum_is_found(random: str, seed: int) -> None:
    frame = data(seed, groups=6, rows=40)
    fit = mp.lmm(f"y ~ x + f + {random}", frame)
    truth = dense(frame, "x + f", random, reml=True)
    rng = np.random.default_rng(seed)
    starts = [fit.theta, *(rng.normal(size=len(fit.theta)) for _ in range(2))]
    assert -2 * fit.loglik <= truth.optimum(starts) + 1e-7


@pytest.mark.thinned(3)
@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("random", ["(1 | g)", "(x | g)", "(0 + f | g)"])
@pytest.mark.parametrize(("shift", "scale"), [(1e6, 1.0), (-2e9, 1e3), (0.0, 1e-12), (0.0, 1e14), (5e3, 1e-4)])
@pytest.mark.parametrize(("a", "b"), [(1e7, 1e-2), (0.0, 1e-9)])
def test_nasty_scales(random: str, shift: float, scale: float, a: float, b: float) -> None:
    """Columns far from zero or of a wild scale, against the naive truth on the columns as they were."""
    grid = data(4).with_columns((pl.col("x", "y") * 1024).round() / 1024)  # what a shift rounds off stays small
    nasty = grid.with_columns(x=shift + scale * pl.col("x"), y=a + b * pl.col("y"))
    fit = mp.lmm(f"y ~ x + f + {random}", nasty, reml=False)
    plain = mp.lmm(f"y ~ x + f + {random}", grid, reml=False)
    truth, lost = dense(grid, "x + f", random, reml=False), 1e-15 * (abs(shift / scale) + abs(a / b))
    psi = psi_of(plain)
    beta, rss, _ = truth.gls(psi)
    np.testing.assert_allclose(fit.beta[1:] / b * [scale, 1.0, 1.0], beta[1:], rtol=1e-6 + 1e2 * lost)
    assert fit.sigma / b == pytest.approx(np.sqrt(rss / len(grid)), rel=1e-7 + 10 * lost)
    assert -2 * fit.loglik == pytest.approx(truth.deviance(psi) + 2 * len(grid) * np.log(b), abs=1e-7 + 1e4 * lost)
    want = truth.X @ beta + (truth.Z * _modes(truth, psi, beta)[truth.block]).sum(axis=1)
    np.testing.assert_allclose((fit.augment(nasty).read_all()["fitted"].to_numpy() - a) / b, want, atol=1e-5 + 1e2 * lost)


@pytest.mark.parametrize("formula", ["(1 | g)", "(year + I(year^2) | g)"])
@pytest.mark.parametrize("seed", [21, 4])
def test_a_parabola_of_years_keeps_its_digits(formula: str, seed: int, tmp_path: Path) -> None:
    """1, year and year² as they are explain each other but for 1e-10 of their spread; the same model on centred years is the truth."""
    rng = np.random.default_rng(1000 + seed)
    g, year = np.arange(2000) % 100, rng.integers(1990, 2020, 2000)
    y = 0.1 * (year - 2005) ** 2 + rng.normal(size=100)[g] + rng.normal(size=2000)
    frame = pl.DataFrame({"y": y, "year": year, "g": g, "c": year - 2005})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.SingularFitWarning)
        fit = mp.lmm(f"y ~ year + I(year^2) + {formula}", frame)
        want = mp.lmm(f"y ~ c + I(c^2) + {formula}".replace("year", "c"), frame)
    assert fit.converged and want.converged and fit.score < 1e-8
    assert fit.loglik == pytest.approx(want.loglik, abs=1e-8 + 1e-12 * abs(want.loglik))
    back = np.array([[1.0, -2005.0, 2005.0**2], [0.0, 1.0, -2 * 2005.0], [0.0, 0.0, 1.0]])
    se = np.sqrt(np.diag(back @ want.vcov() @ back.T))
    np.testing.assert_allclose((fit.beta - back @ want.beta) / se, 0.0, atol=1e-7)
    np.testing.assert_allclose(np.sqrt(np.diag(fit.vcov())) / se, 1.0, rtol=1e-7)
    assert fit.sigma == pytest.approx(want.sigma, rel=1e-9)
    predicted = fit.predict(frame).read_all()["predicted"].to_numpy()
    np.testing.assert_allclose(predicted, want.predict(frame).read_all()["predicted"].to_numpy(), rtol=1e-7)
    fit.write(tmp_path / "fit")
    np.testing.assert_array_equal(mp.load(tmp_path / "fit").predict(frame).read_all()["predicted"].to_numpy(), predicted)


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("slope", ["log(year)", "I(year^2)"])
@pytest.mark.parametrize("seed", [2, 11, 12, 17, 20, 24, 29])
def test_random_slopes_that_nearly_repeat_each_other(seed: int, slope: str) -> None:
    """No product of features tells the year from its logarithm: the score keeps its digits all the same."""
    rng = np.random.default_rng(seed)
    g, year = np.arange(2000) % 100, 1990 + np.arange(2000) // 100
    y = 0.1 * (year - 2005) ** 2 + rng.normal(size=100)[g] * 0.05 + rng.normal(size=2000) * 5
    frame = pl.DataFrame({"y": y, "year": year, "g": g})
    for reml in (True, False):
        fit = mp.lmm(f"y ~ year + {slope} + (year + {slope} | g)", frame, reml=reml)
        assert fit.converged and fit.score < 1e-8


@pytest.mark.parametrize("term", ["I((x - 3)^2)", "I(2 * x^3 - x / 4)", "I(-x)", "I(x * (x + 1))", "I(x^2):f", "x:I(x^2)", "I(I(x^2)^2)"])
def test_polynomials_are_the_columns_they_say(term: str) -> None:
    """Against the same numbers as a column of their own, which nothing is known about."""
    frame = data()
    x = frame["x"]
    values = {"I((x - 3)^2)": (x - 3) ** 2, "I(2 * x^3 - x / 4)": 2 * x**3 - x / 4, "I(-x)": -x, "I(x * (x + 1))": x * (x + 1)}
    values |= {"I(x^2):f": x**2, "x:I(x^2)": x * x**2, "I(I(x^2)^2)": x**4}
    other = "p:f" if term.endswith(":f") else "p"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.MlpipeWarning)
        fit = mp.lmm(f"y ~ x + {term} + (1 | g)", frame)
        want = mp.lmm(f"y ~ x + {other} + (1 | g)", frame.with_columns(p=values[term]))
    assert len(fit.names) == len(want.names) and len(fit.dropped) == len(want.dropped)
    np.testing.assert_allclose(fit.beta, want.beta, rtol=1e-7)
    assert fit.loglik == pytest.approx(want.loglik, abs=1e-8)


def test_powers_that_leave_the_range_of_doubles_are_refused() -> None:
    """The product of scaled values is finite; the column that was asked for is not."""
    with pytest.raises(mp.DataError, match=r"x\^3 is not finite in 96 rows"):
        mp.lmm("y ~ x + I(x^3) + (1 | g)", data().with_columns(x=pl.col("x") * 1e120))


def test_standard_errors_of_variance_parameters() -> None:
    """From the exact information: against a differenced Hessian of the naive likelihood in (θ, log σ)."""
    frame = data(2, groups=40, rows=240)
    fit = mp.lmm("y ~ x + (x | g)", frame)
    assert not fit.singular
    truth = dense(frame, "x + f", "(x | g)", reml=True)
    truth.X = truth.X[:, :2]
    n, p = truth.X.shape

    def deviance(v: np.ndarray) -> float:
        """In (sd, sd, cor, sigma), not profiled."""
        cov = v[2] * v[0] * v[1]
        psi = np.array([[v[0] ** 2, cov], [cov, v[1] ** 2]]) / v[3] ** 2
        _, rss, information = truth.gls(psi)
        logdet = np.linalg.slogdet(truth.V(psi))[1] + np.linalg.slogdet(information)[1]
        return float(logdet + (n - p) * np.log(v[3] ** 2) + rss / v[3] ** 2)

    rows = fit.tidy().to_pylist()[2:]
    at, steps = np.array([row["estimate"] for row in rows]), np.eye(4) * 1e-3
    hessian = np.array(
        [[deviance(at + u + v) - deviance(at + u - v) - deviance(at - u + v) + deviance(at - u - v) for u in steps] for v in steps]
    ) / (4 * 1e-6)
    want = np.sqrt(np.diag(np.linalg.inv(hessian / 2)))
    np.testing.assert_allclose([row["std_error"] for row in rows], want, rtol=1e-3)


# ---- arguments


@pytest.mark.parametrize("start", [[0.0, 0.0, 0.0], [100.0, -50.0, 1e-3], [1.0, 0.0, 1.0], [-1.0, 0.5, -2.0]])
def test_any_start_ends_at_the_optimum(start: list[float]) -> None:
    frame = data()
    close(mp.lmm("y ~ x + (x | g)", frame, start=start), mp.lmm("y ~ x + (x | g)", frame))


def test_the_optimum_as_start_is_found_at_once() -> None:
    frame = data()
    first = mp.lmm("y ~ x + (x | g)", frame)
    again = mp.lmm("y ~ x + (x | g)", frame, start=first.theta)
    assert again.evaluations <= 2 < first.evaluations
    close(again, first)


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
def test_theta_is_in_lme4s_order() -> None:
    fit = mp.lmm("y ~ x + (0 + f | g) + (0 + x | g)", data())
    assert [len(term.names) for term in fit.terms] == [3, 1]
    lower = fit.terms[0].factor
    np.testing.assert_allclose(lower, np.tril(lower))
    assert (np.diag(lower) >= 0).all()
    np.testing.assert_array_equal(fit.theta, [*lower[:, 0], *lower[1:, 1], lower[2, 2], fit.terms[1].factor[0, 0]])
    np.testing.assert_array_equal(theta_of([lower]), fit.theta[:6])


def test_constant_weights_change_sigma_only() -> None:
    frame = data()
    one, four = (mp.lmm("y ~ x + (1 | g)", frame, weights=text) for text in ("w / w", "4 * w / w"))
    np.testing.assert_allclose(four.beta, one.beta, rtol=1e-9)
    assert four.sigma == pytest.approx(2 * one.sigma, rel=1e-7)
    assert four.loglik == pytest.approx(one.loglik, abs=1e-8)
    close(one, mp.lmm("y ~ x + (1 | g)", frame))


def test_weights_are_not_frequencies() -> None:
    frame = data()
    repeated = frame.select(pl.exclude("n").repeat_by("n").explode())
    by_freq, by_rows = mp.lmm("y ~ x + (1 | g)", frame, freq="n"), mp.lmm("y ~ x + (1 | g)", repeated)
    close(by_freq, by_rows)
    assert by_freq.nobs == by_rows.nobs == repeated.height and (by_freq.rows, by_rows.rows) == (96, repeated.height)
    assert by_freq.glance()["nobs"].to_pylist() == [repeated.height]
    assert mp.lmm("y ~ x + (1 | g)", frame, weights="n").nobs == 96


@pytest.mark.parametrize("argument", ["weights", "freq"])
def test_rows_of_weight_zero_are_left_out_and_counted(argument: str) -> None:
    frame = data().with_columns(n=pl.when(pl.int_range(96) % 7 == 0).then(0).otherwise(pl.col("n")))
    arguments: dict[str, Any] = {argument: "n"}
    fit = mp.lmm("y ~ x + (1 | g)", frame, **arguments)
    close(fit, mp.lmm("y ~ x + (1 | g)", frame.filter(pl.col("n") > 0), **arguments))
    assert fit.info["dropped"] == {"weight 0 in n": 14}


@pytest.mark.parametrize(
    ("formula", "arguments"),
    [("y ~ x + offset(o) + (1 | g)", {}), ("y ~ x + (1 | g)", {"offset": "o"}), ("y ~ offset(o / 2) + x + (1 | g)", {"offset": "o / 2"})],
)
def test_offsets(formula: str, arguments: dict[str, Any]) -> None:
    frame = data()
    fit = mp.lmm(formula, frame, **arguments)
    want = mp.lmm("I(y - o) ~ x + (1 | g)", frame)
    close(fit, want)
    rows, plain = fit.augment().read_all(), want.augment().read_all()
    for name in ("fitted", "fitted_fixed"):
        np.testing.assert_allclose(rows[name], plain[name].to_numpy() + frame["o"].to_numpy(), rtol=1e-8)
    np.testing.assert_allclose(rows["resid"], plain["resid"], atol=1e-7)
    np.testing.assert_allclose(rows["resid"], frame["y"].to_numpy() - rows["fitted"].to_numpy(), atol=1e-12)


@pytest.mark.parametrize("kind", ["treatment", "sum", "helmert", "poly"])
def test_contrasts_change_the_coefficients_only(kind: str) -> None:
    frame = data()
    fit = mp.lmm("y ~ f * x + (1 | g)", frame, contrasts={"f": kind}, reml=False)
    plain = mp.lmm("y ~ f * x + (1 | g)", frame, reml=False)
    assert fit.loglik == pytest.approx(plain.loglik, abs=1e-9)
    for name in ("fitted", "fitted_fixed"):
        np.testing.assert_allclose(fit.augment().read_all()[name], plain.augment().read_all()[name], rtol=1e-8)
    assert list(fit.fixef())[1:3] == {"treatment": ["fb", "fc"], "poly": ["f.L", "f.Q"]}.get(kind, ["f1", "f2"])


@pytest.mark.parametrize("kind", ["polars", "duckdb", "path"])
def test_order_of_levels(kind: str, tmp_path: Path) -> None:
    """levels= first, then the type's own order, then UTF-8 bytes; levels without rows go before the base is chosen."""
    frame = data()
    names = {
        "given": mp.lmm("y ~ f + (1 | g)", as_data(frame, kind, tmp_path), levels={"f": ["none", "c", "a", "b"]}),
        "declared": mp.lmm("y ~ f + (1 | g)", as_data(frame.cast({"f": pl.Enum(["z", "b", "c", "a"])}), kind, tmp_path)),
        "bytes": mp.lmm("y ~ f + (1 | g)", as_data(frame.with_columns(pl.col("f").replace({"b": "Z", "c": "é"})), kind, tmp_path)),
        "numbers": mp.lmm("y ~ factor(n) + (1 | g)", as_data(frame.with_columns(n=pl.col("n") * 5), kind, tmp_path)),
        "logical": mp.lmm("y ~ 0 + t + (1 | g)", as_data(frame.with_columns(t=pl.col("h") == 1), kind, tmp_path)),
    }
    assert {what: list(fit.fixef())[what != "logical" :] for what, fit in names.items()} == {
        "given": ["fa", "fb"], "declared": ["fc", "fa"], "bytes": ["fa", "fé"], "numbers": ["factor(n)10", "factor(n)15"],
        "logical": ["tFALSE", "tTRUE"],
    }  # fmt: skip


# ---- the random part


def test_double_bar_is_separate_terms() -> None:
    frame = data()
    close(mp.lmm("y ~ x + (x || g)", frame), mp.lmm("y ~ x + (1 | g) + (0 + x | g)", frame))


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
def test_codings_of_a_factor_slope_are_one_model() -> None:
    frame = data(3)
    contrasts, cells = mp.lmm("y ~ x + (f | g)", frame), mp.lmm("y ~ x + (0 + f | g)", frame)
    assert contrasts.terms[0].names == ("(Intercept)", "fb", "fc") and cells.terms[0].names == ("fa", "fb", "fc")
    assert contrasts.loglik == pytest.approx(cells.loglik, abs=1e-7)
    np.testing.assert_allclose(contrasts.augment().read_all()["fitted"], cells.augment().read_all()["fitted"], rtol=1e-5)
    separate = mp.lmm("y ~ x + (f || g)", frame)  # as in lme4: the columns of one factor stay correlated
    assert [term.names for term in separate.terms] == [("(Intercept)",), ("fa", "fb", "fc")]


def test_no_fixed_effects() -> None:
    frame = data()
    fit = mp.lmm("y ~ 0 + (1 | g)", frame)
    assert fit.fixef() == {} and fit.vcov().shape == (0, 0) and fit.n_params == 2
    assert fit.tidy()["effect"].to_pylist() == ["ran_pars", "ran_pars"]
    rows = fit.augment().read_all()
    assert set(rows["fitted_fixed"].to_pylist()) == {0.0}
    assert "Fixed effects" not in str(fit) and "Random effects" in str(fit)
    # With nothing fixed REML is ML; two threads may add the rows in another order, so the last bits are free.
    assert fit.loglik == pytest.approx(mp.lmm("y ~ 0 + (1 | g)", frame, reml=False).loglik, rel=1e-13)


def test_intercept_only() -> None:
    fit = mp.lmm("y ~ 1 + (1 | g)", data())
    assert list(fit.fixef()) == ["(Intercept)"] and "Correlation" not in str(fit)


def test_groups_of_two_keys() -> None:
    frame = data().with_columns(k=pl.format("{}/{}", "g", "h"))
    two, one = mp.lmm("y ~ x + (1 | g:h)", frame), mp.lmm("y ~ x + (1 | k)", frame)
    close(two, one)
    assert two.terms[0].group == "g:h" and two.n_blocks == frame["k"].n_unique()
    table = two.ranef()
    assert table.column_names[:3] == ["group", "g", "h"]
    assert table.schema.types[1:3] == [pa.int64(), pa.int64()]
    assert two.icc()["g:h"] == pytest.approx(one.icc()["k"])


# ---- honest status


def flat() -> pl.DataFrame:
    """No variation between the groups at all."""
    rng = np.random.default_rng(3)
    e = rng.normal(size=(12, 8))
    return pl.DataFrame({"y": (e - e.mean(axis=1, keepdims=True)).ravel(), "x": rng.normal(size=96), "g": np.repeat(np.arange(12), 8)})


def test_a_singular_fit_says_so_everywhere(tmp_path: Path) -> None:
    with pytest.warns(mp.SingularFitWarning):
        fit = mp.lmm("y ~ x + (1 | g)", flat())
    assert fit.singular and fit.converged and fit.theta.tolist() == [0.0]
    assert fit.glance()["singular"].to_pylist() == [True]
    assert "singular" in str(fit) and "singular" in fit._repr_html_()
    assert fit.icc() == {"g": 0.0}
    assert fit.varcorr().to_pylist()[0]["sd"] == 0.0
    row = fit.tidy().to_pylist()[2]
    assert (row["term"], row["estimate"], row["std_error"], row["conf_low"]) == ("sd__(Intercept)", 0.0, None, None)
    modes = fit.ranef()
    assert set(modes["estimate"].to_pylist()) == {0.0} and set(modes["reliability"].to_pylist()) == {None}
    fit.write(tmp_path / "fit")
    assert mp.load(tmp_path / "fit").singular
    said = ["the fit is singular: a random-effects covariance is on the boundary"]
    assert fit.info["warnings"] == mp.load(tmp_path / "fit").info["warnings"] == said
    assert fit.dispersion == fit.sigma**2 and mp.lmm("y ~ x + (1 | g)", data()).info["warnings"] == []


def test_variances_that_no_row_tells_are_noted() -> None:
    """Restricted likelihood knows nothing of levels that the fixed effects tell apart, and any variance is as good as another."""
    frame = data().with_columns(level=pl.col("g").cast(pl.String))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.MlpipeWarning)
        for formula in ("y ~ level + (1 | level)", "y ~ x + level + (x | level)", "y ~ 0 + level:x + level + (0 + x | level)"):
            fit = mp.lmm(formula, frame)
            assert "their likelihood is flat" in fit.info["notes"][-1] and "note: the rows do not tell the variances over level" in str(fit)
        for formula, reml in [("y ~ level + (1 | level)", False), ("y ~ x + (1 | level)", True), ("y ~ x + (x | level)", True)]:
            assert not any("flat" in note for note in mp.lmm(formula, frame, reml=reml).info["notes"])
        assert not any("flat" in note for note in mp.lmm("y ~ x + (1 | g)", flat()).info["notes"])


def test_perfect_correlation_is_singular() -> None:
    rng = np.random.default_rng(5)
    g, x = np.repeat(np.arange(20), 10), np.tile(np.linspace(-1, 1, 10), 20)
    b = rng.normal(size=20)
    frame = pl.DataFrame({"y": 1 + b[g] * (2 + x) * 3 + rng.normal(size=200), "x": x, "g": g})
    with pytest.warns(mp.SingularFitWarning):
        fit = mp.lmm("y ~ x + (x | g)", frame)
    assert fit.singular and fit.converged
    assert fit.varcorr().to_pylist()[2]["sd"] == pytest.approx(1.0, abs=1e-6)


def test_repeated_columns_are_dropped_and_named() -> None:
    frame = data().with_columns(x2=2 * pl.col("x") - 3, one=1.0)
    with pytest.warns(mp.RankWarning, match="x2, one"):
        fit = mp.lmm("y ~ x + x2 + one + f + (1 | g)", frame)
    want = mp.lmm("y ~ x + f + (1 | g)", frame)
    assert fit.dropped == ("x2", "one") and fit.fixef().keys() == want.fixef().keys()
    close(fit, want)
    assert "x2, one" in str(fit) and "x2, one" in fit._repr_html_()
    np.testing.assert_allclose(fit.augment().read_all()["fitted"], want.augment().read_all()["fitted"], rtol=1e-8)


def test_empty_cells_are_dropped() -> None:
    frame = data().filter(~((pl.col("f") == "b") & (pl.col("h") == 1)))
    with pytest.warns(mp.RankWarning, match="fb:h"):
        fit = mp.lmm("y ~ f * h + (1 | g)", frame)
    assert "fb:h" not in fit.fixef() and "fc:h" in fit.fixef()


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("random", ["(1 | g)", "(1 | g) + (1 | h)"])
def test_a_response_that_is_nearly_explained_keeps_its_digits(random: str) -> None:
    """Residuals of 1e-9 of the response: sums of squares alone have lost them."""
    rng = np.random.default_rng(1)
    x, g, h = rng.normal(size=300), rng.integers(0, 15, 300), rng.integers(0, 7, 300)
    e = rng.normal(size=15)[g] + rng.normal(size=7)[h] + rng.normal(size=300)
    frame = pl.DataFrame({"x": x, "g": g, "h": h, "e": e, "y": 3.0 + 2.0 * x + 1e-9 * e})
    fit, small = mp.lmm(f"y ~ x + {random}", frame), mp.lmm(f"e ~ x + {random}", frame)
    assert fit.sigma == pytest.approx(1e-9 * small.sigma, rel=1e-5)
    assert fit.theta == pytest.approx(small.theta, rel=1e-5)
    assert any("residuals were summed" in note for note in fit.info["notes"])
    np.testing.assert_allclose(fit.augment().read_all()["resid"], 1e-9 * small.augment().read_all()["resid"].to_numpy(), atol=1e-14)


@pytest.mark.filterwarnings("ignore::mlpipe.MlpipeWarning")
@pytest.mark.parametrize("random", ["(1 | g)", "(1 | g) + (1 | h)"])
def test_digits_that_groups_far_apart_take_are_told(random: str) -> None:
    rng = np.random.default_rng(1)
    g, h, noise = np.arange(200) % 12, np.arange(200) % 5, rng.normal(size=200)
    apart, near = (pl.DataFrame({"y": size * rng.normal(size=12)[g] + h + noise, "g": g, "h": h}) for size in (1e5, 1e2))
    told, silent = (mp.lmm(f"y ~ 1 + {random}", frame) for frame in (apart, near))
    assert [note for note in told.info["notes"] if "digits are left" in note] and not silent.info["notes"]
    assert told.converged and told.sigma == pytest.approx(silent.sigma, rel=1e-2) and max(told.evaluations, silent.evaluations) < 30


@pytest.mark.filterwarnings("ignore::mlpipe.MlpipeWarning")
@pytest.mark.parametrize("random", ["(1 | g)", "(1 | g) + (1 | h)", "(x | g) + (1 | h)"])
def test_a_response_that_random_effects_fit_exactly_is_refused(random: str) -> None:
    rng = np.random.default_rng(1)
    g, h, x = rng.integers(0, 15, 300), rng.integers(0, 7, 300), rng.normal(size=300)
    for noise in (0.0, 1e-8):
        y = g * (x if "x |" in random else 1.0) + 10.0 * h * (" + " in random) + noise * rng.normal(size=300)
        with pytest.raises(mp.DataError, match="fitted exactly") as caught:
            mp.lmm(f"y ~ x + {random}", pl.DataFrame({"y": y, "x": x, "g": g, "h": h}))
        assert caught.value.code == "no_residual"


@pytest.mark.parametrize(("score", "converged"), [(0.05, True), (5.0, False)])
def test_what_rounding_stops_far_from_an_optimum_has_not_converged(score: float, converged: bool) -> None:
    none = np.zeros((2, 2))
    ended = GLMMSolution(np.zeros(2), none, 0.0, none, none, False, False, score, 9, "no step improves the likelihood")
    problem, at = SimpleNamespace(WW=np.array([[1.0]])), SimpleNamespace(s2=1e-18)
    assert several._settled(ended, problem, at).converged == converged  # type: ignore[arg-type]




def test_what_did_not_converge_is_told() -> None:
    frame, options = data(), mp.Options(max_passes=1)
    with pytest.warns(mp.ConvergenceWarning, match="did not converge"):
        fit = mp.lmm("y ~ x + (x | g)", frame, options=options, start=[5.0, 0.0, 5.0])
    assert not fit.converged and "NOT CONVERGED" in str(fit)
    with pytest.raises(mp.ConvergenceError):
        mp.lmm("y ~ x + (x | g)", frame, options=mp.Options(max_passes=1, on_nonconvergence="raise"), start=[5.0, 0.0, 5.0])


def test_info_tells_what_was_done(tmp_path: Path) -> None:
    row = pl.int_range(96)
    frame = data().with_columns(x=pl.when(row >= 3).then("x"), y=pl.when(row == 5).then(float("nan")).otherwise(pl.col("y")))
    fit = mp.lmm("y ~ x + (1 | g)", as_data(frame, "path", tmp_path))
    info = fit.info
    assert (info["rows_read"], info["rows_dropped"], info["dropped"]) == (96, 4, {"x": 3, "y": 1})
    assert (info["passes"], info["blocks"], info["engine"], info["path"]) == (2, 12, "duckdb", "second level")
    assert info["bytes"] == (tmp_path / "data.parquet").stat().st_size and info["rescannable"]
    assert {"cross_products", "blocks", "solve", "total"} <= info["seconds"].keys()
    assert "4 of 96 rows dropped" in str(fit) and fit.glance()["n_dropped"].to_pylist() == [4]
    assert mp.lmm("y ~ x + (x | g)", frame).info["path"] == "blocks"


# ---- blocks in parts, where they do not fit the engine's memory at once

PARTS = {
    "integer": (["g"], lambda g: {"g": g}),
    "text": (["g"], lambda g: {"g": [f"group {k}" for k in g]}),
    "float": (["g"], lambda g: {"g": np.where(g == 0, np.where(np.arange(len(g)) % 2, 0.0, -0.0), g / 7)}),
    "two keys": (["g", "h"], lambda g: {"g": g // 10, "h": [f"h{k % 10}" for k in g]}),
}


def many(keys: dict[str, Any], g: np.ndarray) -> pl.DataFrame:
    rng = np.random.default_rng(11)
    x = rng.normal(size=len(g))
    b = rng.normal(size=(2, g.max() + 1))
    return pl.DataFrame({"y": 1 + 0.5 * x + b[0, g] + b[1, g] * x + rng.normal(size=len(g)), "x": x, **keys})


@pytest.mark.thinned(5)
@pytest.mark.parametrize("random", ["1", "x"])
@pytest.mark.parametrize("entry", ["path", "arrow", "duckdb"])
@pytest.mark.parametrize("kind", PARTS)
def test_parts_add_up_to_the_whole(kind: str, entry: str, random: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.default_rng(3).integers(0, 200, 1_000)
    names, keys = PARTS[kind]
    source = as_data(many(keys(g), g), entry, tmp_path)
    formula = f"y ~ x + ({random} | {':'.join(names)})"
    options = None if entry == "duckdb" else mp.Options(threads=1)
    whole = mp.lmm(formula, source, options=options)
    monkeypatch.setattr(collect, "SPARED", 0)
    monkeypatch.setattr(duckdb_engine, "table_room", lambda settings: 5_000)
    monkeypatch.setattr(duckdb_engine, "direct_bits", lambda *_: 6)
    fit = mp.lmm(formula, source, options=options)
    assert any("by range" in note for note in fit.info["notes"]) == (entry == "path" and kind == "integer")
    assert fit.info["passes"] > 3 and f"summed in {fit.info['passes'] - 1} parts" in fit.info["notes"][-1]
    assert fit.info["blocks"] == whole.info["blocks"] == len(np.unique(g))
    np.testing.assert_allclose(fit.beta, whole.beta, rtol=1e-12)
    np.testing.assert_allclose(fit.vcov(), whole.vcov(), rtol=1e-11, atol=1e-16)
    assert fit.loglik == pytest.approx(whole.loglik, rel=1e-12)
    if options is not None:
        again = mp.lmm(formula, source, options=options)
        assert again.tidy().equals(fit.tidy()) and again.loglik == fit.loglik


@pytest.mark.thinned(3)
@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("entry", ["polars", "lazy"])
@pytest.mark.parametrize("kind", PARTS)
def test_groups_that_polars_cannot_hold_are_summed_by_duckdb(
    kind: str, entry: str, weights: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = np.random.default_rng(3).integers(0, 200, 1_000)
    names, keys = PARTS[kind]
    day = pl.date(2020, 1, 1) + pl.duration(days=pl.int_range(1_000) % 90)
    frame = many(keys(g), g).with_columns(w=pl.int_range(1_000) % 3, day=day, f=pl.Series(["a", "b"] * 500, dtype=pl.Enum(["b", "a"])))
    source = as_data(frame.with_columns(x=pl.when(pl.col("x") < 2).then("x")), entry, tmp_path)
    formula = f"y ~ x + day + f + (1 | {':'.join(names)})"
    whole = mp.lmm(formula, source, weights=weights)
    monkeypatch.setattr(collect, "UNLIMITED", 10**7)
    monkeypatch.setattr(collect, "SPARED", 0)
    monkeypatch.setattr(duckdb_engine, "table_room", lambda settings: 5_000)
    fit = mp.lmm(formula, source, weights=weights)
    assert "DuckDB summed them" in fit.info["notes"][0] and "parts" in fit.info["notes"][1]
    assert fit.info["blocks"] == whole.info["blocks"]
    np.testing.assert_allclose(fit.beta, whole.beta, rtol=1e-11)
    assert fit.loglik == pytest.approx(whole.loglik, rel=1e-12)


# the key of each of several files, from whole numbers 0 to 199
LOWEST, BEYOND = -(2**63), 2**64
RANGED: dict[str, Callable[[np.ndarray], list[pa.Array]]] = {
    "negative": lambda g: [pa.array(g - 150)],
    "lowest": lambda g: [pa.array([LOWEST + int(k) for k in g], pa.int64())],
    "greatest": lambda g: [pa.array([-LOWEST - 1 - int(k) for k in g], pa.int64())],
    "unsigned": lambda g: [pa.array([BEYOND - 1 - int(k) for k in g], pa.uint64())],
    "byte": lambda g: [pa.array(g, pa.uint8())],
    "nulls": lambda g: [pa.array([None if i % 7 == 0 else int(k) for i, k in enumerate(g)])],
}
HASHED: dict[str, Callable[[np.ndarray], list[pa.Array]]] = {
    "far apart": lambda g: [pa.array([{0: LOWEST, 1: -LOWEST - 1}.get(int(k), int(k)) for k in g], pa.int64())],
    "few rows": lambda g: [pa.array(g * 2)],
    "decimal": lambda g: [pa.array([Decimal(int(k)) for k in g])],
    "wide and narrow": lambda g: [pa.array(g[:300]), pa.array(g[300:], pa.int32())],
    "small files": lambda g: [pa.array(g[:300]), pa.array(g[300:])],
}


def by_key(files: list[pa.Array], folder: Path, **written: Any) -> str:
    """Parquet files of rows with these keys, whose effect is that of the row's number modulo 200."""
    rng, start = np.random.default_rng(11), 0
    folder.mkdir()
    for i, keys in enumerate(files):
        number = np.arange(start, start + len(keys))
        x, start = rng.normal(size=len(keys)), start + len(keys)
        effect = np.cos(np.arange(200))[number % 200]
        rows = pa.table({"y": 1 + 0.5 * x + effect + rng.normal(size=len(keys)), "x": x, "g": keys})
        pq.write_table(rows, folder / f"{i}.parquet", row_group_size=400, **written)
    return str(folder / "*.parquet")


def in_parts(monkeypatch: pytest.MonkeyPatch, bits: int = 6) -> None:
    """Tables of few groups: 30 by hash, 62 where they are addressed by the key."""
    monkeypatch.setattr(collect, "SPARED", 0)
    monkeypatch.setattr(duckdb_engine, "table_room", lambda settings: 3_000)
    monkeypatch.setattr(duckdb_engine, "direct_bits", lambda *_: bits)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("random", ["1", "x"])
@pytest.mark.parametrize("kind", [*RANGED, *HASHED])
def test_ranges_of_a_key_add_up_to_the_whole(kind: str, random: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.tile(np.arange(200), 5)
    source = by_key((RANGED | HASHED)[kind](g), tmp_path / "rows")
    formula, options = f"y ~ x + ({random} | g)", mp.Options(threads=1)
    whole = mp.lmm(formula, source, options=options)
    in_parts(monkeypatch)
    fit = mp.lmm(formula, source, options=options)
    (note,) = fit.info["notes"][len(whole.info["notes"]) :]
    if kind in RANGED:
        assert fit.info["passes"] == 1 + 4 and "4 parts by range of 'g'" in note
    else:
        assert fit.info["passes"] > 1 + 4 and "of about" in note
    assert fit.info["blocks"] == whole.info["blocks"] == 200 and fit.rows == whole.rows
    np.testing.assert_allclose(fit.beta, whole.beta, rtol=1e-12)
    np.testing.assert_allclose(fit.vcov(), whole.vcov(), rtol=1e-11, atol=1e-16)
    assert fit.loglik == pytest.approx(whole.loglik, rel=1e-12)


def test_ranges_of_large_files_and_of_some_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.tile(np.arange(200), 10)
    source = by_key([pa.array(g[:300]), pa.array(g[300:])], tmp_path / "rows")
    some = Subset(source, "g >= 30 & x > -1.5")
    whole = [mp.lmm("y ~ x + (1 | g)", rows) for rows in (source, some)]
    monkeypatch.setattr(parquet, "LARGE", 100)
    in_parts(monkeypatch)
    for rows, one in zip((source, some), whole, strict=True):
        fit = mp.lmm("y ~ x + (1 | g)", rows)
        assert "4 parts by range of 'g'" in fit.info["notes"][-1] and fit.rows == one.rows and fit.info["blocks"] == one.info["blocks"]
        assert fit.loglik == pytest.approx(one.loglik, rel=1e-12)


@pytest.mark.parametrize("bits, passes, how", [(8, 2, ""), (7, 3, "by range"), (6, 5, "by range"), (5, 5, "of about")])
def test_ranges_are_taken_where_they_are_few(bits: int, passes: int, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two without a count of the groups, and up to one more than there would be parts by hash."""
    source = by_key([pa.array(np.tile(np.arange(200), 5))], tmp_path / "rows")
    in_parts(monkeypatch, bits)
    counted: list[int] = []
    count = duckdb_engine.DuckDBEngine.key_count
    monkeypatch.setattr(duckdb_engine.DuckDBEngine, "key_count", lambda self, keys: (counted.append(1), count(self, keys))[1])
    monkeypatch.setattr(duckdb_engine, "table_room", lambda settings: 6_000)
    info = mp.lmm("y ~ x + (1 | g)", source).info
    assert info["passes"] == passes and how in "".join(info["notes"]) and bool(info["notes"]) == bool(how)
    assert len(counted) == (bits < 7)


def test_footers_without_ranges_or_with_wrong_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.tile(np.arange(200), 5) + 7_000_000
    silent = by_key([pa.array(g)], tmp_path / "silent", write_statistics=False)
    wrong = by_key([pa.array(g)], tmp_path / "wrong", use_dictionary=False)
    (path,) = (tmp_path / "wrong").iterdir()
    whole, footer = path.read_bytes(), path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[-8:-4], "little")
    told, other = (number.to_bytes(8, "little") for number in (7_000_199, 7_000_150))
    assert told in whole[footer:]
    path.write_bytes(whole[:footer] + whole[footer:].replace(told, other))
    in_parts(monkeypatch)
    assert "of about" in mp.lmm("y ~ x + (1 | g)", silent).info["notes"][-1]
    with pytest.raises(mp.DataError):
        mp.lmm("y ~ x + (1 | g)", wrong)


def test_a_small_memory_limit_makes_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = np.random.default_rng(3).permutation(np.arange(300_000) // 2)
    source = as_data(many({"g": g}, g), "path", tmp_path)
    monkeypatch.setattr(collect, "SPARED", 0)
    fits = [mp.lmm("y ~ x + (1 | g)", source, options=mp.Options(threads=1, memory_limit=limit)) for limit in ("8GB", "400MB")]
    assert [fit.info["passes"] for fit in fits] == [2, 4]
    assert fits[1].loglik == pytest.approx(fits[0].loglik, rel=1e-12)
    np.testing.assert_allclose(fits[1].beta, fits[0].beta, rtol=1e-12)


def test_keys_that_a_collation_makes_one_are_two_in_parts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is compared by its bytes from every source, and so are its hashes."""
    con = duckdb.connect()
    con.execute("create table stored (y double, g varchar collate nocase)")
    level = "case when i % 2 = 0 then 'a' else 'A' end || (i // 2) % 5"
    con.execute(f"insert into stored select (i // 2) % 5 + (i * 37) % 11, {level} from range(50) t(i)")
    monkeypatch.setattr(collect, "SPARED", 0)
    monkeypatch.setattr(duckdb_engine, "table_room", lambda settings: 100)
    fit = mp.lmm("y ~ 1 + (1 | g)", con.table("stored"))
    assert (fit.info["blocks"], "parts" in fit.info["notes"][-1]) == (10, True)
    assert fit.loglik == pytest.approx(mp.lmm("y ~ 1 + (1 | g)", con.table("stored").pl()).loglik, abs=1e-10)


# ---- tables

KEYS: dict[str, tuple[list[Any], pl.DataType | type[pl.DataType], pa.DataType]] = {
    "int8": ([3, -1, 2], pl.Int8, pa.int8()),
    "uint64": ([2**64 - 1, 0, 7], pl.UInt64, pa.uint64()),
    "int64": ([2**53 + 1, 2**53, -5], pl.Int64, pa.int64()),
    "float": ([0.5, -1.0, 3.0], pl.Float64, pa.float64()),
    "decimal": ([Decimal("1.10"), Decimal("1.20"), Decimal("-3.00")], pl.Decimal(10, 2), pa.decimal128(10, 2)),
    "bool": ([True, False], pl.Boolean, pa.bool_()),
    "date": ([dt.date(2024, 2, 29), dt.date(1969, 7, 20), dt.date(2000, 1, 1)], pl.Date, pa.date32()),
    "datetime": ([dt.datetime(2024, 2, 29, 1), dt.datetime(2024, 2, 29), dt.datetime(1969, 7, 20)], pl.Datetime("us"), pa.timestamp("us")),
    "string": (["b", "é", ""], pl.String, pa.string()),
}


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("kind", ["polars", "duckdb", "path"])
@pytest.mark.parametrize("name", KEYS)
def test_keys_come_back_as_they_were(name: str, kind: str, tmp_path: Path) -> None:
    values, dtype, arrow = KEYS[name]
    rng = np.random.default_rng(1)
    frame = pl.DataFrame({"y": rng.normal(size=30), "key": pl.Series([values[i % len(values)] for i in range(30)], dtype=dtype)})
    source = as_data(frame, kind, tmp_path)
    fit = mp.lmm("y ~ 1 + (1 | key)", source)
    got = fit.ranef()["key"]
    assert sorted(got.to_pylist()) == sorted(values)
    assert got.type == arrow or (name == "string" and pa.types.is_large_string(got.type))
    fit.write(tmp_path / "fit")
    assert mp.load(tmp_path / "fit").ranef().equals(fit.ranef())
    assert fit.augment(source).read_all()["fitted"].null_count == 0
    assert fit.info["scored"]["unseen_levels"] == 0


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("kind", ["polars", "duckdb", "path"])
def test_enum_keys(kind: str, tmp_path: Path) -> None:
    order = ["q", "p", "r", "none"]
    frame = data().with_columns(key=pl.Series([order[i % 3] for i in range(96)], dtype=pl.Enum(order)))
    fit = mp.lmm("y ~ x + (1 | key)", as_data(frame, kind, tmp_path))
    keys = fit.ranef()["key"]
    assert sorted(str(value) for value in keys.to_pylist()) == ["p", "q", "r"]
    assert pl.Series(keys).cast(pl.String).n_unique() == 3


@pytest.mark.parametrize("name", ["term", "group", "estimate", "std_error", "reliability", "x", "x_se", "(Intercept)"])
def test_a_key_named_like_a_column_of_ours(name: str, tmp_path: Path) -> None:
    frame = data().rename({"x": "z", "g": name}) if name == "x" else data().rename({"g": name})
    slope = "z" if name == "x" else "x"
    fit = mp.lmm(f"y ~ {slope} + ({slope} | `{name}`)", frame)
    key = name if name == "x" else f"{name}_key"
    assert fit.ranef().column_names == ["group", key, "term", "estimate", "std_error", "reliability"]
    assert fit.ranef(wide=True).column_names == [key, "(Intercept)", "(Intercept)_se", slope, f"{slope}_se"]
    np.testing.assert_allclose(fit.augment().read_all()["fitted"], mp.lmm("y ~ x + (x | g)", data()).augment().read_all()["fitted"])
    fit.write(tmp_path / "fit")
    assert mp.load(tmp_path / "fit").ranef().equals(fit.ranef())


def test_shapes_of_ranef() -> None:
    fit = mp.lmm("y ~ x + (x | g)", data())
    long, wide = fit.ranef(), fit.ranef(wide=True)
    assert long.num_rows == 24 and wide.num_rows == 12
    assert long["term"].to_pylist()[:2] == ["(Intercept)", "x"]
    np.testing.assert_array_equal(long["estimate"].to_numpy().reshape(12, 2)[:, 1], wide["x"])
    np.testing.assert_array_equal(long["std_error"].to_numpy().reshape(12, 2)[:, 0], wide["(Intercept)_se"])
    assert wide["g"].to_pylist() == list(range(12))
    sd = np.array([row["sd"] for row in fit.varcorr().to_pylist()[:2]])
    np.testing.assert_allclose(long["reliability"].to_numpy().reshape(12, 2), 1 - (long["std_error"].to_numpy().reshape(12, 2) / sd) ** 2)
    assert fit.ranef("g").equals(long) and fit.ranefs()["g"].equals(long)
    with pytest.raises(mp.ConfigError, match="no grouping factor 'h'"):
        fit.ranef("h")


@pytest.mark.parametrize("kind", ["polars", "duckdb", "path", "reader"])
def test_streamed_ranef_is_the_table(kind: str, tmp_path: Path) -> None:
    fit = mp.lmm("y ~ x + (x | g)", as_data(data(), kind, tmp_path))
    reader = fit.ranef(stream=True)
    assert isinstance(reader, pa.RecordBatchReader)
    streamed, table = pl.DataFrame(reader.read_all()).sort("g", "term"), pl.DataFrame(fit.ranef()).sort("g", "term")
    assert streamed.schema == table.schema
    np.testing.assert_allclose(streamed["estimate"], table["estimate"], atol=1e-9)


def test_two_terms_with_one_coefficient_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.SingularFitWarning)
        fit = mp.lmm("y ~ x + (x | g) + (1 | g)", data())
    assert fit.ranef(wide=True).column_names[1::2] == ["(Intercept).1", "x", "(Intercept).2"]
    between = sum(row["variance"] for row in fit.varcorr().to_pylist() if row["term1"] == "(Intercept)" and not row["term2"])
    assert fit.icc()["g"] == pytest.approx(between / (between + fit.sigma**2))


def test_tidy() -> None:
    fit = mp.lmm("y ~ x + (x | g)", data())
    table = fit.tidy()
    names = ["effect", "group", "term", "estimate", "std_error", "statistic", "df", "p_value", "conf_low", "conf_high"]
    assert table.column_names == names
    assert table.schema.types == [pa.string()] * 3 + [pa.float64()] * 7
    rows = table.to_pylist()
    assert [(row["effect"], row["group"], row["term"]) for row in rows] == [
        ("fixed", None, "(Intercept)"), ("fixed", None, "x"), ("ran_pars", "g", "sd__(Intercept)"), ("ran_pars", "g", "sd__x"),
        ("ran_pars", "g", "cor__(Intercept).x"), ("ran_pars", "Residual", "sd__Observation"),
    ]  # fmt: skip
    for row in rows[:2]:
        assert row["statistic"] == pytest.approx(row["estimate"] / row["std_error"])
        assert row["conf_high"] - row["estimate"] == pytest.approx(1.959963984540054 * row["std_error"])
    narrow = fit.tidy(conf_level=0.5).to_pylist()[1]
    assert narrow["conf_high"] - narrow["estimate"] == pytest.approx(0.6744897501960817 * narrow["std_error"])
    assert {row["statistic"] for row in rows[2:]} == {None}
    np.testing.assert_allclose([row["std_error"] for row in rows[:2]], np.sqrt(np.diag(fit.vcov())))


def test_glance_is_consistent() -> None:
    fit = mp.lmm("y ~ x + (x | g)", data(4), reml=False)
    row = fit.glance().to_pylist()[0]
    assert list(row) == [
        "nobs", "n_dropped", "n_params", "sigma", "loglik", "deviance", "aic", "bic", "reml", "converged", "singular", "passes", "seconds",
    ]  # fmt: skip
    assert row["n_params"] == 6 and row["deviance"] == -2 * row["loglik"]
    assert row["aic"] == row["deviance"] + 12 and row["bic"] == pytest.approx(row["deviance"] + 6 * np.log(96))
    assert row["seconds"] > 0 and row["passes"] == 2.0


# ---- what is shown


def test_print_shows_what_lme4_prints() -> None:
    fit = mp.lmm("reaction ~ days + (1 + days | subject)", mp.datasets.path("sleepstudy"))
    words = [line.split() for line in str(fit).splitlines()]
    for line in (
        "Formula: reaction ~ days + (1 + days | subject)",
        "REML criterion at convergence: 1743.6",
        "Groups Name Variance Std.Dev. Corr",
        "subject (Intercept) 612.09 24.740",
        "days 35.07 5.922 0.07",
        "Residual 654.94 25.592",
        "Number of obs: 180, groups: subject, 18",
        "(Intercept) 251.405 6.825 36.838 <2e-16",
        "days -0.138",
    ):
        assert line.split() in words, line
    by_ml = str(mp.lmm("reaction ~ days + (1 + days | subject)", mp.datasets.path("sleepstudy"), reml=False))
    assert ["1763.9", "1783.1", "-876.0", "1751.9", "174"] in [line.split() for line in by_ml.splitlines()]


def test_html_escapes_names() -> None:
    bad = "<script>alert('x')</script>&"
    frame = data().rename({"x": bad, "g": f"{bad}g"}).with_columns(f=pl.col("f").replace({"b": "b<b>&"}))
    fit = mp.lmm(f"y ~ `{bad}` + f + (1 | `{bad}g`)", frame.with_columns(pl.lit(None, pl.Float64).alias("<i>")))
    text = fit._repr_html_()
    assert "<script" not in text and "<b>&amp;" not in text and "<b>&" not in text
    assert "&lt;script&gt;" in text and "fb&lt;b&gt;&amp;" in text
