"""Check a config, as far as this is possible without the data and without a device."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from lars_train.config.augment import check_augment
from lars_train.config.keys import is_text, suggestion
from lars_train.config.lars_options import CHOICES, FLOAT32_MAX, FLOAT32_MIN, check_lars_options
from lars_train.config.network import BUILTIN, CUSTOM, TIMM, check_network
from lars_train.config.schema import AUTO, MODES, Config, choices_of
from lars_train.config.sizes import check_schedule
from lars_train.config.values import filled, flatten
from lars_train.errors import ConfigError, did_you_mean
from lars_train.fsutil import user_path
from lars_train.messages import is_url
from lars_train.optim.schedule import Form
from lars_train.targets import OBJECT

# Linux's limits in bytes, for a file name (NAME_MAX) and for a path (PATH_MAX, less the terminating zero).
_NAME_MAX, _PATH_MAX = 255, 4095
# Keys whose value must be above 0.
_POSITIVE = (
    "epochs",
    "max_updates",
    "log_every",
    "batch.size",
    "batch.nominal",
    "model.ghost_batch",
    "model.head_lr",
    "optimizer.lr",
    "optimizer.clip_grad_norm",
    "schedule.power",
    "schedule.step_factor",
    "launch.nodes",
    "plan.world",
    "check.seconds",
    "check.samples",
    "plan.images_per_second",
    "plan.cores",
    "plan.decode_rate",
    "plan.bandwidth_gb",
    "data.image_size",
    "data.train_size",
    "data.window_shards",
    "data.cache_gb",
    "data.train_count",
    "data.val_count",
    "data.num_classes",
    "distributed.timeout",
    "distributed.bucket_mb",
    "evaluate.every_epochs",
    "checkpoint.every_updates",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    "guard.max_loss",
    "augment.randaugment_ops",
)
# Keys whose value must be 0 or more.
_NOT_NEGATIVE = (
    "seed",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "schedule.warmup_epochs",
    "schedule.end_lr",
    "data.pad",
    "data.max_bad",
    "plan.latency_us",
    "plan.update_ms",
    "guard.max_rollbacks",
    "model.ema_start",
    "label_smoothing",
    "augment.mixup",
    "augment.cutmix",
    "augment.randaugment_magnitude",
)


def check_known_keys(node: DictConfig, schema: DictConfig, prefix: str = "") -> None:
    """Raise `ConfigError` for a key that the schema does not have."""
    # Hydra's +key=value bypasses the schema, and a key that nothing reads would be silently ignored.
    for key in map(str, node):
        if key not in schema:
            raise ConfigError(f"{prefix}{key}: unknown key.{suggestion(f'{prefix}{key}')}")
        if dataclasses.is_dataclass(OmegaConf.get_type(schema, key)):
            check_known_keys(node[key], schema[key], f"{prefix}{key}.")


def check_choices(config: Config) -> None:
    """Raise `ConfigError` for a value that is not among the choices of its key."""
    choices: dict[str, tuple[str | bool, ...]] = {
        "mode": MODES,
        "resume": (AUTO, "never"),
        "device": (AUTO, "cpu", "cuda"),
        "channels_last": (AUTO, True, False),
        "gradient_compression": ("none", "bf16"),
        "loss": ("cross_entropy", "bce"),
        "precision.name": tuple(choices_of("precision")),
        "optimizer.name": ("recipe", "lars", "sgd", "torch"),
        "data.name": tuple(choices_of("data")),
        "model.source": (BUILTIN, TIMM, CUSTOM),
        "data.augment": ("inception", "scale_crop", "pad_crop", "none"),
        "augment.auto": ("none", "trivial", "randaugment"),
        "data.decoder": (AUTO, "native", "pillow"),
        "data.order": ("global", "shards"),
        "data.on_error": ("skip", "fail"),
        "evaluate.outputs": ("subset", "all"),
        "schedule.form": get_args(Form),
        **CHOICES,
        "guard.on_divergence": ("stop", "rollback"),
        "plan.device": ("a100", "cpu", "h100", "h200", "v100"),
        "plan.all_reduce": (AUTO, "ring", "tree"),
    }
    leaves = flatten(config)
    for key, allowed in choices.items():
        value = leaves[key]
        if value is not None and value not in allowed:
            words = [str(word).lower() if isinstance(word, bool) else word for word in allowed]
            hint = did_you_mean(str(value), words)
            if key == "resume":
                hint = f" To start from a checkpoint, set checkpoint.path={value}"
            raise ConfigError(f"{key}={value}: choose one of {', '.join(words)}.{hint}")


def check_values(config: Config) -> None:
    """Raise `ConfigError` for a number out of range, and for settings that conflict."""
    leaves = flatten(config)
    _check_ranges(leaves)
    _check_text(leaves)
    _check_loss(config)
    check_augment(config.augment, min(filled(config.model.ghost_batch), config.batch.size or config.batch.nominal))
    from_checkpoint = config.mode in ("evaluate", "export") and config.checkpoint.path is not None
    check_network(config.model, stored=from_checkpoint)
    _check_plan(config)
    _check_data(config)
    if config.verbosity not in (0, 1, 2):
        raise ConfigError(
            f"verbosity={config.verbosity}: give 0 (quiet), 1 (one line per epoch) or 2 (every log line)."
        )
    if config.seed >= 2**63:
        raise ConfigError(f"seed={config.seed}: it must be below 2**63, the limit of the random generators.")
    _check_schedule(config)
    check_lars_options(config.optimizer)
    for key, least in (("micro_batch", 1), ("launch.nproc", 1), ("launch.threads", 1), ("data.workers", 0)):
        value = leaves[key]
        if value != AUTO and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ConfigError(f"{key}={value}: give {AUTO} or a whole number of at least {least}.")
    _check_graphs(config)
    _check_run(config)
    _check_mode(config)


def _check_ranges(leaves: dict[str, Any]) -> None:
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        value = leaves[key]
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (key in _POSITIVE and value == 0):
            expected = "above 0" if key in _POSITIVE else "0 or more"
            finite = " and finite" if math.isinf(value) else ""
            raise ConfigError(f"{key}={value}: it must be {expected}{finite}.")
        if value > FLOAT32_MAX and isinstance(value, float):
            raise ConfigError(f"{key}={value:g}: it must be at most {FLOAT32_MAX:.4g}, the largest float32.")
    for key in ("optimizer.lr", "optimizer.trust_coef"):
        value = leaves[key]
        if value is not None and 0 < value < FLOAT32_MIN:
            raise ConfigError(
                f"{key}={value:g}: it rounds to 0 in float32; give at least {FLOAT32_MIN:.4g}, the smallest float32."
            )


def _check_text(leaves: dict[str, Any]) -> None:
    """Raise `ConfigError` for text that is empty, too long for a path or, in the name of a new folder, unprintable."""
    for key, value in leaves.items():
        if not is_text(key) or key == "recipe.source" or value is None:
            continue
        if not value and key not in ("run.dir", "run.name"):
            raise ConfigError(f"{key}=: the value is empty; give a value, or omit the key.")
        size = len(os.fsencode(value))
        longest = max(len(os.fsencode(part)) for part in value.split("/"))
        if not is_url(value) and (size > _PATH_MAX or longest > _NAME_MAX):
            raise ConfigError(
                f"{key}={value[:40]}...: it is too long ({size:,} bytes). A name has at most {_NAME_MAX} bytes, a path "
                f"{_PATH_MAX:,}."
            )
        if "\0" in value:
            raise ConfigError(f"{key}={value}: a name cannot contain a zero byte.")
    for key in ("run.dir", "run.name"):
        value = leaves[key]
        if value is not None and not value.isprintable():
            raise ConfigError(
                f"{key}={value!r}: it has an unprintable character, such as a line break; remove that character."
            )


def _check_loss(config: Config) -> None:
    smoothing, threshold = filled(config.label_smoothing), config.bce_threshold
    if not 0 <= smoothing < 1:
        raise ConfigError(f"label_smoothing={smoothing}: it must be at least 0 and below 1.")
    if threshold is None:
        return
    if config.loss != "bce":
        raise ConfigError(f"bce_threshold={threshold} has no effect with loss={config.loss}; omit it, or set loss=bce.")
    if not 0 <= threshold < 1:
        raise ConfigError(f"bce_threshold={threshold}: it must be at least 0 and below 1.")
    if threshold and smoothing:
        raise ConfigError(
            f"label_smoothing={smoothing} has no effect with bce_threshold={threshold}, which makes every target 0 or "
            "1; set one of them to 0."
        )


def _check_plan(config: Config) -> None:
    nodes, nproc, world = config.launch.nodes, config.launch.nproc, config.plan.world
    if nodes is not None and isinstance(nproc, int) and world not in (None, nodes * nproc):
        raise ConfigError(
            f"plan.world={world}: launch.nodes={nodes} times launch.nproc={nproc} is {nodes * nproc}; omit one of them."
        )
    if config.plan.picture is not None and not config.plan.picture.lower().endswith(".png"):
        raise ConfigError(
            f"plan.picture={config.plan.picture}: the plot is a PNG file; give a name that ends with .png."
        )
    if not 0 <= config.plan.overlap <= 1:
        raise ConfigError(f"plan.overlap={config.plan.overlap}: it must be at least 0 and at most 1.")
    if config.plan.picture is not None and config.plan.device is None and config.plan.images_per_second is None:
        raise ConfigError(
            f"plan.picture={config.plan.picture}: the plot needs a speed; set plan.device or plan.images_per_second."
        )


def _check_data(config: Config) -> None:
    if config.data.eval_crop is not None and not 0 < config.data.eval_crop <= 1:
        raise ConfigError(f"data.eval_crop={config.data.eval_crop}: it must be above 0 and at most 1.")
    check_schedule(config.data, filled(config.epochs))
    if config.data.min_crop is not None and not 0 < config.data.min_crop <= 1:
        raise ConfigError(f"data.min_crop={config.data.min_crop}: it must be above 0 and at most 1.")
    if config.data.holdout is not None and not 0 < config.data.holdout < 1:
        raise ConfigError(f"data.holdout={config.data.holdout}: it must be between 0 and 1.")
    if is_url(config.data.root) and config.data.order != "shards":
        raise ConfigError(
            f"data.root={config.data.root}: data at a URL is fetched shard by shard, which needs data.order=shards. "
            "For the global order, copy the data to a disk."
        )
    for key, least_value in (("mean", -math.inf), ("std", 1 / FLOAT32_MAX)):
        values = getattr(config.data, key)
        if len(values) != 3 or not all(abs(v) <= FLOAT32_MAX and v > least_value for v in values):
            raise ConfigError(
                f"data.{key}={values}: give three numbers within the range of float32, one per channel (std above 0)."
            )


def _check_schedule(config: Config) -> None:
    """Check the learning rates and epochs of a resolved config's schedule against each other."""
    if filled(config.schedule.warmup_epochs) >= filled(config.epochs):
        raise ConfigError(
            f"schedule.warmup_epochs={config.schedule.warmup_epochs}: the warm-up must be shorter than the run "
            f"(epochs={config.epochs}); lower it, or train for longer."
        )
    schedule, lr, epochs = config.schedule, filled(config.optimizer.lr), filled(config.epochs)
    # Without a warm-up, warmup_start is null.
    start = "step" if schedule.warmup_start is None else schedule.warmup_start
    if isinstance(start, bool) or not (start == "step" or (isinstance(start, int | float) and 0 <= start <= lr)):
        raise ConfigError(
            f"schedule.warmup_start={start}: give step, or a number from 0 to the peak, optimizer.lr={lr:g}."
        )
    if schedule.end_lr is not None and schedule.end_lr > lr:
        raise ConfigError(
            f"schedule.end_lr={schedule.end_lr:g}: it must be at most optimizer.lr={lr:g}, where the decay begins."
        )
    steps = schedule.steps
    if schedule.form == "steps" and not steps:
        raise ConfigError("schedule.form=steps: set schedule.steps to the epochs of the steps, such as [30,60,80].")
    if steps:
        rising = all(a < b for a, b in itertools.pairwise(steps))
        if not rising or not all(map(math.isfinite, steps)) or steps[0] < filled(schedule.warmup_epochs):
            raise ConfigError(
                f"schedule.steps={steps}: give epochs in increasing order, after the warm-up "
                f"(schedule.warmup_epochs={schedule.warmup_epochs:g})."
            )
        if steps[-1] >= epochs:
            raise ConfigError(
                f"schedule.steps={steps}: the run has only {epochs} epochs. Set other steps, or "
                "schedule.scale_warmup=true, which scales the steps of a recipe's row to the length of the run."
            )


