"""How many images a second of one CPU core decodes and augments, beside torchvision's reference and libjpeg's floor.

    python scripts/bench_input.py DIR

DIR holds JPEGs, at any depth. Each contender reads every file, decodes it, and makes a 224 x 224 view: for training a
random resized crop, flipped half of the time, for evaluation the centre of the picture resized to 256. Contenders take
turns, a whole pass over the files each, on one core; what counts is this process's CPU time. So it is done with the
files as they are, and with two kinds of smaller copies, which are made in a temporary folder.

- reference: Pillow and torchvision's v1 transforms, to a normalised float32 tensor (which ours leaves to the device)
- ours, native, library, Pillow: lars_train.data.decode to uint8 in a batch's buffer, with its own drawing of the crops
- floor: libjpeg-turbo decoding the rows and columns of the crop and nothing else (a C function compiled here)

Then the files as they are end to end, with workers, into a batch on the device: bench_end_to_end.py says how.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from math import ceil, floor
from pathlib import Path

import bench_end_to_end
import numpy as np
import numpy.typing as npt
import torch
from page import between_markers, cpu_name
from PIL import Image, features
from torchvision import transforms

from lars_train.data import decode as decoders
from lars_train.data import library, native
from lars_train.data.augment import UNIFORMS, Geometry, View
from lars_train.data.decode import decode
from lars_train.data.order import batch_uniforms

SIZE = 224
VIEW = View("inception", SIZE, True, 0, 0.875)
BATCH = 64
REFERENCE, NATIVE, PILLOW, FLOOR = "reference", "ours, native", "ours, Pillow", "floor"
LIBRARY = "ours, library"
RAW = "as they are"
# Times the reference on the files as they are.
TARGETS = {RAW: 2.6, "longer side at most 500, quality 90": 4.5, "shorter side 256, quality 90": 6.5}
OF_LIBRARY = {RAW: 1.9, "longer side at most 500, quality 90": 3.0, "shorter side 256, quality 90": 4.5}
NEAR_FLOOR = 0.8
NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

FLOOR_C = """
#include <stdio.h>
#include <stdlib.h>
#include <jpeglib.h>

/* The rows from top to bottom and the columns from left to right, into a buffer of a few rows; the rows read. */
int region(const unsigned char *data, unsigned long length, int left, int top, int right, int bottom) {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jpeg.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, data, length);
    jpeg_read_header(&jpeg, TRUE);
    jpeg.out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(&jpeg);
    JDIMENSION first = left, width = right - left;
    if (first || width < jpeg.output_width) jpeg_crop_scanline(&jpeg, &first, &width);
    if (top > 1) jpeg_skip_scanlines(&jpeg, top / 2 * 2);
    const size_t stride = (4 * (size_t)width + 63) / 64 * 64;
    unsigned char *rows = malloc(2 * stride + 128), *at = rows + 16 + (64 - (size_t)rows % 64);
    JSAMPROW lines[2] = {at, at + stride};
    int read = 0;
    while ((int)jpeg.output_scanline < bottom) read += jpeg_read_scanlines(&jpeg, lines, 2);
    free(rows);
    jpeg_destroy_decompress(&jpeg);
    return read;
}
"""

Files = list[Path]
Pass = Callable[[Files, int], None]


@dataclass
class Contender:
    """`run` makes one pass over files, for training or evaluation, in a numbered round."""

    name: str
    run: dict[str, Pass]


def reference(task: str, files: Files, number: int) -> None:
    """As torchvision's and PyTorch's own training scripts do it."""
    torch.manual_seed(number)
    first = (
        [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
        if task == "train"
        else [transforms.Resize(256), transforms.CenterCrop(SIZE)]
    )
    transform = transforms.Compose([*first, transforms.ToTensor(), NORMALIZE])
    for file in files:
        with file.open("rb") as content:
            transform(Image.open(content).convert("RGB"))


def geometries(task: str, files: Files, number: int) -> Iterator[Callable[[int, int], Geometry]]:
    """The function from a picture's size to its view, for each file."""
    for start in range(0, len(files), BATCH):
        samples = range(start, min(start + BATCH, len(files)))
        for uniforms in batch_uniforms(0, number, list(samples), UNIFORMS).tolist():
            yield partial(VIEW.train, uniforms=uniforms) if task == "train" else VIEW.evaluate


def ours(decoder: str, task: str, files: Files, number: int) -> None:
    """As the loader does it."""
    batch = np.zeros((BATCH, SIZE, SIZE, 3), np.uint8)
    for i, (file, geometry) in enumerate(zip(files, geometries(task, files, number), strict=True)):
        decode(file.read_bytes(), geometry, SIZE, decoder=decoder, out=batch[i % BATCH])


