"""Write docs/configuration.md from the schema (lars_train/config/schema.py) and the files of configs/.

    python scripts/dev/make_config_reference.py

Takes a few seconds. Figures: none; it writes docs/configuration.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before lars_train is imported, so that --help answers at once
    shared.make_parser(__doc__).parse_args()

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
from lars_train.config.recipe_schema import RowConfig

HEAD = """# Configuration

Every key of `lars-train`. On the command line, `key=value` sets a key and `group=choice` selects a file of `configs/`.
`null`: the value of the recipe's row, or not set. `lars-train --help GROUP` prints the keys of a group, and
`lars-train --cfg job …` the composed config. `scripts/dev/make_config_reference.py` writes this page from
`lars_train/config/schema.py`.
"""


def key_list(section: str) -> list[str]:
    """Return a list of the section's keys with default, type and meaning."""
    kind = sections()[section]
    hints, texts = typing.get_type_hints(kind), meanings(kind)
    return [
        f"- `{dotted(section, field.name)}={default_text(field)}` ({type_name(hints[field.name])}): "
        f"{texts.get(field.name, '').replace('``', '`')}"
        for field in keys_of(section)
    ]


def keys_without_meaning() -> list[str]:
    """Return the keys without a meaning."""
    return [
        dotted(section, field.name)
        for section, kind in sections().items()
        for field in keys_of(section)
        if field.name not in meanings(kind)
    ]


def intro(kind: type) -> str:
    """Return a class's docstring as paragraphs."""
    return inspect.cleandoc(kind.__doc__ or "").replace("``", "`")


def page() -> str:
    """Return the whole page."""
    lines = [HEAD, *key_list(GENERAL)]
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


if __name__ == "__main__":
    (shared.ROOT / "docs" / "configuration.md").write_text(page())
