"""The two ways in which plain autograd records a product: in C++, and in Python where that is not
built. Both must give the same bits, ask for the same work, and raise the same errors."""

from __future__ import annotations

import gc
import io
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
from sparsetrain import nn as snn
from sparsetrain._planner import Choice, Planner
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


# ---- layers: past their checks, and past the operations ------------------------------------------


def layer_and_input(kind: str, sparsity: float, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    if kind == "linear":
        layer = snn.SparseLinear(40, 24, sparsity=sparsity, dtype=dtype)
        return layer, torch.randn(2, 3, 40, dtype=dtype)
    layer = snn.SparseConv2d(8, 12, 3, padding=1, stride=(2, 1), sparsity=sparsity, dtype=dtype)
    return layer, torch.randn(2, 8, 7, 6, dtype=dtype)


def planner_of(kind: str) -> Planner:
    return ops.PLANNER if kind == "linear" else conv_ops.PLANNER


def step(layer: Any, x: Tensor, **options: Any) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    leaves = [x, *layer.parameters()]
    return [y, *torch.autograd.grad(y.square().sum(), leaves, **options)]


@pytest.mark.parametrize("shape", [(40,), (5, 40), (0, 40), (2, 0, 40), (2, 3, 40), (2, 1, 3, 40)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_a_linear_layer_takes_any_leading_dimensions(shape: tuple[int, ...], layout: str) -> None:
    layer, _ = layer_and_input("linear", 0.7, torch.float64)
    dense = layer.to_dense()
    x = torch.randn(*shape, dtype=torch.float64)
    if layout == "transposed":
        x = torch.randn(*reversed(shape), dtype=torch.float64).permute(*reversed(range(len(shape))))
    elif layout == "expanded":
        x = x[:1].expand(shape)
    for _ in range(2):  # the first call makes the shortcut that the second one takes
        y, dx, dvalues, dbias = step(layer, x)
        y2, dx2, dweight, dbias2 = step(dense, x)
        torch.testing.assert_close([y, dx, dbias], [y2, dx2, dbias2])
        torch.testing.assert_close(dvalues, layer.pattern.gather(dweight))
    assert (x.shape, layer.pattern.shape, layer.nnz, ()) in {c[0] for c in ops.PLANNER.shortcuts}


@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_higher_derivatives_by_the_shortcut(kind: str, sparsity: float) -> None:
    layer, x = layer_and_input(kind, sparsity, torch.float64)
    names = ("values", "bias")

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        parameters_of = dict(zip(names, parameters, strict=True))
        y: Tensor = torch.func.functional_call(layer, parameters_of, (x,))
        return y

    small = x[:1, :1] if kind == "linear" else x[:1, :, :3, :3]
    inputs = [t.detach().requires_grad_() for t in (small, layer.values, layer.bias)]
    with planner_of(kind).choosing(lambda *_: Choice("native" if sparsity else "dense", "")):
        function(*inputs)
        assert planner_of(kind).shortcuts
        torch.autograd.gradcheck(function, inputs)
        torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shortcut_is_for_its_circumstances_only(kind: str) -> None:
    layer, x = layer_and_input(kind, 0.0)
    planner = planner_of(kind)
    planner.forget()
    found: list[set[Any]] = []

    def note() -> None:
        layer(x)
        found.append(set(planner.shortcuts) - set().union(*found))

    note()
    before = torch.get_num_threads()
    torch.set_num_threads(3 - before)
    note()
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(True)
    note()
    torch.use_deterministic_algorithms(False)
    layer.double()
    x = x.double()
    note()
    layer.set_pattern(SparsePattern.random(layer.pattern.shape, 0.5), torch.randn(layer.nnz // 2))
    note()
    x = x[:1]
    note()
    assert [len(new) for new in found] == [1] * 6
    calls = len(planner.shortcuts)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype is torch.bfloat16
    with torch.inference_mode():
        layer(x.float())
    torch.func.grad(lambda x: layer(x).sum())(x.float())
    assert len(planner.shortcuts) == calls
    planner.forget()
    assert not planner.shortcuts


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_shortcut_bad_input_is_still_refused(kind: str) -> None:
    layer, x = layer_and_input(kind, 0.0)
    with planner_of(kind).choosing(lambda *_: Choice("dense", "")):
        layer(x)
        layer(x)
        for bad, error in (
            (x[..., :-1, :-1] if kind == "linear" else x[:, :5], ValueError),
            (x.double(), TypeError),
            (x.to(torch.int64), TypeError),
            (x.numpy(), TypeError),
            (x.to("meta"), ValueError),
            ([1.0], TypeError),
        ):
            with pytest.raises(error):
                layer(bad)
        function = ops.sparse_linear if kind == "linear" else conv_ops.sparse_conv
        sizes = {} if kind == "linear" else {"kernel_size": (3, 3), "padding": 1, "stride": (2, 1)}
        for values, bias, message in (
            (layer.values[:-1], layer.bias, "values"),
            (layer.values, layer.bias[:-1], "bias"),
        ):
            for _ in range(2):
                with pytest.raises(RuntimeError, match=message):
                    function(x, values, bias, layer.pattern, **sizes)


def profiled(run: Any) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_all_its_weights_calls_the_library_itself(kind: str, layout: str) -> None:
    layer, x = layer_and_input(kind, 0.0)
    if layout == "transposed":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    dense = layer.to_dense()
    with planner_of(kind).choosing(lambda *_: Choice("dense", "")):
        layer(x)
        ours: list[Tensor] = []
        names = profiled(lambda: ours.extend(step(layer, x)))
    assert not any(name.startswith(f"sparsetrain::{kind}") for name in names)
    assert ("aten::mm" if kind == "linear" else "aten::convolution_backward") in names
    theirs = step(dense, x)
    theirs[2] = theirs[2].flatten()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous() or a.shape == x.shape  # dx may be laid out as x is


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_all_weights_in_every_combination(kind: str, needs: Any) -> None:
    layer, x = layer_and_input(kind, 0.0)
    dense = layer.to_dense()
    x.requires_grad_(needs[0])
    for parameters in (layer.parameters(), dense.parameters()):
        for parameter, need in zip(parameters, needs[1:], strict=True):
            parameter.requires_grad_(need)
    with planner_of(kind).choosing(lambda *_: Choice("dense", "")):
        layer(x)
        results = []
        for module in (layer, dense):
            leaves = [t for t in (x, *module.parameters()) if t.requires_grad]
            results.append(torch.autograd.grad(module(x).square().sum(), leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.reshape(a.shape))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_autograd_traces_layers(kind: str, sparsity: float, frozen: bool) -> None:
    layer, x = layer_and_input(kind, sparsity)
    layer.values.requires_grad_(not frozen)

    def gradients_of(x: Tensor) -> list[Tensor]:
        layer.zero_grad()
        x = x.detach().requires_grad_()
        layer(x).square().sum().backward()
        return [p.grad.clone() for p in (x, *layer.parameters()) if p.grad is not None]

    inputs = [x, x[:1]]
    if kind == "linear":
        inputs.append(x.view(3, 2, -1))  # the same matrix, other dimensions
    for each in inputs:
        layer(each)  # makes the shortcut
    expected = [gradients_of(each) for each in inputs]
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        traced = [gradients_of(each) for each in inputs]
    for pair in zip(expected, traced, strict=True):
        for e, t in zip(*pair, strict=True):
            torch.testing.assert_close(e, t)


@pytest.mark.filterwarnings("ignore")  # it is deprecated, and sizes become constants
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_jit_trace_records_operations_and_no_routes(kind: str, sparsity: float) -> None:
    layer, x = layer_and_input(kind, sparsity)
    expected = layer(x)
    traced = torch.jit.trace(layer, (x,))
    assert "routed" not in str(traced.graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), expected)
