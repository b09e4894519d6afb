"""A run on a store at a URL equals the run on a local copy, for any cache size, also after a kill."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tiny import ALONE, begin, final, losses, ran

from lars_train.config import Config, config_dir, register, resolve
from lars_train.data.sources.remote import RemoteSource
from lars_train.errors import ConfigError, DataError
from lars_train.launch import Ranks
from lars_train.monitoring.fields import TIMING_FIELDS
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import Request, pack, silent
from lars_train.training import session
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation

pytest.importorskip("fsspec")

# 6 updates per epoch from 20 shards in 10 windows; 3 ghost batches per update.
TINY: dict[str, Any] = {
    "epochs": 2,
    "log_every": 1,
    "device": "cpu",
    "batch": {"size": 12},
    "micro_batch": 4,
    "recipe": {"rows": {"32k": {}}},
    "data": {
        **{"name": "folder", "image_size": 8, "augment": "pad_crop", "pad": 1, "eval_crop": 1.0},
        **{"order": "shards", "window_shards": 2, "workers": 0},
    },
    "model": {"name": "small", "ghost_batch": 4},
    "optimizer": {"lr": 0.5},
    "schedule": {"warmup_epochs": 0.5},
    "precision": {"name": "fp32"},
    "launch": {"threads": 1},
    "checkpoint": {"every_updates": 4, "keep": 100},
}


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_store(folder: Path, shards: int = 20) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 6)):
        for name in "ab":
            (folder / "data" / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
                (folder / "data" / split / name / f"{number}.png").write_bytes(file.getvalue())
    pack(Request(str(folder / "data"), str(folder / f"store{shards}"), Encoding(), shards=shards), silent)
    return folder / f"store{shards}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"))


def config(directory: Path, root: object, **changes: Any) -> Config:
    raw = OmegaConf.merge(OmegaConf.structured(Config), TINY, {"run": {"dir": str(directory)}})
    OmegaConf.update(raw, "data.root", str(root))
    for key, value in changes.items():
        OmegaConf.update(raw, key.replace("__", "."), value)
    assert isinstance(raw, DictConfig)
    return resolve(raw)


def train(directory: Path, root: object, **changes: Any) -> dict[str, Any]:
    return session.train(prepare(config(directory, root, **changes)), Ranks(), Invocation())


def results(directory: Path) -> list[dict[str, Any]]:
    """Return the log lines without measured times."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in lines]


