"""Register a complete config file, such as the ``config.yaml`` of a run, for ``lars-train --config-file``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lars_train.config import AUTO, Config, RunConfig, config_dir, resolve, run_hash
from lars_train.config.checks import check_known_keys
from lars_train.config.keys import GROUPS, leaf_keys, section_keys
from lars_train.config.schema import schema_node
from lars_train.config.values import LATER_KEYS
from lars_train.errors import ConfigError
from lars_train.messages import first_line

NAME = "from_file"
"""The name under which the config is registered with Hydra."""
_PLACES = ("run.dir", "run.name")


@dataclasses.dataclass(frozen=True)
class SavedConfig:
    """A config file that is registered with Hydra."""

    hash: str | None
    """The hash of the experiment in the file; None if its config has an error."""
    placed: bool
    """True if the command line sets the run directory."""

    def place(self, config: Config) -> Config:
        """Return `config`, without the file's run directory if `config` and the file describe different experiments.

        A sweep over seeds therefore does not write into the directory of the saved run.
        """
        if self.placed or run_hash(config) == self.hash:
            return config
        return dataclasses.replace(config, run=RunConfig())


def register_saved(file: Path, settings: Sequence[str]) -> SavedConfig:
    """Register with Hydra the config in `file`, which may also be a run directory.

    `settings` are the prepared settings of the command line, which override the file. Raises `ConfigError` if the file
    is not a complete config, and for settings that choose a group, whose values the file already contains.
    """
    path = file / "config.yaml" if file.is_dir() else file
    where = f"--config-file {path}"
    keys = {setting.partition("=")[0].lstrip("+") for setting in settings}
    for group in GROUPS:
        if group in keys:
            write = {"model": "model.name=", "precision": "precision.name="}.get(group, "")
            hint = f"write {write}... instead" if write else "set single keys, or start without --config-file"
            raise ConfigError(f"{group}=...: {where} already sets the keys of the group {group}; {hint}.")
    content = _read(path, where)
    needed = [key for key in leaf_keys() if key not in LATER_KEYS]
    missing = [key for key in needed if key not in keys and not _holds(content, key)]
    if missing:
        few = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ConfigError(
            f"{where}: missing keys: {few}. Use a complete config, such as runs/RUN/config.yaml, or set those keys on "
            "the command line."
        )
    placed = not keys.isdisjoint(_PLACES)
    if placed:
        content["run"] = {"dir": None, "name": None}
    # The file may contain resume=never, which was meant for the start of that run only.
    content["resume"] = AUTO
    try:
        whole = OmegaConf.merge(schema_node(Config), content)
        assert isinstance(whole, DictConfig)
        own = run_hash(resolve(whole))
    except ConfigError:
        # The command line may fix the error. If it does not, the error is raised later.
        own = None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {error.full_key}: {first_line(error)}") from None
    base = OmegaConf.load(config_dir() / "config.yaml")
    overrides = [entry for entry in base.defaults if isinstance(entry, DictConfig) and "override" in str(entry)]
    defaults = ["schema", "_self_", *map(OmegaConf.to_container, overrides)]
    node = {"defaults": defaults, "hydra": OmegaConf.to_container(base.hydra), **content}
    ConfigStore.instance().store(name=NAME, node=node)
    return SavedConfig(own, placed)


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        content = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{where}: it cannot be read ({error.strerror or error}).") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: it is not valid YAML ({first_line(error)}).") from None
    plain: Any = OmegaConf.to_container(content)
    if not isinstance(plain, dict):
        raise ConfigError(f"{where}: a config must be a mapping of keys to values.")
    for key, value in plain.items():
        if section_keys(str(key)) and not isinstance(value, dict):
            raise ConfigError(f"{where}: {key} must be a mapping of keys to values.")
    try:
        check_known_keys(OmegaConf.create(plain), schema_node(Config))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return {str(key): value for key, value in plain.items()}


def _holds(content: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True
