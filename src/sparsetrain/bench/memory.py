"""Memory of sparse layers in training: resident bytes per nonzero, peak of a step.

Three independent views: the tensors and the plan are added up exactly; the resident set of a
process that holds one big layer is read before and after; what backward keeps is listed by
`torch.autograd.graph.saved_tensors_hooks` and confirmed by the peak of the resident set.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.bench.machine import environment
from sparsetrain.bench.problems import Layer, layer_from
from sparsetrain.bench.processes import SHAPES, command_line, load_toml, run_child, write_json
from sparsetrain.bench.timing import Json

LIMIT = 20.0  # bytes per nonzero: values, gradient, pattern and plan
PEAK_LIMIT = 1.25  # peak temporary memory of a convolution's training step, times dense


@dataclass(frozen=True)
class Options:
    """What the command line says; None takes every layer of the sets that come along."""

    shapes: Path | None = None
    sparsities: tuple[float, ...] = ()
    threads: int = 1
    peers: bool = False
    quick: bool = False
    json: Path | None = None


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


def account(layer: Layer, sparsity: float, batch: int = 2) -> Json:
    """One layer after a training step, part by part. Bias and its gradient are not counted."""
    import torch

    module = sparse_module(layer, sparsity)
    shape = (32 * batch if layer.kind == "linear" else batch, *layer.input_shape[1:])
    x = torch.randn(shape, requires_grad=True)
    module(x).sum().backward()
    pattern, bias = module.pattern, 0
    if module.bias is not None:
        bias = module.bias.numel() * module.bias.element_size() * 2
    parts = {
        "values": module.values.untyped_storage().nbytes(),
        "gradient": module.values.grad.untyped_storage().nbytes(),
        "pattern": storage_bytes(reachable_tensors(pattern)),
        "plan": int(torch.ops.sparsetrain.plan_bytes(pattern.key)),
    }
    held = storage_bytes(reachable_tensors(module)) - bias
    parts["other tensors"] = held - parts["values"] - parts["gradient"] - parts["pattern"]
    total = sum(parts.values())
    return {
        "layer": layer.name,
        "sparsity": sparsity,
        "nnz": pattern.nnz,
        "bytes": parts,
        "bytes_per_nonzero": {k: v / pattern.nnz for k, v in parts.items()},
        "total_per_nonzero": total / pattern.nnz,
        "verdict": "met" if total <= LIMIT * pattern.nnz else "MISSED",
    }


def sparse_module(layer: Layer, sparsity: float) -> Any:
    """The sparse layer with a random pattern."""
    from sparsetrain.nn import SparseConv2d, SparseLinear
    from sparsetrain.pattern import SparsePattern

    pattern = SparsePattern.random(layer.weight_shape, sparsity, seed=0)
    if layer.kind == "linear":
        return SparseLinear(layer.inputs, layer.outputs, layer.bias, pattern=pattern)
    window = (layer.kernel, layer.stride, layer.padding, 1, layer.groups, layer.bias)
    return SparseConv2d(layer.inputs, layer.outputs, *window, pattern=pattern)


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


def peak_resident() -> int:
    """The most bytes that this process has had in memory, since `reset_peak` if that was called."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Begins a new peak, at what is resident now."""
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


def saved_by_convolutions() -> list[Json]:
    """The same of a convolution, for the layouts that networks use."""
    import torch

    from sparsetrain.nn import SparseConv2d

    layer = SparseConv2d(32, 48, 3, padding=1, sparsity=0.9)
    x = torch.randn(4, 32, 20, 20)
    inputs = {
        "(N, C, H, W)": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "every second sample": torch.randn(8, 32, 20, 20)[::2],
    }
    rows = []
    for name, given in inputs.items():
        extra = saved_extra(layer, given.detach().requires_grad_())
        rows.append({"input": name, "input_bytes": x.numel() * 4, "extra_bytes_saved": extra})
    return rows


def peers_of(layer: Layer) -> list[str]:
    """Names of the contestants of other libraries that have such a layer and are installed."""
    from sparsetrain.bench import contestants
    from sparsetrain.bench.problems import sparse_weight

    weight = sparse_weight(layer.weight_shape, 0.9)
    kinds = [kind for kind in contestants.PEERS if layer.kind in kind.kinds]
    return [k.name for k in kinds if contestants.build(k, layer, weight, None)[0] is not None]


def _peer_module(name: str, layer: Layer) -> Any:
    from sparsetrain.bench import contestants
    from sparsetrain.bench.problems import sparse_weight

    (kind,) = (kind for kind in contestants.PEERS if kind.name == name)
    return kind(layer, sparse_weight(layer.weight_shape, 0.9), None).module


