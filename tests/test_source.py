"""What `data` may be: files of every kind and number, databases, streams, and what is refused."""
from __future__ import annotations

import glob
import gzip
import os
import re
import subprocess
import sys
import tempfile
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import narwhals as nw
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import sqlglot
from pyarrow import fs

import mlpipe as mp
from mlpipe.engines import files, remote
from mlpipe.engines.base import Columns, Engine
from mlpipe.errors import ColumnNotFoundError, ConfigError, DataError, MlpipeError, ResourceError
from mlpipe.options import Options, parse_bytes
from mlpipe.sources import open_source, query, source, table

from .conftest import as_stored
from .test_engines import rows, values

Opened = Callable[..., Engine]


def used(engine: Engine, *names: str) -> list[tuple[Any, ...]]:
    """The values of columns, checked as a plan checks what it uses."""
    engine.check_columns(Columns(frozenset(list(engine.schema()).index(name) for name in names)))
    return values(engine, *names)


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


# ---- files ----


def test_integers_then_fractions_over_files(tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "a.parquet", y=[1, 2])
    parquet(tmp_path / "b.parquet", y=[1.5])
    engine = opened(str(tmp_path / "*.parquet"))
    assert used(engine, "y") == [(1.0,), (2.0,), (1.5,)]
    assert any("'y'" in note and "BIGINT" in note and "DOUBLE" in note for note in engine.identity().notes)
    assert rows(engine, "select k0 from src order by rn", Columns(keys=frozenset([0]), row_number=True))[2] == (1.5,)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "arrow"])
def test_keys_that_fractions_in_another_file_would_merge(suffix: str, tmp_path: Path, opened: Opened) -> None:
    """2^53 and 2^53 + 1 are one DOUBLE: no key, while small ids beside fractions are one and large ones may be a covariate."""
    for folder, ids in (("small", [1, 2**53 - 1]), ("large", [2**53, 2**53 + 1])):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / f"a.{suffix}", pl.DataFrame({"id": ids, "y": [1.0, 2.0]}))
        write(tmp_path / folder / f"b.{suffix}", pl.DataFrame({"id": [7.5, None], "y": [1.0, 2.0]}))
    key = Columns(keys=frozenset([0]))
    opened(tmp_path / "small").check_columns(key)
    large = opened(tmp_path / "large")
    large.check_columns(Columns(values=frozenset([0, 1])))
    arrow = "Integer value 9007199254740993 not in range"  # pyarrow itself refuses to read it as a double
    with pytest.raises(DataError, match=arrow if suffix == "arrow" else "'id' is BIGINT in .*a.*; DOUBLE in .*b.*beyond 2"):
        large.check_columns(key)


@pytest.mark.parametrize("name", ["wide.parquet", "wide.jsonl", "mixed.jsonl", "mixed.csv"])
def test_keys_that_duckdb_reads_as_doubles(name: str, tmp_path: Path, opened: Opened) -> None:
    """Decimals of more than 38 digits, JSON's whole numbers beyond 64 bits, large ones beside fractions: no two keys become one."""
    keys = {"wide": [10**20, 10**20 + 1], "mixed": [2**53 + 1, 2.5]}[name.partition(".")[0]]
    if name == "wide.parquet":
        parquet(tmp_path / name, id=pa.array([Decimal(key) for key in keys], pa.decimal256(60, 2)), y=[1.0, 2.0])
    else:
        line = ('{{"id": {}, "y": {}}}' if "json" in name else "{},{}").format
        lines = ["id,y"] * ("csv" in name) + [line(key, y) for key, y in zip(keys, (1.0, 2.0), strict=True)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    engine = opened(tmp_path / name)
    engine.check_columns(Columns(values=frozenset([0, 1]), keys=frozenset([1])))
    with pytest.raises(DataError, match="'id' .*read as DOUBLE, its keys beyond 2") as caught:
        engine.check_columns(Columns(keys=frozenset([0])))
    assert (caught.value.code, caught.value.column) == ("column_files", "id")
    if name != "wide.parquet":
        for kind in ("VARCHAR", "DOUBLE"):
            opened(source(tmp_path / name, types={"id": kind})).check_columns(Columns(keys=frozenset([0])))


def test_range_of_keys_that_is_addressed_directly(tmp_path: Path, opened: Opened) -> None:
    """DuckDB's limit for such tables follows the rows and the memory for one thread; without known rows it stays."""
    rows = 200_000
    pq.write_table(pa.table({"g": [i % 40_000 for i in range(rows)]}), tmp_path / "a.parquet")
    pl.DataFrame({"g": [1, 2]}).write_csv(tmp_path / "b.csv")
    sql = "select current_setting('perfect_ht_threshold') as bits, sum(c0) as s from src group by c0 % 2"
    asked = sqlglot.parse_one(sql, dialect="duckdb")
    assert isinstance(asked, sqlglot.exp.Query)
    bits = []
    for file, threads in (("a.parquet", 1), ("a.parquet", 200), ("b.csv", 1)):
        engine = opened(tmp_path / file, options=Options(threads=threads, memory_limit="700MB"))
        bits.append(engine.query(asked, Columns(values=frozenset([0]))).read_all()["bits"][0].as_py())
    assert bits == [15, 14, 12]


def test_whole_numbers_beside_single_precision(tmp_path: Path, opened: Opened) -> None:
    """DuckDB's common type is FLOAT, which holds neither wide integers nor decimals."""
    for name, kind, value in (("x", pa.int32(), 16_777_217), ("z", pa.int16(), 7)):
        parquet(tmp_path / name / "a.parquet", **{name: pa.array([value], kind)})
        parquet(tmp_path / name / "b.parquet", **{name: pa.array([1.5], pa.float32())})
    with pytest.raises(DataError, match="'x' has no type common.*a.parquet.*b.parquet"):
        used(opened(tmp_path / "x"), "x")
    assert used(opened(tmp_path / "z"), "z") == [(7.0,), (1.5,)]
    parquet(tmp_path / "x" / "c.parquet", x=[2.5])
    assert used(opened(tmp_path / "x"), "x") == [(16_777_217.0,), (1.5,), (2.5,)]


@pytest.mark.parametrize("suffix", ["csv", "json", "arrow"])
def test_integers_then_fractions_over_other_files(suffix: str, tmp_path: Path, opened: Opened) -> None:
    write(tmp_path / f"a.{suffix}", pl.DataFrame({"y": [1, 2]}))
    write(tmp_path / f"b.{suffix}", pl.DataFrame({"y": [1.5]}))
    engine = opened(str(tmp_path / f"*.{suffix}"))
    assert used(engine, "y") == [(1.0,), (2.0,), (1.5,)] and engine.identity().notes


def write(path: Path, frame: pl.DataFrame) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".csv":
            frame.write_csv(path)
        case ".tsv":
            frame.write_csv(path, separator="\t")
        case ".json" | ".ndjson":
            frame.write_ndjson(path)
        case ".arrow" | ".feather":
            feather.write_feather(frame.to_arrow(compat_level=pl.CompatLevel.oldest()), str(path), compression="uncompressed")
        case _:
            frame.write_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "arrow"])
