"""Run one checked config by its ``mode``, in as many processes as needed."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lars_train.config import AUTO, Config
from lars_train.data.order import SHARDS
from lars_train.errors import ConfigError, NotReady
from lars_train.export import export
from lars_train.fsutil import user_path
from lars_train.given import NOTHING, Given
from lars_train.launch import (
    Ranks,
    adopt,
    check_nodes,
    exit_with_parent,
    processes,
    restarts,
    start_processes,
    start_resource_tracker,
)
from lars_train.messages import complain, counted, is_rank0, printable, say
from lars_train.monitoring.summary import ALREADY_FINISHED, FLIPPED, experiment_lines
from lars_train.monitoring.tensorboard import CUSTOM_SCALARS_TAB
from lars_train.preflight.check import check
from lars_train.preflight.rehearsal import describe_rehearsal, rehearse
from lars_train.report.lars_report import read_rows
from lars_train.report.model_card import CARD
from lars_train.report.table import elapsed_time, format_energy, terminal
from lars_train.run_plan import IMAGENET_TRAIN_IMAGES, Plan, check_world
from lars_train.signals import handle_termination
from lars_train.training import checkpoint
from lars_train.training.device import check_graphs, choose_precision, cuda_devices
from lars_train.training.distributed import begin_job, current_ranks
from lars_train.training.prepare import prepare
from lars_train.training.run_directory import Invocation, holds_run_of, run_directory
from lars_train.training.session import check_targets, evaluate_only, evaluation_config, find_finished, train


def run(config: Config, invocation: Invocation, given: Given = NOTHING) -> dict[str, Any]:
    """Run the config's ``mode`` and return its results by name. `given`: objects that the config does not name.

    Raises `ConfigError`, `DataError`, `NotReady`, `WorkerError`.
    """
    check_targets(config, invocation.overrides)
    begin_job()
    start_resource_tracker()
    commands = {"train": _train, "evaluate": _evaluate, "export": _export, "plan": _plan, "check": _check}
    return commands[config.mode](config, invocation, given)


def with_stored_scaling(config: Config, raw: DictConfig) -> Config:
    """Return `config` with ``batch.scaled=true`` if the stored run of the same settings has it, else unchanged.

    With data=folder, earlier versions scaled the batch by default. A run that they started keeps its scaled batch.
    `raw`: the config before `resolve`.
    """
    if raw.batch.scaled is not None or config.data.name != "folder" or config.batch.size is not None:
        return config
    scaled = dataclasses.replace(config, batch=dataclasses.replace(config.batch, scaled=True))
    return scaled if holds_run_of(run_directory(scaled), scaled) else config


def _print_notes(notes: Iterable[str]) -> None:
    """Print notes about the data set and the weights, warnings to stderr."""
    for note in notes:
        (complain if note.startswith("WARNING") else say)(note)


def _launcher_ranks(config: Config) -> Ranks | None:
    """Return the ranks that a launcher started, checked against the config; None without a launcher."""
    ranks = adopt()
    check_nodes(config, ranks)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        exit_with_parent(os.getppid())
    return ranks


def _train(config: Config, invocation: Invocation, given: Given) -> dict[str, Any]:
    if restarts():
        # `resume=never` applies to the first start only: a restart must keep the directory it created.
        config = dataclasses.replace(config, resume=AUTO)
    prepared = prepare(config, given)
    ranks = _launcher_ranks(config)
    count = 1 if ranks else processes(config, cuda_devices(config), prepared.plan.ghosts)
    check_world(prepared.plan, ranks.world if ranks else count)
    if cuda_devices(config) == 0:
        choose_precision(config.precision.name, torch.device("cpu"))
    if config.data.name == "mini" and config.verbosity:
        say(
            "This trains on 10,000 embedded images of Fashion-MNIST: a published ImageNet recipe, scaled down.\n"
            "On ImageNet: lars-train batch=32k data=imagenet data.root=/path/to/imagenet\n"
        )
    _print_notes(prepared.notes)
    # Under a launcher, the ranks check this together in `train`.
    finished = find_finished(prepared) if ranks is None else None
    final: dict[str, Any]
    if finished is not None:
        say(ALREADY_FINISHED)
        final = finished
    elif count > 1:
        check_graphs(config)
        final = start_processes(_train_worker, (config, invocation), count)
    else:
        final = train(prepared, ranks or Ranks(), invocation)
    if is_rank0():
        say(f"\n{_describe_results(final, prepared.directory)}")
    return final


def _describe_results(final: dict[str, Any], directory: Path) -> str:
    energy = f", {format_energy(final['kwh'])} on the GPUs" if "kwh" in final else ""
    lines = [
        f"{counted(final['updates'], 'update')} in {elapsed_time(final['seconds'])}{energy}",
        f"run directory  {directory}",
        f"TensorBoard    tensorboard --logdir {shlex.quote(str(directory))}",
        f"               http://localhost:6006/#{CUSTOM_SCALARS_TAB}",
    ]
    return "\n".join([terminal(read_rows([directory])), *map(printable, lines)])


def _evaluate(config: Config, invocation: Invocation, given: Given) -> dict[str, Any]:
    config, content = evaluation_config(config, invocation.overrides)
    ranks = adopt()
    count = 1 if ranks else processes(config, cuda_devices(config), ghosts=cuda_devices(config))
    result: dict[str, Any]
    if count > 1:
        result = start_processes(_evaluate_worker, (config,), count)
    else:
        result = evaluate_only(config, content, ranks or Ranks(), given)
    _print_notes(result["notes"])
    say(
        f"{result['model']} on {result['data']}: top-1 {result['val/top1']:.2f} %, top-5 {result['val/top5']:.2f} %, "
        f"loss {result['val/loss']:.4f}, {counted(result['val/count'], 'image')}"
        f"{'' if config.data.holdout is None else f' (data.holdout={config.data.holdout:g})'}"
    )
    if config.evaluate.flip:
        say(f"evaluate.flip=true: {FLIPPED}")
    if result["classes"] < result["trained_outputs"]:
        say(
            f"evaluate.outputs={config.evaluate.outputs}: the images cover {result['classes']:,} of the model's "
            f"{result['trained_outputs']:,} classes, and a prediction is the largest of {result['outputs']:,} outputs"
        )
    for image in result["undecodable"]:
        say(f"WARNING: counted as wrong, cannot be decoded: {image}")
    if config.evaluate.report is not None:
        say(f"report: {user_path(config.evaluate.report)} (per_class.csv, confusion.csv, confusion.png)")
    return result


def _export(config: Config, invocation: Invocation, given: Given) -> dict[str, Any]:
    if not is_rank0():
        return {}
    path, detail = export(config)
    say(f"written: {path}{f' ({detail})' if detail else ''}")
    say(f"         {path.with_name(CARD)} describes the file and how to use it")
    return {"path": str(path)}


def _plan(config: Config, invocation: Invocation, given: Given) -> dict[str, Any]:
    """Print the plan of a run. Trains nothing, and writes only ``plan.path`` and ``plan.picture``."""
    if not is_rank0():
        return {}
    try:
        prepared = prepare(_without_files(config), given)
    except ConfigError as error:
        if config.data.name != "imagenet" or config.data.root is None:
            raise
        raise ConfigError(
            f"{error} To plan without the images, omit data.root: the published numbers of ImageNet are used."
        ) from None
    _print_notes(prepared.notes)
    plan, dataset = prepared.plan, prepared.dataset
    world = _planned_world(config, plan)
    try:
        rehearsed = rehearse(config, plan, val_count=len(dataset.val), world=world)
    except ConfigError as error:
        if config.data.name != "mini":
            raise
        raise ConfigError(
            f"{error} This plan is for the embedded images; data=imagenet plans for ImageNet, and needs no images."
        ) from None
    # Imported here because no other mode needs it.
    from lars_train.preflight.forecast import describe_forecast, forecast

    rehearsed["forecast"] = forecast(
        config, plan, classes=dataset.classes, world=world, val_count=len(dataset.val), given=given
    )
    if prepared.config is not config:
        say("data.root is not set: this plan uses the published numbers of ImageNet.")
    for line in (
        *experiment_lines(config, plan, dataset.inventory),
        *describe_rehearsal(rehearsed),
        *describe_forecast(rehearsed["forecast"]),
    ):
        say(line)
    _write_plan(config, rehearsed)
    return rehearsed


def _write_plan(config: Config, rehearsed: dict[str, Any]) -> None:
    if config.plan.path is not None:
        path = user_path(config.plan.path)
        try:
            path.write_text(json.dumps(rehearsed, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"plan.path={path}: cannot be written ({error.strerror}).") from None
        say(f"plan           {path}")
    if config.plan.picture is not None:
        from lars_train.preflight.plan_figure import draw

        path = user_path(config.plan.picture)
        try:
            draw(rehearsed["forecast"], rehearsed["lr_curve"], path)
        except OSError as error:
            raise ConfigError(f"plan.picture={path}: cannot be written ({error.strerror}).") from None
        say(f"figure         {path}")


def _planned_world(config: Config, plan: Plan) -> int:
    launch = config.launch
    if config.plan.world is not None:
        return config.plan.world
    # An explicit nproc is not checked against this machine's devices: the plan may be for other machines.
    per_node = processes(config, cuda_devices(config), plan.ghosts) if launch.nproc == AUTO else int(launch.nproc)
    return per_node * (launch.nodes or 1)


def _without_files(config: Config) -> Config:
    """If ``data.root`` is not set, replace ImageNet with a synthetic data set of the same size."""
    data = config.data
    if (data.name, data.root, data.holdout, data.val_labels) != ("imagenet", None, None, None) or data.order == SHARDS:
        return config
    made_up = dataclasses.replace(
        data, name="synthetic", train_count=IMAGENET_TRAIN_IMAGES, val_count=50_000, num_classes=1_000
    )
    # The class names in a file of weights would not match those of synthetic images.
    model = dataclasses.replace(config.model, weights=None, new_head=False)
    return dataclasses.replace(config, data=made_up, model=model)


def _check(config: Config, invocation: Invocation, given: Given) -> dict[str, Any]:
    """Measure on every rank and print the findings. Rank 0 raises `NotReady` for all."""
    ranks = _launcher_ranks(config)
    # Only an invalid launch.nproc raises here. `check` reports all other errors of the config among its findings.
    count = 1 if ranks else processes(config, cuda_devices(config), ghosts=cuda_devices(config))
    found: dict[str, Any]
    found = start_processes(_check_worker, (config,), count) if count > 1 else check(config, ranks or Ranks())
    for line in found["lines"]:
        say(line)
    problems = found["problems"]
    if problems:
        if not is_rank0():
            # The launcher ends the other ranks when rank 0 fails.
            handle_termination(signal.SIG_IGN, [signal.SIGTERM])
            return found
        raise NotReady(f"not ready: {counted(len(problems), 'problem')} to fix.")
    return found


def _train_worker(config: Config, invocation: Invocation) -> dict[str, Any]:
    return train(prepare(config), current_ranks(), invocation)


def _check_worker(config: Config) -> dict[str, Any]:
    return check(config, current_ranks())


def _evaluate_worker(config: Config) -> dict[str, Any]:
    content = checkpoint.find(config.checkpoint.path)[1] if config.checkpoint.path else None
    return evaluate_only(config, content, current_ranks())
