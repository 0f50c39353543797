"""Sufficient statistics of simulated responses (FORMULAS R9; DESIGN 4): y = Xβ + Zb + ε without its rows.

Per block e = Z'wε ~ N(0, σ²S) and b ~ N(0, σ²ΛΛ') are independent, and X'wε given all e is N(ΣC_X'S⁻e, σ²(X'wX − ΣC_X'S⁻C_X)); the rest of
ε'wε is χ². Blocks that share S count as one: turned by an orthogonal matrix, their vectors (e, b) are again independent normal, C_X stands
in as many of them as its rank and is zero in the others, whose cross-products are Wishart.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .blocks import Array, BlockChunk, Index
from .crossed import CrossedProblem, Exact, Factor
from .likelihood import LMMProblem
from .small import flat, per_level

NEGLIGIBLE = 1e-9  # eigenvalues of a positive semi-definite matrix, over its largest, that are rounding error
FIRM = 1e5  # Λ, in units of what a level tells, whose ridge stands for a pseudo-inverse


@dataclass(frozen=True)
class _Rest:
    """What of ε is left when e is known: `root` (p, r) of X'wX − ΣC_X'S⁻C_X, `degrees` of the χ²."""

    root: Array
    degrees: float

    @classmethod
    def of(cls, XX: Array, explained: Array, n: float, rank: int) -> _Rest:
        """From X'wX and ΣC_X'S⁻C_X."""
        d = np.sqrt(np.maximum(np.diag(XX), 1e-300))
        values, vectors = np.linalg.eigh((XX - explained) / np.outer(d, d))
        at = values > NEGLIGIBLE * max(1.0, values.max(initial=0.0))
        root = (vectors[:, at] * np.sqrt(values[at])) * d[:, None]
        return cls(root, n - rank - int(at.sum()))

    def draw(self, rng: np.random.Generator) -> tuple[Array, float]:
        """What it adds to X'wε / σ and to ε'wε / σ²."""
        z = np.asarray(rng.normal(size=self.root.shape[1]))
        return self.root @ z, float(z @ z) + (rng.chisquare(self.degrees) if self.degrees > 0 else 0.0)


def _ordered(problem: LMMProblem) -> list[tuple[BlockChunk, Index]]:
    """All blocks, those that share S apart, without the response, and which S each C belongs to, in an order of their own values: engines
    hand blocks over as their threads happen to be done, and a seed must draw the same all the same."""
    out, p, given = [], problem.p, list(problem.chunks())
    for chunks in ([chunk for chunk in given if chunk.owner is None], [chunk for chunk in given if chunk.owner is not None]):
        if not chunks:
            continue
        S, C = np.concatenate([chunk.S for chunk in chunks], axis=2), np.concatenate([chunk.C[:, :p] for chunk in chunks], axis=2)
        count, places = np.concatenate([chunk.count for chunk in chunks]), np.cumsum([0, *(len(chunk.count) for chunk in chunks)])
        owner = np.concatenate([_owner(chunk) + place for chunk, place in zip(chunks, places, strict=False)])
        alone = chunks[0].owner is None
        values = [*S[np.triu_indices(len(S))], *(C.reshape(-1, C.shape[2]) if alone else [])]
        order = np.lexsort(values[::-1])
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        owner = rank[owner]
        rows = np.argsort(owner, kind="stable")
        owner, C = owner[rows], C[:, :, rows]
        out.append((BlockChunk(S[:, :, order], count[order], C if alone else _turned(C, owner), None if alone else owner), owner))
    return out


def _turned(C: Array, owner: Index) -> Array:
    """Blocks (q, p, R) in the order of the S that they share, those of each turned to the principal axes of their outer products, the
    largest element of each positive."""
    out, starts = np.zeros_like(C), np.flatnonzero(np.diff(owner, prepend=-1))
    for a, b in zip(starts, [*starts[1:], len(owner)], strict=True):
        left, values, _ = np.linalg.svd(C[:, :, a:b].reshape(-1, b - a), full_matrices=False)
        axes = left * values
        sign = np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0.0, -1.0, 1.0)
        out[:, :, a : a + axes.shape[1]] = (axes * sign).reshape(*C.shape[:2], -1)
    return out


def _owner(chunk: BlockChunk) -> Index:
    return np.arange(chunk.S.shape[2]) if chunk.owner is None else chunk.owner


def _roots(S: Array) -> tuple[Array, Array, Array]:
    """Per block: a root G (q, q, B) of S, GG' = S; its pseudo-inverse as G⁻ (q, q, B), G⁻'G⁻ = S⁻; its rank (B,)."""
    values, vectors = np.linalg.eigh(S.transpose(2, 0, 1))
    kept = values > NEGLIGIBLE * np.maximum(values[:, -1:], 1e-300)
    size = np.sqrt(np.where(kept, values, 0.0))
    root = (vectors * size[:, None, :]).transpose(1, 2, 0)
    inverse = (vectors * np.where(kept, 1.0 / np.where(kept, size, 1.0), 0.0)[:, None, :]).transpose(2, 1, 0)
    return np.ascontiguousarray(root), np.ascontiguousarray(inverse), kept.sum(axis=1)


class BlockSimulator:
    """Draws problems with one grouping factor. O(distinct S) a draw where blocks share S, else O(blocks)."""

    def __init__(self, problem: LMMProblem, lambda_: Array, sigma: float, beta: Array) -> None:
        self.problem, self.lambda_, self.sigma, self.beta = problem, lambda_, sigma, beta
        p = problem.p
        self.pieces = _ordered(problem)
        explained, rank = np.zeros((p, p)), 0
        for chunk, owner in self.pieces:
            _, inverse, ranks = _roots(chunk.S)
            half = np.einsum("abr,bjr->ajr", inverse[:, :, owner], chunk.C[:, :p])
            explained += np.einsum("ajr,akr->jk", half, half, optimize=True)
            rank += int(ranks @ chunk.count)
        self.XX = problem.A[:p, :p]
        self.rest = _Rest.of(self.XX, explained, problem.n, rank)

    def draw(self, rng: np.random.Generator) -> LMMProblem:
        """One simulated problem, its statistics in memory."""
        p, beta, sigma = self.problem.p, self.beta, self.sigma
        Xe, ee = self.rest.draw(rng)
        Xe, ee, Xb, quadratic = sigma * Xe, sigma**2 * ee, np.zeros(p), 0.0
        chunks = []
        for chunk, owner in self.pieces:
            made, parts = self._chunk(chunk, owner, rng)
            chunks.append(made)
            Xe, Xb = Xe + parts[0], Xb + parts[1]
            ee, quadratic = ee + parts[2], quadratic + parts[3]
        A = np.empty_like(self.problem.A)
        A[:p, :p] = self.XX
        A[:p, p] = A[p, :p] = self.XX @ beta + Xe + Xb
        A[p, p] = beta @ self.XX @ beta + 2.0 * beta @ (Xe + Xb) + quadratic + ee
        return replace(self.problem, chunks=lambda: chunks, A=A)

    def _chunk(self, chunk: BlockChunk, owner: Index, rng: np.random.Generator) -> tuple[BlockChunk, tuple[Array, Array, float, float]]:
        """A chunk with simulated C_y; ΣC_X'S⁻e, ΣC_X'b, Σe'S⁻e, Σ(2b'e + b'Sb)."""
        q, p, rows = len(chunk.S), self.problem.p, chunk.C.shape[2]
        root, inverse, _ = _roots(chunk.S)
        z, u, of = rng.normal(size=(q, rows)), rng.normal(size=(q, rows)), owner
        C_X = chunk.C[:, :p]
        if chunk.owner is not None:
            extra, more = _wishart(chunk.count - np.bincount(owner, minlength=len(chunk.count)), 2 * q, rng)
            z, u = np.hstack([z, extra[:q]]), np.hstack([u, extra[q:]])
            of = np.concatenate([owner, more])
            C_X = np.concatenate([C_X, np.zeros((q, p, len(more)))], axis=2)
        e = self.sigma * np.einsum("abr,br->ar", root[:, :, of], z)
        b = self.sigma * self.lambda_ @ u
        Sb = np.einsum("abr,br->ar", chunk.S[:, :, of], b)
        half = np.einsum("abr,br->ar", inverse[:, :, of], e)
        C = np.concatenate([C_X, (np.einsum("ajr,j->ar", C_X, self.beta) + e + Sb)[:, None]], axis=1)
        made = BlockChunk(chunk.S, chunk.count, C, None if chunk.owner is None else of)
        explained = np.einsum("ajr,bar,br->j", C_X, inverse[:, :, of], half, optimize=True)
        return made, (explained, np.einsum("ajr,ar->j", C_X, b), float((half**2).sum()), float((b * (2.0 * e + Sb)).sum()))


