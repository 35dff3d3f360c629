"""Everything measured about one layer on one input: all sparsities and libraries in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sparsetrain.bench import contestants
from sparsetrain.bench.ceilings import Ceilings
from sparsetrain.bench.contestants import Contestant
from sparsetrain.bench.problems import Layer, Problem, sparse_weight
from sparsetrain.bench.timing import Json, Turn, decided, interleave, ratios, spread

# Operator: how many of the three sparse products it does. Training calls the first and the last.
PRODUCTS = {"": 1, "_grad_input": 1, "_grad_values": 1, "_backward": 2}
# An idle GNU OpenMP worker spins for about 10 ms (measured), and a peer may bring a runtime.
SETTLE_S = 0.015
LEVELS_PER_ROUND = ("registers", "L2", "L3", "memory")  # L1 is taken around every kernel
PEERS = ("sparseprop", "sparselab")
OWN = ("sparsetrain",)


@dataclass(frozen=True)
class Settings:
    """How long and with whom."""

    threads: int
    budget_s: float
    min_rounds: int
    turn_s: float
    peers: bool
    tuned: bool
    forward: bool
    roofline: tuple[float, ...]  # sparsities at which the kernels alone are measured
    max_rounds: int = 30

    @property
    def settle_s(self) -> float:
        return SETTLE_S if self.threads > 1 else 0.0


@dataclass
class Cell:
    """One sparsity: the contestants that are right, and what is known of all of them."""

    sparsity: float
    nnz: int
    entries: dict[str, Json] = field(default_factory=dict)
    modules: dict[str, Contestant] = field(default_factory=dict)
    csr: Contestant | None = None

    def usable(self, name: str) -> bool:
        """Whether the contestant's results were right."""
        return self.entries.get(name, {}).get("status") == "ok"