def test_text_in_one_file_and_numbers_in_another(suffix: str, tmp_path: Path, opened: Opened) -> None:
    write(tmp_path / f"a.{suffix}", pl.DataFrame({"x": [1.5], "y": [1.0]}))
    write(tmp_path / f"b.{suffix}", pl.DataFrame({"x": ["q"], "y": [2.0]}))
    engine = opened(tmp_path)
    assert used(engine, "y") == [(1.0,), (2.0,)]
    with pytest.raises(DataError, match="'x' has no type common.*a\\..*b\\.") as caught:
        used(engine, "x")
    assert caught.value.column == "x" and caught.value.code == "column_files"


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json", "arrow"])
def test_a_column_absent_from_a_file(suffix: str, tmp_path: Path, opened: Opened) -> None:
    write(tmp_path / f"a.{suffix}", pl.DataFrame({"z": [9.0], "y": [1.0]}))
    write(tmp_path / f"b.{suffix}", pl.DataFrame({"y": [2.0]}))
    engine = opened([tmp_path / f"a.{suffix}", str(tmp_path / f"b.{suffix}")])
    assert list(engine.schema()) == ["z", "y"] and used(engine, "y") == [(1.0,), (2.0,)]
    with pytest.raises(DataError, match=f"'z' is absent from .*b.{suffix}"):
        used(engine, "z")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "arrow"])
def test_columns_in_another_order(suffix: str, tmp_path: Path, opened: Opened) -> None:
    write(tmp_path / f"a.{suffix}", pl.DataFrame({"x": [1.0], "y": [2.0]}))
    write(tmp_path / f"b.{suffix}", pl.DataFrame({"y": [4.0], "x": [3.0]}))
    engine = opened(tmp_path)
    assert used(engine, "x", "y") == [(1.0, 2.0), (3.0, 4.0)]


@pytest.mark.parametrize("suffix", ["parquet", "json"])
def test_names_that_differ_by_case_between_files_are_never_mixed(suffix: str, tmp_path: Path, opened: Opened) -> None:
    write(tmp_path / f"a.{suffix}", pl.DataFrame({"X": [1.0], "y": [2.0]}))
    write(tmp_path / f"b.{suffix}", pl.DataFrame({"x": [3.0], "y": [4.0]}))
    with pytest.raises(DataError, match="'X' and 'x' differ only by case.*a\\..*b\\."):
        opened(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "arrow"])
def test_names_that_differ_by_case_are_matched_exactly(suffix: str, tmp_path: Path, opened: Opened) -> None:
    write(tmp_path / f"a.{suffix}", pl.DataFrame({"X": [1.0], "x": [2.0]}))
    write(tmp_path / f"b.{suffix}", pl.DataFrame({"x": [3.0], "X": [4.0]}))
    engine = opened(tmp_path)
    assert used(engine, "X", "x") == [(1.0, 2.0), (4.0, 3.0)]


def test_both_cases_in_every_file_in_one_order(tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "a.parquet", x=[1], X=[2.0])
    parquet(tmp_path / "b.parquet", x=[3.5], X=[4.0])
    assert used(opened(tmp_path), "X", "x") == [(2.0, 1.0), (4.0, 3.5)]


def test_json_keys_that_differ_by_case_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text('{"x": 1}\n{"X": 2}\n')
    with pytest.raises(DataError, match="differ only by case"):
        open_source(tmp_path / "a.ndjson")


def test_a_json_key_with_a_number_is_no_clash(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "a.ndjson").write_text('{"x": 1, "x_1": 2}\n')
    assert used(opened(tmp_path / "a.ndjson"), "x_1", "x") == [(2.0, 1.0)]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_late_fraction(suffix: str, tmp_path: Path, opened: Opened) -> None:
    frame = pl.DataFrame({"y": pl.Series([1.0] * 30_000 + [1.5]).cast(pl.String).str.strip_suffix(".0")})
    path = tmp_path / f"late.{suffix}"
    path.write_text("y\n" + "\n".join(frame["y"]) if suffix == "csv" else "\n".join(f'{{"y": {y}}}' for y in frame["y"]))
    assert used(opened(path), "y")[-1] == (1.5,)


def test_types_given_by_the_user(tmp_path: Path, opened: Opened) -> None:
    path = tmp_path / "a.csv"
    path.write_text("zip,y\n1234,1\n99999,2\n")
    assert used(opened(path), "y") == [(1.0,), (2.0,)]
    engine = opened(source(path, types={"zip": "VARCHAR"}))
    assert used(engine, "zip", "y") == [("1234", 1.0), ("99999", 2.0)]
    assert used(opened(str(path), types={"zip": "VARCHAR"}), "zip")[0] == ("1234",)
    with pytest.raises(ColumnNotFoundError, match="zib"):
        opened(source(path, types={"zib": "VARCHAR"}))
    with pytest.raises(ConfigError, match="(?s)'zip' the type 'VARCHER'.*did you mean 'VARCHAR'"):
        opened(source(path, types={"zip": "VARCHER"}))
    with pytest.raises(ConfigError, match="'zip' the type <class"):
        opened(source(path, types={"zip": int}))  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="CSV and JSON"):
        opened(source(parquet(tmp_path / "a.parquet", x=[1]), types={"x": "DOUBLE"}))


