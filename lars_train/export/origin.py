"""Where exported weights come from, as plain values: the checkpoint, its accuracy, and the record of its run."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from lars_train.report.files import Unreadable, read_lines, read_object


def origin(source: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What is known of the checkpoint `content`, read from the file `source`; values for JSON, None for the unknown.

    ``top1``, ``top5`` (percent) and ``evaluated`` (images) are those of its update in the run's metrics.jsonl; unknown
    where it was not evaluated or the file does not lie in a run directory. Machines and folders are left out.
    """
    run = source.resolve().parent.parent
    evaluated = _evaluation(run / "metrics.jsonl", content["update"])
    data, optimizer, plan = (_part(content, *keys) for keys in (("config", "data"), ("config", "optimizer"), ("plan",)))
    batch = _part(content, "config", "batch")
    return {
        "program": f"lars-train {version('lars-train')}",
        "model": _part(content, "config", "model").get("name"),
        "classes": list(content["classes"]),
        **{key: data.get(key) for key in ("image_size", "eval_crop", "mean", "std")},
        "top1": evaluated.get("val/top1"),
        "top5": evaluated.get("val/top5"),
        "evaluated": evaluated.get("val/count"),
        "data": data.get("name"),
        "fingerprint": content["fingerprint"],
        "training_images": plan.get("samples"),
        "recipe": _part(content, "config", "recipe").get("name"),
        # A size of one's own is in place of the row's.
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
        # After a rollback there may be two; the last one is of the checkpoint's weights.
        if line.get("update") == update and "val/top1" in line:
            found = line
    return found


def _record(path: Path) -> dict[str, Any]:
    """Command, versions and git state of the run's last start; nothing where there is no record that can be read."""
    try:
        last = read_object(path)["started"][-1]
        return {key: last[key] for key in ("command", "versions", "git")}
    except (Unreadable, KeyError, IndexError, TypeError):
        return {}
