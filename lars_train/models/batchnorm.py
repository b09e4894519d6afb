"""Batch norm over ghost batches, with running statistics updated once per update.

Each activation is normalized by the statistics of its ghost batch, on any hardware and for any micro-batch. The caller
of `RunningStatistics.update` provides the communication between ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lars_train.models.ghost_norm import ghost_norm, is_faster_for_single_ghost


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with training statistics over ghost batches (Hoffer et al. 2017, https://arxiv.org/abs/1705.08741,
    section 4). The state dict and the evaluation mode are those of `nn.BatchNorm2d`.

    In training mode the (n, C, H, W) input is a sequence of whole ghost batches of `ghost_batch` samples, or a
    single smaller one. The layer accumulates their means and unbiased variances, weighted by samples;
    `running_mean` and `running_var` stay unchanged until `RunningStatistics.update`.

    The layer accumulates every forward pass in training mode, so a recomputed pass (activation checkpointing) would
    count twice.

    Args:
        num_features: channels C.
        ghost_batch: samples per ghost batch, at least 1.
        eps, momentum, affine, device, dtype: as for `nn.BatchNorm2d`.

    Raises:
        ValueError: `ghost_batch` is below 1; in `forward`, n is 0, or n is larger than `ghost_batch` but not a multiple
            of it, or a ghost batch has a single value per channel, or the input has another number of channels
            (`RuntimeError` if torch's batch norm finds it).
    """

    ghost_sums: Tensor
    """(2, C): sums of the ghost batches' means and unbiased variances since the last update, weighted by samples."""
    ghost_samples: Tensor
    """(1,): the number of samples in `ghost_sums`."""
    ghost_moments: Tensor
    """(2, C): mean and unbiased variance of a single ghost batch until `RunningStatistics.collect`, else zeros."""
    collected = False
    """True lets the statistics of single ghost batches wait in `ghost_moments`."""
    waiting = 0
    """The number of samples in `ghost_moments`."""
    is_frozen = False
    """True keeps the layer in evaluation mode during training."""

    def __init__(
        self,
        num_features: int,
        *,
        ghost_batch: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if ghost_batch < 1:
            raise ValueError(f"ghost_batch={ghost_batch}: it must be at least 1")
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine, device=device, dtype=dtype)
        self.add_sums(ghost_batch)

    def add_sums(self, ghost_batch: int) -> None:
        """Set the size of the ghost batches, and register the empty sums."""
        self.ghost_batch = ghost_batch
        sums = _running(self)[0].new_zeros(2, self.num_features)
        self.register_buffer("ghost_sums", sums, persistent=False)
        self.register_buffer("ghost_samples", sums.new_zeros(1), persistent=False)
        self.register_buffer("ghost_moments", torch.zeros_like(sums), persistent=False)

    def train(self, mode: bool = True) -> GhostBatchNorm2d:
        """Set training mode, unless the layer is frozen."""
        return super().train(mode and not self.is_frozen)

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` (n, C, H, W); the output has the same shape, dtype and memory format."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        ghosts = self._count_ghosts(input)
        if not self._is_looped(input, ghosts):
            return self._at_once(input, ghosts)
        if ghosts == 1 and self.collected and not self.waiting:
            output = self._single(input, *self.ghost_moments.unbind())
            self.waiting = len(input)
            return output
        output, sums = self._one_by_one(input, ghosts)
        self.ghost_sums.add_(sums, alpha=len(input) // ghosts)
        self.ghost_samples.add_(len(input))
        return output

    def uses_kernels(self, input: Tensor) -> bool:
        """Return False if torch's batch norm takes the host less time than the kernels of `ghost_norm`."""
        return self._count_ghosts(input) > 1 or is_faster_for_single_ghost(input)

    def forward_relu(self, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return relu(forward(input) + shortcut). Call it in training mode, and if `ghost_norm.can_fuse` is True."""
        return self._at_once(input, self._count_ghosts(input), shortcut, relu=True)

    def _count_ghosts(self, input: Tensor) -> int:
        samples = len(input)
        ghost = min(self.ghost_batch, samples)
        if samples == 0 or samples % ghost:
            raise ValueError(
                f"a micro-batch of {samples} samples is not a sequence of whole ghost batches of {self.ghost_batch}"
            )
        return samples // ghost

    def _is_looped(self, input: Tensor, ghosts: int) -> bool:
        # On an accelerator a loop would launch kernels for each ghost batch. On the CPU torch's batch-norm kernel in a
        # loop is faster than a sequence of operations on all ghost batches. The meta device takes the CPU's path,
        # because its passes measure the memory that the CPU needs.
        return input.device.type in ("cpu", "meta") or (ghosts == 1 and not is_faster_for_single_ghost(input))

    def _one_by_one(self, input: Tensor, ghosts: int) -> tuple[Tensor, Tensor]:
        """Return the output, and the (2, C) sums of the ghost batches' means and unbiased variances."""
        # The backward pass of `split` copies, even if there is only one part.
        parts = (input,) if ghosts == 1 else torch.split(input, len(input) // ghosts)
        rows = self.ghost_sums.new_zeros(len(parts), 2, self.num_features)
        outputs = [self._single(part, *row) for part, row in zip(parts, rows.unbind(), strict=True)]
        if len(parts) == 1:
            return outputs[0], rows[0]
        return torch.cat(outputs), rows.sum(0)

    def _single(self, input: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Return the output of one ghost batch, and write its statistics into `mean` and `variance`, which are 0."""
        return functional.batch_norm(
            input, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps
        )

    def _at_once(self, input: Tensor, ghosts: int, shortcut: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """Compute all ghost batches with a number of operations that does not depend on `ghosts`."""
        if input.shape[1] != self.num_features:  # the kernels do not check the sizes of memory
            raise ValueError(f"an input of {input.shape[1]} channels; this layer has {self.num_features}")
        totals = (self.ghost_sums, self.ghost_samples)
        # The kernels need both parameters or none.
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if weight is not None and bias is None:
            bias = torch.zeros_like(weight, requires_grad=False)
        return ghost_norm(
            input,
            weight,
            bias,
            ghosts=ghosts,
            eps=self.eps,
            shortcut=shortcut,
            relu=relu,
            totals=totals,
        )

    def extra_repr(self) -> str:
        """Return the settings, for the layer's repr."""
        return f"{self.num_features}, ghost_batch={self.ghost_batch}, eps={self.eps}, momentum={self.momentum}"


class RunningStatistics:
    """Updates a model's running statistics, once per update, from the accumulated statistics of its ghost batches.

    For each `GhostBatchNorm2d` that is not frozen, ``running = (1 - momentum) * running + momentum * mean``. For
    `running_mean`, `mean` is the average of the ghost batches' means; for `running_var`, of their unbiased variances.
    The averages are over all samples since the last update, on all ranks.

    Args:
        model: its layers of ghost batch norm are found once.
        collected: the caller calls `collect` after each micro-batch. That takes fewer operations, because it adds the
            statistics of single ghost batches for all layers at once.
    """

    def __init__(self, model: nn.Module, *, collected: bool = False) -> None:
        layers = (layer for layer in model.modules() if isinstance(layer, GhostBatchNorm2d))
        self._layers = [layer for layer in layers if not layer.is_frozen]
        for layer in self._layers:
            layer.collected = collected
        self._cache_tensors()

    def _cache_tensors(self) -> None:
        # Attribute lookup on modules is slow compared with an update of a small network, which takes a few ms.
        layers = self._layers
        self._sums = [layer.ghost_sums for layer in layers]
        # `data` has its own version counter. Otherwise a change before the backward pass would be an error, because
        # autograd saves the running statistics of batch norm, which that pass does not read in training mode.
        self._moments = [layer.ghost_moments.data for layer in layers]
        self._samples = [layer.ghost_samples for layer in layers]
        self._running = [t for layer in layers for t in _running(layer)]
        self._sizes = [t.numel() for t in self._running]
        self._momenta = [m for layer in layers for m in [layer.momentum or 0.0] * 2]
        self._updates = [t for layer in layers if (t := layer.num_batches_tracked) is not None]

    def collect(self) -> None:
        """Add the statistics that wait in the layers to their sums. `update` does so, too."""
        waiting = [layer.waiting for layer in self._layers]
        if not any(waiting):
            return
        self._refresh()
        for samples in set(waiting) - {0}:
            found = [number for number, count in enumerate(waiting) if count == samples]
            sums, counts, moments = (
                [tensors[n] for n in found] for tensors in (self._sums, self._samples, self._moments)
            )
            torch._foreach_add_(sums, moments, alpha=samples)
            torch._foreach_add_(counts, samples)
            torch._foreach_zero_(moments)
        for layer in self._layers:
            layer.waiting = 0

    def _refresh(self) -> None:
        if self._layers[0].running_mean is not self._running[0]:  # the model was moved, or its tensors were replaced
            self._cache_tensors()

    def update(self, all_reduce: Callable[[Tensor], None] | None = None, also: Tensor | None = None) -> Tensor | None:
        """Update the running statistics and clear the sums. Return the tensor `also`, summed over the ranks.

        A layer that had no samples on any rank keeps its running statistics.

        Args:
            all_reduce: replaces a 1-D tensor by its sum over the ranks, in place. It is called once on every rank,
                also on a rank without samples. None for a single rank.
            also: a 1-D tensor to sum in the same collective.
        """
        layers = self._layers
        if not layers:
            if all_reduce is not None and also is not None:
                all_reduce(also)
            return also
        self._refresh()
        self.collect()
        sums, samples = self._sums, self._samples
        others = [] if also is None else [also.to(sums[0].dtype)]
        flat = torch.cat([*others, *(t.flatten() for t in (*sums, *samples))])
        if all_reduce is not None:
            all_reduce(flat)
        if also is not None:
            also, flat = flat[: len(also)], flat[len(also) :]
        # One count per value, because the layers of a model may have seen different numbers of samples.
        counts = torch.cat(
            [
                count.expand(total.numel())
                for count, total in zip(torch.split(flat[-len(layers) :], 1), sums, strict=True)
            ]
        )
        means = torch.where(counts > 0, flat[: -len(layers)] / counts, torch.cat(self._running))
        torch._foreach_lerp_(self._running, torch.split(means, self._sizes), self._momenta)
        torch._foreach_add_(self._updates, 1)
        torch._foreach_zero_([*sums, *samples])
        return also


def _running(layer: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var
