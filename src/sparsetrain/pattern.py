"""Which weights of a layer exist: an immutable, validated CSR topology."""

from __future__ import annotations

import itertools
import math
import numbers
import operator
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparsetrain import _native  # noqa: F401  (registers torch.ops.sparsetrain)

_INT32_MAX = 2**31 - 1

_next_key = itertools.count(1)
_dead_keys: deque[int] = deque()


def _forget_plan(key: int) -> None:
    """Drop the native plan of a collected pattern; postponed while torch is tracing.

    The garbage collector may run inside a dispatch mode or a functorch transform, where the call
    would be recorded or refused. The key then waits for the next pattern that is made or dies.
    """
    _dead_keys.append(key)
    _flush_dead_keys()


def _flush_dead_keys() -> None:
    if torch._C._len_torch_dispatch_stack() > 0:
        return
    if torch._C._functorch.maybe_current_level() is not None:
        return
    while _dead_keys:
        torch.ops.sparsetrain.forget_plan(_dead_keys.popleft())


def check_sparsity(value: Any, name: str = "sparsity") -> float:
    """`value` as a float in [0, 1).

    Raises:
        TypeError: not a real number (a string, a bool, a tensor).
        ValueError: NaN or outside [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a number in [0, 1), the fraction of weights left out; "
            f"got {value!r} of type {type(value).__name__}"
        )
    result = float(value)
    if math.isnan(result) or not 0.0 <= result < 1.0:
        hint = f"; did you mean {result / 100:g}?" if 1.0 < result < 100.0 else ""
        raise ValueError(
            f"{name} must be in [0, 1), the fraction of weights left out; got {value!r}{hint}"
        )
    return result


def nonzeros_for(numel: int, sparsity: float) -> int:
    """How many of `numel` weights remain at `sparsity`: the nearest integer, at least one.

    At least one, because a sparsity below 1 promises a layer that can still learn.
    """
    return min(numel, max(1, numel - round(sparsity * numel)))


def flat_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(out, product of the rest) of a weight's shape.

    Raises:
        TypeError: not a sequence of integers.
        ValueError: fewer than two dimensions, a negative size, or too many columns for int32.
    """
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Iterable):
        raise TypeError(f"shape must be a sequence of integers such as (out, in); got {shape!r}")
    try:
        sizes = [operator.index(size) for size in shape]
    except TypeError:
        raise TypeError(f"shape must hold integers only; got {tuple(shape)!r}") from None
    if len(sizes) < 2 or min(sizes) < 0:
        raise ValueError(
            f"shape must have at least two dimensions (out, in, ...), none negative; got {sizes}"
        )
    rows, cols = sizes[0], math.prod(sizes[1:])
    if rows >= _INT32_MAX or cols > _INT32_MAX:
        raise ValueError(f"shape {sizes} is too large: indices are 32-bit, up to {_INT32_MAX}")
    return rows, cols


