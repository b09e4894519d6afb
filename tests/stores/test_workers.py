from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lars_train.errors import DataError
from lars_train.stores.workers import each

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def square(task: int, tick: Callable[[], None]) -> int:
    for _ in range(task):
        tick()
    return task * task


@pytest.mark.parametrize("jobs", [1, 3, 20])
def test_every_task_is_done_once_and_every_picture_counted(jobs: int) -> None:
    counts: list[int] = []
    assert sorted(each(range(12), square, jobs, counts.append)) == [k * k for k in range(12)]
    assert sum(counts) == sum(range(12))


def fail(task: int, tick: Callable[[], None]) -> int:
    if task == 3:
        raise PermissionError(13, "Permission denied", "x.jpg")
    return task


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_task_fails_of_is_told(jobs: int) -> None:
    with pytest.raises(DataError, match=r"x\.jpg: Permission denied"):
        list(each(range(9), fail, jobs, lambda count: None))


def die(task: int, tick: Callable[[], None]) -> int:
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_process_that_dies_is_told_of_and_no_other_is_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a worker process ended by signal 9"):
        list(each(range(9), die, 2, lambda count: None))
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if children.exists():
        assert children.read_text() == ""
