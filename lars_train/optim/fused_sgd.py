"""LARS over SGD on the CPU at the speed of memory: each tensor's norms, then at once its whole update.

On one thread, and for short tensors, that is `kernels.c`, where a compiler built it. Elsewhere it is torch's fused
SGD kernel, which uses all threads and, too, reads weight, gradient and momentum once and writes back what changes.
Its scalars have room for the ratio r, so that no pass over the gradient is needed for it::

    buffer = momentum * buffer + (1 - dampening) * (g + wd * w)      with 1 - dampening = r
    w      = w - lr * buffer                                         without momentum: lr * r for lr
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as torch_optimizer

from ..extensions import load_extension
from .rescale import Record, is_adapted, walk_alike
from .rule import Rule

if TYPE_CHECKING:
    from . import kernels
else:
    # None: no compiler was there at the install.
    kernels = load_extension(f"{__package__}.kernels")

# Up to as many elements torch's kernels, too, keep to one thread (at::internal::GRAIN_SIZE in ATen/TensorIterator.h).
_ONE_THREAD = 32768
# 1 - (1 - r) has an error of 1e-16: for smaller ratios it would show in float64.
_SMALLEST_IN_DAMPENING = 1e-4
_PLAIN = (Parameter, Tensor)


def applies_to(base: Optimizer, rule: Rule) -> bool:
    """Whether the updates of `base` may be made here: it is torch's own SGD, and nobody hooks into its steps."""
    return (
        type(base) is SGD
        and rule.denominator == "split"
        and rule.weight_decay == "coupled"
        and rule.clamp is None
        and ("step" not in vars(base) or is_counted(base))
        and not torch.compiler.is_compiling()
        and not has_step_hooks(base)
    )


def is_counted(base: Any) -> bool:
    """Whether a learning-rate scheduler was built on `base`, which replaces its step by one that counts the steps."""
    return getattr(base.step, "_wrapped_by_lr_sched", False)


