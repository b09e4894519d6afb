"""TensorBoard's part of a run's log: curves, the layers' histograms and stages, sample images, and the page to open.

Whatever fails in it ends the events and not the run; `reason` says why.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lars_train.monitoring.layers import LayerValues
from lars_train.text import printable

PAGE = "custom_scalars"
"""The page that shows the run at a glance: ``http://localhost:6006/#custom_scalars``."""

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
    """The charts of `PAGE`, by heading; the first heading is the one to begin with. Tags are regular expressions."""

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    return {
        "How it goes": {
            "loss": chart("train/loss", "val/loss"),
            "top-1 %": chart("train/top1", "val/top1", "val/best_top1"),
            "learning rate": chart("train/lr"),
            "images/s": chart("train/images_per_s", "loader/images_per_s"),
        },
        "Layers, by stage": {title: chart(f"stage_{name}/.*") for title, name in _BY_STAGE.items()},
        "Gradient noise": {
            "noise scale and critical batch, images": chart("noise/scale", "noise/critical_batch"),
            "tr(Sigma)": chart("noise/trace"),
            "|G|^2": chart("noise/grad_sq"),
        },
        "Machine": {
            "share of time that waited for input": chart("train/wait_share"),
            "model FLOP utilisation": chart("train/mfu"),
            "memory, GiB": chart("memory/.*"),
            "checkpoints, s": chart("checkpoint/.*"),
            "bad images": chart("train/bad_images", "val/bad_images"),
        },
    }


class Board:
    """The events in `folder`, of which those after `update` are taken back."""

    def __init__(self, folder: Path, update: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.reason = ""
        self._writer: Any = SummaryWriter(str(folder), purge_step=update + 1)
        self._show("add_custom_scalars", layout())

    def scalar(self, tag: str, value: float, update: int) -> None:
        """One point of a curve."""
        self._show("add_scalar", tag, value, update)

    def layers(self, values: LayerValues, update: int) -> None:
        """Histograms over the layers, and a line per stage."""
        import numpy as np

        for what, of_layers in values.by_layer().items():
            finite = np.asarray(of_layers)[np.isfinite(of_layers)]
            if len(finite):
                self._show("add_histogram", f"layers/{what}", finite, update)
        for what, stage, value in values.by_stage():
            self.scalar(f"stage_{what}/{stage}", value, update)

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
