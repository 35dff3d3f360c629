"""The first act of a sparsifier: which layers, how many weights each, and dense ones made sparse.

Everything is checked before anything changes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.nn import convert
from sparsetrain.nn._base import SparseLayer, dense_weight
from sparsetrain.nn._replace import Replacement, replace
from sparsetrain.nn._select import Place, Selection, select
from sparsetrain.pattern import check_sparsity, nonzeros_for
from sparsetrain.sparsify import _optimizer
from sparsetrain.sparsify._distributed import Ranks
from sparsetrain.sparsify.criteria import keep_top


@dataclass
class Trained:
    """A layer under a sparsifier.

    Attributes:
        name: in the model.
        module: the sparse layer.
        goal: how many weights it shall have in the end.
        first: how many it had at first.
        dropped, grown: weights that went and came in the last update.
        started, explored: packed masks (see _monitor.pack): the first pattern, and all since.
    """

    name: str
    module: SparseLayer
    goal: int
    first: int = 0
    dropped: int = 0
    grown: int = 0
    started: Tensor | None = None
    explored: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of weights of the dense layer."""
        return math.prod(self.module.weight_shape)

    @property
    def nnz(self) -> int:
        return self.module.nnz


@dataclass(frozen=True)
class Wishes:
    """What the user asked for."""

    sparsity: float | None
    distribution: str | Mapping[str, float]
    include: Selection
    exclude: Selection
    initial: str  # a criterion, or "dense"
    prunes: bool  # whether a sparse model may become sparser


DEFAULT_SPARSITY = 0.9


def prepare(
    model: nn.Module,
    optimizer: Optimizer,
    wishes: Wishes,
    generator: torch.Generator,
    ranks: Ranks,
) -> list[Trained]:
    """The layers to train, after making them sparse in `model` and `optimizer` if they are not.

    Raises:
        TypeError, ValueError: as `sparsify`; also an optimizer that does not own the weights, or a
            sparsity that leaves a layer without any. Everything is as it was.
    """
    if wishes.sparsity is not None:
        check_sparsity(wishes.sparsity)
    convert.check_distribution(wishes.distribution)
    if any(isinstance(m, SparseLayer) for m in model.modules()):
        return _already_sparse(model, optimizer, wishes)
    return _make_sparse(model, optimizer, wishes, generator, ranks)


def _already_sparse(model: nn.Module, optimizer: Optimizer, wishes: Wishes) -> list[Trained]:
    chosen = select(model, (SparseLayer,), wishes.include, wishes.exclude, exact=False)
    layers = [p.module for p in chosen if isinstance(p.module, SparseLayer)]
    _optimizer.check_owner(
        optimizer, {p.name: layer.values for p, layer in zip(chosen, layers, strict=True)}
    )
    goals = [layer.nnz for layer in layers]
    if wishes.sparsity is not None and wishes.prunes:
        wanted = _goals(chosen, layers, wishes.sparsity, wishes.distribution)
        goals = [min(g, w) for g, w in zip(goals, wanted, strict=True)]
    elif wishes.sparsity is not None:
        total = sum(math.prod(layer.weight_shape) for layer in layers)
        present = 1.0 - sum(goals) / total
        if abs(present - wishes.sparsity) > max(0.0005, len(layers) / total):
            raise ValueError(
                f"sparsity = {wishes.sparsity}, but the model is sparse already, at {present:.4f}, "
                "and this algorithm keeps the number of weights: leave sparsity out, or begin "
                "with the dense model, or prune it with GMP"
            )
    return [
        Trained(place.name, layer, goal, first=layer.nnz)
        for place, layer, goal in zip(chosen, layers, goals, strict=True)
    ]


def _make_sparse(
    model: nn.Module,
    optimizer: Optimizer,
    wishes: Wishes,
    generator: torch.Generator,
    ranks: Ranks,
) -> list[Trained]:
    chosen = select(model, tuple(convert.SPARSE_TYPES), wishes.include, wishes.exclude)
    convert.check_prunable(model, chosen, inplace=True)
    weights = {place.name: place.module._parameters["weight"] for place in chosen}
    owned = {name: weight for name, weight in weights.items() if weight is not None}
    _optimizer.check_owner(optimizer, owned)
    sparsity = DEFAULT_SPARSITY if wishes.sparsity is None else wishes.sparsity
    start = "magnitude" if wishes.initial == "dense" else wishes.initial
    masks = convert.masks(chosen, sparsity, wishes.distribution, start, generator)
    goals = [int(mask.sum()) for mask in masks]
    _check_goals(chosen, masks, sparsity, wishes.distribution)
    if wishes.initial == "dense":
        masks = [torch.ones_like(mask) for mask in masks]
    made = []
    for place, mask in zip(chosen, masks, strict=True):
        same = ranks.broadcast(mask.to(torch.uint8)) != 0
        made.append(Replacement(place, convert.sparse_type(place).from_dense(place.module, same)))
    replace(model, made, inplace=True)
    trained = []
    for item, goal in zip(made, goals, strict=True):
        layer, old = item.new, item.old.module._parameters["weight"]
        assert isinstance(layer, SparseLayer)
        assert old is not None
        index = layer.pattern.flat_indices()
        _optimizer.replace_parameter(optimizer, old, layer.values, index)
        trained.append(Trained(item.old.name, layer, goal, first=layer.nnz))
    return trained


def _goals(
    chosen: Sequence[Place],
    layers: Sequence[SparseLayer],
    sparsity: float,
    distribution: str | Mapping[str, float],
) -> list[int]:
    shapes = [layer.weight_shape for layer in layers]
    if distribution == "global":
        scores = [layer.values.detach().abs() for layer in layers]
        total = nonzeros_for(sum(math.prod(shape) for shape in shapes), sparsity)
        return pooled_counts(scores, min(total, sum(map(len, scores))))
    return convert.counts(chosen, shapes, sparsity, distribution)


def pooled_counts(scores: Sequence[Tensor], total: int) -> list[int]:
    """How many of the `total` highest scores of all layers together are in each; at least one."""
    kept = keep_top(torch.cat([s.double() for s in scores]), total)
    return [max(1, int(part.sum())) for part in torch.split(kept, [len(s) for s in scores])]


def _check_goals(
    chosen: Sequence[Place],
    masks: Sequence[Tensor],
    sparsity: float,
    distribution: str | Mapping[str, float],
) -> None:
    """Raises where rounding would leave a layer nothing; warns where some row must stay empty."""
    thin = []
    for place, mask in zip(chosen, masks, strict=True):
        weight = dense_weight(place.module)[0]
        kept, rows = int(mask.sum()), weight.shape[0]
        if distribution == "uniform" and (1.0 - sparsity) * weight.numel() < 0.5:
            raise ValueError(
                f"sparsity = {sparsity} rounds to no weight at all in layer {place.name}, which "
                f"has {weight.numel()}: lower it, exclude={place.name!r}, or use "
                "distribution='erk', which keeps small layers denser"
            )
        if kept < rows:
            thin.append(f"{place.name} ({kept} weights for {rows} outputs)")
    total = sum(mask.numel() for mask in masks)
    if (1.0 - sparsity) * total < len(masks) and not isinstance(distribution, Mapping):
        raise ValueError(
            f"sparsity = {sparsity} leaves {(1.0 - sparsity) * total:.1f} weights for "
            f"{len(masks)} layers: lower it so that each has at least one"
        )
    if thin:
        warnings.warn(
            f"fewer weights than outputs, so some outputs will be their bias alone: "
            f"{', '.join(thin[:10])}; lower the sparsity or exclude these layers",
            stacklevel=5,
        )
