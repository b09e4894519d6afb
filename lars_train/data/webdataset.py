"""Tar shards that others made, in webdataset's layout, as a store: their index is built once and kept.

Neighbours in a shard whose names agree up to the first dot of their last part are one sample
(https://github.com/webdataset/webdataset, "WebDataset Format"): one of them is the picture, the label is in ``.cls`` or
``.json``, or else the class is the folder in the name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lars_train.data.index_cache import alone, keep, load
from lars_train.data.mapped import Arrays, Damaged
from lars_train.data.shards import TRAIN, VAL, Packed, ShardTree, splits_of
from lars_train.data.source import NamesBuilder
from lars_train.data.tars import BadTar, Member, members
from lars_train.data.tree import is_hidden, is_image
from lars_train.errors import ConfigError
from lars_train.monitoring.say import first_process
from lars_train.text import printable

_VALIDATION = ("val", "validation", "test")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_LABEL_KEYS = ("label", "cls", "class")
# Bytes of a label: a number, and a JSON with what else is known of a picture.
_MOST_CLS, _MOST_JSON = 1024, 1 << 20

Label = int | bytes | None
"""A class by its number, by its name, or not told."""


class Sample(NamedTuple):
    """A picture: its name and the folder in it, where it lies, and its label as it stands there."""

    name: bytes
    shard: int
    offset: int
    size: int
    label: Label
    folder: bytes | None


def shard_files(root: Path) -> dict[str, list[str]]:
    """The shards in the folder `root` by split, as paths in it; empty where it is no folder of shards.

    They lie in ``train/`` and ``val/``, ``validation/`` or ``test/``, or directly in `root`, told apart by those words
    in their names. Beside folders, tars are what pictures were unpacked from.
    """
    if (root / TRAIN).is_dir():
        found = {TRAIN: _tars(root, "train/")}
        if found[TRAIN]:
            others = (_tars(root, f"{name}/") for name in _VALIDATION if (root / name).is_dir())
            found[VAL] = next((tars for tars in others if tars), [])
    else:
        named: dict[str, list[str]] = {"": []}
        for name in _tars(root, ""):
            named.setdefault(split_word(name, (TRAIN, *_VALIDATION)), []).append(name)
        val = next((named[name] for name in _VALIDATION if name in named), [])
        found = {TRAIN: named.get(TRAIN, []) or named[""], VAL: val}
    return {split: tars for split, tars in found.items() if tars} if found[TRAIN] else {}


def split_word(name: str, splits: Sequence[str]) -> str:
    """The first of `splits` that is a word in the name of a file; empty where none is."""
    words = "".join(c if c.isalpha() else " " for c in name.lower()).split()
    return next((split for split in splits if split in words), "")


def open_webdataset(root: Path, files: dict[str, list[str]]) -> ShardTree:
    """The store that the shards `files` of `root` are. Raises `ConfigError` for shards that cannot be used.

    Of several processes, one makes the index, and the others wait. It holds while the shards' names, lengths and times
    of their last change are what they were.
    """
    state = {split: [[name, *_state(root / name)] for name in names] for split, names in files.items()}

    def use(meta: dict[str, Any], arrays: Arrays) -> dict[str, Packed] | None:
        if meta["kind"] != "webdataset":
            raise Damaged("it is of another kind")
        return splits_of(root, meta, arrays) if meta["state"] == state else None

    known = load(root, use)
    if known is None:
        with alone(root):
            known = load(root, use)
            if known is None:
                meta, arrays = _index(root, files)
                known = splits_of(root, meta, arrays)
                keep(root, {**meta, "state": state}, arrays)
    return ShardTree(root, known)


def _tars(root: Path, inside: str) -> list[str]:
    """The tars directly in a folder without visible folders, in bytewise order."""
    tars, compressed = [], []
    try:
        with os.scandir(root / inside) as entries:
            for entry in entries:
                if is_hidden(os.fsencode(entry.name)):
                    continue
                if entry.is_dir():
                    return []
                if entry.name.endswith(".tar"):
                    tars.append(inside + entry.name)
                elif entry.name.endswith(_COMPRESSED):
                    compressed.append(inside + entry.name)
    except OSError:
        return []
    if compressed and not tars:
        raise ConfigError(
            f"data.root={root}: {compressed[0]} is compressed, and cannot be read at random; "
            "make such shards plain .tar files (gzip -d)."
        )
    return sorted(tars, key=os.fsencode)


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"data.root: {path} cannot be read ({error.strerror}).") from error
    return found.st_size, found.st_mtime_ns


def _index(root: Path, files: dict[str, list[str]]) -> tuple[dict[str, Any], Arrays]:
    from tqdm import tqdm

    total = sum(map(len, files.values()))
    quiet = None if first_process() else True
    with tqdm(total=total, desc="reading shards", unit="shard", leave=False, delay=1, disable=quiet) as bar:
        found = {split: _samples(root, names, bar) for split, names in files.items()}
    classes, numbers = _classes(root, found)
    meta: dict[str, Any] = {"kind": "webdataset", "classes": [name.decode("latin-1") for name in classes], "splits": {}}
    arrays: Arrays = {}
    for split, samples in found.items():
        shards = [(name, (root / name).stat().st_size) for name in files[split]]
        meta["splits"][split] = {"complete": split == TRAIN, "shards": shards}
        arrays |= {f"{split}.{part}": array for part, array in _arrays(samples, numbers).items()}
    return meta, arrays


def _arrays(samples: Sequence[Sample], numbers: dict[Label, int]) -> Arrays:
    names = NamesBuilder()
    names.extend(sample.name for sample in samples)
    blob, starts = names.build().arrays
    return {
        "names": blob,
        "starts": starts,
        "labels": np.array([numbers[sample.label] for sample in samples], np.int32),
        "shard": np.array([sample.shard for sample in samples], np.int32),
        "offset": np.array([sample.offset for sample in samples], np.int64),
        "size": np.array([sample.size for sample in samples], np.int64),
        "sums": np.zeros(0, np.uint64),
    }


def _samples(root: Path, shards: Sequence[str], bar: Any) -> list[Sample]:
    """All samples of a split, ranked by name. Names that are not unique get their shard's in front."""
    samples: list[Sample] = []
    for number, shard in enumerate(shards):
        try:
            handle = os.open(root / shard, os.O_RDONLY | os.O_CLOEXEC)
            try:
                samples += _in_shard(handle, number)
            finally:
                os.close(handle)
        except (BadTar, OSError) as error:
            raise ConfigError(
                f"data.root={root}: {printable(os.fsencode(shard))} cannot be used ({error}); get it again."
            ) from error
        bar.update()
    if len({sample.name for sample in samples}) < len(samples):
        stems = [os.fsencode(Path(shard).stem) + b"/" for shard in shards]
        samples = [sample._replace(name=stems[sample.shard] + sample.name) for sample in samples]
    samples.sort(key=lambda sample: sample.name)
    twice = next((a for a, b in pairwise(samples) if a.name == b.name), None)
    if twice is not None:
        raise ConfigError(f"data.root={root}: {printable(twice.name)} is in it twice; make these shards anew.")
    return samples


