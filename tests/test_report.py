"""Reports: numbers of the fit, sentences that are true of it, nothing that a page could load or run, files whole or not at all."""
from __future__ import annotations

import builtins
import html
import re
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats as st

import mlpipe as mp
from mlpipe import cli, datasets, drawing, history, page, reporting
from mlpipe.reading import number, sentences

SLEEP = datasets.path("sleepstudy")
FORMULA = "reaction ~ days + (1 + days | subject)"
VOID = {"meta", "br", "link", "img", "hr"}
LABELS = [
    '<script>alert("x")</script>', "O'Brien & Söhne", "日本語", "a\u202eb", "tab\there", "</style><b>", '" onload="x', "<!-- c -->",
    "&amp;",
    "]]>", "line\nbreak", 'url(#clip0) id="x"',
]  # fmt: skip


class Page(HTMLParser):
    """What a browser would find: every tag with its attributes, the text of each element, whether tags are balanced."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source, self.tags, self.open = source, list[tuple[str, dict[str, str | None]]](), list[str]()
        self.words: dict[str, list[str]] = {}
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in dict.fromkeys(self.open):
            self.words.setdefault(tag, []).append(data)

    def text(self, tag: str = "main") -> str:
        """The text of all elements of this kind, spaces as one."""
        return " ".join(" ".join(self.words.get(tag, [])).split())

    def cells(self) -> list[str]:
        """The cells of all tables."""
        found = re.findall(r"<td[^>]*>(.*?)</td>", self.source, re.S)
        return [" ".join(html.unescape(re.sub("<[^>]*>", "", cell)).split()) for cell in found]


def report(fit: Any, folder: Path, **given: Any) -> Page:
    mp.report(fit, folder / "report.html", **given)
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def quiet(fit: Any) -> Any:
    """What a function makes without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mp.MlpipeWarning)
        return fit()


