"""Runs a function once polars is imported, so that `import mlpipe` need not pay for importing it."""
from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class AfterImport:
    """A finder that finds nothing itself: it has the module's own loader call `action` at its end, then leaves `sys.meta_path`.

    The loader that the other finders gave stays in place (one attribute of that one instance is replaced until it has
    run), so resources, source and reloading of the module work as without us. Asking for the spec alone changes nothing.
    """

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of the other finders with its loader told of `action`; None for every other module."""
        if name != self.name:
            return None
        for find in self._later():
            if (spec := find(name, path, target)) is not None:
                if hasattr(spec.loader, "exec_module"):
                    self._follow(spec.loader)
                return spec
        return None

    def _later(self) -> list[Callable[..., ModuleSpec | None]]:
        """The `find_spec` of the finders after ours; those before it were asked already."""
        finders = sys.meta_path
        start = finders.index(self) + 1 if self in finders else 0
        return [finder.find_spec for finder in finders[start:] if hasattr(finder, "find_spec")]

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = execute
            execute(module)
            if self.remove():
                self.action()

        loader.exec_module = exec_module

    def remove(self) -> bool:
        """Take the finder out; False where it was out already."""
        present = self in sys.meta_path
        # a new list, as another thread may be walking along the old one and would miss the finder after ours
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        return present


def after_import(name: str, action: Callable[[], None]) -> None:
    """Call `action` now if module `name` is imported, else at the end of its first import that succeeds.

    A second call for the same module and action, as reloading makes it, changes nothing.
    """
    pending = any(isinstance(f, AfterImport) and f.name == name for f in sys.meta_path)
    finder = AfterImport(name, action)
    if not pending:
        sys.meta_path.insert(0, finder)
    # looked up after the insertion, as another thread may import it meanwhile; None stands for a blocked import
    if sys.modules.get(name) is not None and finder.remove():
        action()
