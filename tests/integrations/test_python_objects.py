"""`train` reads datasets of Hugging Face as they are, and the example notebook runs in a kernel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lars_train.data.sources.items import open_items
from lars_train.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
LABELS = [0, 1, 0, 1, 1, 0]


def saved(columns: dict[str, Any]) -> Any:
    """Return a dataset of the images, and `columns`."""
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(pixels) for pixels in PIXELS]
    features = {"picked": datasets.Image(), **{name: kind for name, (kind, _) in columns.items()}}
    values = {"picked": images, **{name: value for name, (_, value) in columns.items()}}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def test_a_dataset_of_hugging_face_is_read_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    whole = saved({"answer": (datasets.ClassLabel(names=["cat", "dog"]), LABELS)})
    for items in (
        whole,
        whole.with_format("torch", columns=["answer"], output_all_columns=True),
        whole.select(range(6)),
    ):
        data = open_items(items, whole, "data")
        assert data.classes == ("cat", "dog")
        assert data.train.labels.tolist() == LABELS
        for sample, pixels in enumerate(PIXELS):
            assert np.array_equal(np.asarray(data.train.read(sample)), pixels)
    encoded = open_items(whole.cast_column("picked", datasets.Image(decode=False)), whole, "data").train.read(2)
    assert isinstance(encoded, bytes)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded))), PIXELS[2])
    plain = saved({"label": (datasets.Value("int64"), LABELS)})
    assert open_items(plain, plain, "data").classes == ("0", "1")
    assert capsys.readouterr().out == ""


def test_several_label_columns_are_refused_by_name() -> None:
    datasets = pytest.importorskip("datasets")
    two = {name: (datasets.ClassLabel(names=["a", "b"]), LABELS) for name in ("fine", "coarse")}
    with pytest.raises(
        ConfigError, match=r"1 hold images and 2 hold labels \(picked, fine, coarse\); keep one of each"
    ):
        open_items(saved(two), saved(two), "data")


def test_the_notebook_runs_in_a_kernel(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "runs" / "notebook" / "final.json").exists()
