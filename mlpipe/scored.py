"""Scored rows on disk: one Parquet file, or a directory with one for each file of the source; all or nothing."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import apart, regular, replacing, synced, writing
from .errors import ConfigError, DataError
from .store import new_run_id, write_run

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .options import Options

ROW_GROUP = 122_880  # least rows of a Parquet row group, as DuckDB writes them
INDEX, FORMAT = "predictions.json", "mlpipe.predictions/1"
PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Piece:
    """One file of the source: how many `rows` it has, and the relative path `name` of what is written for it."""

    name: str
    rows: int


def check_file(out: str, *read: object) -> None:
    """Raises ConfigError (code "target") for a target whose suffix is another format's, and for one of the files that are read."""
    from .engines import files

    apart(out, *read)
    if (files.is_known(out) or out.lower().endswith(files.DATABASES)) and not out.lower().endswith(PARQUET):
        raise ConfigError(f"{out}: predictions are written as Parquet", code="target", hint="give the target the suffix .parquet")


def pieces(paths: Sequence[str], out: str, options: Options) -> list[Piece] | None:
    """The files of a source that is a directory, a glob or several paths, in the order of its rows; None where one file is to be written:
    for a single file, and where the target's name is that of a Parquet file.

    Raises ConfigError where target and source lie within each other, DataError for files that cannot be read.
    """
    from .engines import files

    local = [os.path.expanduser(path) for path in paths]
    if any("://" in path for path in local) or (len(local) == 1 and os.path.isfile(local[0])):
        return None
    found = [file for path in local for file in files.locate(path)]
    target = os.path.realpath(out)
    roots = [os.path.realpath(path) for path in local if os.path.isdir(path)]
    if any(_within(target, root) for root in roots) or any(_within(os.path.realpath(file), target) for file in found):
        raise ConfigError(f"{out} and the data lie within each other", code="target", hint="write to a directory of its own")
    if out.lower().endswith(PARQUET):
        return None
    root = local[0] if len(local) == 1 and roots else os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in found])
    names = [os.path.relpath(file, root) for file in found]
    if len(set(names)) < len(names):
        raise ConfigError("a file is named twice", code="usage", hint='name each once, or write one file: --out "….parquet"')
    names = [name if name.endswith(".parquet") else f"{name}.parquet" for name in names]
    return [Piece(name, _rows(file, options)) for name, file in zip(names, found, strict=True)]


def _within(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def _rows(file: str, options: Options) -> int:
    """The rows of one file: from its footer, or counted."""
    from .sources import PathSource, open_source, row_count

    with closing(open_source(PathSource([file], hive=False), options=options)) as engine:
        return row_count(engine)


def write_file(reader: pa.RecordBatchReader, out: str) -> None:
    """All or nothing: a file of its own beside the target takes its name at the end.

    Raises ResourceError where the target cannot be written, DataError for types that Parquet has not.
    """
    with _told(out), replacing(regular(out)) as file, _writer(file, reader.schema) as writer:
        _write_all(_row_groups(reader), writer)


def write_pieces(reader: pa.RecordBatchReader, parts: Sequence[Piece], out: str, counts: Callable[[], dict[str, int]]) -> str:
    """`runs/<run>/` with a file for each piece, and `predictions.json`, replaced last, which names the run and its files; the folder of the
    files. `counts`: what is noted beside them, once all rows are written.

    Raises ConfigError where the target is something else, ResourceError while another job writes it or where the disk fails, DataError
    where the rows are not those of the pieces.
    """
    folder, run = Path(out), new_run_id()

    def fill(fresh: Path) -> dict[str, Any]:
        fresh.mkdir(parents=True)
        rows = _Rows(reader)
        with _told(out):
            for part in parts:
                _written(rows, part, fresh)
        if rows.left():
            raise _changed()
        for place, _, _ in os.walk(fresh):
            synced(Path(place))
        return {"format": FORMAT, "files": [part.name for part in parts], **counts()}

    write_run(folder, fill, index=INDEX, what="directory of predictions", mode="overwrite", run=run)
    return str(folder / "runs" / run)


def _written(rows: _Rows, part: Piece, folder: Path) -> None:
    path = folder / part.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, _writer(file, rows.schema) as writer:
        _write_all(_row_groups(rows.take(part.rows)), writer)
    synced(path)


def _write_all(tables: Iterator[pa.Table], writer: pq.ParquetWriter) -> None:
    """Writes each table on another thread while the next one is read: encoding takes as long as scoring does."""
    with ThreadPoolExecutor(1) as thread:
        last: Future[None] | None = None
        for table in tables:
            if last is not None:
                last.result()
            last = thread.submit(writer.write_table, table)
        if last is not None:
            last.result()


class _Rows:
    """The rows of a reader, taken by number across its batches."""

    def __init__(self, reader: pa.RecordBatchReader) -> None:
        self.schema, self._batches = reader.schema, iter(reader)
        self._held: pa.RecordBatch | None = None

    def take(self, rows: int) -> Iterator[pa.RecordBatch]:
        """The next rows. Raises DataError where there are fewer."""
        while rows:
            batch = self._next()
            if batch is None:
                raise _changed()
            yield batch.slice(0, rows)
            self._held = batch.slice(rows) if batch.num_rows > rows else None
            rows -= min(rows, batch.num_rows)

    def left(self) -> bool:
        """Whether there are more."""
        self._held = self._next()
        return self._held is not None

    def _next(self) -> pa.RecordBatch | None:
        held, self._held = self._held, None
        return held if held is not None else next((batch for batch in self._batches if batch.num_rows), None)


def _changed() -> DataError:
    return DataError("the source changed while it was read", code="source_changed", hint="score a snapshot of it")


@contextmanager
def _told(out: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        with writing(out):
            yield
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot write {out}: {error}", code="column_type") from error


def _writer(file: Any, schema: pa.Schema) -> pq.ParquetWriter:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # zstd and dictionaries of numbers would save a tenth of the bytes, and each doubles the time of writing them
    texts = [field.name for field in schema if not (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))]
    return pq.ParquetWriter(file, schema, compression="snappy", use_dictionary=texts or False)


def _row_groups(batches: Any) -> Iterator[pa.Table]:
    """Tables of at least ROW_GROUP rows, the last one fewer."""
    import pyarrow as pa

    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(part.num_rows for part in held) >= ROW_GROUP:
            yield pa.Table.from_batches(held)
            held = []
    if held:
        yield pa.Table.from_batches(held)
