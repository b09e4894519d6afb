"""Apply batch norm to many ghost batches at once, for devices on which a loop would cost a launch per ghost batch.

The number of operations does not depend on the number of ghost batches, and none waits for the device. Plain batch norm
makes 8 passes over the activations, forward and backward (statistics 1, output 2, the two sums 2, gradient 3). The
number of passes here:

- 8 with the Triton kernels of `ghost_kernels`: on CUDA, in channels_last, float32 and half precision.
- 8 if compiled: `torch.compile` fuses all operations between the reductions.
- 13 with torch's operations in float32, if each of them reads from memory and writes to it. Forward: 3. Backward: 1 for
  the sum of the gradients, 4 for the sum of the products (torch cannot sum products of channels_last tensors without
  writing them), and 5 for the gradient, in two steps. The number is 14 in bfloat16, because mean and variance take two
  reads, and 16 in float16, because the products are float32.

The kernels also compute the ReLU and the sum with a shortcut that follow batch norm in residual networks;
`fused_blocks` decides where. They also add the means and variances of the ghost batches to the layer's sums.

If triton is not installed, or its kernels fail, this module uses torch's operations and prints a line to stderr.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lars_train.messages import complain

LARGE = 1 << 24
"""A single ghost batch of at least this many values uses the Triton kernels instead of torch's batch norm.

Torch's batch norm and ReLU are slower on the device but take the host less time: 4 launches from C++, not 6 from
Python. With fewer values than this, an H100 waits for the host (docs/gpu_notes.md).
"""
# The reduced dimensions of a (ghost batches, samples, C, H, W) view.
_REDUCED = (1, 3, 4)
_HALF = (torch.bfloat16, torch.float16)
_KERNEL_DTYPES = (torch.float32, *_HALF)
# Reasons not to use the Triton kernels.
_disabled: list[str] = []
# An entry means that launches take the host no time.
_launches_are_free: list[None] = []


def ghost_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    ghosts: int,
    eps: float,
    shortcut: Tensor | None = None,
    relu: bool = False,
    totals: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Normalize each ghost batch by its own statistics (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167,
    algorithm 1; Hoffer et al. 2017, https://arxiv.org/abs/1705.08741, section 4).

    Statistics and arithmetic are in float32 for half-precision input, otherwise in the input's dtype, even under
    autocast. The input and two (ghosts, C) statistics are saved for the backward pass, with a shortcut also the output.
    Double backward is not supported.

    Args:
        input: (n, C, H, W), any memory format; n is a multiple of `ghosts`.
        weight, bias: (C,), or both None.
        ghosts: number of consecutive ghost batches in `input`.
        eps: added to the variance.
        shortcut: added to the result, before the ReLU; see `can_fuse`.
        relu: apply ReLU to the result. Required with a shortcut.
        totals: (2, C) and (1,). The ghost batches' means and unbiased variances, weighted by samples, are added to the
            first tensor, and the number of samples to the second.

    Returns:
        The output, with the shape, dtype and memory format of `input`.

    Raises:
        ValueError: a ghost batch has a single value per channel, or there is a shortcut without ReLU.
    """
    if shortcut is not None and not relu:
        raise ValueError("a shortcut without relu=True: the backward pass needs the sign of the output")
    if input.numel() // max(ghosts * input.shape[1], 1) < 2:
        raise ValueError(f"{ghosts} ghost batches in {tuple(input.shape)}: each needs more than 1 value per channel")
    # torch.compile does not support changes of buffers within a Function, so `totals` change after it.
    within = totals if _has_kernels(input) else None
    output: Tensor
    output, mean, variance = _GhostNorm.apply(input, weight, bias, shortcut, ghosts, eps, relu, within)
    if totals is not None and within is None:
        _add_to(totals, input, mean, variance)
    return output


def can_fuse(input: Tensor, shortcut: Tensor | None) -> bool:
    """Return True if the Triton kernels support `input` and `shortcut`, which must then have the same layout."""
    return _has_kernels(input) and (
        shortcut is None
        or (_is_supported(shortcut) and shortcut.shape == input.shape and shortcut.dtype == input.dtype)
    )


def is_faster_for_single_ghost(input: Tensor) -> bool:
    """Return True if `ghost_norm` is faster than torch's batch norm for `input` (n, C, H, W), a single ghost batch."""
    return (bool(_launches_are_free) or input.numel() >= LARGE) and _has_kernels(input)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Disable the Triton kernels within the context, to compare them with torch's operations."""
    _disabled.append("requested")
    try:
        yield
    finally:
        _disabled.remove("requested")


