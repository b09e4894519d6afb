"""Pack a data set into a store: plan, shards, verification, index. Interrupted packing resumes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from lars_train.data.dataset import Labels, NamesBuilder, Source, check_classes, fingerprint
from lars_train.data.inventory import merge_counts
from lars_train.data.sources.index_files import write_mapped
from lars_train.data.sources.shards import INDEX, PACKING, VERSION, Packed, Places, Shard, ShardTree, make_index
from lars_train.data.sources.tree import Listing
from lars_train.data.splits import SPLITS, TRAIN
from lars_train.errors import ConfigError, DataError
from lars_train.fsutil import user_path, write_atomic
from lars_train.messages import counted, printable
from lars_train.pack.encode import Encoding
from lars_train.pack.layout import Original, ShardPlan, member_names, open_original, shard_plans
from lars_train.pack.processes import run_tasks
from lars_train.pack.verify import ShardProblem, checker, class_checksums, shard_of, tasks_of
from lars_train.pack.writer import ShardRecord, ShardWriter, read_record, record_path, shard_path

SUMMARY = "store.json"
"""The file that describes a store to people. Opening the store does not read it."""
LEFT_OUT = "images left out by lars-data pack"
_SHOWN = 5

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]
"""A function that takes the name of an activity and the number of its images, and returns a context manager.

The context manager yields a function to call with the number of images finished since its last call.
"""


class SourceSubset:
    """The samples `ids` of a source, numbered from 0."""

    def __init__(self, source: Source, ids: npt.NDArray[np.int64]) -> None:
        self.labels: Labels = source.labels[ids]
        self._source = source
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def name(self, sample: int) -> str:
        """Return the sample's path within the split."""
        return self._source.name(int(self._ids[sample]))

    def location(self, sample: int) -> str:
        """Return the sample's location, for a message."""
        return self._source.location(int(self._ids[sample]))

    def read(self, sample: int) -> bytes | npt.NDArray[np.uint8]:
        """Return the sample's image, as `Source.read`."""
        return self._source.read(int(self._ids[sample]))


@dataclass(frozen=True)
class Request:
    """The settings of ``lars-data pack``.

    `shards`: number of shards of the first split. `skip`: leave out broken images. `jobs`: number of processes.
    """

    source: str
    store: str
    encoding: Encoding
    shards: int | None = None
    skip: bool = False
    val_labels: str | None = None
    image_key: str | None = None
    jobs: int = 1


def pack(request: Request, progress: Progress) -> dict[str, Any]:
    """Pack the images and return the store's summary, with the key ``already`` if the store existed.

    The original is not modified. Raises `ConfigError` if the original cannot be packed or the store cannot be created.
    Raises `DataError` for a broken image (unless `skip`), a store that differs from the original, and file system
    errors. After a `DataError`, the same request resumes from the complete shards.
    """
    store = user_path(request.store)
    _check_separate(user_path(request.source), store)
    original = open_original(request.source, request.val_labels, request.image_key)
    check_classes(request.source, original.classes)
    plans = shard_plans(original, request.shards)
    plan = {
        "fingerprint": original.fingerprint,
        "encoding": asdict(request.encoding),
        "shards": [(plan.split, plan.name, len(plan.samples)) for plan in plans],
    }
    plan = json.loads(json.dumps(plan))
    if (store / INDEX).exists():
        return _existing(store, plan)
    _prepare(store, plan)
    try:
        with FileLock(store / PACKING / "lock", timeout=0):
            summary = _pack(request, store, original, plans, plan, progress)
    except Timeout:
        raise ConfigError(f"{store}: another lars-data process is packing this store; wait for it to end.") from None
    except OSError as error:
        raise DataError(f"{error.filename or store}: {error.strerror or error}") from error
    shutil.rmtree(store / PACKING, ignore_errors=True)
    return summary


