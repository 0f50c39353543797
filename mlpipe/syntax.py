"""Text to one tree of expression nodes, with R's operators and precedence; what the tree means is not decided here."""
from __future__ import annotations

import re
from dataclasses import dataclass, replace

from . import expr
from .errors import FormulaError
from .expr import Binary, Call, Column, Logical, Node, Number, Span, Text, Unary

MAX_DEPTH = 60  # nested parentheses, calls and signs

_TOKEN = re.compile(
    rf"""(?P<space>\s+)
    |(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?L?)
    |(?P<name>{expr.NAME.pattern})
    |(?P<quoted>`(?:[^`\\]|\\.)*`)
    |(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<op>\*\*|\|\||&&|%[^%\s]*%|<=|>=|==|!=|[-+*/^:~|&!(),=<>])""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True)
class Token:
    """One word of the text; `kind` is number, name, quoted (a name in backticks), text, op or end."""

    kind: str
    text: str
    span: Span


def tokens(text: str) -> list[Token]:
    """The text's tokens and an "end"; raises FormulaError at what is none."""
    out, at = [], 0
    while at < len(text):
        if (found := _TOKEN.match(text, at)) is None:
            raise _stray(text, at)
        if found.lastgroup != "space":
            out.append(Token(str(found.lastgroup), "^" if found.group() == "**" else found.group(), found.span()))
        at = found.end()
    return [*out, Token("end", "", (len(text), len(text) + 1))]


def _stray(text: str, at: int) -> FormulaError:
    char = text[at]
    if char in "`\"'":
        return FormulaError(f"the {char} opened here is never closed", span=(at, at + 1))
    hint = "put a column's odd name in backticks" if char not in "()[]{}" else None
    return FormulaError(f"unexpected character {char!r}", hint=hint, span=(at, at + 1))


class Parser:
    """Precedence climbing with R's table over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.tokens, self.at, self.depth = tokens(text), 0, 0

    def whole(self) -> Node:
        """The one expression that the text is."""
        if self.peek.kind == "end":
            raise FormulaError("the text is empty", hint='a formula is like "y ~ x + (1 | g)"', span=self.peek.span)
        node = self.expression(0)
        if self.peek.kind != "end":
            raise self.unexpected()
        return node

    @property
    def peek(self) -> Token:
        return self.tokens[self.at]

    def take(self) -> Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def close(self, opened: Token) -> Span:
        if self.peek.kind == "end":
            raise FormulaError("this parenthesis is never closed", span=opened.span)
        if self.peek.text != ")":
            raise self.unexpected()
        return self.take().span

    def unexpected(self) -> FormulaError:
        token = self.peek
        if token.kind == "end":
            return FormulaError("something is missing at the end", span=token.span)
        if token.text == ")":
            return FormulaError("unexpected ')': nothing is open here or something is missing before it", span=token.span)
        hint = "is an operator such as + missing before it?" if token.kind != "op" else None
        return FormulaError(f"unexpected {token.text!r}", hint=hint, span=token.span)

    def expression(self, loosest: int) -> Node:
        """Read operators that bind more tightly than `loosest`."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise FormulaError("the formula is nested too deeply", span=self.peek.span)
        node = self.prefix()
        while (op := self.infix()) and (binds := expr.precedence(op)) > loosest:
            self.take()
            right = self.expression(binds - 1 if op == "^" else binds)
            node = Binary(op, node, right, span=(node.span[0], right.span[1]))
            if binds == expr.precedence("==") and self.infix() in expr.COMPARISON:
                raise self.unexpected()
        self.depth -= 1
        return node

    def infix(self) -> str:
        token = self.peek
        return token.text if token.kind == "op" and token.text not in ("(", ")", ",", "=", "!") else ""

    def prefix(self) -> Node:
        token = self.peek
        if token.text in ("-", "+", "!", "~"):
            self.take()
            operand = self.expression({"!": expr.NOT, "~": expr.precedence("~")}.get(token.text, expr.SIGN))
            return Unary(token.text, operand, span=(token.span[0], operand.span[1]))
        if token.text == "(":
            self.take()
            node = self.expression(0)
            return replace(node, parens=node.parens + 1, span=(token.span[0], self.close(token)[1]))
        if token.kind in ("op", "end"):
            raise self.unexpected()
        return self.name_or_call(self.take()) if token.kind == "name" else _constant(self.take())

    def name_or_call(self, token: Token) -> Node:
        if token.text in ("TRUE", "FALSE"):
            return Logical(token.text == "TRUE", span=token.span)
        if token.text == ".":
            raise FormulaError("`.` (all other columns) is not supported", hint="name the columns", span=token.span)
        if token.text in expr.RESERVED:
            raise FormulaError(f"{token.text} is a word of R", hint=f"a column of that name is written `{token.text}`", span=token.span)
        return self.call(token) if self.peek.text == "(" else Column(token.text, span=token.span)

    def call(self, token: Token) -> Node:
        opened = self.take()
        args: list[Node] = []
        named: list[tuple[str, Node]] = []
        more = self.peek.text != ")"
        while more:
            name = self.argument_name()
            value = self.expression(0)
            if name:
                named.append((name, value))
            else:
                args.append(value)
            if more := self.peek.text == ",":
                self.take()
        return Call(token.text, tuple(args), tuple(named), span=(token.span[0], self.close(opened)[1]))

    def argument_name(self) -> str:
        """The name of `name = value`, taken with its sign; empty where the argument has none."""
        token = self.peek
        if token.kind != "name" or self.tokens[self.at + 1].text != "=":
            return ""
        self.at += 2
        return token.text


_UNESCAPE = {"n": "\n", "t": "\t", "r": "\r"}


def _constant(token: Token) -> Node:
    if token.kind == "number":
        value = float(token.text.rstrip("L"))
        if value == float("inf"):
            raise FormulaError("the number is too large", span=token.span)
        return Number(int(value) if token.text.endswith("L") else value, span=token.span)
    content = re.sub(r"\\(.)", lambda found: _UNESCAPE.get(found[1], found[1]), token.text[1:-1], flags=re.DOTALL)
    if token.kind == "text":
        return Text(content, span=token.span)
    if not content:
        raise FormulaError("the backticks are empty", span=token.span)
    return Column(content, span=token.span)
