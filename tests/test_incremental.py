"""Stores of partition statistics: what is read, what comes out, what is refused."""
from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest

import mlpipe as mp
from mlpipe import incremental, shelf
from mlpipe.engines.files import HIVE_NULL
from mlpipe.incremental import drift
from mlpipe.options import Options
from mlpipe.trees import Node, statistics, tree

from .lakes import Run, day, lake, runner

FORMULA = "y ~ x + f + (1 | g)"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """See `lakes.runner`."""
    return runner(tmp_path, {"formula": FORMULA})


def same(fit: mp.LMMFit, other: mp.LMMFit) -> None:
    """DESIGN's exactness: 1e-7 standard errors, 1e-8 + 1e-12 |l| in the log-likelihood."""
    assert fit.names == other.names and fit.rows == other.rows and fit.n_blocks == other.n_blocks
    assert np.abs((fit.beta - other.beta) / np.sqrt(np.diag(other.covariance))).max() < 1e-7
    assert abs(fit.loglik - other.loglik) < 1e-8 + 1e-12 * abs(other.loglik)
    spread = np.sqrt(np.diag(other.theta_covariance))[:-1]
    assert np.abs((fit.theta - other.theta) / np.where(np.isfinite(spread), spread, 1.0)).max() < 1e-7


def names(fit: mp.LMMFit, key: str = "read") -> list[str]:
    return [Path(name).stem for name in fit.info["store"][key]]


# -- what is read and what comes out ------------------------------------------------------------------------------------


def test_a_new_day_reads_one_partition_and_agrees_with_a_full_fit(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 6)
    first = run()
    assert names(first) == [f"d0{k}" for k in range(1, 7)] and "drift" not in first.info
    lake(files, 7, 7)
    second = run()
    assert names(second) == ["d07"] and second.info["store"]["total"] == 7
    assert second.info["bytes"] == (files / "d07.parquet").stat().st_size
    assert second.info["passes"] == pytest.approx(2 / 7)
    same(second, mp.lmm(FORMULA, files))
    again = run()
    assert names(again) == [] and again.info["bytes"] == 0
    same(again, second)


def test_the_start_is_where_the_last_fit_ended(run: Run, tmp_path: Path) -> None:
    lake(tmp_path / "lake", 1, 6)
    first = run()
    assert run().evaluations < first.evaluations


def test_levels_that_come_later(run: Run, tmp_path: Path) -> None:
    lake(tmp_path / "lake", 1, 4)
    assert "fd" not in run().names
    lake(tmp_path / "lake", 5, 6)
    later = run()
    assert later.info["drift"]["added"] == ["fd"]
    same(later, mp.lmm(FORMULA, tmp_path / "lake"))


@pytest.mark.parametrize("gone", ["a", "c"])
def test_levels_that_leave_with_the_window(gone: str, run: Run, tmp_path: Path) -> None:
    """The base of the contrasts, or another: what is left is coded as if it had never been there."""
    files = lake(tmp_path / "lake", 1, 3)
    for k in (2, 3):
        day(k).filter(pl.col("f") != gone).write_parquet(files / f"d0{k}.parquet")
    run()
    fit = run(store={"window": 2})
    assert fit.dropped == () and len(fit.names) == 3 and set(fit.info["drift"]["gone"]) >= {"fc" if gone == "c" else "fb"}
    same(fit, mp.lmm(FORMULA, [files / "d02.parquet", files / "d03.parquet"]))


def test_a_changed_file_replaces_its_statistics(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 4)
    run()
    day(9).write_parquet(files / "d02.parquet")
    fit = run()
    assert names(fit) == names(fit, "replaced") == ["d02"]
    same(fit, mp.lmm(FORMULA, files))


