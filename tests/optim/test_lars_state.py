"""Copies, state dicts and distributed checkpoints of LARS over every dense optimizer of torch.optim."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from bases import (
    DECAY,
    EPS,
    ONE_GRADIENT,
    TRUST,
    UPDATES,
    Base,
    Matrices,
    Problem,
    assert_close,
    assert_same,
    every_base,
    no_warnings,
    over,
    rescaled,
    run,
    wide,
)
from torch import nn, optim
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler

from lars_train import LARS

pytestmark = no_warnings


def saved_whole(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "save": saved_whole,
}


@over(ONE_GRADIENT)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("with_schedule", [False, True], ids=["plain", "scheduled"])
def test_a_copy_continues_like_the_original_independently(base: Base, how: str, with_schedule: bool) -> None:
    problem = Problem(base)
    params = problem.parameters()
    lars = base.lars(params)
    if with_schedule:
        # A scheduler replaces the step of the instance by a closure, which cannot be pickled.
        lr_scheduler.ExponentialLR(lars, 0.9)
        lr_scheduler.ExponentialLR(lars.base_optimizer, 0.9)
    run(lars, params, problem, range(2))
    before = [p.detach().clone() for p in params]
    params2, lars2 = COPIES[how]((params, lars))
    run(lars2, params2, problem, range(2, UPDATES))
    assert_same(params, before)
    run(lars, params, problem, range(2, UPDATES))
    assert_same(params2, params)
    assert lars2.rule == lars.rule


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_lbfgs_fails_as_without_lars(how: str) -> None:
    for wrap in (lambda base: base, LARS):
        optimizer = COPIES[how](wrap(optim.LBFGS([Parameter(torch.ones(2))])))
        with pytest.raises(AttributeError, match="_params"):
            optimizer.step(lambda: torch.tensor(1.0))


@every_base
def test_a_shallow_copy_shares_the_base(base: Base) -> None:
    lars = base.lars(Problem(base).parameters())
    twin = copy.copy(lars)
    assert twin.base_optimizer is lars.base_optimizer
    assert twin.param_groups is lars.param_groups
    twin.eps = 0.25
    assert (twin.eps, lars.eps) == (0.25, EPS)


UNUSUAL = {
    "eps": 0.5,
    "trust_coef": 0.25,
    "denominator": "combined",
    "clip": (0.0, 50.0),
    "zero_norm": "skip",
    "zero_decay": "skip",
    "clamp": 5.0,
}


@every_base
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_saved_state_dict_restores_options_and_state(base: Base, weights_only: bool) -> None:
    problem = Problem(base, [torch.float32])
    params = problem.parameters()
    lars = LARS(base.build(params), **UNUSUAL)
    run(lars, params, problem, range(2))
    file = io.BytesIO()
    assert lars.state_dict().keys() == {"state", "param_groups", "lars"}
    torch.save(lars.state_dict(), file)
    file.seek(0)
    params2 = [Parameter(p.detach().clone()) for p in params]
    lars2 = LARS(base.build(params2, lr=0.125))
    lars2.load_state_dict(torch.load(file, weights_only=weights_only))
    assert {key: getattr(lars2.rule, key) for key in UNUSUAL} == UNUSUAL
    assert lars2.param_groups[0]["lr"] == base.keywords["lr"]
    run(lars, params, problem, range(2, UPDATES))
    run(lars2, params2, problem, range(2, UPDATES))
    assert_same(params2, params)


@over(ONE_GRADIENT)
def test_a_base_state_dict_leaves_options_and_exclude_unchanged(base: Base) -> None:
    problem = Problem(base)
    params, plain = problem.parameters(), problem.parameters()
    decay = {"weight_decay": DECAY} if base.takes("weight_decay") else {}
    alone = base.build([{"params": plain[:1]}, {"params": plain[1:]}], **decay)
    run(alone, plain, problem, range(2))

    groups = [{"params": params[:1]}, {"params": params[1:], "exclude": True}]
    lars = base.lars(groups, lr=0.125)
    for p, q in zip(params, plain, strict=True):
        p.data.copy_(q)
    lars.load_state_dict(copy.deepcopy(alone.state_dict()))
    assert (lars.eps, lars.trust_coef) == (EPS, TRUST)
    assert [g.get("exclude") for g in lars.param_groups] == [None, True]
    assert [g["lr"] for g in lars.param_groups] == [base.keywords["lr"]] * 2

    # The base handles excluded parameters, weight decay included. Loading casts some states in both.
    alone.load_state_dict(copy.deepcopy(alone.state_dict()))
    alone.param_groups[0] |= {"weight_decay": 0.0} if decay else {}
    run(lars, params, problem, range(2, UPDATES))
    for update in range(2, UPDATES):
        alone.zero_grad()
        problem.loss(plain, update).backward()
        assert plain[0].grad is not None
        plain[0].grad.copy_(torch.from_numpy(rescaled(wide(plain[0]), wide(plain[0].grad), base.decay)))
        alone.step()
    assert_close(params, plain, base.tolerance)


@every_base
def test_a_state_dict_of_lars_loads_into_the_base_alone(base: Base) -> None:
    problem = Problem(base, [torch.float32])
    params, plain = problem.parameters(), problem.parameters()
    lars = base.lars(params)
    run(lars, params, problem, range(2))
    alone = base.build(plain, lr=0.125)
    alone.load_state_dict(copy.deepcopy(lars.state_dict()))
    assert alone.state_dict()["param_groups"] == lars.base_optimizer.state_dict()["param_groups"]
    torch.testing.assert_close(alone.state_dict()["state"], lars.base_optimizer.state_dict()["state"], rtol=0, atol=0)


def train(model: nn.Module, optimizer: Optimizer, updates: Iterable[int]) -> None:
    for update in updates:
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 15).view(5, 3) * (1 + update)).square().sum().backward()
        optimizer.step()


@over(ONE_GRADIENT)
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoint_saves_and_restores_the_state(base: Base, flatten: bool) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = Matrices(torch.float32), Matrices(torch.float32)
    lars = base.lars([{"params": [model.first]}, {"params": [model.second], "exclude": True}])
    train(model, lars, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, lars, options=options))

    other.load_state_dict(model.state_dict())
    loaded = base.lars([{"params": [other.first]}, {"params": [other.second], "exclude": True}], lr=0.125)
    set_optimizer_state_dict(other, loaded, saved, options=options)
    # torch fills an empty state by a step with zero gradients and lr 0, which must not change a weight.
    assert_same(list(other.parameters()), list(model.parameters()))
    assert [g["lr"] for g in loaded.param_groups] == [base.keywords["lr"]] * 2
    train(model, lars, range(2, UPDATES))
    train(other, loaded, range(2, UPDATES))
    assert_same(list(other.parameters()), list(model.parameters()))


# Options of timm's Lars, which has the same rule and the same state as bolts'. The rest of the call for each.
FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "timm": ({}, ""),
    "bolts": ({}, ""),
    "timm-changed": (
        {"trust_coeff": 0.02, "eps": 0.5, "trust_clip": True, "always_adapt": True},
        ", eps=0.5, trust_coef=0.02, clip='lr', zero_decay='adapt'",
    ),
    "bolts-changed": ({"trust_coeff": 0.02}, ", trust_coef=0.02"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_state_dict_of_timm_or_bolts_continues_their_updates(name: str) -> None:
    kind = pytest.importorskip("timm.optim.lars").Lars
    (preset, _, changed), (options, rest) = name.partition("-"), FOREIGN[name]

    def train(optimizer: Optimizer, weight: Parameter, updates: range) -> None:
        for update in updates:
            weight.grad = 0.3 * weight.detach() + 0.1 * (update + 1)
            optimizer.step()

    theirs, ours = (Parameter(torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3)) for _ in range(2))
    decay = 0.0 if options.get("always_adapt") else DECAY
    timm = kind([theirs], lr=0.5, momentum=0.9, weight_decay=decay, **options)
    train(timm, theirs, range(3))
    ours.data.copy_(theirs.data)
    state = copy.deepcopy(timm.state_dict())
    (group,) = state["param_groups"]
    if preset == "bolts":
        group["trust_coefficient"] = group.pop("trust_coeff")
        del group["trust_clip"], group["always_adapt"]
    lars = LARS.preset(preset, optim.SGD([ours], lr=0.1))
    call = f"LARS.preset({preset!r}, torch.optim.SGD(…){rest})"
    for other in (
        LARS(optim.SGD([ours], lr=0.1)),
        LARS.preset(preset, optim.AdamW([ours])),
        *([lars] if changed else []),
    ):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=re.escape(f"load it into {call}. ")):
            other.load_state_dict(state)
        assert other.state_dict() == before
    if changed:
        lars = eval(call.replace("…", "[ours], lr=0.1"), {"LARS": LARS, "torch": torch, "ours": ours})
    lars.load_state_dict(state)
    train(timm, theirs, range(3, 6))
    train(lars, ours, range(3, 6))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    # Once loaded, the options are LARS's own.
    again = LARS(optim.SGD([ours], lr=0.1))
    again.load_state_dict(lars.state_dict())
    assert again.rule == lars.rule


def test_a_state_dict_of_timm_loads_with_our_rule_on_request() -> None:
    kind = pytest.importorskip("timm.optim.lars").Lars
    weight = Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    timm, lars = kind([weight], lr=0.5, momentum=0.9, trust_coeff=0.02), LARS(optim.SGD([weight], lr=0.1))
    timm.step()
    state = timm.state_dict()
    for group in state["param_groups"]:
        del group["trust_coeff"]  # as the message says
    lars.load_state_dict(state)
    assert (lars.trust_coef, lars.param_groups[0]["lr"]) == (0.001, 0.5)
    assert torch.equal(lars.state[weight]["momentum_buffer"], timm.state[weight]["momentum_buffer"])


class MoCo(Optimizer):
    """The arithmetic of MoCo v3's loop, and of Barlow Twins' with its keys.

    Sources: moco/optimizer.py in https://github.com/facebookresearch/moco-v3, and main.py in
    https://github.com/facebookresearch/barlowtwins.
    """

    def __init__(self, params: Any, trust: str, **options: Any) -> None:
        super().__init__(params, {"lr": 0.5, "weight_decay": DECAY, "momentum": 0.9, trust: 0.02, **options})
        self.trust = trust

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                d = w.grad if w.ndim == 1 else w.grad + group["weight_decay"] * w
                d = d if w.ndim == 1 else d * (group[self.trust] * w.norm() / d.norm())
                mu = self.state[w].setdefault("mu", torch.zeros_like(w))
                mu.mul_(group["momentum"]).add_(d)
                w.sub_(group["lr"] * mu)


def pytorch_optimizers(params: Any) -> Optimizer:
    kind = pytest.importorskip("pytorch_optimizer").LARS
    optimizer: Optimizer = kind(params, lr=0.5, weight_decay=DECAY, momentum=0.9, trust_coefficient=0.02)
    return optimizer


def timms_lamb(params: Any) -> Optimizer:
    kind = pytest.importorskip("timm.optim.lamb").Lamb
    optimizer: Optimizer = kind(params, lr=0.5, weight_decay=DECAY, max_grad_norm=None, always_adapt=True)
    return optimizer


# Implementations whose state dicts LARS cannot take whole: the optimizer, the preset with its rule, and LARS's base.
Make = Callable[[Any], Optimizer]
OTHERS: dict[str, tuple[Make, str, Make]] = {
    "moco-v3": (
        lambda p: MoCo(p, "trust_coefficient", nesterov=False),
        "moco-v3",
        lambda p: optim.SGD(p, momentum=0.9),
    ),
    "barlow-twins": (
        lambda p: MoCo(p, "eta", weight_decay_filter=True, lars_adaptation_filter=True),
        "moco-v3",
        lambda p: optim.SGD(p, momentum=0.9),
    ),
    "pytorch-optimizer": (pytorch_optimizers, "pytorch-optimizer", lambda p: optim.SGD(p, momentum=0.9)),
    "timm's Lamb": (timms_lamb, "lamb", lambda p: optim.AdamW(p, eps=1e-6)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_state_dict_is_refused_with_the_way_to_continue(name: str) -> None:
    def train(optimizer: Optimizer, weights: list[Parameter], updates: range) -> None:
        for update in updates:
            for weight in weights:
                weight.grad = 0.3 * weight.detach() + 0.1 * (update + 1)
            optimizer.step()

    def weights() -> list[Parameter]:
        return [Parameter(torch.linspace(-1, 2, n, dtype=torch.float64).reshape(shape)) for n, shape in SHAPES]

    build, preset, base = OTHERS[name]
    theirs, ours = weights(), weights()
    other = build(theirs[::-1])
    train(other, theirs, range(3))
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q)
    state_dict = copy.deepcopy(other.state_dict())
    vectors = {} if preset == "lamb" else {"exclude": True, "weight_decay": 0.0}
    groups = [
        {"params": ours[:1], "lr": 0.5, "weight_decay": DECAY},
        {"params": ours[1:], "lr": 0.5, "weight_decay": DECAY, **vectors},
    ]
    lars = LARS.preset(preset, base(groups), **({} if preset == "lamb" else {"trust_coef": 0.02}))
    before = copy.deepcopy(lars.state_dict())
    for loads in (lars, LARS.preset("bolts", optim.SGD(ours), trust_coef=0.02)):
        with pytest.raises(ValueError, match="the state dict is of another implementation") as refused:
            loads.load_state_dict(state_dict)
    assert lars.state_dict() == before
    way = str(refused.value).partition("and run: ")[2]
    exec(way, {"lars": lars, "state_dict": state_dict, "params": ours[::-1], "torch": torch})
    train(other, theirs, range(3, 6))
    train(lars, ours, range(3, 6))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


SHAPES = [(12, (4, 3)), (5, (5,))]


def test_groups_with_different_rules_need_one_lars_each() -> None:
    params = [Parameter(torch.ones(2)) for _ in range(2)]
    state_dict = optim.SGD([{"params": [p]} for p in params], lr=0.1, momentum=0.9).state_dict()
    for group, trust in zip(state_dict["param_groups"], (0.01, 0.001), strict=True):
        group |= {"trust_coefficient": trust, "eps": 1e-8}
    for trust in (0.01, 0.001):
        lars = LARS.preset("bolts", optim.SGD([{"params": [p]} for p in params], lr=0.1), trust_coef=trust)
        with pytest.raises(ValueError, match=r"trust_coefficient=0.01, 0.001: create one LARS for each"):
            lars.load_state_dict(state_dict)


@pytest.mark.parametrize(
    ("saved", "base", "message"),
    [
        (optim.AdamW, optim.SGD, "is not of SGD: it lacks dampening, momentum"),
        (optim.SGD, optim.AdamW, "is not of AdamW: it lacks betas, eps"),
        (optim.Adamax, optim.AdamW, "is not of AdamW: it lacks exp_avg_sq"),
        (optim.Adam, optim.NAdam, "is not of NAdam: it lacks momentum_decay, mu_product"),
    ],
    ids=str,
)
@pytest.mark.parametrize("of_lars", [True, False])
def test_the_state_dict_of_another_base_is_refused(saved: Any, base: Any, message: str, of_lars: bool) -> None:
    weight = Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    source = LARS(saved([weight], lr=0.1)) if of_lars else saved([weight], lr=0.1)
    source.step()
    lars = LARS(base([weight], lr=0.2))
    before = copy.deepcopy(lars.state_dict())
    with pytest.raises(ValueError, match=message):
        lars.load_state_dict(source.state_dict())
    assert lars.state_dict() == before


def test_a_whole_checkpoint_is_no_state_dict() -> None:
    lars = LARS(optim.SGD([Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(ValueError, match=r"its keys are \['epoch', 'optimizer'\]. If it is a checkpoint"):
        lars.load_state_dict({"optimizer": lars.state_dict(), "epoch": 3})
    with pytest.raises(ValueError, match="not an optimizer's state dict"):
        lars.load_state_dict({})


def test_distributed_checkpoint_refuses_lbfgs_as_without_lars() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for wrap in (lambda base: base, LARS):
        model = Matrices()
        with pytest.raises(TypeError):
            get_optimizer_state_dict(model, wrap(optim.LBFGS(model.parameters())))
