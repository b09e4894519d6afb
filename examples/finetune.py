"""Train a network, then fine-tune its weights for other classes: a new last layer, a frozen stem.

python examples/finetune.py
"""

from lars_train import train

RUN = "model=tiny batch.size=32 optimizer=sgd device=cpu launch.threads=1 data.workers=0 verbosity=0".split()
DATA = "data=synthetic data.image_size=16 data.train_count=320 data.val_count=80 data.augment=none".split()

first = train(*RUN, *DATA, "data.num_classes=10", "optimizer.lr=0.1", "epochs=8", "schedule.warmup_epochs=1")
print(f"10 classes: top-1 {first['best_top1']:.0f} %")

weights = f"model.weights={first['directory']}/checkpoints/best.pt"
# The new last layer learns ten times as fast as the other layers; the first convolution and its batch norm stay.
head = ["model.new_head=true", "model.head_lr=10", "model.freeze=[conv1.*,bn1.*]"]
second = train(
    *RUN, *DATA, "data.num_classes=4", weights, *head, "optimizer.lr=0.01", "epochs=4", "schedule.warmup_epochs=0"
)
print(f" 4 classes: top-1 {second['best_top1']:.0f} %")
