"""Report of reproduce_scaled_table.py: tables, plots, and records of the runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import shared

MARKER = "scaled"
STYLE: Any = {"svg.hashsalt": "lars-train", "svg.fonttype": "none", "font.size": 10}
# Okabe and Ito, https://jfly.uni-koeln.de/color/
SWEEPS = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."))
ROWS = {
    "256": (("#000000", "-"),),
    "8k": (("#0072B2", "--"),),
    "16k": (("#009E73", "-."),),
    "32k": (("#D55E00", "-"), ("#CC79A7", ":")),
}
"""Styles for the first and a second curve of each row."""
NEAR = 2.0
"""A learning rate is near the best if its top-1 is at most this many points lower."""
PUBLISHED = {"8k": 73.79 - 73.78, "16k": 73.79 - 73.36, "32k": 73.79 - 72.26}
"""Points of top-1 by which the published rows are below the 256 row (https://github.com/kakaobrain/torchlars)."""


@dataclass(frozen=True)
class Point:
    """A learning rate of a sweep; `top1` in percent, None if the run diverged."""

    lr: float
    top1: float | None
    recipe: bool


@dataclass(frozen=True)
class Result:
    """A cell of the table. `lr`: None for the recipe's. `finals`: ``final.json`` of each run that did not diverge."""

    row: str
    optimizer: str
    lr: float | None
    baseline: bool
    finals: Sequence[dict[str, Any]]
    diverged: int

    def top1(self, kind: str) -> list[float]:
        """Return the top-1 on the test images in percent for each seed; `kind` is final or best."""
        return [final[f"{kind}_top1"] for final in self.finals]


def sweep_table(name: str, points: Sequence[Point]) -> list[str]:
    """Return a table of held-out top-1 by learning rate, and the range of rates near the best."""
    rates = [f"{point.lr:g}{' (recipe)' if point.recipe else ''}" for point in points]
    found = ["diverged" if point.top1 is None else f"{point.top1:.2f}" for point in points]
    lines = shared.table([f"{name}: lr", *rates], [["top-1 %, held out", *found]])
    low, high = plateau(points)
    if low is not None and high is not None:
        lines += ["", f"Within {NEAR:g} points of its best: lr {low:.3g} to {high:.3g}, a factor of {high / low:.1f}."]
    return lines


def plateau(points: Sequence[Point]) -> tuple[float | None, float | None]:
    """Return the lowest and the highest learning rate near the best point.

    Top-1 is interpolated linearly over the logarithm of the learning rate. Next to a point that diverged, the plateau
    ends at the last point that did not. None on a side where the sweep ends before the plateau.
    """
    ordered = sorted(points, key=lambda point: point.lr)
    found = [-math.inf if point.top1 is None else point.top1 for point in ordered]
    top = found.index(max(found))
    limit = found[top] - NEAR

    def edge(numbers: Sequence[int]) -> float | None:
        inside = top
        for outside in numbers:
            if found[outside] < limit:
                share = (found[inside] - limit) / (found[inside] - found[outside])
                return float(ordered[inside].lr * (ordered[outside].lr / ordered[inside].lr) ** share)
            inside = outside
        return None

    return edge(range(top - 1, -1, -1)), edge(range(top + 1, len(ordered)))


def result_table(results: Sequence[Result]) -> list[str]:
    """Return the table, with the difference of each cell from the baseline."""
    heads = ["row", "batch", "optimizer", "lr", "top-1 %, last epoch", "top-1 %, best epoch"]
    heads += ["difference from the 256 row", "published"]
    rows = []
    baseline = next((fmean(one.top1("final")) for one in results if one.baseline and one.finals), None)
    for result in results:
        of_lars, first = result.optimizer == "lars", next(iter(result.finals), {})
        published = PUBLISHED.get(result.row) if of_lars and result.lr is None else None
        rows.append(
            [
                *(result.row.upper(), str(first.get("global_batch", 0)), "LARS" if of_lars else "SGD"),
                f"{first.get('lr', result.lr or math.nan):g}{' (recipe)' if result.lr is None else ''}",
                *(spread(result.top1(kind), result.diverged) for kind in ("final", "best")),
                "" if baseline is None or not result.finals else f"{fmean(result.top1('final')) - baseline:+.2f}",
                "" if published is None else f"{-published:+.2f}",
            ]
        )
    return shared.table(heads, rows)


def spread(values: Sequence[float], diverged: int) -> str:
    """Format the mean and standard deviation over the seeds, and the number of diverged runs."""
    text = f"{fmean(values):.2f}" if values else ""
    text += f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{text} ({diverged} diverged)".strip() if diverged else text


def draw_sweeps(sweeps: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Plot top-1 over the learning rate, a curve per sweep, as PATH.svg and PATH.png; rings mark the recipe's rates."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for (name, points), (color, marker, line) in zip(sweeps.items(), SWEEPS, strict=False):
            found = {point.lr: point.top1 for point in points if point.top1 is not None}
            axes.plot(list(found), list(found.values()), color=color, marker=marker, linestyle=line, label=name)
            own = {point.lr: found[point.lr] for point in points if point.recipe and point.lr in found}
            axes.plot(list(own), list(own.values()), "o", markersize=13, fillstyle="none", color=color)
        axes.set(xscale="log", xlabel="learning rate", ylabel="top-1 on held-out images (%)")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter("{x:g}")
        figure.legend(loc="outside upper center", ncols=len(sweeps))
        shared.save_figure(figure, path)


def draw_curves(panels: Mapping[str, Sequence[Sequence[Path]]], path: Path) -> None:
    """Plot top-1 over epochs as PATH.svg and PATH.png, with one panel per title and one curve per cell.

    Curves are means over the seeds, with a band of one standard deviation.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from lars_train.report.read import read_run

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, cells) in zip(row, panels.items(), strict=True):
            styles = {name: iter(own) for name, own in ROWS.items()}
            for records in cells:
                runs = [read_run(record) for record in records]
                color, line = next(styles[runs[0].batch])
                by_epoch = [{point.epoch: point.value for point in run.top1 if point.epoch is not None} for run in runs]
                epochs = sorted(set.intersection(*map(set, by_epoch)))
                means = [fmean(found[epoch] for found in by_epoch) for epoch in epochs]
                deviations = [stdev(f[epoch] for f in by_epoch) if len(by_epoch) > 1 else 0.0 for epoch in epochs]
                label = f"{runs[0].batch.upper()}, lr {runs[0].setting('optimizer.lr')}"
                axes.plot(epochs, means, color=color, linestyle=line, label=label)
                low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
                axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend(loc="lower right")
        row[0].set_ylabel("top-1 on test images (%)")
        row[0].set_ylim(bottom=0)
        shared.save_figure(figure, path)