def test_a_window_forgets_the_oldest(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 5)
    run(store={"window": 3})
    lake(files, 6, 6)
    fit = run(store={"window": 3})
    assert names(fit) == ["d06"] and names(fit, "dropped") == ["d03"]
    same(fit, mp.lmm(FORMULA, [files / f"d0{k}.parquet" for k in (4, 5, 6)]))
    kept = {path.stem for path in (tmp_path / "store" / "states").iterdir()}
    record = json.loads((tmp_path / "store" / "store.json").read_text())
    assert kept == shelf.named(record) and len(record["partitions"]) == 3
    for k in (1, 2, 3):  # what lies before the window may go
        (files / f"d0{k}.parquet").unlink()
    same(run(store={"window": 3}), fit)


def test_a_partition_that_vanished(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 4)
    whole = run()
    (files / "d02.parquet").unlink()
    with pytest.raises(mp.DataError, match="no longer has the partition .*d02.parquet") as caught:
        run()
    assert caught.value.code == "partition_vanished" and "vanished" in str(caught.value.hint)
    kept = run(store={"vanished": "keep"})
    assert names(kept) == [] and names(kept, "vanished") == ["d02"]
    same(kept, whole)
    fit = run(store={"vanished": "drop"})
    assert names(fit) == [] and names(fit, "dropped") == ["d02"]
    same(fit, mp.lmm(FORMULA, files))


@pytest.mark.parametrize("path", ["{}/store", "{}/store.duckdb"])
def test_a_folder_and_a_database_hold_the_same(path: str, run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 3)
    store = {"path": path.format(tmp_path)}
    run(store=store)
    lake(files, 4, 4)
    fit = run(store=store)
    assert names(fit) == ["d04"]
    same(fit, mp.lmm(FORMULA, files))


def test_a_table_by_the_values_of_a_column(run: Run, tmp_path: Path) -> None:
    database = str(tmp_path / "d.duckdb")
    source, store = {"database": database, "table": "t"}, {"partition_by": "day"}

    def change(sql: str) -> None:
        with duckdb.connect(database) as con:
            con.register("rows", pl.concat(day(k) for k in range(1, 5)).to_arrow())
            con.register("new", day(5).to_arrow())
            con.execute(sql)

    def check(fit: mp.LMMFit, read: list[str]) -> None:
        assert fit.info["store"]["read"] == read
        same(fit, mp.lmm(FORMULA, mp.table("t", database)))

    change("create table t as select * replace (day::date as day) from rows")
    check(run(source=source, store=store), [f"day=2026-01-0{k}" for k in range(1, 5)])
    change("insert into t select * replace (day::date as day) from new; insert into t select g, x, f, y, null from new limit 50")
    check(run(source=source, store=store), ["day is null", "day=2026-01-05"])
    change("update t set y = y + 1 where day = '2026-01-02' and g = 7")
    check(run(source=source, store=store), ["day=2026-01-02"])
    change("delete from t where day = '2026-01-03'")
    with pytest.raises(mp.DataError, match="day=2026-01-03"):
        run(source=source, store=store)


def test_folders_by_key_keep_their_column(run: Run, tmp_path: Path) -> None:
    def write(numbers: range) -> None:
        for k in numbers:
            folder = tmp_path / "hive" / f"f={'abc'[k % 3]}" / f"day={k}"
            folder.mkdir(parents=True)
            day(k).drop("f", "day").write_parquet(folder / "rows.parquet")

    write(range(1, 5))
    source = {"path": f"{tmp_path}/hive"}
    run(source=source)
    write(range(5, 7))
    fit = run(source=source)
    assert len(fit.info["store"]["read"]) == 2
    same(fit, mp.lmm(FORMULA, tmp_path / "hive"))


def test_a_part_of_the_rows(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 3)
    model = {"where": 'x > 1999 & f != "c"'}
    run(model=model)
    lake(files, 4, 4)
    fit = run(model=model)
    frame = pl.read_parquet(files).filter((pl.col("x") > 1999) & (pl.col("f") != "c"))
    assert names(fit) == ["d04"]
    same(fit, mp.lmm(FORMULA, frame))