def _in_shard(handle: int, shard: int) -> Iterator[Sample]:
    for _, group in groupby(members(handle), key=_key):
        parts = list(group)
        pictures = [part for part in parts if is_image(b"." + _extension(part))]
        # Of several pictures, the one with the shortest extension: x.jpg before x.mask.png.
        pictures.sort(key=lambda part: len(_extension(part)))
        if pictures and not any(map(is_hidden, _plain(pictures[0]).split(b"/"))):
            name = _plain(pictures[0])
            yield Sample(name, shard, *pictures[0][1:], _label(handle, parts), _folder(name))


def _plain(member: Member) -> bytes:
    return member.name.removeprefix(b"./")


def _key(member: Member) -> bytes:
    folder, slash, base = _plain(member).rpartition(b"/")
    return folder + slash + base.partition(b".")[0]


def _extension(member: Member) -> bytes:
    return member.name.rpartition(b"/")[2].partition(b".")[2].lower()


def _label(handle: int, parts: Iterable[Member]) -> Label:
    by_extension = {_extension(part): part for part in parts}
    if (cls := by_extension.get(b"cls")) is not None:
        text = os.pread(handle, min(cls.size, _MOST_CLS + 1), cls.offset).strip()
        if not text or len(text) > _MOST_CLS or b"\0" in text:
            raise BadTar(f"{printable(cls.name)} holds no label")
        return int(text) if text.isdigit() and len(text) < 10 else text
    if (about := by_extension.get(b"json")) is not None and about.size <= _MOST_JSON:
        try:
            content = json.loads(os.pread(handle, about.size, about.offset))
        except (ValueError, RecursionError):
            raise BadTar(f"{printable(about.name)} is no JSON") from None
        values = [content.get(key) for key in _LABEL_KEYS] if isinstance(content, dict) else [content]
        for value in values:
            if type(value) is int and 0 <= value < 10**9:
                return value
            if isinstance(value, str) and value and "\0" not in value:
                return value.encode("utf-8", "surrogatepass")
    return None


def _classes(root: Path, found: dict[str, list[Sample]]) -> tuple[list[bytes], dict[Label, int]]:
    """The class names, and the index of each label. Samples without a label are given their folder's."""
    for samples in found.values():
        samples[:] = [s if s.label is not None else s._replace(label=s.folder) for s in samples]
        lacking = next((sample for sample in samples if not sample.label and sample.label != 0), None)
        if lacking is not None:
            raise ConfigError(
                f"data.root={root}: {printable(lacking.name)} has no label: neither a .cls nor a .json with one of "
                f"{', '.join(_LABEL_KEYS)}, nor a folder in its name."
            )
        if not samples:
            raise ConfigError(f"data.root={root}: its shards hold no pictures.")
    every: list[set[Any]] = [{sample.label for sample in samples} for samples in (found[TRAIN], found.get(VAL, []))]
    if len({type(label) for labels in every for label in labels}) > 1:
        raise ConfigError(f"data.root={root}: some labels are numbers and others are names; make these shards anew.")
    labels, strange = sorted(every[0]), sorted(every[1] - every[0])
    if strange:
        raise ConfigError(
            f"data.root={root}: the validation set has {len(strange)} classes that the training set has not, such as "
            f"{strange[0]!r}; make them fit."
        )
    names = [label if isinstance(label, bytes) else b"%d" % label for label in labels]
    pairs = {(sample.label, sample.folder) for sample in found[TRAIN]}
    return classes_by_folder(pairs, labels) or names, {label: index for index, label in enumerate(labels)}


def _folder(name: bytes) -> bytes | None:
    folder, slash, _ = name.partition(b"/")
    return folder if slash else None


def classes_by_folder(pairs: Collection[tuple[Label, bytes | None]], labels: Sequence[Label]) -> list[bytes]:
    """The folders in the order of `labels`, where each label has one to itself in that order; empty where not.

    `pairs`: each different pair of a sample's label and folder.
    """
    folders = dict(pairs)
    named = [folder for folder in (folders[label] for label in labels) if folder is not None]
    return named if len(pairs) == len(labels) == len(named) and named == sorted(set(named)) else []
