"""What a GLMM with several grouping factors is to its solvers: rows with level codes, sums over them, and M = Λ'Z'WZΛ + I factored."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp

from .density import Density
from .elimination import eliminate
from .kernel import Kernel, Piece, Rows
from .link import Array
from .meetings import Inverse, Pairs, inverse
from .several_factors import SeveralFactors
from .small import flat, per_level

SCATTERED = 16  # levels that a part's codes span, per row, from which sums are added one by one


@dataclass(frozen=True)
class Part:
    """Some rows: `rows` and, per factor, the level (n,) of each; per pair of factors, the place (n,) of its cell among the pair's; `place`
    tells the parts apart."""

    rows: Rows
    codes: tuple[np.ndarray, ...]
    cells: dict[tuple[int, int], np.ndarray]
    place: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class JointProblem(SeveralFactors):
    """`density`; `Q` (m, p): gamma = Q beta*; a `kernels` entry per factor gives its random columns; `levels` m_k; `terms`, sizes of the
    random terms of each factor; `pairs`, the cells; `scan(work)` calls work on every part of the rows, in any order, perhaps at once.

    Factors are in the order of their random effects, most first.
    """

    density: Density
    Q: Array
    kernels: tuple[Kernel, ...]
    levels: tuple[int, ...]
    terms: tuple[tuple[int, ...], ...]
    pairs: Pairs
    scan: Callable[[Callable[[Part], None]], None]
    square: bool = False

    @property
    def p(self) -> int:
        """The number of coefficients."""
        return int(self.Q.shape[1])

    @property
    def ends(self) -> list[int]:
        """Where each factor's random effects start, and their end."""
        return [0, *np.cumsum([kernel.q * m for kernel, m in zip(self.kernels, self.levels, strict=True)]).tolist()]

    def split(self, x: Array) -> list[Array]:
        """x over single effects (all, k), per factor as (q_k, k, m_k)."""
        ends = zip(self.kernels, self.ends[:-1], self.ends[1:], strict=True)
        return [per_level(x[a:b], kernel.q) for kernel, a, b in ends]

    def joined(self, parts: Sequence[Array]) -> Array:
        """The inverse of `split`."""
        return np.concatenate([part.transpose(2, 0, 1).reshape(part.shape[0] * part.shape[2], part.shape[1]) for part in parts])

    def scaled(self, lambda_: Array, x: Array, *, transpose: bool = False) -> Array:
        """Λx, or Λ'x, for x over single effects (all, k)."""
        lams = [lam.T if transpose else lam for lam in self.lambdas(lambda_)]
        return self.joined([np.einsum("ab,bkm->akm", lam, part) for lam, part in zip(lams, self.split(x), strict=True)])


@dataclass
class Weights:
    """Z'WZ: per factor its blocks `S` (q_k, q_k, m_k), per pair the blocks `cells` (q_k, q_h, c)."""

    S: list[Array]
    cells: dict[tuple[int, int], Array]

    @classmethod
    def zeros(cls, problem: JointProblem) -> Weights:
        """Nothing summed yet."""
        S = [np.zeros((kernel.q, kernel.q, m)) for kernel, m in zip(problem.kernels, problem.levels, strict=True)]
        return cls(S, {pair: np.zeros((*pattern.shape, len(pattern.rows))) for pair, pattern in problem.pairs.items()})

    def add(self, part: Part, pieces: Sequence[Piece], w: Array) -> None:
        """Adds some rows."""
        left = [[piece.times(a, w) for a in range(len(piece.Z))] for piece in pieces]
        for k, (piece, code) in enumerate(zip(pieces, part.codes, strict=True)):
            for a in range(len(piece.Z)):
                for b in range(a + 1):
                    _add(self.S[k][a, b], code, piece.times(b, left[k][a]))
        for (k, h), cell in part.cells.items():
            for a, weighted in enumerate(left[k]):
                for b in range(len(pieces[h].Z)):
                    _add(self.cells[k, h][a, b], cell, pieces[h].times(b, weighted))

    def finished(self) -> Weights:
        """With the upper triangles of S."""
        for S in self.S:
            for a in range(len(S)):
                for b in range(a):
                    S[b, a] = S[a, b]
        return self

    def times(self, problem: JointProblem, b: Array) -> Array:
        """Z'WZ b for b over single effects (all, k)."""
        parts, ends = problem.split(b), problem.ends
        out = [flat(np.einsum("ijm,jkm->ikm", S, part)) for S, part in zip(self.S, parts, strict=True)]
        for (k, h), values in self.cells.items():
            a = problem.pairs[k, h].matrix(values)
            out[k] += a @ b[ends[h] : ends[h + 1]]
            out[h] += a.T @ b[ends[k] : ends[k + 1]]
        return np.concatenate(out)

    def spherical(self, problem: JointProblem, lambda_: Array) -> Weights:
        """Λ'Z'WZΛ + I."""
        lams = problem.lambdas(lambda_)
        S = [np.eye(len(s))[:, :, None] + np.einsum("ia,ijm,jb->abm", lam, s, lam) for lam, s in zip(lams, self.S, strict=True)]
        cells = {
            (k, h): np.einsum("ia,ijc,jb->abc", lams[k], values, lams[h], optimize=True) for (k, h), values in self.cells.items()
        }
        return Weights(S, cells)


