"""Statistics are a monoid: any split, order, shift, base level or chunk gives the same fit."""
from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import mlpipe as mp
from mlpipe import blocks, collect, planning

FORMULA = "y ~ x + f + x:f + (1 + x | g)"
pytestmark = pytest.mark.filterwarnings("ignore::mlpipe.MlpipeWarning")


def data(seed: int = 1, rows: int = 600, groups: int = 30) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    g = rng.integers(0, groups, rows)
    x = rng.normal(40.0, 3.0, rows)
    b = rng.normal(size=(groups, 2)) * [2.0, 0.5]
    f = rng.choice(["low", "mid", "top"], rows, p=[0.5, 0.3, 0.2])
    y = 100.0 + 0.7 * x + (f == "mid") - 2.0 * (f == "top") + b[g, 0] + b[g, 1] * (x - 40) + rng.normal(size=rows)
    weights = {"w": rng.uniform(0.5, 2.0, rows), "n": rng.integers(1, 4, rows)}
    return pl.DataFrame({"y": y, "y2": y + rng.normal(size=rows), "x": x, "f": f, "g": g, **weights})


def same(a: mp.LMMFit, b: mp.LMMFit, se_share: float = 1e-7) -> None:
    """The promise of exactness: estimates within 1e-7 standard errors, log-likelihoods within 1e-8 + 1e-12 |l|."""
    assert list(a.fixef()) == list(b.fixef())
    ours, theirs = a.tidy().to_pylist(), b.tidy().to_pylist()
    assert [(row["group"], row["term"]) for row in ours] == [(row["group"], row["term"]) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if other["std_error"] is not None:
            size = other["std_error"] * (1.0 if other["effect"] == "fixed" else 10.0)
            assert abs(mine["estimate"] - other["estimate"]) <= se_share * size, (mine, other)
    np.testing.assert_allclose(a.vcov(), b.vcov(), rtol=1e-6, atol=1e-6 * np.diag(b.vcov()).max())
    assert abs(a.loglik - b.loglik) < 1e-8 + 1e-12 * abs(b.loglik)
    assert (a.nobs, a.n_blocks, a.singular) == (b.nobs, b.n_blocks, b.singular)


# ---- splitting and merging

MODELS = ["y ~ x + (1 | g)", FORMULA, "y ~ f + (f || g)", "y ~ 0 + f:x + (0 + x | g)", "log(y) ~ x + I(x^2) + (x || g)"]
WEIGHTS: list[dict[str, Any]] = [{}, {"weights": "w"}, {"freq": "n"}, {"weights": "w", "freq": "n"}]
models = st.fixed_dictionaries({"formula": st.sampled_from(MODELS), "weighting": st.sampled_from(WEIGHTS), "reml": st.booleans()})


@settings(max_examples=12, deadline=None)
@given(model=models, seed=st.integers(0, 3), parts=st.integers(2, 5), by_block=st.booleans(), order=st.randoms(use_true_random=False))
def test_parts_in_any_order_are_the_whole(model: dict[str, Any], seed: int, parts: int, by_block: bool, order: Any) -> None:
    """Rows go to parts as they like, blocks split or whole, so that levels and blocks occur in some parts only."""
    formula, weighting, frame = model["formula"], model["weighting"], data(seed, 300, 12)
    rng = np.random.default_rng(seed + parts)
    part = rng.integers(0, parts, 12)[frame["g"].to_numpy()] if by_block else rng.integers(0, parts, frame.height)
    frame = frame.with_columns(part=part).with_columns(f=pl.when(pl.col("part") == 0).then(pl.lit("mid")).otherwise(pl.col("f")))
    pieces = [piece.drop("part") for piece in frame.partition_by("part")]
    order.shuffle(pieces)
    pieces.sort(key=lambda piece: piece["f"].n_unique() == 1)  # the first must have two levels, the others need not
    merged = mp.suffstats(formula, pieces[0], **weighting)
    for piece in pieces[1:]:
        if piece["f"].n_unique() > 1 and order.random() < 0.5:
            other = mp.suffstats(formula, piece, **weighting)
            merged = merged + other if order.random() < 0.5 else other + merged
        else:
            merged = merged.update(piece)
    same(mp.lmm(formula, merged, reml=model["reml"]), mp.lmm(formula, frame, reml=model["reml"], **weighting))


def test_new_levels_and_blocks_join_by_update(tmp_path: Path) -> None:
    frame = data()
    early = frame.filter((pl.col("f") != "low") & (pl.col("g") < 20))
    late = frame.filter((pl.col("f") == "low") | (pl.col("g") >= 20))
    stats = mp.suffstats(FORMULA, early)
    stats.save(tmp_path / "s.arrow")
    updated = mp.SuffStats.load(tmp_path / "s.arrow").update(late)
    whole = mp.lmm(FORMULA, frame)
    same(mp.lmm(FORMULA, updated), whole)
    same(mp.lmm(FORMULA, mp.suffstats(FORMULA, late) + stats), whole)
    same(mp.lmm(FORMULA, stats + mp.suffstats(FORMULA, late)), whole)
    assert updated.rows == 600 and updated.blocks is not None and updated.blocks.n_blocks == 30
    assert updated.info == {"rows_read": 600, "rows_dropped": 0}  # not what the fits of it took and noted


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: f.lazy(), lambda f: f.to_arrow().to_reader()], ids=["frame", "lazy", "stream"])
def test_updating_with_nothing_changes_nothing(wrap: Callable[[pl.DataFrame], Any]) -> None:
    stats = mp.suffstats(FORMULA, data())
    again = stats.update(wrap(data().head(0))).update(wrap(data().head(0)))
    assert again.info == {**stats.info, "empty_updates": 2} and "empty_updates" not in stats.info
    assert mp.lmm(FORMULA, again).tidy().equals(mp.lmm(FORMULA, stats).tidy())
    unusable = data().head(3).with_columns(x=pl.lit(None, pl.Float64))
    with pytest.raises(mp.DataError, match="none of the 3 rows can be used"):
        stats.update(wrap(unusable))


