"""Generalized models with several grouping factors, from rows to tables."""
from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import mlpipe as mp

from .conftest import as_data

REFERENCE = Path(__file__).parent / "reference"
MODEL = "y ~ x + (1 + x | a) + (1 | b)"


def simulated(seed: int = 0, n: int = 600, sd: tuple[float, float] = (0.8, 0.6)) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    a, b = np.r_[np.arange(30), rng.integers(0, 30, n - 30)], np.r_[np.arange(12), rng.integers(0, 12, n - 12)]
    x = rng.normal(size=n).round(1)
    u, s, v = sd[0] * rng.normal(size=30), 0.5 * rng.normal(size=30), sd[1] * rng.normal(size=12)
    eta = -0.3 + 0.5 * x + u[a] + s[a] * x + v[b]
    y = (rng.random(n) < 1 / (1 + np.exp(-eta))).astype(int)
    mu = np.exp(0.3 + 0.4 * eta)
    count, spread = rng.poisson(mu), rng.negative_binomial(2.0, 2.0 / (2.0 + mu))
    names = [f"b{i:02d}" for i in b]
    return pl.DataFrame({"a": a * 10, "b": names, "x": x, "y": y, "count": count, "spread": spread, "g": rng.integers(0, 2, n)})


FRAME = simulated()


@cache
def fit(formula: str = MODEL, family: str = "binomial", method: str = "auto") -> mp.GLMMFit:
    return mp.glmm(formula, FRAME, family=family, method=method)


def test_contract() -> None:
    fitted = fit()
    assert fitted.converged and not fitted.singular
    assert fitted.levels == {"a": 30, "b": 12} and fitted.groups == ["a", "b"]
    assert fitted.info["method"] == "exact"
    assert set(fitted.icc()) == {"a", "b"}
    assert 0.0 < fitted.r2()["marginal"] < fitted.r2()["conditional"] < 1.0
    assert fitted.varcorr().column("group").to_pylist() == ["a", "a", "a", "b"]
    assert len(fitted.theta) == 4 and fitted.glance().to_pylist()[0]["n_params"] == 6
    errors = fitted.tidy().column("std_error").to_pylist()
    assert all(error is not None and error > 0.0 for error in errors)
    text = str(fitted)
    assert "groups: a, 30; b, 12" in text and "Laplace" in text
    modes = fitted.ranef("a", wide=True)
    assert modes.column_names == ["a", "(Intercept)", "(Intercept)_se", "x", "x_se"]
    assert modes.column("a").to_pylist() == [10 * i for i in range(30)]
    assert fitted.ranef("b").column("b").to_pylist() == [f"b{i:02d}" for i in range(12)]
    assert (fitted.ranef("b").column("std_error").to_numpy() > 0.0).all()


def test_predictions_are_what_the_modes_say() -> None:
    fitted = fit()
    rows = pl.DataFrame({"a": [10, 10, 7, None], "b": ["b03", "new", "b03", "b00"], "x": [0.5, -1.0, 2.0, 0.0]})
    a = {key: (u, s) for key, u, s in zip(*(fitted.ranef("a", wide=True).column(i).to_pylist() for i in (0, 1, 3)), strict=True)}
    b = dict(zip(*(fitted.ranef("b", wide=True).column(i).to_pylist() for i in (0, 1)), strict=True))
    fixed = fitted.beta[0] + fitted.beta[1] * rows["x"].to_numpy()
    slopes = np.array([a.get(key, (0.0, 0.0))[0] + a.get(key, (0.0, 0.0))[1] * x for key, x in zip(rows["a"], rows["x"], strict=True)])
    effects = np.array([b.get(key, 0.0) for key in rows["b"]])

    def predicted(**how: Any) -> np.ndarray:
        return np.asarray(fitted.predict(rows, **how).read_all().column("predicted").to_numpy(zero_copy_only=False))

    assert np.allclose(predicted(kind="link"), fixed + slopes + effects)
    assert np.allclose(predicted(), 1 / (1 + np.exp(-(fixed + slopes + effects))))
    assert np.allclose(predicted(effects=["b"], kind="link"), fixed + effects)
    assert np.allclose(predicted(effects="population", kind="link"), fixed)
    assert np.isnan(predicted(new_levels="null")).tolist() == [False, True, True, True]
    with pytest.raises(mp.DataError, match="not seen"):
        predicted(new_levels="raise")
    rng, n = np.random.default_rng(0), 400_000
    L = fitted.terms[0].factor
    drawn = rng.normal(size=(n, 2)) @ L.T
    for value, x, mean in zip(predicted(effects="marginal"), rows["x"], fixed, strict=True):
        eta = mean + drawn[:, 0] + drawn[:, 1] * x + fitted.terms[1].factor[0, 0] * rng.normal(size=n)
        assert value == pytest.approx((1 / (1 + np.exp(-eta))).mean(), abs=3e-3)


