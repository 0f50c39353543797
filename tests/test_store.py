"""Fits that are written: directories, DuckDB files and connections; what a killed or failed job leaves."""
from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest

import mlpipe as mp
from mlpipe import atomic, datasets, store
from mlpipe.engines import failures
from mlpipe.many import Model, fit_many
from mlpipe.plans import Request
from mlpipe.tables import Entry, factor_names

from .conftest import _quoted

FORMULA = "reaction ~ days + (1 + days | subject)"
SUFFIXES = ("fit", "coef", "varcomp", "manifest", "ranef_subject")


@pytest.fixture(scope="module")
def sleep() -> mp.LMMFit:
    return mp.lmm(FORMULA, datasets.path("sleepstudy"))


def same(again: mp.LMMFit, fit: mp.LMMFit) -> None:
    assert (again.formula, again.fixef(), again.loglik, again.nobs) == (fit.formula, fit.fixef(), fit.loglik, fit.nobs)
    np.testing.assert_array_equal(again.vcov(), fit.vcov())
    assert again.tidy().equals(fit.tidy()) and again.ranef().equals(fit.ranef())


def content(con: duckdb.DuckDBPyConnection) -> dict[str, list[Any]]:
    """The rows of every table, as text."""
    names = [row[0] for row in con.execute("select table_name from duckdb_tables() order by 1").fetchall()]
    return {name: con.execute(f"select columns(*)::varchar from {_quoted(name)}").fetchall() for name in names}


@pytest.mark.parametrize("random", ["(1 | subject)", "(1 | subject) + (1 | days)"])
def test_a_fit_without_coefficients(random: str, tmp_path: Path) -> None:
    fit = mp.lmm(f"reaction ~ 0 + {random}", datasets.path("sleepstudy"))
    fit.write(tmp_path / "fit")
    again = mp.load(tmp_path / "fit")
    assert again.vcov().shape == (0, 0) and again.tidy().equals(fit.tidy()) and str(again).splitlines()[0] == str(fit).splitlines()[0]


# ---- DuckDB


@pytest.mark.parametrize("name", ["x.duckdb", "new/x.DB"])
def test_a_database_file(name: str, sleep: mp.LMMFit, tmp_path: Path) -> None:
    path = tmp_path / name
    sleep.write(path, run_id="first")
    assert path.is_file() and sorted(p.name for p in path.parent.iterdir()) == [path.name]
    same(mp.load(path), sleep)
    with duckdb.connect(str(path), read_only=True) as con:
        held = content(con)
        assert sorted(held) == sorted(f"mlpipe_{suffix}" for suffix in SUFFIXES)
        assert {row[:2] for rows in held.values() for row in rows} == {("first", FORMULA)}
        assert con.sql("select estimate from mlpipe_coef where term = 'days'").fetchall() == [(sleep.fixef()["days"],)]
        assert con.sql('select count(*), count(distinct subject), count("days_se") from mlpipe_ranef_subject').fetchall() == [(18, 18, 18)]


def test_the_same_tables_as_in_a_directory(sleep: mp.LMMFit, tmp_path: Path) -> None:
    sleep.write(tmp_path / "folder", run_id="r")
    sleep.write(con := duckdb.connect(), run_id="r")
    for path in (tmp_path / "folder" / "runs" / "r").iterdir():
        there = con.table(path.stem).to_arrow_table().drop_columns(["started"] * (path.stem == "mlpipe_fit"))
        assert pa.Table.from_batches(pl.read_parquet(path).to_arrow().to_batches()).num_rows == there.num_rows
        kept = [name for name in there.column_names if name not in ("tables", "record", "peak_memory")]
        assert pl.DataFrame(there.select(kept)).equals(pl.read_parquet(path, columns=kept))


@pytest.mark.parametrize("target", ["fit", "fit.duckdb"])
def test_a_fit_that_another_name_asks_for_is_not_given(target: str, sleep: mp.LMMFit, tmp_path: Path) -> None:
    """Where one fit was written, its model is called by its formula, and it is of no value."""
    sleep.write(tmp_path / target)
    assert mp.load(tmp_path / target, model=FORMULA).loglik == sleep.loglik
    for wanted, message in [({"model": "other"}, "fit"), ({"by": {"region": "north"}}, "are not by 'region'")]:
        with pytest.raises(mp.ConfigError, match=message) as caught:
            mp.load(tmp_path / target, **wanted)
        assert caught.value.code == "which_fit"


