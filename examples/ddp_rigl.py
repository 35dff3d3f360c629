"""Sparse training by several processes, on one machine or on many.

On one machine, with two processes:

    torchrun --nproc-per-node 2 examples/ddp_rigl.py

On two machines, the same command on each (the first one's address where it says HOST):

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \\
        examples/ddp_rigl.py

Every rank learns from its own batches and holds the same sparse network; only gradients of as many
numbers as there are weights travel. See docs/distributed.md.
"""

import argparse
import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsetrain


def train(steps: int) -> float:
    rank = dist.get_rank()
    torch.manual_seed(rank)  # for the data; DistributedDataParallel spreads the first rank's model
    model = DistributedDataParallel(
        nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 4),
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier = sparsetrain.RigL(model, optimizer, sparsity=0.9, total_steps=steps)
    mean = torch.zeros(())
    for step in range(steps):
        x = torch.randn(32, 1, 8, 8)
        corners = x.view(32, 2, 4, 2, 4).sum((2, 4)).flatten(1)
        loss = nn.functional.cross_entropy(model(x), corners.argmax(1))
        loss.backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if (step + 1) % max(1, steps // 5) == 0:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
            if rank == 0:
                print(f"step {step + 1}: loss {mean:.3f}", flush=True)
    if rank == 0:
        print(sparsifier.summary(), flush=True)
    return float(mean)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (default 200)")
    arguments = parser.parse_args()
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=2))
    try:
        train(arguments.steps)
    finally:
        dist.destroy_process_group()
    # DistributedDataParallel leaks the group (torch 2.13), whose threads then run until the end,
    # where one that lets go of a tensor asks a dead interpreter for its lock and aborts.
    sys.stdout.flush()
    os._exit(0)
