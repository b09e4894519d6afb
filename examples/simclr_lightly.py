"""Train a small network by SimCLR with lightly's parts and LARS. Needs lightly. Runs in half a minute on a CPU.

python examples/simclr_lightly.py
"""

import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torch_lars import LARS, WarmupCosine, parameter_groups
from torchvision.transforms.functional import to_pil_image

BATCH, EPOCHS, SIZE, LR = 64, 4, 32, 4.8  # a full run: LR = scaled_lr(0.075, BATCH, "sqrt", base_batch=1)
torch.manual_seed(0)
images = [to_pil_image(tiles) for tiles in nn.functional.interpolate(torch.rand(512, 3, 4, 4), SIZE)]
transform = SimCLRTransform(input_size=SIZE, cj_strength=0.5, gaussian_blur=0.0)
loader = DataLoader(
    images, BATCH, shuffle=True, drop_last=True, collate_fn=lambda batch: default_collate(list(map(transform, batch)))
)
layers = [nn.Conv2d(3, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), SimCLRProjectionHead(256, 256, 64))
criterion = NTXentLoss(temperature=0.1)

# LARS neither decays nor adapts biases and normalization layers.
optimizer = LARS(torch.optim.SGD(parameter_groups(model, weight_decay=1e-6), lr=LR, momentum=0.9))
updates = len(loader) * EPOCHS
scheduler = WarmupCosine(optimizer, warmup=updates // 10, total=updates)

for epoch in range(EPOCHS):
    total = 0.0
    for one, other in loader:
        loss = criterion(model(one), model(other))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total += loss.item()
    print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}, lr {scheduler.get_last_lr()[0]:.3f}")
