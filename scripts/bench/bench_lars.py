"""Time one optimizer step: LARS, torch's SGD and Adam, and other implementations of LARS.

    python scripts/bench/bench_lars.py [--write docs/benchmarks.md] [--short PAGE ...]     # needs 12 GB
    python scripts/bench/bench_lars.py --device cuda --write docs/benchmarks.md

All contenders run in one process, on the CPU on one core per thread. Each has its own weights, gradients and state. A
round times every contender once; the next round starts one contender later, in the opposite direction. After each round
all gradients are reset, outside the timed region, because some contenders rescale them in place. A step therefore finds
its tensors in memory rather than in the cache. Ratios are medians over the rounds, each taken within a round.

For the networks of self-supervised learning, fake CUDA tensors count what a step does on a GPU. An operation is a call
on GPU tensors that is neither a view nor an allocation; a call on a list of tensors starts a few kernels, any other
call starts one. In a host sync, the host waits for a value from the GPU. `--short` writes these networks' tables alone.

Packages that are not installed are listed as skipped. To install them: ``pip install timm pytorch_optimizer
torch_optimizer open-lars`` and ``pip install --no-deps lightly lightning-bolts solo-learn``. Of the last three, which
require other packages or an older torch, the script loads only the file with LARS.

Takes about ten minutes. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import gc
import importlib
import runpy
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "bench_lars cpu", "bench_lars cuda")
    PARSER.add_argument("--short", type=shared.page_with("bench_lars short"), nargs="+", default=[], metavar="PAGE")
    PARSER.add_argument(
        "--rounds", type=shared.positive_int, default=30, help="timed rounds, after 5 warm-up rounds (30)"
    )
    PARSER.add_argument("--threads", type=shared.positive_int, nargs="+", default=[1, 2], help="of the CPU (1 and 2)")
    PARSER.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    ARGS = PARSER.parse_args()

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import SGD, Adam
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lars_train import LARS

LR, MOMENTUM, DECAY, EPS, TRUST = 0.1, 0.9, 5e-4, 1e-8, 0.001
HYPER: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}
ADAM: dict[str, Any] = {"lr": 1e-3, "weight_decay": DECAY}
WARM_UP = 5
OURS, TORCH_LARS = "LARS over SGD", "LARS over SGD, without C (torch-lars)"
PACKAGES = ("timm", "pytorch_optimizer", "torch_optimizer", "open-lars", "lightly", "lightning-bolts", "solo-learn")

Build = Callable[[list[nn.Parameter]], Any]
"""Returns an optimizer for parameters."""
Contender = tuple[Callable[[], object], Callable[[], None]]
"""A step to time, and a function that resets the gradients."""
Times = dict[str, np.ndarray]
"""Milliseconds by contender, in each round."""


@dataclass
class Problem:
    """The float32 weights and gradients of a model, on one device, and the contenders for it."""

    name: str
    weights: list[Tensor]
    names: Collection[str]

    def __post_init__(self) -> None:
        self.grads = [torch.randn_like(w) * 0.01 for w in self.weights]

    def parameters(self) -> list[nn.Parameter]:
        """Return copies of the weights, with copies of the gradients."""
        copies = [nn.Parameter(w.clone()) for w in self.weights]
        for parameter, grad in zip(copies, self.grads, strict=True):
            parameter.grad = grad.clone()
        return copies


class TorchlarsFormula:
    """The step of torchlars's ``lars.py`` (https://github.com/kakaobrain/torchlars)."""

    def __init__(self, base: SGD) -> None:
        self.base = base

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.base.param_groups
        decay, group["weight_decay"] = group["weight_decay"], 0
        for parameter in group["params"]:
            grad = parameter.grad
            w, g = parameter.norm(), grad.norm()
            ratio = torch.where((w > 0) & (g > 0), TRUST * w / (g + decay * w + EPS), torch.ones_like(w))
            grad.add_(parameter, alpha=decay)
            grad.mul_(ratio)
        self.base.step()
        group["weight_decay"] = decay


