"""Recorded passes train bit for bit like ordinary passes. CUDA graphs are refused where they cannot work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from resolving import refusal, resolved
from tape import Tape
from tiny import tiny
from torch import Tensor, nn

from lars_train import commands
from lars_train.config import OptimizerConfig
from lars_train.config.values import filled
from lars_train.data.loading.loader import Batch
from lars_train.data.mixing import Mixing
from lars_train.errors import ConfigError, NotReady
from lars_train.given import Given
from lars_train.launch import Ranks
from lars_train.models import ghost_norm
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.cuda_graphs import WARM_UPS, CudaRecorder, GraphedPass, Pass
from lars_train.models.factory import build_model
from lars_train.models.ghost_norm import launches_are_free
from lars_train.models.losses import BCE, TrainingLoss
from lars_train.run_plan import Plan
from lars_train.training.assemble import build_optimizer
from lars_train.training.device import Precision, choose_precision
from lars_train.training.device_prefetch import RankContext, normalizer
from lars_train.training.distributed import Group
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation
from lars_train.training.trainer import Hyper, Trainer

CPU = torch.device("cpu")
FP64 = Precision("fp64", torch.float64, torch.float64)
FP32 = Precision("fp32", torch.float32, torch.float32)
FP16 = Precision("fp16", torch.float32, torch.float16)
CLASSES, SIZE, BATCH, GHOST, MICRO, UPDATES = 4, 8, 10, 2, 4, 6
PLAN = Plan(
    samples=BATCH,
    nominal_batch=BATCH,
    global_batch=BATCH,
    ghost_batch=GHOST,
    scaled=False,
    raised=False,
    epochs=UPDATES,
    updates_per_epoch=1,
    updates=UPDATES,
    stop=UPDATES,
    warmup_updates=0,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(kind: Precision, loss: TrainingLoss, *, device: torch.device = CPU, taped: bool = False) -> Trainer:
    torch.manual_seed(1)
    network = build_model("small", num_classes=CLASSES, ghost_batch=GHOST, zero_gamma=False)
    if kind is FP16:  # a CPU without float16 needs seconds for the network above
        network = nn.Sequential(
            nn.Conv2d(3, 4, 8), GhostBatchNorm2d(4, ghost_batch=GHOST), nn.Flatten(), nn.Linear(4, 4)
        )
    context = RankContext(device, Group(Ranks()), kind, normalizer([0.5] * 3, [0.25] * 3, device, kind))
    network = context.place(network).train()
    config = OptimizerConfig(name="lars", base="SGD", lr=1.0, momentum=0.9, weight_decay=0.01, decay_norm_bias=False)
    hyper = Hyper(lambda update: 1 / (1 + update), loss, clip_grad_norm=100.0)
    recorder: Any = None
    if taped:
        recorder = Tape(network) if device == CPU else CudaRecorder(device)
    return Trainer(network, build_optimizer(config, network), PLAN, hyper, context, recorder=recorder)


def micro_batches(update: int, mixing: Mixing | None) -> Iterator[Batch]:
    draw = torch.Generator().manual_seed(update)
    images = torch.randint(256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, generator=draw)
    labels = torch.randint(CLASSES, (BATCH,), generator=draw)
    for start in range(0, BATCH, MICRO):
        stop = min(start + MICRO, BATCH)
        mixes = () if mixing is None else mixing.draw(0, update, (start, stop), GHOST)
        yield Batch(images[start:stop], labels[start:stop], (), mixes)


def train(made: Trainer, updates: range, mixing: Mixing | None = None) -> list[float]:
    """Make the updates, and measure every other one. Return the terms of the noise scale, and 1 for an update."""
    found: list[float] = []
    for update in updates:
        info = made.run_update(micro_batches(update, mixing), 3, measure=update % 2 == 0)
        found.append(float(info.made))
        if info.noise_terms is not None:
            found += info.noise_terms.tolist()
    return found


def assert_same(got: Any, expected: Any, where: str = "") -> None:
    """Assert that nested states are equal, tensors bit for bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected), where
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(got[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for number, value in enumerate(expected):
            assert_same(got[number], value, f"{where}[{number}]")
    else:
        assert got == expected, where


SMOOTHED = TrainingLoss(0.1)
MIXUP = Mixing(0.4, 0.0, 7)
CASES = {
    "fp64": (FP64, SMOOTHED, None),
    "fp32, mixup and cutmix": (FP32, SMOOTHED, Mixing(0.4, 1.0, 7)),
    "fp32, bce and mixup": (FP32, TrainingLoss(0.1, BCE), MIXUP),
    "fp16": (FP16, SMOOTHED, None),
}


@pytest.mark.parametrize(("kind", "loss", "mixing"), CASES.values(), ids=CASES)
def test_replayed_passes_train_like_ordinary_ones(kind: Precision, loss: TrainingLoss, mixing: Mixing | None) -> None:
    plain, taped = (make_trainer(kind, loss, taped=taped) for taped in (False, True))
    for made in (plain, taped):
        # Float16's scale doubles after two updates, which is too much here, so that the next update is skipped.
        made.scaler.set_growth_interval(2)
    terms = train(plain, range(UPDATES), mixing)
    assert len(terms) == UPDATES + 3 * UPDATES // 2
    assert (0.0 in terms) == (kind is FP16)
    # Only the order in which the layers' norms are summed may differ.
    assert train(taped, range(UPDATES), mixing) == pytest.approx(terms, rel=1e-12, nan_ok=True)
    assert_same(taped.state(), plain.state())
    # Each update has two micro-batches of 4 images and one of 2.
    tape: Any = taped.graphed._recorder if taped.graphed is not None else None
    assert (tape.runs, tape.records, tape.replays) == (2 * WARM_UPS, 2, 3 * UPDATES - 2 * WARM_UPS)


def test_a_resumed_run_with_recordings_is_bit_identical() -> None:
    unbroken, first = (make_trainer(FP32, SMOOTHED, taped=taped) for taped in (False, True))
    train(unbroken, range(UPDATES))
    train(first, range(4))
    second = make_trainer(FP32, SMOOTHED, taped=True)
    second.restore(first.state())
    train(second, range(4, UPDATES))
    assert_same(second.state(), unbroken.state())
    # A rollback restores an earlier state without a new start.
    state = make_trainer(FP32, SMOOTHED).state()
    second.restore(state)
    train(second, range(UPDATES))
    assert_same(second.state(), unbroken.state())


def test_a_replaced_gradient_is_an_error() -> None:
    made = make_trainer(FP32, SMOOTHED, taped=True)
    train(made, range(4))
    made.optimizer.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="a gradient was replaced or set to None"):
        train(made, range(4, 5))


def test_a_pass_is_not_recorded_before_all_gradients_exist() -> None:
    weights = nn.ParameterList(torch.ones(2) for _ in range(2))
    tape = Tape(weights)

    def squared(values: Tensor) -> tuple[Tensor, ...]:
        loss = (values * weights[0]).square().sum()
        torch.autograd.backward(loss)
        return (loss,)

    graphed = GraphedPass(squared, weights, tape)
    for _ in range(WARM_UPS + 2):
        graphed(torch.ones(2))
    assert tape.records == 0
    weights[1].grad = torch.zeros(2)
    kept = [graphed(torch.full((2,), value))[0] for value in (1.0, 2.0)]
    # The outputs of one call stay unchanged in the next.
    assert [float(loss) for loss in kept] == [2.0, 8.0]
    # 2 * values**2, summed over all calls.
    assert weights[0].grad is not None
    assert weights[0].grad.tolist() == [2.0 * (WARM_UPS + 2) + 2.0 + 8.0] * 2
    assert (tape.records, tape.replays) == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("compile=true", "cuda_graphs=true and compile=true: set only one of them."),
        ("device=cpu", "cuda_graphs=true: it needs a GPU, but device=cpu; omit it."),
    ],
)
def test_conflicting_settings_are_refused_before_the_start(arguments: str, reason: str) -> None:
    assert refusal("cuda_graphs=true", *arguments.split()) == reason
    assert resolved("cuda_graphs=true", "launch.nproc=2").cuda_graphs
    assert not resolved(*arguments.split()).cuda_graphs


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("changes", [{}, {"launch": {"nproc": 2}}, {"mode": "check"}], ids=str)
def test_a_machine_without_a_gpu_is_refused_before_the_start(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny({"run": {"dir": str(tmp_path / "run")}, "cuda_graphs": True, "device": "auto", **changes})
    with pytest.raises((ConfigError, NotReady)) as caught:
        commands.run(config, Invocation(("lars-train",)))
    # mode=check prints its findings.
    assert "it needs a GPU, but torch finds none here; omit it." in f"{caught.value}{capsys.readouterr().out}"
    assert not (tmp_path / "run").exists()


def test_a_network_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    size = 3 * filled(tiny().data.image_size) ** 2
    dropping = Given(lambda classes: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(size, classes)))
    changes: dict[str, Any] = {"run": {"dir": str(tmp_path / "run")}}
    assert prepare(tiny(changes), dropping).draws
    with pytest.raises(ConfigError, match="cuda_graphs=true: the network draws random numbers"):
        prepare(tiny({**changes, "cuda_graphs": True, "device": "auto"}), dropping)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_cuda_graphs_train_like_ordinary_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch requires this setting for deterministic matrix products.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.use_deterministic_algorithms(True)
    try:
        kind, loss = choose_precision(name, device), TrainingLoss(0.1)
        plain, graphed = (make_trainer(kind, loss, device=device, taped=taped) for taped in (False, True))
        # As in a graph, also for the micro-batches of one ghost batch.
        with launches_are_free():
            terms = train(plain, range(UPDATES), MIXUP)
        assert train(graphed, range(UPDATES), MIXUP) == pytest.approx(terms, rel=1e-12)
        assert_same(graphed.state(), plain.state())
        assert graphed.graphed is not None
        assert len(graphed.graphed._recordings) == 2
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("at_end", [False, True], ids=["the pass fails", "the end of the recording fails, too"])
def test_an_operation_that_cuda_cannot_record_is_named(at_end: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recording:
        """A recording that may fail at its end, as CUDA's does after an error."""

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            if at_end:
                raise RuntimeError("operation failed due to a previous error during capture")

    def failing(error: RuntimeError) -> Pass:
        def refused() -> tuple[Tensor, ...]:
            raise error

        return refused

    for name in ("Stream", "CUDAGraph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace(device=None, wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Recording())
    recorder = CudaRecorder(torch.device("cuda"))
    seen: list[int] = []
    for call in (recorder.run, *([] if at_end else [recorder.record])):
        call(lambda: (torch.zeros(()), seen.append(len(ghost_norm._launches_are_free)))[:1], ())
    assert set(seen) == {1}
    with pytest.raises(ConfigError) as caught:
        recorder.record(failing(RuntimeError("operation not permitted when stream is capturing\nmore")), ())
    assert str(caught.value) == (
        "cuda_graphs=true: CUDA cannot record a pass of this network (operation not permitted when stream is "
        "capturing); omit it."
    )
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        recorder.record(failing(torch.OutOfMemoryError("no room")), ())
