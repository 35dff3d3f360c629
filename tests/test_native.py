"""The compiled library: what it links to, which kernels it picks, what its operators refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from itertools import combinations
from pathlib import Path

import pytest
import torch

from sparsetrain import _native

ops = torch.ops.sparsetrain
ROOT = Path(__file__).parent.parent


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def full_pattern(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    crow = torch.arange(0, rows * cols + 1, cols, dtype=torch.int32)
    return crow, torch.arange(cols, dtype=torch.int32).repeat(rows)


# ---- info and the choice of instruction set ------------------------------------------------------


def test_info_says_what_a_bug_report_needs() -> None:
    info = _native.info()
    assert info["isa"] in info["isas_available"]
    assert info["isas_available"][-1] in ("baseline", "neon")
    assert info["threads"] == torch.get_num_threads()
    assert info["versions"]["torch"] == torch.__version__
    assert Path(info["library"]).exists()
    assert info["cpu_model"]
    assert info["cpu_kind"] in ("other", "halves", "wide", "intel")
    assert info["cpu_count"] >= 1


@pytest.mark.parametrize("isa", _native.info()["isas_available"])
def test_every_available_isa_can_be_forced_and_agrees(isa: str) -> None:
    code = """
import torch
from sparsetrain import _native
x = torch.arange(21.0).reshape(3, 7) - 9
values = torch.arange(35.0) - 17
crow = torch.arange(0, 36, 7, dtype=torch.int32)
col = torch.arange(7, dtype=torch.int32).repeat(5)
y = torch.ops.sparsetrain.linear(x, values, None, crow, col, torch.tensor([1]))
assert torch.equal(y, x @ values.reshape(5, 7).T)
print(_native.info()["isa"])
"""
    done = run_python(code, SPARSETRAIN_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


@pytest.mark.parametrize(
    ("cpu", "isa", "kind"),
    [
        ("halves", "avx512", "halves"),
        ("halves", "avx2", "whole"),
        ("wide", "avx512", "wide"),
        ("intel", "avx512", "intel"),
        ("intel", "avx2", "whole"),
        ("other", "avx512", "whole"),
    ],
)
def test_which_costs_the_cpu_has(
    cpu: str, isa: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "_CPU", cpu)
    monkeypatch.setattr(_native, "_ISA", isa)
    assert _native.cpu_kind() == kind


def test_the_kind_of_cpu_follows_its_vendor() -> None:
    vendor, family = (_native._cpu().get(key) for key in ("vendor_id", "cpu family"))
    done = run_python("from sparsetrain import _native; print(_native._CPU)", SPARSETRAIN_CPU="")
    amd = {"25": "halves"}.get(str(family), "wide")
    expected = {"AuthenticAMD": amd, "GenuineIntel": "intel"}.get(str(vendor), "other")
    assert done.stdout.strip() == expected


def test_an_unknown_kind_of_cpu_is_an_error_that_lists_the_choices() -> None:
    done = run_python("import sparsetrain._native", SPARSETRAIN_CPU="abacus")
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: SPARSETRAIN_CPU='abacus'")
    assert "other, halves, wide, intel" in message


def test_an_empty_isa_means_the_default() -> None:
    code = "from sparsetrain import _native; print(_native.info()['isa'])"
    done = run_python(code, SPARSETRAIN_ISA="")
    assert done.stdout.strip() == _native.info()["isas_available"][0]


def test_an_unknown_isa_is_an_error_that_lists_the_choices() -> None:
    done = run_python("import sparsetrain._native", SPARSETRAIN_ISA="abacus")
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: SPARSETRAIN_ISA='abacus'")
    assert ", ".join(_native.info()["isas_available"]) in message


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        _native._load()


# ---- linking -------------------------------------------------------------------------------------

needs_binutils = pytest.mark.skipif(
    not (shutil.which("readelf") and shutil.which("nm")), reason="needs binutils"
)


@needs_binutils
def test_library_needs_libtorch_and_no_openmp_of_its_own() -> None:
    library = _native.info()["library"]
    text = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    needed = [line for line in text.splitlines() if "(NEEDED)" in line]
    assert any("libtorch_cpu.so" in line for line in needed)
    assert not any(word in line for line in needed for word in ("omp", "python", "c10.so"))
    assert any(
        "(RUNPATH)" in line and "[$ORIGIN/../torch/lib]" in line for line in text.split("\n")
    )


@needs_binutils
def test_instruction_sets_share_no_weak_symbol() -> None:
    """A weak symbol in two sets would let the linker run AVX-512 code on a CPU without it."""
    objects = sorted(
        ROOT.glob("build/py3-*/CMakeFiles/kernels_*.dir/csrc/kernels/kernels_isa.cc.o")
    )
    if len(objects) < 2:
        pytest.skip("no object files of a build in this checkout")
    defined = {}
    for path in objects:
        text = subprocess.run(
            ["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True
        ).stdout
        # Upper case: global; W, V, u: weak or unique. Local symbols (t, r, d, b) cannot clash.
        # DW.ref.* is one pointer to a symbol of the C++ runtime.
        rows = [line.split()[-2:] for line in text.splitlines()]
        defined[path] = {
            name
            for kind, name in rows
            if (kind.isupper() or kind in "uvw") and not name.startswith("DW.ref.")
        }
    for a, b in combinations(objects, 2):
        assert not defined[a] & defined[b], f"{a} and {b} share symbols"


# ---- operators: the last line of defence ---------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    crow, col = full_pattern(4, 6)
    key, values, x = torch.tensor([2**40]), torch.randn(24), torch.randn(2, 6)
    bad_calls = {
        r"x must have 2 dimensions, got shape \(6\)": (x[0], values, None, crow, col, key),
        "x is Double but values is Float": (x.double(), values, None, crow, col, key),
        "values must be float32": (x.half(), values.half(), None, crow, col, key),
        "values has 3 entries, expected 24": (x, values[:3], None, crow, col, key),
        "bias has 3 entries, expected 4": (x, values, torch.randn(3), crow, col, key),
        "bias is Double": (x, values, torch.randn(4).double(), crow, col, key),
        "crow must be int32, got Long": (x, values, None, crow.long(), col, key),
        "col must be contiguous": (x, values, None, crow, col.repeat(2)[::2], key),
        "crow must have rows": (x, values, None, crow[:0], col, key),
        "key must be one int64 number": (x, values, None, crow, col, key.int()),
        "key must hold a positive number": (x, values, None, crow, col, key * 0),
    }
    for message, arguments in bad_calls.items():
        with pytest.raises(RuntimeError, match=message):
            ops.linear(*arguments)
    with pytest.raises(RuntimeError, match="each row of grad has 5 entries, expected 4"):
        ops.linear_grad_input(torch.randn(2, 5), values, crow, col, key, 6)
    with pytest.raises(RuntimeError, match="grad has 3 entries, expected 2"):
        ops.linear_grad_values(torch.randn(3, 4), x, crow, col, key, True)
    ops.forget_plan(int(key))


def test_no_invalid_pattern_reaches_a_kernel_or_the_registry() -> None:
    crow, col = full_pattern(4, 6)
    key, values, x = torch.tensor([2**40 + 6]), torch.randn(24), torch.randn(2, 6)
    bad_patterns = {
        r"crow\[0\] is 1": (x, crow + 1, col),
        r"crow\[4\] is 23": (x, torch.cat([crow[:4], crow[4:] - 1]), col),
        r"crow\[1\] = 13 is greater": (x, crow + torch.tensor([0, 7, 0, 0, 0]).int(), col),
        "columns must increase": (x, crow, col.flip(0)),
        "twice in one row": (x, crow, col // 2),
        r"must be in \[0, 5\)": (x[:, :5], crow, col),
        r"col\[0\] is -1, it must be in": (x, crow, col - 1),
    }
    for message, (input_, bad_crow, bad_col) in bad_patterns.items():
        with pytest.raises(RuntimeError, match=message):
            ops.linear(input_, values, None, bad_crow, bad_col, key)
    with pytest.raises(RuntimeError, match="columns must increase"):
        ops.transpose_pattern(crow, col.flip(0), 6)
    assert ops.plan_bytes(key) == 0


def test_fused_backward_gives_what_its_parts_give() -> None:
    crow, col = full_pattern(9, 30)
    key = torch.tensor([2**40 + 1])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(70, 30).to(dtype)
        grad, values = torch.randn(70, 9).to(dtype), torch.randn(270).to(dtype)
        dx, dvalues, dbias = ops.linear_backward(grad, x, values, crow, col, key, True)
        assert torch.equal(dx, ops.linear_grad_input(grad, values, crow, col, key, 30))
        parts = ops.linear_grad_values(grad, x, crow, col, key, True)
        assert torch.equal(dvalues, parts[0])
        assert torch.equal(dbias, parts[1])
    ops.forget_plan(int(key))


@pytest.mark.parametrize(("batch", "rows", "cols"), [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)])
def test_empty_sizes(batch: int, rows: int, cols: int) -> None:
    crow, col = (
        full_pattern(rows, cols) if cols else (torch.zeros(rows + 1).int(), torch.empty(0).int())
    )
    key = torch.tensor([2**40 + 2])
    x, grad = torch.randn(batch, cols), torch.randn(batch, rows)
    values, bias = torch.randn(rows * cols), torch.randn(rows)
    y = ops.linear(x, values, bias, crow, col, key)
    torch.testing.assert_close(y, x @ values.reshape(rows, cols).T + bias)
    dx, dvalues, dbias = ops.linear_backward(grad, x, values, crow, col, key, True)
    torch.testing.assert_close(dx, grad @ values.reshape(rows, cols))
    torch.testing.assert_close(dvalues, (grad.T @ x).flatten())
    torch.testing.assert_close(dbias, grad.sum(0))
    ops.forget_plan(int(key))


# ---- the plan registry ---------------------------------------------------------------------------


def test_a_plan_lives_from_its_first_use_until_it_is_forgotten() -> None:
    crow, col = full_pattern(3, 4)
    key = torch.tensor([2**40 + 3])
    assert ops.plan_bytes(key) == 0
    ops.linear(torch.randn(1, 4), torch.randn(12), None, crow, col, key)
    assert ops.plan_bytes(key) > 0
    ops.forget_plan(int(key))
    ops.forget_plan(int(key))  # twice is fine
    assert ops.plan_bytes(key) == 0


def test_a_key_with_other_indices_gets_another_plan() -> None:
    key = torch.tensor([2**40 + 4])
    x, values = torch.randn(2, 4), torch.randn(3)
    for columns in ([0, 1, 2], [1, 2, 3]):
        crow, col = torch.tensor([0, 3]).int(), torch.tensor(columns).int()
        y = ops.linear(x, values, None, crow, col, key)
        torch.testing.assert_close(y, (x[:, columns] @ values)[:, None])
    ops.forget_plan(int(key))


def test_threads_may_call_and_forget_at_once() -> None:
    crow, col = full_pattern(20, 30)
    key = torch.tensor([2**40 + 5])
    x, values, grad = torch.randn(8, 30), torch.randn(600), torch.randn(8, 20)
    y = ops.linear(x, values, None, crow, col, key)
    dx = ops.linear_grad_input(grad, values, crow, col, key, 30)
    wrong: list[str] = []

    def call() -> None:
        for _ in range(200):
            if not torch.equal(ops.linear(x, values, None, crow, col, key), y):
                wrong.append("linear")
            if not torch.equal(ops.linear_grad_input(grad, values, crow, col, key, 30), dx):
                wrong.append("linear_grad_input")

    def forget() -> None:
        for _ in range(400):
            ops.forget_plan(int(key))

    threads = [threading.Thread(target=t) for t in (call, call, forget)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    ops.forget_plan(int(key))
