"""Nested designs folded: innermost levels that differ in their response alone, replaced by the few numbers that they are to a likelihood.

Levels with one effect each, the same parents, Z'wZ and cross blocks stay what they are to the model when their effects are rotated among
themselves: Λ'Z'wZΛ and I are multiples of the identity there. The direction of their sum meets the ancestors; all others meet nothing, so
that those of the same Z'wZ may be rotated once more, over all parents: p + 1 directions then hold their products with [X y], and the rest,
`Factor.idle`, only their share of the determinant.
"""
from __future__ import annotations

from dataclasses import replace

import numpy as np

from .crossed import Cells, CrossedProblem, Factor
from .link import Array

WORTH = 2  # how many times fewer levels pay for folding
CHUNK = 1 << 16  # levels whose products are added up at once
ROUNDING = 8 * np.finfo(float).eps  # ratios that differ by less are equal
SINGULAR = 1e-14  # eigenvalues of products below this share of the levels' own squares are rounding


def folded(problem: CrossedProblem) -> CrossedProblem:
    """A problem with the same likelihood for all Λ and fewer levels of its first factor, or the problem itself where that saves little.

    Its first effects are not those of the levels.
    """
    first = problem.factors[0]
    if not problem.stays_sparse or first.q > 1 or len(problem.factors) < 2:
        return problem
    cells = [_in_order(problem.cells[0, h]) for h in range(1, len(problem.factors))]
    sizes, size = np.unique(first.S[0, 0], return_inverse=True)
    kind, member = _kinds(size, len(sizes), first.S[0, 0], [row for part in cells for row in part.values[0]], cells[0].columns)
    if WORTH * (len(member) + len(sizes) * (problem.p + 1)) > first.levels:
        return problem
    root = np.sqrt(np.bincount(kind))
    sums = np.stack([np.bincount(kind, row) for row in first.C[0]])
    C, of, idle = _contrasts(first.C[0], sums / root**2, kind, size)
    S = np.append(sizes[size[member]], sizes[of])
    factor = Factor(S[None, None], np.concatenate([sums / root, C], axis=1)[None], idle=(sizes, idle))
    changed = {(0, h): _met(part, member, root, len(of)) for h, part in enumerate(cells, start=1)}
    return replace(problem, factors=(factor, *problem.factors[1:]), cells=problem.cells | changed)


def _in_order(cells: Cells) -> Cells:
    """The cells in the order of their rows, each of which occurs once."""
    if (np.diff(cells.rows) > 0).all():
        return cells
    order = np.argsort(cells.rows)
    return Cells(cells.rows[order], cells.columns[order], cells.values[:, :, order])


def _kinds(size: np.ndarray, sizes: int, S: Array, values: list[Array], parent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which levels are of a kind, one `size` and parent and, up to rounding, the same of all `values`: the kind (m,), and a level of each,
    parent by parent. A level's nearest parent tells the others."""
    code, many = size, sizes
    with np.errstate(all="ignore"):
        others = [row for row in values if not np.ptp(row / S) <= ROUNDING * abs(row[0] / S[0])]  # all others are told by the size
    for row in others:
        found, number = np.unique(row, return_inverse=True)
        pairs, code = np.unique(code * len(found) + number, return_inverse=True)
        many = len(pairs)
    _, member, kind = np.unique(parent.astype(np.int64) * many + code, return_index=True, return_inverse=True)
    return kind, member


def _contrasts(c: Array, mean: Array, kind: np.ndarray, size: np.ndarray) -> tuple[Array, np.ndarray, Array]:
    """The directions off the kinds' means (p + 1, k) that hold their levels' products, the size (k,) of each, and how many more there are
    of each size, which hold nothing."""
    order = np.argsort(size, kind="stable")
    ends = np.cumsum(np.bincount(size))
    fewer = np.bincount(size[np.unique(kind, return_index=True)[1]], minlength=len(ends))
    columns, of, idle = [np.zeros((len(c), 0))], [], np.diff(ends, prepend=0) - fewer
    for k, (begin, end) in enumerate(zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)):
        products, squares = np.zeros((len(c), len(c))), np.full(len(c), np.finfo(float).tiny)
        for first in range(begin, end, CHUNK):
            at = order[first : min(first + CHUNK, end)]
            part = c[:, at]
            squares += np.einsum("am,am->a", part, part)
            part = part - mean[:, kind[at]]
            products += part @ part.T
        scale = np.sqrt(squares)
        values, vectors = np.linalg.eigh(products / np.outer(scale, scale))
        kept = np.flatnonzero(values > SINGULAR * len(c))[::-1][: idle[k]]
        columns.append(scale[:, None] * vectors[:, kept] * np.sqrt(values[kept]))
        of += [k] * len(kept)
        idle[k] -= len(kept)
    return np.concatenate(columns, axis=1), np.array(of, dtype=np.intp), idle.astype(float)


def _met(cells: Cells, member: np.ndarray, root: Array, more: int) -> Cells:
    """The cells of the kinds' means and of `more` directions that meet nothing, under the last parent."""
    values = np.concatenate([cells.values[:, :, member] * root, np.zeros((*cells.values.shape[:2], more))], axis=2)
    columns = cells.columns[member]
    return Cells(np.arange(len(member) + more), np.append(columns, np.full(more, columns[-1])), values)
