"""``mode=export``: from a checkpoint to a file whose suffix says its format, whole or not there, and its card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lars_train.config import Config
from lars_train.data.directory import user_path
from lars_train.durable import write_whole
from lars_train.errors import ConfigError, DataError
from lars_train.export.card import MARK, beside, card
from lars_train.export.formats import WRITERS
from lars_train.export.origin import origin
from lars_train.models.factory import build_model, is_torchvisions, load_state
from lars_train.training import checkpoint

CARD = "MODEL.md"


def export(config: Config) -> tuple[Path, str]:
    """Write the checkpoint's network, weights in float32, and ``MODEL.md`` beside it; the file, and a word on it.

    ``export.path`` is a ``.pth``, ``.pt``, ``.safetensors`` or ``.onnx`` file; without it a ``.pth`` beside the
    checkpoint. Raises `ConfigError`, and `DataError` for a graph that does not compute what the network does.
    """
    assert config.checkpoint.path is not None
    source, content = checkpoint.find(config.checkpoint.path)
    name = str(checkpoint.value(content, "config", "model", "name"))
    # First of all, for the name becomes part of a file's.
    network = build_model(name, num_classes=len(content["classes"]), ghost_batch=1, zero_gamma=False)
    load_state(network, content["model"], f"checkpoint.path={config.checkpoint.path}")
    target = (
        user_path(config.export.path) if config.export.path else source.with_name(f"{name}-{source.stem}-weights.pth")
    )
    _check_target(target, source, config)
    about = origin(source, content)
    if target.suffix == ".onnx" and not isinstance(about["image_size"], int):
        raise ConfigError(f"checkpoint.path={config.checkpoint.path}: it does not say the size of the images.")
    # The suffix tells some writers the format.
    partial = target.with_name(f".partial-{target.name}")
    try:
        told = WRITERS[target.suffix](partial, network, about)
        # Some writers leave a file that its owner alone can read.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        partial.replace(target)
        _describe(target, about)
    except DataError:
        raise
    except (OSError, RuntimeError) as error:  # torch reports a file that it cannot write as RuntimeError
        raise ConfigError(f"export.path={target}: it cannot be written ({str(error).splitlines()[0]}).") from None
    finally:
        partial.unlink(missing_ok=True)
    return target, told


def _describe(target: Path, about: dict[str, Any]) -> None:
    path = target.with_name(CARD)
    text = card(target.name, about, torchvision=is_torchvisions(about["model"]))
    former = path.read_text(errors="replace") if path.exists() else ""
    write_whole(path, [beside(text, former, {file.name for file in target.parent.iterdir()}).encode()])


def _check_target(target: Path, source: Path, config: Config) -> None:
    if target.suffix not in WRITERS:
        raise ConfigError(
            f"export.path={config.export.path}: its suffix says the format; choose one of {', '.join(WRITERS)}."
        )
    if target.resolve() in {path.resolve() for path in (source, *checkpoint.listing(source.parent))}:
        raise ConfigError(
            f"export.path={config.export.path}: it is a checkpoint of the run; give another file to write."
        )
    if target.is_dir():
        raise ConfigError(f"export.path={config.export.path}: it is a folder; give the file to write.")
    if not target.parent.is_dir():
        raise ConfigError(f"export.path={target}: the folder {target.parent} does not exist.")
    there = target.with_name(CARD)
    if there.exists() and not _is_ours(there):
        raise ConfigError(
            f"export.path={target}: {there} is not lars-train's, which writes one there; choose another folder."
        )


def _is_ours(path: Path) -> bool:
    try:
        return path.is_file() and path.read_bytes().startswith(MARK.encode())
    except OSError:
        return False
