"""Ranks exchange gradients once per update, counted in bytes on the wire, and in bfloat16 if configured.

This file is also the program of the ranks. The wire is the loopback interface of a network namespace without any
other traffic.
"""

from __future__ import annotations

import copy
import fcntl
import importlib
import itertools
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tape import Tape
from tiny import environment
from torch import Tensor, nn
from torch.nn import functional as F

from lars_train.data.loading.loader import Batch
from lars_train.data.order import micro_bounds
from lars_train.launch import Ranks
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.ema import ExponentialMovingAverage
from lars_train.models.losses import TrainingLoss
from lars_train.optim.lars import LARS
from lars_train.run_plan import Plan
from lars_train.training.device import Precision
from lars_train.training.device_prefetch import RankContext
from lars_train.training.distributed import BF16, NONE, GradientBuckets, Group, process_group, wrap_in_ddp
from lars_train.training.trainer import Hyper, Trainer

WORLD, ACCUMULATION, UPDATES = 2, 3, 4
CPU = torch.device("cpu")
WIDTH = 1500
KINDS = {"none": (NONE, False), "bf16": (BF16, False), "none, graphs": (NONE, True), "bf16, graphs": (BF16, True)}
"""Compression, and if passes are recorded."""
UNEVEN = (9, 5, 2)
"""Global batches that are 5, 3 and 1 ghost batches; the last ones of the first two have a single image."""
NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]
# From linux/sockios.h and linux/if.h.
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def network() -> nn.Module:
    """Return a fast network with 2.3 million parameters and a batch norm, whose statistics are sent too."""
    torch.manual_seed(0)
    wide = [nn.Flatten(), nn.Linear(48, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4)]
    return nn.Sequential(GhostBatchNorm2d(3, ghost_batch=2), *wide)


def images(rank: int, update: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(100 * rank + update)
    labels = torch.randint(4, (ACCUMULATION, 2), generator=draw)
    pixels = torch.randint(256, (ACCUMULATION, 2, 3, 4, 4), dtype=torch.uint8, generator=draw)
    return [Batch(x, y, ()) for x, y in zip(pixels, labels, strict=True)]


def plan() -> Plan:
    batch = WORLD * ACCUMULATION * 2
    return Plan(1000, batch, batch, 2, False, False, 1, UPDATES, UPDATES, UPDATES, 0)


def trained(rank: int, compression: str, base: Any, *, taped: bool) -> tuple[Trainer, list[int]]:
    """Return a trainer after its updates, and the bytes on the wire after each update."""
    sent = []
    with process_group(Ranks(rank, WORLD, rank, WORLD), CPU, 60.0) as group:
        model = network()
        if taped and rank:  # the ranks begin with rank 0's weights
            nn.init.zeros_(model[2].weight)
        trainer = Trainer(
            model,
            base(model),
            plan(),
            Hyper(lambda update: 0.1, TrainingLoss()),
            RankContext(CPU, group, Precision("fp32", torch.float32, torch.float32), lambda x: x.float() / 255),
            bucket_mb=4.0,
            recorder=Tape(model) if taped else None,
            compression=compression,
        )
        for update in range(UPDATES):
            trainer.run_update(iter(images(rank, update)), ACCUMULATION, measure=False)
            group.all_reduce_max([0])  # a barrier: all ranks have sent everything
            sent.append(on_the_wire())
            group.all_reduce_max([0])
    return trainer, sent


def uneven(group: Group, batch: int, *, start: int = 0) -> Trainer:
    """Return a trainer of global batches whose ghost batches of 2 the ranks cannot share equally.

    It records passes if there are several ranks. The network has a frozen layer, buffers and an average of the weights.
    `start` changes all of its values.
    """
    torch.manual_seed(start)
    frozen = nn.Conv2d(6, 6, 1).requires_grad_(False)
    last = [nn.Conv2d(6, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 4)]
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), GhostBatchNorm2d(6, ghost_batch=2), nn.ReLU(), frozen, *last)
    model = model.double().to(memory_format=torch.channels_last).train()
    model[1].running_mean.fill_(start)
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.01)
    return Trainer(
        model,
        LARS(base, trust_coef=0.1),
        Plan(1000, batch, batch, 2, False, False, 1, UPDATES, UPDATES, UPDATES, 0),
        Hyper(lambda update: 1 / (1 + update), TrainingLoss(0.1), clip_grad_norm=0.05),
        RankContext(CPU, group, Precision("fp64", torch.float64, torch.float64), channels_last),
        ema=ExponentialMovingAverage(model, 0.9, 0),
        recorder=Tape(model) if group.ranks.world > 1 else None,
        bucket_mb=0.0005,
    )