def _wishart(degrees: Array, size: int, rng: np.random.Generator) -> tuple[Array, Index]:
    """Rows (size, R) whose outer products sum to a Wishart matrix of the given degrees of freedom per S, and which S they belong to
    (Bartlett's decomposition; as many normal rows as degrees where these are fewer than `size`)."""
    columns, owner = [], []
    many = np.flatnonzero(degrees >= size)
    for j in range(size):  # column j of Bartlett's lower triangle
        part = np.zeros((size, len(many)))
        part[j] = np.sqrt(rng.chisquare(degrees[many] - j)) if len(many) else 0.0
        part[j + 1 :] = rng.normal(size=(size - 1 - j, len(many)))
        columns.append(part)
        owner.append(many)
    few = np.flatnonzero((degrees > 0) & (degrees < size))
    repeated = np.repeat(few, degrees[few].astype(np.intp))
    columns.append(rng.normal(size=(size, len(repeated))))
    owner.append(repeated)
    return np.hstack(columns), np.concatenate(owner).astype(np.intp)


def dense_effects(problem: CrossedProblem) -> Callable[[np.random.Generator], Array]:
    """A function that draws Z'w^½ε over single effects from a dense root of Z'wZ, where the cells of pairs do not tell it."""
    S = Exact(problem).times(np.eye(sum(f.size for f in problem.factors)))
    values, vectors = np.linalg.eigh(S)
    kept = values > NEGLIGIBLE * values[-1]
    root = vectors[:, kept] * np.sqrt(values[kept])
    return lambda rng: np.asarray(root @ rng.normal(size=root.shape[1]))


