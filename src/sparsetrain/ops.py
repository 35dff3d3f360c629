"""The differentiable operations of a linear layer with a sparse weight, on plain tensors.

Three native operations compute everything, W being the weight whose nonzeros `values` sit at the
pattern `crow`, `col`:

    linear(x, values, bias)          y  = x W^T + bias
    linear_grad_input(grad, values)  dx = grad W
    linear_grad_values(grad, x)      dW = grad^T x at the nonzeros of W, and grad summed over rows

A fourth, linear_backward, is the last two in one pass over `grad`, for the ordinary training step.
Their fakes, derivatives and vmap rules are those of `_products`, which convolutions share.

On a tiny layer (64 -> 64, batch 8, 90 % sparse, one thread) forward and backward take 0.94 times as
long as those of the dense layer where C++ records them (csrc/ops/route.cc), 1.3 times where Python
does, and about twice as long under torch.func and with the registered derivatives.

Shape letters: B rows of the (flattened) input, I input features, O output features, N nonzeros.
The pattern travels as `crow` int32 (O + 1,), `col` int32 (N,) and `key` int64 (1,), the name under
which the native side caches what it derives from the pattern.

Paper: Nikdan et al., SparseProp, 2023, https://arxiv.org/abs/2302.04852.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsetrain import _native  # noqa: F401  (loads the library that defines the operations)
from sparsetrain._arguments import DTYPES, autocast, check
from sparsetrain._define import registered
from sparsetrain._linear_choice import LinearProblem, choose
from sparsetrain._planner import Choice, Direction, Planner

if TYPE_CHECKING:
    from sparsetrain.pattern import SparsePattern

__all__ = ["linear", "linear_backward", "linear_grad_input", "linear_grad_values", "sparse_linear"]

_is_autocast_enabled = torch.is_autocast_enabled


class _Shapes:
    """What derivatives must know about the shapes of a linear layer (see _products.Shapes)."""

    def output(self, x: Sequence[int], rows: int, geometry: tuple[Any, ...]) -> tuple[int, int]:
        return x[0], rows

    def size(self, x: Sequence[int]) -> int:
        return x[1]

    def input(self, grad: Sequence[int], size: int) -> tuple[int, int]:
        return grad[0], size

    def folded(self, size: int, count: int) -> int:
        return size  # the width of the input, whatever the batch

    def weight(self, x: Sequence[int], rows: int, geometry: tuple[Any, ...]) -> tuple[int, int]:
        return rows, x[-1]


def _choose(
    direction: Direction,
    x_shape: Sequence[int],
    rows: int,
    nnz: int,
    dtype: torch.dtype,
    threads: int,
    deterministic: bool,
    geometry: tuple[Any, ...],
) -> Choice:
    if len(x_shape) != 2:
        return Choice("native", "to raise the error")
    batch, cols = x_shape
    return choose(direction, LinearProblem(batch, cols, rows, nnz, dtype, threads, deterministic))


_PATTERN = "Tensor crow, Tensor col, Tensor key"
_SCHEMAS = {
    "": f"(Tensor x, Tensor values, Tensor? bias, {_PATTERN}) -> Tensor",
    "_grad_input": f"(Tensor grad, Tensor values, {_PATTERN}, int in_features) -> Tensor",
    "_grad_values": f"(Tensor grad, Tensor x, {_PATTERN}, bool bias) -> (Tensor, Tensor)",
    "_backward": f"(Tensor grad, Tensor x, Tensor values, {_PATTERN}, bool bias)"
    " -> (Tensor, Tensor, Tensor)",
}

PLANNER = Planner(
    "linear",
    _SCHEMAS,
    {"native": registered("linear", _SCHEMAS), "dense": registered("linear_dense", _SCHEMAS)},
    _Shapes(),
    _choose,
)
_PRODUCTS = PLANNER.products


def linear(
    x: Tensor, values: Tensor, bias: Tensor | None, crow: Tensor, col: Tensor, key: Tensor
) -> Tensor:
    """y = x W^T + bias.

    Args:
        x: (B, I) float32, float64 or bfloat16, any strides.
        values: (N,) the nonzeros of W in CSR order, dtype of `x`.
        bias: (O,) or None, dtype of `x`.
        crow, col, key: the pattern of W, (O, I).

    Returns:
        (B, O), contiguous, dtype of `x`.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or an invalid pattern.
    """
    return _PRODUCTS.forward(x, values, bias, crow, col, key)


def linear_grad_input(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, key: Tensor, in_features: int
) -> Tensor:
    """dx = grad W.

    Args:
        grad: (B, O) float32, float64 or bfloat16, any strides.
        values: (N,) the nonzeros of W in CSR order, dtype of `grad`.
        crow, col, key: the pattern of W, (O, I).
        in_features: I.

    Returns:
        (B, I), contiguous, dtype of `grad`.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or an invalid pattern.
    """
    return _PRODUCTS.grad_input(grad, values, crow, col, key, in_features)


def linear_grad_values(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, key: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """The entries of grad^T x at the nonzeros of W, and the sum of `grad` over the batch.

    Args:
        grad: (B, O) float32, float64 or bfloat16, any strides.
        x: (B, I) any strides, dtype of `grad`.
        crow, col, key: the pattern of W, (O, I).
        bias: whether the sum over the batch is wanted.

    Returns:
        (N,) in CSR order, and (O,), or (0,) where `bias` is false; dtype of `grad`.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or an invalid pattern.
    """
    return _PRODUCTS.grad_values(grad, x, crow, col, key, bias)


def linear_backward(
    grad: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, key: Tensor, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients of `linear`: of its input, its values, and if wanted its bias.

    Args:
        grad: (B, O) float32, float64 or bfloat16, any strides.
        x: (B, I) any strides, dtype of `grad`.
        values: (N,) the nonzeros of W in CSR order, dtype of `grad`.
        crow, col, key: the pattern of W, (O, I).
        bias: whether the gradient of the bias is wanted.

    Returns:
        (B, I) contiguous; (N,) in CSR order; (O,), or (0,) where `bias` is false.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or an invalid pattern.
    """
    return _PRODUCTS.backward(grad, x, values, crow, col, key, bias)


