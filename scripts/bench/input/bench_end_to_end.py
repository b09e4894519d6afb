"""The second part of bench_input.py: from stored pictures to a normalised batch on a device, with workers.

- reference: as torchvision's own training script does it: Pillow and v1 transforms to a normalised float32 tensor in
  torch's DataLoader, default_collate, the batch moved to the device
- ours: lars_train's loader, by threads and by processes, the batch moved to the device and normalised there (float32)

The process keeps what memory is freed, as a training on a CPU does, and so do all contenders' workers. What counts is
the CPU time of this process and its workers, from the workers' start to their end; and wall time, which means little
where the machine has other work.
"""

from __future__ import annotations

import gc
import io
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from bench_input_contenders import SIZE, VIEW, read
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lars_train.data.dataset import Source
from lars_train.data.decode import native
from lars_train.data.decode.pillow import NATIVE, PILLOW
from lars_train.data.loading.loader import LoaderSpec, train_loader
from lars_train.data.loading.stream import PROCESSES, THREADS
from lars_train.training.device import Precision, keep_freed_memory
from lars_train.training.device_prefetch import DevicePrefetcher, normalizer

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BATCH = 64
PASSES = 8  # over the pictures, by each stream: what a stream costs once is then a small part, as in a training
REFERENCE = "reference"
WORKERS = (1, 2)


class ReferenceSet(Dataset[tuple[torch.Tensor, int]]):
    """As torchvision's ImageFolder with its training transforms."""

    def __init__(self, pictures: Source) -> None:
        first = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([*first, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(io.BytesIO(read(self.pictures, index))).convert("RGB")), 0


Stream = Callable[[Source, int, torch.device], int]


def reference(pictures: Source, workers: int, device: torch.device) -> int:
    """Images that came."""
    order = [sample for _ in range(PASSES) for sample in random.sample(range(len(pictures)), len(pictures))]
    pinned = device.type == "cuda"
    count = 0
    for images, labels in DataLoader(
        ReferenceSet(pictures), BATCH, sampler=order, num_workers=workers, pin_memory=pinned, drop_last=False
    ):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        count += len(labels)
    return count


def ours(decoder: str, kind: str, pictures: Source, workers: int, device: torch.device) -> int:
    """Images that came."""
    batch = min(BATCH, len(pictures))
    spec = LoaderSpec(
        source=pictures,
        view=VIEW,
        seed=0,
        batch=batch,
        ghost_batch=batch,
        ghosts_per_micro=1,
        updates_per_epoch=len(pictures) // batch,
        rank=0,
        world=1,
        workers=workers,
        pin_memory=device.type == "cuda",
        on_error="fail",
        decoder=decoder,
        kind=kind,
    )
    stream = train_loader(spec, 0, PASSES * len(pictures) // batch)
    normalize = normalizer(MEAN, STD, device, Precision("fp32", torch.float32, torch.float32))
    feed, count = DevicePrefetcher(stream, device), 0
    for found in feed:
        images = normalize(found.images)
        count += len(images)
    feed.close()
    return count


def line_up() -> dict[str, Stream]:
    """All that can run here."""
    found: dict[str, Stream] = {REFERENCE: reference}
    for name, decoder, there in (
        ("native", NATIVE, native.is_available()),
        ("Pillow", PILLOW, True),
    ):
        if there:
            found |= {f"ours, {name}, {kind}": partial(ours, decoder, kind) for kind in (THREADS, PROCESSES)}
    return found


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@dataclass
class Rates:
    """Images per second of CPU time and of wall time, in each round."""

    cpu: npt.NDArray[np.float64]
    wall: npt.NDArray[np.float64]


def measure(pictures: Source, rounds: int, device: torch.device) -> dict[tuple[str, int], Rates]:
    """By contender and number of workers; a first round does not count."""
    keep_freed_memory()
    streams = line_up()
    turns = [(name, workers) for name in streams for workers in WORKERS]
    found: dict[tuple[str, int], list[tuple[float, float]]] = {turn: [] for turn in turns}
    # What the libraries hold is not gone through again in each turn, which would cost the fastest most.
    gc.collect()
    gc.freeze()
    for number in range(-1, rounds):
        random.Random(number).shuffle(turns)
        for name, workers in turns:
            gc.collect()
            cpu, wall = cpu_seconds(), time.perf_counter()
            count = streams[name](pictures, workers, device)
            gc.collect()  # the reference's workers end with its loader
            if number >= 0:
                found[name, workers].append((count / (cpu_seconds() - cpu), count / (time.perf_counter() - wall)))
    gc.unfreeze()
    return {turn: Rates(*np.array(values).T) for turn, values in found.items()}


def table(rates: dict[tuple[str, int], Rates]) -> list[str]:
    """A Markdown table; ratios are medians over the rounds, to the reference with as many workers."""
    lines = [
        "| contender | workers | images per CPU-second | ÷ reference | images per wall second | ÷ reference |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for (name, workers), own in sorted(rates.items(), key=lambda item: (item[0][1], item[0][0] != REFERENCE)):
        to = rates[REFERENCE, workers]
        cells = [f"{np.median(own.cpu):,.0f}", f"{np.median(own.cpu / to.cpu):.2f}"]
        cells += [f"{np.median(own.wall):,.0f}", f"{np.median(own.wall / to.wall):.2f}"]
        lines.append(f"| {name} | {workers} | {' | '.join(cells)} |")
    return lines
