"""Every operation against the masked-dense reference, and the derivatives of all of them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import (
    BATCHES,
    DTYPES,
    LAYOUTS,
    MASKS,
    Case,
    CountOps,
    Exact,
    assert_within_rounding,
    exact_grad_bias,
    exact_grad_input,
    exact_grad_values,
    exact_linear,
    generator,
    make_case,
    random_mask,
    threads,
)
from sparsetrain import _native
from sparsetrain.ops import (
    linear,
    linear_backward,
    linear_grad_input,
    linear_grad_values,
    sparse_linear,
)
from sparsetrain.pattern import SparsePattern
from sparsetrain.reference import masked_linear


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Faster on small shapes; test_transforms shows that the number of threads changes no bit."""
    with threads(1):
        yield


DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]


def check_all_products(case: Case) -> None:
    """Forward and the three gradients, each within rounding of the exact result."""
    pattern, topology = case.pattern, case.topology
    y = linear(case.x, case.values, case.bias, *topology)
    assert_within_rounding(y, exact_linear(case.x, case.values, case.bias, pattern), "linear")
    y = linear(case.x, case.values, None, *topology)
    assert_within_rounding(y, exact_linear(case.x, case.values, None, pattern), "linear, no bias")
    dx = linear_grad_input(case.grad, case.values, *topology, pattern.shape[1])
    assert_within_rounding(dx, exact_grad_input(case.grad, case.values, pattern), "grad_input")
    dvalues, dbias = linear_grad_values(case.grad, case.x, *topology, True)
    assert_within_rounding(dvalues, exact_grad_values(case.grad, case.x, pattern), "grad_values")
    assert_within_rounding(dbias, exact_grad_bias(case.grad), "grad_bias")
    alone, nothing = linear_grad_values(case.grad, case.x, *topology, False)
    assert torch.equal(alone, dvalues)
    assert nothing.shape == (0,)
    dx_too, dvalues_too, dbias_too = linear_backward(
        case.grad, case.x, case.values, *topology, True
    )
    assert_within_rounding(dx_too, exact_grad_input(case.grad, case.values, pattern), "dx")
    assert_within_rounding(dvalues_too, exact_grad_values(case.grad, case.x, pattern), "dvalues")
    assert_within_rounding(dbias_too, exact_grad_bias(case.grad), "dbias")
    for result in (y, dx, dvalues, dbias, dx_too, dvalues_too, dbias_too):
        assert result.is_contiguous()
        assert result.dtype == case.values.dtype


# --------------------------------------------------------------------------------------------------
# Right results


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pattern", MASKS)
def test_products_match_the_reference(pattern: str, batch: int, dtype: torch.dtype) -> None:
    check_all_products(make_case(MASKS[pattern](53, 37), batch, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (200, 1), (64, 64), (31, 515), (515, 31)])
