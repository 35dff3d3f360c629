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
from sparsetrain.nn._base import SparseLayer
from sparsetrain.nn._replace import Replacement, replace
from sparsetrain.nn._select import Place, Selection, places, select
from sparsetrain.pattern import check_sparsity, nonzeros_for
from sparsetrain.sparsify import _optimizer
from sparsetrain.sparsify._distributed import Ranks
from sparsetrain.sparsify.criteria import keep_top
from sparsetrain.sparsify.distributions import DISTRIBUTIONS


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
    share: float = 1.0  # of the weights that a layer stores, those that the forward pass uses


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
    if is_sparse(model):
        return _already_sparse(model, optimizer, wishes)
    return _make_sparse(model, optimizer, wishes, generator, ranks)


def is_sparse(model: nn.Module) -> bool:
    """Whether some layer is sparse already."""
    return any(isinstance(m, SparseLayer) for m in model.modules())


def _already_sparse(model: nn.Module, optimizer: Optimizer, wishes: Wishes) -> list[Trained]:
    chosen = select(model, (SparseLayer,), wishes.include, wishes.exclude, exact=False)
    layers = [p.module for p in chosen if isinstance(p.module, SparseLayer)]
    _optimizer.check_owner(
        optimizer, {p.name: layer.values for p, layer in zip(chosen, layers, strict=True)}
    )
    _check_untied(model, chosen)
    goals = [layer.nnz for layer in layers]
    if wishes.sparsity is not None:
        _check_present(layers, wishes.sparsity, wishes.prunes)
        if wishes.prunes:
            goals = _goals(chosen, layers, wishes.sparsity, wishes.distribution)
            shapes = [layer.weight_shape for layer in layers]
            _check_goals(chosen, shapes, goals, wishes.sparsity, wishes)
    for place, count in zip(chosen, goals, strict=True):
        if wishes.share < 1.0 and count * wishes.share < 0.5:
            raise ValueError(
                f"layer {place.name} has {count} weights, of which the forward pass would use none "
                f"({count * wishes.share:.2f}): lower sparsity, or exclude={place.name!r}"
            )
    return [
        Trained(place.name, layer, goal, first=layer.nnz)
        for place, layer, goal in zip(chosen, layers, goals, strict=True)
    ]


def _check_present(layers: Sequence[SparseLayer], sparsity: float, prunes: bool) -> None:
    """Raises where sparse layers cannot get to `sparsity`."""
    total = sum(math.prod(layer.weight_shape) for layer in layers)
    present = 1.0 - sum(layer.nnz for layer in layers) / total
    apart = present - sparsity if prunes else abs(present - sparsity)
    if apart > max(0.0005, len(layers) / total):
        reason = "gives no weights back" if prunes else "keeps the number of weights"
        advice = "a higher one" if prunes else "prune it with GMP"
        raise ValueError(
            f"sparsity = {sparsity}, but the model is sparse already, at {present:.4f}, and this "
            f"algorithm {reason}: leave sparsity out, or begin with the dense model, or {advice}"
        )


def _make_sparse(
    model: nn.Module,
    optimizer: Optimizer,
    wishes: Wishes,
    generator: torch.Generator,
    ranks: Ranks,
) -> list[Trained]:
    chosen = select(model, tuple(convert.SPARSE_TYPES), wishes.include, wishes.exclude)
    convert.check_prunable(model, chosen, inplace=True)
    frozen = [p.name for p in chosen if not p.module.get_parameter("weight").requires_grad]
    if frozen:
        raise ValueError(
            f"the weights of {', '.join(frozen[:10])}{' and others' if frozen[10:] else ''} do not "
            "learn (requires_grad=False), so training cannot make up for those that would go: "
            f"exclude={frozen[0]!r}, or prune them with sparsetrain.sparsify"
        )
    weights = {place.name: place.module._parameters["weight"] for place in chosen}
    owned = {name: weight for name, weight in weights.items() if weight is not None}
    _optimizer.check_owner(optimizer, owned)
    sparsity = DEFAULT_SPARSITY if wishes.sparsity is None else wishes.sparsity
    start = "magnitude" if wishes.initial == "dense" else wishes.initial
    masks = convert.masks(chosen, sparsity, wishes.distribution, start, generator)
    goals = [int(mask.sum()) for mask in masks]
    shapes = [tuple(mask.shape) for mask in masks]
    _check_goals(chosen, shapes, goals, sparsity, wishes)
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
    most = [layer.nnz for layer in layers]
    if isinstance(distribution, str):
        return DISTRIBUTIONS[distribution](shapes, sparsity, most)
    return list(map(min, convert.counts(chosen, shapes, sparsity, distribution), most))


def pooled_counts(scores: Sequence[Tensor], total: int) -> list[int]:
    """How many of the `total` highest scores of all layers together are in each; at least one."""
    kept = keep_top(torch.cat([s.double() for s in scores]), total)
    return [max(1, int(part.sum())) for part in torch.split(kept, [len(s) for s in scores])]


def _check_untied(model: nn.Module, chosen: Sequence[Place]) -> None:
    """Raises where a layer shares its `values` with another module, whose pattern would stay."""
    users: dict[int, list[str]] = {}
    for place in places(model):
        for key, parameter in place.module._parameters.items():
            users.setdefault(id(parameter), []).append(f"{place.name}.{key}")
    for place in chosen:
        names = users[id(place.module._parameters["values"])]
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one tensor, but each layer would change its own "
                f"pattern: use one layer in both places, untie them, or exclude={place.name!r}"
            )


def _check_goals(
    chosen: Sequence[Place],
    shapes: Sequence[tuple[int, ...]],
    goals: Sequence[int],
    sparsity: float,
    wishes: Wishes,
) -> None:
    """Raises where rounding would leave a layer nothing; warns where some row must stay empty."""
    sizes = [math.prod(shape) for shape in shapes]
    for place, size, own in zip(chosen, sizes, _own(chosen, sparsity, wishes), strict=True):
        if own is not None and (1.0 - own) * wishes.share * size < 0.5:
            raise ValueError(
                f"sparsity = {1.0 - (1.0 - own) * wishes.share:g} rounds to no weight at all in "
                f"layer {place.name}, which has {size}: lower it, exclude={place.name!r}, or use "
                "distribution='erk', which keeps small layers denser"
            )
    total = (1.0 - sparsity) * wishes.share * sum(sizes)
    if total < len(sizes) and not isinstance(wishes.distribution, Mapping):
        raise ValueError(
            f"sparsity = {1.0 - (1.0 - sparsity) * wishes.share:g} leaves {total:.1f} weights for "
            f"{len(sizes)} layers: lower it so that each has at least one"
        )
    kept = [round(goal * wishes.share) for goal in goals]
    thin = [
        f"{place.name} ({count} weights for {shape[0]} outputs)"
        for place, shape, count in zip(chosen, shapes, kept, strict=True)
        if count < shape[0]
    ]
    if thin:
        warnings.warn(
            f"fewer weights than outputs, so some outputs will be their bias alone: "
            f"{', '.join(thin[:10])}; lower the sparsity or exclude these layers",
            stacklevel=5,
        )


def _own(chosen: Sequence[Place], sparsity: float, wishes: Wishes) -> Sequence[float | None]:
    """The sparsity that was asked of each layer by itself, None where layers share the weights."""
    if isinstance(wishes.distribution, Mapping):
        return convert.sparsities_by_name(chosen, sparsity, wishes.distribution)
    return [sparsity if wishes.distribution == "uniform" else None] * len(chosen)
