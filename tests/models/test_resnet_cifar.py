"""The CIFAR ResNets against the paper's tables and a block computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lars_train.models.resnet_cifar import BasicBlock, CifarResNet


def parameters_by_hand(n: int, classes: int) -> int:
    """Return the number of parameters: 3 x 3 convolutions, two per normalized channel, the linear layer."""
    convolutions = [(3, 16)] + [(16, 16)] * 2 * n
    for narrow, wide in ((16, 32), (32, 64)):
        convolutions += [(narrow, wide)] + [(wide, wide)] * (2 * n - 1)
    assert len(convolutions) == 6 * n + 1
    return sum(9 * i * o + 2 * o for i, o in convolutions) + 64 * classes + classes


@pytest.mark.parametrize(("n", "millions"), [(3, 0.27), (5, 0.46), (7, 0.66), (9, 0.85)])
def test_networks_have_the_sizes_of_table_6(n: int, millions: float) -> None:
    count = sum(p.numel() for p in CifarResNet(n, num_classes=10).parameters())
    assert count == parameters_by_hand(n, 10)
    assert round(count / 1e6, 2) == millions


def test_the_stages_have_the_papers_sizes() -> None:
    model = CifarResNet(1, num_classes=7)
    sizes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape)))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert sizes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


def test_a_widening_block_has_a_shortcut_of_pixels_and_zeros() -> None:
    block = BasicBlock(16, 32, 2, nn.BatchNorm2d).double()
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64)
    out = block(x.clone())

    def norm(y: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(y, None, None, training=True)

    body = norm(functional.conv2d(x, block.conv1.weight, stride=2, padding=1)).clamp(min=0)
    body = norm(functional.conv2d(body, block.conv2.weight, padding=1))
    body[:, :16] += x[:, :, [0, 2, 4, 6, 8]][:, :, :, [0, 2, 4, 6, 8]]
    torch.testing.assert_close(out, body.clamp(min=0), rtol=1e-12, atol=1e-12)


def test_modules_are_named_as_in_torchvision() -> None:
    names = set(CifarResNet(1, num_classes=10).state_dict())
    assert {
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv1.weight",
        "layer3.0.bn2.bias",
        "fc.bias",
    } <= names
    assert {name.split(".")[0] for name in names} == {"conv1", "bn1", "layer1", "layer2", "layer3", "fc"}


def test_convolutions_are_initialized_as_in_he_et_al() -> None:
    torch.manual_seed(0)
    weight = CifarResNet(1, num_classes=10).state_dict()["layer3.0.conv1.weight"]
    assert weight.shape == (64, 32, 3, 3)
    assert float(weight.var()) == pytest.approx(2 / (9 * 64), rel=0.03)
    assert abs(float(weight.mean())) < 1e-3


def test_the_norm_layer_can_be_chosen() -> None:
    model = CifarResNet(1, num_classes=10, norm_layer=lambda planes: nn.GroupNorm(4, planes))
    assert sum(isinstance(m, nn.GroupNorm) for m in model.modules()) == 7
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_a_stem_of_stride_2_costs_a_quarter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counted = []
    for stride in (1, 2):
        model = CifarResNet(1, num_classes=10, stem_stride=stride)
        with FlopCounterMode(display=False) as counter:
            assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
        counted.append(counter.get_total_flops() - 2 * 2 * 64 * 10)  # minus the linear layer's
    assert counted[0] == 4 * counted[1]
    assert sum(p.numel() for p in model.parameters()) == parameters_by_hand(1, 10)
