"""Train a small network with LARS in a LightningModule. Needs lightning. Runs in seconds on a CPU.

python examples/lightning_module.py
"""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch_lars import LARS, WarmupCosine, parameter_groups, scaled_lr

BATCH, EPOCHS, CLASSES = 256, 4, 10


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, CLASSES))

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        lr = scaled_lr(8.0, BATCH)
        groups = parameter_groups(self, weight_decay=1e-4, lr=lr, norm_bias_lr_factor=0.1 / lr)
        optimizer = LARS(torch.optim.SGD(groups, momentum=0.9))
        updates = int(self.trainer.estimated_stepping_batches)
        scheduler = WarmupCosine(optimizer, warmup=updates // 10, total=updates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


lightning.seed_everything(0)
images = torch.randn(2048, 64)
labels = (images @ torch.randn(64, CLASSES)).argmax(1)
trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(Classifier(), DataLoader(TensorDataset(images, labels), BATCH, shuffle=True))
print(f"loss {trainer.callback_metrics['loss']:.3f}")
