"""What lies between the ranks: the time an all-reduce takes, and how far their clocks are apart. Collective."""

from __future__ import annotations

import time
from statistics import median

import torch

from lars_train.preflight.facts import Clock, Exchange
from lars_train.training.distributed import Group

_ROUNDS = 9
_SHORT = 20
# What is sent first, in bytes: large enough to tell the bandwidth, and not long on any network.
_FIRST = 1 << 20
# All-reduces of the size that is measured: two to warm up with, one that tells how many follow, and two that count.
_LEAST_ROUNDS = 5


def exchange(group: Group, device: torch.device, count: int, seconds: float, most: float) -> Exchange | None:
    """All-reduces of `count` bytes for about `seconds`, all of them in one piece; None where there is one rank.

    Where they would take longer than `most` seconds, fewer bytes are sent, and the time of all is in proportion.
    """
    if group.ranks.world == 1:
        return None
    values = torch.zeros(max(1, count // 4), device=device)
    one, first = torch.zeros(1, device=device), values[: _FIRST // 4]
    _timed(group, first, 2)
    each = _timed(group, first, 1) / first.nbytes
    # The first rank's word, for all have to do the same, and equally often.
    some = values[: group.broadcast_from_rank0(max(first.nbytes, int(most / _LEAST_ROUNDS / max(each, 1e-12)))) // 4]
    _timed(group, some, 2)
    rounds = group.broadcast_from_rank0(max(2, min(200, int(min(seconds, most) / max(_timed(group, some, 1), 1e-6)))))
    took = _timed(group, some, rounds) / rounds
    _timed(group, one, 2)
    latency = _timed(group, one, _SHORT) / _SHORT
    return Exchange(values.nbytes, took * values.nbytes / some.nbytes, latency, some.nbytes)


def _timed(group: Group, values: torch.Tensor, rounds: int) -> float:
    group.all_reduce_max([0])
    started = time.perf_counter()
    for _ in range(rounds):
        group.all_reduce_sum(values)
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    return time.perf_counter() - started


def clocks(group: Group) -> tuple[Clock, ...]:
    """Each rank's clock against the first rank's, the median of a few readings that all make at the same time.

    `error`: what the ranks' meetings before the readings took, for that is how far apart they may be.
    """
    readings: list[list[tuple[float, float]]] = []
    for _ in range(_ROUNDS):
        group.all_reduce_max([0])
        started = time.perf_counter()
        group.all_reduce_max([0])
        now = time.time()
        readings.append(group.all_gather((now, time.perf_counter() - started)))
    return offsets(readings)


def offsets(readings: list[list[tuple[float, float]]]) -> tuple[Clock, ...]:
    """Of each rank, from rounds of readings: for each rank, what its clock showed, and what its meeting took."""
    found = []
    for rank in range(len(readings[0])):
        ahead = median(one[rank][0] - one[0][0] for one in readings)
        found.append(Clock(ahead, median(max(one[rank][1], one[0][1]) for one in readings)))
    return tuple(found)
