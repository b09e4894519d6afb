"""Run tasks in several processes, none of which outlives the command.

`concurrent.futures.ProcessPoolExecutor` is not suitable: it reports a failed task only after the running tasks end. Its
processes also outlive a command that is killed, and only private attributes of the executor give access to them.
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
"""Called by a task after each image."""
_POLL_S = 0.2


class _Failure(NamedTuple):
    """Sent by a process in place of a result."""

    reason: str


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(tasks: Sequence[T], work: Callable[[T, Tick], R], jobs: int, tick: Callable[[int], None]) -> Iterator[R]:
    """Yield the results of `work` for `tasks`, in order of completion, from `jobs` processes.

    With one job, tasks run in this process. Calls `tick` with the number of images finished since the last call.
    Raises `DataError` for a `DataError` or an OSError in a task, and when a process dies.
    """
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        for task in tasks:
            with _data_errors():
                result = work(task, lambda: tick(1))
            yield result
        return
    # Forked processes share the memory of the samples' names. Outside Linux, fork is unsafe or unavailable.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    started, done = context.Value("q", 0), context.Value("q", 0)
    pipes: dict[Connection, Any] = {}
    reported = 0
    try:
        for _ in range(jobs):
            results, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(sender, tasks, work, started, done, os.getpid()), daemon=True)
            # Ctrl-C reaches all processes of the terminal; only the parent handles it, and ends its workers.
            with blocked(signal.SIGINT):
                process.start()
            sender.close()
            pipes[results] = process
        while pipes:
            for pipe in wait(list(pipes), timeout=_POLL_S):
                assert isinstance(pipe, Connection)
                try:
                    result = pipe.recv()
                except EOFError:
                    _check_end(pipes.pop(pipe))
                    continue
                if isinstance(result, _Failure):
                    raise DataError(result.reason)
                yield result
            # Read the shared count once: a process may increase it between two reads.
            finished = done.value
            tick(finished - reported)
            reported = finished
    finally:
        for process in pipes.values():
            process.terminate()
        for process in pipes.values():
            process.join()


def _run(
    pipe: Connection, tasks: Sequence[T], work: Callable[[T, Tick], R], started: Any, done: Any, parent: int
) -> None:
    def tick() -> None:
        with done.get_lock():
            done.value += 1
        # A killed parent cannot end its workers.
        if os.getppid() != parent:
            os._exit(1)

    while True:
        with started.get_lock():
            number = started.value
            started.value += 1
        if number >= len(tasks):
            return
        try:
            with _data_errors():
                result = work(tasks[number], tick)
        except DataError as error:
            pipe.send(_Failure(str(error)))
            return
        pipe.send(result)


@contextlib.contextmanager
def _data_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise DataError(f"{where}{error.strerror or error}") from error
    except MemoryError:
        raise DataError("out of memory; use fewer processes: --jobs 1") from None


def _check_end(process: Any) -> None:
    process.join()
    if process.exitcode:
        code = process.exitcode
        end = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise DataError(f"a worker process {end}; the same command resumes from the complete shards.")
