"""From a folder of pictures to a store: plan, shards, verification, index. What is begun can be gone on with."""

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
from lars_train.data.sources.shards import INDEX, PACKING, VERSION, Packed, Places, Shard, ShardTree, index_of
from lars_train.data.sources.tree import Listing
from lars_train.data.splits import SPLITS, TRAIN
from lars_train.errors import ConfigError, DataError
from lars_train.fsutil import user_path, write_atomic
from lars_train.messages import counted, printable
from lars_train.pack.encode import Encoding
from lars_train.pack.layout import Original, ShardPlan, member_names, open_original, shard_plans
from lars_train.pack.processes import each
from lars_train.pack.verify import ShardProblem, checker, class_checksums, store_of, tasks_of
from lars_train.pack.writer import ShardRecord, ShardWriter, read_record, record_path, shard_path

SUMMARY = "store.json"
"""The file of a store that tells people what it is. Nothing is read from it when the store is opened."""
LEFT_OUT = "images left out by lars-data pack"
_SHOWN = 5

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], None]]]
"""Given what is done and how many pictures there are, a context with what is called for pictures that are done."""


class SourceSubset:
    """The samples `ids` of a source as samples 0, 1, ... of their own: what is in a store when some were left out."""

    def __init__(self, source: Source, ids: npt.NDArray[np.int64]) -> None:
        self.labels: Labels = source.labels[ids]
        self._source = source
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def name(self, sample: int) -> str:
        return self._source.name(int(self._ids[sample]))

    def where(self, sample: int) -> str:
        return self._source.where(int(self._ids[sample]))

    def read(self, sample: int) -> bytes | npt.NDArray[np.uint8]:
        return self._source.read(int(self._ids[sample]))


@dataclass(frozen=True)
class Request:
    """What ``lars-data pack`` was asked for. `shards`: of the training split; `jobs`: processes."""

    source: str
    store: str
    encoding: Encoding
    shards: int | None = None
    skip: bool = False
    val_labels: str | None = None
    image_key: str | None = None
    jobs: int = 1


def pack(request: Request, progress: Progress) -> dict[str, Any]:
    """Pack the pictures; the store's summary, with ``already`` in it where the store was there.

    The original is only read. Raises `ConfigError` for what cannot be packed, or not to there; `DataError` for a
    picture that is broken (but with `skip`), a store that differs from the original, and what the file system refuses:
    the same request then goes on from the shards that are whole.
    """
    store = user_path(request.store)
    _check_apart(user_path(request.source), store)
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
        return _already(store, plan)
    _begin(store, plan)
    try:
        with FileLock(store / PACKING / "lock", timeout=0):
            summary = _pack(request, store, original, plans, plan, progress)
    except Timeout:
        raise ConfigError(f"{store}: another lars-data packs it; wait for that one.") from None
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
    _tidy(store)
    todo = [plan for plan in plans if read_record(store, plan) is None]
    members = {
        split: member_names(os.fsencode(source.name(sample)) for sample in range(len(source)))
        for split, source in original.splits.items()
    }
    writer = ShardWriter(store, original.splits, members, request.encoding, request.skip)
    with progress("packing", sum(len(plan.samples) for plan in todo)) as tick:
        for _ in each(todo, writer, request.jobs, tick):
            pass
    records = {plan.name: _record(store, plan) for plan in plans}
    tree, kept = _assembled(store, original, plans, records, request.encoding)
    _check_classes(store, original, tree, records)
    _verify(request, tree, kept, plans, progress)
    if open_original(request.source, request.val_labels, request.image_key).fingerprint != original.fingerprint:
        raise DataError(f"{request.source}: files came or went while it was packed; remove {store} and pack it anew.")
    summary = _summary(request, tree, original, plans, records) | {"plan": plan}
    write_atomic(store / SUMMARY, [(json.dumps(summary, indent=1) + "\n").encode()])
    _write_index(tree)
    return summary


def _check_apart(source: Path, store: Path) -> None:
    one, other = source.resolve(), store.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ConfigError(f"{store}: the store must lie outside of {source}, which is not written to.")


def _already(store: Path, plan: dict[str, Any]) -> dict[str, Any]:
    summary: Any = None
    try:
        summary = json.loads((store / SUMMARY).read_bytes())
        same = summary["plan"] == plan
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ConfigError(f"{store} is another store already{_apart(summary, plan)}; give another folder.")
    _tidy(store)
    shutil.rmtree(store / PACKING, ignore_errors=True)
    return {**summary, "already": True}


def _apart(there: Any, asked: dict[str, Any]) -> str:
    """What differs between the plan of a store and the one that is asked for, as far as the former can be read."""
    try:
        before, now = (
            {**plan["encoding"], "shards of all splits": len(plan["shards"])} for plan in (there["plan"], asked)
        )
        other = ["other pictures"] if there["plan"]["fingerprint"] != asked["fingerprint"] else []
        keys = [key for key in now if before[key] != now[key]]
        told = other + [f"{key}: {before[key] or 'none'} there, {now[key] or 'none'} asked for" for key in keys]
    except (KeyError, TypeError):
        return ""
    return f" ({'; '.join(told)})" if told else ""


