"""Sparse linear layers against dense and against the other libraries: time, roofline, scaling.

    python benchmarks/linear.py [--quick] [--threads 1 2] [--peers] [--json out.json]

Everything a training step does is timed: packing, bias, autograd, gradients allocated anew.
Each thread count runs in a process of its own, since OpenMP reads OMP_NUM_THREADS at its start.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _tables
from _harness import (
    HERE,
    Json,
    OtherLoad,
    Turn,
    child_result_file,
    environment,
    interleave,
    load_toml,
    ratios,
    run_with_threads,
    spread,
    write_json,
)

if TYPE_CHECKING:
    from _ceilings import Ceilings
    from _contestants import Contestant

# Operator: how many of the three sparse products it does. Training calls the first and the last.
KERNELS = {"linear": 1, "linear_grad_input": 1, "linear_grad_values": 1, "linear_backward": 2}
# An idle GNU OpenMP worker spins for about 10 ms (measured), and a peer may bring a runtime.
SETTLE_S = 0.015
LEVELS_PER_ROUND = ("registers", "L2", "L3", "memory")  # L1 is taken around every kernel


@dataclass(frozen=True)
class Case:
    """One layer at one sparsity."""

    name: str
    in_features: int
    out_features: int
    batch: int
    sparsity: float
    targets: str | None = None  # a table of the shapes file; None: measured without a target

    @property
    def flops(self) -> float:
        """Useful flops of one of the three products: 2 per nonzero and sample."""
        total = self.in_features * self.out_features
        return 2.0 * self.batch * max(1, round((1 - self.sparsity) * total))


def cases(shapes: Json, args: argparse.Namespace) -> list[Case]:
    """Every layer at every sparsity asked for."""
    named = shapes["quick_sparsities"] if args.quick else shapes["sparsities"]
    found = []
    for layer in shapes["layer"]:
        if args.layers and layer["name"] not in args.layers:
            continue
        fields = {k: layer[k] for k in ("name", "in_features", "out_features", "batch")}
        extra = [] if args.quick else shapes.get("break_even_sparsities", [])
        for sparsity in sorted(set(args.sparsity or [*named, *extra])):
            known = sparsity in shapes["sparsities"]
            found.append(
                Case(**fields, sparsity=sparsity, targets=layer.get("targets") if known else None)
            )
    return found


def targets_of(case: Case, shapes: Json) -> Json:
    """{"x_dense": {"floor", "aim"}, "x_best_peer": ...}, empty without targets."""
    if case.targets is None:
        return {}
    place = shapes["sparsities"].index(case.sparsity)
    tables = {"x_dense": case.targets, "x_best_peer": "best_peer"}
    return {
        what: {kind: shapes["targets"][table][kind][place] for kind in ("floor", "aim")}
        for what, table in tables.items()
    }


# ---------------------------------------------------------------- one case


class Bench:
    """The tensors and contestants of one case, in a process with a fixed thread count."""

    def __init__(self, case: Case, threads: int, peers: bool) -> None:
        import torch
        from _contestants import OWN, PEERS, Reference, TorchCsr, build, sparse_weight

        self.case, self.threads = case, threads
        torch.manual_seed(1)
        self.weight = sparse_weight(case.out_features, case.in_features, case.sparsity)
        self.nnz = int((self.weight != 0).sum())
        bias = torch.randn(case.out_features)
        self.x = torch.randn(case.batch, case.in_features, requires_grad=True)
        self.grad = torch.randn(case.batch, case.out_features)
        reference = Reference(self.weight, bias, self.x, self.grad)
        self.entries: dict[str, Json] = {}
        self.layers = {}
        for kind in (*OWN, *(PEERS if peers and case.targets else ())):
            layer, entry = build(kind, self.weight, bias)
            if layer is not None:
                entry = reference.check(layer, self.x, self.grad)
                self.layers[kind.name] = layer
            self.entries[kind.name] = entry
        self.csr = None
        if peers and case.targets:
            with torch.no_grad():
                self.csr, entry = build(TorchCsr, self.weight, bias)
                if self.csr is not None:
                    entry = reference.check_forward(self.csr, self.x)
            self.entries[TorchCsr.name] = entry

    def usable(self, name: str) -> bool:
        """Whether the contestant's results were right."""
        return self.entries.get(name, {}).get("status") == "ok"

    def training_turns(self) -> list[Turn]:
        """Forward + backward of every contestant that gives right results."""
        turns = []
        for name, layer in self.layers.items():
            if self.usable(name):
                step = _bind(layer.train_step, self.x, self.grad)
                turns.append(Turn(name, step))
        return turns

    def forward_turns(self) -> list[Turn]:
        """The forward pass alone, without autograd; the only thing torch.sparse can do."""
        import torch

        def step(layer: Contestant) -> Callable[[], object]:
            def run() -> None:
                with torch.inference_mode():
                    layer.forward(self.x)

            return run

        names = [name for name in ("dense", "sparsetrain") if self.usable(name)]
        turns = [Turn(f"{name} forward", step(self.layers[name])) for name in names]
        if self.csr is not None and self.usable("torch.sparse"):
            turns.append(Turn("torch.sparse forward", step(self.csr)))
        return turns

    def kernels(self) -> dict[str, Callable[[], object]]:
        """The operators of sparsetrain (keys: KERNELS) called alone: no module, no autograd."""
        import torch

        if not self.usable("sparsetrain"):
            return {}
        layer: Any = self.layers["sparsetrain"].layer
        x, values, bias = self.x.detach(), layer.values.detach(), layer.bias.detach()
        crow, col = layer.pattern.crow_indices, layer.pattern.col_indices
        key, width, ops = layer.pattern.key, self.case.in_features, torch.ops.sparsetrain
        return {
            "linear": lambda: ops.linear(x, values, bias, crow, col, key),
            "linear_grad_input": lambda: ops.linear_grad_input(
                self.grad, values, crow, col, key, width
            ),
            "linear_grad_values": lambda: ops.linear_grad_values(
                self.grad, x, crow, col, key, True
            ),
            "linear_backward": lambda: ops.linear_backward(
                self.grad, x, values, crow, col, key, True
            ),
        }


