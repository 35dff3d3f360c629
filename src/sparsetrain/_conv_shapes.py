"""Sizes of convolutions, and the errors for arguments that do not fit."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sparsetrain._arguments import DTYPES, check_tensors

if TYPE_CHECKING:
    from sparsetrain.pattern import SparsePattern

__all__ = [
    "PADDING_MODES",
    "Geometry",
    "check",
    "fits",
    "geometry_of",
    "integers",
    "output_size",
]

PADDING_MODES = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


class Geometry(NamedTuple):
    """How a kernel moves over an input of n spatial dimensions.

    `padding` zeros are added on both sides by the convolution itself; `extra` is what has to be
    added before, as torch.nn.functional.pad takes it, in `mode`. The rest follows: the number of
    `taps` of the kernel, and the `least` sizes that an input must have.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    extra: tuple[int, ...]
    mode: str
    taps: int
    least: tuple[int, ...]


def output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Spatial output sizes for an input of spatial sizes `size`."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    ]


def integers(value: Any, n: int, name: str, least: int) -> tuple[int, ...]:
    """`value`, an integer or n of them, as n integers of at least `least`.

    Raises:
        TypeError: something else than integers.
        ValueError: another number of them, or one below `least`.
    """
    try:
        many = isinstance(value, (tuple, list))
        numbers = tuple(operator.index(v) for v in value) if many else (operator.index(value),) * n
        if any(isinstance(v, bool) for v in (value if many else (value,))):
            raise TypeError
    except TypeError:
        raise TypeError(
            f"{name} must be an integer or a tuple of {n}; got {value!r} of type "
            f"{type(value).__name__}"
        ) from None
    if len(numbers) != n:
        raise ValueError(f"{name} must be an integer or a tuple of {n}; got {value!r}")
    if any(v < least for v in numbers):
        raise ValueError(f"{name} must be at least {least} in each dimension; got {value!r}")
    return numbers


def geometry_of(
    kernel_size: tuple[int, ...],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
) -> Geometry:
    """Checks the arguments of a convolution and splits the padding.

    Raises:
        TypeError: not integers, or not strings where strings are taken.
        ValueError: too small, too many or too few numbers, an unknown word, or "same" with a
            stride.
    """
    n = len(kernel_size)
    strides = integers(stride, n, "stride", 1)
    dilations = integers(dilation, n, "dilation", 1)
    (groups,) = integers(groups, 1, "groups", 1)
    if not isinstance(padding_mode, str) or padding_mode not in PADDING_MODES:
        raise ValueError(
            f"padding_mode must be one of {', '.join(map(repr, PADDING_MODES))}; "
            f"got {padding_mode!r}"
        )
    if isinstance(padding, str):
        before, after = _padding_by_name(padding, kernel_size, strides, dilations)
    else:
        before = after = integers(padding, n, "padding", 0)
    mode = PADDING_MODES[padding_mode]
    inside = before if mode == "constant" else (0,) * n
    rest = [(b - i, a - i) for b, a, i in zip(before, after, inside, strict=True)]
    extra = tuple(v for pair in reversed(rest) for v in pair)
    return Geometry(
        kernel_size,
        strides,
        inside,
        dilations,
        groups,
        extra if any(extra) else (),
        mode,
        math.prod(kernel_size),
        tuple(
            d * (k - 1) + 1 - b - a
            for k, d, b, a in zip(kernel_size, dilations, before, after, strict=True)
        ),
    )


def _padding_by_name(
    name: str, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and after; where it cannot be halved, "same" adds the odd one after."""
    if name == "valid":
        return (0,) * len(kernel_size), (0,) * len(kernel_size)
    if name != "same":
        raise ValueError(f"padding must be integers, 'same' or 'valid'; got {name!r}")
    if any(s != 1 for s in stride):
        raise ValueError(
            f"padding='same' needs stride 1; got stride {stride}: give the padding in integers"
        )
    sums = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    return tuple(s // 2 for s in sums), tuple(s - s // 2 for s in sums)


def check(
    input: Any,
    values: Tensor,
    bias: Tensor | None,
    pattern: SparsePattern,
    geometry: Geometry,
) -> None:
    """Raises if the arguments do not fit; says which, what it is, what is taken, and the fix."""
    check_tensors(input, values, bias)
    n, taps = len(geometry.kernel_size), geometry.taps
    rows, cols = pattern.shape
    if cols % taps:
        raise ValueError(
            f"pattern has {cols} columns, which is no multiple of the {taps} taps of kernel_size "
            f"{geometry.kernel_size}: its shape is (out_channels, in_channels / groups * taps)."
        )
    if rows % geometry.groups:
        raise ValueError(
            f"groups = {geometry.groups} does not divide the {rows} output channels of the pattern."
        )
    channels = cols // taps * geometry.groups
    sizes = ", ".join("DHW"[-n:] if n > 1 else "L")
    if input.ndim not in (n + 1, n + 2):
        raise ValueError(
            f"input has shape {tuple(input.shape)}, but the layer takes (N, {channels}, {sizes}), "
            f"or ({channels}, {sizes}) without a batch."
        )
    if input.shape[-n - 1] != channels:
        raise ValueError(
            f"input has shape {tuple(input.shape)}, that is {input.shape[-n - 1]} channels, but "
            f"the layer takes {channels}: (N, {channels}, {sizes})."
        )
    _check_sizes(tuple(input.shape[-n:]), geometry)


def fits(
    input: Any, values: Tensor, bias: Tensor | None, pattern: SparsePattern, geometry: Geometry
) -> bool:
    """Whether `check` has nothing to say; quicker than asking it."""
    if not (
        isinstance(input, Tensor)
        and input.dtype in DTYPES
        and input.dtype is values.dtype
        and (bias is None or bias.dtype is values.dtype)
        and input.is_cpu
        and values.is_cpu
        and input.layout is torch.strided
    ):
        return False
    least, groups = geometry.least, geometry.groups
    rows, cols = pattern.shape
    shape = input.shape
    return (
        -2 <= len(least) - len(shape) <= -1
        and shape[-len(least) - 1] * geometry.taps == cols * groups
        and rows % groups == 0
        and cols % geometry.taps == 0
        and all(map(operator.ge, shape[-len(least) :], least))
    )


def _check_sizes(size: tuple[int, ...], geometry: Geometry) -> None:
    """Raises where the kernel is larger than the padded input."""
    reach = tuple(
        d * (k - 1) + 1 for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)
    )
    padded = tuple(n + r - low for n, r, low in zip(size, reach, geometry.least, strict=True))
    if any(p < r for p, r in zip(padded, reach, strict=True)):
        raise ValueError(
            f"input has spatial sizes {size}, padded {padded}, which is smaller than the kernel "
            f"with its dilation, {reach}: pad more, or give a larger input."
        )
