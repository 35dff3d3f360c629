"""The families of a convolution: native operations, and one that is written in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsetrain import _define
from sparsetrain._define import Operations

__all__ = ["DENSE", "NATIVE", "SCHEMAS", "define"]

_PATTERN = "Tensor crow, Tensor col, Tensor key"
_WINDOW = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups"
SCHEMAS = {
    "": f"(Tensor x, Tensor values, Tensor? bias, {_PATTERN}, {_WINDOW}) -> Tensor",
    "_grad_input": f"(Tensor grad, Tensor values, {_PATTERN}, int[] input_size, {_WINDOW})"
    " -> Tensor",
    "_grad_values": f"(Tensor grad, Tensor x, {_PATTERN}, {_WINDOW}, bool bias)"
    " -> (Tensor, Tensor)",
    "_backward": f"(Tensor grad, Tensor x, Tensor values, {_PATTERN}, {_WINDOW}, bool bias)"
    " -> (Tensor, Tensor, Tensor)",
}


def define(name: str, *implementations: Callable[..., Any]) -> Operations:
    """Registers the four functions as operations `name`, `name`_grad_input and so on, for the CPU.

    They take what the native operations take, with as many sizes as the kernel has dimensions.
    """
    return _define.define(name, SCHEMAS, *implementations)


NATIVE = _define.registered("conv2d", SCHEMAS)
DENSE = _define.registered("conv_dense", SCHEMAS)
