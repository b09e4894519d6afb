"""Compares the update time that a plan foretells with that of real runs of one and two processes on this CPU.

    python scripts/verify/check_plan.py [--rounds 5] [--updates 5] [--write]
    python scripts/verify/check_plan.py --cpu [--write]  # images/s of ResNet-50 on one thread: the table's row for CPUs

As many processes as the run has hold two things: the run itself (loader, gradients, all-reduce, LARS, log lines: what
``mode=train`` does), and a bare loop that measures what a plan wants to know: images/s forward and backward, seconds of
the optimizer's step, images/s of the loader, seconds of a small and a large all-reduce by gloo. The two take turns, a
block of each in every round, so that what else the machine does slows both. The bare loop waits for the slowest process
after each two micro-batches; the run has up to four of them in an update.

Each round gives a planned and a measured time of an update, by the clock and in CPU time (where neighbours on the
machine do not count), and so an error. Printed are medians, and the least and greatest error. Says nothing of GPUs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from child import end_on_signals, ranks_end
from hydra import compose, initialize_config_dir
from page import between_markers, check_page, cpu_name
from torch.nn import functional as F

from lars_train.config import Config, config_dir, register, resolve
from lars_train.config.arguments import prepare_arguments
from lars_train.launch import start_processes
from lars_train.preflight.time_model import Machine, update_seconds
from lars_train.training.assemble import build_optimizer, make_network
from lars_train.training.device_prefetch import DevicePrefetcher
from lars_train.training.distributed import Group, current_ranks, process_group
from lars_train.training.prepare import prepare
from lars_train.training.run import Run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
SMALL, LARGE, REDUCTIONS = 1024, 1 << 24, 5
# Between two waits for the other process.
MICRO_BATCHES = 2
WARM_UP = 3
# What is trained: one network in which nearly all is computing, and one whose gradients and step take their time.
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
class Took:
    """Seconds: by the clock, and of CPU time, the mean over the processes."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Round:
    """Of one update: planned and measured."""

    planned: Took
    measured: Took
    parts: dict[str, float]
    """The plan's parts by the clock."""


