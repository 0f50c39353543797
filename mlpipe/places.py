"""Places of keys among known ones: one table for many batches, where Arrow's `index_in` builds its own each time."""
from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arrays import arrow

if TYPE_CHECKING:
    import pyarrow as pa

LOOKED_UP = 1 << 20  # range of whole numbers up to which they are places in a table themselves
SPREAD = 4  # likewise, by how many times their number
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: Knuth, The Art of Computer Programming 3, 6.4
WORD = 8  # bytes


class Places:
    """The place of each of some whole numbers (m,), 64-bit; of those that repeat any one's. -1 for others.

    A table over their range, or one with open addressing and linear probing at most half full.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers
        kind = np.int32 if len(numbers) < 2**31 else np.int64
        self.first = int(numbers.min()) if len(numbers) else 0
        span = int(numbers.max()) - self.first + 1 if len(numbers) else 0
        self.direct = span <= max(LOOKED_UP, SPREAD * len(numbers))
        bits = max(len(numbers), 1).bit_length() + 1
        self.shift, self.slots = np.uint64(64 - bits), np.full(span if self.direct else 1 << bits, -1, dtype=kind)
        if self.direct:
            self.slots[numbers - self.first] = np.arange(len(numbers))
        else:
            self._fill()

    def find(self, numbers: np.ndarray) -> np.ndarray:
        """The places (n,)."""
        if self.direct:
            return self._found_directly(numbers)
        slot = self._home(numbers)
        out = self.slots[slot].astype(np.int64)
        rows = np.flatnonzero((out >= 0) & (self.numbers[out] != numbers))
        slot = slot[rows]
        while len(rows):
            slot = (slot + 1) & (len(self.slots) - 1)
            found = self.slots[slot]
            out[rows] = found
            open_ = (found >= 0) & (self.numbers[found] != numbers[rows])
            rows, slot = rows[open_], slot[open_]
        return np.asarray(out)

    def _found_directly(self, numbers: np.ndarray) -> np.ndarray:
        last = self.first + len(self.slots) - 1
        if len(numbers) == 0 or (numbers.min() >= self.first and numbers.max() <= last):
            return np.asarray(self.slots[numbers - self.first], dtype=np.int64)
        inside = (numbers >= self.first) & (numbers <= last)
        out = np.full(len(numbers), -1, dtype=np.int64)
        out[inside] = self.slots[numbers[inside] - self.first]
        return out

    def _home(self, numbers: np.ndarray) -> np.ndarray:
        return np.asarray((numbers.view(np.uint64) * MIX) >> self.shift, dtype=np.int64)

    def _fill(self) -> None:
        """Puts each number into the first free slot from its home: in rounds, one of those that want the same slot getting it."""
        rows = np.arange(len(self.numbers))
        slot = self._home(self.numbers)
        while len(rows):
            free = self.slots[slot] < 0
            self.slots[slot[free]] = rows[free]
            left = self.slots[slot] != rows
            rows, slot = rows[left], (slot[left] + 1) & (len(self.slots) - 1)


def words(values: pa.Array) -> tuple[np.ndarray, bool] | None:
    """A 64-bit number (n,) for each value, equal for equal values of one type, and whether equal numbers mean equal values; whatever for
    nulls. None for types that have no plain layout."""
    import pyarrow as pa

    kind = values.type
    plain = pa.types.is_primitive(kind) and not pa.types.is_boolean(kind)
    if not (plain or pa.types.is_decimal(kind) or _has_bytes(kind)):
        return None
    if len(values) == 0:
        return np.zeros(0, dtype=np.int64), True
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return _hashed_text(values, np.int64), False
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return _hashed_text(values, np.int32), False
    width = kind.bit_width // 8
    data = np.frombuffer(values.buffers()[1], np.uint8)[values.offset * width : (values.offset + len(values)) * width]
    if plain:
        return data.view(f"<i{width}").astype(np.int64, copy=False), True
    return _hashed(data, np.arange(len(values), dtype=np.int64) * width, np.full(len(values), width)), False


def _hashed_text(values: pa.Array, offset: type) -> np.ndarray:
    _, offsets, data = values.buffers()
    stops = np.frombuffer(offsets, offset)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    held = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, dtype=np.uint8)
    return _hashed(held[stops[0] : stops[-1]], stops[:-1] - stops[0], np.diff(stops))


def _has_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    test = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(one(kind) for one in test)


def _hashed(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A number for each stretch of bytes, word by word: multiplied, and its high bits folded into the low ones."""
    padded = np.concatenate([data, np.zeros(WORD, dtype=np.uint8)])
    at = np.ndarray((len(data) + 1,), dtype="<u8", buffer=padded, strides=(1,))  # the word from each byte on
    kept = np.array([(1 << (8 * k)) - 1 for k in range(WORD + 1)], dtype=np.uint64)
    out = lengths.astype(np.uint64)
    for done in range(0, max(int(lengths.max()), 1), WORD):
        rows = np.flatnonzero(lengths > done) if done else np.arange(len(lengths))
        left = lengths[rows] - done
        word = at[starts[rows] + done] & kept[np.minimum(left, WORD)]
        mixed = (out[rows] ^ word) * MIX
        out[rows] = mixed ^ (mixed >> np.uint64(29))
    return out.view(np.int64)


class Known:
    """The place of each value among distinct ones; -1 for null and for others."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        found = words(values)
        self.places = None if found is None else Places(found[0])

    def find(self, values: pa.Array) -> np.ndarray:
        """The places (n,) of values of the same type."""
        found = None if self.places is None else words(values)
        if self.places is None or found is None:
            return _index_in(values, self.values)
        numbers, exact = found
        out = self.places.find(numbers)
        if values.null_count:
            out = np.where(_true(values.is_valid()), out, -1)
        return out if exact else self._checked(values, out)

    def _checked(self, values: pa.Array, places: np.ndarray) -> np.ndarray:
        """The places, those whose values only share a hash looked up again."""
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = np.flatnonzero(places >= 0)
        if len(rows) == len(places):
            claimed, given = self.values.take(arrow(places, pa.int64())), values
        else:
            claimed, given = self.values.take(arrow(places[rows], pa.int64())), values.take(arrow(rows, pa.int64()))
        wrong = _true(pc.not_equal(claimed, given))
        if wrong.any():
            again = rows[wrong]
            places[again] = _index_in(values.take(arrow(again, pa.int64())), self.values)
        return places


def _true(values: pa.Array) -> np.ndarray:
    return np.asarray(np.from_dlpack(values.cast("uint8")) > 0)


def _index_in(values: pa.Array, known: pa.Array) -> np.ndarray:
    import pyarrow.compute as pc

    found = pc.index_in(values, value_set=known)
    return np.from_dlpack(pc.fill_null(found, -1) if found.null_count else found).astype(np.int64)
