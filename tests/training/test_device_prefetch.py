"""Prefetched batches are those of the stream, in order, and normalized like the formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lars_train.data.loading.loader import Batch, LoaderSpec, Stream, train_loader
from lars_train.data.transforms import View
from lars_train.errors import DataError
from lars_train.training.device import Precision
from lars_train.training.device_prefetch import DevicePrefetcher, normalizer

CPU = torch.device("cpu")
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Noise:
    """Sample i is noise drawn from i; some cannot be read."""

    def __init__(self, bad: int | None = None) -> None:
        self.labels, self.bad = np.arange(40, dtype=np.int32), bad

    def __len__(self) -> int:
        return 40

    def name(self, sample: int) -> str:
        return f"{sample}.png"

    location = name

    def read(self, sample: int) -> Any:
        if sample == self.bad:
            raise FileNotFoundError(2, "No such file or directory")
        return np.random.default_rng(sample).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def stream(source: Noise, **changes: Any) -> Stream:
    options: dict[str, Any] = {
        "seed": 1,
        "batch": 8,
        "ghost_batch": 8,
        "ghosts_per_micro": 1,
        "updates_per_epoch": 5,
        "rank": 0,
        "world": 1,
        "workers": 2,
        "pin_memory": False,
        "on_error": "fail",
        "kind": "threads",
        **changes,
    }
    return train_loader(LoaderSpec(source=source, view=View("none", 8, False, 0, 1.0), **options), 0, 30)


class FakeCuda:
    """A fake CUDA runtime. Streams and events do nothing; copies are complete when `done` is true."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.waited = False, 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self)
        monkeypatch.setattr(torch.cuda, "Event", lambda: self)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def record(self, stream: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.waited += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def simulated(batches: Stream, cuda: Any) -> DevicePrefetcher:
    feed = DevicePrefetcher(batches, CPU)
    feed._copies = cuda
    return feed


def contents(batches: Iterator[Batch]) -> list[tuple[bytes, list[int]]]:
    return [(batch.images.numpy().tobytes(), batch.labels.tolist()) for batch in batches]


def test_batches_pass_unchanged_on_the_cpu() -> None:
    batches = stream(Noise())
    feed = DevicePrefetcher(batches, CPU)
    assert contents(feed) == contents(stream(Noise()))
    assert feed.statistics().images == 240
    feed.close()
    assert next(batches, None) is None


@pytest.mark.parametrize("done", [True, False])
def test_prefetched_batches_come_once_and_in_order(done: bool, cuda: FakeCuda) -> None:
    cuda.done = done
    assert contents(simulated(stream(Noise()), cuda)) == contents(stream(Noise()))


def test_the_source_of_a_copy_is_kept_until_it_is_done(cuda: FakeCuda) -> None:
    feed = simulated(stream(Noise()), cuda)
    for _ in range(3):
        next(feed)
    held = [batch for _, batch in feed._copied]
    assert len(held) >= 3
    assert contents(iter(held)) == contents(stream(Noise()))[: len(held)]
    cuda.done = True
    del held
    next(feed)
    next(feed)
    assert len(feed._copied) <= 2
    cuda.done = False
    feed.close()
    assert cuda.waited >= 1
    assert not feed._copied


def test_batches_before_a_loader_failure_still_arrive(cuda: FakeCuda) -> None:
    good = contents(stream(Noise()))
    # An image of the fourth batch. Each image occurs once in an epoch.
    bad = good[3][1][0]
    feed = simulated(stream(Noise(bad)), cuda)
    assert [contents(iter([next(feed)]))[0] for _ in range(3)] == good[:3]
    with pytest.raises(DataError, match=f"^{bad}.png"):
        next(feed)


def test_images_have_the_dtype_of_the_networks_computation() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    got = normalizer([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], CPU, Precision("bf16", torch.float32, torch.bfloat16))(pixels)
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    )
    expected = (pixels.double() / 255 - mean) / std
    assert got.dtype == torch.bfloat16
    assert got.is_contiguous(memory_format=torch.channels_last)
    # Half a unit in the last place of bfloat16, which has eight bits of precision.
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-6)


def test_memory_is_reused_once_no_tensor_refers_to_it() -> None:
    normalize = normalizer([0.5] * 3, [0.5] * 3, CPU, Precision("fp32", torch.float32, torch.float32))
    addresses, held = [], []
    for level, count in [(0, 4), (51, 2), (102, 4), (153, 8), (204, 1), (255, 4)]:
        images = normalize(torch.full((count, 3, 8, 8), level, dtype=torch.uint8))
        addresses.append(images.data_ptr())
        held.append((level, images[-1:, 1:].detach().flatten(1)[:, 5:]))
        held.append((level, images[0, 0]))
    for level, part in held:
        torch.testing.assert_close(part, torch.full_like(part, level / 127.5 - 1))
    assert len(set(addresses)) == len(addresses)
    del images, part
    held.clear()
    assert normalize(torch.zeros((1, 3, 8, 8), dtype=torch.uint8)).data_ptr() in addresses


@on_cuda
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_batches_and_normalization_on_cuda_match_the_cpu(name: str) -> None:
    device = torch.device("cuda")
    compute = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    normalize = normalizer([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], device, Precision(name, torch.float32, compute))
    plain = normalizer([0.4, 0.5, 0.6], [0.2, 0.3, 0.4], CPU, Precision(name, torch.float32, compute))
    expected = list(stream(Noise()))
    feed = DevicePrefetcher(stream(Noise(), pin_memory=True), device)
    for batch, reference in zip(feed, expected, strict=True):
        torch.cuda._sleep(1_000_000)
        got = normalize(batch.images)
        assert got.dtype == compute
        assert got.is_contiguous(memory_format=torch.channels_last)
        # The multiply-add may differ by one rounding.
        tolerance = {"fp32": 1e-6, "bf16": 0.02, "fp16": 0.003}[name]
        torch.testing.assert_close(got.cpu(), plain(reference.images), rtol=0, atol=tolerance)
        assert torch.equal(batch.labels.cpu(), reference.labels)
