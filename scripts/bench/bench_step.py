"""How fast training steps are: lars-train's own beside bare loops and timm's step.

    python scripts/bench/bench_step.py [--write docs/performance.md]      # ResNet-50 at 224 and a small ResNet at 32
    python scripts/bench/bench_step.py --device cuda --starts 1 --rounds 9 --seconds 1 [--write docs/performance.md]
    python scripts/bench/bench_step.py --device cuda --case resnet50 --ghost 32 --sweep 256 128 64 32  # by micro-batch

All have the same images in memory, and one micro-batch an update, which is one ghost batch unless `--ghost` says
otherwise. They take turns, an update or a few each, the others waiting. What counts is wall time. Where a process finds
its memory makes it faster or slower by several percent for as long as it lives. So those that keep freed memory, as the
program does, share a process, and are compared within it; the others have one each, as their users would have it. All
processes are started anew a few times. On a GPU all share one process, and a turn ends when the device has done it.

- (a) a bare loop as torchvision's references/classification runs by default: float32, NCHW, eager, SGD
- (b) timm's step: its network, optimizer and loss, channels_last, autocast where the processor has bf16; and the same
  with freed memory kept, which no flag of timm's does
- (c) the best bare loop: the fastest precision, channels_last, torch.compile, fused SGD, freed memory kept (as
  lars_train/training/device.py has malloc do it); and the same without compile
- (d) lars-train's update, from images in the host's memory (those of the others are normalised, and on the device):
  LARS, ghost batch norm, schedule, guard, meters, as a run makes it by default; with compile=true; and "without
  the trainer": the same network, optimizer and loss in a loop without the trainer around it (what that costs is too
  little to be seen between processes: bench_trainer.py)

Memory is the most that a process with nothing else has had in two updates, less what it had before them; on a GPU, of
the device's.

`--sweep` measures one configuration after another in this process, and prints each row when it is measured: each
contender at each micro-batch, and (d) both in ghost batches of `--ghost` and in a whole one. A configuration that fails
is a row with the reason. A signal loses only the row that is being measured.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import random
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from arguments import count, seconds
from child import end_on_signals
from page import between_markers, check_page, command_line, cpu_name
from torch import Tensor, nn
from torch.nn import functional

from lars_train.config import Config, OptimizerConfig, ScheduleConfig
from lars_train.data.loading.loader import Batch, Stream
from lars_train.launch import Ranks
from lars_train.models.factory import build_model
from lars_train.plan import Plan, make_schedule
from lars_train.training.assemble import build_optimizer
from lars_train.training.device import Precision, available_cores, choose_precision, set_up
from lars_train.training.device_prefetch import DevicePrefetcher, RankContext, normalizer
from lars_train.training.distributed import Group
from lars_train.training.trainer import Hyper, Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
AHEAD = 10
"""Updates after which the host waits for a GPU, as at log lines."""
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BARE, TIMM, BEST, BEST_EAGER = "(a) bare, fp32 NCHW", "(b) timm", "(c) best bare, compiled", "(c) best bare, eager"
TIMM_KEPT = "(b) timm, freed memory kept"
OURS, TUNED, WITHOUT = "(d) lars-train", "(d) lars-train, compiled", "(d) without the trainer"
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A network, by both libraries' names, and the images that it takes at once, in ghost batches of `ghost`."""

    name: str
    images: int
    size: int
    classes: int
    ghost: int = 0
    device: torch.device = CPU


# As many of 224 pixels as leave room for all that take turns in 24 GiB; of 32 the least of the recipes' global batches.
CASES = (Case("resnet50", 16, 224, 1000), Case("small", 256, 32, 10))
# The largest micro-batch that a run takes.
CASES_ON_CUDA = (Case("resnet50", 256, 224, 1000, device=CUDA), Case("small", 256, 32, 10, device=CUDA))


def precision(device: torch.device = CPU) -> Precision:
    """What ``precision=auto`` is here."""
    return choose_precision("auto", device)