def channels_last(images: Tensor) -> Tensor:
    return (images.double() / 255).contiguous(memory_format=torch.channels_last)


def advance(trainer: Trainer, batch: int, updates: range) -> dict[str, Any]:
    """Make the updates, and return the trainer's state."""
    ranks = trainer.group.ranks
    bounds = micro_bounds(batch, 2, 1, ranks.rank, ranks.world)
    for update in updates:
        draw = torch.Generator().manual_seed(update)
        pixels = torch.randint(256, (batch, 3, 4, 4), dtype=torch.uint8, generator=draw)
        labels = torch.randint(4, (batch,), generator=draw)
        own = [Batch(pixels[a:b], labels[a:b], ()) for a, b in bounds]
        trainer.run_update(iter(own), len(own), measure=update % 2 == 0)
    return copy.deepcopy(trainer.state())


def on_the_wire() -> int:
    """Return the bytes that the loopback interface has sent, with headers."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise AssertionError("no loopback interface in /proc/net/dev")


def rank(number: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    names = {"RANK": number, "WORLD_SIZE": WORLD, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in names.items()}, MASTER_ADDR="127.0.0.1")
    results: dict[str, Any] = {}
    for kind, (compression, taped) in KINDS.items():
        _, results[kind] = trained(
            number, compression, lambda m: LARS(torch.optim.SGD(m.parameters(), lr=0.1)), taped=taped
        )
        trainer, _ = trained(number, compression, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), taped=taped)
        torch.save(trainer.network.state_dict(), Path(folder) / f"{kind}-{number}.pt")
    (Path(folder) / f"results-{number}.json").write_text(json.dumps(results))
    for batch in UNEVEN:
        with process_group(Ranks(number, WORLD, number, WORLD), CPU, 60.0) as group:
            half = advance(uneven(group, batch, start=number), batch, range(6))
            resumed = uneven(group, batch, start=2 + number)
            resumed.restore(half)
            torch.save(advance(resumed, batch, range(6, 10)), Path(folder) / f"uneven-{batch}-{number}.pt")


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))


if __name__ == "__main__":
    loopback_up()
    # Import once, before the forks. Otherwise DDP imports it in every rank.
    importlib.import_module("torch._dynamo")
    mp.start_processes(rank, (sys.argv[1], 29500), nprocs=WORLD, start_method="fork")
    sys.exit()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the ranks. Return the folder of their results."""
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], check=False).returncode:
        pytest.skip("cannot create a network namespace")
    folder = tmp_path_factory.mktemp("together")
    done = subprocess.run(
        [*NAMESPACE, sys.executable, __file__, str(folder)],
        env=environment(PYTHONPATH=os.pathsep.join(path for path in sys.path if path)),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_sends_no_more_than_one_ring_all_reduce(kind: str, together: Path) -> None:
    sent = json.loads((together / "results-0.json").read_text())[kind]
    gradients = (2 if KINDS[kind][0] == BF16 else 4) * sum(p.numel() for p in network().parameters())
    # Each of W ranks sends 2 (W - 1) / W of the gradients (Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002).
    ring = 2 * (WORLD - 1) * gradients
    # From the second update on, buckets have another order. On a busy machine, TCP resends some packets.
    each = [after - before for before, after in itertools.pairwise(sent[1:])]
    assert ring <= min(each) <= 1.01 * ring


@pytest.fixture
def alone() -> Iterator[None]:
    """Open a process group with one rank."""
    importlib.import_module("torch._dynamo")  # see `process_group`
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_are_views_of_their_buckets(alone: None) -> None:
    model = network()
    parallel = wrap_in_ddp(model, CPU, bucket_mb=25.0)
    # From the second pass on, torch fills its buckets in another order.
    for _ in range(2):
        parallel(torch.zeros(2, 3, 4, 4)).sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(grads) == len(list(model.parameters()))
        blocks = {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in grads}
        assert len(blocks) <= 2 < len(grads)
        assert sum(blocks.values()) == sum(g.numel() * g.element_size() for g in grads)


def test_gradients_of_graphs_have_the_strides_of_parameters(alone: None) -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    kernels = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    model = nn.Sequential(kernels, frozen, nn.Linear(300, 1000), nn.Linear(4, 4, dtype=torch.float64))
    GradientBuckets(model, bucket_mb=1.0)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [(g.shape, g.stride(), g.dtype) for g in grads] == [(p.shape, p.stride(), p.dtype) for p in trained]
    # Neighbors share a bucket of at most 1 MiB and one dtype. The third one is larger.
    blocks = [g.untyped_storage() for g in grads]
    assert [block.data_ptr() == blocks[0].data_ptr() for block in blocks[:3]] == [True, True, False]
    sizes = {block.data_ptr(): block.nbytes() for block in blocks}
    assert sum(sizes.values()) == sum(g.numel() * g.element_size() for g in grads)


@pytest.mark.slow
@pytest.mark.parametrize("batch", UNEVEN)
def test_uneven_ranks_with_graphs_train_like_one_rank(batch: int, together: Path) -> None:
    expected = advance(uneven(Group(Ranks()), batch), batch, range(10))
    for number in range(WORLD):
        got = torch.load(together / f"uneven-{batch}-{number}.pt")
        for name in ("model", "ema"):
            torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12)
        assert got["update"] == 10