def test_types_settle_a_dispute_between_files(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "a.json").write_text('{"g": 1}')
    (tmp_path / "b.json").write_text('{"g": "q"}')
    assert used(opened(source(tmp_path, types={"g": "VARCHAR"})), "g") == [("1",), ("q",)]


def test_a_value_that_is_not_of_the_type_given(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "a.csv").write_text("g,y\n1,2\n3,oops\n")
    (tmp_path / "b.csv").write_text("y,g\n1,2\n")
    for kind in ("DOUBLE", "ENUM('1', '2')"):
        engine = opened(source(tmp_path, types={"y": kind}))
        with pytest.raises(DataError, match=f"the column 'y' is read as {re.escape(kind)}, and line 3 holds 'oops'") as caught:
            used(engine, "y")
        assert (caught.value.code, caught.value.column) == ("column_value", "y")


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_column_without_values_in_one_file(suffix: str, tmp_path: Path, opened: Opened) -> None:
    write(tmp_path / f"a.{suffix}", pl.DataFrame({"x": [None], "y": [1.5]}, schema={"x": pl.Float64, "y": pl.Float64}))
    write(tmp_path / f"b.{suffix}", pl.DataFrame({"x": [2.5], "y": [2.5]}))
    engine = opened(tmp_path)
    assert used(engine, "x", "y") == [(None, 1.5), (2.5, 2.5)] and engine.schema()["x"].kind == "number"


def test_a_csv_that_is_only_a_header(tmp_path: Path, opened: Opened) -> None:
    """Beside files with rows it adds none; `y` and `f` look like values to DuckDB."""
    write(tmp_path / "b.csv", pl.DataFrame({"y": [1.5], "f": [2]}))
    (tmp_path / "a.csv").write_text("y,f\n")
    assert opened(tmp_path / "a.csv").row_count() is None and list(opened(tmp_path / "a.csv").schema()) == ["y", "f"]
    assert used(opened(tmp_path), "y", "f") == [(1.5, 2.0)]


def test_ways_of_writing_csv(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "a.csv").write_bytes(b'a,b\r\n1,"x,\r\n""y"""\r\n2,z\r\n')
    (tmp_path / "b.csv").write_text("b;a\nw;3.5\n")
    engine = opened(tmp_path)
    assert used(engine, "a", "b") == [(1.0, 'x,\r\n"y"'), (2.0, "z"), (3.5, "w")]


@pytest.mark.parametrize("name", ["a.parquet", "a.pq", "a.csv", "a.tsv", "a.json", "a.ndjson", "a.arrow", "a.feather"])
def test_formats(name: str, tmp_path: Path, opened: Opened) -> None:
    write(tmp_path / name, pl.DataFrame({"x": [1.5, 2.5], "g": ["b", "a"]}))
    engine = opened(tmp_path / name)
    assert used(engine, "x", "g") == [(1.5, "b"), (2.5, "a")]
    assert engine.identity().files == (str(tmp_path / name),) and engine.identity().bytes == (tmp_path / name).stat().st_size


def test_a_compressed_csv(tmp_path: Path, opened: Opened) -> None:
    import gzip

    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"x\n1.5\n"))
    assert used(opened(tmp_path), "x") == [(1.5,)]


@pytest.mark.parametrize("name", ["it's.parquet", "a[1].parquet", "what?.parquet", "a b ü.parquet"])
def test_paths_are_literal_when_they_exist(name: str, tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "a1.parquet", x=[9.0])
    parquet(tmp_path / "whatX.parquet", x=[9.0])
    assert used(opened(parquet(tmp_path / name, x=[1.0])), "x") == [(1.0,)]


def test_a_hive_tree(tmp_path: Path, opened: Opened) -> None:
    for year in (2023, 2024):
        for site in ("a", "b"):
            parquet(tmp_path / f"year={year}" / f"site={site}" / "part.parquet", x=[float(year)])
    engine = opened(tmp_path)
    assert list(engine.schema()) == ["x", "site", "year"]
    assert used(engine, "x", "year", "site")[1] == (2023.0, 2023.0, "b")
    assert used(opened(str(tmp_path / "*" / "*" / "*.parquet")), "site")[0] == ("a",)


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_a_hive_tree_of_text(suffix: str, tmp_path: Path, opened: Opened) -> None:
    """Files written in two ways, a key that looks like a number in one of them, one called like a column of the reader's."""
    write(tmp_path / "f0=7" / f"zone=01.{suffix}", pl.DataFrame({"x": [1.5], "y": [2.5]}))
    write(tmp_path / "f0=9" / f"part.{suffix}", pl.DataFrame({"y": [4.5], "x": [3.5]}))
    write(tmp_path / "f0=__HIVE_DEFAULT_PARTITION__" / f"part.{suffix}", pl.DataFrame({"y": [6.5], "x": [5.5]}))
    engine = opened(tmp_path)
    assert list(engine.schema()) == ["x", "y", "f0"]
    assert used(engine, "f0", "x", "y") == [(7.0, 1.5, 2.5), (9.0, 3.5, 4.5), (None, 5.5, 6.5)]
    assert used(opened(source(tmp_path, types={"f0": "VARCHAR"})), "f0")[0] == ("7",)
    assert list(opened(tmp_path / "f0=9" / f"part.{suffix}").schema()) == ["y", "x"]
    write(tmp_path / "F0=1" / f"part.{suffix}", pl.DataFrame({"f0": [4.5]}))
    with pytest.raises(DataError, match="differ only by case"):
        opened(tmp_path / "F0=1")


def test_a_hive_key_that_differs_by_case(tmp_path: Path) -> None:
    parquet(tmp_path / "X=1" / "part.parquet", x=[1.0])
    with pytest.raises(DataError, match="differ only by case"):
        open_source(tmp_path)


