"""Make the updates of a run: forward, backward, sum over the ranks, optimizer step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars_train.data.loading.loader import BadSample, Batch
from lars_train.data.mixing import mix_in_place
from lars_train.models.batchnorm import RunningStatistics
from lars_train.models.cuda_graphs import GraphedPass, Recorder
from lars_train.models.ema import ExponentialMovingAverage
from lars_train.models.losses import MixedLabels, TrainingLoss
from lars_train.run_plan import Plan
from lars_train.training.device_prefetch import RankContext
from lars_train.training.distributed import NONE, GradientBuckets, Group, wrap_in_ddp
from lars_train.training.guard import Divergence, Guard
from lars_train.training.metrics import LR_FACTOR, FirstGradient, Measures, noise_terms
from lars_train.training.resolve import compile_network


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of the loop."""

    schedule: Callable[[int], float]
    """Maps an update's number, counted from 0, to its learning rate."""
    loss: TrainingLoss
    max_loss: float | None = None
    """See `Guard`."""
    clip_grad_norm: float | None = None
    """The largest norm of an update's gradient, before LARS; None for no limit."""
    seed: int | None = None
    """The seed of the random numbers that the network draws in training; None if it draws none."""


class Meter:
    """Sums since the last log line: loss, correct predictions, samples, and newly found bad images.

    The sums stay on the device, in float64, until a log line reads them.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._loss, self._hits, *_ = self._sums.unbind()
        self._samples = self._bad = 0

    @property
    def sums(self) -> Tensor:
        """The four sums, float64 (4,) on the device."""
        if self._samples or self._bad:
            self._sums[2] += self._samples
            self._sums[3] += self._bad
            self._samples = self._bad = 0
        return self._sums

    def add(self, loss_sum: Tensor, logits: Tensor, labels: Tensor, bad: int) -> None:
        """Count a micro-batch: `logits` (n, classes), `labels` int64 (n,), `loss_sum` a scalar."""
        with torch.no_grad():
            self._loss += loss_sum
            self._hits += (logits.argmax(dim=1) == labels).sum()
        self._samples += len(labels)
        self._bad += bad

    def total(self, group: Group) -> Tensor:
        """Return the sums over all ranks. Rank 0 keeps the totals, and the other ranks restart at zero. Collective."""
        group.all_reduce_sum(self.sums)
        total = self.sums.clone()
        if not group.first:
            self.sums.zero_()
        return total

    def take_bad(self, group: Group) -> bool:
        """Return True if the sums include newly found bad images, and set their number to 0. Collective.

        Call `total` first, which adds the other ranks' sums to those of rank 0.
        """
        found: bool = group.broadcast_from_rank0(bool(self.sums[3]))
        self.sums[3] = 0
        return found


class Trainer:
    """The model, the optimizer and the position of a run, which `run_update` advances by one update.

    Checkpoints and evaluations use `network`. `forward` is the same network, compiled if `compiled`, and inside DDP if
    there are several ranks and no `recorder`, which records forward and backward passes (`GraphedPass`).
    `ema`: the average of the network's weights, if any. `bucket_mb`, `compression`: see `wrap_in_ddp`.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        plan: Plan,
        hyper: Hyper,
        context: RankContext,
        *,
        ema: ExponentialMovingAverage | None = None,
        compiled: bool = False,
        recorder: Recorder | None = None,
        bucket_mb: float = 25.0,
        compression: str = NONE,
    ) -> None:
        self.network, self.optimizer, self.plan, self.hyper = network, optimizer, plan, hyper
        self.device, self.group = context.device, context.group
        self.precision, self.normalize = context.precision, context.normalize
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.scales_loss)
        self.running_statistics = RunningStatistics(network, collected=True)
        self.ema = ema
        self.meter = Meter(self.device)
        self.first_gradient = FirstGradient(network)
        self.guard = Guard(hyper.max_loss)
        self.update = 0
        self.skipped = 0
        """The number of global batches that made no update. The next global batch has number `update` + `skipped`."""
        self.forward: Any = compile_network(network) if compiled else network
        self.graphed = self.buckets = None
        if recorder is not None:
            self.graphed = GraphedPass(self._pass, self.first_gradient.parameters, recorder)
            if self.group.ranks.world > 1:
                self.buckets = GradientBuckets(network, bucket_mb=bucket_mb, compression=compression)
        elif self.group.ranks.world > 1:
            self.forward = wrap_in_ddp(self.forward, self.device, bucket_mb=bucket_mb, compression=compression)

    def run_update(self, batches: Iterator[Batch], micro_batches: int, *, measure: bool) -> UpdateInfo:
        """Make one update from this rank's next `micro_batches` of `batches`. Collective.

        The gradient is the sum of the samples' gradients over all ranks, divided by the global batch. Ranks may have
        different numbers of samples. With `measure`, also compute the norms for the log. If float16's loss scale is too
        high, the batch is skipped without an update, and `UpdateInfo.made` is False.

        Raises `Diverged` if too many batches in a row are skipped; see `Guard.skip`.
        """
        info = UpdateInfo(self.hyper.schedule(self.update))
        loss: Tensor | None = None
        _set_lr(self.optimizer, info.lr)
        if self.hyper.seed is not None:
            _seed_draws(self.hyper.seed, self.update + self.skipped, self.group.ranks.rank)
        for k in range(micro_batches):
            started = time.perf_counter()
            batch = next(batches)
            info.waited += time.perf_counter() - started
            info.bad.extend(batch.bad)
            first_of_several = k == 0 and micro_batches * self.group.ranks.world > 1
            with (
                self._synchronize_gradients_if(k == micro_batches - 1),
                self._first_gradient(info, len(batch.labels)) if measure and first_of_several else nullcontext(),
            ):
                part = self._forward_backward(batch)
            loss = part if loss is None else loss + part
        if self.buckets is not None:
            self.buckets.average()
        if loss is None:
            loss = torch.zeros((), dtype=self.precision.weights, device=self.device)
        total = self.running_statistics.update(
            self.group.all_reduce_sum if self.group.ranks.world > 1 else None, also=loss.reshape(1)
        )
        self.scaler.unscale_(self.optimizer)
        if measure:
            info.measures = Measures.before_step(self.network)
        if self.hyper.clip_grad_norm is not None:
            # The host does not wait: the factor stays on the device. In float16, a non-finite norm skips the step.
            nn.utils.clip_grad_norm_(self.network.parameters(), self.hyper.clip_grad_norm)
        info.made = self._step()
        if info.measures is not None:
            info.measures.after_step()
        self.optimizer.zero_grad(set_to_none=self.graphed is None)
        if info.made:
            if self.ema is not None:
                self.ema.update(self.update)
            self.update += 1
            assert total is not None
            self.guard.watch(self.update, total / self.plan.global_batch, self.optimizer)
        else:
            self.skipped += 1
            self.guard.skip(self.update)
        return info

    def _step(self) -> bool:
        scales = self.precision.scales_loss
        # In float16 the host waits for the device twice: for the gradients, and for the step and the new scale.
        scale = self.scaler.get_scale() if scales else 0.0
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return not scales or self.scaler.get_scale() >= scale

    def divergence(self) -> Divergence | None:
        """Return the first update whose loss was above the limit or not finite. The host waits for the device."""
        return self.guard.found(self.network, lambda update: self.hyper.schedule(update - 1))

    def _forward_backward(self, batch: Batch) -> Tensor:
        images, labels = self.normalize(batch.images), batch.labels.to(self.device, non_blocking=True)
        mixed = mix_in_place(images, labels, batch.mixes) if batch.mixes else None
        loss, logits = (self.graphed or self._pass)(images, *(mixed or (labels,)))
        self.meter.add(loss, logits, mixed.main() if mixed else labels, len(batch.bad))
        return loss.detach()

    def _pass(self, images: Tensor, labels: Tensor, *mix: Tensor) -> tuple[Tensor, Tensor]:
        """Add to the gradients, and return loss and logits. `labels`, `mix`: the fields of `MixedLabels`, or labels."""
        with self.precision.autocast(self.device):
            logits = self.forward(images)
        logits = logits.to(self.precision.weights)
        loss = self.hyper.loss(logits, MixedLabels(labels, *mix) if mix else labels)
        # Gradients are averaged over ranks. The factor turns the average into the sum over ranks divided by the batch.
        mean = loss * (self.group.ranks.world / self.plan.global_batch)
        torch.autograd.backward(self.scaler.scale(mean))
        self.running_statistics.collect()
        return loss, logits

    def _synchronize_gradients_if(self, is_last: bool) -> AbstractContextManager[None]:
        if is_last or self.group.ranks.world == 1 or self.buckets is not None:
            return nullcontext()
        no_sync: AbstractContextManager[None] = self.forward.no_sync()
        return no_sync

    @contextmanager
    def _first_gradient(self, info: UpdateInfo, samples: int) -> Iterator[None]:
        norms: list[Tensor] = []
        with self.first_gradient.recording(norms) if self.graphed is None else nullcontext():
            yield
        if self.graphed is not None:
            # A graph calls no hooks. The gradients are still those of this rank's micro-batch alone.
            for parameter in self.first_gradient.parameters:
                self.first_gradient.take(parameter, norms)
        # Undo the factor of `_forward_backward`, to get the mean over these samples. float16's scale is on the device.
        scale = self.scaler.scale(torch.ones((), dtype=torch.float64, device=self.device))
        factor = self.plan.global_batch / (self.group.ranks.world * samples) / scale
        info.noise_terms = noise_terms(norms, factor, samples)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain values and tensors. Collective."""
        self.meter.total(self.group)
        return {
            "update": self.update,
            "skipped": self.skipped,
            "model": self.network.state_dict(),
            **({} if self.ema is None else {"ema": self.ema.network.state_dict()}),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "meter": self.meter.sums.clone(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from the return value of `state`."""
        self.network.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.restore(state)
        # Load the optimizer's state but keep this run's settings. Settings that are tensors must stay the same objects.
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict({k: v for k, v in state["optimizer"].items() if k != "lars"})
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.scaler.load_state_dict(state["scaler"])
        self.update, self.skipped = state["update"], state["skipped"]
        self.guard.reset()
        self.meter.sums.zero_()
        if self.group.first:
            self.meter.sums.copy_(state["meter"])


def _set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        own = lr * group.get(LR_FACTOR, 1.0)
        if isinstance(group["lr"], Tensor):
            # Fill in place, because a CUDA graph reads this tensor at each replay. The host does not wait.
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def _seed_draws(seed: int, batch: int, rank: int) -> None:
    """Seed torch's generators on all devices for one global batch, so that a resumed run repeats its random numbers."""
    torch.manual_seed(int(np.random.SeedSequence((seed, batch, rank)).generate_state(1, np.uint64)[0]))


@dataclass
class UpdateInfo:
    """The outcome of one update."""

    lr: float
    made: bool = True
    """False if float16's loss scale was too high for a step."""
    waited: float = 0.0
    """Seconds that the update waited for batches."""
    bad: list[BadSample] = field(default_factory=list)
    measures: Measures | None = None
    """None if the update was not measured."""
    noise_terms: Tensor | None = None
    """See `metrics.noise_terms`; None if not measured, or if the first micro-batch is the whole global batch."""
