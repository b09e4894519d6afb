"""LARS over DTensors, FSDP2 and DDP: shards step like the whole, with one collective for all norms.

A fixture runs this file as a program in two processes.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import socket
import subprocess
import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bases import (
    BASES,
    DECAYS,
    OPTIONS,
    UPDATES,
    Base,
    Matrices,
    assert_close,
    every_base,
    groups_of,
    no_warnings,
    rescale_by_hand,
    rescaled,
    sharded_weights,
    wide,
)
from torch import Tensor, nn
from torch.nn import Parameter

from lars_train import LARS

pytestmark = no_warnings
ROOT = Path(__file__).parents[2]


def stepped(optimizer: Any, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    def closure() -> Tensor:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        return torch.tensor(1.0)

    optimizer.step(closure)


def on_two_ranks(base: Base, mesh: Any, wrap: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return the weights after some updates of shards, and the collectives of each update, or the error."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    def shard(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    weights, grads = sharded_weights()
    params = [Parameter(shard(w)) for w in weights]
    optimizer: Any = base.build(groups_of(base, params))
    if wrap:
        optimizer = LARS(optimizer, **(OPTIONS | options))
    counts = []
    try:
        for update in range(UPDATES):
            shards = [shard(grad) for grad in grads[update]]
            with CommDebugMode() as seen:
                stepped(optimizer, params, shards)
            counts.append({str(k): v for k, v in seen.get_comm_counts().items()})
    except Exception as error:
        decays = [g.get("weight_decay", 0.0) for g in optimizer.param_groups]
        return {"error": type(error).__name__, "decays": decays}
    full: list[Any] = [p.full_tensor() for p in params]  # type: ignore[attr-defined]
    return {"weights": [w.detach().tolist() for w in full], "counts": counts}


def fsdp_on_two_ranks(base: Base, mesh: Any, rank: int) -> dict[str, Any]:
    """Train a model whose parameters FSDP2 shards, each rank on its half of the batch."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    model = Matrices()
    fully_shard(model, mesh=mesh)
    lars = base.lars(model.parameters())
    counts = []
    for update in range(UPDATES):
        lars.zero_grad()
        model(fsdp_batch(update)[rank::2]).square().sum().backward()
        with CommDebugMode() as seen:
            lars.step()
        counts.append({str(k): v for k, v in seen.get_comm_counts().items()})
    full: list[Any] = [p.full_tensor() for p in model.parameters()]  # type: ignore[attr-defined]
    return {"weights": [w.detach().tolist() for w in full], "counts": counts}


def ddp_on_two_ranks(base: Base, rank: int) -> list[list[float]]:
    """Train a model with DDP, each rank on its half of the batch, with one synchronization for two backward passes."""
    model = Matrices()
    ddp = nn.parallel.DistributedDataParallel(model)
    lars = base.lars(model.parameters())
    for update in range(UPDATES):
        lars.zero_grad()
        with ddp.no_sync():
            ddp(fsdp_batch(update)[rank::2]).square().sum().backward()
        ddp(fsdp_batch(update + 1)[rank::2]).square().sum().backward()
        lars.step()
    return [p.tolist() for p in model.parameters()]


def fsdp_batch(update: int) -> Tensor:
    return torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3) * (1 + update)


DDP_BASES = ("SGD", "AdamW")
SHARDED_OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "lr-inside": {"lr_placement": "inside"}}
SHARDED = [(base, name) for base in BASES for name in SHARDED_OPTIONS if name == "default" or base.follows_the_gradient]


def run_example(rank: int, port: str) -> dict[str, Any]:
    """Run examples/fsdp.py as torchrun does. Return the weights that it would save."""
    settings = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(settings)
    sys.path.insert(0, str(ROOT / "packaging" / "torch-lars"))
    warnings.simplefilter("default")  # torch before 2.11 warns of a mesh of CPUs
    weights: dict[str, Tensor] = runpy.run_path(str(ROOT / "examples" / "fsdp.py"))["weights"]
    return {name: value.tolist() for name, value in weights.items()}


