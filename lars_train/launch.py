"""The ranks of a run: adopt those that torchrun or Slurm started, or start one process per device of this machine.

No process group is made here (training/distributed.py does), and no training code is imported.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import pickle
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from lars_train.config import AUTO, Config
from lars_train.errors import ConfigError, Stopped
from lars_train.messages import counted, open_standard_streams
from lars_train.signals import blocked, handle_termination, termination_handler

# Of an empty loop: docs/performance.md has the speeds that this was chosen by.
_SPINS = "1000"
_FIRST_PORT, _END_OF_PORTS = 20_000, 32_768


@dataclass(frozen=True)
class Ranks:
    """This process among all of the run (`rank` of `world`) and on its machine (`local_rank` of `local_world`)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """True on the one process that writes and prints."""
        return self.rank == 0


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have threads that wait for one another leave their cores to other work almost at once. Before torch is imported.

    By itself libgomp, by which torch's operations share their work among threads, has them spin for milliseconds
    (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html), on the core that the thread they wait for may be
    waiting for. OMP_WAIT_POLICY and GOMP_SPINCOUNT stay as the user sets them; processes started from here inherit.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPINS)


def adopt(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """The ranks that torchrun or ``srun`` gave this process; None if it was started alone.

    Raises `ConfigError` when such an environment is there but incomplete.
    """
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE"} <= environment.keys():
        return _from_torchrun(environment)
    # A batch script's own shell carries SLURM_NTASKS too; only a step that srun started has several tasks.
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _from_slurm(environment)
    return None


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """How often torchrun has started this process again after a failure (``--max-restarts``)."""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))


