"""Where the time of a training step goes: lars-train's update of ResNet-50, by kind of operation, on the CPU.

    python scripts/bench/profile_step.py [--write docs/performance.md]

The update is that of bench_step.py by default: one micro-batch that is one ghost batch. torch's profiler tells the time
of each operation less that of those it calls; what no operation accounts for is Python's and the profiler's own.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from arguments import count
from bench_step import CASES, CPU, ours, plain_network, precision
from child import end_on_signals
from page import between_markers, command_line, cpu_name, writable_page
from torch.profiler import ProfilerActivity, profile

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
    "sums with the shortcuts, of gradients": ("aten::add",),
}
"""Parts of operations' names, the first that fits."""
OPTIMIZER, OTHER, UNACCOUNTED = "optimizer", "other operations", "Python and the profiler"
BACKWARD = "backward"


def kind_of(name: str, callers: Iterable[str]) -> tuple[str, bool]:
    """The kind of an operation, and whether it belongs to the backward pass, by its name and those of its callers."""
    above = list(callers)
    if any(caller.startswith("Optimizer.step") for caller in (name, *above)):
        return OPTIMIZER, False
    late = any("Backward" in caller or BACKWARD in caller for caller in (name, *above))
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind, late
    return OTHER, late


def shares(step: Any) -> dict[tuple[str, bool], float]:
    """Seconds of one call of `step` by kind, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        step()
        wall = time.perf_counter() - started
    seconds: dict[tuple[str, bool], float] = {}
    for event in found.events() or []:
        callers, above = [], event.cpu_parent
        while above is not None:
            callers.append(above.name)
            above = above.cpu_parent
        kind = kind_of(event.name, callers)
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    seconds[UNACCOUNTED, False] = max(wall - sum(seconds.values()), 0.0)
    return seconds


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[case.name for case in CASES], default="resnet50", help="(resnet50)")
    parser.add_argument("--images", type=count, help="at once")
    parser.add_argument("--size", type=count, help="their side in pixels")
    parser.add_argument("--threads", type=count, help="torch's (all cores)")
    parser.add_argument("--updates", type=count, default=5, help="after two that do not count (5)")
    parser.add_argument(
        "--write", type=writable_page("profile_step"), metavar="PAGE", help="put the table between the page's markers"
    )
    args = parser.parse_args()
    (case,) = (case for case in CASES if case.name == args.case)
    images = args.images or case.images
    case = replace(case, images=images, size=args.size or case.size, ghost=images)
    threads = args.threads or available_cores()
    set_up(Config(), CPU, threads)
    step = ours(case, compiled=False)
    step()
    step()
    found = [shares(step) for _ in range(args.updates)]
    wall = statistics.median(sum(one.values()) for one in found)
    lines = [
        f"`{command_line(__file__)}` on {cpu_name()}, {threads} threads; Python {platform.python_version()}, "
        f"torch {version('torch')}. An update of {case.name}, {case.images} images of {case.size} x {case.size}, "
        f"{precision().name}: {wall:.3f} s, the median of {args.updates}, by kind of operation:",
        "",
        "| | forward | backward |",
        "|---|---:|---:|",
    ]

    def share(kind: str, late: bool) -> float:
        return statistics.median(one.get((kind, late), 0.0) / sum(one.values()) for one in found)

    lines += [f"| {kind} | {share(kind, False):.1%} | {share(kind, True):.1%} |" for kind in (*KINDS, OTHER)]
    lines += [f"| {kind} | {share(kind, False):.1%} | |" for kind in (OPTIMIZER, UNACCOUNTED)]
    peak = peak_flops(precision(), CPU, threads)
    done = flops_per_image(plain_network(case), case.size) * case.images
    spent = wall * (share(CONVOLUTION, False) + share(CONVOLUTION, True))
    lines += [
        "",
        f"Square matrix products reach {peak / 1e12:.2f} TFLOP/s here; the convolutions and the last layer, in the "
        f"convolutions' time, {done / spent / 1e12:.2f}; in the update's, {done / wall / 1e12:.2f}.",
    ]
    print("\n".join(lines))
    if args.write:
        args.write.write_text(between_markers(args.write.read_text(), "profile_step", lines))


if __name__ == "__main__":
    end_on_signals()
    main()
