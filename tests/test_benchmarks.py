"""The benchmarks themselves: that they run, that they catch wrong results, and what they report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsetrain._cli_bench import parts_of_names
from sparsetrain.bench import (
    ceilings,
    contestants,
    layer_bench,
    memory,
    model_layers,
    models,
    report,
    timing,
    verdicts,
)
from sparsetrain.bench.break_even import break_even
from sparsetrain.bench.layer_bench import LayerBench, Settings
from sparsetrain.bench.problems import Layer, Problem, layer_from, sparse_weight
from sparsetrain.bench.processes import SHAPES, load_toml
from sparsetrain.cli import app

SHAPES_FILE = """
sparsities = [0.5, 0.9]
quick_sparsities = [0.5, 0.9]
budget_s = 0.05
quick_budget_s = 0.05
forward = true

[[layer]]
name = "32->48"
inputs = 32
outputs = 48
batch = 40
targets = "loose"

[[layer]]
name = "conv"
kind = "conv2d"
inputs = 8
outputs = 12
size = 9
kernel = 3
padding = 1
stride = 2
batch = 9
bias = false
targets = "loose"

[targets.loose]
x_dense.floor = [0.0, 0.0]
x_dense.aim = [1e9, 1e9]
x_best_peer.floor = [0.0, 0.0]

[limits]
scaling_two_threads = 0.0
roofline_fraction = 0.0
roofline_sparsities = [0.9]
tiny_overhead = 1e9

