"""Time what loader workers cost the thread that launches kernels: processes, threads, threads that cut batches at once.

    python scripts/bench/bench_workers.py [--write docs/input.md]

The main thread adds 1 to a tensor of one element in a loop, as a stand-in for launching kernels, and every millisecond
takes the batches that are filled. Its workers fill batches without a pause: *small arrays* of 32 x 32 pixels, padded,
cropped and flipped (CIFAR), or *JPEGs* of 160 x 120 that Pillow decodes. Contenders take turns, each on all cores. The
third contender is a reader of small arrays that draws the numbers of a piece with Philox in numpy, and cuts all its
views by one index. Its views are compared with the loader's, bit for bit, before anything is timed.

Takes about five minutes. Figures: docs/input.md.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "bench_workers")
    PARSER.add_argument("--workers", type=shared.positive_int, nargs="+", default=[1, 4, 16], help="(1 4 16)")
    PARSER.add_argument("--rounds", type=shared.positive_int, default=5, help="(5)")
    PARSER.add_argument("--seconds", type=shared.seconds, default=3.0, help="per turn (3)")
    ARGS = PARSER.parse_args()

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lars_train.data.decode.pillow import PILLOW
from lars_train.data.loading.reader import Outcome, Reader, TrainReader
from lars_train.data.loading.shard_windows import Span
from lars_train.data.loading.stream import PROCESSES, THREADS, BatchRequest, Stream
from lars_train.data.transforms import View

BATCH, SIDE, PAD, IMAGES = 256, 32, 4, 4096
ARRAYS, JPEGS = "small arrays", "JPEGs, Pillow"
BATCHED = "threads, a batch at a time"
# Philox4x64-10: multipliers and increments of the key (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405).
_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_INCREMENTS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
# order.py: the domain of augmentation. transforms.py: x, y and flip are words 20 to 22, in the sixth block of four.
_DOMAIN, _BLOCK = 1, 6


class Images:
    """A source of encoded images or of pixels, in memory."""

    def __init__(self, items: Sequence[bytes] | npt.NDArray[np.uint8]) -> None:
        self.items, self.labels = items, np.zeros(len(items), np.int32)

    def __len__(self) -> int:
        return len(self.items)

    def name(self, sample: int) -> str:
        return str(sample)

    def location(self, sample: int) -> str:
        return str(sample)

    def read(self, sample: int) -> bytes | npt.NDArray[np.uint8]:
        return self.items[sample]


class BatchedReader:
    """Pads, crops and flips small arrays, uint8 (N, S, S, 3), a piece of a batch at a time."""

    size = SIDE

    def __init__(self, pixels: npt.NDArray[np.uint8], seed: int) -> None:
        self._pixels, self._seed = pixels, seed

    def fill(
        self, epoch: int, samples: Sequence[int], images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
    ) -> Outcome:
        ids = np.array(samples)
        x, y, flip = uniforms(self._seed, epoch, ids)
        padded = np.zeros((len(ids), SIDE + 2 * PAD, SIDE + 2 * PAD, 3), np.uint8)
        padded[:, PAD:-PAD, PAD:-PAD] = self._pixels[ids]
        steps = np.arange(SIDE)
        columns = np.where((flip < 0.5)[:, None], steps[::-1], steps) + (x * (2 * PAD + 1)).astype(np.int64)[:, None]
        rows = steps + (y * (2 * PAD + 1)).astype(np.int64)[:, None]
        images[:] = padded[np.arange(len(ids))[:, None, None], rows[:, :, None], columns[:, None, :]]
        labels[:] = 0
        return Outcome()


def uniforms(seed: int, epoch: int, samples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], ...]:
    """Return the draws for x, y and flip of some samples, each float64 (n,), equal to `order.batch_uniforms`."""
    words = [np.full(len(samples), word, np.uint64) for word in (_BLOCK, 0, 0, _DOMAIN)]
    words[2] = samples.astype(np.uint64)
    keys = [seed, epoch]
    for _ in range(10):
        (high0, low0), (high1, low1) = (product(m, w) for m, w in zip(_MULTIPLIERS, words[::2], strict=True))
        words = [high1 ^ words[1] ^ np.uint64(keys[0]), low1, high0 ^ words[3] ^ np.uint64(keys[1]), low0]
        keys = [(key + step) % 2**64 for key, step in zip(keys, _INCREMENTS, strict=True)]
    return tuple((word >> np.uint64(11)) * 2.0**-53 for word in words[:3])


def product(one: np.uint64, other: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return the upper and the lower 64 bits of a product."""
    a, b, c, d = one >> _HALF, one & _LOW, other >> _HALF, other & _LOW
    middle = a * d + (b * d >> _HALF)
    other_middle = b * c + (middle & _LOW)
    with np.errstate(over="ignore"):
        return a * c + (middle >> _HALF) + (other_middle >> _HALF), one * other


