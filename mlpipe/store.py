"""Fits on disk, as the same tables in one of two places: a directory, `runs/<run_id>/*.parquet` and `fit.json`, which is
replaced last and is the only commit point; or a DuckDB database, one transaction."""
from __future__ import annotations

import datetime
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .atomic import synced, writing
from .errors import ConfigError, DataError, ResourceError, did_you_mean
from .features import Recipe
from .options import Options
from .reduction import Spread
from .result import LMMFit, MixedFit, RandomTerm
from .tables import Entry, by_columns, factor_names, result_tables, written

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT, FORMATS = "mlpipe.fit/3", "mlpipe.fits/1"
MODES = ("error", "overwrite", "append")
DATABASES = (".duckdb", ".db")
SHOWN = 12  # fits that are named where several match
FIT, LOCK, UNFINISHED = "fit.json", ".lock", ".partial"
_PLAIN = (
    *("formula", "response", "reml", "sigma", "loglik", "nobs", "rows", "n_blocks"),
    *("converged", "singular", "score", "evaluations", "message", "seconds"),
)


def write(fit: MixedFit, target: Any, *, prefix: str, mode: str, run_id: str | None, ranef: bool) -> None:
    """Writes all or nothing. Raises ConfigError for a bad mode or an existing target, ResourceError where the disk fails."""
    record = json.dumps(_record(fit))
    options = fit.options or Options()
    write_all([Entry(fit.formula, fit)], None, target, prefix=prefix, mode=mode, run_id=run_id, ranef=ranef, record=record, options=options)


def write_all(
    entries: Sequence[Entry], by: pa.Schema | None, target: Any, *, prefix: str, mode: str, run_id: str | None, ranef: bool,
    record: str | None = None, options: Options | None = None
) -> None:
    """Writes the fits of a run, all or nothing; `by`: the types of the values they are for; `record`: of the only one, else the manifest
    holds each one's. Errors as of `write`."""
    if mode not in MODES:
        raise ConfigError(f"mode = {mode!r} is not one of {', '.join(MODES)}", hint=did_you_mean(mode, list(MODES)))
    target, run = placed(target), run_id or new_run_id()
    if not run or Path(run).name != run:
        raise ConfigError(f"run_id {run!r} cannot be a folder's name")
    database = _is_database(target)
    _check_prefix(prefix)
    if record is None or database:
        entries = [replace(one, record=json.dumps(_record(one.fit)) if one.fit is not None else None) for one in entries]

    def tables() -> dict[str, pa.Table]:
        return result_tables(entries, by, prefix, run, ranef)

    if database:
        _write_database(target, tables(), prefix, mode, run, options or Options())
    else:
        index = json.loads(record) if record is not None else {"format": FORMATS, "by": by.names if by is not None else []}
        _write_folder(index, Path(target), tables, prefix, mode, run)
    for one in entries:
        if one.fit is not None:
            one.fit.written = {"run_id": run, "model": one.model, **one.by}


def placed(target: Any) -> Any:
    """A target as it is meant, a path's `~` being the home directory."""
    return os.path.expanduser(target) if isinstance(target, str | os.PathLike) else target


def _check_prefix(prefix: str) -> None:
    """Raises ConfigError for one that names of files cannot begin with."""
    if "/" in prefix or "\0" in prefix:
        raise ConfigError(f"prefix = {prefix!r} cannot be the beginning of a file's name", code="prefix")


def _is_database(target: Any) -> bool:
    """Whether a target is a DuckDB file or connection, and not a directory. Raises ConfigError for what is neither."""
    if isinstance(target, str | os.PathLike):
        path = Path(target)
        return path.suffix.lower() in DATABASES and not path.is_dir()
    if not (hasattr(target, "execute") and hasattr(target, "cursor")):
        raise ConfigError(f"{type(target).__name__} is neither a path nor a DuckDB connection", code="target")
    return True


def _write_database(target: Any, tables: dict[str, pa.Table], prefix: str, mode: str, run: str, options: Options) -> None:
    """The manifest also takes what a directory has in `fit.json`: the fits themselves and the names of the tables."""
    import pyarrow as pa

    from .engines import target as database

    manifest = f"{prefix}_manifest"
    held = tables[manifest]
    tables[manifest] = held.append_column("tables", pa.array([list(tables)] * len(held), pa.list_(pa.string())))
    database.write(target, tables, manifest, mode, run, options)


