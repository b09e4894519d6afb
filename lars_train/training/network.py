"""The network that a config asks for."""

from __future__ import annotations

from torch import nn

from lars_train.config import Config, filled
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
