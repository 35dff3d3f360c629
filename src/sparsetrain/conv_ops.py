"""The differentiable operations of a convolution with a sparse weight, on plain tensors.

As for the linear layer (ops.py), three products that are each other's derivatives and a fourth that
is two of them at once, here for each of three families:

    native      C++ kernels, 2-D                        torch.ops.sparsetrain.conv2d...
    unfolded    3-D, by the native 2-D kernels          torch.ops.sparsetrain.conv_unfolded...
    dense       a dense weight, library product         torch.ops.sparsetrain.conv_dense...

`_conv_choice.choose` says which family computes which product; a 1-D convolution is a 2-D one of
height 1. The machinery of derivatives, vmap and tracing is that of `_products`.

Shape letters: N batch, C channels in, O channels out, G groups, D H W sizes, k kernel sizes. The
pattern is CSR over weight.reshape(O, C / G * k...): `crow` int32 (O + 1,), `col` int32 (nnz,),
`key` int64 (1,). A window is kernel_size, stride, padding, dilation (one integer per dimension
each) and groups; padding is with zeros.

Paper: Nikdan et al., SparseProp, 2023, https://arxiv.org/abs/2302.04852.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsetrain._arguments import autocast, computed_densely
from sparsetrain._autograd import traced
from sparsetrain._conv_choice import Problem, choose
from sparsetrain._conv_define import DENSE, NATIVE, SCHEMAS
from sparsetrain._conv_shapes import Geometry, check, fits, geometry_of, integers, output_size
from sparsetrain._conv_unfolded import UNFOLDED
from sparsetrain._planner import DENSELY, Choice, Direction, Planner

if TYPE_CHECKING:
    from sparsetrain.pattern import SparsePattern

__all__ = ["conv", "conv_backward", "conv_grad_input", "conv_grad_values", "sparse_conv"]


# Looked up once: on a tiny layer, an attribute chain costs as much as the check.
_is_autocast_enabled = torch.is_autocast_enabled


class _Shapes:
    """What derivatives must know about the shapes of a convolution (see _products.Shapes)."""

    def output(self, x: Sequence[int], rows: int, geometry: tuple[Any, ...]) -> list[int]:
        return [x[0], rows, *output_size(x[2:], *geometry[:4])]

    def size(self, x: Sequence[int]) -> list[int]:
        return list(x)

    def input(self, grad: Sequence[int], size: Sequence[int]) -> Sequence[int]:
        return size

    def folded(self, size: Sequence[int], count: int) -> list[int]:
        return [size[0] * count, *size[1:]]

    def weight(self, x: Sequence[int], rows: int, geometry: tuple[Any, ...]) -> tuple[int, ...]:
        kernel_size, *_, groups = geometry
        return rows, x[1] // groups, *kernel_size


def _choose(
    direction: Direction,
    x_shape: Sequence[int],
    rows: int,
    nnz: int,
    dtype: torch.dtype,
    threads: int,
    deterministic: bool,
    window: tuple[Any, ...],
) -> Choice:
    kernel_size, stride, padding, dilation, groups = window
    problem = Problem(
        x_shape,
        rows,
        nnz,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        dtype,
        deterministic,
        threads,
    )
    return choose(direction, problem)


PLANNER = Planner(
    "conv",
    SCHEMAS,
    {"native": NATIVE, "unfolded": UNFOLDED, "dense": DENSE},
    _Shapes(),
    _choose,
)


def conv(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow: Tensor,
    col: Tensor,
    key: Tensor,
    *window: Any,
) -> Tensor:
    """y = W * x + bias, a cross-correlation.

    Args:
        x: (N, C, H, W) or (N, C, D, H, W), float32, float64 or bfloat16, any strides.
        values: (nnz,) in CSR order, dtype of `x`.
        bias: (O,) or None, dtype of `x`.
        crow, col, key: the pattern.
        window: kernel_size, stride, padding, dilation, groups.

    Returns:
        (N, O, ...), contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or an invalid pattern.
    """
    return PLANNER.products.forward(x, values, bias, crow, col, key, *window)


def conv_grad_input(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    key: Tensor,
    size: Sequence[int],
    *window: Any,
) -> Tensor:
    """The gradient of `conv` with respect to an x of shape `size`.

    Args:
        grad: (N, O, ...), any strides.
        values, crow, col, key, window: as in `conv`.
        size: (N, C, ...).

    Returns:
        A contiguous tensor of shape `size`.
    """
    return PLANNER.products.grad_input(grad, values, crow, col, key, size, *window)


def conv_grad_values(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, key: Tensor, *window_and_bias: Any
) -> tuple[Tensor, Tensor]:
    """The gradients of `conv` with respect to the values and the bias.

    Args:
        grad: (N, O, ...), any strides.
        x, crow, col, key: as in `conv`.
        window_and_bias: the window, and whether the gradient of the bias is wanted.

    Returns:
        (nnz,) in CSR order, and (O,), or (0,) where it is not wanted.
    """
    return PLANNER.products.grad_values(grad, x, crow, col, key, *window_and_bias)


def conv_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    key: Tensor,
    *window_and_bias: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`conv_grad_input` and `conv_grad_values`, in one pass where one family computes both."""
    return PLANNER.products.backward(grad, x, values, crow, col, key, *window_and_bias)


