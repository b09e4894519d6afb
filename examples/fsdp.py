"""Train with LARS on parameters that FSDP2 shards over two processes. Runs in seconds on CPUs.

torchrun --nproc-per-node 2 examples/fsdp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch_lars import LARS, WarmupCosine, parameter_groups

BATCH, EPOCHS, CLASSES, LR = 256, 3, 10, 8.0
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # every process makes the same data and the same weights
images = torch.randn(2048, 64)
labels = (images @ torch.randn(64, CLASSES)).argmax(1)
model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, CLASSES))
fully_shard(model, mesh=init_device_mesh("cpu", (world,)))

# After fully_shard, which makes the parameters DTensors. LARS takes the norms over all shards.
groups = parameter_groups(model, weight_decay=1e-4, lr=LR, norm_bias_lr_factor=0.1 / LR)
optimizer = LARS(torch.optim.SGD(groups, momentum=0.9))
scheduler = WarmupCosine(optimizer, warmup=2, total=len(images) // BATCH * EPOCHS)

for epoch in range(EPOCHS):
    for batch in torch.randperm(len(images)).split(BATCH):
        own = batch[rank::world]  # FSDP2 averages the gradients of the processes
        loss = nn.functional.cross_entropy(model(images[own]), labels[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    dist.all_reduce(loss := loss.detach())
    if rank == 0:
        print(f"epoch {epoch + 1}: loss {loss / world:.3f}, lr {scheduler.get_last_lr()[0]:.3f}")
weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))  # whole, to save
dist.destroy_process_group()
