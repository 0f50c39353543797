"""Incremental fits: statistics of each partition, or a generalized model's rows in compressed form, are kept in a store, so that a run
reads only partitions that are new or changed.

Nothing is ever subtracted: what leaves is left out of the next merge (see `trees`). Levels, bases, shifts and scales are fixed when the
store is made; levels that appear later are added. The record holds, per partition, its name, mark, state and counts, those that a run
read that was stopped, and the last fits.
"""
from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from . import expr, statements
from .collect import causes, changed, collect, left_out
from .compressed import Compressed
from .design import bases, code
from .engines.arrange import Arranger
from .engines.base import Columns, Engine, fingerprint
from .engines.dialects import duckdb_family
from .errors import ConfigError, DataError, MlpipeError
from .features import Recipe
from .formula import parse, parse_expression
from .generalized_result import GeneralizedFit
from .keeping import kept, worthwhile
from .options import Options
from .partitions import Partition, is_text, partitions, read_as, together, typed, unchanged
from .passes import Estimates
from .planning import prepare, used_names
from .plans import Plan, Request
from .present import over_present
from .progress import stage
from .shelf import FORMAT, Shelf, named
from .sources import open_source, row_count
from .sql import Names
from .stats import SuffStats
from .trees import Node, statistics, tree

if TYPE_CHECKING:
    from .result import MixedFit

    State = SuffStats | Compressed

REBASE = "mlpipe run --rebase makes the store anew"


@dataclass(frozen=True)
class Settings:
    """What a store is for. `by`: "file" or a column; `window`: how many of the last partitions count, None for all; `vanished`: what to
    do about a partition that the source no longer has."""

    by: str = "file"
    window: int | None = None
    vanished: str = "error"


@dataclass
class Update:
    """A store brought up to date: the statistics of all its partitions (`info`: what a fit notes of them), where the last fit ended (None
    where that is no place to start), and the record to go on with."""

    shelf: Shelf
    record: dict[str, Any]
    stats: State
    tree: Node
    before: Estimates | None


def updated(shelf: Shelf, data: Any, request: Request, where: str | None, settings: Settings, rebase: bool = False) -> Update:
    """Brings a store up to date with its source and merges it; what was collected is committed even if a fit fails later.

    Raises ConfigError for a store of another model, DataError for a partition that vanished, changed its schema, or changed while it
    was read; errors of a partition name it.
    """
    model = _model(request, where, settings)
    there = shelf.record()
    held = None if rebase else there
    if held is not None:
        _check_model(held["model"], model, shelf.name)
    columns = used_names(parse(request.formula), request)
    found = partitions(data, settings.by, columns, request.options)
    before = {part["name"]: part for part in held["partitions"]} if held is not None else {}
    wanted, gone = _wanted(found, list(before), settings)
    record = held or _made(model, [part for part in found if part.name in wanted], request, settings.window)
    seconds, ran = dict[str, float](), list[str]()
    with _stopping(shelf, record, keep=there is held) as new:
        stay, resumed = _gathered(shelf, found, wanted, request, record, new, seconds, ran)
    dropped = [name for name in before if name not in stay]
    record = {**record, "partitions": list(stay.values()), "pending": []}
    record["inputs"] = record["inputs"] or _pooled(record["partitions"])
    leaves = [(part["name"], part["state"]) for part in record["partitions"] if part["state"] is not None]
    if not leaves:
        raise DataError("no partition has a row that can be used", code="no_rows")
    root = tree(leaves)
    record["merged"] = sorted(set(record["merged"]) & set(root.merged()))
    if new or resumed or dropped or held is None:
        _commit(shelf, record)
    stats = _merged(shelf, record, root, seconds, request)
    facts = {"total": len(stay), "read": [part["name"] for part in new], "resumed": resumed, "dropped": dropped, "vanished": gone}
    facts["replaced"] = [part["name"] for part in (*new, *map(stay.__getitem__, resumed)) if part["name"] in before]
    info = _info(record, new, facts, seconds) | {"sql": ran}
    if isinstance(stats, SuffStats):
        info |= {"path": "blocks", "blocks": stats.blocks.n_blocks if stats.blocks is not None else 0}
    return Update(shelf, record, replace(stats, info=info), root, _before(record, request, stats, root.state))


