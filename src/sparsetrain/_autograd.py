"""What the operations of ops.py share: how one is made differentiable and mappable by vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as functorch_active
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch.autograd import forward_ad

# Looked up once: on a tiny layer, an attribute chain costs as much as the call.
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing

__all__ = [
    "Grads",
    "InDims",
    "below_autograd",
    "direct",
    "functions",
    "refuse_mapped_pattern",
    "total",
    "traced",
    "transforming",
    "vmap_by_slices",
]

# One entry per input of the operation; None where the input has no gradient.
Grads = tuple[Tensor | None, ...]
# As torch.vmap gives them: one entry per input, None where it is not mapped (a list of None for a
# list of numbers).
InDims = tuple[int | None, ...]
_Out = TypeVar("_Out")


def direct(op: Callable[..., _Out]) -> Callable[..., _Out]:
    """The dispatcher's own entry of an operation, without a Python frame around it (0.4 us)."""
    return op._op  # type: ignore[attr-defined, no-any-return]


def functions(
    op: Callable[..., _Out],
    call: Callable[..., _Out],
    keep: Callable[..., tuple[Tensor | None, ...]],
    backward: Callable[..., Grads],
    jvp: Callable[..., Any],
) -> tuple[Callable[..., _Out], Callable[..., _Out]]:
    """Registers the derivatives of `op` and wraps them into the two kinds of autograd.Function.

    Args:
        op: the registered operation.
        call: what computes it where nothing has to be traced.
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

    class Fast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with below_autograd():
                output = call(*inputs)
            save(ctx, inputs, output)
            return output

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*_opened(inputs))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            kept = keep(ctx, _opened(inputs), (True,) * len(inputs))
            ctx.save_for_backward(*kept)
            ctx.save_for_forward(*kept)  # must be the same: vmap holds one list of both

    Fast.backward = staticmethod(backward)  # type: ignore[method-assign]
    Transformable.backward = staticmethod(backward)  # type: ignore[method-assign]
    Transformable.jvp = staticmethod(jvp)  # type: ignore[method-assign]
    torch.library.register_autograd(op, backward, setup_context=save)  # type: ignore[arg-type]
    # Function.apply first looks for active transforms, which the typed functions have done already,
    # and for inputs that outlived one, which the dispatcher unwraps as well: 2.5 of 12 us for a
    # tiny layer. The inner apply does the work.
    return (
        super(torch.autograd.Function, Fast).apply,
        lambda *inputs: Transformable.apply(*_closed(inputs)),  # type: ignore[no-untyped-call]
    )


class _Closed:
    """A list of numbers that torch.func does not look into: it counts each of them as an input."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers


def _closed(inputs: tuple[Any, ...]) -> list[Any]:
    return [_Closed(i) if isinstance(i, (list, tuple)) else i for i in inputs]


def _opened(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(i.numbers if isinstance(i, _Closed) else i for i in inputs)


def vmap_by_slices(
    function: Callable[..., Any], batch_size: int, in_dims: InDims, args: Sequence[Any]
) -> Any:
    """Calls `function` once per slice and stacks the results along a new first dimension."""

    def pick(arg: Any, dim: int | None, index: int) -> Any:
        if not isinstance(dim, int):
            return arg
        if batch_size:
            return arg.select(dim, index)
        return arg.new_zeros(arg.shape[:dim] + arg.shape[dim + 1 :])  # only its shape matters

    results = [
        function(*(pick(arg, dim, index) for arg, dim in zip(args, in_dims, strict=True)))
        for index in range(max(batch_size, 1))
    ]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts)[:batch_size] for parts in zip(*results, strict=True))
    return torch.stack(results)[:batch_size]


def refuse_mapped_pattern(in_dims: InDims) -> None:
    if any(dim is not None for dim in in_dims):
        raise ValueError(
            "crow, col and key are mapped over by vmap; a sparsity pattern cannot be mapped. "
            "Map over the input or the values only (in_dims=None for the pattern)."
        )


def total(terms: list[Tensor]) -> Tensor:
    """The sum of at least one tensor: the tangents that reached one output."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result


def traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is looking on."""
    return _is_compiling() or _is_tracing()


def transforming() -> bool:
    """Whether torch.func or forward-mode AD may want more than a reverse-mode gradient."""
    return functorch_active() or forward_ad._current_level >= 0
