from __future__ import annotations

import statistics

import pytest
from torchvision.models import resnet18

from lars_train.monitoring.layers import LayerValues, stage_of

VALUES = LayerValues(
    names=["conv1.weight", "bn1.bias", "layer1.0.conv1.weight", "layer1.0.bn1.weight", "fc.weight"],
    weights=[3.0, 4.0, 2.0, 0.0, 1.0],
    gradients=[0.3, 0.4, 0.1, 0.2, 0.5],
    updates=[0.03, 0.0, 0.5, 1.2, 0.1],
    lr=2.0,
    ratios={"conv1.weight": 0.01, "layer1.0.conv1.weight": 0.02, "fc.weight": 0.05, "bn1.bias": 0.03},
)


def test_every_parameter_of_a_resnet_is_in_a_stage() -> None:
    stages = [stage_of(name) for name, _ in resnet18().named_parameters()]
    assert list(dict.fromkeys(stages)) == ["stem", "layer1", "layer2", "layer3", "layer4", "fc"]


def test_stages_have_total_norms_and_median_ratios() -> None:
    found = {(what, stage): value for what, stage, value in VALUES.by_stage()}
    assert found["weight_norm", "stem"] == pytest.approx(5.0)
    assert found["grad_norm", "stem"] == pytest.approx(0.5)
    assert found["update_ratio", "stem"] == pytest.approx(0.03 / 5)
    assert found["update_ratio", "layer1"] == pytest.approx(1.3 / 2)
    assert found["trust_ratio", "stem"] == pytest.approx(statistics.median([0.01, 0.03]))
    assert found["layer_lr", "fc"] == pytest.approx(0.1)


def test_histograms_are_over_the_layers() -> None:
    found = VALUES.by_layer()
    assert found["weight_norm"] == VALUES.weights
    assert found["update_ratio"] == pytest.approx([0.01, 0.0, 0.25, 0.0, 0.1])
    assert found["layer_lr"] == pytest.approx([0.02, 0.04, 0.1, 0.06])


def test_without_lars_there_are_no_ratio_values() -> None:
    plain = LayerValues(VALUES.names, VALUES.weights, VALUES.gradients, VALUES.updates, 2.0)
    assert plain.by_layer().keys() == {"weight_norm", "grad_norm", "update_ratio"}
    assert {what for what, _, _ in plain.by_stage()} == {"weight_norm", "grad_norm", "update_ratio"}