def test_modes(sleep: mp.LMMFit) -> None:
    con = duckdb.connect()
    sleep.write(con, run_id="a")
    before = content(con)
    with pytest.raises(mp.ConfigError, match="already lists a fit"):
        sleep.write(con)
    with pytest.raises(mp.ConfigError, match="already lists the run 'a'"):
        sleep.write(con, mode="append", run_id="a")
    assert content(con) == before
    other = mp.lmm("reaction ~ days + (1 | subject)", datasets.path("sleepstudy"))
    other.write(con, mode="append", run_id="b")
    assert con.sql("select run_id, count(*), count(days) from mlpipe_ranef_subject group by all order by all").fetchall() == [
        ("a", 18, 18), ("b", 18, 0)
    ]  # fmt: skip
    same(mp.load(con), other)
    other.write(con, mode="overwrite", run_id="c", ranef=False)
    assert sorted(content(con)) == sorted(f"mlpipe_{suffix}" for suffix in SUFFIXES[:-1])
    assert {row[0] for rows in content(con).values() for row in rows} == {"c"}


def test_an_append_adds_the_columns_that_are_missing(sleep: mp.LMMFit) -> None:
    con = duckdb.connect()
    mp.lmm("reaction ~ days + (1 | subject)", datasets.path("sleepstudy")).write(con, run_id="a")
    sleep.write(con, mode="append", run_id="b")
    same(mp.load(con), sleep)
    assert con.sql("select count(days), count(*) from mlpipe_ranef_subject").fetchall() == [(18, 36)]


def test_statistics_and_rows_append_to_one_table(sleep: mp.LMMFit) -> None:
    """A fit from statistics knows no source; its missing values have the columns' types all the same."""
    con = duckdb.connect()
    stats = mp.suffstats(FORMULA, datasets.path("sleepstudy"))
    mp.lmm(FORMULA, stats).write(con, run_id="a")
    sleep.write(con, mode="append", run_id="b")
    same(mp.load(con), sleep)


def test_what_an_append_cannot_hold_leaves_all_as_it_was(sleep: mp.LMMFit) -> None:
    con = duckdb.connect()
    sleep.write(con)
    before = content(con)
    frame = pl.read_parquet(datasets.path("sleepstudy")).with_columns(pl.col("subject").cast(pl.Int64))
    with pytest.raises(mp.ConfigError, match="'subject' of type VARCHAR, this run's is 'subject' of type BIGINT"):
        mp.lmm(FORMULA, frame).write(con, mode="append")
    renamed = frame.rename({"subject": "Subject"})
    with pytest.raises(mp.ConfigError, match="'subject' of type VARCHAR, this run's is 'Subject'"):
        mp.lmm("reaction ~ days + (1 | Subject)", renamed).write(con, mode="append")
    assert content(con) == before
    con.execute("begin")  # nothing of ours is open
    con.execute("rollback")


def test_a_users_own_tables_are_left_alone(sleep: mp.LMMFit) -> None:
    con = duckdb.connect()
    con.execute("create table MLPIPE_coef as select 1 as x; create table other as select 2 as y")
    before = content(con)
    for mode in ("error", "overwrite", "append"):
        with pytest.raises(mp.ConfigError, match="no fit's"):
            sleep.write(con, mode=mode)
    assert content(con) == before
    sleep.write(con, prefix='odd "p"; --')
    sleep.write(con, prefix='odd "p"; --', mode="overwrite")
    assert con.sql("from MLPIPE_coef").fetchall() == [(1,)] and 'odd "p"; --_fit' in content(con)
    same(mp.load(con, prefix='odd "p"; --'), sleep)
    with pytest.raises(mp.DataError, match="no fit in the database"):
        mp.load(con)


def test_an_open_transaction_is_refused_and_stays_theirs(sleep: mp.LMMFit) -> None:
    con = duckdb.connect()
    con.execute("begin; create table mine as select 1 as x")
    with pytest.raises(mp.ConfigError, match="transaction open") as caught:
        sleep.write(con)
    assert caught.value.code == "transaction_open"
    con.execute("commit; begin")
    assert list(content(con)) == ["mine"]
    with pytest.raises(duckdb.Error):
        con.execute("select error('failed')").fetchall()
    with pytest.raises(mp.ConfigError, match="transaction open"):
        sleep.write(con)
    con.execute("rollback")
    sleep.write(con)


