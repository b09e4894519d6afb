"""Measure images/s that one CPU core decodes and augments; compare with torchvision and a lower bound by libjpeg.

    python scripts/bench/input/bench_input.py IMAGES [--peers] [--write docs/benchmarks.md --plot docs/results/input]

IMAGES is a folder with JPEGs at any depth, or a `data.root` for training: a store of `lars-data pack`, tar shards, or a
zip. Each contender reads and decodes every image and makes a 224 x 224 view: for training a random resized crop with a
random flip, for evaluation the center of the image resized to 256. Contenders take turns on one core, with a quarter of
the images per turn; the CPU time of this process counts. Two stores of smaller copies, made as by `lars-data pack`, are
measured in the same way.

- reference: Pillow and torchvision's v1 transforms, to a normalized float32 tensor
- ours, native and Pillow: lars_train.data.decode.pillow, to uint8 in the buffer of a batch, normalized on the device
- floor: libjpeg-turbo decoding the rows and columns of the crop and nothing else (C code in contenders.py)
- with --peers: other installed libraries (peers.py)

Then whole pipelines with workers are measured, up to a batch on the device (end_to_end.py).

Takes about an hour with --peers, a few minutes without. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import shared

if __name__ == "__main__":  # parsed before torch is imported, so that --help answers at once
    PARSER = shared.make_parser(__doc__, "bench_input")
    PARSER.add_argument("images", type=Path, metavar="IMAGES", help="a folder with JPEGs, a store or a zip")
    PARSER.add_argument("--rounds", type=shared.positive_int, default=9, help="counted rounds, after one other (9)")
    PARSER.add_argument("--files", type=shared.positive_int, default=200, help="images at most, evenly spread (200)")
    PARSER.add_argument("--peers", action="store_true", help="other libraries too (pip install 'lars-train[bench]')")
    PARSER.add_argument("--pillow-simd", type=Path, metavar="DIR", help="folder of pillow-simd")
    PARSER.add_argument("--plot", type=Path, metavar="STEM", help="draw the results as STEM.png and STEM.svg")
    ARGS = PARSER.parse_args()

import end_to_end
import numpy as np
import numpy.typing as npt
import torch
from contenders import FLOOR, OURS, REFERENCE, TASKS, Contender, full_decode, own_contenders
from images import Images, open_images, pack_copies
from peers import PACKAGES, peer_contenders
from PIL import features
from results import Distance, Key, Results, comparisons, draw, tables

from lars_train.data.dataset import Source
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import SourceSubset

PARTS = 4
COMPARED = 200  # images at most whose pixels are compared
RAW = "original"


def make_stores(images: Images, folder: Path) -> dict[str, Source]:
    """Return the stores by name. Images that are re-encoded already get no smaller copies."""
    if images.variant:
        return {f"{RAW} ({images.variant})": images.source}
    return {
        RAW: images.source,
        "packed, longer side at most 500": pack_copies(images.source, folder / "longest", Encoding(longest=500)),
        "packed, shorter side 256": pack_copies(images.source, folder / "shortest", Encoding(short=256)),
    }


def compare(contenders: list[Contender], stores: dict[str, Source], skipped: list[str]) -> dict[Key, Distance]:
    """Compare the views with Pillow's full decode; remove peers that fail from `contenders`."""
    found: dict[Key, Distance] = {}
    for store, source in stores.items():
        images = SourceSubset(source, np.arange(min(len(source), COMPARED)))
        for task in TASKS:
            expected = list(full_decode(task, images, 0))
            for contender in [one for one in contenders if task in one.tasks]:
                try:
                    if contender.compared is None:
                        contender.run(task, images, 0)
                    else:
                        views = contender.compared(task, images, 0)
                        pairs = zip(map(as_rows, views), expected, strict=True)
                        found[contender.name, task, store] = distance([one.astype(int) - other for one, other in pairs])
                except Exception as error:  # anything that another library raises
                    if contender.name in (REFERENCE, *OURS, FLOOR):
                        raise
                    skipped.append(f"{contender.name}: {task}, {store}: {type(error).__name__}: {error}")
                    contenders.remove(contender)
    return found


