"""Measures one optimizer step: LARS, torch's SGD and Adam, torchlars's formula, other packages, the memory floor.

    python scripts/bench/bench_lars.py                                    # about 4 minutes, 9 GB; prints Markdown
    python scripts/bench/bench_lars.py --model small --rounds 10          # the many small tensors alone
    python scripts/bench/bench_lars.py --write docs/lars.md               # the tables go between the page's markers
    python scripts/bench/bench_lars.py --device cuda --write docs/lars.md

All contenders run in one process, on the CPU in one thread on one core. Each has weights, gradients and state of
its own. A round times every contender once, one after another; the next starts one contender further on and goes
the other way round (optax always comes last: its threads would slow down who comes next). After each round,
outside the timed region, all gradients, also those that nobody changed, are set back to the same values: some
contenders rescale them in place, and they would drift to zero. A step therefore finds its tensors in memory rather
than in the cache. Ratios are taken within a round; medians over the rounds are printed.

At the end contenders that claim the same update are compared; if their weights differ, the exit code is 1.

Packages that are not installed are named as skipped: ``pip install timm pytorch_optimizer torch_optimizer
open-lars optax jax`` has them all. The floor wants a C compiler (``cc``, or what ``CC`` names).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from child import end_on_signals
from page import between_markers, check_page, cpu_name
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lars_train import LARS

LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
EPS, TRUST = 1e-8, 0.001
HYPER: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}
ADAM: dict[str, Any] = {"lr": 1e-3, "weight_decay": DECAY}

SGD_FUSED, FLOOR = "SGD, fused", "C floor: LARS"
OURS, PLAIN, PLAIN_FUSED = "LARS over SGD", "torchlars's formula over SGD", "torchlars's formula over SGD, fused"
OURS_ADAM, PLAIN_ADAM = "LARS over Adam", "torchlars's formula over Adam"
ON_HOST = ", ratio on the host"
PACKAGES = ("timm", "pytorch_optimizer", "torch_optimizer", "open-lars", "optax", "jax")
# Contenders of the same update differ by rounding, in float32: far less than any difference in the formula.
SAME_UPDATE = 1e-3

# Sums are kept in float for 4,096 elements, short enough for float, then added up in double.
FLOOR_SOURCE = """
#include <math.h>
#include <stddef.h>

static double norm(const float *x, size_t n) {
    double sum = 0;
    for (size_t start = 0; start < n; start += 4096) {
        size_t end = n - start < 4096 ? n : start + 4096;
        float part = 0;
        for (size_t i = start; i < end; i++) part += x[i] * x[i];
        sum += part;
    }
    return sqrt(sum);
}

static void update(float *restrict w, const float *restrict g, float *restrict m, size_t n,
                   float ratio, float lr, float momentum, float decay) {
    for (size_t i = 0; i < n; i++) {
        m[i] = momentum * m[i] + ratio * (g[i] + decay * w[i]);
        w[i] -= lr * m[i];
    }
}

void sgd_step(size_t tensors, float **w, float **g, float **m, const size_t *n,
              double lr, double momentum, double decay) {
    for (size_t k = 0; k < tensors; k++) update(w[k], g[k], m[k], n[k], 1, lr, momentum, decay);
}

void lars_step(size_t tensors, float **w, float **g, float **m, const size_t *n,
               double lr, double momentum, double decay, double eps, double trust) {
    for (size_t k = 0; k < tensors; k++) {
        double wn = norm(w[k], n[k]), gn = norm(g[k], n[k]);
        double ratio = wn > 0 && gn > 0 ? trust * wn / (gn + decay * wn + eps) : 1;
        update(w[k], g[k], m[k], n[k], ratio, lr, momentum, decay);
    }
}
"""


class Steps(Protocol):
    """What has a step."""

    def step(self) -> Any: ...


Build = Callable[[list[nn.Parameter]], Steps]


@dataclass
class Problem:
    """A model's weights and one set of gradients, all on one device, float32."""

    name: str
    weights: list[Tensor]
    grads: list[Tensor]

    def parameters(self) -> list[nn.Parameter]:
        """Copies of the weights, with copies of the gradients."""
        copies = [nn.Parameter(w.clone()) for w in self.weights]
        for parameter, grad in zip(copies, self.grads, strict=True):
            parameter.grad = grad.clone()
        return copies

    @property
    def elements(self) -> int:
        """Of all weights."""
        return sum(w.numel() for w in self.weights)


@dataclass
class Contender:
    """Something that can be timed.

    Those with the same `update` have to arrive at the same weights. One with `last` stays out of the rotation.
    """

    name: str
    step: Callable[[], object]
    restore: Callable[[], None]
    weights: list[Tensor] = field(default_factory=list)
    update: str | None = None
    peer: bool = False
    last: bool = False


