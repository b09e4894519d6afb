"""Detect divergence without waiting for the device, and collect images that cannot be decoded.

`Guard` finds a divergence, `RollbackPolicy` decides how the run responds, and `BadImages` collects bad images.
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
"""The file that lists a run's divergences and the response to each. Only rank 0 writes it."""
_SHOWN = 5
# Updates to record between two checks. Rarely reached, because each log line and each checkpoint makes a check.
_MAX_LOSSES = _MAX_LAYERS = 1024
# Batches in a row without an update. Each halves float16's loss scale, which starts at 2**16, so after this many the
# scale is not the cause.
_MAX_SKIPPED = 60


@dataclass(frozen=True)
class Divergence:
    """The first `update` whose loss was above the limit or not finite.

    Attributes:
        quantity: ``train/loss``, computed with the weights before the update, or ``val/loss``, with those after it.
        layers: (name, |w|, |g|, trust ratio) of each adapted parameter at update `layers_of`. Empty for ``val/loss``,
            for an optimizer other than LARS, and if more than a thousand updates passed between two checks.
        layers_of: the update whose layers are in `layers`. For ``val/loss``, this is `update`. For ``train/loss``, this
            is the update before `update`, because it made the weights that gave the loss. For the first update
            since a start or rollback, this is `update`.
    """

    update: int
    loss: float
    lr: float
    layers: tuple[tuple[str, float, float, float], ...]
    layers_of: int
    quantity: str = "train/loss"

    @property
    def last_good_update(self) -> int:
        """The last update whose weights may be good. Weights that gave an infinite or NaN loss are not good."""
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
    """Keeps losses and layer norms of updates on the device until the host checks them.

    An update has diverged if the mean loss of its global batch is above `max_loss` or not finite; with None, only if
    not finite. Ranks that record the same losses get the same result.
    """

    def __init__(self, max_loss: float | None) -> None:
        # A finite limit, so that an infinite loss exceeds it. For a loss of NaN, `loss <= limit` is False.
        self._max_loss = min(math.inf if max_loss is None else max_loss, sys.float_info.max)
        self.reset()

    def reset(self) -> None:
        """Drop all records, for example after a restore."""
        self._skipped_in_a_row = 0
        # The losses of updates `_seen` to `_last`, which have not been checked yet.
        self._losses: list[Tensor] = []
        self._began = self._seen = self._last = 0
        self._layers: deque[Callable[[], Layers] | None] = deque(maxlen=_MAX_LAYERS)

    def watch(self, update: int, loss: Tensor, optimizer: Optimizer) -> None:
        """Record the mean `loss` (one element, on the device) of `update`, the last update of `optimizer`."""
        self._skipped_in_a_row = 0
        if not self._began:
            self._began = self._seen = update
        self._last = update
        self._losses.append(loss)
        if len(self._losses) == _MAX_LOSSES:
            # Merge them into one tensor, because each small tensor occupies a whole block of memory.
            self._losses = [self._all_losses()]
        self._layers.append(optimizer.recorded() if isinstance(optimizer, LARS) else None)

    def skip(self, update: int) -> None:
        """Count a batch that made no update. `update`: the last update that was made.

        Raises `Diverged` if there are more such batches in a row than float16's loss scale can explain.
        """
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > _MAX_SKIPPED:
            raise Diverged(
                f"after update {update:,} the gradients of {self._skipped_in_a_row} batches in a row were not finite "
                "in float16, at any loss scale; choose precision=bf16, or lower optimizer.lr."
            )

    def found(self, network: nn.Module, lr_of: Any) -> Divergence | None:
        """Return the first divergence since the last check, or None. The host waits for the device.

        `lr_of`: a function that maps an update's number to its learning rate.
        """
        losses = self._all_losses().tolist() if self._losses else []
        for update, loss in enumerate(losses, start=self._seen):
            if not loss <= self._max_loss:
                of = max(update - 1, self._began)
                return Divergence(update, loss, lr_of(update), self._layers_of(of, network), of)
        self._losses, self._seen = [], self._last + 1
        # Keep the layers of the last update, because the next update may diverge.
        self._layers = deque(list(self._layers)[-1:], maxlen=_MAX_LAYERS)
        return None

    def _all_losses(self) -> Tensor:
        return torch.cat([loss.reshape(-1) for loss in self._losses])

    def _layers_of(self, update: int, network: nn.Module) -> tuple[tuple[str, float, float, float], ...]:
        """Return the layers at `update`, or an empty tuple if they are no longer available."""
        place = update - (self._last - len(self._layers) + 1)
        layers = self._layers[place] if place >= 0 else None
        if layers is None:
            return ()
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        parameters, values = layers()
        return tuple((names[id(p)], *column) for p, column in zip(parameters, values.T.tolist(), strict=True))


