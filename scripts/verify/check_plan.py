"""Compare the update time that a plan predicts with real runs of one and of two processes on this CPU.

    python scripts/verify/check_plan.py [--rounds 5] [--updates 5] [--write docs/benchmarks.md]
    python scripts/verify/check_plan.py --cpu [--write docs/benchmarks.md]   # the plan's row for CPUs

Each process contains the run itself (loader, gradients, all-reduce, LARS, log lines) and a bare loop. The loop measures
the inputs of a plan: images/s of forward and backward, seconds of the optimizer's step, images/s of the loader, and
seconds of a small and a large all-reduce by gloo. Run and loop take turns in blocks, so that other work on the machine
slows both. The loop waits for the slowest process after every two micro-batches; the run has up to four per update.

Each round gives a planned and a measured time of an update, hence an error, for wall time and for CPU time (which
excludes other processes). The table shows medians, and the smallest and largest error. It does not apply to GPUs.

Takes about ten minutes. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__)
    PARSER.add_argument("--rounds", type=shared.positive_int, default=5, help="at least 2 (5)")
    PARSER.add_argument("--updates", type=shared.positive_int, default=5, help="per block (5)")
    PARSER.add_argument("--cpu", action="store_true", help="instead, measure ResNet-50 on one thread")
    PARSER.add_argument("--write", type=Path, metavar="PAGE", help="put the results between the page's markers")
    ARGS = PARSER.parse_args()

import torch
from torch.nn import functional as F

from lars_train.config import Config
from lars_train.launch import start_processes
from lars_train.preflight.time_model import Machine, update_seconds
from lars_train.training.assemble import build_optimizer, make_network
from lars_train.training.device_prefetch import DevicePrefetcher
from lars_train.training.distributed import Group, current_ranks, process_group
from lars_train.training.prepare import prepare
from lars_train.training.run import Run

SMALL, LARGE, REDUCTIONS = 1024, 1 << 24, 5
MICRO_BATCHES = 2  # between waits for the other process
WARM_UP = 3
# A network that mostly computes, and one with expensive gradients and optimizer steps.
CASES = {
    "small at 32 pixels, 128 images an update": "model=small batch.size=128 micro_batch=32 model.ghost_batch=32",
    "resnet18 at 32 pixels, 32 images an update": "model=resnet18 batch.size=32 micro_batch=8 model.ghost_batch=8",
}
SETTINGS = (
    "data=synthetic data.image_size=32 data.num_classes=10 data.val_count=8 data.train_count=262144 batch.scaled=false "
    "optimizer=lars optimizer.lr=1 schedule.warmup_epochs=0 epochs=1 precision=fp32 device=cpu launch.threads=1 "
    "checkpoint.every_minutes=null verbosity=0"
).split()


@dataclass(frozen=True)
class Seconds:
    """Wall time, and CPU time averaged over the processes."""

    wall: float
    cpu: float

    def __truediv__(self, count: int) -> Seconds:
        return Seconds(self.wall / count, self.cpu / count)


@dataclass(frozen=True)
class Round:
    """The planned and measured time of an update; `parts` of the planned wall time."""

    planned: Seconds
    measured: Seconds
    parts: dict[str, float]


class BareLoop:
    """A loop that measures the inputs of a plan, without the code of a run."""

    def __init__(self, run: Run, batches: DevicePrefetcher) -> None:
        config, self.run, self.batches = run.config, run, batches
        self.network = make_network(config, config.data.num_classes or 0).to(memory_format=torch.channels_last).train()
        self.optimizer = build_optimizer(config.optimizer, self.network)
        self.normalize = run.context.normalize
        first = next(batches)
        self.images, self.labels = first.images.clone(), first.labels.clone()
        self.samples = run.resolved.micro_batch
        self.buffers = {size: torch.zeros(size // 4) for size in (SMALL, LARGE)}

    def measure(self, updates: int) -> tuple[Seconds, dict[str, float]]:
        """Measure the inputs; return the planned time of an update, and its parts in wall time."""
        group, world = self.run.group, self.run.group.ranks.world
        images = self._timed(self._forward_backward, updates)
        step = self._timed(self._step, updates, prepare=self._one_pass)
        read = self._timed(lambda: next(self.batches), updates * MICRO_BATCHES)
        small, large = (
            self._timed(functools.partial(group.all_reduce_sum, self.buffers[size]), REDUCTIONS)
            for size in (SMALL, LARGE)
        )
        size = 4 * sum(p.numel() for p in self.network.parameters())

        def plan(images: float, step: float, read: float, small: float, large: float) -> tuple[float, dict[str, float]]:
            # Gloo sums in a ring: two ranks exchange two messages, and send the bytes once.
            bandwidth, rate = (LARGE - SMALL) / max(large - small, 1e-9), MICRO_BATCHES * self.samples / images
            machine = Machine(rate, self.samples / read, small / 2, bandwidth, 0.0, "ring", step, reads=True)
            samples = self.run.plan.global_batch // world
            found = update_seconds(machine, world, samples=samples, last=self.samples, size=size)
            return found.seconds, {name: getattr(found, name) for name in ("compute", "input", "network")}

        measured = (images, step, read, small, large)
        wall, parts = plan(*(one.wall for one in measured))
        cpu, _ = plan(*(one.cpu for one in measured))
        return Seconds(wall, cpu), parts

    def _forward_backward(self) -> None:
        for _ in range(MICRO_BATCHES):
            self._one_pass()

    def _one_pass(self) -> None:
        logits = self.network(self.normalize(self.images))
        torch.autograd.backward(F.cross_entropy(logits, self.labels, reduction="sum") / self.samples)

    def _step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _timed(self, work: Callable[[], object], times: int, prepare: Callable[[], object] | None = None) -> Seconds:
        """Return the mean time of a call; all processes begin and end each call together."""
        wall = cpu = 0.0
        for _ in range(times):
            if prepare is not None:
                prepare()
            found = timed(self.run.group, work)
            wall, cpu = wall + found.wall, cpu + found.cpu
        self.optimizer.zero_grad(set_to_none=True)
        return Seconds(wall, cpu) / times


def timed(group: Group, work: Callable[[], object]) -> Seconds:
    """Return the time of `work` until the last process finishes. Collective."""
    group.all_reduce_max([0])
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    cpu = time.process_time() - cpu
    group.all_reduce_max([0])
    wall = time.perf_counter() - wall
    return Seconds(wall, statistics.mean(group.all_gather(cpu)))


def measure_rounds(config: Config, rounds: int, updates: int) -> list[Round]:
    """Run one process: return the rounds. Collective."""
    prepared, ranks, device = prepare(config), current_ranks(), torch.device("cpu")
    torch.set_num_threads(1)
    prepared.directory.mkdir(parents=True, exist_ok=True)
    found = []
    with process_group(ranks, device, 600.0) as group:
        run = Run(prepared, group, device)
        with closing(run._batches()) as batches, closing(run._batches()) as others:
            bare = BareLoop(run, others)
            run.begin()

            def block(count: int) -> Seconds:
                def work() -> None:
                    for _ in range(count):
                        run._one_update(batches)

                return timed(group, work) / count

            block(max(WARM_UP, updates))
            bare.measure(WARM_UP)
            for number in range(rounds):
                if number % 2:
                    (planned, parts), measured = bare.measure(updates), block(updates)
                else:
                    measured, (planned, parts) = block(updates), bare.measure(updates)
                found.append(Round(planned, measured, parts))
        run.close()
    return found


def make_config(directory: Path, settings: Sequence[str], updates: int) -> Config:
    """Return the config of a run in `directory`."""
    return shared.compose_config([*SETTINGS, *settings, f"log_every={updates}", f"run.dir={directory}"])


def row(case: str, world: int, found: list[Round]) -> str:
    """Return a row of the table."""
    parts = (f"{statistics.median(r.parts[name] for r in found):.3f}" for name in ("compute", "input", "network"))
    cells = [case, str(world), ", ".join(parts)]
    for clock in ("wall", "cpu"):
        planned, measured = ([getattr(getattr(r, side), clock) for r in found] for side in ("planned", "measured"))
        errors = [100 * (p / m - 1) for p, m in zip(planned, measured, strict=True)]
        cells.append(f"{statistics.median(planned):.3f}, {statistics.median(measured):.3f}")
        cells.append(f"{statistics.median(errors):+.0f} ({min(errors):+.0f} to {max(errors):+.0f})")
    return f"| {' | '.join(cells)} |"


def compare(rounds: int, updates: int) -> list[str]:
    """Return the table of all cases, on one process and on two."""
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for (case, settings), world in itertools.product(CASES.items(), (1, 2)):
            config = make_config(Path(folder) / f"{len(rows)}", settings.split(), updates)
            with shared.exit_with_ranks():
                found: list[Round] = start_processes(measure_rounds, (config, rounds, updates), world)
            rows.append(row(case, world, found))
            print(rows[-1], file=sys.stderr, flush=True)
    return [
        f"{machine()}; {rounds} rounds of {updates} updates (`scripts/verify/check_plan.py --rounds {rounds} --updates "
        f"{updates}`). Seconds of an update, medians; errors in %: median (least to greatest of the rounds).",
        "",
        "| run | processes | planned: compute, input, network | by the clock: planned, measured | error, % | CPU time: "
        "planned, measured | error, % |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def measure_cpu() -> list[str]:
    """Measure images/s of ResNet-50 at 224 pixels on one thread: forward, backward and step."""
    settings = "model=resnet50 data.image_size=224 data.num_classes=1000 batch.size=16 micro_batch=16".split()
    config = make_config(Path("unused"), [*settings, "model.ghost_batch=16"], 1)
    torch.set_num_threads(1)
    network = make_network(config, 1000).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(config.optimizer, network)
    images = torch.rand(16, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    labels, rates = torch.arange(16), []
    for _ in range(4):
        started = time.process_time()
        torch.autograd.backward(F.cross_entropy(network(images), labels))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rates.append(16 / (time.process_time() - started))
    rates = rates[1:]
    return [
        f"ResNet-50 at 224 pixels in float32 on one thread: {statistics.median(rates):.2f} images per second of CPU "
        f"time ({min(rates):.2f} to {max(rates):.2f} in {len(rates)} updates of 16); {machine()} "
        "(`scripts/verify/check_plan.py --cpu`)."
    ]


def machine() -> str:
    """Return the machine and the versions."""
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end"
    return f"{shared.cpu_name()}, {load}, {shared.software()}"


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    marker = "check_plan_cpu" if args.cpu else "check_plan"
    shared.require_page(parser, args.write, marker)
    shared.publish(measure_cpu() if args.cpu else compare(args.rounds, args.updates), args.write, marker)


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
