"""Data-dependent bases: poly, bs, ns, scale, center.

Each asks for a few summaries of its argument over the rows that enter the fit, turns them into constants (plain
JSON values, kept with the fit) and then is an ordinary scalar expression of its argument: arithmetic and CASE only.
"""
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import DataError, FormulaError, did_you_mean
from .expr import Binary, Call, Case, Logical, Node, Number, Unary, add, divide, label, multiply, subtract, unwrap
from .splines import Piece, Polynomial, natural, pieces

MAX_DEGREE = 12  # beyond it powers of [-1, 1] lose more than five digits
# Pivots of the Gram matrix below this share of its diagonal would leave the columns orthonormal to less than six digits.
DEPENDENT = 1e-11


@dataclass(frozen=True)
class Requests:
    """What a basis must know of its argument.

    `moments`: mean and standard deviation (n - 1); `range`: minimum and maximum; `chebyshev`: the highest order K of
    the sums of `chebyshev_terms`, 0 for none; `quantiles`: probabilities of type-7 quantiles.
    """

    moments: bool = False
    range: bool = False
    chebyshev: int = 0
    quantiles: tuple[float, ...] = ()


@dataclass(frozen=True)
class Summary:
    """The answers, over the n rows that enter the fit; `chebyshev` holds the sums of T_0 ... T_K."""

    n: int
    mean: float = math.nan
    sd: float = math.nan
    minimum: float = math.nan
    maximum: float = math.nan
    chebyshev: tuple[float, ...] = ()
    quantiles: tuple[float, ...] = ()


@dataclass(frozen=True)
class Basis(ABC):
    """A call of one of the basis functions, its arguments understood."""

    call: Call
    argument: Node

    @property
    def function(self) -> str:
        """The function's name."""
        return self.call.function

    @property
    @abstractmethod
    def requests(self) -> Requests:
        """The summaries that `constants` needs."""

    @property
    @abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """What R appends to the label for each column; nothing where there is only one."""

    @abstractmethod
    def constants(self, summary: Summary) -> dict[str, Any]:
        """The constants, as JSON values; raises DataError where the data do not allow the basis."""

    @abstractmethod
    def columns(self, constants: Mapping[str, Any]) -> tuple[Node, ...]:
        """The basis' columns as expressions of the argument."""

    def impossible(self, reason: str, hint: str | None = None) -> DataError:
        """The error for data that do not allow this basis."""
        return DataError(f"{label(self.call)}: {reason}", hint=hint, span=self.call.span)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(1, count + 1))) if count > 1 else ("",) * count


# ---- scale, center


@dataclass(frozen=True)
class Scale(Basis):
    """(x - center) / scale; True means the mean, and R's root mean square about the centre."""

    center: bool | float
    scale: bool | float

    @property
    def requests(self) -> Requests:
        return Requests(moments=self.center is True or self.scale is True, range=self.scale is True)

    @property
    def suffixes(self) -> tuple[str, ...]:
        return ("",)

    def constants(self, summary: Summary) -> dict[str, Any]:
        center = summary.mean if self.center is True else float(self.center)
        scale = float(self.scale) if self.scale is not True else self._spread(summary, center)
        return {"center": center, "scale": scale or 1.0}

    def _spread(self, summary: Summary, center: float) -> float:
        if summary.n < 2 or summary.minimum == summary.maximum:
            raise self.impossible("a constant column has no spread", "use center(), or leave the column out")
        if self.center is True:
            return summary.sd
        return math.hypot(summary.sd, (summary.mean - center) * math.sqrt(summary.n / (summary.n - 1)))

    def columns(self, constants: Mapping[str, Any]) -> tuple[Node, ...]:
        node = self.argument
        if self.center is not False:
            node = subtract(node, Number(float(constants["center"])))
        return (node if self.scale is False else divide(node, Number(float(constants["scale"]))),)


# ---- poly