def test_a_directory_takes_all_parquet_inside(tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "a.parquet", x=[1.0])
    parquet(tmp_path / "deep" / "b.parquet", x=[2.0])
    parquet(tmp_path / "_temporary" / "c.parquet", x=[3.0])
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "notes.txt").write_text("hello")
    assert used(opened(tmp_path), "x") == [(1.0,), (2.0,)]


@pytest.mark.parametrize("count", [10, 40_000])
def test_a_file_listed_twice_is_read_twice(count: int, tmp_path: Path, opened: Opened) -> None:
    """As DuckDB and Polars do."""
    one = parquet(tmp_path / "a.parquet", i=list(range(count)))
    other = parquet(tmp_path / "b.parquet", i=pa.array(range(5), pa.int8()))
    engine = opened([str(one), str(other), str(one)])
    wanted = [*range(count), *range(5), *range(count)]
    assert engine.row_count() == len(wanted)
    numbered = Columns(values=frozenset([0]), row_number=True)
    table = engine.query(sqlglot.parse_one("select c0, rn from src order by rn", dialect="duckdb"), numbered).read_all()
    assert (table["c0"].to_pylist(), table["rn"].to_pylist()) == (wanted, list(range(len(wanted))))


def test_a_dataset_whose_files_are_not_of_its_schema(tmp_path: Path) -> None:
    """An ordered dictionary is read at open, for its levels: what fails there names column and files."""
    levels = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), ["b", "a"], ordered=True)
    feather.write_feather(pa.table({"g": [1, 2], "y": [1.0, 2.0]}), tmp_path / "a.arrow")
    feather.write_feather(pa.table({"g": levels, "y": [1.0, 2.0]}), tmp_path / "b.arrow")
    paths = [str(tmp_path / "a.arrow"), str(tmp_path / "b.arrow")]
    data = ds.dataset(paths, format="ipc", schema=pa.schema([("g", levels.type), ("y", pa.float64())]))
    with pytest.raises(DataError, match="'g' cannot be read from .*a.arrow") as caught:
        open_source(data)
    assert (caught.value.code, caught.value.column) == ("column_files", "g")
    open_source(paths).close()  # from the files themselves: an error only where the column is used


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="pipe.csv is no file that can be read twice"):
        open_source(tmp_path / "pipe.csv")


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs this may read all files, so the system's refusal is played."""
    path = parquet(tmp_path / "a.parquet", x=[1.0])

    def refused(file: str, *_: Any) -> Any:
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr(files, "_state", refused)
    with pytest.raises(DataError, match="cannot read .*a.parquet: Permission denied") as caught:
        open_source(path)
    assert caught.value.code == "file_unreadable"


def test_a_delta_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_delta_log").mkdir()
    parquet(tmp_path / "a.parquet", x=[1.0])
    with pytest.raises(DataError, match="Delta"):
        open_source(tmp_path)


BAD = {
    "absent.parquet": "no file matches", "*.parquet": "no file matches", "folder": "no file in the directory",
    "empty.csv": "is empty", "text.parquet": "is not a Parquet file",
    "cut.parquet": "cut.parquet is cut off", "a.xlsx": "parquet, csv", "a": "parquet, csv", "a.duckdb": "mp.table", "a.db": "mp.table",
    "s4://bucket/a.parquet": "s4://", "broken.arrow": "broken.arrow", "latin.csv": "latin.csv is not UTF-8 text in line 2",
    "cut.csv.gz": "cut.csv.gz is cut off, or not compressed", "plain.csv.gz": "plain.csv.gz is cut off, or not compressed",
    "ragged.csv": "ragged.csv: its lines differ in the number of values between ','",
}
HELD = {
    "empty.csv": b"", "cut.parquet": b"PAR1 and no more", "latin.csv": "x,g\n1,caf\xe9\n".encode("latin-1"),
    "cut.csv.gz": gzip.compress(b"".join(b"%d,%d\n" % (k, k * k) for k in range(900)))[:-400], "ragged.csv": b"x,g\n1,2\n2,3,4\n5,6\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_paths_that_are_no_data(name: str, tmp_path: Path) -> None:
    if name == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter.txt").write_text("dear")
    elif "*" not in name and "absent" not in name and "://" not in name:
        (tmp_path / name).write_bytes(HELD.get(name, b"this is text and not that at all"))
    with pytest.raises(DataError) as caught:
        open_source(name if "://" in name else str(tmp_path / name))
    assert BAD[name] in str(caught.value) and " Error: " not in str(caught.value)


def test_several_formats_and_no_paths(tmp_path: Path) -> None:
    files = [write(tmp_path / name, pl.DataFrame({"x": [1.0]})) for name in ("a.csv", "a.parquet")]
    with pytest.raises(DataError, match="several formats"):
        open_source(files)
    with pytest.raises(DataError, match="empty"):
        open_source([])


NO_DATA = [1, {"x": [1]}, None, object(), [1], [pl.DataFrame({"x": [1]})], source(3)]  # type: ignore[arg-type]


@pytest.mark.parametrize("data", NO_DATA)
def test_what_is_no_data(data: Any) -> None:
    with pytest.raises(DataError, match="accepted are|is not a path") as caught:
        open_source(data)
    assert caught.value.code == "source_type"


# ---- one set of rows ----


def grown(path: Path) -> None:
    parquet(path, x=[1.0, 2.0, 3.0])


def same_size(path: Path) -> None:
    status = path.stat()
    parquet(path, x=[1.0, 7.0])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [grown, same_size, os.unlink, lambda path: os.truncate(path, 50)])
def test_a_file_that_changes_between_scans(change: Callable[[Path], None], tmp_path: Path, opened: Opened) -> None:
    parquet(tmp_path / "a.parquet", x=[0.0])
    path = parquet(tmp_path / "b.parquet", x=[1.0, 2.0])
    engine = opened(tmp_path)
    engine.check_unchanged()
    change(path)
    with pytest.raises(DataError, match="the source changed while it was read.*b.parquet") as caught:
        engine.check_unchanged()
    assert caught.value.code == "source_changed"