class Factored(Protocol):
    """M, ready to be solved."""

    @property
    def logdet(self) -> float: ...

    def solve(self, b: Array) -> Array: ...


class Solver(Protocol):
    """How M is worked with: factored, or by iterations."""

    def factored(self, problem: JointProblem, lambda_: Array, weights: Weights) -> Factored:
        """M of these weights. Raises LinAlgError where it is not positive definite."""
        ...

    def spread(self, problem: JointProblem, lambda_: Array, weights: Weights, M: Factored) -> Spread:
        """What of M⁻¹ the rows need."""
        ...

    def roughly(self, M: Factored, b: Array) -> Array:
        """M⁻¹b, as well as an approximation of the information needs it."""
        ...


@dataclass
class Spread:
    """What of M⁻¹ the rows need: `Y` blocks of ΛM⁻¹Λ' on diagonals and cells, for leverages z'Yz; `traces` T_k = Σ_i (Z'WZΛM⁻¹)_ki,ki;
    `more`: pairs of vectors over single effects (all, k) the mean of whose products is what the blocks leave out, and `trace_parts`
    (q_k, q_k, k) the same of the traces (k probes)."""

    blocks: list[Array]
    cells: dict[tuple[int, int], Array]
    traces: list[Array]
    more: tuple[Array, Array] | None = None
    trace_parts: list[Array] | None = None


class Exactly:
    """M factored by elimination."""

    def factored(self, problem: JointProblem, lambda_: Array, weights: Weights) -> Factored:
        """See Solver."""
        M = weights.spherical(problem, lambda_)
        cross: dict[tuple[int, int], sp.csr_matrix] = {pair: problem.pairs[pair].matrix(values) for pair, values in M.cells.items()}
        made = eliminate(M.S, cross)
        if not math.isfinite(made.logdet):
            raise np.linalg.LinAlgError("not positive definite")
        return made

    def inverse(self, problem: JointProblem, lambda_: Array, weights: Weights, M: Any) -> Inverse:
        """M⁻¹ on diagonal blocks and cells."""
        return inverse(M, problem.pairs, weights.spherical(problem, lambda_).cells)

    def spread(self, problem: JointProblem, lambda_: Array, weights: Weights, M: Factored) -> Spread:
        """See Solver."""
        return spread_of(problem, lambda_, weights, self.inverse(problem, lambda_, weights, M))

    def roughly(self, M: Factored, b: Array) -> Array:
        """See Solver."""
        return M.solve(b)


def spread_of(problem: JointProblem, lambda_: Array, weights: Weights, at: Inverse) -> Spread:
    """What the rows need, from M⁻¹ on its diagonal blocks and on cells."""
    lams = problem.lambdas(lambda_)
    blocks = [np.einsum("ia,abm,jb->ijm", lam, block, lam) for lam, block in zip(lams, at.blocks, strict=True)]
    cells = {(k, h): np.einsum("ia,abc,jb->ijc", lams[k], block, lams[h]) for (k, h), block in at.cells.items()}
    traces = [np.einsum("ijm,ja,abm->ib", S, lam, block) for S, lam, block in zip(weights.S, lams, at.blocks, strict=True)]
    for (k, h), block in at.cells.items():
        Z = weights.cells[k, h]
        traces[k] = traces[k] + np.einsum("ijc,jb,abc->ia", Z, lams[h], block, optimize=True)
        traces[h] = traces[h] + np.einsum("jic,ja,abc->ib", Z, lams[k], block, optimize=True)
    return Spread(blocks, cells, traces)


def _add(total: Array, code: np.ndarray, values: Array) -> None:
    """Adds values (n,) to total at codes (n,)."""
    if not len(code):
        return
    low, high = int(code.min()), int(code.max()) + 1
    if high - low > SCATTERED * len(code):
        np.add.at(total, code, values)
    else:
        total[low:high] += np.bincount(code - low, values, minlength=high - low)


def add_levels(totals: list[Array], part: Part, pieces: Sequence[Piece], values: Iterable[Array]) -> None:
    """Adds Z'v per level, for several v (n,), to (q_k, k, m_k) of each factor."""
    held = list(values)
    for total, piece, code in zip(totals, pieces, part.codes, strict=True):
        for column, v in enumerate(held):
            for a in range(len(piece.Z)):
                _add(total[a, column], code, piece.times(a, v))
