"""README and docs: every Python block runs, every command runs, and the output shown after it is what it prints."""
from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlpipe import cli

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


class Block(NamedTuple):
    """A fenced block: its language, its title (a file name), its text, and the text block that follows it, if one does."""

    language: str
    title: str
    text: str
    output: str | None


def blocks(page: Path) -> Iterator[Block]:
    """The Python, shell and TOML blocks of a page, in order."""
    found = re.findall(r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```$', page.read_text(encoding="utf-8"), re.M | re.S)
    for i, (language, title, text) in enumerate(found):
        after = found[i + 1] if i + 1 < len(found) else ("", "", "")
        if language in ("python", "sh", "toml"):
            yield Block(language, title, text, after[2] if after[0] == "text" else None)


def page_name(page: Path) -> str:
    """`README`, `docs/tour/slopes` …"""
    return page.relative_to(ROOT).with_suffix("").as_posix()


def run_python(text: str, names: dict[str, Any]) -> str:
    """What the block prints; its names stay for the next one."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "<block>", "exec"), names)
    return printed.getvalue()


def run_shell(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the block's `mlpipe …` commands print on standard output; setting up and testing are for .ci/run."""
    capsys.readouterr()
    for line in text.splitlines():
        words = shlex.split(line)
        if words[0] == "mlpipe":
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            assert stopped.value.code == 0, line
    return capsys.readouterr().out


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_what_a_page_shows_is_what_happens(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mlpipe", "configs"):  # the top of the checkout, but for what a block writes
        os.symlink(ROOT / name, tmp_path / name)
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "toml":
            if block.title:  # a file that later blocks use
                (tmp_path / block.title).write_text(block.text, encoding="utf-8")
            continue
        out = run_python(block.text, names) if block.language == "python" else run_shell(block.text, monkeypatch, capsys)
        if block.output is not None:
            assert out.rstrip() == block.output.rstrip()


def test_pages_have_examples() -> None:
    shown = {page_name(page): [block.language for block in blocks(page)] for page in PAGES}
    assert shown["README"].count("python") == 3 and shown["README"].count("sh") == 4
    assert all(shown[f"docs/{name}"] for name in ("concepts", "data", "statistics", "for-r-users", "cli", "formula", "generalized"))
    without = [name for name in shown if "python" not in shown[name] and name.startswith(("docs/tour/", "docs/howto/"))]
    assert without == ["docs/tour/index"]


def test_jobs_that_pages_show_are_jobs(tmp_path: Path) -> None:
    """Every TOML block is a job, or becomes one with a source and a model."""
    from mlpipe.job import read_job

    seen = 0
    for page in PAGES:
        for block in blocks(page):
            if block.language == "toml":
                keys = tomllib.loads(block.text)
                rest = "" if "source" in keys else '[source]\npath = "rows.parquet"\n'
                rest += "" if "model" in keys or "models" in keys else '[model]\nformula = "y ~ 1 + (1 | g)"\n'
                (tmp_path / "job.toml").write_text(f"{block.text}\n{rest}", encoding="utf-8")
                read_job(tmp_path / "job.toml")
                seen += 1
    assert seen >= 7


def test_the_figures_are_what_the_data_draw() -> None:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    assert spec is not None and spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    for name, draw in figures.DRAWN.items():
        assert (figures.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == draw(), name


def test_the_reference_has_every_public_name() -> None:
    """Functions, fits, options, errors and warnings, each by the name that users write."""
    import mlpipe

    text = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs" / "reference").glob("*.md")))
    shown = set(re.findall(r"^::: mlpipe\.(\w+)$", text, re.M))
    assert set(mlpipe.__all__) - shown == {"__version__", "datasets"}


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", text, re.M)
    assert sorted(named) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:])


def test_the_job_reference_is_complete() -> None:
    """Every key a job may have is in the table of docs/cli.md."""
    from mlpipe.job import LimitsSection, ModelSection, OutputSection, PolicySection, SourceSection

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for section in (SourceSection, ModelSection, OutputSection, LimitsSection, PolicySection):
        for key in section.model_fields:
            assert re.search(rf"`(\w+\.)?{key}`", text), key


def test_every_option_is_in_the_reference() -> None:
    """The limits and their variables as docs/cli.md tells them."""
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for parameter in cli.run.params:
        for variable in [parameter.envvar] if isinstance(parameter.envvar, str) else []:
            assert f"`{parameter.opts[0]}` | `{variable}` | `{parameter.name}`" in text
    for name in cli.cli.commands:
        assert f"`mlpipe {name} " in text


def test_formula_functions_are_in_the_reference() -> None:
    from mlpipe.expr import KNOWN

    text = (ROOT / "docs" / "formula.md").read_text(encoding="utf-8")
    assert not [name for name in KNOWN if name != "cbind" and not re.search(rf"\b{name}\b", text)]
