"""Time the start of lars-train up to its first update, stage by stage.

    python scripts/bench/bench_startup.py [--write docs/benchmarks.md]      # the embedded data set

Wall time of whole processes, in turns: `--help`; Python with `import torch`; a run of one update, up to its run
directory, its logs, the first line in them, and its end; a sweep of two such runs, from the end of the first to the
first update of the second. A first round, which does not count, reads all files. Images of 64 pixels keep the update
itself short.

Takes about four minutes. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

SETTINGS = (
    "data.image_size=64 batch.size=32 optimizer.lr=0.1 schedule.warmup_epochs=0 epochs=1 max_updates=1 log_every=1 "
    "launch.nproc=1"
).split()
HELP, FIRST, TORCH, DIRECTORY, SET_UP, END, NEXT = (
    "`lars-train --help`",
    "a run of one update, to its first update",
    "Python and `import torch` alone",
    "the run, to its run directory: imports, settings, checks",
    "the run, until data, network and logs are set up",
    "the run, to its end, with evaluation and checkpoint",
    "in a sweep, from the end of one run to the first update of the next",
)
PROGRAM = [sys.executable, "-m", "lars_train"]


def main() -> None:
    """Measure, print, write."""
    parser = shared.make_parser(__doc__, "bench_startup")
    parser.add_argument("--rounds", type=shared.positive_int, default=5, help="after one that does not count (5)")
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="(resnet50)")
    args = parser.parse_args()
    settings = [*SETTINGS, f"model={args.model}"]
    found: dict[str, list[float]] = {name: [] for name in (HELP, TORCH, DIRECTORY, SET_UP, FIRST, END, NEXT)}
    for number in range(args.rounds + 1):
        times = {
            HELP: time_process([*PROGRAM, "--help"]),
            TORCH: time_process([sys.executable, "-c", "import torch"]),
            **time_run(settings),
            NEXT: time_between_runs(settings),
        }
        if number:
            for name, value in times.items():
                found[name].append(value)
    lines = [
        f"`{shared.command_line(__file__)}` on {shared.cpu_name()}; {shared.software()}. {args.rounds} rounds; "
        f"`lars-train {' '.join(settings)}`.",
        "",
        "| | seconds, median (least to most) |",
        "|---|---:|",
        *(
            f"| {name} | {statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f}) |"
            for name, own in found.items()
        ),
    ]
    shared.publish(lines, args.write, "bench_startup")


def time_process(command: list[str]) -> float:
    """Run a command, which must succeed; return its seconds."""
    began = time.perf_counter()
    with shared.running(command, stdout=subprocess.DEVNULL) as process:
        wait(process)
    return time.perf_counter() - began


def time_run(settings: list[str]) -> dict[str, float]:
    """Run one update; return the seconds to each stage."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        began = time.perf_counter()
        stages = {
            DIRECTORY: (directory / "run.json").exists,
            SET_UP: (directory / "tensorboard").exists,
            FIRST: lambda: has_update(directory / "metrics.jsonl"),
        }
        with shared.running([*PROGRAM, *settings, f"run.dir={directory}"], stdout=subprocess.DEVNULL) as process:
            found = {name: wait_until(process, reached) - began for name, reached in stages.items()}
            wait(process)
            return {**found, END: time.perf_counter() - began}


def time_between_runs(settings: list[str]) -> float:
    """Return the seconds from the end of a sweep's first run to the second run's first update."""
    with tempfile.TemporaryDirectory() as folder:
        sweep = ["-m", *settings, "seed=0,1", f"run.dir={folder}/run${{seed}}", f"hydra.sweep.dir={folder}/sweep"]
        with shared.running([*PROGRAM, *sweep], stdout=subprocess.DEVNULL) as process:
            ended = wait_until(process, (Path(folder) / "run0/final.json").exists)
            began = wait_until(process, lambda: has_update(Path(folder) / "run1/metrics.jsonl"))
            wait(process)
    return began - ended


def wait_until(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> float:
    """Poll every 10 ms until a stage is reached; return the time.

    Raises:
        CalledProcessError: the process ended before that.
    """
    while not reached():
        if process.poll() is not None and not reached():
            raise subprocess.CalledProcessError(process.returncode, process.args)
        time.sleep(0.01)
    return time.perf_counter()


def wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process; raise CalledProcessError if it fails."""
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)


def has_update(path: Path) -> bool:
    """Return True if the log contains an update."""
    return path.exists() and b'"train/loss"' in path.read_bytes()


if __name__ == "__main__":
    shared.exit_on_signals()
    try:
        main()
    except subprocess.CalledProcessError as error:  # the run has printed its own error
        sys.exit(str(error))
