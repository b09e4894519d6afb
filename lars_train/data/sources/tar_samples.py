"""The samples of one tar in webdataset's layout: which members belong together, and which of them is the image.

Neighbours whose names agree up to the first dot of their last part are one sample
(https://github.com/webdataset/webdataset, "WebDataset Format"), with the label in ``.cls`` or ``.json``. A middle part
of digits counts as a part of the name (``cat.0.jpg``, ``cat.1.jpg``); where a sample still has several images, the
user decides. What else may be the label of a sample without one is handed on: `label_place` chooses.
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

# Bytes of a label: its number or name, the number alone, and a JSON with what else is known of an image.
_MOST_CLS, _MOST_NUMBER, _MOST_JSON = 1024, 16, 1 << 20
_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_BOM = b"\xef\xbb\xbf"

# Other extensions and keys of a label: those that webdataset decodes as a class, and those of common data sets.
_WORDS = (
    "cls2 lbl label_id label_name class_id class_idx class_index class_name category category_id category_name target "
    "wnid synset"
)
_HINTS = frozenset((*LABEL_KEYS, *_WORDS.split()))
# Members that may hold a label: captions do where each is a number.
_MAY_LABEL = frozenset(word.encode() for word in (*_HINTS, "txt", "json"))
# Suffixes of members that look like labels, wherever they lie.
_LIKE_LABELS = _MAY_LABEL | {b"npy"}
# Different keys of JSON that are remembered, and characters of one.
_MOST_KEYS, _LONGEST_KEY = 1000, 40
# Images in a sample above which dots in the names of images are the likely cause.
_MANY_IMAGES = 5

Label = int | bytes | None
"""A class by its number or its name; None without a label."""


class Place(NamedTuple):
    """A place where a label may stand: a member with this extension, or a key of its JSON."""

    extension: str
    key: str = ""


Hints = tuple[tuple[Place, int | bytes], ...]
"""Candidates for the label of a sample that has none in ``.cls`` or under a key in `LABEL_KEYS`."""


class Unclear(Exception):
    """The names or labels in a shard have no meaning, or several; str(e) says what to do."""


class TarSample(NamedTuple):
    """An image: its name, where it lies, its label as it stands there, all folders in its name, and its hints."""

    name: bytes
    shard: int
    offset: int
    size: int
    label: Label
    folder: bytes
    hints: Hints = ()


class _Reading(NamedTuple):
    """The label beside an image, the extensions of the members that hold it, and the hints where there is none."""

    label: Label = None
    by: tuple[bytes, ...] = ()
    hints: Hints = ()


def samples_of(
    handle: int,
    shard: int,
    keys: tuple[str, ...],
    skipped: Counter[str],
    beside: Counter[Place],
    loose: Counter[bytes],
) -> Iterator[TarSample]:
    """The samples of the tar open at `handle`, the shard by the number `shard`.

    `keys`: extensions of the image to read where a sample has several, the first that it has. `skipped` counts what
    belongs to no sample or is not read, `beside` what may hold the label of one without, `loose` under the name of the
    first those ``.cls`` that belong to no image. Raises `BadTar`, `Unclear`, OSError.
    """
    hidden = HiddenFilter(skipped)
    shown = (member for member in members(handle, skipped) if not hidden.hides(_plain(member)))
    same: dict[Hints, Hints] = {}  # as many as there are labels: memory for one of each
    for _, group in groupby(shown, key=_key):
        parts = list(group)
        by_key: dict[bytes, list[Member]] = {}
        for part in parts:
            by_key.setdefault(_long_key(part), []).append(part)
        images = {key: _image(own, keys, skipped) for key, own in by_key.items()}
        with_image = [key for key, image in images.items() if image is not None]
        readings = {key: _read_label(handle, by_key[key], beside) for key in with_image}
        # A member without a number in its name may hold the label of all images in the group.
        bare = _key(parts[0])
        if bare in by_key and bare not in readings and any(reading.label is None for reading in readings.values()):
            readings[bare] = _read_label(handle, by_key[bare], beside)
        of_all = readings.get(bare, _Reading())
        # Labels without an image: alone in the group, or with a longer name than the image's. Beside a file of another
        # kind they are that file's.
        apart = any(images.values()) or {_suffix(part) for part in parts} <= _LIKE_LABELS
        apart = apart and all(reading.label is None for reading in readings.values())
        for key, own in by_key.items():
            reading = readings.get(key, _Reading())
            label = of_all.label if reading.label is None else reading.label
            for part in own:
                extension = _short_extension(part)
                if key in readings and (_holds_image(part) or extension in reading.by or extension == b"cls"):
                    continue
                if key in readings and label is None and extension in _MAY_LABEL:
                    beside[Place(extension.decode())] += 1
                else:
                    count_skipped(skipped, part.name.rpartition(b"/")[2])
                    if apart and _suffix(part) == b"cls":
                        loose[next(iter(loose), part.name)] += 1
                    elif apart and _suffix(part) in _LIKE_LABELS:
                        # The note on labels names it; the line on what is skipped has counted it.
                        beside[Place(_suffix(part).decode())] += 0
            image = images[key]
            if image is not None:
                hints = reading.hints or of_all.hints
                name = _plain(image)
                folder = name.rpartition(b"/")[0]
                yield TarSample(name, shard, *image[1:], label, folder, same.setdefault(hints, hints))


def label_place(samples: Iterable[TarSample]) -> Place | None:
    """The place of the label in the hints of `samples`, none of which has a label; None where it is not certain.

    Each has one there; where there are several such places, they must divide the samples into the same classes: then
    it is the first with numbers, which have an order of their own.
    """
    tables = [dict(hints) for hints in {sample.hints for sample in samples}]
    shared = sorted(set(tables[0]).intersection(*tables)) if tables else []
    rows = {tuple(table[place] for place in shared) for table in tables}
    if any(len(set(column)) < len(rows) for column in zip(*rows, strict=True)):
        return None
    numbers = [place for place in shared if all(type(table[place]) is int for table in tables)]
    return next(iter((*numbers, *shared)), None)


def _image(parts: Sequence[Member], keys: tuple[str, ...], skipped: Counter[str]) -> Member | None:
    """The image of a sample; None where it has none."""
    extensions = [_short_extension(part) for part in parts]
    times = Counter(extensions)
    twice = next((part for part, extension in zip(parts, extensions, strict=True) if times[extension] > 1), None)
    if twice is not None:
        raise Unclear(f"{printable(twice.name)} is in it twice; make these shards again")
    images = {_short_extension(part).decode("latin-1"): part for part in parts if _holds_image(part)}
    if len(images) <= 1:
        return next(iter(images.values()), None)
    chosen = next((images[key] for key in keys if key in images), None)
    if chosen is None:
        sample, shown = printable(_long_key(parts[0])), listed(list(images))
        wrong = f"several images, none of data.image_key={':'.join(keys)}" if keys else "several images"
        # A plain extension first: x.jpg before x.mask.png.
        plain = min(images, key=lambda extension: extension.count("."))
        if "." in plain and (len(images) > _MANY_IMAGES or any(map(str.isdigit, plain.split(".")))):
            folder, slash, base = _plain(images[plain]).rpartition(b"/")
            stem, dot, suffix = base.rpartition(b".")
            better = folder + slash + stem.replace(b".", b"_") + dot + suffix
            raise Unclear(
                f"the sample {sample} has several images ({shown}), for a sample's name ends at the first dot; "
                f"replace the other dots in the names of images and labels, as in {printable(better)}"
            )
        likely = ":".join((*keys, printable(plain)))
        raise Unclear(
            f"the sample {sample} has {wrong} ({shown}); name the extension of the one to read, such as "
            f"data.image_key={likely}, or give each image another name before the first dot"
        )
    skipped["images beside that of data.image_key"] += len(images) - 1
    return chosen


def _plain(member: Member) -> bytes:
    return member.name.removeprefix(b"./")


def _key(member: Member) -> bytes:
    folder, slash, base = _plain(member).rpartition(b"/")
    return folder + slash + base.partition(b".")[0]


def _extension(member: Member) -> bytes:
    return member.name.rpartition(b"/")[2].partition(b".")[2].lower()


def _suffix(member: Member) -> bytes:
    return _extension(member).rpartition(b".")[2]


def _short_extension(member: Member) -> bytes:
    """The extension without leading parts of digits, unless there is nothing else: ``0.jpg`` is ``jpg``."""
    extension = _extension(member)
    if not extension[:1].isdigit():
        return extension
    parts = extension.split(b".")
    while len(parts) > 1 and parts[0].isdigit():
        del parts[0]
    return b".".join(parts)


def _long_key(member: Member) -> bytes:
    """The key with those parts."""
    short = _short_extension(member)
    return _plain(member)[: -len(short) - 1] if short else _plain(member)


def _holds_image(member: Member) -> bool:
    return is_image(b"." + _extension(member))


def _read_label(handle: int, parts: Sequence[Member], beside: Counter[Place]) -> _Reading:
    """The label in ``.cls`` or, without one, in ``.json``. Raises `Unclear` where the two contradict each other.

    Without a label the hints, and `beside` counts the keys in JSON.
    """
    by_extension = {_short_extension(part): part for part in parts}
    cls, about = by_extension.get(b"cls"), by_extension.get(b"json")
    if cls is not None:
        return _read_cls(handle, cls, about)
    content = None if about is None else _json(handle, about)
    label = None if about is None else _label_in_json(about, content)
    if label is not None:
        return _Reading(label, (b"json",))
    hints: list[tuple[Place, int | bytes]] = []
    for extension in by_extension.keys() & _MAY_LABEL - {b"json"}:
        hint = _hint_in_text(handle, by_extension[extension], number=extension == b"txt")
        if hint is not None:
            hints.append((Place(extension.decode()), hint))
    for key, value in content.items() if isinstance(content, dict) else ():
        place = Place("json", printable(key)[:_LONGEST_KEY])
        if key and (place in beside or len(beside) < _MOST_KEYS):
            beside[place] += 1
        hint = _as_label(value)
        if key.lower() in _HINTS and hint is not None:
            hints.append((place, hint))
    return _Reading(hints=tuple(hints))


def _read_cls(handle: int, cls: Member, about: Member | None) -> _Reading:
    label = _label_in_cls(handle, cls)
    try:
        other = None if about is None else _label_in_json(about, _json(handle, about))
    except (BadTar, Unclear):
        # The JSON describes something else.
        other = None
    if isinstance(other, bytes) and other.isdigit() and len(other) < 10:
        other = int(other)
    # A number and a name may well be the same class.
    if about is not None and type(other) is type(label) and other != label:
        raise Unclear(
            f"{printable(cls.name)} holds the label {shown_label(label)} and {printable(about.name)} "
            f"{shown_label(other)}; correct one, or leave the image out"
        )
    return _Reading(label, (b"cls",) if other is None else (b"cls", b"json"))


def _hint_in_text(handle: int, part: Member, *, number: bool) -> Label:
    """The number or, unless it must be a `number`, the name in a member of text; None for what is neither."""
    if number and part.size > _MOST_NUMBER:
        return None
    try:
        label = _label_in_cls(handle, part)
    except (BadTar, Unclear):
        return None
    return label if isinstance(label, int) or (not number and printable(label).encode() == label) else None


def _label_in_cls(handle: int, cls: Member) -> int | bytes:
    text = os.pread(handle, min(cls.size, _MOST_CLS + 1), cls.offset).removeprefix(_BOM).strip()
    if not text or len(text) > _MOST_CLS or b"\0" in text:
        raise BadTar(f"{printable(cls.name)} holds no label")
    if is_odd_number(text):
        raise _odd(cls, printable(text))
    return int(text) if text.isdigit() and len(text) < 10 else text


def _json(handle: int, about: Member) -> Any:
    if about.size > _MOST_JSON:
        raise Unclear(f"{printable(about.name)} is larger than {_MOST_JSON >> 20} MiB; put labels in .cls files")
    try:
        return json.loads(os.pread(handle, about.size, about.offset))
    except (ValueError, RecursionError):
        raise BadTar(f"{printable(about.name)} is no JSON") from None


def _label_in_json(about: Member, content: Any) -> Label:
    if isinstance(content, list):
        return None
    values = [content.get(key) for key in LABEL_KEYS] if isinstance(content, dict) else [content]
    value = next((value for value in values if value is not None), None)
    label = _as_label(value)
    if label is None and value is not None:
        raise _odd(about, json.dumps(value))
    return label


def _as_label(value: Any) -> Label:
    """The class that a value in JSON stands for; None for what is none."""
    if isinstance(value, str):
        label = value.encode("utf-8", "surrogatepass")
        return label if value and "\0" not in value and not is_odd_number(label) else None
    return value if type(value) is int and 0 <= value < 10**9 else None


def shown_label(label: Label) -> str:
    """Return a label for a message, cut to 80 characters."""
    return printable(label if isinstance(label, bytes) else str(label))[:80]


def is_odd_number(label: bytes) -> bool:
    """Return True for the text of a number that is not one of a class: negative, signed, or not whole."""
    return _NUMBER.fullmatch(label) is not None and not label.isdigit()


def _odd(member: Member, shown: str) -> Unclear:
    return Unclear(
        f"{printable(member.name)} holds the label {printable(shown)[:80]}; a label is the number of a class (0, 1, "
        "...) or its name: correct it, or leave the image out"
    )