@dataclass(frozen=True)
class Poly(Basis):
    """Polynomials of degree 1 ... degree: powers where `raw`, else R's, orthonormal over the rows."""

    degree: int
    raw: bool

    @property
    def requests(self) -> Requests:
        return Requests() if self.raw else Requests(range=True, chebyshev=2 * self.degree)

    @property
    def suffixes(self) -> tuple[str, ...]:
        return _numbered(self.degree)

    def constants(self, summary: Summary) -> dict[str, Any]:
        if self.raw:
            return {}
        if summary.minimum == summary.maximum:
            raise self._too_few()
        return {"minimum": summary.minimum, "maximum": summary.maximum, "chebyshev": self._orthonormal(summary.chebyshev)}

    def _orthonormal(self, sums: Sequence[float]) -> list[Polynomial]:
        """Coefficients of the orthonormal polynomials in T_0 ... T_degree.

        With T_i T_j = (T_(i+j) + T_|i-j|) / 2 the sums give the Gram matrix G = LL' of the T's; the rows of the
        inverse of L are orthonormal, with a positive leading coefficient as R's are.
        """
        size = self.degree + 1
        lower = [[0.0] * size for _ in range(size)]
        inverse = [[0.0] * size for _ in range(size)]
        for i in range(size):
            for j in range(i + 1):
                gram = (sums[i + j] + sums[i - j]) / 2
                rest = gram - math.fsum(lower[i][k] * lower[j][k] for k in range(j))
                if i == j and rest <= DEPENDENT * gram:
                    raise self._too_few()
                lower[i][j] = math.sqrt(rest) if i == j else rest / lower[j][j]
            for j in range(i + 1):
                known = math.fsum(lower[i][k] * inverse[k][j] for k in range(j, i))
                inverse[i][j] = ((i == j) - known) / lower[i][i]
        return [row[: i + 1] for i, row in enumerate(inverse)][1:]

    def _too_few(self) -> DataError:
        return self.impossible(
            f"needs more than {self.degree} distinct values, not nearly all of them in a sliver of the range",
            "lower the degree, or transform the column first",
        )

    def columns(self, constants: Mapping[str, Any]) -> tuple[Node, ...]:
        if self.raw:
            return tuple(Binary("^", self.argument, Number(float(k))) if k > 1 else self.argument for k in range(1, self.degree + 1))
        unit = _unit(self.argument, constants["minimum"], constants["maximum"])
        return tuple(_horner(_powers(row), unit) for row in constants["chebyshev"])


def _unit(argument: Node, minimum: float, maximum: float) -> Node:
    """The argument mapped from its range to [-1, 1]."""
    return divide(subtract(argument, Number(minimum / 2 + maximum / 2)), Number(maximum / 2 - minimum / 2))