def test_statistics_with_a_square_merge_save_and_serve_sub_models(tmp_path: Path) -> None:
    """x² is summed as the square of the shifted x."""
    frame, formula = data(), "y ~ x + I(x^2) + (x | g)"
    assert not [atom for f in mp.suffstats(formula, frame).recipe.features for atom in f if atom.variable == "I(x^2)"]
    merged = mp.suffstats(formula, frame.head(200)) + mp.suffstats(formula, frame.tail(400))
    merged.save(tmp_path / "stats")
    loaded = mp.SuffStats.load(tmp_path / "stats")
    for sub in (formula, "y ~ I(x^2) + (1 | g)", "y ~ x + (1 | g)"):
        same(mp.lmm(sub, loaded), mp.lmm(sub, frame))


@pytest.mark.parametrize("given_by", ["levels", "enum"])
def test_a_declared_order_of_levels_outlives_merging(given_by: str, tmp_path: Path) -> None:
    order = ["top", "low", "mid"]
    frame = data().with_columns(f=pl.col("f").cast(pl.Enum(order))) if given_by == "enum" else data()
    levels = {"f": order} if given_by == "levels" else None
    whole = mp.lmm(FORMULA, frame, levels=levels, contrasts={"f": "poly"})
    pieces = [frame.filter(pl.col("f") != level) for level in ("low", "top")]
    early, late = (mp.suffstats(FORMULA, piece, levels=levels, contrasts={"f": "poly"}) for piece in pieces)
    early.save(tmp_path / "s.arrow")
    both = mp.lmm(FORMULA, mp.SuffStats.load(tmp_path / "s.arrow") + late)
    assert list(both.fixef()) == list(whole.fixef())
    doubled = mp.lmm(FORMULA, pl.concat(pieces), levels=levels, contrasts={"f": "poly"})
    same(both, doubled)
    same(mp.lmm(FORMULA, early.update(pieces[1])), doubled)


