"""Plots of a fit: a table that is ready to be drawn by anything, and a chart of it by Altair.

No table exceeds MOST marks: points become counted rectangles, and of many levels the extremes are shown one by one, the others as a band.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import column, doubles
from .covariates import note_scan
from .effects import coefficient_names, ranef
from .errors import ConfigError, did_you_mean
from .grid import MOST, Grid
from .predictions import Output
from .quality import QQ_POINTS, pearson, qq, qq_table
from .sketch import Sketch
from .wald import check_level

if TYPE_CHECKING:
    import pyarrow as pa

    from .options import Options
    from .result import MixedFit

    Array = np.ndarray

MOST_LEVELS, EXTREMES, BINS = 500, 50, 200
NAMED = 40  # levels that an axis names
WIDTH, HEIGHT = 480, 300
LINE, MARK, BAND = "#888888", "#1f5a94", "#9db8d2"
COLOURS = [MARK, "#c2571a", "#3f8f5f", "#8a4f9e", "#b08a00", "#5b6770"]


class Plot:
    """A plot: `table`, what is drawn (pyarrow.Table), and `chart`, an `altair.Chart` of it, which notebooks show."""

    def __init__(self, table: pa.Table, draw: Callable[[Any, list[dict[str, Any]]], Any]) -> None:
        self.table, self._draw = table, draw

    @property
    def chart(self) -> Any:
        """The chart. Raises ConfigError where Altair is not installed."""
        try:
            import altair
        except ImportError as error:
            raise ConfigError("charts need Altair", code="no_altair", hint="pip install 'mlpipe[plot]', or draw .table") from error
        return self.drawn(altair, self.table.to_pylist())

    def drawn(self, altair: Any, rows: list[dict[str, Any]]) -> Any:
        """The chart of these rows in place of the table's."""
        return self._draw(altair, rows)

    def save(self, path: Any) -> None:
        """Writes the chart: .html or .json, and .png or .svg where vl-convert-python is installed."""
        self.chart.save(str(path))

    def __repr__(self) -> str:
        return f"<Plot of {self.table.num_rows:,} rows: {', '.join(self.table.column_names)}>"

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> Any:
        return self.chart._repr_mimebundle_(*args, **kwargs)


class Plots:
    """The plots of a fit, `fit.plot.<name>()`."""

    def __init__(self, fit: MixedFit) -> None:
        self._fit = fit

    def coefficients(self, conf_level: float = 0.95, intercept: bool = False) -> Plot:
        """Fixed effects with intervals: `term`, `estimate`, `conf_low`, `conf_high`."""
        rows = [row for row in self._fit.tidy(conf_level).to_pylist() if row["effect"] == "fixed"]
        rows = [row for row in rows if intercept or row["term"] != "(Intercept)"]
        return Plot(_table(rows, ("term",), ("estimate", "conf_low", "conf_high")), _draw_coefficients)

    def caterpillar(self, group: str | None = None, term: str | None = None, conf_level: float = 0.95) -> Plot:
        """Conditional modes in order with intervals: `kind` ("level", "band"), `rank`, `level`, `estimate`, `conf_low`, `conf_high`.

        Above 500 levels the 50 lowest and 50 highest one by one, and a band of means of the ranks between.
        """
        check_level(conf_level)
        group, term = _chosen(self._fit, group, term)
        return Plot(_caterpillar(self._fit, group, term, conf_level), _draw_caterpillar(f"{term} by {group}"))

    def residuals(self, data: Any = None, *, options: Options | None = None) -> Plot:
        """Pearson residuals against fitted values: `fitted`, `residual`, `count`, and, where they are counts of rectangles because there
        are more than 5,000 rows, `fitted_to`, `residual_to` of each. One scan."""
        return Plot(_residuals(self._fit, data, options), _draw_residuals)

    def qq(self, of: str = "residuals", *, points: int = 200, data: Any = None, options: Options | None = None) -> Plot:
        """Sample against normal quantiles, as the table `fit.qq`."""
        if isinstance(points, int) and points > MOST:
            raise ConfigError(f"points = {points:,} is more than {MOST:,}")
        return Plot(qq(self._fit, of, points, data, options), _draw_qq)

    def influence(self, top: int = 20, data: Any = None, *, group: str | None = None, options: Options | None = None) -> Plot:
        """Cook's distances of the most influential blocks, or levels of `group`: `level`, `cooks_distance`."""
        table = self._fit.influence(top, data, group=group, options=options)
        keys = table.column_names[: table.column_names.index("rows")]
        rows = [{"level": _label(row, keys), "cooks_distance": row["cooks_distance"]} for row in table.to_pylist()]
        return Plot(_table(rows, ("level",), ("cooks_distance",)), _draw_influence)


