"""One process per device of this machine: start them, pass signals on to them, and tell how they ended."""

from __future__ import annotations

import functools
import json
import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from lars_train.errors import Stopped

_QUIET_TRACKER = "ignore:resource_tracker:UserWarning"
# What is passed on to the ranks, which take note of it (see training/notice.py).
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Exceptions whose text is meant for the user as it stands.
_ON_PURPOSE = ("ConfigError", "DataError", "Diverged", "Stopped")
# A rank that is killed and those that fail for want of it end within about this time; the first is the cause.
_TOGETHER_S = 0.2


class WorkerError(RuntimeError):
    """A process that `start_processes` started has failed. `kind` is the name of its exception.

    The text is the exception's own where the program raised it on purpose, else its whole traceback.
    """

    def __init__(self, rank: int, message: str, traceback: str = "") -> None:
        self.kind, _, text = message.partition(": ")
        super().__init__(text if self.kind in _ON_PURPOSE else f"rank {rank}: {message}\n{traceback}".rstrip())


def start_processes(work: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> Any:
    """Run `work(*arguments)` in `count` processes of this machine, its ranks; what rank 0 returned.

    `work`, `arguments` and the result are pickled. When one process fails the others get SIGTERM, and 30 s later
    SIGKILL. Signals that this process gets in the meantime are passed on, but for those that it ignored before.

    Raises:
        WorkerError: a process has failed; the one that was killed, else the first that has told of an error.
        Stopped: the processes have ended by a signal that was passed on, or agreed on ending.
    """
    # torch.distributed.elastic could do this, but its launcher waits for ever for a process that is killed between
    # its end of work and its exit (an Event is set there, and `Condition.notify` awaits the answer of each waiter).
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    torch_processes: Any = import_module("torch.multiprocessing")
    # That it ends the other processes when one has failed goes without saying.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    # Semaphores that ended processes leave behind are removed by Python's tracker; it need not warn after the reason.
    filters = os.environ.get("PYTHONWARNINGS", "")
    if _QUIET_TRACKER not in filters:
        os.environ["PYTHONWARNINGS"] = f"{filters},{_QUIET_TRACKER}".lstrip(",")
    shield_tracker()
    # The ranks meet here and leave here their result or error, which outlives them.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with _passed_on() as (ranks, passed_on):
        # Until a rank is ready for it, an interrupt waits: its imports would end with a traceback.
        with _blocked(signal.SIGINT):
            context = torch_processes.start_processes(
                _rank,
                (work, arguments, count, store.port, os.getpid()),
                nprocs=count,
                join=False,
                start_method="spawn",
            )
            ranks.extend(context.processes)
        for number in passed_on:
            _signal(ranks, number)
        ended = False
        while not ended:
            connection.wait(list(context.sentinels))
            time.sleep(_TOGETHER_S)
            killed = [(index, -code) for index, rank in enumerate(ranks) if (code := rank.exitcode or 0) < 0]
            try:
                ended = context.join(0)
            except torch_processes.ProcessExitedException as error:
                raise _failure(_told(store, count), error, ranks, killed, passed_on) from None
    return pickle.loads(bytes.fromhex(store.get("result").decode()))


def shield_tracker() -> None:
    """Start Python's tracker of semaphores so that it outlives a signal to the whole process group.

    By itself it is immune to SIGINT and SIGTERM only, and another that takes its place prints tracebacks.
    """
    with _blocked(signal.SIGUSR1, signal.SIGHUP):
        resource_tracker.ensure_running()


@functools.cache
def end_with(launcher: int) -> None:
    """Give this process SIGTERM when `launcher`, the id of its parent process, is gone.

    A rank whose launcher was killed would train on unseen, hold the run directory, and wait for ever to be asked for
    its result.
    """

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _rank(
    rank: int, work: Callable[..., Any], arguments: tuple[Any, ...], count: int, port: int, launcher: int
) -> None:
    """The life of one process. `port`: of the store, where it leaves its result or its error."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    end_with(launcher)
    # An interrupt at the terminal reaches every process; before and after training, which takes note of it, the
    # launcher tells of it and this one just ends.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({key: str(value) for key, value in {**own, **meeting}.items()})
    store = TCPStore("localhost", port, is_master=False, wait_for_workers=False)
    try:
        result = work(*arguments)
    except Exception as error:
        told = [time.time(), rank, f"{type(error).__name__}: {error}", traceback.format_exc()]
        store.set(f"error{rank}", json.dumps(told))
        sys.exit(1)
    if rank == 0:
        store.set("result", pickle.dumps(result).hex())


@contextmanager
def _blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Within it these signals wait; a process that is started then begins with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _passed_on() -> Iterator[tuple[list[BaseProcess], list[int]]]:
    """Within it signals go to the processes of the first list, and are noted in the second."""
    ranks: list[BaseProcess] = []
    passed_on: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        _signal(ranks, number)

    heard = [number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield ranks, passed_on
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _signal(ranks: list[BaseProcess], number: int) -> None:
    for rank in ranks:
        if rank.is_alive() and rank.pid is not None:
            os.kill(rank.pid, number)


def _told(store: Any, count: int) -> list[tuple[int, str, str]]:
    """Rank, message and traceback of those that have told of an error, the first to do so first."""
    errors = [json.loads(store.get(f"error{rank}")) for rank in range(count) if store.check([f"error{rank}"])]
    return [(rank, message, trace) for _, rank, message, trace in sorted(errors)]


def _failure(
    told: list[tuple[int, str, str]],
    error: Any,
    ranks: list[BaseProcess],
    killed: list[tuple[int, int]],
    passed_on: list[int],
) -> Exception:
    """What to raise. `error`: torch's, of one process; `killed`: index and signal of those ended by one by then."""
    for rank, message, _ in told:
        kind, _, text = message.partition(": ")
        if kind in _ON_PURPOSE:
            return Stopped(text) if kind == "Stopped" else WorkerError(rank, message)
    at_once = [rank.exitcode - 128 for rank in ranks if rank.exitcode is not None and rank.exitcode > 128]
    if passed_on and at_once:
        return Stopped(f"{signal.Signals(at_once[0]).name}, the second: ended at once.", 128 + at_once[0])
    if passed_on and (not told or any(number in passed_on for _, number in killed)):
        name = signal.Signals(passed_on[0]).name
        return Stopped(f"{name}: stopped; the same command goes on from the last checkpoint.")
    for index, number in killed:
        name = signal.Signals(number).name
        hint = " (the kernel does so when memory runs out)" if name == "SIGKILL" else ""
        return WorkerError(index, f"process {ranks[index].pid} was ended by {name}{hint}")
    if told:
        return WorkerError(*told[0])
    return WorkerError(error.error_index, f"process {error.error_pid} has ended with exit code {error.exit_code}")
