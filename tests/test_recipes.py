"""The recipes that need no tool: the crontab under cron's environment; the page that shows them all. Blocks of Python: see test_docs."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlpipe as mp

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
JOB = """
[source]
path = "{data}"
[model]
formula = "reaction ~ days + (1 | subject)"
[output]
target = "out"
mode = "overwrite"
"""


def test_the_page_shows_the_files() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^```(?:crontab|sql|py)\n(.*?)^```$", page, re.M | re.S))
    files = [RECIPES / "crontab", RECIPES / "dagster_asset.py", *(RECIPES / "dbt" / "models").iterdir()]
    assert shown == {path.read_text(encoding="utf-8") for path in files}


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    """The folder of the crontab: a job, and a virtual environment that has `mlpipe`."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script = tmp_path / ".venv" / "bin" / "mlpipe"
    script.write_text(f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom mlpipe.cli import main\nmain()\n")
    script.chmod(0o755)
    (tmp_path / "nightly.toml").write_text(JOB.format(data=mp.datasets.path("sleepstudy")))
    return tmp_path


def cron(folder: Path) -> str:
    """What cron would mail: the crontab's command, run as cron runs it, in `folder` in place of its own."""
    (line,) = (line for line in (RECIPES / "crontab").read_text().splitlines() if not line.startswith("#"))
    *when, command = line.split(maxsplit=5)
    assert all(re.fullmatch(r"[\d*,/-]+", field) for field in when)
    assert "%" not in command  # cron makes a new line of it
    environment = {"HOME": str(folder), "LOGNAME": "clinic", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}
    command = command.replace("/srv/clinic", str(folder))
    pipe = subprocess.PIPE
    shell = ["/bin/sh", "-c", command]
    done = subprocess.run(shell, cwd="/", env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    return done.stdout + done.stderr


def test_a_night_that_goes_well_mails_nothing(clinic: Path) -> None:
    assert cron(clinic) == ""
    assert mp.load(clinic / "out").fixef()["days"] == pytest.approx(10.467286, abs=1e-6)
    assert "Random effects:" in (clinic / "nightly.txt").read_text() and '"stage": "solve"' in (clinic / "nightly.log").read_text()


def test_a_night_that_fails_mails_its_status(clinic: Path) -> None:
    (clinic / "nightly.toml").write_text(JOB.format(data="gone.parquet"))
    assert cron(clinic) == "nightly.toml: status 3, see nightly.log\n"
    assert '"error": "file_not_found"' in (clinic / "nightly.log").read_text() and not (clinic / "out").exists()
