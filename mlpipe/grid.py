"""Counts of points over a plane of rectangles, in bounded memory: the rectangles double until few enough hold any."""
from __future__ import annotations

import math

import numpy as np

MOST = 5_000  # rectangles
FIRST = 256  # rectangles a side over the first batch's range


class Grid:
    """Points (x, y) of a stream, counted by rectangles whose sides are powers of two.

    Attributes: `width` of x and of y, `cells` (n, 2), whole numbers: a rectangle spans [cell, cell + 1) times its width; `count` (n,).
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.width: tuple[float, float] | None = None
        self.cells = np.zeros((0, 2), dtype=np.int64)
        self.count: np.ndarray = np.zeros(0)

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Takes in points; those that are not finite are left out."""
        kept = np.isfinite(x) & np.isfinite(y)
        points = np.column_stack([x[kept], y[kept]])
        if not len(points):
            return
        if self.width is None:
            spans = np.ptp(points, axis=0)
            sizes = np.where(spans > 0.0, spans, np.maximum(np.abs(points).max(axis=0), 1.0))
            x_size, y_size = (2.0 ** math.ceil(math.log2(size / FIRST)) for size in sizes)
            self.width = x_size, y_size
        while np.abs(points / self.width).max() > 2.0**30:
            self._double(0 if np.abs(points[:, 0]).max() / self.width[0] > 2.0**30 else 1)
        self._merge(np.floor(points / self.width).astype(np.int64), np.ones(len(points)))
        turn = 0
        while len(self.cells) > self.most:
            self._double(turn)
            turn = 1 - turn

    def _double(self, side: int) -> None:
        assert self.width is not None
        width, cells = list(self.width), self.cells.copy()
        width[side] *= 2.0
        cells[:, side] >>= 1
        self.width = (width[0], width[1])
        self.cells, count, self.count = cells[:0], self.count, self.count[:0]
        self._merge(cells, count)

    def _merge(self, cells: np.ndarray, count: np.ndarray) -> None:
        every = np.concatenate([self.cells, cells])
        one = (every[:, 0] << 32) + (every[:, 1] + 2**31)  # a rectangle as one number
        distinct, inverse = np.unique(one, return_inverse=True)
        self.cells = np.column_stack([distinct >> 32, (distinct & (2**32 - 1)) - 2**31])
        total = np.bincount(inverse.ravel(), np.concatenate([self.count, count]), minlength=len(distinct))
        self.count = np.asarray(total, dtype=float)
