"""Rescale gradients by their trust ratios: tensor by tensor on the CPU, in bulk on accelerators.

On the CPU a norm is available at once, and a tensor that was just read is still in the cache. So the CPU path finishes
each tensor before the next. On an accelerator the host must not wait: the ratios are 0-D tensors, and every operation
is a ``_foreach_`` call, so that the number of calls does not depend on the number of tensors.

torch runs a ``_foreach_`` call as one kernel launch if, at each position of the lists, the tensors have equal device,
dtype, sizes and strides (``check_fast_path_restrictions`` in torch's ``include/ATen/native/ForeachUtils.h``). The
exception is ``_foreach_addcmul_``: it is also one launch if ``tensor1`` is a list of 0-D factors that have the device
and dtype of the other tensors (``foreach_pointwise_op_0d_tensor1_`` in
``aten/src/ATen/native/cuda/ForeachPointwiseOp.cu``, https://github.com/pytorch/pytorch/pull/172731).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rule import Rule

_norm = torch.linalg.vector_norm
_HALF = (torch.float16, torch.bfloat16)
_KNOWS_COMPILER = hasattr(torch.compiler, "is_compiling")  # torch 2.3
_SMALL = 8192  # elements up to which a pass over memory costs less than a call


class Layers(NamedTuple):
    """The n `parameters` that a step adapted, and `values` (3, n) float32: their |w|, |g| and ratios."""

    parameters: list[Tensor]
    values: Tensor


@dataclass
class Record:
    """The norms and ratios of a step, in the order of computation. Each entry is 3 numbers or a (3, n) tensor."""

    parameters: list[Tensor] = field(default_factory=list)
    values: list[Tensor | tuple[float, float, float]] = field(default_factory=list)
    enabled: bool = False

    def begin(self, enabled: bool) -> None:
        """Clear the record for a new step, which is recorded if `enabled`."""
        self.enabled = enabled
        self.parameters.clear()
        self.values.clear()

    def copy(self) -> Record:
        """Return a copy that the next step does not clear."""
        return Record(list(self.parameters), list(self.values), self.enabled)

    def layers(self) -> Layers:
        """Return the record as `Layers`, on the device of the first tensor."""
        host: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        parts: list[Tensor] = []
        numbers: list[tuple[float, float, float]] = []
        for value in [*self.values, torch.zeros(3, 0, **host)]:
            if not isinstance(value, Tensor):
                numbers.append(value)
                continue
            if numbers:
                parts.append(torch.tensor(numbers, **host).T)
                numbers = []
            parts.append(value)
        device = next((v.device for v in self.values if isinstance(v, Tensor)), torch.device("cpu"))
        moved = [part.to(device=device, dtype=torch.float32, non_blocking=True) for part in parts]
        return Layers(list(self.parameters), torch.cat(moved, dim=1))


@dataclass
class Part:
    """Parameters whose gradients the same ``_foreach_`` calls can rescale.

    `decay` is negative if the base maximizes. `adapted` is False for parameters without a trust ratio.
    """

    decay: float
    lr: Any
    adapted: bool
    parameters: list[Tensor] = field(default_factory=list)
    ratios: list[float] | list[Tensor] = field(default_factory=list)


def group_parameters(groups: Iterable[dict[str, Any]], rule: Rule) -> list[Part]:
    """Group, by decay, lr, device, dtype and sharding, the parameters whose gradients are to be rescaled."""
    parts: dict[Any, Part] = {}
    for group in groups:
        decay = float(group.get("weight_decay", 0.0)) if rule.adds_decay else 0.0
        adapted = is_adapted(group, rule)
        if not adapted and rule.lr_placement == "outside":
            continue
        decay = -decay if group.get("maximize", False) else decay
        lr = group.get("lr") if rule.needs_lr else None
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            if _is_dtensor(grad) and grad.placements != parameter.placements:
                # The gradient may still be a partial sum. Without this line, the base's step would redistribute it.
                parameter.grad = grad = grad.redistribute(parameter.device_mesh, parameter.placements)
            key = (decay, id(lr) if isinstance(lr, Tensor) else lr, adapted, grad.device, grad.dtype, shards_of(grad))
            parts.setdefault(key, Part(decay, lr, adapted)).parameters.append(parameter)
    return list(parts.values())


def is_adapted(group: dict[str, Any], rule: Rule) -> bool:
    """Return True if the parameters of `group` get a trust ratio."""
    return not group.get("exclude", False) and (rule.zero_decay == "adapt" or group.get("weight_decay", 0.0) != 0)


def check_gradients(groups: Iterable[dict[str, Any]], rule: Rule) -> None:
    """Make every gradient safe to rescale in place. Call this before the step changes anything.

    Replace a gradient by a copy if its elements share memory (an expanded tensor), or if it is a lazy negation or
    conjugate. Raises `RuntimeError` for a sparse gradient, and for a complex gradient if the rule clamps elements.
    """
    clamps, eager, strided = rule.clamp is not None, not is_compiling(), torch.strided
    for group in groups:
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            if grad.layout is not strided:
                raise RuntimeError(
                    f"LARS: a parameter of shape {tuple(parameter.shape)} has a {grad.layout} gradient; only dense "
                    "gradients are supported (use sparse=False, or a separate optimizer for the layer)"
                )
            if clamps and grad.is_complex():
                raise RuntimeError(
                    "LARS: complex gradients cannot be clamped; leave out clamp, or exclude the complex parameters"
                )
            if eager and (not grad.is_contiguous() or grad.is_neg() or grad.is_conj()) and _needs_copy(grad):
                parameter.grad = grad.resolve_neg().resolve_conj().clone(memory_format=torch.contiguous_format)


def _needs_copy(grad: Tensor) -> bool:
    if type(grad) is not Tensor:
        return False
    overlaps = not grad.is_contiguous() and torch._debug_has_internal_overlap(grad) == 1
    return overlaps or grad.is_neg() or grad.is_conj()


def is_compiling() -> bool:
    """Return True within torch.compile; always False with torch before 2.3."""
    return _KNOWS_COMPILER and torch.compiler.is_compiling()


def is_host_tensor(tensor: Tensor) -> bool:
    """Return True if the host can read `tensor` without waiting: a plain CPU tensor, outside torch.compile."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not is_compiling()


