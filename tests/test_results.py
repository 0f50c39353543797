"""What jobs of several models write, the tables as sql/results.sql declares them, and writers that meet."""
from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

import mlpipe as mp
from mlpipe import job as jobs
from mlpipe.sql_files import read_sql

SLEEP = str(mp.datasets.path("sleepstudy"))
FORMULA = "reaction ~ days + (1 + days | subject)"


def described(con: duckdb.DuckDBPyConnection) -> dict[str, list[tuple[str, str]]]:
    sql = "select table_name, column_name, data_type from duckdb_columns() where not internal order by table_name, column_index"
    out: dict[str, list[tuple[str, str]]] = {}
    for table, *column in con.execute(sql).fetchall():
        out.setdefault(table, []).append((column[0], column[1]))
    return out


def test_the_declared_tables_are_those_written() -> None:
    declared, written = duckdb.connect(), duckdb.connect()
    declared.execute(read_sql("results"))
    fit = mp.lmm(FORMULA, SLEEP)
    fit.info["drift"] = {"since": "t", "terms": [{"term": "days", "previous": 1.0, "estimate": 2.0, "std_error": 1.0, "drift": 1.0}]}
    fit.write(written)
    assert described(written) == described(declared)
    row = written.execute("select rows_read, rows_dropped, passes, bytes, seconds, peak_memory, versions from mlpipe_manifest").fetchone()
    assert row is not None and row[:4] == (180, 0, 2.0, Path(SLEEP).stat().st_size)
    assert 0 < row[4] < 100 and 5e7 < row[5] < 1e11 and {"mlpipe", "python", "numpy", "duckdb"} <= json.loads(row[6]).keys()


def frame() -> pl.DataFrame:
    rng = np.random.default_rng(3)
    n = 900
    data = pl.DataFrame({"region": rng.choice(["north", "south", "west"], n), "g": rng.integers(0, 12, n), "x": rng.normal(size=n)})
    y = data["x"] * 0.5 + pl.Series(rng.normal(size=12))[data["g"].to_list()] + rng.normal(size=n)
    lone = data.head(20).with_columns(region=pl.lit("lone"), g=pl.lit(0, pl.Int64), y=pl.lit(1.0))
    return pl.concat([data.with_columns(y=y), lone.with_columns(y=pl.col("x") * 2)])


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """Runs a job's text over `frame()` by its functions; the target as asked for."""
    frame().write_parquet(tmp_path / "rows.parquet")

    def run(models: str, target: str, policy: str = "") -> jobs.Job:
        path = tmp_path / "job.toml"
        source = f'[source]\npath = "{tmp_path}/rows.parquet"\n'
        path.write_text(f'{source}{models}\n[output]\ntarget = "{tmp_path}/{target}"\nmode = "append"\n{policy}')
        return jobs.read_job(path)

    return run


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("target", ["out", "out.duckdb"])
def test_one_table_holds_the_models_of_all_values(target: str, job: Any, tmp_path: Path) -> None:
    read = job('[model]\nformula = "y ~ x + (1 | g)"\nby = ["region"]', target)
    fits = jobs.fit_jobs(read, {})
    jobs.write_outputs(fits, read.output)
    coef = table(tmp_path / target, "mlpipe_coef")
    assert coef.columns[:3] == ["run_id", "model", "region"] and coef["region"].unique().sort().to_list() == ["north", "south", "west"]
    found = table(tmp_path / target, "mlpipe_fit")
    assert found["region"].to_list() == ["lone", "north", "south", "west"] and found["converged"].to_list() == [False, True, True, True]
    assert "fewer than two levels" in found["message"][0]
    alone = mp.lmm("y ~ x + (1 | g)", frame().filter(pl.col("region") == "south"))
    again = mp.load(tmp_path / target, by={"region": "south"})
    assert again.loglik == pytest.approx(alone.loglik, abs=1e-9)
    ours, theirs = again.ranef().to_pydict(), alone.ranef().to_pydict()
    assert ours["g"] == theirs["g"] and ours["estimate"] == pytest.approx(theirs["estimate"], abs=1e-7)
    with pytest.raises(mp.ConfigError, match="holds 4 fits"):
        mp.load(tmp_path / target)
    with pytest.raises(mp.ConfigError, match="are not by 'area'"):
        mp.load(tmp_path / target, by={"area": "south"})
    with pytest.raises(mp.DataError, match="could not be fitted"):
        mp.load(tmp_path / target, by={"region": "lone"})