def _pack(
    request: Request,
    store: Path,
    original: Original,
    plans: list[ShardPlan],
    plan: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    _remove_temporary_files(store)
    todo = [plan for plan in plans if read_record(store, plan) is None]
    members = {
        split: member_names(os.fsencode(source.name(sample)) for sample in range(len(source)))
        for split, source in original.splits.items()
    }
    writer = ShardWriter(store, original.splits, members, request.encoding, request.skip)
    with progress("packing", sum(len(plan.samples) for plan in todo)) as tick:
        for _ in run_tasks(todo, writer, request.jobs, tick):
            pass
    records = {plan.name: _record(store, plan) for plan in plans}
    tree, kept = _assemble(store, original, plans, records, request.encoding)
    _check_classes(store, original, tree, records)
    _verify(request, tree, kept, plans, progress)
    if open_original(request.source, request.val_labels, request.image_key).fingerprint != original.fingerprint:
        raise DataError(f"{request.source}: files appeared or vanished during packing; remove {store} and pack again.")
    summary = _summary(request, tree, original, plans, records) | {"plan": plan}
    write_atomic(store / SUMMARY, [(json.dumps(summary, indent=1) + "\n").encode()])
    _write_index(tree)
    return summary


def _check_separate(source: Path, store: Path) -> None:
    original, target = source.resolve(), store.resolve()
    if original == target or original in target.parents or target in original.parents:
        raise ConfigError(f"{store}: the store must lie outside {source}; choose another folder.")


def _existing(store: Path, plan: dict[str, Any]) -> dict[str, Any]:
    summary: Any = None
    try:
        summary = json.loads((store / SUMMARY).read_bytes())
        same = summary["plan"] == plan
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ConfigError(f"{store} already holds another store{_differences(summary, plan)}; choose another folder.")
    _remove_temporary_files(store)
    shutil.rmtree(store / PACKING, ignore_errors=True)
    return {**summary, "already": True}


def _differences(existing: Any, requested: dict[str, Any]) -> str:
    """Return the differences between the plan of an existing store and the requested plan; empty if unreadable."""
    try:
        before, now = (
            {**plan["encoding"], "shards of all splits": len(plan["shards"])} for plan in (existing["plan"], requested)
        )
        found = ["other images"] if existing["plan"]["fingerprint"] != requested["fingerprint"] else []
        keys = [key for key in now if before[key] != now[key]]
        found += [f"{key}: {before[key] or 'none'} there, {now[key] or 'none'} requested" for key in keys]
    except (KeyError, TypeError):
        return ""
    return f" ({'; '.join(found)})" if found else ""


def _remove_temporary_files(store: Path) -> None:
    """Remove the unfinished files that a killed process left."""
    for folder, pattern in ((store / PACKING, "*.tmp"), (store, f".{INDEX}.*"), (store, f".{SUMMARY}.*")):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _prepare(store: Path, plan: dict[str, Any]) -> None:
    """Create the folders of a store and write its plan.

    Raises `ConfigError` unless the store is new, or its packing began with the same plan.
    """
    path = store / PACKING / "plan.json"
    try:
        if path.exists():
            if (existing := json.loads(path.read_bytes())) != plan:
                raise ConfigError(
                    f"{store}: packing began with other settings{_differences({'plan': existing}, plan)}. "
                    "Pass the same images and settings, or remove the folder."
                )
        elif not _is_unused(store):
            raise ConfigError(f"{store} is not empty; choose a folder that does not exist.")
        for folder in (PACKING, *dict.fromkeys(split for split, _, _ in plan["shards"])):
            (store / folder).mkdir(parents=True, exist_ok=True)
        write_atomic(path, [json.dumps(plan).encode()])
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is damaged; remove {store}.") from None
    except OSError as error:
        raise ConfigError(f"{store} cannot be written to ({error.strerror}).") from error


def _is_unused(store: Path) -> bool:
    """Return True if the folder does not exist, or contains only the folders that an interrupted start creates."""
    if not store.exists():
        return True
    folders = [store / split for split in SPLITS if (store / split).exists()]
    return set(os.listdir(store)) <= {PACKING, *SPLITS} and not any(map(os.listdir, folders))


def _record(store: Path, plan: ShardPlan) -> ShardRecord:
    record = read_record(store, plan)
    if record is None:
        raise DataError(f"{shard_path(store, plan)} has changed since it was written; run the same command again.")
    return record


def _assemble(
    store: Path,
    original: Original,
    plans: list[ShardPlan],
    records: dict[str, ShardRecord],
    encoding: Encoding,
) -> tuple[ShardTree, dict[str, Source]]:
    """Return the store as a run opens it, and for each split the original images that the store contains."""
    splits: dict[str, Packed] = {}
    kept: dict[str, Source] = {}
    classes = tuple(map(os.fsencode, original.classes))
    for split, source in original.splits.items():
        own = [records[plan.name] for plan in plans if plan.split == split]
        rows = np.array([(*row[:3], shard) for shard, record in enumerate(own) for row in record.rows], np.int64)
        rows = rows.reshape(-1, 4)
        sums = np.array([row[3] for record in own for row in record.rows], np.uint64)
        order = np.argsort(rows[:, 0])
        ids, offset, size, shard = rows[order].T
        names = NamesBuilder()
        names.extend(os.fsencode(source.name(sample)) for sample in ids.tolist())
        labels = np.ascontiguousarray(source.labels[ids])
        left_out = sum(len(record.skipped) for record in own)
        skipped = merge_counts(original.skipped.get(split, {}), {LEFT_OUT: left_out} if left_out else {})
        # Only training classes must have images: a table of validation labels may leave classes empty.
        listing = Listing(classes, names.build(), labels, split == TRAIN, skipped)
        places = Places(shard.astype(np.int32), np.ascontiguousarray(offset), np.ascontiguousarray(size))
        shards = tuple(Shard(shard_path(store, plan), records[plan.name].size) for plan in plans if plan.split == split)
        splits[split] = Packed(shards, listing, places, sums[order])
        kept[split] = SourceSubset(source, ids)
    return ShardTree(store, splits, encoding.variant, original.inventory), kept


def _check_classes(store: Path, original: Original, tree: ShardTree, records: dict[str, ShardRecord]) -> None:
    """Raise `DataError` if a split or a training class has no images left: no run could use the store."""
    for split, packed in tree.splits.items():
        labels = packed.listing.labels
        before = np.bincount(original.splits[split].labels, minlength=len(original.classes))
        lost = np.flatnonzero((before > 0) & (np.bincount(labels, minlength=len(original.classes)) == 0))
        if len(labels) and not (len(lost) and split == TRAIN):
            continue
        reasons = [why for record in records.values() for _, why in record.skipped]
        example = f", the first because: {reasons[0]}" if reasons else ""
        what = f"of class {original.classes[lost[0]]} " if len(labels) else ""
        raise DataError(
            f"{store}: no image {what}in {split}/ can be packed ({len(reasons):,} were left out{example}). Fix the "
            "images, or remove the class, and pack again."
        )


def _verify(
    request: Request, tree: ShardTree, kept: dict[str, Source], plans: list[ShardPlan], progress: Progress
) -> None:
    """Verify all shards. Remove those with problems, and raise `DataError` if there are any."""
    check = checker(tree, {} if request.encoding.reencodes else kept)
    problems: list[ShardProblem] = []
    with progress("verifying", sum(map(len, kept.values()))) as tick:
        for found in run_tasks(tasks_of(tree), check, request.jobs, tick):
            problems += found
    if not problems:
        return
    bad = {shard_of(problem, tree) for problem in problems}
    for plan in plans:
        if shard_path(tree.path, plan) in bad:
            record_path(tree.path, plan).unlink(missing_ok=True)
            shard_path(tree.path, plan).unlink(missing_ok=True)
    shown = "; ".join(describe_problem(problem, tree) for problem in problems[:_SHOWN])
    raise DataError(
        f"{counted(len(problems), 'problem')} in {counted(len(bad), 'shard')}: {shown}. "
        "Damaged shards were removed. Run the same command again."
    )


def describe_problem(problem: ShardProblem, tree: ShardTree) -> str:
    """Describe a problem in one line."""
    where = printable(os.fsencode(shard_of(problem, tree)))
    if problem.sample is not None:
        where += f"!{printable(tree.splits[problem.split].listing.names[problem.sample])}"
    return f"{where}: {printable(problem.reason)}"


def _summary(
    request: Request,
    tree: ShardTree,
    original: Original,
    plans: list[ShardPlan],
    records: dict[str, ShardRecord],
) -> dict[str, Any]:
    skipped = [
        {"split": plan.split, "image": original.splits[plan.split].name(sample), "reason": reason}
        for plan in plans
        for sample, reason in records[plan.name].skipped
    ]
    contents = [(packed.listing.names.chunks(), packed.listing.labels) for packed in tree.splits.values()]
    return {
        "format": f"lars-train store, version {VERSION}",
        "made_from": printable(request.source),
        "encoding": asdict(request.encoding) if request.encoding.reencodes else "as the files are",
        "fingerprint": fingerprint(original.classes, *contents, variant=tree.variant),
        "original": tree.inventory.record(),
        "splits": {
            split: {
                "pictures": len(packed.listing.names),
                "bytes": int(packed.places.size.sum()),
                "shards": len(packed.shards),
                "not_read": dict(packed.listing.skipped),
                "classes": [
                    {"name": printable(name), "pictures": count, "checksum": checksum}
                    for name, count, checksum in zip(
                        packed.listing.classes, packed.listing.counts().tolist(), class_checksums(packed), strict=True
                    )
                ],
            }
            for split, packed in tree.splits.items()
        },
        "skipped": sorted(skipped, key=lambda entry: (entry["split"], entry["image"])),
    }


def _write_index(tree: ShardTree) -> None:
    index, arrays = make_index(tree.path, tree.splits)
    meta = {
        "kind": "store",
        "version": VERSION,
        "variant": tree.variant,
        **index,
        "inventory": tree.inventory.record(),
    }
    write_mapped(tree.path / INDEX, meta, arrays)


@contextlib.contextmanager
def silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A `Progress` that reports nothing."""
    yield lambda count: None