def test_the_current_schema_of_a_connection(sleep: mp.LMMFit, tmp_path: Path) -> None:
    con = duckdb.connect()
    con.execute("create schema results; use results; create temp table mlpipe_fit as select 1 as x")
    sleep.write(con)
    found = con.execute("select distinct schema_name from duckdb_tables() where table_name like 'mlpipe%' and not temporary").fetchall()
    assert found == [("results",)]
    same(mp.load(con), sleep)


def test_odd_names() -> None:
    """Group and coefficient names that SQL, file systems and a database blind to case would trip over."""
    rng = np.random.default_rng(1)
    n, g = 400, np.repeat(np.arange(20), 20)
    x, X = rng.normal(size=(2, n))
    b = rng.normal(size=(20, 3))
    y = b[g, 0] + b[g, 1] * x + b[g, 2] * X + rng.normal(size=n)
    frame = pl.DataFrame({"y": y, "x": x, "X": X, "Run_ID": g, 'the "unit"; --': np.arange(n) // 20 % 2})
    fit = mp.lmm('y ~ x + X + (x + X | Run_ID:`the "unit"; --`)', frame)
    con = duckdb.connect()
    fit.write(con)
    same(mp.load(con), fit)
    (table,) = [name for name in content(con) if "_ranef_" in name]
    assert con.table(f'"{table}"').columns[:3] == ["run_id", "model", "Run_ID_"]
    assert con.table(f'"{table}"').columns[-4:] == ["x", "x_se", "X_", "X_se_"]
    again = mp.load(con).predict(frame).read_all()["predicted"].to_numpy()
    np.testing.assert_allclose(again, fit.predict(frame).read_all()["predicted"].to_numpy(), rtol=1e-12)


def test_odd_names_in_a_directory(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    g = np.repeat(np.arange(20), 10)
    fit = mp.lmm("y ~ 1 + (1 | run_id)", pl.DataFrame({"y": rng.normal(size=20)[g] + rng.normal(size=200), "run_id": g}))
    fit.write(tmp_path / "fit", run_id="r")
    same(mp.load(tmp_path / "fit"), fit)
    assert pl.read_parquet(tmp_path / "fit" / "runs" / "r" / "mlpipe_ranef_run_id.parquet").columns[:3] == ["run_id", "model", "run_id_"]


def test_a_failure_leaves_the_file_as_it_was(sleep: mp.LMMFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpipe.engines.target import Database

    path, create = tmp_path / "x.duckdb", Database.create

    def broken(self: Database, table: str, rows: pa.Table) -> None:
        create(self, table, rows)
        if table.endswith("_varcomp"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Database, "create", broken)
        with pytest.raises(KeyboardInterrupt):
            sleep.write(path)
    assert list(tmp_path.iterdir()) == []
    sleep.write(path)
    with monkeypatch.context() as patch:
        patch.setattr(Database, "create", broken)
        with pytest.raises(KeyboardInterrupt):
            sleep.write(path, mode="overwrite")
    same(mp.load(path), sleep)


def test_files_that_cannot_be_written_or_read(sleep: mp.LMMFit, tmp_path: Path) -> None:
    (tmp_path / "no.duckdb").write_text("something else")
    with pytest.raises(mp.ConfigError, match="no.duckdb exists and is no database") as caught:
        sleep.write(tmp_path / "no.duckdb")
    assert caught.value.code == "target_exists"
    assert (tmp_path / "no.duckdb").read_text() == "something else"
    with pytest.raises(mp.DataError, match="no fit in"):
        mp.load(tmp_path / "absent.duckdb")
    path = str(tmp_path / "x.duckdb")
    with duckdb.connect(path) as con:
        with pytest.raises(mp.ResourceError, match="open in this process"):
            sleep.write(path)
        sleep.write(con)
    with duckdb.connect(path, read_only=True) as con, pytest.raises(mp.ResourceError, match="read-only"):
        sleep.write(con, prefix="p")
    same(mp.load(path), sleep)
    with pytest.raises(mp.ConfigError, match="neither a path nor a DuckDB connection"):
        sleep.write(3)


# ---- what a killed job leaves

WRITER = """
    import os, signal, mlpipe as mp, mlpipe.store as store
    fit = mp.lmm("reaction ~ days + (1 | subject)", mp.datasets.path("sleepstudy"))
    {0} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    fit.write("fit")
"""


@pytest.mark.parametrize("point", ["store._replace", "store._write_tables", "store.os.replace"])
def test_a_killed_first_write_is_no_obstacle(point: str, sleep: mp.LMMFit, tmp_path: Path) -> None:
    killed(WRITER.format(point), tmp_path)
    assert (tmp_path / "fit").is_dir() and not (tmp_path / "fit" / "fit.json").exists()
    sleep.write(tmp_path / "fit", run_id="r")
    assert sorted(path.name for path in (tmp_path / "fit").iterdir()) == [".lock", "fit.json", "runs"]
    assert [path.name for path in (tmp_path / "fit" / "runs").iterdir()] == ["r"]


def test_a_folder_of_someone_elses_is_still_refused(sleep: mp.LMMFit, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(mp.ConfigError, match="is no fit"):
        sleep.write(tmp_path)


def killed(code: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_file_that_a_killed_writer_left_is_used_again(tmp_path: Path) -> None:
    killed(
        """
        import os, signal
        from pathlib import Path
        from mlpipe.atomic import replacing
        with replacing(Path("p")) as file:
            file.write(b"much longer than what comes next")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        tmp_path,
    )
    assert [path.name for path in tmp_path.iterdir()] == [".p.partial"]
    with atomic.replacing(tmp_path / "p") as file:
        file.write(b"next")
        with pytest.raises(mp.ResourceError, match="another job is writing"), atomic.replacing(tmp_path / "p"):
            pass
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("p", b"next")]


# ---- without BLUPs


@pytest.mark.parametrize("name", ["fit", "x.duckdb"])
def test_a_fit_without_its_modes_says_what_to_do(name: str, sleep: mp.LMMFit, tmp_path: Path) -> None:
    sleep.write(tmp_path / name, ranef=False)
    again = mp.load(tmp_path / name)
    with pytest.raises(mp.DataError, match='ranef=True, or predict with effects="population"') as caught:
        again.predict(datasets.path("sleepstudy"))
    assert caught.value.code == "no_modes"
    assert again.predict(datasets.path("sleepstudy"), effects="population").read_all().num_rows == 180


def test_scored_rows_are_counted_while_they_are_read(sleep: mp.LMMFit) -> None:
    frame = pl.read_parquet(datasets.path("sleepstudy"))
    many = pl.concat([frame] * 2000)
    scored = many.lazy().mlpipe.predict(sleep)  # type: ignore[attr-defined]
    assert scored.head(5).collect().height == 5
    assert 5 <= sleep.info["scored"]["rows"] <= many.height


# ---- generalized fits

CBPP = datasets.path("cbpp")
COUNTS = "cbind(incidence, size - incidence) ~ period"


def generalized(kind: str) -> mp.GLMMFit | mp.GLMFit:
    if kind == "glmm":
        return mp.glmm(f"{COUNTS} + (1 | herd)", CBPP, family="binomial", nagq=5)
    if kind == "gamma":
        return mp.glmm("reaction ~ days + (1 | subject)", datasets.path("sleepstudy"), family="gamma")
    return mp.glm(COUNTS, CBPP, family=kind, cluster="herd" if kind == "binomial" else None)


@pytest.mark.parametrize("target", ["x.duckdb", "folder"])
@pytest.mark.parametrize("kind", ["glmm", "gamma", "binomial", "quasibinomial"])
def test_generalized_fits_come_back(kind: str, target: str, tmp_path: Path) -> None:
    fit = generalized(kind)
    fit.write(tmp_path / target, run_id="first")
    again = mp.load(tmp_path / target)
    assert type(again) is type(fit) and again.source is None
    for name in ("beta", "covariance", "theta", "theta_covariance"):
        assert np.array_equal(getattr(again, name), getattr(fit, name))
    assert again.tidy().equals(fit.tidy()) and again.varcorr().equals(fit.varcorr())
    assert [getattr(again, name) for name in fit.more if name != "tau_variance"] == [
        getattr(fit, name) for name in fit.more if name != "tau_variance"
    ]
    assert str(again) == "\n".join(line for line in str(fit).split("\n") if not line.startswith("   Data:"))
    data = datasets.path("sleepstudy") if kind == "gamma" else CBPP
    for effects in ("conditional", "population", "marginal"):
        assert again.predict(data, effects=effects).read_all().equals(fit.predict(data, effects=effects).read_all())
    if fit.terms:
        assert again.ranef().equals(fit.ranef())
    else:
        with pytest.raises(mp.ConfigError, match="no random effects"):
            again.ranef()


def test_runs_of_several_kinds_in_one_database(tmp_path: Path) -> None:
    con = duckdb.connect(str(tmp_path / "x.duckdb"))
    for k, kind in enumerate(("glmm", "binomial")):
        generalized(kind).write(con, mode="append", run_id=f"r{k}")
    assert isinstance(mp.load(con), mp.GLMFit)
    assert con.sql("select run_id, family from mlpipe_fit order by 1").fetchall() == [("r0", "binomial"), ("r1", "binomial")]
    assert con.sql("select count(*) from mlpipe_ranef_herd").fetchall() == [(15,)]


# ---- names of factors, and which fit


def test_names_of_factors_are_their_own() -> None:
    groups = ["a:b", "a_b", "A_b", "a__b", "a_:b", "a:_b", "a b", "a-b", "a.b", "żółw", "a:b:c", "a" * 300, "a" * 299 + "b", '"; --', ""]
    names = factor_names(groups)
    assert names["a:b"] == "a__b" and names["a_b"] == "a_b" and names["żółw"] == "żółw" and names["a:b:c"] == "a__b__c"
    assert len({name.lower() for name in names.values()}) == len(groups)
    assert all(re.fullmatch(r"\w*(-[0-9a-f]{8})?", name) and len(name.encode()) < 200 for name in names.values())
    assert factor_names(["subject"]) == {"subject": "subject"}


@pytest.mark.parametrize(("target", "last"), [("folder", "A_B"), ("x.duckdb", "A_B"), ("x.duckdb", "a b's")])
@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
def test_factors_of_like_names_keep_their_tables(target: str, last: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    keys = {name: rng.integers(0, 6, 400) for name in ("a", "b", "a_b", "A_B", "a b's")}
    frame = pl.DataFrame({**keys, "y": rng.normal(size=400) + sum(np.sin(7 * (k + 1) * (i + 1)) for i, k in enumerate(keys.values()))})
    fit = mp.lmm("y ~ 1 + (1 | a:b) + (1 | a_b) + (1 | `" + last + "`)", frame)
    fit.write(tmp_path / target)
    again = mp.load(tmp_path / target)
    ours, theirs = again.ranefs(), fit.ranefs()
    assert list(ours) == list(theirs) == ["a:b", "a_b", last]
    assert all(ours[group].equals(theirs[group]) for group in theirs)
    if last != "A_B":  # which no warehouse tells from a_b
        with duckdb.connect(str(tmp_path / target)) as con:
            assert len([name for name in content(con) if name.startswith("mlpipe_ranef_")]) == 3
            con.register("data", frame.with_row_index("at").to_arrow())
            scored = con.sql(again.scoring_sql("duckdb", source="data")).pl().sort("at")
        np.testing.assert_allclose(scored["predicted"], pl.DataFrame(fit.predict(frame))["predicted"], atol=1e-10)


@pytest.mark.parametrize("target", ["folder", "x.duckdb"])
def test_a_model_of_many_values_is_named_with_its_value(target: str, tmp_path: Path) -> None:
    frame = pl.concat([pl.read_parquet(datasets.path("sleepstudy")).with_columns(region=pl.lit(r)) for r in ("n'orth", "süd")])
    frame = frame.with_columns(pl.when(pl.col("region") == "süd").then(pl.col("reaction") * 2).otherwise("reaction").alias("reaction"))
    fits = fit_many([Model("m", "reaction ~ days + (1 | subject)")], frame, Request("", by=("region",)))
    entries = [*(Entry(one.model, one.fit, one.by) for one in fits.fits), Entry("m", None, {"region": None}, "of no value")]
    store.write_all(entries, fits.by, str(tmp_path / target), prefix="p", mode="error", run_id=None, ranef=True)
    given: dict[str, Any] = {"prefix": "p"} if target == "x.duckdb" else {}
    with pytest.raises(mp.ConfigError, match="holds 3 fits, 3 of them match") as caught:
        mp.load(tmp_path / target, model="m", **given)
    hint = str(caught.value.hint)
    assert caught.value.code == "which_fit"
    assert all(f"model='m', by={{'region': {value!r}}}" in hint for value in ("n'orth", "süd", None))
    for one in fits.fits[:2]:
        assert one.fit is not None
        again = mp.load(tmp_path / target, model="m", by=one.by, **given)
        assert again.fixef() == one.fit.fixef() and len(again.ranef()) == 18
    with pytest.raises(mp.ConfigError, match="0 of them match") as caught:
        mp.load(tmp_path / target, model="m", by={"region": "west"}, **given)
    assert "'süd'" in str(caught.value.hint)


@pytest.mark.parametrize("target", ["folder", "x.duckdb"])
def test_the_one_value_of_a_run_is_told_by_its_model(target: str, tmp_path: Path) -> None:
    """The grouping column is called as the values' is, but for case: only with the value are its columns where they were written."""
    frame = pl.read_parquet(datasets.path("sleepstudy")).rename({"subject": "Region"}).with_columns(region=pl.lit("north"))
    fits = fit_many([Model("m", "reaction ~ days + (1 | Region)")], frame, Request("", by=("region",)))
    entries = [Entry(one.model, one.fit, one.by) for one in fits.fits]
    store.write_all(entries, fits.by, str(tmp_path / target), prefix="mlpipe", mode="error", run_id=None, ranef=True)
    again, given = mp.load(tmp_path / target, model="m"), mp.load(tmp_path / target, by={"region": "north"})
    assert again.ranef().equals(given.ranef()) and again.ranef()["Region"].to_pylist()[0].isdigit()
    assert again.written == given.written and again.written["region"] == "north"


@pytest.mark.parametrize("size", [1_000, 10_000, 13_000])
def test_a_full_disk_leaves_no_database_that_cannot_be_opened(size: int, tmp_path: Path) -> None:
    """Files may grow to `size` bytes: too few for the headers of a database, or for a transaction."""
    fit = mp.lmm("reaction ~ days + (1 | subject)", datasets.path("sleepstudy"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(mp.ResourceError):
            fit.write(tmp_path / "out.duckdb")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    fit.write(tmp_path / "out.duckdb")
    assert mp.load(tmp_path / "out.duckdb").loglik == fit.loglik


def test_a_commit_that_a_full_disk_refuses_is_worth_a_retry() -> None:
    said = 'TransactionContext Error: Failed to commit: Could not write file "out.duckdb.wal": No space left on device'
    with pytest.raises(mp.ResourceError, match="No space left") as caught, failures.translating():
        raise duckdb.TransactionException(said)
    assert caught.value.code == "io"


def test_a_tilde_is_the_home_directory(sleep: mp.LMMFit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("fit", "x.duckdb"):
        sleep.write(f"~/{name}")
        assert (tmp_path / "home" / name).exists() and mp.load(f"~/{name}").beta.tolist() == sleep.beta.tolist()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("target", ["fit", "x.duckdb"])
def test_a_prefix_is_no_path(target: str, sleep: mp.LMMFit, tmp_path: Path) -> None:
    with pytest.raises(mp.ConfigError, match="cannot be the beginning of a file's name"):
        sleep.write(tmp_path / target, prefix="../x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b'{"format": "mlp', b"[1]", b"{}", b"\xff\xfe"])
def test_a_damaged_index_is_told_and_an_overwrite_helps(content: bytes, sleep: mp.LMMFit, tmp_path: Path) -> None:
    sleep.write(tmp_path / "fit")
    (tmp_path / "fit" / "fit.json").write_bytes(content)
    with pytest.raises(mp.DataError, match="does not hold a fit"):
        mp.load(tmp_path / "fit")
    with pytest.raises(mp.DataError, match="fit.json is damaged") as caught:
        sleep.write(tmp_path / "fit", mode="append")
    assert caught.value.code == "not_a_fit"
    sleep.write(tmp_path / "fit", mode="overwrite")
    assert mp.load(tmp_path / "fit").beta.tolist() == sleep.beta.tolist()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"PAR1xx")])
def test_tables_that_are_gone_or_damaged_are_named(damage: Any, tmp_path: Path) -> None:
    rows = pl.read_parquet(datasets.path("sleepstudy")).with_columns(half=pl.col("days") < 5)
    fits = fit_many([Model("m", "reaction ~ days + (1 | subject)")], rows, Request("", by=("half",)))
    entries = [Entry(one.model, one.fit, one.by) for one in fits.fits]
    store.write_all(entries, fits.by, tmp_path / "fit", prefix="mlpipe", mode="error", run_id="r", ranef=True)
    damage(tmp_path / "fit" / "runs" / "r" / "mlpipe_manifest.parquet")
    with pytest.raises(mp.DataError, match="mlpipe_manifest.parquet (is gone|cannot be read)"):
        mp.load(tmp_path / "fit", by={"half": True})
