"""Which implementation computes which product of a convolution.

One pure function of plain numbers, with the reason attached to each answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from sparsetrain._conv_shapes import output_size

__all__ = ["DIRECTIONS", "Choice", "Direction", "Problem", "choose", "explain"]

Direction = Literal["forward", "grad_input", "grad_values"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "grad_input", "grad_values")


class Problem(NamedTuple):
    """One layer on one input."""

    input_shape: Sequence[int]  # (N, C, H, W) or (N, C, D, H, W)
    out_channels: int
    nnz: int
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    dtype: torch.dtype
    deterministic: bool = False  # torch.are_deterministic_algorithms_enabled()

    @property
    def weights(self) -> int:
        """Number of weights of the dense layer."""
        channels = self.input_shape[1] // self.groups
        return self.out_channels * channels * math.prod(self.kernel_size)

    @property
    def density(self) -> float:
        return self.nnz / self.weights if self.weights else 0.0


class Choice(NamedTuple):
    """`family`: "native" (kernels over NCHW), "unfolded" (the native kernels on depth slices laid
    side by side as channels) or "dense" (values written into a dense weight, library product)."""

    family: str
    reason: str


_NATIVE = Choice("native", "sparse enough for the sparse kernels")
_UNFOLDED = Choice("unfolded", "sparse enough for the sparse kernels, depth taps as channels")
_NATIVE_FIXED = Choice("native", "deterministic algorithms are asked for")
_UNFOLDED_FIXED = Choice("unfolded", "deterministic algorithms are asked for")
_DENSE_GROUPS = Choice("dense", "fewer than 4 nonzeros per output channel in small groups")
_DENSE_DENSITY = Choice("dense", "above the density at which the library product is faster")

# Densities up to which the sparse kernels win.
_BREAK_EVEN: dict[Direction, float] = {"forward": 0.5, "grad_input": 0.5, "grad_values": 0.5}
_BREAK_EVEN_UNFOLDED = 0.3


def choose(direction: Direction, problem: Problem) -> Choice:
    """The implementation for one product; the first line that applies counts.

    | when                                                              | family            |
    |-------------------------------------------------------------------|-------------------|
    | torch.use_deterministic_algorithms(True)                          | native, unfolded  |
    | no more than 4 x 4 channels per group (depthwise too), float32    | dense             |
    | density above the break-even of the direction                     | dense             |
    | otherwise                                                         | native, unfolded  |

    native is for 1-D and 2-D convolutions, unfolded for 3-D ones. Only these two give the same bits
    for any number of threads.
    """
    deep = len(problem.kernel_size) == 3
    if problem.deterministic:
        return _UNFOLDED_FIXED if deep else _NATIVE_FIXED
    groups = problem.groups
    if groups > 1 and max(problem.out_channels, problem.input_shape[1]) <= 4 * groups:
        return _DENSE_GROUPS
    if problem.density > (_BREAK_EVEN_UNFOLDED if deep else _BREAK_EVEN[direction]):
        return _DENSE_DENSITY
    return _UNFOLDED if deep else _NATIVE


def explain(problem: Problem) -> str:
    """What is chosen for each product, and why: one line each."""
    batch, _, *size = problem.input_shape
    size = output_size(size, problem.kernel_size, problem.stride, problem.padding, problem.dilation)
    lines = [
        f"{tuple(problem.input_shape)} -> {(batch, problem.out_channels, *size)}, "
        f"{problem.nnz} of {problem.weights} weights ({problem.density:.1%}), {problem.dtype}"
    ]
    for direction in DIRECTIONS:
        choice = choose(direction, problem)
        lines.append(f"{direction:12} {choice.family:9} {choice.reason}")
    return "\n".join(lines)
