"""Train a small Vision Transformer with LARS in Hugging Face's Trainer. Needs transformers and accelerate.

python examples/hf_trainer.py
"""

import tempfile

import torch
from torch_lars import LARS, WarmupCosine, parameter_groups, scaled_lr
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

BATCH, EPOCHS, CLASSES = 256, 4, 4
torch.manual_seed(0)
images = torch.randn(2048, 1, 8, 8)
labels = (images.flatten(1) @ torch.randn(64, CLASSES)).argmax(1)
dataset = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": CLASSES}
size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
model = ViTForImageClassification(ViTConfig(**shape, **size))

lr = scaled_lr(8.0, BATCH)
groups = parameter_groups(model, weight_decay=1e-4, lr=lr, norm_bias_lr_factor=0.1 / lr)
optimizer = LARS(torch.optim.SGD(groups, momentum=0.9))
updates = len(dataset) // BATCH * EPOCHS
scheduler = WarmupCosine(optimizer, warmup=updates // 10, total=updates)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        max_grad_norm=0,  # no clipping: LARS scales each gradient
        logging_strategy="epoch",
        report_to="none",
        use_cpu=True,
    )
    # The Trainer calls scheduler.step() after each update. Its checkpoints hold the state of both.
    Trainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, scheduler)).train()
