"""Train, evaluate and plan from a Python program: the functions behind ``from lars_train import train``.

They run the same commands as the command line, from the same settings.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import inspect
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn

from lars_train import commands
from lars_train.config import AUTO, Config
from lars_train.config.compose import compose_settings
from lars_train.data.dataset import Dataset
from lars_train.data.open import open_dataset
from lars_train.data.sources.items import open_items
from lars_train.errors import ConfigError
from lars_train.given import Given
from lars_train.launch import adopt
from lars_train.messages import first_line, say
from lars_train.targets import OBJECT, describe_failure
from lars_train.training import checkpoint
from lars_train.training.device import cuda_devices
from lars_train.training.run_directory import Invocation, run_directory

Model = nn.Module | Callable[..., nn.Module] | str
Data = tuple[Any, Any] | str

_running = threading.Lock()
# Variables that a run may set for libraries of this process.
_VARIABLES = ("CUBLAS_WORKSPACE_CONFIG", "PYTHONWARNINGS", "TORCHINDUCTOR_CACHE_DIR")


def train(*settings: str, model: Model | None = None, data: Data | None = None) -> dict[str, Any]:
    """Train a network, or resume a run, and return its results: the content of ``final.json``.

    The run is that of ``lars-train`` with the same settings: same run directory, same weights. If it was interrupted,
    the same call resumes it; if it has finished, the call returns its results. The program's random generators, signal
    handlers and settings of torch are unchanged afterwards.

    Objects exist in this process only, so a run that is given objects uses one device. For more, start the script under
    torchrun, where each rank calls this function with its own objects; or pass the names of functions, which each rank
    imports.

    Args:
        settings: words of the command line, such as ``"batch.size=256"`` (docs/configuration.md).
        model: the network, from normalized images, float (n, 3, S, S), to logits (n, classes): a module, which holds
            the last weights afterwards; a callable that returns one, called with the number of classes if it
            takes an argument; or the name of such a callable, ``"package.module:function"``. By default, the network of
            the settings.
        data: training and validation set: a pair of datasets with a length, whose items are pairs of an image (uint8
            tensor (C, H, W), uint8 array (H, W) or (H, W, C), PIL image, or the bytes of an image file) and a label (a
            whole number from 0); or the name of a function that returns such a pair, ``"package.module:function"``.
            Datasets of torchvision and of Hugging Face can be passed as they are if they have no transform. By default,
            the data set of the settings.

    Raises:
        ConfigError: the settings or the objects do not fit.
        DataError: too many images are damaged, or a disk or a worker failed.
        Diverged: the loss is not finite, or is above ``guard.max_loss``.
        Stopped: Ctrl-C or a termination signal ended the run after a checkpoint. A second Ctrl-C raises
            KeyboardInterrupt at once.
    """
    final, config = _run("train", settings, model, data)
    if isinstance(model, nn.Module):
        _load_last_weights(model, config, final)
    return final


def evaluate(*settings: str, model: Model | None = None, data: Data | None = None) -> dict[str, Any]:
    """Evaluate a network on a validation set, and return the values by name, such as ``val/top1`` in percent.

    Evaluates ``checkpoint.path`` or ``model.weights`` of the settings, or else the weights of the module `model`. The
    arguments and errors are those of `train`.
    """
    return _run("evaluate", settings, model, data)[0]


def plan(*settings: str, model: Model | None = None, data: Data | None = None) -> dict[str, Any]:
    """Return the plan of a run without training: updates, accumulation, learning rates, and a forecast of the time.

    The arguments and errors are those of `train`.
    """
    return _run("plan", settings, model, data)[0]


def _run(mode: str, settings: tuple[str, ...], model: Model | None, data: Data | None) -> tuple[dict[str, Any], Config]:
    if not _running.acquire(blocking=False):
        raise ConfigError(f"lars_train.{mode}: another run uses this process; wait for its end.")
    try:
        with _unchanged_process():
            return _run_composed(mode, settings, model, data)
    finally:
        _running.release()


def _run_composed(
    mode: str, settings: tuple[str, ...], model: Model | None, data: Data | None
) -> tuple[dict[str, Any], Config]:
    words = [] if mode == "train" else [f"mode={mode}"]
    for word in settings:
        key = str(word).lstrip("+~").partition("=")[0]
        if key == "mode":
            raise ConfigError(
                f"{word}: lars_train.{mode} sets the mode itself. Call lars_train.train, evaluate or plan for their "
                "modes, and use the command line for the others."
            )
        for name, argument in (("model", model), ("data", data)):
            if argument is not None and key in (name, f"{name}.name", f"{name}.target"):
                raise ConfigError(f"{word}: the argument {name} is set, too; omit one of them.")
    words += settings
    dataset = None
    if data is not None:
        dataset, target = _given_data(data)
        words += ["data=custom", f"data.target={target}"]
    network = None
    if model is not None:
        network, dataset, target = _given_model(model, words, dataset, mode)
        words += ["model=custom", f"model.target={target}"]
    composed = compose_settings(words)
    config = commands.with_stored_scaling(composed.config, composed.raw)
    if not all(isinstance(argument, str | None) for argument in (model, data)):
        config = _on_one_device(config)
    if dist.is_available() and dist.is_initialized():
        raise ConfigError("torch.distributed has a process group, but a run opens its own; destroy it before the call.")
    # In an evaluation, data=custom would replace the whole section `data` of the checkpoint's config; data.name
    # replaces only the name.
    overrides = tuple({"data=custom": "data.name=custom"}.get(word, word) for word in composed.overrides)
    invocation = Invocation(
        (f"lars_train.{mode}", *settings), overrides, OmegaConf.to_yaml(composed.raw), composed.hydra_yaml
    )
    return commands.run(config, invocation, Given(network, dataset)), config


def _given_data(data: Data) -> tuple[Dataset | None, str]:
    """Return the data set of the argument `data` and the value of ``data.target`` that identifies it."""
    if isinstance(data, str):
        return None, data
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise ConfigError(f"data: pass a pair, data=(train_set, val_set), not a {type(data).__name__}.")
    dataset = open_items(data[0], data[1], place="data")
    return dataset, f"{OBJECT}{dataset.fingerprint}"


def _given_model(
    model: Model, words: list[str], dataset: Dataset | None, mode: str
) -> tuple[Callable[[int], nn.Module] | None, Dataset | None, str]:
    """Return three values: a function that makes the network; the data set, if it is open; and ``model.target``.

    The first is None if `model` is a name.
    """
    if isinstance(model, str):
        return None, dataset, model
    if isinstance(model, nn.Module):
        if any(value.is_meta for value in model.state_dict().values()):
            raise ConfigError("model: the module is on the meta device, so it has no weights; pass a callable instead.")
        try:
            return lambda classes: copy.deepcopy(model).cpu(), dataset, _identity(copy.deepcopy(model))
        except Exception as error:  # the module may have any content
            raise ConfigError(
                f"model: this module cannot be copied ({type(error).__name__}: {first_line(error)}). Pass a function "
                "that makes it."
            ) from error
    if not callable(model):
        raise ConfigError(
            f"model: pass a module, a callable that returns one, or a name, not a {type(model).__name__}."
        )
    if mode == "evaluate" and not any(word.startswith(("checkpoint.path=", "model.weights=")) for word in words):
        raise ConfigError("model: this makes a network with random weights; pass a module, or set checkpoint.path.")
    if mode != "train":
        return lambda classes: _call(model, classes), dataset, f"{OBJECT}{_name(model)}"
    dataset = dataset or open_dataset(compose_settings(words).config.data)
    return lambda classes: _call(model, classes), dataset, _identity(_call(model, len(dataset.classes)))


def _name(model: Callable[..., nn.Module]) -> str:
    return str(getattr(model, "__name__", type(model).__name__))


def _call(model: Callable[..., nn.Module], classes: int) -> nn.Module:
    """Return the network that the callable `model` makes."""
    parameters = inspect.signature(model).parameters.values()
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    named = any(p.name == "num_classes" for p in parameters)
    try:
        network = model(classes) if required else model(num_classes=classes) if named else model()
    except (Exception, SystemExit) as error:  # the caller's code may raise anything
        raise ConfigError(f"model: the call of {_name(model)} fails{describe_failure(error)}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"model: the callable returned a {type(network).__name__}, not a torch.nn.Module.")
    return network


def _identity(network: nn.Module) -> str:
    """Return a text that names a network by its class, and the names and shapes of its state."""
    shapes = [(name, tuple(value.shape)) for name, value in network.state_dict().items()]
    return f"{OBJECT}{type(network).__name__}:{hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]}"


def _on_one_device(config: Config) -> Config:
    """Return `config` for a run in this process only. Raises `ConfigError` if it asks for several processes."""
    if adopt() is not None:
        return config
    several = (
        "the objects model and data exist in this process only. For several devices, start the script under torchrun, "
        "or pass the names of functions (package.module:function), which each rank imports."
    )
    if config.launch.nproc not in (AUTO, 1):
        raise ConfigError(f"launch.nproc={config.launch.nproc}: {several}")
    if (count := cuda_devices(config)) > 1:
        say(f"NOTE: this run uses one of {count} CUDA devices, because {several}")
    return dataclasses.replace(config, launch=dataclasses.replace(config.launch, nproc=1))


def _load_last_weights(model: nn.Module, config: Config, final: dict[str, Any]) -> None:
    """Load the weights of the run's last checkpoint. Raises `ConfigError` if it is missing."""
    folder = run_directory(config) / "checkpoints"
    found = checkpoint.latest(folder)
    if found is None or found[1]["update"] != final["updates"]:
        raise ConfigError(
            f"{folder}: the run has finished, but its last checkpoint, with the weights for the module, is missing; "
            "restore it, or start over with resume=never."
        )
    model.load_state_dict(found[1]["model"])


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Restore, after the context, what a run changes in this process."""
    threads, thresholds = torch.get_num_threads(), gc.get_threshold()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    hook = threading.excepthook
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        # The caller may have disabled gradients.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices),
            warnings.catch_warnings(),
        ):
            yield
    finally:
        threading.excepthook = hook
        torch.set_num_threads(threads)
        if deterministic[0] != torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        # torch refuses to set the flag after torch.backends.disable_global_flags.
        if benchmark != torch.backends.cudnn.benchmark:
            torch.backends.cudnn.benchmark = benchmark
        gc.set_threshold(*thresholds)
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
