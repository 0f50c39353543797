"""The figures of the tour, drawn from the shipped data: `python docs/figures.py` writes them, tests/test_docs.py draws them again."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl

import mlpipe as mp

FOLDER = Path(__file__).parent / "tour" / "figures"
INK, PALE, BLUE, RED = "#444", "#b8c4d0", "#1f5a94", "#c0392b"
Points = Iterable[tuple[float, float]]


class Axes:
    """A panel with two axes, written as SVG: everything is given in data units and rounded to a tenth of a pixel."""

    width, height, left, top = 420, 280, 56, 16

    def __init__(self, x: tuple[float, float], y: tuple[float, float], ticks: tuple[list[float], list[float]], names: tuple[str, str]):
        self.x, self.y, self.marks = x, y, []
        right, bottom = self.left + self.width, self.top + self.height
        self.marks.append(f'<path d="M{self.left} {self.top}V{bottom}H{right}" fill="none" stroke="{INK}"/>')
        for value in ticks[0]:
            self.text(self.at(value, y[0])[0], bottom + 18, f"{value:g}", "middle")
        for value in ticks[1]:
            self.text(self.left - 8, self.at(x[0], value)[1] + 4, f"{value:g}", "end")
        self.text((self.left + right) / 2, bottom + 38, names[0], "middle")
        middle = (self.top + bottom) / 2
        self.marks.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{names[1]}</text>')

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point."""
        across, up = (x - self.x[0]) / (self.x[1] - self.x[0]), (y - self.y[0]) / (self.y[1] - self.y[0])
        return round(self.left + self.width * across, 1), round(self.top + self.height * (1 - up), 1)

    def text(self, x: float, y: float, words: str, anchor: str = "start", colour: str = INK) -> None:
        """Words at a pixel."""
        self.marks.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{words}</text>')

    def line(self, points: Points, colour: str, width: float = 1.0, dash: str = "") -> None:
        """A line through points."""
        path = " ".join(f"{a:g},{b:g}" for a, b in (self.at(*point) for point in points))
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashed}/>')

    def dots(self, points: Points, colour: str, radius: float = 4.0) -> None:
        """A dot at each point."""
        for a, b in (self.at(*point) for point in points):
            self.marks.append(f'<circle cx="{a:g}" cy="{b:g}" r="{radius:g}" fill="{colour}"/>')

    def key(self, row: int, words: str, colour: str, dash: str = "") -> None:
        """A line of the legend, to the right of the panel."""
        x, y = self.left + self.width + 16, self.top + 12 + 20 * row
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.marks.append(f'<path d="M{x} {y - 4}h22" stroke="{colour}" stroke-width="2"{dashed}/>')
        self.text(x + 28, y, words)

    def svg(self) -> str:
        """The whole figure."""
        size = f"{self.left + self.width + 220} {self.top + self.height + 48}"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="12" fill="{INK}">'
        return "\n".join([head, *self.marks, "</svg>", ""])


def slopes() -> str:
    """Eighteen lines fitted one by one, and drawn from the model."""
    sleep = pl.read_parquet(mp.datasets.path("sleepstudy"))
    fit = mp.lmm("reaction ~ days + (1 + days | subject)", sleep)
    axes = Axes((0, 9), (190, 480), ([0, 3, 6, 9], [200, 300, 400]), ("days", "reaction (ms)"))
    for row in fit.ranef(wide=True).to_pylist():
        own = sleep.filter(subject=row["subject"])
        slope, start = np.polyfit(own["days"], own["reaction"], 1)
        axes.line([(0, start), (9, start + 9 * slope)], PALE, 1.2)
        start, slope = fit.beta + [row["(Intercept)"], row["days"]]
        axes.line([(0, start), (9, start + 9 * slope)], BLUE, 1.2)
    start, slope = fit.beta
    axes.line([(0, start), (9, start + 9 * slope)], RED, 3)
    axes.key(0, "each subject alone", PALE)
    axes.key(1, "subjects by the model", BLUE)
    axes.key(2, "mean line", RED)
    return axes.svg()


def shrinkage() -> str:
    """What the mean of five marks of a lecturer, drawn at random, tells about the others."""
    marks = pl.read_parquet(mp.datasets.path("insteval"), columns=["d", "y"])
    marks = marks.with_columns(lot=np.random.default_rng(1).random(marks.height))
    first = pl.col("lot").rank("ordinal").over("d") <= 5
    five = mp.lmm("y ~ 1 + (1 | d)", marks.filter(first))
    mu, share = float(five.beta[0]), five.ranef()["reliability"][0].as_py()
    seen = marks.group_by("d", maintain_order=True).agg(
        own=pl.col("y").filter(pl.col("lot").rank("ordinal") <= 5).sum() / 5,
        later=pl.col("y").filter(pl.col("lot").rank("ordinal") > 5).mean(),
    )
    groups = seen.group_by("own").agg(pl.col("later").mean(), n=pl.len()).filter(pl.col("n") >= 10).sort("own")
    axes = Axes((1, 5), (1, 5), ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]), ("mean of five marks", "mean of all other marks"))
    axes.line([(1, 1), (5, 5)], RED, 2, "6 4")
    axes.line([(1, mu), (5, mu)], INK, 2, "2 4")
    axes.line([(1, mu + share * (1 - mu)), (5, mu + share * (5 - mu))], BLUE, 2)
    axes.dots(groups.select("own", "later").rows(), BLUE)
    axes.key(0, "own mean", RED, "6 4")
    axes.key(1, "everybody is average", INK, "2 4")
    axes.key(2, "BLUP", BLUE)
    axes.text(axes.left + axes.width + 16, axes.top + 72, "dots: lecturers with")
    axes.text(axes.left + axes.width + 16, axes.top + 88, "the same mean of five")
    return axes.svg()


def averages() -> str:
    """Curves of subjects, of the subject in the middle, and their mean."""
    sleep = pl.read_parquet(mp.datasets.path("sleepstudy")).with_columns(slow=pl.col("reaction") > 300)
    fit = mp.glmm("slow ~ days + (1 | subject)", sleep, family="binomial", nagq=25)
    axes = Axes((0, 9), (0, 1), ([0, 3, 6, 9], [0, 0.5, 1]), ("days", "chance of a slow reaction"))
    days = np.linspace(0, 9, 37)
    for b in fit.ranef()["estimate"].to_pylist():
        axes.line(zip(days, 1 / (1 + np.exp(-(fit.beta[0] + b + fit.beta[1] * days))), strict=True), PALE, 1.2)
    rows = pl.DataFrame({"days": days, "subject": ["new"] * len(days)})
    curves = (("population", BLUE, "middle subject, b = 0"), ("marginal", RED, "mean over subjects"))
    for row, (effects, colour, words) in enumerate(curves):
        axes.line(zip(days, pl.DataFrame(fit.predict(rows, effects=effects))["predicted"], strict=True), colour, 3)
        axes.key(row + 1, words, colour)
    axes.key(0, "subjects", PALE)
    axes.dots(sleep.group_by("days").agg(pl.col("slow").mean()).sort("days").rows(), INK, 3.5)
    axes.text(axes.left + axes.width + 16, axes.top + 72, "dots: share seen")
    return axes.svg()


DRAWN = {"slopes": slopes, "shrinkage": shrinkage, "averages": averages}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
