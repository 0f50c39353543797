"""Marginal means and contrasts: emmeans' published numbers for Oats, and plain averages over a written-out grid."""
from __future__ import annotations

import functools
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats as st

import mlpipe as mp

from .dense_glmm import MEANS
from .test_averaged import PHI, Z, simulated

REFERENCE = Path(__file__).parent / "reference"


def oats() -> pl.DataFrame:
    columns = json.loads((REFERENCE / "data/Oats.schema.json").read_text())["columns"]
    factors = {c["name"]: [str(level) for level in c["levels"]] for c in columns if c["type"] in ("factor", "ordered")}
    frame = pl.read_parquet(REFERENCE / "data/Oats.parquet")
    return frame.with_columns(pl.col(name).cast(pl.String).cast(pl.Enum(levels)) for name, levels in factors.items())


def test_a_balanced_split_plot() -> None:
    """Means are those of the rows; the standard errors are in emmeans' vignettes: 7.80 and 7.08."""
    fit = mp.lmm("yield ~ factor(nitro) + Variety + (1 | Block/Variety)", oats())
    raw = dict(oats().group_by("Variety").agg(pl.col("yield").mean()).iter_rows())
    for row in fit.means("Variety").to_pylist():
        assert row["estimate"] == pytest.approx(raw[row["level"]]) and round(row["std_error"], 2) == 7.80
    rows = fit.contrasts("Variety").to_pylist()
    assert [row["contrast"] for row in rows] == ["Golden Rain - Marvellous", "Golden Rain - Victory", "Marvellous - Victory"]
    pairs = [("Golden Rain", "Marvellous"), ("Golden Rain", "Victory"), ("Marvellous", "Victory")]
    assert [row["estimate"] for row in rows] == pytest.approx([raw[a] - raw[b] for a, b in pairs])  # -5.29, 6.875, 12.17
    assert {round(row["std_error"], 2) for row in rows} == {7.08}
    nitro = fit.means("nitro").to_pylist()
    assert [row["level"] for row in nitro] == ["0", "0.2", "0.4", "0.6"]
    assert [round(row["estimate"], 1) for row in nitro] == [79.4, 98.9, 114.2, 123.4]
    assert "extra_scans" not in fit.info


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger"])
def test_degrees_of_freedom_of_a_split_plot(ddf: str) -> None:
    """In a balanced split plot they are those of the strata: 5 x 2 = 10 between plots, 54 - 3 = 51 within them."""
    fit = mp.lmm("yield ~ factor(nitro) + Variety + (1 | Block/Variety)", oats())
    plain = fit.contrasts("Variety").to_pylist()
    for row, z in zip(fit.contrasts("Variety", ddf=ddf).to_pylist(), plain, strict=True):
        assert row["df"] == pytest.approx(10.0, rel=1e-4) and z["df"] is None
        assert (row["estimate"], row["std_error"]) == pytest.approx((z["estimate"], z["std_error"]))
        q = st.studentized_range(3, row["df"])
        assert row["p_value"] == pytest.approx(q.sf(abs(row["statistic"]) * np.sqrt(2)))
        half = q.ppf(0.95) / np.sqrt(2) * row["std_error"]
        assert (row["conf_low"], row["conf_high"]) == pytest.approx((row["estimate"] - half, row["estimate"] + half))
    for row in fit.contrasts("nitro", "reference", ddf=ddf).to_pylist():
        assert row["df"] == pytest.approx(51.0, rel=1e-4)
        assert row["p_value"] == pytest.approx(2 * st.t.sf(abs(row["statistic"]), row["df"]))
    for row in fit.contrasts("nitro", "reference", ddf=ddf, adjust="bonferroni").to_pylist():
        assert row["conf_high"] - row["estimate"] == pytest.approx(st.t.isf(0.025 / 3, row["df"]) * row["std_error"])
    first = fit.means("nitro", ddf=ddf).to_pylist()[0]
    L = [[1.0 if name == "(Intercept)" else 1 / 3 if name.startswith("Variety") else 0.0 for name in fit.names]]
    whole = fit.test(L, ddf=ddf).to_pylist()[0]
    assert (first["df"], first["statistic"] ** 2) == pytest.approx((whole["df_denominator"], whole["statistic"]))
    assert first["conf_high"] - first["estimate"] == pytest.approx(st.t.isf(0.025, first["df"]) * first["std_error"])