def test_partitions_without_a_usable_row_count_as_read(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 3)
    day(4).clear().write_parquet(files / "d04.parquet")
    day(5).with_columns(x=pl.lit(None, pl.Float64)).write_parquet(files / "d05.parquet")
    run()
    lake(files, 6, 6)
    fit = run()
    assert names(fit) == ["d06"] and fit.info["rows_dropped"] == 400 and fit.info["rows_read"] == 2000
    same(fit, mp.lmm(FORMULA, files))


@pytest.mark.parametrize("name", ["x", "f", "g"])
def test_a_column_written_without_a_type(name: str, run: Run, tmp_path: Path) -> None:
    """What Polars and pandas write where a day has no value at all, whatever the column is on other days."""
    files = lake(tmp_path / "lake", 1, 3)
    run()
    day(4).with_columns(pl.lit(None).alias(name)).write_parquet(files / "d04.parquet")
    fit = run()
    assert names(fit) == ["d04"] and fit.info["rows_dropped"] == 400 and fit.info["rows_read"] == 1600
    same(fit, mp.lmm(FORMULA, files))


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
def test_weights_slopes_and_missing_values(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 2)
    for k in (1, 2, 3):
        frame = day(k).with_row_index().with_columns(w=1.0 + pl.col("index") % 3, x=pl.when(pl.col("index") % 50 > 0).then("x"))
        frame.write_parquet(files / f"d0{k}.parquet")
    (files / "d03.parquet").rename(tmp_path / "later")
    model = {"formula": "y ~ x + (1 + x | g)", "weights": "w", "reml": False}
    run(model=model)
    (tmp_path / "later").rename(files / "d03.parquet")
    fit = run(model=model)
    assert fit.info["dropped"] == {"x": 24}
    same(fit, mp.lmm("y ~ x + (1 + x | g)", files, weights="w", reml=False))


@pytest.mark.parametrize("absorb", [None, "g"])
def test_least_squares(absorb: str | None, run: Run, tmp_path: Path) -> None:
    model = {"kind": "ols", "formula": "y ~ x + f"} | ({"absorb": absorb} if absorb else {})
    files = lake(tmp_path / "lake", 1, 4)
    first = run(model=model)
    lake(files, 5, 5)
    fit, full = run(model=model), mp.ols("y ~ x + f", files, absorb=absorb)
    assert names(fit) == ["d05"] and fit.names == full.names and fit.rows == full.rows
    np.testing.assert_allclose(fit.beta, full.beta, rtol=0, atol=1e-7 * np.sqrt(np.diag(full.covariance)).min())
    np.testing.assert_allclose(fit.covariance, full.covariance, rtol=1e-9)
    assert abs(fit.loglik - full.loglik) < 1e-8 + 1e-12 * abs(full.loglik)
    moved, at = {one["term"]: one["drift"] for one in fit.info["drift"]["terms"]}, fit.names.index("x")
    assert moved["x"] == pytest.approx((fit.fixef()["x"] - first.fixef()["x"]) / np.sqrt(fit.covariance[at, at]))
    with pytest.raises(mp.ConfigError, match="keeps no rows for cluster"):
        run(model=model | {"vcov": "HC1"})


# -- several grouping factors -------------------------------------------------------------------------------------------


