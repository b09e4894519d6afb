"""The run directory: where it is, what is in it already, and the record of what made the run.

The same command finds the same directory (no time stamp in its name), on one device or on a thousand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import OmegaConf

from lars_train.config import AUTO, EXECUTION_KEYS, Config, flatten, run_hash
from lars_train.durable import write_whole
from lars_train.errors import ConfigError
from lars_train.monitoring.say import say
from lars_train.plan import Plan
from lars_train.training.distributed import Group

# What a start that was killed before its record was whole can have left.
_BEFORE_RECORD = (".lock", ".run.json.*")
_VERSIONED = ("lars-train", "torch", "torchvision", "hydra-core", "numpy", "pillow", "tensorboard")


@dataclass(frozen=True)
class Invocation:
    """How the program was called: what ``.hydra/`` and the record hold. Plain values, so that it pickles."""

    command: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    composed_yaml: str = ""
    hydra_yaml: str = ""


def run_directory(config: Config) -> Path:
    """Where this config's run lives."""
    if config.run.dir is not None:
        return Path(config.run.dir).expanduser()
    if config.run.name is not None:
        return Path("runs") / config.run.name
    batch = config.batch.name if config.batch.size is None else f"n{config.batch.size}"
    name = f"{config.data.name}-{config.model.name}-{batch}-{run_hash(config)}"
    return Path("runs") / re.sub(r"[^A-Za-z0-9._-]", "_", name)


