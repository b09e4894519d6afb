"""LARS over SGD on the CPU at the speed of memory: each tensor's norms, then at once its whole update.

torch's fused SGD kernel reads weight, gradient and momentum once and writes back what changes. Its scalars
have room for the ratio r, so that no pass over the gradient is needed for it::

    buffer = momentum * buffer + (1 - dampening) * (g + wd * w)      with 1 - dampening = r
    w      = w - lr * buffer                                         without momentum: lr * r for lr
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as torch_optimizer

from lars_train.optim.rescale import Record, is_adapted, walk_alike
from lars_train.optim.rule import Rule

# 1 - (1 - r) has an error of 1e-16: for smaller ratios it would show in float64.
_SMALLEST_IN_DAMPENING = 1e-4


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


def update(base: Optimizer, rule: Rule, record: Record | None) -> tuple[list[Tensor], bool]:
    """Make the updates of all parameters that the kernel can take; those, and whether others have gradients.

    The gradients stay as they are, or are rescaled (Nesterov momentum, very small ratios).
    """
    done: list[Tensor] = []
    left = [_update_group(group, base.state, rule, record, done) for group in base.param_groups]
    # The kernel leaves the versions as they are, by which autograd knows that a saved tensor has changed.
    torch.autograd.graph.increment_version(done)
    return done, any(left)


def _update_group(group: dict[str, Any], state: Any, rule: Rule, record: Record | None, done: list[Tensor]) -> bool:
    # What the loop needs is looked up before it: for small tensors its own time is what counts.
    kernel = torch._fused_sgd_
    adapted, decay, group_lr = is_adapted(group, rule), float(group["weight_decay"]), float(group["lr"])
    momentum, nesterov, maximize = group["momentum"], group["nesterov"], group["maximize"]
    lr_inside, ratio_outside = rule.lr_placement == "inside", rule.ratio_placement == "outside"
    left = False
    for weight in group["params"]:
        grad = weight.grad
        if grad is None:
            continue
        if type(grad) is not Tensor or not _takes(weight, grad):
            left = True
            continue
        buffers, dampening = [], group["dampening"]
        if momentum != 0:
            own = state[weight]
            buffer = own.get("momentum_buffer")
            if buffer is None:
                # As SGD does it, the first buffer is the whole gradient.
                own["momentum_buffer"] = buffer = torch.zeros_like(weight)
                dampening = 0.0
            elif not _takes(weight, buffer):
                left = True
                continue
            buffers.append(buffer)
        ratio, wd, lr = 1.0, decay, group_lr
        if adapted:
            weight_norm, grad_norm = _norm(weight), _norm(grad)
            ratio, wd = rule.ratio(weight_norm, grad_norm, decay, lr)
            if record is not None:
                record.parameters.append(weight)
                record.values.append((weight_norm, grad_norm, ratio))
        factor = ratio
        if ratio_outside:
            lr, factor = lr * ratio, 1.0
        elif lr_inside:
            lr, factor = 1.0, lr * ratio
        share = (1 - dampening) * factor
        if not buffers:
            lr *= factor
        elif nesterov or share < _SMALLEST_IN_DAMPENING:
            grad.mul_(factor)
            wd *= factor
        else:
            dampening = 1 - share
        kernel(
            [weight],
            [grad],
            buffers,
            weight_decay=wd,
            momentum=momentum,
            lr=lr,
            dampening=dampening,
            nesterov=nesterov,
            maximize=maximize,
            is_first_step=False,
        )
        done.append(weight)
    return left


def _norm(tensor: Tensor) -> float:
    # For a short vector the call is what takes time, and that of a product is shorter.
    if tensor.dim() == 1:
        squares: float = torch.dot(tensor, tensor).item()
        return math.sqrt(squares)
    norm: float = torch.linalg.vector_norm(tensor).item()
    return norm


def _takes(weight: Tensor, other: Tensor) -> bool:
    """Whether the kernel, which walks through memory, takes these and meets the same elements at the same time."""
    dtype = weight.dtype
    if other.dtype is not dtype or not (dtype is torch.float32 or dtype is torch.float64) or not other.is_cpu:
        return False
    return (weight.is_contiguous() and other.is_contiguous()) or walk_alike(weight, other)
