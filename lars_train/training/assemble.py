"""Turn a config into a network, an optimizer, and the trainer of both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lars_train.config import Config, OptimizerConfig, filled
from lars_train.config.lars_options import FLOAT32_MAX, lars_keywords
from lars_train.data.sources.imagenet import wnids
from lars_train.errors import ConfigError, did_you_mean
from lars_train.models.factory import build_model
from lars_train.models.weight_files import Weights, few, read_weights
from lars_train.models.weights import check_finite, check_name, keep_outputs, load_state, load_weights
from lars_train.optim.eager import leave_compiler_out
from lars_train.optim.lars import LARS
from lars_train.optim.param_groups import parameter_groups
from lars_train.plan import Plan
from lars_train.training import checkpoint
from lars_train.training.device_prefetch import RankContext
from lars_train.training.trainer import Hyper, Trainer

ALL, SUBSET = "all", "subset"
"""Of `evaluate.outputs`: the outputs that the highest logit is looked for among."""


def make_network(config: Config, classes: Sequence[str] | int) -> nn.Module:
    """The config's model for these classes, on the CPU: from its weights file if one is named, else newly drawn.

    `classes`: their names, which are compared with those of the weights file, or their number.
    """
    return start_network(config, classes)[0]


def start_network(config: Config, classes: Sequence[str] | int) -> tuple[nn.Module, tuple[str, ...]]:
    """`make_network`, and what the user should know of the weights file."""
    names = None if isinstance(classes, int) else classes
    network = _network(config, classes if isinstance(classes, int) else len(classes))
    if config.model.weights is None:
        return network, ()
    model = config.model
    notes = load_weights(network, config.model.weights, name=model.name, classes=names, new_head=model.new_head)
    return network, notes


@dataclass(frozen=True)
class EvaluatedNetwork:
    """A network to evaluate, and what its outputs stand for."""

    network: nn.Module
    """Its first outputs are the data set's classes, in their order."""
    classes: tuple[str, ...]
    """The class of each output."""
    trained: int
    """Outputs that the network was trained with, of which it may have fewer here."""
    notes: tuple[str, ...]
    """What the user should know of how the classes were matched."""


def network_to_evaluate(
    config: Config, content: dict[str, Any] | None, classes: Sequence[str], numbers: Sequence[int] = ()
) -> EvaluatedNetwork:
    """The network of the checkpoint `content`, or of ``model.weights``, for a data set with these `classes`.

    They are some or all of the network's, in any order. With ``evaluate.outputs=subset`` the network keeps their
    outputs alone, with ``all`` the others follow. `numbers`: see `match_classes`. Raises `ConfigError` for a class that
    the network does not have.
    """
    if config.model.weights is not None:
        with torch.device("meta"):
            wanted = _network(config, 1).state_dict()
        weights = read_weights(config.model.weights, wanted)
        check_finite(weights)
    else:
        assert content is not None
        name = checkpoint.value(content, "config", "model", "name")
        weights = Weights(
            f"checkpoint.path={config.checkpoint.path}", content["model"], tuple(content["classes"]), name
        )
    check_name(weights, config.model.name)
    trained = weights.outputs
    network = _network(config, trained or len(classes))
    load_state(network, weights.state, weights.origin)
    names, rows, notes = match_classes(weights, classes, numbers)
    if config.evaluate.outputs == ALL:
        chosen = set(rows)
        rows = [*rows, *(row for row in range(trained) if row not in chosen)]
    keep_outputs(network, rows)
    return EvaluatedNetwork(
        network, (*classes, *(names[row] for row in rows[len(classes) :])), trained, weights.notes + notes
    )


