"""Tables and plot of bench_input.py's results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import shared
from contenders import EVAL, FLOOR, NATIVE, OURS, REFERENCE, TASKS, TRAIN

Key = tuple[str, str, str]
"""Contender, task, store."""


class Distance(NamedTuple):
    """Mean and largest difference from Pillow's full decode, in levels of 255, and how many views `of` all differ."""

    mean: float
    most: int
    views: int
    of: int


@dataclass
class Results:
    """Results by contender, task and store.

    `stores`: mean bytes of an image by store; ratios refer to the first store. `rates`: images per second of CPU time,
    round by round.
    """

    stores: dict[str, float]
    contenders: list[str]
    rates: dict[Key, npt.NDArray[np.float64]]
    distances: dict[Key, Distance]

    def ratios(self, one: Key, other: Key) -> npt.NDArray[np.float64] | None:
        """Return the ratio of two rates in each round; None if one of them was not measured."""
        return self.rates[one] / self.rates[other] if one in self.rates and other in self.rates else None


def tables(results: Results) -> Iterator[str]:
    """Yield a table for each store."""
    base = next(iter(results.stores))
    columns = "".join(
        f" {task}, images/s | ÷ reference{', ' + base if len(results.stores) > 1 else ''} (10th to 90th percentile) | "
        "÷ floor | pixels apart: mean, most |"
        for task in TASKS
    )
    for store, size in results.stores.items():
        yield from (f"Images, {store}, mean {size / 1e3:.0f} kB:", "", f"| contender |{columns}")
        yield "|---|" + "---:|" * 4 * len(TASKS)
        for name in results.contenders:
            cells = [cell for task in TASKS for cell in _cells(results, (name, task, store), base)]
            yield f"| {' | '.join([name, *cells])} |"
        yield ""


def _cells(results: Results, key: Key, base: str) -> list[str]:
    if key not in results.rates:
        return ["-"] * 4
    _, task, store = key
    gain, near = results.ratios(key, (REFERENCE, task, base)), results.ratios(key, (FLOOR, task, store))
    apart = results.distances.get(key)
    return [
        f"{np.median(results.rates[key]):,.0f}",
        "-" if gain is None else "{1:.2f} ({0:.2f} to {2:.2f})".format(*np.percentile(gain, (10, 50, 90))),
        "-" if near is None else f"{np.median(near):.2f}",
        "-" if apart is None else f"{apart.mean:.3f}, {apart.most}",
    ]


def comparisons(results: Results) -> Iterator[str]:
    """Yield lines that compare the native decoder with the fastest peer, and its pixels with Pillow's."""
    peers = [name for name in results.contenders if name not in (REFERENCE, *OURS, FLOOR)]
    for store in results.stores:
        for task in TASKS:
            speeds = {key[0]: np.median(rates) for key, rates in results.rates.items() if key[1:] == (task, store)}
            measured = [name for name in peers if name in speeds]
            if NATIVE in speeds and measured:
                best = max(measured, key=lambda name: speeds[name])
                value = np.median(results.rates[NATIVE, task, store] / results.rates[best, task, store])
                yield (
                    f"- {task}, {store}: {NATIVE} is {value:.2f} times the fastest of the {len(measured)} peers "
                    f"measured, {best}"
                )
        found = [results.distances[NATIVE, task, store] for task in TASKS if (NATIVE, task, store) in results.distances]
        if found:
            mean, most, views, of = map(list, zip(*found, strict=True))
            yield (
                f"- pixels, {store}: {sum(views)} of {sum(of)} views by {NATIVE} differ from Pillow's, by at most "
                f"{max(most)} level(s), mean difference {np.mean(mean):.4f}"
            )


def draw(results: Results, stem: Path) -> None:
    """Write a plot of images per CPU-second, in training and evaluation, as `stem`.png and `stem`.svg."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from lars_train.report.curves import COLORS, MARKERS

    base = next(iter(results.stores))

    def speed(name: str) -> float:
        rates = results.rates.get((name, TRAIN, base), results.rates.get((name, EVAL, base)))
        return 0.0 if rates is None else float(np.median(rates))

    names = sorted(results.contenders, key=speed)
    stem.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "lars-train"}):
        figure = Figure(figsize=(9.5, 1.6 + 0.33 * len(names)), layout="constrained")
        both = figure.subplots(1, len(TASKS), sharex=True, sharey=True)
        for axes, task, title in zip(both, TASKS, ("Training", "Evaluation"), strict=True):
            # A color and a marker per store, each a little lower than the one before, so that none hides another.
            for number, (store, color, marker) in enumerate(zip(results.stores, COLORS, MARKERS, strict=False)):
                rows = [row for row, name in enumerate(names) if (name, task, store) in results.rates]
                rates = np.array([results.rates[names[row], task, store] for row in rows])
                low, middle, high = np.percentile(rates, (10, 50, 90), axis=1)
                axes.errorbar(
                    middle,
                    np.array(rows) + 0.2 - 0.2 * number,
                    xerr=np.array((middle - low, high - middle)),
                    fmt=marker,
                    color=color,
                    label=f"images {store}",
                )
            axes.set_yticks(range(len(names)), [f"{name} (no resizing)" if name == FLOOR else name for name in names])
            axes.set_title(title)
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
        figure.supxlabel("images per CPU-second: median over the rounds, and 10th to 90th percentile")
        figure.legend(*both[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(results.stores))
        shared.save_figure(figure, stem)
