"""Step LARS over SGD on the CPU at memory speed, tensor by tensor: first its norms, then its whole update.

The C kernels (`kernels.c`, if it was compiled at install) update short tensors, and all tensors if torch has one
thread. torch's fused SGD kernel updates the others, on all threads. Both read weight, gradient and momentum once and
write back only what changes. The scalars of torch's kernel can include the ratio r, which saves a pass over the
gradient::

    buffer = momentum * buffer + (1 - dampening) * (g + wd * w)      with 1 - dampening = r
    w      = w - lr * buffer                                         without momentum: lr * r in place of lr
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as torch_optimizer

from .rescale import Record, have_same_layout, is_adapted, is_compiling
from .rule import Rule

if TYPE_CHECKING:
    from . import kernels
else:
    try:
        from ..extensions import load_extension
    except ImportError:  # torch_lars, which is pure Python
        kernels = None
    else:
        # None: not compiled at install.
        kernels = load_extension(f"{__package__}.kernels")

# The size up to which torch's kernels, too, use one thread (at::internal::GRAIN_SIZE in ATen/TensorIterator.h).
_ONE_THREAD = 32768
# 1 - (1 - r) has a rounding error of 1e-16, which is visible in float64 if r is smaller than this.
_SMALLEST_IN_DAMPENING = 1e-4
_PLAIN_TYPES = (Parameter, Tensor)
# Older versions of torch lack the kernel for the CPU (before 2.4), or increment_version for a list.
_HAS_KERNEL = torch.__version__ >= "2.6"


def applies_to(base: Optimizer, rule: Rule) -> bool:
    """Return True if this module can replace the step of `base`: torch's own SGD, without step hooks."""
    return (
        _HAS_KERNEL
        and type(base) is SGD
        and rule.ratio_of == "gradient"
        and rule.denominator == "split"
        and rule.weight_decay == "coupled"
        and rule.clamp is None
        and ("step" not in vars(base) or is_wrapped_by_scheduler(base))
        and not is_compiling()
        and not has_step_hooks(base)
    )


def is_wrapped_by_scheduler(base: Any) -> bool:
    """Return True if a learning-rate scheduler has wrapped the step of `base` to count its calls."""
    return getattr(base.step, "_wrapped_by_lr_sched", False)


def has_step_hooks(optimizer: Any) -> bool:
    """Return True if a step of `optimizer` runs hooks: its own, or those registered for all optimizers."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


def step(base: Optimizer, rule: Rule, record: Record | None, new_state: bool) -> tuple[list[Tensor], bool]:
    """Update all parameters that the kernels support.

    Gradients stay unchanged, unless the momentum is Nesterov's or the ratio is very small: they may then be rescaled.

    Args:
        new_state: True if the state was loaded or assigned, so that its shapes may not match the parameters.

    Returns:
        The updated parameters, and True if parameters with gradients remain.
    """
    done: list[Tensor] = []
    if new_state and not all(
        _buffer_fits(weight, base.state) for group in base.param_groups for weight in group["params"]
    ):
        return done, True
    remaining = [_update_group(group, base.state, rule, record, done) for group in base.param_groups]
    # The kernels do not increment version counters, which autograd uses to detect that a saved tensor was modified.
    torch.autograd.graph.increment_version(done)
    return done, any(remaining)


def _buffer_fits(weight: Tensor, state: Any) -> bool:
    buffer = state[weight].get("momentum_buffer") if weight in state else None
    return buffer is None or buffer.shape == weight.shape


def _update_group(group: dict[str, Any], state: Any, rule: Rule, record: Record | None, done: list[Tensor]) -> bool:
    entries, remaining = _eligible(group, state)
    if not entries:
        return remaining  # without reading the lr, which may be on an accelerator
    # Look up attributes before the loop: for small tensors, the overhead of the loop matters.
    c_kernels_up_to = -1.0
    if kernels is not None:
        norms, update = kernels.norms, kernels.update
        c_kernels_up_to = math.inf if torch.get_num_threads() == 1 else _ONE_THREAD
    append = done.append
    adapted, decay, group_lr = is_adapted(group, rule), float(group["weight_decay"]), float(group["lr"])
    momentum, nesterov, maximize = group["momentum"], group["nesterov"], group["maximize"]
    lr_inside, ratio_outside = rule.lr_placement == "inside", rule.ratio_placement == "outside"
    ratio_of = rule.ratio_function(decay, group_lr)
    for weight, grad, buffer, dampening, size, is_double in entries:
        if use_c := size <= c_kernels_up_to and type(weight) in _PLAIN_TYPES:
            weight_at, grad_at = weight.data_ptr(), grad.data_ptr()
            if grad_at == 0 and size:  # a tensor of zeros that has no storage
                weight.grad = grad = grad.clone()
                grad_at = grad.data_ptr()
        ratio, wd, lr = 1.0, decay, group_lr
        if adapted:
            if use_c:
                weight_norm, grad_norm = norms(weight_at, grad_at, size, is_double)
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
        scale = (1 - dampening) * factor if buffer is not None else factor
        if use_c:
            buffer_at = 0 if buffer is None else buffer.data_ptr()
            update(weight_at, grad_at, buffer_at, size, is_double, nesterov, maximize, wd, scale, momentum, lr)
        else:
            _update_by_torch(group, weight, grad, buffer, wd, lr, dampening, factor, scale)
        append(weight)
    return remaining


# Weight, gradient, momentum buffer or None, dampening, number of elements, and True for float64. A plain tuple, because
# one is created for every tensor in every step.
_Entry = tuple[Tensor, Tensor, Tensor | None, float, int, bool]


def _eligible(group: dict[str, Any], state: Any) -> tuple[list[_Entry], bool]:
    """Return the tensors of the group that the kernels can update, and True if others with gradients remain."""
    entries: list[_Entry] = []
    remaining = False
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
            or not (grad.is_contiguous() if dense else have_same_layout(weight, grad))
        ):
            remaining = True
            continue
        buffer, dampening = None, dampens
        if momentum != 0:
            param_state = state[weight]
            buffer = param_state.get("momentum_buffer")
            if buffer is None:
                # As in SGD, the first buffer is the gradient, without dampening.
                param_state["momentum_buffer"] = buffer = torch.zeros_like(weight)
                dampening = 0.0
            elif (
                buffer.dtype is not dtype
                or buffer.numel() != size
                or not buffer.is_cpu
                or not (buffer.is_contiguous() if dense else have_same_layout(weight, buffer))
            ):
                remaining = True
                continue
        entries.append((weight, grad, buffer, dampening, size, dtype is f64))
    return entries, remaining


def _update_by_torch(
    group: dict[str, Any],
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    wd: float,
    lr: float,
    dampening: float,
    factor: float,
    scale: float,
) -> None:
    if buffer is None:
        lr *= scale
    elif group["nesterov"] or scale < _SMALLEST_IN_DAMPENING:
        grad.mul_(factor)
        wd *= factor
    else:
        dampening = 1 - scale
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
    # For a short vector the overhead of the call dominates, and that of `dot` is lower.
    if tensor.dim() == 1:
        squares: float = torch.dot(tensor, tensor).item()
        return math.sqrt(squares)
    norm: float = torch.linalg.vector_norm(tensor).item()
    return norm
