"""Measures how each sparse layer of a model is computed fastest on this machine."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsetrain import _plan_store, conv_ops, ops
from sparsetrain._autograd import below_autograd, direct
from sparsetrain._measure import Timing, compare
from sparsetrain._plan_store import Entry
from sparsetrain._planner import DIRECTIONS, Planner, Problem

__all__ = ["Plans", "Row", "load_plans", "tune"]

_PLANNERS = (ops.PLANNER, conv_ops.PLANNER)
_SHARE = 0.02  # a challenger must win by this, and by more than the noise
_LONGEST_S = 1.0  # for the candidates of one product
_CLOSE = 1.3  # what takes so many times as long in parts does not win as a whole step
_NEAR = 1.05  # the same where no product finds anything of another's

_Call = Callable[[], object]
_Way = tuple[str, ...]  # a family for each direction
# What is timed by default; tests replace it.
Compare = Callable[[Mapping[str, _Call], float], Mapping[str, Timing]]


class Row(NamedTuple):
    """One product of one layer: what was chosen, and what the others took.

    Attributes:
        layers: names of the layers that are alike.
        direction: "forward", "grad_input", "grad_values", or "step": all three, in the ways that
            were to be compared.
        sizes: of the input, and of the output's units.
        density: share of weights that are nonzeros.
        chosen: the family; three for a "step" that mixes them.
        default: what the cost model would have taken.
        seconds: of each candidate.
        noise: seconds that a figure may be off.
        measured: False where the budget was spent before, so that the default stays.
    """

    layers: tuple[str, ...]
    direction: str
    sizes: str
    density: float
    chosen: str
    default: str
    seconds: Mapping[str, float]
    noise: float
    measured: bool

    @property
    def gains(self) -> dict[str, float]:
        """How many times as fast as each other candidate the chosen one is."""
        own = self.seconds.get(self.chosen)
        if own is None:
            return {}
        return {name: s / own for name, s in self.seconds.items() if name != self.chosen}


class Plans:
    """What `tune` found. Made plans are in use in this process already."""

    def __init__(self, entries: Mapping[str, Entry], rows: Iterable[Row] = ()) -> None:
        self.entries = dict(entries)
        self.rows = list(rows)

    def __repr__(self) -> str:
        return f"Plans({len(self.entries)} products)"

    def use(self) -> None:
        """Layers of this process are computed as these plans say, from their next call on."""
        _plan_store.learn(self.entries)
        for planner in _PLANNERS:
            planner.forget()

    def save(self, path: str | Path) -> None:
        """Writes the plans to a JSON file, to ship with a model for the same kind of machine.

        Raises:
            OSError: the file cannot be written; an older one stays as it was.
        """
        _plan_store.write(Path(path), self.entries)

    def explain(self) -> str:
        """A table: layer, direction, what was chosen, and what it beat by how much."""
        head = ("layer", "product", "input -> units", "density", "chosen", "beats", "time")
        lines = [head, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        lines.insert(1, tuple("-" * width for width in widths))
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    @staticmethod
    def _cells(row: Row) -> tuple[str, ...]:
        first, *others = row.layers
        layer = first + (f" (+{len(others)} alike)" if others else "")
        beats = ", ".join(f"{name} {gain:.2f}x" for name, gain in row.gains.items())
        own = row.seconds.get(row.chosen)
        return (
            layer,
            row.direction,
            row.sizes,
            f"{row.density:.1%}",
            row.chosen + ("" if row.chosen == row.default else " *"),
            beats if row.measured else "not measured: no time left",
            "" if own is None else f"{own * 1e6:.0f} us +- {row.noise * 1e6:.0f}",
        )


def load_plans(path: str | Path) -> Plans:
    """Reads what `Plans.save` wrote and uses it in this process.

    Plans for other machines, thread counts or sizes in it do no harm: they are never asked for.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or of another version of sparsetrain or torch.
    """
    plans = Plans(_plan_store.read(Path(path)))
    plans.use()
    return plans


def tune(
    model: nn.Module,
    *example_inputs: Any,
    budget_s: float = 60.0,
    cache: bool | str | Path = True,
    progress: bool = True,
    compare: Compare = compare,
    **example_kwargs: Any,
) -> Plans:
    """Measures the candidates for every sparse layer and uses the fastest ones from then on.

    One forward pass, without gradients and with the model as it is, shows the shapes that the
    layers meet. Each direction of each of them is then timed on its own, on random numbers of these
    shapes, layers that are alike once; then all three, one after the other, in the ways that come
    into question, and the fastest step counts. What the cost model chose gives way only to what is
    faster by 2 % and by more than the noise. The number of threads is that of now: tune with the
    number that you train with. Values, gradients and state_dict are as before; results differ by
    rounding.

    Args:
        model: a module that holds sparse layers.
        example_inputs, example_kwargs: what `model` is called with; the batch size counts.
        budget_s: seconds that the measurements may take; what is left unmeasured keeps its default.
        cache: True keeps the result in the user's cache, where every later process finds it; a path
            keeps it there, False nowhere.
        progress: a progress bar on standard error, where rich is installed.
        compare: what times candidates, see `_measure.compare`.

    Returns:
        The plans, in use already.

    Raises:
        TypeError: `model` is no module.
        ValueError: no sparse layer was computed, or budget_s is not positive.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; tune takes a torch.nn.Module.")
    if not budget_s > 0:
        raise ValueError(f"budget_s must be a positive number of seconds, got {budget_s!r}")
    jobs = _capture(model, example_inputs, example_kwargs)
    if not jobs:
        raise ValueError(
            "no sparse layer was computed when the model was called with the example inputs; "
            "make layers sparse first, for instance with sparsetrain.sparsify(model, 0.9)."
        )
    entries, rows = _measure_all(jobs, budget_s, progress, compare)
    plans = Plans(entries, rows)
    plans.use()
    _keep(entries, cache)
    return plans


