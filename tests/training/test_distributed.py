"""Two, three and four gloo processes train the same run as one process. This file is also their program.

runs/test_same_curve.py tests that runs have the same curve on any number of ranks.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import DictConfig, OmegaConf
from tiny import start
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F

from lars_train.config import Config, resolve
from lars_train.data.open import open_dataset
from lars_train.data.order import epoch_order
from lars_train.errors import ConfigError, DataError
from lars_train.launch import Ranks
from lars_train.models.resnet_cifar import CifarResNet
from lars_train.monitoring.fields import LAYOUT_DEPENDENT_FIELDS
from lars_train.training import checkpoint, distributed, session
from lars_train.training.distributed import Group, begin_job, process_group
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation
from lars_train.training.trainer import Trainer

CPU = torch.device("cpu")
# Two, three and four ranks share the five ghost batches of an update, and the 23 validation samples, unevenly.
TINY: dict[str, Any] = {
    "epochs": 2,
    "log_every": 2,
    "micro_batch": 4,
    "device": "cpu",
    "label_smoothing": 0.1,
    "batch": {"size": 20},
    "recipe": {"rows": {"32k": {}}},
    "data": {
        "name": "synthetic",
        "image_size": 12,
        "augment": "pad_crop",
        "pad": 2,
        "eval_crop": 1.0,
        "train_count": 90,
        "val_count": 23,
        "num_classes": 4,
    },
    "model": {"name": "small", "ghost_batch": 4},
    "optimizer": {"lr": 1.0, "trust_coef": 0.01, "weight_decay": 0.001},
    "schedule": {"warmup_epochs": 0.5},
    "precision": {"name": "fp64"},
    "launch": {"threads": 1},
    "checkpoint": {"every_updates": 3},  # also between two log lines
}
UPDATES = 8
# One update that equals the gradient, on images without augmentation.
GRADIENT: dict[str, Any] = {
    "max_updates": 1,
    "data": {"augment": "none", "flip": False},
    "optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "trust_coef": None},
    "schedule": {"warmup_epochs": 0.0},
}


def configured(*changes: dict[str, Any]) -> Config:
    raw = OmegaConf.merge(OmegaConf.structured(Config), TINY, *changes)
    assert isinstance(raw, DictConfig)
    return resolve(raw)


def train(directory: Path, ranks: Ranks, **changes: Any) -> dict[str, Any]:
    return session.train(prepare(configured(changes, {"run": {"dir": str(directory)}})), ranks, Invocation())


def program(rank: int, folder: Path, port: int) -> None:
    """Run one of the four processes. The higher ranks skip the jobs of fewer ranks."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 4, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in names.items()}, MASTER_ADDR="127.0.0.1")
    results: dict[str, Any] = {}
    for world in (4, 3, 2):
        begin_job()
        if rank < world:
            start = {"model": {"weights": str(folder / "start.pt")}}
            train(folder / f"gradient-{world}", Ranks(rank, world, rank, world), **OmegaConf.merge(GRADIENT, start))
    begin_job()
    three, two = Ranks(rank, 3, rank, 3), Ranks(rank, 2, rank, 2)
    if rank == 3:
        return
    with process_group(three, CPU, 60.0) as group:
        results["collectives"] = collectives(group)
    with counted_reductions() as results["counts"]:
        train(folder / "three", three)
    # Killed with three ranks and continued with two.
    train(folder / "mixed", three, max_updates=3)
    if rank < 2:
        train(folder / "mixed", two)
    begin_job()
    results["waited"] = error_about_hanging_rank(three, folder)
    (folder / f"results-{rank}.json").write_text(json.dumps(results))


def error_about_hanging_rank(ranks: Ranks, folder: Path) -> str:
    """Return the error of a rank other than 1. Rank 1 takes no part until the others have timed out."""
    distributed._TIMEOUT_SPREAD_S = 4.0
    try:
        with process_group(ranks, CPU, 10.0) as group:
            if ranks.rank != 1:
                group.all_reduce_max([0])
            wait_for_other_ranks(folder)
    except RuntimeError as error:
        (folder / f"gave-up-{ranks.rank}").touch()
        # Rank 0 must not end before the others have searched its store for the rank that hangs.
        wait_for_other_ranks(folder)
        return str(error)
    return ""


def wait_for_other_ranks(folder: Path) -> None:
    """Wait until both other ranks have timed out."""
    while len(list(folder.glob("gave-up-*"))) < 2:
        time.sleep(0.05)


