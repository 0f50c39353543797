"""Every engine gives the same rows, types and levels for the same data."""
from __future__ import annotations

import datetime as dt
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from sqlglot import exp, parse_one

import mlpipe as mp
from mlpipe.engines.base import BUFFER_BYTES, Columns, Engine, spread
from mlpipe.engines.dialects import render
from mlpipe.errors import ConfigError, DataError, MlpipeError, ResourceError
from mlpipe.options import Options
from mlpipe.sources import open_source, query, table

from .conftest import as_data, as_engine

Opened = Callable[..., Engine]
UTC = dt.UTC


def sql(text: str) -> exp.Query:
    tree = parse_one(text, dialect="duckdb")
    assert isinstance(tree, exp.Query)
    return tree


def rows(engine: Engine, text: str, columns: Columns, **arguments: Any) -> list[tuple[Any, ...]]:
    result = engine.query(sql(text), columns, **arguments).read_all()
    return [tuple(row.values()) for row in result.to_pylist()]


def values(engine: Engine, *names: str) -> list[tuple[Any, ...]]:
    """The columns of these names as covariates, in the source's order."""
    positions = [list(engine.schema()).index(name) for name in names]
    chosen = ", ".join(f"c{i}" for i in positions)
    return rows(engine, f"select {chosen} from src order by rn", Columns(frozenset(positions), row_number=True))


