"""``mode=export``: write the weights of a checkpoint in the format of the file's suffix, and a model card."""

from __future__ import annotations

import importlib
import json
import os
import re
import warnings
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lars_train.config import Config
from lars_train.errors import ConfigError, DataError
from lars_train.fsutil import user_path, write_atomic
from lars_train.messages import first_line, utf8
from lars_train.models.ema import choose_weights
from lars_train.models.factory import build_model, is_torchvision_model
from lars_train.models.weight_files import KEY
from lars_train.models.weights import load_state
from lars_train.monitoring.summary import FLIPPED
from lars_train.report.files import Unreadable, commit_of, read_lines, read_object
from lars_train.training import checkpoint

CARD = "MODEL.md"
MARK = "<!-- written by lars-train mode=export -->"
"""First line of each card in a MODEL.md. A MODEL.md without this line was not written by lars-train."""

_BUILD_TORCHVISION = "from torchvision.models import get_model\n\nmodel = get_model({model!r}, num_classes={classes})\n"
_BUILD_OURS = (
    "from lars_train.models.factory import build_model  # pip install lars-train; torchvision has no such network\n\n"
    "model = build_model({model!r}, num_classes={classes}, ghost_batch=1, zero_gamma=False{blurpool})\n"
)

_USES = {
    ".pth": ("import torch\n", "model.load_state_dict(torch.load({file!r}, weights_only=True))"),
    ".safetensors": (
        "from safetensors.torch import load_file\n",
        "model.load_state_dict(load_file({file!r}))",
    ),
    ".onnx": (
        "import onnxruntime\n\nsession = onnxruntime.InferenceSession({file!r})\n"
        'logits = session.run(None, {{"images": images}})[0]  # float32 (n, 3, {image_size}, {image_size})',
    ),
}

TOLERANCE = 1e-4
"""Largest difference between the graph's and the network's logits, relative to max(1, the largest logit)."""

_EXTRA = "install it with: pip install '.[export]' in a clone of lars-train"
_CHECKED = 2  # images for the comparison


def export(config: Config) -> tuple[Path, str]:
    """Write the checkpoint's weights in float32, and ``MODEL.md`` beside them. Return the file and a line for the user.

    ``export.path`` is a ``.pth``, ``.pt``, ``.safetensors`` or ``.onnx`` file; by default a ``.pth`` beside the
    checkpoint. ``export.ema``: see `choose_weights`. Raises `ConfigError`, and `DataError` for a graph whose results
    differ from the network's.
    """
    assert config.checkpoint.path is not None
    source, content = checkpoint.find(config.checkpoint.path)
    name = str(checkpoint.value(content, "config", "model", "name"))
    # Build the network first, because this checks the model's name, which becomes part of the file's name.
    blurpool = bool(content["config"]["model"].get("blurpool"))
    network = build_model(name, num_classes=len(content["classes"]), ghost_batch=1, zero_gamma=False, blurpool=blurpool)
    state, average = choose_weights(content, config.export.ema, "export.ema")
    load_state(network, state, f"checkpoint.path={config.checkpoint.path}")
    if source.name.startswith(checkpoint.SET_ASIDE):
        raise ConfigError(
            f"checkpoint.path={config.checkpoint.path}: the run diverged with these weights, and set them aside. "
            "Pass an earlier checkpoint, or the run directory."
        )
    broken = [key for key, value in network.state_dict().items() if not bool(value.isfinite().all())]
    if broken:
        raise ConfigError(
            f"checkpoint.path={config.checkpoint.path}: {source.name} contains values that are not finite "
            f"({broken[0]}{f' and {len(broken) - 1} more' if broken[1:] else ''}): the run diverged. Pass an earlier "
            "checkpoint."
        )
    target = (
        user_path(config.export.path) if config.export.path else source.with_name(f"{name}-{source.stem}-weights.pth")
    )
    _check_target(target, source, config)
    about = origin(source, content, average=average)
    if target.suffix == ".onnx" and not isinstance(about["image_size"], int):
        raise ConfigError(f"checkpoint.path={config.checkpoint.path}: the checkpoint has no image size.")
    # Keep the suffix, by which some writers choose the format.
    partial = target.with_name(f".partial-{target.name}")
    try:
        check = WRITERS[target.suffix](partial, network, about)
        # Some writers create a file that only its owner can read.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        partial.replace(target)
        _describe(target, about)
    except DataError:
        raise
    except (OSError, RuntimeError) as error:  # torch reports a file that it cannot write as RuntimeError
        raise ConfigError(f"export.path={target}: cannot be written ({first_line(error)}).") from None
    finally:
        partial.unlink(missing_ok=True)
    return target, "; ".join(filter(None, ("the average of the weights (model.ema)" if average else "", check)))


def _describe(target: Path, about: dict[str, Any]) -> None:
    path = target.with_name(CARD)
    text = card(target.name, about, torchvision=is_torchvision_model(about["model"]) and not about["blurpool"])
    old_text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    write_atomic(path, [utf8(merge_cards(text, old_text, {file.name for file in target.parent.iterdir()}))])


