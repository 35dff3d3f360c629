"""Which implementation computes which product of a convolution.

One pure function of plain numbers, with the reason attached to each answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sparsetrain._conv_shapes import output_size
from sparsetrain._planner import DIRECTIONS, Choice, Direction

__all__ = ["Problem", "choose", "explain"]


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
    threads: int = 1

    @property
    def weights(self) -> int:
        """Number of weights of the dense layer."""
        channels = self.input_shape[1] // self.groups
        return self.out_channels * channels * math.prod(self.kernel_size)

    @property
    def density(self) -> float:
        return self.nnz / self.weights if self.weights else 0.0


_SPARSE = {
    False: Choice("native", "sparse enough for the sparse kernels"),
    True: Choice("unfolded", "sparse enough for the sparse kernels"),
}
_DETERMINISTIC = {
    False: Choice("native", "deterministic algorithms are asked for"),
    True: Choice("unfolded", "deterministic algorithms are asked for"),
}
_UNREAD = Choice("native", "the stride leaves most of the input unread")
_SMALL = Choice("native", "too little work for the library's fixed costs")
_DEPTHWISE = Choice(
    "dense", "one input channel per group leaves the sparse kernels nothing to skip"
)
_DENSE = Choice("dense", "above the density at which the library product is faster")

# The density up to which the sparse kernels win, by dtype. Measured at batches 1 to 8 on one thread
# of a CPU with AVX-512 and its bfloat16 products, on the layers of ResNet: float32 between 0.5
# (128 channels, 28 x 28) and 0.8 (batch 1, or 64 channels, 56 x 56); bfloat16 0.2 to 0.4; float64,
# which the library has no convolution of its own for, 0.7 and more. Unfolding costs as much again.
_BREAK_EVEN = {torch.float32: 0.55, torch.bfloat16: 0.25, torch.float64: 0.75}
_UNFOLDED_SHARE = 0.5


def choose(direction: Direction, problem: Problem) -> Choice:
    """The implementation for one product; the first line that applies counts.

    | when                                                          | family            |
    |---------------------------------------------------------------|-------------------|
    | torch.use_deterministic_algorithms(True)                      | native, unfolded  |
    | one input channel per group (depthwise); not in float64       | dense             |
    | less than a million multiplications, 2-D                      | native            |
    | grad_input of a 1 x 1 kernel with a stride, 2-D               | native            |
    | density above 0.55 (float32), 0.25 (bfloat16), 0.75 (float64) | dense             |
    | the same, but 3-D: half of these                              | dense             |
    | otherwise                                                     | native, unfolded  |

    native is for 1-D and 2-D convolutions, unfolded for 3-D ones. Only these two give the same bits
    for any number of threads.
    """
    deep = len(problem.kernel_size) == 3
    if problem.deterministic:
        return _DETERMINISTIC[deep]
    channels = problem.input_shape[1] // problem.groups
    if channels == 1 and problem.groups > 1 and problem.dtype is not torch.float64:
        return _DEPTHWISE
    taps, steps = math.prod(problem.kernel_size), math.prod(problem.stride)
    pixels = problem.input_shape[0] * math.prod(problem.input_shape[2:]) // steps
    if not deep and pixels * problem.nnz < 1_000_000:
        return _SMALL
    if direction == "grad_input" and not deep and taps == 1 and steps > 1:
        return _UNREAD
    break_even = _BREAK_EVEN[problem.dtype] * (_UNFOLDED_SHARE if deep else 1.0)
    return _DENSE if problem.density > break_even else _SPARSE[deep]


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
