"""Second part of bench_input.py: whole pipelines, from stored images to normalized batches on a device, with workers.

- reference: torchvision's training script: Pillow and v1 transforms to a normalized float32 tensor in torch's
  DataLoader, default_collate, then the copy to the device
- ours: lars_train's loader, with threads and with processes; the batch is copied to the device and normalized there

This process and all workers keep freed memory, as training on a CPU does. The CPU time of this process and its workers
counts, from their start to their end; wall time means little on a machine with other work.
"""

from __future__ import annotations

import gc
import io
import random
import resource
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import shared
import torch
from contenders import BATCH, NORMALIZE, REFERENCE, TRAIN, VIEW, read, reference_transform
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from lars_train.data.dataset import Source
from lars_train.data.decode import native
from lars_train.data.decode.pillow import NATIVE, PILLOW
from lars_train.data.loading.loader import LoaderSpec, train_loader
from lars_train.data.loading.stream import PROCESSES, THREADS
from lars_train.training.device import Precision, keep_freed_memory
from lars_train.training.device_prefetch import DevicePrefetcher, normalizer

PASSES = 8  # over the images, so that the start of a stream is a small part, as in training
WORKERS = (1, 2)


class ReferenceSet(Dataset[tuple[torch.Tensor, int]]):
    """The images with torchvision's training transforms."""

    def __init__(self, images: Source) -> None:
        self.images, self.transform = images, reference_transform(TRAIN)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(io.BytesIO(read(self.images, index))).convert("RGB")), 0


def reference(images: Source, workers: int, device: torch.device) -> int:
    """Run the reference, and return the number of images."""
    order = [sample for _ in range(PASSES) for sample in random.sample(range(len(images)), len(images))]
    loader = DataLoader(
        ReferenceSet(images), BATCH, sampler=order, num_workers=workers, pin_memory=device.type == "cuda"
    )
    return sum(len(batch.to(device, non_blocking=True)) for batch, _ in loader)


def ours(decoder: str, kind: str, images: Source, workers: int, device: torch.device) -> int:
    """Run lars-train's loader, and return the number of images."""
    batch = min(BATCH, len(images))
    spec = LoaderSpec(
        source=images,
        view=VIEW,
        seed=0,
        batch=batch,
        ghost_batch=batch,
        ghosts_per_micro=1,
        updates_per_epoch=len(images) // batch,
        rank=0,
        world=1,
        workers=workers,
        pin_memory=device.type == "cuda",
        on_error="fail",
        decoder=decoder,
        kind=kind,
    )
    fp32 = Precision("fp32", torch.float32, torch.float32)
    normalize = normalizer(list(NORMALIZE.mean), list(NORMALIZE.std), device, fp32)
    batches = DevicePrefetcher(train_loader(spec, 0, PASSES * len(images) // batch), device)
    count = sum(len(normalize(found.images)) for found in batches)
    batches.close()
    return count


def cpu_seconds() -> float:
    """Return the CPU time of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(images: Source, rounds: int, device: torch.device) -> list[str]:
    """Return a table of images per second of CPU and wall time; a first round does not count."""
    keep_freed_memory()
    streams: dict[str, Callable[[Source, int, torch.device], int]] = {REFERENCE: reference}
    for name, decoder in (("native", NATIVE), ("Pillow", PILLOW)):
        if decoder == PILLOW or native.is_available():
            streams |= {f"ours, {name}, {kind}": partial(ours, decoder, kind) for kind in (THREADS, PROCESSES)}
    found: dict[tuple[int, str], list[tuple[float, float]]] = {(w, name): [] for w in WORKERS for name in streams}
    # Keep the collections before each turn short: they would cost the fastest contender most.
    gc.collect()
    gc.freeze()
    for number in range(-1, rounds):
        for workers, name in random.Random(number).sample(list(found), len(found)):
            gc.collect()
            cpu, wall = cpu_seconds(), time.perf_counter()
            count = streams[name](images, workers, device)
            gc.collect()  # the reference's workers end with its loader
            if number >= 0:
                rates = count / (cpu_seconds() - cpu), count / (time.perf_counter() - wall)
                found[workers, name].append(rates)
    gc.unfreeze()
    lines = [
        f"End to end into a batch on {device.type}, {PASSES} passes over the original images, training; CPU time of "
        "all processes, with their start.",
        "",
    ]
    rows = []
    for (workers, name), both in found.items():
        own, to = np.array(both), np.array(found[workers, REFERENCE])
        (cpu, wall), (cpu_ratio, wall_ratio) = np.median(own, axis=0), np.median(own / to, axis=0)
        rows.append((name, workers, f"{cpu:,.0f}", f"{cpu_ratio:.2f}", f"{wall:,.0f}", f"{wall_ratio:.2f}"))
    heads = ["contender", "workers", "images per CPU-second", "÷ reference", "images per wall second", "÷ reference"]
    return [*lines, *shared.table(heads, rows)]
