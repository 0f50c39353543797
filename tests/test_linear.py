"""Least squares against whole matrices and R: pooled, within, robust, from rows on every engine and from statistics."""
from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import mlpipe as mp

from . import dense_linear as dense
from .conftest import TYPED_KINDS, as_data

REFERENCE = Path(__file__).parent / "reference"


def simulated(n: int = 400, seed: int = 1) -> pl.DataFrame:
    """Firms, workers and regions (firms lie within regions), a covariate that leans on them, heteroskedastic errors."""
    rng = np.random.default_rng(seed)
    firm, worker = rng.integers(0, 14, n), rng.integers(0, 60, n)
    x = rng.normal(size=n) + 0.5 * (firm % 5) + 1e4
    z = rng.normal(size=n)
    effect, ability = rng.normal(size=14), rng.normal(size=60)
    y = 2.0 + 0.7 * (x - 1e4) - 0.3 * z + effect[firm] + ability[worker] + rng.normal(size=n) * (0.5 + np.abs(z))
    return pl.DataFrame(
        {
            "y": y, "x": x, "z": z, "firm": firm, "worker": [f"w{k}" for k in worker], "region": firm // 5, "year": rng.integers(0, 4, n),
            "w": rng.uniform(0.5, 2.0, n), "q": rng.integers(1, 4, n), "c": np.array(["a", "b", "c"])[rng.integers(0, 3, n)],
        }
    )  # fmt: skip


FRAME = simulated()
X = np.column_stack([np.ones(len(FRAME)), dense.columns(FRAME, "x", "z")])
Y = FRAME["y"].to_numpy()
ONES, W = np.ones(len(FRAME)), FRAME["w"].to_numpy()
SHIFTED = X - np.array([0.0, 1e4, 0.0])  # for the dense side: slopes and their errors are the same


def codes(name: str) -> np.ndarray:
    return np.unique(FRAME[name].to_numpy(), return_inverse=True)[1]


def slopes_agree(fit: Any, beta: np.ndarray, V: np.ndarray, rtol: float = 1e-8) -> None:
    names = [name for name in fit.names if name != "(Intercept)"]
    at = [fit.names.index(name) for name in names]
    np.testing.assert_allclose(fit.beta[at], beta[-len(at) :], rtol=rtol)
    np.testing.assert_allclose(fit.vcov()[np.ix_(at, at)], V[-len(at) :, -len(at) :], rtol=rtol, atol=rtol * np.diag(V)[-len(at) :].min())


@pytest.mark.parametrize("weights", [None, "w"])
def test_pooled(weights: str | None) -> None:
    w = W if weights else ONES
    fit = mp.ols("y ~ x + z", FRAME, weights=weights)
    beta = dense.coefficients(SHIFTED, Y, w)
    e = Y - SHIFTED @ beta
    rss, n = float(w @ e**2), len(Y)
    slopes_agree(fit, beta, dense.bread(SHIFTED, w) * rss / (n - 3))
    assert fit.sigma == pytest.approx(math.sqrt(rss / (n - 3)))
    tss = float(w @ (Y - w @ Y / w.sum()) ** 2)
    assert fit.r2()["r2"] == pytest.approx(1 - rss / tss)
    assert fit.loglik == pytest.approx(-0.5 * (n * (math.log(2 * math.pi * rss / n) + 1) - np.log(w).sum()))
    row = fit.tidy().to_pylist()[1]
    assert row["df"] == n - 3 and row["conf_low"] < row["estimate"] < row["conf_high"]
    assert fit.confint().to_pylist()[1]["conf_low"] == pytest.approx(row["conf_low"])
    assert "t value" in str(fit) and "R-squared" in str(fit) and "<table>" in fit._repr_html_()


