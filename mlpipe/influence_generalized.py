"""The most influential blocks of a generalized linear mixed model, by one Newton step.

Without block i the log-likelihood has the score -s_i at the estimates, and there the information A - A_i: deleting the block moves beta by
about -(A - A_i)⁻¹ s_i (Pregibon 1981; for blocks of mixed models Xiang, Tse and Lee 2002), the variances held. s_i are the exact scores of
the Laplace or quadrature approximation, A_i their derivatives by central differences. For a Gaussian model the step is exact.

Of several factors a level shares its rows with levels of others, whose modes move when it goes. There the step is that of the working
linear model at the joint mode, of weights W = -ℓ'' and residuals ℓ'/W, from which a level's rows are taken exactly (`influence_several`);
of Laplace's ½κ in the score by beta, R8, each row keeps its own.
"""
from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from .again import Again, again
from .deletion import Deletion, check_top, chosen, most
from .deletion import Part as Told
from .errors import ConfigError
from .influence_several import Combined, Factor, check_combinations, check_effects, parts
from .solve.coded_rows import Exactly, Part
from .solve.joint import Joint
from .solve.kernel import Chunk, Point

if TYPE_CHECKING:
    from typing import Any

    import pyarrow as pa

    from .generalized_result import GeneralizedFit
    from .options import Options
    from .several_generalized import JointModel

STEP = 1e-3  # of a coefficient, in standard errors, for a difference of scores


def influence(fit: GeneralizedFit, top: int, data: Any, options: Options | None, group: str | None) -> pa.Table:
    """See `MixedFit.influence`. Raises ConfigError without random effects, and where `again` does; ResourceError for many levels."""
    check_top(top)
    if not fit.terms:
        raise ConfigError("influence by deletion of blocks is for mixed models", code="not_available")
    columns = chosen(fit, group)
    with again(fit, compress=False, data=data, options=options) as found:
        if found.joint is not None:
            return _levels(fit, found, found.joint, columns, top)
        A = np.sum([told.A.sum(axis=0) for told in _parts(found)], axis=0)
        return most(Deletion(fit, found.model.fixed.R, A, 1.0, columns), _parts(found), top)


def _parts(found: Again) -> Iterator[Told]:
    """Scores and information of all blocks, chunk by chunk."""
    spool = found.model.rows.spool
    for i in range(len(spool.parts)):
        yield _told(found, spool.chunk(i))


def _told(found: Again, chunk: Chunk) -> Told:
    model, best = found.model, found.best
    kernel, Q, p = model.kernel, model.Q, best.p
    tau = float(best.psi[-1]) if model.density.family.shape else 0.0

    def scores(beta: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        by_gamma, u = kernel.block_scores(chunk, Point(Q @ beta, best.lambda_, tau), u)
        return (Q.T @ by_gamma[: len(Q)]).T, u

    s, u = scores(best.beta, np.zeros((kernel.q, chunk.n_blocks)))
    A = np.empty((chunk.n_blocks, p, p))
    for k, size in enumerate(STEP * np.sqrt(np.diag(best.vcov)[:p])):
        step = size * np.eye(p)[k]
        A[:, k] = (scores(best.beta - step, u)[0] - scores(best.beta + step, u)[0]) / (2.0 * size)
    rows = np.sum([rows.lengths for rows in chunk.pieces], axis=0)
    assert model.rows.spool.keys is not None
    keys = model.rows.spool.keys.slice(chunk.first, chunk.n_blocks)
    return Told([column.combine_chunks() for column in keys.columns], rows, (A + A.transpose(0, 2, 1)) / 2.0, s)


def _levels(fit: GeneralizedFit, found: Again, joint: JointModel, columns: tuple[str, ...], top: int) -> pa.Table:
    """The `top` levels of the factor of these key columns."""
    problem, best, limit = joint.problem, found.best, found.options.memory_bytes
    m, N = len(problem.Q), joint.model.rows.spool.n_blocks
    check_effects(problem.ends[-1], limit)
    check_combinations(N, m + 1, limit)
    grams, rows = _working(found, joint, N, m + 1)
    W = np.zeros((m + 1, problem.p + 1))
    W[:m, :-1], W[m, -1] = problem.Q, 1.0
    lams = problem.lambdas(best.lambda_)
    halves = (kernel.z_map @ lam for kernel, lam in zip(problem.kernels, lams, strict=True))
    factors = [Factor(half, code, start) for half, code, start in zip(halves, joint.codes, problem.ends[:-1], strict=True)]
    model = Combined(grams, problem.kernels[0].z, factors, problem.ends[-1], W)
    k = fit.recipe.factors.index(columns)
    deletion = Deletion(fit, found.model.fixed.R, model.A[:-1, :-1], 1.0, columns)
    return most(deletion, parts(model, joint.terms.levels[k], joint.codes[joint.terms.order.index(k)], rows), top)


def _working(found: Again, joint: JointModel, N: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The working model's cross-products of [F, r] per combination of levels (N, m + 1, m + 1), and rows (N,): r = Zb + ℓ'/W in the
    last column, as the modes see it, and in the last row as beta does, with ℓ' - ½κ."""
    problem, best = joint.problem, found.best
    solver = Joint(problem, Exactly())
    point = Point(best.beta, best.lambda_, float(best.psi[-1]) if problem.density.family.shape else 0.0)
    u, _ = solver.mode(point, solver.u)
    terms = solver.row_terms(solver.state(point, u, outer=False))
    effects = solver.effects(problem.scaled(best.lambda_, u[:, None]))
    grams, rows, m, lock = np.zeros((N, size, size)), np.zeros(N), size - 1, Lock()

    def work(part: Part) -> None:
        pieces = solver.pieces(part)
        score, w, kappa = terms(part, pieces)
        F, random = part.rows.F, w * effects(part, pieces)[0]
        at = part.place[0] + np.arange(len(part.rows.starts))
        with lock:
            rows[at] += part.rows.lengths
            for i in range(m):
                weighted = F[i] * w
                for j in range(i + 1):
                    grams[at, i, j] += part.rows.sums(weighted * F[j])
                grams[at, i, m] += part.rows.sums(F[i] * (random + score))
                grams[at, m, i] += part.rows.sums(F[i] * (random + score - 0.5 * kappa))

    problem.scan(work)
    for i in range(m):
        for j in range(i):
            grams[:, j, i] = grams[:, i, j]
    return grams, rows