def _check_target(target: Path, source: Path, config: Config) -> None:
    if target.suffix not in WRITERS:
        raise ConfigError(
            f"export.path={config.export.path}: the suffix selects the format. Use one of {', '.join(WRITERS)}."
        )
    if target.resolve() in {path.resolve() for path in (source, *checkpoint.listing(source.parent))}:
        raise ConfigError(f"export.path={config.export.path}: is a checkpoint of the run. Pass another file to write.")
    if target.is_dir():
        raise ConfigError(f"export.path={config.export.path}: is a folder. Pass a file to write.")
    if not target.parent.is_dir():
        raise ConfigError(f"export.path={target}: the folder {target.parent} does not exist.")
    path = target.with_name(CARD)
    if path.exists() and not _is_ours(path):
        raise ConfigError(
            f"export.path={target}: would overwrite {path}, which lars-train did not write. Choose another folder."
        )


def _is_ours(path: Path) -> bool:
    try:
        return path.is_file() and path.read_bytes().startswith(MARK.encode())
    except OSError:
        return False


def write_torch(path: Path, network: nn.Module, about: dict[str, Any]) -> str:
    """Write the state dict in float32. Return an empty string, because there is no check to report."""
    state: Any = _state(network)
    state._metadata[KEY] = json.dumps(about)
    torch.save(state, path)
    return ""


def write_safetensors(path: Path, network: nn.Module, about: dict[str, Any]) -> str:
    """Write the tensors of the state dict in float32. Return an empty string. Raises `ConfigError`."""
    _require("safetensors", ".safetensors")
    module = importlib.import_module("safetensors.torch")
    module.save_file(dict(_state(network)), path, metadata={"format": "pt", KEY: json.dumps(about)})
    return ""


def write_onnx(path: Path, network: nn.Module, about: dict[str, Any]) -> str:
    """Write the graph of the network in evaluation mode. Return a line for the user that says how it was checked.

    Raises `ConfigError` if a package is missing, and `DataError` if onnxruntime's logits differ from the network's.
    """
    _require("onnx", ".onnx")
    _require("onnxscript", ".onnx")
    network = network.float().eval()
    size = int(about["image_size"])
    images = torch.randn(_CHECKED, 3, size, size, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), torch.inference_mode(False):
        # The exporter warns of deprecations within torch and onnxscript.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[KEY] = json.dumps(about)
    program.save(str(path), external_data=False)
    return _compare(path, network, images)


def _compare(path: Path, network: nn.Module, images: Tensor) -> str:
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return f"not compared with the network, because onnxruntime is not installed; {_EXTRA}"
    session = runtime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = network(images)
    # One image at a time: the graph was traced with another batch size.
    found = torch.cat([torch.from_numpy(session.run(None, {"images": image[None].numpy()})[0]) for image in images])
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise DataError(
            f"export.path: onnxruntime's logits differ from the network's by {difference:.2g}, more than the tolerance "
            f"of {TOLERANCE:g}. No file was written. Try another version of onnxruntime or torch."
        )
    return f"onnxruntime's logits match the network's to {difference:.1g}"


WRITERS: dict[str, Callable[[Path, nn.Module, dict[str, Any]], str]] = {
    ".pth": write_torch,
    ".pt": write_torch,
    ".safetensors": write_safetensors,
    ".onnx": write_onnx,
}
"""Writers by the suffix of the file."""


