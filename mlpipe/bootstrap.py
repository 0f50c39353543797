"""Parametric bootstrap: linear fits by simulating their statistics, never their rows; generalized ones by responses on the spool."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from . import several
from .again import again
from .errors import ConfigError, ConvergenceError, ConvergenceWarning
from .generalized_result import PARAMETER, GeneralizedFit
from .held import Held
from .inference import check_size, held
from .passes import tau_bound
from .reduction import coded, lower_factor
from .result import LMMFit
from .solve.crossed import CrossedProblem
from .solve.draws import SUMMED, cells_of
from .solve.family import Cells
from .solve.glm import vanished
from .solve.kernel import Chunk
from .solve.likelihood import LMMProblem
from .solve.lmm import solve
from .solve.refit import free_of, refit
from .solve.simulate import BlockSimulator, LevelSimulator, dense_effects
from .spool import Spool
from .verdict import warn

if TYPE_CHECKING:
    from .again import Again
    from .result import MixedFit

LEAST_DRAWS = 2


def percentiles(fit: MixedFit, level: float, draws: int) -> list[tuple[str, float, float]]:
    """Percentile intervals (type-7 quantiles) of R-named parameters; draws whose refit failed are left out and counted in `info`."""
    from .intervals import family_name, random_names

    table = bootstrap(fit, draws)
    ends = np.nanquantile(table, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    family = family_name(fit)
    names = [*random_names(fit), *([family] if family else []), *fit.names]
    return [(name, float(low), float(high)) for name, low, high in zip(names, *ends, strict=True)]


def bootstrap(fit: MixedFit, draws: int) -> np.ndarray:
    """(draws, parameters) estimates of simulated data in the order of `percentiles`; rows of NaN where a refit did not converge."""
    if not isinstance(draws, int) or draws < LEAST_DRAWS:
        raise ConfigError(f"draws = {draws!r} is not a whole number from {LEAST_DRAWS}")
    rng = np.random.default_rng(fit.options.seed if fit.options is not None else 0)
    if isinstance(fit, GeneralizedFit):
        found = _by_passes(fit, draws, rng)
    else:
        assert isinstance(fit, LMMFit)
        found = _linear(fit, draws, rng)
    out = np.array(list(found))
    failed = int(np.isnan(out[:, -1]).sum())
    fit.info["bootstrap"] = {"draws": draws, "failed": failed}
    if failed == draws:
        raise ConvergenceError("no bootstrap refit converged")
    if failed:
        message = f"{failed:,} of {draws:,} bootstrap refits did not converge and are left out of the intervals"
        warn(message, ConvergenceWarning)
    return out


def parameters(factors: list[np.ndarray], unit: float, family: float | None, beta: np.ndarray) -> np.ndarray:
    """Standard deviations and correlations by columns of each term's lower triangle, the family's parameter, coefficients."""
    out = []
    for factor in factors:
        psi = unit**2 * factor @ factor.T
        sd = np.sqrt(np.diag(psi))
        for j in range(len(sd)):
            out.append(sd[j])
            with np.errstate(invalid="ignore", divide="ignore"):
                out += [np.clip(psi[i, j] / (sd[i] * sd[j]), -1.0, 1.0) for i in range(j + 1, len(sd))]
    return np.concatenate([np.array(out), [] if family is None else [family], beta])


# -- linear ------------------------------------------------------------------------------------------------------------


def simulator(fit: LMMFit, kept: Held) -> BlockSimulator | LevelSimulator:
    """What draws statistics of the fitted model."""
    lambda_ = kept.lambda_([term.star for term in fit.terms])
    sigma = fit.sigma / kept.scale
    beta = (kept.fixed.R @ fit.beta - kept.offset) / kept.scale
    if isinstance(kept.problem, LMMProblem):
        return BlockSimulator(kept.problem, lambda_, sigma, beta)
    parts = coded(kept.stats, fit.parsed, kept.coding.get("contrasts"), kept.coding.get("levels"))
    model = several.Several(kept.stats, fit.parsed, parts, kept.problem.reml)
    return LevelSimulator(kept.problem, lambda_, sigma, beta, model.draws(normal=True) or dense_effects(kept.problem))


def _linear(fit: LMMFit, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    kept = held(fit)
    check_size(fit, kept.problem, second=False)
    made, start = simulator(fit, kept), kept.lambda_([term.star for term in fit.terms])[free_of(kept.problem)]
    for _ in range(draws):
        yield _refitted(kept, made.draw(rng), start)


def _refitted(kept: Held, problem: LMMProblem | CrossedProblem, start: np.ndarray) -> np.ndarray:
    if isinstance(problem, LMMProblem):
        found = solve(problem, start=start)
        lambda_, s2, star, converged = found.lambda_, found.sigma2, found.beta, found.converged
    else:
        best = refit(problem, start)
        lambda_, s2, star, converged = best.lambda_, best.s2, best.beta, best.converged
    terms = kept.terms
    factors = [kept.random[place].raw(lambda_[terms[place], terms[place]]) for place in kept.order]
    sigma = math.sqrt(s2) * kept.scale
    beta = np.linalg.solve(kept.fixed.R, kept.scale * star + kept.offset)
    out = parameters(factors, sigma, sigma, beta)
    return out if converged else np.full_like(out, np.nan)


# -- generalized -------------------------------------------------------------------------------------------------------


@dataclass
class _Redrawn(Spool):
    """A spool whose responses are others; it never closes what it stands on."""

    base: Spool | None = None
    drawn: dict[int, tuple[Cells, ...]] = field(default_factory=dict)

    @classmethod
    def over(cls, base: Spool, drawn: dict[int, tuple[Cells, ...]]) -> _Redrawn:
        """The spool `base` with `drawn` cells by the first block of each chunk."""
        return cls(**{f.name: getattr(base, f.name) for f in fields(Spool)}, base=base, drawn=drawn)

    def chunk(self, i: int) -> Chunk:
        """See Spool."""
        assert self.base is not None
        chunk = self.base.chunk(i)
        pieces = zip(chunk.pieces, self.drawn[chunk.first], strict=True)
        return replace(chunk, pieces=tuple(replace(rows, cells=cells) for rows, cells in pieces))


def _by_passes(fit: GeneralizedFit, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    if fit.recipe.freq is not None and fit.base_family not in SUMMED:
        raise ConfigError(f"rows of family {fit.family!r} that stand for several cannot be simulated as one", hint="leave freq out")
    power = PARAMETER.get(fit.base_family, ("", 0.0))[1]
    with again(fit, compress=False, repeatable=True) as found:
        model = found.model
        for _ in range(draws):
            made = found.refitted(_Redrawn.over(model.rows.spool, _responses(found, rng)))
            stars = found.stars(made.lambda_)
            raw = [lower_factor(np.linalg.solve(found.random[place].R, stars[place])) for place in found.places]
            family = math.exp(power * made.psi[-1]) if model.density.family.shape else None
            out = parameters(raw, 1.0, family, np.linalg.solve(model.fixed.R, made.beta))
            gone = family is not None and vanished(float(made.psi[-1]), tau_bound(model))  # no overdispersion: an estimate all the same
            yield out if made.converged or gone else np.full_like(out, np.nan)


def _responses(found: Again, rng: np.random.Generator) -> dict[int, tuple[Cells, ...]]:
    """Simulated cells of every chunk, by its first block."""
    model, best = found.model, found.best
    gamma, tau = model.Q @ best.beta, float(best.psi[-1]) if model.density.family.shape else 0.0
    effects, seed = found.effects(rng), int(rng.integers(2**63))

    def one(chunk: Chunk) -> tuple[int, tuple[Cells, ...]]:
        own = np.random.default_rng([seed, chunk.first])  # whatever thread works on it
        out = []
        for rows, shift in zip(chunk.pieces, found.shifts(chunk, effects, own), strict=True):
            eta = gamma @ rows.F + shift
            out.append(cells_of(model.density, eta if rows.offset is None else eta + rows.offset, rows.cells, tau, own))
        return chunk.first, tuple(out)

    return dict(model.rows.spool.map(one))