def test_products_match_the_reference_for_awkward_layer_sizes(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    check_all_products(make_case(random_mask(*shape, 0.2, seed=4), 33, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("density", [0.4, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(16, 16), (37, 4163), (300, 259), (515, 31), (1, 5)])
def test_values_of_dense_patterns_are_transposed_by_squares(
    shape: tuple[int, int], density: float, dtype: torch.dtype
) -> None:
    """Sizes that no square, block of columns or band of squares divides."""
    case = make_case(random_mask(*shape, density, seed=6), 33, dtype)
    exact = exact_grad_input(case.grad, case.values, case.pattern)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            dx = torch.ops.sparsetrain.linear_grad_input(
                case.grad, case.values, *case.topology, shape[1]
            )
        assert_within_rounding(dx, exact, "grad_input")
        results.append(dx)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_dense_patterns_read_no_value_that_is_not_theirs() -> None:
    """NaN before and behind the values, which a vector of the first and last ones reaches."""
    mask = random_mask(33, 47, 0.6, seed=7)
    mask[-1], mask[0] = False, False
    mask[0, 0] = mask[-1, -1] = True
    case = make_case(mask, 20, torch.float32)
    around = torch.full((case.values.numel() + 64,), torch.nan)
    inside = around[32:-32].copy_(case.values)
    dx = torch.ops.sparsetrain.linear_grad_input(case.grad, inside, *case.topology, 47)
    assert_within_rounding(dx, exact_grad_input(case.grad, case.values, case.pattern), "dx")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("batch", [0, 3])
def test_layers_without_inputs_or_outputs(shape: tuple[int, int], batch: int) -> None:
    check_all_products(make_case(torch.zeros(shape, dtype=torch.bool), batch))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_products_match_the_reference_on_a_transformer_layer(dtype: torch.dtype) -> None:
    check_all_products(make_case(random_mask(384, 1536, 0.1, seed=5), 70, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_small_integers_are_exact(dtype: torch.dtype) -> None:
    mask = random_mask(67, 45, 0.3, seed=6)
    case, source = make_case(mask, 35, dtype), generator(7)

    def integers(like: Tensor) -> Tensor:
        return torch.randint(-1, 2, like.shape, generator=source).to(dtype)

    x, values, bias, grad = (integers(t) for t in (case.x, case.values, case.bias, case.grad))
    y = linear(x, values, bias, *case.topology)
    dx = linear_grad_input(grad, values, *case.topology, 45)
    dvalues, dbias = linear_grad_values(grad, x, *case.topology, True)
    assert torch.equal(y.double(), exact_linear(x, values, bias, case.pattern).value)
    assert torch.equal(dx.double(), exact_grad_input(grad, values, case.pattern).value)
    assert torch.equal(dvalues.double(), exact_grad_values(grad, x, case.pattern).value)
    assert torch.equal(dbias.double(), exact_grad_bias(grad).value)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_input_and_gradient_do_not_matter(layout: str, dtype: torch.dtype) -> None:
    case = make_case(random_mask(29, 43, 0.3, seed=8), 37, dtype)
    case.x, case.grad = LAYOUTS[layout](case.x), LAYOUTS[layout](case.grad)
    check_all_products(case)


def test_strides_of_values_and_bias_do_not_matter() -> None:
    case = make_case(random_mask(29, 43, 0.3, seed=8), 37)
    for name in ("values", "bias"):
        buffer = torch.full((2 * getattr(case, name).numel(),), float("nan"))
        buffer[::2] = getattr(case, name)
        setattr(case, name, buffer[::2])
    check_all_products(case)


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    batch=st.integers(0, 40),
    density=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_products_match_the_reference_for_any_shape(
    shape: tuple[int, int],
    batch: int,
    density: float,
    dtype: torch.dtype,
    layouts: tuple[str, str],
    seed: int,
) -> None:
    case = make_case(random_mask(*shape, density, seed), batch, dtype, seed)
    case.x, case.grad = LAYOUTS[layouts[0]](case.x), LAYOUTS[layouts[1]](case.grad)
    check_all_products(case)


@given(bits=st.lists(st.booleans(), min_size=24, max_size=24), batch=st.integers(1, 9))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_products_match_the_reference_for_any_pattern(bits: list[bool], batch: int) -> None:
    check_all_products(make_case(torch.tensor(bits).view(4, 6), batch))


# --------------------------------------------------------------------------------------------------
# The comparison itself: it must be able to fail


def _one_flipped_column(pattern: SparsePattern, nonzero: int) -> SparsePattern:
    """The same pattern with one nonzero moved to a free column of its row, order kept."""
    mask = pattern.to_mask()
    row, col = mask.nonzero()[nonzero].tolist()
    free = [c for c in (col - 1, col + 1) if 0 <= c < mask.shape[1] and not mask[row, c]]
    mask[row, col], mask[row, free[0]] = False, True
    return SparsePattern.from_mask(mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_corrupted_nonzero_is_caught(dtype: torch.dtype) -> None:
    mask = random_mask(20, 30, 0.15, seed=9)
    case = make_case(mask, 16, dtype)
    nonzero = 41
    wrong_values = case.values.clone()
    wrong_values[nonzero] += 1
    wrong = _one_flipped_column(case.pattern, nonzero)
    wrong_topology = (wrong.crow_indices, wrong.col_indices, wrong.key)
    forward = exact_linear(case.x, case.values, case.bias, case.pattern)
    grad_input = exact_grad_input(case.grad, case.values, case.pattern)
    grad_values = exact_grad_values(case.grad, case.x, case.pattern)
    corrupted: list[tuple[Tensor, Exact]] = [
        (linear(case.x, wrong_values, case.bias, *case.topology), forward),
        (linear(case.x, case.values, case.bias, *wrong_topology), forward),
        (linear_grad_input(case.grad, wrong_values, *case.topology, 30), grad_input),
        (linear_grad_input(case.grad, case.values, *wrong_topology, 30), grad_input),
        (linear_grad_values(case.grad, case.x, *wrong_topology, False)[0], grad_values),
        (linear_backward(case.grad, case.x, wrong_values, *case.topology, False)[0], grad_input),
        (linear_backward(case.grad, case.x, case.values, *wrong_topology, False)[0], grad_input),
        (linear_backward(case.grad, case.x, case.values, *wrong_topology, False)[1], grad_values),
    ]
    for actual, exact in corrupted:
        with pytest.raises(AssertionError, match="allowed is"):
            assert_within_rounding(actual, exact)


def test_the_bound_notices_a_missing_element_nan_and_a_wrong_shape() -> None:
    exact = Exact(torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 0.0]).double())
    assert_within_rounding(torch.tensor([1.0, 0.0]), exact)
    for wrong in ([1.0, 1e-30], [float("nan"), 0.0], [1.0, float("nan")], [float("inf"), 0.0]):
        with pytest.raises(AssertionError, match="allowed is"):
            assert_within_rounding(torch.tensor(wrong), exact)
    with pytest.raises(AssertionError, match="!="):
        assert_within_rounding(torch.tensor([1.0]), exact)


# --------------------------------------------------------------------------------------------------
# sparse_linear: shapes, layouts and errors


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7), (2, 0, 7)])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    case = make_case(random_mask(5, 7, 0.5, seed=10), 1, torch.float64).require_grad()
    x = torch.randn(shape, generator=generator(11), dtype=torch.float64, requires_grad=True)
    y = sparse_linear(x, case.values, case.bias, case.pattern)
    expected = masked_linear(x, case.values, case.bias, case.pattern)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    grad = torch.randn(y.shape, generator=generator(12), dtype=torch.float64)
    inputs = (x, case.values, case.bias)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    )