def finished(directory: Path) -> dict[str, Any] | None:
    """The content of ``final.json``, or None if the run has not ended."""
    try:
        content = json.loads((directory / "final.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        path = directory / "final.json"
        raise ConfigError(f"{path} cannot be read ({error}); start anew with resume=never.") from None
    if not isinstance(content, dict) or not {"updates", "planned_updates", "best_top1", "directory"} <= content.keys():
        raise ConfigError(f"{directory / 'final.json'} is not what a run writes; start anew with resume=never.")
    return content


def holds_run_of(directory: Path, config: Config) -> bool:
    """Whether the record in the directory is that of a run of this config. Raises nothing."""
    try:
        found = json.loads((directory / "run.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("hash") == run_hash(config)


def check_same_experiment(directory: Path, config: Config) -> None:
    """Raise `ConfigError` when the directory holds a run of another config. Reads only."""
    record = directory / "run.json"
    if not record.exists() or config.resume != AUTO:
        return
    try:
        stored = json.loads(record.read_text())
        theirs, settings = stored["hash"], dict(stored["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{record} cannot be read ({error}); start anew with resume=never.") from None
    if theirs == run_hash(config):
        return
    mine = flatten(config)
    told = [
        f"{key}: {settings.get(key)!r} there, {value!r} now"
        for key, value in mine.items()
        if settings.get(key) != value and not f"{key}.".startswith(tuple(f"{k}." for k in EXECUTION_KEYS))
    ]
    raise ConfigError(
        f"{directory} holds a run of another config ({'; '.join(told[:5]) or 'an older schema'}). "
        "Choose another run.name, or start anew there with resume=never (the old run is moved aside)."
    )


def check_usable(directory: Path) -> None:
    """Raise `ConfigError` when the directory cannot be made or written to, or is no run directory. Writes nothing."""
    if directory.exists():
        if not directory.is_dir():
            raise ConfigError(f"run directory {directory}: it is a file; choose another run.dir.")
        others = [p for p in directory.iterdir() if not any(p.match(pattern) for pattern in _BEFORE_RECORD)]
        if others and not (directory / "run.json").exists():
            raise ConfigError(
                f"run directory {directory}: it holds other files and no run (run.json); choose another run.dir."
            )
    parent = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"run directory {directory}: {parent} is not writable; choose another run.dir.")


def open_directory(directory: Path, config: Config, invocation: Invocation, group: Group) -> IO[str] | None:
    """Make the directory (or move an old run aside for ``resume=never``) and prove that all ranks share it.

    Returns, on rank 0, the lock that keeps a second start out; it goes with the process. Collective.
    """
    lock, error, token = None, None, uuid.uuid4().hex
    if group.first:
        try:
            if config.resume == "never":
                _move_aside(directory)
            directory.mkdir(parents=True, exist_ok=True)
            lock = _lock(directory)
            _write_record(directory, config, invocation)
            (directory / ".shared").write_text(token)
        except OSError as failure:
            error = ConfigError(f"run directory {directory}: it cannot be written ({failure}).")
        except ConfigError as failure:
            error = failure
    try:
        group.together(error)
        token = group.from_first(token)
        seen = wait_for(directory / ".shared", token)
        group.together(
            None
            if seen
            else ConfigError(
                f"run directory {directory.absolute()}: rank {group.ranks.rank} on {platform.node()} does not see "
                "what rank 0 wrote there; put run.dir on a file system that all nodes share."
            )
        )
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return lock


def note_start(directory: Path, *, plan: Plan, **start: Any) -> None:
    """Add to the record what is known only when a run begins: its `plan`, and what belongs to this start.

    As `note_end`, it leaves the record as it was where that cannot be written: a run does not end for it.
    """
    _note(directory, {"plan": dataclasses.asdict(plan)}, start)


def note_end(directory: Path, how: str, reason: str = "", **values: Any) -> None:
    """Add to the record how this start has ended: ``finished``, ``stopped`` (by a signal) or ``failed``.

    A start without it was killed, or goes on.
    """
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    _note(directory, {}, {"ended": {"how": how, "reason": reason, "time": now, **values}})


def _note(directory: Path, run: dict[str, Any], start: dict[str, Any]) -> None:
    path = directory / "run.json"
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        record = json.loads(path.read_text())
        record.update(run)
        record["started"][-1].update(start)
        _put_record(path, record)


def _put_record(path: Path, record: dict[str, Any]) -> None:
    write_whole(path, [(json.dumps(record, indent=1, default=str) + "\n").encode()])


def _move_aside(directory: Path) -> None:
    if not directory.exists() or not any(directory.iterdir()):
        return
    # Not while another process is running it.
    with _lock(directory):
        number = 1
        while (aside := directory.with_name(f"{directory.name}.old{number}")).exists():
            number += 1
        directory.rename(aside)
    say(f"resume=never: the run that was there is now {aside}")


def _lock(directory: Path) -> IO[str]:
    import fcntl

    file = (directory / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"run directory {directory}: another process is running it now; wait for it.") from None
    return file


def wait_for(path: Path, token: str, seconds: float = 15.0) -> bool:
    """Whether the file at `path`, which another machine may have written, comes to hold `token` within `seconds`."""
    # Network file systems show a new file to other nodes only after their attribute cache expires.
    end = time.monotonic() + seconds
    while True:
        try:
            os.listdir(path.parent)
            if path.read_text() == token:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _write_record(directory: Path, config: Config, invocation: Invocation) -> None:
    # First of all: it is what tells a run directory from a folder of other files.
    path = directory / "run.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    record = {
        **({"plan": before["plan"]} if "plan" in before else {}),
        "hash": run_hash(config),
        "settings": flatten(config),
        "seed": config.seed,
        "started": [*before.get("started", []), _start_entry(invocation)],
    }
    _put_record(path, record)
    hydra = directory / ".hydra"
    hydra.mkdir(exist_ok=True)
    (hydra / "config.yaml").write_text(invocation.composed_yaml)
    (hydra / "hydra.yaml").write_text(invocation.hydra_yaml)
    (hydra / "overrides.yaml").write_text(OmegaConf.to_yaml(list(invocation.overrides)))
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter."""
    found = {"python": platform.python_version(), "torch build": torch.__version__}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _start_entry(invocation: Invocation) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "command": shlex.join(invocation.command),
        "directory": str(Path.cwd()),
        "executable": sys.executable,
        "versions": versions(),
        "git": git_state(Path(__file__).resolve().parent),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and cleanliness of the checkout that the code runs from; of an installed package the commit, if known.

    pip keeps that of what it was given as ``git+URL``. None where neither is known, as after ``pip install .``.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        if not git("ls-files", Path(__file__).resolve().name, str(Path(__file__).resolve())):
            return _installed_commit()
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return _installed_commit()


def _installed_commit() -> dict[str, Any] | None:
    """As https://packaging.python.org/en/latest/specifications/direct-url/ has it recorded."""
    with contextlib.suppress(PackageNotFoundError, ValueError, KeyError, TypeError):
        origin = json.loads(distribution("lars-train").read_text("direct_url.json") or "")
        return {"commit": str(origin["vcs_info"]["commit_id"]), "dirty": False}
    return None
