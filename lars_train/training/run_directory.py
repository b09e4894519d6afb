"""The run directory: where it is, what is in it already, and the record of what made the run.

The same command finds the same directory (no time stamp in its name), on one device or on a thousand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
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
from lars_train.data.dataset import Dataset
from lars_train.errors import ConfigError, DataError
from lars_train.fsutil import discard, name_in_errors, stage, sync_folder, user_path, wait_for, write_atomic
from lars_train.messages import say, utf8
from lars_train.plan import Plan
from lars_train.training.distributed import Group

# What a start that was killed before its record was whole can have left.
_BEFORE_RECORD = (".lock", ".reserve", "..reserve.*", ".run.json.*")
# Room for the last words of a run on a full disk: its record with how it ended, and its result.
_RESERVE, _RESERVE_BYTES = ".reserve", 64 << 10
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
        return user_path(config.run.dir)
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


def check_same_experiment(directory: Path, config: Config, fingerprint: str = "") -> None:
    """Raise `ConfigError` when the directory holds a run of another config. Reads only.

    The run may have read the same images elsewhere. `fingerprint`: of this config's data set.
    """
    record = directory / "run.json"
    if not record.exists() or config.resume != AUTO:
        return
    try:
        stored = json.loads(record.read_text())
        theirs, settings = stored["hash"], dict(stored["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{record} cannot be read ({error}); start anew with resume=never.") from None
    if theirs == run_hash(config) or _moved(stored, config, fingerprint):
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


def runs_of_moved_images(directory: Path, config: Config, fingerprint: str) -> list[Path]:
    """The runs beside `directory`, which is named by the config's hash, that differ by where the images are alone."""
    found = []
    for record in directory.parent.glob(f"{directory.name.rpartition('-')[0]}-*/run.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            if record.parent != directory and _moved(json.loads(record.read_text()), config, fingerprint):
                found.append(record.parent)
    return sorted(found)


def _moved(record: dict[str, Any], config: Config, fingerprint: str) -> bool:
    """Return True if the record is of this config's run with the same images in another place."""
    settings, data = record["settings"], record.get("data") or {}
    there = {key: settings.get(f"data.{key}") for key in ("root", "val_labels")}
    then = dataclasses.replace(config, data=dataclasses.replace(config.data, **there))
    return bool(fingerprint) and data.get("fingerprint") == fingerprint and record["hash"] == run_hash(then)


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
    recorded = False
    if group.first:
        try:
            if config.resume == "never":
                _move_aside(directory)
            directory.mkdir(parents=True, exist_ok=True)
            lock = _lock(directory)
            _reserve(directory)
            _write_record(directory, config, invocation)
            recorded = True
            _write_settings(directory, config, invocation)
            with name_in_errors(directory / ".shared"):
                (directory / ".shared").write_text(token)
        except OSError as failure:
            error = ConfigError(f"run directory {directory}: it cannot be written ({failure}).")
            if recorded:
                note_end(directory, "failed", str(error))
            if lock is not None:
                discard(directory / _RESERVE)
        except ConfigError as failure:
            error = failure
    try:
        group.raise_on_all_ranks(error)
        token = group.broadcast_from_rank0(token)
        seen = wait_for(directory / ".shared", token)
        group.raise_on_all_ranks(
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


def data_record(dataset: Dataset) -> dict[str, Any]:
    """What the record says of the data set: counts, fingerprint, where the splits were found and what was skipped."""
    return {
        "train_images": len(dataset.train),
        "val_images": len(dataset.val),
        "classes": len(dataset.classes),
        "fingerprint": dataset.fingerprint,
        **dataset.inventory.record(),
    }


def note_start(directory: Path, *, plan: Plan, data: dict[str, Any], **start: Any) -> None:
    """Add to the record what is known only when a run begins: its `plan`, its `data`, and what belongs to this start.

    Raises OSError.
    """
    _put_record(directory / "run.json", _noted(directory, {"plan": dataclasses.asdict(plan), "data": data}, start))


def note_end(directory: Path, how: str, reason: str = "", **values: Any) -> None:
    """Add to the record how this start has ended: ``stopped`` (by a signal) or ``failed``.

    A start without it was killed, or goes on. A record that cannot be written stays as it was.
    """
    discard(directory / _RESERVE)
    with contextlib.suppress(OSError):
        _put_record(directory / "run.json", _noted(directory, {}, _ended(how, reason, values)))


def conclude(directory: Path, final: dict[str, Any], **values: Any) -> None:
    """Write ``final.json``, and in the record that this start has finished: both, or neither. Raises OSError."""
    discard(directory / _RESERVE)
    record = _noted(directory, {}, _ended("finished", "", values))
    contents = {directory / "final.json": final, directory / "run.json": record}
    staged: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            staged[path] = stage(path, [_as_json(content)])
        for path, temporary in staged.items():
            temporary.replace(path)
        sync_folder(directory)
    except BaseException:
        for path in (*staged.values(), directory / "final.json"):
            discard(path)
        raise


def disk_error(directory: Path, error: OSError) -> DataError:
    """`error`, of what a run writes in `directory`, as the user is told of it."""
    if not directory.is_dir():
        return DataError(f"run directory {directory}: it was removed while the run was on.")
    what = f"{error.filename} cannot be written" if error.filename else "it cannot be written"
    return DataError(
        f"run directory {directory}: {what} ({error.strerror or error}). Make room, or make it writable, and give the "
        "same command again: it goes on from the last checkpoint."
    )


def _ended(how: str, reason: str, values: dict[str, Any]) -> dict[str, Any]:
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"ended": {"how": how, "reason": reason, "time": now, **values}}


def _noted(directory: Path, run: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """The record with more values of the run and of its last start. Raises OSError, too where it is none."""
    path = directory / "run.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        record.update(run)
        record["started"][-1].update(start)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise OSError(errno.EINVAL, "it is not what a run writes", str(path)) from None
    return record


def _as_json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, default=str) + "\n").encode()


