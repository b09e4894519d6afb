"""The row of the published table that a run makes, as text."""

from __future__ import annotations

from typing import Any

from lars_train.text import printable

HEADER = ("batch", "LR policy", "lr", "warm-up epochs", "epochs", "best top-1 %", "final top-1 %", "published")
# A backslash would not do for all of them: behind one that the text has itself, it is taken literally.
_ENTITIES = str.maketrans({c: f"&#{ord(c)};" for c in "&<>|[`"})


def row(final: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a run's row, from the content of its ``final.json``."""
    batch = str(final["batch"])
    if final["global_batch"] != final["nominal_batch"]:
        batch += f" (scaled: {final['global_batch']:,}{', raised' if final['raised'] else ''})"
    policy = "LARS + " if final["optimizer"] == "lars" else ""
    # Runs of an older version have no policy.
    decay = final["policy"] if "policy" in final else f"poly({final['power']:g})"
    base = "" if final["base"] == "SGD" else f"{final['base']} + "
    published = "-" if final["published_top1"] is None else f"{final['published_top1']:.2f} (ImageNet)"
    epochs = str(final["epochs"])
    if final["updates"] < final["planned_updates"]:
        epochs = f"{final['epochs_done']:.2f} of {epochs}"
    return (
        batch,
        f"{policy}{base}{decay}",
        f"{final['lr']:g}",
        f"{final['warmup_epochs']:g}",
        epochs,
        f"{final['best_top1']:.2f}",
        f"{final['final_top1']:.2f}",
        published,
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, its columns aligned, that reads well in a terminal."""
    lines = [HEADER, *(tuple(map(_cell, line)) for line in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(text)


def _cell(text: str) -> str:
    """Text that cannot end its cell, and is neither HTML nor a link, where the table is shown as Markdown."""
    return printable(text).translate(_ENTITIES)