class LayerBench:
    """The tensors and contestants of one layer, in a process with a fixed thread count."""

    def __init__(self, layer: Layer, sparsities: list[float], settings: Settings) -> None:
        self.layer, self.settings = layer, settings
        self._places = random.Random(0)
        self.problem = Problem(layer)
        self.cells = [self._cell(sparsity) for sparsity in sparsities]
        self.dense = self.cells[0].modules["dense"] if self.cells[0].usable("dense") else None
        for cell in self.cells[1:]:  # one dense layer is timed for all: its zeros cost the same
            cell.modules.pop("dense", None)

    def _cell(self, sparsity: float) -> Cell:
        layer, problem = self.layer, self.problem
        weight = sparse_weight(layer.weight_shape, sparsity)
        cell = Cell(sparsity, int((weight != 0).sum()))
        reference = problem.reference(weight)
        kinds: list[type[Contestant]] = [contestants.Dense, *contestants.OWN]
        kinds += [contestants.Tuned] if self.settings.tuned else []
        kinds += contestants.PEERS if self.settings.peers else []
        for kind in kinds:
            if layer.kind not in kind.kinds:
                continue
            found, entry = contestants.build(kind, layer, weight, problem.bias)
            if found is not None:
                entry = contestants.check(found, reference, problem)
                cell.modules[kind.name] = found
            cell.entries[kind.name] = entry
        if self.settings.peers and self.settings.forward and layer.kind == "linear":
            kind = contestants.TorchCsr
            with torch.no_grad():
                cell.csr, entry = contestants.build(kind, layer, weight, problem.bias)
            if cell.csr is not None:
                entry = contestants.check_forward(cell.csr, reference, problem)
            cell.entries[kind.name] = entry
        self._keep_better_variant(cell)
        return cell

    def _keep_better_variant(self, cell: Cell) -> None:
        """sparseprop has two convolutions; whoever is faster here stands for it."""
        variants = {name: cell.entries.pop(name) for name in list(cell.entries) if " " in name}
        if not variants:
            return
        seconds = {}
        for name, entry in variants.items():
            if entry["status"] == "ok":  # and warm: it was checked
                start = time.perf_counter()
                cell.modules[name].train_step(self.problem.x, self.problem.grad)
                seconds[name] = time.perf_counter() - start
                entry["trial_ms"] = round(1e3 * seconds[name], 3)
        best = min(seconds, key=lambda name: seconds[name]) if seconds else next(iter(variants))
        cell.entries["sparseprop"] = {**variants[best], "variant": best, "variants": variants}
        for name in variants:
            found = cell.modules.pop(name, None)
            if name == best and found is not None:
                cell.modules["sparseprop"] = found

    def move(self) -> None:
        """Gives every contestant other memory, so that no one keeps a good or a bad place.

        Where tensors lie, which decides what they drive from the caches, makes two equal layers
        differ by 2 to 4 % for as long as they stay there.
        """
        everyone = [m for cell in self.cells for m in cell.modules.values()]
        tensors = [p for contestant in everyone for p in contestant.module.parameters()]
        self._places.shuffle(tensors)
        for tensor in (self.problem.x, self.problem.grad, *tensors):
            with torch.no_grad():
                gap = torch.empty(self._places.randrange(1, 1 << 16))
                tensor.data = tensor.data.clone()
                del gap

    def _step(self, contestant: Contestant) -> Callable[[], object]:
        return lambda: contestant.train_step(self.problem.x, self.problem.grad)

    def training_turns(self) -> list[Turn]:
        """Forward + backward: dense, then every contestant that is right at every sparsity."""
        turns = [] if self.dense is None else [Turn("dense", self._step(self.dense))]
        for cell in self.cells:
            for name, module in cell.modules.items():
                if name != "dense" and cell.usable(name):
                    turns.append(Turn(_key(name, cell), self._step(module)))
        return turns

    def forward_turns(self) -> list[Turn]:
        """The forward pass alone, without autograd; the only thing torch.sparse can do."""

        def step(contestant: Contestant) -> Callable[[], object]:
            def run() -> None:
                with torch.inference_mode():
                    contestant.forward(self.problem.x)

            return run

        if not self.settings.forward:
            return []
        turns = [] if self.dense is None else [Turn("dense forward", step(self.dense))]
        for cell in self.cells:
            if cell.usable("sparsetrain"):
                own = cell.modules["sparsetrain"]
                turns.append(Turn(_key("sparsetrain forward", cell), step(own)))
            if cell.csr is not None and cell.usable("torch.sparse"):
                turns.append(Turn(_key("torch.sparse forward", cell), step(cell.csr)))
        return turns

    def kernels(self, cell: Cell) -> dict[str, Callable[[], object]]:
        """The operators of sparsetrain, called alone: no module, no autograd."""
        if not cell.usable("sparsetrain"):
            return {}
        module: Any = cell.modules["sparsetrain"].module
        x, values = self.problem.x.detach(), module.values.detach()
        bias = None if module.bias is None else module.bias.detach()
        pattern, grad = module.pattern, self.problem.grad
        place = (pattern.crow_indices, pattern.col_indices, pattern.key)
        size: Any = x.shape[1]
        window: tuple[Any, ...] = ()
        family = "linear"
        if self.layer.kind == "conv2d":
            family, size = "conv2d", list(x.shape)
            geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
            window = (*map(list, geometry), module.groups)
        ops = {name: getattr(torch.ops.sparsetrain, family + name) for name in PRODUCTS}
        has_bias = bias is not None
        calls = {
            "": (x, values, bias, *place, *window),
            "_grad_input": (grad, values, *place, size, *window),
            "_grad_values": (grad, x, *place, *window, has_bias),
            "_backward": (grad, x, values, *place, *window, has_bias),
        }
        return {family + name: _bind(ops[name], *given) for name, given in calls.items()}

    # ------------------------------------------------------------ one row per sparsity

    def _open(self, turns: list[Turn], goals: Sequence[Json]) -> set[str]:
        """Who is not yet known to reach or to miss a floor beside dense; and dense, for them."""
        values = {t.name: t.values for t in turns if t.limit is None and not t.error}
        found = {
            _key(name, cell)
            for cell, name, floor, each in self._beside_dense(values, goals)
            if not decided(each, floor)
        }
        return {"dense", *found} if found else set()

    def _take_turns(
        self, turns: list[Turn], still_open: Callable[[], set[str]] | None = None
    ) -> int:
        settings = self.settings
        return interleave(
            turns,
            budget_s=settings.budget_s,
            min_rounds=settings.min_rounds,
            max_rounds=settings.max_rounds,
            turn_s=settings.turn_s,
            settle_s=settings.settle_s,
            before_round=self.move,
            still_open=still_open,
        )

    def _beside_dense(
        self, values: Mapping[str, list[float]], goals: Sequence[Json]
    ) -> list[tuple[Cell, str, float, list[float]]]:
        """Cell, contestant, floor and ratio to dense in each round, where a floor is required."""
        dense = values.get("dense", [])
        return [
            (cell, name, goal[what]["floor"], [a / b for a, b in zip(dense, own, strict=False)])
            for cell, goal in zip(self.cells, goals, strict=True)
            for name, what in (("sparsetrain", "x_dense"), ("tuned", "x_tuned"))
            if dense and what in goal and (own := values.get(_key(name, cell)))
        ]

    def _second_look(
        self, values: Mapping[str, list[float]], goals: Sequence[Json]
    ) -> dict[float, dict[str, list[float]]]:
        """Who misses a floor beside dense is built anew and measured as long again.

        Where its tensors lie makes two layers that make the same calls differ by up to 5 %, for as
        long as they live: more rounds do not tell. Returns, by sparsity, all times of such cells,
        rounds of both looks.
        """
        missed = [
            (cell, name)
            for cell, name, floor, each in self._beside_dense(values, goals)
            if ratios(each, [1.0] * len(each))["median"] < floor
        ]
        if not missed:
            return {}
        settings = replace(self.settings, peers=False, forward=False)
        other = LayerBench(self.layer, sorted({cell.sparsity for cell, _ in missed}), settings)
        names = {"dense", *(_key(name, cell) for cell, name in missed)}
        turns = [turn for turn in other.training_turns() if turn.name in names]
        other._take_turns(turns)
        again = {turn.name: turn.values for turn in turns if turn.values}
        if "dense" not in again:
            return {}
        return {
            cell.sparsity: pooled(_of(cell, dict(values)), _of(cell, again)) for cell, _ in missed
        }

    def measure(self, ceilings: Ceilings | None, goals: Sequence[Json] = ()) -> list[Json]:
        """Times everything; one dictionary per sparsity, as it goes into the result file.

        goals: what is required at each sparsity (verdicts.targets_of). Whose ratio to dense is so
        near its floor that noise would decide gets more rounds; who misses it, a second look.
        """
        turns = self.training_turns() + self.forward_turns()
        rounds = self._take_turns(turns, (lambda: self._open(turns, goals)) if goals else None)
        values = {turn.name: turn.values for turn in turns if turn.values}
        cpu = {turn.name: turn.cpu for turn in turns if turn.cpu}
        errors = {turn.name: turn.error for turn in turns if turn.error}
        again = self._second_look(values, goals) if goals else {}
        rows = []
        for cell in self.cells:
            times = again.get(cell.sparsity, _of(cell, values))
            rows.append(self._row(cell, rounds, times, cpu, errors, ceilings))
            rows[-1]["looks"] = 2 if cell.sparsity in again else 1
        return rows

    def unmeasured(self) -> list[Json]:
        """The rows without times, for what is measured otherwise."""
        return [self._row(cell, 0, {}, {}, {}, None) for cell in self.cells]

    def _row(
        self,
        cell: Cell,
        rounds: int,
        values: dict[str, list[float]],
        cpu: dict[str, list[float]],
        errors: dict[str, str],
        ceilings: Ceilings | None,
    ) -> Json:
        for name, entry in cell.entries.items():
            if _key(name, cell) in errors:
                entry.update(status="crashed", detail=errors[_key(name, cell)])
        row: Json = {
            "layer": self.layer.name,
            "batch": self.layer.batch,
            "geometry": self.layer.describe(),
            "sparsity": cell.sparsity,
            "nnz": cell.nnz,
            "threads": self.settings.threads,
            "rounds": rounds,
            "contestants": cell.entries,
            "kernels": {},
        }
        row.update(compare(cell.entries, values))
        if self.settings.threads == 1:
            row["cpu_time"] = compare_cpu(_of(cell, cpu), row.get("best_peer"))
        if ceilings is not None and cell.sparsity in self.settings.roofline:
            row.update(self.roofline(cell, ceilings))
        return row

    def roofline(self, cell: Cell, ceilings: Ceilings) -> Json:
        """Each kernel between two bursts of the L1 ceiling, then the other ceilings."""

        def gauge(name: str, level: str) -> Turn:
            return Turn(name, lambda: ceilings.gflops(level, cpu_time=True), gauge=True)

        kernels = self.kernels(cell)
        turns = [gauge("L1 0", "L1")]
        for number, (name, step) in enumerate(kernels.items(), start=1):
            turns += [Turn(name, step), gauge(f"L1 {number}", "L1")]
        turns += [gauge(level, level) for level in LEVELS_PER_ROUND]
        settings = self.settings
        interleave(
            turns,
            budget_s=settings.budget_s / 8,
            min_rounds=settings.min_rounds,
            turn_s=settings.turn_s,
            settle_s=settings.settle_s,
        )
        values = {turn.name: turn.values for turn in turns if turn.values}
        cpu = {turn.name: turn.cpu for turn in turns if turn.cpu}
        l1 = [value for name, each in values.items() if name.startswith("L1 ") for value in each]
        levels = {level: spread(values[level]) for level in LEVELS_PER_ROUND}
        # With one thread a long kernel loses time slices to neighbours that a short burst of a
        # ceiling does not: both in CPU time then. With more threads waiting counts: wall time.
        timed = cpu if settings.threads == 1 else values
        gauges = {name: each for name, each in values.items() if name not in cpu}
        flops = self.layer.flops(cell.sparsity)
        found = kernel_results(list(kernels), timed | gauges, flops)
        return {"ceilings": {"L1": spread(l1), **levels}, "kernels": found}

    def scaling(self, ceilings: Ceilings | None, names: Sequence[str] = OWN) -> list[Json]:
        """One thread against all of them, alternating in this process (OMP_NUM_THREADS = all).

        names: the contestants that take part, besides dense and the L1 ceiling; a row per sparsity.
        torch.set_num_threads(1) leaves the other workers asleep, and both times of a ratio are
        of one round; two processes would be minutes apart.
        """
        count, turns = self.settings.threads, []

        def add(name: str, contestant: Contestant) -> None:
            step = self._step(contestant)
            for n in (1, count):
                turns.append(Turn(f"{name}@{n}", step, before=_bind(torch.set_num_threads, n)))

        if self.dense is not None:
            add("dense", self.dense)
        for cell in self.cells:
            for name in names:
                if name in cell.modules and cell.usable(name):
                    add(_key(name, cell), cell.modules[name])
        if ceilings is not None:
            for n in (1, count):
                turns.append(Turn(f"L1@{n}", _bind(ceilings.gflops, "L1", n), gauge=True))
        settings = self.settings
        interleave(
            turns,
            budget_s=settings.budget_s / 2,
            min_rounds=min(3, settings.min_rounds),
            turn_s=settings.turn_s,
            settle_s=SETTLE_S,
        )
        torch.set_num_threads(count)
        values = {turn.name: turn.values for turn in turns if turn.values}

        def ratio(name: str) -> Json | None:
            one, all_ = values.get(f"{name}@1"), values.get(f"{name}@{count}")
            return ratios(one, all_) if one and all_ else None

        machine = values.get(f"L1@{count}"), values.get("L1@1")
        l1 = ratios(machine[0], machine[1]) if machine[0] and machine[1] else None
        rows = []
        for cell in self.cells:
            found = {name: ratio(_key(name, cell)) for name in names}
            found.update(dense=ratio("dense"), l1_ceiling=l1)
            rows.append({k: v for k, v in found.items() if v})
        return rows


