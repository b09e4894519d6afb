"""Time one optimizer step: LARS, torch's SGD and Adam, other implementations of LARS, and a lower bound in C.

    python scripts/bench/bench_lars.py [--write docs/lars.md]       # needs 9 GB
    python scripts/bench/bench_lars.py --device cuda --write docs/lars.md

All contenders run in one process, on the CPU in one thread on one core. Each has its own weights, gradients and state.
A round times every contender once; the next round starts one contender later, in the opposite direction. optax always
comes last, because its threads would slow down the next contender. After each round all gradients are reset, outside
the timed region, because some contenders rescale them in place. A step therefore finds its tensors in memory rather
than in the cache. Ratios are medians over the rounds, each taken within a round.

At the end the script compares the weights of contenders that claim the same update. If they differ, the exit code is 1.

Packages that are not installed are listed as skipped: ``pip install timm pytorch_optimizer torch_optimizer open-lars
optax jax`` installs all of them. The floor needs a C compiler (``cc``, or the one that ``CC`` names).

Takes about four minutes. Figures: docs/lars.md.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__)
    PARSER.add_argument("--rounds", type=shared.positive_int, default=30, help="counted rounds, after 5 others (30)")
    PARSER.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    PARSER.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between the page's markers")
    ARGS = PARSER.parse_args()

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lars_train import LARS

LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
EPS, TRUST = 1e-8, 0.001
HYPER: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}
ADAM: dict[str, Any] = {"lr": 1e-3, "weight_decay": DECAY}
WARM_UP = 5

SGD_FUSED, FLOOR = "SGD, fused", "C floor: LARS"
OURS, PLAIN, PLAIN_FUSED = "LARS over SGD", "torchlars's formula over SGD", "torchlars's formula over SGD, fused"
OURS_ADAM, PLAIN_ADAM = "LARS over Adam", "torchlars's formula over Adam"
ON_HOST = ", ratio on the host"
PACKAGES = ("timm", "pytorch_optimizer", "torch_optimizer", "open-lars", "optax", "jax")
# Contenders of the same update differ by rounding in float32, far less than any difference in the formula.
SAME_UPDATE = 1e-3

# Sums are kept in float for 4,096 elements, then added up in double.
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


Build = Callable[[list[nn.Parameter]], Any]
"""Returns an optimizer for parameters."""
Times = dict[str, np.ndarray]
"""Milliseconds by contender, in each round."""


@dataclass
class Problem:
    """The float32 weights and gradients of a model, on one device."""

    name: str
    weights: list[Tensor]

    def __post_init__(self) -> None:
        self.grads = [torch.randn_like(w) * 0.01 for w in self.weights]

    def parameters(self) -> list[nn.Parameter]:
        """Return copies of the weights, with copies of the gradients."""
        copies = [nn.Parameter(w.clone()) for w in self.weights]
        for parameter, grad in zip(copies, self.grads, strict=True):
            parameter.grad = grad.clone()
        return copies

    @property
    def elements(self) -> int:
        """The number of elements of all weights."""
        return sum(w.numel() for w in self.weights)


@dataclass
class Contender:
    """A step to time. Contenders with the same `update` must reach the same weights; a `last` one ends each round."""

    name: str
    step: Callable[[], object]
    restore: Callable[[], None]
    weights: list[Tensor] = field(default_factory=list)
    update: str = ""
    last: bool = False


class TorchlarsFormula:
    """The step of torchlars's ``lars.py`` (https://github.com/kakaobrain/torchlars).

    The ratio is computed by torch as a 0-D tensor or, with `on_host`, in Python floats, as torchlars's C++ extension
    for the CPU does (``adaptive_lr.cc``).
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
                ratio = torchlars_ratio(parameter.norm(), grad.norm(), decay, self.on_host)
                grad.add_(parameter, alpha=decay)
                grad.mul_(ratio)
        self.base.step()
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay


def torchlars_ratio(weight_norm: Tensor, grad_norm: Tensor, decay: float, on_host: bool) -> Tensor:
    """Return the trust ratio of one tensor from its 0-D norms, with torchlars's guard."""
    if on_host:
        w, g = weight_norm.item(), grad_norm.item()
        return weight_norm.fill_(TRUST * w / (g + decay * w + EPS) if w > 0 and g > 0 else 1.0)
    ratio = TRUST * weight_norm / (grad_norm + decay * weight_norm + EPS)
    return torch.where((weight_norm > 0) & (grad_norm > 0), ratio, torch.ones_like(ratio))


def package(module: str, name: str, **options: float) -> Build:
    """Return a function that imports a package and builds its optimizer `name`."""
    return lambda parameters: getattr(importlib.import_module(module), name)(parameters, **HYPER, **options)


# Name, update, build function. Packages get the same trust coefficient; other options keep their defaults.
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
    ("timm Lars", "", package("timm.optim", "Lars")),
    ("pytorch_optimizer LARS", "", package("pytorch_optimizer", "LARS")),
    ("torch_optimizer LARS", "", package("torch_optimizer", "LARS", trust_coefficient=TRUST)),
    ("open_lars LARS", "", package("open_lars", "LARS")),
)