@contextmanager
def launches_are_free() -> Iterator[None]:
    """Within the context, use the Triton kernels for single ghost batches of any size: a CUDA graph launches them."""
    _launches_are_free.append(None)
    try:
        yield
    finally:
        _launches_are_free.pop()


class _GhostNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shortcut: Tensor | None,
        ghosts: int,
        eps: float,
        relu: bool,
        totals: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = (input, weight, bias, ghosts, eps)
        options = {"shortcut": shortcut, "relu": relu, "totals": totals}
        result = _call_kernel("normalize", input, *arguments, **options)
        output, mean, variance = result or _normalize(*arguments, shortcut=shortcut, relu=relu)
        if result is None and totals is not None:
            _add_to(totals, input, mean, variance)
        # The ReLU's backward pass needs the sign of the ReLU's input. With a shortcut, the output has that sign.
        # Otherwise the backward pass computes the sign again, which needs the bias.
        kept = (bias if relu and shortcut is None else None, output if shortcut is not None else None)
        ctx.save_for_backward(input, weight, mean, variance, *kept)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.relu = eps, relu
        return output, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        input, weight, mean, variance, bias, output = ctx.saved_tensors
        arguments = (grad, input, weight, bias, mean, variance, ctx.eps)
        extra = {"output": output, "relu": ctx.relu}
        result = _call_kernel("gradients", input, *arguments, **extra) or _gradients(*arguments, **extra)
        grad_input, sums, grad_shortcut = result
        if weight is None:
            return grad_input, None, None, grad_shortcut, None, None, None, None
        # A single ghost batch needs no sum.
        total = sums[:, 0] if len(mean) == 1 else sums.sum(1)
        grad_bias, grad_weight = total.to(weight.dtype).unbind()
        return grad_input, grad_weight, grad_bias, grad_shortcut, None, None, None, None


def _call_kernel(function: str, input: Tensor, *arguments: Any, **options: Any) -> tuple[Any, ...] | None:
    """Call `function` of `ghost_launch`. Return None if the kernels do not support `input` or fail."""
    if not _has_kernels(input):
        return None
    try:
        result: tuple[Any, ...] = getattr(_kernels(), function)(*arguments, **options)
    except torch.OutOfMemoryError:
        raise
    # Triton is missing, or one of its compilers failed. If the device itself failed, the next operation raises again.
    except Exception as error:
        # Keep the text only: the traceback of the error would keep the activations alive.
        _disabled.append(f"{type(error).__name__}: {error}")
        complain(f"ghost batch norm runs without its Triton kernels, more slowly: {_disabled[-1]}")
        return None
    return result


def _has_kernels(input: Tensor) -> bool:
    # The order matters to torch.fx, whose proxies have no definite device.
    return not torch.compiler.is_compiling() and _is_plain(input) and not _disabled and _is_supported(input)


def _is_supported(input: Tensor) -> bool:
    return (
        input.device.type == "cuda"
        and input.dtype in _KERNEL_DTYPES
        and input.is_contiguous(memory_format=torch.channels_last)
    )


def _is_plain(input: Tensor) -> bool:
    # Fake tensors, which tracing and measuring use, are a subclass.
    return type(input) is Tensor


def _kernels() -> ModuleType:
    from lars_train.models import ghost_launch

    return ghost_launch


