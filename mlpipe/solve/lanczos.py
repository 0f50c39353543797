"""Draws from N(0, M) of a crossed model, M only applied: M^½ times noise by Lanczos' method (FORMULAS R7; Chow and Saad 2014)."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import small
from .conjugate import Operator
from .link import Array
from .small import flat, per_level

MOST, LOOK = 200, 5  # Lanczos steps, and after how many each the result is looked at
CHANGE = 1e-3  # change of the result over its length, at which it is good enough: draws differ by far more


def normal(M: Operator, rng: np.random.Generator, samples: int) -> Array:
    """(all effects, samples) from N(0, M): L (L⁻¹ M L⁻ᵀ)^½ ε with LL' the diagonal blocks, which bring the eigenvalues together."""
    L = [small.cholesky(D) for D in M.D]
    ends = np.cumsum([0, *(f.size for f in M.problem.factors)])

    def by_blocks(work: Callable[[Array, Array], Array], x: Array) -> Array:
        return np.concatenate([flat(work(R, per_level(x[a:b], len(R)))) for R, a, b in zip(L, ends[:-1], ends[1:], strict=True)])

    def scaled(x: Array) -> Array:
        inner = by_blocks(small.backward, x[:, None])
        return np.asarray(x + by_blocks(small.forward, _across(M, inner, ends))[:, 0])

    draws = [root_times(scaled, rng.standard_normal(int(ends[-1]))) for _ in range(samples)]
    return by_blocks(small.multiply, np.column_stack(draws))


def _across(M: Operator, x: Array, ends: Array) -> Array:
    """The part of M x between factors."""
    out = np.zeros_like(x)
    for k, h in M.crosses.patterns:
        rows, columns = slice(ends[k], ends[k + 1]), slice(ends[h], ends[h + 1])
        out[rows] += _mapped(M.lams[k].T, M.crosses.times(k, h, _mapped(M.lams[h], x[columns])))
        out[columns] += _mapped(M.lams[h].T, M.crosses.times(h, k, _mapped(M.lams[k], x[rows])))
    return out


def _mapped(map_: Array, x: Array) -> Array:
    return flat(np.einsum("ab,bkm->akm", map_, per_level(x, len(map_))))


def root_times(apply: Callable[[Array], Array], e: Array) -> Array:
    """A^½ e (n,) for a symmetric positive definite A, from the Krylov space of e."""
    length = float(np.linalg.norm(e))
    basis, alphas, betas, last = [e / length], list[float](), list[float](), np.zeros(0)
    for step in range(1, MOST + 1):
        v = apply(basis[-1])
        alphas.append(float(v @ basis[-1]))
        for older in basis[-2:]:
            v = v - (v @ older) * older
        betas.append(float(np.linalg.norm(v)))
        done = betas[-1] < 1e-10 * alphas[0] or step in (MOST, len(e))
        if done or step % LOOK == 0:
            values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1))
            found = vectors @ (np.sqrt(np.maximum(values, 0.0)) * vectors[0])
            moved = found - np.pad(last, (0, len(found) - len(last)))
            if done or float(np.linalg.norm(moved)) < CHANGE * float(np.linalg.norm(found)):
                break
            last = found
        basis.append(v / betas[-1])
    return np.asarray(length * sum(c * v for c, v in zip(found, basis, strict=False)))
