"""Write one shard from its plan, and a record of its content that is kept until the store is complete."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lars_train.data.dataset import Source
from lars_train.data.sources.shards import PACKING
from lars_train.data.sources.tars import END, entry
from lars_train.errors import DataError
from lars_train.fsutil import sync_folder, write_atomic
from lars_train.messages import printable
from lars_train.pack.encode import BadImage, Encoding, digest
from lars_train.pack.layout import ShardPlan, label_name
from lars_train.pack.processes import Tick


@dataclass(frozen=True)
class ShardRecord:
    """The content of a shard of `size` bytes.

    `rows`: (sample, offset, bytes, digest) of each image. `skipped`: (sample, reason) of each image left out.
    """

    size: int
    rows: list[tuple[int, int, int, int]]
    skipped: list[tuple[int, str]]


@dataclass(frozen=True)
class ShardWriter:
    """Write shards of a store. Can be pickled.

    `sources`, `members`: the original images and the names of their tar members, by split. `skip`: leave out broken
    images.
    """

    store: Path
    sources: dict[str, Source]
    members: dict[str, list[bytes]]
    encoding: Encoding
    skip: bool

    def __call__(self, plan: ShardPlan, tick: Tick) -> None:
        """Write one shard. It gets its final name once it and its record are on disk. Raises `DataError`."""
        rows, skipped = [], []
        temporary = self.store / PACKING / f"{plan.name}.{os.getpid()}.tmp"
        at = 0
        try:
            with temporary.open("wb") as file:
                for sample in plan.samples.tolist():
                    try:
                        data = self._encoded(plan.split, sample)
                    except BadImage as error:
                        if not self.skip:
                            where = self.sources[plan.split].location(sample)
                            remedy = "Fix it, or leave such images out with --on-error skip."
                            raise DataError(f"{where}: {error}. {remedy}") from None
                        skipped.append((sample, str(error)))
                        tick()
                        continue
                    name = self.members[plan.split][sample]
                    label = str(int(self.sources[plan.split].labels[sample])).encode()
                    before, after = entry(name, data)
                    rows.append((sample, at + len(before), len(data), digest(data)))
                    for piece in (before, data, after, *_member(label_name(name), label)):
                        at += file.write(piece)
                    tick()
                at += file.write(END)
                file.flush()
                os.fsync(file.fileno())
            text = json.dumps({"size": at, "rows": rows, "skipped": skipped}).encode()
            write_atomic(record_path(self.store, plan), [text])
            temporary.replace(shard_path(self.store, plan))
            sync_folder(shard_path(self.store, plan).parent)
        except OSError as error:
            raise DataError(
                f"{shard_path(self.store, plan)}: cannot be written ({error.strerror or error}); the same command "
                "resumes from the complete shards."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _encoded(self, split: str, sample: int) -> bytes:
        source = self.sources[split]
        try:
            data = source.read(sample)
            assert isinstance(data, bytes)
            return self.encoding.apply(data)
        except BadImage as error:
            reason = str(error)
        except OSError as error:
            reason = error.strerror or str(error)
        raise BadImage(printable(reason).rstrip("."))


def _member(name: bytes, content: bytes) -> tuple[bytes, bytes, bytes]:
    before, after = entry(name, content)
    return before, content, after


def shard_path(store: Path, plan: ShardPlan) -> Path:
    """Return the path of a shard."""
    return store / plan.split / plan.name


def record_path(store: Path, plan: ShardPlan) -> Path:
    """Return the path of a shard's record."""
    return store / PACKING / f"{plan.name}.json"


def read_record(store: Path, plan: ShardPlan) -> ShardRecord | None:
    """Return the record of a complete shard; None if the shard must be written (again)."""
    try:
        content = json.loads(record_path(store, plan).read_bytes())
        rows = [(int(sample), int(offset), int(size), int(sums)) for sample, offset, size, sums in content["rows"]]
        record = ShardRecord(
            int(content["size"]), rows, [(int(sample), str(why)) for sample, why in content["skipped"]]
        )
        complete = shard_path(store, plan).stat().st_size == record.size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    present = [row[0] for row in record.rows] + [sample for sample, _ in record.skipped]
    return record if complete and np.array_equal(np.sort(present), np.sort(plan.samples)) else None
