"""The levels of factors that rows really have, where sums or kept rows know more of them."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from .design import Atom, with_levels
from .features import Recipe, level_labels
from .planning import settle
from .stats import SuffStats, transformed

SHARE = 1e-12  # of all weight, below which a level does not occur: rounding of a difference of sums


def over_present(stats: SuffStats) -> SuffStats:
    """The statistics over the levels that have weight in them.

    Raises DataError or FormulaError where the model cannot be coded over these.
    """
    return transformed(stats, restricted(stats.recipe, weights(stats.recipe, stats.gram)))


def weights(recipe: Recipe, gram: np.ndarray) -> dict[str, dict[str, float]]:
    """The weight of each level of each factor, from the cross-products over the features, of which one is the constant."""
    place = {feature: i for i, feature in enumerate(recipe.features)}
    total, out = gram[place[()], place[()]], {}
    for name, labels in recipe.coordinates.levels.items():
        omitted = recipe.coordinates.omitted[name]
        found = {text: float(gram[place[()], place[(Atom(name, text),)]]) for text in labels if text != omitted}
        found[omitted] = float(total) - math.fsum(found.values())
        out[name] = {text: found[text] for text in labels}
    return out


def restricted(recipe: Recipe, weight: Mapping[str, Mapping[str, float]]) -> Recipe:
    """The recipe over the levels that have weight; itself where all have."""
    variables, omitted = dict(recipe.variables), dict(recipe.coordinates.omitted)
    for name, found in weight.items():
        total = math.fsum(found.values())
        kept = [text for text in found if found[text] > SHARE * total]
        if len(kept) == len(found):
            continue
        variable = variables[name]
        levels = [level for level, text in zip(variable.levels, found, strict=True) if text in kept]
        variables[name] = with_levels(variable, levels)
        if omitted[name] not in kept:
            omitted[name] = max(kept, key=lambda text: found[text])
    if variables == recipe.variables:
        return recipe
    responses = {name: variables.pop(name) for name in recipe.responses}
    coordinates = replace(recipe.coordinates, omitted=omitted, levels=level_labels(variables.values()))
    return settle(recipe, variables, responses, coordinates, "blocks")