def _tidy(store: Path) -> None:
    """Take away what a kill has left half written."""
    for folder, pattern in ((store / PACKING, "*.tmp"), (store, f".{INDEX}.*"), (store, f".{SUMMARY}.*")):
        for left in folder.glob(pattern):
            left.unlink(missing_ok=True)


def _begin(store: Path, plan: dict[str, Any]) -> None:
    """The folders and the plan of a new store; or of one that was begun by the same plan."""
    path = store / PACKING / "plan.json"
    try:
        if path.exists():
            if (begun := json.loads(path.read_bytes())) != plan:
                raise ConfigError(
                    f"{store} was begun in another way{_apart({'plan': begun}, plan)}; give the same pictures and "
                    "settings, or remove it."
                )
        elif not _is_unused(store):
            raise ConfigError(f"{store} is not empty; give the path of a folder that is not there.")
        for folder in (PACKING, *dict.fromkeys(split for split, _, _ in plan["shards"])):
            (store / folder).mkdir(parents=True, exist_ok=True)
        write_atomic(path, [json.dumps(plan).encode()])
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is damaged; remove {store}.") from None
    except OSError as error:
        raise ConfigError(f"{store}: it cannot be written to ({error.strerror}).") from error


def _is_unused(store: Path) -> bool:
    """Whether the folder is not there, or has nothing in it but what a start that was cut short leaves."""
    if not store.exists():
        return True
    folders = [store / split for split in SPLITS if (store / split).exists()]
    return set(os.listdir(store)) <= {PACKING, *SPLITS} and not any(map(os.listdir, folders))


def _record(store: Path, plan: ShardPlan) -> ShardRecord:
    record = read_record(store, plan)
    if record is None:
        raise DataError(f"{shard_path(store, plan)} is not what was written; run the same command again.")
    return record


def _assembled(
    store: Path,
    original: Original,
    plans: list[ShardPlan],
    records: dict[str, ShardRecord],
    encoding: Encoding,
) -> tuple[ShardTree, dict[str, Source]]:
    """The store as it is when it is opened, and its pictures in the original."""
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
        # Of a validation set whose labels came from a table, a class may be without pictures.
        left_out = sum(len(record.skipped) for record in own)
        skipped = merge_counts(original.skipped.get(split, {}), {LEFT_OUT: left_out} if left_out else {})
        listing = Listing(classes, names.build(), labels, split == TRAIN, skipped)
        places = Places(shard.astype(np.int32), np.ascontiguousarray(offset), np.ascontiguousarray(size))
        shards = tuple(Shard(shard_path(store, plan), records[plan.name].size) for plan in plans if plan.split == split)
        splits[split] = Packed(shards, listing, places, sums[order])
        kept[split] = SourceSubset(source, ids)
    return ShardTree(store, splits, encoding.variant, original.inventory), kept


def _check_classes(store: Path, original: Original, tree: ShardTree, records: dict[str, ShardRecord]) -> None:
    """Raise `DataError` where a split, or a class to train on, has lost its last picture: no run could use that."""
    for split, packed in tree.splits.items():
        labels = packed.listing.labels
        before = np.bincount(original.splits[split].labels, minlength=len(original.classes))
        lost = np.flatnonzero((before > 0) & (np.bincount(labels, minlength=len(original.classes)) == 0))
        if len(labels) and not (len(lost) and split == TRAIN):
            continue
        reasons = [why for record in records.values() for _, why in record.skipped]
        example = f", the first because: {reasons[0]}" if reasons else ""
        what = f"of class {original.classes[lost[0]]}, " if len(labels) else ""
        raise DataError(
            f"{store}: no picture {what}of {split}/ can be packed ({len(reasons):,} were left out{example}). Mend the "
            "pictures, or remove the class, and pack anew."
        )


def _verify(
    request: Request, tree: ShardTree, kept: dict[str, Source], plans: list[ShardPlan], progress: Progress
) -> None:
    """Raise `DataError` unless what was written can be read again and is right; shards that are not are removed."""
    check = checker(tree, {} if request.encoding.anew else kept)
    problems: list[ShardProblem] = []
    with progress("verifying", sum(map(len, kept.values()))) as tick:
        for found in each(tasks_of(tree), check, request.jobs, tick):
            problems += found
    if not problems:
        return
    bad = {store_of(problem, tree) for problem in problems}
    for plan in plans:
        if shard_path(tree.path, plan) in bad:
            record_path(tree.path, plan).unlink(missing_ok=True)
            shard_path(tree.path, plan).unlink(missing_ok=True)
    shown = "; ".join(describe_problem(problem, tree) for problem in problems[:_SHOWN])
    raise DataError(
        f"{counted(len(problems), 'problem')} in {counted(len(bad), 'shard')}, now removed: {shown}. "
        "Run the same command again."
    )


def describe_problem(problem: ShardProblem, tree: ShardTree) -> str:
    """One line for a problem."""
    where = printable(os.fsencode(store_of(problem, tree)))
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
    runs = [(packed.listing.names.runs(), packed.listing.labels) for packed in tree.splits.values()]
    return {
        "format": f"lars-train store, version {VERSION}",
        "made_from": printable(request.source),
        "encoding": asdict(request.encoding) if request.encoding.anew else "as the files are",
        "fingerprint": fingerprint(original.classes, *runs, variant=tree.variant),
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
    index, arrays = index_of(tree.path, tree.splits)
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
    """Progress that nobody is told of."""
    yield lambda count: None
