"""LARS, layer-wise adaptive rate scaling, around any torch optimizer.

Every parameter tensor is a layer of its own. Its gradient is rescaled in place by the trust ratio; the base
optimizer, which knows nothing of it, then makes the update. Schedules and the choice of what is decayed
live elsewhere (`schedule`, `param_groups`).
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """Gives the gradients of `base_optimizer` their trust ratios before each of its steps.

    For each parameter w with a gradient g, in a group with weight decay wd::

        ratio = trust_coef * |w| / (|g| + wd * |w| + eps)    if |w| > 0 and |g| > 0, else 1
        g     = ratio * (g + wd * w)

    Then the base steps with its weight decay set to 0: decay is within the ratio, also for bases that
    decouple it (AdamW). The ratio is thus inside the momentum, the learning rate where the base has it.
    Where a group has ``maximize``, wd enters with the opposite sign, so that it still decays.

    Source: You, Gitman, Ginsburg 2017, https://arxiv.org/abs/1708.03888, section 4; eps and the case of a
    zero norm as in torchlars (https://github.com/kakaobrain/torchlars).

    `param_groups`, `state` and `defaults` are the base's own objects: a learning-rate scheduler that is
    built on one of the two optimizers acts on both. Step hooks are each optimizer's own; the base's run
    within LARS's step.

    Norms and ratios are computed in float32, or float64 for float64 gradients, on the gradients' device; the
    host waits for none of them.

    Args:
        base_optimizer: an instance of any torch optimizer that can step without a closure.
        eps: added to the ratio's denominator; at least 0.
        trust_coef: the trust coefficient; above 0.

    Raises:
        TypeError: `base_optimizer` is no optimizer, is LARS itself, or must call the closure itself (LBFGS).
        ValueError: `eps` or `trust_coef` is out of range, or the base is ``differentiable``.
    """

    base_optimizer: Optimizer
    eps: float
    trust_coef: float

    def __init__(self, base_optimizer: Optimizer, eps: float = 1e-8, trust_coef: float = 0.001) -> None:
        _check_base(base_optimizer)
        _check_settings(eps, trust_coef)
        # Optimizer.__init__ would make parameter groups of its own; this sets up the rest (hooks, profiling).
        self.__setstate__({"base_optimizer": base_optimizer, "eps": eps, "trust_coef": trust_coef})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's state, by parameter."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults for new parameter groups."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value

    def __getstate__(self) -> dict[str, Any]:
        return {"base_optimizer": self.base_optimizer, **self._settings()}

    def __repr__(self) -> str:
        return f"LARS({self.base_optimizer!r}, eps={self.eps}, trust_coef={self.trust_coef})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict with one more entry, ``"lars": {"eps": ..., "trust_coef": ...}``."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = {**self.base_optimizer.state_dict(), "lars": self._settings()}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, eps and trust_coef included.

        A state dict of the base alone will do as well; eps and trust_coef then stay as they are.

        Raises:
            ValueError: the ``"lars"`` entry is not as `state_dict` writes it, or the base refuses the rest.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        settings = self._settings() | state_dict.pop("lars", {})
        if settings.keys() != self._settings().keys():
            raise ValueError(f"the state dict's 'lars' entry has {sorted(settings)}, not eps and trust_coef")
        _check_settings(**settings)
        self.base_optimizer.load_state_dict(state_dict)
        self.eps, self.trust_coef = settings["eps"], settings["trust_coef"]
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Rescale the gradients in place and make one update; returns the closure's loss, if there is one.

        `closure` is called once, with gradients enabled, before anything else.

        Raises:
            RuntimeError: a gradient is sparse; no gradient or parameter has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for (*_, decay, maximize), weights in _alike(self.param_groups).items():
            self._rescale(weights, -decay if maximize else decay)
        with _hidden_weight_decay(self.param_groups):
            self.base_optimizer.step()
        return loss

    def _rescale(self, weights: list[Tensor], decay: float) -> None:
        """Apply the rule to the gradients of `weights`; `decay` is negative where the base maximizes."""
        grads = [w.grad for w in weights if w.grad is not None]
        precision = torch.promote_types(grads[0].dtype, torch.float32)
        # In float32 and float64 these are the tensors themselves; float16 would overflow in the norms.
        wide = [g.to(precision) for g in grads]
        weights = [w.to(precision) for w in weights]
        weight_norms = torch.stack(torch._foreach_norm(weights))
        grad_norms = torch.stack(torch._foreach_norm(wide))
        ratios = torch.where(
            (weight_norms > 0) & (grad_norms > 0),
            self.trust_coef * weight_norms / (grad_norms + abs(decay) * weight_norms + self.eps),
            1.0,
        )
        if decay != 0:
            torch._foreach_add_(wide, weights, alpha=decay)
        torch._foreach_mul_(wide, ratios.unbind())
        if wide[0] is not grads[0]:
            torch._foreach_copy_(grads, wide)

    def _settings(self) -> dict[str, float]:
        return {"eps": self.eps, "trust_coef": self.trust_coef}


def _alike(groups: list[dict[str, Any]]) -> dict[tuple[torch.device, torch.dtype, float, bool], list[Tensor]]:
    """The parameters that have gradients, by (device, gradient's dtype, weight decay, maximize)."""
    alike: dict[tuple[torch.device, torch.dtype, float, bool], list[Tensor]] = {}
    for group in groups:
        rule = (group.get("weight_decay", 0.0), group.get("maximize", False))
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"LARS: a parameter of shape {tuple(parameter.shape)} has a {grad.layout} gradient; only "
                    "dense gradients have a trust ratio (use sparse=False, or keep the layer out of LARS)"
                )
            alike.setdefault((grad.device, grad.dtype, *rule), []).append(parameter)
    return alike


@contextmanager
def _hidden_weight_decay(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Within it the groups' weight decay is 0; afterwards it is what it was, whatever happened."""
    hidden = [(group, group["weight_decay"]) for group in groups if "weight_decay" in group]
    try:
        for group, _ in hidden:
            group["weight_decay"] = 0.0
        yield
    finally:
        for group, decay in hidden:
            group["weight_decay"] = decay


def _check_base(base: Optimizer) -> None:
    if not isinstance(base, Optimizer) or isinstance(base, LARS):
        what = base.__name__ if isinstance(base, type) else type(base).__name__
        raise TypeError(f"LARS wraps an instance of a torch optimizer, such as SGD(parameters), not {what}")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"LARS cannot wrap {type(base).__name__}: it evaluates the closure within its step, where the "
            "gradients cannot be rescaled; choose an optimizer that steps without one"
        )
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError("LARS cannot be differentiated through: set the base's differentiable=False")


def _check_settings(eps: float, trust_coef: float) -> None:
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps}: it must be finite and at least 0")
    if not (math.isfinite(trust_coef) and trust_coef > 0):
        raise ValueError(f"trust_coef={trust_coef}: it must be finite and above 0")