def visits(n: int = 300, groups: int = 12, seed: int = 0, shift: float = 0.0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    g = rng.integers(0, groups, n)
    age = rng.normal(50, 10, n)
    minutes = 20 + (0.2 + shift) * age + 3 * np.random.default_rng(9).normal(size=groups)[g] + rng.normal(0, 4, n)
    return pl.DataFrame({"minutes": minutes, "age": age, "clinic": g, "year": 2020 + g % 3})


@pytest.fixture(scope="module")
def sleep() -> Any:
    return mp.lmm(FORMULA, SLEEP)


@pytest.fixture(scope="module")
def pages(sleep: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """A page of every kind of fit."""
    folder = tmp_path_factory.mktemp("pages")
    cbpp = datasets.path("cbpp")
    rng = np.random.default_rng(2)
    g = np.repeat(LABELS, 6)
    x = rng.normal(size=len(g))
    y = x + np.repeat(rng.normal(size=len(LABELS)), 6) + rng.normal(size=len(g))
    odd = pl.DataFrame({'y <i>&"': y, "x'\"<script>": x, "g</title>": g})
    fits = {
        "sleep": sleep,
        "several": mp.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", datasets.path("penicillin")),
        "cbpp": mp.glmm("cbind(incidence, size - incidence) ~ period + (1 | herd)", cbpp, family="binomial"),
        "odd": mp.lmm("`y <i>&\"` ~ `x'\"<script>` + (1 | `g</title>`)", odd),
        "glm": mp.glm("cbind(incidence, size - incidence) ~ period", cbpp, family="binomial"),
        "ols": mp.ols("reaction ~ days", SLEEP, absorb="subject", cluster="subject"),
        "gee": mp.gee("reaction ~ days", SLEEP, groups="subject"),
    }
    return {name: report(fit, folder) for name, fit in fits.items()}


KINDS = ("sleep", "several", "cbpp", "odd", "glm", "ols", "gee")


# ---- the page stands alone


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_loaded_and_nothing_runs(pages: dict[str, Page], kind: str) -> None:
    check_alone(pages[kind])


def check_alone(found: Page) -> None:
    loading = {"script", "link", "img", "image", "iframe", "object", "embed", "base", "form", "foreignobject", "use", "a"}
    assert not loading & {tag for tag, _ in found.tags}
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith(("on", "xlink")) or name in ("src", "href", "srcset", "background")], tag
        assert not [value for value in attributes.values() if value and re.search(r"url\((?!#)|javascript:|https?://", value)], tag
    style = found.text("style")
    assert "url(" not in style and "@import" not in style and "//" not in style
    policy = next(a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_labels_and_names_are_text(pages: dict[str, Page]) -> None:
    found = pages["odd"]
    drawn = found.text("svg")
    for label in LABELS:
        shown = label.replace("\u202e", "\\u202e").replace("\t", "\\t").replace("\n", "\\n")
        assert shown in drawn, label
    assert "\u202e" not in found.source and "<script" not in found.source and "<!--" not in found.source
    assert found.text("title") == found.text("h1") == "`y <i>&\"` ~ `x'\"<script>` + (1 | `g</title>`)"
    assert {tag for tag, _ in found.tags} == {tag for tag, _ in pages["sleep"].tags}


def test_a_page_is_the_same_again(sleep: Any, pages: dict[str, Page], tmp_path: Path) -> None:
    assert report(sleep, tmp_path).source == pages["sleep"].source


# ---- numbers


@pytest.mark.parametrize("kind", ("sleep", "cbpp", "glm", "ols", "gee"))
def test_coefficients_are_those_of_print(pages: dict[str, Page], sleep: Any, kind: str) -> None:
    """Estimate, standard error, test and p of every coefficient, digit by digit."""
    cbpp = datasets.path("cbpp")
    fit = {
        "sleep": lambda: sleep,
        "cbpp": lambda: mp.glmm("cbind(incidence, size - incidence) ~ period + (1 | herd)", cbpp, family="binomial"),
        "glm": lambda: mp.glm("cbind(incidence, size - incidence) ~ period", cbpp, family="binomial"),
        "ols": lambda: mp.ols("reaction ~ days", SLEEP, absorb="subject", cluster="subject"),
        "gee": lambda: mp.gee("reaction ~ days", SLEEP, groups="subject"),
    }[kind]()
    cells = pages[kind].cells()
    for name in fit.names:
        line = next(line for line in fit.summary().split("\n") if line.startswith(name)).removeprefix(name).split()
        row = cells[cells.index(name) :][:8]
        assert line[:2] == row[1:3] and set(line) <= set(row)


def test_intervals_variances_and_criteria(pages: dict[str, Page], sleep: Any) -> None:
    found = pages["sleep"]
    cells, text = found.cells(), found.text()
    assert "7.4 to 13.5" in cells and "238.0 to 264.8" in cells
    for value in ("612.09", "24.740", "35.07", "5.922", "654.94", "25.592", "0.07"):
        assert value in cells
    for value in ("1,743.6", f"{-2 * sleep.loglik + 12:,.1f}", "0.279", "0.799", "180 rows · 18 levels of subject"):
        assert value in text
    shares = sleep.icc()["subject"]
    assert f"{100 * shares:.0f}%" in text and f"width:{100 * shares:.2f}%" in found.source


def test_odds_ratios(pages: dict[str, Page]) -> None:
    cells = pages["cbpp"].cells()
    row = cells[cells.index("period2") :][:8]
    assert row[4] == f"{np.exp(-0.9923):.3f}" and row[5] == "0.203 to 0.676"
    assert cells[cells.index("(Intercept)") :][4] == "–"


def test_every_level_is_drawn_and_the_ends_are_named(pages: dict[str, Page], sleep: Any) -> None:
    found = pages["sleep"]
    modes = pl.DataFrame(sleep.ranef(wide=True)).sort("days")
    assert all(subject in found.text("svg") for subject in modes["subject"])
    assert f"Lowest: {modes['subject'][0]} , highest: {modes['subject'][-1]}" in found.text("figcaption")
    apart = int(((modes["days"].abs() / modes["days_se"]) > st.norm.ppf(0.975)).sum())
    assert f"{apart} of 18 intervals leave out zero" in found.text("figcaption")


def test_extremes_and_a_band_of_many_levels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(700), 4)
    frame = pl.DataFrame({"y": rng.normal(size=700)[g] + rng.normal(size=len(g)), "g": g})
    found = report(mp.lmm("y ~ 1 + (1 | g)", frame), tmp_path)
    assert "the 50 lowest and 50 highest of 700 one by one, the others as a band of means" in found.text("figcaption")
    assert "the stronger the colour the more of them" in found.text("figcaption")  # 2,800 rows are counts
    assert len(found.source) < 600_000
    check_alone(found)


def test_the_statements_that_ran(pages: dict[str, Page]) -> None:
    shown = pages["sleep"].text("pre")
    assert "READ_PARQUET" in shown and str(SLEEP) in shown and "GROUP BY" in shown and "SUM(f1 * f2)" in shown


def test_numbers_are_short() -> None:
    values = {1234567.0: "1,234,567", 0.000123: "1.23e-04", 0.0: "0", 10.467: "10.5", -1.139: "-1.14", 0.2057: "0.206", np.nan: "unknown"}
    assert {value: number(value) for value in values} == values


# ---- how to read it


def said(fit: Any) -> str:
    return Page(f"<main>{page.bullets(sentences(fit))}</main>").text()


def test_sentences_of_a_random_slope(sleep: Any) -> None:
    text = said(sleep)
    b, s = sleep.fixef()["days"], next(row["sd"] for row in sleep.varcorr().to_pylist() if row["term1"] == "days")
    assert "each subject (there are 18) has its own level and its own effect of days" in text
    assert "With one unit more of days , reaction is 10.5 higher on average (95% interval of the difference 7.44 to 13.5)" in text
    assert f"between {number(b - 1.96 * s)} and {number(b + 1.96 * s)} for 95% of them" in text
    assert f"about {100 * st.norm.cdf(-b / s):.0f}% have an effect of the other sign" in text
    assert "says little about its effect of days (correlation 0.07)" in text and "48% of the variance" in text and "REML" in text


def test_sentences_of_other_models() -> None:
    frame = visits(240).with_columns(pl.Series("arm", ["a", "b"] * 120), n=pl.Series(np.random.default_rng(1).poisson(3, 240)))
    text = said(mp.lmm("minutes ~ age + arm + (1 | clinic)", frame, reml=False))
    assert "With arm = b rather than a , minutes is" in text and "REML" not in text
    text = said(quiet(lambda: mp.glmm("n ~ arm * age + (1 | clinic)", frame, family="poisson")))
    assert "the mean of n is" in text and "times as high" in text and "where what it interacts with is zero or at its base level" in text
    assert "have a colon" in text and "These effects compare rows of one and the same clinic" in text
    assert "Ratios between averages over all levels are the same" in text
    text = said(mp.lmm("minutes ~ age + C(arm, sum) + (1 | clinic)", frame))
    assert "arm" not in text  # a sum contrast has no plain meaning
    text = said(mp.gee("n ~ arm", frame, groups="clinic", family="poisson"))
    assert "working correlation: exchangeable" in text and "compare averages" in text and "sandwich" in text
    assert "single equation for all rows, within levels of clinic" in said(mp.ols("minutes ~ age", frame, absorb="clinic"))


def test_cautions(sleep: Any) -> None:
    rng = np.random.default_rng(1)
    frame = pl.DataFrame({"y": rng.normal(size=120), "x": rng.normal(size=120), "g": np.repeat(np.arange(12), 10)})
    frame = frame.with_columns(z=pl.col("x") * 2, x=pl.when(pl.int_range(120) % 9 == 0).then(None).otherwise(pl.col("x")))
    fit = quiet(lambda: mp.lmm("y ~ x + z + (1 + x | g)", frame))
    assert fit.singular and fit.dropped
    text = said(fit)
    assert text.startswith("The fit is singular (") and "z repeats" in text and "12% of the rows were left out" in text
    assert "have an effect of the other sign" not in text  # the size of a part on the boundary is not read
    y = np.repeat([0.0, 1.0], 30)
    data = pl.DataFrame({"y": y, "x": y, "g": np.tile(np.arange(6), 10)})
    text = said(quiet(lambda: mp.glm("y ~ x", data, family="binomial")))
    assert "without error in these rows (separation)" in text
    text = said(quiet(lambda: mp.lmm(FORMULA, SLEEP, options=mp.Options(max_passes=1))))
    assert text.startswith("The search for the estimates did not come to an end") and "Do not use these numbers" in text


# ---- fits that were written


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of one model, appended."""
    target = tmp_path_factory.mktemp("written") / "fit"
    for k in range(3):
        mp.lmm("minutes ~ age + (1 | clinic)", visits(seed=k, shift=0.05 * k)).write(target, mode="append", run_id=f"run{k}")
    return target


@pytest.mark.parametrize("kind", ["directory", "database"])
def test_drift_over_runs(written: Path, tmp_path: Path, kind: str) -> None:
    target = written
    if kind == "database":
        target = tmp_path / "fits.duckdb"
        for k in range(3):
            mp.lmm("minutes ~ age + (1 | clinic)", visits(seed=k, shift=0.05 * k)).write(target, mode="append", run_id=f"run{k}")
    found = report(target, tmp_path)
    fits = [mp.lmm("minutes ~ age + (1 | clinic)", visits(seed=k, shift=0.05 * k)) for k in (1, 2)]
    change = (fits[1].fixef()["age"] - fits[0].fixef()["age"]) / np.sqrt(fits[1].vcov()[1, 1])
    cells = found.cells()
    at = max(i for i, cell in enumerate(cells) if cell == "age")
    assert cells[at : at + 5] == ["age", *(number(f.fixef()["age"]) for f in fits), number(np.sqrt(fits[1].vcov()[1, 1])), f"{change:+.2f}"]
    assert "in the last 3 runs" in found.text("figcaption") and "Drift over runs" in found.text("h2")
    assert "look at what arrived" in found.text() and "run2" in found.text()
    check_alone(found)


def test_runs_are_told_apart_by_as_little_as_it_takes() -> None:
    def shown(*times: str) -> list[str]:
        return history._times([history.Run("", datetime.fromisoformat(time), {}, {}, {}) for time in times])

    assert shown("2026-03-01T02:00", "2026-03-02T02:00") == ["01 Mar", "02 Mar"]
    assert shown("2025-03-01T02:00", "2026-03-01T02:00") == ["01 Mar 2025", "01 Mar 2026"]
    assert shown("2026-03-01T02:00", "2026-03-01T03:00") == ["01 Mar 02:00", "01 Mar 03:00"]
    assert shown("2026-03-01T02:00", "2026-03-01T02:00") == ["01 Mar 02:00:00 (1)", "01 Mar 02:00:00 (2)"]


def test_modes_are_computed_once(tmp_path: Path) -> None:
    fit = mp.lmm(FORMULA, SLEEP)
    assert fit.effects_table is None
    mp.report(fit, tmp_path / "r.html")
    assert fit.effects_table is not None and len(fit.effects_table) == 18


def test_without_rows_the_page_says_how_to_get_residuals(written: Path, tmp_path: Path) -> None:
    found = report(written, tmp_path)
    assert "mlpipe report FIT DATA" in found.text() and "Pearson residuals of" not in found.text()
    frame = visits(seed=2, shift=0.1)
    assert "Pearson residuals of 300 rows" in report(written, tmp_path, data=frame).text()
    assert "These are 100 rows, and not the 300 of the fit" in report(written, tmp_path, data=frame.head(100)).text()


def test_without_modes(sleep: Any, tmp_path: Path) -> None:
    sleep.write(tmp_path / "fit", ranef=False)
    found = report(tmp_path / "fit", tmp_path)
    assert "written without the effects of its levels" in found.text() and "Fixed effects" in found.text("h2")
    check_alone(found)


def test_a_job_with_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlpipe.job import fit_job, read_job, write_output

    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(
        '[source]\npath = "day*.parquet"\n[model]\nformula = "minutes ~ ns(age, df=2) + (1 | clinic)"\n[store]\npath = "state"\n'
        '[output]\ntarget = "fit"\nmode = "overwrite"\n'
    )
    for k in range(2):
        visits(seed=k).write_parquet(tmp_path / f"day{k}.parquet")
        job = read_job("job.toml")
        fit = fit_job(job, {})
        write_output(fit, job.output)
    text = report("fit", tmp_path).text()
    assert "1 of 2 partitions were read for this fit" in text and "Since the store was made the mean of age moved by" in text
    worst = fit.info["drift"]
    assert f"{abs(worst['largest']):.2f} of its standard errors" in text and "day1.parquet" in text and "day0.parquet" not in text


@pytest.fixture(scope="module")
def by_year(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with one fit a year, and its data."""
    from mlpipe.job import fit_jobs, read_job, write_outputs

    folder = tmp_path_factory.mktemp("by")
    frame = visits(450)
    lone = pl.DataFrame({"minutes": [1.0, 2.0], "age": [1.0, 2.0], "clinic": [99, 99], "year": [2030, 2030]}).cast(frame.schema)
    pl.concat([frame, lone]).write_parquet(folder / "rows.parquet")
    (folder / "job.toml").write_text(
        f'[source]\npath = "{folder}/rows.parquet"\n[model]\nformula = "minutes ~ age + (1 | clinic)"\nby = ["year"]\n'
        f'[output]\ntarget = "{folder}/fits"\n'
    )
    job = read_job(folder / "job.toml")
    write_outputs(quiet(lambda: fit_jobs(job, {})), job.output)
    return folder / "fits", folder / "rows.parquet"


def test_the_fits_of_a_run(by_year: tuple[Path, Path], tmp_path: Path) -> None:
    found = report(by_year[0], tmp_path)
    text, cells = found.text(), found.cells()
    assert "4 fits" in text and "3 converged" in text and "1 could not be fitted" in text and cells[0] == "2030"
    assert "could not be fitted: " in cells[1] and "READ_PARQUET" in found.text("pre")
    fits = [mp.load(by_year[0], by={"year": year}) for year in (2020, 2021, 2022)]
    b, w = np.array([f.fixef()["age"] for f in fits]), np.array([1 / f.vcov()[1, 1] for f in fits])
    q = float(w @ (b - w @ b / w.sum()) ** 2)
    assert f"(Q = {number(q)} on 2 degrees of freedom, p = {st.chi2.sf(q, 2):.3g})" in text
    assert all(year in found.text("svg") for year in ("2020", "2021", "2022"))
    check_alone(found)


@pytest.mark.parametrize(("where", "said"), [("days < 5", "not fitted to rows chosen alike"), (None, "fitted to the same rows")])
def test_models_of_other_rows_are_not_said_to_share_them(where: str | None, said: str, tmp_path: Path) -> None:
    from mlpipe.job import fit_jobs, read_job, write_outputs

    condition = f"where = '{where}'\n" if where is not None else ""
    (tmp_path / "job.toml").write_text(
        f'[source]\npath = "{SLEEP}"\n[[models]]\nname = "a"\nformula = "reaction ~ days + (1 | subject)"\n'
        f'[[models]]\nname = "b"\nformula = "reaction ~ 1 + (1 | subject)"\n{condition}[output]\ntarget = "{tmp_path}/fits"\n'
    )
    job = read_job(tmp_path / "job.toml")
    write_outputs(fit_jobs(job, {}), job.output)
    mp.report(tmp_path / "fits", tmp_path / "page.html")
    assert said in (tmp_path / "page.html").read_text()


def test_one_fit_of_a_run(by_year: tuple[Path, Path], tmp_path: Path) -> None:
    target, data = by_year
    found = report(target, tmp_path, by={"year": "2021"}, data=data)  # a text stands for the number; only its rows are read
    n = mp.load(target, by={"year": 2021}).rows
    text = found.text()
    assert "year = 2021" in text and f"Pearson residuals of {n} rows" in text and "and not the" not in text
    assert "READ_PARQUET" in found.text("pre")  # of the scan that all share
    for by, message in (({"year": "abc"}, "no value of 'year'"), ({"year": 1999}, "0 of them match"), ({"region": 1}, "not by 'region'")):
        with pytest.raises(mp.ConfigError, match=message):
            mp.report(target, tmp_path / "x.html", by=by)
    with pytest.raises(mp.ConfigError, match="residuals are of one fit"):
        mp.report(target, tmp_path / "x.html", data=data)
    with pytest.raises(mp.DataError, match="could not be fitted"):
        mp.report(target, tmp_path / "x.html", by={"year": 2030})
    assert not (tmp_path / "x.html").exists()


# ---- files, errors, the command


def test_a_report_that_fails_leaves_what_was_there(sleep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "_page", lambda *_: "text")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(mp.ResourceError, match="No space left"):
        mp.report(sleep, target)
    assert target.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_fit_at_hand_is_not_chosen(sleep: Any, tmp_path: Path) -> None:
    for wanted in ({"model": "other"}, {"by": {"region": "north"}}):
        with pytest.raises(mp.ConfigError, match="choose among fits that were written"):
            mp.report(sleep, tmp_path / "x.html", **wanted)


def test_a_report_never_replaces_what_it_reads(sleep: Any, tmp_path: Path) -> None:
    for name in ("fit.duckdb", "rows.parquet"):
        sleep.write(tmp_path / name) if name == "fit.duckdb" else pl.read_parquet(SLEEP).write_parquet(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    rows = tmp_path / "rows.parquet"
    for name, data in [("fit.duckdb", None), ("rows.parquet", rows), ("rows.parquet", [str(rows)])]:
        with pytest.raises(mp.ConfigError, match=f"{name} is what is read, and would be replaced"):
            mp.report(tmp_path / "fit.duckdb", tmp_path / name, data=data)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_never_replaces_a_part_of_its_fit(sleep: Any, tmp_path: Path) -> None:
    sleep.write(tmp_path / "fit", run_id="r")
    parts = {path: path.read_bytes() for path in (tmp_path / "fit").rglob("*") if path.is_file()}
    for part in ("fit.json", "runs/r/mlpipe_coef.parquet"):
        with pytest.raises(mp.ConfigError, match=f"{part} is what is read, and would be replaced"):
            mp.report(tmp_path / "fit", tmp_path / "fit" / part)
    assert {path: path.read_bytes() for path in parts} == parts
    for _ in range(2):
        mp.report(tmp_path / "fit", tmp_path / "fit" / "page.html")


def test_without_the_packages(sleep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "vl_convert":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(mp.ConfigError, match="vl-convert-python") as caught:
        mp.report(sleep, tmp_path / "x.html")
    assert "mlpipe[plot]" in str(caught.value.hint) and not (tmp_path / "x.html").exists()


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mlpipe", "report", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, capsys.readouterr().err

    yield run


def test_the_command(invoke: Any, by_year: tuple[Path, Path], tmp_path: Path) -> None:
    target, data = map(str, by_year)
    assert invoke(target, data, "--by", "year=2020", "--out", "r.html") == (0, "")
    assert "Pearson residuals" in (tmp_path / "r.html").read_text()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "fit.json").write_text("{}")
    for code, arguments, message in (
        (2, [target], "--out"),
        (2, [target, "--by", "year", "--out", "x.html"], "COLUMN=VALUE"),
        (2, [target, "--model", "nobody", "--out", "x.html"], "0 of them match"),
        (3, ["nothing", "--out", "x.html"], "there is no fit in nothing"),
        (3, ["notes", "--out", "x.html"], "does not hold a fit"),
        (3, [target, "no.parquet", "--by", "year=2020", "--out", "x.html"], "no.parquet"),
        (5, [target, "--out", "notes"], "not a regular file"),
        (5, [target, "--out", "no/where.html"], "cannot write no/where.html"),
    ):
        found, err = invoke(*arguments)
        assert (found, message in err) == (code, True), (arguments, err)
    assert not (tmp_path / "x.html").exists()


def test_drawings_keep_their_ids_apart() -> None:
    drawn = drawing._embedded('<svg xmlns="x" width="1" viewBox="0"><a id="g"/><b fill="url(#g)"/>url(#g)</svg>', "fig", "a <b>")
    head = '<svg width="1" viewBox="0" role="img" aria-label="a &lt;b&gt;">'
    assert drawn == head + '<a id="fig-g"/><b fill="url(#fig-g)"/>url(#g)</svg>'


# ---- statements that are noted with a fit


def test_what_ran_is_noted(sleep: Any) -> None:
    from mlpipe.engines.base import MOST_SQL, noted

    assert any("GROUP BY k2" in sql for sql in sleep.info["sql"])
    fit = mp.lmm("minutes ~ age + (1 | clinic)", visits())
    assert any("GROUP BY" in sql for sql in fit.info["sql"]) and not any("READ_" in sql for sql in fit.info["sql"])
    fit = mp.glm("clinic ~ age", visits(), family="poisson")
    assert any("SELECT" in sql for sql in fit.info["sql"])
    ran: list[str] = []
    for sql in ("a", "b", "a", "c" * MOST_SQL, "d"):
        noted(ran, sql)
    assert ran == ["a", "b", "d"]
