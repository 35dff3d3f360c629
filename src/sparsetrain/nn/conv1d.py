"""The Conv1D of `transformers` (GPT-2's linear layer, its weight transposed), and torch.nn.Linear.

Sparse layers come from torch's own types, so such a model is rewritten first, and back afterwards:

    model = sparsetrain.sparsify(sparsetrain.to_linear(gpt2), 0.9, exclude="lm_head")
    ...
    gpt2 = sparsetrain.to_conv1d(sparsetrain.to_dense(model))  # for save_pretrained
"""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch
from torch import nn

from sparsetrain.nn._base import SparseLayer
from sparsetrain.nn._replace import Replacement, check_replaceable, is_pruned, replace
from sparsetrain.nn._select import Place, check_model, is_conv1d, places, select

_Model = TypeVar("_Model", bound=nn.Module)


def to_linear(model: _Model, *, inplace: bool = False) -> _Model:
    """Replaces each Conv1D of `transformers` by a torch.nn.Linear that computes the same.

    Its weight is the transposed one, a copy; its bias is the same. Attributes of the layer (`nf`,
    `nx`) and hooks go over to the new one; by them `to_conv1d` finds its way back.

    Args:
        model: any module, for instance a GPT-2. Its other layers are left alone.
        inplace: False returns a converted deep copy; True converts `model` itself and returns it.

    Raises:
        TypeError: `model` is no module.
        ValueError: no Conv1D, or one that cannot be replaced (tied weights, hooks on its weight or
            state_dict, a pruning mask). Everything is as it was.
    """
    kinds = tuple({type(p.module) for p in places(check_model(model)) if is_conv1d(p.module)})
    if not kinds:
        raise ValueError(
            f"model {type(model).__name__} has no Conv1D of transformers; sparsify and to_sparse "
            "take its other linear layers as they are"
        )
    chosen = select(model, kinds, None, None)
    check_replaceable(model, chosen, inplace)
    for place in chosen:
        if is_pruned(place.module):
            raise ValueError(
                f"layer {place.name} is pruned by torch.nn.utils.prune: make that permanent with "
                "prune.remove(layer, 'weight')"
            )
    made = [Replacement(place, _linear(place.module)) for place in chosen]
    return replace(model, made, inplace)  # type: ignore[return-value]


def to_conv1d(model: _Model, *, inplace: bool = False) -> _Model:
    """Undoes `to_linear`: the same layers are Conv1D of `transformers` again.

    Args:
        model: from `to_linear`, dense (`to_dense` makes sparse layers so).
        inplace: as in `to_linear`.

    Raises:
        TypeError: `model` is no module.
        ValueError: no layer that `to_linear` has made, one that is sparse, or one that cannot be
            replaced. Everything is as it was.
    """
    made_here = [p for p in places(check_model(model)) if _was_conv1d(p.module)]
    sparse = [p.name for p in made_here if isinstance(p.module, SparseLayer)]
    if sparse:
        raise ValueError(
            f"layer {sparse[0]} is sparse: make the model dense first, with sparsetrain.to_dense"
        )
    if not made_here:
        raise ValueError(f"model {type(model).__name__} has no layer made by sparsetrain.to_linear")
    check_replaceable(model, made_here, inplace)
    made = [Replacement(place, _conv1d(place)) for place in made_here]
    return replace(model, made, inplace)  # type: ignore[return-value]


def _was_conv1d(module: nn.Module) -> bool:
    kinds = (nn.Linear, SparseLayer)
    return isinstance(module, kinds) and "nf" in vars(module) and "nx" in vars(module)


def _linear(conv: Any) -> nn.Linear:
    weight = conv.weight
    inputs, outputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(
        weight.detach().t().contiguous(), requires_grad=weight.requires_grad
    )
    return linear.train(conv.training)  # its bias is carried over


def _conv1d(place: Place) -> nn.Module:
    linear: Any = place.module
    kind: Any = sys.modules["transformers.pytorch_utils"].Conv1D
    with torch.device("meta"):  # draws no random numbers; its bias is carried over
        conv: nn.Module = kind(linear.nf, linear.nx)
    conv.weight = nn.Parameter(
        linear.weight.detach().t().contiguous(), requires_grad=linear.weight.requires_grad
    )
    return conv.train(linear.training)
