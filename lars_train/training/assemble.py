"""Build the network to evaluate, the optimizer and the trainer from a config."""

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
from lars_train.config.network import BUILTIN
from lars_train.data.sources.imagenet import wnids
from lars_train.errors import ConfigError, did_you_mean
from lars_train.given import NOTHING, Given
from lars_train.models.convert import find_head
from lars_train.models.cuda_graphs import CudaRecorder
from lars_train.models.ema import ExponentialMovingAverage, choose_weights
from lars_train.models.losses import TrainingLoss
from lars_train.models.weight_files import HEAD, Weights, few, read_weights
from lars_train.models.weights import check_blurpool, check_finite, check_name, head_prefix, keep_outputs, load_state
from lars_train.networks import build_network, check_logits
from lars_train.optim.eager import avoid_dynamo_import
from lars_train.optim.lars import LARS
from lars_train.optim.param_groups import parameter_groups
from lars_train.run_plan import Plan
from lars_train.training import checkpoint
from lars_train.training.device_prefetch import RankContext
from lars_train.training.metrics import LR_FACTOR
from lars_train.training.trainer import Hyper, Trainer

ALL, SUBSET = "all", "subset"
"""Values of `evaluate.outputs`: the outputs among which evaluation predicts."""


@dataclass(frozen=True)
class EvaluatedNetwork:
    """A network to evaluate, and the meaning of its outputs."""

    network: nn.Module
    """The network. Its first outputs are the data set's classes, in the order of the data set."""
    classes: tuple[str, ...]
    """The class of each output."""
    trained: int
    """The number of outputs during training. `network` may have fewer."""
    notes: tuple[str, ...]
    """Messages to the user about how the classes were matched."""


def network_to_evaluate(
    config: Config,
    content: dict[str, Any] | None,
    classes: Sequence[str],
    numbers: Sequence[int] = (),
    given: Given = NOTHING,
) -> EvaluatedNetwork:
    """Return the network of the checkpoint `content`, or of ``model.weights``, for a data set with these `classes`.

    The data set may have all classes of the network or a subset, in any order. With ``evaluate.outputs=subset`` the
    returned network has only the outputs of `classes`; with ``all`` the other outputs follow. `numbers`: see
    `match_classes`. Raises `ConfigError` for a class that the network does not have.
    """
    builtin = config.model.source == BUILTIN and given.network is None
    # The code of other networks may depend on the values of tensors, which the meta device does not have.
    with torch.device("meta" if builtin else "cpu"):
        expected = None if builtin and config.model.weights is None else build_network(config, 1, given)
    head = HEAD if expected is None else head_prefix(expected)
    if config.model.weights is not None:
        assert expected is not None
        weights = read_weights(config.model.weights, expected.state_dict(), head)
        check_finite(weights)
    elif content is None:
        # A network that a Python program passes has its own weights, for the data set's classes.
        weights = Weights("model", build_network(config, len(classes), given).state_dict(), tuple(classes), head=head)
    else:
        name = checkpoint.value(content, "config", "model", "name")
        state, average = choose_weights(content, config.evaluate.ema, "evaluate.ema")
        note = "NOTE: this evaluates the average of the weights (model.ema); evaluate.ema=false evaluates the weights."
        weights = Weights(
            f"checkpoint.path={config.checkpoint.path}",
            state,
            tuple(content["classes"]),
            name,
            notes=(note,) if average else (),
            blurpool=bool(content["config"]["model"].get("blurpool")),
            head=head,
        )
    check_name(weights, config.model.name if builtin else None)
    trained = weights.outputs
    network = build_network(config, trained or len(classes), given)
    check_blurpool(weights, network)
    load_state(network, weights.state, weights.origin)
    names, rows, notes = match_classes(weights, classes, numbers)
    if config.evaluate.outputs == ALL:
        chosen = set(rows)
        rows = [*rows, *(row for row in range(trained) if row not in chosen)]
    keep_outputs(network, rows, trained)
    if not builtin:
        check_logits(network, config, len(rows))
    return EvaluatedNetwork(
        network, (*classes, *(names[row] for row in rows[len(classes) :])), trained, weights.notes + notes
    )


