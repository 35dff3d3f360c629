"""The linear layer with a sparse weight."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.nn._base import SparseLayer, sparse_parts
from sparsetrain.ops import sparse_linear
from sparsetrain.pattern import SparsePattern, check_sparsity


class SparseLinear(SparseLayer):
    """``y = x W^T + b`` with a W that exists only where its pattern says.

    Computes, forward and backward, what torch.nn.Linear with a masked weight would, on the nonzeros
    alone.

    Attributes:
        in_features, out_features: sizes of the last dimension of input and output.
        values: Parameter (nnz,), the weights in CSR order.
        bias: Parameter (out_features,) or None.
        pattern: SparsePattern of shape (out_features, in_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sparsity: float = 0.9,
        pattern: SparsePattern | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer with a uniformly random pattern, or the given one.

        Args:
            in_features, out_features: at least 1.
            bias: whether there is one.
            sparsity: fraction of weights left out, in [0, 1); exactly
                ``round((1 - sparsity) * in_features * out_features)`` remain, at least one. Not
                used where `pattern` is given.
            pattern: of shape (out_features, in_features), shared, not copied.
            device: "cpu", or "meta" for a layer without data.
            dtype: torch.float32, torch.float64 or torch.bfloat16; default torch's default.

        Raises:
            TypeError: an argument of the wrong type, or an unsupported dtype.
            ValueError: sparsity outside [0, 1), a pattern of another shape, sizes below 1.
        """
        super().__init__()
        self.in_features = _size(in_features, "in_features")
        self.out_features = _size(out_features, "out_features")
        self._create_state(pattern, check_sparsity(sparsity), bool(bias), device, dtype)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out_features, in_features)"""
        return (self.out_features, self.in_features)

    @classmethod
    def from_dense(cls, dense: nn.Linear, mask: Tensor | None = None) -> SparseLinear:
        """An independent sparse copy: dtype, bias, training and requires_grad flags as in `dense`.

        Law: ``from_dense(m).to_dense()`` has the weights of `m`.

        Args:
            dense: on the CPU; may carry the weight_orig and weight_mask of torch.nn.utils.prune.
            mask: bool (out, in), the weights to keep, zeros among them too. Default: what a pruning
                mask keeps, else the nonzeros.

        Raises:
            TypeError: `dense` is no torch.nn.Linear, or has an unsupported dtype; `mask` not bool.
            ValueError: `mask` of another shape, or `dense` on another device.
        """
        if not isinstance(dense, nn.Linear):
            raise TypeError(f"dense must be a torch.nn.Linear; got {type(dense).__name__}")
        pattern, values = sparse_parts(dense, mask)
        layer = cls(
            dense.in_features,
            dense.out_features,
            bias=dense.bias is not None,
            pattern=pattern,
            device="meta",
            dtype=values.dtype,
        )
        layer._take_tensors(values, dense.bias, like=dense)
        return layer

    def to_dense(self) -> nn.Linear:
        """An independent torch.nn.Linear: dtype, bias, training and requires_grad flags as here."""
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device="meta",
            dtype=self.values.dtype,
        )
        return self._fill_dense(dense)

    def forward(self, input: Tensor) -> Tensor:
        """(*, in_features) -> (*, out_features), in the dtype of `values`.

        Raises:
            TypeError, ValueError: input of another width, dtype or device; see ops.sparse_linear.
        """
        if self._active is None and self._recorder is None:
            return sparse_linear(input, self.values, self.bias, self._pattern)
        y = sparse_linear(input, self._forward_values(), self.bias, self._pattern)
        return self._recorded(input, y)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._state_repr()}"
        )


def _size(value: Any, name: str) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer of at least 1; got {value!r} of type {type(value).__name__}"
        ) from None
    if size < 1:
        raise ValueError(f"{name} must be at least 1; got {size}")
    return size