def test_a_basis_is_kept_by_update_and_refused_by_merging() -> None:
    """The polynomials of other rows span the same space: the likelihood agrees, the coefficients need not."""
    frame, formula = data(), "y ~ poly(x, 2) + (1 | g)"
    early, late = frame[:200], frame[200:]
    updated = mp.lmm(formula, mp.suffstats(formula, early).update(late), reml=False)
    assert updated.loglik == pytest.approx(mp.lmm(formula, frame, reml=False).loglik, abs=1e-8)
    with pytest.raises(mp.DataError, match="basis poly\\(x, 2\\) differs") as caught:
        mp.suffstats(formula, early) + mp.suffstats(formula, late)
    assert caught.value.code == "not_mergeable" and "update" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("formula", "changed"),
    [
        ("y ~ x + (1 | g)", {"formula": "y ~ x + f + (1 | g)"}),
        ("y ~ x + (1 | g)", {"weights": "w"}),
        ("y ~ x + (1 | g)", {"responses": ["y2"]}),
    ],
)
def test_statistics_of_something_else_do_not_merge(formula: str, changed: dict[str, Any]) -> None:
    with pytest.raises(mp.DataError) as caught:
        mp.suffstats(formula, data()) + mp.suffstats(**{"formula": formula, "data": data(), **changed})
    assert caught.value.code == "not_mergeable"


def test_keys_of_different_types_do_not_merge() -> None:
    frame, formula = data(), "y ~ x + (1 | g)"
    text = frame.with_columns(pl.col("g").cast(pl.String))
    with pytest.raises(mp.DataError, match="different") as caught:
        mp.suffstats(formula, frame) + mp.suffstats(formula, text)
    assert caught.value.code == "not_mergeable"


@pytest.mark.parametrize("name", ["x", "g"])
def test_dates_do_not_merge_with_timestamps(name: str) -> None:
    """The one are numbers of days, the other of seconds."""
    formula, date = "y ~ x + (1 | g)", pl.date(2026, 1, 1) + pl.duration(days=pl.col(name).cast(pl.Int64))
    days, seconds = (data().with_columns(date.cast(kind).alias(name)) for kind in (pl.Date, pl.Datetime))
    with pytest.raises(mp.DataError, match="different") as caught:
        mp.suffstats(formula, days) + mp.suffstats(formula, seconds)
    assert caught.value.code == "not_mergeable"


@pytest.mark.parametrize(
    "change", [pl.col("g").cast(pl.String), pl.col("x") > 40, pl.lit(1.0).alias("f"), pl.lit(0).cast(pl.Date).alias("x")]
)
def test_rows_of_other_types_are_no_update(change: pl.Expr) -> None:
    stats = mp.suffstats("y ~ x + f + (1 | g)", data())
    with pytest.raises(mp.DataError, match="is of kind") as caught:
        stats.update(data().with_columns(change))
    assert caught.value.code == "column_type"


def test_keys_of_different_widths_merge() -> None:
    frame, formula = data(), "y ~ x + (1 | g)"
    narrow = frame[:300].with_columns(pl.col("g").cast(pl.Int16))
    same(mp.lmm(formula, mp.suffstats(formula, narrow) + mp.suffstats(formula, frame[300:])), mp.lmm(formula, frame))


KEYS: dict[str, Callable[[pl.Expr], pl.Expr]] = {
    "text": lambda g: g,
    "categorical": lambda g: g.cast(pl.Categorical),
    "enum": lambda g: g.cast(pl.Enum([f"k{i}" for i in range(30)])),
    "enum in another order": lambda g: g.cast(pl.Enum([f"k{i}" for i in range(30)][::-1])),
}


