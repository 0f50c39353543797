"""Model formulas: lme4's text to a Formula, by R's algebra of terms.

The text is first read into one tree of `expr` nodes, as R does; then the algebra expands sums, crossings and
nestings into terms (sets of variables, as bit masks in the order of first appearance) and sets bars aside.
"""
from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace

from . import expr
from .errors import FormulaError
from .expr import Binary, Call, Column, Node, Number, Span, Unary, label
from .syntax import Parser, tokens

MAX_TERMS = 10_000
Masks = dict[int, None]  # terms as sets of variables, in order of appearance


@dataclass(frozen=True)
class Term:
    """An interaction of variables, in R's order and each once; no variable at all is the intercept."""

    variables: tuple[Node, ...]


@dataclass(frozen=True)
class RandomTerm:
    """Terms whose coefficients vary, correlated among each other, over the levels of one grouping factor.

    `groups` are the columns whose combinations are the levels; `text` is the bar as the user wrote it.
    """

    terms: tuple[Term, ...]
    groups: tuple[str, ...]
    text: str

    @property
    def group_label(self) -> str:
        """The grouping factor's name: its columns joined by colons, without backticks."""
        return ":".join(self.groups)


@dataclass(frozen=True)
class Formula:
    """A model description that knows nothing of data; `fixed` is in the order of R's terms.formula."""

    text: str
    response: Node | None
    fixed: tuple[Term, ...]
    offsets: tuple[Node, ...]
    random: tuple[RandomTerm, ...]

    @property
    def variables(self) -> Iterator[Node]:
        """Every variable of the fixed terms, then of the random terms, repeats included."""
        for terms in (self.fixed, *(random.terms for random in self.random)):
            for term in terms:
                yield from term.variables


def parse(text: str) -> Formula:
    """Read a formula in lme4's syntax; a formula without a left-hand side has no response.

    Raises: FormulaError, whose message ends with the formula and carets under the place at fault.
    """
    check_text(text)
    try:
        return _formula(text)
    except FormulaError as error:
        raise expr.pointed(error, text) from None


def check_text(formula: object) -> None:
    """Raises FormulaError for a formula that is no text, such as data in its place."""
    if not isinstance(formula, str):
        raise FormulaError(f"the formula must be text, not of type {type(formula).__name__}", hint="the formula comes first, then the data")


def parse_expression(text: str) -> Node:
    """Read one scalar expression, as in `weights="w"` or `offset="log(t)"`; raises FormulaError as `parse` does."""
    try:
        node = Parser(text).whole()
        expr.check(node)
        return node
    except FormulaError as error:
        raise expr.pointed(error, text) from None


def _formula(text: str) -> Formula:
    if not text.strip():
        raise FormulaError("the formula is empty", hint='write it like "y ~ x + (1 | g)"', span=(0, 1))
    tildes = [token.span for token in tokens(text) if (token.kind, token.text) == ("op", "~")]
    if not tildes:
        raise FormulaError("the formula has no ~", hint='write it like "y ~ x + (1 | g)"', span=(0, len(text)))
    if len(tildes) > 1:
        raise FormulaError("the formula has more than one ~", span=tildes[1])
    tree = Parser(text).whole()
    algebra = _Algebra(text)
    if isinstance(tree, Unary) and tree.op == "~" and not tree.parens:
        return algebra.formula(None, tree.operand)
    if isinstance(tree, Binary) and tree.op == "~" and not tree.parens:
        return algebra.formula(tree.left, tree.right)
    raise FormulaError("the ~ must separate the response from the terms", span=tildes[0])