def test_least_squares_has_its_own_degrees_of_freedom(fitted: tuple[Any, pl.DataFrame]) -> None:
    fit = mp.ols("yield ~ Variety", oats())
    assert {row["df"] for row in fit.means("Variety").to_pylist()} == {69.0}
    pair = fit.contrasts("Variety", adjust="none").to_pylist()[0]
    assert pair["p_value"] == pytest.approx(2 * st.t.sf(abs(pair["statistic"]), 69))
    with pytest.raises(mp.ConfigError, match="linear mixed models"):
        fitted[0].means("t", ddf="satterthwaite")


def written_out(fit: Any, frame: pl.DataFrame, levels: list[tuple[str, bool]]) -> np.ndarray:
    """X at (t, flag) with x at its mean, in the fit's order of names."""
    x = float((frame["x"] * frame["q"]).sum() / frame["q"].sum())
    rows = []
    for t, flag in levels:
        values = {"(Intercept)": 1.0, "log(x)": np.log(x), "tb": t == "b", "tc": t == "c", "flagTRUE": flag, "x": x}
        values |= {"tb:flagTRUE": flag and t == "b", "tc:flagTRUE": flag and t == "c"}
        rows.append([float(values[name]) for name in fit.names])
    return np.array(rows)


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, pl.DataFrame]:
    frame = simulated("binomial", "logit").with_columns(flag=pl.col.x > 1.1)
    fit = mp.glmm("y ~ log(x) + t * flag + offset(log(x)) + (1 + x | g)", frame, family="binomial", freq="q")
    return fit, frame


@pytest.mark.parametrize("kind", ["link", "response"])
def test_means_over_the_grid(fitted: tuple[Any, pl.DataFrame], kind: str) -> None:
    fit, frame = fitted
    x = float((frame["x"] * frame["q"]).sum() / frame["q"].sum())
    for row in fit.means("t", kind=kind).to_pylist():
        L = written_out(fit, frame, [(row["level"], False), (row["level"], True)]).mean(axis=0)
        eta, se = float(L @ fit.beta) + np.log(x), float(np.sqrt(L @ fit.covariance @ L))
        mu = 1 / (1 + np.exp(-eta))
        want = (eta, se) if kind == "link" else (mu, se * mu * (1 - mu))
        assert (row["estimate"], row["std_error"]) == pytest.approx(want, rel=1e-9)
    assert len([scan for scan in fit.info["extra_scans"] if "means of the covariates" in scan]) == 1


def test_means_with_the_random_effects_integrated_out(fitted: tuple[Any, pl.DataFrame]) -> None:
    fit, frame = fitted
    x = float((frame["x"] * frame["q"]).sum() / frame["q"].sum())
    p, term = len(fit.names), fit.terms[0]

    def mean(psi: np.ndarray, level: str) -> float:
        star = np.zeros((2, 2))
        star.T[np.triu_indices(2)] = psi[p:]
        sd = np.linalg.norm(np.array([1.0, x]) @ np.linalg.solve(term.R, star))
        eta = written_out(fit, frame, [(level, False), (level, True)]) @ psi[:p] + np.log(x)
        return float((MEANS["logit"](eta[:, None] + sd * Z) @ PHI).mean())

    psi = np.concatenate([fit.beta, term.star.T[np.triu_indices(2)]])
    V = np.array(fit.joint_covariance)[: len(psi), : len(psi)]
    for row in fit.means("t", effects="marginal").to_pylist():
        assert row["estimate"] == pytest.approx(mean(psi, row["level"]), abs=1e-9)
        J = np.array([(mean(psi + 1e-5 * e, row["level"]) - mean(psi - 1e-5 * e, row["level"])) / 2e-5 for e in np.eye(len(psi))])
        assert row["std_error"] == pytest.approx(np.sqrt(J @ V @ J), rel=1e-6)


def test_combinations_and_at(fitted: tuple[Any, pl.DataFrame]) -> None:
    fit, frame = fitted
    rows = fit.means(["flag", "t"], kind="link", at={"x": 1.0, "t": ["c", "a"]}).to_pylist()
    assert [row["level"] for row in rows] == ["FALSE:c", "FALSE:a", "TRUE:c", "TRUE:a"] and rows[0]["term"] == "flag:t"
    for row, (flag, t) in zip(rows, product((False, True), "ca"), strict=True):
        values = {"(Intercept)": 1.0, "log(x)": 0.0, "tb": 0.0, "tc": t == "c", "flagTRUE": flag, "tb:flagTRUE": 0.0}
        values["tc:flagTRUE"] = flag and t == "c"
        assert row["estimate"] == pytest.approx(sum(b * float(values[name]) for name, b in fit.fixef().items()))


