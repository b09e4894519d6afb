"""The schema: one dataclass per group of ``configs/``, registered with Hydra. No checks, no arithmetic.

`None` in a field that a recipe knows means "as the recipe's row says"; recipe.py fills those in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

AUTO = "auto"
MODES = ("train", "evaluate", "export", "plan")


@dataclass
class RunConfig:
    """Where the run lives. `dir` is the whole path; `name` a folder below ``runs/``; neither: named by hash."""

    dir: Optional[str] = None
    name: Optional[str] = None


@dataclass
class BatchConfig:
    """`nominal`: the samples of one update on ImageNet. `size`: taken literally instead of a recipe's row.

    `scaled`: shrink the nominal batch in proportion to the data set (None: for all but ImageNet).
    """

    name: str = "32k"
    nominal: int = 32768
    size: Optional[int] = None
    scaled: Optional[bool] = None


@dataclass
class RowConfig:
    """One row of a recipe. Every field stands, by the same name, in the group that it belongs to.

    `None` for an option of LARS means "as `preset` has it".
    """

    optimizer: str = "lars"
    lr: Optional[float] = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_norm_bias: bool = True
    adapt_norm_bias: bool = True
    preset: str = "torchlars"
    eps: Optional[float] = None
    trust_coef: Optional[float] = None
    denominator: Optional[str] = None
    clip: Any = None
    zero_norm: Optional[str] = None
    zero_decay: Optional[str] = None
    decay_placement: Optional[str] = None
    ratio_placement: Optional[str] = None
    lr_placement: Optional[str] = None
    clamp: Any = None
    warmup_epochs: float = 0.0
    warmup_start: Any = "step"
    form: str = "whole"
    power: float = 2.0
    end_lr: float = 0.0
    steps: list[float] = field(default_factory=list)
    step_factor: float = 0.1
    epochs: int = 90
    label_smoothing: float = 0.0
    zero_gamma: bool = False
    min_crop: float = 0.08
    ghost_batch: int = 32
    published_top1: Optional[float] = None


@dataclass
class RecipeConfig:
    """A published set of hyper-parameters: what all rows share, and one row per batch."""

    name: str = "torchlars"
    source: str = ""
    common: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """What to train on. Sizes in pixels; `mean` and `std` on the scale 0 to 1, one value per channel.

    `decoder`, of JPEGs: native (in C), library (nvImageCodec), pillow, gpu (nvImageCodec on the CUDA device), or auto:
    native where it is there, else library, else pillow. `train_count`, `val_count`,
    `num_classes`: of made-up images, and of those alone. `min_crop`: the least share of a picture's area that
    ``augment=inception`` cuts out. `order`, of an epoch: global, or shards: of tar shards, `window_shards` at a time.
    `cache_dir` (None: in the user's cache directory) and `cache_gb` (10**9 bytes at most): of a `root` that is a URL.
    """

    name: str = "mini"
    root: Optional[str] = None
    holdout: Optional[float] = None
    val_labels: Optional[str] = None
    image_size: int = 224
    augment: str = "inception"
    min_crop: Optional[float] = None
    flip: bool = True
    pad: int = 4
    eval_crop: float = 0.875
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    workers: Union[int, str] = AUTO
    decoder: str = AUTO
    order: str = "global"
    window_shards: int = 16
    cache_dir: Optional[str] = None
    cache_gb: float = 64.0
    on_error: str = "skip"
    max_bad: int = 100
    train_count: Optional[int] = None
    val_count: Optional[int] = None
    num_classes: Optional[int] = None


@dataclass
class ModelConfig:
    """`weights`: a plain state_dict file to start from. `ghost_batch`: samples per batch-norm statistics."""

    name: str = "resnet50"
    weights: Optional[str] = None
    ghost_batch: Optional[int] = None
    zero_gamma: Optional[bool] = None


@dataclass
class OptimizerConfig:
    """`name`: ``recipe`` (the row decides), ``lars`` (over `base`) or ``sgd``. `kwargs` go to the base class.

    `preset` gives all options of LARS from `eps` to `clamp` at once (lars_train/optim/presets.py); those that are set
    beside it win. They have the names of `LARS`'s own, but for `decay_placement`, which is its ``weight_decay``.
    `clip`: ``none``, ``lr`` or two bounds; `clamp`: ``none`` or a number. `decay_norm_bias` and `adapt_norm_bias`:
    whether batch norm's parameters and biases are decayed, and get trust ratios.
    """

    name: str = "recipe"
    base: str = "SGD"
    lr: Optional[float] = None
    momentum: Optional[float] = None
    nesterov: Optional[bool] = None
    weight_decay: Optional[float] = None
    decay_norm_bias: Optional[bool] = None
    adapt_norm_bias: Optional[bool] = None
    preset: Optional[str] = None
    eps: Optional[float] = None
    trust_coef: Optional[float] = None
    denominator: Optional[str] = None
    clip: Any = None
    zero_norm: Optional[str] = None
    zero_decay: Optional[str] = None
    decay_placement: Optional[str] = None
    ratio_placement: Optional[str] = None
    lr_placement: Optional[str] = None
    clamp: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleConfig:
    """Linear warm-up, then decay: `form` is ``whole``, ``restart``, ``mlperf`` or ``steps`` (optim/schedule.py).

    `warmup_start`: the lr of update 0 (a number), or ``step``: the first of equal steps up to the peak. `power` and
    `end_lr` are of the polynomial forms; `steps` (epochs) and `step_factor` of ``steps``. `scale_warmup`: a warm-up
    and steps that the recipe's row gives shrink with the run's epochs.
    """

    warmup_epochs: Optional[float] = None
    warmup_start: Any = None
    form: Optional[str] = None
    power: Optional[float] = None
    end_lr: Optional[float] = None
    steps: Optional[list[float]] = None
    step_factor: Optional[float] = None
    scale_warmup: bool = False


@dataclass
class PrecisionConfig:
    """`name`: auto, fp32, fp64, bf16 or fp16 (autocast; fp16 with loss scaling)."""

    name: str = AUTO


@dataclass
class LaunchConfig:
    """`nproc`: processes on this machine, when torchrun or Slurm started none. `threads`: CPU threads of each."""

    nproc: Union[int, str] = AUTO
    threads: Union[int, str] = AUTO


@dataclass
class DistributedConfig:
    """`timeout`: seconds after which a rank that does not answer ends the run. `bucket_mb`: MiB of gradients that are
    reduced together.
    """

    timeout: float = 600.0
    bucket_mb: float = 25.0


@dataclass
class EvaluateConfig:
    """`every_epochs`: epochs between evaluations; the last update is always evaluated. `report`: of ``mode=evaluate``,
    the folder for the accuracy of each class and what was taken for what (None: none).
    """

    every_epochs: int = 1
    report: Optional[str] = None


@dataclass
class CheckpointConfig:
    """`path`: the checkpoint to evaluate, export or go on from. `keep`: the last so many stay, and the best one.

    `every_updates`: None is once an epoch; `every_minutes`: of wall time since the last one, too (None: never).
    """

    path: Optional[str] = None
    every_updates: Optional[int] = None
    every_minutes: Optional[float] = 15.0
    keep: int = 3


@dataclass
class GuardConfig:
    """What happens when the loss of an update is not finite, or its mean over the global batch above `max_loss`.

    `on_divergence`: ``stop``, or ``rollback`` to the last checkpoint at most `max_rollbacks` times, passing over the
    samples from there to the update that diverged.
    """

    max_loss: Optional[float] = None
    on_divergence: str = "stop"
    max_rollbacks: int = 3


@dataclass
class ExportConfig:
    """`path`: the file to write, ``.pth``, ``.safetensors`` or ``.onnx``; None is a ``.pth`` beside the checkpoint."""

    path: Optional[str] = None


@dataclass
class PlanConfig:
    """Of ``mode=plan``.

    `path`: the JSON file to write (None: none); `picture`: the PNG of hours and efficiency on 1 to 4,096 devices (None:
    none); `world`: ranks (None: as this machine starts). `device`: whose cited images/s to take (cost.py: a100, v100);
    `images_per_second`: of one device, forward and backward, in place of them. `cores` for each device decode
    `decode_rate` images/s each (None: input is not looked at). `latency_us`: microseconds of a message between
    devices; `bandwidth_gb`: 10^9 bytes/s of a device to its neighbour; `all_reduce`: ``ring``, ``tree``, or ``auto``,
    the faster; `overlap`: the share of the last micro-batch's backward pass that hides the network.
    """

    path: Optional[str] = None
    picture: Optional[str] = None
    world: Optional[int] = None
    device: Optional[str] = None
    images_per_second: Optional[float] = None
    cores: int = 8
    decode_rate: Optional[float] = None
    latency_us: float = 10.0
    bandwidth_gb: float = 12.5
    all_reduce: str = AUTO
    overlap: float = 1.0


@dataclass
class Config:
    """A whole run.

    `gradient_compression`: ``none``, or ``bf16``: what the ranks exchange is rounded to bfloat16. That is part of the
    experiment: the curve then depends, in those roundings, on the world size.
    """

    mode: str = "train"
    seed: int = 0
    epochs: Optional[int] = None
    max_updates: Optional[int] = None
    micro_batch: Union[int, str] = AUTO
    label_smoothing: Optional[float] = None
    device: str = AUTO
    deterministic: bool = False
    compile: bool = False
    gradient_compression: str = "none"
    resume: str = AUTO
    log_every: int = 10
    run: RunConfig = field(default_factory=RunConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)


def register() -> None:
    """Make the schema known to Hydra, as the node that ``configs/config.yaml`` starts from."""
    ConfigStore.instance().store(name="schema", node=Config)
    # For the help text: Hydra's own list of groups takes it half a second.
    OmegaConf.register_new_resolver("groups", _groups, replace=True)


def _groups() -> str:
    groups = sorted({path.parent.name for path in config_dir().glob("*/*.yaml")})
    return "\n".join(f"{group}: {', '.join(choices_of(group))}" for group in groups)


def choices_of(group: str) -> list[str]:
    """The names of a group's files, batches by their size."""
    names = (path.stem for path in (config_dir() / group).glob("*.yaml"))
    return sorted(names, key=lambda name: (nominal_batch(name), name))


def nominal_batch(name: str) -> int:
    """Samples per update on ImageNet of the batch called `name`: ``256`` or ``8k`` (8,192); 0 for another word."""
    digits, thousands = name.removesuffix("k"), name.endswith("k")
    return int(digits) * (1024 if thousands else 1) if digits.isdigit() else 0


def config_dir() -> Path:
    """The folder of YAML files: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent.parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"
