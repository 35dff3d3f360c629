"""Which implementation computes which product of a convolution.

One pure function of plain numbers, with the reason attached to each answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from sparsetrain import _native
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
_SMALL = Choice("native", "too little work for the library's fixed costs")
_DEPTHWISE = Choice(
    "dense", "one input channel per group leaves the sparse kernels nothing to skip"
)
_DENSE = Choice("dense", "above the density at which the library product is faster")

# The density up to which the sparse kernels win. float32, by what was measured on the layers of
# ResNet at batches 1, 8 and 32 with one thread of CPUs with AVX2 (Zen 3) and AVX-512 (Zen 4, and
# with two threads), for batches that fill vectors or not, kernels above 1 x 1 or not.
_BreakEvens = dict[Direction, float]
_FILLED: _BreakEvens = {"forward": 0.75, "grad_input": 0.70, "grad_values": 0.85}
_FILLED_1X1: _BreakEvens = {"forward": 0.60, "grad_input": 0.80, "grad_values": 0.50}
_FEW: _BreakEvens = {"forward": 0.65, "grad_input": 0.45, "grad_values": 0.45}
_FEW_1X1: _BreakEvens = {"forward": 0.60, "grad_input": 0.60, "grad_values": 0.50}
_LANES = _native.vector_lanes()[0]
_HAS_512_BITS = _LANES >= 16
_FEW_1X1_512_BITS: _BreakEvens = {"forward": 0.72, "grad_input": 0.80, "grad_values": 0.65}
# By the linear layer's kernels (csrc/kernels/conv_columns-inl.h); and fewer pixels, all images
# together, than fill a tile (7 x 7 at batch 1).
_PIXELS, _COLUMNS_CHANNELS = 64, 256
_COLUMNS: _BreakEvens = {"forward": 0.75, "grad_input": 0.74, "grad_values": 0.78}
_COLUMNS_STRIDED = 0.85  # grad_input
_COLUMNS_1X1: _BreakEvens = {"forward": 0.85, "grad_input": 0.80, "grad_values": 0.72}
_FEW_PIXELS: _BreakEvens = {"forward": 0.95, "grad_input": 0.62, "grad_values": 0.95}
_FEW_PIXELS_1X1: _BreakEvens = {"forward": 0.90, "grad_input": 0.80, "grad_values": 0.72}
# A stride leaves the library less to gain in grad_input, and more in forward.
_STRIDED, _STRIDED_FEW, _STRIDED_1X1 = 0.75, 0.60, 1.0
_STRIDED_FEW_FORWARD = 0.50
_STRIDED_1X1_PIXELS, _STRIDED_1X1_FEW_PIXELS = 512, 0.60
# 1 x 1 where 512-bit vectors are computed whole (Zen 5), on which the library gains less.
_IS_WIDE = _native.cpu_kind() == "wide"
_WIDE_FILLED: _BreakEvens = {"forward": 0.85, "grad_input": 0.95, "grad_values": 0.75}
_WIDE_FEW: _BreakEvens = {"forward": 0.95, "grad_input": 0.95, "grad_values": 0.95}
_WIDE_STRIDED: _BreakEvens = {"forward": 0.75, "grad_input": 1.0, "grad_values": 0.60}
_WIDE_FEW_PIXELS: _BreakEvens = {"forward": 0.95, "grad_input": 0.75, "grad_values": 0.40}
_WIDE_FEW_STRIDED: _BreakEvens = {"forward": 0.95, "grad_input": 0.40, "grad_values": 0.60}
# Kernels above 1 x 1 where they are computed in halves (Zen 4), at batches 1 and 4.
_IS_HALVES = _native.cpu_kind() == "halves"
_HALVES_FEW: _BreakEvens = {"forward": 0.60, "grad_input": 0.55, "grad_values": 0.60}
_HALVES_FEW_STRIDED: _BreakEvens = {"forward": 0.58, "grad_input": 0.65, "grad_values": 0.58}
# 1 x 1 with a stride there, any batch: for up to so many input channels always (twice as many where
# pixels are few), else the table.
_HALVES_STRIDED_1X1_CHANNELS = 128
_HALVES_STRIDED_1X1: _BreakEvens = {"forward": 0.88, "grad_input": 1.0, "grad_values": 0.86}
_HALVES_STRIDED_1X1_FEW_PIXELS = 0.90  # grad_input
# Larger inputs and outputs (bytes) cost the library fresh memory on every call.
_LARGE, _LARGE_BREAK_EVEN = 32 << 20, 0.95
# Samples of a vector, where lanes are samples: vectors are of 256 bits where 512 are computed in
# halves (csrc/kernels/kernels_isa.cc). And the batch that fills vectors for 1 x 1 kernels.
_FILLING = max(8, _LANES)
_SAMPLES = 8 if _IS_HALVES else _FILLING
# At batches 1 to 8 on one thread of a CPU with AVX-512 and its own bfloat16 products: bfloat16 0.2
# to 0.4; float64, which the library has no convolution of its own for, 0.7 and more. Unfolding
# costs as much again.
_BREAK_EVEN = {torch.bfloat16: 0.25, torch.float64: 0.75}
_UNFOLDED_SHARE = 0.5


def _break_even(direction: Direction, problem: Problem) -> float:
    if problem.dtype is not torch.float32:
        return _BREAK_EVEN[problem.dtype]
    pointwise = math.prod(problem.kernel_size) == 1
    filled = _filled(problem, pointwise)
    return (filled or 1.0) * _float32_break_even(direction, problem, pointwise, filled > 0)


def _filled(problem: Problem, pointwise: bool) -> float:
    """How much of its vectors a batch fills, 0 for so little that lanes are pixels instead (by
    lanes_are_samples in csrc/kernels/conv_plan.cc). 1 x 1 and 3-D: 1 or 0."""
    batch = problem.input_shape[0]
    if pointwise or len(problem.kernel_size) == 3:
        return float(batch >= _FILLING)
    share = batch / (max(1, math.ceil(batch / _SAMPLES)) * _SAMPLES)
    return share if share >= 0.75 else 0.0


def _float32_break_even(
    direction: Direction, problem: Problem, pointwise: bool, filled: bool
) -> float:
    strided = math.prod(problem.stride) > 1
    columns = 0.0 if filled else _break_even_of_columns(direction, problem, pointwise)
    if pointwise and strided and _IS_HALVES and len(problem.kernel_size) == 2:
        return max(columns, _halves_strided_pointwise(direction, problem))
    if filled and _largest_tensor(problem) > _LARGE:
        return _LARGE_BREAK_EVEN
    if pointwise and _IS_WIDE:
        return max(columns, _wide_pointwise(direction, problem, filled))
    if columns:
        return columns
    if _IS_HALVES and not (filled or pointwise or len(problem.kernel_size) == 3):
        return (_HALVES_FEW_STRIDED if strided else _HALVES_FEW)[direction]
    if strided:
        if direction == "grad_input":
            if not pointwise:
                return _STRIDED if filled else _STRIDED_FEW
            few = _output_pixels(problem) < _STRIDED_1X1_PIXELS
            return _STRIDED_1X1_FEW_PIXELS if few else _STRIDED_1X1
        if direction == "forward" and not pointwise and not filled:
            return _STRIDED_FEW_FORWARD
    if pointwise and filled:
        return _FILLED_1X1[direction]
    if pointwise:
        return (_FEW_1X1_512_BITS if _HAS_512_BITS else _FEW_1X1)[direction]
    return (_FILLED if filled else _FEW)[direction]


def _break_even_of_columns(direction: Direction, problem: Problem, pointwise: bool) -> float:
    """0 where the native product is not by the kernels of linear layers."""
    if not _unfolds(problem):
        return 0.0
    pixels = _output_pixels(problem)
    if pointwise:
        if pixels < _PIXELS:
            return _FEW_PIXELS_1X1[direction]
        return _COLUMNS_1X1[direction] if problem.out_channels >= _COLUMNS_CHANNELS else 0.0
    if pixels < _PIXELS:
        return _FEW_PIXELS[direction]
    if direction == "grad_input" and math.prod(problem.stride) > 1:
        return _COLUMNS_STRIDED
    return _COLUMNS[direction]


def _unfolds(problem: Problem) -> bool:
    """Whether the native kernels take it as a linear layer of the unfolded input
    (samples_are_pixels in csrc/kernels/conv_plan.cc)."""
    if len(problem.kernel_size) != 2:
        return False
    unfolds: bool = torch.ops.sparsetrain.conv_unfolds(
        problem.input_shape,
        problem.out_channels,
        problem.nnz,
        problem.kernel_size,
        problem.stride,
        problem.padding,
        problem.dilation,
        problem.groups,
        _LANES,
    )
    return unfolds


def _halves_strided_pointwise(direction: Direction, problem: Problem) -> float:
    few = _output_pixels(problem) < _STRIDED_1X1_PIXELS
    channels = problem.input_shape[1] // problem.groups
    if channels <= _HALVES_STRIDED_1X1_CHANNELS * (2 if few else 1):
        return 1.0
    if direction == "grad_input" and few:
        return _HALVES_STRIDED_1X1_FEW_PIXELS
    return _HALVES_STRIDED_1X1[direction]


def _wide_pointwise(direction: Direction, problem: Problem, filled: bool) -> float:
    pixels, strided = _output_pixels(problem), math.prod(problem.stride) > 1
    if pixels < _PIXELS:
        return (_WIDE_FEW_STRIDED if strided else _WIDE_FEW_PIXELS)[direction]
    if strided and direction == "grad_input" and pixels < _STRIDED_1X1_PIXELS:
        return _STRIDED_1X1_FEW_PIXELS
    if strided:
        return _WIDE_STRIDED[direction]
    return (_WIDE_FILLED if filled else _WIDE_FEW)[direction]


def _output_pixels(problem: Problem) -> int:
    """Of all images together, about."""
    batch, _, *size = problem.input_shape
    return batch * math.prod(size) // math.prod(problem.stride)


def _largest_tensor(problem: Problem) -> int:
    """Bytes of a float32 input or output, whichever is larger, about."""
    output = problem.out_channels * _output_pixels(problem)
    return 4 * max(math.prod(problem.input_shape), output)


def choose(direction: Direction, problem: Problem) -> Choice:
    """The implementation for one product; the first line that applies counts.

    | when                                                          | family            |
    |---------------------------------------------------------------|-------------------|
    | torch.use_deterministic_algorithms(True)                      | native, unfolded  |
    | one input channel per group (depthwise); not in float64       | dense             |
    | less than a million multiplications, 2-D                      | native            |
    | density above the break-even below                            | dense             |
    | otherwise                                                     | native, unfolded  |

    Break-even densities (3-D: half of these):

    | dtype    | for                                   | forward | grad_input | grad_values |
    |----------|---------------------------------------|---------|------------|-------------|
    | float32  | batches that fill vectors             | 0.75    | 0.70       | 0.85        |
    | float32  | with a stride above 1                 |         | 0.75       |             |
    | float32  | 1 x 1                                 | 0.60    | 0.80       | 0.50        |
    | float32  | an input or output above 32 MiB       | 0.95    | 0.95       | 0.95        |
    | float32  | smaller batches                       | 0.65    | 0.45       | 0.45        |
    | float32  | with a stride above 1                 | 0.50    | 0.60       |             |
    | float32  | 1 x 1                                 | 0.60    | 0.60       | 0.50        |
    | float32  | 1 x 1, vectors of 512 bits            | 0.72    | 0.80       | 0.65        |
    | float32  | 1 x 1 with a stride, any batch        |         | 1.00       |             |
    | float32  | less than 512 pixels of all images    |         | 0.60       |             |
    | float32  | unfolded (below)                      | 0.75    | 0.74       | 0.78        |
    | float32  | with a stride above 1                 |         | 0.85       |             |
    | float32  | 1 x 1                                 | 0.85    | 0.80       | 0.72        |
    | float32  | less than 64 pixels                   | 0.95    | 0.62       | 0.95        |
    | float32  | less than 64 pixels, 1 x 1            | 0.90    | 0.80       | 0.72        |
    | bfloat16 |                                       | 0.25    | 0.25       | 0.25        |
    | float64  |                                       | 0.75    | 0.75       | 0.75        |

    A vector has 8 samples, with AVX-512 16 unless the CPU computes 512 bits in halves. Batches that
    fill three quarters of theirs count, and have that part of the densities above. (1 x 1, and 3-D:
    batches of 8, with AVX-512 16, or more, and all of it.)
    Unfolded, in smaller batches without groups: up to 4096 pixels of all images where that costs
    less (images whose rows do not fill vectors, many output channels: column_cost in
    csrc/kernels/conv_plan.cc). 1 x 1: at most two pixels for each output channel, and 1024, of 256
    channels or more where the pixels are 64 or more.

    And for float32 and 1 x 1 on AMD's CPUs that compute 512-bit vectors whole, unless what is above
    for unfolded ones is more:

    | for                                          | forward | grad_input | grad_values |
    |----------------------------------------------|---------|------------|-------------|
    | batches of 16 or more                        | 0.85    | 0.95       | 0.75        |
    | smaller batches                              | 0.95    | 0.95       | 0.95        |
    | with a stride, any batch                     | 0.75    | 1.00       | 0.60        |
    | with a stride, less than 512 pixels          |         | 0.60       |             |
    | less than 64 pixels                          | 0.95    | 0.75       | 0.40        |
    | with a stride, less than 64 pixels           | 0.95    | 0.40       | 0.60        |

    For float32 on those that compute them in halves:

    | for                                          | forward | grad_input | grad_values |
    |----------------------------------------------|---------|------------|-------------|
    | above 1 x 1, smaller batches, not unfolded   | 0.60    | 0.55       | 0.60        |
    | with a stride above 1                        | 0.58    | 0.65       | 0.58        |
    | 1 x 1 with a stride, any batch               | 0.88    | 1.00       | 0.86        |
    | less than 512 pixels of all images           |         | 0.90       |             |
    | 128 input channels or fewer; 256 where that  | 1.00    | 1.00       | 1.00        |

    native is for 1-D and 2-D convolutions, unfolded for 3-D ones. Only these two give the same bits
    for any number of threads.
    """
    deep = len(problem.kernel_size) == 3
    if problem.deterministic:
        return _DETERMINISTIC[deep]
    channels = problem.input_shape[1] // problem.groups
    if channels == 1 and problem.groups > 1 and problem.dtype is not torch.float64:
        return _DEPTHWISE
    if not deep and _output_pixels(problem) * problem.nnz < 1_000_000:
        return _SMALL
    break_even = _break_even(direction, problem) * (_UNFOLDED_SHARE if deep else 1.0)
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
