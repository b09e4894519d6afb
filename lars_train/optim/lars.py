"""LARS, layer-wise adaptive rate scaling, around any torch optimizer.

Every parameter tensor is a layer of its own. Its gradient is rescaled by the trust ratio; the base optimizer,
which knows nothing of it, then makes the update. The options are checked in `options`, which also has those of other
implementations; the ratio's arithmetic is in `rule`, its way to the gradients in `rescale`, the short cut for SGD on
the CPU in `fused_sgd`.
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
from .base import calls_closure, check_base, check_groups, is_plain, refused_for_closure
from .options import DEFAULTS, PRESETS
from .rescale import Layers, Record, apply_outside, check_gradients, copies, parts_of, rescale
from .rule import Rule

_NO_DECAY = 0.0


class LARS(Optimizer):
    """Gives the gradients of `base_optimizer` their trust ratios in each of its steps.

    For each parameter w with a gradient g, in a group with weight decay wd::

        ratio = trust_coef * |w| / (|g| + wd * |w| + eps)    if |w| > 0 and |g| > 0, else 1
        g     = ratio * (g + wd * w)

    Then the base steps with its weight decay set to 0: decay is within the ratio, also for bases that
    decouple it (AdamW). The ratio is thus inside the momentum, the learning rate where the base has it.
    Where a group has ``maximize``, wd enters with the opposite sign, so that it still decays. A group with
    ``exclude=True`` gets no ratio and is left to the base, weight decay included.

    Source: You, Gitman, Ginsburg 2017, https://arxiv.org/abs/1708.03888, section 4; eps and the case of a
    zero norm as in torchlars (https://github.com/kakaobrain/torchlars).

    `param_groups`, `state` and `defaults` are the base's own objects: a learning-rate scheduler that is
    built on one of the two optimizers acts on both. Step hooks are each optimizer's own; the base's run
    within LARS's step. After a step `grad` holds the rescaled gradients; those that the update did not
    rescale are unchanged. No other tensor of their size is kept. Parameters that share memory are rescaled one
    after another, in an order that is not stated.

    Norms and ratios are computed in float32, or float64 for float64 gradients; a gradient that is not finite
    gets what the formula says and touches no other tensor. On an accelerator the host waits for nothing. A
    DTensor's norms are those of the whole parameter, with one collective for all that share a mesh.

    Args:
        base_optimizer: an instance of any torch optimizer. One that calls the closure itself, and says so by a step
            that cannot do without (LBFGS), gets rescaled gradients from each call.
        optimizer: another name for `base_optimizer`, which torchlars uses.
        eps: added to the ratio's denominator; at least 0.
        trust_coef: the trust coefficient; above 0.
        denominator: ``"split"``: |g| + wd * |w| + eps; ``"combined"``: |g + wd * w| + eps, whose zero counts as
            that of |g| (optax).
        clip: of the ratio r. ``"lr"``: min(r / lr, 1), so that the step is at most the base's (apex LARC, timm's
            trust_clip); ``(low, high)``: min(max(r, low), high) (NUS-HPC has 0 and 50).
        zero_norm: where |w| or |g| is 0. ``"decay"``: g + wd * w with the ratio 1, clipped; ``"skip"``: g as it
            is, neither decayed nor clipped (apex LARC).
        zero_decay: of groups whose weight decay is 0. ``"adapt"``: as all; ``"skip"``: as with ``exclude`` (timm).
        weight_decay: ``"coupled"``: as above; ``"base"``: the base decays in its own way after the ratio, and wd is 0
            in the formula.
        ratio_placement: ``"inside"`` the momentum, as above; ``"outside"``: the base steps on g + wd * w, and
            what it adds to w is multiplied by the ratio (NUS-HPC). Its whole step has to fit the dtype.
        lr_placement: ``"outside"`` the momentum, as in torch's SGD; ``"inside"``: g is multiplied by the lr too, and
            the base steps with 1 for it (MLPerf, optax). They differ when the lr changes.
        clamp: limit of the elements of g + wd * w, or None (NUS-HPC has 10).
        record: keep what `layers` tells. Off, it costs nothing.

    Raises:
        TypeError: `base_optimizer` is no optimizer, or is LARS itself, or is given by both names; or a keyword is
            unknown.
        ValueError: an option is out of range or does not go with another or with the base, or the base is
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
        *more: NoReturn,
        optimizer: Optimizer | None = None,
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
            raise TypeError("LARS: base_optimizer and optimizer are two names of one argument; give one of them")
        base: Any = optimizer if base_optimizer is None else base_optimizer
        if base is None:
            base = unknown.get("params")
        options = {name: given[name] for name in DEFAULTS}
        changed = {name: value for name, value in options.items() if value != DEFAULTS[name]}
        check_base(base, LARS, changed, more, unknown)
        if ratio_placement == "outside" and calls_closure(base):
            kind = type(base).__name__
            raise ValueError(f"ratio_placement='outside' wants one step per closure, and {kind} makes several")
        rule = Rule(**options)
        check_groups(base.param_groups, rule)
        # Optimizer.__init__ would make parameter groups of its own; this sets up the rest (hooks, profiling).
        self.__setstate__({"base_optimizer": base, "rule": rule, "record": record})

    @classmethod
    def preset(cls, name: str, base_optimizer: Optimizer | None = None, **options: Any) -> LARS:
        """LARS as the implementation called `name` computes it; `options` change or complete it.

        The names, their options and sources: ``lars_train.optim.options.PRESETS``. Raises `ValueError` for
        another name.
        """
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(base_optimizer, **(PRESETS[name] | options))

    @property
    def optim(self) -> Optimizer:
        """The base optimizer, by the name that it has in torchlars."""
        return self.base_optimizer

    @property
    def eps(self) -> float:
        """Added to the ratio's denominator."""
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
        # A thing of its own: torch.compile keeps what a step changes in it, and not what it changes in an optimizer.
        self._last = Record()
        self._state_is_new = True
        self._base_calls_closure = calls_closure(self.base_optimizer)

    def __repr__(self) -> str:
        changed = {k: v for k, v in asdict(self.rule).items() if k in ("eps", "trust_coef") or v != DEFAULTS[k]}
        return f"LARS({self.base_optimizer!r}, {', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer. Raises `ValueError` for a ``differentiable`` one."""
        check_groups([{**self.defaults, **param_group}], self.rule)
        self.base_optimizer.add_param_group(param_group)

    def layers(self) -> Layers | None:
        """The adapted parameters of the last step, with their |w|, |g| and ratio as one tensor (3, n), float32.

        It lies on the parameters' device and is had without waiting for it. |g| is that of g + wd * w with the
        combined denominator. None before the first step with ``record``.
        """
        return self._last.layers() if self._last.taken else None

    def recorded(self) -> Callable[[], Layers] | None:
        """What gives `layers` of the last step, later: also when others have come after it. None as there."""
        return self._last.copy().layers if self._last.taken else None

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict with one more entry, ``"lars"``: the options by name."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = {**self.base_optimizer.state_dict(), "lars": asdict(self.rule)}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, the options included.

        A state dict of the base alone, which is torchlars's too, will do as well; options that it does not
        have, and the groups' ``exclude``, then stay as they are.

        Raises:
            ValueError: the ``"lars"`` entry is not as `state_dict` writes it, or the base refuses the rest.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        stored = state_dict.pop("lars", {})
        if not isinstance(stored, dict):
            raise ValueError(f"the state dict's 'lars' entry is {stored!r}, and not the options by name")
        options = asdict(self.rule) | stored
        unknown = options.keys() - asdict(self.rule).keys()
        if unknown:
            raise ValueError(f"the state dict's 'lars' entry has {sorted(unknown)}, which are no options of LARS")
        rule = Rule(**options)
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
        """Rescale the gradients and make one update; returns the closure's loss, if there is one.

        `closure` is called once, with gradients enabled, before anything else; by a base that calls it
        itself, as often as that likes.

        Raises:
            RuntimeError: a gradient is sparse; no gradient or parameter has been changed then.
            TypeError: the base needs a closure, and there is none.
        """
        self._last.begin(self.record)
        record = self._last if self.record else None
        base: Any = self.base_optimizer
        if self._base_calls_closure:
            if closure is None:
                raise TypeError(f"LARS over {type(base).__name__}: step wants a closure, which that calls itself")
            return self._step_with(closure, record)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups, self.rule)
        done: list[Tensor] = []
        if fused_sgd.applies_to(base, self.rule):
            done, left = fused_sgd.step(base, self.rule, record, self._state_is_new)
            self._state_is_new = False
            if not left and "step" not in vars(base):
                return loss
        # The base steps with what is left, which may be nothing: a scheduler that is built on it counts its steps.
        taken = [parameter.grad for parameter in done]
        try:
            for parameter in done:
                parameter.grad = None
            self._step_base(record)
        finally:
            for parameter, grad in zip(done, taken, strict=True):
                parameter.grad = grad
        return loss

    def _step_base(self, record: Record | None) -> None:
        parts = parts_of(self.param_groups, self.rule)
        rescale(parts, self.rule, record)
        outside = self.rule.ratio_placement == "outside"
        before = [copies(part) for part in parts] if outside else []
        were = self._hide_what_the_gradients_have()
        try:
            if torch.compiler.is_compiling() and is_plain(self.base_optimizer):
                # Without the wrapper in which torch breaks the graph, to have no_grad around it: LARS's step has that.
                inspect.unwrap(type(self.base_optimizer).step)(self.base_optimizer)
            else:
                self.base_optimizer.step()
        except Exception as error:
            if refused_for_closure(self.base_optimizer, error):
                kind = type(self.base_optimizer).__name__
                raise TypeError(
                    f"LARS does not support {kind}: its step calls the closure itself, yet declares closure=None, so "
                    f"that LARS gave it none. Let LARS be the optimizer inside {kind}, if that takes one."
                ) from error
            raise
        finally:
            _restore(were)
        if outside:
            for part, weights in zip(parts, before, strict=True):
                apply_outside(part, weights)

    def _step_with(self, closure: Callable[[], float], record: Record | None) -> float:
        def rescaled() -> float:
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                if record is not None:
                    record.begin(True)
                check_gradients(self.param_groups, self.rule)
                rescale(parts_of(self.param_groups, self.rule), self.rule, record)
            return loss

        base: Any = self.base_optimizer
        were = self._hide_what_the_gradients_have()
        try:
            loss: float = base.step(rescaled)
        finally:
            _restore(were)
        return loss

    def _hide_what_the_gradients_have(self) -> list[tuple[dict[str, Any], str, Any, Any]]:
        """Take the weight decay from the base, and its lr where that is inside; what they were, for `_restore`.

        No context manager: torch.compile cannot break a graph within one of them.
        """
        were: list[tuple[dict[str, Any], str, Any, Any]] = []
        for group in self.param_groups:
            if self.rule.weight_decay == "coupled" and group.get("weight_decay", 0) != 0:
                left_to_the_base = group.get("exclude", False) and self.rule.lr_placement == "outside"
                if not left_to_the_base:
                    were.append((group, "weight_decay", group["weight_decay"], _NO_DECAY))
                    group["weight_decay"] = _NO_DECAY
            if self.rule.lr_placement == "inside":
                lr = group["lr"]
                group["lr"] = torch.ones_like(lr) if isinstance(lr, Tensor) else 1.0
                were.append((group, "lr", lr, group["lr"]))
        return were


def _restore(were: list[tuple[dict[str, Any], str, Any, Any]]) -> None:
    for group, key, value, hidden in were:
        if group[key] is hidden:  # else a hook of the base has set it anew
            group[key] = value
