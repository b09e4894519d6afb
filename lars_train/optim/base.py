"""Check the optimizer that LARS wraps. Error messages show the correct call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer

from .fused_sgd import has_step_hooks
from .options import DEFAULTS, PRESETS
from .rule import Rule

_SGD_OPTIONS = [name for name in inspect.signature(SGD).parameters if name != "params"]
# Options of other implementations (lightning-bolts, timm, solo-learn, apex), and their equivalents in LARS.
_EQUIVALENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **dict.fromkeys(("trust_coefficient", "trust_coeff", "eta"), lambda value: {"trust_coef": value}),
    **dict.fromkeys(("trust_clip", "clip_lr", "clip"), lambda value: {"clip": "lr"} if value else {}),
    "always_adapt": lambda value: {} if value else {"zero_decay": "skip"},
}
# The key that shows whose parameter groups a state dict has, and the preset of that implementation.
_STATE_OF = {"trust_coeff": "timm", "trust_coefficient": "bolts"}
# Names of bases, in torch and other packages, whose step is not proportional to the lr.
_NONLINEAR = frozenset({"Adafactor", "ASGD", "Rprop"})


def check_base(
    base: Any, wrapper: type[Optimizer], options: Mapping[str, Any], extra: Sequence[Any], unknown: Mapping[str, Any]
) -> None:
    """Raise `TypeError` unless `base` is an optimizer that LARS can wrap, and `extra` and `unknown` are empty.

    For a call in the form of timm or lightning-bolts, ``LARS(parameters, lr=…)``, the message shows the equivalent call
    with the caller's values.

    Args:
        base: the object that the caller passed as the base optimizer.
        wrapper: LARS, which cannot wrap itself.
        options: LARS's options that differ from the defaults, by name.
        extra: positional arguments that LARS does not take.
        unknown: keywords that LARS does not take, by name.
    """
    lars_options, sgd_options = dict(options), {}
    no_base = not isinstance(base, Optimizer) or isinstance(base, wrapper)
    if no_base and "lr" not in unknown and (lars_options.keys() & {"eps", "trust_coef"} or extra):
        # The caller passed SGD's arguments: LARS(parameters, lr, momentum, ...).
        first = [lars_options.pop("eps", None), lars_options.pop("trust_coef", None), *extra]
        sgd_options = {name: value for name, value in zip(_SGD_OPTIONS, first, strict=False) if value is not None}
        extra = ()
    if not isinstance(lars_options.get("weight_decay", ""), str):  # LARS's option of the same name is a string
        sgd_options["weight_decay"] = lars_options.pop("weight_decay")
    if lars_options.get("clip") is True:
        unknown = {**unknown, "clip": lars_options.pop("clip")}
    sgd_options.update((name, value) for name, value in unknown.items() if name in _SGD_OPTIONS)
    renamed = {name: _EQUIVALENTS[name](value) for name, value in unknown.items() if name in _EQUIVALENTS}
    unrecognized = [name for name in unknown if name not in sgd_options and name not in renamed and name != "params"]
    complaints = [f"LARS has no option {', '.join(map(repr, unrecognized))}."] if unrecognized else []
    if extra:
        complaints.append("LARS takes at most three positional arguments; pass the others by keyword.")
    if no_base:
        given = "nothing" if base is None else type(base).__name__
        given = f"the class {base.__name__}" if isinstance(base, type) else given
        for equivalent in renamed.values():
            lars_options.update(equivalent)
        in_order = {name: sgd_options[name] for name in _SGD_OPTIONS if name in sgd_options} or {"lr": 0.1}
        line = _call("LARS", _call("torch.optim.SGD", "params", in_order), lars_options)
        complaints.insert(0, f"LARS wraps an instance of a torch optimizer, not {given}. Write {line}.")
    else:
        for name, value in sgd_options.items():
            complaints.append(
                f"{name} is an option of the base: add {_keyword(name, value)} to {type(base).__name__}(…)."
            )
        for name, equivalent in renamed.items():
            instead = ", ".join(_keyword(*option) for option in equivalent.items()) or "nothing (it is the default)"
            complaints.append(f"Instead of {_keyword(name, unknown[name])} write {instead}.")
    if complaints:
        raise TypeError(" ".join(complaints))


def check_groups(groups: list[dict[str, Any]], rule: Rule) -> None:
    """Raise `ValueError` if LARS, or `rule`, cannot be applied to a parameter group."""
    if any(group.get("differentiable") for group in groups):
        raise ValueError("LARS does not support differentiable=True: leave it out")
    if rule.needs_lr and any("lr" not in group for group in groups):
        raise ValueError(
            "clip='lr', lr_placement='inside' and ratio_of='step' need a base with an lr in its parameter groups"
        )


def check_rule(base: Optimizer, rule: Rule) -> None:
    """Raise `ValueError` if `rule` scales the base's step, but the step of `base` cannot be scaled."""
    if not rule.changes_step:
        return
    kind = type(base).__name__
    option = "ratio_of='step'" if rule.ratio_of == "step" else "ratio_placement='outside'"
    if calls_closure(base):
        raise ValueError(f"{option} needs a base that makes one update per step; {kind} makes several")
    if rule.ratio_of == "step" and not _NONLINEAR.isdisjoint(parent.__name__ for parent in type(base).__mro__):
        raise ValueError(f"{option} needs a base whose step is proportional to its lr; the step of {kind} is not")


