"""Plan -> statistics: the passes over the rows, and the proof that all of them saw the same rows."""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import numpy as np

from . import expr, statements
from .arrays import column
from .blocks import Blocks, Clusters, Collector, with_key_names
from .design import Atom
from .engines.base import Columns
from .errors import DataError
from .features import Recipe
from .formula import parse_expression
from .looks import shift_and_scale
from .options import Options
from .planning import prepare, settle
from .plans import Plan, Request, key_types
from .progress import stage
from .sources import row_count
from .sql import Expression, Names
from .stats import SuffStats

FAR = 100.0  # true mean, in spreads, beyond which a pass is repeated with the true shift
OFF_SCALE = 1e4  # true spread over assumed spread beyond which it is repeated
# bytes that a group, each of its keys and each of its sums take in an engine's table, as measured on DuckDB
GROUP_BYTES, KEY_BYTES, SUM_BYTES = 32, 16, 16
SPARED = 16  # times an engine's room that a table with a group for every row may take before groups are counted
UNLIMITED = 4  # times these that an engine without a memory limit takes
MOST_PARTS = 32  # beyond which the parts spill
MORE_RANGES = 1  # than parts by hash take the same time: a table addressed by the key saves a quarter, which is a scan or more


def collect(plan: Plan) -> SuffStats:
    """The statistics of a plan. Blocks above a quarter of the memory limit go to a mapped file that lives as long as they do.

    Raises DataError: no usable rows, non-finite values, negative weights, rows dropped under na="raise", a source that
    changed between the passes.
    """
    return collected(plan)[0]


def collected(plan: Plan) -> tuple[SuffStats, Plan]:
    """Runs the plan's passes; the plan comes back with what these told of its columns. Raises as `collect`."""
    seconds: dict[str, float] = {}
    engine, options = plan.engine, plan.request.options
    total = row_count(plan.engine)
    with stage("cross_products", seconds, engine, options, rows=total) as fields:
        (gram, rows, n, sum_log_w), plan, scans = _gram(plan)
        dropped = dropped_rows(plan, total, rows)
        fields |= {"rows": rows, "dropped": total - rows}
    if far := _far_off(plan.recipe, gram):
        note = "the sample was not representative: the pass was repeated with the true shifts and scales"
        plan = replace(plan, recipe=far, notes=[*plan.notes, note])
        with stage("cross_products_again", seconds, engine, options, rows=total):
            (gram, rows, n, sum_log_w), plan, more = _gram(plan)
        scans += more
    plan = replace(plan, names=plan.names.known(complete=rows == total))
    blocks: Blocks | None = None
    parts: Sequence[Expression | None] = ()
    several = None
    if plan.path == "crossed":
        from .crossing import crossed

        with stage("cells", seconds, engine, options, rows=total) as fields:
            several = crossed(plan, rows)
            _reconcile(plan, gram, [factor.sums.sum(axis=1) for factor in several.factors])
            fields |= {"levels": [len(factor.levels) for factor in several.factors]}
        parts = (None,)
    elif plan.path != "none":
        with stage("blocks", seconds, engine, options, rows=total) as fields, _limited(plan, rows) as limited:
            parts = parts_of(limited, rows)
            blocks = _blocks(limited, parts)
            _reconcile(plan, gram, [blocks.totals()])
            fields |= {"blocks": blocks.n_blocks}
    plan.engine.check_unchanged()
    info = {
        "rows_read": total,
        "rows_dropped": total - rows,
        "dropped": dropped,
        "blocks": blocks.n_blocks if blocks else 0,
        "passes": scans + len(parts),
        "seconds": seconds,
        "notes": list(plan.notes),
        "path": plan.path,
        "engine": plan.engine.dialect,
        "key_types": key_types(plan),
        "sql": plan.engine.ran,
    }
    return SuffStats(plan.recipe, rows, n, sum_log_w, gram, blocks, plan.request.collect, info, several), plan


def collect_like(stats: SuffStats, data: Any, options: Options | None = None) -> SuffStats:
    """Statistics of other rows in the shape of `stats`: same bases, shifts and scales; new levels are added."""
    from .sources import open_source

    if stats.collect == "fit":
        raise DataError("the second level of compression does not merge", code="not_mergeable", hint='collect with collect="blocks"')
    recipe = stats.recipe
    options = options or Options()
    request = Request(
        recipe.formula.text,
        weights=recipe.weights,
        freq=recipe.freq,
        offset=recipe.offset,
        contrasts=recipe.contrasts,
        responses=recipe.extra_responses,
        collect=stats.collect,
        options=options,
    )
    with closing(open_source(data, options=options)) as engine:
        return collect(prepare(engine, request, like=recipe))