def _add_to(totals: tuple[Tensor, Tensor], input: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Add to `totals` the ghost batches' means and unbiased variances, weighted by samples, and the sample count."""
    values = input.numel() // mean.numel()
    sums = torch.stack([mean.sum(0), variance.sum(0) * (values / (values - 1))])
    totals[0].add_(sums, alpha=len(input) // len(mean))
    totals[1].add_(len(input))


def _normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ghosts: int,
    eps: float,
    *,
    shortcut: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `ghost_launch.normalize` with torch's operations."""
    with _no_autocast(input):
        x = _split(input, ghosts)
        mean, variance = _moments(x)
        inverse = torch.rsqrt(variance + eps)
        scale = inverse if weight is None else inverse * _per_channel(weight)
        shift = -mean * scale if bias is None else torch.addcmul(_per_channel(bias), mean, scale, value=-1)
        # Not a view: the next layer (ReLU) works in place, which autograd forbids for views that a Function returns.
        output = torch.empty_like(input)
        written = _multiply_add(shift, x, scale, _split(output, ghosts))
        if torch.compiler.is_compiling():
            output = written.flatten(0, 1).clone()
        if shortcut is not None:
            output += shortcut
        if relu:
            output.relu_()
    return output, mean.reshape(ghosts, -1), variance.reshape(ghosts, -1)


def _gradients(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    *,
    output: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute `ghost_launch.gradients` with torch's operations."""
    with _no_autocast(input):
        mean, variance = (t[:, None, :, None, None] for t in (mean, variance))
        x, inverse = _split(input, len(mean)), torch.rsqrt(variance + eps)
        if relu:
            if output is None:
                scale = inverse if weight is None else inverse * _per_channel(weight)
                sign = ((x - mean) * scale + (0 if bias is None else _per_channel(bias))).flatten(0, 1)
            else:
                sign = output
            grad = grad.masked_fill(sign <= 0, 0)
        dy = _split(grad, len(mean))
        dy_sum = dy.sum(_REDUCED, keepdim=True, dtype=mean.dtype)
        # The sum of the gradients times the normalized input.
        normed_sum, scratch = _product_sum(dy, x, mean, dy_sum)
        normed_sum = normed_sum * inverse
        grad_input = _input_gradient(dy, x, mean, inverse, weight, dy_sum, normed_sum, scratch)
        sums = torch.stack([dy_sum, normed_sum]).reshape(2, len(mean), -1)
        return grad_input.flatten(0, 1), sums, None if output is None else grad


def _input_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    dy_sum: Tensor,
    normed_sum: Tensor,
    scratch: Tensor | None,
) -> Tensor:
    """Return scale * (dy - mean(dy) - normed * mean(dy * normed)), with means over a ghost batch."""
    scale = inverse if weight is None else inverse * _per_channel(weight)
    share = scale * (-mean.numel() / x.numel())
    slope = normed_sum * inverse * share
    shift = torch.addcmul(dy_sum * share, mean, slope, value=-1)
    # Compute the terms without dy first: their sum is centered, so rounding it to half precision loses little.
    out = _empty_like(x) if scratch is None else scratch
    return _multiply_add(_multiply_add(shift, x, slope, out), dy, scale, out)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and biased variance per ghost batch and channel, (ghosts, 1, C, 1, 1), in at least float32."""
    if x.dtype in _HALF:
        if x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
            # `var_mean` would round its results to half precision, and a float32 copy would cost memory.
            mean = x.mean(_REDUCED, keepdim=True, dtype=torch.float32)
            return mean, torch.var(x, _REDUCED, correction=0, keepdim=True, out=torch.empty_like(mean))
        x = x.float()
    variance, mean = torch.var_mean(x, _REDUCED, correction=0, keepdim=True)
    return mean, variance


def _multiply_add(shift: Tensor, x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Write shift + x * scale into `out`, which may be `shift`. Compute in the widest dtype and round once."""
    if torch.compiler.is_compiling():
        return torch.addcmul(shift, x.to(scale.dtype), scale).to(out.dtype)
    return torch.addcmul(shift, x, scale, out=out)


def _product_sum(dy: Tensor, x: Tensor, mean: Tensor, dy_sum: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the sums of dy * (x - mean) per ghost batch and channel, and a scratch tensor like `x`, or None."""
    if torch.compiler.is_compiling():
        return (dy.to(mean.dtype) * (x.to(mean.dtype) - mean)).sum(_REDUCED, keepdim=True), None
    if x.dtype == torch.float16:
        # Products of scaled gradients may exceed 65504, the largest float16. In float32 each product is exact, so
        # subtracting the mean afterwards loses less precision than the rounding of the input to float16.
        products = torch.addcmul(mean.new_zeros(1), dy, x)
        return torch.addcmul(products.sum(_REDUCED, keepdim=True), mean, dy_sum, value=-1), None
    # torch's only operation that multiplies a difference without storing the difference is the gradient of the squared
    # error, 2 * (x - mean) * dy. It needs a single dtype; the last line corrects for rounding the mean to that dtype.
    rounded_mean = mean.to(x.dtype)
    products = torch.ops.aten.mse_loss_backward.grad_input(dy, x, rounded_mean, 0, grad_input=_empty_like(x))
    centered = products.sum(_REDUCED, keepdim=True, dtype=mean.dtype) / 2
    if rounded_mean.dtype == mean.dtype:
        return centered, products
    return torch.addcmul(centered, mean - rounded_mean, dy_sum, value=-1), products


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, 1, -1, 1, 1)


def _split(x: Tensor, ghosts: int) -> Tensor:
    return x.view(ghosts, len(x) // ghosts, *x.shape[1:])


def _empty_like(x: Tensor) -> Tensor:
    return _split(torch.empty_like(x.flatten(0, 1)), len(x))


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    # Autocast would make float32 copies of the activations.
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
