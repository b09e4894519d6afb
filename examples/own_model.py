"""Train a network of your own, and use its weights. Runs in seconds on a CPU.

python examples/own_model.py
"""

import torch
from torch import nn

from lars_train import train


class Net(nn.Module):
    """Two convolutions with batch norm, which becomes ghost batch norm during training."""

    def __init__(self, num_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.head = nn.Linear(32, num_classes)

    def forward(self, images):
        return self.head(self.features(images).flatten(1))


if __name__ == "__main__":
    torch.manual_seed(0)
    network = Net(num_classes=10)
    settings = "run.name=own_model data=synthetic data.train_count=1024 data.val_count=200 data.num_classes=10 "
    settings += "data.image_size=16 batch.size=128 model.ghost_batch=32 optimizer=lars optimizer.lr=2 epochs=8"
    result = train(*settings.split(), "schedule.warmup_epochs=1", model=network)
    network.eval()
    logits = network(torch.zeros(1, 3, 16, 16))
    print(f"top-1 {result['final_top1']:.1f} %, logits of a gray image: {logits.shape}")
