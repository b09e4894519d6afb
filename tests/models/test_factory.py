"""Models built by name equal those of torchvision or of the paper."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

from lars_train.errors import ConfigError
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.factory import build_model, model_names

CIFAR = {"tiny": 8, "small": 8, "resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56}


def build(name: str, num_classes: int = 10, zero_gamma: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, num_classes=num_classes, ghost_batch=4, zero_gamma=zero_gamma)


def test_model_names_has_every_resnet_of_torchvision() -> None:
    theirs = {n for n in torchvision.models.list_models(module=torchvision.models) if "resne" in n}
    assert set(model_names()) == theirs | set(CIFAR)
    assert len(model_names()) == len(set(model_names()))


@pytest.mark.parametrize("name", sorted(CIFAR))
def test_a_cifar_network_has_the_layers_of_its_name(name: str) -> None:
    layers = [m for m in build(name).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == CIFAR[name]


def test_a_torchvision_name_builds_torchvisions_network() -> None:
    theirs = torchvision.models.resnet50(num_classes=10)
    theirs.load_state_dict(build("resnet50").state_dict(), strict=True)

    ours = build("resnet18").eval()
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_the_same_seed_gives_torchvisions_initial_weights() -> None:
    ours = build("resnet18")
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=10)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_every_norm_layer_is_ghost_batch_norm(name: str) -> None:
    norms = [m for m in build(name).modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(m, GhostBatchNorm2d) and m.ghost_batch == 4 for m in norms)


@pytest.mark.parametrize(
    ("name", "last", "blocks"), [("small", "bn2", 3), ("resnet18", "bn2", 8), ("resnet50", "bn3", 16)]
)
def test_zero_gamma_starts_every_block_as_its_shortcut(name: str, last: str, blocks: int) -> None:
    gammas = {k: v for k, v in build(name, zero_gamma=True).state_dict().items() if "bn" in k and "weight" in k}
    zero = {k for k, v in gammas.items() if not v.any()}
    assert zero == {k for k in gammas if f".{last}." in k}
    assert len(zero) == blocks
    others = build(name).state_dict()
    assert all((others[k] == 1).all() for k in gammas)


def test_the_error_for_a_mistyped_name_has_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model\.name=resnet_50.*Did you mean 'resnet50'"):
        build("resnet_50")


def test_names_are_listed_without_importing_torchvision() -> None:
    code = (
        "import sys; from lars_train.models.factory import model_names, build_model; model_names(); "
        "build_model('small', num_classes=2, ghost_batch=4, zero_gamma=True); "
        "sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