def match_classes(
    weights: Weights, classes: Sequence[str], numbers: Sequence[int] = ()
) -> tuple[Sequence[str], list[int], tuple[str, ...]]:
    """Match a data set's `classes` to the outputs of a network, by the first of these rules that applies:

    1. By name. 1,000 outputs without names get ImageNet's names if ImageNet has all of `classes`.
    2. By number, ignoring leading zeros, if all names on both sides are numbers.
    3. By index: each class is the index of an output. The indices are `numbers` (the labels in the data set's files)
       or, if `numbers` is empty, the names in `classes`. They must be different whole numbers below the number of
       outputs. This rule does not apply if the network has one of the names in `classes`, or if all names on both sides
       are numbers.
    4. In order, if the outputs have no names and there are as many as `classes`.

    Return a name for each output, the output of each of `classes`, and messages to the user about the match. Raises
    `ConfigError` if no rule applies.
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
        by_number = {}  # the network has both 1 and 01
    if numeric:
        found = [by_number[_unpadded(label)] for label in classes if _unpadded(label) in by_number]
        if len({*found}) == len(classes):
            pairs = zip(classes, (own[row] for row in found), strict=True)
            shown = "; ".join([f"{label} is {name}" for label, name in pairs if label != name][:3])
            return own, found, (f"NOTE: classes are matched by number, ignoring leading zeros: {shown}.",)
    outputs = names or [f"output {row}" for row in range(count)]
    rows = list(numbers) or [int(label) if label.isascii() and label.isdigit() else count for label in classes]
    # If the network's classes are numbers too, a number is not an index: in the order 0, 1, 10, 11, 2, output 2 is 10.
    indices = not numeric and index.keys().isdisjoint(classes)
    if indices and max(rows) < count and len({*rows}) == len(rows):
        shown = "; ".join(
            f"{label}{f' ({row})' if numbers and label != str(row) else ''} is {outputs[row]}"
            for label, row in list(zip(classes, rows, strict=True))[:3]
        )
        note = f"WARNING: the data set's classes are numbers, used as indices of the model's outputs: {shown}."
        return outputs, rows, (note,)
    if names is None and len(classes) == count:
        warning = text_order(classes)
        return classes, list(range(count)), () if warning is None else (warning,)
    if names is None:
        raise ConfigError(
            f"{weights.origin}: the network has {count:,} outputs, the data set has {len(classes):,} classes, and the "
            "file does not name the classes of the outputs. Name the folders by the numbers of the outputs (from 0), "
            "or use a file with class names, such as one that mode=export writes."
        )
    unknown = [label for label in classes if label not in index]
    unknown = [label for label in unknown if _unpadded(label) not in by_number] or unknown
    raise ConfigError(
        f"{weights.origin}: {len(unknown):,} of the data set's {len(classes):,} classes are not among the model's "
        f"{count:,}: {few(unknown, 5)}; the model has {few(names)}. Choose the data set that the model was trained on, "
        "or give the folders the names of the model's classes."
    )


def text_order(classes: Sequence[str]) -> str | None:
    """Return a warning if `classes` are numbers in text order (0, 1, 10, 11, 2), else None."""
    if not _are_numbers(classes) or list(classes) == sorted(classes, key=int):
        return None
    return (
        f"WARNING: the classes are numbers in text order: outputs 0, 1, ... are the classes {few(classes, 5)}. For "
        "numeric order, give all names the same length (00, 01, 02)."
    )


def _are_numbers(labels: Sequence[str]) -> bool:
    return all(label.isascii() and label.isdigit() for label in labels)


def _unpadded(label: str) -> str:
    return label.lstrip("0") or "0"


# Classes of torch.optim that cannot train these networks, with or without LARS.
_UNSUPPORTED = {
    "LBFGS": "it evaluates the loss repeatedly within a step, but lars-train makes one pass per update",
    "Muon": "it supports only matrices, but these networks consist of convolutions",
    "SparseAdam": "it supports only sparse gradients, but these networks have dense ones",
}
# Keywords that have their own config keys.
_OWN_KEYS = ("params", "lr", "momentum", "nesterov", "weight_decay")


def build_optimizer(config: OptimizerConfig, model: nn.Module, head_lr: float | None = None) -> Optimizer:
    """Return the optimizer of `model`'s parameters that are not frozen, with the config's peak lr.

    With `head_lr`, the groups of the last layer have it as ``lr_factor``. Raises `ConfigError` for a class that is not
    in torch.optim, and for keywords that the class, or the parameters' device, does not support.
    """
    if config.kwargs.get("capturable") and any(parameter.device.type == "cpu" for parameter in model.parameters()):
        raise ConfigError("optimizer.kwargs.capturable=true: it needs CUDA, but this run is on the CPU; omit it.")
    return _optimizer(config, model, head_lr)


def _optimizer(config: OptimizerConfig, model: nn.Module, head_lr: float | None = None) -> Optimizer:
    avoid_dynamo_import()
    base_class = optimizer_class(filled(config.base))
    keywords = _keywords(config, base_class)
    adapt = config.name != "lars" or config.adapt_norm_bias is not False
    groups = _trained(
        parameter_groups(model, filled(config.weight_decay), filled(config.decay_norm_bias), adapt), model, head_lr
    )
    try:
        base: Optimizer = base_class(groups, lr=filled(config.lr), **keywords)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer.base={config.base} rejects its keywords: {error}") from None
    if config.name != "lars":
        return base
    try:
        return LARS(base, **lars_keywords(config), record=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.base={config.base}: {error}") from None


def _trained(groups: list[dict[str, Any]], model: nn.Module, head_lr: float | None) -> list[dict[str, Any]]:
    """Return `groups` without frozen parameters, and the last layer's parameters in groups with ``lr_factor``."""
    head = set() if head_lr is None else {*map(id, model.get_submodule(find_head(model) or "").parameters())}
    found = []
    for group in groups:
        body, last = (
            [p for p in group["params"] if p.requires_grad and (id(p) in head) is in_head] for in_head in (False, True)
        )
        found.append({**group, "params": body})
        found.append({**group, "params": last, "name": f"{group['name']}_head", LR_FACTOR: head_lr})
    return [group for group in found if group["params"]]