def finished(update: Update, fit: MixedFit) -> None:
    """Notes the drift in `fit.info`, and commits the fit as the next one's start. A fit of the same partitions again has the same drift."""
    record, se = update.record, np.sqrt(np.diag(fit.covariance)).tolist()
    kind = (fit.nagq,) if isinstance(fit, GeneralizedFit) else ()
    here = {
        "set": fingerprint(update.tree.state, fit.formula, fit.reml, *kind), "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "names": list(fit.names), "beta": fit.beta.tolist(), "se": se, "theta": fit.theta.tolist(), "singular": fit.singular,
        "state": update.tree.state, "tau": fit.tau if isinstance(fit, GeneralizedFit) else 0.0,
    }  # fmt: skip
    earlier = [one for one in record["fits"] if one["set"] != here["set"]]
    if earlier:
        fit.info["drift"] = drift(earlier[-1], here)
    record["fits"] = [*earlier[-1:], here]
    _commit(update.shelf, record)


def drift(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Each coefficient's change since an earlier fit, in standard errors of this one; `since`, `largest` and its `term`."""
    old = dict(zip(before["names"], before["beta"], strict=True))
    terms = [
        {"term": name, "previous": old[name], "estimate": beta, "std_error": se, "drift": (beta - old[name]) / se if se > 0 else 0.0}
        for name, beta, se in zip(now["names"], now["beta"], now["se"], strict=True)
        if name in old
    ]
    worst = max(terms, key=lambda one: abs(one["drift"]), default=None)
    names = {"added": [name for name in now["names"] if name not in old], "gone": [name for name in old if name not in now["names"]]}
    largest = {"largest": abs(worst["drift"]), "term": worst["term"]} if worst is not None else {"largest": 0.0, "term": None}
    return {"since": before["time"], **largest, **names, "terms": terms}


def told(fit: MixedFit) -> str:
    """What a run did to its store, and the drift since the fit before, as text."""
    store, lines = fit.info["store"], []
    words = {"by a run that was stopped": store["resumed"], "replaced": store["replaced"], "dropped": store["dropped"]}
    words |= {"vanished, kept": store["vanished"]}
    more = "".join(f", {len(names)} {word}" for word, names in words.items() if names)
    lines.append(f"Store: {store['total']} partitions, {len(store['read'])} read{more}")
    if found := fit.info.get("drift"):
        largest = f", at most {found['largest']:.2f} standard errors ({found['term']})" if found["term"] is not None else ""
        changed_names = [f"{word}: {', '.join(found[word])}" for word in ("added", "gone") if found[word]]
        lines.append(f"Drift since {found['since']}{largest}{''.join(f'; {text}' for text in changed_names)}")
    for label, moved in fit.info.get("input_drift", {}).items():
        beyond = ", beyond its range of then" if moved["outside"] else ""
        by = f"mean moved by {moved['shift']:+.2f} spreads, spread x {moved['spread']:.2f}"
        lines.append(f"Input {label}: {by} since the store was made{beyond}")
    return "\n".join(lines)


# -- what is wanted -----------------------------------------------------------------------------------------------------


def _model(request: Request, where: str | None, settings: Settings) -> dict[str, Any]:
    names = ("formula", "weights", "freq", "offset", "levels", "contrasts", "na", "family", "link", "trials")
    out = {name: getattr(request, name) for name in names}
    plain: dict[str, Any] = json.loads(json.dumps({**out, "where": where, "partition_by": settings.by}, default=str))
    return plain


def _check_model(held: dict[str, Any], model: dict[str, Any], name: str) -> None:
    for key, value in model.items():
        if held.get(key) != value:
            raise ConfigError(f"the store {name} was made with {key} = {held.get(key)!r}, not {value!r}", code="store_model", hint=REBASE)


def _wanted(found: Sequence[Partition], before: list[str], settings: Settings) -> tuple[list[str], list[str]]:
    """The partitions that count, in order, and those among them that the source no longer has."""
    names = [part.name for part in found]
    present = set(names)
    lost = [name for name in before if name not in present]
    if settings.vanished != "drop":
        after = dict(zip(before, before[1:], strict=False))
        for name in reversed(lost):  # each in its old place: before what came after it
            names.insert(names.index(after[name]) if name in after else len(names), name)
    names = names[-settings.window :] if settings.window else names
    gone = [name for name in names if name not in present]
    if gone and settings.vanished == "error":
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        hint = 'vanished = "drop" in [store] leaves it out, "keep" goes on with its statistics'
        raise DataError(f"the source no longer has the partition {gone[0]}{more}", code="partition_vanished", hint=hint)
    return names, gone


def _made(model: dict[str, Any], parts: Sequence[Partition], request: Request, window: int | None) -> dict[str, Any]:
    """The record of a new store: bases, shifts and scales, and whether rows are kept as cells, from all partitions that are there."""
    with closing(open_source(together(parts), options=request.options)) as engine:
        plan = prepare(engine, request)
        filtering = expr.columns(parse_expression(model["where"])) if model["where"] is not None else ()
        types = {name: engine.schema()[name].name for name in dict.fromkeys([*plan.recipe.kinds, *filtering])}
        merges = request.family is None or worthwhile(plan, len(parts), window)
    recipe = plan.recipe.to_json()
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "format": FORMAT, "made": made, "model": model, "recipe": recipe, "types": types, "inputs": {}, "partitions": [], "pending": [],
        "merged": [], "fits": [], "merges": merges,
    }  # fmt: skip


