"""The statements of an iterative fit: its rows, or cells of rows that share block and design row, in the order of blocks."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sqlglot import exp

from .features import Recipe
from .outcome import OFFSET, TIME, TRIALS
from .solve.family import FAMILIES, Family
from .sql import Expression, Names, both, case, minus, named, number, over, plus, ratio, skeleton, times, total
from .statements import used_rows


class Parts:
    """The columns of the used rows that an outcome is made of, by role; None for what the model has not."""

    def __init__(self, recipe: Recipe) -> None:
        first = recipe.n_covariates
        at = {label: f"f{first + i}" for i, label in enumerate(recipe.responses)}
        self.response = exp.column(at[recipe.responses[0]])
        self.trials = exp.column(at[TRIALS]) if TRIALS in at else None
        self.offset = exp.column(at[OFFSET]) if OFFSET in at else None
        self.time = exp.column(at[TIME]) if TIME in at else exp.cast(exp.column("rn"), "double") if recipe.by_row else None
        self.weight = exp.column("w") if recipe.weights else None
        self.freq = exp.column("q") if recipe.freq else None

    @property
    def size(self) -> Expression | None:
        """Frequency times trials."""
        parts = [column.copy() for column in (self.freq, self.trials) if column is not None]
        return times(*parts) if len(parts) == 2 else parts[0] if parts else None

    @property
    def proportion(self) -> Expression:
        """The response of one row: with trials, successes over trials."""
        if self.trials is None:
            return self.response.copy()
        return case([(exp.GT(this=self.trials.copy(), expression=number(0)), ratio(self.response.copy(), self.trials.copy()))], number(0.5))


def family_of(recipe: Recipe) -> Family:
    """The family of the response."""
    return FAMILIES[recipe.family or "gaussian"]


def covariates(recipe: Recipe) -> list[str]:
    """The columns f… of the features that are not constant."""
    return [f"f{i}" for i, monomial in enumerate(recipe.features[: recipe.n_covariates]) if monomial]


def columns(recipe: Recipe, *, compressed: bool) -> list[str]:
    """The names of the numeric columns of `arranged`, in order."""
    parts, family = Parts(recipe), family_of(recipe)
    out = [*covariates(recipe), "y"]
    out += ["size"] if compressed or parts.size is not None else []
    out += ["w"] if parts.weight is not None else []
    out += ["offset"] if parts.offset is not None else []
    out += ["time"] if parts.time is not None else []
    out += [f"t{k}" for k, name in enumerate(family.statistics) if compressed or name != "square"]
    return out + (["constant"] if _constant(parts, family) is not None else [])


def arranged(recipe: Recipe, keys: Sequence[str], *, compressed: bool, repeatable: bool = False) -> exp.Select:
    """The cells, over the table `used`, ordered by the key columns `keys`; `repeatable`: and by all that they hold, so that the order is
    the same in whatever order the rows come."""
    statement = unordered(recipe, keys, compressed=compressed)
    order = [*keys] + (["time"] if Parts(recipe).time is not None else [])
    order += [name for name in columns(recipe, compressed=compressed) if name not in ("time", "constant")] if repeatable else []
    return statement.order_by(*map(exp.column, order), copy=False) if order else statement


def unordered(recipe: Recipe, keys: Sequence[str], *, compressed: bool) -> exp.Select:
    """The cells, or the rows, over the table `used`, with their keys."""
    return _cells(recipe, keys) if compressed else _rows(recipe, keys)


def _rows(recipe: Recipe, keys: Sequence[str]) -> exp.Select:
    parts, family = Parts(recipe), family_of(recipe)
    found: dict[str, Expression | None] = {"y": parts.proportion, "size": parts.size, "w": parts.weight}
    found |= {"offset": parts.offset, "time": parts.time}
    found |= {f"t{k}": _function(name, parts.response) for k, name in enumerate(family.statistics)}
    found["constant"] = _constant(parts, family)
    found["y"] = _marked(parts, family, parts.proportion)
    return _selected(recipe, keys, found, compressed=False)


def _marked(parts: Parts, family: Family, value: Expression) -> Expression:
    """The value, NaN where the response is one that the family cannot give: `first_outside` then finds it."""
    return value if family.name == "gaussian" else case([(domain(parts, family), value)], number(math.nan))


def _selected(recipe: Recipe, keys: Sequence[str], found: dict[str, Expression | None], *, compressed: bool) -> exp.Select:
    out: list[Expression] = [exp.column(key) for key in keys]
    for name in columns(recipe, compressed=compressed):
        value = found.get(name)
        out.append(named(value, name) if value is not None else exp.column(name))
    return skeleton("cells").select(*out, append=False, copy=False)


def _cells(recipe: Recipe, keys: Sequence[str]) -> exp.Select:
    parts, family = Parts(recipe), family_of(recipe)
    size = parts.size
    one = exp.cast(exp.Count(this=exp.Star()), "double")
    rows = one if size is None else exp.Sum(this=size)

    def mean(value: Expression, weight: Expression | None) -> Expression:
        return ratio(exp.Sum(this=value if weight is None else times(weight.copy(), value)), rows.copy())

    response = parts.response
    found: dict[str, Expression | None] = {"size": rows, "w": parts.weight, "offset": parts.offset}
    marked = _marked(parts, family, response.copy())
    found["y"] = marked if family.keyed else mean(marked, parts.freq)
    if parts.trials is not None:
        positive = exp.GT(this=rows.copy(), expression=number(0))
        found["y"] = case([(positive, mean(marked.copy(), parts.freq))], number(0.5))
    for k, name in enumerate(family.statistics):
        found[f"t{k}"] = mean(_function(name, response), parts.freq)
        if name == "square":
            square = mean(times(response.copy(), response.copy()), parts.freq)
            average = mean(response.copy(), parts.freq)
            found[f"t{k}"] = exp.Greatest(this=minus(square, times(average, average.copy())), expressions=[number(0)])
    constant = _constant(parts, family)
    found["constant"] = exp.Sum(this=constant) if constant is not None else None
    shared = [*keys, *covariates(recipe)]
    shared_columns: list[Expression] = [exp.column(name) for name in shared]
    shared_columns += [c.copy() for c in (parts.weight, parts.offset, response if family.keyed else None) if c is not None]
    return _selected(recipe, keys, found, compressed=True).group_by(*shared_columns, copy=False)


def merged(recipe: Recipe, keys: Sequence[str]) -> exp.Select:
    """Cells of the table `used`, which holds some of equal key and design row, as cells of the union of their rows."""
    names = [name for name in columns(recipe, compressed=True) if name != "constant"]
    size = exp.column("size")
    rows = exp.Sum(this=size)

    def mean(value: Expression, empty: Expression) -> Expression:
        found = ratio(exp.Sum(this=times(size.copy(), value)), rows.copy())
        return case([(exp.GT(this=rows.copy(), expression=number(0)), found)], empty)

    own = {*covariates(recipe), "w", "offset", *(["y"] if family_of(recipe).keyed else [])}
    shared = [*keys, *(name for name in names if name in own)]
    y = exp.column("y")
    found: dict[str, Expression] = {"size": rows.copy(), "y": mean(y.copy(), number(0.5))}
    for k, name in enumerate(family_of(recipe).statistics):
        found[f"t{k}"] = mean(exp.column(f"t{k}"), number(0))
        if name == "square":  # the variance within cells, and that of their means
            square = mean(times(y.copy(), y.copy()), number(0))
            between = minus(square, times(found["y"].copy(), found["y"].copy()))
            found[f"t{k}"] = plus(found[f"t{k}"], exp.Greatest(this=between, expressions=[number(0)]))
    out = [exp.column(name) if name in shared else named(found[name], name) for name in (*keys, *names)]
    return skeleton("merged_cells").select(*out, append=False, copy=False).group_by(*map(exp.column, shared), copy=False)


def ordered(recipe: Recipe, keys: Sequence[str], *, compressed: bool) -> exp.Select:
    """The rows, or merged cells, of the table `used` in the order of their blocks."""
    names = [name for name in columns(recipe, compressed=compressed) if name != "constant"]
    every = [exp.column(name) for name in (*keys, *names)]
    return skeleton("cells").select(*every, append=False, copy=False).order_by(*map(exp.column, keys), copy=False)


def _function(name: str, response: Expression) -> Expression:
    y = response.copy()
    made: dict[str, Callable[[], Expression]] = {
        "log": lambda: exp.Ln(this=y),
        "log1m": lambda: exp.Ln(this=exp.Paren(this=minus(number(1), y))),
        "inverse": lambda: ratio(number(1), y),
        "square": lambda: times(y, y.copy()),
    }
    return made[name]()


def _constant(parts: Parts, family: Family) -> Expression | None:
    """The part of a row's log-likelihood that depends on the response alone: log binomial coefficients, or -log y!."""

    def log_factorial(value: Expression) -> Expression:
        return exp.Anonymous(this="lgamma", expressions=[plus(value.copy(), number(1))])

    if family.constant == "factorial":
        out: Expression = exp.Neg(this=log_factorial(parts.response))
    elif family.constant == "binomial" and parts.trials is not None:
        failures = minus(parts.trials.copy(), parts.response.copy())
        out = minus(minus(log_factorial(parts.trials), log_factorial(parts.response)), log_factorial(failures))
    else:
        return None
    return out if parts.freq is None else times(parts.freq.copy(), exp.Paren(this=out))


