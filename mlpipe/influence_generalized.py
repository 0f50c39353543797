"""The most influential blocks of a generalized linear mixed model, by one Newton step.

Without block i the log-likelihood has the score -s_i at the estimates, and there the information A - A_i: deleting the block moves beta by
about -(A - A_i)⁻¹ s_i (Pregibon 1981; for blocks of mixed models Xiang, Tse and Lee 2002), the variances held. s_i are the exact scores of
the Laplace or quadrature approximation, A_i their derivatives by central differences. For a Gaussian model the step is exact.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .again import Again, again
from .deletion import Deletion, Part, check_top, chosen, most
from .errors import ConfigError
from .solve.kernel import Chunk, Point

if TYPE_CHECKING:
    from typing import Any

    import pyarrow as pa

    from .generalized_result import GeneralizedFit

STEP = 1e-3  # of a coefficient, in standard errors, for a difference of scores


def influence(fit: GeneralizedFit, top: int, data: Any, group: str | None) -> pa.Table:
    """See `MixedFit.influence`. Raises ConfigError without random effects, and for several factors."""
    check_top(top)
    if not fit.terms:
        raise ConfigError("influence by deletion of blocks is for mixed models", code="not_available")
    if fit.recipe.factors:
        raise ConfigError(
            "influence by deletion of blocks needs one grouping factor: with several, what a level tells depends on all others",
            code="several_factors",
        )  # fmt: skip
    columns = chosen(fit, group)
    with again(fit, compress=False, data=data) as found:
        A = np.sum([part.A.sum(axis=0) for part in _parts(found)], axis=0)
        return most(Deletion(fit, found.model.fixed.R, A, 1.0, columns), _parts(found), top)


def _parts(found: Again) -> Iterator[Part]:
    """Scores and information of all blocks, chunk by chunk."""
    spool = found.model.rows.spool
    for i in range(len(spool.parts)):
        yield _told(found, spool.chunk(i))


def _told(found: Again, chunk: Chunk) -> Part:
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
    return Part([column.combine_chunks() for column in keys.columns], rows, (A + A.transpose(0, 2, 1)) / 2.0, s)