@pytest.mark.parametrize("kind", ["HC0", "HC1", "HC2", "HC3"])
@pytest.mark.parametrize("weights", [None, "w"])
def test_rows_robust(kind: str, weights: str | None) -> None:
    w = W if weights else ONES
    fit = mp.ols("y ~ x + z", FRAME, vcov=kind, weights=weights)
    slopes_agree(fit, dense.coefficients(SHIFTED, Y, w), dense.rows_covariance(SHIFTED, Y, w, kind))
    assert fit.robust == kind and f"({kind})" in str(fit)


@pytest.mark.parametrize("kind", ["CR0", "CR1", "CR2"])
@pytest.mark.parametrize("cluster", [("firm",), ("worker",), ("firm", "worker"), ("firm", "worker", "year")])
@pytest.mark.parametrize("weights", [None, "w"])
def test_clusters(kind: str, cluster: tuple[str, ...], weights: str | None) -> None:
    w = W if weights else ONES
    fit = mp.ols("y ~ x + z", FRAME, cluster=cluster, vcov=kind, weights=weights)
    V = dense.clusters_covariance(SHIFTED, Y, w, [codes(name) for name in cluster], kind)
    slopes_agree(fit, dense.coefficients(SHIFTED, Y, w), V)
    assert fit.n_clusters == tuple(FRAME[name].n_unique() for name in cluster)
    assert fit.tidy().to_pylist()[0]["df"] == min(fit.n_clusters) - 1


@pytest.mark.parametrize("vcov", [None, "HC1", "HC3"])
@pytest.mark.parametrize("cluster", [None, "firm"])
def test_frequencies_are_repeated_rows(vcov: str | None, cluster: str | None) -> None:
    vcov = {"HC1": "CR1", "HC3": "CR2", None: None}[vcov] if cluster else vcov
    short = mp.ols("y ~ x + z", FRAME, freq="q", vcov=vcov, cluster=cluster)
    long = mp.ols("y ~ x + z", FRAME.select(pl.all().repeat_by("q").explode()), vcov=vcov, cluster=cluster)
    np.testing.assert_allclose(short.beta, long.beta, rtol=1e-9)
    np.testing.assert_allclose(short.vcov(), long.vcov(), rtol=1e-6)
    assert short.nobs == long.nobs == FRAME["q"].sum()


@pytest.mark.parametrize("absorb", [("firm",), ("firm", "worker"), ("firm", "worker", "year"), ("region", "firm")])
@pytest.mark.parametrize("weights", [None, "w"])
def test_absorbed(absorb: tuple[str, ...], weights: str | None) -> None:
    w, n = W if weights else ONES, len(Y)
    D = dense.dummies(*(codes(name) for name in absorb))
    full = np.column_stack([D, SHIFTED[:, 1:]])
    beta = dense.coefficients(full, Y, w)
    rss = float(w @ (Y - full @ beta) ** 2)
    fit = mp.ols("y ~ x + z", FRAME, absorb=absorb, weights=weights)
    assert fit.df_residual == n - full.shape[1] and fit.names == ("x", "z")
    slopes_agree(fit, beta, dense.bread(full, w) * rss / (n - full.shape[1]))
    table = pl.from_arrow(fit.augment(FRAME).read_all())
    np.testing.assert_allclose(table["fitted"].to_numpy(), full @ beta, atol=1e-6)
    np.testing.assert_allclose(table["resid"].to_numpy(), Y - full @ beta, atol=1e-6)
    partial = dense.partialled(D, w, Y)
    assert fit.r2()["within"] == pytest.approx(1 - rss / float(w @ partial**2))
    for group in absorb:
        assert len(fit.ranef(group)) == FRAME[group].n_unique()


@pytest.mark.parametrize("kind", ["HC0", "HC1", "HC2", "HC3"])
@pytest.mark.parametrize("absorb", [("firm",), ("firm", "worker"), ("firm", "worker", "year")])
@pytest.mark.parametrize("weights", [None, "w"])
def test_absorbed_and_robust_to_rows(kind: str, absorb: tuple[str, ...], weights: str | None) -> None:
    """The leverages of the absorbed effects count: all is that of least squares on their indicators."""
    full, w = np.column_stack([dense.dummies(*(codes(name) for name in absorb)), SHIFTED[:, 1:]]), W if weights else ONES
    fit = mp.ols("y ~ x + z", FRAME, absorb=absorb, vcov=kind, weights=weights)
    slopes_agree(fit, dense.coefficients(full, Y, w), dense.rows_covariance(full, Y, w, kind), rtol=1e-7)


