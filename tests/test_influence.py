"""Deletion of blocks: against fits by generalized least squares without each block."""
from __future__ import annotations

import functools
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.optimize as so

import mlpipe as mp
from mlpipe import datasets
from mlpipe.again import again

SLEEP = datasets.path("sleepstudy")


def data(seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 12, 40)
    g = np.repeat(np.arange(40), sizes)
    n = len(g)
    x, t = rng.normal(size=n) + 2000.0, rng.choice(["a", "b", "c"], n)
    b = rng.normal(size=(40, 2)) * [1.0, 0.5]
    y = 3.0 + 0.2 * (x - 2000.0) + (t == "b") + b[g, 0] + b[g, 1] * (x - 2000.0) + rng.normal(size=n)
    y[g == 7] += 6.0
    return pl.DataFrame({"y": y, "x": x, "t": t, "g": g, "w": rng.uniform(0.5, 2.0, n), "q": rng.integers(1, 4, n)})


def dense(fit: Any, frame: pl.DataFrame, names: dict[str, Any], slopes: bool, w: np.ndarray, q: np.ndarray) -> dict[int, dict[str, Any]]:
    """Per block: Cook's distance and DFBETAS by fitting again without it, variances as they are."""
    psi = fit.terms[0].factor @ fit.terms[0].factor.T
    X = np.column_stack([np.broadcast_to(names[name], len(frame)).astype(float) for name in fit.names])
    Z = np.column_stack([np.ones(len(frame)), frame["x"]])[:, : 2 if slopes else 1]
    y, g = frame["y"].to_numpy(), frame["g"].to_numpy()

    def gls(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        A, c = np.zeros((X.shape[1],) * 2), np.zeros(X.shape[1])
        for level in np.unique(g[at]):
            i = np.repeat(np.flatnonzero(at & (g == level)), q[at & (g == level)])
            V = np.linalg.inv(Z[i] @ psi @ Z[i].T + np.diag(1 / w[i]))
            A, c = A + X[i].T @ V @ X[i], c + X[i].T @ V @ y[i]
        return np.linalg.solve(A, c), A

    beta, A = gls(np.ones(len(y), dtype=bool))
    out = {}
    for level in np.unique(g):
        without, rest = gls(g != level)
        d = beta - without
        out[int(level)] = {
            "cooks_distance": d @ A @ d / (len(d) * fit.sigma**2),
            **{f"dfbetas_{name}": v for name, v in zip(fit.names, d / (fit.sigma * np.sqrt(np.diag(np.linalg.inv(rest)))), strict=True)},
            "leverage": np.trace(np.linalg.solve(A, A - rest)),
        }
    return out


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize(("slopes", "extra"), [(True, None), (False, "weights"), (False, "freq")])
def test_against_fits_without_each_block(reml: bool, slopes: bool, extra: str | None) -> None:
    frame = data()
    more: dict[str, Any] = {extra: {"weights": "w", "freq": "q"}[extra]} if extra else {}
    fit = mp.lmm(f"y ~ I(x - 2000) * t + ({'1 + x' if slopes else '1'} | g)", frame, reml=reml, **more)
    w = frame["w"].to_numpy() if extra == "weights" else np.ones(len(frame))
    q = frame["q"].to_numpy() if extra == "freq" else np.ones(len(frame), dtype=int)
    b, c = frame["t"].to_numpy() == "b", frame["t"].to_numpy() == "c"
    x = frame["x"].to_numpy()
    s = x - 2000.0
    names = {"(Intercept)": 1.0, "I(x - 2000)": s, "tb": b, "tc": c, "I(x - 2000):tb": s * b, "I(x - 2000):tc": s * c}
    want = dense(fit, frame, names, slopes, w, q)
    table = pl.DataFrame(fit.influence(top=40))
    assert table.columns[:4] == ["g", "rows", "leverage", "cooks_distance"] and len(table) == 40
    assert table["g"][0] == max(want, key=lambda g: want[g]["cooks_distance"])
    assert table["cooks_distance"].is_sorted(descending=True) and table["leverage"].sum() == pytest.approx(len(fit.names))
    for row in table.to_dicts():
        for name, value in want[row["g"]].items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
        assert row["rows"] == int((frame["g"] == row["g"]).sum())
    assert pl.DataFrame(fit.influence(top=3))["g"].to_list() == table["g"].head(3).to_list()
    assert fit.info["extra_scans"][0] == "influence: one scan of the fit's source"


def test_a_block_without_which_a_coefficient_is_not_determined() -> None:
    frame = data().with_columns(t=pl.when(pl.col.g == 5).then(pl.lit("d")).otherwise(pl.col.t))
    fit = mp.lmm("y ~ t + (1 | g)", frame)
    first, second, *_ = fit.influence().to_pylist()
    assert first["g"] == 5 and first["cooks_distance"] is None and first["dfbetas_td"] is None
    assert second["cooks_distance"] > 0


@pytest.mark.parametrize("kind", ["lazy", "duckdb", "csv"])
def test_any_source(kind: str, tmp_path: Any) -> None:
    from .conftest import as_data

    fit = mp.lmm("y ~ x + (1 | g)", data())
    got = pl.DataFrame(mp.lmm("y ~ x + (1 | g)", as_data(data(), kind, tmp_path)).influence(top=5))
    want = pl.DataFrame(fit.influence(top=5))
    assert got["g"].to_list() == want["g"].to_list()
    np.testing.assert_allclose(got["cooks_distance"], want["cooks_distance"], rtol=1e-4)
    fit.write(tmp_path / "fit")
    loaded = mp.load(tmp_path / "fit")
    with pytest.raises(mp.DataError, match="not at hand"):
        loaded.influence()
    assert pl.DataFrame(loaded.influence(top=5, data=data()))["g"].to_list() == want["g"].to_list()


def test_a_robust_covariance_changes_nothing() -> None:
    fit = mp.lmm("y ~ x + t + (1 | g)", data())
    want = pl.DataFrame(fit.influence())
    fit.spread, fit.info["robust"] = fit.spread.of(2.0 * fit.spread.star), {"kind": "CR1"}
    got = pl.DataFrame(fit.influence())
    assert got["g"].to_list() == want["g"].to_list()
    np.testing.assert_allclose(got["dfbetas_tb"], want["dfbetas_tb"], rtol=1e-5)


@pytest.mark.parametrize(("formula", "collect"), [("y ~ x + (1 + x | g)", "blocks"), ("y ~ x + t + (1 | g)", "blocks+xx")])
def test_from_statistics(formula: str, collect: str) -> None:
    """Where the random part has all covariates, each block's X'X is among any statistics' sums."""
    frame = data().drop("w", "q")
    got = pl.DataFrame(mp.lmm(formula, mp.suffstats(formula, frame, collect=collect)).influence(top=8))
    want = pl.DataFrame(mp.lmm(formula, frame).influence(top=8))
    assert got["g"].to_list() == want["g"].to_list() and got["rows"].to_list() == want["rows"].to_list()
    np.testing.assert_allclose(got["cooks_distance"], want["cooks_distance"], rtol=1e-3)


def test_statistics_without_the_blocks_products() -> None:
    frame = data().drop("w", "q")
    for statistics in (mp.suffstats("y ~ x + (1 | g)", frame), mp.suffstats("y ~ x + (1 + x | g)", frame, collect="fit")):
        fit = mp.lmm("y ~ x + (1 | g)", statistics)
        with pytest.raises(mp.DataError, match="cross-products") as caught:
            fit.influence()
        assert "blocks+xx" in str(caught.value.hint)
        assert len(fit.influence(data=frame)) == 20


@pytest.mark.parametrize("made", [mp.lmm, functools.partial(mp.glmm, family="gaussian")])
def test_a_model_without_fixed_effects(made: Any) -> None:
    fit = made("y ~ 0 + (1 | g)", data())
    with pytest.raises(mp.ConfigError, match="no fixed effects"):
        fit.influence()


def test_what_is_refused() -> None:
    fit = mp.lmm("reaction ~ days + (1 | subject)", SLEEP)
    for top in (0, True, 2.5):
        with pytest.raises(mp.ConfigError, match="top"):
            fit.influence(top=top)  # type: ignore[arg-type]
    with pytest.raises(mp.DataError, match="no column 'reaction'"):
        fit.influence(data=pl.read_parquet(SLEEP).drop("reaction"))


# -- several factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("formula", "extra"), [
    ("y ~ x + (1 + x | a) + (1 | b)", {"weights": "w"}), ("y ~ x + (1 | b) + (0 + x | b) + (1 | a) + (1 | c)", {"freq": "q"}),
    ("y ~ x + (1 | c/a)", {}),
])  # fmt: skip
def test_levels_of_several_factors(formula: str, extra: dict[str, str]) -> None:
    rng = np.random.default_rng(9)
    n = 150
    a, b, c, x = rng.integers(0, 12, n), rng.integers(0, 7, n), rng.integers(0, 3, n), rng.normal(size=n) + 5.0
    y = 1 + 0.5 * x + rng.normal(size=12)[a] + 0.7 * rng.normal(size=7)[b] + rng.normal(size=n) + 2.0 * (b == 2)
    frame = pl.DataFrame({"y": y, "x": x, "a": [f"a{i}" for i in a], "b": b, "c": c})
    frame = frame.with_columns(w=pl.Series(rng.uniform(0.5, 2.0, n)), q=pl.Series(rng.integers(1, 3, n)))
    fit = mp.lmm(formula, frame, **extra)
    rows = np.repeat(np.arange(n), frame["q"] if "freq" in extra else 1)
    V = np.diag(1.0 / (frame["w"].to_numpy() if "weights" in extra else np.ones(n)))[np.ix_(rows, rows)] * np.eye(len(rows))
    key = {"a": a, "b": b, "c": c, "c:a": c * 100 + a}
    for term in fit.terms:
        Z = np.column_stack([np.ones(n) if name == "(Intercept)" else x for name in term.names])[rows]
        code = key[term.group][rows]
        V = V + (code[:, None] == code) * (Z @ term.factor @ term.factor.T @ Z.T)
    X, Y = np.column_stack([np.ones(n), x])[rows], y[rows]

    def gls(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inverse = np.linalg.inv(V[np.ix_(at, at)])
        A = X[at].T @ inverse @ X[at]
        return np.linalg.solve(A, X[at].T @ inverse @ Y[at]), A

    beta, A = gls(np.ones(len(rows), dtype=bool))
    np.testing.assert_allclose(fit.beta, beta, rtol=1e-6)
    for group, code in ((group, key[group]) for group in {term.group for term in fit.terms}):
        table = pl.DataFrame(fit.influence(top=50, group=group))
        assert len(table) == len(np.unique(code)) and table["cooks_distance"].is_sorted(descending=True)
        names = group.split(":")
        for row in table.to_dicts():
            (some,) = {int(code[i]) for i in range(n) if all(frame[name][i] == row[name] for name in names)}
            without, rest = gls(code[rows] != some)
            d = beta - without
            assert row["cooks_distance"] == pytest.approx(d @ A @ d / (2 * fit.sigma**2), rel=1e-6)
            error = fit.sigma * np.sqrt(np.diag(np.linalg.inv(rest)))
            assert [row["dfbetas_(Intercept)"], row["dfbetas_x"]] == pytest.approx((d / error).tolist(), rel=1e-6)
            assert row["leverage"] == pytest.approx(2.0 - np.trace(np.linalg.solve(A, rest)), rel=1e-6)
            assert row["rows"] == int((code == some).sum())


def test_which_factor_and_how_much_memory() -> None:
    fit = mp.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", datasets.path("penicillin"))
    with pytest.raises(mp.ConfigError, match="several grouping factors: plate, sample"):
        fit.influence()
    with pytest.raises(mp.ConfigError, match="'plat' is no grouping factor"):
        fit.influence(group="plat")
    rng = np.random.default_rng(2)
    frame = pl.DataFrame({"y": rng.normal(size=4_000), "g": np.arange(4_000) % 2_300, "h": rng.integers(0, 4, 4_000)})
    frame = frame.with_columns(y=pl.col.y + pl.col.g % 7)
    with pytest.raises(mp.ResourceError, match="2,304 random effects"):
        mp.lmm("y ~ 1 + (1 | g) + (1 | h)", frame).influence(group="h", options=mp.Options(memory_limit="250MB"))


# -- generalized models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", ["y ~ x + t + (1 | g)", "y ~ x + t + (1 + I(x - 2000) | g)"])
def test_a_gaussian_model_s_step_is_the_linear_model_s_deletion(formula: str) -> None:
    got = pl.DataFrame(mp.glmm(formula, data(), family="gaussian").influence(top=40))
    want = pl.DataFrame(mp.lmm(formula, data(), reml=False).influence(top=40))
    assert got.columns == want.columns and got["g"].to_list() == want["g"].to_list() and got["rows"].to_list() == want["rows"].to_list()
    for name in got.columns[2:]:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=1e-4)


