"""Write the confusion matrix of an evaluation: a table by class, all pairs that occurred, and a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lars_train.messages import printable

_MAX_NAMES = 40
"""Maximum number of classes whose names the axes show."""


def write_confusion(folder: Path, classes: Sequence[str], counts: npt.NDArray[np.int64]) -> None:
    """Write ``per_class.csv``, ``confusion.csv`` and ``confusion.png`` into `folder`. Creates the folder.

    `counts`: int64 (C, C + 1), the number of samples of class i that were predicted as class j. The last column counts
    the samples that cannot be decoded, which count as wrong. Raises `OSError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    class_sizes, predicted = counts.sum(1), counts[:, :-1].sum(0)
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        header = ["class", "images", "correct", "top-1 %", "not decoded", "taken for it", "most often taken for"]
        writer.writerow(header)
        for i, name in enumerate(classes):
            wrong = counts[i, :-1].copy()
            wrong[i] = 0
            other = classes[int(wrong.argmax())] if wrong.any() else ""
            share = f"{100 * counts[i, i] / class_sizes[i]:.2f}" if class_sizes[i] else ""
            writer.writerow([name, class_sizes[i], counts[i, i], share, counts[i, -1], predicted[i], other])
    with (folder / "confusion.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "taken for", "images"])
        for i, j in zip(*np.nonzero(counts), strict=True):
            writer.writerow([classes[i], classes[j] if j < len(classes) else "(not decoded)", counts[i, j]])
    _draw(folder / "confusion.png", classes, counts[:, :-1] / np.maximum(class_sizes, 1)[:, None])


def _draw(path: Path, classes: Sequence[str], shares: npt.NDArray[np.float64]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    figure, axes = pyplot.subplots(figsize=(8, 7), layout="constrained")
    # A logarithmic scale shows rare mistakes.
    image = axes.imshow(np.ma.masked_equal(shares, 0), norm=LogNorm(1e-3, 1), cmap="cividis", interpolation="nearest")
    figure.colorbar(image, label="share of the class's images")
    axes.set(xlabel="predicted class", ylabel="true class")
    if len(classes) <= _MAX_NAMES:
        # matplotlib would read text after a dollar sign as math.
        names = [printable(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
