from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from lars_train.monitoring.confusion import write_confusion


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def test_each_class_has_accuracy_and_most_frequent_mistake(tmp_path: Path) -> None:
    # The last column counts images that cannot be decoded. The third class has no images.
    counts = np.array([[6, 1, 2, 1], [0, 4, 0, 0], [0, 0, 0, 0]])
    write_confusion(tmp_path / "new" / "report", ["cat", "a, dog", "owl"], counts)
    assert rows(tmp_path / "new" / "report" / "per_class.csv") == [
        ["cat", "10", "6", "60.00", "1", "6", "owl"],
        ["a, dog", "4", "4", "100.00", "0", "5", ""],
        ["owl", "0", "0", "", "0", "2", ""],
    ]
    assert rows(tmp_path / "new" / "report" / "confusion.csv") == [
        ["cat", "cat", "6"],
        ["cat", "a, dog", "1"],
        ["cat", "owl", "2"],
        ["cat", "(not decoded)", "1"],
        ["a, dog", "a, dog", "4"],
    ]
    with Image.open(tmp_path / "new" / "report" / "confusion.png") as plot:
        assert plot.width > 600
