"""Whole models from dense to sparse and back.

Laws: ``to_dense(to_sparse(m))`` has the parameters and outputs of `m`; a failed call changes
nothing; parameters keep their order, dtype, requires_grad, and the layers their training flag.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsetrain.nn._base import DTYPES, SparseLayer, dense_weight
from sparsetrain.nn._replace import Replacement, check_replaceable, is_pruned, replace
from sparsetrain.nn._select import Place, Selection, _name_matches, select
from sparsetrain.nn.conv import SparseConv1d, SparseConv2d, SparseConv3d
from sparsetrain.nn.linear import SparseLinear
from sparsetrain.pattern import check_sparsity, nonzeros_for
from sparsetrain.sparsify.criteria import CRITERIA, keep_top
from sparsetrain.sparsify.distributions import DISTRIBUTIONS

# One line per type of layer that can be made sparse.
SPARSE_TYPES: dict[type[nn.Module], type[SparseLayer]] = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.Conv3d: SparseConv3d,
}

_Model = TypeVar("_Model", bound=nn.Module)


def sparsify(
    model: _Model,
    sparsity: float,
    *,
    distribution: str | Mapping[str, float] = "uniform",
    criterion: str | Mapping[str, Tensor] = "magnitude",
    include: Selection = None,
    exclude: Selection = None,
    generator: torch.Generator | None = None,
    inplace: bool = False,
) -> _Model:
    """Prunes a model's layers and makes them sparse.

    Args:
        model: any module. Layers that already are sparse are left alone.
        sparsity: fraction of the layers' weights left out, in [0, 1).
        distribution: how the remaining weights are divided among the layers. "uniform": every layer
            at `sparsity`. "erk": Erdos-Renyi-Kernel (Evci et al. 2020). "global": the highest
            scores of all layers together. A dict from layer names (or globs) to sparsities: the
            first that matches counts, `sparsity` for the others.
        criterion: which weights stay. "magnitude": the largest (Han et al. 2015), among equals the
            first. "random": any. A dict from layer names to scores of the weights' shapes: the
            highest, for instance by SNIP or Wanda (sparsetrain.scores).
        include, exclude: which layers; a name, a glob over names ("encoder.*.dense"), a module
            type, a predicate over (name, module), or a list of these. A name also stands for
            everything below it. Default: every layer that can be converted.
        generator: for the random criterion; torch's default generator when absent.
        inplace: False returns a converted deep copy and leaves `model` as it is; True converts
            `model` itself and returns it.

    Returns:
        The model with sparse layers; the number of weights left in each is exact.

    The first convolution of an image network and its classifier are small and sensitive, and are
    often kept dense: ``sparsify(resnet, 0.9, exclude=["conv1", "fc"])``, or by what they are,
    ``exclude=lambda name, layer: getattr(layer, "in_channels", None) == 3``.

    A layer of a subclass (of torch.nn.Linear, say) stays dense, with a warning, unless `include`
    gives its own name or type, which raises. The projection inside torch.nn.MultiheadAttention is
    one, since attention reads its weight directly; it stays dense silently. Forward and backward
    hooks are carried over; a gradient of a weight is not.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: sparsity outside [0, 1), unknown names, nothing to convert (says what the model
            holds), or a layer that cannot be converted: tied weights, parametrizations, hooks on
            its weight or state_dict, another device or dtype. Everything is as it was.
    """
    sparsity = check_sparsity(sparsity)
    if not isinstance(criterion, Mapping) and criterion not in CRITERIA:
        raise ValueError(
            f"criterion must be one of {_options(CRITERIA)} or a dict from layer names to scores; "
            f"got {criterion!r}"
        )
    check_distribution(distribution)
    chosen = select(model, tuple(SPARSE_TYPES), include, exclude)
    check_prunable(model, chosen, inplace)
    made = [
        Replacement(place, sparse_type(place).from_dense(place.module, mask))
        for place, mask in zip(
            chosen, masks(chosen, sparsity, distribution, criterion, generator), strict=True
        )
    ]
    return replace(model, made, inplace)  # type: ignore[return-value]


def to_sparse(
    model: _Model,
    *,
    min_sparsity: float = 0.5,
    include: Selection = None,
    exclude: Selection = None,
    inplace: bool = False,
) -> _Model:
    """Makes those layers sparse whose weights already are, keeping exactly their nonzeros.

    A layer pruned by torch.nn.utils.prune (weight_orig and weight_mask) keeps exactly what its mask
    keeps, with the values ``weight_orig * weight_mask``: a weight that the mask keeps stays part of
    the pattern even where it is zero, so that it may be trained. The mask and its hook are gone
    afterwards.

    Args:
        model: any module. Layers that already are sparse are left alone.
        min_sparsity: layers with a smaller fraction of zeros stay dense, in [0, 1); 0 converts all.
        include, exclude, inplace: as in `sparsify`.

    Returns:
        The model with sparse layers. A layer with no nonzero at all is converted with a warning.

    Raises:
        TypeError, ValueError: as `sparsify`; also where no layer is sparse enough, saying how
            sparse each is. Everything is as it was.
    """
    min_sparsity = check_sparsity(min_sparsity, "min_sparsity")
    selected = select(model, tuple(SPARSE_TYPES), include, exclude)
    found = {id(p.module): _zero_fraction(p) for p in selected}
    chosen = [p for p in selected if found[id(p.module)] >= min_sparsity]
    if not chosen:
        seen = ", ".join(f"{p.name} {found[id(p.module)]:.3f}" for p in selected[:40])
        raise ValueError(
            f"no layer to convert: none has a fraction of zeros of at least min_sparsity = "
            f"{min_sparsity}; found: {seen}. Lower min_sparsity, or prune with sparsetrain.sparsify"
        )
    check_replaceable(model, chosen, inplace)
    for place in chosen:
        _check_weight(place)
    made = [Replacement(p, sparse_type(p).from_dense(p.module)) for p in chosen]
    for item in made:
        if isinstance(item.new, SparseLayer) and item.new.nnz == 0:
            warnings.warn(
                f"layer {item.old.name} has no nonzero weight: it will give its bias alone and "
                f"never learn; exclude={item.old.name!r} keeps it dense",
                stacklevel=2,
            )
    return replace(model, made, inplace)  # type: ignore[return-value]


def to_dense(model: _Model, *, inplace: bool = False) -> _Model:
    """Makes every sparse layer of a model dense, zeros written out.

    Args:
        model: any module with sparse layers.
        inplace: as in `sparsify`.

    Raises:
        TypeError: `model` is no module.
        ValueError: no sparse layer (says what the model holds), or one that cannot be replaced.
            Everything is as it was.
    """
    chosen = select(model, (SparseLayer,), None, None, exact=False)
    check_replaceable(model, chosen, inplace)
    made = [
        Replacement(p, p.module.to_dense()) for p in chosen if isinstance(p.module, SparseLayer)
    ]
    return replace(model, made, inplace)  # type: ignore[return-value]


def check_prunable(model: nn.Module, chosen: Sequence[Place], inplace: bool) -> None:
    """Raises, as `sparsify` does, where a dense layer cannot be pruned and replaced."""
    check_replaceable(model, chosen, inplace)
    for place in chosen:
        if is_pruned(place.module):
            raise ValueError(
                f"layer {place.name} is already pruned by torch.nn.utils.prune: keep its mask with "
                "sparsetrain.to_sparse, or drop the mask with prune.remove(layer, 'weight')"
            )
        _check_weight(place)


def _options(table: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in table)


def sparse_type(place: Place) -> type[SparseLayer]:
    return SPARSE_TYPES[type(place.module)]


def _check_weight(place: Place) -> None:
    """Fails early, with the layer's name, where `from_dense` would."""
    weight, _ = dense_weight(place.module)
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"layer {place.name} is {weight.dtype}; sparse layers take torch.float32, "
            "torch.float64 or torch.bfloat16: convert it first, for example with .float()"
        )
    if weight.device.type != "cpu":
        raise ValueError(
            f"layer {place.name} is on device '{weight.device}'; sparse layers run on the CPU: "
            "move the model there first"
        )
    if weight.numel() == 0:
        raise ValueError(f"layer {place.name} has no weights: exclude={place.name!r}")


