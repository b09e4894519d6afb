"""Check the content of a store against its index and, byte for byte, against the original. Modifies nothing."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lars_train.data.dataset import Source
from lars_train.data.sources.shards import Packed, ShardTree
from lars_train.data.sources.tars import BadTar, members
from lars_train.pack.encode import BadImage, check_decodable, digest
from lars_train.pack.layout import image_path, label_name
from lars_train.pack.processes import Tick

# Maximum number of problems to report per shard.
_MAX_PROBLEMS = 100
_DIFFERS = "its content differs from the index"


@dataclass(frozen=True)
class ShardProblem:
    """A problem with a shard, or with one image in it (`sample`)."""

    split: str
    shard: int
    sample: int | None
    reason: str


@dataclass(frozen=True)
class ShardChecker:
    """Check shards of a store against its index and, where given, the original's `sources`, by split."""

    splits: dict[str, Packed]
    sources: dict[str, Source]
    decode: bool

    def __call__(self, task: tuple[str, int], tick: Tick) -> list[ShardProblem]:
        """Check the names, labels and places of a shard's members, then every image. Return at most 100 problems."""
        split, shard = task
        packed = self.splits[split]
        samples = np.flatnonzero(packed.places.shard == shard)
        samples = samples[np.argsort(packed.places.offset[samples])]
        try:
            handle = os.open(packed.shards[shard].path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            return [ShardProblem(split, shard, None, f"cannot be read ({error.strerror})")]
        try:
            found = self._check_layout(handle, split, samples.tolist())
            problems = [ShardProblem(split, shard, None, found)] if found else []
            for sample in samples.tolist():
                reason = self._check_image(handle, split, sample)
                if reason and len(problems) < _MAX_PROBLEMS:
                    problems.append(ShardProblem(split, shard, sample, reason))
                tick()
        finally:
            os.close(handle)
        return problems

    def _check_layout(self, handle: int, split: str, samples: list[int]) -> str:
        packed = self.splits[split]
        expected = iter(samples)
        try:
            listed = list(members(handle))
            for image, label in zip(listed[::2], listed[1::2], strict=True):
                sample = next(expected, None)
                if sample is None:
                    return "it holds more samples than the index says"
                place = (int(packed.places.offset[sample]), int(packed.places.size[sample]))
                own = packed.listing.names[sample]
                named = image_path(image.name) == own and label.name == label_name(image.name)
                if not named or image[1:] != place:
                    return _DIFFERS
                if os.pread(handle, min(label.size, 20), label.offset) != b"%d" % packed.listing.labels[sample]:
                    return "a label differs from the index"
        except BadTar as error:
            return str(error)
        except (OSError, ValueError):
            return _DIFFERS
        return "" if next(expected, None) is None else "it holds fewer samples than the index says"

    def _check_image(self, handle: int, split: str, sample: int) -> str:
        packed = self.splits[split]
        try:
            data = os.pread(handle, int(packed.places.size[sample]), int(packed.places.offset[sample]))
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if digest(data) != int(packed.sums[sample]):
            return "damaged: the checksum is wrong"
        if self.decode:
            try:
                check_decodable(data)
            except BadImage as error:
                return f"cannot be decoded: {error}"
        if split in self.sources:
            try:
                if self.sources[split].read(sample) != data:
                    return "differs from the original"
            except OSError as error:
                return f"the original cannot be read ({error.strerror or error})"
        return ""


def tasks_of(tree: ShardTree) -> list[tuple[str, int]]:
    """Return the split and number of every shard of a store: the tasks of a `ShardChecker`."""
    return [(split, shard) for split, packed in tree.splits.items() for shard in range(len(packed.shards))]


def checker(tree: ShardTree, sources: dict[str, Source]) -> ShardChecker:
    """Return the checker of a whole store. `sources`: by split, the original of each sample."""
    return ShardChecker(tree.splits, sources, bool(tree.variant))


def class_checksums(packed: Packed) -> list[str]:
    """Return 16 hex digits of SHA-256 per class, over path, NUL and digest (8 bytes, little-endian) of each image."""
    digests = [hashlib.sha256() for _ in packed.listing.classes]
    sums = packed.sums.astype("<u8")
    for sample, label in enumerate(packed.listing.labels.tolist()):
        digests[label].update(packed.listing.names[sample] + b"\0" + sums[sample].tobytes())
    return [found.hexdigest()[:16] for found in digests]


def shard_of(problem: ShardProblem, tree: ShardTree) -> Path:
    """Return the path of the shard that has a problem."""
    return tree.splits[problem.split].shards[problem.shard].path
