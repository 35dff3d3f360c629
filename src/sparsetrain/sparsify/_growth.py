"""Where a weight that does not exist would help most: the largest dense gradients, found in chunks.

A layer's input x and the gradient g of its output are kept during one step (`Recording`). From them
the dense gradient g^T x is computed for some output rows (or channels) at a time, at most
`CHUNK_BYTES`, and a running selection of the `count` largest is kept. So the memory is three chunks
and 12 bytes for each of 2 x count candidates, whatever the size of the layer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsetrain._conv_shapes import geometry_of
from sparsetrain.conv_ops import sparse_conv
from sparsetrain.nn._base import SparseLayer
from sparsetrain.nn.conv import _SparseConv
from sparsetrain.ops import sparse_linear
from sparsetrain.pattern import SparsePattern
from sparsetrain.sparsify.criteria import keep_top

#: Bytes of dense gradient computed at a time (but at least one row).
CHUNK_BYTES = 4 << 20


class Recording:
    """The inputs of one layer and the gradients of its outputs, one pair for each call.

    Several calls in a step (shared layers, gradient accumulation) add up. Copies and pickles of the
    layer come without it.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.saw = self._saw
        if "torch._dynamo" in sys.modules:  # a compiled model calls this outside its graph
            self.saw = torch.compiler.disable(self._saw)  # type: ignore[no-untyped-call]

    def _saw(self, input: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            input = input.detach()
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda grad: self.calls.append((input, grad.detach()))
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def strongest_inactive(
    layer: SparseLayer, calls: list[tuple[Tensor, Tensor]], count: int
) -> Tensor:
    """Positions of the `count` largest |dense gradient| where no weight is; int64, increasing.

    Among equals the lowest position wins; NaN counts as zero.
    """
    best = _Largest(count)
    pattern, cols = layer.pattern, layer.pattern.shape[1]
    problem = _problem(layer, calls)
    for first, last in problem.chunks(cols):
        scores = problem.gradient(first, last).abs_().nan_to_num_(nan=0.0).view(-1)
        scores[_active(pattern, first, last)] = -1.0
        best.offer(scores, first * cols)
    return best.positions


def gradient_at(
    layer: SparseLayer, calls: list[tuple[Tensor, Tensor]], positions: Tensor
) -> Tensor:
    """The dense gradient (n,) at `positions` int64 (n,), increasing: on these alone."""
    rows, cols = layer.pattern.shape
    crow = torch.searchsorted(positions, torch.arange(rows + 1) * cols).to(torch.int32)
    pattern = SparsePattern._trusted(crow, (positions % cols).to(torch.int32), (rows, cols))
    dtype = _dtype(calls[0][1].dtype)
    total = torch.zeros(positions.numel(), dtype=dtype)
    for input, grad in calls:
        values = torch.zeros(positions.numel(), dtype=dtype, requires_grad=True)
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            output = _product(layer, input.to(dtype), values, pattern)
        total += torch.autograd.grad(output, values, grad.to(dtype))[0]
    return total


class _Largest:
    """The `count` largest scores offered so far, and where they were."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.positions = torch.empty(0, dtype=torch.int64)
        self.scores: Tensor | None = None
        self.threshold = 0.0
        self.full = count == 0

    def offer(self, scores: Tensor, offset: int) -> None:
        """Scores of the positions from `offset` on; negative ones are no candidates."""
        if self.count == 0:
            return
        beyond = scores > self.threshold if self.full else scores >= 0
        index = beyond.nonzero().squeeze(1)
        taken = scores[index]
        self.positions = torch.cat([self.positions, index + offset])
        self.scores = taken if self.scores is None else torch.cat([self.scores, taken])
        if self.scores.numel() > self.count:
            keep = keep_top(self.scores, self.count)
            self.scores, self.positions = self.scores[keep], self.positions[keep]
        self.full = self.scores.numel() == self.count
        if self.full:
            self.threshold = float(self.scores.min())


def _active(pattern: SparsePattern, first: int, last: int) -> Tensor:
    """Positions of the weights of rows first to last, counted from the first."""
    crow = pattern.crow_indices[first : last + 1].to(torch.int64)
    starts = torch.arange(last - first) * pattern.shape[1]
    begin, end = int(crow[0]), int(crow[-1])
    rows = torch.repeat_interleave(starts, crow.diff(), output_size=end - begin)
    return rows + pattern.col_indices[begin:end]


def _dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(layer: SparseLayer, x: Tensor, values: Tensor, pattern: SparsePattern) -> Tensor:
    if not isinstance(layer, _SparseConv):
        return sparse_linear(x, values, None, pattern)
    return sparse_conv(
        x,
        values,
        None,
        pattern,
        kernel_size=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
    )


def _problem(layer: SparseLayer, calls: list[tuple[Tensor, Tensor]]) -> _Linear | _Conv:
    return _Conv(layer, calls) if isinstance(layer, _SparseConv) else _Linear(calls)


def _sum(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total += part
    return total


class _Linear:
    """Rows of g^T x for a linear layer: g (*, O), x (*, I)."""

    def __init__(self, calls: list[tuple[Tensor, Tensor]]) -> None:
        dtype = self.dtype = _dtype(calls[0][1].dtype)
        self.calls = [
            (x.reshape(-1, x.shape[-1]).to(dtype), g.reshape(-1, g.shape[-1]).to(dtype))
            for x, g in calls
        ]

    def chunks(self, cols: int) -> Iterator[tuple[int, int]]:
        rows = self.calls[0][1].shape[1]
        step = max(1, CHUNK_BYTES // (cols * self.dtype.itemsize))
        return ((first, min(first + step, rows)) for first in range(0, rows, step))

    def gradient(self, first: int, last: int) -> Tensor:
        """(last - first, I), contiguous"""
        return _sum(g[:, first:last].t() @ x for x, g in self.calls).contiguous()


class _Conv:
    """Output channels of the weight's gradient for a convolution: g (N, O, ...), x (N, C, ...).

    A chunk is some whole groups, or a part of one.
    """

    def __init__(self, layer: _SparseConv, calls: list[tuple[Tensor, Tensor]]) -> None:
        self.shape = layer.weight_shape
        self.geometry = geometry_of(
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.padding_mode,
        )
        dims = len(layer.kernel_size) + 2
        self.dtype = _dtype(calls[0][1].dtype)
        self.calls = []
        for x, g in calls:
            x, g = (t if t.dim() == dims else t.unsqueeze(0) for t in (x, g))
            if self.geometry.extra:
                x = pad(x, self.geometry.extra, self.geometry.mode)
            self.calls.append((x.to(self.dtype), g.to(self.dtype)))

    def chunks(self, cols: int) -> Iterator[tuple[int, int]]:
        rows = self.shape[0]
        size = rows // self.geometry.groups  # rows of a group
        step = max(1, CHUNK_BYTES // (cols * self.dtype.itemsize))
        if step >= size:
            step -= step % size
            return ((first, min(first + step, rows)) for first in range(0, rows, step))
        return (
            (first, min(first + step, start + size))
            for start in range(0, rows, size)
            for first in range(start, start + size, step)
        )

    def gradient(self, first: int, last: int) -> Tensor:
        """(last - first, C / groups * taps), contiguous"""
        size = self.shape[0] // self.geometry.groups
        group, channels = first // size, self.shape[1]
        groups = max(1, (last - first) // size)
        inputs = slice(group * channels, (group + groups) * channels)
        _, stride, padding, dilation, *_ = self.geometry
        shape = (last - first, *self.shape[1:])

        def part(x: Tensor, g: Tensor) -> Tensor:
            if g.numel() == 0:
                return g.new_zeros(shape)
            weight = g.new_empty(shape)  # only its shape counts
            result: Tensor = torch.ops.aten.convolution_backward(
                g[:, first:last],
                x[:, inputs],
                weight,
                None,
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                groups,
                (False, True, False),
            )[1]
            return result

        total = _sum(part(x, g) for x, g in self.calls)
        return total.reshape(last - first, math.prod(shape[1:])).contiguous()
