"""The oracle: what a sparse layer computes, in plain PyTorch, with the zeros written out.

Slow, memory-hungry and short enough to be seen right; every test compares against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsetrain.pattern import SparsePattern

__all__ = ["masked_conv", "masked_linear", "row_indices", "scatter"]


def row_indices(crow: Tensor) -> Tensor:
    """The row of each nonzero: int64 (N,), from the row pointers `crow` (O + 1,)."""
    counts = crow[1:].long() - crow[:-1].long()
    return torch.repeat_interleave(torch.arange(counts.numel()), counts)


def scatter(values: Tensor, crow: Tensor, col: Tensor, cols: int) -> Tensor:
    """The dense (O, cols) weight whose nonzeros are `values` (N,); differentiable in `values`."""
    weight = values.new_zeros((crow.numel() - 1, cols))
    return weight.index_put((row_indices(crow), col.long()), values)


def masked_linear(
    input: Tensor, values: Tensor, bias: Tensor | None, pattern: SparsePattern
) -> Tensor:
    """What `sparsetrain.ops.sparse_linear` computes, by a dense product with the masked weight.

    Args:
        input: (*, I) floating point.
        values: (N,) nonzeros in CSR order.
        bias: (O,) or None.
        pattern: of shape (O, I).

    Returns:
        (*, O), differentiable in all three tensors.
    """
    weight = scatter(values, pattern.crow_indices, pattern.col_indices, pattern.shape[1])
    return torch.nn.functional.linear(input, weight, bias)


def masked_conv(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: SparsePattern,
    *,
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """What `sparsetrain.conv_ops.sparse_conv` computes, padded first, then with a masked weight.

    Args:
        input: (N, C, ...) or (C, ...) floating point.
        values: (nnz,) nonzeros in CSR order.
        bias: (O,) or None.
        pattern: of shape (O, C / groups * product of kernel_size).
        kernel_size, stride, padding, dilation, groups, padding_mode: as in torch.nn.Conv2d.

    Returns:
        (N, O, ...) or (O, ...), differentiable in all three tensors.
    """
    n = len(kernel_size)
    rows, cols = pattern.shape
    weight = scatter(values, pattern.crow_indices, pattern.col_indices, cols)
    weight = weight.view(rows, cols // math.prod(kernel_size), *kernel_size)
    dilations = (dilation,) * n if isinstance(dilation, int) else dilation
    if padding == "same":
        sums = [d * (k - 1) for k, d in zip(kernel_size, dilations, strict=True)]
        pads = [(s // 2, s - s // 2) for s in sums]
    else:
        number = 0 if isinstance(padding, str) else padding
        pads = [(p, p) for p in ((number,) * n if isinstance(number, int) else number)]
    functional = torch.nn.functional
    x = functional.pad(
        input if input.ndim == n + 2 else input[None],
        [side for pair in reversed(pads) for side in pair],
        "constant" if padding_mode == "zeros" else padding_mode,
    )
    convolutions: list[Any] = [functional.conv1d, functional.conv2d, functional.conv3d]
    y: Tensor = convolutions[n - 1](x, weight, bias, stride, 0, dilation, groups)
    return y if input.ndim == n + 2 else y[0]
