"""The oracle: what a sparse layer computes, in plain PyTorch, with the zeros written out.

Slow, memory-hungry and short enough to be seen right; every test compares against it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsetrain.pattern import SparsePattern

__all__ = ["masked_linear", "row_indices", "scatter"]


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
