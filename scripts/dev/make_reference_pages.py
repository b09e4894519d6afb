"""Write the parts of docs/ that list keys, fields and recipes: configuration.md, metrics.md and a table in recipes.md.

    python scripts/dev/make_reference_pages.py

The sources are lars_train/config/schema.py, lars_train/monitoring/fields.py and the files of configs/.

Takes a few seconds. Figures: none; it writes the three pages.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before lars_train is imported, so that --help answers at once
    shared.make_parser(__doc__).parse_args()

from omegaconf import OmegaConf

from lars_train.config import schema
from lars_train.config.help import (
    GENERAL,
    default_choices,
    default_text,
    dotted,
    keys_of,
    meanings,
    models_of_data,
    sections,
    type_name,
)
from lars_train.config.recipe_schema import RecipeConfig, RowConfig
from lars_train.monitoring.fields import FIELDS, RATIO_FIELDS
from lars_train.run_plan import IMAGENET_TRAIN_IMAGES

DOCS = shared.ROOT / "docs"
CONFIGURATION = """# Configuration

Every key of `lars-train`. On the command line, `key=value` sets a key and `group=choice` selects a file of `configs/`.
`null`: the value of the recipe's row, or not set. `lars-train --help GROUP` prints the keys of a group, and
`lars-train --cfg job …` the composed config. `scripts/dev/make_reference_pages.py` writes this page from
`lars_train/config/schema.py`.
"""
METRICS = """# Metrics: the fields of metrics.jsonl

A run writes one JSON object per line: every `log_every` updates, at each epoch's end, at the last update, and per
evaluation. A line has `update`, `epoch`, and the fields that were measured. A number that is not finite is `null`. A
resumed run removes the lines after its checkpoint, so nothing appears twice. Names, units and meanings are stable;
fields may be added. [Monitoring](monitoring.md) shows them in TensorBoard. `scripts/dev/make_reference_pages.py`
writes this page from `lars_train/monitoring/fields.py`.
"""
RATIOS = """
## trust_ratios.jsonl

One JSON object per log line, if the optimizer is LARS. `trust_ratios.fields.json` has the names of the `layers`.
"""
RECIPES = [
    "| `recipe=` | `batch=` | images | optimizer | epochs | updates | published top-1, % | source |",
    "|---|---|--:|---|--:|--:|--:|---|",
]


def configuration() -> str:
    """Return docs/configuration.md."""
    lines = [CONFIGURATION, *key_list(GENERAL)]
    for name, kind in sections().items():
        if name != GENERAL:
            lines += ["", f"## {name}", "", intro(kind), ""]
            if names := schema.choices_of(name):
                lines += [f"`{name}=` {', '.join(f'`{choice}`' for choice in names)}", ""]
            lines += key_list(name)
    keys = ", ".join(f"`{field.name}`" for field in dataclasses.fields(RowConfig))
    lines += ["", "## A row of a recipe", "", intro(RowConfig), "", f"{keys}."]
    chosen = ", ".join(f"`{group}={choice}`" for group, choice in default_choices().items())
    by_data = ", ".join(f"`model={model}` with `data={data}`" for data, model in models_of_data().items())
    lines += ["", "## Default choices", "", f"{chosen}; but {by_data}."]
    return "\n".join(lines) + "\n"


def key_list(section: str) -> list[str]:
    """Return a list of the section's keys with default, type and meaning."""
    kind = sections()[section]
    hints, texts = typing.get_type_hints(kind), meanings(kind)
    return [
        f"- `{dotted(section, field.name)}={default_text(field)}` ({type_name(hints[field.name])}): "
        f"{texts.get(field.name, '').replace('``', '`')}"
        for field in keys_of(section)
    ]


def intro(kind: type) -> str:
    """Return a class's docstring as paragraphs."""
    return inspect.cleandoc(kind.__doc__ or "").replace("``", "`")


def metrics() -> str:
    """Return docs/metrics.md."""
    return METRICS + "\n".join(field_list(FIELDS)) + "\n" + RATIOS + "\n".join(field_list(RATIO_FIELDS)) + "\n"


def field_list(fields: dict[str, tuple[str, str]]) -> list[str]:
    """Return `fields` as a list of names, units and meanings. Unlike a table, it fits a narrow screen."""
    return ["", *(f"- `{name}`{f' ({unit})' if unit else ''}: {meaning}" for name, (unit, meaning) in fields.items())]


def recipes() -> str:
    """Return docs/recipes.md with the current table."""
    lines = [*RECIPES, *(line for name in schema.choices_of("recipe") for line in recipe_rows(name))]
    return shared.between_markers((DOCS / "recipes.md").read_text(), "rows", lines)


def recipe_rows(name: str) -> Iterator[str]:
    """Yield a line of the table for each row of the recipe and each length of a run that the row gives."""
    content = OmegaConf.load(schema.config_dir() / "recipe" / f"{name}.yaml")
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RecipeConfig), content))
    assert isinstance(found, RecipeConfig)
    for batch in sorted(found.rows, key=schema.nominal_batch):
        lengths = {**found.common, **found.rows[batch]}.get("by_epochs", {None: {}})
        for length in lengths:
            row = {**dataclasses.asdict(RowConfig()), **found.row(batch, length)}
            size = schema.nominal_batch(batch)
            updates = IMAGENET_TRAIN_IMAGES // size * row["epochs"]
            label = f"{name}` `epochs={length}" if length else name
            cells = (f"`{label}`", f"`{batch}`", f"{size:,}", optimizer_name(row), row["epochs"], f"{updates:,}")
            url = (row["source"] or found.source).partition(" ")[0]
            title = "/".join(url.split("/")[-2:]).replace("abs/", "arXiv ")
            yield f"| {' | '.join(map(str, cells))} | {row['published_top1']:.2f} | [{title}]({url}) |"


def optimizer_name(row: dict[str, Any]) -> str:
    """Return the name of a row's optimizer."""
    if row["optimizer"] == "lars":
        return "LAMB" if row["preset"] == "lamb" else "LARS"
    return "Nesterov" if row["nesterov"] else str(row["base"])


PAGES = {"configuration.md": configuration, "metrics.md": metrics, "recipes.md": recipes}

if __name__ == "__main__":
    for page, text in PAGES.items():
        (DOCS / page).write_text(text())