class MocoLars:
    """The operations of MoCo v3's ``moco/optimizer.py`` and Barlow Twins' ``main.py``, in their order, rewritten."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.buffers = [(parameter, torch.zeros_like(parameter)) for parameter in parameters]

    @torch.no_grad()
    def step(self) -> None:
        for parameter, buffer in self.buffers:
            change: Any = parameter.grad
            if parameter.ndim > 1:
                change = change.add(parameter, alpha=DECAY)
                w, u = torch.norm(parameter), torch.norm(change)
                one = torch.ones_like(w)
                change = change.mul(torch.where(w > 0, torch.where(u > 0, TRUST * w / u, one), one))
            buffer.mul_(MOMENTUM).add_(change)
            parameter.add_(buffer, alpha=-LR)


def as_moco_v3(parameters: list[nn.Parameter]) -> LARS:
    """Return ours with the rule of `MocoLars`."""
    vectors = {"params": [p for p in parameters if p.ndim == 1], "exclude": True, "weight_decay": 0}
    matrices: dict[str, Any] = {"params": [p for p in parameters if p.ndim > 1]}
    return LARS.preset("moco-v3", SGD([matrices, vectors], **HYPER))


def torch_lars(parameters: list[nn.Parameter]) -> Any:
    """Return the LARS of torch-lars, from this checkout."""
    with patch.object(sys, "path", [str(shared.ROOT / "packaging" / "torch-lars"), *sys.path]):
        return importlib.import_module("torch_lars").LARS(SGD(parameters, **HYPER), EPS, TRUST)


def from_file(name: str, path: str, kind: str) -> Any:
    """Return the class `kind` from one file of the installed distribution `name`."""
    # Stands for lightning-bolts's own decorator, which warns of untested code, and needs lightning before 2.0.
    stability = SimpleNamespace(under_review=lambda: lambda decorated: decorated)
    with patch.dict(sys.modules, {"pl_bolts.utils.stability": stability}):
        return runpy.run_path(str(distribution(name).locate_file(path)))[kind]


def package(module: str, name: str, **options: float) -> Build:
    """Return a function that imports a package and builds its optimizer `name`."""
    return lambda parameters: getattr(importlib.import_module(module), name)(parameters, **HYPER, **options)


# Packages get the same trust coefficient; other options keep their defaults.
OPTIMIZERS: dict[str, Build] = {
    "SGD, single": lambda p: SGD(p, **HYPER, foreach=False, fused=False),
    "SGD, foreach": lambda p: SGD(p, **HYPER, foreach=True),
    "SGD, fused": lambda p: SGD(p, **HYPER, fused=True),
    OURS: lambda p: LARS(SGD(p, **HYPER), EPS, TRUST),
    TORCH_LARS: torch_lars,
    "LARS, preset moco-v3": as_moco_v3,
    f"{OURS}, fused": lambda p: LARS(SGD(p, **HYPER, fused=True), EPS, TRUST),
    "torchlars's formula over SGD": lambda p: TorchlarsFormula(SGD(p, **HYPER)),
    "Adam": lambda p: Adam(p, **ADAM),
    "Adam, fused": lambda p: Adam(p, **ADAM, fused=True),
    "LARS over Adam": lambda p: LARS(Adam(p, **ADAM), EPS, TRUST),
    "LARS over Adam, fused": lambda p: LARS(Adam(p, **ADAM, fused=True), EPS, TRUST),
    "timm Lars": package("timm.optim", "Lars"),
    "pytorch_optimizer LARS": package("pytorch_optimizer", "LARS"),
    "torch_optimizer LARS": package("torch_optimizer", "LARS", trust_coefficient=TRUST),
    "open_lars LARS": package("open_lars", "LARS"),
    "lightly LARS": lambda p: from_file("lightly", "lightly/utils/lars.py", "LARS")(p, **HYPER),
    "lightning-bolts LARS": lambda p: from_file("lightning-bolts", "pl_bolts/optimizers/lars.py", "LARS")(p, **HYPER),
    "solo-learn LARSWrapper": lambda p: from_file("solo-learn", "solo/utils/lars.py", "LARSWrapper")(SGD(p, **HYPER)),
    "MoCo v3's loop": MocoLars,
}
SSL = [
    *("SGD, fused", OURS, TORCH_LARS, "LARS, preset moco-v3", "timm Lars"),
    *("lightly LARS", "lightning-bolts LARS", "solo-learn LARSWrapper", "MoCo v3's loop"),
]
"""The contenders on networks of self-supervised learning."""


def problems(device: torch.device) -> Iterator[Problem]:
    """Yield networks, made on the meta device, and many small tensors, all with random weights.

    The projector is SimCLR's, in the sizes of lightly's `SimCLRProjectionHead` (lightly/models/modules/heads.py).
    """
    models = importlib.import_module("torchvision.models")
    with torch.device("meta"):
        resnet, vit = ([p.shape for p in make().parameters()] for make in (models.resnet50, models.vit_b_16))
    small = [(16,), (64,), (256,), (16, 16), (32, 32), (8, 8, 3, 3)]
    projector = [(2048, 2048), (2048,), (2048,), (128, 2048), (128,), (128,)]
    for name, shapes, names in (
        ("ResNet-50", resnet, OPTIMIZERS),
        ("Many small tensors", [small[i % len(small)] for i in range(1000)], OPTIMIZERS),
        ("ResNet-50 with SimCLR's projector", [*resnet[:-2], *projector], SSL),
        ("ViT-B/16", vit, SSL),
    ):
        yield Problem(name, [torch.randn(shape, device=device) * 0.02 for shape in shapes], names)


def make_contender(name: str, given: Problem) -> Contender:
    """Return an optimizer over its own copy of the problem, after a first step that allocates its state."""
    parameters = given.parameters()
    optimizer = OPTIMIZERS[name](parameters)
    grads = [p.grad for p in parameters]

    def restore() -> None:
        for parameter, own, original in zip(parameters, grads, given.grads, strict=True):
            assert own is not None
            parameter.grad = own.copy_(original)

    optimizer.step()
    restore()
    return optimizer.step, restore


def contenders_for(given: Problem, skipped: list[str]) -> dict[str, Contender]:
    """Return all contenders that run here; add others to `skipped`."""
    contenders: dict[str, Contender] = {}
    for name in given.names:
        try:
            contenders[name] = make_contender(name, given)
        except Exception as error:  # anything that a package raises
            reason = "not installed" if isinstance(error, ModuleNotFoundError) else shared.first_line(error)
            skipped.append(f"{name} ({reason})")
    return contenders


class DeviceCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count operations on fake CUDA tensors, and host syncs. Each value that the host reads is replaced by 1."""

    operations = syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if func is torch.ops.aten._local_scalar_dense.default:
            self.syncs += "cuda" in given
            return 1
        # FakeTensor does not implement this operation, which works in place.
        result = None if func is torch.ops.aten._fused_sgd_.default else func(*args, **(kwargs or {}))
        devices = given | {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)}
        if "cuda" in devices and not func.is_view and not func.name().startswith(("prim::", "aten::empty")):
            self.operations += 1
            self.syncs += "cuda" in given and "cpu" in devices - given
        return result


