"""The ranks' common ground: one process group per job, and the few collectives that the trainer needs.

With a world size of 1 no process group is made and every collective is the identity.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from lars_train.errors import ConfigError, DataError, Diverged, Stopped
from lars_train.launch import Ranks, adopt, export_slurm, step_name
from lars_train.messages import ignore_closed_output, printable_lines
from lars_train.rendezvous import choose_interface, open_job_store

T = TypeVar("T")
_base_store: Store | None = None
_jobs = _groups = 0
_FAILURE = "failure"
# Seconds that ranks which notice a hanging one may lie apart, and NCCL's own timeout behind the host's, which names it.
_APART_S = 5.0
_LATER_S = 60.0


@dataclass(frozen=True)
class Group:
    """The ranks of a job. All methods but `first` are collective: every rank calls them in the same order."""

    ranks: Ranks
    host: Any = field(default=None, kw_only=True)
    """The process group for values in host memory; None: the job's own."""

    @property
    def first(self) -> bool:
        """True on the one process that writes and prints."""
        return self.ranks.first

    def all_reduce_sum(self, values: Tensor) -> None:
        """Replace `values` (any shape, on the job's device) by their sum over the ranks."""
        if self.ranks.world > 1:
            dist.all_reduce(values)

    def all_reduce_min(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values."""
        if self.ranks.world == 1:
            return value
        tensor = torch.tensor(value, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)

    def all_reduce_max(self, values: list[int]) -> list[int]:
        """The largest of the ranks' values at each place. They are the host's: no device is waited for."""
        if self.ranks.world == 1:
            return values
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host)
        largest: list[int] = tensor.tolist()
        return largest

    def broadcast_from_rank0(self, value: Any) -> Any:
        """Rank 0's `value` (anything that pickles), on every rank."""
        if self.ranks.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.ranks.world == 1:
            return [value]
        values: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(values, value)
        return values

    def on_rank0(self, work: Callable[[], T]) -> T | None:
        """Do `work` on rank 0 alone and return its result there; its `ConfigError` is raised on every rank."""
        found, error = None, None
        if self.first:
            try:
                found = work()
            except ConfigError as failure:
                error = failure
        self.raise_on_all_ranks(error)
        return found

    def raise_on_all_ranks(self, error: Exception | None) -> None:
        """Raise on every rank the first rank's error, if any rank has one: nobody is left waiting."""
        for found in self.all_gather(error):
            if found is not None:
                raise found


def current_ranks() -> Ranks:
    """The ranks that a launcher gave this process, or those of a lone process."""
    return adopt() or Ranks()


def begin_job() -> None:
    """Count a job of this process; the ranks count alike, also where one of them fails before it joins the others."""
    global _jobs, _groups
    _jobs, _groups = _jobs + 1, 0


@contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout: float) -> Iterator[Group]:
    """The process group of one job: NCCL on CUDA, gloo on the CPU. `timeout` in seconds.

    A process may make several in turn (a sweep), in the same order on every rank: each has its own
    names in the launcher's store, so that none reads what an earlier one left there.
    """
    global _base_store, _groups
    if ranks.world == 1:
        yield Group(ranks)
        return
    # DDP imports it. Imported while there is a group, it keeps hold of that: the connections of a rank that has failed
    # stay open, and the others wait for it.
    importlib.import_module("torch._dynamo")
    limit = timedelta(seconds=timeout)
    if _base_store is None:
        # Ranks that were set by hand may lie in several steps.
        job = "-"
        if "RANK" not in os.environ:
            job = step_name()
            os.environ.update(export_slurm(), LOCAL_WORLD_SIZE=str(ranks.local_world))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=limit))
            _base_store = PrefixStore(_agree_on_start(store, ranks, limit), store)
        else:
            with open_job_store(job, ranks, limit) as store:
                _base_store = PrefixStore(_agree_on_start(store, ranks, limit), store)
    _groups += 1
    store = PrefixStore(f"job{_jobs}.{_groups}", _base_store)
    choose_interface(PrefixStore("interface", store), ranks)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=limit + timedelta(seconds=_LATER_S) if device.type == "cuda" else limit,
        device_id=device if device.type == "cuda" else None,
    )
    store.set(f"host{ranks.rank}", platform.node())
    try:
        yield Group(ranks, host=dist.new_group(backend="gloo", timeout=limit) if device.type == "cuda" else None)
    except Stopped:
        raise  # all ranks have agreed on it
    except Exception as error:
        raise _first_failure(store, ranks, _named(store, ranks, error, timeout)) from error
    finally:
        dist.destroy_process_group()


