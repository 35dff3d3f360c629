"""Optimizer surgery: what happens to a Parameter's place and state when its elements change.

Works on ``optimizer.param_groups`` and ``optimizer.state`` alone, so it serves every optimizer that
keeps per-element state as tensors of the Parameter's shape (SGD, Adam, AdamW, RMSprop, Adagrad and
relatives, foreach and fused or not). Tensors of other shapes, such as `step`, are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_REFUSED: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: "keeps one flat state for all parameters, which cannot follow a change of "
    "topology",
    torch.optim.Muon: "works on matrices, and the values of a sparse layer are a vector",
}


def check_owner(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises unless the optimizer updates each of the named parameters.

    Raises:
        TypeError: no torch optimizer.
        ValueError: a parameter that it does not own, or an optimizer without per-element state.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {optimizer!r}")
    for kind, reason in _REFUSED.items():
        if isinstance(optimizer, kind):
            raise ValueError(
                f"optimizer {kind.__name__} {reason}: use SGD, Adam, AdamW, RMSprop or Adagrad"
            )
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in owned]
    if missing:
        raise ValueError(
            f"optimizer does not own the weights of {', '.join(missing[:10])}"
            f"{' and others' if len(missing) > 10 else ''}: make it from the parameters of this "
            "model (and not of a copy), or leave these layers out with exclude="
        )
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer keeps state {key!r} of shape {tuple(value.shape)} for {name}, of "
                    f"shape {tuple(parameter.shape)}: only state of the same shape can follow a "
                    "change of topology"
                )


def replace_parameter(
    optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, index: Tensor
) -> None:
    """`new` takes the place of `old`, with the state of its elements ``old.flatten()[index]``.

    Args:
        optimizer: owns `old`.
        old: any shape.
        new: (n,), or any shape with n elements.
        index: int64 (n,), positions in ``old.reshape(-1)``.
    """
    for group in optimizer.param_groups:
        if "param_names" in group:  # an optimizer made from named_parameters()
            group["param_names"] = [
                f"{name.removesuffix('weight')}values" if p is old else name
                for name, p in zip(group["param_names"], group["params"], strict=True)
            ]
        group["params"] = [new if p is old else p for p in group["params"]]
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            state[key] = value.reshape(-1)[index].view(new.shape)
    optimizer.state[new] = state


def carry_state(optimizer: Optimizer, parameter: nn.Parameter, length: int, source: Tensor) -> None:
    """Gives the state of a Parameter that has changed its elements to the new ones.

    Args:
        optimizer: owns `parameter`.
        parameter: its values have changed already.
        length: how many elements it had before.
        source: int32 (n,), where each element was before, or -1 for a newcomer: its state is zero.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == (length,):
            state[key] = gather(value, source)


def gather(values: Tensor, source: Tensor) -> Tensor:
    """(n,): ``values[source]``, zero where source is -1."""
    with torch.no_grad():
        if values.numel() == 0:
            return values.new_zeros(source.shape)
        taken = values.detach().index_select(0, source.clamp(min=0))
        return taken.masked_fill_(source < 0, 0)
