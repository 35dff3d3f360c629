"""One of several processes that train one model, run by the tests of distributed training.

    python sparsify_ranks.py RANK WORLD FILE ALGORITHM [die | resume]

Prints one line at the end: the number of updates, the fingerprints and the loss of each step. With
"resume" all is built anew after step 16 and loads what was saved there.
"""

from __future__ import annotations

import copy
import datetime
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsetrain import schedules
from sparsify_cases import ALGORITHMS, batch, network

SCHEDULES = {
    "Static": schedules.Never(),
    "SET": schedules.Constant(0.3, every=3),
    "RigL": schedules.Constant(0.3, every=3),
    "MEST": schedules.Constant(0.3, every=3),
    "GMP": schedules.Cubic(every=3, stop=15),
    "ACDC": schedules.Periodic(warmup=4, dense=4, sparse=4),
    "TopKAST": schedules.Constant(0.3, every=3, stop=15),
}


class Traffic:
    """Counts the elements that the averaging of gradients sends."""

    def __init__(self) -> None:
        self.elements = 0

    def hook(self, _, bucket):
        self.elements += bucket.buffer().numel()
        future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return future.get_future().then(lambda f: f.value()[0])


def build(rank: int, kind: str):
    model = DistributedDataParallel(network(seed=rank))  # which broadcasts the first rank's
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, optimizer, ALGORITHMS[kind](model, optimizer, 0.7, schedule=SCHEDULES[kind])


def train(rank: int, world: int, kind: str, mode: str) -> None:
    model, optimizer, sparsifier = build(rank, kind)
    traffic = Traffic()
    if kind == "RigL":
        model.register_comm_hook(None, traffic.hook)
    losses = []
    for step in range(20):
        if mode == "die" and rank == 1 and step == 7:
            os._exit(9)
        if mode == "resume" and step == 16:
            saved = [copy.deepcopy(x.state_dict()) for x in (model, optimizer, sparsifier)]
            model, optimizer, sparsifier = build(rank, kind)
            for part, state in zip((model, optimizer, sparsifier), saved, strict=True):
                part.load_state_dict(state)
        x, y = batch(step)
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if kind == "RigL" and mode != "resume":
        mine = sum(p.numel() for p in model.parameters())
        assert traffic.elements == 20 * mine, (traffic.elements, mine)
    print(sparsifier.updates, sparsifier._fingerprints(), *losses)


def main(rank: int, world: int, file: str, kind: str, mode: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    train(rank, world, kind, mode)
    dist.destroy_process_group()
    # DistributedDataParallel leaks the group (torch 2.13), whose threads then run until the end,
    # where one that lets go of a tensor asks a dead interpreter for its lock and aborts.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], *(sys.argv[5:] or [""]))
