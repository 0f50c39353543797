"""The SQL that predicts inside a warehouse: one statement over true column names, from the same nodes as `fit.predict`.

A stage is a SELECT over the stage before it that adds columns; the last one hands on the rows' own columns and the prediction.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlglot import exp
from sqlglot.errors import SqlglotError

from .effects import coefficient_names, key_names
from .engines.warehouses import guarded, handed_on, render, warehouse
from .errors import ConfigError, did_you_mean
from .features import Recipe
from .mean_sql import ETA, VARIANCE, Mean, Stage, marginal_mean, mean
from .predictions import fixed_part, scorable, value_names, variance_part
from .scoring import asked
from .sql import Expression, Names, both, case, feature, finite, named, number, plus, skeleton, summed, times
from .tables import factor_names, written

if TYPE_CHECKING:
    from .result import MixedFit

_ROWS, _ROW, _LINEAR, _MEAN = "mlpipe_src", "mlpipe_row", "mlpipe_linear", "mlpipe_mean"


def scoring_sql(
    fit: MixedFit, dialect: str, *, source: str, effects: str | Sequence[str], kind: str, new_levels: str, prefix: str
) -> str:
    """See `MixedFit.scoring_sql`."""
    warehouse(dialect)
    if new_levels not in ("population", "null"):
        hint = did_you_mean(str(new_levels), ["population", "null"])
        raise ConfigError(f'new_levels = {new_levels!r} is not one of "population", "null"', hint=hint)
    wanted, factors = asked(fit, effects, kind)
    recipe = fit.recipe
    values = value_names(recipe, False)
    _check_case([*values, *_keys(recipe, factors)])
    names = Names({name: i for i, name in enumerate(values)}, recipe.kinds)
    ranef = [Joined(fit, group, f"mlpipe_r{k}") for k, group in enumerate(factors)]
    how = _mean(fit, wanted, kind)
    first = _first(fit, names, ranef, new_levels)
    if _uses(how, VARIANCE):
        first[VARIANCE] = guarded(variance_part(fit, names, fit.terms))
    linear = exp.column(_LINEAR)
    stages = [
        {name: _with_true_names(node, values, recipe) for name, node in first.items()},
        {ETA: case([(finite(linear), linear.copy())], None)},
        *how.stages,
        {_MEAN: how.value},
    ]
    joins = [one.join(prefix, dialect) for one in ranef]
    statement = _staged(stages, _table(source, dialect), joins, dialect)
    statement.comments = [*(statement.comments or []), *_head(fit, wanted, kind, source, prefix, ranef)]
    return render(statement, dialect) + "\n"


def write_text(fit: MixedFit, dialect: str, target: str, prefix: str) -> Path:
    """Writes the text of conditional predictions into the directory, or beside the database, that holds the fit."""
    from .atomic import replacing, writing

    name, path = f"{prefix}_scoring.{dialect}.sql", Path(target).expanduser()
    path = path / name if path.is_dir() else path.with_name(f"{path.stem}_{name}")
    text = fit.scoring_sql(dialect, prefix=prefix)
    with writing(path), replacing(path) as file:
        file.write(text.encode())
    return path


class Joined:
    """One factor's modes: their table under the alias `alias`, keys, and coefficients over the random features."""

    def __init__(self, fit: MixedFit, group: str, alias: str) -> None:
        self.alias, self.group = alias, group
        self.columns = next((keys for keys in fit.recipe.factors if ":".join(keys) == group), fit.recipe.groups)
        self.table = f"ranef_{factor_names(fit.groups)[group]}"
        self.stamps = fit.written
        terms = [term for term in fit.terms if term.group == group]
        names = [*key_names(terms, self.columns), *(name for c in coefficient_names(terms) for name in (c, f"{c}_se"))]
        names = written(names, [name for name in self.stamps if name not in ("run_id", "model")])
        self.keys, self.coefficients = names[: len(self.columns)], names[len(self.columns) :: 2]
        self.design = np.column_stack([term.design for term in terms])

    def known(self) -> Expression:
        """True where a row's level is one of them: keys of levels are never null, so that = is safe where a row's are."""
        return exp.Not(this=exp.Is(this=self._column(self.keys[0]), expression=exp.Null()))

    def part(self, recipe: Recipe, names: Names) -> Expression:
        """Zb of a row, 0 where its level is not known."""
        parts: list[Expression] = []
        for i, weights in zip(recipe.z, self.design, strict=True):
            held = [_weighted(float(w), self._column(c)) for w, c in zip(weights, self.coefficients, strict=True) if w]
            if held:
                h = exp.Coalesce(this=summed(held), expressions=[number(0)])
                parts.append(times(h, feature(recipe.features[i], recipe, names)) if recipe.features[i] else h)
        return summed(parts)

    def join(self, prefix: str, dialect: str) -> exp.Join:
        """LEFT JOIN of the table's rows of this fit, where it was written: a table may hold several runs and models."""
        table = _table(prefix, dialect)
        table.set("this", exp.to_identifier(f"{table.name}_{self.table}", quoted=True))
        sides = zip(self.columns, self.keys, strict=True)
        on: list[Expression] = [exp.EQ(this=_true(key), expression=self._column(own)) for key, own in sides]
        on += [_equal(self._column(name), value) for name, value in self.stamps.items()]
        return exp.Join(this=exp.alias_(table, self.alias, table=True), side="LEFT", on=both(on))

    def _column(self, name: str) -> exp.Column:
        return exp.column(exp.to_identifier(name, quoted=True), table=self.alias)


