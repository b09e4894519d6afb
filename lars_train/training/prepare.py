"""Everything that can be wrong with the input, found before a device is touched or a file is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lars_train.config import AUTO, Config
from lars_train.data.open import GLOBAL, SHARDS, open_dataset
from lars_train.data.source import Dataset
from lars_train.errors import ConfigError
from lars_train.models.factory import model_names
from lars_train.optim.factory import check_optimizer
from lars_train.plan import Plan, check_micro_batch, make_plan
from lars_train.training import checkpoint
from lars_train.training.cache import check_cache
from lars_train.training.decoder import check_decoder
from lars_train.training.network import check_single_samples, make_network
from lars_train.training.run_directory import run_directory

SAVED = ".saved"
"""The file of a run directory which says that there were checkpoints."""


@dataclass(frozen=True)
class Prepared:
    """What the checks found: the data, the plan, where the run lives, and the checkpoint that the user named."""

    config: Config
    dataset: Dataset
    plan: Plan
    directory: Path
    start_from: dict[str, Any] | None


def prepare(config: Config) -> Prepared:
    """Check config, data and checkpoint against each other; reads only.

    Raises `ConfigError`.
    """
    check_optimizer(config.optimizer)
    check_decoder(config)
    dataset = open_dataset(config.data)
    plan = make_plan(config, len(dataset.train))
    check_cache(config, dataset, plan)
    directory = run_directory(config)
    if config.micro_batch != AUTO:
        check_micro_batch(plan, int(config.micro_batch))
    if config.model.weights is not None or config.model.name not in model_names():
        make_network(config, len(dataset.classes))
    if plan.ghost_batch == 1:
        check_single_samples(config, len(dataset.classes))
    start_from = None
    if config.checkpoint.path is not None:
        _, start_from = checkpoint.find(config.checkpoint.path)
        check_compatible(start_from, config.model.name, dataset)
        check_same_images(start_from, dataset)
        _check_same_order(start_from, config, dataset)
        _check_position(start_from, config, plan)
        _check_optimizer_state(start_from, config)
    return Prepared(config, dataset, plan, directory, start_from)


def continuation(prepared: Prepared, *, warn: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of this run, which fits its model and data; None for a new run. Reads only.

    Raises `ConfigError` when none fits, when all are damaged, or when they are gone; `warn`: name on stderr those that
    are passed over.
    """

    def check(content: dict[str, Any]) -> None:
        check_compatible(content, prepared.config.model.name, prepared.dataset)
        check_same_images(content, prepared.dataset)
        if content.get("layout", "") != prepared.dataset.layout:
            raise ConfigError(
                "the store's pictures lie in other shards than those it was trained on, so data.order=shards means "
                "another order; restore that store, or start anew with resume=never."
            )

    found = checkpoint.latest(prepared.directory / "checkpoints", warn=warn, check=check)
    if found is None and (prepared.directory / SAVED).exists():
        raise ConfigError(
            f"{prepared.directory / 'checkpoints'}: the run's checkpoints are gone; put them back, or start anew with "
            "resume=never."
        )
    return found


def check_compatible(content: dict[str, Any], model: str, dataset: Dataset) -> None:
    """Raise `ConfigError` when a checkpoint is of another model, or was trained on other classes."""
    theirs, classes = checkpoint.value(content, "config", "model", "name"), tuple(content["classes"])
    if theirs != model:
        raise ConfigError(f"the checkpoint is of model {theirs}, not {model}: choose model={theirs}.")
    if classes != dataset.classes:
        raise ConfigError(
            f"the checkpoint was trained on another data set: it has {len(classes)} classes "
            f"({', '.join(classes[:3])}, ...), the chosen one {len(dataset.classes)} "
            f"({', '.join(dataset.classes[:3])}, ...); the checkpoint's was "
            f"data={checkpoint.value(content, 'config', 'data', 'name')}."
        )


def check_same_images(content: dict[str, Any], dataset: Dataset) -> None:
    """Raise `ConfigError` when the data set's file names or labels are not those the checkpoint was trained on."""
    if content["fingerprint"] != dataset.fingerprint:
        raise ConfigError(
            "the data set is not the one that the checkpoint was trained on (its file names or labels differ); "
            "restore it, or start anew with resume=never."
        )


def _check_same_order(content: dict[str, Any], config: Config, dataset: Dataset) -> None:
    """Raise `ConfigError` where the rest of an epoch that was begun would be in another order."""
    theirs, mine = checkpoint.value(content, "config", "data"), config.data
    order = theirs.get("order", GLOBAL)
    same = order == mine.order and content.get("layout", "") == dataset.layout
    if mine.order == SHARDS:
        same = same and theirs.get("window_shards") == mine.window_shards
    done = content["update"] + content.get("skipped", 0)
    if not same and done % checkpoint.value(content, "plan", "updates_per_epoch"):
        raise ConfigError(
            f"checkpoint.path={config.checkpoint.path}: it stands within an epoch of data.order={order}"
            f"{_windows(theirs) if order == SHARDS else ''}; choose the same, of the same shards, or a checkpoint at "
            "the end of an epoch."
        )


def _windows(data: dict[str, Any]) -> str:
    return f" with data.window_shards={data.get('window_shards')}"


def _check_position(content: dict[str, Any], config: Config, plan: Plan) -> None:
    update, per_epoch = content["update"], checkpoint.value(content, "plan", "updates_per_epoch")
    if per_epoch != plan.updates_per_epoch or update > plan.updates:
        raise ConfigError(
            f"checkpoint.path={config.checkpoint.path}: it stands at update {update} of a run with {per_epoch} "
            f"updates per epoch, which is no position of this one ({plan.updates} updates, "
            f"{plan.updates_per_epoch} per epoch); choose the same batch and at least as many epochs."
        )


def _check_optimizer_state(content: dict[str, Any], config: Config) -> None:
    # Of the settings, these decide what the optimizer's state looks like.
    theirs_all = checkpoint.value(content, "config", "optimizer")
    # What a checkpoint that is older than a key was made with.
    older = {"adapt_norm_bias": True, "lr_placement": "outside"}
    keys: tuple[str, ...] = ("base", "decay_norm_bias")
    if config.optimizer.name == "lars":
        # With the lr inside the momentum, that holds steps and not gradients.
        keys = (*keys, "adapt_norm_bias", "lr_placement")
    for key in keys:
        mine = getattr(config.optimizer, key)
        theirs = theirs_all[key] if key in theirs_all else older.get(key)
        if theirs != mine:
            raise ConfigError(
                f"checkpoint.path={config.checkpoint.path}: it has the optimizer state of optimizer.{key}={theirs}, "
                f"which does not fit optimizer.{key}={mine}; choose the same, or start from its weights alone "
                "(mode=export, then model.weights=FILE)."
            )
