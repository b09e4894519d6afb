"""Training steps to measure: of lars-train, of bare loops, and of timm. The help of bench_step.py describes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import shared
import torch
from torch import Tensor, nn
from torch.nn import functional

from lars_train.config import Config
from lars_train.data.loading.loader import Batch, Stream
from lars_train.launch import Ranks
from lars_train.models.fused_blocks import without_fusing
from lars_train.networks import make_network
from lars_train.run_plan import make_plan, make_schedule
from lars_train.training.assemble import build_optimizer, build_trainer
from lars_train.training.device import Precision, choose_precision
from lars_train.training.device_prefetch import DevicePrefetcher, RankContext, normalizer
from lars_train.training.distributed import Group

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BARE, TIMM, BEST, BEST_EAGER = "(a) bare, fp32 NCHW", "(b) timm", "(c) best bare, compiled", "(c) best bare, eager"
OURS, TUNED, WITHOUT = "(d) lars-train", "(d) lars-train, compiled", "(d) without the trainer"
UNFUSED, GRAPHS = "(d) lars-train, unfused", "(d) lars-train, graphs"
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A network, by its name in torchvision and timm, and a micro-batch of `images` in ghost batches of `ghost`."""

    name: str
    images: int
    size: int
    classes: int
    ghost: int = 0
    device: torch.device = CPU


CASES = {
    # 16 images are what fits into 24 GiB with all contenders; 256 are the smallest global batch of the recipes.
    "cpu": (Case("resnet50", 16, 224, 1000), Case("small", 256, 32, 10)),
    # The largest micro-batch that lars-train chooses.
    "cuda": (Case("resnet50", 256, 224, 1000, device=CUDA), Case("small", 256, 32, 10, device=CUDA)),
}


def pixels(case: Case) -> tuple[Tensor, Tensor]:
    """Return uint8 images in channels-last memory, and their labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (case.images, case.size, case.size, 3), dtype=torch.uint8, generator=generator)
    return images.permute(0, 3, 1, 2), torch.randint(0, case.classes, (case.images,), generator=generator)


def normalized(case: Case, kind: Precision) -> tuple[Tensor, Tensor]:
    """Return normalized images in channels-last memory, and labels, on the device."""
    images, labels = pixels(case)
    return normalizer(MEAN, STD, case.device, kind)(images), labels.to(case.device)


def plain_network(case: Case) -> nn.Module:
    """Return the network with torch's batch norm, for bare loops."""
    if case.name.startswith("resnet"):
        from torchvision.models import get_model

        model: nn.Module = get_model(case.name, weights=None, num_classes=case.classes)
        return model.to(case.device).train()
    from lars_train.models.resnet_cifar import CifarResNet

    return CifarResNet(1, num_classes=case.classes).to(case.device).train()


def plain_sgd(model: nn.Module, **options: bool) -> torch.optim.SGD:
    """Return the optimizer of the bare loops."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, **options)


def bare(case: Case) -> Step:
    """Return contender (a)."""
    model = plain_network(case)
    optimizer = plain_sgd(model)
    images, labels = normalized(case, choose_precision("fp32", case.device))
    images = images.contiguous()

    def step() -> None:
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def of_timm(case: Case) -> Step:
    """Return contender (b).

    Raises:
        LookupError: timm does not have the network.
    """
    timm, losses, optimizers, utilities = (
        importlib.import_module(name) for name in ("timm", "timm.loss", "timm.optim", "timm.utils")
    )
    if not case.name.startswith("resnet"):
        raise LookupError("timm has no such network")
    model = timm.create_model(case.name, num_classes=case.classes).train()
    model = model.to(case.device, memory_format=torch.channels_last)
    optimizer = optimizers.create_optimizer_v2(model, opt="sgd", lr=1e-3, momentum=0.9, weight_decay=1e-4)
    loss_of, meter = losses.LabelSmoothingCrossEntropy(0.1), utilities.AverageMeter()
    kind = choose_precision("auto", case.device)
    images, labels = normalized(case, choose_precision("fp32", case.device))

    def step() -> None:
        with kind.autocast(case.device):
            loss = loss_of(model(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        meter.update(loss.item(), len(images))

    return step


def best(case: Case, compiled: bool) -> Step:
    """Return contender (c)."""
    model = plain_network(case).to(memory_format=torch.channels_last)
    forward = torch.compile(model) if compiled else model
    optimizer = plain_sgd(model, fused=True)
    kind = choose_precision("auto", case.device)
    images, labels = normalized(case, kind)

    def step() -> None:
        with kind.autocast(case.device):
            logits = forward(images)
        torch.autograd.backward(functional.cross_entropy(logits.float(), labels))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def config_of(case: Case, compiled: bool = False, graphs: bool = False) -> Config:
    """Return the config of a run with LARS, of a million updates."""
    data = f"data=synthetic data.num_classes={case.classes} data.image_size={case.size} data.train_count={case.images}"
    model = f"model={case.name} model.ghost_batch={case.ghost} batch.size={case.images} compile={compiled}"
    return shared.compose(f"{data} {model} cuda_graphs={graphs} epochs=1000000 optimizer.lr=1".split())


def network_of(case: Case, config: Config) -> nn.Module:
    """Return lars-train's network, with ghost batch norm."""
    torch.manual_seed(0)
    network = make_network(config, case.classes)
    return network.to(case.device).to(memory_format=torch.channels_last).train()


class SameBatch(Stream):
    """A stream that returns the same batch every time."""

    def __init__(self, batch: Batch) -> None:
        self._same = batch

    def __next__(self) -> Batch:
        return self._same

    def ready(self) -> bool:
        return True


def ours(case: Case, compiled: bool = False, graphs: bool = False) -> Step:
    """Return contender (d): the update of a run's trainer."""
    config = config_of(case, compiled, graphs)
    plan = make_plan(config, case.images)
    context = RankContext.from_config(config, case.device, Group(Ranks()), choose_precision("auto", case.device))
    trainer = build_trainer(config, plan, network_of(case, config), make_schedule(plan, config), context)
    images, labels = pixels(case)
    if case.device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    batches = DevicePrefetcher(SameBatch(Batch(images, labels, ())), case.device)

    def step() -> None:
        trainer.run_update(batches, 1, measure=False)

    return step


def unfused(case: Case) -> Step:
    """Return contender (d) with batch norm, ReLU and the sum with the shortcut as separate operations."""
    update = ours(case)

    def step() -> None:
        with without_fusing():
            update()

    return step


def without_trainer(case: Case) -> Step:
    """Return (d) without the trainer: no schedule, guard, meters, running statistics or counters."""
    config, kind = config_of(case), choose_precision("auto", case.device)
    model = network_of(case, config)
    optimizer = build_optimizer(config.optimizer, model)
    normalize = normalizer(MEAN, STD, case.device, kind)
    images, labels = (tensor.to(case.device) for tensor in pixels(case))

    def step() -> None:
        with kind.autocast(case.device):
            logits = model(normalize(images))
        torch.autograd.backward(functional.cross_entropy(logits.to(kind.weights), labels))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


STEPS: dict[str, Callable[[Case], Step]] = {
    BARE: bare,
    TIMM: of_timm,
    BEST_EAGER: lambda case: best(case, compiled=False),
    BEST: lambda case: best(case, compiled=True),
    OURS: ours,
    UNFUSED: unfused,
    GRAPHS: lambda case: ours(case, graphs=True),
    TUNED: lambda case: ours(case, compiled=True),
    WITHOUT: without_trainer,
}
