"""Feed mutated JPEGs to the decoder in C, built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python scripts/verify/fuzz_jpeg.py --count 1000000
    python scripts/verify/fuzz_jpeg.py --leak 100000

The first decodes random views of small JPEGs of all kinds after random damage (fuzz_jpeg.c); any finding of
the sanitizers, crash, leak or input that takes a minute ends it with the input saved. The second decodes whole and
damaged ones in this process, by the decoder as it was installed, and ends with status 1 if its memory grew.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# How much the memory may grow after the first tenth of the images: what an allocator may keep, and no leak.
GROWTH_MB = 4.0


def seeds() -> list[bytes]:
    """Small JPEGs of every kind that is decoded, and of some that are refused: CMYK, for one."""
    rng = np.random.default_rng(0)
    found = []
    for (width, height), subsampling, progressive in itertools.product(
        [(1, 1), (7, 5), (16, 16), (33, 17), (40, 64), (97, 70), (500, 20), (20, 400)],
        ["4:4:4", "4:2:2", "4:2:0", "4:4:0"],
        [False, True],
    ):
        coarse = rng.integers(0, 256, (3 + height // 8, 3 + width // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        kind = {"subsampling": subsampling if subsampling != "4:4:0" else "4:2:2", "progressive": progressive}
        restart = {"restart_marker_blocks": 2} if (width + height) % 2 else {}
        data = encode(picture, quality=70, **kind, **restart)
        found.append(as_440(data) if subsampling == "4:4:0" else data)
        if subsampling == "4:4:4":
            found.append(encode(picture.convert("L"), quality=70, progressive=progressive, **restart))
            found.append(encode(picture, quality=90, keep_rgb=True, progressive=progressive))
            found.append(encode(picture.convert("CMYK"), quality=70))
    found.append(encode(picture, exif=bytes(200), icc_profile=bytes(300), comment=b"text"))
    return found


def as_440(data: bytes) -> bytes:
    """A 4:2:2 JPEG made 4:4:0, which Pillow does not write: sides and sampling factors exchanged, as many blocks."""
    at = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
    height, width = data[at + 5 : at + 7], data[at + 7 : at + 9]
    return data[: at + 5] + width + height + data[at + 9 : at + 11] + b"\x12" + data[at + 12 :]


def encode(picture: Image.Image, **options: object) -> bytes:
    """A JPEG by Pillow."""
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def build(folder: Path, flags: tuple[str, ...]) -> Path:
    """The fuzzer, compiled into `folder`. Raises CalledProcessError, or FileNotFoundError without a compiler."""
    program = folder / "fuzz_jpeg"
    compiler = os.environ.get("CC", "cc")
    source = HERE / "fuzz_jpeg.c"
    subprocess.run([compiler, "-O1", "-g", *flags, str(source), "-ljpeg", "-o", str(program)], check=True)
    return program


def fuzz(count: int, seconds: int, start: int, flags: tuple[str, ...], keep: Path) -> int:
    """Run the fuzzer; 0 without a finding."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build(folder, flags)
        with (folder / "seeds").open("wb") as file:
            for seed in seeds():
                file.write(struct.pack("<I", len(seed)) + seed)
        finding = folder / "finding.jpg"
        arguments = [str(folder / "seeds"), str(count), str(seconds), str(start), str(finding)]
        done = subprocess.run([str(program), *arguments])
        if done.returncode:
            if finding.exists():
                shutil.copy(finding, keep)
            print(f"a finding (status {done.returncode}); the input: {keep if finding.exists() else 'not saved'}")
        return 1 if done.returncode else 0


def leak(count: int) -> int:
    """Decode `count` JPEGs, a third of them damaged; 0 if the resident memory stays as it is after the first tenth."""
    from lars_train.data.decode import native
    from lars_train.data.transforms import Geometry

    if not native.is_available():
        print(f"the decoder in C is not there. {native.REMEDY}")
        return 1
    rng = np.random.default_rng(0)
    pictures = []
    for data in seeds():
        size = native.size_of(data)
        if size is not None:
            pictures += [(data, size), (data, size), (data[: int(len(data) * rng.uniform(0.7, 1))], size)]
    out = np.empty((32, 32, 3), np.uint8)
    before, decoded = 0.0, 0
    for i in range(count):
        data, (width, height) = pictures[i % len(pictures)]
        box = (i % width, i % height, width, height)
        decoded += native.decode_jpeg(data, (width, height), Geometry(box, (32, 32), 0, (0, 0), i % 2 == 1), out)
        if i == count // 10:
            before = resident_mb()
    grown = resident_mb() - before
    print(f"{count} images, {decoded} decoded: {grown:+.2f} MB after the first tenth, at most {GROWTH_MB:g} allowed")
    return 1 if grown > GROWTH_MB else 0


def resident_mb() -> float:
    """The resident set of this process in MB, from Linux's /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="mutated inputs (default 1,000,000)")
    parser.add_argument("--seconds", type=int, default=86_400, help="end after so many, whatever the count")
    parser.add_argument("--start", type=int, default=0, help="another number, other inputs")
    parser.add_argument("--keep", type=Path, default=Path("finding.jpg"), help="where a finding's input is put")
    parser.add_argument("--plain", action="store_true", help="without sanitizers, for valgrind or speed")
    parser.add_argument("--no-vectors", action="store_true", help="the code of processors without AVX2")
    parser.add_argument("--leak", type=int, metavar="COUNT", help="decode COUNT images in this process instead")
    args = parser.parse_args(argv)
    if args.leak is not None:
        return leak(args.leak)
    flags: tuple[str, ...] = () if args.plain else SANITIZED
    if args.no_vectors:
        flags += ("-DLARS_PLAIN_C",)
    return fuzz(args.count, args.seconds, args.start, flags, args.keep)


if __name__ == "__main__":
    sys.exit(main())