def test_a_scan_that_fails_on_a_changed_file_says_so(tmp_path: Path, opened: Opened) -> None:
    path = parquet(tmp_path / "a.parquet", x=list(range(1000)))
    engine = opened(path)
    os.truncate(path, 40)
    with pytest.raises(DataError, match="the source changed"):
        used(engine, "x")


# ---- databases ----


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "store.duckdb"
    with duckdb.connect(str(path)) as con:
        con.execute("create schema s; create table s.\"My T\" as select range::double as x from range(5)")
        con.execute("create table plain as select 'a'::enum('b', 'a') as e; create view v as from plain")
    return path


def test_a_database_file_is_opened_read_only(database: Path, opened: Opened) -> None:
    assert used(opened(table('s."My T"', database)), "x")[4] == (4.0,)
    assert opened(table("PLAIN", str(database))).schema()["e"].levels == ("b", "a")
    assert used(opened(table("main.v", database)), "e") == [("a",)]
    assert used(opened(query('select x + 1 as z from s."My T" order by x desc;', database)), "z")[0] == (5.0,)
    with duckdb.connect(str(database.with_name("memory.duckdb"))) as con:
        con.execute("create table t as select 1.5::double as x")
        with pytest.raises(ResourceError, match="pass the connection"):
            opened(table("t", database.with_name("memory.duckdb")))
    assert used(opened(table("t", database.with_name("memory.duckdb"))), "x") == [(1.5,)]
    with pytest.raises(DataError, match="no database file"):
        opened(table("t", database.with_name("other.duckdb")))


def test_a_database_that_is_none_or_not_free(database: Path) -> None:
    other = database.with_name("text.duckdb")
    other.write_text("this is text and not that at all")
    with pytest.raises(DataError, match="text.duckdb is not a DuckDB database"):
        open_source(table("t", other))
    with pytest.raises(DataError, match="text.duckdb is not a DuckDB database"):
        mp.load(other)
    with pytest.raises(DataError, match="there is no table 't'") as caught:
        open_source(table("t", database))
    assert caught.value.hint == "known: 'plain', 's.My T', 'v'"  # none of the engine's own
    code = f"import duckdb, time; held = duckdb.connect({str(database)!r}); print('open', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        try:
            with pytest.raises(ResourceError, match=rf"is open in another process, {process.pid}") as refused:
                open_source(table("plain", database))
            assert refused.value.code == "locked"
        finally:
            process.kill()


@pytest.mark.parametrize("name", ["plane", "s.plain", "read_csv('a.csv')", "'a.csv'", "con", "plain; drop table plain", ""])
def test_a_table_that_is_not_there(name: str, database: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_source(table(name, database))
    assert caught.value.code == "table_not_found"
    assert name != "plane" or "did you mean 'plain'" in str(caught.value)


def test_a_table_named_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.csv").write_text("x\n1\n")
    with pytest.raises(DataError, match="no table"):
        open_source(table("c.csv", duckdb.connect()))


STATEMENTS = [
    "insert into t values (1.0)", "create table z as select 1", "select 1; select 2", "pragma version", "set threads = 1", "",
    "with a as (insert into t values (3.0) returning x) select * from a", "select 1) as a, (select 2", "selec",
]  # fmt: skip


@pytest.mark.parametrize("sql", STATEMENTS)
def test_only_select_runs_on_a_users_connection(sql: str) -> None:
    con = duckdb.connect()
    con.execute("create table t as select 1.0::double as x")
    with pytest.raises(DataError) as caught:
        open_source(query(sql, con))
    assert caught.value.code == ("engine_refused" if sql.startswith(("with", "select 1)", "selec")) and sql != STATEMENTS[2] else "query")
    assert con.sql("from t").fetchall() == [(1.0,)] and len(con.sql("from duckdb_tables()").fetchall()) == 1


def test_a_query_keeps_its_order(opened: Opened) -> None:
    con = duckdb.connect(config={"threads": 4})
    con.execute("create table t as select hash(range) % 1000003 as x from range(300000)")
    engine = opened(query("from t order by x -- sorted", con))
    text = "select sum(case when c0 < p then 1 else 0 end) as n from (select c0, lag(c0) over (order by rn) as p from src)"
    assert rows(engine, text, Columns(frozenset([0]), row_number=True)) == [(0,)]
    assert engine.identity().ordered
    assert not opened(query("select a.x from t as a join t as b on a.x = b.x limit 5", con)).identity().ordered


class Wrapper:
    """What dbt hands to a Python model: not a connection, but one inside."""

    def __init__(self, con: duckdb.DuckDBPyConnection) -> None:
        self._con = con

    def __getattr__(self, name: str) -> Any:
        return getattr(self._con, name)


def test_a_wrapped_connection(opened: Opened) -> None:
    con = Wrapper(as_stored(pl.DataFrame({"x": [1.5]})))
    assert used(opened(table("stored", con)), "x") == used(opened(query("from stored", con)), "x") == [(1.5,)]


def test_a_temporary_table(opened: Opened) -> None:
    con = duckdb.connect()
    con.execute("create temp table t as select 2.0::double as x")
    assert used(opened(table("t", con)), "x") == [(2.0,)]


def test_a_connection_is_no_data() -> None:
    with pytest.raises(DataError, match="mp.table"):
        open_source(duckdb.connect())
    with pytest.raises(DataError, match="neither"):
        open_source(table("t", 3))


# ---- streams ----


class Stream:
    """An object with an Arrow stream, given `times` times."""

    def __init__(self, data: pa.Table, times: int) -> None:
        self.data, self.times = data, times

    def __arrow_c_stream__(self, requested: object = None) -> object:
        self.times -= 1
        if self.times < 0:
            raise RuntimeError("gone")
        return self.data.__arrow_c_stream__(requested)


SIMPLE = pa.table({"x": [1.5, 2.5], "g": ["b", "a"]})


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Options]:
    """Options with a temporary directory that must be empty again in the end."""
    path = tmp_path / "scratch"
    path.mkdir()
    yield Options(temp_directory=str(path))
    assert os.listdir(path) == []