def rescale(parts: Iterable[Part], rule: Rule, record: Record | None) -> None:
    """Apply decay and ratio to the gradients of `parts`, in place.

    If the ratios are outside the momentum, store them in ``part.ratios`` instead of applying them.
    """
    in_bulk: list[Bulk] = []
    for part in parts:
        grads = [p.grad for p in part.parameters if p.grad is not None]
        if is_host_tensor(grads[0]):
            part.ratios = [
                _rescale_on_host(w, g, part, rule, record) for w, g in zip(part.parameters, grads, strict=True)
            ]
        else:
            in_bulk.append(_prepare_bulk(grads, part, rule))
    sum_over_shards(in_bulk)
    for bulk in in_bulk:
        bulk.part.ratios = _finish_bulk(bulk, rule, record)


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """Return a copy of each tensor."""
    if hasattr(torch, "_foreach_clone"):
        return list(torch._foreach_clone(tensors))
    return [tensor.clone() for tensor in tensors]  # torch before 2.12: one launch per tensor on a GPU


def host_norm(tensor: Tensor) -> float:
    """Return |x|, accumulated in at least float32."""
    return float(_norm(tensor, dtype=torch.float32 if tensor.dtype in _HALF else None))


def _rescale_on_host(weight: Tensor, grad: Tensor, part: Part, rule: Rule, record: Record | None) -> float:
    if grad.dtype in _HALF:
        wide = grad.float()
        ratio = _rescale_on_host(weight, wide, part, rule, record)
        grad.copy_(wide)
        return ratio
    ratio, decay = 1.0, part.decay
    if part.adapted:
        weight_norm = host_norm(weight)
        if rule.denominator == "combined":
            grad.add_(weight, alpha=decay)
            grad_norm = host_norm(grad)
            ratio, _ = rule.ratio(weight_norm, grad_norm, decay, part.lr)
            decay = 0.0
        else:
            grad_norm = host_norm(grad)
            ratio, decay = rule.ratio(weight_norm, grad_norm, decay, part.lr)
        if record is not None:
            record.parameters.append(weight)
            record.values.append((weight_norm, grad_norm, ratio))
    factor = ratio if rule.ratio_placement == "inside" else 1.0
    if rule.lr_placement == "inside":
        factor *= float(part.lr)
    if decay != 0 and rule.clamp is None and grad.numel() > _SMALL and factor != 0 and have_same_layout(weight, grad):
        _scaled_sum(grad, weight, factor, decay)
        return ratio
    if decay != 0:
        grad.add_(weight, alpha=decay)
    if rule.clamp is not None:
        grad.clamp_(-rule.clamp, rule.clamp)
    if factor != 1.0:
        grad.mul_(factor)
    return ratio