def _key(name: str, cell: Cell) -> str:
    return name if name.startswith("dense") else f"{name} at {cell.sparsity}"


def _of(cell: Cell, values: dict[str, list[float]]) -> dict[str, list[float]]:
    """The times that belong to one sparsity, under the contestants' plain names."""
    end = f" at {cell.sparsity}"
    dense = {name: each for name, each in values.items() if name.startswith("dense")}
    own = {name[: -len(end)]: each for name, each in values.items() if name.endswith(end)}
    return dense | own


def pooled(
    first: Mapping[str, list[float]], again: Mapping[str, list[float]]
) -> dict[str, list[float]]:
    """Times of one cell by contestant, with those of a second look at dense and some others.

    Lists stay what a ratio of two of them needs: entry i of each is of the same round, or it ends
    before.
    """
    rounds = min(len(each) for name, each in first.items() if name in again)
    return {name: each[:rounds] + again.get(name, []) for name, each in first.items()}


def _bind(function: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: function(*args)


def kernel_results(names: list[str], turns: dict[str, list[float]], flops: float) -> Json:
    """GF/s and fraction of the two L1 bursts around it, round by round, for every kernel."""
    results: Json = {}
    for number, (name, products) in enumerate(zip(names, PRODUCTS.values(), strict=True)):
        seconds = turns.get(name)
        if not seconds:
            continue
        around = zip(turns[f"L1 {number}"], turns[f"L1 {number + 1}"], strict=True)
        l1 = [(a + b) / 2 for a, b in around]
        gflops = [products * flops / s / 1e9 for s in seconds]
        results[name] = {
            "ms": spread([1e3 * s for s in seconds]),
            "gflops": spread(gflops),
            "fraction_of_l1": ratios(gflops, l1),
        }
    return results


def compare(entries: dict[str, Json], values: dict[str, list[float]]) -> Json:
    """Times of each contestant, and the per-round ratios against dense and the best peer."""
    dense = values.get("dense")
    for name, entry in entries.items():
        if values.get(name):
            entry["ms"] = spread([1e3 * s for s in values[name]])
            entry["round_ms"] = [round(1e3 * s, 4) for s in values[name]]
            if dense:
                entry["x_dense"] = ratios(dense, values[name])
    result: Json = {}
    if values.get("tuned") and values.get("sparsetrain"):
        result["tuned_gain"] = ratios(values["sparsetrain"], values["tuned"])
    forward = values.get("dense forward")
    for name in ("dense", "sparsetrain", "torch.sparse"):
        times = values.get(f"{name} forward")
        if forward and times:
            result.setdefault("forward", {})[name] = {
                "ms": spread([1e3 * s for s in times]),
                "x_dense": ratios(forward, times),
            }
    peers = [p for p in PEERS if "ms" in entries.get(p, {})]
    if peers:
        best = min(peers, key=lambda p: entries[p]["ms"]["median"])
        result["best_peer"] = best
        if values.get("sparsetrain"):
            result["x_best_peer"] = ratios(values[best], values["sparsetrain"])
    return result


def compare_cpu(cpu: dict[str, list[float]], best_peer: str | None) -> Json:
    """The two ratios that matter once more in CPU time: a check on a noisy machine."""
    own, dense = cpu.get("sparsetrain"), cpu.get("dense")
    if not own or not dense:
        return {}
    result = {"x_dense": ratios(dense, own)}
    if best_peer:
        result["x_best_peer"] = ratios(cpu[best_peer], own)
    return result
