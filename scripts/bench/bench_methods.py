"""Time updates with a method of docs/methods.md, relative to the same updates without it.

    python scripts/bench/bench_methods.py [--write docs/benchmarks.md]    # ResNet-18 on the CPU in one thread
    python scripts/bench/bench_methods.py "augment.mixup=0.2 augment.cutmix=1" --settings "model=resnet50"

Each method is a run in this process. Its updates, including the reading of images, take turns with those of a run
without the method, so that changes of the machine's speed cancel out. Times are CPU time on the CPU, wall time on CUDA.

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

from bench_monitoring import clock, describe, make_run

from lars_train.errors import ConfigError

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
NO_LINE = 10**6
"""A value of `log_every` without a log line during the measurement."""


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    rows = []
    for method in args.methods or METHODS:
        try:
            what, rates, seconds = compare(method.split(), args.settings, args.rounds, args.updates)
        except ConfigError as error:
            parser.error(str(error))
        rows.append((f"`{method}`", shared.spread(rates, ".3f", 25, 75), f"{1e3 * statistics.median(seconds):+.1f}"))
    lines = [
        f"{what}; median (and quartiles) of {args.rounds} turns of {args.updates} updates "
        f"(`{shared.command_line(__file__)}`):",
        "",
        *shared.table(["method", "images/s, relative to the run without", "ms more per update"], rows),
    ]
    shared.publish(lines, args.write, "bench_methods")


def compare(
    method: Sequence[str], settings: Sequence[str], rounds: int, updates: int
) -> tuple[str, list[float], list[float]]:
    """Return a description of the run without the method, and two figures of each turn with it.

    The figures are images/s relative to the run without it, and the seconds that it adds to an update.
    """
    rates, seconds = [], []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runs = [
            make_run(Path(folder) / name, NO_LINE, updates * (rounds + 1), [*settings, *own])
            for name, own in (("without", []), ("with", method))
        ]
        streams = [stack.enter_context(closing(run._batches())) for run in runs]
        for run in runs:
            run.begin()
        for _ in range(rounds + 1):
            took = []
            for run, batches in zip(runs, streams, strict=True):
                started = clock(run.context.device)
                for _ in range(updates):
                    run._one_update(batches)
                took.append(clock(run.context.device) - started)
            rates.append(took[0] / took[1])
            seconds.append((took[1] - took[0]) / updates)
        for run in runs:
            run.close()
    return describe(runs[0]), rates[1:], seconds[1:]


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
