"""Keys and groups of lars-train that a script takes, as the program itself takes them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lars_train.cli import explain
from lars_train.config import Config, config_dir, register, resolve
from lars_train.config.arguments import prepare_arguments
from lars_train.errors import ConfigError


def composed(keys: Sequence[str]) -> Config:
    """The config that `keys` make.

    Raises:
        ConfigError: they do not fit lars-train; the message is the program's own.
    """
    arguments = prepare_arguments(list(keys), None)
    register()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return resolve(compose("config", arguments))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, arguments)) from None


@contextmanager
def refused(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Within it a ConfigError ends the script with exit code 2 and one line below the usage."""
    try:
        yield
    except ConfigError as error:
        parser.error(str(error))
