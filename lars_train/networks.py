"""Make a run's network (built-in, timm's or the user's own) from its config, and check that it fits the run.

All checks run on the CPU, before a run touches its device.
"""

from __future__ import annotations

import copy
import functools
import importlib
import random
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lars_train.config import Config, filled
from lars_train.config.network import BUILTIN, TIMM, ModelConfig, describe_network
from lars_train.data.transforms import TrainingSizes
from lars_train.errors import ConfigError, did_you_mean
from lars_train.given import NOTHING, Given
from lars_train.messages import counted
from lars_train.models.batchnorm import GhostBatchNorm2d
from lars_train.models.convert import freeze, head_layer, use_ghost_batch_norm
from lars_train.models.factory import build_model
from lars_train.models.fused_blocks import fuse_blocks
from lars_train.models.weight_files import few
from lars_train.models.weights import load_weights
from lars_train.targets import describe_failure, load_target

# Keywords of timm's create_model that this program sets, or that read files.
_OWN_KEYWORDS = {
    "num_classes": "the data set determines the number of classes",
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
        "download the weights, and set model.weights=FILE",
    ),
}
# Images of a pass that checks a network: batch norm needs two.
_CHECKED = 2


def build_network(config: Config, outputs: int, given: Given = NOTHING) -> nn.Module:
    """Return the network for this number of `outputs`, newly initialized, on the CPU, with ghost batch norm.

    Raises `ConfigError` if it cannot be made, or has batch norm that cannot become ghost batch norm.
    """
    model = config.model
    if given.network is not None:
        network = given.network(outputs)
    elif model.source == BUILTIN:
        network = build_model(
            model.name,
            num_classes=outputs,
            ghost_batch=filled(model.ghost_batch),
            zero_gamma=filled(model.zero_gamma),
            blurpool=bool(model.blurpool),
        )
    else:
        network = _timm_network(model, outputs) if model.source == TIMM else _custom_network(model, outputs)
    builtin = given.network is None and model.source == BUILTIN
    if not builtin and any(is_lazy(value) or value.is_meta for value in (*network.parameters(), *network.buffers())):
        raise ConfigError(
            f"model {describe_network(model)}: it has parameters without values (a lazy module, or the meta device). "
            "Create them with their sizes, or run a pass before the module is returned."
        )
    use_ghost_batch_norm(network, filled(model.ghost_batch))
    fuse_blocks(network)
    return network


def _timm_network(model: ModelConfig, outputs: int) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise ConfigError("model=timm: timm is not installed; install it with: pip install 'timm>=1.0.20'") from None
    # timm ignores the text after a dot, which would become part of file names.
    if not re.fullmatch(r"[\w.-]+", model.name) or not timm.is_model(model.name):
        raise ConfigError(
            f"model.name={model.name}: timm {timm.__version__} has no such network; timm.list_models() lists them."
            f"{did_you_mean(model.name, timm.list_models())}"
        )
    for key in model.kwargs:
        if key in _OWN_KEYWORDS:
            raise ConfigError(f"model.kwargs.{key}: omit it; {_OWN_KEYWORDS[key]}.")
    try:
        network: nn.Module = timm.create_model(model.name, num_classes=outputs, **copy.deepcopy(model.kwargs))
    except Exception as error:  # the keywords are the user's, and reach any of timm's code
        raise ConfigError(
            f"model.name={model.name}: timm's create_model with {_call(model, outputs)} fails{describe_failure(error)}"
        ) from error
    return network


def _custom_network(model: ModelConfig, outputs: int) -> nn.Module:
    make = load_target(str(model.target), "model.target")
    try:
        network = make(num_classes=outputs, **copy.deepcopy(model.kwargs))
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(
            f"model.target={model.target}: the call with {_call(model, outputs)} fails{describe_failure(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"model.target={model.target}: it returns a {type(network).__name__}, not a torch.nn.Module.")
    return network


def _call(model: ModelConfig, outputs: int) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in {"num_classes": outputs, **model.kwargs}.items())


def make_network(config: Config, classes: Sequence[str] | int, given: Given = NOTHING) -> nn.Module:
    """Return the config's network for `classes`, on the CPU, with the weights of ``model.weights`` or new ones.

    The parameters of ``model.freeze`` are frozen. `classes`: the class names, which are compared with those of the
    weights file, or the number of classes.
    """
    return start_network(config, classes, given)[0]


