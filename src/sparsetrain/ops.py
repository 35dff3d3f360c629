"""The differentiable operations of a sparse weight, on plain tensors.

Three native operations compute everything a sparse linear layer needs, W being the weight whose
nonzeros `values` sit at the pattern `crow`, `col`:

    linear(x, values, bias)          y  = x W^T + bias
    linear_grad_input(grad, values)  dx = grad W
    linear_grad_values(grad, x)      dW = grad^T x at the nonzeros of W, and grad summed over rows

Each is linear in each of its arguments, and the derivative of each is made of the other two. So the
three of them are closed under differentiation of any order, which is how double backward works.

For each operation the section below holds, in this order: its fake (shapes without data), its
derivatives, its vmap rule, its registration, and its typed function, which takes the cheapest
route that is right:

    nothing to record                    the native operation itself
    plain autograd                       an old-style `autograd.Function`
    torch.func, forward-mode AD          a `setup_context` Function, the kind these accept
    torch.compile, torch.export          the registered operation, with its registered derivatives

On a tiny layer (64 -> 64, batch 8) the second route costs two thirds of the third, and less than
half of the derivatives registered with torch.library; hence the choice.

Shape letters: B rows of the (flattened) input, I input features, O output features, N nonzeros.
The pattern travels as `crow` int32 (O + 1,), `col` int32 (N,) and `key` int64 (1,), the name under
which the native side caches what it derives from the pattern.

Paper: Nikdan et al., SparseProp, 2023, https://arxiv.org/abs/2302.04852.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active as _functorch_active,
)
from torch._C import (
    _AutoDispatchBelowAutograd as _below_autograd,
)
from torch.autograd import forward_ad

from sparsetrain import _native  # noqa: F401  (loads the library that defines the operations)

if TYPE_CHECKING:
    from sparsetrain.pattern import SparsePattern

__all__ = ["linear", "linear_grad_input", "linear_grad_values", "sparse_linear"]

# Looked up once: an attribute chain through torch.ops costs more than the checks below.
_LINEAR: Callable[..., Tensor] = torch.ops.sparsetrain.linear.default
_GRAD_INPUT: Callable[..., Tensor] = torch.ops.sparsetrain.linear_grad_input.default
_GRAD_VALUES: Callable[..., tuple[Tensor, Tensor]] = (
    torch.ops.sparsetrain.linear_grad_values.default
)

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch.is_autocast_enabled

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# One entry per input of the operation; None where the input has no gradient.
_Grads = tuple[Tensor | None, ...]
_InDims = tuple[int | None, ...]
_Out = TypeVar("_Out")


# --------------------------------------------------------------------------------------------------
# What the three operations share


def _direct(op: Callable[..., _Out]) -> Callable[..., _Out]:
    """The dispatcher's own entry of an operation, without a Python frame around it (0.4 us)."""
    return op._op  # type: ignore[attr-defined, no-any-return]


