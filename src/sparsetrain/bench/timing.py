"""Interleaved timing: contestants take turns, and ratios of the same round are what counts.

A shared machine changes speed by a factor of two within seconds. So nothing here compares two
times from different moments: contestants take turns within each round, and the number that
counts is the median over rounds of the ratio of two times of the same round.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

Json = dict[str, Any]


# ---------------------------------------------------------------- statistics


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics; `values` must not be empty."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> Json:
    """Median and quartiles, with the number of rounds they came from."""
    return {
        "median": quantile(values, 0.5),
        "p25": quantile(values, 0.25),
        "p75": quantile(values, 0.75),
        "rounds": len(values),
    }


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Json:
    """Spread of the per-round ratios. Both lists start at the same round of one run.

    A contestant that is too slow stops after its first rounds: the rounds of both count.
    """
    return spread([a / b for a, b in zip(numerator, denominator, strict=False)])


def decided(values: Sequence[float], limit: float) -> bool:
    """Whether the 95 % confidence interval of the median leaves `limit` out.

    The interval lies between two order statistics (of a binomial distribution, as a normal one): it
    asks nothing of how the values are distributed. Fewer than six values have none; for them it is
    their range, made three times as wide, and one value decides nothing.
    """
    ordered, count = sorted(values), len(values)
    if count < 2:
        return False
    beyond = round((count - 1.96 * math.sqrt(count)) / 2)
    if beyond < 1:
        reach = ordered[-1] - ordered[0]
        return ordered[0] - reach > limit or ordered[-1] + reach < limit
    return ordered[beyond - 1] > limit or ordered[-beyond] < limit


# ---------------------------------------------------------------- interleaved timing


@dataclass
class Turn:
    """One contestant. Its `values` get one entry per round.

    A timed contestant's value is the mean time in seconds of `inner` calls of `step`; `cpu` holds
    the same in CPU time of this process, which another process's time slices do not lengthen. A
    gauge's value is what one call of `step` returns (a ceiling, in GF/s).
    """

    name: str
    step: Callable[[], object]
    gauge: bool = False
    before: Callable[[], object] | None = None  # untimed, e.g. torch.set_num_threads
    inner: int = 1
    warm: bool = False  # one untimed call at the start of each turn
    limit: int | None = None  # takes part in the first so many rounds only
    values: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    error: str | None = None  # set when the step raised: the contestant is out from then on

    def _timed(self, inner: int) -> float:
        start = time.perf_counter()
        for _ in range(inner):
            self.step()
        return (time.perf_counter() - start) / inner

    def calibrate(self, turn_s: float, budget_s: float) -> None:
        """Warms up and chooses `inner` so that a turn lasts about `turn_s` seconds.

        Who needs more than half the budget for one step gets two rounds, not all of them.
        """
        if self.before:
            self.before()
        once = self._timed(1)
        self.limit = 2 if once > budget_s / 2 else None
        if self.gauge or once > 4 * turn_s:  # one call fills a turn, however cold it was
            return
        once = self._timed(1)
        if once < turn_s / 4:
            once = min(once, self._timed(max(1, int(turn_s / 4 / max(once, 1e-7)))))
        self.inner = max(1, round(turn_s / max(once, 1e-7)))
        self.warm = once < turn_s

    def take(self) -> None:
        """One turn of one round."""
        if self.limit is not None and len(self.values) >= self.limit:
            return
        if self.before:
            self.before()
        if self.gauge:
            self.values.append(float(self.step()))  # type: ignore[arg-type]
            return
        if self.warm:
            self.step()
        used = time.process_time()
        self.values.append(self._timed(self.inner))
        self.cpu.append((time.process_time() - used) / self.inner)


def _guarded(turn: Turn, action: Callable[[], None]) -> None:
    """Runs one action of a contestant; a raise ends this one, not the others."""
    if turn.error is None:
        try:
            action()
        except Exception as error:  # a peer may raise anything
            turn.error = f"{type(error).__name__}: {error}"


def interleave(
    turns: Sequence[Turn],
    *,
    budget_s: float,
    min_rounds: int = 5,
    max_rounds: int = 30,
    turn_s: float = 0.03,
    settle_s: float = 0.0,
    before_round: Callable[[], object] | None = None,
    still_open: Callable[[], Collection[str]] | None = None,
) -> int:
    """Times all `turns` round-robin for about `budget_s` seconds; returns the rounds done.

    Every other round runs in the opposite order, so that no contestant always follows the same
    one. `settle_s` of sleep before each turn lets the worker threads of another OpenMP runtime
    stop spinning. `before_round` is called, untimed, at the start of each round. Garbage
    collection is off meanwhile. A contestant that raises keeps `error`
    and no values.

    `still_open` is asked after that for the names of contestants about whom more is to be known:
    they alone go on, for up to `budget_s` more, and each until it is no longer named.
    """

    def take(taking: Sequence[Turn], number: int) -> None:
        if before_round:
            before_round()
        for turn in taking if number % 2 == 0 else reversed(taking):
            if settle_s:
                time.sleep(settle_s)
            _guarded(turn, turn.take)

    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in turns:
            _guarded(turn, partial(turn.calibrate, turn_s, budget_s))
        start, done = time.perf_counter(), 0
        while done < max(min_rounds, max_rounds):
            take(turns, done)
            done += 1
            if done >= min_rounds and (time.perf_counter() - start) * (1 + 1 / done) > budget_s:
                break
        start, going = time.perf_counter(), turns
        while still_open and time.perf_counter() - start < budget_s:
            named = still_open()
            going = [turn for turn in going if turn.name in named]
            if not going:
                break
            take(going, done)
            done += 1
    finally:
        if enabled:
            gc.enable()
    for turn in turns:
        if turn.error:
            turn.values.clear()
            turn.cpu.clear()
    return done
