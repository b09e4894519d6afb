"""Run the commands of ``lars-data`` and print their results."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from dataclasses import replace

import numpy as np

from lars_train.data.dataset import Source, class_names, fingerprint
from lars_train.data.inventory import find_lookalikes, merge_counts
from lars_train.data.sources.folder import open_tree
from lars_train.data.sources.shards import ShardTree
from lars_train.data.splits import VAL
from lars_train.errors import ConfigError, DataError
from lars_train.fsutil import user_path
from lars_train.messages import counted, printable, say, size
from lars_train.pack.encode import Encoding
from lars_train.pack.layout import open_original
from lars_train.pack.packing import SUMMARY, Progress, Request, SourceSubset, describe_problem, pack
from lars_train.pack.processes import cores, run_tasks
from lars_train.pack.verify import ShardProblem, checker, tasks_of

# Maximum number of problems, and of classes, to list.
_SHOWN = 20


def run_pack(args: argparse.Namespace, progress: Progress) -> None:
    """Run ``lars-data pack``."""
    if args.quality is not None and args.short is None and args.max is None:
        raise ConfigError("--quality requires --short or --max: without them, the original bytes are stored.")
    request = Request(
        source=args.source,
        store=args.store,
        encoding=Encoding(args.short, args.max, 90 if args.quality is None else args.quality),
        shards=args.shards,
        skip=args.on_error == "skip",
        val_labels=args.val_labels,
        image_key=args.image_key,
        jobs=args.jobs or cores(),
    )
    summary = pack(request, progress)
    for left in summary["skipped"]:
        say(printable(f"left out: {left['split']}/{left['image']}: {left['reason']}"))
    if summary["skipped"]:
        say(f"{counted(len(summary['skipped']), 'image')} left out.")
    _describe(_store(args.store))
    if summary.get("already"):
        say("The store already exists, packed with the same settings. lars-data verify checks it in full.")
    else:
        say(printable(f"verified; the checksums of the classes are in {user_path(args.store) / SUMMARY}"))


def run_verify(args: argparse.Namespace, progress: Progress) -> None:
    """Run ``lars-data verify``: print the problems, and raise `DataError` if there are any."""
    store = _store(args.store)
    if any(len(packed.sums) != len(packed.listing.names) for packed in store.splits.values()):
        raise ConfigError(
            f"{args.store}: these shards lack checksums, since another program wrote them; pack them to add checksums."
        )
    sources: dict[str, Source] = {}
    if args.source is not None:
        if store.variant:
            raise ConfigError(
                f"--source: {args.store} holds re-encoded images ({store.variant}), which differ from any original."
            )
        sources = _originals(store, args.source, args.val_labels, args.image_key)
    problems: list[ShardProblem] = []
    with progress("verifying", sum(len(packed.listing.names) for packed in store.splits.values())) as tick:
        for found in run_tasks(tasks_of(store), checker(store, sources), args.jobs or cores(), tick):
            problems += found
    for problem in problems[:_SHOWN]:
        say(describe_problem(problem, store))
    if problems:
        raise DataError(f"{args.store}: {counted(len(problems), 'problem')}: {_tally(problems, store)}.")
    _describe(store)
    say("intact" if args.source is None else printable(f"intact, and equal to {args.source}"))


def run_info(args: argparse.Namespace, progress: Progress) -> None:
    """Run ``lars-data info``."""
    _describe(_store(args.store))


def _store(path: str) -> ShardTree:
    tree = open_tree(path)
    if not isinstance(tree, ShardTree):
        raise ConfigError(f"{path} is not a store; `lars-data pack {path} STORE` makes one from it.")
    return tree


def _originals(store: ShardTree, source: str, val_labels: str | None, image_key: str | None) -> dict[str, Source]:
    """Return the original images of each split of the store, matched by name."""
    original = open_original(source, val_labels, image_key)
    found: dict[str, Source] = {}
    for split, packed in store.splits.items():
        unpacked = original.splits.get(split)
        if unpacked is None:
            raise DataError(f"{source} has no split to compare {split} with.")
        ids = {os.fsencode(unpacked.name(i)): i for i in range(len(unpacked))}
        names = packed.listing.names
        missing = [names[i] for i in range(len(names)) if names[i] not in ids]
        if missing:
            raise DataError(
                f"{source} lacks {counted(len(missing), 'image')} of {split}, such as {printable(missing[0])}."
            )
        found[split] = SourceSubset(unpacked, np.array([ids[names[i]] for i in range(len(names))], np.int64))
        if tuple(map(os.fsencode, original.classes)) != packed.listing.classes or not np.array_equal(
            found[split].labels, packed.listing.labels
        ):
            raise DataError(f"{source}: its classes or labels differ from those of {split} in the store.")
        if len(names) < len(unpacked):
            say(printable(f"{split}: the store lacks {counted(len(unpacked) - len(names), 'image')} of {source}"))
    return found


def _tally(problems: list[ShardProblem], store: ShardTree) -> str:
    counts: Counter[str] = Counter()
    for problem in problems:
        packed = store.splits[problem.split]
        if problem.sample is None:
            counts[f"{problem.split} ({packed.shards[problem.shard].path.name})"] += 1
        else:
            name = packed.listing.classes[packed.listing.labels[problem.sample]]
            counts[f"{problem.split}/{printable(name)}"] += 1
    return ", ".join(f"{count} in {where}" for where, count in counts.most_common(_SHOWN))


def _describe(store: ShardTree) -> None:
    lines = [f"{store.place}: {f're-encoded images, {store.variant}' if store.variant else 'original images'}"]
    for split, packed in store.splits.items():
        stored = int(packed.places.size.sum())
        lines.append(
            f"{split}: {counted(len(packed.listing.names), 'image')}, "
            f"{counted(len(packed.listing.classes), 'class', 'classes')}, "
            f"{size(stored)} in {counted(len(packed.shards), 'shard')}"
        )
    skipped = merge_counts(store.inventory.skipped, *(packed.listing.skipped for packed in store.splits.values()))
    val = store.splits.get(VAL)
    unvalidated = 0 if val is None else int(np.count_nonzero(val.listing.counts() == 0))
    named = class_names(next(iter(store.splits.values())).listing.classes)
    lines += replace(
        store.inventory, skipped=skipped, unvalidated=unvalidated, lookalikes=find_lookalikes(named)
    ).lines()
    contents = [(packed.listing.names.chunks(), packed.listing.labels) for packed in store.splits.values()]
    classes = [os.fsdecode(name) for name in next(iter(store.splits.values())).listing.classes]
    lines.append(f"fingerprint {fingerprint(classes, *contents, variant=store.variant)}")
    for line in lines:
        say(printable(line))
