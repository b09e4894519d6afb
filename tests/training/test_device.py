"""A rank's device, precision, threads and workers follow the config and the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lars_train.config import Config, DataConfig, LaunchConfig
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.training import device as module
from lars_train.training.device import (
    Precision,
    available_cores,
    choose_device,
    choose_precision,
    choose_threads,
    choose_workers,
    cuda_devices,
    set_up,
)
from lars_train.training.device_prefetch import normalizer

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def process_state() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], count: int = 1) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla X")


def cpu(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    found = dict.fromkeys(flags, True) | {"avx512_vnni": True}
    # raising=False: torch before 2.11 has no such function.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)


@pytest.mark.parametrize(
    ("capability", "fastest"),
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")],
)
def test_auto_on_cuda_is_bfloat16_if_the_hardware_has_it(
    capability: tuple[int, int], fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda(monkeypatch, capability)
    assert choose_precision("auto", CUDA).name == fastest


@pytest.mark.parametrize(
    ("flags", "fastest"),
    [((), "fp32"), (("avx512_bf16",), "bf16"), (("amx_bf16",), "bf16"), (("bf16",), "bf16"), (("amx_fp16",), "fp32")],
)
def test_auto_on_a_cpu_is_bfloat16_if_the_hardware_has_it(
    flags: tuple[str, ...], fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu(monkeypatch, *flags)
    assert choose_precision("auto", CPU).name == fastest


@pytest.mark.parametrize(
    ("has", "fastest"), [((False, False), "fp32"), ((True, False), "bf16"), ((False, True), "bf16")]
)
def test_auto_on_a_cpu_needs_no_recent_torch(
    has: tuple[bool, bool], fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    functions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported")
    for function, value in zip(functions, (*has, True), strict=True):
        monkeypatch.setattr(torch.cpu, function, lambda value=value: value)
    assert choose_precision("auto", CPU).name == fastest


@pytest.mark.parametrize(
    ("name", "weights", "compute", "scales"),
    [
        ("fp32", torch.float32, torch.float32, False),
        ("fp64", torch.float64, torch.float64, False),
        ("bf16", torch.float32, torch.bfloat16, False),
        ("fp16", torch.float32, torch.float16, True),
    ],
)
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_precision_has_the_dtypes_of_its_name(
    name: str,
    weights: torch.dtype,
    compute: torch.dtype,
    scales: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda(monkeypatch, (9, 0))
    cpu(monkeypatch, "avx512_fp16")
    precision = choose_precision(name, device)
    assert precision == Precision(name, weights, compute)
    assert precision.scales_loss is scales


def test_a_missing_precision_is_refused_with_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, (7, 5))
    with pytest.raises(ConfigError, match=r"precision=bf16: Tesla X .*8\.0.* precision=fp16 or fp32"):
        choose_precision("bf16", CUDA)
    assert choose_precision("fp16", CUDA).scales_loss
    cpu(monkeypatch)
    with pytest.raises(ConfigError, match=r"precision=fp16: this CPU .* precision=bf16 or fp32"):
        choose_precision("fp16", CPU)


def test_autocast_computes_in_the_named_precision() -> None:
    x, layer = torch.ones(2, 3), torch.nn.Linear(3, 3)
    for precision, expected in (
        (Precision("bf16", torch.float32, torch.bfloat16), torch.bfloat16),
        (Precision("fp32", torch.float32, torch.float32), torch.float32),
    ):
        with precision.autocast(CPU):
            assert layer(x).dtype == expected
    with Precision("fp64", torch.float64, torch.float64).autocast(CPU):
        assert layer.double()(x.double()).dtype == torch.float64


def test_every_rank_uses_the_device_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, (9, 0), count=2)
    for name in ("auto", "cuda"):
        assert choose_device(Config(device=name), Ranks(5, 8, 1, 2)) == torch.device("cuda", 1)
    assert choose_device(Config(device="cpu"), Ranks(5, 8, 1, 2)) == CPU
    with pytest.raises(ConfigError, match=r"local rank 2 has no device: .* 2 CUDA devices.*device=cpu"):
        choose_device(Config(), Ranks(2, 3, 2, 3))


def test_a_slurm_task_that_sees_one_device_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, (9, 0), count=1)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert choose_device(Config(), Ranks(3, 4, 3, 4)) == torch.device("cuda", 0)
    monkeypatch.delenv("SLURM_LOCALID")
    with pytest.raises(ConfigError, match="local rank 3 has no device"):
        choose_device(Config(), Ranks(3, 4, 3, 4))


def test_without_cuda_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, (9, 0), count=0)
    assert cuda_devices(Config()) == 0
    assert choose_device(Config(), Ranks(3, 4, 3, 4)) == CPU
    for ask in (cuda_devices, lambda c: choose_device(c, Ranks())):
        with pytest.raises(ConfigError, match="device=cuda: torch finds no CUDA device; use device=cpu"):
            ask(Config(device="cuda"))


def test_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = [choose_threads(Config(), Ranks(0, n, 0, n)) for n in (1, 2, 3, 8, 20)]
    assert threads == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(Config(), Ranks()) == 3
    assert choose_threads(Config(launch=LaunchConfig(threads=5)), Ranks()) == 5
    # torchrun sets this for each of several processes.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert choose_threads(Config(), Ranks()) == threads[0]
    workers = [choose_workers(Config(), CUDA, Ranks(0, n, 0, n)) for n in (1, 2, 8)]
    assert workers == [7, 3, 1]
    monkeypatch.setattr(module, "available_cores", lambda: 96)
    assert choose_workers(Config(), CUDA, Ranks()) == 16
    assert choose_workers(Config(), CPU, Ranks()) == 0
    assert choose_workers(Config(data=DataConfig(workers=3)), CPU, Ranks()) == 3


def test_available_cores_respects_the_affinity() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


@pytest.mark.usefixtures("process_state")
def test_set_up_seeds_and_sets_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    draws = []
    for seed in (7, 7, 8):
        set_up(Config(seed=seed), CPU, 1)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_up(Config(deterministic=True), CPU, 1)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(("weights", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_normalization_matches_its_formula(weights: torch.dtype, tolerance: float) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), dtype=np.uint8)
    pixels[0, 0, 0], pixels[0, 0, 1] = 0, 255
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    before = images.clone()
    got = normalizer(mean, std, CPU, Precision("x", weights, weights))(images)
    expected = (pixels.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(got.double().permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=4 * tolerance)
    assert got.dtype == weights
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