def test_leverages_of_absorbed_effects_need_memory() -> None:
    options = mp.Options(memory_limit="300MB")
    frame = pl.DataFrame({"a": range(3000), "b": [k * 7 % 2999 for k in range(3000)]}).select(pl.all().repeat_by(2).explode())
    frame = frame.with_columns(y=pl.Series(np.random.default_rng(0).normal(size=6000)), x=pl.Series(np.arange(6000) % 11))
    with pytest.raises(mp.ResourceError, match="absorbed levels need"):
        mp.ols("y ~ x", pl.concat([frame, frame]), absorb=["a", "b"], vcov="HC3", options=options)


@pytest.mark.parametrize("kind", ["CR0", "CR1", "CR2"])
@pytest.mark.parametrize("absorb", [("firm",), ("firm", "worker")])
@pytest.mark.parametrize("cluster", [("firm",), ("region",), ("firm", "year")])
def test_absorbed_and_clustered(kind: str, absorb: tuple[str, ...], cluster: tuple[str, ...]) -> None:
    D = dense.dummies(*(codes(name) for name in absorb))
    full = np.column_stack([D, SHIFTED[:, 1:]])
    if kind == "CR2" and (len(absorb) > 1 or len(cluster) > 1):
        with pytest.raises(mp.ConfigError, match="lie within the clusters"):
            mp.ols("y ~ x + z", FRAME, absorb=absorb, vcov=kind, cluster=cluster, weights="w")
        return
    fit = mp.ols("y ~ x + z", FRAME, absorb=absorb, vcov=kind, cluster=cluster, weights="w")
    V = np.zeros((full.shape[1],) * 2)
    for keys, sign in ((cluster[:1], 1.0), (cluster[1:], 1.0), (cluster, -1.0)) if len(cluster) == 2 else ((cluster, 1.0),):
        code = np.unique(np.column_stack([codes(name) for name in keys]), axis=0, return_inverse=True)[1].ravel()
        apart = ("firm",) if keys in (("firm",), ("region",)) else ()  # firms lie within both
        rest = [codes(name) for name in absorb if name not in apart]
        counted = 2 + dense.dummies(np.zeros(len(Y)), *rest).shape[1]
        V += sign * dense.one_way(full, Y, W, code, kind, counted)
    slopes_agree(fit, dense.coefficients(full, Y, W), V, rtol=1e-7)


@pytest.mark.parametrize(("absorb", "written"), [("firm", "factor(firm)"), (["firm", "year"], "factor(firm) + factor(year)")])
def test_effects_across_clusters_count_like_the_factor_written_out(absorb: Any, written: str) -> None:
    for kind in ("HC1", "CR1"):
        cluster = "worker" if kind == "CR1" else None
        fit = mp.ols("y ~ z", FRAME, absorb=absorb, vcov=kind, cluster=cluster)
        whole = mp.ols(f"y ~ z + {written}", FRAME, vcov=kind, cluster=cluster)
        at = whole.names.index("z")
        np.testing.assert_allclose(fit.vcov()[0, 0], whole.vcov()[at, at], rtol=1e-9)


def test_the_order_of_absorbed_factors_does_not_matter() -> None:
    frame = FRAME.with_columns(part=pl.col("region") % 2).with_columns(worker=pl.concat_str("worker", "part"))  # two parts
    one, other = (mp.ols("y ~ z", frame, absorb=names, cluster="region") for names in (["firm", "worker"], ["worker", "firm"]))
    np.testing.assert_allclose(one.vcov(), other.vcov(), rtol=1e-9)


