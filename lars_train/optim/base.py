"""Checks on the optimizer that LARS wraps, and messages that show the call to write instead."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from .fused_sgd import has_step_hooks
from .rule import Rule

_OF_SGD = [name for name in inspect.signature(SGD).parameters if name != "params"]
# What other implementations (lightning-bolts, timm, solo-learn, apex) call an option, and what it is here.
_HERE: dict[str, Callable[[Any], dict[str, Any]]] = {
    **dict.fromkeys(("trust_coefficient", "trust_coeff", "eta"), lambda value: {"trust_coef": value}),
    **dict.fromkeys(("trust_clip", "clip_lr", "clip"), lambda value: {"clip": "lr"} if value else {}),
    "always_adapt": lambda value: {} if value else {"zero_decay": "skip"},
}


def check_base(
    base: Any, wrapper: type[Optimizer], options: Mapping[str, Any], more: Sequence[Any], unknown: Mapping[str, Any]
) -> None:
    """Raise `TypeError` unless `base` is an optimizer that LARS can wrap, and `more` and `unknown` are empty.

    A call in the form of timm or lightning-bolts, ``LARS(parameters, lr=…)``, gets a line in the form of this one, with
    the values that the caller gave.

    Args:
        base: what the caller gave as the base optimizer.
        wrapper: LARS, which does not wrap itself.
        options: LARS's own options whose values differ from the defaults, by name.
        more: positional arguments beyond LARS's own.
        unknown: keywords that LARS does not have, by name.
    """
    own, of_sgd = dict(options), {}
    no_base = not isinstance(base, Optimizer) or isinstance(base, wrapper)
    if no_base and "lr" not in unknown and (own.keys() & {"eps", "trust_coef"} or more):
        # By position these are SGD's: LARS(parameters, lr, momentum, ...).
        first = [own.pop("eps", None), own.pop("trust_coef", None), *more]
        of_sgd = {name: value for name, value in zip(_OF_SGD, first, strict=False) if value is not None}
        more = ()
    if not isinstance(own.get("weight_decay", ""), str):  # LARS's own option of that name is a word
        of_sgd["weight_decay"] = own.pop("weight_decay")
    if own.get("clip") is True:
        unknown = {**unknown, "clip": own.pop("clip")}
    of_sgd.update((name, value) for name, value in unknown.items() if name in _OF_SGD)
    renamed = {name: _HERE[name](value) for name, value in unknown.items() if name in _HERE}
    strange = [name for name in unknown if name not in of_sgd and name not in renamed and name != "params"]
    complaints = [f"LARS has no option {', '.join(map(repr, strange))}."] if strange else []
    if more:
        complaints.append("LARS takes three arguments by position, and the others by name.")
    if no_base:
        what = "nothing" if base is None else type(base).__name__
        what = f"the class {base.__name__}" if isinstance(base, type) else what
        for found in renamed.values():
            own.update(found)
        in_order = {name: of_sgd[name] for name in _OF_SGD if name in of_sgd} or {"lr": 0.1}
        line = _call("LARS", _call("torch.optim.SGD", "params", in_order), own)
        complaints.insert(0, f"LARS wraps an instance of a torch optimizer, not {what}. Write {line}.")
    else:
        for name, value in of_sgd.items():
            complaints.append(
                f"{name} is an option of the base: add {_keyword(name, value)} to {type(base).__name__}(…)."
            )
        for name, found in renamed.items():
            instead = ", ".join(_keyword(*option) for option in found.items()) or "nothing, it is the default"
            complaints.append(f"Instead of {_keyword(name, unknown[name])} write {instead}.")
    if complaints:
        raise TypeError(" ".join(complaints))


def check_groups(groups: list[dict[str, Any]], rule: Rule) -> None:
    """Raise `ValueError` if a parameter group does not go with LARS or with `rule`."""
    if any(group.get("differentiable") for group in groups):
        raise ValueError("LARS cannot be differentiated through: set the base's differentiable=False")
    if rule.needs_lr and any("lr" not in group for group in groups):
        raise ValueError("clip='lr' and lr_placement='inside' want a base with an lr in its groups")


def calls_closure(base: Optimizer) -> bool:
    """Return True if the base's step requires a closure, which it calls itself."""
    closure = inspect.signature(type(base).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def refused_for_closure(base: Optimizer, error: Exception) -> bool:
    """Return True if a step without a closure failed because the base needs one that it declares optional."""
    closure = inspect.signature(type(base).step).parameters.get("closure")
    said = f"{type(error).__name__} {error}"
    return (
        closure is not None and re.search(r"\bclosure\b|NoClosure|'NoneType' object is not callable", said) is not None
    )


def is_plain(base: Optimizer) -> bool:
    """Return True if a step of `base` is torch.optim's own, without hooks and not counted by a scheduler."""
    of_torch = type(base).__module__.startswith("torch.optim.")
    return of_torch and "step" not in vars(base) and not has_step_hooks(base)


def _call(name: str, argument: str, keywords: Mapping[str, Any]) -> str:
    return f"{name}({', '.join([argument, *(_keyword(*option) for option in keywords.items())])})"


def _keyword(name: str, value: Any) -> str:
    return f"{name}={value.tolist() if isinstance(value, Tensor) else value!r}"
