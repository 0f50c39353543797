"""The naive truth for GLMMs with several grouping factors: all random effects as one block of `DenseGLMM`, Z and Λ as whole matrices."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg as la

from mlpipe.solve.coded_rows import JointProblem, Part
from mlpipe.solve.density import density
from mlpipe.solve.family import Cells
from mlpipe.solve.kernel import Kernel, Point, Rows
from mlpipe.solve.link import Array
from mlpipe.solve.meetings import Pattern

from .dense_glmm import MEANS, TAU, DenseGLMM, centre, draw, statistics
from .dense_several import Grouping


@dataclass
class DenseJoint:
    """Rows and grouping factors of a model; Λ is one block a factor."""

    rows: DenseGLMM
    factors: list[Grouping]

    def spread(self, lambda_: Array) -> Array:
        """Λ over single effects."""
        ends = np.cumsum([0, *(f.q for f in self.factors)])
        blocks = [np.kron(np.eye(f.levels), lambda_[a:b, a:b]) for f, a, b in zip(self.factors, ends[:-1], ends[1:], strict=True)]
        return np.asarray(la.block_diag(*blocks))

    def at(self, point: Point) -> DenseGLMM:
        """All effects as one block, at other parameters."""
        return _OneBlock(**vars(replace(self.rows, gamma=point.gamma, lambda_=self.spread(point.lambda_), tau=point.tau)))

    def loglik(self, point: Point) -> float:
        """The joint Laplace approximation."""
        return self.at(point).laplace()

    def problem(self, parts: int = 1) -> JointProblem:
        """The same for the library; features are [X, the random columns of each factor]; the rows in so many parts."""
        model, columns = self.rows, self.rows.X.shape[1]
        F = np.vstack([model.X.T, *(f.Z.T for f in self.factors)])
        places = np.split(np.arange(columns, len(F)), np.cumsum([f.q for f in self.factors])[:-1])
        made = density(model.family, model.link, expected=model.expected)
        kernels = tuple(Kernel(made, tuple(at.tolist()), np.eye(len(at)), ()) for at in places)
        pairs, cell = {}, {}
        for k, left in enumerate(self.factors):
            for h, right in enumerate(self.factors[k + 1 :], start=k + 1):
                key, cell[k, h] = np.unique(left.codes * right.levels + right.codes, return_inverse=True)
                pairs[k, h] = Pattern(key // right.levels, key % right.levels, (left.q, right.q), (left.levels, right.levels))
        Q = np.vstack([np.eye(columns), np.zeros((len(F) - columns, columns))])
        plain = model.family != "binomial" and (model.size == 1.0).all()

        def part(at: np.ndarray) -> Part:
            cells = Cells(
                model.y[at], None if plain else model.size[at], model.weight[at], tuple(v[at] for v in statistics(model.family, model.y))
            )
            rows = Rows(F[:, at], model.offset[at], cells, np.arange(len(at)))
            return Part(rows, tuple(f.codes[at] for f in self.factors), {pair: places[at] for pair, places in cell.items()})

        held = [part(at) for at in np.array_split(np.arange(len(model.y)), parts)]

        def scan(work: Callable[[Part], None]) -> None:
            for each in held:
                work(each)

        sizes = tuple(f.sizes for f in self.factors)
        return JointProblem(made, Q, kernels, tuple(f.levels for f in self.factors), sizes, pairs, scan)


class _OneBlock(DenseGLMM):
    def mode(self) -> Array:
        """The maximum of g by damped Newton steps with numerical derivatives."""
        ZL, u = self.Z @ self.lambda_, np.zeros(self.Z.shape[1])
        for _ in range(60):
            score, observed = self._derivatives(u)
            g = ZL.T @ score - u
            H = np.eye(len(u)) + ZL.T @ (observed[:, None] * ZL)
            step, size = la.solve(H, g, assume_a="sym"), 1.0
            if step @ g < 0.0:
                step = g / np.abs(np.linalg.eigvalsh(H)).max()
            before = self.joint(u[:, None])[0]
            while size > 1e-8 and not self.joint((u + size * step)[:, None])[0] >= before - 1e-10 * abs(before):
                size /= 2.0
            u = u + size * step
        return u


def crossed_codes(rng: np.random.Generator, n: int, levels: Sequence[int]) -> list[np.ndarray]:
    """Levels of crossed factors, each occurring."""
    return [rng.permutation(np.r_[np.arange(m), rng.integers(0, m, n - m)]) for m in levels]


def simulate_joint(
    family: str, link: str, codes: Sequence[np.ndarray], q: Sequence[int], *, seed: int = 0, expected: bool = False, scale: float = 1.0
) -> tuple[DenseJoint, Point]:
    """A random model over given level codes, most random effects first, and the parameters it was drawn from."""
    rng = np.random.default_rng(seed)
    n = len(codes[0])
    eta, spread = centre(family, link)
    spread *= scale
    columns = [np.column_stack([np.ones(n), rng.uniform(-1.0, 1.0, (n, k - 1))]) for k in q]
    factors = [Grouping(code, Z, (Z.shape[1],)) for code, Z in zip(codes, columns, strict=True)]
    X = np.column_stack([np.ones(n), rng.uniform(-1.0, 1.0, n)])
    size = rng.integers(1, 8, n).astype(float) if family == "binomial" else np.ones(n)
    weight = rng.uniform(0.5, 2.0, n) if family in ("gamma", "inverse_gaussian", "gaussian") else np.ones(n)
    lambda_ = spread / np.sqrt(len(q)) * np.asarray(
        la.block_diag(*(np.eye(k) * np.linspace(1.0, 0.6, k) + np.tril(np.full((k, k), 0.3), -1) for k in q))
    )
    point = Point(np.array([eta, 0.5 * spread]), lambda_, TAU.get(family, 0.0))
    rows = DenseGLMM(
        family, link, X, np.hstack([f.full for f in factors]), np.zeros(n), np.zeros(n, dtype=int), spread * rng.uniform(-0.5, 0.5, n),
        size, weight, point.gamma, lambda_, point.tau, expected,
    )  # fmt: skip
    model = DenseJoint(rows, factors)
    u = rng.normal(size=rows.Z.shape[1])
    mu = MEANS[link](X @ point.gamma + rows.offset + rows.Z @ (model.spread(lambda_) @ u))
    rows.y = draw(rng, family, mu, size, weight, point.tau)
    return model, point
