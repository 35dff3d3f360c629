"""keep_memory, in processes of its own, since it cannot be undone."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import types
from pathlib import Path

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


@pytest.mark.parametrize("can", [True, False])
def test_a_benchmark_keeps_memory_or_says_that_it_cannot(
    can: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparsetrain
    from sparsetrain.bench import processes

    calls = ["not told"]

    def keep() -> bool:
        calls[0] = "told"
        return can

    asked, result = tmp_path / "asked.json", tmp_path / "result.json"
    child = types.SimpleNamespace(child=lambda request, save: {**request, "state": calls[0]})
    monkeypatch.setitem(sys.modules, "stand_in", child)
    monkeypatch.setattr(processes, "_end_with_parent", lambda: None)
    monkeypatch.setattr(sparsetrain, "keep_memory", keep)
    monkeypatch.setattr(sys, "argv", ["processes", "stand_in", str(asked), str(result)])
    asked.write_text('{"keep_memory": false}')
    processes.main()
    assert json.loads(result.read_text())["state"] == "not told"
    asked.write_text('{"keep_memory": true}')
    if can:
        processes.main()
        assert json.loads(result.read_text())["state"] == "told"
    else:
        with pytest.raises(RuntimeError, match=r"--keep-memory.*glibc"):
            processes.main()
