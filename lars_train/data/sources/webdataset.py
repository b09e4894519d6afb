"""Open tar shards in webdataset's layout as a store, with an index that is built once and cached.

tar_samples.py reads the samples of a tar and their labels. A sample without a label gets its class from the folder in
its name.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from lars_train.data.dataset import NamesBuilder
from lars_train.data.inventory import format_counts, merge_counts
from lars_train.data.sources.index_files import Arrays, Damaged, Outdated, index_lock, load_index, save_index
from lars_train.data.sources.shards import Packed, Places, Shard, ShardTree, make_index, parse_splits
from lars_train.data.sources.split_files import Shards, advise_nested_tars, advise_unpacking
from lars_train.data.sources.tar_samples import (
    LABEL_KEYS,
    Label,
    LabelPlace,
    TarSample,
    Unclear,
    format_label,
    label_place,
    read_samples,
)
from lars_train.data.sources.tars import BadTar
from lars_train.data.sources.tree import Listing
from lars_train.data.splits import TEST, TRAIN, VAL, find_non_classes
from lars_train.errors import ConfigError
from lars_train.messages import counted, is_rank0, listed, printable

# Changes that made older indexes invalid:
# 2: names with digits, several images in a sample, labels and folders are read differently; skipped files are counted.
# 3: class folders named like splits, and labels that contradict each other, are rejected; all kinds of skipped files
#    are counted.
# 4: labels are also read under other keys and from other members, and the index records where they come from.
# 5: labels that belong to no image are recognized.
_VERSION = 5


class WebdatasetTree(ShardTree):
    """A store of tars in webdataset's layout."""

    numbers: tuple[int, ...] = ()
    """The number of each class in the labels; empty if those are names."""


def open_webdataset(
    root: Path, shards: Shards, image_key: str | None = None, train_only: bool = False
) -> WebdatasetTree:
    """Open the tars `shards` in `root` as a store. Raises `ConfigError` for shards that cannot be used.

    The index is valid as long as the names, sizes and mtimes of the shards stay the same. If it is not, one process
    rebuilds it, and the others wait.

    `image_key`: the extension of the image to read from a sample with several images. Several extensions are separated
    by ``:``; the first that a sample has is used. `train_only`: ignore the validation set unless there is no training
    set.
    """
    if train_only and TRAIN in shards.files:
        shards = shards._replace(files={TRAIN: shards.files[TRAIN]})
    files = shards.files
    state: dict[str, Any] = {split: [[name, *_state(root / name)] for name in names] for split, names in files.items()}
    state["image_key"] = image_key

    def use(meta: dict[str, Any], arrays: Arrays) -> WebdatasetTree | None:
        if meta["kind"] != "webdataset":
            raise Damaged(f"it is of kind {meta['kind']}")
        if meta.get("version", 1) != _VERSION:
            raise Outdated
        # An index of both splits can serve the training set alone.
        indexed = {key: meta["state"].get(key) for key in state} if TRAIN in files else meta["state"]
        if indexed != state:
            return None
        needed = {split: parts for split, parts in meta["splits"].items() if split in files}
        splits, inventory = parse_splits(root, meta | {"splits": needed}, arrays), shards.inventory
        if inventory.val and VAL not in splits:
            inventory = replace(inventory, val="", unused=(inventory.val, *inventory.unused))
        notes = {split: str(meta["splits"][split]["labels"]) for split in splits}
        if len(set(notes.values())) > 1:
            notes = {split: note and f"{split}: {note}" for split, note in notes.items()}
        inventory = replace(inventory, label_notes=tuple(dict.fromkeys(filter(None, notes.values()))))
        tree = WebdatasetTree(root, splits, inventory=inventory)
        tree.numbers = tuple(map(int, meta["numbers"]))
        return tree

    tree = load_index(root, use)
    if tree is None:
        with index_lock(root):
            tree = load_index(root, use)
            if tree is None:
                meta, arrays = _index(root, shards, tuple((image_key or "").lower().split(":")) if image_key else ())
                meta |= {"version": _VERSION, "state": state}
                tree = use(meta, arrays)
                assert tree is not None
                save_index(root, meta, arrays)
    return tree


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"data.root: {path} cannot be read ({error.strerror}).") from error
    return status.st_size, status.st_mtime_ns