def _zero_fraction(place: Place) -> float:
    weight, mask = dense_weight(place.module)
    if weight.is_meta or weight.numel() == 0:
        return 0.0
    kept = int((weight != 0 if mask is None else mask).sum())
    return 1.0 - kept / weight.numel()


def check_distribution(distribution: Any) -> None:
    if isinstance(distribution, Mapping):
        for name, value in distribution.items():
            if not isinstance(name, str):
                raise TypeError(f"distribution: keys must be layer names or globs; got {name!r}")
            check_sparsity(value, f"distribution[{name!r}]")
    elif distribution not in (*DISTRIBUTIONS, "global"):
        raise ValueError(
            f"distribution must be one of {_options(DISTRIBUTIONS)}, 'global' or a dict from layer "
            f"names to sparsities; got {distribution!r}"
        )


def masks(
    chosen: Sequence[Place],
    sparsity: float,
    distribution: str | Mapping[str, float],
    criterion: str | Mapping[str, Tensor],
    generator: torch.Generator | None,
) -> list[Tensor]:
    """What each layer keeps: bool, of its weight's shape."""

    def score(place: Place) -> Tensor:
        if isinstance(criterion, Mapping):
            return _given_scores(place, criterion)
        try:
            return CRITERIA[criterion](dense_weight(place.module)[0], generator)
        except ValueError as error:
            raise ValueError(f"layer {place.name}: {error}") from error

    if distribution == "global":
        return _global_masks(chosen, [score(place) for place in chosen], sparsity)
    shapes = [tuple(dense_weight(place.module)[0].shape) for place in chosen]
    wanted = counts(chosen, shapes, sparsity, distribution)
    return [keep_top(score(place), count) for place, count in zip(chosen, wanted, strict=True)]


