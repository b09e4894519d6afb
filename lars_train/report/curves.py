"""Plot top-1 and training loss of every row, and trust ratios over time, with matplotlib.

Color-blind readers can distinguish the seven colors. Each has its own marker and line style, for print.
"""

from __future__ import annotations

import io
import logging
import math
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lars_train.messages import printable
from lars_train.report.compare import RUN, Row
from lars_train.report.read import FAILED, FINISHED, Point, Ratios, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design", https://jfly.uni-koeln.de/color/; without yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1)))
_MAX_POINTS = 250
_MAX_LABEL_LENGTH = 50
# If a row differs in any of these keys, its short label shows only these.
_FIRST = ("optimizer.name", "optimizer.lr", RUN)
# Placeholder for the color of text in a plot for the page; nothing else may use it.
_INK = "#1b1c1d"
_SVG_STYLE = f"svg{{color:{_INK}}}@media(prefers-color-scheme:dark){{svg{{color:#e6e6e6}}}}"
_SETTINGS: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a dollar sign in a name is literal
    "svg.fonttype": "none",
    "svg.hashsalt": "lars-train",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "grid.color": "#808080",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
}
_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@dataclass(frozen=True)
class Panel:
    """A plot of `values` of each run over `axis` (an attribute of `Point`).

    `bounded`: the values are percentages, and few enough for markers.
    """

    title: str
    axis: str
    values: Callable[[RunRecord], tuple[Point, ...]]
    unit: str
    bounded: bool = True


PANELS = (
    Panel("Top-1 against epochs", "epoch", lambda run: run.top1, "top-1 (%)"),
    Panel("Top-1 against updates", "update", lambda run: run.top1, "top-1 (%)"),
    Panel("Top-1 against time", "seconds", lambda run: run.top1, "top-1 (%)"),
    Panel("Training loss against epochs", "epoch", lambda run: run.loss, "training loss (nats)", bounded=False),
)


@dataclass(frozen=True)
class _Look:
    """Appearance of a row. `style`: index of its color, marker and line."""

    number: int
    label: str
    style: int


@dataclass(frozen=True)
class Curve:
    """Means and standard deviations of a row, at the updates that all its runs with a log have in common."""

    x: list[float]
    mean: list[float]
    deviation: list[float] | None


def curve(row: Row, panel: Panel) -> Curve | None:
    """Return the curve of a row; None if its runs logged no values for it."""
    by_update = [{p.update: p for p in panel.values(run) if getattr(p, panel.axis) is not None} for run in row.runs]
    # A seed without a log does not remove the curve of the others.
    by_update = [points for points in by_update if points]
    common = sorted(set.intersection(*(set(points) for points in by_update))) if by_update else []
    if not common:
        return None
    x, mean, deviation = [], [], []
    for update in common:
        points = [run[update] for run in by_update]
        x.append(statistics.fmean(float(getattr(p, panel.axis)) for p in points))
        mean.append(statistics.fmean(p.value for p in points))
        deviation.append(statistics.stdev(p.value for p in points) if len(points) > 1 else 0.0)
    size = math.ceil(len(common) / _MAX_POINTS)
    return Curve(_binned(x, size), _binned(mean, size), _binned(deviation, size) if len(by_update) > 1 else None)


def labels(rows: Sequence[Row]) -> list[str]:
    """Return a short and unique label per row, for the legend.

    A label lists all differences of a row. If that is too long or not unique, the label has optimizer and learning
    rate, else the name of the first run, else the row's number in the table.
    """
    whole = [_label(row, list(_differences(row, row.differs))) for row in rows]
    short = [_label(row, list(_differences(row, _first_keys(row) or row.differs))) for row in rows]
    named = [_label(row, [f"run {row.first.directory.name}"]) for row in rows]
    return [_unique_label(number, row, whole, short, named) for number, row in enumerate(rows)]


def _first_keys(row: Row) -> list[str]:
    return [key for key in _FIRST if key in row.differs]