@dataclass
class _Split:
    """The tars of a split, and their content."""

    name: str
    files: list[str]
    named: bool
    """True if the tars are named after this split; False for tars outside any split, which count as training."""
    samples: list[TarSample] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Counts of members that belong to no sample or are not read, by reason."""
    candidates: Counter[LabelPlace] = field(default_factory=Counter)
    """Counts of members that may hold a label, in samples without one in the usual places."""
    orphans: Counter[bytes] = field(default_factory=Counter)
    """The count of ``.cls`` members that belong to no image; the only key is the name of the first one."""
    note: str = ""
    """The source of the labels, for the log; empty if it is the usual one."""

    def candidate_places(self) -> list[LabelPlace]:
        """Return the places in `candidates`, most frequent first."""
        return [place for place, _ in self.candidates.most_common()]


def _index(root: Path, shards: Shards, keys: tuple[str, ...]) -> tuple[dict[str, Any], Arrays]:
    from tqdm import tqdm

    read = shards.inventory
    splits = [
        _Split(name, files, bool(read.train if name == TRAIN else read.val)) for name, files in shards.files.items()
    ]
    total = sum(len(split.files) for split in splits)
    quiet = None if is_rank0() else True
    with tqdm(total=total, desc="reading shards", unit="shard", leave=False, delay=1, disable=quiet) as bar:
        for split in splits:
            _read(root, split, keys, bar)
    _read_hints(splits)
    if read.val.lower() == TEST and len(splits) > 1 and _without_labels(splits[1].samples, splits[0].samples):
        # A test set without labels, as competitions have, cannot serve as validation.
        del splits[1]
    classes, numbers = _classes(root, splits)
    index, arrays = make_index(root, {split.name: _packed(root, split, classes, numbers) for split in splits})
    for split in splits:
        index["splits"][split.name]["labels"] = split.note
    numbered = [label for label in numbers if isinstance(label, int)]
    return {"kind": "webdataset", **index, "numbers": numbered}, arrays


def _read(root: Path, split: _Split, keys: tuple[str, ...], bar: Any) -> None:
    """Read all samples of a split, sorted by name. If names are not unique, the shard's name is prepended."""
    samples: list[TarSample] = []
    for number, shard in enumerate(split.files):
        shown = printable(os.fsencode(shard))
        try:
            handle = os.open(root / shard, os.O_RDONLY | os.O_CLOEXEC)
            try:
                samples += read_samples(handle, number, keys, split.skipped, split.candidates, split.orphans)
            finally:
                os.close(handle)
        except (BadTar, OSError) as error:
            raise ConfigError(f"data.root={root}: {shown} cannot be used ({error}); copy it again.") from error
        except Unclear as error:
            raise ConfigError(f"data.root={root}: {shown}: {error}.") from None
        bar.update()
    if len({sample.name for sample in samples}) < len(samples):
        stems = [os.fsencode(Path(shard).stem) + b"/" for shard in split.files]
        samples = [sample._replace(name=stems[sample.shard] + sample.name) for sample in samples]
    samples.sort(key=lambda sample: sample.name)
    twice = next((a for a, b in pairwise(samples) if a.name == b.name), None)
    if twice is not None:
        raise ConfigError(f"data.root={root}: {printable(twice.name)} appears twice; make these shards again.")
    split.samples = samples


