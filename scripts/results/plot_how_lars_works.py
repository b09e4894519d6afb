"""Trains the embedded pictures at one large batch with and without LARS, and draws what docs/how_lars_works.md shows.

    python scripts/results/plot_how_lars_works.py           # four short runs in build/how_lars_works, then the pictures
    python scripts/results/plot_how_lars_works.py --epochs 2        # a quicker look

All runs have batch 32k of the default recipe at the scale of the embedded set, its warm-up and poly(2), the tiny
network, the same seed and one process; what differs is the optimizer and its learning rate. The same command finds
the runs that are there. Writes STEM_ratios and STEM_curves, each as .png and .svg, and the page's part between its
markers.
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import matplotlib as mpl
from child import end_on_signals
from child import run as run_child
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from page import between_markers, cpu_name, writable_page

from lars_train.report.curves import COLORS, LINES, MARKERS
from lars_train.report.read import FINISHED, Ratios, RunRecord, read_ratios, read_run

ROOT = Path(__file__).resolve().parents[2]
MARKED = "plot_how_lars_works"
SETTINGS = (
    "batch=32k model=tiny precision=fp32 seed=0 log_every=3 verbosity=0 launch.nproc=1 launch.threads=1 data.workers=0"
).split()
# The row's own lr; the same without LARS; the linear rule, 0.1 at 256 (Goyal et al. 2017); one that is much smaller.
RUNS = {
    "LARS, lr 29": ("lars", ()),
    "SGD, lr 29": ("sgd-29", ("optimizer=sgd", "optimizer.lr=29")),
    "SGD, lr 12.8": ("sgd-12.8", ("optimizer=sgd", "optimizer.lr=12.8")),
    "SGD, lr 0.8": ("sgd-0.8", ("optimizer=sgd", "optimizer.lr=0.8")),
}
_LOOK: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "lars-train",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#808080",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
}


def main() -> None:
    """Train what is not there yet, draw, and write the page's part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "build" / "how_lars_works", help="where the runs live")
    parser.add_argument("--epochs", type=int, default=6, help="of each run (6)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "how_lars_works", metavar="STEM")
    parser.add_argument(
        "--write", type=writable_page(MARKED), metavar="PAGE", help="the page whose part is written anew"
    )
    args = parser.parse_args()
    runs = {label: train(args.runs / name, args.epochs, settings) for label, (name, settings) in RUNS.items()}
    first = next(iter(runs.values()))
    ratios = read_ratios(first.directory)
    if ratios is None:
        sys.exit(f"{first.directory} has no trust ratios")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    per_epoch = first.updates / args.epochs
    save(draw_ratios(ratios, per_epoch), args.out.with_name(args.out.name + "_ratios"))
    save(draw_curves(runs), args.out.with_name(args.out.name + "_curves"))
    told = lines(runs, ratios, args.epochs)
    print("\n".join(told))
    if args.write is not None:
        args.write.write_text(between_markers(args.write.read_text(), MARKED, told))


def train(directory: Path, epochs: int, settings: Sequence[str]) -> RunRecord:
    """The run in `directory`, trained to its end if it is not there; one that diverges ends before it."""
    own = (f"run.dir={directory}", f"epochs={epochs}", *settings)
    code = run_child([sys.executable, "-m", "lars_train", *SETTINGS, *own])
    if code and not (directory / "divergence.jsonl").exists():
        sys.exit(code)
    return read_run(directory)


def draw_ratios(ratios: Ratios, per_epoch: float) -> Figure:
    """Trust ratios over epochs: each matrix's; of batch norm's scales and shifts the medians and ranges."""
    with mpl.rc_context(_LOOK):
        figure = Figure(figsize=(9.5, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        layers, colours = weights_of(ratios), mpl.colormaps["viridis"]
        for number, layer in enumerate(layers):
            # From the input, dark, to the output, light.
            look: Any = {"color": colours(0.92 * number / max(1, len(layers) - 1)), "linestyle": LINES[number % 4]}
            left.plot(*series(ratios, layer, per_epoch), **look, linewidth=1.2, label=layer.removesuffix(".weight"))
        rest = rest_of(ratios)
        for number, (label, suffix) in enumerate((("scales", "weight"), ("shifts", "bias"))):
            several = [series(ratios, layer, per_epoch) for layer in rest if re.search(rf"bn\d\.{suffix}$", layer)]
            x, columns = several[0][0], list(zip(*(values for _, values in several), strict=True))
            right.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=COLORS[number], alpha=0.2)
            look = {"color": COLORS[number], "linestyle": LINES[number]}
            right.plot(x, [median(c) for c in columns], **look, label=f"{label} of batch norm: median, range")
        right.plot(*series(ratios, "fc.bias", per_epoch), color=COLORS[2], linestyle=LINES[2], label="fc.bias")
        left.set(title="convolutions and the last layer", ylabel="trust ratio", xlabel="epoch")
        right.set(title="batch norm and the last bias", xlabel="epoch", ylim=(1e-3, 3), yscale="log")
        for axes in (left, right):
            axes.legend(frameon=False, fontsize=7.5, ncols=2 if axes is left else 1, loc="upper right")
    return figure


def draw_curves(runs: dict[str, RunRecord]) -> Figure:
    """Training loss and validation top-1 over epochs."""
    with mpl.rc_context(_LOOK):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        loss, top1 = figure.subplots(1, 2, sharex=True)
        for number, (label, run) in enumerate(runs.items()):
            look: Any = {"color": COLORS[number], "linestyle": LINES[number], "linewidth": 1.4}
            shown = label if run.state == FINISHED else f"{label}: {run.state}"
            _line(loss, [(p.epoch, p.value) for p in run.loss], **look, label=shown)
            _line(top1, [(p.epoch, p.value) for p in run.top1], **look, marker=MARKERS[number], markersize=4)
        loss.set_yscale("log")
        loss.set(title="training loss (nats)", xlabel="epoch")
        top1.set(title="top-1 of the 2,000 validation images (%)", xlabel="epoch", ylim=(0, 100))
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _line(axes: Axes, points: Sequence[tuple[float, float]], **look: Any) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], **look)


