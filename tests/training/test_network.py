"""A network's outputs match classes by name, on data sets with all or some of its classes, in any order."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn

from lars_train.config import Config, resolve
from lars_train.data.sources.imagenet import wnids
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.models.factory import build_model
from lars_train.models.weight_files import Weights
from lars_train.networks import make_network
from lars_train.training import session
from lars_train.training.assemble import match_classes, text_order
from lars_train.training.prepare import prepare

SIZE = 8
IMAGES = 3
NAMES = [f"n{number:02}" for number in range(12)]

TINY: dict[str, Any] = {
    "device": "cpu",
    "batch": {"size": 4},
    "recipe": {"rows": {"32k": {}}},
    "data": {"name": "folder", "image_size": SIZE, "augment": "none", "eval_crop": 1.0, "workers": 0},
    "model": {"name": "tiny", "ghost_batch": 4},
    "optimizer": {"lr": 1.0},
    "precision": {"name": "fp32"},
    "launch": {"threads": 1},
}


def config(**changes: Any) -> Config:
    raw = OmegaConf.merge(OmegaConf.structured(Config), TINY)
    for key, value in changes.items():
        OmegaConf.update(raw, key.replace("__", "."), value)
    assert isinstance(raw, DictConfig)
    return resolve(raw)


def evaluate(**changes: Any) -> dict[str, Any]:
    return session.evaluate_only(config(mode="evaluate", **changes), None, Ranks())


def pixels(label: int, number: int) -> npt.NDArray[np.uint8]:
    """Return an image of the class `label`: blocks of colors of that class, and a little noise."""
    colors = np.random.default_rng(label).integers(0, 256, (4, 4, 3)).repeat(2, 0).repeat(2, 1)
    noise = np.random.default_rng([label, number]).integers(-3, 4, (SIZE, SIZE, 3))
    return (colors + noise).clip(0, 255).astype(np.uint8)


def inputs(images: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
    data = config().data
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    return (torch.tensor(np.stack(images)).permute(0, 3, 1, 2) / 255 - mean) / std


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A network whose output i is highest for images of class i: the negative squared distance to their mean."""
    torch.manual_seed(0)
    network = build_model("tiny", num_classes=len(NAMES), ghost_batch=1, zero_gamma=False).eval()
    features: list[Tensor] = []
    head = network.get_submodule("fc")
    hook = head.register_forward_pre_hook(lambda module, arguments: features.append(arguments[0]))
    with torch.no_grad():
        network(inputs([pixels(label, 0) for label in range(len(NAMES))]))
        hook.remove()
        head.load_state_dict({"weight": features[0], "bias": -features[0].square().sum(1) / 2})
    return network


@pytest.fixture
def weights(model: nn.Module, tmp_path: Path) -> Callable[[Sequence[str] | None], str]:
    """Return a function that writes the model's weights, with class names like mode=export, or without."""

    def write(names: Sequence[str] | None) -> str:
        state: Any = model.state_dict()
        if names is not None:
            state._metadata["lars_train"] = json.dumps({"classes": list(names), "model": "tiny"})
        torch.save(state, tmp_path / "w.pth")
        return str(tmp_path / "w.pth")

    return write


def folders(root: Path, names: dict[str, int]) -> str:
    """Write class folders by name, each with images of its label."""
    for name, label in names.items():
        (root / name).mkdir(parents=True)
        for number in range(IMAGES):
            Image.fromarray(pixels(label, number)).save(root / name / f"{number}.png")
    return str(root)


