"""Define the config's schema, one dataclass per section, and register it with Hydra.

In a field that recipes set, `None` means that `recipe.fill_from_recipe` takes the value from the recipe's row. Recipes
have their schema in `recipe_schema`, the modes other than training in `mode_schema`, the network in `network`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from lars_train.config.augment import AugmentConfig
from lars_train.config.mode_schema import CheckConfig, EvaluateConfig, ExportConfig, LogConfig, PlanConfig
from lars_train.config.network import ModelConfig
from lars_train.config.recipe_schema import RecipeConfig

AUTO = "auto"
MODES = ("train", "evaluate", "export", "plan", "check")


@dataclass
class RunConfig:
    """The location of the run."""

    dir: Optional[str] = None
    """The path of the run directory."""
    name: Optional[str] = None
    """The name of the run directory in ``runs/``. By default, the name contains a hash of the experiment."""


@dataclass
class BatchConfig:
    """The global batch: the samples of one update."""

    name: str = "32k"
    """The recipe's row: a batch of ``configs/choices.yaml``."""
    nominal: int = 32768
    """Samples of one update on ImageNet."""
    size: Optional[int] = None
    """Samples of one update, instead of the batch of a recipe's row; requires ``optimizer.lr``."""
    scaled: Optional[bool] = None
    """Shrink the nominal batch in proportion to the data set. null: false if `size` is set, or for ``data=imagenet``,
    folder, huggingface or custom; else true.
    """


@dataclass
class DataConfig:
    """The data set, its order, augmentation and decoding."""

    name: str = "mini"
    """imagenet, folder, huggingface, mini (embedded), cifar10, fashion_mnist, synthetic or custom."""
    root: Optional[str] = None
    """The images: a folder, ``.zip``, tar shards, packed store or a store's URL; for cifar10 and fashion_mnist, the
    download folder.
    """
    holdout: Optional[float] = None
    """Use this share of ``train/`` for validation instead of ``val/``."""
    val_labels: Optional[str] = None
    """Labels for a flat ``val/`` of ImageNet: the devkit, or a CSV of file and class."""
    image_key: Optional[str] = None
    """For tar shards with several images in a sample: the extension of the image to read (jpg), or several extensions
    to try in order (jpg:png).
    """
    image_size: Optional[int] = None
    """Side of the network's input, in pixels, in training and evaluation. null: the sizes of the recipe's row, else
    224. The row's sizes apply only if this key is null.
    """
    train_size: Optional[int] = None
    """Size in training, if it differs from image_size."""
    eval_size: Optional[int] = None
    """Size in evaluation, if it differs from image_size."""
    size_schedule: Optional[list[int]] = None
    """Progressive resizing: [start, end, first, last]. The training size is `start` up to epoch `first`, and `end` from
    epoch `last` on. In between it changes linearly, rounded to a multiple of 32. Epochs count from 0 (FFCV).
    """
    eval_resize: Optional[int] = None
    """Evaluation resizes the shorter side to this many pixels, instead of the evaluation size divided by
    eval_crop.
    """
    augment: str = "inception"
    """inception (random resized crop), scale_crop (resize the shorter side to the training size divided by eval_crop,
    then crop at random), pad_crop or none.
    """
    min_crop: Optional[float] = None
    """Smallest crop of ``augment=inception``, as a share of the image's area."""
    flip: bool = True
    """Mirror half of the training images."""
    pad: int = 4
    """Pixels of padding around the image for ``augment=pad_crop``."""
    eval_crop: Optional[float] = None
    """Evaluation resizes the shorter side to the evaluation size divided by eval_crop, then crops the center (null:
    0.875).
    """
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean per channel, on the scale 0 to 1, to subtract."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation per channel, on the scale 0 to 1, to divide by."""
    workers: Union[int, str] = AUTO
    """Loader workers per rank. auto: 0 on CPU; on CUDA the rank's share of cores minus one, at most 16."""
    decoder: str = AUTO
    """JPEG decoder: native (in C), pillow, or auto (native if every rank has it, else pillow)."""
    order: str = "global"
    """Order of an epoch: global (a permutation of all samples), or shards (shuffle a few packed shards at a time)."""
    window_shards: int = 16
    """Number of shards that ``order=shards`` shuffles at a time."""
    cache_dir: Optional[str] = None
    """Folder of the shard cache if the root is a URL (null: in the user's cache directory)."""
    cache_gb: float = 64.0
    """Maximum size of the cache, in 10**9 bytes."""
    on_error: str = "skip"
    """Response to an image that cannot be decoded: skip (and count it), or fail."""
    max_bad: int = 100
    """Maximum number of bad images. With more, the run ends even if ``on_error=skip``: at the next log line, checkpoint
    or evaluation.
    """
    train_count: Optional[int] = None
    """Training images, for ``data=synthetic`` only."""
    val_count: Optional[int] = None
    """Validation images, for ``data=synthetic`` only."""
    num_classes: Optional[int] = None
    """Classes, for ``data=synthetic`` only."""
    target: Optional[str] = None
    """For ``data=custom``: ``package.module:function``, which returns the training and the validation set."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `target`."""


