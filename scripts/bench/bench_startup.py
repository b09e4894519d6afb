"""Time the start of lars-train up to its first update, stage by stage.

    python scripts/bench/bench_startup.py [--write docs/benchmarks.md]      # the embedded data set

Wall time of whole processes, in turns: `--help`; Python with `import torch`; a run of one update, up to its run
directory, its logs, the first line in them, and its end; a sweep of two such runs, from the end of the first to the
first update of the second. A first round, which does not count, reads all files. Images of 64 pixels keep the update
itself short.

Takes about four minutes. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

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
DIRECTORY, SET_UP, FIRST, END = (
    "a run of one update, to its run directory: imports, settings, checks",
    "the run, until data, network and logs are set up",
    "the run, to its first update",
    "the run, to its end, with evaluation and checkpoint",
)


def main() -> None:
    """Measure, print, write."""
    parser = shared.make_parser(__doc__, "bench_startup")
    parser.add_argument("--rounds", type=shared.positive_int, default=5, help="after one that does not count (5)")
    parser.add_argument("--model", default="resnet50", metavar="NAME", help="(resnet50)")
    args = parser.parse_args()
    settings = [*SETTINGS, f"model={args.model}"]
    _, *rounds = [
        {
            "`lars-train --help`": time_process([*shared.LARS_TRAIN, "--help"]),
            "Python and `import torch` alone": time_process([sys.executable, "-c", "import torch"]),
            **time_run(settings),
            "in a sweep, from the end of one run to the first update of the next": time_between_runs(settings),
        }
        for _ in range(args.rounds + 1)
    ]
    rows = ((name, shared.spread([times[name] for times in rounds], ".2f", 0, 100)) for name in rounds[0])
    lines = [
        f"`{shared.command_line(__file__)}` on {shared.cpu_name()}; {shared.software()}. {args.rounds} rounds; "
        f"`lars-train {' '.join(settings)}`.",
        "",
        *shared.table(["", "seconds, median (least to most)"], rows),
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
        command = [*shared.LARS_TRAIN, *settings, f"run.dir={directory}"]
        with shared.running(command, stdout=subprocess.DEVNULL) as process:
            found = {name: wait_until(process, reached) - began for name, reached in stages.items()}
            wait(process)
            return {**found, END: time.perf_counter() - began}


def time_between_runs(settings: list[str]) -> float:
    """Return the seconds from the end of a sweep's first run to the second run's first update."""
    with tempfile.TemporaryDirectory() as folder:
        sweep = ["-m", *settings, "seed=0,1", f"run.dir={folder}/run${{seed}}", f"hydra.sweep.dir={folder}/sweep"]
        with shared.running([*shared.LARS_TRAIN, *sweep], stdout=subprocess.DEVNULL) as process:
            ended = wait_until(process, (Path(folder) / "run0/final.json").exists)
            began = wait_until(process, lambda: has_update(Path(folder) / "run1/metrics.jsonl"))
            wait(process)
    return began - ended


def wait_until(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> float:
    """Poll every 10 ms until a stage is reached; return the time. Exit if the process ends before that."""
    while not reached():
        if process.poll() is not None and not reached():
            sys.exit(f"{process.args!r}: ended with code {process.returncode}")
        time.sleep(0.01)
    return time.perf_counter()


def wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process; exit if it fails."""
    if process.wait():
        sys.exit(f"{process.args!r}: ended with code {process.returncode}")


def has_update(path: Path) -> bool:
    """Return True if the log contains an update."""
    return path.exists() and b'"train/loss"' in path.read_bytes()


if __name__ == "__main__":
    shared.exit_on_signals()
    main()