[tiny]
name = "16->16"
inputs = 16
outputs = 16
batch = 4
sparsity = 0.9
"""
LINEAR = Layer("24x40", "linear", 40, 24, 16)
CONV = Layer("3x3", "conv2d", 8, 12, 5, size=9, kernel=3, stride=2, padding=1)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)


def bench(*words: str | Path) -> Any:
    """`sparsetrain bench WORDS`, in this process."""
    return CliRunner().invoke(app, ["bench", *map(str, words)])


@pytest.fixture(params=[LINEAR, CONV], ids=["linear", "conv2d"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def _weight(problem: Problem) -> torch.Tensor:
    return sparse_weight(problem.layer.weight_shape, 0.8)


@needs_compiler
def test_layers_are_measured(tmp_path: Path) -> None:
    shapes, result, plot = (tmp_path / n for n in ("shapes.toml", "out.json", "out.png"))
    shapes.write_text(SHAPES_FILE)
    options = ["--quick", "--threads", "2", "--shapes", shapes, "--json", result]
    done = bench("layers", *options, "--plot", plot, "--strict")
    assert done.exit_code == 0, done.output
    assert "Forward + backward, 2 threads" in done.stdout
    assert plot.stat().st_size > 0
    data = json.loads(result.read_text())
    assert [run["threads"] for run in data["runs"]] == [2]
    assert {verdict["verdict"] for verdict in data["verdicts"]} == {"floor"}
    rows = data["runs"][0]["rows"]
    assert [(row["layer"], row["sparsity"]) for row in rows] == [
        ("32->48", 0.5),
        ("32->48", 0.9),
        ("conv", 0.5),
        ("conv", 0.9),
    ]
    assert [row["nnz"] for row in rows] == [768, 154, 432, 86]
    for row in rows:
        own = row["contestants"]["sparsetrain"]
        assert own["status"] == "ok"
        assert own["x_dense"]["median"] > 0
        assert len(own["round_ms"]) == row["rounds"] >= 2
        assert row["scaling"]["sparsetrain"]["rounds"] >= 2
        assert len(row["kernels"]) == (4 if row["sparsity"] == 0.9 else 0)
    assert all(entry["median"] > 0 for entry in rows[1]["ceilings"].values())
    assert data["runs"][0]["tiny"]["training_x_dense_time"]["median"] > 0
    assert os.fspath(tmp_path) not in result.read_text()


@needs_compiler
def test_resuming_measures_only_what_is_missing(tmp_path: Path) -> None:
    shapes, result = tmp_path / "shapes.toml", tmp_path / "out.json"
    shapes.write_text(SHAPES_FILE)
    options = ["layers", "--quick", "--threads", "1", "--shapes", shapes, "--json", result]
    assert bench(*options, "--layers", "conv").exit_code == 0
    first = json.loads(result.read_text())["runs"][0]["rows"]
    assert bench(*options, "--resume").exit_code == 0
    data = json.loads(result.read_text())
    rows = data["runs"][0]["rows"]
    assert rows[:2] == first
    assert len(set(data["command"].split("\n"))) == len(data["command"].split("\n"))
    assert [row["layer"] for row in rows] == ["conv", "conv", "32->48", "32->48"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layers", "--sparsity", "1.5"], "--sparsity: got 1.5, must be in [0, 1)"),
        (["layers", "--threads", "many"], "--threads: got 'many', takes numbers"),
        (["layers", "--layers", "nothing"], "no layer is left to measure"),
        (["layers", "--set", "nothing"], "--set: got 'nothing', takes one of linear, conv"),
        (["layers", "--shapes", "missing.toml"], "--shapes missing.toml: not a readable TOML"),
        (["models", "--models", "nothing"], "--models: got 'nothing', takes resnet18"),
        (["report", "--results", "missing"], "nothing to report: missing holds none of"),
    ],
)
def test_bad_arguments_are_refused(words: list[str], message: str) -> None:
    done = bench(*words)
    assert done.exit_code == 2
    assert message in done.output


COMMANDS = ["ceilings", "compare", "layers", "memory", "models", "report", "threads"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    done = bench(command, "--help")
    assert done.exit_code == 0
    assert "Examples" in done.output
    assert f"sparsetrain bench {command}" in done.output


@pytest.mark.parametrize("name", ["linear", "conv", "training", "models"])
def test_every_target_fits_its_sparsities(name: str) -> None:
    shapes = load_toml(SHAPES / f"{name}.toml")
    for table in shapes["targets"].values():
        known = table.get("sparsities", shapes["sparsities"])
        for what, goal in table.items():
            if what != "sparsities":
                assert all(len(each) == len(known) for each in goal.values())
    for layer in shapes.get("layer", ()):
        described = layer_from({**shapes.get("defaults", {}), **layer})
        assert described.targets in shapes["targets"]


def test_a_wrong_key_of_a_layer_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['widht'\], missing keys \['outputs'\]"):
        layer_from({"name": "a", "inputs": 3, "widht": 4, "batch": 1})


@pytest.mark.parametrize("kind", [contestants.Dense, contestants.SparseTrain])
def test_right_contestants_pass(kind: type[contestants.Contestant], problem: Problem) -> None:
    weight = _weight(problem)
    contestant, entry = contestants.build(kind, problem.layer, weight, problem.bias)
    assert entry == {"status": "ok"}
    assert contestant is not None
    found = contestants.check(contestant, problem.reference(weight), problem)
    assert found["status"] == "ok"
    assert set(found["error_over_bound"]) == {"y", "dx", "dw", "db"}
    assert max(found["error_over_bound"].values()) > 0


@pytest.mark.parametrize("layer", [LINEAR, CONV], ids=["linear", "conv2d"])
def test_the_reference_agrees_with_autograd(layer: Layer) -> None:
    problem = Problem(layer)
    weight = _weight(problem)
    module = layer.dense(weight.double(), problem.bias.double())
    x = problem.x.detach().double().requires_grad_()
    y = module(x)
    y.backward(problem.grad.double())
    grads = {name: p.grad for name, p in module.named_parameters()}
    got = {"y": y, "dx": x.grad, "dw": grads["weight"][weight != 0], "db": grads["bias"]}
    found = problem.reference(weight).verdict(lambda: got)
    assert found["status"] == "ok"
    assert max(found["error_over_bound"].values()) < 1e-6


def test_one_corrupted_nonzero_is_reported_as_wrong(problem: Problem) -> None:
    weight = _weight(problem)
    spoiled = weight.clone()
    spoiled.view(-1)[weight.view(-1).nonzero()[7]] *= 1.001
    kind = contestants.SparseTrain
    contestant, _ = contestants.build(kind, problem.layer, spoiled, problem.bias)
    assert contestant is not None
    found = contestants.check(contestant, problem.reference(weight), problem)
    assert found["status"] == "wrong"
    assert found["detail"].startswith("wrong y, dx")


@pytest.mark.parametrize("result", ["sample", "dw", "db", "nan"])
def test_a_wrong_result_is_reported(result: str, problem: Problem) -> None:
    class Spoiled(contestants.Dense):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            if result == "sample":  # one sample in the middle of the batch
                y = torch.cat([y[:2], y[2:3] * 1.01, y[3:]])
            return y * (math.nan if result == "nan" else 1)

        def weight_grad(self) -> torch.Tensor:
            gradient = super().weight_grad()
            return gradient.roll(1) if result == "dw" else gradient

        def results(self, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
            found = super().results(x, grad)
            return found | ({"db": found["db"] + 0.01} if result == "db" else {})

    weight = _weight(problem)
    spoiled = Spoiled(problem.layer, weight, problem.bias)
    found = contestants.check(spoiled, problem.reference(weight), problem)
    assert found["status"] == "wrong"
    assert {"nan": "y", "sample": "y"}.get(result, result) in found["detail"]


def test_a_library_that_is_missing_or_fails_is_reported() -> None:
    class Absent(contestants.Dense):
        def __init__(self, *_: object) -> None:
            raise ImportError("No module named 'peer'")

    class Failing(contestants.Dense):
        def __init__(self, *_: object) -> None:
            raise IndexError("out of range")

    weight = sparse_weight(LINEAR.weight_shape, 0.8)
    nothing, entry = contestants.build(Absent, LINEAR, weight, None)
    assert (nothing, entry["status"]) == (None, "absent")
    nothing, entry = contestants.build(Failing, LINEAR, weight, None)
    assert (nothing, entry["detail"]) == (None, "IndexError: out of range")


def test_a_whole_step_is_measured_and_profiled() -> None:
    pytest.importorskip("transformers")
    item = {"name": "resnet18", "batch": 2, "size": 32}
    request = {"shapes": {}, "sparsities": [0.9], "profile_sparsity": 0.9, "peers": False}
    request.update(tuned=False, budget_s=0.01, min_rounds=2)
    (row,), profiles = models.measure_model(item, request, threads=1)
    own = row["contestants"]["sparsetrain"]
    assert own["status"] == "ok"
    assert own["x_dense"]["rounds"] == 2
    dense, sparse = (profile["kinds"] for profile in profiles)
    assert "sparse convolution" in sparse
    assert "sparse convolution" not in dense
    assert dense["dense convolution"] > sparse["dense convolution"] > 0  # the first stays dense
    assert {"optimizer", "batch norm, layer norm", "pooling"} <= set(sparse)


def test_a_model_with_one_wrong_layer_is_reported() -> None:
    pytest.importorskip("transformers")
    network = models.model_zoo.build("resnet18", batch=2, size=32)
    masked = models.mask_layers(network, 0.9)
    expected = models.signature(network, masked)
    good = models.CONTESTANTS["sparsetrain"](network, masked)
    assert models.check(network, good, expected)["status"] == "ok"
    with torch.no_grad():
        layer = next(m for m in good.modules() if hasattr(m, "values") and m.nnz > 1000)
        layer.values[:100] *= 1.5
    assert models.check(network, good, expected)["status"] == "wrong"


def test_a_crash_ends_one_contestant_only() -> None:
    calls = []

    def crash() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise IndexError("out of range")

    turns = [
        timing.Turn("good", lambda: None),
        timing.Turn("bad", crash),
        timing.Turn("gauge", lambda: 2.5, gauge=True),
    ]
    rounds = timing.interleave(turns, budget_s=0.02, min_rounds=4, turn_s=1e-5)
    assert len(turns[0].values) == rounds >= 4
    assert turns[1].values == []
    assert turns[1].error == "IndexError: out of range"
    assert turns[2].values == [2.5] * rounds


def test_ratios_pair_the_times_of_one_round() -> None:
    slow_then_fast = timing.ratios([8.0, 4.0, 2.0], [4.0, 2.0, 1.0])
    assert slow_then_fast == {"median": 2.0, "p25": 2.0, "p75": 2.0, "rounds": 3}
    assert timing.ratios([3.0, 9.0], [1.0])["rounds"] == 1


def test_a_hopelessly_slow_contestant_gets_two_rounds() -> None:
    turns = [
        timing.Turn("fast", lambda: None),
        timing.Turn("slow", lambda: time.sleep(0.006)),
    ]
    timing.interleave(turns, budget_s=0.01, min_rounds=4, turn_s=1e-5)
    assert [len(turn.values) for turn in turns] == [4, 2]


def test_only_who_is_still_open_gets_more_rounds() -> None:
    turns = [timing.Turn(name, lambda: None) for name in ("dense", "open", "settled")]

    def still_open() -> set[str]:
        return {"dense", "open"} if len(turns[1].values) < 9 else set()

    rounds = timing.interleave(
        turns, budget_s=5.0, min_rounds=4, max_rounds=4, turn_s=1e-5, still_open=still_open
    )
    assert rounds == 9
    assert [len(turn.values) for turn in turns] == [9, 9, 4]


def test_more_rounds_end_with_the_budget() -> None:
    turns = [timing.Turn("dense", lambda: time.sleep(0.001))]
    begin = time.perf_counter()
    timing.interleave(
        turns, budget_s=0.05, min_rounds=2, max_rounds=2, turn_s=1e-3, still_open=lambda: {"dense"}
    )
    assert 0.05 <= time.perf_counter() - begin < 5
    assert len(turns[0].values) > 2


@pytest.mark.parametrize(
    ("values", "limit", "expected"),
    [
        ([], 0.5, False),
        ([1.0], 0.5, False),
        ([4.0, 4.2, 4.1], 0.97, True),  # few, but nowhere near
        ([0.8, 0.82, 0.81], 0.97, True),
        ([1.0, 1.05, 1.1], 0.97, False),
        ([0.9, 0.95], 0.97, False),
        ([1.0] * 6, 0.5, True),
        ([1.0] * 6, 1.5, True),
        ([0.9, 1.1] * 20, 1.0, False),
        ([0.9] * 8 + [1.1] * 32, 1.0, True),
        ([0.9] * 15 + [1.1] * 25, 1.0, False),
    ],
)
def test_a_limit_is_decided_where_the_median_surely_is_on_one_side(
    values: list[float], limit: float, expected: bool
) -> None:
    assert timing.decided(values, limit) is expected


def test_layers_near_their_floor_are_measured_longer() -> None:
    layer = layer_from({"name": "tiny", "inputs": 16, "outputs": 16, "batch": 4})
    settings = Settings(1, 0.3, 6, 1e-4, False, False, False, (), 6)
    near = {"x_dense": {"floor": 1e-9}}
    bench = LayerBench(layer, [0.5, 0.9], settings)
    # 0 is reached for certain, and so is no limit at all: only the first is open
    ratio = iter([False] * 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_bench, "decided", lambda _, floor: floor != 1e-9 or next(ratio, True))
        rows = bench.measure(None, [near, {"x_dense": {"floor": 0.0}}])
    rounds = [len(row["contestants"]["sparsetrain"]["round_ms"]) for row in rows]
    assert rounds == [9, 6]
    assert [row["looks"] for row in rows] == [1, 1]


def test_names_of_layers_may_have_commas() -> None:
    asked = "fc,3x3 64->64, 56x56 (resnet18), batch 1,,x"
    assert parts_of_names(asked) == ("fc", "3x3 64->64, 56x56 (resnet18), batch 1", "x")
    assert parts_of_names("") == ()


def test_who_misses_a_floor_gets_a_second_look() -> None:
    layer = layer_from({"name": "tiny", "inputs": 16, "outputs": 16, "batch": 4})
    settings = Settings(1, 0.3, 6, 1e-4, False, False, False, (), 6)
    bench = LayerBench(layer, [0.5, 0.9], settings)
    built: list[list[float]] = []

    class Other(LayerBench):
        def __init__(self, layer: Any, sparsities: list[float], settings: Any) -> None:
            built.append(sparsities)
            super().__init__(layer, sparsities, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_bench, "decided", lambda *_: True)
        patch.setattr(layer_bench, "LayerBench", Other)
        rows = bench.measure(None, [{"x_dense": {"floor": 0.0}}, {"x_dense": {"floor": 1e9}}])
    assert built == [[0.9]]
    assert [row["looks"] for row in rows] == [1, 2]
    times = [
        {name: entry["round_ms"] for name, entry in row["contestants"].items()} for row in rows
    ]
    assert [len(each["sparsetrain"]) for each in times] == [6, 12]
    both = rows[1]["contestants"]["sparsetrain"]
    assert both["x_dense"]["rounds"] == both["ms"]["rounds"] == 12


def test_times_of_two_looks_stay_those_of_the_same_rounds() -> None:
    first = {"dense": [1.0, 2.0, 3.0, 4.0], "sparsetrain": [5.0, 6.0, 7.0], "peer": [8.0, 9.0]}
    again = {"dense": [10.0, 20.0], "sparsetrain": [30.0, 40.0]}
    assert layer_bench.pooled(first, again) == {
        "dense": [1.0, 2.0, 3.0, 10.0, 20.0],
        "sparsetrain": [5.0, 6.0, 7.0, 30.0, 40.0],
        "peer": [8.0, 9.0],
    }


@pytest.mark.parametrize(
    ("median", "most", "expected"),
    [(1.0, False, "MISSED"), (2.0, False, "floor"), (4.0, False, "aim"), (1.0, True, "floor")],
)
def test_verdicts(median: float, most: bool, expected: str) -> None:
    aim = None if most else 3.5
    assert verdicts.judge({"median": median}, 2.0, aim, most) == expected
    assert verdicts.judge(None, 2.0) == "not measured"


def test_break_even_is_where_the_speedup_passes_one() -> None:
    assert break_even([(0.0, 0.5), (0.75, 2.0)]) == pytest.approx(0.5)
    assert break_even([(0.0, 0.9), (0.2, 1.1), (0.5, 0.5), (0.875, 2.0)]) == pytest.approx(0.75)
    assert break_even([(0.0, 1.5), (0.5, 2.0)]) is None
    assert break_even([]) is None


@pytest.mark.parametrize(
    ("speedups", "measured", "verdict"),
    [
        ((0.5, 0.7, 2.0), 0.4, "floor"),
        ((0.5, 0.6, 0.9), 1.0, "MISSED"),
        ((1.1, 1.2, 2.0), 0.0, "floor"),
        ((1.1, 0.8, 0.7), 1.0, "MISSED"),
    ],
    ids=str,
)
def test_a_late_break_even_is_missed(speedups: Any, measured: float, verdict: str) -> None:
    rows = [
        {
            **{"layer": "a", "batch": 8, "sparsity": sparsity, "threads": 1, "targets": {}},
            **{"contestants": {"sparsetrain": {"x_dense": {"median": speedup}}}, "kernels": {}},
        }
        for sparsity, speedup in zip((0.0, 0.3, 0.6), speedups, strict=True)
    ]
    data = {"limits": {"break_even": {"a, batch 8": 0.45}}, "runs": [{"threads": 1, "rows": rows}]}
    (found,) = verdicts.layer_verdicts(data)
    assert found["measured"]["median"] == pytest.approx(measured, abs=0.06)
    assert found["verdict"] == verdict


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children with their parent")
def test_a_killed_benchmark_leaves_no_process_behind(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    (tmp_path / "sleeper.py").write_text(
        "import os, time\n"
        "def child(request, save):\n"
        f"    open({str(note)!r} + '.partial', 'w').write(str(os.getpid()))\n"
        f"    os.replace({str(note)!r} + '.partial', {str(note)!r})\n"
        "    time.sleep(120)\n"
    )
    code = "from sparsetrain.bench.processes import run_child; run_child('sleeper', {}, 1)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
        try:
            _wait_for(note.exists)
        finally:
            parent.kill()
    child = Path("/proc") / note.read_text() / "stat"
    _wait_for(lambda: not child.exists() or child.read_text().split()[2] == "Z")


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_memory_accounting_is_complete_and_small() -> None:
    for layer in (
        Layer("a", "linear", 1024, 256, 64),
        Layer("b", "conv2d", 64, 64, 2, size=8, kernel=3),
    ):
        found = memory.account(layer, 0.9)
        assert found["bytes"]["values"] == found["bytes"]["gradient"] == 4 * found["nnz"]
        assert found["bytes"]["pattern"] >= 4 * found["nnz"] + 4 * (layer.outputs + 1)
        assert found["bytes"]["plan"] > 0
        assert found["verdict"] == "met"


@pytest.mark.parametrize(
    ("linear", "peak", "verdict"),
    [(True, 219, "met"), (True, 230, "MISSED"), (False, 250, "met"), (False, 251, "MISSED")],
)
def test_peaks_are_judged(linear: bool, peak: int, verdict: str) -> None:
    dense = {"kind": "dense", "peak": 200, "needed": 200, "input": 80}
    _, sparse = memory.judged_peaks(dense, {**dense, "kind": "sparse", "peak": peak}, linear)
    assert sparse["verdict"] == verdict


def test_peaks_of_other_libraries_stand_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(contestants.Dense):
        name = "other"
        kinds = ("conv2d",)

    class Absent(Other):
        name = "absent"

        def __init__(self, *_: object) -> None:
            raise ImportError("no such library")

    monkeypatch.setattr(contestants, "PEERS", (Other, Absent))
    layer = Layer("a", "conv2d", 8, 8, 4, size=16, kernel=3)
    assert memory.peers_of(layer) == ["other"]
    assert memory.peers_of(Layer("b", "linear", 8, 8, 4)) == []
    peak = memory.peak_task("other", dataclasses.asdict(layer))
    assert peak["kind"] == "other"
    assert peak["peak"] >= 0
    assert peak["needed"] > 0
    beside = memory._beside({**peak, "peak": 30}, {"peak": 20})
    assert beside["x_dense"] == 1.5
    assert "verdict" not in beside


def test_results_in_kept_memory_are_part_of_a_peak() -> None:
    layer = Layer("a", "conv2d", 16, 16, 32, size=160, kernel=3)  # results of 50 MiB
    peak = memory.peak_task("sparse", dataclasses.asdict(layer))
    assert peak["peak"] > 0.9 * peak["needed"] > 80 * 2**20


def test_a_kept_copy_of_the_input_is_seen() -> None:
    class Copying(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.clone())

    x = torch.randn(16, 32, requires_grad=True)
    assert memory.saved_extra(Copying(), x) >= x.numel() * 4
    saved = memory.saved_inputs(64, 32) + memory.saved_by_convolutions()
    assert all(row["extra_bytes_saved"] == 0 for row in saved)


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


@needs_compiler
def test_ceilings_are_measured(tmp_path: Path) -> None:
    result = tmp_path / "ceilings.json"
    done = bench("ceilings", "--quick", "--threads", "1", "--peers", "--json", result)
    assert done.exit_code == 0, done.output
    (run,) = json.loads(result.read_text())["runs"]
    *levels, dense = run["ceilings"]
    assert levels == ["registers", "L1", "L2", "L3", "memory"]
    assert run["ceilings"]["registers"]["median"] > run["ceilings"][dense]["median"] > 0
    assert run["ceilings"]["registers"]["median"] > run["ceilings"]["memory"]["median"] > 0
    assert "GF/s, 1 thread" in done.stdout


@needs_compiler
def test_ceilings_say_what_the_kernels_of_asked_layers_reach(tmp_path: Path) -> None:
    result, shapes = tmp_path / "ceilings.json", tmp_path / "mine.toml"
    shapes.write_text(
        "sparsities = [0.5]\nquick_sparsities = [0.5]\nbudget_s = 0.2\nquick_budget_s = 0.2\n"
        '[[layer]]\nname = "mine"\nkind = "linear"\ninputs = 64\noutputs = 64\nbatch = 256\n'
    )
    options = ["--quick", "--threads", "1", "--sparsity", "0.8,0.9", "--shapes", shapes]
    done = bench("ceilings", *options, "--json", result)
    assert done.exit_code == 0, done.output
    (run,) = json.loads(result.read_text())["layers"]["runs"]
    assert [row["sparsity"] for row in run["rows"]] == [0.8, 0.9]
    for row in run["rows"]:
        assert all(
            0 < kernel["fraction_of_l1"]["median"] < 1.5 for kernel in row["kernels"].values()
        )
    assert "Kernels alone against the L1 ceiling, 1 thread" in done.stdout
    done = bench("ceilings", "--quick", "--threads", "1", "--layers", "no such layer")
    assert done.exit_code == 2


def test_without_a_compiler_the_ceilings_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="no compiler was found: install g"):
        ceilings._compiler()


def test_threads_are_compared_in_one_process(tmp_path: Path) -> None:
    shapes, result = tmp_path / "shapes.toml", tmp_path / "out.json"
    shapes.write_text(SHAPES_FILE)
    done = bench("threads", "--shapes", shapes, "--layers", "conv", "--quick", "--json", result)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(result.read_text())["runs"][0]["rows"]
    assert row["scaling"]["sparsetrain"]["rounds"] >= 2
    assert "Time on one thread / time on 2 threads" in done.stdout


def test_the_layers_of_a_network_are_read_off_it() -> None:
    pytest.importorskip("transformers")
    tables = model_layers.model_layers(["resnet18", "minilm"], [1, 8])
    layers = [layer_from(table) for table in tables]
    assert len(layers) == len(set(layers)) == 2 * (12 + 5)
    assert [layer.batch for layer in layers] == sorted((b.batch for b in layers), reverse=True)
    strided = [layer for layer in layers if layer.stride == 2 and layer.kernel == 3]
    assert {(layer.inputs, layer.outputs, layer.size) for layer in strided} == {
        (64, 128, 56),
        (128, 256, 28),
        (256, 512, 14),
    }
    assert {(a.inputs, a.outputs, a.tokens) for a in layers if a.name.endswith("(minilm)")} >= {
        (384, 384, 128),
        (384, 1536, 128),
        (1536, 384, 128),
    }
