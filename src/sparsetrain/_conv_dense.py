"""Convolutions with a sparse weight by the library product, as operations "conv_dense".

The values are written into a dense weight, the library convolves, and the gradient is read back at
the nonzeros. For few channels and high densities; 2-D and 3-D. Only x and the values are kept for
the backward pass: the dense weight is temporary.

In every signature, `window` is kernel_size, stride, padding, dilation, groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsetrain._conv_define import define

__all__ = ["DENSE"]


def _weight_shape(crow: Tensor, channels: int, window: tuple[Any, ...]) -> list[int]:
    kernel_size, *_, groups = window
    return [crow.shape[0] - 1, channels // groups, *kernel_size]


def _weight(values: Tensor, crow: Tensor, col: Tensor, key: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense weight of `shape` (O, C / groups, *kernel), in the dtype that `_wide` gives."""
    cols = math.prod(shape[1:])
    if values.shape[0] == col.shape[0] == math.prod(shape):  # in the very order of the weight
        return _wide(values).contiguous().view(shape)
    weight: Tensor = torch.ops.sparsetrain.densify(values, crow, col, key, cols)
    return weight.view(shape)


def _wide(tensor: Tensor) -> Tensor:
    """In a dtype that the library convolves with one rounding, at the end."""
    if tensor.dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return tensor.float()
    return tensor


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow: Tensor,
    col: Tensor,
    key: Tensor,
    *window: Any,
) -> Tensor:
    shape = _weight_shape(crow, x.shape[1], window)
    weight = _weight(values, crow, col, key, shape)
    _, stride, padding, dilation, groups = window
    bias = None if bias is None else _wide(bias)
    zero = [0] * len(stride)
    y: Tensor = torch.ops.aten.convolution(
        _wide(x), weight, bias, stride, padding, dilation, False, zero, groups
    )
    return y.to(x.dtype).contiguous()


def _library_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    window: tuple[Any, ...],
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _, stride, padding, dilation, groups = window
    zero = [0] * len(stride)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        _wide(grad),
        _wide(x),
        weight,
        [grad.shape[1]],
        stride,
        padding,
        dilation,
        False,
        zero,
        groups,
        mask,
    )
    return dx, dweight, dbias


def _grad_input(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    key: Tensor,
    input_size: Sequence[int],
    *window: Any,
) -> Tensor:
    shape = _weight_shape(crow, input_size[1], window)
    weight = _weight(values, crow, col, key, shape)
    x = grad.new_empty(input_size)  # only its shape counts
    dx = _library_backward(grad, x, weight, window, (True, False, False))[0]
    return dx.to(grad.dtype).contiguous()


def _grad_values(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, key: Tensor, *window_and_bias: Any
) -> tuple[Tensor, Tensor]:
    *window, bias = window_and_bias
    shape = _weight_shape(crow, x.shape[1], tuple(window))
    weight = _wide(grad.new_empty(shape))  # only its shape counts
    _, dweight, dbias = _library_backward(grad, x, weight, tuple(window), (False, True, bias))
    return _read_back(grad, dweight, dbias, crow, col, key, bias)


def _backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    key: Tensor,
    *window_and_bias: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *window, bias = window_and_bias
    shape = _weight_shape(crow, x.shape[1], tuple(window))
    weight = _weight(values, crow, col, key, shape)
    dx, dweight, dbias = _library_backward(grad, x, weight, tuple(window), (True, True, bias))
    return dx.to(grad.dtype).contiguous(), *_read_back(grad, dweight, dbias, crow, col, key, bias)


def _read_back(
    grad: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    crow: Tensor,
    col: Tensor,
    key: Tensor,
    bias: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient at the nonzeros, (nnz,), and that of the bias, (O,) or (0,)."""
    if col.shape[0] == dweight.numel():
        dvalues = dweight.flatten()
    else:
        dvalues = torch.ops.sparsetrain.read_nonzeros(dweight.flatten(1), crow, col, key)
    return dvalues.to(grad.dtype), dbias.to(grad.dtype) if bias else grad.new_empty(0)


DENSE = define("conv_dense", _forward, _grad_input, _grad_values, _backward)
