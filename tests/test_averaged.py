"""Population-average coefficients and average marginal effects against reference fits and brute-force integration."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats as st

import mlpipe as mp
from mlpipe.averaged import parameter_covariance
from mlpipe.derivative import derivative, substituted
from mlpipe.expr import Column, Node, Number, label
from mlpipe.formula import parse_expression
from mlpipe.integrals import _cells, _quadrature, integrated

from .dense_glmm import MEANS, centre, draw

REFERENCE = Path(__file__).parent / "reference"
Z = np.linspace(-8.5, 8.5, 171)
PHI = st.norm.pdf(Z) * (Z[1] - Z[0])
LINK: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "logit": lambda m: np.log(m / (1 - m)), "probit": st.norm.ppf, "cloglog": lambda m: np.log(-np.log1p(-m)), "log": np.log,
    "cauchit": lambda m: np.tan(np.pi * (m - 0.5)), "identity": lambda m: m,
}  # fmt: skip


def reference(name: str) -> tuple[dict[str, Any], pl.DataFrame]:
    spec = json.loads((REFERENCE / "glmm" / f"{name}.json").read_text())
    columns = json.loads((REFERENCE / spec["data"]["schema"]).read_text())["columns"]
    factors = {c["name"]: [str(level) for level in c["levels"]] for c in columns if c["type"] in ("factor", "ordered")}
    frame = pl.read_parquet(REFERENCE / spec["data"]["file"])
    return spec, frame.with_columns(pl.col(name).cast(pl.String).cast(pl.Enum(levels)) for name, levels in factors.items())


def rows_of(fit: Any, effect: str, **asked: Any) -> dict[str, dict[str, float]]:
    return {row["term"]: row for row in fit.effects(**asked).to_pylist() if row["effect"] == effect}


@pytest.mark.parametrize(("name", "nagq", "tolerance"), [("contraception_ri", 1, 1e-7), ("toenail_agq25", 25, 5e-5)])
def test_projected_coefficients_of_the_reference(name: str, nagq: int, tolerance: float) -> None:
    """The reference's fixed nodes are themselves good to 1e-5 where the random intercept's sd is 4."""
    spec, frame = reference(name)
    fit = mp.glmm(spec["model"]["formula"], frame, family="binomial", nagq=nagq)
    want, got = spec["results"]["marginal"], rows_of(fit, "population_average")
    estimates = [got[term]["estimate"] for term in want["marginal_coefficients"]["names"]]
    np.testing.assert_allclose(estimates, want["marginal_coefficients"]["estimate"], atol=tolerance)
    means = fit.predict(frame.head(10), effects="marginal").read_all()["predicted"].to_numpy()
    np.testing.assert_allclose(means, want["by_adaptive_integrate"], atol=1e-7)
    average = want["average_marginal_effect_of_dummies"]
    if average:
        assert rows_of(fit, "average_marginal")["urbanY"]["estimate"] == pytest.approx(average["urbanY"], abs=1e-8)
    assert fit.info["extra_scans"][0].startswith("effects: one scan")


def simulated(family: str, link: str, n: int = 500) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    g, (eta, spread) = np.repeat(np.arange(n // 20), 20), centre(family, link)
    x, t = rng.uniform(0.5, 2.0, n), rng.choice(["a", "b", "c"], n)
    b = spread * rng.normal(size=(n // 20, 2)).clip(-2, 2) * [0.8, 0.4]
    o, q = spread * rng.uniform(-0.2, 0.2, n), rng.integers(1, 3, n)
    mu = MEANS[link](eta + spread * (0.4 * np.log(x) - 0.3 * (t == "b") * x + b[g, 0] + b[g, 1] * (x - 1.2)) + o)
    y = draw(rng, family, mu, np.ones(n), np.ones(n), 1.0)
    return pl.DataFrame({"y": y, "x": x, "t": t, "g": g, "o": o, "q": q})


class Brute:
    """The same quantities in plain numpy, as functions of (beta, theta*)."""

    def __init__(self, fit: Any, frame: pl.DataFrame) -> None:
        self.fit, self.frame = fit, frame
        self.x, self.t, self.o, self.q = (frame[name].to_numpy() for name in "xtoq")
        self.slopes = len(fit.terms[0].names) == 2 if fit.terms else False

    def X(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        b, c = (t == "b") * 1.0, (t == "c") * 1.0
        columns = {"(Intercept)": np.ones(len(x)), "log(x)": np.log(x), "tb": b, "tc": c, "x": x, "tb:x": b * x, "tc:x": c * x}
        return np.column_stack([columns[name] for name in self.fit.names])

    def mean(self, psi: np.ndarray, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        p = len(self.fit.names)
        eta = self.X(x, t) @ psi[:p] + self.o
        if not self.fit.terms:
            return np.asarray(MEANS[self.fit.link](eta))
        term, k = self.fit.terms[0], len(self.fit.terms[0].names)
        star = np.zeros((k, k))
        star.T[np.triu_indices(k)] = psi[p:]
        raw = np.linalg.solve(term.R, star)
        z = np.column_stack([np.ones(len(x)), x])[:, :k]
        sd = np.sqrt(((z @ raw) ** 2).sum(axis=1))
        return np.asarray(MEANS[self.fit.link](eta[:, None] + sd[:, None] * Z) @ PHI)

    def effects(self, psi: np.ndarray) -> np.ndarray:
        """Projected coefficients, then the effects of x, of levels b and c."""
        X, h = self.X(self.x, self.t), 1e-5
        target = LINK[self.fit.link](self.mean(psi, self.x, self.t)) - self.o
        projected = np.linalg.solve((X.T * self.q) @ X, (X.T * self.q) @ target)

        def average(values: np.ndarray) -> float:
            return float(self.q @ values / self.q.sum())

        slope = (self.mean(psi, self.x + h, self.t) - self.mean(psi, self.x - h, self.t)) / (2 * h)
        at = {level: self.mean(psi, self.x, np.full(len(self.x), level)) for level in "abc"}
        return np.array([*projected, average(slope), average(at["b"] - at["a"]), average(at["c"] - at["a"])])

    def psi(self) -> np.ndarray:
        stars = [term.star.T[np.triu_indices(len(term.star))] for term in self.fit.terms]
        return np.concatenate([self.fit.beta, *stars])


CASES = [
    ("binomial", "logit", "y ~ log(x) + t * x + (1 + x | g)"), ("binomial", "probit", "y ~ t * x + log(x) + (1 | g)"),
    ("binomial", "cloglog", "y ~ log(x) + t + (1 + x | g)"), ("poisson", "log", "y ~ log(x) + t * x + (1 + x | g)"),
    ("binomial", "logit", "y ~ t * x"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "link", "formula"), CASES)
def test_effects_against_brute_force(family: str, link: str, formula: str) -> None:
    frame = simulated(family, link)
    fitted: Any = mp.glmm if "|" in formula else mp.glm
    fit = fitted(formula, frame, family=family, link=link, offset="o", freq="q")
    brute = Brute(fit, frame)
    psi = brute.psi()
    want = brute.effects(psi)
    table = [row for row in fit.effects().to_pylist() if row["effect"] != "subject_specific"]
    order = {"average_marginal": ["x", "tb", "tc"], "population_average": list(fit.names)}
    wanted = [(effect, term) for effect in ("population_average", "average_marginal") for term in order[effect]]
    got = [next(r for r in table if (r["effect"], r["term"]) == pair) for pair in wanted]
    np.testing.assert_allclose([row["estimate"] for row in got], want, rtol=1e-6, atol=1e-8)
    steps = 1e-5 * np.maximum(np.abs(psi), 0.1)
    J = np.column_stack([(brute.effects(psi + s) - brute.effects(psi - s)) / (2 * s.sum()) for s in np.diag(steps)])
    V = np.array(fit.joint_covariance)[: len(psi), : len(psi)] if fit.terms else fit.covariance
    np.testing.assert_allclose([row["std_error"] for row in got], np.sqrt(np.diag(J @ V @ J.T)), rtol=2e-4)
    for row in got:
        assert row["conf_low"] == pytest.approx(row["estimate"] - st.norm.ppf(0.975) * row["std_error"])
        assert row["p_value"] == pytest.approx(2 * st.norm.sf(abs(row["statistic"])))


def test_the_joint_covariance_holds_both_parts(tmp_path: Path) -> None:
    frame = simulated("poisson", "log")
    fit = mp.glmm("y ~ log(x) + t + (1 + x | g)", frame, family="poisson")
    V, p = np.array(fit.joint_covariance), len(fit.names)
    np.testing.assert_allclose(V[:p, :p], fit.covariance, rtol=1e-9)
    np.testing.assert_allclose(V[p:, p:], fit.theta_covariance, rtol=1e-9)
    np.testing.assert_allclose(V, V.T, atol=1e-12)
    inside = np.isfinite(np.diag(V))[p:]
    found, kept = parameter_covariance(fit)[:p, p:], np.array(fit.joint)[:p, p:]
    np.testing.assert_array_equal(found[:, inside], kept[:, inside])  # not turned to the user's coordinates and back
    fit.write(tmp_path / "fit")
    again = mp.load(tmp_path / "fit")
    with pytest.raises(mp.DataError, match="not at hand"):
        again.effects()
    assert again.effects(frame).equals(fit.effects())


def test_without_a_joint_covariance_the_fit_says_so() -> None:
    fit = mp.glmm("y ~ log(x) + t + (1 + x | g)", simulated("poisson", "log"), family="poisson")
    joint = rows_of(fit, "population_average")["tb"]["std_error"]
    assert not fit.info["notes"]
    fit.joint = None
    apart = rows_of(fit, "population_average")["tb"]["std_error"]
    assert apart == pytest.approx(joint, rel=0.1) and "independent" in fit.info["notes"][0]
    rows_of(fit, "population_average")
    assert len(fit.info["notes"]) == 1


def test_a_linear_model_has_one_set_of_coefficients() -> None:
    frame = simulated("binomial", "logit").with_columns(flag=pl.col.x > 1.1)
    fit = mp.lmm("y ~ log(x) + t + flag + (1 | g)", frame)
    for effect in ("population_average", "average_marginal"):
        got = rows_of(fit, effect)
        for term, row in rows_of(fit, "subject_specific").items():
            if effect == "average_marginal" and term in ("(Intercept)", "log(x)"):
                continue
            assert row["estimate"] == pytest.approx(got[term]["estimate"], rel=1e-9)
            assert row["std_error"] == pytest.approx(got[term]["std_error"], rel=1e-7)
    slope = rows_of(fit, "average_marginal")["x"]["estimate"]
    assert slope == pytest.approx(fit.fixef()["log(x)"] * float((1 / frame["x"]).mean()), rel=1e-8)


@pytest.mark.parametrize("kind", ["polars", "duckdb", "arrow"])
def test_every_engine_gives_the_same(kind: str, tmp_path: Path) -> None:
    from .conftest import as_data

    frame = simulated("binomial", "logit")
    fit = mp.glmm("y ~ t + I(x > 1) + bs(x, df = 4) + (1 | g)", as_data(frame, kind, tmp_path), family="binomial")
    want = mp.glmm("y ~ t + I(x > 1) + bs(x, df = 4) + (1 | g)", frame.lazy(), family="binomial")
    for got, expected in zip(fit.effects().to_pylist(), want.effects().to_pylist(), strict=True):
        assert got["term"] == expected["term"] and got["estimate"] == pytest.approx(expected["estimate"], abs=1e-6)


def test_bad_requests() -> None:
    frame = simulated("binomial", "logit")
    fit = mp.glmm("y ~ log(x) + t + (1 | g)", frame, family="binomial")
    with pytest.raises(mp.ConfigError, match="conf_level"):
        fit.effects(conf_level=1.0)
    with pytest.raises(mp.DataError, match="no column 'x'"):
        fit.effects(frame.drop("x"))
    assert len(fit.effects(frame.drop("y", "g"))) == len(fit.effects())  # what it averages over needs no response


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize(
    ("formula", "family", "extra"),
    [
        ("y ~ x + I(x^2) + t + (1 | g)", None, {}), ("y ~ (w + I((x - 1)^3)) * t + I(x^2 * w) + (1 | g)", None, {}),
        ("y ~ x + offset(2 * x) + (1 | g)", None, {"offset": "x * w"}), ("k ~ t * x + offset(log(x)) + (1 + x | g)", "poisson", {}),
        ("k ~ t + log(x) + (I(x^2) | g)", "poisson", {"offset": "w * x"}),
    ],
)  # fmt: skip
def test_a_number_s_effect_is_the_derivative_of_the_mean_through_all_terms(formula: str, family: str | None, extra: dict[str, Any]) -> None:
    rng = np.random.default_rng(9)
    n = 240
    x, g, t = rng.uniform(0.5, 2.0, n), np.arange(n) % 12, rng.choice(["a", "b"], n)
    eta = 0.4 * x + 0.3 * (t == "b") + 0.4 * rng.normal(size=12)[g]
    frame = pl.DataFrame({"x": x, "w": rng.normal(size=n), "g": g, "t": t, "y": eta + rng.normal(size=n), "k": rng.poisson(np.exp(eta))})
    fit: Any = mp.glmm(formula, frame, family=family, **extra) if family else mp.lmm(formula, frame, **extra)
    for name in ("x", "w") if "w" in formula else ("x",):
        h = pl.lit(1e-4)
        up, down = (
            pl.from_arrow(fit.predict(frame.with_columns(pl.col(name) + side * h), effects="marginal").read_all()) for side in (1, -1)
        )
        want = float(((up["predicted"] - down["predicted"]) / 2e-4).mean())  # type: ignore[arg-type, index]
        assert rows_of(fit, "average_marginal")[name]["estimate"] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(("family", "link"), [("gamma", "inverse"), ("inverse_gaussian", "1/mu^2"), ("gaussian", "identity")])
def test_effects_have_the_response_s_units(family: str, link: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.uniform(size=120)
    mu = 1.0 / (0.5 + 0.5 * x)
    found = []
    for unit in (1.0, 1e6):
        fit = mp.glm("y ~ x", pl.DataFrame({"x": x, "y": unit * mu * (1.0 + 0.1 * np.sin(np.arange(120)))}), family=family, link=link)
        row = rows_of(fit, "average_marginal")["x"]
        found.append((row["estimate"] / unit, row["std_error"] / unit))
        if link == "inverse":
            eta = fit.beta[0] + fit.beta[1] * x
            slopes = np.array([np.mean(2 * fit.beta[1] / eta**3), np.mean(2 * fit.beta[1] * x / eta**3 - 1 / eta**2)])
            assert row["estimate"] == pytest.approx(np.mean(-fit.beta[1] / eta**2), rel=1e-9)
            assert row["std_error"] == pytest.approx(np.sqrt(slopes @ fit.covariance @ slopes), rel=1e-7)
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_means_across_the_pole_of_the_inverse_link_do_not_exist() -> None:
    rng = np.random.default_rng(4)
    x, g = rng.uniform(size=300), np.repeat(np.arange(30), 10)
    eta = 0.6 + 0.5 * x + np.clip(0.3 * rng.normal(size=30), -0.4, None)[g]
    frame = pl.DataFrame({"x": x, "g": g, "y": rng.gamma(30.0, 1.0 / eta / 30.0), "t": rng.choice(["a", "b"], 300)})
    fit = mp.glmm("y ~ x + t + (1 | g)", frame, family="gamma", link="inverse")
    assert fit.converged and 5.0 * fit.varcorr()["sd"][0].as_py() > 0.6
    assert all(row["estimate"] is None for row in fit.effects().to_pylist() if row["effect"] != "subject_specific")
    assert all(row["estimate"] is None for row in fit.means("t", effects="marginal").to_pylist())
    moments = fit.marginal(frame).read_all()
    assert moments["mean"].null_count == moments["variance"].null_count == 300
    assert fit.marginal(frame, block=3)["covariance"].null_count == 100
    assert fit.predict(frame, effects="marginal").read_all()["predicted"].null_count == 300


# ---- derivatives of expressions

EXPRESSIONS = [
    "x", "x^2", "x^3 - 2*x", "1/x", "x/(1 + x)", "log(x)", "log(x, 3)", "log2(x)", "log10(x)", "log1p(x)", "exp(x)", "expm1(x)", "sqrt(x)",
    "abs(x - 1)", "I(x^2) + w", "2^x", "x^x", "-x", "(x * w) / x", "x %% 3", "exp(-x^2)", "w * 2", "(x > 1) * x",
]  # fmt: skip


def value(node: Node, x: float) -> float:
    """The expression at x, w = 0.7."""
    functions = {"log": lambda a, b=np.e: np.log(a) / np.log(b), "log2": np.log2, "log10": np.log10, "log1p": np.log1p, "exp": np.exp,
                 "expm1": np.expm1, "sqrt": np.sqrt, "abs": np.abs, "I": lambda a: a,
                 "ifelse": lambda test, a, b: a if test else b}  # fmt: skip
    text = label(node).replace("^", "**").replace("%%", "%")
    return float(eval(text, {"x": x, "w": 0.7, **functions}))  # noqa: S307


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_derivatives(text: str) -> None:
    node = parse_expression(text)
    slope = derivative(node, "x")
    for x in (0.4, 1.7):
        want = (value(node, x + 1e-6) - value(node, x - 1e-6)) / 2e-6
        assert (0.0 if slope is None else value(slope, x)) == pytest.approx(want, rel=1e-6, abs=1e-8)
    moved = substituted(node, Column("x"), Number(1.3))
    assert value(moved, 99.0) == pytest.approx(value(node, 1.3))


@pytest.mark.parametrize("link", ["logit", "cauchit"])
@pytest.mark.parametrize("sd", [0.0, 0.3, 4.0])
def test_interpolated_means_are_those_of_the_quadrature(link: str, sd: float) -> None:
    eta = np.append(np.linspace(-9.0, 8.0, 5000), np.nan)
    variance = np.full(len(eta), sd**2)
    assert _cells(link, eta, variance) is not None and _cells(link, eta[:2000], variance[:2000]) is not None
    got, want = integrated(link, eta, variance), _quadrature(link, eta, np.sqrt(variance))
    for name, tolerance in (("mu", 1e-11), ("nu", 1e-11), ("by_eta", 1e-9), ("by_variance", 1e-6)):
        scale = np.nanmax(np.abs(getattr(want, name))) if name != "nu" else want.nu
        assert np.nanmax(np.abs(getattr(got, name) - getattr(want, name)) / scale) < tolerance, name
    assert np.isnan(got.mu[-1])
    assert _cells(link, eta, variance + np.arange(len(eta))) is None and _cells("cloglog", eta, variance) is None


def test_crossed_factors_add_their_variances() -> None:
    rng = np.random.default_rng(5)
    n = 800
    frame = pl.DataFrame({"x": rng.normal(size=n), "a": rng.integers(0, 30, n), "b": rng.integers(0, 12, n), "o": np.zeros(n)})
    eta = 0.3 + 0.6 * frame["x"].to_numpy() + rng.normal(size=30)[frame["a"]] + 0.8 * rng.normal(size=12)[frame["b"]]
    frame = frame.with_columns(y=(rng.uniform(size=n) < MEANS["logit"](eta)).astype(float))
    fit = mp.glmm("y ~ x + (1 | a) + (1 | b)", frame, family="binomial")
    V, X = np.array(fit.joint_covariance), np.column_stack([np.ones(n), frame["x"]])
    np.testing.assert_allclose(V[:2, :2], fit.covariance, rtol=1e-9)
    np.testing.assert_allclose(V[2:, 2:], fit.theta_covariance, rtol=1e-9)
    R = np.array([float(term.R[0, 0]) for term in fit.terms])

    def projected(psi: np.ndarray) -> np.ndarray:
        sd = np.linalg.norm(psi[2:] / R)
        target = LINK["logit"](MEANS["logit"]((X @ psi[:2])[:, None] + sd * Z) @ PHI)
        return np.asarray(np.linalg.lstsq(X, target, rcond=None)[0])

    psi = np.array([*fit.beta, *(float(term.star[0, 0]) for term in fit.terms)])
    J = np.column_stack([(projected(psi + 1e-5 * e) - projected(psi - 1e-5 * e)) / 2e-5 for e in np.eye(4)])
    got = rows_of(fit, "population_average")
    np.testing.assert_allclose([got[name]["estimate"] for name in fit.names], projected(psi), rtol=1e-7)
    np.testing.assert_allclose([got[name]["std_error"] for name in fit.names], np.sqrt(np.diag(J @ V @ J.T)), rtol=1e-5)
