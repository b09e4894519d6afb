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
# Keywords of other implementations, most specific first, each with the preset for its implementation.
_PRESET_OF = {
    **dict.fromkeys(("weight_decay_filter", "lars_adaptation_filter", "exclude_bias_and_norm"), "moco-v3"),
    "lars_exclude": "mmpretrain",
    "eeta": "optax",  # SimCLR
    **dict.fromkeys(("trust_coeff", "always_adapt", "trust_clip"), "timm"),
    **dict.fromkeys(
        ("eta", "clip_lr", "clip_lars_lr", "exclude_bias_n_norm", "exclude_bias_n_norm_lars"), "solo-learn"
    ),
    "clip": "larc",
    "trust_coefficient": "bolts",
}
# The equivalents of these keywords in LARS; a keyword without an entry chooses parameters to exclude.
_EQUIVALENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **dict.fromkeys(("trust_coefficient", "trust_coeff", "eta", "eeta"), lambda value: {"trust_coef": value}),
    **dict.fromkeys(("trust_clip", "clip_lr", "clip_lars_lr", "clip"), lambda value: {"clip": "lr" if value else None}),
    "always_adapt": lambda value: {"zero_decay": "adapt" if value else "skip"},
}
# Names of bases, in torch and other packages, whose step is not proportional to the lr.
_NONLINEAR = frozenset({"Adafactor", "ASGD", "Rprop"})
# Names of bases whose step does not grow with the gradient. Bases with betas (Adam and others) belong to them, too.
_SCALE_FREE = frozenset({"Adadelta", "Adafactor", "Adagrad", "LBFGS", "Muon", "RMSprop", "Rprop"})


def check_base(
    base: Any,
    wrapper: type[Optimizer],
    options: Mapping[str, Any],
    extra: Sequence[Any],
    unknown: Mapping[str, Any],
    preset: str | None = None,
) -> None:
    """Raise `TypeError` unless `base` is an optimizer that LARS can wrap, and `extra` and `unknown` are empty.

    For a call in the form of another implementation, such as ``LARS(parameters, lr=…)``, the message shows the
    equivalent call, with the caller's values.

    Args:
        base: the object that the caller passed as the base optimizer.
        wrapper: LARS, which cannot wrap itself.
        options: LARS's options that differ from the defaults, by name.
        extra: positional arguments that LARS does not take.
        unknown: keywords that LARS does not take, by name.
        preset: the preset that the caller named.
    """
    if isinstance(base, wrapper):
        raise TypeError("LARS cannot wrap another LARS: pass the optimizer that it wraps, its base_optimizer")
    no_base, kind = not isinstance(base, Optimizer), type(base).__name__
    options, sgd_options, unknown = _by_optimizer(options, extra, unknown, no_base and preset is None)
    foreign = [name for name in _PRESET_OF if name in unknown]
    unrecognized = [name for name in unknown if name not in (*_SGD_OPTIONS, *foreign, "params")]
    complaints = [f"LARS has no option {', '.join(map(repr, unrecognized))}."] if unrecognized else []
    if extra and not no_base:
        complaints.append("LARS takes at most three positional arguments; pass the others by keyword.")
    if foreign and preset is None:
        preset = _PRESET_OF[foreign[0]] if no_base or foreign[0] != "trust_coefficient" else "larc"
    for name in foreign:
        options |= _EQUIVALENTS[name](unknown[name]) if name in _EQUIVALENTS else {}
    own = DEFAULTS | PRESETS[preset or "torchlars"]
    options = {name: value for name, value in options.items() if value != own[name]}
    name, first = ("LARS.preset", f"{preset!r}, ") if preset else ("LARS", "")
    if no_base:
        kind = "nothing" if base is None else f"the class {base.__name__}" if isinstance(base, type) else kind
        line = _call(name, first + _call("torch.optim.SGD", "params", sgd_options or {"lr": 0.1}), options)
        complaints.insert(0, f"LARS wraps an instance of a torch optimizer, not {kind}. Write {line}.")
        if preset is None:
            complaints.append(f"For the rule of another library, write LARS.preset with one of {', '.join(PRESETS)}.")
        elif foreign[:1] == ["trust_coefficient"] and preset == "bolts":
            complaints.append(
                "Use the preset 'moco-v3' for MoCo v3's LARS, and 'pytorch-optimizer' for pytorch_optimizer's."
            )
    else:
        for option, value in sgd_options.items():
            complaints.append(f"{option} is an option of the base: add {_keyword(option, value)} to {kind}(…).")
        if foreign:
            theirs = ", ".join(_keyword(name, unknown[name]) for name in foreign)
            complaints.append(f"Instead of {theirs} write {_call(name, f'{first}{kind}(…)', options)}.")
    if any(name not in _EQUIVALENTS and unknown[name] for name in foreign):
        complaints.append("Put vectors into a parameter group with exclude=True and weight_decay=0.")
    if complaints:
        raise TypeError(" ".join(complaints))