class _Algebra:
    """Expands one right-hand side; its variables, intercept, offsets and bars gather here as in R's terms.formula."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.variables: dict[str, tuple[int, Node]] = {}
        self.places: dict[str, Span] = {}
        self.intercept, self.adding = True, True
        self.offsets: list[Node] = []
        self.random: list[RandomTerm] = []

    def formula(self, response: Node | None, right: Node) -> Formula:
        if response is not None:
            response = replace(response, parens=0)
            _check_response(response)
            self.bit(response)
        masks = self.expand(right, additive=True)
        if response is not None and 1 in masks:
            raise FormulaError("the response is also a term", span=self.places[label(response)])
        return Formula(self.text, response, self.terms(masks), tuple(self.offsets), tuple(self.random))

    def terms(self, masks: Masks) -> tuple[Term, ...]:
        """The intercept, then the terms by order, as first met within one order."""
        variables = [node for _, node in self.variables.values()]
        ordered = sorted(masks, key=int.bit_count)
        expanded = (Term(tuple(variables[i] for i in _members(mask))) for mask in ordered)
        return (*([Term(())] if self.intercept else []), *expanded)

    def bit(self, node: Node) -> int:
        name = label(replace(node, parens=0))
        self.places[name] = node.span
        return 1 << self.variables.setdefault(name, (len(self.variables), replace(node, parens=0)))[0]

    def expand(self, node: Node, additive: bool) -> Masks:
        """The terms under a node; `additive` while only sums lie above it, where bars and offsets may stand."""
        # Long sums are deep on the left: walk that side in a loop.
        spine: list[tuple[Binary, bool]] = []
        while isinstance(node, Binary) and node.op in ("+", "-", "^", *_PRODUCTS):
            additive = additive and node.op in ("+", "-")
            spine.append((node, additive))
            node = node.left
        terms = self.leaf(node, additive)
        for binary, within_sum in reversed(spine):
            terms = self.combine(terms, binary, within_sum)
            if len(terms) > MAX_TERMS:
                raise FormulaError(f"the formula expands to more than {MAX_TERMS} terms", span=binary.span)
        return terms

    def combine(self, terms: Masks, node: Binary, additive: bool) -> Masks:
        if node.op == "+":
            terms.update(self.expand(node.right, additive))
            return terms
        if node.op == "-":
            for mask in self.without(node.right):
                terms.pop(mask, None)
            return terms
        if node.op == "^":
            return _power(terms, node)
        for operand in (node.left, node.right):
            if isinstance(operand, Number):
                raise FormulaError(f"{label(operand)} cannot be an operand of {node.op}", hint=_ARITHMETIC_HINT, span=operand.span)
        return _PRODUCTS[node.op](terms, self.expand(node.right, additive=False), node.span)

    def without(self, node: Node) -> Masks:
        """Expand what a minus removes: there 1 takes the intercept away."""
        self.adding = not self.adding
        terms = self.expand(node, additive=False)
        self.adding = not self.adding
        return terms

    def leaf(self, node: Node, additive: bool) -> Masks:
        match node:
            case Unary(op="+", operand=operand):
                return self.expand(operand, additive)
            case Unary(op="-", operand=operand):
                self.without(operand)
            case Number():
                self.constant(node)
            case Binary(op="|" | "||"):
                self.bar(node, additive)
            case Call(function="offset"):
                self.offset(node, additive)
            case _:
                _check_variable(node)
                return {self.bit(node): None}
        return {}

    def constant(self, node: Number) -> None:
        if node.value not in (0, 1):
            raise FormulaError(f"{label(node)} is not a term: only 0 and 1 are, for the intercept", hint=_ARITHMETIC_HINT, span=node.span)
        self.intercept = (node.value == 1) == self.adding

    def offset(self, node: Call, additive: bool) -> None:
        if not additive:
            raise FormulaError("offset() can only be added", span=node.span)
        if len(node.args) != 1 or node.named:
            raise FormulaError("offset() takes one argument", span=node.span)
        expr.check(node.args[0])
        self.offsets.append(node.args[0])

    def bar(self, node: Binary, additive: bool) -> None:
        if not node.parens:
            raise FormulaError("a random term needs parentheses", hint="write it like (1 + x | g)", span=node.span)
        if not additive:
            raise FormulaError("a random term can only be added", span=node.span)
        text = self.text[slice(*node.span)]
        for _ in range(node.parens):
            text = text[1:-1].strip()
        inner = _Algebra(self.text)
        masks = inner.expand(node.left, additive=False)
        if not (terms := inner.terms(masks)):
            raise FormulaError("the random term has no coefficient", hint="write 1 for a random intercept", span=node.left.span)
        parts = [(term,) for term in terms] if node.op == "||" else [terms]
        for term in (RandomTerm(part, group, text) for group in _groups(node.right) for part in parts):
            if any(set(term.terms) == set(other.terms) and set(term.groups) == set(other.groups) for other in self.random):
                raise FormulaError(f"a random term over {term.group_label} repeats an earlier one", span=node.span)
            if any(term.group_label == other.group_label and term.groups != other.groups for other in self.random):
                what = f"two grouping factors are called {term.group_label}: a column of this name, and columns joined by colons"
                raise FormulaError(what, hint="give the column another name", span=node.span)
            self.random.append(term)


_ARITHMETIC_HINT = "arithmetic goes inside I()"


def _members(mask: int) -> Iterator[int]:
    """The positions of the bits that are set, from the lowest."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask -= lowest