def test_permuted_and_expanded_activations() -> None:
    case = make_case(random_mask(6, 8, 0.5, seed=13), 1, torch.float64)
    images = torch.randn(2, 8, 3, 5, generator=generator(14), dtype=torch.float64)
    inputs = [
        images.permute(0, 2, 3, 1),  # what a channels_last image is to a layer over its channels
        images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        images.transpose(1, 3)[:, ::2],
        images[:, :, :1, :1].permute(0, 2, 3, 1).expand(2, 4, 3, 8),
        torch.tensor(1.5, dtype=torch.float64).expand(2, 3, 8),
    ]
    for x in inputs:
        y = sparse_linear(x, case.values, case.bias, case.pattern)
        torch.testing.assert_close(y, masked_linear(x, case.values, case.bias, case.pattern))


@pytest.mark.parametrize("reduce", ["sum", "transposed", "expanded"])
def test_gradients_with_strides_of_their_own(reduce: str) -> None:
    case = make_case(random_mask(6, 8, 0.5, seed=15), 10, torch.float64).require_grad()
    loss: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda y: y.sum(),
        "transposed": lambda y: (y.t() * torch.arange(60.0).view(6, 10)).sum(),
        "expanded": lambda y: (y[:, :1].expand(10, 6) ** 2).sum(),
    }
    inputs = (case.x, case.values, case.bias)
    sparse, dense = (
        torch.autograd.grad(loss[reduce](f(*inputs, case.pattern)), inputs)
        for f in (sparse_linear, masked_linear)
    )
    torch.testing.assert_close(sparse, dense)


