"""B-splines and natural splines as polynomial pieces: numbers only."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Polynomial = list[float]  # coefficients, the constant first


@dataclass(frozen=True)
class Piece:
    """All basis functions up to `stop`: the row of each holds its coefficients in powers of (x - start) / width."""

    stop: float
    start: float
    width: float
    rows: list[Polynomial]

    def keep(self, first: int) -> Piece:
        """Without the rows before `first`."""
        return Piece(self.stop, self.start, self.width, self.rows[first:])

    def mixed(self, matrix: Sequence[Sequence[float]]) -> Piece:
        """The rows of matrix @ rows."""
        columns = list(zip(*self.rows, strict=True))
        rows = [[math.fsum(a * b for a, b in zip(weights, column, strict=True)) for column in columns] for weights in matrix]
        return Piece(self.stop, self.start, self.width, rows)


def pieces(knots: list[float], degree: int) -> list[Piece]:
    """The B-splines over each non-empty interval between knots, by the Cox-de Boor recursion on coefficients."""
    count = len(knots) - degree - 1
    out = []
    for i in range(degree, count):
        start, width = knots[i], knots[i + 1] - knots[i]
        if width <= 0:
            continue
        active: dict[int, Polynomial] = {i: [1.0]}
        for k in range(1, degree + 1):
            raised = {j: [0.0] * (k + 1) for j in range(i - k, i + 1)}
            for j, polynomial in active.items():
                span = knots[j + k] - knots[j]
                rise, fall = (start - knots[j]) / span, (knots[j + k] - start) / span
                for power, value in enumerate(polynomial):
                    raised[j][power] += rise * value
                    raised[j][power + 1] += width / span * value
                    raised[j - 1][power] += fall * value
                    raised[j - 1][power + 1] -= width / span * value
            active = raised
        out.append(Piece(knots[i + 1], start, width, [active.get(j, [0.0] * (degree + 1)) for j in range(count)]))
    return out


def natural(inside: Sequence[Piece]) -> list[Piece]:
    """The splines without second derivative at both ends, as R's ns has them, and straight lines beyond.

    ns multiplies by the part of Q of the constraints' QR decomposition that is orthogonal to them.
    """
    first, last = inside[0], inside[-1]
    at_start = [row[2] / first.width**2 for row in first.rows]
    at_end = [(row[2] + 3 * row[3]) / last.width**2 for row in last.rows]
    matrix = _complement([at_start, at_end])
    inside = [piece.mixed(matrix) for piece in inside]
    first, last = inside[0], inside[-1]
    left = Piece(first.start, first.start, first.width, [row[:2] for row in first.rows])
    # Value and slope at the right end, in powers of (x - stop) / width.
    ends = [[math.fsum(row), math.fsum(k * value for k, value in enumerate(row))] for row in last.rows]
    return [left, *inside, Piece(math.inf, last.stop, last.width, ends)]


def _complement(constraints: list[list[float]]) -> list[list[float]]:
    """Rows of Q' beyond the first len(constraints), Q from Householder's QR of the constraints as columns.

    Each reflection turns a column onto its axis with the opposite sign, as LINPACK does: R's own basis, not only its span.
    """
    size = len(constraints[0])
    columns = [list(column) for column in constraints] + [[float(i == j) for i in range(size)] for j in range(size)]
    for step in range(len(constraints)):
        mirror = [0.0] * step + columns[step][step:]
        mirror[step] += math.copysign(math.hypot(*mirror), mirror[step])
        square = math.fsum(value * value for value in mirror)
        for column in columns[step:]:
            share = 2 * math.fsum(a * b for a, b in zip(mirror, column, strict=True)) / square
            column[:] = [value - share * along for value, along in zip(column, mirror, strict=True)]
    transposed = list(zip(*columns[len(constraints) :], strict=True))
    return [list(row) for row in transposed[len(constraints) :]]