def _union(terms: Masks) -> int:
    return functools.reduce(operator.or_, terms, 0)


def _interact(left: Masks, right: Masks, span: Span) -> Masks:
    if len(left) * len(right) > 10 * MAX_TERMS:
        raise FormulaError(f"the formula expands to more than {MAX_TERMS} terms", span=span)
    return {a | b: None for a in left for b in right}


def _cross(left: Masks, right: Masks, span: Span) -> Masks:
    return {**left, **right, **_interact(left, right, span)}


def _nest(left: Masks, right: Masks, span: Span) -> Masks:
    return {**left, **_interact({_union(left): None}, right, span)}


def _inside(left: Masks, right: Masks, span: Span) -> Masks:
    return _interact(left, {_union(right): None}, span)


_PRODUCTS = {":": _interact, "*": _cross, "/": _nest, "%in%": _inside}


def _power(terms: Masks, node: Binary) -> Masks:
    exponent = node.right.value if isinstance(node.right, Number) else 0.5
    if exponent < 1 or exponent != int(exponent):
        raise FormulaError("the power of a term must be a whole number from 1", hint=_ARITHMETIC_HINT, span=node.right.span)
    raised, before, count = terms, 0, 1
    # Beyond as many factors as there are variables nothing new appears.
    while count < exponent and len(raised) > before:
        before, count = len(raised), count + 1
        raised = _interact(terms, raised, node.span)  # in R's order, each term by itself among the products
    return raised


def _check_response(node: Node) -> None:
    if isinstance(node, Call) and node.function == "cbind":
        if len(node.args) != 2 or node.named:
            raise FormulaError("cbind() takes two columns: cbind(successes, failures)", span=node.span)
        for argument in node.args:
            expr.check(argument)
    elif isinstance(node, Binary) and node.op in ("|", "||"):
        raise FormulaError("a random term belongs to the right-hand side", span=node.span)
    else:
        expr.check(node)
    _need_column(node)


def _check_variable(node: Node) -> None:
    if isinstance(node, Call) and node.function in expr.BASES | expr.FACTORS:
        if not node.args:
            raise FormulaError(f"{node.function}() needs a column", span=node.span)
        inner = node.args[0]
        if node.function in expr.FACTORS and isinstance(inner, Call) and inner.function in expr.FACTORS:
            _check_variable(inner)
        else:
            expr.check(inner)
    else:
        expr.check(node)
    _need_column(node)


def _need_column(node: Node) -> None:
    if not expr.columns(node):
        raise FormulaError(f"{label(node)} uses no column", span=node.span)


def _groups(node: Node) -> list[tuple[str, ...]]:
    """The grouping factors of a bar's right side: a/b is a and a:b."""
    if isinstance(node, Call) and node.function == "factor" and len(node.args) == 1 and not node.named:
        node = node.args[0]
    if isinstance(node, Column):
        return [(node.name,)]
    if isinstance(node, Binary) and node.op in ("/", ":"):
        left, right = _groups(node.left), _groups(node.right)
        nested = [tuple(dict.fromkeys(left[-1] + inner)) for inner in right]
        if node.op == "/":
            return left + nested
        if len(left) == len(right) == 1:
            return nested
    raise FormulaError("a grouping factor is a column, or columns joined by : or /", hint=_group_hint(node), span=node.span)


def _group_hint(node: Node) -> str:
    if isinstance(node, Binary) and node.op in ("+", "*"):
        return "write one random term for each factor: (1 | a) + (1 | b)"
    return "compute it as a column of the data first"