def crossed(number: int, rows: int = 300) -> pl.DataFrame:
    """One day's rows of pupils in schools, crossed with items; new schools, pupils and items come every day."""
    rng = np.random.default_rng(number)
    pupil, item = rng.integers(0, 30 + 3 * number, rows), rng.integers(number % 3, 12 + number, rows)
    effects = [np.random.default_rng(k).normal(size=99) for k in range(3)]
    x = rng.normal(50, 5, rows)
    f = rng.choice(["a", "b"] if number < 3 else ["a", "b", "ç'\""], rows)
    y = 0.1 * x + 0.8 * effects[0][pupil] + 0.6 * effects[1][item] + 0.7 * effects[2][pupil // 6] + rng.normal(size=rows) + (f == "b")
    keys = {"pupil": [f"p'{k}" for k in pupil], "item": item, "school": [f"ś \"{k // 6}\"" for k in pupil]}
    return pl.DataFrame({**keys, "x": x, "f": f, "y": y})


def days(folder: Path, first: int, last: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(first, last + 1):
        crossed(number).write_parquet(folder / f"d{number:02d}.parquet")
    return folder


@pytest.mark.parametrize(
    ("formula", "path"),
    [
        ("y ~ x + f + (1 | pupil) + (1 | item)", "{}/store"),
        ("y ~ x + (1 | school/pupil) + (0 + x | item)", "{}/store.duckdb"),
    ],
)
def test_several_grouping_factors(formula: str, path: str, run: Run, tmp_path: Path) -> None:
    """New levels arrive, a partition is replaced, one is left out: always the full fit of what is there."""
    keywords = {"model": {"formula": formula}, "store": {"path": path.format(tmp_path), "window": 3}}
    files = days(tmp_path / "lake", 1, 3)
    run(**keywords)
    crossed(7).write_parquet(files / "d02.parquet")
    replaced = run(**keywords)
    assert names(replaced) == names(replaced, "replaced") == ["d02"]
    same(replaced, mp.lmm(formula, files))
    days(files, 4, 4)
    fit = run(**keywords)
    full = mp.lmm(formula, [files / f"d0{k}.parquet" for k in (2, 3, 4)])
    assert names(fit) == ["d04"] and names(fit, "dropped") == ["d01"] and fit.info["levels"] == full.info["levels"]
    same(fit, full)
    for group in full.groups:
        ours, theirs = (pl.DataFrame(one.ranef(group, wide=True)) for one in (fit, full))
        assert ours.columns == theirs.columns
        keys = [name for name in ours.columns if name in ("pupil", "item", "school")]
        values = [one.sort(keys) for one in (ours, theirs)]
        assert values[0].select(keys).equals(values[1].select(keys))
        np.testing.assert_allclose(*(one.drop(keys).to_numpy() for one in values), rtol=0, atol=1e-7)


def test_factors_of_partitions_that_hold_little(run: Run, tmp_path: Path) -> None:
    formula = "y ~ x + f + (1 | pupil) + (1 | item)"
    files = days(tmp_path / "lake", 1, 2)
    run(model={"formula": formula})
    crossed(3).clear().write_parquet(files / "d03.parquet")
    crossed(4).with_columns(item=pl.lit(None, pl.Int64)).write_parquet(files / "d04.parquet")
    crossed(5).with_columns(item=pl.lit(3, pl.Int64), pupil=pl.lit("p'1")).head(9).write_parquet(files / "d05.parquet")
    fit = run(model={"formula": formula})
    assert fit.info["rows_dropped"] == 300
    same(fit, mp.lmm(formula, files))


def test_bases_are_fixed_until_a_rebase(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 3)
    model = {"formula": "y ~ poly(x, 2) + (1 | g)"}
    first = run(model=model)
    same(first, mp.lmm(model["formula"], files))
    assert first.info["input_drift"]["x"] == {"shift": pytest.approx(0.0, abs=1e-9), "spread": pytest.approx(1.0), "outside": False}
    day(4).with_columns(x=pl.col("x") + 20, y=pl.col("y") + 6).write_parquet(files / "d04.parquet")
    fit, full = run(model=model), mp.lmm(model["formula"], files)
    frame, before = pl.read_parquet(files), pl.read_parquet([files / f"d0{k}.parquet" for k in (1, 2, 3)])
    moved = fit.info["input_drift"]["x"]
    assert moved["shift"] == pytest.approx((frame["x"].mean() - before["x"].mean()) / before["x"].std())  # type: ignore[operator]
    assert moved["spread"] == pytest.approx(frame["x"].std() / before["x"].std()) and moved["outside"]  # type: ignore[operator]
    assert np.abs(fit.beta - full.beta).max() > 0.1 and fit.rows == full.rows
    new = pl.DataFrame({"x": [1990.0, 2005.0], "g": [1, 1]})
    for one in (fit, full):  # the same curve, in other coordinates
        assert mp_predicted(one, new) == pytest.approx(mp_predicted(full, new), abs=1e-7)
    again = run(model=model, rebase=True)
    assert len(names(again)) == 4 and again.info["input_drift"]["x"]["shift"] == pytest.approx(0.0, abs=1e-9)
    same(again, full)


def mp_predicted(fit: mp.LMMFit, data: pl.DataFrame) -> list[float]:
    return list(fit.predict(data, effects="population").read_all()["predicted"].to_pylist())


# -- drift --------------------------------------------------------------------------------------------------------------


def test_drift_is_the_change_in_standard_errors(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 5, 7)
    first = run()
    lake(files, 8, 8)
    second = run()
    found = second.info["drift"]
    expected = (second.beta - first.beta) / np.sqrt(np.diag(second.covariance))
    assert [one["drift"] for one in found["terms"]] == pytest.approx(expected)
    assert found["largest"] == pytest.approx(np.abs(expected).max()) and found["term"] == first.names[np.abs(expected).argmax()]
    assert run().info["drift"] == found  # of the same partitions again: the same
    with pytest.raises(mp.ConvergenceError, match="moved by"):
        run(policy={"max_drift": found["largest"] / 2})
    run(policy={"max_drift": found["largest"] * 2})


def test_drift_of_terms_that_come_and_go() -> None:
    one = {"names": ["a", "b"], "beta": [1.0, 2.0], "se": [1.0, 1.0], "time": "t"}
    two = {"names": ["b", "c"], "beta": [1.0, 2.0], "se": [0.5, 1.0], "time": "u"}
    found = drift(one, two)
    assert (found["largest"], found["term"], found["added"], found["gone"], found["since"]) == (2.0, "b", ["c"], ["a"], "t")
    assert drift({**one, "names": ["d", "e"]}, two)["term"] is None


# -- runs that are stopped ----------------------------------------------------------------------------------------------


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has a run be stopped, as by a timeout, when it has read so many partitions."""
    read = incremental._read

    def stop(number: int) -> None:
        left = [None] * number

        def counted(*args: Any, **kwargs: Any) -> Any:
            if not left:
                raise KeyboardInterrupt
            left.pop()
            return read(*args, **kwargs)

        monkeypatch.setattr(incremental, "_read", counted)

    return stop


@pytest.mark.parametrize("path", ["store", "store.duckdb"])
def test_a_run_that_is_stopped_keeps_what_it_has_read(path: str, run: Run, after: Callable[[int], None], tmp_path: Path) -> None:
    """Also the first of all, and again and again: each goes on where the last one was stopped, until one reads the rest."""
    files, store = lake(tmp_path / "lake", 1, 5), {"path": f"{tmp_path}/{path}"}
    for _ in range(2):
        after(2)
        with pytest.raises(KeyboardInterrupt):
            run(store=store)
        with shelf.opened(store["path"], Options()) as held:
            record = held.record()
            assert record is not None and record["partitions"] == []
            assert all(held.load(state).rows for state in shelf.named(record))
    assert [Path(part["name"]).stem for part in record["pending"]] == ["d01", "d02", "d03", "d04"]
    day(12).write_parquet(files / "d02.parquet")  # what changed since is read again, what is gone is forgotten
    (files / "d03.parquet").unlink()
    after(2)
    fit = run(store=store)
    assert names(fit) == ["d02", "d05"] and names(fit, "resumed") == ["d01", "d04"]
    assert incremental.told(fit).splitlines()[0] == "Store: 4 partitions, 2 read, 2 by a run that was stopped"
    same(fit, mp.lmm(FORMULA, files))
    with shelf.opened(store["path"], Options()) as held:
        assert (record := held.record()) is not None and record["pending"] == [] and len(record["partitions"]) == 4
    assert names(run(store=store), "resumed") == []


def test_a_stopped_run_leaves_what_counts_as_it_was(run: Run, after: Callable[[int], None], tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 3)
    run()
    before = json.loads((tmp_path / "store" / "store.json").read_text())
    lake(files, 4, 6)
    day(12).write_parquet(files / "d02.parquet")
    after(2)
    with pytest.raises(KeyboardInterrupt):
        run()
    record = json.loads((tmp_path / "store" / "store.json").read_text())
    assert {**record, "pending": []} == before and len(record["pending"]) == 2
    day(5).drop("x").write_parquet(files / "d05.parquet")
    after(9)
    with pytest.raises(mp.DataError, match="d05.parquet: there is no column 'x'"):
        run()
    lake(files, 5, 5)
    fit = run()
    assert names(fit) == ["d05", "d06"] and names(fit, "resumed") == ["d02", "d04"] and names(fit, "replaced") == ["d02"]
    same(fit, mp.lmm(FORMULA, files))


def test_a_rebase_that_is_stopped_leaves_the_store_as_it_was(run: Run, after: Callable[[int], None], tmp_path: Path) -> None:
    lake(tmp_path / "lake", 1, 3)
    before = run()
    record = (tmp_path / "store" / "store.json").read_text()
    after(2)
    with pytest.raises(KeyboardInterrupt):
        run(rebase=True)
    assert (tmp_path / "store" / "store.json").read_text() == record
    after(0)
    same(run(), before)


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (day(4).drop("x"), "d04.parquet: there is no column 'x'"),
        (day(4).with_columns(pl.col("x").cast(pl.String)), "d04.parquet: the column 'x' is VARCHAR, it was DOUBLE when the store was made"),
        (day(4).with_columns(pl.col("g").cast(pl.String)), "d04.parquet: the column 'g' is VARCHAR, it was BIGINT when the store was made"),
    ],
)
def test_a_schema_that_changed_overnight(frame: pl.DataFrame, message: str, run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 3)
    before = run()
    record = (tmp_path / "store" / "store.json").read_text()
    frame.write_parquet(files / "d04.parquet")
    with pytest.raises(mp.DataError, match=message) as caught:
        run()
    assert caught.value.code == "schema_changed"
    assert (tmp_path / "store" / "store.json").read_text() == record
    (files / "d04.parquet").unlink()
    same(run(), before)


TIMES = pl.datetime_range(pl.datetime(2026, 1, 1), pl.datetime(2026, 1, 1) + pl.duration(hours=399), "1h")


@pytest.mark.parametrize("later", [day(3).clear(), day(3).with_columns(x=None), day(3).with_columns(g=None, f=None)])
def test_text_files_without_values(later: pl.DataFrame, run: Run, tmp_path: Path) -> None:
    """A header alone, and columns without a value, which look like text in their file."""
    files = tmp_path / "lake"
    files.mkdir()
    for k in (1, 2):
        day(k).write_csv(files / f"d0{k}.csv")
    run(source={"path": f"{files}"})
    later.write_csv(files / "d03.csv")
    fit, full = run(source={"path": f"{files}"}), mp.lmm(FORMULA, files)
    same(fit, full)
    assert fit.info["rows_dropped"] == full.info["rows_dropped"] and fit.info["dropped"] == full.info["dropped"]


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("values", [("1", "north", HIVE_NULL), ("2026-01-01", "2026-01-02", HIVE_NULL)])
def test_folders_whose_values_look_like_other_types(values: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    """The type of a folder's column is that of all folders together."""
    for k, value in enumerate(values):
        folder = tmp_path / "lake" / f"region={value}"
        folder.mkdir(parents=True)
        day(k + 1).write_parquet(folder / "rows.parquet")
    model = {"formula": "y ~ x + (1 | g) + (1 | region)"}
    fit = run(source={"path": f"{tmp_path}/lake"}, model=model)
    full = mp.lmm(model["formula"], tmp_path / "lake")
    same(fit, full)
    assert fit.info["dropped"] == full.info["dropped"] == {"region": 400}
    more = tmp_path / "lake" / f"region={values[0].replace('1', '3')}"
    more.mkdir()
    day(7).write_parquet(more / "rows.parquet")
    same(run(source={"path": f"{tmp_path}/lake"}, model=model), mp.lmm(model["formula"], tmp_path / "lake"))


def test_other_types_of_the_same_files(run: Run, tmp_path: Path) -> None:
    """A file that is read with other types has other content."""
    (tmp_path / "lake").mkdir()
    day(1).write_csv(tmp_path / "lake" / "d01.csv")
    source: dict[str, Any] = {"path": f"{tmp_path}/lake"}
    run(source=source)
    source["types.x"] = "INTEGER"
    fit = run(source=source)
    assert names(fit) == names(fit, "replaced") == ["d01"]
    same(fit, mp.lmm(FORMULA, mp.source(tmp_path / "lake", types={"x": "INTEGER"})))


def test_a_file_that_is_listed_twice(run: Run, tmp_path: Path) -> None:
    """Without a store its rows count twice."""
    files = lake(tmp_path / "lake", 1, 2)
    with pytest.raises(mp.ConfigError, match="names the file .*d01.parquet twice"):
        run(source={"path": [f"{files}/d01.parquet", f"{files}/*.parquet"]})


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize(
    ("model", "first", "then", "message"),
    [
        ({"formula": "y ~ t + (1 | g)"}, TIMES.cast(pl.Date), TIMES, "'t' is TIMESTAMP, it was DATE"),
        ({"formula": "y ~ t + (1 | g)"}, pl.col("x"), TIMES.cast(pl.Date), "'t' is DATE, it was DOUBLE"),
        ({"formula": "y ~ x + (1 | t)"}, TIMES.cast(pl.Date), TIMES, "'t' is TIMESTAMP, it was DATE"),
        ({"formula": "y ~ x + (1 | t)"}, pl.col("g").cast(pl.Decimal(9, 2)), pl.col("g"), r"'t' is BIGINT, it was DECIMAL\(9,2\)"),
        ({"formula": "y ~ x + (1 | g)", "where": "t > 20454"}, TIMES.cast(pl.Date), TIMES, "'t' is TIMESTAMP, it was DATE"),
    ],
)
def test_days_do_not_add_up_with_seconds(
    model: dict[str, Any], first: pl.Expr, then: pl.Expr, message: str, run: Run, tmp_path: Path
) -> None:
    """Dates are numbers of days, timestamps of seconds: read one by one, partitions would be summed over both."""
    files = tmp_path / "lake"
    files.mkdir()
    for k, time in ((1, first), (2, first)):
        day(k).with_columns(t=time).write_parquet(files / f"d0{k}.parquet")
    before = run(model=model)
    day(3).with_columns(t=then).write_parquet(files / "d03.parquet")
    with pytest.raises(mp.DataError, match=f"d03.parquet: the column {message} when the store was made") as caught:
        run(model=model)
    assert caught.value.code == "schema_changed" and "one type in all partitions" in str(caught.value.hint)
    (files / "d03.parquet").unlink()
    same(run(model=model), before)


def test_a_file_that_is_none(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 3)
    before = run()
    (files / "d04.parquet").write_bytes(b"not a parquet file at all")
    with pytest.raises(mp.DataError, match="d04.parquet"):
        run()
    (files / "d04.parquet").unlink()
    assert names(run()) == [] and before.rows == 1200


def test_bad_values_name_their_partition(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 3)
    run()
    day(4).with_columns(x=pl.when(pl.int_range(400) == 3).then(float("inf")).otherwise("x")).write_parquet(files / "d04.parquet")
    with pytest.raises(mp.DataError, match="partition .*d04.parquet: the column 'x' is infinite in 1 rows"):
        run()


def test_another_model_is_refused_and_a_rebase_takes_it(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 3)
    run()
    with pytest.raises(mp.ConfigError, match="was made with formula") as caught:
        run(model={"formula": "y ~ x + (1 | g)"})
    assert caught.value.code == "store_model" and "--rebase" in str(caught.value.hint)
    same(run(model={"formula": "y ~ x + (1 | g)"}, rebase=True), mp.lmm("y ~ x + (1 | g)", files))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"formula": "y ~ x", "kind": "glm", "family": "poisson"}}, "keeps nothing that kind = 'glm'"),
        ({"store": {"window": 0}}, "window"),
        ({"store": {"vanished": "forget"}}, "vanished"),
        ({"store": {"partition_by": "nothing"}}, "no column 'nothing'"),
        ({"store": {"partition_by": "x"}}, "cannot partition"),
        ({"model": {"where": "x + 1"}}, "is no condition"),
        ({"model": {"where": "nothing > 1"}}, "no column 'nothing'"),
    ],
)
def test_mistakes_in_a_job(sections: dict[str, Any], message: str, run: Run, tmp_path: Path) -> None:
    lake(tmp_path / "lake", 1, 2)
    with pytest.raises(mp.MlpipeError, match=message):
        run(**sections)