def _functions(
    op: Callable[..., _Out],
    keep: Callable[..., tuple[Tensor | None, ...]],
    backward: Callable[..., _Grads],
    jvp: Callable[..., Any],
) -> tuple[Callable[..., _Out], Callable[..., _Out]]:
    """Registers the derivatives of `op` and wraps them into the two kinds of autograd.Function.

    Args:
        op: the native operation.
        keep: (ctx, inputs, needs_input_grad) -> the tensors that `backward` needs for these
            gradients, None in the place of each that it does not; numbers go into `ctx`.
        backward: (ctx, *grads of the outputs) -> one gradient or None per input.
        jvp: (ctx, *tangents of the inputs) -> tangents of the outputs; needs what `keep` gives for
            all gradients.

    Returns:
        The `apply` of the fast Function, and of the one for torch.func and forward-mode AD.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*keep(ctx, inputs, ctx.needs_input_grad))

    call = _direct(op)

    class Fast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with _below_autograd():
                output = call(*inputs)
            save(ctx, inputs, output)
            return output

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            kept = keep(ctx, inputs, (True,) * len(inputs))
            ctx.save_for_backward(*kept)
            ctx.save_for_forward(*kept)  # must be the same: vmap holds one list of both

    Fast.backward = staticmethod(backward)  # type: ignore[method-assign]
    Transformable.backward = staticmethod(backward)  # type: ignore[method-assign]
    Transformable.jvp = staticmethod(jvp)  # type: ignore[method-assign]
    torch.library.register_autograd(op, backward, setup_context=save)  # type: ignore[arg-type]
    # Function.apply first looks for active transforms, which the typed functions have done already,
    # and for inputs that outlived one, which the dispatcher unwraps as well: 2.5 of 12 us for a
    # tiny layer. The inner apply does the work.
    return super(torch.autograd.Function, Fast).apply, Transformable.apply


def _vmap_by_slices(
    function: Callable[..., Any], batch_size: int, in_dims: _InDims, args: Sequence[Any]
) -> Any:
    """Calls `function` once per slice and stacks the results along a new first dimension."""
    slices = [
        function(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
        for i in range(batch_size)
    ]
    if isinstance(slices[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
    return torch.stack(slices)


def _refuse_mapped_pattern(in_dims: _InDims) -> None:
    if any(dim is not None for dim in in_dims):
        raise ValueError(
            "crow, col and key are mapped over by vmap; a sparsity pattern cannot be mapped. "
            "Map over the input or the values only (in_dims=None for the pattern)."
        )


def _total(terms: list[Tensor]) -> Tensor:
    """The sum of at least one tensor: the tangents that reached one output."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _transforming() -> bool:
    """Whether torch.func or forward-mode AD may want more than a reverse-mode gradient."""
    return _functorch_active() or forward_ad._current_level >= 0


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


def _linear_backward(ctx: Any, grad: Tensor) -> _Grads:
    x, values, crow, col, key = ctx.saved_tensors
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    grad_x = grad_values = grad_bias = None
    if needs_x:
        grad_x = linear_grad_input(grad, values, crow, col, key, ctx.in_features)
    if needs_values:
        grad_values, grad_bias = linear_grad_values(grad, x, crow, col, key, needs_bias)
    elif needs_bias:
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
    return _total(terms)


def _linear_vmap(info: Any, in_dims: _InDims, *args: Any) -> tuple[Tensor, int]:
    _refuse_mapped_pattern(in_dims[3:])
    x, values, bias, crow, col, key = args
    if in_dims[0] is None or in_dims[1] is not None or in_dims[2] is not None:
        return _vmap_by_slices(_LINEAR, info.batch_size, in_dims, args), 0
    x = x.movedim(in_dims[0], 0)  # (V, B, I): one product over V * B rows
    y = _LINEAR(x.flatten(0, 1), values, bias, crow, col, key)
    return y.view(*x.shape[:2], y.shape[1]), 0


