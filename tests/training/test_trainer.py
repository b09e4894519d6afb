"""The trainer matches a plain loop in float64, for any micro-batch, and copies nothing to the host."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import Operations, computes
from tiny import COMPILED
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lars_train.config import Config, OptimizerConfig, ScheduleConfig
from lars_train.data.loading.loader import BadSample, Batch
from lars_train.data.mixing import GhostMix
from lars_train.launch import Ranks
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.ema import ExponentialMovingAverage
from lars_train.models.factory import build_model
from lars_train.models.losses import BCE, TrainingLoss
from lars_train.models.resnet_cifar import CifarResNet
from lars_train.monitoring.noise import estimates
from lars_train.optim import fused_sgd, rescale
from lars_train.optim.lars import LARS
from lars_train.preflight.devices import _OPERATIONS_OF_UPDATE
from lars_train.run_plan import Plan, make_schedule
from lars_train.training.assemble import build_optimizer
from lars_train.training.device import Precision, choose_precision
from lars_train.training.device_prefetch import RankContext, normalizer
from lars_train.training.distributed import Group
from lars_train.training.resolve import missing_tool
from lars_train.training.trainer import Hyper, Meter, Trainer

CPU = torch.device("cpu")
FP64 = Precision("fp64", torch.float64, torch.float64)
FP32 = Precision("fp32", torch.float32, torch.float32)
FP16 = Precision("fp16", torch.float32, torch.float16)
ALONE = Group(Ranks())
CLASSES, SIZE = 4, 16
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
UPDATES, WARMUP, LR, POWER = 8, 2, 3.0, 2.0
MOMENTUM, DECAY, EPS, TRUST, SMOOTHING = 0.9, 0.01, 1e-8, 0.01, 0.1


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plan(batch: int, ghost: int) -> Plan:
    return Plan(
        samples=4 * batch,
        nominal_batch=batch,
        global_batch=batch,
        ghost_batch=min(ghost, batch),
        scaled=False,
        raised=False,
        epochs=2,
        updates_per_epoch=4,
        updates=UPDATES,
        stop=UPDATES,
        warmup_updates=WARMUP,
    )


def global_batch(count: int, update: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(update)
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=draw)
    return images, torch.randint(0, CLASSES, (count,), generator=draw)


def micro_batches(images: Tensor, labels: Tensor, size: int) -> Iterator[Batch]:
    for part, answers in zip(torch.split(images, size), torch.split(labels, size), strict=True):
        yield Batch(part, answers, ())


def network(ghost: int) -> nn.Module:
    torch.manual_seed(1)
    return build_model("small", num_classes=CLASSES, ghost_batch=ghost, zero_gamma=False).double()


def tiny_network(ghost: int) -> nn.Module:
    """Return a small float32 network, for precisions that are slow on a CPU without hardware support."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4, bias=False),
        GhostBatchNorm2d(4, ghost_batch=ghost),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, CLASSES),
    )


def trainer(
    model: nn.Module,
    which: Plan,
    precision: Precision = FP64,
    name: str = "lars",
    lr: float = LR,
    loss: TrainingLoss = TrainingLoss(SMOOTHING),  # noqa: B008 - frozen
    **kwargs: Any,
) -> Trainer:
    optimizer = OptimizerConfig(
        name=name,
        base="SGD",
        lr=lr,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        decay_norm_bias=False,
        eps=EPS,
        trust_coef=TRUST,
    )
    config = Config(optimizer=optimizer, schedule=ScheduleConfig(power=POWER, form="whole"))
    return Trainer(
        model,
        build_optimizer(optimizer, model),
        which,
        Hyper(make_schedule(which, config), loss),
        RankContext(CPU, ALONE, precision, normalizer(MEAN, STD, CPU, precision)),
        **kwargs,
    )