class TorchlarsFormula:
    """What torchlars does in a step, written plainly (https://github.com/kakaobrain/torchlars, ``lars.py``).

    The ratio is a 0-D tensor. Its arithmetic is torch's or, with `on_host`, in host numbers, as in the C++ extension
    that torchlars has for the CPU (``adaptive_lr.cc``).
    """

    def __init__(self, base: SGD | Adam, *, on_host: bool = False) -> None:
        self.base, self.on_host = base, on_host

    @torch.no_grad()
    def step(self) -> None:
        groups = self.base.param_groups
        decays = [group["weight_decay"] for group in groups]
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = 0
            for parameter in group["params"]:
                grad = parameter.grad
                ratio = plain_ratio(parameter.norm(), grad.norm(), decay, self.on_host)
                grad.add_(parameter, alpha=decay)
                grad.mul_(ratio)
        self.base.step()
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay


def plain_ratio(weight_norm: Tensor, grad_norm: Tensor, decay: float, on_host: bool) -> Tensor:
    """The trust ratio of one tensor from its 0-D norms, with torchlars's guard."""
    if on_host:
        w, g = weight_norm.item(), grad_norm.item()
        return weight_norm.fill_(TRUST * w / (g + decay * w + EPS) if w > 0 and g > 0 else 1.0)
    ratio = TRUST * weight_norm / (grad_norm + decay * weight_norm + EPS)
    return torch.where((weight_norm > 0) & (grad_norm > 0), ratio, torch.ones_like(ratio))


def peer(module: str, name: str, **options: float) -> Build:
    """The optimizer `name` of a package, imported when it is built."""

    def build(parameters: list[nn.Parameter]) -> Steps:
        optimizer: Steps = getattr(importlib.import_module(module), name)(parameters, **HYPER, **options)
        return optimizer

    return build


# Name, update, how it is built. Of each peer the trust coefficient is that of all others; the rest is its default.
OPTIMIZERS: tuple[tuple[str, str, Build], ...] = (
    ("SGD, single", "sgd", lambda p: SGD(p, **HYPER, foreach=False, fused=False)),
    ("SGD, foreach", "sgd", lambda p: SGD(p, **HYPER, foreach=True)),
    (SGD_FUSED, "sgd", lambda p: SGD(p, **HYPER, fused=True)),
    (OURS, "lars", lambda p: LARS(SGD(p, **HYPER), EPS, TRUST)),
    (f"{OURS}, fused", "lars", lambda p: LARS(SGD(p, **HYPER, fused=True), EPS, TRUST)),
    (PLAIN, "lars", lambda p: TorchlarsFormula(SGD(p, **HYPER))),
    (PLAIN_FUSED, "lars", lambda p: TorchlarsFormula(SGD(p, **HYPER, fused=True))),
    (PLAIN + ON_HOST, "lars", lambda p: TorchlarsFormula(SGD(p, **HYPER), on_host=True)),
    (PLAIN_FUSED + ON_HOST, "lars", lambda p: TorchlarsFormula(SGD(p, **HYPER, fused=True), on_host=True)),
    ("Adam", "adam", lambda p: Adam(p, **ADAM)),
    ("Adam, fused", "adam", lambda p: Adam(p, **ADAM, fused=True)),
    (OURS_ADAM, "lars-adam", lambda p: LARS(Adam(p, **ADAM), EPS, TRUST)),
    (f"{OURS_ADAM}, fused", "lars-adam", lambda p: LARS(Adam(p, **ADAM, fused=True), EPS, TRUST)),
    (PLAIN_ADAM, "lars-adam", lambda p: TorchlarsFormula(Adam(p, **ADAM))),
    (f"{PLAIN_ADAM}, fused", "lars-adam", lambda p: TorchlarsFormula(Adam(p, **ADAM, fused=True))),
)
PEERS: tuple[tuple[str, Build], ...] = (
    ("timm Lars", peer("timm.optim", "Lars")),
    ("pytorch_optimizer LARS", peer("pytorch_optimizer", "LARS")),
    ("torch_optimizer LARS", peer("torch_optimizer", "LARS", trust_coefficient=TRUST)),
    ("open_lars LARS", peer("open_lars", "LARS")),
)


def resnet50(device: torch.device) -> Problem:
    """ResNet-50 as torchvision initialises it: 161 tensors, among them zero biases."""
    model = importlib.import_module("torchvision.models").resnet50()
    return problem("ResNet-50", [p.detach().to(device) for p in model.parameters()])


