"""Write the text of ``lars-train --help [GROUP]`` from the schema and the files of ``configs/``.

Python does not keep the docstrings below the schema's fields, so this module parses the source.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from typing import Any

from omegaconf import OmegaConf

from lars_train.config.keys import GROUPS, key_types, suggestion
from lars_train.config.schema import Config, choices_of, config_dir
from lars_train.errors import ConfigError, did_you_mean

GENERAL = "general"
"""The name of the keys that are in no section, such as ``epochs``."""
_WIDTH = 80
_OFTEN_SET = (
    *("mode", "data.root", "epochs", "batch.size", "optimizer.lr"),
    *("seed", "run.dir", "checkpoint.path", "micro_batch", "launch.nproc"),
)
_TYPES = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Any": "any"}
_OVERVIEW = """lars-train: large-batch training of ResNets with LARS

  lars-train [GROUP=CHOICE ...] [KEY=VALUE ...]
  lars-train -m batch=256,8k,16k,32k ...   a sweep: one run per combination
  lars-train --help GROUP                  the keys of a group, with defaults

Groups (* is the default)
{groups}

Keys that are often set
{keys}

Other groups of keys
{sections}

Examples
  lars-train                        train on the embedded images (two minutes)
  lars-train batch=32k data=imagenet data.root=/data/imagenet
  torchrun --nproc-per-node 8 -m lars_train batch=32k data=imagenet ...
  lars-train mode=plan batch=64k recipe=mlperf data=imagenet
  lars-train mode=evaluate checkpoint.path=RUN_DIRECTORY
  lars-train --config-file RUN_DIRECTORY seed=1   repeat with another seed
  lars-train --cfg job batch=8k                   print the composed config
  lars-train --hydra-help                         Hydra's own flags"""


@functools.cache
def meanings(kind: type) -> dict[str, str]:
    """Return the docstring below each field of the dataclass `kind`, on one line each, by the field's name."""
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
            found[field.target.id] = " ".join(after.value.value.split())
    return found


def sections() -> dict[str, type]:
    """Return the dataclass of each group of keys, by the group's name: `GENERAL` for the keys without a section."""
    hints = typing.get_type_hints(Config)
    nested = {name: typing.cast(type, hint) for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return {GENERAL: Config, **nested}


def keys_of(section: str) -> list[dataclasses.Field[Any]]:
    """Return the fields of `section` that are keys."""
    kind = sections()[section]
    nested = sections() if kind is Config else {}
    return [field for field in dataclasses.fields(kind) if field.name not in nested]


def dotted(section: str, name: str) -> str:
    """Return the key of field `name` in `section`."""
    return name if section == GENERAL else f"{section}.{name}"


def type_name(hint: Any) -> str:
    """Return a type hint in plain words, such as "whole number or text"."""
    arguments = [one for one in typing.get_args(hint) if one is not type(None)]
    if typing.get_origin(hint) is typing.Union:
        return " or ".join(type_name(one) for one in arguments)
    if typing.get_origin(hint) is list:
        return f"list of {type_name(arguments[0])}s"
    if typing.get_origin(hint) is dict:
        return "mapping"
    name = getattr(hint, "__name__", str(hint))
    return _TYPES.get(name, name)


def default_text(field: dataclasses.Field[Any]) -> str:
    """Return the default of a field as on the command line."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value) or '""'


def default_choices() -> dict[str, str]:
    """Return the choice of each group in ``configs/config.yaml``."""
    defaults = OmegaConf.load(config_dir() / "config.yaml").defaults
    pairs = [pair for one in defaults if not isinstance(one, str) for pair in one.items()]
    return {str(group): str(choice) for group, choice in pairs if " " not in str(group)}


def models_of_data() -> dict[str, str]:
    """Return, by data set, the default model of each data set that overrides the general default."""
    found = {}
    for name in choices_of("data"):
        file = OmegaConf.to_container(OmegaConf.load(config_dir() / "data" / f"{name}.yaml"))
        assert isinstance(file, dict)
        for one in file.get("defaults", []):
            if isinstance(one, dict) and "override /model" in one:
                found[name] = str(one["override /model"])
    return found


def overview() -> str:
    """Return the text of ``--help``: groups with their choices, frequent keys, and examples."""
    groups = [_row(group, _choices(group), 11) for group in GROUPS]
    chosen = "; ".join(f"{model} with data={data}" for data, model in models_of_data().items())
    groups.insert(GROUPS.index("model") + 1, _row("", f"By default: {chosen}", 11))
    keys = []
    for key in _OFTEN_SET:
        section, _, name = key.rpartition(".")
        meaning = meanings(sections()[section or GENERAL])[name].partition(". ")[0].partition("; ")[0].rstrip(".")
        keys.append(_row(key, meaning, 17))
    others = ", ".join(name for name in sections() if name not in GROUPS)
    return _OVERVIEW.format(groups="\n".join(groups), keys="\n".join(keys), sections=_row("", others, 0))


def page(name: str) -> str:
    """Return the text of ``--help NAME``: the choices and keys of the group `name`, or the one key of that name.

    Raises `ConfigError` for a name that is neither a group nor a key.
    """
    section, _, leaf = name.rpartition(".") if "." in name else (GENERAL, "", name)
    if name in sections():
        section, leaf = name, ""
    elif name not in key_types():
        raise ConfigError(
            f"--help {name}: there is no such group or key.{did_you_mean(name, sections()) or suggestion(name)} "
            f"The groups are {', '.join(sections())}."
        )
    kind = sections()[section]
    hints, texts = typing.get_type_hints(kind), meanings(kind)
    lines = []
    if not leaf:
        intro = "The keys in no section." if section == GENERAL else inspect.cleandoc(kind.__doc__ or "")
        lines += [*textwrap.wrap(intro.replace("``", ""), _WIDTH), ""]
        if section in GROUPS:
            lines += [_row(f"{section}=", _choices(section), len(section) + 3).strip(), ""]
    for field in keys_of(section):
        if leaf in ("", field.name):
            lines.append(f"{dotted(section, field.name)}={default_text(field)}   ({type_name(hints[field.name])})")
            lines.append(_row("", texts.get(field.name, ""), 2))
    if not leaf:
        lines += ["", "null: the recipe's row or the chosen group file has the value, or it stays unset."]
    return "\n".join(lines)


def _choices(group: str) -> str:
    chosen = default_choices()[group]
    return " ".join(f"{name}*" if name == chosen else name for name in choices_of(group))


def _row(name: str, text: str, width: int) -> str:
    """Return `name`, padded to `width`, and `text`, wrapped and indented."""
    indent = " " * (width + 2)
    text = text.replace("``", "").replace("`", "")
    return textwrap.fill(f"  {name:<{width}}{text}", _WIDTH, subsequent_indent=indent, break_on_hyphens=False)