@pytest.fixture(scope="module")
def local_run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on the local store."""
    directory = tmp_path_factory.mktemp("copy") / "run"
    train(directory, store)
    return directory


def smallest_cache(tmp_path: Path, store: Path, **changes: Any) -> float:
    """Return the cache size that a run requires, from its own error message."""
    settings = {"data__cache_dir": str(tmp_path / "cache"), "data__cache_gb": 0.00003, **changes}
    with pytest.raises(ConfigError) as caught:
        prepare(config(tmp_path / "least", f"file://{store}", **settings))
    found = re.search(r"set data\.cache_gb=(\S+) or more", str(caught.value))
    assert found, caught.value
    return float(found[1])


def test_a_run_on_a_url_equals_the_run_on_a_copy(store: Path, local_run: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    limit = smallest_cache(tmp_path, store)
    assert limit * 1e9 < 0.85 * sum(path.stat().st_size for path in store.rglob("*.tar"))
    seen, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            # The cache may change while its sizes are read, so count only sizes that a second reading confirms.
            with contextlib.suppress(FileNotFoundError):
                files = [path for path in cache.rglob("*") if path.is_file()]
                sizes = [path.stat().st_size for path in files]
                if [path.stat().st_size for path in files] == sizes:
                    seen.append(sum(sizes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    train(tmp_path / "run", f"file://{store}", data__cache_dir=str(cache), data__cache_gb=limit)
    ended.set()
    watcher.join()
    assert results(tmp_path / "run") == results(local_run)
    assert final(tmp_path / "run")["weights_sha256"] == final(local_run)["weights_sha256"]
    assert 0.5 * limit * 1e9 < max(seen) <= limit * 1e9


def test_another_shard_window_gives_another_curve(store: Path, local_run: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", store, data__window_shards=3, max_updates=2)
    assert losses(tmp_path / "run") != losses(local_run)[:2]


def test_a_checkpoint_moves_between_a_copy_and_the_url(store: Path, local_run: Path, tmp_path: Path) -> None:
    settings = {"data__cache_dir": str(tmp_path / "cache")}
    path = str(local_run / "checkpoints/update-000000004.pt")
    train(tmp_path / "run", f"file://{store}", checkpoint__path=path, **settings)
    assert final(tmp_path / "run")["weights_sha256"] == final(local_run)["weights_sha256"]
    requested = config(tmp_path / "x", f"file://{store}", mode="evaluate", checkpoint__path=str(local_run), **settings)
    chosen, content = session.evaluation_config(requested, ("data.root=x", "data.cache_dir=x"))
    assert session.evaluate_only(chosen, content, Ranks())["val/top1"] == final(local_run)["final_top1"]


@pytest.mark.parametrize("change", [{"data__order": "global"}, {"data__window_shards": 3}, {}])
def test_a_partly_trained_epoch_keeps_its_order(
    change: dict[str, Any], store: Path, local_run: Path, tmp_path: Path
) -> None:
    root = store if change else make_store(tmp_path, shards=5)
    at = {update: str(local_run / f"checkpoints/update-{update:09d}.pt") for update in (4, 6)}
    message = r"is from within an epoch of data\.order=shards with data\.window_shards=2; choose the same"
    with pytest.raises(ConfigError, match=message):
        prepare(config(tmp_path / "run", root, checkpoint__path=at[4], **change))
    prepare(config(tmp_path / "run", root, checkpoint__path=at[6], **change))


def test_a_run_does_not_resume_on_other_shards(store: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(store)
    train(tmp_path / "run", link, max_updates=2)
    link.unlink()
    link.symlink_to(make_store(tmp_path, shards=5))
    with pytest.raises(ConfigError, match="the store now has its images in other shards"):
        train(tmp_path / "run", link)


def test_a_cache_that_is_too_small_is_a_config_error(store: Path, tmp_path: Path) -> None:
    one, all_at_once = smallest_cache(tmp_path, store), smallest_cache(tmp_path, store, data__window_shards=20)
    assert one < all_at_once
    settings = {"data__cache_dir": str(tmp_path / "cache")}
    prepare(config(tmp_path / "run", f"file://{store}", data__cache_gb=one, **settings))
    # Each of several ranks evaluates different shards.
    requested = config(tmp_path / "run", f"file://{store}", data__cache_gb=0.00003, **settings)
    with pytest.raises(ConfigError, match=r"data\.cache_gb=.* for the evaluation"):
        session.evaluate_only(requested, None, Ranks(0, 4, 0, 4))


def test_settings_that_would_be_ignored_are_errors(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_dir=/x has no meaning"):
        prepare(config(tmp_path / "run", store, data__cache_dir="/x"))
    with pytest.raises(ConfigError, match=r"data\.order=shards: data\.root=.* is not stored in tar shards"):
        prepare(config(tmp_path / "run", store.parent / "data"))


def test_a_run_resumes_after_a_missing_shard_returns(local_run: Path, store: Path, tmp_path: Path) -> None:
    settings = {"data__cache_dir": str(tmp_path / "cache")}
    prepared = prepare(config(tmp_path / "run", f"file://{store}", **settings))
    assert isinstance(prepared.dataset.train, RemoteSource)
    moved = store / "train/train-000015.tar"
    moved.rename(tmp_path / "away.tar")
    with pytest.raises(DataError, match=r"train-000015\.tar cannot be read"):
        session.train(prepared, Ranks(), Invocation())
    (tmp_path / "away.tar").rename(moved)
    train(tmp_path / "run", f"file://{store}", **settings)
    assert final(tmp_path / "run")["weights_sha256"] == final(local_run)["weights_sha256"]


COMMAND = (
    "data=folder data.image_size=8 data.augment=pad_crop data.pad=1 data.eval_crop=1 data.order=shards "
    "data.window_shards=2 data.workers=0 model=small model.ghost_batch=4 micro_batch=4 precision=fp32 batch.size=12 "
    "optimizer.lr=0.5 schedule.warmup_epochs=0.5 epochs=12 log_every=1 launch.threads=1 launch.nproc=1 device=cpu "
    "checkpoint.every_updates=4 checkpoint.keep=100 data.cache_dir=cache run.dir=run"
).split()


@pytest.mark.slow
def test_a_killed_run_with_the_smallest_cache_ends_the_same(store: Path, tmp_path: Path) -> None:
    register()
    here = [f"data.root={store}", f"run.dir={tmp_path}/copy"]
    with initialize_config_dir(str(config_dir()), version_base=None):
        raw = compose("config", [a for a in COMMAND if not a.startswith(("data.cache_dir", "run.dir"))] + here)
    session.train(prepare(resolve(raw)), Ranks(), Invocation())
    limit = smallest_cache(tmp_path, store, epochs=12)
    command = [*ALONE, *COMMAND, f"data.root=file://{store}", f"data.cache_gb={limit}"]
    process = begin(command, tmp_path)
    end = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/update-000000016.pt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert "resumed" in ran(command, tmp_path)
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert final(run)["weights_sha256"] == final(copy)["weights_sha256"]
    assert losses(run) == losses(copy)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) <= limit * 1e9
