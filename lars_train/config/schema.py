"""The schema: one dataclass per group of ``configs/``, registered with Hydra; a recipe's is in recipe_schema.py.

`None` in a field that a recipe knows means "as the recipe's row says"; recipe.py fills those in.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from lars_train.config.recipe_schema import RecipeConfig

AUTO = "auto"
MODES = ("train", "evaluate", "export", "plan", "check")


@dataclass
class RunConfig:
    """Where the run lives."""

    dir: Optional[str] = None
    """The run directory's whole path."""
    name: Optional[str] = None
    """The run directory's name below ``runs/``. With neither ``dir`` nor ``name``: a hash of the experiment."""


@dataclass
class BatchConfig:
    """The samples of one update."""

    name: str = "32k"
    """The row: which batch of ``configs/choices.yaml`` it is."""
    nominal: int = 32768
    """Samples of one update on ImageNet."""
    size: Optional[int] = None
    """Samples of one update, taken literally instead of a recipe's row; then ``optimizer.lr`` is wanted."""
    scaled: Optional[bool] = None
    """Shrink the nominal batch in proportion to the data set (null: for all but ImageNet)."""


@dataclass
class DataConfig:
    """What to train on, and how it is read."""

    name: str = "mini"
    """imagenet, folder, mini (embedded), cifar10, fashion_mnist or synthetic."""
    root: Optional[str] = None
    """Folder, ``.zip``, packed store or URL of one, tar shards; for torchvision's sets where they lie or go to."""
    holdout: Optional[float] = None
    """Validate on this share of ``train/`` instead of ``val/``."""
    val_labels: Optional[str] = None
    """For a flat ``val/`` of ImageNet: the devkit, or a CSV of file and class."""
    image_key: Optional[str] = None
    """Extension of the image to read where samples in tars have several: jpg, or jpg:png to try both in turn."""
    image_size: int = 224
    """Side of the network's input, in pixels."""
    augment: str = "inception"
    """inception (random resized crop), scale_crop (shorter side to size / eval_crop, random crop), pad_crop or none."""
    min_crop: Optional[float] = None
    """The least share of a picture's area that ``augment=inception`` cuts out."""
    flip: bool = True
    """Mirror half of the training images."""
    pad: int = 4
    """Pixels around the image for ``augment=pad_crop``."""
    eval_crop: float = 0.875
    """Evaluation resizes the shorter side to image_size / eval_crop and cuts out the centre."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Per channel, on the scale 0 to 1; subtracted."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Per channel, on the scale 0 to 1; divided by."""
    workers: Union[int, str] = AUTO
    """What decodes beside each rank; auto: none on the CPU, else its share of the cores less one, at most 16."""
    decoder: str = AUTO
    """Of JPEGs: native (in C), pillow, or auto: native where every rank has it, else pillow."""
    order: str = "global"
    """Of an epoch: global (a permutation of all samples), or shards: of packed shards, a few at a time."""
    window_shards: int = 16
    """Shards among which ``order=shards`` mixes samples."""
    cache_dir: Optional[str] = None
    """The cache of shards for a root that is a URL (null: in the user's cache directory)."""
    cache_gb: float = 64.0
    """The most that the cache takes, in 10**9 bytes."""
    on_error: str = "skip"
    """A picture that cannot be decoded: skip it and count, or fail."""
    max_bad: int = 100
    """Bad pictures after which a run ends nevertheless; counted after each update."""
    train_count: Optional[int] = None
    """Training images, of ``data=synthetic`` alone."""
    val_count: Optional[int] = None
    """Validation images, of ``data=synthetic`` alone."""
    num_classes: Optional[int] = None
    """Classes, of ``data=synthetic`` alone."""


@dataclass
class ModelConfig:
    """The network."""

    name: str = "resnet50"
    """A model of ``configs/choices.yaml``."""
    weights: Optional[str] = None
    """A file of weights to start from, or to evaluate: a state_dict, a checkpoint that holds one, ``.safetensors``."""
    new_head: bool = False
    """Take all but the last layer from `weights`: for other classes than the file's."""
    ghost_batch: Optional[int] = None
    """Samples per batch-norm statistics."""
    zero_gamma: Optional[bool] = None
    """Start the last gamma of every residual block at 0."""