def pixels(case: Case) -> tuple[Tensor, Tensor]:
    """uint8 images in channels-last memory, and their labels."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (case.images, case.size, case.size, 3), dtype=torch.uint8, generator=draw)
    return images.permute(0, 3, 1, 2), torch.randint(0, case.classes, (case.images,), generator=draw)


def normalised(case: Case, kind: Precision) -> tuple[Tensor, Tensor]:
    """Images as the network takes them, channels last, and labels, on the device."""
    images, labels = pixels(case)
    return normalizer(MEAN, STD, case.device, kind)(images), labels.to(case.device)


def network(case: Case, ghost_batch: int) -> nn.Module:
    """As lars-train makes it."""
    torch.manual_seed(0)
    model = build_model(case.name, num_classes=case.classes, ghost_batch=ghost_batch, zero_gamma=False)
    return model.to(case.device).to(memory_format=torch.channels_last).train()


def plain_network(case: Case) -> nn.Module:
    """With torch's own batch norm, for the loops that are not ours."""
    if case.name.startswith("resnet"):
        from torchvision.models import get_model

        model: nn.Module = get_model(case.name, weights=None, num_classes=case.classes)
        return model.to(case.device).train()
    from lars_train.models.resnet_cifar import CifarResNet

    return CifarResNet(1, num_classes=case.classes).to(case.device).train()