TYPED = pl.DataFrame(
    {
        "int8": [1, -2, None],
        "big": [2**53 + 1, -(2**62), None],
        "unsigned": [2**64 - 1, 0, None],
        "decimal": [Decimal("0.07"), Decimal("-12.50"), None],
        "single": [0.1, -2.5, None],
        "double": [0.1, float("nan"), None],
        "flag": [True, False, None],
        "date": [dt.date(1969, 12, 31), dt.date(2024, 2, 29), None],
        "naive": [dt.datetime(1970, 1, 1, 0, 0, 1, 500000), dt.datetime(2020, 1, 1, 12), None],
        "zoned": [dt.datetime(2020, 7, 1, 10, tzinfo=UTC), dt.datetime(2020, 1, 1, tzinfo=UTC), None],
        "span": [dt.timedelta(days=1, seconds=1.5), dt.timedelta(seconds=-2), None],
        "clock": [dt.time(1, 2, 3), dt.time(0, 0, 0, 500000), None],
        "text": ["b", "Ä'\"", None],
        "size": ["mid", "low", None],
        "category": ["z", "a", None],
    },
    schema={
        "int8": pl.Int8, "big": pl.Int64, "unsigned": pl.UInt64, "decimal": pl.Decimal(18, 2), "single": pl.Float32,
        "double": pl.Float64, "flag": pl.Boolean, "date": pl.Date, "naive": pl.Datetime("us"), "zoned": pl.Datetime("us", "Europe/Berlin"),
        "span": pl.Duration("us"), "clock": pl.Time, "text": pl.String, "size": pl.Enum(["low", "mid", "high"]), "category": pl.Categorical,
    },
)  # fmt: skip
EXPECTED = {
    "int8": (1.0, -2.0), "big": (2.0**53, -(2.0**62)), "unsigned": (2.0**64, 0.0), "decimal": (0.07, -12.5),
    "single": (0.10000000149011612, -2.5), "flag": (True, False), "date": (-1.0, 19782.0), "naive": (1.5, 1577880000.0),
    "zoned": (1593597600.0, 1577836800.0), "span": (86401.5, -2.0), "clock": (3723.0, 0.5), "text": ("b", "Ä'\""), "size": ("mid", "low"),
    "category": ("z", "a"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_covariates_are_the_same_on_every_engine(name: str, typed_kind: str, tmp_path: Path, opened: Opened) -> None:
    if typed_kind == "pandas" and name == "date":
        pytest.skip("pandas has no dates")
    engine = opened(as_data(TYPED.select(name), typed_kind, tmp_path))
    assert [row[0] for row in values(engine, name)] == [*EXPECTED[name], None]
    kind = {"flag": "logical", "text": "text", "size": "text", "category": "text"}.get(name, "number")
    assert engine.schema()[name].kind == kind or typed_kind == "pandas" and name == "flag"
    assert engine.schema()[name].exact_integer == (name in ("int8", "big", "unsigned")) or typed_kind == "pandas"


def test_nan_stays_nan_and_null_null(typed_kind: str, tmp_path: Path, opened: Opened) -> None:
    first, second, third = (row[0] for row in values(opened(as_data(TYPED.select("double"), typed_kind, tmp_path)), "double"))
    assert first == 0.1 and third is None
    assert second is None if typed_kind == "pandas" else second != second  # pandas has one missing value for both


@pytest.mark.parametrize("name", ["int8", "big", "unsigned", "decimal", "flag", "date", "naive", "zoned", "text", "size", "category"])
def test_keys_keep_their_values(name: str, typed_kind: str, tmp_path: Path, opened: Opened) -> None:
    if typed_kind == "pandas" and name == "date":
        pytest.skip("pandas has no dates")
    frame = TYPED.select(name).drop_nulls()
    engine = opened(as_data(frame, typed_kind, tmp_path))
    found = rows(engine, "select k0 from src order by rn", Columns(keys=frozenset([0]), row_number=True))
    assert [row[0] for row in found] == frame[name].to_list()


def test_csv_gives_numbers_and_text(tmp_path: Path, opened: Opened) -> None:
    engine = opened(as_data(TYPED.select("int8", "single", "flag", "date", "text"), "csv", tmp_path))
    assert [kind.kind for kind in engine.schema().values()] == ["number", "number", "logical", "number", "text"]
    assert values(engine, "int8", "date", "text") == [(1.0, -1.0, "b"), (-2.0, 19782.0, "Ä'\""), (None, None, None)]


def test_wide_integers_of_duckdb(opened: Opened) -> None:
    con = duckdb.connect()
    relation = con.sql("select 2::hugeint ** 100 as h, 9007199254740993::hugeint as k, 5::uhugeint as u")
    engine = opened(relation)
    assert values(engine, "h", "u") == [(2.0**100, 5.0)]
    assert rows(engine, "select k1 from src", Columns(keys=frozenset([1]))) == [(9007199254740993,)]


def test_wide_integers_of_polars(opened: Opened) -> None:
    engine = opened(pl.DataFrame({"h": [2**100]}, schema={"h": pl.Int128}))
    assert values(engine, "h") == [(2.0**100,)]
    assert rows(engine, "select k0 from src", Columns(keys=frozenset([0]))) == [(2**100,)]


def test_infinite_times_are_infinite_not_missing(opened: Opened) -> None:
    con = duckdb.connect()
    engine = opened(con.sql("select 'infinity'::timestamp as t, '-infinity'::date as d, null::date as n"))
    assert values(engine, "t", "d", "n") == [(float("inf"), float("-inf"), None)]


@pytest.mark.parametrize("other", [[[1]], [{"a": 1}], [b"x"]], ids=["list", "struct", "binary"])
def test_other_types_are_refused_as_covariates(other: list[Any], typed_kind: str, tmp_path: Path, opened: Opened) -> None:
    frame = pl.DataFrame({"y": [1.0], "odd": other})
    if typed_kind == "pandas" and isinstance(other[0], dict | list):
        pytest.skip("pandas holds these as objects")
    engine = opened(as_data(frame, typed_kind, tmp_path))
    assert engine.schema()["odd"].kind == "other"
    with pytest.raises(DataError, match="'odd' has type"):
        values(engine, "odd")
    assert values(engine, "y") == [(1.0,)]


def test_declared_levels_come_through_every_entry(typed_kind: str, tmp_path: Path, opened: Opened) -> None:
    engine = opened(as_data(TYPED.select("size", "category"), typed_kind, tmp_path))
    assert engine.schema()["size"].levels == ("low", "mid", "high")
    assert engine.schema()["category"].levels is None


NAMES = ["a b", 'quo"te', "it's", "größe", "^a$", "select", "c0", "rn", "x); drop table t; --", "present", ""]


def test_odd_names(engine_kind: str, tmp_path: Path, opened: Opened) -> None:
    names = [name for name in NAMES if name or engine_kind not in ("csv", "duckdb", "table")]
    frame = pl.DataFrame({name: [float(i), i + 0.5] for i, name in enumerate(names)})
    engine = opened(as_data(frame, engine_kind, tmp_path))
    assert list(engine.schema()) == names
    assert values(engine, *names) == frame.rows()


def test_names_that_differ_by_case(engine_kind: str, tmp_path: Path, opened: Opened) -> None:
    if engine_kind in ("duckdb", "table"):
        pytest.skip("a DuckDB table cannot hold both")
    engine = opened(as_data(pl.DataFrame({"x": [1.5], "X": [2.5]}), engine_kind, tmp_path))
    assert list(engine.schema()) == ["x", "X"]
    assert values(engine, "X", "x") == [(2.5, 1.5)]


def test_a_relation_may_hold_both_cases(opened: Opened) -> None:
    con = duckdb.connect()
    engine = opened(con.sql('select 1.5e0 as x, 2.5e0 as "X"'))
    assert list(engine.schema()) == ["x", "X"] and values(engine, "X", "x") == [(2.5, 1.5)]


def test_rows_can_be_counted_without_columns(engine_kind: str, tmp_path: Path, opened: Opened) -> None:
    engine = opened(as_data(TYPED.select("text"), engine_kind, tmp_path))
    assert rows(engine, "select count(*) as n from src", Columns()) == [(3,)]


def test_everything_gives_all_columns(typed_kind: str, tmp_path: Path, opened: Opened) -> None:
    engine = opened(as_data(TYPED.select("int8", "text", "size"), typed_kind, tmp_path))
    columns = Columns(frozenset([0]), frozenset([2]), everything=True, row_number=True)
    found = engine.query(sql("select * from src order by rn"), columns).read_all()
    assert found.column_names == ["c0", "k2", "r0", "r1", "r2", "rn"]
    assert found["r1"].to_pylist() == TYPED["text"].to_list() and found["rn"].to_pylist() == [0, 1, 2]
    assert found.schema.field("rn").type == pa.int64()


def test_a_users_table_called_like_ours(opened: Opened) -> None:
    con = duckdb.connect()
    con.execute("create table src as select 1.0::double as a")
    con.execute("create table mlpipe_source as select 9.0::double as a")
    engine = opened(con.table("src"))
    assert values(engine, "a") == [(1.0,)]


def test_a_statement_with_tables_of_its_own(engine_kind: str, tmp_path: Path, opened: Opened) -> None:
    engine = opened(as_data(pl.DataFrame({"x": [1.0, 2.0, 3.0]}), engine_kind, tmp_path))
    text = "with a as (select c0 * 2e0 as z from src), b as (select sum(z) as s from a) select s from b"
    assert rows(engine, text, Columns(frozenset([0]))) == [(12.0,)]


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500,000 rows in two Parquet files, `i` counting them, and one file of all."""
    path = tmp_path_factory.mktemp("numbered")
    frame = pl.DataFrame({"i": range(500_000), "g": [i % 7 for i in range(500_000)]})
    frame[:300_000].write_parquet(path / "part0.parquet", row_group_size=50_000)
    frame[300_000:].write_parquet(path / "part1.parquet", row_group_size=50_000)
    frame.write_parquet(path / "whole.parquet", row_group_size=50_000)
    frame.write_csv(path / "whole.csv")
    return path


@pytest.mark.parametrize("kind", ["whole.parquet", "part*.parquet", "whole.csv", "arrow", "reader", "lazy", "duckdb"])
def test_row_numbers_follow_the_source_with_four_threads(kind: str, numbered: Path, opened: Opened) -> None:
    frame = pl.scan_parquet(numbered / "whole.parquet")
    if "." in kind:
        engine = opened(numbered / kind, options=Options(threads=4))
    elif kind == "duckdb":
        engine = opened(duckdb.connect(config={"threads": 4}).read_parquet(str(numbered / "whole.parquet")))
    elif kind == "lazy":
        engine = opened(frame)
    else:
        arrow = frame.collect().to_arrow()
        engine = opened(arrow if kind == "arrow" else arrow.to_reader(), options=Options(threads=4))
    text = "select count(*) as n, min(rn - c0) as low, max(rn - c0) as high from src"
    assert rows(engine, text, Columns(frozenset([0]), row_number=True)) == [(500_000, 0.0, 0.0)]
    assert engine.identity().ordered


@pytest.mark.parametrize("kind", ["whole.parquet", "part*.parquet", "whole.csv", "frame", "lazy", "table"])
def test_a_sample_is_small_and_repeats(kind: str, numbered: Path, opened: Opened) -> None:
    frame = pl.scan_parquet(numbered / "whole.parquet")
    con = duckdb.connect()
    con.execute(f"create table t as from read_parquet('{numbered / 'whole.parquet'}')")
    data = {"frame": frame.collect(), "lazy": frame, "table": table("t", con)}.get(kind, numbered / kind)
    engine = opened(data)
    text = "select count(*) as n, min(c0) as low, max(c0) as high, min(rn - c0) as a, max(rn - c0) as b, sum(c0) as s from src"
    first = rows(engine, text, Columns(frozenset([0]), row_number=True), sample=True)
    count, low, high, least, most, _ = first[0]
    assert 8_000 <= count <= 20_000 and low == 0
    assert kind in ("whole.csv", "lazy") or high > 499_000
    assert kind in ("table",) or (least, most) == (0, 0)
    assert first == rows(engine, text, Columns(frozenset([0]), row_number=True), sample=True)


def test_a_sample_of_many_small_files_is_spread(tmp_path: Path, opened: Opened) -> None:
    for i in range(40):
        pl.DataFrame({"i": range(1000 * i, 1000 * i + 1000)}).write_parquet(tmp_path / f"{i:02}.parquet")
    engine = opened(tmp_path)
    assert engine.row_count() == 40_000
    ((count, files),) = rows(engine, "select count(*) n, count(distinct floor(c0 / 1e3)) f from src", Columns(frozenset([0])), sample=True)
    assert count == 8 * 2048 and files >= 16


def test_spread() -> None:
    assert spread(100) == [(0, 100)]
    assert spread(1000, 3, 10) == [(0, 10), (495, 505), (990, 1000)]


WIDE = ", ".join(f"c0 + {i}e0 as d{i}" for i in range(10))


def test_a_large_result_streams_in_order(numbered: Path, opened: Opened) -> None:
    engine = opened(numbered / "part*.parquet")
    columns = Columns(frozenset([0]), row_number=True)
    reader = engine.query(sql(f"select rn, {WIDE} from src"), columns)
    meanwhile = rows(engine, "select count(*) as n from src", Columns())
    total = size = 0
    for batch in reader:
        assert batch.column("rn")[0].as_py() == total
        total, size = total + batch.num_rows, size + batch.nbytes
    assert (total, meanwhile) == (500_000, [(500_000,)]) and size > BUFFER_BYTES


def test_polars_streams_large_results(numbered: Path, opened: Opened) -> None:
    engine = opened(pl.scan_parquet(numbered / "whole.parquet"))
    found = engine.query(sql(f"select {WIDE} from src"), Columns(frozenset([0])))
    assert sum(batch.num_rows for batch in found) == 500_000


def test_row_count_where_it_is_free(engine_kind: str, tmp_path: Path, opened: Opened) -> None:
    engine = opened(as_data(pl.DataFrame({"x": [1.0, 2.0]}), engine_kind, tmp_path))
    assert engine.row_count() == (None if engine_kind in ("lazy", "duckdb", "table", "csv") else 2)


def test_engine_errors_never_surface(engine_kind: str, tmp_path: Path, opened: Opened) -> None:
    engine = opened(as_data(pl.DataFrame({"t": ["a", "b"]}), engine_kind, tmp_path))
    with pytest.raises(MlpipeError) as caught:
        rows(engine, "select cast(c0 as double) as x from src", Columns(frozenset([0])))
    assert type(caught.value) is DataError and caught.value.__cause__ is not None
    assert caught.value.code == "engine_refused" and len(str(caught.value)) < 400


def test_memory_limit_is_a_resource_error(opened: Opened) -> None:
    engine = opened(pa.table({"x": np.arange(16_000_000)}), options=Options(memory_limit="20MB", threads=1))
    with pytest.raises(ResourceError) as caught:
        rows(engine, "select len(list(k0)) as n, len(list(k0 + 1)) as m from src", Columns(frozenset(), frozenset([0])))
    assert caught.value.code == "out_of_memory" and "memory_limit" in str(caught.value)


SLOW = "select sum(sin(a.c0 * b.c0)) as s from src as a, src as b, src as d"


def test_ctrl_c_stops_a_query_at_once(opened: Opened) -> None:
    con = duckdb.connect()
    engine = opened(con.sql("select range::double as x from range(20000)"))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        rows(engine, SLOW, Columns(frozenset([0])))
    assert time.monotonic() - began < 5
    assert con.sql("select 1").fetchall() == [(1,)]


def test_cancel_and_progress(opened: Opened) -> None:
    engine = opened(pa.table({"x": [float(i) for i in range(20_000)]}))
    seen: list[float | None] = []
    threading.Timer(0.4, lambda: (seen.append(engine.progress()), engine.cancel())).start()
    with pytest.raises(ResourceError) as caught:
        rows(engine, SLOW, Columns(frozenset([0])))
    assert caught.value.code == "interrupted"
    assert seen[0] is None or 0 <= seen[0] <= 1
    assert engine.progress() is None
    assert values(engine, "x")[1] == (1.0,)


def catalog(con: duckdb.DuckDBPyConnection) -> list[Any]:
    return [con.sql(f"from duckdb_{what}() order by all").fetchall() for what in ("settings", "views", "tables")]


@pytest.mark.parametrize("kind", ["relation", "table", "query"])
def test_a_users_connection_is_left_alone(kind: str, opened: Opened) -> None:
    con = duckdb.connect()
    con.execute("create table t as select range::double as x, range % 3 as g from range(1000)")
    before = catalog(con)
    engine = opened({"relation": con.table("t"), "table": table("t", con), "query": query("from t", con)}[kind])
    columns = Columns(frozenset([0]), frozenset([1]), row_number=True)
    for sample in (False, True):
        rows(engine, "select k1, sum(c0) as s from src group by k1", columns, sample=sample)
        assert con.sql("select 1").fetchall() == [(1,)]
    with pytest.raises(DataError):
        rows(engine, "select nothing from src", columns)
    engine.close()
    assert catalog(con) == before


NOCASE = {"setting": "set default_collation = 'nocase'", "column": "alter table t alter g type varchar collate nocase"}


@pytest.mark.filterwarnings("ignore::mlpipe.MlpipeWarning")
@pytest.mark.parametrize(("kind", "blind"), [("relation", "setting"), ("query", "column"), ("table", "setting"), ("table", "column")])
def test_text_is_compared_by_bytes_whatever_a_database_says(kind: str, blind: str) -> None:
    """Levels, keys and predictions of a connection, or a column, that is blind to case."""
    data = pl.DataFrame({"y": [1.0, 2.0, 4.0, 3.5, 5.0, 7.5] * 4, "f": ["u", "U", "v"] * 8, "g": ["a", "A", "b", "B"] * 6})
    con = duckdb.connect()
    con.register("frame", data.to_arrow())
    con.execute("create table t as select y, f, g, f::enum('u', 'U', 'v') as e from frame")
    con.execute(NOCASE[blind])
    source = {"relation": con.table("t"), "table": table("t", con), "query": query("from t", con)}[kind]
    for formula in ("y ~ e + (1 | g)", 'y ~ I(f == "u") + f + (1 | g)'):
        held = data.with_columns(e=pl.col("f").cast(pl.Enum(["u", "U", "v"])))
        want, fit = mp.lmm(formula, held), mp.lmm(formula, source)
        assert list(fit.fixef()) == list(want.fixef()) and fit.loglik == pytest.approx(want.loglik, abs=1e-9)
        np.testing.assert_allclose(want.predict(source).read_all()["predicted"], want.predict(held).read_all()["predicted"], atol=1e-9)


def test_a_users_transaction_is_untouched(opened: Opened) -> None:
    con = duckdb.connect()
    con.execute("create table t as select 1.0::double as x")
    con.begin()
    con.execute("insert into t values (2.0)")
    engine = opened(con.table("t"))
    assert rows(engine, "select sum(c0) as s from src", Columns(frozenset([0]))) == [(3.0,)]
    engine.close()
    con.rollback()
    assert con.sql("select sum(x) from t").fetchall() == [(1.0,)]


def test_a_busy_connection_is_named(opened: Opened) -> None:
    con = duckdb.connect()
    engine = opened(con.sql("select range as x from range(3000000)"))
    held = con.sql("from range(3000000)").to_arrow_reader(1000)
    with pytest.raises(ResourceError) as caught:
        rows(engine, "select sum(c0) as s from src", Columns(frozenset([0])))
    assert caught.value.code == "connection_busy"
    held.close()


def test_after_close_and_on_a_closed_connection() -> None:
    engine = open_source(pa.table({"x": [1]}))
    engine.close()
    engine.close()
    with pytest.raises(ResourceError, match="closed"):
        rows(engine, "select * from src", Columns())


def test_polars_text_uses_its_own_functions() -> None:
    assert render(sql("select any_value(c0) as a from src"), "polars") == "SELECT MAX(c0) AS a FROM src"
    assert "MATERIALIZED" not in render(sql("with a as materialized (select 1 as b) select b from a"), "polars")
    with pytest.raises(ConfigError, match="hash"):
        render(sql("select hash(c0) from src"), "polars")


def test_polars_resource_errors(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    engine = opened(pl.DataFrame({"x": [1.0]}))
    monkeypatch.setattr(pl.LazyFrame, "collect_batches", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ResourceError) as caught:
        values(engine, "x")
    assert caught.value.code == "out_of_memory"


def test_a_lazy_frame_without_its_file() -> None:
    with pytest.raises(DataError) as caught:
        open_source(pl.scan_parquet("no such file.parquet"))
    assert caught.value.code == "file_not_found"


def test_fingerprints_repeat_and_differ(engine_kind: str, tmp_path: Path) -> None:
    frame = pl.DataFrame({"x": [1.0, 2.0]})
    data = as_data(frame, engine_kind, tmp_path)
    first = open_source(data).identity()
    if engine_kind != "reader":
        assert open_source(data).identity() == first
    (tmp_path / "other").mkdir()
    assert as_engine(pl.DataFrame({"z": [1.0]}), engine_kind, tmp_path / "other").identity().fingerprint != first.fingerprint
    assert first.rescannable == (engine_kind != "reader")


# the package without what its __init__ imports
BARE = "import sys, types; sys.modules['mlpipe'] = m = types.ModuleType('mlpipe'); m.__path__ = ['mlpipe'];"


@pytest.mark.parametrize("module, other", [("duckdb", "polars"), ("polars", "duckdb")])
def test_one_engine_does_not_load_another(module: str, other: str) -> None:
    bare = "import sys, types; sys.modules['mlpipe'] = m = types.ModuleType('mlpipe'); m.__path__ = ['mlpipe']; "
    code = bare + f"import mlpipe.engines.{module}; assert {other!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_sources_load_nothing_heavy() -> None:
    code = f"{BARE} import mlpipe.sources; assert not {{'duckdb', 'polars', 'pyarrow', 'sqlglot', 'pandas'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("kind", ["polars", "lazy", "arrow", "duckdb", "path"])
def test_keys_are_counted_within_a_few_percent(kind: str, tmp_path: Path, opened: Opened) -> None:
    row = pl.int_range(60_000)
    frame = pl.select((row % 20_000).alias("a"), (row % 3).cast(pl.String).alias("b"), (row % 7).alias("c"))
    engine = opened(as_data(frame, kind, tmp_path))
    assert engine.key_count([0]) == pytest.approx(20_000, rel=0.15)
    assert engine.key_count([1, 0]) == pytest.approx(60_000, rel=0.15)


def test_room_for_groups(tmp_path: Path, opened: Opened) -> None:
    """A share of the memory for each thread; none of Polars, which does not spill."""
    frame = pl.DataFrame({"g": [1]})
    path = as_data(frame, "path", tmp_path)
    one, two = (opened(path, options=Options(memory_limit="2GB", threads=threads)) for threads in (1, 2))
    room = one.table_room()
    assert room is not None and 300e6 < room < 450e6 and two.table_room() == pytest.approx(room / 2, abs=1)
    assert opened(as_data(frame, "duckdb", tmp_path)).table_room() is not None
    assert opened(frame).table_room() is None


def test_ranges_for_tables_addressed_by_the_key(tmp_path: Path, opened: Opened) -> None:
    """As many as the memory asks for, without a gap; none of a key that is no whole number, or of an engine without such tables."""
    row = pl.int_range(800_000)
    frame = pl.select((row % 100_000 - 7).alias("g"), (row % 2).cast(pl.String).alias("h"), row.cast(pl.Float64).alias("x"))
    statement = sql("select k0, sum(c2) as s from src group by k0")
    again = sql("select s, count(*) as n from (select k0, sum(c2) as s from src group by k0) group by s")
    columns = Columns(frozenset([2]), frozenset([0]))

    def asked(kind: str, statement: exp.Query = statement, threads: int = 1, key: int = 0, rows: int = 400_000) -> list[tuple[int, int]]:
        engine = opened(as_data(frame, kind, tmp_path), options=Options(memory_limit="540MB", threads=threads))
        return engine.key_ranges(statement, columns, key, rows)

    assert asked("path") == [(-7, 99_992)]
    found = asked("path", threads=63)  # 64 tables with a slot of 16 bytes, in a sixth of 105 MB
    assert len(found) == 7 and found[0][0] == -7 and found[-1][1] == 99_992
    assert all(after == high + 1 for (_, high), (after, _) in pairwise(found))
    assert {high - low + 1 for low, high in found} == {14_285, 14_286}
    assert len(asked("path", again, threads=63)) == 2  # and in a sixth of 240 MB
    assert asked("path", rows=399_999) == asked("path", key=1) == asked("path", key=2) == []
    assert [opened(as_data(frame, kind, tmp_path)).key_ranges(statement, columns, 0, 400_000) for kind in ("lazy", "duckdb")] == [[], []]


# ---- a user's own functions


class OwnError(Exception):
    pass


@pytest.mark.parametrize("kind", ["lmm", "glmm"])
def test_a_users_function_that_fails_is_named(kind: str) -> None:
    """At whichever call it fails, until it lasts for the whole fit and its predictions."""
    frame = pl.LazyFrame({"g": [0, 0, 1, 1, 2, 2] * 20, "x": [0.5, 1.5, 0.0, 2.0, 1.0, -1.0] * 20, "y": [0, 1, 0, 0, 1, 1, 1, 0] * 15})
    failures = 0
    for calls in range(40):
        left = [calls]

        def doubled(values: pl.Series, left: list[int] = left) -> pl.Series:
            left[0] -= 1
            if left[0] < 0:
                raise OwnError("no more")
            return values * 2

        own = frame.with_columns(pl.col("x").map_batches(doubled, return_dtype=pl.Float64))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                family = {"family": "binomial"} if kind == "glmm" else {}
                getattr(mp, kind)("y ~ x + (1 | g)", own, **family).predict(own).read_all()
        except DataError as error:
            assert error.code == "user_function" and isinstance(error.__cause__, OwnError)
            assert error.message.startswith("the function doubled (") and error.message.endswith("failed: OwnError: no more")
            failures += 1
        else:
            break
    assert failures == calls >= 4
