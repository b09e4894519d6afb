"""The three modes, each on one rank: train, evaluate a checkpoint, export one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from lars_train.config import AUTO, Config, restore
from lars_train.data.augment import View
from lars_train.data.directory import user_path
from lars_train.data.open import open_dataset
from lars_train.errors import ConfigError, Stopped
from lars_train.launch import Ranks
from lars_train.models.factory import build_model, load_state
from lars_train.monitoring.progress import Progress
from lars_train.monitoring.say import complain, say
from lars_train.monitoring.summary import FINISHED
from lars_train.plan import check_world
from lars_train.training import checkpoint
from lars_train.training.decoder import choose_decoder, decoder_lines
from lars_train.training.device import (
    choose_device,
    choose_precision,
    choose_threads,
    choose_workers,
    set_up,
)
from lars_train.training.distributed import Group, process_group
from lars_train.training.evaluation import SMALLEST_BATCH, evaluate_split
from lars_train.training.feed import normaliser
from lars_train.training.network import make_network
from lars_train.training.prepare import Prepared, check_compatible, continuation
from lars_train.training.run import Run
from lars_train.training.run_directory import (
    Invocation,
    check_same_experiment,
    check_usable,
    finished,
    note_end,
    note_start,
    open_directory,
)


def find_finished(prepared: Prepared) -> dict[str, Any] | None:
    """What the run directory holds of this run, if it is finished; reads only.

    Raises `ConfigError` when the directory cannot be used, holds a run of another config, or a checkpoint that
    the run cannot go on from.
    """
    config, directory = prepared.config, prepared.directory
    check_usable(directory)
    check_same_experiment(directory, config)
    if config.resume != AUTO:
        return None
    final = finished(directory)
    if final is not None and final["updates"] >= prepared.plan.stop:
        return final
    continuation(prepared, warn=False)
    return None


def train(prepared: Prepared, ranks: Ranks, invocation: Invocation) -> dict[str, Any]:
    """Train, go on with the run that is there, or find it finished; the content of ``final.json``. Collective.

    Raises `ConfigError`, `DataError`.
    """
    config, directory = prepared.config, prepared.directory
    check_world(prepared.plan, ranks.world)
    device = choose_device(config, ranks)
    choose_precision(config.precision.name, device)
    with process_group(ranks, device, config.distributed.timeout) as group:
        # Rank 0 alone looks, so that all do the same however late a shared file system shows a file.
        final: dict[str, Any] | None = group.from_first(find_finished(prepared) if group.first else None)
        if final is not None:
            say(FINISHED)
            return final
        lock = open_directory(directory, config, invocation, group)
        try:
            return _train_in(prepared, group, device)
        finally:
            if lock is not None:
                lock.close()


def _train_in(prepared: Prepared, group: Group, device: torch.device) -> dict[str, Any]:
    """The run, and in its record how it began and how it ended."""
    run = None
    try:
        run = Run(prepared, group, device)
        if group.first:
            resolved = dataclasses.asdict(run.resolved)
            note_start(prepared.directory, plan=prepared.plan, resumed_at=run.resumed_at, resolved=resolved)
        final = run.train()
    except Exception as error:
        if group.first:
            told = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            where = {} if run is None else {"update": run.trainer.update, "seconds": run.seconds()}
            note_end(prepared.directory, "stopped" if isinstance(error, Stopped) else "failed", told, **where)
        raise
    if group.first:
        note_end(prepared.directory, "finished", update=final["updates"], seconds=final["seconds"])
    return final


def evaluation_config(config: Config, overrides: tuple[str, ...]) -> tuple[Config, dict[str, Any] | None]:
    """The config to evaluate with, and the checkpoint's content if one is named.

    Model, data and precision are the checkpoint's, except for what stands on the command line
    (`overrides`). Raises `ConfigError`.
    """
    if config.checkpoint.path is None:
        return config, None
    _, content = checkpoint.find(config.checkpoint.path)
    try:
        stored = restore(content["config"])
    except ConfigError as error:
        raise ConfigError(f"checkpoint.path={config.checkpoint.path}: its config does not fit: {error}") from None
    # What it started from; its own weights are in it.
    stored.model.weights = None
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    for group in ("model", "data", "precision"):
        if group in keys:
            setattr(stored, group, getattr(config, group))
            continue
        for key in keys:
            if key.startswith(f"{group}."):
                leaf = key.split(".")[1]
                setattr(getattr(stored, group), leaf, getattr(getattr(config, group), leaf))
    execution = ("mode", "device", "launch", "distributed", "checkpoint", "export", "micro_batch")
    merged = dataclasses.replace(stored, **{key: getattr(config, key) for key in execution})
    return merged, content


def evaluate_only(config: Config, content: dict[str, Any] | None, ranks: Ranks) -> dict[str, Any]:
    """Evaluate a checkpoint, or ``model.weights``, on the whole validation set; its values by name. Collective."""
    dataset = open_dataset(config.data)
    if content is not None:
        check_compatible(content, config.model.name, dataset)
    device = choose_device(config, ranks)
    precision = choose_precision(config.precision.name, device)
    with process_group(ranks, device, config.distributed.timeout) as group:
        set_up(config, device, choose_threads(config, ranks))
        network = make_network(config, len(dataset.classes))
        if content is not None and config.model.weights is None:
            load_state(network, content["model"], f"checkpoint.path={config.checkpoint.path}")
        network = network.to(device=device, dtype=precision.weights).to(memory_format=torch.channels_last)
        decoder = choose_decoder(config, None, group, device)
        for line in decoder_lines(config.data.decoder, decoder, None, dataset.val):
            complain(line)
        result = evaluate_split(
            network,
            dataset.val,
            View.from_config(config.data),
            normalise=normaliser(config.data.mean, config.data.std, device, precision),
            precision=precision,
            device=device,
            group=group,
            batch=SMALLEST_BATCH if config.micro_batch == AUTO else int(config.micro_batch),
            workers=choose_workers(config, device, ranks),
            progress=Progress(shown=group.first, epochs=1),
            decoder=decoder,
        )
    assert result is not None
    where = [f"{sample.where}: {sample.reason}" for sample in result.bad]
    return {**result.values(), "data": config.data.name, "model": config.model.name, "undecodable": where}


def export(config: Config) -> Path:
    """Write the checkpoint's weights as a plain state_dict in float32, contiguous; the file's path.

    For a model with a torchvision name it loads into torchvision's model of that name. Raises `ConfigError`.
    """
    assert config.checkpoint.path is not None
    source, content = checkpoint.find(config.checkpoint.path)
    name = str(checkpoint.value(content, "config", "model", "name"))
    # First of all, for the name becomes part of a file's.
    model = build_model(name, num_classes=len(content["classes"]), ghost_batch=1, zero_gamma=False)
    load_state(model, content["model"], f"checkpoint.path={config.checkpoint.path}")
    target = (
        user_path(config.export.path) if config.export.path else source.with_name(f"{name}-{source.stem}-weights.pth")
    )
    if target.resolve() in {path.resolve() for path in (source, *checkpoint.listing(source.parent))}:
        raise ConfigError(
            f"export.path={config.export.path}: it is a checkpoint of the run; give another file to write."
        )
    if target.is_dir():
        raise ConfigError(f"export.path={config.export.path}: it is a folder; give the file to write.")
    if not target.parent.is_dir():
        raise ConfigError(f"export.path={target}: the folder {target.parent} does not exist.")
    state = {
        key: (value.float() if value.is_floating_point() else value).contiguous()
        for key, value in content["model"].items()
    }
    partial = target.with_name(target.name + ".partial")
    try:
        torch.save(state, partial)
        partial.replace(target)
    except (OSError, RuntimeError) as error:  # torch reports a file that it cannot write as RuntimeError
        raise ConfigError(f"export.path={target}: it cannot be written ({str(error).splitlines()[0]}).") from None
    return target
