"""Time one optimizer step: LARS, torch's SGD and Adam, and other implementations of LARS.

    python scripts/bench/bench_lars.py [--write docs/benchmarks.md]       # needs 9 GB
    python scripts/bench/bench_lars.py --device cuda --write docs/benchmarks.md

All contenders run in one process, on the CPU in one thread on one core. Each has its own weights, gradients and state.
A round times every contender once; the next round starts one contender later, in the opposite direction. optax always
comes last, because its threads would slow down the next contender. After each round all gradients are reset, outside
the timed region, because some contenders rescale them in place. A step therefore finds its tensors in memory rather
than in the cache. Ratios are medians over the rounds, each taken within a round.

Packages that are not installed are listed as skipped: ``pip install timm pytorch_optimizer torch_optimizer open-lars
optax jax`` installs all of them.

Takes about four minutes. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "bench_lars cpu", "bench_lars cuda")
    PARSER.add_argument("--rounds", type=shared.positive_int, default=30, help="counted rounds, after 5 others (30)")
    PARSER.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
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
SGD_FUSED, OURS, FORMULA = "SGD, fused", "LARS over SGD", "torchlars's formula over"
PACKAGES = ("timm", "pytorch_optimizer", "torch_optimizer", "open-lars", "optax", "jax")

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


@dataclass
class Contender:
    """A step to time. `restore` resets the gradients; a `last` contender ends each round."""

    name: str
    step: Callable[[], object]
    restore: Callable[[], None]
    last: bool = False


class TorchlarsFormula:
    """The step of torchlars's ``lars.py`` (https://github.com/kakaobrain/torchlars)."""

    def __init__(self, base: SGD | Adam) -> None:
        self.base = base

    @torch.no_grad()
    def step(self) -> None:
        groups = self.base.param_groups
        decays = [group["weight_decay"] for group in groups]
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = 0
            for parameter in group["params"]:
                grad = parameter.grad
                w, g = parameter.norm(), grad.norm()
                ratio = torch.where((w > 0) & (g > 0), TRUST * w / (g + decay * w + EPS), torch.ones_like(w))
                grad.add_(parameter, alpha=decay)
                grad.mul_(ratio)
        self.base.step()
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay


def package(module: str, name: str, **options: float) -> Build:
    """Return a function that imports a package and builds its optimizer `name`."""
    return lambda parameters: getattr(importlib.import_module(module), name)(parameters, **HYPER, **options)


# Packages get the same trust coefficient; other options keep their defaults.
OPTIMIZERS: dict[str, Build] = {
    "SGD, single": lambda p: SGD(p, **HYPER, foreach=False, fused=False),
    "SGD, foreach": lambda p: SGD(p, **HYPER, foreach=True),
    SGD_FUSED: lambda p: SGD(p, **HYPER, fused=True),
    OURS: lambda p: LARS(SGD(p, **HYPER), EPS, TRUST),
    f"{OURS}, fused": lambda p: LARS(SGD(p, **HYPER, fused=True), EPS, TRUST),
    f"{FORMULA} SGD": lambda p: TorchlarsFormula(SGD(p, **HYPER)),
    f"{FORMULA} SGD, fused": lambda p: TorchlarsFormula(SGD(p, **HYPER, fused=True)),
    "Adam": lambda p: Adam(p, **ADAM),
    "Adam, fused": lambda p: Adam(p, **ADAM, fused=True),
    "LARS over Adam": lambda p: LARS(Adam(p, **ADAM), EPS, TRUST),
    "LARS over Adam, fused": lambda p: LARS(Adam(p, **ADAM, fused=True), EPS, TRUST),
    f"{FORMULA} Adam": lambda p: TorchlarsFormula(Adam(p, **ADAM)),
    f"{FORMULA} Adam, fused": lambda p: TorchlarsFormula(Adam(p, **ADAM, fused=True)),
    "timm Lars": package("timm.optim", "Lars"),
    "pytorch_optimizer LARS": package("pytorch_optimizer", "LARS"),
    "torch_optimizer LARS": package("torch_optimizer", "LARS", trust_coefficient=TRUST),
    "open_lars LARS": package("open_lars", "LARS"),
}


def resnet50(device: torch.device) -> Problem:
    """Return ResNet-50 as torchvision initializes it: 161 tensors, some of them zero biases."""
    model = importlib.import_module("torchvision.models").resnet50()
    return Problem("ResNet-50", [p.detach().to(device) for p in model.parameters()])


def small_tensors(device: torch.device) -> Problem:
    """Return 1,000 tensors of 16 to 1,024 elements."""
    shapes = [(16,), (64,), (256,), (16, 16), (32, 32), (8, 8, 3, 3)]
    return Problem("Many small tensors", [torch.randn(shapes[i % len(shapes)], device=device) for i in range(1000)])


def torch_contender(name: str, build: Build, given: Problem) -> Contender:
    """Return an optimizer over its own copy of the problem."""
    parameters = given.parameters()
    optimizer = build(parameters)
    grads = [p.grad for p in parameters]

    def restore() -> None:
        for parameter, own, original in zip(parameters, grads, given.grads, strict=True):
            assert own is not None
            parameter.grad = own.copy_(original)

    return Contender(name, optimizer.step, restore)


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


def contenders_for(given: Problem, skipped: list[str]) -> list[Contender]:
    """Return all contenders that run here, after a first step that allocates their state; add others to `skipped`."""
    makers: dict[str, Callable[[], Contender]] = {
        name: partial(torch_contender, name, build, given) for name, build in OPTIMIZERS.items()
    }
    makers["optax.lars, jit"] = partial(optax_contender, given)
    contenders: list[Contender] = []
    for name, make in makers.items():
        try:
            contender = make()
            contender.step()
        except Exception as error:  # anything that a package raises
            reason = "not installed" if isinstance(error, ModuleNotFoundError) else shared.first_line(error)
            skipped.append(f"{name} ({reason})")
        else:
            contender.restore()
            contenders.append(contender)
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


def table(times: Times) -> list[str]:
    """Return the times, and the median ratios over the rounds, as a Markdown table."""
    lines = [
        "| one step of | median, ms | 10th to 90th percentile, ms | ÷ SGD fused | ÷ LARS |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, own in times.items():
        low, middle, high = np.percentile(own, [10, 50, 90])
        shares = " | ".join(f"{np.median(own / times[to]):.2f}" for to in (SGD_FUSED, OURS))
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {shares} |")
    return lines


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    shared.require_cuda(parser, args.device)
    device = torch.device(args.device)
    if args.device == "cpu":
        torch.set_num_threads(1)
        shared.pin_to_one_core()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{shared.cpu_name()}, one thread"
    lines = [
        f"`python scripts/bench/bench_lars.py --device {args.device}` on {where}; {shared.software(*PACKAGES)}. "
        f"float32, momentum {MOMENTUM}, weight decay {DECAY:g}; {args.rounds} rounds after {WARM_UP} that do not count."
    ]
    print(lines[0], flush=True)
    for make in (resnet50, small_tensors):
        torch.manual_seed(0)
        given = make(device)
        skipped: list[str] = []
        times = measure(contenders_for(given, skipped), args.rounds, device)
        elements = sum(w.numel() for w in given.weights)
        part = ["", f"**{given.name}**: {len(given.weights):,} tensors, {elements:,} elements.", "", *table(times)]
        if skipped:
            part += ["", f"Skipped: {'; '.join(skipped)}."]
        print("\n".join(part), flush=True)
        lines += part
    shared.write_page(lines, args.write, f"bench_lars {args.device}")


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
