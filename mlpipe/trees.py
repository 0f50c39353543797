"""Statistics of many partitions merged through a fixed tree, so that a partition that comes, goes or changes costs few merges.

The tree is a Cartesian tree over the boundaries between neighbouring partitions, the priority of a boundary being a hash of
the name to its right (Seidel and Aragon 1996, *Algorithmica* 16): it depends on the partitions alone, not on how they came,
and its depth is about 2 ln n. Every merged state is named by what it is made of; whoever has it need not merge again.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .engines.base import fingerprint

State = TypeVar("State")


@dataclass(frozen=True)
class Node:
    """A state: of one partition, or merged from those of `left` and `right`."""

    state: str
    left: Node | None = None
    right: Node | None = None

    def merged(self) -> Iterator[str]:
        """The names of all merged states in the tree."""
        if self.left is not None and self.right is not None:
            yield self.state
            yield from self.left.merged()
            yield from self.right.merged()


def tree(leaves: Sequence[tuple[str, str]]) -> Node:
    """The tree over (partition, state) pairs in the order of the partitions. Raises ValueError for none."""
    if not leaves:
        raise ValueError("no states to merge")
    stack: list[tuple[str, Node]] = []  # (priority of the boundary on its left, a subtree), priorities falling
    for name, state in leaves:
        priority, node = fingerprint(name), Node(state)
        while len(stack) > 1 and stack[-1][0] < priority:
            top = stack.pop()
            stack[-1] = (stack[-1][0], _joined(stack[-1][1], top[1]))
        stack.append((priority, node))
    while len(stack) > 1:
        top = stack.pop()
        stack[-1] = (stack[-1][0], _joined(stack[-1][1], top[1]))
    return stack[0][1]


def _joined(left: Node, right: Node) -> Node:
    return Node(fingerprint(left.state, right.state), left, right)


def statistics(
    node: Node, held: Callable[[str], bool], load: Callable[[str], State], save: Callable[[str, State], None],
    merge: Callable[[State, State], State],
) -> State:  # fmt: skip
    """The statistics of a tree; merges what is not held, and saves it."""
    if node.left is None or node.right is None or held(node.state):
        return load(node.state)
    both = merge(statistics(node.left, held, load, save, merge), statistics(node.right, held, load, save, merge))
    save(node.state, both)
    return both