class PlainLoop:
    """The same training as a plain loop over whole global batches.

    It applies torch's batch norm to each ghost batch, and spells out running statistics, LARS and the schedule.
    """

    def __init__(self, initial: nn.Module, ghost: int) -> None:
        self.ghost = ghost
        self.model = CifarResNet(1, num_classes=CLASSES, norm_layer=nn.BatchNorm2d).double()
        self.model.load_state_dict(initial.state_dict())
        self.norms = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        self.running = {
            n: [m.state_dict()[key].clone() for key in ("running_mean", "running_var")] for n, m in self.norms.items()
        }
        self.base = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=MOMENTUM)
        self.loss_sum = 0.0
        self.hits = 0
        self.grad_norm = self.weight_norm = 0.0

    def update(self, number: int, images: Tensor, labels: Tensor) -> None:
        mean_pixel, std_pixel = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
        x = (images.double() / 255 - mean_pixel) / std_pixel
        seen: dict[str, list[Tensor]] = {n: [] for n in self.norms}
        hooks = [
            m.register_forward_pre_hook(lambda _, given, n=n: seen[n].append(given[0].detach().clone()))
            for n, m in self.norms.items()
        ]
        logits = torch.cat([self.model(part) for part in torch.split(x, self.ghost)])
        for hook in hooks:
            hook.remove()
        scores = logits - torch.logsumexp(logits, dim=1, keepdim=True)
        target = torch.full_like(scores, SMOOTHING / CLASSES)
        target[torch.arange(len(labels)), labels] += 1 - SMOOTHING
        losses = -(target * scores).sum(dim=1)
        self.loss_sum += float(losses.sum().detach())
        self.hits += int((logits.argmax(dim=1) == labels).sum())
        self.model.zero_grad()
        torch.autograd.backward(losses.sum() / len(labels))

        parameters = dict(self.model.named_parameters())
        grads = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        assert grads.keys() == parameters.keys()
        self.grad_norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        self.weight_norm = math.sqrt(sum(float(p.detach().square().sum()) for p in parameters.values()))
        for name, p in parameters.items():
            decay = 0.0 if "bn" in name or name.endswith("bias") else DECAY
            w, g = float(p.detach().norm()), float(grads[name].norm())
            ratio = TRUST * w / (g + decay * w + EPS) if w > 0 and g > 0 else 1.0
            p.grad = ratio * (grads[name] + decay * p.detach())
        rate = LR * (number + 1) / WARMUP if number < WARMUP else LR * (1 - number / UPDATES) ** POWER
        self.base.param_groups[0]["lr"] = rate
        self.base.step()

        for name, parts in seen.items():
            flat = [part.transpose(0, 1).flatten(1) for part in parts]
            share = [len(part) / len(images) for part in parts]
            mean = sum(s * f.mean(1) for s, f in zip(share, flat, strict=True))
            variance = sum(s * f.var(1, correction=1) for s, f in zip(share, flat, strict=True))
            for old, new in zip(self.running[name], (mean, variance), strict=True):
                old.mul_(0.9).add_(0.1 * new)

    def state(self, updates: int) -> dict[str, Tensor]:
        expected = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        for name, (mean, variance) in self.running.items():
            expected[f"{name}.running_mean"], expected[f"{name}.running_var"] = mean, variance
            expected[f"{name}.num_batches_tracked"] = torch.tensor(updates)
        return expected


