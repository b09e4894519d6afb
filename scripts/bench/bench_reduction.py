"""What the exchange of gradients costs two processes: their updates with it, beside the same work without it.

    python scripts/bench/bench_reduction.py [--write docs/performance.md]  # ResNet-50 at 224 and a small ResNet at 32

Two processes of one thread each, pinned to a core each, joined by gloo. In turn both make updates of the trainer as two
ranks, which sum their gradients once an update, behind the last micro-batch's backward pass; and updates of the same
micro-batches, each for itself. What counts is wall time, that of the slower of the two. Every rank sends each gradient
byte about once (tests/training/test_reduction.py counts them).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import torch.distributed as dist
from arguments import count, seconds
from bench_step import CASES, CPU, MEAN, STD, Case, network, options, pixels, precision
from child import end_on_signals, ranks_end
from page import between_markers, command_line, cpu_name, writable_page

from lars_train.config import Config, ScheduleConfig
from lars_train.data.loading.loader import Batch
from lars_train.launch import Ranks, start_processes
from lars_train.plan import Plan, make_schedule
from lars_train.training.assemble import build_optimizer
from lars_train.training.device_prefetch import RankContext, normalizer
from lars_train.training.distributed import Group, process_group
from lars_train.training.trainer import Hyper, Trainer

WORLD = 2
TIMEOUT = 600.0


def trainer(case: Case, group: Group, micro_batches: int) -> Trainer:
    """As a run makes it, for `micro_batches` of `case.images` on each rank, one ghost batch each."""
    kind, settings, world = precision(), options(), group.ranks.world
    batch = world * micro_batches * case.images
    plan = Plan(
        samples=batch,
        nominal_batch=batch,
        global_batch=batch,
        ghost_batch=case.images,
        scaled=False,
        raised=False,
        epochs=1_000_000,
        updates_per_epoch=1,
        updates=1_000_000,
        stop=1_000_000,
        warmup_updates=0,
    )
    model = network(case, case.images).to(memory_format=torch.channels_last).train()
    schedule = make_schedule(plan, Config(optimizer=settings, schedule=ScheduleConfig(power=2.0, form="whole")))
    return Trainer(
        model,
        build_optimizer(settings, model),
        plan,
        Hyper(schedule, 0.0),
        RankContext(CPU, group, kind, normalizer(MEAN, STD, CPU, kind)),
    )


def times(case: Case, micro_batches: int, rounds: int, seconds: float) -> list[tuple[float, float]]:
    """One rank's part; of rank 0, in each round, the seconds of an update with and without the exchange."""
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    images, labels = pixels(case)

    def updates(of: Trainer) -> Callable[[], None]:
        def step() -> None:
            of.run_update(iter([Batch(images, labels, ())] * micro_batches), micro_batches, measure=False)

        return step

    with process_group(Ranks(rank, WORLD, rank, WORLD), CPU, TIMEOUT) as group:
        together = updates(trainer(case, group, micro_batches))
        alone = updates(trainer(case, Group(Ranks()), micro_batches))
        for warm_up in (together, alone, together, alone):
            warm_up()
        started = time.perf_counter()
        together()
        count = max(1, round(slowest(seconds / (time.perf_counter() - started))))
        return [(timed(together, count), timed(alone, count)) for _ in range(rounds)]


def timed(step: Callable[[], None], count: int) -> float:
    """Seconds of one of `count` steps that all ranks begin at once, on the slower rank. Collective."""
    dist.barrier()
    started = time.perf_counter()
    for _ in range(count):
        step()
    return slowest((time.perf_counter() - started) / count)


def slowest(value: float) -> float:
    """The largest of the ranks' values. Collective."""
    values = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return float(values)


def line(case: Case, micro_batches: int, found: list[tuple[float, float]]) -> str:
    """A row of the table."""
    together, alone = np.array(found).T
    ratios = together / alone
    low, high = np.percentile(ratios, [10, 90])
    cells = [
        f"{case.name}, {case.size} x {case.size}",
        f"{micro_batches} x {case.images}",
        f"{np.median(together):.3f}",
        f"{np.median(alone):.3f}",
        f"{np.median(ratios):.3f} ({low:.3f} to {high:.3f})",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=count, default=9, help="(9)")
    parser.add_argument("--seconds", type=seconds, default=5.0, help="of each turn, one update at least (5)")
    parser.add_argument("--accumulation", type=count, default=4, help="micro-batches of each rank in an update (4)")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="one network alone")
    parser.add_argument("--images", type=count, help="in a micro-batch")
    parser.add_argument("--size", type=count, help="their side in pixels")
    parser.add_argument(
        "--write",
        type=writable_page("bench_reduction"),
        metavar="PAGE",
        help="put the table between the page's markers",
    )
    args = parser.parse_args()
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < WORLD:
        parser.error("two cores are wanted, and a system that pins processes to them")
    lines = [
        f"`{command_line(__file__)}` on {cpu_name()}, {WORLD} processes of one thread on a core each, gloo, "
        f"{precision().name}; Python {platform.python_version()}, torch {torch.__version__}. {args.rounds} rounds; the "
        "ratio is the median over the rounds (10th to 90th percentile).",
        "",
        "| | micro-batches of a rank | an update, s | without exchange, s | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for case in CASES:
        if args.case not in (None, case.name):
            continue
        case = replace(case, images=args.images or case.images, size=args.size or case.size)
        # The module's own name, not __main__, for the processes to find it.
        from bench_reduction import times as of_a_rank

        with ranks_end():
            found = start_processes(of_a_rank, (case, args.accumulation, args.rounds, args.seconds), WORLD)
        lines.append(line(case, args.accumulation, found))
    print("\n".join(lines))
    if args.write:
        args.write.write_text(between_markers(args.write.read_text(), "bench_reduction", lines))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    end_on_signals()
    main()
