"""Levels of grouping factors by keys of any type: every key is found again, and nothing else is."""
from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlpipe import places
from mlpipe.errors import DataError
from mlpipe.levels import Index, Levels
from mlpipe.places import LOOKED_UP as SPAN

UTC = pa.timestamp("us", "UTC")
DAY = dt.datetime(2020, 5, 5)


def levels(*columns: pa.Array) -> Levels:
    names = tuple(f"k{i}" for i in range(len(columns)))
    return Levels(":".join(names), names, pa.table(dict(zip(names, columns, strict=True))))


def enum(values: list[Any], order: list[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([None if v is None else order.index(v) for v in values], pa.int8()), pa.array(order))


# name: (known keys, their type), (values of rows, their type), the place of each among the keys
FOUND: dict[str, tuple[pa.Array, pa.Array, list[int]]] = {
    "negative": (pa.array([-5, 0, 7]), pa.array([7, -5, 0, -6, 8, 3]), [2, 0, 1, -1, -1, -1]),
    "nulls": (pa.array([-5, 0, 7]), pa.array([None, 7, None]), [-1, 2, -1]),
    "not sorted": (pa.array([9, 2, 5]), pa.array([5, 9, 2]), [2, 0, 1]),
    "int8": (pa.array([-128, 127], pa.int8()), pa.array([127, -128, 0], pa.int8()), [1, 0, -1]),
    "other widths": (pa.array([-1, 3], pa.int16()), pa.array([3, -1, 2**40], pa.int64()), [1, 0, -1]),
    "no table": (pa.array([-(2**62), 0, 2**62]), pa.array([2**62, 1, 0, -(2**62)]), [2, -1, 1, 0]),
    "just a table": (pa.array([-3, SPAN - 4]), pa.array([SPAN - 4, -3, SPAN - 3, -(2**63), 2**63 - 1]), [1, 0, -1, -1, -1]),
    "just no table": (pa.array([-3, SPAN - 3]), pa.array([SPAN - 3, -3, SPAN - 4]), [1, 0, -1]),
    "ends of the type": (pa.array([-(2**63), 2**63 - 1]), pa.array([2**63 - 1, -(2**63), -1]), [1, 0, -1]),
    "wraps round": (pa.array([-(2**30), 0, 2**30], pa.int32()), pa.array([2**32, -(2**30) + 2**32, 2**30]), [-1, -1, 2]),
    "uint64": (pa.array([0, 2**63, 2**64 - 1], pa.uint64()), pa.array([2**64 - 1, 5, 2**63, None], pa.uint64()), [2, -1, 1, -1]),
    "uint64 known": (pa.array([0, 2**64 - 1], pa.uint64()), pa.array([-1, 0], pa.int64()), [-1, 0]),
    "uint64 rows": (pa.array([-1, 0, 1]), pa.array([2**64 - 1, 0, 1], pa.uint64()), [-1, 1, 2]),
    "uint32 known": (pa.array([0, 2**32 - 1], pa.uint32()), pa.array([-1, 2**32 - 1], pa.int64()), [-1, 1]),
    "fractions are no whole numbers": (pa.array([-5, 0, 7]), pa.array([7.0, 7.5, -0.0, float("nan"), 1e300]), [2, -1, 1, -1, -1]),
    "doubles": (pa.array([-0.5, 0.0, 2.0]), pa.array([2.0, -0.0, 0.0, float("nan"), None]), [2, 1, 1, -1, -1]),
    "zero with a sign": (pa.array([-0.0, 2.0]), pa.array([0.0, -0.0]), [0, 0]),
    "doubles, whole numbers": (pa.array([-0.5, 0.0, 2.0]), pa.array([2, 0, 1]), [2, 1, -1]),
    "doubles, beyond 2^53": (pa.array([2.0**53]), pa.array([2**53, 2**53 + 1]), [0, -1]),
    "float32": (pa.array([0.5, 0.1], pa.float32()), pa.array([0.5, 0.1]), [0, -1]),
    "text": (
        pa.array(["", "it's", 'q"x', "é", "日本"]), pa.array(["日本", "it's", None, "", "z", 'q"x', "e\u0301"]), [4, 1, -1, 0, -1, 2, -1],
    ),
    "case": (pa.array(["A", "a"]), pa.array(["a", "A"]), [1, 0]),
    "blanks": (pa.array(["a", "a "]), pa.array(["a ", "a", " a"]), [1, 0, -1]),
    "large text": (pa.array(["a", "b"]), pa.array(["b", "c"], pa.large_string()), [1, -1]),
    "text views": (pa.array(["a", "b"], pa.string_view()), pa.array(["b", "c"], pa.string_view()), [1, -1]),
    "bytes": (pa.array([b"a", b"\0"]), pa.array([b"\0", b""]), [1, -1]),
    "booleans": (pa.array([False, True]), pa.array([True, None, False]), [1, -1, 0]),
    "booleans, numbers": (pa.array([False, True]), pa.array([1, 2, 0]), [1, -1, 0]),
    "dates": (pa.array([dt.date(1960, 1, 1), dt.date(2020, 5, 5)]), pa.array([dt.date(2020, 5, 5), dt.date(1960, 1, 2)]), [1, -1]),
    "times": (pa.array([dt.time(1), dt.time(2)]), pa.array([dt.time(2), dt.time(3)]), [1, -1]),
    "timestamps": (pa.array([dt.datetime(1960, 1, 1), DAY]), pa.array([DAY], pa.timestamp("ns")), [1]),
    "finer timestamps": (pa.array([DAY]), pa.array([1588636800000000001]).cast(pa.timestamp("ns")), [-1]),
    "zones": (pa.array([DAY], UTC), pa.array([DAY, None], UTC), [0, -1]),
    "durations": (pa.array([dt.timedelta(1), dt.timedelta(2)]), pa.array([dt.timedelta(2), dt.timedelta(3)]), [1, -1]),
    "intervals": (  # a month is 30 days, as DuckDB compares and groups them
        pa.array([pa.MonthDayNano([0, 1, 0]), pa.MonthDayNano([1, 0, 0])]),
        pa.array([pa.MonthDayNano([1, 0, 0]), pa.MonthDayNano([0, 30, 0]), pa.MonthDayNano([0, 0, 86_400 * 10**9])]), [1, 1, 0],
    ),
    "decimals": (pa.array([Decimal("1.10"), Decimal("2.50")]), pa.array([Decimal("2.50"), Decimal("1.10"), None]), [1, 0, -1]),
    "decimals of another scale": (pa.array([Decimal("1.10"), Decimal("2.50")]), pa.array([Decimal("2.504"), Decimal("1.100")]), [-1, 0]),
    "wide whole numbers": (
        pa.array([Decimal(10**30), Decimal(10**30 + 1)], pa.decimal128(38)), pa.array([Decimal(10**30 + 1), Decimal(0)], pa.decimal128(38)),
        [1, -1],
    ),
    "decimals known": (pa.array([Decimal("1.00"), Decimal("2.50")]), pa.array([2, 1, None, 2**63 - 1]), [-1, 0, -1, -1]),
    "decimals known, unsigned": (pa.array([Decimal(2**64 - 1)], pa.decimal128(20)), pa.array([2**64 - 1, 1], pa.uint64()), [0, -1]),
    "fine decimals": (pa.array([-1, 1, 3]), pa.array([Decimal("1.5"), Decimal(-1), None], pa.decimal128(38, 30)), [-1, 0, -1]),
    "wide decimals": (pa.array([-1, 1], pa.int16()), pa.array([Decimal(2**64 + 1), Decimal(1)], pa.decimal128(38)), [-1, 1]),
    "decimals, unsigned known": (
        pa.array([5, 2**64 - 1], pa.uint64()), pa.array([Decimal(-1), Decimal(5), Decimal(2**64 - 1)], pa.decimal128(22, 1)), [-1, 0, 1],
    ),
    "decimals, doubles": (pa.array([Decimal("5.10")]), pa.array([5.1, 5.103, 1e300, float("inf")]), [0, -1, -1, -1]),
    "doubles, decimals": (pa.array([5.1, 0.3]), pa.array([Decimal("0.30"), Decimal("5.10"), Decimal("5.11")]), [1, 0, -1]),
    "nothing but nulls": (pa.array([3, 5]), pa.nulls(2), [-1, -1]),
    "nothing but nulls, text": (pa.array(["a", "b"]), pa.nulls(2), [-1, -1]),
    "uuids": (pa.array([b"0" * 16, b"1" * 16], pa.uuid()), pa.array([b"1" * 16, b"2" * 16], pa.uuid()), [1, -1]),
    "enums": (
        enum(["low", "mid", "high"], ["low", "mid", "high"]), enum(["high", "low", None, "mid"], ["low", "mid", "high"]), [2, 0, -1, 1],
    ),
    "enums of another order": (
        enum(["low", "high"], ["low", "mid", "high"]), enum(["high", "mid", "low"], ["mid", "high", "low"]), [1, -1, 0],
    ),
    "enums, text": (enum(["low", "mid"], ["low", "mid"]), pa.array(["mid", "low", "x"]), [1, 0, -1]),
    "text, dictionaries": (pa.array(["a", "b"]), pa.array(["b", "x", None, "a"]).dictionary_encode(), [1, -1, -1, 0]),
    "null in a dictionary": (
        pa.array(["a", "b"]), pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int8()), pa.array(["b", None, "a"])), [1, -1, 0],
    ),
    "dictionaries of numbers": (pa.array([3, 5]), pa.array([5, 3, 4]).dictionary_encode(), [1, 0, -1]),
    "no rows": (pa.array([3, 5]), pa.array([], pa.int64()), []),
    "part of an array": (pa.array([3, 5]), pa.array([9, 3, 5, 7])[1:3], [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_keys_are_found(name: str) -> None:
    known, values, places = FOUND[name]
    found = levels(known)
    assert len(found) == len(known)
    np.testing.assert_array_equal(found.codes([values]), places)
    np.testing.assert_array_equal(found.codes([found.keys.column(0).combine_chunks()]), np.arange(len(known)))


@pytest.mark.parametrize("name", FOUND)
def test_keys_of_several_columns_are_found(name: str) -> None:
    """The same key under two values of another column, whichever comes first."""
    known, values, places = FOUND[name]
    other, m = pa.array(["x"] * len(known) + ["y"] * len(known)), len(known)
    both, rows = pa.concat_arrays([known, known]), pa.array(["y"] * len(values), pa.string())
    want = [place + m if place >= 0 else -1 for place in places]
    np.testing.assert_array_equal(levels(both, other).codes([values, rows]), want)
    np.testing.assert_array_equal(levels(other, both).codes([rows, values]), want)
    assert (levels(both, other).codes([values, pa.array(["z"] * len(values), pa.string())]) == -1).all()


def test_pairs_that_never_met_are_unknown() -> None:
    found = levels(pa.array(["a", "a", "b"]), pa.array([1, 2, 1]))
    a, b = pa.array(["b", "a", "a", "b", "c", None, "a"]), pa.array([1, 2, 1, 2, 1, 1, None])
    np.testing.assert_array_equal(found.codes([a, b]), [2, 1, 0, -1, -1, -1, -1])


def test_three_columns() -> None:
    rng = np.random.default_rng(1)
    rows = np.unique(rng.integers(-4, 5, (200, 3)), axis=0)
    shuffled = rng.permutation(rows)
    found = levels(*(pa.array(column) for column in shuffled.T))
    back = found.codes([pa.array(column) for column in rows.T])
    np.testing.assert_array_equal(shuffled[back], rows)


MOMENTS = [pa.array([0], pa.timestamp("us")), pa.array([0], pa.duration("s")), pa.array([0], pa.time64("us"))]


@pytest.mark.parametrize(
    ("known", "values"),
    [
        (pa.array([1, 2]), pa.array(["1", "x"])), (pa.array([dt.time(1)]), pa.array([dt.date(2020, 1, 1)])),
        *((pa.array([0]), moment) for moment in MOMENTS), *((moment, pa.array([0])) for moment in MOMENTS),
        (pa.array([0], pa.int32()), pa.array([0], pa.date32())), (pa.array([0], pa.date32()), pa.array([0], pa.int32())),
    ],
)  # fmt: skip
def test_a_type_that_cannot_be_compared_is_named(known: pa.Array, values: pa.Array) -> None:
    with pytest.raises(DataError, match="'k0' is of type") as raised:
        levels(known).codes([values])
    assert raised.value.code == "column_type"
    assert raised.value.column == "k0"


def test_many_random_keys() -> None:
    rng = np.random.default_rng(2)
    for span, kind in ((2**62, np.int64), (400, np.int64), (400, str)):
        keys = np.unique(rng.integers(-span, span, 300)).astype(kind)
        values = np.concatenate([rng.choice(keys, 500), rng.integers(-span, span, 100).astype(kind)])
        code = Index("k", pa.array(keys)).codes(pa.array(values))
        np.testing.assert_array_equal(code, [np.flatnonzero(keys == v)[0] if v in keys else -1 for v in values])


@pytest.mark.parametrize("kind", [np.int64, str])
def test_far_more_keys_than_a_batch(kind: type) -> None:
    rng = np.random.default_rng(3)
    numbers = np.unique(rng.integers(-(2**62), 2**62, 30_000))
    keys = rng.permutation(numbers).astype(kind)
    places = rng.integers(0, len(keys), 5_000)
    index = Index("k", pa.array(keys))
    np.testing.assert_array_equal(index.codes(pa.array(keys[places])), places)
    others = np.setdiff1d(rng.integers(-(2**62), 2**62, 5_000), numbers).astype(kind)
    assert (index.codes(pa.array(others)) == -1).all()


def test_text_of_any_length_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(4)
    texts = list(dict.fromkeys(bytes(rng.integers(97, 99, n)).decode() for n in [*range(20), *range(20), 200, 200, 8, 16]))
    index = Index("k", pa.array(texts))
    for place, text in enumerate(texts):
        for rows in ([text], [text, "c" * 300], ["", text, None]):
            assert index.codes(pa.array(rows, pa.large_string()))[rows.index(text)] == place
    assert (index.codes(pa.array([text + "c" for text in texts])) == -1).all()


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(3), pa.decimal128(5)])
def test_keys_that_share_a_hash(kind: pa.DataType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_hashed", lambda data, starts, lengths: np.zeros(len(lengths), dtype=np.int64))
    keys = pa.array(["101", "102", "103", "104"]).cast(pa.string() if kind != pa.decimal128(5) else kind).cast(kind)
    index = Index("k", keys[:3])
    np.testing.assert_array_equal(index.codes(pa.concat_arrays([keys, pa.nulls(1, kind), keys[1:2]])), [0, 1, 2, -1, -1, 1])


def test_combinations_of_many_columns_of_many_keys() -> None:
    """Their possible combinations are more than 2^64."""
    rng = np.random.default_rng(5)
    columns = [pa.array(rng.integers(-(2**62), 2**62, 9_000)) for _ in range(6)]
    found = levels(*columns)
    rows = rng.permutation(9_000)
    np.testing.assert_array_equal(found.codes([column.take(pa.array(rows)) for column in columns]), rows)
    shifted = [*columns[:5], pa.array(np.roll(columns[5].to_numpy(), 1))]
    assert (found.codes(shifted) == -1).all()
