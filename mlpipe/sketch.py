"""Quantiles and moments of a stream of numbers in bounded memory."""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

SIZE = 16_384  # values of a buffer


class Sketch:
    """A mergeable quantile sketch of compacted buffers (Manku, Rajagopalan and Lindsay 1998), deterministic: of a full buffer of weight
    w every second value of its sorted ones goes on with weight 2w, the odd and the even ones in turn.

    Up to SIZE values all is exact. Attributes: `n`, `low`, `high` of the values; `rank_error`, a bound on the error of any rank.
    """

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.buffers: list[np.ndarray] = [np.zeros(0)]
        self.turns: list[int] = [0]
        self.n, self.low, self.high, self.rank_error = 0, math.inf, -math.inf, 0.0
        self.mean, self._m2, self._m3, self._m4 = 0.0, 0.0, 0.0, 0.0

    def add(self, values: np.ndarray) -> None:
        """Takes in values (n,); those that are not finite are left out."""
        values = np.asarray(values, dtype=float)
        values = values[np.isfinite(values)]
        if not len(values):
            return
        self._moments(values)
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        for start in range(0, len(values), self.size):
            self._push(0, values[start : start + self.size])

    def _push(self, level: int, values: np.ndarray) -> None:
        if level == len(self.buffers):
            self.buffers.append(np.zeros(0))
            self.turns.append(0)
        held = np.concatenate([self.buffers[level], values])
        self.buffers[level] = held
        if len(held) <= self.size:
            return
        held = np.sort(held)
        even = len(held) // 2 * 2  # an odd one out stays, so that weights add up to n
        self.buffers[level] = held[even:]
        chosen = held[self.turns[level] : even : 2]
        self.turns[level] = 1 - self.turns[level]
        self.rank_error += 2.0**level
        self._push(level + 1, chosen)

    def _moments(self, values: np.ndarray) -> None:
        """Adds central moments up to the fourth (Pébay 2008)."""
        a, b = float(self.n), float(len(values))
        n, mean = a + b, float(values.mean())
        d = values - mean
        m2, m3, m4 = (float((d**k).sum()) for k in (2, 3, 4))
        delta = mean - self.mean
        self._m4 += (
            m4 + delta**4 * a * b * (a * a - a * b + b * b) / n**3 + 6.0 * delta**2 * (a * a * m2 + b * b * self._m2) / n**2
            + 4.0 * delta * (a * m3 - b * self._m3) / n
        )  # fmt: skip
        self._m3 += m3 + delta**3 * a * b * (a - b) / n**2 + 3.0 * delta * (a * m2 - b * self._m2) / n
        self._m2 += m2 + delta**2 * a * b / n
        self.mean += delta * b / n
        self.n += len(values)

    @property
    def sd(self) -> float:
        """The standard deviation (n - 1)."""
        return math.sqrt(self._m2 / (self.n - 1)) if self.n > 1 else math.nan

    @property
    def skewness(self) -> float:
        """The third standardized moment."""
        return math.sqrt(self.n) * self._m3 / self._m2**1.5 if self._m2 > 0.0 else math.nan

    @property
    def kurtosis(self) -> float:
        """The fourth standardized moment less 3, 0 for a normal distribution."""
        return self.n * self._m4 / self._m2**2 - 3.0 if self._m2 > 0.0 else math.nan

    def quantiles(self, probabilities: Sequence[float] | np.ndarray) -> np.ndarray:
        """Type-7 quantiles (Hyndman and Fan 1996): exact up to SIZE values, then of the weighted sketch."""
        p = np.asarray(probabilities, dtype=float)
        if not self.n:
            return np.full(len(p), math.nan)
        values = np.concatenate(self.buffers)
        weights = np.concatenate([np.full(len(b), 2.0**k) for k, b in enumerate(self.buffers)])
        order = np.argsort(values, kind="stable")
        values, weights = values[order], weights[order]
        middle = np.cumsum(weights) - 0.5 * (weights + 1.0)  # the mean rank, from 0, of what each value stands for
        out = np.interp(p * (self.n - 1), middle, values)
        out[p <= 0.0], out[p >= 1.0] = self.low, self.high
        return np.asarray(out)
