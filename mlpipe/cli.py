"""The command line: fit, plan, run, show, report, predict. Results go to standard output, log and progress to standard error."""
from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from . import __version__
from .console import Console, warnings_to
from .deadline import within
from .errors import ConfigError, exit_code

if TYPE_CHECKING:
    from .job import Job
    from .options import Options
    from .result import MixedFit

Command = TypeVar("Command", bound=Callable[..., Any])
NOT_CONVERGED = 4
TERMINATED = 143


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def wrap(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return wrap


LIMITS = ("memory_limit", "threads", "temp_directory")
pass_console = click.make_pass_decorator(Console, ensure=True)
limits = _options(
    click.option("--memory-limit", envvar="MLPIPE_MEMORY_LIMIT", show_envvar=True, help="Memory of engine and arrays, such as 2GB."),
    click.option("--threads", type=int, envvar="MLPIPE_THREADS", show_envvar=True, help="Threads of the engine."),
    click.option("--temp-directory", envvar="MLPIPE_TEMP_DIRECTORY", show_envvar=True, help="Where larger-than-memory work is spilled."),
    click.option("--timeout", envvar="MLPIPE_TIMEOUT", show_envvar=True, help="Give up after this time, such as 90s, 45min, 2h."),
)
rows = _options(
    click.argument("data", nargs=-1, required=True),
    click.option("--table", help="DATA is a DuckDB database; read this table of it."),
)
model = _options(
    click.option("--kind", type=click.Choice(["lmm", "glmm", "ols", "glm", "gee"]), help="The model, if the formula does not tell."),
    click.option("--family", help="Fit a generalized model: binomial, poisson, negbinomial, gamma, beta …; without random terms a GLM."),
    click.option("--link", help="Its link, if not the customary one."),
    click.option("--nagq", type=int, help="Quadrature nodes a random effect; 1, the default, is the Laplace approximation."),
    click.option("--trials", help="Numbers of trials of a binomial proportion: a column or an expression."),
    click.option("--absorb", multiple=True, metavar="COLUMN", help="Take out the effects of this factor (least squares)."),
    click.option("--cluster", multiple=True, metavar="COLUMN", help="Cluster-robust standard errors of the fixed effects."),
    click.option("--groups", multiple=True, metavar="COLUMN", help="Blocks of correlated rows: fit by estimating equations."),
    click.option("--corr", help="Their working correlation: independence, exchangeable, ar1 or unstructured."),
    click.option("--time", help="What orders the rows of a block: a column or an expression."),
    click.option("--vcov", metavar="KIND", help="Robust standard errors: HC0 to HC3, with clusters CR0 to CR2; of a GEE, see its docs."),
    click.option("--weights", help="Precision weights: a column or an expression."),
    click.option("--freq", help="Frequency weights: a column or an expression."),
    click.option("--offset", help="Offset: a column or an expression."),
    click.option("--contrast", "contrasts", multiple=True, metavar="FACTOR=KIND", help="treatment, sum, helmert or poly."),
    click.option("--levels", multiple=True, metavar="FACTOR=A,B,C", help="The order of a factor's levels."),
    click.option("--na", type=click.Choice(["drop", "raise"]), default="drop", show_default=True, help="Rows with missing values."),
)
which = _options(
    click.option("--model", help="Of a job with several models, the name of one."),
    click.option("--by", multiple=True, metavar="COLUMN=VALUE", help="Of a job with one model a value, the value."),
)
tables = click.option("--prefix", default="mlpipe", show_default=True, help="Before the names of the tables, where FIT is a database.")
logs = click.option("--log", type=click.Choice(["text", "json"]), help="One log line a stage on standard error.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlpipe")
def cli() -> None:
    """Mixed models, linear and generalized, fitted where the data lives.

    Exit status: 0 done, 2 wrong request, 3 wrong data, 4 not converged or forbidden by a job's policy (results are written), 5 engine,
    memory, disk or time, 130 or 143 interrupted.
    """


@cli.command()
@click.argument("formula")
@rows
@click.option("--ml", is_flag=True, help="Maximum likelihood instead of REML.")
@model
@click.option("--checkpoint", type=click.Path(), help="Keep the state of a generalized mixed model here; the same fit goes on from it.")
@click.option("--out", type=click.Path(), help="Write the fit to this directory, or DuckDB file (.duckdb, .db).")
@click.option("--overwrite", is_flag=True, help="Replace a fit that is there.")
@limits
@logs
@pass_console
def fit(
    console: Console, /, formula: str, ml: bool, checkpoint: str | None, out: str | None, overwrite: bool, log: str | None, **settings: Any
) -> None:
    """Fit FORMULA to DATA and print the summary.

    DATA: Parquet, CSV, JSON or Arrow files, globs or directories; or a DuckDB database with --table.
    """
    from .fit import fitted

    console.log_to(log)
    mode = "overwrite" if overwrite else "error"
    if out is not None:
        _check_target(out, mode)
    elif overwrite:
        raise ConfigError("--overwrite belongs to --out", code="usage")
    own = ({"reml": False} if ml else {}) | ({"checkpoint": checkpoint} if checkpoint is not None else {})
    with within(settings["timeout"]):
        result = fitted(_function(formula, settings), formula, _data(settings), _limits(settings), _model(settings) | own)
        try:
            if out is not None:
                result.write(out, mode=mode)
        finally:  # an estimate that could not be written is still worth reading
            console.out(result.summary())
    _finish(result)


@cli.command()
@click.argument("formula")
@rows
@model
@limits
@pass_console
def plan(console: Console, /, formula: str, **settings: Any) -> None:
    """Say what a fit of FORMULA to DATA would do: statements, passes, memory. Only preparatory looks are run."""
    from .fit import plan as make_plan

    with within(settings["timeout"]):
        made = make_plan(_function(formula, settings), formula, _data(settings), options=_limits(settings), **_model(settings))
        console.out(str(made))


@cli.command()
@click.argument("job_file", metavar="JOB.toml", type=click.Path())
@click.option("--rebase", is_flag=True, help="Make the job's store of statistics anew: read every partition, fix bases and scales again.")
@limits
@logs
@pass_console
def run(console: Console, /, job_file: str, rebase: bool, log: str | None, **settings: Any) -> None:
    """Run a job file: fit, write, and fail where its policy says so. Options given here win over the job's."""
    from .job import has_many, read_job

    console.log_to(log)
    job = read_job(job_file)
    if job.output is not None:
        _check_target(job.output.target, job.output.mode, job.output.prefix)
    given = {name: settings[name] for name in LIMITS if settings[name] is not None}
    with within(job.limits.timeout if settings["timeout"] is None else settings["timeout"]):
        if has_many(job):
            _run_many(console, job, given)
        else:
            _run_one(console, job, given, rebase)


def _run_one(console: Console, job: Job, given: dict[str, Any], rebase: bool) -> None:
    """A job of one fit."""
    from .job import check_policy, fit_job, told, write_output

    result = fit_job(job, given, rebase=rebase)
    try:
        write_output(result, job.output)
    finally:
        console.out(result.summary() if job.store is None else f"{result.summary()}\n\n{told(result)}")
    check_policy(result, job.policy)
    _finish(result)


def _run_many(console: Console, job: Job, given: dict[str, Any]) -> None:
    """A job of several fits: what failed is written and told, and the status says so."""
    from .job import check_policies, fit_jobs, write_outputs

    fits = fit_jobs(job, given)
    try:
        write_outputs(fits, job.output)
    finally:
        console.out(fits.told())
    check_policies(fits, job.policy)
    if any(one.fit is None or not one.fit.converged for one in fits.fits):
        raise click.exceptions.Exit(NOT_CONVERGED)


@cli.command()
@click.argument("fit_directory", metavar="FIT", type=click.Path())
@click.option("--sql", metavar="DIALECT", help="Print a SELECT that predicts: duckdb, postgres, snowflake, bigquery or spark.")
@click.option("--source", help="The table that it reads.  [default: data]")
@click.option("--effects", type=click.Choice(["conditional", "population", "marginal"]), help="What it predicts.  [default: conditional]")
@which
@tables
@pass_console
def show(
    console: Console, /, fit_directory: str, sql: str | None, source: str | None, effects: str | None, prefix: str, **settings: Any
) -> None:
    """Print a fit that was written, or the SQL that predicts from it inside a warehouse."""
    from .result import load

    if sql is None and (source is not None or effects is not None):
        raise ConfigError("--source and --effects belong to --sql", code="usage")
    result = load(fit_directory, prefix=prefix, **_which(settings))
    text = {"source": source or "data", "effects": effects or "conditional", "prefix": prefix}
    console.out(result.summary() if sql is None else result.scoring_sql(sql, **text).rstrip())


@cli.command()
@click.argument("fit_directory", metavar="FIT", type=click.Path())
@click.argument("data", nargs=-1)
@click.option("--out", required=True, type=click.Path(), help="An HTML file; one that exists is replaced when the new one is complete.")
@click.option("--table", help="DATA is a DuckDB database; read this table of it.")
@which
@tables
@limits
@logs
@pass_console
def report(console: Console, /, fit_directory: str, out: str, prefix: str, log: str | None, **settings: Any) -> None:
    """Write a report on FIT: one page of HTML that needs nothing else, to be read, sent and printed.

    With DATA, the rows it was fitted to, the page also shows the residuals, by one scan.
    """
    from .progress import stage
    from .reporting import report as write_report

    console.log_to(log)
    _check_out(out)
    if settings["table"] is not None and not settings["data"]:
        raise ConfigError("--table names a table of DATA, which is missing", code="usage")
    data, options = _data(settings) if settings["data"] else None, _limits(settings)
    with within(settings["timeout"]), stage("report", {}, options=options):
        write_report(fit_directory, out, data=data, prefix=prefix, options=options, **_which(settings))


@cli.command()
@click.argument("fit_directory", metavar="FIT", type=click.Path())
@rows
@click.option(
    "--out", required=True, type=click.Path(),
    help="A Parquet file, or, for DATA of several files, a directory with one for each; what is there stays until the new is complete.",
)
@click.option("--effects", type=click.Choice(["conditional", "population", "marginal"]), default="conditional", show_default=True)
@click.option("--kind", type=click.Choice(["response", "link"]), default="response", show_default=True)
@click.option("--new-levels", type=click.Choice(["population", "null", "raise"]), default="population", show_default=True)
@click.option("--prefix", default="", help="Put before the names of added columns.")
@which
@limits
@logs
@pass_console
def predict(
    console: Console, /, fit_directory: str, out: str, effects: str, kind: str, new_levels: str, prefix: str, log: str | None,
    **settings: Any
) -> None:
    """Write the rows of DATA with predictions of FIT to a Parquet file, or to a directory with a file for each of DATA."""
    from .progress import Written, stage
    from .result import load
    from .scored import check_file, pieces, write_file, write_pieces

    console.log_to(log)
    _check_out(out)
    check_file(out, fit_directory, settings["data"])
    options = _limits(settings)
    result = load(fit_directory, **_which(settings))
    parts = pieces(settings["data"], out, options) if settings["table"] is None else None
    with within(settings["timeout"]), stage("predict", {}, options=options, live=Written(result.info)) as fields:
        reader = result.predict(_data(settings), effects=effects, kind=kind, new_levels=new_levels, prefix=prefix, options=options)
        if parts is None:
            write_file(reader, out)
        else:
            out = write_pieces(reader, parts, out, lambda: result.info["scored"])
        counts = result.info["scored"]
        fields |= counts
    if log != "json":
        said = f"{counts['rows']} rows, {counts['unseen_levels']} of unseen levels, {counts['null_predictions']} without prediction"
        console.say(said if parts is None else f"{said}, {len(parts)} files in {out}")


def _limits(settings: dict[str, Any]) -> Options:
    from .options import Options

    return Options(**{name: settings[name] for name in LIMITS if settings[name] is not None})


def _which(settings: dict[str, Any]) -> dict[str, Any]:
    """Which of several fits: the arguments of `mlpipe.load`."""
    values = _pairs(settings["by"], "--by", "COLUMN=VALUE")
    return {"model": settings["model"], "by": values or None}


def _model(settings: dict[str, Any]) -> dict[str, Any]:
    """The fitting function's keywords from the command's flags."""
    contrasts = _pairs(settings["contrasts"], "--contrast")
    levels = {name: value.split(",") for name, value in _pairs(settings["levels"], "--levels").items()}
    given = {name: settings[name] for name in ("family", "link", "nagq", "trials", "weights", "freq", "offset", "na")}
    given |= {"contrasts": contrasts or None, "levels": levels or None, "vcov": settings["vcov"]}
    given |= {name: settings[name] or None for name in ("cluster", "absorb", "groups")}
    given |= {name: settings[name] for name in ("corr", "time")}
    return {name: value for name, value in given.items() if value is not None}


def _function(formula: str, settings: dict[str, Any]) -> str:
    """Which function fits: the one asked for, else linear without a family, else mixed where the formula has random terms."""
    from .formula import parse

    if settings["kind"] is not None:
        return str(settings["kind"])
    if settings["groups"]:
        return "gee"
    if settings["family"] is None:
        return "ols" if settings["absorb"] else "lmm"
    return "glmm" if parse(formula).random else "glm"


def _pairs(texts: Iterable[str], flag: str, form: str = "FACTOR=VALUE") -> dict[str, str]:
    out: dict[str, str] = {}
    for name, value in (_pair(text, flag, form) for text in texts):
        if name in out:
            raise ConfigError(f"{flag} names {name!r} twice", code="usage")
        out[name] = value
    return out


def _pair(text: str, flag: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not (value or flag == "--by"):  # a value may be the empty text
        raise ConfigError(f"{flag} {text!r} is not of the form {form}", code="usage")
    return name, value


def _data(settings: dict[str, Any]) -> Any:
    from .sources import table

    paths, name = list(settings["data"]), settings["table"]
    if name is None:
        return paths[0] if len(paths) == 1 else paths
    if len(paths) > 1:
        raise ConfigError("--table reads one database", code="usage")
    return table(name, paths[0])


def _check_target(target: str, mode: str, prefix: str = "mlpipe") -> None:
    """A fit that would not be replaced is refused before the work, not after it."""
    from .store import check_target, holds_fit

    _check_out(target)
    check_target(target, prefix, mode)
    if mode == "error" and holds_fit(target, prefix):
        hint = '--overwrite, or mode = "overwrite" in a job, replaces it'
        raise ConfigError(f"{target} already holds a fit", code="target_exists", hint=hint)


def _check_out(out: str) -> None:
    if out == "-":
        raise ConfigError("standard output takes no files", code="target", hint="name a target")


def _finish(result: MixedFit) -> None:
    if not result.converged:
        raise click.exceptions.Exit(NOT_CONVERGED)


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """SIGTERM stops the work as Ctrl-C does: the engine's query is cancelled, temporary files go. Yields the signals that came."""
    came: list[int] = []

    def stop(number: int, _: Any) -> NoReturn:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _status(console: Console) -> int:
    try:
        return cli(prog_name="mlpipe", obj=console, standalone_mode=False) or 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        console.say("interrupted")
        return exit_code(KeyboardInterrupt())
    except click.ClickException as error:
        error.show()
        return exit_code(ConfigError(""))
    except Exception as error:
        return console.fail(error)


def main() -> None:
    """The entry point: errors become one message and the exit status of their class."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that the terminal's encoding lacks are written as escapes
            stream.reconfigure(errors="backslashreplace")
    gc.set_threshold(50_000, 20, 20)  # a start makes half a million objects, and none of them is garbage
    console = Console()
    with _terminable() as came, warnings_to(console):
        status = _status(console)
    gc.freeze()  # or the interpreter looks through all of them again before it ends
    sys.exit(TERMINATED if came else status)
