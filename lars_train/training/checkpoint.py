"""Save and load checkpoints: one file per saved update, written atomically and verified before use.

A file is a ``torch.save`` archive of plain values and tensors, so that it loads with ``weights_only=True``. A last line
contains the SHA-256 of all bytes before it, because the archive's own checksums cover its records but not the headers
that locate them. Readers of archives ignore that line. `Run._save` stores:

- `Trainer.state`: ``update``, ``skipped``, ``model`` (with batch norm's buffers), ``optimizer``, ``scaler``, ``meter``,
  and ``ema``, the averaged network, if the run has ``model.ema``
- `RunState`: ``best_top1``, ``best_update``, ``seconds``, ``bad``, ``rollbacks``, ``noise``
- the run: ``config``, ``plan``, ``resolved`` (settings chosen for the machine), ``classes``, ``fingerprint`` and
  ``layout`` of the data
- ``format``, the version of this list

There is no random state to save, because order and augmentation are functions of the seed (data/order.py).
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import torch

from lars_train.errors import ConfigError
from lars_train.fsutil import discard, name_in_errors, sync_folder, user_path
from lars_train.messages import first_line, ignore_closed_output, printable
from lars_train.monitoring.noise import NoiseScale

FORMAT = 1
# The entries on which every reader of a checkpoint relies.
_ENTRIES = {
    "update": int,
    "model": dict,
    "optimizer": dict,
    "config": dict,
    "plan": dict,
    "classes": list,
    "fingerprint": str,
}
_MARK = b"\nsha256 of the bytes before this line: "
_TRAILER = len(_MARK) + 64 + 1
SET_ASIDE = "diverged-"
"""The name prefix of checkpoints that a diverged run has set aside. Neither a resumed run nor an export reads them."""
_NAME = re.compile(r"update-(\d{9})\.pt")


# Marks the fields of `RunState` that a rollback leaves unchanged.
_SURVIVES = {"survives_rollback": True}


@dataclass
class RunState:
    """The state of a run apart from the trainer's. A checkpoint stores each field under its name."""

    best_top1: float = -math.inf
    best_update: int | None = None
    seconds: float = field(default=0.0, metadata=_SURVIVES)
    """Wall time of training in earlier starts, each up to the checkpoint from which the next start resumed.

    The value in a checkpoint includes the start that wrote the checkpoint.
    """
    bad: dict[str, str] = field(default_factory=dict, metadata=_SURVIVES)
    """The images that cannot be decoded: path or URL, and reason."""
    rollbacks: list[dict[str, int]] = field(default_factory=list, metadata=_SURVIVES)
    noise: NoiseScale = field(default_factory=NoiseScale)
    kwh: float | None = field(default=0.0, metadata={**_SURVIVES, "may_be_missing": True})
    """Energy of all ranks' devices: in the time that `seconds` counts, and in this start so far.

    None if it cannot be measured on every rank.
    """

    def __post_init__(self) -> None:
        self.start_clock()

    def start_clock(self) -> None:
        """Start counting the wall time of this start."""
        self._started = time.perf_counter()

    def total_seconds(self) -> float:
        """Return the wall time of training over all starts, including this one."""
        return self.seconds + time.perf_counter() - self._started

    def stored(self) -> dict[str, Any]:
        """Return the fields as plain values, for a checkpoint."""
        return {**asdict(self), "seconds": self.total_seconds()}

    def restore(self, content: dict[str, Any], *, rollback: bool = False) -> None:
        """Read the fields from the `content` of a checkpoint. Raises `ConfigError` if one is missing.

        With `rollback`, keep the wall time, the energy, the bad images and the earlier rollbacks.
        """
        for each in fields(self):
            if not (rollback and each.metadata.get("survives_rollback")):
                optional = each.metadata.get("may_be_missing")
                current = getattr(self, each.name)
                stored: Any = content.get(each.name) if optional else value(content, each.name)
                # `asdict` has turned a field that is a dataclass into a dict.
                setattr(self, each.name, replace(current, **stored) if is_dataclass(type(current)) else stored)


class DamagedCheckpoint(Exception):
    """The file is not a complete checkpoint of this program. The message gives the reason."""


class NewerCheckpoint(DamagedCheckpoint):
    """A newer version of this program wrote the file, and this version cannot read it."""


