"""Which family computes which product, and the dense family of linear layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import (
    BATCHES,
    BOUND,
    DTYPES,
    LAYOUTS,
    MASKS,
    Case,
    CountOps,
    Exact,
    deterministic,
    error_in_bounds,
    exact_grad_bias,
    exact_grad_input,
    exact_grad_values,
    exact_linear,
    linear_by,
    make_case,
    random_mask,
    threads,
)
from sparsetrain import _linear_choice, ops
from sparsetrain._linear_choice import LinearProblem, choose, costs, explain
from sparsetrain._planner import DIRECTIONS
from sparsetrain.nn import SparseLinear
from sparsetrain.ops import linear, linear_backward, linear_grad_input, sparse_linear
from sparsetrain.pattern import SparsePattern
from sparsetrain.reference import masked_linear

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
DENSE = torch.ops.sparsetrain
# The library sums in an order of its own: the worst seen is 8.1, of equal terms.
LIBRARY_BOUND = {dtype: 3 * bound for dtype, bound in BOUND.items()}


def assert_close(actual: Tensor, exact: Exact) -> None:
    assert actual.is_contiguous()
    assert actual.shape == exact.value.shape
    assert error_in_bounds(actual.detach(), exact) <= LIBRARY_BOUND[actual.dtype]


def check_dense(case: Case) -> None:
    """The operations of the dense family, on their own and at once, against the exact products."""
    pattern, topology = case.pattern, case.topology
    y = DENSE.linear_dense(case.x, case.values, case.bias, *topology)
    assert_close(y, exact_linear(case.x, case.values, case.bias, pattern))
    y = DENSE.linear_dense(case.x, case.values, None, *topology)
    assert_close(y, exact_linear(case.x, case.values, None, pattern))
    cols = pattern.shape[1]
    dx = DENSE.linear_dense_grad_input(case.grad, case.values, *topology, cols)
    dvalues, dbias = DENSE.linear_dense_grad_values(case.grad, case.x, *topology, True)
    both = DENSE.linear_dense_backward(case.grad, case.x, case.values, *topology, True)
    for result in ((dx, dvalues, dbias), both):
        assert_close(result[0], exact_grad_input(case.grad, case.values, pattern))
        assert_close(result[1], exact_grad_values(case.grad, case.x, pattern))
        assert_close(result[2], exact_grad_bias(case.grad))
    alone, nothing = DENSE.linear_dense_grad_values(case.grad, case.x, *topology, False)
    assert_close(alone, exact_grad_values(case.grad, case.x, pattern))
    assert nothing.shape == (0,)


# --------------------------------------------------------------------------------------------------
# The dense family


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pattern", MASKS)
def test_dense_products_match_the_reference(pattern: str, batch: int, dtype: torch.dtype) -> None:
    check_dense(make_case(MASKS[pattern](53, 37), batch, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_weights_of_several_panels(count: int, dtype: torch.dtype) -> None:
    with threads(count):
        check_dense(make_case(random_mask(1001, 515, 0.4, seed=1), 9, dtype))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize("batch", [0, 3])
def test_dense_products_of_awkward_layers(shape: tuple[int, int], batch: int) -> None:
    check_dense(make_case(random_mask(*shape, 0.5, seed=2), batch))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_to_dense_products(layout: str, dtype: torch.dtype) -> None:
    for mask in (random_mask(29, 43, 0.3, seed=8), torch.ones(29, 43, dtype=torch.bool)):
        case = make_case(mask, 37, dtype)
        case.x, case.grad = LAYOUTS[layout](case.x), LAYOUTS[layout](case.grad)
        buffer = torch.full((2 * case.values.numel() + 1,), float("nan"), dtype=dtype)
        buffer[1::2] = case.values
        case.values = buffer[1::2]
        check_dense(case)


def test_no_result_shares_memory_with_another_product_or_the_values() -> None:
    for density in (0.5, 1.0):
        case = make_case(random_mask(40, 50, density, seed=3), 6)
        other = make_case(random_mask(50, 40, density, seed=4), 6)
        with linear_by("dense"):
            results = [
                linear(case.x, case.values, case.bias, *case.topology),
                *linear_backward(case.grad, case.x, case.values, *case.topology, True),
            ]
            kept = [t.clone() for t in (*results, case.values)]
            for _ in range(2):  # the same scratch memory, with other numbers in it
                linear_backward(other.grad, other.x, other.values, *other.topology, True)
        assert all(torch.equal(*pair) for pair in zip((*results, case.values), kept, strict=True))
        pointers = {t.untyped_storage().data_ptr() for t in (*results, case.values)}
        assert len(pointers) == len(results) + 1


def test_dense_operations_refuse_what_does_not_fit() -> None:
    case = make_case(random_mask(5, 7, 0.5, seed=5), 3)
    x, values, bias, topology = case.x, case.values, case.bias, case.topology
    wrong: list[tuple[str, Callable[[], Any]]] = [
        (r"values has \d+ entries", lambda: DENSE.linear_dense(x, values[:-1], bias, *topology)),
        (r"bias has 4 entries", lambda: DENSE.linear_dense(x, values, bias[:-1], *topology)),
        ("bias has 1 entries", lambda: DENSE.linear_dense(x, values, bias[:1], *topology)),
        ("x is Double", lambda: DENSE.linear_dense(x.double(), values, bias, *topology)),
        (
            "each row of grad has 4",
            lambda: DENSE.linear_dense_grad_input(case.grad[:, :4], values, *topology, 7),
        ),
        (
            "grad has 2 entries, expected 3",
            lambda: DENSE.linear_dense_grad_values(case.grad[:2], x, *topology, True),
        ),
        ("int32", lambda: DENSE.densify(values, topology[0].long(), *topology[1:], 7)),
        (
            "no valid pattern",
            lambda: DENSE.densify(
                values, topology[0], topology[1].flip(0).contiguous(), torch.tensor([2**41]), 7
            ),
        ),
    ]
    for message, call in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("pattern", MASKS)
def test_densify_and_back(pattern: str, dtype: torch.dtype) -> None:
    case = make_case(MASKS[pattern](61, 83), 1, dtype)
    expected = torch.zeros(61, 83, dtype=dtype)
    expected[case.pattern.to_mask()] = case.values
    weight = DENSE.densify(case.values, *case.topology, 83)
    assert torch.equal(weight.to(dtype), expected)
    assert torch.equal(DENSE.read_nonzeros(weight, *case.topology).to(dtype), case.values)
    assert torch.equal(
        DENSE.read_nonzeros(weight.t().contiguous().t(), *case.topology),
        case.values.to(weight.dtype),
    )


# --------------------------------------------------------------------------------------------------
# Derivatives and transformations, for every mixture

MIXTURES = list(itertools.product(["native", "dense"], repeat=3))


@pytest.mark.parametrize("families", MIXTURES, ids="-".join)
def test_gradients_of_any_mixture(families: tuple[str, str, str]) -> None:
    case = make_case(random_mask(5, 6, 0.6, seed=6), 3, torch.float64).require_grad()
    leaves = (case.x, case.values, case.bias)
    with linear_by(*families):
        assert torch.autograd.gradcheck(
            lambda *t: sparse_linear(*t, case.pattern),
            leaves,
            check_forward_ad=True,
            check_batched_grad=True,
        )
        assert torch.autograd.gradgradcheck(lambda *t: sparse_linear(*t, case.pattern), leaves)
        y = sparse_linear(*leaves, case.pattern)
        with CountOps() as counted:
            torch.autograd.grad(y, leaves, case.grad)
    prefix = {"native": "linear", "dense": "linear_dense"}
    first, second = (prefix[family] for family in families[1:])
    alone = [f"{first}_grad_input", f"{second}_grad_values"]
    assert counted.names == ([f"{first}_backward"] if first == second else alone)


@pytest.mark.parametrize("name", ["linear_dense", "linear_planned"])
def test_opcheck(name: str) -> None:
    case = make_case(random_mask(9, 11, 0.5, seed=7), 4).require_grad()
    grad, topology = case.grad.requires_grad_(), case.topology
    calls = {
        "linear{}": (case.x, case.values, case.bias, *topology),
        "linear{}_grad_input": (grad, case.values, *topology, 11),
        "linear{}_grad_values": (grad, case.x, *topology, True),
        "linear{}_backward": (grad, case.x, case.values, *topology, True),
    }
    for pattern, args in calls.items():
        full = (
            pattern.format("_dense") if name == "linear_dense" else pattern.format("") + "_planned"
        )
        torch.library.opcheck(getattr(DENSE, full).default, args)


def test_transformations_of_the_dense_family() -> None:
    case = make_case(random_mask(5, 7, 0.5, seed=8), 3, torch.float64)
    x, v, b, pattern = case.x, case.values, case.bias, case.pattern

    def run(layer: Callable[..., Tensor]) -> Any:
        def loss(x: Tensor, v: Tensor, b: Tensor) -> Tensor:
            return layer(x, v, b, pattern).pow(3).sum()

        return (
            torch.func.grad(loss, argnums=(0, 1, 2))(x, v, b),
            torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None))(x, v, b),
            torch.func.jacfwd(lambda v: layer(x, v, b, pattern))(v),
            torch.func.hessian(lambda x: loss(x, v, b))(x),
        )

    with linear_by("dense"):
        torch.testing.assert_close(run(sparse_linear), run(masked_linear))


def test_autocast_reaches_the_dense_family() -> None:
    case = make_case(random_mask(24, 40, 0.5, seed=9), 8).require_grad()
    leaves = (case.x, case.values, case.bias)
    narrow = [t.detach().bfloat16() for t in leaves]
    with linear_by("dense"), torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_linear(*leaves, case.pattern)
        assert y.dtype is torch.bfloat16
        assert_close(y, exact_linear(*narrow, case.pattern))
        grads = torch.autograd.grad(y, leaves, case.grad.bfloat16())
    exact = exact_grad_values(case.grad.bfloat16(), narrow[0], case.pattern)
    assert_close(grads[1].bfloat16(), exact)


@pytest.mark.parametrize("family", ["native", "dense"])
def test_compiled_without_a_break_for_any_batch(family: str) -> None:
    torch._dynamo.reset()
    case = make_case(random_mask(12, 20, 0.5, seed=10), 5).require_grad()
    leaves = (case.values, case.bias)
    compiled = torch.compile(
        lambda x, v, b: sparse_linear(x, v, b, case.pattern).relu(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    with linear_by(family):
        for batch in (5, 8, 3):
            x = torch.randn(batch, 20, requires_grad=True)
            expected = masked_linear(x, *leaves, case.pattern).relu()
            actual = compiled(x, *leaves)
            torch.testing.assert_close(actual, expected)
            for pair in zip(
                torch.autograd.grad(actual.sum(), (x, *leaves)),
                torch.autograd.grad(expected.sum(), (x, *leaves)),
                strict=True,
            ):
                torch.testing.assert_close(*pair)


# --------------------------------------------------------------------------------------------------
# The choice

LARGE = LinearProblem(32, 768, 3072, 235_930, torch.float32)


@pytest.mark.parametrize(
    ("changes", "families"),
    [
        ({}, ["native"] * 3),
        ({"nnz": 768 * 3072}, ["native", "dense", "dense"]),
        ({"nnz": 768 * 3072, "batch": 2048}, ["dense"] * 3),
        ({"nnz": 768 * 3072, "deterministic": True}, ["native"] * 3),
        ({"nnz": 900_000, "batch": 2048}, ["native", "native", "native"]),
        ({"in_features": 64, "out_features": 64, "nnz": 400, "batch": 8}, ["native"] * 3),
        ({"in_features": 64, "out_features": 64, "nnz": 4096, "batch": 32}, ["native"] * 3),
    ],
)
def test_the_documented_choice(
    changes: dict[str, Any], families: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linear_choice, "_lanes", lambda: (8, 8))
    monkeypatch.setattr(_linear_choice, "_cpu_kind", lambda: "whole")
    problem = LARGE._replace(**changes)
    assert [choose(direction, problem).family for direction in DIRECTIONS] == families
    for line, family in zip(explain(problem).splitlines()[1:], families, strict=True):
        assert line.split()[1] == family


def test_both_gradients_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small layer's gradient of the input would be faster by the library, if it were alone."""
    monkeypatch.setattr(_linear_choice, "_lanes", lambda: (8, 8))
    monkeypatch.setattr(_linear_choice, "_cpu_kind", lambda: "whole")
    problem = LinearProblem(32, 64, 64, 4096, torch.float32)
    for direction, alone in (("grad_input", "dense"), ("grad_values", "native")):
        estimates = costs(direction, problem)
        assert min(estimates, key=estimates.__getitem__) == alone
        assert choose(direction, problem).family == "native"
    assert "in one call" in explain(problem)
    large = problem._replace(in_features=768, out_features=3072, nnz=768 * 3072)
    assert choose("grad_input", large).family == "dense"