def table(target: Path, name: str) -> pl.DataFrame:
    """The rows of the only run, or of all of a database."""
    if target.suffix == ".duckdb":
        with duckdb.connect(str(target), read_only=True) as con:
            return con.table(name).pl()
    (file,) = target.glob(f"runs/*/{name}.parquet")
    return pl.DataFrame(pq.read_table(file))


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
def test_several_models_with_subsets_of_their_own(job: Any, tmp_path: Path) -> None:
    models = """
[[models]]
name = "plain"
formula = "y ~ x + (1 | g)"
[[models]]
name = "north"
formula = "y ~ x + (1 | g)"
where = 'region == "north"'
[[models]]
name = "null"
formula = "y ~ 1 + (1 | g)"
reml = false
"""
    read = job(models, "out")
    fits = jobs.fit_jobs(read, {})
    jobs.write_outputs(fits, read.output)
    assert [one.model for one in fits.fits] == ["plain", "north", "null"] and len(fits.info["scans"]) == 2
    north = mp.load(tmp_path / "out", model="north")
    alone = mp.lmm("y ~ x + (1 | g)", frame().filter(pl.col("region") == "north"))
    assert north.loglik == pytest.approx(alone.loglik, abs=1e-9) and not mp.load(tmp_path / "out", model="null").reml
    text = fits.told()
    assert "plain\nLinear mixed model fit by REML" in text and "3 fits: 3 converged" in text


def test_policies_of_many(job: Any) -> None:
    read = job('[model]\nformula = "y ~ x + I(2 * x) + (1 | g)"\nby = ["region"]', "out", '[policy]\nforbid = ["rank"]')
    with pytest.raises(mp.ConvergenceError, match=r"forbids 3 of 4 results: .*region=north: rank"):
        jobs.check_policies(jobs.fit_jobs(read, {}), read.policy)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("", "[model] is missing"),
        ('[[models]]\nname = "a"\nformula = "y ~ x + (1 | g)"\n[model]\nformula = "y ~ 1"', "exclude each other"),
        ('[[models]]\nname = "a"\nformula = "y ~ x + (1 | g)"\n' * 2, "two models have one name"),
        ('[model]\nformula = "y ~ x + (1 | g)"\nby = ["run_id"]\n', "'run_id': the tables of results have a column of this name"),
        ('[model]\nformula = "y ~ x + (1 | g)"\nby = ["Seconds"]\n', "'Seconds': the tables of results have a column of this name"),
        ('[model]\nformula = "y ~ x + (1 | g)"\nby = ["r", "R"]\n', "'R': the tables of results have a column of this name"),
        ('[[models]]\nname = "a"\nformula = "y ~ x + (1 | g)"\nweigths = "x"', "unknown key models.0.weigths"),
        ('[model]\nformula = "y ~ x + (1 | g)"\nby = ["region"]\ncluster = "g"\n', "keep no rows for cluster and vcov"),
        ('[[models]]\nname = "a"\nformula = "y ~ x + (1 | g)"\ncluster = ["g"]\nvcov = "CR0"', "keep no rows for cluster and vcov"),
        ('[model]\nkind = "glm"\nfamily = "poisson"\nformula = "y ~ x"\nby = ["g"]', "are for linear mixed models"),
    ],
)
def test_mistakes(models: str, message: str, job: Any) -> None:
    with pytest.raises(mp.ConfigError) as caught:
        job(models, "out")
    assert message in caught.value.message


@pytest.mark.parametrize("target", ["out", "out.duckdb"])
def test_a_text_stands_for_a_value_of_its_column(target: str, job: Any, tmp_path: Path) -> None:
    """Of any kind that `by` may have, as messages show it."""
    one = pl.col("region") == "north"
    values = {
        "clock": pl.when(one).then(pl.time(11, 30)).otherwise(pl.time(9)), "when": pl.datetime(2026, 1, 1, one.cast(int), time_zone="UTC"),
        "cost": one.cast(int).cast(pl.Decimal(10, 2)), "share": one / 2.0, "is": one,
    }  # fmt: skip
    frame().filter(pl.col("region") != "lone").with_columns(**values).write_parquet(tmp_path / "rows.parquet")
    read = job(f'[model]\nformula = "y ~ x + (1 | g)"\nby = {list(values)}'.replace("'", '"'), target)
    fits = jobs.fit_jobs(read, {})
    jobs.write_outputs(fits, read.output)
    for fitted in fits.fits:
        again = mp.load(tmp_path / target, by={name: str(value) for name, value in fitted.by.items()})
        assert fitted.fit is not None and again.loglik == fitted.fit.loglik and again.written.items() >= fitted.by.items()
    with pytest.raises(mp.ConfigError, match="'half past nine' is no value of 'clock', which is time64"):
        mp.load(tmp_path / target, by={"clock": "half past nine"})


