"""When a sparse-training algorithm acts, and how much: frozen dataclasses, shared by all of them.

A schedule answers two questions about step t, the number of optimizer steps done (1, 2, ...):

    due(t)    whether the algorithm acts after that step
    value(t)  how much: the share of weights to replace (Constant, Cosine), the share of the way to
              the final sparsity (Cubic), or 1 for dense and 0 for sparse (Periodic)

One that ends has a `stop`, after which nothing is due, and `every`, the steps between updates:
Top-KAST and MEST (soft) bring a layer down to its goal there.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Constant", "Cosine", "Cubic", "Never", "Periodic", "Schedule", "WarmUp"]


class Schedule(Protocol):
    """What an algorithm asks of a schedule."""

    def due(self, step: int) -> bool: ...

    def value(self, step: int) -> float: ...


@dataclass(frozen=True)
class Never:
    """No step is due: the topology stays as it is."""

    def due(self, step: int) -> bool:
        return False

    def value(self, step: int) -> float:
        return 0.0


@dataclass(frozen=True)
class Constant:
    """The same share of weights every time (Mocanu et al. 2018).

    Attributes:
        drop_fraction: share of a layer's weights to replace, in (0, 1].
        every: steps between updates.
        start: the first update comes `every` steps after it.
        stop: no update after this step; None for none at all.
    """

    drop_fraction: float = 0.3
    every: int = 100
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        _check_share(self.drop_fraction, "drop_fraction")
        _check_times(self.every, self.start, self.stop)
        if self.stop is not None and self.start + self.every > self.stop:
            raise _ends_before_it_starts(self.start + self.every, self.every, self.stop)

    def due(self, step: int) -> bool:
        return _due(step, self.every, self.start, self.stop)

    def value(self, step: int) -> float:
        return self.drop_fraction


@dataclass(frozen=True)
class Cosine:
    """From `drop_fraction` down to zero along half a cosine (Dettmers & Zettlemoyer 2019; RigL).

    Attributes:
        drop_fraction: share of a layer's weights to replace at `start`, in (0, 1].
        every: steps between updates.
        stop: where the share reaches zero; no update from there on.
        start: the first update comes `every` steps after it.
    """

    drop_fraction: float = 0.3
    every: int = 100
    stop: int = 7500
    start: int = 0

    def __post_init__(self) -> None:
        _check_share(self.drop_fraction, "drop_fraction")
        _check_times(self.every, self.start, self.stop)
        if self.start + self.every >= self.stop:
            raise _ends_before_it_starts(self.start + self.every, self.every, self.stop)

    def due(self, step: int) -> bool:
        return step < self.stop and _due(step, self.every, self.start, self.stop)

    def value(self, step: int) -> float:
        done = _progress(step, self.start, self.stop)
        return self.drop_fraction * (1.0 + math.cos(math.pi * done)) / 2.0


@dataclass(frozen=True)
class Cubic:
    """The share of the way to the final sparsity: 1 - (1 - progress)^3 (Zhu & Gupta 2017).

    Fast while redundancy is plenty, slow towards the end.

    Attributes:
        every: steps between updates.
        stop: where the final sparsity is reached; always an update.
        start: up to which nothing is pruned.
    """

    every: int = 100
    stop: int = 7500
    start: int = 0

    def __post_init__(self) -> None:
        _check_times(self.every, self.start, self.stop)

    def due(self, step: int) -> bool:
        return step == self.stop or _due(step, self.every, self.start, self.stop)

    def value(self, step: int) -> float:
        return 1.0 - (1.0 - _progress(step, self.start, self.stop)) ** 3


@dataclass(frozen=True)
class Periodic:
    """Dense and sparse phases in turn, beginning dense (AC/DC, Peste et al. 2021).

    Attributes:
        warmup: steps of the first dense phase.
        dense: steps of each later dense phase.
        sparse: steps of each sparse phase.
        stop: from here on sparse for good, unless a sparse phase began before; None alternates for
            ever.
    """

    warmup: int = 1000
    dense: int = 500
    sparse: int = 500
    stop: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "dense", "sparse"):
            _check_count(getattr(self, name), name, 1)
        if self.stop is not None:
            _check_count(self.stop, "stop", 1)
            if self.stop < self.warmup:
                raise ValueError(
                    f"stop = {self.stop} lies before the end of the first dense phase, warmup = "
                    f"{self.warmup}: the schedule would end before it starts"
                )

    def due(self, step: int) -> bool:
        return step >= 1 and self.value(step) != self.value(step - 1)

    def value(self, step: int) -> float:
        if step < self.warmup:
            return 1.0
        if self.stop is not None and step >= self.stop:
            return 0.0
        return float((step - self.warmup) % (self.dense + self.sparse) >= self.sparse)


@dataclass(frozen=True)
class WarmUp:
    """Another schedule whose value rises linearly from zero over the first `steps`.

    Attributes:
        schedule: any of the above that gives a share.
        steps: how long it takes to reach the full value.
    """

    schedule: Schedule
    steps: int = 500

    def __post_init__(self) -> None:
        _check_count(self.steps, "steps", 1)
        if not (hasattr(self.schedule, "due") and hasattr(self.schedule, "value")):
            raise TypeError(f"schedule must have due and value; got {self.schedule!r}")
        if self.stop is not None and self.stop <= self.steps:
            raise ValueError(
                f"steps = {self.steps} reaches or passes the schedule's stop = {self.stop}: "
                "it would never be at full value"
            )

    @property
    def stop(self) -> int | None:
        return getattr(self.schedule, "stop", None)

    @property
    def every(self) -> int | None:
        return getattr(self.schedule, "every", None)

    def due(self, step: int) -> bool:
        return self.schedule.due(step)

    def value(self, step: int) -> float:
        return self.schedule.value(step) * min(1.0, step / self.steps)


def check_schedule(schedule: Any) -> Schedule:
    """`schedule`, if it can be asked what a schedule is asked; raises TypeError otherwise."""
    if isinstance(schedule, type) or not (
        callable(getattr(schedule, "due", None)) and callable(getattr(schedule, "value", None))
    ):
        raise TypeError(
            "schedule must be one of sparsetrain.schedules, or have the methods due(step) and "
            f"value(step); got {schedule!r}"
        )
    checked: Schedule = schedule
    return checked


def _due(step: int, every: int, start: int, stop: int | None) -> bool:
    return step > start and (step - start) % every == 0 and (stop is None or step <= stop)


def _progress(step: int, start: int, stop: int) -> float:
    return min(1.0, max(0.0, (step - start) / (stop - start)))


def _check_share(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in (0, 1]; got {value!r}")
    if not 0.0 < float(value) <= 1.0:
        raise ValueError(f"{name} must be in (0, 1]; got {value!r}")


def _check_count(value: Any, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer of at least {least}; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value!r}")


def _ends_before_it_starts(first: int, every: int, stop: int) -> ValueError:
    return ValueError(
        f"every = {every} puts the first update at step {first}, but stop = {stop} leaves none: "
        "the schedule would end before it starts; lower every or raise stop"
    )


def _check_times(every: Any, start: Any, stop: Any) -> None:
    _check_count(every, "every", 1)
    _check_count(start, "start", 0)
    if stop is None:
        return
    _check_count(stop, "stop", 0)
    if stop <= start:
        raise ValueError(
            f"stop = {stop} must come after start = {start}: the schedule would end before it "
            "starts"
        )