def small(device: torch.device) -> Problem:
    """1,000 tensors of 16 to 1,024 elements."""
    shapes = [(16,), (64,), (256,), (16, 16), (32, 32), (8, 8, 3, 3)]
    return problem("Many small tensors", [torch.randn(shapes[i % len(shapes)], device=device) for i in range(1000)])


def problem(name: str, weights: list[Tensor]) -> Problem:
    """`weights` with random gradients."""
    return Problem(name, weights, [torch.randn_like(w) * 0.01 for w in weights])


MODELS = {"resnet50": resnet50, "small": small}


def torch_contender(name: str, given: Problem, build: Build) -> Contender:
    """An optimizer over its own copy of the problem."""
    parameters = given.parameters()
    optimizer = build(parameters)
    grads = [p.grad for p in parameters]

    def restore() -> None:
        for parameter, own, original in zip(parameters, grads, given.grads, strict=True):
            assert own is not None
            parameter.grad = own.copy_(original)

    return Contender(name, optimizer.step, restore, [p.detach() for p in parameters])


def optax_contender(given: Problem) -> Contender:
    """optax.lars and the addition of its updates, compiled together; old weights and state are donated."""
    if given.weights[0].device.type != "cpu":
        raise RuntimeError("measured on the CPU only")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
    rule = optax.lars(LR, weight_decay=DECAY, trust_coefficient=TRUST, momentum=MOMENTUM)

    def update(weights: Any, state: Any, grads: Any) -> Any:
        updates, state = rule.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    compiled = jax.jit(update, donate_argnums=(0, 1))
    weights, grads = ([jax.numpy.array(t.numpy()) for t in ts] for ts in (given.weights, given.grads))
    held = [(weights, rule.init(weights))]

    def step() -> None:
        held[0] = jax.block_until_ready(compiled(*held[0], grads))

    # Its gradients are arguments and stay as they are. XLA's threads go on after the result is ready: whoever came
    # next took up to 1.6 times as long.
    return Contender("optax.lars, jit", step, lambda: None, last=True)


class Floor:
    """The C kernels, compiled into `folder`.

    Raises:
        RuntimeError: there is no compiler, or it refuses.
    """

    def __init__(self, folder: Path) -> None:
        source, unlinked, library = folder / "floor.c", folder / "floor.o", folder / "floor.so"
        source.write_text(FLOOR_SOURCE)
        compiler = shlex.split(os.environ.get("CC", "cc"))
        # Linked by itself: -ffast-math at the link would turn subnormal numbers off for the whole process.
        for arguments in (
            ["-O3", "-march=native", "-ffast-math", "-fPIC", "-c", str(source), "-o", str(unlinked)],
            ["-shared", str(unlinked), "-o", str(library), "-lm"],
        ):
            try:
                subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True)
            except FileNotFoundError:
                raise RuntimeError(f"no C compiler ({compiler[0]})") from None
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"{compiler[0]}: {error.stderr.strip()}") from None
        self.compiled = ctypes.CDLL(str(library))

    def contender(self, name: str, function: str, scalars: Iterable[float], given: Problem) -> Contender:
        """`function` over its own copy of the problem."""
        parameters = given.parameters()
        weights, grads = [p.detach() for p in parameters], [p.grad for p in parameters if p.grad is not None]
        momenta = [torch.zeros_like(w) for w in weights]
        count = len(weights)

        def addresses(tensors: list[Tensor]) -> Any:
            return (ctypes.c_void_p * count)(*[t.data_ptr() for t in tensors])

        sizes = (ctypes.c_size_t * count)(*[w.numel() for w in weights])
        arrays = (addresses(weights), addresses(grads), addresses(momenta), sizes)
        numbers = [ctypes.c_double(s) for s in scalars]
        kernel = getattr(self.compiled, function)
        kernel.restype = None

        def step(_kept_alive: list[Tensor] = momenta) -> None:
            kernel(ctypes.c_size_t(count), *arrays, *numbers)

        def restore() -> None:
            for own, original in zip(grads, given.grads, strict=True):
                own.copy_(original)

        return Contender(name, step, restore, weights)