@contextmanager
def _stopping(shelf: Shelf, record: dict[str, Any], *, keep: bool) -> Iterator[list[dict[str, Any]]]:
    """The partitions that are read within, which the record keeps as `pending` where the work is stopped: they are of no fit before all
    others have been read, and need not be read again. `keep`: not where the record is another one's successor."""
    new: list[dict[str, Any]] = []
    try:
        yield new
    except BaseException:
        if new and keep:
            with suppress(MlpipeError):  # what stopped the work is what is told
                _commit(shelf, {**record, "pending": list(({part["name"]: part for part in (*record.get("pending", ()), *new)}).values())})
        raise


def _gathered(
    shelf: Shelf, found: Sequence[Partition], wanted: Sequence[str], request: Request, record: dict[str, Any], new: list[dict[str, Any]],
    seconds: dict[str, float], ran: list[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What is noted of each partition that counts, and the names of those that a run read that was stopped; what has to be read is, and
    joins `new`."""
    base = Recipe.from_json(record["recipe"])
    before, pending = ({part["name"]: part for part in record.get(key, ())} for key in ("partitions", "pending"))
    listed, stay, resumed = {part.name: part for part in found}, dict[str, dict[str, Any]](), list[str]()
    for name in wanted:
        part = listed.get(name)
        if part is None or (name in before and before[name]["mark"] == part.mark):
            stay[name] = before[name]
        elif name in pending and pending[name]["mark"] == part.mark:
            stay[name] = pending[name]
            resumed.append(name)
        else:
            stay[name] = _collected(shelf, part, request, base, record, seconds, ran)
            new.append(stay[name])
    return stay, resumed


# -- one partition ------------------------------------------------------------------------------------------------------


def _collected(
    shelf: Shelf, part: Partition, request: Request, base: Recipe, record: dict[str, Any], seconds: dict[str, float], ran: list[str]
) -> dict[str, Any]:
    """Reads one partition in the shape of the store and saves its state; `ran` becomes its statements. Errors name the partition."""
    kind = () if record.get("merges", True) else ("rows",)
    recipe = json.dumps(record["recipe"], sort_keys=True, default=str)
    state = fingerprint(recipe, json.dumps(record["model"]), part.name, part.mark, *kind)
    try:
        with closing(_opened(part, record["types"], request.options)) as engine:
            _check_schema(engine, base, record["types"])
            stats, facts = _read(engine, request, base, merges=record.get("merges", True))
            ran[:] = engine.ran
        if not unchanged(part) or (part.rows is not None and facts["rows_read"] != part.rows):
            raise changed()
    except MlpipeError as error:
        error.message = f"partition {part.name}: {error.message}"
        raise
    if stats is not None:
        for name, taken in stats.info["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + taken
        shelf.save(state, stats)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    head = {"name": part.name, "mark": part.mark, "state": state if stats is not None else None, "bytes": part.bytes, "time": time}
    return {**head, **facts}


def _opened(part: Partition, types: dict[str, str], options: Options) -> Engine:
    """The rows of a partition. A column of a CSV or JSON file without any value, which looks like text, has the store's type."""
    data = typed(part.data, types)
    engine = open_source(data, options=options)
    try:
        empty = _valueless(engine, types) if part.bytes is not None and is_text(data) else {}
    except BaseException:
        engine.close()
        raise
    if not empty:
        return engine
    engine.close()
    return open_source(read_as(data, empty), options=options)


def _valueless(engine: Engine, types: dict[str, str]) -> dict[str, str]:
    """The store's types of columns that are text here, and have no value."""
    schema = engine.schema()
    names = Names.of(schema)
    text = [name for name in types if name in schema and schema[name].kind == "text"]
    found = [name for name in text if not _alike("VARCHAR", types[name], key=False)]
    if not found:
        return {}
    read = Columns(values=frozenset(names.positions[name] for name in found))
    row = engine.query(statements.missing(found, (), {}, names), read).read_all().to_pylist()[0]
    return {name: types[name] for k, name in enumerate(found) if int(row[f"missing_{k}"] or 0) == int(row["row_count"])}


def _read(engine: Engine, request: Request, base: Recipe, *, merges: bool) -> tuple[State | None, dict[str, Any]]:
    """The statistics of one partition, None where it has no usable row, and what is noted of it."""
    counts = {"rows": 0, "rows_read": 0, "rows_dropped": 0, "dropped": {}, "passes": 0}
    nothing = {**counts, "notes": [], "engine": engine.dialect, "inputs": {}}
    plan = None
    schema = engine.schema()
    try:
        if untyped := [name for name, kind in base.kinds.items() if schema[name].kind != kind]:
            raise DataError(f"the column {untyped[0]!r} has no values", code="no_rows", column=untyped[0])
        plan = prepare(engine, request, like=base)
        stats = collect(plan) if request.family is None else kept(plan, merges=merges)
    except DataError as error:
        if error.code not in ("empty", "no_rows") or (error.code == "no_rows" and request.na == "raise"):
            raise
        if error.code == "empty" and plan is None:
            return None, nothing
        total = row_count(engine if plan is None else plan.engine)
        look = Plan(engine, request, base, Names.of(schema, base.kinds), "none")
        dropped = left_out(look, causes(look)[()], total) if total else {}
        return None, {**nothing, "rows_read": total, "rows_dropped": total, "dropped": dropped, "passes": 1}
    facts = {name: stats.info[name] for name in ("rows_read", "rows_dropped", "dropped", "passes", "notes", "engine")}
    return stats, {"rows": stats.rows, **facts, "inputs": _inputs(plan)}


def _check_schema(engine: Engine, base: Recipe, types: dict[str, str]) -> None:
    """Raises DataError for a column that is gone or is of another kind than it was when the store was made."""
    schema = engine.schema()
    for name, was in types.items():
        if name not in schema:
            raise DataError(f"there is no column {name!r}", code="schema_changed", column=name, hint=REBASE)
        if not schema[name].untyped and not _alike(schema[name].name, was, key=name in base.keys):
            what = f"the column {name!r} is {schema[name].name}, it was {was} when the store was made"
            hint = f"write it as one type in all partitions (CSV and JSON: source.types); where all have changed, {REBASE}"
            raise DataError(what, code="schema_changed", column=name, hint=hint)


def _alike(kind: str, was: str, *, key: bool) -> bool:
    """Whether partitions with a column of these types add up: dates are numbers of days, timestamps of seconds; keys that are decimals,
    or times in a zone, are none of another type."""
    if duckdb_family(kind).name != duckdb_family(was).name:
        return False
    return not key or all((apart in kind) == (apart in was) for apart in ("DECIMAL", "WITH TIME ZONE"))


def _inputs(plan: Plan) -> dict[str, dict[str, float]]:
    """Count, mean, spread and range of what each data-dependent basis is computed from."""
    held = bases(plan.recipe.variables.values())
    if not held:
        return {}
    nodes = [variable.basis.argument for variable in held if variable.basis is not None]
    statement = statements.moments(nodes, plan.names, statements.usable(plan.recipe, plan.names))
    row = plan.engine.query(statement, plan.columns).read_all().to_pylist()[0]
    out = {}
    for k, node in enumerate(nodes):
        names = {"count": "count", "mean": "mean", "sd": "sd", "low": "min", "high": "max"}
        out[expr.label(node)] = {name: float(row[f"{key}_{k}"] or 0.0) for name, key in names.items()}
    return out


def _pooled(parts: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The moments of the inputs over all partitions."""
    held: dict[str, list[dict[str, float]]] = {}
    for part in parts:
        for label, moments in part["inputs"].items():
            held.setdefault(label, []).append(moments)
    return {label: _union(moments) for label, moments in held.items()}


def _union(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The moments of a union from those of its parts (Chan, Golub and LeVeque 1983, equation 1.5)."""
    count = math.fsum(part["count"] for part in parts)
    mean = math.fsum(part["count"] * part["mean"] for part in parts) / count
    squares = math.fsum((part["count"] - 1) * part["sd"] ** 2 + part["count"] * (part["mean"] - mean) ** 2 for part in parts)
    sd = math.sqrt(squares / (count - 1)) if count > 1 else 0.0
    return {"count": count, "mean": mean, "sd": sd, "low": min(p["low"] for p in parts), "high": max(p["high"] for p in parts)}


# -- all partitions -----------------------------------------------------------------------------------------------------


def _merged(shelf: Shelf, record: dict[str, Any], root: Node, seconds: dict[str, float], request: Request) -> State:
    """The statistics of all partitions; merged states that are new are named in the record.

    Rows that are kept as they are only stand side by side: no state but the partitions' own is kept of these.
    """
    merged = set(record["merged"])

    def save(state: str, stats: State) -> None:
        if record.get("merges", True):
            shelf.save(state, stats)
            merged.add(state)

    def both(left: State, right: State) -> State:
        if isinstance(left, SuffStats) and isinstance(right, SuffStats):
            return left + right
        assert isinstance(left, Compressed) and isinstance(right, Compressed)
        return left.merged(right, arrange)

    with stage("merge", seconds, None, request.options) as fields, Arranger(request.options) as arrange:
        before = len(merged)
        try:
            stats = statistics(root, merged.__contains__, shelf.load, save, both)
        except DataError as error:
            if error.code == "not_mergeable":
                error.hint = f"write the keys as one type in all partitions; where all have changed, {REBASE}"
            raise
        fields |= {"merges": len(merged) - before}
    record["merged"] = sorted(merged)
    return stats.present() if isinstance(stats, Compressed) else over_present(stats)


def _info(
    record: dict[str, Any], new: Sequence[dict[str, Any]], facts: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    """What a fit notes about the statistics it came from; `passes`: rows read by this run over the rows of all partitions."""
    parts = record["partitions"]
    dropped: dict[str, int] = {}
    for cause, count in ((cause, count) for part in parts for cause, count in part["dropped"].items()):
        dropped[cause] = dropped.get(cause, 0) + count
    total = sum(part["rows_read"] for part in parts)
    sizes = [part["bytes"] for part in new]
    info = {
        "rows_read": total, "rows_dropped": sum(part["rows_dropped"] for part in parts), "dropped": dropped,
        "seconds": seconds,
        "passes": sum(part["passes"] * part["rows_read"] for part in new) / total if total else 0.0,
        "notes": list(dict.fromkeys(f"{part['name']}: {note}" for part in new for note in part["notes"])),
        "engine": parts[-1]["engine"], "fingerprint": fingerprint(*((part["name"], part["mark"]) for part in parts)),
        "rescannable": False, "bytes": None if None in sizes else sum(sizes), "store": {"made": record["made"], **facts},
    }  # fmt: skip
    if record["inputs"]:
        info["input_drift"] = _input_drift(record["inputs"], _pooled(parts))
    return info


def _input_drift(made: dict[str, dict[str, float]], now: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """How far the inputs of the fixed bases have moved since the store was made: `shift` in spreads of then, `spread` as a ratio,
    `outside`: whether values lie beyond the range of then."""
    out = {}
    for label, then in made.items():
        at = now.get(label, then)
        unit = then["sd"] or 1.0
        outside = at["low"] < then["low"] or at["high"] > then["high"]
        out[label] = {"shift": (at["mean"] - then["mean"]) / unit, "spread": at["sd"] / unit, "outside": outside}
    return out


def _before(record: dict[str, Any], request: Request, stats: State, state: str) -> Estimates | None:
    """Where the last fit ended, if the model still has the same variance parameters and no boundary holds them.

    In their last digits a generalized model's estimates depend on where the search began: that of the same partitions begins where it
    began before, so that a run that is made again ends as the first one did.
    """
    fits = [one for one in record["fits"] if request.family is None or one.get("state") != state]
    if not fits or fits[-1]["singular"]:
        return None
    last = fits[-1]
    sizes = [len(code(bar.terms, stats.recipe.variables)) for bar in parse(request.formula).random]
    if len(last["theta"]) != sum(q * (q + 1) // 2 for q in sizes):
        return None
    return Estimates(tuple(last["names"]), np.array(last["beta"]), last["theta"], last.get("tau", 0.0))


def _commit(shelf: Shelf, record: dict[str, Any]) -> None:
    shelf.commit(record, named(record))
