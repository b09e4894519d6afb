"""Make the embedded data set: 10,000 training and 2,000 test images of Fashion-MNIST in one zip.

    python scripts/dev/make_mini.py     # writes lars_train/data/embedded/fashion_mnist_mini.zip

The source is a directory with the four IDX files, plain or gzipped, from the Debian package `dataset-fashion-mnist`
(/usr/share/datasets/fashion-mnist) or from `torchvision.datasets.FashionMNIST(DIR, download=True)` with `--source DIR`.
Images are drawn with a fixed key, equally many per class, and named by their index in the IDX file. The same source and
the same Pillow give the same bytes. The script downloads nothing; the package contains its result.

Takes half a minute. Figures: none; docs/getting_started.md uses the data set.
"""

from __future__ import annotations

import gzip
import io
import struct
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import shared
from PIL import Image, features

TARGET = shared.ROOT / "lars_train/data/embedded/fashion_mnist_mini.zip"
LAYOUTS = (".", "raw", "FashionMNIST/raw")
# By label of Fashion-MNIST.
CLASSES = "t-shirt-top trouser pullover dress coat sandal shirt sneaker bag ankle-boot".split()
# Split in the zip: prefix of the IDX files, images per class, Philox key.
SPLITS = {"train": ("train", 1000, 1), "val": ("t10k", 200, 2)}


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array in an IDX file, gzipped or not (format: http://yann.lecun.com/exdb/mnist/)."""
    raw = path.read_bytes()
    data = gzip.decompress(raw) if path.suffix == ".gz" else raw
    zeros, kind, ndim = struct.unpack(">HBB", data[:4])
    if zeros != 0 or kind != 8:
        raise SystemExit(f"{path}: not an IDX file of unsigned bytes")
    shape = struct.unpack(f">{ndim}I", data[4 : 4 + 4 * ndim])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def find_idx(source: Path, stem: str) -> Path:
    """Return the IDX file `stem` in one of the known layouts below `source`."""
    for layout in LAYOUTS:
        for name in (f"{stem}.gz", stem):
            if (path := source / layout / name).is_file():
                return path
    raise SystemExit(f"{source}: no {stem}[.gz]; install dataset-fashion-mnist, or give --source DIR")


def choose(labels: np.ndarray, per_class: int, key: int) -> np.ndarray:
    """Return the first `per_class` indices of each class in a keyed permutation of all images."""
    order = np.argsort(np.random.Philox(key=key).random_raw(len(labels)), kind="stable")
    return np.concatenate([order[labels[order] == k][:per_class] for k in range(len(CLASSES))])


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 (H, W) as a grayscale PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return out.getvalue()


def build(source: Path) -> bytes:
    """Return the bytes of the zip."""
    entries: dict[str, bytes] = {}
    for split, (prefix, per_class, key) in SPLITS.items():
        images = read_idx(find_idx(source, f"{prefix}-images-idx3-ubyte"))
        labels = read_idx(find_idx(source, f"{prefix}-labels-idx1-ubyte"))
        for index in choose(labels, per_class, key):
            entries[f"{split}/{CLASSES[labels[index]]}/{index:05d}.png"] = encode_png(images[index])
    out = io.BytesIO()
    # The versions that determine the bytes of the PNGs.
    zlib = f"zlib-ng {ng}" if (ng := features.version("zlib_ng")) else f"zlib {features.version('zlib')}"
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = f"Pillow {features.version('pil')}, {zlib}".encode()
        for name in sorted(entries):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            archive.writestr(info, entries[name])
    return out.getvalue()


def main() -> None:
    """Write the file."""
    parser = shared.make_parser(__doc__)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    TARGET.write_bytes(build(parser.parse_args().source))
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
