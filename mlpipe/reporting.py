"""A report on a fit: one page of HTML that stands alone, to be read, sent and printed."""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import __version__, history, page, sections
from .atomic import regular, replacing
from .drawing import require
from .errors import ResourceError
from .layout import one_line
from .reading import sentences
from .result import MixedFit
from .store import load, tables_of_runs

if TYPE_CHECKING:
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
    too; of a job with several fits `model` and `by`, the values it is for, say which. `data`: the rows, for the plots of residuals, by one
    scan; a fit that has its source at hand needs none. A file that exists is replaced once the new one is complete.

    Raises ConfigError where Altair or vl-convert-python is not installed or several fits match, DataError where there is no fit or the
    data cannot be read, ResourceError where the file cannot be written.
    """
    require()
    target = regular(path)
    if isinstance(fit, MixedFit):
        text = _page(fit, [], list(fit.info.get("sql", ())), data, options)
    else:
        held = load(fit, prefix, model, by)
        runs = history.runs_of(fit, prefix, held.written)
        text = _page(held, runs, _statements(held, fit, prefix), data, options)
    try:
        with replacing(target) as file:
            file.write(text.encode())
    except OSError as error:
        raise ResourceError(f"cannot write {os.fspath(path)}: {error.strerror or error}", code="not_writable") from error


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
        f"<footer>Made by mlpipe {__version__}. This page stands alone: nothing is loaded from elsewhere.</footer>",
    ]
    return page.document(one_line(fit.formula), parts)


def _statements(fit: MixedFit, target: Any, prefix: str) -> list[str]:
    """The SQL that ran for a fit; of several from one scan the first one's record has it."""
    if sql := fit.info.get("sql"):
        return list(sql)
    manifest = tables_of_runs(target, prefix, ["manifest"])[-1]["manifest"]
    return list(json.loads(manifest["info"][0].as_py()).get("sql", ()))
