"""A plot as SVG text for a page: drawn by vl-convert, which carries the renderer and needs neither browser nor network."""
from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .layout import printable

if TYPE_CHECKING:
    from .plot import Plot

INK, SOFT, FAINT = "#3a3833", "#63605a", "#e6e3dc"
# labels are measured as Liberation Sans, which is as wide as these
FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"
_AXIS = {
    "labelColor": SOFT, "titleColor": INK, "gridColor": FAINT, "domain": False, "ticks": False, "labelPadding": 6, "labelFontSize": 11,
    "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 10, "labelLimit": 180, "labelFlush": False,
}  # fmt: skip
THEME: dict[str, Any] = {
    "background": "transparent", "font": FONT, "aria": False, "view": {"stroke": None}, "axis": _AXIS,
    "axisXQuantitative": {"tickCount": 6}, "axisXBand": {"grid": False}, "padding": {"left": 5, "right": 12, "top": 8, "bottom": 8},
    "legend": {
        "labelColor": SOFT, "titleColor": INK, "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "orient": "top",
    },
    "header": {"labelColor": INK, "labelFontSize": 12, "title": None, "labelPadding": 4},
}  # fmt: skip


def require() -> tuple[Any, Any]:
    """Altair and vl-convert. Raises ConfigError where one is not installed."""
    try:
        import altair
        import vl_convert
    except ImportError as error:
        raise ConfigError(
            "a report's figures need Altair and vl-convert-python", code="no_altair", hint="pip install 'mlpipe[plot]'"
        ) from error
    return altair, vl_convert


def svg(plot: Plot, name: str, title: str, *, legend: bool = True, **size: Any) -> str:
    """The drawing: an SVG element without scripts, links or anything to load; `name` begins its ids, `title` is read out in its place.

    `size`: `width` and `height` in pixels, as of an Altair chart. Raises ConfigError where Altair or vl-convert-python is not installed.
    """
    altair, vl_convert = require()
    rows = [{key: printable(value) if isinstance(value, str) else value for key, value in row.items()} for row in plot.table.to_pylist()]
    chart = plot.drawn(altair, rows).to_dict(validate=False)  # checked by the tests: it takes half the time of a page
    theme = THEME if legend else THEME | {"legend": {"disable": True}}
    return _embedded(vl_convert.vegalite_to_svg(chart | size | {"config": theme}), name, title)


def _embedded(drawn: str, name: str, title: str) -> str:
    """An SVG document as an element of a page: the page knows the namespaces, and ids must be its only ones."""
    import html as markup

    head, rest = re.match(r"<svg ([^>]*)>", drawn), drawn.partition(">")[2]
    assert head is not None
    kept = [text for text in re.findall(r'[\w:]+="[^"]*"', head[1]) if text.split("=")[0] in ("width", "height", "viewBox")]
    rest = re.sub(r"<[^>]*>", lambda tag: re.sub(r'( id="|url\(#)', rf"\1{name}-", tag[0]), rest)  # tags alone: a label is text
    return f'<svg {" ".join(kept)} role="img" aria-label="{markup.escape(printable(title))}">{rest}'
