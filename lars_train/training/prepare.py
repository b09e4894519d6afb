"""Check config, data and checkpoint before a run touches a device or writes a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lars_train.config import AUTO, Config
from lars_train.config.network import BUILTIN, CUSTOM, ModelConfig
from lars_train.data.dataset import Dataset
from lars_train.data.open import open_dataset
from lars_train.data.order import SHARDS
from lars_train.errors import ConfigError
from lars_train.given import NOTHING, Given
from lars_train.models.ema import check_average
from lars_train.models.factory import model_names
from lars_train.monitoring.trackers import check_trackers
from lars_train.networks import check_fit, check_single_samples, start_network
from lars_train.run_plan import Plan, check_micro_batch, make_plan
from lars_train.training import checkpoint
from lars_train.training.assemble import check_optimizer, text_order
from lars_train.training.distributed import Group
from lars_train.training.resolve import check_cache, check_decoder
from lars_train.training.run_directory import run_directory, runs_of_moved_images

SAVED = ".saved"
"""The file in a run directory that shows that checkpoints have been saved."""


@dataclass(frozen=True)
class Prepared:
    """The result of the checks: the data, the plan, the run directory, and the checkpoint that the user named."""

    config: Config
    dataset: Dataset
    plan: Plan
    directory: Path
    start_from: dict[str, Any] | None
    notes: tuple[str, ...] = ()
    """Messages to the user about the classes, the weights and other runs."""
    given: Given = NOTHING
    draws: bool = False
    """True if the network draws random numbers in training."""


_DRAWS = (
    "NOTE: the network draws random numbers in training (dropout, stochastic depth). They depend on seed, update and "
    "rank, so another number of ranks or another micro-batch gives other random numbers, and another curve "
    "(docs/models.md)."
)


def prepare(config: Config, given: Given = NOTHING) -> Prepared:
    """Check that config, data and checkpoint fit together, without writing anything. Raises `ConfigError`."""
    check_optimizer(config.optimizer)
    check_decoder(config)
    check_trackers(config.log)
    dataset = open_dataset(config.data, given.dataset)
    plan = make_plan(config, len(dataset.train))
    check_cache(config, dataset, plan)
    directory = run_directory(config)
    if config.micro_batch != AUTO:
        check_micro_batch(plan, int(config.micro_batch))
    warning = text_order(dataset.classes)
    notes: tuple[str, ...] = () if warning is None else (warning,)
    if config.run.dir is None and config.run.name is None and not directory.exists():
        notes += tuple(
            f"NOTE: {other} holds this run, with its images at another path; to resume it, set run.dir={other}"
            for other in runs_of_moved_images(directory, config, dataset.fingerprint)
        )
    builtin, draws = config.model.source == BUILTIN and given.network is None, False
    if config.model.weights is not None or config.model.freeze or not builtin or config.model.name not in model_names():
        network, found = start_network(config, dataset.classes, given)
        draws = not builtin and check_fit(network, config, len(dataset.classes))
        if draws and config.cuda_graphs:
            raise ConfigError(
                "cuda_graphs=true: the network draws random numbers in training (dropout, stochastic depth), which a "
                "CUDA graph might repeat; omit it."
            )
        notes += (*found, *((_DRAWS,) if draws else ()))
    if plan.ghost_batch == 1 and builtin:
        check_single_samples(config, len(dataset.classes))
    start_from = None
    if config.checkpoint.path is not None:
        _, start_from = checkpoint.find(config.checkpoint.path)
        check_compatible(start_from, config.model, dataset)
        check_same_images(start_from, dataset)
        _check_same_order(start_from, config, dataset)
        _check_position(start_from, config, plan)
        _check_optimizer_state(start_from, config)
    return Prepared(config, dataset, plan, directory, start_from, notes, given, draws)


def continuation(
    prepared: Prepared, *, warn: bool = True, last: int | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """Return this run's newest usable checkpoint that fits its model and data, or None for a new run.

    With `last`, return the newest checkpoint of that update or before, or None. `warn`: print a warning to stderr for
    each checkpoint that is skipped. Writes nothing.

    Raises `ConfigError` if no checkpoint fits, if all are damaged, or if they have been deleted.
    """

    def check(content: dict[str, Any]) -> None:
        check_compatible(content, prepared.config.model, prepared.dataset)
        check_same_images(content, prepared.dataset)
        if checkpoint.value(content, "layout") != prepared.dataset.layout:
            raise ConfigError(
                "the store now has its images in other shards, so data.order=shards gives another order; restore "
                "the store that the run was trained on, or start over with resume=never."
            )

    folder = prepared.directory / "checkpoints"
    found = checkpoint.latest(folder, warn=warn, check=check, last=last)
    if found is None and last is None and (prepared.directory / SAVED).exists():
        if any(folder.glob(f"{checkpoint.SET_ASIDE}*.pt")):
            raise ConfigError(
                f"{folder}: the run diverged, and there is no checkpoint from before the divergence; lower "
                "optimizer.lr, or start over with resume=never."
            )
        raise ConfigError(
            f"{folder}: the run's checkpoints are missing; restore them, or start over with resume=never."
        )
    return found


def load_continuation(prepared: Prepared, group: Group, last: int | None = None) -> dict[str, Any] | None:
    """Return on every rank the content of the checkpoint that `continuation` finds on rank 0. Collective."""
    found = group.on_rank0(lambda: continuation(prepared, last=last))
    path = group.broadcast_from_rank0(found and found[0])
    if path is None:
        return None
    return found[1] if found is not None else checkpoint.load(path)


def check_compatible(content: dict[str, Any], model: ModelConfig, dataset: Dataset) -> None:
    """Raise `ConfigError` if the model or the classes of a checkpoint are not those of this run.

    Also raises if this run averages its weights, and the checkpoint lacks the average.
    """
    theirs, classes = checkpoint.value(content, "config", "model", "name"), tuple(content["classes"])
    source = content["config"]["model"].get("source", BUILTIN)
    if (source, theirs) != (model.source, model.name):
        own = content["config"]["model"].get("target")
        choice = {BUILTIN: theirs, CUSTOM: f"custom model.target={own}"}.get(source, f"{source} model.name={theirs}")
        raise ConfigError(f"the checkpoint holds model {theirs}, not {model.name}; choose model={choice}.")
    blurpool = bool(content["config"]["model"].get("blurpool"))
    if blurpool != bool(model.blurpool):
        raise ConfigError(
            f"the checkpoint holds a network with model.blurpool={str(blurpool).lower()}; choose the same value."
        )
    check_average(content, model.ema, model.ema_start)
    if classes != dataset.classes:
        raise ConfigError(
            f"the checkpoint was trained on another data set: it has {len(classes)} classes "
            f"({', '.join(classes[:3])}, ...), the chosen data set has {len(dataset.classes)} "
            f"({', '.join(dataset.classes[:3])}, ...). The checkpoint was trained with "
            f"data={checkpoint.value(content, 'config', 'data', 'name')}."
        )


def check_same_images(content: dict[str, Any], dataset: Dataset) -> None:
    """Raise `ConfigError` if the data set's file names or labels are not those that the checkpoint was trained on."""
    if content["fingerprint"] != dataset.fingerprint:
        raise ConfigError(
            "the data set is not the one that the checkpoint was trained on (its file names or labels differ, or this "
            "version reads files that an earlier version skipped, such as .jfif); restore the data set, or start over "
            "with resume=never."
        )


