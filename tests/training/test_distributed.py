"""Three processes with gloo train and evaluate together; started by the tests below, this file is their program."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lars_train.config import Config, resolve
from lars_train.errors import ConfigError, DataError
from lars_train.launch import Ranks
from lars_train.training import checkpoint, session
from lars_train.training.distributed import Group, process_group
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation
from lars_train.training.trainer import Trainer

CPU = torch.device("cpu")
# Five ghost batches an update: two and three ranks share them unevenly. 23 validation samples: so do those.
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


def train(directory: Path, ranks: Ranks, **changes: Any) -> dict[str, Any]:
    raw = OmegaConf.merge(OmegaConf.structured(Config), TINY, {"run": {"dir": str(directory)}}, changes)
    assert isinstance(raw, DictConfig)
    return session.train(prepare(resolve(raw)), ranks, Invocation())


def program(rank: int, folder: Path) -> None:
    """What each of the three processes does; rank 2 sits out where there are two."""
    told: dict[str, Any] = {}
    three, two = Ranks(rank, 3, rank, 3), Ranks(rank, 2, rank, 2)
    with process_group(three, CPU, 60.0) as group:
        told["collectives"] = collectives(group)
    with counted_reductions() as told["counts"]:
        train(folder / "three", three)
    # Killed with three ranks and continued with two.
    train(folder / "mixed", three, max_updates=3)
    if rank < 2:
        train(folder / "two", two, micro_batch=8)
        train(folder / "mixed", two)
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


def collectives(group: Group) -> dict[str, Any]:
    rank = group.ranks.rank
    values = torch.tensor([1.0, 10.0 * rank])
    group.sum(values)
    outcome: dict[str, Any] = {
        "sum": values.tolist(),
        "minimum": group.minimum(5 - rank, CPU),
        "from_first": group.from_first({"token": rank}),
        "gather": group.gather([rank]),
        "first": group.first,
    }
    group.together(None)
    for error in (ConfigError("rank 1 has no data"), DataError("rank 2 met a bad image")):
        who = 1 if isinstance(error, ConfigError) else 2
        try:
            group.together(error if rank == who else None)
        except (ConfigError, DataError) as raised:
            outcome[type(raised).__name__] = str(raised)
    return outcome


@contextmanager
def counted_reductions() -> Iterator[dict[str, int]]:
    """Counts, within it, the gradient reductions that DDP finishes and the micro-batches of this rank."""
    counts = {"reductions": 0, "micro_batches": 0}
    make, step = Trainer.__init__, Trainer.run_update

    def init(trainer: Trainer, *arguments: Any, **keywords: Any) -> None:
        make(trainer, *arguments, **keywords)
        # Without annotations, for DDP would compare them with classes.
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
    torch.set_num_threads(1)
    program(int(os.environ["RANK"]), Path(sys.argv[1]))
    sys.exit()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which three processes have run `program`."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = []
    for rank in range(3):
        ranks = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 3, "OMP_NUM_THREADS": 1}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {key: str(value) for key, value in ranks.items()}
        launched.append(
            subprocess.Popen(
                [sys.executable, __file__, str(folder)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        for process in launched:
            _, error = process.communicate(timeout=100)
            assert process.returncode == 0, error
    finally:
        for process in launched:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same run in this process."""
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
@pytest.mark.parametrize("run", ["three", "two", "mixed"])
def test_ranks_together_end_with_the_weights_of_one(run: str, together: Path, alone: Path) -> None:
    got, expected = saved(together / run), saved(alone)
    assert got["update"] == expected["update"] == UPDATES
    assert got["resolved"]["world"] == {"three": 3, "two": 2, "mixed": 2}[run]
    assert got["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        close(got["model"][name], value, name)
    moved = sum("running" in name and bool((v != v[0]).any()) for name, v in expected["model"].items())
    assert moved > 5  # batch-norm statistics are among them, and are not as they began
    for number, state in expected["optimizer"]["state"].items():
        close(got["optimizer"]["state"][number]["momentum_buffer"], state["momentum_buffer"], str(number))


@pytest.mark.slow
@pytest.mark.parametrize("run", ["three", "two"])
def test_ranks_together_log_the_curve_of_one(run: str, together: Path, alone: Path) -> None:
    got, expected = (
        [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        for directory in (together / run, alone)
    )
    assert len(got) == len(expected) > UPDATES // 2
    timed = {"train/images_per_s", "train/wait_share", "val/seconds"}
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - timed:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-10), key
    evaluations = [line for line in got if "val/count" in line]
    assert [line["val/count"] for line in evaluations] == [23, 23]


@pytest.mark.slow
def test_gradients_are_reduced_once_per_update(together: Path) -> None:
    told = [json.loads((together / f"told-{rank}.json").read_text())["counts"] for rank in range(3)]
    assert [t["reductions"] for t in told] == [UPDATES] * 3
    # Five ghost batches, one a time: the first rank has one of them, the others two.
    assert [t["micro_batches"] for t in told] == [UPDATES, 2 * UPDATES, 2 * UPDATES]


@pytest.mark.slow
def test_collectives_give_every_rank_the_same(together: Path) -> None:
    for rank in range(3):
        told = json.loads((together / f"told-{rank}.json").read_text())["collectives"]
        assert told == {
            "sum": [3.0, 30.0],
            "minimum": 3,
            "from_first": {"token": 0},
            "gather": [[0], [1], [2]],
            "first": rank == 0,
            "ConfigError": "rank 1 has no data",
            "DataError": "rank 2 met a bad image",
        }


@pytest.mark.slow
def test_only_the_first_rank_writes_into_the_shared_directory(together: Path) -> None:
    for run in ("three", "two", "mixed"):
        assert len(list((together / run / "tensorboard").iterdir())) >= 1
        record = json.loads((together / run / "run.json").read_text())
        assert len(record["started"]) == (2 if run == "mixed" else 1)


def test_one_rank_alone_needs_no_process_group() -> None:
    with process_group(Ranks(), CPU, 1.0) as group:
        assert not dist.is_initialized()
        values = torch.ones(2)
        group.sum(values)
        assert values.tolist() == [1, 1]
        assert group.minimum(7, CPU) == 7
        assert group.from_first("x") == "x"
        assert group.gather("x") == ["x"]
        assert group.first
        group.together(None)
        with pytest.raises(DataError, match="mine"):
            group.together(DataError("mine"))