def _equal(column: exp.Column, value: Any) -> Expression:
    """True where a column has this value, which may be None."""
    if value is None:
        return exp.Is(this=column, expression=exp.Null())
    if isinstance(value, bool):
        return exp.EQ(this=column, expression=exp.Boolean(this=value))
    literal = exp.Literal.number(value) if isinstance(value, int) else number(value) if isinstance(value, float) else None
    return exp.EQ(this=column, expression=literal or exp.Literal.string(str(value)))


def _weighted(weight: float, column: exp.Column) -> Expression:
    return column if weight == 1.0 else times(number(weight), column)


def _mean(fit: MixedFit, wanted: str, kind: str) -> Mean:
    if kind == "link" or fit.link == "identity":
        return mean("identity")
    if wanted != "marginal":
        return mean(fit.link)
    constant = all(not fit.recipe.features[i] for i in fit.recipe.z)
    return marginal_mean(fit.link, float(_constant_variance(fit)) if constant else None)


def _uses(how: Mean, name: str) -> bool:
    nodes = [how.value, *(node for stage in how.stages for node in stage.values())]
    return any(column.name == name for node in nodes for column in node.find_all(exp.Column))


def _constant_variance(fit: MixedFit) -> float:
    half = np.hstack([term.Q @ term.star for term in fit.terms])
    return float(fit.effect_scale**2 * (half @ half.T).sum())


def _first(fit: MixedFit, names: Names, ranef: Sequence[Joined], new_levels: str) -> Stage:
    """The linear predictor where a row has all that it needs."""
    linear = fixed_part(fit, names)
    for one in ranef:
        linear = plus(linear, one.part(fit.recipe, names))
    needed = [scorable(fit.recipe, names), *(one.known() for one in ranef if new_levels == "null")]
    return {_LINEAR: guarded(case([(both(needed), linear)], None))}


def _keys(recipe: Recipe, factors: Sequence[str]) -> list[str]:
    found = {":".join(keys): keys for keys in recipe.factors or (recipe.groups,)}
    return list(dict.fromkeys(name for group in factors for name in found[group]))


def _check_case(names: Sequence[str]) -> None:
    """Raises ConfigError for two columns that warehouses which are blind to case would take for one."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            message = f"the columns {other!r} and {name!r} differ only by case, which warehouses do not tell apart"
            raise ConfigError(message, code="case_blind", column=name, hint="rename one of them and fit again")


def _true(name: str) -> exp.Column:
    return exp.column(exp.to_identifier(name, quoted=True), table=_ROWS)


def _with_true_names(tree: Expression, values: Sequence[str], recipe: Recipe) -> Expression:
    """The expression over the source's own columns in place of c0, c1, …: numbers as DOUBLE, text as VARCHAR."""
    root = exp.Tuple(expressions=[tree])
    own = {f"c{i}": name for i, name in enumerate(values)}
    types = {"number": "double", "text": "varchar"}
    for column in list(root.find_all(exp.Column)):
        if not column.table:
            name = own[column.name]
            kind = types.get(recipe.kinds[name])
            column.replace(exp.cast(_true(name), kind) if kind else _true(name))
    out: Expression = root.expressions[0]
    return out


def _table(name: str, dialect: str) -> exp.Table:
    """A table from its name as it is written in the dialect, dots and quotes included. Raises ConfigError for what is none."""
    wrong = ConfigError(f"{name!r} is not the name of a table in {dialect}", code="table_name", hint="quote it as the dialect does")
    try:
        table = exp.to_table(name, dialect=dialect)
    except SqlglotError as error:
        raise wrong from error
    quoted = any(part.args.get("quoted") for part in table.parts)
    if not isinstance(table.this, exp.Identifier) or quoted and not any(quote in name for quote in '"`'):
        raise wrong  # sqlglot takes for one quoted name what it cannot read
    return table


def _staged(stages: Sequence[Stage], source: exp.Table, joins: Sequence[exp.Join], dialect: str) -> exp.Select:
    """The stages as common table expressions, each over the one before; the first joins the modes, the prediction comes last."""
    rows: Expression = exp.alias_(source, _ROWS, table=True)
    handed: Expression = _star(_ROWS) if warehouse(dialect).except_ else named(exp.column(_ROWS), _ROW)
    parts: list[exp.CTE] = []
    for k, stage in enumerate(stages, start=1):
        select = exp.select(handed, *(named(node, name) for name, node in stage.items())).from_(rows)
        if k == 1:
            select.set("joins", list(joins))
        name = f"mlpipe_stage{k}"
        parts.append(exp.CTE(this=select, alias=exp.TableAlias(this=exp.to_identifier(name))))
        rows, handed = exp.to_table(name), _star(name)
    value = exp.column(_MEAN)
    there = exp.Not(this=exp.Is(this=exp.column(ETA), expression=exp.Null()))  # a CASE of a mean may take NULL for a large value
    predicted = named(case([(both([there, finite(value)]), value.copy())], None), "predicted")
    hidden = [name for stage in stages for name in stage]
    last = handed_on(dialect, rows.name, _ROW, hidden)
    statement = skeleton("scoring").select(last, predicted, append=False, copy=False).from_(rows, copy=False)
    statement.set("with_", exp.With(expressions=parts))
    return statement


def _star(table: str) -> exp.Column:
    return exp.Column(this=exp.Star(), table=exp.to_identifier(table))


def _head(fit: MixedFit, wanted: str, kind: str, source: str, prefix: str, ranef: Sequence[Joined]) -> list[str]:
    """What the statement says of itself."""
    lines = [f"{fit.formula}: {wanted} predictions on the scale of the {kind}", f"reads {source}"]
    if ranef:
        run = fit.written.get("run_id")
        tables = ", ".join(f"{prefix}_{one.table} ({one.group})" for one in ranef)
        lines.append(f"joins {tables}" + (f" of run {run}" if run else ""))
    return lines