def step_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return ``JOB.STEP`` of a Slurm step, as `squeue -s` lists it, or ``-`` outside of Slurm."""
    if "SLURM_STEP_ID" not in environment:
        return "-"
    return f"{environment.get('SLURM_JOB_ID', '0')}.{environment['SLURM_STEP_ID']}"


def step_port(step: str) -> int:
    """Return the port at which the ranks of `step` (``JOB.STEP``) meet, the same on each of them.

    The range 20000 to 32767 lies below the ports that Linux gives out by itself (``net.ipv4.ip_local_port_range`` in
    https://docs.kernel.org/networking/ip-sysctl.html). A hash makes steps of one host differ: consecutive jobs, too,
    whose steps have consecutive numbers.
    """
    digest = hashlib.sha256(step.encode()).digest()
    return _FIRST_PORT + int.from_bytes(digest[:8], "big") % (_END_OF_PORTS - _FIRST_PORT)


def export_slurm(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of torch's ``env://`` rendezvous, derived from those of a Slurm step.

    MASTER_ADDR and MASTER_PORT stay as the user sets them. Raises `ConfigError`.
    """
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if not address:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise ConfigError("Slurm: SLURM_STEP_NODELIST is not set; set MASTER_ADDR yourself.")
        address = first_host(nodes)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": address,
        "MASTER_PORT": port or str(step_port(step_name(environment))),
    }


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: ``gpu[07-09,12],cpu1`` gives ``gpu07``.

    A name may have several ranges (``rack[0-3]_blade[0-41]``; https://slurm.schedmd.com/slurm.conf.html,
    NodeName). Raises `ConfigError` for what is no node list.
    """
    entry = re.match(r"(?:[^\[\],\s]|\[\w[^\[\]]*\])+(?=,|$)", nodes.strip())
    if entry is None:
        raise ConfigError(f"Slurm: the node list {nodes!r} cannot be read; set MASTER_ADDR yourself.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", entry.group())


def processes(config: Config, devices: int, ghosts: int) -> int:
    """Processes to start on this machine: as asked for, or one per device while each has a ghost batch.

    `devices`: the accelerators of this machine (0: the CPU alone, where one process uses all cores).
    Raises `ConfigError` when there are fewer devices than processes asked for.
    """
    wanted = config.launch.nproc
    if wanted == AUTO:
        return max(1, min(devices, ghosts))
    count = int(wanted)
    if devices and count > devices and config.device != "cpu":
        raise ConfigError(
            f"launch.nproc={count}: this machine has {counted(devices, 'CUDA device')}; use at most that many, or "
            "device=cpu."
        )
    return count


def check_nodes(config: Config, ranks: Ranks | None) -> None:
    """Raise `ConfigError` where ``launch.nodes`` is not the number of machines that this start is on."""
    wanted = config.launch.nodes
    found = 1 if ranks is None else -(-ranks.world // ranks.local_world)
    if wanted is not None and wanted != found:
        how = "start it on each with torchrun or srun (docs/clusters.md)" if ranks is None else "mend the launcher's"
        raise ConfigError(
            f"launch.nodes={wanted}: this start is on {counted(found, 'machine')}; {how}, or drop the key."
        )


def _from_torchrun(environment: Mapping[str, str]) -> Ranks:
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        local_world = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"the launcher's environment is incomplete: {error}; start with torchrun.") from None
    if not 0 <= rank < world or not 0 <= local_rank < max(local_world, local_rank + 1):
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={world} do not fit together; start with torchrun.")
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise ConfigError("RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not; start with torchrun.")
    return Ranks(rank, world, local_rank, max(local_world, local_rank + 1))


def _from_slurm(environment: Mapping[str, str]) -> Ranks:
    missing = [k for k in ("SLURM_PROCID", "SLURM_LOCALID") if k not in environment]
    if missing:
        raise ConfigError(f"Slurm: {', '.join(missing)} is not set; start the step with srun.")
    numbers = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    odd = [f"{k}={environment[k]}" for k in numbers if not environment[k].isdigit()]
    if odd:
        raise ConfigError(f"Slurm: {', '.join(odd)} is no number; start the step with srun.")
    # "4(x2),3": tasks on each node; the first number is right for all but the last node of an uneven step.
    per_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    local_rank = int(environment["SLURM_LOCALID"])
    return Ranks(
        int(environment["SLURM_PROCID"]),
        int(environment["SLURM_STEP_NUM_TASKS"]),
        local_rank,
        max(int(per_node.group()) if per_node else 1, local_rank + 1),
    )


_QUIET_TRACKER = "ignore:resource_tracker:UserWarning"
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
        WorkerError: a process has failed; the one that was killed, else the first that reported an error.
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
    with _forward_signals() as (ranks, passed_on):
        # Until a rank is ready for it, an interrupt waits: its imports would end with a traceback.
        with blocked(signal.SIGINT):
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
                raise _failure(_reported_errors(store, count), error, ranks, killed, passed_on) from None
    return pickle.loads(bytes.fromhex(store.get("result").decode()))


def shield_tracker() -> None:
    """Start Python's tracker of semaphores so that it outlives a signal to the whole process group.

    By itself it is immune to SIGINT and SIGTERM only, and another that takes its place prints tracebacks.
    """
    with blocked(signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
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

    open_standard_streams()
    end_with(launcher)
    # An interrupt at the terminal reaches every process; before and after training, which takes note of it, the
    # launcher tells of it and this one just ends.
    handle_termination(signal.SIG_DFL, [signal.SIGINT])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({key: str(value) for key, value in {**own, **meeting}.items()})
    store = TCPStore("localhost", port, is_master=False, wait_for_workers=False)
    try:
        result = work(*arguments)
    except Exception as error:
        report = [time.time(), rank, f"{type(error).__name__}: {error}", traceback.format_exc()]
        store.set(f"error{rank}", json.dumps(report))
        sys.exit(1)
    if rank == 0:
        store.set("result", pickle.dumps(result).hex())


@contextmanager
def _forward_signals() -> Iterator[tuple[list[BaseProcess], list[int]]]:
    """Forward signals to the processes of the first list within the context, and record them in the second."""
    ranks: list[BaseProcess] = []
    passed_on: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        _signal(ranks, number)

    with termination_handler(handler):
        yield ranks, passed_on


def _signal(ranks: list[BaseProcess], number: int) -> None:
    for rank in ranks:
        if rank.is_alive() and rank.pid is not None:
            os.kill(rank.pid, number)


def _reported_errors(store: Any, count: int) -> list[tuple[int, str, str]]:
    """Return rank, message and traceback of each rank that reported an error, in the order of the reports."""
    errors = [json.loads(store.get(f"error{rank}")) for rank in range(count) if store.check([f"error{rank}"])]
    return [(rank, message, trace) for _, rank, message, trace in sorted(errors)]


def _failure(
    reported: list[tuple[int, str, str]],
    error: Any,
    ranks: list[BaseProcess],
    killed: list[tuple[int, int]],
    passed_on: list[int],
) -> Exception:
    """What to raise. `error`: torch's, of one process; `killed`: index and signal of those ended by one by then."""
    for rank, message, _ in reported:
        kind, _, text = message.partition(": ")
        if kind in _ON_PURPOSE:
            return Stopped(text) if kind == "Stopped" else WorkerError(rank, message)
    at_once = [rank.exitcode - 128 for rank in ranks if rank.exitcode is not None and rank.exitcode > 128]
    if passed_on and at_once:
        return Stopped(f"{signal.Signals(at_once[0]).name}, the second: ended at once.", 128 + at_once[0])
    if passed_on and (not reported or any(number in passed_on for _, number in killed)):
        name = signal.Signals(passed_on[0]).name
        return Stopped(f"{name}: stopped; the same command goes on from the last checkpoint.")
    for index, number in killed:
        name = signal.Signals(number).name
        hint = " (the kernel does so when memory runs out)" if name == "SIGKILL" else ""
        return WorkerError(index, f"process {ranks[index].pid} was ended by {name}{hint}")
    if reported:
        return WorkerError(*reported[0])
    return WorkerError(error.error_index, f"process {error.error_pid} has ended with exit code {error.exit_code}")
