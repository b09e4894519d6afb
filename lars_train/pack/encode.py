"""One picture on its way into a store: as it is, or smaller and encoded anew. No files."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from lars_train.data.decode.pillow import BadImage, whole_image
from lars_train.data.sources.shards import digest


@dataclass(frozen=True)
class Encoding:
    """How pictures are stored. Sides in pixels; without `short` and `longest` they are stored byte for byte.

    `short`: the shorter side is at most that; `longest`: the longer one is. `quality`: of the JPEGs, Pillow's scale.
    """

    short: int | None = None
    longest: int | None = None
    quality: int = 90

    @property
    def anew(self) -> bool:
        """Whether pictures are encoded anew."""
        return self.short is not None or self.longest is not None

    @property
    def variant(self) -> str:
        """What the fingerprint says of it; empty where the bytes are as they were."""
        if not self.anew:
            return ""
        side = f"short={self.short}" if self.short is not None else f"max={self.longest}"
        return f"{side} quality={self.quality}"

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The size that a picture of this one gets: never larger, the proportions kept, no side below 1."""
        if self.short is not None:
            wanted, side = self.short, min(width, height)
        elif self.longest is not None:
            wanted, side = self.longest, max(width, height)
        else:
            return width, height
        if side <= wanted:
            return width, height
        return max(1, round(width * wanted / side)), max(1, round(height * wanted / side))

    def apply(self, data: bytes) -> bytes:
        """The bytes to store for a picture of these. Raises `BadImage` where they have to be decoded and cannot be.

        All become JPEGs of 8 bits, grey or YCbCr 4:2:0, resized by Pillow's Lanczos filter, from the pixels that
        training would see: CMYK is converted, transparency, EXIF data and colour profiles are dropped. A grey or RGB
        JPEG of that size already stays as it is where it would not become shorter.
        """
        if not self.anew:
            return data
        decoded = whole_image(data)
        size = self.size(*decoded.size)
        plain = size == decoded.size and _is_plain_jpeg(data)
        if size != decoded.size:
            decoded = decoded.resize(size, Image.Resampling.LANCZOS)
        # Comments and the like would be written again.
        decoded.info.clear()
        file = io.BytesIO()
        decoded.save(file, "JPEG", quality=self.quality)
        anew = file.getvalue()
        return data if plain and len(data) <= len(anew) else anew


def check_decodable(data: bytes) -> None:
    """Raise `BadImage` unless the picture can be decoded."""
    whole_image(data)


def _is_plain_jpeg(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
            return opened.mode in ("L", "RGB")
    except OSError:
        return False


__all__ = ["BadImage", "Encoding", "check_decodable", "digest"]
