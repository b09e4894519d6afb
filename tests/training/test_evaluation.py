"""Evaluation counts every sample exactly once, at any world size and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import hflip

from lars_train.data.loading.loader import BadSample, Batch, EvalSpec
from lars_train.data.order import checksum
from lars_train.data.transforms import View
from lars_train.errors import DataError
from lars_train.launch import Ranks
from lars_train.monitoring.progress import Progress
from lars_train.training import evaluation
from lars_train.training.device import Precision
from lars_train.training.device_prefetch import RankContext
from lars_train.training.distributed import Group
from lars_train.training.evaluation import Result, evaluate, evaluate_split

CPU = torch.device("cpu")
FP64 = Precision("fp64", torch.float64, torch.float64)
SIZE = 6


@dataclass
class NoiseSource:
    """A source in memory: noise with random labels; the samples in `bad` cannot be read."""

    count: int
    classes: int
    bad: tuple[int, ...] = ()
    labels: npt.NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.count)
        self.labels = draw.integers(0, self.classes, self.count).astype(np.int32)
        self.pixels = draw.integers(0, 256, (self.count, SIZE, SIZE, 3)).astype(np.uint8)

    def __len__(self) -> int:
        return self.count

    def name(self, sample: int) -> str:
        return f"{sample}.png"

    def location(self, sample: int) -> str:
        return f"/val/{sample}.png"

    def read(self, sample: int) -> npt.NDArray[np.uint8]:
        if sample in self.bad:
            raise OSError("read error")
        image: npt.NDArray[np.uint8] = self.pixels[sample]
        return image


@dataclass(frozen=True)
class TwoPassGroup(Group):
    """A fake group for ranks that run one after the other, twice.

    In the first pass, `inputs` records what the rank passes to the collectives. In the second pass, `all_inputs` has
    the inputs of all ranks, and the collectives return their results.
    """

    inputs: list[Any] = field(default_factory=list)
    all_inputs: list[list[Any]] = field(default_factory=list)

    def all_reduce_sum(self, values: Tensor) -> None:
        together = self.all_gather(values.clone())
        values.copy_(torch.stack(together).sum(0))

    def all_gather(self, value: Any) -> list[Any]:
        self.inputs.append(value)
        return [part[len(self.inputs) - 1] for part in self.all_inputs] or [value]


def on_ranks(world: int, work: Callable[[Group], Result]) -> list[Result]:
    """Return the result of `work` on each of `world` ranks."""
    first = [TwoPassGroup(Ranks(rank, world)) for rank in range(world)]
    for group in first:
        with suppress(ZeroDivisionError, RuntimeError):  # a rank without samples, in the first pass
            work(group)
    all_inputs = [group.inputs for group in first]
    return [work(TwoPassGroup(Ranks(rank, world), all_inputs=all_inputs)) for rank in range(world)]


def network(classes: int) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, classes)).double()


def context(group: Group) -> RankContext:
    return RankContext(CPU, group, FP64, lambda images: images.double() / 255)


def split_result(
    source: NoiseSource, model: nn.Module, world: int = 1, batch: int = 64, **options: Any
) -> list[Result]:
    return on_ranks(
        world,
        lambda group: evaluate_split(
            model,
            EvalSpec(
                source=source,
                view=View("none", SIZE, False, 0, 1.0),
                micro_batch=batch,
                rank=group.ranks.rank,
                world=world,
                workers=0,
                pin_memory=False,
            ),
            context(group),
            Progress(shown=False, epochs=1),
            **options,
        ),
    )


def plain_loop(source: NoiseSource, model: nn.Sequential) -> tuple[float, float, float]:
    """Return top-1 and top-5 in percent, and the mean loss, computed image by image in numpy."""
    layer = model[1]
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    top1 = top5 = 0
    losses = []
    for sample in range(len(source)):
        if sample in source.bad:
            continue
        x = source.pixels[sample].astype(np.float64).transpose(2, 0, 1).ravel() / 255
        logits = weight @ x + bias
        label = source.labels[sample]
        rank = int((logits > logits[label]).sum())
        top1 += rank < 1
        top5 += rank < 5
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])
    return 100 * top1 / len(source), 100 * top5 / len(source), float(np.mean(losses))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 131])
def test_every_sample_counts_once_at_any_world_size(world: int, count: int) -> None:
    source, model = NoiseSource(count, 7), network(7)
    top1, top5, loss = plain_loop(source, model)
    for result in split_result(source, model, world):
        assert (result.count, result.decoded, result.bad) == (count, count, ())
        assert result.top1 == pytest.approx(top1)
        assert result.top5 == pytest.approx(top5)
        assert result.loss == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("batch", [1, 65, 1000])
def test_the_batch_changes_nothing(batch: int) -> None:
    source, model = NoiseSource(130, 7), network(7)
    top1, top5, loss = plain_loop(source, model)
    (result,) = split_result(source, model, batch=batch)
    assert (result.top1, result.top5) == pytest.approx((top1, top5))
    assert result.loss == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("world", [1, 4])
def test_a_bad_image_counts_as_wrong_but_not_in_the_loss(world: int) -> None:
    source, model = NoiseSource(70, 7, bad=(0, 33, 34, 69)), network(7)
    top1, top5, loss = plain_loop(source, model)
    for result in split_result(source, model, world):
        assert (result.count, result.decoded) == (70, 66)
        assert (result.top1, result.top5) == pytest.approx((top1, top5))
        assert result.loss == pytest.approx(loss, rel=1e-12)
        assert [(b.sample, b.where, b.reason) for b in result.bad] == [
            (s, f"/val/{s}.png", "read error") for s in source.bad
        ]
        assert result.values()["val/bad_images"] == 4


@pytest.mark.parametrize(("world", "batch"), [(1, 64), (3, 8)])
def test_flip_evaluates_the_mean_logits_of_image_and_mirror(world: int, batch: int) -> None:
    source, model = NoiseSource(70, 7, bad=(0, 33)), network(7)
    kept = [sample for sample in range(70) if sample not in source.bad]
    images = torch.from_numpy(source.pixels[kept]).permute(0, 3, 1, 2).double() / 255
    with torch.no_grad():
        logits = (model(images) + model(hflip(images))) / 2
    labels = torch.from_numpy(source.labels[kept]).long()
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    for result in split_result(source, model, world, batch, flip=True, classes=7):
        assert (result.count, result.decoded, len(result.bad)) == (70, 68, 2)
        assert result.top1 == pytest.approx(100 * int((ranks < 1).sum()) / 70)
        assert result.top5 == pytest.approx(100 * int((ranks < 5).sum()) / 70)
        assert result.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-12)
        assert result.confusion is not None
        assert int(result.confusion.trace()) == int((ranks < 1).sum())
    (plain,) = split_result(source, model)
    assert plain.loss != pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-3)


def test_images_that_are_all_bad_give_no_result() -> None:
    with pytest.raises(DataError, match=r"none of the 3 validation images can be decoded \(/val/0\.png: read error\)"):
        split_result(NoiseSource(3, 7, bad=(0, 1, 2)), network(7))


def test_top5_of_fewer_than_five_classes_is_over_all() -> None:
    source, model = NoiseSource(40, 3, bad=(7,)), network(3)
    (result,) = split_result(source, model)
    assert result.top1 == pytest.approx(plain_loop(source, model)[0])
    assert result.top5 == pytest.approx(100 * 39 / 40)


def test_the_model_stays_unchanged() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(64, 7)).double()
    frozen = {k: v.clone() for k, v in model.state_dict().items()}
    source = NoiseSource(9, 7)
    for training in (True, False):
        model.train(training)
        first, second = (split_result(source, model)[0] for _ in range(2))
        assert first == second  # dropout was off
        assert model.training is training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in frozen.items())
    # Inference mode has ended: the parameters still get gradients.
    model.train()
    model(torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float64)).sum().backward()


def test_low_precision_logits_are_scored_in_float32() -> None:
    # In bfloat16 the loss of a confident prediction would be rounded to 0.
    logits = torch.zeros(1, 2, dtype=torch.bfloat16)
    logits[0, 1] = -9.0

    class ConstantLogits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits.expand(len(x), 2)

    seen: list[int] = []
    batches = [Batch(torch.zeros(n, 3, 2, 2, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), ()) for n in (3, 2)]
    result = evaluate(ConstantLogits(), batches, context(Group(Ranks())), on_batch=seen.append)
    assert result.loss == pytest.approx(float(np.log1p(np.exp(-9.0))), rel=1e-3)
    assert result.loss > 0
    assert seen == [3, 2]


def test_values_have_the_names_of_the_log() -> None:
    result = Result(50.0, 75.0, 1.25, 8, 7, (BadSample(1, "x", "y"),))
    assert result.values() == {
        "val/top1": 50.0,
        "val/top5": 75.0,
        "val/loss": 1.25,
        "val/count": 8,
        "val/checksum": 0,
        "val/bad_images": 1,
    }


@pytest.mark.parametrize("world", [1, 3, 40])
def test_the_checksum_covers_every_sample_once(world: int) -> None:
    source = NoiseSource(23, 7)
    expected = checksum(np.arange(23))
    results = split_result(source, network(7), world=world, batch=5)
    assert [result.checksum for result in results] == [expected] * world


def test_repeated_or_missing_samples_end_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    # One sample twice and one missing: the count alone is right.
    whole = evaluation.eval_loader

    def twice(*arguments: Any, **keywords: Any) -> Iterator[Batch]:
        batches = list(whole(*arguments, **keywords))
        yield from [*batches[:-1], batches[0]]

    monkeypatch.setattr(evaluation, "eval_loader", lambda *a, **k: twice(*a, **k))
    with pytest.raises(RuntimeError, match="the evaluation counted 24 samples with the checksum"):
        split_result(NoiseSource(24, 7), network(7), batch=4)


def test_checksums_differ_for_different_samples_and_add_up() -> None:
    seen = {checksum(np.array(part)) for part in ([], [0], [1], [0, 1], [0, 0], [2], [1, 2], [0, 3], [1_281_166])}
    assert len(seen) == 9
    parts = checksum(np.arange(0, 500)) + checksum(np.arange(500, 1000))
    assert parts % 2**32 == checksum(np.random.default_rng(0).permutation(1000))


@pytest.mark.parametrize("world", [1, 3])
def test_the_confusion_matrix_counts_every_sample(world: int) -> None:
    source, model = NoiseSource(23, 4, bad=(5,)), network(4)
    weight, bias = (p.detach().numpy() for p in model[1].parameters())
    expected = np.zeros((4, 4), np.int64)
    for sample in set(range(23)) - {5}:
        x = source.pixels[sample].astype(np.float64).transpose(2, 0, 1).ravel() / 255
        expected[source.labels[sample], int((weight @ x + bias).argmax())] += 1
    for result in split_result(source, model, world, batch=7, classes=4):
        assert result.confusion is not None
        assert result.confusion.numpy().tolist() == expected.tolist()
        assert result.top1 == pytest.approx(100 * expected.trace() / 23)
