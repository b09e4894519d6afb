"""What a plan foretells, against a message-by-message simulation, torch's own allocation record, and the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from lars_train.cost import Machine, all_reduce_seconds, update_seconds
from lars_train.forecast import draw
from lars_train.models.factory import build_model
from lars_train.training.micro_batch import activation_bytes


@pytest.mark.parametrize("samples", [16, 64])
def test_activations_are_those_that_the_allocator_holds_after_a_forward_pass(samples: int) -> None:
    network = build_model("small", num_classes=10, ghost_batch=16, zero_gamma=False).train()
    images = torch.zeros(samples, 3, 32, 32)
    network(images)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        output = network(images)
    held = sum(event.self_cpu_memory_usage for event in recorded.events())
    del output
    # The images are kept for the backward pass, too, and were there before.
    held += images.numel() * images.element_size()
    assert activation_bytes(network, samples, 32) == pytest.approx(held, rel=0.15)


@given(world=st.integers(2, 40), size=st.integers(1, 10**9))
def test_a_ring_is_what_its_messages_take_one_after_another(world: int, size: int) -> None:
    machine = Machine(1.0, None, latency=1e-5, bandwidth=1e9, algorithm="ring")
    seconds = 0.0
    for _phase in ("scatter", "gather"):
        for _step in range(world - 1):
            seconds += 1e-5 + size / world / 1e9
    assert all_reduce_seconds(machine, world, size) == pytest.approx(seconds)


def test_many_devices_are_summed_by_a_tree_and_few_by_a_ring() -> None:
    ring, tree, either = (Machine(1.0, None, 1e-5, 1e10, algorithm=name) for name in ("ring", "tree", "auto"))
    for world, best in ((8, ring), (4096, tree)):
        assert all_reduce_seconds(either, world, 10**8) == all_reduce_seconds(best, world, 10**8)
    # By hand: 2 x 12 messages of 10 microseconds, and 2 x 0.1 GB at 10 GB/s.
    assert all_reduce_seconds(tree, 4096, 10**8) == pytest.approx(24e-5 + 0.02)


def test_what_takes_longest_is_named() -> None:
    def update(input_rate: float | None, bandwidth: float, overlap: float) -> tuple[str, float]:
        machine = Machine(100.0, input_rate, 0.0, bandwidth, overlap, "ring")
        found = update_seconds(machine, 2, samples=200, last=100, size=10**6)
        return found.limit, found.seconds

    assert update(None, 1e6, 0.0) == ("compute", pytest.approx(2 + 1))
    assert update(None, 1e6, 1.0) == ("compute", pytest.approx(2 + 1 - 2 / 3))
    assert update(None, 1e5, 0.0) == ("network", pytest.approx(2 + 10))
    assert update(40.0, 1e6, 0.0) == ("input", pytest.approx(5))


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    points = [
        {"devices": n, "hours": 8 / n, "efficiency": 1.0, "limit": limit}
        for n, limit in ((1, "compute"), (2, "network"))
    ]
    rates = [{"first_update": 1, "last_update": 9, "lr_first": 0.1, "lr_last": 1.0}]
    draw({"scaling": points}, rates, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
