"""Result tables: what is written of one fit, or of many, each row with its run, its model and the values it is for."""
from __future__ import annotations

import datetime
import hashlib
import json
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from .result import MixedFit

LONGEST = 100  # characters of a factor's name in a table's
LIBRARIES = ("numpy", "scipy", "pyarrow", "duckdb", "polars", "sqlglot")


@dataclass(frozen=True)
class Entry:
    """What is written of one fit: its `model`'s name, `by` (the values it is for), the `fit`, or the `message` of why there is none;
    `record`: the fit as JSON text where the tables must hold it."""

    model: str
    fit: MixedFit | None
    by: Mapping[str, Any] = field(default_factory=dict)
    message: str | None = None
    record: str | None = None


def result_tables(entries: Sequence[Entry], by: pa.Schema | None, prefix: str, run: str, ranef: bool) -> dict[str, pa.Table]:
    """The tables of a run, by full name. `by`: the types of the entries' values."""
    import pyarrow as pa

    parts: dict[str, list[pa.Table]] = {}
    for entry in entries:
        for name, table in _tables(entry, ranef).items():
            parts.setdefault(name, []).append(_stamped(table, run, entry, by))
    return {f"{prefix}_{name}": pa.concat_tables(tables, promote_options="permissive").combine_chunks() for name, tables in parts.items()}


def _tables(entry: Entry, ranef: bool) -> dict[str, pa.Table]:
    fit = entry.fit
    if fit is None:
        return {"fit": _head(entry), "manifest": _manifest(entry)}
    tables = {"fit": _head(entry), "coef": fit.tidy(), "varcomp": fit.varcorr(), "manifest": _manifest(entry)}
    if found := fit.info.get("drift"):
        tables["drift"] = _drift(found)
    if ranef and (fit.source is not None or fit.effects_table is not None or fit.effects_tables):
        from . import effects

        for group, name in factor_names(fit.groups).items():
            tables[f"ranef_{name}"] = effects.ranef(fit, wide=True, stream=False, group=group)
    return tables


def _head(entry: Entry) -> pa.Table:
    import pyarrow as pa

    from . import __version__

    fit = entry.fit
    facts = fit.facts() if fit is not None else {}
    text, real, whole, logical = pa.string(), pa.float64(), pa.int64(), pa.bool_()
    return _row({
        "formula": (fit.formula if fit is not None else None, text),
        "family": (fit.family if fit is not None else None, text),
        "nobs": (facts.get("nobs"), real),
        "n_dropped": (facts.get("n_dropped"), whole),
        "loglik": (facts.get("loglik"), real),
        "converged": (facts.get("converged", False), logical),
        "singular": (facts.get("singular"), logical),
        "message": (fit.message if fit is not None else entry.message, text),
        "seconds": (facts.get("seconds"), real),
        "started": (datetime.datetime.now(datetime.UTC), pa.timestamp("us", "UTC")),
        "source_fingerprint": (fit.info.get("fingerprint") if fit is not None else None, text),
        "version": (__version__, text),
    })  # fmt: skip


def _manifest(entry: Entry) -> pa.Table:
    """For audit: what was read, by what, and what it took. `peak_memory`: the process's largest resident memory so far, in bytes."""
    import pyarrow as pa

    info = entry.fit.info if entry.fit is not None else {}
    text, real, whole = pa.string(), pa.float64(), pa.int64()
    values: dict[str, tuple[Any, pa.DataType]] = {
        "rows_read": (info.get("rows_read"), whole),
        "rows_dropped": (info.get("rows_dropped"), whole),
        "passes": (info.get("passes"), real),
        "bytes": (info.get("bytes"), whole),
        "source_fingerprint": (info.get("fingerprint"), text),
        "seconds": (entry.fit.seconds if entry.fit is not None else None, real),
        "peak_memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), whole),
        "versions": (json.dumps(versions()), text),
        "info": (json.dumps(info, default=str), text),
    }
    if entry.record is not None:
        values["record"] = (entry.record, text)
    return _row(values)


def versions() -> dict[str, str]:
    """The versions of what computed a result: of ours, of Python and of the libraries that are loaded."""
    from . import __version__

    loaded = {name: str(getattr(sys.modules[name], "__version__", "")) for name in LIBRARIES if name in sys.modules}
    return {"mlpipe": __version__, "python": platform.python_version(), **loaded}


def _drift(found: Mapping[str, Any]) -> pa.Table:
    import pyarrow as pa

    reals = [(name, pa.float64()) for name in ("previous", "estimate", "std_error", "drift")]
    table = pa.Table.from_pylist(list(found["terms"]), schema=pa.schema([("term", pa.string()), *reals]))
    return table.append_column("since", pa.array([found["since"]] * len(table), pa.string()))


def _row(values: Mapping[str, tuple[Any, pa.DataType]]) -> pa.Table:
    """A table of one row, its types those of every other run's."""
    import pyarrow as pa

    return pa.table({name: pa.array([value], kind) for name, (value, kind) in values.items()})


def _stamped(table: pa.Table, run: str, entry: Entry, by: pa.Schema | None) -> pa.Table:
    import pyarrow as pa

    stamps = [("run_id", run, pa.string()), ("model", entry.model, pa.string())]
    stamps += [(name, entry.by[name], by.field(name).type) for name in entry.by] if by is not None else []
    table = table.rename_columns(written(table.column_names, entry.by))
    for name, value, kind in reversed(stamps):
        table = table.add_column(0, name, pa.array([value] * len(table), kind))
    return table


def written(names: Sequence[str], by: Sequence[str] | Mapping[str, Any] = ()) -> list[str]:
    """The names that columns get beside run_id, model and `by`: databases are blind to case, so one more underscore tells `x` from `X`."""
    taken, out = {"run_id", "model", *(name.lower() for name in by)}, []
    for name in names:
        while name.lower() in taken:
            name += "_"
        taken.add(name.lower())
        out.append(name)
    return out


def factor_names(groups: Sequence[str]) -> dict[str, str]:
    """The name of each grouping factor as a part of a table's, and of a file's; different ones for different factors.

    A plain name stands for itself, the keys of an interaction joined by two underscores. Where that could be another's (other characters,
    two underscores together), and where another differs by case alone, to which databases are blind, a digest of the true name follows.
    """
    out, taken = dict[str, str](), set[str]()
    for group in groups:
        keys = group.split(":")
        name = "".join(c if c.isalnum() or c == "_" else "_" for c in "__".join(keys))[:LONGEST]
        if name.split("__") != keys or name.lower() in taken:
            name += "-" + hashlib.blake2b(group.encode(), digest_size=4).hexdigest()
        taken.add(name.lower())
        out[group] = name
    return out


def reserved() -> set[str]:
    """The names that no column of values has which fits are for: those of the manifest's own columns."""
    return {"run_id", "model", "tables", "record", *_manifest(Entry("", None)).column_names}


def by_columns(manifest: pa.Table) -> list[str]:
    """The columns of a run's manifest that say which values its fits are for."""
    own = reserved()
    return [name for name in manifest.column_names if name not in own and manifest.column(name).null_count < len(manifest)]
