"""Train lightly's SimCLR with LARS on generated images. Needs lightly. Takes a minute on a CPU.

python examples/simclr_lightly.py
"""

import torch
import torchvision
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn
from torch.utils.data import DataLoader
from torch_lars import LARS, WarmupCosine, parameter_groups, scaled_lr

BATCH, EPOCHS, SIZE = 64, 3, 32
torch.manual_seed(0)
transform = SimCLRTransform(input_size=SIZE, cj_strength=0.5, gaussian_blur=0.0)
images = torchvision.datasets.FakeData(256, (3, SIZE, SIZE), transform=transform)
loader = DataLoader(images, BATCH, shuffle=True, drop_last=True)
backbone = torchvision.models.resnet18()
backbone.fc = nn.Identity()
model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))
criterion = NTXentLoss(temperature=0.5)

# LARS neither decays nor adapts biases and normalization layers. The lr is the paper's for small batches.
lr = scaled_lr(0.075, BATCH, rule="sqrt", base_batch=1)
optimizer = LARS(torch.optim.SGD(parameter_groups(model, weight_decay=1e-6), lr=lr, momentum=0.9))
updates = len(loader) * EPOCHS
scheduler = WarmupCosine(optimizer, warmup=updates // 10, total=updates)

for epoch in range(EPOCHS):
    total = 0.0
    for (one, other), _ in loader:
        loss = criterion(model(one), model(other))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item()
    print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}, lr {scheduler.get_last_lr()[0]:.3f}")