def match_classes(
    weights: Weights, classes: Sequence[str], numbers: Sequence[int] = ()
) -> tuple[Sequence[str], list[int], tuple[str, ...]]:
    """A name for each output, the output of each of `classes`, and what the user should know of it.

    By name, and by number where all names on both sides are numbers, with leading zeros or without. Other names that
    are whole numbers below the number of outputs, and no classes of the network, are taken for the outputs' indices,
    unless its own are numbers; so are the `numbers` that label classes by other names in the data set's files. Outputs
    without names are ImageNet's where the numbers say so, else those of `classes` in their order. Raises `ConfigError`.
    """
    names, count = weights.classes, weights.outputs
    if names is None and count == len(wnids()) and set(classes) <= set(wnids()):
        names = wnids()
    index = {label: row for row, label in enumerate(names or ())}
    if all(label in index for label in classes):
        return names or (), [index[label] for label in classes], ()
    own = names or ()
    by_number = {_unpadded(label): row for row, label in enumerate(own)} if _are_numbers(own) else {}
    numeric = len(by_number) > 0 and _are_numbers(classes)
    if len(by_number) < len(own):
        by_number = {}  # 1 and 01 are two classes there
    if numeric:
        found = [by_number[_unpadded(label)] for label in classes if _unpadded(label) in by_number]
        if len({*found}) == len(classes):
            pairs = zip(classes, (own[row] for row in found), strict=True)
            told = "; ".join([f"{label} is {name}" for label, name in pairs if label != name][:3])
            return own, found, (f"NOTE: classes are matched by their numbers, whatever zeros lead them: {told}.",)
    shown = names or [f"output {row}" for row in range(count)]
    rows = list(numbers) or [int(label) if label.isascii() and label.isdigit() else count for label in classes]
    # Where the network's classes are numbers, a number is no index: output 2 of 0, 1, 10, 11, 2 is class 10.
    indices = not numeric and index.keys().isdisjoint(classes)
    if indices and max(rows) < count and len({*rows}) == len(rows):
        told = "; ".join(
            f"{label}{f' ({row})' if numbers and label != str(row) else ''} is {shown[row]}"
            for label, row in list(zip(classes, rows, strict=True))[:3]
        )
        return shown, rows, (f"WARNING: the data set's classes are numbers, taken for the model's outputs: {told}.",)
    if names is None and len(classes) == count:
        note = text_order(classes)
        return classes, list(range(count)), () if note is None else (note,)
    if names is None:
        raise ConfigError(
            f"{weights.origin}: it has {count:,} outputs, the data set {len(classes):,} classes, and the file does not "
            "say which output is which class. Name the folders by the numbers of the outputs (from 0), or give a file "
            "with class names, as mode=export writes it."
        )
    strange = [label for label in classes if label not in index]
    strange = [label for label in strange if _unpadded(label) not in by_number] or strange
    raise ConfigError(
        f"{weights.origin}: {len(strange):,} of the data set's {len(classes):,} classes are none of the model's "
        f"{count:,}: {few(strange, 5)}; the model has {few(names)}. Choose the data set that it was trained for, or "
        "give the folders the names of the model's classes."
    )


def text_order(classes: Sequence[str]) -> str | None:
    """A warning for classes that are numbers in the order of text: 0, 1, 10, 11, 2; None for others."""
    if not _are_numbers(classes) or list(classes) == sorted(classes, key=int):
        return None
    return (
        f"WARNING: the classes are numbers in the order of text: output 0, 1, ... is class {few(classes, 5)}. "
        "Names of equal length (00, 01, 02) are in the order of numbers."
    )


def _are_numbers(labels: Sequence[str]) -> bool:
    return all(label.isascii() and label.isdigit() for label in labels)


def _unpadded(label: str) -> str:
    return label.lstrip("0") or "0"


def check_single_samples(config: Config, classes: int) -> None:
    """Raise `ConfigError` when the model cannot take batch-norm statistics of one image: some layer sees one pixel."""
    network = _network(config, classes).to("meta").train()
    try:
        network(torch.empty(1, 3, config.data.image_size, config.data.image_size, device="meta"))
    except ValueError:
        size = config.data.image_size
        if config.batch.size == 1:
            raise ConfigError(
                f"batch.size=1: an update of one image has no variance for batch norm where {config.model.name} is "
                f"down to one pixel (data.image_size={size}); use at least 2."
            ) from None
        raise ConfigError(
            f"model.ghost_batch={config.model.ghost_batch}: a ghost batch of one image has no variance where "
            f"{config.model.name} is down to one pixel (data.image_size={size}); use at least 2."
        ) from None


def _network(config: Config, outputs: int) -> nn.Module:
    return build_model(
        config.model.name,
        num_classes=outputs,
        ghost_batch=filled(config.model.ghost_batch),
        zero_gamma=filled(config.model.zero_gamma),
    )


