"""Frozen parameters, a faster last layer, clipped gradients and seeded dropout, compared with plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import tiny
from torch import Tensor, nn

from lars_train.config import Config
from lars_train.data.loading.loader import Batch
from lars_train.launch import Ranks
from lars_train.models.convert import freeze
from lars_train.models.factory import build_model
from lars_train.run_plan import Plan
from lars_train.training.assemble import build_trainer
from lars_train.training.device import Precision
from lars_train.training.device_prefetch import RankContext
from lars_train.training.distributed import Group
from lars_train.training.trainer import Trainer

CPU, FP64 = torch.device("cpu"), Precision("fp64", torch.float64, torch.float64)
LR = 0.5
PLAN = Plan(32, 8, 8, 4, False, False, 2, 4, 8, 8, 0)
SGD = {"optimizer__name": "torch", "optimizer__base": "SGD", "optimizer__momentum": 0.0, "optimizer__weight_decay": 0.0}


class Dropping(nn.Sequential):
    """A network with dropout."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * 64, 16), nn.Dropout(0.5), nn.Linear(16, 4))


def network() -> nn.Module:
    torch.manual_seed(1)
    return build_model("small", num_classes=4, ghost_batch=4, zero_gamma=False).double()


def trainer(model: nn.Module, config: Config, draws: bool = False, rank: int = 0) -> Trainer:
    group = Group(Ranks(rank=rank)) if rank else Group(Ranks())
    context = RankContext(CPU, group, FP64, lambda images: images.double() / 255)
    return build_trainer(config, PLAN, model, lambda update: LR, context, draws=draws)


def batch(update: int) -> Iterator[Batch]:
    draw = torch.Generator().manual_seed(update)
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=draw)
    return iter([Batch(images, torch.randint(4, (8,), generator=draw), ())])


def change(model: nn.Module, **values: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the change of each parameter by the first update, and the values that a log line would have."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    info = trainer(model, tiny(**SGD, **values)).run_update(batch(0), 1, measure=True)
    assert info.measures is not None
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}, info.measures.values()


def norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in tensors.values()]).norm())


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_a_gradient_is_clipped_as_by_torch(share: float) -> None:
    plain, logged = change(network())
    limit = share * logged["train/grad_norm"]
    assert norm(plain) == pytest.approx(LR * logged["train/grad_norm"], rel=1e-12)
    found, clipped = change(network(), optimizer__clip_grad_norm=limit)
    # The log has the norm before clipping.
    assert clipped["train/grad_norm"] == logged["train/grad_norm"]
    model = network()
    for name, parameter in model.named_parameters():
        parameter.grad = -plain[name] / LR
    nn.utils.clip_grad_norm_(model.parameters(), limit)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], -LR * parameter.grad, rtol=1e-9, atol=1e-12)
    assert norm(found) == pytest.approx(LR * logged["train/grad_norm"] * min(1.0, share), rel=1e-5)


def test_the_last_layer_has_a_multiple_of_the_learning_rate() -> None:
    plain, _ = change(network())
    head = {"model__weights": "net.pth", "model__new_head": True, "model__head_lr": 3.0}
    found, _ = change(network(), **head)
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name] * (3 if name.startswith("fc.") else 1), rtol=1e-12, atol=0)
    lars = trainer(network(), tiny(optimizer__lr=1.0, **head))
    lars.run_update(batch(0), 1, measure=False)
    assert {(group["name"], group["lr"]) for group in lars.optimizer.param_groups} == {
        ("decay", LR),
        ("decay_head", 3 * LR),
    }


@pytest.mark.parametrize("name", ["torch", "lars"])
def test_frozen_parameters_are_left_out_of_optimizer_and_logs(name: str) -> None:
    model = network()
    freeze(model, ["conv1.*", "bn1.*", "layer2.*"])
    config = tiny(**SGD) if name == "torch" else tiny()
    made = trainer(model, config)
    stays = ("conv1", "bn1", "layer2")
    frozen = {key: value.clone() for key, value in model.state_dict().items() if key.startswith(stays)}
    for update in range(2):
        info = made.run_update(batch(update), 1, measure=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    groups = made.optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(model.get_parameter(n)) for n in trained}
    assert info.measures is not None
    layers = info.measures.layers({id(p): n for n, p in model.named_parameters()}, made.optimizer, LR)
    assert sorted(layers.names) == sorted(trained)
    assert set(layers.ratios) <= set(trained)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in frozen.items())
    assert not torch.equal(state["layer1.0.conv1.weight"], network().state_dict()["layer1.0.conv1.weight"])


def outcome(updates: int, rank: int = 0, start: dict[str, Any] | None = None, seed: int = 0) -> Trainer:
    torch.manual_seed(7)
    model = Dropping().double()
    made = trainer(model, tiny(**SGD, seed=seed), draws=True, rank=rank)
    if start is not None:
        made.restore(start)
    torch.rand(3)  # other draws do not matter
    while made.update < updates:
        made.run_update(batch(made.update), 1, measure=False)
    return made


def test_dropout_depends_on_seed_update_and_rank_alone() -> None:
    def weights(made: Trainer) -> Tensor:
        return torch.cat([p.detach().flatten() for p in made.network.parameters()])

    whole = weights(outcome(4))
    resumed = outcome(4, start=outcome(2).state())
    assert torch.equal(weights(resumed), whole)
    others = [whole, weights(outcome(4, rank=1)), weights(outcome(4, seed=1))]
    assert len({tuple(one.tolist()) for one in others}) == 3
