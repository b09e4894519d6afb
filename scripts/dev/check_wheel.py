"""Check a wheel for a release: it is complete, brings libjpeg-turbo, decodes and trains.

    python scripts/dev/check_wheel.py WHEEL     # a built wheel, before auditwheel
    python scripts/dev/check_wheel.py           # the wheel that this Python has installed

Both extensions are optional: without a compiler or the headers of libjpeg, setuptools builds a wheel that lacks them.
The first form rejects such a wheel. The second form also requires libjpeg-turbo in lars_train.libs, decodes JPEGs with
the native decoder, compares the pixels with Pillow's bit for bit, and trains for two updates on a folder of JPEGs. Both
report the first failure and exit with 1.

Takes half a minute. Figures: none; docs/releasing.md says where it runs.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

BUILT = {
    r"lars_train/optim/kernels\.abi3\.so": "LARS's C kernels. The build found no C compiler: see its log",
    r"lars_train/data/decode/jpeg.abi3\.so": (
        "the native JPEG decoder. The build found no C compiler or no libjpeg-turbo 2.1 or newer: see its log"
    ),
    r"[^/]*\.dist-info/licenses/LICENSES/libjpeg-turbo\.txt": "libjpeg-turbo's license. See license-files",
}
"""Required files: patterns of paths, each with the missing part to report."""

REPAIRED = {r"lars_train\.libs/libjpeg[^/]*": "libjpeg-turbo. Run auditwheel repair"}
"""Further files required after ``auditwheel repair``."""

TRAINING = (
    "data=folder data.root=. data.decoder=native data.image_size=32 model=tiny batch.size=8 optimizer=lars "
    "optimizer.lr=1 schedule.warmup_epochs=0 epochs=1 max_updates=2 device=cpu launch.nproc=1 run.dir=run"
).split()


def problems(files: Iterable[str], metadata: str, repaired: bool) -> list[str]:
    """Return the faults of a wheel with these `files` and this content of its file WHEEL."""
    names = list(files)
    parts, platform = ({**BUILT, **REPAIRED}, "manylinux") if repaired else (BUILT, "linux")
    found = [
        f"the wheel lacks {what}."
        for pattern, what in parts.items()
        if not any(re.fullmatch(pattern, n) for n in names)
    ]
    tags = re.findall(r"^Tag: (.+)$", metadata, re.MULTILINE)
    if not tags or not all(re.fullmatch(rf"cp310-abi3-{platform}_?\w+", tag) for tag in tags):
        found.append(f"the tag is {', '.join(tags) or 'missing'}, not cp310-abi3-{platform}. See docs/releasing.md.")
    return found


def check_built(path: Path) -> None:
    """Check the contents of a built wheel; raises SystemExit."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        metadata = next(wheel.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
    if wrong := problems(names, metadata, repaired=False):
        sys.exit(f"{path} is not fit for a release:\n- " + "\n- ".join(wrong))


def loaded_libjpegs() -> list[str]:
    """Import the decoder; return the paths of the libjpegs that this process has loaded."""
    importlib.import_module("lars_train.data.decode.jpeg")
    paths = (line.split(maxsplit=5)[5:] for line in Path("/proc/self/maps").read_text().splitlines())
    return sorted({path[0] for path in paths if path and Path(path[0]).name.startswith("libjpeg")})


def images() -> Iterator[tuple[str, bytes]]:
    """Yield synthetic JPEGs, each with a name for its kind."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind, progressive, (width, height) in itertools.product(
        ("4:4:4", "4:2:2", "4:2:0", "gray"), (False, True), ((64, 48), (301, 203))
    ):
        coarse = rng.integers(0, 256, (2 + height // 4, 2 + width // 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        options: dict[str, Any] = {"progressive": progressive}
        if kind == "gray":
            image = image.convert("L")
        else:
            options["subsampling"] = kind
        file = io.BytesIO()
        image.save(file, "JPEG", **options)
        yield f"{kind}{' progressive' if progressive else ''} {width}x{height}", file.getvalue()


def check_pixels() -> int:
    """Compare the native decoder with Pillow, pixel by pixel; return the number of views. Raises SystemExit."""
    import numpy as np
    from PIL import Image

    from lars_train.data.decode import native
    from lars_train.data.transforms import Geometry

    views = 0
    for name, data in images():
        whole = Image.open(io.BytesIO(data)).convert("RGB")
        width, height = whole.size
        for box, side in itertools.product(((0, 0, width, height), (7, 5, width - 9, height - 3)), (32, 224)):
            out = np.zeros((side, side, 3), np.uint8)
            if not native.decode_jpeg(data, (width, height), Geometry(box, (side, side), 0, (0, 0), False), out):
                sys.exit(f"the native decoder refuses a valid JPEG ({name})")
            # Columns first, as the native decoder resizes; Pillow picks the order by the shape.
            part = whole.crop(box)
            columns = part.resize((side, part.height), Image.Resampling.BILINEAR)
            if not np.array_equal(out, np.asarray(columns.resize((side, side), Image.Resampling.BILINEAR))):
                sys.exit(f"the native decoder's pixels differ from Pillow's ({name}, box {box}, {side} pixels)")
            views += 1
    return views


def check_training(folder: Path) -> None:
    """Train for two updates on JPEGs in `folder` with the installed `lars-train`; raises SystemExit."""
    for split, label in itertools.product(("train", "val"), "ab"):
        (folder / split / label).mkdir(parents=True)
        for number, (_, data) in enumerate(images()):
            (folder / split / label / f"{number}.jpg").write_bytes(data)
    program = Path(sysconfig.get_path("scripts")) / "lars-train"
    done = subprocess.run([program, *TRAINING], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"lars-train failed with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    decoder = json.loads((folder / "run" / "run.json").read_text())["started"][-1]["resolved"]["decoder"]
    if decoder != "native":
        sys.exit(f"lars-train decoded with {decoder}, not with the native decoder")


def check_installed() -> None:
    """Check the files and the behavior of the installed wheel; raises SystemExit."""
    try:
        installed = distribution("lars-train")
    except PackageNotFoundError:
        sys.exit(f"lars-train is not installed for {sys.executable}. Install the wheel first.")
    place = Path(str(installed.locate_file("")))
    if wrong := problems(map(str, installed.files or ()), installed.read_text("WHEEL") or "", repaired=True):
        sys.exit(f"lars-train {installed.version} in {place} is not fit for a release:\n- " + "\n- ".join(wrong))
    libraries = loaded_libjpegs()
    if [Path(library).parent for library in libraries] != [place / "lars_train.libs"]:
        sys.exit(f"the native decoder loads {', '.join(libraries)}, not libjpeg-turbo from {place / 'lars_train.libs'}")
    print(f"lars-train {installed.version} in {place}; its decoder loads {libraries[0]}")
    print(f"{check_pixels()} views decoded, equal to Pillow's")
    with tempfile.TemporaryDirectory() as folder:
        check_training(Path(folder))
    print("lars-train data.decoder=native: two updates trained")


if __name__ == "__main__":
    parser = shared.make_parser(__doc__)
    parser.add_argument("wheel", nargs="?", type=Path, metavar="WHEEL", help="built wheel (default: the installed one)")
    given = parser.parse_args().wheel
    check_installed() if given is None else check_built(given)
