"""Define the schemas of the modes (evaluate, export, plan and check) and of the log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass
class EvaluateConfig:
    """Evaluation during training, and ``mode=evaluate``."""

    every_epochs: int = 1
    """Epochs between evaluations; the last update is always evaluated."""
    flip: Optional[bool] = None
    """Predict from the mean of the logits of each image and its mirror image. With ``mode=evaluate``, null means the
    setting of the run that wrote the checkpoint.
    """
    ema: Optional[bool] = None
    """For ``mode=evaluate``: evaluate the checkpoint's average of the weights (``model.ema``) instead of the weights.
    null: true if the checkpoint has an average.
    """
    report: Optional[str] = None
    """For ``mode=evaluate``: the folder to write the accuracy per class and the confusion matrix to."""
    outputs: str = "subset"
    """For ``mode=evaluate`` on a subset of the model's classes: predict only among that subset (subset, as in the
    published results on ImageNet-A and -R), or among all classes (all).
    """


@dataclass
class ExportConfig:
    """Settings of ``mode=export``."""

    path: Optional[str] = None
    """The file to write: ``.pth``, ``.safetensors`` or ``.onnx`` (null: a ``.pth`` beside the checkpoint)."""
    ema: Optional[bool] = None
    """Write the checkpoint's average of the weights (``model.ema``) instead of the weights. null: true if the
    checkpoint has an average.
    """


@dataclass
class PlanConfig:
    """Settings of ``mode=plan``: the machines to plan for, and the output."""

    path: Optional[str] = None
    """The JSON file to write (null: none)."""
    picture: Optional[str] = None
    """The PNG file to write: hours, efficiency and the limiting factor on 1 to 4,096 devices (null: none)."""
    world: Optional[int] = None
    """Number of ranks (null: launch.nodes times launch.nproc, or the number that this machine would start)."""
    device: Optional[str] = None
    """Device with a published speed: a100, h100, h200, v100, or cpu, which is one core (docs/plan.md)."""
    images_per_second: Optional[float] = None
    """Training speed of one device in images/s at your micro-batch, instead of a published speed; with
    ``data.size_schedule``, at the size of the first epoch.
    """
    cores: int = 8
    """CPU cores per device that decode images."""
    decode_rate: Optional[float] = None
    """Images/s that a core decodes (null: ignore the input pipeline)."""
    update_ms: float = 0.0
    """Milliseconds per update that do not depend on the number of images: the optimizer's step."""
    latency_us: float = 10.0
    """Latency of a message between devices, in microseconds."""
    bandwidth_gb: float = 12.5
    """Bandwidth from a device to a device of another node, in 10**9 bytes/s."""
    all_reduce: str = "auto"
    """All-reduce algorithm between nodes: ring, tree, or auto (the faster of the two)."""
    overlap: float = 1.0
    """Share of the last micro-batch's backward pass that can overlap with communication. The all-reduce of the last
    bucket never overlaps.
    """


@dataclass
class CheckConfig:
    """Settings of ``mode=check``."""

    seconds: float = 5.0
    """Seconds for each speed measurement; the whole check takes at most 18 times as long."""
    samples: int = 256
    """Images that each machine decodes."""


@dataclass
class LogConfig:
    """Tools that get a copy of the run's log (docs/tools.md)."""

    wandb: Optional[str] = None
    """The project of Weights & Biases, or ENTITY/PROJECT."""
    mlflow: Optional[str] = None
    """The tracking URI of MLflow, such as ``sqlite:///mlflow.db`` or a server's address."""
