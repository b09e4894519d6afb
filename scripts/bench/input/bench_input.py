"""How many images a second of one CPU core decodes and augments, beside torchvision's reference and libjpeg's floor.

    python scripts/bench/input/bench_input.py PICTURES [--peers] [--write docs/input.md --plot docs/results/input]

PICTURES is a folder with JPEGs, at any depth; or what a training reads as `data.root`: a store of `lars-data pack`, tar
shards, or a zip. Each contender reads every picture, decodes it, and makes a 224 x 224 view: for training a random
resized crop, flipped half of the time, for evaluation the centre of the picture resized to 256. Contenders take turns,
a quarter of the pictures each time, on one core; what counts is this process's CPU time. So it is done with the
pictures as they are, and with two stores of smaller copies, made in a temporary folder as `lars-data pack` makes them.

- reference: Pillow and torchvision's v1 transforms, to a normalised float32 tensor (which ours leaves to the device)
- ours, native and Pillow: lars_train.data.decode.pillow to uint8 in a batch's buffer, with its own draws of the crops
- floor: libjpeg-turbo decoding the rows and columns of the crop and nothing else (a C function compiled here)
- with --peers: those of other libraries that are installed, see bench_input_peers.py

Then the pictures as they are end to end, with workers, into a batch on the device: bench_end_to_end.py says how.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bench_end_to_end
import bench_input_plot
import numpy as np
import numpy.typing as npt
import torch
from bench_input_contenders import FLOOR, OURS, REFERENCE, TASKS, Contender, full_decode, line_up
from bench_input_pictures import Pictures, mean_size, open_pictures, packed
from bench_input_results import LONGEST, RAW, SHORTEST, Apart, Key, Results, compared, comparisons, tables
from child import end_on_signals
from page import between_markers, cpu_name, writable_page
from PIL import features

from lars_train.data.dataset import Source
from lars_train.errors import ConfigError
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import SourceSubset

PARTS = 4
COMPARED = 200  # pictures at most whose pixels are compared


def stores_of(pictures: Pictures, copies: bool, folder: Path) -> dict[str, Source]:
    """By what the tables call them. Copies are made of pictures as they were alone."""
    if pictures.variant:
        return {f"{RAW} ({pictures.variant})": pictures.source}
    found = {RAW: pictures.source}
    if copies:
        found[LONGEST] = packed(pictures.source, folder / "longest", Encoding(longest=500))
        found[SHORTEST] = packed(pictures.source, folder / "shortest", Encoding(short=256))
    return found


def compare(contenders: list[Contender], stores: dict[str, Source], skipped: list[str]) -> dict[Key, Apart]:
    """How far views are from Pillow's full decode. Peers that fail at a picture are taken out of the list."""
    apart: dict[Key, Apart] = {}
    for store, source in stores.items():
        pictures = SourceSubset(source, np.arange(min(len(source), COMPARED)))
        for task in TASKS:
            wanted = list(full_decode(task, pictures, 0))
            for contender in [one for one in contenders if task in one.tasks]:
                try:
                    if contender.views is None:
                        contender.run(task, pictures, 0)
                        continue
                    views = (rows(view) for view in contender.views(task, pictures, 0))
                    pairs = zip(views, wanted, strict=True)
                    apart[contender.name, task, store] = compared(contender.name, pairs)
                except Exception as error:  # whatever a stranger's library raises
                    if contender.name in (REFERENCE, *OURS, FLOOR):
                        raise
                    skipped.append(f"{contender.name}: {task}, {store}: {type(error).__name__}: {error}")
                    contenders.remove(contender)
    return apart


def rows(view: Any) -> npt.NDArray[np.uint8]:
    """As rows of RGB pixels."""
    pixels: npt.NDArray[np.uint8] = np.asarray(view)
    return pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels


def pieces(count: int) -> list[npt.NDArray[np.int64]]:
    """The numbers below `count` in PARTS parts, fewer if there are not as many."""
    return np.array_split(np.arange(count, dtype=np.int64), min(PARTS, count))


def measure(contenders: list[Contender], stores: dict[str, Source], rounds: int) -> dict[Key, npt.NDArray[np.float64]]:
    """Images per second of CPU time, of each contender, task and store, in each round; a first round does not count."""
    found: dict[Key, list[float]] = {}
    # What other machines' work takes from this one changes within seconds: who is compared goes through a few pictures
    # in turn, and so on.
    parts = {store: [SourceSubset(source, ids) for ids in pieces(len(source))] for store, source in stores.items()}
    groups = [(store, task) for store in stores for task in TASKS]
    # What the libraries hold is not gone through again before each turn.
    gc.collect()
    gc.freeze()
    for number in range(-1, rounds):
        draw = random.Random(number)
        draw.shuffle(groups)
        for store, task in groups:
            takers = [one for one in contenders if task in one.tasks]
            taken = dict.fromkeys((one.name for one in takers), 0.0)
            for part, pictures in enumerate(parts[store]):
                # Neighbours are another time others.
                draw.shuffle(takers)
                for contender in takers:
                    gc.collect()
                    before = time.process_time()
                    contender.run(task, pictures, PARTS * (number + 1) + part)
                    taken[contender.name] += time.process_time() - before
            if number >= 0:
                for name, seconds in taken.items():
                    found.setdefault((name, task, store), []).append(len(stores[store]) / seconds)
    gc.unfreeze()
    return {key: np.array(values) for key, values in found.items()}


