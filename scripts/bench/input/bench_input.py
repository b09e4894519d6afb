"""Measure images/s that one CPU core decodes and augments; compare with torchvision, TurboJPEG and DALI.

    python scripts/bench/input/bench_input.py IMAGES [--write docs/benchmarks.md]

IMAGES is a folder with JPEGs at any depth. They are packed into three stores, as by `lars-data pack`: unchanged, and in
two smaller sizes. Each contender reads and decodes every image and makes a 224 x 224 view: for training a random
resized crop with a random flip, for evaluation the center of the image resized to 256. Contenders take turns on one
core, with a quarter of the images per turn; the CPU time of this process counts.

- reference: Pillow and torchvision's v1 transforms, to a normalized float32 tensor
- ours, native and Pillow: lars_train.data.decode.pillow, to uint8 in the buffer of a batch, normalized on the device
- torchvision v2: `decode_image` and the v2 functions on its tensor, to uint8
- TurboJPEG 3 and DALI: decoders of regions on the CPU, if `pip install '.[bench]'` has installed them

Then whole pipelines with workers are measured, up to a batch on the device (end_to_end.py).

Takes about half an hour. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import gc
import random
import shutil
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "bench_input")
    PARSER.add_argument("images", type=Path, metavar="IMAGES", help="a folder with JPEGs")
    PARSER.add_argument(
        "--rounds", type=shared.positive_int, default=9, help="timed rounds, after one warm-up round (9)"
    )
    PARSER.add_argument("--files", type=shared.positive_int, default=200, help="images at most, evenly spread (200)")
    ARGS = PARSER.parse_args()

import end_to_end
import numpy as np
import numpy.typing as npt
import torch
from contenders import PACKAGES, REFERENCE, TASKS, Contender, draws, expected, make_contenders, read
from PIL import Image, features

from lars_train.data.dataset import Source
from lars_train.data.sources.folder import open_tree
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import Request, SourceSubset, pack, silent

PARTS = 4
ORIGINAL = "original"
ENCODINGS = {
    ORIGINAL: Encoding(),
    "packed, longer side at most 500": Encoding(longest=500),
    "packed, shorter side 256": Encoding(short=256),
}
Key = tuple[str, str, str]
"""Contender, task, store."""


def find_images(folder: Path, most: int) -> list[Path]:
    """Return at most `most` of the JPEGs in `folder`, evenly spread: gray or RGB, and decoded by Pillow in full."""

    def is_usable(path: Path) -> bool:
        try:
            with Image.open(path, formats=("JPEG",)) as image:
                image.load()
                return image.mode in ("L", "RGB")
        except Exception:  # anything that Pillow raises
            return False

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    return [path for path in files[:: ceil(len(files) / most) or 1] if is_usable(path)]


def make_stores(files: list[Path], folder: Path) -> dict[str, Source]:
    """Return the images, packed in each of the ENCODINGS into stores in `folder`."""
    for number, path in enumerate(files):
        # A store needs at least two classes.
        place = folder / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{number:06d}.jpg")
    stores: dict[str, Source] = {}
    for name, encoding in ENCODINGS.items():
        store = str(folder / f"store{len(stores)}")
        pack(Request(str(folder / "images"), store, encoding), silent)
        tree = open_tree(store)
        listing = tree.listing(b"train")
        stores[name] = tree.source(b"train", listing.names, listing.labels)
    return stores


def compare(contenders: dict[str, Contender], stores: dict[str, Source]) -> dict[Key, str]:
    """Return the mean and the largest difference of views from torchvision's, in pixel levels (0 to 255)."""
    found = {}
    for store, images in stores.items():
        for task in TASKS:
            views = [np.asarray(expected(data, draw)).astype(int) for data, draw in draws(task, images, 0)]
            for name, contender in contenders.items():
                if name != REFERENCE:
                    pairs = zip(map(as_rows, contender(task, images, 0)), views, strict=True)
                    sizes = [np.abs(one - other) for one, other in pairs]
                    mean, most = np.mean([one.mean() for one in sizes]), max(one.max() for one in sizes)
                    found[name, task, store] = f"{mean:.3f}, {most}"
    return found


