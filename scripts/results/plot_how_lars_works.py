"""Train the embedded data set at one large batch with and without LARS, and draw the plots of docs/how_lars_works.md.

    python scripts/results/plot_how_lars_works.py --write docs/benchmarks.md
    python scripts/results/plot_how_lars_works.py --epochs 2        # a quicker look

All runs use row 32k of the default recipe, scaled to the embedded set, with its warm-up and poly(2), the tiny network,
the same seed and one process; only the optimizer and its learning rate differ. The runs are in build/how_lars_works;
finished runs are not repeated. The plots are docs/results/how_lars_works_ratios and _curves, each as .png and .svg.

Takes about five minutes. Figures: docs/how_lars_works.md.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before matplotlib is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "plot_how_lars_works")
    PARSER.add_argument("--epochs", type=shared.positive_int, default=6, help="per run (6)")
    ARGS = PARSER.parse_args()

import matplotlib as mpl
from matplotlib.figure import Figure

from lars_train.report.curves import COLORS, LINES, MARKERS
from lars_train.report.read import FINISHED, Ratios, RunRecord, read_ratios, read_run

OUT = shared.ROOT / "docs/results"
SETTINGS = (
    "batch=32k model=tiny precision=fp32 seed=0 log_every=3 verbosity=0 launch.nproc=1 launch.threads=1 data.workers=0"
).split()
# The lr of the row, with and without LARS; linear scaling from 0.1 at 256 (Goyal et al. 2017); a much smaller lr.
RUNS = {
    "LARS, lr 29": ("lars", ()),
    "SGD, lr 29": ("sgd-29", ("optimizer=sgd", "optimizer.lr=29")),
    "SGD, lr 12.8": ("sgd-12.8", ("optimizer=sgd", "optimizer.lr=12.8")),
    "SGD, lr 0.8": ("sgd-0.8", ("optimizer=sgd", "optimizer.lr=0.8")),
}
STYLE: Any = {
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


def train(directory: Path, epochs: int, settings: Sequence[str]) -> RunRecord:
    """Train the run in `directory` unless it has finished; return its record. A run that diverges ends early."""
    own = (f"run.dir={directory}", f"epochs={epochs}", *settings)
    with shared.running([*shared.LARS_TRAIN, *SETTINGS, *own]) as process:
        code = process.wait()
    if code and not (directory / "divergence.jsonl").exists():
        sys.exit(code)
    return read_run(directory)


def draw_ratios(ratios: Ratios, per_epoch: float) -> Figure:
    """Plot trust ratios over epochs: each matrix, and the median and range of batch norm's scales and shifts."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        layers, colors = matrices(ratios), mpl.colormaps["viridis"]
        for number, layer in enumerate(layers):
            # Dark near the input, light near the output.
            look: Any = {"color": colors(0.92 * number / max(1, len(layers) - 1)), "linestyle": LINES[number % 4]}
            left.plot(*series(ratios, layer, per_epoch), **look, linewidth=1.2, label=layer.removesuffix(".weight"))
        rest = vectors(ratios)
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
    """Plot training loss and validation top-1 over epochs."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        loss, top1 = figure.subplots(1, 2, sharex=True)
        for number, (label, run) in enumerate(runs.items()):
            look: Any = {"color": COLORS[number], "linestyle": LINES[number], "linewidth": 1.4}
            shown = label if run.state == FINISHED else f"{label}: {run.state}"
            loss.plot([p.epoch for p in run.loss], [p.value for p in run.loss], **look, label=shown)
            look |= {"marker": MARKERS[number], "markersize": 4}
            top1.plot([p.epoch for p in run.top1], [p.value for p in run.top1], **look)
        loss.set_yscale("log")
        loss.set(title="training loss (nats)", xlabel="epoch")
        top1.set(title="top-1 of the 2,000 validation images (%)", xlabel="epoch", ylim=(0, 100))
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def series(ratios: Ratios, layer: str, per_epoch: float) -> tuple[list[float], list[float]]:
    """Return epochs and trust ratios of a layer, with NaN for a ratio that was not finite."""
    column = ratios.layers.index(layer)
    values = [line[column] for line in ratios.values]
    return [update / per_epoch for update in ratios.updates], [math.nan if v is None else v for v in values]


def matrices(ratios: Ratios) -> list[str]:
    """Return the layers that are matrices: the weights of convolutions and of the last layer."""
    return [layer for layer in ratios.layers if layer.endswith(("conv1.weight", "conv2.weight", "fc.weight"))]


def vectors(ratios: Ratios) -> list[str]:
    """Return the layers that are vectors: batch norm's scales and shifts, and the last layer's bias."""
    return [layer for layer in ratios.layers if layer not in matrices(ratios)]


def page_lines(runs: dict[str, RunRecord], ratios: Ratios, epochs: int) -> list[str]:
    """Return the lines for the page: command and versions, the end of each run, and the spread of the ratios."""
    command = f"python scripts/results/plot_how_lars_works.py --epochs {epochs} --write docs/benchmarks.md"
    ends, spans = [], []
    for label, run in runs.items():
        loss = f"{run.loss[-1].value:.3g}" if run.loss else "-"
        top1 = f"{run.top1[-1].value:.2f}" if run.top1 else "-"
        ends.append((label, f"{run.updates:,}", loss, top1, run.state))
    for name, layers in (("weights", matrices(ratios)), ("batch norm and bias", vectors(ratios))):
        middle = {layer: median(v for v in series(ratios, layer, 1.0)[1] if not math.isnan(v)) for layer in layers}
        low, high = min(middle, key=middle.__getitem__), max(middle, key=middle.__getitem__)
        spans.append((name, f"{middle[low]:.2g} (`{low}`)", f"{middle[high]:.2g} (`{high}`)"))
    return [
        f"`{command}` on {shared.cpu_name()}, one thread; {shared.software()}.",
        "",
        *shared.table(["optimizer", "updates", "last training loss", "top-1 %, last epoch", "how it ended"], ends),
        "",
        *shared.table(["median trust ratio over the run", "smallest layer", "largest layer"], spans),
    ]


def main() -> None:
    """Train unfinished runs, plot, and write the page."""
    args = ARGS
    runs = {
        label: train(shared.ROOT / "build/how_lars_works" / name, args.epochs, settings)
        for label, (name, settings) in RUNS.items()
    }
    first = next(iter(runs.values()))
    ratios = read_ratios(first.directory)
    if ratios is None:
        sys.exit(f"{first.directory} has no trust ratios")
    per_epoch = first.updates / args.epochs
    shared.save_figure(draw_ratios(ratios, per_epoch), OUT / "how_lars_works_ratios")
    shared.save_figure(draw_curves(runs), OUT / "how_lars_works_curves")
    shared.publish(page_lines(runs, ratios, args.epochs), args.write, "plot_how_lars_works")


if __name__ == "__main__":
    shared.exit_on_signals()
    main()