def requests() -> Iterator[BatchRequest]:
    """Yield batches of random samples, epoch after epoch."""
    generator = np.random.default_rng(0)
    for epoch in itertools.count():
        yield BatchRequest(epoch, generator.integers(0, IMAGES, BATCH), Span(0, 0, 0))


def contenders() -> dict[tuple[str, str], tuple[Reader, str]]:
    """Return the reader and the kind of its workers, by images and workers."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (IMAGES, SIDE, SIDE, 3), np.uint8)
    files = []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (8, 10, 3), np.uint8)).resize((160, 120)).save(file, "JPEG")
        files.append(file.getvalue())
    jpegs = Images([files[number % len(files)] for number in range(IMAGES)])
    small: Reader = TrainReader(Images(pixels), View("pad_crop", SIDE, True, PAD, 1.0), PILLOW, 0, "skip")
    decoding: Reader = TrainReader(jpegs, View("inception", 128, True, 0, 1.0), PILLOW, 0, "skip")
    batched = BatchedReader(pixels, 0)
    views = np.empty((2, BATCH, SIDE, SIDE, 3), np.uint8)
    for reader, images in zip((small, batched), views, strict=True):
        reader.fill(3, list(range(BATCH)), images, np.empty(BATCH, np.int64))
    if not np.array_equal(*views):
        sys.exit("the batched reader's views differ from the loader's")
    return {
        (ARRAYS, PROCESSES): (small, PROCESSES),
        (ARRAYS, THREADS): (small, THREADS),
        (ARRAYS, BATCHED): (batched, THREADS),
        (JPEGS, PROCESSES): (decoding, PROCESSES),
        (JPEGS, THREADS): (decoding, THREADS),
    }


def measure(reader: Reader, kind: str, workers: int, seconds: float) -> tuple[float, float]:
    """Return the main thread's operations/s and the images/s; with no workers, there are no images."""
    stream = Stream(requests(), reader, BATCH, workers, False, kind) if workers else None
    value, one = torch.zeros(1), torch.ones(1)
    try:
        if stream is not None:
            next(stream)
        operations = images = 0
        began = time.perf_counter()
        while (now := time.perf_counter()) < began + seconds or (stream is not None and not images):
            while time.perf_counter() < now + 1e-3:
                value.add_(one)
                operations += 1
            while stream is not None and stream.ready():
                images += len(next(stream).labels)
        elapsed = time.perf_counter() - began
    finally:
        if stream is not None:
            stream.close()
    return operations / elapsed, images / elapsed


def main(args: Namespace) -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    readers = contenders()
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {
        (*names, workers): [] for names in readers for workers in args.workers
    }
    alone = []
    for _ in range(args.rounds):
        alone.append(measure(*readers[ARRAYS, THREADS], 0, args.seconds)[0])
        for (images, kind, workers), rates in found.items():
            rates.append(measure(*readers[images, kind], workers, args.seconds))
    lines = [
        f"`{shared.command_line(__file__)}` on {shared.cpu_name()}, 1 thread, {len(os.sched_getaffinity(0))} cores; "
        f"{shared.software()}; median of {args.rounds} turns (lowest to highest).",
        "",
        "| images | workers | | operations/s of the main thread | images/s |",
        "|---|---|---|---|---|",
        f"| none | none | | {spread(alone)} | |",
    ]
    for (images, kind, workers), rates in found.items():
        operations, speeds = (spread(values) for values in zip(*rates, strict=True))
        lines.append(f"| {images} | {kind} | {workers} | {operations} | {speeds} |")
    shared.publish(lines, args.write, "bench_workers")


def spread(values: Sequence[float]) -> str:
    """Return median, lowest and highest."""
    return f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


if __name__ == "__main__":
    shared.exit_on_signals()
    main(ARGS)
