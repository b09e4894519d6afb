"""Train a small network with LARS in a plain loop, with warm-up and cosine per update. Runs in seconds on a CPU.

python examples/plain_loop.py
"""

import torch
from torch import nn
from torch_lars import LARS, WarmupCosine, parameter_groups, scaled_lr

BATCH, EPOCHS, CLASSES = 256, 4, 10
torch.manual_seed(0)
images = torch.randn(2048, 1, 8, 8)
labels = (images.flatten(1) @ torch.randn(64, CLASSES)).argmax(1)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 6 * 6, CLASSES)
)

# Biases and normalization layers are neither decayed nor adapted, and have an lr of 0.1.
lr = scaled_lr(8.0, BATCH)
groups = parameter_groups(model, weight_decay=1e-4, lr=lr, norm_bias_lr_factor=0.1 / lr)
optimizer = LARS(torch.optim.SGD(groups, lr=lr, momentum=0.9))
updates = len(images) // BATCH * EPOCHS
scheduler = WarmupCosine(optimizer, warmup=updates // 10, total=updates)

for epoch in range(EPOCHS):
    for batch in torch.randperm(len(images)).split(BATCH):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    accuracy = (model(images).argmax(1) == labels).float().mean()
    print(f"epoch {epoch + 1}: loss {loss:.3f}, accuracy {accuracy:.3f}, lr {scheduler.get_last_lr()[0]:.3f}")
