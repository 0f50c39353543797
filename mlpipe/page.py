"""A page of HTML that stands alone: text, tables, figures and the style of them, nothing to load. All text is escaped here."""
from __future__ import annotations

import html as markup
import re
from collections.abc import Iterable, Sequence

from . import __version__
from .layout import printable

# Nothing may be fetched and no script may run, whatever a label holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d1d1b; --soft: #63605a; --rule: #dedbd3; --wash: #f6f4ef; --mark: #1f5a94;
  --part2: #7fa7cc; --part3: #c8d9ea; --good: #2c6e49; --warn: #8a5a00; --bad: #a3261b; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #17181a; --ink: #e8e6e1; --soft: #a5a199; --rule: #3a3b3d;
  --wash: #212326; --mark: #8fbbe6; --part2: #4d7ba8; --part3: #2f4a66; --good: #7cc79b; --warn: #e0b25c; --bad: #f08c80; }
  figure svg { filter: invert(1) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 "Iowan Old Style", "Palatino Linotype", Palatino,
  "URW Palladio L", P052, Georgia, "DejaVu Serif", serif; font-variant-numeric: lining-nums; }
main { max-width: 46rem; margin: 0 auto; padding: 3.5rem 1.25rem 5rem; }
table, figure, .kicker, .meta, .status, .shares, footer, summary, .facts { font-family: system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, "Liberation Sans", "DejaVu Sans", sans-serif; }
.kicker { margin: 0; color: var(--soft); font-size: .85rem; letter-spacing: .02em; }
h1 { margin: .35rem 0 .6rem; font-size: 1.55rem; line-height: 1.3; font-weight: 600; }
h1 code { background: none; padding: 0; font-size: .88em; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .8rem; padding-top: 1rem; border-top: 1px solid var(--rule); font-size: 1.3rem; font-weight: 600; line-height: 1.25; }
h3 { margin: 2rem 0 .5rem; font-size: 1.02rem; font-weight: 600; }
p, ul { margin: .7rem 0; }
ul.reading { padding-left: 1.1rem; }
ul.reading li { margin: .5rem 0; }
ul.reading li::marker { color: var(--soft); }
.meta { color: var(--soft); font-size: .88rem; margin: .3rem 0; }
code { font: .88em ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; background: var(--wash);
  padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
.status { display: flex; flex-wrap: wrap; gap: .5rem; padding: 0; margin: 1rem 0 0; list-style: none; font-size: .82rem; }
.status li { padding: .15rem .65rem; border: 1px solid currentColor; border-radius: 99px; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; line-height: 1.35; font-variant-numeric: tabular-nums lining-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .5rem; }
th { text-align: left; font-weight: 500; color: var(--soft); border-bottom: 1px solid var(--ink); vertical-align: bottom; }
th, td { padding: .38rem .8rem .38rem 0; }
td { border-bottom: 1px solid var(--rule); vertical-align: top; max-width: 20rem;
  overflow-wrap: break-word; }
td code { overflow-wrap: break-word; }
th.n, td.n { text-align: right; white-space: nowrap; overflow-wrap: normal; padding-right: 0; padding-left: .8rem; }
.dense table { font-size: .8rem; } .dense th.n, .dense td.n { padding-left: .55rem; }
figure { margin: 1.6rem 0; }
figure svg { display: block; max-width: 100%; height: auto; overflow: visible; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0 1.5rem; align-items: start; }
figcaption { margin-top: .5rem; color: var(--soft); font-size: .84rem; line-height: 1.45; }
.shares { display: flex; height: 1.5rem; margin: 1rem 0 .5rem; border-radius: 3px; overflow: hidden; }
.shares span { min-width: 2px; }
.key { display: inline-block; width: .75em; height: .75em; margin-right: .4em; border-radius: 2px; }
.p0 { background: var(--mark); } .p1 { background: var(--part2); } .p2 { background: var(--part3); } .p3 { background: var(--rule); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .9rem 1.2rem; margin: 1rem 0;
  font-size: .86rem; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
details { margin: .6rem 0; } summary { cursor: pointer; font-size: .86rem; color: var(--soft); }
pre { margin: .6rem 0; padding: .8rem 1rem; background: var(--wash); border-radius: 4px; overflow-x: auto; font-size: .76rem;
  line-height: 1.45; }
pre code { background: none; padding: 0; font-size: 1em; overflow-wrap: normal; }
footer { margin-top: 3.5rem; padding-top: .8rem; border-top: 1px solid var(--rule); color: var(--soft); font-size: .78rem;
  overflow-wrap: anywhere; }
@media (max-width: 34rem) { main { padding-top: 2rem; } body { font-size: 16px; } }
@media print { body { font-size: 10.5pt; } main { max-width: none; padding: 0; } h2 { margin-top: 1.6rem; }
  h2, h3 { break-after: avoid; }
  figure, tr, .shares { break-inside: avoid; } .wide { overflow: visible; } pre { white-space: pre-wrap; } }
"""

PARTS = 4  # colours of the shares
DENSE = 6  # columns above which a table is set closer


def text(value: object) -> str:
    """A text, escaped; characters that cannot be seen (or that turn the direction of what follows) as escapes."""
    return markup.escape(printable(str(value)))


def code(value: object) -> str:
    """A name or a formula."""
    return f"<code>{text(value)}</code>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", left: int = 1) -> str:
    """A table; cells are HTML, the first `left` of a row flush left, the others figures."""
    sides = ["" if k < left else ' class="n"' for k in range(len(head))]
    top = "".join(f'<th scope="col"{side}>{cell}</th>' for side, cell in zip(sides, head, strict=True))
    body = "\n".join("<tr>" + "".join(f"<td{side}>{cell}</td>" for side, cell in zip(sides, row, strict=True)) + "</tr>" for row in rows)
    title = f"<caption>{caption}</caption>" if caption else ""
    kind = "wide dense" if len(head) > DENSE else "wide"
    return f'<div class="{kind}"><table>{title}<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def figure(drawing: str, caption: str) -> str:
    """A drawing with its caption, both HTML."""
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def pair(figures: Iterable[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="pair">{"".join(figures)}</div>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values, both HTML."""
    return '<dl class="facts">' + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs) + "</dl>"


def shares(parts: Sequence[tuple[str, float]]) -> str:
    """A bar of shares of one whole (name as HTML, share), and its key."""
    bar = "".join(f'<span class="p{min(k, PARTS - 1)}" style="width:{100 * share:.2f}%"></span>' for k, (_, share) in enumerate(parts))
    keys = "".join(
        f'<li><span class="key p{min(k, PARTS - 1)}"></span>{name} {100 * share:.0f}%</li>' for k, (name, share) in enumerate(parts)
    )
    return f'<div class="shares" aria-hidden="true">{bar}</div><ul class="meta" style="list-style:none;padding:0">{keys}</ul>'


def bullets(items: Iterable[str]) -> str:
    """Sentences, HTML, one a point."""
    return '<ul class="reading">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def status(chips: Iterable[tuple[str, str]]) -> str:
    """(kind, text) of short remarks; kinds are "good", "warn" and "bad"."""
    return '<ul class="status">' + "".join(f'<li class="{kind}">{text(word)}</li>' for kind, word in chips) + "</ul>"


def statement(sql: str, title: str) -> str:
    """A statement of SQL, folded."""
    return f"<details><summary>{title}</summary><pre><code>{_escaped_lines(sql)}</code></pre></details>"


def _escaped_lines(sql: str) -> str:
    return "\n".join(text(line.replace("\t", "    ")) for line in sql.split("\n"))


def section(title: str, *parts: str) -> str:
    """A section under its heading; nothing where it has no part."""
    body = "\n".join(part for part in parts if part)
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    return f'<section id="{name}"><h2>{text(title)}</h2>\n{body}\n</section>' if body else ""


def footer() -> str:
    """The end of a page."""
    return f"<footer>Made by mlpipe {__version__}. This page stands alone: nothing is loaded from elsewhere.</footer>"


def document(title: str, parts: Iterable[str]) -> str:
    """The whole page; `title` is plain text."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