@pytest.mark.parametrize(
    ("batch", "ghost", "micro"),
    [(10, 2, 2), (10, 2, 4), (10, 2, 6), (10, 2, 10), (3, 4, 3)],
    ids=["ghost by ghost", "last one half", "uneven", "all at once", "one small ghost"],
)
def test_updates_equal_a_plain_loop_over_the_whole_global_batch(batch: int, ghost: int, micro: int) -> None:
    model = network(ghost)
    reference = PlainLoop(model, min(ghost, batch))
    t = trainer(model, plan(batch, ghost))
    for update in range(4):
        images, labels = global_batch(batch, update)
        info = t.run_update(micro_batches(images, labels, micro), math.ceil(batch / micro), measure=True)
        reference.update(update, images, labels)
        assert info.measures is not None
        assert float(info.measures.grad_norm) == pytest.approx(reference.grad_norm, rel=1e-11)
        assert float(info.measures.weight_norm) == pytest.approx(reference.weight_norm, rel=1e-12)
    got, expected = model.state_dict(), reference.state(4)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-12, msg=key)
    loss, hits, count, bad = t.meter.sums.tolist()
    assert loss == pytest.approx(reference.loss_sum, rel=1e-12)
    assert (hits, count, bad) == (reference.hits, 4 * batch, 0)
    assert t.update == 4


def test_each_update_has_the_learning_rate_of_its_number() -> None:
    t = trainer(network(2), plan(4, 2))
    rates = []
    for update in range(UPDATES):
        info = t.run_update(micro_batches(*global_batch(4, update), 4), 1, measure=False)
        rates.append(info.lr)
        assert {group["lr"] for group in t.optimizer.param_groups} == {info.lr}
        assert info.measures is None
    warm = [LR * (u + 1) / WARMUP for u in range(WARMUP)]
    assert rates == pytest.approx(warm + [LR * (1 - u / UPDATES) ** POWER for u in range(WARMUP, UPDATES)])


def with_base(base: str, ours: bool, lr: Any) -> Trainer:
    """Return a trainer of torch's optimizer, inside LARS or not, in float64 like Python numbers."""
    model = network(2)
    keywords: dict[str, Any] = {"momentum": 0.9} if base == "SGD" else {}
    optimizer: Optimizer = getattr(torch.optim, base)(model.parameters(), lr=lr, weight_decay=DECAY, **keywords)
    t = trainer(model, plan(8, 2))
    t.optimizer = LARS(optimizer, trust_coef=TRUST) if ours else optimizer
    return t


def as_tensor() -> Tensor:
    return torch.tensor(0.0, dtype=torch.float64)