def only_regions(region: Callable[..., int], task: str, files: Files, number: int) -> None:
    """libjpeg-turbo on the same crops; files that are not its own are read and left."""
    for file, geometry in zip(files, geometries(task, files, number), strict=True):
        data = file.read_bytes()
        size = native.size_of(data)
        if size is not None:
            region(data, len(data), *needed(geometry(*size)))


def needed(view: Geometry) -> tuple[int, int, int, int]:
    """The box of source pixels that have a share in the window of a view: its own, and the filter's reach beside it."""
    bounds = []
    for axis in (0, 1):
        low, high = view.box[axis], view.box[axis + 2]
        scale = (high - low) / view.size[axis]
        reach = max(scale, 1.0)
        begin, end = (view.crop[axis] + 0.5) * scale - reach, (view.crop[axis] + SIZE - 0.5) * scale + reach
        bounds.append((low + max(0, floor(begin + 0.5)), min(high, low + floor(end + 0.5))))
    (left, right), (top, bottom) = bounds
    return left, top, right, bottom


def compiled_floor(folder: Path) -> Callable[..., int]:
    """The C function `region`. Raises OSError or CalledProcessError where it cannot be compiled."""
    source, library = folder / "floor.c", folder / "floor.so"
    source.write_text(FLOOR_C)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(source), "-ljpeg", "-o", str(library)], check=True)
    region = ctypes.CDLL(str(library)).region
    region.argtypes = [ctypes.c_char_p, ctypes.c_ulong, *[ctypes.c_int] * 4]
    return region


def line_up(folder: Path, skipped: list[str]) -> list[Contender]:
    """All that can run here; the others go to `skipped`."""

    def both(run: Callable[[str, Files, int], None]) -> dict[str, Pass]:
        return {task: partial(run, task) for task in ("train", "eval")}

    found = [Contender(REFERENCE, both(reference)), Contender(PILLOW, both(partial(ours, decoders.PILLOW)))]
    if native.is_there():
        found.append(Contender(NATIVE, both(partial(ours, decoders.NATIVE))))
    else:
        skipped.append(f"{NATIVE}: {native.REMEDY}")
    if library.is_there():
        found.append(Contender(LIBRARY, both(partial(ours, decoders.LIBRARY))))
    else:
        skipped.append(f"{LIBRARY}: {library.REMEDY}")
    try:
        found.append(Contender(FLOOR, both(partial(only_regions, compiled_floor(folder)))))
    except (OSError, subprocess.CalledProcessError) as error:
        skipped.append(f"{FLOOR}: {error}")
    return found


def shrunk(files: Files, folder: Path, longest: int | None, shortest: int | None) -> Files:
    """Copies as JPEGs of quality 90, made smaller where they are larger than that."""
    copies = []
    folder.mkdir()
    for number, file in enumerate(files):
        picture = Image.open(file).convert("RGB")
        side = max(picture.size) if longest else min(picture.size)
        scale = min(1.0, (longest or shortest or side) / side)
        if scale < 1:
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        copies.append(folder / f"{number:06d}.jpg")
        picture.save(copies[-1], quality=90)
    return copies


Rates = dict[tuple[str, str, str], npt.NDArray[np.float64]]


def measure(contenders: list[Contender], stores: dict[str, Files], rounds: int) -> Rates:
    """Images per second of CPU time, of each contender, task and store, in each round; a first round does not count."""
    found: dict[tuple[str, str, str], list[float]] = {}
    turns = [(c, task, store) for store in stores for task in ("train", "eval") for c in contenders]
    for number in range(-1, rounds):
        # Neighbours are another time others.
        random.Random(number).shuffle(turns)
        for contender, task, store in turns:
            gc.collect()
            before = time.process_time()
            contender.run[task](stores[store], number + 1)
            taken = time.process_time() - before
            if number >= 0:
                found.setdefault((contender.name, task, store), []).append(len(stores[store]) / taken)
    return {key: np.array(values) for key, values in found.items()}