def _check_graphs(config: Config) -> None:
    if not config.cuda_graphs:
        return
    if config.compile:
        raise ConfigError("cuda_graphs=true and compile=true: set only one of them.")
    if config.device == "cpu":
        raise ConfigError("cuda_graphs=true: it needs a GPU, but device=cpu; omit it.")


def _check_run(config: Config) -> None:
    name = config.run.name
    if name is not None and (not name or "/" in name or name in (".", "..")):
        raise ConfigError(f"run.name={name!r}: it must be a plain folder name; use run.dir for a path.")
    if config.run.dir is not None and user_path(config.run.dir).parts[:1] == ("~",):
        raise ConfigError(f"run.dir={config.run.dir}: this user has no home directory; give a path without ~.")
    if config.run.dir is not None and Path(config.run.dir).name in ("", ".."):
        raise ConfigError(f"run.dir={config.run.dir!r}: a run needs its own folder; end the path with its name.")
    if config.run.dir is not None and config.run.name is not None:
        raise ConfigError("run.dir and run.name are both set: run.dir is already the whole path; omit one of them.")


def _check_mode(config: Config) -> None:
    of_object = (config.model.target or "").startswith(OBJECT)
    if config.mode == "evaluate" and not (config.checkpoint.path or config.model.weights or of_object):
        raise ConfigError(
            "mode=evaluate needs checkpoint.path=PATH (a checkpoint, or a run directory) or model.weights=FILE."
        )
    if config.mode == "evaluate" and config.checkpoint.path and config.model.weights:
        raise ConfigError(
            f"mode=evaluate: checkpoint.path={config.checkpoint.path} and model.weights={config.model.weights} are "
            "both set; set only the one to evaluate."
        )
    if config.evaluate.ema and config.mode == "evaluate" and not config.checkpoint.path:
        raise ConfigError("evaluate.ema=true needs checkpoint.path=PATH, a checkpoint of a run with model.ema.")
    if config.model.new_head and config.mode in ("evaluate", "export"):
        raise ConfigError(f"model.new_head=true: mode={config.mode} does not train a new last layer; omit it.")
    if config.model.new_head and config.model.weights is None:
        raise ConfigError("model.new_head=true needs model.weights=FILE, for all layers except the last.")
    if config.mode == "export" and not config.checkpoint.path:
        raise ConfigError("mode=export needs checkpoint.path=PATH, a checkpoint file or a run directory.")
