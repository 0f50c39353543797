"""The naive truth for linear mixed models: V as a matrix, log-determinants, scipy; slow and obvious."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg as la
import scipy.optimize as so

from mlpipe.solve.blocks import Array, BlockChunk
from mlpipe.solve.likelihood import LMMProblem


@dataclass
class Dense:
    """Rows of a linear mixed model with one grouping factor: X (n, p), Z (n, q), y, weights w, block of each row."""

    X: Array
    Z: Array
    y: Array
    w: Array
    block: Array
    sizes: tuple[int, ...]
    reml: bool

    def V(self, psi: Array) -> Array:
        """Relative covariance of y, (n, n)."""
        same = self.block[:, None] == self.block[None, :]
        return np.where(same, self.Z @ psi @ self.Z.T, 0.0) + np.diag(1.0 / self.w)

    def gls(self, psi: Array) -> tuple[Array, float, Array]:
        """β, generalised residual sum of squares, X'V⁻¹X."""
        V = self.V(psi)
        XV = la.solve(V, self.X, assume_a="pos").T
        information = XV @ self.X
        beta = la.solve(information, XV @ self.y) if self.X.shape[1] else np.zeros(0)
        r = self.y - self.X @ beta
        return beta, float(r @ la.solve(V, r, assume_a="pos")), information

    def deviance(self, psi: Array, s2: float | None = None) -> float:
        """−2ℓ at Ψ, σ² profiled or given."""
        n, p = self.X.shape
        _, rss, information = self.gls(psi)
        dof = n - p if self.reml else n
        s2 = rss / dof if s2 is None else s2
        out = np.linalg.slogdet(self.V(psi))[1] + dof * np.log(2 * np.pi * s2) + rss / s2
        return float(out + (np.linalg.slogdet(information)[1] if self.reml else 0.0))

    def free(self) -> tuple[Array, Array]:
        """Rows and columns of the free elements of Λ: lower triangles by columns, term after term."""
        pairs, first = [], 0
        for size in self.sizes:
            pairs += [(first + i, first + j) for j in range(size) for i in range(j, size)]
            first += size
        return tuple(np.array(pairs).T)

    def lambda_(self, theta: Array) -> Array:
        """Λ from its free elements."""
        out = np.zeros((sum(self.sizes),) * 2)
        out[self.free()] = theta
        return out

    def optimum(self, starts: list[Array]) -> float:
        """The least −2ℓ that BFGS finds from the given θ."""
        def f(theta: Array) -> float:
            L = self.lambda_(theta)
            return self.deviance(L @ L.T)

        return min(so.minimize(f, theta, method="BFGS", options={"gtol": 1e-6}).fun for theta in starts)

    def chunk(self) -> BlockChunk:
        """Block statistics."""
        W = np.column_stack([self.X, self.y])
        rows = [self.block == g for g in np.unique(self.block)]
        S = np.stack([(self.Z[at] * self.w[at, None]).T @ self.Z[at] for at in rows], axis=-1)
        C = np.stack([(self.Z[at] * self.w[at, None]).T @ W[at] for at in rows], axis=-1)
        return BlockChunk(S, np.ones(len(rows)), C)

    def problem(self, chunks: list[BlockChunk] | None = None) -> LMMProblem:
        """The same model as sufficient statistics."""
        W = np.column_stack([self.X, self.y])
        chunks = [self.chunk()] if chunks is None else chunks
        A = W.T @ (W * self.w[:, None])
        return LMMProblem(lambda: chunks, A, float(len(self.y)), float(np.log(self.w).sum()), self.sizes, self.reml)


def simulate(
    seed: int, *, blocks: int, rows: tuple[int, int], p: int, sizes: tuple[int, ...], reml: bool,
    theta: Array | float = 0.7, weights: bool = False,
) -> Dense:
    """A random model: the first columns of X and Z are constants, the other columns of Z are columns of X too if p allows."""
    rng = np.random.default_rng(seed)
    n_rows = rng.integers(rows[0], rows[1] + 1, blocks)
    block = np.repeat(np.arange(blocks), n_rows)
    n, q = len(block), sum(sizes)
    columns = np.column_stack([np.ones(n), rng.normal(size=(n, max(p, q)))])
    X, Z = columns[:, :p], columns[:, :q]
    w = rng.uniform(0.3, 3.0, n) if weights else np.ones(n)
    model = Dense(X, Z, np.zeros(n), w, block, sizes, reml)
    L = model.lambda_(np.broadcast_to(theta, len(model.free()[0])))
    b = rng.normal(size=(blocks, q)) @ L.T
    model.y = X @ rng.normal(size=p) + (Z * b[block]).sum(axis=1) + rng.normal(size=n) / np.sqrt(w)
    return model
