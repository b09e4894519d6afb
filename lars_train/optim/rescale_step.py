"""Scale the base's step by trust ratios: those of the gradients (`apply_outside`) or of the step itself (`scale_step`).

Both need a copy of the weights from before the step. As in `rescale`, the host computes the ratios of CPU tensors, and
never waits for an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rescale import (
    Bulk,
    Part,
    Record,
    aligned_scalars,
    clones,
    host_norm,
    is_adapted,
    is_host_tensor,
    local_shard,
    shards_of,
    sum_over_shards,
)
from .rule import Rule

_NO_DECAY = 0.0
Hidden = list[tuple[dict[str, Any], str, Any, Any]]
"""Settings that are hidden from the base: the group, the key, the old value and the temporary value of each."""


def hide_settings(groups: Sequence[dict[str, Any]], rule: Rule) -> Hidden:
    """Replace the settings that LARS applies itself by neutral values: weight decay by 0, lr by 1.

    Return the old values for `restore_settings`. This is not a context manager, because torch.compile cannot break a
    graph within one.
    """
    hidden: Hidden = []
    for group in groups:
        if rule.adds_decay and group.get("weight_decay", 0) != 0:
            base_decays = group.get("exclude", False) and rule.lr_placement == "outside"
            if not base_decays:
                hidden.append((group, "weight_decay", group["weight_decay"], _NO_DECAY))
                group["weight_decay"] = _NO_DECAY
        if rule.lr_placement == "inside" or (rule.ratio_of == "step" and is_adapted(group, rule)):
            lr = group["lr"]
            group["lr"] = torch.ones_like(lr) if isinstance(lr, Tensor) else 1.0
            hidden.append((group, "lr", lr, group["lr"]))
    return hidden


def restore_settings(hidden: Hidden) -> None:
    """Undo `hide_settings`, except where a step hook of the base has set a new value."""
    for group, key, value, replacement in hidden:
        if group[key] is replacement:
            group[key] = value


def copy_weights(part: Part) -> list[Tensor]:
    """Copy this rank's shards of the weights of `part`."""
    return clones([local_shard(w) for w in part.parameters])


def apply_outside(part: Part, before: list[Tensor]) -> None:
    """Apply ``part.ratios`` to the step that the base has made: w = before + ratio * (w - before), in place."""
    weights = [local_shard(w) for w in part.parameters]
    if isinstance(part.ratios[0], Tensor):
        torch._foreach_sub_(weights, before)
        torch._foreach_addcmul_(before, part.ratios, weights)
        torch._foreach_copy_(weights, before)
    else:
        for weight, start, ratio in zip(weights, before, part.ratios, strict=True):
            weight.copy_(start.lerp_(weight, ratio))


def scale_step(parts: Sequence[Part], before: Sequence[list[Tensor]], rule: Rule, record: Record | None) -> None:
    """Multiply the base's step by the lr and by its trust ratio, in place.

    The base has made the step with an lr of 1: with a tiny lr the step would lose digits, and with an lr of 0 it would
    be lost. The ratio follows from the norms of `before` and of the step.
    """
    in_bulk: list[tuple[Bulk, list[Tensor]]] = []
    for part, starts in zip(parts, before, strict=True):
        if is_host_tensor(part.parameters[0].detach()):
            for weight, start in zip(part.parameters, starts, strict=True):
                _scale_on_host(weight, start, part.lr, rule, record)
        else:
            in_bulk.append((_prepare_bulk(part, starts), starts))
    sum_over_shards([bulk for bulk, _ in in_bulk])
    for bulk, starts in in_bulk:
        _finish_bulk(bulk, starts, rule, record)


def _scale_on_host(weight: Tensor, start: Tensor, lr: Any, rule: Rule, record: Record | None) -> None:
    change = weight.sub_(start)
    weight_norm, step_norm = host_norm(start), host_norm(change)
    ratio, _ = rule.ratio(weight_norm, step_norm, 0.0, lr)
    if record is not None:
        record.parameters.append(weight)
        record.values.append((weight_norm, step_norm, ratio))
    torch.add(start, change, alpha=ratio * float(lr), out=weight)


def _prepare_bulk(part: Part, starts: list[Tensor]) -> Bulk:
    changes = [local_shard(w) for w in part.parameters]
    torch._foreach_sub_(changes, starts)
    dtype = torch.promote_types(starts[0].dtype, torch.float32)
    wide_changes, wide_starts = changes, starts
    if dtype != starts[0].dtype:
        wide_changes, wide_starts = [c.to(dtype) for c in changes], [s.to(dtype) for s in starts]
    norms = torch.stack(torch._foreach_norm(wide_starts)), torch.stack(torch._foreach_norm(wide_changes))
    return Bulk(part, shards_of(part.parameters[0]), changes, wide_changes, wide_starts, norms=norms)


def _finish_bulk(bulk: Bulk, starts: list[Tensor], rule: Rule, record: Record | None) -> None:
    assert bulk.norms is not None
    part, changes = bulk.part, bulk.local_grads
    weight_norms, step_norms = bulk.norms
    ratios, _ = rule.ratios(weight_norms, step_norms, 0.0, part.lr)
    if record is not None:
        record.parameters.extend(part.parameters)
        record.values.append(torch.stack((weight_norms, step_norms, ratios)))
    factors = aligned_scalars((ratios * part.lr).to(bulk.grads[0].dtype))
    torch._foreach_addcmul_(starts, factors, changes)
    torch._foreach_copy_(changes, starts)
