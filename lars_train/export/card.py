"""``MODEL.md``: what an exported file is, how good, how it was trained and how to use it, for those who get it."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

MARK = "<!-- written by lars-train mode=export -->"
"""The first line of a card, and of the part of each file in it; a MODEL.md without it is somebody's own."""

_OF_TORCHVISION = "from torchvision.models import get_model\n\nmodel = get_model({model!r}, num_classes={classes})\n"
_OF_OURS = (
    "from lars_train.models.factory import build_model  # pip install lars-train; torchvision has no such network\n\n"
    "model = build_model({model!r}, num_classes={classes}, ghost_batch=1, zero_gamma=False)\n"
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


def card(file: str, about: dict[str, Any], *, torchvision: bool) -> str:
    """The text, in Markdown, for the file of that name whose `origin` is `about`.

    `torchvision`: its network is one of torchvision's.
    """
    optimizer = about["optimizer"]
    what = f"LARS over {optimizer['base']}" if optimizer["name"] == "lars" else str(optimizer["base"])
    suffix = "." + file.rpartition(".")[2]
    first, *rest = _USES[".pth" if suffix == ".pt" else suffix]
    network = [_OF_TORCHVISION if torchvision else _OF_OURS] if rest else []
    usage = "".join([first, *network, *rest]).format(file=file, **{**about, "classes": len(about["classes"])})
    rows = [
        ("network", about["model"]),
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
        ("length", f"update {_number(about['update'])} of {_number(about['updates'])} ({about['epochs']} epochs)"),
        ("seed, precision", f"{about['seed']}, {about['precision']}"),
        ("made by", _maker(about)),
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
        f"RGB images, resized so that the shorter side is {_resized(about)} (bilinear, antialiased), the middle "
        f"{about['image_size']} x {about['image_size']} cut out, scaled to 0 to 1, less the mean {about['mean']}, over "
        f"the standard deviation {about['std']}, channel by channel. The output are logits, in the order of the "
        "classes, which are listed in the file's metadata (`lars_train`, JSON).",
        "",
        "```python",
        usage,
        "```",
    ]
    return "\n".join(lines) + "\n"


def beside(card: str, other: str, files: Collection[str]) -> str:
    """`card` and, behind it, what a former text says of those of `files` that `card` is not of."""
    parts = {}
    for part in other.split(MARK)[1:]:
        if (of := re.search("^# (.+)$", part, re.MULTILINE)) and f"# {of[1]}\n" not in card and of[1] in files:
            parts[of[1]] = MARK + part.rstrip("\n") + "\n"
    return "\n".join([card, *parts.values()])


def _percent(about: dict[str, Any], key: str) -> str:
    if about[key] is None:
        return "not evaluated at this update"
    return f"{about[key]:.2f} % of {about['evaluated']:,} validation images"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "unknown"


def _resized(about: dict[str, Any]) -> str:
    size, crop = about["image_size"], about["eval_crop"]
    return str(round(size / crop)) if size and crop else "unknown"


def _maker(about: dict[str, Any]) -> str:
    versions, git = about.get("versions") or {}, about.get("git") or {}
    told = [about["program"], *(f"{name} {number}" for name, number in versions.items() if name != "lars-train")]
    if git.get("commit"):
        told.append(f"commit {git['commit'][:12]}{' with changes' if git.get('dirty') else ''}")
    return ", ".join(told)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
