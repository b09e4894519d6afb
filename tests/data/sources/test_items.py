"""Dataset objects of other libraries are read as they are, and what cannot be a data set is refused with the reason."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset
from torchvision import datasets, transforms

from lars_train.data.decode.pillow import BadImage
from lars_train.data.loading.loader import EvalSpec, LoaderSpec, View, eval_loader, train_loader
from lars_train.data.loading.stream import PROCESSES, worker_kind
from lars_train.data.sources.builtin import ArraySource
from lars_train.data.sources.items import ItemSource, open_items
from lars_train.errors import ConfigError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 7, 9, 3), dtype=np.uint8)
LABELS = [k % 3 for k in range(12)]
VIEW = View("pad_crop", 6, True, 1, 1.0)


class Pairs:
    """A dataset of `images`, any objects, with the labels `answers`. An item that is an exception is raised."""

    def __init__(self, images: Sequence[Any], answers: Sequence[Any] = LABELS, **attributes: Any) -> None:
        self._images, self._labels = images, answers
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if isinstance(self._images[index], Exception):
            raise self._images[index]
        return self._images[index], self._labels[index]


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def opened(train: Any, val: Any = None) -> Any:
    return open_items(train, train if val is None else val, "data")


def refusal(train: Any, val: Any = None) -> str:
    with pytest.raises(ConfigError) as caught:
        opened(train, val)
    return str(caught.value)


@pytest.mark.parametrize(
    "form",
    [
        lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
        lambda pixels: pixels,
        Image.fromarray,
        lambda pixels: Image.fromarray(pixels).convert("RGBA"),
        png,
        lambda pixels: {"bytes": png(pixels), "path": None},
    ],
)
def test_each_form_of_an_image_gives_the_same_pixels(form: Any) -> None:
    source = opened(Pairs([form(pixels) for pixels in PIXELS])).train
    for sample, pixels in enumerate(PIXELS):
        found = source.read(sample)
        found = np.asarray(Image.open(io.BytesIO(found))) if isinstance(found, bytes) else found
        assert np.array_equal(found, pixels)
    assert source.labels.tolist() == LABELS


@pytest.mark.parametrize("form", [Image.fromarray, torch.from_numpy, lambda gray: gray[..., None], lambda gray: gray])
def test_gray_images_have_two_dimensions(form: Any) -> None:
    source = opened(Pairs([form(pixels[..., 0].copy()) for pixels in PIXELS])).train
    assert np.array_equal(source.read(5), PIXELS[5, ..., 0])


def test_palettes_and_16_bits_are_converted_as_in_files() -> None:
    palette = Image.fromarray(PIXELS[0]).convert("P")
    deep = Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9) * 1024)
    source = opened(Pairs([palette, deep], [0, 1])).train
    assert np.array_equal(source.read(0), np.asarray(palette.convert("RGB")))
    assert np.array_equal(source.read(1)[..., 0], np.arange(63).reshape(7, 9) * 4 % 256)


def test_the_loader_reads_objects_like_arrays_with_any_workers() -> None:
    items, arrays = opened(Pairs(list(PIXELS), targets=LABELS)).train, ArraySource("x", "train", PIXELS, LABELS)
    assert worker_kind(items, "native") == PROCESSES

    def batches(source: Any, workers: int) -> list[tuple[Any, Any]]:
        common: dict[str, Any] = {"view": VIEW, "rank": 0, "world": 1, "workers": workers, "pin_memory": False}
        training = LoaderSpec(
            source=source, seed=3, batch=4, ghost_batch=2, ghosts_per_micro=1, updates_per_epoch=3,
            on_error="fail", **common,
        )  # fmt: skip
        streams = train_loader(training, 0, 6), eval_loader(EvalSpec(source=source, micro_batch=5, **common))
        return [(batch.images.clone(), batch.labels.clone()) for stream in streams for batch in stream]

    expected = batches(arrays, 0)
    for workers in (0, 2):
        found = batches(items, workers)
        assert len(found) == len(expected) == 12 + 3
        for one, other in zip(found, expected, strict=True):
            assert all(map(torch.equal, one, other))


def test_a_dataset_may_compute_with_torch_in_a_worker() -> None:
    class Computing(Pairs):
        def __getitem__(self, index: int) -> tuple[Any, Any]:
            ones = torch.ones(1 << 21)
            assert (ones * ones).sum() == 1 << 21
            return super().__getitem__(index)

    # Start torch's threads in this process. A fork does not have them, and would wait for them.
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    (torch.ones(1 << 22) * 2).sum()
    try:
        spec = EvalSpec(
            source=opened(Computing(list(PIXELS))).val, view=VIEW, micro_batch=12, rank=0, world=1, workers=1,
            pin_memory=False,
        )  # fmt: skip
        assert [batch.labels.tolist() for batch in eval_loader(spec)] == [LABELS]
    finally:
        torch.set_num_threads(before)


def test_bad_items_are_named_and_the_others_are_read() -> None:
    images: list[Any] = list(PIXELS)
    images[3], images[4] = OSError("the disk is gone"), torch.zeros(3, 7, 9)
    images[5], images[6], images[7] = np.zeros((3, 7, 9), np.uint8), png(PIXELS[0])[:60], "a.png"
    data = opened(Pairs(images, targets=LABELS))
    batches = list(
        eval_loader(EvalSpec(source=data.val, view=VIEW, micro_batch=12, rank=0, world=1, workers=1, pin_memory=False))
    )
    assert batches[0].labels.tolist() == [0, 1, 2, -1, -1, -1, -1, -1, 2, 0, 1, 2]
    words = ["OSError: the disk is gone", "Tensor of torch.float32", "shape (3, 7, 9)", "", "of type str"]
    for bad, number, word in zip(batches[0].bad, range(3, 8), words, strict=True):
        assert bad.where == f"val[{number}] of Pairs"
        assert word in bad.reason


def test_labels_are_listed_or_read(capsys: pytest.CaptureFixture[str]) -> None:
    shifted = [(label + 1) % 3 for label in LABELS]
    for lists, read in (
        ({"targets": torch.tensor(LABELS)}, 0),
        ({"labels": LABELS}, 0),
        ({}, 2),
        ({"targets": shifted}, 2),
    ):
        assert opened(Pairs(list(PIXELS), **lists)).train.labels.tolist() == LABELS
        assert capsys.readouterr().out.count("reading all 12 items of") == read
    values = [np.int64(2), torch.tensor(1), np.array(0), True]
    assert opened(Pairs(PIXELS[:4], values)).train.labels.tolist() == [2, 1, 0, 1]


def test_an_item_whose_label_changes_is_bad() -> None:
    source = ItemSource(Pairs(list(PIXELS)), "train", np.array([0, 2, *LABELS[2:]], np.int32))
    source.read(0)
    with pytest.raises(BadImage, match="its label is 1, but the list of labels or an earlier read gives 2"):
        source.read(1)


@pytest.mark.parametrize("label", [-1, None, "cat", 1.0, [1], 10**9])
def test_a_label_that_is_no_class_is_refused(label: Any) -> None:
    assert "train[4] of Pairs: the label is" in refusal(Pairs(list(PIXELS), [*LABELS[:4], label, *LABELS[5:]]))


def test_classes_without_samples_are_noted() -> None:
    sparse = opened(Pairs(list(PIXELS), [*LABELS[:4], 65535, *LABELS[5:]]))
    assert len(sparse.classes) == 65536
    assert list(sparse.inventory.lines())[:1] == [
        "NOTE: the labels go up to 65,535, but only 4 of them have samples",
    ]
    assert not list(opened(Pairs(list(PIXELS))).inventory.lines())


def test_classes_have_names_or_numbers() -> None:
    plain, named = Pairs(list(PIXELS)), Pairs(list(PIXELS), classes=["a", ("b", "B"), "c", "d"])
    assert opened(plain).classes == ("0", "1", "2")
    assert opened(named).classes == opened(named, plain).classes == ("a", "b, B", "c", "d")
    assert "are not those of the validation set (d, e, f" in refusal(
        named, Pairs(list(PIXELS), classes=["d", "e", "f"])
    )
    assert "label 2, but only 2 classes" in refusal(Pairs(list(PIXELS), classes=["a", "b"]))
    assert "at least two" in refusal(Pairs(list(PIXELS), [0] * 12))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from zip(PIXELS, LABELS, strict=True)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (Endless(), "train is of type Endless, which has no items in a fixed order. Give it __len__ and __getitem__"),
        (DataLoader(Pairs(list(PIXELS))), "train is of type DataLoader, which has no items in a fixed order. Pass its"),
        (Pairs([]), "train (Pairs) is empty"),
        ([1, 2, 3], "train[0] of list: the item is a int. Return the pair (image, label)"),
        ([(PIXELS[0], 1, 2)], "the item is a tuple of 3"),
        (Pairs([OSError("gone")] * 3), "train[0] of Pairs: OSError: gone."),
        (
            datasets.FakeData(4, (3, 8, 8), transform=transforms.ToTensor()),
            "not of uint8, with the transform ToTensor(). Pass",
        ),
        (
            datasets.FakeData(40, (3, 8, 8), transform=transforms.RandomHorizontalFlip()),
            "two reads of this sample differ, with the transform RandomHorizontalFlip(p=0.5). Leave random transforms",
        ),
    ],
)
def test_other_objects_are_refused_with_what_to_do(train: Any, words: str) -> None:
    message = refusal(train, Pairs(list(PIXELS)))
    assert message.startswith("data: ")
    assert words in message
    assert ("transform=None" in message) == ("transform" in words)


def test_the_identity_is_content_labels_and_classes() -> None:
    first = opened(Pairs(list(PIXELS)))
    changed = PIXELS.copy()
    changed[11, 0, 0, 0] ^= 1
    others = [
        opened(Pairs(list(changed))),
        opened(Pairs(list(PIXELS), [0, *LABELS[:-1]])),
        opened(Pairs(list(PIXELS), classes=["a", "b", "c"])),
        opened(Pairs(list(PIXELS)), Pairs(list(PIXELS[:9]))),
    ]
    assert opened(Pairs(list(PIXELS), targets=LABELS)).fingerprint == first.fingerprint
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_checking_opens_no_file_in_this_process(tmp_path: Path) -> None:
    (tmp_path / "images").write_bytes(PIXELS.tobytes())

    class Lazy(Pairs):
        file: Any = None

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            self.file = self.file or (tmp_path / "images").open("rb")
            self.file.seek(index * PIXELS[0].size)
            return np.frombuffer(self.file.read(PIXELS[0].size), np.uint8).reshape(7, 9, 3), LABELS[index]

    lazy = Lazy(range(12))
    data = opened(lazy)
    assert lazy.file is None
    assert np.array_equal(data.train.read(7), PIXELS[7])


@pytest.mark.filterwarnings("error")
def test_torchvisions_datasets_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = opened(datasets.FakeData(10, (3, 8, 8), num_classes=3))
    assert np.array_equal(fake.train.read(4), np.asarray(datasets.FakeData(10, (3, 8, 8), num_classes=3)[4][0]))
    for number, pixels in enumerate(PIXELS):
        path = tmp_path / "tree" / f"class {LABELS[number]}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    tree = opened(datasets.ImageFolder(str(tmp_path / "tree")))
    assert tree.classes == ("class 0", "class 1", "class 2")
    # ImageFolder sorts by class and then by name: 0, 3, 6, 9, and 1, 10, 4, 7.
    assert np.array_equal(tree.train.read(5), PIXELS[10])
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    planes = np.random.default_rng(1).integers(0, 256, (6, 20, 3072), dtype=np.uint8)
    for name, part in zip([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], planes, strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": part, "labels": [k % 10 for k in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    cifar = opened(datasets.CIFAR10(str(tmp_path)), datasets.CIFAR10(str(tmp_path), train=False))
    assert (len(cifar.train), len(cifar.val), cifar.classes) == (100, 20, tuple("abcdefghij"))
    assert np.array_equal(cifar.train.read(45), planes[2, 5].reshape(3, 32, 32).transpose(1, 2, 0))


def test_parts_and_sums_of_datasets_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    whole = Pairs(list(PIXELS), targets=LABELS, classes=["a", "b", "c"])
    part = opened(Subset(whole, [5, 1, 7]), ConcatDataset([whole, Subset(whole, [2])]))
    assert part.train.labels.tolist() == [2, 1, 1]
    assert part.val.labels.tolist() == [*LABELS, 2]
    assert (part.classes, part.train.location(1)) == (("a", "b", "c"), "train[1] of Subset of Pairs")
    assert np.array_equal(part.val.read(12), PIXELS[2])
    assert capsys.readouterr().out == ""
    tensors = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    assert np.array_equal(opened(TensorDataset(tensors, torch.tensor(LABELS))).train.read(3), PIXELS[3])
