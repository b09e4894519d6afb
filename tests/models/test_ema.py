"""The average of the weights is that of torch and of the formula, and a checkpoint without it is explained."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lars_train.errors import ConfigError
from lars_train.models.ema import ExponentialMovingAverage, check_average, choose_weights

DECAY = 0.9


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).double()


def trained(model: nn.Module, updates: int) -> Iterator[int]:
    """Change the weights, and batch norm's statistics in a forward pass; yield the update, from 0."""
    draw = torch.Generator().manual_seed(1)
    for update in range(updates):
        model(torch.randn(2, 3, 5, 5, generator=draw, dtype=torch.float64))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        yield update


@pytest.mark.parametrize("start", [0, 3])
def test_the_average_is_that_of_torch_and_of_the_formula(start: int) -> None:
    model = network()
    ours = ExponentialMovingAverage(model, DECAY, start)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    by_hand = {}
    for update in trained(model, 8):
        ours.update(update)
        state = {key: value.clone() for key, value in model.state_dict().items() if value.is_floating_point()}
        if update >= start:
            theirs.update_parameters(model)
            by_hand = {k: DECAY * by_hand[k] + (1 - DECAY) * v for k, v in state.items()} if by_hand else state
        for key, value in (by_hand or state).items():
            torch.testing.assert_close(ours.network.state_dict()[key], value, rtol=1e-13, atol=1e-13)
    expected = {key: value for key, value in theirs.module.state_dict().items() if value.is_floating_point()}
    assert set(expected) == {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    for key, value in expected.items():
        torch.testing.assert_close(ours.network.state_dict()[key], value, rtol=0, atol=0)
    assert ours.network.state_dict()["1.num_batches_tracked"] == 8
    assert not ours.network.training
    assert not any(parameter.requires_grad for parameter in ours.network.parameters())


def test_a_checkpoint_without_average_is_refused_after_the_start() -> None:
    model = network()
    content = {"update": 5, "model": deepcopy(model.state_dict())}
    for _ in trained(model, 2):
        pass
    check_average(content, None, 0)
    check_average(content, DECAY, 4)
    average = ExponentialMovingAverage(model, DECAY, 4)
    average.restore(content)
    assert all(torch.equal(value, content["model"][key]) for key, value in average.network.state_dict().items())
    with pytest.raises(ConfigError, match=r"model\.ema=0\.9: .* of update 5 has no average .* model\.ema_start=5"):
        check_average(content, DECAY, 3)
    check_average({**content, "ema": {}}, DECAY, 3)


def test_the_average_is_chosen_if_there_is_one() -> None:
    weights, average = {"a": 1}, {"a": 2}
    both, one = {"model": weights, "ema": average}, {"model": weights}
    assert choose_weights(both, None, "k") == choose_weights(both, True, "k") == (average, True)
    assert choose_weights(both, False, "k") == choose_weights(one, None, "k") == (weights, False)
    with pytest.raises(ConfigError, match=r"export\.ema=true: the checkpoint has no average of the weights"):
        choose_weights(one, True, "export.ema")
