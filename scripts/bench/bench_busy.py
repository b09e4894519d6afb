"""How fast a run trains on a CPU that other work wants too, by how its threads wait for one another.

    python scripts/bench/bench_busy.py [--write docs/performance.md]            # the bare run and ResNet-50; 15 minutes
    python scripts/bench/bench_busy.py -- model=resnet101 …                     # another run
    python scripts/bench/bench_busy.py --environments '' GOMP_SPINCOUNT=300000  # by other settings of the environment

Each environment is one column: '' stands for what lars-train itself chooses, others for variables that a user sets
(several with spaces between). Their runs are started, and then go on for a few seconds each by turns, so that a machine
whose speed changes from minute to minute changes it for all. Images are counted by the updates in the log; evaluations
take of the time. The busy processes are loops of this script's own, as many as a row says.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from arguments import count, seconds
from child import end_on_signals, stop
from page import between_markers, command_line, cpu_name, writable_page

# What libgomp does by itself: about as many rounds of an empty loop before a thread sleeps,
# https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html.
LIBRARY = "GOMP_SPINCOUNT=300000"
# Updates that take longer, for memory and caches are new.
_FIRST = 5
RUNS = (
    (),
    tuple(
        "model=resnet50 data=synthetic data.train_count=1600 data.val_count=16 data.image_size=64 batch.size=16 "
        "model.ghost_batch=16 optimizer.lr=0.01 schedule.warmup_epochs=0".split()
    ),
)
"""Settings of the bare run, and of a short one of ResNet-50."""
_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="busy processes (0 1 2)")
    parser.add_argument(
        "--environments", nargs="+", default=["", LIBRARY, "OMP_WAIT_POLICY=passive"], metavar="'NAME=VALUE …'"
    )
    parser.add_argument("--rounds", type=count, default=10, help="(10)")
    parser.add_argument("--seconds", type=seconds, default=4.0, help="of a turn (4)")
    parser.add_argument("--write", type=writable_page("bench_busy"), metavar="PAGE", help="put the table on the page")
    parser.add_argument("settings", nargs="*", help="of lars-train, behind --")
    args = parser.parse_args()
    lines = [
        f"`{command_line(__file__)}` on {cpu_name()}, {len(os.sched_getaffinity(0))} cores; torch {torch.__version__}. "
        f"Images/s in {args.rounds} turns of {args.seconds:g} s, mean (least to most of a turn), and the share of the "
        "same run's beside the fewest busy processes."
    ]
    for settings in [args.settings] if args.settings else RUNS:
        lines += table(args, settings)
    print("\n".join(lines))
    if args.write:
        args.write.write_text(between_markers(args.write.read_text(), "bench_busy", lines))


def table(args: argparse.Namespace, settings: Sequence[str]) -> list[str]:
    """Measure one run, and return its part of the page."""
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ended:
        names = dict.fromkeys(args.environments)
        turns = {name: Turns(Path(folder) / str(i), settings, name, ended) for i, name in enumerate(names)}
        for number in range(args.rounds):
            for busy in args.busy:
                # Back and forth, so that none is always behind the same one.
                for name in names if number % 2 else reversed(names):
                    found.setdefault((name, busy), []).append(turns[name].images_per_s(busy, args.seconds))
            told = ", ".join(f"{name or 'as it is'} {busy}: {own[-1]:.0f}" for (name, busy), own in found.items())
            print(f"round {number + 1}: {told}", file=sys.stderr, flush=True)
    return [
        "",
        f"`{shlex.join(['lars-train', *settings])}`",
        "",
        f"| | {' | '.join(f'`{name}`' if name else 'as it is' for name in names)} |",
        f"|---|{'---:|' * len(names)}",
        *(
            f"| {'alone' if not busy else f'beside {busy} busy'} | "
            f"{' | '.join(cell(found, name, busy, args.busy[0]) for name in names)} |"
            for busy in args.busy
        ),
    ]


def cell(found: dict[tuple[str, int], list[float]], name: str, busy: int, least: int) -> str:
    """Images/s beside `busy` processes in environment `name`, and relative to those beside the fewest."""
    own, quiet = found[name, busy], statistics.mean(found[name, least])
    share = "" if busy == least else f" = {statistics.mean(own) / quiet:.2f}"
    return f"{statistics.mean(own):,.3g} ({min(own):,.3g} to {max(own):,.3g}){share}"


class Turns:
    """A run that stands still but for its turns."""

    def __init__(self, folder: Path, settings: Sequence[str], variables: str, ended: ExitStack) -> None:
        """Start it, wait for its first updates, and stop it. `variables`: of its environment, besides the others."""
        environment = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
        environment |= dict(word.split("=", 1) for word in variables.split())
        folder.mkdir()
        own = ["epochs=100000", "schedule.scale_warmup=false", "log_every=1", f"run.dir={folder}/run", "verbosity=0"]
        self._log = folder / "run/metrics.jsonl"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lars_train", *settings, *own],
            env=environment,
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        ended.callback(self._end)
        while len(self._updates()) < _FIRST:
            if self._process.poll() is not None:
                raise subprocess.CalledProcessError(self._process.returncode, "lars-train")
            time.sleep(0.1)
        self._process.send_signal(signal.SIGSTOP)
        record = json.loads((folder / "run/run.json").read_text())
        self._images = record["plan"]["global_batch"]

    def images_per_s(self, busy: int, span: float) -> float:
        """Images a second in a turn of `span` seconds, beside so many busy processes."""
        with loops(busy):
            before, began = len(self._updates()), time.perf_counter()
            self._process.send_signal(signal.SIGCONT)
            time.sleep(span)
            self._process.send_signal(signal.SIGSTOP)
            passed = time.perf_counter() - began
        return float((len(self._updates()) - before) * self._images / passed)

    def _updates(self) -> list[str]:
        lines = self._log.read_text().splitlines() if self._log.is_file() else []
        return [line for line in lines if "train/images_per_s" in line]

    def _end(self) -> None:
        # What it stands in the middle of need not be kept.
        self._process.kill()
        self._process.wait()


@contextmanager
def loops(number: int) -> Iterator[None]:
    """Within it so many processes keep a core busy each."""
    with ExitStack() as ended:
        for _ in range(number):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            ended.callback(stop, process)
        yield


if __name__ == "__main__":
    end_on_signals()
    main()