def test_wrong_arguments_raise_and_say_what_fits() -> None:
    case = make_case(random_mask(5, 7, 0.5, seed=16), 3)
    x, values, bias, pattern = case.x, case.values, case.bias, case.pattern
    wrong: list[tuple[type[Exception], str, tuple[object, Tensor, Tensor | None]]] = [
        (ValueError, r"input has shape \(3, 6\).*\(\*, 7\)", (x[:, :6], values, bias)),
        (ValueError, r"input has shape \(\)", (x[0, 0], values, bias)),
        (TypeError, r"input is torch.int64.*input.float\(\)", (x.long(), values, bias)),
        (TypeError, r"input is torch.complex64", (x.to(torch.complex64), values, bias)),
        (TypeError, r"input is torch.float16", (x.half(), values.half(), bias)),
        (
            TypeError,
            r"input is torch.float64 but the layer's values are torch.float32.*input.to\(torch.fl",
            (x.double(), values, bias),
        ),
        (TypeError, "bias is torch.float64 but values are", (x, values, case.bias.double())),
        (
            ValueError,
            "input is on meta but the layer's values are on cpu",
            (x.to("meta"), values, bias),
        ),
        (TypeError, "input is a list", (x.tolist(), values, bias)),
        (RuntimeError, r"values has \d+ entries, expected", (x, values[:-1], bias)),
        (RuntimeError, r"bias has 4 entries, expected 5", (x, values, bias[:-1])),
    ]
    for error, message, (bad_x, bad_values, bad_bias) in wrong:
        with pytest.raises(error, match=message):
            sparse_linear(bad_x, bad_values, bad_bias, pattern)  # type: ignore[arg-type]


def test_no_invalid_pattern_reaches_a_kernel_through_a_raw_operation() -> None:
    x, values = torch.ones(2, 4), torch.ones(2)
    for crow, col in (
        ([0, 1, 2], [0, 4]),
        ([0, 1, 2], [0, -1]),
        ([0, 2, 2], [1, 1]),
        ([0, 3, 2], [0, 1]),
    ):
        topology = torch.tensor(crow, dtype=torch.int32), torch.tensor(col, dtype=torch.int32)
        for key in (2**40, 2**40 + 1):
            with pytest.raises(RuntimeError, match="no valid pattern"):
                linear(x, values, None, *topology, torch.tensor([key]))


# --------------------------------------------------------------------------------------------------
# Derivatives

LEAVES = [needs for needs in itertools.product([False, True], repeat=3) if any(needs)]


@pytest.mark.parametrize("needs", LEAVES, ids=lambda n: "".join("xvb"[i] for i in range(3) if n[i]))
def test_only_the_wanted_gradients_are_computed(needs: tuple[bool, bool, bool]) -> None:
    case = make_case(random_mask(9, 11, 0.4, seed=17), 6, torch.float64)
    leaves = (case.x, case.values, case.bias)
    for leaf, need in zip(leaves, needs, strict=True):
        leaf.requires_grad_(need)
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
    y = sparse_linear(*leaves, case.pattern)
    with CountOps() as ops:
        actual = torch.autograd.grad(y, wanted, case.grad)
    assert (
        ops.names
        == {
            (True, True): ["linear_backward"],
            (True, False): ["linear_grad_input"],
            (False, True): ["linear_grad_values"],
            (False, False): [],
        }[needs[:2]]
    )
    expected = torch.autograd.grad(masked_linear(*leaves, case.pattern), wanted, case.grad)
    torch.testing.assert_close(actual, expected)


