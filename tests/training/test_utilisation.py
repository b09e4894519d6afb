"""The operations of a model against torchvision's own count and a sum by hand, and a rate that can be true."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import ResNet18_Weights, ResNet50_Weights

from lars_train.models.factory import build_model
from lars_train.training.device import choose_precision
from lars_train.training.utilisation import flops_per_image, peak_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "weights"), [("resnet18", ResNet18_Weights), ("resnet50", ResNet50_Weights)])
def test_training_takes_three_times_the_multiply_adds_that_torchvision_states(name: str, weights: type) -> None:
    # `_ops`: billions of multiply-adds of a forward pass, two operations each.
    stated = weights.IMAGENET1K_V1.meta["_ops"]  # type: ignore[attr-defined]
    network = build_model(name, num_classes=1000, ghost_batch=8, zero_gamma=False)
    assert flops_per_image(network, 224) == pytest.approx(3 * 2 * stated * 1e9, rel=1e-3)
    assert network.training
    assert next(network.parameters()).device == CPU


def test_the_small_network_s_operations_are_the_sum_over_its_layers() -> None:
    shapes = [(3, 16, 32), (16, 16, 32), (16, 16, 32), (16, 32, 16), (32, 32, 16), (32, 64, 8), (64, 64, 8)]
    forward = sum(2 * 9 * into * out * side**2 for into, out, side in shapes) + 2 * 64 * 10
    network = build_model("small", num_classes=10, ghost_batch=8, zero_gamma=False)
    assert flops_per_image(network, 32) == 3 * forward


def test_the_measured_peak_is_a_rate_of_this_machine() -> None:
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    peak_flops.cache_clear()
    found = peak_flops(choose_precision("fp32", CPU), CPU, threads)
    # From a processor of long ago on a busy day to more than any node has.
    assert 1e8 < found < 1e15
    assert torch.equal(torch.get_rng_state(), before)
    assert peak_flops(choose_precision("fp32", CPU), CPU, threads) == found
