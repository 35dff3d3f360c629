"""Pure score functions: the higher a weight's score, the longer it stays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Criterion = Callable[[Tensor, "torch.Generator | None"], Tensor]


def magnitude(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """|w| (Han et al. 2015), float32 or float64, of the weight's shape.

    Raises:
        ValueError: the weight holds NaN, which has no magnitude.
    """
    scores = weight.detach().abs()
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    if bool(scores.isnan().any()):
        raise ValueError("the weight holds NaN, which has no magnitude to prune by")
    return scores


def random(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform in [0, 1), float32, of the weight's shape; torch's default generator if absent."""
    return torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu")


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude, "random": random}


def keep_top(scores: Tensor, count: int) -> Tensor:
    """The mask of the `count` highest scores; among equals the first in memory order stay.

    Args:
        scores: any shape, no NaN.
        count: exactly how many to keep, 0 to ``scores.numel()``.

    Returns:
        bool, of the scores' shape, with exactly `count` true elements.
    """
    size = scores.numel()
    if not 0 <= count <= size:
        raise ValueError(f"count must be between 0 and {size}, the number of scores; got {count}")
    if count == size or count == 0:
        return torch.full(scores.shape, count > 0, dtype=torch.bool, device=scores.device)
    flat = scores.reshape(-1)
    threshold = flat.kthvalue(size - count + 1).values
    keep = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    keep[ties[: count - int(keep.sum())]] = True
    return keep.view(scores.shape)
