"""Measures how far rounding takes runs apart that differ in world size, micro-batch and loader workers alone.

    python scripts/verify/measure_float32_bound.py                  # about 3 minutes on two cores; prints Markdown
    python scripts/verify/measure_float32_bound.py --write docs/same_curve.md      # between the page's markers
    python scripts/verify/measure_float32_bound.py --precision fp64           # the same with hardly any rounding

Each run is the program's own, on the CPU: made-up images, random crops and flips, a ResNet of 8 layers with batch norm,
LARS over SGD with momentum, warm-up, 7 ghost batches of 4 samples in an update. Ranks that share 7 ghost batches have
unequal numbers of them. What a run is compared with is the run with the same seed and precision, one process, one
ghost batch at a time and no loader workers. One start of as many processes as the largest world size makes all runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from child import end_on_signals, ranks_end
from omegaconf import DictConfig, OmegaConf
from page import between_markers, cpu_name, writable_page
from torch import Tensor

from lars_train.config import Config, resolve
from lars_train.launch import Ranks, start_processes
from lars_train.training import checkpoint, session
from lars_train.training.distributed import begin_job
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation

GHOST_BATCH, GHOSTS, UPDATES_PER_EPOCH = 4, 7, 5
GLOBAL_BATCH = GHOST_BATCH * GHOSTS
SETTINGS: dict[str, Any] = {
    "log_every": 1,
    "device": "cpu",
    "label_smoothing": 0.1,
    "batch": {"size": GLOBAL_BATCH},
    "recipe": {"rows": {"32k": {}}},
    "data": {
        "name": "synthetic",
        "image_size": 12,
        "augment": "inception",
        "eval_crop": 1.0,
        # A few images more than the updates of an epoch take.
        "train_count": UPDATES_PER_EPOCH * GLOBAL_BATCH + 3,
        "val_count": 5,
        "num_classes": 4,
    },
    "model": {"name": "small", "ghost_batch": GHOST_BATCH},
    "optimizer": {"name": "lars", "lr": 1.0, "momentum": 0.9, "trust_coef": 0.01, "weight_decay": 0.001},
    "schedule": {"warmup_epochs": 1.0},
    "launch": {"threads": 1},
    # One evaluation and one checkpoint, at the end.
    "evaluate": {"every_epochs": 1_000_000},
    "checkpoint": {"every_updates": 1_000_000, "every_minutes": None},
}


@dataclass(frozen=True)
class Case:
    """One run. `micro_batch` in samples; `workers`: loader processes of each rank."""

    precision: str
    seed: int
    world: int
    micro_batch: int
    workers: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.precision}-seed{self.seed}-world{self.world}-micro{self.micro_batch}-workers{self.workers}"

    @property
    def reference(self) -> Case:
        """The run that it is compared with."""
        return Case(self.precision, self.seed, 1, GHOST_BATCH, 0)


@dataclass(frozen=True)
class Apart:
    """How far a run is from its reference, as relative differences.

    `losses`: of each update's mean loss. `weights` and `statistics` (running means and variances of batch norm): the
    largest over the tensors of |a - b| / |b|, with Euclidean norms in float64.
    """

    losses: list[float]
    weights: float
    statistics: float


def cases(args: argparse.Namespace) -> list[Case]:
    """All runs, each once, the references among them; large world sizes first."""
    asked = itertools.product(args.precision, range(args.seeds), args.world, args.micro_batch, args.workers)
    wanted = [Case(*values) for values in asked]
    unique = dict.fromkeys([*wanted, *(case.reference for case in wanted)])
    return sorted(unique, key=lambda case: -case.world)


def train_all(folder: str, wanted: list[Case], epochs: int) -> None:
    """The part of one process in all runs; runs that need fewer go on side by side."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for number, case in enumerate(wanted):
        begin_job()
        # By turns with the lowest and with the highest ranks.
        place = rank - (processes - case.world) * (number % 2)
        if 0 <= place < case.world:
            train(Path(folder) / case.name, case, Ranks(place, case.world, place, case.world), epochs)


def train(directory: Path, case: Case, ranks: Ranks, epochs: int) -> None:
    """One rank's part in a run."""
    own = {
        "epochs": epochs,
        "seed": case.seed,
        "micro_batch": case.micro_batch,
        "precision": {"name": case.precision},
        "data": {"workers": case.workers},
        "run": {"dir": str(directory)},
    }
    raw = OmegaConf.merge(OmegaConf.structured(Config), SETTINGS, own)
    assert isinstance(raw, DictConfig)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        session.train(prepare(resolve(raw)), ranks, Invocation())