class _Job(NamedTuple):
    """The layers that share one problem, and the pattern of the first of them."""

    planner: Planner
    problem: Problem
    pattern: tuple[Tensor, Tensor, Tensor]
    names: list[str]


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Job]:
    """The problems that one forward pass of `model` meets, in order."""
    jobs: dict[str, _Job] = {}
    names: list[str] = []

    def observe(planner: Planner, problem: Problem, pattern: tuple[Tensor, Tensor, Tensor]) -> None:
        job = jobs.setdefault(
            planner.store_key("forward", problem), _Job(planner, problem, pattern, [])
        )
        name = names[-1] if names else "(a function call)"
        if name not in job.names:
            job.names.append(name)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if not list(module.children()):
                stack.enter_context(_named(module, name or type(module).__name__, names))
        for planner in _PLANNERS:
            stack.enter_context(_observing(planner, observe))
        stack.enter_context(torch.no_grad())
        model(*args, **kwargs)
    return list(jobs.values())


@contextmanager
def _named(module: nn.Module, name: str, names: list[str]) -> Any:
    """Inside, `names` ends with `name` while `module` is called."""

    def before(*_: Any) -> None:
        names.append(name)

    def after(*_: Any) -> None:
        names.pop()

    hooks = (
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _observing(planner: Planner, observe: Any) -> Any:
    before, planner.observer = planner.observer, observe
    try:
        yield
    finally:
        planner.observer = before


class _Timer:
    """Compares, and shares out the budget between the comparisons to come."""

    def __init__(self, compare: Compare, budget_s: float, comparisons: int) -> None:
        self.compare = compare
        self.end = time.perf_counter() + budget_s
        self.to_come = comparisons

    @property
    def left_s(self) -> float:
        return self.end - time.perf_counter()

    def __call__(self, calls: Mapping[str, _Call]) -> Mapping[str, Timing]:
        with torch.no_grad(), below_autograd():
            return self._compared(calls)

    def steps(self, calls: Mapping[str, _Call]) -> Mapping[str, Timing]:
        """As above, with autograd."""
        with torch.enable_grad():
            return self._compared(calls)

    def _compared(self, calls: Mapping[str, _Call]) -> Mapping[str, Timing]:
        share = min(_LONGEST_S, self.left_s / self.to_come)
        self.to_come -= 1
        if share <= 0 or not calls:
            return {}
        return self.compare(calls, share)


def _measure_all(
    jobs: list[_Job], budget_s: float, progress: bool, compare: Compare
) -> tuple[dict[str, Entry], list[Row]]:
    entries: dict[str, Entry] = {}
    rows: list[Row] = []
    timed = _Timer(compare, budget_s, len(jobs) * (len(DIRECTIONS) + 1))
    for job in _tracked(jobs, progress):
        defaults = tuple(job.planner.estimate(d, *job.problem).family for d in DIRECTIONS)
        found, steps = _measure(job, defaults, timed)
        for direction, default, entry in zip(DIRECTIONS, defaults, found, strict=True):
            rows.append(_row(job, direction, default, entry))
            if entry.seconds:
                entries[job.planner.store_key(direction, job.problem)] = entry
        if steps.seconds:
            rows.append(_row(job, "step", _name(defaults), steps))
    return entries, rows


def _measure(job: _Job, defaults: _Way, timed: _Timer) -> tuple[list[Entry], Entry]:
    """What is chosen for each direction, and what was found of all three together."""
    if timed.left_s <= 0:
        return [_entry({}, default) for default in defaults], _entry({}, "")
    inputs = _inputs(job)
    found = []
    for direction, default in zip(DIRECTIONS, defaults, strict=True):
        calls = {family: _call(job, inputs, direction, family) for family in _families(job)}
        found.append(_entry(timed(calls), default))
    ways = _ways(found, defaults)
    calls = {name: _step_call(job, inputs, way) for name, way in ways.items()}
    steps = _entry(timed.steps(calls), _name(defaults))
    if steps.seconds:
        chosen = zip(found, ways[steps.family], strict=True)
        found = [entry._replace(family=family) for entry, family in chosen]
    return found, steps


def _entry(timings: Mapping[str, Timing], default: str) -> Entry:
    """The fastest, if it beats the default by more than noise."""
    seconds = {name: timing.seconds for name, timing in timings.items()}
    noise = max((timing.noise for timing in timings.values()), default=0.0)
    if default not in timings:
        return Entry(default, 0, seconds, noise)
    best = min(timings, key=lambda name: timings[name].seconds)
    won = timings[default].seconds - timings[best].seconds
    both = timings[default].noise + timings[best].noise
    wins = won > both and won > _SHARE * timings[best].seconds
    return Entry(best if wins else default, 0, seconds, noise)


def _families(job: _Job) -> list[str]:
    """Those that compute such a layer."""
    geometry = job.problem.geometry
    deep = bool(geometry) and len(geometry[0]) == 3
    skipped = "native" if deep else "unfolded"
    return [family for family in job.planner.families if family != skipped]


def _name(way: _Way) -> str:
    return way[0] if len(set(way)) == 1 else " + ".join(way)


def _ways(found: Sequence[Entry], default: _Way) -> dict[str, _Way]:
    """Ways to compute a step that are to be compared, by name; none if one clearly wins.

    Alone and over and over, a product finds in the caches what it does not find in a step, and one
    family may compute both gradients in one pass.
    """
    if not all(entry.seconds for entry in found):
        return {}
    best = tuple(entry.family for entry in found)
    families = list(found[0].seconds)
    alone = {
        way: sum(entry.seconds[family] for entry, family in zip(found, way, strict=True))
        for way in itertools.product(families, repeat=len(found))
    }
    kin = {best, *((best[0], family, family) for family in families)}
    kin.update((family,) * len(best) for family in families)
    least = min(alone.values())
    close = [way for way, s in alone.items() if s <= (_CLOSE if way in kin else _NEAR) * least]
    if len(close) == 1:
        return {}
    return {_name(way): way for way in alone if way in close or way == default}


class _Inputs(NamedTuple):
    """What the products of a job are measured on: random numbers."""

    x: Tensor
    values: Tensor
    bias: Tensor
    grad: Tensor
    size: Any  # what grad_input is told of x's shape


def _inputs(job: _Job) -> _Inputs:
    planner, problem, *_ = job
    out = planner.shapes.output(problem.x_shape, problem.rows, problem.geometry)
    source = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(problem.dtype)

    return _Inputs(
        numbers(*problem.x_shape),
        numbers(problem.nnz),
        numbers(problem.rows),
        numbers(*out),
        planner.shapes.size(problem.x_shape),
    )


def _call(job: _Job, inputs: _Inputs, direction: str, family: str) -> _Call:
    x, values, bias, grad, size = inputs
    pattern, geometry = job.pattern, job.problem.geometry
    arguments: dict[str, tuple[Any, ...]] = {
        "forward": (x, values, bias, *pattern, *geometry),
        "grad_input": (grad, values, *pattern, size, *geometry),
        "grad_values": (grad, x, *pattern, *geometry, True),
    }
    index = DIRECTIONS.index(direction)
    return partial(direct(job.planner.families[family][index]), *arguments[direction])


def _step_call(job: _Job, inputs: _Inputs, way: _Way) -> _Call:
    """A training step of the layer, as a plan that names these families computes it."""
    planner, (x, values, bias, grad, _) = job.planner, inputs
    plan = planner.plan_of(job.problem, way)
    leaves = [t.detach().requires_grad_() for t in (x, values, bias)]

    def recorded() -> None:
        assert plan.route is not None
        y = planner.routed(plan.route.number, *leaves, *job.pattern)
        torch.autograd.grad(y, leaves, grad)

    def unrecorded() -> None:
        with torch.no_grad(), below_autograd():
            plan.forward(x, values, bias, *job.pattern, *job.problem.geometry)
            plan.backward(grad, x, values, *job.pattern, *job.problem.geometry, True)

    return recorded if plan.route is not None else unrecorded


def _row(job: _Job, direction: str, default: str, entry: Entry) -> Row:
    problem = job.problem
    shapes = job.planner.shapes
    weights = math.prod(shapes.weight(problem.x_shape, problem.rows, problem.geometry))
    return Row(
        tuple(job.names),
        direction,
        f"{'x'.join(map(str, problem.x_shape))} -> {problem.rows}",
        problem.nnz / weights if weights else 0.0,
        entry.family,
        default,
        entry.seconds,
        entry.noise,
        bool(entry.seconds),
    )


def _tracked(jobs: list[_Job], progress: bool) -> Iterable[_Job]:
    if not progress:
        return jobs
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return jobs
    return track(jobs, "measuring layers", console=Console(stderr=True), transient=True)


def _keep(entries: Mapping[str, Entry], cache: bool | str | Path) -> None:
    if cache is False:
        return
    path = _plan_store.cache_path() if cache is True else Path(cache)
    if path is not None:
        _plan_store.update(path, entries)
    elif cache is True and not _plan_store.switched_off():
        warnings.warn(
            "plans are not kept for later processes: install sparsetrain[cli] (platformdirs), or "
            "name a file: tune(..., cache='plans.json').",
            stacklevel=3,
        )