def _scaled_sum(grad: Tensor, weight: Tensor, factor: float, decay: float) -> None:
    """Compute g = factor * g + factor * decay * w in place, in one pass over memory instead of two.

    torch's only operation with both factors is `addr_`, which adds an outer product: here that of the vector (1) and w.
    `factor` must not be 0, because torch would then not read g, and non-finite values in g would be lost.
    """
    one = torch.ones(1, dtype=grad.dtype, device=grad.device)
    row = torch.as_strided(grad, (1, grad.numel()), (grad.numel(), 1))
    row.addr_(one, torch.as_strided(weight, (weight.numel(),), (1,)), beta=factor, alpha=factor * decay)


def have_same_layout(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors of the same shape are dense and store their elements in the same order."""
    if one.is_contiguous():
        return other.is_contiguous()
    if one.dim() not in (4, 5):
        return False
    layout = torch.channels_last if one.dim() == 4 else torch.channels_last_3d
    return one.is_contiguous(memory_format=layout) and other.is_contiguous(memory_format=layout)


@dataclass
class Bulk:
    """The intermediate results for a part on an accelerator.

    `local_grads` are this rank's shards of the gradients; in `scale_step`, of the changes of the weights. `grads` and
    `weights` are this rank's shards in at least float32. `decayed` is g + wd * w. `norms` are the norms of weights and
    of gradients, (n,) each.
    """

    part: Part
    shards: _Shards
    local_grads: list[Tensor]
    grads: list[Tensor]
    weights: list[Tensor]
    decayed: list[Tensor] | None = None
    norms: tuple[Tensor, Tensor] | None = None


def _prepare_bulk(grads: list[Tensor], part: Part, rule: Rule) -> Bulk:
    shards = shards_of(grads[0])
    weights, local_grads = [local_shard(w) for w in part.parameters], [local_shard(g) for g in grads]
    dtype = torch.promote_types(local_grads[0].dtype, torch.float32)
    grads = local_grads
    if dtype != local_grads[0].dtype:
        weights, grads = [w.to(dtype) for w in weights], [g.to(dtype) for g in local_grads]
    bulk = Bulk(part, shards, local_grads, grads, weights)
    if part.adapted:
        if rule.denominator == "combined":
            bulk.decayed = _decayed(grads, weights, part.decay, None)
        bulk.norms = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(bulk.decayed or grads))
    return bulk


def sum_over_shards(bulks: list[Bulk]) -> None:
    """Turn the norms of shards into norms of whole parameters, with one collective per kind of sharding."""
    alike: dict[Any, list[Bulk]] = {}
    for bulk in bulks:
        if bulk.norms is not None and bulk.shards and bulk.shards[1]:
            alike.setdefault((bulk.shards, bulk.grads[0].device), []).append(bulk)
    for (shards, _), same_sharding in alike.items():
        mesh, dimensions = shards
        norms = [norm for bulk in same_sharding for norm in bulk.norms or ()]
        squares = torch.cat([norm.double().square() for norm in norms])
        for dimension in dimensions:
            torch.distributed.all_reduce(squares, group=mesh.get_group(dimension))
        whole = iter(torch.split(squares.sqrt(), [len(norm) for norm in norms]))
        for bulk in same_sharding:
            dtype = bulk.grads[0].dtype.to_real()
            bulk.norms = next(whole).to(dtype), next(whole).to(dtype)


def _finish_bulk(bulk: Bulk, rule: Rule, record: Record | None) -> list[Tensor]:
    part, local_grads, grads, weights, decayed = bulk.part, bulk.local_grads, bulk.grads, bulk.weights, bulk.decayed
    dtype = grads[0].dtype
    ratios = decays = None
    if bulk.norms is not None:
        weight_norms, grad_norms = bulk.norms
        ratios, decays = rule.ratios(weight_norms, grad_norms, part.decay, part.lr)
        if record is not None:
            record.parameters.extend(part.parameters)
            record.values.append(torch.stack((weight_norms, grad_norms, ratios)))
        ratios = ratios.to(dtype)
    if decayed is None:
        decayed = _decayed(grads, weights, part.decay, decays)
    if rule.clamp is not None:
        torch._foreach_clamp_min_(decayed, -rule.clamp)
        torch._foreach_clamp_max_(decayed, rule.clamp)
    if rule.ratio_placement == "outside":
        torch._foreach_copy_(local_grads, decayed)
        return aligned_scalars(ratios) if ratios is not None else []
    factors = torch.ones(len(grads), dtype=dtype, device=grads[0].device) if ratios is None else ratios
    if rule.lr_placement == "inside":
        factors = factors * part.lr
    torch._foreach_zero_(grads)
    torch._foreach_addcmul_(grads, aligned_scalars(factors), decayed)
    if local_grads is not grads:
        torch._foreach_copy_(local_grads, grads)
    return []


def _decayed(grads: list[Tensor], weights: list[Tensor], decay: float, decays: Tensor | None) -> list[Tensor]:
    if decay == 0:
        return clones(grads)
    if decays is None:
        return list(torch._foreach_add(grads, weights, alpha=decay))
    decayed = clones(grads)
    torch._foreach_addcmul_(decayed, aligned_scalars(decays.to(grads[0].dtype)), weights)
    return decayed


def aligned_scalars(factors: Tensor) -> list[Tensor]:
    """Return the elements of `factors` (n,) as 0-D tensors, four elements apart in memory.

    This alignment lets the kernel load four elements at once, which requires that all its tensors are aligned, 0-D
    factors included (``init_args`` and ``is_aligned`` in ``aten/src/ATen/native/cuda/ForeachFunctors.cuh``, kILP).
    """
    return list(torch.stack((factors,) * 4, dim=1).select(1, 0).unbind())


_Shards = tuple[Any, tuple[int, ...]] | None


def shards_of(tensor: Tensor) -> _Shards:
    """Return the device mesh of a DTensor and the mesh dimensions that shard it; None for a plain tensor."""
    if not _is_dtensor(tensor):
        return None
    shared: Any = tensor
    return shared.device_mesh, tuple(i for i, place in enumerate(shared.placements) if place.is_shard())


def _is_dtensor(tensor: Tensor) -> bool:
    # Check an attribute, because importing the DTensor class takes longer than importing this whole package.
    return hasattr(tensor, "to_local")


def local_shard(tensor: Any) -> Tensor:
    """Return this rank's shard of a DTensor, or a plain tensor itself."""
    local: Tensor = tensor.to_local() if _is_dtensor(tensor) else tensor
    return local