def check_state(groups: Sequence[Mapping[str, Any]], base: Optimizer, rule: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a state dict is of timm's or lightning-bolts' LARS, and `rule` over `base` differs from it.

    Args:
        groups: the parameter groups of the state dict.
        base: the optimizer that LARS wraps.
        rule: LARS's options by name.
    """
    for group in groups:
        for key, preset in _STATE_OF.items():
            if key not in group:
                continue
            own = DEFAULTS | PRESETS[preset]
            theirs = own | {"trust_coef": group[key], "eps": group.get("eps", own["eps"])}
            theirs |= {"clip": "lr"} if group.get("trust_clip") else {}
            theirs |= {"zero_decay": "adapt"} if group.get("always_adapt") else {}
            if theirs == rule and "dampening" in base.defaults:
                continue
            changed = {name: value for name, value in theirs.items() if value != own[name]}
            call = _call("LARS.preset", f"{preset!r}, torch.optim.SGD(…)", changed)
            raise ValueError(
                f"the state dict is of {preset}'s LARS with another rule. To continue its updates, load it into "
                f"{call}. To use the rule of this LARS, first delete {key!r} from the state dict's parameter groups."
            )


def calls_closure(base: Optimizer) -> bool:
    """Return True if the base's step requires a closure and calls it itself."""
    closure = inspect.signature(type(base).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def failed_for_closure(base: Optimizer, error: Exception) -> bool:
    """Return True if `error` shows that the base's step needs a closure, although its signature makes it optional."""
    closure = inspect.signature(type(base).step).parameters.get("closure")
    symptom = re.compile(r"\bclosure\b|NoClosure|'NoneType' object is not callable")
    return closure is not None and symptom.search(f"{type(error).__name__} {error}") is not None


def is_plain(base: Optimizer) -> bool:
    """Return True if `base` uses the unmodified step of a torch.optim class: no hooks, not wrapped by a scheduler."""
    from_torch = type(base).__module__.startswith("torch.optim.")
    return from_torch and "step" not in vars(base) and not has_step_hooks(base)


def _call(name: str, argument: str, keywords: Mapping[str, Any]) -> str:
    return f"{name}({', '.join([argument, *(_keyword(*option) for option in keywords.items())])})"


def _keyword(name: str, value: Any) -> str:
    return f"{name}={value.tolist() if isinstance(value, Tensor) else value!r}"
