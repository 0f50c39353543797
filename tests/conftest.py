"""The same frame through every entry: `as_engine(frame, kind, tmp_path)` and the fixture `engine_kind`."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from mlpipe.engines.base import Engine
from mlpipe.sources import open_source, table

KINDS = ("polars", "lazy", "arrow", "pandas", "reader", "duckdb", "table", "path", "csv")
TYPED_KINDS = KINDS[:-1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test marked `thinned(n)` every n-th case; all of them where .ci/long has loaded `long_run`."""
    if config.pluginmanager.hasplugin("long_run"):
        return
    seen: Counter[str] = Counter()
    kept, left = [], []
    for item in items:
        every = item.get_closest_marker("thinned")
        test = item.nodeid.partition("[")[0]
        (kept if every is None or seen[test] % every.args[0] == 0 else left).append(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def as_data(frame: pl.DataFrame, kind: str, tmp_path: Path) -> Any:
    """What a user would pass as `data`: "csv" loses types and level order, the others keep them."""
    match kind:
        case "polars":
            return frame
        case "lazy":
            return frame.lazy()
        case "arrow":
            return frame.to_arrow()
        case "pandas":
            return as_pandas(frame)
        case "reader":
            return frame.to_arrow().to_reader()
        case "duckdb":
            return as_stored(frame).table("stored")
        case "table":
            return table("stored", as_stored(frame))
        case "path":
            frame.write_parquet(tmp_path / "data.parquet")
            return tmp_path / "data.parquet"
    frame.write_csv(tmp_path / "data.csv")
    return str(tmp_path / "data.csv")


def as_engine(frame: pl.DataFrame, kind: str, tmp_path: Path) -> Engine:
    """An engine over the frame, by one of KINDS."""
    return open_source(as_data(frame, kind, tmp_path))


def as_pandas(frame: pl.DataFrame) -> Any:
    """A pandas frame whose Enums are ordered categoricals."""
    import pandas as pd

    out = frame.to_pandas()
    for name, dtype in frame.schema.items():
        if isinstance(dtype, pl.Enum):
            out[name] = pd.Categorical(frame[name].to_list(), categories=dtype.categories.to_list(), ordered=True)
    return out


def as_stored(frame: pl.DataFrame) -> duckdb.DuckDBPyConnection:
    """A user's connection with the frame in a table `stored`, Enums as ENUM."""
    con = duckdb.connect()
    arrow = frame.to_arrow()
    chosen = ", ".join(f"{_stored_value(i, dtype)} as {_quoted(name)}" for i, (name, dtype) in enumerate(frame.schema.items()))
    con.execute(f"create table stored as select {chosen} from arrow as r({', '.join(f'c{i}' for i in range(frame.width))})")
    assert con.table("stored").shape == (arrow.num_rows, arrow.num_columns)
    return con


def _stored_value(i: int, dtype: pl.DataType) -> str:
    if not isinstance(dtype, pl.Enum):
        return f"r.c{i}"
    values = ", ".join("'" + value.replace("'", "''") + "'" for value in dtype.categories)
    return f"r.c{i}::ENUM ({values})"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@pytest.fixture(params=KINDS)
def engine_kind(request: pytest.FixtureRequest) -> str:
    """Each of KINDS in turn."""
    return str(request.param)


@pytest.fixture(params=TYPED_KINDS)
def typed_kind(request: pytest.FixtureRequest) -> str:
    """Each of the kinds that keep types and level order."""
    return str(request.param)


@pytest.fixture
def opened() -> Iterator[Callable[..., Engine]]:
    """`open_source`, whose engines are closed after the test."""
    engines: list[Engine] = []

    def open_(data: Any, **arguments: Any) -> Engine:
        engines.append(open_source(data, **arguments))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()
