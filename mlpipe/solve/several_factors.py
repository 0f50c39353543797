"""What problems over several grouping factors share: where the random terms of each lie in Λ."""
from __future__ import annotations

import numpy as np

from .link import Array


def spans(sizes: tuple[int, ...]) -> list[slice]:
    """Where each term's columns are in Λ."""
    stops = np.cumsum([0, *sizes]).tolist()
    return [slice(a, b) for a, b in zip(stops[:-1], stops[1:], strict=True)]


def squares(sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """All elements of the terms' blocks of Λ, by rows."""
    return tuple((i, j) for at in spans(sizes) for i in range(at.start, at.stop) for j in range(at.start, at.stop))


class SeveralFactors:
    """`terms`: per factor, the sizes of its random terms; Λ is block-diagonal over factors, and over the terms of each; lower triangular
    unless `square`."""

    terms: tuple[tuple[int, ...], ...]
    square: bool = False

    @property
    def offsets(self) -> list[int]:
        """Where each factor's part of Λ starts, and their end."""
        return [0, *np.cumsum([sum(sizes) for sizes in self.terms]).tolist()]

    @property
    def entries(self) -> tuple[tuple[int, int], ...]:
        """The free elements of Λ (over all factors), lower triangles by column (squares by row), terms in order."""
        out, at = [], 0
        if self.square:
            return squares(tuple(k for sizes in self.terms for k in sizes))
        for sizes in self.terms:
            for k in sizes:
                out += [(at + i, at + j) for j in range(k) for i in range(j, k)]
                at += k
        return tuple(out)

    def lambdas(self, lambda_: Array) -> list[Array]:
        """Λ of each factor."""
        return [lambda_[a:b, a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]
