"""Measure how rounding separates runs that differ only in world size, micro-batch and loader workers.

    python scripts/verify/measure_float32_bound.py [--write docs/benchmarks.md]
    python scripts/verify/measure_float32_bound.py --precision fp64           # nearly without rounding

Each run is a complete lars-train run on the CPU: synthetic images, random crops and flips, a ResNet of 8 layers with
batch norm, LARS over SGD with momentum, warm-up, and 7 ghost batches of 4 samples per update, unevenly distributed over
the ranks. The reference is the run of the same seed and precision on one process, one ghost batch at a time, without
loader workers. The processes are started once, as many as the largest world size, and used for all runs.

Takes about three minutes on two cores. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "measure_float32_bound")
    PARSER.add_argument("--precision", nargs="+", choices=["fp32", "fp64"], default=["fp32"])
    PARSER.add_argument("--world", nargs="+", type=shared.positive_int, default=[1, 2, 3, 4], help="sizes, at most 7")
    PARSER.add_argument("--seeds", type=shared.positive_int, default=10, help="number of seeds, from 0 (10)")
    ARGS = PARSER.parse_args()

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lars_train.config import Config, resolve
from lars_train.errors import Stopped
from lars_train.launch import Ranks, start_processes
from lars_train.training import checkpoint, session
from lars_train.training.distributed import begin_job
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation

GHOST_BATCH, GHOSTS, UPDATES_PER_EPOCH = 4, 7, 5
GLOBAL_BATCH, MICRO_BATCHES, EPOCHS = GHOST_BATCH * GHOSTS, (4, 8, 28), 4
# An epoch uses all training images but three. One evaluation and one checkpoint, at the end.
SETTINGS = OmegaConf.from_dotlist(
    (
        f"data.name=synthetic data.train_count={UPDATES_PER_EPOCH * GLOBAL_BATCH + 3} data.val_count=5 "
        "data.image_size=12 data.num_classes=4 data.augment=inception data.eval_crop=1.0 label_smoothing=0.1 "
        f"model.name=small model.ghost_batch={GHOST_BATCH} batch.size={GLOBAL_BATCH} epochs={EPOCHS} "
        "recipe.rows.32k={} optimizer.name=lars optimizer.lr=1.0 optimizer.momentum=0.9 optimizer.trust_coef=0.01 "
        "optimizer.weight_decay=0.001 schedule.warmup_epochs=1.0 launch.threads=1 device=cpu log_every=1 "
        "evaluate.every_epochs=1000000 checkpoint.every_updates=1000000 checkpoint.every_minutes=null"
    ).split()
)


@dataclass(frozen=True)
class Case:
    """A run; `micro_batch` is in samples, `workers` is per rank."""

    precision: str
    seed: int
    world: int
    micro_batch: int
    workers: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.precision}-seed{self.seed}-world{self.world}-micro{self.micro_batch}-workers{self.workers}"

    @property
    def reference(self) -> Case:
        """The reference of the run."""
        return Case(self.precision, self.seed, 1, GHOST_BATCH, 0)


@dataclass(frozen=True)
class Distance:
    """Relative differences between a run and its reference.

    `losses`: of each update's mean loss. `weights` and `statistics` (running means and variances of batch norm): the
    largest over the tensors of |a - b| / |b|, with Euclidean norms in float64.
    """

    losses: list[float]
    weights: float
    statistics: float


def train_all(folder: str, cases: list[Case]) -> None:
    """Train every run in which this process has a rank. Successive runs overlap if they share no process."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for number, case in enumerate(cases):
        begin_job()
        # Alternate between the lowest and the highest processes.
        place = rank - (processes - case.world) * (number % 2)
        if 0 <= place < case.world:
            train(Path(folder) / case.name, case, Ranks(place, case.world, place, case.world))