@dataclass
class OptimizerConfig:
    """The optimizer: a class of torch.optim, with or without LARS. Most values come from the recipe's row."""

    name: str = "recipe"
    """recipe (the row's optimizer), lars (over `base`), torch (`base` without LARS) or sgd."""
    base: Optional[str] = None
    """A class of ``torch.optim``; null: that of the recipe's row."""
    lr: Optional[float] = None
    """The peak learning rate."""
    momentum: Optional[float] = None
    """Momentum of the base class, if it has one."""
    nesterov: Optional[bool] = None
    """Nesterov momentum of the base class, if it has the option."""
    weight_decay: Optional[float] = None
    """Weight decay of all parameters; if `decay_norm_bias` is false, of the weights only."""
    decay_norm_bias: Optional[bool] = None
    """Apply weight decay to batch norm's parameters and biases."""
    adapt_norm_bias: Optional[bool] = None
    """Apply trust ratios to batch norm's parameters and biases."""
    preset: Optional[str] = None
    """Preset for the options of LARS from `eps` to `clamp` (docs/lars.md). Options that are set override it."""
    eps: Optional[float] = None
    """Term added to the trust ratio's denominator."""
    trust_coef: Optional[float] = None
    """The trust coefficient."""
    ratio_of: Optional[str] = None
    """The trust ratio compares |w| with the norm of the gradient (gradient) or of the base's step (step; over AdamW,
    this is LAMB).
    """
    denominator: Optional[str] = None
    """split: |g| + wd * |w| + eps; combined: |g + wd * w| + eps."""
    clip: Any = None
    """Limits of the trust ratio r: none, lr (replace r by min(r / lr, 1)), or two bounds."""
    zero_norm: Optional[str] = None
    """If |w| or |g| is 0: decay (g + wd * w with the ratio 1) or skip (g unchanged)."""
    zero_decay: Optional[str] = None
    """Parameters without weight decay: adapt (like all others) or skip (no trust ratio)."""
    decay_placement: Optional[str] = None
    """coupled (part of the rescaled gradient) or base (the base applies its own weight decay after the ratio)."""
    ratio_placement: Optional[str] = None
    """inside (rescale the gradients that the momentum accumulates) or outside (rescale the step after the momentum)."""
    lr_placement: Optional[str] = None
    """outside (the lr multiplies the momentum buffer) or inside (the momentum buffer sums gradients times lr)."""
    clamp: Any = None
    """Limit on the absolute value of each element of g + wd * w: none, or a number."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Additional keyword arguments of the base class."""
    clip_grad_norm: Optional[float] = None
    """Scale the gradient of an update down to this norm if it is larger, before LARS (null: no limit)."""


@dataclass
class ScheduleConfig:
    """The learning rate: linear warm-up, then decay (optim/schedule.py)."""

    warmup_epochs: Optional[float] = None
    """Epochs of linear warm-up."""
    warmup_start: Any = None
    """The lr of update 0 (a number), or step: the W updates of the warm-up have lr / W, 2 lr / W, ..., lr."""
    form: Optional[str] = None
    """whole, restart, mlperf, cosine or steps (docs/recipes.md)."""
    power: Optional[float] = None
    """Exponent of the polynomial decay."""
    end_lr: Optional[float] = None
    """Learning rate at the end of the polynomial or cosine decay."""
    steps: Optional[list[float]] = None
    """For ``form=steps``: the epochs at which the lr falls."""
    step_factor: Optional[float] = None
    """For ``form=steps``: the factor by which each step multiplies the lr."""
    scale_warmup: bool = False
    """Scale the warm-up, the steps and the size_schedule of the recipe's row to the run's epochs."""


@dataclass
class PrecisionConfig:
    """The precision of the arithmetic."""

    name: str = AUTO
    """auto, fp32, fp64, bf16 or fp16 (autocast; fp16 with loss scaling)."""


@dataclass
class LaunchConfig:
    """Machines, and processes per machine."""

    nodes: Optional[int] = None
    """Number of machines (null: one, or the launcher's number). ``mode=plan`` plans for this number. A run on
    any other number of machines is an error.
    """
    nproc: Union[int, str] = AUTO
    """Processes on this machine, if neither torchrun nor Slurm starts them; auto: one per GPU."""
    threads: Union[int, str] = AUTO
    """CPU threads per process; auto: OMP_NUM_THREADS, or the process's share of the cores."""