@pytest.mark.parametrize("kind", ["CR0", "CR2"])
def test_far_covariates_within_a_factor_keep_their_digits(kind: str) -> None:
    rng = np.random.default_rng(5)
    n = 120
    x, a, f, w = rng.integers(-400, 400, n), rng.integers(0, 8, n), rng.choice(["u", "v"], n), rng.uniform(0.5, 2.0, n)
    frame = pl.DataFrame({"x": x, "a": a, "f": f, "w": w, "y": 0.01 * x + rng.normal(size=8)[a] + rng.normal(size=n)})
    far = frame.with_columns(x=pl.col("x") * 2**20 + 2**50)
    near, fit = (mp.ols("y ~ x + f", data, absorb="a", cluster="a", vcov=kind, weights="w") for data in (frame, far))
    np.testing.assert_allclose(np.sqrt(np.diag(fit.vcov())) * [2**20, 1], np.sqrt(np.diag(near.vcov())), rtol=1e-9)


def test_a_factor_beside_a_far_covariate_without_an_intercept() -> None:
    """Together the indicators are nearly a multiple of the covariate."""
    rng = np.random.default_rng(2)
    x, f = rng.normal(size=150), rng.choice(["u", "v", "w"], 150)
    frame = pl.DataFrame({"x": 1000.0 + 2.0**-14 * np.round(x * 8), "f": f, "y": x + rng.normal(size=150)})
    fit = mp.ols("y ~ 0 + x + f", frame)
    assert fit.names == ("x", "fu", "fv", "fw")
    centred = mp.ols("y ~ 0 + x + f", frame.with_columns(x=pl.col("x") - 1000.0))
    assert fit.beta[0] == pytest.approx(centred.beta[0], rel=1e-6)
    assert fit.vcov()[0, 0] == pytest.approx(centred.vcov()[0, 0], rel=1e-6)


def test_intervals_of_predictions_are_those_of_the_tests() -> None:
    from scipy.stats import t

    for arguments in ({}, {"cluster": "year"}):
        fit = mp.ols("y ~ z", FRAME, **arguments)
        table = pl.DataFrame(fit.predict(FRAME, interval="confidence"))
        se = np.sqrt(np.einsum("in,ij,jn->n", *((x := np.stack([ONES, FRAME["z"].to_numpy()])), fit.vcov(), x)))
        half = (table["upper"] - table["lower"]).to_numpy() / 2.0
        np.testing.assert_allclose(half, t.isf(0.025, fit.df_test) * se, rtol=1e-9)


def test_a_negative_variance_is_null_everywhere() -> None:
    """Few clusters in two ways: of the intercept nothing is known, and said so."""
    rng = np.random.default_rng(0)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        frame = pl.DataFrame({"y": rng.normal(size=60), "x": rng.normal(size=60), "a": rng.integers(0, 4, 60), "b": rng.integers(0, 4, 60)})
        fit = mp.ols("y ~ x", frame, cluster=["a", "b"], vcov="CR0")
        if fit.vcov()[0, 0] < 0.0:
            break
    first = fit.tidy().to_pylist()[0]
    assert all(first[name] is None for name in ("std_error", "statistic", "p_value", "conf_low", "conf_high"))
    assert fit.effects().to_pylist()[0]["std_error"] is None
    assert fit.confint().to_pylist()[0] == {"term": "(Intercept)", "conf_low": None, "conf_high": None}


def test_tables_without_coefficients_have_their_types() -> None:
    fit = mp.ols("y ~ 1", FRAME, absorb="firm")
    assert str(fit.confint().schema.field("term").type) == "string"
    assert {str(fit.effects().schema.field(name).type) for name in ("effect", "term")} == {"string"}


@pytest.mark.parametrize("engine", ["polars", "duckdb"])
def test_clusters_of_text_do_not_stand_in_the_way_of_other_questions(engine: str, tmp_path: Path) -> None:
    frame = FRAME.with_columns(worker=pl.when(pl.col("year") == 3).then(None).otherwise(pl.col("worker")))
    fit = mp.ols("y ~ z + c", as_data(frame, engine, tmp_path), cluster="worker")
    assert fit.nobs == frame["worker"].count()
    assert fit.means("c").num_rows == 3 and fit.contrasts("c").num_rows == 3
    assert fit.effects().num_rows == 11
    assert fit.means("c", data=frame.drop("worker")).num_rows == 3  # other rows need no clusters