def test_contrasts_are_differences_of_means(fitted: tuple[Any, pl.DataFrame]) -> None:
    fit, _ = fitted
    means = {row["level"]: row["estimate"] for row in fit.means("t").to_pylist()}
    rows = fit.contrasts("t", adjust="none").to_pylist()
    for row in rows:
        left, right = row["contrast"].split(" - ")
        assert row["estimate"] == pytest.approx(means[left] - means[right])
    p = np.array([row["p_value"] for row in rows])
    q = st.studentized_range(3, np.inf)
    for row, plain in zip(fit.contrasts("t").to_pylist(), rows, strict=True):
        assert row["p_value"] == pytest.approx(q.sf(abs(plain["statistic"]) * np.sqrt(2)))
        half = q.ppf(0.95) / np.sqrt(2) * plain["std_error"]
        assert (row["conf_low"], row["conf_high"]) == pytest.approx((plain["estimate"] - half, plain["estimate"] + half))
    assert [row["p_value"] for row in fit.contrasts("t", adjust="bonferroni").to_pylist()] == pytest.approx(np.minimum(3 * p, 1).tolist())
    order = np.argsort(p)
    holm = np.minimum(np.maximum.accumulate(p[order] * [3, 2, 1]), 1.0)
    got = np.array([row["p_value"] for row in fit.contrasts("t", adjust="holm").to_pylist()])
    np.testing.assert_allclose(got[order], holm)
    reference = fit.contrasts("t", "reference", kind="link").to_pylist()
    assert [row["contrast"] for row in reference] == ["b - a", "c - a"]
    own = fit.contrasts("t", {"b against others": [-0.5, 1, -0.5]}, kind="link").to_pylist()[0]
    link = np.array(fit.means("t", kind="link").column("estimate").to_pylist())
    assert own["contrast"] == "b against others" and own["estimate"] == pytest.approx(link @ [-0.5, 1, -0.5])


def test_references_are_the_levels_that_the_formula_states() -> None:
    frame = simulated("binomial", "logit", 300).with_columns(u=pl.col.x.gt(1.2))
    fit = mp.ols('y ~ C(t, ref="b") + u', frame)
    rows = {row["contrast"]: row["estimate"] for row in fit.contrasts("t", "reference").to_pylist()}
    assert rows == pytest.approx({"a - b": fit.fixef()['C(t, ref = "b")a'], "c - b": fit.fixef()['C(t, ref = "b")c']})
    assert fit.contrasts(["u", "t"], "reference")["contrast"].to_pylist()[0] == "FALSE:a - FALSE:b"
    assert fit.contrasts("t", "reference", at={"t": ["c", "a"]})["contrast"].to_pylist() == ["a - c"]


def test_a_factor_of_the_random_part_alone_has_means_over_it_only() -> None:
    frame = simulated("poisson", "log", 600)
    fit = mp.glmm("y ~ x + (0 + t | g)", frame, family="poisson")
    for asked in (fit.means, fit.contrasts):
        with pytest.raises(mp.ConfigError, match="no factor 't' in the fixed part"):
            asked("t")
    means = fit.means("t", effects="marginal").to_pylist()
    eta = fit.beta[0] + fit.beta[1] * frame["x"].mean()
    psi = np.diag(fit.terms[0].factor @ fit.terms[0].factor.T)
    assert [row["estimate"] for row in means] == pytest.approx(np.exp(eta + psi / 2))


def test_two_levels_need_no_adjustment(fitted: tuple[Any, pl.DataFrame]) -> None:
    fit, _ = fitted
    assert fit.contrasts("flag").equals(fit.contrasts("flag", adjust="none"))


def test_an_empty_cell_is_not_estimable() -> None:
    frame = simulated("poisson", "log").with_columns(flag=pl.col.x > 1.1).filter(~((pl.col.t == "c") & pl.col.flag))
    with pytest.warns(mp.RankWarning):
        fit = mp.lmm("y ~ t * flag + (1 | g)", frame)
    rows = {row["level"]: row["estimate"] for row in fit.means("t").to_pylist()}
    assert rows["c"] is None and rows["a"] is not None
    cells = {row["level"]: row["estimate"] for row in fit.means(["t", "flag"]).to_pylist()}
    assert cells["c:TRUE"] is None and cells["c:FALSE"] == pytest.approx(fit.fixef()["(Intercept)"] + fit.fixef()["tc"])
    contrasts = {row["contrast"]: row["p_value"] for row in fit.contrasts("t").to_pylist()}
    assert contrasts["a - c"] is None and contrasts["a - b"] is not None