torch.library.register_fake("sparsetrain::linear", _linear_fake)
torch.library.register_vmap("sparsetrain::linear", _linear_vmap)
_linear_direct = _direct(_LINEAR)
_linear_fast, _linear_transformable = _functions(
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
    if _transforming():
        return _linear_transformable(x, values, bias, crow, col, key)
    if _is_compiling():
        return _LINEAR(x, values, bias, crow, col, key)
    if _is_grad_enabled() and (
        values.requires_grad or x.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _linear_fast(x, values, bias, crow, col, key)
    with _below_autograd():
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


def _grad_input_backward(ctx: Any, ddx: Tensor) -> _Grads:
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
    return _total(terms)


def _grad_input_vmap(info: Any, in_dims: _InDims, *args: Any) -> tuple[Tensor, int]:
    _refuse_mapped_pattern(in_dims[2:5])
    grad, values, crow, col, key, in_features = args
    if in_dims[0] is None or in_dims[1] is not None:
        return _vmap_by_slices(_GRAD_INPUT, info.batch_size, in_dims, args), 0
    grad = grad.movedim(in_dims[0], 0)  # (V, B, O): one product over V * B rows
    dx = _GRAD_INPUT(grad.flatten(0, 1), values, crow, col, key, in_features)
    return dx.view(*grad.shape[:2], in_features), 0


torch.library.register_fake("sparsetrain::linear_grad_input", _grad_input_fake)
torch.library.register_vmap("sparsetrain::linear_grad_input", _grad_input_vmap)
_grad_input_direct = _direct(_GRAD_INPUT)
_grad_input_fast, _grad_input_transformable = _functions(
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
    if _transforming():
        return _grad_input_transformable(*args)
    if _is_compiling():
        return _GRAD_INPUT(*args)
    if _is_grad_enabled() and (grad.requires_grad or values.requires_grad):
        return _grad_input_fast(*args)
    with _below_autograd():
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


def _grad_values_backward(ctx: Any, d_values: Tensor, d_bias: Tensor) -> _Grads:
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
    return _total(values), _total(bias)


def _grad_values_vmap(
    info: Any, in_dims: _InDims, *args: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    _refuse_mapped_pattern(in_dims[2:5])
    return _vmap_by_slices(_GRAD_VALUES, info.batch_size, in_dims, args), (0, 0)


torch.library.register_fake("sparsetrain::linear_grad_values", _grad_values_fake)
torch.library.register_vmap("sparsetrain::linear_grad_values", _grad_values_vmap)
_grad_values_direct = _direct(_GRAD_VALUES)
_grad_values_fast, _grad_values_transformable = _functions(
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
    if _transforming():
        return _grad_values_transformable(*args)
    if _is_compiling():
        return _GRAD_VALUES(*args)
    if _is_grad_enabled() and (grad.requires_grad or x.requires_grad):
        return _grad_values_fast(*args)
    with _below_autograd():
        return _grad_values_direct(*args)


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
        input, values, bias = _autocast(input, values, bias)
    rows, cols = pattern.shape
    if not (
        isinstance(input, Tensor)
        and input.dtype in _DTYPES
        and input.dtype is values.dtype
        and (bias is None or bias.dtype is values.dtype)
        and input.ndim > 0
        and input.size(-1) == cols
        and input.is_cpu
        and values.is_cpu
    ):
        _check(input, values, bias, pattern)
    crow, col, key = pattern.crow_indices, pattern.col_indices, pattern.key
    if input.ndim == 2:
        return linear(input, values, bias, crow, col, key)
    if input.ndim == 1:
        return linear(input.unsqueeze(0), values, bias, crow, col, key).squeeze(0)
    y = linear(input.flatten(0, -2), values, bias, crow, col, key)
    return y.view(*input.shape[:-1], rows)


def _autocast(
    input: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts to the autocast dtype; as F.linear does, float64 and integers are left alone."""
    dtype = torch.get_autocast_dtype("cpu")
    if dtype not in _DTYPES:
        raise TypeError(
            f"autocast asks for {dtype}, which sparse layers do not take; "
            "use torch.autocast('cpu', dtype=torch.bfloat16)."
        )

    def cast(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)

    return cast(input), cast(values), None if bias is None else cast(bias)


def _check(input: Any, values: Tensor, bias: Tensor | None, pattern: SparsePattern) -> None:
    """Raises if the arguments do not fit; says which, what it is, what is taken, and the fix."""
    rows, cols = pattern.shape
    if not isinstance(input, Tensor):
        raise TypeError(f"input is a {type(input).__name__}; a sparse layer takes a torch.Tensor.")
    for name, tensor in (("input", input), ("values", values)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name} is {tensor.dtype}; a sparse layer takes torch.float32, torch.float64 or "
                f"torch.bfloat16. Convert it, for instance with {name}.float()."
            )
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"{name} is on {tensor.device}; sparse layers run on the CPU only. "
                f"Move it with {name}.cpu()."
            )
    if input.dtype is not values.dtype:
        raise TypeError(
            f"input is {input.dtype} but the layer's values are {values.dtype}. Convert the input "
            f"with input.to({values.dtype}), or the layer with layer.to({input.dtype})."
        )
    if bias is not None and bias.dtype is not values.dtype:
        raise TypeError(
            f"bias is {bias.dtype} but values are {values.dtype}. "
            f"Convert both alike, for instance with layer.to({values.dtype})."
        )
    if input.device != values.device:
        raise ValueError(
            f"input is on {input.device} but the layer's values are on {values.device}. "
            f"Move the input with input.to({str(values.device)!r})."
        )
    if input.ndim == 0 or input.shape[-1] != cols:
        raise ValueError(
            f"input has shape {tuple(input.shape)}, but the layer takes (*, {cols}): its weight is "
            f"{rows} x {cols} (out_features x in_features), so the last dimension must be {cols}."
        )
