"""What sums of squares lose of a response that is nearly explained: told, and got back by another pass over its residuals."""
from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .collect import collect
from .errors import DataError
from .formula import Formula
from .reduction import Coded, coded
from .solve.likelihood import FITTED

if TYPE_CHECKING:
    from .plans import Plan
    from .stats import SuffStats

EXPLAINED = 1e-4  # share of the response's sum of squares left by fixed effects, below which the response is read again as a residual
ROUNDING = 1e-13  # residuals over the response's spread, below which they are its rounding error
EXACT = 6e-14  # share left by a whole model, below which it is rounding: about what the sums over several factors leave of none
FEW = 1e-8  # share left by a whole model, below which likelihoods and standard errors are not what is promised


def with_digits(stats: SuffStats, formula: Formula, coding: Mapping[str, Any], plan: Plan | None) -> tuple[SuffStats, Coded]:
    """The statistics to fit a formula from, and its parts: where the fixed effects explain nearly all of the response, those of its
    residuals (by `plan`; None: noted). Raises DataError where nothing but rounding is left, and as `coded` does."""
    parts = coded(stats, formula, coding.get("contrasts"), coding.get("levels"))
    pooled = parts.pooled(stats)
    if pooled.left > EXPLAINED:
        return stats, parts
    if plan is None:
        note = "the fixed effects explain nearly all of the response: fit from the rows for more digits"
        stats.info["notes"] = [*stats.info.get("notes", []), note]
        return stats, parts
    spread = parts.scale * math.sqrt(max(abs(pooled.left), 1e-30))
    again = of_residuals(stats, plan, pooled.gamma, parts.response, spread)
    small = coded(again, formula, coding.get("contrasts"), coding.get("levels"))
    if small.scale < ROUNDING * parts.scale:
        raise DataError("the response is fitted exactly by the fixed effects", code="no_residual")
    return again, small


def of_residuals(stats: SuffStats, plan: Plan, gamma: np.ndarray, response: str, spread: float) -> SuffStats:
    """The statistics of another pass that sums the response less `gamma` (features,), whose residuals are about as large as `spread`."""
    recipe = stats.recipe.residual(gamma.tolist(), response, 2.0 ** round(math.log2(spread)))
    note = "the fixed effects explain nearly all of the response: its residuals were summed in another pass"
    again = collect(replace(plan, recipe=recipe, notes=[*plan.notes, note]))
    again.info["passes"] += stats.info["passes"]
    again.info.update({name: stats.info[name] for name in ("fingerprint", "rescannable", "bytes") if name in stats.info})
    return again


def lost(share: float) -> list[str]:
    """A note where a fit leaves so small a share of the response's sum of squares that subtracting the rest takes its digits. Raises
    DataError where nothing but rounding is left."""
    if not share > EXACT:
        raise DataError(FITTED, code="no_residual")
    if share >= FEW:
        return []
    digits = round(math.log10(share / sys.float_info.epsilon))
    what = "of the residual sum of squares"
    return [f"the random effects explain all but {share:.0e} of what the fixed ones leave: {what} about {digits} digits are left"]