class LevelSimulator:
    """Draws problems with several grouping factors; `effects(rng)` draws Z'w^½ε over single effects for ε ~ N(0, I), from the cells."""

    def __init__(
        self, problem: CrossedProblem, lambda_: Array, sigma: float, beta: Array, effects: Callable[[np.random.Generator], Array]
    ) -> None:
        self.problem, self.lambda_, self.sigma, self.beta, self.effects = problem, lambda_, sigma, beta, effects
        p = problem.p
        self.exact = Exact(problem)
        self.firm = np.diag(FIRM / np.sqrt(np.maximum(np.diag(problem.typical), 1e-300)))
        self.M = self.exact.factored(self.firm)
        self.CX = np.concatenate([flat(f.C[:, :p]) for f in problem.factors])
        self.solved = self._pseudo(self.CX)
        null = self.M.inner([np.eye(f.q) for f in problem.factors])
        rank = round(sum(f.size for f in problem.factors) - null)
        self.XX = problem.WW[:p, :p]
        explained = self.CX.T @ self.solved
        self.rest = _Rest.of(self.XX, (explained + explained.T) / 2.0, problem.n, rank)

    def _pseudo(self, v: Array) -> Array:
        """S⁻v for v in the range of S = Z'wZ, by a ridge of 1e-10 of a level's weight."""
        return self._firm(self.M.solve(self._firm(v)))

    def _firm(self, v: Array) -> Array:
        out, place = np.empty_like(v), 0
        for f, a in zip(self.problem.factors, self.problem.offsets, strict=False):
            rows = slice(place, place + f.size)
            place += f.size
            scale = np.diag(self.firm)[a : a + f.q]
            out[rows] = (v[rows].reshape(f.levels, f.q, -1) * scale[None, :, None]).reshape(f.size, -1)
        return out

    def draw(self, rng: np.random.Generator) -> CrossedProblem:
        """One simulated problem."""
        problem, sigma, beta, p = self.problem, self.sigma, self.beta, self.problem.p
        e = sigma * self.effects(rng)
        b = np.concatenate([
            (sigma * rng.normal(size=(f.levels, f.q)) @ lam.T).ravel()
            for f, lam in zip(problem.factors, problem.lambdas(self.lambda_), strict=True)
        ])  # fmt: skip
        Sb = self.exact.times(b[:, None])[:, 0]
        Xe, ee = self.rest.draw(rng)
        Xe = sigma * Xe + self.solved.T @ e
        ee = sigma**2 * ee + float(e @ self._pseudo(e[:, None])[:, 0])
        Xb = self.CX.T @ b
        Zy = self.CX @ beta + e + Sb
        WW = np.empty_like(problem.WW)
        WW[:p, :p] = self.XX
        WW[:p, p] = WW[p, :p] = self.XX @ beta + Xe + Xb
        WW[p, p] = beta @ self.XX @ beta + 2.0 * beta @ (Xe + Xb) + b @ (2.0 * e + Sb) + ee
        factors, place = [], 0
        for f in problem.factors:
            y = per_level(Zy[place : place + f.size, None], f.q)
            place += f.size
            factors.append(Factor(f.S, np.concatenate([f.C[:, :p], y], axis=1)))
        return replace(problem, factors=tuple(factors), WW=WW)
