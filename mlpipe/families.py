"""What may be asked of a generalized model, by the names that users write: families, links, weights, nodes."""
from __future__ import annotations

from .errors import ConfigError, did_you_mean
from .formula import Formula
from .solve.family import FAMILIES
from .solve.link import LINKS
from .solve.quadrature import MAX_NAGQ

QUASI = {"quasibinomial": "binomial", "quasipoisson": "poisson"}
WEIGHTED = ("gaussian", "gamma", "inverse_gaussian")


def checked_family(family: str, link: str | None, *, quasi: bool = False) -> tuple[str, str]:
    """The names of a known family and link. Raises ConfigError for others."""
    known = [*FAMILIES, *(QUASI if quasi else ())]
    if family not in known:
        raise ConfigError(f"family = {family!r} is not known", hint=did_you_mean(str(family), known))
    family = QUASI.get(family, family)
    link = FAMILIES[family].links[0] if link is None else link
    if link not in LINKS:
        raise ConfigError(f"link = {link!r} is not known", hint=did_you_mean(str(link), list(LINKS)))
    return family, link


def check_weights(family: str, weights: str | None) -> None:
    """Raises ConfigError for prior weights of a family that has no dispersion for them to divide."""
    if weights is not None and family not in WEIGHTED:
        hint = "trials= for numbers of trials, freq= for rows that stand for several"
        raise ConfigError(f"family {family!r} has no dispersion for weights to divide", hint=hint)


def check_mixed(formula: Formula, nagq: int) -> None:
    """Raises ConfigError for a mixed model without a random term, or a number of nodes that cannot be."""
    if not formula.random:
        raise ConfigError("the formula has no random term", code="no_random_term", hint="write one, such as (1 | group), or fit by glm")
    if isinstance(nagq, bool) or not hasattr(nagq, "__index__") or nagq < 1:
        raise ConfigError(f"nagq = {nagq!r}: it must be a whole number from 1")
    if nagq > MAX_NAGQ:
        raise ConfigError(f"nagq = {nagq:,} nodes a random effect are more than {MAX_NAGQ}", hint="lower nagq")
    factors = dict.fromkeys(bar.group_label for bar in formula.random)
    if nagq > 1 and len(factors) > 1:
        raise ConfigError(
            f"nagq = {nagq} with several grouping factors ({', '.join(factors)}): their effects are integrated jointly, "
            "and quadrature over so many dimensions is out of reach", code="nagq_several", hint="nagq=1, the Laplace approximation",
        )  # fmt: skip


def check_plain(formula: Formula) -> None:
    """Raises ConfigError for a model without random effects whose formula has some."""
    if formula.random:
        raise ConfigError("the formula has a random term", code="random_term", hint="fit it by glmm")
