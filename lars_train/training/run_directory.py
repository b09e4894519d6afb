"""Find, lock and check the run directory, and write the run's record (run.json).

The same command finds the same directory, on one device or on a thousand, because the name has no time stamp.
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
from lars_train.config.values import LATER_KEYS
from lars_train.data.dataset import Dataset
from lars_train.errors import ConfigError, DataError
from lars_train.fsutil import discard, name_in_errors, stage, sync_folder, user_path, wait_for, write_atomic
from lars_train.messages import say, utf8
from lars_train.run_plan import Plan
from lars_train.training.distributed import Group

# Files that a start may leave behind if it is killed before its record is complete.
_BEFORE_RECORD = (".lock", ".reserve", "..reserve.*", ".run.json.*")
# A file that reserves space, so that a run on a full disk can still write its result and record its end.
_RESERVE, _RESERVE_BYTES = ".reserve", 64 << 10
_VERSIONED = ("lars-train", "torch", "torchvision", "hydra-core", "numpy", "pillow", "tensorboard")


@dataclass(frozen=True)
class Invocation:
    """The command line and its composed config, for ``.hydra/`` and the record. All fields can be pickled."""

    command: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    composed_yaml: str = ""
    hydra_yaml: str = ""


def run_directory(config: Config) -> Path:
    """Return the run directory of `config`."""
    if config.run.dir is not None:
        return user_path(config.run.dir)
    if config.run.name is not None:
        return Path("runs") / config.run.name
    batch = config.batch.name if config.batch.size is None else f"n{config.batch.size}"
    name = f"{config.data.name}-{config.model.name}-{batch}-{run_hash(config)}"
    return Path("runs") / re.sub(r"[^A-Za-z0-9._-]", "_", name)


def finished(directory: Path) -> dict[str, Any] | None:
    """Return the content of ``final.json``, or None if the run has not finished. Raises `ConfigError`."""
    try:
        content = json.loads((directory / "final.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        path = directory / "final.json"
        raise ConfigError(f"{path} cannot be read ({error}). Start over with resume=never.") from None
    if not isinstance(content, dict) or not {"updates", "planned_updates", "best_top1", "directory"} <= content.keys():
        raise ConfigError(f"{directory / 'final.json'} was not written by a run. Start over with resume=never.")
    return content


def holds_run_of(directory: Path, config: Config) -> bool:
    """Return True if the directory holds a run of this config, False if not or if its record cannot be read."""
    try:
        found = json.loads((directory / "run.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("hash") == run_hash(config)


def check_same_experiment(directory: Path, config: Config, fingerprint: str = "") -> None:
    """Raise `ConfigError` if the directory holds a run of another config. Writes nothing.

    The same images at another path do not count as another config. `fingerprint` is that of this config's data set.
    """
    record = directory / "run.json"
    if not record.exists() or config.resume != AUTO:
        return
    try:
        stored = json.loads(record.read_text())
        theirs, settings = stored["hash"], dict(stored["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{record} cannot be read ({error}); start over with resume=never.") from None
    if theirs == run_hash(config) or _moved(stored, config, fingerprint):
        return
    mine = flatten(config)
    differences = [
        f"{key}: {settings.get(key)!r} there, {value!r} now"
        for key, value in mine.items()
        if settings.get(key, LATER_KEYS.get(key)) != value
        and not f"{key}.".startswith(tuple(f"{k}." for k in EXECUTION_KEYS))
    ]
    raise ConfigError(
        f"{directory} holds a run of another config ({'; '.join(differences[:5]) or 'an older schema'}). "
        "Choose another run.name, or start over there with resume=never (the old run is moved aside)."
    )


def runs_of_moved_images(directory: Path, config: Config, fingerprint: str) -> list[Path]:
    """Return the runs beside `directory` that differ from this config only in the path of their images.

    The name of `directory` ends with the config's hash. `fingerprint` is that of this config's data set.
    """
    found = []
    for record in directory.parent.glob(f"{directory.name.rpartition('-')[0]}-*/run.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            if record.parent != directory and _moved(json.loads(record.read_text()), config, fingerprint):
                found.append(record.parent)
    return sorted(found)


def _moved(record: dict[str, Any], config: Config, fingerprint: str) -> bool:
    """Return True if the recorded run differs from this config only in the path of the same images."""
    settings, data = record["settings"], record.get("data") or {}
    recorded_place = {key: settings.get(f"data.{key}") for key in ("root", "val_labels")}
    there = dataclasses.replace(config, data=dataclasses.replace(config.data, **recorded_place))
    return bool(fingerprint) and data.get("fingerprint") == fingerprint and record["hash"] == run_hash(there)


def check_usable(directory: Path) -> None:
    """Raise `ConfigError` if the directory cannot be created or written, or is not a run directory. Writes nothing."""
    if directory.exists():
        if not directory.is_dir():
            raise ConfigError(f"run directory {directory} is a file. Choose another run.dir.")
        others = [p for p in directory.iterdir() if not any(p.match(pattern) for pattern in _BEFORE_RECORD)]
        if others and not (directory / "run.json").exists():
            raise ConfigError(
                f"run directory {directory} holds other files but no run (run.json). Choose another run.dir."
            )
    parent = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"run directory {directory}: {parent} is not writable. Choose another run.dir.")


def open_directory(directory: Path, config: Config, invocation: Invocation, group: Group) -> IO[str] | None:
    """Create the directory and check that all ranks share it. With ``resume=never``, move an old run aside. Collective.

    Rank 0 returns the lock that prevents a second start; the other ranks return None. The lock ends with the process.
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
            error = ConfigError(f"run directory {directory} cannot be written ({failure}).")
            if recorded:
                record_end(directory, "failed", str(error))
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
                f"run directory {directory.absolute()}: rank {group.ranks.rank} on {platform.node()} does not see the "
                "files of rank 0. Put run.dir on a file system that all nodes share."
            )
        )
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return lock


