"""Whole training steps: forward, loss, backward, SGD with momentum; sparse against dense.

All contestants take turns in one process per thread count. Weights are random with zeros at random
places, the same for every contestant; what a step costs depends on where they are, not on what.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.bench import model_zoo, verdicts
from sparsetrain.bench.contestants import can_tune
from sparsetrain.bench.machine import OtherLoad, environment
from sparsetrain.bench.model_profile import profile_step
from sparsetrain.bench.model_tables import one_line
from sparsetrain.bench.model_zoo import Network
from sparsetrain.bench.processes import (
    SHAPES,
    both_commands,
    command_line,
    load_toml,
    read_json,
    run_child,
    write_json,
)
from sparsetrain.bench.timing import Json, Turn, interleave, ratios, spread

# Relative errors (Euclidean) against the masked dense model in float32: rounding in another order,
# through all layers. A wrong layer gives 0.1 and more.
LOGIT_ERROR, GRADIENT_ERROR = 1e-3, 1e-2


@dataclass(frozen=True)
class Options:
    """What the command line says; None leaves the choice to the shapes file."""

    models: tuple[str, ...] = ()
    shapes: Path | None = None
    sparsities: tuple[float, ...] = ()
    threads: tuple[int, ...] = (1, 2)
    peers: bool = False
    tuned: bool = False
    quick: bool = False
    budget_s: float | None = None
    json: Path | None = None
    resume: bool = False
    keep_memory: bool = False


# ---------------------------------------------------------------- contestants


def mask_layers(network: Network, sparsity: float) -> nn.Module:
    """A copy of the dense model with zeros where the sparse ones have nothing."""
    model = deepcopy(network.model)
    generator = torch.Generator().manual_seed(0)
    for _, layer in sparse_layers(model, network.dense_layers):
        weight: Any = layer.weight
        keep = torch.zeros(weight.numel(), dtype=torch.bool)
        count = max(1, round((1 - sparsity) * weight.numel()))
        keep[torch.randperm(weight.numel(), generator=generator)[:count]] = True
        with torch.no_grad():
            weight.mul_(keep.view_as(weight))
    return model


def sparse_layers(model: nn.Module, dense: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """(name, layer) of every linear layer and convolution that becomes sparse."""
    kinds = (nn.Linear, nn.Conv2d)
    return [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) and n not in dense]


def _ours(network: Network, masked: nn.Module) -> nn.Module:
    import sparsetrain

    return sparsetrain.to_sparse(deepcopy(masked), exclude=list(network.dense_layers))


def _tuned(network: Network, masked: nn.Module) -> nn.Module:
    import sparsetrain

    if not can_tune():
        raise ImportError("this sparsetrain has no sparsetrain.tune")
    model = _ours(network, masked)
    tune: Any = sparsetrain.tune  # type: ignore[attr-defined,unused-ignore]
    tune(model, network.inputs, budget_s=60.0)
    return model


def _sparseprop(network: Network, masked: nn.Module) -> nn.Module:
    from sparseprop.utils import swap_modules_with_sparse

    model = deepcopy(masked)
    part = network.sparse_part(model)
    names = {name for name, _ in part.named_modules()}
    skip = ",".join(name for name in network.dense_layers if name in names) or None
    with contextlib.redirect_stdout(io.StringIO()):
        swapped = swap_modules_with_sparse(
            part, network.part_input, inplace=True, skip_modules=skip
        )
    assert swapped is part
    return model


CONTESTANTS: dict[str, Callable[[Network, nn.Module], nn.Module]] = {
    "sparsetrain": _ours,
    "tuned": _tuned,
    "sparseprop": _sparseprop,
}


class Step:
    """One training step of one model, with its own optimizer."""

    def __init__(self, network: Network, model: nn.Module) -> None:
        self.network, self.model = network, model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(self.network.loss(self.model))
        self.optimizer.step()


def signature(network: Network, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits, and gradients of the layers that are dense everywhere; dropout is off."""
    model.eval()
    model.zero_grad()
    logits = network.logits(model)
    torch.autograd.backward(nn.functional.cross_entropy(logits, network.labels))
    layers = dict(model.named_modules())
    weights: list[Any] = [layers[name].weight for name in network.dense_layers]
    gradients = torch.cat([weight.grad.flatten() for weight in weights])
    model.train()
    model.zero_grad()
    return logits.detach(), gradients


