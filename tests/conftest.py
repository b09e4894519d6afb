"""The files with the most slow tests begin first, so that no process is left alone with one at the end.

Tests that need a newer torch than the one that is installed skip.
"""

from collections import Counter

import old_torch
import pytest

# The optimizers' tests share it, asserts included.
pytest.register_assert_rewrite("bases")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    old_torch.skip(items)