def program(rank: int, folder: Path, port: str) -> None:
    """Run everything that one of the two processes does, and write the results."""
    from torch.distributed.device_mesh import init_device_mesh

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), world_size=2, rank=rank)
    results: dict[str, Any] = {}
    try:
        mesh = init_device_mesh("cpu", (2,))
        for base in BASES:
            results[base.name] = {"alone": on_two_ranks(base, mesh, False, {})}
            for name in [name for other, name in SHARDED if other is base]:
                results[base.name][name] = on_two_ranks(base, mesh, True, SHARDED_OPTIONS[name])
            if base.kind is torch.optim.AdamW:
                results["of the step"] = on_two_ranks(base, mesh, True, {"ratio_of": "step"})
            if "error" not in results[base.name]["alone"]:
                results[base.name]["fsdp"] = fsdp_on_two_ranks(base, mesh, rank)
            if base.name in DDP_BASES:
                results[base.name]["ddp"] = ddp_on_two_ranks(base, rank)
    finally:
        dist.destroy_process_group()
    results["example"] = run_example(rank, port)
    (folder / f"results-{rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, __file__, str(folder), str(port)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(2)]


ALL_REDUCE = "c10d.allreduce_"


@pytest.mark.slow
@pytest.mark.parametrize(("base", "options"), SHARDED, ids=lambda it: getattr(it, "name", it))
def test_dtensor_shards_step_like_the_whole_with_one_collective(
    two_ranks: list[dict[str, Any]], base: Base, options: str
) -> None:
    alone, seen = two_ranks[0][base.name]["alone"], two_ranks[0][base.name][options]
    assert seen == two_ranks[1][base.name][options]
    if "error" in alone:
        # torch itself cannot step these shards. LARS fails in the same way, and no setting is lost.
        assert seen == alone
        return
    weights, grads = sharded_weights()
    plain = [Parameter(w) for w in weights]
    reference = base.alone(groups_of(base, plain))
    for group in reference.param_groups:
        group |= {"weight_decay": 0.0} if base.takes("weight_decay") else {}
        group["lr"] = 1.0 if options == "lr-inside" else group["lr"]
    for update in range(UPDATES):
        grads_by_rule = [
            torch.from_numpy(rescaled(wide(p), wide(g), decay if base.takes("weight_decay") else 0.0))
            for p, g, decay in zip(plain, grads[update], DECAYS, strict=True)
        ]
        inside = base.keywords["lr"] if options == "lr-inside" else 1.0
        stepped(reference, plain, [inside * grad for grad in grads_by_rule])
    assert_close([torch.tensor(w, dtype=torch.float64) for w in seen["weights"]], plain, base.tolerance)
    for with_lars, without in zip(seen["counts"], alone["counts"], strict=True):
        assert with_lars == without | {ALL_REDUCE: without.get(ALL_REDUCE, 0) + 1}


@pytest.mark.slow
def test_steps_of_shards_are_scaled_with_one_collective(two_ranks: list[dict[str, Any]]) -> None:
    seen, alone = two_ranks[0]["of the step"], two_ranks[0]["AdamW"]["alone"]
    assert seen == two_ranks[1]["of the step"]
    base = next(base for base in BASES if base.kind is torch.optim.AdamW)
    weights, grads = sharded_weights()
    whole = [Parameter(w) for w in weights]
    reference = LARS(base.build(groups_of(base, whole)), ratio_of="step", **OPTIONS)
    for update in range(UPDATES):
        stepped(reference, whole, grads[update])
    assert_close([torch.tensor(w, dtype=torch.float64) for w in seen["weights"]], whole, base.tolerance)
    for with_lars, without in zip(seen["counts"], alone["counts"], strict=True):
        assert with_lars == without | {ALL_REDUCE: without.get(ALL_REDUCE, 0) + 1}


@pytest.mark.slow
def test_torch_can_step_shards_of_most_bases(two_ranks: list[dict[str, Any]]) -> None:
    stepped = {name for name, found in two_ranks[0].items() if "error" not in found.get("alone", "error")}
    assert {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "ASGD", "RMSprop"} <= stepped


@pytest.mark.slow
@every_base
def test_fsdp2_trains_like_one_process_with_one_collective(two_ranks: list[dict[str, Any]], base: Base) -> None:
    if "error" in two_ranks[0][base.name]["alone"]:
        pytest.skip(f"torch itself cannot step shards with {base.name}")
    seen = two_ranks[0][base.name]["fsdp"]
    assert seen["weights"] == two_ranks[1][base.name]["fsdp"]["weights"]
    model = Matrices()
    reference = base.alone(model.parameters())
    for update in range(UPDATES):
        reference.zero_grad()
        # FSDP2 averages the gradients of the ranks.
        (model(fsdp_batch(update)).square().sum() / 2).backward()
        rescale_by_hand(reference, [base.decay])
        reference.step()
    assert_close(
        [torch.tensor(w, dtype=torch.float64) for w in seen["weights"]], list(model.parameters()), base.tolerance
    )
    assert [count[ALL_REDUCE] for count in seen["counts"]] == [1] * UPDATES


@pytest.mark.slow
@pytest.mark.parametrize("name", DDP_BASES)
def test_ddp_trains_like_one_process(two_ranks: list[dict[str, Any]], name: str) -> None:
    seen = two_ranks[0][name]["ddp"]
    assert seen == two_ranks[1][name]["ddp"]
    base = next(base for base in BASES if base.name == name)
    model = Matrices()
    reference = base.alone(model.parameters())
    for update in range(UPDATES):
        reference.zero_grad()
        # DDP averages the gradients of the ranks.
        for batch in (fsdp_batch(update), fsdp_batch(update + 1)):
            (model(batch).square().sum() / 2).backward()
        rescale_by_hand(reference, [base.decay])
        reference.step()
    assert_close([torch.tensor(w, dtype=torch.float64) for w in seen], list(model.parameters()), base.tolerance)


@pytest.mark.slow
def test_the_fsdp_example_trains_like_one_process(two_ranks: list[dict[str, Any]]) -> None:
    # The example without FSDP2, in plain torch.
    torch.manual_seed(0)
    images = torch.randn(2048, 64)
    labels = (images @ torch.randn(64, 10)).argmax(1)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 10))
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    adapted = [model[0].weight, model[3].weight]
    others = [p for p in model.parameters() if p is not adapted[0] and p is not adapted[1]]
    groups: Any = [{"params": adapted, "lr": 8.0, "weight_decay": 1e-4}, {"params": others, "lr": 0.1}]
    optimizer = LARS(torch.optim.SGD([groups[0], groups[1] | {"exclude": True}], momentum=0.9))
    peaks, update = [8.0, 0.1], 0
    for _ in range(3):
        for batch in torch.randperm(2048).split(256):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                cosine = (1 + math.cos(math.pi * (update - 2) / 22)) / 2
                group["lr"] = peak * ((update + 1) / 2 if update < 2 else cosine)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            update += 1
    for seen in (ranks["example"] for ranks in two_ranks):
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(torch.tensor(seen[name]), weight, rtol=1e-3, atol=1e-5)
            assert not torch.allclose(weight, start[name], rtol=1e-2, atol=1e-4)


if __name__ == "__main__":
    # Import once, before the fork of both ranks.
    import torch.distributed.fsdp
    import torch.distributed.tensor.debug

    mp.start_processes(program, (Path(sys.argv[1]), sys.argv[2]), nprocs=2, start_method="fork")
