"""Generalized mixed models as users fit them: the reference, every entry, chunking, the boundary, trouble, results."""
from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.optimize as so
import scipy.special as sp
import scipy.stats as st

import mlpipe as mp
from mlpipe import checkpoint, gather, spool
from mlpipe.solve import glmm
from tests.conftest import KINDS, as_data
from tests.dense_glmm import MEANS, PAIRS, TAU, DenseGLMM, centre, constant, draw

REFERENCE = Path(__file__).parent / "reference"
IDS = sorted(path.stem for path in (REFERENCE / "glmm").glob("*.json"))
ELSEWHERE = [
    ("cbpp_cbind", "duckdb"), ("owls_nb2", "duckdb"), ("toenail_agq25", "duckdb"), ("cbpp_cbind", "path"), ("contraception_rs", "path"),
]  # fmt: skip
FAMILY = {"Gamma": "gamma", "nbinom2": "negbinomial", "nbinom1": "negbinomial1"}
CANONICAL = {"binomial": "logit", "poisson": "log"}
WEIGHTED = ("gamma", "inverse_gaussian", "gaussian")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Singular fits, and few rows a block, are no news here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.SingularFitWarning)
        yield


# ---- the reference: lme4 and glmmTMB stop short of the optimum, which is what their tolerances are for


def load(spec: dict[str, Any]) -> pl.DataFrame:
    frame = pl.read_parquet(REFERENCE / spec["data"]["file"])
    columns = json.loads((REFERENCE / spec["data"]["schema"]).read_text())["columns"]
    factors = {c["name"]: [str(level) for level in c["levels"]] for c in columns if c["type"] in ("factor", "ordered")}
    held = {name: levels for name, levels in factors.items() if name in frame.columns}
    return frame.with_columns(pl.col(name).cast(pl.String).cast(pl.Enum(levels)) for name, levels in held.items())


@pytest.mark.parametrize(("name", "engine"), [(n, "polars") for n in IDS] + ELSEWHERE)
def test_the_reference(name: str, engine: str, tmp_path: Path) -> None:
    spec = json.loads((REFERENCE / "glmm" / f"{name}.json").read_text())
    want, model, frame = spec["results"], spec["model"], load(spec)
    family = FAMILY.get(model["family"], model["family"])
    expected = spec["software"]["engine"] == "lme4::glmer" and CANONICAL.get(family) != model["link"]
    fixed = re.sub(r"\([^()]*\|[^()]*\)", "", model["formula"])
    contrasts = {k: "poly" for k, f in (model.get("factors") or {}).items() if f["ordered"] and re.search(rf"\b{k}\b", fixed)}
    fit = mp.glmm(
        model["formula"], as_data(frame, engine, tmp_path), family=family, link=model["link"], nagq=model["nAGQ"] or 1,
        trials=model["weights"], contrasts=contrasts or None, options=mp.Options(curvature="expected") if expected else None,
    )  # fmt: skip
    assert fit.converged and fit.score < 1e-8
    se = np.array(want["fixef"]["se"])
    assert list(fit.fixef()) == want["fixef"]["names"]
    assert np.abs((fit.beta - want["fixef"]["estimate"]) / se).max() < 5e-4
    assert np.abs(np.sqrt(np.diag(fit.vcov())) / se - 1).max() < 1e-3
    loglik = want["logLik"] if (model["nAGQ"] or 1) == 1 else (want.get("logLik_by_quadrature") or {}).get("agq_same_nodes")
    if loglik is not None:
        assert abs(fit.loglik - loglik) < 1e-5 * max(1.0, 1e-5 * abs(loglik))
    assert fit.facts()["nobs"] == want["nobs"]
    assert fit.n_blocks == next(iter(want["ngroups"].values()))
    got = [row for row in fit.varcorr().to_pylist() if row["group"] != "Residual"]
    for ours, theirs in zip(got, [row for row in want["varcorr"] if row["group"] != "Residual"], strict=True):
        assert (ours["term1"], ours["term2"]) == (theirs["name1"], theirs["name2"])
        assert ours["sd"] == pytest.approx(theirs["sdcor"], rel=1e-3)
    fitted = fit.augment().read_all()["fitted"].to_numpy()[want["rows"]]
    reference = np.array(want.get("fitted_conditional") or want["fitted"], float)
    assert np.abs(fitted - reference).max() < 2e-4 * np.std(reference)


# ---- simulated data


def simulated(
    family: str, link: str, *, seed: int = 0, blocks: int = 25, rows: int = 12, q: int = 1, discrete: bool = False
) -> pl.DataFrame:
    """Columns x, o (offset), m (trials), v (weights), p (response, a proportion for binomial), y (successes), g."""
    rng = np.random.default_rng(seed)
    eta, spread = centre(family, link)
    g = rng.permutation(np.repeat(np.arange(blocks), rows))
    n = len(g)
    x = rng.integers(-1, 2, n).astype(float) if discrete else rng.uniform(-1.0, 1.0, n)
    o = np.zeros(n) if discrete else spread * rng.uniform(-0.2, 0.2, n)
    m = rng.integers(1, 6, n).astype(float) if family == "binomial" else np.ones(n)
    v = rng.uniform(0.5, 2.0, n) if family in WEIGHTED and not discrete else np.ones(n)
    b = spread * rng.normal(size=(blocks, 2)).clip(-2, 2) * [0.8, 0.5 * (q > 1)]
    p = draw(rng, family, MEANS[link](eta + 0.5 * spread * x + o + b[g, 0] + b[g, 1] * x), m, v, TAU.get(family, 0.0))
    return pl.DataFrame({"x": x, "o": o, "m": m, "v": v, "p": p, "y": np.rint(p * m) if family == "binomial" else p, "g": g})


def arguments(family: str) -> dict[str, Any]:
    if family == "binomial":
        return {"trials": "m"}
    return {"weights": "v"} if family in WEIGHTED else {}


def dense(frame: pl.DataFrame, family: str, link: str, beta: Any, lam: float, tau: float) -> DenseGLMM:
    """The same model for brute force: a random intercept."""
    rows = frame.sort("g")
    n = len(rows)
    x, p, g, o, m, v = (rows[c].to_numpy() for c in ("x", "p", "g", "o", "m", "v"))
    one = np.ones((n, 1))
    return DenseGLMM(family, link, np.column_stack([one, x]), one, p, g, o, m, v, np.asarray(beta), np.array([[lam]]), tau)


def same(fit: Any, true: Any, tolerance: float = 1e-7) -> None:
    """DESIGN's promise of exactness."""
    assert np.abs((fit.beta - true.beta) / np.sqrt(np.diag(true.vcov()))).max() < tolerance
    assert abs(fit.loglik - true.loglik) < 1e-8 + 1e-12 * abs(true.loglik)
    np.testing.assert_allclose(fit.theta, true.theta, rtol=1e-6, atol=1e-7)
    se = np.sqrt(np.diag(true.vcov()))
    np.testing.assert_allclose(fit.vcov() / np.outer(se, se), true.vcov() / np.outer(se, se), atol=1e-3)  # more in a test of its own
    assert (fit.nobs, fit.rows, fit.n_blocks) == (true.nobs, true.rows, true.n_blocks)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("family", "link"), PAIRS)