@pytest.mark.parametrize("times, rescannable", [(1, False), (2, True)])
def test_streams_are_spooled_once(times: int, rescannable: bool, scratch: Options) -> None:
    engine = open_source(Stream(SIMPLE, times), options=scratch)
    assert glob.glob(f"{scratch.temp_directory}/*/stream.arrow")
    for _ in range(2):
        assert used(engine, "x", "g") == [(1.5, "b"), (2.5, "a")]
    assert engine.identity().rescannable is rescannable and engine.row_count() == 2
    engine.close()
    assert os.listdir(str(scratch.temp_directory)) == []


def test_a_stream_that_fails_leaves_nothing(scratch: Options) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield SIMPLE.to_batches()[0]
        raise ValueError("the wire broke")

    with pytest.raises(DataError, match="the wire broke"):
        open_source(pa.RecordBatchReader.from_batches(SIMPLE.schema, batches()), options=scratch)
    with pytest.raises(DataError):
        open_source(Stream(SIMPLE, 0), options=scratch)


def test_dictionaries_that_change_between_batches(opened: Opened) -> None:
    batches = [pa.record_batch({"g": pa.array(part).dictionary_encode()}) for part in (["a", "b"], ["c", None])]
    engine = opened(pa.RecordBatchReader.from_batches(batches[0].schema, batches))
    assert used(engine, "g") == [("a",), ("b",), ("c",), (None,)] and engine.schema()["g"].levels is None


@pytest.mark.parametrize("close", [True, False])
def test_the_temporary_directory_goes(close: bool, scratch: Options) -> None:
    import gc

    engine = open_source(SIMPLE, options=scratch)
    assert os.listdir(str(scratch.temp_directory))
    if close:
        engine.close()
        assert os.listdir(str(scratch.temp_directory)) == []
    del engine
    gc.collect()


def test_a_temporary_directory_that_is_not_there() -> None:
    with pytest.raises(MlpipeError) as caught:
        open_source(SIMPLE, options=Options(temp_directory=os.path.join(tempfile.gettempdir(), "no", "such")))
    assert caught.value.code == "temp_directory"


@pytest.mark.parametrize("wrap", [lambda t: t.to_batches()[0], lambda t: ds.dataset(t), lambda t: nw.from_native(t, eager_only=True)])
def test_other_arrow_data(wrap: Callable[[pa.Table], Any], opened: Opened) -> None:
    engine = opened(wrap(SIMPLE))
    assert used(engine, "x", "g") == used(engine, "x", "g") == [(1.5, "b"), (2.5, "a")]


@pytest.mark.parametrize("kind", ["polars", "arrow", "stream", "pandas", "feather", "dataset", "filtered"])
def test_numbers_of_half_precision(kind: str, tmp_path: Path) -> None:
    """DuckDB has none; as covariate, key in rows that are sorted, and in rows that come back."""
    held = pl.DataFrame({"y": [0.5, 3.0, 2.0, 5.5, 1.0, 4.5] * 3, "x": [0.1, 2.5, None] * 6, "g": [0.5, 1.5, 2.5, 0.5, 2.5, 1.5] * 3})
    half = held.with_columns(pl.col("x", "g").cast(pl.Float16))
    table = half.to_arrow()
    pq.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, str(tmp_path / "a.feather"))
    files = ds.dataset(tmp_path / "a.parquet")
    data = {
        "polars": half, "arrow": table, "stream": table.to_reader(), "pandas": half.to_pandas(), "feather": tmp_path / "a.feather",
        "dataset": files, "filtered": files.filter(ds.field("y") < 5),
    }[kind]  # fmt: skip
    expected = half.with_columns(pl.col("x", "g").cast(pl.Float32)).filter(pl.col("y") < (5 if kind == "filtered" else 9))
    fit, want = (mp.gee("y ~ x", rows, groups="g", corr="independence") for rows in (data, expected))
    assert fit.nobs == want.nobs and fit.fixef() == pytest.approx(want.fixef(), abs=1e-12)
    if kind != "stream":
        rows = mp.ols("y ~ x", data).augment().read_all()
        assert rows["g"].to_pylist() == expected["g"].to_list() and rows.schema.field("g").type == pa.float32()


def test_a_dataset_of_files(tmp_path: Path, opened: Opened) -> None:
    path = parquet(tmp_path / "a.parquet", x=[1.5])
    engine = opened(ds.dataset(str(path)))
    assert used(engine, "x") == [(1.5,)]
    grown(path)
    with pytest.raises(DataError, match="the source changed"):
        engine.check_unchanged()


def test_pandas(opened: Opened) -> None:
    frame = pd.DataFrame(
        {"x": [1.5, None, 3.5], "g": ["b", None, "a"], "c": pd.Categorical(["q", "p", "q"]), "late": [None] * 2 + ["text"]}, index=[5, 3, 1]
    )
    engine = opened(frame)
    assert list(engine.schema()) == ["x", "g", "c", "late"] and engine.schema()["c"].levels is None
    assert used(engine, "x", "g", "late") == [(1.5, "b", None), (None, None, None), (3.5, "a", "text")]
    with pytest.raises(DataError, match="cannot become an Arrow table"):
        opened(pd.DataFrame({"x": [1, "a", None]}))
    with pytest.raises(DataError, match="stream of Series"):
        opened(pd.Series([1.0]))


def test_lazy_narwhals_frames_are_read_where_they_lie(opened: Opened) -> None:
    for native, dialect in ((pl.from_arrow(SIMPLE).lazy(), "polars"), (duckdb.connect().from_arrow(SIMPLE), "duckdb")):
        engine = opened(nw.from_native(native))
        assert engine.dialect == dialect and used(engine, "x", "g") == [(1.5, "b"), (2.5, "a")]
    with pytest.raises(ConfigError, match="set them on your connection|memory_limit cannot be set"):
        opened(nw.from_native(duckdb.connect().from_arrow(SIMPLE)), options=Options(memory_limit="1GB"))