# Classes of torch.optim that cannot train these networks, with or without LARS.
_UNFIT = {
    "LBFGS": "it evaluates the loss again within its step, which a trainer of one pass per update does not do",
    "Muon": "it takes matrices only, and these networks are made of convolutions",
    "SparseAdam": "it takes sparse gradients only, and these networks have dense ones",
}
_OURS = ("params", "lr", "momentum", "nesterov", "weight_decay")


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    """The optimizer over `model`'s parameters, its lr at the config's peak.

    Raises `ConfigError` for a class that torch.optim does not have and for keywords that it does not take, or not on
    the parameters' device.
    """
    if config.kwargs.get("capturable") and any(parameter.device.type == "cpu" for parameter in model.parameters()):
        raise ConfigError("optimizer.kwargs.capturable=true: it is for CUDA, and this run is on the CPU; drop it.")
    return _optimizer(config, model)


def _optimizer(config: OptimizerConfig, model: nn.Module) -> Optimizer:
    leave_compiler_out()
    base_class = optimizer_class(config.base)
    keywords = _keywords(config, base_class)
    adapt = config.name == "sgd" or config.adapt_norm_bias is not False
    groups = parameter_groups(model, filled(config.weight_decay), filled(config.decay_norm_bias), adapt)
    try:
        base: Optimizer = base_class(groups, lr=filled(config.lr), **keywords)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer.base={config.base} refuses its keywords: {error}") from None
    if config.name == "sgd":
        return base
    try:
        return LARS(base, **lars_keywords(config), record=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.base={config.base}: {error}") from None


def build_trainer(
    config: Config,
    plan: Plan,
    network: nn.Module,
    schedule: Callable[[int], float],
    context: RankContext,
) -> Trainer:
    """Return the trainer of `network`, which is on the context's device, with the config's optimizer. Collective."""
    return Trainer(
        network,
        build_optimizer(config.optimizer, network),
        plan,
        Hyper(schedule, filled(config.label_smoothing), config.guard.max_loss),
        context,
        compiled=config.compile,
        bucket_mb=config.distributed.bucket_mb,
        compression=config.gradient_compression,
    )


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise `ConfigError` if `build_optimizer` would, without a model and its device."""
    _optimizer(config, nn.Linear(1, 1))


def optimizer_class(name: str) -> Any:
    """The class of torch.optim called `name`. Raises `ConfigError`."""
    choices = sorted(
        key
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer and key not in _UNFIT
    )
    if name in _UNFIT:
        raise ConfigError(f"optimizer.base={name}: {_UNFIT[name]}; choose another of {', '.join(choices)}.")
    if name not in choices:
        raise ConfigError(
            f"optimizer.base={name}: torch.optim has no such class; it has {', '.join(choices)}."
            f"{did_you_mean(name, choices)}"
        )
    return getattr(torch.optim, name)


def _keywords(config: OptimizerConfig, base_class: Any) -> dict[str, Any]:
    known = inspect.signature(base_class).parameters
    keywords = dict(config.kwargs)
    for key in keywords:
        if key in _OURS:
            raise ConfigError(f"optimizer.kwargs.{key}: use optimizer.{key} for it.")
        if key not in known:
            raise ConfigError(
                f"optimizer.kwargs.{key}: torch.optim.{config.base} has no such keyword.{did_you_mean(key, known)}"
            )
        if wanted := _wanted(keywords[key], known[key]):
            raise ConfigError(
                f"optimizer.kwargs.{key}={keywords[key]}: torch.optim.{config.base} takes {wanted} (its default: "
                f"{known[key].default})."
            )
    # Lists of YAML stand for the tuples that torch wants (betas).
    keywords = {k: tuple(v) if isinstance(v, list) else v for k, v in keywords.items()}
    if config.momentum is not None:
        if "momentum" not in known:
            raise ConfigError(f"optimizer.momentum={config.momentum}: torch.optim.{config.base} has no momentum.")
        keywords["momentum"] = config.momentum
    if config.nesterov is not None:
        if "nesterov" not in known:
            raise ConfigError(f"optimizer.nesterov={config.nesterov}: torch.optim.{config.base} has no such momentum.")
        keywords["nesterov"] = config.nesterov
    return keywords


def _wanted(value: Any, keyword: inspect.Parameter) -> str:
    """What `keyword` takes, judged by its default, where that is not what `value` is; else an empty string."""
    default = keyword.default
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        return "" if _is_number(value) else "a number"
    if isinstance(default, tuple):
        fits = isinstance(value, list) and len(value) == len(default)
        fits = fits and all(_is_number(v) or (v is None and d is None) for v, d in zip(value, default, strict=True))
        return "" if fits else f"a list of {len(default)} numbers"
    takes_text = "str" in str(keyword.annotation)
    return "null, true or false" if isinstance(value, str | list | dict) and not takes_text else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX
