"""Write TensorBoard events: curves, histograms over the layers, curves by stage, sample images, and a page of charts.

An error stops the events, never the run; `TensorBoardWriter.reason` has the error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lars_train.messages import printable
from lars_train.monitoring.layers import LayerValues

CUSTOM_SCALARS_TAB = "custom_scalars"
"""The tab that shows the run at a glance: ``http://localhost:6006/#custom_scalars``."""

_FILE_BYTES = 16 << 20
"""Size at which an event file is closed and the next one started."""
# Bytes of an event besides its summary: length, two checksums, time, update.
_EVENT_OVERHEAD = 40

# Columns to show first in the hparams tab, which initially shows five, in alphabetical order.
_FIRST_SETTINGS = frozenset({"batch", "epochs", "model.name", "optimizer.lr", "optimizer.name"})

_BY_STAGE = {
    "trust ratio": "trust_ratio",
    "learning rate of a layer": "layer_lr",
    "update to weight": "update_ratio",
    "|w|": "weight_norm",
    "|g|": "grad_norm",
}


def layout() -> dict[str, dict[str, list[Any]]]:
    """Return the charts of `CUSTOM_SCALARS_TAB` by heading, most important first. Tags are regular expressions.

    Most charts have one curve per run: TensorBoard colors by run, so a second curve would have the same color and
    scale. Only the charts by stage have several.
    """

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    return {
        "Overview": {
            "training loss": chart("train/loss"),
            "validation loss": chart("val/loss"),
            "training top-1 %": chart("train/top1"),
            "validation top-1 %": chart("val/top1"),
            "learning rate": chart("train/lr"),
            "training images/s": chart("train/images_per_s"),
        },
        "Layers, by stage": {title: chart(f"stage_{name}/.*") for title, name in _BY_STAGE.items()},
        "Gradient noise": {
            "noise scale, images": chart("noise/scale"),
            "critical batch, images": chart("noise/critical_batch"),
            "tr(Sigma)": chart("noise/trace"),
            "|G|^2": chart("noise/grad_sq"),
        },
        "Machine": {
            "share of time spent waiting for input": chart("train/wait_share"),
            "images/s that the loaders deliver": chart("loader/images_per_s"),
            "model FLOP utilization (CUDA)": chart("train/mfu"),
            "host memory, GiB": chart("memory/host"),
            "device memory (CUDA), GiB": chart("memory/device"),
            "checkpoint write, s": chart("checkpoint/write_seconds"),
            "checkpoint wait, s": chart("checkpoint/wait_seconds"),
            "bad training images": chart("train/bad_images"),
            "bad validation images": chart("val/bad_images"),
        },
    }


class TensorBoardWriter:
    """Write events to `folder`. Events after `update`, which a killed run may have left, are purged.

    A new file starts when the current one exceeds `_FILE_BYTES`, and when a run resumes. TensorBoard reads the files
    of a folder as one, in the order of their names. A later file can purge events of earlier ones.
    """

    def __init__(self, folder: Path, update: int) -> None:
        self.reason = ""
        self._folder = str(folder)
        self._writer: Any = None
        try:
            self._open_file(purge_step=update + 1)
        except OSError as error:
            self.reason = f"TensorBoard: {error}"
        self._call("add_custom_scalars", layout())

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Add a point to each curve."""
        self._do(lambda writer: self._add(writer, _points(values), update))

    def layers(self, values: LayerValues, update: int) -> None:
        """Add histograms over the layers, and a point per stage to its curves."""
        stages = {f"stage_{quantity}/{stage}": value for quantity, stage, value in values.by_stage()}

        def add(writer: Any) -> None:
            summary = _points(stages)
            summary.MergeFrom(_histograms(values, writer.default_bins))
            self._add(writer, summary, update)

        self._do(add)

    def images(self, images: Any, update: int) -> None:
        """Add a grid of training images as the network gets them: uint8 (n, 3, S, S) in host memory."""
        self._call("add_images", "samples/augmented", images, update)

    def results(self, settings: dict[str, Any], curves: list[str]) -> None:
        """Show `settings` in the hparams tab, with the last values of `curves` as results."""
        self._do(lambda writer: _add_results(writer.file_writer, settings, curves))

    def flush(self) -> None:
        """Flush the events to the operating system."""
        self._call("flush")

    def close(self) -> None:
        """Flush the events and close the file."""
        self._call("close")

    def _open_file(self, purge_step: int | None = None) -> None:
        """Start a new file, which purges the events of earlier files from `purge_step` on."""
        from torch.utils.tensorboard.writer import SummaryWriter

        threading.excepthook = _ignore_writer_errors
        self._writer = SummaryWriter(self._folder, purge_step=purge_step)
        # The second in the file's name, or the next second if the clock has advanced since the file was named.
        self._second, self._size = int(time.time()), 0

    def _add(self, writer: Any, summary: Any, update: int) -> None:
        # Do not start two files within one second: their names would have no order. A later event starts the next file.
        if self._size > _FILE_BYTES and int(time.time()) > self._second:
            # Close first: TensorBoard stops reading a file once a later one exists.
            writer.close()
            self._open_file()
            writer = self._writer
        # Counted here, because the writer's thread grows the file at its own pace.
        self._size += summary.ByteSize() + _EVENT_OVERHEAD
        writer.file_writer.add_summary(summary, update)

    def _call(self, method: str, *arguments: Any) -> None:
        self._do(lambda writer: getattr(writer, method)(*arguments))

    def _do(self, action: Callable[[Any], object]) -> None:
        """Call `action` with TensorBoard's writer. Drop the writer if it fails: it cannot recover."""
        if self._writer is None:
            return
        try:
            action(self._writer)
        except Exception as error:  # any error of the writer's thread
            self._writer, self.reason = None, f"TensorBoard: {error}"


def _ignore_writer_errors(failure: threading.ExceptHookArgs) -> None:
    """Call Python's hook, except for TensorBoard's thread: `TensorBoardWriter.reason` has that thread's error."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


def _points(values: Mapping[str, float]) -> Any:
    # One event for all values: SummaryWriter.add_scalar makes one per value, at many times the cost.
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def _histograms(values: LayerValues, bins: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard.summary import histogram

    summary = Summary()
    for quantity, by_layer in values.by_layer().items():
        finite = np.asarray(by_layer)[np.isfinite(by_layer)]
        if len(finite):
            summary.MergeFrom(histogram(f"layers/{quantity}", finite, bins))  # type: ignore[no-untyped-call]
    return summary


def _add_results(file: Any, settings: dict[str, Any], curves: list[str]) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    simple = {printable(k): v if isinstance(v, bool | int | float) else printable(str(v)) for k, v in settings.items()}
    # SummaryWriter.add_hparams would plot the results again, in charts of one point at update 0.
    experiment, *others = hparams(simple, dict.fromkeys(curves, 0.0))  # type: ignore[no-untyped-call]
    # The tab shows the columns marked as differing between runs first, then the others, in alphabetical order.
    described = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(described.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in _FIRST_SETTINGS
    described.content = content.SerializeToString()
    for summary in (experiment, *others):
        file.add_summary(summary)