def bare(case: Case) -> Step:
    """(a)"""
    model = plain_network(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    images, labels = normalised(case, choose_precision("fp32", case.device))
    images = images.contiguous()

    def step() -> None:
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def best(case: Case, compiled: bool) -> Step:
    """(c)"""
    model = plain_network(case).to(memory_format=torch.channels_last)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
    kind = precision(case.device)
    images, labels = normalised(case, kind)

    def step() -> None:
        with kind.autocast(case.device):
            logits = forward(images)
        torch.autograd.backward(functional.cross_entropy(logits.float(), labels))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def of_timm(case: Case) -> Step:
    """(b)"""
    timm: Any = importlib.import_module("timm")
    parts: Any = [importlib.import_module(f"timm.{name}") for name in ("loss", "optim", "utils")]
    losses_of, optimizers, utilities = parts
    if not case.name.startswith("resnet"):
        raise LookupError("timm has no such network")
    model = timm.create_model(case.name, num_classes=case.classes).train()
    model = model.to(case.device, memory_format=torch.channels_last)
    optimizer = optimizers.create_optimizer_v2(model, opt="sgd", lr=1e-3, momentum=0.9, weight_decay=1e-4)
    loss_of, losses = losses_of.LabelSmoothingCrossEntropy(0.1), utilities.AverageMeter()
    kind = precision(case.device)
    images, labels = normalised(case, choose_precision("fp32", case.device))

    def step() -> None:
        with kind.autocast(case.device):
            loss = loss_of(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.update(loss.item(), len(images))

    return step


def plan(case: Case, ghost: int) -> Plan:
    """Updates of one micro-batch each, in ghost batches of `ghost`; more updates than will be made."""
    many = 10**6
    return Plan(
        samples=many * case.images,
        nominal_batch=case.images,
        global_batch=case.images,
        ghost_batch=ghost,
        scaled=False,
        raised=False,
        epochs=1,
        updates_per_epoch=many,
        updates=many,
        stop=many,
        warmup_updates=many // 10,
    )


def trainer_of(case: Case, ghost: int, kind: Precision, *, compiled: bool = False) -> Trainer:
    """As a run makes it, for updates of one micro-batch in ghost batches of `ghost`."""
    which, settings = plan(case, ghost), options()
    model = network(case, ghost)
    return Trainer(
        model,
        build_optimizer(settings, model),
        which,
        Hyper(make_schedule(which, Config(optimizer=settings, schedule=ScheduleConfig(power=2.0, form="whole"))), 0.0),
        RankContext(case.device, Group(Ranks()), kind, normalizer(MEAN, STD, case.device, kind)),
        compiled=compiled,
    )


def ours(case: Case, compiled: bool) -> Step:
    """(d)"""
    trainer = trainer_of(case, case.ghost, precision(case.device), compiled=compiled)
    images, labels = pixels(case)
    if case.device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    batches = DevicePrefetcher(Same(Batch(images, labels, ())), case.device)

    def step() -> None:
        trainer.run_update(batches, 1, measure=False)

    return step


class Same(Stream):
    """The same batch at any time."""

    def __init__(self, batch: Batch) -> None:
        self._same = batch

    def __next__(self) -> Batch:
        return self._same

    def ready(self) -> bool:
        return True


def without_trainer(case: Case) -> Step:
    """(d) less the trainer: no schedule, guard, meters, running statistics and counting."""
    kind = precision(case.device)
    model = network(case, case.ghost)
    optimizer = build_optimizer(options(), model)
    normalize = normalizer(MEAN, STD, case.device, kind)
    images, labels = (tensor.to(case.device) for tensor in pixels(case))

    def step() -> None:
        with kind.autocast(case.device):
            logits = model(normalize(images))
        torch.autograd.backward(functional.cross_entropy(logits.to(kind.weights), labels))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def options() -> OptimizerConfig:
    """LARS as the recipe's 32K row has it."""
    return OptimizerConfig(
        name="lars",
        lr=1.0,
        momentum=0.9,
        weight_decay=5e-4,
        decay_norm_bias=True,
        adapt_norm_bias=True,
        eps=1e-8,
        trust_coef=0.001,
    )


SWEPT = (OURS, BEST_EAGER, TUNED, BEST)
"""The contenders of `--sweep` by default."""
GHOSTED = (OURS, TUNED, WITHOUT)
"""The contenders that have ghost batches."""
TOGETHER = (TIMM_KEPT, BEST_EAGER, BEST, OURS, TUNED, WITHOUT)
"""Those that share a process, which is set up as the program sets up its own."""

STEPS: dict[str, Callable[[Case], Step]] = {
    BARE: bare,
    TIMM: of_timm,
    TIMM_KEPT: of_timm,
    BEST_EAGER: lambda case: best(case, compiled=False),
    BEST: lambda case: best(case, compiled=True),
    OURS: lambda case: ours(case, compiled=False),
    TUNED: lambda case: ours(case, compiled=True),
    WITHOUT: without_trainer,
}


class Served:
    """A process with some of them, which waits for their turns: `memory` by name, and why which are `skipped`."""

    def __init__(self, names: Iterable[str], case: Case, threads: int) -> None:
        own = {"--case": case.name, "--images": case.images, "--size": case.size, "--ghost": case.ghost}
        own |= {"--threads": threads, "--device": case.device.type}
        self._command = [sys.executable, __file__, *(str(part) for pair in own.items() for part in pair)]
        self._command += ["--serve", *names]
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            ready = self._answer()
        except BaseException:
            self.end()
            raise
        self.memory: dict[str, float] = ready["memory"]
        self.skipped: dict[str, str] = ready["skipped"]

    def turn(self, name: str, seconds: float) -> float:
        """Seconds of an update of `name`: of as many as fit into `seconds`, one at least."""
        assert self._process.stdin is not None
        print(json.dumps([name, seconds]), file=self._process.stdin, flush=True)
        return float(self._answer())

    def end(self) -> None:
        """Have the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"{shlex.join(self._command)} ended with code {self._process.wait()}")
        return json.loads(line)


def serve(case: Case, names: list[str]) -> None:
    """The process of `names`: two updates of each, the first of which compiles; then a turn for each line of input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # On a GPU all have what a process of the program sets.
    if case.device.type == "cuda" or any(name in TOGETHER for name in names):
        set_up(Config(), case.device, torch.get_num_threads())
    steps: dict[str, Step] = {}
    memory: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name in names:
        before = most_memory(case.device, anew=True)
        try:
            step = STEPS[name](case)
            step()
            step()
        except Exception as error:  # whatever a peer or a compiler raises
            skipped[name] = first_line(error)
        else:
            steps[name], memory[name] = step, most_memory(case.device) - before
    # What is there by now is not looked through at each turn.
    gc.freeze()
    print(json.dumps({"memory": memory, "skipped": skipped}), file=answers, flush=True)
    for line in sys.stdin:
        name, seconds = json.loads(line)
        gc.collect()
        print(json.dumps(turn(steps[name], case.device, seconds)), file=answers, flush=True)


def turn(step: Step, device: torch.device, seconds: float) -> float:
    """Seconds of an update: the mean of as many as fit into `seconds`, one at least."""
    started, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - started < seconds:
        step()
        count += 1
        if device.type == "cuda" and count % AHEAD == 0:
            torch.cuda.synchronize()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def sweep(case: Case, sizes: list[int], args: argparse.Namespace) -> None:
    """Print a Markdown table of `case` with micro-batches of `sizes`, row by row."""
    set_up(Config(), case.device, torch.get_num_threads())
    print(f"{case.name}, images of {case.size} x {case.size}, {precision(case.device).name}:\n")
    print("| | micro-batch | ghost batch | ms an update, median (10th to 90th percentile) | images/s | memory, MB |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    names: list[str] = args.only or list(SWEPT)
    for images in sizes:
        ghost = args.ghost or images
        rows = [(name, ghost if name in GHOSTED else images) for name in names]
        rows += [(name, images) for name in names if name in GHOSTED and ghost < images]
        for name, own in rows:
            cells = measured(name, replace(case, images=images, ghost=own), args.rounds, args.seconds)
            print(f"| {name} | {images} | {own if name in GHOSTED else '-'} | {' | '.join(cells)} |", flush=True)
            if name in (BEST, TUNED):
                torch.compiler.reset()
            gc.collect()
            if case.device.type == "cuda":
                torch.cuda.empty_cache()
    print(flush=True)


def measured(name: str, case: Case, rounds: int, seconds: float) -> tuple[str, str, str]:
    """A configuration's time, speed and memory as cells of a table; in their place why it failed."""
    before = most_memory(case.device, anew=True)
    try:
        step = STEPS[name](case)
        step()
        turn(step, case.device, 0.0)
        # On the CPU the figure is that of the whole process, which has measured others before.
        memory = f"{most_memory(case.device) - before:,.0f}" if case.device.type == "cuda" else "-"
        times = 1000 * np.array([turn(step, case.device, seconds) for _ in range(rounds)])
    except Exception as error:  # out of memory, or whatever a compiler or a peer raises
        return first_line(error).replace("|", "\\|"), "-", "-"
    low, middle, high = np.percentile(times, [10, 50, 90])
    return f"{middle:,.1f} ({low:,.1f} to {high:,.1f})", f"{1000 * case.images / middle:,.1f}", memory


@contextmanager
def served(names: Iterable[str], case: Case) -> Iterator[Served]:
    """A process with `names`, while it is wanted."""
    process = Served(names, case, torch.get_num_threads())
    try:
        yield process
    finally:
        process.end()


def taken(process: Served, case: Case, skipped: list[str]) -> dict[str, float]:
    """MB of each in the process that runs here; why the others do not comes to `skipped`."""
    for name, why in process.skipped.items():
        if name in (BARE, BEST_EAGER, OURS, WITHOUT):
            raise ChildProcessError(why)
        skipped.append(f"{case.name}: {name}: {why}")
    return process.memory


def measure(
    case: Case,
    args: argparse.Namespace,
    skipped: list[str],
    seconds: dict[str, list[float]],
    memory: dict[str, float],
) -> None:
    """Fill in of each: `seconds` of an update, round by round, and `memory`. An exception leaves whole rounds there."""
    on_cpu = case.device.type == "cpu"
    # A GPU's memory is kept by torch for all.
    names: list[str] = args.only or [name for name in STEPS if on_cpu or name != TIMM_KEPT]
    if on_cpu:
        for name in names:
            with served([name], case) as process:
                memory.update(taken(process, case, skipped))
        names = list(memory)
        together = [name for name in names if name in TOGETHER]
        groups = [[name] for name in names if name not in TOGETHER] + ([together] if together else [])
    else:
        groups = [names]
    for start in range(args.starts):
        with ExitStack() as processes:
            of: dict[str, Served] = {}
            for group in groups:
                process = processes.enter_context(served(group, case))
                if not memory:
                    memory.update(taken(process, case, skipped))
                of |= dict.fromkeys(process.memory, process)
            order = list(memory)
            for number in range(args.rounds):
                random.Random(args.rounds * start + number).shuffle(order)
                found = {name: of[name].turn(name, args.seconds) for name in order}
                for name in memory:
                    seconds.setdefault(name, []).append(found[name])


def version_of(package: str) -> str:
    """Empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def most_memory(device: torch.device, *, anew: bool = False) -> float:
    """MB of memory that this process has had at most; of a GPU's, since it was last asked `anew`."""
    if device.type == "cuda":
        if anew:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # Not the figure of getrusage, which begins with that of the process that started this one.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(case: Case, seconds: dict[str, list[float]], memory: dict[str, float]) -> list[str]:
    """A Markdown table, ratios by round."""
    lines = [
        f"{case.name}, {case.images} images of {case.size} x {case.size} in ghost batches of {case.ghost}, "
        f"{precision(case.device).name}:",
        "",
        "| | images/s, median (10th to 90th percentile) | ÷ (a) | ÷ (b) | ÷ (c) compiled | ÷ (c) eager | memory, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in seconds.items():
        rates = case.images / np.array(own)
        low, high = np.percentile(rates, [10, 90])
        cells = [f"{np.median(rates):,.1f} ({low:,.1f} to {high:,.1f})"]
        cells += [ratio(seconds, name, to) for to in (BARE, TIMM, BEST, BEST_EAGER)]
        cells.append(f"{memory[name]:,.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> str:
    """Of speeds: the median over the rounds."""
    return f"{np.median(np.array(seconds[to]) / np.array(seconds[name])):.2f}" if to in seconds else "-"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=count, default=4, help="(4)")
    parser.add_argument("--rounds", type=count, default=18, help="of each start (18)")
    # Of a machine that others use, too, it is the short disturbances that a median over many turns leaves out.
    parser.add_argument("--seconds", type=seconds, default=0.3, help="of each turn, one update at least (0.3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="one network alone")
    parser.add_argument("--images", type=count, help="at once")
    parser.add_argument("--size", type=count, help="their side in pixels")
    parser.add_argument("--ghost", type=count, help="images of a ghost batch (all)")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), help="these alone")
    parser.add_argument("--sweep", nargs="+", type=count, metavar="IMAGES", help="these micro-batches, row by row")
    parser.add_argument("--threads", type=count, help="torch's (all cores)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the page's markers")
    parser.add_argument("--serve", nargs="+", choices=list(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sweep and (args.images or args.write):
        parser.error("--sweep: prints a table for its own micro-batches; leave out --images and --write")
    marked = "bench_step" if args.device == "cpu" else "bench_step cuda"
    if args.write:
        try:
            check_page(args.write, marked)
        except ValueError as error:
            parser.error(f"argument --write: {error}")
    torch.set_num_threads(args.threads or available_cores())
    cases = []
    for case in CASES if args.device == "cpu" else CASES_ON_CUDA:
        if args.case in (None, case.name):
            images = args.images or case.images
            for size in args.sweep or [images]:
                if size % (args.ghost or size):
                    parser.error(f"--ghost {args.ghost}: does not divide {size} images")
            cases.append(replace(case, images=images, size=args.size or case.size, ghost=args.ghost or images))
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    if args.serve:
        serve(cases[0], args.serve)
        return
    packages = ", ".join(f"{name} {found}" for name in ("torch", "torchvision", "timm") if (found := version_of(name)))
    where = f"{cpu_name()}, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        where = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    what = f"`{command_line(__file__)}` on {where}; Python {platform.python_version()}, {packages}."
    if args.sweep:
        print(f"{what} {args.rounds} turns of {args.seconds:g} s.\n", flush=True)
        for case in cases:
            sweep(case, args.sweep, args)
        return
    lines = [f"{what} {args.starts} starts of {args.rounds} rounds; ratios are medians over the rounds.", ""]
    print("\n".join(lines), flush=True)
    skipped: list[str] = []
    for case in cases:
        times: dict[str, list[float]] = {}
        memory: dict[str, float] = {}
        try:
            measure(case, args, skipped, times, memory)
        finally:
            # After a signal, too: what was measured until then.
            if times:
                rows = table(case, times, memory)
                print("\n".join(rows), flush=True)
                lines += rows
    left_out = [f"- left out: {why}" for why in skipped]
    print("\n".join(left_out))
    lines += left_out
    if args.write:
        args.write.write_text(between_markers(args.write.read_text(), marked, lines))


if __name__ == "__main__":
    end_on_signals()
    main()
