"""What every benchmark shares: pinned threads, interleaved timing, medians, the machine report.

A shared machine changes speed by a factor of two within seconds. So nothing here compares two
times from different moments: contestants take turns within each round, and the number that
counts is the median over rounds of the ratio of two times of the same round.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

Json = dict[str, Any]
HERE = Path(__file__).resolve().parent
_CHILD = "SPARSETRAIN_BENCH_CHILD"  # set in the re-executed process: the file for its result
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


# ---------------------------------------------------------------- processes


def child_result_file() -> Path | None:
    """The file this process must write its result to, or None in the parent process."""
    name = os.environ.get(_CHILD)
    return Path(name) if name else None


def run_with_threads(threads: int, argv: Sequence[str] | None = None) -> Json:
    """Runs this same script again with its thread count fixed before Python starts.

    Returns what the child wrote to `child_result_file()`. Raises RuntimeError if it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        env = dict(os.environ, **{name: str(threads) for name in _THREAD_VARIABLES})
        env[_CHILD] = str(result)
        command = [sys.executable, *(sys.argv if argv is None else argv)]
        code = subprocess.run(command, env=env, check=False).returncode
        if code != 0 or not result.exists():
            raise RuntimeError(
                f"the measuring process for {threads} thread(s) ended with exit code {code}"
            )
        loaded: Json = json.loads(result.read_text())
        return loaded


def write_json(path: Path, data: Json) -> None:
    """Writes atomically: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(json.dumps(data, indent=1) + "\n")
    unfinished.replace(path)


def load_toml(path: Path) -> Json:
    """A shapes file. Python 3.10 has no tomllib; there the `tomli` package is needed."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore
    shapes: Json = tomllib.loads(path.read_text())
    return shapes


# ---------------------------------------------------------------- statistics


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics; `values` must not be empty."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> Json:
    """Median and quartiles, with the number of rounds they came from."""
    return {
        "median": quantile(values, 0.5),
        "p25": quantile(values, 0.25),
        "p75": quantile(values, 0.75),
        "rounds": len(values),
    }


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Json:
    """Spread of the per-round ratios. Both lists start at the same round of one run.

    A contestant that is too slow stops after its first rounds: the rounds of both count.
    """
    return spread([a / b for a, b in zip(numerator, denominator, strict=False)])


# ---------------------------------------------------------------- interleaved timing


@dataclass
class Turn:
    """One contestant. Its `values` get one entry per round.

    A timed contestant's value is the mean time in seconds of `inner` calls of `step`; `cpu` holds
    the same in CPU time of this process, which another process's time slices do not lengthen. A
    gauge's value is what one call of `step` returns (a ceiling, in GF/s).
    """

    name: str
    step: Callable[[], object]
    gauge: bool = False
    before: Callable[[], object] | None = None  # untimed, e.g. torch.set_num_threads
    inner: int = 1
    warm: bool = False  # one untimed call at the start of each turn
    limit: int | None = None  # takes part in the first so many rounds only
    values: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    error: str | None = None  # set when the step raised: the contestant is out from then on

    def _timed(self, inner: int) -> float:
        start = time.perf_counter()
        for _ in range(inner):
            self.step()
        return (time.perf_counter() - start) / inner

    def calibrate(self, turn_s: float, budget_s: float) -> None:
        """Warms up and chooses `inner` so that a turn lasts about `turn_s` seconds.

        Who needs more than half the budget for one step gets two rounds, not all of them.
        """
        if self.before:
            self.before()
        once = self._timed(1)
        self.limit = 2 if once > budget_s / 2 else None
        if self.gauge or once > 4 * turn_s:  # one call fills a turn, however cold it was
            return
        once = self._timed(1)
        if once < turn_s / 4:
            once = min(once, self._timed(max(1, int(turn_s / 4 / max(once, 1e-7)))))
        self.inner = max(1, round(turn_s / max(once, 1e-7)))
        self.warm = once < turn_s

    def take(self) -> None:
        """One turn of one round."""
        if self.limit is not None and len(self.values) >= self.limit:
            return
        if self.before:
            self.before()
        if self.gauge:
            self.values.append(float(self.step()))  # type: ignore[arg-type]
            return
        if self.warm:
            self.step()
        used = time.process_time()
        self.values.append(self._timed(self.inner))
        self.cpu.append((time.process_time() - used) / self.inner)


def _guarded(turn: Turn, action: Callable[[], None]) -> None:
    """Runs one action of a contestant; a raise ends this one, not the others."""
    if turn.error is None:
        try:
            action()
        except Exception as error:  # a peer may raise anything
            turn.error = f"{type(error).__name__}: {error}"


def interleave(
    turns: Sequence[Turn],
    *,
    budget_s: float,
    min_rounds: int = 5,
    max_rounds: int = 30,
    turn_s: float = 0.03,
    settle_s: float = 0.0,
) -> int:
    """Times all `turns` round-robin for about `budget_s` seconds; returns the rounds done.

    Every other round runs in the opposite order, so that no contestant always follows the same
    one. `settle_s` of sleep before each turn lets the worker threads of another OpenMP runtime
    stop spinning. Garbage collection is off meanwhile. A contestant that raises keeps `error`
    and no values.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in turns:
            _guarded(turn, partial(turn.calibrate, turn_s, budget_s))
        start, done = time.perf_counter(), 0
        while done < max(min_rounds, max_rounds):
            for turn in turns if done % 2 == 0 else reversed(turns):
                if settle_s:
                    time.sleep(settle_s)
                _guarded(turn, turn.take)
            done += 1
            if done >= min_rounds and (time.perf_counter() - start) * (1 + 1 / done) > budget_s:
                break
    finally:
        if enabled:
            gc.enable()
    for turn in turns:
        if turn.error:
            turn.values.clear()
            turn.cpu.clear()
    return done


# ---------------------------------------------------------------- the machine


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
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
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
