"""Changing a pattern in O(nnz), and finding places for newcomers without a dense mask."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.pattern import SparsePattern

_change_pattern = torch.ops.sparsetrain.change_pattern.default


@torch.library.register_fake("sparsetrain::change_pattern")  # type: ignore[untyped-decorator]
def _(
    crow: Tensor, col: Tensor, cols: int, drop: Tensor, grown: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return torch.empty_like(crow), col.new_empty(nnz), col.new_empty(nnz)


def change_pattern(
    pattern: SparsePattern, drop: Tensor, grown: Tensor
) -> tuple[SparsePattern, Tensor]:
    """The pattern without some nonzeros and with others.

    Args:
        pattern: (rows, cols) with nnz nonzeros.
        drop: bool (nnz,), which of them go.
        grown: int64 (g,), positions in ``weight.reshape(-1)``, increasing, none of them kept.

    Returns:
        The new pattern, and source, int32 (new nnz,): where each weight was before, -1 for new.

    Raises:
        RuntimeError: arguments that do not fit.
    """
    crow, col, source = _change_pattern(
        pattern.crow_indices, pattern.col_indices, pattern.shape[1], drop, grown
    )
    return SparsePattern._trusted(crow, col, pattern.shape), source


def full_pattern(shape: tuple[int, int]) -> SparsePattern:
    """All of (rows, cols)."""
    rows, cols = shape
    crow = torch.arange(rows + 1, dtype=torch.int64).mul_(cols).to(torch.int32)
    col = torch.arange(cols, dtype=torch.int32).repeat(rows)
    return SparsePattern._trusted(crow, col, shape)


def inactive_count(pattern: SparsePattern) -> int:
    """How many positions hold no weight."""
    return pattern.shape[0] * pattern.shape[1] - pattern.nnz


def random_inactive(pattern: SparsePattern, count: int, generator: torch.Generator) -> Tensor:
    """`count` positions without a weight, each set of them equally likely; int64, increasing.

    In O(nnz + count), unless most of the free positions are asked for.
    """
    free = inactive_count(pattern)
    if not 0 <= count <= free:
        raise ValueError(f"count must be between 0 and {free}, the free positions; got {count}")
    if free <= 4 * count:
        ranks = torch.randperm(free, generator=generator)[:count].sort().values
    else:  # draw again in place of each duplicate: as drawing one by one, duplicates passed over
        ranks = torch.empty(0, dtype=torch.int64)
        while ranks.numel() < count:
            more = torch.randint(free, (count - ranks.numel(),), generator=generator)
            ranks = torch.unique(torch.cat([ranks, more]))
    flat = pattern.flat_indices()
    before = flat - torch.arange(flat.numel())  # free positions in front of each weight
    return ranks + torch.searchsorted(before, ranks, right=True)
