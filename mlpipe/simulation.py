"""Rows of a source with simulated responses, streamed."""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from . import effects
from .errors import ConfigError
from .lookup import Modes, Reading
from .outcome import TRIALS
from .predictions import size_names
from .scoring import located, shown_columns
from .solve.draws import SUMMED, responses

if TYPE_CHECKING:
    import pyarrow as pa

    from .result import MixedFit


def simulate(fit: MixedFit, n: int, seed: int | None, prefix: str) -> pa.RecordBatchReader:
    """See `MixedFit.simulate`."""
    import pyarrow as pa

    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ConfigError(f"n = {n!r} is not a whole number from 1")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise ConfigError(f"seed = {seed!r} is not a whole number from 0")
    recipe = fit.recipe
    if math.isnan(fit.loglik):
        hint = "quasi families and estimating equations have none"
        raise ConfigError("the fit has no likelihood to simulate from", code="not_available", hint=hint)
    family = fit.family if fit.residual_scaled else fit.base_family  # type: ignore[attr-defined]
    if recipe.freq is not None and family not in SUMMED:
        raise ConfigError(f"rows of family {family!r} that stand for several cannot be simulated as one", hint="leave freq out")
    chosen = seed if seed is not None else fit.options.seed if fit.options is not None else 0
    rng = np.random.default_rng(chosen)
    names = [f"{prefix}sim_{k + 1}" for k in range(n)]
    stack = ExitStack()
    try:
        engine = stack.enter_context(effects.reopened(fit))
        sizes = size_names(recipe)
        factors = (recipe.factors or (recipe.groups,)) if fit.terms else ()
        keys = list(dict.fromkeys(name for groups in factors for name in groups))
        where = located(engine, recipe, False, keys, sizes)
        shown = shown_columns(engine, None, names)
        modes = [Modes(fit, ":".join(groups), groups) for groups in factors]
        drawn = [_effects(fit, mode, n, rng) for mode in modes]
        reading = Reading(fit, engine, where, shown, ["population", *(["size"] if sizes else [])], keys)
    except BaseException:
        stack.close()
        raise
    schema = pa.schema([*reading.fields, *(pa.field(name, pa.float64()) for name in names)])

    def batches() -> Iterator[pa.RecordBatch]:
        with stack:
            for batch, held, features in reading:
                eta = np.repeat(held["population"][:, None], n, axis=1)
                for mode, b in zip(modes, drawn, strict=True):
                    code = reading.codes(batch, mode.levels)
                    for k, feature in enumerate(mode.design.T @ features):
                        eta += feature[:, None] * b[code, k]
                y = _responses(fit, eta, held, rng)
                arrays = [pa.array(column, mask=~np.isfinite(column)) for column in np.ascontiguousarray(y.T)]
                yield pa.RecordBatch.from_arrays([*(batch.column(i) for i in range(len(shown))), *arrays], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _effects(fit: MixedFit, mode: Modes, n: int, rng: np.random.Generator) -> np.ndarray:
    """(levels + 1, q, n) effects of one factor for each simulation, NaN for a level that is not known."""
    terms = [term for term in fit.terms if term.group == mode.levels.group]
    parts = [fit.effect_scale * rng.normal(size=(len(mode.levels), n, len(term.names))) @ term.factor.T for term in terms]
    b = np.concatenate(parts, axis=2).transpose(0, 2, 1)
    return np.concatenate([b, np.full((1, *b.shape[1:]), np.nan)])


def _responses(fit: MixedFit, eta: np.ndarray, held: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """(rows, n) responses, row by row so that they do not depend on the batches; numbers of successes where there are trials."""
    n = eta.shape[1]
    if fit.residual_scaled:
        with np.errstate(invalid="ignore"):
            unit = 1.0 / np.sqrt(held["size"])[:, None] if "size" in held else 1.0
            return np.asarray(eta + fit.sigma * unit * rng.normal(size=eta.shape))
    density = fit.density  # type: ignore[attr-defined]
    size = np.repeat(held["size"], n) if "size" in held else None
    trials = size if TRIALS in fit.recipe.variables else None
    weight = size if trials is None else None
    clean = None if trials is None else np.where(np.isfinite(trials), trials, 0.0)
    y = responses(density, density.link.means(eta.ravel()).mu, fit.tau, clean, weight, rng)  # type: ignore[attr-defined]
    return np.asarray((y if trials is None else y * trials).reshape(eta.shape))
