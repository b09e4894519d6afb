"""Profile lars-train's update of ResNet-50 on the CPU, by kind of operation.

    python scripts/bench/profile_step.py [--write docs/performance.md]

The update is the one of bench_step.py: one micro-batch, which is one ghost batch. Each operation counts without the
operations that it calls, as torch's profiler reports it. The rest is time in Python and in the profiler itself.

Takes about a minute. Figures: docs/performance.md.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "profile_step")
    PARSER.add_argument("--case", choices=("resnet50", "small"), default="resnet50", help="(resnet50)")
    PARSER.add_argument("--images", type=shared.positive_int, help="per micro-batch")
    PARSER.add_argument("--size", type=shared.positive_int, help="side of an image in pixels")
    PARSER.add_argument("--threads", type=shared.positive_int, help="of torch (all cores)")
    PARSER.add_argument("--updates", type=shared.positive_int, default=5, help="after two that do not count (5)")
    ARGS = PARSER.parse_args()

from torch.profiler import ProfilerActivity, profile
from training_steps import CASES, CPU, Step, ours, plain_network, precision

from lars_train.config import Config
from lars_train.training.device import available_cores, set_up
from lars_train.training.metrics import flops_per_image, peak_flops

CONVOLUTION = "convolutions"
KINDS = {
    CONVOLUTION: ("convolution",),
    "batch norms": ("batch_norm",),
    "ReLUs": ("relu", "clamp_min", "threshold"),
    "conversions between precisions and layouts": ("aten::copy_", "aten::_to_copy", "aten::to"),
    "pooling, the last layer, loss": ("pool", "addmm", "aten::mm", "softmax", "nll_loss", "aten::mean"),
    "additions: shortcuts, gradients": ("aten::add",),
}
"""Substrings of operation names by kind; the first match counts."""
OPTIMIZER, OTHER, REST = "optimizer", "other operations", "Python and the profiler"
Kind = tuple[str, bool]
"""The kind of an operation, and whether it belongs to the backward pass."""


def kind_of(name: str, callers: Iterable[str]) -> Kind:
    """Classify an operation by its name and the names of its callers."""
    names = (name, *callers)
    if any(one.startswith("Optimizer.step") for one in names):
        return OPTIMIZER, False
    backward = any("backward" in one.lower() for one in names)
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER), backward


def profile_once(step: Step) -> dict[Kind, float]:
    """Profile one step; return its seconds by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        step()
        wall = time.perf_counter() - started
    seconds: dict[Kind, float] = {}
    for event in profiled.events() or []:
        callers, caller = [], event.cpu_parent
        while caller is not None:
            callers.append(caller.name)
            caller = caller.cpu_parent
        kind = kind_of(event.name, callers)
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    seconds[REST, False] = max(wall - sum(seconds.values()), 0.0)
    return seconds


def main(args: Namespace) -> None:
    """Measure, print, write."""
    (case,) = (case for case in CASES if case.name == args.case)
    images = args.images or case.images
    case = replace(case, images=images, size=args.size or case.size, ghost=images)
    threads = args.threads or available_cores()
    set_up(Config(), CPU, threads)
    step = ours(case)
    step()
    step()
    found = [profile_once(step) for _ in range(args.updates)]
    wall = statistics.median(sum(one.values()) for one in found)

    def share(kind: str, backward: bool = False) -> float:
        return statistics.median(one.get((kind, backward), 0.0) / sum(one.values()) for one in found)

    peak = peak_flops(precision(), CPU, threads)
    flops = flops_per_image(plain_network(case), case.size) * case.images
    spent = wall * (share(CONVOLUTION) + share(CONVOLUTION, True))
    lines = [
        f"`{shared.command_line(__file__)}` on {shared.cpu_name()}, {threads} threads; {shared.software()}. An update "
        f"of {case.name}, {case.images} images of {case.size} x {case.size}, {precision().name}: {wall:.3f} s, the "
        f"median of {args.updates}, by kind of operation:",
        "",
        "| | forward | backward |",
        "|---|---:|---:|",
        *(f"| {kind} | {share(kind):.1%} | {share(kind, True):.1%} |" for kind in (*KINDS, OTHER)),
        *(f"| {kind} | {share(kind):.1%} | |" for kind in (OPTIMIZER, REST)),
        "",
        f"TFLOP/s: square matrix products reach {peak / 1e12:.2f} here. The network's products reach "
        f"{flops / spent / 1e12:.2f} over the time of the convolutions, {flops / wall / 1e12:.2f} over the update.",
    ]
    shared.publish(lines, args.write, "profile_step")


if __name__ == "__main__":
    shared.exit_on_signals()
    main(ARGS)