def compare(folder: Path, case: Case) -> Apart:
    """A run and its reference, from their run directories."""
    (losses, state), (expected_losses, expected) = (outcome(folder / c.name) for c in (case, case.reference))
    statistics = {name for name in expected if "running" in name}
    weights = expected.keys() - statistics - {name for name in expected if "tracked" in name}

    def largest(names: Iterable[str]) -> float:
        return max(distance(state[name], expected[name]) for name in names)

    pairs = zip(losses, expected_losses, strict=True)
    return Apart([abs(a - b) / abs(b) for a, b in pairs], largest(weights), largest(statistics))


def outcome(directory: Path) -> tuple[list[float], dict[str, Tensor]]:
    """The mean loss of each update and the model's state at the end."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    found = checkpoint.latest(directory / "checkpoints")
    assert found is not None
    return [line["train/loss"] for line in lines if "train/loss" in line], found[1]["model"]


def distance(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def table(precision: str, apart: dict[Case, Apart]) -> Iterator[str]:
    """Markdown: the largest differences over the seeds and workers, for each world size and micro-batch."""
    yield "| precision | world size | micro-batch | losses | weights | statistics |"
    yield "|---|---:|---:|---:|---:|---:|"

    def row(head: str, chosen: list[Apart], pick: Callable[[list[float]], float] = max) -> str:
        columns = [max(a.losses) for a in chosen], [a.weights for a in chosen], [a.statistics for a in chosen]
        return f"| {head} | " + " | ".join(f"{pick(column):.1e}" for column in columns) + " |"

    mine = {case: a for case, a in apart.items() if case.precision == precision}
    for world, micro in sorted({(case.world, case.micro_batch) for case in mine}):
        chosen = [a for case, a in mine.items() if (case.world, case.micro_batch) == (world, micro)]
        yield row(f"{precision} | {world} | {micro}", chosen)
    yield row(f"{precision}, median run | all | all", list(mine.values()), median)
    yield row(f"{precision} | all | all", list(mine.values()))
    yield ""
    updates = len(next(iter(mine.values())).losses)
    told = [u for u in (1, 2, 5, 10, 20, 40, 80, 160) if u < updates] + [updates]
    yield "| precision | update | the loss of that update |"
    yield "|---|---:|---:|"
    for update in told:
        yield f"| {precision} | {update} | {max(a.losses[update - 1] for a in mine.values()):.1e} |"


def report(args: argparse.Namespace, apart: dict[Case, Apart]) -> list[str]:
    """The Markdown of all measurements."""
    options = " ".join(
        f"--{key.replace('_', '-')} {shown(value)}" for key, value in vars(args).items() if key not in ("keep", "write")
    )
    lines = [
        f"`python scripts/verify/measure_float32_bound.py {options}` on {cpu_name()}; Python "
        f"{platform.python_version()}, torch {torch.__version__}. "
        f"{args.epochs * UPDATES_PER_EPOCH} updates of {GLOBAL_BATCH} samples "
        f"({GHOSTS} ghost batches of {GHOST_BATCH}), learning rate at its peak after {UPDATES_PER_EPOCH}; the largest "
        f"relative differences over {args.seeds} seeds.",
    ]
    for precision in args.precision:
        lines += ["", *table(precision, apart)]
    return lines


def shown(value: Any) -> str:
    """An option's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "fp64"], default=["fp32"])
    parser.add_argument("--world", nargs="+", type=int, default=[1, 2, 3, 4], help="world sizes, at most 7")
    parser.add_argument(
        "--micro-batch", nargs="+", type=int, default=[4, 8, 28], help="in samples: multiples of the ghost batch of 4"
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[0], help="loader processes of each rank")
    parser.add_argument("--seeds", type=int, default=10, help="so many seeds, from 0 on (10)")
    parser.add_argument("--epochs", type=int, default=4, help="of 5 updates, the first one warm-up (4)")
    parser.add_argument("--keep", type=Path, help="a folder for the run directories, which else are removed")
    parser.add_argument(
        "--write",
        type=writable_page("measure_float32_bound"),
        metavar="PAGE",
        help="put the tables between the page's markers",
    )
    args = parser.parse_args(argv)
    if not all(1 <= world <= GHOSTS for world in args.world):
        parser.error(f"--world: there are {GHOSTS} ghost batches to share, so 1 to {GHOSTS} ranks")
    if any(size < 1 or size % GHOST_BATCH for size in args.micro_batch):
        parser.error(f"--micro-batch: whole ghost batches of {GHOST_BATCH} samples")
    if args.keep is not None and args.keep.exists() and any(args.keep.iterdir()):
        parser.error(f"--keep {args.keep}: it is not empty, and runs that are there would not be made again")
    if args.seeds < 1 or args.epochs < 2:
        parser.error("at least one seed, and two epochs, of which the first is the warm-up")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    wanted = cases(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        with ranks_end():
            start_processes(train_all, (str(folder), wanted, args.epochs), max(args.world))
        compared = {case: compare(folder, case) for case in wanted if case != case.reference}
    lines = report(args, compared)
    print("\n".join(lines))
    if args.write is not None:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(between_markers(page, "measure_float32_bound", lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
