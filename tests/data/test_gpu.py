"""Decoding on the GPU: as far as it goes without one, by nvImageCodec's CPU backend in the GPU's place; and on one."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from jpegs import KINDS, encode, in_one_step, made_up, not_for_it, whole_picture
from PIL import Image

from lars_train.data import gpu, library, loader
from lars_train.data.augment import UNIFORMS, Geometry, View
from lars_train.data.decode import GPU, PILLOW
from lars_train.data.loader import eval_loader, train_loader

pytestmark = pytest.mark.skipif(library.nvimgcodec() is None, reason="nvImageCodec is not installed")

CPU = torch.device("cpu")
VIEW = View("inception", 32, True, 0, 0.875)
AUGMENTS = ("inception", "scale_crop", "pad_crop", "none")


class OnCpu:
    """nvImageCodec's CPU decoder, which takes what the GPU's takes, and notes it."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.streams: set[int] = set()

    def decode(self, streams: list[Any], params: Any, cuda_stream: int) -> list[Any]:
        self.batches.append(len(streams))
        self.streams.add(cuda_stream)
        return list(library._decoder().decode(streams, params=params))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> OnCpu:
    found = OnCpu()
    monkeypatch.setattr(gpu, "_new_decoder", lambda device: found)
    monkeypatch.setattr(gpu, "current_device", lambda: CPU)
    return found


def geometry(view: View, uniforms: list[float], width: int, height: int) -> Geometry:
    return view.train(width, height, uniforms)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_batch_has_the_views_of_pillow_and_says_which_it_has_not(augment: str, stand_in: OnCpu) -> None:
    view, rng = View(augment, 32, True, 3, 0.875), np.random.default_rng(0)
    items: list[object] = [made_up(kind, 60 + i, 50, bool(i % 2)) for i, kind in enumerate(2 * KINDS)]
    whole = list(items)
    items[3:3] = [None, np.zeros((40, 40, 3), np.uint8), *(data for _, data in not_for_it())]
    items.append(made_up("4:2:0", 60, 50)[:-100])
    geometries = [partial(geometry, view, rng.random(UNIFORMS).tolist()) for _ in items]
    out = np.full((len(items), 32, 32, 3), 9, np.uint8)
    done = gpu.GpuDecoder(CPU).decode(items, geometries, out)
    assert done == [any(item is one for one in whole) for item in items]
    assert stand_in.batches == [len(whole)]
    for slot, item in enumerate(items):
        if done[slot]:
            assert isinstance(item, bytes)
            picture = whole_picture(item)
            wanted = in_one_step(picture, geometries[slot](*picture.size), 32)
            # It rounds once, Pillow in each direction.
            assert np.abs(out[slot].astype(int) - wanted).max() <= 1


class Mixed:
    """Twenty files: JPEGs, and every fifth one a PNG, one broken, one that cannot be read."""

    labels = np.arange(20, dtype=np.int32)

    def __len__(self) -> int:
        return 20

    def name(self, sample: int) -> str:
        return f"class/{sample}.JPEG"

    where = name

    def read(self, sample: int) -> bytes:
        if sample == 7:
            raise OSError(5, "Input/output error")
        if sample == 8:
            return made_up("4:2:0", 50, 44)[:-100]
        if sample % 5 == 0:
            return encode(whole_picture(made_up("4:4:4", 50, 40 + sample)), "PNG")
        return made_up("4:2:0", 50, 40 + sample)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_has_the_samples_labels_and_bad_pictures_of_pillows(workers: int, stand_in: OnCpu) -> None:
    common: dict[str, Any] = {"rank": 0, "world": 1, "workers": workers, "pin_memory": False}
    epoch = {"seed": 1, "batch": 10, "ghost_batch": 10, "ghosts_per_micro": 1, "updates_per_epoch": 2}
    epoch |= {"start_update": 0, "stop_update": 4}

    def streams(decoder: str) -> tuple[loader.Stream, loader.Stream]:
        source = Mixed()
        return (
            train_loader(source, VIEW, **epoch, on_error="skip", decoder=decoder, **common),
            eval_loader(source, VIEW, micro_batch=8, decoder=decoder, **common),
        )

    for one, other in zip(streams(GPU), streams(PILLOW), strict=True):
        ours, theirs = list(one), list(other)
        assert [batch.labels.tolist() for batch in ours] == [batch.labels.tolist() for batch in theirs]
        assert [batch.bad for batch in ours] == [batch.bad for batch in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert (a.images.int() - b.images.int()).abs().max() <= 1
        # Of twenty, 4 are PNGs and 2 are bad; the training goes over all of them twice.
        assert (one.statistics().fast, other.statistics().fast) == (14 * sum(len(b.labels) for b in ours) // 20, 0)
    assert sum(stand_in.batches) == 3 * 14


def test_a_device_that_decodes_nothing_wrongly_or_not_at_all_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(OnCpu):
        def decode(self, streams: list[Any], params: Any, cuda_stream: int) -> list[Any]:
            return [None for _ in streams]

    class Shuffles(OnCpu):
        def decode(self, streams: list[Any], params: Any, cuda_stream: int) -> list[Any]:
            return [np.ascontiguousarray(np.asarray(image)[::-1]) for image in super().decode(streams, params, 0)]

    class Fails(OnCpu):
        def decode(self, streams: list[Any], params: Any, cuda_stream: int) -> list[Any]:
            raise RuntimeError("CUDA error 35:\n no driver")

    for decoder, said in [
        (OnCpu(), None),
        (Refuses(), "refuses a common JPEG"),
        (Shuffles(), "wrongly"),
        (Fails(), "CUDA error 35: no driver"),
    ]:
        monkeypatch.setattr(gpu, "_new_decoder", lambda device, decoder=decoder: decoder)
        found = gpu.fault(CPU)
        assert found is None if said is None else said in str(found)


def test_without_a_gpu_it_is_not_possible() -> None:
    assert gpu.is_possible() == (torch.cuda.device_count() > 0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_on_a_gpu_views_are_those_of_pillow_but_for_nvjpegs_arithmetic() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert gpu.fault(device) is None
    rng = np.random.default_rng(0)
    items = []
    for number in range(8):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        items.append(encode(Image.fromarray(coarse).resize((400, 300 + number), Image.Resampling.BICUBIC)))
    geometries = [partial(geometry, VIEW, rng.random(UNIFORMS).tolist()) for _ in items]
    out = np.zeros((8, 32, 32, 3), np.uint8)
    assert all(gpu.GpuDecoder(device).decode(items, geometries, out))
    for slot, item in enumerate(items):
        picture = whole_picture(item)
        wanted = in_one_step(picture, geometries[slot](*picture.size), 32)
        assert np.abs(out[slot].astype(int) - wanted).mean() < 3