def test_families_and_links(family: str, link: str) -> None:
    frame = simulated(family, link, blocks=15, rows=10)
    fit = mp.glmm("p ~ x + (1 | g)", frame, family=family, link=link, nagq=21, offset="o", **arguments(family))
    assert fit.converged and fit.score < 1e-8 and np.isfinite(fit.vcov()).all()
    model = dense(frame, family, link, fit.beta, float(fit.theta[0]), fit.tau)
    blocks = model.blocks
    exact = sum(block.integral(200) + constant(family, block.y, block.size).sum() for block in blocks)
    assert abs(fit.loglik - exact) < 2e-4
    str(fit), fit.tidy(), fit.glance(), fit.varcorr()


BRUTE = [("binomial", "logit"), ("poisson", "log"), ("gamma", "log"), ("negbinomial", "log"), ("beta", "logit")]


@pytest.mark.parametrize(("family", "link"), BRUTE)
def test_brute_force_maximum(family: str, link: str) -> None:
    """Nelder-Mead on a likelihood by Gauss-Hermite quadrature about zero, from the truth."""
    frame = simulated(family, link, blocks=12, rows=8)
    fit = mp.glmm("p ~ x + (1 | g)", frame, family=family, link=link, nagq=25, offset="o", **arguments(family))
    model = dense(frame, family, link, [0.0, 0.0], 1.0, 0.0)
    line = np.linspace(-6.0, 6.0, 121)
    logs = st.norm.logpdf(line) + np.log(line[1] - line[0])
    starts = np.flatnonzero(np.diff(model.block, prepend=-1))
    fixed = constant(family, model.y, model.size).sum()

    def negative(psi: np.ndarray) -> float:
        model.gamma, model.lambda_, model.tau = psi[:2], psi[2:3, None], psi[3] if family in TAU else 0.0
        each = np.add.reduceat(model.log_f(model.eta(line[None])), starts, axis=0)
        return -float(sp.logsumexp(each + logs, axis=1).sum() + fixed)

    psi = np.r_[fit.beta, fit.theta, [fit.tau] if family in TAU else []]
    assert abs(negative(psi) + fit.loglik) < 1e-5
    found = so.minimize(negative, psi * 1.1 + 0.02, method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9, "maxiter": 2000})
    assert abs(found.fun + fit.loglik) < 1e-5
    assert np.abs((found.x[:2] - fit.beta) / np.sqrt(np.diag(fit.vcov()))).max() < 2e-3


# ---- every entry, order, thread, chunk and limit


@pytest.fixture(scope="module")
def rows() -> pl.DataFrame:
    return simulated("binomial", "logit", blocks=40, rows=15, q=2).with_columns(f=pl.Series(["b", "a", "c"] * 200))


@pytest.fixture(scope="module")
def true(rows: pl.DataFrame) -> Any:
    return mp.glmm("p ~ x + f + (1 + x | g)", rows, family="binomial", trials="m")