def test_degrees_of_freedom_that_least_squares_has_not() -> None:
    for absorb in (None, "firm"):
        fit = mp.ols("y ~ z", FRAME, absorb=absorb)
        with pytest.raises(mp.ConfigError, match="belongs to linear mixed models"):
            fit.test("z = 0", ddf="satterthwaite")


def test_two_disconnected_parts_lose_one_more_degree() -> None:
    frame = FRAME.with_columns(part=pl.col("firm") % 2).with_columns(worker=pl.concat_str("worker", "part"))
    fit = mp.ols("y ~ z", frame, absorb=["firm", "worker"])
    assert fit.absorbed_rank == 14 + frame["worker"].n_unique() - 2


@pytest.mark.parametrize("kind", TYPED_KINDS)
def test_engines_agree(kind: str, tmp_path: Path) -> None:
    want = mp.ols("y ~ x + c", FRAME, absorb="firm", cluster="region", vcov="CR2", weights="w")
    fit = mp.ols("y ~ x + c", as_data(FRAME, kind, tmp_path), absorb="firm", cluster="region", vcov="CR2", weights="w")
    np.testing.assert_allclose(fit.beta, want.beta, rtol=1e-9)
    np.testing.assert_allclose(fit.vcov(), want.vcov(), rtol=1e-8)
    assert len(fit.ranef()) == 14


def test_from_statistics(tmp_path: Path) -> None:
    stats = mp.suffstats("y ~ x + z + c + (1 | firm)", FRAME, collect="blocks+xx")
    stats.save(tmp_path / "stats")
    for held in (stats, mp.SuffStats.load(tmp_path / "stats")):
        for more in ({}, {"absorb": "firm"}):
            for kind in (None, "CR1", "CR2"):
                arguments: dict[str, Any] = {**more, **({"cluster": "firm", "vcov": kind} if kind else {})}
                fit, want = mp.ols("y ~ x + z", held, **arguments), mp.ols("y ~ x + z", FRAME, **arguments)
                slopes_agree(fit, want.beta, want.vcov())
    np.testing.assert_allclose(mp.lmm("y ~ x + (1 | firm)", stats).loglik, mp.lmm("y ~ x + (1 | firm)", FRAME).loglik, rtol=1e-9)
    half, rest = FRAME[:150], FRAME[150:]
    added = mp.suffstats("y ~ x + z + c + (1 | firm)", half, collect="blocks+xx").update(rest)
    merged = mp.ols("y ~ x + c", added, cluster="firm", vcov="CR2")
    np.testing.assert_allclose(merged.vcov(), mp.ols("y ~ x + c", FRAME, cluster="firm", vcov="CR2").vcov(), rtol=1e-6)
    with pytest.raises(mp.DataError, match="do not hold"):
        mp.ols("y ~ x", stats, vcov="HC3")
    with pytest.raises(mp.DataError, match="not worker"):
        mp.ols("y ~ x", stats, absorb="worker")


def test_nearly_exact_fits_keep_their_digits() -> None:
    rng = np.random.default_rng(5)
    e = rng.normal(size=len(FRAME))
    frame = FRAME.with_columns(y=3.0 + 2e7 * pl.col("z") + pl.Series(e))
    fit = mp.ols("y ~ z", frame, vcov="HC0")
    Z = np.column_stack([np.ones(len(e)), FRAME["z"].to_numpy()])
    gamma = dense.coefficients(Z, e, ONES)
    assert fit.sigma == pytest.approx(math.sqrt(((e - Z @ gamma) ** 2).sum() / (len(e) - 2)), rel=1e-6)
    assert fit.beta[1] == pytest.approx(2e7 + gamma[1], rel=1e-15, abs=1e-7)
    np.testing.assert_allclose(fit.vcov(), dense.rows_covariance(Z, e, ONES, "HC0"), rtol=1e-6)
    with pytest.raises(mp.DataError, match="exactly"):
        mp.ols("y ~ z", FRAME.with_columns(y=2 * pl.col("z")))