@pytest.mark.parametrize("ours", [True, False], ids=["LARS", "base alone"])
@pytest.mark.parametrize("base", ["SGD", "Adam"])
def test_a_tensor_learning_rate_gives_the_same_weights(base: str, ours: bool) -> None:
    lr = as_tensor()
    numbers, tensors = with_base(base, ours, 1.0), with_base(base, ours, lr)
    for update in range(4):
        for t in (numbers, tensors):
            info = t.run_update(micro_batches(*global_batch(8, update), 4), 2, measure=False)
        assert all(group["lr"] is lr for group in tensors.optimizer.param_groups)
        assert float(lr) == info.lr
    for (key, got), expected in zip(
        tensors.network.state_dict().items(), numbers.network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize("stored", [1.0, as_tensor()], ids=["number", "tensor"])
def test_restore_keeps_the_tensor_of_the_learning_rate(stored: Any) -> None:
    unbroken, first, lr = with_base("Adam", True, 1.0), with_base("Adam", True, stored), as_tensor()
    for update in range(3):
        for t in (unbroken, first):
            t.run_update(micro_batches(*global_batch(8, update), 4), 2, measure=False)
    second = with_base("Adam", True, lr)
    second.restore(first.state())
    for update in range(3, 5):
        for t in (unbroken, second):
            t.run_update(micro_batches(*global_batch(8, update), 4), 2, measure=False)
    assert all(group["lr"] is lr for group in second.optimizer.param_groups)
    for (key, got), expected in zip(
        second.network.state_dict().items(), unbroken.network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14, msg=key)


def test_restored_training_is_bit_identical() -> None:
    def averaged(model: nn.Module) -> Trainer:
        return trainer(model, plan(8, 2), ema=ExponentialMovingAverage(model, 0.9, 1))

    unbroken, first = averaged(network(2)), averaged(network(2))
    for update in range(3):
        for t in (unbroken, first):
            t.run_update(micro_batches(*global_batch(8, update), 4), 2, measure=False)
    torch.manual_seed(99)
    second = averaged(build_model("small", num_classes=CLASSES, ghost_batch=2, zero_gamma=True).double())
    second.restore(first.state())
    for update in range(3, 6):
        for t in (unbroken, second):
            t.run_update(micro_batches(*global_batch(8, update), 4), 2, measure=False)
    assert second.update == 6
    assert torch.equal(unbroken.meter.sums, second.meter.sums)
    for part in ("model", "ema"):
        for (key, got), expected in zip(second.state()[part].items(), unbroken.state()[part].values(), strict=True):
            assert torch.equal(got, expected), (part, key)


def test_an_update_sums_waiting_and_bad_images() -> None:
    t = trainer(network(2), plan(4, 2))
    found = BadSample(7, "/data/7.jpg", "truncated")
    images, labels = global_batch(4, 0)

    def slow() -> Iterator[Batch]:
        yield Batch(images[:2], labels[:2], (found, found))
        # Short, but longer than the resolution of any clock.
        torch.randn(200, 200) @ torch.randn(200, 200)
        yield Batch(images[2:], labels[2:], (found,))

    info = t.run_update(slow(), 2, measure=False)
    assert info.bad == [found] * 3
    assert info.waited > 0
    assert t.meter.sums[3] == 3


def test_the_meter_sums_until_it_is_read() -> None:
    meter = Meter(CPU)
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    meter.add(torch.tensor(1.5), logits, torch.tensor([0, 0, 0]), bad=2)
    meter.add(torch.tensor(0.5), logits[:1], torch.tensor([1]), bad=0)
    assert meter.total(ALONE).tolist() == [2.0, 2.0, 4.0, 2.0]
    assert meter.take_bad(ALONE)
    assert not meter.take_bad(ALONE)
    # A checkpoint reads the sums without resetting those for the next log line.
    assert meter.total(ALONE).tolist() == [2.0, 2.0, 4.0, 0.0]


class Reads(TorchDispatchMode):
    """Counts the operators that copy a tensor's value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def syncs(self) -> int:
        return sum(self.calls[f"aten::{n}"] for n in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"))


def test_an_update_between_log_lines_copies_nothing_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on an accelerator. On the CPU LARS reads norms, which costs no wait there.
    monkeypatch.setattr(fused_sgd, "applies_to", lambda base, rule: False)
    monkeypatch.setattr(rescale, "is_host_tensor", lambda tensor: False)
    for waits in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
        monkeypatch.setattr(waits, "synchronize", lambda *_: pytest.fail("the host waits for the device"))
    model = network(2)
    t = trainer(model, plan(8, 2), ema=ExponentialMovingAverage(model, 0.9, 0))
    for update, measure in enumerate((False, True)):
        batches = micro_batches(*global_batch(8, update), 4)
        with Reads() as reads:
            info = t.run_update(batches, 2, measure=measure)
        assert reads.calls["aten::convolution_backward"] > 0
        assert reads.syncs == 0
    with Reads() as reads:
        assert info.measures is not None
        float(info.measures.grad_norm)
    assert reads.syncs == 1  # the counter counts


class Copies(TorchDispatchMode):
    """Records, for each copy from the host to the device, whether the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.wait: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        to = found.device if isinstance(found, torch.Tensor) else None
        if func.name() in ("aten::_to_copy", "aten::copy_") and to != CPU and args[-1].device == CPU:
            self.wait.append(not (kwargs or {}).get("non_blocking", False))
        return found


@pytest.mark.parametrize("base", ["SGD", "Adam"])
def test_setting_the_learning_rate_copies_nothing_to_the_host(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On the CPU torch's optimizers read such a tensor. Capturable ones, on a GPU, do not.
    lr = as_tensor()
    t = with_base(base, True, lr)
    monkeypatch.setattr(t.optimizer, "step", lambda: None)
    with Reads() as reads:
        info = t.run_update(micro_batches(*global_batch(8, 0), 4), 2, measure=False)
    assert reads.calls["aten::fill_"] > 0
    assert reads.syncs == 0
    assert float(lr) == info.lr


class NoAutocast(Precision):
    """A precision without autocast, which the meta device lacks."""

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext()


def on_meta(kind: torch.dtype, name: str = "lars", average: bool = False) -> Trainer:
    meta = torch.device("meta")
    model = network(2).to(meta, kind)
    t = trainer(model, plan(8, 2), name=name, ema=ExponentialMovingAverage(model, 0.9, 0) if average else None)
    t.precision = NoAutocast("without autocast", kind, kind)
    t.device, t.meter, t.normalize = meta, Meter(meta), normalizer(MEAN, STD, meta, t.precision)
    return t


def test_an_update_makes_the_operations_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    t = on_meta(torch.float32)
    operations, one_pass = Operations(), t._pass

    def apart(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        before = len(operations.calls)
        made = one_pass(*arguments)
        del operations.calls[before:]
        return made

    monkeypatch.setattr(t, "_pass", apart)
    # The meta device splits operations on lists. On CUDA the step has 22 (docs/gpu_notes.md).
    monkeypatch.setattr(t.optimizer, "step", lambda: None)
    given = list(micro_batches(*global_batch(8, 1), 8))
    with operations:
        t.run_update(iter(given), 1, measure=False)
    names = [operator.name() for operator, *_ in operations.calls if computes(operator)]
    assert len(names) + 22 == _OPERATIONS_OF_UPDATE, names


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_an_update_reads_no_tensor_values(name: str) -> None:
    # On the meta device tensors have no values, so any branch on one would raise.
    t = on_meta(torch.float64, name, average=True)
    mixes = GhostMix(0, 2, 0.3), GhostMix(2, 4, 0.6, (0.5, 0.5))
    with Copies() as copies:
        for update in range(2):
            # In the second update the images are mixed.
            batches = (replace(b, mixes=mixes[: 2 * update]) for b in micro_batches(*global_batch(8, update), 4))
            t.run_update(batches, 2, measure=False)
    # Of images and labels, in two micro-batches each.
    assert copies.wait == [False] * 8
    with pytest.raises((RuntimeError, NotImplementedError)):
        t.meter.sums.tolist()


def test_float16_follows_float32_and_scales_the_loss() -> None:
    exact = trainer(tiny_network(4), plan(16, 4), FP32, lr=1.0)
    half = trainer(tiny_network(4), plan(16, 4), FP16, lr=1.0)
    start = {k: v.clone() for k, v in exact.network.state_dict().items()}
    half.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for update in range(4):
        found = [t.run_update(micro_batches(*global_batch(16, update), 8), 2, measure=True) for t in (exact, half)]
        norms = [float(info.measures.grad_norm) for info in found if info.measures is not None]
        small = [float(info.noise_terms[0]) for info in found if info.noise_terms is not None]
        assert small[1] == pytest.approx(small[0], rel=0.05)
        assert norms[1] == pytest.approx(norms[0], rel=0.02)  # the reported loss is not scaled
    assert not exact.scaler.is_enabled()
    assert half.scaler.get_scale() == 2048.0
    for key, p in half.network.named_parameters():
        assert p.dtype == torch.float32
        moved = exact.network.state_dict()[key] - start[key]
        assert (p.detach() - start[key] - moved).norm() < 0.1 * moved.norm() + 1e-6, key
    assert torch.isfinite(half.meter.sums).all()


def test_float16_overflow_skips_the_step_and_halves_the_scale() -> None:
    model = tiny_network(4)
    t = trainer(model, plan(8, 4), FP16, ema=ExponentialMovingAverage(model, 0.5, 0))
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    initial = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():  # so that an average with these weights would differ
        p.data.add_(1.0)
    before = {k: p.detach().clone() for k, p in t.network.named_parameters()}
    t.run_update(micro_batches(*global_batch(8, 0), 8), 1, measure=False)
    assert t.scaler.get_scale() == 2.0**59
    # No update was made, and the batch is skipped.
    assert (t.update, t.skipped) == (0, 1)
    assert all(torch.equal(before[k], p.detach()) for k, p in t.network.named_parameters())
    assert t.ema is not None
    assert all(map(torch.equal, initial, t.ema.network.parameters()))
    state = t.state()
    other = trainer(tiny_network(4), plan(8, 4), FP16)
    other.restore(state)
    assert other.scaler.get_scale() == 2.0**59
    assert (other.update, other.skipped) == (0, 1)


def test_bfloat16_keeps_float32_weights_and_trains() -> None:
    t = trainer(tiny_network(4), plan(16, 4), choose_precision("bf16", CPU), lr=2.0)
    images, labels = global_batch(16, 0)
    losses = []
    for _ in range(UPDATES):
        t.run_update(micro_batches(images, labels, 8), 2, measure=False)
        losses.append(float(t.meter.sums[0]))
        t.meter.sums.zero_()
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in t.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("base", ["AdamW", "Adagrad"])
def test_any_base_under_lars_moves_the_weights(base: str) -> None:
    model = network(2)
    config = OptimizerConfig(
        name="lars", base=base, lr=0.1, weight_decay=DECAY, decay_norm_bias=True, eps=EPS, trust_coef=TRUST
    )
    optimizer: Optimizer = build_optimizer(config, model)
    t = trainer(model, plan(4, 2))
    t.optimizer = optimizer
    before = [p.detach().clone() for p in model.parameters()]
    t.run_update(micro_batches(*global_batch(4, 0), 4), 1, measure=False)
    assert not any(torch.equal(b, p.detach()) for b, p in zip(before, model.parameters(), strict=True))


def test_the_loop_uses_the_configs_schedule() -> None:
    config = Config(optimizer=OptimizerConfig(lr=LR), schedule=ScheduleConfig(power=POWER, form="restart"))
    rate = make_schedule(plan(4, 2), config)
    assert [rate(u) for u in (0, 1, 2, 5)] == pytest.approx([LR / 2, LR, LR, LR * (1 - 3 / 6) ** 2])
    config.schedule = ScheduleConfig(form="cosine", end_lr=LR / 4)
    rate = make_schedule(plan(4, 2), config)
    assert [rate(u) for u in (0, 1, 2, 5)] == pytest.approx([LR / 2, LR, LR, LR * 5 / 8])


def normalized(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    return (images.double() / 255 - mean) / std


def gradients_of_ghosts(model: nn.Module, images: Tensor, labels: Tensor, ghost: int) -> Tensor:
    """Return (ghost batches, elements of all parameters): gradients of mean losses, with torch's batch norm."""
    plain = CifarResNet(1, num_classes=CLASSES, norm_layer=nn.BatchNorm2d).double()
    plain.load_state_dict(model.state_dict())
    rows = []
    for x, y in zip(normalized(images).split(ghost), labels.split(ghost), strict=True):
        loss = F.cross_entropy(plain(x), y, label_smoothing=SMOOTHING)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(plain.parameters()))]))
    return torch.stack(rows)


