"""Encode an image for a store: its original bytes, or a smaller JPEG."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image

from lars_train.data.decode.pillow import BadImage, whole_image
from lars_train.data.sources.shards import digest


@dataclass(frozen=True)
class Encoding:
    """The encoding of stored images. Without `short` and `longest`, the original bytes are stored.

    `short`, `longest`: upper bounds for the shorter and the longer side, in pixels. `quality`: JPEG quality on
    Pillow's scale.
    """

    short: int | None = None
    longest: int | None = None
    quality: int = 90

    @property
    def reencodes(self) -> bool:
        """Return True if images are re-encoded."""
        return self.short is not None or self.longest is not None

    @property
    def variant(self) -> str:
        """Return the encoding as recorded in the fingerprint and the index; empty for original bytes."""
        if not self.reencodes:
            return ""
        side = f"short={self.short}" if self.short is not None else f"max={self.longest}"
        return f"{side} quality={self.quality}"

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return the stored size of an image: never enlarged, proportions kept, each side at least 1."""
        if self.short is not None:
            limit, side = self.short, min(width, height)
        elif self.longest is not None:
            limit, side = self.longest, max(width, height)
        else:
            return width, height
        if side <= limit:
            return width, height
        return max(1, round(width * limit / side)), max(1, round(height * limit / side))

    def apply(self, data: bytes) -> bytes:
        """Return the bytes to store for the image in `data`. Raises `BadImage` if decoding fails.

        Re-encoded images are 8-bit JPEGs, gray or YCbCr 4:2:0, resized with Pillow's Lanczos filter. They hold the
        pixels that training would decode: CMYK is converted; transparency, EXIF data and color profiles are dropped.
        A gray or RGB JPEG that needs no resizing is stored unchanged if re-encoding would not shrink it.
        """
        if not self.reencodes:
            return data
        decoded = whole_image(data)
        size = self.size(*decoded.size)
        plain = size == decoded.size and _is_plain_jpeg(data)
        if size != decoded.size:
            decoded = decoded.resize(size, Image.Resampling.LANCZOS)
        # Pillow would copy comments and other metadata to the new file.
        decoded.info.clear()
        file = io.BytesIO()
        decoded.save(file, "JPEG", quality=self.quality)
        encoded = file.getvalue()
        return data if plain and len(data) <= len(encoded) else encoded


def check_decodable(data: bytes) -> None:
    """Raise `BadImage` unless the image can be decoded."""
    whole_image(data)


def _is_plain_jpeg(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
            return opened.mode in ("L", "RGB")
    except OSError:
        return False


__all__ = ["BadImage", "Encoding", "check_decodable", "digest"]
