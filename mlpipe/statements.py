"""The statements of a fit, each a skeleton of `sql/` completed from a recipe."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations_with_replacement

from sqlglot import exp

from . import expr
from .design import Variable
from .features import Recipe
from .formula import parse_expression
from .sql import (
    Expression,
    Names,
    both,
    case,
    feature,
    feature_label,
    finite,
    minus,
    named,
    number,
    numeric,
    over,
    scalar,
    skeleton,
    summed,
    times,
    total,
    weighted,
)


def weight_columns(recipe: Recipe) -> dict[str, str]:
    """The weight columns of the used rows: w (precision), q (frequency), and the expressions they hold."""
    return {name: text for name, text in (("w", recipe.weights), ("q", recipe.freq)) if text is not None}


def raw_columns(recipe: Recipe) -> tuple[str, ...]:
    """The source columns that enter as values: variables, responses, weights; offsets are part of the responses."""
    nodes: list[expr.Node] = [parse_expression(text) for text in weight_columns(recipe).values()]
    for variable in recipe.variables.values():
        nodes += [variable.expression, *variable.columns]
    return tuple(dict.fromkeys(name for node in nodes for name in expr.columns(node)))


def usable(recipe: Recipe, names: Names) -> Expression:
    """True where a row enters the fit: no missing or infinite value, no missing key, positive weights."""
    conditions = [] if names.complete else [names.present(name) for name in raw_columns(recipe)]
    # of complete rows too: a key that went missing since would make a group of its own, which the sums over groups do not tell
    conditions += [names.present(group, key=True) for group in recipe.keys]
    for text in () if names.complete else weight_columns(recipe).values():
        conditions.append(exp.GT(this=numeric(parse_expression(text), names), expression=number(0)))
    return both(conditions)


def by_hash(recipe: Recipe, names: Names, count: int) -> list[Expression]:
    """The blocks in so many parts, by the hash of their keys: of each part the condition on its rows."""
    # the lowest bits place a key in the engine's hash table: parts by them would crowd its slots
    hashed = exp.Anonymous(this="hash", expressions=[names.key(group) for group in recipe.groups])
    bits = exp.Paren(this=exp.BitwiseRightShift(this=hashed, expression=exp.Literal.number(24)))
    remainder = exp.Mod(this=bits, expression=exp.Literal.number(count))
    return [exp.EQ(this=remainder.copy(), expression=exp.Literal.number(part)) for part in range(count)]


def by_range(recipe: Recipe, names: Names, ranges: Iterable[tuple[int, int]]) -> list[Expression]:
    """The blocks of one whole-number key in parts, by ranges of the key: of each part the condition on its rows."""
    (group,) = recipe.groups
    number = exp.Literal.number
    return [exp.Between(this=names.key(group), low=number(low), high=number(high)) for low, high in ranges]


def used_rows(recipe: Recipe, names: Names, *, keys: bool) -> exp.Select:
    """The rows that enter the fit: features f0, f1, …, weights w and q, and, where asked for, the keys."""
    columns: list[Expression] = [names.key(group) for group in recipe.keys] if keys else []
    for name, text in weight_columns(recipe).items():
        columns.append(named(numeric(parse_expression(text), names), name))
    for i, monomial in enumerate(recipe.features):
        if monomial:
            columns.append(named(feature(monomial, recipe, names), f"f{i}", feature_label(monomial)))
    if recipe.by_row:
        columns.append(exp.column("rn"))
    if not columns:
        columns.append(named(number(1), "f0"))
    return skeleton("rows").select(*columns, append=False, copy=False).where(usable(recipe, names), copy=False)


def raw_rows(recipe: Recipe, names: Names) -> exp.Select:
    """The rows that enter the fit, as they are in the source: its columns in the order of `recipe.kinds`."""
    columns = [names.key(name) for name in recipe.kinds]
    return skeleton("rows").select(*columns, append=False, copy=False).where(usable(recipe, names), copy=False)


def _product(recipe: Recipe, i: int, j: int) -> Expression:
    """w * f_i * f_j of the used rows, the constant left out."""
    factors = [f"f{k}" for k in (i, j) if recipe.features[k]]
    columns = [*weight_columns(recipe), *factors]
    return weighted(columns, ()) if columns else number(1)


def _sum(recipe: Recipe, i: int, j: int, name: str) -> Expression:
    constant = not recipe.features[i] and not recipe.features[j] and not weight_columns(recipe)
    return named(exp.cast(exp.Count(this=exp.Star()), "double"), name) if constant else total(_product(recipe, i, j), name)


def _weight_sums(recipe: Recipe) -> list[Expression]:
    """Sum of frequencies and of frequency times log precision weight, where there are any."""
    out = [total(exp.column("q"), "n")] if recipe.freq else []
    if recipe.weights:
        log = exp.Ln(this=exp.column("w"))
        out.append(total(exp.Mul(this=exp.column("q"), expression=log) if recipe.freq else log, "sum_log_w"))
    return out


def cross_products(recipe: Recipe, names: Names, by: Sequence[str] = ()) -> exp.Select:
    """One row: row_count, n, sum_log_w, and g_i_j for the upper triangle of the features' cross-products; with `by` one per value of
    these keys."""
    pairs = combinations_with_replacement(range(len(recipe.features)), 2)
    sums = [_sum(recipe, i, j, f"g_{i}_{j}") for i, j in pairs]
    statement = skeleton("cross_products").select(*_weight_sums(recipe), *sums, copy=False)
    if by:
        keys = [names.key(name) for name in by]
        statement = statement.select(*keys, copy=False).group_by(*(key.copy() for key in keys), copy=False)
    return over(statement, used_rows(recipe, names, keys=bool(by)), "used")


def rest_names(recipe: Recipe) -> list[str]:
    """The columns of `block_sums` beyond s0, s1, …, where whole cross-products are asked for."""
    return [*(f"x{k}" for k in range(len(recipe.rest()))), *(column.alias for column in _weight_sums(recipe))]


def block_sums(recipe: Recipe, names: Names, part: Expression | None = None, *, whole: bool = False) -> exp.Select:
    """Per block: its keys, row_count, and s0, s1, … in the order of `recipe.pairs()`; of all blocks, or of those whose rows fulfil `part`.

    `whole`: also x0, x1, … in the order of `recipe.rest()`, and n and sum_log_w where rows have frequencies and weights.
    """
    keys = [names.key(group) for group in recipe.groups]
    sums = [_sum(recipe, a, j, f"s{k}") for k, (a, j) in enumerate(recipe.pairs())]
    if whole:
        sums += [_sum(recipe, a, j, f"x{k}") for k, (a, j) in enumerate(recipe.rest())] + _weight_sums(recipe)
    statement = skeleton("block_sums").select(*keys, *sums, copy=False).group_by(*(key.copy() for key in keys), copy=False)
    rows = used_rows(recipe, names, keys=True)
    if part is not None:
        rows = rows.where(part.copy(), copy=False)
    return over(statement, rows, "used")


def second_level(recipe: Recipe, names: Names, part: Expression | None = None) -> exp.Select:
    """Per distinct block size: block_count, the sums t_k of s_k, and p_k_l of their products (k <= l)."""
    size = len(recipe.pairs())
    sums = [total(exp.column(f"s{k}"), f"t_{k}") for k in range(size)]
    products = [
        total(exp.Mul(this=exp.column(f"s{k}"), expression=exp.column(f"s{j}")), f"p_{k}_{j}")
        for k, j in combinations_with_replacement(range(size), 2)
    ]
    return over(skeleton("second_level").select(*sums, *products, copy=False), block_sums(recipe, names, part), "blocks")


def levels(variables: Sequence[Variable], names: Names, where: Expression) -> exp.Select:
    """The distinct values v0, v1, … of categorical variables in the rows where `where` holds, with counts, in one scan.

    A row of the result has the value of one variable and NULL for the others.
    """
    columns = [exp.column(f"v{k}") for k in range(len(variables))]
    parts = [named(scalar(variable.expression, names), column.name) for variable, column in zip(variables, columns, strict=True)]
    inner = skeleton("rows").select(*parts, append=False, copy=False).where(where, copy=False)
    sets = exp.GroupingSets(expressions=[exp.Paren(this=column.copy()) for column in columns])
    return over(skeleton("levels").select(*columns, copy=False), inner, "used").group_by(sets, copy=False)


def moments(nodes: Sequence[expr.Node], names: Names, where: Expression) -> exp.Select:
    """One row: for each expression k its mean, spread (n - 1), minimum, maximum and how many values are not whole numbers."""
    inner = skeleton("rows").select(*(named(numeric(node, names), f"x{k}") for k, node in enumerate(nodes)), append=False, copy=False)
    statement = skeleton("moments")
    for k in range(len(nodes)):
        x = exp.column(f"x{k}")
        kept = case([(finite(x.copy()), x.copy())], None)
        fraction = case([(exp.EQ(this=exp.Floor(this=x.copy()), expression=x.copy()), number(0))], number(1))
        statement = statement.select(
            named(exp.Count(this=kept), f"count_{k}"),
            named(exp.Count(this=x.copy()), f"present_{k}"),
            named(exp.Avg(this=kept.copy()), f"mean_{k}"),
            named(exp.StddevSamp(this=kept.copy()), f"sd_{k}"),
            named(exp.Min(this=kept.copy()), f"min_{k}"),
            named(exp.Max(this=kept.copy()), f"max_{k}"),
            total(case([(finite(x.copy()), fraction)], number(0)), f"fractions_{k}"),
            copy=False,
        )
    return over(statement, inner.where(where, copy=False), "used")


def sums(nodes: Sequence[expr.Node], names: Names, where: Expression) -> exp.Select:
    """One row: row_count and the sum t_k of each expression over the rows where `where` holds."""
    inner = skeleton("rows").select(*(named(numeric(node, names), f"x{k}") for k, node in enumerate(nodes)), append=False, copy=False)
    statement = skeleton("moments").select(*(total(exp.column(f"x{k}"), f"t_{k}") for k in range(len(nodes))), copy=False)
    return over(statement, inner.where(where, copy=False), "used")


def missing(
    columns: Iterable[str], keys: Iterable[str], weights: Mapping[str, str], names: Names, by: Iterable[str] = ()
) -> exp.Select:
    """One row, or one per value of the keys `by`, nulls included: row_count, per used column the missing and infinite values, per weight
    the zero and negative ones."""
    statement = skeleton("missing")
    for k, name in enumerate(columns):
        value = names.value(name)
        numeric_column = names.kinds[name] == "number"
        absent: Expression = exp.Is(this=value, expression=exp.Null())
        if numeric_column:
            infinite = _infinite(value)
            statement = statement.select(_count(infinite, f"infinite_{k}"), copy=False)
            absent = exp.or_(absent, _nan(value, infinite))
        statement = statement.select(_count(absent, f"missing_{k}"), copy=False)
    for k, name in enumerate(keys):
        key = names.key(name)
        absent = exp.Is(this=key, expression=exp.Null())
        if names.kinds[name] == "number":
            infinite = _infinite(names.value(name))
            statement = statement.select(_count(infinite, f"infinite_key_{k}"), copy=False)
            absent = exp.or_(absent, _nan(names.value(name), infinite))
        statement = statement.select(_count(absent, f"key_{k}"), copy=False)
    for name, text in weights.items():
        weight = numeric(parse_expression(text), names)
        statement = statement.select(
            _count(exp.EQ(this=weight, expression=number(0)), f"zero_{name}"),
            _count(exp.LT(this=weight.copy(), expression=number(0)), f"negative_{name}"),
            copy=False,
        )
    values = [names.key(name) for name in by]
    return statement.select(*values, copy=False).group_by(*(key.copy() for key in values), copy=False) if values else statement


def _infinite(value: Expression) -> Expression:
    return exp.or_(*(exp.EQ(this=value.copy(), expression=number(bound)) for bound in (math.inf, -math.inf)))


def _nan(value: Expression, infinite: Expression) -> Expression:
    return both([exp.Not(this=exp.Paren(this=side)) for side in (finite(value.copy()), infinite.copy())])


def _count(condition: Expression, name: str) -> Expression:
    return total(case([(condition, number(1))], number(0)), name)


def offenders(node: expr.Node, recipe: Recipe, names: Names) -> exp.Select:
    """One row: how many used rows make `node` non-finite, and the extreme values v_k of its columns there."""
    where = both([usable(recipe, names), exp.Not(this=exp.Paren(this=finite(numeric(node, names))))])
    columns = [name for name in expr.columns(node) if names.kinds[name] == "number"]
    inner = skeleton("rows").select(*(named(names.value(name), f"x{k}") for k, name in enumerate(columns)), append=False, copy=False)
    statement = skeleton("offenders").select(*(named(exp.Min(this=exp.column(f"x{k}")), f"v_{k}") for k in range(len(columns))), copy=False)
    return over(statement, inner.where(where, copy=False), "used")


def values(node: expr.Node, names: Names, where: Expression) -> exp.Select:
    """The values x0 of an expression in the rows where `where` holds."""
    return skeleton("rows").select(named(numeric(node, names), "x0"), append=False, copy=False).where(where, copy=False)


def histogram(node: expr.Node, names: Names, where: Expression, low: float, high: float, bins: int) -> exp.Select:
    """Per bin that holds any: the least and greatest value and the count."""
    x = exp.column("x0")
    per_unit = bins / (high - low) if high > low else 0.0
    bin_ = exp.Floor(this=times(minus(x, number(low)), number(per_unit)))
    inner = skeleton("rows").select(named(numeric(node, names), "x0"), append=False, copy=False).where(where, copy=False)
    numbered = exp.select(named(bin_, "bin"), x.copy()).from_(inner.subquery("inside", copy=False))
    statement = skeleton("moments").select(named(exp.Min(this=x.copy()), "low"), named(exp.Max(this=x.copy()), "high"), copy=False)
    return over(statement, numbered, "used").group_by(exp.column("bin"), copy=False)


def combination(coefficients: Sequence[float], recipe: Recipe, names: Names, *, inside: bool) -> Expression:
    """The sum of coefficient * feature: of the used rows' columns f0, f1, … if `inside`, else written out over `src`."""
    parts: list[Expression] = []
    for i, value in enumerate(coefficients):
        if value:
            column = exp.column(f"f{i}") if inside else feature(recipe.features[i], recipe, names)
            parts.append(times(number(float(value)), column) if recipe.features[i] else number(float(value)))
    return summed(parts)


