"""Job files: what is accepted, and how each mistake is named."""
from __future__ import annotations

from pathlib import Path

import pytest

import mlpipe as mp
from mlpipe.job import Job, check_policy, data_of, fit_job, read_job, write_output
from mlpipe.sources import PathSource, Query, Table

SLEEP = str(mp.datasets.path("sleepstudy"))
SOURCE = '[source]\npath = "x.parquet"\n'
MODEL = '[model]\nformula = "y ~ x + (1 | g)"\n'


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return tmp_path / "job.toml"


def read(job: Path, text: str) -> Job:
    job.write_text(text, encoding="utf-8")
    return read_job(job)


def mistake(job: Path, text: str) -> mp.ConfigError:
    """The error of a job, whose message must start with its path."""
    with pytest.raises(mp.ConfigError) as caught:
        read(job, text)
    assert caught.value.message.startswith(str(job))
    return caught.value


UNKNOWN = [
    (SOURCE + MODEL + "[outputs]\n", "outputs", "output"),
    ("[sources]\n" + MODEL, "sources", "source"),
    (SOURCE + "[modell]\n", "modell", "model"),
    (SOURCE + "tabel = 'x'\n" + MODEL, "source.tabel", "table"),
    (SOURCE + MODEL + "remll = true\n", "model.remll", "reml"),
    (SOURCE + MODEL + '[output]\ntarget = "x"\nmod = "error"\n', "output.mod", "mode"),
    (SOURCE + MODEL + "[limits]\nthread = 1\n", "limits.thread", "threads"),
    (SOURCE + MODEL + "[policy]\nforbidden = []\n", "policy.forbidden", "forbid"),
]


@pytest.mark.parametrize(("text", "key", "meant"), UNKNOWN)
def test_unknown_keys_are_named_with_what_was_meant(text: str, key: str, meant: str, job: Path) -> None:
    error = mistake(job, text)
    assert (error.code, error.hint) == ("unknown_key", f"did you mean {meant!r}?")
    assert error.message.endswith(f": unknown key {key}")


def test_an_unknown_key_like_no_other_lists_the_known(job: Path) -> None:
    hint = mistake(job, SOURCE + MODEL + '[output]\ntarget = "x"\nqqq = 1').hint
    assert hint == "known: 'target', 'prefix', 'mode', 'ranef', 'scoring_sql'"