def train(directory: Path, case: Case, ranks: Ranks) -> None:
    """Train one rank of a run."""
    own = f"seed={case.seed} micro_batch={case.micro_batch} precision.name={case.precision} data.workers={case.workers}"
    settings = OmegaConf.from_dotlist([*own.split(), f"run.dir={directory}"])
    raw = OmegaConf.merge(OmegaConf.structured(Config), SETTINGS, settings)
    assert isinstance(raw, DictConfig)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        session.train(prepare(resolve(raw)), ranks, Invocation())


def compare(folder: Path, case: Case) -> Distance:
    """Compare a run with its reference, from their run directories."""
    (losses, state), (expected_losses, expected) = (outcome(folder / c.name) for c in (case, case.reference))
    statistics = {name for name in expected if "running" in name}
    weights = expected.keys() - statistics - {name for name in expected if "tracked" in name}

    def largest(names: Iterable[str]) -> float:
        return max(relative(state[name], expected[name]) for name in names)

    pairs = zip(losses, expected_losses, strict=True)
    return Distance([abs(a - b) / abs(b) for a, b in pairs], largest(weights), largest(statistics))


def outcome(directory: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Return the mean loss of each update and the final state of the model."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    found = checkpoint.latest(directory / "checkpoints")
    assert found is not None
    return [line["train/loss"] for line in lines if "train/loss" in line], found[1]["model"]


def relative(got: Tensor, expected: Tensor) -> float:
    """Return |got - expected| / |expected|."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def table(precision: str, distances: dict[Case, Distance]) -> Iterator[str]:
    """Yield tables of the largest differences: by world size and micro-batch, and by update."""
    yield "| precision | world size | micro-batch | losses | weights | statistics |"
    yield "|---|---:|---:|---:|---:|---:|"

    def row(head: str, chosen: list[Distance], pick: Callable[[list[float]], float] = max) -> str:
        columns = [max(a.losses) for a in chosen], [a.weights for a in chosen], [a.statistics for a in chosen]
        return f"| {head} | " + " | ".join(f"{pick(column):.1e}" for column in columns) + " |"

    mine = {case: a for case, a in distances.items() if case.precision == precision}
    for world, micro in sorted({(case.world, case.micro_batch) for case in mine}):
        chosen = [a for case, a in mine.items() if (case.world, case.micro_batch) == (world, micro)]
        yield row(f"{precision} | {world} | {micro}", chosen)
    yield row(f"{precision}, median run | all | all", list(mine.values()), median)
    yield row(f"{precision} | all | all", list(mine.values()))
    yield ""
    updates = len(next(iter(mine.values())).losses)
    yield "| precision | update | the loss of that update |"
    yield "|---|---:|---:|"
    for update in [u for u in (1, 2, 5, 10, 20, 40, 80, 160) if u < updates] + [updates]:
        yield f"| {precision} | {update} | {max(a.losses[update - 1] for a in mine.values()):.1e} |"


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    if max(args.world) > GHOSTS:
        parser.error(f"--world: {GHOSTS} ghost batches serve at most {GHOSTS} ranks")
    chosen = itertools.product(args.precision, range(args.seeds), args.world, MICRO_BATCHES, [0])
    cases = list(itertools.starmap(Case, chosen))
    cases = sorted({*cases, *(case.reference for case in cases)}, key=lambda case: (-case.world, case.name))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        start_processes(train_all, (str(folder), cases), max(args.world))
        distances = {case: compare(folder, case) for case in cases if case != case.reference}
    lines = [
        f"`{shared.command_line(__file__)}` on {shared.cpu_name()}; {shared.software()}. "
        f"{EPOCHS * UPDATES_PER_EPOCH} updates of {GLOBAL_BATCH} samples ({GHOSTS} ghost batches of "
        f"{GHOST_BATCH}), learning rate at its peak after {UPDATES_PER_EPOCH}; the largest relative differences over "
        f"{args.seeds} seeds.",
    ]
    for precision in args.precision:
        lines += ["", *table(precision, distances)]
    shared.publish(lines, args.write, "measure_float32_bound")


if __name__ == "__main__":
    shared.exit_on_signals()
    try:
        main(PARSER, ARGS)
    except Stopped as stopped:  # its message promises a checkpoint, which only a training run writes
        sys.exit(stopped.code)
