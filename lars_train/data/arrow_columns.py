"""Find the columns of images, labels and paths in a table of Hugging Face.

Images lie in a column of type Image (https://huggingface.co/docs/datasets/about_dataset_features), which is a struct of
``bytes`` and ``path``, or in a plain binary column. Labels lie in a column of type ClassLabel. The schema's metadata
gives these types and the class names in JSON; without metadata, the column names decide.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lars_train.errors import ConfigError
from lars_train.messages import first_line, printable

# Column names that are recognized without metadata, in order of preference.
_IMAGES = ("image", "img")
_LABELS = ("label", "labels", "fine_label", "cls", "class")


class NoLabels(ConfigError):
    """No column holds labels."""


@dataclass(frozen=True)
class Columns:
    """The leaves of a schema that hold images, paths and labels, and the class names."""

    image: str
    """The leaf of the encoded images, such as ``image.bytes``."""
    path: tuple[str, str] | None
    """The column and the field of the image paths; None if there are no paths."""
    label: str
    classes: tuple[str, ...] | None
    """The class names from the metadata; None if the metadata has none."""
    others: int = 0
    """Other columns that could be the images or the labels."""


def pyarrow() -> Any:
    """Import and return pyarrow. Raises `ConfigError` if it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(
            "Arrow and parquet files require pyarrow, which is not installed: pip install pyarrow."
        ) from error
    return pyarrow


def only_paths(path: Path, column: str) -> ConfigError:
    """Return the error for a file whose `column` holds paths but no images."""
    return ConfigError(
        f"{path}: {column} holds only the paths of images, not the images. Pass the folder of these images, or a "
        "version of the data set that contains them."
    )


@contextlib.contextmanager
def damage_as_config_error(path: Path, remedy: str) -> Iterator[None]:
    """Raise `ConfigError` with the `remedy` if the block fails because the file `path` is damaged."""
    arrow = pyarrow()
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except (arrow.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({one_line(error)}); {remedy}.") from error


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type."""
    return printable(first_line(str(error).strip() or type(error).__name__))


def labels_and_paths(batch: Any, columns: Columns) -> tuple[list[int | bytes | None], list[bytes | None]]:
    """Return the labels of a record batch, and the last component of each image's path; None without a path."""
    found = batch.column(columns.label)
    labels = (found if pyarrow().types.is_integer(found.type) else _as_binary(found)).to_pylist()
    paths: list[bytes | None] = [None] * len(batch)
    if columns.path is not None:
        column, name = columns.path
        found = _as_binary(field_of(batch.column(column), name)).to_pylist()
        paths = [None if path is None else path.replace(b"\\", b"/").rpartition(b"/")[2] for path in found]
    return labels, paths


def field_of(column: Any, name: str) -> Any:
    """Return a field of a struct array, null where the struct is null."""
    return column.flatten()[column.type.get_field_index(name)]


def _as_binary(text: Any) -> Any:
    """Return an array of strings as binary, because they may be invalid UTF-8."""
    arrow = pyarrow()
    if arrow.types.is_dictionary(text.type):
        text = text.dictionary_decode()
    return text.cast(arrow.binary() if arrow.types.is_string(text.type) else arrow.large_binary())


def columns_of(path: Path, schema: Any) -> Columns:
    """Return the columns to read from the file `path` with this Arrow schema. Raises `ConfigError`, `NoLabels`."""
    types = pyarrow().types
    features = _features(path, schema)
    images = _candidates(schema.names, features, "Image", _IMAGES)
    column = _pick(images, _IMAGES)
    if column is None:
        raise ConfigError(f"{path}: unclear which column holds the images. {_expected('Image', _IMAGES, schema)}")
    kind, path_leaf = schema.field(column).type, None
    image = column
    if types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        image, kind = f"{column}.bytes", fields.get("bytes", pyarrow().string())
        if "path" in fields and _is_text(fields["path"]):
            path_leaf = (column, "path")
    if _is_text(kind) or types.is_null(kind):
        raise only_paths(path, column)
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise ConfigError(f"{path}: column {column} is of type {kind}; encoded images are of type binary.")
    labels = _candidates(schema.names, features, "ClassLabel", _LABELS)
    label = _pick(labels, _LABELS)
    if label is None:
        raise NoLabels(f"{path}: unclear which column holds the labels. {_expected('ClassLabel', _LABELS, schema)}")
    kind = schema.field(label).type
    if not (types.is_integer(kind) or _is_text(kind)):
        raise ConfigError(f"{path}: column {label} is of type {kind}; a label is an integer or a string.")
    classes = features.get(label, {}).get("names")
    others = len(images) + len(labels) - 2
    return Columns(image, path_leaf, label, None if classes is None else tuple(map(str, classes)), others)


def _features(path: Path, schema: Any) -> dict[str, dict[str, Any]]:
    """Return the entry of each column in Hugging Face's metadata; empty without metadata."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
        return {str(name): about for name, about in features.items() if isinstance(about, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{path}: its Hugging Face metadata is damaged; download it again.") from None


def _candidates(
    names: Sequence[str], features: dict[str, dict[str, Any]], kind: str, usual: Sequence[str]
) -> list[str]:
    """Return the columns of the feature type `kind`; if there are none, the columns with a `usual` name."""
    typed = [name for name in names if features.get(name, {}).get("_type") == kind]
    return typed or [name for name in names if name in usual]


def _pick(found: Sequence[str], usual: Sequence[str]) -> str | None:
    return next((name for name in usual if name in found), found[0] if len(found) == 1 else None)


def _is_text(kind: Any) -> bool:
    types = pyarrow().types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _expected(kind: str, usual: Sequence[str], schema: Any) -> str:
    shown = ", ".join(schema.names) or "none"
    return f"Expected a column of type {kind}, or one called {' or '.join(usual)}; the columns are {shown}."
