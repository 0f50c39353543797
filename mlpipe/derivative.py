"""Derivatives of scalar expressions by a column, as expressions again."""
from __future__ import annotations

import math

from .expr import COMPARISON, LOGIC, Binary, Call, Case, Column, Logical, Node, Number, Text, Unary, add, divide, multiply, subtract

ONE = Number(1.0)


def derivative(node: Node, name: str) -> Node | None:
    """d node / d column `name`; None where it is 0 everywhere. What jumps (comparisons, whole parts) counts as constant."""
    match node:
        case Column(name=other):
            return ONE if other == name else None
        case Number() | Text() | Logical():
            return None
        case Unary(op=op, operand=operand):
            inner = None if op == "!" else derivative(operand, name)
            return inner if inner is None or op == "+" else Unary("-", inner)
        case Binary():
            return _binary(node, name)
        case Call():
            return _call(node, name)
        case Case(branches=branches, default=default):
            parts = [(test, derivative(value, name)) for test, value in branches]
            rest = derivative(default, name)
            if rest is None and all(value is None for _, value in parts):
                return None
            return Case(tuple((test, value or Number(0.0)) for test, value in parts), rest or Number(0.0))
    raise TypeError(f"not an expression: {node!r}")


def _binary(node: Binary, name: str) -> Node | None:
    op, left, right = node.op, node.left, node.right
    if op in COMPARISON or op in LOGIC or op == "%/%":
        return None
    du, dv = derivative(left, name), derivative(right, name)
    if op == "%%":
        return du
    if op in "+-":
        if du is None or dv is None:
            return du if dv is None else dv if op == "+" else Unary("-", dv)
        return add(du, dv) if op == "+" else subtract(du, dv)
    if op == "*":
        return _sum(_product(du, right), _product(dv, left))
    if op == "/":
        down = None if dv is None else Unary("-", divide(multiply(left, dv), multiply(right, right)))
        return _sum(None if du is None else divide(du, right), down)
    return _power(node, du, dv)


def _power(node: Binary, du: Node | None, dv: Node | None) -> Node | None:
    """u^v: v u^(v-1) u' + u^v log(u) v'."""
    base, exponent = node.left, node.right
    lower = Number(exponent.value - 1.0) if isinstance(exponent, Number) else subtract(exponent, ONE)
    by_base = _product(du, multiply(exponent, Binary("^", base, lower)))
    return _sum(by_base, _product(dv, multiply(node, Call("log", (base,)))))


def _call(node: Call, name: str) -> Node | None:
    inner = derivative(node.args[0], name)
    if inner is None:
        return None
    x = node.args[0]
    match node.function:
        case "I":
            return inner
        case "log":
            slope = divide(inner, x)
            return slope if len(node.args) == 1 else divide(slope, Call("log", (node.args[1],)))
        case "log2" | "log10":
            return divide(inner, multiply(x, Number(math.log(2.0 if node.function == "log2" else 10.0))))
        case "log1p":
            return divide(inner, add(ONE, x))
        case "exp" | "expm1":
            return multiply(inner, Call("exp", (x,)))
        case "sqrt":
            return divide(inner, multiply(Number(2.0), node))
        case "abs":
            return multiply(inner, Case(((Binary(">=", x, Number(0.0)), ONE),), Number(-1.0)))
    raise TypeError(f"not a function with a derivative: {node.function}")


def _product(slope: Node | None, other: Node) -> Node | None:
    return None if slope is None else multiply(slope, other)


def _sum(left: Node | None, right: Node | None) -> Node | None:
    if left is None or right is None:
        return right if left is None else left
    return add(left, right)


def substituted(node: Node, target: Node, replacement: Node) -> Node:
    """The expression with `replacement` in place of every `target`."""
    if node == target:
        return replacement
    match node:
        case Unary(op=op, operand=operand):
            return Unary(op, substituted(operand, target, replacement))
        case Binary(op=op, left=left, right=right):
            return Binary(op, substituted(left, target, replacement), substituted(right, target, replacement))
        case Call(function=function, args=args, named=named):
            return Call(function, tuple(substituted(a, target, replacement) for a in args), named)
        case Case(branches=branches, default=default):
            made = tuple((substituted(t, target, replacement), substituted(v, target, replacement)) for t, v in branches)
            return Case(made, substituted(default, target, replacement))
    return node
