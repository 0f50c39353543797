"""The rows of a generalized fit once more: a new spool, -2ℓ over the parameters, the optimum there, and refits of other responses."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .design import level_label
from .errors import ConfigError, DataError
from .expr import Column
from .formula import parse
from .generalized import gathered
from .options import Options
from .passes import Model, built, plain, plain_looks, resumed, star_point, tau_bound, with_squares
from .plans import Request
from .several_generalized import JointModel
from .several_generalized import resumed as joint_resumed
from .several_generalized import with_squares as joint_squares
from .solve.density import density
from .solve.glm import inverse
from .solve.kernel import Chunk, Piece
from .solve.surfaces import PassSurface, PlainSurface, Surface
from .spool import Spool

if TYPE_CHECKING:
    from .features import Recipe
    from .generalized_result import GeneralizedFit
    from .reduction import Random

Array = np.ndarray
SAME = 1e-6  # relative difference of two log-likelihoods of the same rows that rounding may leave


@dataclass(frozen=True)
class Found:
    """An optimum over a spool, in the solver's coordinates: `psi` = (beta, theta, tau), beta the first `p`, with the covariance `vcov`; its
    Λ; `loglik` without the spool's constant; `converged`; `surface`, -2ℓ around it."""

    psi: Array
    p: int
    lambda_: Array
    vcov: Array
    loglik: float
    converged: bool
    surface: Surface

    @property
    def beta(self) -> Array:
        """The coefficients."""
        return self.psi[: self.p]


@dataclass(frozen=True)
class Again:
    """A fit's `model` over a new spool and its optimum `best` there, for no, one or several (`joint`) factors. `random`: the terms in the
    order of the solver's Λ, `places`: where each of the fit's terms stands among them."""

    model: Model
    best: Found
    random: tuple[Random, ...]
    places: tuple[int, ...]
    joint: JointModel | None
    options: Options

    def refitted(self, spool: Spool) -> Found:
        """The optimum with the responses of another spool, from the fit's own, a vanished overdispersion released."""
        model, start = replace(self.model, rows=replace(self.model.rows, spool=spool)), self.best.psi.copy()
        if model.density.family.shape:
            half = tau_bound(model) / 2.0
            start[-1] = min(start[-1], half) if half > 0.0 else max(start[-1], half)
        return _optimum(model, self.joint.over(model) if self.joint is not None else None, start, self.options)

    def stars(self, lambda_: Array) -> list[Array]:
        """Λ's blocks, term by term in the order of `random`."""
        stops = np.cumsum([0, *(len(term.names) for term in self.random)]).tolist()
        return [lambda_[a:b, a:b] for a, b in zip(stops[:-1], stops[1:], strict=True)]

    def effects(self, rng: np.random.Generator) -> list[Array]:
        """New random effects (q_k, levels) of several factors."""
        if self.joint is None:
            return []
        problem = self.joint.problem
        factors = zip(problem.lambdas(self.best.lambda_), problem.levels, strict=True)
        return [lambda_k @ rng.normal(size=(len(lambda_k), levels)) for lambda_k, levels in factors]

    def shifts(self, chunk: Chunk, effects: list[Array], rng: np.random.Generator) -> Iterator[Array]:
        """What random effects add to the linear predictor of each piece of a chunk: `effects`, or new ones of the chunk's blocks."""
        if self.joint is not None:
            for rows in chunk.pieces:
                parts = zip(self.joint.problem.kernels, self.joint.codes_of(chunk, rows), effects, strict=True)
                pieces = ((Piece(rows, kernel), b[:, code]) for kernel, code, b in parts)
                yield sum((piece.times(k, own) for piece, b in pieces for k, own in enumerate(b)), np.zeros(rows.F.shape[1]))
            return
        kernel = self.model.kernel
        b = self.best.lambda_ @ rng.normal(size=(kernel.q, chunk.n_blocks))
        for rows in chunk.pieces:
            piece = Piece(rows, kernel)
            yield sum((piece.times(k, rows.spread(own)) for k, own in enumerate(b)), np.zeros(rows.F.shape[1]))


