"""A run directory has a stable name, one owner at a time, and a record of every start."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lars_train.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    RecipeConfig,
    RunConfig,
    resolve,
    run_hash,
)
from lars_train.errors import ConfigError
from lars_train.launch import Ranks
from lars_train.run_plan import make_plan
from lars_train.training import run_directory as module
from lars_train.training.distributed import Group
from lars_train.training.run_directory import (
    Invocation,
    check_same_experiment,
    check_usable,
    finished,
    git_state,
    holds_run_of,
    open_directory,
    record_end,
    record_start,
    run_directory,
)

ALONE = Group(Ranks())
CALL = Invocation(("lars-train", "seed=3", "run.name=a b"), ("seed=3", "run.name=a b"), "seed: 3\n", "hydra: {}\n")


def config(**settings: Any) -> Config:
    """Return the resolved config of a small run. `settings` replace whole fields."""
    raw = Config(
        epochs=2,
        batch=BatchConfig(size=64),
        recipe=RecipeConfig(rows={"32k": {}}),
        data=DataConfig(name="synthetic"),
        optimizer=OptimizerConfig(lr=0.5, kwargs={"nesterov": True}),
    )
    return resolve(OmegaConf.structured(replace(raw, **settings)))


def open_here(directory: Path, what: Config | None = None) -> Any:
    return open_directory(directory, what or config(), CALL, ALONE)


def test_a_run_is_named_after_data_model_batch_and_hash() -> None:
    c = config()
    assert run_directory(c) == Path("runs") / f"synthetic-resnet50-n64-{run_hash(c)}"
    c = replace(c, batch=BatchConfig(name="32k", size=None))
    assert run_directory(c).name == f"synthetic-resnet50-32k-{run_hash(c)}"


@pytest.mark.parametrize("name", ["a=b", "a,b", "a b", "a/b", "a\tb", "ä", "../x"])
def test_run_names_are_safe_for_shells_and_hydra(name: str) -> None:
    path = run_directory(replace(config(), data=DataConfig(name=name)))
    assert path.parent == Path("runs")
    assert re.fullmatch(r"[A-Za-z0-9._-]+", path.name)


def test_run_dir_and_run_name_are_used_unchanged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_directory(config(run=RunConfig(dir="/big/disk/x"))) == Path("/big/disk/x")
    assert run_directory(config(run=RunConfig(dir="~/x"))) == tmp_path / "x"
    assert run_directory(config(run=RunConfig(name="mine"))) == Path("runs/mine")


def test_the_same_experiment_finds_its_directory_elsewhere() -> None:
    here = config()
    there = config(device="cpu", micro_batch=64, log_every=1, max_updates=5)
    assert run_directory(here) == run_directory(there)
    assert run_directory(here) != run_directory(config(seed=1))


def test_a_start_records_what_made_the_run(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "down" / "run"
    open_here(directory).close()
    assert (directory / ".hydra" / "config.yaml").read_text() == "seed: 3\n"
    assert (directory / ".hydra" / "hydra.yaml").read_text() == "hydra: {}\n"
    assert OmegaConf.load(directory / ".hydra" / "overrides.yaml") == ["seed=3", "run.name=a b"]
    record = json.loads((directory / "run.json").read_text())
    assert (record["seed"], record["hash"]) == (0, run_hash(config()))
    assert record["settings"]["optimizer.lr"] == 0.5
    (start,) = record["started"]
    assert start["command"] == "lars-train seed=3 'run.name=a b'"
    assert start["directory"] == str(Path.cwd())
    assert {"python", "torch", "torchvision", "lars-train", "hydra-core"} <= start["versions"].keys()
    assert start["versions"]["torch"] == version("torch")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", start["time"])


def test_every_start_is_recorded(tmp_path: Path) -> None:
    for _ in range(3):
        open_here(tmp_path / "run").close()
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["started"]) == 3


def test_record_start_and_record_end_extend_the_last_start(tmp_path: Path) -> None:
    directory, plan = tmp_path / "run", make_plan(config(), 1000)
    open_here(directory).close()
    record_start(directory, plan=plan, data={"classes": 2}, resumed_at=0)
    record_end(directory, "stopped", "SIGTERM", update=7)
    open_here(directory).close()
    record_start(directory, plan=plan, data={"classes": 2}, resumed_at=7)
    record = json.loads((directory / "run.json").read_text())
    assert record["plan"] == asdict(plan)
    assert record["data"] == {"classes": 2}
    assert record["settings"]["optimizer.lr"] == 0.5
    first, second = record["started"]
    assert (first["resumed_at"], second["resumed_at"]) == (0, 7)
    assert first["command"] == second["command"]
    assert {"how": "stopped", "reason": "SIGTERM", "update": 7}.items() <= first["ended"].items()
    assert "ended" not in second
    record_end(directory, "finished")
    assert json.loads((directory / "run.json").read_text())["started"][1]["ended"]["how"] == "finished"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"started": []}', '{"started": 5}', '{"started": [3]}'])
def test_a_record_that_cannot_be_extended_stays_unchanged(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    record_end(tmp_path, "failed", "x")
    assert (tmp_path / "run.json").read_text() == text
    record_end(tmp_path / "nowhere", "failed", "x")


def test_holds_run_of_compares_configs(tmp_path: Path) -> None:
    assert not holds_run_of(tmp_path / "run", config())
    open_here(tmp_path / "run").close()
    assert holds_run_of(tmp_path / "run", config(log_every=3))
    assert not holds_run_of(tmp_path / "run", config(seed=1))
    (tmp_path / "run" / "run.json").write_text("[]")
    assert not holds_run_of(tmp_path / "run", config())


def test_the_stored_config_composes_to_the_same_config(tmp_path: Path) -> None:
    c = config(micro_batch="auto", model=replace(config().model, name="resnet18"))
    open_here(tmp_path / "run", c).close()
    stored = OmegaConf.load(tmp_path / "run" / "config.yaml")
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), stored))
    assert again == c
    assert isinstance(again, Config)
    assert run_hash(again) == run_hash(c)
    assert resolve(OmegaConf.structured(again)) == c


def test_only_the_same_experiment_may_resume_in_a_directory(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    check_same_experiment(directory, config())
    open_here(directory).close()
    check_same_experiment(directory, config())
    check_same_experiment(directory, config(max_updates=3, device="cpu", checkpoint=CheckpointConfig(keep=1)))
    check_same_experiment(directory, config(resume="never", seed=9))
    with pytest.raises(ConfigError) as error:
        check_same_experiment(directory, config(seed=9, optimizer=OptimizerConfig(lr=0.25, kwargs={"nesterov": True})))
    for part in (str(directory), "seed: 0 there, 9 now", "optimizer.lr: 0.5 there, 0.25 now", "resume=never"):
        assert part in str(error.value)
    assert "epochs" not in str(error.value)


def test_only_settings_that_change_the_experiment_are_named(tmp_path: Path) -> None:
    open_here(tmp_path / "run").close()
    other = config(
        max_updates=3,
        micro_batch=64,
        device="cpu",
        log_every=1,
        data=DataConfig(name="synthetic", workers=1),
        checkpoint=CheckpointConfig(keep=1),
        optimizer=OptimizerConfig(lr=0.25, kwargs={"nesterov": True}),
    )
    with pytest.raises(ConfigError, match=r"another config \(optimizer\.lr: 0\.5 there, 0\.25 now\)"):
        check_same_experiment(tmp_path / "run", other)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"hash": "x"}'])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json cannot be read .*resume=never"):
        check_same_experiment(tmp_path, config())


def test_the_old_run_is_moved_aside_with_resume_never(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run"
    for number in range(3):
        open_here(directory, config(resume="never")).close()
        (directory / "final.json").write_text(str(number))
    assert (tmp_path / "run.old1" / "final.json").read_text() == "0"
    assert (tmp_path / "run.old2" / "final.json").read_text() == "1"
    assert (directory / "final.json").read_text() == "2"
    assert str(tmp_path / "run.old2") in capsys.readouterr().out
    assert len(json.loads((directory / "run.json").read_text())["started"]) == 1


def test_a_second_start_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    lock = open_here(directory)
    before = (directory / "run.json").read_text()
    for resume in ("auto", "never"):
        with pytest.raises(ConfigError, match="another process is using it"):
            open_here(directory, config(resume=resume))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert (directory / "run.json").read_text() == before
    lock.close()
    open_here(directory).close()


@pytest.mark.parametrize("begun", [False, True])
def test_a_lock_in_a_directory_moved_aside_does_not_count(
    begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, flock = tmp_path / "run", fcntl.flock
    open_here(directory).close()

    def late(file: Any, how: int) -> None:
        # Before this process locks it, another with resume=never moves the directory aside, and may recreate it.
        directory.rename(tmp_path / "aside")
        if begun:
            directory.mkdir()
            (directory / ".lock").touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ConfigError, match="another process is using it"):
        open_here(directory)


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    open_here(directory).close()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(directory / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another process is using it"):
            open_here(directory)
        other.kill()
        other.wait()
        open_here(directory).close()


def test_a_start_killed_early_does_not_block_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # At the slowest step of a start: git runs before the record is written.
    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module, "git_state", killed)
        with pytest.raises(KeyboardInterrupt):
            open_here(directory)
    assert any(directory.iterdir())
    check_usable(directory)
    check_same_experiment(directory, config())
    open_here(directory).close()
    assert (directory / "run.json").exists()


@dataclass(frozen=True)
class RemoteRank(Group):
    """A fake group: this is a rank on another machine, and rank 0 has written `token`."""

    token: str = "rank 0's"

    def broadcast_from_rank0(self, value: Any) -> Any:
        return self.token

    def all_gather(self, value: Any) -> list[Any]:
        return [None, value]


def test_ranks_without_a_shared_directory_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    group = RemoteRank(Ranks(1, 2))
    with pytest.raises(ConfigError, match=r"rank 1 on .* does not see the files of rank 0\. .* run\.dir .* share"):
        open_directory(tmp_path / "run", config(), CALL, group)
    # The rank does not accept the token of an earlier start.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".shared").write_text("another")
    with pytest.raises(ConfigError, match="does not see"):
        open_directory(tmp_path / "run", config(), CALL, group)
    (tmp_path / "run" / ".shared").write_text("rank 0's")
    assert open_directory(tmp_path / "run", config(), CALL, group) is None


def test_open_directory_waits_for_a_slow_shared_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            (tmp_path / ".shared").write_text("rank 0's")

    monkeypatch.setattr(time, "sleep", sleep)
    assert open_directory(tmp_path, config(), CALL, RemoteRank(Ranks(1, 2))) is None
    assert len(waits) == 3


def test_a_failed_start_frees_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Failing(Group):
        def all_gather(self, value: Any) -> list[Any]:
            return [value, None if value is None else ConfigError("rank 1 sees nothing")]

    def late(path: Path, token: str) -> bool:
        raise ConfigError("rank 1 sees nothing")

    monkeypatch.setattr(module, "wait_for", late)
    with pytest.raises(ConfigError) as error:
        open_directory(tmp_path / "run", config(), CALL, Failing(Ranks()))
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert "rank 1" in str(error.value)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run directory .*file/run cannot be written"):
        open_here(tmp_path / "file" / "run")


def test_unusable_places_are_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    (tmp_path / "empty").mkdir()
    for name, reason in (("file", "is a file"), ("photos", "holds other files"), ("file/run", "is not writable")):
        with pytest.raises(ConfigError, match=rf"run directory .*{name}.* {reason}.*run\.dir"):
            check_usable(tmp_path / name)
    for name in ("empty", "new/run", "a/b/c"):
        check_usable(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="is not writable"):
        check_usable(tmp_path / "new" / "run")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cat.jpg", "empty", "file", "photos"]


def test_a_run_is_finished_if_final_json_exists(tmp_path: Path) -> None:
    assert finished(tmp_path) is None
    record = {"updates": 7, "planned_updates": 9, "best_top1": 50.0, "directory": "runs/x"}
    (tmp_path / "final.json").write_text(json.dumps(record))
    assert finished(tmp_path) == record
    (tmp_path / "final.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"final\.json was not written by a run.*resume=never"):
        finished(tmp_path)
    (tmp_path / "final.json").write_text('{"updates": 7')
    with pytest.raises(ConfigError, match=r"final\.json cannot be read .*resume=never"):
        finished(tmp_path)


def test_the_git_state_is_of_the_checkout_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path(module.__file__).parent) is None


@pytest.mark.parametrize(
    ("origin_file", "expected"),
    [
        ({"vcs_info": {"vcs": "git", "commit_id": "c0ffee"}, "url": "https://x"}, {"commit": "c0ffee", "dirty": False}),
        ({"dir_info": {}, "url": "file:///x"}, None),
        (None, None),
    ],
)
def test_an_installed_package_has_the_commit_that_pip_recorded(
    origin_file: dict[str, Any] | None, expected: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if origin_file is None else json.dumps(origin_file)

    monkeypatch.setattr(module, "distribution", lambda name: Installed())
    assert git_state(tmp_path) == expected
