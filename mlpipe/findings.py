"""What is worth saying about a fitted generalized model: notes, and separation."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .marginal import spreads
from .passes import padded

if TYPE_CHECKING:
    from .passes import Model

SPARSE = 6.0  # trials, events or rows per block below which the Laplace approximation is worth a warning
SETTLED = 1e-3  # scaled score from which a search has come to an end
RUNAWAY = 1.0  # spread of a term's part of the linear predictor that only separation gives
SEPARATED = 1e-8  # information along a direction, relative to the largest, that only separation leaves
FEW = 1e-3  # and below that of any one event
DISCRETE = ("binomial", "poisson", "negbinomial", "negbinomial1")  # families whose estimates can be infinite


def noted(fit: Any, model: Model, nagq: int) -> None:
    """Notes on what the numbers mean, and separation, into `fit.info`."""
    rows, notes = model.rows, fit.info["notes"]
    fit.info["passes"] = round(rows.spool.passes, 2)
    per_block = rows.size / max(rows.spool.n_blocks, 1)
    one_factor = bool(model.random) and not model.plan.recipe.factors
    if one_factor:
        fit.info["per_block"] = round(per_block, 2)
    if one_factor and model.density.family.name == "binomial":
        fit.info["blocks_without_variation"] = rows.flat
    if one_factor and nagq == 1 and (sparse := _sparse(model, per_block)):
        notes.append(f"blocks have {sparse} on average: the Laplace approximation may be biased, compare nagq=7 or more")
    fit.info |= spreads(model, fit.gamma, fit.terms)
    fit.info["separation"] = separated(fit, model)


def _sparse(model: Model, per_block: float) -> str:
    """How much a block holds where that is little for Laplace's approximation: trials, events or rows; "" where it is enough, or exact."""
    family, link = model.density.family, model.density.link.name
    if family.constant == "factorial":
        per_block *= model.rows.mean
    if per_block >= SPARSE or (family.name, link) == ("gaussian", "identity"):
        return ""
    return f"{per_block:.1f} {'trials' if family.name == 'binomial' else 'events' if family.constant == 'factorial' else 'rows'}"


def separated(fit: Any, model: Model) -> list[str]:
    """The coefficients that run away where the likelihood has no maximum; or the grouping factor, whose variance does where no block
    varies."""
    p = len(fit.names)
    information = fit.info.pop("information")[:p, :p]
    if model.random and not model.plan.recipe.factors and model.rows.flat == model.rows.spool.n_blocks:
        return [":".join(model.plan.recipe.groups)]
    return running(model, fit.beta, information) if fit.score < SETTLED else []  # far from any optimum the information says nothing


def running(model: Model, beta: np.ndarray, information: np.ndarray) -> list[str]:
    """The coefficients that run away where a likelihood of proportions or counts has no maximum, seen by directions without information
    (Albert and Anderson 1984; of counts Santos Silva and Tenreyro 2010): those that go along with the estimate in these."""
    size = model.rows.size
    if model.density.family.name not in DISCRETE or not len(beta) or not np.isfinite(information).all():
        return []
    values, vectors = np.linalg.eigh(information)
    least = min(SEPARATED * max(values[-1], 0.25e-3 * size), FEW)
    away = vectors[:, values < least] if values[0] > -least else vectors  # of what is negative the rest means nothing either
    if not away.shape[1]:
        return []
    gone = np.linalg.solve(model.fixed.R, away @ (away.T @ (model.fixed.R @ beta)))
    gram = model.fixed.T.T @ padded(model.plan.recipe, model.rows) @ model.fixed.T
    effects = np.abs(gone) * np.sqrt(np.maximum(np.diag(gram) / size, 0.0))  # of each on the linear predictor
    if model.random and effects.max() <= RUNAWAY:  # large variances of random effects leave little information too
        return []
    return [name for name, effect in zip(model.fixed.names, effects, strict=True) if effect > 0.5 * effects.max()]
