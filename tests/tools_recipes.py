"""The recipes that need a tool of their own, run by that tool: `pytest tests/tools_recipes.py` in an environment with `.[recipes]`.

Not collected by a plain `pytest`: what dbt requires cannot be installed beside what the checks require (see .ci/long).
"""
from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pytest

import mlpipe as mp

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
SLEEP = str(mp.datasets.path("sleepstudy"))
FORMULA = "reaction ~ days + (1 + days | subject)"


def dbt_run(project: Path) -> str:
    """What `dbt run` says in a copy of the project; AssertionError where it fails."""
    shutil.copytree(RECIPES / "dbt", project)
    command = [sys.executable, "-c", "from dbt.cli.main import cli; cli()", "run", "--profiles-dir", ".", "--vars", f"{{data: {SLEEP}}}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DBT_SEND_ANONYMOUS_USAGE_STATS": "0"}
    done = subprocess.run(command, cwd=project, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_dbt_models(tmp_path: Path) -> None:
    assert "PASS=4" in dbt_run(tmp_path / "dbt")
    fit = mp.lmm(FORMULA, SLEEP)
    with duckdb.connect(str(tmp_path / "dbt" / "clinic.duckdb")) as con:
        coefficients = con.sql("select term, estimate from coefficients where effect = 'fixed' order by term").fetchall()
        rows = con.sql("select count(*), sum(abs(reaction - fitted - resid)) < 1e-9 from fitted").fetchall()
        unusual = con.sql("select subject, days from unusual order by all").fetchall()
    assert dict(coefficients) == pytest.approx(fit.fixef(), rel=1e-12)
    assert rows == [(180, True)]
    ours = duckdb.from_arrow(fit.augment().read_all())
    assert len(unusual) > 2 and unusual == ours.filter("abs(resid) > 60").select("subject, days").order("all").fetchall()


@pytest.fixture
def sleep_fit() -> Any:
    return runpy.run_path(str(RECIPES / "dagster_asset.py"))["sleep_fit"]


def materialized(asset: Any, data: str, target: Path, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    config = {"ops": {"sleep_fit": {"config": {"data": data, "target": str(target)}}}}
    return dg.materialize([asset], run_config=config, raise_on_error=False, instance=instance)


def test_dagster_asset(sleep_fit: Any, tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        done = materialized(sleep_fit, SLEEP, tmp_path / "out", instance)
    (made,) = done.asset_materializations_for_node("sleep_fit")
    (check,) = done.get_asset_check_evaluations()
    assert done.success and check.passed
    assert made.metadata["rows"].value == 180 and made.metadata["days"].value == pytest.approx(10.467286, abs=1e-6)
    assert mp.load(tmp_path / "out").fixef()["days"] == made.metadata["days"].value


def test_dagster_asset_on_wrong_data_and_lack_of_memory(sleep_fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        wrong = materialized(sleep_fit, str(tmp_path / "none.parquet"), tmp_path / "out", instance)
    assert not wrong.success and not wrong.retry_attempts_for_node("sleep_fit") and not (tmp_path / "out").exists()

    def scarce(*arguments: Any) -> None:
        raise mp.ResourceError("out of memory", code="out_of_memory")

    monkeypatch.setattr(mp, "lmm", scarce)
    retry = dg.RetryRequested
    monkeypatch.setattr(dg, "RetryRequested", lambda max_retries, seconds_to_wait: retry(max_retries=max_retries))  # at once
    with dg.DagsterInstance.ephemeral() as instance:
        starved = materialized(sleep_fit, SLEEP, tmp_path / "out", instance)
    assert not starved.success and starved.retry_attempts_for_node("sleep_fit") == 2
