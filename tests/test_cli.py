"""The command line: what is printed where, exit codes, files. Mostly in this process; signals, pipes and terminals in one of its own."""
from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import mlpipe as mp
from mlpipe import cli, progress, scored
from mlpipe.solve import lmm as solver

FORMULA = "reaction ~ days + (1 + days | subject)"
ROOT = Path(__file__).parents[1]
SLEEP = str(mp.datasets.path("sleepstudy"))
CODE = "from mlpipe.cli import main; main()"


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


Invoke = Callable[..., Done]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Invoke:
    """Runs `mlpipe …` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress.LOGGER, "handlers", [])
    capsys.readouterr()

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["mlpipe", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert isinstance(stopped.value.code, int)
        return Done(stopped.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def unfinished(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that stops after one evaluation."""
    solve = solver.solve
    monkeypatch.setattr(solver, "solve", lambda problem, **given: solve(problem, **given | {"max_evaluations": 1}))


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"} | variables


def process(*arguments: str, code: str = CODE, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(**variables), timeout=60)


def written(folder: Path, formula: str = FORMULA) -> str:
    """A fit on disk."""
    mp.lmm(formula, SLEEP).write(folder / "fit")
    return str(folder / "fit")


def singular_data(folder: Path) -> str:
    """Rows whose groups all have one mean."""
    path = folder / "noise.parquet"
    pl.DataFrame({"y": [1.0, 2.0, 3.0, 4.0, 2.0, 3.0, 1.0, 4.0] * 3, "g": [i // 4 for i in range(24)]}).write_parquet(path)
    return str(path)


# ---- fit, show, plan


def test_fit_prints_lme4s_summary_and_writes(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("fit", FORMULA, SLEEP, "--out", "fit")
    assert (done.code, done.err) == (0, "")
    assert "REML criterion at convergence: 1743.6" in done.out
    shown = invoke("show", "fit")
    assert shown.code == 0 and shown.out == "\n".join(line for line in done.out.split("\n") if "Data:" not in line)
    assert mp.load("fit").fixef()["days"] == pytest.approx(10.4672859595)


def test_a_fit_that_is_there_is_refused_before_the_work(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("mlpipe.fit.lmm", None)
        refused = invoke("fit", FORMULA, SLEEP, "--out", "fit")
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "letter.txt").write_text("dear")
        other = invoke("fit", FORMULA, SLEEP, "--out", "theirs")
    assert refused.code == 2 and "already holds a fit\nhint: --overwrite" in refused.err
    assert other.code == 2 and "theirs exists and is no fit" in other.err
    assert invoke("fit", FORMULA, SLEEP, "--out", "fit", "--overwrite", "--ml").code == 0
    assert not mp.load("fit").reml


def test_estimates_that_cannot_be_written_are_printed(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = invoke("fit", FORMULA, SLEEP, "--out", "file/fit")
    assert done.code == 5 and "cannot write" in done.err and "251.405" in done.out


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        (["--ml"], {"reml": False}),
        (["--weights", "days + 1"], {"weights": "days + 1"}),
        (["--freq", "I(days > 3) + 1"], {"freq": "I(days > 3) + 1"}),
        (["--offset", "10 * days"], {"offset": "10 * days"}),
        (["--na", "raise"], {"na": "raise"}),
    ],
)
def test_flags_are_the_functions_arguments(flags: list[str], arguments: dict[str, object], invoke: Invoke) -> None:
    expected = mp.lmm("reaction ~ days + (1 | subject)", SLEEP, **arguments)  # type: ignore[arg-type]
    done = invoke("fit", "reaction ~ days + (1 | subject)", SLEEP, *flags)
    assert done.out.strip() == str(expected).strip()


def test_contrasts_and_levels(invoke: Invoke) -> None:
    cbpp = str(mp.datasets.path("cbpp"))
    done = invoke("fit", "incidence ~ period + (1 | herd)", cbpp, "--levels", "period=4,3,2,1", "--contrast", "period=sum")
    with pytest.warns(mp.SingularFitWarning):
        expected = mp.lmm("incidence ~ period + (1 | herd)", cbpp, levels={"period": ["4", "3", "2", "1"]}, contrasts={"period": "sum"})
    assert done.out.strip() == str(expected).strip()


def test_several_files_a_database_and_a_job_give_the_same(invoke: Invoke, tmp_path: Path) -> None:
    frame = pl.read_parquet(SLEEP)
    frame.head(90).write_parquet(tmp_path / "a.parquet")
    frame.tail(90).write_parquet(tmp_path / "b.parquet")
    with duckdb.connect(str(tmp_path / "d.duckdb")) as con:
        con.sql(f"create table sleep as from '{SLEEP}'")
    (tmp_path / "job.toml").write_text(f'[source]\ndatabase = "d.duckdb"\nquery = "from sleep"\n[model]\nformula = "{FORMULA}"\n')
    commands = (
        ("fit", FORMULA, SLEEP),
        ("fit", FORMULA, "a.parquet", "b.parquet"),
        ("fit", FORMULA, "[ab].parquet"),
        ("fit", FORMULA, "d.duckdb", "--table", "sleep"),
        ("run", "job.toml"),
    )
    printed = [invoke(*command) for command in commands]
    assert {done.code for done in printed} == {0}
    assert len({"".join(line for line in done.out.split("\n") if "Data:" not in line) for done in printed}) == 1


def test_plan_explains_and_shows_the_sql(invoke: Invoke) -> None:
    done = invoke("plan", FORMULA, SLEEP)
    assert done.code == 0
    for text in ("2 full passes", "memory:", "-- cross_products", "GROUP BY"):
        assert text in done.out


# ---- errors and statuses

MISTAKES: list[tuple[tuple[str, ...], int, str]] = [
    (("fit", "reaction ~ day + (1 | subject)", SLEEP), 3, "error: there is no column 'day'\nhint: did you mean 'days'?\n"),
    (("fit", "reaction ~ days + (1 | subject", SLEEP), 2, "  reaction ~ days + (1 | subject\n                    ^"),
    (("fit", "reaction ~ days", SLEEP), 2, "no random term"),
    (("fit", FORMULA, "missing.parquet"), 3, "error: no file matches missing.parquet"),
    (("fit", FORMULA), 2, "Missing argument"),
    (("fitt", FORMULA), 2, "Did you mean 'fit'?"),
    (("fit", "--treads", "2", FORMULA, SLEEP), 2, "--threads"),
    (("fit", FORMULA, SLEEP, "--memory-limit", "1MB"), 5, "cannot hold the plan"),
    (("fit", FORMULA, SLEEP, "--memory-limit", "lots"), 2, "not an amount of memory"),
    (("fit", FORMULA, SLEEP, "--threads", "0"), 2, "whole number from 1"),
    (("fit", FORMULA, SLEEP, "--contrast", "days"), 2, "FACTOR=VALUE"),
    (("fit", FORMULA, SLEEP, SLEEP, "--table", "t"), 2, "one database"),
    (("show", "nowhere"), 3, "error: there is no fit in nowhere"),
    (("predict", "nowhere", SLEEP, "--out", "p.parquet"), 3, "no fit in nowhere"),
    (("fit", FORMULA, SLEEP, "--overwrite"), 2, "--overwrite belongs to --out"),
    (("fit", FORMULA, SLEEP, "--out", "-"), 2, "standard output takes no files"),
    (("fit", FORMULA, SLEEP, "--out", SLEEP), 2, "exists and is no fit"),
    (("fit", FORMULA, SLEEP, "--table", "t"), 3, "sleepstudy.parquet is not a DuckDB database"),
    (("fit", "subject ~ days + (1 | days)", SLEEP), 3, "the response subject is not numeric\nhint: it is read as text"),
    (("report", "nowhere", "--out", "r.html", "--table", "t"), 2, "--table names a table of DATA, which is missing"),
    (("show", "nowhere", "--by", "a=1", "--by", "a=2"), 2, "--by names 'a' twice"),
    (("fit", FORMULA, SLEEP, "--levels", "a=1,2", "--levels", "a=2,1"), 2, "--levels names 'a' twice"),
    (("show", "nowhere", "--effects", "marginal"), 2, "--source and --effects belong to --sql"),
    (("run", "nowhere.toml"), 2, "cannot read the job nowhere.toml"),
    ((), 2, "Usage: mlpipe"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES)
def test_a_mistake_is_one_message_and_a_status(arguments: tuple[str, ...], code: int, message: str, invoke: Invoke, tmp_path: Path) -> None:
    done = invoke(*arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_help_and_version(invoke: Invoke) -> None:
    assert invoke("--version") == (0, f"mlpipe, version {mp.__version__}\n", "")
    for command in ("fit", "plan", "run", "show", "predict"):
        done = invoke(command, "--help")
        assert done.code == 0 and done.out.startswith(f"Usage: mlpipe {command}")


def test_a_fit_that_did_not_converge_is_written_marked_and_status_4(invoke: Invoke, unfinished: None) -> None:
    done = invoke("fit", FORMULA, SLEEP, "--out", "fit")
    assert done.code == 4
    assert "note: NOT CONVERGED" in done.out and done.err.startswith("warning: the fit did not converge")
    assert not mp.load("fit").converged
    assert "note: NOT CONVERGED" in invoke("show", "fit").out


def test_a_mistake_of_ours_shows_its_traceback(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlpipe.fit.lmm", lambda *_, **__: 1 / 0)
    done = invoke("fit", FORMULA, SLEEP)
    assert done.code == 5 and "Traceback" in done.err and "error: a bug in mlpipe: ZeroDivisionError" in done.err


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device")])
def test_a_machine_that_gives_out_is_status_5(error: BaseException, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mlpipe.fit.lmm", fail)
    done = invoke("fit", FORMULA, SLEEP)
    assert done.code == 5 and done.err.startswith("error: ") and "Traceback" not in done.err


# ---- generalized models

CBPP = str(mp.datasets.path("cbpp"))
COUNTS = "cbind(incidence, size - incidence) ~ period"
MIXED = f"{COUNTS} + (1 | herd)"


@pytest.mark.parametrize(
    ("formula", "flags", "expected"),
    [
        (MIXED, ["--nagq", "5"], lambda: mp.glmm(MIXED, CBPP, family="binomial", nagq=5)),
        (MIXED, ["--link", "probit"], lambda: mp.glmm(MIXED, CBPP, family="binomial", link="probit")),
        (
            "I(incidence / size) ~ period + (1 | herd)",
            ["--trials", "size"],
            lambda: mp.glmm("I(incidence / size) ~ period + (1 | herd)", CBPP, family="binomial", trials="size"),
        ),
        (COUNTS, [], lambda: mp.glm(COUNTS, CBPP, family="binomial")),
        (COUNTS, ["--cluster", "herd"], lambda: mp.glm(COUNTS, CBPP, family="binomial", cluster="herd")),
        (COUNTS, ["--cluster", "herd", "--cluster", "period"], lambda: mp.glm(COUNTS, CBPP, family="binomial", cluster=["herd", "period"])),
    ],
)
def test_a_family_makes_it_generalized(formula: str, flags: list[str], expected: Callable[[], object], invoke: Invoke) -> None:
    done = invoke("fit", formula, CBPP, "--family", "binomial", *flags)
    assert (done.code, done.err) == (0, "")
    assert done.out.strip() == str(expected()).strip()


@pytest.mark.parametrize(("formula", "kind"), [(MIXED, "GLMMFit"), (COUNTS, "GLMFit")])
@pytest.mark.parametrize("target", ["fit", "fit.duckdb"])
def test_generalized_fits_are_written_shown_and_predict(formula: str, kind: str, target: str, invoke: Invoke) -> None:
    done = invoke("fit", formula, CBPP, "--family", "binomial", "--out", target)
    assert (done.code, done.err) == (0, "") and type(mp.load(target)).__name__ == kind
    assert invoke("show", target).out == "\n".join(line for line in done.out.split("\n") if "Data:" not in line)
    again = invoke("fit", formula, CBPP, "--family", "binomial", "--out", target)
    assert (again.code, again.out) == (2, "") and f"{target} already holds a fit" in again.err
    given = mp.load(target)
    for effects in ("conditional", "population", "marginal"):
        done = invoke("predict", target, CBPP, "--out", "p.parquet", "--effects", effects)
        assert done.code == 0 and done.err.startswith("56 rows")
        expected = pl.DataFrame(given.predict(CBPP, effects=effects))
        assert pl.read_parquet("p.parquet").equals(expected)
    assert invoke("predict", target, CBPP, "--out", "p.parquet", "--kind", "link", "--effects", "population").code == 0
    link = pl.read_parquet("p.parquet")["predicted"].to_numpy()
    mean = pl.DataFrame(given.predict(CBPP, effects="population"))["predicted"].to_numpy()
    assert 1 / (1 + 2.718281828459045 ** -link) == pytest.approx(mean)


def test_a_checkpoint_is_kept_and_gone_on_from(invoke: Invoke) -> None:
    flags = ("--family", "binomial", "--checkpoint", "state.json")
    first = invoke("fit", MIXED, CBPP, *flags)
    assert first.code == 0 and json.loads(Path("state.json").read_text())["steps"] > 0
    assert invoke("fit", MIXED, CBPP, *flags).code == 0
    refused = invoke("fit", MIXED, CBPP, *flags, "--nagq", "3")
    assert refused.code == 2 and "checkpoint state.json is of another model" in refused.err


def test_a_plan_of_a_generalized_model(invoke: Invoke) -> None:
    done = invoke("plan", MIXED, CBPP, "--family", "binomial", "--nagq", "5")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{mp.plan('glmm', MIXED, CBPP, family='binomial', nagq=5)}\n"
    assert "nagq:    5 with 1 random effect a block: 5 nodes\nparams:  4 fixed, 1 of the random part\n" in done.out
    assert "spool:   at most 56 rows, ordered by block" in done.out
    assert "MB of spool in memory, a quarter of the limit being 500 MB" in done.out
    plain = invoke("plan", COUNTS, CBPP, "--family", "quasibinomial", "--memory-limit", "400MB")
    assert plain.code == 0 and "params:  4 fixed\n" in plain.out and "nagq" not in plain.out and "of the limit being 100 MB" in plain.out


@pytest.mark.parametrize(
    ("formula", "flags", "message"),
    [
        (MIXED, ["--nagq", "3"], "nagq does not belong to lmm\nhint: it is for glmm"),
        (MIXED, ["--family", "binomal"], "did you mean 'binomial'?"),
        (MIXED, ["--family", "binomial", "--link", "lgoit"], "did you mean 'logit'?"),
        (MIXED, ["--family", "binomial", "--absorb", "herd"], "absorb does not belong to glmm\nhint: it is for ols"),
        (MIXED, ["--family", "binomial", "--nagq", "0"], "nagq = 0"),
        (MIXED, ["--family", "binomial", "--ml"], "reml does not belong to glmm\nhint: it is for lmm"),
        (COUNTS, ["--family", "binomial", "--nagq", "3"], "nagq does not belong to glm\nhint: it is for glmm"),
        (COUNTS, ["--family", "binomial", "--checkpoint", "c"], "checkpoint does not belong to glm"),
        (MIXED, ["--family", "quasibinomial"], "family = 'quasibinomial' is not known"),
        (MIXED, ["--family", "binomial", "--weights", "size"], "trials= for numbers of trials"),
    ],
)
def test_flags_of_another_kind_of_model_are_refused(formula: str, flags: list[str], message: str, invoke: Invoke) -> None:
    done = invoke("fit", formula, CBPP, *flags)
    assert (done.code, done.out) == (2, "") and message in done.err
    if not {"--ml", "--checkpoint"} & set(flags):
        planned = invoke("plan", formula, CBPP, *flags)
        assert (planned.code, planned.out) == (2, "") and message in planned.err


def test_a_generalized_fit_that_did_not_converge_is_status_4(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    options = mp.Options
    monkeypatch.setattr("mlpipe.options.Options", lambda **given: options(max_passes=2, **given))
    done = invoke("fit", MIXED, CBPP, "--family", "binomial", "--out", "fit")
    assert done.code == 4 and "note: NOT CONVERGED" in done.out and not mp.load("fit").converged


def test_a_policy_against_separation(invoke: Invoke, tmp_path: Path) -> None:
    x = [i / 10 for i in range(-20, 20)]
    pl.DataFrame({"x": x, "y": [value > 0 for value in x]}).write_parquet(tmp_path / "separated.parquet")
    model = '[model]\nkind = "glm"\nformula = "y ~ x"\nfamily = "binomial"\n'
    text = f'[source]\npath = "separated.parquet"\n{model}[output]\ntarget = "out"\n[policy]\nforbid = ["separation"]\n'
    (tmp_path / "job.toml").write_text(text)
    done = invoke("run", "job.toml")
    assert done.code == 4 and "the job's policy forbids this result: separation" in done.err
    assert mp.load("out").info["separation"]


# ---- limits: flag, variable, job, default


def test_precedence(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(*arguments: str) -> tuple[object, object]:
        assert invoke(*arguments).code == 0
        return used[-1].memory_limit, used[-1].threads

    def lmm(*_: object, options: mp.Options, **__: object) -> mp.LMMFit:
        used.append(options)
        return fit

    used: list[mp.Options] = []
    fit = mp.lmm(FORMULA, SLEEP)
    monkeypatch.setattr("mlpipe.fit.lmm", lmm)
    job = tmp_path / "job.toml"
    job.write_text(f'[source]\npath = "{SLEEP}"\n[model]\nformula = "{FORMULA}"\n[limits]\nmemory_limit = "3GB"\nthreads = 3\n')
    assert seen("fit", FORMULA, SLEEP) == (None, None)
    assert seen("run", "job.toml") == ("3GB", 3)
    monkeypatch.setenv("MLPIPE_MEMORY_LIMIT", "4GB")
    assert seen("fit", FORMULA, SLEEP) == ("4GB", None)
    assert seen("run", "job.toml") == ("4GB", 3)
    assert seen("run", "job.toml", "--memory-limit", "5GB", "--threads", "2") == ("5GB", 2)
    monkeypatch.setenv("MLPIPE_THREADS", "")
    assert seen("run", "job.toml") == ("4GB", 3)
    monkeypatch.setenv("MLPIPE_THREADS", "many")
    refused = invoke("run", "job.toml")
    assert refused.code == 2 and "MLPIPE_THREADS" in refused.err


# ---- log and warnings


def test_log_lines_are_json_on_request(invoke: Invoke) -> None:
    done = invoke("fit", FORMULA, SLEEP, "--log", "json")
    lines = [json.loads(line) for line in done.err.splitlines()]
    assert [line["stage"] for line in lines] == ["cross_products", "blocks", "solve"]
    assert lines[0]["rows"] == 180 and lines[1]["blocks"] == 18 and all(line["seconds"] >= 0 for line in lines)
    assert "251.405" in done.out


def test_log_lines_as_text(invoke: Invoke) -> None:
    lines = invoke("fit", FORMULA, SLEEP, "--log", "text").err.splitlines()
    assert len(lines) == 3 and all(line.startswith("time=") for line in lines) and "stage=solve" in lines[2]


def test_everything_in_a_json_log_is_an_object(invoke: Invoke, tmp_path: Path) -> None:
    data = singular_data(tmp_path)
    done = invoke("fit", "y ~ 1 + (1 | g)", data, "--log", "json")
    assert json.loads(done.err.splitlines()[-1])["warning"] == "SingularFitWarning"
    failed = json.loads(invoke("fit", "y ~ x + (1 | g)", data, "--log", "json").err.splitlines()[-1])
    assert failed["error"] == "column_not_found" and failed["message"] == "there is no column 'x'"


def test_warnings_are_lines_on_standard_error(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("fit", "y ~ 1 + (1 | g)", singular_data(tmp_path))
    assert done.code == 0 and done.err == "warning: the fit is singular: a random-effects covariance is on the boundary\n"
    assert "note: boundary (singular) fit" in done.out


# ---- jobs


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_jobs_run_as_they_are(path: Path, invoke: Invoke, tmp_path: Path) -> None:
    for name in ("mlpipe", "configs"):  # the top of the checkout, but for what a job writes
        (tmp_path / name).symlink_to(ROOT / name)
    done = invoke("run", f"configs/{path.name}")
    assert (done.code, done.err) == (0, "") and "Random effects:" in done.out
    assert list((tmp_path / "results").glob("*/fit.json"))


def test_a_policy_fails_the_job_after_writing(invoke: Invoke, tmp_path: Path) -> None:
    data = pl.read_parquet(singular_data(tmp_path)).with_columns(y=pl.when(pl.int_range(24) == 5).then(None).otherwise("y"), x=1.0)
    data.write_parquet(tmp_path / "noise.parquet")
    policy = '[policy]\nforbid = ["singular", "rank", "nonconvergence"]\nmax_drop_fraction = 0.01\n'
    text = f'[source]\npath = "noise.parquet"\n[model]\nformula = "y ~ x + (1 | g)"\n[output]\ntarget = "out"\n{policy}'
    (tmp_path / "job.toml").write_text(text)
    done = invoke("run", "job.toml")
    assert done.code == 4 and "Random effects:" in done.out
    assert "the job's policy forbids this result: singular, rank, 4.17% of the rows were dropped, 1.00% may be" in done.err
    assert mp.load("out").singular


def test_a_job_that_does_not_converge(invoke: Invoke, tmp_path: Path, unfinished: None) -> None:
    text = f'[source]\npath = "{SLEEP}"\n[model]\nformula = "{FORMULA}"\n[output]\ntarget = "out"\n'
    (tmp_path / "job.toml").write_text(text)
    assert invoke("run", "job.toml").code == 4
    (tmp_path / "job.toml").write_text(text + 'mode = "append"\n[policy]\nforbid = ["nonconvergence"]')
    done = invoke("run", "job.toml")
    assert done.code == 4 and "forbids this result: nonconvergence" in done.err


# ---- predict


def test_predict_writes_every_row_in_order(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("predict", written(tmp_path), SLEEP, "--out", "p.parquet")
    assert done == (0, "", "180 rows, 0 of unseen levels, 0 without prediction\n")
    scored = pl.read_parquet("p.parquet")
    assert scored.drop("predicted").equals(pl.read_parquet(SLEEP))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit", "p.parquet"]
    again = invoke("predict", "fit", "p.parquet", "--out", "q.parquet", "--prefix", "fixed_", "--effects", "population")
    assert again.code == 0 and pl.read_parquet("q.parquet").columns[-2:] == ["predicted", "fixed_predicted"]
    assert invoke("predict", "fit", SLEEP, "--out", "q.parquet").code == 0 and pl.read_parquet("q.parquet").equals(scored)


@pytest.mark.parametrize("target", ["out", "out.duckdb"])
def test_one_of_many_fits_is_shown_and_predicts(target: str, invoke: Invoke, tmp_path: Path) -> None:
    rows = pl.read_parquet(SLEEP).with_columns(half=pl.when(pl.col("days") < 5).then(pl.lit("early")).otherwise(pl.lit("late")))
    rows.write_parquet(tmp_path / "rows.parquet")
    (tmp_path / "job.toml").write_text(
        '[source]\npath = "rows.parquet"\n[model]\nformula = "reaction ~ days + (1 | subject)"\nby = ["half"]\n'
        f'[output]\ntarget = "{target}"\n'
    )
    assert invoke("run", "job.toml").code == 0
    assert invoke("show", target).code == 2 and "holds 2 fits\nhint: name one: model=" in invoke("show", target).err
    late = mp.load(tmp_path / target, by={"half": "late"})
    assert invoke("show", target, "--by", "half=late") == (0, late.summary() + "\n", "")
    assert invoke("predict", target, "rows.parquet", "--by", "half=late", "--out", "p.parquet").code == 0
    expected = [value for batch in late.predict(rows) for value in batch.column("predicted").to_pylist()]
    assert pl.read_parquet("p.parquet")["predicted"].to_list() == expected
    assert "0 of them match" in invoke("show", target, "--by", "half=").err
    assert invoke("show", target, "--by", "half").code == 2 and invoke("show", target, "--model", "other").code == 2


def test_reports_keep_to_their_time(invoke: Invoke, tmp_path: Path) -> None:
    fit = written(tmp_path)
    done = invoke("report", fit, "--out", "r.html", "--timeout", "soon")
    assert done.code == 2 and "'soon' is not a length of time" in done.err and not (tmp_path / "r.html").exists()


def test_unseen_levels(invoke: Invoke, tmp_path: Path) -> None:
    pl.DataFrame({"days": [1.0, 2.0], "subject": ["308", "new"]}).write_csv(tmp_path / "new.csv", quote_style="non_numeric")
    fit = written(tmp_path)
    assert "1 of unseen levels, 0 without" in invoke("predict", fit, "new.csv", "--out", "p.parquet").err
    assert "1 of unseen levels, 1 without" in invoke("predict", fit, "new.csv", "--out", "p.parquet", "--new-levels", "null").err
    before = (tmp_path / "p.parquet").read_bytes()
    refused = invoke("predict", fit, "new.csv", "--out", "p.parquet", "--new-levels", "raise")
    assert refused.code == 3 and "has not seen" in refused.err
    assert (tmp_path / "p.parquet").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit", "new.csv", "p.parquet"]


@pytest.mark.parametrize("out", ["no/p.parquet", "folder", "/dev/null"])
def test_a_target_that_cannot_be_written(out: str, invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    done = invoke("predict", written(tmp_path), SLEEP, "--out", out)
    assert done.code == 5 and done.err.startswith("error: cannot write") and "Traceback" not in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fit", "folder"]
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


def test_a_link_stays_and_its_target_is_replaced(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "real.parquet").write_text("old")
    (tmp_path / "link.parquet").symlink_to("real.parquet")
    assert invoke("predict", written(tmp_path), SLEEP, "--out", "link.parquet").code == 0
    assert (tmp_path / "link.parquet").is_symlink() and pl.read_parquet(tmp_path / "real.parquet").height == 180


def test_predictions_stream_in_large_row_groups(tmp_path: Path) -> None:
    """The file is written while rows come, and a type that Parquet has not is an error that leaves nothing."""
    batch = pa.record_batch({"x": list(range(50_000))})
    scored.write_file(pa.RecordBatchReader.from_batches(batch.schema, iter([batch] * 7)), str(tmp_path / "p.parquet"))
    data = pq.ParquetFile(tmp_path / "p.parquet").metadata
    assert [data.row_group(i).num_rows for i in range(data.num_row_groups)] == [150_000, 150_000, 50_000]
    odd = pa.record_batch({"x": pa.array([None], pa.month_day_nano_interval())})
    with pytest.raises(mp.DataError, match="cannot write"):
        scored.write_file(pa.RecordBatchReader.from_batches(odd.schema, iter([odd])), str(tmp_path / "odd.parquet"))
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


# ---- terminals, pipes, signals


def test_the_entry_point_in_a_pipe() -> None:
    done = process("fit", FORMULA, SLEEP)
    assert (done.returncode, done.stderr) == (0, "") and "251.405" in done.stdout


def test_the_package_is_the_command_too() -> None:
    command = [sys.executable, "-m", "mlpipe", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, env=environment()).stdout == f"mlpipe, version {mp.__version__}\n"


@pytest.mark.parametrize("command", ["plan", "fit"])
def test_a_reader_that_leaves_is_no_error(command: str) -> None:
    pipe = f"set -o pipefail; {sys.executable} -c '{CODE}' {command} '{FORMULA}' {SLEEP} | true"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_standard_output() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", CODE, "fit", FORMULA, SLEEP]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    assert (done.returncode, done.stderr) == (5, "error: cannot write to standard output: No space left on device\n")


def test_names_that_the_encoding_lacks() -> None:
    done = process("fit", "大きさ ~ 1 + (1 | g)", SLEEP, PYTHONIOENCODING="latin-1")
    assert done.returncode == 3 and "\\u5927" in done.stderr and "Traceback" not in done.stderr


def slow_job(folder: Path) -> str:
    """A job whose first query takes minutes."""
    with duckdb.connect(str(folder / "d.duckdb")) as con:
        con.sql("create table t as select 1 as a")
    (folder / "spill").mkdir()
    query = "select i % 97 as g, i % 13 as x, i % 1009 as y from range(40000000000) r(i)"
    source = f'[source]\ndatabase = "{folder}/d.duckdb"\nquery = "{query}"\n[model]\nformula = "y ~ x + (1 | g)"\n'
    rest = f'[output]\ntarget = "{folder}/out"\n[limits]\nthreads = 1\ntemp_directory = "{folder}/spill"\n'
    (folder / "job.toml").write_text(source + rest)
    return str(folder / "job.toml")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_cancels_the_query_and_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, "run", slow_job(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as running:
        began = time.monotonic()
        while not list((tmp_path / "spill").iterdir()) and time.monotonic() - began < 30:
            time.sleep(0.05)
        time.sleep(0.5)
        running.send_signal(number)
        out, err = running.communicate(timeout=15)
    assert (running.returncode, out, err.strip()) == (code, "", "interrupted")
    assert not list((tmp_path / "spill").iterdir()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [(), ("--timeout", "2s")])
def test_a_timeout_cancels_the_query_and_leaves_nothing(given: tuple[str, ...], tmp_path: Path) -> None:
    """The job's own, and an option that wins over it."""
    path = Path(slow_job(tmp_path))
    path.write_text(path.read_text() + f"timeout = {'2' if not given else '600'}\n")
    done = process("run", str(path), *given, "--log", "json")
    assert (done.returncode, done.stdout) == (5, "")
    said = json.loads(done.stderr.splitlines()[-1])
    assert said["error"] == "timeout" and said["message"] == f"the timeout of {'2s' if given else '2 s'} is over"
    assert not list((tmp_path / "spill").iterdir()) and not (tmp_path / "out").exists()


def test_a_timeout_that_is_none(invoke: Invoke) -> None:
    done = invoke("fit", FORMULA, SLEEP, "--timeout", "soon")
    assert (done.code, done.err) == (2, "error: 'soon' is not a length of time\nhint: write for example 90, \"45min\" or \"2h\"\n")
    assert invoke("fit", FORMULA, SLEEP, "--timeout", "5min").code == 0


def on_terminal(code: str, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit status of a process and what it wrote on the terminal that is its standard error."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment(**variables)) as running:
        os.close(theirs)
        text = b""
        while select.select([ours], [], [], 30)[0]:
            try:
                text += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    return running.returncode, text.decode()


IMPATIENT = "from mlpipe import progress; progress.PATIENCE = 0; "


def test_progress_on_a_terminal() -> None:
    code, text = on_terminal(IMPATIENT + CODE, "fit", FORMULA, SLEEP)
    assert code == 0 and "\r\x1b[Kcross products 0 s" in text
    assert text.endswith("\r\x1b[K") and "\n" not in text


def test_an_iterative_fit_tells_passes_and_objective_on_a_terminal() -> None:
    slow = "import time; told = progress.Watch.told; progress.Watch.told = lambda *a: (told(*a), time.sleep(0.05)); progress.TICK = 0.01; "
    code, text = on_terminal(IMPATIENT + slow + CODE, "fit", MIXED, str(mp.datasets.path("cbpp")), "--family", "binomial")
    lines = text.split("\r\x1b[K")
    fits = [line for line in lines if line.startswith("fit ")]
    assert code == 0 and lines[-1] == "" and max(map(len, lines)) < 80
    assert any(re.fullmatch(r"fit 0 s(, about 0 s left)?, evaluation \d+, \d+\.\d passes, -2 log L 18[45]\.\d\d", line) for line in fits)
    assert any(line.startswith("spool 0 s") and "56 rows" in line for line in lines)


TOLD = [
    ("exact", lambda **k: mp.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", mp.datasets.path("penicillin"), method="exact", **k)),
    ("iterative", lambda **k: mp.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", mp.datasets.path("penicillin"), method="iterative", **k)),
    ("glmm", lambda **k: mp.glmm(MIXED, mp.datasets.path("cbpp"), family="binomial", **k)),
    ("glm", lambda **k: mp.glm(MIXED.split(" + (")[0], mp.datasets.path("cbpp"), family="binomial", **k)),
    ("gee", lambda **k: mp.gee(MIXED.split(" + (")[0], mp.datasets.path("cbpp"), groups="herd", family="binomial", **k)),
]


@pytest.mark.parametrize(("kind", "fitted"), TOLD, ids=[kind for kind, _ in TOLD])
def test_fits_tell_their_evaluations(kind: str, fitted: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    told = progress.Watch.told

    def recorded(watch: progress.Watch, loglik: float = math.nan) -> None:
        told(watch, loglik)
        seen.append(loglik + watch.constant)

    monkeypatch.setattr(progress.Watch, "told", recorded)
    fit = fitted()
    assert fit.evaluations - 2 <= len(seen) <= fit.evaluations + 1  # looks at the exact second derivatives have no likelihood
    if kind in ("exact", "glmm", "glm"):
        assert seen[-1] == pytest.approx(fit.loglik, abs=1e-5)


def test_the_time_left_of_an_iterative_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    watch = progress.Watch(lambda: now[0] / 50.0, constant=100.0, expected=4)
    assert watch(0.0) == (("evaluation 1", "0.0 passes"), None)
    now[0] = 110.0
    watch.told(-717.25)
    now[0] = 115.0
    assert watch(15.0) == (("evaluation 2", "0.3 passes", "-2 log L 1,234.50"), 25.0)
    now[0] = 190.0
    assert watch(90.0).left == 0.0
    for _ in range(3):
        watch.told(float("nan"))
    assert watch(90.0) == (("evaluation 5", "1.8 passes"), None)  # beyond what is usual nothing is guessed


def test_the_time_left_of_predictions() -> None:
    info: dict[str, object] = {}
    written = progress.Written(info)
    assert written(1.0) == (("0 rows",), None)
    info |= {"rows_to_score": 100, "scored": {"rows": 20}}
    assert written(9.0) == (("20 of 100 rows",), None)
    info["scored"] = {"rows": 60}
    assert written(11.0) == (("60 of 100 rows",), 2.0)


@pytest.mark.parametrize(("seconds", "told"), [(3.4, "3 s"), (187.0, "3:07 min"), (5999.0, "99:59 min"), (7380.0, "2:03 h")])
def test_lengths_of_time_as_they_are_shown(seconds: float, told: str) -> None:
    assert progress._line("a_b", seconds, progress.Live(), 80) == f"a b {told}"


def test_no_progress_of_a_quick_fit_nor_on_a_dumb_terminal() -> None:
    assert on_terminal(CODE, "fit", FORMULA, SLEEP) == (0, "")
    assert on_terminal(IMPATIENT + CODE, "fit", FORMULA, SLEEP, TERM="dumb") == (0, "")


def test_no_progress_in_a_pipe() -> None:
    assert process("fit", FORMULA, SLEEP, code=IMPATIENT + CODE).stderr == ""


def test_the_line_tells_the_share_and_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def progress(self) -> float:
            return 0.25

    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    seconds: dict[str, float] = {}
    with progress.stage("block_sums", seconds, Engine(), mp.Options(progress=True), rows=400) as fields:  # type: ignore[arg-type]
        time.sleep(0.05)
        fields["rows"] = 3
    assert "block sums 0 s, about 0 s left, 100 of 400 rows, 25%" in capsys.readouterr().err
    assert seconds["block_sums"] >= 0.05
    with progress.stage("silent", seconds, options=mp.Options(progress=False)):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
