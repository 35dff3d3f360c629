"""The two ways in which plain autograd records a product: in C++, and in Python where that is not
built. Both must give the same bits, ask for the same work, and raise the same errors."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import CountOps
from sparsetrain import _native, conv_ops, ops
from sparsetrain._planner import Planner
from sparsetrain.pattern import SparsePattern

NEEDS = [n for n in itertools.product((False, True), repeat=3) if any(n)]
KINDS = ["linear", "conv"]


def test_it_is_built() -> None:
    assert _native.HAS_ROUTES
    assert _native.info()["autograd"] == "C++"


def arguments(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Planner, list[Any]]:
    """A planner and the inputs of its forward product: x, values, bias and the rest."""
    torch.manual_seed(0)
    if kind == "linear":
        pattern = SparsePattern.random((7, 12), 0.6, seed=0)
        x, window, planner = torch.randn(5, 12, dtype=dtype), (), ops.PLANNER
    else:
        pattern = SparsePattern.random((7, 27), 0.6, seed=0)
        x = torch.randn(2, 3, 6, 5, dtype=dtype)
        window, planner = ((3, 3), (2, 1), (1, 1), (1, 1), 1), conv_ops.PLANNER
    values, bias = torch.randn(pattern.nnz, dtype=dtype), torch.randn(7, dtype=dtype)
    topology = (pattern.crow_indices, pattern.col_indices, pattern.key)
    return planner, [x, values, bias, *topology, *window]


def gradients(function: Any, inputs: list[Any], needs: tuple[bool, ...]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=False)]
    y = function(*leaves, *inputs[3:])
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y))]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_give_the_same_bits_and_do_the_same_work(kind: str, needs: Any) -> None:
    planner, inputs = arguments(kind, torch.float32)
    with CountOps() as native:
        ours = gradients(planner.products.forward.recorded, inputs, needs)
    with CountOps() as python:
        theirs = gradients(planner.products.forward.function, inputs, needs)
    assert [t.grad_fn is None for t in ours] == [t.grad_fn is None for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert native.names == python.names


@pytest.mark.parametrize("kind", KINDS)
def test_one_output_has_the_same_gradient_of_the_bias(kind: str) -> None:
    planner, inputs = arguments(kind)
    pattern = SparsePattern.random((1, 12 if kind == "linear" else 27), 0.5, seed=0)
    inputs[1:3] = [torch.randn(pattern.nnz, dtype=torch.float64), torch.zeros(1).double()]
    inputs[3:6] = [pattern.crow_indices, pattern.col_indices, pattern.key]
    ours, theirs = (
        gradients(function, inputs, (False, False, True))[1]
        for function in (planner.products.forward.recorded, planner.products.forward.function)
    )
    assert ours.shape == (1,)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_higher_derivatives(kind: str) -> None:
    planner, inputs = arguments(kind)
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    torch.autograd.gradcheck(lambda *t: planner.products.forward(*t, *inputs[3:]), leaves)
    torch.autograd.gradgradcheck(lambda *t: planner.products.forward(*t, *inputs[3:]), leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_used_once_and_notices_changes(kind: str) -> None:
    planner, inputs = arguments(kind)
    inputs[1].requires_grad_()
    y = planner.products.forward(*inputs).sum()
    assert "SparseProduct" in y.grad_fn.next_functions[0][0].name()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    y = planner.products.forward(*inputs).sum()
    inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_hooks_see_what_is_saved_and_nothing_else() -> None:
    planner, inputs = arguments("linear")
    inputs[1].requires_grad_()  # whose gradient needs x alone
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        planner.products.forward(*inputs)
    assert any(t is inputs[0] or t.data_ptr() == inputs[0].data_ptr() for t in saved)
    assert all(t.data_ptr() != inputs[1].data_ptr() for t in saved)


def test_a_graph_outlives_its_plan() -> None:
    planner, inputs = arguments("linear")
    planner.forget()
    inputs[1].requires_grad_()
    y = planner.products.forward(*inputs)
    number = next(iter(planner._plans.values())).route.number
    planner.forget()
    gc.collect()
    with pytest.raises(RuntimeError, match=f"no route {number}"):
        torch.ops.sparsetrain.routed(number, *inputs[:6])
    y.sum().backward()
    expected = gradients(planner.products.forward.function, inputs, (False, True, False))[1]
    torch.testing.assert_close(inputs[1].grad, expected, rtol=0, atol=0)


def test_errors_are_those_of_the_operation() -> None:
    planner, inputs = arguments("linear")
    inputs[1] = inputs[1].requires_grad_()
    for x, message in (
        (inputs[0][:, :5], "x"),
        (inputs[0][0], "dimensions"),
        (inputs[0].float(), "dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            planner.products.forward(x, *inputs[1:])


def test_without_it_python_does_the_same() -> None:
    code = (
        "import torch, sparsetrain\n"
        "assert sparsetrain._native.info()['autograd'] == 'Python'\n"
        "layer = sparsetrain.nn.SparseLinear(8, 4, sparsity=0.5)\n"
        "layer(torch.randn(3, 8)).sum().backward()\n"
        "assert layer.values.grad.abs().sum() > 0\n"
    )
    environment = {**os.environ, "SPARSETRAIN_PYTHON_AUTOGRAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_autograd_traces_it(kind: str) -> None:
    planner, inputs = arguments(kind)
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]

    def gradients_of(step: Any) -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        step()
        return [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]

    def step() -> None:
        planner.forward(*leaves, *inputs[3:]).square().sum().backward()

    step()  # makes the plan
    expected = gradients_of(step)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        traced = gradients_of(step)
        again = gradients_of(step)
    assert len(expected) == 3
    for e, t, a in zip(expected, traced, again, strict=True):
        assert torch.equal(e, t)
        assert torch.equal(e, a)


@pytest.mark.parametrize("kind", KINDS)
def test_the_short_way_is_taken_and_gives_the_same(kind: str) -> None:
    planner, inputs = arguments(kind)
    leaves = [t.detach().requires_grad_() for t in inputs[:3]]
    expected = planner.products.forward(*leaves, *inputs[3:])  # makes the plan
    with CountOps() as counted, torch.no_grad():
        y = planner.forward(*leaves, *inputs[3:])
    assert not y.requires_grad
    assert len(counted.names) == 1
    assert counted.names[0].startswith(planner.name)
    assert torch.equal(y, expected)
    recorded = planner.forward(*leaves, *inputs[3:])
    assert recorded.grad_fn is not None
    assert recorded.grad_fn.name() == "SparseProductBackward"
    with torch.inference_mode():
        assert torch.equal(planner.forward(*leaves, *inputs[3:]), expected)
    planner.forget()
    assert torch.equal(planner.forward(*leaves, *inputs[3:]), expected)
