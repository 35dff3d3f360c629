"""What a sparse layer takes: autocast, and the errors for everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsetrain.pattern import SparsePattern

__all__ = ["DTYPES", "autocast", "check", "check_tensors", "computed_densely"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def autocast(
    input: Tensor, values: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts to the autocast dtype; as F.linear does, float64 and integers are left alone."""
    dtype = torch.get_autocast_dtype("cpu")
    if dtype not in DTYPES:
        raise TypeError(
            f"autocast asks for {dtype}, which sparse layers do not take; "
            "use torch.autocast('cpu', dtype=torch.bfloat16)."
        )

    def cast(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return tensor
        return tensor if tensor.dtype is torch.float64 else tensor.to(dtype)

    return cast(input), cast(values), None if bias is None else cast(bias)


def computed_densely(pattern: SparsePattern, values: Tensor, input: Tensor) -> bool:
    """Whether nothing is left out, so that `values` is the dense weight and the library multiplies.

    Not for small weights, which gain nothing, nor where torch is asked for determinism: the sparse
    kernels give the same bits for any number of threads, and the library does not.
    """
    rows, cols = pattern.shape
    return (
        pattern.col_indices.size(0) == rows * cols == values.size(0)
        and rows * cols >= 512
        and input.dtype is not torch.bfloat16
        and not torch.are_deterministic_algorithms_enabled()
    )


def check(input: Any, values: Tensor, bias: Tensor | None, pattern: SparsePattern) -> None:
    """Raises if a linear layer's arguments do not fit; says which, what it is, and the fix."""
    check_tensors(input, values, bias)
    rows, cols = pattern.shape
    if input.ndim == 0 or input.shape[-1] != cols:
        raise ValueError(
            f"input has shape {tuple(input.shape)}, but the layer takes (*, {cols}): its weight is "
            f"{rows} x {cols} (out_features x in_features), so the last dimension must be {cols}."
        )


def check_tensors(input: Any, values: Tensor, bias: Tensor | None) -> None:
    """Raises if a type, dtype, device or layout does not fit; says which, what, and the fix."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input is a {type(input).__name__}; a sparse layer takes a torch.Tensor.")
    for name, tensor in (("input", input), ("values", values)):
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {tensor.dtype}; a sparse layer takes torch.float32, torch.float64 or "
                f"torch.bfloat16. Convert it, for instance with {name}.float()."
            )
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(
                f"{name} is on {tensor.device}; sparse layers run on the CPU only. "
                f"Move it with {name}.cpu()."
            )
    if input.layout is not torch.strided:
        raise ValueError(
            f"input has the layout {input.layout}; a sparse layer's weights are sparse, its inputs "
            "are not. Convert it with input.to_dense()."
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
