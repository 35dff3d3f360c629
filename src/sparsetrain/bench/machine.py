"""What a reader needs to judge or repeat a measurement: CPU, caches, versions, load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

from sparsetrain.bench.timing import Json


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _bytes(text: str) -> int:
    units = {"K": 1024, "M": 1024**2, "G": 1024**3}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or 0)


def caches() -> dict[str, int]:
    """Bytes of the data caches of CPU 0: keys L1, L2, L3; typical sizes where unreadable."""
    found = {"L1": 32 << 10, "L2": 512 << 10, "L3": 16 << 20}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        level, kind = _read(f"{index}/level"), _read(f"{index}/type")
        size = _read(f"{index}/size")
        if kind in ("Data", "Unified") and level in "123" and size:
            found[f"L{level}"] = _bytes(size)
    return found


def cpu_model() -> str:
    """Name, family, model and stepping: a hypervisor may hide all but the numbers."""
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{k} {fields[k]}" for k in ("cpu family", "model", "stepping") if k in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def cpu_flags() -> list[str]:
    """The vector extensions that matter here."""
    known = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
    words = set(_read("/proc/cpuinfo").split())
    return [flag for flag in known if flag in words]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--exclude",
        "*",
    ]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _mkl_line() -> str:
    import torch

    lines = torch.__config__.show().splitlines()
    return next((line.strip(" -") for line in lines if "Math Kernel" in line), "none")


def _isa() -> str | None:
    """Which of sparsetrain's kernels run here."""
    try:
        from sparsetrain._native import info
    except ImportError:
        return None
    return str(info()["isa"])


def environment() -> Json:
    """CPU, caches, versions, load: what a reader needs to judge or repeat a measurement."""
    packages = ("torch", "numpy", "sparsetrain", "sparseprop", "sparselab")
    return {
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        "flags": cpu_flags(),
        "caches": caches(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "mkl": _mkl_line(),
        "isa": _isa(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


class OtherLoad:
    """How many CPUs other processes kept busy meanwhile: `with OtherLoad() as load: ...`."""

    cpus = 0.0

    def _busy(self) -> float:
        fields = _read("/proc/stat").split("\n")[0].split()[1:]
        if len(fields) < 8:
            return 0.0
        ticks = sum(int(fields[i]) for i in (0, 1, 2, 5, 6, 7))  # user nice system irq* steal
        own = os.times()
        return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system

    def __enter__(self) -> OtherLoad:
        self._start = (time.perf_counter(), self._busy())
        return self

    def __exit__(self, *_: object) -> None:
        wall = time.perf_counter() - self._start[0]
        self.cpus = round(max(0.0, (self._busy() - self._start[1]) / max(wall, 1e-9)), 2)