@dataclass
class OptimizerConfig:
    """The optimizer: LARS over a class of torch.optim, or plain SGD. Most keys are the recipe's row's."""

    name: str = "recipe"
    """recipe (the row decides), lars (over `base`) or sgd."""
    base: str = "SGD"
    """A class of ``torch.optim`` for LARS to wrap."""
    lr: Optional[float] = None
    """The peak learning rate."""
    momentum: Optional[float] = None
    """Of the base class, where it has one."""
    nesterov: Optional[bool] = None
    """Of the base class, where it has it."""
    weight_decay: Optional[float] = None
    """Of all parameters, or of those that `decay_norm_bias` leaves."""
    decay_norm_bias: Optional[bool] = None
    """Whether batch norm's parameters and biases are decayed."""
    adapt_norm_bias: Optional[bool] = None
    """Whether they get trust ratios."""
    preset: Optional[str] = None
    """All options of LARS from `eps` to `clamp` at once (docs/lars.md); those that are set beside it win."""
    eps: Optional[float] = None
    """Added to the trust ratio's denominator."""
    trust_coef: Optional[float] = None
    """The trust coefficient."""
    denominator: Optional[str] = None
    """split: |g| + wd * |w| + eps; combined: |g + wd * w| + eps."""
    clip: Any = None
    """Of the trust ratio r: none, lr (min(r / lr, 1)), or two bounds."""
    zero_norm: Optional[str] = None
    """Where |w| or |g| is 0: decay (g + wd * w, the ratio 1) or skip (g as it is)."""
    zero_decay: Optional[str] = None
    """Parameters without weight decay: adapt them, or skip."""
    decay_placement: Optional[str] = None
    """coupled (into the gradient that is rescaled) or base (the base decays in its own way after the ratio)."""
    ratio_placement: Optional[str] = None
    """inside the momentum or outside of it."""
    lr_placement: Optional[str] = None
    """outside of the momentum or inside."""
    clamp: Any = None
    """Limit of the elements of g + wd * w: none, or a number."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """More keywords of the base class."""


@dataclass
class ScheduleConfig:
    """The learning rate: linear warm-up, then decay (optim/schedule.py)."""

    warmup_epochs: Optional[float] = None
    """Epochs of linear warm-up."""
    warmup_start: Any = None
    """The lr of update 0 (a number), or step: the first of equal steps up to the peak."""
    form: Optional[str] = None
    """whole, restart, mlperf or steps (docs/recipes.md)."""
    power: Optional[float] = None
    """Of the polynomial decay."""
    end_lr: Optional[float] = None
    """Of the polynomial decay."""
    steps: Optional[list[float]] = None
    """Of ``form=steps``: the epochs at which the lr falls."""
    step_factor: Optional[float] = None
    """Of ``form=steps``: by what it is multiplied."""
    scale_warmup: bool = False
    """A warm-up and steps that the recipe's row gives shrink with the run's epochs."""


@dataclass
class PrecisionConfig:
    """The arithmetic."""

    name: str = AUTO
    """auto, fp32, fp64, bf16 or fp16 (autocast; fp16 with loss scaling)."""


@dataclass
class LaunchConfig:
    """Machines, and processes on one of them."""

    nodes: Optional[int] = None
    """Machines of the run: ``mode=plan`` counts with so many, and a run under torchrun or Slurm refuses to start on
    another number (null: one, or as many as the launcher has).
    """
    nproc: Union[int, str] = AUTO
    """Processes on this machine, when torchrun or Slurm started none; auto: one per GPU."""
    threads: Union[int, str] = AUTO
    """CPU threads of each process; auto: OMP_NUM_THREADS, or its share of the cores."""


@dataclass
class DistributedConfig:
    """What the ranks exchange."""

    timeout: float = 600.0
    """Seconds after which a rank that does not answer ends the run."""
    bucket_mb: float = 25.0
    """MiB of gradients that are reduced together."""


@dataclass
class EvaluateConfig:
    """Evaluation while training, and ``mode=evaluate``."""

    every_epochs: int = 1
    """Epochs between evaluations; the last update is always evaluated."""
    report: Optional[str] = None
    """Of ``mode=evaluate``: the folder for the accuracy of each class and what was taken for what."""
    outputs: str = "subset"
    """Of ``mode=evaluate`` on some of the model's classes: look for the highest output among those (subset; as
    published for ImageNet-A and -R), or among all.
    """


@dataclass
class CheckpointConfig:
    """What is kept of a run, and which one a mode takes."""

    path: Optional[str] = None
    """The checkpoint, or its run directory, to evaluate, export or go on from."""
    every_updates: Optional[int] = None
    """Null: once an epoch."""
    every_minutes: Optional[float] = 15.0
    """Of wall time since the last one, too (null: never)."""
    keep: int = 3
    """The last so many stay, and the best one."""


@dataclass
class GuardConfig:
    """What happens when the loss of an update is not finite or too large."""

    max_loss: Optional[float] = None
    """A mean loss of an update above it is a divergence, as is a training or validation loss that is not finite."""
    on_divergence: str = "stop"
    """stop, or rollback to the last good checkpoint, skipping the samples from there to the update that diverged."""
    max_rollbacks: int = 3
    """How often."""


@dataclass
class ExportConfig:
    """Of ``mode=export``."""

    path: Optional[str] = None
    """The file to write: ``.pth``, ``.safetensors`` or ``.onnx`` (null: a ``.pth`` beside the checkpoint)."""


@dataclass
class PlanConfig:
    """Of ``mode=plan``: what is planned for, and where it goes to."""

    path: Optional[str] = None
    """The JSON file to write (null: none)."""
    picture: Optional[str] = None
    """The PNG of hours, efficiency and their reasons on 1 to 4,096 devices (null: none)."""
    world: Optional[int] = None
    """Ranks (null: launch.nodes times launch.nproc, or as this machine starts)."""
    device: Optional[str] = None
    """Whose cited images/s to take: a100, h100, v100, or cpu, which is one core (docs/plan.md)."""
    images_per_second: Optional[float] = None
    """Of one device, forward and backward, in place of cited ones."""
    cores: int = 8
    """Cores that decode for each device."""
    decode_rate: Optional[float] = None
    """Images/s that a core decodes (null: input is not looked at)."""
    update_ms: float = 0.0
    """Milliseconds of an update beside its images: the optimizer's step."""
    latency_us: float = 10.0
    """Microseconds of a message between devices."""
    bandwidth_gb: float = 12.5
    """10**9 bytes/s of a device to its neighbour."""
    all_reduce: str = AUTO
    """ring, tree, or auto: the faster."""
    overlap: float = 1.0
    """The share of the last micro-batch's backward pass that hides the network."""