ALL = '[[models]]\nname = "all"\nformula = "y ~ x + (1 | g)"\n'


@pytest.mark.filterwarnings("ignore::mlpipe.SingularFitWarning")
@pytest.mark.parametrize("by", ["", 'by = ["region"]\n'])
def test_a_model_that_its_rows_do_not_allow_does_not_stop_the_others(by: str, job: Any, tmp_path: Path) -> None:
    far = f'[[models]]\nname = "far"\nformula = "y ~ x + (1 | g)"\nwhere = "x > 1e9"\n{by}'
    gone = f'[[models]]\nname = "gone"\nformula = "y ~ age + (1 | g)"\n{by}'
    null = f'[[models]]\nname = "null"\nformula = "y ~ 1 + (1 | g)"\n{by}'
    one = "[limits]\nthreads = 1\n"  # of several, the order in which rows are added up differs from run to run
    read = job(far + gone + ALL + by + null, "out", f"[policy]\nmax_drop_fraction = 0.5\n{one}")
    fits = jobs.fit_jobs(read, {})
    jobs.write_outputs(fits, read.output)
    found = table(tmp_path / "out", "mlpipe_fit")
    lost = found.filter(pl.col("model").is_in(["far", "gone"]))
    assert lost["model"].to_list() == ["far", "gone"] and lost["loglik"].null_count() == 2 and not lost["converged"].any()
    assert "there are no rows" in lost["message"][0] and "no column 'age'" in lost["message"][1]
    assert not by or lost["region"].null_count() == 2
    assert "failed: gone: there is no column 'age'" in fits.told()
    alone = jobs.fit_jobs(job(ALL + by + null, "alone", one), {})  # what is left shares its scan as if the others had never been there
    assert len(alone.fits) == len(fits.fits) - 2
    for kept, other in zip(fits.fits[2:], alone.fits, strict=True):
        assert (kept.model, kept.by) == (other.model, other.by)
        assert (kept.fit and kept.fit.loglik) == (other.fit and other.fit.loglik)
    with pytest.raises(mp.DataError, match="could not be fitted"):
        mp.load(tmp_path / "out", model="gone")


def test_a_job_of_which_nothing_can_be_fitted_is_refused(job: Any) -> None:
    gone = '[[models]]\nname = "gone"\nformula = "y ~ age + (1 | g)"\n'
    with pytest.raises(mp.DataError, match=r"\[\[models\]\] gone: there is no column 'age'"):
        jobs.fit_jobs(job(gone + gone.replace('"gone"', '"too"'), "out"), {})
    with pytest.raises(mp.FormulaError, match=r"unknown function logg"):  # a mistake of the request comes before all work
        jobs.fit_jobs(job(ALL + gone.replace("age", "logg(x)"), "out"), {})


def test_too_many_rows_of_no_model_are_forbidden(job: Any, tmp_path: Path) -> None:
    half = frame().with_columns(region=pl.when(pl.int_range(len(frame())) % 2 > 0).then("region"))
    half.write_parquet(tmp_path / "rows.parquet")
    read = job(f'{ALL}by = ["region"]\n', "out", "[policy]\nmax_drop_fraction = 0.4\n")
    with pytest.raises(mp.ConvergenceError, match=r"rows are of no model: 'region' is missing in \d+; 50.00% of the rows were dropped"):
        jobs.check_policies(jobs.fit_jobs(read, {}), read.policy)


def _write(target: str, run: str, ready: Any, out: Any) -> None:
    fit = mp.lmm("reaction ~ days + (1 | subject)", SLEEP)
    ready.wait()
    try:
        fit.write(target, mode="append", run_id=run)
        out.put((run, None))
    except mp.MlpipeError as error:
        out.put((run, type(error).__name__))


@pytest.mark.parametrize("target", ["out", "out.duckdb"])
def test_writers_that_meet(target: str, tmp_path: Path) -> None:
    """Each wins whole or says that another is writing; what is there is what the winners say."""
    context = multiprocessing.get_context("spawn")
    ready, out = context.Barrier(2), context.Queue()
    place = str(tmp_path / target)
    writers = [context.Process(target=_write, args=(place, name, ready, out)) for name in ("one", "two")]
    for writer in writers:
        writer.start()
    said = dict(out.get(timeout=240) for _ in writers)
    for writer in writers:
        writer.join()
    won = {run for run, error in said.items() if error is None}
    assert won and set(said.values()) <= {None, "ResourceError"}
    if target == "out":
        runs = {path.name for path in (tmp_path / "out" / "runs").iterdir()}
    else:
        runs = set(table(tmp_path / target, "mlpipe_coef")["run_id"])
    assert runs == won and mp.load(place).rows == 180
