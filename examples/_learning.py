"""What the examples on learning share: contestants, one training run, what a step costs, files.

A contestant is dense, sparse under one of the library's algorithms, or "masks": what is done where
there is no sparse storage, in its cheapest form (the pattern of Static, masks over dense weights,
one product with each gradient).
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import sparsetrain
from sparsetrain.bench.machine import environment
from sparsetrain.bench.memory import peak_resident, reset_peak, resident
from sparsetrain.bench.processes import read_json, run_child, write_json
from sparsetrain.nn import SparseLayer

Json = dict[str, Any]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "learning"
COST = ("dense", "masks", "Static", "RigL")
CountsOption = Annotated[list[int] | None, typer.Option(help="default: 1, 2; 0: no times")]
UPDATES = "RigL update"  # RigL with an update at every step


@dataclass(frozen=True)
class Setting:
    """What all contestants of a comparison share.

    build: the dense model; optimizer: for it; exclude: layers that stay dense; sparsity: of the
    others together, by ERK; steps: of the training; rescale: weights of layers that start sparse
    are divided by the root of their density, so that outputs keep the variance of dense layers
    (Evci et al. 2022, "Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win").
    """

    build: Callable[[], nn.Module]
    optimizer: MakeOptimizer
    exclude: Sequence[str]
    sparsity: float
    steps: int
    rescale: bool = False


class Lane:
    """A model in training: its optimizer, and what keeps it sparse."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.model = setting.build()
        masks = _masks(self.model, setting) if name == "masks" else {}
        self.optimizer = setting.optimizer(self.model)
        self.dense = [
            module.weight
            for layer, module in self.model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and layer not in setting.exclude
        ]
        self.masks = [(self.model.get_submodule(k).weight, mask) for k, mask in masks.items()]
        self.sparsifier: sparsetrain.Sparsifier | None = None
        if name not in ("dense", "masks"):
            self.sparsifier = _sparsifier(name, self.model, self.optimizer, setting)

    def step(self, loss: Callable[[nn.Module], Tensor]) -> float:
        """One optimizer step; the loss before it."""
        value = loss(self.model)
        value.backward()
        for weight, mask in self.masks:
            assert weight.grad is not None
            weight.grad.mul_(mask)
        self.optimizer.step()
        if self.sparsifier is not None:
            self.sparsifier.step()
        return float(value.detach())

    def state_bytes(self) -> int:
        """Of the prunable weights, after a step: weights, gradients, optimizer, topology, plans."""
        total = sum(mask.numel() * mask.element_size() for _, mask in self.masks)
        weights = list(self.dense) if self.sparsifier is None else []
        for layer in self.model.modules():
            if isinstance(layer, SparseLayer):
                weights.append(layer.values)
                total += layer.pattern.col_indices.nbytes + layer.pattern.crow_indices.nbytes
                total += int(torch.ops.sparsetrain.plan_bytes(layer.pattern.key))
        for weight in weights:
            state = [v for v in self.optimizer.state[weight].values() if isinstance(v, Tensor)]
            total += sum(t.nbytes for t in (weight, weight.grad, *state) if t is not None)
        return total


def _masks(model: nn.Module, setting: Setting) -> dict[str, Tensor]:
    """The pattern of Static as dense masks, by layer; the model's weights are masked."""
    twin = copy.deepcopy(model)
    _sparsifier("Static", twin, setting.optimizer(twin), setting)
    masks = {}
    for name, layer in twin.named_modules():
        if isinstance(layer, SparseLayer):
            weight = model.get_submodule(name).weight
            masks[name] = layer.pattern.to_mask().view(weight.shape).to(weight.dtype)
            with torch.no_grad():
                weight.copy_(layer.weight)
    return masks


def _sparsifier(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, setting: Setting
) -> sparsetrain.Sparsifier:
    kind = getattr(sparsetrain, "RigL" if name == UPDATES else name)
    schedule = sparsetrain.schedules.Constant(0.3, every=1) if name == UPDATES else None
    made: sparsetrain.Sparsifier = kind(
        model,
        optimizer,
        setting.sparsity,
        distribution="erk",
        schedule=schedule,
        total_steps=None if schedule else setting.steps,
        exclude=setting.exclude,
    )
    for layer in made.layers if setting.rescale else ():
        with torch.no_grad():
            layer.module.values.mul_((layer.size / layer.nnz) ** 0.5)
    return made


