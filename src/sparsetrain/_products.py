"""The three products of a sparse weight, made differentiable once for every kind of layer.

A layer with a sparse weight W needs these, whatever its W does to x (a matrix product, a
convolution):

    forward(x, values, bias)      y  = W x + bias
    grad_input(grad, values)      dx = W^T grad
    grad_values(grad, x)          the gradient of W at its nonzeros, and that of the bias

Each is linear in each of its arguments, and the derivative of each is made of the other two, so
they are closed under differentiation of any order. A fourth, `backward`, is the last two at once.

A `Family` is one implementation of the four as registered operations. Which family computes which
product is up to a `Products`; the derivatives ask it as well, so that families may be mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sparsetrain._autograd import (
    Grads,
    InDims,
    below_autograd,
    direct,
    functions,
    refuse_mapped_pattern,
    total,
    traced,
    transforming,
    vmap_by_slices,
)

__all__ = ["Family", "Products", "Shapes", "sum_over_outputs"]

# Python integers, and tuples of them, that an operation takes behind its pattern.
Geometry = tuple[Any, ...]
_Out = TypeVar("_Out")

# Looked up once: on a tiny layer, an attribute chain costs as much as the check.
_is_grad_enabled = torch.is_grad_enabled


class Shapes(Protocol):
    """What the derivatives must know about one kind of layer."""

    def output(self, x: Sequence[int], rows: int, geometry: Geometry) -> Sequence[int]:
        """Shape of the output for an input of shape `x` and `rows` output units."""

    def size(self, x: Sequence[int]) -> Any:
        """What grad_input is told about the shape of its result."""

    def input(self, grad: Sequence[int], size: Any) -> Sequence[int]:
        """The shape that `size` stands for."""

    def folded(self, size: Any, count: int) -> Any:
        """`size` with the batch `count` times as large."""

    def weight(self, x: Sequence[int], rows: int, geometry: Geometry) -> Sequence[int]:
        """Shape of the dense weight of a layer that takes inputs of shape `x`."""


class Products(Protocol):
    """Four differentiable functions; crow, col and key are the pattern of W."""

    def forward(
        self,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        crow: Tensor,
        col: Tensor,
        key: Tensor,
        *geometry: Any,
    ) -> Tensor: ...

    def grad_input(
        self,
        grad: Tensor,
        values: Tensor,
        crow: Tensor,
        col: Tensor,
        key: Tensor,
        size: Any,
        *geometry: Any,
    ) -> Tensor: ...

    def grad_values(
        self,
        grad: Tensor,
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        key: Tensor,
        *geometry_and_bias: Any,
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        values: Tensor,
        crow: Tensor,
        col: Tensor,
        key: Tensor,
        *geometry_and_bias: Any,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def sum_over_outputs(grad: Tensor) -> Tensor:
    """(B, O, ...) -> (O,), the gradient of a bias; bitwise the same for any number of threads.

    torch shares out the results of a sum between its threads, but a single result it cuts into
    pieces, one for each thread. Hence two of them for one.
    """
    dims = [0, *range(2, grad.ndim)]
    if grad.shape[1] == 1:
        return grad.expand(-1, 2, *grad.shape[2:]).sum(dims)[:1]
    return grad.sum(dims)


class Family:
    """One implementation of the products, by four registered operations.

    The operations take, in this order,

        forward(x, values, bias, crow, col, key, *geometry) -> y
        grad_input(grad, values, crow, col, key, size, *geometry) -> dx
        grad_values(grad, x, crow, col, key, *geometry, bias) -> (dvalues, dbias)
        backward(grad, x, values, crow, col, key, *geometry, bias) -> (dx, dvalues, dbias)

    and give contiguous tensors; dbias is (0,) where bias is false. Making a Family registers their
    fakes, derivatives and vmap rules.
    """

    def __init__(
        self,
        forward: Callable[..., Tensor],
        grad_input: Callable[..., Tensor],
        grad_values: Callable[..., tuple[Tensor, Tensor]],
        backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
        shapes: Shapes,
        products: Products | None = None,
        calls: Sequence[Callable[..., Any]] | None = None,
        recorded: Callable[..., Tensor] | None = None,
    ) -> None:
        """`products` is asked for the derivatives: this family itself where None. `calls` are the
        four functions to call where nothing has to be traced: the operations where None.
        `recorded` computes the forward product where plain autograd records it: `forward.function`
        where None."""
        products = products or self
        calls = calls or [direct(op) for op in (forward, grad_input, grad_values, backward)]
        self.forward = _Operation(_Forward(forward, shapes, products), calls[0], recorded)
        self.grad_input = _Operation(_GradInput(grad_input, shapes, products), calls[1])
        self.grad_values = _Operation(_GradValues(grad_values, shapes, products), calls[2])
        self._backward = _Backward(backward, shapes, products)
        self._backward_op = backward
        self._backward_direct: Callable[..., tuple[Tensor, Tensor, Tensor]] = calls[3]
        torch.library.register_autograd(
            backward,  # type: ignore[arg-type]
            self._backward.backward,
            setup_context=self._backward.save,
        )

    def backward(
        self, grad: Tensor, x: Tensor, values: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both gradients at once, where nothing asks for their own derivatives."""
        if transforming() or (
            _is_grad_enabled() and (grad.requires_grad or x.requires_grad or values.requires_grad)
        ):
            crow, col, key, *geometry, bias = rest
            size = self._backward.shapes.size(x.shape)
            return (
                self.grad_input(grad, values, crow, col, key, size, *geometry),
                *self.grad_values(grad, x, crow, col, key, *geometry, bias),
            )
        if traced():
            return self._backward_op(grad, x, values, *rest)
        with below_autograd():
            return self._backward_direct(grad, x, values, *rest)


