"""Single layers against dense and against the other libraries: time, roofline, scaling.

Everything a training step does is timed: packing, bias, autograd, gradients allocated anew.
Each thread count runs in a process of its own, since OpenMP reads OMP_NUM_THREADS at its start.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.bench import verdicts
from sparsetrain.bench.layer_tables import one_line
from sparsetrain.bench.machine import OtherLoad, environment
from sparsetrain.bench.processes import (
    SHAPES,
    both_commands,
    command_line,
    load_toml,
    read_json,
    run_child,
    write_json,
)
from sparsetrain.bench.timing import Json, spread

SETS = ("linear", "conv", "models")  # of layers that come with the package


@dataclass(frozen=True)
class Options:
    """What the command line says; None leaves the choice to the shapes file."""

    set: str = "linear"
    shapes: Path | None = None
    layers: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    sparsities: tuple[float, ...] = ()
    threads: tuple[int, ...] = (1, 2)
    peers: bool = False
    tuned: bool = False
    quick: bool = False
    budget_s: float | None = None
    time_limit_s: float | None = None
    json: Path | None = None
    resume: bool = False
    keep_memory: bool = False
    scaling_only: bool = False  # nothing but one thread against all
    kernels: bool = False  # each kernel alone at every sparsity, not at those of the limits


def load_shapes(options: Options) -> Json:
    """The shapes file named, or the set that comes with the package."""
    if options.shapes is not None:
        return load_toml(options.shapes)
    if options.set not in SETS:
        raise ValueError(f"--set: got {options.set!r}, takes one of {', '.join(SETS)}")
    shapes = load_toml(SHAPES / f"{options.set}.toml")
    if options.set == "models":
        from sparsetrain.bench.model_layers import model_layers

        shapes["layer"] = model_layers(shapes["models"], shapes["batches"])
    return shapes


def groups(shapes: Json, options: Options) -> list[Json]:
    """Every layer on every batch: {"layer": table, "sparsities": [...], "peers", "targets"}."""
    named = shapes["quick_sparsities"] if options.quick else shapes["sparsities"]
    found: list[Json] = []
    for table in shapes["layer"]:
        layer = {**shapes.get("defaults", {}), **table}
        if options.layers and not any(name in layer["name"] for name in options.layers):
            continue
        crossing = layer["name"] in shapes.get("break_even_layers", [layer["name"]])
        extra = shapes.get("break_even_sparsities", []) if crossing and not options.quick else []
        asked = sorted(set(options.sparsities or [*named, *extra]))
        found.append({"layer": layer, "sparsities": asked, "peers": options.peers})
        small = {} if options.quick else shapes.get("small", {})
        for batch in small.get("batches", ()):
            fewer = {**layer, "batch": batch, "targets": small["targets"]}
            wanted = list(options.sparsities or small["sparsities"])
            found.append({"layer": fewer, "sparsities": wanted, "peers": False})
    found = [g for g in found if not options.batches or g["layer"]["batch"] in options.batches]
    if not found:
        names = ", ".join(sorted({table["name"] for table in shapes["layer"]}))
        raise ValueError(f"no layer is left to measure; --layers takes parts of: {names}")
    return found


def _request(shapes: Json, options: Options, threads: int, done: set[Any]) -> Json:
    budget = shapes["quick_budget_s"] if options.quick else shapes["budget_s"]
    limits = shapes.get("limits", {})
    todo = [g for g in groups(shapes, options) if _identity(g["layer"], threads) not in done]
    return {
        "groups": todo,
        "targets": shapes.get("targets", {}),
        "sparsities": shapes["sparsities"],
        "roofline": _roofline(todo, limits, options, threads),
        "tiny": None if options.scaling_only else shapes.get("tiny"),
        "scaling_only": options.scaling_only,
        "forward": shapes.get("forward", False),
        "tuned": options.tuned,
        "budget_s": options.budget_s or budget,
        "min_rounds": 2 if options.quick else shapes.get("min_rounds", 3),
        "turn_s": 0.01 if options.quick else 0.03,
        "time_limit_s": options.time_limit_s,
        "keep_memory": options.keep_memory,
    }


def _roofline(todo: list[Json], limits: Json, options: Options, threads: int) -> list[float]:
    """Sparsities at which the kernels alone are measured."""
    if options.kernels:
        return sorted({s for group in todo for s in group["sparsities"]})
    if threads not in limits.get("roofline_threads", [threads]):
        return []
    return list(limits.get("roofline_sparsities", []))


def _identity(layer: Json, threads: int) -> tuple[str, int, int]:
    """What tells one group of a result file from another."""
    return (str(layer.get("layer", layer.get("name"))), layer["batch"], threads)


# ---------------------------------------------------------------- in the child


def child(request: Json, save: Callable[[Json], None]) -> Json:
    """Measures every group with the thread count this process was started with."""
    import torch

    from sparsetrain.bench.ceilings import Ceilings

    threads = torch.get_num_threads()
    result: Json = {"threads": threads, "environment": environment(), "rows": [], "seconds": 0.0}
    try:
        ceilings = Ceilings(threads)
        result["ceiling_bytes"] = ceilings.bytes
        result["vector_bits"] = ceilings.vector_bits
    except RuntimeError as error:
        ceilings = None
        print(f"without ceilings: {error}", file=sys.stderr, flush=True)
    start, todo = time.perf_counter(), request["groups"]
    limit = request["time_limit_s"] or float("inf")
    for number, group in enumerate(todo, start=1):
        if time.perf_counter() - start > limit:
            result["left_out"] = len(todo) - number + 1
            break
        rows = measure_group(group, request, threads, ceilings)
        result["rows"] += rows
        result["seconds"] = round(time.perf_counter() - start, 1)
        head = f"[{threads} thread(s), {number}/{len(todo)}, {result['seconds']:5.0f} s]"
        for row in rows:
            print(head, one_line(row), file=sys.stderr, flush=True)
        save(result)
    if ceilings is not None:
        result["ceilings"] = {level: _ceiling(ceilings, level) for level in ceilings.bytes}
    if request["tiny"]:
        result["tiny"] = measure_tiny(request, threads)
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def _ceiling(ceilings: Any, level: str) -> Json:
    return spread([ceilings.gflops(level, cpu_time=True) for _ in range(5)])


def measure_group(group: Json, request: Json, threads: int, ceilings: Any) -> list[Json]:
    """One layer at all its sparsities: a list of rows."""
    from sparsetrain.bench.layer_bench import OWN, PEERS, LayerBench, Settings
    from sparsetrain.bench.problems import layer_from

    layer = layer_from(group["layer"])
    # Steps of few samples are short: many short turns tell more than a few long ones.
    small = layer.batch <= 8
    settings = Settings(
        threads,
        request["budget_s"] / (8 if small else 1),
        request["min_rounds"],
        min(request["turn_s"], 0.01) if small else request["turn_s"],
        group["peers"],
        request["tuned"],
        request["forward"],
        tuple(request["roofline"]),
        90 if small else 30,
    )
    goals = [verdicts.targets_of(layer.targets, s, request) for s in group["sparsities"]]
    with OtherLoad() as load:
        bench = LayerBench(layer, group["sparsities"], settings)
        rows = bench.unmeasured() if request["scaling_only"] else bench.measure(ceilings, goals)
    for row, goal in zip(rows, goals, strict=True):
        row["other_load_cpus"] = load.cpus
        row["targets"] = goal
    if threads > 1 and (not small or request["scaling_only"]):
        names = ("sparsetrain", *PEERS) if request["scaling_only"] else OWN
        for row, scaling in zip(rows, bench.scaling(ceilings, names), strict=True):
            row["scaling"] = scaling
    return rows


def measure_tiny(request: Json, threads: int) -> Json:
    """A layer so small that only the overhead of the calls is left."""
    from sparsetrain.bench.layer_bench import LayerBench, Settings
    from sparsetrain.bench.problems import layer_from
    from sparsetrain.bench.timing import interleave, ratios

    table = dict(request["tiny"])
    sparsity = table.pop("sparsity")
    layer = layer_from(table)
    settings = Settings(threads, 2.0, 9, 0.01, False, False, True, ())
    bench = LayerBench(layer, [sparsity], settings)
    turns = bench.training_turns() + bench.forward_turns()
    interleave(turns, budget_s=min(3.0, request["budget_s"]), min_rounds=9, turn_s=0.01)
    values = {turn.name.split(" at ")[0]: turn.values for turn in turns if turn.values}
    result: Json = {"name": layer.name, "batch": layer.batch, "sparsity": sparsity}
    result.update(threads=threads, contestants=bench.cells[0].entries)
    for kind, suffix in (("training", ""), ("forward", " forward")):
        ours, dense = values.get("sparsetrain" + suffix), values.get("dense" + suffix)
        if dense:
            result[f"{kind}_dense_us"] = spread([1e6 * s for s in dense])
        if ours and dense:
            result[f"{kind}_us"] = spread([1e6 * s for s in ours])
            result[f"{kind}_x_dense_time"] = ratios(ours, dense)
    return result


# ---------------------------------------------------------------- in the parent


def run(options: Options) -> Json:
    """Measures in one process per thread count; what goes into the result file.

    With `resume`, rows that `json` already holds are kept and not measured again.
    """
    shapes = load_shapes(options)
    data: Json = {
        "benchmark": "threads" if options.scaling_only else "layers",
        "set": options.set if options.shapes is None else options.shapes.stem,
        "command": command_line(),
        "limits": shapes.get("limits", {}),
        "runs": [],
    }
    if options.resume and options.json is not None and options.json.exists():
        earlier_file = read_json(options.json)
        data["runs"] = earlier_file["runs"]
        data["command"] = both_commands(earlier_file["command"], data["command"])
    for threads in options.threads:
        earlier = next((r for r in data["runs"] if r["threads"] == threads), None)
        done = {_identity(row, threads) for row in (earlier or {"rows": []})["rows"]}
        request = _request(shapes, options, threads, done)
        if not request["groups"]:
            continue
        run_ = run_child("sparsetrain.bench.layers", request, threads)
        if earlier is not None:
            run_["rows"] = earlier["rows"] + run_["rows"]
            run_["seconds"] += earlier["seconds"]
            data["runs"].remove(earlier)
        data["runs"].append(run_)
        data["verdicts"] = verdicts.layer_verdicts(data)
        if options.json is not None:
            write_json(options.json, data)
    data["verdicts"] = verdicts.layer_verdicts(data)
    return data
