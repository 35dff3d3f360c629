"""Fits the cost model of linear layers to this machine, and tells how well it chooses.

OMP_NUM_THREADS=1 python benchmarks/fit_linear_costs.py measure one.json
OMP_NUM_THREADS=2 python benchmarks/fit_linear_costs.py measure two.json
python benchmarks/fit_linear_costs.py check one.json two.json
python benchmarks/fit_linear_costs.py fit one.json two.json

`measure` times both families of each product of 7 layers on 10 batches at 8 sparsities, 2 minutes.
`check` compares what the model in use chooses with what was faster. `fit` prints constants for
src/sparsetrain/_linear_choice.py and checks them; it needs scipy, which the environment of
benchmarks/setup_peers.sh has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import sparsetrain
from sparsetrain import _linear_choice as model
from sparsetrain._planner import DIRECTIONS, Direction
from sparsetrain.bench.tables import table

LAYERS = ((64, 64), (384, 384), (384, 1536), (768, 768), (768, 3072), (3072, 768), (2048, 1000))
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 0.9, 0.95)
LAYER_S = 0.25  # seconds for the three products of a layer
SLOWER = 1.10  # than dense, which no layer should be by more
# Errors count where the families are near each other: e times less at this ratio of their times.
NEAR = 1.5

Row = dict[str, Any]


def measure(path: Path) -> None:
    """Times everything, with the number of threads of this process."""
    torch.manual_seed(0)
    rows: list[Row] = []
    cases = list(itertools.product(LAYERS, BATCHES, SPARSITIES))
    for (inputs, outputs), batch, sparsity in track(cases, "measuring layers"):
        layer = sparsetrain.nn.SparseLinear(inputs, outputs, sparsity=sparsity)
        x = torch.randn(batch, inputs)
        plans = sparsetrain.tune(layer, x, budget_s=LAYER_S, cache=False, progress=False)
        sizes = (batch, inputs, outputs, layer.values.numel())
        threads = torch.get_num_threads()
        rows += [
            {"sizes": sizes, "threads": threads, "direction": r.direction, "seconds": r.seconds}
            for r in plans.rows
            if len(r.seconds) == 2
        ]
    path.write_text(json.dumps(rows), encoding="utf-8")


def problem_of(row: Row) -> model.LinearProblem:
    return model.LinearProblem(*row["sizes"], torch.float32, row["threads"])


def check(rows: Iterable[Row], kind: model._Costs | None = None) -> str:
    """How much the choices cost, and every layer that they make too slow."""
    layers: dict[Any, dict[str, tuple[float, float]]] = defaultdict(dict)
    regrets = []
    for row in rows:
        estimates = model.costs(row["direction"], problem_of(row), kind)
        family = "dense" if estimates["dense"] < estimates["native"] else "native"
        chosen, dense = row["seconds"][family], row["seconds"]["dense"]
        regrets.append(math.log(chosen / min(row["seconds"].values())))
        layers[(*row["sizes"], row["threads"])][row["direction"]] = (chosen, dense)
    slow = []
    whole = {key: products for key, products in layers.items() if len(products) == len(DIRECTIONS)}
    for key, products in whole.items():
        ratio = sum(c for c, _ in products.values()) / sum(d for _, d in products.values())
        if ratio > SLOWER:
            slow.append([*map(str, key), f"{ratio:.2f}"])
    lost = 100 * (math.exp(sum(regrets) / len(regrets)) - 1)
    return (
        f"{len(regrets)} products, choices cost {lost:.2f} % (geometric mean); "
        f"{len(slow)} of {len(whole)} layers take more than {SLOWER:.2f} times dense's time:\n\n"
        + table(["batch", "inputs", "outputs", "nonzeros", "threads", "x dense's time"], slow)
    )


def fit(rows: list[Row]) -> model._Costs:
    """Constants that predict the times, above all where the families are near each other."""
    native, few, dense, shares = {}, {}, {}, []
    for direction in DIRECTIONS:
        some = [row for row in rows if row["direction"] == direction]
        *constants, bits, samples, share = fitted(some, direction, "native")
        native[direction] = model._Native(*constants)
        few[direction] = (bits, samples)
        *constants, dense_share = fitted(some, direction, "dense")
        dense[direction] = model._Dense(*constants)
        shares.append((share, dense_share))
    mean = [sum(part) / len(part) for part in zip(*shares, strict=True)]
    return model._Costs(native, few, dense, *mean)


def fitted(rows: list[Row], direction: Direction, family: str) -> list[float]:
    """The constants of one family, and the share of further threads."""
    import numpy as np
    from scipy.optimize import least_squares

    problems = [problem_of(row) for row in rows]
    seconds = np.array([row["seconds"][family] for row in rows])
    ratios = [row["seconds"]["dense"] / row["seconds"]["native"] for row in rows]
    weights = np.exp(-np.abs(np.log(ratios)) / math.log(NEAR)) + 0.05

    def begin(kind: model._Costs) -> Any:
        if family == "native":
            first = [*kind.native[direction], *kind.few[direction], kind.native_share]
        else:
            first = [*kind.dense[direction], kind.dense_share]
        return np.log(np.maximum(first, 1e-3))

    def kind_of(values: Any) -> model._Costs:
        start = model._WHOLE
        if family == "native":
            own = {direction: model._Native(*values[:-3])}
            return start._replace(
                native=own, few={direction: values[-3:-1]}, native_share=values[-1]
            )
        return start._replace(dense={direction: model._Dense(*values[:-1])}, dense_share=values[-1])

    def errors(logarithms: Any) -> Any:
        costs = kind_of(np.exp(logarithms))
        predicted = [model.costs(direction, problem, costs)[family] for problem in problems]
        return weights * np.log(np.array(predicted) / 1e9 / seconds)

    # From each kind of CPU in turn: which of its two ways the native family takes has two minima.
    found = [
        least_squares(errors, begin(kind), loss="soft_l1", f_scale=0.1, max_nfev=200)
        for kind in model._KINDS.values()
    ]
    best = min(found, key=lambda one: float(one.cost))
    return [float(f"{value:.2g}") for value in np.exp(best.x)]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "check", "fit"))
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "measure":
        if len(arguments.files) != 1:
            parser.error("measure writes one file")
        return measure(arguments.files[0])
    rows = [row for path in arguments.files for row in json.loads(path.read_text("utf-8"))]
    kind = fit(rows) if arguments.what == "fit" else None
    if kind:
        print(kind, end="\n\n")
    print(check(rows, kind))


if __name__ == "__main__":
    main()
