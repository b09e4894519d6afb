"""Write the model card of an exported file: the origin of the weights, and how to use them."""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lars_train.config.network import BUILTIN, CUSTOM, TIMM
from lars_train.monitoring.summary import FLIPPED
from lars_train.report.files import Unreadable, commit_of, read_lines, read_object

CARD = "MODEL.md"
MARK = "<!-- written by lars-train mode=export -->"
"""First line of each card in a MODEL.md. A MODEL.md without this line was not written by lars-train."""

_BUILD_TORCHVISION = "from torchvision.models import get_model\n\nmodel = get_model({model!r}, num_classes={classes})\n"
_BUILD_OURS = (
    "from lars_train.models.factory import build_model  # pip install lars-train; torchvision has no such network\n\n"
    "model = build_model({model!r}, num_classes={classes}, ghost_batch=1, zero_gamma=False{blurpool})\n"
)
_BUILD_TIMM = "import timm\n\nmodel = timm.create_model({model!r}, num_classes={classes}{kwargs})\n"
_BUILD_CUSTOM = "from {module} import {function}\n\nmodel = {function}(num_classes={classes}{kwargs})\n"

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
_NETWORK_KEYS = ("source", "target", "kwargs")


def card(file: str, about: dict[str, Any], *, torchvision: bool) -> str:
    """Return the model card, in Markdown, of the file named `file`. `about`: see `origin`.

    `torchvision`: True if torchvision has this network.
    """
    optimizer = about["optimizer"]
    what = f"LARS over {optimizer['base']}" if optimizer["name"] == "lars" else str(optimizer["base"])
    blurpool = bool(about.get("blurpool"))
    names = {BUILTIN: about["model"], TIMM: f"{about['model']} of timm", CUSTOM: about.get("target")}
    name = names[about.get("source", BUILTIN)]
    epochs = f"{about['epochs']} epoch{'' if about['epochs'] == 1 else 's'}"
    rows = [
        ("network", f"{name}{' with blurpool: strided convolutions blur their input' if blurpool else ''}"),
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
        _usage(file, about, torchvision),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _usage(file: str, about: dict[str, Any], torchvision: bool) -> str:
    """Return the code that loads `file`."""
    suffix = "." + file.rpartition(".")[2]
    first, *rest = _USES[".pth" if suffix == ".pt" else suffix]
    builds = {BUILTIN: _BUILD_TORCHVISION if torchvision else _BUILD_OURS, TIMM: _BUILD_TIMM, CUSTOM: _BUILD_CUSTOM}
    network = [builds[about.get("source", BUILTIN)]] if rest else []
    module, _, function = str(about.get("target")).partition(":")
    values = {
        **about,
        "classes": len(about["classes"]),
        "blurpool": ", blurpool=True" if about.get("blurpool") else "",
        "kwargs": "".join(f", {key}={value!r}" for key, value in about.get("kwargs", {}).items()),
        "module": module,
        "function": function,
    }
    return "".join([first, *network, *rest]).format(file=file, **values)


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
    batch, model = _part(content, "config", "batch"), _part(content, "config", "model")
    return {
        "program": f"lars-train {version('lars-train')}",
        "model": model.get("name"),
        "blurpool": bool(model.get("blurpool")),
        **({} if model.get("source", BUILTIN) == BUILTIN else {key: model.get(key) for key in _NETWORK_KEYS}),
        "classes": list(content["classes"]),
        **{key: data.get(key) for key in ("image_size", "eval_crop", "mean", "std")},
        "ema": model.get("ema") if average else None,
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
