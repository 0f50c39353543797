"""R's rules for printed numbers and names, and columns of text."""
from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence

DIGITS = 4  # significant digits of every number in a column, at least, as in lme4's summary


def coefficients(values: Sequence[float]) -> list[str]:
    """R's printCoefmat: rounded to DIGITS significant digits of the smallest, which then keeps them all."""
    sizes = [math.floor(math.log10(abs(value))) for value in values if value and math.isfinite(value)]
    places = max(1, DIGITS - 1 - min(sizes, default=0))
    return formatted([round(value, places) if math.isfinite(value) else value for value in values])


def formatted(values: Sequence[float], digits: int = DIGITS) -> list[str]:
    """R's format(): as few common decimals as show each value to `digits` significant digits; an exponent where that is shorter."""
    significant, exponents = [1], [0]
    for value in values:
        if value and math.isfinite(value):
            mantissa, exponent = f"{abs(value):.{digits - 1}e}".split("e")
            significant.append(len(mantissa.rstrip("0").replace(".", "")))
            exponents.append(int(exponent))
    decimals = max(0, *(s - e - 1 for s, e in zip(significant, exponents, strict=True)))
    fixed = max(exponents) + 1 + (decimals + 1 if decimals else 0)
    places = max(significant) - 1
    if fixed <= places + (2 if places else 1) + 4:
        return [to_decimals(value, decimals) for value in values]
    return [f"{value:.{places}e}" if math.isfinite(value) else to_decimals(value, 0) for value in values]


def to_decimals(value: float, decimals: int) -> str:
    """So many decimals, or R's name for what is not finite."""
    return f"{value:.{decimals}f}" if math.isfinite(value) else "NaN" if math.isnan(value) else "-Inf" if value < 0 else "Inf"


def p_value(p: float) -> str:
    """A p-value as R prints it."""
    return "NaN" if math.isnan(p) else "<2e-16" if p < 2e-16 else f"{p:.3g}"


def ratio(covariance: float, product: float) -> str:
    """A correlation, NaN where a variance is zero."""
    return f"{covariance / product:5.2f}" if product > 0 else "  NaN"


def abbreviated(names: Sequence[str], length: int) -> list[str]:
    """Names of about `length` characters that stay distinct, as R's abbreviate(): `(Intercept)` becomes `(Intr)`.

    Lower-case vowels go first, then lower-case letters, then the rest, each from the end; the first character stays. Names that come
    out alike are given one character more until they differ.
    """
    out = [_shortened(name, length) for name in names]
    for more in range(length + 1, max(map(len, names), default=0) + 1):
        if len(set(out)) == len(out):
            break
        out = [_shortened(name, more) if out.count(short) > 1 else short for name, short in zip(names, out, strict=True)]
    return out


def _shortened(name: str, length: int) -> str:
    groups: tuple[Callable[[str], bool], ...] = (lambda c: c in "aeiou", str.islower, lambda c: True)
    for goes in groups:
        for i in range(len(name) - 1, 0, -1):
            if len(name) <= length:
                return name
            if goes(name[i]):
                name = name[:i] + name[i + 1 :]
    return name


def one_line(text: str) -> str:
    """A formula written over several lines, on one."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", text.strip()))


def printable(text: str) -> str:
    """Control characters as escapes: a column's name must not move the cursor, nor break a table."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _width(text: str) -> int:
    """Columns on a terminal: wide characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def aligned(rows: Sequence[Sequence[str]], *, left: int, indent: str = "") -> list[str]:
    """Columns of equal width: the first `left` flush left, the others flush right."""
    cells = [[printable(cell) for cell in row] for row in rows]
    sides = [j < left for j in range(len(cells[0]))]
    columns = [filled(column, flush_left) for column, flush_left in zip(zip(*cells, strict=True), sides, strict=True)]
    return [(indent + " ".join(row)).rstrip() for row in zip(*columns, strict=True)]


def filled(cells: Sequence[str], flush_left: bool) -> list[str]:
    """Cells of one width."""
    width = max(map(_width, cells))
    spaces = [" " * (width - _width(cell)) for cell in cells]
    return [cell + space if flush_left else space + cell for cell, space in zip(cells, spaces, strict=True)]