class _Sums(NamedTuple):
    """Cross-products of all features, rows, rows with frequencies, sum of log weights."""

    gram: np.ndarray
    rows: int
    n: float
    sum_log_w: float

    @property
    def finite(self) -> bool:
        """Whether nothing in the rows was missing or infinite, or became so."""
        return bool(np.isfinite(self.gram).all()) and math.isfinite(self.n) and math.isfinite(self.sum_log_w)


def _gram(plan: Plan) -> tuple[_Sums, Plan, int]:
    """The sums of the first pass, the plan with what they told of its columns, and the number of passes; raises where they are not
    finite."""
    found, passes = _summed(plan), 1
    if plan.presumed is not None and not found.finite:  # there was a NaN, or an infinity, after all
        plan = replace(plan, presumed=None)
        found, passes = _summed(plan), 2
    if found.rows == 0:
        raise none_usable(causes(plan)[()], row_count(plan.engine))
    if not found.finite:
        raise not_finite(plan)
    return found, replace(plan, names=plan.first_names, presumed=None), passes


def _summed(plan: Plan) -> _Sums:
    return _streamed_gram(plan) if plan.wide else _summed_gram(plan)


def _summed_gram(plan: Plan) -> _Sums:
    row = plan.engine.query(statements.cross_products(plan.recipe, plan.first_names), plan.columns).read_all().to_pylist()[0]
    size = len(plan.recipe.features)
    gram = np.zeros((size, size))
    for i, j in combinations_with_replacement(range(size), 2):
        gram[i, j] = gram[j, i] = row[f"g_{i}_{j}"] or 0.0
    rows = int(row["row_count"])
    return _Sums(gram, rows, float(row["n"] or 0.0) if "n" in row else float(rows), float(row.get("sum_log_w") or 0.0))


def _streamed_gram(plan: Plan) -> _Sums:
    """The same by BLAS on batches of rows, for many features."""
    recipe = plan.recipe
    gram = np.zeros((len(recipe.features),) * 2)
    rows, n, sum_log_w = 0, 0.0, 0.0
    for batch in plan.engine.query(statements.used_rows(recipe, plan.first_names, keys=False), plan.columns):
        if not batch.num_rows:
            continue
        X = np.empty((len(recipe.features), batch.num_rows))
        for i, monomial in enumerate(recipe.features):
            X[i] = column(batch, f"f{i}") if monomial else 1.0
        weight = {name: column(batch, name) for name in statements.weight_columns(recipe)}
        q = weight.get("q", np.ones(1))
        gram += X @ (X * (q * weight.get("w", np.ones(1)))).T
        rows += batch.num_rows
        n += float(q.sum()) if "q" in weight else batch.num_rows
        sum_log_w += float((q * np.log(weight["w"])).sum()) if "w" in weight else 0.0
    return _Sums((gram + gram.T) / 2, rows, n, sum_log_w)


def dropped_rows(plan: Plan, total: int, rows: int) -> dict[str, int]:
    """Why rows were left out; raises for infinite values, negative weights, and any missing value under na="raise"."""
    if rows == total:
        return {}
    if rows > total:
        raise changed()
    return left_out(plan, causes(plan)[()], total - rows)


Causes = dict[str, dict[str, int]]  # rows by column: "missing", "infinite"; by weight: "zero", "negative"


def causes(plan: Plan, by: Sequence[str] = ()) -> dict[tuple[Any, ...], Causes]:
    """Why rows are left out, per value of the keys `by`."""
    recipe, keys = plan.recipe, [plan.names.key(name).name for name in by]
    raw, weights = statements.raw_columns(recipe), statements.weight_columns(recipe)
    statement = statements.missing(raw, recipe.keys, weights, plan.names, by)
    named = [(kind, f"{kind}_{k}", name) for kind in ("missing", "infinite") for k, name in enumerate(raw)]
    named += [("missing", f"key_{k}", name) for k, name in enumerate(recipe.keys)]
    named += [("infinite", f"infinite_key_{k}", name) for k, name in enumerate(recipe.keys)]
    named += [(kind, f"{kind}_{name}", text) for kind in ("zero", "negative") for name, text in weights.items()]
    found: dict[tuple[Any, ...], Causes] = {}
    for row in plan.engine.query(statement, plan.columns).read_all().to_pylist():
        out = found[tuple(row[key] for key in keys)] = {kind: {} for kind in ("missing", "infinite", "zero", "negative")}
        for kind, field, name in named:
            if row.get(field):
                out[kind][name] = max(int(row[field]), out[kind].get(name, 0))
    return found


def left_out(plan: Plan, found: Causes, count: int) -> dict[str, int]:
    """What the `count` rows that do not enter a fit lack; raises as `dropped_rows`."""
    _refuse_bad_values(found)
    if plan.request.na == "raise" and found["missing"]:
        what = f"{count:,} rows have missing values: {_described(found)}"
        raise DataError(what, code="missing_values", column=next(iter(found["missing"])))
    return {**found["missing"], **{f"weight 0 in {plan.recipe.weights or plan.recipe.freq}": n for n in found["zero"].values()}}


