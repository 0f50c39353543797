"""`mlpipe predict` over many files: one file out for each in, the rows of `fit.predict`, all or nothing."""
from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

import mlpipe as mp
from mlpipe import cli, progress, scored
from mlpipe import result as results

FORMULA = "y ~ x + f + (1 + x | g)"
NAMES = ["day=2026-01-01/it's \"a\".parquet", "day=2026-01-01/b c.parquet", "day=2026-01-03/żółw ☃.parquet", "day=2026-01-04/%d.parquet"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


Predict = Callable[..., Done]


def rows(seed: int, n: int = 60) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    g, f, x = rng.choice(["o'neil", 'q"', "ß"], n), rng.choice(["a", "b"], n), rng.normal(size=n)
    y = x + (f == "b") + 2.0 * (g == "ß") + rng.normal(size=n)
    return pl.DataFrame({"y": y, "x": x, "f": f, "g": g, 'n "1"': np.arange(n)})


@pytest.fixture(scope="module")
def fit() -> mp.LMMFit:
    return mp.lmm(FORMULA.replace("1 + x |", "1 |"), rows(0, 300))


@pytest.fixture
def predict(fit: mp.LMMFit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Predict:
    """Runs `mlpipe predict` of a fit in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress.LOGGER, "handlers", [])
    fit.write(tmp_path / "fit")

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["mlpipe", "predict", "fit", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert isinstance(stopped.value.code, int)
        return Done(stopped.value.code, *capsys.readouterr())

    return run


def tree(folder: Path) -> Path:
    """A hive tree of odd names: the third file has no row, the fourth none that can be scored, one level no fit has seen."""
    frames = [rows(1), rows(2, 7).with_columns(g=pl.lit("new")), rows(3).clear(), rows(4, 5).with_columns(x=pl.lit(None, pl.Float64))]
    for name, frame in zip(NAMES, frames, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(folder / name)
    return folder


def run_of(out: Path) -> tuple[dict[str, list[str]], Path]:
    index = json.loads((out / scored.INDEX).read_text())
    return index, out / "runs" / index["run_id"]


def test_a_file_for_each_file_in_the_order_of_their_rows(predict: Predict, fit: mp.LMMFit, tmp_path: Path) -> None:
    lake = tree(tmp_path / "lake")
    done = predict("lake", "--out", "out")
    assert done.code == 0 and done.err.startswith("72 rows, 7 of unseen levels, 5 without prediction, 4 files in out/runs/")
    index, folder = run_of(tmp_path / "out")
    assert sorted(index["files"]) == sorted(NAMES) and index["rows"] == 72
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet")) == sorted(NAMES)
    whole = pl.DataFrame(fit.predict(lake))
    parts = {name: pl.DataFrame(pq.ParquetFile(folder / name).read()) for name in index["files"]}
    assert pl.concat(parts[name] for name in index["files"]).equals(whole)
    assert [len(parts[name]) for name in NAMES] == [60, 7, 0, 5] and all(part.columns == whole.columns for part in parts.values())
    for name, part in parts.items():
        assert part.drop("day", "predicted").equals(pl.read_parquet(lake / name, hive_partitioning=False))


@pytest.mark.parametrize(("data", "out"), [(["lake"], "out"), (["lake/*.csv"], "out/"), (["lake/a.csv", "lake/b.csv"], "new/out")])
def test_text_files_and_globs(data: list[str], out: str, predict: Predict, fit: mp.LMMFit, tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir()
    for k, name in enumerate("ba"):
        rows(k, 9 + k).write_csv(tmp_path / "lake" / f"{name}.csv", quote_style="non_numeric")
    assert predict(*data, "--out", out).code == 0
    index, folder = run_of(tmp_path / out)
    assert index["files"] == ["a.csv.parquet", "b.csv.parquet"]
    whole = pl.DataFrame(fit.predict([tmp_path / "lake" / "a.csv", tmp_path / "lake" / "b.csv"]))
    assert pl.concat(pl.read_parquet(folder / name) for name in index["files"]).equals(whole)


def test_rows_are_cut_where_files_end_not_where_batches_do(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "lake").mkdir()
    sizes = [150_000, 1, 65_536, 30]
    for k, n in enumerate(sizes):
        rows(k, n).write_parquet(tmp_path / "lake" / f"{k}.parquet")
    assert predict("lake", "--out", "out").code == 0
    _, folder = run_of(tmp_path / "out")
    for k, n in enumerate(sizes):
        assert pl.read_parquet(folder / f"{k}.parquet", columns=['n "1"']).to_series().equals(pl.Series('n "1"', np.arange(n)))


def test_one_file_where_the_name_says_so(predict: Predict, tmp_path: Path) -> None:
    tree(tmp_path / "lake")
    assert predict("lake", "--out", "p.parquet").code == 0 and predict(f"lake/{NAMES[0]}", "--out", "p").code == 0
    assert pl.read_parquet("p.parquet").height == 72 and pq.ParquetFile("p").metadata.num_rows == 60


def test_all_or_nothing(predict: Predict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree(tmp_path / "lake")
    out = tmp_path / "out"
    assert predict("lake", "--out", "out").code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    refused = predict("lake", "--out", "out", "--new-levels", "raise")
    assert refused.code == 3 and "has not seen" in refused.err
    written = scored._written

    def fails(*given: object) -> None:
        written(*given)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scored, "_written", fails)
    full = predict("lake", "--out", "out")
    assert full.code == 5 and "cannot write out: No space left on device" in full.err
    monkeypatch.setattr(scored, "_written", written)
    monkeypatch.setattr(scored, "_rows", lambda file, options: 3)
    assert "the source changed" in predict("lake", "--out", "out").err
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "runs" / "left" / "day=1").mkdir(parents=True)  # by a run that was killed
    (out / "runs" / "left" / "day=1" / "x.parquet").write_text("half")


def test_the_next_run_replaces_and_cleans_up(predict: Predict, tmp_path: Path) -> None:
    tree(tmp_path / "lake")
    (tmp_path / "out" / "runs" / "left").mkdir(parents=True)  # by a run that was killed before its first index
    (tmp_path / "out" / ".lock").touch()
    (tmp_path / "out" / "runs" / "left" / "x.parquet").write_text("half")
    assert predict("lake", "--out", "out").code == 0
    first = run_of(tmp_path / "out")[1]
    (tmp_path / "lake" / NAMES[0]).unlink()
    assert predict("lake", "--out", "out", "--effects", "population").code == 0
    index, second = run_of(tmp_path / "out")
    assert len(index["files"]) == 3 and second != first
    assert [path for path in (tmp_path / "out" / "runs").iterdir()] == [second]


def test_targets_that_are_refused(predict: Predict, tmp_path: Path) -> None:
    tree(tmp_path / "lake")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for out, code, words in [
        ("theirs", 2, "is no directory of predictions"), ("file", 2, "is no directory of predictions"), ("fit", 2, "is no directory of"),
        ("lake", 2, "lie within each other"), ("lake/out", 2, "lie within each other"), (".", 2, "lie within each other"),
        ("lake/all.parquet", 2, "lie within each other"), (f"lake/{NAMES[0]}", 2, "lie within each other"),
        ("/dev/null/x", 5, "cannot write"),
    ]:  # fmt: skip
        done = predict("lake", "--out", out)
        assert (done.code, words in done.err, "Traceback" in done.err) == (code, True, False), (out, done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "fit", "lake", "theirs"]
    twice = predict("lake", f"lake/{NAMES[0]}", "--out", "out")
    assert twice.code == 2 and "named twice" in twice.err


def test_what_is_read_is_never_replaced(predict: Predict, tmp_path: Path) -> None:
    """The file itself, by whatever name, a database that holds the rows or the fit; nor does Parquet hide behind another suffix."""
    tree(tmp_path / "lake")
    file, link, database = tmp_path / "rows.parquet", tmp_path / "link.parquet", tmp_path / "rows.duckdb"
    pl.read_parquet(tmp_path / "lake" / NAMES[0]).write_parquet(file)
    link.symlink_to(file)
    with duckdb.connect(str(database)) as con:
        con.execute(f"create table held as from '{file}'")
    results.load(str(tmp_path / "fit")).write(tmp_path / "fit.db")
    before = {path: path.read_bytes() for path in (file, database, tmp_path / "fit.db")}
    for data, out in [(["rows.parquet"], "rows.parquet"), (["link.parquet"], "rows.parquet"), (["rows.parquet"], "link.parquet")]:
        done = predict(*data, "--out", out)
        assert done.code == 2 and f"{out} is what is read, and would be replaced" in done.err
    done = predict("rows.duckdb", "--table", "held", "--out", "rows.duckdb")
    assert done.code == 2 and "rows.duckdb is what is read" in done.err
    for out in ("scored.csv", "scored.json.gz", "fit.db", "SCORED.DUCKDB", "-"):
        done = predict("rows.parquet", "--out", out)
        assert done.code == 2 and not (out != "-" and "are written as Parquet" not in done.err), (out, done)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit", "fit.db", "lake", "link.parquet", "rows.duckdb", "rows.parquet"]


def test_of_two_jobs_one_is_told(predict: Predict, tmp_path: Path) -> None:
    tree(tmp_path / "lake")
    assert predict("lake", "--out", "out").code == 0
    with (tmp_path / "out" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = predict("lake", "--out", "out")
    assert done.code == 5 and "another job is writing out" in done.err


def test_a_type_that_parquet_has_not_leaves_nothing(predict: Predict, fit: mp.LMMFit, tmp_path: Path) -> None:
    import pyarrow as pa

    odd = pa.record_batch({"x": pa.array([None], pa.month_day_nano_interval())})
    reader = pa.RecordBatchReader.from_batches(odd.schema, iter([odd]))
    with pytest.raises(mp.DataError, match="cannot write"):
        scored.write_pieces(reader, [scored.Piece("x.parquet", 1)], str(tmp_path / "out"), dict)
    assert not list((tmp_path / "out" / "runs").iterdir())
    assert results.load(str(tmp_path / "fit")).formula == fit.formula