def blup_sums(recipe: Recipe, names: Names, residual: Sequence[float]) -> exp.Select:
    """Per block: keys, s_a_b of Z'wZ over the random features (a <= b), and r_a of Z'w times the combination `residual`."""
    keys = [names.key(group) for group in recipe.groups]
    inner = used_rows(recipe, names, keys=True)
    weights = list(weight_columns(recipe))
    columns = [*(key.copy() for key in keys), *(exp.column(name) for name in weights)]
    columns += [exp.column(f"f{i}") for i in recipe.z if recipe.features[i]]
    residuals = named(combination(residual, recipe, names, inside=True), "residual")
    rows = exp.select(*columns, residuals).from_(inner.subquery("used", copy=False))
    sums = [_sum(recipe, a, b, f"s_{a}_{b}") for k, a in enumerate(recipe.z) for b in recipe.z[k:]]
    for a in recipe.z:
        factors = [f"f{a}"] if recipe.features[a] else []
        sums.append(total(weighted(["residual", *factors], weights), f"r_{a}"))
    statement = skeleton("blups").select(*keys, *sums, copy=False).group_by(*(key.copy() for key in keys), copy=False)
    return over(statement, rows, "used")


def cluster_sums(
    recipe: Recipe, names: Names, keys: Sequence[str], pairs: Sequence[tuple[int, int]], residual: Sequence[float]
) -> exp.Select:
    """Per combination of the key columns `keys`: the keys, p_i_j of w f_i f_j for each of `pairs`, and r_j of w f_j times the combination
    `residual`, for every covariate feature j."""
    columns = [names.key(key) for key in keys]
    weights = list(weight_columns(recipe))
    used = [*(key.copy() for key in columns), *(exp.column(name) for name in weights)]
    read = {*range(recipe.n_covariates), *(i for pair in pairs for i in pair)}
    used += [exp.column(f"f{i}") for i in sorted(read) if recipe.features[i]]
    residuals = named(combination(residual, recipe, names, inside=True), "residual")
    rows = exp.select(*used, residuals).from_(used_rows(recipe, names, keys=True).subquery("used", copy=False))
    sums = [_sum(recipe, i, j, f"p_{i}_{j}") for i, j in pairs]
    for j in range(recipe.n_covariates):
        factors = [f"f{j}"] if recipe.features[j] else []
        sums.append(total(weighted(["residual", *factors], weights), f"r_{j}"))
    statement = skeleton("cluster_sums").select(*columns, *sums, copy=False).group_by(*(key.copy() for key in columns), copy=False)
    return over(statement, rows, "used")
