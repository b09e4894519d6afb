"""Adopt the ranks that torchrun or Slurm started, or start one process per device of this machine.

training/distributed.py creates the process group. No training code is imported here.
"""

from __future__ import annotations

import atexit
import functools
import gc
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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType, ModuleType
from typing import Any

from lars_train.config import AUTO, Config
from lars_train.errors import ConfigError, DataError, Diverged, Stopped
from lars_train.messages import counted, open_standard_streams
from lars_train.signals import blocked, handle_termination, termination_handler

# Iterations of an empty loop before a thread yields its core, chosen by the measurements in docs/performance.md.
_SPINS = "1000"
_FIRST_PORT, _END_OF_PORTS = 20_000, 32_768
_GC_THRESHOLDS = gc.get_threshold()


@dataclass(frozen=True)
class Ranks:
    """The place of this process in the run (`rank` of `world`) and on its machine (`local_rank` of `local_world`)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """True on rank 0, which writes and prints."""
        return self.rank == 0


def share_cores(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make waiting threads yield their cores almost immediately. Call this before torch is imported.

    By default the threads of libgomp, which run torch's operations, spin for milliseconds
    (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html), perhaps on a core that the awaited thread
    needs. OMP_WAIT_POLICY and GOMP_SPINCOUNT set by the user are kept. Child processes inherit the setting.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPINS)


def collect_garbage_rarely() -> None:
    """Collect garbage rarely until `collect_garbage_as_usual`, and not at exit. Call this before torch is imported.

    Importing torch creates a million objects that stay. Python's default is to search them for unused cycles during
    the imports and again at exit, which takes a quarter of the CPU seconds of a short command.
    """
    gc.set_threshold(100_000, *_GC_THRESHOLDS[1:])
    atexit.register(gc.freeze)


def collect_garbage_as_usual() -> None:
    """Restore Python's default, so that during training no cycle keeps the memory of a tensor for long."""
    gc.set_threshold(*_GC_THRESHOLDS)


