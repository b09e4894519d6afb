"""LARS over SGD on the CPU does not import torch's compiler."""

from __future__ import annotations

import subprocess
import sys

STEPS = """
import sys
import torch
from torch import nn
from lars_train.config import OptimizerConfig
from lars_train.training.assemble import build_optimizer

model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
flags = {"decay_norm_bias": True, "adapt_norm_bias": True}
config = OptimizerConfig(name="lars", base="SGD", lr=0.5, momentum=0.9, weight_decay=1e-4, **flags)
optimizer = build_optimizer(config, model)
for _ in range(2):
    model(torch.ones(2, 3, 5, 5)).square().sum().backward()
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert any((a != b).any() for a, b in zip(before, model.parameters()))
sys.exit("torch._dynamo" in sys.modules)
"""


def test_a_step_and_a_state_dict_do_not_import_torchs_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "torch._dynamo was imported"
