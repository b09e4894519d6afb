"""Time the gradient all-reduce between two processes: updates with it, compared with the same work without.

    python scripts/bench/bench_reduction.py [--write docs/performance.md]  # ResNet-50 at 224 and a small ResNet at 32

Two processes with one thread each, on separate cores, communicate by gloo. They alternate between updates as two ranks,
which sum their gradients once per update, after the backward pass of the last micro-batch; and updates of the same
micro-batches without communication. The wall time of the slower process counts. Each rank sends about one copy of its
gradients (tests/training/test_reduction.py counts the bytes).

Takes about eight minutes. Figures: docs/performance.md.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "bench_reduction")
    PARSER.add_argument("--rounds", type=shared.positive_int, default=9, help="(9)")
    PARSER.add_argument("--seconds", type=shared.seconds, default=5.0, help="per turn, at least one update (5)")
    PARSER.add_argument("--accumulation", type=shared.positive_int, default=4, help="micro-batches per rank (4)")
    PARSER.add_argument("--case", choices=("resnet50", "small"), help="only this network")
    PARSER.add_argument("--images", type=shared.positive_int, help="per micro-batch")
    PARSER.add_argument("--size", type=shared.positive_int, help="side of an image in pixels")
    ARGS = PARSER.parse_args()

import numpy as np
import torch
import torch.distributed as dist
from training_steps import CASES, CPU, Case, make_trainer, pixels, precision

from lars_train.data.loading.loader import Batch
from lars_train.launch import Ranks, start_processes
from lars_train.training.distributed import Group, process_group
from lars_train.training.trainer import Trainer

WORLD = 2
TIMEOUT_S = 600.0


def times_of_rank(case: Case, micro_batches: int, rounds: int, seconds: float) -> list[tuple[float, float]]:
    """Run one rank; return the seconds of an update with and without all-reduce, by round."""
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    images, labels = pixels(case)

    def updates(trainer: Trainer) -> Callable[[], None]:
        def step() -> None:
            trainer.run_update(iter([Batch(images, labels, ())] * micro_batches), micro_batches, measure=False)

        return step

    with process_group(Ranks(rank, WORLD, rank, WORLD), CPU, TIMEOUT_S) as group:
        together, alone = (
            updates(make_trainer(case, case.images, precision(), group=joined, micro_batches=micro_batches))
            for joined in (group, Group(Ranks()))
        )
        for warm_up in (together, alone, together, alone):
            warm_up()
        started = time.perf_counter()
        together()
        count = max(1, round(slowest(seconds / (time.perf_counter() - started))))
        return [(timed(together, count), timed(alone, count)) for _ in range(rounds)]


def timed(step: Callable[[], None], count: int) -> float:
    """Return the seconds of one of `count` steps on the slower rank; all ranks start together. Collective."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(count):
        step()
    return slowest((time.perf_counter() - started) / count)


def slowest(value: float) -> float:
    """Return the largest value of all ranks. Collective."""
    values = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return float(values)


def row(case: Case, micro_batches: int, found: list[tuple[float, float]]) -> str:
    """Return a row of the table."""
    together, alone = np.array(found).T
    low, middle, high = np.percentile(together / alone, [10, 50, 90])
    return (
        f"| {case.name}, {case.size} x {case.size} | {micro_batches} x {case.images} | {np.median(together):.3f} | "
        f"{np.median(alone):.3f} | {middle:.3f} ({low:.3f} to {high:.3f}) |"
    )


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < WORLD:
        parser.error(f"needs {WORLD} cores, and a system that can pin processes to them")
    lines = [
        f"`{shared.command_line(__file__)}` on {shared.cpu_name()}, {WORLD} processes of one thread on a core each, "
        f"gloo, {precision().name}; {shared.software()}. {args.rounds} rounds; the ratio is the median over the rounds "
        "(10th to 90th percentile).",
        "",
        "| | micro-batches of a rank | an update, s | without exchange, s | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for case in CASES:
        if args.case in (None, case.name):
            case = replace(case, images=args.images or case.images, size=args.size or case.size)
            with shared.exit_with_ranks():
                found = start_processes(times_of_rank, (case, args.accumulation, args.rounds, args.seconds), WORLD)
            lines.append(row(case, args.accumulation, found))
    shared.publish(lines, args.write, "bench_reduction")


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
