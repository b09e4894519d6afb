"""Join the ranks in one process group per job, and run the few collectives that the trainer needs.

With a world size of 1 there is no process group, and every collective is the identity.
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
# Seconds within which all ranks notice that a rank hangs, and seconds by which NCCL's timeout comes after gloo's, whose
# error names that rank.
_APART_S = 5.0
_LATER_S = 60.0


@dataclass(frozen=True)
class Group:
    """The ranks of a job. All methods are collective: every rank calls them in the same order."""

    ranks: Ranks
    host: Any = field(default=None, kw_only=True)
    """The process group for values in host memory; None: the default group."""

    @property
    def first(self) -> bool:
        """True on rank 0, which alone writes and prints."""
        return self.ranks.first

    def all_reduce_sum(self, values: Tensor) -> None:
        """Replace `values` (any shape, on the rank's device) by their sum over the ranks."""
        if self.ranks.world > 1:
            dist.all_reduce(values)

    def all_reduce_min(self, value: int, device: torch.device) -> int:
        """Return the minimum over the ranks."""
        if self.ranks.world == 1:
            return value
        tensor = torch.tensor(value, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)

    def all_reduce_max(self, values: list[int]) -> list[int]:
        """Return the elementwise maximum over the ranks. The values are in host memory: no device is waited for."""
        if self.ranks.world == 1:
            return values
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host)
        largest: list[int] = tensor.tolist()
        return largest

    def broadcast_from_rank0(self, value: Any) -> Any:
        """Return rank 0's `value` (anything that pickles) on every rank."""
        if self.ranks.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Return the ranks' values, in rank order, on every rank."""
        if self.ranks.world == 1:
            return [value]
        values: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(values, value)
        return values

    def on_rank0(self, work: Callable[[], T]) -> T | None:
        """Call `work` on rank 0 and return its result there, None elsewhere. Every rank raises its `ConfigError`."""
        found, error = None, None
        if self.first:
            try:
                found = work()
            except ConfigError as failure:
                error = failure
        self.raise_on_all_ranks(error)
        return found

    def raise_on_all_ranks(self, error: Exception | None) -> None:
        """Raise the error of the lowest rank that has one on every rank, so that no rank is left waiting."""
        for found in self.all_gather(error):
            if found is not None:
                raise found


def current_ranks() -> Ranks:
    """Return the ranks that a launcher set for this process, or those of a single process."""
    return adopt() or Ranks()


def begin_job() -> None:
    """Count a new job of this process. Ranks keep equal counts, even if one fails before it joins the others."""
    global _jobs, _groups
    _jobs, _groups = _jobs + 1, 0


@contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout: float) -> Iterator[Group]:
    """Open the process group of one job: NCCL on CUDA, gloo on the CPU. `timeout` is in seconds.

    A process may open several in turn (a sweep), in the same order on every rank. Each has its own key prefix in the
    launcher's store, so that none reads keys of an earlier one.
    """
    global _base_store, _groups
    if ranks.world == 1:
        yield Group(ranks)
        return
    # DDP imports this module. Imported while a group exists, it keeps a reference to the group: the connections of a
    # failed rank would then stay open, and the others would wait for it.
    importlib.import_module("torch._dynamo")
    limit = timedelta(seconds=timeout)
    if _base_store is None:
        # Ranks set by hand may span several Slurm steps, so they get no step's name.
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
        raise  # all ranks raise it together
    except Exception as error:
        raise _first_failure(store, ranks, _name_hanging_ranks(store, ranks, error, timeout)) from error
    finally:
        dist.destroy_process_group()


def _name_hanging_ranks(store: Store, ranks: Ranks, error: Exception, timeout: float) -> Exception:
    """Return `error`, or for a timeout an error that names the ranks that did not answer.

    The other ranks time out at about the same time, and each sets a mark in the store.
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
    except RuntimeError:  # the process that hosted the store has ended
        return error
    named = RuntimeError(
        f"rank {silent}{more} did not answer for {timeout:g} s (distributed.timeout) and hangs: find out what it waits "
        "for there (storage, a device, the network); the same command resumes from the last checkpoint."
    )
    if ranks.first:
        # Print now: the launcher reports errors only after the hanging rank has ended.
        with ignore_closed_output():
            print(f"lars-train: {named}", file=sys.stderr, flush=True)
    return named


def _agree_on_start(store: Store, ranks: Ranks, limit: timedelta) -> str:
    """Return a unique name for this start of all ranks, the same on each rank.

    torchrun keeps its store across restarts, with the addresses of ended processes in it, and counts restarts on each
    node separately (https://github.com/pytorch/pytorch/issues/108158), so none of its numbers is a unique name. Instead
    rank 0 answers every greeting, even of an ended process, and continues once each rank has used its answer.

    Raises `RuntimeError` if a rank does not join within `limit`.
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
                f"{late} of {ranks.world} did not join within distributed.timeout={limit.total_seconds():g} s."
            )
        time.sleep(0.01)


def _first_failure(store: Store, ranks: Ranks, error: Exception) -> Exception:
    """Return the failure that came first. The others follow from it: a failing rank makes the other ranks fail."""
    mine = json.dumps([ranks.rank, type(error).__name__, str(error)])
    try:
        rank, kind, text = json.loads(store.compare_set(_FAILURE, "", mine))
    except (RuntimeError, ValueError):  # the process that hosted the store has ended
        return error
    if rank == ranks.rank:
        if not ranks.first:
            line = f"lars-train: rank {rank} on {platform.node()}: {printable_lines(text)}"
            with ignore_closed_output():
                print(line, file=sys.stderr, flush=True)
        return error
    known: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ConfigError, DataError, Diverged)}
    return known[kind](text) if kind in known else RuntimeError(f"rank {rank} failed: {kind}: {text}")


NONE, BF16 = "none", "bf16"


def over_ranks(
    network: Any, device: torch.device, *, bucket_mb: float = 25.0, compression: str = NONE
) -> DistributedDataParallel:
    """Return `network` in DDP: its gradients are means over the ranks, and within `no_sync` this rank's own.

    Each gradient is a view of its bucket, so that all-reduce needs no second copy of it in memory.

    Args:
        network: a module, compiled or not, on `device`.
        bucket_mb: MiB of gradients that one all-reduce sends.
        compression: ``bf16``: round each rank's gradients to bfloat16 and sum them in it, at half the bytes.
    """
    # RunningStatistics computes equal buffers on all ranks, so DDP broadcasts none. torch 2.13 renamed the argument.
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    no_sync: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False
    }
    wrapped = DistributedDataParallel(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=bucket_mb,
        **no_sync,
    )
    if compression == BF16:
        wrapped.register_comm_hook(dist.group.WORLD, bf16_compress_hook)
    return wrapped
