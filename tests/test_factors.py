"""Statistics of several grouping factors that outlive their rows: cells, spilled or not; merged, updated, saved, sub-models."""
from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

import mlpipe as mp
from mlpipe import crossing
from mlpipe.levels import Levels, union
from mlpipe.pairs import PairAdder, Pairs

from .test_several import FRAME, SIMPLE, fit, same

pytestmark = pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
THREE = "y ~ x + (x | a/c) + (1 | b)"

# ---- cells


def brute(left: np.ndarray, right: np.ndarray, values: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    out: dict[tuple[int, int], np.ndarray] = defaultdict(lambda: np.zeros(len(values)))
    for a, b, value in zip(left, right, values.T, strict=True):
        out[int(a), int(b)] = out[int(a), int(b)] + value
    return dict(sorted(out.items()))


def check_cells(cells: Pairs, want: dict[tuple[int, int], np.ndarray]) -> None:
    assert list(zip(cells.rows.tolist(), cells.columns.tolist(), strict=True)) == list(want)
    np.testing.assert_allclose(cells.products, np.array(list(want.values())).T, rtol=1e-12)
    pieces = [(a, b) for rows, columns, _ in cells.pieces() for a, b in zip(rows.tolist(), columns.tolist(), strict=True)]
    assert pieces == list(want)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("budget", [0, 200_000, 10**9])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("shape", "n"), [((70, 40), 30_000), ((3, 2), 20_000), ((5_000, 2_000), 30_000), ((1, 1), 7)])