def as_rows(view: Any) -> npt.NDArray[np.uint8]:
    """Return a view as rows of RGB pixels."""
    pixels: npt.NDArray[np.uint8] = np.asarray(view)
    return pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels


def measure(
    contenders: dict[str, Contender], stores: dict[str, Source], rounds: int
) -> dict[Key, npt.NDArray[np.float64]]:
    """Return images per second of CPU time in each round; a first round does not count."""
    found: dict[Key, list[float]] = {}
    # Other load slows a machine down for seconds at a time, so contenders take turns after a few images.
    parts = {
        store: [SourceSubset(source, ids) for ids in np.array_split(np.arange(len(source)), min(PARTS, len(source)))]
        for store, source in stores.items()
    }
    groups = [(store, task) for store in stores for task in TASKS]
    names = list(contenders)
    gc.collect()
    gc.freeze()  # keeps the collections before each turn short
    for number in range(-1, rounds):
        shuffle = random.Random(number).shuffle
        shuffle(groups)
        for store, task in groups:
            seconds = dict.fromkeys(names, 0.0)
            for part, images in enumerate(parts[store]):
                shuffle(names)
                for name in names:
                    gc.collect()
                    before = time.process_time()
                    for _ in contenders[name](task, images, PARTS * (number + 1) + part):
                        pass
                    seconds[name] += time.process_time() - before
            if number >= 0:
                for name, own in seconds.items():
                    found.setdefault((name, task, store), []).append(len(stores[store]) / own)
    gc.unfreeze()
    return {key: np.array(values) for key, values in found.items()}


def tables(
    stores: dict[str, Source], names: list[str], rates: dict[Key, npt.NDArray[np.float64]], apart: dict[Key, str]
) -> Iterator[str]:
    """Yield a table for each store."""
    heads = ["contender"]
    for task in TASKS:
        heads += [f"{task}, images/s", f"÷ reference, {ORIGINAL} (10th to 90th percentile)", "pixels apart: mean, most"]
    for store, images in stores.items():
        size = np.mean([len(read(images, sample)) for sample in range(len(images))])
        rows = []
        for name in names:
            cells = [name]
            for task in TASKS:
                own = rates[name, task, store]
                cells += [f"{np.median(own):,.0f}", shared.spread(own / rates[REFERENCE, task, ORIGINAL], ".2f")]
                cells.append(apart.get((name, task, store), "-"))
            rows.append(cells)
        yield from (f"Images, {store}, mean {size / 1e3:.0f} kB:", "", *shared.table(heads, rows), "")


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    files = find_images(args.images, args.files)
    if len(files) < 2:
        parser.error(f"{args.images}: has fewer than two JPEGs that Pillow decodes")
    torch.set_num_threads(1)
    skipped: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        stores = make_stores(files, Path(folder))
        # First, because it forks, and peers start threads.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        whole = end_to_end.measure(stores[ORIGINAL], (args.rounds + 1) // 2, device)
        shared.pin_to_cores(1)
        contenders = make_contenders(stores[ORIGINAL], skipped)
        apart = compare(contenders, stores)
        rates = measure(contenders, stores, args.rounds)
        lines = [
            f"`python scripts/bench/input/bench_input.py IMAGES` on {shared.cpu_name()}, one core; "
            f"{shared.software(*PACKAGES)}, Pillow's libjpeg-turbo {features.version('libjpeg_turbo')}. {len(files)} "
            f"images, {args.rounds} rounds after one that does not count; images per second of CPU time. Ratios are "
            "medians over the rounds. Pixels, from 0 to 255, are compared with Pillow's full decode and torchvision's "
            "v1 transforms. In evaluation, decoders of regions (DALI, TurboJPEG) are off by up to half a pixel.",
            "",
            *tables(stores, list(contenders), rates, apart),
        ]
    lines += [*whole, "", *(f"- skipped: {reason}" for reason in skipped)]
    shared.publish(lines, args.write, "bench_input")


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
