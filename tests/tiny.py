"""Settings of small runs for the tests, functions that start them, and functions that read their files."""

from __future__ import annotations

import atexit
import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from lars_train.config import Config, choices_of, config_dir, nominal_batch, register, resolve
from lars_train.config.arguments import prepare_arguments
from lars_train.config.keys import GROUPS
from lars_train.config.schema import schema_node

SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "device": "cpu",
    "batch": {"size": 8},
    "recipe": {"rows": {"32k": {}}},
    "data": {
        "name": "synthetic",
        "image_size": 8,
        "augment": "none",
        "eval_crop": 1.0,
        "train_count": 24,
        "val_count": 4,
        "num_classes": 4,
        "workers": 0,
    },
    "model": {"name": "small", "ghost_batch": 4},
    "optimizer": {"lr": 1.0},
    "precision": {"name": "fp32"},
    "launch": {"threads": 1},
}
"""The config of a run of six updates, for tests that train in their own process."""
DATA = (
    "data=synthetic data.train_count=320 data.val_count=101 data.num_classes=4 data.image_size=8 "
    "model=small model.ghost_batch=8 precision=fp32 schedule.warmup_epochs=0.5 log_every=2 launch.threads=1"
).split()
TINY = [*DATA, "batch.size=32", "optimizer.lr=2", "epochs=2"]
"""The command line of a run of 20 updates on one or several ranks, each in its own process."""
ALONE = [sys.executable, "-m", "lars_train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lars_train"]
COMPILED = {
    "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}_no_vectors"),
    "ATEN_CPU_CAPABILITY": "default",
}
"""The environment of a test that compiles. Without vector instructions, compiling takes a third less time.

The cache folder is kept between test runs, and is used only for code without vector instructions.
"""
TIMEOUT = 600
"""The seconds after which a program started by a test is killed."""


def tiny(*changes: dict[str, Any], **values: Any) -> Config:
    """Return the resolved `SETTINGS` with `changes` merged and then `values` set; ``__`` in a keyword means a dot."""
    raw = OmegaConf.merge(schema_node(Config), SETTINGS, *changes)
    for key, value in values.items():
        OmegaConf.update(raw, key.replace("__", "."), value)
    assert isinstance(raw, DictConfig)
    return resolve(raw)


def prepared(*arguments: str) -> list[str]:
    """Return the command line as the program passes it to Hydra."""
    return prepare_arguments(list(arguments), None)


def composed(*arguments: str, hydra: bool = False) -> DictConfig:
    """Return the unresolved config of a command line; with `hydra`, including Hydra's own config."""
    register()
    overrides = prepared(*arguments)
    if hydra or not all(map(re.compile(r"[\w.]+=").match, overrides)):
        return _compose(overrides, hydra)
    # Hydra first composes the choices of the groups, then applies the values of the keys. The first part is slow. A
    # batch has no file: its choice sets two keys.
    choices, texts = list[str](), list[str]()
    for override in overrides:
        group, _, name = override.partition("=")
        if group == "batch" and name.strip("'") in choices_of("batch"):
            texts[:0] = [f"batch.name={name}", f"batch.nominal={nominal_batch(name.strip(chr(39)))}"]
        else:
            (choices if group in GROUPS else texts).append(override)
    values = OverridesParser.create().parse_overrides(texts)
    if any(value.is_sweep_override() for value in values):
        return _compose(overrides)
    config = copy.deepcopy(_composed_choices(tuple(choices)))
    ConfigLoaderImpl._apply_overrides_to_config(values, config)
    return config


@cache
def _composed_choices(choices: tuple[str, ...]) -> DictConfig:
    return _compose(choices)


def _compose(overrides: Sequence[str], hydra: bool = False) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=hydra)


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment without the variables of launchers, and with `extra`."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "IMAGENET_DIR")
    kept = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith(("SLURM_", "TORCHELASTIC"))}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