def reported(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the images and the correct ones of each class that has images."""
    with (folder / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {row["class"]: (int(row["images"]), int(row["correct"])) for row in rows if int(row["images"])}


def numbered_name(count: int) -> dict[str, int]:
    return {str(label): label for label in range(count)}


@pytest.mark.parametrize("layout", ["", "val", "test", "train and val"])
def test_a_validation_set_alone_uses_the_models_classes(
    layout: str, weights: Callable[[Sequence[str] | None], str], tmp_path: Path
) -> None:
    root = tmp_path / "data"
    folders(root / layout.rpartition(" ")[2], dict(zip(NAMES, range(12), strict=True)))
    if layout.startswith("train"):
        folders(root / "train", {"n00": 0, "n05": 0})
    for place in (root, tmp_path / "data.zip"):
        if place != root:
            with zipfile.ZipFile(place, "w") as archive:
                for path in sorted(root.rglob("*.png")):
                    archive.write(path, path.relative_to(root))
        for names in (NAMES, None):
            result = evaluate(data__root=str(place), model__weights=weights(names))
            assert (result["val/top1"], result["val/count"], result["notes"]) == (100.0, 36, [])
            assert (result["classes"], result["outputs"], result["trained_outputs"]) == (12, 12, 12)


@pytest.mark.parametrize("kind", ["folder", "text", "number", "number in a folder"])
def test_validation_shards_alone_match_by_name_or_output(
    kind: str, weights: Callable[[Sequence[str] | None], str], tmp_path: Path
) -> None:
    labels = (3, 10, 11)
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "val-000.tar", "w") as archive:
        for label in labels:
            for number in range(IMAGES):
                image, text = io.BytesIO(), {"folder": "", "text": NAMES[label]}.get(kind, str(label))
                Image.fromarray(pixels(label, number)).save(image, "PNG")
                # Folders with other names than the model's classes, in numeric order.
                folder = {"folder": f"{NAMES[label]}/", "number in a folder": f"k{label:02}/"}.get(kind, "")
                stem = f"{folder}{label}x{number}"
                for name, content in ((f"{stem}.png", image.getvalue()), (f"{stem}.cls", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    if content:
                        archive.addfile(info, io.BytesIO(content))
    result = evaluate(
        data__root=str(tmp_path / "data"), model__weights=weights(NAMES), evaluate__report=str(tmp_path / "report")
    )
    assert (result["val/top1"], result["val/count"]) == (100.0, 9)
    called = {"number": "{}", "number in a folder": "k{:02}"}.get(kind, "n{:02}")
    assert reported(tmp_path / "report") == {called.format(c): (3, 3) for c in labels}
    shown = {
        "number": "3 is n03; 10 is n10; 11 is n11",
        "number in a folder": "k03 (3) is n03; k10 (10) is n10; k11 (11) is n11",
    }
    warning = f"WARNING: the data set's classes are numbers, used as indices of the model's outputs: {shown.get(kind)}."
    assert result["notes"] == ([warning] if kind in shown else [])


def test_classes_in_another_order_are_evaluated_by_name(
    weights: Callable[[Sequence[str] | None], str], model: nn.Module, tmp_path: Path
) -> None:
    # By folder name, class 0 is a, and so on. The model's classes are in the order l to a.
    letters = "lkjihgfedcba"
    root = folders(tmp_path / "data" / "val", {letter: label for label, letter in enumerate(letters)})
    result = evaluate(data__root=root, model__weights=weights(list(letters)), evaluate__report=str(tmp_path / "report"))
    assert (result["val/top1"], result["notes"]) == (100.0, [])
    assert reported(tmp_path / "report") == dict.fromkeys(letters, (IMAGES, IMAGES))
    content = {"model": model.state_dict(), "classes": list(letters), "config": {"model": {"name": "tiny"}}}
    asked = config(mode="evaluate", data__root=root, checkpoint__path="runs/r")
    assert session.evaluate_only(asked, content, Ranks())["val/top1"] == 100.0
    content["model"] = {**model.state_dict(), "fc.weight": "x"}
    with pytest.raises(ConfigError, match=r"checkpoint\.path=runs/r: it is not a plain state dict"):
        session.evaluate_only(asked, content, Ranks())


@pytest.mark.parametrize("outputs", ["subset", "all"])
def test_some_classes_are_evaluated_over_those_or_all_outputs(
    outputs: str,
    model: nn.Module,
    weights: Callable[[Sequence[str] | None], str],
    tmp_path: Path,
) -> None:
    # The images in n09 and n02 show other classes: one that has no folder, and one that has.
    held = {"n02": 4, "n04": 4, "n09": 7, "n11": 11}
    root, labels = folders(tmp_path / "data", held), [int(name[1:]) for name in held]
    images = [pixels(label, number) for label in held.values() for number in range(IMAGES)]
    with torch.no_grad():
        logits = model(inputs(images))
    if outputs == "subset":
        logits[:, [label for label in range(12) if label not in labels]] = -torch.inf
    right = (logits.argmax(1) == torch.tensor(labels).repeat_interleave(IMAGES)).view(-1, IMAGES).sum(1).tolist()
    changes = {"data__root": root, "model__weights": weights(NAMES), "evaluate__outputs": outputs}
    report = tmp_path / "report"
    result = evaluate(**changes, evaluate__report=str(report))
    assert reported(report) == {name: (IMAGES, count) for name, count in zip(held, right, strict=True)}
    assert result["val/top1"] == pytest.approx(100 * sum(right) / 12)
    assert result["val/count"] == 12
    assert (result["classes"], result["outputs"]) == (4, 4 if outputs == "subset" else 12)
    if outputs == "all":
        with (report / "confusion.csv").open() as file:
            assert ["n09", "n07", "3"] in list(csv.reader(file))


def test_folders_named_by_numbers_are_those_outputs(
    weights: Callable[[Sequence[str] | None], str], tmp_path: Path
) -> None:
    # As in ImageNet-V2: 10 and 11 come before 2 in text order, and are outputs 10 and 11.
    root = folders(tmp_path / "data", numbered_name(12))
    for names in (NAMES, None):
        result = evaluate(data__root=root, model__weights=weights(names))
        assert result["val/top1"] == 100.0
        (note,) = result["notes"]
        assert note.startswith("WARNING: the data set's classes are numbers")
        assert f"10 is {'output 10' if names is None else 'n10'}" in note
    # The model's own names in text order, like those of a run on such folders.
    in_order = sorted(numbered_name(12))
    shutil.rmtree(root)
    folders(Path(root), {name: label for label, name in enumerate(in_order)})
    result = evaluate(data__root=root, model__weights=weights(in_order))
    assert (result["val/top1"], result["notes"]) == (100.0, [])


@pytest.mark.parametrize(("width", "trained"), [(3, 1), (2, 1), (1, 3)])
def test_leading_zeros_of_class_numbers_are_ignored(
    width: int, trained: int, weights: Callable[[Sequence[str] | None], str], tmp_path: Path
) -> None:
    # Without zeros the order is 0, 1, 10, 11, 2: by index, folder 002 would be class 10. With two digits, the names 10
    # and 11 are equal.
    own = sorted(f"{number:0{trained}}" for number in range(12))
    held = {f"{int(name):0{width}}": label for label, name in enumerate(own)}
    root = folders(tmp_path / "data", held)
    result = evaluate(data__root=root, model__weights=weights(own), evaluate__report=str(tmp_path / "report"))
    assert reported(tmp_path / "report") == dict.fromkeys(held, (IMAGES, IMAGES))
    (note,) = result["notes"]
    assert note.startswith("NOTE: classes are matched by number")
    assert f"{1:0{width}} is {1:0{trained}}" in note


@pytest.mark.parametrize("numbers", [(), (0, 1, 2)])  # of folders, and of labels in tars
@pytest.mark.parametrize(
    ("own", "held", "message"),
    [
        (["100", "200", "300"], ["0", "1", "2"], "0, 1, 2"),
        (["0", "1", "10", "2"], ["000", "002", "003"], "003"),
        (["0", "1", "2"], ["1", "01"], "01"),
        (["1", "01", "2"], ["001", "2"], "001"),
    ],
)
def test_numeric_class_names_are_not_indices(
    own: list[str], held: list[str], message: str, numbers: tuple[int, ...]
) -> None:
    state = {"fc.weight": torch.zeros(len(own), 1), "fc.bias": torch.zeros(len(own))}
    with pytest.raises(ConfigError, match=f"classes are not among the model's {len(own)}: {message};"):
        match_classes(Weights("w", state, tuple(own)), held, numbers)


def test_classes_that_the_model_lacks_are_refused_by_name(
    weights: Callable[[Sequence[str] | None], str], tmp_path: Path
) -> None:
    root = folders(tmp_path / "data", {"n03": 3, "cat": 1, "dog": 2})
    with pytest.raises(ConfigError, match="2 of the data set's 3 classes are not among the model's 12: cat, dog; the"):
        evaluate(data__root=root, model__weights=weights(NAMES))
    with pytest.raises(
        ConfigError, match=r"the network has 12 outputs, the data set has 3 classes, .* does not name the classes"
    ):
        evaluate(data__root=root, model__weights=weights(None))


def test_a_thousand_unnamed_outputs_are_imagenets_classes() -> None:
    # https://github.com/pytorch/vision/blob/main/torchvision/models/_meta.py: tench, goldfish, ..., toilet tissue.
    state = {"fc.weight": torch.zeros(1000, 1), "fc.bias": torch.zeros(1000)}
    names, rows, notes = match_classes(Weights("w", state), ["n15075141", "n01443537"])
    assert (rows, notes, len(names)) == ([999, 1], (), 1000)
    assert list(wnids()) == sorted(set(wnids()))


def test_numbers_in_text_order_give_a_warning(tmp_path: Path) -> None:
    warning = text_order(["0", "1", "10", "11", "2"])
    assert warning is not None
    assert "are the classes 0, 1, 10, 11, 2." in warning
    for fine in (["0", "1", "2"], ["00", "01", "10"], ["a", "b"], ["0", "1", "10", "2x"]):
        assert text_order(fine) is None
    for split in ("train", "val"):
        folders(tmp_path / "data" / split, numbered_name(12))
    changes = {"data__root": str(tmp_path / "data"), "run__dir": str(tmp_path / "run")}
    assert prepare(config(**changes)).notes == (text_order(sorted(numbered_name(12))),)


def test_a_new_head_is_initialized_and_the_rest_is_loaded(
    weights: Callable[[Sequence[str] | None], str], model: nn.Module, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        folders(tmp_path / "data" / split, {"a": 0, "b": 1})
    changes = {"data__root": str(tmp_path / "data"), "model__weights": weights(NAMES)}
    changes["run__dir"] = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"the file's 12 classes are not the data set's 2 .*model\.new_head=true"):
        prepare(config(**changes))
    assert "is newly initialized" in prepare(config(**changes, model__new_head=True)).notes[0]
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = make_network(config(**changes, model__new_head=True), ["a", "b"]).state_dict()
        torch.manual_seed(seed)
        fresh = make_network(config(), 2).state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(found[key], fresh[key] if key.startswith("fc.") else value), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__new_head": True}, r"needs model\.weights=FILE"),
        (
            {"mode": "evaluate", "model__weights": "w.pth", "model__new_head": True},
            "mode=evaluate does not train a new",
        ),
        ({"model__weights": "w.pth", "evaluate__outputs": "some"}, "choose one of subset, all"),
    ],
)
def test_incompatible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)