def _write_folder(index: dict[str, Any], folder: Path, tables: Callable[[], dict[str, pa.Table]], prefix: str, mode: str, run: str) -> None:
    check_ours(folder, FIT, "fit")
    made = tables()

    def fill(fresh: Path) -> dict[str, Any]:
        _write_tables(fresh, made)
        return {**index, "prefix": prefix}

    write_run(folder, fill, index=FIT, what="fit", mode=mode, run=run)


def write_run(folder: Path, fill: Callable[[Path], dict[str, Any]], *, index: str, what: str, mode: str, run: str) -> None:
    """A run in a directory: `fill` writes its files, synced, into `runs/<run>`, and says what the file `index` holds, which is replaced
    last and is the only commit point. Earlier runs go then, but with mode "append".

    Raises ConfigError for a directory of other things and for a bad mode, ResourceError where the disk fails or another job writes.
    """
    check_ours(folder, index, what)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _commit(fill, folder, index, what, mode, run)


def check_ours(folder: Path, index: str, what: str) -> None:
    """Raises ConfigError unless a target is free, or holds runs or what a job left that was killed before its first one was complete."""
    if not folder.is_dir():
        free = not folder.exists()
    else:
        names = {path.name for path in folder.iterdir()}
        free = not names or index in names or (LOCK in names and names <= {LOCK, "runs", f"{index}{UNFINISHED}"})
    if not free:
        raise ConfigError(f"{folder} exists and is no {what}", code="target_exists", hint="choose another target")


def _commit(fill: Callable[[Path], dict[str, Any]], folder: Path, name: str, what: str, mode: str, run: str) -> None:
    index = folder / name
    if mode == "error" and index.exists():
        raise ConfigError(f"{folder} already holds a {what}", code="target_exists", hint='mode="overwrite" or "append"')
    kept = kept_runs(folder, name) if mode == "append" else []
    if run in kept:
        raise ConfigError(f"{folder} already holds the run {run!r}", code="run_exists")
    fresh = folder / "runs" / run
    if fresh.exists():
        shutil.rmtree(fresh)
    try:
        _replace(index, {**fill(fresh), "run_id": run, "runs": [*kept, run]})
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for stale in (folder / "runs").iterdir():
        if stale.name not in (*kept, run):
            shutil.rmtree(stale, ignore_errors=True)