def _table(rows: list[dict[str, Any]], texts: tuple[str, ...], reals: tuple[str, ...]) -> pa.Table:
    import pyarrow as pa

    schema = pa.schema([(name, pa.string()) for name in texts] + [(name, pa.float64()) for name in reals])
    return pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)


def _label(row: dict[str, Any], keys: list[str]) -> str:
    return ":".join(str(row[key]) for key in keys)


# -- caterpillar


def _chosen(fit: MixedFit, group: str | None, term: str | None) -> tuple[str, str]:
    """The group and the coefficient. Raises ConfigError where none or several are meant."""
    if not fit.terms:
        raise ConfigError("the model has no random effects", code="no_random_effects")
    if group is None and len(fit.groups) > 1:
        raise ConfigError(f"several grouping factors: {', '.join(fit.groups)}", code="several_factors", hint="name one")
    group = group or fit.groups[0]
    if group not in fit.groups:
        raise ConfigError(f"there is no grouping factor {group!r}", hint=did_you_mean(group, fit.groups))
    names = coefficient_names([held for held in fit.terms if held.group == group])
    term = term or names[0]
    if term not in names:
        raise ConfigError(f"there is no random coefficient {term!r}", hint=did_you_mean(term, names))
    return group, term


def _caterpillar(fit: MixedFit, group: str, term: str, conf_level: float) -> pa.Table:
    import pyarrow as pa

    columns = 2 * sum(len(t.names) for t in fit.terms if t.group == group)
    modes = (pa.Table.from_batches([batch]) for batch in ranef(fit, wide=True, stream=True, group=group))
    return _ranked((table.select([*table.column_names[:-columns], term, f"{term}_se"]) for table in modes), term, conf_level)


def ranked(estimates: pa.Table, name: str, conf_level: float = 0.95) -> Plot:
    """A caterpillar of other estimates than random effects: key columns, `name`, and `<name>_se`."""
    return Plot(_ranked([estimates], name, conf_level), _draw_caterpillar(name))


def _ranked(tables: Iterable[pa.Table], term: str, conf_level: float) -> pa.Table:
    """The table of a caterpillar from tables of keys, the term's estimates and, last, their standard errors."""
    z = NormalDist().inv_cdf(0.5 + conf_level / 2.0)
    estimates, errors = [], []
    lowest: pa.Table | None = None
    highest: pa.Table | None = None
    for table in tables:
        estimates.append(column(table, term))
        errors.append(column(table, f"{term}_se"))
        keys = table.column_names[:-2]
        lowest, highest = _extreme(lowest, table, term, 1.0), _extreme(highest, table, term, -1.0)
    estimate, error = np.concatenate(estimates), np.concatenate(errors)
    order = np.argsort(estimate, kind="stable")
    estimate, error, n = estimate[order], error[order], len(order)
    assert lowest is not None and highest is not None
    if n <= MOST_LEVELS:
        rows = _levels(lowest, keys, term, z, range(1, n + 1))
    else:
        rows = _levels(lowest.slice(0, EXTREMES), keys, term, z, range(1, EXTREMES + 1))
        rows += _band(estimate[EXTREMES:-EXTREMES], error[EXTREMES:-EXTREMES], z)
        rows += _levels(highest.slice(0, EXTREMES), keys, term, z, range(n, n - EXTREMES, -1))[::-1]
    return _table(rows, ("kind", "level"), ("rank", "estimate", "conf_low", "conf_high"))


def _extreme(held: pa.Table | None, more: pa.Table, term: str, sign: float) -> pa.Table:
    """The MOST_LEVELS rows of least `sign` times the estimate."""
    import pyarrow as pa

    both = more if held is None else pa.concat_tables([held, more])
    return both.take(np.argsort(sign * column(both, term), kind="stable")[:MOST_LEVELS])


def _levels(table: pa.Table, keys: list[str], term: str, z: float, ranks: range) -> list[dict[str, Any]]:
    rows = []
    for rank, row in zip(ranks, table.to_pylist(), strict=False):
        b, half = row[term], z * row[f"{term}_se"]
        level = _label(row, keys)
        rows.append({"kind": "level", "level": level, "rank": rank, "estimate": b, "conf_low": b - half, "conf_high": b + half})
    return rows


