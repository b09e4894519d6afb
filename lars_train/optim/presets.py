"""LARS as others compute it, by name: what `LARS.preset` takes its options from.

Learning rate, momentum and weight decay are the base optimizer's (torch's SGD in all of these); parameters
that a rule leaves out belong in groups with ``exclude=True``, as each entry says.
"""

from __future__ import annotations

from typing import Any, Final

# What an option is where a preset does not name it; the same as the defaults of `LARS`.
DEFAULTS: Final[dict[str, Any]] = {
    "eps": 1e-8,
    "trust_coef": 0.001,
    "denominator": "split",
    "clip": None,
    "zero_norm": "decay",
    "zero_decay": "adapt",
    "weight_decay": "coupled",
    "ratio_placement": "inside",
    "lr_placement": "outside",
    "clamp": None,
}

PRESETS: Final[dict[str, dict[str, Any]]] = {
    # https://github.com/kakaobrain/torchlars: the defaults of `LARS`.
    "torchlars": {},
    # https://github.com/mlcommons/training, image_classification/tensorflow2/lars_optimizer.py. Batch norm and
    # biases: exclude=True, weight_decay=0. An epsilon of 0 there means Keras's own, 1e-7.
    "mlperf": {"eps": 1e-7, "lr_placement": "inside"},
    # https://github.com/huggingface/pytorch-image-models, timm/optim/lars.py; always_adapt=True there is
    # zero_decay="adapt" here, trust_clip=True is clip="lr".
    "timm": {"zero_decay": "skip"},
    # https://github.com/NVIDIA/apex, apex/parallel/LARC.py (gone since 2025), with its default clip=True;
    # clip=False there is clip=None here.
    "larc": {"trust_coef": 0.02, "clip": "lr", "zero_norm": "skip"},
    # https://github.com/google-deepmind/optax, optax.lars; its trust_ratio_mask and weight_decay_mask are groups.
    "optax": {"eps": 0.0, "denominator": "combined", "lr_placement": "inside"},
    # https://github.com/NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch, lars.py. Batch norm and biases: exclude=True,
    # weight_decay=0; it clamps the elements of their gradients to [-10, 10] too, which is left out here.
    "nus-hpc": {"eps": 1e-5, "clip": (0.0, 50.0), "ratio_placement": "outside", "clamp": 10.0},
    # https://pypi.org/project/open-lars 0.1.1. Vectors: exclude=True.
    "open-lars": {"lr_placement": "inside"},
    # https://pypi.org/project/torch-optimizer 0.3.0, LARS.
    "torch-optimizer": {"trust_coef": 0.01, "zero_norm": "skip", "zero_decay": "skip"},
    # https://pypi.org/project/pytorch-optimizer 4.1.0, LARS. Vectors: exclude=True, weight_decay=0. Where only the
    # gradient is zero its ratio is trust_coef / wd, here 1.
    "pytorch-optimizer": {"eps": 0.0},
}