def check(network: Network, model: nn.Module, expected: tuple[Tensor, Tensor]) -> Json:
    """{"status": ok, wrong or crashed}, with the relative errors."""
    try:
        got = signature(network, model)
    except Exception as error:
        return {"status": "crashed", "detail": f"{type(error).__name__}: {error}"}
    errors = [
        float((g - e).norm() / e.norm().clamp_min(1e-30))
        for g, e in zip(got, expected, strict=True)
    ]
    found = {"logits": float(f"{errors[0]:.3g}"), "gradients": float(f"{errors[1]:.3g}")}
    if not (errors[0] <= LOGIT_ERROR and errors[1] <= GRADIENT_ERROR):
        return {"status": "wrong", "detail": f"relative errors {found}"}
    return {"status": "ok", "relative_errors": found}


# ---------------------------------------------------------------- in the child


def child(request: Json, save: Callable[[Json], None]) -> Json:
    """Every model with the thread count this process was started with."""
    threads = torch.get_num_threads()
    result: Json = {"threads": threads, "environment": environment(), "rows": [], "profiles": []}
    start = time.perf_counter()
    for number, item in enumerate(request["models"], start=1):
        with OtherLoad() as load:
            rows, profiles = measure_model(item, request, threads)
        for row in rows:
            row["other_load_cpus"] = load.cpus
            head = f"[{threads} thread(s), {number}/{len(request['models'])}"
            clock = f"{time.perf_counter() - start:5.0f} s]"
            print(f"{head}, {clock} {one_line(row)}", file=sys.stderr, flush=True)
        result["rows"] += rows
        result["profiles"] += profiles
        result["seconds"] = round(time.perf_counter() - start, 1)
        save(result)
    return result


def measure_model(item: Json, request: Json, threads: int) -> tuple[list[Json], list[Json]]:
    """One model at all sparsities: rows, and the profiles of a dense and a sparse step."""
    fields = {k: item[k] for k in ("name", "batch", "size", "tokens") if k in item}
    network = model_zoo.build(**fields)
    names = ["sparsetrain", *(["tuned"] if request["tuned"] else [])]
    names += ["sparseprop"] if request["peers"] else []
    steps: dict[str, Step] = {"dense": Step(network, mask_layers(network, 0.0))}
    rows = []
    for sparsity in request["sparsities"]:
        masked = mask_layers(network, sparsity)
        expected = signature(network, masked)
        entries: dict[str, Json] = {"dense": {"status": "ok"}}
        for name in names:
            try:
                model = CONTESTANTS[name](network, masked)
            except ImportError as error:
                entries[name] = {"status": "absent", "detail": str(error)}
            except Exception as error:
                entries[name] = {"status": "crashed", "detail": f"{type(error).__name__}: {error}"}
            else:
                entries[name] = check(network, model, expected)
                if entries[name]["status"] == "ok":
                    steps[f"{name} at {sparsity}"] = Step(network, model)
        goal = verdicts.targets_of(item.get("targets"), sparsity, request["shapes"])
        row: Json = {"model": network.name, "title": network.title, "sparsity": sparsity}
        row.update(threads=threads, targets=goal, contestants=entries, fields=fields)
        rows.append(row)
    turns = [Turn(name, step) for name, step in steps.items()]
    budget, rounds = request["budget_s"], request["min_rounds"]
    done = interleave(turns, budget_s=budget, min_rounds=rounds, turn_s=1e-4)
    _compare(rows, turns, done)
    profiles = []
    at = request["profile_sparsity"]
    for name in ("dense", f"sparsetrain at {at}"):
        if name in steps and threads == 1:
            kinds, total = profile_step(steps[name])
            entry: Json = {"model": network.name, "title": network.title, "threads": threads}
            entry.update(step=name.split(" at ")[0], sparsity=at, seconds=total, kinds=kinds)
            profiles.append(entry)
    return rows, profiles