def count_calls(build: Build, shapes: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Return the operations and host syncs of a step on a GPU, after a first step that allocates the state."""
    # torch's optimizers use their foreach implementation only for these types of tensors.
    with patch.object(torch_optimizer, "_foreach_supported_types", [FakeTensor]), FakeTensorMode():
        parameters = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in shapes]
        optimizer = build(parameters)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            with DeviceCalls() as calls:  # type: ignore[no-untyped-call]
                optimizer.step()
    return calls.operations, calls.syncs


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


def measure(contenders: dict[str, Contender], rounds: int, device: torch.device) -> Times:
    """Return the milliseconds of each contender in each round, after WARM_UP rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    gc.collect()
    gc.disable()
    try:
        for number in range(-WARM_UP, rounds):
            first = number % len(names)
            order = names[first:] + names[:first]
            # In alternating directions, so that no contender always follows the same one.
            for name in order if number % 2 else order[::-1]:
                elapsed = milliseconds(contenders[name][0], device)
                if number >= 0:
                    times[name].append(elapsed)
            for _, restore in contenders.values():
                restore()
    finally:
        gc.enable()
    return {name: np.array(values) for name, values in times.items()}


def table(times: dict[str, Times], calls: dict[str, tuple[int, int]]) -> list[str]:
    """Return a Markdown table of the times by mode, their ratios, and a step's operations and host syncs."""
    heads = ["one step of"]
    for mode in times:
        heads += [f"{mode}, ms (10th to 90th percentile)", "÷ SGD fused", "÷ LARS"]
    heads += ["operations on a GPU", "host syncs"] if calls else []
    rows = []
    for name in next(iter(times.values())):
        cells: list[object] = [name]
        for own in times.values():
            cells.append(shared.spread(own[name], ".2f"))
            cells += [f"{np.median(own[name] / own[to]):.2f}" for to in ("SGD, fused", OURS)]
        rows.append([*cells, *calls.get(name, ())])
    return shared.table(heads, rows)


def run(given: Problem, threads: Sequence[int], rounds: int) -> list[str]:
    """Time and count all contenders; return the table, with its heading. `threads`: none on CUDA."""
    device, skipped = given.weights[0].device, list[str]()
    contenders = contenders_for(given, skipped)
    calls = {n: count_calls(OPTIMIZERS[n], [w.shape for w in given.weights]) for n in contenders if given.names is SSL}
    times: dict[str, Times] = {}
    for number in threads or [0]:
        if number:
            torch.set_num_threads(number)
            shared.pin_to_cores(number)
        times[f"{number} thread{'s' * (number > 1)}" if number else "time"] = measure(contenders, rounds, device)
    elements = sum(w.numel() for w in given.weights)
    lines = ["", f"**{given.name}**: {len(given.weights):,} tensors, {elements:,} elements.", "", *table(times, calls)]
    return [*lines, "", f"Skipped: {'; '.join(skipped)}."] if skipped else lines


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    shared.require_cuda(parser, args.device)
    device = torch.device(args.device)
    lines = [
        f"`python scripts/bench/bench_lars.py --device {args.device}` on {shared.device_name(args.device)}; "
        f"{shared.software(*PACKAGES)}. float32, momentum {MOMENTUM}, weight decay {DECAY:g}; "
        f"{args.rounds} rounds after {WARM_UP} that do not count."
    ]
    print(lines[0], flush=True)
    short = lines.copy()
    torch.manual_seed(0)
    for given in problems(device):
        part = run(given, args.threads if device.type == "cpu" else (), args.rounds)
        print("\n".join(part), flush=True)
        lines += part
        short += part if given.names is SSL else []
    shared.write_page(lines, args.write, f"bench_lars {args.device}")
    for page in args.short:
        shared.write_page(short, page, "bench_lars short")


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
