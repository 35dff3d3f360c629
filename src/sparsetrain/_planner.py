"""Execution plans: which family computes which product of a layer, decided once per geometry.

How a layer is computed is not what it is: a plan names, for each direction on its own, one of the
families of its kind of layer (`_products.Family`). It depends on shapes, number of nonzeros, dtype
and threads, and is kept under these, so that a call costs one look-up in a dict. The order of
authority: torch.use_deterministic_algorithms(True) leaves the native families only; then what
`sparsetrain.tune` measured on this machine; then the cost model.

The choice is made when the product is computed, also in a compiled or exported graph: it holds the
operations `*_planned`, which ask for the plan of the sizes that they meet.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sparsetrain import _native, _plan_store
from sparsetrain._autograd import direct, traced, transforming
from sparsetrain._define import Operations, define
from sparsetrain._products import Family, Shapes

if TYPE_CHECKING:
    from sparsetrain.pattern import SparsePattern

__all__ = ["DENSELY", "DIRECTIONS", "Choice", "Direction", "Planner", "Problem"]

Direction = Literal["forward", "grad_input", "grad_values"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "grad_input", "grad_values")

DENSELY = frozenset({"dense"})  # the families of a plan that leaves all to the library

_PLANS_KEPT = 4096  # a topology that changes its number of nonzeros leaves old ones behind

# Looked up once: on a tiny layer, an attribute chain costs as much as the call.
_get_num_threads = torch.get_num_threads
_is_inference = torch.is_inference_mode_enabled
_are_deterministic = torch.are_deterministic_algorithms_enabled
_is_autocast_enabled = torch.is_autocast_enabled


class Choice(NamedTuple):
    """What computes one product: a family, why, and which of its variants (0: its own choice)."""

    family: str
    reason: str
    variant: int = 0


if _native.HAS_ROUTES:  # what a trace of a route's gradients calls
    torch.library.register_fake("sparsetrain::sized", lambda grad, sizes: grad.new_empty(sizes))


class _Route:
    """A plan as the native side knows it, which records a training step without Python.

    The gradients are computed as planned when the forward product was: with another number of
    threads in between, this is the plan that they are from.
    """

    def __init__(
        self,
        operations: Sequence[Any],
        geometry: Sequence[Any],
        size: Any,
        weight: Sequence[int],
    ) -> None:
        """`weight`: the shape of the dense weight where `values` hold all of it and the library
        computes all products, which is then called without an operation in between; or ()."""
        names = [operation._schema.name if operation else "" for operation in operations]
        arguments = [[0, *a] if isinstance(a, (tuple, list)) else [1, a] for a in (*geometry, size)]
        make = torch.ops.sparsetrain.make_route
        self.number: int = _unseen(make, names, arguments, list(weight))
        forget = torch.ops.sparsetrain.forget_route
        weakref.finalize(self, _unseen, forget, self.number).atexit = False


def _unseen(operation: Callable[..., Any], *inputs: Any) -> Any:
    """Without torch's modes, which would count this or take it for a computation."""
    with _disable_current_modes():
        return operation(*inputs)


def _nothing_special() -> bool:
    """Whether no trace, transform, autocast or inference mode changes what a call does."""
    return not (traced() or _is_autocast_enabled("cpu") or _is_inference() or transforming())


class _Plan(NamedTuple):
    """The four functions that compute one layer on one geometry."""

    forward: Callable[..., Tensor]
    grad_input: Callable[..., Tensor]
    grad_values: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    route: _Route | None
    families: frozenset[str]


# (direction, x's shape, rows, nonzeros, dtype, threads, deterministic, geometry) -> Choice
Chooser = Callable[..., Choice]
# (planner, problem, (crow, col, key)) -> None
Observer = Callable[["Planner", "Problem", tuple[Tensor, Tensor, Tensor]], None]


