"""Pytest settings of all tests: the longest files begin first, and tests that need a newer torch than this one skip."""

import old_torch
import pytest

# The optimizers' tests share it, asserts included.
pytest.register_assert_rewrite("bases")

# In the order in which they begin, so that no process is left alone with one of them at the end. Those of Slurm mostly
# wait: they run beside one that keeps a core busy.
LONGEST = (
    *("test_launch_forms", "test_slurm", "test_killed_runs", "test_chaos", "test_elastic", "test_docs_commands"),
    *("test_same_curve", "test_two_hosts", "test_scripts", "test_bench_step", "test_bench_input", "test_forecast"),
    *("test_distributed", "test_run", "test_full_disk", "test_remote_runs", "test_lars_sharded", "test_export"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))
    old_torch.skip(items)
