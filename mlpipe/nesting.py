"""Whether fits can be compared by their likelihoods, and what the names of their terms say of one being part of the other."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .covariates import offset_of, random_terms
from .errors import ConfigError
from .reduction import response_vector

if TYPE_CHECKING:
    from .result import MixedFit

SAME = 1e-7  # of the response's size, by which its mean over the same rows may differ


def check_comparable(fits: Sequence[MixedFit]) -> None:
    """Raises ConfigError where likelihoods cannot be compared."""
    for fit in fits:
        if not hasattr(fit, "n_params"):
            raise ConfigError(f"anova compares fits, not {type(fit).__name__}", hint="mp.anova(fit1, fit2, …)")
    if len(fits) < 2:
        raise ConfigError("anova compares two fits or more")
    first = fits[0]
    for fit in fits:
        if math.isnan(fit.loglik):
            raise ConfigError(f"the fit of {fit.formula!r} has no likelihood", hint="quasi families have none")
        if fit.response != first.response:
            raise ConfigError(f"the fits are of different responses: {first.response} and {fit.response}", code="not_comparable")
        if not math.isclose(fit.nobs, first.nobs, rel_tol=1e-12) or fit.rows != first.rows or _other_mean(first, fit):
            raise ConfigError(
                f"the fits are not of the same response and rows ({first.rows:,} and {fit.rows:,})", code="not_comparable",
                hint="rows with missing values in a column that only one model uses differ: drop them first",
            )  # fmt: skip
        for what in ("weights", "freq", "trials"):
            one, other = (getattr(each.recipe, what, None) for each in (first, fit))
            if one != other:
                raise ConfigError(f"the fits have different {what}: {one} and {other}", code="not_comparable")
        if (fit.family, getattr(fit, "link", None)) != (first.family, getattr(first, "link", None)):
            raise ConfigError("the fits have different families or links", code="not_comparable")
        nodes = {getattr(other, "nagq", 1) for other in fits if other.terms}
        if len(nodes) > 1:
            raise ConfigError(f"the fits have different numbers of quadrature nodes: {sorted(nodes)}", code="not_comparable")


def _other_mean(one: MixedFit, other: MixedFit) -> bool:
    """Whether the responses' means, where they are at hand, show that the rows differ."""
    a, b = _mean(one), _mean(other)
    if offset_of(one.recipe) != offset_of(other.recipe) or a is None or b is None or a[1] != b[1]:
        return False
    return abs(a[0] - b[0]) > SAME * max(abs(a[0]), one.sigma if math.isfinite(one.sigma) else 1e-3 * abs(a[0]))


def _mean(fit: MixedFit) -> tuple[float, Any] | None:
    """The mean of the response over the rows, and its precision weight; None where it is not at hand."""
    if "mean_response" in fit.info:
        return float(fit.info["mean_response"]), None
    kept = getattr(fit, "held", None)
    if kept is None:
        return None
    at = kept.stats.recipe.features.index(())
    total = kept.stats.gram[at]
    return float(response_vector(kept.stats.recipe, fit.response) @ total / total[at]), kept.stats.recipe.weights


def doubts(small: MixedFit, large: MixedFit) -> list[str]:
    """What speaks against the smaller model being part of the larger one."""
    out = []
    if not set(small.names) <= set(large.names):
        out.append("the fixed effects are not nested by name: the test holds only if the models are")
    held = [(term.group, set(term.names)) for term in random_terms(large)]
    if not all(any(group == term.group and set(term.names) <= names for group, names in held) for term in random_terms(small)):
        out.append("the random effects are not nested by name: the test holds only if the models are")
    if offset_of(small.recipe) != offset_of(large.recipe):
        out.append("the offsets differ: the test holds only if the models are nested")
    return out


def adds_variances(small: MixedFit, large: MixedFit) -> bool:
    """Whether the larger model has random effects that the smaller has not, not only further covariances."""
    have = {(term.group, name) for term in random_terms(small) for name in term.names}
    return any((term.group, name) not in have for term in random_terms(large) for name in term.names)


def one_more(small: MixedFit, large: MixedFit) -> int | None:
    """How many covariances come with the one random effect that the larger model has more, else None."""
    left = [(term.group, frozenset(term.names)) for term in small.terms]
    right = [(term.group, frozenset(term.names)) for term in large.terms]
    fewer, more = [t for t in left if t not in right], [t for t in right if t not in left]
    if not fewer and len(more) == 1 and len(more[0][1]) == 1:
        return 0
    if len(fewer) == len(more) == 1 and fewer[0][0] == more[0][0] and fewer[0][1] < more[0][1] and len(more[0][1] - fewer[0][1]) == 1:
        return len(fewer[0][1])
    return None
