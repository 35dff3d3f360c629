"""A whole run: prune, then train sparse (and dense beside it on request), resumable at any time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsetrain
from sparsetrain.pattern import nonzeros_for
from sparsetrain.recipes.algorithms import make_sparsifier
from sparsetrain.recipes.checkpoint import (
    load_checkpoint,
    pack_mask,
    save_checkpoint,
    unpack_mask,
)
from sparsetrain.recipes.engine import Lane, Prunable, Schedule, Task, step_all
from sparsetrain.recipes.errors import InputError
from sparsetrain.recipes.options import CHECKPOINT
from sparsetrain.recipes.progress import Progress
from sparsetrain.recipes.pruning import apply_masks, cubic_sparsity, magnitude_masks
from sparsetrain.sparsify.schedules import Schedule as Topology

#: The first steps of dense and sparse must agree: relative difference of their losses. The first
#: loss shows the forward pass, the second the gradients. Rounding then grows: batch norm and max
#: pooling at a high learning rate multiply it by up to 60 a step (VGG16-BN: dense in float32 is
#: 2e-4 from dense in float64 at the fourth step).
AGREEMENT_TOLERANCES = (1e-5, 1e-5, 1e-3, 1e-2, 1e-2)
AGREEMENT_STEPS = len(AGREEMENT_TOLERANCES)

#: Steps of each lane that are timed for `Session.retime`.
TIMED_STEPS = 24


@dataclass(frozen=True)
class Settings:
    """How a session runs, whatever the task.

    prune, tune: the two phases; sparsity: goal, in [0, 1); distribution: how it is divided among
    the layers ("uniform", "erk" or "global"); algorithm: "static" prunes first and then trains what
    is left, any other has no first phase and changes the pattern while it trains, by topology
    (None: the published schedule); trained: whether the model's weights are; prune_every: steps
    between two prunings of the first phase; compare: train a dense twin too, masked like the sparse
    one for "static", else never pruned; evaluate_every, checkpoint_every: steps.
    """

    prune: Schedule
    tune: Schedule
    sparsity: float
    distribution: str
    compare: bool
    evaluate_every: int
    checkpoint_every: int
    algorithm: str = "static"
    topology: Topology | None = None
    trained: bool = True
    prune_every: int = 5

    @property
    def prunes_first(self) -> bool:
        """Whether a pruned model, rather than a dense one, enters the second phase."""
        return self.algorithm == "static"


class Session:
    """Runs `task` from a freshly built model to trained lanes.

    build: makes the dense model, the same every time; select: its layers to be made sparse, by
    name; identity: what a resumed run must share with the interrupted one (options, data).
    """

    def __init__(
        self,
        task: Task,
        build: Callable[[], nn.Module],
        select: Callable[[nn.Module], Mapping[str, Prunable]],
        settings: Settings,
        identity: Mapping[str, Any],
        out: Path,
    ) -> None:
        self.task = task
        self.build = build
        self.select = select
        self.settings = settings
        self.identity = json.dumps(identity, sort_keys=True)
        self.path = out / CHECKPOINT
        model = build()
        self.names = list(select(model))
        self._masks: dict[str, Tensor] = {}  # what the model was pruned to
        self.phase = "fine-tune" if settings.prunes_first else "train"
        if not settings.prunes_first:  # whatever the algorithm refuses is refused here
            self._sparsifier(model, settings.tune.make_optimizer(model))

    def check_resume(self) -> None:
        """Raise InputError if there is a checkpoint that this session cannot continue."""
        self._saved()

    def run(self, resume: bool, progress: Progress) -> list[Lane]:
        """Train to the end; returns the lanes, the sparse one first.

        Raises InputError if `resume` meets a checkpoint of another run, RuntimeError if the dense
        and the sparse losses of the first steps differ by more than floating-point noise.
        """
        saved = self._saved() if resume else None
        model = self.build()
        masks: dict[str, Tensor] = {}
        if saved is not None and saved["phase"] != "prune":
            return self._tune(self._restored(model, saved), saved, progress)
        if self.settings.prunes_first:
            masks = self._prune(model, saved, progress)
        return self._tune(self._lanes(model, masks), None, progress)

    def retime(self, progress: Progress) -> list[Lane]:
        """The lanes of a finished run, their step times measured anew; nothing is written.

        Raises InputError unless the run is of the same options and has ended.
        """
        saved = self._saved()
        if saved is None or saved["phase"] != "tune" or saved["step"] < self.settings.tune.steps:
            raise InputError(f"retime: the run in {self.path.parent} has not ended; use --resume")
        lanes = self._restored(self.build(), saved)
        for lane in lanes:
            if lane.sparsifier is not None:
                lane.sparsifier.close()
                lane.sparsifier = None
        progress.start("time", TIMED_STEPS)
        for step in range(TIMED_STEPS):
            step_all(lanes, self.task, step)
            progress.advance("steps of all lanes in turn")
        return lanes

    def _restored(self, model: nn.Module, saved: Mapping[str, Any]) -> list[Lane]:
        """The lanes of the second phase as they were when `saved` was written."""
        layers = self.select(model)
        shapes = {name: layer.weight.shape for name, layer in layers.items()}
        masks = {n: unpack_mask(p, shapes[n]) for n, p in saved["masks"].items()}
        apply_masks(layers, masks)
        lanes = self._lanes(model, masks)
        for lane in lanes:
            lane.load_state_dict(saved["lanes"][lane.name])
        return lanes

    def _saved(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        saved = load_checkpoint(self.path)
        before, now = json.loads(saved["identity"]), json.loads(self.identity)
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            raise InputError(
                f"resume: {self.path} was made with {key}={before.get(key)!r}, now it is "
                f"{now.get(key)!r}; give the same options, or --overwrite to start again"
            )
        return saved

    def _save(self, phase: str, step: int, lanes: list[Lane]) -> None:
        state = {
            "identity": self.identity,
            "phase": phase,
            "step": step,
            "masks": {name: pack_mask(mask) for name, mask in self._masks.items()},
            "lanes": {lane.name: lane.state_dict() for lane in lanes},
        }
        save_checkpoint(self.path, state)

    def _prune(
        self, model: nn.Module, saved: dict[str, Any] | None, progress: Progress
    ) -> dict[str, Tensor]:
        """Train dense while weights go; leaves the pruned weights in `model`."""
        settings, layers = self.settings, self.select(model)
        steps = settings.prune.steps
        if saved is None and (kept := _own_masks(layers, settings.sparsity)):
            progress.say("already as sparse as asked for: exactly its nonzeros are kept")
            return kept
        lane = Lane("pruning", model, settings.prune, layers)
        if saved is not None:
            lane.load_state_dict(saved["lanes"]["pruning"])
            shapes = {name: layer.weight.shape for name, layer in layers.items()}
            lane.masks = {n: unpack_mask(p, shapes[n]) for n, p in saved["masks"].items()}
            self._masks = lane.masks
        start = len(lane.history.losses)
        progress.start("prune", steps, start)
        for step in range(start, steps):
            due = cubic_sparsity(step, steps, settings.sparsity)
            if due and step % settings.prune_every == 0:
                lane.masks = magnitude_masks(layers, due, settings.distribution)
                self._masks = lane.masks
                lane.mask_weights()
            loss = step_all([lane], self.task, step)[0]
            progress.advance(f"loss {loss:.3f}, sparsity {due:.1%}")
            if (step + 1) % settings.checkpoint_every == 0:
                self._save("prune", step + 1, [lane])
        masks = magnitude_masks(layers, settings.sparsity, settings.distribution)
        apply_masks(layers, masks)
        progress.say(f"pruned to {settings.sparsity:.1%} in {steps} steps")
        return {name: layer.weight.detach() != 0 for name, layer in layers.items()}

    def _lanes(self, model: nn.Module, masks: dict[str, Tensor]) -> list[Lane]:
        """The sparse lane, and its dense twin on request; without masks both start dense."""
        settings, layers = self.settings, self.select(model)
        self._masks = masks
        if settings.prunes_first:
            sparse = sparsetrain.to_sparse(model, min_sparsity=0.0, include=list(masks))
            lanes = [Lane("sparse", sparse, settings.tune)]
        else:
            lanes = [Lane("sparse", copy.deepcopy(model), settings.tune, sparsify=self._sparsifier)]
        if settings.compare:
            lanes.append(Lane("dense", model, settings.tune, layers, masks))
        return lanes

    def _sparsifier(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> sparsetrain.Sparsifier:
        settings = self.settings
        return make_sparsifier(
            settings.algorithm,
            model,
            optimizer,
            self.names,
            sparsity=settings.sparsity,
            distribution=settings.distribution,
            schedule=settings.topology,
            steps=settings.tune.steps,
            trained=settings.trained,
            seed=settings.tune.seed,
        )

    def _tune(
        self, lanes: list[Lane], saved: dict[str, Any] | None, progress: Progress
    ) -> list[Lane]:
        settings, task = self.settings, self.task
        steps, start = settings.tune.steps, 0
        if saved is not None:
            start = int(saved["step"])
        else:
            self._evaluate(lanes, progress)
            self._save("tune", 0, lanes)
        progress.start(self.phase, steps, start)
        for step in range(start, steps):
            losses = step_all(lanes, task, step)
            progress.advance(
                ", ".join(
                    f"{lane.name} loss {x:.3f}" for lane, x in zip(lanes, losses, strict=True)
                )
            )
            done = step + 1
            if done == min(AGREEMENT_STEPS, steps) and settings.prunes_first:
                check_agreement(lanes)
            if done % settings.evaluate_every == 0 or done == steps:
                self._evaluate(lanes, progress)
            if done % settings.checkpoint_every == 0 or done == steps:
                self._save("tune", done, lanes)
        return lanes

    def _evaluate(self, lanes: list[Lane], progress: Progress) -> None:
        for lane in lanes:
            accuracy = lane.evaluate(self.task)
            steps, seconds, _ = lane.history.evaluations[-1]
            progress.say(
                f"step {steps}: {lane.name} test accuracy {accuracy:.2%} "
                f"after {seconds:.1f} s of training"
            )


def _own_masks(layers: Mapping[str, Prunable], sparsity: float) -> dict[str, Tensor]:
    """The nonzeros of layers that together are at least so sparse already; else nothing."""
    masks = {name: layer.weight.detach() != 0 for name, layer in layers.items()}
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    return masks if sparsity > 0 and kept <= nonzeros_for(total, sparsity) else {}


def loss_differences(lanes: list[Lane]) -> list[float]:
    """Relative differences of the losses of the first steps; none with one lane."""
    if len(lanes) < 2:
        return []
    first, second = (lane.history.losses[:AGREEMENT_STEPS] for lane in lanes[:2])
    pairs = zip(first, second, strict=True)
    return [abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs]


def check_agreement(lanes: list[Lane]) -> None:
    """Raise RuntimeError unless all lanes had the same losses up to floating-point noise."""
    for step, difference in enumerate(loss_differences(lanes)):
        tolerance = AGREEMENT_TOLERANCES[step]
        if not difference <= tolerance:
            first = {lane.name: lane.history.losses[:AGREEMENT_STEPS] for lane in lanes}
            raise RuntimeError(
                f"the losses of the first steps differ by {difference:.1e} at step {step + 1} (at "
                f"most {tolerance:.0e} is floating-point noise): {first}"
            )
