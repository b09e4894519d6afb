"""Fuzz the C decoder with mutated JPEGs, under AddressSanitizer and UndefinedBehaviorSanitizer.

    python scripts/verify/fuzz_jpeg.py --count 1000000

The fuzzer (fuzz_jpeg.c) damages small JPEGs of all kinds at random and decodes random views. It stops at the first
report of a sanitizer, crash, leak, or input that takes a minute, and saves that input.

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
    """Compile the fuzzer into `folder`, and return its path."""
    program, source = folder / "fuzz_jpeg", Path(__file__).with_suffix(".c")
    command = [os.environ.get("CC", "cc"), "-O1", "-g", *flags, str(source), "-ljpeg", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def main(argv: list[str] | None = None) -> int:
    """Build and run the fuzzer; return 1 after a finding, else 0."""
    parser = shared.make_parser(__doc__)
    parser.add_argument("--count", type=shared.positive_int, default=1_000_000, help="mutated inputs (1,000,000)")
    parser.add_argument("--seconds", type=shared.positive_int, default=86_400, help="time limit (86,400)")
    parser.add_argument("--start", type=int, default=0, help="seed of the mutations (0)")
    parser.add_argument("--keep", type=Path, default=Path("finding.jpg"), help="where to save the input of a finding")
    parser.add_argument("--no-vectors", action="store_true", help="fuzz the code for processors without AVX2")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = build(folder, (*SANITIZED, *["-DLARS_PLAIN_C"] * args.no_vectors))
        with (folder / "seeds").open("wb") as file:
            for seed in seeds():
                file.write(struct.pack("<I", len(seed)) + seed)
        finding = folder / "finding.jpg"
        numbers = map(str, (args.count, args.seconds, args.start))
        code = subprocess.run([program, folder / "seeds", *numbers, finding]).returncode
        if code:
            if finding.exists():
                shutil.copy(finding, args.keep)
            print(f"finding (exit code {code}); input: {args.keep if finding.exists() else 'not saved'}")
        return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