def train(
    name: str,
    setting: Setting,
    rate: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
    loss: Callable[[nn.Module], Tensor],
    validate: Callable[[nn.Module], float] | None = None,
) -> tuple[nn.Module, Json]:
    """A whole run: the model, and what is worth keeping.

    rate: makes the learning rate's schedule; loss: of the next batch; validate: called at the start
    and every tenth of the steps, outside of the times. `cpu_seconds` are those of the training
    loop, which with one thread are its duration on a machine that has nothing else to do.
    `peak_bytes` is the most that the loop had in memory beyond libraries and data.
    """
    before = resident()
    lane = Lane(name, setting)
    scheduler = rate(lane.optimizer)
    losses, curve, cpu = [], [], 0.0
    resident()
    reset_peak()
    for step in track(
        range(setting.steps), name, console=Console(stderr=True), disable=not sys.stderr.isatty()
    ):
        if validate is not None and step % max(1, setting.steps // 10) == 0:
            curve.append([step, round(validate(lane.model), 4)])
        start = time.process_time()
        losses.append(lane.step(loss))
        scheduler.step()
        lane.optimizer.zero_grad()
        cpu += time.process_time() - start
    report: Json = {
        "algorithm": name,
        "sparsity": 0.0 if name == "dense" else setting.sparsity,
        "steps": setting.steps,
        "parameters": sum(p.numel() for p in lane.model.parameters()),
        "cpu_seconds": round(cpu, 2),
        "threads": torch.get_num_threads(),
        "peak_bytes": peak_resident() - before,
        "train_loss": round(statistics.fmean(losses[-50:]), 4),
        "losses": [round(v, 4) for v in losses[:: max(1, setting.steps // 100)]],
        "validation": curve,
    }
    if lane.sparsifier is not None:
        log = lane.sparsifier.log()
        report |= {
            "final_sparsity": log["sparsity/total"],
            "updates": lane.sparsifier.updates,
            "itop_rate": log["sparsity/itop_rate"],
            "overlap_with_start": log["sparsity/overlap_with_start"],
        }
    return lane.model, report


def time_steps(setting: Setting, loss: Callable[[nn.Module], Tensor], repeats: int) -> Json:
    """Whole steps of all contestants in turn, in milliseconds, and the bytes of their state."""
    lanes = {name: Lane(name, setting) for name in ("dense", "masks", "Static", UPDATES)}
    times: dict[str, list[float]] = {name: [] for name in lanes}
    sizes = {}
    for repeat in range(repeats + 1):
        for name, lane in lanes.items():
            start = time.perf_counter()
            lane.step(loss)
            if repeat:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - start))
            if name != UPDATES:
                sizes[name] = lane.state_bytes()
            lane.optimizer.zero_grad()
    return {
        "threads": torch.get_num_threads(),
        "milliseconds": {name: round(statistics.median(t), 2) for name, t in times.items()},
        "state_bytes": sizes,
    }


def peak_of(
    name: str, setting: Setting, loss: Callable[[nn.Module], Tensor], before: int, steps: int
) -> Json:
    """The most memory that `steps` steps of one contestant take, beyond `before`, in bytes.

    RigL's updates are among the steps.
    """
    lane = Lane(UPDATES if name == "RigL" else name, setting)
    resident()
    reset_peak()
    for _ in range(steps):
        lane.step(loss)
        lane.optimizer.zero_grad()
    return {"peak_bytes": peak_resident() - before}


def child_of(module: str, request: Json, threads: int) -> Json:
    """`module.child(request, save)`, of this folder, in a process of its own."""
    folder = str(Path(__file__).resolve().parent)
    known = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, known]))
    try:
        return run_child(module, request, threads)
    finally:
        os.environ["PYTHONPATH"] = known


def measure_cost(
    module: str, request: Json, threads: Sequence[int] | None, memory: bool, path: Path
) -> None:
    """Times for each number of threads, then peaks, of one process per contestant; into `path`.

    threads: default 1 and 2; 0 is no measurement.
    What the file has of other thread counts, or of peaks that are not asked for, stays.
    """
    known = read_json(path) if path.exists() else {}
    runs = {run["threads"]: run for run in known.get("times", [])}
    for count in filter(None, threads or (1, 2)):
        runs[count] = child_of(module, {**request, "task": "time"}, count)
    peaks = known.get("peaks", {})
    if memory:
        asked = {name: {**request, "task": "peak", "name": name} for name in COST}
        peaks = {k: child_of(module, v, 1)["peak_bytes"] for k, v in asked.items()}
    times = [runs[count] for count in sorted(runs)]
    report = {"request": request, "environment": environment(), "times": times, "peaks": peaks}
    write_json(path, report)
    print(json.dumps({"times": times, "peaks": peaks}, indent=1))
