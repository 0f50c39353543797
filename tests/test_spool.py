"""The spool: whatever the batches, chunks and limits, the same rows in the same blocks, and nothing left on disk."""
from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlpipe import errors, spool
from mlpipe.spool import Layout, Spool, build

LAYOUT = Layout(("f1", "f2", "y", "size", "w", "offset", "t0"), (1, 2), 3, 1)
ROOMY = 10**9


def table(lengths: list[int], keys: dict[str, Any] | None = None) -> pa.Table:
    """Blocks of these lengths, in order; column k of row i is 1000 k + i."""
    n = sum(lengths)
    block = np.repeat(np.arange(len(lengths)), lengths)
    given = keys or {"g0": range(len(lengths))}
    columns: dict[str, Any] = {name: pa.array(values).take(pa.array(block)) for name, values in given.items()}
    columns |= {name: np.arange(n, dtype=float) + 1000.0 * k for k, name in enumerate(LAYOUT.columns)}
    return pa.table(columns | {"constant": np.full(n, 0.5)})


def batches(rows: pa.Table, cuts: int, seed: int = 0) -> Iterator[pa.RecordBatch]:
    """The rows cut at random places, empty batches among them."""
    at = sorted(np.random.default_rng(seed).integers(0, len(rows) + 1, cuts).tolist())
    for a, b in itertools.pairwise([0, *at, len(rows)]):
        yield from rows.slice(a, b - a).combine_chunks().to_batches() or [rows.schema.empty_table().to_batches()[0]] if b > a else []


def small(monkeypatch: pytest.MonkeyPatch, chunk: int, piece: int) -> None:
    monkeypatch.setattr(spool, "CHUNK_ROWS", chunk)
    monkeypatch.setattr(spool, "PIECE_ROWS", piece)


def content(made: Spool) -> tuple[np.ndarray, list[int]]:
    """All columns, side by side in order, and the lengths of all blocks."""
    out, lengths = [], []
    for i in range(len(made.parts)):
        chunk = made.chunk(i)
        assert chunk.first == sum(part[2] for part in made.parts[:i])
        each = np.zeros(chunk.n_blocks)
        for rows in chunk.pieces:
            c = rows.cells
            assert (rows.F[0] == 1.0).all()
            out.append(np.vstack([rows.F[1:], c.y, c.size, c.weight, rows.offset, c.statistics[0]]))
            each += rows.lengths
        lengths += each.astype(int).tolist()
    return np.hstack(out), lengths


LENGTHS = {
    "equal": [5] * 20,
    "single rows": [1] * 40,
    "one block": [57],
    "long first": [60, 3, 3],
    "long last": [3, 3, 60],
    "long between": [3, 60, 3, 61, 1],
    "two long": [40, 40],
    "exactly a chunk": [8] * 10,
    "exactly a piece": [16] * 5,
    "a row over": [17, 9, 17, 9],
}