def test_nothing_is_saved_for_a_gradient_nobody_wants() -> None:
    case = make_case(random_mask(9, 11, 0.4, seed=17), 6)
    saved: list[tuple[object, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append((t.dtype, *t.shape)) or t, lambda t: t
    ):
        case.x.requires_grad_()
        sparse_linear(case.x, case.values, case.bias, case.pattern)
        assert (torch.float32, 6, 11) not in saved
        saved.clear()
        case.x.requires_grad_(False)
        case.values.requires_grad_()
        sparse_linear(case.x, case.values, case.bias, case.pattern)
        assert (torch.float32, case.pattern.nnz) not in saved


def test_no_graph_without_grad_mode() -> None:
    case = make_case(random_mask(9, 11, 0.4, seed=17), 6).require_grad()
    with torch.no_grad():
        assert not sparse_linear(case.x, case.values, case.bias, case.pattern).requires_grad


def test_a_changed_input_is_noticed_by_backward() -> None:
    case = make_case(random_mask(9, 11, 0.4, seed=17), 6)
    case.values.requires_grad_()
    y = sparse_linear(case.x, case.values, None, case.pattern)
    case.x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("pattern", ["half", "rows_without_nonzeros", "no_nonzeros"])
def test_gradients_of_every_order(pattern: str, with_bias: bool) -> None:
    case = make_case(MASKS[pattern](5, 4), 3, torch.float64).require_grad()
    inputs = (case.x, case.values) + ((case.bias,) if with_bias else ())

    def f(x: Tensor, values: Tensor, bias: Tensor | None = None) -> Tensor:
        return sparse_linear(x, values, bias, case.pattern)

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_the_gradient_operations(bias: bool) -> None:
    case = make_case(MASKS["half"](5, 4), 3, torch.float64).require_grad()
    case.grad.requires_grad_()

    def grad_input(grad: Tensor, values: Tensor) -> Tensor:
        return linear_grad_input(grad, values, *case.topology, 4)

    def grad_values(grad: Tensor, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        results = linear_grad_values(grad, x, *case.topology, bias)
        return results if bias else results[0]

    def backward(grad: Tensor, x: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        op = torch.ops.sparsetrain.linear_backward
        return tuple(op(grad, x, values, *case.topology, bias)[: 2 + bias])

    assert torch.autograd.gradcheck(backward, (case.grad, case.x, case.values))
    assert torch.autograd.gradgradcheck(backward, (case.grad, case.x, case.values))
    for f, inputs in ((grad_input, (case.grad, case.values)), (grad_values, (case.grad, case.x))):
        assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, inputs)


# --------------------------------------------------------------------------------------------------
# Registration


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "op", ["linear", "linear_no_bias", "grad_input", "grad_values", "no_bias", "backward"]
)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    case = make_case(random_mask(6, 5, 0.5, seed=18), 3, dtype).require_grad()
    case.grad.requires_grad_()
    ops = torch.ops.sparsetrain
    calls = {
        "linear": (ops.linear, (case.x, case.values, case.bias, *case.topology)),
        "linear_no_bias": (ops.linear, (case.x, case.values, None, *case.topology)),
        "grad_input": (ops.linear_grad_input, (case.grad, case.values, *case.topology, 5)),
        "grad_values": (ops.linear_grad_values, (case.grad, case.x, *case.topology, True)),
        "backward": (ops.linear_backward, (case.grad, case.x, case.values, *case.topology, True)),
        "no_bias": (ops.linear_grad_values, (case.grad, case.x, *case.topology, False)),
    }
    torch.library.opcheck(calls[op][0].default, calls[op][1])


def test_meta_tensors_give_shapes() -> None:
    case = make_case(random_mask(6, 5, 0.5, seed=18), 3).require_grad()
    x = torch.empty(2, 3, 5, device="meta", requires_grad=True)
    values = case.values.detach().to("meta").requires_grad_()
    y = sparse_linear(x, values, None, case.pattern)
    assert y.shape == (2, 3, 6)
    assert y.is_meta
    y.sum().backward()
    for leaf in (x, values):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape


# --------------------------------------------------------------------------------------------------
# Instruction sets

_ONE_ISA = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from helpers import worst_error
print(worst_error())
"""


@pytest.mark.parametrize("cpu", ["halves", "wide", "intel"])
@pytest.mark.parametrize("isa", _native.info()["isas_available"])
def test_every_instruction_set_and_kind_of_cpu_match_the_reference(isa: str, cpu: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ONE_ISA, str(Path(__file__).parent)],
        env=os.environ | {"SPARSETRAIN_ISA": isa, "SPARSETRAIN_CPU": cpu},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.0
