"""All 200 broken files of a data set count as bad, and valid files of odd formats count as good."""

from __future__ import annotations

import io
import itertools
import json
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from lars_train.config import Config, resolve
from lars_train.data.decode import native
from lars_train.data.loading.loader import Batch, EvalSpec, LoaderSpec, eval_loader, train_loader
from lars_train.data.order import epoch_order
from lars_train.data.transforms import View
from lars_train.launch import Ranks
from lars_train.training import session
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation

VIEW = View("inception", 16, True, 0, 0.875)
BROKEN = 200
not_built = pytest.mark.skipif(native.jpeg is None, reason="the C decoder is not built")
DECODERS = ["pillow", pytest.param("native", marks=not_built)]


def make_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng([width, height]).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpegs() -> Iterator[bytes]:
    """Yield JPEGs with SOI, APP0, APP1, COM, DQT, SOF0 or SOF2, DHT, DRI, SOS, RST0 to RST2 or RST6, and EOI."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for side, progressive in itertools.product((40, 56), (False, True)):
        options = {"exif": exif, "comment": b"made up", "restart_marker_rows": 1, "progressive": progressive}
        yield encoded(make_image(side, 64), **options)


def cut_at_markers(data: bytes) -> Iterator[bytes]:
    """Yield the JPEG cut before, within, and just after the first and the last marker of each kind."""
    places: dict[int, list[int]] = {}
    for at in range(len(data) - 1):
        if data[at] == 0xFF and data[at + 1] not in (0x00, 0xFF):
            places.setdefault(data[at + 1], []).append(at)
    assert {0xD8, 0xE0, 0xE1, 0xFE, 0xDB, 0xC4, 0xDD, 0xDA, 0xD0, 0xD9} < places.keys()
    for at, within in itertools.product(sorted({at[i] for at in places.values() for i in (0, -1)}), (0, 1, 2, 4)):
        if at + within < len(data):
            yield data[: at + within]


def of_size(data: bytes, side: int) -> bytes:
    """Return the JPEG with another size in its header."""
    at = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
    return data[: at + 5] + struct.pack(">HH", side, side) + data[at + 9 :]


def png_of_size(side: int) -> bytes:
    """Return a PNG of a few bytes with this size in its header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def odd() -> list[bytes]:
    """Return valid images of other formats than their names with .JPEG suggest."""
    deep = np.random.default_rng(0).integers(0, 2**16, (40, 30), dtype=np.uint16)
    return [
        *(encoded(make_image(50, 40), kind) for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")),
        encoded(Image.fromarray(deep), "PNG"),
        encoded(make_image(50, 40, "CMYK")),
        encoded(make_image(50, 40, "L")),
        encoded(make_image(1, 1)),
        encoded(make_image(1, 1), "PNG"),
        encoded(make_image(1, 300)),
    ]


@cache
def files() -> list[tuple[bytes, bool]]:
    """Return contents, each with True for a valid image, in a fixed shuffled order."""
    whole = [*odd(), *jpegs(), *(encoded(make_image(20 + side, 30)) for side in range(24))]
    broken = [b"", bytes(4096), b"<html>404 not found</html>", b"\xff\xd8", b"not an image\n" * 100]
    broken += [png_of_size(20_000), *(of_size(data, 20_000) for data in jpegs())]
    broken += [data[: int(part * len(data))] for data in odd()[:8] for part in (0.05, 0.5)]
    cuts = list(dict.fromkeys(data for one in jpegs() for data in cut_at_markers(one) if data not in broken))
    missing = BROKEN - len(broken)
    broken += [cuts[i * len(cuts) // missing] for i in range(missing)]
    assert len(set(broken)) == BROKEN
    mixed = [*((data, True) for data in whole), *((data, False) for data in broken)]
    return [mixed[i] for i in np.random.default_rng(0).permutation(len(mixed))]


class Files:
    """A source of all files. The label of each is its number."""

    def __init__(self) -> None:
        self.labels = np.arange(len(files()), dtype=np.int32)

    def __len__(self) -> int:
        return len(files())

    def name(self, sample: int) -> str:
        return f"{sample:03d}.JPEG"

    location = name

    def read(self, sample: int) -> bytes:
        return files()[sample][0]


def numbers(batches: list[Batch]) -> list[int]:
    return [label for batch in batches for label in batch.labels.tolist()]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_bad_and_valid_files_load(decoder: str, workers: int) -> None:
    source, good = Files(), [whole for _, whole in files()]
    count = len(good)
    assert (count, sum(good)) == (240, 40)
    common: dict[str, Any] = {"rank": 0, "world": 1, "workers": workers, "pin_memory": False, "decoder": decoder}
    seen = list(eval_loader(EvalSpec(source=source, view=VIEW, micro_batch=64, **common)))
    assert numbers(seen) == [number if good[number] else -1 for number in range(count)]
    assert [bad.sample for batch in seen for bad in batch.bad] == [i for i in range(count) if not good[i]]
    assert all(len(bad.reason.splitlines()) == 1 for batch in seen for bad in batch.bad)
    epoch = {"seed": 1, "batch": 60, "ghost_batch": 20, "ghosts_per_micro": 2, "updates_per_epoch": 4}
    spec = LoaderSpec(source=source, view=VIEW, **epoch, on_error="skip", **common)
    drawn = list(train_loader(spec, 0, 4))
    following = {i: next(j % count for j in itertools.count(i) if good[j % count]) for i in range(count)}
    assert numbers(drawn) == [following[sample] for sample in epoch_order(1, 0, count).tolist()]
    assert {bad.sample for batch in drawn for bad in batch.bad} == {i for i in range(count) if not good[i]}


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_run_with_200_broken_files_ends_and_counts_them(decoder: str, tmp_path: Path) -> None:
    for number, (data, _) in enumerate(files()):
        split = "val" if number % 3 == 0 else "train"
        path = tmp_path / "data" / split / f"class{number % 2}" / f"{number:03d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    values = {
        "epochs": 1,
        "device": "cpu",
        "micro_batch": 16,
        "batch": {"size": 16},
        "recipe": {"rows": {"32k": {}}},
        "run": {"dir": str(tmp_path / "run")},
        "data": {"name": "folder", "root": str(tmp_path / "data"), "image_size": 16, "workers": 2, "decoder": decoder},
        "model": {"name": "small", "ghost_batch": 16},
        "optimizer": {"lr": 0.1, "trust_coef": 0.01},
        "schedule": {"warmup_epochs": 0.0},
        "precision": {"name": "fp32"},
        "launch": {"threads": 1},
    }
    values["data"]["max_bad"] = BROKEN  # type: ignore[index]
    raw = OmegaConf.merge(OmegaConf.structured(Config), values)
    assert isinstance(raw, DictConfig)
    final = session.train(prepare(resolve(raw)), Ranks(), Invocation(("lars-train",)))
    reported = [json.loads(line)["image"] for line in (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()]
    broken = {f"{number:03d}.JPEG" for number, (_, whole) in enumerate(files()) if not whole}
    assert sorted(Path(image).name for image in reported) == sorted(broken)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    in_val = sum(not whole for _, whole in files()[::3])
    evaluated = next(line for line in lines if "val/count" in line)
    assert (evaluated["val/count"], evaluated["val/bad_images"]) == (80, in_val)
    trained = [line for line in lines if "train/bad_images" in line]
    assert trained[-1]["train/bad_images"] == BROKEN - in_val
    assert final["bad_images"] == BROKEN
    shares = [line["loader/fast_share"] for line in trained]
    assert all(0.3 < share < 1 for share in shares) if decoder != "pillow" else not any(shares)