def build_trainer(
    config: Config,
    plan: Plan,
    network: nn.Module,
    schedule: Callable[[int], float],
    context: RankContext,
    *,
    draws: bool = False,
) -> Trainer:
    """Return a trainer for `network`, which must be on the context's device. Collective.

    `draws`: the network draws random numbers in training.
    """
    return Trainer(
        network,
        build_optimizer(config.optimizer, network, config.model.head_lr),
        plan,
        Hyper(
            schedule,
            _training_loss(config),
            config.guard.max_loss,
            config.optimizer.clip_grad_norm,
            config.seed if draws else None,
        ),
        context,
        ema=None
        if config.model.ema is None
        else ExponentialMovingAverage(network, config.model.ema, config.model.ema_start),
        compiled=config.compile,
        recorder=CudaRecorder(context.device) if config.cuda_graphs else None,
        bucket_mb=config.distributed.bucket_mb,
        compression=config.gradient_compression,
    )


def _training_loss(config: Config) -> TrainingLoss:
    return TrainingLoss(filled(config.label_smoothing), filled(config.loss), config.bce_threshold or 0.0)


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise the errors of `build_optimizer` that do not depend on the model and its device."""
    _optimizer(config, nn.Linear(1, 1))


def optimizer_class(name: str) -> Any:
    """Return the class of torch.optim called `name`. Raises `ConfigError`."""
    choices = sorted(
        key
        for key, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, Optimizer)
        and value is not Optimizer
        and key not in _UNSUPPORTED
    )
    if name in _UNSUPPORTED:
        raise ConfigError(f"optimizer.base={name}: {_UNSUPPORTED[name]}; choose another of {', '.join(choices)}.")
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
        if key in _OWN_KEYS:
            raise ConfigError(f"optimizer.kwargs.{key}: use optimizer.{key} instead.")
        if key not in known:
            raise ConfigError(
                f"optimizer.kwargs.{key}: torch.optim.{config.base} has no such keyword.{did_you_mean(key, known)}"
            )
        if expected := _expected(keywords[key], known[key]):
            raise ConfigError(
                f"optimizer.kwargs.{key}={keywords[key]}: torch.optim.{config.base} takes {expected} (default: "
                f"{known[key].default})."
            )
    # YAML has lists where torch requires tuples (betas).
    keywords = {k: tuple(v) if isinstance(v, list) else v for k, v in keywords.items()}
    if config.momentum is not None:
        if "momentum" not in known:
            raise ConfigError(f"optimizer.momentum={config.momentum}: torch.optim.{config.base} has no momentum.")
        keywords["momentum"] = config.momentum
    if config.nesterov is not None:
        if "nesterov" not in known:
            raise ConfigError(
                f"optimizer.nesterov={config.nesterov}: torch.optim.{config.base} has no Nesterov momentum."
            )
        keywords["nesterov"] = config.nesterov
    return keywords


def _expected(value: Any, keyword: inspect.Parameter) -> str:
    """Return the kind of value that `keyword` needs, inferred from its default, or an empty string if `value` fits."""
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