def _by_optimizer(
    options: Mapping[str, Any], extra: Sequence[Any], unknown: Mapping[str, Any], may_be_sgd: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the options of LARS, those of SGD, and `unknown`, each by name.

    A boolean ``clip``, a keyword of another implementation, moves to `unknown`.
    """
    lars_options, sgd_options = dict(options), {}
    if may_be_sgd and "lr" not in unknown and (lars_options.keys() & {"eps", "trust_coef"} or extra):
        # The caller passed SGD's arguments: LARS(parameters, lr, momentum, ...).
        first = [lars_options.pop("eps", None), lars_options.pop("trust_coef", None), *extra]
        sgd_options = {name: value for name, value in zip(_SGD_OPTIONS, first, strict=False) if value is not None}
    if not isinstance(lars_options.get("weight_decay", ""), str):  # LARS's option of the same name is a string
        sgd_options["weight_decay"] = lars_options.pop("weight_decay")
    if isinstance(lars_options.get("clip"), bool):
        unknown = {**unknown, "clip": lars_options.pop("clip")}
    sgd_options |= {name: value for name, value in unknown.items() if name in _SGD_OPTIONS}
    return lars_options, {name: sgd_options[name] for name in _SGD_OPTIONS if name in sgd_options}, dict(unknown)


def check_groups(groups: list[dict[str, Any]], rule: Rule) -> None:
    """Raise `ValueError` if LARS, or `rule`, cannot be applied to a parameter group."""
    for group in groups:
        if misspelled := group.keys() & {"excluded", "lars_exclude"}:
            raise ValueError(f"a parameter group has the key {min(misspelled)!r}; LARS's is 'exclude'")
        if not isinstance(group.get("exclude", False), bool):
            raise ValueError(f"a parameter group has exclude={group['exclude']!r}: give True or False")
    if any(group.get("differentiable") for group in groups):
        raise ValueError("LARS does not support differentiable=True: leave it out")
    if rule.needs_lr and any("lr" not in group for group in groups):
        raise ValueError(
            "clip='lr', lr_placement='inside' and ratio_of='step' need a base with an lr in its parameter groups"
        )


def check_rule(base: Optimizer, rule: Rule) -> None:
    """Raise `ValueError` if the step of `base` does not follow the gradients or the lr as `rule` requires."""
    kind, names = type(base).__name__, {parent.__name__ for parent in type(base).__mro__}
    if rule.lr_placement == "inside" and ("betas" in base.defaults or not _SCALE_FREE.isdisjoint(names)):
        raise ValueError(
            "lr_placement='inside' puts the lr into the gradient and needs a base whose step is proportional to the "
            f"gradient, such as SGD; the step of {kind} is not, so it would ignore the lr. Use lr_placement='outside'"
        )
    if not rule.changes_step:
        return
    option = "ratio_of='step'" if rule.ratio_of == "step" else "ratio_placement='outside'"
    if calls_closure(base):
        raise ValueError(f"{option} needs a base that makes one update per step; {kind} makes several")
    if rule.ratio_of == "step" and not _NONLINEAR.isdisjoint(names):
        raise ValueError(f"{option} needs a base whose step is proportional to its lr; the step of {kind} is not")


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
