"""The time model agrees with published results, with a message-by-message simulation, and with sums done by hand."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models.resnet import Bottleneck

from lars_train.models.factory import build_model
from lars_train.preflight.devices import DEVICES, FLOPS_PER_IMAGE, SEPARATE_BYTES, TENSORS, speed
from lars_train.preflight.time_model import Machine, Speed, Work, all_reduce_seconds, update_seconds
from lars_train.training.metrics import flops_per_image

ROOT = Path(__file__).parents[2]
# MLPerf's programs send gradients in 16 bits, over a 400 Gbit/s link for each device.
MLPERF_GRADIENTS, MLPERF_BANDWIDTH, BUCKETS = 2 * 25_557_032, 50e9, 2

# Images/s of a device as published: (device, devices, images of an update on each, by MLPerf's programs).
# `tracked_stats` in */results/*/resnet of https://github.com/mlcommons/training_results_v4.0 and, of the A100, v3.1
# (means over the epochs, by device). The last two are this program's, with ghost batches of 32 (docs/gpu_notes.md).
PUBLISHED = {
    ("h200", 8, 400, True): 7872,
    ("h100", 8, 400, True): 7134,
    ("h100", 64, 50, True): 4827,
    ("h100", 3584, 16, True): 2776,
    ("a100", 8, 400, True): 3182,
    ("h100", 1, 256, False): 4540,
    ("h100", 1, 32, False): 1440,
}


def modeled(device: str, world: int, images: int, fused: bool) -> float:
    """Return the model's images/s of a device."""
    machine = Machine(
        speed(DEVICES[device], "bf16", fused=fused), None, 1e-5, MLPERF_BANDWIDTH, node=8, link=DEVICES[device].link
    )
    work = Work(images, images, 32, MLPERF_GRADIENTS, BUCKETS)
    return images / update_seconds(machine, world, work).seconds


@pytest.mark.parametrize(("case", "published"), PUBLISHED.items())
def test_speeds_are_within_a_quarter_of_published_ones(case: tuple[str, int, int, bool], published: int) -> None:
    assert modeled(*case) == pytest.approx(published, rel=0.25)


@pytest.mark.parametrize(("case", "published"), PUBLISHED.items())
def test_the_page_has_the_published_and_modeled_speeds(case: tuple[str, int, int, bool], published: int) -> None:
    device, world, images, _ = case
    row = f"| {world:,} \u00d7 {device.upper()} | {images} | {published:,} | {modeled(*case):,.0f} |"
    assert row in (ROOT / "docs" / "plan.md").read_text()


def test_small_micro_batches_are_slower_per_image() -> None:
    rates = [modeled("h100", 1, images, fused=False) for images in (32, 64, 128, 256)]
    assert rates == sorted(rates)
    assert rates[0] < 0.4 * rates[-1]
    # MLPerf's H100 lost 61 % from 400 images to 16.
    assert modeled("h100", 8, 16, fused=True) < 0.5 * modeled("h100", 8, 400, fused=True)


@pytest.mark.parametrize("name", DEVICES)
def test_a_cited_device_has_a_rate_and_a_source(name: str) -> None:
    assert DEVICES[name].figures
    for figure in DEVICES[name].figures.values():
        assert re.match(r"https://\S+, |this program on ", figure.source)
        assert f"{figure.images_per_second:,}" in (ROOT / "docs" / "plan.md").read_text()


def test_cited_figures_are_of_this_network() -> None:
    network = build_model("resnet50", num_classes=1000, ghost_batch=32, zero_gamma=False)
    assert flops_per_image(network, 224) == FLOPS_PER_IMAGE
    assert len(list(network.parameters())) == TENSORS


@given(world=st.integers(2, 40), size=st.integers(1, 10**9))
def test_a_ring_takes_the_sum_of_its_messages(world: int, size: int) -> None:
    machine = Machine(Speed(1.0), None, latency=1e-5, bandwidth=1e9, algorithm="ring")
    seconds = 0.0
    for _phase in ("scatter", "gather"):
        for _step in range(world - 1):
            seconds += 1e-5 + size / world / 1e9
    assert all_reduce_seconds(machine, world, size) == pytest.approx(seconds)


