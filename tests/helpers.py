"""What the tests share: seeded patterns, awkward shapes and layouts, and the error bound."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetrain._planner import DIRECTIONS, Choice
from sparsetrain.ops import (
    PLANNER,
    linear,
    linear_backward,
    linear_grad_input,
    linear_grad_values,
)
from sparsetrain.pattern import SparsePattern
from sparsetrain.reference import row_indices, scatter

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# |computed - exact| <= BOUND * eps * sum |a||b|, the sum taken over the same terms. Worst seen, on
# any instruction set: float32 1.9, float64 2.4 (with the rounding of the reference in it), and 4.9
# where 37 equal terms are summed, so that all roundings go one way; bfloat16 0.5, which sums in
# float32 and rounds once, at the end.
BOUND = {torch.float32: 8.0, torch.float64: 8.0, torch.bfloat16: 1.0}

BATCHES = (0, 1, 7, 63, 65, 130)


# --------------------------------------------------------------------------------------------------
# Patterns


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mask(rows: int, cols: int, density: float, seed: int) -> Tensor:
    """bool (rows, cols); each element is true with probability `density`."""
    return torch.rand(rows, cols, generator=generator(seed)) < density


def _rows_without_nonzeros(rows: int, cols: int) -> Tensor:
    mask = random_mask(rows, cols, 0.3, seed=1)
    mask[0] = mask[rows // 2] = mask[-1] = False
    return mask


def _columns_without_nonzeros(rows: int, cols: int) -> Tensor:
    mask = random_mask(rows, cols, 0.3, seed=2)
    mask[:, 0] = mask[:, cols // 2] = mask[:, -1] = False
    return mask


def _one_nonzero(rows: int, cols: int) -> Tensor:
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    mask[rows - 1, cols - 1] = True
    return mask


def _one_full_row(rows: int, cols: int) -> Tensor:
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    mask[rows // 3] = True
    return mask


MASKS: dict[str, Callable[[int, int], Tensor]] = {
    "ten_percent": lambda rows, cols: random_mask(rows, cols, 0.1, seed=0),
    "half": lambda rows, cols: random_mask(rows, cols, 0.5, seed=3),
    "rows_without_nonzeros": _rows_without_nonzeros,
    "columns_without_nonzeros": _columns_without_nonzeros,
    "no_nonzeros": lambda rows, cols: torch.zeros(rows, cols, dtype=torch.bool),
    "all_nonzeros": lambda rows, cols: torch.ones(rows, cols, dtype=torch.bool),
    "one_nonzero": _one_nonzero,
    "one_full_row": _one_full_row,
}


# --------------------------------------------------------------------------------------------------
# Layouts: the same numbers at other strides


def _every_other_column(t: Tensor) -> Tensor:
    wide = torch.full((t.shape[0], 2 * t.shape[1]), float("nan"), dtype=t.dtype)
    wide[:, ::2] = t
    return wide[:, ::2]


def _inside_a_wider_matrix(t: Tensor) -> Tensor:
    wide = torch.full((t.shape[0] + 2, t.shape[1] + 5), float("nan"), dtype=t.dtype)
    wide[1:-1, 3:-2] = t
    return wide[1:-1, 3:-2]


def _misaligned(t: Tensor) -> Tensor:
    buffer = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype)
    buffer[1:] = t.reshape(-1)
    return buffer[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "every_other_column": _every_other_column,
    "inside_a_wider_matrix": _inside_a_wider_matrix,
    "misaligned": _misaligned,
    "expanded_rows": lambda t: t[:1].expand(t.shape),
    "expanded_columns": lambda t: t[:, :1].expand(t.shape),
}


# --------------------------------------------------------------------------------------------------
# A case, its exact results and the bound


@dataclass
class Case:
    """One problem: x (B, I), values (N,), bias (O,), grad (B, O) on a pattern (O, I)."""

    pattern: SparsePattern
    x: Tensor
    values: Tensor
    bias: Tensor
    grad: Tensor

    @property
    def topology(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.pattern.crow_indices, self.pattern.col_indices, self.pattern.key

    def require_grad(self) -> Case:
        for tensor in (self.x, self.values, self.bias):
            tensor.requires_grad_()
        return self


def make_case(mask: Tensor, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Signed random numbers, none of them exactly zero."""
    rows, cols = mask.shape
    pattern = SparsePattern.from_mask(mask)
    source = generator(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)

    return Case(
        pattern, numbers(batch, cols), numbers(pattern.nnz), numbers(rows), numbers(batch, rows)
    )


