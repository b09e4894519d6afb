"""What an evaluation mistook for what: a table per class, all pairs that occurred, and a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lars_train.messages import printable

_NAMED = 40
"""Classes whose names still fit beside a picture."""


def write_confusion(folder: Path, classes: Sequence[str], counts: npt.NDArray[np.int64]) -> None:
    """Write ``per_class.csv``, ``confusion.csv`` and ``confusion.png`` into `folder`, which is made.

    `counts`, (C, C + 1): samples of class i that were taken for class j; the last column: those that cannot be decoded,
    which count as wrong. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    of_class, taken_for = counts.sum(1), counts[:, :-1].sum(0)
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["class", "images", "correct", "top-1 %", "not decoded", "taken for it", "most often taken for"])
        for i, name in enumerate(classes):
            wrong = counts[i, :-1].copy()
            wrong[i] = 0
            other = classes[int(wrong.argmax())] if wrong.any() else ""
            share = f"{100 * counts[i, i] / of_class[i]:.2f}" if of_class[i] else ""
            table.writerow([name, of_class[i], counts[i, i], share, counts[i, -1], taken_for[i], other])
    with (folder / "confusion.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["class", "taken for", "images"])
        for i, j in zip(*np.nonzero(counts), strict=True):
            table.writerow([classes[i], classes[j] if j < len(classes) else "(not decoded)", counts[i, j]])
    _draw(folder / "confusion.png", classes, counts[:, :-1] / np.maximum(of_class, 1)[:, None])


def _draw(path: Path, classes: Sequence[str], shares: npt.NDArray[np.float64]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    figure, axes = pyplot.subplots(figsize=(8, 7), layout="constrained")
    # On a scale of powers, for rare mistakes are what one looks for.
    shown = axes.imshow(np.ma.masked_equal(shares, 0), norm=LogNorm(1e-3, 1), cmap="cividis", interpolation="nearest")
    figure.colorbar(shown, label="share of the class's images")
    axes.set(xlabel="taken for", ylabel="class")
    if len(classes) <= _NAMED:
        # Without mathematics, which a dollar sign begins.
        names = [printable(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
