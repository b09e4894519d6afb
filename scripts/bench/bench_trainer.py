"""What a run does around its training steps, within one process: schedule, meters, guard, logs, bars, checks.

    python scripts/bench/bench_trainer.py [--write docs/performance.md]      # ResNet-50 at 224 and a small ResNet at 32

A run as `lars-train` makes it, with its log lines and its bar on a terminal, is timed on the CPU, where an operation is
done when its call ends. An update's time is that of its input, that of the step (normalisation, forward, loss,
backward, running statistics, optimizer, clearing of gradients), and the rest, which is what is looked for. Shares of
times within one process do not suffer from a machine whose speed changes, as a ratio to another process's updates does
(bench_step.py). The small network has 256 images an update, the smallest global batch that this program is for; beside
it stands one with 128.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from arguments import count
from child import end_on_signals
from page import between_markers, command_line, cpu_name, writable_page
from settings import composed, refused

from lars_train.launch import Ranks
from lars_train.training.device_prefetch import DevicePrefetcher
from lars_train.training.distributed import Group
from lars_train.training.prepare import prepare
from lars_train.training.run import Run

COMMON = "data=synthetic optimizer.lr=0.1 schedule.warmup_epochs=0 epochs=1 launch.nproc=1 device=cpu"
SMALL = "data.image_size=32 data.num_classes=10 model=small model.ghost_batch=128"
CASES = {
    "resnet50": ("data.image_size=224 data.num_classes=1000 model=resnet50 model.ghost_batch=16 batch.size=16", 3),
    "small": (f"{SMALL} batch.size=256", 10),
    "small-128": (f"{SMALL} batch.size=128", 10),
}
"""Keys of a run, and how many log intervals of it are timed by default."""


class Stopwatch:
    """Seconds within the calls that are wrapped, less those within calls in them that are left out."""

    def __init__(self) -> None:
        self.seconds, self._within = 0.0, False

    def wrap(self, function: Callable[..., Any], *, counts: bool = True) -> Callable[..., Any]:
        """`function`, timed; or, not `counts`, left out of the time of what it is called by."""

        def timed(*arguments: Any, **keywords: Any) -> Any:
            before = self._within
            self._within, started = counts, time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                taken = time.perf_counter() - started
                if before != counts:
                    self.seconds += taken if counts else -taken
                self._within = before

        return timed


@contextmanager
def timed(run: Run) -> Iterator[tuple[Stopwatch, Stopwatch]]:
    """Within it, what the run's steps take, and its input."""
    step, waiting, trainer = Stopwatch(), Stopwatch(), run.trainer
    with ExitStack() as patches:
        for owner, name in (
            # With what its end sets free: the pass's graph, which every loop has.
            (trainer, "_forward_backward"),
            (trainer.optimizer, "step"),
            (trainer.optimizer, "zero_grad"),
            # What torch's batch norms do in their forward.
            (trainer.running_statistics, "update"),
        ):
            patches.enter_context(patch.object(owner, name, step.wrap(getattr(owner, name))))
        patches.enter_context(patch.object(trainer.meter, "add", step.wrap(trainer.meter.add, counts=False)))
        patches.enter_context(patch.object(DevicePrefetcher, "__next__", waiting.wrap(DevicePrefetcher.__next__)))
        yield step, waiting


@contextmanager
def terminal() -> Iterator[None]:
    """Within it, standard error is a terminal, whose text nobody sees; so is standard output's a file's."""
    own, other = os.openpty()
    reader = threading.Thread(target=read_all, args=(own,), daemon=True)
    reader.start()
    before = sys.stderr, sys.stdout
    with os.fdopen(other, "w") as stderr, Path(os.devnull).open("w") as stdout:
        sys.stderr, sys.stdout = stderr, stdout
        try:
            yield
        finally:
            sys.stderr, sys.stdout = before
    reader.join()


def read_all(file: int) -> None:
    """Until its other end is closed."""
    try:
        while os.read(file, 65536):
            pass
    except OSError:  # how Linux says that it is
        pass
    os.close(file)


def made(directory: Path, updates: int, settings: Sequence[str]) -> Run:
    """A run in `directory` that is long enough, so that no epoch ends within it."""
    config = composed([*COMMON.split(), *settings, "data.val_count=64", f"run.dir={directory}"])
    config.data.train_count = (config.batch.size or config.batch.nominal) * (updates + 1)
    directory.mkdir()
    return Run(prepare(config), Group(Ranks()), torch.device("cpu"))


def measured(settings: Sequence[str], intervals: int) -> tuple[Run, list[tuple[float, float, float]]]:
    """Seconds of all, of the steps and of their input in each of so many log intervals, after one that is not told."""
    with tempfile.TemporaryDirectory() as folder, terminal():
        # How long an interval is, the config says.
        every = made(Path(folder) / "first", 1, settings).config.log_every
        run = made(Path(folder) / "run", every * (intervals + 1), settings)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), help="one network alone")
    parser.add_argument("--intervals", type=count, help="log intervals that are timed (3, of the small network 10)")
    parser.add_argument(
        "--write", type=writable_page("bench_trainer"), metavar="PAGE", help="put the table between the page's markers"
    )
    parser.add_argument("settings", nargs="*", help="keys and groups of lars-train, in addition")
    args = parser.parse_args(argv)
    names = [args.case] if args.case else list(CASES)
    with refused(parser):
        # All of them before the first is measured.
        for name in names:
            composed([*COMMON.split(), *CASES[name][0].split(), *args.settings])
    rows = []
    for name in names:
        keys, intervals = CASES[name]
        with refused(parser):
            run, found = measured([*keys.split(), *args.settings], args.intervals or intervals)
        every, plan, config = run.config.log_every, run.plan, run.config
        update = statistics.median(whole for whole, _, _ in found) / every
        # Whole intervals, so that each has its log line.
        shares = [(whole - steps - waited) / whole for whole, steps, waited in found]
        inputs = statistics.median(waited / whole for whole, _, waited in found)
        share = statistics.median(shares)
        rows.append(
            f"| {name}, {plan.global_batch} x {config.data.image_size} x {config.data.image_size}, "
            f"{run.resolved.precision}, a log line each {every} updates | {1e3 * update:,.1f} | {inputs:.2%} | "
            f"{1e3 * update * share:.2f} | {share:.2%} ({min(shares):.2%} to {max(shares):.2%}) |"
        )
    lines = [
        f"`{command_line(__file__, argv)}` on {cpu_name()}, {torch.get_num_threads()} threads; Python "
        f"{platform.python_version()}, torch {version('torch')}. Medians over log intervals.",
        "",
        "| | an update, ms | of it, input | the trainer around the step, ms | share (least to most) |",
        "|---|---:|---:|---:|---:|",
        *rows,
    ]
    print("\n".join(lines))
    if args.write:
        args.write.write_text(between_markers(args.write.read_text(), "bench_trainer", lines))


if __name__ == "__main__":
    end_on_signals()
    main()
