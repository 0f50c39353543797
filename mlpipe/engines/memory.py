"""How much a grouped aggregate of DuckDB may hold before it spills.

Each thread keeps a hash table of its own, and DuckDB grants all of them together somewhat less than half of its memory. Past
that it stops combining rows: nearly every row is written to disk, at several times the cost of reading it again.

A table addressed by a whole-number key, with a slot for every number of the key's range, is outside of that account, and of DuckDB's
memory limit: DuckDB takes it as large as `perfect_ht_threshold` lets it.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from sqlglot import exp

from ..options import parse_bytes
from .dialects import call

if TYPE_CHECKING:
    import pyarrow as pa

    from ..options import Options

READERS = 150_000_000  # bytes that scans hold
SHARE = 0.35  # of the rest, granted to the tables of all threads: measured, 0.40 to 0.45 spill
LEAST = 1 / 6  # of the limit, where scans would leave nothing

STATE = 16  # bytes of one sum
DIRECT = 12  # bits of a key's range up to which DuckDB itself takes a table addressed by the key instead of a hash table
MOST_BITS = 32  # that it can be set to
NOT_KEYS = 2  # slots of such a table that are no key's
ROWS_PER_SLOT = 4  # fewer, and clearing the slots would cost more than hashing

SETTINGS = exp.select(
    *(exp.alias_(call("current_setting", exp.Literal.string(name)), name) for name in ("memory_limit", "threads"))
)


def distinct_keys(keys: Sequence[int]) -> exp.Select:
    """The statement that counts distinct keys, within a few percent."""
    hashed = call("hash", *(exp.column(f"k{i}") for i in keys))
    return exp.select(exp.alias_(exp.ApproxDistinct(this=hashed), "keys")).from_("src")


def table_room(settings: pa.Table) -> int:
    """Bytes for the table of one thread under the SETTINGS of a connection."""
    (row,) = settings.to_pylist()
    return _room(parse_bytes(row["memory_limit"]), int(row["threads"]))


def direct_bits(statement: exp.Query, rows: int, options: Options) -> int:
    """Bits of a key's range up to which the innermost aggregates of a statement over so many rows may lie in a table addressed by the
    key: on rows in random order it takes three quarters of a hash table's time, but each thread holds the whole range, and so does
    the table that takes in those of all threads."""
    grouped = [select for select in statement.find_all(exp.Select) if select.args.get("group")]
    if not grouped:
        return DIRECT
    slot = STATE * len({aggregate.sql() for aggregate in grouped[-1].find_all(exp.AggFunc)})
    arrays = options.memory_bytes // 4 if len(grouped) > 1 else 0  # nothing to fill them with where groups are grouped again
    tables = (options.threads or os.cpu_count() or 1) + 1
    slots = min(rows // ROWS_PER_SLOT, _beside_readers(options.engine_bytes + arrays) // (tables * slot))
    return max(slots.bit_length() - 1, DIRECT)


def ranges(low: int, high: int, bits: int) -> list[tuple[int, int]]:
    """The numbers from `low` to `high` in the fewest ranges, all about as wide, that tables addressed by so many bits can take."""
    span = high - low + 1
    count = -(-span // ((1 << bits) - NOT_KEYS))
    starts = [low + span * i // count for i in range(count + 1)]
    return [(start, after - 1) for start, after in pairwise(starts)]


def _room(limit: int, threads: int) -> int:
    return max(1, int(_beside_readers(limit) * SHARE / threads))


def _beside_readers(limit: int) -> int:
    return int(max(limit - READERS, limit * LEAST))