def test_two_columns_of_one_name(opened: Opened) -> None:
    with pytest.raises(DataError, match="two columns"):
        opened(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]))


ORDERED = pa.table({"d": pa.DictionaryArray.from_arrays(pa.array([2, 0, 1], pa.int8()), ["z", "m", "a", "unused"], ordered=True)})


def test_ordered_dictionaries_through_parquet_and_arrow(tmp_path: Path, opened: Opened) -> None:
    for i in range(2):
        pq.write_table(ORDERED, tmp_path / f"{i}.parquet")
    feather.write_feather(ORDERED, str(tmp_path / "a.arrow"))
    for data in (tmp_path, tmp_path / "a.arrow", ORDERED, ORDERED.to_reader(), ds.dataset(str(tmp_path / "0.parquet"))):
        engine = opened(data)
        assert engine.schema()["d"].levels == ("z", "m", "a", "unused"), data
        assert used(engine, "d")[:3] == [("a",), ("z",), ("m",)]


def test_files_that_declare_different_orders(tmp_path: Path, opened: Opened) -> None:
    for i, levels in enumerate((["a", "b", "c"], ["a", "c"], ["c", "b", "a"])):
        pl.DataFrame({"e": ["a"]}, schema={"e": pl.Enum(levels)}).write_parquet(tmp_path / f"{i}.parquet")
    engine = opened([tmp_path / "0.parquet", tmp_path / "1.parquet"])
    assert engine.schema()["e"].levels == ("a", "b", "c") and not engine.identity().notes
    engine = opened(tmp_path)
    assert engine.schema()["e"].levels is None and "different orders" in engine.identity().notes[0]


def test_enum_values_with_semicolons(tmp_path: Path, opened: Opened) -> None:
    levels = ["ö;2", ";", "1;", "", "b"]
    frame = pl.DataFrame({"e": ["b"]}, schema={"e": pl.Enum(levels)})
    frame.write_parquet(tmp_path / "a.parquet")
    for data in (tmp_path, frame.to_arrow(), frame):
        assert opened(data).schema()["e"].levels == tuple(levels)


# ---- URLs ----


def test_file_urls(tmp_path: Path, opened: Opened) -> None:
    path = parquet(tmp_path / "a b.parquet", x=[1.5])
    assert used(opened("file://" + urllib.parse.quote(str(path))), "x") == [(1.5,)]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that `bucket://` URLs reach through pyarrow's filesystems."""
    root = tmp_path / "bucket"
    root.mkdir()
    tree = fs.SubTreeFileSystem(str(root), fs.LocalFileSystem())
    monkeypatch.setattr(remote, "from_uri", lambda url: (tree, url.removeprefix("bucket://")))
    return root


@pytest.mark.parametrize("suffix", ["parquet", "csv", "arrow"])
def test_other_schemes(suffix: str, bucket: Path, opened: Opened, scratch: Options) -> None:
    write(bucket / "deep" / f"a.{suffix}", pl.DataFrame({"x": [1, 2], "g": ["b", "a"]}))
    write(bucket / "deep" / f"b.{suffix}", pl.DataFrame({"x": [1.5], "g": ["c"]}))
    for url in ("bucket://deep", f"bucket://deep/*.{suffix}", [f"bucket://deep/{n}.{suffix}" for n in "ab"]):
        engine = open_source(url, options=scratch)
        assert used(engine, "x", "g") == [(1.0, "b"), (2.0, "a"), (1.5, "c")]
        engine.check_unchanged()
        engine.close()
    with pytest.raises(DataError, match="no file matches"):
        open_source("bucket://deep/c.parquet")


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet", "arrow"])
def test_a_hive_tree_behind_a_url(suffix: str, bucket: Path, opened: Opened) -> None:
    for year in (2023, 2024):
        write(bucket / "lake" / f"year={year}" / "site=a b" / f"part.{suffix}", pl.DataFrame({"x": [float(year)]}))
    for url in ("bucket://lake", f"bucket://lake/*/*/*.{suffix}"):
        engine = opened(url)
        assert set(engine.schema()) == {"x", "year", "site"}
        assert used(engine, "x", "year", "site") == [(2023.0, 2023.0, "a b"), (2024.0, 2024.0, "a b")]


@pytest.mark.parametrize("day", ["2024-02-29", "2024-02-30", "7", "07", "9223372036854775808", "__HIVE_DEFAULT_PARTITION__"])
def test_keys_of_directories_have_one_type_wherever_they_lie(day: str, bucket: Path, opened: Opened) -> None:
    """Of local Parquet files, which DuckDB reads, of remote ones and of Arrow files; also where the files hold a column of that name."""
    found = []
    for folder, suffix, held in (("a", "parquet", {}), ("b", "arrow", {}), ("c", "parquet", {"day": ["file"]})):
        for value in (day, "2024-03-01" if "-" in day else "12"):
            write(bucket / folder / f"day={value}" / f"part.{suffix}", pl.DataFrame({"x": [1.0], **held}))
        for data in (bucket / folder, f"bucket://{folder}"):
            engine = opened(data)
            key = list(engine.schema()).index("day")
            keys = rows(engine, f"select k{key} from src", Columns(keys=frozenset([key])))
            found.append((engine.schema()["day"].name, sorted(map(str, keys))))
    assert found == [found[0]] * 6 and len(found[0][1]) == 2


def test_a_remote_file_that_changes(bucket: Path, opened: Opened) -> None:
    path = parquet(bucket / "a.parquet", x=[1.0])
    engine = opened("bucket://a.parquet")
    grown(path)
    with pytest.raises(DataError, match="the source changed"):
        engine.check_unchanged()


