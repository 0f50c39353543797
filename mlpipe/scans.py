"""The models of a job that asks for several: those over the same rows from one scan, and one that its rows do not allow alone."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import ConfigError, DataError, FormulaError, MlpipeError
from .many import Fits, Fitted, Model, fit_many, united
from .plans import Request


@dataclass(frozen=True)
class Scan:
    """Models over the same rows, and how these are read."""

    models: Sequence[Model]
    data: Any
    request: Request


def fit_scans(scans: Sequence[Scan]) -> Fits:
    """Fits all models of several scans, in the order of these. A model that its rows do not allow has the error in place of the fit.

    Raises ConfigError and FormulaError for what is wrong whatever the rows are, ResourceError, and the first error where no model is left.
    """
    for scan in scans:
        united(scan.models, scan.request)
    done, out = [], list[Fitted]()
    for scan in scans:
        try:
            made, failed = _fitted_scan(scan)
        except MlpipeError as error:
            error.message = f"{_named(scan.models)}: {error.message}"
            raise
        done += [made] if made is not None else []
        out += [*(made.fits if made is not None else []), *failed]
    if not done and (first := out[0].error) is not None:
        first.message = f"{_named(scans[0].models[:1])}: {first.message}" if len(out) > 1 else first.message
        raise first
    return Fits(out, done[0].by, {"scans": [one.info for one in done]})


def _named(models: Sequence[Model]) -> str:
    return f"[[models]] {', '.join(model.name for model in models)}"


def _fitted_scan(scan: Scan) -> tuple[Fits | None, list[Fitted]]:
    """The fits of a scan; where it fails those of the models that are not to blame, and the others with their errors."""
    try:
        return fit_many(scan.models, scan.data, scan.request), []
    except (DataError, FormulaError, ConfigError) as error:
        first = error
    if len(scan.models) == 1:
        return None, [Fitted(scan.models[0].name, {}, None, first)]
    made, failed = zip(*(_fitted_scan(replace(scan, models=[model])) for model in scan.models), strict=True)
    blamed = [one for of_model in failed for one in of_model]
    if not blamed:  # each could be fitted, only to other rows than those that are complete for all
        return None, [Fitted(model.name, {}, None, first) for model in scan.models]
    rest = [model for model, fits in zip(scan.models, made, strict=True) if fits is not None]
    again, more = _fitted_scan(replace(scan, models=rest)) if len(rest) > 1 else (next(filter(None, made), None), [])
    return again, [*blamed, *more]