def test_an_empty_cell_beside_a_covariate_far_from_zero() -> None:
    """What is estimable does not hang on where a covariate's zero is."""
    frame = simulated("poisson", "log").with_columns(flag=pl.col.x > 1.1).filter(~((pl.col.t == "c") & pl.col.flag))
    for shift in (0.0, 1e6):
        with pytest.warns(mp.RankWarning):
            fit = mp.lmm("y ~ t * flag + x + (1 | g)", frame.with_columns(pl.col.x + shift))
        known = {row["level"]: row["estimate"] for row in fit.means(["t", "flag"]).to_pylist()}
        assert [level for level, value in known.items() if value is None] == ["c:TRUE"]


def test_a_contrast_may_be_estimable_where_its_means_are_not() -> None:
    """A covariate that depends on the site alone: at its mean over rows no site's mean is there, but differences between treatments are."""
    rng = np.random.default_rng(2)
    frame = pl.DataFrame({"site": rng.choice(list("abc"), 90), "t": rng.choice(["u", "v"], 90), "y": rng.normal(size=90)})
    frame = frame.with_columns(z=pl.col.site.replace_strict({"a": 1.0, "b": 4.0, "c": 2.0}))
    with pytest.warns(mp.RankWarning):
        fit = mp.ols("y ~ t + site + z", frame)
    assert fit.means("t")["estimate"].to_pylist() == [None, None] and fit.means("t")["df"].to_pylist() == [None, None]
    row = fit.contrasts("t").to_pylist()[0]
    assert (row["estimate"], row["std_error"]) == pytest.approx((-fit.fixef()["tv"], np.sqrt(fit.vcov()[1, 1])))
    assert fit.contrasts("site")["estimate"].to_pylist() == [None] * 3
    with pytest.warns(mp.RankWarning):
        curved = mp.glm("b ~ t + site + z", frame.with_columns(b=pl.col.y > 0), family="binomial")
    assert curved.contrasts("t")["estimate"].to_pylist() == [None]  # a difference of means that are not known
    assert curved.contrasts("t", kind="link")["estimate"].to_pylist()[0] == pytest.approx(-curved.fixef()["tv"])


def test_effects_over_an_empty_cell_are_not_estimable() -> None:
    frame = simulated("poisson", "log").with_columns(flag=pl.col.x > 1.1).filter(~((pl.col.t == "c") & pl.col.flag))
    for function, more in ((mp.lmm, {}), (mp.glmm, {"family": "poisson"})):
        with pytest.warns(mp.RankWarning):
            fit = function("y ~ t * flag + x + (1 | g)", frame, **more)
        average = [row for row in fit.effects().to_pylist() if row["effect"] == "average_marginal"]
        known = {row["term"]: row["estimate"] for row in average}
        assert known["tc"] is None and known["flagTRUE"] is None and known["tb"] is not None and known["x"] is not None
        assert {row["term"] for row in average if row["std_error"] is None} == {"tc", "flagTRUE"}


@pytest.mark.parametrize("effects", ["population", "marginal"])
def test_intervals_of_means_are_those_of_their_links(fitted: tuple[Any, pl.DataFrame], effects: str) -> None:
    """As emmeans has them: a probability's interval stays between 0 and 1, and its test is of a log odds of zero."""
    rows = fitted[0].means("t", effects=effects, conf_level=0.999).to_pylist()
    linear = fitted[0].means("t", kind="link", conf_level=0.999).to_pylist()
    for row, link in zip(rows, linear, strict=True):
        eta, mu = np.log(row["estimate"] / (1 - row["estimate"])), row["estimate"]
        half = st.norm.isf(0.0005) * row["std_error"] / (mu * (1 - mu))
        assert (row["conf_low"], row["conf_high"]) == pytest.approx((1 / (1 + np.exp(half - eta)), 1 / (1 + np.exp(-half - eta))))
        assert row["statistic"] == pytest.approx(eta / row["std_error"] * mu * (1 - mu))
        if effects == "population":
            assert (row["statistic"], row["p_value"]) == pytest.approx((link["statistic"], link["p_value"]))


def test_a_contrast_of_nothing() -> None:
    fit = mp.lmm("yield ~ Variety + (1 | Block)", oats())
    for ddf in ("wald", "satterthwaite", "kenward-roger"):
        row = fit.contrasts("Variety", {"nothing": [0, 0, 0]}, ddf=ddf).to_pylist()[0]
        assert row["estimate"] == 0.0 and row["p_value"] is None


@pytest.mark.parametrize("value", ["much", [1.0, 2.0], float("nan"), None, True])
def test_a_covariate_is_held_at_one_number(fitted: tuple[Any, pl.DataFrame], value: Any) -> None:
    with pytest.raises(mp.ConfigError, match="not one finite number"):
        fitted[0].means("t", at={"x": value})


