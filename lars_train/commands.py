"""What the command line does with one checked config, as its ``mode`` says, in as many processes as needed."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import torch

from lars_train.config import AUTO, Config
from lars_train.data.order import SHARDS
from lars_train.errors import ConfigError, NotReady
from lars_train.export import CARD, export
from lars_train.fsutil import user_path
from lars_train.launch import Ranks, adopt, check_nodes, end_with, processes, restarts, shield_tracker, start_processes
from lars_train.messages import complain, counted, is_rank0, printable, say
from lars_train.monitoring.summary import ALREADY_FINISHED, experiment_lines
from lars_train.monitoring.tensorboard import CUSTOM_SCALARS_TAB
from lars_train.plan import IMAGENET_TRAIN_IMAGES, Plan, check_world
from lars_train.preflight.check import check
from lars_train.preflight.rehearsal import describe_rehearsal, rehearse
from lars_train.report.lars_report import read_rows
from lars_train.report.table import elapsed_time, terminal
from lars_train.signals import handle_termination
from lars_train.training import checkpoint
from lars_train.training.device import choose_precision, cuda_devices
from lars_train.training.distributed import begin_job, current_ranks
from lars_train.training.prepare import Prepared, prepare
from lars_train.training.run_directory import Invocation
from lars_train.training.session import evaluate_only, evaluation_config, find_finished, train


def run(config: Config, invocation: Invocation) -> dict[str, Any]:
    """Do what ``mode`` says; what came of it, by name. Raises `ConfigError`, `DataError`, `NotReady`, `WorkerError`."""
    begin_job()
    shield_tracker()
    commands = {"train": _train, "evaluate": _evaluate, "export": _export, "plan": _plan, "check": _check}
    return commands[config.mode](config, invocation)


def _tell(prepared: Prepared) -> None:
    """Print what the user should know of the classes and the weights."""
    for note in prepared.notes:
        (complain if note.startswith("WARNING") else say)(note)


def _train(config: Config, invocation: Invocation) -> dict[str, Any]:
    if restarts():
        # "never" was said to the first start; what that one has done is not to be moved aside.
        config = dataclasses.replace(config, resume=AUTO)
    prepared = prepare(config)
    ranks = adopt()
    check_nodes(config, ranks)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())
    count = 1 if ranks else processes(config, cuda_devices(config), prepared.plan.ghosts)
    check_world(prepared.plan, ranks.world if ranks else count)
    if cuda_devices(config) == 0:
        choose_precision(config.precision.name, torch.device("cpu"))
    if config.data.name == "mini" and config.verbosity:
        say(
            "This trains on embedded images, 12,000 of Fashion-MNIST: the table scaled down.\n"
            "On ImageNet: lars-train batch=32k data=imagenet data.root=/path/to/imagenet\n"
        )
    _tell(prepared)
    # Under a launcher the ranks decide together, in `train`.
    done = find_finished(prepared) if ranks is None else None
    final: dict[str, Any]
    if done is not None:
        say(ALREADY_FINISHED)
        final = done
    elif count > 1:
        final = start_processes(_train_worker, (config, invocation), count)
    else:
        final = train(prepared, ranks or Ranks(), invocation)
    if is_rank0():
        say(f"\n{_told(final, prepared.directory)}")
    return final


def _told(final: dict[str, Any], directory: Path) -> str:
    told = [
        f"{counted(final['updates'], 'update')} in {elapsed_time(final['seconds'])}",
        f"run directory  {directory}",
        f"TensorBoard    tensorboard --logdir {shlex.quote(str(directory))}",
        f"               http://localhost:6006/#{CUSTOM_SCALARS_TAB}",
    ]
    return "\n".join([terminal(read_rows([directory])), *map(printable, told)])


def _evaluate(config: Config, invocation: Invocation) -> dict[str, Any]:
    config, content = evaluation_config(config, invocation.overrides)
    ranks = adopt()
    count = 1 if ranks else processes(config, cuda_devices(config), ghosts=cuda_devices(config))
    result: dict[str, Any]
    if count > 1:
        result = start_processes(_evaluate_worker, (config,), count)
    else:
        result = evaluate_only(config, content, ranks or Ranks())
    for note in result["notes"]:
        (complain if note.startswith("WARNING") else say)(note)
    say(
        f"{result['model']} on {result['data']}: top-1 {result['val/top1']:.2f} %, top-5 {result['val/top5']:.2f} %, "
        f"loss {result['val/loss']:.4f}, {counted(result['val/count'], 'image')}"
        f"{'' if config.data.holdout is None else f' (data.holdout={config.data.holdout:g})'}"
    )
    if result["classes"] < result["trained_outputs"]:
        say(
            f"evaluate.outputs={config.evaluate.outputs}: the images are of {result['classes']:,} of the model's "
            f"{result['trained_outputs']:,} classes, and a prediction is the highest of {result['outputs']:,} outputs"
        )
    for place in result["undecodable"]:
        say(f"WARNING: counted as wrong, cannot be decoded: {place}")
    if config.evaluate.report is not None:
        say(f"report: {user_path(config.evaluate.report)} (per_class.csv, confusion.csv, confusion.png)")
    return result


def _export(config: Config, invocation: Invocation) -> dict[str, Any]:
    if not is_rank0():
        return {}
    path, told = export(config)
    say(f"written: {path}{f' ({told})' if told else ''}")
    say(f"         {path.with_name(CARD)} says what it is and how to use it")
    return {"path": str(path)}


def _plan(config: Config, invocation: Invocation) -> dict[str, Any]:
    """Walk through the run's arithmetic; starts nothing, and writes ``plan.path`` and ``plan.picture`` alone."""
    if not is_rank0():
        return {}
    try:
        prepared = prepare(_without_files(config))
    except ConfigError as error:
        if config.data.name != "imagenet" or config.data.root is None:
            raise
        raise ConfigError(
            f"{error} To plan for ImageNet no images are needed: without data.root its published numbers are taken."
        ) from None
    _tell(prepared)
    plan, dataset = prepared.plan, prepared.dataset
    world = _planned_world(config, plan)
    try:
        rehearsed = rehearse(config, plan, val_count=len(dataset.val), world=world)
    except ConfigError as error:
        if config.data.name != "mini":
            raise
        raise ConfigError(
            f"{error} This is of the embedded pictures; data=imagenet plans for ImageNet, and needs no images."
        ) from None
    # Imported here: the other modes have no use for it.
    from lars_train.preflight.forecast import describe_forecast, forecast

    rehearsed["forecast"] = forecast(config, plan, classes=dataset.classes, world=world, val_count=len(dataset.val))
    if prepared.config is not config:
        say("data.root is not set: ImageNet is planned for by its published numbers of images, and not opened.")
    for line in (
        *experiment_lines(config, plan, dataset.inventory),
        *describe_rehearsal(rehearsed),
        *describe_forecast(rehearsed["forecast"]),
    ):
        say(line)
    if config.plan.path is not None:
        path = user_path(config.plan.path)
        try:
            path.write_text(json.dumps(rehearsed, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"plan.path={path}: it cannot be written ({error.strerror}).") from None
        say(f"plan           {path}")
    if config.plan.picture is not None:
        from lars_train.preflight.plan_figure import draw

        path = user_path(config.plan.picture)
        try:
            draw(rehearsed["forecast"], rehearsed["lr_curve"], path)
        except OSError as error:
            raise ConfigError(f"plan.picture={path}: it cannot be written ({error.strerror}).") from None
        say(f"picture        {path}")
    return rehearsed


def _planned_world(config: Config, plan: Plan) -> int:
    launch = config.launch
    if config.plan.world is not None:
        return config.plan.world
    # The machines planned for need not be like this one.
    here = processes(config, cuda_devices(config), plan.ghosts) if launch.nproc == AUTO else int(launch.nproc)
    return here * (launch.nodes or 1)


def _without_files(config: Config) -> Config:
    """ImageNet without a place is planned for all the same, as made-up images of the same number."""
    data = config.data
    if (data.name, data.root, data.holdout, data.val_labels) != ("imagenet", None, None, None) or data.order == SHARDS:
        return config
    made_up = dataclasses.replace(
        data, name="synthetic", train_count=IMAGENET_TRAIN_IMAGES, val_count=50_000, num_classes=1_000
    )
    # A file of weights has the names of classes that made-up images do not have.
    model = dataclasses.replace(config.model, weights=None, new_head=False)
    return dataclasses.replace(config, data=made_up, model=model)


def _check(config: Config, invocation: Invocation) -> dict[str, Any]:
    """Measure on every rank and tell of it; `NotReady` on the first rank, which speaks for all."""
    ranks = adopt()
    check_nodes(config, ranks)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())
    # What else is wrong with the input belongs into the list.
    count = 1 if ranks else processes(config, cuda_devices(config), ghosts=cuda_devices(config))
    found: dict[str, Any]
    found = start_processes(_check_worker, (config,), count) if count > 1 else check(config, ranks or Ranks())
    for line in found["lines"]:
        say(line)
    problems = found["problems"]
    if problems:
        if not is_rank0():
            # The launcher ends them when the first rank fails.
            handle_termination(signal.SIG_IGN, [signal.SIGTERM])
            return found
        raise NotReady(f"not ready: {len(problems)} to fix.")
    return found


def _train_worker(config: Config, invocation: Invocation) -> dict[str, Any]:
    return train(prepare(config), current_ranks(), invocation)


def _check_worker(config: Config) -> dict[str, Any]:
    return check(config, current_ranks())


def _evaluate_worker(config: Config) -> dict[str, Any]:
    content = checkpoint.find(config.checkpoint.path)[1] if config.checkpoint.path else None
    return evaluate_only(config, content, current_ranks())
