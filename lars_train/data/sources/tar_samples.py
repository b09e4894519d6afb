"""Read the samples of one tar in webdataset's layout: group the members, and find the image and the label of each.

Adjacent members whose names agree up to the first dot of the file name are one sample
(https://github.com/webdataset/webdataset, "WebDataset Format"). Its label is in ``.cls`` or ``.json``. A middle part of
digits belongs to the name (``cat.0.jpg``, ``cat.1.jpg``). If a sample still has several images, data.image_key chooses
one. For a sample without a label, other possible labels are collected as hints; `label_place` chooses among them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lars_train.data.sources.tars import BadTar, Member, members
from lars_train.data.sources.tree import HiddenFilter, count_skipped, is_image
from lars_train.messages import listed, printable

LABEL_KEYS = ("label", "cls", "class")
"""The keys of a label in JSON."""

# Size limits in bytes: of a member with a class number or name, of one that must be a number, and of one with JSON.
_MAX_CLS, _MAX_NUMBER, _MAX_JSON = 1024, 16, 1 << 20
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_BOM = b"\xef\xbb\xbf"

# Further extensions and JSON keys of labels: those that webdataset decodes as a class, and those of common data sets.
_WORDS = (
    "cls2 lbl label_id label_name class_id class_idx class_index class_name category category_id category_name target "
    "wnid synset"
)
_HINTS = frozenset((*LABEL_KEYS, *_WORDS.split()))
# Extensions of members that may hold a label. A .txt usually holds a caption, but may be a label if it is a number.
_MAY_LABEL = frozenset(word.encode() for word in (*_HINTS, "txt", "json"))
# Suffixes that suggest a label, also in members that belong to no image.
_LIKE_LABELS = _MAY_LABEL | {b"npy"}
# The most distinct JSON keys that are counted, and the most characters of a key.
_MAX_KEYS, _MAX_KEY_LENGTH = 1000, 40
# With more images than this in a sample, the likely cause is dots in the names of images.
_MANY_IMAGES = 5

Label = int | bytes | None
"""A class, by number or by name; None without a label."""


class LabelPlace(NamedTuple):
    """A possible place of the label: a member with this extension, or a key of its JSON."""

    extension: str
    key: str = ""


Hints = tuple[tuple[LabelPlace, int | bytes], ...]
"""Possible labels of a sample that has none in ``.cls`` or under a key in `LABEL_KEYS`."""


class Unclear(Exception):
    """The names or labels in a shard are invalid or ambiguous; str(e) has the remedy."""


class TarSample(NamedTuple):
    """An image: its name, its position, its label as stored, the folder in its name, and its hints."""

    name: bytes
    shard: int
    offset: int
    size: int
    label: Label
    folder: bytes
    hints: Hints = ()


class _LabelReading(NamedTuple):
    """The label of an image and the extensions of the members that hold it, or the hints if there is none."""

    label: Label = None
    extensions: tuple[bytes, ...] = ()
    hints: Hints = ()


def read_samples(
    handle: int,
    shard: int,
    keys: tuple[str, ...],
    skipped: Counter[str],
    candidates: Counter[LabelPlace],
    orphans: Counter[bytes],
) -> Iterator[TarSample]:
    """Yield the samples of the tar open at `handle`, which is shard number `shard`.

    `keys`: the extensions to read from samples with several images, the preferred one first. `skipped` counts the
    members that belong to no sample or are not read. `candidates` counts the members that may hold a label, in
    samples without one in the usual places. `orphans` counts the ``.cls`` members that belong to no image, under the
    name of the first one.
    Raises `BadTar`, `Unclear` and OSError.
    """
    hidden = HiddenFilter(skipped)
    shown = (member for member in members(handle, skipped) if not hidden.hides(_clean_name(member)))
    interned: dict[Hints, Hints] = {}  # so that samples of a class share their hints
    for _, group in groupby(shown, key=_key):
        parts = list(group)
        by_key: dict[bytes, list[Member]] = {}
        for part in parts:
            by_key.setdefault(_long_key(part), []).append(part)
        images = {key: _image(own, keys, skipped) for key, own in by_key.items()}
        with_image = [key for key, image in images.items() if image is not None]
        readings = {key: _read_label(handle, by_key[key], candidates) for key in with_image}
        # A member without a number in its name may hold the label of all images in the group.
        short_key = _key(parts[0])
        unlabeled = any(reading.label is None for reading in readings.values())
        if short_key in by_key and short_key not in readings and unlabeled:
            readings[short_key] = _read_label(handle, by_key[short_key], candidates)
        shared = readings.get(short_key, _LabelReading())
        # In a group of only label members, all are orphans. In a group with an image, a label that was not read is an
        # orphan: x.1.cls beside x.jpg. In a group of other files, assume that the label belongs to one of them.
        may_be_orphans = any(images.values()) or {_suffix(part) for part in parts} <= _LIKE_LABELS
        may_be_orphans = may_be_orphans and all(reading.label is None for reading in readings.values())
        for key, own in by_key.items():
            reading = readings.get(key, _LabelReading())
            label = shared.label if reading.label is None else reading.label
            for part in own:
                extension = _short_extension(part)
                used = _is_image_member(part) or extension in reading.extensions or extension == b"cls"
                if key in readings and used:
                    continue
                if key in readings and label is None and extension in _MAY_LABEL:
                    candidates[LabelPlace(extension.decode())] += 1
                else:
                    count_skipped(skipped, part.name.rpartition(b"/")[2])
                    if may_be_orphans and _suffix(part) == b"cls":
                        orphans[next(iter(orphans), part.name)] += 1
                    elif may_be_orphans and _suffix(part) in _LIKE_LABELS:
                        # Adding 0 only records the place, for the note on labels: `skipped` already counts the member.
                        candidates[LabelPlace(_suffix(part).decode())] += 0
            image = images[key]
            if image is not None:
                hints = reading.hints or shared.hints
                name = _clean_name(image)
                folder = name.rpartition(b"/")[0]
                yield TarSample(name, shard, *image[1:], label, folder, interned.setdefault(hints, hints))


def label_place(samples: Iterable[TarSample]) -> LabelPlace | None:
    """Return the place from which to read the labels of the unlabeled `samples`; None if that is uncertain.

    Every sample must have a hint at the place. If several places qualify, they must define the same classes. The first
    one with numbers is then chosen, because numbers define the order of the classes.
    """
    tables = [dict(hints) for hints in {sample.hints for sample in samples}]
    shared = sorted(set(tables[0]).intersection(*tables)) if tables else []
    rows = {tuple(table[place] for place in shared) for table in tables}
    if any(len(set(column)) < len(rows) for column in zip(*rows, strict=True)):
        return None
    numbers = [place for place in shared if all(type(table[place]) is int for table in tables)]
    return next(iter((*numbers, *shared)), None)


def _image(parts: Sequence[Member], keys: tuple[str, ...], skipped: Counter[str]) -> Member | None:
    """Return the image of a sample; None if it has none. Raises `Unclear` for several without a matching key."""
    extensions = [_short_extension(part) for part in parts]
    times = Counter(extensions)
    twice = next((part for part, extension in zip(parts, extensions, strict=True) if times[extension] > 1), None)
    if twice is not None:
        raise Unclear(f"{printable(twice.name)} appears twice; make these shards again")
    images = {_short_extension(part).decode("latin-1"): part for part in parts if _is_image_member(part)}
    if len(images) <= 1:
        return next(iter(images.values()), None)
    chosen = next((images[key] for key in keys if key in images), None)
    if chosen is None:
        sample, shown = printable(_long_key(parts[0])), listed(list(images))
        wrong = f"several images, but none for data.image_key={':'.join(keys)}" if keys else "several images"
        # Prefer a plain extension: x.jpg before x.mask.png.
        plain = min(images, key=lambda extension: extension.count("."))
        if "." in plain and (len(images) > _MANY_IMAGES or any(map(str.isdigit, plain.split(".")))):
            folder, slash, base = _clean_name(images[plain]).rpartition(b"/")
            stem, dot, suffix = base.rpartition(b".")
            better = folder + slash + stem.replace(b".", b"_") + dot + suffix
            raise Unclear(
                f"the sample {sample} has several images ({shown}), because a sample's name ends at the first dot; "
                f"replace the other dots in the names of images and labels, as in {printable(better)}"
            )
        likely = ":".join((*keys, printable(plain)))
        raise Unclear(
            f"the sample {sample} has {wrong} ({shown}); name the extension of the one to read, such as "
            f"data.image_key={likely}, or give each image another name before the first dot"
        )
    skipped["images not chosen by data.image_key"] += len(images) - 1
    return chosen


def _clean_name(member: Member) -> bytes:
    return member.name.removeprefix(b"./")


def _key(member: Member) -> bytes:
    folder, slash, base = _clean_name(member).rpartition(b"/")
    return folder + slash + base.partition(b".")[0]


def _extension(member: Member) -> bytes:
    return member.name.rpartition(b"/")[2].partition(b".")[2].lower()


def _suffix(member: Member) -> bytes:
    return _extension(member).rpartition(b".")[2]


def _short_extension(member: Member) -> bytes:
    """Return the extension without leading parts of digits, but always with its last part: ``jpg`` for ``0.jpg``."""
    extension = _extension(member)
    if not extension[:1].isdigit():
        return extension
    parts = extension.split(b".")
    while len(parts) > 1 and parts[0].isdigit():
        del parts[0]
    return b".".join(parts)


def _long_key(member: Member) -> bytes:
    """Return the key including the digits that `_short_extension` removes."""
    short = _short_extension(member)
    return _clean_name(member)[: -len(short) - 1] if short else _clean_name(member)


def _is_image_member(member: Member) -> bool:
    return is_image(b"." + _extension(member))


def _read_label(handle: int, parts: Sequence[Member], candidates: Counter[LabelPlace]) -> _LabelReading:
    """Read the label in ``.cls`` or, without one, in ``.json``. Raises `Unclear` if the two contradict each other.

    Without a label, reads the hints, and counts the keys in JSON in `candidates`.
    """
    by_extension = {_short_extension(part): part for part in parts}
    cls, metadata = by_extension.get(b"cls"), by_extension.get(b"json")
    if cls is not None:
        return _read_cls(handle, cls, metadata)
    content = None if metadata is None else _json(handle, metadata)
    label = None if metadata is None else _label_in_json(metadata, content)
    if label is not None:
        return _LabelReading(label, (b"json",))
    hints: list[tuple[LabelPlace, int | bytes]] = []
    for extension in by_extension.keys() & _MAY_LABEL - {b"json"}:
        hint = _hint_in_text(handle, by_extension[extension], number=extension == b"txt")
        if hint is not None:
            hints.append((LabelPlace(extension.decode()), hint))
    for key, value in content.items() if isinstance(content, dict) else ():
        place = LabelPlace("json", printable(key)[:_MAX_KEY_LENGTH])
        if key and (place in candidates or len(candidates) < _MAX_KEYS):
            candidates[place] += 1
        hint = _as_label(value)
        if key.lower() in _HINTS and hint is not None:
            hints.append((place, hint))
    return _LabelReading(hints=tuple(hints))


def _read_cls(handle: int, cls: Member, metadata: Member | None) -> _LabelReading:
    label = _label_in_cls(handle, cls)
    try:
        other = None if metadata is None else _label_in_json(metadata, _json(handle, metadata))
    except (BadTar, Unclear):
        # The label is in .cls, so JSON that cannot be read does no harm.
        other = None
    if isinstance(other, bytes) and other.isdigit() and len(other) < 10:
        other = int(other)
    # A number and a name may denote the same class.
    if metadata is not None and type(other) is type(label) and other != label:
        raise Unclear(
            f"{printable(cls.name)} holds the label {format_label(label)} and {printable(metadata.name)} "
            f"{format_label(other)}; correct one, or leave the image out"
        )
    return _LabelReading(label, (b"cls",) if other is None else (b"cls", b"json"))


def _hint_in_text(handle: int, part: Member, *, number: bool) -> Label:
    """Return the label in a text member: a number or, unless `number` is True, a name. None for anything else."""
    if number and part.size > _MAX_NUMBER:
        return None
    try:
        label = _label_in_cls(handle, part)
    except (BadTar, Unclear):
        return None
    return label if isinstance(label, int) or (not number and printable(label).encode() == label) else None


def _label_in_cls(handle: int, cls: Member) -> int | bytes:
    text = os.pread(handle, min(cls.size, _MAX_CLS + 1), cls.offset).removeprefix(_BOM).strip()
    if not text or len(text) > _MAX_CLS or b"\0" in text:
        raise BadTar(f"{printable(cls.name)} holds no label")
    if is_invalid_number(text):
        raise _invalid_label(cls, printable(text))
    return int(text) if text.isdigit() and len(text) < 10 else text


def _json(handle: int, metadata: Member) -> Any:
    if metadata.size > _MAX_JSON:
        raise Unclear(f"{printable(metadata.name)} is larger than {_MAX_JSON >> 20} MiB; put labels in .cls files")
    try:
        return json.loads(os.pread(handle, metadata.size, metadata.offset))
    except (ValueError, RecursionError):
        raise BadTar(f"{printable(metadata.name)} is not valid JSON") from None


def _label_in_json(metadata: Member, content: Any) -> Label:
    if isinstance(content, list):
        return None
    values = [content.get(key) for key in LABEL_KEYS] if isinstance(content, dict) else [content]
    value = next((value for value in values if value is not None), None)
    label = _as_label(value)
    if label is None and value is not None:
        raise _invalid_label(metadata, json.dumps(value))
    return label


def _as_label(value: Any) -> Label:
    """Return the class that a JSON value denotes; None if it cannot be a class."""
    if isinstance(value, str):
        label = value.encode("utf-8", "surrogatepass")
        return label if value and "\0" not in value and not is_invalid_number(label) else None
    return value if type(value) is int and 0 <= value < 10**9 else None


def format_label(label: Label) -> str:
    """Return a label for a message, cut to 80 characters."""
    return printable(label if isinstance(label, bytes) else str(label))[:80]


def is_invalid_number(label: bytes) -> bool:
    """Return True if `label` is a number, but not a class number: it has a sign, or is not an integer."""
    return _NUMBER.fullmatch(label) is not None and not label.isdigit()


def _invalid_label(member: Member, shown: str) -> Unclear:
    return Unclear(
        f"{printable(member.name)} holds the label {printable(shown)[:80]}; a label must be a class number (0, 1, ...) "
        "or a class name: correct it, or leave the image out"
    )
