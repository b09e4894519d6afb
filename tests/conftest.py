"""Start the longest test files first, and skip tests that need a newer torch than the installed one."""

import atexit
import gc
import os
from pathlib import Path

import pytest

STARTUP = Path(__file__).with_name("startup")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(STARTUP), os.environ.get("PYTHONPATH"))))
# As STARTUP does in other processes.
gc.set_threshold(100_000)
atexit.register(gc.freeze)

# The optimizer tests import asserts from this module.
pytest.register_assert_rewrite("bases")

# In starting order, so that at the end no process is alone with a long file. The Slurm tests mostly wait, so they
# run beside a file that keeps a core busy.
LONGEST = (
    *("test_launch_forms", "test_slurm", "test_docs_commands", "test_scaled_table", "test_two_hosts", "test_spawn"),
    *("test_bench_scripts", "test_forecast", "test_killed_runs", "test_same_curve", "test_any_terminal", "test_export"),
    *("test_api", "test_full_disk", "test_same_weights", "test_cli", "test_run", "test_torch_lars"),
    *("test_own_networks", "test_averaged_runs", "test_hostile_files", "test_image_sizes"),
    *("test_ghost_kernels", "test_fused_kernels", "test_elastic", "test_distributed", "test_remote_runs"),
    "test_lars_sharded",
)


def pytest_xdist_auto_num_workers() -> int:
    """Return one worker more than cores: tests spend a third of their time waiting (Slurm, lost hosts)."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Imported here, because the process that only starts the workers does not need torch.
    import old_torch
    import torch

    # The workers share the cores. A second thread mostly waits for its core, and spins.
    torch.set_num_threads(1)
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))
    old_torch.skip(items)