def domain(parts: Parts, family: Family) -> Expression:
    """True where the response is one that the family can give."""
    y, zero = parts.response, number(0)
    whole = exp.EQ(this=exp.Floor(this=y.copy()), expression=y.copy())
    at_least_0 = exp.GTE(this=y.copy(), expression=zero)
    match family.name:
        case "binomial" if (trials := parts.trials) is not None:
            slack = times(trials.copy(), number(1 + 1e-9))
            return both([at_least_0, exp.LTE(this=y.copy(), expression=slack), exp.GTE(this=trials.copy(), expression=number(0))])
        case "binomial":
            return exp.or_(exp.EQ(this=y.copy(), expression=zero), exp.EQ(this=y.copy(), expression=number(1)))
        case "poisson" | "negbinomial" | "negbinomial1":
            return both([at_least_0, whole])
        case "gamma" | "inverse_gaussian":
            return exp.GT(this=y.copy(), expression=zero)
        case "beta":
            return both([exp.GT(this=y.copy(), expression=zero), exp.LT(this=y.copy(), expression=number(1))])
    return exp.true()


def outcome(recipe: Recipe, names: Names) -> exp.Select:
    """One row: row_count, n (frequencies), bad (rows outside the domain), and size, first and second moment sums of the response, least and
    greatest, and the sum of offsets."""
    parts, family = Parts(recipe), family_of(recipe)
    outside = exp.Not(this=exp.Paren(this=domain(parts, family)))
    one = number(1)
    y, q = parts.proportion, parts.freq if parts.freq is not None else one
    size = parts.size if parts.size is not None else one
    offset = parts.offset if parts.offset is not None else number(0)
    found = {
        "n": q, "bad": case([(outside, one.copy())], number(0)), "size": size, "y1": times(size.copy(), y),
        "y2": times(size.copy(), times(y.copy(), y.copy())), "offset_sum": offset,
    }  # fmt: skip
    sums = [total(value.copy(), name) for name, value in found.items()]
    ends = [named(kind(this=y.copy()), name) for kind, name in ((exp.Min, "low"), (exp.Max, "high"))]
    return over(skeleton("outcome").select(*sums, *ends, copy=False), used_rows(recipe, names, keys=False), "used")


