"""The naive truth for linear mixed models with several grouping factors: V, M and every derivative as dense matrices."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg as la

from mlpipe.solve.crossed import Cells, CrossedProblem, Factor
from mlpipe.solve.link import Array


@dataclass
class Grouping:
    """One factor: level `codes` of each row, its random covariates `Z` (n, q), the `sizes` of its terms."""

    codes: np.ndarray
    Z: Array
    sizes: tuple[int, ...]

    @property
    def levels(self) -> int:
        return int(self.codes.max()) + 1

    @property
    def q(self) -> int:
        return self.Z.shape[1]

    @property
    def full(self) -> Array:
        """The columns over single effects (n, m q), level by level."""
        out = np.zeros((len(self.codes), self.levels, self.q))
        out[np.arange(len(self.codes)), self.codes] = self.Z
        return out.reshape(len(self.codes), -1)


@dataclass
class DenseSeveral:
    """Rows of a model: X (n, p), y, weights w, grouping factors. Λ is one block a factor, as in `CrossedProblem`."""

    X: Array
    y: Array
    w: Array
    factors: list[Grouping]
    reml: bool

    @property
    def Z(self) -> Array:
        return np.hstack([f.full for f in self.factors])

    @property
    def degrees(self) -> float:
        return len(self.y) - (self.X.shape[1] if self.reml else 0)

    def spread(self, lambda_: Array) -> Array:
        """Λ over single effects."""
        ends = np.cumsum([0, *(f.q for f in self.factors)])
        blocks = [np.kron(np.eye(f.levels), lambda_[a:b, a:b]) for f, a, b in zip(self.factors, ends[:-1], ends[1:], strict=True)]
        return np.asarray(la.block_diag(*blocks))

    def V(self, lambda_: Array) -> Array:
        half = self.Z @ self.spread(lambda_)
        return np.asarray(half @ half.T + np.diag(1.0 / self.w))

    def M(self, lambda_: Array) -> Array:
        half = self.Z @ self.spread(lambda_)
        return np.asarray(half.T @ (half * self.w[:, None]) + np.eye(half.shape[1]))

    def gls(self, lambda_: Array) -> tuple[Array, float, Array]:
        """β, the generalised residual sum of squares, X'V⁻¹X."""
        V = self.V(lambda_)
        XV = la.solve(V, self.X, assume_a="pos").T
        information = XV @ self.X
        beta = la.solve(information, XV @ self.y) if self.X.shape[1] else np.zeros(0)
        r = self.y - self.X @ beta
        return beta, float(r @ la.solve(V, r, assume_a="pos")), information

    def loglik(self, lambda_: Array) -> float:
        """ℓ with σ² profiled out."""
        _, rss, information = self.gls(lambda_)
        out = np.linalg.slogdet(self.V(lambda_))[1] + self.degrees * (1.0 + np.log(2 * np.pi * rss / self.degrees))
        return float(-(out + (np.linalg.slogdet(information)[1] if self.reml else 0.0)) / 2.0)

    def modes(self, lambda_: Array) -> Array:
        """u over single effects."""
        r = self.y - self.X @ self.gls(lambda_)[0]
        return np.asarray((self.Z @ self.spread(lambda_)).T @ la.solve(self.V(lambda_), r, assume_a="pos"))

    def traces(self, lambda_: Array) -> list[Array]:
        """T_k = Σ_i (Z'wZΛM⁻¹)_ki,ki."""
        Z = self.Z
        whole = Z.T @ (Z * self.w[:, None]) @ self.spread(lambda_) @ la.inv(self.M(lambda_))
        return [block.sum(axis=2) for block in self.diagonal(whole)]

    def diagonal(self, whole: Array) -> list[Array]:
        """The blocks (q_k, q_k, m_k) of a matrix over single effects."""
        out, at = [], 0
        for f in self.factors:
            places = at + np.arange(f.levels * f.q).reshape(-1, f.q)
            out.append(whole[places[:, :, None], places[:, None, :]].transpose(1, 2, 0))
            at += f.levels * f.q
        return out

    def score(self, lambda_: Array, entries: tuple[tuple[int, int], ...], step: float = 1e-5) -> Array:
        """∂ℓ/∂Λ by central differences of the fourth order."""
        out = []
        for i, j in entries:
            move = np.zeros_like(lambda_)
            move[i, j] = step
            near = self.loglik(lambda_ + move) - self.loglik(lambda_ - move)
            far = self.loglik(lambda_ + 2 * move) - self.loglik(lambda_ - 2 * move)
            out.append((8.0 * near - far) / (12.0 * step))
        return np.array(out)

    def average_information(self, lambda_: Array, entries: tuple[tuple[int, int], ...]) -> Array:
        """½ y'P V_a P V_b P y over Λ's entries and σ² (Gilmour, Thompson and Cullis 1995), σ² eliminated."""
        _, rss, information = self.gls(lambda_)
        s2, W = rss / self.degrees, la.inv(self.V(lambda_))
        P = (W - W @ self.X @ la.solve(information, self.X.T @ W)) / s2 if self.X.shape[1] else W / s2
        whole, derivatives = self.spread(lambda_), []
        for i, j in entries:
            D = np.zeros_like(lambda_)
            D[i, j] = 1.0
            moved = self.Z @ self.spread(D) @ whole.T @ self.Z.T
            derivatives.append(s2 * (moved + moved.T))
        derivatives.append(self.V(lambda_))
        columns = np.column_stack([V_a @ P @ self.y for V_a in derivatives])
        every = columns.T @ P @ columns / 2.0
        return np.asarray(every[:-1, :-1] - np.outer(every[:-1, -1], every[-1, :-1]) / every[-1, -1])

    def problem(self) -> CrossedProblem:
        """The same model as sufficient statistics."""
        W = np.column_stack([self.X, self.y])
        weighted = [f.full.T * self.w for f in self.factors]
        factors = []
        for f, side in zip(self.factors, weighted, strict=True):
            S = (side @ f.full).reshape(f.levels, f.q, f.levels, f.q)
            at = np.arange(f.levels)
            factors.append(Factor(S[at, :, at].transpose(1, 2, 0), (side @ W).reshape(f.levels, f.q, -1).transpose(1, 2, 0)))
        cells = {(k, h): self._cells(k, h) for k in range(len(self.factors)) for h in range(k + 1, len(self.factors))}
        A = W.T @ (W * self.w[:, None])
        terms = tuple(f.sizes for f in self.factors)
        return CrossedProblem(tuple(factors), cells, A, float(len(self.y)), float(np.log(self.w).sum()), self.reml, terms)

    def _cells(self, k: int, h: int) -> Cells:
        left, right = self.factors[k], self.factors[h]
        whole = (left.full.T * self.w) @ right.full
        whole = whole.reshape(left.levels, left.q, right.levels, right.q)
        met = np.unique(np.column_stack([left.codes, right.codes]), axis=0)
        return Cells(met[:, 0], met[:, 1], whole[met[:, 0], :, met[:, 1]].transpose(1, 2, 0))
