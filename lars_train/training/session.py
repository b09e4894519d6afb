"""Run ``mode=train`` and ``mode=evaluate`` on one rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lars_train.config import AUTO, Config, filled, restore
from lars_train.config.network import BUILTIN, describe_network
from lars_train.config.recipe_schema import RowConfig
from lars_train.config.sizes import fill_sizes
from lars_train.data.dataset import Dataset
from lars_train.data.loading.loader import EvalSpec
from lars_train.data.open import open_validation
from lars_train.errors import ConfigError, Diverged, Stopped
from lars_train.fsutil import user_path
from lars_train.given import NOTHING, Given
from lars_train.launch import Ranks, collect_garbage_as_usual
from lars_train.messages import complain, first_line, say
from lars_train.monitoring.confusion import write_confusion
from lars_train.monitoring.progress import Progress
from lars_train.monitoring.summary import ALREADY_FINISHED
from lars_train.run_plan import check_world
from lars_train.targets import check_named
from lars_train.training import checkpoint
from lars_train.training.assemble import network_to_evaluate
from lars_train.training.device import (
    check_graphs,
    choose_device,
    choose_precision,
    choose_threads,
    choose_workers,
    set_up,
)
from lars_train.training.device_prefetch import RankContext
from lars_train.training.distributed import Group, process_group
from lars_train.training.evaluation import Result, evaluate_split, evaluation_batch
from lars_train.training.prepare import Prepared, continuation
from lars_train.training.resolve import check_cache, choose_decoder, decoder_lines
from lars_train.training.run import Run
from lars_train.training.run_directory import (
    Invocation,
    check_same_experiment,
    check_usable,
    data_record,
    disk_error,
    finished,
    open_directory,
    record_end,
    record_finish,
    record_start,
)


def find_finished(prepared: Prepared) -> dict[str, Any] | None:
    """Return the content of ``final.json`` if the run has already finished at the config's last update, else None.

    Writes nothing. Raises `ConfigError` if the directory cannot be used, holds a run of another config or a run beyond
    that update, or has only checkpoints from which the run cannot resume.
    """
    config, directory = prepared.config, prepared.directory
    check_usable(directory)
    check_same_experiment(directory, config, prepared.dataset.fingerprint)
    if config.resume != AUTO:
        return None
    final, stop = finished(directory), prepared.plan.stop
    if final is not None and final["updates"] == stop:
        return final
    if final is not None and final["updates"] > stop:
        state = f"has finished at update {final['updates']:,}"
    else:
        found = continuation(prepared, warn=False)
        if found is None or found[1]["update"] <= stop:
            return None
        state = f"is already at update {found[1]['update']:,}"
    raise ConfigError(
        f"max_updates={config.max_updates}: the run in {directory} {state}; omit max_updates or increase it to "
        "continue that run, or choose another run.name for a shorter one."
    )


def train(prepared: Prepared, ranks: Ranks, invocation: Invocation) -> dict[str, Any]:
    """Start or resume a run, unless it has already finished, and return the content of ``final.json``. Collective.

    Raises `ConfigError`, `DataError`.
    """
    config, directory = prepared.config, prepared.directory
    check_world(prepared.plan, ranks.world)
    device = choose_device(config, ranks)
    choose_precision(config.precision.name, device)
    with process_group(ranks, device, config.distributed.timeout) as group:
        own = {"data set": prepared.dataset.fingerprint, "network": config.model.target}
        shared = group.broadcast_from_rank0(own)
        group.raise_on_all_ranks(
            next((_differs(ranks, what) for what, value in own.items() if value != shared[what]), None)
        )
        # Only rank 0 checks, so that all ranks agree even if a shared file system shows a file late on some nodes.
        final: dict[str, Any] | None = group.broadcast_from_rank0(find_finished(prepared) if group.first else None)
        if final is not None:
            say(ALREADY_FINISHED)
            return final
        check_graphs(config)
        lock = open_directory(directory, config, invocation, group)
        try:
            return _train_in(prepared, group, device)
        finally:
            if lock is not None:
                lock.close()


def _differs(ranks: Ranks, what: str) -> ConfigError:
    return ConfigError(f"rank {ranks.rank} has another {what} than rank 0; start all ranks with the same {what}.")


def _train_in(prepared: Prepared, group: Group, device: torch.device) -> dict[str, Any]:
    """Train, and record the start and the end."""
    run, directory = None, prepared.directory
    try:
        run = Run(prepared, group, device)
        collect_garbage_as_usual()
        with closing(run):
            if group.first:
                resolved = dataclasses.asdict(run.resolved)
                flops: dict[str, Any] = {"flops_per_image": run.flops.per_image, "peak_flops": run.flops.peak}
                if len(run.flops.by_size) > 1:
                    flops["flops_by_size"] = run.flops.by_size
                began = {"resumed_at": run.resumed_at, "resolved": resolved, **flops}
                # The file may exist from an earlier start that ended at a lower max_updates.
                (directory / "final.json").unlink(missing_ok=True)
                record_start(directory, plan=prepared.plan, data=data_record(prepared.dataset), **began)
            final = run.train()
        failure = None
        if group.first:
            try:
                ended = {"update": final["updates"], "seconds": final["seconds"]}
                record_finish(directory, final, **ended, **({"incomplete": run.incomplete} if run.incomplete else {}))
            except OSError as error:
                failure = disk_error(directory, error)
        group.raise_on_all_ranks(failure)
    except Exception as error:
        cause = disk_error(directory, error) if isinstance(error, OSError) and _is_in(directory, error) else error
        if group.first:
            reason = f"{type(cause).__name__}: {first_line(str(cause))}"
            progress = {} if run is None else {"update": run.trainer.update, "seconds": run.state.total_seconds()}
            record_end(directory, "stopped" if isinstance(cause, Stopped) else "failed", reason, **progress)
        if cause is not error:
            raise cause from error
        raise
    return final


def _is_in(directory: Path, error: OSError) -> bool:
    name = error.filename
    return isinstance(name, str) and directory.absolute() in Path(name).absolute().parents


def evaluation_config(config: Config, overrides: tuple[str, ...]) -> tuple[Config, dict[str, Any] | None]:
    """Return the config for an evaluation, and the checkpoint's content if the config names a checkpoint.

    Model, data, precision, `channels_last`, `deterministic` and `evaluate.flip` come from the checkpoint, except for
    keys on the command line (`overrides`). With another data set, the sizes are those of the checkpoint unless they are
    set. Raises `ConfigError`.
    """
    if config.checkpoint.path is None:
        return config, None
    _, content = checkpoint.find(config.checkpoint.path)
    try:
        stored = restore(content["config"])
    except ConfigError as error:
        raise ConfigError(f"checkpoint.path={config.checkpoint.path}: its config does not fit: {error}") from None
    # Ignore the weights from which the run started, because the checkpoint has its own.
    stored.model.weights = None
    size, crop = filled(stored.data.image_size), filled(stored.data.eval_crop)
    keys = {override.lstrip("+~").partition("=")[0] for override in overrides}
    for name in ("model", "data", "precision", "channels_last", "deterministic"):
        own = getattr(config, name)
        # model=timm and model=custom name a source, not a network: with the same source, keep the stored settings.
        if name in keys and not (name == "model" and own.source == stored.model.source != BUILTIN):
            setattr(stored, name, own)
            continue
        for key in keys:
            if key.startswith(f"{name}."):
                leaf = key.split(".")[1]
                value, before = getattr(own, leaf), getattr(getattr(stored, name), leaf)
                setattr(getattr(stored, name), leaf, {**before, **value} if isinstance(value, dict) else value)
    if "evaluate.flip" not in keys:
        config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, flip=stored.evaluate.flip))
    if "data.eval_resize" in keys and "data.eval_crop" not in keys:
        stored.data.eval_crop = None
    data = stored.data
    if data.image_size is None and data.eval_size is None:
        data.image_size = size
        data.eval_crop = crop if data.eval_crop is None and data.eval_resize is None else data.eval_crop
    fill_sizes(data, RowConfig())
    execution = ("mode", "device", "launch", "distributed", "checkpoint", "evaluate", "export", "micro_batch")
    merged = dataclasses.replace(stored, **{key: getattr(config, key) for key in (*execution, "verbosity")})
    check_targets(merged, overrides)
    return merged, content


def check_targets(config: Config, overrides: tuple[str, ...]) -> None:
    """Raise `ConfigError` if a function to import is named by a file and not by the command line (`overrides`)."""
    check_named("model.target", config.model.target, overrides)
    check_named("data.target", config.data.target, overrides)


def evaluate_only(
    config: Config, content: dict[str, Any] | None, ranks: Ranks, given: Given = NOTHING
) -> dict[str, Any]:
    """Evaluate a checkpoint or ``model.weights`` on the validation set. Return the values by name. Collective."""
    dataset = open_validation(config.data, given.dataset)
    for line in dataset.inventory.lines():
        say(f"{'data':<15}{line}")
    batch = evaluation_batch(1 if config.micro_batch == AUTO else int(config.micro_batch))
    check_cache(config, dataset, None, micro_batch=batch, ranks=ranks)
    evaluated = network_to_evaluate(config, content, dataset.classes, dataset.numbers, given)
    device = choose_device(config, ranks)
    precision = choose_precision(config.precision.name, device)
    with process_group(ranks, device, config.distributed.timeout) as group:
        set_up(config, device, choose_threads(config, ranks))
        context = RankContext.from_config(config, device, group, precision)
        decoder = choose_decoder(config, None, group, device)
        for line in decoder_lines(config.data.decoder, decoder, None, dataset.val):
            complain(line)
        spec = EvalSpec.from_config(
            config,
            dataset.val,
            ranks,
            micro_batch=batch,
            workers=choose_workers(config, device, ranks),
            pin_memory=device.type == "cuda",
            decoder=decoder,
        )
        result = evaluate_split(
            context.place(evaluated.network),
            spec,
            context,
            Progress(shown=group.first, epochs=1, verbosity=config.verbosity),
            classes=None if config.evaluate.report is None else len(evaluated.classes),
            flip=bool(config.evaluate.flip),
        )
        assert result is not None
        if not math.isfinite(result.loss):
            raise Diverged(
                f"val/loss is {result.loss}: the network's outputs are not finite, so the top-1 is meaningless. Either "
                "the run diverged (choose an earlier checkpoint), or the precision is too low."
            )
        if group.first and config.evaluate.report is not None:
            _report(config.evaluate.report, result, dataset, evaluated.classes)
    return {
        **result.values(),
        "data": config.data.name,
        "model": describe_network(config.model),
        "classes": len(dataset.classes),
        "outputs": len(evaluated.classes),
        "trained_outputs": evaluated.trained,
        "notes": list(evaluated.notes),
        "read": dataset.inventory.record(),
        "undecodable": [f"{sample.where}: {sample.reason}" for sample in result.bad],
    }


def _report(path: str, result: Result | None, dataset: Dataset, classes: Sequence[str]) -> None:
    assert result is not None
    assert result.confusion is not None
    counts = np.concatenate([result.confusion.numpy(), np.zeros((len(classes), 1), np.int64)], axis=1)
    for sample in result.bad:
        counts[dataset.val.labels[sample.sample], -1] += 1
    try:
        write_confusion(user_path(path), classes, counts)
    except OSError as error:
        raise ConfigError(f"evaluate.report={path}: cannot be written ({error.strerror}).") from None