def gradients_of_samples(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradients (samples, elements of all parameters) of a model without batch norm."""
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(given: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, given, (x[None],))
        return F.cross_entropy(logits, y[None], label_smoothing=SMOOTHING)

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, normalized(images), labels)
    return torch.cat([g.flatten(1) for g in found.values()], dim=1)


@pytest.mark.parametrize("loss", [TrainingLoss(SMOOTHING), TrainingLoss(SMOOTHING, BCE)], ids=["softmax", "bce"])
@pytest.mark.parametrize("micro", [4, 8])
def test_mixed_ghost_batches_have_the_gradient_of_mixed_targets(loss: TrainingLoss, micro: int) -> None:
    model, which = network(4), plan(8, 4)
    images, labels = global_batch(8, 0)
    mixes = [GhostMix(0, 4, 0.7), GhostMix(4, 8, 0.25, (0.5, 0.4))]
    plain = CifarResNet(1, num_classes=CLASSES, norm_layer=nn.BatchNorm2d).double()
    plain.load_state_dict(model.state_dict())
    total, hits = torch.zeros(()).double(), 0
    for x, y, mix in zip(normalized(images).split(4), labels.split(4), mixes, strict=True):
        share, x = mix.share, x.clone()
        if mix.center is None:
            x = share * x + (1 - share) * x.flip(0)
        else:
            # Sides of int(16 * sqrt(0.75)) = 13, so 6 pixels around (8, 6).
            x[:, :, 0:12, 2:14] = x.flip(0)[:, :, 0:12, 2:14]
            share = 1 - 12 * 12 / 16**2
        logits = plain(x)
        both = [F.one_hot(y, CLASSES).double(), F.one_hot(y.flip(0), CLASSES).double()]
        targets = (share * both[0] + (1 - share) * both[1]) * (1 - SMOOTHING) + SMOOTHING / CLASSES
        if loss.name == BCE:
            total = total + F.binary_cross_entropy_with_logits(logits, targets) * 4
        else:
            total = total - (targets * logits.log_softmax(1)).sum()
        hits += int((logits.argmax(1) == (y if share >= 0.5 else y.flip(0))).sum())
    torch.autograd.backward(total / 8)
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None))
    t = trainer(model, which, loss=loss)
    if micro == 8:
        batches = iter([Batch(images, labels, (), mixes=tuple(mixes))])
    else:
        own = ((mixes[0],), (mixes[1]._replace(start=0, stop=4),))
        parts = micro_batches(images, labels, 4)
        batches = iter([replace(part, mixes=mix) for part, mix in zip(parts, own, strict=True)])
    info = t.run_update(batches, 8 // micro, measure=True)
    assert info.measures is not None
    assert float(info.measures.grad_norm) == pytest.approx(expected, rel=1e-12)
    assert t.meter.sums.tolist()[:2] == pytest.approx([float(total.detach()), hits], rel=1e-12)


def test_the_gradient_of_bce_is_that_of_torchs_mean() -> None:
    model = network(4)
    images, labels = global_batch(8, 0)
    plain = CifarResNet(1, num_classes=CLASSES, norm_layer=nn.BatchNorm2d).double()
    plain.load_state_dict(model.state_dict())
    targets = F.one_hot(labels, CLASSES).double()
    losses = [
        F.binary_cross_entropy_with_logits(plain(x), y)
        for x, y in zip(normalized(images).split(4), targets.split(4), strict=True)
    ]
    mean = torch.stack(losses).mean()
    torch.autograd.backward(mean)
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None))
    t = trainer(model, plan(8, 4), loss=TrainingLoss(name=BCE))
    info = t.run_update(micro_batches(images, labels, 4), 2, measure=True)
    assert info.measures is not None
    assert float(info.measures.grad_norm) == pytest.approx(expected, rel=1e-12)
    assert float(t.meter.sums[0]) == pytest.approx(8 * float(mean.detach()), rel=1e-12)


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_the_noise_scale_matches_the_gradients_of_samples(micro: int) -> None:
    batch = 12
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 4, 3, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(64, CLASSES)
    model = nn.Sequential(*layers).double()
    images, labels = global_batch(batch, 0)
    assert_noise_of(model, gradients_of_samples(model, images, labels), images, labels, micro)


@pytest.mark.parametrize("micro", [2, 4, 6])
def test_with_batch_norm_the_noise_scale_uses_ghost_batches(micro: int) -> None:
    """Ghost batches are the smallest parts with separate gradients."""
    model = network(2)
    images, labels = global_batch(12, 0)
    assert_noise_of(model, gradients_of_ghosts(model, images, labels, 2), images, labels, micro)


def assert_noise_of(model: nn.Module, each: Tensor, images: Tensor, labels: Tensor, micro: int) -> None:
    """Assert that the trainer's noise estimates are those of `each`.

    `each` has the float64 gradients (parts, elements) of equal parts of the global batch, in order.
    """
    batch = len(images)
    ghost = batch // len(each)
    small, big = each[: micro // ghost].mean(0).square().sum(), each.mean(0).square().sum()
    # The two estimates of the paper's appendix A.1, from the norms of the gradients.
    grad_sq = (batch * big - micro * small) / (batch - micro)
    trace = (small - big) / (1 / micro - 1 / batch)
    t = trainer(model, plan(batch, ghost))
    info = t.run_update(micro_batches(images, labels, micro), batch // micro, measure=True)
    assert info.noise_terms is not None
    assert info.measures is not None
    small_sq, per_small, ranks = info.noise_terms.tolist()
    found = estimates(small_sq / ranks, per_small / ranks, float(info.measures.grad_norm) ** 2, 1 / batch)
    assert found == pytest.approx((float(grad_sq), float(trace)), rel=1e-9)


def test_a_single_micro_batch_gives_no_noise_scale() -> None:
    info = trainer(network(2), plan(4, 2)).run_update(micro_batches(*global_batch(4, 0), 4), 1, measure=True)
    assert info.measures is not None
    assert info.noise_terms is None


def test_measuring_an_update_does_not_change_it() -> None:
    plain, measured = (trainer(network(2), plan(8, 2)) for _ in range(2))
    for update in range(3):
        for t in (plain, measured):
            t.run_update(micro_batches(*global_batch(8, update), 2), 4, measure=t is measured)
    for (key, got), expected in zip(
        measured.network.state_dict().items(), plain.network.state_dict().values(), strict=True
    ):
        assert torch.equal(got, expected), key


def test_norms_of_layers_and_updates_match_the_tensors() -> None:
    model = network(2)
    t = trainer(model, plan(8, 2))
    t.run_update(micro_batches(*global_batch(8, 0), 4), 2, measure=False)  # so that there is momentum
    before = [p.detach().clone() for p in model.parameters()]
    info = t.run_update(micro_batches(*global_batch(8, 1), 4), 2, measure=True)
    assert info.measures is not None
    assert [id(p) for p in info.measures.parameters] == [id(p) for p in model.parameters()]
    moved = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    assert info.measures.updates.tolist() == pytest.approx([float(m.norm()) for m in moved], rel=1e-12)
    assert info.measures.weights.tolist() == pytest.approx([float(b.norm()) for b in before], rel=1e-12)
    whole, way = (float(torch.cat([part.flatten() for part in parts]).norm()) for parts in (before, moved))
    assert info.measures.values()["train/weight_norm"] == pytest.approx(whole, rel=1e-12)
    assert info.measures.values()["train/update_ratio"] == pytest.approx(way / whole, rel=1e-12)
    assert info.measures.before == []  # the copy is released


@pytest.mark.slow
def test_a_compiled_network_trains_like_an_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing_tool(CPU) is not None:
        pytest.skip(f"{missing_tool(CPU)} is missing")
    for name, value in COMPILED.items():
        monkeypatch.setenv(name, value)
    which, found = plan(8, 4), []
    for compiled in (False, True):
        made = trainer(tiny_network(4), which, FP32, compiled=compiled)
        for update in range(2):
            made.run_update(micro_batches(*global_batch(8, update), 8), 1, measure=False)
        found.append({name: value.double() for name, value in made.network.state_dict().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