def test_many_devices_use_a_tree_and_few_a_ring() -> None:
    ring, tree, either = (Machine(Speed(1.0), None, 1e-5, 1e10, algorithm=name) for name in ("ring", "tree", "auto"))
    for world, best in ((8, ring), (4096, tree)):
        assert all_reduce_seconds(either, world, 10**8) == all_reduce_seconds(best, world, 10**8)
    # By hand: 2 x 12 messages of 10 microseconds, and 2 x 0.1 GB at 10 GB/s.
    assert all_reduce_seconds(tree, 4096, 10**8) == pytest.approx(24e-5 + 0.02)


def test_nodes_share_the_bytes_between_their_devices() -> None:
    machine = Machine(Speed(1.0), None, 1e-5, 1e10, algorithm="ring", node=8, link=1e11)
    # By hand: 14 messages of 12.5 MB at 100 GB/s within a node; between 4 nodes, 6 messages of 12.5 MB / 4 at 10 GB/s.
    within = 14 * (1e-5 + 12.5e6 / 1e11)
    assert all_reduce_seconds(machine, 8, 10**8) == pytest.approx(within)
    assert all_reduce_seconds(machine, 32, 10**8) == pytest.approx(within + 6 * (1e-5 + 12.5e6 / 4 / 1e10))
    assert all_reduce_seconds(machine, 2, 10**8) == pytest.approx(2 * (1e-5 + 50e6 / 1e11))


def test_the_part_that_takes_longest_is_named() -> None:
    def update(input_rate: float | None, bandwidth: float, overlap: float, buckets: int = 1) -> tuple[str, float]:
        machine = Machine(Speed(100.0), input_rate, 0.0, bandwidth, overlap, "ring")
        found = update_seconds(machine, 2, Work(200, 100, 100, 10**6, buckets))
        return found.limit, found.seconds

    assert update(None, 1e6, 0.0) == ("compute", pytest.approx(2 + 1))
    # The backward pass hides 2/3 s of the network, but never the last bucket.
    assert update(None, 1e6, 1.0) == ("compute", pytest.approx(2 + 1))
    assert update(None, 1e6, 1.0, buckets=10) == ("compute", pytest.approx(2 + 1 - 2 / 3))
    assert update(None, 1e7, 1.0, buckets=10) == ("compute", pytest.approx(2 + 0.01))
    assert update(None, 1e5, 0.0) == ("network", pytest.approx(2 + 10))
    assert update(40.0, 1e6, 0.0) == ("input", pytest.approx(5))


def test_a_device_waits_for_a_host_that_launches_slowly() -> None:
    machine = Machine(Speed(100.0, floor=0.1, launch=(0.5, 0.8), launch_update=0.05), None, 0.0, 1e6)

    def compute(samples: int, micro_batch: int, ghost_batch: int = 10) -> tuple[str, float]:
        found = update_seconds(machine, 1, Work(samples, micro_batch, ghost_batch, 10**6))
        return found.limit, found.compute

    assert compute(10, 10) == ("launch", pytest.approx(0.55))
    assert compute(20, 20) == ("launch", pytest.approx(0.85))
    assert compute(30, 20) == ("launch", pytest.approx(0.8 + 0.5 + 0.05))
    assert compute(200, 100) == ("compute", pytest.approx(2.0 + 2 * 0.1))


def test_without_workers_times_add_up_and_overhead_counts_once() -> None:
    def seconds(reads: bool = False, overhead: float = 0.0) -> float:
        machine = Machine(Speed(100.0), 50.0, 0.0, 1e6, 0.0, "ring", overhead, reads)
        return update_seconds(machine, 1, Work(200, 100, 100, 10**6)).seconds

    assert seconds() == pytest.approx(200 / 50)
    assert seconds(reads=True) == pytest.approx(200 / 100 + 200 / 50)
    assert seconds(reads=True, overhead=0.5) == pytest.approx(200 / 100 + 0.5 + 200 / 50)


def test_separate_kernels_move_the_bytes_that_are_assumed() -> None:
    counts: Counter[type[nn.Module]] = Counter()

    def count(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        counts[type(module)] += output.numel()

    network = build_model("resnet50", num_classes=1000, ghost_batch=1, zero_gamma=False).eval()
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ReLU, Bottleneck)):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, 224, 224))
    # Passes over a tensor, forward and backward, that fused kernels do without: 5 of 8 for batch norm,
    # all 5 for ReLU, 3 of 6 for the sum with the shortcut. Each reads or writes 2 bytes.
    values = 5 * counts[nn.Conv2d] + 5 * counts[nn.ReLU] + 3 * counts[Bottleneck]
    assert 2 * values == pytest.approx(SEPARATE_BYTES, rel=0.01)