def conditions(args: argparse.Namespace, pictures: Pictures, contenders: list[Contender]) -> list[str]:
    """What was measured where."""
    packages = [f"{name} {version(name)}" for name in ("torch", "torchvision", "pillow", "numpy")]
    peers = [one.versions for one in contenders if one.versions]
    packages += [one for one in dict.fromkeys(peers) if one not in packages]
    options = " --peers" if args.peers else ""
    return [
        f"`python scripts/bench/input/bench_input.py PICTURES{options}` on {cpu_name()}, one core; Python "
        f"{platform.python_version()}, {', '.join(packages)}, Pillow's libjpeg-turbo "
        f"{features.version('libjpeg_turbo')}. {len(pictures.source)} pictures, {pictures.kind}, {args.rounds} rounds "
        "after one that does not count; images per second of CPU time. Ratios are medians over the rounds. Pixels are "
        "compared with Pillow's full decode by torchvision's v1 transforms, in levels of 255; those who decode regions "
        "alone (DALI, nvImageCodec, tf.data, TurboJPEG) show in evaluation what lies up to half a pixel beside.",
        "",
    ]


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process to one core, where the system lets it."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    yield
    if cores:
        os.sched_setaffinity(0, cores)


def end_to_end(pictures: Pictures, rounds: int) -> list[str]:
    """Return what bench_end_to_end.py finds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = bench_end_to_end.measure(pictures.source, rounds, device)
    said = (
        f"End to end into a batch on {device.type}, {bench_end_to_end.PASSES} passes over the pictures as they are, "
        "training; CPU time of all processes, with their start."
    )
    return ["", said, "", *bench_end_to_end.table(rates)]


def shown(plot: Path, page: Path | None) -> list[str]:
    """The plot, in a page that it lies below."""
    folder = page.resolve().parent if page is not None else Path.cwd()
    if not plot.resolve().is_relative_to(folder):
        return []
    return [f"![Images per CPU-second, by contender]({plot.resolve().relative_to(folder).as_posix()})", ""]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, metavar="PICTURES", help="a folder with JPEGs, a store or a zip")
    parser.add_argument("--rounds", type=int, default=9, help="that count (default 9)")
    parser.add_argument("--files", type=int, default=200, help="at most so many pictures, evenly spread (default 200)")
    parser.add_argument("--no-copies", action="store_true", help="the pictures as they are, and no smaller copies")
    parser.add_argument("--peers", action="store_true", help="other libraries too (pip install 'lars-train[bench]')")
    parser.add_argument("--pillow-simd", type=Path, metavar="DIR", help="where pip install --target DIR has put it")
    parser.add_argument(
        "--write",
        type=writable_page("bench_input"),
        metavar="PAGE",
        help="put what is found between this page's markers",
    )
    parser.add_argument("--plot", type=Path, metavar="STEM", help="draw what is found, as STEM.png and STEM.svg")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.files < 1:
        parser.error("--rounds and --files are at least 1")
    if args.pillow_simd is not None and not args.peers:
        parser.error("--pillow-simd is one of --peers")
    try:
        args.found = open_pictures(args.pictures, args.files)
    except ConfigError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(1)
    skipped: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stores = stores_of(args.found, not args.no_copies, folder)
        # First, for it forks: peers have threads.
        whole = end_to_end(args.found, (args.rounds + 1) // 2)
        with one_core():
            contenders = line_up(folder, skipped)
            if args.peers:
                import bench_input_peers

                contenders += bench_input_peers.line_up(folder, args.found.source, args.pillow_simd, skipped)
            apart = compare(contenders, stores, skipped)
            rates = measure(contenders, stores, args.rounds)
        sizes = {store: mean_size(source) for store, source in stores.items()}
    results = Results(sizes, [one.name for one in contenders], rates, apart)
    lines = conditions(args, args.found, contenders)
    if args.plot is not None:
        lines += shown(bench_input_plot.draw(results, args.plot)[1], args.write)
    lines += [*tables(results), *comparisons(results), *whole, "", *(f"- skipped: {reason}" for reason in skipped)]
    print("\n".join(lines))
    if args.write is not None:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(between_markers(page, "bench_input", lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
