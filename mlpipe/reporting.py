"""A report on a fit: one page of HTML that stands alone, to be read, sent and printed."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import history, overview, page, sections
from .atomic import apart, regular, replacing, writing
from .drawing import require
from .errors import ConfigError
from .layout import one_line
from .reading import sentences
from .result import MixedFit
from .sources import Subset
from .store import load, tables_of_runs

if TYPE_CHECKING:
    import pyarrow as pa

    from .history import Run
    from .options import Options


def report(
    fit: MixedFit | str | os.PathLike[str] | Any,
    path: str | os.PathLike[str],
    *,
    data: Any = None,
    model: str | None = None,
    by: Mapping[str, Any] | None = None,
    prefix: str = "mlpipe",
    options: Options | None = None,
) -> None:
    """Writes a report on a fit to an HTML file: one page that loads nothing and runs no script.

    `fit`: a fit, or what `fit.write` wrote it to (a directory, a DuckDB file or connection, `prefix`), whose earlier runs are then shown
    too; of a job with several fits `model` and `by`, the values it is for, say which: where several match, the page is on all of them.
    `data`: the rows, for the plots of residuals, by one scan; a fit that has its source at hand needs none. A file that exists is
    replaced once the new one is complete.

    Raises ConfigError where Altair or vl-convert-python is not installed, no fit matches, or the file is one that is read, DataError
    where there is no fit or the data cannot be read, ResourceError where the file cannot be written.
    """
    require()
    target = regular(path)
    apart(path, fit, data)
    if isinstance(fit, MixedFit):
        if model is not None or by:
            raise ConfigError("model and by choose among fits that were written, and this is one", code="which_fit")
        text = _page(fit, [], list(fit.info.get("sql", ())), data, options)
    else:
        text = _of_written(fit, prefix, model, by, data, options)
    with writing(os.fspath(path)), replacing(target) as file:
        file.write(text.encode())


def _of_written(
    target: Any, prefix: str, model: str | None, by: Mapping[str, Any] | None, data: Any, options: Options | None
) -> str:
    """The page on one fit that was written, or, where several match, on all of these."""
    try:
        held = load(target, prefix, model, by)
    except ConfigError as error:
        wanted = ({"model": model} if model is not None else {}) | dict(by or {})
        if error.code != "which_fit" or not (text := _of_many(target, prefix, wanted)):
            raise
        if data is not None:
            raise ConfigError("residuals are of one fit", code="which_fit", hint=error.hint) from None
        return text
    if data is not None and (keys := {name: value for name, value in held.written.items() if name not in ("run_id", "model")}):
        data = Subset(data, keys={name: (None if value is None else str(value),) for name, value in keys.items()})
    runs = history.runs_of(target, prefix, held.written)
    return _page(held, runs, _statements(held, target, prefix), data, options)


def _of_many(target: Any, prefix: str, wanted: Mapping[str, Any]) -> str:
    tables = tables_of_runs(target, prefix, ("fit", "coef", "manifest"))[-1]
    if "fit" not in tables or any(name not in tables["fit"].column_names for name in wanted):
        return ""
    return overview.whole(tables, wanted, _first_statements(tables["manifest"]))


def _page(fit: MixedFit, runs: Sequence[Run], sql: Sequence[str], data: Any, options: Options | None) -> str:
    run = runs[-1] if runs else None
    written = [f"{page.text(name)} = {page.text(value)}" for name, value in fit.written.items() if name not in ("run_id", "model")]
    parts = [
        sections.head(fit, run),
        f'<p class="meta">{", ".join(written)}</p>' if written else "",
        page.section("How to read it", page.bullets(sentences(fit))),
        sections.fixed(fit),
        sections.random(fit),
        sections.statistics(fit),
        sections.checks(fit, data, options),
        history.section(fit, runs),
        sections.provenance(fit, run, sql),
        page.footer(),
    ]
    return page.document(one_line(fit.formula), parts)


def _statements(fit: MixedFit, target: Any, prefix: str) -> list[str]:
    """The SQL that ran for a fit; of several from one scan the first one's record has it."""
    held = list(fit.info.get("sql", ()))
    manifest = None if held else tables_of_runs(target, prefix, ["manifest"])[-1].get("manifest")
    return held if manifest is None else _first_statements(manifest)


def _first_statements(manifest: pa.Table) -> list[str]:
    return list(json.loads(manifest["info"][0].as_py()).get("sql", ()))