def test_written_and_loaded(tmp_path: Path) -> None:
    fit = mp.ols("y ~ x + c", FRAME, absorb=["firm", "worker"], cluster=["firm", "year"])
    fit.write(tmp_path / "fit")
    again = mp.load(tmp_path / "fit")
    assert type(again) is mp.OLSFit and again.cluster == ("firm", "year") and again.r2() == fit.r2()
    np.testing.assert_array_equal(again.vcov(), fit.vcov())
    mine, theirs = (pl.from_arrow(f.predict(FRAME).read_all())["predicted"] for f in (fit, again))
    np.testing.assert_allclose(mine, theirs)
    assert str(again).splitlines()[0] == str(fit).splitlines()[0]


def test_unseen_levels_take_the_mean_effect() -> None:
    fit = mp.ols("y ~ z", FRAME, absorb="firm")
    new = FRAME.head(3).with_columns(firm=pl.lit(99))
    predicted = pl.from_arrow(fit.predict(new).read_all())["predicted"].to_numpy()
    e = Y - fit.beta[0] * FRAME["z"].to_numpy()
    np.testing.assert_allclose(predicted, e.mean() + fit.beta[0] * new["z"].to_numpy())


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"vcov": "HC1", "cluster": "firm"}, mp.ConfigError, "clustered"),
        ({"vcov": "CR1"}, mp.ConfigError, "cluster="),
        ({"vcov": "HC9"}, mp.ConfigError, "HC0"),
        ({"cluster": "frm"}, mp.ColumnNotFoundError, "firm"),
        ({"absorb": "frm"}, mp.ColumnNotFoundError, "firm"),
        ({"absorb": ["firm", "firm"]}, mp.ConfigError, "twice"),
        ({"cluster": 3}, mp.ConfigError, "cluster"),
        ({"cluster": "one"}, mp.DataError, "two clusters"),
        ({"formula": "y ~ x + (1 | firm)"}, mp.ConfigError, "random term"),
        ({"formula": None}, mp.FormulaError, "the formula must be text, not of type NoneType"),
        ({"weights": np.ones(3)}, mp.ConfigError, "weights must be the name of a column or an expression, not a value of type ndarray"),
        ({"offset": 1}, mp.ConfigError, "put its values into a column of the data"),
        ({"contrasts": "sum"}, mp.ConfigError, "contrasts must map factors to theirs"),
        ({"contrasts": {"f": 3}}, mp.ConfigError, "unknown contrast 3 for 'f'"),
        ({"levels": ["a"]}, mp.ConfigError, "levels must map factors to theirs"),
        ({"options": {"threads": 1}}, mp.ConfigError, "options must be mlpipe.Options, not of type dict"),
    ],
)
def test_bad_requests(arguments: dict[str, Any], error: Any, text: str) -> None:
    frame = FRAME.with_columns(one=pl.lit(1))
    formula = arguments.pop("formula", "y ~ x")
    with pytest.raises(error) as caught:
        mp.ols(formula, frame, **arguments)
    assert text in f"{caught.value} {getattr(caught.value, 'hint', '')}"


def test_arguments_are_looked_at_before_the_data_are() -> None:
    """Whatever function, and where formula and data are in each other's place."""
    for function, more in [("lmm", {}), ("glmm", {"family": "poisson"}), ("glm", {"family": "poisson"}), ("gee", {"groups": "g"})]:
        formula = "y ~ x + (1 | g)" if "mm" in function else "y ~ x"
        with pytest.raises(mp.ConfigError, match="freq must be the name of a column"):
            getattr(mp, function)(formula, "nowhere.parquet", freq=[1], **more)
        with pytest.raises(mp.FormulaError, match="not of type DataFrame"):
            getattr(mp, function)(FRAME, formula, **more)
    with pytest.raises(mp.DataError, match="the formula comes first, then the data"):
        mp.lmm("rows.parquet", "y ~ x + (1 | g)")
    with pytest.raises(mp.ConfigError, match="no function"):
        mp.plan(mp.lmm, "y ~ x", FRAME)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unsupported operand"):
        mp.suffstats("y ~ x", FRAME) + 1  # type: ignore[operator]