def none_usable(found: Causes, total: int) -> DataError:
    """The error where no row enters a fit; raises the one for values that are refused in any case."""
    _refuse_bad_values(found)
    missing = found["missing"]
    what = f"none of the {total:,} rows can be used: {_described(found)}" if total else "there are no rows"
    return DataError(what, code="no_rows", column=max(missing, key=lambda name: missing[name]) if missing else None)


def _described(found: Causes) -> str:
    parts = [f"{name!r} is missing in {n:,}" for name, n in found["missing"].items()]
    parts += [f"the weight {name!r} is 0 in {n:,}" for name, n in found["zero"].items()]
    return ", ".join(parts) or "the source changed while it was read"


def _refuse_bad_values(found: Causes) -> None:
    for name, count in found["infinite"].items():
        hint = "replace them with null to drop them"
        raise DataError(f"the column {name!r} is infinite in {count:,} rows", code="infinite_values", column=name, hint=hint)
    for name, count in found["negative"].items():
        raise DataError(f"the weight {name!r} is negative in {count:,} rows", code="negative_weights", column=name)


def not_finite(plan: Plan) -> DataError:
    """The error for sums that are not finite although every raw value is: the term, how many rows, a value."""
    recipe = plan.recipe
    nodes = [node for v in recipe.variables.values() if v.kind == "numeric" for node in v.columns]
    nodes += [parse_expression(text) for text in statements.weight_columns(recipe).values()]
    for node in nodes:
        row = plan.engine.query(statements.offenders(node, recipe, plan.names), plan.columns).read_all().to_pylist()[0]
        if row["row_count"]:
            columns = [name for name in expr.columns(node) if plan.names.kinds[name] == "number"]
            values = ", ".join(f"{name} = {row[f'v_{k}']:g}" for k, name in enumerate(columns))
            return DataError(
                f"{expr.label(node)} is not finite in {int(row['row_count']):,} rows, such as {values}",
                code="not_finite",
                column=columns[0] if columns else None,
            )
    return DataError("the sums overflow: some values are too large to be squared", code="overflow", hint="rescale the columns")


def _far_off(recipe: Recipe, gram: np.ndarray) -> Recipe | None:
    """The recipe with true shifts and scales where the sample's were off by more than FAR spreads or OFF_SCALE."""
    position = {feature: i for i, feature in enumerate(recipe.features)}
    if () not in position:
        return None
    scalings, moved = dict(recipe.coordinates.scalings), False
    constant = position[()]
    for feature, i in position.items():
        if len(feature) != 1 or feature[0] not in scalings:
            continue
        mean = gram[constant, i] / gram[constant, constant]
        sd = math.sqrt(max(gram[i, i] / gram[constant, constant] - mean**2, 0.0))
        if sd > 0 and (abs(mean) > FAR * sd or not 1 / OFF_SCALE < sd < OFF_SCALE):
            shift, scale = scalings[feature[0]]
            true_mean, true_sd = shift + scale * mean, scale * sd
            new = shift_and_scale(true_mean, true_sd, whole=False, largest=abs(true_mean) + true_sd)
            if abs(new[0] - shift) > FAR / 10 * true_sd or not 1 / OFF_SCALE < new[1] / scale < OFF_SCALE:
                scalings[feature[0]], moved = new, True
    if not moved:
        return None
    return rescaled(recipe, scalings)


def rescaled(recipe: Recipe, scalings: dict[Atom, tuple[float, float]]) -> Recipe:
    """The recipe with other shifts and scales, over the features that these need."""
    responses = {label: recipe.variables[label] for label in recipe.responses}
    variables = {label: v for label, v in recipe.variables.items() if label not in responses}
    coordinates = replace(recipe.coordinates, scalings=scalings)
    return settle(recipe, variables, responses, coordinates, "blocks")


def _width(plan: Plan) -> int:
    return GROUP_BYTES + KEY_BYTES * len(plan.recipe.groups) + SUM_BYTES * plan.sums_per_block


def _key_positions(plan: Plan) -> list[int]:
    return [plan.names.positions[name] for name in plan.recipe.groups]


