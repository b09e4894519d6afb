"""Draw the figure of ``plan.picture``.

It shows hours, efficiency and the parts of an update against the number of devices, and the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lars_train.preflight.time_model import COMPUTE, INPUT, LAUNCH, NETWORK
from lars_train.report.curves import COLORS, LINES

# The marker of a point by its limit: filled if devices compute, hollow if they wait.
_MARKERS = {COMPUTE: ("o", True), LAUNCH: ("D", False), NETWORK: ("s", False), INPUT: ("^", False)}
_LEFT, _RIGHT = 0.8, 5200


def draw(found: dict[str, Any], curve: Sequence[Sequence[float]], path: Path) -> None:
    """Draw the forecast `found`, which must include hours, as a PNG. Raises `OSError`.

    `curve`: the rehearsal's ``lr_curve``.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(12, 8.5), layout="constrained")
    (hours, efficiency), (parts, schedule) = figure.subplots(2, 2)
    rows = [row for row in found["rows"] if "scaling" in row]
    for number, row in enumerate(rows):
        cycle, index = divmod(number, len(COLORS))
        color, line = COLORS[index], LINES[(index + cycle) % len(LINES)]
        for axes, key, factor in ((hours, "hours", 1), (efficiency, "efficiency", 100)):
            points = row["scaling"]
            devices = [p["devices"] for p in points]
            axes.plot(devices, [factor * p[key] for p in points], color=color, linestyle=line, label=row["row"])
            for point in points:
                marker, filled = _MARKERS[point["limit"]]
                axes.plot(
                    point["devices"],
                    factor * point[key],
                    marker=marker,
                    color=color,
                    markerfacecolor=color if filled else "white",
                    markersize=6,
                )
    hours.set(
        yscale="log", ylabel="hours of the run", title="Hours, by batch (a curve ends at one ghost batch per device)"
    )
    efficiency.set(ylim=(0, 105), ylabel="% of one device's images/s", title="Efficiency of a device")
    limits = {point["limit"] for row in rows for point in row["scaling"]}
    marks = [
        Line2D(
            [],
            [],
            color="#444444",
            linestyle="",
            marker=marker,
            markerfacecolor="#444444" if filled else "white",
            label=f"limited by {limit}",
        )
        for limit, (marker, filled) in _MARKERS.items()
        if limit in limits
    ]
    hours.add_artist(hours.legend(loc="upper right", title="batch"))
    efficiency.legend(handles=marks, loc="lower left")
    _draw_parts(parts, found["scaling"], found["expected"]["devices"])
    for axes in (hours, efficiency, parts):
        axes.set(xscale="log", xlim=(_LEFT, _RIGHT), xlabel="devices")
        axes.set_xticks([4**k for k in range(7)], [f"{4**k:,}" for k in range(7)])
        axes.minorticks_off()
        axes.grid(color="#DDDDDD", linewidth=0.6)
    schedule.plot(*zip(*curve, strict=True), color=COLORS[0])
    schedule.set(xlabel="update", ylabel="learning rate", title="Learning rate of this run", ylim=(0, None))
    schedule.grid(color="#DDDDDD", linewidth=0.6)
    figure.savefig(path, format="png", dpi=120)


def _draw_parts(axes: Any, points: list[dict[str, Any]], devices: int) -> None:
    """Plot the parts of an update, which explain where the curves bend."""
    counts = [p["devices"] for p in points]
    for number, (key, label) in enumerate(
        (
            ("compute", "computing"),
            ("input", "reading the images"),
            ("reduction", "summing gradients (partly hidden)"),
            ("seconds", "the update"),
        )
    ):
        values = [p[key] or float("nan") for p in points]
        total = key == "seconds"
        if any(p[key] for p in points):
            axes.plot(
                counts,
                values,
                color="#1b1c1d" if total else COLORS[number],
                linestyle=LINES[number],
                linewidth=1 if total else 2.2,
                marker="o" if total else None,
                markersize=3,
                label=label,
            )
    axes.axvline(devices, color="#8A8A8A", linewidth=0.8)
    axes.annotate(f" {devices:,} planned", (devices, 0.02), xycoords=("data", "axes fraction"), color="#555555")
    axes.set(yscale="log", ylabel="seconds", title="Why the curves bend: the parts of an update of this run")
    axes.legend()