def adopt(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """Return the ranks that torchrun or ``srun`` gave this process, or None if it was started alone.

    Raises `ConfigError` if the launcher's environment is incomplete.
    """
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE"} <= environment.keys():
        return _from_torchrun(environment)
    # Not SLURM_NTASKS, which the shell of a batch script has too. Only a step that srun started has several tasks.
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _from_slurm(environment)
    return None


def restarts(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of times torchrun has restarted this process after a failure (``--max-restarts``)."""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))


def step_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return ``JOB.STEP`` of a Slurm step, as `squeue -s` lists it, or ``-`` outside Slurm."""
    if "SLURM_STEP_ID" not in environment:
        return "-"
    return f"{environment.get('SLURM_JOB_ID', '0')}.{environment['SLURM_STEP_ID']}"


def step_port(step: str) -> int:
    """Return the rendezvous port of the ranks of `step` (``JOB.STEP``): a hash of `step`, equal on every rank.

    The range 20000 to 32767 lies below the ports that Linux assigns (``net.ipv4.ip_local_port_range`` in
    https://docs.kernel.org/networking/ip-sysctl.html). Because of the hash, steps on one host rarely share a port, even
    those of consecutive jobs.
    """
    digest = hashlib.sha256(step.encode()).digest()
    return _FIRST_PORT + int.from_bytes(digest[:8], "big") % (_END_OF_PORTS - _FIRST_PORT)


def export_slurm(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables of torch's ``env://`` rendezvous, derived from those of a Slurm step.

    MASTER_ADDR and MASTER_PORT set by the user are kept. Raises `ConfigError`.
    """
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if not address:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise ConfigError("Slurm: SLURM_STEP_NODELIST is not set. Set MASTER_ADDR.")
        address = first_host(nodes)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": address,
        "MASTER_PORT": port or str(step_port(step_name(environment))),
    }


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: ``gpu07`` of ``gpu[07-09,12],cpu1``.

    A name may have several ranges (``rack[0-3]_blade[0-41]``; https://slurm.schedmd.com/slurm.conf.html,
    NodeName). Raises `ConfigError` if `nodes` is not a node list.
    """
    entry = re.match(r"(?:[^\[\],\s]|\[\w[^\[\]]*\])+(?=,|$)", nodes.strip())
    if entry is None:
        raise ConfigError(f"Slurm: the node list {nodes!r} cannot be parsed. Set MASTER_ADDR.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", entry.group())


def processes(config: Config, devices: int, ghosts: int) -> int:
    """Return the number of processes to start on this machine.

    It is ``launch.nproc``; for ``auto``, the number of devices, but at most the number of ghost batches.

    `devices`: the accelerators of this machine (0: CPU only, where one process uses all cores).
    Raises `ConfigError` if ``launch.nproc`` exceeds the devices.
    """
    if config.launch.nproc == AUTO:
        return max(1, min(devices, ghosts))
    count = int(config.launch.nproc)
    if devices and count > devices and config.device != "cpu":
        raise ConfigError(
            f"launch.nproc={count}: this machine has {counted(devices, 'CUDA device')}. Set at most that many, or "
            "device=cpu."
        )
    return count


def check_nodes(config: Config, ranks: Ranks | None) -> None:
    """Raise `ConfigError` if ``launch.nodes`` is set and differs from the number of machines of the job."""
    expected = config.launch.nodes
    found = 1 if ranks is None else -(-ranks.world // ranks.local_world)
    if expected is not None and expected != found:
        fix = (
            "Start it on each machine with torchrun or srun (docs/clusters.md)"
            if ranks is None
            else "Fix the launcher's number of machines"
        )
        raise ConfigError(
            f"launch.nodes={expected}: this job runs on {counted(found, 'machine')}. {fix}, or remove the key."
        )


def _from_torchrun(environment: Mapping[str, str]) -> Ranks:
    try:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        local_world = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"the launcher's environment is incomplete: {error}. Start with torchrun.") from None
    if not 0 <= rank < world or not 0 <= local_rank < max(local_world, local_rank + 1):
        raise ConfigError(f"RANK={rank} and WORLD_SIZE={world} are inconsistent. Start with torchrun.")
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise ConfigError("RANK and WORLD_SIZE are set, MASTER_ADDR or MASTER_PORT is not. Start with torchrun.")
    return Ranks(rank, world, local_rank, max(local_world, local_rank + 1))


def _from_slurm(environment: Mapping[str, str]) -> Ranks:
    missing = [k for k in ("SLURM_PROCID", "SLURM_LOCALID") if k not in environment]
    if missing:
        raise ConfigError(f"Slurm: {', '.join(missing)} is not set. Start the step with srun.")
    numbers = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    invalid = [f"{k}={environment[k]}" for k in numbers if not environment[k].isdigit()]
    if invalid:
        raise ConfigError(f"Slurm: {', '.join(invalid)} is not a number. Start the step with srun.")
    # "4(x2),3": tasks per node. The first number is right for all but the last node of an uneven step.
    per_node = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    local_rank = int(environment["SLURM_LOCALID"])
    return Ranks(
        int(environment["SLURM_PROCID"]),
        int(environment["SLURM_STEP_NUM_TASKS"]),
        local_rank,
        max(int(per_node.group()) if per_node else 1, local_rank + 1),
    )


_QUIET_TRACKER = "ignore:resource_tracker:UserWarning"
# Exceptions with a message for the user, which are raised again in the launching process.
_FOR_USERS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ConfigError, DataError, Diverged, Stopped)}
# When a rank is killed, the ranks that fail because of it end within about this time.
_SETTLE_S = 0.2


class WorkerError(RuntimeError):
    """A process of `start_processes` failed in an unexpected way. The message has its traceback."""

    def __init__(self, rank: int, message: str, traceback: str = "") -> None:
        super().__init__(f"rank {rank}: {message}\n{traceback}".rstrip())


def start_processes(work: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> Any:
    """Run `work(*arguments)` in `count` processes on this machine, the ranks, and return the result of rank 0.

    `work`, `arguments` and the result are pickled. When one process fails the others get SIGTERM, and 30 s later
    SIGKILL. Termination signals are forwarded to the processes, except those that this process ignores.

    Raises:
        ConfigError, DataError, Diverged, Stopped: a rank raised it.
        WorkerError: a process failed in another way. It describes the process that was killed, or else the first error.
        Stopped: a forwarded signal ended the processes.
    """
    # Not torch.distributed.elastic: its launcher hangs if a process is killed after its work, but before its exit. In
    # between, a process waits for an Event of the launcher, and `Event.set` blocks until each waiting process wakes up.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    torch_processes: Any = import_module("torch.multiprocessing")
    # Silence torch's warning that it ends the other processes because one failed.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    # Python's resource tracker removes the semaphores of ended processes. Its warning would follow the error message.
    filters = os.environ.get("PYTHONWARNINGS", "")
    if _QUIET_TRACKER not in filters:
        os.environ["PYTHONWARNINGS"] = f"{filters},{_QUIET_TRACKER}".lstrip(",")
    start_resource_tracker()
    # The ranks meet at this store, and leave their result or error in it, because it outlives them.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with _forward_signals() as (ranks, forwarded):
        # SIGINT stays blocked until a rank can handle it: during imports it would print a traceback.
        with blocked(signal.SIGINT), nullcontext() if work.__module__ == "__main__" else _without_main_module():
            context = torch_processes.start_processes(
                _rank,
                (work, arguments, count, store.port, os.getpid()),
                nprocs=count,
                join=False,
                start_method="spawn",
            )
            ranks.extend(context.processes)
        for number in forwarded:
            _send_signal(ranks, number)
        ended = False
        while not ended:
            connection.wait(list(context.sentinels))
            time.sleep(_SETTLE_S)
            killed = [(index, -code) for index, rank in enumerate(ranks) if (code := rank.exitcode or 0) < 0]
            try:
                ended = context.join(0)
            except torch_processes.ProcessExitedException as error:
                raise _failure(_reported_errors(store, count), error, ranks, killed, forwarded) from None
    return pickle.loads(bytes.fromhex(store.get("result").decode()))


def start_resource_tracker() -> None:
    """Start Python's resource tracker so that it survives a termination signal to the whole process group.

    Python makes the tracker ignore SIGINT and SIGTERM only, and a tracker that replaces a killed one prints tracebacks.
    """
    with blocked(signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        resource_tracker.ensure_running()


@functools.cache
def exit_with_parent(launcher: int) -> None:
    """Send this process SIGTERM when its parent process, whose id is `launcher`, has ended.

    Otherwise, after its launcher is killed, a rank would keep training and keep the run directory locked.
    """

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _rank(
    rank: int, work: Callable[..., Any], arguments: tuple[Any, ...], count: int, port: int, launcher: int
) -> None:
    """Run one process and put its result or error into the store at `port`."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    open_standard_streams()
    collect_garbage_rarely()
    exit_with_parent(launcher)
    # Ctrl-C reaches every process of the terminal. During training `SignalHandler` records it. Before and after, this
    # process ends without a message, because the launcher prints one.
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
def _without_main_module() -> Iterator[None]:
    """Hide the program's main module, which spawned processes would run again: a script of a user may call `train`."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _forward_signals() -> Iterator[tuple[list[BaseProcess], list[int]]]:
    """Forward termination signals within the context. Yields the list of processes, and the list of forwarded signals.

    The caller fills the first list.
    """
    ranks: list[BaseProcess] = []
    forwarded: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded.append(number)
        _send_signal(ranks, number)

    with termination_handler(forward):
        yield ranks, forwarded


def _send_signal(ranks: list[BaseProcess], number: int) -> None:
    for rank in ranks:
        if rank.is_alive() and rank.pid is not None:
            os.kill(rank.pid, number)


def _reported_errors(store: Any, count: int) -> list[tuple[int, str, str]]:
    """Return (rank, message, traceback) of each reported error, earliest first."""
    errors = [json.loads(store.get(f"error{rank}")) for rank in range(count) if store.check([f"error{rank}"])]
    return [(rank, message, trace) for _, rank, message, trace in sorted(errors)]


def _failure(
    reported: list[tuple[int, str, str]],
    error: Any,
    ranks: list[BaseProcess],
    killed: list[tuple[int, int]],
    forwarded: list[int],
) -> Exception:
    """Return the exception to raise.

    `error`: torch's exception about one process. `killed`: index and signal of each rank that a signal ended.
    """
    for _, message, _ in reported:
        kind, _, text = message.partition(": ")
        if kind in _FOR_USERS:
            return _FOR_USERS[kind](text)
    second = [rank.exitcode - 128 for rank in ranks if rank.exitcode is not None and rank.exitcode > 128]
    if forwarded and second:
        return Stopped(f"{signal.Signals(second[0]).name} was the second signal: ended at once.", 128 + second[0])
    if forwarded and (not reported or any(number in forwarded for _, number in killed)):
        name = signal.Signals(forwarded[0]).name
        return Stopped(f"{name}: stopped; the same command resumes from the last checkpoint.")
    for index, number in killed:
        name = signal.Signals(number).name
        hint = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
        return WorkerError(index, f"process {ranks[index].pid} was killed by {name}{hint}")
    if reported:
        return WorkerError(*reported[0])
    return WorkerError(error.error_index, f"process {error.error_pid} ended with exit code {error.exit_code}")
