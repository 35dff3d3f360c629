"""What was measured on this machine, and where it is kept.

A file is JSON: {"format", "versions", "plans"}, plans being entries by key; a key names everything
that a measurement depends on (see `key_of`). The per-user cache is read once, when the first layer
is computed, and never makes a run fail: a file that is missing is nothing, and one that cannot be
read, is damaged or was written by other versions, or for other kernels, is ignored with one
warning.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparsetrain import _native

__all__ = [
    "Entry",
    "bucket",
    "cache_path",
    "find",
    "key_of",
    "learn",
    "read",
    "switched_off",
    "update",
    "write",
]

FORMAT = 1
_BUCKETS_PER_OCTAVE = 4


class Entry(NamedTuple):
    """What was chosen for one product, and the seconds of each candidate (its noise: +-)."""

    family: str
    variant: int
    seconds: Mapping[str, float]
    noise: float


def bucket(nnz: int, weights: int) -> str:
    """The density in steps of a fourth of an octave; a weight without zeros is one of its own."""
    if nnz >= weights:
        return "full"
    if nnz == 0:
        return "none"
    return f"2^{round(_BUCKETS_PER_OCTAVE * math.log2(nnz / weights))}/{_BUCKETS_PER_OCTAVE}"


@functools.cache
def machine() -> str:
    """CPU model and instruction set of the kernels in use."""
    facts = _native.info()
    return f"{facts['cpu_model']}; {facts['isa']}"


def key_of(
    kind: str,
    direction: str,
    x_shape: Sequence[int],
    rows: int,
    nnz: int,
    weights: int,
    dtype: torch.dtype,
    threads: int,
    geometry: Sequence[Any],
) -> str:
    """Under which a measurement is kept; geometry and shapes are plain integers or tuples."""
    sizes = "x".join(map(str, x_shape))
    name = str(dtype).removeprefix("torch.")
    window = ",".join("x".join(map(str, g)) if isinstance(g, tuple) else str(g) for g in geometry)
    return (
        f"{machine()}; {threads} threads; {name}; {kind} {direction} {sizes} -> {rows} "
        f"[{window}]; {bucket(nnz, weights)}"
    )


def switched_off() -> bool:
    """Whether SPARSETRAIN_PLANS asks for no cache."""
    return os.environ.get("SPARSETRAIN_PLANS", "").lower() == "off"


def cache_path() -> Path | None:
    """The per-user cache: what SPARSETRAIN_PLANS names ("off" for none), or the user's cache folder
    as platformdirs knows it; None where that package is not installed."""
    if switched_off():
        return None
    if named := os.environ.get("SPARSETRAIN_PLANS"):
        return Path(named)
    try:
        import platformdirs
    except ImportError:
        return None
    return Path(platformdirs.user_cache_dir("sparsetrain")) / "plans.json"


def _versions() -> dict[str, str]:
    versions = _native.info()["versions"]
    return {name: versions[name] for name in ("sparsetrain", "kernels", "torch")}


def read(path: Path) -> dict[str, Entry]:
    """The entries of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of other versions; the message says which.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content["plans"], dict):
            raise ValueError("it holds no plans")
        made_by = content["format"], content["versions"]
        entries = {str(key): _entry(value) for key, value in content["plans"].items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if made_by != (FORMAT, _versions()):
        raise ValueError(f"{path} is stale: it is of {made_by[1]}, this is {_versions()}")
    return entries


def _entry(value: Any) -> Entry:
    family, variant, seconds, noise = (value[name] for name in Entry._fields)
    if not isinstance(family, str) or not isinstance(variant, int) or not isinstance(seconds, dict):
        raise ValueError(f"no plan: {value!r}")
    return Entry(family, variant, {str(k): float(v) for k, v in seconds.items()}, float(noise))


def write(path: Path, entries: Mapping[str, Entry]) -> None:
    """Writes a file as a whole: whoever reads meanwhile gets the old one or the new one.

    Raises:
        OSError: the folder or the file cannot be written; an older file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "versions": _versions(),
        "plans": {key: entry._asdict() for key, entry in sorted(entries.items())},
    }
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def update(path: Path, entries: Mapping[str, Entry]) -> None:
    """Adds to a cache file; what else is in it stays, unless it cannot be used.

    Never fails: what cannot be written is one warning.
    """
    try:
        try:
            known = read(path)
        except (FileNotFoundError, ValueError):
            known = {}
        write(path, known | dict(entries))
    except OSError as error:
        warnings.warn(f"plans are not kept for later processes: {error}", stacklevel=3)


class _Known:
    """The entries in use in this process: those of the cache, and over them what was learnt."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.entries: dict[str, Entry] | None = None

    def get(self) -> dict[str, Entry]:
        if self.entries is None:
            with self.lock:
                if self.entries is None:
                    self.entries = self._cached()
        return self.entries

    def _cached(self) -> dict[str, Entry]:
        path = cache_path()
        if path is None:
            return {}
        try:
            return read(path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(
                f"measured plans are ignored: {error}. Run sparsetrain.tune again, or delete the "
                "file.",
                stacklevel=2,
            )
            return {}


_KNOWN = _Known()


def find(key: str) -> Entry | None:
    """What was measured for `key`, if anything."""
    return _KNOWN.get().get(key)


def learn(entries: Mapping[str, Entry]) -> None:
    """Uses `entries` in this process from now on."""
    known = _KNOWN.get()
    with _KNOWN.lock:
        _KNOWN.entries = known | dict(entries)
