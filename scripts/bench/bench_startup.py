"""How long a command takes to its first update, and where that time goes.

    python scripts/bench/bench_startup.py [--write docs/performance.md]      # the embedded pictures; a few minutes

Wall time of whole processes, by turns: `--help`; Python with torch alone; a run of one update, to its run directory,
its logs, its first line in them and its end; and a sweep of two such runs, from the end of the first to the first
update of the second. Files are read once before the clock runs. The network is ResNet-50 unless told otherwise, on
pictures of 64 pixels so that the update itself takes little.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from arguments import count
from child import end_on_signals, started
from child import run as run_child
from page import between_markers, command_line, cpu_name, writable_page

from lars_train.models.factory import model_names

RUN = (
    "data.image_size=64 batch.size=32 optimizer.lr=0.1 schedule.warmup_epochs=0 epochs=1 max_updates=1 log_every=1 "
    "launch.nproc=1"
).split()
HELP, FIRST, TORCH, PLACE, SET_UP, END, NEXT = (
    "`lars-train --help`",
    "a run of one update, to its first update",
    "by itself: Python, and `import torch`",
    "the run, to its run directory: imports, settings, checks",
    "the same, until all is set up: data, network, logs",
    "the same, to its end, with evaluation and checkpoint",
    "in a sweep, from the end of a run to the first update of the next",
)
_LIMIT = 600.0


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=count, default=5, help="after one that does not count (5)")
    parser.add_argument("--model", choices=model_names(), default="resnet50", metavar="NAME", help="(resnet50)")
    parser.add_argument(
        "--write", type=writable_page("bench_startup"), metavar="PAGE", help="put the table between the page's markers"
    )
    args = parser.parse_args()
    settings = [*RUN, f"model={args.model}"]
    found: dict[str, list[float]] = {name: [] for name in (HELP, TORCH, PLACE, SET_UP, FIRST, END, NEXT)}
    for number in range(args.rounds + 1):
        taken = {
            HELP: seconds([sys.executable, "-m", "lars_train", "--help"]),
            TORCH: seconds([sys.executable, "-c", "import torch"]),
            **run(settings),
            NEXT: between_runs(settings),
        }
        if number:
            for name, value in taken.items():
                found[name].append(value)
    lines = [
        f"`{command_line(__file__)}` on {cpu_name()}; Python {platform.python_version()}, torch "
        f"{torch.__version__}. {args.rounds} rounds; `lars-train {' '.join(settings)}`.",
        "",
        "| | seconds, median (least to most) |",
        "|---|---:|",
        *(f"| {name} | {np.median(own):.2f} ({min(own):.2f} to {max(own):.2f}) |" for name, own in found.items()),
    ]
    print("\n".join(lines))
    if args.write:
        args.write.write_text(between_markers(args.write.read_text(), "bench_startup", lines))


def seconds(command: list[str]) -> float:
    """Of a process that succeeds."""
    began = time.perf_counter()
    if code := run_child(command, stdout=subprocess.DEVNULL):
        raise subprocess.CalledProcessError(code, command)
    return time.perf_counter() - began


def run(settings: list[str]) -> dict[str, float]:
    """A run of one update."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "run"
        began = time.perf_counter()
        signs = {
            PLACE: (where / "run.json").exists,
            SET_UP: (where / "tensorboard").exists,
            FIRST: lambda: has_update(where / "metrics.jsonl"),
        }
        with started(program([*settings, f"run.dir={where}"]), stdout=subprocess.DEVNULL) as process:
            found = {name: moment(process, sign) - began for name, sign in signs.items()}
            succeeded(process)
            return {**found, END: time.perf_counter() - began}


def between_runs(settings: list[str]) -> float:
    """A sweep of two."""
    with tempfile.TemporaryDirectory() as folder:
        one, other = (Path(folder) / f"run{seed}" for seed in (0, 1))
        command = program(
            ["-m", *settings, "seed=0,1", f"run.dir={folder}/run${{seed}}", f"hydra.sweep.dir={folder}/sweep"]
        )
        with started(command, stdout=subprocess.DEVNULL) as process:
            ended = moment(process, (one / "final.json").exists)
            began = moment(process, lambda: has_update(other / "metrics.jsonl"))
            succeeded(process)
    return began - ended


def program(settings: list[str]) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "lars_train", *settings]


def moment(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> float:
    """When it has happened, to a hundredth of a second. Raises CalledProcessError if the process ends before."""
    end = time.perf_counter() + _LIMIT
    while not happened():
        if process.poll() is not None and not happened():
            raise subprocess.CalledProcessError(process.returncode, process.args)
        if time.perf_counter() > end:
            raise TimeoutError(f"nothing for {_LIMIT:g} s: {process.args!r}")
        time.sleep(0.01)
    return time.perf_counter()


def succeeded(process: subprocess.Popen[bytes]) -> None:
    """Wait for it. Raises CalledProcessError."""
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)


def has_update(path: Path) -> bool:
    """Whether the log has the line of an update."""
    return path.exists() and b'"train/loss"' in path.read_bytes()


if __name__ == "__main__":
    end_on_signals()
    try:
        main()
    except (subprocess.CalledProcessError, TimeoutError) as error:  # the run has said why
        sys.exit(str(error))