class Bare:
    """What a plan asks of a machine, measured without the run's code around it."""

    def __init__(self, run: Run, pictures: DevicePrefetcher) -> None:
        config, self.run, self.pictures = run.config, run, pictures
        self.network = make_network(config, config.data.num_classes or 0).to(memory_format=torch.channels_last).train()
        self.optimizer = build_optimizer(config.optimizer, self.network)
        self.normalize = run.context.normalize
        first = next(pictures)
        self.images, self.labels = first.images.clone(), first.labels.clone()
        self.samples = run.resolved.micro_batch
        self.buffers = {size: torch.zeros(size // 4) for size in (SMALL, LARGE)}

    def measure(self, updates: int) -> tuple[Took, dict[str, float]]:
        """An update's time as planned from it, and the parts of that by the clock."""
        group, world = self.run.group, self.run.group.ranks.world
        samples = MICRO_BATCHES * self.samples
        images = self._timed(self._forward_backward, updates)
        step = self._timed(self._step, updates, prepare=self._one_pass)
        read = self._timed(lambda: next(self.pictures), updates * MICRO_BATCHES)
        small, large = (
            self._timed(functools.partial(group.all_reduce_sum, self.buffers[size]), REDUCTIONS)
            for size in (SMALL, LARGE)
        )
        planned = {}
        for clock in ("wall", "cpu"):
            one = {
                k: getattr(v, clock) for k, v in (("i", images), ("s", step), ("r", read), ("a", small), ("b", large))
            }
            # Gloo sums by a ring: at two ranks, two messages and the bytes once.
            bandwidth = (LARGE - SMALL) / max(one["b"] - one["a"], 1e-9)
            machine = Machine(
                samples / one["i"], self.samples / one["r"], one["a"] / 2, bandwidth, 0.0, "ring", one["s"], reads=True
            )
            planned[clock] = update_seconds(
                machine,
                world,
                samples=self.run.plan.global_batch // world,
                last=self.samples,
                size=4 * sum(p.numel() for p in self.network.parameters()),
            )
        parts = {name: getattr(planned["wall"], name) for name in ("compute", "input", "network")}
        return Took(planned["wall"].seconds, planned["cpu"].seconds), parts

    def _forward_backward(self) -> None:
        for _ in range(MICRO_BATCHES):
            self._one_pass()

    def _one_pass(self) -> None:
        logits = self.network(self.normalize(self.images))
        torch.autograd.backward(F.cross_entropy(logits, self.labels, reduction="sum") / self.samples)

    def _step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _timed(self, work: Callable[[], object], times: int, prepare: Callable[[], object] | None = None) -> Took:
        """One of `times`, each of which all processes begin and end together."""
        wall = cpu = 0.0
        for _ in range(times):
            if prepare is not None:
                prepare()
            found = timed(self.run.group, work)
            wall, cpu = wall + found.wall, cpu + found.cpu
        self.optimizer.zero_grad(set_to_none=True)
        return Took(wall / times, cpu / times)


def timed(group: Group, work: Callable[[], object]) -> Took:
    """What `work` takes, until the last process is done with it. Collective."""
    group.all_reduce_max([0])
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    cpu = time.process_time() - cpu
    group.all_reduce_max([0])
    wall = time.perf_counter() - wall
    return Took(wall, statistics.mean(group.all_gather(cpu)))


def rounds_of(config: Config, rounds: int, updates: int) -> list[Round]:
    """On one process among those of the run. Collective."""
    prepared, ranks, device = prepare(config), current_ranks(), torch.device("cpu")
    torch.set_num_threads(1)
    prepared.directory.mkdir(parents=True, exist_ok=True)
    found = []
    with process_group(ranks, device, 600.0) as group:
        run = Run(prepared, group, device)
        with closing(run._batches()) as batches, closing(run._batches()) as pictures:
            bare = Bare(run, pictures)
            run.begin()

            def block(count: int) -> Took:
                def work() -> None:
                    for _ in range(count):
                        run._one_update(batches)

                whole = timed(group, work)
                return Took(whole.wall / count, whole.cpu / count)

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


def composed(directory: Path, settings: Sequence[str], updates: int) -> Config:
    """The config of a run in `directory`."""
    register()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        keys = [*SETTINGS, *settings, f"log_every={updates}", f"run.dir={directory}"]
        return resolve(compose("config", prepare_arguments(keys, None)))


def told(case: str, world: int, found: list[Round]) -> str:
    """A row of the table."""

    def middle(values: Iterator[float]) -> float:
        return statistics.median(values)

    cells = [case, str(world)]
    for clock in ("wall", "cpu"):
        planned, measured = ([getattr(getattr(r, side), clock) for r in found] for side in ("planned", "measured"))
        errors = [100 * (p / m - 1) for p, m in zip(planned, measured, strict=True)]
        cells.append(f"{statistics.median(planned):.3f}, {statistics.median(measured):.3f}")
        cells.append(f"{statistics.median(errors):+.0f} ({min(errors):+.0f} to {max(errors):+.0f})")
    parts = ", ".join(f"{middle(r.parts[name] for r in found):.3f}" for name in ("compute", "input", "network"))
    return f"| {' | '.join([*cells[:2], parts, *cells[2:]])} |"


def compared(rounds: int, updates: int) -> list[str]:
    """The table in words."""
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for (case, settings), world in itertools.product(CASES.items(), (1, 2)):
            config = composed(Path(folder) / f"{len(rows)}", settings.split(), updates)
            with ranks_end():
                found: list[Round] = start_processes(rounds_of, (config, rounds, updates), world)
            rows.append(told(case, world, found))
            print(rows[-1], flush=True)
    return [
        f"{where()}; {rounds} rounds of {updates} updates (`scripts/verify/check_plan.py --rounds {rounds} --updates "
        f"{updates}`). Seconds of an update, medians; errors in %: median (least to greatest of the rounds).",
        "",
        "| run | processes | planned: compute, input, network | by the clock: planned, measured | error, % | CPU time: "
        "planned, measured | error, % |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def cpu_rate() -> list[str]:
    """Images/s of ResNet-50 at 224 pixels on one thread, forward, backward and step, in words."""
    settings = "model=resnet50 data.image_size=224 data.num_classes=1000 batch.size=16 micro_batch=16".split()
    with tempfile.TemporaryDirectory() as folder:
        config = composed(Path(folder), [*settings, "model.ghost_batch=16"], 1)
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
        f"time ({min(rates):.2f} to {max(rates):.2f} in {len(rates)} updates of 16); {where()} "
        "(`scripts/verify/check_plan.py --cpu`)."
    ]


def where() -> str:
    """The machine and the versions."""
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, plan, run and compare, for one process and for two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of a block of the run and one of the loop (default: 5)")
    parser.add_argument("--updates", type=int, default=5, help="in a block (default: 5)")
    parser.add_argument("--cpu", action="store_true", help="measure ResNet-50 on one thread instead")
    parser.add_argument("--write", action="store_true", help="also into docs/plan.md")
    args = parser.parse_args(argv)
    if args.rounds < 2 or args.updates < 1:
        parser.error("--rounds wants at least 2, --updates at least 1")
    name = "check_plan_cpu" if args.cpu else "check_plan"
    if args.write:
        try:
            check_page(PAGE, name)
        except ValueError as error:
            parser.error(f"argument --write: {error}")
    lines = cpu_rate() if args.cpu else compared(args.rounds, args.updates)
    print("\n".join(lines))
    if args.write:
        PAGE.write_text(between_markers(PAGE.read_text(), name, [*lines, ""]))


if __name__ == "__main__":
    end_on_signals()
    main()
