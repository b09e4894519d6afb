"""Cite published training speeds of devices, and convert them to the speed of this program's training step.

All figures are of ResNet-50 at 224 pixels. A micro-batch takes a constant time, `_FLOOR`, plus a time per image, so
small micro-batches are slower per image. Programs differ in the time per image. MLPerf's programs compute batch norm,
ReLU and sums inside the convolution kernels, and launch kernels through CUDA graphs. For this program separate kernels
are assumed. They move `SEPARATE_BYTES` more per image through the device's memory, and the host launches each of them.
The kernels of `models.ghost_kernels`, which fuse some of them, have not been timed. docs/plan.md compares the model
with published results.
"""

from __future__ import annotations

from dataclasses import dataclass

from lars_train.preflight.time_model import Speed

CPU = "cpu"
"""The cited CPU device: one core, running one process with one thread."""

FLOPS_PER_IMAGE = 24_535_105_536
"""Operations per image of ResNet-50 at 224 pixels with 1,000 classes (`training.metrics.flops_per_image`)."""
TENSORS = 161
"""Parameter tensors of ResNet-50. The number of a network's kernels is assumed to be proportional to this number."""
SEPARATE_BYTES = 240e6
"""Bytes per image that separate kernels read and write beyond what fused kernels do: 471 MB - 231 MB, at 2 bytes
per element. The passes over a layer's output are 8 instead of 3 for batch norm, 5 instead of 0 for ReLU, and 6 instead
of 3 for the sum with the shortcut."""

# Seconds that a micro-batch takes regardless of its images: each of its hundreds of kernels has a minimum time.
# From the H100's figures with 400 and with 50 images in MLPerf 4.0 (docs/plan.md): (8 x 10.36 ms - 56.07 ms) / 7 is
# 3.8 ms, from which the share of the all-reduce is subtracted.
_FLOOR = 3.5e-3
# Seconds that a host needs to launch an operation. An update of 559 operations took 22.2 ms on a host with slow cores,
# for which the H100 waited (docs/gpu_notes.md).
_LAUNCH = 22.2e-3 / 559
# Numbers of operations that launch kernels, counted with torch 2.14: for the forward and backward pass of a micro-batch
# with one ghost batch, for the same with several ghost batches, and for the rest of an update. The first two are those
# of the version that was timed; later versions make fewer (docs/gpu_notes.md), whose time is not known.
_OPERATIONS_OF_ONE, _OPERATIONS_OF_SEVERAL, _OPERATIONS_OF_UPDATE = 516, 781, 43


@dataclass(frozen=True)
class Figure:
    """A published speed. `fused`: the program has fused kernels, as MLPerf's programs do."""

    images_per_second: float
    """Images/s per device while all devices of a machine train together; for a CPU, of one core alone."""
    micro_batch: int
    source: str
    fused: bool = False


@dataclass(frozen=True)
class CitedDevice:
    """A device with its figures by precision; `memory` and `link` are in bytes per second, from its data sheet."""

    figures: dict[str, Figure]
    memory: float = 0.0
    """Bandwidth of the device's memory. 0 for a CPU."""
    link: float = 0.0
    """Bandwidth to the other devices of its machine, in one direction. 0: the same as to other machines."""


_NVIDIA = (
    "https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/ConvNets/resnet50v1.5"
    "#training-performance-results"
)
_MLPERF = "https://github.com/mlcommons/training_results_v4.0/tree/main/NVIDIA/results"

# Data sheets give a link's bandwidth for both directions together; `link` is half of it.
DEVICES = {
    # 16,621 and 7,248 images/s on eight devices. fp32 is TF32.
    "a100": CitedDevice(
        {
            **dict.fromkeys(("bf16", "fp16"), Figure(2078, 256, f"{_NVIDIA}, 8 x A100 80GB, mixed precision")),
            "fp32": Figure(906, 256, f"{_NVIDIA}, 8 x A100 80GB, TF32"),
        },
        memory=2.039e12,
        link=300e9,
    ),
    # The source has no figure for fp32.
    "h100": CitedDevice(
        dict.fromkeys(
            ("bf16", "fp16"),
            Figure(7134, 400, f"{_MLPERF}/eos_ngc24.04_mxnet/resnet, 8 x H100, mixed precision", fused=True),
        ),
        memory=3.35e12,
        link=450e9,
    ),
    "h200": CitedDevice(
        dict.fromkeys(
            ("bf16", "fp16"),
            Figure(7872, 400, f"{_MLPERF}/h200_ngc24.04_mxnet/resnet, 8 x H200, mixed precision", fused=True),
        ),
        memory=4.8e12,
        link=450e9,
    ),
    # 8,322 and 2,855 images/s on eight devices. A V100 has no bfloat16 arithmetic.
    "v100": CitedDevice(
        {
            "fp16": Figure(1040, 256, f"{_NVIDIA}, 8 x V100 16GB, mixed precision"),
            "fp32": Figure(357, 112, f"{_NVIDIA}, 8 x V100 16GB, FP32"),
        },
        memory=0.9e12,
        link=150e9,
    ),
    CPU: CitedDevice(
        {
            "fp32": Figure(2.16, 16, "this program on one thread of an AMD EPYC"),
        }
    ),
}


def speed(device: CitedDevice, precision: str, *, fused: bool = False) -> Speed:
    """Return the speed of ResNet-50 at 224 pixels on `device`: with MLPerf's programs if `fused`, else with this one.

    Raises `KeyError` for a precision without a figure.
    """
    figure = device.figures[precision]
    if not device.memory:
        return Speed(figure.images_per_second)
    seconds = 1 / figure.images_per_second - _FLOOR / figure.micro_batch
    seconds += (figure.fused - fused) * SEPARATE_BYTES / device.memory
    if fused:
        return Speed(1 / seconds, _FLOOR)
    launch = (_LAUNCH * _OPERATIONS_OF_ONE, _LAUNCH * _OPERATIONS_OF_SEVERAL)
    return Speed(1 / seconds, _FLOOR, launch, _LAUNCH * _OPERATIONS_OF_UPDATE)
