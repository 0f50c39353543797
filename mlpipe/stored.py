"""The fit of a job with a store: what is collected for its model, and the fit of all partitions together."""
from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import shelf
from .incremental import Settings, Update, finished, updated
from .plans import Request

if TYPE_CHECKING:
    from .job import ModelSection, StoreSection
    from .options import Options
    from .result import MixedFit


def fit_from_store(model: ModelSection, store: StoreSection, data: Any, options: Options, rebase: bool) -> MixedFit:
    """Collects what is new, merges, fits from where the last fit ended, and notes the drift.

    Raises what `incremental.updated` and the fitting function of the model's kind raise.
    """
    settings = Settings(store.partition_by, store.window, store.vanished)
    request = _request(model, options)
    with shelf.opened(store.path, options) as held:
        update = updated(held, data, request, model.where, settings, rebase)
        fit = _fitted(model, update, request)
        finished(update, fit)
    return fit


def _request(model: ModelSection, options: Options) -> Request:
    """What is collected for a model."""
    names = ("weights", "freq", "offset", "levels", "contrasts", "na")
    given: dict[str, Any] = {name: getattr(model, name) for name in names} | {"collect": "blocks"}
    if model.kind == "ols":
        from .linear import request_of as of_least_squares

        return of_least_squares(model.formula, model.absorb, None, given, options)
    if model.kind == "glmm":
        from .generalized import request_of

        given |= {"family": model.family, "link": model.link, "nagq": model.nagq, "trials": model.trials}
        return request_of(model.formula, **given, options=options)
    return Request(model.formula, **given, options=options)


def _fitted(model: ModelSection, update: Update, request: Request) -> MixedFit:
    """The fit of a store's statistics, from where the last one ended."""
    from .compressed import Compressed

    if isinstance(update.stats, Compressed):
        from .generalized import refitted

        return refitted(update.stats, request, update.before)
    if model.kind == "ols":
        from .linear import ols

        return ols(model.formula, update.stats, absorb=model.absorb, options=request.options)
    from .fit import lmm

    # one Newton step more: from a start close by the search stops sooner, and must end where one from afar does
    options, before = replace(request.options, tol=request.options.tol / 100), update.before
    return lmm(model.formula, update.stats, reml=model.reml, start=before.theta if before is not None else None, options=options)
