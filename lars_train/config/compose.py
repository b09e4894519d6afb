"""Compose a run's config for a Python program, and explain the errors of Hydra and OmegaConf about settings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException, OverrideParseException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from lars_train.config import Config, choices_of, config_dir, nominal_batch, register, resolve
from lars_train.config.arguments import prepare_arguments
from lars_train.config.keys import GROUPS, suggestion
from lars_train.config.rows import explain_missing_row, row_name
from lars_train.errors import ConfigError, did_you_mean
from lars_train.messages import first_line


@dataclass(frozen=True)
class Composed:
    """A checked config, and the texts about it that a run directory keeps."""

    config: Config
    raw: DictConfig
    """The config before `resolve`."""
    overrides: tuple[str, ...]
    hydra_yaml: str


def compose_settings(settings: Sequence[str]) -> Composed:
    """Compose and check `settings`, such as ``batch.size=256``, as the command line does. Raises `ConfigError`.

    The state of Hydra in this process, which the caller's program may use itself, stays unchanged.
    """
    for setting in settings:
        if not isinstance(setting, str):
            raise ConfigError(f"{setting!r}: a setting is text of the form key=value, such as batch.size=256.")
        if setting.startswith("-"):
            raise ConfigError(f"{setting}: this flag belongs to the command line; a setting is key=value.")
    overrides = prepare_arguments(list(settings), os.environ.get("IMAGENET_DIR"))
    with _own_hydra():
        try:
            with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
                raw = hydra.compose("config", overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error, overrides, in_python=True)) from None
        HydraConfig.instance().set_config(raw)
        text = OmegaConf.to_yaml(OmegaConf.create({"hydra": raw.hydra}))
        with open_dict(raw):
            del raw["hydra"]
        return Composed(resolve(raw), raw, tuple(overrides), text)


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Use other instances of Hydra's singletons within the context."""
    kinds = (ConfigStore, GlobalHydra, HydraConfig, JobRuntime, VersionBase)
    instances: dict[Any, Any] = Singleton._instances
    resolvers = dict(BaseContainer._resolvers)
    theirs = {kind: instances.pop(kind) for kind in kinds if kind in instances}
    # Start with Hydra's own configs only. A plugin that is imported within the context adds its configs to them.
    ConfigStore.instance().repo = {k: v for k, v in theirs[ConfigStore].repo.items() if k.startswith(("hydra", "_"))}
    try:
        register.__wrapped__()
        yield
    finally:
        for kind in kinds:
            instances.pop(kind, None)
        instances.update(theirs)
        BaseContainer._resolvers.clear()
        BaseContainer._resolvers.update(resolvers)


def explain(error: Exception, arguments: Sequence[str], in_python: bool = False) -> str:
    """Return a one-line message for an error of Hydra or OmegaConf about `arguments`, with the closest valid name.

    `in_python`: the arguments are those of a call, which makes one run.
    """
    text = str(error).strip()
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: Hydra cannot parse this. A setting is key=value; a value with an equals sign, a comma "
            """or brackets needs two pairs of quotes, the shell's and Hydra's: 'data.root="/a=b"'."""
        )
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:not in|is not in)", text)
    if unknown:
        key = unknown.group(1).split("@")[0]
        meant = suggestion(key.lstrip("+~"))
        return f"there is no key or group {key!r}.{meant} lars-train --help lists the groups, --help GROUP its keys."
    choice = re.search(rf"Could not find '({'|'.join(GROUPS)})/([^']*)'", text)
    if choice:
        group, name = choice.groups()
        choices = choices_of(group)
        if group == "batch" and (config := _with_batch(name, arguments)) is not None:
            if nominal_batch(name):
                return explain_missing_row(config)
            choices = list(config.recipe.rows)
        return f"{group}={name}: no such choice. Choose from {', '.join(choices)}.{did_you_mean(name, choices)}"
    several = re.match(r"Ambiguous value for argument '(\w+)=(.*)'$", first_line(text))
    if several and several[1] in GROUPS:
        # Without the quotes that `prepare_arguments` put around the values.
        setting = f"{several[1]}={several[2].replace(chr(39), '')}"
        remedy = "Call once for each of them." if in_python else f"To run each of them: -m {setting}"
        return f"{setting}: several values are a sweep. {remedy}"
    if in_python and "Ambiguous value for argument" in text:
        return (
            f"{first_line(text)}: several values are a sweep: call once for each. A value with a comma needs quotes: "
            """'data.root="/a,b"'."""
        )
    if "Ambiguous value for argument" in text:
        return (
            f"{first_line(text)}: several values are a sweep: add -m. A value with a comma needs two pairs of quotes, "
            """the shell's and Hydra's: 'data.root="/a,b"'."""
        )
    if error.__cause__ is not None:
        text += f"\n{error.__cause__}"
    lines = [
        line.strip() for line in text.splitlines() if not re.search("(full_key|reference_type|object_type)[:=]", line)
    ]
    merged = re.fullmatch(r"Error merging override (.+)", lines[0]) if lines else None
    if merged:
        lines[0] = f"{merged.group(1)}: this value does not fit the key."
        if "is not a valid bool" in text:
            return f"{merged.group(1)}: choose true or false."
        if isinstance(error.__cause__, GrammarParseError):
            return f"{lines[0]} ${{ begins an interpolation, such as ${{seed}} or ${{oc.env:HOME}}."
    return " ".join(line for line in lines if line)


def _with_batch(name: str, arguments: Sequence[str]) -> Config | None:
    """Return the config of the prepared `arguments` with batch `name`, before `resolve`.

    In a sweep, return the config of the first job. Call this only if `name` is not one of Hydra's choices. Return None
    if the other arguments cannot be composed, or if their recipe has a row of that name.
    """
    try:
        settings = [argument for argument in arguments if not argument.startswith("-") and "=" in argument]
        overrides = [
            # Of a sweep, take the first job, whose error Hydra reports.
            f"{str(override.input_line).partition('=')[0]}={next(override.sweep_string_iterator())}"
            if override.is_sweep_override()
            else str(override.input_line)
            for override in OverridesParser.create().parse_overrides(settings)
            if override.key_or_group != "batch"
        ]
        with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = OmegaConf.to_object(hydra.compose("config", overrides))
    except (HydraException, OmegaConfBaseException):
        return None
    assert isinstance(config, Config)
    config.batch.name, config.batch.nominal = name, nominal_batch(name)
    return None if row_name(config.recipe.rows, name) else config