def test_a_store_out_of_reach_is_worth_a_retry(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str) -> Any:
        raise OSError("When resolving region for bucket 'b': AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(remote, "from_uri", unreachable)
    with pytest.raises(ResourceError, match="bucket://b/a.parquet: .*NETWORK_CONNECTION") as caught:
        open_source("bucket://b/a.parquet")
    assert caught.value.code == "io"


def test_remote_copies_are_refused_by_a_full_disk(bucket: Path, monkeypatch: pytest.MonkeyPatch, scratch: Options) -> None:
    write(bucket / "a.csv", pl.DataFrame({"x": [1]}))

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(fs, "copy_files", full)
    with pytest.raises(MlpipeError) as caught:
        open_source("bucket://a.csv", options=scratch)
    assert caught.value.code == "io"
    assert remote.locate(["bucket://a.csv"])[1] == ["a.csv"]


# ---- options ----


@pytest.mark.parametrize("given", [{"memory_limit": "1GB"}, {"threads": 2}, {"temp_directory": "/tmp"}])
def test_settings_of_a_users_connection(given: dict[str, Any]) -> None:
    con = as_stored(pl.DataFrame({"x": [1.0]}))
    for data in (con.table("stored"), table("stored", con), query("from stored", con)):
        with pytest.raises(ConfigError, match="set them on your connection"):
            open_source(data, options=Options(**given))


def test_settings_of_an_engine_of_ours(opened: Opened) -> None:
    options = Options(memory_limit="4GiB", threads=1)
    engine = opened(SIMPLE, options=options)
    text = "select current_setting('memory_limit') as m, current_setting('threads') as t"
    ((limit, threads),) = rows(engine, text, Columns())
    assert parse_bytes(limit) == pytest.approx(options.engine_bytes, rel=0.05) and threads == 1


def test_threads_of_polars() -> None:
    with pytest.raises(ConfigError, match="POLARS_MAX_THREADS"):
        open_source(pl.DataFrame({"x": [1]}), options=Options(threads=2))


@pytest.mark.parametrize("text, size", [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("512mb", 512 * 10**6), (1000, 1000), ("7", 7)])
def test_parse_bytes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 parsecs", "0", True, "1e9"])
def test_parse_bytes_refuses(text: Any) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


WRONG = [
    {"memory_limit": "much"}, {"threads": 0}, {"threads": 1.5}, {"max_passes": 0}, {"seed": -1}, {"tol": 0.0}, {"tol": float("nan")},
    {"progress": "yes"}, {"curvature": "expectd"}, {"on_nonconvergence": "stop"}, {"temp_directory": 3},
]  # fmt: skip


@pytest.mark.parametrize("given", WRONG)
def test_options_refuse(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Options(**given)
    assert "curvature" not in given or "did you mean 'expected'" in str(caught.value)


def test_options_know_what_was_set() -> None:
    assert Options().memory_bytes == 2 * 10**9 and Options().engine_settings == ()
    assert Options(memory_limit="2GB", threads=1).engine_settings == ("memory_limit", "threads")


# ---- keys come back as they were


LEVELS = np.arange(60) % 6
DAYS = np.datetime64("2026-01-01") + LEVELS.astype("timedelta64[D]")
KEYS = {
    "zone": pa.array(DAYS.astype("datetime64[us]"), pa.timestamp("us", "Europe/Berlin")),
    "seconds": pa.array(DAYS.astype("datetime64[s]"), pa.timestamp("s")),
    "date64": pa.array(DAYS.astype("datetime64[D]")).cast(pa.date64()),
    "duration": pa.array(LEVELS, pa.duration("ms")),
    "time": pa.array(LEVELS.astype(np.int32), pa.time32("s")),
    "large": pa.array([f"l{i}" for i in LEVELS], pa.large_string()),
    "dictionary": pa.array([f"l{i}" for i in LEVELS]).dictionary_encode(),
    "ordered": pa.DictionaryArray.from_arrays(pa.array(LEVELS, pa.int8()), pa.array(list("fedcba")), ordered=True),
    "numbers": pa.array(LEVELS * 10).dictionary_encode(),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_come_back_in_the_types_of_arrow(name: str) -> None:
    """From a table and from a stream; of one factor, of one of several, and of a generalized model."""
    key = KEYS[name]
    data = pa.table({"k": key, "m": np.arange(60) // 7, "y": np.sin(np.arange(60.0)) + LEVELS, "z": np.arange(60) % 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two = mp.lmm("y ~ 1 + (1 | k)", data), mp.lmm("y ~ 1 + (1 | k) + (1 | m)", data.to_reader())
        three = mp.glmm("z ~ 1 + (1 | k)", data, family="binomial")
    for fit in (one, two, three):
        modes = fit.ranef("k", wide=True)
        assert modes.schema.field("k").type == key.type and sorted(modes["k"].to_pylist()) == sorted(set(key.to_pylist()))
        assert fit.ranef("k", stream=True).read_all()["k"].type == key.type
        fit.predict(data).read_all()
    if name == "ordered":
        assert one.ranef()["k"].combine_chunks().dictionary.to_pylist() == list("fedcba")


@pytest.mark.parametrize("kind", ["table", "query", "view", "frame", "lazy"])
def test_a_live_source_that_grew_since_the_fit_is_noticed(kind: str, tmp_path: Path) -> None:
    rows = [(g, float(g + i % 3)) for g in range(6) for i in range(5)]
    frame = pl.DataFrame(rows, schema=["g", "y"], orient="row")
    con = duckdb.connect()
    con.execute("create table t as from frame; create view v as from t")
    lazy = pl.concat([frame.lazy(), pl.scan_csv(tmp_path / "more.csv")])
    (tmp_path / "more.csv").write_text("g,y\n1,2.0\n")
    data = {"table": table("t", con), "query": query("select * from t", con), "view": table("v", con), "frame": frame, "lazy": lazy}[kind]
    fit = mp.lmm("y ~ 1 + (1 | g)", data)
    assert fit.augment().read_all().num_rows == 30 + (kind == "lazy")
    con.execute("insert into t values (1, 9)")
    frame.extend(frame.head(1))
    (tmp_path / "more.csv").write_text("g,y\n1,2.0\n2,3.0\n")
    with pytest.raises(DataError, match="the source changed since the fit") as caught:
        fit.augment()
    assert caught.value.code == "source_changed" and (kind == "frame" or "has 3" in caught.value.message)
