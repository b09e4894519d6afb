"""What reproduce_scaled_table.py writes of its runs: a page, the sweeps' picture, lars-report's files, the records."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from page import between_markers, cpu_name

from lars_train.errors import ConfigError
from lars_train.report.lars_report import read_rows
from lars_train.report.read import read_run
from lars_train.report.write import check_folder, write_report

MARKED = "scaled"
PAGE, RECORDS_FOLDER, REPORT_FOLDER = "README.md", "runs", "report"
RECORDS = (
    "run.json",
    "final.json",
    "divergence.jsonl",
    "config.yaml",
    "metrics.jsonl",
    "metrics.fields.json",
    "trust_ratios.jsonl",
    "trust_ratios.fields.json",
)
# Okabe and Ito, https://jfly.uni-koeln.de/color/
LOOKS = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."))
STYLES = {
    "256": (("#000000", "-"),),
    "8k": (("#0072B2", "--"),),
    "16k": (("#009E73", "-."),),
    "32k": (("#D55E00", "-"), ("#CC79A7", ":")),
}
"""Of the curves of each row, the first and a second."""
NEAR = 2.0
"""Points of top-1 below the best of a sweep that are still called near it."""
PUBLISHED = {"8k": 73.79 - 73.78, "16k": 73.79 - 73.36, "32k": 73.79 - 72.26}
"""Points of top-1 that the published rows lose against the 256 row (https://github.com/kakaobrain/torchlars)."""


@dataclass(frozen=True)
class Point:
    """One learning rate of a sweep; `top1` in percent, None of a run that diverged."""

    lr: float
    top1: float | None
    recipe: bool


@dataclass(frozen=True)
class Result:
    """One cell of the table. `final`, `best`: percent of top-1 on the test images, one number for each seed."""

    row: str
    batch: int
    optimizer: str
    lr: float
    recipe: bool
    baseline: bool
    final: tuple[float, ...]
    best: tuple[float, ...]
    diverged: int


def sweep_table(name: str, points: Sequence[Point]) -> list[str]:
    """Markdown: top-1 on the held-out images over the learning rate, and how much of that is near the best."""
    rates = [f"{point.lr:g}{' (recipe)' if point.recipe else ''}" for point in points]
    found = ["diverged" if point.top1 is None else f"{point.top1:.2f}" for point in points]
    return [
        f"| {name}: lr | {' | '.join(rates)} |",
        "|---" * (len(points) + 1) + "|",
        f"| top-1 %, held out | {' | '.join(found)} |",
        *plateau_lines(points),
    ]


def plateau_lines(points: Sequence[Point]) -> list[str]:
    """Text under a sweep: the learning rates within `NEAR` points of its best, where the sweep reaches beyond them."""
    low, high = plateau(points, NEAR)
    if low is None or high is None:
        return []
    return ["", f"Within {NEAR:g} points of its best: lr {low:.3g} to {high:.3g}, a factor of {high / low:.1f}."]


def plateau(points: Sequence[Point], below: float) -> tuple[float | None, float | None]:
    """The lowest and the highest learning rate around the best point with a top-1 of at most `below` points less.

    Between two points top-1 is taken as a straight line over the logarithm of the learning rate; beside a point that
    diverged the plateau ends at the last one that did not. None on a side on which the sweep ends before the plateau.
    """
    tried = sorted(points, key=lambda point: point.lr)
    found = [-math.inf if point.top1 is None else point.top1 for point in tried]
    top = found.index(max(found))
    least = found[top] - below

    def edge(beyond: Sequence[int]) -> float | None:
        inside = top
        for outside in beyond:
            if found[outside] < least:
                share = (found[inside] - least) / (found[inside] - found[outside])
                return float(tried[inside].lr * (tried[outside].lr / tried[inside].lr) ** share)
            inside = outside
        return None

    return edge(range(top - 1, -1, -1)), edge(range(top + 1, len(tried)))


def result_table(results: Sequence[Result]) -> list[str]:
    """Markdown: the table, and how far each cell is from the baseline."""
    lines = [
        "| row | batch | optimizer | lr | top-1 %, last epoch | top-1 %, best epoch | to the 256 row | published |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    baseline = next((fmean(result.final) for result in results if result.baseline and result.final), None)
    for result in results:
        lr = f"{result.lr:g}{' (recipe)' if result.recipe else ''}"
        of_row = PUBLISHED.get(result.row) if result.optimizer == "lars" and result.recipe else None
        apart = fmean(result.final) - baseline if result.final and baseline is not None else None
        cells = [
            *(result.row.upper(), str(result.batch), "LARS" if result.optimizer == "lars" else "SGD", lr),
            *(spread(values, result.diverged) for values in (result.final, result.best)),
            "" if apart is None else f"{apart:+.2f}",
            "" if of_row is None else f"{-of_row:+.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float], diverged: int) -> str:
    """Mean and standard deviation over the seeds, and how many of them diverged."""
    text = f"{fmean(values):.2f}" if values else ""
    text += f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{text} ({diverged} diverged)".strip() if diverged else text


def draw_sweeps(sweeps: Sequence[tuple[str, Sequence[Point]]], path: Path) -> None:
    """Top-1 over the learning rate, a curve per sweep, as PATH.svg and PATH.png; a ring marks the recipe's own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "lars-train", "svg.fonttype": "none", "font.size": 10}):
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for (name, points), (colour, marker, line) in zip(sweeps, LOOKS, strict=False):
            there = {point.lr: point.top1 for point in points if point.top1 is not None}
            axes.plot(list(there), list(there.values()), color=colour, marker=marker, linestyle=line, label=name)
            own = {point.lr: there[point.lr] for point in points if point.recipe and point.lr in there}
            axes.plot(list(own), list(own.values()), "o", markersize=13, fillstyle="none", color=colour)
        axes.set(xscale="log", xlabel="learning rate", ylabel="top-1 on held-out images (%)")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter("{x:g}")
        figure.legend(loc="outside upper center", ncols=len(sweeps))
        for kind in ("svg", "png"):
            date = {"Date": None} if kind == "svg" else {}
            figure.savefig(path.with_suffix(f".{kind}"), dpi=150, metadata=date)
        pyplot.close(figure)


def draw_curves(panels: Mapping[str, Sequence[Sequence[Path]]], path: Path) -> None:
    """Top-1 over epochs as PATH.svg and PATH.png: for each title a panel, with a curve for the records of each cell.

    Means over the seeds, with a band of one standard deviation.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "lars-train", "svg.fonttype": "none", "font.size": 10}):
        figure, row = pyplot.subplots(
            1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", sharey=True, squeeze=False
        )
        for axes, (title, cells) in zip(row[0], panels.items(), strict=True):
            free = {row_name: iter(styles) for row_name, styles in STYLES.items()}
            for records in cells:
                runs = [read_run(record) for record in records]
                colour, line = next(free[runs[0].batch])
                over = [{point.epoch: point.value for point in run.top1 if point.epoch is not None} for run in runs]
                epochs = sorted(set.intersection(*(set(found) for found in over)))
                means = [fmean(found[epoch] for found in over) for epoch in epochs]
                apart = [stdev(found[epoch] for found in over) if len(over) > 1 else 0.0 for epoch in epochs]
                label = f"{runs[0].batch.upper()}, lr {runs[0].setting('optimizer.lr')}"
                axes.plot(epochs, means, color=colour, linestyle=line, label=label)
                low, high = ([m + sign * a for m, a in zip(means, apart, strict=True)] for sign in (-1, 1))
                axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            axes.legend(loc="lower right")
        row[0][0].set_ylabel("top-1 on test images (%)")
        row[0][0].set_ylim(bottom=0)
        for kind in ("svg", "png"):
            date = {"Date": None} if kind == "svg" else {}
            figure.savefig(path.with_suffix(f".{kind}"), dpi=150, metadata=date)
        pyplot.close(figure)


def publish(
    folder: Path,
    runs: Sequence[str],
    panels: Mapping[str, Sequence[Sequence[str]]],
    lines: Sequence[str],
    command: str,
) -> None:
    """Write lars-report's files on the records of the table's runs, `curves`, and `lines` into README.md, in `folder`.

    `runs`: their names, all of which have records. `panels`: the names of the runs of each cell that `draw_curves` is
    to draw.
    """
    records = folder / RECORDS_FOLDER
    table = [records / run for run in runs if run.startswith("table-")]
    if table:
        write_report(read_rows(table), folder / REPORT_FOLDER)
        drawn = {title: [[records / run for run in cell] for cell in cells] for title, cells in panels.items()}
        draw_curves(drawn, folder / "curves")
    where = f"{cpu_name()}, Python {platform.python_version()}, torch {version('torch')}"
    (folder / PAGE).write_text(between_markers(_page(folder), MARKED, [f"`{command}` on {where}.", "", *lines]))


def fault_of_folder(folder: Path, claim: str) -> str | None:
    """Why page, pictures, report and records cannot go to `folder`: it has files that are not this script's.

    `claim`: the file that its records have beside them.
    """
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    try:
        between_markers(_page(folder), MARKED, [])
        check_folder(folder / REPORT_FOLDER)
    except (ValueError, ConfigError) as error:
        return f"it has files that are not of this script ({error})"
    if PAGE not in there and (others := there - {RECORDS_FOLDER}):
        return f"it has files that are not of this script ({', '.join(sorted(others))})"
    records = folder / RECORDS_FOLDER
    if records.is_dir() and any(records.iterdir()) and not (records / claim).exists():
        return f"it has files that are not of this script ({records} without {claim})"
    return None


def _page(folder: Path) -> str:
    begin, end = (f"<!-- {MARKED}: {word} -->" for word in ("begin", "end"))
    page = folder / PAGE
    return page.read_text() if page.exists() else f"# The table at reduced scale\n\n{begin}\n{end}\n"


def copy_record(run: Path, target: Path, hidden: Sequence[str]) -> None:
    """Write what is worth keeping of the run directory `run` into `target`, in place of what is there.

    `hidden`: parts of paths that say nothing to a reader, taken out of the records; so are host and interpreter.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in RECORDS:
        if not (run / name).exists():
            (target / name).unlink(missing_ok=True)
            continue
        text = (run / name).read_text()
        if name == "run.json":
            text = json.dumps(_without_places(json.loads(text)), indent=1) + "\n"
        for part in hidden:
            text = text.replace(part, "")
        (target / name).write_text(text)


def _without_places(record: dict[str, Any]) -> dict[str, Any]:
    starts = [
        {key: value for key, value in start.items() if key not in ("host", "directory", "executable")}
        for start in record["started"]
    ]
    return {**record, "started": starts}


def hidden_parts(*paths: Path) -> Iterator[str]:
    """The folders of `paths`, as they may stand in records, the longest first."""
    folders = {f"{folder}/" for path in paths for folder in (path.parent, path.resolve().parent) if folder.name}
    yield from sorted(folders, key=len, reverse=True)