def counts(
    chosen: Sequence[Place],
    shapes: Sequence[tuple[int, ...]],
    sparsity: float,
    distribution: str | Mapping[str, float],
) -> list[int]:
    """How many weights each layer keeps, for every distribution but "global"."""
    if isinstance(distribution, Mapping):
        shares = sparsities_by_name(chosen, sparsity, distribution)
        return [
            nonzeros_for(torch.Size(shape).numel(), share)
            for shape, share in zip(shapes, shares, strict=True)
        ]
    return DISTRIBUTIONS[distribution](shapes, sparsity)


def _given_scores(place: Place, table: Mapping[str, Tensor]) -> Tensor:
    shape = tuple(dense_weight(place.module)[0].shape)
    scores = next((table[name] for name in place.names if name in table), None)
    if scores is None:
        raise ValueError(
            f"criterion has no scores for layer {place.name}; it has some for: "
            f"{', '.join(table)}. Add them, or exclude={place.name!r}"
        )
    if not isinstance(scores, Tensor) or tuple(scores.shape) != shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"criterion: the scores of layer {place.name} must have its weight's shape {shape}; "
            f"got {got}"
        )
    if bool(scores.isnan().any()):
        raise ValueError(f"criterion: the scores of layer {place.name} hold NaN")
    return scores.detach().to(torch.float64)


def _global_masks(
    chosen: Sequence[Place], scores: Sequence[Tensor], sparsity: float
) -> list[Tensor]:
    dtype = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
    together = torch.cat([score.reshape(-1).to(dtype) for score in scores])
    kept = keep_top(together, nonzeros_for(together.numel(), sparsity))
    result, start = [], 0
    for place, score in zip(chosen, scores, strict=True):
        mask = kept[start : start + score.numel()].view(score.shape)
        if not bool(mask.any()):
            raise ValueError(
                f"distribution 'global' at sparsity {sparsity} would leave layer {place.name} "
                f"without any weight: exclude={place.name!r}, lower the sparsity, or use 'erk'"
            )
        result.append(mask)
        start += score.numel()
    return result


def sparsities_by_name(
    chosen: Sequence[Place], sparsity: float, table: Mapping[str, float]
) -> list[float]:
    """What `table` asks of each layer; `sparsity` where it says nothing."""
    unused = set(table)
    found = []
    for place in chosen:
        matching = [k for k in table if any(_name_matches(k, name) for name in place.names)]
        unused -= set(matching)
        found.append(float(table[matching[0]]) if matching else sparsity)
    if unused:
        raise ValueError(
            f"distribution names {_options(dict.fromkeys(sorted(unused)))}, which matches no layer "
            f"to convert; the layers are: {', '.join(p.name for p in chosen)}"
        )
    return found
