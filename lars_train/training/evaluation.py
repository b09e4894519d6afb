"""Evaluate a network, counting every validation sample exactly once at any world size and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lars_train.data.loading.loader import BadSample, Batch, EvalSpec, eval_loader
from lars_train.data.order import checksum
from lars_train.errors import DataError
from lars_train.monitoring.progress import Progress
from lars_train.training.device_prefetch import DevicePrefetcher, RankContext

# Evaluation keeps no activations, so a smaller micro-batch would only waste time.
SMALLEST_BATCH = 64


def evaluation_batch(micro_batch: int) -> int:
    """Return the micro-batch for evaluations in a run that trains with `micro_batch`."""
    return max(micro_batch, SMALLEST_BATCH)


@dataclass(frozen=True)
class Result:
    """The result of an evaluation.

    `top1` and `top5` are in percent of all `count` samples; `loss` is the mean over the `decoded` samples. A sample
    that cannot be decoded counts as wrong and is listed in `bad`.
    """

    top1: float
    top5: float
    loss: float
    count: int
    decoded: int
    bad: tuple[BadSample, ...]
    checksum: int = 0
    """`order.checksum` of the counted samples."""
    confusion: Tensor | None = None
    """int64 (C, C): the number of decoded samples of class i that were classified as j; None if not requested."""
    average: Result | None = None
    """The result of the averaged weights on the same samples; None without ``model.ema``."""

    @property
    def reported(self) -> Result:
        """The result to report for the run: that of the averaged weights if they exist, else of the weights."""
        return self.average or self

    def values(self) -> dict[str, float]:
        """Return the values by their names in the log."""
        other = self.average
        averages = {} if other is None else {"top1": other.top1, "top5": other.top5, "loss": other.loss}
        return {
            "val/top1": self.top1,
            "val/top5": self.top5,
            "val/loss": self.loss,
            **{f"val/ema_{name}": value for name, value in averages.items()},
            "val/count": self.count,
            "val/checksum": self.checksum,
            "val/bad_images": self.count - self.decoded,
        }


def evaluate_split(
    model: nn.Module,
    spec: EvalSpec,
    context: RankContext,
    progress: Progress,
    *,
    ended: Callable[[], bool] = lambda: False,
    classes: int | None = None,
    flip: bool = False,
    average: nn.Module | None = None,
) -> Result | None:
    """Evaluate `model` on the split `spec.source`, of which each rank evaluates a part. Collective.

    `ended` is called before each batch; the result is None if it returned True on any rank. `classes`, `flip`,
    `average`: see `evaluate`.

    Raises `DataError` if no sample can be decoded, and `RuntimeError` unless every sample of the split was counted
    exactly once.
    """
    split, (start, stop) = spec.source, spec.bounds()
    batches = DevicePrefetcher(eval_loader(spec), context.device)
    with progress.counting("evaluation", stop - start) as on_batch, closing(batches):
        result = evaluate(
            model, batches, context, on_batch=on_batch, ended=ended, classes=classes, flip=flip, average=average
        )
    if result is None:
        return None
    if not result.decoded:
        first = f" ({result.bad[0].where}: {result.bad[0].reason})" if result.bad else ""
        raise DataError(f"none of the {result.count:,} validation images can be decoded{first}; fix the data set.")
    if (result.count, result.checksum) != (len(split), checksum(np.arange(len(split)))):
        raise RuntimeError(
            f"the evaluation counted {result.count:,} samples with the checksum {result.checksum}; the split has "
            f"{len(split):,} with the checksum {checksum(np.arange(len(split)))}"
        )
    return result


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    context: RankContext,
    *,
    on_batch: Callable[[int], None] = lambda count: None,
    ended: Callable[[], bool] = lambda: False,
    classes: int | None = None,
    flip: bool = False,
    average: nn.Module | None = None,
) -> Result | None:
    """Evaluate `model` on this rank's `batches` and sum the results over the ranks. Collective.

    `on_batch` is called with the size of each batch. `ended`: see `evaluate_split`. `classes`: the number of classes
    for a confusion matrix; None for no matrix. With fewer than 5 classes, top-5 counts all of them. `flip`: use the
    mean of the logits of an image and its mirror image. FFCV's lr_tta adds them, with the same top-1 (`val_loop` in
    https://github.com/libffcv/ffcv-imagenet/blob/main/train_imagenet.py). `average`: the network of the averaged
    weights, to evaluate on the same batches.
    """
    device, group = context.device, context.group
    was_training = model.training
    model.eval()
    networks = [model] if average is None else [model, average.eval()]
    # In float64, counts are exact up to 2^53, and sums of losses differ only by rounding between world sizes.
    totals = torch.zeros(len(networks), 5, dtype=torch.float64, device=device)
    # The last row counts the samples that cannot be decoded, which have the label -1.
    confusion = None if classes is None else torch.zeros((classes + 1) * classes, dtype=torch.int64, device=device)
    samples = 0
    bad: list[BadSample] = []
    stopped = False
    for batch in batches:
        stopped = ended()
        if stopped:
            break
        labels = batch.labels.to(device, non_blocking=True)
        with context.precision.autocast(device):
            images = context.normalize(batch.images)
            logits, *others = [_logits(network, images, flip) for network in networks]
        totals += torch.stack([_count(each, labels) for each in (logits, *others)])
        if confusion is not None and classes is not None:
            pairs = labels % (classes + 1) * classes + logits.argmax(dim=1)
            confusion.index_add_(0, pairs, torch.ones_like(pairs))
        bad.extend(batch.bad)
        samples += batch.checksum
        on_batch(len(labels))
    model.train(was_training)
    group.all_reduce_sum(totals)
    if confusion is not None:
        group.all_reduce_sum(confusion)
    found = group.all_gather((bad, samples, stopped))
    if any(part for _, _, part in found):
        return None
    everyone = [sample for part, _, _ in found for sample in part]
    counted = sum(part for _, part, _ in found) % 2**32
    first, *rest = [
        Result(100 * top1 / n, 100 * top5 / n, loss / max(decoded, 1), int(n), int(decoded), tuple(everyone), counted)
        for top1, top5, loss, n, decoded in totals.tolist()
    ]
    matrix = None if confusion is None or classes is None else confusion.view(-1, classes)[:classes].cpu()
    return replace(first, confusion=matrix, average=rest[0] if rest else None)


def _logits(model: nn.Module, images: Tensor, flip: bool) -> Tensor:
    """Return the logits of normalized `images` (n, 3, S, S) in float32, or in float64 if the model computes in it."""
    logits: Tensor = model(images)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits + model(images.flip(3))) / 2 if flip else logits


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    decoded = labels >= 0
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    count = torch.full_like(decoded.sum(), len(labels))
    columns = [hits[:, 0].sum(), hits.any(dim=1).sum(), loss.double().sum(), count, decoded.sum()]
    return torch.stack([column.double() for column in columns])
