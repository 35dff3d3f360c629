"""The differentiable operations of a sparse weight, on plain tensors.

Three native operations compute everything a sparse linear layer needs, W being the weight whose
nonzeros `values` sit at the pattern `crow`, `col`:

    linear(x, values, bias)          y  = x W^T + bias
    linear_grad_input(grad, values)  dx = grad W
    linear_grad_values(grad, x)      dW = grad^T x at the nonzeros of W, and grad summed over rows

Each is linear in each of its arguments, and the derivative of each is made of the other two. So the
three of them are closed under differentiation of any order, which is how double backward works. A
fourth, linear_backward, is the last two in one pass over `grad`, for the ordinary training step.

For each operation the section below holds, in this order: its fake (shapes without data), its
derivatives, its vmap rule, its registration, and its typed function, which takes the cheapest
route that is right:

    nothing to record                    the native operation itself
    plain autograd                       an old-style `autograd.Function`
    torch.func, forward-mode AD          a `setup_context` Function, the kind these accept
    torch.compile, torch.export          the registered operation, with its registered derivatives

On a tiny layer (64 -> 64, batch 8, one thread) forward and backward take 60 us by the second route,
107 by the third and 91 with the registered derivatives; the forward pass alone 10, 35 and 29.

Shape letters: B rows of the (flattened) input, I input features, O output features, N nonzeros.
The pattern travels as `crow` int32 (O + 1,), `col` int32 (N,) and `key` int64 (1,), the name under
which the native side caches what it derives from the pattern.

Paper: Nikdan et al., SparseProp, 2023, https://arxiv.org/abs/2302.04852.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsetrain import _native  # noqa: F401  (loads the library that defines the operations)
from sparsetrain._arguments import DTYPES, autocast, check
from sparsetrain._autograd import (
    Grads,
    InDims,
    below_autograd,
    direct,
    functions,
    refuse_mapped_pattern,
    total,
    transforming,
    vmap_by_slices,
)

if TYPE_CHECKING:
    from sparsetrain.pattern import SparsePattern

__all__ = ["linear", "linear_backward", "linear_grad_input", "linear_grad_values", "sparse_linear"]

# Looked up once: an attribute chain through torch.ops costs more than the checks below.
_LINEAR: Callable[..., Tensor] = torch.ops.sparsetrain.linear.default
_GRAD_INPUT: Callable[..., Tensor] = torch.ops.sparsetrain.linear_grad_input.default
_GRAD_VALUES: Callable[..., tuple[Tensor, Tensor]] = (
    torch.ops.sparsetrain.linear_grad_values.default
)
_BACKWARD: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
    torch.ops.sparsetrain.linear_backward.default
)

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch.is_autocast_enabled


# --------------------------------------------------------------------------------------------------
# linear: y = x W^T + bias


def _linear_fake(
    x: Tensor, values: Tensor, bias: Tensor | None, crow: Tensor, col: Tensor, key: Tensor
) -> Tensor:
    return x.new_empty((x.shape[0], crow.shape[0] - 1))


def _linear_keep(
    ctx: Any, inputs: tuple[Any, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    x, values, _, crow, col, key = inputs
    ctx.in_features = x.shape[1]
    return x if needs[1] else None, values if needs[0] else None, crow, col, key


def _sum_over_batch(grad: Tensor) -> Tensor:
    """(B, O) -> (O,), bitwise the same for any number of threads.

    torch shares out the columns of a sum between its threads, but a single column it cuts into
    pieces, one for each thread. Hence two columns for one.
    """
    return grad.expand(-1, 2).sum(0)[:1] if grad.shape[1] == 1 else grad.sum(0)


def _linear_backward(ctx: Any, grad: Tensor) -> Grads:
    x, values, crow, col, key = ctx.saved_tensors
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    grad_x = grad_values = grad_bias = None
    if needs_x and needs_values:
        grad_x, grad_values, grad_bias = linear_backward(
            grad, x, values, crow, col, key, needs_bias
        )
    elif needs_x:
        grad_x = linear_grad_input(grad, values, crow, col, key, ctx.in_features)
    elif needs_values:
        grad_values, grad_bias = linear_grad_values(grad, x, crow, col, key, needs_bias)
    if needs_bias and not needs_values:
        grad_bias = _sum_over_batch(grad)
    return grad_x, grad_values, grad_bias if needs_bias else None, None, None, None


def _linear_jvp(
    ctx: Any, dx: Tensor | None, dvalues: Tensor | None, dbias: Tensor | None, *_: Any
) -> Tensor:
    x, values, crow, col, key = ctx.saved_tensors
    terms = [] if dx is None else [linear(dx, values, None, crow, col, key)]
    if dvalues is not None:
        terms.append(linear(x, dvalues, dbias, crow, col, key))
    elif dbias is not None:
        terms.append(dbias.expand(x.shape[0], -1))
    return total(terms)


def _linear_vmap(info: Any, in_dims: InDims, *args: Any) -> tuple[Tensor, int]:
    refuse_mapped_pattern(in_dims[3:])
    x, values, bias, crow, col, key = args
    if in_dims[0] is None or in_dims[1] is not None or in_dims[2] is not None:
        return vmap_by_slices(_LINEAR, info.batch_size, in_dims, args), 0
    x = x.movedim(in_dims[0], 0)  # (V, B, I): one product over V * B rows
    y = _LINEAR(x.flatten(0, 1), values, bias, crow, col, key)
    return y.view(*x.shape[:2], y.shape[1]), 0


torch.library.register_fake("sparsetrain::linear", _linear_fake)
torch.library.register_vmap("sparsetrain::linear", _linear_vmap)
_linear_direct = direct(_LINEAR)
_linear_fast, _linear_transformable = functions(
    _LINEAR, _linear_keep, _linear_backward, _linear_jvp
)


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
    if transforming():
        return _linear_transformable(x, values, bias, crow, col, key)
    if _is_compiling():
        return _LINEAR(x, values, bias, crow, col, key)
    if _is_grad_enabled() and (
        values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _linear_fast(x, values, bias, crow, col, key)
    with below_autograd():
        return _linear_direct(x, values, bias, crow, col, key)


# --------------------------------------------------------------------------------------------------
# linear_grad_input: dx = grad W


def _grad_input_fake(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, key: Tensor, in_features: int
) -> Tensor:
    return grad.new_empty((grad.shape[0], in_features))


def _grad_input_keep(
    ctx: Any, inputs: tuple[Any, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    grad, values, crow, col, key, ctx.in_features = inputs
    return grad if needs[1] else None, values if needs[0] else None, crow, col, key


def _grad_input_backward(ctx: Any, ddx: Tensor) -> Grads:
    grad, values, crow, col, key = ctx.saved_tensors
    needs_grad, needs_values = ctx.needs_input_grad[:2]
    d_grad = linear(ddx, values, None, crow, col, key) if needs_grad else None
    d_values = linear_grad_values(grad, ddx, crow, col, key, False)[0] if needs_values else None
    return d_grad, d_values, None, None, None, None


def _grad_input_jvp(ctx: Any, dgrad: Tensor | None, dvalues: Tensor | None, *_: Any) -> Tensor:
    grad, values, crow, col, key = ctx.saved_tensors
    terms = []
    if dgrad is not None:
        terms.append(linear_grad_input(dgrad, values, crow, col, key, ctx.in_features))
    if dvalues is not None:
        terms.append(linear_grad_input(grad, dvalues, crow, col, key, ctx.in_features))
    return total(terms)


def _grad_input_vmap(info: Any, in_dims: InDims, *args: Any) -> tuple[Tensor, int]:
    refuse_mapped_pattern(in_dims[2:5])
    grad, values, crow, col, key, in_features = args
    if in_dims[0] is None or in_dims[1] is not None:
        return vmap_by_slices(_GRAD_INPUT, info.batch_size, in_dims, args), 0
    grad = grad.movedim(in_dims[0], 0)  # (V, B, O): one product over V * B rows
    dx = _GRAD_INPUT(grad.flatten(0, 1), values, crow, col, key, in_features)
    return dx.view(*grad.shape[:2], in_features), 0


torch.library.register_fake("sparsetrain::linear_grad_input", _grad_input_fake)
torch.library.register_vmap("sparsetrain::linear_grad_input", _grad_input_vmap)
_grad_input_direct = direct(_GRAD_INPUT)
_grad_input_fast, _grad_input_transformable = functions(
    _GRAD_INPUT, _grad_input_keep, _grad_input_backward, _grad_input_jvp
)


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
    args = (grad, values, crow, col, key, in_features)
    if transforming():
        return _grad_input_transformable(*args)
    if _is_compiling():
        return _GRAD_INPUT(*args)
    if _is_grad_enabled() and (grad.requires_grad or values.requires_grad):
        return _grad_input_fast(*args)
    with below_autograd():
        return _grad_input_direct(*args)


# --------------------------------------------------------------------------------------------------
# linear_grad_values: dW = grad^T x at the nonzeros of W, dbias = grad summed over the batch


def _grad_values_fake(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, key: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    return grad.new_empty((col.shape[0],)), grad.new_empty((grad.shape[1] if bias else 0,))


def _grad_values_keep(
    ctx: Any, inputs: tuple[Any, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    grad, x, crow, col, key, ctx.bias = inputs
    ctx.in_features = x.shape[1]
    return grad if needs[1] else None, x if needs[0] else None, crow, col, key


def _grad_values_backward(ctx: Any, d_values: Tensor, d_bias: Tensor) -> Grads:
    grad, x, crow, col, key = ctx.saved_tensors
    needs_grad, needs_x = ctx.needs_input_grad[:2]
    d_grad = d_x = None
    if needs_grad:
        d_grad = linear(x, d_values, d_bias if ctx.bias else None, crow, col, key)
    if needs_x:
        d_x = linear_grad_input(grad, d_values, crow, col, key, ctx.in_features)
    return d_grad, d_x, None, None, None, None


def _grad_values_jvp(
    ctx: Any, dgrad: Tensor | None, dx: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    grad, x, crow, col, key = ctx.saved_tensors
    values, bias = [], [grad.new_zeros((grad.shape[1] if ctx.bias else 0,))]
    if dgrad is not None:
        d_values, d_bias = linear_grad_values(dgrad, x, crow, col, key, ctx.bias)
        values.append(d_values)
        bias = [d_bias]
    if dx is not None:
        values.append(linear_grad_values(grad, dx, crow, col, key, False)[0])
    return total(values), total(bias)


def _grad_values_vmap(
    info: Any, in_dims: InDims, *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    refuse_mapped_pattern(in_dims[2:5])
    return vmap_by_slices(_GRAD_VALUES, info.batch_size, in_dims, args), (0, 0)


torch.library.register_fake("sparsetrain::linear_grad_values", _grad_values_fake)
torch.library.register_vmap("sparsetrain::linear_grad_values", _grad_values_vmap)
_grad_values_direct = direct(_GRAD_VALUES)
_grad_values_fast, _grad_values_transformable = functions(
    _GRAD_VALUES, _grad_values_keep, _grad_values_backward, _grad_values_jvp
)


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
    args = (grad, x, crow, col, key, bias)
    if transforming():
        return _grad_values_transformable(*args)
    if _is_compiling():
        return _GRAD_VALUES(*args)
    if _is_grad_enabled() and (grad.requires_grad or x.requires_grad):
        return _grad_values_fast(*args)
    with below_autograd():
        return _grad_values_direct(*args)


# --------------------------------------------------------------------------------------------------
# linear_backward: linear_grad_input and linear_grad_values in one pass


def _backward_fake(
    grad: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor, key: Tensor, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty((values.shape[0],)),
        x.new_empty((grad.shape[1] if bias else 0,)),
    )


def _backward_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.bias = inputs
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx: Any, d_dx: Tensor, d_dvalues: Tensor, d_dbias: Tensor) -> Grads:
    grad, x, values, crow, col, key = ctx.saved_tensors
    needs_grad, needs_x, needs_values = ctx.needs_input_grad[:3]
    d_grad = d_x = d_values = None
    if needs_grad:
        d_grad = linear(d_dx, values, None, crow, col, key) + linear(
            x, d_dvalues, d_dbias if ctx.bias else None, crow, col, key
        )
    if needs_x:
        d_x = linear_grad_input(grad, d_dvalues, crow, col, key, x.shape[1])
    if needs_values:
        d_values = linear_grad_values(grad, d_dx, crow, col, key, False)[0]
    return d_grad, d_x, d_values, None, None, None, None


def _backward_vmap(
    info: Any, in_dims: InDims, *args: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    refuse_mapped_pattern(in_dims[3:6])
    return vmap_by_slices(_BACKWARD, info.batch_size, in_dims, args), (0, 0, 0)


torch.library.register_fake("sparsetrain::linear_backward", _backward_fake)
torch.library.register_vmap("sparsetrain::linear_backward", _backward_vmap)
torch.library.register_autograd(
    "sparsetrain::linear_backward", _backward_backward, setup_context=_backward_save
)
_backward_direct = direct(_BACKWARD)


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
    if transforming() or (
        _is_grad_enabled() and (grad.requires_grad or x.requires_grad or values.requires_grad)
    ):
        dx = linear_grad_input(grad, values, crow, col, key, x.shape[1])
        return dx, *linear_grad_values(grad, x, crow, col, key, bias)
    if _is_compiling():
        return _BACKWARD(grad, x, values, crow, col, key, bias)
    with below_autograd():
        return _backward_direct(grad, x, values, crow, col, key, bias)


# --------------------------------------------------------------------------------------------------
# What a layer calls


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
        ValueError: the last dimension of `input` is not I, or a tensor is not on the CPU.
        RuntimeError: `values` or `bias` is not of the length that the pattern asks for.
    """
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
    ):
        check(input, values, bias, pattern)
    crow, col, key = pattern.crow_indices, pattern.col_indices, pattern.key
    if input.ndim == 2:
        return linear(input, values, bias, crow, col, key)
    if input.ndim == 1:
        return linear(input.unsqueeze(0), values, bias, crow, col, key).squeeze(0)
    y = linear(input.flatten(0, -2), values, bias, crow, col, key)
    return y.view(*input.shape[:-1], rows)
