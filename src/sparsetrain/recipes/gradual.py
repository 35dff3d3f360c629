"""Gradual magnitude pruning while a model trains, on real sparse storage where that pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import sparsetrain
from sparsetrain.nn import SparseLayer
from sparsetrain.recipes.pruning import cubic_sparsity, rank_masks

#: A layer at least this sparse is computed on its nonzeros; below, dense is as fast.
BREAK_EVEN = 0.5

#: Share of the training before the first weight goes, and at which the goal is reached.
RAMP = (0.05, 0.6)


class GradualPruning:
    """Zhu & Gupta 2017: every `every` steps the smallest weights go, for good.

    A layer becomes sparse storage once it is past break-even; from then on its pattern shrinks.
    Before that its masked weights are set to zero after every step. The optimizer's state stays
    with the weights that survive.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        names: Sequence[str],
        sparsity: float,
        distribution: str,
        steps: int,
        every: int,
    ) -> None:
        """names: the layers to prune; steps: of the whole training, the ramp is RAMP of them."""
        self.model, self.optimizer, self.names = model, optimizer, tuple(names)
        self.sparsity, self.distribution = sparsity, distribution
        self.steps, self.every = steps, every
        self.done = 0
        self._masks: dict[str, Tensor] = {}  # of layers that are still dense

    def step(self) -> None:
        """Prune if it is time, and keep what was pruned at zero."""
        self.done += 1
        due = self._due(self.done)
        last = self._due(self.done - 1) < due == self.sparsity
        if last or (0 < due < self.sparsity and self.done % self.every == 0):
            self._prune(due)
        with torch.no_grad():
            for name, mask in self._masks.items():
                self._dense_weight(name).mul_(mask)

    def _due(self, step: int) -> float:
        return cubic_sparsity(step, self.steps, self.sparsity, RAMP)

    def state_dict(self) -> dict[str, Any]:
        """Steps done and the masks of layers that are still dense."""
        return {"done": self.done, "masks": dict(self._masks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, with the same model."""
        self.done, self._masks = int(state["done"]), dict(state["masks"])

    def _dense_weight(self, name: str) -> Tensor:
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def _prune(self, due: float) -> None:
        weights = {name: self._dense_weight(name) for name in self.names}
        for name, mask in rank_masks(weights, due, self.distribution).items():
            layer = self.model.get_submodule(name)
            if isinstance(layer, SparseLayer):
                self._shrink(layer, mask)
            elif 1.0 - float(mask.float().mean()) < BREAK_EVEN:
                self._masks[name] = mask
            else:
                self._masks.pop(name, None)
                self._convert(name, mask)

    def _convert(self, name: str, mask: Tensor) -> None:
        """Dense to sparse storage; `values` takes the weight's place in the optimizer."""
        weight = self._dense_weight(name)
        weight.mul_(mask)
        sparsetrain.to_sparse(self.model, min_sparsity=0.0, include=[name], inplace=True)
        layer = self.model.get_submodule(name)
        assert isinstance(layer, SparseLayer)
        for group in self.optimizer.param_groups:
            group["params"] = [layer.values if p is weight else p for p in group["params"]]
        state = self.optimizer.state.pop(weight, {})
        self.optimizer.state[layer.values] = {
            key: layer.pattern.gather(value) if _is_like(value, weight) else value
            for key, value in state.items()
        }

    def _shrink(self, layer: SparseLayer, mask: Tensor) -> None:
        """Keep what `mask` keeps of the pattern, values and optimizer state with it."""
        kept = layer.pattern.gather(mask)
        state = self.optimizer.state[layer.values]
        for key, value in state.items():
            if _is_like(value, layer.values):
                state[key] = value[kept]
        pattern = sparsetrain.SparsePattern.from_mask(mask & layer.pattern.to_mask().view_as(mask))
        layer.set_pattern(pattern, layer.values[kept])


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.numel() > 1
