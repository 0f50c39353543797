"""What a finished fit says of itself: warnings, or the error that the options ask for."""
from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from .errors import ConvergenceError, ConvergenceWarning, RankWarning, SeparationWarning, SingularFitWarning

if TYPE_CHECKING:
    from .options import Options


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


def warn(message: str, category: type[Warning]) -> None:
    """At the first frame outside of the package."""
    own, level, frame = __name__.partition(".")[0], 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == own:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