def first_outside(recipe: Recipe, names: Names, *, ordered: bool) -> exp.Select:
    """The first response that the family cannot give (with its trials), in the source's order where it has one."""
    parts, family = Parts(recipe), family_of(recipe)
    wanted = [named(parts.response.copy(), "y"), *([named(parts.trials.copy(), "trials")] if parts.trials is not None else [])]
    inner = used_rows(recipe, names, keys=False)
    if ordered:
        inner = inner.select(exp.column("rn"), copy=False)
    statement = exp.select(*wanted).from_(inner.subquery("used", copy=False))
    statement = statement.where(exp.Not(this=exp.Paren(this=domain(parts, family))), copy=False)
    return (statement.order_by(exp.column("rn"), copy=False) if ordered else statement).limit(1, copy=False)


def design_rows(recipe: Recipe, names: Names) -> exp.Select:
    """How many rows share each design row (and weight, offset and, where it matters, response)."""
    parts, family = Parts(recipe), family_of(recipe)
    shared: list[Expression] = [exp.column(name) for name in covariates(recipe)]
    shared += [c.copy() for c in (parts.weight, parts.offset, parts.response if family.keyed else None) if c is not None]
    statement = skeleton("design_rows")
    return over(statement.group_by(*shared, copy=False) if shared else statement, used_rows(recipe, names, keys=False), "used")


def block_count(recipe: Recipe, names: Names, *, approximate: bool) -> exp.Select:
    """About how many blocks there are: the distinct keys of all rows, used or not, by a sketch where the engine has one."""
    keys: list[Expression] = [names.key(group) for group in recipe.groups]
    if approximate and len(keys) == 1:
        return skeleton("rows").select(named(exp.ApproxDistinct(this=keys[0]), "blocks"), append=False, copy=False)
    distinct = skeleton("rows").select(*keys, append=False, copy=False).distinct(copy=False)
    return exp.select(named(exp.Count(this=exp.Star()), "blocks")).from_(distinct.subquery("distinct_keys", copy=False))