def data_record(dataset: Dataset) -> dict[str, Any]:
    """Return the record of the data set: counts, fingerprint, locations of the splits, and skipped files."""
    return {
        "train_images": len(dataset.train),
        "val_images": len(dataset.val),
        "classes": len(dataset.classes),
        "fingerprint": dataset.fingerprint,
        **dataset.inventory.record(),
    }


def record_start(directory: Path, *, plan: Plan, data: dict[str, Any], **start: Any) -> None:
    """Add to the record the run's `plan` and `data`, and the values of this `start`. Raises `OSError`."""
    _put_record(
        directory / "run.json", _updated_record(directory, {"plan": dataclasses.asdict(plan), "data": data}, start)
    )


def record_end(directory: Path, how: str, reason: str = "", **values: Any) -> None:
    """Record `how` this start ended: ``stopped`` (by a signal) or ``failed``.

    A start without such an entry was killed, or is still running. If writing fails, the record stays unchanged.
    """
    discard(directory / _RESERVE)
    with contextlib.suppress(OSError):
        _put_record(directory / "run.json", _updated_record(directory, {}, _end_entry(how, reason, values)))


def record_finish(directory: Path, final: dict[str, Any], **values: Any) -> None:
    """Write ``final.json`` and record that this start has finished, or do neither. Raises `OSError`."""
    discard(directory / _RESERVE)
    record = _updated_record(directory, {}, _end_entry("finished", "", values))
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
    """Return the error to show the user if writing to `directory` raised `error`."""
    if not directory.is_dir():
        return DataError(f"run directory {directory} was removed while the run used it.")
    what = f"{error.filename} cannot be written" if error.filename else "it cannot be written"
    return DataError(
        f"run directory {directory}: {what} ({error.strerror or error}). Free some space, or make it writable, and run "
        "the same command again to resume from the last checkpoint."
    )


def _end_entry(how: str, reason: str, values: dict[str, Any]) -> dict[str, Any]:
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"ended": {"how": how, "reason": reason, "time": now, **values}}


def _updated_record(directory: Path, run: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """Return the record with additional values for the run and its last start.

    Raises `OSError` if the record cannot be read or is damaged.
    """
    path = directory / "run.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        record.update(run)
        record["started"][-1].update(start)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise OSError(errno.EINVAL, "the record is damaged", str(path)) from None
    return record


def _as_json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, default=str) + "\n").encode()


def _put_record(path: Path, record: dict[str, Any]) -> None:
    write_atomic(path, [_as_json(record)])


def _reserve(directory: Path) -> None:
    # Random bytes, because some file systems store no blocks for zeros.
    path = directory / _RESERVE
    if not path.exists() or path.stat().st_size != _RESERVE_BYTES:
        write_atomic(path, [os.urandom(_RESERVE_BYTES)])


def _move_aside(directory: Path) -> None:
    if not directory.exists() or not any(directory.iterdir()):
        return
    # Raises `ConfigError` if another process uses the directory.
    with _lock(directory):
        number = 1
        while (aside := directory.with_name(f"{directory.name}.old{number}")).exists():
            number += 1
        directory.rename(aside)
    say(f"resume=never: the previous run was moved to {aside}")


def _lock(directory: Path) -> IO[str]:
    import fcntl

    file = (directory / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process with `resume=never` may have moved the directory aside before this process locked the file.
        is_ours = os.path.samestat(os.fstat(file.fileno()), (directory / ".lock").stat())
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    if not is_ours:
        file.close()
        raise ConfigError(f"run directory {directory}: another process is using it. Wait until that process ends.")
    return file


def _write_record(directory: Path, config: Config, invocation: Invocation) -> None:
    # Write this file first, because it distinguishes a run directory from a folder of other files.
    path = directory / "run.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    root = before.get("settings", {}).get("data.root", config.data.root)
    if root != config.data.root:
        say(f"data.root      was {root} so far in this run; the images' names and labels are the same")
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
        directory / "config.yaml": OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))),
    }
    for path, text in texts.items():
        write_atomic(path, [utf8(text)])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect results."""
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
    """Return the ``commit`` of the checkout that contains the code, and ``dirty``: True if files have changed since.

    Return None if the commit is unknown. For an installed package, it is known if pip installed the package from
    ``git+URL``, but not after ``pip install .``.
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
    """Return the commit from direct_url.json, see https://packaging.python.org/en/latest/specifications/direct-url/."""
    with contextlib.suppress(PackageNotFoundError, ValueError, KeyError, TypeError):
        origin = json.loads(distribution("lars-train").read_text("direct_url.json") or "")
        return {"commit": str(origin["vcs_info"]["commit_id"]), "dirty": False}
    return None
