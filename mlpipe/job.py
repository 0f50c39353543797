"""Jobs: a TOML file that says source, model, output, limits and policy; validated, unknown keys refused by name."""
from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ConfigError, ConvergenceError, did_you_mean
from .options import Options

if TYPE_CHECKING:
    from .many import Fits
    from .result import MixedFit

Mode = Literal["error", "overwrite", "append"]

_WANTED = {
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "string_too_short": "text that is not empty",
    "int_type": "a whole number",
    "float_type": "a number",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}
_UNIONS = {
    "source.path": "text in quotes or a list of such",
    "model.cluster": "text in quotes or a list of such",
    "model.absorb": "text in quotes or a list of such",
    "model.groups": "text in quotes or a list of such",
    "limits.memory_limit": "text in quotes or a whole number",
    "limits.timeout": "text in quotes or a number",
}


class Section(BaseModel):
    """A table of a job."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SourceSection(Section):
    """`path`, or `database` with `table` or `query`; `types`: DuckDB types of CSV and JSON columns, by name; `columns`: the only ones
    that models of the job may use."""

    path: str | list[str] | None = None
    database: str | None = None
    table: str | None = None
    query: str | None = None
    types: dict[str, str] | None = None
    columns: list[str] | None = None


class ModelSection(Section):
    """The model: its formula and what `mlpipe.lmm`, `glmm`, `ols`, `glm` or `gee` takes."""

    kind: Literal["lmm", "glmm", "ols", "glm", "gee"] = "lmm"
    formula: str
    reml: bool = True
    family: str | None = None
    link: str | None = None
    nagq: int = 1
    trials: str | None = None
    absorb: str | list[str] | None = None
    cluster: str | list[str] | None = None
    vcov: str | None = None
    groups: str | list[str] | None = None
    corr: str | None = None
    time: str | None = None
    weights: str | None = None
    freq: str | None = None
    offset: str | None = None
    levels: dict[str, list[Any]] | None = None
    contrasts: dict[str, str] | None = None
    na: Literal["drop", "raise"] = "drop"
    where: str | None = None
    by: list[str] = Field(default_factory=list)


class NamedModel(ModelSection):
    """One of several models of a job."""

    name: str


class StoreSection(Section):
    """Incremental statistics: where they are kept, what a partition is, how many of the last count, what to do about vanished ones."""

    path: Annotated[str, Field(min_length=1)]
    partition_by: str = "file"
    window: Annotated[int, Field(ge=1)] | None = None
    vanished: Literal["error", "drop", "keep"] = "error"


class OutputSection(Section):
    """Where the fit is written: see `MixedFit.write`."""

    target: Annotated[str, Field(min_length=1)]
    prefix: str = "mlpipe"
    mode: Mode = "error"
    ranef: bool = True
    scoring_sql: list[Literal["duckdb", "postgres", "snowflake", "bigquery", "spark"]] = Field(default_factory=list)


class LimitsSection(Section):
    """What the fit may use: see `Options`; `timeout`: how long the job may take, see `deadline.parse_seconds`."""

    memory_limit: str | int | None = None
    threads: int | None = None
    temp_directory: str | None = None
    timeout: str | int | float | None = None


class PolicySection(Section):
    """What makes a job fail with exit code 4 although results are written."""

    forbid: list[Literal["singular", "separation", "rank", "nonconvergence"]] = Field(default_factory=list)
    max_drop_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    max_drift: Annotated[float, Field(ge=0)] | None = None


class Job(Section):
    """A whole job: one `model`, or several `models`."""

    source: SourceSection
    model: ModelSection | None = None
    models: list[NamedModel] = Field(default_factory=list)
    store: StoreSection | None = None
    output: OutputSection | None = None
    limits: LimitsSection = Field(default_factory=LimitsSection)
    policy: PolicySection = Field(default_factory=PolicySection)


def read_job(path: str | Path) -> Job:
    """The job in a TOML file. Raises ConfigError: no such file, not TOML, unknown keys (did you mean), wrong values."""
    try:
        record = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the job {path}: {error.strerror}", code="job_file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file: {error}", code="job_file") from error
    for section in ("source", "store", "output"):
        if section in record:
            record[section] = _expanded(record[section])
    try:
        job = Job.model_validate(record)
    except ValidationError as error:
        raise _readable(error, str(path)) from error
    _check_source(job.source, str(path))
    _check_models(job, str(path))
    _check_store(job, str(path))
    _check_columns(job, str(path))
    _check_apart(job, str(path))
    return job


def _expanded(value: Any) -> Any:
    """`${NAME}` replaced by environment variables, in texts at any depth."""
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+)\}", lambda match: _variable(match[1]), value)
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    return [_expanded(item) for item in value] if isinstance(value, list) else value


def _variable(name: str) -> str:
    if name not in os.environ:
        raise ConfigError(f"the job uses ${{{name}}}, and there is no such environment variable", code="environment")
    return os.environ[name]


def _readable(error: ValidationError, path: str) -> ConfigError:
    """The first mistake, an unknown key before all others: a misspelt section also counts as missing."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    place = tuple(str(part) for part in first["loc"])
    key, value = place[-1], first["input"]
    shown = next((union for union in _UNIONS if tuple(union.split(".")) == place[:2]), ".".join(place))
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(key, list(_section(place[:-1]).model_fields))
        return ConfigError(f"{path}: unknown key {shown}", code="unknown_key", hint=hint)
    if first["type"] == "missing":
        what = f"[{shown}] is missing" if len(place) == 1 else f"[{'.'.join(place[:-1])}] needs {key}"
        return ConfigError(f"{path}: {what}", code="job_value")
    return ConfigError(f"{path}: {shown} = {value!r}: {_wanted(first['type'], first['msg'], shown)}", code="job_value")