def start_network(
    config: Config, classes: Sequence[str] | int, given: Given = NOTHING
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network of `make_network`, and messages to the user about the weights file."""
    names = None if isinstance(classes, int) else classes
    model = config.model
    notes: tuple[str, ...] = ()
    network = build_network(config, classes if isinstance(classes, int) else len(classes), given)
    if model.new_head:
        head_layer(network, classes if isinstance(classes, int) else len(classes), "model.new_head=true")
    if model.weights is not None:
        # Compare the network's name with the file's for built-in networks only. Two of them, tiny and small, have
        # tensors of the same shapes.
        name = model.name if model.source == BUILTIN and given.network is None else None
        notes = load_weights(network, model.weights, name=name, classes=names, new_head=model.new_head)
    freeze(network, model.freeze)
    return network, notes


def check_single_samples(config: Config, classes: int) -> None:
    """Raise `ConfigError` if a network of this package reduces an image to one pixel before a batch-norm layer.

    Call this for (ghost) batches of one image: the layer would then have one value per channel, which has no variance.
    """
    sizes = TrainingSizes.from_config(config.data)
    network, size = build_network(config, classes).to("meta").train(), min(sizes.start, sizes.end)
    try:
        network(torch.empty(1, 3, size, size, device="meta"))
    except ValueError:
        key = "batch.size=1" if config.batch.size == 1 else f"model.ghost_batch={config.model.ghost_batch}"
        raise ConfigError(
            f"{key}: {config.model.name} reduces images of {size} pixels to one pixel each, where batch norm needs "
            "more than one image; use at least 2."
        ) from None


def check_fit(network: nn.Module, config: Config, classes: int) -> bool:
    """Check with two images that `network` fits the run. Return True if training draws random numbers.

    The network stays unchanged, as do torch's random generators. Raises `ConfigError` unless the network maps images of
    the run's sizes to (n, `classes`) logits, with a gradient for each trainable parameter, and changes only the
    statistics of batch norm.
    """
    where, sizes = f"model {describe_network(config.model)}", TrainingSizes.from_config(config.data)
    network = copy.deepcopy(network).float()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    faulty = [name for name, value in before.items() if not value.isfinite().all()]
    if faulty:
        raise ConfigError(f"{where}: {counted(len(faulty), 'tensor')} with non-finite values: {few(faulty)}.")
    for name, layer in network.named_modules():
        if isinstance(layer, GhostBatchNorm2d):
            layer.register_forward_pre_hook(functools.partial(_check_samples, f"{where}: its layer {name}"))
    with torch.random.fork_rng(devices=[]):
        state, others = torch.get_rng_state(), _other_generators()
        for size in {sizes.start, sizes.end}:
            logits = _checked_pass(network.train(), size, classes, where)
            if not logits.requires_grad:
                raise ConfigError(f"{where}: its logits do not depend on a trainable parameter, so it cannot learn.")
            torch.autograd.backward(logits.sum())
        if _other_generators() != others:
            raise ConfigError(
                f"{where}: a training pass draws from Python's or NumPy's random generator, which a resumed run could "
                "not repeat; draw from torch's generator (torch.rand)."
            )
        draws = not torch.equal(state, torch.get_rng_state())
        with torch.no_grad():
            _checked_pass(network.eval(), filled(config.data.image_size), classes, where)
    after = network.state_dict()
    changed = [name for name, value in before.items() if name in after and not torch.equal(value, after[name])]
    if changed:
        raise ConfigError(
            f"{where}: a training pass changes {changed[0]}, which would then differ between the ranks; only the "
            "statistics of batch norm are kept equal."
        )
    unused = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        raise ConfigError(
            f"{where}: the logits do not depend on {counted(len(unused), 'parameter')} ({few(unused)}); remove them "
            "from the network, or freeze them with model.freeze."
        )
    return draws


def _other_generators() -> tuple[object, ...]:
    """Return the states of Python's and NumPy's global generators, which can be compared."""
    _, key, *position = np.random.get_state(legacy=True)
    return random.getstate(), np.asarray(key).tobytes(), position


def check_logits(network: nn.Module, config: Config, outputs: int) -> None:
    """Raise `ConfigError` unless `network`, in evaluation mode, maps images to (n, `outputs`) logits."""
    with torch.no_grad():
        _checked_pass(
            network.eval(), filled(config.data.image_size), outputs, f"model {describe_network(config.model)}"
        )


def _checked_pass(network: nn.Module, size: int, outputs: int, where: str) -> Tensor:
    try:
        logits = network(torch.zeros(_CHECKED, 3, size, size))
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(
            f"{where}: a pass of {_CHECKED} images of {size} x {size} pixels fails{describe_failure(error)}"
        ) from error
    found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if not isinstance(logits, Tensor) or logits.shape != (_CHECKED, outputs):
        raise ConfigError(
            f"{where}: for {_CHECKED} images it returns {found}; it must return their logits, ({_CHECKED}, {outputs}) "
            f"for {counted(outputs, 'class', 'classes')}."
        )
    return logits


def _check_samples(where: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if len(inputs[0]) != _CHECKED:
        raise ConfigError(
            f"{where} gets {len(inputs[0])} rows for {_CHECKED} images, so ghost batches would not consist of images; "
            "use a normalization that does not depend on the batch."
        )