def collectives(group: Group) -> dict[str, Any]:
    rank = group.ranks.rank
    values = torch.tensor([1.0, 10.0 * rank])
    group.all_reduce_sum(values)
    outcome: dict[str, Any] = {
        "sum": values.tolist(),
        "minimum": group.all_reduce_min(5 - rank, CPU),
        "from_first": group.broadcast_from_rank0({"token": rank}),
        "gather": group.all_gather([rank]),
        "first": group.first,
    }
    group.raise_on_all_ranks(None)
    for error in (ConfigError("rank 1 has no data"), DataError("rank 2 met a bad image")):
        who = 1 if isinstance(error, ConfigError) else 2
        try:
            group.raise_on_all_ranks(error if rank == who else None)
        except (ConfigError, DataError) as raised:
            outcome[type(raised).__name__] = str(raised)
    return outcome


@contextmanager
def counted_reductions() -> Iterator[dict[str, int]]:
    """Count the gradient reductions of DDP and the micro-batches of this rank within the context."""
    counts = {"reductions": 0, "micro_batches": 0}
    make, step = Trainer.__init__, Trainer.run_update

    def init(trainer: Trainer, *arguments: Any, **keywords: Any) -> None:
        make(trainer, *arguments, **keywords)
        # A lambda, because DDP rejects string annotations of a hook.
        trainer.forward.register_comm_hook(None, lambda state, bucket: reduce(bucket))

    def reduce(bucket: Any) -> Any:
        counts["reductions"] += bucket.is_last()
        assert dist.group.WORLD is not None
        return allreduce_hook(dist.group.WORLD, bucket)

    def run_update(trainer: Trainer, batches: Any, micro_batches: int, *, measure: bool) -> Any:
        counts["micro_batches"] += micro_batches
        return step(trainer, batches, micro_batches, measure=measure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", init)
        patch.setattr(Trainer, "run_update", run_update)
        yield counts


if __name__ == "__main__":
    # Import once, before the forks. Otherwise `process_group` imports it in every rank.
    importlib.import_module("torch._dynamo")
    mp.start_processes(program, (Path(sys.argv[1]), int(sys.argv[2])), nprocs=4, start_method="fork")
    sys.exit()


def plain_network() -> CifarResNet:
    """Return the network with torch's batch norm instead of ghost batch norm."""
    torch.manual_seed(3)
    return CifarResNet(1, num_classes=4)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `program` in four processes, and return the folder with their results."""
    folder = tmp_path_factory.mktemp("together")
    torch.save(plain_network().state_dict(), folder / "start.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(path for path in sys.path if path)
    done = start([sys.executable, __file__, str(folder), str(port)], folder, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Train the same run in this process, and return its directory."""
    threads = torch.get_num_threads()
    directory = tmp_path_factory.mktemp("alone") / "run"
    train(directory, Ranks())
    yield directory
    torch.set_num_threads(threads)


def saved(directory: Path) -> dict[str, Any]:
    found = checkpoint.latest(directory / "checkpoints")
    assert found is not None
    return found[1]


def close(got: Tensor, expected: Tensor, name: str) -> None:
    scale = float(expected.double().abs().max())
    assert float((got.double() - expected.double()).abs().max()) <= 1e-10 * max(scale, 1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_gradient_is_the_global_mean_for_uneven_ranks(world: int, together: Path) -> None:
    network = plain_network().double()
    images, labels = first_global_batch()
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    logits = torch.cat([network(part) for part in torch.split(images, 4)])
    torch.autograd.backward(F.cross_entropy(logits, labels, label_smoothing=0.1))
    after = saved(together / f"gradient-{world}")
    assert (after["update"], after["resolved"]["world"]) == (1, world)
    for name, p in network.named_parameters():
        assert p.grad is not None
        close(start[name] - after["model"][name], p.grad, name)


def first_global_batch() -> tuple[Tensor, Tensor]:
    """Return the normalized images and the labels of the first update of the `GRADIENT` runs."""
    config = configured(GRADIENT)
    source = open_dataset(config.data).train
    samples = epoch_order(config.seed, 0, 90)[:20].tolist()
    pixels = torch.tensor([source.read(sample).tolist() for sample in samples], dtype=torch.float64) / 255
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (config.data.mean, config.data.std))
    images = ((pixels - mean) / std).permute(0, 3, 1, 2)
    return images, torch.tensor([int(source.labels[sample]) for sample in samples])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "firsts"), [(2, (0, 2)), (3, (0, 1, 3)), (4, (0, 1, 2, 3))])