class SparsePattern:
    """The positions of a sparse weight's elements, as CSR over ``weight.reshape(out, -1)``.

    Immutable and shared by reference: a change of topology replaces the pattern as a whole.
    Two patterns are equal when their shapes and indices are.

    Attributes:
        shape: (rows, cols), that is (out, product of the weight's other sizes).
        crow_indices: int32 (rows + 1,), where each row starts in `col_indices`. Do not write to it.
        col_indices: int32 (nnz,), strictly increasing inside each row. Do not write to it.
        key: int64 (1,), unique in this process; native code caches derived forms under it.
    """

    shape: tuple[int, int]
    crow_indices: Tensor
    col_indices: Tensor
    key: Tensor

    def __init__(self, crow_indices: Tensor, col_indices: Tensor, shape: Sequence[int]) -> None:
        """Validates and copies.

        Args:
            crow_indices: (rows + 1,), int32, or int64 that fits.
            col_indices: (nnz,), int32, or int64 that fits.
            shape: of the weight; more than two sizes are flattened to (out, product of the rest).

        Raises:
            TypeError: something that is no integer tensor.
            ValueError: wrong length, or indices that are decreasing, out of range, unsorted or
                duplicated; the message names the first fault and where it is.
        """
        rows, cols = flat_shape(shape)
        crow = _index_tensor(crow_indices, "crow_indices")
        col = _index_tensor(col_indices, "col_indices")
        if crow.numel() != rows + 1:
            raise ValueError(
                f"crow_indices must have rows + 1 = {rows + 1} entries for shape {(rows, cols)}; "
                f"got {crow.numel()}"
            )
        fault, where = torch.ops.sparsetrain.check_pattern(crow, col, cols)
        if fault:
            _raise_fault(int(fault), int(where), crow, col, cols)
        self._adopt(crow, col, (rows, cols))

    def _adopt(self, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> None:
        _flush_dead_keys()
        number = next(_next_key)
        with torch.inference_mode(False):
            key = torch.tensor([number], dtype=torch.int64, device="cpu")
        self.__dict__.update(shape=shape, crow_indices=crow, col_indices=col, key=key)
        weakref.finalize(self, _forget_plan, number).atexit = False

    @classmethod
    def _trusted(cls, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> SparsePattern:
        """Without copy and check, for indices that are valid by construction."""
        pattern = cls.__new__(cls)
        pattern._adopt(crow, col, shape)
        return pattern

    @classmethod
    def from_mask(cls, mask: Tensor) -> SparsePattern:
        """The pattern of a mask's true elements.

        Args:
            mask: bool, (out, ...); more than two dimensions are flattened to (out, -1).

        Raises:
            TypeError: not a bool tensor.
            ValueError: fewer than two dimensions.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = f"{mask.dtype} tensor" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor; got a {got}: pass `mask != 0`")
        rows, cols = flat_shape(mask.shape)
        if mask.is_meta:
            raise ValueError("mask is a meta tensor without data: pass a mask on the CPU")
        with torch.no_grad(), torch.inference_mode(False):
            flat = mask.detach().cpu().reshape(rows, cols)
            ends = flat.sum(dim=1).cumsum(0) if cols else torch.zeros(rows, device="cpu")
            if rows and int(ends[-1]) > _INT32_MAX:
                raise ValueError(f"mask has {int(ends[-1])} true elements, more than {_INT32_MAX}")
            crow = torch.zeros(rows + 1, dtype=torch.int32, device="cpu")
            crow[1:] = ends
            col = flat.nonzero()[:, 1].to(torch.int32)
        return cls._trusted(crow, col, (rows, cols))

    @classmethod
    def from_dense(cls, weight: Tensor) -> SparsePattern:
        """The pattern of a weight's nonzeros (NaN counts as one).

        Args:
            weight: (out, ...); more than two dimensions are flattened to (out, -1).
        """
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor; got {type(weight).__name__}")
        return cls.from_mask(weight.detach() != 0)

    @classmethod
    def random(
        cls,
        shape: Sequence[int],
        sparsity: float,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> SparsePattern:
        """A uniformly random pattern with exactly ``round((1 - sparsity) * numel)`` nonzeros.

        At least one nonzero. Rows may differ in their number, and may be empty.

        Args:
            shape: of the weight.
            sparsity: fraction of weights left out, in [0, 1).
            generator: source of randomness; torch's default generator when absent.
            seed: shorthand for a fresh generator with this seed.
        """
        rows, cols = flat_shape(shape)
        nnz = nonzeros_for(rows * cols, check_sparsity(sparsity))
        if seed is not None:
            if generator is not None:
                raise ValueError("pass either generator or seed, not both")
            generator = torch.Generator(device="cpu").manual_seed(seed)
        with torch.no_grad(), torch.inference_mode(False):
            size = rows * cols
            dtype = torch.int32 if size <= _INT32_MAX else torch.int64
            order = torch.randperm(size, generator=generator, dtype=dtype, device="cpu")
            mask = torch.zeros(size, dtype=torch.bool, device="cpu")
            mask[order[:nnz]] = True
            return cls.from_mask(mask.view(rows, cols))

    @property
    def nnz(self) -> int:
        """How many weights exist."""
        return self.col_indices.numel()

    @property
    def density(self) -> float:
        """nnz / (rows * cols); 0 for an empty shape."""
        size = self.shape[0] * self.shape[1]
        return self.nnz / size if size else 0.0

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1.0 - self.density

    def row_counts(self) -> Tensor:
        """int64 (rows,): how many weights each row has, its real fan-in."""
        return self.crow_indices.to(torch.int64).diff()

    def flat_indices(self) -> Tensor:
        """int64 (nnz,): each nonzero's position in ``weight.reshape(-1)``, increasing."""
        rows, cols = self.shape
        starts = torch.arange(rows, dtype=torch.int64, device="cpu") * cols
        return torch.repeat_interleave(starts, self.row_counts(), output_size=self.nnz).add_(
            self.col_indices
        )

    def to_mask(self) -> Tensor:
        """bool (rows, cols), true where a weight exists."""
        mask = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device="cpu")
        mask[self.flat_indices()] = True
        return mask.view(self.shape)

    def dense(self, values: Tensor) -> Tensor:
        """(rows, cols): `values` (nnz,) at their places, zero elsewhere; differentiable."""
        if values.shape != (self.nnz,):
            raise ValueError(
                f"values must have shape ({self.nnz},), one for each nonzero of the pattern; "
                f"got {tuple(values.shape)}"
            )
        zeros = values.new_zeros(self.shape[0] * self.shape[1])
        index = self.flat_indices().to(values.device)
        return zeros.scatter(0, index, values).view(self.shape)

    def gather(self, dense: Tensor) -> Tensor:
        """(nnz,): the elements of `dense` (out, ...) where a weight exists; differentiable."""
        if dense.dim() < 2 or flat_shape(dense.shape) != self.shape:
            raise ValueError(
                f"dense must have the pattern's shape {self.shape} once flattened to (out, -1); "
                f"got {tuple(dense.shape)}"
            )
        return dense.reshape(-1)[self.flat_indices().to(dense.device)]

    def transpose(self) -> tuple[SparsePattern, Tensor]:
        """The pattern of the transposed (cols, rows) matrix, in O(nnz).

        Returns:
            The pattern, and perm, int32 (nnz,), with ``transposed_values = values[perm]``.
        """
        rows, cols = self.shape
        crow, col, perm = torch.ops.sparsetrain.transpose_pattern(
            self.crow_indices, self.col_indices, cols
        )
        return SparsePattern._trusted(crow, col, (cols, rows)), perm

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, SparsePattern):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.nnz == other.nnz
            and torch.equal(self.crow_indices, other.crow_indices)
            and torch.equal(self.col_indices, other.col_indices)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.nnz))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a SparsePattern is immutable; make a new one to change {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a SparsePattern is immutable; {name!r} cannot be deleted")

    def __copy__(self) -> SparsePattern:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsePattern:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SparsePattern, (self.crow_indices, self.col_indices, self.shape)

    def __repr__(self) -> str:
        return f"SparsePattern(shape={self.shape}, nnz={self.nnz}, sparsity={self.sparsity:.4f})"


def _index_tensor(indices: Any, name: str) -> Tensor:
    """A private int32 CPU copy of 1-D integer `indices`."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name} must be an int32 tensor; got {type(indices).__name__}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 (int64 is narrowed); got {indices.dtype}")
    if indices.layout != torch.strided or indices.is_meta:
        what = "a meta tensor without data" if indices.is_meta else f"layout {indices.layout}"
        raise TypeError(f"{name} must be an ordinary tensor; got {what}")
    if indices.dim() != 1:
        raise ValueError(f"{name} must have one dimension; got shape {tuple(indices.shape)}")
    if indices.numel() > _INT32_MAX:
        raise ValueError(f"{name} has {indices.numel()} entries, more than {_INT32_MAX}")
    if indices.dtype == torch.int64 and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < -_INT32_MAX or high > _INT32_MAX:
            worst = high if high > _INT32_MAX else low
            raise ValueError(f"{name} holds {worst}, out of range: takes 0 to {_INT32_MAX}")
    with torch.inference_mode(False):
        return indices.detach().to("cpu", torch.int32, copy=True).contiguous()


def _raise_fault(fault: int, where: int, crow: Tensor, col: Tensor, cols: int) -> NoReturn:
    """Turns what the native check found (PatternFault in csrc/kernels/kernels.h) into an error."""
    if fault == 1:
        message = f"crow_indices must start with 0; got {int(crow[0])}"
    elif fault == 2:
        message = (
            f"crow_indices must not decrease; entry {where} is {int(crow[where])} and entry "
            f"{where + 1} is {int(crow[where + 1])}"
        )
    elif fault == 3:
        message = (
            f"crow_indices must end with the number of col_indices, {col.numel()}; "
            f"got {int(crow[-1])}"
        )
    elif fault == 4:
        message = f"col_indices[{where}] is {int(col[where])}, out of range: takes 0 to {cols - 1}"
    elif fault == 5:
        message = (
            f"col_indices must be sorted inside a row; entry {where} is {int(col[where])} after "
            f"{int(col[where - 1])}"
        )
    elif fault == 6:
        message = f"col_indices[{where}] = {int(col[where])} is a duplicate inside its row"
    else:
        message = f"the indices are invalid (fault {fault} at {where})"
    raise ValueError(message)
