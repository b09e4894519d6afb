"""Name, unit and meaning of every number that a run logs. The names are stable, because scripts rely on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

FIELDS: dict[str, tuple[str, str]] = {
    "update": ("updates", "optimizer steps done when the line was written"),
    "epoch": ("epochs", "update / updates per epoch"),
    "run/seconds": ("s", "wall time of training up to this line, over all starts, excluding work lost to a kill"),
    "run/kwh": (
        "kWh",
        "GPUs only, and only if the package nvidia-ml-py is installed: energy of the GPUs of all ranks, without that "
        "of their hosts, over the time of run/seconds",
    ),
    "train/loss": ("nats", "mean of `loss` over the samples since the last line, label smoothing included"),
    "train/top1": (
        "percent",
        "top-1 accuracy on the same (augmented) samples; with mixup or cutmix, the label of the larger part of a mixed "
        "image counts",
    ),
    "train/lr": ("1", "learning rate of the last update"),
    "train/images_per_s": ("images/s", "samples of all ranks over wall time since the last line"),
    "train/mfu": (
        "1",
        "GPUs only: model FLOP utilization, train/images_per_s * flops_per_image / (ranks * peak_flops). run.json has "
        "flops_per_image, the floating-point operations to train on one image (with data.size_schedule, at the image "
        "size of the first epoch; flops_by_size has the other sizes), and peak_flops, the rate of matrix products "
        "measured at the start",
    ),
    "train/wait_share": ("1", "share of wall time since the last line during which rank 0 waited for input"),
    "train/grad_norm": (
        "1",
        "norm of the full gradient in the last update, before optimizer.clip_grad_norm and LARS",
    ),
    "train/weight_norm": ("1", "norm of all weights before the last update"),
    "train/update_ratio": ("1", "norm of the change that the last update made to the weights, over train/weight_norm"),
    "train/bad_images": ("images", "training images so far that cannot be decoded"),
    "train/checkpoint_failures": ("checkpoints", "checkpoints that could not be written so far"),
    "train/loss_scale": ("1", "float16 only: factor by which the loss is scaled"),
    "noise/grad_sq": (
        "1",
        "estimate of |G|^2, the squared norm of the noise-free gradient, from the gradients of two batch sizes; "
        "exponential average over log lines; absent if an update is one micro-batch on one rank",
    ),
    "noise/trace": (
        "images",
        "estimate of tr(Sigma), the variance of one image's gradient; averaged like noise/grad_sq",
    ),
    "noise/scale": (
        "images",
        "gradient noise scale: noise/trace over noise/grad_sq; absent unless both are above 0",
    ),
    "noise/critical_batch": (
        "images",
        "global batch at which an update makes half the progress of a noise-free update: noise/scale as a whole number",
    ),
    "memory/host": ("GiB", "resident memory of rank 0's process (Linux only)"),
    "memory/device": ("GiB", "CUDA only: peak memory allocated on rank 0's device since the last line"),
    "checkpoint/wait_seconds": ("s", "time since the last line during which training waited for checkpoints"),
    "checkpoint/write_seconds": ("s", "time to write and verify the newest checkpoint in the background"),
    "loader/images_per_s": (
        "images/s",
        "images/s that the loaders can deliver: rank 0's images since the last line, divided by the time that its "
        "workers were busy, times workers and ranks",
    ),
    "loader/fast_share": (
        "1",
        "share of rank 0's images since the last line that a decoder other than Pillow decoded; the other images are "
        "decoded by Pillow or stored as pixels",
    ),
    "val/top1": ("percent", "top-1 accuracy on the validation set"),
    "val/top5": ("percent", "top-5 accuracy on the validation set"),
    "val/loss": (
        "nats",
        "mean cross entropy (even with loss=bce) of the decoded validation samples, without label smoothing",
    ),
    "val/ema_top1": ("percent", "with model.ema only: top-1 accuracy of the average of the weights"),
    "val/ema_top5": ("percent", "with model.ema only: top-5 accuracy of the average of the weights"),
    "val/ema_loss": ("nats", "with model.ema only: val/loss of the average of the weights"),
    "val/count": ("images", "validation samples evaluated, each exactly once"),
    "val/checksum": ("1", "checksum of the ids of the evaluated samples: equal if the same samples were evaluated"),
    "val/bad_images": ("images", "validation images that cannot be decoded; they count as wrong"),
    "val/best_top1": ("percent", "best val/top1 so far; with model.ema, best val/ema_top1"),
    "val/seconds": ("s", "wall time of the evaluation"),
}

TIMING_FIELDS = frozenset(
    (
        "run/seconds",
        "run/kwh",
        "train/images_per_s",
        "train/mfu",
        "train/wait_share",
        "memory/host",
        "memory/device",
        "checkpoint/wait_seconds",
        "checkpoint/write_seconds",
        "loader/images_per_s",
        "val/seconds",
    )
)
"""Fields that may differ between two runs with identical results."""

LAYOUT_DEPENDENT_FIELDS = TIMING_FIELDS | {"noise/grad_sq", "noise/trace", "noise/scale", "noise/critical_batch"}
"""`TIMING_FIELDS`, and the noise estimates, which depend on the number of ranks and the micro-batch."""

RATIO_FIELDS: dict[str, tuple[str, str]] = {
    "update": ("updates", "optimizer steps done when the line was written"),
    "trust_ratios": (
        "1",
        "LARS's trust ratio of each adapted parameter in the last update, in the order of `layers`, to four digits; "
        "null if not finite",
    ),
}

_LINE_FORMATS: dict[str, Callable[[float], str]] = {
    "train/loss": "loss {:.3f}".format,
    "train/top1": "top-1 {:.1f} %".format,
    "train/lr": "lr {:.3g}".format,
    "train/images_per_s": "{:,.0f} images/s".format,
    "train/wait_share": lambda share: f"wait {100 * share:.0f} %",
    "train/mfu": lambda share: f"MFU {100 * share:.0f} %",
}


def format_fields(logged: dict[str, float], *names: str) -> Iterator[str]:
    """Return the logged values among the fields `names`, formatted for a progress line."""
    return (_LINE_FORMATS[name](logged[name]) for name in names if name in logged)
