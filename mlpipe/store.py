"""Fits on disk: `runs/<run_id>/*.parquet` and `fit.json`, which is replaced last and is the only commit point."""
from __future__ import annotations

import datetime
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError, DataError, ResourceError, did_you_mean
from .features import Recipe
from .result import LMMFit, RandomTerm

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "mlpipe.fit/1"
MODES = ("error", "overwrite", "append")
_PLAIN = (
    *("formula", "response", "reml", "sigma", "loglik", "nobs", "rows", "n_blocks"),
    *("converged", "singular", "score", "evaluations", "message", "seconds"),
)


def write(fit: LMMFit, target: str | Path, *, prefix: str, mode: str, run_id: str | None, ranef: bool) -> None:
    """Writes all or nothing. Raises ConfigError for a bad mode or an existing target, ResourceError where the disk fails."""
    if mode not in MODES:
        raise ConfigError(f"mode = {mode!r} is not one of {', '.join(MODES)}", hint=did_you_mean(mode, list(MODES)))
    folder, run = Path(target), run_id or _new_run_id()
    if not run or Path(run).name != run:
        raise ConfigError(f"run_id {run!r} cannot be a folder's name")
    if folder.exists() and not (folder / "fit.json").exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ConfigError(f"{folder} exists and is no fit", code="target_exists", hint="choose another target")
    tables = _tables(fit, prefix, run, ranef)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _commit(fit, folder, tables, mode, run)
    except OSError as error:
        raise ResourceError(f"cannot write {folder}: {error.strerror or error}", code="not_writable") from error


def _commit(fit: LMMFit, folder: Path, tables: dict[str, pa.Table], mode: str, run: str) -> None:
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
        _replace(index, {"format": FORMAT, "run_id": run, "runs": [*kept, run], "fit": to_json(fit)})
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
        _sync(path)
    _sync(folder)


def _replace(path: Path, record: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".json.partial")
    with unfinished.open("w") as file:
        json.dump(record, file, allow_nan=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time; the kernel releases the lock when its holder dies."""
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(f"another job is writing {folder}", code="locked", hint="try again when it is done") from error
        yield


def _new_run_id() -> str:
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"


def _tables(fit: LMMFit, prefix: str, run: str, ranef: bool) -> dict[str, pa.Table]:
    """The result tables, each row with run_id and model."""
    import pyarrow as pa

    from . import __version__

    glance = fit.glance().to_pylist()[0]
    kept = {name: glance[name] for name in ("nobs", "n_dropped", "loglik", "converged", "singular", "seconds")}
    head = {"formula": fit.formula, "family": "gaussian", **kept}
    head |= {"started": datetime.datetime.now(datetime.UTC), "source_fingerprint": fit.info.get("fingerprint"), "version": __version__}
    manifest = {"rows_read": fit.info.get("rows_read"), "rows_dropped": fit.info.get("rows_dropped"), "passes": fit.info.get("passes")}
    manifest["info"] = json.dumps(fit.info, default=str)
    tables = {"fit": pa.Table.from_pylist([head]), "coef": fit.tidy(), "varcomp": fit.varcorr()}
    tables["manifest"] = pa.Table.from_pylist([manifest])
    if ranef and (fit.source is not None or fit.effects_table is not None):
        from . import effects

        tables[f"ranef_{_file_name(fit.terms[0].group)}"] = effects.ranef(fit, wide=True, stream=False)
    return {f"{prefix}_{name}": _stamped(table, run, fit.formula) for name, table in tables.items()}


def _file_name(group: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in group)


def _stamped(table: pa.Table, run: str, model: str) -> pa.Table:
    import pyarrow as pa

    for name, value in (("model", model), ("run_id", run)):
        table = table.add_column(0, _free(name, table.column_names), pa.array([value] * len(table), pa.string()))
    return table


def _free(name: str, taken: list[str]) -> str:
    return name if name not in taken else _free(f"{name}_", taken)


def to_json(fit: LMMFit) -> dict[str, Any]:
    """Everything of a fit but its data and BLUPs, as JSON values (floats by their shortest exact text)."""
    out: dict[str, Any] = {name: getattr(fit, name) for name in _PLAIN}
    out |= {"names": list(fit.names), "dropped": list(fit.dropped), "recipe": fit.recipe.to_json()}
    out |= {name: getattr(fit, name).tolist() for name in ("beta", "covariance", "gamma", "theta_covariance")}
    out["terms"] = [
        {f.name: v.tolist() if isinstance(v := getattr(term, f.name), np.ndarray) else v for f in fields(RandomTerm)} for term in fit.terms
    ]
    out["info"] = json.loads(json.dumps(fit.info, default=str))
    return out


def load(path: str | Path) -> LMMFit:
    """See `mlpipe.load`."""
    folder = Path(path)
    try:
        record = json.loads((folder / "fit.json").read_text())
        if record["format"] != FORMAT:
            raise DataError(f"{folder} was written by another version ({record['format']})", code="not_a_fit")
        fit = _from_json(record["fit"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"there is no fit in {folder}", code="file_not_found") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder} does not hold a fit that this version can read", code="not_a_fit") from error
    fit.effects_table = _effects(folder / "runs" / record["run_id"], fit)
    return fit


def _from_json(record: dict[str, Any]) -> LMMFit:
    def matrix(value: Any) -> np.ndarray:
        return np.array([[math.nan if x is None else x for x in row] for row in value], dtype=float)

    q = [len(term["names"]) for term in record["terms"]]
    terms = tuple(
        RandomTerm(t["group"], tuple(t["names"]), matrix(t["factor"]), matrix(t["Q"]).reshape(-1, k), matrix(t["R"]), matrix(t["star"]))
        for t, k in zip(record["terms"], q, strict=True)
    )
    p = len(record["names"])
    return LMMFit(
        **{name: record[name] for name in _PLAIN},
        recipe=Recipe.from_json(record["recipe"]),
        names=tuple(record["names"]),
        dropped=tuple(record["dropped"]),
        beta=np.array(record["beta"], dtype=float),
        covariance=matrix(record["covariance"]).reshape(p, p),
        gamma=np.array(record["gamma"], dtype=float),
        terms=terms,
        theta_covariance=matrix(record["theta_covariance"]),
        info=record["info"],
    )


def _effects(folder: Path, fit: LMMFit) -> pa.Table | None:
    """The BLUPs that were written with the fit."""
    import pyarrow.parquet as pq

    from .effects import coefficient_names, key_names

    found = sorted(folder.glob("*_ranef_*.parquet"))
    if not found:
        return None
    names = [*key_names(fit), *(column for name in coefficient_names(fit) for column in (name, f"{name}_se"))]
    table = pq.ParquetFile(found[0]).read()
    return table.select(names)