WRONG = [
    ("", "[source] is missing"),
    (SOURCE, "[model] is missing"),
    (SOURCE + "[model]\nreml = true", "[model] needs formula"),
    (SOURCE + MODEL + '[output]\nprefix = "x"', "[output] needs target"),
    ("source = 3\n" + MODEL, "source = 3: it must be a table"),
    ("[source]\npath = 3\n" + MODEL, "source.path = 3: it must be text in quotes or a list of such"),
    ('[source]\npath = ["a", 3]\n' + MODEL, "source.path = ['a', 3]: it must be text in quotes or a list of such"),
    (SOURCE + '[model]\nformula = "y ~ 1"\nreml = "yes"', "model.reml = 'yes': it must be true or false"),
    (SOURCE + '[model]\nformula = "y ~ 1"\nlevels = {a = "b"}', "model.levels.a = 'b': it must be a list"),
    (SOURCE + '[model]\nformula = "y ~ 1"\ncontrasts = {a = 1}', "model.contrasts.a = 1: it must be text in quotes"),
    (SOURCE + '[model]\nformula = "y ~ 1"\nna = "keep"', "model.na = 'keep': it should be 'drop' or 'raise'"),
    (SOURCE + MODEL + '[output]\ntarget = "x"\nmode = "replace"', "output.mode = 'replace': it should be 'error', 'overwrite' or 'append'"),
    (SOURCE + MODEL + '[limits]\nthreads = "2"', "limits.threads = '2': it must be a whole number"),
    (SOURCE + MODEL + "[limits]\nthreads = true", "limits.threads = True: it must be a whole number"),
    (SOURCE + MODEL + "[limits]\nmemory_limit = 1.5", "limits.memory_limit = 1.5: it must be text in quotes or a whole number"),
    (SOURCE + MODEL + "[limits]\ntimeout = true", "limits.timeout = True: it must be text in quotes or a number"),
    (SOURCE + MODEL + '[policy]\nforbid = "singular"', "policy.forbid = 'singular': it must be a list"),
    (SOURCE + MODEL + "[policy]\nmax_drop_fraction = 2", "policy.max_drop_fraction = 2: it should be less than or equal to 1"),
    (SOURCE + MODEL + "[policy]\nmax_drop_fraction = nan", "policy.max_drop_fraction = nan: it should be less than or equal to 1"),
    (SOURCE + '[model]\nformula = "y ~ 1"\nfamily = "poisson"', "[model] family does not belong to lmm"),
    (SOURCE + '[model]\nformula = "y ~ 1"\nkind = "glm"', "[model] glm needs a family"),
    (SOURCE + '[model]\nformula = "y ~ 1"\nkind = "glm"\nfamily = "poisson"\nnagq = 2', "[model] nagq does not belong to glm"),
    (SOURCE + '[model]\nformula = "y ~ 1"\nkind = "glmm"\nfamily = "poisson"\nreml = false', "[model] reml does not belong to glmm"),
    (SOURCE + '[model]\nformula = "y ~ 1"\nkind = "glmm"\nfamily = "poisson"\ngroups = "g"', "[model] groups does not belong to glmm"),
    (SOURCE + '[model]\nformula = "y ~ 1"\nkind = "gee"', "[model] gee needs groups"),
    (SOURCE + '[model]\nformula = "y ~ 1"\nkind = "ols"\nfamily = "poisson"', "[model] family does not belong to ols"),
    (SOURCE + MODEL + '[output]\ntarget = ""', "output.target = '': it must be text that is not empty"),
    (SOURCE + MODEL + '[store]\npath = ""', "store.path = '': it must be text that is not empty"),
    (SOURCE + MODEL + '[store]\npath = "t/s"\n[output]\ntarget = "./t"', "store.path lies in output.target"),
    (SOURCE + MODEL + 'by = ["r", "r"]', "by names 'r' twice"),
    (SOURCE + '[model]\nformula = "y ~ 1"\ncluster = 3', "model.cluster = 3: it must be text in quotes or a list of such"),
    ("[source]\n" + MODEL, "[source] needs path, or database with table or query"),
    ('[source]\ndatabase = "d"\n' + MODEL, "[source] needs path, or database with table or query"),
    ('[source]\npath = "p"\ndatabase = "d"\n' + MODEL, "[source] needs path, or database with table or query"),
    ('[source]\ndatabase = "d"\ntable = "t"\nquery = "q"\n' + MODEL, "[source] needs path, or database with table or query"),
    ('[source]\ntable = "t"\n' + MODEL, "[source] needs path, or database with table or query"),
    ('[source]\ndatabase = "d"\ntable = "t"\ntypes = {a = "INT"}\n' + MODEL, "source.types is for CSV and JSON files"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_wrong_values_are_named_with_what_is_wanted(text: str, message: str, job: Path) -> None:
    assert mistake(job, text).message == f"{job}: {message}"


def test_files_that_are_no_jobs(job: Path, tmp_path: Path) -> None:
    assert "is not a TOML file" in mistake(job, "[source").message
    job.write_bytes(b"\xff\xfe")
    with pytest.raises(mp.ConfigError, match="is not a TOML file"):
        read_job(job)
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(mp.ConfigError, match="cannot read the job") as caught:
            read_job(path)
        assert caught.value.code == "job_file"


def test_a_byte_order_mark_is_no_mistake(job: Path) -> None:
    assert read(job, "\ufeff" + SOURCE + MODEL).source.path == "x.parquet"


def test_variables_are_expanded_in_source_and_output_only(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPIPE_TEST_PLACE", "/data/${HOME}")
    source = '[source]\npath = ["${MLPIPE_TEST_PLACE}/a", "b"]\n[output]\ntarget = "${MLPIPE_TEST_PLACE}/out"\n'
    found = read(job, source + '[model]\nformula = "y ~ `${MLPIPE_TEST_PLACE}`"\nweights = "${NOWHERE}"')
    assert found.source.path == ["/data/${HOME}/a", "b"]  # what a variable holds is not expanded again
    assert found.output is not None and found.output.target == "/data/${HOME}/out"
    assert (found.model.formula, found.model.weights) == ("y ~ `${MLPIPE_TEST_PLACE}`", "${NOWHERE}")
    with pytest.raises(mp.ConfigError, match=r"\$\{MLPIPE_TEST_UNSET\}") as caught:
        read(job, SOURCE.replace("x.parquet", "${MLPIPE_TEST_UNSET}/x") + MODEL)
    assert caught.value.code == "environment"


def test_sources(job: Path) -> None:
    def data(text: str) -> object:
        return data_of(read(job, f"[source]\n{text}\n{MODEL}").source)

    assert data('path = "a/*.parquet"') == "a/*.parquet"
    assert data('path = ["a", "b"]') == ["a", "b"]
    assert data('path = "a.csv"\ntypes = {x = "DOUBLE"}') == PathSource("a.csv", {"x": "DOUBLE"})
    assert data('database = "d"\ntable = "s.t"') == Table("s.t", "d")
    assert data('database = "d"\nquery = "select 1"') == Query("select 1", "d")


def test_a_job_is_what_the_functions_do(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are relative to the working directory, not to the job's."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = '[model]\nformula = "reaction ~ factor(days) + (1 | subject)"\nreml = false\nweights = "days + 1"\noffset = "days"\n'
    text = f'[source]\npath = "{SLEEP}"\n{model}[output]\ntarget = "out"\nprefix = "p"\nranef = false\n[limits]\nthreads = 1\n'
    found = read(job, text)
    fit = fit_job(found, {})
    expected = mp.lmm(
        "reaction ~ factor(days) + (1 | subject)", SLEEP, reml=False, weights="days + 1", offset="days", options=mp.Options(threads=1)
    )
    assert fit.fixef() == expected.fixef() and fit.loglik == expected.loglik and not fit.reml
    write_output(fit, found.output)
    names = {path.name for path in (tmp_path / "elsewhere" / "out").rglob("*.parquet")}
    assert names == {"p_fit.parquet", "p_coef.parquet", "p_varcomp.parquet", "p_manifest.parquet"}
    write_output(fit, None)


def test_limits_given_win_over_the_jobs(job: Path) -> None:
    found = read(job, f'[source]\npath = "{SLEEP}"\n[model]\nformula = "reaction ~ 1 + (1 | subject)"\n[limits]\nmemory_limit = "1MB"\n')
    with pytest.raises(mp.ResourceError, match="cannot hold the plan"):
        fit_job(found, {})
    assert fit_job(found, {"memory_limit": "1GB"}).converged


def test_policies(job: Path) -> None:
    fit = mp.lmm("reaction ~ days + (1 | subject)", SLEEP)
    policy = read(job, SOURCE + MODEL + '[policy]\nforbid = ["singular", "rank", "nonconvergence"]\nmax_drop_fraction = 0.1').policy
    check_policy(fit, policy)
    fit.info.update(rows_read=200, rows_dropped=20)
    check_policy(fit, policy)  # as many as may be
    fit.info.update(rows_dropped=21)
    fit.converged = False
    with pytest.raises(mp.ConvergenceError, match=r"result: nonconvergence, 10\.50% of the rows were dropped, 10\.00% may be") as caught:
        check_policy(fit, policy)
    assert caught.value.code == "policy"
    check_policy(fit, read(job, SOURCE + MODEL).policy)


CBPP = str(mp.datasets.path("cbpp"))
COUNTS = "cbind(incidence, size - incidence) ~ period"


def test_a_generalized_mixed_job(job: Path) -> None:
    model = f'[model]\nkind = "glmm"\nformula = "{COUNTS} + (1 | herd)"\nfamily = "binomial"\nlink = "probit"\nnagq = 3\n'
    fit = fit_job(read(job, f'[source]\npath = "{CBPP}"\n{model}'), {"threads": 1})
    options = mp.Options(threads=1)
    expected = mp.glmm(f"{COUNTS} + (1 | herd)", CBPP, family="binomial", link="probit", nagq=3, options=options)
    assert isinstance(fit, mp.GLMMFit) and fit.fixef() == expected.fixef() and fit.loglik == expected.loglik and fit.nagq == 3


@pytest.mark.parametrize(("cluster", "given"), [('"herd"', "herd"), ('["herd", "period"]', ["herd", "period"])])
def test_a_generalized_job_with_clusters(cluster: str, given: str | list[str], job: Path) -> None:
    model = f'[model]\nkind = "glm"\nformula = "I(incidence / size) ~ period"\nfamily = "binomial"\ntrials = "size"\ncluster = {cluster}\n'
    fit = fit_job(read(job, f'[source]\npath = "{CBPP}"\n{model}'), {"threads": 1})
    expected = mp.glm(
        "I(incidence / size) ~ period", CBPP, family="binomial", trials="size", cluster=given, options=mp.Options(threads=1)
    )
    assert isinstance(fit, mp.GLMFit) and fit.tidy() == expected.tidy() and fit.robust == "CR1"


def test_limits_hold_for_generalized_jobs(job: Path) -> None:
    text = f'[source]\npath = "{CBPP}"\n[model]\nkind = "glm"\nformula = "{COUNTS}"\nfamily = "binomial"\n[limits]\nmemory_limit = "1MB"\n'
    with pytest.raises(mp.ResourceError, match="cannot hold the plan"):
        fit_job(read(job, text), {})


def test_a_policy_against_separation(job: Path) -> None:
    policy = read(job, SOURCE + MODEL + '[policy]\nforbid = ["separation"]').policy
    fit = mp.glm(COUNTS, CBPP, family="binomial")
    check_policy(fit, policy)
    fit.info["separation"] = ["period2"]
    with pytest.raises(mp.ConvergenceError, match="forbids this result: separation"):
        check_policy(fit, policy)


def test_columns_that_a_job_may_use(tmp_path: Path) -> None:
    """Whatever names a column counts: formula, weights, cluster, where, by, what partitions the store."""
    allowed = 'columns = ["y", "x", "g", "w", "v"]'
    head = f'[source]\npath = "rows.parquet"\n{allowed}\n'
    path = tmp_path / "job.toml"
    path.write_text(head + '[model]\nformula = "log(y) ~ poly(x, 2) + (1 | g)"\nweights = "w"\ncluster = "g"\nwhere = "v > 2"\n')
    assert read_job(path).source.columns == ["y", "x", "g", "w", "v"]
    for formula, more in (
        ("y ~ z + (1 | g)", ""), ("y ~ x + (1 | z)", ""), ("y ~ x + (1 | g)", 'weights = "2 * z"\n'), ("y ~ x + (1 | g)", 'by = ["z"]\n'),
        ("y ~ x + (1 | g)", 'where = "z > 1"\n'), ("y ~ x", 'kind = "ols"\nabsorb = ["g", "z"]\n'),
        ("y ~ x", 'kind = "gee"\ngroups = "z"\n'),
        ("y ~ x + (1 | g)", '[store]\npath = "s"\npartition_by = "z"\n'),
    ):  # fmt: skip
        path.write_text(head + f'[model]\nformula = "{formula}"\n{more}')
        with pytest.raises(mp.ConfigError, match="uses the column 'z', which source.columns leaves out"):
            read_job(path)


@pytest.mark.parametrize("source", ["lake", "lake/../lake", "lake/**/*.parquet", "."])
def test_a_target_below_what_is_read(source: str, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run would read the tables of the first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lake").mkdir()
    text = f'[source]\npath = "{source}"\n' + MODEL
    assert "output.target lies in source.path" in mistake(job, text + '[output]\ntarget = "./lake/results"').message
    for target in ("lake/_results", "lake/x.duckdb", "../results"):
        job.write_text(text + f'[output]\ntarget = "{target}"')
        read_job(job)