def test_a_store_that_another_job_holds(run: Run, tmp_path: Path) -> None:
    lake(tmp_path / "lake", 1, 2)
    with shelf.opened(str(tmp_path / "store"), Options()), pytest.raises(mp.ResourceError, match="another job is using the store"):
        run()
    run()


def test_a_folder_of_someone_elses(run: Run, tmp_path: Path) -> None:
    lake(tmp_path / "lake", 1, 2)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "letter.txt").write_text("dear")
    with pytest.raises(mp.ConfigError, match="is no store"):
        run()
    assert os.listdir(tmp_path / "store") == ["letter.txt"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"format": "mlpipe.store/0"}', b'{"format": "mlpipe.store/1"}'])
def test_a_record_that_cannot_be_read(content: bytes, run: Run, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_bytes(content)
    with pytest.raises(mp.DataError, match="no store that this version can read"):
        run()


def test_a_lost_state_is_told_and_a_rebase_helps(run: Run, tmp_path: Path) -> None:
    files = lake(tmp_path / "lake", 1, 2)
    run()
    for path in (tmp_path / "store" / "states").iterdir():
        path.write_bytes(b"gone")
    lake(files, 3, 3)
    with pytest.raises(mp.DataError, match="has lost a state") as caught:
        run()
    assert "--rebase" in str(caught.value.hint)
    same(run(rebase=True), mp.lmm(FORMULA, files))


# -- the tree -----------------------------------------------------------------------------------------------------------


def nodes(node: Node) -> set[str]:
    return set(node.merged())


def depth(node: Node) -> int:
    return 1 + max(depth(node.left), depth(node.right)) if node.left and node.right else 0


def test_the_tree_depends_on_the_partitions_alone_and_changes_little() -> None:
    leaves = [(f"day {k:04d}", f"state {k}") for k in range(1000)]
    whole = tree(leaves)
    assert len(nodes(whole)) == 999 and depth(whole) < 40
    assert tree(list(leaves)) == whole
    new = [len(nodes(tree(leaves[: n + 1])) - nodes(tree(leaves[:n]))) for n in range(100, 1000, 25)]
    assert np.mean(new) < 2 * np.log(1000) and max(new) < 30
    window = [len(nodes(tree(leaves[n + 1 : n + 31])) - nodes(tree(leaves[n : n + 30]))) for n in range(900)]
    assert np.mean(window) < 10


def test_a_tree_of_none_and_of_one() -> None:
    with pytest.raises(ValueError):
        tree([])
    assert tree([("a", "s")]) == Node("s")


def test_only_what_is_not_held_is_merged() -> None:
    held = {f"s{k}": mp.suffstats(FORMULA, day(k)) for k in range(1, 5)}
    root = tree([(f"day {k}", f"s{k}") for k in range(1, 5)])
    saved: dict[str, Any] = {}
    whole = statistics(root, saved.__contains__, held.__getitem__, saved.__setitem__, operator.add)
    assert whole.rows == 1600 and saved.keys() == nodes(root)

    def refuse(state: str) -> Any:
        raise AssertionError(f"{state} was read")

    def load(state: str) -> Any:
        return saved[state] if state in saved else refuse(state)

    again = statistics(root, saved.__contains__, load, saved.__setitem__, operator.add)
    assert again is whole
