"""Fits on disk, as the same tables in one of two places: a directory, `runs/<run_id>/*.parquet` and `fit.json`, which is
replaced last and is the only commit point; or a DuckDB database, one transaction."""
from __future__ import annotations

import datetime
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .atomic import synced
from .errors import ConfigError, DataError, ResourceError, did_you_mean
from .features import Recipe
from .options import Options
from .result import LMMFit, MixedFit, RandomTerm

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "mlpipe.fit/1"
MODES = ("error", "overwrite", "append")
DATABASES = (".duckdb", ".db")
LOCK, UNFINISHED = ".lock", "fit.json.partial"
_PLAIN = (
    *("formula", "response", "reml", "sigma", "loglik", "nobs", "rows", "n_blocks"),
    *("converged", "singular", "score", "evaluations", "message", "seconds"),
)


def write(fit: MixedFit, target: Any, *, prefix: str, mode: str, run_id: str | None, ranef: bool) -> None:
    """Writes all or nothing. Raises ConfigError for a bad mode or an existing target, ResourceError where the disk fails."""
    if mode not in MODES:
        raise ConfigError(f"mode = {mode!r} is not one of {', '.join(MODES)}", hint=did_you_mean(mode, list(MODES)))
    run = run_id or _new_run_id()
    if not run or Path(run).name != run:
        raise ConfigError(f"run_id {run!r} cannot be a folder's name")
    if _is_database(target):
        _write_database(fit, target, _tables(fit, prefix, run, ranef), prefix, mode, run)
    else:
        _write_folder(fit, Path(target), prefix, mode, run, ranef)


def _is_database(target: Any) -> bool:
    """Whether a target is a DuckDB file or connection, and not a directory. Raises ConfigError for what is neither."""
    if isinstance(target, str | os.PathLike):
        path = Path(target)
        return path.suffix.lower() in DATABASES and not path.is_dir()
    if not (hasattr(target, "execute") and hasattr(target, "cursor")):
        raise ConfigError(f"{type(target).__name__} is neither a path nor a DuckDB connection", code="target")
    return True


def _write_database(fit: MixedFit, target: Any, tables: dict[str, pa.Table], prefix: str, mode: str, run: str) -> None:
    """The manifest also takes what a directory has in `fit.json`: the fit itself and the names of its tables."""
    import pyarrow as pa

    from .engines import target as database

    manifest = f"{prefix}_manifest"
    held = tables[manifest].append_column("tables", pa.array([list(tables)], pa.list_(pa.string())))
    tables[manifest] = held.append_column("record", pa.array([json.dumps(_record(fit))], pa.string()))
    database.write(target, tables, manifest, mode, run, fit.options or Options())


def _write_folder(fit: MixedFit, folder: Path, prefix: str, mode: str, run: str, ranef: bool) -> None:
    if not _is_ours(folder):
        raise ConfigError(f"{folder} exists and is no fit", code="target_exists", hint="choose another target")
    tables = _tables(fit, prefix, run, ranef)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _commit(fit, folder, tables, mode, run)
    except OSError as error:
        raise ResourceError(f"cannot write {folder}: {error.strerror or error}", code="not_writable") from error


def _is_ours(folder: Path) -> bool:
    """Whether a target is free, or holds a fit or what a job left that was killed before its first one was complete."""
    if not folder.is_dir():
        return not folder.exists()
    names = {path.name for path in folder.iterdir()}
    return not names or "fit.json" in names or (LOCK in names and names <= {LOCK, "runs", UNFINISHED})


def _commit(fit: MixedFit, folder: Path, tables: dict[str, pa.Table], mode: str, run: str) -> None:
    index = folder / "fit.json"
    old = json.loads(index.read_text()) if index.exists() else None
    if old is not None and mode == "error":
        raise ConfigError(f"{folder} already holds a fit", code="target_exists", hint='mode="overwrite" or "append"')
    kept = list(old["runs"]) if old is not None and mode == "append" else []
    if run in kept:
        raise ConfigError(f"{folder} already holds the run {run!r}", code="run_exists")
    fresh = folder / "runs" / run
    if fresh.exists():
        shutil.rmtree(fresh)
    try:
        _write_tables(fresh, tables)
        _replace(index, {**_record(fit), "run_id": run, "runs": [*kept, run]})
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for stale in (folder / "runs").iterdir():
        if stale.name not in (*kept, run):
            shutil.rmtree(stale, ignore_errors=True)


