"""What a sparsifier reports: the share of weights that were ever tried, overlap, a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsetrain.pattern import SparsePattern


def pack(pattern: SparsePattern) -> Tensor:
    """The pattern's mask, one bit for each position: uint8 (ceil(rows * cols / 8),)."""
    return torch.from_numpy(np.packbits(pattern.to_mask().view(-1).numpy()))


def extend(bits: Tensor, pattern: SparsePattern, newcomers: Tensor) -> None:
    """Sets the bits of a pattern's newcomers, in place; in O(n) unless they are much of the layer.

    Args:
        bits: uint8, as of `pack`, with all other weights of the pattern set.
        pattern: with the newcomers.
        newcomers: int64 (n,), which of its nonzeros they are.
    """
    if newcomers.numel() * 8 > pattern.shape[0] * pattern.shape[1]:
        bits |= pack(pattern)
        return
    rows = torch.searchsorted(pattern.crow_indices, newcomers.to(torch.int32), right=True) - 1
    byte, bit = _places(rows * pattern.shape[1] + pattern.col_indices[newcomers])
    new = (bits[byte] & bit) == 0
    bits.index_add_(0, byte[new], bit[new])  # distinct bits: their sum is their union


def shared(bits: Tensor, pattern: SparsePattern) -> int:
    """How many of a pattern's weights are set in a packed mask; in O(nnz)."""
    byte, bit = _places(pattern.flat_indices())
    return int((bits[byte] & bit).count_nonzero())


def _places(positions: Tensor) -> tuple[Tensor, Tensor]:
    """The byte of each position of a packed mask, and the bit in it."""
    return positions >> 3, _BITS[positions & 7]


def count(bits: Tensor) -> int:
    """How many bits are set."""
    return int(_ONES[bits.to(torch.int64)].sum())


_BITS = torch.tensor([128 >> place for place in range(8)], dtype=torch.uint8)
_ONES = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)


def render(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: by rich where it is installed, else plain."""
    try:
        import io

        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return _plain(title, header, rows)
    table = Table(title=title)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < 2 else "right")
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=110).print(table)
    return stream.getvalue().rstrip("\n")


def _plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])