def line_up(given: Problem, folder: Path, skipped: list[str]) -> list[Contender]:
    """All that can run here, after a first step, which makes their state; the others go to `skipped`."""
    contenders: list[Contender] = []

    def add(name: str, make: Callable[[], Contender], update: str | None = None, peer: bool = False) -> None:
        try:
            contender = make()
            contender.step()
        # A peer that breaks with this torch, whatever it raises, is a line of the report and not its end.
        except Exception as error:
            reason = "not installed" if isinstance(error, ModuleNotFoundError) else first_line(error)
            skipped.append(f"{name} ({reason})")
            return
        contender.restore()
        contender.update, contender.peer = update, peer
        contenders.append(contender)

    for name, update, build in OPTIMIZERS:
        add(name, partial(torch_contender, name, given, build), update)
    for name, build in PEERS:
        add(name, partial(torch_contender, name, given, build), peer=True)
    add("optax.lars, jit", partial(optax_contender, given), peer=True)
    if given.weights[0].device.type != "cpu":
        skipped.append("the C floor (it is the CPU's)")
        return contenders
    try:
        floor = Floor(folder)
    except RuntimeError as error:
        skipped.append(f"the C floor ({first_line(error)})")
    else:
        scalars = (LR, MOMENTUM, DECAY)
        name = "C floor: SGD"
        add(name, partial(floor.contender, name, "sgd_step", scalars, given), "sgd")
        add(FLOOR, partial(floor.contender, FLOOR, "lars_step", (*scalars, EPS, TRUST), given), "lars")
    return contenders