def peak_task(kind: str, table: Json) -> Json:
    """Peak of a training step above what was resident before it, in bytes.

    kind: "sparse", "dense", or the name of another library's contestant.
    """
    import torch

    import sparsetrain

    described = layer_from(table)
    if kind == "sparse":
        layer: Any = sparse_module(described, 0.9)
    elif kind == "dense":
        layer = described.dense(torch.randn(described.weight_shape), None)
    else:
        layer = _peer_module(kind, described)
    x = torch.randn(described.input_shape, requires_grad=True)
    with torch.no_grad():
        grad = torch.randn(described.batch, *layer(x[:1]).shape[1:])
    for rows in (min(64, described.batch), described.batch):
        # Plans and pools first, then nothing is new in the measured step...
        layer(x[:rows]).backward(grad[:rows])
        x.grad = None
        layer.zero_grad()
    sparsetrain.empty_cache()  # ... but the memory of its results
    before = resident()
    reset_peak()
    start = peak_resident()
    y = layer(x)
    forward = peak_resident() - start
    y.backward(grad)
    peak = peak_resident() - start
    y_bytes = y.numel() * 4
    del y
    weights = sum(p.numel() * p.element_size() for p in layer.parameters())
    return {
        "kind": kind,
        "layer": f"{described.name}, batch {described.batch}",
        "before": before,
        "input": x.numel() * 4,
        # What no implementation can do without: the output, the input's gradient, the weight's.
        "needed": y_bytes + x.numel() * 4 + weights,
        "forward_beyond_output": forward - y_bytes,
        "peak": peak,
    }


# ---------------------------------------------------------------- running and reporting


def child(request: Json, save: Callable[[Json], None]) -> Json:
    """One measurement in a process of its own, so that nothing else is resident."""
    if request["task"] == "resident":
        return resident_task(request["size"], request["sparsity"])
    return peak_task(request["kind"], request["layer"])


def run(options: Options) -> Json:
    """All views; the dictionary that goes into the JSON file."""
    files = [options.shapes] if options.shapes else [SHAPES / "linear.toml", SHAPES / "conv.toml"]
    rows, peaks = [], []
    for file in files:
        shapes = load_toml(file)
        named = shapes["quick_sparsities"] if options.quick else shapes["sparsities"]
        tables = [{**shapes.get("defaults", {}), **table} for table in shapes["layer"]]
        for table in tables:
            for sparsity in options.sparsities or named:
                rows.append(account(layer_from(table), sparsity))
                _say(rows[-1], f"{rows[-1]['total_per_nonzero']:.1f} bytes per nonzero")
        for table in tables[:2] if options.quick else _for_peaks(tables):
            dense, sparse = (_peak(kind, table, options) for kind in ("dense", "sparse"))
            peaks += judged_peaks(dense, sparse, table.get("kind", "linear") == "linear")
            _say(sparse, f"peak of a step {sparse['x_dense']:.2f} times dense")
            for name in peers_of(layer_from(table)) if options.peers else ():
                peaks.append(_beside(_peak(name, table, options), dense))
    size = 4096 if options.quick else 8192
    resident_request = {"task": "resident", "size": size, "sparsity": 0.9}
    data: Json = {
        "benchmark": "memory",
        "command": command_line(),
        "environment": environment(),
        "limit": LIMIT,
        "layers": rows,
        "threads": options.threads,
        "resident": run_child("sparsetrain.bench.memory", resident_request, options.threads),
        "saved": saved_inputs() + saved_by_convolutions(),
        "peaks": peaks,
    }
    if options.json is not None:
        write_json(options.json, data)
    return data


def _say(row: Json, what: str) -> None:
    print(f"{row['layer']}: {what}, {row['verdict']}", file=sys.stderr, flush=True)


def _for_peaks(tables: list[Json]) -> list[Json]:
    """Layers whose activations are large enough to be read off the resident set."""
    linear = [t for t in tables if t.get("kind", "linear") == "linear"]
    return linear[:2] + [t for t in tables if t.get("kind") == "conv2d"]


def _peak(kind: str, table: Json, options: Options) -> Json:
    large = dict(table)
    if table.get("kind", "linear") == "linear":
        large["batch"] = 4096 if options.quick else 16384
    request = {"task": "peak", "kind": kind, "layer": large}
    return run_child("sparsetrain.bench.memory", request, options.threads)


def _beside(peak: Json, dense: Json) -> Json:
    """`peak` with `beyond_needed` and the ratio to dense's."""
    peak["beyond_needed"] = peak["peak"] - peak["needed"]
    peak["x_dense"] = peak["peak"] / max(dense["peak"], 1)
    return peak


def judged_peaks(dense: Json, sparse: Json, linear: bool) -> list[Json]:
    """Both with `beyond_needed` and, of the sparse one, the ratio and the verdict.

    A linear layer may take a quarter of its input beyond what nobody can do without (a copy of the
    input would be all of it); a convolution 1.25 times what dense takes in all.
    """
    dense["beyond_needed"] = dense["peak"] - dense["needed"]
    _beside(sparse, dense)
    met = sparse["x_dense"] <= PEAK_LIMIT
    if linear:
        met = sparse["beyond_needed"] < sparse["input"] / 4
    sparse["verdict"] = "met" if met else "MISSED"
    return [dense, sparse]