def save(folder: Path, update: int, content: dict[str, Any], keep: int, spare: int | None = None) -> Path:
    """Write the checkpoint of `update` and return its path. Remove all but the last `keep` and that of update `spare`.

    The file is renamed to its final name only when it is complete on disk and its checksum matches.
    """
    folder.mkdir(exist_ok=True)
    path = path_of(folder, update)
    partial = path.with_suffix(".partial")
    try:
        with name_in_errors(path), partial.open("wb") as file:
            hashing = _Hashing(file)
            try:
                torch.save({"format": FORMAT, **content}, cast("IO[bytes]", hashing))
            except RuntimeError:
                if hashing.error is not None:  # torch's C++ code raises RuntimeError instead of the write's error
                    raise hashing.error from None
                raise
            file.write(_MARK + hashing.digest.hexdigest().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if not verify(partial):
            raise DamagedCheckpoint("the checksum at its end is missing")
        partial.replace(path)
    except Exception:
        # On a full disk the partial file would take up space that later files need.
        discard(partial)
        raise
    sync_folder(folder)
    for old in listing(folder)[:-keep]:
        if _update_of(old) != spare:
            old.unlink()
    return path


def keep_best(folder: Path, update: int) -> None:
    """Make ``best.pt`` a hard link to the checkpoint of `update` (or a copy), so that it outlives that file."""
    partial, best = folder / "best.partial", folder / "best.pt"
    partial.unlink(missing_ok=True)
    try:
        os.link(path_of(folder, update), partial)
    except OSError:  # a file system without hard links
        try:
            shutil.copyfile(path_of(folder, update), partial)
        except OSError:
            discard(partial)
            raise
    partial.replace(best)
    # If both are already the same file, `replace` leaves the partial one in place.
    partial.unlink(missing_ok=True)
    sync_folder(folder)


def roll_back_best(folder: Path, update: int, best_update: int | None) -> None:
    """If ``best.pt`` is from after `update`, replace it by the checkpoint of `best_update`, or remove it."""
    best = folder / "best.pt"
    if best.exists():
        try:
            later = load(best)["update"] > update
        except DamagedCheckpoint:
            later = True
        if not later:
            return
        best.unlink()
    restore_best(folder, best_update)


def restore_best(folder: Path, best_update: int | None) -> None:
    """Recreate a missing ``best.pt``, for example after a full disk, if its checkpoint still exists."""
    if best_update is not None and not (folder / "best.pt").exists() and path_of(folder, best_update).exists():
        keep_best(folder, best_update)


def set_aside(folder: Path, after: int) -> list[Path]:
    """Rename a diverged run's checkpoints after update `after`, so that no run resumes from them. Return the paths."""
    later = [path for path in listing(folder) if _update_of(path) > after]
    return [path.replace(path.with_name(path.name.replace("update-", SET_ASIDE))) for path in later]


def path_of(folder: Path, update: int) -> Path:
    """Return the path of the checkpoint of `update`."""
    return folder / f"update-{update:09d}.pt"


def listing(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("update-*.pt") if _NAME.fullmatch(path.name))


def _update_of(path: Path) -> int:
    return int(path.stem.removeprefix("update-"))


def remove_later(folder: Path, update: int) -> None:
    """Remove the checkpoints after `update`, which the resumed run will write again, and partly written files.

    Keep the checkpoints of a newer version of this program.
    """
    for path in folder.glob("*.partial"):
        path.unlink(missing_ok=True)
    for path in listing(folder):
        if _update_of(path) > update and not _is_newer(path):
            path.unlink()


def _is_newer(path: Path) -> bool:
    try:
        load(path)
    except NewerCheckpoint:
        return True
    except DamagedCheckpoint:
        pass
    return False


class _Hashing:
    """A file for sequential writing that computes the SHA-256 of its content."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def verify(path: Path) -> bool:
    """Return True if the file's checksum matches, False for a complete archive without a checksum.

    Another program may have written such an archive. Raises `DamagedCheckpoint` for all other files.
    """
    with path.open("rb") as file:
        length = path.stat().st_size - _TRAILER
        if length > 0:
            file.seek(length)
            trailer = file.read()
            if trailer.startswith(_MARK):
                file.seek(0)
                if trailer != _MARK + _digest(file, length) + b"\n":
                    raise DamagedCheckpoint("its checksum does not match")
                return True
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # a damaged archive can raise anything: zlib.error, struct.error, RuntimeError
        raise DamagedCheckpoint(f"it is not a complete archive ({first_line(error)})") from None
    if broken is not None:
        raise DamagedCheckpoint(f"the checksum of its record {broken} does not match")
    return False


def _digest(file: IO[bytes], length: int) -> bytes:
    digest = hashlib.sha256()
    while length > 0:
        data = file.read(min(length, 1 << 20))
        if not data:
            break
        digest.update(data)
        length -= len(data)
    return digest.hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """Return the checkpoint at `path`, on the CPU. Raises `DamagedCheckpoint`."""
    try:
        has_checksum = verify(path)
    except OSError as error:
        raise DamagedCheckpoint(f"it cannot be read ({error.strerror})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message advises turning weights_only off, which is unsafe
        raise DamagedCheckpoint(
            "torch cannot read it as plain values and tensors, the only content that is loaded"
        ) from None
    except Exception as error:
        raise DamagedCheckpoint(f"torch cannot read it ({first_line(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise DamagedCheckpoint("it is not a checkpoint of lars-train; for a file of weights, set model.weights")
    if content["format"] > FORMAT:
        raise NewerCheckpoint(f"a newer lars-train wrote it (format {content['format']}; this version reads {FORMAT})")
    missing = _ENTRIES.keys() - content.keys()
    if missing:
        raise DamagedCheckpoint(f"it lacks {', '.join(sorted(missing))}")
    wrong = [key for key, kind in _ENTRIES.items() if not isinstance(content[key], kind)]
    if not wrong and not all(isinstance(name, str) for name in content["classes"]):
        wrong = ["classes"]
    if wrong:
        raise DamagedCheckpoint(f"entries with an unexpected type: {', '.join(wrong)}")
    if not has_checksum:
        raise DamagedCheckpoint("it has no checksum at its end: truncated, or written by another program")
    return content


def value(content: dict[str, Any], *keys: str) -> Any:
    """Return ``content[key1][key2]...``. Raises `ConfigError` if a key is missing."""
    found: Any = content
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            raise ConfigError(
                f"the checkpoint has no {'.'.join(keys)}, which every run writes; choose another checkpoint."
            )
        found = found[key]
    return found


def latest(
    folder: Path,
    *,
    warn: bool = True,
    check: Callable[[dict[str, Any]], None] = lambda content: None,
    last: int | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest usable checkpoint of a run, or None if there are no checkpoints.

    Skip damaged checkpoints, and those for which `check` raises `ConfigError`. Raises `ConfigError` if all are skipped:
    a run that has lost its state does not silently start over.

    Args:
        warn: print a warning to stderr for each checkpoint that is skipped.
        check: raises `ConfigError` for a checkpoint that does not fit.
        last: consider only checkpoints of this update or before.
    """
    damaged: list[str] = []
    any_newer = False
    unfit: ConfigError | None = None
    for path in reversed(listing(folder)):
        if last is not None and _update_of(path) > last:
            continue
        try:
            content = load(path)
            check(content)
            return path, content
        except DamagedCheckpoint as error:
            damaged.append(f"{path.name}: {error}")
            any_newer = any_newer or isinstance(error, NewerCheckpoint)
            what = "cannot be used" if isinstance(error, NewerCheckpoint) else "is damaged"
            text = f"WARNING: checkpoint {path} {what}: {error}. Trying the previous one."
        except ConfigError as error:
            unfit = unfit or ConfigError(f"{path}: {error}")
            text = f"WARNING: checkpoint {path} does not fit: {error} Trying the previous one."
        if warn:
            with ignore_closed_output():
                print(printable(text), file=sys.stderr, flush=True)
    if unfit is not None:
        raise unfit
    if damaged:
        raise ConfigError(
            f"no checkpoint in {folder} can be used ({'; '.join(damaged)}); "
            f"{'use that newer lars-train, or ' if any_newer else ''}start over with resume=never."
        )
    return None


def find(text: str) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that ``checkpoint.path`` names: a file, or the newest of a run directory.

    Raises `ConfigError` if it is missing, damaged or of a newer version.
    """
    path = user_path(text)
    if not path.exists():
        raise ConfigError(f"checkpoint.path={text}: no such file or run directory.")
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        found = latest(folder)
        if found is None:
            raise ConfigError(f"checkpoint.path={text}: the folder holds no checkpoint (update-*.pt).")
        return found
    try:
        return path, load(path)
    except DamagedCheckpoint as error:
        raise ConfigError(f"checkpoint.path={text}: the file cannot be used: {error}.") from None