def test_the_noise_scale_uses_the_ranks_first_micro_batches(
    world: int, firsts: tuple[int, ...], together: Path
) -> None:
    """`firsts`: the index of each rank's first ghost batch, of five with four samples. Some ranks have only one."""
    network, rows = plain_network().double(), []
    for images, labels in zip(*(part.split(4) for part in first_global_batch()), strict=True):
        loss = F.cross_entropy(network(images), labels, label_smoothing=0.1)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]))
    each = torch.stack(rows)
    small, big = float(each[list(firsts)].square().sum(1).mean()), float(each.mean(0).square().sum())
    lines = (together / f"gradient-{world}" / "metrics.jsonl").read_text().splitlines()
    (logged,) = (values for values in map(json.loads, lines) if "noise/trace" in values)
    assert logged["noise/grad_sq"] == pytest.approx((20 * big - 4 * small) / 16, rel=1e-9)
    assert logged["noise/trace"] == pytest.approx((small - big) / (1 / 4 - 1 / 20), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["three", "mixed"])
def test_several_ranks_end_with_the_weights_of_one_process(run: str, together: Path, alone: Path) -> None:
    got, expected = saved(together / run), saved(alone)
    assert got["update"] == expected["update"] == UPDATES
    assert got["resolved"]["world"] == {"three": 3, "mixed": 2}[run]
    assert got["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        close(got["model"][name], value, name)
    moved = sum("running" in name and bool((v != v[0]).any()) for name, v in expected["model"].items())
    assert moved > 5  # the model includes batch-norm statistics, which have changed
    for number, state in expected["optimizer"]["state"].items():
        close(got["optimizer"]["state"][number]["momentum_buffer"], state["momentum_buffer"], str(number))


@pytest.mark.slow
def test_several_ranks_log_the_curve_of_one_process(together: Path, alone: Path) -> None:
    got, expected = (
        [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        for directory in (together / "three", alone)
    )
    assert len(got) == len(expected) > UPDATES // 2
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() - LAYOUT_DEPENDENT_FIELDS == theirs.keys() - LAYOUT_DEPENDENT_FIELDS
        for key in ours.keys() - LAYOUT_DEPENDENT_FIELDS:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-10), key
    evaluations = [line for line in got if "val/count" in line]
    assert [line["val/count"] for line in evaluations] == [23, 23]


@pytest.mark.slow
def test_gradients_are_reduced_once_per_update(together: Path) -> None:
    results = [json.loads((together / f"results-{rank}.json").read_text())["counts"] for rank in range(3)]
    assert [t["reductions"] for t in results] == [UPDATES] * 3
    # Five ghost batches, one at a time: rank 0 has one of them, the others two.
    assert [t["micro_batches"] for t in results] == [UPDATES, 2 * UPDATES, 2 * UPDATES]


@pytest.mark.slow
def test_collectives_return_the_same_on_every_rank(together: Path) -> None:
    for rank in range(3):
        results = json.loads((together / f"results-{rank}.json").read_text())["collectives"]
        assert results == {
            "sum": [3.0, 30.0],
            "minimum": 3,
            "from_first": {"token": 0},
            "gather": [[0], [1], [2]],
            "first": rank == 0,
            "ConfigError": "rank 1 has no data",
            "DataError": "rank 2 met a bad image",
        }


@pytest.mark.slow
def test_only_rank_0_writes_into_the_shared_directory(together: Path) -> None:
    for run in ("three", "mixed"):
        assert len(list((together / run / "tensorboard").iterdir())) >= 1
        record = json.loads((together / run / "run.json").read_text())
        assert len(record["started"]) == (2 if run == "mixed" else 1)


def test_a_single_rank_needs_no_process_group() -> None:
    with process_group(Ranks(), CPU, 1.0) as group:
        assert not dist.is_initialized()
        values = torch.ones(2)
        group.all_reduce_sum(values)
        assert values.tolist() == [1, 1]
        assert group.all_reduce_min(7, CPU) == 7
        assert group.broadcast_from_rank0("x") == "x"
        assert group.all_gather("x") == ["x"]
        assert group.first
        group.raise_on_all_ranks(None)
        with pytest.raises(DataError, match="mine"):
            group.raise_on_all_ranks(DataError("mine"))


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(together: Path) -> None:
    messages = [json.loads((together / f"results-{rank}.json").read_text())["waited"] for rank in range(3)]
    expected = f"rank 1 on {platform.node()} did not answer for 10 s (distributed.timeout) and hangs"
    assert expected in messages[0]
    assert expected in messages[2]