def table(rates: Rates, stores: dict[str, Files], contenders: list[Contender]) -> list[str]:
    """A Markdown table, a row for each store and contender; ratios are medians over the rounds."""
    lines = [
        "| files | contender | train, images/s | ÷ reference on files as they are | ÷ floor "
        "| eval, images/s | ÷ reference on files as they are | ÷ floor |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for store, files in stores.items():
        size = np.mean([file.stat().st_size for file in files]) / 1e3
        for contender in contenders:
            cells = [f"{store} (mean {size:.0f} kB)", contender.name]
            for task in ("train", "eval"):
                own = rates[contender.name, task, store]
                cells.append(f"{np.median(own):,.0f}")
                cells.append(shown(ratio(rates, contender.name, REFERENCE, task, store, RAW)))
                cells.append(shown(ratio(rates, contender.name, FLOOR, task, store, store)))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def ratio(rates: Rates, name: str, to: str, task: str, store: str, to_store: str) -> float | None:
    """The median over the rounds of one rate by another's; None where one was not measured."""
    one, other = rates.get((name, task, store)), rates.get((to, task, to_store))
    return None if one is None or other is None else float(np.median(one / other))


def shown(value: float | None) -> str:
    """A ratio as the table has it."""
    return "-" if value is None else f"{value:.2f}"


def targets(rates: Rates) -> list[str]:
    """Which of the targets are met; a ratio is judged as it is printed."""
    lines = []
    for task in ("train", "eval"):
        for name, all_wanted in ((NATIVE, TARGETS), (LIBRARY, OF_LIBRARY)):
            for store, wanted in all_wanted.items():
                value = ratio(rates, name, REFERENCE, task, store, RAW)
                if value is not None:
                    met = "met" if round(value, 2) >= wanted else "**not met**"
                    lines.append(f"- {name}, {task}, {store}: {value:.2f} times the reference; {wanted} wanted: {met}")
        near = ratio(rates, NATIVE, FLOOR, task, RAW, RAW)
        if near is not None:
            met = "met" if round(near, 2) >= NEAR_FLOOR else "**not met**"
            lines.append(f"- {task}, {RAW}: {near:.2f} of the floor; {NEAR_FLOOR} wanted: {met}")
    return lines


def differences(files: Files, decoder: str) -> str:
    """How far a decoder's pixels are from Pillow's full decode, crop and resize."""
    mean: list[float] = []
    most = others = 0
    for task in ("train", "eval"):
        for file, geometry in zip(files, geometries(task, files, 0), strict=True):
            data = file.read_bytes()
            one, other = (
                decode(data, geometry, SIZE, decoder=choice).astype(int) for choice in (decoder, decoders.PILLOW)
            )
            apart = np.abs(one - other)
            mean.append(float(apart.mean()))
            most, others = max(most, int(apart.max())), others + bool(apart.any())
    return f"{others} of {len(mean)} views differ, by at most {most} level(s); mean difference {np.mean(mean):.4f}"


def conditions(args: argparse.Namespace, files: Files) -> str:
    """A line that says what was measured where."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "pillow", "numpy"))
    return (
        f"`python scripts/bench_input.py DIR` on {cpu_name()}, one core; Python {platform.python_version()}, "
        f"{packages}, Pillow's libjpeg-turbo {features.version('libjpeg_turbo')}. {len(files)} files, "
        f"{args.rounds} rounds after one that does not count; images per second of CPU time."
    )


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process to one core, where the system lets it."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    yield
    if cores:
        os.sched_setaffinity(0, cores)


def end_to_end(files: Files, rounds: int) -> list[str]:
    """What bench_end_to_end.py finds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = bench_end_to_end.measure(files, rounds, device)
    said = (
        f"End to end into a batch on {device.type}, {bench_end_to_end.PASSES} passes over the files as they are, "
        "training; CPU time of all processes, with their start."
    )
    return ["", said, "", *bench_end_to_end.table(rates), "", *bench_end_to_end.target(rates)]


def is_whole(file: Path) -> bool:
    """Whether Pillow decodes it; what it does not is left out for everyone."""
    try:
        Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
    except Exception:  # whatever its plugins raise
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, metavar="DIR", help="a folder with JPEGs, at any depth")
    parser.add_argument("--rounds", type=int, default=7, help="that count (default 7)")
    parser.add_argument("--files", type=int, default=200, help="at most so many of them, evenly spread (default 200)")
    parser.add_argument("--no-copies", action="store_true", help="the files as they are, and no smaller copies")
    parser.add_argument("--write", type=Path, metavar="PATH", help="put what is found between this page's markers")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.files < 1:
        parser.error("--rounds and --files are at least 1")
    found = sorted(p for p in args.dir.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg") and p.is_file())
    files = [file for file in found[:: ceil(len(found) / args.files) or 1] if is_whole(file)]
    if not files:
        parser.error(f"{args.dir}: there is no JPEG")
    torch.set_num_threads(1)
    skipped: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stores = {RAW: files}
        if not args.no_copies:
            _, longest, shortest = TARGETS
            stores[longest] = shrunk(files, folder / "longest", 500, None)
            stores[shortest] = shrunk(files, folder / "shortest", None, 256)
        contenders = line_up(folder, skipped)
        with one_core():
            rates = measure(contenders, stores, args.rounds)
        lines = [conditions(args, files), "", *table(rates, stores, contenders), "", *targets(rates), ""]
        for name, module in ((decoders.NATIVE, native), (decoders.LIBRARY, library)):
            if module.is_there():
                lines += [f"Pixels, {name} beside Pillow, {s}: {differences(stores[s], name)}." for s in stores]
    lines += end_to_end(files, args.rounds)
    lines += [f"Skipped: {reason}" for reason in skipped]
    print("\n".join(lines))
    if args.write is not None:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(between_markers(page, "bench_input", lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
