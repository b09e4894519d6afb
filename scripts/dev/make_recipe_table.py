"""Write the table of recipes in docs/recipes.md from the files of configs/recipe/.

    python scripts/dev/make_recipe_table.py

Takes a second. Figures: none; it writes docs/recipes.md, between its markers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before lars_train is imported, so that --help answers at once
    shared.make_parser(__doc__).parse_args()

from omegaconf import OmegaConf

from lars_train.config.recipe_schema import RecipeConfig, RowConfig
from lars_train.config.schema import choices_of, config_dir, nominal_batch
from lars_train.run_plan import IMAGENET_TRAIN_IMAGES

PAGE = shared.ROOT / "docs" / "recipes.md"
MARKER = "rows"
HEAD = [
    "| `recipe=` | `batch=` | images | optimizer | epochs | updates | published top-1, % | source |",
    "|---|---|--:|---|--:|--:|--:|---|",
]


def recipe(name: str) -> RecipeConfig:
    """Return the recipe of a file in configs/recipe/."""
    found = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(RecipeConfig), OmegaConf.load(config_dir() / "recipe" / f"{name}.yaml"))
    )
    assert isinstance(found, RecipeConfig)
    return found


def optimizer(row: dict[str, Any]) -> str:
    """Return the name of a row's optimizer."""
    if row["optimizer"] == "lars":
        return "LAMB" if row["preset"] == "lamb" else "LARS"
    return "Nesterov" if row["nesterov"] else str(row["base"])


def rows(name: str) -> Iterator[str]:
    """Yield a line of the table for each row of the recipe and each length of a run that the row gives."""
    found = recipe(name)
    for batch in sorted(found.rows, key=nominal_batch):
        lengths = {**found.common, **found.rows[batch]}.get("by_epochs", {None: {}})
        for length in lengths:
            row = {**dataclasses.asdict(RowConfig()), **found.row(batch, length)}
            size = nominal_batch(batch)
            updates = IMAGENET_TRAIN_IMAGES // size * row["epochs"]
            label = f"{name}` `epochs={length}" if length else name
            cells = (f"`{label}`", f"`{batch}`", f"{size:,}", optimizer(row), row["epochs"], f"{updates:,}")
            url = (row["source"] or found.source).partition(" ")[0]
            title = "/".join(url.split("/")[-2:]).replace("abs/", "arXiv ")
            yield f"| {' | '.join(map(str, cells))} | {row['published_top1']:.2f} | [{title}]({url}) |"


def page() -> str:
    """Return the whole page with the current table."""
    lines = [*HEAD, *(line for name in choices_of("recipe") for line in rows(name))]
    return shared.between_markers(PAGE.read_text(), MARKER, lines)


if __name__ == "__main__":
    PAGE.write_text(page())
