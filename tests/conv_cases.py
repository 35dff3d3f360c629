"""What the tests of convolutions share: settings, layouts, cases and their exact results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helpers import Exact, generator, random_mask
from sparsetrain import conv_ops
from sparsetrain._planner import Choice
from sparsetrain.conv_ops import sparse_conv
from sparsetrain.pattern import SparsePattern
from sparsetrain.reference import masked_conv


@dataclass(frozen=True)
class Setting:
    """A convolution and the spatial sizes it is applied to."""

    channels: int
    out: int
    kernel_size: tuple[int, ...]
    size: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def window(self) -> dict[str, Any]:
        return {"kernel_size": self.kernel_size, **dict(self.options)}

    @property
    def groups(self) -> int:
        return self.window.get("groups", 1)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out, self.channels // self.groups, *self.kernel_size)

    @property
    def mask_shape(self) -> tuple[int, int]:
        return self.out, math.prod(self.weight_shape[1:])


def setting(
    channels: int, out: int, kernel: tuple[int, ...], size: tuple[int, ...], **options: Any
) -> Setting:
    return Setting(channels, out, kernel, size, tuple(options.items()))


SETTINGS = {
    "3x3": setting(6, 9, (3, 3), (9, 11), padding=1),
    "3x3_without_padding": setting(6, 9, (3, 3), (8, 5)),
    "3x3_stride_2": setting(6, 9, (3, 3), (9, 12), padding=1, stride=2),
    "3x3_stride_2_without_padding": setting(6, 9, (3, 3), (10, 8), stride=2),
    "3x3_dilation_2": setting(6, 9, (3, 3), (9, 10), padding=2, dilation=2),
    "3x3_more_padding_than_kernel": setting(3, 4, (3, 3), (4, 5), padding=4),
    "3x3_groups": setting(6, 9, (3, 3), (7, 7), padding=1, groups=3),
    "depthwise": setting(8, 8, (3, 3), (7, 9), padding=1, groups=8),
    "depthwise_two_per_channel_stride_2": setting(8, 16, (3, 3), (8, 9), stride=2, groups=8),
    "1x1": setting(16, 24, (1, 1), (7, 9)),
    "1x1_stride_2": setting(16, 24, (1, 1), (8, 9), stride=2),
    "1x1_padding_groups": setting(16, 24, (1, 1), (5, 6), padding=1, groups=2),
    "7x7_stride_2": setting(3, 8, (7, 7), (17, 15), stride=2, padding=3),
    "2x5_everything_uneven": setting(
        4, 6, (2, 5), (13, 12), stride=(3, 2), padding=(0, 3), dilation=(2, 1), groups=2
    ),
    "kernel_as_large_as_input": setting(5, 7, (4, 6), (4, 6)),
    "one_pixel": setting(20, 30, (3, 3), (1, 1), padding=1),
    "stride_larger_than_kernel": setting(5, 7, (2, 2), (11, 10), stride=4),
    "wide": setting(4, 4, (3, 3), (3, 70), padding=1),
    "tall": setting(4, 4, (3, 3), (70, 3), padding=1),
    "same_even_kernel": setting(4, 6, (4, 2), (7, 6), padding="same"),
    "same_dilated": setting(4, 6, (3, 3), (7, 6), padding="same", dilation=(2, 3)),
    "valid": setting(4, 6, (3, 3), (7, 6), padding="valid"),
    "reflect": setting(4, 6, (3, 3), (7, 6), padding=(2, 1), padding_mode="reflect"),
    "replicate_stride_2": setting(
        4, 6, (3, 3), (7, 6), padding=1, stride=2, padding_mode="replicate"
    ),
    "circular_same_even": setting(4, 6, (4, 3), (7, 6), padding="same", padding_mode="circular"),
    "1d": setting(6, 8, (3,), (33,), padding=1),
    "1d_stride_dilation_groups": setting(6, 8, (5,), (40,), stride=3, dilation=2, groups=2),
    "1d_same_circular": setting(6, 8, (4,), (20,), padding="same", padding_mode="circular"),
    "1d_1x1": setting(6, 8, (1,), (20,)),
    "3d": setting(4, 6, (3, 3, 3), (5, 6, 7), padding=1),
    "3d_everything_uneven": setting(
        4,
        6,
        (2, 3, 1),
        (7, 6, 5),
        stride=(2, 1, 3),
        padding=(1, 2, 0),
        dilation=(3, 1, 2),
        groups=2,
    ),
    "3d_depth_1": setting(4, 6, (1, 3, 3), (4, 6, 7), padding=(0, 1, 1)),
    "3d_same_even": setting(4, 6, (2, 2, 2), (4, 5, 6), padding="same"),
    "3d_replicate": setting(4, 6, (3, 3, 3), (4, 5, 6), padding=1, padding_mode="replicate"),
    "3d_more_padding_than_depth": setting(2, 3, (2, 1, 1), (1, 3, 3), padding=(4, 0, 0), stride=3),
}

SMALL = setting(2, 4, (2, 3), (4, 5), padding=(1, 0), stride=(2, 1), groups=2)


# --------------------------------------------------------------------------------------------------
# Which implementation computes

WAYS = ("sparse", "dense")


@contextmanager
def computed_by(way: str) -> Iterator[None]:
    """Inside, convolutions are computed by the sparse kernels, or by the library product."""

    def forced(direction: str, *problem: Any) -> Choice:
        deep = len(problem[-1][0]) == 3  # the kernel's sizes
        sparse = "unfolded" if deep else "native"
        return Choice(sparse if way == "sparse" else "dense", "forced by a test")

    with conv_ops.PLANNER.choosing(forced):
        yield


# --------------------------------------------------------------------------------------------------
# Layouts: the same numbers at other strides


def _every_other_pixel(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def _inside_a_larger_tensor(t: Tensor) -> Tensor:
    wide = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype)
    for dim, n in enumerate(t.shape):
        wide = wide.narrow(dim, 1, n)
    wide.copy_(t)
    return wide


def _misaligned(t: Tensor) -> Tensor:
    buffer = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype)
    buffer[1:] = t.reshape(-1)
    return buffer[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed_plane": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every_other_pixel": _every_other_pixel,
    "inside_a_larger_tensor": _inside_a_larger_tensor,
    "misaligned": _misaligned,
    "expanded_samples": lambda t: t[:1].expand(t.shape),
    "expanded_channels": lambda t: t[:, :1].expand(t.shape),
    "expanded_pixels": lambda t: t[..., :1].expand(t.shape),
}


# --------------------------------------------------------------------------------------------------
# A case and its exact results


@dataclass
class Case:
    """One problem: x (N, C, ...), values (nnz,), bias (O,), grad (N, O, ...)."""

    pattern: SparsePattern
    x: Tensor
    values: Tensor
    bias: Tensor
    grad: Tensor
    window: dict[str, Any]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.values, self.bias

    def sparse(self, x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        return sparse_conv(x, values, bias, self.pattern, **self.window)

    def masked(self, x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        return masked_conv(x, values, bias, self.pattern, **self.window)

    def require_grad(self) -> Case:
        for leaf in self.leaves:
            leaf.requires_grad_()
        return self


def make_case(
    what: Setting,
    batch: int = 3,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | float = 0.3,
    seed: int = 0,
) -> Case:
    """Signed random numbers; `mask` is bool (rows, cols) or a density."""
    if isinstance(mask, float):
        mask = random_mask(*what.mask_shape, mask, seed)
    pattern = SparsePattern.from_mask(mask)
    source = generator(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)

    x, values, bias = (
        numbers(batch, what.channels, *what.size),
        numbers(pattern.nnz),
        numbers(what.out),
    )
    with torch.no_grad():
        shape = masked_conv(x.double(), values.double(), None, pattern, **what.window).shape
    return Case(pattern, x, values, bias, numbers(*shape), what.window)


def exact_results(case: Case) -> list[Exact]:
    """Output and gradients of x, values and bias, each with the sum of its absolute terms."""

    def run(prepare: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [prepare(leaf.detach().double()).requires_grad_() for leaf in case.leaves]
        y = case.masked(leaves[0], leaves[1], leaves[2])
        return [y.detach(), *torch.autograd.grad(y, leaves, prepare(case.grad.detach().double()))]

    with torch.enable_grad():
        pairs = zip(run(lambda t: t.clone()), run(torch.abs), strict=True)
        return [Exact(value, magnitude) for value, magnitude in pairs]
