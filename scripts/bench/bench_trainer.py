"""Time what a run does around its training steps: schedule, meters, guard, logs, progress bar, checks.

    python scripts/bench/bench_trainer.py [--write docs/performance.md]      # ResNet-50 at 224 and a small ResNet at 32

The script times a complete run, with log lines and a progress bar on a terminal, on the CPU, where an operation is
finished when its call returns. The time of an update has three parts: input, step (normalization, forward, loss,
backward, running statistics, optimizer, clearing of gradients), and the rest, which is the result. These shares do not
depend on the changing speed of the machine, unlike a ratio between two processes (bench_step.py). The small network
runs with 256 images per update, the smallest global batch of the recipes, and with 128.

Takes about four minutes. Figures: docs/performance.md.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "bench_trainer")
    PARSER.add_argument("--case", choices=["resnet50", "small", "small-128"], help="only this network")
    PARSER.add_argument(
        "--intervals", type=shared.positive_int, help="log intervals to time (3; 10 for the small network)"
    )
    PARSER.add_argument("settings", nargs="*", help="more settings of lars-train")
    ARGS = PARSER.parse_args()

import torch
from training_steps import endless_run

from lars_train.training.device_prefetch import DevicePrefetcher
from lars_train.training.run import Run

COMMON = "data=synthetic optimizer.lr=0.1 schedule.warmup_epochs=0 epochs=1 launch.nproc=1 device=cpu"
SMALL = "data.image_size=32 data.num_classes=10 model=small model.ghost_batch=128"
CASES = {
    "resnet50": ("data.image_size=224 data.num_classes=1000 model=resnet50 model.ghost_batch=16 batch.size=16", 3),
    "small": (f"{SMALL} batch.size=256", 10),
    "small-128": (f"{SMALL} batch.size=128", 10),
}
"""Settings of a run, and the default number of log intervals to time."""


class Stopwatch:
    """Seconds spent in wrapped calls, less the excluded calls nested in them."""

    def __init__(self) -> None:
        self.seconds, self._within = 0.0, False

    def wrap(self, function: Callable[..., Any], *, counts: bool = True) -> Callable[..., Any]:
        """Wrap `function` to add its time or, with `counts` false, to subtract it from its caller's."""

        def timed(*arguments: Any, **keywords: Any) -> Any:
            before = self._within
            self._within, started = counts, time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                elapsed = time.perf_counter() - started
                if before != counts:
                    self.seconds += elapsed if counts else -elapsed
                self._within = before

        return timed


@contextmanager
def timed(run: Run) -> Iterator[tuple[Stopwatch, Stopwatch]]:
    """Time the run's steps and its input within the context."""
    step, waiting, trainer = Stopwatch(), Stopwatch(), run.trainer
    with ExitStack() as patches:
        for owner, name in (
            # Includes freeing the graph at the end, as in every loop.
            (trainer, "_forward_backward"),
            (trainer.optimizer, "step"),
            (trainer.optimizer, "zero_grad"),
            # torch's batch norms update them in their forward pass.
            (trainer.running_statistics, "update"),
        ):
            patches.enter_context(patch.object(owner, name, step.wrap(getattr(owner, name))))
        patches.enter_context(patch.object(trainer.meter, "add", step.wrap(trainer.meter.add, counts=False)))
        patches.enter_context(patch.object(DevicePrefetcher, "__next__", waiting.wrap(DevicePrefetcher.__next__)))
        yield step, waiting


@contextmanager
def terminal() -> Iterator[None]:
    """Redirect standard error to a terminal that discards its text, and standard output to /dev/null."""
    own, other = os.openpty()
    with (
        subprocess.Popen(["cat"], stdin=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
        os.fdopen(other, "w") as stderr,
        Path(os.devnull).open("w") as stdout,
    ):
        os.close(own)
        with redirect_stderr(stderr), redirect_stdout(stdout):
            yield


def measure(settings: Sequence[str], intervals: int) -> tuple[Run, list[tuple[float, float, float]]]:
    """Return the run and, by log interval after the first, the seconds in all, of the steps, and of input."""
    with tempfile.TemporaryDirectory() as folder, terminal():
        keys = [*COMMON.split(), *settings, "data.val_count=64", f"run.dir={folder}/run"]
        config = shared.compose_config(keys)
        every = config.log_every
        run = endless_run(config, every * (intervals + 1))
        found = []
        with closing(run._batches()) as batches, timed(run) as (step, waiting):
            run.begin()
            for _ in range(intervals + 1):
                before = time.perf_counter(), step.seconds, waiting.seconds
                for _ in range(every):
                    run._one_update(batches)
                after = time.perf_counter(), step.seconds, waiting.seconds
                found.append((after[0] - before[0], after[1] - before[1], after[2] - before[2]))
        run.close()
    return run, found[1:]


def row(name: str, run: Run, found: list[tuple[float, float, float]]) -> str:
    """Return a row of the table. Shares are of whole intervals, so that each includes its log line."""
    every, side = run.config.log_every, run.config.data.image_size
    update = statistics.median(whole for whole, _, _ in found) / every
    shares = [(whole - steps - waited) / whole for whole, steps, waited in found]
    inputs = statistics.median(waited / whole for whole, _, waited in found)
    share = statistics.median(shares)
    return (
        f"| {name}, {run.plan.global_batch} x {side} x {side}, {run.resolved.precision}, a log line each {every} "
        f"updates | {1e3 * update:,.1f} | {inputs:.2%} | {1e3 * update * share:.2f} | "
        f"{share:.2%} ({min(shares):.2%} to {max(shares):.2%}) |"
    )


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    names = [args.case] if args.case else list(CASES)
    rows = []
    with shared.config_errors(parser):
        for name in names:  # check all settings before the first run
            shared.compose_config([*COMMON.split(), *CASES[name][0].split(), *args.settings])
        for name in names:
            keys, intervals = CASES[name]
            rows.append(row(name, *measure([*keys.split(), *args.settings], args.intervals or intervals)))
    lines = [
        f"`{shared.command_line(__file__)}` on {shared.cpu_name()}, {torch.get_num_threads()} threads; "
        f"{shared.software()}. Medians over log intervals.",
        "",
        "| | an update, ms | input | the trainer around the step, ms | share (least to most) |",
        "|---|---:|---:|---:|---:|",
        *rows,
    ]
    shared.publish(lines, args.write, "bench_trainer")


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