def _read_hints(splits: Sequence[_Split]) -> None:
    """Read missing labels from the place that `label_place` finds, and count the members that are not read.

    Sets the `note` of each split, which names the source of its labels. If training samples lack a label, they decide
    the place for both splits. If folders define the same classes as the labels at that place, the folders are used
    instead.
    """
    unlabeled = next((found for split in splits if (found := [s for s in split.samples if s.label is None])), [])
    place = label_place(unlabeled)
    if place is not None:
        folders = _class_folders(unlabeled, set())
        pairs = {(dict(sample.hints)[place], folders[sample.folder]) for sample in unlabeled}
        if all(len(set(side)) == len(pairs) and b"" not in side for side in zip(*pairs, strict=True)):
            # The folders define the same classes, and name them.
            place = None
    for split in splits:
        samples = split.samples
        before = sum(sample.label is None for sample in samples)
        if place is not None:
            samples[:] = [
                sample if sample.label is not None else sample._replace(label=dict(sample.hints).get(place))
                for sample in samples
            ]
        after = sum(sample.label is None for sample in samples)
        read = place.extension if place is not None and after < before else ""
        for (extension, key), count in split.candidates.items():
            if not key and extension != read:
                split.skipped[f".{extension} files"] += count
        unread = _listed_places(other for other in split.candidate_places() if other != place)
        parts = []
        if place is not None and after < before:
            some = "" if before == len(samples) else f"of {counted(before - after, 'image')} "
            parts.append(f"labels {some}from {_listed_places([place])}")
        if after and (unread or after < len(samples)):
            some = "" if after == len(samples) else f"of {counted(after, 'image')} "
            parts.append(f"labels {some}from folders in the names{unread and f', not from {unread}'}")
        split.note = "; ".join(parts)


def _listed_places(places: Iterable[LabelPlace]) -> str:
    """Return the places of labels for a message: ``.json (caption, url), .txt``."""
    keys: dict[str, list[str]] = {}
    for extension, key in places:
        keys.setdefault(extension, []).extend([key] if key else [])
    return ", ".join(
        f".{extension} ({listed(names)})" if names else f".{extension}" for extension, names in sorted(keys.items())
    )


def _without_labels(test: Sequence[TarSample], train: Sequence[TarSample]) -> bool:
    """Return True if no sample of a test set has a label or lies in a folder named like a class of `train`."""
    known = set(_class_folders(train, set()).values()) if train else set()
    return not any(
        sample.label is not None or not known.isdisjoint(sample.folder.split(b"/") if sample.folder else ())
        for sample in test
    )


def _packed(root: Path, split: _Split, classes: Sequence[bytes], numbers: Mapping[Label, int]) -> Packed:
    samples = split.samples
    names = NamesBuilder()
    names.extend(sample.name for sample in samples)
    labels = np.array([numbers[sample.label] for sample in samples], np.int32)
    places = Places(
        np.array([sample.shard for sample in samples], np.int32),
        np.array([sample.offset for sample in samples], np.int64),
        np.array([sample.size for sample in samples], np.int64),
    )
    shards = tuple(Shard(root / name, (root / name).stat().st_size) for name in split.files)
    listing = Listing(tuple(classes), names.build(), labels, split.name == TRAIN, merge_counts(split.skipped))
    return Packed(shards, listing, places, np.zeros(0, np.uint64))


def _classes(root: Path, splits: Sequence[_Split]) -> tuple[list[bytes], dict[Label, int]]:
    """Return the class names, and the index of each label. Samples without a label are labeled by their folder."""
    for split in splits:
        if not split.samples:
            others = f" (skipped: {format_counts(split.skipped)})" if split.skipped else ""
            nested = split.skipped.get(".tar files")
            remedy = f" {advise_nested_tars(root, split.name, split.files)}" if nested else ""
            raise ConfigError(f"data.root={root}: its shards hold no images{others}.{remedy}")
    tars = [tar for split in splits for tar in split.files]
    known: set[Label] = set()
    for split in splits:
        _label_by_folder(root, split, known, tars)
        known = known or {sample.label for sample in split.samples}
    kinds = {type(sample.label): sample for split in splits for sample in split.samples}
    if len(kinds) > 1:
        shown = ", ".join(f"{printable(sample.name)} has {format_label(sample.label)}" for sample in kinds.values())
        raise ConfigError(
            f"data.root={root}: some labels are numbers and others are names ({shown}); make these shards again."
        )
    first, second = splits[0].samples, splits[1].samples if len(splits) > 1 else []
    every: list[set[Any]] = [{sample.label for sample in samples} for samples in (first, second)]
    labels, extra = sorted(every[0]), sorted(every[1] - every[0])
    if extra:
        raise ConfigError(
            f"data.root={root}: the validation set has {counted(len(extra), 'class', 'classes')} that the training "
            f"set lacks, such as {format_label(extra[0])}; make both sets with the same classes."
        )
    names = [label if isinstance(label, bytes) else b"%d" % label for label in labels]
    numbers = {label: index for index, label in enumerate(labels)}
    by_folder = classes_by_folder({(sample.label, sample.folder or None) for sample in first}, labels)
    for sample in second if by_folder else []:
        name = by_folder[numbers[sample.label]]
        if sample.folder != name and sample.folder in by_folder:
            raise ConfigError(
                f"data.root={root}: {printable(sample.name)} of the validation set lies in the folder "
                f"{printable(sample.folder)}, but its label belongs to {printable(name)} in the training set; make "
                "these shards again."
            )
    return by_folder or names, numbers


