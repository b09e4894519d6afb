"""Time the log lines of a run: measuring for them and writing them, as a share of the updates' time.

    python scripts/bench/bench_monitoring.py [--write docs/benchmarks.md]     # ResNet-18 on the CPU in one thread
    python scripts/bench/bench_monitoring.py --every 1 model=resnet50         # a line per update; any settings

A log line has norms of layers and the noise scale, and goes to metrics.jsonl and TensorBoard. Its share is measured
within one run, so that changes of the machine's speed cancel out. Times are CPU time of the process on the CPU, and
wall time on CUDA.

Takes about two minutes. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "bench_monitoring")
    PARSER.add_argument("--every", type=shared.positive_int, default=10, help="log_every (10)")
    PARSER.add_argument("--lines", type=shared.positive_int, default=20, help="after one that does not count (20)")
    PARSER.add_argument("settings", nargs="*", help="settings of lars-train")
    ARGS = PARSER.parse_args()

import torch

from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.training.device import choose_device
from lars_train.training.distributed import Group
from lars_train.training.metrics import Measures
from lars_train.training.prepare import prepare
from lars_train.training.run import Run

SETTINGS = (
    "data=synthetic data.image_size=64 data.num_classes=100 data.val_count=64 data.workers=0 model=resnet18 "
    "model.ghost_batch=16 batch.size=32 micro_batch=16 optimizer.lr=1 epochs=1 schedule.warmup_epochs=0 "
    "launch.threads=1 precision=fp32 checkpoint.every_minutes=null device=cpu"
).split()


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    try:
        lines = measure(args.every, args.lines, args.settings)
    except ConfigError as error:
        parser.error(str(error))
    shared.publish(lines, args.write, "bench_monitoring")


def measure(every: int, lines: int, settings: Sequence[str]) -> list[str]:
    """Return the figures as Markdown."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        run = make_run(Path(folder) / "run", every, every * (lines + 1), settings)
        device, logging = run.context.device, [0.0]

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                started = clock(device)
                result = function(*arguments)
                logging[0] += clock(device) - started
                return result

            return call

        for owner, name in (
            (run.logger, "log_update"),
            (Measures, "before_step"),
            (Measures, "after_step"),
            (run.trainer.first_gradient, "take"),
        ):
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        shares, milliseconds = [], []
        with closing(run._batches()) as batches:
            run.begin()
            for _ in range(lines + 1):
                logging[0], started = 0.0, clock(device)
                for _ in range(every):
                    run._one_update(batches)
                total = clock(device) - started
                shares.append(logging[0] / (total - logging[0]))
                milliseconds.append(1e3 * logging[0])
        run.close()
    # The first line starts TensorBoard's thread and writes example images.
    del shares[0], milliseconds[0]
    return [
        f"{describe(run)}; median of {lines} log lines, one every {every} update(s) "
        f"(`{shared.command_line(__file__)}`):",
        "",
        f"- measuring for a line and writing it: {statistics.median(milliseconds):.1f} ms, "
        f"{100 * statistics.median(shares):.2f} % of the updates' time (least to most: {100 * min(shares):.2f} to "
        f"{100 * max(shares):.2f}).",
    ]


def describe(run: Run) -> str:
    """Return the network and images of a run, and the machine and software."""
    return (
        f"{run.config.model.name} at {run.config.data.image_size} pixels, {run.plan.global_batch} images an update in "
        f"micro-batches of {run.resolved.micro_batch}, {run.resolved.precision}; "
        f"{shared.device_name(run.context.device.type)}, {run.resolved.threads} thread(s), {shared.software()}"
    )


def make_run(directory: Path, log_every: int, updates: int, settings: Sequence[str]) -> Run:
    """Return a run of synthetic data in the new `directory`, in which no epoch ends before `updates`.

    Raises:
        ConfigError: lars-train rejects a setting.
    """
    keys = [*SETTINGS, *settings, f"log_every={log_every}", f"run.dir={directory}", "verbosity=0"]
    config = shared.compose(keys)
    config.data.train_count = (config.batch.size or config.batch.nominal) * (updates + 1)
    directory.mkdir()
    return Run(prepare(config), Group(Ranks()), choose_device(config, Ranks()))


def clock(device: torch.device) -> float:
    """Return wall time after the device has finished its work, on CUDA; CPU time on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
