"""How a convolution that is written in Python becomes operations beside the native ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsetrain import _native  # noqa: F401  (loads the library that defines the namespace)

__all__ = ["NATIVE", "define"]

_LIBRARY = torch.library.Library("sparsetrain", "FRAGMENT")  # type: ignore[no-untyped-call]
_PATTERN = "Tensor crow, Tensor col, Tensor key"
_WINDOW = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"
_SCHEMAS = {
    "": f"(Tensor x, Tensor values, Tensor? bias, {_PATTERN}, {_WINDOW}) -> Tensor",
    "_grad_input": f"(Tensor grad, Tensor values, {_PATTERN}, int[] input_size, {_WINDOW})"
    " -> Tensor",
    "_grad_values": f"(Tensor grad, Tensor x, {_PATTERN}, {_WINDOW}, bool bias)"
    " -> (Tensor, Tensor)",
    "_backward": f"(Tensor grad, Tensor x, Tensor values, {_PATTERN}, {_WINDOW}, bool bias)"
    " -> (Tensor, Tensor, Tensor)",
}

# forward, grad_input, grad_values, backward (see _products.Family).
Operations = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Callable[..., Any]]


def _registered(name: str) -> Operations:
    forward, grad_input, grad_values, backward = (
        getattr(torch.ops.sparsetrain, name + suffix).default for suffix in _SCHEMAS
    )
    return forward, grad_input, grad_values, backward


def define(name: str, *implementations: Callable[..., Any]) -> Operations:
    """Registers the four functions as operations `name`, `name`_grad_input and so on, for the CPU.

    They take what the native operations take, with as many sizes as the kernel has dimensions.
    """
    for (suffix, schema), function in zip(_SCHEMAS.items(), implementations, strict=True):
        _LIBRARY.define(name + suffix + schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name + suffix, function, "CPU")  # type: ignore[no-untyped-call]
    return _registered(name)


NATIVE = _registered("conv2d")