def resnet50(device: torch.device) -> Problem:
    """Return ResNet-50 as torchvision initializes it: 161 tensors, some of them zero biases."""
    model = importlib.import_module("torchvision.models").resnet50()
    return Problem("ResNet-50", [p.detach().to(device) for p in model.parameters()])


def small_tensors(device: torch.device) -> Problem:
    """Return 1,000 tensors of 16 to 1,024 elements."""
    shapes = [(16,), (64,), (256,), (16, 16), (32, 32), (8, 8, 3, 3)]
    return Problem("Many small tensors", [torch.randn(shapes[i % len(shapes)], device=device) for i in range(1000)])


def torch_contender(name: str, given: Problem, build: Build) -> Contender:
    """Return an optimizer over its own copy of the problem."""
    parameters = given.parameters()
    optimizer = build(parameters)
    grads = [p.grad for p in parameters]

    def restore() -> None:
        for parameter, own, original in zip(parameters, grads, given.grads, strict=True):
            assert own is not None
            parameter.grad = own.copy_(original)

    return Contender(name, optimizer.step, restore, [p.detach() for p in parameters])


def optax_contender(given: Problem) -> Contender:
    """Return optax.lars, jitted with `apply_updates`, with donated weights and state."""
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
    state = [(weights, rule.init(weights))]

    def step() -> None:
        state[0] = jax.block_until_ready(compiled(*state[0], grads))

    # `step` does not change its gradients. XLA's threads keep running after the result is ready, which slowed the next
    # contender by up to 1.6 times.
    return Contender("optax.lars, jit", step, lambda: None, last=True)


def compile_floor(folder: Path) -> ctypes.CDLL:
    """Compile the C kernels into `folder`.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    source, unlinked, library = folder / "floor.c", folder / "floor.o", folder / "floor.so"
    source.write_text(FLOOR_SOURCE)
    compiler = shlex.split(os.environ.get("CC", "cc"))
    # Link separately: with -ffast-math, the linker would turn off subnormal numbers for the whole process.
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
    return ctypes.CDLL(str(library))


def floor_contender(name: str, kernel: Any, scalars: tuple[float, ...], given: Problem) -> Contender:
    """Return a C kernel over its own copy of the problem."""
    parameters = given.parameters()
    weights, grads = [p.detach() for p in parameters], [p.grad for p in parameters if p.grad is not None]
    momenta = [torch.zeros_like(w) for w in weights]
    count = len(weights)

    def addresses(tensors: list[Tensor]) -> Any:
        return (ctypes.c_void_p * count)(*[t.data_ptr() for t in tensors])

    sizes = (ctypes.c_size_t * count)(*[w.numel() for w in weights])
    arrays = (addresses(weights), addresses(grads), addresses(momenta), sizes)
    numbers = [ctypes.c_double(s) for s in scalars]
    kernel.restype = None

    def step(_kept_alive: list[Tensor] = momenta) -> None:
        kernel(ctypes.c_size_t(count), *arrays, *numbers)

    def restore() -> None:
        for own, original in zip(grads, given.grads, strict=True):
            own.copy_(original)

    return Contender(name, step, restore, weights)


def contenders_for(given: Problem, skipped: list[str]) -> list[Contender]:
    """Return all contenders that run here, after a first step that allocates their state; add others to `skipped`."""
    contenders: list[Contender] = []

    def add(name: str, make: Callable[[], Contender], update: str = "") -> None:
        try:
            contender = make()
            contender.step()
        except Exception as error:  # anything that a package raises
            reason = "not installed" if isinstance(error, ModuleNotFoundError) else shared.first_line(error)
            skipped.append(f"{name} ({reason})")
            return
        contender.restore()
        contender.update = update
        contenders.append(contender)

    for name, update, build in OPTIMIZERS:
        add(name, partial(torch_contender, name, given, build), update)
    add("optax.lars, jit", partial(optax_contender, given))
    if given.weights[0].device.type != "cpu":
        skipped.append("the C floor (CPU only)")
        return contenders
    try:
        with tempfile.TemporaryDirectory() as folder:
            floor = compile_floor(Path(folder))
    except RuntimeError as error:
        skipped.append(f"the C floor ({shared.first_line(error)})")
        return contenders
    scalars = (LR, MOMENTUM, DECAY)
    add("C floor: SGD", partial(floor_contender, "C floor: SGD", floor.sgd_step, scalars, given), "sgd")
    add(FLOOR, partial(floor_contender, FLOOR, floor.lars_step, (*scalars, EPS, TRUST), given), "lars")
    return contenders


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call; on CUDA between two events around it, on an otherwise idle device."""
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


