"""The convolutional layers with a sparse weight."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sparsetrain._conv_shapes import geometry_of, integers
from sparsetrain.conv_ops import sparse_conv
from sparsetrain.nn._base import SparseLayer, sparse_parts
from sparsetrain.pattern import SparsePattern, check_sparsity

__all__ = ["SparseConv1d", "SparseConv2d", "SparseConv3d"]

_Conv = TypeVar("_Conv", bound="_SparseConv")


class _SparseConv(SparseLayer):
    """A convolution over inputs of `dimensions` spatial dimensions."""

    dimensions: ClassVar[int]
    dense_type: ClassVar[type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        sparsity: float = 0.9,
        pattern: SparsePattern | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A layer with a uniformly random pattern, or the given one.

        Args:
            in_channels, out_channels: at least 1, multiples of `groups`.
            kernel_size, stride, dilation: integers of at least 1, one or one per dimension.
            padding: integers of at least 0, one or one per dimension, or "same" (stride 1 only), or
                "valid".
            groups: into how many independent convolutions the channels are divided.
            bias: whether there is one.
            padding_mode: "zeros", "reflect", "replicate" or "circular".
            sparsity: fraction of weights left out, in [0, 1); exactly
                ``round((1 - sparsity) * number of weights)`` remain, at least one. Not used where
                `pattern` is given.
            pattern: of shape (out_channels, in_channels / groups * product of kernel_size), shared,
                not copied.
            device: "cpu", or "meta" for a layer without data.
            dtype: torch.float32, torch.float64 or torch.bfloat16; default torch's default.

        Raises:
            TypeError: an argument of the wrong type, or an unsupported dtype.
            ValueError: sparsity outside [0, 1), a pattern of another shape, groups that do not
                divide, numbers that are too small, or an unknown word.
        """
        super().__init__()
        n = self.dimensions
        (self.in_channels,) = integers(in_channels, 1, "in_channels", 1)
        (self.out_channels,) = integers(out_channels, 1, "out_channels", 1)
        self.kernel_size = integers(kernel_size, n, "kernel_size", 1)
        geometry_of(self.kernel_size, stride, padding, dilation, groups, padding_mode)
        self.stride = integers(stride, n, "stride", 1)
        self.padding = padding if isinstance(padding, str) else integers(padding, n, "padding", 0)
        self.dilation = integers(dilation, n, "dilation", 1)
        (self.groups,) = integers(groups, 1, "groups", 1)
        self.padding_mode = padding_mode
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % self.groups:
                raise ValueError(
                    f"groups = {self.groups} does not divide {name} = {getattr(self, name)}; "
                    "it must divide both in_channels and out_channels"
                )
        self._create_state(pattern, check_sparsity(sparsity), bool(bias), device, dtype)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out_channels, in_channels / groups, *kernel_size)"""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @classmethod
    def from_dense(cls: type[_Conv], dense: Any, mask: Tensor | None = None) -> _Conv:
        """An independent sparse copy: dtype, bias, training and requires_grad flags as in `dense`.

        Law: ``from_dense(m).to_dense()`` has the weights of `m`.

        Args:
            dense: a torch.nn.Conv1d, Conv2d or Conv3d, as the class says, on the CPU; may carry
                the weight_orig and weight_mask of torch.nn.utils.prune.
            mask: bool, of the weight's shape: what to keep, zeros among it too. Default: what a
                pruning mask keeps, else the nonzeros.

        Raises:
            TypeError: `dense` is of another type or has an unsupported dtype; `mask` not bool.
            ValueError: `mask` of another shape, or `dense` on another device.
        """
        if not isinstance(dense, cls.dense_type):
            raise TypeError(
                f"dense must be a torch.nn.{cls.dense_type.__name__}; got {type(dense).__name__}"
            )
        pattern, values = sparse_parts(dense, mask)
        layer = cls(
            dense.in_channels,
            dense.out_channels,
            dense.kernel_size,
            dense.stride,
            dense.padding,
            dense.dilation,
            dense.groups,
            dense.bias is not None,
            dense.padding_mode,
            pattern=pattern,
            device="meta",
            dtype=values.dtype,
        )
        layer._take_tensors(values, dense.bias, like=dense)
        return layer

    def to_dense(self) -> nn.Module:
        """An independent dense layer: dtype, bias, training and requires_grad flags as here."""
        dense_type: Any = self.dense_type
        dense: nn.Module = dense_type(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
            dtype=self.values.dtype,
        )
        return self._fill_dense(dense)

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, ...) -> (N, out_channels, ...), or both without N; see sparse_conv.

        Raises:
            TypeError, ValueError: an input that does not fit; see conv_ops.sparse_conv.
        """
        y = sparse_conv(
            input,
            self.values if self._active is None else self._forward_values(),
            self.bias,
            self._pattern,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )
        return y if self._recorder is None else self._recorded(input, y)

    def extra_repr(self) -> str:
        n = self.dimensions
        parts = [
            f"{self.in_channels}, {self.out_channels}",
            f"kernel_size={self.kernel_size}",
            f"stride={self.stride}",
        ]
        if self.padding != (0,) * n:
            parts.append(f"padding={self.padding}")
        if self.dilation != (1,) * n:
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        return ", ".join([*parts, self._state_repr()])


class SparseConv1d(_SparseConv):
    """torch.nn.Conv1d with a weight that exists only where its pattern says.

    Computes, forward and backward, what the dense layer with a masked weight would.

    Attributes:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as
            in torch.nn.Conv1d.
        values: Parameter (nnz,), the weights in the order of weight.reshape(out_channels, -1).
        bias: Parameter (out_channels,) or None.
        pattern: SparsePattern of shape (out_channels, in_channels / groups * kernel size).
    """

    dimensions = 1
    dense_type = nn.Conv1d


class SparseConv2d(_SparseConv):
    """torch.nn.Conv2d with a weight that exists only where its pattern says.

    Computes, forward and backward, what the dense layer with a masked weight would.

    Attributes:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as
            in torch.nn.Conv2d.
        values: Parameter (nnz,), the weights in the order of weight.reshape(out_channels, -1).
        bias: Parameter (out_channels,) or None.
        pattern: SparsePattern of shape (out_channels, in_channels / groups * kh * kw).
    """

    dimensions = 2
    dense_type = nn.Conv2d


class SparseConv3d(_SparseConv):
    """torch.nn.Conv3d with a weight that exists only where its pattern says.

    Computes, forward and backward, what the dense layer with a masked weight would.

    Attributes:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as
            in torch.nn.Conv3d.
        values: Parameter (nnz,), the weights in the order of weight.reshape(out_channels, -1).
        bias: Parameter (out_channels,) or None.
        pattern: SparsePattern of shape (out_channels, in_channels / groups * kd * kh * kw).
    """

    dimensions = 3
    dense_type = nn.Conv3d
