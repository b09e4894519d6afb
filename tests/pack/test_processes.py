"""Tasks run in several processes: each once, with errors and deaths reported, and no process left over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lars_train.errors import DataError
from lars_train.pack.processes import run_tasks

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def square(task: int, tick: Callable[[], None]) -> int:
    for _ in range(task):
        tick()
    return task * task


@pytest.mark.parametrize("jobs", [1, 3, 20])
def test_every_task_runs_once_and_every_image_is_counted(jobs: int) -> None:
    counts: list[int] = []
    assert sorted(run_tasks(range(12), square, jobs, counts.append)) == [k * k for k in range(12)]
    assert sum(counts) == sum(range(12))


def fail(task: int, tick: Callable[[], None]) -> int:
    if task == 3:
        raise PermissionError(13, "Permission denied", "x.jpg")
    return task


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_error_of_a_task_is_raised(jobs: int) -> None:
    with pytest.raises(DataError, match=r"x\.jpg: Permission denied"):
        list(run_tasks(range(9), fail, jobs, lambda count: None))


def die(task: Path, tick: Callable[[], None]) -> None:
    if task.name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3)
    task.touch()


def children() -> set[str]:
    """Return the ids of this process's children; none if the system does not list them."""
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return set(path.read_text().split()) if path.exists() else set()


def test_a_killed_worker_raises_an_error_and_ends_the_others(tmp_path: Path) -> None:
    before = children()
    with pytest.raises(DataError, match="a worker process was killed by signal 9"):
        list(run_tasks([tmp_path / "sleeps", tmp_path / "dies"], die, 2, lambda count: None))
    assert not list(tmp_path.iterdir())
    assert children() <= before


def interrupted(task: int, tick: Callable[[], None]) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return task


def test_a_worker_ignores_ctrl_c() -> None:
    assert sorted(run_tasks(range(3), interrupted, 2, lambda count: None)) == [0, 1, 2]