def again(data: Any, **arguments: Any) -> Any:
    return mp.glmm("p ~ x + f + (1 + x | g)", data, family="binomial", trials="m", **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry(kind: str, rows: pl.DataFrame, true: Any, tmp_path: Path) -> None:
    fit = again(as_data(rows, kind, tmp_path))
    same(fit, true)
    ours, theirs = (pl.from_arrow(f.ranef()) for f in (fit, true))
    assert ours["g"].to_list() == theirs["g"].to_list() == sorted(theirs["g"].to_list())
    np.testing.assert_allclose(ours["estimate"], theirs["estimate"], atol=1e-6)
    np.testing.assert_allclose(ours["std_error"], theirs["std_error"], atol=1e-6)


@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_rows(seed: int, rows: pl.DataFrame, true: Any) -> None:
    same(again(rows.sample(fraction=1.0, shuffle=True, seed=seed)), true)


@pytest.mark.parametrize("threads", [1, 4])
def test_threads(threads: int, rows: pl.DataFrame, true: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "CHUNK_ROWS", 64)
    same(again(rows.to_arrow(), options=mp.Options(threads=threads)), true)


def test_one_thread_is_bit_identical(rows: pl.DataFrame) -> None:
    one, two = (again(rows.to_arrow(), options=mp.Options(threads=1)) for _ in range(2))
    assert (one.beta == two.beta).all() and (one.theta == two.theta).all() and one.loglik == two.loglik
    assert (one.vcov() == two.vcov()).all() and one.ranef().equals(two.ranef())


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("chunk", "piece"), [(16, 16), (100, 16), (100, 200)])
def test_chunks(chunk: int, piece: int, rows: pl.DataFrame, true: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(spool, "PIECE_ROWS", piece)
    same(again(rows), true)


@pytest.mark.parametrize("chunk", [50, 200])
def test_standard_errors_do_not_depend_on_chunks(chunk: int, rows: pl.DataFrame, true: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding, as estimates do: DESIGN 5."""
    monkeypatch.setattr(spool, "CHUNK_ROWS", chunk)
    fit = again(rows)
    np.testing.assert_allclose(np.sqrt(np.diag(fit.vcov())), np.sqrt(np.diag(true.vcov())), rtol=1e-7)


@pytest.mark.parametrize("nagq", [1, 5])
def test_one_block_longer_than_a_piece(nagq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = simulated("poisson", "log", blocks=20, rows=30).with_columns(g=pl.when(pl.col.g < 12).then(5).otherwise(pl.col.g))
    whole = mp.glmm("p ~ x + (1 + x | g)", frame, family="poisson", nagq=nagq)
    monkeypatch.setattr(spool, "CHUNK_ROWS", 16)
    monkeypatch.setattr(spool, "PIECE_ROWS", 32)
    same(mp.glmm("p ~ x + (1 + x | g)", frame, family="poisson", nagq=nagq), whole)


def test_a_block_that_ends_with_its_piece_and_batch() -> None:
    """Blocks of exactly 262,144 rows, a piece and four batches; with one thread batches are full."""
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(4), [262_144, 262_144, 1_000, 1_000])
    x = rng.normal(size=len(g))
    y = rng.binomial(1, sp.expit(0.3 * x + np.array([0.5, -0.5, 1.0, -1.0])[g]))
    frame = pl.DataFrame({"x": x, "g": g, "y": y})
    fit = mp.glmm("y ~ x + (1 | g)", frame.to_arrow(), family="binomial", options=mp.Options(threads=1))
    assert fit.n_blocks == 4
    assert fit.ranef()["g"].to_pylist() == [0, 1, 2, 3]


def temporary(folder: Path) -> list[Path]:
    return list(folder.iterdir())


@pytest.mark.parametrize("kind", ["polars", "arrow", "path"])
def test_a_mapped_spool(kind: str, rows: pl.DataFrame, true: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(spool, "CHUNK_ROWS", 64)
    monkeypatch.setattr(gather, "build", lambda *a, budget, **k: spool.build(*a, budget=1_000, **k))
    fit = again(as_data(rows, kind, tmp_path), options=mp.Options(temp_directory=str(tmp_path / "temp")))
    assert fit.info["spool"]["mapped"]
    same(fit, true)
    assert not temporary(tmp_path / "temp")


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("freq", "nagq"), [(False, 1), (False, 5), (True, 3)])
@pytest.mark.parametrize("family", ["binomial", "poisson", *TAU])
def test_compressed_or_not(family: str, freq: bool, nagq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    link = "logit" if family in ("binomial", "beta") else "log"
    frame = simulated(family, link, discrete=True).with_columns(q=1 + pl.int_range(pl.len()) % 3)
    asked: dict[str, Any] = {"family": family, "link": link, "nagq": nagq, "freq": "q" if freq else None}
    asked |= arguments(family)
    monkeypatch.setattr(gather, "REPEATING", 2.0)
    monkeypatch.setattr(gather, "WORTHWHILE", 0.0)
    short = mp.glmm("p ~ x + (1 | g)", frame, **asked)
    monkeypatch.setattr(gather, "WORTHWHILE", math.inf)
    long = mp.glmm("p ~ x + (1 | g)", frame, **asked)
    assert long.info["cells"] == len(frame)
    assert short.info["cells"] < len(frame) or family in ("negbinomial", "negbinomial1", "beta")
    same(short, long)
    if freq:
        same(mp.glmm("p ~ x + (1 | g)", frame.select(pl.all().repeat_by("q").explode()), **asked | {"freq": None}), _rows_of(long, frame))


def _rows_of(fit: Any, frame: pl.DataFrame) -> Any:
    """A row that stands for several is several rows there."""
    fit.rows = int(frame["q"].sum())
    return fit


# ---- responses, terms, keys, names


@pytest.mark.parametrize("kind", ["text", "enum", "boolean", "cbind", "successes", "integers"])
def test_binomial_responses(kind: str) -> None:
    frame = simulated("binomial", "logit")
    ones = frame.with_columns(m=pl.lit(1.0), y=(pl.col.p > 0.5).cast(pl.Int64)).with_columns(p=pl.col.y.cast(pl.Float64))
    data, formula, asked = ones, "r ~ x + (1 | g)", {}
    match kind:
        case "text":
            data = ones.with_columns(r=pl.when(pl.col.y == 1).then(pl.lit("é yes")).otherwise(pl.lit("it's no")))
        case "enum":
            data = ones.with_columns(r=pl.when(pl.col.y == 1).then(pl.lit("a")).otherwise(pl.lit("b")).cast(pl.Enum(["b", "a"])))
        case "boolean":
            data = ones.with_columns(r=pl.col.y == 1)
        case "integers":
            data = ones.with_columns(r=pl.col.y.cast(pl.Int8))
        case "cbind":
            data, formula = frame, "cbind(y, m - y) ~ x + (1 | g)"
        case "successes":
            data, formula, asked = frame.with_columns(r=pl.col.y / pl.col.m, k=pl.col.m), formula, {"trials": "k"}
    fit = mp.glmm(formula, data, family="binomial", **asked)
    plain = kind in ("cbind", "successes")
    same(fit, mp.glmm("p ~ x + (1 | g)", frame if plain else ones, family="binomial", trials="m"))


TERMS = {"(x || g)": 2, "(f | g)": 6, "(0 + f | g)": 6, "(0 + x | g)": 1, "(1 | g:h)": 1, "(1 + x | g)": 3}


@pytest.mark.parametrize(("bar", "count"), TERMS.items())
def test_random_terms(bar: str, count: int) -> None:
    frame = simulated("poisson", "log", blocks=30, rows=30, q=2)
    frame = frame.with_columns(f=pl.Series(["a", "b", "c"] * 300), h=pl.Series([1, 2] * 450)).sample(fraction=1.0, shuffle=True, seed=0)
    fit = mp.glmm(f"p ~ x + {bar}", frame, family="poisson")
    assert fit.converged and len(fit.theta) == count
    assert fit.n_blocks == (frame.select("g", "h").n_unique() if ":" in bar else 30)
    if ":" not in bar:
        wild = frame.with_columns(x=5000.0 + 100.0 * pl.col.x) if bar == "(1 + x | g)" else None
        if wild is not None:
            assert mp.glmm(f"p ~ x + {bar}", wild, family="poisson").loglik == pytest.approx(fit.loglik, abs=1e-7)


def test_cell_means_and_contrasts_of_a_random_factor_are_one_model() -> None:
    frame = simulated("poisson", "log", blocks=30, rows=30).with_columns(f=pl.Series(["a", "b", "c"] * 300))
    one, two = (mp.glmm(f"p ~ f + {bar}", frame, family="poisson") for bar in ("(f | g)", "(0 + f | g)"))
    assert one.loglik == pytest.approx(two.loglik, abs=1e-7)
    np.testing.assert_allclose(one.beta, two.beta, atol=1e-5)


KEYS: dict[str, Any] = {
    "text": lambda k: f"it's \"{k}\" é",
    "dates": lambda k: date(2020, 1, 1 + k),
    "decimals": lambda k: Decimal(k) / 100,
    "halves": lambda k: k / 2 - 3.0,
    "negative": lambda k: -k,
    "wide": lambda k: 2**61 + k,
    "booleans": lambda k: k % 2 == 0,
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("engine", ["polars", "arrow", "path"])
@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_any_type(kind: str, engine: str, tmp_path: Path) -> None:
    frame = simulated("poisson", "log", blocks=20)
    if kind == "booleans":
        frame = frame.with_columns(g=pl.col.g % 2)
    keys = {k: KEYS[kind](k) for k in frame["g"].unique().to_list()}
    odd = frame.with_columns(k=pl.Series([keys[k] for k in frame["g"]]))
    data = as_data(odd, engine, tmp_path)
    fit, plain = mp.glmm("p ~ x + (1 | k)", data, family="poisson"), mp.glmm("p ~ x + (1 | g)", frame, family="poisson")
    same(fit, plain)
    effects = dict(zip(fit.ranef()["k"].to_pylist(), fit.ranef()["estimate"].to_pylist(), strict=True))
    assert fit.ranef()["k"].to_pylist() == sorted(keys.values())
    for row in plain.ranef().to_pylist():
        assert effects[keys[row["g"]]] == pytest.approx(row["estimate"], abs=1e-6)
    np.testing.assert_allclose(
        fit.predict(data).read_all()["predicted"].to_numpy(), plain.predict(frame).read_all()["predicted"].to_numpy(), rtol=1e-6
    )


@pytest.mark.parametrize("engine", ["polars", "arrow", "path"])
def test_odd_names(engine: str, tmp_path: Path) -> None:
    frame = simulated("binomial", "logit")
    odd = frame.rename({"x": 'a "quote" it\'s', "g": "my group", "p": "X", "m": "x", "o": "estimate", "v": "y "})
    data, formula = as_data(odd, engine, tmp_path), "X ~ `a \"quote\" it's` + (1 | `my group`)"
    fit = mp.glmm(formula, data, family="binomial", trials="x", offset="estimate")
    same(fit, mp.glmm("p ~ x + (1 | g)", frame, family="binomial", trials="m", offset="o"))
    assert fit.augment().read_all().num_rows == len(frame)


# ---- the boundary


@pytest.mark.parametrize("nagq", [1, 7])
@pytest.mark.parametrize("family", ["binomial", "poisson", "gamma", "negbinomial", "gaussian", "beta"])
def test_no_variance_is_the_glm(family: str, nagq: int) -> None:
    link = "logit" if family in ("binomial", "beta") else "log"
    frame = simulated(family, link, blocks=1, rows=300).with_columns(g=pl.int_range(pl.len()) % 30)
    rank = np.arange(300)  # sorted responses are dealt to and fro, so that blocks are more alike than by chance
    frame = frame.sort("p").with_columns(g=pl.Series(np.where((rank // 30) % 2 == 0, rank % 30, 29 - rank % 30)))
    asked = {"family": family, "link": link} | arguments(family)
    with pytest.warns(mp.SingularFitWarning):
        fit = mp.glmm("p ~ 1 + (1 | g)", frame, nagq=nagq, **asked)
    plain = mp.glm("p ~ 1", frame, **asked)
    assert fit.singular and fit.converged and fit.theta.tolist() == [0.0]
    np.testing.assert_allclose(fit.beta, plain.beta, atol=1e-7)
    np.testing.assert_allclose(fit.vcov(), plain.vcov(), rtol=1e-4)
    assert abs(fit.loglik - plain.loglik) < 1e-8 * (1 + abs(plain.loglik))
    effects = pl.from_arrow(fit.ranef())
    assert (effects["estimate"] == 0.0).all() and (effects["std_error"] == 0.0).all()
    str(fit), fit.tidy(), fit.varcorr(), fit.icc() if family in ("binomial", "poisson") else None


@pytest.mark.parametrize("seed", range(3))
def test_a_singular_covariance_of_two(seed: int) -> None:
    """A slope that is a multiple of the intercept; every start ends at the same likelihood."""
    rng = np.random.default_rng(seed)
    g = np.repeat(np.arange(40), 10)
    x, b = rng.normal(size=400), rng.normal(size=40)[g]
    frame = pl.DataFrame({"x": x, "g": g, "y": rng.poisson(np.exp(0.5 + 0.2 * x + 0.5 * b * (1 + 0.5 * x)))})
    starts = (None, [1.0, 0.0, 1.0], [0.1, 0.5, 0.2], [2.0, -1.0, 0.5])
    fits = [mp.glmm("y ~ x + (1 + x | g)", frame, family="poisson", start=start) for start in starts]
    assert all(fit.converged for fit in fits)
    assert max(fit.loglik for fit in fits) - min(fit.loglik for fit in fits) < 1e-7
    far = mp.glmm("y ~ x + (1 + x | g)", frame.with_columns(x=pl.col.x * 7 + 2000), family="poisson")
    assert far.loglik == pytest.approx(fits[0].loglik, abs=1e-7) and far.singular == fits[0].singular


@pytest.mark.parametrize("bar", ["(1 | g)", "(1 + x | g)", "(x || g)"])
@pytest.mark.parametrize("weights", [None, "v"])
def test_gaussian_identity_is_the_linear_mixed_model(bar: str, weights: str | None) -> None:
    frame = simulated("gaussian", "identity", q=2)
    for nagq in (1, 3):
        fit = mp.glmm(f"p ~ x + {bar}", frame, family="gaussian", nagq=nagq, weights=weights, offset="o")
        linear = mp.lmm(f"p ~ x + {bar}", frame, reml=False, weights=weights, offset="o")
        assert abs(fit.loglik - linear.loglik) < 1e-7
        np.testing.assert_allclose(fit.beta, linear.beta, rtol=1e-6)
        assert fit.sigma == pytest.approx(linear.sigma, rel=1e-6)
        ours, theirs = (np.array([row["variance"] for row in f.varcorr().to_pylist()]) for f in (fit, linear))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
        for column in ("estimate", "std_error", "reliability"):
            np.testing.assert_allclose(fit.ranef()[column], linear.ranef()[column], atol=1e-5)
        assert fit.ranef().column_names == linear.ranef().column_names and fit.ranef()["g"].equals(linear.ranef()["g"])


# ---- trouble


@pytest.mark.thinned(5)
@pytest.mark.parametrize("nagq", [1, 5])
@pytest.mark.parametrize("link", ["logit", "probit", "cloglog", "cauchit"])
@pytest.mark.parametrize("kind", ["complete", "quasi", "a level"])
def test_separation_is_named(kind: str, link: str, nagq: int) -> None:
    rng = np.random.default_rng(3)
    frame = pl.DataFrame({"x": rng.normal(size=300), "z": rng.normal(size=300), "y": rng.binomial(1, 0.5, 300), "g": np.arange(300) % 30})
    frame = frame.with_columns(r=((pl.col.y == 1) & (pl.col.z > 1)).cast(pl.Float64), s=(pl.col.z > 0.1).cast(pl.Int8))
    frame = frame.with_columns(f=pl.when(pl.col.r == 1).then(pl.lit("bad")).otherwise(pl.lit("a")))
    formula, named = {"complete": ("s ~ x + z", "z"), "quasi": ("y ~ x + r", "r"), "a level": ("y ~ x + f", "fbad")}[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = mp.glmm(f"{formula} + (1 | g)", frame, family="binomial", link=link, nagq=nagq)
    kinds = {w.category for w in caught}
    assert named in fit.info["separation"] and mp.SeparationWarning in kinds
    assert "x" not in fit.info["separation"] or kind == "complete"
    assert RuntimeWarning not in kinds
    str(fit), fit.tidy()


def test_no_separation_where_the_fit_merely_fails() -> None:
    frame = simulated("binomial", "logit", rows=20).with_columns(y=(pl.col.p > 0.5).cast(pl.Int8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = mp.glmm("y ~ x + (1 | g)", frame, family="binomial", start=[1e6])
    assert not fit.info["separation"] and mp.SeparationWarning not in {w.category for w in caught}


def test_blocks_without_variation_are_counted() -> None:
    g = np.repeat(np.arange(30), 10)
    y = np.where(g < 5, 0, np.where(g < 8, 1, np.random.default_rng(0).integers(0, 2, 300)))
    y[g >= 8] = np.tile([0, 1], 110)
    frame = pl.DataFrame({"x": np.random.default_rng(1).normal(size=300), "g": g, "y": y})
    fit = mp.glmm("y ~ x + (1 | g)", frame, family="binomial")
    assert fit.info["blocks_without_variation"] == 8
    assert fit.info["separation"] == []


@pytest.mark.parametrize("nagq", [1, 9])
def test_a_response_that_only_the_blocks_decide_separates_them(nagq: int) -> None:
    g = np.arange(2000) % 100
    frame = pl.DataFrame({"g": g, "x": np.random.default_rng(0).normal(size=2000), "y": (g > 50).astype(int)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = mp.glmm("y ~ x + (1 | g)", frame, family="binomial", nagq=nagq)
    assert fit.info["separation"] == ["g"] and mp.SeparationWarning in {w.category for w in caught}
    assert "separation: g" in str(fit) and "information" not in fit.info


@pytest.mark.parametrize(
    ("family", "rows", "hint"), [("poisson", 1, True), ("poisson", 10, False), ("gamma", 2, True), ("gaussian", 2, False)]
)
def test_small_blocks_of_other_families_get_the_hint(family: str, rows: int, hint: bool) -> None:
    link = "identity" if family == "gaussian" else "log"
    frame = simulated(family, link, blocks=60, rows=rows).with_columns(p=pl.col.p if family != "poisson" else (pl.col.p / 8).round())
    fit = mp.glmm("p ~ x + (1 | g)", frame, family=family, link=link)
    assert any("nagq" in note for note in fit.info["notes"]) == hint


@pytest.mark.parametrize("family", ["gamma", "inverse_gaussian", "gaussian"])
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_unit_of_the_response_does_not_matter(family: str, scale: float) -> None:
    frame = simulated(family, "log")
    fit, scaled = (mp.glmm("p ~ x + (1 | g)", f, family=family, link="log") for f in (frame, frame.with_columns(p=pl.col.p * scale)))
    assert fit.converged and scaled.converged
    np.testing.assert_allclose(scaled.beta - [math.log(scale), 0.0], fit.beta, rtol=1e-6)
    assert scaled.loglik == pytest.approx(fit.loglik - len(frame) * math.log(scale), rel=1e-9)


def test_a_response_far_from_zero_for_its_spread() -> None:
    """The variance of the response is taken about one of its values."""
    frame = simulated("gaussian", "identity").with_columns(p=pl.col.p + 1e7)
    fit, near = (mp.glmm("p ~ x + (1 | g)", f, family="gaussian") for f in (frame, frame.with_columns(p=pl.col.p - 1e7)))
    assert fit.converged
    np.testing.assert_allclose([fit.beta[1], fit.theta[0], fit.sigma], [near.beta[1], near.theta[0], near.sigma], rtol=1e-4)


@pytest.mark.parametrize(("bar", "nagq"), [("(1 | g)", 5), ("(1 + x | g)", 1)])
def test_large_counts(bar: str, nagq: int) -> None:
    """What Poisson's log-likelihood leaves out is nearly all of it where counts are 1e9: a share of the rest once hid what steps gain."""
    rng = np.random.default_rng(7)
    x, g, b = rng.normal(size=300), np.arange(300) % 30, rng.normal(size=(30, 2)) * [0.5, 0.3]
    eta = 20.7 + 0.3 * x + b[g, 0] + b[g, 1] * x * ("x" in bar)
    frame = pl.DataFrame({"x": x, "g": g, "y": rng.poisson(np.exp(eta))})
    fit = mp.glmm(f"y ~ x + {bar}", frame, family="poisson", nagq=nagq)
    linear = mp.lmm(f"log(y) ~ x + {bar}", frame, reml=False)  # of log y, whose variance is 1 / mu
    assert fit.converged
    np.testing.assert_allclose(fit.beta, linear.beta, rtol=1e-4)
    np.testing.assert_allclose(fit.theta, linear.theta * linear.sigma, rtol=1e-3)


@pytest.mark.parametrize("noise", [1e-3, 1e-5])
def test_little_noise_within_blocks(noise: float) -> None:
    """The information, once observed, was not again: on a long way to a small dispersion steps became ever worse."""
    rng = np.random.default_rng(7)
    x, g, b, e = rng.normal(size=300), np.arange(300) % 30, rng.normal(size=30) / 2.0, rng.normal(size=300)
    frame = pl.DataFrame({"x": x, "g": g, "y": 1.0 + 0.3 * x + b[g] + noise * e})
    linear = mp.lmm("y ~ x + (1 | g)", frame, reml=False)
    fit = mp.glmm("y ~ x + (1 | g)", frame, family="gaussian")
    assert fit.converged and fit.evaluations < 90
    found, true = [*fit.beta, fit.sigma, fit.theta[0]], [*linear.beta, linear.sigma, linear.theta[0] * linear.sigma]
    np.testing.assert_allclose(found, true, rtol=1e-5)
    assert fit.loglik == pytest.approx(linear.loglik, abs=1e-3)


def test_an_exact_fit_is_said_so() -> None:
    x = np.random.default_rng(0).normal(size=300)
    frame = pl.DataFrame({"x": x, "g": np.arange(300) % 10, "y": 1.0 + 2.0 * x})
    with pytest.warns(mp.ConvergenceWarning, match="fitted exactly"):
        mp.glmm("y ~ x + (1 | g)", frame, family="gaussian")


def test_few_rows_a_block_get_a_hint() -> None:
    frame = simulated("binomial", "logit", blocks=100, rows=3).with_columns(y=(pl.col.p > 0.5).cast(pl.Int8))
    laplace, many = (mp.glmm("y ~ x + (1 | g)", frame, family="binomial", nagq=k) for k in (1, 7))
    assert any("nagq" in note for note in laplace.info["notes"])
    assert not any("nagq" in note for note in many.info["notes"])


DOMAIN = {
    "binomial": ([0.0, 1.0, 2.5, -1.0], 2, "2.5"), "poisson": ([0.0, 3.0, 1.5, -2.0], 2, "1.5"),
    "negbinomial": ([0.0, -1.0, 2.0, 0.5], 2, "-1"),
    "negbinomial1": ([1.0, 2.0, 3.5, 1.0], 1, "3.5"), "gamma": ([1.0, -0.5, 0.0, 2.0], 2, "-0.5"),
    "inverse_gaussian": ([1.0, 0.0, 2.0, 3.0], 1, "0"), "beta": ([0.5, 1.0, 0.2, 0.0], 2, "1"),
}  # fmt: skip


@pytest.mark.parametrize("compressible", [False, True])
@pytest.mark.parametrize("engine", ["polars", "path"])
@pytest.mark.parametrize("family", DOMAIN)
def test_a_response_outside_the_domain(family: str, engine: str, compressible: bool, tmp_path: Path) -> None:
    """The last rows of the last block come first in the source."""
    values, count, first = DOMAIN[family]
    fine = 0.5 if family == "beta" else 1.0
    n = 60
    x = np.zeros(n) if compressible else np.arange(n) / n
    frame = pl.DataFrame({"out come": [*values, *[fine] * (n - 4)], "x": x, "g": [9, 8, 7, 6, *[k % 5 for k in range(n - 4)]]})
    formula = "`out come` ~ 1 + (1 | g)" if compressible else "`out come` ~ x + (1 | g)"
    with pytest.raises(mp.DataError) as caught:
        mp.glmm(formula, as_data(frame, engine, tmp_path), family=family)
    message = str(caught.value)
    assert "out come" in message and caught.value.column == "out come" and caught.value.code == "response_domain"
    assert f"{count} row" in message
    assert re.search(rf"first of them {re.escape(first)}\b", message)


def test_successes_above_trials_are_refused() -> None:
    frame = pl.DataFrame({"k": [1, 5, 2, 3], "m": [3, 4, 5, 6], "g": [1, 1, 2, 2]})
    with pytest.raises(mp.DataError, match="5 of 4"):
        mp.glmm("cbind(k, m - k) ~ 1 + (1 | g)", frame, family="binomial")


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nagq 0": ({"nagq": 0}, mp.ConfigError, "nagq"),
    "nagq True": ({"nagq": True}, mp.ConfigError, "nagq"),
    "nagq 2.5": ({"nagq": 2.5}, mp.ConfigError, "nagq"),
    "too many nodes": ({"nagq": 100_000}, mp.ConfigError, "100,000"),
    "too many nodes for two": ({"nagq": 101, "formula": "k ~ x + (x | g)"}, mp.ConfigError, "10,201"),
    "unknown family": ({"family": "binomail"}, mp.ConfigError, "'binomial'"),
    "quasi": ({"family": "quasibinomial"}, mp.ConfigError, "'binomial'"),
    "unknown link": ({"link": "lgoit"}, mp.ConfigError, "'logit'"),
    "weights": ({"weights": "m"}, mp.ConfigError, "trials=.*freq="),
    "cbind of counts": ({"formula": "cbind(k, m) ~ x + (1 | g)", "family": "poisson"}, mp.FormulaError, "binomial"),
    "trials of counts": ({"family": "poisson", "trials": "m"}, mp.ConfigError, "binomial"),
    "three levels": ({"formula": "t ~ x + (1 | g)"}, mp.DataError, "3 levels"),
    "text counts": ({"formula": "t ~ x + (1 | g)", "family": "poisson"}, mp.DataError, "not numeric"),
    "all zero": ({"formula": "z ~ x + (1 | g)"}, mp.DataError, "0 in every row"),
    "all one": ({"formula": "m ~ x + (1 | g)"}, mp.DataError, "1 in every row"),
    "zero trials": ({"formula": "z ~ x + (1 | g)", "trials": "z"}, mp.DataError, ""),
    "all null": ({"formula": "k ~ n + (1 | g)"}, mp.DataError, "300 rows"),
    "empty": ({"rows": 0}, mp.DataError, "no rows"),
    "one level": ({"formula": "k ~ x + (1 | z)"}, mp.DataError, "two levels"),
    "no random term": ({"formula": "k ~ x"}, mp.ConfigError, "glm"),
    "NaN start": ({"start": [math.nan]}, mp.ConfigError, "start"),
    "start of text": ({"start": "abc"}, mp.ConfigError, "start.*numbers"),
    "nodes whose weights underflow": ({"nagq": 301}, mp.ConfigError, "more than 300"),
    "checkpoint is a directory": ({"checkpoint": "/"}, mp.ConfigError, "checkpoint"),
    "constant gaussian": ({"formula": "m ~ x + (1 | g)", "family": "gaussian"}, mp.DataError, "1 in every row"),
    "constant gamma": ({"formula": "m ~ x + (1 | g)", "family": "gamma"}, mp.DataError, "1 in every row"),
    "huge": ({"formula": "h ~ x + (1 | g)", "family": "gamma"}, mp.DataError, "too large"),
    "tiny": ({"formula": "i ~ x + (1 | g)", "family": "gamma"}, mp.DataError, "too small"),
    "start of two": ({"start": [1.0, 1.0]}, mp.ConfigError, "start"),
    "no closed form": ({"family": "negbinomial1", "options": mp.Options(curvature="expected")}, mp.ConfigError, "curvature"),
    "iterative": ({"method": "iterative"}, mp.ConfigError, "exactly"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    asked, kind, says = REFUSED[case]
    asked = {"family": "binomial"} | asked
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"k": rng.integers(0, 2, 300), "x": rng.normal(size=300), "g": np.arange(300) % 20, "t": ["a", "b", "c"] * 100})
    frame = frame.with_columns(h=1e200 * (1.0 + pl.col.k), i=1e-200 * (1.0 + pl.col.k))
    frame = frame.with_columns(z=pl.lit(0.0), m=pl.lit(1.0), n=pl.lit(None, dtype=pl.Float64)).head(asked.pop("rows", 300))
    with pytest.raises(kind) as caught:
        mp.glmm(asked.pop("formula", "k ~ x + (1 | g)"), frame, **asked)
    assert re.search(says, str(caught.value), re.DOTALL)


@pytest.mark.parametrize("integer", [np.int64(5), np.int32(5)])
def test_a_numpy_integer_is_a_number_of_nodes(integer: Any) -> None:
    assert mp.glmm("p ~ x + (1 | g)", simulated("poisson", "log"), family="poisson", nagq=integer).nagq == 5


@pytest.mark.parametrize(("seed", "nagq"), [(0, 1), (0, 5), (1, 1)])
@pytest.mark.parametrize("family", ["negbinomial", "negbinomial1"])
def test_no_overdispersion_is_reported(family: str, seed: int, nagq: int) -> None:
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({"x": rng.normal(size=400), "g": rng.integers(0, 40, 400), "y": rng.binomial(6, 0.5, 400)})
    poisson = mp.glmm("y ~ x + (1 | g)", frame, family="poisson", nagq=nagq)
    with pytest.warns(mp.ConvergenceWarning, match="infinity"):
        fit = mp.glmm("y ~ x + (1 | g)", frame, family=family, nagq=nagq)
    assert fit.loglik == pytest.approx(poisson.loglik, abs=1e-2)
    str(fit), fit.tidy(), fit.glance()


@pytest.mark.parametrize("family", ["poisson", "negbinomial"])
def test_a_count_that_is_always_zero_is_reported(family: str) -> None:
    frame = simulated("poisson", "log").with_columns(z=pl.lit(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = mp.glmm("z ~ x + (1 | g)", frame, family=family)
        except mp.MlpipeError:
            return
    assert not fit.converged or {w.category for w in caught} - {mp.SingularFitWarning}


@pytest.mark.parametrize(("family", "link"), [("poisson", "identity"), ("binomial", "log"), ("gamma", "inverse")])
def test_a_link_that_leaves_the_domain_is_said_so(family: str, link: str) -> None:
    """Means below zero, or above one, for some blocks: an error, or a fit that is marked; no numpy warnings, no invented separation."""
    rng = np.random.default_rng(1)
    g, x = rng.integers(0, 40, 400), rng.normal(size=400)
    eta = 0.3 + 0.5 * x + 0.7 * rng.normal(size=40)[g]
    mean = np.exp(eta)
    y = {"poisson": rng.poisson(mean), "binomial": rng.binomial(1, sp.expit(eta)), "gamma": rng.gamma(3.0, mean / 3.0)}[family]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = mp.glmm("y ~ x + (1 | g)", pl.DataFrame({"x": x, "g": g, "y": y}), family=family, link=link)
        except mp.MlpipeError as error:
            assert "link" in str(error)
            return
    assert RuntimeWarning not in {w.category for w in caught}
    assert fit.info["separation"] == []
    assert fit.converged or "link" in fit.message or "mode" in fit.message


def test_wild_scales() -> None:
    frame = simulated("poisson", "log", blocks=40, rows=20, q=2)
    rng = np.random.default_rng(0)
    years = 2000.0 + np.round(10 * frame["x"].to_numpy())
    frame = frame.with_columns(big=pl.Series(1e9 * rng.normal(size=800)), far=pl.Series(1e9 + rng.normal(size=800)), year=pl.Series(years))
    calm = frame.with_columns(big=pl.col.big / 1e9, far=pl.col.far - 1e9, year=(pl.col.year - 2000) / 10)
    formula = "p ~ big + far + year + (1 + year | g)"
    wild, tame = (mp.glmm(formula, data, family="poisson") for data in (frame, calm))
    assert wild.converged and tame.converged and not wild.dropped
    assert abs(wild.loglik - tame.loglik) < 1e-6
    np.testing.assert_allclose(wild.beta[1:] * [1e9, 1.0, 10.0], tame.beta[1:], rtol=1e-4, atol=1e-6)


def test_non_convergence_is_marked_and_told(tmp_path: Path) -> None:
    frame = simulated("binomial", "logit")
    with pytest.warns(mp.ConvergenceWarning, match="out of evaluations"):
        fit = mp.glmm("p ~ x + (1 | g)", frame, family="binomial", trials="m", options=mp.Options(max_passes=3))
    assert not fit.converged and fit.evaluations <= 3
    fit.write(tmp_path / "fit")
    assert not mp.load(tmp_path / "fit").converged
    with pytest.raises(mp.ConvergenceError):
        mp.glmm("p ~ x + (1 | g)", frame, family="binomial", trials="m", options=mp.Options(max_passes=3, on_nonconvergence="raise"))


# ---- checkpoints


class Stop(Exception):
    pass


def interrupted(frame: pl.DataFrame, path: Path, steps: int, monkeypatch: pytest.MonkeyPatch, **asked: Any) -> None:
    save, done = checkpoint.Checkpoint.save, []

    def stopping(self: Any, psi: np.ndarray) -> None:
        save(self, psi)
        done.append(psi)
        if len(done) == steps:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", stopping)
        with pytest.raises(Stop):
            mp.glmm("p ~ x + (1 + x | g)", frame, family="poisson", checkpoint=path, **asked)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_fit_goes_on(steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frame = simulated("poisson", "log", q=2, blocks=30)
    whole = mp.glmm("p ~ x + (1 + x | g)", frame, family="poisson")
    interrupted(frame, tmp_path / "state", steps, monkeypatch)
    fit = mp.glmm("p ~ x + (1 + x | g)", frame, family="poisson", checkpoint=tmp_path / "state")
    same(fit, whole, 1e-6)
    assert fit.converged and fit.evaluations <= whole.evaluations
    assert os.listdir(tmp_path) == ["state"]


KILLED = """
import os, signal, sys
import mlpipe as mp
from mlpipe.checkpoint import Checkpoint
save = Checkpoint.save

def dying(self, psi):
    save(self, psi)
    if self.steps == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoint.save = dying
mp.glmm("p ~ x + (1 + x | g)", sys.argv[1], family="poisson", checkpoint=sys.argv[2])
"""


def test_a_killed_process_is_gone_on_from(tmp_path: Path) -> None:
    data, state = tmp_path / "data.parquet", tmp_path / "state"
    simulated("poisson", "log", q=2, blocks=30).write_parquet(data)
    died = subprocess.run([sys.executable, "-c", KILLED, str(data), str(state)], check=False)
    assert died.returncode == -signal.SIGKILL and json.loads(state.read_text())["steps"] == 2
    whole = mp.glmm("p ~ x + (1 + x | g)", data, family="poisson")
    fit = mp.glmm("p ~ x + (1 + x | g)", data, family="poisson", checkpoint=state)
    same(fit, whole, 1e-6)
    assert fit.evaluations < whole.evaluations


OTHERS = {
    "formula": {"formula": "p ~ x + (1 | g)"}, "coding": {"formula": "p ~ 0 + x + (1 + x | g)"}, "nagq": {"nagq": 3},
    "family": {"family": "negbinomial"}, "link": {"link": "sqrt"}, "offset": {"offset": "o"}, "frequencies": {"freq": "m"},
    "curvature": {"options": mp.Options(curvature="expected")},
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_another_models_checkpoint_is_refused(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frame, asked = simulated("poisson", "log", q=2), {"family": "poisson"} | OTHERS[case]
    interrupted(frame, tmp_path / "state", 1, monkeypatch)
    with pytest.raises(mp.ConfigError, match="another model") as caught:
        mp.glmm(asked.pop("formula", "p ~ x + (1 + x | g)"), frame, checkpoint=tmp_path / "state", **asked)
    assert caught.value.code == "checkpoint"


@pytest.mark.parametrize("kind", ["polars", "lazy", "arrow", "path", "table"])
@pytest.mark.parametrize("case", ["rows", "values"])
def test_another_sources_checkpoint_is_refused(case: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frame = simulated("poisson", "log", q=2)
    other = frame.head(250) if case == "rows" else frame.with_columns(x=pl.col.x + 1.0)
    interrupted(as_data(frame, kind, tmp_path), tmp_path / "state", 1, monkeypatch)
    with pytest.raises(mp.ConfigError, match="another source|another model"):
        mp.glmm("p ~ x + (1 + x | g)", as_data(other, kind, tmp_path), family="poisson", checkpoint=tmp_path / "state")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "3", "{\"format\": 1}", "\x00\xff", "not json"])
def test_no_checkpoint_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(text.encode("latin-1"))
    with pytest.raises(mp.ConfigError, match="checkpoint"):
        mp.glmm("p ~ x + (1 | g)", simulated("poisson", "log"), family="poisson", checkpoint=tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == text.encode("latin-1")


def test_killed_in_the_middle_of_a_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frame, path = simulated("poisson", "log", q=2), tmp_path / "state"
    interrupted(frame, path, 2, monkeypatch)
    before = path.read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            mp.glmm("p ~ x + (1 + x | g)", frame, family="poisson", checkpoint=path)
    assert path.read_bytes() == before
    assert mp.glmm("p ~ x + (1 + x | g)", frame, family="poisson", checkpoint=path).converged


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(mp.MlpipeError):
        mp.glmm("p ~ x + (1 | g)", simulated("poisson", "log"), family="poisson", checkpoint=tmp_path / "no" / "state")


# ---- nothing is left behind


@pytest.mark.parametrize("kind", ["polars", "reader", "path"])
@pytest.mark.parametrize(("where", "error"), [
    ("nowhere", None), ("the survey", ValueError), ("the fit", ValueError), ("the fit", KeyboardInterrupt),
    ("the result", KeyboardInterrupt),
])  # fmt: skip
def test_no_files_are_left(
    where: str, error: type[BaseException] | None, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    temp = tmp_path / "temp"
    temp.mkdir()
    build = spool.build
    monkeypatch.setattr(gather, "build", lambda *a, budget, **k: build(*a, budget=100, **k))

    def failing(*_: Any, **__: Any) -> None:
        assert temporary(temp)
        raise error or ValueError

    if error is not None:
        places = {"the fit": (glmm._Search, "__init__"), "the survey": (gather, "_survey"), "the result": (mp.GLMMFit, "from_solution")}
        monkeypatch.setattr(*places[where], failing)
    data = as_data(simulated("poisson", "log"), kind, tmp_path)
    if error is None:
        fit = mp.glmm("p ~ x + (1 | g)", data, family="poisson", options=mp.Options(temp_directory=str(temp)))
        assert fit.info["spool"]["mapped"] and len(fit.ranef()) == 25
    else:
        with pytest.raises(error):
            mp.glmm("p ~ x + (1 | g)", data, family="poisson", options=mp.Options(temp_directory=str(temp)))
    assert not temporary(temp)


def test_no_files_are_left_by_an_error_in_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The generator of sorted rows is left in the middle."""
    arrow = simulated("poisson", "log", blocks=100, rows=50).to_arrow()
    monkeypatch.setattr(spool, "CHUNK_ROWS", 64)
    for source in (arrow, pl.DataFrame(arrow)):
        with monkeypatch.context() as patch:
            patch.setattr(gather, "build", lambda *a, budget, **k: spool.build(*a, budget=100, **k))
            patch.setattr(spool._Writer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                mp.glmm("p ~ x + (1 | g)", source, family="poisson", options=mp.Options(temp_directory=str(tmp_path)))
        assert not temporary(tmp_path)


# ---- results


@pytest.fixture(scope="module")
def fitted() -> Any:
    return mp.glmm("p ~ x + (1 + x | g)", simulated("poisson", "log", q=2, blocks=40), family="poisson", offset="o")


def test_tables(fitted: Any) -> None:
    rows = fitted.tidy().to_pylist()
    assert [row["term"] for row in rows if row["effect"] == "fixed"] == ["(Intercept)", "x"]
    assert len([row for row in rows if row["effect"] == "ran_pars"]) == 3
    facts = fitted.glance().to_pylist()[0]
    assert facts["sigma"] is None and facts["n_params"] == 5 and facts["converged"] and not facts["reml"]
    assert facts["aic"] == pytest.approx(-2 * facts["loglik"] + 10)
    assert [row["group"] for row in fitted.varcorr().to_pylist()] == ["g"] * 3
    wanted = {"passes", "per_block", "cells", "blocks", "spool", "notes", "seconds", "separation", "rows_read", "rows_dropped"}
    assert wanted <= set(fitted.info)
    assert fitted.info["passes"] > 1 and fitted.seconds > 0 and "total" in fitted.info["seconds"]


def test_ranef_shapes(fitted: Any) -> None:
    long, wide = pl.from_arrow(fitted.ranef()), pl.from_arrow(fitted.ranef(wide=True))
    assert long.columns == ["group", "g", "term", "estimate", "std_error", "reliability"] and len(long) == 80
    assert wide.columns == ["g", "(Intercept)", "(Intercept)_se", "x", "x_se"]
    assert wide["g"].to_list() == list(range(40))
    np.testing.assert_array_equal(long.filter(pl.col.term == "x").sort("g")["estimate"], wide["x"])
    streamed = pl.from_arrow(fitted.ranef(stream=True).read_all())
    assert streamed.equals(long)
    assert long["std_error"].is_between(0, 5).all() and long["reliability"].is_between(-0.01, 1).all()


@pytest.mark.parametrize("link", ["logit", "probit", "cloglog", "cauchit"])
def test_predictions(link: str) -> None:
    frame = simulated("binomial", link, q=2, blocks=40)
    fit = mp.glmm("p ~ x + (1 + x | g)", frame, family="binomial", link=link, trials="m", offset="o")
    b = pl.from_arrow(fit.ranef(wide=True))
    x, o, at = frame["x"].to_numpy(), frame["o"].to_numpy(), frame["g"].to_numpy()
    fixed = fit.beta[0] + fit.beta[1] * x + o
    eta = fixed + b["(Intercept)"].to_numpy()[at] + b["x"].to_numpy()[at] * x

    def predicted(**asked: Any) -> np.ndarray:
        return fit.predict(frame, **asked).read_all()["predicted"].to_numpy()

    np.testing.assert_allclose(predicted(kind="link"), eta, atol=1e-10)
    np.testing.assert_allclose(predicted(), MEANS[link](eta), atol=1e-10)
    np.testing.assert_allclose(predicted(effects="population"), MEANS[link](fixed), atol=1e-10)
    np.testing.assert_allclose(predicted(effects=[]), MEANS[link](fixed), atol=1e-10)
    np.testing.assert_allclose(predicted(effects=["g"]), MEANS[link](eta), atol=1e-10)
    psi = fit.terms[0].factor @ fit.terms[0].factor.T
    sd = np.sqrt(psi[0, 0] + 2 * psi[0, 1] * x + psi[1, 1] * x**2)
    z = np.linspace(-9, 9, 4001)
    marginal = (MEANS[link](fixed[:, None] + sd[:, None] * z) * st.norm.pdf(z)).sum(axis=1) * (z[1] - z[0])
    np.testing.assert_allclose(predicted(effects="marginal"), marginal, atol=1e-7)
    augmented = pl.from_arrow(fit.augment(frame).read_all())
    assert augmented.columns == [*frame.columns, "fitted", "resid", "fitted_fixed"]
    np.testing.assert_allclose(augmented["resid"], frame["p"].to_numpy() - MEANS[link](eta), atol=1e-10)


def test_levels_and_rows_that_cannot_be_used(fitted: Any) -> None:
    frame = simulated("poisson", "log", q=2, blocks=40).head(6).with_columns(
        g=pl.Series([0, 1, 99, None, 2, 3]), x=pl.Series([0.1, None, 0.3, 0.4, float("nan"), 0.5]), p=pl.lit(None, dtype=pl.Float64)
    )  # fmt: skip
    population = np.exp(fitted.beta[0] + fitted.beta[1] * np.array([0.3, 0.4]) + frame["o"].to_numpy()[2:4])
    got = fitted.predict(frame).read_all()["predicted"].to_pylist()
    assert [v is None for v in got] == [False, True, False, False, True, False]
    np.testing.assert_allclose(got[2:4], population, rtol=1e-10)
    assert fitted.info["scored"]["unseen_levels"] == 2
    nulls = fitted.predict(frame, new_levels="null").read_all()["predicted"].to_pylist()
    assert [v is None for v in nulls] == [False, True, True, True, True, False]
    with pytest.raises(mp.DataError):
        fitted.predict(frame, new_levels="raise").read_all()
    augmented = fitted.augment(frame).read_all()
    assert augmented["resid"].null_count == 6 and augmented["fitted"].null_count == 2


@pytest.mark.parametrize("family", ["binomial", "poisson", *TAU])
def test_write_and_load(family: str, tmp_path: Path) -> None:
    link = "logit" if family in ("binomial", "beta") else "log"
    frame = simulated(family, link)
    fit = mp.glmm("p ~ x + (1 | g)", frame, family=family, link=link, nagq=3, offset="o", **arguments(family))
    fit.write(tmp_path / "fit")
    loaded = mp.load(tmp_path / "fit")
    assert type(loaded) is type(fit) and str(loaded) == str(fit)
    for name in ("beta", "theta"):
        assert (getattr(loaded, name) == getattr(fit, name)).all()
    for name in ("loglik", "tau", "family", "link", "nagq", "curvature", "converged", "singular", "dispersion"):
        assert getattr(loaded, name) == getattr(fit, name)
    assert loaded.tidy().equals(fit.tidy()) and loaded.ranef().equals(fit.ranef())
    for effects in ("conditional", "population", "marginal"):
        ours, theirs = (f.predict(frame, effects=effects).read_all() for f in (loaded, fit))
        assert ours.equals(theirs)
    assert loaded.facts()["aic"] == fit.facts()["aic"]


def test_latent_scale() -> None:
    frame = simulated("binomial", "logit", blocks=40)
    for link, residual in (("logit", math.pi**2 / 3), ("probit", 1.0), ("cloglog", math.pi**2 / 6)):
        fit = mp.glmm("p ~ x + (1 | g)", frame, family="binomial", link=link, trials="m")
        between = float(fit.theta[0]) ** 2
        fixed = float(np.cov(frame["x"].to_numpy(), fweights=frame["m"].to_numpy().astype(int))) * fit.beta[1] ** 2
        assert fit.icc()["g"] == pytest.approx(between / (between + residual))
        found = fit.r2()
        assert found["marginal"] == pytest.approx(fixed / (fixed + between + residual))
        assert found["conditional"] > found["marginal"] and fit.r2(frame) == pytest.approx(found)
    with pytest.raises(mp.ConfigError, match="latent"):
        mp.glmm("p ~ x + (1 | g)", simulated("beta", "logit"), family="beta").icc()


def test_a_one_shot_source_keeps_its_modes() -> None:
    frame = simulated("poisson", "log")
    fit = mp.glmm("p ~ x + (1 | g)", frame.to_arrow().to_reader(), family="poisson")
    assert len(fit.ranef()) == 25
    with pytest.raises(mp.DataError):
        fit.augment()
    assert fit.augment(frame).read_all().num_rows == len(frame)


def test_missing_and_weightless_rows_are_counted() -> None:
    frame = simulated("gamma", "log").with_columns(v=pl.when(pl.int_range(pl.len()) < 7).then(0.0).otherwise(pl.col.v))
    frame = frame.with_columns(x=pl.when(pl.int_range(pl.len()).is_between(10, 14)).then(None).otherwise(pl.col.x))
    frame = frame.with_columns(g=pl.when(pl.int_range(pl.len()) == 20).then(None).otherwise(pl.col.g))
    fit = mp.glmm("p ~ x + (1 | g)", frame, family="gamma", link="log", weights="v")
    kept = frame.filter(pl.col.v > 0).drop_nulls()
    assert fit.nobs == len(kept) == len(frame) - 13 and fit.info["rows_dropped"] == 13
    same(fit, mp.glmm("p ~ x + (1 | g)", kept, family="gamma", link="log", weights="v"))
    with pytest.raises(mp.DataError):
        mp.glmm("p ~ x + (1 | g)", frame, family="gamma", link="log", weights="v", na="raise")
