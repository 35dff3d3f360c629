"""keep_memory, in processes of its own, since it cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch, sparsetrain

if sys.argv[1] == "keep":
    assert sparsetrain.keep_memory() is True
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(12 << 20) for _ in range(3)]  # 48 MiB each, more than glibc ever keeps
    del kept
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[4])
"""


def _faults(mode: str) -> int:
    """Of a round of allocations, the median of nine."""
    command = [sys.executable, "-c", STEPS, mode]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_memory is for glibc")
def test_kept_memory_is_not_mapped_anew() -> None:
    assert _faults("keep") < 100
    assert _faults("default") > 1000


def test_without_a_mallopt_it_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    import sparsetrain
    from sparsetrain import memory

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert sparsetrain.keep_memory() is False
    monkeypatch.setattr(memory.sys, "platform", "win32")
    assert sparsetrain.keep_memory() is False
