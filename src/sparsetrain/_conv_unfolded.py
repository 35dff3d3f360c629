"""3-D convolutions by the native 2-D kernels, as operations "conv_unfolded".

The planes that the depth taps of one output plane see are laid side by side as channels, which is
what the columns of the pattern, (channel, depth tap, ...), already are:

    (N, C, D, H, W) -> (N * OD, C * kd, H, W)

A few samples at a time, so that the copy is about as large as the input.

In every signature, `window` is kernel_size, stride, padding, dilation, groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsetrain._conv_define import NATIVE, define

__all__ = ["UNFOLDED"]

_CONV2D, _CONV2D_GRAD_INPUT, _CONV2D_GRAD_VALUES, _ = NATIVE


class _Unfolding:
    """One 3-D convolution as 2-D ones.

    Attributes:
        size: unfolded shape of one sample, (OD, C * kd, H, W).
        window: that of the 2-D convolution.
    """

    def __init__(self, x_shape: Sequence[int], window: Sequence[Any]) -> None:
        self.batch, self.channels, self.depth, *self.plane = x_shape
        *sizes, groups = window
        self.taps, self.stride, self.padding, self.dilation = (size[0] for size in sizes)
        reach = self.dilation * (self.taps - 1) + 1
        self.out_depth = (self.depth + 2 * self.padding - reach) // self.stride + 1
        self.size = (self.out_depth, self.channels * self.taps, *self.plane)
        self.window = (*(size[1:] for size in sizes), groups)

    def chunks(self) -> Iterator[slice]:
        """Slices of the batch, of at least a sample, that unfold to the size of the whole input.

        One, empty, for an empty batch.
        """
        most = max(1, self.batch * self.depth // max(1, self.out_depth * self.taps))
        for first in range(0, max(1, self.batch), most):
            yield slice(first, min(first + most, self.batch))

    def _planes_of_taps(self) -> Iterator[tuple[int, slice, slice]]:
        """For each depth tap: the output planes that it serves, and the input planes they see."""
        for tap in range(self.taps):
            start = tap * self.dilation - self.padding  # the input plane for output plane 0
            first = max(0, -(start // self.stride))
            last = min(self.out_depth, (self.depth - 1 - start) // self.stride + 1)
            if first < last:
                begin = start + first * self.stride
                end = start + (last - 1) * self.stride + 1
                yield tap, slice(first, last), slice(begin, end, self.stride)

    def unfold(self, x: Tensor) -> Tensor:
        """(n, C, D, H, W) -> (n * OD, C * kd, H, W)"""
        n = x.shape[0]
        planes = x.new_zeros(n, self.out_depth, self.channels, self.taps, *self.plane)
        for tap, out, seen in self._planes_of_taps():
            planes[:, out, :, tap] = x[:, :, seen].transpose(1, 2)
        return planes.view(n * self.out_depth, *self.size[1:])

    def fold(self, planes: Tensor, dx: Tensor) -> None:
        """Adds (n * OD, C * kd, H, W) to `dx` (n, C, D, H, W) where `unfold` took it from."""
        n = dx.shape[0]
        planes = planes.view(n, self.out_depth, self.channels, self.taps, *self.plane)
        for tap, out, seen in self._planes_of_taps():
            dx[:, :, seen] += planes[:, out, :, tap].transpose(1, 2)


def _flat(y: Tensor) -> Tensor:
    """(n, O, OD, OH, OW) -> (n * OD, O, OH, OW)"""
    return y.transpose(1, 2).flatten(0, 1)


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow: Tensor,
    col: Tensor,
    key: Tensor,
    *window: Any,
) -> Tensor:
    how = _Unfolding(x.shape, window)
    parts = []
    for chunk in how.chunks():
        planes = how.unfold(x[chunk])
        y = _CONV2D(planes, values, bias, crow, col, key, *how.window)
        y = y.view(y.shape[0] // how.out_depth, how.out_depth, *y.shape[1:])
        parts.append(y.transpose(1, 2))
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def _grad_input(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    key: Tensor,
    input_size: Sequence[int],
    *window: Any,
) -> Tensor:
    how = _Unfolding(input_size, window)
    dx = grad.new_zeros(input_size)
    for chunk in how.chunks():
        dy = _flat(grad[chunk])
        size = [dy.shape[0], *how.size[1:]]
        planes = _CONV2D_GRAD_INPUT(dy, values, crow, col, key, size, *how.window)
        how.fold(planes, dx[chunk])
    return dx


def _grad_values(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, key: Tensor, *window_and_bias: Any
) -> tuple[Tensor, Tensor]:
    *window, bias = window_and_bias
    how = _Unfolding(x.shape, window)
    dtype = torch.float32 if x.dtype is torch.bfloat16 else x.dtype
    dvalues = torch.zeros(col.shape[0], dtype=dtype)
    dbias = torch.zeros(grad.shape[1] if bias else 0, dtype=dtype)
    for chunk in how.chunks():
        part, part_bias = _CONV2D_GRAD_VALUES(
            _flat(grad[chunk]), how.unfold(x[chunk]), crow, col, key, *how.window, bias
        )
        dvalues += part
        dbias += part_bias
    return dvalues.to(x.dtype), dbias.to(x.dtype)


def _backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    key: Tensor,
    *window_and_bias: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    window = window_and_bias[:-1]
    dx = _grad_input(grad, values, crow, col, key, x.shape, *window)
    return dx, *_grad_values(grad, x, crow, col, key, *window_and_bias)


UNFOLDED = define("conv_unfolded", _forward, _grad_input, _grad_values, _backward)