def first_line(error: Exception) -> str:
    """What went wrong, for a list."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """The time of one call; on CUDA that between two events around it, on a device with nothing else to do."""
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    before = time.perf_counter_ns()
    step()
    return (time.perf_counter_ns() - before) / 1e6


Times = dict[str, np.ndarray]


def measure(contenders: list[Contender], rounds: int, warmup: int, device: torch.device) -> Times:
    """Milliseconds of each contender in each round, by name, after `warmup` rounds that do not count."""
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    rotating, last = [c for c in contenders if not c.last], [c for c in contenders if c.last]
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            first = turn % len(rotating)
            order = rotating[first:] + rotating[:first]
            # Backwards every other time, so that nobody always follows the same one.
            for contender in (order if turn % 2 else order[::-1]) + last:
                taken = milliseconds(contender.step, device)
                if turn >= 0:
                    times[contender.name].append(taken)
            for contender in contenders:
                contender.restore()
    finally:
        gc.enable()
    return {name: np.array(values) for name, values in times.items()}


def disagreements(contenders: list[Contender], given: Problem) -> list[str]:
    """Contenders whose weights are not those of the first one with the same update."""
    first: dict[str, Contender] = {}
    found = []
    for contender in contenders:
        if contender.update is None:
            continue
        other = first.setdefault(contender.update, contender)
        apart = distance(contender.weights, other.weights) / distance(given.weights, other.weights)
        if not apart <= SAME_UPDATE:
            found.append(f"{contender.name} is not where {other.name} is: {apart:.1e} of the way apart")
    return found


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """The Euclidean distance between two lists of tensors."""
    squares = (
        torch.linalg.vector_norm(a - b, dtype=torch.float64).item() ** 2 for a, b in zip(one, other, strict=True)
    )
    return math.sqrt(sum(squares))


def ratio(times: Times, name: str, to: str) -> float | None:
    """The median over the rounds of one contender's time by another's; None where one did not run."""
    return float(np.median(times[name] / times[to])) if name in times and to in times else None


def table(contenders: list[Contender], times: Times) -> list[str]:
    """A Markdown table of the times, in the order of the contenders."""
    lines = [
        "| one step of | median, ms | 10th to 90th percentile, ms | ÷ SGD fused | ÷ C floor |",
        "|---|---:|---:|---:|---:|",
    ]
    for contender in contenders:
        taken = times[contender.name]
        low, middle, high = np.percentile(taken, [10, 50, 90])
        shares = [ratio(times, contender.name, to) for to in (SGD_FUSED, FLOOR)]
        shown = " | ".join("-" if s is None else f"{s:.2f}" for s in shares)
        lines.append(f"| {contender.name} | {middle:.2f} | {low:.2f} to {high:.2f} | {shown} |")
    return lines


def ratios(contenders: list[Contender], times: Times) -> str:
    """The ratios of LARS to what does less, and of others to LARS, in a line."""
    peers = sorted((c.name for c in contenders if c.peer), key=lambda name: float(np.median(times[name])))
    best = peers[0] if peers else "no peer"
    pairs = {
        "LARS to SGD fused": (OURS, SGD_FUSED),
        "LARS to the floor": (OURS, FLOOR),
        "torchlars's formula to LARS": (PLAIN, OURS),
        "torchlars's formula, fused base, to LARS": (PLAIN_FUSED, OURS),
        "the same with the ratio on the host": (PLAIN + ON_HOST, OURS),
        "and over a fused base": (PLAIN_FUSED + ON_HOST, OURS),
        f"the best peer ({best}) to LARS": (best, OURS),
        "LARS over Adam to torchlars's formula over it": (OURS_ADAM, PLAIN_ADAM),
        "LARS over Adam, fused to torchlars's formula over it": (f"{OURS_ADAM}, fused", f"{PLAIN_ADAM}, fused"),
    }
    found = {what: ratio(times, *pair) for what, pair in pairs.items()}
    return f"Ratios: {'; '.join(f'{what}: {value:.2f}' for what, value in found.items() if value is not None)}."


def extra_peak(step: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that a step has at most on top of those that were there before it.

    On CUDA from `torch.cuda.max_memory_allocated`. On the CPU from the allocations that torch.profiler records:
    resident sets also hold what malloc keeps back.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Where there is no GPU driver the profiler says so each time.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(0, int(np.cumsum([0] + [change for _, change in changes]).max()))


def memory_section(given: Problem, device: torch.device) -> list[str]:
    """The extra peak memory of a step, not the first, by optimizer, as a Markdown table with its heading."""
    size = 4 * given.elements
    how = "`torch.cuda.max_memory_allocated`" if device.type == "cuda" else "torch.profiler's record of allocations"
    lines = ["", f"**Memory**, {given.name}: what a step allocates on top of what is there, by {how}.", ""]
    lines += ["| one step of | extra peak, bytes | ÷ size of the gradients |", "|---|---:|---:|"]
    wanted = (SGD_FUSED, OURS, f"{OURS}, fused", PLAIN, "Adam", OURS_ADAM, f"{OURS_ADAM}, fused", PLAIN_ADAM)
    for name, _, build in OPTIMIZERS:
        if name not in wanted:
            continue
        contender = torch_contender(name, given, build)
        contender.step()
        contender.restore()
        peak = extra_peak(contender.step, device)
        lines.append(f"| {name} | {peak:,} | {peak / size:.3f} |")
    return lines


def report(args: argparse.Namespace) -> Iterator[tuple[list[str], list[str]]]:
    """The Markdown of all measurements, part by part as they are done, and what is wrong with each."""
    device = torch.device(args.device)
    yield [conditions(args, device)], []
    for key in args.model or MODELS:
        torch.manual_seed(0)
        given = MODELS[key](device)
        skipped: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            contenders = line_up(given, Path(folder), skipped)
            times = measure(contenders, args.rounds, args.warmup, device)
        wrong = [f"{given.name}: {line}" for line in disagreements(contenders, given)]
        lines = ["", f"**{given.name}**: {len(given.weights):,} tensors, {given.elements:,} elements.", ""]
        lines += table(contenders, times)
        lines += ["", ratios(contenders, times)]
        if skipped:
            lines += ["", f"Skipped: {'; '.join(skipped)}."]
        yield lines, wrong
        del contenders
        if key == "resnet50":
            yield memory_section(given, device), []


def conditions(args: argparse.Namespace, device: torch.device) -> str:
    """A line that says what was measured where."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, one thread"
    installed = [f"{name} {found}" for name in PACKAGES if (found := version_of(name))]
    packages = ", ".join([f"Python {platform.python_version()}", f"torch {torch.__version__}", *installed])
    return (
        f"`python scripts/bench/bench_lars.py --device {args.device}` on {where}; {packages}. float32, "
        f"momentum {MOMENTUM}, weight decay {DECAY:g}; {args.rounds} rounds after {args.warmup} that do not count."
    )


def version_of(package: str) -> str | None:
    """What is installed of `package`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def one_thread(core: int | None) -> None:
    """Keep this process to one thread on one core, where the system lets it: `core`, or the last that it may use."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0)) if core is None else core})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one (can be given again)")
    parser.add_argument("--rounds", type=int, default=30, help="that count (default 30)")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before them (default 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--core", type=int, help="the core to run on (default: the last)")
    parser.add_argument("--write", type=Path, metavar="PATH", help="put the tables between the markers of this file")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.warmup < 0:
        parser.error("--rounds is at least 1, --warmup at least 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    if args.write is not None:
        # Before the measurements: they take minutes.
        try:
            check_page(args.write, f"bench_lars {args.device}")
        except ValueError as error:
            parser.error(f"argument --write: {error}")
    if args.device == "cpu":
        try:
            one_thread(args.core)
        except OSError as error:
            parser.error(f"--core {args.core}: {error}")
    lines: list[str] = []
    wrong: list[str] = []
    for part, faults in report(args):
        print("\n".join(part), flush=True)
        for line in faults:
            print(line, file=sys.stderr)
        lines += part
        wrong += faults
    if args.write is not None and not wrong:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(between_markers(page, f"bench_lars {args.device}", lines), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