def _named(store: Store, ranks: Ranks, error: Exception, timeout: float) -> Exception:
    """`error`, or where it is that of a wait in vain, one that names the ranks that were waited for.

    Those that answer come here themselves at about the same time, and leave a mark.
    """
    if not any(words in str(error).lower() for words in ("timed out", "timeout")):
        return error
    try:
        store.set(f"waited{ranks.rank}", "1")
        others, end = set(range(ranks.world)) - {ranks.rank}, time.monotonic() + _APART_S
        while others and time.monotonic() < end:
            others = {rank for rank in others if not store.check([f"waited{rank}"])}
            time.sleep(0.2)
        if not others:
            return error
        silent = ", ".join(f"{rank} on {store.get(f'host{rank}').decode()}" for rank in sorted(others)[:8])
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    except RuntimeError:  # the store went with the process that held it
        return error
    found = RuntimeError(
        f"rank {silent}{more} did not answer for {timeout:g} s (distributed.timeout) and hangs: look at what it waits "
        "for there (storage, a device, the network); the same command goes on from the last checkpoint."
    )
    if ranks.first:
        # At once, for the launcher waits for the rank that hangs before it tells of anything.
        with ignore_closed_output():
            print(f"lars-train: {found}", file=sys.stderr, flush=True)
    return found


def _agree_on_start(store: Store, ranks: Ranks, limit: timedelta) -> str:
    """A name for this start of all ranks, the same on each, that no earlier start has had.

    torchrun keeps its store over restarts, with the addresses of ended processes in it, and counts restarts on
    each node for itself (https://github.com/pytorch/pytorch/issues/108158): no number that it gives will do. So
    rank 0 answers every greeting, be it an ended process's, and goes on when each rank has used its answer.

    Raises `RuntimeError` when a rank has not come within `limit`.
    """
    mine = uuid.uuid4().hex
    if not ranks.first:
        store.set(f"greeting{ranks.rank}", mine)
        store.wait([f"answer.{mine}"], limit)
        start = store.get(f"answer.{mine}").decode()
        store.set(f"{start}.{ranks.rank}", "")
        return start
    missing, end = set(range(1, ranks.world)), time.monotonic() + limit.total_seconds()
    while True:
        for rank in [rank for rank in missing if store.check([f"greeting{rank}"])]:
            store.set(f"answer.{store.get(f'greeting{rank}').decode()}", mine)
        missing -= {rank for rank in missing if store.check([f"{mine}.{rank}"])}
        if not missing:
            return mine
        if time.monotonic() > end:
            late = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, sorted(missing)))}"
            raise RuntimeError(
                f"{late} of {ranks.world} did not come within distributed.timeout={limit.total_seconds():g} s."
            )
        time.sleep(0.01)


def _first_failure(store: Store, ranks: Ranks, error: Exception) -> Exception:
    """The failure that came first: a rank that fails takes the others with it, and their errors say little."""
    mine = json.dumps([ranks.rank, type(error).__name__, str(error)])
    try:
        rank, kind, text = json.loads(store.compare_set(_FAILURE, "", mine))
    except (RuntimeError, ValueError):  # the store went with the process that held it
        return error
    if rank == ranks.rank:
        if not ranks.first:
            told = f"lars-train: rank {rank} on {platform.node()}: {printable_lines(text)}"
            with ignore_closed_output():
                print(told, file=sys.stderr, flush=True)
        return error
    known: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ConfigError, DataError, Diverged)}
    return known[kind](text) if kind in known else RuntimeError(f"rank {rank} failed: {kind}: {text}")


NONE, BF16 = "none", "bf16"


def over_ranks(
    network: Any, device: torch.device, *, bucket_mb: float = 25.0, compression: str = NONE
) -> DistributedDataParallel:
    """`network` with gradients that are means over the ranks; within `no_sync` they are this rank's alone.

    Each gradient is a view of its bucket, so that reducing needs no second copy of them in memory.

    Args:
        network: a module, compiled or not, on `device`.
        bucket_mb: MiB of gradients that travel together.
        compression: ``bf16``: each rank's gradient is rounded to bfloat16 and summed in it, at half the bytes.
    """
    # RunningStatistics makes the buffers the same on every rank, from all ranks' data. torch 2.13 renamed the argument.
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    no_sync: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False
    }
    made = DistributedDataParallel(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=bucket_mb,
        **no_sync,
    )
    if compression == BF16:
        made.register_comm_hook(dist.group.WORLD, bf16_compress_hook)
    return made
