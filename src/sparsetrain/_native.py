"""Loads the compiled library and says what it runs on.

Importing this module registers ``torch.ops.sparsetrain.*``. Nothing else in the package loads the
library.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_REBUILD = "pip install --no-build-isolation -e . (in a checkout) or pip install sparsetrain"


def _library_path() -> Path:
    """Where ``sparsetrain/_C.so`` lies: beside this file, or where an editable install put it."""
    spec = importlib.util.find_spec("sparsetrain._C")
    path = Path(spec.origin) if spec is not None and spec.origin else None
    if path is None or not path.exists():
        raise ImportError(
            "sparsetrain's compiled library sparsetrain/_C.so is missing beside "
            f"{Path(__file__).parent}. Build it: {_REBUILD}"
        )
    return path


def _load() -> Path:
    path = _library_path()
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"sparsetrain's compiled library {path} does not load with torch "
            f"{torch.__version__} (it needs torch >= 2.10): {error}. Build it again: {_REBUILD}"
        ) from error
    return path


def _native_info() -> tuple[str, tuple[str, ...], str, str, str]:
    """(instruction set in use, those this CPU supports, its kind, hash of the kernels, compiler)"""
    chosen, available, cpu, kernels, compiler = torch.ops.sparsetrain.native_info().split(";", 4)
    choices = tuple(available.split(","))
    if not chosen:
        asked = os.environ.get("SPARSETRAIN_ISA", "")
        raise ValueError(
            f"SPARSETRAIN_ISA={asked!r} is not an instruction set that sparsetrain has kernels for "
            f"and this CPU supports. Set it to one of {', '.join(choices)}, or unset it to get "
            f"the best one ({choices[0]})."
        )
    if not cpu:
        asked = os.environ.get("SPARSETRAIN_CPU", "")
        raise ValueError(
            f"SPARSETRAIN_CPU={asked!r} is not a kind of CPU that sparsetrain knows. Set it to one "
            "of other, halves, wide, intel (for tests), or unset it to get this CPU's own."
        )
    return chosen, choices, cpu, kernels, compiler


def _check_result_cache() -> None:
    if torch.ops.sparsetrain.result_memory()[2] < 0:
        asked = os.environ.get("SPARSETRAIN_CACHE_MIB", "")
        raise ValueError(
            f"SPARSETRAIN_CACHE_MIB={asked!r} is not a whole number of MiB. Set it to the "
            "most memory to keep for the layers' next results, 0 for none, or unset it (1024)."
        )


def _load_routes(beside: Path) -> bool:
    """Loads what records training steps without Python, if it was built with this very torch."""
    major, minor = torch.__version__.split(".")[:2]
    path = beside.with_name(f"_route_{major}_{minor}.so")
    if os.environ.get("SPARSETRAIN_PYTHON_AUTOGRAD") == "1" or not path.exists():
        return False
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError:  # of another build of the same version: Python does the same, more slowly
        return False
    return True


_PATH = _load()
HAS_ROUTES = _load_routes(_PATH)
_ISA, _ISAS_AVAILABLE, _CPU, _KERNELS, _COMPILER = _native_info()
_check_result_cache()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


@functools.cache
def _cpu() -> dict[str, str]:
    """What Linux says of the first core: {"vendor_id", "cpu family", "model name", ...}."""
    first, _, _ = (_read(Path("/proc/cpuinfo")) or "").partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_model() -> str:
    return _cpu().get("model name") or platform.processor() or platform.machine()


def _caches() -> dict[str, str]:
    """Size of each data cache of the first core, as Linux writes it: {"L2": "1024K"}."""
    caches: dict[str, str] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, size = _read(folder / "level"), _read(folder / "size")
        if level and size and _read(folder / "type") != "Instruction":
            caches[f"L{level}"] = size
    return caches


def _version() -> str:
    try:
        return metadata.version("sparsetrain")
    except metadata.PackageNotFoundError:
        return "unknown"


_VECTOR_BYTES = {"avx512": 64, "avx512vl": 32, "avx2": 32}


@functools.cache
def vector_lanes() -> tuple[int, int]:
    """float32 elements of a vector: of the kernels in use, and of the CPU's widest."""
    own, best = (_VECTOR_BYTES.get(isa, 16) // 4 for isa in (_ISA, _ISAS_AVAILABLE[0]))
    return own, best


def cpu_kind() -> str:
    """Whose costs the kernels have (csrc/kernels/cpu.h): "halves", "wide" or "intel" with AVX-512,
    "whole" for every other CPU and instruction set."""
    return _CPU if _ISA == "avx512" and _CPU != "other" else "whole"


def info() -> dict[str, Any]:
    """What a bug report or a benchmark needs to say about the machine and the build.

    Returns a dict of plain values: ``isa`` (kernels in use), ``isas_available`` (best first),
    ``cpu_model``, ``cpu_kind`` (what the kernels suppose of it, see csrc/kernels/cpu.h),
    ``cpu_count`` (cores this process may use), ``caches``, ``threads`` (of torch, now),
    ``library`` (path), ``compiler``, ``autograd`` ("C++", or "Python" where the part that needs the
    torch it was built with is missing) and ``versions`` (of the kernels: a hash of their sources).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "isa": _ISA,
        "isas_available": list(_ISAS_AVAILABLE),
        "cpu_model": _cpu_model(),
        "cpu_kind": _CPU,
        "cpu_count": cores,
        "caches": _caches(),
        "threads": torch.get_num_threads(),
        "library": str(_PATH),
        "compiler": _COMPILER,
        "autograd": "C++" if HAS_ROUTES else "Python",
        "versions": {
            "sparsetrain": _version(),
            "kernels": _KERNELS,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
    }
