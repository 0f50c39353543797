"""What a finished fit says of itself: warnings, or the error that the options ask for."""
from __future__ import annotations

import math
import sys
import warnings
from typing import TYPE_CHECKING, Any

from .errors import ConvergenceError, ConvergenceWarning, RankWarning, SeparationWarning, SingularFitWarning

if TYPE_CHECKING:
    from .options import Options

FEW_DIGITS = 1e-8  # share of the response's sum of squares left, below which likelihoods and standard errors are not what is promised


def report(fit: Any, options: Options) -> None:
    """Warnings for what the fields of a fit say, at the line that asked for it and in its `info`. Raises ConvergenceError where the
    options ask for it."""
    found: list[tuple[str, type[Warning]]] = []
    if fit.dropped:
        found.append((f"coefficients repeat others and were dropped: {', '.join(fit.dropped)}", RankWarning))
    if separated := fit.info.get("separation"):
        found.append((f"{', '.join(separated)} separate(s) the outcomes: these estimates go to infinity", SeparationWarning))
    if fit.singular:
        found.append(("the fit is singular: a random-effects covariance is on the boundary", SingularFitWarning))
    if not fit.converged:
        message = f"the fit did not converge: {fit.message} (scaled score {fit.score:.2g} after {fit.evaluations} evaluations)"
        if options.on_nonconvergence == "raise":
            raise ConvergenceError(message)
        found.append((message, ConvergenceWarning))
    fit.info["warnings"] = [message for message, _ in found]
    for message, category in found:
        warn(message, category)


def lost_digits(share: float) -> list[str]:
    """A note where the fit leaves so small a share of the response's sum of squares that subtracting the rest takes its digits."""
    if share >= FEW_DIGITS:
        return []
    digits = max(round(math.log10(share / sys.float_info.epsilon)), 0)
    return [f"the random effects explain all but {share:.0e} of the response: of the residual sum of squares about {digits} digits are left"]


def warn(message: str, category: type[Warning]) -> None:
    """At the first frame outside of the package."""
    own, level, frame = __name__.partition(".")[0], 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == own:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
