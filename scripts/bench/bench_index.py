"""What ImageNet's index costs: seconds to open, and memory of the processes of a node that hold it.

python scripts/bench/bench_index.py [--images 1281167] [--processes 8]

The folders are real and empty, the index of them is made up: names and labels as ImageNet has them. Each process opens
the data set as a rank does. The figure of memory is what all of them together hold more than before (proportional set
size: a page that k processes share counts 1/k in each), after every name and label was read.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from lars_train.data.sources import directory
from lars_train.data.sources.directory import FolderContent, FolderState, indexed_listing
from lars_train.data.sources.imagenet import open_imagenet
from lars_train.data.sources.index_files import cache_directory

CLASSES = [b"n%08d" % (1440764 + 1000 * label) for label in range(1000)]
LONG_AGO = 1_000_000_000


def make(root: Path, images: int) -> None:
    """Empty class folders below `root`, and an index that says what is in them."""
    for split, count in (("train", images), ("val", 50_000)):
        for name in CLASSES:
            folder = root / split / os.fsdecode(name)
            folder.mkdir(parents=True)
            os.utime(folder, (LONG_AGO, LONG_AGO))
        os.utime(root / split, (LONG_AGO, LONG_AGO))
        bounds = np.linspace(0, count, len(CLASSES) + 1).astype(int).tolist()
        share = {name: bounds[label : label + 2] for label, name in enumerate(CLASSES)}

        def read(name: bytes, split: Path = root / split, share: dict[bytes, list[int]] = share) -> FolderContent:
            images = [(b"%s_%08d.JPEG" % (name, number), 110_000) for number in range(*share[name])]
            return FolderContent(images, [FolderState.at(split / os.fsdecode(name), b"")])

        indexed_listing(root / split, CLASSES, read)


def proportional() -> int:
    """Bytes of this process, shared pages in proportion."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1]) * 1024


def hold(root: Path, pipe: Connection) -> None:
    pipe.recv()
    before, began, cpu = proportional(), time.perf_counter(), time.process_time()
    data = open_imagenet(str(root), None, None)
    took = time.perf_counter() - began, time.process_time() - cpu
    pipe.send((len(data.train), *took))
    pipe.recv()
    pipe.send(proportional() - before)
    pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--processes", type=int, default=8)
    args = parser.parse_args()
    directory.MIN_INDEXED = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        make(Path(folder) / "imagenet", args.images)
        size = sum(path.stat().st_size for path in cache_directory().glob("*.index"))
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(args.processes)]
        held = [context.Process(target=hold, args=(Path(folder) / "imagenet", theirs)) for _, theirs in pairs]
        for process in held:
            process.start()
        opened = []
        for mine, _ in pairs:
            mine.send(None)
            opened.append(mine.recv())
        for mine, _ in pairs:
            mine.send(None)
        memory = sum(mine.recv() for mine, _ in pairs)
        for (mine, _), process in zip(pairs, held, strict=True):
            mine.send(None)
            process.join()
    count, walls, seconds = opened[0][0], sorted(o[1] for o in opened), sorted(o[2] for o in opened)
    print(f"{count:,} training images and 50,000 for validation; index files of {size / 1e6:.0f} MB")
    print(
        f"to open: {walls[len(walls) // 2]:.3f} s (median of {len(walls)}), {seconds[len(seconds) // 2]:.3f} s of CPU"
    )
    print(f"{args.processes} processes hold {memory / 1e6:.0f} MB more than before they opened it")


if __name__ == "__main__":
    main()
