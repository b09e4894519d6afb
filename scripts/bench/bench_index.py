"""Measure the time to open ImageNet's index, and the memory that it takes in all processes of a node.

    python scripts/bench/bench_index.py [--images 1281167] [--processes 8]

The class folders are real and empty; their index is synthetic, with names and labels like ImageNet's. Each process
opens the data set as a rank does. The memory is the growth of all processes together after reading every name and
label, as proportional set size: a page that k processes share counts 1/k in each.

Takes about a minute. Figures: docs/prepare_data.md.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

CLASSES = [b"n%08d" % (1440764 + 1000 * label) for label in range(1000)]
LONG_AGO = 1_000_000_000


def make_index(root: Path, images: int) -> None:
    """Create empty class folders below `root`, and an index that lists images in them."""
    from lars_train.data.sources import directory

    directory.MIN_INDEXED = 0
    for split, count in (("train", images), ("val", 50_000)):
        for name in CLASSES:
            folder = root / split / os.fsdecode(name)
            folder.mkdir(parents=True)
            os.utime(folder, (LONG_AGO, LONG_AGO))
        os.utime(root / split, (LONG_AGO, LONG_AGO))

        def read(name: bytes, place: Path = root / split, count: int = count) -> directory.FolderContent:
            label = CLASSES.index(name)
            numbers = range(count * label // len(CLASSES), count * (label + 1) // len(CLASSES))
            files = [(b"%s_%08d.JPEG" % (name, number), 110_000) for number in numbers]
            return directory.FolderContent(files, [directory.FolderState.at(place / os.fsdecode(name), b"")])

        directory.indexed_listing(root / split, CLASSES, read)


def proportional_memory() -> int:
    """Return this process's proportional set size in bytes."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1]) * 1024


def hold(root: Path, pipe: Connection) -> None:
    """Open the data set at the first message and send its size and times; at the second, send the memory."""
    from lars_train.data.sources.imagenet import open_imagenet

    pipe.recv()
    before, began, cpu = proportional_memory(), time.perf_counter(), time.process_time()
    data = open_imagenet(str(root), None, None)
    pipe.send((len(data.train), time.perf_counter() - began, time.process_time() - cpu))
    pipe.recv()
    pipe.send(proportional_memory() - before)
    pipe.recv()


def main() -> None:
    """Measure and print."""
    parser = shared.make_parser(__doc__)
    parser.add_argument("--images", type=shared.positive_int, default=1_281_167, help="training images (1281167)")
    parser.add_argument("--processes", type=shared.positive_int, default=8, help="(8)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        make_index(Path(folder) / "imagenet", args.images)
        size = sum(path.stat().st_size for path in Path(folder, "cache").rglob("*.index"))
        context = multiprocessing.get_context("spawn")
        pipes, processes = [], []
        for _ in range(args.processes):
            mine, theirs = context.Pipe()
            pipes.append(mine)
            processes.append(context.Process(target=hold, args=(Path(folder) / "imagenet", theirs)))
            processes[-1].start()
        opened = []
        for pipe in pipes:  # one after another
            pipe.send(None)
            opened.append(pipe.recv())
        for pipe in pipes:  # all processes have opened it by now
            pipe.send(None)
        memory = sum(pipe.recv() for pipe in pipes)
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(None)
            process.join()
    counts, walls, seconds = zip(*opened, strict=True)
    print(f"{counts[0]:,} training images and 50,000 for validation; index files of {size / 1e6:.0f} MB")
    print(f"to open: {statistics.median(walls):.3f} s, {statistics.median(seconds):.3f} s of CPU (medians)")
    print(f"{args.processes} processes hold {memory / 1e6:.0f} MB more than before opening it")


if __name__ == "__main__":
    main()
