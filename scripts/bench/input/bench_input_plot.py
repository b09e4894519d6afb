"""bench_input.py's plot: images per CPU-second of every contender, on each kind of stored pictures.

Colours that the colour-blind tell apart, and with each another marker, so that it can be read in print.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from bench_input_contenders import EVAL, FLOOR, OURS, TASKS, TRAIN
from bench_input_results import Results, spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lars_train.report.curves import COLORS, MARKERS

TITLES = {TRAIN: "Training: random resized crop, flip", EVAL: "Evaluation: resize, centre crop"}
_SETTINGS: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "lars-train",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(results: Results, stem: Path) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.svg; the paths of both."""
    names = sorted(results.contenders, key=lambda name: _speed(results, name))
    paths = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    stem.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(9.5, 1.6 + 0.33 * len(names)), layout="constrained")
        both = figure.subplots(1, len(TASKS), sharex=True, sharey=True)
        for axes, task in zip(both, TASKS, strict=True):
            _panel(axes, results, names, task)
        for label, name in zip(both[0].get_yticklabels(), names, strict=True):
            label.set_fontweight("bold" if name in OURS else "normal")
        figure.supxlabel(
            "images per CPU-second: median over the rounds, and 10th to 90th percentile", fontsize="medium"
        )
        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="none", label=f"pictures {store}")
            for store, colour, marker in zip(results.stores, COLORS, MARKERS, strict=False)
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        figure.savefig(paths[0], dpi=160, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _panel(axes: Axes, results: Results, names: list[str], task: str) -> None:
    # From the top: the stores of one contender lie a little below each other, so that none hides another.
    below = np.linspace(0.22, -0.22, len(results.stores)) if len(results.stores) > 1 else [0.0]
    for store, colour, marker, offset in zip(results.stores, COLORS, MARKERS, below, strict=False):
        rows, medians, beside = [], [], []
        for row, name in enumerate(names):
            if (name, task, store) in results.rates:
                rates = results.rates[name, task, store]
                median, (low, high) = float(np.median(rates)), spread(rates)
                rows.append(row + offset)
                medians.append(median)
                beside.append((median - low, high - median))
        axes.errorbar(
            medians,
            rows,
            xerr=np.array(beside).T if beside else None,
            fmt=marker,
            color=colour,
            markersize=5,
            elinewidth=1.2,
        )
    axes.set_yticks(range(len(names)), [f"{name} (no resizing)" if name == FLOOR else name for name in names])
    axes.set_title(TITLES[task])
    axes.set_xlim(left=0)
    axes.grid(axis="x", color="#808080", alpha=0.3, linewidth=0.6)
    axes.grid(axis="y", color="#808080", alpha=0.2, linewidth=0.5, linestyle=":")
    axes.set_axisbelow(True)


def _speed(results: Results, name: str) -> float:
    """In training, where it does that."""
    found = (results.rates.get((name, task, results.base)) for task in TASKS)
    return next((float(np.median(rates)) for rates in found if rates is not None), 0.0)