@pytest.mark.parametrize(("one", "other"), [("categorical", "categorical"), ("categorical", "text"), ("enum", "enum in another order")])
def test_keys_in_dictionaries_of_their_own_merge(one: str, other: str, tmp_path: Path) -> None:
    frame, formula = data().with_columns(g=pl.format("k{}", "g")), "y ~ x + (1 | g)"
    early, late = frame[:300].with_columns(KEYS[one](pl.col("g"))), frame[300:].with_columns(KEYS[other](pl.col("g")))
    want = mp.lmm(formula, frame)
    for a, b in ((early, late), (late, early)):
        merged = mp.suffstats(formula, a) + mp.suffstats(formula, b)
        merged.save(tmp_path / "s.arrow")
        for stats in (merged, mp.SuffStats.load(tmp_path / "s.arrow"), mp.suffstats(formula, a).update(b)):
            fit = mp.lmm(formula, stats)
            same(fit, want)
            found = dict(zip(fit.ranef()["g"].to_pylist(), fit.ranef()["estimate"].to_pylist(), strict=True))
            assert found == pytest.approx(dict(zip(want.ranef()["g"].to_pylist(), want.ranef()["estimate"].to_pylist(), strict=True)))


def test_keys_that_differ_in_the_sign_of_zero_merge() -> None:
    frame, formula = data().with_columns(g=pl.col("g").cast(pl.Float64)), "y ~ x + (1 | g)"
    minus = frame[300:].with_columns(g=pl.when(pl.col("g") == 0.0).then(-0.0).otherwise("g"))
    same(mp.lmm(formula, mp.suffstats(formula, frame[:300]) + mp.suffstats(formula, minus)), mp.lmm(formula, frame))


def test_where_the_columns_stand_does_not_matter_to_merging(tmp_path: Path) -> None:
    """Keys are matched by their place in the formula: with two of one type a mix-up would give numbers."""
    frame = data().with_columns(h=pl.col("g") % 5)
    formula = "y ~ x + (1 | g:h)"
    early, late = frame[:300], frame[300:].select("h", "g", "x", "f", "y")
    early.write_parquet(tmp_path / "early.parquet")
    stats = mp.suffstats(formula, tmp_path / "early.parquet")
    for merged in (stats + mp.suffstats(formula, late), mp.suffstats(formula, late) + stats, stats.update(late)):
        fit = mp.lmm(formula, merged)
        same(fit, mp.lmm(formula, frame))
        assert fit.ranef().select(["g", "h"]).to_pylist() == mp.lmm(formula, frame).ranef().select(["g", "h"]).to_pylist()


def test_statistics_that_an_earlier_version_saved(tmp_path: Path) -> None:
    """Keys were named by their place in the source."""
    formula, path = "y ~ x + (1 | g)", tmp_path / "s"
    mp.suffstats(formula, data()[:300]).save(path)
    table = pa.ipc.open_file(path).read_all()
    head = json.loads(table.schema.metadata[b"mlpipe"])
    del head["rest"]
    table = table.rename_columns(["k5" if name == "k0" else name for name in table.column_names])
    with pa.ipc.new_file(path, table.schema.with_metadata({"mlpipe": json.dumps(head)})) as writer:
        writer.write_table(table.replace_schema_metadata({"mlpipe": json.dumps(head)}))
    same(mp.lmm(formula, mp.SuffStats.load(path).update(data()[300:])), mp.lmm(formula, data()))


def test_duckdb_and_polars_statistics_merge(tmp_path: Path) -> None:
    frame = data()
    frame[300:].write_parquet(tmp_path / "late.parquet")
    merged = mp.suffstats(FORMULA, frame[:300]) + mp.suffstats(FORMULA, tmp_path / "late.parquet")
    same(mp.lmm(FORMULA, merged), mp.lmm(FORMULA, frame))