class RollbackPolicy:
    """Decides how a run responds to a divergence: resume from an earlier checkpoint, or stop.

    Rank 0 records the decision.

    Args:
        config: the limits of rollbacks.
        directory: the run directory.
        group: the ranks. `newest` and `decide` are collective.
        newest: loads the newest usable checkpoint of the given update or before. Raises `ConfigError` if all are
            damaged.
        say: prints a line.
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

        `rollbacks`: the records of earlier rollbacks. `skipped`: the number of global batches skipped before
        `divergence`. Raises `Diverged` with the report if the config allows no further rollback, or if there is no
        checkpoint for one.
        """
        start, lines = None, divergence.lines()
        if self._config.on_divergence == "rollback" and len(rollbacks) < self._config.max_rollbacks:
            start = self._target(divergence.last_good_update, rollbacks)
            if start is None:
                lines.append("There is no earlier checkpoint (see checkpoint.keep, checkpoint.every_updates).")
        if start is None:
            self._stop(divergence, lines, len(rollbacks))
        first = start["update"] + start["skipped"]
        count = divergence.update + skipped - first
        step = {"from_update": divergence.update, "to_update": start["update"], "passed_over_from": first}
        step["passed_over"] = count
        self._record(divergence, {"action": "rollback", **step})
        lines.append(
            f"Resuming from update {start['update']:,} and skipping the next {counted(count, 'batch', 'batches')}: "
            f"rollback {len(rollbacks) + 1} of at most {self._config.max_rollbacks}."
        )
        for line in lines:
            self._say(f"WARNING: {line}")
        return start, step

    def _target(self, last_good_update: int, rollbacks: list[dict[str, int]]) -> dict[str, Any] | None:
        """Return the newest checkpoint of update `last_good_update` or before, or None.

        If the run has made no progress since the previous rollback, return a checkpoint before the one used then.
        """

        def newest(last: int) -> dict[str, Any] | None:
            try:
                return self._newest(min(last, last_good_update))
            except ConfigError:  # all are damaged
                return None

        found = newest(last_good_update)
        if found is None or found["update"] > max((step["to_update"] for step in rollbacks), default=-1):
            return found
        before = rollbacks[-1]["to_update"]
        return newest(before - 1) or newest(before) or found

    def _stop(self, divergence: Divergence, lines: list[str], rollbacks: int) -> NoReturn:
        """Record the divergence, rename the checkpoints after its `last_good_update`, and raise `Diverged`."""
        self._record(divergence, {"action": "stop"})
        after = f" after {counted(rollbacks, 'rollback')}" if rollbacks else ""
        if self._group.first:
            with contextlib.suppress(OSError):
                renamed = checkpoint.set_aside(self._directory / "checkpoints", divergence.last_good_update)
                lines += [f"Set aside: {path}" for path in renamed]
        lines.append(
            f"Stopped{after}; divergence.jsonl in {self._directory} has the report. "
            "Lower optimizer.lr, raise schedule.warmup_epochs, or skip the samples before the divergence by resuming "
            "from the last checkpoint with guard.on_divergence=rollback (see guard.max_rollbacks)."
        )
        raise Diverged("\n".join(lines))

    def _record(self, divergence: Divergence, action: dict[str, Any]) -> None:
        if self._group.first:
            try:
                record_divergence(self._directory, divergence, action)
            except OSError as error:  # the report is printed in any case
                self._say(f"WARNING: {DIVERGENCES} cannot be written ({error.strerror}).")


def record_divergence(directory: Path, divergence: Divergence, action: dict[str, Any]) -> None:
    """Append a line with the divergence and `action` (the response, and where the run resumes), atomically.

    Raises `OSError`.
    """
    path = directory / DIVERGENCES
    before = path.read_bytes() if path.exists() else b""
    write_atomic(path, [before, json.dumps({**divergence.record(), **action}).encode() + b"\n"])


def roll_back_divergences(directory: Path, rollbacks: int) -> None:
    """Keep the lines of the first `rollbacks` rollbacks. Remove those of later ones, which a resumed run repeats.

    Also remove a line that is incomplete because the process was killed.
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
    """Return the images that ``bad_images.jsonl`` lists. Ignore a line that is incomplete after a kill."""
    listed = set()
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            listed.add(json.loads(line)["image"])
        except (ValueError, KeyError, TypeError):
            continue
    return listed


def with_current_paths(known: dict[str, str], before: str | None, root: str | None) -> dict[str, str]:
    """Return `known` with the images' current paths after the data set moved from `before` (absolute) to `root`."""
    if before is None or root is None:
        return known
    here = root if is_url(root) else str(user_path(root))
    places = {place: place if is_url(place) else str(Path(place).resolve()) for place in known}
    return {
        here + places[place].removeprefix(before) if places[place].startswith(before) else place: reason
        for place, reason in known.items()
    }


class BadImages:
    """The images that cannot be decoded.

    `known` maps the path or URL of an image to the reason. Pass the images of earlier starts. `collect` adds the new
    images of all ranks to that dict, so that the dict is the same on every rank.
    """

    def __init__(self, limit: int, group: Group, known: dict[str, str] | None = None) -> None:
        self._limit, self._group = limit, group
        self.known: dict[str, str] = {} if known is None else known
        self._found: dict[str, str] = {}
        self._unwritten: list[str] = []

    def note(self, samples: Iterable[BadSample]) -> None:
        """Add bad images that this rank has found."""
        for sample in samples:
            self._found[sample.where] = sample.reason

    def collect(self) -> dict[str, str]:
        """Combine the ranks' bad images, and return the new ones with reasons, by path or URL. Collective.

        Raises `DataError` on every rank if there are more bad images than the limit.
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
            path: ``bad_images.jsonl``, which lists each image once even if the run resumes.
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
                # The run calls `write` again before the next checkpoint, and that call then raises the error.
                with contextlib.suppress(OSError):
                    self.write(path)

    def write(self, path: Path) -> None:
        """Write pending lines, on which the next checkpoint relies. Raises `OSError`."""
        if self._unwritten:
            before = path.read_bytes() if path.exists() else b""
            write_atomic(path, [before, "".join(self._unwritten).encode()])
            self._unwritten.clear()
