"""Generalized estimating equations with every block's matrices written out: the obvious version."""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy.linalg as la
import scipy.optimize as so

LINKS = {
    "logit": (lambda e: 1 / (1 + np.exp(-e)), lambda m: m * (1 - m)),
    "log": (np.exp, lambda m: m),
    "identity": (lambda e: e, np.ones_like),
    "inverse": (lambda e: 1 / e, lambda m: -(m**2)),
}
VARIANCES = {"binomial": lambda m: m * (1 - m), "poisson": lambda m: m, "gaussian": np.ones_like, "gamma": lambda m: m**2}


@dataclass
class Dense:
    """One data set and model; `w`: prior weights or trials; `time` as numbers."""

    X: np.ndarray
    y: np.ndarray
    group: np.ndarray
    time: np.ndarray
    w: np.ndarray
    offset: np.ndarray
    family: str
    link: str
    corr: str
    beta: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        order = np.lexsort((self.time, self.group))
        for name in ("X", "y", "group", "time", "w", "offset"):
            setattr(self, name, getattr(self, name)[order])
        self.times = np.unique(self.time)
        self.blocks = [np.flatnonzero(self.group == g) for g in np.unique(self.group)]
        self.alpha = np.zeros(max(len(self.times) * (len(self.times) - 1) // 2, 1))

    def R(self, rows: np.ndarray) -> np.ndarray:
        """The working correlation of a block."""
        n = len(rows)
        if self.corr == "independence":
            return np.eye(n)
        if self.corr == "exchangeable":
            return np.eye(n) + self.alpha[0] * (1 - np.eye(n))
        if self.corr == "ar1":  # by ranks within the block
            rank = np.arange(n)
            return np.asarray(self.alpha[0] ** np.abs(rank[:, None] - rank[None]))
        full = np.eye(len(self.times))
        full[np.triu_indices(len(self.times), 1)] = self.alpha
        full = np.triu(full) + np.triu(full, 1).T
        at = np.searchsorted(self.times, self.time[rows])
        return np.asarray(full[np.ix_(at, at)])

    def mean(self) -> tuple[np.ndarray, np.ndarray]:
        """mu and its derivative by eta."""
        mu = LINKS[self.link][0](self.X @ self.beta + self.offset)
        return mu, LINKS[self.link][1](mu)

    def parts(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """D, V over phi and r of each block."""
        mu, d = self.mean()
        out = []
        for rows in self.blocks:
            a = np.sqrt(VARIANCES[self.family](mu[rows]) / self.w[rows])
            out.append((self.X[rows] * d[rows, None], a[:, None] * self.R(rows) * a, self.y[rows] - mu[rows]))
        return out

    def fit(self, start: np.ndarray) -> Dense:
        """Fisher scoring and moments until nothing moves."""
        self.beta = start
        for _ in range(300):
            mu, _ = self.mean()
            e = (self.y - mu) / np.sqrt(VARIANCES[self.family](mu) / self.w)
            self.phi = float(e @ e / len(e))
            before, self.alpha = self.alpha, self.moments(e)
            parts = self.parts()
            M = sum(D.T @ np.linalg.solve(V, D) for D, V, _ in parts)
            U = sum(D.T @ np.linalg.solve(V, r) for D, V, r in parts)
            step = np.linalg.solve(M, U)
            self.beta = self.beta + step
            if np.abs(step).max() < 1e-13 and np.abs(self.alpha - before).max() < 1e-13:
                break
        return self

    def moments(self, e: np.ndarray) -> np.ndarray:
        """alpha, by loops over pairs."""
        if self.corr == "independence":
            return self.alpha
        pairs = [(i, j) for rows in self.blocks for a, i in enumerate(rows) for j in rows[a + 1 :]]
        z = np.array([e[i] * e[j] / self.phi for i, j in pairs])
        if self.corr == "exchangeable":
            return np.array([z.mean()])
        if self.corr == "ar1":
            k = np.array([j - i for i, j in pairs], dtype=float)
            near = z[k == 1].mean()
            return np.array([so.newton(lambda a: (k * a ** (k - 1) * (z - a**k)).sum(), near, tol=1e-15, maxiter=200)])
        t = len(self.times)
        at = [(np.searchsorted(self.times, self.time[i]), np.searchsorted(self.times, self.time[j])) for i, j in pairs]
        sums, counts = np.zeros((t, t)), np.zeros((t, t))
        for value, (a, b) in zip(z, at, strict=True):
            sums[a, b] += value
            counts[a, b] += 1
        return np.asarray((sums / np.maximum(counts, 1))[np.triu_indices(t, 1)])

    def covariance(self, kind: str) -> np.ndarray:
        """Of beta, each correction as it is defined on a block's rows."""
        parts = self.parts()
        B = np.linalg.inv(sum(D.T @ np.linalg.solve(V, D) for D, V, _ in parts))
        if kind == "model":
            return np.asarray(B * self.phi)
        meat = np.zeros_like(B)
        for D, V, r in parts:
            H = D @ B @ D.T @ np.linalg.inv(V)
            if kind == "mancl-derouen":
                r = np.linalg.solve(np.eye(len(r)) - H, r)
            if kind == "kauermann-carroll":
                r = np.linalg.solve(la.sqrtm(np.eye(len(r)) - H).real, r)
            u = D.T @ np.linalg.solve(V, r)
            meat += np.outer(u, u)
        return np.asarray(B @ meat @ B)