@pytest.mark.parametrize("budget", [ROOMY, 2_000, 0])
@pytest.mark.parametrize(("chunk", "piece"), [(8, 16), (1, 1), (16, 16), (8, 8), (7, 23), (32_768, 262_144)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_rows_and_blocks_come_back(
    lengths: list[int], chunk: int, piece: int, budget: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small(monkeypatch, chunk, piece)
    rows = table(lengths)
    for cuts in (0, 25):
        with build(batches(rows, cuts), LAYOUT, ["g0"], budget=budget, parent=str(tmp_path), threads=1) as made:
            found, blocks = content(made)
            np.testing.assert_array_equal(found, np.vstack([rows[name].to_numpy() for name in LAYOUT.columns]))
            assert blocks == lengths
            assert (made.n_rows, made.n_blocks) == (len(rows), len(lengths))
            assert made.keys is not None and made.keys["g0"].to_pylist() == list(range(len(lengths)))
            assert made.constant == 0.5 * len(rows)
            assert made.mapped == (budget < made.nbytes)
            assert made.mapped == any(tmp_path.iterdir())
            longest = max((batch.num_rows for batch in batches(rows, cuts)), default=0)  # what is held is cut after each batch
            assert max(part.rows for parts, _, _ in made.parts for part in parts) <= max(chunk, piece) + longest
        assert not list(tmp_path.iterdir())


KEYS: dict[str, list[Any]] = {
    "text": ["", "a", "é", "'", '"', "a b", "ab", "null"],
    "dates": [date(2020, 1, k) for k in range(1, 9)],
    "decimals": [Decimal(k) / 100 for k in range(8)],
    "integers": [2**62 + k for k in range(8)],
    "halves": [k / 2 for k in range(8)],
}


@pytest.mark.parametrize("values", KEYS.values(), ids=KEYS)
def test_keys_of_any_type(values: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 4, 8)
    rows = table([1, 5, 2, 9, 3, 1, 1, 4], {"g0": values})
    with build(batches(rows, 7), LAYOUT, ["g0"], budget=ROOMY, parent=None, threads=1) as made:
        assert made.keys is not None
        assert made.keys["g0"].to_pylist() == values
        assert made.keys.schema.field("g0").type == rows.schema.field("g0").type


def test_dictionary_and_boolean_keys() -> None:
    keys = {"g0": pa.array(["x", "x", "y", "y"]).dictionary_encode(), "g1": pa.array([False, True, False, True])}
    rows = table([2, 3, 1, 4], keys)
    for cuts in (0, 8):
        with build(batches(rows, cuts), LAYOUT, ["g0", "g1"], budget=ROOMY, parent=None, threads=1) as made:
            assert made.n_blocks == 4 and made.keys is not None
            assert made.keys["g1"].to_pylist() == [False, True, False, True]
            assert made.keys["g0"].to_pylist() == ["x", "x", "y", "y"]


def test_without_keys_all_rows_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 8, 16)
    rows = table([50])
    with build(batches(rows.drop(["g0"]), 5), LAYOUT, [], budget=ROOMY, parent=None, threads=1) as made:
        np.testing.assert_array_equal(content(made)[0][0], np.arange(50.0))
        assert made.keys is None


def test_no_rows() -> None:
    with build(iter(()), LAYOUT, ["g0"], budget=ROOMY, parent=None, threads=1) as made:
        assert (made.n_rows, made.n_blocks, made.map(lambda chunk: 1)) == (0, 0, [])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("budget", [ROOMY, 0])
def test_a_pass_keeps_the_chunks_order_and_counts_rows(threads: int, budget: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch, 8, 16)
    rows = table([5] * 30)
    with build(batches(rows, 4), LAYOUT, ["g0"], budget=budget, parent=str(tmp_path), threads=threads) as made:
        assert made.map(lambda chunk: chunk.first) == [part[1] for part in made.parts]
        assert made.map(lambda chunk: chunk.first, [2, 0]) == [made.parts[2][1], made.parts[0][1]]
        assert made.rows_read == len(rows) + sum(part.rows for i in (0, 2) for part in made.parts[i][0])


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_in_a_worker_is_the_callers(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 8, 16)

    def fail(chunk: Any) -> None:
        raise ZeroDivisionError(chunk.first)

    before = threading.active_count()
    with build(batches(table([5] * 30), 4), LAYOUT, ["g0"], budget=ROOMY, parent=None, threads=threads) as made:
        with pytest.raises(ZeroDivisionError):
            made.map(fail)
    assert threading.active_count() == before


@pytest.mark.parametrize(("share", "least"), [(1 / 16, 2), (1.0, 1), (0.5, 1), (0.0, 1), (0.0, 50)])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 17, 100])
def test_some_chunks_are_spread(n: int, share: float, least: int) -> None:
    made = Spool(LAYOUT, 1, parts=[([], 0, 0)] * n)
    some = made.some(share, least)
    assert some == sorted(set(some)) and all(0 <= i < n for i in some)
    assert len(some) == min(n, max(least, round(n * share)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
def test_nothing_is_left_where_the_rows_stop_coming(error: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch, 8, 16)

    def failing() -> Iterator[pa.RecordBatch]:
        yield from batches(table([5] * 10), 3)
        assert list(tmp_path.iterdir())
        raise error

    with pytest.raises(error):
        build(failing(), LAYOUT, ["g0"], budget=0, parent=str(tmp_path), threads=1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_resource_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch, 8, 16)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spool._Writer, "_write", full)
    with pytest.raises(errors.ResourceError, match="No space left") as caught:
        build(batches(table([5] * 10), 3), LAYOUT, ["g0"], budget=0, parent=str(tmp_path), threads=1)
    assert caught.value.code == "disk"
    assert not list(tmp_path.iterdir())


def test_a_missing_temp_directory_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(errors.ResourceError):
        build(batches(table([5] * 10), 3), LAYOUT, ["g0"], budget=0, parent=str(tmp_path / "none"), threads=1)


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    made = build(batches(table([5] * 10), 3), LAYOUT, ["g0"], budget=0, parent=str(tmp_path), threads=1)
    assert made.mapped
    made.close()
    made.close()
    assert not list(tmp_path.iterdir())
