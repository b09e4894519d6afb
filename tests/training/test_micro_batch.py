"""The micro-batch follows from the free memory: estimated on the CPU, found by trial on a GPU."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lars_train.models.factory import build_model
from lars_train.training import device
from lars_train.training.device import (
    MOST_SAMPLES,
    activation_bytes,
    choose_precision,
    estimate_ghosts,
    free_memory,
    kept_tensors,
    try_micro_batch,
)


def kept_for_backward(model: nn.Module, samples: int, image_size: int) -> int:
    """Return the bytes of the distinct memory blocks, without parameters, that a real forward pass on the CPU keeps."""
    blocks = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: list[Tensor] = []
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in blocks:
            blocks.add(storage.data_ptr())
            alive.append(tensor.detach())  # so that no later block gets the same address
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(torch.rand(samples, 3, image_size, image_size))
    assert output.requires_grad
    return total


@pytest.mark.parametrize(("name", "size", "samples"), [("resnet18", 64, 4), ("small", 28, 32), ("small", 16, 4)])
def test_activation_bytes_matches_a_real_forward_pass(name: str, size: int, samples: int) -> None:
    model = build_model(name, num_classes=10, ghost_batch=samples, zero_gamma=False)
    real = kept_for_backward(model, samples, size)
    assert activation_bytes(model, samples, size) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("ghost_batch", [1, 4])
def test_counts_on_the_meta_device_are_those_on_the_cpu(ghost_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("resnet18", num_classes=10, ghost_batch=ghost_batch, zero_gamma=False)
    found = []
    for name in ("cpu", "meta"):
        monkeypatch.setattr(device, "device_to_count_on", lambda name=name: name)
        found.append(kept_tensors(model, 4, 64))
    assert found[0] == found[1]


def test_counting_activations_leaves_the_model_unchanged() -> None:
    model = build_model("small", num_classes=10, ghost_batch=4, zero_gamma=False).double().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    in_float64 = activation_bytes(model, 4, 16)
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert in_float64 == activation_bytes(model.float(), 4, 16)


def fitting(**changes: Any) -> int:
    settings: dict[str, Any] = {"ghost_batch": 4, "image_size": 16, "ghosts": 1000, "free": 1 << 40, "local_world": 1}
    settings |= changes
    model = build_model("small", num_classes=10, ghost_batch=settings["ghost_batch"], zero_gamma=False)
    return estimate_ghosts(model, **settings)


def test_the_micro_batch_is_bounded_on_every_side() -> None:
    assert fitting() == MOST_SAMPLES // 4
    assert fitting(ghosts=5) == 5
    assert fitting(free=0) == 1
    assert fitting(ghost_batch=2 * MOST_SAMPLES) == 1


def test_the_micro_batch_follows_the_shared_free_memory() -> None:
    model = build_model("small", num_classes=10, ghost_batch=4, zero_gamma=False)
    ghost = activation_bytes(model, 4, 16)
    share = device.SHARE_OF_FREE_MEMORY
    assert fitting(free=int(10.5 * ghost / share)) == 10
    assert fitting(free=int(10.5 * ghost / share), local_world=2) == 5
    assert fitting(free=int(10.5 * ghost / share), local_world=100) == 1


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc, which only Linux has")
def test_free_memory_is_positive_and_below_the_total() -> None:
    free = free_memory()
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    assert 0 < free <= total


def test_free_memory_respects_the_control_group_and_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 100 kB\nMemAvailable:   60 kB\n",
        "/sys/fs/cgroup/memory.max": "50000\n",
        "/sys/fs/cgroup/memory.current": "20000\n",
        "/sys/fs/cgroup/memory.stat": "anon 12000\ninactive_file 5000\n",
    }

    def read(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)
    assert free_memory() == 35000  # cached pages of files can be freed
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_memory() == 60 * 1024
    files["/sys/fs/cgroup/memory.max"] = "100\n"
    assert free_memory() == 0
    del files["/sys/fs/cgroup/memory.max"]
    assert free_memory() == 60 * 1024
    files.clear()
    assert free_memory() > 1 << 30


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_trial_leaves_the_model_unchanged(name: str) -> None:
    model = build_model("small", num_classes=10, ghost_batch=4, zero_gamma=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try_micro_batch(model, 8, 16, choose_precision(name, torch.device("cpu")), torch.device("cpu"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_trial_keeps_the_activations_of_all_passes() -> None:
    class Counting(nn.Linear):
        """Counts the inputs that are alive during each pass."""

        inputs: ClassVar[list[weakref.ref[Tensor]]] = []

        def forward(self, input: Tensor) -> Tensor:
            alive.append(sum(other() is not None for other in self.inputs) + 1)
            own = input.flatten(1) * 2
            self.inputs.append(weakref.ref(own))
            return super().forward(own)

    alive: list[int] = []
    fp32 = choose_precision("fp32", torch.device("cpu"))
    try_micro_batch(Counting(48, 2), 8, 4, fp32, torch.device("cpu"), passes=2)
    assert alive == [1, 2]
    assert [other() for other in Counting.inputs] == [None, None]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_trial_that_is_too_large_frees_its_memory() -> None:
    device = torch.device("cuda")
    model = build_model("resnet50", num_classes=1000, ghost_batch=32, zero_gamma=False)
    # The workspace of cuBLAS stays, whichever test called it first.
    try_micro_batch(model, 32, 224, choose_precision("fp32", device), device)
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError):
        try_micro_batch(model, 1 << 20, 224, choose_precision("fp32", device), device)
    try_micro_batch(model, 32, 224, choose_precision("fp32", device), device)
    assert torch.cuda.memory_allocated() == before


def test_transposed_weights_are_not_counted_as_activations() -> None:
    # torch's linear layer keeps its weight transposed, and its input: 3 * 16 * 16 numbers per image.
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1000))
    assert activation_bytes(model, 8, 16) == 8 * 3 * 16 * 16 * 4