def measure(contenders: list[Contender], rounds: int, device: torch.device) -> Times:
    """Return the milliseconds of each contender in each round, after WARM_UP rounds that do not count."""
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    rotating, last = [c for c in contenders if not c.last], [c for c in contenders if c.last]
    gc.collect()
    gc.disable()
    try:
        for number in range(-WARM_UP, rounds):
            first = number % len(rotating)
            order = rotating[first:] + rotating[:first]
            # In alternating directions, so that no contender always follows the same one.
            for contender in (order if number % 2 else order[::-1]) + last:
                elapsed = milliseconds(contender.step, device)
                if number >= 0:
                    times[contender.name].append(elapsed)
            for contender in contenders:
                contender.restore()
    finally:
        gc.enable()
    return {name: np.array(values) for name, values in times.items()}


def disagreements(contenders: list[Contender], given: Problem) -> list[str]:
    """Compare contenders of the same update with the first of them; return a line for each difference."""

    def distance(one: list[Tensor], other: list[Tensor]) -> float:
        norms = (torch.linalg.vector_norm(a - b, dtype=torch.float64).item() for a, b in zip(one, other, strict=True))
        return math.hypot(*norms)

    first: dict[str, Contender] = {}
    found = []
    for contender in contenders:
        if contender.update:
            other = first.setdefault(contender.update, contender)
            apart = distance(contender.weights, other.weights) / distance(given.weights, other.weights)
            if not apart <= SAME_UPDATE:
                found.append(
                    f"{given.name}: {contender.name} and {other.name} differ by {apart:.1e} of the distance covered"
                )
    return found


def ratio(times: Times, name: str, to: str) -> float | None:
    """Return the median over the rounds of the ratio of two times; None if a contender did not run."""
    return float(np.median(times[name] / times[to])) if name in times and to in times else None


def table(times: Times) -> list[str]:
    """Return the times as a Markdown table."""
    lines = [
        "| one step of | median, ms | 10th to 90th percentile, ms | ÷ SGD fused | ÷ C floor | ÷ LARS |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, own in times.items():
        low, middle, high = np.percentile(own, [10, 50, 90])
        shares = [ratio(times, name, to) for to in (SGD_FUSED, FLOOR, OURS)]
        cells = " | ".join("-" if s is None else f"{s:.2f}" for s in shares)
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {cells} |")
    return lines


def extra_peak(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of tensors that a step allocates beyond those that existed before.

    On CUDA it comes from `torch.cuda.max_memory_allocated`. On the CPU it comes from the allocations that
    torch.profiler records, because the resident set includes freed memory that malloc keeps.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Without a GPU driver the profiler prints a warning each time.
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
    """Return a table of the extra peak memory of a second step."""
    how = "`torch.cuda.max_memory_allocated`" if device.type == "cuda" else "torch.profiler's record of allocations"
    lines = ["", f"**Memory**, {given.name}: the peak that a step allocates, by {how}.", ""]
    lines += ["| one step of | extra peak, bytes | ÷ size of the gradients |", "|---|---:|---:|"]
    chosen = (SGD_FUSED, OURS, f"{OURS}, fused", PLAIN, "Adam", OURS_ADAM, f"{OURS_ADAM}, fused", PLAIN_ADAM)
    for name, _, build in OPTIMIZERS:
        if name in chosen:
            contender = torch_contender(name, given, build)
            contender.step()
            contender.restore()
            peak = extra_peak(contender.step, device)
            lines.append(f"| {name} | {peak:,} | {peak / (4 * given.elements):.3f} |")
    return lines


def report(args: Namespace) -> Iterator[tuple[list[str], list[str]]]:
    """Measure part by part; yield the Markdown of each, and its disagreements."""
    device = torch.device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{shared.cpu_name()}, one thread"
    yield (
        [
            f"`python scripts/bench/bench_lars.py --device {args.device}` on {where}; {shared.software(*PACKAGES)}. "
            f"float32, momentum {MOMENTUM}, weight decay {DECAY:g}; {args.rounds} rounds after {WARM_UP} that do not "
            "count."
        ],
        [],
    )
    for make in (resnet50, small_tensors):
        torch.manual_seed(0)
        given = make(device)
        skipped: list[str] = []
        contenders = contenders_for(given, skipped)
        times = measure(contenders, args.rounds, device)
        lines = ["", f"**{given.name}**: {len(given.weights):,} tensors, {given.elements:,} elements.", ""]
        lines += table(times)
        if skipped:
            lines += ["", f"Skipped: {'; '.join(skipped)}."]
        yield lines, disagreements(contenders, given)
        del contenders
        if make is resnet50:
            yield memory_section(given, device), []


def main(parser: ArgumentParser, args: Namespace) -> int:
    """Measure, print, write. Return 1 if contenders of the same update disagree."""
    marker = f"bench_lars {args.device}"
    shared.require_cuda(parser, args.device)
    shared.require_page(parser, args.write, marker)
    if args.device == "cpu":
        torch.set_num_threads(1)
        shared.pin_to_one_core()
    lines: list[str] = []
    wrong: list[str] = []
    for part, faults in report(args):
        print("\n".join(part), flush=True)
        for line in faults:
            print(line, file=sys.stderr)
        lines += part
        wrong += faults
    if not wrong:
        shared.write_page(lines, args.write, marker)
    return 1 if wrong else 0


if __name__ == "__main__":
    shared.exit_on_signals()
    sys.exit(main(PARSER, ARGS))
