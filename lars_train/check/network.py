"""What lies between the ranks: the time an all-reduce takes, and how far their clocks are apart. Collective."""

from __future__ import annotations

import time
from statistics import median

import torch

from lars_train.check.facts import Clock, Exchange
from lars_train.training.distributed import Group

_ROUNDS = 9
_SHORT = 20


def exchange(group: Group, device: torch.device, count: int, seconds: float) -> Exchange | None:
    """All-reduces of `count` bytes for about `seconds`, all of them in one piece; None where there is one rank."""
    if group.ranks.world == 1:
        return None
    values = torch.zeros(max(1, count // 4), device=device)
    one = torch.zeros(1, device=device)
    _timed(group, values, 2)
    # The first rank's word, for all have to do it equally often.
    rounds = group.from_first(max(2, min(200, int(seconds / max(_timed(group, values, 1), 1e-6)))))
    took = _timed(group, values, rounds) / rounds
    _timed(group, one, 2)
    return Exchange(values.nbytes, took, _timed(group, one, _SHORT) / _SHORT)


def _timed(group: Group, values: torch.Tensor, rounds: int) -> float:
    group.highest([0])
    started = time.perf_counter()
    for _ in range(rounds):
        group.sum(values)
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
    return time.perf_counter() - started


def clocks(group: Group) -> tuple[Clock, ...]:
    """Each rank's clock against the first rank's, the median of a few readings that all make at the same time.

    `error`: what the ranks' meetings before the readings took, for that is how far apart they may be.
    """
    readings: list[list[tuple[float, float]]] = []
    for _ in range(_ROUNDS):
        group.highest([0])
        started = time.perf_counter()
        group.highest([0])
        now = time.time()
        readings.append(group.gather((now, time.perf_counter() - started)))
    return offsets(readings)


def offsets(readings: list[list[tuple[float, float]]]) -> tuple[Clock, ...]:
    """Of each rank, from rounds of readings: for each rank, what its clock showed, and what its meeting took."""
    found = []
    for rank in range(len(readings[0])):
        ahead = median(one[rank][0] - one[0][0] for one in readings)
        found.append(Clock(ahead, median(max(one[rank][1], one[0][1]) for one in readings)))
    return tuple(found)
