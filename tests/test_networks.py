"""Networks of timm and of the user are made from the config, and each that does not fit the run is refused."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import Tensor, nn

from lars_train.config import Config, run_hash
from lars_train.errors import ConfigError
from lars_train.given import Given
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.factory import build_model
from lars_train.networks import build_network, check_fit, start_network
from lars_train.training.metrics import flops_per_image

CUSTOM = """from torch import nn


class Net(nn.Sequential):
    def __init__(self, num_classes, width=4, fail=False):
        if fail:
            raise ValueError("two\\nlines")
        super().__init__(
            nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(width, num_classes),
        )


def nothing(num_classes):
    return num_classes
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder with a module that defines networks."""
    (tmp_path / "custom_networks.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "custom_networks", raising=False)


def config(source: str = "timm", name: str = "test_resnet", **values: Any) -> Config:
    return tiny(model__source=source, model__name=name, model__zero_gamma=None, **values)


def custom(target: str = "custom_networks:Net", **kwargs: Any) -> Config:
    return config("custom", "custom", model__target=target, model__kwargs=kwargs)


def test_a_timm_network_gets_its_keywords_and_ghost_batches() -> None:
    network = build_network(config(model__kwargs={"channels": [8, 8, 8, 16], "act_layer": "silu"}), 4)
    assert network.get_classifier().weight.shape[0] == 4
    assert {layer.ghost_batch for layer in network.modules() if isinstance(layer, GhostBatchNorm2d)} == {4}
    assert any(isinstance(layer, nn.SiLU) for layer in network.modules())


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("test_resnetx", {}, r"timm .* has no such network; .* Did you mean 'test_resnet'\?"),
        ("test_resnet./../x", {}, "has no such network"),
        ("hf_hub:timm/resnet18", {}, "has no such network"),
        ("test_resnet", {"pretrained": True}, r"model\.kwargs\.pretrained: omit it; download the weights, and set"),
        ("test_resnet", {"checkpoint_path": "x"}, r"model\.kwargs\.checkpoint_path: omit it"),
        ("test_resnet", {"num_classes": 3}, r"omit it; the data set determines the number of classes"),
        (
            "test_resnet",
            {"no_such": 3},
            r"num_classes=4, no_such=3 fails in .*: TypeError: .*no_such",
        ),
    ],
)
def test_timm_errors_are_one_line(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_network(config(name=name, model__kwargs=kwargs), 4)
    assert str(caught.value).isprintable()


def test_without_timm_the_message_has_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"timm is not installed; install it with: pip install 'timm>=1\.0\.20'"):
        build_network(config(), 4)


def test_a_custom_network_is_called_with_classes_and_keywords() -> None:
    network = build_network(custom(width=6), 3)
    assert network[5].weight.shape == (3, 6)
    assert isinstance(network[1], GhostBatchNorm2d)
    with pytest.raises(ConfigError, match=r"fail=True fails in .*custom_networks\.py, line 7: ValueError: two"):
        build_network(custom(fail=True), 3)
    with pytest.raises(ConfigError, match=r"num_classes=3, depth=1 fails.*unexpected keyword argument 'depth'"):
        build_network(custom(depth=1), 3)
    with pytest.raises(ConfigError, match=r"it returns a int, not a torch\.nn\.Module"):
        build_network(custom("custom_networks:nothing"), 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__name": "timm"}, "model=timm: set model.name to the name of one of timm's networks"),
        ({"model__blurpool": True}, "model.blurpool=true: it is not implemented for model=timm"),
        ({"model__zero_gamma": False}, "model.zero_gamma=false: .* set model.kwargs.zero_init_last"),
        ({"model__target": "a:b"}, "model.target=a:b has no effect with model=test_resnet"),
        ({"model__source": "custom", "model__target": "a:b"}, "model.name=test_resnet has no effect with model=custom"),
        ({"model__source": "custom", "model__name": "custom"}, "set model.target=package.module:function"),
        ({"model__source": "builtin", "model__name": "tiny", "model__kwargs": {"x": 1}}, r"kwargs\.x has no effect"),
        ({"model__source": "keras"}, "choose one of builtin, timm, custom"),
        ({"model__head_lr": 2.0}, "model.head_lr=2 needs model.new_head=true"),
    ],
)
def test_settings_that_conflict_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**{"model__source": "timm", "model__name": "test_resnet", **values})


def test_the_recipe_sets_zero_gamma_only_of_builtin_networks() -> None:
    assert config().model.zero_gamma is None
    assert tiny().model.zero_gamma is not None


def test_settings_of_the_network_are_part_of_the_hash() -> None:
    values: list[dict[str, Any]] = [{}, {"model__kwargs": {"drop_rate": 0.1}}, {"model__freeze": ["conv1.*"]}]
    assert len({run_hash(config(**one)) for one in values} | {run_hash(tiny(model__name="tiny"))}) == 4


class Own(nn.Module):
    """A small network whose `forward` is `compute`, which gets the network and the images."""

    def __init__(self, compute: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(1))
        self.compute = compute

    def features(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images)).mean((2, 3))

    def forward(self, images: Tensor) -> Any:
        return self.compute(self, images)


def plain(net: Any, images: Tensor) -> Tensor:
    return net.fc(net.features(images))


def with_dropout(net: Any, images: Tensor) -> Tensor:
    return net.fc(nn.functional.dropout(net.features(images), training=net.training))


def counting(net: Any, images: Tensor) -> Tensor:
    if net.training:
        net.seen += len(images)
    return plain(net, images)


def folding(net: Any, images: Tensor) -> Tensor:
    halves = images.view(2 * len(images), 3, images.shape[2] // 2, images.shape[3])
    return net.fc(net.features(halves).view(len(images), 2, -1).mean(1))


def fixed_size(net: Any, images: Tensor) -> Tensor:
    if images.shape[2] != 8:
        raise RuntimeError(f"the side must be 8, not {images.shape[2]}")
    return plain(net, images)


def fits(compute: Callable[[Any, Tensor], Any], **values: Any) -> bool:
    network = start_network(tiny(**values), 4, Given(network=lambda classes: Own(compute)))[0]
    return check_fit(network, tiny(**values), 4)


def test_random_numbers_in_training_are_found_and_undone() -> None:
    state, own = torch.get_rng_state(), np.random.get_state()[1].tolist()
    torch.manual_seed(5)
    network = start_network(tiny(), 4, Given(network=lambda classes: Own(with_dropout)))[0]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    drawn = torch.get_rng_state()
    assert check_fit(network, tiny(), 4)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.get_submodule("norm").ghost_samples == 0
    assert not fits(plain)
    torch.set_rng_state(state)
    assert np.random.get_state()[1].tolist() == own


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda net, images: net.features(images)[:, :3], r"a tensor of shape \(2, 3\); it must return .* \(2, 4\)"),
        (lambda net, images: {"logits": plain(net, images)}, "it returns a dict; it must return their logits"),
        (
            lambda net, images: plain(net, images) + net.none,
            r"2 images of 8 x 8 pixels fails in .*test_networks\.py",
        ),
        (counting, "a training pass changes seen, which would then differ between the ranks"),
        (folding, "its layer norm gets 4 rows for 2 images"),
        (torch.no_grad()(plain), "its logits do not depend on a trainable parameter"),
        (lambda net, images: plain(net, images) * random.random(), "draws from Python's or NumPy's random generator"),
        (lambda net, images: plain(net, images) * np.random.rand(), "draws from Python's or NumPy's random generator"),
        (
            lambda net, images: net.features(images),
            r"do not depend on 2 parameters \(fc\.weight, fc\.bias\)",
        ),
    ],
)
def test_a_network_that_does_not_fit_is_refused(compute: Callable[[Any, Tensor], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fits(compute)


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(4), lambda: nn.Linear(4, 4, device="meta")])
def test_a_network_without_values_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ConfigError, match="has parameters without values"):
        build_network(tiny(), 4, Given(network=lambda classes: make()))


@pytest.mark.parametrize("key", ["data__train_size", "data__eval_size"])
def test_a_network_of_one_size_is_refused_for_another(key: str) -> None:
    assert not fits(fixed_size)
    with pytest.raises(ConfigError, match=r"2 images of 16 x 16 pixels fails.* the side must be 8, not 16"):
        fits(fixed_size, **{key: 16})


def test_operations_of_a_network_are_counted_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from lars_train.training import metrics

    network = build_model("tiny", num_classes=4, ghost_batch=2, zero_gamma=False)
    expected = flops_per_image(network, 16)
    monkeypatch.setattr(metrics, "is_builtin", lambda network: False)
    assert flops_per_image(network, 16) == expected
    # An image of 14 x 14 outputs: 27 multiplications and additions for each of 4 channels; 4 x 4 for the last layer.
    values = Own(lambda net, images: plain(net, images) + int(net.seen.item()))
    assert flops_per_image(values, 16) == 3 * 2 * (14 * 14 * 4 * 27 + 16)


def test_builtin_and_custom_networks_do_not_need_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    build_network(tiny(), 4)
    build_network(custom(), 4)
