"""A pytest plugin for .ci/long: every property test draws 50 times its usual number of examples, from a new seed, and all cases of
tests that are else thinned run (see conftest)."""
from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import is_hypothesis_test, settings

FACTOR = 50


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Replace the settings of each property test once, parametrised ones included."""
    tests = {getattr(item.obj, "__func__", item.obj) for item in items if isinstance(item, pytest.Function)}
    for test in filter(is_hypothesis_test, tests):
        # hypothesis refuses a second @settings, and tests state their usual number themselves
        usual: settings = getattr(test, "_hypothesis_internal_use_settings", None) or settings()
        test._hypothesis_internal_use_settings = settings(usual, max_examples=FACTOR * usual.max_examples, derandomize=False, deadline=None)
