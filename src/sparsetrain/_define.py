"""How a family that is written in Python becomes operations beside the native ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from sparsetrain import _native  # noqa: F401  (loads the library that defines the namespace)

__all__ = ["Operations", "define", "registered"]

_LIBRARY = torch.library.Library("sparsetrain", "FRAGMENT")  # type: ignore[no-untyped-call]

# forward, grad_input, grad_values, backward (see _products.Family).
Operations = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any], Callable[..., Any]]


def registered(name: str, suffixes: Iterable[str]) -> Operations:
    """The four operations `name` + suffix."""
    forward, grad_input, grad_values, backward = (
        getattr(torch.ops.sparsetrain, name + suffix).default for suffix in suffixes
    )
    return forward, grad_input, grad_values, backward


def define(
    name: str, schemas: Mapping[str, str], *implementations: Callable[..., Any]
) -> Operations:
    """Registers four functions for the CPU.

    Args:
        name: of the first operation; the others have a suffix.
        schemas: suffix to arguments and results, in the order of `implementations`.
        implementations: forward, grad_input, grad_values, backward.
    """
    for (suffix, schema), function in zip(schemas.items(), implementations, strict=True):
        _LIBRARY.define(name + suffix + schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name + suffix, function, "CPU")  # type: ignore[no-untyped-call]
    return registered(name, schemas)