def _label_by_folder(root: Path, split: _Split, known: Set[Label], tars: Sequence[str]) -> None:
    """Give each sample without a label its class folder as label.

    Raises `ConfigError` for a sample that has neither. `known`: the labels of the training set. `tars`: all tars of the
    data set, for the remedy.
    """
    samples = split.samples
    without = next((sample for sample in samples if sample.label is None), None)
    if without is not None and split.orphans:
        ((name, count),) = split.orphans.items()
        raise ConfigError(
            f"data.root={root}: its shards hold {counted(count, '.cls file')} belonging to no image, such "
            f"as {printable(name)}, and {printable(without.name)} has no label; the members of a sample must be "
            "adjacent and share their name up to the first dot: make these shards again, or leave these files out."
        )
    folders = _class_folders(samples, known)
    named = sorted({folders[sample.folder] for sample in samples if sample.label is None})
    parts = find_non_classes(list(map(os.fsdecode, named)), split=split.named) if len(named) > 1 else []
    if parts:
        raise ConfigError(
            f"data.root={root}: folders in its shards are splits, not classes ({printable(', '.join(parts))}); "
            "unpack the shards, and set data.root to the folder that contains train/; if these are classes, name the "
            "shards train-*.tar and val-*.tar."
        )
    any_label = any(sample.label is not None or sample.folder for sample in samples)
    samples[:] = [
        sample._replace(label=folder if sample.label is None else sample.label, folder=folder)
        for sample, folder in ((sample, folders[sample.folder]) for sample in samples)
    ]
    unlabeled = next((sample for sample in samples if not sample.label and sample.label != 0), None)
    if unlabeled is not None:
        remedy = ("" if any_label else advise_unpacking(root, tars)) or "add its label, or leave it out."
        unread = _listed_places(split.candidate_places())
        raise ConfigError(
            f"data.root={root}: {printable(unlabeled.name)} has no label: neither a .cls nor a .json with one of "
            f"{', '.join(LABEL_KEYS)}, nor a folder in its name{unread and f', nor a clear label in {unread}'}; "
            f"{remedy}"
        )


def _class_folders(samples: Sequence[TarSample], known: Set[Label]) -> dict[bytes, bytes]:
    """Map the folder of each sample of a split to the part of the path that names the class; ``b""`` for no folder.

    The class is the first part after the prefix that all folders share. The prefix never includes the last part of a
    folder, so that each folder has a class. `known`: the classes of the training set. In a validation set with a single
    class, the shared prefix may include the class; then shorter prefixes are tried until all classes are known.
    """
    parts = {folder: folder.split(b"/") if folder else [] for folder in {sample.folder for sample in samples}}
    levels = zip(*parts.values(), strict=False)
    common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    shared = min(common, max(0, min(map(len, parts.values())) - 1))
    for depth in (*reversed(range(shared + 1)), shared):
        found = {folder: path[depth] if path else b"" for folder, path in parts.items()}
        if not known or known >= set(found.values()):
            break
    return found


def classes_by_folder(pairs: Collection[tuple[Label, bytes | None]], labels: Sequence[Label]) -> list[bytes]:
    """Return the folder of each of the sorted `labels`; an empty list if folders and labels do not match one to one.

    Folders must also sort like their labels. `pairs`: the distinct pairs of a sample's label and folder.
    """
    folders = dict(pairs)
    named = [folder for folder in (folders[label] for label in labels) if folder is not None]
    return named if len(pairs) == len(labels) == len(named) and named == sorted(set(named)) else []
