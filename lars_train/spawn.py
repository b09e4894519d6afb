"""One process per device of this machine: start them, pass signals on to them, and tell how they ended."""

from __future__ import annotations

import functools
import json
import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from lars_train.errors import Stopped

_QUIET_TRACKER = "ignore:resource_tracker:UserWarning"
# What is passed on to the ranks, which take note of the first three (see training/notice.py).
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
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

    `work` and `arguments` are pickled. When one process fails the others get SIGTERM, and 30 s later SIGKILL.
    Signals that this process gets in the meantime are passed on.

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
    # The ranks meet here, and what one of them leaves here outlives it.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="lars-train-ranks-") as folder, _passed_on() as (ranks, passed_on):
        context = torch_processes.start_processes(
            _rank,
            (work, arguments, count, store.port, os.getpid(), folder),
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
            killed = [(index, rank) for index, rank in enumerate(ranks) if (rank.exitcode or 0) < 0]
            try:
                ended = context.join(0)
            except torch_processes.ProcessExitedException as error:
                raise _failure(Path(folder), error, killed, passed_on) from None
        return pickle.loads((Path(folder) / "result").read_bytes())


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
    rank: int, work: Callable[..., Any], arguments: tuple[Any, ...], count: int, port: int, launcher: int, folder: str
) -> None:
    """The life of one process. `port`: of the store; `folder`: where it leaves its result, or its error."""
    end_with(launcher)
    # An interrupt at the terminal reaches every process; before and after training, which takes note of it, the
    # launcher tells of it and this one just ends.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({key: str(value) for key, value in {**own, **meeting}.items()})
    try:
        result = work(*arguments)
    except Exception as error:
        told = [time.time(), rank, f"{type(error).__name__}: {error}", traceback.format_exc()]
        (Path(folder) / f"error{rank}").write_text(json.dumps(told))
        sys.exit(1)
    if rank == 0:
        (Path(folder) / "result").write_bytes(pickle.dumps(result))


@contextmanager
def _passed_on() -> Iterator[tuple[list[BaseProcess], list[int]]]:
    """Within it signals go to the processes of the first list, and are noted in the second."""
    ranks: list[BaseProcess] = []
    passed_on: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        _signal(ranks, number)

    before = {number: signal.signal(number, handler) for number in _PASSED_ON}
    try:
        yield ranks, passed_on
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _signal(ranks: list[BaseProcess], number: int) -> None:
    for rank in ranks:
        if rank.is_alive() and rank.pid is not None:
            os.kill(rank.pid, number)


def _failure(folder: Path, error: Any, killed: list[tuple[int, BaseProcess]], passed_on: list[int]) -> Exception:
    """What to raise. `error`: torch's, of one process; `killed`: those that a signal had ended by then."""
    told = sorted(json.loads(path.read_text()) for path in folder.glob("error*"))
    meant = [(rank, message) for _, rank, message, _ in told if message.partition(": ")[0] in _ON_PURPOSE]
    for rank, message in meant:
        kind, _, text = message.partition(": ")
        return Stopped(text) if kind == "Stopped" else WorkerError(rank, message)
    if passed_on:
        name = signal.Signals(passed_on[0]).name
        return Stopped(f"{name}: stopped; the same command goes on from the last checkpoint.")
    for index, process in killed:
        name = signal.Signals(-(process.exitcode or 0)).name
        hint = " (the kernel does so when memory runs out)" if name == "SIGKILL" else ""
        return WorkerError(index, f"process {process.pid} was ended by {name}{hint}")
    if told:
        _, rank, message, trace = told[0]
        return WorkerError(rank, message, trace)
    return WorkerError(error.error_index, f"process {error.error_pid} has ended with exit code {error.exit_code}")
