"""What the tests of sparse-training algorithms share: a small model, and masks over dense weights.

`MaskedRun` is what others do in place of sparse storage: the algorithm's rules written anew, in
float64, on dense weights, gradients and optimizer state with masks over them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import sparsetrain
from sparsetrain.pattern import SparsePattern
from sparsetrain.sparsify._topology import random_inactive

ALGORITHMS = {
    "Static": sparsetrain.Static,
    "SET": sparsetrain.SET,
    "RigL": sparsetrain.RigL,
    "MEST": sparsetrain.MEST,
    "GMP": sparsetrain.GMP,
    "ACDC": sparsetrain.ACDC,
    "TopKAST": sparsetrain.TopKAST,
}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """(N, 2, 6, 6) -> (N, 4)"""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, groups=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(32, 24),
            nn.Tanh(),
            nn.Linear(24, 4),
        )
    return model.to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1000 + step)
    y = torch.randint(4, (8,), generator=source)
    x = torch.randn(8, 2, 6, 6, generator=source, dtype=torch.float64)
    x += torch.stack([y % 2, y // 2], dim=1)[:, :, None, None]  # each label has its brightness
    return x.to(dtype), y


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x, y = batch(step, dtype)
    return nn.functional.cross_entropy(model(x), y)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sparsifier: sparsetrain.Sparsifier,
    steps: range,
    dtype: torch.dtype = torch.float64,
) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, step, dtype)
        loss.backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _top(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The mask of the `count` highest scores among a mask's true places; the first of equals."""
    order = sorted(
        (i for i, ok in enumerate(among.tolist()) if ok), key=lambda i: (-float(scores[i]), i)
    )
    mask = torch.zeros_like(among)
    mask[order[:count]] = True
    return mask


class MaskedRun:
    """`sparsifier`'s training simulated from the start: `model` is dense, with the same weights."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        sparsifier: sparsetrain.Sparsifier,
        seed: int = 0,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.kind = type(sparsifier).__name__
        self.schedule = sparsifier.schedule
        self.weights = [self.model.get_submodule(x.name).weight for x in sparsifier.layers]
        self.goals = [x.goal for x in sparsifier.layers]
        self.masks = [x.module.pattern.to_mask().view(-1) for x in sparsifier.layers]
        self.first = [int(m.sum()) for m in self.masks]
        self.generator = torch.Generator()
        self.generator.set_state(sparsifier.generator.get_state())
        self.optimizer = optimizer(self.model.parameters())
        with torch.no_grad():
            for weight, mask in zip(self.weights, self.masks, strict=True):
                weight.view(-1)[~mask] = 0.0
        self.active = [
            _top(w.detach().view(-1).abs(), m, g)
            for w, m, g in zip(self.weights, self.masks, self.goals, strict=True)
        ]

    def train(self, steps: range) -> list[float]:
        return [self._step(step) for step in steps]

    def _step(self, step: int) -> float:
        stored = [w.detach().clone() for w in self.weights]
        if self.kind == "TopKAST":
            for weight, active in zip(self.weights, self.active, strict=True):
                weight.data.view(-1)[~active] = 0.0
        loss = loss_of(self.model, step)
        loss.backward()
        gradients = [w.grad.detach().clone().view(-1) for w in self.weights]
        for weight, mask, before in zip(self.weights, self.masks, stored, strict=True):
            weight.data.copy_(before)
            weight.grad.view(-1)[~mask] = 0.0
        self.optimizer.step()
        done = step + 1
        if self.kind == "TopKAST":
            self._decay()
        if self.schedule.due(done):
            for i, gradient in enumerate(gradients):
                self._update(i, gradient, done)
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _decay(self) -> None:
        for weight, active in zip(self.weights, self.active, strict=True):
            rate = self.optimizer.param_groups[0]["lr"] * 1e-4
            reserve = min(1.0, rate / (float(active.sum()) / active.numel()))
            weight.data.view(-1).mul_(1 - torch.where(active, rate, reserve).double())

    def _update(self, i: int, gradient: Tensor, step: int) -> None:
        mask, value = self.masks[i], self.schedule.value(step)
        w = self.weights[i].detach().view(-1)
        nnz = int(mask.sum())
        if self.kind == "GMP":
            count = self.first[i] - round(value * (self.first[i] - self.goals[i]))
            return self._set(i, _top(w.abs(), mask, count))
        if self.kind == "ACDC":
            return self._set(
                i, torch.ones_like(mask) if value else _top(w.abs(), mask, self.goals[i])
            )
        movable = nnz - self.goals[i] if self.kind == "TopKAST" else nnz
        count = min(round(value * movable), mask.numel() - nnz)
        scores = w.abs()
        if self.kind == "MEST":
            scores = scores + 0.01 * gradient.abs()
        grown = torch.zeros_like(mask)
        if self.kind == "RigL":
            grown = _top(gradient.abs(), ~mask, count)
        elif count:
            shape = (self.weights[i].shape[0], math.prod(self.weights[i].shape[1:]))
            pattern = SparsePattern.from_mask(mask.view(shape))
            grown[random_inactive(pattern, count, self.generator)] = True
        self._set(i, _top(scores, mask, nnz - count) | grown)
        if self.kind == "TopKAST":
            self.active[i] = _top(
                self.weights[i].detach().view(-1).abs(), self.masks[i], self.goals[i]
            )

    def _set(self, i: int, mask: Tensor) -> None:
        gone = ~mask | ~self.masks[i]
        weight = self.weights[i]
        weight.data.view(-1)[gone] = 0.0
        for value in self.optimizer.state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.view(-1)[gone] = 0.0
        self.masks[i] = mask
