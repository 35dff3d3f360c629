"""Timing a few candidates against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["Timing", "compare"]

_TURN_S = 2e-4  # a turn repeats a short call until it lasts about this long
_TURNS = 21
_FEWEST = 5
_HOPELESS = 1.3  # a candidate is dropped when its best turn takes so many times the best median


class Timing(NamedTuple):
    """Seconds of one call: the median of the turns, and two standard errors."""

    seconds: float
    noise: float
    turns: int


def compare(
    candidates: Mapping[str, Callable[[], object]],
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times the candidates in turns, so that a slow moment of the machine hits all of them.

    Each is called twice before (memory, caches, plans). A candidate is dropped as soon as its best
    turn is far behind the best median; the slowest quarter of the turns of each is left out, since
    what disturbs a measurement only ever adds to it.

    Args:
        candidates: name to what is timed.
        budget_s: seconds after which no further turn begins; each gets a turn at least.
        clock: seconds, for tests.
    """
    repeats = {name: _repeats(call, clock) for name, call in candidates.items()}
    turns: dict[str, list[float]] = {name: [] for name in candidates}
    running = list(candidates)
    end = clock() + budget_s
    for turn in range(_TURNS):
        for name in running:
            call, count = candidates[name], repeats[name]
            begin = clock()
            for _ in range(count):
                call()
            turns[name].append((clock() - begin) / count)
        if clock() >= end:
            break
        if turn + 1 >= _FEWEST:
            running = _hopeful(turns, running)
            if len(running) == 1:
                break
    return {name: _timing(seconds) for name, seconds in turns.items()}


def _repeats(call: Callable[[], object], clock: Callable[[], float]) -> int:
    call()
    begin = clock()
    call()
    return max(1, min(1000, int(_TURN_S / max(clock() - begin, 1e-9))))


def _hopeful(turns: Mapping[str, list[float]], running: list[str]) -> list[str]:
    best = min(statistics.median(turns[name]) for name in running)
    return [name for name in running if min(turns[name]) <= _HOPELESS * best]


def _timing(seconds: list[float]) -> Timing:
    kept = sorted(seconds)[: max(1, len(seconds) - len(seconds) // 4)]
    middle = statistics.median(kept)
    error = statistics.stdev(kept) / len(kept) ** 0.5 if len(kept) > 1 else 0.0
    return Timing(middle, 2 * error, len(seconds))