def as_rows(view: Any) -> npt.NDArray[np.uint8]:
    """Return a view as rows of RGB pixels."""
    pixels: npt.NDArray[np.uint8] = np.asarray(view)
    return pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels


def distance(differences: list[npt.NDArray[Any]]) -> Distance:
    """Summarize the differences between views."""
    sizes = [np.abs(one) for one in differences]
    mean, most = float(np.mean([one.mean() for one in sizes])), max(int(one.max()) for one in sizes)
    return Distance(mean, most, sum(bool(one.any()) for one in sizes), len(sizes))


def measure(contenders: list[Contender], stores: dict[str, Source], rounds: int) -> dict[Key, npt.NDArray[np.float64]]:
    """Return images per second of CPU time in each round; a first round does not count."""
    found: dict[Key, list[float]] = {}
    # Other load slows a machine down for seconds at a time, so contenders take turns after a few images.
    parts = {
        store: [SourceSubset(source, ids) for ids in np.array_split(np.arange(len(source)), min(PARTS, len(source)))]
        for store, source in stores.items()
    }
    groups = [(store, task) for store in stores for task in TASKS]
    gc.collect()
    gc.freeze()  # keeps the collections before each turn short
    for number in range(-1, rounds):
        shuffle = random.Random(number).shuffle
        shuffle(groups)
        for store, task in groups:
            able = [one for one in contenders if task in one.tasks]
            seconds = dict.fromkeys((one.name for one in able), 0.0)
            for part, images in enumerate(parts[store]):
                shuffle(able)
                for contender in able:
                    gc.collect()
                    before = time.process_time()
                    contender.run(task, images, PARTS * (number + 1) + part)
                    seconds[contender.name] += time.process_time() - before
            if number >= 0:
                for name, own in seconds.items():
                    found.setdefault((name, task, store), []).append(len(stores[store]) / own)
    gc.unfreeze()
    return {key: np.array(values) for key, values in found.items()}


def conditions(args: Namespace, images: Images) -> list[str]:
    """Return a paragraph about the command, the machine and the method."""
    command = f"python scripts/bench/input/bench_input.py IMAGES{' --peers' if args.peers else ''}"
    packages = PACKAGES if args.peers else PACKAGES[:3]
    return [
        f"`{command}` on {shared.cpu_name()}, one core; {shared.software(*packages)}, Pillow's libjpeg-turbo "
        f"{features.version('libjpeg_turbo')}. {len(images.source)} images, {images.kind}, {args.rounds} rounds "
        "after one that does not count; images per second of CPU time. Ratios are medians over the rounds. Pixels are "
        "compared with Pillow's full decode by torchvision's v1 transforms, in levels of 255. In evaluation, decoders "
        "of regions (DALI, nvImageCodec, tf.data, TurboJPEG) are up to half a pixel off.",
        "",
    ]


def main(parser: ArgumentParser, args: Namespace) -> None:
    """Measure, print, write."""
    with shared.config_errors(parser):
        images = open_images(args.images, args.files)
    torch.set_num_threads(1)
    skipped: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stores = make_stores(images, folder)
        # First, because it forks, and peers start threads.
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        whole = end_to_end.measure(images.source, (args.rounds + 1) // 2, device)
        shared.pin_to_one_core()
        contenders = own_contenders(folder, skipped)
        if args.peers:
            contenders += peer_contenders(folder, images.source, args.pillow_simd, skipped)
        distances = compare(contenders, stores, skipped)
        rates = measure(contenders, stores, args.rounds)
        sizes = {
            store: float(np.mean([len(source.read(i)) for i in range(len(source))])) for store, source in stores.items()
        }
    results = Results(sizes, [one.name for one in contenders], rates, distances)
    lines = conditions(args, images)
    if args.plot:
        draw(results, args.plot)
        below = os.path.relpath(args.plot, args.write.parent if args.write else ".")
        lines += [f"![Images per CPU-second, by contender]({below}.svg)", ""]
    lines += [*tables(results), *comparisons(results), "", *whole, "", *(f"- skipped: {reason}" for reason in skipped)]
    shared.publish(lines, args.write, "bench_input")


if __name__ == "__main__":
    shared.exit_on_signals()
    main(PARSER, ARGS)
