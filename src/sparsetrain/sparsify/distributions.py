"""How the nonzeros of a model are divided among its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sparsetrain.pattern import nonzeros_for

#: (shapes, sparsity, most=None): the nonzeros of each layer.
Distribution = Callable[..., "list[int]"]


def uniform(
    shapes: Sequence[Sequence[int]], sparsity: float, most: Sequence[int] | None = None
) -> list[int]:
    """Every layer at the same sparsity.

    Args:
        shapes: the weights' shapes.
        sparsity: in [0, 1).
        most: nonzeros that no layer may exceed, where it is sparse already.

    Returns:
        Nonzeros of each layer, at least one.
    """
    counts = [nonzeros_for(math.prod(shape), sparsity) for shape in shapes]
    return counts if most is None else list(map(min, counts, most))


def erk(
    shapes: Sequence[Sequence[int]], sparsity: float, most: Sequence[int] | None = None
) -> list[int]:
    """Erdos-Renyi-Kernel: density proportional to sum(shape) / prod(shape).

    Small and narrow layers stay denser. From RigL (Evci et al. 2020), which extends the
    Erdos-Renyi rule of SET (Mocanu et al. 2018) by the kernel sizes of convolutions. A layer
    whose share exceeds density 1 is left at 1 and the others share the rest.

    Args:
        shapes: the weights' shapes, with the kernel sizes of a convolution.
        sparsity: of all layers together, in [0, 1).
        most: nonzeros that no layer may exceed, where it is sparse already; the others share what
            it cannot take.

    Returns:
        Nonzeros of each layer, at least one, none above its size; their sum is exactly
        ``nonzeros_for(sum of sizes, sparsity)`` (or the number of layers, if that is more).
    """
    total = nonzeros_for(sum(math.prod(shape) for shape in shapes), sparsity)
    sizes = [math.prod(shape) for shape in shapes] if most is None else list(most)
    total = min(max(total, sum(size > 0 for size in sizes)), sum(sizes))
    shares = [0.0] * len(sizes)
    free = set(range(len(sizes)))
    rest = total
    while free:
        scale = rest / sum(sum(shapes[i]) for i in free)
        full = {i for i in free if scale * sum(shapes[i]) >= sizes[i]}
        if not full:
            for i in free:
                shares[i] = scale * sum(shapes[i])
            break
        for i in full:
            shares[i] = float(sizes[i])
            rest -= sizes[i]
        free -= full
    return _whole(shares, sizes, total)


def _whole(shares: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Integers near `shares`, in [1, size] each, that sum to `total` (largest remainder first)."""
    counts = [
        min(size, max(1, math.floor(share))) for share, size in zip(shares, sizes, strict=True)
    ]
    order = sorted(range(len(counts)), key=lambda i: (counts[i] - shares[i], i))
    missing = total - sum(counts)
    while missing > 0:
        for i in order:
            if missing and counts[i] < sizes[i]:
                counts[i] += 1
                missing -= 1
    while missing < 0:  # only when layers were lifted to one nonzero
        largest = max(range(len(counts)), key=lambda i: counts[i])
        counts[largest] -= 1
        missing += 1
    return counts


DISTRIBUTIONS: dict[str, Distribution] = {"uniform": uniform, "erk": erk}