class Problem(NamedTuple):
    """One layer on one input, as a `Chooser` is told."""

    x_shape: tuple[int, ...]
    rows: int
    nnz: int
    dtype: torch.dtype
    threads: int
    deterministic: bool
    geometry: tuple[Any, ...]


class Planner:
    """The products of one kind of layer, each by the family that its plan names.

    Attributes:
        name: the kind of layer.
        families: name to operations, those of `Family`.
        estimate: what the cost model chooses.
        choose: what decides: a measurement if there is one, or else the estimate.
        shapes: of this kind of layer.
        observer: called with every forward product's problem and pattern, if there is one.
        shortcuts: from what a layer's call depends on to its route; see `known`.
        products: the planned family; differentiable.
    """

    def __init__(
        self,
        name: str,
        schemas: Mapping[str, str],
        families: Mapping[str, Operations],
        shapes: Shapes,
        choose: Chooser,
    ) -> None:
        """Registers the operations `name`_planned and the derivatives of all families."""
        self.name = name
        self.families = dict(families)
        self.estimate = choose
        self.choose: Chooser = self._measured_or_estimated
        self.observer: Observer | None = None
        self.shapes = shapes
        self._plans: dict[Any, _Plan] = {}
        self.shortcuts: dict[Any, _Route] = {}
        calls = (self._forward, self._grad_input, self._grad_values, self._backward)
        named = {f"{suffix}_planned": schema for suffix, schema in schemas.items()}
        self._ops = define(name, named, *calls)
        recorded = None
        if _native.HAS_ROUTES:
            self.routed = direct(torch.ops.sparsetrain.routed.default)
            recorded = self._recorded
        self.products = Family(*self._ops, shapes=shapes, calls=calls, recorded=recorded)
        for operations in families.values():
            Family(*operations, shapes=shapes, products=self.products)

    @contextmanager
    def choosing(self, choose: Chooser) -> Iterator[None]:
        """Inside, `choose` decides: for tests and measurements. Not for several threads at once."""
        before, self.choose = self.choose, choose
        self.forget()
        try:
            yield
        finally:
            self.choose = before
            self.forget()

    def forget(self) -> None:
        """Plans are made anew, as after a change of what is known about this machine."""
        self._plans, self.shortcuts = {}, {}

    def _plan(
        self, x_shape: Sequence[int], like: Tensor, crow: Tensor, col: Tensor, geometry: Any
    ) -> _Plan | None:
        """None while tracing with symbolic sizes, which are no keys."""
        sizes = (x_shape, crow.size(0), col.size(0), like.dtype)
        key = (sizes, geometry, _get_num_threads(), _are_deterministic())
        try:
            plan = self._plans.get(key)
        except TypeError:  # lists, as the dispatcher gives them, or symbolic sizes
            sizes = (tuple(x_shape), *sizes[1:])
            geometry = tuple(tuple(g) if isinstance(g, list) else g for g in geometry)
            key = (sizes, geometry, *key[2:])
            try:
                plan = self._plans.get(key)
            except TypeError:
                return None
        return plan or self._made(key)

    def families_of(self, x: Tensor, crow: Tensor, col: Tensor, geometry: Any) -> frozenset[str]:
        """Those that compute a layer's products; empty while layers are observed, and for symbolic
        sizes."""
        plan = None if self.observer else self._plan(x.shape, x, crow, col, geometry)
        return frozenset() if plan is None else plan.families

    def known(
        self, input: Any, values: Any, bias: Any, pattern: SparsePattern, sizes: Any = ()
    ) -> tuple[Any, _Route | None]:
        """What the checks of a layer's arguments and its plan depend on, and the route that such
        a call took before, if one did.

        On a small batch, Python takes some percent of a step, driven from the caches as it is by
        the products: what was checked once is not checked again. `sizes` are a convolution's
        arguments. None where something else may decide: a trace, autocast, no tensors.
        """
        if self.observer is not None or not _nothing_special():
            return None, None
        try:
            types = (input.dtype, values.dtype, None if bias is None else bias.dtype)
            places = (input.is_cpu, values.is_cpu, input.layout)
            shapes = (input.shape, pattern.shape, pattern.col_indices.size(0), sizes)
            call = (shapes, types, places, _get_num_threads(), _are_deterministic())
            return call, self.shortcuts.get(call)
        except (AttributeError, TypeError):  # no tensors, symbolic sizes, or lists of them
            return None, None

    def keep(self, call: Any, x: Sequence[int], like: Tensor, *pattern_and_geometry: Any) -> None:
        """Keeps the route of a `known` call that was computed: its product took a tensor of shape
        `x`, dtype of `like`; crow, col and the geometry."""
        plan = self._plan(x, like, *pattern_and_geometry)
        if plan is not None and plan.route is not None:
            if len(self.shortcuts) >= _PLANS_KEPT:
                self.shortcuts = {}
            self.shortcuts[call] = plan.route

    def _made(self, key: Any) -> _Plan:
        problem = self._problem(key)
        plan = self.plan_of(problem, [self.choose(d, *problem).family for d in DIRECTIONS])
        if len(self._plans) >= _PLANS_KEPT:
            self.forget()
        self._plans[key] = plan
        return plan

    def plan_of(self, problem: Problem, way: Sequence[str]) -> _Plan:
        """The plan that computes the three products by these families."""
        operations: list[Any] = [self.families[family][i] for i, family in enumerate(way)]
        forward, grad_input, grad_values = (direct(operation) for operation in operations)
        if way[1] == way[2]:
            both = self.families[way[1]][3]
            backward = direct(both)
            operations.append(both)
        else:
            backward = self._one_by_one(grad_input, grad_values)
            operations.append(None)
        families = frozenset(way)
        route = self._route(operations, problem, families) if _native.HAS_ROUTES else None
        return _Plan(forward, grad_input, grad_values, backward, route, families)

    def _route(
        self, operations: Sequence[Any], problem: Problem, families: frozenset[str]
    ) -> _Route | None:
        x_shape, rows, nnz, dtype, _, _, geometry = problem
        if len(x_shape) < 2 or (not geometry and len(x_shape) != 2):  # for the operation to refuse
            return None
        weight = self.shapes.weight(x_shape, rows, geometry)
        # The library's bfloat16 gradients are not all right: the operations know which.
        whole = families == DENSELY and math.prod(weight) == nnz and dtype is not torch.bfloat16
        size = self.shapes.size(x_shape)
        return _Route([*operations, *self._ops[1:3]], geometry, size, weight if whole else ())

    @staticmethod
    def _problem(key: Any) -> Problem:
        (x_shape, crow_size, nnz, dtype), geometry, threads, deterministic = key
        return Problem(
            tuple(x_shape), crow_size - 1, nnz, dtype, threads, deterministic, tuple(geometry)
        )

    def store_key(self, direction: Direction, problem: Problem) -> str:
        """Under which a measurement of this product is kept."""
        x_shape, rows, nnz, dtype, threads, _, geometry = problem
        weights = math.prod(self.shapes.weight(x_shape, rows, geometry))
        return _plan_store.key_of(
            self.name, direction, x_shape, rows, nnz, weights, dtype, threads, geometry
        )

    def _measured_or_estimated(self, direction: Direction, *problem: Any) -> Choice:
        estimated = self.estimate(direction, *problem)
        facts = Problem(*problem)
        if facts.deterministic:
            return estimated
        entry = _plan_store.find(self.store_key(direction, facts))
        if entry is None or entry.family not in self.families:
            return estimated
        return Choice(entry.family, "measured", entry.variant)

    def _one_by_one(
        self, grad_input: Callable[..., Tensor], grad_values: Callable[..., tuple[Tensor, Tensor]]
    ) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def backward(grad: Tensor, x: Tensor, values: Tensor, *rest: Any) -> Any:
            crow, col, key, *geometry, _ = rest
            size = self.shapes.size(x.shape)
            dx = grad_input(grad, values, crow, col, key, size, *geometry)
            return dx, *grad_values(grad, x, *rest)

        return backward

    def _observed(self, x: Tensor, crow: Tensor, col: Tensor, key: Tensor, geometry: Any) -> None:
        geometry = tuple(tuple(g) if isinstance(g, list) else g for g in geometry)
        sizes = (x.shape, crow.size(0), col.size(0), x.dtype)
        problem = self._problem((sizes, geometry, _get_num_threads(), False))
        if self.observer is not None:
            self.observer(self, problem, (crow, col, key))

    def forward(
        self,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        crow: Tensor,
        col: Tensor,
        key: Tensor,
        *geometry: Any,
    ) -> Tensor:
        """`products.forward`. A plan that is there, and that C++ can record where anything is to be
        recorded, is followed from here: a tiny layer's time is that of the calls in between."""
        if (
            not traced()
            and (values.requires_grad or x.requires_grad)
            and not _is_inference()
            and not transforming()
            and self.observer is None
        ):
            sizes = (x.shape, crow.size(0), col.size(0), x.dtype)
            plan = self._plans.get((sizes, geometry, _get_num_threads(), _are_deterministic()))
            if plan is not None and plan.route is not None:
                y: Tensor = self.routed(plan.route.number, x, values, bias, crow, col, key)
                return y
        return self.products.forward(x, values, bias, crow, col, key, *geometry)

    # The four products, as _products.Products describes them. A wrong number of dimensions is for
    # the native operation to refuse.

    def _forward(
        self,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        crow: Tensor,
        col: Tensor,
        key: Tensor,
        *geometry: Any,
    ) -> Tensor:
        plan = self._plan(x.shape, x, crow, col, geometry)
        if self.observer is not None and plan is not None:
            self._observed(x, crow, col, key, geometry)
        call = self._ops[0] if plan is None else plan.forward
        return call(x, values, bias, crow, col, key, *geometry)

    def _recorded(self, x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        """The forward product, where plain autograd records it."""
        (crow, col, key), geometry = rest[:3], rest[3:]
        plan = self._plan(x.shape, x, crow, col, geometry)
        if plan is None or plan.route is None:
            return self.products.forward.function(x, values, bias, *rest)
        if self.observer is not None:
            self._observed(x, crow, col, key, geometry)
        y: Tensor = self.routed(plan.route.number, x, values, bias, crow, col, key)
        return y

    def _grad_input(
        self,
        grad: Tensor,
        values: Tensor,
        crow: Tensor,
        col: Tensor,
        key: Tensor,
        size: Any,
        *geometry: Any,
    ) -> Tensor:
        plan = self._plan(self.shapes.input(grad.shape, size), grad, crow, col, geometry)
        call = self._ops[1] if plan is None else plan.grad_input
        return call(grad, values, crow, col, key, size, *geometry)

    def _grad_values(
        self,
        grad: Tensor,
        x: Tensor,
        crow: Tensor,
        col: Tensor,
        key: Tensor,
        *geometry_and_bias: Any,
    ) -> tuple[Tensor, Tensor]:
        plan = self._plan(x.shape, x, crow, col, geometry_and_bias[:-1])
        call = self._ops[2] if plan is None else plan.grad_values
        return call(grad, x, crow, col, key, *geometry_and_bias)

    def _backward(
        self,
        grad: Tensor,
        x: Tensor,
        values: Tensor,
        crow: Tensor,
        col: Tensor,
        key: Tensor,
        *geometry_and_bias: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan = self._plan(x.shape, x, crow, col, geometry_and_bias[:-1])
        call = self._ops[3] if plan is None else plan.backward
        return call(grad, x, values, crow, col, key, *geometry_and_bias)
