"""The network that a config asks for."""

from __future__ import annotations

import torch
from torch import nn

from lars_train.config import Config, filled
from lars_train.errors import ConfigError
from lars_train.models.factory import build_model, load_weights


def make_network(config: Config, classes: int) -> nn.Module:
    """The config's model for so many classes, on the CPU: from its weights file if one is named, else newly drawn."""
    network = build_model(
        config.model.name,
        num_classes=classes,
        ghost_batch=filled(config.model.ghost_batch),
        zero_gamma=filled(config.model.zero_gamma),
    )
    if config.model.weights is not None:
        load_weights(network, config.model.weights)
    return network


def check_single_samples(config: Config, classes: int) -> None:
    """Raise `ConfigError` when the model cannot take batch-norm statistics of one image: some layer sees one pixel."""
    network = make_network(config, classes).to("meta").train()
    try:
        network(torch.empty(1, 3, config.data.image_size, config.data.image_size, device="meta"))
    except ValueError:
        raise ConfigError(
            f"model.ghost_batch={config.model.ghost_batch}: a ghost batch of one image has no variance where "
            f"{config.model.name} is down to one pixel (data.image_size={config.data.image_size}); use at least 2."
        ) from None
