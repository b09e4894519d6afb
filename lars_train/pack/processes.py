"""Do tasks in several processes, none of which outlives the command. Nothing here depends on what a task is.

`concurrent.futures.ProcessPoolExecutor` would need its private list of processes: it finishes the tasks that run before
it reports a failed one, and its processes survive a command that is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

from lars_train.errors import DataError
from lars_train.signals import blocked

T = TypeVar("T")
R = TypeVar("R")
Tick = Callable[[], None]
"""What a task calls for each picture that it is done with."""
_POLL_S = 0.2


class Failed(NamedTuple):
    """What a process sends in place of a result."""

    reason: str


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(tasks: Sequence[T], work: Callable[[T, Tick], R], jobs: int, tick: Callable[[int], None]) -> Iterator[R]:
    """What `work` returns for each of `tasks`, as they are done, in `jobs` processes (1: in this one).

    `tick` is called with the number of pictures done since the last call. Raises `DataError` for a `DataError` or an
    OSError of a task, and when a process dies.
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        for task in tasks:
            with _told():
                result = work(task, lambda: tick(1))
            yield result
        return
    # Forked processes share the names of the samples; elsewhere fork is unsafe or absent.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    taken, done = context.Value("q", 0), context.Value("q", 0)
    pipes: dict[Connection, Any] = {}
    seen = 0
    try:
        for _ in range(jobs):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(theirs, tasks, work, taken, done, os.getpid()), daemon=True)
            # Ctrl-C reaches all processes of the terminal; the parent alone decides what becomes of its workers.
            with blocked(signal.SIGINT):
                process.start()
            theirs.close()
            pipes[mine] = process
        while pipes:
            for pipe in wait(list(pipes), timeout=_POLL_S):
                assert isinstance(pipe, Connection)
                try:
                    told = pipe.recv()
                except EOFError:
                    _check_end(pipes.pop(pipe))
                    continue
                if isinstance(told, Failed):
                    raise DataError(told.reason)
                yield told
            tick(done.value - seen)
            seen = done.value
    finally:
        for process in pipes.values():
            process.terminate()
        for process in pipes.values():
            process.join()


def _run(
    pipe: Connection, tasks: Sequence[T], work: Callable[[T, Tick], R], taken: Any, done: Any, parent: int
) -> None:
    def tick() -> None:
        with done.get_lock():
            done.value += 1
        if os.getppid() != parent:
            os._exit(1)

    while True:
        with taken.get_lock():
            mine = taken.value
            taken.value += 1
        if mine >= len(tasks):
            return
        try:
            with _told():
                result = work(tasks[mine], tick)
        except DataError as error:
            pipe.send(Failed(str(error)))
            return
        pipe.send(result)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DataError(f"{where}{error.strerror or error}") from error
    except MemoryError:
        raise DataError("out of memory; try fewer processes, --jobs 1") from None


def _check_end(process: Any) -> None:
    process.join()
    if process.exitcode:
        how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        raise DataError(f"a worker process ended by {how}; the same command goes on from the shards that are whole.")