class _Rules(Generic[_Out]):
    """Fake, derivatives and vmap rule of one operation, registered on construction."""

    differentiable: tuple[int, ...]

    def __init__(self, op: Callable[..., _Out], shapes: Shapes, products: Products) -> None:
        self.op, self.shapes, self.products = op, shapes, products
        torch.library.register_fake(op, self.fake)  # type: ignore[arg-type]
        torch.library.register_vmap(op, self.vmap)  # type: ignore[arg-type]

    def fake(self, *inputs: Any) -> _Out:
        raise NotImplementedError

    def keep(
        self, ctx: Any, inputs: tuple[Any, ...], needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        raise NotImplementedError

    def backward(self, ctx: Any, *grads: Any) -> Grads:
        raise NotImplementedError

    def jvp(self, ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError

    def vmap(self, info: Any, in_dims: InDims, *inputs: Any) -> Any:
        raise NotImplementedError

    def slices(self, info: Any, in_dims: InDims, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        result = vmap_by_slices(self.op, info.batch_size, in_dims, inputs)
        return result, (0,) * len(result) if isinstance(result, tuple) else 0


class _Operation(Generic[_Out]):
    """The typed way into an operation, by the cheapest route that is right.

    nothing to record                    the native operation itself
    plain autograd                       `recorded`, or an old-style `autograd.Function`
    torch.func, forward-mode AD          a `setup_context` Function, the kind these accept
    torch.compile, torch.export          the registered operation, with its registered derivatives
    """

    def __init__(
        self,
        rules: _Rules[_Out],
        call: Callable[..., _Out],
        recorded: Callable[..., _Out] | None = None,
    ) -> None:
        self.op = rules.op
        self.differentiable = rules.differentiable
        self.direct = call
        self.function, self.transformable = functions(
            rules.op, call, rules.keep, rules.backward, rules.jvp
        )
        self.recorded = recorded or self.function

    def __call__(self, *inputs: Any) -> _Out:
        if transforming():
            return self.transformable(*inputs)
        if traced():
            return self.op(*inputs)
        if _is_grad_enabled():
            for i in self.differentiable:
                if inputs[i] is not None and inputs[i].requires_grad:
                    return self.recorded(*inputs)
        with below_autograd():
            return self.direct(*inputs)


class _Forward(_Rules[Tensor]):
    differentiable = (0, 1, 2)

    def fake(self, *inputs: Any) -> Tensor:
        x, _, _, crow, _, _, *geometry = inputs
        shape = self.shapes.output(x.shape, crow.shape[0] - 1, tuple(geometry))
        return x.new_empty(shape)  # type: ignore[no-any-return]

    def keep(
        self, ctx: Any, inputs: tuple[Any, ...], needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        x, values, _, crow, col, key, *ctx.geometry = inputs
        if not needs[1]:
            ctx.x_shape = x.shape
        return x if needs[1] else None, values if needs[0] else None, crow, col, key

    def backward(self, ctx: Any, *grads: Any) -> Grads:
        (grad,) = grads
        x, values, *pattern = ctx.saved_tensors
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        dx = dvalues = dbias = None
        if needs_x and needs_values:
            dx, dvalues, dbias = self.products.backward(
                grad, x, values, *pattern, *ctx.geometry, needs_bias
            )
        elif needs_x:
            size = self.shapes.size(ctx.x_shape if x is None else x.shape)
            dx = self.products.grad_input(grad, values, *pattern, size, *ctx.geometry)
        elif needs_values:
            dvalues, dbias = self.products.grad_values(grad, x, *pattern, *ctx.geometry, needs_bias)
        if needs_bias and not needs_values:
            dbias = sum_over_outputs(grad)
        if not needs_bias:
            dbias = None
        return dx, dvalues, dbias, None, None, None, *(None,) * len(ctx.geometry)

    def jvp(self, ctx: Any, *tangents: Any) -> Tensor:
        dx, dvalues, dbias, *_ = tangents
        x, values, *pattern = ctx.saved_tensors
        terms = []
        if dx is not None:
            terms.append(self.products.forward(dx, values, None, *pattern, *ctx.geometry))
        if dvalues is not None:
            terms.append(self.products.forward(x, dvalues, dbias, *pattern, *ctx.geometry))
        elif dbias is not None:
            shape = self.shapes.output(x.shape, dbias.shape[0], tuple(ctx.geometry))
            terms.append(dbias.view(-1, *(1,) * (len(shape) - 2)).expand(shape))
        return total(terms)

    def vmap(self, info: Any, in_dims: InDims, *inputs: Any) -> Any:
        refuse_mapped_pattern(in_dims[3:6])
        if in_dims[0] is None or in_dims[1] is not None or in_dims[2] is not None:
            return self.slices(info, in_dims, inputs)
        x = inputs[0].movedim(in_dims[0], 0)  # (V, B, ...): one product over V * B samples
        y = self.op(x.flatten(0, 1), *inputs[1:])
        return y.view(*x.shape[:2], *y.shape[1:]), 0


class _GradInput(_Rules[Tensor]):
    differentiable = (0, 1)

    def fake(self, *inputs: Any) -> Tensor:
        grad, size = inputs[0], inputs[5]
        return grad.new_empty(self.shapes.input(grad.shape, size))  # type: ignore[no-any-return]

    def keep(
        self, ctx: Any, inputs: tuple[Any, ...], needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        grad, values, crow, col, key, ctx.size, *ctx.geometry = inputs
        return grad if needs[1] else None, values if needs[0] else None, crow, col, key

    def backward(self, ctx: Any, *grads: Any) -> Grads:
        (ddx,) = grads
        grad, values, *pattern = ctx.saved_tensors
        needs_grad, needs_values = ctx.needs_input_grad[:2]
        d_grad = d_values = None
        if needs_grad:
            d_grad = self.products.forward(ddx, values, None, *pattern, *ctx.geometry)
        if needs_values:
            d_values = self.products.grad_values(grad, ddx, *pattern, *ctx.geometry, False)[0]
        return d_grad, d_values, *(None,) * (4 + len(ctx.geometry))

    def jvp(self, ctx: Any, *tangents: Any) -> Tensor:
        dgrad, dvalues, *_ = tangents
        grad, values, *pattern = ctx.saved_tensors
        rest = (*pattern, ctx.size, *ctx.geometry)
        terms = []
        if dgrad is not None:
            terms.append(self.products.grad_input(dgrad, values, *rest))
        if dvalues is not None:
            terms.append(self.products.grad_input(grad, dvalues, *rest))
        return total(terms)

    def vmap(self, info: Any, in_dims: InDims, *inputs: Any) -> Any:
        refuse_mapped_pattern(in_dims[2:5])
        grad, values, crow, col, key, size, *geometry = inputs
        if in_dims[0] is None or in_dims[1] is not None:
            return self.slices(info, in_dims, inputs)
        grad = grad.movedim(in_dims[0], 0)  # (V, B, ...): one product over V * B samples
        size = self.shapes.folded(size, grad.shape[0])
        dx = self.op(grad.flatten(0, 1), values, crow, col, key, size, *geometry)
        return dx.view(*grad.shape[:2], *dx.shape[1:]), 0


class _GradValues(_Rules[tuple[Tensor, Tensor]]):
    differentiable = (0, 1)

    def fake(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        grad, _, _, col, *_, bias = inputs
        return grad.new_empty((col.shape[0],)), grad.new_empty((grad.shape[1] if bias else 0,))

    def keep(
        self, ctx: Any, inputs: tuple[Any, ...], needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        grad, x, crow, col, key, *ctx.geometry, ctx.bias = inputs
        ctx.x_shape = x.shape
        return grad if needs[1] else None, x if needs[0] else None, crow, col, key

    def backward(self, ctx: Any, *grads: Any) -> Grads:
        d_values, d_bias = grads
        grad, x, *pattern = ctx.saved_tensors
        needs_grad, needs_x = ctx.needs_input_grad[:2]
        d_grad = d_x = None
        if needs_grad:
            bias = d_bias if ctx.bias else None
            d_grad = self.products.forward(x, d_values, bias, *pattern, *ctx.geometry)
        if needs_x:
            size = self.shapes.size(ctx.x_shape)
            d_x = self.products.grad_input(grad, d_values, *pattern, size, *ctx.geometry)
        return d_grad, d_x, *(None,) * (4 + len(ctx.geometry))

    def jvp(self, ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        dgrad, dx, *_ = tangents
        grad, x, *pattern = ctx.saved_tensors
        rest = (*pattern, *ctx.geometry)
        values, bias = [], [grad.new_zeros((grad.shape[1] if ctx.bias else 0,))]
        if dgrad is not None:
            d_values, d_bias = self.products.grad_values(dgrad, x, *rest, ctx.bias)
            values.append(d_values)
            bias = [d_bias]
        if dx is not None:
            values.append(self.products.grad_values(grad, dx, *rest, False)[0])
        return total(values), total(bias)

    def vmap(self, info: Any, in_dims: InDims, *inputs: Any) -> Any:
        refuse_mapped_pattern(in_dims[2:5])
        return self.slices(info, in_dims, inputs)


class _Backward(_Rules[tuple[Tensor, Tensor, Tensor]]):
    def fake(self, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad, x, values, *_, bias = inputs
        return (
            x.new_empty(x.shape),
            x.new_empty((values.shape[0],)),
            x.new_empty((grad.shape[1] if bias else 0,)),
        )

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        grad, x, values, crow, col, key, *ctx.geometry, ctx.bias = inputs
        ctx.save_for_backward(grad, x, values, crow, col, key)

    def backward(self, ctx: Any, *grads: Any) -> Grads:
        d_dx, d_dvalues, d_dbias = grads
        grad, x, values, *pattern = ctx.saved_tensors
        needs_grad, needs_x, needs_values = ctx.needs_input_grad[:3]
        rest = (*pattern, *ctx.geometry)
        d_grad = d_x = d_values = None
        if needs_grad:
            bias = d_dbias if ctx.bias else None
            d_grad = self.products.forward(d_dx, values, None, *rest) + self.products.forward(
                x, d_dvalues, bias, *rest
            )
        if needs_x:
            size = self.shapes.size(x.shape)
            d_x = self.products.grad_input(grad, d_dvalues, *pattern, size, *ctx.geometry)
        if needs_values:
            d_values = self.products.grad_values(grad, d_dx, *rest, False)[0]
        return d_grad, d_x, d_values, *(None,) * (4 + len(ctx.geometry))

    def vmap(self, info: Any, in_dims: InDims, *inputs: Any) -> Any:
        refuse_mapped_pattern(in_dims[3:6])
        return self.slices(info, in_dims, inputs)