def _compare(rows: list[Json], turns: list[Turn], rounds: int) -> None:
    """Puts times and ratios into the rows."""
    values = {turn.name: turn.values for turn in turns if turn.values}
    errors = {turn.name: turn.error for turn in turns if turn.error}
    for row in rows:
        row["rounds"] = rounds
        mine: dict[str, list[float]] = {}
        for name, entry in row["contestants"].items():
            key = name if name == "dense" else f"{name} at {row['sparsity']}"
            if key in errors:
                entry.update(status="crashed", detail=errors[key])
            if key in values:
                mine[name] = values[key]
                entry["ms"] = spread([1e3 * s for s in values[key]])
                entry["round_ms"] = [round(1e3 * s, 2) for s in values[key]]
                entry["x_dense"] = ratios(values["dense"], values[key])
        if "sparseprop" in mine and "sparsetrain" in mine:
            row["best_peer"] = "sparseprop"
            row["x_best_peer"] = ratios(mine["sparseprop"], mine["sparsetrain"])


# ---------------------------------------------------------------- in the parent


def run(options: Options) -> Json:
    """Measures in one process per thread count and model; what goes into the result file.

    With `resume`, models that `json` already holds are kept and not measured again.
    """
    shapes = load_toml(options.shapes or SHAPES / "training.toml")
    data: Json = {"benchmark": "models", "command": command_line(), "limits": {}, "runs": []}
    if options.resume and options.json is not None and options.json.exists():
        earlier_file = read_json(options.json)
        data["runs"] = earlier_file["runs"]
        data["command"] = both_commands(earlier_file["command"], data["command"])
    todo = _models(shapes, options)
    for threads in options.threads:
        for item in todo:
            _measure_into(data, item, shapes, threads, options)
    data["verdicts"] = model_verdicts(data)
    return data


def _models(shapes: Json, options: Options) -> list[Json]:
    known = [item["name"] for item in shapes["model"]]
    for name in options.models:
        if name not in known:
            raise ValueError(f"--models: got {name!r}, takes {', '.join(known)}")
    wanted = options.models or (shapes["quick_models"] if options.quick else known)
    found = [item for item in shapes["model"] if item["name"] in wanted]
    quick = [{**item, **item.get("quick", {})} for item in found] if options.quick else found
    return [{k: v for k, v in item.items() if k != "quick"} for item in quick]


def _measure_into(data: Json, item: Json, shapes: Json, threads: int, options: Options) -> None:
    """One model in a process of its own: what it measured is added to its thread count's run."""
    earlier = next((r for r in data["runs"] if r["threads"] == threads), None)
    if earlier and any(row["model"] == item["name"] for row in earlier["rows"]):
        return
    named = shapes["quick_sparsities"] if options.quick else shapes["sparsities"]
    budget = shapes["quick_budget_s"] if options.quick else shapes["budget_s"]
    request = {
        "models": [item],
        "shapes": {"targets": shapes.get("targets", {}), "sparsities": shapes["sparsities"]},
        "sparsities": sorted(options.sparsities or named),
        "profile_sparsity": shapes["profile_sparsity"],
        "peers": options.peers,
        "tuned": options.tuned,
        "budget_s": options.budget_s or budget,
        "keep_memory": options.keep_memory,
        "min_rounds": 2 if options.quick else shapes["min_rounds"],
    }
    found = run_child("sparsetrain.bench.models", request, threads)
    if earlier is None:
        data["runs"].append(found)
    else:
        for key in ("rows", "profiles"):
            earlier[key] += found[key]
        earlier["seconds"] += found["seconds"]
    data["verdicts"] = model_verdicts(data)
    if options.json is not None:
        write_json(options.json, data)


def model_verdicts(data: Json) -> list[Json]:
    """Every requirement of the shapes file with what was measured for it."""
    found = []
    for run_ in data["runs"]:
        for row in run_["rows"]:
            own = row["contestants"].get("sparsetrain", {}).get("x_dense")
            for what, goal in row["targets"].items():
                measured = own if what == "x_dense" else row.get("x_best_peer")
                if what == "x_dense" or "best_peer" in row:
                    title = "whole step, x " + ("dense" if what == "x_dense" else "sparseprop")
                    found.append(verdicts.verdict(title, row["title"], row, measured, goal))
    return found
