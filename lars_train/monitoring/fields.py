"""Every number that a run logs: its name, unit and meaning. The names are stable; scripts rely on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

FIELDS: dict[str, tuple[str, str]] = {
    "update": ("updates", "optimizer steps done when the line was written"),
    "epoch": ("epochs", "update / updates per epoch"),
    "run/seconds": ("s", "wall time of training up to the line, over all starts, without what a kill made undone"),
    "train/loss": ("nats", "mean loss of the samples since the last line, label smoothing included"),
    "train/top1": ("percent", "share of the same (augmented) samples whose class ranked first"),
    "train/lr": ("1", "learning rate of the last update"),
    "train/images_per_s": ("images/s", "samples of all ranks over wall time since the last line"),
    "train/mfu": (
        "1",
        "GPUs only: model FLOP utilization, train/images_per_s times the floating-point operations of training on an "
        "image, over ranks times the rate of matrix products that was measured when the run started (flops_per_image "
        "and peak_flops in run.json)",
    ),
    "train/wait_share": ("1", "share of that time that rank 0 waited for input"),
    "train/grad_norm": ("1", "norm of the whole gradient of the last update, before LARS"),
    "train/weight_norm": ("1", "norm of all weights before the last update"),
    "train/update_ratio": ("1", "norm of what the last update added to the weights, over train/weight_norm"),
    "train/bad_images": ("images", "training images found undecodable so far"),
    "train/checkpoint_failures": ("checkpoints", "checkpoints that could not be written so far"),
    "train/loss_scale": ("1", "float16 only: factor on the loss"),
    "noise/grad_sq": (
        "1",
        "estimate of |G|^2, the squared norm of the gradient without noise, from the gradients of two batch sizes; "
        "averaged exponentially over log lines; absent where an update is one micro-batch of one rank",
    ),
    "noise/trace": ("images", "estimate of tr(Sigma), the variance of one image's gradient, averaged likewise"),
    "noise/scale": (
        "images",
        "gradient noise scale: noise/trace over noise/grad_sq; absent as long as one of them is not above 0",
    ),
    "noise/critical_batch": (
        "images",
        "the global batch that it implies, at which an update makes half of the progress that a noiseless one would: "
        "noise/scale as a whole number",
    ),
    "memory/host": ("GiB", "resident memory of rank 0's process; where the system tells it (Linux)"),
    "memory/device": ("GiB", "CUDA only: most memory of rank 0's device allocated at once since the last line"),
    "checkpoint/wait_seconds": ("s", "time since the last line for which training waited for checkpoints"),
    "checkpoint/write_seconds": ("s", "time in which the newest checkpoint was written and verified in the background"),
    "loader/images_per_s": (
        "images/s",
        "training images that the loaders can deliver: rank 0's since the last line over the time its workers took for "
        "them (waiting left out), times workers and ranks",
    ),
    "loader/fast_share": (
        "1",
        "share of the same images that the run's decoder decoded where that is not Pillow; the others are Pillow's, or "
        "pixels in the store",
    ),
    "val/top1": ("percent", "validation samples whose class ranked first"),
    "val/top5": ("percent", "validation samples whose class ranked among the first five"),
    "val/loss": ("nats", "mean loss of the decoded validation samples, without label smoothing"),
    "val/count": ("images", "validation samples counted, each exactly once"),
    "val/checksum": ("1", "of the numbers of the validation samples counted: the same for the same samples"),
    "val/bad_images": ("images", "validation images that cannot be decoded; they count as wrong"),
    "val/best_top1": ("percent", "best val/top1 so far"),
    "val/seconds": ("s", "wall time of the evaluation"),
}

TIMING_FIELDS = frozenset(
    (
        "run/seconds",
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
"""The fields that differ between two runs with the same results."""

LAYOUT_DEPENDENT_FIELDS = TIMING_FIELDS | {"noise/grad_sq", "noise/trace", "noise/scale", "noise/critical_batch"}
"""Those that differ or are absent with other ranks or another micro-batch, whose gradients they are estimated from."""

RATIO_FIELDS: dict[str, tuple[str, str]] = {
    "update": ("updates", "optimizer steps done when the line was written"),
    "trust_ratios": (
        "1",
        "LARS's trust ratio of each adapted parameter in the last update, in the order of `layers`, to four digits; "
        "null: not finite",
    ),
}

_ON_A_LINE: dict[str, Callable[[float], str]] = {
    "train/loss": "loss {:.3f}".format,
    "train/top1": "top-1 {:.1f} %".format,
    "train/lr": "lr {:.3g}".format,
    "train/images_per_s": "{:,.0f} images/s".format,
    "train/wait_share": lambda share: f"wait {100 * share:.0f} %",
    "train/mfu": lambda share: f"MFU {100 * share:.0f} %",
}


def on_a_line(logged: dict[str, float], *names: str) -> Iterator[str]:
    """Yield the text, for a line of progress, of each of these fields that was logged."""
    return (_ON_A_LINE[name](logged[name]) for name in names if name in logged)
