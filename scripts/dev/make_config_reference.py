"""Write docs/configuration.md from the schema (lars_train/config/schema.py) and the files of configs/.

    python scripts/dev/make_config_reference.py

Takes a few seconds. Figures: none; it writes docs/configuration.md.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import typing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import shared

if __name__ == "__main__":  # parsed before lars_train is imported, so that --help answers at once
    shared.make_parser(__doc__).parse_args()

from omegaconf import OmegaConf

from lars_train.config import config_dir, schema
from lars_train.config.recipe_schema import RowConfig

HEAD = """# Configuration

Every key of `lars-train`, from the schema in `lars_train/config/schema.py`; `scripts/dev/make_config_reference.py`
writes this page. On the command line, `key=value` sets a key and `group=choice` selects a file of `configs/`. `null`:
the value of the recipe's row, or not set. `lars-train --cfg job …` prints the composed config.
"""
TYPES = {"str": "text", "int": "whole number", "float": "number", "bool": "true, false", "Any": "any"}


def meanings(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a class."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            found[field.target.id] = inspect.cleandoc(after.value.value)
    return found


def type_name(hint: Any) -> str:
    """Return a type in plain words."""
    arguments = [one for one in typing.get_args(hint) if one is not type(None)]
    if typing.get_origin(hint) is typing.Union:
        return " or ".join(type_name(one) for one in arguments)
    if typing.get_origin(hint) is list:
        return f"list of {type_name(arguments[0])}s"
    if typing.get_origin(hint) is dict:
        return "mapping"
    name = getattr(hint, "__name__", str(hint))
    return TYPES.get(name, name)


def default(field: dataclasses.Field[Any]) -> str:
    """Return the default of a field as text."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value) or '""'


def table(kind: type, prefix: str) -> list[str]:
    """Return the table of a class's fields, except groups."""
    hints, texts = typing.get_type_hints(kind), meanings(kind)
    lines = ["| key | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(hints[field.name]):
            meaning = " ".join(texts.get(field.name, "").split()).replace("``", "`").replace("|", "\\|")
            key, value = f"`{prefix}{field.name}`", f"`{default(field)}`"
            lines.append(f"| {key} | {type_name(hints[field.name])} | {value} | {meaning} |")
    return lines


def keys_without_meaning() -> list[str]:
    """Return the keys without a meaning, except those of a row, which are explained in their groups."""
    kinds = {
        field.name: typing.get_type_hints(schema.Config)[field.name] for field in dataclasses.fields(schema.Config)
    }
    groups: dict[str, Any] = {
        "": schema.Config,
        **{f"{name}.": kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)},
    }
    return [
        f"{prefix}{field.name}"
        for prefix, kind in groups.items()
        for field in dataclasses.fields(kind)
        if field.name not in meanings(kind) and not dataclasses.is_dataclass(kinds.get(f"{prefix}{field.name}"))
    ]


def intro(kind: type) -> str:
    """Return a class's docstring as paragraphs."""
    return inspect.cleandoc(kind.__doc__ or "").replace("``", "`")


def page() -> str:
    """Return the whole page."""
    lines = [HEAD, *table(schema.Config, "")]
    for field in dataclasses.fields(schema.Config):
        kind = typing.get_type_hints(schema.Config)[field.name]
        if not dataclasses.is_dataclass(kind):
            continue
        lines += ["", f"## {field.name}", "", intro(typing.cast(type, kind)), ""]
        if names := schema.choices_of(field.name):
            lines += [f"`{field.name}=` {', '.join(f'`{name}`' for name in names)}", ""]
        lines += table(typing.cast(type, kind), f"{field.name}.")
    keys = ", ".join(f"`{field.name}`" for field in dataclasses.fields(RowConfig))
    lines += ["", "## A row of a recipe", "", intro(RowConfig), "", f"{keys}."]
    config = OmegaConf.load(config_dir() / "config.yaml")
    chosen = ", ".join(
        f"`{key}={value}`"
        for one in config.defaults
        if not isinstance(one, str)
        for key, value in one.items()
        if " " not in str(key)
    )
    lines += ["", "## What a bare `lars-train` chooses", "", f"{chosen}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (shared.ROOT / "docs" / "configuration.md").write_text(page())