@contextmanager
def again(
    fit: GeneralizedFit, *, compress: bool = True, repeatable: bool = False, data: Any = None, options: Options | None = None
) -> Iterator[Again]:
    """The rows once more, in a spool that goes at the end; noted in `info`. `compress`: whether rows may be held as cells; `repeatable`:
    whether their order must be the same each time; `data`: the fit's rows from elsewhere than its own source; `options`: others than the
    fit's.

    Raises DataError where the source is gone or has changed, ConfigError for a fit without a likelihood of its own: of a quasi family, or
    of factors that need conjugate gradients.
    """
    if fit.family != fit.base_family:
        raise ConfigError(f"family {fit.family!r} has no likelihood to profile or to simulate from", hint='method="wald"')
    if fit.info.get("method") == "iterative":
        raise ConfigError(
            "profiles, bootstraps and deletions need the exact factor of all random effects: this fit's likelihood has a Monte Carlo error",
            code="several_factors", hint='intervals by method="wald"',
        )  # fmt: skip
    source = fit.source if data is None else data
    if source is None:
        raise DataError("the fit has no data, and a generalized model keeps no statistics", code="no_source", hint="fit it again")
    options = options or fit.options or Options()
    plan, rows = gathered(source, _request(fit, options), options, compress=compress and bool(fit.terms), repeatable=repeatable)
    with rows.spool:
        if rows.rows != fit.rows:
            raise DataError("the source changed since the fit", code="source_changed", hint="fit it again")
        made = density(fit.base_family, fit.link, expected=fit.curvature == "expected")
        model = built(parse(fit.formula), plan, rows, made, fit.nagq)
        joint = JointModel(model) if fit.recipe.factors else None
        order = tuple(range(len(model.random))) if joint is None else tuple(joint.terms.solver)
        sequence = order if joint is None else tuple(joint.terms.sequence)
        best = _optimum(model, joint, _point(fit, model, joint), options)
        _check_same(fit, best, rows.spool.constant)
        fit.info["notes"] = [*fit.info.get("notes", []), "the rows were read once more for inference"]
        places = tuple(order.index(i) for i in sequence)
        yield Again(model, best, tuple(model.random[i] for i in order), places, joint, options)


def _check_same(fit: GeneralizedFit, best: Found, constant: float) -> None:
    """Raises DataError where the optimum is not the fit's, though both searches ended at one: the rows are others, if as many."""
    found = best.loglik + constant
    if fit.converged and best.converged and abs(found - fit.loglik) > SAME * max(1.0, abs(found), SAME * abs(constant)):
        message = f"the source changed since the fit: its log-likelihood is {found:.9g}, and was {fit.loglik:.9g}"
        raise DataError(message, code="source_changed", hint="fit it again")


def _request(fit: GeneralizedFit, options: Options) -> Request:
    recipe = fit.recipe
    levels = {v.label: [level_label(level) for level in v.levels] for v in recipe.variables.values() if v.kind == "category"}
    return Request(
        fit.formula, weights=recipe.weights, freq=recipe.freq, offset=recipe.offset, levels=levels | outcome(recipe),
        contrasts=recipe.contrasts,
        family=recipe.family, link=fit.link, trials=recipe.trials, nagq=fit.nagq, groups=() if fit.terms else recipe.groups,
        options=options,
    )  # fmt: skip


def outcome(recipe: Recipe) -> dict[str, list[str]]:
    """The two levels of a text response, failure first, as `levels` takes them: by themselves they may be the other way round."""
    node = recipe.formula.response
    if not isinstance(node, Column) or recipe.failure is None or recipe.success is None:
        return {}
    return {node.name: [recipe.failure, recipe.success]}


def _point(fit: GeneralizedFit, model: Model, joint: JointModel | None) -> Array:
    """The fit's (beta, theta, tau) in the solver's coordinates."""
    if joint is None:
        return star_point(model, fit.beta, [term.factor for term in fit.terms], fit.tau)
    shape = [fit.tau] if model.density.family.shape else []
    return np.concatenate([model.fixed.R @ fit.beta, joint.terms.theta_star(fit.theta.tolist()), shape])


def _optimum(model: Model, joint: JointModel | None, psi: Array, options: Options) -> Found:
    """The optimum from psi."""
    p = model.Q.shape[1]
    if not model.random:
        plainly = plain(model, None, options.tol, options.max_passes)
        covariance, surface = inverse(plainly.information), PlainSurface(plain_looks(model, None))
        if len(covariance) > p and plainly.information[-1, -1] == 0.0:  # tau, which is as good as infinite
            covariance[-1] = covariance[:, -1] = np.nan
        return Found(plainly.psi, p, np.zeros((0, 0)), covariance, plainly.loglik, plainly.converged, surface)
    sizes = tuple(len(term.names) for term in model.random) if joint is None else joint.sizes
    search, found = resumed(model, psi, options) if joint is None else joint_resumed(joint, psi, options)
    whole = with_squares(model, search, sizes) if joint is None else joint_squares(joint, search)
    converged = found.converged and not found.rough
    return Found(found.psi, p, found.lambda_, found.vcov, found.loglik, converged, PassSurface(whole, sizes))
