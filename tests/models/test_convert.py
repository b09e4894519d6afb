"""Networks of timm and of the user with ghost batch norm equal themselves; parameters freeze by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from lars_train.errors import ConfigError
from lars_train.models.batchnorm import GhostBatchNorm2d, RunningStatistics
from lars_train.models.convert import find_head, freeze, head_layer, use_ghost_batch_norm

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
# Tiny networks, with batch norm and with batch norm and activation in one layer.
NAMES = ("test_resnet", "test_efficientnet")


def original(name: str) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, num_classes=5).double()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            # Not the initial values, with which an error would not show.
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias)
            nn.init.uniform_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return network


def converted(network: nn.Module, ghost_batch: int) -> nn.Module:
    ghosts = copy.deepcopy(network)
    use_ghost_batch_norm(ghosts, ghost_batch)
    return ghosts


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def gradients(network: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_a_timm_network_evaluates_as_before(name: str) -> None:
    network = original(name).eval()
    ghosts = converted(network, 2)
    assert list(ghosts.state_dict()) == list(network.state_dict())
    assert any(isinstance(layer, GhostBatchNorm2d) for layer in ghosts.modules())
    with torch.no_grad():
        assert torch.equal(ghosts(IMAGES), network(IMAGES))


@pytest.mark.parametrize("name", NAMES)
def test_with_one_ghost_batch_a_timm_network_trains_as_before(name: str) -> None:
    network = original(name).train()
    ghosts = converted(network, len(IMAGES))
    outputs = [one(IMAGES) for one in (ghosts, network)]
    close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    close(gradients(ghosts), gradients(network))
    RunningStatistics(ghosts).update()
    close(ghosts.state_dict(), network.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_ghost_batches_are_those_of_separate_passes(name: str) -> None:
    network = original(name).train()
    ghosts = converted(network, 3)
    parts = [copy.deepcopy(network) for _ in range(2)]
    output = ghosts(IMAGES)
    close(output, torch.cat([part(images) for part, images in zip(parts, IMAGES.split(3), strict=True)]))
    RunningStatistics(ghosts).update()
    # The mean of both ghost batches, entered once: linear in the statistics of each.
    expected = [part.state_dict() for part in parts]
    for key, value in ghosts.state_dict().items():
        if "running" in key:
            close(value, (expected[0][key] + expected[1][key]) / 2)


@pytest.mark.parametrize("shape", [(4,), (4, 7)])
def test_features_have_ghost_batches_too(shape: tuple[int, ...]) -> None:
    network = nn.Sequential(nn.BatchNorm1d(4, eps=1e-3, momentum=0.3)).double().train()
    ghosts, features = converted(network, 6), torch.randn(6, *shape, dtype=torch.float64)
    close(ghosts(features), network(features))
    RunningStatistics(ghosts).update()
    close(ghosts.state_dict(), network.state_dict())
    close(ghosts.eval()(features), network.eval()(features))


def test_layers_stay_the_same_objects_with_their_settings() -> None:
    norm, act = nn.SyncBatchNorm(4, eps=1e-3, momentum=0.2), BatchNormAct2d(4, act_layer=nn.SiLU, eps=1e-2)
    network, seen = nn.Sequential(norm, act), []
    norm.register_forward_hook(lambda *arguments: seen.append(1))
    use_ghost_batch_norm(network, 2)
    assert (network[0], network[1]) == (norm, act)
    assert (norm.eps, norm.momentum, act.eps, type(act.act)) == (1e-3, 0.2, 1e-2, nn.SiLU)
    images = torch.randn(2, 4, 3, 3)
    plain = nn.functional.batch_norm(images, None, None, training=True, eps=1e-3)
    expected = nn.functional.silu(nn.functional.batch_norm(plain, None, None, training=True, eps=1e-2))
    torch.testing.assert_close(network(images), expected)
    assert seen == [1]
    use_ghost_batch_norm(network, 1)
    assert norm.ghost_batch == act.ghost_batch == 1


class OwnNorm(nn.BatchNorm2d):
    """Batch norm that may behave in another way."""


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm3d(4), "layer body.1, a BatchNorm3d: this kind of batch norm"),
        (OwnNorm(4), "layer body.1, a OwnNorm: this kind"),
        (nn.LazyBatchNorm2d(), "a LazyBatchNorm2d: this kind"),
        (nn.BatchNorm2d(4, track_running_stats=False), "track_running_stats=False and momentum=0.1"),
        (nn.BatchNorm2d(4, momentum=None), "track_running_stats=True and momentum=None"),
    ],
)
def test_other_batch_norm_is_refused_with_its_place(layer: nn.Module, message: str) -> None:
    network = nn.Module()
    network.body = nn.Sequential(nn.Conv2d(3, 4, 3), layer)
    with pytest.raises(ConfigError, match=message):
        use_ghost_batch_norm(network, 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_torchscript_is_refused() -> None:
    with pytest.raises(ConfigError, match="TorchScript module hides its batch norm"):
        use_ghost_batch_norm(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))), 2)


def test_a_network_without_batch_norm_stays_unchanged() -> None:
    network = timm.create_model("test_convnext", num_classes=5)
    kinds = [type(layer) for layer in network.modules()]
    use_ghost_batch_norm(network, 2)
    assert [type(layer) for layer in network.modules()] == kinds


def test_frozen_batch_norm_keeps_and_uses_its_statistics() -> None:
    network = original("test_resnet")
    use_ghost_batch_norm(network, 3)
    freeze(network, ["conv1.*", "bn1.*", "layer1.*"])
    stem = ("conv1.", "bn1.", "layer1.")
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in network.named_parameters() if name.startswith(stem)}
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()
    first = network.get_submodule("bn1")
    with torch.no_grad():
        inputs = network.get_submodule("conv1")(IMAGES)
        mean, deviation = before["bn1.running_mean"], (before["bn1.running_var"] + first.eps).sqrt()
        normalized = (inputs - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1)
        close(first(inputs), normalized * first.weight.view(-1, 1, 1) + first.bias.view(-1, 1, 1))
    network(IMAGES).square().sum().backward()
    assert {name for name, grad in gradients(network).items() if grad is None} == frozen
    RunningStatistics(network).update()
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("running" in key or "num_batches" in key for key in changed)
    assert not any(key.startswith(stem) for key in changed)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["layer1"],
            r"the pattern layer1 matches none of the network's \d+ parameters, such as conv1.* 'layer1\.\*'\?",
        ),
        (["conv1.*", "stem.*"], r"the pattern stem\.\* matches none"),
        (["*"], "all parameters are frozen"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        freeze(original("test_resnet"), patterns)


def test_the_last_layer_is_found() -> None:
    heads = {"test_resnet": "fc", "test_efficientnet": "classifier", "test_convnext": "head.fc", "test_vit": "head"}
    for name, head in heads.items():
        assert find_head(timm.create_model(name, num_classes=5)) == head
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 8), nn.Linear(8, 5), nn.Identity())
    assert find_head(own) == "2"
    assert head_layer(own, 5, "x") is own[2]
    for network, found in ((own, "2, a Linear, does not have 7 outputs"), (nn.Conv2d(3, 4, 3), "there is none")):
        with pytest.raises(ConfigError, match=f"x needs a last layer of type nn.Linear.*: {found}"):
            head_layer(network, 7, "x")