@pytest.mark.parametrize(
    "formula",
    [
        "y ~ x + f + (1 + x | g)",
        "y ~ x + (1 | g)",
        "y ~ 1 + (1 | g)",
        "y ~ 0 + f + x:f + (0 + x | g)",
        "y ~ x * f + (x || g)",
        "y2 ~ x + f + (1 + x | g)",
    ],
)
@pytest.mark.parametrize("reml", [True, False])
def test_a_sub_model_needs_no_rows(formula: str, reml: bool) -> None:
    frame = data(2)
    stats = mp.suffstats(FORMULA, frame, responses=["y2"])
    same(mp.lmm(formula, stats, reml=reml), mp.lmm(formula, frame, reml=reml))


@pytest.mark.parametrize("kind", ["treatment", "sum", "helmert", "poly"])
def test_other_codings_of_the_same_statistics(kind: str) -> None:
    frame, levels = data(2), {"f": ["top", "low", "mid"]}
    stats = mp.suffstats(FORMULA, frame)
    same(mp.lmm(FORMULA, stats, contrasts={"f": kind}, levels=levels), mp.lmm(FORMULA, frame, contrasts={"f": kind}, levels=levels))
    formula = 'y ~ x + C(f, ref = "mid") + (1 | g)'
    same(mp.lmm(formula, stats), mp.lmm(formula, frame))


def test_what_was_not_collected_is_named() -> None:
    stats = mp.suffstats("y ~ x + (1 | g)", data())
    with pytest.raises(mp.DataError, match="no response y2") as caught:
        mp.lmm("y2 ~ x + (1 | g)", stats)
    assert caught.value.code == "not_collected"
    with pytest.raises(mp.MlpipeError):
        mp.lmm("y ~ x + (1 + x | g)", stats)
    with pytest.raises(mp.MlpipeError):
        mp.lmm("y ~ x + f + (1 | g)", stats)
    least = mp.suffstats("y ~ x + (1 | g)", data(), collect="fit")
    with pytest.raises(mp.DataError, match="does not merge"):
        least + least


@pytest.mark.parametrize(
    ("formula", "offset", "asked", "allowed"),
    [
        ("y ~ x + offset(w) + (1 | g)", None, "y ~ offset(w) + (1 | g)", True),
        ("y ~ x + (1 | g)", "w", "y ~ 1 + (1 | g)", True),
        ("y ~ x + (1 | g)", "w", "y ~ offset(w) + (1 | g)", True),
        ("y ~ x + (1 | g)", None, "y ~ offset(w) + (1 | g)", False),
        ("y ~ x + offset(w) + (1 | g)", None, "y ~ 1 + (1 | g)", False),
        ("y ~ x + offset(w) + (1 | g)", None, "y ~ offset(n) + (1 | g)", False),
    ],
)
def test_offsets_of_statistics_are_those_of_every_model(formula: str, offset: str | None, asked: str, allowed: bool) -> None:
    """The response was summed less them: a formula with others would be fitted as if it had these."""
    frame = data()
    stats = mp.suffstats(formula, frame, offset=offset)
    if allowed:
        same(mp.lmm(asked, stats), mp.lmm("y ~ 1 + (1 | g)", frame, offset="w"))
        return
    for fit in (lambda: mp.lmm(asked, stats), lambda: mp.ols(asked.replace(" + (1 | g)", ""), stats)):
        with pytest.raises(mp.DataError, match="offset") as caught:
            fit()
        assert caught.value.code == "not_collected"


def test_codings_of_a_column_are_not_those_of_what_is_made_of_it() -> None:
    frame, order = data(), ["top", "mid", "low"]
    for formula in ('y ~ I(f == "mid") + f:x + (1 | g)', 'y ~ I(x * (f == "mid")) + f + (1 | g)'):
        want = mp.lmm(formula, frame.with_columns(pl.col("f").cast(pl.Enum(order))), contrasts={"f": "sum"})
        same(mp.lmm(formula, frame, levels={"f": order}, contrasts={"f": "sum"}), want)
        stats = mp.suffstats(formula, frame, contrasts={"f": "sum"})
        fit = mp.lmm(formula, stats, levels={"f": order})
        same(fit, want)
        for a, b in zip(fit.drop1().to_pylist(), mp.lmm(formula, frame).drop1().to_pylist(), strict=True):
            assert a["loglik"] == pytest.approx(b["loglik"], abs=1e-7) and a["df"] == b["df"]
    same(mp.lmm('y ~ I(x * (f == "mid")) + (1 | g)', stats), mp.lmm('y ~ I(x * (f == "mid")) + (1 | g)', frame))