def _bind(function: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: function(*args)


def roofline_turns(bench: Bench, ceilings: Ceilings) -> list[Turn]:
    """Each kernel between two bursts of the L1 ceiling, then the other ceilings."""

    def gauge(name: str, level: str) -> Turn:
        return Turn(name, lambda: ceilings.gflops(level, cpu_time=True), gauge=True)

    turns = [gauge("L1 0", "L1")]
    for number, (name, step) in enumerate(bench.kernels().items(), start=1):
        turns += [Turn(name, step), gauge(f"L1 {number}", "L1")]
    return turns + [gauge(level, level) for level in LEVELS_PER_ROUND]


def kernel_results(turns: dict[str, list[float]], flops: float) -> Json:
    """GF/s and fraction of the two L1 bursts around it, round by round, for every kernel."""
    results: Json = {}
    for number, (name, products) in enumerate(KERNELS.items()):
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


def scaling(bench: Bench, ceilings: Ceilings, args: argparse.Namespace) -> Json:
    """One thread against all of them, alternating in this process (OMP_NUM_THREADS = all)."""
    import torch

    turns = []
    for name in ("sparsetrain", "dense"):
        for count in (1, bench.threads):
            if bench.usable(name):
                step = _bind(bench.layers[name].train_step, bench.x, bench.grad)
                turns.append(Turn(f"{name}@{count}", step, before=_set_threads(count)))
    for count in (1, bench.threads):
        step = _bind(ceilings.gflops, "L1", count)
        turns.append(Turn(f"L1@{count}", step, gauge=True))
    budget = args.budget / 2
    interleave(turns, budget_s=budget, min_rounds=3, turn_s=args.turn, settle_s=SETTLE_S)
    torch.set_num_threads(bench.threads)
    values = {turn.name: turn.values for turn in turns}
    result = {
        name: ratios(values[f"{name}@1"], values[f"{name}@{bench.threads}"])
        for name in ("sparsetrain", "dense")
        if values.get(f"{name}@1") and values.get(f"{name}@{bench.threads}")
    }
    # What the machine itself gives: neighbours, shared caches and sibling threads included.
    result["l1_ceiling"] = ratios(values[f"L1@{bench.threads}"], values["L1@1"])
    return result


def _set_threads(count: int) -> Callable[[], object]:
    import torch

    return lambda: torch.set_num_threads(count)


def measure(case: Case, ceilings: Ceilings, shapes: Json, args: argparse.Namespace) -> Json:
    """Everything about one case; a dictionary that goes into the JSON file as it is."""
    threads = args.child_threads
    bench = Bench(case, threads, args.peers)
    turns = bench.training_turns() + bench.forward_turns() + roofline_turns(bench, ceilings)
    with OtherLoad() as load:
        rounds = interleave(
            turns,
            budget_s=args.budget,
            min_rounds=args.min_rounds,
            turn_s=args.turn,
            settle_s=SETTLE_S if threads > 1 else 0.0,
        )
    values = {turn.name: turn.values for turn in turns if turn.values}
    cpu = {turn.name: turn.cpu for turn in turns if turn.cpu}
    for turn in turns:
        if turn.error and turn.name in bench.entries:
            bench.entries[turn.name] = {"status": "crashed", "detail": turn.error}
    row: Json = {
        "layer": case.name,
        "in_features": case.in_features,
        "out_features": case.out_features,
        "batch": case.batch,
        "sparsity": case.sparsity,
        "nnz": bench.nnz,
        "threads": threads,
        "rounds": rounds,
        "other_load_cpus": load.cpus,
        "targets": targets_of(case, shapes),
        "contestants": bench.entries,
    }
    row.update(_compare(bench.entries, values))
    l1 = [value for name, each in values.items() if name.startswith("L1 ") for value in each]
    levels = {level: spread(values[level]) for level in LEVELS_PER_ROUND}
    row["ceilings"] = {"L1": spread(l1), **levels}
    # With one thread a long kernel loses time slices to neighbours that a short burst of a ceiling
    # does not: both in CPU time then. With more threads waiting for each other counts: wall time.
    gauges = {name: each for name, each in values.items() if name not in cpu}
    row["kernels"] = kernel_results((cpu if threads == 1 else values) | gauges, case.flops)
    if threads == 1:
        row["cpu_time"] = _compare_cpu(cpu, row.get("best_peer"))
    if threads > 1:
        row["scaling"] = scaling(bench, ceilings, args)
    return row


def _compare(entries: dict[str, Json], values: dict[str, list[float]]) -> Json:
    """Times of each contestant, and the per-round ratios against dense and the best peer."""
    for name, entry in entries.items():
        if values.get(name):
            entry["ms"] = spread([1e3 * s for s in values[name]])
            entry["round_ms"] = [round(1e3 * s, 4) for s in values[name]]
            entry["x_dense"] = ratios(values["dense"], values[name])
    result: Json = {"forward": {}}
    dense = values.get("dense forward")
    for name in ("dense", "sparsetrain", "torch.sparse"):
        times = values.get(f"{name} forward")
        if dense and times:
            result["forward"][name] = {
                "ms": spread([1e3 * s for s in times]),
                "x_dense": ratios(dense, times),
            }
    peers = [p for p in ("sparseprop", "sparselab") if "ms" in entries.get(p, {})]
    if peers:
        best = min(peers, key=lambda p: entries[p]["ms"]["median"])
        result["best_peer"] = best
        if values.get("sparsetrain"):
            result["x_best_peer"] = ratios(values[best], values["sparsetrain"])
    return result


def _compare_cpu(cpu: dict[str, list[float]], best_peer: str | None) -> Json:
    """The two ratios that matter once more in CPU time: a check on a noisy machine."""
    own = cpu.get("sparsetrain")
    if not own:
        return {}
    result = {"x_dense": ratios(cpu["dense"], own)}
    if best_peer:
        result["x_best_peer"] = ratios(cpu[best_peer], own)
    return result


def measure_tiny(shapes: Json, args: argparse.Namespace) -> Json:
    """A layer so small that only the overhead of the calls is left."""
    tiny = shapes["tiny"]
    fields = {k: tiny[k] for k in ("name", "in_features", "out_features", "batch", "sparsity")}
    bench = Bench(Case(**fields), args.child_threads, peers=False)
    turns = bench.training_turns() + bench.forward_turns()
    interleave(turns, budget_s=args.budget, min_rounds=9, turn_s=min(args.turn, 0.02))
    values = {turn.name: turn.values for turn in turns if turn.values}
    result: Json = {**fields, "threads": args.child_threads, "contestants": bench.entries}
    for kind, suffix in (("training", ""), ("forward", " forward")):
        ours, dense = values.get("sparsetrain" + suffix), values.get("dense" + suffix)
        if dense:
            result[f"{kind}_dense_us"] = spread([1e6 * s for s in dense])
        if ours and dense:
            result[f"{kind}_us"] = spread([1e6 * s for s in ours])
            result[f"{kind}_x_dense_time"] = ratios(ours, dense)
    return result


# ---------------------------------------------------------------- processes


def child(args: argparse.Namespace, result_file: Path) -> None:
    """Measures every case with the thread count this process was started with."""
    import torch
    from _ceilings import Ceilings

    threads = args.child_threads = torch.get_num_threads()
    shapes = load_toml(args.shapes)
    ceilings = Ceilings(threads)
    result: Json = {"threads": threads, "environment": environment(), "rows": []}
    result["ceiling_bytes"] = ceilings.bytes
    result["vector_bits"] = ceilings.vector_bits
    todo = cases(shapes, args)
    start = time.perf_counter()
    for number, case in enumerate(todo, start=1):
        row = measure(case, ceilings, shapes, args)
        result["rows"].append(row)
        clock = f"{time.perf_counter() - start:5.0f} s"
        head = f"[{threads} thread(s), {number}/{len(todo)}, {clock}]"
        print(head, _tables.one_line(row), file=sys.stderr, flush=True)
    result["tiny"] = measure_tiny(shapes, args)
    result["seconds"] = round(time.perf_counter() - start, 1)
    write_json(result_file, result)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--quick` sets the budget unless it is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="fewer sparsities and rounds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--peers", action="store_true", help="sparseprop, sparselab, torch.sparse")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="draw speedup against sparsity into this PNG")
    parser.add_argument("--shapes", type=Path, default=HERE / "shapes" / "linear.toml")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="only these layers")
    parser.add_argument("--sparsity", type=float, nargs="+", metavar="S", help="only these")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="measuring time per row")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a floor is missed")
    args = parser.parse_args(argv)
    if min(args.threads) < 1:
        parser.error(f"--threads: got {min(args.threads)}, must be at least 1")
    for sparsity in args.sparsity or []:
        if not 0 <= sparsity < 1:
            parser.error(f"--sparsity: got {sparsity}, must be in [0, 1), e.g. 0.9")
    args.budget = args.budget or (2.0 if args.quick else 5.0)
    args.min_rounds = 3 if args.quick else 5
    args.turn = 0.01 if args.quick else 0.03
    return args


def command_line() -> str:
    """This run's command, without the machine's folders."""
    names = [Path(a).name if "/" in a else a for a in sys.argv[1:]]
    return " ".join(["python benchmarks/linear.py", *names])


def main() -> int:
    args = parse()
    result_file = child_result_file()
    if result_file is not None:
        child(args, result_file)
        return 0
    shapes = load_toml(args.shapes)
    runs = [run_with_threads(threads) for threads in args.threads]
    data: Json = {
        "benchmark": "linear",
        "command": command_line(),
        "limits": shapes["limits"],
        "runs": runs,
    }
    data["verdicts"] = _tables.verdicts(data)
    if args.json:
        write_json(args.json, data)
    if args.plot:
        from _plots import plot_speedup  # matplotlib only where a plot is asked for

        plot_speedup(data, args.plot)
    print(_tables.linear_report(data))
    missed = [v for v in data["verdicts"] if v["verdict"] == "MISSED"]
    wrong = _tables.wrong_results(data)
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong or (args.strict and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
