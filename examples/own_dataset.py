"""Train on images of your own dataset class, and resume. Runs in seconds on a CPU.

python examples/own_dataset.py
"""

import numpy as np

from lars_train import evaluate, train


class Stripes:
    """Images of noise with bright rows (class 0), columns (class 1) or neither (class 2)."""

    classes = ("rows", "columns", "noise")

    def __init__(self, count, seed):
        draw = np.random.default_rng(seed)
        self.targets = draw.integers(0, 3, count)
        self.images = draw.integers(0, 160, (count, 16, 16, 3), dtype=np.uint8)
        self.images[self.targets == 0, ::4] += 80
        self.images[self.targets == 1, :, ::4] += 80

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


if __name__ == "__main__":
    settings = "run.name=stripes model=tiny data.image_size=16 data.augment=pad_crop data.eval_crop=1 data.flip=false "
    settings += "batch.size=64 model.ghost_batch=32 optimizer=sgd optimizer.lr=0.1 schedule.warmup_epochs=1 epochs=4"
    data = Stripes(512, seed=0), Stripes(128, seed=1)
    # With `resume=never`, an earlier run of this script is moved aside.
    train(*settings.split(), "max_updates=20", "resume=never", data=data)
    result = train(*settings.split(), data=data)
    values = evaluate("checkpoint.path=runs/stripes", data=data)
    print(
        f"{result['updates']} updates, top-1 {result['final_top1']:.1f} %, evaluated again: {values['val/top1']:.1f} %"
    )