@pytest.mark.parametrize("levels", [{"nope": ["a"]}, {"f": ["low", "mid", "low", "top"]}, {"f": "low"}])
def test_orders_of_levels_are_checked_alike(levels: dict[str, Any]) -> None:
    frame = data()
    for source in (frame, mp.suffstats(FORMULA, frame)):
        with pytest.raises(mp.ConfigError, match="levels"):
            mp.lmm(FORMULA, source, levels=levels)


TWICE = ['y ~ C(f, ref = "mid") + (0 + f | g)', "y ~ C(f, sum) + f:x + (f || g)", "y ~ x * f + (C(f, sum) | g)"]


@pytest.mark.parametrize("formula", TWICE)
def test_a_factor_under_two_codings(formula: str) -> None:
    """One coding in the fixed part, another in the random one: the likelihood is that of one coding for all."""
    frame = data(2, 900, 12)
    alike = formula.replace('C(f, ref = "mid")', "f").replace("C(f, sum)", "f")
    fit, want = mp.lmm(formula, frame, reml=False), mp.lmm(alike, frame, reml=False)
    assert fit.loglik == pytest.approx(want.loglik, abs=1e-6)
    same(mp.lmm(formula, mp.suffstats(formula, frame), reml=False), fit)


def test_random_effects_come_from_kept_blocks() -> None:
    frame = data()
    stats = mp.suffstats(FORMULA, frame)
    a, b = mp.lmm(FORMULA, stats).ranef(), mp.lmm(FORMULA, frame).ranef()
    assert a.column("g").to_pylist() == b.column("g").to_pylist()
    for name in ("estimate", "std_error", "reliability"):
        assert np.allclose(a.column(name).to_pylist(), b.column(name).to_pylist(), rtol=1e-6, atol=1e-7)


# ---- what must not matter


def test_shuffled_rows_and_relabelled_blocks() -> None:
    frame = data()
    fit = mp.lmm(FORMULA, frame)
    same(mp.lmm(FORMULA, frame.sample(fraction=1.0, shuffle=True, seed=3)), fit)
    same(mp.lmm(FORMULA, frame.with_columns(g=(pl.col("g") * 7919 % 1009).cast(pl.String) + "'\"; drop table x")), fit)
    dates = frame.with_columns(g=pl.date(2024, 1, 1) + pl.duration(days=30 - pl.col("g")))
    same(mp.lmm(FORMULA, dates), fit)


CHANGES = st.fixed_dictionaries(
    {
        "x": st.tuples(st.sampled_from([0.0, 1e7, -3e9, 0.123]), st.sampled_from([1.0, 1e-9, 1e6, -2.5])),
        "y": st.tuples(st.sampled_from([0.0, -5e3, 1e8]), st.sampled_from([1.0, 1e-6, 4e5])),
    }
)