def _wanted(kind: str, message: str, key: str) -> str:
    wanted = _UNIONS.get(key, _WANTED.get(kind))
    return f"it must be {wanted}" if wanted else message.replace("Input", "it", 1)


def _section(location: tuple[str, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Job
    for part in (part for part in location if not part.isdigit()):  # a number is a place in a list of tables
        annotation = section.model_fields[part].annotation
        candidates = (*getattr(annotation, "__args__", ()), annotation)
        section = next(one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel))
    return section


def _check_source(source: SourceSection, path: str) -> None:
    given = [name for name in ("path", "table", "query") if getattr(source, name) is not None]
    if len(given) != 1 or (source.database is None) != (given == ["path"]):
        raise ConfigError(f"{path}: [source] needs path, or database with table or query", code="job_source")
    if source.types is not None and source.path is None:
        raise ConfigError(f"{path}: source.types is for CSV and JSON files", code="job_source")


def _check_models(job: Job, path: str) -> None:
    """Raises ConfigError for keys of another kind of model, and for several models that cannot be told apart or written together."""
    from .fit import check_keywords

    if (job.model is None) == (not job.models):
        what = "[model] is missing" if job.model is None else "[model] and [[models]] exclude each other"
        raise ConfigError(f"{path}: {what}", code="job_value")
    for model in [job.model] if job.model is not None else job.models:
        try:
            check_keywords(model.kind, _settings(model))
        except ConfigError as error:
            raise ConfigError(f"{path}: [model] {error.message}", code="job_value", hint=error.hint) from error
        if model.kind != "lmm" and (model.by or job.models):
            raise ConfigError(f"{path}: by and [[models]] are for linear mixed models", code="not_available")
        if has_many(job) and (model.cluster is not None or model.vcov is not None):
            what = f"{path}: by and [[models]] keep no rows for cluster and vcov"
            raise ConfigError(what, code="not_available", hint="robust errors need a job for each model")
    if has_many(job) and job.output is not None and job.output.scoring_sql:
        raise ConfigError(f"{path}: output.scoring_sql is for a job of one fit", code="not_available", hint="mlpipe.load one of them")
    if job.output is not None and job.output.scoring_sql and not job.output.ranef and (job.model or job.models[0]).kind in ("lmm", "glmm"):
        what = f"{path}: output.scoring_sql joins the tables of random effects, which ranef = false leaves out"
        raise ConfigError(what, code="job_value", hint="fit.scoring_sql(effects=\"population\") joins none")
    names = [model.name for model in job.models]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: two models have one name", code="job_value")
    if len({tuple(model.by) for model in job.models}) > 1:
        raise ConfigError(f"{path}: all models of a job share their by", code="job_value", hint="write a job for each")
    _check_by((job.model or job.models[0]).by, path)


def _check_by(by: Sequence[str], path: str) -> None:
    """Raises ConfigError for columns that result tables cannot have beside their own, case apart, to which databases are blind."""
    from .tables import reserved

    taken = reserved() if by else set()
    for k, name in enumerate(by):
        if name in by[:k]:
            raise ConfigError(f"{path}: by names {name!r} twice", code="by", column=name)
        if name.lower() in taken:
            what = f"{path}: by = {name!r}: the tables of results have a column of this name"
            raise ConfigError(what, code="by", column=name, hint="rename it in a query or a view")
        taken.add(name.lower())


def _check_store(job: Job, path: str) -> None:
    """Raises ConfigError for what has no statistics, and for one database file in two roles: only one connection may write it."""
    if job.store is None:
        if job.policy.max_drift is not None:
            raise ConfigError(f"{path}: policy.max_drift needs a [store]", code="job_value")
        return
    if job.model is None or job.model.by:
        raise ConfigError(f"{path}: [store] is for one model without by", code="not_available")
    if job.model.kind not in ("lmm", "glmm", "ols"):
        what = f"{path}: [store] keeps nothing that kind = {job.model.kind!r} could be fitted from"
        raise ConfigError(what, code="not_available", hint='kind = "lmm", "glmm" or "ols"')
    if job.model.cluster is not None or job.model.vcov is not None:
        hint = "robust errors need the rows: leave out [store]"
        raise ConfigError(f"{path}: [store] keeps no rows for cluster and vcov", code="not_available", hint=hint)
    if job.output is not None and _real(job.store.path).startswith(os.path.join(_real(job.output.target), "")):
        hint = "a target holds nothing but its runs"
        raise ConfigError(f"{path}: store.path lies in output.target", code="job_value", hint=hint)
    roles = {"source.database": job.source.database, "output.target": job.output.target if job.output is not None else None}
    for role, other in roles.items():
        if other is not None and _real(other) == _real(job.store.path):
            raise ConfigError(f"{path}: store.path and {role} are the same file", code="job_value", hint="give the store a file of its own")


def _check_apart(job: Job, path: str) -> None:
    """Raises ConfigError for a target below a directory that is read: the next run would take its tables for rows."""
    from .store import DATABASES

    if job.output is None or job.output.target.lower().endswith(DATABASES):
        return
    given, target = job.source.path, Path(_real(job.output.target))
    read = [given] if isinstance(given, str) else given or []
    for root in [_real(one.partition("**")[0]) for one in read if "**" in one or os.path.isdir(os.path.expanduser(one))]:
        inside = target.relative_to(root).parts if target.is_relative_to(root) else (".",)
        if not any(part.startswith((".", "_")) for part in inside):  # such folders are not read
            hint = "its tables would be read as data: choose another target"
            raise ConfigError(f"{path}: output.target lies in source.path", code="job_value", hint=hint)


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _check_columns(job: Job, path: str) -> None:
    """Raises ConfigError for a column that the job uses and `source.columns` leaves out. Raises FormulaError."""
    if job.source.columns is None:
        return
    used = [name for model in ([job.model] if job.model is not None else job.models) for name in _columns_of(model)]
    if job.store is not None and job.store.partition_by != "file":
        used.append(job.store.partition_by)
    for name in used:
        if name not in job.source.columns:
            hint = did_you_mean(name, job.source.columns) or "add it to source.columns"
            raise ConfigError(f"{path}: the job uses the column {name!r}, which source.columns leaves out", code="job_value", hint=hint)


def _columns_of(model: ModelSection) -> list[str]:
    from .expr import columns
    from .formula import parse, parse_expression
    from .planning import used_names
    from .plans import Request

    clusters = (*_listed(model.cluster), *_listed(model.absorb))
    request = Request(
        model.formula, weights=model.weights, freq=model.freq, offset=model.offset, trials=model.trials, time=model.time,
        groups=_listed(model.groups), clusters=clusters, by=tuple(model.by),
    )  # fmt: skip
    where = columns(parse_expression(model.where)) if model.where is not None else ()
    return [*used_names(parse(model.formula), request), *where]


def _listed(names: str | list[str] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _settings(model: ModelSection) -> dict[str, Any]:
    """The keywords of the fitting function: what the job says and nothing more."""
    return model.model_dump(exclude={"kind", "formula", "where", "by", "name"}, exclude_unset=True)


def data_of(source: SourceSection) -> Any:
    """What the fitting functions take as `data`."""
    from . import sources

    if source.table is not None:
        return sources.table(source.table, source.database)
    if source.query is not None:
        return sources.query(source.query, source.database)
    return sources.source(source.path, types=source.types) if source.path is not None and source.types else source.path


def fit_job(job: Job, limits: Mapping[str, Any], *, rebase: bool = False) -> MixedFit:
    """Fits what the job says, from a store brought up to date where there is one; writes no output. `limits` (from flags and the
    environment) win over the job's own; `rebase` makes the store anew.

    Raises what `mlpipe.lmm`, `glmm` or `glm` raises; ConfigError for `rebase` without a store.
    """
    from .fit import fitted
    from .sources import Subset

    options = _options(job, limits)
    model, data = job.model, data_of(job.source)
    assert model is not None
    if model.where is not None:
        data = Subset(data, model.where)
    if job.store is not None:
        from .stored import fit_from_store

        return fit_from_store(model, job.store, data, options, rebase)
    if rebase:
        raise ConfigError("--rebase is for jobs with a [store]", code="usage")
    return fitted(model.kind, model.formula, data, options, _settings(model))


def _options(job: Job, limits: Mapping[str, Any]) -> Options:
    return Options(**(job.limits.model_dump(exclude_none=True, exclude={"timeout"}) | dict(limits)))


def has_many(job: Job) -> bool:
    """Whether a job asks for several fits."""
    return job.model is None or bool(job.model.by)


def fit_jobs(job: Job, limits: Mapping[str, Any]) -> Fits:
    """Fits all models of a job, those with the same rows and weights from the same scans. Raises what `scans.fit_scans` raises."""
    from .many import Model
    from .plans import Request
    from .scans import Scan, fit_scans
    from .sources import Subset

    models = [NamedModel(name=job.model.formula, **job.model.model_dump())] if job.model is not None else job.models
    names, options, data = ("weights", "freq", "offset", "levels", "contrasts", "na"), _options(job, limits), data_of(job.source)
    shared: dict[str, list[NamedModel]] = {}
    for model in models:
        shared.setdefault(repr([model.where, *(getattr(model, name) for name in names)]), []).append(model)
    scans = []
    for alike in shared.values():
        first = alike[0]
        request = Request("", by=tuple(first.by), options=options, **{name: getattr(first, name) for name in names})
        part = Subset(data, first.where) if first.where is not None else data
        scans.append(Scan([Model(model.name, model.formula, model.reml) for model in alike], part, request))
    fits, place = fit_scans(scans), {model.name: i for i, model in enumerate(models)}
    return replace(fits, fits=sorted(fits.fits, key=lambda one: place[one.model]))


def write_outputs(fits: Fits, output: OutputSection | None) -> None:
    """Writes all fits as one run where the job says, if it does; a model that has none of any value stands there once, without a value."""
    from .store import write_all
    from .tables import Entry

    if output is not None:
        nothing: dict[str, Any] = dict.fromkeys(fits.by.names)
        entries = [Entry(one.model, one.fit, nothing | one.by, None if one.error is None else one.error.message) for one in fits.fits]
        write_all(
            entries, fits.by, output.target, prefix=output.prefix, mode=output.mode, run_id=None, ranef=output.ranef
        )


def told(fit: MixedFit) -> str:
    """What the run of a job with a store did to it, as text."""
    from . import incremental

    return incremental.told(fit)


def write_output(fit: MixedFit, output: OutputSection | None) -> None:
    """Writes the fit where the job says, if it does, and its scoring SQL. Raises what `MixedFit.write` and `scoring_sql` raise."""
    if output is not None:
        from .scoring_sql import write_text

        for dialect in output.scoring_sql:  # where there can be none, nothing is written
            fit.scoring_sql(dialect, prefix=output.prefix)
        fit.write(output.target, prefix=output.prefix, mode=output.mode, ranef=output.ranef)
        for dialect in output.scoring_sql:
            write_text(fit, dialect, output.target, output.prefix)


def check_policy(fit: MixedFit, policy: PolicySection) -> None:
    """Raises ConvergenceError for a fit that the policy forbids, naming every reason."""
    if reasons := _forbidden(fit, policy):
        raise ConvergenceError(f"the job's policy forbids this result: {', '.join(reasons)}", code="policy")


def check_policies(fits: Fits, policy: PolicySection) -> None:
    """The same for several fits: the first few that are forbidden, and how many there are."""
    found = [(one, reasons) for one in fits.fits if one.fit is not None and (reasons := _forbidden(one.fit, policy))]
    if found:
        shown = "; ".join(f"{one.label}: {', '.join(reasons)}" for one, reasons in found[:3])
        raise ConvergenceError(f"the job's policy forbids {len(found)} of {len(fits.fits)} results: {shown}", code="policy")
    for scan in fits.scans:
        if reason := _too_many(scan["rows_nowhere"], scan["rows_read"], policy):
            raise ConvergenceError(f"the job's policy forbids this result: {scan['nowhere']}; {reason}", code="policy")


def _forbidden(fit: MixedFit, policy: PolicySection) -> list[str]:
    states = {"singular": fit.singular, "separation": bool(fit.info.get("separation"))}
    states |= {"rank": bool(fit.dropped), "nonconvergence": not fit.converged}
    reasons: list[str] = [name for name in dict.fromkeys(policy.forbid) if states[name]]
    if reason := _too_many(fit.info.get("rows_dropped", 0), fit.info.get("rows_read") or 0, policy):
        reasons.append(reason)
    if policy.max_drift is not None and fit.info.get("drift", {}).get("largest", 0.0) > policy.max_drift:
        drift = fit.info["drift"]
        reasons.append(f"{drift['term']} moved by {drift['largest']:.2f} standard errors, {policy.max_drift:g} are allowed")
    return reasons


def _too_many(dropped: int, read: int, policy: PolicySection) -> str:
    """What to say of rows that were dropped, "" where they are not too many."""
    share = dropped / read if read else 0.0
    if policy.max_drop_fraction is None or share <= policy.max_drop_fraction:
        return ""
    return f"{share:.2%} of the rows were dropped, {policy.max_drop_fraction:.2%} may be"
