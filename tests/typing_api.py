"""The types of the public API. mypy checks this file; no test runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from typing_extensions import assert_type

import lars_train
from lars_train import (
    LARS,
    ConfigError,
    DataError,
    Diverged,
    Stopped,
    WarmupCosine,
    WarmupPoly,
    WarmupSteps,
    evaluate,
    learning_rate,
    parameter_groups,
    plan,
    scaled_lr,
    split_parameters,
    train,
)

model = nn.Linear(3, 2)
images: list[tuple[Tensor, int]] = [(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)]
make: Callable[[int], nn.Module] = lambda classes: nn.Linear(3, classes)  # noqa: E731

assert_type(lars_train.__version__, str)
assert_type(train("batch.size=8", "optimizer.lr=1", model=model, data=(images, images)), dict[str, Any])
assert_type(train(model=make, data="my_code:sets"), dict[str, Any])
assert_type(evaluate(model="my_code:Net", data=(images, images)), dict[str, Any])
assert_type(plan("batch=8k"), dict[str, Any])
try:
    train()
except ConfigError as bad_input:
    assert_type(bad_input, ConfigError)
except (DataError, Diverged) as failure:
    assert_type(failure, DataError | Diverged)
except Stopped as stopped:
    assert_type(stopped.code, int)

weights, rest = split_parameters(model)
assert_type(weights, list[nn.Parameter])
assert_type(rest, list[nn.Parameter])
groups = parameter_groups(model, weight_decay=1e-4)
assert_type(groups, list[dict[str, Any]])
optimizer = LARS(SGD(groups, lr=0.1, momentum=0.9))
base: Optimizer = optimizer
assert_type(LARS.preset("mlperf", SGD(groups, lr=0.1)), LARS)
assert_type(learning_rate(0, total=10, warmup=2, base=4.0, power=2.0, form="whole"), float)
assert_type(scaled_lr(0.1, 512), float)
assert_type(WarmupCosine(optimizer, warmup=1, total=10), WarmupCosine)
assert_type(WarmupPoly(optimizer, warmup=1, total=10, power=2.0, form="whole"), WarmupPoly)
assert_type(WarmupSteps(optimizer, warmup=1, steps=[5, 8]), WarmupSteps)