def chebyshev_terms(argument: Node, minimum: float, maximum: float, order: int) -> tuple[Node, ...]:
    """T_0(u) ... T_order(u) of u, the argument mapped from [minimum, maximum] to [-1, 1].

    By T_2k = 2 T_k^2 - 1 and T_(2k+1) = 2 T_k T_(k+1) - u: short, and stable at every order.
    """
    terms: list[Node] = [Number(1.0), _unit(argument, minimum, maximum)]
    for k in range(2, order + 1):
        product = multiply(Number(2.0), multiply(terms[k // 2], terms[(k + 1) // 2]))
        terms.append(subtract(product, terms[k % 2] if k % 2 else Number(1.0)))
    return tuple(terms[: order + 1])


def _powers(chebyshev: Polynomial) -> Polynomial:
    """A polynomial's coefficients in powers of u from those in Chebyshev polynomials."""
    out = [0.0] * len(chebyshev)
    before, current = [0.0] * len(out), [1.0, *[0.0] * (len(out) - 1)]
    for k, weight in enumerate(chebyshev):
        out = [total + weight * part for total, part in zip(out, current, strict=True)]
        doubled = [0.0, *(part * (2 if k else 1) for part in current[:-1])]
        before, current = current, [new - old for new, old in zip(doubled, before, strict=True)]
    return out


def _horner(polynomial: Sequence[float], variable: Node) -> Node:
    coefficients = list(polynomial)
    while len(coefficients) > 1 and not coefficients[-1]:
        coefficients.pop()
    node: Node = Number(coefficients.pop())
    while coefficients:
        node = multiply(node, variable)
        if constant := coefficients.pop():
            node = add(node, Number(constant))
    return node


# ---- bs, ns


@dataclass(frozen=True)
class Spline(Basis):
    """R's splines::bs, or ns where `natural`: interior knots given, or `n_knots` of them at quantiles."""

    natural: bool
    degree: int
    intercept: bool
    n_knots: int
    knots: tuple[float, ...] | None
    boundary: tuple[float, float] | None

    @property
    def requests(self) -> Requests:
        inside = self.n_knots if self.knots is None else 0
        return Requests(range=True, quantiles=tuple((k + 1) / (inside + 1) for k in range(inside)))

    @property
    def suffixes(self) -> tuple[str, ...]:
        return _numbered(self.n_knots + (1 if self.natural else self.degree) + self.intercept)

    def constants(self, summary: Summary) -> dict[str, Any]:
        low, high = self.boundary or (summary.minimum, summary.maximum)
        if not low < high:
            raise self.impossible("a constant column has no spline")
        if self.requests.quantiles and (summary.minimum < low or summary.maximum > high):
            raise self.impossible("values lie outside Boundary.knots, so that df cannot place the knots", "give knots =")
        knots = sorted(summary.quantiles if self.knots is None else self.knots)
        if outside := [knot for knot in knots if not low <= knot <= high]:
            raise self.impossible(f"the knot {outside[0]:g} lies outside the boundary knots {low:g} and {high:g}")
        return {"boundary": [low, high], "knots": knots}

    def columns(self, constants: Mapping[str, Any]) -> tuple[Node, ...]:
        low, high = constants["boundary"]
        order = self.degree + 1
        parts = pieces([low] * order + list(constants["knots"]) + [high] * order, self.degree)
        if not self.intercept:
            parts = [piece.keep(1) for piece in parts]
        if self.natural:
            parts = natural(parts)
        return tuple(self._column(parts, j) for j in range(len(parts[0].rows)))

    def _column(self, parts: Sequence[Piece], j: int) -> Node:
        """Column j; the outer pieces go on beyond the boundary."""
        values = [_horner(p.rows[j], divide(subtract(self.argument, Number(p.start)), Number(p.width))) for p in parts]
        branches = [(Binary("<", self.argument, Number(p.stop)), value) for p, value in zip(parts, values, strict=True)]
        return Case(tuple(branches[:-1]), values[-1]) if len(values) > 1 else values[0]


# ---- reading the call


def parse_basis(node: Call) -> Basis:
    """Understand a call of poly, bs, ns, scale or center; raises FormulaError with the span at fault."""
    return _READERS[node.function](node)


def _bind(node: Call, *names: str) -> dict[str, Node]:
    """The arguments after the first by name, as R matches them."""
    if len(node.args) > len(names) + 1:
        raise FormulaError(f"{node.function}() takes at most {len(names) + 1} arguments", span=node.span)
    bound = dict(node.named)
    for name, value in node.named:
        if name not in names:
            raise FormulaError(f"{node.function}() has no argument {name!r}", hint=did_you_mean(name, list(names)), span=value.span)
    if len(bound) < len(node.named):
        raise FormulaError(f"{node.function}() is given an argument twice", span=node.span)
    free = [name for name in names if name not in bound]
    return bound | dict(zip(free, node.args[1:], strict=False))


def _number(node: Node) -> float:
    if isinstance(node, Unary) and node.op in "+-":
        return -_number(node.operand) if node.op == "-" else _number(node.operand)
    if isinstance(node, Number):
        return float(node.value)
    raise FormulaError(f"{label(node)} is not a number", span=node.span)


def _whole(node: Node, least: int, most: int, name: str) -> int:
    value = _number(node)
    if value != int(value) or not least <= value <= most:
        raise FormulaError(f"{name} must be a whole number from {least} to {most}", span=node.span)
    return int(value)


def _numbers(node: Node) -> tuple[float, ...]:
    if isinstance(node, Call) and node.function == "c" and not node.named:
        return tuple(map(_number, node.args))
    return (_number(node),)


def _flag(node: Node) -> bool:
    if isinstance(node, Logical):
        return node.value
    raise FormulaError(f"{label(node)} is neither TRUE nor FALSE", span=node.span)


def _flag_or_number(node: Node) -> bool | float:
    return node.value if isinstance(node, Logical) else _number(node)


def _read_scale(node: Call) -> Basis:
    given = _bind(node, "center", "scale")
    center, scale = (_flag_or_number(given[name]) if name in given else True for name in ("center", "scale"))
    if scale is not False and scale == 0:
        raise FormulaError("the scale is 0", span=given["scale"].span)
    return Scale(node, unwrap(node.args[0]), center, scale)


def _read_center(node: Call) -> Basis:
    _bind(node)
    return Scale(node, unwrap(node.args[0]), True, False)


def _read_poly(node: Call) -> Basis:
    given = _bind(node, "degree", "raw")
    degree = _whole(given["degree"], 1, MAX_DEGREE, "the degree") if "degree" in given else 1
    return Poly(node, unwrap(node.args[0]), degree, "raw" in given and _flag(given["raw"]))


def _read_spline(node: Call) -> Basis:
    natural = node.function == "ns"
    given = _bind(node, "df", "knots", *(() if natural else ("degree",)), "intercept", "Boundary.knots")
    degree = _whole(given["degree"], 1, MAX_DEGREE, "the degree") if "degree" in given else 3
    intercept = "intercept" in given and _flag(given["intercept"])
    knots = _numbers(given["knots"]) if "knots" in given else None
    if "df" in given and knots is not None:
        raise FormulaError("df and knots exclude each other", span=node.span)
    least = (1 if natural else degree) + intercept
    n_knots = _whole(given["df"], least, least + 1000, "df") - least if "df" in given else len(knots or ())
    boundary = _boundary(given["Boundary.knots"]) if "Boundary.knots" in given else None
    return Spline(node, unwrap(node.args[0]), natural, degree, intercept, n_knots, knots if n_knots else (), boundary)


def _boundary(node: Node) -> tuple[float, float]:
    values = sorted(_numbers(node))
    if len(values) != 2 or values[0] == values[1]:
        raise FormulaError("Boundary.knots takes two different numbers: c(0, 1)", span=node.span)
    return values[0], values[1]


_READERS: Mapping[str, Callable[[Call], Basis]] = {
    "scale": _read_scale,
    "center": _read_center,
    "poly": _read_poly,
    "bs": _read_spline,
    "ns": _read_spline,
}