def test_augment_keeps_the_rows() -> None:
    out = pl.DataFrame(fit().augment().read_all())
    assert out.select(FRAME.columns).equals(FRAME)
    assert np.allclose(out["y"] - out["fitted"], out["resid"])
    assert out["fitted"].is_between(0.0, 1.0).all()


def test_write_and_load(tmp_path: Path) -> None:
    fitted = fit()
    fitted.write(tmp_path / "fit")
    again = mp.load(tmp_path / "fit")
    assert str(again) == str(fitted)
    for group in fitted.groups:
        assert again.ranef(group).equals(fitted.ranef(group))
    both = [each.predict(FRAME).read_all().column("predicted").to_numpy() for each in (fitted, again)]
    assert np.array_equal(*both)


@pytest.mark.parametrize("kind", ["polars", "duckdb", "path"])
def test_every_engine_and_order_of_rows_gives_one_fit(kind: str, tmp_path: Path) -> None:
    fitted = fit()
    data = as_data(FRAME.sample(fraction=1.0, shuffle=True, seed=1), kind, tmp_path)
    other = mp.glmm(MODEL, data, family="binomial")
    assert other.loglik == pytest.approx(fitted.loglik, abs=1e-8)
    assert np.allclose(other.beta, fitted.beta, atol=1e-7) and np.allclose(other.theta, fitted.theta, atol=1e-7)


def test_a_mapped_spool_in_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpipe import gather, spool

    monkeypatch.setattr(spool, "CHUNK_ROWS", 64)
    monkeypatch.setattr(gather, "build", lambda *a, budget, **k: spool.build(*a, budget=1_000, **k))
    other = mp.glmm(MODEL, FRAME, family="binomial")
    assert other.info["spool"]["mapped"]
    assert other.loglik == pytest.approx(fit().loglik, abs=1e-9)
    assert np.allclose(other.theta, fit().theta, atol=1e-8)


def test_cells_are_rows() -> None:
    """Rows of one combination and design row are held as one; a frequency is so many rows."""
    frame = FRAME.select("a", "b", "g", "count")
    twice = pl.concat([frame, frame])
    fits = [mp.glmm("count ~ g + (1 | a) + (1 | b)", data, family="poisson", freq=freq) for data, freq in
            ((twice, None), (frame.with_columns(q=pl.lit(2)), "q"))]  # fmt: skip
    assert fits[0].info["cells"] < 1200
    assert fits[0].loglik == pytest.approx(fits[1].loglik, abs=1e-7)
    assert np.allclose(fits[0].beta, fits[1].beta, atol=1e-7)


@pytest.mark.parametrize(("response", "family"), [("count", "poisson"), ("spread", "negbinomial")])
def test_iterative_agrees_within_its_error(response: str, family: str) -> None:
    formula = f"{response} ~ x + (1 | a) + (1 | b)"
    exact, other = fit(formula, family), fit(formula, family, "iterative")
    assert other.info["method"] == "iterative" and other.converged
    carlo = other.info["monte_carlo"]
    assert max(carlo["error"]) <= 0.05
    se = np.sqrt(np.diag(exact.theta_covariance))
    assert (np.abs(other.theta - exact.theta) < 4.0 * np.array(carlo["error"]) * se + 2e-3 * se).all()
    assert np.allclose(other.beta, exact.beta, atol=0.05 * np.sqrt(np.diag(exact.vcov())).min())
    assert other.loglik == pytest.approx(exact.loglik, abs=5.0 * carlo["loglik_error"] + 1e-3)
    assert np.allclose(np.sqrt(np.diag(other.vcov())), np.sqrt(np.diag(exact.vcov())), rtol=0.05)
    for group in exact.groups:
        ours, theirs = (each.ranef(group).column("std_error").to_numpy() for each in (other, exact))
        assert np.allclose(ours, theirs, rtol=0.3)
    again = mp.glmm(formula, FRAME.to_arrow(), family=family, method="iterative", options=mp.Options(threads=1))
    assert np.allclose(again.theta, other.theta, rtol=1e-6)
    assert "Monte Carlo error at most" in str(other)