def _write_tables(folder: Path, tables: dict[str, pa.Table]) -> None:
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        pq.write_table(table, path, compression="zstd")
        synced(path)
    synced(folder)


def _replace(path: Path, record: dict[str, Any]) -> None:
    unfinished = path.with_name(UNFINISHED)
    with unfinished.open("w") as file:
        json.dump(record, file, allow_nan=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    synced(path.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time; the kernel releases the lock when its holder dies."""
    import fcntl

    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(f"another job is writing {folder}", code="locked", hint="try again when it is done") from error
        yield


def _new_run_id() -> str:
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"


def _tables(fit: MixedFit, prefix: str, run: str, ranef: bool) -> dict[str, pa.Table]:
    """The result tables, each row with run_id and model."""
    import pyarrow as pa

    from . import __version__

    info, glance = fit.info, fit.facts()
    text, real, whole, logical = pa.string(), pa.float64(), pa.int64(), pa.bool_()
    head = {
        "formula": (fit.formula, text),
        "family": (fit.family, text),
        "nobs": (glance["nobs"], real),
        "n_dropped": (glance["n_dropped"], whole),
        "loglik": (fit.loglik, real),
        "converged": (fit.converged, logical),
        "singular": (fit.singular, logical),
        "seconds": (fit.seconds, real),
        "started": (datetime.datetime.now(datetime.UTC), pa.timestamp("us", "UTC")),
        "source_fingerprint": (info.get("fingerprint"), text),
        "version": (__version__, text),
    }
    manifest = {name: (info.get(name), kind) for name, kind in (("rows_read", whole), ("rows_dropped", whole), ("passes", real))}
    manifest["info"] = (json.dumps(info, default=str), text)
    tables = {"fit": _row(head), "coef": fit.tidy(), "varcomp": fit.varcorr(), "manifest": _row(manifest)}
    if ranef and (fit.source is not None or fit.effects_table is not None or fit.effects_tables):
        from . import effects

        for group in fit.groups:
            tables[f"ranef_{_file_name(group)}"] = effects.ranef(fit, wide=True, stream=False, group=group)
    return {f"{prefix}_{name}": _stamped(table, run, fit.formula) for name, table in tables.items()}


def _file_name(group: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in group)


def _row(values: dict[str, tuple[Any, pa.DataType]]) -> pa.Table:
    """A table of one row, its types those of every other run's."""
    import pyarrow as pa

    return pa.table({name: pa.array([value], kind) for name, (value, kind) in values.items()})


def _stamped(table: pa.Table, run: str, model: str) -> pa.Table:
    import pyarrow as pa

    table = table.rename_columns(_written(table.column_names))
    for name, value in (("model", model), ("run_id", run)):
        table = table.add_column(0, name, pa.array([value] * len(table), pa.string()))
    return table


def _written(names: list[str]) -> list[str]:
    """The names that columns get beside run_id and model: databases are blind to case, so one more underscore tells `x` from `X`."""
    taken, out = {"run_id", "model"}, []
    for name in names:
        while name.lower() in taken:
            name += "_"
        taken.add(name.lower())
        out.append(name)
    return out


def _record(fit: MixedFit) -> dict[str, Any]:
    return {"format": FORMAT, "fit": to_json(fit)}


def to_json(fit: MixedFit) -> dict[str, Any]:
    """Everything of a fit but its data and BLUPs, as JSON values (floats by their shortest exact text)."""
    out: dict[str, Any] = {name: getattr(fit, name) for name in _PLAIN}
    out |= {"names": list(fit.names), "dropped": list(fit.dropped), "recipe": fit.recipe.to_json()}
    out |= {name: getattr(fit, name).tolist() for name in ("beta", "covariance", "gamma", "theta_covariance")}
    out["terms"] = [
        {f.name: v.tolist() if isinstance(v := getattr(term, f.name), np.ndarray) else v for f in fields(RandomTerm)} for term in fit.terms
    ]
    out |= {"kind": type(fit).__name__, "more": {name: getattr(fit, name) for name in fit.more}}
    out["info"] = json.loads(json.dumps(fit.info, default=str))
    return out


def load(target: Any, prefix: str) -> MixedFit:
    """See `mlpipe.load`."""
    return _load_database(target, prefix) if _is_database(target) else _load_folder(Path(target))


def _load_folder(folder: Path) -> MixedFit:
    import pyarrow.parquet as pq

    try:
        text = (folder / "fit.json").read_text()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"there is no fit in {folder}", code="file_not_found") from error
    record, fit = _read(text, str(folder))
    found = {path.stem: path for path in (folder / "runs" / str(record.get("run_id"))).glob("*_ranef_*.parquet")}
    _keep(fit, list(found), lambda name: pq.ParquetFile(found[name]).read())
    return fit


def _load_database(target: Any, prefix: str) -> MixedFit:
    """The last run's fit."""
    from .engines import target as database

    where = str(target) if isinstance(target, str | os.PathLike) else "the database"
    missing = DataError(f"there is no fit in {where}", code="file_not_found", hint=f"no run is listed in a table {prefix}_manifest")
    if isinstance(target, str | os.PathLike) and not Path(target).exists():
        raise missing
    with database.opened(target, Options(), read_only=True) as held:
        runs = held.runs(f"{prefix}_manifest")
        if not runs:
            raise missing
        _, fit = _read(runs[-1].record, where)
        found = [name for name in runs[-1].tables if name.startswith(f"{prefix}_ranef_")]
        _keep(fit, found, lambda name: held.rows(name, runs[-1].run_id))
    return fit


def holds_fit(target: str, prefix: str) -> bool:
    """Whether there is a fit at a path, which `write` in mode "error" would refuse to replace."""
    from .engines import target as database

    if not _is_database(target):
        return (Path(target) / "fit.json").exists()
    if not Path(target).exists():
        return False
    with database.opened(target, Options(), read_only=True) as held:
        return bool(held.runs(f"{prefix}_manifest"))


def _read(text: str, where: str) -> tuple[dict[str, Any], MixedFit]:
    """A fit from its JSON text, and the record around it. Raises DataError where it is none that this version can read."""
    try:
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise DataError(f"{where} was written by another version ({record['format']})", code="not_a_fit")
        return record, _from_json(record["fit"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where} does not hold a fit that this version can read", code="not_a_fit") from error


def _from_json(record: dict[str, Any]) -> MixedFit:
    def matrix(value: Any) -> np.ndarray:
        return np.array([[math.nan if x is None else x for x in row] for row in value], dtype=float)

    q = [len(term["names"]) for term in record["terms"]]
    terms = tuple(
        RandomTerm(t["group"], tuple(t["names"]), matrix(t["factor"]), matrix(t["Q"]).reshape(-1, k), matrix(t["R"]), matrix(t["star"]))
        for t, k in zip(record["terms"], q, strict=True)
    )
    p, t = len(record["names"]), len(record["theta_covariance"])
    return _kind(record["kind"])(
        **{name: record[name] for name in _PLAIN},
        recipe=Recipe.from_json(record["recipe"]),
        names=tuple(record["names"]),
        dropped=tuple(record["dropped"]),
        beta=np.array(record["beta"], dtype=float),
        covariance=matrix(record["covariance"]).reshape(p, p),
        gamma=np.array(record["gamma"], dtype=float),
        terms=terms,
        theta_covariance=matrix(record["theta_covariance"]).reshape(t, t),
        info=record["info"],
        **record["more"],
    )


def _kind(name: str) -> type[MixedFit]:
    """The class of fits of this name. Raises KeyError for another."""
    if name == LMMFit.__name__:
        return LMMFit
    from .generalized_result import GLMFit, GLMMFit

    return {GLMFit.__name__: GLMFit, GLMMFit.__name__: GLMMFit}[name]


def _keep(fit: MixedFit, names: list[str], read: Callable[[str], pa.Table]) -> None:
    """Gives the fit the BLUPs that were written with it, from the tables of these names."""
    from .effects import coefficient_names, key_names

    for group in fit.groups:
        name = next((name for name in names if name.endswith(f"_ranef_{_file_name(group)}")), None)
        if name is None:
            continue
        terms = [term for term in fit.terms if term.group == group]
        keys = next((groups for groups in fit.recipe.factors if ":".join(groups) == group), fit.recipe.groups)
        wanted = [*key_names(terms, keys), *(column for name in coefficient_names(terms) for column in (name, f"{name}_se"))]
        table = read(name).select(_written(wanted)).rename_columns(wanted)
        if fit.recipe.factors:
            fit.effects_tables[group] = table
        else:
            fit.effects_table = table