def test_other_links_of_plain_models_and_loaded_fits(tmp_path: Path) -> None:
    frame = simulated("poisson", "log")
    fit = mp.glm("y ~ x + t", frame, family="poisson")
    x = float(frame["x"].mean())
    want = np.exp(fit.beta[0] + fit.beta[1] * x)
    fit.write(tmp_path / "before")
    loaded = mp.load(tmp_path / "before")
    with pytest.raises(mp.DataError, match="not at hand"):
        loaded.means("t")
    assert loaded.means("t", data=frame).to_pylist()[0]["estimate"] == pytest.approx(want)
    assert fit.means("t").to_pylist()[0]["estimate"] == pytest.approx(want)
    fit.write(tmp_path / "after")
    assert mp.load(tmp_path / "after").means("t").equals(fit.means("t"))  # means of covariates stay with the fit
    assert fit.means("t", effects="marginal").equals(fit.means("t"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(term="x"), "no factor 'x'"), (dict(term="tt"), "no factor 'tt'"), (dict(term=[]), "name one factor"),
        (dict(term=["t", "t"]), "different"), (dict(term="t", kind="odds"), "kind"), (dict(term="t", effects="conditional"), "effects"),
        (dict(term="t", effects="marginal", kind="link"), "no linear predictor"), (dict(term="t", at={"z": 1}), "no covariate"),
        (dict(term="t", at={"t": "d"}), "not a level"), (dict(term="t", conf_level=2), "conf_level"),
    ],
)  # fmt: skip
def test_bad_requests(fitted: tuple[Any, pl.DataFrame], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(mp.ConfigError, match=message):
        fitted[0].means(**asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [(dict(method="all"), "method"), (dict(method={"a": [1, 2]}), "3 finite coefficients"), (dict(adjust="fdr"), "adjust"),
     (dict(method="reference", adjust="tukey"), "tukey")],
)  # fmt: skip
def test_bad_contrasts(fitted: tuple[Any, pl.DataFrame], asked: dict[str, Any], message: str) -> None:
    with pytest.raises(mp.ConfigError, match=message):
        fitted[0].contrasts("t", **asked)


@pytest.mark.parametrize("family", ["gaussian", "poisson"])
def test_columns_far_from_zero_lose_no_digits(family: str, tmp_path: Path) -> None:
    """Of the square of a time of day in seconds since 1970 the coefficients' covariance is cancellation; what is asked of it is not."""
    rng = np.random.default_rng(5)
    n, g = 200, np.arange(200) % 20
    hours = rng.integers(0, 36_000, n)
    eta = 0.5 + 0.3 * rng.normal(size=20)[g] + 2e-5 * hours
    frame = pl.DataFrame({"t": 1_600_000_000 + hours, "s": (hours - 18_000) / 1e4, "f": rng.choice(["a", "b"], n), "g": g})
    frame = frame.with_columns(y=eta + rng.normal(size=n) if family == "gaussian" else rng.poisson(np.exp(eta)))
    made: Any = mp.lmm if family == "gaussian" else functools.partial(mp.glmm, family=family)
    far, near = (made(f"y ~ f + {x} + I({x}^2) + (1 | g)", frame) for x in "ts")
    far.write(tmp_path / "fit")

    def told(fit: Any, data: Any) -> list[float]:
        out = [row[name] for row in fit.means("f", data=data).to_pylist() for name in ("estimate", "std_error")]
        out += [row["std_error"] for row in fit.means("f", effects="marginal", data=data).to_pylist()]
        effects = {row["term"]: row for row in fit.effects(data).to_pylist() if row["effect"] == "average_marginal"}
        unit = 1e4 if "t" in effects else 1.0
        out += [unit * effects["t" if unit > 1.0 else "s"][name] for name in ("estimate", "std_error")]
        out += fit.predict(frame.head(2), effects="population", interval="confidence").read_all()["upper"].to_pylist()
        return out + [row["cooks_distance"] for row in fit.influence(3, data=data).to_pylist()]

    assert told(far, None) == pytest.approx(told(near, None), rel=1e-5)
    assert told(mp.load(tmp_path / "fit"), frame) == pytest.approx(told(far, None), rel=1e-9)
    if family == "gaussian":
        for ddf in ("satterthwaite", "kenward-roger"):
            rows = zip(far.means("f", ddf=ddf).to_pylist(), near.means("f", ddf=ddf).to_pylist(), strict=True)
            assert all((a["std_error"], a["df"]) == pytest.approx((b["std_error"], b["df"]), rel=1e-4) for a, b in rows)