def _put_record(path: Path, record: dict[str, Any]) -> None:
    write_atomic(path, [_as_json(record)])


def _reserve(directory: Path) -> None:
    # Random, for some file systems keep no room for zeros.
    path = directory / _RESERVE
    if not path.exists() or path.stat().st_size != _RESERVE_BYTES:
        write_atomic(path, [os.urandom(_RESERVE_BYTES)])


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
        # Before it was locked, another process with `resume=never` may have moved the directory aside.
        still_there = os.path.samestat(os.fstat(file.fileno()), (directory / ".lock").stat())
    except (BlockingIOError, FileNotFoundError):
        still_there = False
    if not still_there:
        file.close()
        raise ConfigError(f"run directory {directory}: another process is running it now; wait for it.")
    return file


def _write_record(directory: Path, config: Config, invocation: Invocation) -> None:
    # First of all: it is what tells a run directory from a folder of other files.
    path = directory / "run.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    root = before.get("settings", {}).get("data.root", config.data.root)
    if root != config.data.root:
        say(f"data.root      was {root} in the run so far; the images are the same (their names and labels)")
    record = {
        **{key: before[key] for key in ("plan", "data") if key in before},
        "hash": run_hash(config),
        "settings": flatten(config),
        "seed": config.seed,
        "started": [*before.get("started", []), _start_entry(invocation)],
    }
    _put_record(path, record)


def _write_settings(directory: Path, config: Config, invocation: Invocation) -> None:
    hydra = directory / ".hydra"
    hydra.mkdir(exist_ok=True)
    texts = {
        hydra / "config.yaml": invocation.composed_yaml,
        hydra / "hydra.yaml": invocation.hydra_yaml,
        hydra / "overrides.yaml": OmegaConf.to_yaml(list(invocation.overrides)),
        directory / "config.yaml": OmegaConf.to_yaml(OmegaConf.structured(config)),
    }
    for path, text in texts.items():
        write_atomic(path, [utf8(text)])


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