def _state(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    for name, tensor in state.items():
        state[name] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
    return state


def _require(name: str, suffix: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"export.path: writing {suffix} requires the package {name}; {_EXTRA}") from None


def card(file: str, about: dict[str, Any], *, torchvision: bool) -> str:
    """Return the model card, in Markdown, of the file named `file`. `about`: see `origin`.

    `torchvision`: True if torchvision has this network.
    """
    optimizer = about["optimizer"]
    what = f"LARS over {optimizer['base']}" if optimizer["name"] == "lars" else str(optimizer["base"])
    suffix = "." + file.rpartition(".")[2]
    first, *rest = _USES[".pth" if suffix == ".pt" else suffix]
    network = [_BUILD_TORCHVISION if torchvision else _BUILD_OURS] if rest else []
    blurpool = bool(about.get("blurpool"))
    values = {**about, "classes": len(about["classes"]), "blurpool": ", blurpool=True" if blurpool else ""}
    usage = "".join([first, *network, *rest]).format(file=file, **values)
    epochs = f"{about['epochs']} epoch{'' if about['epochs'] == 1 else 's'}"
    rows = [
        ("network", f"{about['model']}{' with blurpool: strided convolutions blur their input' if blurpool else ''}"),
        *([("weights", f"exponential moving average, decay {about['ema']}")] if about.get("ema") else []),
        ("classes", f"{len(about['classes']):,}"),
        ("top-1", _percent(about, "top1")),
        ("top-5", _percent(about, "top5")),
        (
            "trained on",
            f"{about['data']}, {_number(about['training_images'])} images (fingerprint {about['fingerprint']})",
        ),
        ("recipe", f"{about['recipe']}, batch {about['batch']}"),
        ("global batch", f"{_number(about['global_batch'])}, in ghost batches of {_number(about['ghost_batch'])}"),
        ("optimizer", f"{what}, peak lr {optimizer['lr']}, weight decay {optimizer['weight_decay']}"),
        ("length", f"update {_number(about['update'])} of {_number(about['updates'])} ({epochs})"),
        ("seed, precision", f"{about['seed']}, {about['precision']}"),
        ("made by", _made_by(about)),
    ]
    if about.get("command"):
        rows.append(("command", f"`{about['command']}`"))
    lines = [
        MARK,
        "",
        f"# {file}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in rows),
        "",
    ]
    lines += [
        "## Input",
        "",
        f"RGB images, resized so that the shorter side is {_resized(about)} (bilinear, antialiased), center-cropped "
        f"to {about['image_size']} x {about['image_size']}, scaled to 0 to 1, and normalized per channel with mean "
        f"{about['mean']} and standard deviation {about['std']}. The outputs are logits, in the order of the classes "
        "that the file's metadata lists (`lars_train`, JSON).",
        "",
        "```python",
        usage,
        "```",
    ]
    return "\n".join(lines) + "\n"


def merge_cards(card: str, other: str, files: Collection[str]) -> str:
    """Return `card`, followed by the cards in `other` that describe other files, if these are among `files`."""
    parts = {}
    for part in other.split(MARK)[1:]:
        if (of := re.search("^# (.+)$", part, re.MULTILINE)) and f"# {of[1]}\n" not in card and of[1] in files:
            parts[of[1]] = MARK + part.rstrip("\n") + "\n"
    return "\n".join([card, *parts.values()])


def _percent(about: dict[str, Any], key: str) -> str:
    if about[key] is None:
        return "not evaluated at this update"
    how = f", {FLIPPED}" if about.get("flip") else ""
    return f"{about[key]:.2f} % of {about['evaluated']:,} validation images{how}"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "unknown"


def _resized(about: dict[str, Any]) -> str:
    size, crop = about["image_size"], about["eval_crop"]
    return str(round(size / crop)) if size and crop else "unknown"


def _made_by(about: dict[str, Any]) -> str:
    versions, git = about.get("versions") or {}, about.get("git") or {}
    parts = [about["program"], *(f"{name} {number}" for name, number in versions.items() if name != "lars-train")]
    if commit := commit_of(git):
        parts.append(commit)
    return ", ".join(parts)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def origin(source: Path, content: dict[str, Any], *, average: bool = False) -> dict[str, Any]:
    """Return the origin of the checkpoint `content`, read from the file `source`, as JSON values by name.

    Unknown values are None. ``top1``, ``top5`` (percent) and ``evaluated`` (images) come from the run's metrics.jsonl,
    from the line of the checkpoint's update. They are None if that update was not evaluated or `source` is not in a run
    directory. ``flip``: they were measured with ``evaluate.flip=true``. `average`: the values are for the average of
    the weights, whose decay is ``ema``. Names of machines and folders are left out.
    """
    run = source.resolve().parent.parent
    evaluated = _evaluation(run / "metrics.jsonl", content["update"])
    data, optimizer, plan = (_part(content, *keys) for keys in (("config", "data"), ("config", "optimizer"), ("plan",)))
    batch = _part(content, "config", "batch")
    return {
        "program": f"lars-train {version('lars-train')}",
        "model": _part(content, "config", "model").get("name"),
        "blurpool": bool(_part(content, "config", "model").get("blurpool")),
        "classes": list(content["classes"]),
        **{key: data.get(key) for key in ("image_size", "eval_crop", "mean", "std")},
        "ema": _part(content, "config", "model").get("ema") if average else None,
        "top1": evaluated.get("val/ema_top1" if average else "val/top1"),
        "top5": evaluated.get("val/ema_top5" if average else "val/top5"),
        "evaluated": evaluated.get("val/count"),
        "flip": bool(_part(content, "config", "evaluate").get("flip")),
        "data": data.get("name"),
        "fingerprint": content["fingerprint"],
        "training_images": plan.get("samples"),
        "recipe": _part(content, "config", "recipe").get("name"),
        # batch.size overrides the recipe's row.
        "batch": batch.get("name") if batch.get("size") is None else str(batch["size"]),
        **{key: plan.get(key) for key in ("global_batch", "ghost_batch", "updates", "epochs")},
        "update": content["update"],
        "seed": _part(content, "config").get("seed"),
        "optimizer": {key: optimizer.get(key) for key in ("name", "base", "lr", "weight_decay")},
        "precision": _part(content, "resolved").get("precision"),
        **_record(run / "run.json"),
    }


def _part(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    found: Any = content
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _evaluation(metrics: Path, update: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in read_lines(metrics, []):
        # After a rollback, an update may have two lines. The last belongs to the checkpoint's weights.
        if line.get("update") == update and "val/top1" in line:
            found = line
    return found


def _record(path: Path) -> dict[str, Any]:
    """Return command, versions and git state of the run's last start; nothing if the record cannot be read."""
    try:
        last = read_object(path)["started"][-1]
        return {key: last[key] for key in ("command", "versions", "git")}
    except (Unreadable, KeyError, IndexError, TypeError):
        return {}