def series(ratios: Ratios, layer: str, per_epoch: float) -> tuple[list[float], list[float]]:
    """Epochs and trust ratios of a layer; a ratio that was not finite is a gap."""
    column = ratios.layers.index(layer)
    values = [line[column] for line in ratios.values]
    return [update / per_epoch for update in ratios.updates], [math.nan if v is None else v for v in values]


def weights_of(ratios: Ratios) -> list[str]:
    """The layers that are matrices: convolutions' weights and the last layer's."""
    return [layer for layer in ratios.layers if layer.endswith(("conv1.weight", "conv2.weight", "fc.weight"))]


def rest_of(ratios: Ratios) -> list[str]:
    """The layers that are vectors: batch norm's scales and shifts, and the last layer's bias."""
    matrices = weights_of(ratios)
    return [layer for layer in ratios.layers if layer not in matrices]


def lines(runs: dict[str, RunRecord], ratios: Ratios, epochs: int) -> list[str]:
    """The page's part: command and versions, how each run ended, and the ratios' spread."""
    command = f"python scripts/results/plot_how_lars_works.py --epochs {epochs} --write docs/how_lars_works.md"
    versions = f"Python {platform.python_version()}, torch {version('torch')}"
    told = [
        f"`{command}` on {cpu_name()}, one thread; {versions}.",
        "",
        "| optimizer | updates | last training loss | top-1 %, last epoch | how it ended |",
        "|---|---:|---:|---:|---|",
    ]
    for label, run in runs.items():
        loss = f"{run.loss[-1].value:.3g}" if run.loss else "-"
        top1 = f"{run.top1[-1].value:.2f}" if run.top1 else "-"
        told.append(f"| {label} | {run.updates:,} | {loss} | {top1} | {run.state} |")
    told += ["", "| median trust ratio over the run | smallest layer | largest layer |", "|---|---:|---:|"]
    for name, layers in (("weights", weights_of(ratios)), ("batch norm and bias", rest_of(ratios))):
        middle = {layer: median(v for v in series(ratios, layer, 1.0)[1] if not math.isnan(v)) for layer in layers}
        low, high = min(middle, key=middle.__getitem__), max(middle, key=middle.__getitem__)
        told.append(f"| {name} | {middle[low]:.2g} (`{low}`) | {middle[high]:.2g} (`{high}`) |")
    return told


def save(figure: Figure, stem: Path) -> None:
    """Write `stem`.png and `stem`.svg."""
    figure.savefig(stem.with_name(stem.name + ".png"), dpi=160, metadata={"Software": None})
    figure.savefig(stem.with_name(stem.name + ".svg"), metadata={"Date": None})


if __name__ == "__main__":
    end_on_signals()
    main()