@settings(max_examples=12, deadline=None)
@given(change=CHANGES, reml=st.booleans())
def test_shifted_and_scaled_columns_transform_exactly(change: dict[str, tuple[float, float]], reml: bool) -> None:
    """x -> c + d x and y -> a + b y. The rounding of the shifted data themselves (eps c / d) is all that may be lost."""
    (c, d), (a, b) = change["x"], change["y"]
    assume(abs(c / d) < 1e13)  # beyond it the shifted column has no digit of x left
    frame, formula = data(), "y ~ x + f + (1 + x | g)"
    fit = mp.lmm(formula, frame, reml=reml)
    other = mp.lmm(formula, frame.with_columns(x=c + d * pl.col("x"), y=a + b * pl.col("y")), reml=reml)
    lost = 1e-15 * (abs(c / d) + abs(a / b))
    want = dict(fit.fixef())
    want["(Intercept)"] -= want["x"] * c / d
    want = {name: b * value / (d if name == "x" else 1.0) for name, value in want.items()}
    want["(Intercept)"] += a
    se = np.sqrt(np.diag(other.vcov()))
    off = np.abs(np.array(list(want.values())) - other.beta) / se
    assert off.max() < 1e-7 + 1e2 * lost
    assert other.sigma == pytest.approx(b * fit.sigma, rel=1e-8 + 10 * lost)
    slope = [row["sd"] for row in (*fit.varcorr().to_pylist(), *other.varcorr().to_pylist()) if row["term1"] == "x" and not row["term2"]]
    assert slope[1] == pytest.approx(slope[0] * abs(b / d), rel=1e-6 + 10 * lost)
    shift = (fit.nobs - 4 * reml) * math.log(b) + reml * math.log(abs(d))
    assert other.loglik == pytest.approx(fit.loglik - shift, abs=1e-7 + 1e4 * lost)


def test_a_sample_that_misleads_is_repeated_with_the_true_shift() -> None:
    """The sample of a LazyFrame is its head; the other rows lie far away."""
    rng = np.random.default_rng(2)
    rows, head = 60_000, 20_000
    x = np.concatenate([rng.normal(0.0, 1e-6, head), rng.normal(3e6, 2.0, rows - head)])
    g = rng.integers(0, 50, rows)
    frame = pl.DataFrame({"x": x, "g": g, "y": 1e-6 * x + rng.normal(size=50)[g] + rng.normal(size=rows)})
    fit = mp.lmm("y ~ x + (1 | g)", frame.lazy())
    assert any("not representative" in note for note in fit.info["notes"])
    assert fit.info["passes"] == 3
    fair = mp.lmm("y ~ x + (1 | g)", frame)
    assert fair.info["passes"] == 2
    same(fit, fair)


# ---- where the blocks are held

BALANCED = "y ~ x + f + (1 + x | g)"