def kept_runs(folder: Path, index: str = FIT) -> list[str]:
    """The runs that a directory holds, the last one last; none where it is new. Raises DataError where its index is damaged."""
    try:
        return [str(run) for run in json.loads((folder / index).read_bytes())["runs"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / index} is damaged", code="not_a_fit", hint='mode="overwrite" begins anew') from error


def _write_tables(folder: Path, tables: dict[str, pa.Table]) -> None:
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        pq.write_table(table, path, compression="zstd")
        synced(path)
    synced(folder)


def _replace(path: Path, record: dict[str, Any]) -> None:
    unfinished = path.with_name(f"{path.name}{UNFINISHED}")
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


def new_run_id() -> str:
    """The time, and what tells runs of one second apart."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"


def _record(fit: MixedFit) -> dict[str, Any]:
    return {"format": FORMAT, "fit": to_json(fit)}


def to_json(fit: MixedFit) -> dict[str, Any]:
    """Everything of a fit but its data and BLUPs, as JSON values (floats by their shortest exact text)."""
    out: dict[str, Any] = {name: getattr(fit, name) for name in _PLAIN}
    out |= {"names": list(fit.names), "dropped": list(fit.dropped), "recipe": fit.recipe.to_json()}
    out |= {name: getattr(fit, name).tolist() for name in ("beta", "gamma", "theta_covariance")}
    out["spread"] = {name: getattr(fit.spread, name).tolist() for name in ("Q", "R", "star")}
    out["terms"] = [
        {f.name: v.tolist() if isinstance(v := getattr(term, f.name), np.ndarray) else v for f in fields(RandomTerm)} for term in fit.terms
    ]
    more = {name: getattr(fit, name) for name in fit.more}
    out["more"] = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in more.items()}
    out["kind"] = type(fit).__name__
    out["info"] = json.loads(json.dumps({key: value for key, value in fit.info.items() if key != "key_types"}, default=str))
    return out


def load(target: Any, prefix: str, model: str | None = None, by: Mapping[str, Any] | None = None) -> MixedFit:
    """See `mlpipe.load`."""
    target, wanted = placed(target), ({"model": model} if model is not None else {}) | dict(by or {})
    return _load_database(target, prefix, wanted) if _is_database(target) else _load_folder(Path(target), wanted)


def _load_folder(folder: Path, wanted: dict[str, Any]) -> MixedFit:
    try:
        record = json.loads((folder / "fit.json").read_bytes())
        runs = folder / "runs" / str(record["run_id"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"there is no fit in {folder}", code="file_not_found") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} does not hold a fit that this version can read", code="not_a_fit") from error
    prefix = str(record.get("prefix"))

    def modes(name: str) -> pa.Table | None:
        path = runs / f"{prefix}_ranef_{name}.parquet"
        return _held(path) if path.exists() else None

    if record.get("format") != FORMATS and wanted:
        wanted_by = [name for name in wanted if name != "model"]
        if wanted_by or wanted["model"] != _read(record, str(folder)).formula:
            what = f"are not by {wanted_by[0]!r}" if wanted_by else f"have no model {wanted['model']!r}"
            raise ConfigError(f"the fits of {folder} {what}", code="which_fit", hint="it holds one fit: load it without model and by")
    if record.get("format") == FORMATS:
        return _of_several(_held(runs / f"{prefix}_manifest.parquet"), wanted, str(folder), modes)
    fit = _read(record, str(folder))
    fit.written = {"run_id": record["run_id"], "model": fit.formula}
    _keep(fit, modes)
    return fit


def _held(path: Path) -> pa.Table:
    """A table of a run. Raises DataError where it is gone or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        what = "is gone" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise DataError(f"{path} {what}", code="not_a_fit", hint="run the job again") from error


def _load_database(target: Any, prefix: str, wanted: dict[str, Any]) -> MixedFit:
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
        run = runs[-1].run_id

        def modes(name: str) -> pa.Table | None:
            table = f"{prefix}_ranef_{name}"
            return held.rows(table, run) if table in runs[-1].tables else None

        return _of_several(held.rows(f"{prefix}_manifest", run), wanted, where, modes)


def _of_several(manifest: pa.Table, wanted: dict[str, Any], where: str, modes: Callable[[str], pa.Table | None]) -> MixedFit:
    """The one fit of a run that is wanted. Raises ConfigError where it is not said which, DataError where it could not be fitted."""
    unknown = [name for name in wanted if name not in manifest.column_names]
    if unknown:
        raise ConfigError(f"the fits of {where} are not by {unknown[0]!r}", code="which_fit")
    rows = matching(manifest, wanted)
    by = by_columns(manifest)
    if len(rows) != 1:
        what = f"{where} holds {len(manifest)} fits, {len(rows)} of them match" if wanted else f"{where} holds {len(manifest)} fits"
        raise ConfigError(what, code="which_fit", hint=f"name one: {_candidates(rows if len(rows) else manifest, by)}")
    text = rows["record"][0].as_py()
    if text is None:
        raise DataError("this model could not be fitted", code="not_a_fit", hint="the table of fits has the reason in `message`")
    fit = _read(_parsed(text, where), where)
    stamps = {name: rows[name][0].as_py() for name in ("model", *dict.fromkeys([*by, *(name for name in wanted if name != "model")]))}
    fit.written = {"run_id": rows["run_id"][0].as_py(), **stamps}

    def own(name: str) -> pa.Table | None:
        return matching(table, stamps) if (table := modes(name)) is not None else None

    _keep(fit, own, [name for name in stamps if name != "model"])
    return fit


def _candidates(rows: pa.Table, by: list[str]) -> str:
    """The first fits of a manifest as the arguments that name them."""
    shown = []
    for row in rows.slice(0, SHOWN).select(["model", *by]).to_pylist():
        model = row.pop("model")
        shown.append(f"model={model!r}" + (f", by={row!r}" if by else ""))
    return "; ".join(shown) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def matching(table: pa.Table, wanted: Mapping[str, Any]) -> pa.Table:
    """The rows of a table with these values; a text stands for the value of the column's type. Raises ConfigError where it is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name, value in wanted.items():
        column = table.column(name)
        try:
            if isinstance(value, str) and pa.types.is_time(column.type):  # which Arrow does not read
                value = datetime.time.fromisoformat(value)
            scalar = pa.scalar(value).cast(column.type) if isinstance(value, str) else pa.scalar(value, column.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, ValueError) as error:
            raise ConfigError(f"{value!r} is no value of {name!r}, which is {column.type}", code="which_fit") from error
        table = table.filter(pc.is_null(column) if value is None else pc.equal(column, scalar))
    return table


def check_target(target: str, prefix: str, mode: str) -> None:
    """Raises ConfigError for a directory of other things, for a file that is no database, and for a prefix that no file's name can have,
    DataError for a directory to be appended to whose index is damaged, before the work whose result goes there."""
    from .engines import target as database

    target = placed(target)
    _check_prefix(prefix)
    if _is_database(target):
        database.check(target)
        return
    check_ours(Path(target), FIT, "fit")
    if mode == "append":
        kept_runs(Path(target))


def holds_fit(target: str, prefix: str) -> bool:
    """Whether there is a fit at a path, which `write` in mode "error" would refuse to replace."""
    from .engines import target as database

    target = placed(target)
    if not _is_database(target):
        return (Path(target) / "fit.json").exists()
    if not Path(target).exists():
        return False
    with database.opened(target, Options(), read_only=True) as held:
        return bool(held.runs(f"{prefix}_manifest"))


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} does not hold a fit that this version can read", code="not_a_fit") from error


def _read(record: dict[str, Any], where: str) -> MixedFit:
    """The fit of a record. Raises DataError where it is none that this version can read."""
    try:
        if record["format"] != FORMAT:
            raise DataError(f"{where} was written by another version ({record['format']})", code="not_a_fit")
        return _from_json(record["fit"])
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
        spread=Spread(*(matrix(record["spread"][name]).reshape(n, p) for name, n in (("Q", len(record["gamma"])), ("R", p), ("star", p)))),
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
    from .estimating_result import GEEFit
    from .generalized_result import GLMFit, GLMMFit
    from .linear_result import OLSFit

    return {kind.__name__: kind for kind in (GEEFit, GLMFit, GLMMFit, OLSFit)}[name]


def _keep(fit: MixedFit, modes: Callable[[str], pa.Table | None], by: Sequence[str] = ()) -> None:
    """Gives the fit the BLUPs that were written with it, from the tables of its factors, where there are any."""
    from .effects import coefficient_names, key_names

    for group, name in factor_names(fit.groups).items():
        held = modes(name)
        if held is None:
            continue
        terms = [term for term in fit.terms if term.group == group]
        keys = next((groups for groups in fit.recipe.factors if ":".join(groups) == group), fit.recipe.groups)
        wanted = [*key_names(terms, keys), *(column for name in coefficient_names(terms) for column in (name, f"{name}_se"))]
        table = held.select(written(wanted, by)).rename_columns(wanted)
        if fit.recipe.factors:
            fit.effects_tables[group] = table
        else:
            fit.effects_table = table


def tables_of_runs(target: Any, prefix: str, names: Sequence[str]) -> list[dict[str, pa.Table]]:
    """The tables of these names, without prefix, of each run that a directory or database keeps, in the order they were written."""
    from .engines import target as database

    target = placed(target)
    if not _is_database(target):
        folder = Path(target)
        runs = [folder / "runs" / run for run in kept_runs(folder)]
        found = [{name: sorted(run.glob(f"*_{name}.parquet"), key=lambda path: len(path.name))[:1] for name in names} for run in runs]
        return [{name: _held(path) for name, paths in files.items() for path in paths} for files in found]
    with database.opened(target, Options(), read_only=True) as held:
        return [
            {name: held.rows(f"{prefix}_{name}", run.run_id) for name in names if f"{prefix}_{name}" in run.tables}
            for run in held.runs(f"{prefix}_manifest")
        ]  # fmt: skip


def of_entry(table: pa.Table, stamps: Mapping[str, Any]) -> pa.Table:
    """The rows of a result table that are of one fit, by its model and the values it is for, under the names they had before."""
    by = [name for name in stamps if name not in ("run_id", "model")]
    rows = matching(table, {name: value for name, value in stamps.items() if name != "run_id"})
    return rows.drop_columns(["run_id", "model", *by])
