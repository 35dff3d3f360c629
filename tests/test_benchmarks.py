"""The benchmarks themselves: that they run, that they catch wrong results, and what they report."""

# ruff: noqa: E402  (the benchmarks are scripts: their folder goes on the path first)
from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _contestants
import _harness
import _plots
import _tables
import memory
import report

SHAPES = """
sparsities = [0.5, 0.9]
quick_sparsities = [0.9]

[[layer]]
name = "32->48"
in_features = 32
out_features = 48
batch = 40
targets = "small"

[targets.small]
floor = [0.0, 0.0]
aim = [1e9, 1e9]
[targets.best_peer]
floor = [0.0, 0.0]
aim = [1e9, 1e9]

[limits]
scaling_two_threads = 0.0
roofline_fraction = 0.0
roofline_sparsities = [0.9]
tiny_overhead = 1e9

[tiny]
name = "16->16"
in_features = 16
out_features = 16
batch = 4
sparsity = 0.9
"""


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight (24, 40) at 80 %, bias (24,), x (16, 40), grad (16, 24)"""
    torch.manual_seed(0)
    weight = _contestants.sparse_weight(24, 40, 0.8)
    x = torch.randn(16, 40, requires_grad=True)
    return weight, torch.randn(24), x, torch.randn(16, 24)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_linear_benchmark_runs(tmp_path: Path) -> None:
    shapes, result, plot = (tmp_path / n for n in ("shapes.toml", "out.json", "out.png"))
    shapes.write_text(SHAPES)
    command = [sys.executable, str(BENCHMARKS / "linear.py"), "--quick", "--threads", "2"]
    command += ["--shapes", str(shapes), "--json", str(result), "--plot", str(plot)]
    command += ["--budget", "0.05", "--strict"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Forward + backward, 2 threads" in done.stdout
    assert plot.stat().st_size > 0
    data = json.loads(result.read_text())
    assert [run["threads"] for run in data["runs"]] == [2]
    assert {verdict["verdict"] for verdict in data["verdicts"]} <= {"floor", "not measured"}
    (row,) = data["runs"][0]["rows"]
    assert row["nnz"] == 154
    assert row["contestants"]["sparsetrain"]["status"] == "ok"
    assert row["contestants"]["sparsetrain"]["x_dense"]["median"] > 0
    assert row["scaling"]["sparsetrain"]["rounds"] >= 3
    assert set(row["kernels"]) == set(_tables.KERNELS)
    assert all(entry["median"] > 0 for entry in row["ceilings"].values())
    assert os.fspath(tmp_path) not in result.read_text()


def test_bad_arguments_are_refused() -> None:
    command = [sys.executable, str(BENCHMARKS / "linear.py"), "--sparsity", "1.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--sparsity: got 1.5, must be in [0, 1)" in done.stderr


@pytest.mark.parametrize("kind", [_contestants.Dense, _contestants.SparseTrain])
def test_right_contestants_pass(kind: type[_contestants.Contestant], problem: tuple) -> None:
    weight, bias, x, grad = problem
    reference = _contestants.Reference(weight, bias, x, grad)
    contestant, entry = _contestants.build(kind, weight, bias)
    assert entry == {"status": "ok"}
    assert contestant is not None
    assert reference.check(contestant, x, grad)["status"] == "ok"


def test_one_corrupted_nonzero_is_reported_as_wrong(problem: tuple) -> None:
    weight, bias, x, grad = problem
    reference = _contestants.Reference(weight, bias, x, grad)
    row, column = weight.nonzero()[7].tolist()
    spoiled = weight.clone()
    spoiled[row, column] *= 1.001
    contestant, _ = _contestants.build(_contestants.SparseTrain, spoiled, bias)
    assert contestant is not None
    found = reference.check(contestant, x, grad)
    assert found["status"] == "wrong"
    assert found["detail"].startswith("wrong y, dx")


@pytest.mark.parametrize("result", ["dw", "db", "nan"])
def test_a_wrong_gradient_is_reported(result: str, problem: tuple) -> None:
    class Spoiled(_contestants.Dense):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (math.nan if result == "nan" else 1)

        def weight_grad(self) -> torch.Tensor:
            gradient = super().weight_grad()
            return gradient.roll(1) if result == "dw" else gradient

        def bias_grad(self) -> torch.Tensor:
            return super().bias_grad() + (0.01 if result == "db" else 0)

    weight, bias, x, grad = problem
    reference = _contestants.Reference(weight, bias, x, grad)
    found = reference.check(Spoiled(weight, bias), x, grad)
    assert found["status"] == "wrong"
    assert ("y" if result == "nan" else result) in found["detail"]


def test_a_crash_ends_one_contestant_only() -> None:
    calls = []

    def crash() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise IndexError("out of range")

    turns = [
        _harness.Turn("good", lambda: None),
        _harness.Turn("bad", crash),
        _harness.Turn("gauge", lambda: 2.5, gauge=True),
    ]
    rounds = _harness.interleave(turns, budget_s=0.02, min_rounds=4, turn_s=1e-5)
    assert len(turns[0].values) == rounds >= 4
    assert turns[1].values == []
    assert turns[1].error == "IndexError: out of range"
    assert turns[2].values == [2.5] * rounds


def test_ratios_pair_the_times_of_one_round() -> None:
    slow_then_fast = _harness.ratios([8.0, 4.0, 2.0], [4.0, 2.0, 1.0])
    assert slow_then_fast == {"median": 2.0, "p25": 2.0, "p75": 2.0, "rounds": 3}
    assert _harness.ratios([3.0, 9.0], [1.0])["rounds"] == 1


def test_a_hopelessly_slow_contestant_gets_two_rounds() -> None:
    turns = [
        _harness.Turn("fast", lambda: None),
        _harness.Turn("slow", lambda: time.sleep(0.006)),
    ]
    _harness.interleave(turns, budget_s=0.01, min_rounds=4, turn_s=1e-5)
    assert [len(turn.values) for turn in turns] == [4, 2]


@pytest.mark.parametrize(
    ("median", "most", "expected"),
    [(1.0, False, "MISSED"), (2.0, False, "floor"), (4.0, False, "aim"), (1.0, True, "floor")],
)
def test_verdicts(median: float, most: bool, expected: str) -> None:
    aim = None if most else 3.5
    assert _tables.judge({"median": median}, 2.0, aim, most) == expected
    assert _tables.judge(None, 2.0) == "not measured"


def test_break_even_is_where_the_speedup_passes_one() -> None:
    assert _plots.break_even([(0.0, 0.5), (0.75, 2.0)]) == pytest.approx(0.5)
    assert _plots.break_even([(0.0, 1.5), (0.5, 2.0)]) is None
    assert _plots.break_even([]) is None


def test_memory_accounting_is_complete_and_small() -> None:
    found = memory.account("1024->256", 1024, 256, 0.9)
    assert found["bytes"]["values"] == found["bytes"]["gradient"] == 4 * found["nnz"]
    assert found["bytes"]["pattern"] >= 4 * found["nnz"] + 4 * 257
    assert found["bytes"]["plan"] > 0
    assert found["verdict"] == "met"


def test_a_kept_copy_of_the_input_is_seen() -> None:
    class Copying(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.clone())

    x = torch.randn(16, 32, requires_grad=True)
    assert memory.saved_extra(Copying(), x) >= x.numel() * 4
    assert all(row["extra_bytes_saved"] == 0 for row in memory.saved_inputs(64, 32))


def test_the_report_keeps_what_people_wrote(tmp_path: Path) -> None:
    output = tmp_path / "performance.md"
    assert report.hand_written(output) == report.EMPTY
    output.write_text(f"old\n{report.BEGIN}\n## What was tried\n\nTiles: 3 %.\n{report.END}\nold\n")
    assert report.hand_written(output) == "## What was tried\n\nTiles: 3 %."
    output.write_text("the marks are gone")
    with pytest.raises(ValueError, match="put them back"):
        report.generate(tmp_path, _with_memory_result(tmp_path, output))
    assert output.read_text() == "the marks are gone"


def _with_memory_result(folder: Path, output: Path) -> Path:
    (folder / "memory.json").write_text(json.dumps({"benchmark": "memory"}))
    return output


def test_a_report_of_nothing_says_how_to_measure(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"python benchmarks/linear\.py"):
        report.generate(tmp_path, tmp_path / "performance.md")