def balanced() -> pl.DataFrame:
    return data(rows=600).with_columns(x=pl.int_range(600) % 20, g=pl.int_range(600) // 20)


def with_budget(budget: int) -> Callable[..., blocks.Collector]:
    return lambda *args, **kwargs: blocks.Collector(*args, **(kwargs | {"budget": budget}))


def test_compressed_blocks_are_the_same_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    compressed = mp.suffstats(BALANCED, balanced(), collect="fit")
    assert compressed.blocks is not None and compressed.blocks.clusters is not None and compressed.blocks.table is None
    assert len(compressed.blocks.clusters.count) == 1
    monkeypatch.setattr(blocks.Collector, "_compressed", lambda self, sums: False)
    plain = mp.suffstats(BALANCED, balanced(), collect="fit")
    assert plain.blocks is not None and plain.blocks.clusters is None and plain.blocks.table is not None
    same(mp.lmm(BALANCED, compressed), mp.lmm(BALANCED, plain))
    same(mp.lmm(BALANCED, compressed), mp.lmm(BALANCED, mp.suffstats(BALANCED, balanced())))


def test_some_blocks_repeat_and_some_do_not() -> None:
    """The collector compresses batch by batch: one that does not repeat is held beside the clusters."""
    frame = balanced()
    mixed = pl.concat([frame, data(5, 200, 10).with_columns(x=pl.col("x") - 40, g=pl.col("g") + 100)], how="vertical_relaxed")
    stats = mp.suffstats(BALANCED, frame)
    assert stats.blocks is not None and stats.blocks.table is not None
    table = stats.blocks.table
    names = stats.blocks.names
    shared = [k for k, (_, j) in enumerate(stats.recipe.pairs()) if j in stats.recipe.z]
    other = mp.suffstats(BALANCED, frame).update(mixed.filter(pl.col("g") >= 100)).blocks
    assert other is not None and other.table is not None
    collector = blocks.Collector(names, shared, keep_keys=False, budget=1 << 30, parent=None)
    for batch in [*table.to_batches(), *other.table.slice(30).select(table.column_names).to_batches(), *table.to_batches()]:
        collector.add(batch)
    held = collector.finish()
    assert held.clusters is not None and held.table is not None and held.n_blocks == 70
    whole = sum(np.stack([t.column(name).to_numpy() for name in names]).sum(axis=1) for t in (table, table, other.table.slice(30)))
    np.testing.assert_allclose(held.totals(), whole, rtol=1e-12)


@pytest.mark.parametrize("formula", [FORMULA, "y ~ f + (f | g)"])
def test_a_mapped_file_is_the_same_fit_and_goes_with_its_statistics(
    formula: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    frame, options = data(), mp.Options(temp_directory=str(tmp_path), memory_limit="1GB")
    source = frame.to_arrow()
    held = mp.lmm(formula, source, options=options, weights="w")
    monkeypatch.setattr(collect, "Collector", with_budget(100))
    stats = mp.suffstats(formula, source, options=options, weights="w")
    assert stats.blocks is not None and stats.blocks.directory is not None
    assert stats.blocks.nbytes == 0 and Path(stats.blocks.directory.name).parent == tmp_path
    mapped = mp.lmm(formula, stats, options=options)
    same(mapped, held)
    for name in ("estimate", "std_error"):
        np.testing.assert_allclose(mapped.ranef()[name], held.ranef()[name], rtol=1e-5, atol=1e-6)
    twice = stats + stats
    assert twice.rows == 2 * stats.rows
    del mapped, stats  # the fit keeps what it was fitted from
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_blas_on_streamed_rows_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = data()
    in_sql = mp.lmm(FORMULA, frame, weights="w", freq="n")
    monkeypatch.setattr(planning, "WIDE", 2)
    same(mp.lmm(FORMULA, frame, weights="w", freq="n"), in_sql)


def test_one_thread_twice_is_bit_identical_and_four_threads_agree(tmp_path: Path) -> None:
    path = tmp_path / "big.parquet"
    data(rows=200_000, groups=2_000).write_parquet(path, row_group_size=20_000)
    one = [mp.lmm(FORMULA, path, options=mp.Options(threads=1)) for _ in range(2)]
    assert one[0].tidy().equals(one[1].tidy()) and one[0].ranef().equals(one[1].ranef())
    same(mp.lmm(FORMULA, path, options=mp.Options(threads=4)), one[0])
    same(mp.lmm(FORMULA, pl.scan_parquet(path)), one[0])


def test_frequencies_are_repeated_rows() -> None:
    frame = data()
    repeated = frame.select(pl.exclude("n").repeat_by("n").explode())
    same(mp.lmm(FORMULA, frame, freq="n"), mp.lmm(FORMULA, repeated))


def test_a_file_that_is_no_statistics(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    with pytest.raises(mp.DataError, match="does not hold statistics"):
        mp.SuffStats.load(tmp_path / "x")
    with pytest.raises(mp.DataError, match="no file"):
        mp.SuffStats.load(tmp_path / "y")


def test_sources_whose_columns_stand_in_another_order() -> None:
    rng = np.random.default_rng(5)
    frame = pl.DataFrame({"y": rng.normal(size=60), "x": rng.normal(size=60), "g": rng.integers(0, 6, 60), "h": rng.integers(0, 2, 60)})
    formula = "y ~ x + (1 | g:h)"
    both = mp.suffstats(formula, frame[:30]) + mp.suffstats(formula, frame[30:].select("h", "x", "g", "y"))
    assert mp.lmm(formula, both).loglik == pytest.approx(mp.lmm(formula, frame).loglik, abs=1e-9)
    assert both.blocks is not None and both.blocks.n_blocks == frame.select("g", "h").n_unique()