def test_cells_are_the_sums_of_their_pairs(shape: tuple[int, int], n: int, weighted: bool, budget: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(n)
    left, right = rng.integers(0, shape[0], n), rng.integers(0, shape[1], n)
    values = rng.normal(size=(3, n)) if weighted else np.ones((1, n))
    adder = PairAdder(shape, len(values), n, weighted=weighted, whole=not weighted, budget=budget, parent=str(tmp_path))
    for part in np.array_split(np.arange(n), 7):
        adder.add(left[part], right[part], values[:, part] if weighted else None)
    cells, want = adder.finish(), brute(left, right, values)
    check_cells(cells, want)
    spilled = len(want) * 8 * (1 + len(values)) > budget
    assert (cells.directory is not None) == bool(list(tmp_path.iterdir())) and (spilled or cells.directory is None)
    assert spilled or cells.nbytes < 8 * shape[0] + len(want) * (12 + 8 * len(values)) + 100
    assert weighted or cells.products.dtype.kind in "iu"
    turned = {(b, a): value for (a, b), value in want.items()}
    check_cells(cells.turned(), dict(sorted(turned.items())))
    del cells, adder
    assert not list(tmp_path.iterdir())


def test_levels_without_cells_are_left_out() -> None:
    adder = PairAdder((6, 5), 1, 4, weighted=False, whole=True, budget=10**6, parent=None)
    adder.add(np.array([5, 2, 2, 0]), np.array([4, 0, 4, 2]))
    check_cells(adder.finish().only(np.array([0, 2, 5]), np.array([0, 2, 4])), {(0, 1): [1], (1, 0): [1], (1, 2): [1], (2, 2): [1]})  # type: ignore[dict-item]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("formula", [SIMPLE, THREE, "y ~ x + (1 + z || b) + (x | a)"])
def test_spilled_cells_give_the_same_fit(formula: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpipe.pairs.LEAST_ROOM", 16)
    monkeypatch.setattr(crossing, "PairAdder", lambda *given, **more: PairAdder(*given, **{**more, "budget": 500}))
    options = mp.Options(temp_directory=str(tmp_path))
    for frame in (FRAME, FRAME.to_arrow()):
        held = mp.suffstats(formula, frame, options=options)
        assert held.crossed is not None and any(cells.directory is not None for cells in held.crossed.cells.values())
        same(mp.lmm(formula, held), fit(formula))
    del held
    assert not list(tmp_path.iterdir())


# ---- levels


KEYS: dict[str, tuple[list[Any], list[Any], pa.DataType]] = {
    "numbers": ([3, 1, 9], [1, 7, -4], pa.int32()),
    "wide": ([2**63, 1, 2**64 - 1], [2**63, 5], pa.uint64()),
    "text": (["b", "", "日本"], ["a", "日本", "it's"], pa.string()),
    "reals": ([0.0, 2.5], [-0.0, 7.25], pa.float64()),
    "truth": ([False], [True, False], pa.bool_()),
    "days": ([1, 3], [3, 2], pa.date32()),
    "dictionary": (["y", "x"], ["z", "y"], pa.dictionary(pa.int8(), pa.string())),
}


@pytest.mark.parametrize("kind", KEYS)
def test_levels_are_united_by_key(kind: str) -> None:
    first, second, type_ = KEYS[kind]
    typed = [pa.array(values, type_) for values in (first, second)]
    a, b = (Levels("k", ("k",), pa.table({"k": values})) for values in typed)
    both, of_a, of_b = union(a, b)
    names = both.keys.column("k").to_pylist()
    plain = [values.to_pylist() for values in typed]
    assert names == sorted({*plain[0], *plain[1]})
    assert [names[i] for i in of_a] == plain[0] and [names[i] for i in of_b] == plain[1]


def test_levels_of_several_columns_are_united() -> None:
    a = Levels("s:row", ("s", "row"), pa.table({"s": ["p", "q"], "row": [2, 1]}))
    b = Levels("s:row", ("s", "row"), pa.table({"s": pa.array(["q", "q"], pa.large_string()), "row": pa.array([1, 2], pa.int8())}))
    both, of_a, of_b = union(a, b)
    assert both.keys.to_pylist() == [{"s": "p", "row": 2}, {"s": "q", "row": 1}, {"s": "q", "row": 2}]
    assert of_a.tolist() == [0, 1] and of_b.tolist() == [1, 2]


def test_keys_of_types_that_cannot_be_compared() -> None:
    a, b = (Levels("k", ("k",), pa.table({"k": values})) for values in ([1, 2], ["1", "2"]))
    with pytest.raises(mp.DataError, match="keys of k") as raised:
        union(a, b)
    assert raised.value.code == "not_mergeable"


# ---- merged, updated, saved


def split(seed: int, parts: int) -> list[pl.DataFrame]:
    owner = np.random.default_rng(seed).integers(0, parts, len(FRAME))
    return [FRAME.filter(pl.Series(owner == k)) for k in range(parts)]


def equal(one: mp.SuffStats, other: mp.SuffStats) -> None:
    """The same levels, rows and cells."""
    assert one.crossed is not None and other.crossed is not None
    assert one.rows == other.rows
    for f, g in zip(one.crossed.factors, other.crossed.factors, strict=True):
        assert f.levels.keys.to_pylist() == g.levels.keys.to_pylist()
        np.testing.assert_array_equal(f.rows, g.rows)
    for k, h in one.crossed.cells:
        left, right = one.crossed.between(k, h), other.crossed.between(k, h)
        np.testing.assert_array_equal(left.columns, right.columns)
        np.testing.assert_array_equal(left.starts, right.starts)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("formula", "more"), [(SIMPLE, {}), (THREE, {"weights": "w"}), ("y ~ f + (1 | a) + (0 + f | b)", {"freq": "n"})])
def test_any_split_merges_to_the_same_fit(formula: str, more: dict[str, str]) -> None:
    whole = mp.suffstats(formula, FRAME, **more)
    for seed, parts in ((1, 2), (2, 3)):
        pieces = [mp.suffstats(formula, frame, **more) for frame in split(seed, parts)]
        merged = pieces[0]
        for piece in pieces[1:]:
            merged = merged + piece
        equal(merged, whole)
        same(mp.lmm(formula, merged), mp.lmm(formula, whole))
    backwards = pieces[-1] + pieces[-2]
    equal(backwards, pieces[-2] + pieces[-1])


def test_parts_without_common_levels() -> None:
    """One part has one level of a factor, as a day's rows may; each alone is no model, both are."""
    parts = [FRAME.filter(pl.col("b") == "B"), FRAME.filter(pl.col("b") != "B")]
    one, other = (mp.suffstats(SIMPLE, part) for part in parts)
    with pytest.raises(mp.DataError, match="b has fewer than two levels"):
        mp.lmm(SIMPLE, one)
    same(mp.lmm(SIMPLE, one + other), fit())


def test_update_keeps_shape_and_bases() -> None:
    formula = "y ~ scale(x) + (1 | a) + (1 | b)"
    first, second, third = split(5, 3)
    held = mp.suffstats(formula, first)
    grown = held.update(second).update(third.to_arrow())
    again = mp.lmm(formula, grown, reml=False)
    assert again.loglik == pytest.approx(fit(reml=False).loglik, abs=1e-8)
    assert grown.rows == len(FRAME) and held.rows == len(first)
    shifted = mp.suffstats(SIMPLE, first).update(pl.concat([second, third]))
    same(mp.lmm(SIMPLE, shifted), fit())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("formula", [SIMPLE, THREE])
def test_saved_and_loaded(formula: str, tmp_path: Path) -> None:
    first, second = split(7, 2)
    held = mp.suffstats(formula, first)
    held.save(tmp_path / "stats.arrow")
    again = mp.SuffStats.load(tmp_path / "stats.arrow")
    equal(again, held)
    assert repr(again) == repr(held)
    assert "10 levels" in repr(again + mp.suffstats(formula, second))
    same(mp.lmm(formula, again), mp.lmm(formula, held))
    same(mp.lmm(formula, again + mp.suffstats(formula, second)), fit(formula))
    same(mp.lmm(formula, again.update(second)), fit(formula))


def test_sub_models_after_a_merge() -> None:
    formula = "y ~ x + z + f + (x | a) + (1 | b) + (1 | a:c)"
    merged = sum_of([mp.suffstats(formula, frame, responses=["log(y + 40)"]) for frame in split(9, 3)])
    for smaller in ("y ~ x + (1 | a)", "y ~ z + (1 | a) + (1 | a:c)", "log(y + 40) ~ f + (x | a) + (1 | b)"):
        for reml in (True, False):
            same(mp.lmm(smaller, merged, reml=reml), mp.lmm(smaller, FRAME, reml=reml))
    recoded = mp.lmm("y ~ f + (1 | a) + (1 | b)", merged, contrasts={"f": "sum"})
    same(recoded, mp.lmm("y ~ f + (1 | a) + (1 | b)", FRAME, contrasts={"f": "sum"}))


def sum_of(parts: list[mp.SuffStats]) -> mp.SuffStats:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def test_what_does_not_merge() -> None:
    held = mp.suffstats(SIMPLE, FRAME)
    with pytest.raises(mp.DataError, match="different formulas"):
        held + mp.suffstats("y ~ x + (1 | a) + (1 | c)", FRAME)
    least = mp.suffstats(SIMPLE, FRAME, collect="fit")
    for act in (lambda: least + least, lambda: least.update(FRAME), lambda: least.save("nowhere.arrow")):
        with pytest.raises(mp.DataError) as raised:
            act()
        assert raised.value.code == "not_mergeable"
    with pytest.raises(mp.DataError, match="not_mergeable|kind|types"):
        held + mp.suffstats(SIMPLE, FRAME.with_columns(pl.col("a").cast(pl.String)))


def test_statistics_do_not_change_when_they_are_merged() -> None:
    first, second = (mp.suffstats(SIMPLE, frame) for frame in split(11, 2))
    assert first.crossed is not None
    before = first.crossed.factors[0].sums.copy()
    first + second
    np.testing.assert_array_equal(first.crossed.factors[0].sums, before)
