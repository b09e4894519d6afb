"""Time a bare `lars-train` while other processes use the same CPU, for several wait policies of its OpenMP threads.

    python scripts/bench/bench_busy.py [--write docs/benchmarks.md]
    python scripts/bench/bench_busy.py --environments '' GOMP_SPINCOUNT=300000  # other environment variables

Each environment is a column: '' is the default of lars-train, the others are variables separated by spaces. The runs
take turns of a few seconds, so a change in the machine's speed affects all of them. Images are counted by the updates
in the log; the time includes evaluations. The busy processes are Python loops.

Takes about seven minutes. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

# libgomp's default: about this many iterations of an empty loop before a thread sleeps,
# https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html.
LIBRARY = "GOMP_SPINCOUNT=300000"
WARM_UP = 5
BUSY = (0, 1, 2)
"""Numbers of busy processes."""
Rates = dict[tuple[str, int], list[float]]
"""Images/s of each turn, by environment and number of busy processes."""


def main() -> None:
    """Measure, print, write."""
    parser = shared.make_parser(__doc__, "bench_busy")
    environments = ["", LIBRARY, "OMP_WAIT_POLICY=passive"]
    parser.add_argument("--environments", nargs="+", default=environments, metavar="'NAME=VALUE …'")
    parser.add_argument("--rounds", type=shared.positive_int, default=10, help="(10)")
    parser.add_argument("--seconds", type=float, default=4.0, help="per turn (4)")
    args = parser.parse_args()
    lines = [
        f"`{shared.command_line(__file__)}` on {shared.cpu_name()}, {len(os.sched_getaffinity(0))} cores; "
        f"{shared.software()}. Images/s in {args.rounds} turns of {args.seconds:g} s: mean (slowest to fastest turn), "
        "and its ratio to the mean of the same run without other processes."
    ]
    shared.publish([*lines, *table(measure(args))], args.write, "bench_busy")


def measure(args: argparse.Namespace) -> Rates:
    """Start one run per environment; return the images/s of their turns."""
    found: Rates = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as runs:
        paused = {
            name: PausedRun(Path(folder) / str(i), name, runs)
            for i, name in enumerate(dict.fromkeys(args.environments))
        }
        for number in range(args.rounds):
            for busy in BUSY:
                # In alternating directions, so that no run always follows the same one.
                for name in paused if number % 2 else reversed(paused):
                    with busy_loops(busy):
                        found.setdefault((name, busy), []).append(paused[name].images_per_s(args.seconds))
    return found


def table(found: Rates) -> list[str]:
    """Return a table with a column per environment."""
    names = list(dict.fromkeys(name for name, _ in found))

    def cell(name: str, busy: int) -> str:
        own, quiet = found[name, busy], statistics.mean(found[name, 0]) or math.nan
        share = "" if busy == 0 else f" = {statistics.mean(own) / quiet:.2f}"
        return f"{statistics.mean(own):,.3g} ({min(own):,.3g} to {max(own):,.3g}){share}"

    heads = ["", *(f"`{name}`" if name else "default" for name in names)]
    rows = ([f"beside {busy} busy" if busy else "alone", *(cell(name, busy) for name in names)] for busy in BUSY)
    return ["", *shared.table(heads, rows)]


class PausedRun:
    """A run that is paused (SIGSTOP) except during its turns."""

    def __init__(self, folder: Path, variables: str, runs: ExitStack) -> None:
        """Start the run with `variables` in its environment, wait for its first updates, and pause it."""
        chosen = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
        environment = {name: value for name, value in os.environ.items() if name not in chosen}
        environment |= dict(word.split("=", 1) for word in variables.split())
        folder.mkdir()
        own = ["epochs=100000", "schedule.scale_warmup=false", "log_every=1", f"run.dir={folder}/run", "verbosity=0"]
        self._log = folder / "run/metrics.jsonl"
        command = [*shared.LARS_TRAIN, *own]
        self._process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
        runs.callback(self._process.wait)
        runs.callback(self._process.kill)  # no result is lost: the log is read between turns
        while self._updates() < WARM_UP:
            if self._process.poll() is not None:
                sys.exit(f"{command}: ended with code {self._process.returncode}")
            time.sleep(0.1)
        self._process.send_signal(signal.SIGSTOP)
        self._images = json.loads((folder / "run/run.json").read_text())["plan"]["global_batch"]

    def images_per_s(self, span: float) -> float:
        """Let the run continue for `span` seconds; return its images/s."""
        before, began = self._updates(), time.perf_counter()
        self._process.send_signal(signal.SIGCONT)
        time.sleep(span)
        self._process.send_signal(signal.SIGSTOP)
        elapsed = time.perf_counter() - began
        return float((self._updates() - before) * self._images / elapsed)

    def _updates(self) -> int:
        return self._log.read_text().count('"train/images_per_s"') if self._log.is_file() else 0


@contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """Keep `number` cores busy within the context."""
    with ExitStack() as loops:
        for _ in range(number):
            loops.callback(shared.stop, subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        yield


if __name__ == "__main__":
    shared.exit_on_signals()
    main()
