"""Watch a run for divergence, without waiting for the device, and for images that cannot be decoded.

`Guard` finds a divergence, `RollbackPolicy` decides how the run responds, `BadImages` collects bad images.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars_train.config.schema import GuardConfig
from lars_train.data.loading.loader import BadSample
from lars_train.errors import ConfigError, DataError, Diverged
from lars_train.fsutil import user_path, write_atomic
from lars_train.messages import counted, is_url
from lars_train.optim.lars import LARS
from lars_train.optim.rescale import Layers
from lars_train.training import checkpoint
from lars_train.training.distributed import Group

DIVERGENCES = "divergence.jsonl"
"""The file of a run's divergences and the response to each. Only rank 0 writes it."""
_SHOWN = 5
# More updates than usual between two checks, which come with log lines and checkpoints.
_MOST_LOSSES = _MOST_LAYERS = 1024
# Batches in a row without an update. float16's loss scale starts at 2**16: after so many halvings it is not the cause.
_MOST_SKIPPED = 60


@dataclass(frozen=True)
class Divergence:
    """The first `update` whose loss was above the limit or not finite.

    `quantity`: ``train/loss``, computed from the weights before that update, or ``val/loss``, from those after it.

    `layers`: per adapted parameter (name, |w|, |g|, trust ratio) at update `layers_of`. That is the update before,
    whose weights gave that loss, or `update` itself if it is the first since a start or rollback. Empty for an
    optimizer other than LARS, and if more than a thousand updates passed between two checks.
    """

    update: int
    loss: float
    lr: float
    layers: tuple[tuple[str, float, float, float], ...]
    layers_of: int
    quantity: str = "train/loss"

    @property
    def sound(self) -> int:
        """The last update whose weights may be good. Weights that gave an infinite or NaN loss are not."""
        weights_of = self.update if self.quantity == "val/loss" else self.update - 1
        return weights_of if math.isfinite(self.loss) else weights_of - 1

    def record(self) -> dict[str, Any]:
        """Return the divergence as values for JSON, with the layers of the largest trust ratios and gradients."""
        return {
            "update": self.update,
            "quantity": self.quantity,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "lr": self.lr,
            "layers_of_update": self.layers_of,
            "largest_trust_ratios": {name: ratio for name, _, _, ratio in self._largest(3)},
            "largest_gradients": {name: norm for name, _, norm, _ in self._largest(2)},
        }

    def lines(self) -> list[str]:
        """Return the divergence as lines of text."""
        what = "validation loss" if self.quantity == "val/loss" else "loss"
        lines = [f"diverged at update {self.update:,}: {what} {self.loss:g}, lr {self.lr:.4g}."]
        if self.layers:
            for what, column in (("trust ratios", 3), ("gradient norms", 2)):
                shown = ", ".join(f"{layer[0]} {layer[column]:.3g}" for layer in self._largest(column))
                lines.append(f"largest {what} at update {self.layers_of:,}: {shown}")
        return lines

    def _largest(self, column: int) -> list[Any]:
        def size(layer: Any) -> float:
            value = float(layer[column])
            return value if value == value else math.inf

        return sorted(self.layers, key=size, reverse=True)[:_SHOWN]


class Guard:
    """Keeps the losses of updates on the device, with the norms of the layers, until the host checks them.

    `max_loss`: the mean loss of a global batch above which an update counts as diverged; None: only a loss that is not
    finite. All ranks get the same result if they pass the same losses.
    """

    def __init__(self, max_loss: float | None) -> None:
        # At most the largest finite number: infinity is above it, and NaN compares false.
        self._max_loss = min(math.inf if max_loss is None else max_loss, sys.float_info.max)
        self.forget()

    def forget(self) -> None:
        """Drop all records, for example after a restore."""
        self._skipped_in_a_row = 0
        # Losses of consecutive updates up to `_last`. Those before `_seen` have been checked.
        self._losses: list[Tensor] = []
        self._began = self._seen = self._last = 0
        self._layers: deque[Callable[[], Layers] | None] = deque(maxlen=_MOST_LAYERS)

    def watch(self, update: int, loss: Tensor, optimizer: Optimizer) -> None:
        """Record the mean `loss` (one element, on the device) of `update`, the last update of `optimizer`."""
        self._skipped_in_a_row = 0
        if not self._began:
            self._began = self._seen = update
        self._last = update
        self._losses.append(loss)
        if len(self._losses) == _MOST_LOSSES:
            # One tensor, because each small one takes a whole block of memory.
            self._losses = [self._all_losses()]
        self._layers.append(optimizer.recorded() if isinstance(optimizer, LARS) else None)

    def skip(self, update: int) -> None:
        """Count a batch after `update` that made no update.

        Raises `Diverged` if there were more in a row than float16's loss scale explains.
        """
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > _MOST_SKIPPED:
            raise Diverged(
                f"after update {update:,} the gradients of {self._skipped_in_a_row} batches in a row were not finite "
                "in float16, at any loss scale: choose precision=bf16, or lower optimizer.lr."
            )

    def found(self, network: nn.Module, lr_of: Any) -> Divergence | None:
        """Return the first divergence since the last check, or None. The host waits for the device.

        `lr_of`: from an update's number to its learning rate.
        """
        losses = self._all_losses().tolist() if self._losses else []
        for update, loss in enumerate(losses, start=self._seen):
            if not loss <= self._max_loss:
                of = max(update - 1, self._began)
                return Divergence(update, loss, lr_of(update), self._layers_of(of, network), of)
        self._losses, self._seen = [], self._last + 1
        # Keep the layers of the last update, for a divergence at the next one.
        self._layers = deque(list(self._layers)[-1:], maxlen=_MOST_LAYERS)
        return None

    def _all_losses(self) -> Tensor:
        return torch.cat([loss.reshape(-1) for loss in self._losses])

    def _layers_of(self, update: int, network: nn.Module) -> tuple[tuple[str, float, float, float], ...]:
        """Return the layers at `update`, or nothing if they are no longer kept."""
        place = update - (self._last - len(self._layers) + 1)
        layers = self._layers[place] if place >= 0 else None
        if layers is None:
            return ()
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        parameters, values = layers()
        return tuple((names[id(p)], *column) for p, column in zip(parameters, values.T.tolist(), strict=True))