def has_step_hooks(optimizer: Any) -> bool:
    """Whether a step of `optimizer` calls hooks, its own or torch's global ones."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


def step(base: Optimizer, rule: Rule, record: Record | None, new_state: bool) -> tuple[list[Tensor], bool]:
    """Make the updates of all parameters that the kernel can take; those, and whether others have gradients.

    `new_state`: the state was brought from elsewhere, so that its shapes may not be those of the parameters.
    The gradients stay as they are, or are rescaled (Nesterov momentum, very small ratios).
    """
    done: list[Tensor] = []
    if new_state and not all(_fits(weight, base.state) for group in base.param_groups for weight in group["params"]):
        return done, True
    left = [_update_group(group, base.state, rule, record, done) for group in base.param_groups]
    # The kernel leaves the versions as they are, by which autograd knows that a saved tensor has changed.
    torch.autograd.graph.increment_version(done)
    return done, any(left)


def _fits(weight: Tensor, state: Any) -> bool:
    buffer = state[weight].get("momentum_buffer") if weight in state else None
    return buffer is None or buffer.shape == weight.shape


def _update_group(group: dict[str, Any], state: Any, rule: Rule, record: Record | None, done: list[Tensor]) -> bool:
    taken, left = _taken(group, state)
    # What the loop needs is looked up before it: for small tensors its own time is what counts.
    ours_up_to = -1.0
    if kernels is not None:
        norms, update = kernels.norms, kernels.update
        ours_up_to = math.inf if torch.get_num_threads() == 1 else _ONE_THREAD
    keep = done.append
    adapted, decay, group_lr = is_adapted(group, rule), float(group["weight_decay"]), float(group["lr"])
    momentum, nesterov, maximize = group["momentum"], group["nesterov"], group["maximize"]
    lr_inside, ratio_outside = rule.lr_placement == "inside", rule.ratio_placement == "outside"
    ratio_of = rule.ratios_on_the_host(decay, group_lr)
    for weight, grad, buffer, dampening, size, wide in taken:
        if ours := size <= ours_up_to and type(weight) in _PLAIN:
            weight_at, grad_at = weight.data_ptr(), grad.data_ptr()
            if grad_at == 0 and size:  # zeros that take no memory
                weight.grad = grad = grad.clone()
                grad_at = grad.data_ptr()
        ratio, wd, lr = 1.0, decay, group_lr
        if adapted:
            if ours:
                weight_norm, grad_norm = norms(weight_at, grad_at, size, wide)
            else:
                weight_norm, grad_norm = _norm(weight), _norm(grad)
            ratio, wd = ratio_of(weight_norm, grad_norm)
            if record is not None:
                record.parameters.append(weight)
                record.values.append((weight_norm, grad_norm, ratio))
        factor = ratio
        if ratio_outside:
            lr, factor = lr * ratio, 1.0
        elif lr_inside:
            lr, factor = 1.0, lr * ratio
        share = (1 - dampening) * factor if buffer is not None else factor
        if ours:
            buffer_at = 0 if buffer is None else buffer.data_ptr()
            update(weight_at, grad_at, buffer_at, size, wide, nesterov, maximize, wd, share, momentum, lr)
        else:
            _update_by_torch(group, weight, grad, buffer, wd, lr, dampening, factor, share)
        keep(weight)
    return left


# Weight, gradient, momentum buffer if there is momentum, dampening, elements, and whether they are float64. A plain
# tuple, for one is made for every tensor in every step.
_Taken = tuple[Tensor, Tensor, Tensor | None, float, int, bool]


def _taken(group: dict[str, Any], state: Any) -> tuple[list[_Taken], bool]:
    """Return the tensors of the group that a kernel can update, and True if others have gradients."""
    taken: list[_Taken] = []
    left = False
    f32, f64 = torch.float32, torch.float64
    momentum, dampens = group["momentum"], group["dampening"]
    for weight in group["params"]:
        grad = weight.grad
        if grad is None:
            continue
        dtype, dense, size = weight.dtype, weight.is_contiguous(), weight.numel()
        if (
            (dtype is not f32 and dtype is not f64)
            or type(grad) is not Tensor
            or grad.dtype is not dtype
            or grad.numel() != size
            or not grad.is_cpu
            or not (grad.is_contiguous() if dense else walk_alike(weight, grad))
        ):
            left = True
            continue
        buffer, dampening = None, dampens
        if momentum != 0:
            own = state[weight]
            buffer = own.get("momentum_buffer")
            if buffer is None:
                # As SGD does it, the first buffer is the whole gradient.
                own["momentum_buffer"] = buffer = torch.zeros_like(weight)
                dampening = 0.0
            elif (
                buffer.dtype is not dtype
                or buffer.numel() != size
                or not buffer.is_cpu
                or not (buffer.is_contiguous() if dense else walk_alike(weight, buffer))
            ):
                left = True
                continue
        taken.append((weight, grad, buffer, dampening, size, dtype is f64))
    return taken, left


def _update_by_torch(
    group: dict[str, Any],
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    wd: float,
    lr: float,
    dampening: float,
    factor: float,
    share: float,
) -> None:
    if buffer is None:
        lr *= share
    elif group["nesterov"] or share < _SMALLEST_IN_DAMPENING:
        grad.mul_(factor)
        wd *= factor
    else:
        dampening = 1 - share
    torch._fused_sgd_(
        [weight],
        [grad],
        [] if buffer is None else [buffer],
        weight_decay=wd,
        momentum=group["momentum"],
        lr=lr,
        dampening=dampening,
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,
    )


def _norm(tensor: Tensor) -> float:
    # For a short vector the call is what takes time, and that of a product is shorter.
    if tensor.dim() == 1:
        squares: float = torch.dot(tensor, tensor).item()
        return math.sqrt(squares)
    norm: float = torch.linalg.vector_norm(tensor).item()
    return norm
