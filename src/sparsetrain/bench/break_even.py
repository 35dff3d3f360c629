"""Where a speedup that grows with the sparsity passes 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def place(sparsity: float) -> float:
    """Where a sparsity stands on an axis that is linear in log(density)."""
    return -math.log10(1 - sparsity)


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """Sparsity where the speedup passes 1 for the last time, None if it never does.

    points: (sparsity, speedup), sorted. Between two of them log(speedup) is taken as linear in
    log(density), which is a straight line in the plot.
    """
    found = None
    for (s0, r0), (s1, r1) in itertools.pairwise(points):
        if r0 < 1 <= r1:
            part = math.log(1 / r0) / math.log(r1 / r0)
            found = float(1 - 10 ** -(place(s0) + part * (place(s1) - place(s0))))
    return found
