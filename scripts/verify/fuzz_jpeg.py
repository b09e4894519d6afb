"""Fuzz the C decoder with mutated JPEGs, under AddressSanitizer and UndefinedBehaviorSanitizer.

    python scripts/verify/fuzz_jpeg.py --count 1000000
    python scripts/verify/fuzz_jpeg.py --leak 100000

The first command damages small JPEGs of all kinds at random and decodes random views (fuzz_jpeg.c). It stops at the
first finding of a sanitizer, crash, leak, or input that takes a minute, and saves the input. The second command decodes
whole and damaged JPEGs in this process with the installed decoder; the exit code is 1 if its memory grows.

Takes about ten minutes for a million inputs. Figures: docs/input.md.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import shared
from PIL import Image

SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# Permitted growth of memory after the first tenth of the images; without a leak an allocator may keep this much.
GROWTH_MB = 4.0


def seeds() -> list[bytes]:
    """Return small JPEGs of all supported kinds, and of some unsupported ones, such as CMYK."""
    rng = np.random.default_rng(0)
    found = []
    for (width, height), subsampling, progressive in itertools.product(
        [(1, 1), (7, 5), (16, 16), (33, 17), (40, 64), (97, 70), (500, 20), (20, 400)],
        ["4:4:4", "4:2:2", "4:2:0", "4:4:0"],
        [False, True],
    ):
        coarse = rng.integers(0, 256, (3 + height // 8, 3 + width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        kind = {"subsampling": subsampling if subsampling != "4:4:0" else "4:2:2", "progressive": progressive}
        restart = {"restart_marker_blocks": 2} if (width + height) % 2 else {}
        data = encode(image, quality=70, **kind, **restart)
        found.append(as_440(data) if subsampling == "4:4:0" else data)
        if subsampling == "4:4:4":
            found.append(encode(image.convert("L"), quality=70, progressive=progressive, **restart))
            found.append(encode(image, quality=90, keep_rgb=True, progressive=progressive))
            found.append(encode(image.convert("CMYK"), quality=70))
    found.append(encode(image, exif=bytes(200), icc_profile=bytes(300), comment=b"text"))
    return found


def as_440(data: bytes) -> bytes:
    """Turn a 4:2:2 JPEG into 4:4:0, which Pillow cannot write: swap sides and sampling factors, keep the blocks."""
    at = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
    height, width = data[at + 5 : at + 7], data[at + 7 : at + 9]
    return data[: at + 5] + width + height + data[at + 9 : at + 11] + b"\x12" + data[at + 12 :]


def encode(image: Image.Image, **options: object) -> bytes:
    """Return a JPEG encoded by Pillow."""
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def build(folder: Path, flags: tuple[str, ...]) -> Path:
    """Compile the fuzzer into `folder`.

    Raises:
        CalledProcessError: the compiler failed.
        FileNotFoundError: there is no compiler.
    """
    program = folder / "fuzz_jpeg"
    compiler = os.environ.get("CC", "cc")
    source = Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-O1", "-g", *flags, str(source), "-ljpeg", "-o", str(program)], check=True)
    return program


def fuzz(count: int, seconds: int, start: int, flags: tuple[str, ...], keep: Path) -> int:
    """Build and run the fuzzer; return 1 after a finding, else 0."""
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
            print(f"finding (exit code {done.returncode}); input: {keep if finding.exists() else 'not saved'}")
        return 1 if done.returncode else 0


def leak(count: int) -> int:
    """Decode `count` JPEGs, a third of them damaged; return 1 if memory grows after the first tenth, else 0."""
    from lars_train.data.decode import native
    from lars_train.data.transforms import Geometry

    if not native.is_available():
        print(f"the decoder in C is not installed. {native.REMEDY}")
        return 1
    rng = np.random.default_rng(0)
    images = []
    for data in seeds():
        size = native.size_of(data)
        if size is not None:
            images += [(data, size), (data, size), (data[: int(len(data) * rng.uniform(0.7, 1))], size)]
    out = np.empty((32, 32, 3), np.uint8)
    before, decoded = 0.0, 0
    for i in range(count):
        data, (width, height) = images[i % len(images)]
        box = (i % width, i % height, width, height)
        decoded += native.decode_jpeg(data, (width, height), Geometry(box, (32, 32), 0, (0, 0), i % 2 == 1), out)
        if i == count // 10:
            before = resident_mb()
    grown = resident_mb() - before
    print(f"{count} images, {decoded} decoded: {grown:+.2f} MB after the first tenth, at most {GROWTH_MB:g} allowed")
    return 1 if grown > GROWTH_MB else 0


def resident_mb() -> float:
    """Return the resident set of this process in MB, from Linux's /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(argv: list[str] | None = None) -> int:
    """Fuzz, or look for a leak; return the exit code."""
    parser = shared.make_parser(__doc__)
    parser.add_argument("--count", type=shared.positive_int, default=1_000_000, help="mutated inputs (1,000,000)")
    parser.add_argument("--seconds", type=shared.positive_int, default=86_400, help="time limit (86,400)")
    parser.add_argument("--start", type=int, default=0, help="seed of the mutations (0)")
    parser.add_argument("--keep", type=Path, default=Path("finding.jpg"), help="where to save the input of a finding")
    parser.add_argument("--no-vectors", action="store_true", help="fuzz the code for processors without AVX2")
    parser.add_argument(
        "--leak", type=shared.positive_int, metavar="COUNT", help="instead, decode COUNT images in this process"
    )
    args = parser.parse_args(argv)
    if args.leak:
        return leak(args.leak)
    return fuzz(args.count, args.seconds, args.start, (*SANITIZED, *["-DLARS_PLAIN_C"] * args.no_vectors), args.keep)


if __name__ == "__main__":
    sys.exit(main())
