"""Time training steps: lars-train's update beside bare loops and timm's step.

    python scripts/bench/bench_step.py [--write docs/performance.md]      # ResNet-50 at 224 and a small ResNet at 32
    python scripts/bench/bench_step.py --device cuda --starts 1 --rounds 9 --seconds 1 [--write docs/performance.md]
    python scripts/bench/bench_step.py --device cuda --case resnet50 --ghost 32 --sweep 256 128 64 32  # by micro-batch

All contenders take the same images from memory, one micro-batch per update, which is one ghost batch unless `--ghost`
says otherwise. They take turns of at least one update; wall time counts. The placement of a process's memory changes
its speed by several percent for its whole life. Contenders that keep freed memory, as lars-train does, therefore share
a process and are compared within it; each other contender has its own process, as in practice. All processes are
restarted a few times. On a GPU all share one process, and a turn ends when the device has finished.

- (a) a bare loop with the defaults of torchvision's references/classification: float32, NCHW, eager, SGD
- (b) timm's step: its network, optimizer and loss, channels_last, autocast if the processor has bf16; and the same with
  freed memory kept, for which timm has no option
- (c) the best bare loop: the fastest precision, channels_last, torch.compile, fused SGD, freed memory kept (malloc set
  as in lars_train/training/device.py); and the same without compile
- (d) lars-train's default update: LARS, ghost batch norm, schedule, guard, meters; with compile=true; and "without the
  trainer": the same network, optimizer and loss in a loop. It takes images from host memory; the others have theirs
  normalized on the device. The cost of the trainer itself is too small for this: see bench_trainer.py.

Memory is the growth of the peak during two updates, of a process with one contender or, on a GPU, of the device.

`--sweep` measures one configuration after another in this process and prints each row at once: each contender at each
micro-batch, and (d) in ghost batches of `--ghost` and of the whole micro-batch. A configuration that fails gets a row
with the reason. A signal loses only the current row.

Takes about 25 minutes on two cores, a few on a GPU. Figures: docs/performance.md.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import resource
import sys
import time
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__)
    PARSER.add_argument("--starts", type=shared.positive_int, default=4, help="restarts of all processes (4)")
    PARSER.add_argument("--rounds", type=shared.positive_int, default=18, help="per start (18)")
    # A median over many short turns leaves out the short disturbances of a shared machine.
    PARSER.add_argument("--seconds", type=shared.seconds, default=0.3, help="per turn, at least one update (0.3)")
    PARSER.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    PARSER.add_argument("--case", choices=("resnet50", "small"), help="only this network")
    PARSER.add_argument("--images", type=shared.positive_int, help="per micro-batch")
    PARSER.add_argument("--size", type=shared.positive_int, help="side of an image in pixels")
    PARSER.add_argument("--ghost", type=shared.positive_int, help="images per ghost batch (all)")
    PARSER.add_argument("--only", nargs="+", metavar="CONTENDER", help="only these, by their names in the tables")
    PARSER.add_argument("--sweep", nargs="+", type=shared.positive_int, metavar="IMAGES", help="these micro-batches")
    PARSER.add_argument("--threads", type=shared.positive_int, help="of torch (all cores)")
    PARSER.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the page's markers")
    ARGS = PARSER.parse_args()

import numpy as np
import torch
from training_steps import (
    BARE,
    BEST,
    BEST_EAGER,
    CASES,
    CASES_ON_CUDA,
    OURS,
    STEPS,
    TIMM,
    TIMM_KEPT,
    TUNED,
    WITHOUT,
    Case,
    Step,
    precision,
)

from lars_train.config import Config
from lars_train.training.device import available_cores, set_up

SYNC_EVERY = 10
"""Updates after which the host waits for a GPU, as at log lines."""
GHOSTED = (OURS, TUNED, WITHOUT)
"""The contenders that have ghost batches."""
TOGETHER = (TIMM_KEPT, BEST_EAGER, BEST, OURS, TUNED, WITHOUT)
"""The contenders that share a process, which is set up as the program sets up its own."""
Times = dict[str, list[float]]
"""Seconds of an update by contender, round by round."""


class Worker:
    """A process with some contenders: `memory` in MB by contender, and the reason by contender `skipped`."""

    def __init__(self, names: list[str], case: Case, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, case, names, threads))
        self._process.start()
        theirs.close()
        self.memory: dict[str, float]
        self.skipped: dict[str, str]
        try:
            self.memory, self.skipped = self._answer()
        except BaseException:
            self.close()
            raise

    def turn(self, name: str, seconds: float) -> float:
        """Let `name` run for at least `seconds` and one update; return the mean seconds of an update."""
        self._pipe.send((name, seconds))
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(shared.GRACE_S)
        self._process.kill()
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ChildProcessError(f"a worker ended with code {self._process.exitcode}") from None


def serve(pipe: Connection, case: Case, names: list[str], threads: int) -> None:
    """Run a worker: two updates of each contender (the first compiles), then a turn for each message."""
    torch.set_num_threads(threads)
    # On a GPU all contenders share the set-up of lars-train.
    if case.device.type == "cuda" or any(name in TOGETHER for name in names):
        set_up(Config(), case.device, threads)
    steps: dict[str, Step] = {}
    memory: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name in names:
        before = peak_memory(case.device, reset=True)
        try:
            step = STEPS[name](case)
            step()
            step()
        except Exception as error:  # anything that a peer or a compiler raises
            skipped[name] = shared.first_line(error)
        else:
            steps[name], memory[name] = step, peak_memory(case.device) - before
    gc.freeze()  # keeps the collections before each turn short
    pipe.send((memory, skipped))
    while True:
        try:
            name, seconds = pipe.recv()
        except EOFError:
            return
        gc.collect()
        pipe.send(turn(steps[name], case.device, seconds))


def turn(step: Step, device: torch.device, seconds: float) -> float:
    """Run for at least `seconds` and one update; return the mean seconds of an update."""
    started, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - started < seconds:
        step()
        count += 1
        if device.type == "cuda" and count % SYNC_EVERY == 0:
            torch.cuda.synchronize()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def peak_memory(device: torch.device, *, reset: bool = False) -> float:
    """Return the peak memory in MB: of this process, or of the GPU since the last `reset`."""
    if device.type == "cuda":
        if reset:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage's figure starts at the parent process's peak.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sweep(case: Case, args: Namespace) -> None:
    """Print a table of `case` with the micro-batches of `args.sweep`, row by row."""
    set_up(Config(), case.device, torch.get_num_threads())
    print(f"{case.name}, images of {case.size} x {case.size}, {precision(case.device).name}:\n")
    print("| | micro-batch | ghost batch | ms an update, median (10th to 90th percentile) | images/s | memory, MB |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    names: list[str] = args.only or [OURS, BEST_EAGER, TUNED, BEST]
    for images in args.sweep:
        ghost = args.ghost or images
        rows = [(name, ghost if name in GHOSTED else images) for name in names]
        rows += [(name, images) for name in names if name in GHOSTED and ghost < images]
        for name, own in rows:
            cells = sweep_cells(name, replace(case, images=images, ghost=own), args)
            print(f"| {name} | {images} | {own if name in GHOSTED else '-'} | {' | '.join(cells)} |", flush=True)
            if name in (BEST, TUNED):
                torch.compiler.reset()
            gc.collect()
            if case.device.type == "cuda":
                torch.cuda.empty_cache()
    print(flush=True)


def sweep_cells(name: str, case: Case, args: Namespace) -> tuple[str, str, str]:
    """Return the time, speed and memory of a configuration, or the reason of its failure."""
    before = peak_memory(case.device, reset=True)
    try:
        step = STEPS[name](case)
        step()
        turn(step, case.device, 0.0)
        # On the CPU the peak covers the whole process, which has measured other configurations before.
        memory = f"{peak_memory(case.device) - before:,.0f}" if case.device.type == "cuda" else "-"
        times = 1000 * np.array([turn(step, case.device, args.seconds) for _ in range(args.rounds)])
    except Exception as error:  # out of memory, or anything that a compiler or a peer raises
        return shared.first_line(error).replace("|", "\\|"), "-", "-"
    low, middle, high = np.percentile(times, [10, 50, 90])
    return f"{middle:,.1f} ({low:,.1f} to {high:,.1f})", f"{1000 * case.images / middle:,.1f}", memory


def measure(case: Case, args: Namespace, skipped: list[str], times: Times, memory: dict[str, float]) -> None:
    """Fill in `times` and `memory`. After an exception, `times` holds the complete rounds."""
    threads, on_cpu = torch.get_num_threads(), case.device.type == "cpu"

    def start(stack: ExitStack, names: list[str]) -> Worker:
        worker = Worker(names, case, threads)
        stack.callback(worker.close)
        return worker

    def note(worker: Worker) -> None:
        memory.update(worker.memory)
        for name, why in worker.skipped.items():
            if name in (BARE, BEST_EAGER, OURS, WITHOUT):
                raise ChildProcessError(why)
            skipped.append(f"{case.name}: {name}: {why}")

    # On a GPU torch always keeps freed memory.
    names: list[str] = args.only or [name for name in STEPS if on_cpu or name != TIMM_KEPT]
    groups = [names]
    if on_cpu:
        for name in names:
            with ExitStack() as alone:
                note(start(alone, [name]))
        together = [name for name in memory if name in TOGETHER]
        groups = [[name] for name in memory if name not in TOGETHER] + ([together] if together else [])
    for number in range(args.starts):
        with ExitStack() as stack:
            worker_of: dict[str, Worker] = {}
            for group in groups:
                worker = start(stack, group)
                if not memory:
                    note(worker)
                worker_of |= dict.fromkeys(worker.memory, worker)
            order = list(memory)
            for turns in range(args.rounds):
                random.Random(args.rounds * number + turns).shuffle(order)
                found = {name: worker_of[name].turn(name, args.seconds) for name in order}
                for name in memory:
                    times.setdefault(name, []).append(found[name])


def table(case: Case, times: Times, memory: dict[str, float]) -> list[str]:
    """Return a table of images/s, memory, and median ratios of speed."""

    def ratio(name: str, to: str) -> str:
        return f"{np.median(np.array(times[to]) / np.array(times[name])):.2f}" if to in times else "-"

    lines = [
        f"{case.name}, {case.images} images of {case.size} x {case.size} in ghost batches of {case.ghost}, "
        f"{precision(case.device).name}:",
        "",
        "| | images/s, median (10th to 90th percentile) | ÷ (a) | ÷ (b) | ÷ (c) compiled | ÷ (c) eager | memory, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in times.items():
        low, middle, high = np.percentile(case.images / np.array(own), [10, 50, 90])
        cells = [
            f"{middle:,.1f} ({low:,.1f} to {high:,.1f})",
            *(ratio(name, to) for to in (BARE, TIMM, BEST, BEST_EAGER)),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {memory[name]:,.0f} |")
    return [*lines, ""]


def select_cases(parser: ArgumentParser, args: Namespace) -> list[Case]:
    """Check the arguments; return the selected cases."""
    if args.sweep and (args.images or args.write):
        parser.error("--sweep chooses the micro-batches; leave out --images and --write")
    if unknown := set(args.only or ()) - set(STEPS):
        parser.error(f"--only {unknown.pop()!r}: no such contender; choose from {', '.join(map(repr, STEPS))}")
    shared.require_page(parser, args.write, marker(args))
    cases = []
    for case in CASES if args.device == "cpu" else CASES_ON_CUDA:
        if args.case in (None, case.name):
            images = args.images or case.images
            for size in args.sweep or [images]:
                if size % (args.ghost or size):
                    parser.error(f"--ghost {args.ghost}: does not divide {size} images")
            cases.append(replace(case, images=images, size=args.size or case.size, ghost=args.ghost or images))
    shared.require_cuda(parser, args.device)
    return cases


def marker(args: Namespace) -> str:
    """Return the marker of the device's part of the page."""
    return "bench_step" if args.device == "cpu" else "bench_step cuda"


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    cases = select_cases(parser, args)
    torch.set_num_threads(args.threads or available_cores())
    device = f"{shared.cpu_name()}, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    what = f"`{shared.command_line(__file__)}` on {device}; {shared.software('torchvision', 'timm')}."
    if args.sweep:
        print(f"{what} {args.rounds} turns of {args.seconds:g} s.\n", flush=True)
        for case in cases:
            sweep(case, args)
        return
    lines = [f"{what} {args.starts} starts of {args.rounds} rounds; ratios are medians over the rounds.", ""]
    print("\n".join(lines), flush=True)
    skipped: list[str] = []
    for case in cases:
        times: Times = {}
        memory: dict[str, float] = {}
        try:
            measure(case, args, skipped, times, memory)
        finally:
            if times:  # also after a signal: the complete rounds
                lines += table(case, times, memory)
                print("\n".join(table(case, times, memory)), flush=True)
    lines += [f"- left out: {why}" for why in skipped]
    print("\n".join(lines[len(lines) - len(skipped) :]))
    shared.write_page(lines, args.write, marker(args))


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