class Program:
    """A running program, with the interface of `subprocess.Popen`: a fork of a `Shell` that leads a new session."""

    def __init__(self, ask: Callable[[str, object], Any], words: Sequence[str], pid: int) -> None:
        self._ask, self.args, self.pid = ask, words, pid
        self._ended: tuple[int, str, str] | None = None

    @property
    def returncode(self) -> int | None:
        return self._ended and self._ended[0]

    def poll(self) -> int | None:
        if self._ended is None:
            self._ended = self._ask("end", [self.pid, 0])
        return self.returncode

    def communicate(self, timeout: float = TIMEOUT) -> tuple[str, str]:
        """Wait for the end, and return standard output and standard error. Raises `subprocess.TimeoutExpired`."""
        self._ended = self._ended or self._ask("end", [self.pid, timeout])
        if self._ended is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout)
        return self._ended[1], self._ended[2]

    def wait(self, timeout: float = TIMEOUT) -> int:
        self.communicate(timeout)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Shell:
    """A process that runs programs in forks of itself (tests/shell.py). `prefix`: words before its command."""

    def __init__(self, prefix: Sequence[str] = (), **options: Any) -> None:
        command = [*prefix, sys.executable, str(Path(__file__).with_name("shell.py"))]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)

    def begin(self, words: Sequence[str], folder: Path, env: dict[str, str], log: Path | None = None) -> Program:
        """Start the command `words` with exactly this environment; tests/shell.py lists the programs.

        `log`: a file for both outputs.
        """
        one = {"words": list(words), "folder": str(folder), "environment": env, "timeout": TIMEOUT}
        return Program(self._ask, words, self._ask("begin", {**one, "log": log and str(log)}))

    def run(self, words: Sequence[str], folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a command as `begin` does, to its end."""
        (done,) = self.run_together(words, folder, [env])
        return done

    def run_together(
        self, words: Sequence[str], folder: Path, envs: Sequence[dict[str, str]]
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run `words` in several processes at the same time, one with each environment."""
        begun = [self.begin(words, folder, env) for env in envs]
        return [subprocess.CompletedProcess(words, one.wait(2 * TIMEOUT), *one.communicate()) for one in begun]

    def close(self) -> None:
        """End the process."""
        self._server.communicate()

    def _ask(self, what: str, argument: object) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps({what: argument}), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())


@cache
def shell() -> Shell:
    """Return the `Shell` that all tests of this process share."""
    made = Shell(env=environment())
    atexit.register(made.close)
    return made


def _program(command: Sequence[str]) -> list[str] | None:
    """Return the words of `command` for a `Shell`, or None if a `Shell` does not have the program."""
    programs = {tuple(ALONE): ["lars-train"], tuple(TORCHRUN[:3]): ["torchrun"]}
    programs[sys.executable, "-c"] = ["python", "-c"]
    if command[0] == sys.executable and command[1].endswith(".py"):
        return ["python", *command[1:]]
    for beginning, own in programs.items():
        if tuple(command[: len(beginning)]) == beginning:
            return [*own, *command[len(beginning) :]]
    return None


def start(command: Sequence[str], folder: Path, fresh: bool = False, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `command` with `extra` in its environment.

    ``python -m lars_train``, ``python -m torch.distributed.run``, ``python -c`` and ``python FILE.py`` run in a fork of
    a process that has imported torch, which saves the seconds of the import. With `fresh` they run in a new process,
    for variables that torch or Python reads at startup.
    """
    if not fresh and (own := _program(command)):
        return shell().run(own, folder, environment(**extra))
    return subprocess.run(
        command, cwd=folder, env=environment(**extra), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def begin(command: Sequence[str], folder: Path, log: Path | None = None, **extra: str) -> Program:
    """Start a program in a fork; see `start`."""
    own = _program(command)
    assert own is not None, command
    return shell().begin(own, folder, environment(**extra), log)


def start_ranks(arguments: Sequence[str], folder: Path, world: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Run the program in `world` processes, with the variables that torchrun sets in each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(world)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    envs = [environment(LOCAL_WORLD_SIZE=str(world), **meeting, **variables) for variables in own]
    return shell().run_together(["lars-train", *arguments], folder, envs)


def ran(command: Sequence[str], folder: Path, fresh: bool = False, **extra: str) -> str:
    """Run `command` as `start` does, assert that it succeeds without a warning, and return its output."""
    done = start(command, folder, fresh, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def final(folder: Path) -> dict[str, object]:
    """Return the content of a run directory's final.json."""
    content = json.loads((folder / "final.json").read_text())
    assert isinstance(content, dict)
    return content


def metrics(folder: Path) -> list[dict[str, float]]:
    """Return the log lines of a run directory."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[float, float]]:
    """Return a run's logged updates with their losses."""
    return [(line["update"], line["train/loss"]) for line in metrics(folder) if "train/loss" in line]


def children(pid: int) -> list[int]:
    """Return the ids of the child processes of `pid`."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive_in_group(group: int) -> list[int]:
    """Return the ids of the processes in a group that have not ended."""
    alive = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            alive.append(int(status.parent.name))
    return alive