@dataclass
class CheckConfig:
    """Of ``mode=check``."""

    seconds: float = 5.0
    """How long each speed is measured; a check takes 18 times as long at most."""
    samples: int = 256
    """Pictures that a machine decodes."""


@dataclass
class Config:
    """A whole run."""

    mode: str = "train"
    """train, evaluate, export, plan or check."""
    seed: int = 0
    """Of the initial weights, the order and the crops."""
    epochs: Optional[int] = None
    """The schedule's length."""
    max_updates: Optional[int] = None
    """Stop after so many updates; the schedule stays as it is. The same run continues with a larger one, and is not
    taken for a shorter one.
    """
    micro_batch: Union[int, str] = AUTO
    """Images at once on a device, whole ghost batches; auto: what fits."""
    label_smoothing: Optional[float] = None
    """Share of the target that goes to all classes alike."""
    device: str = AUTO
    """auto, cpu or cuda."""
    deterministic: bool = False
    """Have torch use deterministic kernels alone."""
    compile: bool = False
    """Train the network through ``torch.compile``."""
    channels_last: Union[bool, str] = AUTO
    """Weights and images with the channels innermost in memory: true, false, or auto: on every device."""
    gradient_compression: str = "none"
    """none, or bf16: what the ranks exchange is rounded to bfloat16. That is part of the experiment: the curve then
    depends, in those roundings, on the world size.
    """
    resume: str = AUTO
    """auto: go on with the run that is in the run directory; never: move it aside."""
    log_every: int = 10
    """Updates between two lines of the log."""
    verbosity: int = 1
    """What is told. 0: warnings and results; 1: also what is run, and each epoch; 2: also each line of the log."""
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
    check: CheckConfig = field(default_factory=CheckConfig)


def register() -> None:
    """Register with Hydra the schema, which ``configs/config.yaml`` starts from, and the choices without a file."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, names in _named_choices().items():
        for name in names:
            nominal = {"nominal": nominal_batch(name)} if group == "batch" else {}
            store.store(group=group, name=name, node={"name": name, **nominal})
    # For the help text: Hydra's own list of groups takes it half a second.
    OmegaConf.register_new_resolver("groups", _groups, replace=True)


def _groups() -> str:
    groups = sorted({path.parent.name for path in config_dir().glob("*/*.yaml")} | _named_choices().keys())
    return "\n".join(f"{group}: {', '.join(choices_of(group))}" for group in groups)


def choices_of(group: str) -> list[str]:
    """Return the choices of a group, batches by their size."""
    names = [path.stem for path in (config_dir() / group).glob("*.yaml")] + _named_choices().get(group, [])
    return sorted(names, key=lambda name: (nominal_batch(name), name))


@functools.cache
def _named_choices() -> dict[str, list[str]]:
    """Return, by group, the choices that have no file."""
    table = OmegaConf.to_container(OmegaConf.load(config_dir() / "choices.yaml"))
    assert isinstance(table, dict)
    return {str(group): names for group, names in table.items()}


def nominal_batch(name: str) -> int:
    """Samples per update on ImageNet of the batch called `name`: ``256`` or ``8k`` (8,192); 0 for another word."""
    digits, thousands = name.removesuffix("k"), name.endswith("k")
    return int(digits) * (1024 if thousands else 1) if digits.isascii() and digits.isdigit() else 0


def config_dir() -> Path:
    """The folder of YAML files: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent.parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"