@pytest.mark.parametrize("method", ["exact", "iterative"])
def test_a_factor_without_variance_is_a_singular_fit(method: str) -> None:
    frame = FRAME.with_columns(c=np.arange(600) % 20, k=np.arange(600) // 20 % 2)  # as many of each kind in every level of c
    with pytest.warns(mp.SingularFitWarning):
        fitted = mp.glmm("k ~ 1 + (1 | a) + (1 | c)", frame, family="binomial", method=method)
    assert fitted.singular and fitted.converged
    assert dict(zip(fitted.varcorr()["group"].to_pylist(), fitted.varcorr()["sd"].to_pylist(), strict=True))["c"] == 0.0
    both = mp.glmm("k ~ 1 + (1 | a)", frame, family="binomial")
    assert fitted.loglik == pytest.approx(both.loglik, abs=1e-6 if method == "exact" else 0.01)


def test_nested_is_found_and_ids_may_start_anew() -> None:
    frame = FRAME.with_columns(school=pl.col("a") // 100, pupil=pl.col("a") % 100)
    fitted = mp.glmm("count ~ x + (1 | school/pupil)", frame, family="poisson")
    assert fitted.levels == {"school:pupil": 30, "school": 3}
    assert fitted.ranef("school:pupil").column_names[:3] == ["group", "school", "pupil"]
    written = mp.glmm("count ~ x + (1 | school) + (1 | a)", frame, family="poisson")
    assert written.loglik == pytest.approx(fitted.loglik, abs=1e-8)
    assert any("nested" in note for note in written.info["notes"])


def test_start_and_checkpoint(tmp_path: Path) -> None:
    fitted = fit()
    started = mp.glmm(MODEL, FRAME, family="binomial", start=fitted.theta.tolist(), checkpoint=tmp_path / "state")
    assert np.allclose(started.theta, fitted.theta, atol=1e-6)
    again = mp.glmm(MODEL, FRAME, family="binomial", checkpoint=tmp_path / "state")
    assert np.allclose(again.theta, fitted.theta, atol=1e-6) and again.evaluations <= started.evaluations
    with pytest.raises(mp.ConfigError, match="4 finite numbers"):
        mp.glmm(MODEL, FRAME, family="binomial", start=[1.0])


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"nagq": 5}, mp.ConfigError, "several grouping factors"),
    ({"method": "fast"}, mp.ConfigError, "not known"),
    ({"formula": "y ~ x + (1 | a) + (1 | one)"}, mp.DataError, "grouping factor one has fewer than two levels"),
    ({"formula": "y ~ x + (1 | a) + (1 | nowhere)"}, mp.ColumnNotFoundError, "nowhere"),
    ({"family": "gamma"}, mp.DataError, "above 0"),
    ({"formula": "y ~ x + (1 | a)", "method": "iterative"}, mp.ConfigError, "solved exactly"),
])  # fmt: skip
def test_bad_requests(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"formula": MODEL, "family": "binomial"} | change
    with pytest.raises(error, match=words):
        mp.glmm(given.pop("formula"), FRAME.with_columns(one=pl.lit(1)), **given)


def test_plan_says_path_and_memory() -> None:
    text = str(mp.plan("glmm", MODEL, FRAME, family="binomial"))
    for words in ("exact: all random effects jointly", "30 of a", "12 of b", "evaluations of the likelihood", "MB of spool"):
        assert words in text
    with pytest.raises(mp.ConfigError, match="several grouping factors"):
        mp.plan("glmm", MODEL, FRAME, family="binomial", nagq=3)
