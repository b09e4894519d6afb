"""LARS, layer-wise adaptive rate scaling, around any torch optimizer.

Every parameter tensor counts as a layer. LARS rescales its gradient by the trust ratio; the unchanged base optimizer
then makes the update. `options` defines and checks the options, and has presets for other implementations. `rule`
computes the ratio. `rescale` applies it to the gradients, `rescale_step` to the base's step. `fused_sgd` is the fast
path for SGD on the CPU.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import fused_sgd
from .base import calls_closure, check_base, check_groups, check_rule, failed_for_closure, is_plain
from .foreign_state import check_state
from .options import DEFAULTS, PRESETS
from .rescale import Layers, Record, check_gradients, group_parameters, is_compiling, rescale
from .rescale_step import apply_outside, copy_weights, hide_settings, restore_settings, scale_step
from .rule import Rule


class LARS(Optimizer):
    """An optimizer that rescales gradients by trust ratios before each step of `base_optimizer`.

    For each parameter w with a gradient g, in a group with weight decay wd::

        ratio = trust_coef * |w| / (|g| + wd * |w| + eps)    if |w| > 0 and |g| > 0, else 1
        g     = ratio * (g + wd * w)

    Then the base steps with its weight decay set to 0. The decay is part of the rescaled gradient, even if the base
    decouples weight decay (AdamW). The ratio is therefore inside the momentum: the base accumulates gradients that are
    already rescaled. The base applies the learning rate as usual. In a group with ``maximize``, wd has the opposite
    sign, so that weights still decay. The base updates a group with ``exclude=True`` without LARS: no ratio, and its
    own weight decay.

    Source: You, Gitman, Ginsburg 2017, https://arxiv.org/abs/1708.03888, section 4; eps and the case of a
    zero norm as in torchlars (https://github.com/kakaobrain/torchlars).

    `param_groups`, `state` and `defaults` are the base's objects, so a learning-rate scheduler for either optimizer
    acts on both. Each optimizer has its own step hooks; the base's hooks run within LARS's step. After a step, `grad`
    holds the rescaled gradient or the original one, depending on base, device and version of torch: log gradient norms
    before the step, or take them from `layers`. Between steps, LARS holds no other tensors as large as the gradients.
    Parameters that share memory are rescaled one after another, in an unspecified order.

    Norms and ratios are computed in float32, or in float64 for float64 gradients. The formula also applies to a
    non-finite gradient, which affects no other tensor. The host never waits for an accelerator. For a DTensor, the
    norms are over the whole parameter; one collective serves all DTensors on the same mesh.

    Args:
        base_optimizer: an instance of any torch optimizer. If its step requires a closure and calls it itself
            (LBFGS), LARS rescales the gradients after each call.
        optimizer: torchlars's name for `base_optimizer`.
        eps: added to the ratio's denominator; at least 0.
        trust_coef: the trust coefficient; above 0.
        ratio_of: ``"gradient"``: as above. ``"step"``: LARS scales the base's step by ``ratio * lr``. The ratio is
            ``trust_coef * |w| / (|u| + eps)``; u is the step that the base makes with an lr of 1, its weight decay
            included (over AdamW: LAMB). The base's step must be proportional to its lr. LARS copies the weights for
            each step. `denominator`, `zero_norm`, `weight_decay`, both placements and `clamp` must have their defaults.
        denominator: ``"split"``: ``|g| + wd * |w| + eps``. ``"combined"``: ``|g + wd * w| + eps``; the rule for
            ``|g| = 0`` then applies to ``|g + wd * w| = 0`` (optax).
        clip: limits of the ratio r. ``"lr"``: min(r / lr, 1), so that the step is at most the base's (apex LARC,
            timm's trust_clip). ``(low, high)``: min(max(r, low), high) (NUS-HPC has 0 and 50).
        zero_norm: the rule if ``|w|`` or ``|g|`` is 0. ``"decay"``: g + wd * w with a ratio of 1, to which
            `clip` applies. ``"skip"``: g unchanged, neither decayed nor clipped (apex LARC).
        zero_decay: the rule for groups whose weight decay is 0. ``"adapt"``: as for other groups. ``"skip"``: as for
            groups with ``exclude`` (timm).
        weight_decay: ``"coupled"``: as above. ``"base"``: wd is 0 in the formula, and the base applies its own weight
            decay after the ratio.
        ratio_placement: ``"inside"`` the momentum, as above. ``"outside"``: the base steps with g + wd * w, and LARS
            multiplies the resulting change of w by the ratio (NUS-HPC). The dtype of w must be able to represent the
            change before that multiplication.
        lr_placement: ``"outside"`` the momentum, as in torch's SGD. ``"inside"``: g is also multiplied by the lr, and
            the base steps with an lr of 1 (MLPerf, optax). The two differ when the lr changes. The base's step must be
            proportional to the gradient: SGD, not Adam.
        clamp: limit on the absolute value of each element of g + wd * w, or None (NUS-HPC has 10).
        record: keep norms and ratios for `layers`. Costs nothing if False.

    Raises:
        TypeError: `base_optimizer` is not an optimizer, is LARS, or is passed under both names; or a keyword is
            unknown.
        ValueError: an option is out of range or conflicts with another or with the base, or the base is
            ``differentiable``.
    """

    base_optimizer: Optimizer
    rule: Rule
    record: bool

    def __init__(
        self,
        base_optimizer: Optimizer | None = None,
        eps: float = 1e-8,
        trust_coef: float = 0.001,
        *extra: NoReturn,
        optimizer: Optimizer | None = None,
        ratio_of: Literal["gradient", "step"] = "gradient",
        denominator: Literal["split", "combined"] = "split",
        clip: Literal["lr"] | tuple[float, float] | None = None,
        zero_norm: Literal["decay", "skip"] = "decay",
        zero_decay: Literal["adapt", "skip"] = "adapt",
        weight_decay: Literal["coupled", "base"] = "coupled",
        ratio_placement: Literal["inside", "outside"] = "inside",
        lr_placement: Literal["outside", "inside"] = "outside",
        clamp: float | None = None,
        record: bool = False,
        **unknown: NoReturn,
    ) -> None:
        given = locals()
        if base_optimizer is not None and optimizer is not None:
            raise TypeError("LARS: base_optimizer and optimizer are two names for one argument; pass only one")
        base: Any = optimizer if base_optimizer is None else base_optimizer
        if base is None:
            base = unknown.get("params")
        options = {name: given[name] for name in DEFAULTS}
        changed = {name: value for name, value in options.items() if value != DEFAULTS[name]}
        check_base(base, LARS, changed, extra, unknown)
        rule = Rule(**options)
        check_rule(base, rule)
        check_groups(base.param_groups, rule)
        if not isinstance(record, bool):
            raise ValueError(f"record={record!r}: give True or False")
        # Optimizer.__init__ would create new parameter groups; this sets up only the rest (hooks, profiling).
        self.__setstate__({"base_optimizer": base, "rule": rule, "record": record})

    @classmethod
    def preset(cls, name: str, base_optimizer: Optimizer | None = None, **options: Any) -> LARS:
        """Return a LARS that computes like the implementation `name`; keyword `options` override the preset's.

        The module ``options`` lists the names, their options and sources (`PRESETS`). The presets assume torch's SGD as
        the base; ``lamb`` assumes AdamW. Raises `ValueError` for an unknown name, and the errors of `LARS`.
        """
        if not isinstance(name, str):
            raise TypeError("LARS.preset takes the name first: write LARS.preset('bolts', base)")
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
        base = options.get("optimizer", options.get("params")) if base_optimizer is None else base_optimizer
        unknown = {key: value for key, value in options.items() if key not in (*DEFAULTS, "optimizer", "record")}
        check_base(base, LARS, {key: options[key] for key in options if key in DEFAULTS}, (), unknown, name)
        return cls(base_optimizer, **(PRESETS[name] | options))

    @property
    def optim(self) -> Optimizer:
        """The base optimizer, by its name in torchlars."""
        return self.base_optimizer

    @property
    def eps(self) -> float:
        """The term added to the ratio's denominator."""
        return self.rule.eps

    @eps.setter
    def eps(self, value: float) -> None:
        self.rule = replace(self.rule, eps=value)

    @property
    def trust_coef(self) -> float:
        """The trust coefficient."""
        return self.rule.trust_coef

    @trust_coef.setter
    def trust_coef(self, value: float) -> None:
        self.rule = replace(self.rule, trust_coef=value)

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
        self._state_is_new = True

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults for new parameter groups."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value

    def __getstate__(self) -> dict[str, Any]:
        return {"base_optimizer": self.base_optimizer, "rule": self.rule, "record": self.record}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A separate object, because torch.compile discards changes that a step makes to the optimizer's attributes.
        self._last_step = Record()
        self._state_is_new = True
        self._base_calls_closure = calls_closure(self.base_optimizer)

    def __repr__(self) -> str:
        changed = {k: v for k, v in asdict(self.rule).items() if k in ("eps", "trust_coef") or v != DEFAULTS[k]}
        return f"LARS({self.base_optimizer!r}, {', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer. Raises `ValueError` if LARS cannot be applied to it."""
        if not isinstance(param_group, dict):
            raise TypeError(f"pass a parameter group, {{'params': [...]}}, not {type(param_group).__name__}")
        check_groups([{**self.defaults, **param_group}], self.rule)
        self.base_optimizer.add_param_group(param_group)

    def layers(self) -> Layers | None:
        """Return the parameters adapted in the last step, and a float32 tensor (3, n): ``|w|``, ``|g|`` and the ratios.

        The tensor is on the parameters' device; the host does not wait. With the combined denominator, ``|g|`` is
        ``|g + wd * w|``. Returns None before the first step with ``record``.
        """
        return self._last_step.layers() if self._last_step.enabled else None

    def recorded(self) -> Callable[[], Layers] | None:
        """Return a function that returns `layers` of this step, even after later steps; None without a record."""
        return self._last_step.copy().layers if self._last_step.enabled else None

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict with an additional entry ``"lars"``: the options by name."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = {**self.base_optimizer.state_dict(), "lars": asdict(self.rule)}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict that `state_dict` returned, options included.

        A state dict of the base alone, which is also torchlars's format, is accepted. Options that are missing from the
        state dict stay unchanged, and so does the ``exclude`` of a group whose entry has none. LARS over SGD also loads
        a state dict of timm's or lightning-bolts' LARS, if the rule in it is the rule of this LARS.

        Raises:
            ValueError: the ``"lars"`` entry is not in the format of `state_dict`, the base rejects the rest, or the
                updates would not continue exactly: the state dict is of another kind of base, or of another
                implementation with another rule or state. The message shows what to load, and nothing has changed.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        check_state(state_dict, self.base_optimizer, asdict(self.rule))
        stored = state_dict.pop("lars", {})
        if not isinstance(stored, dict):
            raise ValueError(f"the state dict's 'lars' entry is {stored!r}; it must be a dict of options by name")
        options = asdict(self.rule) | stored
        unknown = options.keys() - asdict(self.rule).keys()
        if unknown:
            raise ValueError(f"the state dict's 'lars' entry has {sorted(unknown)}; LARS has no such options")
        rule = Rule(**options)
        check_rule(self.base_optimizer, rule)
        excluded = [group.get("exclude") for group in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        self._state_is_new = True
        for group, exclude in zip(self.param_groups, excluded, strict=True):
            if exclude is not None:
                group.setdefault("exclude", exclude)
        self.rule = rule
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Rescale the gradients and make one update. Return the closure's loss, or None without a closure.

        LARS calls `closure` once, before the update and with gradients enabled. A base that calls the closure itself
        (LBFGS) may call it any number of times.

        Raises:
            RuntimeError: a gradient is sparse. No gradient or parameter has been changed.
            TypeError: the base needs a closure, but none was passed.
        """
        self._last_step.begin(self.record)
        record = self._last_step if self.record else None
        base: Any = self.base_optimizer
        if self._base_calls_closure:
            if closure is None:
                raise TypeError(f"LARS over {type(base).__name__}: step needs a closure; the base calls it itself")
            return self._step_with_closure(closure, record)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups, self.rule)
        done: list[Tensor] = []
        if fused_sgd.applies_to(base, self.rule):
            done, remaining = fused_sgd.step(base, self.rule, record, self._state_is_new)
            self._state_is_new = False
            if not remaining and "step" not in vars(base):
                return loss
        # A scheduler may have wrapped the base's step to count it, so call it even if no gradients remain.
        grads = [parameter.grad for parameter in done]
        try:
            for parameter in done:
                parameter.grad = None
            self._step_base(record)
        finally:
            for parameter, grad in zip(done, grads, strict=True):
                parameter.grad = grad
        return loss

    def _step_base(self, record: Record | None) -> None:
        parts = group_parameters(self.param_groups, self.rule)
        if self.rule.ratio_of == "gradient":
            rescale(parts, self.rule, record)
        before = [copy_weights(part) for part in parts] if self.rule.changes_step else []
        hidden = hide_settings(self.param_groups, self.rule)
        try:
            if is_compiling() and is_plain(self.base_optimizer):
                # torch's wrapper breaks the graph in order to disable gradients, which LARS.step has already done.
                inspect.unwrap(type(self.base_optimizer).step)(self.base_optimizer)
            else:
                self.base_optimizer.step()
        except Exception as error:
            if failed_for_closure(self.base_optimizer, error):
                kind = type(self.base_optimizer).__name__
                raise TypeError(
                    f"LARS does not support {kind}: its step calls the closure itself but declares closure=None, so "
                    f"LARS did not pass one. If {kind} wraps an optimizer, let it wrap LARS."
                ) from error
            raise
        finally:
            restore_settings(hidden)
        if self.rule.ratio_of == "step":
            scale_step(parts, before, self.rule, record)
        elif self.rule.changes_step:
            for part, weights in zip(parts, before, strict=True):
                apply_outside(part, weights)

    def _step_with_closure(self, closure: Callable[[], float], record: Record | None) -> float:
        def rescaled() -> float:
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                if record is not None:
                    record.begin(True)
                check_gradients(self.param_groups, self.rule)
                rescale(group_parameters(self.param_groups, self.rule), self.rule, record)
            return loss

        base: Any = self.base_optimizer
        hidden = hide_settings(self.param_groups, self.rule)
        try:
            loss: float = base.step(rescaled)
        finally:
            restore_settings(hidden)
        return loss
