"""Time updates with a method of docs/methods.md, relative to the same updates without it.

    python scripts/bench/bench_methods.py [--write docs/benchmarks.md]    # ResNet-18 on the CPU in one thread
    python scripts/bench/bench_methods.py "augment.mixup=0.2 augment.cutmix=1" --settings "model=resnet50"

Each method is a run in this process. Its updates, including the reading of images, take turns with those of a run
without the method, so that the changing speed of a machine does not count: CPU time on the CPU, wall time on CUDA.

Takes about ten minutes. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "bench_methods")
    PARSER.add_argument(
        "--rounds", type=shared.positive_int, default=15, help="turns, after one that does not count (15)"
    )
    PARSER.add_argument("--updates", type=shared.positive_int, default=2, help="updates of a turn (2)")
    PARSER.add_argument("--settings", type=str.split, default=[], help="settings of all runs, in quotes")
    PARSER.add_argument("methods", nargs="*", help="settings of a method, in quotes (all of METHODS)")
    ARGS = PARSER.parse_args()

import bench_monitoring
import torch

from lars_train.errors import ConfigError
from lars_train.training.run import Run

METHODS = (
    "model.blurpool=true",
    "model.ema=0.9999",
    "loss=bce",
    "augment.mixup=0.2",
    "augment.cutmix=1",
    "augment.auto=trivial",
    "augment.auto=randaugment",
    "data.train_size=48",
)


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    try:
        lines = measure(args.methods or METHODS, args.settings, args.rounds, args.updates)
    except ConfigError as error:
        parser.error(str(error))
    shared.publish(lines, args.write, "bench_methods")


def measure(methods: Sequence[str], settings: Sequence[str], rounds: int, updates: int) -> list[str]:
    """Return the figures as Markdown."""
    rows = []
    for method in methods:
        rates, seconds = compare(method.split(), settings, rounds, updates)
        low, middle, high = statistics.quantiles(rates, n=4)
        rows.append(
            f"| `{method}` | {middle:.3f} ({low:.3f} to {high:.3f}) | {1e3 * statistics.median(seconds):+.1f} |"
        )
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", settings, 1)
        run.close()
    on_cuda = run.context.device.type == "cuda"
    where = torch.cuda.get_device_name() if on_cuda else f"{shared.cpu_name()}, {run.resolved.threads} thread(s)"
    return [
        f"{run.config.model.name} at {run.config.data.image_size} pixels, {run.plan.global_batch} images an update in "
        f"micro-batches of {run.resolved.micro_batch}, {run.resolved.precision}; {where}, {shared.software()}; median "
        f"(and quartiles) of {rounds} turns of {updates} updates "
        f"(`{shared.command_line(__file__).removeprefix('python ')}`):",
        "",
        "| method | images/s, relative to none | ms more per update |",
        "|---|---|---|",
        *rows,
    ]


def compare(
    method: Sequence[str], settings: Sequence[str], rounds: int, updates: int
) -> tuple[list[float], list[float]]:
    """Return, for each turn, the method's images/s relative to none, and the seconds that it adds to an update."""
    rates, seconds = [], []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runs = [
            make_run(Path(folder) / name, [*settings, *own], updates * (rounds + 1))
            for name, own in (("without", []), ("with", method))
        ]
        streams = [stack.enter_context(closing(run._batches())) for run in runs]
        for run in runs:
            run.begin()
        for _ in range(rounds + 1):
            took = []
            for run, batches in zip(runs, streams, strict=True):
                started = bench_monitoring.clock(run.context.device)
                for _ in range(updates):
                    run._one_update(batches)
                took.append(bench_monitoring.clock(run.context.device) - started)
            rates.append(took[0] / took[1])
            seconds.append((took[1] - took[0]) / updates)
        for run in runs:
            run.close()
    return rates[1:], seconds[1:]


def make_run(directory: Path, settings: Sequence[str], updates: int) -> Run:
    """Return a run without a log line in its first `updates`. Raises `ConfigError`."""
    return bench_monitoring.make_run(directory, 10**6, updates, settings)


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
