"""What the machine itself gives: the ceilings, and how they and the layers grow with threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsetrain.bench import layers
from sparsetrain.bench.layer_tables import kernel_table
from sparsetrain.bench.layers import Options
from sparsetrain.bench.machine import OtherLoad, environment
from sparsetrain.bench.processes import command_line, run_child, write_json
from sparsetrain.bench.tables import environment_lines, markdown, table, threads_name, with_spread
from sparsetrain.bench.timing import Json, spread

DENSE = "dense product, 1024 x 1024 x 1024"


def child(request: Json, save: Callable[[Json], None]) -> Json:
    """Bursts at every level in turn, with the thread count this process was started with."""
    from sparsetrain.bench.ceilings import LEVELS, Ceilings

    threads = request["threads"]
    ceilings = Ceilings(threads)
    values: dict[str, list[float]] = {level: [] for level in LEVELS}
    if request["peers"]:
        values[DENSE] = []
    with OtherLoad() as load:
        for _ in range(request["rounds"]):
            for level in LEVELS:
                values[level].append(ceilings.gflops(level, cpu_time=threads == 1))
            if request["peers"]:
                values[DENSE].append(dense_gflops())
    return {
        "threads": threads,
        "environment": environment(),
        "other_load_cpus": load.cpus,
        "ceiling_bytes": {level: ceilings.bytes.get(level, 0) for level in values},
        "vector_bits": ceilings.vector_bits,
        "ceilings": {level: spread(each) for level, each in values.items()},
    }


def dense_gflops(size: int = 1024) -> float:
    """What the library's product of two square float32 matrices reaches now."""
    import torch

    a, b = torch.ones(size, size), torch.ones(size, size)
    torch.mm(a, b)
    start = time.perf_counter()
    torch.mm(a, b)
    return 2e-9 * size**3 / (time.perf_counter() - start)


def run(
    threads: Sequence[int],
    rounds: int,
    json: Path | None,
    peers: bool = False,
    kernels: Options | None = None,
) -> Json:
    """The ceilings at every thread count; with `peers` the dense library's product beside them.

    kernels: layers whose kernels are measured against the L1 ceiling. Raises RuntimeError without a
    compiler, ValueError where `kernels` names no layer.
    """
    from sparsetrain.bench.ceilings import build

    build()  # here, so that a missing compiler is said once and plainly
    if kernels is not None:
        layers.groups(layers.load_shapes(kernels), kernels)  # raises before anything is measured
    data: Json = {"benchmark": "ceilings", "command": command_line(), "runs": []}
    for count in threads:
        request = {"threads": count, "rounds": rounds, "peers": peers}
        data["runs"].append(run_child("sparsetrain.bench.machine_bench", request, count))
    if kernels is not None:
        data["layers"] = layers.run(kernels)
    if json is not None:
        write_json(json, data)
    return data


def ceilings_report(data: Json) -> str:
    """The ceilings as Markdown: a row per level, a column per thread count."""
    runs = data["runs"]
    rows = []
    for level, size in runs[0]["ceiling_bytes"].items():
        cells = [level, f"{size >> 10} KiB" if size else "-"]
        rows.append(cells + [with_spread(run["ceilings"][level]) for run in runs])
    header = ["multiply-adds from", "buffer per thread"]
    header += [f"GF/s, {threads_name(run['threads'])}" for run in runs]
    loads = ", ".join(f"{run['other_load_cpus']:g}" for run in runs)
    machine = environment_lines(runs[0]["environment"])
    machine += f"\n- vectors of {runs[0]['vector_bits']} bits; CPUs kept busy by others: {loads}"
    sections = [("Machine", machine), ("Ceilings", table(header, rows))]
    for run in data.get("layers", {"runs": []})["runs"]:
        heading = f"Kernels alone against the L1 ceiling, {threads_name(run['threads'])}"
        sections.append((heading, kernel_table(run) or "none: these layers are computed densely"))
    return markdown(sections, data["command"])