def sparse_linear(
    input: Tensor, values: Tensor, bias: Tensor | None, pattern: SparsePattern
) -> Tensor:
    """`torch.nn.functional.linear` with a sparse weight.

    Works under autograd (any order), torch.func, vmap, torch.compile, checkpointing and CPU
    autocast, which casts the floating-point arguments to its own dtype, float64 excepted.

    Args:
        input: (*, I) float32, float64 or bfloat16; any leading dimensions, any strides, CPU.
        values: (N,) the nonzeros of the weight in the order of the pattern, dtype of `input`.
        bias: (O,) or None, dtype of `input`.
        pattern: where the nonzeros are; its shape is (O, I).

    Returns:
        (*, O), dtype of `input`.

    Raises:
        TypeError: `input` is no tensor, or not of a dtype of the above, or not of that of `values`
            and `bias`.
        ValueError: the last dimension of `input` is not I, or a tensor is not dense or not on the
            CPU.
        RuntimeError: `values` or `bias` is not of the length that the pattern asks for.
    """
    call, route = PLANNER.known(input, values, bias, pattern)
    crow, col, key = pattern.crow_indices, pattern.col_indices, pattern.key
    if route is not None:
        y: Tensor = PLANNER.routed(route.number, input, values, bias, crow, col, key)
        return y
    y = _sparse_linear(input, values, bias, pattern)
    if call is not None:
        PLANNER.keep(call, (math.prod(input.shape[:-1]), input.shape[-1]), input, crow, col, ())
    return y


def _sparse_linear(
    input: Tensor, values: Tensor, bias: Tensor | None, pattern: SparsePattern
) -> Tensor:
    if _is_autocast_enabled("cpu"):
        input, values, bias = autocast(input, values, bias)
    rows, cols = pattern.shape
    if not (
        isinstance(input, Tensor)
        and input.dtype in DTYPES
        and input.dtype is values.dtype
        and (bias is None or bias.dtype is values.dtype)
        and input.ndim > 0
        and input.size(-1) == cols
        and input.is_cpu
        and values.is_cpu
        and input.layout is torch.strided
    ):
        check(input, values, bias, pattern)
    crow, col, key = pattern.crow_indices, pattern.col_indices, pattern.key
    if input.ndim == 2:
        return PLANNER.forward(input, values, bias, crow, col, key)
    if input.ndim == 1:
        return PLANNER.forward(input.unsqueeze(0), values, bias, crow, col, key).squeeze(0)
    y = PLANNER.forward(input.flatten(0, -2), values, bias, crow, col, key)
    return y.view(*input.shape[:-1], rows)