def sparse_conv(
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
    """`torch.nn.functional.conv1d`, `conv2d` or `conv3d` with a sparse weight.

    Works under autograd (any order), torch.func, vmap, torch.compile, checkpointing and CPU
    autocast, which casts the floating-point arguments to its own dtype, float64 excepted. With
    torch.use_deterministic_algorithms(True), and by the sparse kernels always, the results are
    bitwise the same for any number of threads.

    Args:
        input: (N, C, W), (N, C, H, W) or (N, C, D, H, W) as `kernel_size` has one, two or three
            numbers, or without the N; float32, float64 or bfloat16, any strides, CPU.
        values: (nnz,) the nonzeros of the weight in the order of the pattern, dtype of `input`.
        bias: (O,) or None, dtype of `input`.
        pattern: where the nonzeros are; its shape is (O, C / groups * product of kernel_size).
        kernel_size: one integer per spatial dimension.
        stride, dilation: integers of at least 1, one or one per dimension.
        padding: integers of at least 0, one or one per dimension; "valid" for none; "same" for as
            much as keeps the size (stride 1 only), the odd one behind.
        groups: divides C and O.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Returns:
        (N, O, ...) or (O, ...), dtype of `input`.

    Raises:
        TypeError: `input` is no tensor, or not of a dtype of the above, or not of that of `values`
            and `bias`; sizes that are no integers.
        ValueError: another number of channels or dimensions, a kernel larger than the padded input,
            groups that do not divide, sizes out of range, or a tensor that is not on the CPU or not
            dense.
        RuntimeError: `values` or `bias` is not of the length that the pattern asks for, or padding
            that torch.nn.functional.pad refuses.
    """
    sizes = (kernel_size, stride, padding, dilation, groups, padding_mode)
    call, route = PLANNER.known(input, values, bias, pattern, sizes)
    crow, col, key = pattern.crow_indices, pattern.col_indices, pattern.key
    if route is not None:
        y: Tensor = PLANNER.routed(route.number, input, values, bias, crow, col, key)
        return y
    y, geometry = _sparse_conv(input, values, bias, pattern, sizes)
    n = len(geometry.kernel_size)
    # With one dimension, without a batch or padded apart, it is another product that is computed.
    if call is not None and n > 1 and input.ndim == n + 2 and not geometry.extra:
        PLANNER.keep(call, input.shape, input, crow, col, geometry[:5])
    return y


def _sparse_conv(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: SparsePattern,
    sizes: tuple[Any, ...],
) -> tuple[Tensor, Geometry]:
    """`sizes`: kernel_size, stride, padding, dilation, groups, padding_mode."""
    # A list of them first: a generator takes half as long again.
    window = tuple([tuple(size) if isinstance(size, list) else size for size in sizes])
    find = _geometry if traced() else _cached_geometry
    geometry = find(*window)
    if _is_autocast_enabled("cpu"):
        input, values, bias = autocast(input, values, bias)
    if not fits(input, values, bias, pattern, geometry):
        check(input, values, bias, pattern, geometry)
    if input.ndim == len(geometry.kernel_size) + 1:
        y = _batched(input.unsqueeze(0), values, bias, pattern, geometry).squeeze(0)
    else:
        y = _batched(input, values, bias, pattern, geometry)
    return y, geometry


def _geometry(kernel_size: Any, *window: Any) -> Geometry:
    if not isinstance(kernel_size, (tuple, list)) or len(kernel_size) not in (1, 2, 3):
        raise ValueError(
            "kernel_size must be a tuple of 1, 2 or 3 integers, one for each spatial dimension; "
            f"got {kernel_size!r}"
        )
    kernel = integers(kernel_size, len(kernel_size), "kernel_size", 1)
    return geometry_of(kernel, *window)


_cached_geometry = functools.lru_cache(maxsize=1024)(_geometry)


def _batched(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: SparsePattern, geometry: Geometry
) -> Tensor:
    """(N, C, ...) -> (N, O, ...)"""
    if geometry.extra:
        x = pad(x, geometry.extra, geometry.mode)
    window: tuple[Any, ...] = geometry[:5]
    kernel_size, stride, padding, dilation, groups = window
    flat = len(kernel_size) == 1
    if flat:  # computed with two dimensions, the first of size 1
        x = x.unsqueeze(2)
        window = ((1, *kernel_size), (1, *stride), (0, *padding), (1, *dilation), groups)
    topology = (pattern.crow_indices, pattern.col_indices, pattern.key)
    if computed_densely(pattern, values, x) and _chosen_dense(x, topology, window):
        kernel_size, stride, padding, dilation, groups = window
        weight = values.view(pattern.shape[0], x.size(1) // groups, *kernel_size)
        zero = (0,) * len(kernel_size)
        y = torch.convolution(x, weight, bias, stride, padding, dilation, False, zero, groups)
        y = y.contiguous()
    else:
        y = PLANNER.forward(x, values, bias, *topology, *window)
    return y.squeeze(2) if flat else y


def _chosen_dense(x: Tensor, topology: tuple[Tensor, Tensor, Tensor], window: Any) -> bool:
    """Whether the plan has the library compute all products. Then, if no weight is left out, torch
    may be called itself: 15 to 100 us quicker, for a layer and step, than by way of the plan."""
    if traced():
        return True
    crow, col, _ = topology
    return PLANNER.families_of(x, crow, col, window) == DENSELY
