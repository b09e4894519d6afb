"""FLOPs match torchvision's count and a sum by hand, the peak is plausible, and rates exclude evaluations."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import start
from torchvision.models import ResNet18_Weights, ResNet50_Weights

from lars_train.models.factory import build_model
from lars_train.training.device import choose_precision
from lars_train.training.metrics import Flops, Interval, flops_per_image, peak_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "weights"), [("resnet18", ResNet18_Weights), ("resnet50", ResNet50_Weights)])
def test_flops_are_three_times_torchvisions_forward_count(name: str, weights: type) -> None:
    # `_ops`: billions of multiply-adds of a forward pass, two operations each.
    stated = weights.IMAGENET1K_V1.meta["_ops"]  # type: ignore[attr-defined]
    network = build_model(name, num_classes=1000, ghost_batch=8, zero_gamma=False)
    assert flops_per_image(network, 224) == pytest.approx(3 * 2 * stated * 1e9, rel=1e-3)
    assert network.training
    assert next(network.parameters()).device == CPU


def test_flops_of_a_small_network_are_the_sum_over_layers() -> None:
    shapes = [(3, 16, 32), (16, 16, 32), (16, 16, 32), (16, 32, 16), (32, 32, 16), (32, 64, 8), (64, 64, 8)]
    forward = sum(2 * 9 * into * out * side**2 for into, out, side in shapes) + 2 * 64 * 10
    network = build_model("small", num_classes=10, ghost_batch=8, zero_gamma=False)
    assert flops_per_image(network, 32) == 3 * forward


def test_the_measured_peak_is_plausible_for_this_machine() -> None:
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    peak_flops.cache_clear()
    found = peak_flops(choose_precision("fp32", CPU), CPU, threads)
    # From an old, busy processor to more than any node.
    assert 1e8 < found < 1e15
    assert torch.equal(torch.get_rng_state(), before)
    assert peak_flops(choose_precision("fp32", CPU), CPU, threads) == found


# CUDA's settings, which can be read without a device. Each in a separate process, because they are process-wide.
_SETTINGS = {
    "torch's own": ("", "tf32"),
    "only for products": (
        "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = False",
        "none",
    ),
    "newer names, not for convolutions": ("torch.backends.cudnn.conv.fp32_precision = 'ieee'", "ieee"),
    "newer names, for all": ("torch.backends.fp32_precision = 'tf32'", "tf32"),
}
_MEASURED = """
import warnings
warnings.simplefilter("error")
import torch
from lars_train.training.device import choose_precision
from lars_train.training.metrics import peak_flops

cuda, cudnn = torch.backends.cuda, torch.backends.cudnn

def read(setting):
    try:
        return setting()
    except RuntimeError:
        return "mixed"

def precision():
    # torch before 2.9 has only the older name.
    return cuda.matmul.fp32_precision if hasattr(cudnn, "conv") else "tf32" if cuda.matmul.allow_tf32 else "none"

def settings():
    newer = [torch.backends.fp32_precision, cudnn.conv.fp32_precision] if hasattr(cudnn, "conv") else []
    older = [torch.get_float32_matmul_precision, lambda: cuda.matmul.allow_tf32, lambda: cudnn.allow_tf32]
    return [precision(), *newer, *map(read, older)]

{setting}
before, product, seen = settings(), torch.mm, set()

def watched(a, b):
    seen.add(precision())
    return product(a, b)

torch.mm = watched
cpu = torch.device("cpu")
peak_flops(choose_precision("fp32", cpu), cpu, 1)
assert seen == {{{expected!r}}}, seen
assert settings() == before, (settings(), before)
"""


@pytest.mark.parametrize("case", _SETTINGS)
def test_the_peak_uses_tf32_if_convolutions_do(case: str, tmp_path: Path) -> None:
    setting, expected = _SETTINGS[case]
    if "newer" in case and not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this version of torch has only the older names of the settings")
    done = start([sys.executable, "-c", _MEASURED.format(setting=setting, expected=expected)], tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_failed_measurement_restores_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(a: object, b: object) -> None:
        raise torch.OutOfMemoryError("no room")

    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "mm", fail)
    peak_flops.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        peak_flops(choose_precision("fp32", CPU), CPU, 1)
    assert torch.get_float32_matmul_precision() == before


def test_a_log_line_has_the_rate_since_the_previous_line() -> None:
    interval = Interval(30, 100.0)
    interval.waited += 2.0
    values = interval.values(40, 116.0, global_batch=256, flops=Flops(2e9, 1e12))
    assert values["train/images_per_s"] == 10 * 256 / 16
    assert values["train/mfu"] == pytest.approx(160 * 2e9 / 1e12)
    assert values["train/wait_share"] == 2 / 16
    assert values["checkpoint/wait_seconds"] == 0
    values = interval.values(40, 116.0, global_batch=256, flops=Flops(2e9, None))
    assert "train/mfu" not in values


def test_the_rate_excludes_evaluations_and_checkpoints() -> None:
    interval = Interval(0, 50.0)
    interval.waited += 1.0
    interval.save(3.0)
    interval.exclude(20.0)
    interval.save(1.0)
    values = interval.values(5, 84.0, global_batch=32, flops=Flops(1.0, 1.0))
    assert values["train/images_per_s"] == 5 * 32 / 10
    assert values["train/wait_share"] == 1 / 10
    assert values["checkpoint/wait_seconds"] == 4
