"""Time training steps: lars-train's update beside bare loops and timm's step.

    python scripts/bench/bench_step.py [--write docs/benchmarks.md]      # ResNet-50 at 224 and a small ResNet at 32
    python scripts/bench/bench_step.py --device cuda --starts 1 --rounds 9 --seconds 1 [--write docs/benchmarks.md]
    python scripts/bench/bench_step.py --device cuda --case resnet50 --ghost 32 --sweep 256 128 64 32  # by micro-batch

All contenders take the same images from memory, one micro-batch per update, which is one ghost batch unless `--ghost`
says otherwise. All run in one process, with as many threads and the same malloc settings as lars-train. They take turns
of at least one update; wall time counts. On a GPU a turn ends when the device has finished. The placement of a
process's memory changes its speed by several percent for its whole life, so the process is restarted a few times.

- (a) a bare loop with the defaults of torchvision's references/classification: float32, NCHW, eager, SGD
- (b) timm's step: its network, optimizer and loss, channels_last, autocast if the processor has bf16
- (c) the best bare loop: the fastest precision, channels_last, torch.compile, fused SGD; and the same without compile
- (d) lars-train's default update: LARS, ghost batch norm, schedule, guard, meters; with compile=true; and "without the
  trainer": the same network, optimizer and loss in a loop. lars-train reads images from host memory; those of the
  others are on the device. "unfused", on a GPU: batch norm, ReLU and the sum with the shortcut are separate operations;
  "graphs": with cuda_graphs=true.

Memory, on a GPU, is the growth of the device's peak during two updates.

`--sweep` measures one configuration after another in this process and prints each row at once: each contender at each
micro-batch, and (d) in ghost batches of `--ghost` and of the whole micro-batch. A configuration that fails gets a row
with the reason. A signal loses only the current row.

Takes about 25 minutes on two cores, a few on a GPU. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "bench_step", "bench_step cuda")
    PARSER.add_argument("--starts", type=shared.positive_int, default=4, help="restarts of the process (4)")
    PARSER.add_argument("--rounds", type=shared.positive_int, default=18, help="per start (18)")
    # A median over many short turns leaves out the short disturbances of a shared machine.
    PARSER.add_argument("--seconds", type=float, default=0.3, help="per turn, at least one update (0.3)")
    PARSER.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    PARSER.add_argument("--case", choices=("resnet50", "small"), help="only this network")
    PARSER.add_argument("--images", type=shared.positive_int, help="per micro-batch")
    PARSER.add_argument("--size", type=shared.positive_int, help="side of an image in pixels")
    PARSER.add_argument("--ghost", type=shared.positive_int, help="images per ghost batch (all)")
    PARSER.add_argument("--only", nargs="+", metavar="CONTENDER", help="only these, by their names in the tables")
    PARSER.add_argument("--sweep", nargs="+", type=shared.positive_int, metavar="IMAGES", help="these micro-batches")
    ARGS = PARSER.parse_args()

import numpy as np
import torch
from training_steps import BARE, BEST, BEST_EAGER, CASES, GRAPHS, OURS, STEPS, TIMM, TUNED, UNFUSED, WITHOUT, Case, Step

from lars_train.config import Config
from lars_train.models.cuda_graphs import WARM_UPS
from lars_train.training.device import available_cores, choose_precision, set_up

SYNC_EVERY = 10
"""Updates after which the host waits for a GPU, as at log lines."""
GHOSTED = (OURS, UNFUSED, GRAPHS, TUNED, WITHOUT)
"""The contenders that have ghost batches."""
Times = dict[str, list[float]]
"""Seconds of an update by contender, round by round."""


def measure(case: Case, args: Namespace, skipped: list[str], times: Times, memory: dict[str, float]) -> None:
    """Fill in `times` and `memory`. After an exception, `times` holds the complete rounds."""
    context = multiprocessing.get_context("spawn")
    for number in range(args.starts):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=serve, args=(theirs, case, args, number))
        process.start()
        theirs.close()
        try:
            found, reasons = mine.recv()
            if OURS in reasons:
                raise ChildProcessError(reasons[OURS])
            if number == 0:
                memory |= found
                skipped += [f"{case.name}: {name}: {why}" for name, why in reasons.items()]
            for _ in range(args.rounds):
                seconds = mine.recv()
                for name in found:
                    times.setdefault(name, []).append(seconds[name])
        except EOFError:
            process.join()
            raise ChildProcessError(f"the process ended with code {process.exitcode}") from None
        finally:
            process.kill()
            process.join()


def serve(pipe: Connection, case: Case, args: Namespace, number: int) -> None:
    """Run a start: send the memory of each contender and the reasons of failures, then the seconds of each round."""
    set_up(Config(), case.device, available_cores())
    steps: dict[str, Step] = {}
    memory: dict[str, float] = {}
    reasons: dict[str, str] = {}
    on_gpu = case.device.type == "cuda"
    for name in args.only or [name for name in STEPS if on_gpu or name not in (UNFUSED, GRAPHS)]:
        before = peak_memory(case.device, reset=True)
        try:
            step = STEPS[name](case)
            begin(step, name)
        except Exception as error:  # anything that a peer or a compiler raises
            reasons[name] = shared.first_line(error)
        else:
            steps[name], memory[name] = step, peak_memory(case.device) - before
    gc.freeze()  # keeps the collections before each turn short
    pipe.send((memory, reasons))
    order = list(steps)
    for turns in range(args.rounds):
        random.Random(args.rounds * number + turns).shuffle(order)
        pipe.send({name: turn(steps[name], case.device, args.seconds) for name in order})


def begin(step: Step, name: str) -> None:
    """Make the updates that compile, or after which passes are recorded."""
    for _ in range(WARM_UPS + 2 if name == GRAPHS else 2):
        step()


def turn(step: Step, device: torch.device, seconds: float) -> float:
    """Run for at least `seconds` and one update; return the mean seconds of an update."""
    gc.collect()
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
    """Return the peak memory of a GPU in MB since the last `reset`; 0 on the CPU."""
    if device.type == "cpu":
        return 0.0
    if reset:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**20


def table(case: Case, times: Times, memory: dict[str, float]) -> list[str]:
    """Return a table of images/s, memory, and median ratios of speed."""

    def ratio(name: str, to: str) -> str:
        return f"{np.median(np.array(times[to]) / np.array(times[name])):.2f}" if to in times else "-"

    on_gpu = case.device.type == "cuda"
    heads = ["images/s, median (10th to 90th percentile)", "÷ (a)", "÷ (b)", "÷ (c) compiled", "÷ (c) eager"]
    heads += ["memory, MB"] * on_gpu
    rows = []
    for name, own in times.items():
        cells = [name, shared.spread(case.images / np.array(own), ",.1f")]
        cells += [ratio(name, to) for to in (BARE, TIMM, BEST, BEST_EAGER)]
        rows.append(cells + [f"{memory[name]:,.0f}"] * on_gpu)
    images = f"{case.images} images of {case.size} x {case.size} in ghost batches of {case.ghost}"
    precision = choose_precision("auto", case.device).name
    return [f"{case.name}, {images}, {precision}:", "", *shared.table(["", *heads], rows), ""]


def sweep(case: Case, args: Namespace) -> None:
    """Print a table of `case` with the micro-batches of `args.sweep`, row by row."""
    set_up(Config(), case.device, available_cores())
    precision = choose_precision("auto", case.device).name
    print(f"{case.name}, images of {case.size} x {case.size}, {precision}:\n")
    print("| | micro-batch | ghost batch | ms an update, median (10th to 90th percentile) | images/s | memory, MB |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    names: list[str] = args.only or [OURS, UNFUSED, BEST_EAGER, TUNED, BEST]
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
        begin(step, name)
        turn(step, case.device, 0.0)
        memory = peak_memory(case.device) - before
        times = 1000 * np.array([turn(step, case.device, args.seconds) for _ in range(args.rounds)])
    except Exception as error:  # out of memory, or anything that a compiler or a peer raises
        return shared.first_line(error).replace("|", "\\|"), "-", "-"
    speed = f"{1000 * case.images / np.median(times):,.1f}"
    return shared.spread(times, ",.1f"), speed, f"{memory:,.0f}" if memory else "-"


def select_cases(parser: ArgumentParser, args: Namespace) -> list[Case]:
    """Check the arguments; return the selected cases."""
    if args.sweep and (args.images or args.write):
        parser.error("--sweep chooses the micro-batches; leave out --images and --write")
    if unknown := set(args.only or ()) - set(STEPS):
        parser.error(f"--only {unknown.pop()!r}: no such contender; choose from {', '.join(map(repr, STEPS))}")
    cases = []
    for case in CASES[args.device]:
        if args.case in (None, case.name):
            images = args.images or case.images
            for size in args.sweep or [images]:
                if size % (args.ghost or size):
                    parser.error(f"--ghost {args.ghost}: does not divide {size} images")
            cases.append(replace(case, images=images, size=args.size or case.size, ghost=args.ghost or images))
    shared.require_cuda(parser, args.device)
    return cases


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    cases = select_cases(parser, args)
    cores = f"CUDA {torch.version.cuda}" if args.device == "cuda" else f"{available_cores()} threads"
    where = f"{shared.device_name(args.device)}, {cores}"
    what = f"`{shared.command_line(__file__)}` on {where}; {shared.software('torchvision', 'timm')}."
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
    left_out = [f"- left out: {why}" for why in skipped]
    print("\n".join(left_out))
    shared.write_page(lines + left_out, args.write, "bench_step" if args.device == "cpu" else "bench_step cuda")


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