def gradient(state: dict[str, Tensor], model: nn.Module, numbers: range, update: int) -> list[Tensor]:
    """Return the gradients, in float64, of these ranks' share of the mean loss over the global batch."""
    model.load_state_dict(state)
    model.double().train().zero_grad()
    for number in numbers:
        for batch in images(number, update):
            logits = model(batch.images.double() / 255)
            (F.cross_entropy(logits, batch.labels, reduction="sum") / plan().global_batch).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_gradients_are_sums_of_rounded_gradients(kind: str, together: Path) -> None:
    compression = KINDS[kind][0]
    weights = [p.detach().double() for p in network().parameters()]
    reference = network()
    for update in range(UPDATES):
        state = reference.state_dict()
        for name, value in zip([n for n, _ in reference.named_parameters()], weights, strict=True):
            state[name] = value
        parts = [gradient(state, reference, range(r, r + 1), update) for r in range(WORLD)]
        if compression == BF16:
            parts = [[g.bfloat16().double() for g in part] for part in parts]
            sums = [sum(gs).bfloat16().double() for gs in zip(*parts, strict=True)]  # type: ignore[union-attr]
        else:
            sums = [sum(gs) for gs in zip(*parts, strict=True)]  # type: ignore[misc]
        weights = [w - 0.1 * g for w, g in zip(weights, sums, strict=True)]
    got = [torch.load(together / f"{kind}-{r}.pt") for r in range(WORLD)]
    for name, expected in zip([n for n, _ in reference.named_parameters()], weights, strict=True):
        assert torch.equal(got[0][name], got[1][name]), name
        start = dict(network().named_parameters())[name].detach()
        moved, target = got[0][name].double() - start, expected - start
        # A rounding to bfloat16 may go the other way; float32 sums differ far less.
        tolerance = 2.0**-7 if compression == BF16 else 1e-4
        assert float((moved - target).norm()) <= tolerance * float(target.norm()), name