@dataclass
class DistributedConfig:
    """Communication between ranks."""

    timeout: float = 600.0
    """Seconds after which an unresponsive rank ends the run."""
    bucket_mb: float = 25.0
    """MiB of gradients per all-reduce."""


@dataclass
class CheckpointConfig:
    """The checkpoints to keep, and the checkpoint to read."""

    path: Optional[str] = None
    """The checkpoint, or the run directory, to evaluate, export or start from."""
    every_updates: Optional[int] = None
    """Updates between checkpoints (null: one epoch)."""
    every_minutes: Optional[float] = 15.0
    """Also save if the last checkpoint is this many minutes old (null: never)."""
    keep: int = 3
    """Number of most recent checkpoints to keep, besides the best."""


@dataclass
class GuardConfig:
    """The response to a loss that is too large or not finite."""

    max_loss: Optional[float] = None
    """Maximum mean loss of an update. A larger one is a divergence, as is a non-finite training or validation loss."""
    on_divergence: str = "stop"
    """stop, or rollback: resume from the last good checkpoint and skip the samples up to the update that diverged."""
    max_rollbacks: int = 3
    """Maximum number of rollbacks."""


@dataclass
class Config:
    """The config of a run."""

    mode: str = "train"
    """train, evaluate, export, plan or check."""
    seed: int = 0
    """Seed of initial weights, order of samples and augmentation."""
    epochs: Optional[int] = None
    """Length of the schedule, in epochs."""
    max_updates: Optional[int] = None
    """Stop after this many updates, without changing the schedule. With a larger number, the same run continues; a
    number below the updates already made is an error.
    """
    micro_batch: Union[int, str] = AUTO
    """Images per forward pass on a device, a multiple of the ghost batch; auto: as many as fit."""
    label_smoothing: Optional[float] = None
    """Share of the target's probability that is spread evenly over all classes."""
    loss: Optional[str] = None
    """The training loss: cross_entropy, or bce (the binary cross entropy of every class, mean over the classes)."""
    bce_threshold: Optional[float] = None
    """For ``loss=bce``: set targets above this value to 1 and all others to 0. The value 0 leaves targets unchanged."""
    device: str = AUTO
    """auto, cpu or cuda."""
    deterministic: bool = False
    """Use only deterministic kernels."""
    compile: bool = False
    """Compile the network with ``torch.compile`` for training."""
    cuda_graphs: bool = False
    """Replay the forward and backward pass of a micro-batch as a CUDA graph."""
    channels_last: Union[bool, str] = AUTO
    """Use the channels_last memory format for weights and images: true, false, or auto (true on every device)."""
    gradient_compression: str = "none"
    """none, or bf16: round the gradients that the ranks exchange to bfloat16. This is part of the experiment, because
    the results then depend on the world size.
    """
    resume: str = AUTO
    """auto: resume the run in the run directory; never: move that run aside and start over."""
    log_every: int = 10
    """Updates between two log lines."""
    verbosity: int = 1
    """Lines to print. 0: warnings and results; 1: also the setup and each epoch; 2: also each log line."""
    run: RunConfig = field(default_factory=RunConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    check: CheckConfig = field(default_factory=CheckConfig)


@functools.cache
def register() -> None:
    """Register with Hydra the schema that ``configs/config.yaml`` extends, and the choices that have no file."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, names in _named_choices().items():
        for name in names:
            nominal = {"nominal": nominal_batch(name)} if group == "batch" else {}
            store.store(group=group, name=name, node={"name": name, **nominal})


@functools.cache
def schema_node(schema: type) -> DictConfig:
    """Return OmegaConf's node of a dataclass. It is slow to create, so callers share it and must not change it."""
    node: DictConfig = OmegaConf.structured(schema)
    return node


def choices_of(group: str) -> list[str]:
    """Return the choices of a group; batches are sorted by size."""
    names = [path.stem for path in (config_dir() / group).glob("*.yaml")] + _named_choices().get(group, [])
    return sorted(names, key=lambda name: (nominal_batch(name), name))


@functools.cache
def _named_choices() -> dict[str, list[str]]:
    """Return the choices that have no file, by group."""
    table = OmegaConf.to_container(OmegaConf.load(config_dir() / "choices.yaml"))
    assert isinstance(table, dict)
    return {str(group): names for group, names in table.items()}


def nominal_batch(name: str) -> int:
    """Return the samples per update on ImageNet for the batch `name`, such as ``256`` or ``8k``; 0 for other names."""
    digits, thousands = name.removesuffix("k"), name.endswith("k")
    return int(digits) * (1024 if thousands else 1) if digits.isascii() and digits.isdigit() else 0


def config_dir() -> Path:
    """Return the folder of the config files: inside an installed package, or beside the package in a checkout."""
    here = Path(__file__).resolve().parent.parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"
