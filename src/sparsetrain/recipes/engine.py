"""Lanes: models that train side by side on the same batches, timed step by step.

Everything that a step depends on is a function of (seed, step): the batch, the learning rate and
the dropout masks. So two lanes see exactly the same, and a resumed run continues as if it had never
stopped, without any random state in its checkpoint.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import sparsetrain

#: What recipes prune.
Prunable = nn.Linear | nn.Conv2d

Batch = tuple[dict[str, Tensor], Tensor]


class Task(Protocol):
    """What is trained: the data, the loss and the score."""

    @property
    def train_size(self) -> int:
        """Number of training samples."""

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        """Inputs and targets of the training samples `indices` (batch,).

        Whatever is random about them (mirrored images, say) comes from `generator`.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Scalar loss, differentiable."""

    def evaluate(self, model: nn.Module) -> float:
        """Accuracy on the test samples, 0 to 1."""


@dataclass(frozen=True)
class Schedule:
    """Length, learning rate and optimizer of a phase.

    steps: optimizer steps; batch: samples per step; lr: peak learning rate, reached after the
    first tenth of the steps; decay: whether it then falls linearly to zero; seed: of batches and
    dropout; optimizer: "adamw", or "sgd" with Nesterov's momentum of 0.9.
    """

    steps: int
    batch: int
    lr: float
    weight_decay: float
    seed: int
    decay: bool = True
    optimizer: str = "adamw"

    def learning_rate(self, step: int) -> float:
        """Learning rate of `step` (counted from 0)."""
        warmup = max(1, self.steps // 10)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if not self.decay:
            return self.lr
        return self.lr * (self.steps - step) / max(1, self.steps - warmup)

    def indices(self, step: int, size: int) -> Tensor:
        """Sample numbers (batch,) of `step`: a fresh permutation of range(size) every epoch."""
        per_epoch = max(1, size // self.batch)
        epoch, within = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(size, generator=generator)
        return order[within * self.batch : (within + 1) * self.batch]

    def step_seed(self, step: int) -> int:
        """Seed of whatever is random in `step`."""
        return self.seed * 7_368_787 + step

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of all parameters of `model` that learn."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                trained,
                lr=self.lr,
                weight_decay=self.weight_decay,
                momentum=0.9,
                nesterov=True,
                fused=True,
            )
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay, fused=True)


def running_medians(values: Sequence[float], width: int = 25) -> list[float]:
    """The median of each value and its `width` // 2 neighbours on either side."""
    half = width // 2
    return [statistics.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


@dataclass
class History:
    """What a lane has done so far. Seconds are of whole steps: forward, backward, optimizer.

    evaluations: (steps done, training seconds so far, accuracy); steady: steps done when the number
    of nonzeros changed last.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    mask_seconds: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    steady: int = 0

    def median_seconds(self, since: int = 0) -> float:
        """Median time of the steps from `since` on; the first two (plans) do not count."""
        timed = sorted(self.seconds[since + 2 :] or self.seconds)
        return timed[len(timed) // 2] if timed else float("nan")

    def elapsed(self) -> list[float]:
        """Training seconds up to each step, from 0 on: the sum of running medians of step times.

        A minute in which the machine did something else, or the process was suspended, does not
        count.
        """
        return [0.0, *itertools.accumulate(running_medians(self.seconds))]


MakeSparsifier = Callable[[nn.Module, torch.optim.Optimizer], sparsetrain.Sparsifier]


class Lane:
    """One model with its optimizer.

    masks: for a dense model that stands for a sparse one, the bool mask (out, in) of every pruned
    layer; gradients are masked before and weights after each optimizer step, as users of
    `torch.nn.utils.prune` do. That time is kept apart from the step time. sparsify: makes the
    sparsifier, whose time is part of the step time.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        schedule: Schedule,
        layers: Mapping[str, Prunable] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        sparsify: MakeSparsifier | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.schedule = schedule
        self.layers = dict(layers or {})
        self.masks = dict(masks or {})
        self.history = History()
        self.optimizer = schedule.make_optimizer(model)
        self.sparsifier = sparsify and sparsify(model, self.optimizer)

    def step(self, task: Task, number: int, batch: Batch) -> float:
        """Train step `number` on `batch`; returns the loss before it."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(number)
        torch.manual_seed(self.schedule.step_seed(number))
        begin = time.perf_counter()
        loss = task.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        middle = time.perf_counter()
        self._mask_gradients()
        resumed = time.perf_counter()
        self.optimizer.step()
        if self.sparsifier is not None:
            self._change_topology(number)
        self.optimizer.zero_grad()
        end = time.perf_counter()
        self.mask_weights()
        masking = (resumed - middle) + (time.perf_counter() - end)
        value = float(loss.detach())
        self.history.losses.append(value)
        self.history.seconds.append((end - resumed) + (middle - begin))
        self.history.mask_seconds.append(masking if self.masks else 0.0)
        return value

    def _change_topology(self, number: int) -> None:
        assert self.sparsifier is not None
        before = trained_weights(self.model)
        self.sparsifier.step()
        if trained_weights(self.model) != before:
            self.history.steady = number + 1

    def _mask_gradients(self) -> None:
        for name, mask in self.masks.items():
            gradient = self.layers[name].weight.grad
            if gradient is not None:
                gradient.mul_(mask)

    @torch.no_grad()
    def mask_weights(self) -> None:
        """Set masked weights to zero (no-op without masks)."""
        for name, mask in self.masks.items():
            self.layers[name].weight.mul_(mask)

    def evaluate(self, task: Task) -> float:
        """Test accuracy now, noted in the history; its time does not count as training."""
        self.model.eval()
        with torch.inference_mode():
            accuracy = task.evaluate(self.model)
        done = len(self.history.losses)
        self.history.evaluations.append((done, sum(self.history.seconds), accuracy))
        return accuracy

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer and history; frozen parameters come from the model folder instead."""
        frozen = {n for n, p in self.model.named_parameters() if not p.requires_grad}
        model = {k: v for k, v in self.model.state_dict().items() if k not in frozen}
        return {
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "history": asdict(self.history),
            "sparsifier": self.sparsifier.state_dict() if self.sparsifier else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a lane of the same name."""
        model = {**self.model.state_dict(), **state["model"]}
        self.model.load_state_dict(model, strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(state["sparsifier"])
        history = state["history"]
        self.history = History(
            losses=list(history["losses"]),
            seconds=list(history["seconds"]),
            mask_seconds=list(history["mask_seconds"]),
            evaluations=[(int(a), float(b), float(c)) for a, b, c in history["evaluations"]],
            steady=int(history["steady"]),
        )


def trained_weights(model: nn.Module) -> int:
    """Number of parameters that learn: of sparse layers the nonzeros."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def step_all(lanes: Sequence[Lane], task: Task, number: int) -> list[float]:
    """One step of every lane on one batch, in an order that alternates from step to step.

    Side by side, a slower or faster minute of the machine hits all lanes alike.
    """
    schedule = lanes[0].schedule
    generator = torch.Generator().manual_seed(schedule.step_seed(number))
    batch = task.batch(schedule.indices(number, task.train_size), generator)
    order = lanes if number % 2 == 0 else lanes[::-1]
    losses = {lane.name: lane.step(task, number, batch) for lane in order}
    return [losses[lane.name] for lane in lanes]


def tensor_bytes(value: object) -> int:
    """Bytes of all tensors in a (nested) dict or list, or of a tensor."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(tensor_bytes(item) for item in value)
    return 0
