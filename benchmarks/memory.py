"""Memory of a sparse linear layer in training: resident bytes per nonzero, peak of a step.

    python benchmarks/memory.py [--quick] [--json out.json]

Three independent views: the tensors and the plan are added up exactly; the resident set of a
process that holds one big layer is read before and after; what backward keeps is listed by
`torch.autograd.graph.saved_tensors_hooks` and confirmed by the peak of the resident set.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _tables
from _harness import (
    HERE,
    Json,
    child_result_file,
    environment,
    load_toml,
    run_with_threads,
    write_json,
)

LIMIT = 20.0  # bytes per nonzero: values, gradient, pattern and plan
_TASK = "SPARSETRAIN_MEMORY_TASK"  # what the re-executed process measures


# ---------------------------------------------------------------- exact accounting


def reachable_tensors(thing: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Every tensor held by an object of ours: attributes, slots, lists, tuples, dictionaries."""
    import torch

    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
        if thing.grad is not None:
            yield thing.grad
        return
    inner: list[Any] = []
    if isinstance(thing, dict):
        inner = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        inner = list(thing)
    elif type(thing).__module__.startswith("sparsetrain"):
        inner = list(getattr(thing, "__dict__", {}).values())
        slots = [s for kind in type(thing).__mro__ for s in getattr(kind, "__slots__", ())]
        inner += [getattr(thing, slot) for slot in slots if hasattr(thing, slot)]
    for item in inner:
        yield from reachable_tensors(item, seen)