def _unique_label(number: int, row: Row, *options: Sequence[str]) -> str:
    for candidates in options:
        if len(candidates[number]) <= _MAX_LABEL_LENGTH and candidates.count(candidates[number]) == 1:
            return candidates[number]
    return _label(row, [f"row {number + 1} of the table"])[: 2 * _MAX_LABEL_LENGTH]


def _label(row: Row, differences: list[str]) -> str:
    parts = []
    if row.first.state != FINISHED:
        parts.append(row.first.state)
    elif len(row.runs) > 1:
        parts.append(f"mean of {len(row.runs)} seeds")
    parts += differences
    return printable(row.first.batch + (f" ({', '.join(parts)})" if parts else ""))


def _differences(row: Row, keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        yield f"{key.removesuffix('.name').rpartition('.')[2]} {row.differs[key]}"


def overview(rows: Sequence[Row]) -> dict[str, bytes]:
    """Return all panels in one figure, as the bytes of a ``png`` and an ``svg`` file."""
    with _style():
        figure = _figure(10, 7.2 + 0.12 * len(rows))
        for number, panel in enumerate(PANELS, 1):
            _draw(figure.add_subplot(2, 2, number), rows, panel)
        _legend(figure, columns=2 if max(map(len, labels(rows))) > 24 else 4)
        return {"png": _render(figure, "png"), "svg": _render(figure, "svg")}


def panels(rows: Sequence[Row]) -> Iterator[tuple[Panel, str]]:
    """Yield each panel as SVG for a page, in the page's text color and small enough for a phone."""
    for panel in PANELS:
        if not any(curve(row, panel) for row in rows):
            continue
        with _style():
            figure = _figure(4.6, 3.5 + 0.2 * len(rows))
            _draw(figure.add_subplot(), rows, panel, title=False)
            _legend(figure, columns=1)
            yield panel, _for_page(_render(figure, "svg", transparent=True))


def heat_map(ratios: Ratios) -> str:
    """Return a heat map of the trust ratios, layers by updates, as SVG for a page."""
    import numpy as np
    from matplotlib.colors import LogNorm

    values = np.array([[math.nan if v is None or v <= 0 else v for v in line] for line in ratios.values], dtype=float).T
    usable = values[np.isfinite(values)]
    low, high = (float(usable.min()), float(usable.max())) if usable.size else (1.0, 1.0)
    edges = [0.0, *map(float, ratios.updates)]
    layers = len(ratios.layers)
    with _style():
        figure = _figure(7.2, min(9.0, 1.4 + 0.19 * layers))
        axes = figure.add_subplot()
        norm = LogNorm(low, high if high > low else low * 1.01)
        mesh = axes.pcolormesh(edges, range(layers + 1), np.ma.masked_invalid(values), norm=norm, cmap="cividis")
        mesh.set_rasterized(True)
        axes.invert_yaxis()
        step = math.ceil(layers / 40)
        axes.set_yticks([i + 0.5 for i in range(0, layers, step)])
        names = (ratios.layers[i] for i in range(0, layers, step))
        axes.set_yticklabels([n if len(n) <= 32 else "..." + n[-29:] for n in names], fontsize=7)
        axes.set_xlabel("update")
        bar = figure.colorbar(mesh, ax=axes, label="trust ratio", pad=0.02)
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        bar.ax.yaxis.set_minor_formatter(lambda value, _: "")
        return _for_page(_render(figure, "svg", transparent=True))


@contextmanager
def _style() -> Iterator[None]:
    """Use this module's style within the block, and silence matplotlib's warnings about fonts and limits."""
    import matplotlib as mpl

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with warnings.catch_warnings(), mpl.rc_context(_SETTINGS):
        warnings.simplefilter("ignore")
        yield


def _figure(width: float, height: float) -> Figure:
    # Without pyplot, no GUI backend is chosen and no figure is kept alive.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw(axes: Axes, rows: Sequence[Row], panel: Panel, *, title: bool = True) -> None:
    looks = _looks(rows)
    curves = [(number, row, points) for number, row in enumerate(rows) if (points := curve(row, panel))]
    largest = max((points.x[-1] for _, _, points in curves), default=1.0)
    unit, unit_name = next(((u, n) for u, n in _UNITS if largest >= 2 * u), _UNITS[-1])
    for number, row, points in curves:
        x = [value / unit for value in points.x] if panel.axis == "seconds" else points.x
        _draw_curve(axes, x, points, row, looks[number], markers=panel.bounded)
    ends = [points.x[-1] for _, _, points in curves]
    if panel.axis == "update" and len(ends) > 1 and max(ends) > 8 * min(ends) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel({"epoch": "epoch", "update": "update", "seconds": f"training time ({unit_name})"}[panel.axis])
    axes.set_ylabel(panel.unit)
    axes.grid(True)
    # The default margin above flat curves is thinner than their markers.
    highest = max((max(points.mean) for _, _, points in curves), default=0.0)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.05 * highest))
    if not panel.bounded:
        _limit_loss(axes, [points.mean for _, _, points in curves])
    if title:
        axes.set_title(panel.title)


