"""TensorBoard's part of a run's log: curves, the layers' histograms and stages, sample images, and the page to open.

Whatever fails in it ends the events and not the run; `reason` says why.
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
"""The page that shows the run at a glance: ``http://localhost:6006/#custom_scalars``."""

_FILE_BYTES = 16 << 20
"""An event file that has passed this is closed, and the next one begun."""
# Of an event beside its summary: length, two checksums, time, update.
_AROUND = 40

# The tab's columns, of which it opens with five, in the order of the alphabet.
_FIRST_SETTINGS = frozenset({"batch", "epochs", "model.name", "optimizer.lr", "optimizer.name"})

_BY_STAGE = {
    "trust ratio": "trust_ratio",
    "learning rate of a layer": "layer_lr",
    "update to weight": "update_ratio",
    "|w|": "weight_norm",
    "|g|": "grad_norm",
}


def layout() -> dict[str, dict[str, list[Any]]]:
    """Return the charts of `CUSTOM_SCALARS_TAB` by heading, the first to read first. Tags are regular expressions.

    A chart has one curve for each run: its colors are the runs', and a second curve would share them and the scale. The
    stages are the exception.
    """

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    return {
        "How it goes": {
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
            "share of time that waited for input": chart("train/wait_share"),
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
    """The events in `folder`, of which those after `update` are taken back.

    They are in several files, each begun when the one before it has passed `_FILE_BYTES` or by a run that goes on.
    TensorBoard reads a folder's files as one, in the order of their names, and takes back what a later one says.
    """

    def __init__(self, folder: Path, update: int) -> None:
        self.reason = ""
        self._folder = str(folder)
        self._writer: Any = None
        try:
            self._begin(purge_step=update + 1)
        except OSError as error:
            self.reason = f"TensorBoard: {error}"
        self._show("add_custom_scalars", layout())

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """A point of each curve."""
        self._do(lambda writer: self._add(writer, _points(values), update))

    def layers(self, values: LayerValues, update: int) -> None:
        """Histograms over the layers, and a line per stage."""
        stages = {f"stage_{what}/{stage}": value for what, stage, value in values.by_stage()}

        def add(writer: Any) -> None:
            summary = _points(stages)
            summary.MergeFrom(_histograms(values, writer.default_bins))
            self._add(writer, summary, update)

        self._do(add)

    def images(self, images: Any, update: int) -> None:
        """A grid of training images as the network gets them: uint8 (n, 3, S, S) in host memory."""
        self._show("add_images", "samples/augmented", images, update)

    def results(self, settings: dict[str, Any], curves: list[str]) -> None:
        """Settings, in the hparams tab, with the last values of those curves as their results."""
        self._do(lambda writer: _add_results(writer.file_writer, settings, curves))

    def flush(self) -> None:
        """Hand what was written so far to the system."""
        self._show("flush")

    def close(self) -> None:
        """Write out what can be, and close the files."""
        self._show("close")

    def _begin(self, purge_step: int | None = None) -> None:
        """Begin a file, which takes back what was written of `purge_step` and later before it."""
        from torch.utils.tensorboard.writer import SummaryWriter

        threading.excepthook = _quiet_about_events
        self._writer = SummaryWriter(self._folder, purge_step=purge_step)
        # The second that is in the file's name, or the one after it.
        self._second, self._size = int(time.time()), 0

    def _add(self, writer: Any, summary: Any, update: int) -> None:
        # Files that were begun within a second have no order by their names, and a later event will do as well.
        if self._size > _FILE_BYTES and int(time.time()) > self._second:
            # In this order: TensorBoard reads no more of a file once there is a later one.
            writer.close()
            self._begin()
            writer = self._writer
        # Counted here, for the file grows when the writer's thread likes.
        self._size += summary.ByteSize() + _AROUND
        writer.file_writer.add_summary(summary, update)

    def _show(self, method: str, *arguments: Any) -> None:
        self._do(lambda writer: getattr(writer, method)(*arguments))

    def _do(self, what: Callable[[Any], object]) -> None:
        """Do it with TensorBoard's writer, which is given up when it fails: it has no way to go on."""
        if self._writer is None:
            return
        try:
            what(self._writer)
        except Exception as error:  # of its thread, whatever it was
            self._writer, self.reason = None, f"TensorBoard: {error}"


def _quiet_about_events(failure: threading.ExceptHookArgs) -> None:
    """Python's hook, but for TensorBoard's thread: `Board.reason` has what ended it."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


def _points(values: Mapping[str, float]) -> Any:
    # All in one event: the writer's own method makes one of each, at many times the cost.
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def _histograms(values: LayerValues, bins: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard.summary import histogram

    summary = Summary()
    for what, of_layers in values.by_layer().items():
        finite = np.asarray(of_layers)[np.isfinite(of_layers)]
        if len(finite):
            summary.MergeFrom(histogram(f"layers/{what}", finite, bins))  # type: ignore[no-untyped-call]
    return summary


def _add_results(file: Any, settings: dict[str, Any], curves: list[str]) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    simple = {printable(k): v if isinstance(v, bool | int | float) else printable(str(v)) for k, v in settings.items()}
    # The writer's own method would draw the results a second time, in charts of one point at update 0.
    experiment, *others = hparams(simple, dict.fromkeys(curves, 0.0))  # type: ignore[no-untyped-call]
    # The tab sorts its columns, with those in front that it holds to differ between runs.
    described = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(described.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in _FIRST_SETTINGS
    described.content = content.SerializeToString()
    for summary in (experiment, *others):
        file.add_summary(summary)