def test_absorbed_columns_of_any_name() -> None:
    odd = FRAME.rename({"firm": "fi`rm \\ 1"})
    assert mp.ols("y ~ x", odd, absorb="fi`rm \\ 1").fixef() == mp.ols("y ~ x", FRAME, absorb="firm").fixef()


def test_rows_without_a_cluster_are_dropped_and_counted() -> None:
    frame = FRAME.with_columns(firm=pl.when(pl.col("year") == 0).then(None).otherwise("firm"))
    fit = mp.ols("y ~ x", frame, cluster="firm")
    assert fit.nobs == (FRAME["year"] != 0).sum() and fit.info["dropped"] == {"firm": int((FRAME["year"] == 0).sum())}


def reference(name: str) -> tuple[dict[str, Any], pl.DataFrame]:
    spec = json.loads((REFERENCE / "fits" / f"{name}.json").read_text())
    frame = pl.read_parquet(REFERENCE / spec["data"]["file"])
    schema = json.loads((REFERENCE / spec["data"]["schema"]).read_text())
    casts = [pl.col(c["name"]).cast(pl.Enum(c["levels"])) for c in schema["columns"] if c.get("levels")]
    return spec["results"], frame.with_columns(casts)


def test_against_r() -> None:
    want, frame = reference("exam_ols_cluster")
    for kind, name in (("CR0", "HC0"), ("CR1", "HC1_cadjust"), ("CR2", "HC2_cadjust")):
        fit = mp.ols("normexam ~ standLRT + sex + schgend", frame, cluster="school", vcov=kind)
        np.testing.assert_allclose(np.sqrt(np.diag(fit.vcov())), want["cluster_robust"][name]["se"], rtol=1e-9)
    assert (fit.loglik, fit.r2()["r2"], fit.sigma) == pytest.approx((want["logLik"], want["r_squared"], want["sigma"]), rel=1e-10)
    want, _ = reference("exam_within")
    for kind, errors in (("CR0", want["cluster_robust"]["HC0"]["se"]), ("CR1", want["cluster_robust"]["CR1_nested_k"])):
        fit = mp.ols("normexam ~ standLRT + sex", frame, absorb="school", cluster="school", vcov=kind)
        np.testing.assert_allclose(np.sqrt(np.diag(fit.vcov())), errors, rtol=1e-9)
    assert fit.r2()["within"] == pytest.approx(want["within_r_squared"]) and fit.r2()["r2"] == pytest.approx(want["r_squared"])


def test_what_does_not_vary_within_is_dropped() -> None:
    """R's lm keeps the covariate and drops a school instead; what both identify agrees."""
    want, frame = reference("hsb82_within")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = mp.ols("mAch ~ ses + sx + meanses", frame, absorb="school")
    assert fit.names == ("ses", "sxFemale") and fit.dropped == ("meanses",) and caught[0].category is mp.RankWarning
    np.testing.assert_allclose(fit.beta, want["fixef"]["estimate"][:2], rtol=1e-9)
    np.testing.assert_allclose(np.sqrt(np.diag(fit.vcov())), want["fixef"]["se"][:2], rtol=1e-9)


def test_a_response_that_is_constant_within_the_factors() -> None:
    frame = FRAME.with_columns(y=pl.col("y").mean().over("firm"))
    with pytest.raises(mp.DataError, match="does not vary within"):
        mp.ols("y ~ x", frame, absorb="firm")
    with pytest.raises(mp.DataError, match="does not vary within"):
        mp.ols("y ~ x", mp.suffstats("y ~ x + (1 | firm)", frame), absorb="firm")
    with pytest.raises(mp.DataError, match="does not vary$"):
        mp.ols("y ~ x", FRAME.with_columns(y=pl.lit(3.0)))


