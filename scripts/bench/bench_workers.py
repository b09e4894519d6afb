"""Time how much loader workers slow down the thread that launches kernels: processes and threads.

    python scripts/bench/bench_workers.py [--write docs/input.md]

In place of launching kernels, the main thread adds 1 to a tensor of one element in a loop. Every millisecond it takes
the filled batches. Workers fill batches without a pause: *small arrays* of 32 x 32 pixels, padded, cropped and flipped
(CIFAR), or *JPEGs* of 160 x 120, decoded by Pillow. Contenders take turns, each on all cores.

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
from lars_train.data.loading.reader import Reader, TrainReader
from lars_train.data.loading.shard_windows import Span
from lars_train.data.loading.stream import PROCESSES, THREADS, BatchRequest, Stream
from lars_train.data.transforms import View

BATCH, SIDE, PAD, IMAGES = 256, 32, 4, 4096
ARRAYS, JPEGS = "small arrays", "JPEGs, Pillow"


class Images:
    """A source of JPEGs or of pixels, in memory."""

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


def requests() -> Iterator[BatchRequest]:
    """Yield batches of random samples, epoch after epoch."""
    generator = np.random.default_rng(0)
    for epoch in itertools.count():
        yield BatchRequest(epoch, generator.integers(0, IMAGES, BATCH), Span(0, 0, 0))


def readers() -> dict[str, Reader]:
    """Return the reader of each kind of images."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (IMAGES, SIDE, SIDE, 3), np.uint8)
    files = []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (8, 10, 3), np.uint8)).resize((160, 120)).save(file, "JPEG")
        files.append(file.getvalue())
    jpegs = Images([files[number % len(files)] for number in range(IMAGES)])
    return {
        ARRAYS: TrainReader(Images(pixels), View("pad_crop", SIDE, True, PAD, 1.0), PILLOW, 0, "skip"),
        JPEGS: TrainReader(jpegs, View("inception", 128, True, 0, 1.0), PILLOW, 0, "skip"),
    }


def measure(reader: Reader, kind: str, workers: int, seconds: float) -> tuple[float, float]:
    """Return the main thread's operations/s and the workers' images/s (0 without workers)."""
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
    own = readers()
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {
        key: [] for key in itertools.product(own, (PROCESSES, THREADS), args.workers)
    }
    alone = []
    for _ in range(args.rounds):
        alone.append(measure(own[ARRAYS], THREADS, 0, args.seconds)[0])
        for (images, kind, workers), rates in found.items():
            rates.append(measure(own[images], kind, workers, args.seconds))
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
    """Format the median, lowest and highest value."""
    return f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


if __name__ == "__main__":
    shared.exit_on_signals()
    main(ARGS)
