"""Calls in the form of other implementations work, or the error shows the line to write."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_optimizer import SAM
from torch import Tensor, nn
from torch.optim import SGD, Adam

from lars_train import LARS


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([3.0, 4.0]))


def test_the_example_of_torchlars_trains_by_its_formula() -> None:
    weight = parameter()
    base_optimizer = SGD([weight], lr=0.5)
    optimizer = LARS(optimizer=base_optimizer, eps=1e-8, trust_coef=0.001)
    optimizer.zero_grad()
    (weight @ torch.tensor([0.0, 2.0])).backward()
    optimizer.step()
    # |w| is 5, |g| is 2.
    torch.testing.assert_close(weight.data, torch.tensor([3.0, 4.0 - 0.5 * (0.001 * 5 / 2) * 2]))
    assert optimizer.optim is optimizer.base_optimizer is base_optimizer


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda lars: pickle.loads(pickle.dumps(lars))])
def test_copies_have_the_attributes_of_torchlars(duplicate: Callable[[LARS], LARS]) -> None:
    twin = duplicate(LARS(SGD([parameter()], lr=0.1), trust_coef=0.42, eps=0.5))
    assert type(twin.optim) is SGD
    assert (twin.optim.param_groups[0]["lr"], twin.trust_coef, twin.eps) == (0.1, 0.42, 0.5)


def test_a_preset_takes_both_names_of_the_base() -> None:
    base = SGD([parameter()], lr=0.1)
    assert repr(LARS.preset("timm", optimizer=base)) == repr(LARS.preset("timm", base))


SGD_LINE = "torch.optim.SGD(params, lr=0.3)"
# Calls in the form of other implementations, and the call with the same rule.
FORMS: dict[str, tuple[Any, str]] = {
    "lightning-bolts": (
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6, "trust_coefficient": 0.02, "eps": 1e-6},
        "LARS.preset('bolts', torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-06), eps=1e-06, "
        "trust_coef=0.02)",
    ),
    "timm": ({"lr": 0.3, "trust_coeff": 0.2}, f"LARS.preset('timm', {SGD_LINE}, trust_coef=0.2)"),
    "timm, adapting": (
        {"lr": 0.3, "always_adapt": True, "trust_clip": True},
        f"LARS.preset('timm', {SGD_LINE}, zero_decay='adapt', clip='lr')",
    ),
    "a tensor": (
        {"lr": torch.tensor(0.25), "always_adapt": False},
        "LARS.preset('timm', torch.optim.SGD(params, lr=0.25))",
    ),
    "solo-learn": (
        {"lr": 0.3, "eta": 0.2, "clip_lr": True},
        f"LARS.preset('solo-learn', {SGD_LINE}, trust_coef=0.2, clip='lr')",
    ),
    "solo-learn, excluding": (
        {"lr": 0.3, "eta": 0.001, "exclude_bias_n_norm": True},
        f"LARS.preset('solo-learn', {SGD_LINE})",
    ),
    "Barlow Twins": (
        {"lr": 0.3, "eta": 0.001, "weight_decay_filter": True, "lars_adaptation_filter": True},
        f"LARS.preset('moco-v3', {SGD_LINE})",
    ),
    "mmpretrain": (
        {"lr": 0.3, "eta": 0.01, "lars_exclude": True},
        f"LARS.preset('mmpretrain', {SGD_LINE}, trust_coef=0.01)",
    ),
    "SimCLR": ({"lr": 0.3, "eeta": 0.01}, f"LARS.preset('optax', {SGD_LINE}, trust_coef=0.01)"),
    "two by position": ((3.2, 0.9), "LARS(torch.optim.SGD(params, lr=3.2, momentum=0.9))"),
    "all by position": (
        (3.2, 0.9, 0.0, 1e-4, True),
        "LARS(torch.optim.SGD(params, lr=3.2, momentum=0.9, dampening=0.0, weight_decay=0.0001, nesterov=True))",
    ),
    "alone": ((), "LARS(torch.optim.SGD(params, lr=0.1))"),
}
EXCLUDING = {"exclude_bias_n_norm", "weight_decay_filter", "lars_exclude"}


@pytest.mark.parametrize("name", FORMS)
def test_parameters_instead_of_a_base_get_the_call_to_write(name: str) -> None:
    params, (form, line) = [parameter()], FORMS[name]
    call: Callable[..., LARS] = LARS
    positional, named = ((), form) if isinstance(form, dict) else (form, {})
    with pytest.raises(TypeError, match=f"not generator. Write {re.escape(line)}\\.") as refused:
        call((p for p in params), *positional, **named)
    assert ("Put vectors into a parameter group" in str(refused.value)) == bool({*named} & EXCLUDING)
    assert ("For the rule of another library, write LARS.preset with" in str(refused.value)) == (not named)
    # The line in the message runs.
    assert isinstance(eval(line, {"LARS": LARS, "torch": torch, "params": params}), LARS)


def test_a_preset_over_parameters_keeps_its_name_in_the_line() -> None:
    call: Callable[..., LARS] = LARS.preset
    for keywords, rest in (({"trust_coefficient": 0.01}, ", trust_coef=0.01"), ({"eps": 0.5}, ", eps=0.5"), ({}, "")):
        line = f"Write LARS.preset('moco-v3', {SGD_LINE}{rest})."
        with pytest.raises(TypeError, match=re.escape(line)):
            call("moco-v3", [parameter()], lr=0.3, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr": 0.1}, "lr is an option of the base: add lr=0.1 to Adam(…)."),
        ({"weight_decay": 1e-4}, "weight_decay is an option of the base: add weight_decay=0.0001 to Adam(…)."),
        ({"trust_coeff": 0.1}, "Instead of trust_coeff=0.1 write LARS.preset('timm', Adam(…), trust_coef=0.1)."),
        ({"trust_clip": True}, "Instead of trust_clip=True write LARS.preset('timm', Adam(…), clip='lr')."),
        ({"clip": True}, "Instead of clip=True write LARS.preset('larc', Adam(…))."),
        (
            {"trust_coefficient": 0.001, "clip": False},
            "Instead of clip=False, trust_coefficient=0.001 write LARS.preset('larc', Adam(…), clip=None, "
            "trust_coef=0.001).",
        ),
        (
            {"eta": 0.02, "clip": True, "exclude_bias_n_norm": True},
            "Instead of eta=0.02, exclude_bias_n_norm=True, clip=True write LARS.preset('solo-learn', Adam(…), "
            "trust_coef=0.02, clip='lr'). Put vectors",
        ),
        ({"exclude_bias": True}, "LARS has no option 'exclude_bias'."),
        ({"optimizer": Adam([parameter()])}, "LARS: base_optimizer and optimizer are two names for one argument"),
    ],
)
def test_a_keyword_in_the_wrong_place_is_named(keywords: dict[str, Any], message: str) -> None:
    call: Callable[..., LARS] = LARS
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        call(Adam([parameter()]), **keywords)


@pytest.mark.parametrize("base", [None, SGD, nn.Linear(2, 2)])
def test_an_invalid_base_is_refused(base: Any) -> None:
    with pytest.raises(TypeError, match=r"wraps an instance of a torch optimizer, not (nothing|the class|Lin)"):
        LARS(base)


def test_lars_over_lars_and_flags_that_are_no_flags_are_refused() -> None:
    with pytest.raises(TypeError, match="LARS cannot wrap another LARS: pass the optimizer that it wraps"):
        LARS(LARS(SGD([parameter()])))
    record: Any = "yes"
    with pytest.raises(ValueError, match="record='yes': give True or False"):
        LARS(SGD([parameter()]), record=record)
    lars = LARS(SGD([parameter()]))
    groups: list[tuple[Any, str]] = [
        ({"excluded": True}, "the key 'excluded'; LARS's is 'exclude'"),
        ({"lars_exclude": True}, "the key 'lars_exclude'; LARS's is 'exclude'"),
        ({"exclude": "yes"}, "exclude='yes': give True or False"),
    ]
    for group, message in groups:
        with pytest.raises(ValueError, match=message):
            LARS(SGD([{"params": [parameter()], **group}]))
        with pytest.raises(ValueError, match=message):
            lars.add_param_group({"params": [parameter()], **group})
    parameters: Any = [parameter()]
    with pytest.raises(TypeError, match="pass a parameter group"):
        lars.add_param_group(parameters)
    assert len(lars.param_groups) == 1


@pytest.mark.parametrize("gives_closure", [True, False])
def test_a_base_with_an_undeclared_need_for_a_closure_is_named(gives_closure: bool) -> None:
    weight = parameter()
    lars = LARS(SAM([weight], base_optimizer=SGD, lr=0.1, weight_decay=0.1))

    def closure() -> Tensor:
        weight.grad = torch.ones_like(weight)
        return weight.sum()

    closure()
    with pytest.raises(TypeError, match="does not support SAM: its step calls the closure itself"):
        lars.step(closure) if gives_closure else lars.step()
    assert lars.param_groups[0]["weight_decay"] == 0.1
    torch.testing.assert_close(weight.data, torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize(
    ("fails", "error", "message"),
    [
        (lambda closure: closure(), TypeError, "does not support Broken"),
        (lambda closure: 1 / 0, ZeroDivisionError, "division"),
        (lambda closure: [].index("a disclosure"), ValueError, "list"),
    ],
)
def test_other_errors_of_a_base_pass_through(fails: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    class Broken(SGD):
        def step(self, closure: Any = None) -> None:
            fails(closure)

    weight = parameter()
    weight.grad = torch.ones_like(weight)
    with pytest.raises(error, match=message):
        LARS(Broken([weight])).step(lambda: 0.0)


def test_lars_steps_inside_sharpness_aware_minimization() -> None:
    weight, seen = parameter(), []
    sam = SAM([weight], base_optimizer=lambda params, **keywords: LARS(SGD(params, **keywords)), lr=0.1, rho=0.05)

    def closure() -> Tensor:
        seen.append(weight.detach().clone())
        weight.grad = torch.tensor([0.0, 2.0])
        return weight.sum()

    closure()
    sam.step(closure)
    torch.testing.assert_close(seen[1], torch.tensor([3.0, 4.0 + 0.05]))
    torch.testing.assert_close(weight.data, torch.tensor([3.0, 4.0 - 0.1 * (0.001 * 5 / 2) * 2]))
