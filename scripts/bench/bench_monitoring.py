"""Measures what a run's logging costs: updates with log lines against the same updates without any.

    python scripts/bench/bench_monitoring.py                                  # ResNet-18 on the CPU in one thread
    python scripts/bench/bench_monitoring.py --every 1 model=resnet50         # a line per update; keys as of lars-train

Two runs of one config stand in one process and take turns: a block of one is followed by a block of the other, which of
them begins changing each time; a block is `--every` updates, at whose end the one run writes its log line (norms of
layers, noise scale, metrics.jsonl, TensorBoard) and the other none. Ratios are taken within a pair of blocks, of the
process's CPU time on the CPU (neighbours on the machine do not count in it) and of wall time on CUDA. The median and
the 10th to 90th percentile are printed, and beside them the time of the measurements and of the lines
themselves, taken where they are made: where neighbours make the ratio uncertain, that is the figure to go by.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from arguments import count
from child import end_on_signals
from page import between_markers, check_page, command_line, cpu_name
from settings import composed, refused
from torch import Tensor, nn

from lars_train.launch import Ranks
from lars_train.training.device import choose_device
from lars_train.training.device_prefetch import DevicePrefetcher
from lars_train.training.distributed import Group
from lars_train.training.metrics import Measures
from lars_train.training.prepare import Prepared, prepare
from lars_train.training.run import Run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"
NEVER = 10**9
SETTINGS = (
    "data=synthetic data.image_size=64 data.num_classes=100 data.val_count=64 data.workers=0 model=resnet18 "
    "model.ghost_batch=16 batch.size=32 micro_batch=16 optimizer.lr=1 epochs=1 schedule.warmup_epochs=0 "
    "launch.threads=1 precision=fp32 checkpoint.every_minutes=null device=cpu"
).split()


class TimedRun(Run):
    """A run that knows how long its log lines took, and what they are measured by: `logging` seconds of `clock`."""

    logging = 0.0

    def __init__(self, prepared: Prepared, group: Group, device: torch.device) -> None:
        super().__init__(prepared, group, device)
        log_update = self.logger.log_update

        def timed(*arguments: Any) -> None:
            with self.timed():
                log_update(*arguments)

        self.logger.log_update = timed  # type: ignore[method-assign, assignment]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add what is done within it to `logging`."""
        started = clock(self.context.device)
        yield
        self.logging += clock(self.context.device) - started

    @contextmanager
    def measures_timed(self) -> Iterator[None]:
        """Within it, what an update is measured by counts, too; the run beside this one measures nothing."""
        run, before, after, take = self, Measures.before_step, Measures.after_step, self.trainer.first_gradient.take

        def timed_before(network: nn.Module) -> Measures:
            with run.timed():
                return before(network)

        def timed_after(measures: Measures) -> None:
            with run.timed():
                after(measures)

        def timed_take(parameter: Tensor, norms: list[Tensor]) -> None:
            with run.timed():
                take(parameter, norms)

        with (
            patch.object(Measures, "before_step", timed_before),
            patch.object(Measures, "after_step", timed_after),
            patch.object(self.trainer.first_gradient, "take", timed_take),
        ):
            yield


def main(argv: Sequence[str] | None = None) -> None:
    """Print the figures; with --write also into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=count, default=10, help="log_every, and updates in a block (default: 10)")
    parser.add_argument("--pairs", type=count, default=10, help="pairs of blocks (default: 10)")
    parser.add_argument("--write", action="store_true", help="also into docs/monitoring.md")
    parser.add_argument("settings", nargs="*", help="keys and groups of lars-train")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error("--pairs wants at least 2")
    if args.write:
        try:
            check_page(PAGE, "bench_monitoring")
        except ValueError as error:
            parser.error(f"argument --write: {error}")
    command = command_line(__file__, argv, takes_page=False).removeprefix("python ")
    with refused(parser):
        lines = measured(args.every, args.pairs, args.settings, command)
    print("\n".join(lines))
    if args.write:
        PAGE.write_text(between_markers(PAGE.read_text(), "bench_monitoring", [*lines, ""]))


def measured(every: int, pairs: int, settings: Sequence[str], command: str) -> list[str]:
    """The figures in words, found by `command`."""
    with tempfile.TemporaryDirectory() as folder:
        logs, silent = (
            made(Path(folder) / name, lines, every * (pairs + 2), settings)
            for name, lines in (("logs", every), ("silent", NEVER))
        )
        # One block each, so that what is done once (memory, TensorBoard's thread, pictures) is behind them.
        with closing(logs._batches()) as with_lines, closing(silent._batches()) as without:
            arms: list[tuple[TimedRun, DevicePrefetcher]] = [(logs, with_lines), (silent, without)]
            for run, batches in arms:
                run.begin()
                block(run, batches, every)
            logs.logging = 0.0
            ratios, blocks = [], []
            with logs.measures_timed():
                for pair in range(pairs):
                    taken = {id(run): block(run, batches, every) for run, batches in (arms if pair % 2 else arms[::-1])}
                    ratios.append(taken[id(logs)] / taken[id(silent)])
                    blocks.append(taken[id(silent)])
        for run in (logs, silent):
            run.close()
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    update = f"{statistics.median(blocks) / every * 1e3:,.1f} ms"
    config, device = logs.config, logs.context.device
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu_name()}, {logs.resolved.threads} thread(s)"
    )
    return [
        f"{config.model.name} at {config.data.image_size} pixels, {logs.plan.global_batch} images an update in "
        f"micro-batches of {logs.resolved.micro_batch}, {logs.resolved.precision}, a log line every {every} update(s); "
        f"{where}, torch {torch.__version__}, Python {platform.python_version()}; {pairs} pairs of blocks in turns "
        f"(`{command}`):",
        "",
        f"- updates with their log lines over updates without: {statistics.median(ratios):.4f} "
        f"(10th to 90th percentile {tenths[0]:.4f} to {tenths[-1]:.4f}) of {update};",
        f"- measuring for a line and writing it: {logs.logging / pairs * 1e3:.1f} ms, "
        f"{100 * logs.logging / sum(blocks):.2f} % of the updates' time.",
    ]


def made(directory: Path, log_every: int, updates: int, settings: Sequence[str]) -> TimedRun:
    """A run in `directory` that is long enough, so that no epoch ends within it."""
    config = composed([*SETTINGS, *settings, f"log_every={log_every}", f"run.dir={directory}", "verbosity=0"])
    config.data.train_count = (config.batch.size or config.batch.nominal) * (updates + 1)
    directory.mkdir()
    prepared = prepare(config)
    return TimedRun(prepared, Group(Ranks()), choose_device(config, Ranks()))


def block(run: TimedRun, batches: DevicePrefetcher, updates: int) -> float:
    """Seconds of `clock` that so many updates take."""
    started = clock(run.context.device)
    for _ in range(updates):
        run._one_update(batches)
    return clock(run.context.device) - started


def clock(device: torch.device) -> float:
    """Seconds, with the device's work behind them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    end_on_signals()
    main()