def storage_bytes(tensors: Iterator[Any]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def account(name: str, width: int, out: int, sparsity: float, batch: int = 64) -> Json:
    """One layer after a training step, part by part. Bias and its gradient are not counted."""
    import torch

    from sparsetrain import SparsePattern
    from sparsetrain.nn import SparseLinear

    pattern = SparsePattern.random((out, width), sparsity, seed=0)
    layer: Any = SparseLinear(width, out, pattern=pattern)
    x = torch.randn(batch, width, requires_grad=True)
    layer(x).sum().backward()
    bias = layer.bias.numel() * layer.bias.element_size() * 2
    parts = {
        "values": layer.values.untyped_storage().nbytes(),
        "gradient": layer.values.grad.untyped_storage().nbytes(),
        "pattern": storage_bytes(reachable_tensors(pattern)),
        "plan": int(torch.ops.sparsetrain.plan_bytes(pattern.key)),
    }
    held = storage_bytes(reachable_tensors(layer)) - bias
    parts["other tensors"] = held - parts["values"] - parts["gradient"] - parts["pattern"]
    total = sum(parts.values())
    return {
        "layer": name,
        "sparsity": sparsity,
        "nnz": pattern.nnz,
        "bytes": parts,
        "bytes_per_nonzero": {k: v / pattern.nnz for k, v in parts.items()},
        "total_per_nonzero": total / pattern.nnz,
        "verdict": "met" if total <= LIMIT * pattern.nnz else "MISSED",
    }


# ---------------------------------------------------------------- resident set


def resident() -> int:
    """Bytes of this process in memory now, after returning free heap to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: this benchmark needs Linux")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def resident_task(size: int, sparsity: float) -> Json:
    """Resident bytes per nonzero of one (size x size) layer held by this process."""
    import torch

    from sparsetrain import SparsePattern
    from sparsetrain.nn import SparseLinear

    warm = SparseLinear(64, 64)  # libraries, thread pools, allocator
    warm(torch.randn(8, 64, requires_grad=True)).sum().backward()
    before = resident()
    pattern = SparsePattern.random((size, size), sparsity, seed=0)
    layer = SparseLinear(size, size, bias=False, pattern=pattern)
    x = torch.randn(64, size, requires_grad=True)
    layer(x).sum().backward()
    nnz = pattern.nnz
    del x
    held = resident() - before
    return {
        "size": size,
        "sparsity": sparsity,
        "nnz": nnz,
        "bytes": held,
        "per_nonzero": held / nnz,
    }


# ---------------------------------------------------------------- what backward keeps


def saved_extra(layer: Any, x: Any) -> int:
    """Bytes saved for backward beyond the input itself, the parameters and the pattern."""
    import torch

    known = {t.untyped_storage().data_ptr() for t in reachable_tensors(layer)}
    known.add(x.untyped_storage().data_ptr())
    extra: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.nbytes():
            extra[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    return sum(extra.values())


def saved_inputs(width: int = 256, out: int = 128) -> list[Json]:
    """Several forms of the input; none may make the layer keep a copy of it."""
    import torch

    from sparsetrain.nn import SparseLinear

    layer = SparseLinear(width, out, sparsity=0.9)
    inputs = {
        "(batch, in)": torch.randn(96, width),
        "(batch, tokens, in)": torch.randn(4, 24, width),
        "every second row": torch.randn(192, width)[::2],
        "columns of a wider tensor": torch.randn(96, 2 * width)[:, :width],
    }
    rows = []
    for name, x in inputs.items():
        extra = saved_extra(layer, x.requires_grad_())
        rows.append({"input": name, "input_bytes": x.numel() * 4, "extra_bytes_saved": extra})
    return rows


def peak_task(kind: str, width: int, out: int, batch: int) -> Json:
    """Peak of a training step above what was resident before it, in bytes."""
    import torch

    from sparsetrain.nn import SparseLinear

    layer: Any = SparseLinear(width, out, sparsity=0.9)
    if kind == "dense":
        layer = torch.nn.Linear(width, out)
    x = torch.randn(batch, width, requires_grad=True)
    grad = torch.randn(batch, out)
    for rows in (64, batch):  # plans and pools first, then nothing is new in the measured step
        layer(x[:rows]).backward(grad[:rows])
        x.grad = None
        layer.zero_grad()
    before = resident()
    _reset_peak()
    start = _status("VmHWM")
    y = layer(x)
    forward = _status("VmHWM") - start
    y.backward(grad)
    peak = _status("VmHWM") - start
    del y
    weights = sum(p.numel() * p.element_size() for p in layer.parameters())
    return {
        "kind": kind,
        "layer": f"{width}->{out}, batch {batch}",
        "before": before,
        "input": x.numel() * 4,
        # What no implementation can do without: the output, the input's gradient, the weight's.
        "needed": (y_bytes := batch * out * 4) + x.numel() * 4 + weights,
        "forward_beyond_output": forward - y_bytes,
        "peak": peak,
    }


# ---------------------------------------------------------------- running and reporting


def _task(*words: object) -> Json:
    """Runs one measurement in a process of its own, so that nothing else is resident."""
    os.environ[_TASK] = " ".join(str(word) for word in words)
    try:
        return run_with_threads(1)
    finally:
        del os.environ[_TASK]


def run_task(words: list[str]) -> Json:
    """In the child: the measurement named by the words."""
    if words[0] == "resident":
        return resident_task(int(words[1]), float(words[2]))
    return peak_task(words[1], *(int(word) for word in words[2:5]))


def measure(args: argparse.Namespace) -> Json:
    """All views; the dictionary that goes into the JSON file."""
    shapes = load_toml(args.shapes)
    sparsities = shapes["quick_sparsities"] if args.quick else shapes["sparsities"]
    rows = [
        account(layer["name"], layer["in_features"], layer["out_features"], sparsity)
        for layer in shapes["layer"]
        for sparsity in sparsities
    ]
    size, batch = (4096, 4096) if args.quick else (8192, 16384)
    peaks = [
        _task("peak", kind, width, out, batch)
        for width, out in ((768, 3072), (3072, 768))
        for kind in ("dense", "sparse")
    ]
    for peak in peaks:
        # A copy of the input would add all of it; a quarter is left for packing buffers.
        spare = peak["peak"] - peak["needed"]
        peak["beyond_needed"] = spare
        peak["verdict"] = "met" if spare < peak["input"] / 4 else "MISSED"
    return {
        "benchmark": "memory",
        "command": "python benchmarks/memory.py" + (" --quick" if args.quick else ""),
        "environment": environment(),
        "limit": LIMIT,
        "layers": rows,
        "resident": _task("resident", size, 0.9),
        "saved": saved_inputs(),
        "peaks": peaks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="smaller layers, fewer sparsities")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--shapes", type=Path, default=HERE / "shapes" / "linear.toml")
    args = parser.parse_args()
    result_file, task = child_result_file(), os.environ.get(_TASK)
    if result_file is not None and task:
        write_json(result_file, run_task(task.split()))
        return 0
    data = measure(args)
    if args.json:
        write_json(args.json, data)
    print(_tables.memory_report(data))
    return 1 if _tables.memory_missed(data) else 0


if __name__ == "__main__":
    sys.exit(main())
