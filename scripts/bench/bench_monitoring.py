"""Time the logging of a run: updates with log lines, compared with the same updates without.

    python scripts/bench/bench_monitoring.py [--write docs/benchmarks.md]     # ResNet-18 on the CPU in one thread
    python scripts/bench/bench_monitoring.py --every 1 model=resnet50         # a line per update; any settings

Two runs of the same config in one process take turns, in blocks of `--every` updates; each pair of blocks starts with
the other run. At the end of its block one run writes a log line (norms of layers, noise scale, metrics.jsonl,
TensorBoard); the other writes none. A ratio compares the two blocks of a pair: CPU time of the process on the CPU, so
that other processes do not count, and wall time on CUDA. The time of the measurements and log lines themselves is
printed too; it is more reliable where other processes disturb the ratio.

Takes about three minutes. Figures: docs/benchmarks.md.
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
    PARSER.add_argument("--every", type=shared.positive_int, default=10, help="log_every, and updates per block (10)")
    PARSER.add_argument("--pairs", type=shared.positive_int, default=10, help="of blocks, at least 2 (10)")
    PARSER.add_argument("settings", nargs="*", help="settings of lars-train")
    ARGS = PARSER.parse_args()

import torch
from training_steps import endless_run

from lars_train.training.device_prefetch import DevicePrefetcher
from lars_train.training.metrics import Measures
from lars_train.training.run import Run

NEVER = 10**9
SETTINGS = (
    "data=synthetic data.image_size=64 data.num_classes=100 data.val_count=64 data.workers=0 model=resnet18 "
    "model.ghost_batch=16 batch.size=32 micro_batch=16 optimizer.lr=1 epochs=1 schedule.warmup_epochs=0 "
    "launch.threads=1 precision=fp32 checkpoint.every_minutes=null device=cpu"
).split()


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    if args.pairs < 2:
        parser.error("--pairs must be at least 2")
    with shared.config_errors(parser):
        lines = measure(args.every, args.pairs, args.settings)
    shared.publish(lines, args.write, "bench_monitoring")


def measure(every: int, pairs: int, settings: Sequence[str]) -> list[str]:
    """Return the figures as Markdown."""
    logging = [0.0]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs, silent = (
            make_run(Path(folder) / name, lines, every * (pairs + 2), settings)
            for name, lines in (("logs", every), ("silent", NEVER))
        )
        runs = [(run, stack.enter_context(closing(run._batches()))) for run in (logs, silent)]
        # The first block of a run allocates memory, starts TensorBoard's thread and writes example images.
        for run, batches in runs:
            run.begin()
            block(run, batches, every)

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                started = clock(logs.context.device)
                result = function(*arguments)
                logging[0] += clock(logs.context.device) - started
                return result

            return call

        for owner, name in (
            (logs.logger, "log_update"),
            # Patched in the class: the other run takes no measures.
            (Measures, "before_step"),
            (Measures, "after_step"),
            (logs.trainer.first_gradient, "take"),
        ):
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name))))
        ratios, blocks = [], []
        for pair in range(pairs):
            seconds = {run: block(run, batches, every) for run, batches in (runs if pair % 2 else runs[::-1])}
            ratios.append(seconds[logs] / seconds[silent])
            blocks.append(seconds[silent])
        for run, _ in runs:
            run.close()
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    config, device = logs.config, logs.context.device
    cpu = f"{shared.cpu_name()}, {logs.resolved.threads} thread(s)"
    return [
        f"{config.model.name} at {config.data.image_size} pixels, {logs.plan.global_batch} images an update in "
        f"micro-batches of {logs.resolved.micro_batch}, {logs.resolved.precision}, a log line every {every} update(s); "
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}, {shared.software()}; {pairs} pairs "
        f"of blocks in turns (`{shared.command_line(__file__).removeprefix('python ')}`):",
        "",
        f"- updates with their log lines over updates without: {statistics.median(ratios):.4f} (10th to 90th "
        f"percentile {tenths[0]:.4f} to {tenths[-1]:.4f}) of {statistics.median(blocks) / every * 1e3:,.1f} ms;",
        f"- measuring for a line and writing it: {logging[0] / pairs * 1e3:.1f} ms, "
        f"{100 * logging[0] / sum(blocks):.2f} % of the updates' time.",
    ]


def make_run(directory: Path, log_every: int, updates: int, settings: Sequence[str]) -> Run:
    """Return a run in `directory` in which no epoch ends before `updates`."""
    keys = [*SETTINGS, *settings, f"log_every={log_every}", f"run.dir={directory}", "verbosity=0"]
    return endless_run(shared.compose_config(keys), updates)


def block(run: Run, batches: DevicePrefetcher, updates: int) -> float:
    """Run some updates; return their seconds by `clock`."""
    started = clock(run.context.device)
    for _ in range(updates):
        run._one_update(batches)
    return clock(run.context.device) - started


def clock(device: torch.device) -> float:
    """Return wall time after the device has finished its work, on CUDA; CPU time on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