@pytest.mark.parametrize("kind", sorted(_linear_choice._KINDS))
@pytest.mark.parametrize("lanes", [(4, 4), (8, 8), (16, 16), (4, 16)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_estimates_are_sensible_on_any_machine(
    direction: Any, lanes: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_linear_choice, "_lanes", lambda: lanes)
    monkeypatch.setattr(_linear_choice, "_cpu_kind", lambda: kind)
    for dtype, count, batch in itertools.product(DTYPES, [1, 2, 64], [0, 1, 32, 4096]):
        problem = LARGE._replace(dtype=dtype, threads=count, batch=batch)
        weights = problem.weights
        estimates = [costs(direction, problem._replace(nnz=weights * k // 8)) for k in range(9)]
        native = [e["native"] for e in estimates]
        assert native == sorted(native)  # more nonzeros never cost the sparse kernels less
        assert all(e["dense"] > 0 for e in estimates)
        if batch >= 32 and lanes[0] == lanes[1] and dtype is not torch.bfloat16:
            assert choose(direction, problem._replace(nnz=weights // 100)).family == "native"
        assert choose(direction, problem._replace(nnz=weights)).family in ("native", "dense")


def test_determinism_leaves_native_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear_choice, "_lanes", lambda: (8, 8))
    monkeypatch.setattr(_linear_choice, "_cpu_kind", lambda: "whole")
    case = make_case(torch.ones(96, 96, dtype=torch.bool), 2048)
    with threads(1):
        with CountOps() as counted:
            linear(case.x, case.values, case.bias, *case.topology)
        assert counted.names == ["linear_dense"]
        with deterministic(), CountOps() as counted:
            linear(case.x, case.values, case.bias, *case.topology)
        assert counted.names == ["linear"]


def test_a_plan_follows_the_sizes_and_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def choose(direction: str, *problem: Any) -> Any:
        seen.append((direction, *problem[:6]))
        return ops._choose(direction, *problem)  # type: ignore[arg-type]

    case = make_case(random_mask(16, 24, 0.5, seed=11), 4)
    with ops.PLANNER.choosing(choose), threads(1):
        for _ in range(3):
            linear(case.x, case.values, case.bias, *case.topology)
            linear_grad_input(case.grad, case.values, *case.topology, 24)
        assert len(seen) == 3  # once for each direction, however often it is used
        linear(case.x[:2], case.values, case.bias, *case.topology)
        assert len(seen) == 6
        with threads(2):
            linear(case.x, case.values, case.bias, *case.topology)
        assert seen[-1][5] == 2


def test_few_plans_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain import _planner

    monkeypatch.setattr(_planner, "_PLANS_KEPT", 5)
    case = make_case(random_mask(6, 8, 0.5, seed=12), 12)
    with ops.PLANNER.choosing(ops._choose):
        for batch in range(12):
            y = linear(case.x[:batch], case.values, case.bias, *case.topology)
            torch.testing.assert_close(
                y, masked_linear(case.x[:batch], case.values, case.bias, case.pattern)
            )
            assert len(ops.PLANNER._plans) <= 5


def test_nothing_of_a_dense_plan_shows_in_the_layer() -> None:
    torch.manual_seed(0)
    layer = SparseLinear(24, 16, sparsity=0.5)
    pattern: SparsePattern = layer.pattern
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.randn(8, 24)
    with linear_by("dense"):
        layer(x).sum().backward()
    by_dense = layer.values.grad
    layer.values.grad = None
    with linear_by("native"):
        layer(x).sum().backward()
    torch.testing.assert_close(by_dense, layer.values.grad)
    assert by_dense is not None
    assert by_dense.shape == (pattern.nnz,)
    after = layer.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
