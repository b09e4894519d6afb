"""Reject a state dict from which LARS and its base cannot continue exactly, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam

from .options import DEFAULTS, PRESETS

# Keys that identify the state dicts of timm's and lightning-bolts' LARS, with the preset. The groups of these two also
# have eps and dampening, which those of MoCo v3 and pytorch_optimizer lack.
_LOADABLE = {"trust_coeff": "timm", "trust_coefficient": "bolts"}
# Keys in the parameter groups of other implementations: MoCo v3, Barlow Twins, solo-learn, mmpretrain, timm's Lamb.
_FOREIGN_KEYS = frozenset(
    ("trust_coeff", "trust_coefficient", "eta", "eeta", "weight_decay_filter", "lars_exclude", "max_grad_norm")
)
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
# Keys that a base requires in the state of each parameter with a state.
_STATE_KEYS = {Adam: _ADAM, AdamW: _ADAM, RAdam: _ADAM, NAdam: _ADAM | {"mu_product"}}


def check_state(state_dict: Mapping[str, Any], base: Optimizer, rule: Mapping[str, Any]) -> None:
    """Raise `ValueError` if LARS over `base`, with the options `rule`, cannot continue exactly from the state dict."""
    if not {"state", "param_groups"} <= state_dict.keys():
        keys = sorted(map(str, state_dict))
        raise ValueError(
            f"not an optimizer's state dict: its keys are {keys}. If it is a checkpoint, load its optimizer entry"
        )
    groups, states = state_dict["param_groups"], state_dict["state"].values()
    names = {name for group in groups for name in group}
    if "lars" not in state_dict and (found := sorted(names & _FOREIGN_KEYS - base.defaults.keys())):
        _check_foreign(state_dict, found, base, rule)
    flags = {name for name, value in base.defaults.items() if value is None or isinstance(value, bool)}
    needed = base.param_groups[0].keys() & base.defaults.keys() - flags  # torch fills in missing flags
    missing = sorted({name for group in groups for name in needed - group.keys()})
    missing += sorted({name for state in states if state for name in _STATE_KEYS.get(type(base), set()) - state.keys()})
    if missing:
        raise ValueError(
            f"the state dict is not of {type(base).__name__}: it lacks {', '.join(missing)}. Load it into LARS over an "
            "optimizer like the one that saved it."
        )


def _check_foreign(state_dict: Mapping[str, Any], found: list[str], base: Optimizer, rule: Mapping[str, Any]) -> None:
    key, groups = found[0], state_dict["param_groups"]
    complete = all({key, "eps", "dampening"} <= group.keys() for group in groups)
    if len(found) > 1 or key not in _LOADABLE or not complete:
        raise ValueError(
            f"the state dict is of another implementation: its parameter groups have {', '.join(found)}. To continue "
            "from its state, create LARS with the rule of that implementation over torch's optimizer. Set params to "
            "the list of parameters in the order of its groups, and run: for i, entry in state_dict['state'].items(): "
            "lars.state[params[i]] = "
            f"{_entry(groups, state_dict['state'].values())}"
        )
    preset = _LOADABLE[key]
    own = DEFAULTS | PRESETS[preset]
    rules = [own | {"trust_coef": group[key], "eps": group["eps"]} for group in groups]
    for theirs, group in zip(rules, groups, strict=True):
        theirs |= {"clip": "lr"} if group.get("trust_clip") else {}
        theirs |= {"zero_decay": "adapt"} if group.get("always_adapt") else {}
    if any(theirs != rules[0] for theirs in rules):
        trusts = ", ".join(str(group[key]) for group in groups)
        raise ValueError(f"the state dict's groups have different rules, {key}={trusts}: create one LARS for each")
    if rules[0] == rule and "dampening" in base.defaults:
        return
    changed = "".join(f", {name}={value!r}" for name, value in rules[0].items() if value != own[name])
    raise ValueError(
        f"the state dict is of {preset}'s LARS with another rule. To continue its updates, load it into "
        f"LARS.preset({preset!r}, torch.optim.SGD(…){changed}). To use the rule of this LARS, first delete {key!r} "
        "from the state dict's parameter groups."
    )


def _entry(groups: Sequence[Mapping[str, Any]], states: Iterable[Mapping[str, Any]]) -> str:
    """Return the expression that turns an entry of `states` into that of torch's optimizer."""
    keys = {name for state in states for name in state}
    if "mu" in keys:
        return "{'momentum_buffer': entry['mu']}"
    if "exp_avg" in keys and "step" not in keys:
        return f"{{**entry, 'step': torch.tensor({float(groups[0].get('step', 0))})}}"
    return "entry"