class RollbackPolicy:
    """Decides how a run responds to a divergence: resume from an earlier checkpoint, or stop. Rank 0 records it.

    `directory`: the run directory. `newest` loads the newest usable checkpoint of an update or before, and raises
    `ConfigError` if all are damaged. `newest` and `decide` are collective. `say` prints a line.
    """

    def __init__(
        self,
        config: GuardConfig,
        directory: Path,
        group: Group,
        newest: Callable[[int], dict[str, Any] | None],
        say: Callable[[str], None],
    ) -> None:
        self._config, self._directory, self._group, self._newest, self._say = config, directory, group, newest, say

    def decide(
        self, divergence: Divergence, rollbacks: list[dict[str, int]], skipped: int
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """Return the content of the checkpoint to resume from, and the record of this rollback.

        `rollbacks`: the records of earlier rollbacks; `skipped`: global batches skipped before `divergence`. Raises
        `Diverged` with the report if the config allows no rollback, or no more, or if no checkpoint is left for one.
        """
        start, lines = None, divergence.lines()
        if self._config.on_divergence == "rollback" and len(rollbacks) < self._config.max_rollbacks:
            start = self._target(divergence.sound, rollbacks)
            if start is None:
                lines.append("No earlier checkpoint is left (checkpoint.keep, checkpoint.every_updates).")
        if start is None:
            self._stop(divergence, lines, len(rollbacks))
        first = start["update"] + start["skipped"]
        count = divergence.update + skipped - first
        step = {"from_update": divergence.update, "to_update": start["update"], "passed_over_from": first}
        step["passed_over"] = count
        self._record(divergence, {"action": "rollback", **step})
        lines.append(
            f"Resuming from update {start['update']:,} without the next {counted(count, 'batch', 'batches')}: "
            f"rollback {len(rollbacks) + 1} of at most {self._config.max_rollbacks}."
        )
        for line in lines:
            self._say(f"WARNING: {line}")
        return start, step

    def _target(self, sound: int, rollbacks: list[dict[str, int]]) -> dict[str, Any] | None:
        """Return the newest checkpoint of update `sound` or before that may be good, or None.

        A rollback that has made no progress since the previous one goes further back.
        """

        def newest(last: int) -> dict[str, Any] | None:
            try:
                return self._newest(min(last, sound))
            except ConfigError:  # all are damaged
                return None

        found = newest(sound)
        if found is None or found["update"] > max((step["to_update"] for step in rollbacks), default=-1):
            return found
        before = rollbacks[-1]["to_update"]
        return newest(before - 1) or newest(before) or found

    def _stop(self, divergence: Divergence, lines: list[str], rollbacks: int) -> NoReturn:
        """Record the divergence, rename the checkpoints after its last sound update, and raise `Diverged`."""
        self._record(divergence, {"action": "stop"})
        after = f" after {counted(rollbacks, 'rollback')}" if rollbacks else ""
        if self._group.first:
            with contextlib.suppress(OSError):
                renamed = checkpoint.set_aside(self._directory / "checkpoints", divergence.sound)
                lines += [f"Set aside: {path}" for path in renamed]
        lines.append(
            f"Stopped{after}; divergence.jsonl in {self._directory} has the report. "
            "Lower optimizer.lr, raise schedule.warmup_epochs, or resume from the last checkpoint without the "
            "samples before the divergence (guard.on_divergence=rollback, guard.max_rollbacks)."
        )
        raise Diverged("\n".join(lines))

    def _record(self, divergence: Divergence, action: dict[str, Any]) -> None:
        if self._group.first:
            try:
                record_divergence(self._directory, divergence, action)
            except OSError as error:  # the report is printed in any case
                self._say(f"WARNING: {DIVERGENCES} cannot be written ({error.strerror}).")


def record_divergence(directory: Path, divergence: Divergence, action: dict[str, Any]) -> None:
    """Append a line with `action`: the response, and where the run resumes. Atomic. Raises OSError."""
    path = directory / DIVERGENCES
    before = path.read_bytes() if path.exists() else b""
    write_atomic(path, [before, json.dumps({**divergence.record(), **action}).encode() + b"\n"])


def take_back_divergences(directory: Path, rollbacks: int) -> None:
    """Keep the lines of the first `rollbacks` rollbacks. A resumed run repeats later ones, which a kill undid.

    A line that a kill truncated is dropped too.
    """
    path = directory / DIVERGENCES
    if not path.exists():
        return
    kept, found, whole = [], 0, path.read_bytes()
    for line in whole.splitlines(keepends=True):
        is_rollback = b'"action": "rollback"' in line
        found += is_rollback
        if line.endswith(b"\n") and not (is_rollback and found > rollbacks):
            kept.append(line)
    if b"".join(kept) != whole:
        write_atomic(path, kept)


def listed_images(path: Path) -> set[str]:
    """Return the images that ``bad_images.jsonl`` lists. A line that a kill truncated lists none."""
    listed = set()
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            listed.add(json.loads(line)["image"])
        except (ValueError, KeyError, TypeError):
            continue
    return listed


def moved(known: dict[str, str], before: str | None, root: str | None) -> dict[str, str]:
    """Return the `known` images by their current paths, after the data set moved from `before` (absolute) to `root`."""
    if before is None or root is None:
        return known
    here = root if is_url(root) else str(user_path(root))
    places = {place: place if is_url(place) else str(Path(place).resolve()) for place in known}
    return {
        here + places[place].removeprefix(before) if places[place].startswith(before) else place: reason
        for place, reason in known.items()
    }


class BadImages:
    """The images that cannot be decoded. `known`: path or URL, and reason; the same on every rank after `collect`.

    `known` starts with the images of earlier starts. `collect` adds new ones to that dict.
    """

    def __init__(self, limit: int, group: Group, known: dict[str, str] | None = None) -> None:
        self._limit, self._group = limit, group
        self.known: dict[str, str] = {} if known is None else known
        self._found: dict[str, str] = {}
        self._unwritten: list[str] = []

    def note(self, samples: Iterable[BadSample]) -> None:
        """Add images that this rank has found."""
        for sample in samples:
            self._found[sample.where] = sample.reason

    def collect(self) -> dict[str, str]:
        """Combine what the ranks have found; return the new images, by path or URL. Collective.

        Raises `DataError` on every rank if there are more than the limit.
        """
        everyone = self._group.all_gather(self._found)
        self._found = {}
        new = {w: r for part in everyone for w, r in sorted(part.items()) if w not in self.known}
        self.known.update(new)
        if len(self.known) > self._limit:
            shown = "; ".join(f"{where} ({reason})" for where, reason in list(self.known.items())[:5])
            count = counted(len(self.known), "image")
            raise DataError(
                f"{count} cannot be decoded, more than data.max_bad={self._limit}: {shown}. Fix the data set, or raise "
                "data.max_bad."
            )
        return new

    def report(self, path: Path, update: int, say: Callable[[str], None]) -> None:
        """Call `collect`. Rank 0 prints the new images and lists them in `path`, even if `collect` raises. Collective.

        Args:
            path: ``bad_images.jsonl``, which lists an image once however often the run resumes.
            update: the run's last update.
            say: prints a line.
        """
        before = len(self.known)
        try:
            self.collect()
        finally:
            if self._group.first:
                listed = listed_images(path)
                for where, reason in list(self.known.items())[before:]:
                    if where in listed:
                        continue
                    say(f"WARNING: image {where} cannot be decoded: {reason}")
                    self._unwritten.append(json.dumps({"image": where, "reason": reason, "update": update}) + "\n")
                with contextlib.suppress(OSError):  # `write` raises it before the next checkpoint
                    self.write(path)

    def write(self, path: Path) -> None:
        """Write the lines that could not be written so far; the next checkpoint relies on them. Raises OSError."""
        if self._unwritten:
            before = path.read_bytes() if path.exists() else b""
            write_atomic(path, [before, "".join(self._unwritten).encode()])
            self._unwritten.clear()
