"""Exact quantiles in bounded memory: count, narrow, and fetch only the few values around each rank."""
from __future__ import annotations

import math
from collections.abc import Sequence

from sqlglot import exp

from . import expr, statements
from .engines.base import Columns, Engine
from .sql import Expression, Names, both, number, numeric

FETCH = 20_000  # values near a rank that are fetched and sorted
BINS = 256


class Selector:
    """Finds order statistics of an expression over the rows of a source where `where` holds."""

    def __init__(self, engine: Engine, argument: expr.Node, names: Names, where: Expression, columns: Columns) -> None:
        self.engine, self.argument, self.names, self.where, self.columns = engine, argument, names, where, columns

    def quantiles(self, probabilities: Sequence[float], n: int, low: float, high: float) -> tuple[float, ...]:
        """R's type-7 quantiles of the n values, which lie between low and high (Hyndman & Fan 1996)."""
        out = []
        for probability in probabilities:
            rank = (n - 1) * probability
            below = math.floor(rank)
            first, second = self.order_statistics(below, min(below + 1, n - 1), n, low, high)
            out.append(first + (rank - below) * (second - first))
        return tuple(out)

    def order_statistics(self, i: int, j: int, n: int, low: float, high: float) -> tuple[float, float]:
        """The i-th and j-th smallest values (0-based, j is i or i + 1) of the n values in [low, high]."""
        before, inside = 0, n
        while inside > FETCH:
            edges, counts = self._histogram(low, high)
            if len(counts) < 2:
                return low, low
            k, seen = 0, before
            while seen + counts[k] <= i:
                seen += counts[k]
                k += 1
            if j >= seen + counts[k]:  # the ranks stand on either side of a gap between bins
                return edges[k][1], edges[k + 1][0]
            before, inside, (low, high) = seen, counts[k], edges[k]
        values = sorted(self._values(low, high))
        return values[i - before], values[j - before]

    def _where(self, low: float, high: float) -> Expression:
        x = numeric(self.argument, self.names)
        between = exp.Between(this=exp.Paren(this=x), low=number(low), high=number(high))
        return both([self.where.copy(), between])

    def _histogram(self, low: float, high: float) -> tuple[list[tuple[float, float]], list[int]]:
        """The least and greatest value and the count of each bin that holds any, in order."""
        rows = self.engine.query(statements.histogram(self.argument, self.names, self._where(low, high), low, high, BINS), self.columns)
        found = sorted(rows.read_all().to_pylist(), key=lambda row: row["low"])
        return [(row["low"], row["high"]) for row in found], [int(row["row_count"]) for row in found]

    def _values(self, low: float, high: float) -> list[float]:
        table = self.engine.query(statements.values(self.argument, self.names, self._where(low, high)), self.columns).read_all()
        return [float(x) for x in table.column("x0").to_pylist()]
