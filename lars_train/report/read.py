"""Read a run directory: settings, results, curves, and the state of the run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lars_train.config.values import LATER_KEYS
from lars_train.errors import ConfigError
from lars_train.report.files import (
    Unreadable,
    as_line,
    as_number,
    commit_of,
    integer,
    number,
    read_lines,
    read_object,
    text,
)

FINISHED, CUT_SHORT, STOPPED, FAILED, UNFINISHED = "finished", "cut short", "stopped", "failed", "unfinished"
MAX_RUNS = 1000
_MAX_LINES = 1_000_000
_MAX_DEPTH = 4
_DIVERGED = re.compile(r"(?:Diverged: )?(diverged at update ([0-9,]+):.*)", re.DOTALL)
_MOVED_ASIDE = re.compile(r"\.old\d+$")


@dataclass(frozen=True)
class Point:
    """A logged value at an update. `epoch` is fractional. `seconds`: training wall time so far; None if not logged."""

    update: int
    epoch: float
    seconds: float | None
    value: float


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run directory. None where a value is missing or unusable.

    `best_top1`, `final_top1` and `top1`: in percent, of the average of the weights if the run has ``model.ema``. For a
    run that has not ended, `best_top1` is the best so far.
    `diverged`: the loss diverged. `updates` then counts up to the divergence, not to the log line that detected it.
    `seconds`: wall time of training over all starts. `kwh`: energy of the GPUs over that time.
    `resumes`: starts that resumed from a checkpoint.
    `problems`: messages about missing or unreadable files. `recorded`: False if run.json has no settings; `settings`
    then has the few in ``final.json``.
    """

    directory: Path
    state: str
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    batch: str = "?"
    nominal_batch: int | None = None
    global_batch: int | None = None
    samples: int | None = None
    raised: bool = False
    updates: int = 0
    diverged: bool = False
    planned_updates: int | None = None
    seconds: float | None = None
    kwh: float | None = None
    best_top1: float | None = None
    final_top1: float | None = None
    resumes: int = 0
    rollbacks: int = 0
    precision: str | None = None
    versions: tuple[str, ...] = ()
    top1: tuple[Point, ...] = ()
    loss: tuple[Point, ...] = ()
    problems: tuple[str, ...] = ()
    recorded: bool = True

    @property
    def scaled(self) -> bool:
        """True if the batch is scaled in proportion to the size of the data set."""
        return self.nominal_batch is not None and self.nominal_batch != self.global_batch is not None

    @property
    def images_per_s(self) -> float | None:
        """Training images per second of training and evaluation.

        None for a diverged run: its time includes updates that do not count.
        """
        if self.diverged or not self.seconds or self.global_batch is None or not self.updates:
            return None
        return self.updates * self.global_batch / self.seconds

    def setting(self, key: str) -> str:
        """Return a setting as text; empty if it is missing or null."""
        value = self.settings.get(key)
        return "" if value is None else f"{value:.7g}" if isinstance(value, float) else as_line(value)


@dataclass(frozen=True)
class Ratios:
    """Trust ratios. `values[i][j]` belongs to `layers[j]` at `updates[i]`; None if not finite."""

    layers: tuple[str, ...]
    updates: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Return the run directories among and below `paths`, each once. Skip runs that were moved aside.

    Raises `ConfigError` for a path that does not exist, is a file or contains no run, and for over `MAX_RUNS` runs.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            if path.exists():
                raise ConfigError(
                    f"{path}: is a file. Pass the run directory that contains it, or a folder of run directories."
                )
            raise ConfigError(f"{path}: no such folder. Pass run directories, or a folder of run directories.")
        inside = [path] if (path / "run.json").exists() else _below(path)
        if not inside:
            raise ConfigError(f"{path}: no run directory found (a run directory contains run.json).")
        for run in inside:
            found.setdefault(run.resolve(), run)
        if len(found) > MAX_RUNS:
            raise ConfigError(f"{path}: more than {MAX_RUNS:,} run directories. Pass fewer.")
    return list(found.values())


