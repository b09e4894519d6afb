"""Open one process group per job, and provide the few collectives that the trainer needs.

With world size 1 there is no process group, and every collective returns its input.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
# The ranks time out within this many seconds of each other if a rank hangs.
_TIMEOUT_SPREAD_S = 5.0
# NCCL's timeout is longer than gloo's by this many seconds, because gloo's error names the rank that hangs.
_EXTRA_NCCL_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Group:
    """The ranks of a job. All methods are collective: every rank calls them in the same order."""

    ranks: Ranks
    host: Any = field(default=None, kw_only=True)
    """The process group for values in host memory; None: the default group."""

    @property
    def first(self) -> bool:
        """True on rank 0, the only rank that writes and prints."""
        return self.ranks.first

    def all_reduce_sum(self, values: Tensor) -> None:
        """Replace `values` (any shape, on the rank's device) by the sum over the ranks."""
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
        """Return the elementwise maximum over the ranks. The values are in host memory: no rank waits for a device."""
        if self.ranks.world == 1:
            return values
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.host)
        largest: list[int] = tensor.tolist()
        return largest

    def broadcast_from_rank0(self, value: Any) -> Any:
        """Return rank 0's `value` (any object that pickles) on every rank."""
        if self.ranks.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank."""
        if self.ranks.world == 1:
            return [value]
        values: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(values, value)
        return values

    def on_rank0(self, work: Callable[[], T]) -> T | None:
        """Call `work` on rank 0. Return its result there and None elsewhere; raise its `ConfigError` on every rank."""
        found, error = None, None
        if self.first:
            try:
                found = work()
            except ConfigError as failure:
                error = failure
        self.raise_on_all_ranks(error)
        return found

    def raise_on_all_ranks(self, error: Exception | None) -> None:
        """Raise on every rank the `error` of the lowest rank that has one, so that no rank keeps waiting."""
        for found in self.all_gather(error):
            if found is not None:
                raise found


def current_ranks() -> Ranks:
    """Return the ranks that a launcher has set for this process, or those of a single process."""
    return adopt() or Ranks()


def begin_job() -> None:
    """Start a new job. Its number is part of each key that the job's process groups have in the store.

    Call this on every rank before anything can fail, because a rank that fails before it joins must also count the job.
    """
    global _jobs, _groups
    _jobs, _groups = _jobs + 1, 0


@contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout: float) -> Iterator[Group]:
    """Open the process group of one job: NCCL on CUDA, gloo on the CPU. `timeout` is in seconds.

    A process may open several groups in turn (a sweep), in the same order on every rank. Each group has its own key
    prefix in the launcher's store, so that no group reads the keys of an earlier one.
    """
    global _base_store, _groups
    if ranks.world == 1:
        yield Group(ranks)
        return
    # Import torch._dynamo before DDP does: if it is imported while a group exists, it keeps a reference to the group.
    # The connections of a failed rank would then stay open, and the other ranks would wait for that rank.
    importlib.import_module("torch._dynamo")
    limit = timedelta(seconds=timeout)
    if _base_store is None:
        # If the user sets RANK by hand, the ranks may be in several Slurm steps, so no step's name can name the job.
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
        timeout=limit + timedelta(seconds=_EXTRA_NCCL_TIMEOUT_S) if device.type == "cuda" else limit,
        device_id=device if device.type == "cuda" else None,
    )
    store.set(f"host{ranks.rank}", platform.node())
    try:
        yield Group(ranks, host=dist.new_group(backend="gloo", timeout=limit) if device.type == "cuda" else None)
    except Stopped:
        raise  # all ranks raise this together
    except Exception as error:
        raise _first_failure(store, ranks, _name_hanging_ranks(store, ranks, error, timeout)) from error
    finally:
        # Before torch 2.8 this call keeps the interpreter lock while it waits for gloo's threads, which may need the
        # lock to free the tensors of the last collective (https://github.com/pytorch/pytorch/pull/154976).
        time.sleep(0.01)
        dist.destroy_process_group()


def _name_hanging_ranks(store: Store, ranks: Ranks, error: Exception, timeout: float) -> Exception:
    """Return `error` or, if it is a timeout, an error that names the ranks that did not answer.

    Every waiting rank times out at about the same time and sets a key in the store. A rank without a key hangs.
    """
    if not any(words in str(error).lower() for words in ("timed out", "timeout")):
        return error
    try:
        store.set(f"waited{ranks.rank}", "1")
        others, end = set(range(ranks.world)) - {ranks.rank}, time.monotonic() + _TIMEOUT_SPREAD_S
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
        f"rank {silent}{more} did not answer for {timeout:g} s (distributed.timeout) and hangs. Find out what the rank "
        "waits for (storage, a device, the network); the same command resumes from the last checkpoint."
    )
    if ranks.first:
        # Print now: the launcher reports errors only after the hanging rank has ended.
        with ignore_closed_output():
            print(f"lars-train: {named}", file=sys.stderr, flush=True)
    return named


def _agree_on_start(store: Store, ranks: Ranks, limit: timedelta) -> str:
    """Agree on a unique name for this start of the ranks, and return it on each rank.

    torchrun's store survives restarts, together with the addresses of ended processes. torchrun also counts restarts on
    each node separately (https://github.com/pytorch/pytorch/issues/108158), so its counts are not unique names. Rank 0
    therefore draws a name. Each other rank sets a greeting in the store; rank 0 answers every greeting with the name,
    even those of ended processes, and continues once each rank has confirmed the name.

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
    """Return the failure that came first on any rank, because a failing rank makes the other ranks fail."""
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


def wrap_in_ddp(
    network: Any, device: torch.device, *, bucket_mb: float = 25.0, compression: str = NONE
) -> DistributedDataParallel:
    """Wrap `network` in DDP. Gradients are means over the ranks, except within `no_sync`.

    Each gradient is a view of its bucket, so that all-reduce needs no second copy of the gradients in memory.

    Args:
        network: a module on `device`, compiled or not.
        bucket_mb: MiB of gradients per all-reduce.
        compression: with ``bf16``, each rank's gradients are rounded to bfloat16 and summed in bfloat16, which halves
            the bytes to send.
    """
    # DDP need not broadcast buffers: RunningStatistics makes them equal on all ranks. torch 2.13 renamed the argument.
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


class GradientBuckets:
    """Averages gradients over the ranks, where DDP cannot: a replayed CUDA graph calls none of DDP's hooks.

    Each gradient is a view of a bucket for good, so it must be set to zero in place. Arguments as for `wrap_in_ddp`.
    Collective: the ranks start with the parameters and buffers of rank 0, as in DDP.
    """

    def __init__(self, network: nn.Module, *, bucket_mb: float = 25.0, compression: str = NONE) -> None:
        with torch.no_grad():
            for tensor in itertools.chain(network.parameters(), network.buffers()):
                # The backends send plain memory, which may have gaps.
                sent = tensor.contiguous()
                dist.broadcast(sent, 0)
                tensor.copy_(sent)
        self._sent_as = torch.bfloat16 if compression == BF16 else None
        self._buckets: list[Tensor] = []
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for parameter in network.parameters():
            if parameter.requires_grad:
                kinds.setdefault(parameter.dtype, []).append(parameter)
        for dtype, parameters in kinds.items():
            for bucket in _in_buckets(parameters, int(bucket_mb * 2**20) // dtype.itemsize):
                self._buckets.append(_attach(bucket))

    def average(self) -> None:
        """Replace each gradient by its mean over the ranks. The host does not wait for the device. Collective."""
        world = dist.get_world_size()
        sent = [bucket if self._sent_as is None else bucket.to(self._sent_as) for bucket in self._buckets]
        for work in [dist.all_reduce(values.div_(world), async_op=True) for values in sent]:
            work.wait()
        for bucket, values in zip(self._buckets, sent, strict=True):
            if values is not bucket:
                bucket.copy_(values)


def _in_buckets(parameters: Iterable[Tensor], limit: int) -> list[list[Tensor]]:
    """Split `parameters` into lists of at most `limit` elements; a larger parameter is alone in its list."""
    buckets: list[list[Tensor]] = []
    room = 0
    for parameter in parameters:
        if not buckets or parameter.numel() > room:
            buckets.append([])
            room = limit
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets


def _attach(parameters: list[Tensor]) -> Tensor:
    """Return zeros of which the gradients of `parameters` become views, each with the strides of its parameter."""
    first = parameters[0]
    bucket = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
    start = 0
    for parameter in parameters:
        # `empty_like` has the strides of a parameter whose memory has no gaps, such as one in channels-last order.
        parameter.grad = bucket.as_strided(parameter.shape, torch.empty_like(parameter).stride(), start)
        start += parameter.numel()
    return bucket
