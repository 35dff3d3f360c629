"""Sparse convolutions against torch's own layers with a masked weight, and their derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conv_cases import (
    LAYOUTS,
    SETTINGS,
    SMALL,
    WAYS,
    Case,
    Setting,
    computed_by,
    exact_results,
    make_case,
    setting,
)
from helpers import BOUND, DTYPES, MASKS, CountOps, error_in_bounds, generator, threads
from sparsetrain import _conv_choice, conv_ops
from sparsetrain._conv_choice import Problem, choose, explain
from sparsetrain._planner import DIRECTIONS, Choice
from sparsetrain.conv_ops import sparse_conv
from sparsetrain.nn import SparseConv1d, SparseConv2d, SparseConv3d
from sparsetrain.pattern import SparsePattern

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
NAMES = ("output", "gradient of the input", "gradient of the values", "gradient of the bias")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


def check_case(case: Case, bound: dict[torch.dtype, float] = BOUND) -> None:
    """Output and the three gradients, within rounding of the exact results."""
    case.require_grad()
    y = case.sparse(*case.leaves)
    actual = [y.detach(), *torch.autograd.grad(y, case.leaves, case.grad)]
    for name, result, exact in zip(NAMES, actual, exact_results(case), strict=True):
        assert result.shape == exact.value.shape, name
        assert result.dtype == case.values.dtype, name
        worst = error_in_bounds(result, exact)
        allowed = bound[result.dtype]
        assert worst <= allowed, f"{name}: error is {worst:.3g} eps * sum |a||b|, not {allowed}"


def bounds(way: str, case: Case | None = None) -> dict[torch.dtype, float]:
    """What is allowed, in eps * sum |a||b|.

    The library sums in longer chains than the sparse kernels. Padding by copies of pixels adds
    their gradients up in the input's own dtype.
    """
    zeros = case is None or case.window.get("padding_mode", "zeros") == "zeros"
    factor = (1 if zeros else 8) * (1 if way == "sparse" else 4)
    return {dtype: factor * bound for dtype, bound in BOUND.items()}


# --------------------------------------------------------------------------------------------------
# Right results


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_matches_the_masked_layer(name: str, way: str, dtype: torch.dtype) -> None:
    case = make_case(SETTINGS[name], 3, dtype)
    with computed_by(way):
        check_case(case, bounds(way, case))


@pytest.mark.parametrize("batch", [0, 1, 7, 33])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["3x3", "3x3_stride_2", "1x1", "depthwise", "1d", "3d"])
def test_any_batch(name: str, way: str, batch: int) -> None:
    with computed_by(way):
        check_case(make_case(SETTINGS[name], batch))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("name", ["3x3", "1x1_stride_2", "3x3_groups", "1d", "3d"])
def test_any_pattern(name: str, pattern: str, way: str) -> None:
    what = SETTINGS[name]
    with computed_by(way):
        check_case(make_case(what, 5, mask=MASKS[pattern](*what.mask_shape)))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "what",
    [
        setting(64, 48, (3, 3), (14, 14), padding=1),
        setting(40, 72, (3, 3), (15, 13), padding=1, stride=2),
        setting(130, 70, (1, 1), (7, 7)),
        setting(70, 130, (1, 1), (9, 9), stride=2),
        setting(33, 35, (5,), (130,), padding=2),
        setting(32, 32, (3, 3), (7, 7)),
    ],
    ids=["3x3", "3x3_stride_2", "1x1", "1x1_stride_2", "1d", "several_images_side_by_side"],
)
@pytest.mark.parametrize("density", [0.05, 0.4])
@pytest.mark.parametrize("count", [1, 2])
def test_layers_of_more_than_one_tile(
    what: Setting, density: float, count: int, dtype: torch.dtype
) -> None:
    with computed_by("sparse"), threads(count):
        check_case(make_case(what, 9, dtype, density))


# Few for their channels: by the kernels of linear layers (csrc/kernels/conv_columns-inl.h).
FEW_PIXELS = {
    "3x3": (1, setting(24, 90, (3, 3), (7, 7), padding=1)),
    "3x3_stride_2": (1, setting(20, 100, (3, 3), (13, 14), padding=1, stride=2)),
    "several_images": (3, setting(24, 90, (3, 3), (5, 6), padding=1)),
    "several_tiles": (1, setting(16, 130, (3, 3), (14, 14), padding=1)),
    # As wide as the input: vectors of pixels as they lie, also of two images at once.
    "5x3": (2, setting(16, 130, (5, 3), (6, 9), padding=(2, 1))),
    "dilated": (3, setting(12, 120, (3, 3), (7, 8), padding=2, dilation=2)),
    "kernel_beyond_the_image": (3, setting(6, 90, (7, 9), (3, 7), padding=(3, 4))),
    "less_than_a_vector": (5, setting(24, 90, (3, 3), (3, 3), padding=1)),
    "as_wide_but_lower": (1, setting(16, 90, (3, 3), (9, 9), padding=(0, 1))),
    "1x1": (2, setting(70, 120, (1, 1), (7, 7))),
    "1x1_stride_2_padding": (2, setting(40, 90, (1, 1), (9, 7), padding=(1, 0), stride=2)),
    "stride_3": (
        2,
        setting(12, 90, (2, 3), (13, 14), padding=(1, 3), stride=(2, 3), dilation=(1, 2)),
    ),
    "1d": (1, setting(16, 80, (5,), (40,), padding=2)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", FEW_PIXELS)
def test_few_pixels(name: str, dtype: torch.dtype) -> None:
    batch, what = FEW_PIXELS[name]
    case = make_case(what, batch, dtype, 0.6)
    results: list[list[Tensor]] = []
    with computed_by("sparse"):
        for count in (1, 2, 4):
            with threads(count):
                check_case(case)
                leaves = [t.detach().requires_grad_() for t in case.leaves]
                y = case.sparse(*leaves)
                results.append([y.detach(), *torch.autograd.grad(y, leaves, case.grad)])
    for others in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], others, strict=True))


def test_gradients_of_any_order_of_few_pixels() -> None:
    what = setting(2, 16, (3, 3), (3, 3), padding=1)
    case = make_case(what, 1, torch.float64, 0.5).require_grad()
    with computed_by("sparse"):
        assert torch.autograd.gradcheck(case.sparse, case.leaves)
        assert torch.autograd.gradgradcheck(case.sparse, case.leaves)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["3x3", "3x3_stride_2", "1x1", "1d", "3d"])
def test_strides_of_input_and_gradient_do_not_matter(name: str, layout: str, way: str) -> None:
    case = make_case(SETTINGS[name], 4)
    case.x, case.grad = LAYOUTS[layout](case.x), LAYOUTS[layout](case.grad)
    with computed_by(way):
        check_case(case, bounds("dense"))  # equal terms: all roundings of a sum go one way


@st.composite
def _settings(draw: Callable[..., Any]) -> Setting:
    n = draw(st.sampled_from([1, 2, 2, 2, 3]))

    def many(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(n))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, out = (groups * draw(st.integers(1, 5)) for _ in range(2))
    kernel, dilation = many(1, 4), many(1, 3)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers", "numbers"]))
    stride = (1,) * n if padding == "same" else many(1, 3)
    if padding == "numbers":
        padding = many(0, 3)
    # Large enough for the kernel without padding, and for padding by reflection.
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(max(r, 4) + draw(st.integers(0, 4)) for r in reach)
    return setting(
        channels,
        out,
        kernel,
        size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
    )


@given(
    what=_settings(),
    batch=st.sampled_from([0, 1, 2, 7, 33]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    way=st.sampled_from(WAYS),
    layouts=st.tuples(st.sampled_from(sorted(LAYOUTS)), st.sampled_from(sorted(LAYOUTS))),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=250, deadline=None, derandomize=True, database=None)
def test_any_setting_matches_the_masked_layer(
    what: Setting,
    batch: int,
    density: float,
    dtype: torch.dtype,
    way: str,
    layouts: tuple[str, str],
    seed: int,
) -> None:
    case = make_case(what, batch, dtype, density, seed)
    if batch:
        case.x, case.grad = LAYOUTS[layouts[0]](case.x), LAYOUTS[layouts[1]](case.grad)
    with computed_by(way):
        check_case(case, bounds("dense", case))  # equal terms, as above


@pytest.mark.parametrize("way", WAYS)
def test_small_integers_are_exact(way: str) -> None:
    case, source = make_case(SETTINGS["3x3_stride_2"], 5), generator(7)

    def integers(like: Tensor) -> Tensor:
        return torch.randint(-2, 3, like.shape, generator=source).to(like.dtype)

    case.x, case.values, case.bias, case.grad = (
        integers(t) for t in (case.x, case.values, case.bias, case.grad)
    )
    with computed_by(way):
        check_case(case, dict.fromkeys(DTYPES, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_a_corrupted_nonzero_is_caught(dtype: torch.dtype) -> None:
    case = make_case(SETTINGS["3x3"], 3, dtype)
    right = case.masked
    case.masked = lambda x, v, b: right(x, v * (torch.arange(v.numel()) != 17), b)  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="error is"):
        check_case(case)


@pytest.mark.parametrize("name", ["1d", "1d_same_circular", "3x3", "reflect", "3d"])
def test_input_without_a_batch(name: str) -> None:
    case = make_case(SETTINGS[name], 1, torch.float64).require_grad()
    x = case.x.detach()[0].requires_grad_()
    leaves = (x, case.values, case.bias)
    y = case.sparse(*leaves)
    assert y.shape == case.grad.shape[1:]
    expected = case.masked(*leaves)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, case.grad[0]),
        torch.autograd.grad(expected, leaves, case.grad[0]),
    )


def test_a_sum_and_a_mean_over_pixels_send_back_expanded_gradients() -> None:
    case = make_case(SETTINGS["3x3"], 3, torch.float64).require_grad()
    for reduce in (torch.sum, lambda y: y.mean((2, 3)).pow(2).sum(), lambda y: y[0, 1, ::2].sum()):
        torch.testing.assert_close(
            torch.autograd.grad(reduce(case.sparse(*case.leaves)), case.leaves),
            torch.autograd.grad(reduce(case.masked(*case.leaves)), case.leaves),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "what",
    [
        setting(200, 810, (3, 3), (4, 5), padding=1),
        setting(200, 810, (3, 3), (5, 5), padding=1, stride=2),
        setting(100, 530, (3, 3, 3), (2, 3, 4), padding=1),
        setting(70_000, 20, (1, 1), (2, 2)),
        setting(35_000, 40, (1, 1), (2, 2)),
    ],
    ids=["2d", "stride_2", "3d", "few_channels", "few_channels_in_two"],
)
def test_a_large_dense_weight_is_made_in_pieces(what: Setting, dtype: torch.dtype) -> None:
    case = make_case(what, 2, dtype, 0.5)
    for layout in ("contiguous", "channels_last"):
        case.x = LAYOUTS[layout](case.x.detach())
        with computed_by("dense"):
            check_case(case, bounds("dense"))


# The library's own gradients of the weight are wrong here.
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "what",
    [
        setting(20, 40, (3, 3, 3), (2, 6, 6), padding=1),
        setting(20, 40, (2, 3, 3), (1, 6, 6), padding=1),
        setting(20, 40, (5, 3, 3), (4, 6, 6), padding=1),
        setting(20, 40, (3, 3), (6, 1), padding=1, stride=2),
        setting(20, 40, (7, 7), (6, 1), padding=3, stride=2),
    ],
    ids=["3d", "3d_2", "3d_5", "3x3_stride_2", "7x7_stride_2"],
)
def test_bfloat16_inputs_smaller_than_the_window(what: Setting, way: str) -> None:
    case = make_case(what, 2, torch.bfloat16, 0.5)
    with computed_by(way):
        check_case(case, bounds(way))


# --------------------------------------------------------------------------------------------------
# Derivatives

LEAVES = [needs for needs in itertools.product([False, True], repeat=3) if any(needs)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("needs", LEAVES, ids=lambda n: "".join("xvb"[i] for i in range(3) if n[i]))
def test_only_the_wanted_gradients_are_computed(needs: tuple[bool, bool, bool], way: str) -> None:
    case = make_case(SETTINGS["3x3"], 3, torch.float64)
    for leaf, need in zip(case.leaves, needs, strict=True):
        leaf.requires_grad_(need)
    wanted = [leaf for leaf, need in zip(case.leaves, needs, strict=True) if need]
    with computed_by(way):
        y = case.sparse(*case.leaves)
        with CountOps() as ops:
            actual = torch.autograd.grad(y, wanted, case.grad)
    name = "conv2d" if way == "sparse" else "conv_dense"
    suffix = {(True, True): "backward", (True, False): "grad_input", (False, True): "grad_values"}
    expected = [f"{name}_{suffix[needs[:2]]}"] if any(needs[:2]) else []
    assert [n for n in ops.names if n.startswith("conv")] == expected
    torch.testing.assert_close(
        actual, torch.autograd.grad(case.masked(*case.leaves), wanted, case.grad)
    )


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_saved_that_dense_would_not(way: str) -> None:
    case = make_case(SETTINGS["3x3"], 6)
    saved: list[tuple[Any, ...]] = []

    def shapes(*needs: bool) -> list[tuple[Any, ...]]:
        saved.clear()
        for leaf, need in zip(case.leaves, needs, strict=True):
            leaf.requires_grad_(need)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
        ):
            case.sparse(*case.leaves)
        topology = [tuple(t.shape) for t in (case.pattern.crow_indices, case.pattern.col_indices)]
        return [s for s in saved if s not in (*topology, (1,)) or s == tuple(case.values.shape)]

    x, values = tuple(case.x.shape), tuple(case.values.shape)
    with computed_by(way):
        assert shapes(True, False, False) == [values] * 2  # the other one is col_indices
        assert shapes(False, True, True) == [x, values]  # likewise
        assert shapes(True, True, True) == [x, values, values]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "what",
    [
        SMALL,
        setting(2, 3, (1, 1), (3, 2), stride=2),
        setting(2, 2, (2,), (5,), padding="same"),
        setting(2, 2, (2, 2), (3, 3), padding=1, padding_mode="circular"),
        setting(1, 2, (2, 1, 2), (3, 2, 3), padding=(1, 0, 0), stride=(2, 1, 1)),
    ],
    ids=["uneven", "1x1_stride_2", "1d_same", "circular", "3d"],
)
def test_gradients_of_every_order(what: Setting, way: str) -> None:
    case = make_case(what, 2, torch.float64, 0.6).require_grad()
    with computed_by(way):
        assert torch.autograd.gradcheck(
            case.sparse, case.leaves, check_forward_ad=True, check_batched_grad=True
        )
        assert torch.autograd.gradgradcheck(case.sparse, case.leaves, check_fwd_over_rev=True)
        assert torch.autograd.gradcheck(case.sparse, case.leaves[:2])


def test_a_mixture_of_implementations() -> None:
    for families in itertools.product(["native", "dense"], repeat=3):
        by = dict(zip(DIRECTIONS, families, strict=True))
        with conv_ops.PLANNER.choosing(lambda direction, *_, by=by: Choice(by[direction], "")):
            check_case(make_case(SETTINGS["3x3"], 3))
            case = make_case(SMALL, 1, torch.float64, 0.6).require_grad()
            assert torch.autograd.gradgradcheck(case.sparse, case.leaves)


# --------------------------------------------------------------------------------------------------
# The choice


LARGE = {  # enough work for several threads
    "3x3": setting(32, 48, (3, 3), (7, 7), padding=1),
    "3x3_stride_2": setting(24, 40, (3, 3), (15, 17), padding=1, stride=2),
    "1x1": setting(64, 48, (1, 1), (7, 9)),
    "1x1_stride_2": setting(64, 48, (1, 1), (9, 9), stride=2),
    "groups": setting(32, 32, (3, 3), (9, 10), padding=1, groups=4),
    "depthwise": setting(64, 64, (3, 3), (13, 13), padding=1, groups=64),
    "1d": setting(32, 32, (5,), (100,), padding=2),
    "3d": setting(8, 12, (3, 3, 3), (5, 6, 7), padding=1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", LARGE)
def test_every_bit_is_the_same_for_any_thread_count_and_run(name: str, dtype: torch.dtype) -> None:
    case = make_case(LARGE[name], 21, dtype).require_grad()
    expected: list[Tensor] = []
    torch.use_deterministic_algorithms(True)
    try:
        for count in (1, 2, 4, 3, 1):
            with threads(count):
                y = case.sparse(*case.leaves)
                results = [y.detach(), *torch.autograd.grad(y, case.leaves, case.grad)]
                y = case.sparse(case.x.detach(), case.values.detach(), case.bias)
                results += torch.autograd.grad(y, case.bias, case.grad)
            expected = expected or results
            assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "what",
    [
        setting(16, 48, (3, 3), (19, 23), padding=1),
        setting(48, 16, (3, 3), (19, 23), padding=1),
        setting(24, 32, (3, 3), (25, 17), padding=1, stride=2),
        setting(24, 24, (3, 5), (30, 21), padding=(0, 1), dilation=(2, 1), groups=2),
        setting(64, 24, (1, 1), (21, 20)),
        setting(24, 64, (1, 1), (21, 20), stride=2),
    ],
    ids=["widening", "narrowing", "stride_2", "groups_dilated", "1x1", "1x1_stride_2"],
)
def test_the_gradient_of_the_values_alone(what: Setting, dtype: torch.dtype) -> None:
    """Without a gradient of the input: right, and the same for any threads."""
    case = make_case(what, 2, dtype, 0.5).require_grad()
    case.x.requires_grad_(False)
    results: list[list[Tensor]] = []
    with computed_by("sparse"):
        for count in (1, 2, 4):
            with threads(count):
                check_case(case)
                leaves = [case.values, case.bias]
                y = case.sparse(case.x, *leaves)
                results.append(list(torch.autograd.grad(y, leaves, case.grad)))
    for others in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], others, strict=True))


@pytest.mark.parametrize("out", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 37])
def test_every_bit_of_a_bias_gradient_alone_is_the_same_for_any_thread_count(
    out: int, batch: int
) -> None:
    case = make_case(setting(1, out, (1, 1), (91, 67)), batch)
    case.bias.requires_grad_()
    for grad in (case.grad, case.grad.contiguous(memory_format=torch.channels_last)):
        results = []
        for count in (1, 2, 4):
            with threads(count):
                results += torch.autograd.grad(case.sparse(*case.leaves), case.bias, grad)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def chosen(problem: Problem) -> list[str]:
    return [choose(direction, problem).family for direction in DIRECTIONS]


@pytest.mark.parametrize(
    ("changes", "families"),
    [
        ({}, ["native"] * 3),
        ({"nnz": 33_000}, ["dense"] * 3),
        ({"nnz": 30_000}, ["dense", "dense", "native"]),
        ({"nnz": 27_000}, ["native", "dense", "native"]),
        ({"nnz": 33_000, "input_shape": (64, 64, 56, 56)}, ["native"] * 3),
        ({"nnz": 20_500, "input_shape": (1, 64, 7, 7)}, ["native"] * 3),
        ({"nnz": 30_000, "input_shape": (1, 64, 7, 7)}, ["native", "dense", "native"]),
        ({"nnz": 26_000, "input_shape": (1, 64, 28, 28)}, ["native"] * 3),
        ({"nnz": 28_000, "input_shape": (1, 64, 28, 28)}, ["dense", "dense", "native"]),
        ({"nnz": 26_000, "input_shape": (1, 64, 65, 65)}, ["dense"] * 3),  # too many to unfold
        ({"nnz": 20_000}, ["native"] * 3),
        ({"nnz": 20_000, "input_shape": (1, 64, 56, 56)}, ["native", "dense", "dense"]),
        ({"nnz": 36_864, "input_shape": (1, 64, 56, 56)}, ["dense"] * 3),
        ({"nnz": 30_000, "deterministic": True}, ["native"] * 3),
        ({"nnz": 25_000, "dtype": torch.float64}, ["native"] * 3),
        ({"nnz": 15_000, "dtype": torch.bfloat16}, ["dense"] * 3),
        ({"nnz": 36_864, "input_shape": (1, 64, 4, 4)}, ["native"] * 3),
        ({"groups": 64, "nnz": 57}, ["dense"] * 3),
        ({"groups": 64, "nnz": 57, "dtype": torch.float64}, ["native"] * 3),
        ({"groups": 64, "nnz": 57, "deterministic": True}, ["native"] * 3),
        (
            {"kernel_size": (1, 1), "stride": (2, 2), "nnz": 2550},
            ["dense", "native", "dense"],
        ),
        (
            {"kernel_size": (1, 1), "stride": (2, 2), "nnz": 2550, "input_shape": (1, 64, 40, 40)},
            ["dense"] * 3,
        ),
        (
            {"stride": (2, 2), "nnz": 16_000, "input_shape": (1, 64, 56, 56)},
            ["native"] * 3,
        ),
        (
            {"stride": (2, 2), "nnz": 19_000, "input_shape": (1, 64, 56, 56)},
            ["dense", "native", "dense"],
        ),
        (
            {"stride": (2, 2), "nnz": 29_000, "input_shape": (1, 64, 56, 56)},
            ["dense", "native", "dense"],
        ),
    ],
)
def test_the_documented_choice(
    changes: dict[str, Any], families: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_conv_choice, "_IS_WIDE", False)
    monkeypatch.setattr(_conv_choice, "_IS_HALVES", False)
    monkeypatch.setattr(_conv_choice, "_HAS_512_BITS", False)
    monkeypatch.setattr(_conv_choice, "_LANES", 8)
    problem = Problem(
        input_shape=(32, 64, 56, 56),
        out_channels=64,
        nnz=3686,
        kernel_size=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        groups=1,
        dtype=torch.float32,
    )._replace(**changes)
    assert chosen(problem) == families
    for line, family in zip(explain(problem).splitlines()[1:], families, strict=True):
        assert line.split()[1] == family


@pytest.mark.parametrize(
    ("batch", "size", "stride", "density", "families"),
    [
        (32, 28, 1, 0.8, ["native", "native", "dense"]),
        (8, 28, 1, 0.9, ["native"] * 3),
        (8, 28, 2, 0.7, ["native", "native", "dense"]),
        (1, 28, 2, 0.75, ["native", "native", "dense"]),
        (1, 7, 1, 0.75, ["native", "native", "dense"]),
        (1, 14, 2, 0.85, ["native", "dense", "dense"]),
    ],
)
def test_the_documented_choice_for_1x1_on_whole_512_bit_vectors(
    batch: int,
    size: int,
    stride: int,
    density: float,
    families: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_conv_choice, "_IS_WIDE", True)
    monkeypatch.setattr(_conv_choice, "_IS_HALVES", False)
    monkeypatch.setattr(_conv_choice, "_FILLING", 16)
    nnz = int(density * 256 * 256)
    window = ((1, 1), (stride, stride), (0, 0), (1, 1))
    problem = Problem((batch, 256, size, size), 256, nnz, *window, 1, torch.float32)
    assert chosen(problem) == families


def test_the_documented_choice_for_1x1_on_halves_of_512_bit_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_conv_choice, "_IS_WIDE", False)
    monkeypatch.setattr(_conv_choice, "_HAS_512_BITS", True)
    monkeypatch.setattr(_conv_choice, "_LANES", 16)
    window = ((1, 1), (1, 1), (0, 0), (1, 1))
    problem = Problem((1, 64, 40, 40), 64, int(0.7 * 64 * 64), *window, 1, torch.float32)
    assert chosen(problem) == ["native", "native", "dense"]


@pytest.mark.parametrize(
    ("batch", "density", "families"),
    [
        (8, 0.74, ["native", "dense", "native"]),
        (8, 0.69, ["native"] * 3),
        (7, 0.64, ["native", "dense", "native"]),  # 7 of 8 lanes: 7/8 of these densities
        (20, 0.60, ["native", "dense", "native"]),
        (20, 0.64, ["dense", "dense", "native"]),
        (9, 0.60, ["native", "dense", "dense"]),  # 9 of 16: lanes are pixels
        (17, 0.60, ["native", "dense", "dense"]),
    ],
)
def test_the_documented_choice_for_batches_that_fill_vectors_in_part(
    batch: int, density: float, families: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_conv_choice, "_SAMPLES", 8)
    monkeypatch.setattr(_conv_choice, "_IS_HALVES", False)
    window = ((3, 3), (1, 1), (1, 1), (1, 1))
    nnz = int(density * 64 * 64 * 9)
    problem = Problem((batch, 64, 28, 28), 64, nnz, *window, 1, torch.float32)
    assert chosen(problem) == families


@pytest.mark.parametrize(
    ("shape", "groups", "density", "lanes", "unfolds"),
    [
        ((1, 256, 14, 14), 1, 0.1, 16, True),  # rows of 14 pixels fill 14 of 16 lanes
        ((1, 64, 68, 68), 1, 0.5, 16, False),  # more than 4096 pixels
        ((1, 64, 56, 56), 1, 0.01, 16, False),  # too few nonzeros to pay for moving pixels
        ((32, 256, 14, 14), 1, 0.1, 16, False),  # lanes are samples
        ((1, 256, 14, 14), 2, 0.1, 16, False),
        ((0, 256, 14, 14), 1, 0.1, 16, False),
    ],
)
def test_the_kernels_say_what_they_unfold(
    shape: tuple[int, ...], groups: int, density: float, lanes: int, unfolds: bool
) -> None:
    nnz = int(density * shape[1] ** 2 * 9 / groups)
    window = ((3, 3), (1, 1), (1, 1), (1, 1), groups)
    assert torch.ops.sparsetrain.conv_unfolds(shape, shape[1], nnz, *window, lanes) == unfolds


def test_unfolding_needs_a_vector() -> None:
    window = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    with pytest.raises(RuntimeError, match="lanes must be at least 1, got 0"):
        torch.ops.sparsetrain.conv_unfolds((1, 8, 4, 4), 8, 8, *window, 0)


@pytest.mark.parametrize(
    ("kernel", "stride", "density", "families"),
    [
        (3, 1, 0.57, ["native", "dense", "native"]),
        (3, 1, 0.62, ["dense"] * 3),
        (3, 2, 0.57, ["native"] * 3),
        (3, 2, 0.62, ["dense", "native", "dense"]),
        (1, 1, 0.62, ["native"] * 3),
    ],
)
def test_the_documented_choice_for_few_images_on_halves_of_512_bit_vectors(
    kernel: int, stride: int, density: float, families: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_conv_choice, "_IS_WIDE", False)
    monkeypatch.setattr(_conv_choice, "_IS_HALVES", True)
    monkeypatch.setattr(_conv_choice, "_HAS_512_BITS", True)
    monkeypatch.setattr(_conv_choice, "_LANES", 16)
    window = ((kernel, kernel), (stride, stride), (kernel // 2,) * 2, (1, 1))
    nnz = int(density * 64 * 64 * kernel * kernel)
    problem = Problem((2, 64, 64, 64), 64, nnz, *window, 1, torch.float32)
    assert chosen(problem) == families


@pytest.mark.parametrize(
    ("size", "stride", "lanes", "density", "families"),
    [
        (14, 1, 16, 0.73, ["native"] * 3),
        (14, 1, 16, 0.77, ["dense", "dense", "native"]),
        (14, 1, 16, 0.79, ["dense"] * 3),
        (28, 2, 16, 0.8, ["dense", "native", "dense"]),
        (7, 1, 16, 0.9, ["native", "dense", "native"]),
        (64, 1, 16, 0.7, ["dense"] * 3),  # rows fill vectors
        (56, 1, 16, 0.7, ["native"] * 3),
        (56, 1, 8, 0.7, ["dense"] * 3),  # here too
    ],
)
def test_the_documented_choice_for_unfolded_layers(
    size: int,
    stride: int,
    lanes: int,
    density: float,
    families: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_IS_WIDE", "_IS_HALVES"):
        monkeypatch.setattr(_conv_choice, name, False)
    monkeypatch.setattr(_conv_choice, "_LANES", lanes)
    window = ((3, 3), (stride, stride), (1, 1), (1, 1))
    nnz = int(density * 64 * 64 * 9)
    problem = Problem((1, 64, size, size), 64, nnz, *window, 1, torch.float32)
    assert chosen(problem) == families


@pytest.mark.parametrize(
    ("batch", "channels", "size", "density", "families"),
    [
        (8, 128, 56, 1.0, ["native"] * 3),
        (8, 256, 56, 1.0, ["dense", "native", "dense"]),
        (32, 256, 56, 0.87, ["native", "native", "dense"]),
        (1, 256, 40, 1.0, ["native"] * 3),
        (1, 512, 40, 0.95, ["dense"] * 3),
        (1, 512, 40, 0.89, ["dense", "native", "dense"]),
    ],
)
def test_the_documented_choice_for_strided_1x1_on_halves_of_512_bit_vectors(
    batch: int,
    channels: int,
    size: int,
    density: float,
    families: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_conv_choice, "_IS_WIDE", False)
    monkeypatch.setattr(_conv_choice, "_IS_HALVES", True)
    window = ((1, 1), (2, 2), (0, 0), (1, 1))
    shape = (batch, channels, size, size)
    nnz = int(density * channels * 128)
    problem = Problem(shape, 128, nnz, *window, 1, torch.float32)
    assert chosen(problem) == families


@pytest.mark.parametrize("family", ["native", "dense"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_layers_that_hold_all_their_weights(dimensions: int, family: str) -> None:
    """They have a plan like others; where the library computes everything, it is called itself."""
    dense = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1](6, 16, 3, stride=2, padding=1)
    everywhere = torch.ones_like(dense.weight, dtype=torch.bool)
    layer = [SparseConv1d, SparseConv2d, SparseConv3d][dimensions - 1].from_dense(dense, everywhere)
    assert layer.nnz == dense.weight.numel() >= 256
    x = torch.randn(2, 6, *[7] * dimensions, generator=generator(4))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    if family == "native" and dimensions == 3:
        family = "unfolded"
    with conv_ops.PLANNER.choosing(lambda *_: Choice(family, "test")):
        y = layer(ours)
        with CountOps() as counted:
            layer(ours)
        y.square().sum().backward()
    reference = dense(theirs)
    reference.square().sum().backward()
    assert bool(counted.names) != (family == "dense")
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert dense.weight.grad is not None
    torch.testing.assert_close(layer.values.grad, dense.weight.grad.flatten())


@pytest.mark.parametrize(("nnz", "family"), [(2_000, "unfolded"), (5_000, "dense")])
def test_the_documented_choice_in_three_dimensions(nnz: int, family: str) -> None:
    three = [(3, 3, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1)]
    problem = Problem((4, 16, 16, 16, 16), 32, nnz, *three, 1, torch.float32)
    assert chosen(problem) == [family] * 3


def test_forced_pattern_shapes() -> None:
    dense = nn.Conv2d(4, 6, 3)
    pattern = SparsePattern.from_dense(dense.weight)
    values = pattern.gather(dense.weight)
    image = torch.randn(2, 4, 5, 5, generator=generator(3))
    y = sparse_conv(image, values, dense.bias, pattern, kernel_size=(3, 3))
    torch.testing.assert_close(y, dense(image))
