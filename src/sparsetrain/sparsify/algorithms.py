"""The sparse-training algorithms of the field, each by what sets it apart from its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.nn._select import check_model
from sparsetrain.pattern import check_sparsity
from sparsetrain.sparsify import schedules
from sparsetrain.sparsify._setup import DEFAULT_SPARSITY, Trained, is_sparse, pooled_counts
from sparsetrain.sparsify._topology import full_pattern, inactive_count, random_inactive
from sparsetrain.sparsify.base import Change, Sparsifier, finite
from sparsetrain.sparsify.criteria import keep_top
from sparsetrain.sparsify.distributions import DISTRIBUTIONS

__all__ = ["ACDC", "GMP", "MEST", "SET", "RigL", "Static", "TopKAST"]


class Static(Sparsifier):
    """A random sparse network, trained as it is: what every other algorithm must beat.

    Mostly compared with in Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners".
    """

    @classmethod
    def published(cls, total_steps: int) -> schedules.Schedule:
        return schedules.Never()


class SET(Sparsifier):
    """Sparse Evolutionary Training: drops the smallest weights, grows random ones.

    Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science". There: 30 % after each epoch; here: 30 % every 100
    steps (or 20 times in a short training) for three quarters of the steps.
    """


class RigL(Sparsifier):
    """Drops the smallest weights, grows where the dense gradient is largest.

    Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners": a cosine from 30 %, every
    100 steps, for three quarters of the training. The gradient is that of the step at which the
    update happens; during that step the inputs and output gradients of the layers are kept, and
    afterwards dense gradients of at most 4 MiB at a time are computed. A weight that is dropped is
    not grown again in the same update.
    """

    needs_dense_gradients = True

    @classmethod
    def published(cls, total_steps: int) -> schedules.Schedule:
        every = max(1, min(100, total_steps // 20))
        return schedules.Cosine(0.3, every=every, stop=max(2, total_steps * 3 // 4))

    def update(self) -> list[Change | None]:
        """A layer without a gradient in this step, on any rank, is left as it is."""
        parts = torch.tensor([int(self.took_part(layer)) for layer in self.layers])
        everywhere = (self._ranks.sum(parts) == self._ranks.world).tolist()
        return [
            self.exchange(layer, self.exchange_count(layer)) if took_part else None
            for layer, took_part in zip(self.layers, everywhere, strict=True)
        ]

    def grow(self, layer: Trained, count: int) -> Tensor:
        return self.strongest_inactive(layer, count)


class MEST(Sparsifier):
    """Memory-Economic Sparse Training: drops by |w| + weight * |gradient|, grows random weights.

    Yuan et al. 2021, "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the
    Edge": Elastic Mutation. With ``soft=True`` (EM&S) newcomers come on top of the others and are
    judged with them at the next update, so memory exceeds the goal by the mutated share until the
    schedule's last update (at `stop`, or where the share has become zero).
    """

    def __init__(
        self, *args: Any, gradient_weight: float = 0.01, soft: bool = False, **kwargs: Any
    ) -> None:
        """As `Sparsifier`, and:

        Args:
            gradient_weight: of |gradient| beside |w|, at least 0.
            soft: whether newcomers may exceed the goal (the soft memory bound).
        """
        if not gradient_weight >= 0.0:
            raise ValueError(f"gradient_weight must be at least 0; got {gradient_weight!r}")
        self.gradient_weight, self.soft = gradient_weight, soft
        super().__init__(*args, **kwargs)

    @classmethod
    def published(cls, total_steps: int) -> schedules.Schedule:
        return RigL.published(total_steps)

    def drop_scores(self, layer: Trained) -> Tensor:
        values = layer.module.values
        scores = values.detach().abs()
        if values.grad is None:
            return scores
        return scores + self.gradient_weight * values.grad.detach().abs()

    def exchange(self, layer: Trained, count: int) -> Change | None:
        if not self.soft:
            return super().exchange(layer, count)
        count = round(self.schedule.value(self.steps) * layer.goal)
        if self._is_last():
            count = 0
        count = min(count, inactive_count(layer.module.pattern))
        grown = random_inactive(layer.module.pattern, count, self.generator)
        return self.change(layer, min(layer.goal, layer.nnz), grown)

    def _is_last(self) -> bool:
        stop, every = (getattr(self.schedule, name, None) for name in ("stop", "every"))
        if stop is None or every is None:
            return stop is not None and self.steps >= stop
        return not self.schedule.due(self.steps + every)


class GMP(Sparsifier):
    """Gradual magnitude pruning: from all weights to the goal along a cubic.

    Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression". A dense model starts with all its weights, computed by the dense kernels; each
    update keeps the largest. With ``distribution="global"`` all layers are ranked together. Here
    from the start to three quarters of the training, every 100 steps.
    """

    initial = "dense"
    prunes = True

    @classmethod
    def published(cls, total_steps: int) -> schedules.Schedule:
        every = max(1, min(100, total_steps // 20))
        return schedules.Cubic(every=every, stop=max(1, total_steps * 3 // 4))

    def update(self) -> list[Change | None]:
        done = self.schedule.value(self.steps)
        counts = [x.first - round(done * (x.first - x.goal)) for x in self.layers]
        if self.distribution == "global":
            scores = [finite(self.drop_scores(x)) for x in self.layers]
            counts = pooled_counts(scores, min(sum(counts), sum(x.nnz for x in self.layers)))
        return [
            self.change(layer, count) if count < layer.nnz else None
            for layer, count in zip(self.layers, counts, strict=True)
        ]


class ACDC(Sparsifier):
    """Alternating Compressed/DeCompressed training: dense and sparse phases in turn.

    Peste et al. 2021, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
    Networks". Sparse phases keep the largest weights; dense phases bring all others back, at zero
    and without momentum. In a dense phase a layer really is dense: its `values` are the whole
    weight, computed as a dense layer is; its names in the state_dict stay the same. The training
    begins dense and ends sparse: in tenths of it, 1 dense, then 1 sparse and 1 dense in turn, and
    sparse from 8 tenths on.
    """

    initial = "dense"
    prunes = True

    @classmethod
    def published(cls, total_steps: int) -> schedules.Schedule:
        phase = max(1, total_steps // 10)
        return schedules.Periodic(phase, phase, phase, stop=max(phase, total_steps * 8 // 10))

    def update(self) -> list[Change | None]:
        if self.schedule.value(self.steps) > 0.5:
            return [self._dense(layer) for layer in self.layers]
        return [
            self.change(layer, layer.goal) if layer.goal < layer.nnz else None
            for layer in self.layers
        ]

    def _dense(self, layer: Trained) -> Change | None:
        pattern = layer.module.pattern
        if layer.nnz == layer.size:
            return None
        source = torch.full((layer.size,), -1, dtype=torch.int32)
        source[pattern.flat_indices()] = torch.arange(layer.nnz, dtype=torch.int32)
        return Change(full_pattern(pattern.shape), source)


class TopKAST(Sparsifier):
    """Top-K Always Sparse Training: a forward set A of the largest weights inside a backward set B.

    Jayakumar et al. 2020, "Top-KAST: Top-K Always Sparse Training". `sparsity` is that of A, which
    the forward pass uses; gradients reach all of B, which `backward_sparsity` gives. A layer stores
    the pattern B; for the forward pass, the values outside A count as zero (so a step costs what B
    costs). At each update A becomes the largest of B. As in the paper, weights decay by
    `exploration_decay` inside A and by that over the density of A in the reserve B - A, so that
    weights fall back unless they are useful.

    In the paper B holds the largest weights of a dense copy, which real sparse storage does not
    have: instead the schedule's share of the reserve, its smallest, is exchanged for random places.
    At the schedule's end (`stop`), or by `finish`, the layers keep A alone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        sparsity: float | None = None,
        *,
        backward_sparsity: float | None = None,
        exploration_decay: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        """As `Sparsifier`, and:

        Args:
            sparsity: of A; 0.9 for a dense model, half the weights of each layer of a sparse one.
            backward_sparsity: of B, at most `sparsity`; default: twice the weights of A (0.9 gives
                0.8), or those that a sparse model has.
            exploration_decay: weight decay inside A, times the learning rate, at least 0.
        """
        if not exploration_decay >= 0.0:
            raise ValueError(f"exploration_decay must be at least 0; got {exploration_decay!r}")
        self.exploration_decay = exploration_decay
        self.finished = False
        self._forward: float | None = None
        backward: float | None = None
        if sparsity is None and backward_sparsity is None and is_sparse(check_model(model)):
            self._share = 0.5  # of B that is in A
        else:
            self._forward, backward = _both_sets(sparsity, backward_sparsity)
            self._share = (1.0 - self._forward) / (1.0 - backward)
        super().__init__(model, optimizer, backward, **kwargs)

    def begin(self) -> None:
        goals = [max(1, round(self._share * layer.nnz)) for layer in self.layers]
        named = isinstance(self.distribution, str) and self.distribution in DISTRIBUTIONS
        if named and self._forward is not None:
            assert isinstance(self.distribution, str)
            shapes = [layer.module.weight_shape for layer in self.layers]
            goals = DISTRIBUTIONS[self.distribution](
                shapes, self._forward, [x.nnz for x in self.layers]
            )
        for layer, goal in zip(self.layers, goals, strict=True):
            layer.goal = min(goal, layer.nnz)
            self._activate(layer)

    def step(self) -> bool:
        """As `Sparsifier.step`; also decays the weights."""
        if self._stepped and not self.finished:
            self._decay()
        due = super().step()
        stop = getattr(self.schedule, "stop", None)
        if stop is not None and self.steps >= stop and not self.finished:
            self.finish()
            return True
        return due

    def finish(self) -> None:
        """Leaves A alone in every layer."""
        if self.finished:
            return
        self.finished = True
        self._apply([self._only_active(layer) for layer in self.layers])
        for layer in self.layers:
            layer.module.__dict__.pop("_active", None)
        self._tell()

    def exchange_count(self, layer: Trained) -> int:
        reserve = layer.nnz - layer.goal
        wanted = round(self.schedule.value(self.steps) * reserve)
        return 0 if self.finished else min(wanted, inactive_count(layer.module.pattern))

    def layer_state(self, layer: Trained) -> dict[str, Any]:
        return super().layer_state(layer) | {"active": layer.module._active}

    def load_layer_state(self, layer: Trained, state: Mapping[str, Any]) -> None:
        super().load_layer_state(layer, state)
        layer.module.__dict__.pop("_active", None)
        self.finished = state["active"] is None
        if state["active"] is not None:
            layer.module._active = state["active"].clone()

    def _apply(self, changes: list[Change | None]) -> None:
        super()._apply(changes)
        if not self.finished:
            for layer in self.layers:
                self._activate(layer)

    def _activate(self, layer: Trained) -> None:
        layer.module._active = keep_top(finite(self.drop_scores(layer)), layer.goal)

    def _only_active(self, layer: Trained) -> Change:
        return self.change(layer, layer.goal)

    @torch.no_grad()
    def _decay(self) -> None:
        if self.exploration_decay == 0.0:
            return
        rates = {id(p): g["lr"] for g in self.optimizer.param_groups for p in g["params"]}
        for layer in self.layers:
            module = layer.module
            if not module.values.requires_grad:
                continue
            amount = float(rates[id(module.values)]) * self.exploration_decay
            density = layer.goal / layer.size
            assert module._active is not None
            decay = torch.where(module._active, amount, min(1.0, amount / density))
            module.values.mul_(1.0 - decay.to(module.values.dtype))


def _both_sets(sparsity: float | None, backward_sparsity: float | None) -> tuple[float, float]:
    """The sparsities of A and B."""
    forward = DEFAULT_SPARSITY if sparsity is None else check_sparsity(sparsity)
    if backward_sparsity is None:
        return forward, max(0.0, 2.0 * forward - 1.0)
    backward = check_sparsity(backward_sparsity, "backward_sparsity")
    if backward > forward:
        raise ValueError(
            "backward_sparsity must be in [0, sparsity]: the backward set holds the forward "
            f"set; got {backward!r} with sparsity = {forward!r}"
        )
    return forward, backward