def test_effects_are_tested_as_coefficients_are() -> None:
    """By t on the fit's degrees of freedom, with clusters their number less one."""
    for fit in (mp.ols("y ~ x + z", FRAME.head(12)), mp.ols("y ~ x + z", FRAME, cluster="region"), mp.ols("y ~ x", FRAME, absorb="firm")):
        tests = {row["term"]: row for row in fit.tidy().to_pylist()}
        for row in fit.effects().to_pylist():
            for name in ("estimate", "std_error", "p_value", "conf_low", "conf_high"):
                assert row[name] == pytest.approx(tests[row["term"]][name], rel=1e-6), (row["effect"], name)


def test_predictions_with_absorbed_effects_have_no_interval() -> None:
    fit = mp.ols("y ~ x", FRAME, absorb="firm")
    for effects in ("conditional", "population"):
        with pytest.raises(mp.ConfigError, match="absorbed effects have no interval"):
            fit.predict(FRAME, effects=effects, interval="confidence")


@pytest.mark.parametrize("engine", ["polars", "duckdb"])
@pytest.mark.parametrize("what", ["weights", "freq"])
def test_weights_that_are_text(engine: str, what: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {what: "c"}
    with pytest.raises(mp.DataError, match=f"{what} = 'c' is not numeric") as caught:
        mp.ols("y ~ z", as_data(FRAME, engine, tmp_path), **arguments)
    assert caught.value.column == "c"


def test_a_model_of_nothing_has_clusters_too() -> None:
    fit = mp.ols("y ~ 0", FRAME, cluster="firm")
    assert fit.n_clusters == (14,) and "No coefficients" in str(fit)


def test_contrasts_beside_absorbed_effects_far_from_zero() -> None:
    near = FRAME.with_columns(x=(pl.col("x") * 2**10).round() / 2**10)
    whole = mp.ols("y ~ x + c + factor(firm)", near).contrasts("c")
    for data in (near, near.with_columns(x=pl.col("x") + 1.75 * 2**30)):
        table = mp.ols("y ~ x + c", data, absorb="firm").contrasts("c")
        for name in ("estimate", "std_error", "p_value"):
            np.testing.assert_allclose(table[name], whole[name], rtol=1e-7)


@pytest.mark.parametrize("robust", [{"vcov": "HC0"}, {"vcov": "HC3"}, {"cluster": "c"}])
@pytest.mark.parametrize("absorb", ["g", ["g", "k"]])
def test_absorbed_effects_and_robust_errors_where_nearly_all_is_explained(absorb: Any, robust: dict[str, str]) -> None:
    """They are those of the response less what explains it."""
    rng = np.random.default_rng(3)
    x, g, k = rng.normal(size=600), rng.integers(0, 20, 600), rng.integers(0, 3, 600)
    y = rng.normal(size=20)[g] + k + rng.normal(size=600)
    frame = pl.DataFrame({"y": y + 2e6 * x, "x": x, "g": g, "k": k, "c": g // 2, "w": rng.uniform(0.5, 2.0, 600)})
    small = frame.with_columns(y=pl.Series(y))
    fit, want = (mp.ols("y ~ x", rows, absorb=absorb, weights="w", **robust) for rows in (frame, small))
    np.testing.assert_allclose(fit.vcov(), want.vcov(), rtol=1e-6)
    for group in fit.groups:
        np.testing.assert_allclose(fit.ranef(group)["estimate"].to_numpy(), want.ranef(group)["estimate"].to_numpy(), atol=1e-6)
    fitted = [f.predict(rows).read_all()["predicted"].to_numpy() for f, rows in ((fit, frame), (want, small))]
    np.testing.assert_allclose(fitted[0] - 2e6 * x, fitted[1], atol=1e-6)
