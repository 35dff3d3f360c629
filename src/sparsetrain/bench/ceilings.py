"""The ceilings of this CPU, measured as contestants beside the kernels (see ceilings.cc)."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from sparsetrain.bench.machine import caches, cpu_flags, cpu_model

LEVELS = ("registers", "L1", "L2", "L3", "memory")


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError(
        "the ceilings are C++ that is compiled for this CPU, and no compiler was found: "
        "install g++ (apt install g++) or set CXX"
    )


def _folder() -> Path:
    """Where the built library is kept: the user's cache, as platformdirs says."""
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return Path(tempfile.gettempdir()) / "sparsetrain-bench"
    return user_cache_path("sparsetrain") / "bench"


def build() -> Path:
    """Compiles ceilings.cc for this very CPU, once per source and CPU; returns the library."""
    source = Path(__file__).resolve().parent / "ceilings.cc"
    identity = f"{source.read_text()}{cpu_model()}{cpu_flags()}".encode()
    folder = _folder()
    library = folder / f"ceilings-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            partial = Path(scratch) / "ceilings.so"
            options = "-O3 -march=native -std=c++17 -ffp-contract=fast -shared -fPIC -pthread"
            command = [_compiler(), *options.split(), str(source), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.replace(library)
    return library


class Ceilings:
    """GF/s of one burst of about `burst_s` seconds at each level; call `gflops` once a round."""

    def __init__(self, threads: int = 1, burst_s: float = 0.0015) -> None:
        self._library = ctypes.CDLL(str(build()))
        self._library.ceiling.restype = ctypes.c_double
        self._library.ceiling.argtypes = [
            ctypes.c_int,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int,
        ]
        self.threads = threads
        self.vector_bits = 8 * self._library.ceiling_vector_bytes()
        self.bytes = self._sizes()
        self._rounds = {level: self._calibrate(level, burst_s) for level in LEVELS}

    @staticmethod
    def _sizes() -> dict[str, int]:
        size = caches()
        l1 = min(16 << 10, size["L1"] // 2)
        l2 = size["L2"] // 2
        # Well past L2, well inside L3 (which others share).
        l3 = max(2 * size["L2"], min(size["L3"] // 4, 8 << 20))
        memory = min(256 << 20, max(64 << 20, 3 * size["L3"]))
        return {"registers": 0, "L1": l1, "L2": l2, "L3": l3, "memory": memory}

    def _call(self, level: str, rounds: int, threads: int, cpu_time: bool = True) -> float:
        index, size = LEVELS.index(level), self.bytes[level]
        rate = float(self._library.ceiling(index, size, rounds, threads, int(cpu_time)))
        if rate <= 0:
            raise RuntimeError(f"ceiling {level!r} with {threads} threads gave {rate}")
        return rate

    def _calibrate(self, level: str, burst_s: float) -> int:
        flops = 2.0 * (self.bytes[level] / 4 or 12 * self.vector_bits / 32)
        rounds = 1
        for _ in range(2):
            rate = self._call(level, rounds, 1)
            rounds = max(1, round(burst_s * rate / flops))
        return rounds

    def gflops(
        self, level: str = "L1", threads: int | None = None, cpu_time: bool = False
    ) -> float:
        """One burst now: the rates of all threads added up.

        threads: how many run it at once (default: those of the object). cpu_time: by each thread's
        own CPU time, which leaves out what other processes took from it.
        """
        return self._call(level, self._rounds[level], threads or self.threads, cpu_time) / 1e9