def _check_same_order(content: dict[str, Any], config: Config, dataset: Dataset) -> None:
    """Raise `ConfigError` if a checkpoint is from within an epoch that this run would continue in another order."""
    order, window = (checkpoint.value(content, "config", "data", key) for key in ("order", "window_shards"))
    same = order == config.data.order and checkpoint.value(content, "layout") == dataset.layout
    if order == SHARDS:
        same = same and window == config.data.window_shards
    done = content["update"] + checkpoint.value(content, "skipped")
    if not same and done % checkpoint.value(content, "plan", "updates_per_epoch"):
        raise ConfigError(
            f"checkpoint.path={config.checkpoint.path}: the checkpoint is from within an epoch of data.order={order}"
            f"{f' with data.window_shards={window}' if order == SHARDS else ''}; choose the same order of the same "
            "shards, or a checkpoint from the end of an epoch."
        )


def _check_position(content: dict[str, Any], config: Config, plan: Plan) -> None:
    update, per_epoch = content["update"], checkpoint.value(content, "plan", "updates_per_epoch")
    if per_epoch != plan.updates_per_epoch or update > plan.updates:
        raise ConfigError(
            f"checkpoint.path={config.checkpoint.path}: update {update} of a run with {per_epoch} updates per epoch "
            f"does not fit this run ({plan.updates} updates, {plan.updates_per_epoch} per epoch); choose the same "
            "batch and at least as many epochs."
        )


def _check_optimizer_state(content: dict[str, Any], config: Config) -> None:
    # The settings that determine the form of the optimizer's state.
    keys: tuple[str, ...] = ("base", "decay_norm_bias")
    if config.optimizer.name == "lars":
        # With the lr inside the momentum, the momentum buffers hold steps rather than gradients.
        keys = (*keys, "adapt_norm_bias", "lr_placement")
    stored = checkpoint.value(content, "config", "model")
    for key, off in (("freeze", []), ("head_lr", None)):
        if stored.get(key, off) != getattr(config.model, key):
            raise ConfigError(
                f"checkpoint.path={config.checkpoint.path}: its optimizer state comes from a run with "
                f"model.{key}={stored.get(key, off)}; use the same value, or start from the weights alone "
                "(mode=export, then model.weights=FILE)."
            )
    for key in keys:
        mine, theirs = getattr(config.optimizer, key), checkpoint.value(content, "config", "optimizer", key)
        if theirs != mine:
            raise ConfigError(
                f"checkpoint.path={config.checkpoint.path}: its optimizer state comes from a run with "
                f"optimizer.{key}={theirs} and does not fit optimizer.{key}={mine}; use the same value, or start from "
                "the weights alone (mode=export, then model.weights=FILE)."
            )