@dataclass
class Exact:
    """A result in float64 and, for each element, the sum of the absolute terms it is made of."""

    value: Tensor
    magnitude: Tensor


def _weight(values: Tensor, pattern: SparsePattern) -> Tensor:
    return scatter(values.double(), pattern.crow_indices, pattern.col_indices, pattern.shape[1])


def exact_linear(x: Tensor, values: Tensor, bias: Tensor | None, pattern: SparsePattern) -> Exact:
    x, weight = x.double(), _weight(values, pattern)
    value, magnitude = x @ weight.t(), x.abs() @ weight.abs().t()
    if bias is not None:
        value, magnitude = value + bias.double(), magnitude + bias.double().abs()
    return Exact(value, magnitude)


def exact_grad_input(grad: Tensor, values: Tensor, pattern: SparsePattern) -> Exact:
    grad, weight = grad.double(), _weight(values, pattern)
    return Exact(grad @ weight, grad.abs() @ weight.abs())


def exact_grad_values(grad: Tensor, x: Tensor, pattern: SparsePattern) -> Exact:
    rows, cols = row_indices(pattern.crow_indices), pattern.col_indices.long()
    grad, x = grad.double(), x.double()
    value, magnitude = grad.t() @ x, grad.abs().t() @ x.abs()
    return Exact(value[rows, cols], magnitude[rows, cols])


def exact_grad_bias(grad: Tensor) -> Exact:
    return Exact(grad.double().sum(0), grad.double().abs().sum(0))


def error_in_bounds(actual: Tensor, exact: Exact) -> float:
    """The largest |actual - exact| in units of eps * sum |a||b|; inf if a zero sum is missed."""
    error = (actual.double() - exact.value).abs()
    unit = torch.finfo(actual.dtype).eps * exact.magnitude
    ratio = torch.where(error == 0, 0.0, error / unit)  # 0/0: no terms, and the result is 0
    ratio = ratio.nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(ratio.max()) if ratio.numel() else 0.0


def assert_within_rounding(actual: Tensor, exact: Exact, what: str = "result") -> None:
    """Fails unless every element is within rounding of the exact result."""
    assert actual.shape == exact.value.shape, f"{what}: {actual.shape} != {exact.value.shape}"
    worst, bound = error_in_bounds(actual.detach(), exact), BOUND[actual.dtype]
    assert worst <= bound, f"{what}: error is {worst:.3g} eps * sum |a||b|, allowed is {bound}"


def worst_error() -> float:
    """Over a few shapes and all products and dtypes, the worst error as a fraction of its bound."""
    worst = 0.0
    for dtype, (rows, cols, batch) in itertools.product(
        DTYPES, [(53, 37, 65), (64, 300, 1), (64, 300, 7), (130, 257, 64)]
    ):
        case = make_case(random_mask(rows, cols, 0.2, seed=19), batch, dtype)
        pattern, topology = case.pattern, case.topology
        dvalues, dbias = linear_grad_values(case.grad, case.x, *topology, True)
        both = linear_backward(case.grad, case.x, case.values, *topology, True)
        for actual, exact in (
            (
                linear(case.x, case.values, case.bias, *topology),
                exact_linear(case.x, case.values, case.bias, pattern),
            ),
            (
                linear_grad_input(case.grad, case.values, *topology, cols),
                exact_grad_input(case.grad, case.values, pattern),
            ),
            (dvalues, exact_grad_values(case.grad, case.x, pattern)),
            (dbias, exact_grad_bias(case.grad)),
            (both[0], exact_grad_input(case.grad, case.values, pattern)),
            (both[1], exact_grad_values(case.grad, case.x, pattern)),
            (both[2], exact_grad_bias(case.grad)),
        ):
            worst = max(worst, error_in_bounds(actual, exact) / BOUND[dtype])
    return worst


# --------------------------------------------------------------------------------------------------
# Watching and steering


class CountOps(TorchDispatchMode):
    """Names of the sparsetrain operations that ran, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "sparsetrain":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch.set_num_threads for the length of a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """torch.use_deterministic_algorithms for the length of a block."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


LINEAR_FAMILIES = ("native", "dense")


@contextmanager
def linear_by(*families: str) -> Iterator[None]:
    """Inside, linear layers are computed by these families: one, or one for each direction."""
    by = dict(zip(DIRECTIONS, families * 3 if len(families) == 1 else families, strict=False))
    with PLANNER.choosing(lambda direction, *_: Choice(by[direction], "forced by a test")):
        yield
