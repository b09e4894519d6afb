"""`build_optimizer` builds the config's optimizer, and refuses what cannot work with a clear message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from resolving import resolved
from torch import nn

from lars_train.config import OptimizerConfig
from lars_train.errors import ConfigError
from lars_train.optim.lars import LARS
from lars_train.training.assemble import build_optimizer, check_optimizer


def config(**values: Any) -> OptimizerConfig:
    common: dict[str, Any] = {
        "name": "lars",
        "base": "SGD",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "decay_norm_bias": True,
        "adapt_norm_bias": True,
        "eps": 1e-8,
        "trust_coef": 0.01,
    }
    return OptimizerConfig(**{**common, **values})


@pytest.mark.parametrize(
    "base",
    [
        "ASGD",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    ],
)
def test_every_suitable_optimizer_trains_a_network_under_lars(base: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    optimizer = build_optimizer(config(base=base), model)
    assert isinstance(optimizer, LARS)
    assert type(optimizer.base_optimizer) is getattr(torch.optim, base)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(8, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_preset_lamb_over_adamw_scales_its_steps() -> None:
    given = ("optimizer=lars", "optimizer.base=AdamW", "optimizer.preset=lamb", "optimizer.lr=4e-3")
    lamb = resolved("data=imagenet", *given, "+optimizer.kwargs.eps=1e-6").optimizer
    optimizer = build_optimizer(lamb, nn.Linear(2, 2))
    assert isinstance(optimizer, LARS)
    assert isinstance(optimizer.base_optimizer, torch.optim.AdamW)
    assert (optimizer.rule.ratio_of, optimizer.rule.trust_coef, optimizer.rule.eps) == ("step", 1.0, 0.0)
    with pytest.raises(ConfigError, match=r"optimizer\.base=Adafactor: ratio_of='step' needs a base whose step is"):
        check_optimizer(config(base="Adafactor", ratio_of="step"))


@pytest.mark.parametrize("base", ["LBFGS", "Muon", "SparseAdam"])
def test_an_unsuitable_optimizer_is_refused_with_a_reason(base: str) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.base={base}: it "):
        check_optimizer(config(base=base))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": "Adan"}, "Did you mean 'Adam'"),
        ({"base": "Optimizer"}, "no such class"),
        ({"kwargs": {"dampenin": 0.1}}, "Did you mean 'dampening'"),
        ({"kwargs": {"nesterov": True}}, "use optimizer.nesterov"),
        ({"base": "AdamW", "nesterov": True}, "has no Nesterov momentum"),
        ({"kwargs": {"lr": 1.0}}, "use optimizer.lr"),
        ({"base": "AdamW", "momentum": 0.9}, "has no momentum"),
        ({"base": "Adam", "kwargs": {"betas": [2.0, 0.9]}}, "rejects its keywords"),
    ],
)
def test_rejected_keywords_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer(config(**values))


def test_sgd_is_used_without_lars_and_keeps_its_momentum() -> None:
    optimizer = build_optimizer(config(name="sgd", momentum=0.9, nesterov=True), nn.Linear(2, 2))
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)


@pytest.mark.parametrize(
    ("base", "keywords", "message"),
    [
        ("AdamW", {"betas": 0.9}, "betas=0.9: torch.optim.AdamW takes a list of 2 numbers (default: (0.9, 0.999))"),
        ("AdamW", {"betas": [0.9]}, "a list of 2 numbers"),
        ("AdamW", {"betas": [0.9, 0.99, 0.9]}, "a list of 2 numbers"),
        ("AdamW", {"betas": ["a", "b"]}, "a list of 2 numbers"),
        ("AdamW", {"betas": None}, "a list of 2 numbers"),
        ("AdamW", {"eps": "abc"}, "eps=abc: torch.optim.AdamW takes a number"),
        ("AdamW", {"eps": True}, "a number"),
        ("AdamW", {"eps": 1e39}, "a number"),
        ("AdamW", {"fused": "yes"}, "fused=yes: torch.optim.AdamW takes null, true or false"),
        ("AdamW", {"amsgrad": 1}, "true or false"),
        ("Rprop", {"etas": [0.5]}, "a list of 2 numbers"),
    ],
)
def test_a_keyword_of_the_wrong_type_is_refused_at_the_start(base: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_optimizer(config(base=base, kwargs=keywords))
    assert message in str(caught.value)


def test_keywords_of_the_right_type_are_accepted() -> None:
    check_optimizer(config(base="AdamW", kwargs={"betas": [0.9, 0.99], "eps": 1e-6, "foreach": None, "amsgrad": True}))
    check_optimizer(config(base="Adafactor", kwargs={"eps": [None, 1e-3]}))
    check_optimizer(config(base="SGD", kwargs={"dampening": 0.1, "fused": True}))
    # The device is chosen later.
    check_optimizer(config(base="AdamW", kwargs={"capturable": True}))
    with pytest.raises(ConfigError, match="capturable=true: it needs CUDA"):
        build_optimizer(config(base="AdamW", kwargs={"capturable": True}), nn.Linear(1, 1))