@contextmanager
def _limited(plan: Plan, rows: int) -> Iterator[Plan]:
    """The plan; where its engine cannot keep the table of the blocks within the memory limit, over a copy of the rows in DuckDB."""
    recipe, limit = plan.recipe, plan.request.options.engine_bytes
    width = UNLIMITED * _width(plan)
    if plan.engine.spills or rows * width <= limit or (keys := plan.engine.key_count(_key_positions(plan))) * width <= limit:
        yield plan
        return
    from .sources import open_source

    plan.notes.append(f"about {keys:,} groups exceed the memory limit in {plan.engine.dialect}: DuckDB summed them, from a copy on disk")
    names = Names({name: i for i, name in enumerate(recipe.kinds)}, recipe.kinds, finite=plan.names.finite)
    columns = Columns(plan.columns.values, frozenset(plan.names.positions[name] for name in recipe.kinds))
    copied = plan.engine.query(statements.raw_rows(recipe, plan.names), columns)
    with closing(open_source(copied, options=plan.request.options)) as engine:
        yield replace(plan, engine=engine, names=names)


def parts_of(plan: Plan, rows: int) -> Sequence[Expression | None]:
    """The parts by key in which the blocks are summed, each small enough for the engine's memory; (None,) for all at once."""
    width, positions = _width(plan), _key_positions(plan)
    room = plan.engine.table_room()
    if room is None or rows * width <= SPARED * room:
        return (None,)
    ranges = plan.engine.key_ranges(plan.grouped(), plan.columns, positions[0], rows) if len(positions) == 1 else []
    if not 0 < len(ranges) <= 1 + MORE_RANGES:  # else there is no need of a count
        keys = plan.engine.key_count(positions)
        count = min(max(1, -(-keys * width // room)), MOST_PARTS)
        if not 0 < len(ranges) <= count + MORE_RANGES:
            return _noted(plan, statements.by_hash(plan.recipe, plan.names, count), f"of about {keys:,} groups")
    return _noted(plan, statements.by_range(plan.recipe, plan.names, ranges), f"by range of {plan.recipe.groups[0]!r}")


def _noted(plan: Plan, parts: Sequence[Expression], how: str) -> Sequence[Expression | None]:
    if len(parts) == 1:
        return (None,)
    plan.notes.append(f"the groups do not fit the engine's memory at once: they were summed in {len(parts)} parts {how}, one pass each")
    return parts


def _blocks(plan: Plan, parts: Sequence[Expression | None]) -> Blocks:
    recipe = plan.recipe
    pairs = recipe.pairs()
    names = [f"s{k}" for k in range(len(pairs))]
    if plan.path == "second level":
        return _second_level(plan, names, parts)
    shared = [k for k, (_, j) in enumerate(pairs) if j in recipe.z]
    options, rest = plan.request.options, statements.rest_names(recipe) if plan.whole else ()
    keys = [plan.names.key(group).name for group in recipe.groups]
    budget, parent = options.memory_bytes // 4, options.temp_directory
    collector = Collector(names, shared, keep_keys=plan.request.collect != "fit", budget=budget, parent=parent, rest=rest)
    for part in parts:
        for batch in plan.engine.query(plan.grouped(part), plan.columns):
            collector.add(with_key_names(batch, keys))
    return collector.finish()


def _second_level(plan: Plan, names: list[str], parts: Sequence[Expression | None]) -> Blocks:
    tables = [plan.engine.query(plan.grouped(part), plan.columns).read_all() for part in parts]
    whole = Blocks(names)
    sizes = np.array(sorted({float(rows) for table in tables for rows in column(table, "row_count")}))
    size = len(names)
    whole.clusters = Clusters(np.zeros(len(sizes)), np.zeros((size, len(sizes))), np.zeros((len(sizes), size, size)))
    for table in tables:
        held = {name: column(table, name).astype(float) for name in table.column_names}
        products = np.empty((len(table), size, size))
        for k, j in combinations_with_replacement(range(size), 2):
            products[:, k, j] = products[:, j, k] = held[f"p_{k}_{j}"]
        clusters = Clusters(held["block_count"], np.stack([held[f"t_{k}"] for k in range(size)]), products)
        whole.clusters.add(clusters, np.searchsorted(sizes, held["row_count"]), len(sizes))
    whole.n_blocks = int(whole.clusters.count.sum())
    whole.largest, whole.smallest = float(sizes.max(initial=0)), float(sizes.min(initial=math.inf))
    return whole


def _reconcile(plan: Plan, gram: np.ndarray, totals: list[np.ndarray]) -> None:
    """Every scan saw the same rows: each factor's sums add up to the ungrouped ones."""
    pairs = [*plan.recipe.pairs(), *(plan.recipe.rest() if plan.whole else ())]
    for sums in totals:
        for total, (a, j) in zip(sums[: len(pairs)], pairs, strict=True):
            size = math.sqrt(gram[a, a] * gram[j, j]) + 1.0
            if not abs(total - gram[a, j]) <= 1e-9 * size:
                raise changed()


def changed() -> DataError:
    """The error for scans of one fit that did not see the same rows."""
    return DataError("the source changed while it was read", code="source_changed", hint="fit a snapshot of it")