def _below(path: Path) -> list[Path]:
    runs: list[Path] = []
    for root, folders, names in os.walk(path):
        here = Path(root)
        if "run.json" in names:
            runs.append(here)
        if "run.json" in names or len(here.relative_to(path).parts) >= _MAX_DEPTH or len(runs) > MAX_RUNS:
            folders.clear()
        folders[:] = sorted(name for name in folders if not _MOVED_ASIDE.search(name) and not name.startswith("."))
    return runs


def read_run(directory: Path) -> RunRecord:
    """Read the run in `directory`. A file that cannot be parsed raises nothing: the run's `problems` list it."""
    problems: list[str] = []
    record, final = (_object(directory / name, problems) for name in ("run.json", "final.json"))
    settings = {as_line(k): v for k, v in _dict(record, "settings").items()}
    if settings:
        settings = {**LATER_KEYS, **settings}
    plan = {**final, **_dict(record, "plan")}
    starts = record.get("started", [])
    top1, loss, last, seconds = _curves(directory, problems)
    state, reason, updates = _state(final, starts, last)
    diverged = _DIVERGED.fullmatch(reason) if state == FAILED else None
    if diverged is not None:
        reason, updates = diverged[1], min(updates, int(diverged[2].replace(",", "")))
    if state in (FINISHED, CUT_SHORT):
        seconds = number(final, "seconds")
        problems += _missing(directory, final, updates, top1, last)
        problems += map(as_line, _dict(_dict(starts[-1] if starts else {}, "ended"), "incomplete") or ())
    elif starts:
        seconds = number(_dict(starts[-1], "ended"), "seconds") or seconds
    resolved = _dict(starts[-1] if starts else {}, "resolved")
    result = final if state in (FINISHED, CUT_SHORT) else {}
    size = settings.get("batch.size")
    return RunRecord(
        directory=directory,
        state=state,
        reason=reason,
        settings=settings or _settings_of(final),
        batch=as_line(size) if size is not None else text(settings, "batch.name") or text(final, "batch") or "?",
        nominal_batch=integer(plan, "nominal_batch") or integer(settings, "batch.nominal"),
        global_batch=integer(plan, "global_batch"),
        samples=integer(plan, "samples"),
        raised=plan.get("raised", False),
        updates=updates,
        diverged=diverged is not None,
        planned_updates=integer(final, "planned_updates") or integer(plan, "updates"),
        seconds=seconds,
        kwh=number(result, "kwh"),
        best_top1=number(result, "best_top1") if result else max((p.value for p in top1), default=None),
        final_top1=number(result, "final_top1"),
        resumes=sum(integer(start, "resumed_at") != 0 for start in starts[1:]),
        rollbacks=len(final.get("rollbacks", [])),
        precision=text(resolved, "precision"),
        versions=_versions(starts),
        top1=top1,
        loss=loss,
        problems=tuple(problems),
        recorded=bool(settings),
    )


