"""Which columns of a parquet file hold pictures and labels, as Hugging Face's hub has them.

A picture is in a column of type Image (https://huggingface.co/docs/datasets/about_dataset_features), a struct of
``bytes`` and ``path``, or plain binary; its label in one of type ClassLabel. These types and the names of the classes
are JSON in the schema's metadata; without them the columns' names decide. No row is read here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lars_train.errors import ConfigError
from lars_train.pack.parquet import pyarrow

# Names of columns where their types are not told; of several that would do, the first.
_IMAGES = ("image", "img")
_LABELS = ("label", "labels", "fine_label", "cls", "class")


@dataclass(frozen=True)
class Columns:
    """Leaves of the schema: encoded pictures, their paths, their labels; and the names of the classes."""

    picture: str
    path: tuple[str, str] | None
    """The column and the field in it; None where there are no paths."""
    label: str
    classes: tuple[str, ...] | None
    others: int = 0
    """Columns that could be taken for the image's or the label's, and are not."""


class NoLabels(ConfigError):
    """No column holds labels."""


def columns_of(path: Path, schema: Any) -> Columns:
    """The columns of the file `path` with this Arrow schema. Raises `ConfigError`, and `NoLabels` of that kind."""
    types = pyarrow().types
    features = _features(path, schema)
    images = _candidates(schema.names, features, "Image", _IMAGES)
    image = _pick(images, _IMAGES)
    if image is None:
        raise ConfigError(f"{path}: which column holds the pictures? {_among('Image', _IMAGES, schema)}")
    kind, where = schema.field(image).type, None
    picture = image
    if types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        picture, kind = f"{image}.bytes", fields.get("bytes", pyarrow().string())
        if "path" in fields and _is_text(fields["path"]):
            where = (image, "path")
    if _is_text(kind) or types.is_null(kind):
        raise elsewhere(path, image)
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise ConfigError(f"{path}: its column {image} is of type {kind}; encoded pictures are binary.")
    labels = _candidates(schema.names, features, "ClassLabel", _LABELS)
    label = _pick(labels, _LABELS)
    if label is None:
        raise NoLabels(f"{path}: which column holds the labels? {_among('ClassLabel', _LABELS, schema)}")
    kind = schema.field(label).type
    if not (types.is_integer(kind) or _is_text(kind)):
        raise ConfigError(f"{path}: its column {label} is of type {kind}; a label is a number or a name.")
    classes = features.get(label, {}).get("names")
    others = len(images) + len(labels) - 2
    return Columns(picture, where, label, None if classes is None else tuple(map(str, classes)), others)


def elsewhere(path: Path, column: str) -> ConfigError:
    """What to raise where there are no pictures in the file."""
    return ConfigError(
        f"{path}: {column} has only paths of pictures that lie elsewhere; get them, and give "
        "their folder, or a version of the data set with the pictures in it."
    )


def _features(path: Path, schema: Any) -> dict[str, dict[str, Any]]:
    """What Hugging Face's metadata say of each column; empty without them."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
        return {str(name): about for name, about in features.items() if isinstance(about, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{path}: its metadata for Hugging Face are not to be understood; get it again.") from None


def _candidates(
    names: Sequence[str], features: dict[str, dict[str, Any]], kind: str, usual: Sequence[str]
) -> list[str]:
    """The columns of a type; where none has it, those that are called so."""
    typed = [name for name in names if features.get(name, {}).get("_type") == kind]
    return typed or [name for name in names if name in usual]


def _pick(found: Sequence[str], usual: Sequence[str]) -> str | None:
    return next((name for name in usual if name in found), found[0] if len(found) == 1 else None)


def _is_text(kind: Any) -> bool:
    types = pyarrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _among(kind: str, usual: Sequence[str], schema: Any) -> str:
    shown = ", ".join(schema.names) or "none"
    return f"Wanted is one of type {kind}, or called {' or '.join(usual)}; it has {shown}."
