"""Scores of weights that need data, for pruning at once: SNIP and Wanda.

Each gives a table from layer names to scores of the weight's shape, which `sparsify` takes as its
criterion:

    scores = sparsetrain.scores.snip(model, [lambda: loss_fn(model(x), y)])
    sparse = sparsetrain.sparsify(model, 0.9, criterion=scores, distribution="global")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.nn._select import Selection, select
from sparsetrain.nn.convert import SPARSE_TYPES

__all__ = ["snip", "wanda"]


def snip(
    model: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    *,
    include: Selection = None,
    exclude: Selection = None,
) -> dict[str, Tensor]:
    """|w * dL/dw|: how much the loss would change without a weight, to first order.

    Lee et al. 2019, "SNIP: Single-shot network pruning based on connection sensitivity". The
    gradients of all losses are summed first. The scores are comparable between layers, so
    ``distribution="global"`` is the paper's choice.

    Args:
        model: dense layers; its gradients, buffers and training flag stay as they are.
        losses: functions that compute the loss of a batch, a scalar.
        include, exclude: as in `sparsify`.

    Returns:
        Scores of each layer's weight, by the layer's name.

    Raises:
        TypeError: no functions, or no scalar. ValueError: no loss, no layer, or a layer whose
            weight the losses do not depend on.
    """
    places = select(model, tuple(SPARSE_TYPES), include, exclude)
    weights = [place.module.get_parameter("weight") for place in places]
    sums = [torch.zeros_like(weight) for weight in weights]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    flags = [weight.requires_grad for weight in weights]
    seen = 0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for compute in losses:
            loss = compute() if callable(compute) else compute
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not callable(compute):
                raise TypeError(
                    "losses must hold functions that return a scalar loss, such as "
                    f"lambda: loss_fn(model(x), y); got {type(loss).__name__}"
                )
            seen += 1
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            for place, total, grad in zip(places, sums, found, strict=True):
                if grad is None:
                    raise ValueError(
                        f"the loss does not depend on layer {place.name}: exclude={place.name!r}"
                    )
                total += grad
    finally:
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    if not seen:
        raise ValueError("losses is empty: give at least one function that computes a loss")
    return {
        place.name: (weight.detach() * total).abs()
        for place, weight, total in zip(places, weights, sums, strict=True)
    }


def wanda(
    model: nn.Module,
    runs: Iterable[Callable[[], Any]],
    *,
    per_output: bool = True,
    include: Selection = None,
    exclude: Selection = None,
) -> dict[str, Tensor]:
    """|w| times the norm of the input that the weight sees.

    Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models". The norm
    of input feature j is over all samples and positions; for a convolution, of input channel j.

    Args:
        model: dense layers; its buffers and training flag stay as they are.
        runs: functions that run the model on a batch; nothing of their results is used.
        per_output: compare weights within each output only, as the paper does: the score is then
            the share of the output's weights that score lower, so every output keeps about as many.
        include, exclude: as in `sparsify`.

    Returns:
        Scores of each layer's weight, by the layer's name.

    Raises:
        TypeError: no functions. ValueError: no run, no layer, or a layer that no run has used.
    """
    places = select(model, tuple(SPARSE_TYPES), include, exclude)
    squares: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            squares[name] = squares.get(name, 0) + _squared_norms(x, module)

        return module.register_forward_pre_hook(see)

    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    handles = [watch(place.name, place.module) for place in places]
    seen = 0
    try:
        with torch.no_grad():
            for run in runs:
                if not callable(run):
                    raise TypeError(
                        "runs must hold functions, such as lambda: model(x); "
                        f"got {type(run).__name__}"
                    )
                run()
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)
    if not seen:
        raise ValueError("runs is empty: give at least one function that runs the model")
    unused = [place.name for place in places if place.name not in squares]
    if unused:
        raise ValueError(f"no run has used layer {unused[0]}: exclude={unused[0]!r}")
    scores = {}
    for place in places:
        weight = place.module.get_parameter("weight").detach()
        score = weight.abs() * _for_weight(squares[place.name].sqrt(), place.module, weight)
        scores[place.name] = _ranks_in_row(score) if per_output else score
    return scores


def _squared_norms(x: Tensor, module: nn.Module) -> Tensor:
    """(I,) or (C,): the sum of squares of each input feature or channel."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).square().sum(0)
    channels = x.dim() - len(module.get_parameter("weight").shape[2:]) - 1
    others = [d for d in range(x.dim()) if d != channels]
    return x.square().sum(others)


def _for_weight(norms: Tensor, module: nn.Module, weight: Tensor) -> Tensor:
    """The norms in a shape that multiplies the weight (out, in / groups, ...)."""
    groups = int(getattr(module, "groups", 1))
    each = norms.view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return each.view(*weight.shape[:2], *[1] * (weight.dim() - 2))


def _ranks_in_row(scores: Tensor) -> Tensor:
    """Each score's rank among those of its output, in [0, 1); of equals the first is the higher."""
    flat = scores.reshape(scores.shape[0], -1).flip(1)
    ranks = flat.argsort(dim=1, stable=True).argsort(dim=1).flip(1)
    shares: Tensor = ranks / flat.shape[1]
    return shares.view(scores.shape)