def _band(estimate: Array, error: Array, z: float) -> list[dict[str, Any]]:
    """Means of estimates and limits over bins of ranks."""
    rows = []
    for at in np.array_split(np.arange(len(estimate)), min(BINS, len(estimate))):
        b, half = estimate[at], z * error[at]
        rank = float(at.mean()) + EXTREMES + 1
        limits = {"conf_low": float((b - half).mean()), "conf_high": float((b + half).mean())}
        rows.append({"kind": "band", "level": None, "rank": rank, "estimate": float(b.mean()), **limits})
    return rows


# -- runs


def history(rows: list[dict[str, Any]]) -> Plot:
    """Coefficients over runs: `term`, `run` (when), `number` (from 1), `estimate`, `conf_low`, `conf_high`."""
    return Plot(_table(rows, ("term", "run"), ("number", "estimate", "conf_low", "conf_high")), _draw_history)


def _draw_history(alt: Any, rows: list[dict[str, Any]]) -> Any:
    """A panel a coefficient, each with a scale of its own."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    shown = runs[:: max(1, -(-len(runs) // 6))]
    x = alt.X("run:N", sort=runs, title=None, axis=alt.Axis(values=shown, labelAngle=-30, grid=False))
    y = alt.Y("estimate:Q", title=None, scale=alt.Scale(zero=False))
    base = alt.Chart().encode(x=x)  # the panels share the data
    bars = base.mark_rule(color=BAND, strokeWidth=3).encode(y=alt.Y("conf_low:Q", title=None), y2="conf_high:Q")
    line = base.mark_line(color=MARK, strokeWidth=1.2).encode(y=y)
    dots = base.mark_point(color=MARK, filled=True, size=28, opacity=1).encode(y=y)
    terms = list(dict.fromkeys(row["term"] for row in rows))
    panels = alt.layer(bars, line, dots, data=alt.Data(values=rows)).properties(width=WIDTH * 0.55, height=HEIGHT * 0.4)
    return panels.facet(facet=alt.Facet("term:N", sort=terms, title=None), columns=2).resolve_scale(y="independent")


# -- residuals


def diagnostics(fit: MixedFit, data: Any, options: Options | None, most: int = MOST) -> tuple[Plot, Plot, int]:
    """The plots `residuals`, of at most so many marks, and `qq` from one scan, and how many rows have a residual."""
    sketch = Sketch()
    table = _residuals(fit, data, options, most, sketch)
    return Plot(table, _draw_residuals), Plot(qq_table({("Residual", "pearson"): sketch}, QQ_POINTS), _draw_qq), sketch.n


def _residuals(fit: MixedFit, data: Any, options: Options | None, most: int = MOST, sketch: Sketch | None = None) -> pa.Table:
    """Points, until there are more than `most` of them; then counts. The sketch takes in the residuals."""
    import pyarrow as pa

    from .scoring import scored

    best = "conditional" if fit.terms else "population"
    outputs: dict[str, Output] = {"fitted": fit.output(best), "residual": pearson(fit)}
    grid, n = Grid(most), 0
    points: list[tuple[Array, Array]] = []
    for batch in scored(fit, data, outputs, fit.groups, options, columns=()):
        x, y = doubles(batch.column(0)), doubles(batch.column(1))
        kept = np.isfinite(x) & np.isfinite(y)
        n += int(kept.sum())
        grid.add(x, y)
        if sketch is not None:
            sketch.add(y)
        points = [*points, (x[kept], y[kept])] if n <= most else []
    note_scan(fit, "residuals", data)
    if n <= most:
        x, y = (np.concatenate([np.zeros(0), *(pair[k] for pair in points)]) for k in (0, 1))
        return pa.table({"fitted": x, "residual": y, "count": np.ones(len(x))})
    assert grid.width is not None
    low, width = grid.cells * np.array(grid.width), grid.width
    columns = {"fitted": low[:, 0], "residual": low[:, 1], "count": grid.count}
    return pa.table(columns | {"fitted_to": low[:, 0] + width[0], "residual_to": low[:, 1] + width[1]})


# -- charts


def _draw_coefficients(alt: Any, rows: list[dict[str, Any]]) -> Any:
    y = alt.Y("term:N", sort=[row["term"] for row in rows], title=None)
    base = alt.Chart(alt.Data(values=rows))
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=LINE, strokeDash=[4, 3]).encode(x="zero:Q")
    tip = [alt.Tooltip("term:N"), *(alt.Tooltip(f"{name}:Q", format=".4g") for name in ("estimate", "conf_low", "conf_high"))]
    bars = base.mark_rule(color=MARK, strokeWidth=2).encode(y=y, x=alt.X("conf_low:Q", title="estimate with interval"), x2="conf_high:Q")
    dots = base.mark_point(color=MARK, filled=True, size=60, opacity=1).encode(y=y, x="estimate:Q", tooltip=tip)
    return (zero + bars + dots).properties(width=WIDTH, height=alt.Step(24))


def _draw_caterpillar(title: str) -> Callable[[Any, list[dict[str, Any]]], Any]:
    def draw(alt: Any, rows: list[dict[str, Any]]) -> Any:
        x = alt.X("rank:Q", title="rank of the level", scale=alt.Scale(nice=False, zero=False, padding=8))
        if len(rows) <= NAMED:
            x = alt.X("level:N", sort=[row["level"] for row in rows], title=None)
        base = alt.Chart(alt.Data(values=rows))
        levels, band = base.transform_filter("datum.kind == 'level'"), base.transform_filter("datum.kind == 'band'")
        tip = [alt.Tooltip("level:N"), *(alt.Tooltip(f"{name}:Q", format=".4g") for name in ("estimate", "conf_low", "conf_high"))]
        zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=LINE, strokeDash=[4, 3]).encode(y="zero:Q")
        layers = [
            zero,
            band.mark_area(color=BAND, opacity=0.6).encode(x=x, y=alt.Y("conf_low:Q", title=title), y2="conf_high:Q"),
            band.mark_line(color=MARK).encode(x=x, y="estimate:Q"),
            levels.mark_rule(color=MARK, opacity=0.6).encode(x=x, y=alt.Y("conf_low:Q", title=title), y2="conf_high:Q"),
            levels.mark_point(color=MARK, filled=True, size=25, opacity=1).encode(x=x, y="estimate:Q", tooltip=tip),
        ]
        return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)

    return draw


def _draw_residuals(alt: Any, rows: list[dict[str, Any]]) -> Any:
    base = alt.Chart(alt.Data(values=rows))
    x, y = alt.X("fitted:Q", title="fitted value", scale=alt.Scale(zero=False)), alt.Y("residual:Q", title="Pearson residual")
    if rows and "fitted_to" in rows[0]:
        colour = alt.Color("count:Q", title="rows", scale=alt.Scale(type="log", scheme="blues"))
        marks = base.mark_rect().encode(x=x, x2="fitted_to:Q", y=y, y2="residual_to:Q", color=colour, tooltip=alt.Tooltip("count:Q"))
    else:
        marks = base.mark_point(color=MARK, size=18, opacity=0.6, filled=True).encode(x=x, y=y)
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=LINE, strokeDash=[4, 3]).encode(y="zero:Q")
    return (marks + zero).properties(width=WIDTH, height=HEIGHT)


def _draw_qq(alt: Any, rows: list[dict[str, Any]]) -> Any:
    base = alt.Chart(alt.Data(values=rows))
    ends = [min((row["theoretical"] for row in rows), default=-1.0), max((row["theoretical"] for row in rows), default=1.0)]
    line = alt.Chart(alt.Data(values=[{"x": v, "y": v} for v in ends])).mark_line(color=LINE, strokeDash=[4, 3]).encode(x="x:Q", y="y:Q")
    dots = base.mark_point(size=20, filled=True, opacity=0.8).encode(
        x=alt.X("theoretical:Q", title="normal quantile"), y=alt.Y("sample:Q", title="standardized, sample quantile"),
        color=alt.Color("term:N", title=None, legend=_legend(alt, rows), scale=alt.Scale(range=COLOURS)),
        tooltip=["term:N", alt.Tooltip("sample:Q", format=".3f")],
    )  # fmt: skip
    return (line + dots).properties(width=HEIGHT, height=HEIGHT)


def _legend(alt: Any, rows: list[dict[str, Any]]) -> Any:
    """One where there are several terms to tell apart."""
    return alt.Legend() if len({row["term"] for row in rows}) > 1 else None


def _draw_influence(alt: Any, rows: list[dict[str, Any]]) -> Any:
    y = alt.Y("level:N", sort=[row["level"] for row in rows], title=None)
    bars = alt.Chart(alt.Data(values=rows)).mark_bar(color=MARK, size=10)
    x = alt.X("cooks_distance:Q", title="Cook's distance")
    tip = ["level:N", alt.Tooltip("cooks_distance:Q", format=".4g")]
    return bars.encode(y=y, x=x, tooltip=tip).properties(width=WIDTH, height=alt.Step(18))
