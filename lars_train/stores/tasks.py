"""What each command of ``lars-data`` does, and what it prints."""

from __future__ import annotations

import argparse
import os
from collections import Counter

import numpy as np

from lars_train.data.directory import user_path
from lars_train.data.folder import open_tree
from lars_train.data.shards import ShardTree
from lars_train.data.source import Source, fingerprint
from lars_train.errors import ConfigError, DataError
from lars_train.monitoring.say import say
from lars_train.stores.encode import Encoding
from lars_train.stores.pack import SUMMARY, Kept, Progress, Request, told
from lars_train.stores.pack import pack as make_store
from lars_train.stores.plan import open_original
from lars_train.stores.verify import Problem, checker, tasks_of
from lars_train.stores.workers import cores, each
from lars_train.text import printable
from lars_train.units import size

_SHOWN = 20


def pack(args: argparse.Namespace, progress: Progress) -> None:
    """``lars-data pack``."""
    if args.quality is not None and args.short is None and args.max is None:
        raise ConfigError("--quality has no meaning without --short or --max: pictures are stored as they are.")
    request = Request(
        source=args.source,
        store=args.store,
        encoding=Encoding(args.short, args.max, 90 if args.quality is None else args.quality),
        shards=args.shards,
        skip=args.on_error == "skip",
        val_labels=args.val_labels,
        jobs=args.jobs or cores(),
    )
    summary = make_store(request, progress)
    for left in summary["skipped"]:
        say(f"left out: {left['split']}/{left['image']}: {left['reason']}")
    if summary["skipped"]:
        say(f"{len(summary['skipped']):,} pictures were left out.")
    for line in _lines(_store(args.store)):
        say(line)
    if summary.get("already"):
        say("It was there already, packed in this way; lars-data verify reads it from end to end.")
    else:
        say(f"verified; the checksums of its classes are in {user_path(args.store) / SUMMARY}")


def verify(args: argparse.Namespace, progress: Progress) -> None:
    """``lars-data verify``: raises `DataError` after it has printed what is wrong."""
    store = _store(args.store)
    if any(len(packed.sums) != len(packed.listing.names) for packed in store.splits.values()):
        raise ConfigError(f"{args.store}: these shards were made by others, without checksums; pack them to have some.")
    sources: dict[str, Source] = {}
    if args.source is not None:
        if store.variant:
            raise ConfigError(
                f"--source: {args.store} was encoded anew ({store.variant}), so it differs from all originals."
            )
        sources = _originals(store, args.source, args.val_labels)
    problems: list[Problem] = []
    with progress("verifying", sum(len(packed.listing.names) for packed in store.splits.values())) as tick:
        for found in each(tasks_of(store), checker(store, sources), args.jobs or cores(), tick):
            problems += found
    for problem in problems[:_SHOWN]:
        say(told(problem, store))
    if problems:
        raise DataError(f"{args.store}: {len(problems)} problem(s): {_tally(problems, store)}.")
    for line in _lines(store):
        say(line)
    say("whole" if args.source is None else f"whole, and equal to {args.source}")


def info(args: argparse.Namespace, progress: Progress) -> None:
    """``lars-data info``."""
    store = _store(args.store)
    for line in _lines(store):
        say(line)


def _store(path: str) -> ShardTree:
    tree = open_tree(path)
    if not isinstance(tree, ShardTree):
        raise ConfigError(f"{path} is no store; `lars-data pack {path} STORE` makes one of it.")
    return tree


def _originals(store: ShardTree, source: str, val_labels: str | None) -> dict[str, Source]:
    """For each split of the store its pictures in the original, by their names."""
    original = open_original(source, val_labels)
    found: dict[str, Source] = {}
    for split, packed in store.splits.items():
        theirs = original.splits.get(split)
        if theirs is None:
            raise DataError(f"{source} has nothing to compare {split} with.")
        ids = {os.fsencode(theirs.name(i)): i for i in range(len(theirs))}
        names = packed.listing.names
        missing = [names[i] for i in range(len(names)) if names[i] not in ids]
        if missing:
            raise DataError(f"{source} lacks {len(missing)} pictures of {split}, such as {printable(missing[0])}.")
        found[split] = Kept(theirs, np.array([ids[names[i]] for i in range(len(names))], np.int64))
        if tuple(map(os.fsencode, original.classes)) != packed.listing.classes or not np.array_equal(
            found[split].labels, packed.listing.labels
        ):
            raise DataError(f"{source}: its classes or labels are not those of {split} in the store.")
        if len(names) < len(theirs):
            say(f"{split}: {len(theirs) - len(names)} pictures of {source} are not in the store")
    return found


def _tally(problems: list[Problem], store: ShardTree) -> str:
    counts: Counter[str] = Counter()
    for problem in problems:
        packed = store.splits[problem.split]
        if problem.sample is None:
            counts[f"{problem.split} ({packed.shards[problem.shard].path.name})"] += 1
        else:
            name = packed.listing.classes[packed.listing.labels[problem.sample]]
            counts[f"{problem.split}/{printable(name)}"] += 1
    return ", ".join(f"{count} in {where}" for where, count in counts.most_common(_SHOWN))


def _lines(store: ShardTree) -> list[str]:
    lines = [f"{store.place}: pictures {f'encoded anew, {store.variant}' if store.variant else 'as the files were'}"]
    for split, packed in store.splits.items():
        stored = int(packed.places.size.sum())
        lines.append(
            f"{split}: {len(packed.listing.names):,} pictures, {len(packed.listing.classes):,} classes, "
            f"{size(stored)} in {len(packed.shards):,} shards"
        )
    runs = [(packed.listing.names.runs(), packed.listing.labels) for packed in store.splits.values()]
    classes = [os.fsdecode(name) for name in next(iter(store.splits.values())).listing.classes]
    lines.append(f"fingerprint {fingerprint(classes, *runs, variant=store.variant)}")
    return lines