def yes_no() -> pl.DataFrame:
    rng = np.random.default_rng(3)
    frame = data()
    chance = 1 / (1 + np.exp(3.0 - frame["y"].to_numpy()))
    return frame.with_columns(y=pl.Series((rng.random(len(frame)) < chance).astype(int)), x=pl.col.x - 2000.0)


def without(fit: Any, frame: pl.DataFrame, nagq: int) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients of greatest likelihood of some rows, the variance as in `fit`, and their standard errors."""
    with again(mp.glmm("y ~ x + (1 | g)", frame, family="binomial", nagq=nagq)) as found:
        R = found.model.fixed.R

        def look(beta: np.ndarray) -> tuple[float, np.ndarray]:
            at = found.best.surface.look(np.append(fit.theta, R @ beta), None)
            return at.value, R.T @ at.gradient[1:]

        beta = so.minimize(look, fit.beta, jac=True, tol=1e-9).x
        H = np.array([(look(beta + h)[1] - look(beta - h)[1]) / 2e-4 for h in 1e-4 * np.eye(2)])
    return beta, np.sqrt(np.diag(np.linalg.inv(H / 2.0)))


@pytest.mark.parametrize("nagq", [1, 5])
def test_one_step_is_near_the_maximum_without_the_block(nagq: int, tmp_path: Any) -> None:
    frame = yes_no()
    fit = mp.glmm("y ~ x + (1 | g)", frame, family="binomial", nagq=nagq)
    table = pl.DataFrame(fit.influence(top=40))
    assert table["leverage"].sum() == pytest.approx(2.0) and table["cooks_distance"].is_sorted(descending=True)
    for row in [*table.head(2).to_dicts(), table.row(20, named=True)]:
        beta, errors = without(fit, frame.filter(pl.col.g != row["g"]), nagq)
        np.testing.assert_allclose([row["dfbetas_(Intercept)"], row["dfbetas_x"]], (fit.beta - beta) / errors, rtol=0.15, atol=0.01)
    fit.write(tmp_path / "fit")
    assert pl.DataFrame(mp.load(tmp_path / "fit").influence(top=5, data=frame))["g"].to_list() == table["g"].head(5).to_list()


def test_what_generalized_models_refuse() -> None:
    frame = yes_no()
    with pytest.raises(mp.ConfigError, match="mixed models"):
        mp.glm("y ~ x", frame, family="binomial").influence()
    fit = mp.glmm("y ~ x + (1 | g) + (1 | t)", frame, family="binomial")
    with pytest.raises(mp.ConfigError, match="several grouping factors: g, t"):
        fit.influence()
    fit.info["method"] = "iterative"
    with pytest.raises(mp.ConfigError, match="Monte Carlo"):
        fit.influence(group="t")
    with pytest.raises(mp.ConfigError, match="top"):
        mp.glmm("y ~ x + (1 | g)", frame, family="binomial").influence(top=0)


def crossed() -> pl.DataFrame:
    rng = np.random.default_rng(9)
    n = 300
    a, b, x = rng.integers(0, 12, n), rng.integers(0, 7, n), rng.normal(size=n)
    eta = -0.2 + 0.5 * x + 0.8 * rng.normal(size=12)[a] + 0.7 * rng.normal(size=7)[b] + 1.5 * (b == 2)
    frame = pl.DataFrame({"a": [f"a{i}" for i in a], "b": b, "x": x, "z": eta + rng.normal(size=n)})
    return frame.with_columns(y=pl.Series(rng.random(n) < 1 / (1 + np.exp(-eta))).cast(int), c=pl.Series(rng.poisson(np.exp(eta))))


@pytest.mark.parametrize("formula", ["z ~ x + (1 + x | a) + (1 | b)", "z ~ x + (1 | a) + (1 | b) + (0 + x | b)"])
def test_a_gaussian_model_of_several_factors_is_the_linear_model(formula: str) -> None:
    frame = crossed()
    general, linear = mp.glmm(formula, frame, family="gaussian"), mp.lmm(formula, frame, reml=False)
    for group in ("a", "b"):
        got, want = (pl.DataFrame(fit.influence(top=20, group=group)) for fit in (general, linear))
        assert got.columns == want.columns and got[group].to_list() == want[group].to_list()
        assert got["rows"].to_list() == want["rows"].to_list()
        for name in got.columns[2:]:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-7)


def test_how_much_memory_levels_of_generalized_models_take() -> None:
    rng = np.random.default_rng(1)
    g = np.arange(6_000) % 2_600
    frame = pl.DataFrame({"y": rng.poisson(np.exp(rng.normal(size=2_600))[g]), "g": g, "h": np.arange(6_000) // 1_500})
    fit = mp.glmm("y ~ 1 + (1 | g) + (1 | h)", frame, family="poisson")
    with pytest.raises(mp.ResourceError, match="2,604 random effects"):
        fit.influence(group="h", options=mp.Options(memory_limit="300MB"))


def without_level(fit: Any, frame: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """As `without`, for intercepts of several factors."""
    sd = {term.group: term.factor[0, 0] for term in fit.terms}
    with again(mp.glmm(fit.formula, frame, family=fit.family)) as found:
        R, theta = found.model.fixed.R, [abs(term.R[0, 0]) * sd[term.group] for term in found.random]

        def look(beta: np.ndarray) -> tuple[float, np.ndarray]:
            at = found.best.surface.look(np.append(theta, R @ beta), None)
            return at.value, R.T @ at.gradient[2:]

        beta = so.minimize(look, fit.beta, jac=True, tol=1e-8).x
        H = np.array([(look(beta + h)[1] - look(beta - h)[1]) / 2e-4 for h in 1e-4 * np.eye(2)])
    return beta, np.sqrt(np.diag(np.linalg.inv(H / 2.0)))


@pytest.mark.parametrize(("response", "family", "groups"), [("y", "binomial", "ab"), ("c", "poisson", "b")])
def test_one_step_is_near_the_maximum_without_the_level_of_a_factor(response: str, family: str, groups: str) -> None:
    frame = crossed()
    fit = mp.glmm(f"{response} ~ x + (1 | a) + (1 | b)", frame, family=family)
    for group in groups:
        table = pl.DataFrame(fit.influence(top=20, group=group))
        assert table["cooks_distance"].is_sorted(descending=True) and table["rows"].sum() == 300
        row = table.row(0, named=True)
        beta, errors = without_level(fit, frame.filter(pl.col(group) != row[group]))
        assert max(abs(fit.beta - beta) / errors) > 0.4
        np.testing.assert_allclose([row["dfbetas_(Intercept)"], row["dfbetas_x"]], (fit.beta - beta) / errors, atol=0.04)