def _looks(rows: Sequence[Row]) -> list[_Look]:
    """Return the look of each row. Rows of one experiment, finished or not, share a style."""
    experiments: dict[tuple[str, ...], int] = {}
    keys = [(row.first.batch, *row.differs, *row.differs.values()) for row in rows]
    styles = [experiments.setdefault(key, len(experiments)) for key in keys]
    return [_Look(*look) for look in zip(range(len(rows)), labels(rows), styles, strict=True)]


def _limit_loss(axes: Axes, curves: list[list[float]]) -> None:
    """Limit the axis, so that an exploding loss does not flatten the other curves."""
    usual = 3 * statistics.median(values[0] for values in curves) if curves else 0.0
    if 0 < usual < max(map(max, curves), default=0.0):
        axes.set_ylim(top=usual)
        axes.text(0.99, 0.98, "higher values are cut off", transform=axes.transAxes, ha="right", va="top", fontsize=8)


def _draw_curve(axes: Axes, x: list[float], points: Curve, row: Row, look: _Look, *, markers: bool) -> None:
    color, finished = COLORS[look.style % len(COLORS)], row.first.state == FINISHED
    # With more experiments than colors, a color repeats with another marker and line.
    other = (look.style + look.style // len(COLORS)) % len(COLORS)
    every = max(1, len(x) // 10)
    axes.plot(
        x,
        points.mean,
        color=color,
        linestyle=LINES[other],
        linewidth=1.8 if finished else 0.9,
        marker=MARKERS[other] if markers or len(x) == 1 else None,
        markevery=(look.number % every, every),
        markersize=5,
        markerfacecolor=color if finished else "none",
        label=look.label,
        gid=f"row-{look.number:04d}",
    )
    if points.deviation is not None:
        low = [m - d for m, d in zip(points.mean, points.deviation, strict=True)]
        high = [m + d for m, d in zip(points.mean, points.deviation, strict=True)]
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    if row.first.state == FAILED:
        axes.plot(x[-1:], points.mean[-1:], color=color, marker="x", markersize=9, markeredgewidth=2)


def _legend(figure: Figure, columns: int) -> None:
    """Place the legend below all axes, where it hides no curve."""
    # A row may appear in some axes only. The axes are visited in reverse, so that handles of the first axes, which have
    # markers, replace the others.
    handles = {
        str(line.get_gid()): line for axes in reversed(figure.axes) for line in axes.get_lines() if line.get_gid()
    }
    if handles:
        figure.legend(
            handles=[handles[number] for number in sorted(handles)],
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            handlelength=3.5,
        )


def _render(figure: Figure, kind: str, *, transparent: bool = False) -> bytes:
    out = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(out, format=kind, dpi=150, transparent=transparent, metadata=metadata)
    return out.getvalue()


def _for_page(svg: bytes) -> str:
    text = svg.decode().replace(_INK, "currentColor")
    # Only files need the XML declaration and the document type.
    text = text[text.index("<svg") :]
    return re.sub(r"(<svg[^>]*>)", rf"\1<style>{_SVG_STYLE}</style>", text, count=1)


def _binned(values: list[float], size: int) -> list[float]:
    return [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]
