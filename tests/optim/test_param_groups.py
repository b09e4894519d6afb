"""Every parameter is in exactly one group, with or without weight decay as configured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import lr_scheduler

from lars_train.optim.lars import LARS
from lars_train.optim.param_groups import parameter_groups, split_parameters


class Net(nn.Module):
    """One layer of each kind, with a tied weight and a norm layer whose parameters are not 1-D."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        linear = nn.Linear(4, 4, bias=False)
        self.body = nn.Sequential(linear, nn.GroupNorm(2, 4), nn.LayerNorm([4, 2, 2]))
        self.fc = nn.Linear(4, 2)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = linear.weight
        self.scale = nn.Parameter(torch.ones(4))


def named(model: nn.Module, groups: list[dict[str, object]]) -> dict[str, list[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {str(g["name"]): [names[id(p)] for p in tensors(g)] for g in groups}


def tensors(group: dict[str, object]) -> list[Tensor]:
    params = group["params"]
    assert isinstance(params, list)
    return params


def test_decay_norm_bias_false_exempts_biases_and_norm_layers() -> None:
    model = Net()
    groups = parameter_groups(model, 5e-4, decay_norm_bias=False)
    assert named(model, groups) == {
        "decay": ["scale", "conv.weight", "body.0.weight", "fc.weight"],
        "no_decay": [
            "conv.bias",
            "bn.weight",
            "bn.bias",
            "body.1.weight",
            "body.1.bias",
            "body.2.weight",
            "body.2.bias",
            "fc.bias",
            "tied.bias",
        ],
    }
    assert [g["weight_decay"] for g in groups] == [5e-4, 0.0]


def test_decay_norm_bias_true_decays_everything() -> None:
    model = Net()
    groups = parameter_groups(model, 5e-4, decay_norm_bias=True, adapt_norm_bias=True)
    assert named(model, groups) == {"decay": [n for n, _ in model.named_parameters()]}
    assert groups[0]["weight_decay"] == 5e-4


# mmpretrain's multiplier; the two rates of Barlow Twins.
FACTORS = [0.024, 0.0048 / 0.2]
SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda o: lr_scheduler.LambdaLR(o, lambda update: 1 / (1 + update)),
    lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2),
    lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
]


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("factor", FACTORS)
def test_schedulers_keep_the_lr_factor(factor: float, make: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    model = Net()
    groups = parameter_groups(model, 1e-6, lr=1.6, norm_bias_lr_factor=factor)
    assert [(g["lr"], g["weight_decay"], g.get("exclude", False)) for g in groups] == [
        (1.6, 1e-6, False),
        (1.6 * factor, 0.0, True),
    ]
    lars = LARS.preset("moco-v3", torch.optim.SGD(groups, lr=1.6, momentum=0.9))
    scheduler = make(lars)
    rates, bias = [], model.fc.bias
    for _ in range(7):
        weights, rest = (g["lr"] for g in lars.param_groups)
        assert rest == pytest.approx(factor * weights, rel=1e-12)
        rates.append(weights)
        before, buffer = bias.detach().clone(), lars.state[bias].get("momentum_buffer", torch.zeros(2)).clone()
        bias.grad = torch.randn(2)
        momentum = 0.9 * buffer + bias.grad
        lars.step()
        torch.testing.assert_close(bias.detach(), before - rest * momentum)
        scheduler.step()
    assert len(set(rates)) == len(rates)


def test_an_lr_factor_needs_an_lr_and_separates_the_groups() -> None:
    groups = parameter_groups(Net(), 0.1, True, True, lr=2.0, norm_bias_lr_factor=0.5)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [("decay", 2.0, 0.1), ("norm_bias", 1.0, 0.1)]
    assert not any("lr" in g for g in parameter_groups(Net(), 0.1))
    with pytest.raises(ValueError, match=r"norm_bias_lr_factor=0.5 is a multiple of lr"):
        parameter_groups(Net(), 0.1, norm_bias_lr_factor=0.5)
    with pytest.raises(ValueError, match=r"norm_bias_lr_factor=-1: it must be finite and at least 0"):
        parameter_groups(Net(), 0.1, lr=1.0, norm_bias_lr_factor=-1)


def test_a_negative_decay_and_a_list_for_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_decay=-0.1: it must be finite and at least 0"):
        parameter_groups(Net(), -0.1)
    parameters: Any = list(Net().parameters())
    with pytest.raises(TypeError, match=r"pass the model, a torch.nn.Module, not list"):
        split_parameters(parameters)


@pytest.mark.parametrize("decay_norm_bias", [True, False])
def test_every_parameter_is_in_exactly_one_group(decay_norm_bias: bool) -> None:
    model = Net()
    ids = [id(p) for g in parameter_groups(model, 1e-4, decay_norm_bias) for p in tensors(g)]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_no_group_is_empty() -> None:
    assert [g["name"] for g in parameter_groups(nn.Linear(2, 2, bias=False), 0.1, False)] == ["decay"]
    assert [g["name"] for g in parameter_groups(nn.BatchNorm2d(2), 0.1, False)] == ["no_decay"]


def test_torch_optimizers_accept_the_groups() -> None:
    optimizer = torch.optim.SGD(parameter_groups(Net(), 0.1, False), lr=1.0)
    assert [(g["name"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("decay", 0.1),
        ("no_decay", 0.0),
    ]


def test_a_model_splits_into_weights_and_biases_with_norm_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2), nn.LayerNorm(2))
    weights, rest = split_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in weights] == ["0.weight", "3.weight"]
    assert [names[id(p)] for p in rest] == ["0.bias", "1.weight", "1.bias", "3.bias", "4.weight", "4.bias"]


def test_every_bias_is_among_the_biases() -> None:
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    linear = nn.Linear(3, 2)
    parametrize.register_parametrization(linear, "bias", nn.Identity())
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "attention": attention, "linear": linear})
    names = {id(p): name for name, p in model.named_parameters()}
    weights, rest = ([names[id(p)] for p in part] for part in split_parameters(model))
    assert all("bias" in name for name in rest)
    assert not any("bias" in name for name in weights)
    assert len(weights) + len(rest) == len(names)