def read_ratios(directory: Path, most: int = 240) -> Ratios | None:
    """Read the trust ratios of the run in `directory`, thinned to about `most` updates; None if there are none."""
    try:
        layers = read_object(directory / "trust_ratios.fields.json").get("layers")
    except Unreadable:
        return None
    if not layers:
        return None
    kept: list[tuple[int, tuple[float | None, ...]]] = []
    stride, seen = 1, -1
    for line in read_lines(directory / "trust_ratios.jsonl", []):
        update, ratios = integer(line, "update"), line.get("trust_ratios", ())
        if update is None or len(ratios) != len(layers):
            continue
        seen += 1
        if seen % stride:
            continue
        kept.append((update, tuple(as_number(ratio) for ratio in ratios)))
        if len(kept) >= 2 * most:
            kept, stride = kept[::2], 2 * stride
    kept = kept[:: len(kept) // most + 1]
    if not kept:
        return None
    return Ratios(tuple(map(as_line, layers)), tuple(u for u, _ in kept), tuple(v for _, v in kept))


def _object(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return read_object(path)
    except Unreadable as problem:
        problems.append(str(problem))
        return {}


def _dict(record: dict[str, Any], key: str) -> dict[str, Any]:
    return record.get(key) or {}


def _state(final: dict[str, Any], starts: list[dict[str, Any]], last: int) -> tuple[str, str, int]:
    """Return state, reason and completed updates. `last`: the update of the log's last line."""
    start = starts[-1] if starts else {}
    ended = _dict(start, "ended")
    how = text(ended, "how")
    done, planned = integer(final, "updates"), integer(final, "planned_updates")
    if done is not None and planned is not None and done >= last:
        if done >= planned:
            return FINISHED, "", done
        # If max_updates ended a run, its final.json stays until a later start resumes the run.
        if how == "finished" or "resumed_at" not in start:
            return CUT_SHORT, "by max_updates", done
    update = max(last, integer(ended, "update") or 0)
    reason = text(ended, "reason") or ""
    if how == "finished":
        return UNFINISHED, "finished, but final.json is missing or damaged", update
    if how == "failed":
        return FAILED, reason, update
    if how == "stopped":
        return STOPPED, reason.removeprefix("Stopped: ").partition(":")[0], update
    return UNFINISHED, "killed or still running", update


def _missing(directory: Path, final: dict[str, Any], updates: int, top1: tuple[Point, ...], last: int) -> Iterator[str]:
    """Yield a message for each gap in the files of a run that ended with a result."""
    for key in ("best_top1", "final_top1"):
        if number(final, key) is None:
            yield f"final.json: no usable {key}"
    # A directory with only a copied final.json is not meant to be a complete run directory.
    if not updates or not (directory / "run.json").exists():
        return
    if not last:
        yield (
            "metrics.jsonl: "
            + ("no usable line" if (directory / "metrics.jsonl").exists() else "missing")
            + "; the curves omit this run"
        )
    elif last < updates:
        yield f"metrics.jsonl: ends at update {last:,} of {updates:,}, as do the curves"
    elif number(final, "final_top1") is not None and (not top1 or top1[-1].update < updates):
        yield f"metrics.jsonl: the top-1 of the last update, {updates:,}, is missing"


def _curves(directory: Path, problems: list[str]) -> tuple[tuple[Point, ...], tuple[Point, ...], int, float | None]:
    """Return top-1 and training loss by update, the last logged update, and the seconds until then."""
    top1: dict[int, Point] = {}
    loss: dict[int, Point] = {}
    last, passed = 0, None
    for count, line in enumerate(read_lines(directory / "metrics.jsonl", problems)):
        if count >= _MAX_LINES:
            problems.append(f"metrics.jsonl: ignored beyond {_MAX_LINES:,} lines")
            break
        update, epoch, seconds = integer(line, "update"), number(line, "epoch"), number(line, "run/seconds")
        if update is None or epoch is None:
            continue
        last = max(last, update)
        passed = seconds if seconds is not None and seconds >= (passed or 0) else passed
        accuracy, nats = number(line, "val/ema_top1"), number(line, "train/loss")
        accuracy = number(line, "val/top1") if accuracy is None else accuracy
        if accuracy is not None:
            top1[update] = Point(update, epoch, passed, accuracy)
        if nats is not None:
            loss[update] = Point(update, epoch, passed, nats)
    in_order = [tuple(points[update] for update in sorted(points)) for points in (top1, loss)]
    return in_order[0], in_order[1], last, passed


def _settings_of(final: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that ``final.json`` has, for a run whose run.json cannot be read."""
    keys = {
        "recipe": "recipe.name",
        "data": "data.name",
        "model": "model.name",
        "optimizer": "optimizer.name",
        "base": "optimizer.base",
        "lr": "optimizer.lr",
        "power": "schedule.power",
        "warmup_epochs": "schedule.warmup_epochs",
        "epochs": "epochs",
        "seed": "seed",
    }
    return {setting: final[key] for key, setting in keys.items() if key in final}


def _versions(starts: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the distinct versions over all starts: of lars-train, torch, and the commit."""
    described = []
    for start in starts:
        versions, git = _dict(start, "versions"), _dict(start, "git")
        parts = [f"{name} {text(versions, name)}" for name in ("lars-train", "torch") if text(versions, name)]
        if commit := commit_of(git):
            parts.append(commit)
        if parts:
            described.append(", ".join(parts))
    return tuple(dict.fromkeys(described))
