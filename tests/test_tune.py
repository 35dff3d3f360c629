"""The tuner, with invented measurements, and its cache, with real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsetrain
from helpers import CountOps, deterministic
from sparsetrain import _plan_store, conv_ops, ops
from sparsetrain._measure import Timing, compare
from sparsetrain._plan_store import Entry, bucket, key_of
from sparsetrain.nn import SparseConv2d, SparseConv3d, SparseLinear

Candidates = Mapping[str, Callable[[], object]]


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins, and ends, without a measurement."""

    def forget() -> None:
        _plan_store._KNOWN.entries = None
        for planner in (ops.PLANNER, conv_ops.PLANNER):
            planner.forget()

    forget()
    yield
    forget()


def invented(seconds: Mapping[str, float], noise: float = 0.0) -> Any:
    """A `compare` that calls each candidate once and gives these figures; a step that mixes
    families takes the mean of theirs."""

    def measure(candidates: Candidates, budget_s: float) -> dict[str, Timing]:
        for call in candidates.values():
            call()
        parts = {name: name.split(" + ") for name in candidates}
        means = {name: sum(seconds[f] for f in p) / len(p) for name, p in parts.items()}
        return {name: Timing(mean, noise, 5) for name, mean in means.items()}

    return measure


DENSE_WINS = invented({"native": 2.0, "dense": 1.0, "unfolded": 2.0})


def used_by(model: nn.Module, x: torch.Tensor) -> list[str]:
    with CountOps() as counted, torch.no_grad():
        model(x)
    return counted.names


# --------------------------------------------------------------------------------------------------
# compare, on a clock of its own


class Clock:
    """Time passes only while a candidate runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *seconds: float) -> Callable[[], None]:
        """A candidate that takes these seconds, over and over."""
        count = 0

        def call() -> None:
            nonlocal count
            self.now += seconds[count % len(seconds)]
            count += 1
            self.calls.append(name)

        return call


def test_candidates_take_turns_and_the_median_counts() -> None:
    clock = Clock()
    found = compare(
        {"a": clock.taking("a", 1.0), "b": clock.taking("b", 1.1)}, budget_s=1000, clock=clock
    )
    assert clock.calls[:4] == ["a", "a", "b", "b"]  # warmed
    assert clock.calls[4:] == ["a", "b"] * 21
    assert found["a"].seconds == pytest.approx(1.0)
    assert found["b"].seconds == pytest.approx(1.1)
    assert found["a"].noise == pytest.approx(0.0, abs=1e-9)


def test_slow_moments_are_left_out_and_noise_is_seen() -> None:
    clock = Clock()
    quiet = clock.taking("quiet", 1.0, 1.0, 1.0, 1.0, 9.0)
    restless = clock.taking("restless", 1.0, 1.2)
    found = compare({"quiet": quiet, "restless": restless}, budget_s=1e6, clock=clock)
    assert found["quiet"].seconds == pytest.approx(1.0)
    assert found["restless"].noise > 0.02


def test_a_hopeless_candidate_is_dropped_early() -> None:
    clock = Clock()
    found = compare(
        {"fast": clock.taking("fast", 1.0), "slow": clock.taking("slow", 3.0)},
        budget_s=1e6,
        clock=clock,
    )
    assert found["slow"].turns == 5
    assert found["fast"].turns == 5  # alone, there is nothing left to compare


def test_the_budget_ends_the_turns_but_each_has_one() -> None:
    clock = Clock()
    found = compare(
        {"a": clock.taking("a", 1.0), "b": clock.taking("b", 1.0)}, budget_s=0.0, clock=clock
    )
    assert {timing.turns for timing in found.values()} == {1}


def test_short_calls_are_repeated() -> None:
    clock = Clock()
    found = compare({"a": clock.taking("a", 1e-5)}, budget_s=10, clock=clock)
    assert len(clock.calls) > 10 * found["a"].turns
    assert found["a"].seconds == pytest.approx(1e-5)


# --------------------------------------------------------------------------------------------------
# tune


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        SparseLinear(24, 24, sparsity=0.9),
        nn.ReLU(),
        SparseLinear(24, 24, sparsity=0.9),
        SparseLinear(24, 8, sparsity=0.9),
    )


def test_a_winner_is_used_and_changes_nothing_else() -> None:
    model, x = mlp(), torch.randn(6, 24)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = model(x)
    assert used_by(model, x) == ["linear"] * 3
    plans = sparsetrain.tune(model, x, cache=False, progress=False, compare=DENSE_WINS)
    assert used_by(model, x) == ["linear_dense"] * 3
    with deterministic():
        assert used_by(model, x) == ["linear"] * 3
    assert used_by(model, torch.randn(7, 24)) == ["linear"] * 3  # not tuned for
    torch.testing.assert_close(model(x), expected)
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert len(plans.entries) == 6


def test_layers_that_are_alike_are_measured_once_and_named_together() -> None:
    plans = sparsetrain.tune(
        mlp(), torch.randn(6, 24), cache=False, progress=False, compare=DENSE_WINS
    )
    assert [row.layers for row in plans.rows] == [("0", "2")] * 3 + [("3",)] * 3  # no doubt left
    assert [row.direction for row in plans.rows[:3]] == ["forward", "grad_input", "grad_values"]
    text = plans.explain()
    assert "0 (+1 alike)" in text
    assert "dense *" in text
    assert "native 2.00x" in text


@pytest.mark.parametrize(
    ("seconds", "noise", "winner"),
    [
        ({"native": 1.0, "dense": 0.5}, 0.0, "dense"),
        ({"native": 1.0, "dense": 0.99}, 0.0, "native"),  # not worth it
        ({"native": 1.0, "dense": 0.9}, 0.06, "native"),  # within noise
        ({"native": 1.0, "dense": 0.9}, 0.01, "dense"),
        ({"native": 1.0, "dense": 2.0}, 0.0, "native"),
    ],
)
def test_the_default_gives_way_to_more_than_noise(
    seconds: dict[str, float], noise: float, winner: str
) -> None:
    plans = sparsetrain.tune(
        mlp(), torch.randn(6, 24), cache=False, progress=False, compare=invented(seconds, noise)
    )
    assert {row.chosen for row in plans.rows} == {winner}
    assert {row.default for row in plans.rows} == {"native"}


def one_by_one(*figures: Mapping[str, float]) -> Any:
    """As `invented`, with figures for each comparison in turn: three products, then steps."""
    left = iter(figures)

    def measure(candidates: Candidates, budget_s: float) -> dict[str, Timing]:
        seconds = next(left)
        assert set(candidates) == set(seconds)
        for call in candidates.values():
            call()
        return {name: Timing(seconds[name], 0.0, 5) for name in candidates}

    return measure


NATIVE, DENSE = {"native": 1.0, "dense": 1.2}, {"native": 1.2, "dense": 1.0}
APART = "dense + dense + native"  # what is fastest for each direction alone, in the test below


def trained_by(model: nn.Module, x: torch.Tensor) -> list[str]:
    with CountOps() as counted:
        model(x.requires_grad_()).sum().backward()
    return [name for name in counted.names if name.startswith("linear")]


def one_layer() -> nn.Module:
    torch.manual_seed(0)
    return SparseLinear(24, 24, sparsity=0.9)


@pytest.mark.parametrize(
    ("steps", "used"),
    [
        ({APART: 3.0}, ["linear_dense", "linear_dense_grad_input", "linear_grad_values"]),
        # One family computes both gradients faster than the two do, whatever each takes alone.
        ({"dense + native + native": 3.0}, ["linear_dense", "linear_backward"]),
        ({"dense": 3.0}, ["linear_dense", "linear_dense_backward"]),
        ({"native": 3.0}, ["linear", "linear_backward"]),
        # The cost model's choice (native) gives way to what is faster by 2 %.
        ({"native": 3.05, "dense": 3.0}, ["linear", "linear_backward"]),
    ],
)
def test_directions_are_chosen_on_their_own_and_steps_together(
    steps: dict[str, float], used: list[str]
) -> None:
    model, x = one_layer(), torch.randn(6, 24)
    ways = (APART, "dense + native + native", "dense", "native")
    figures = dict.fromkeys(ways, 3.2) | steps
    measure = one_by_one(DENSE, DENSE, NATIVE, figures)
    plans = sparsetrain.tune(model, x, cache=False, progress=False, compare=measure)
    assert trained_by(model, x) == used
    directions = ["forward", "grad_input", "grad_values", "step"]
    assert [row.direction for row in plans.rows] == directions
    assert plans.rows[3].seconds == figures
    assert plans.rows[3].default == "native"
    assert len(plans.entries) == 3


def test_steps_that_leave_no_doubt_are_not_compared() -> None:
    clear = {"native": 1.0, "dense": 1.6}
    plans = sparsetrain.tune(
        one_layer(),
        torch.randn(6, 24),
        cache=False,
        progress=False,
        compare=one_by_one(clear, clear, clear, {}),
    )
    assert [row.direction for row in plans.rows] == ["forward", "grad_input", "grad_values"]


def test_convolutions_have_the_families_of_their_kind() -> None:
    seen: list[set[str]] = []

    def measure(candidates: Candidates, budget_s: float) -> Mapping[str, Timing]:
        seen.append(set(candidates))
        return DENSE_WINS(candidates, budget_s)  # type: ignore[no-any-return]

    flat = SparseConv2d(4, 6, 3, padding=1, sparsity=0.8)
    sparsetrain.tune(flat, torch.randn(2, 4, 7, 7), cache=False, progress=False, compare=measure)
    deep = SparseConv3d(4, 6, 3, sparsity=0.8)
    x = torch.randn(2, 4, 5, 5, 5)
    plans = sparsetrain.tune(deep, x, cache=False, progress=False, compare=measure)
    assert seen == [{"native", "dense"}] * 3 + [{"unfolded", "dense"}] * 3
    assert used_by(deep, x) == ["conv_dense"]
    assert plans.rows[0].layers == ("SparseConv3d",)


def test_without_time_the_defaults_stay() -> None:
    model, x = mlp(), torch.randn(6, 24)
    plans = sparsetrain.tune(
        model, x, budget_s=1e-9, cache=False, progress=False, compare=DENSE_WINS
    )
    assert plans.entries == {}
    assert "not measured" in plans.explain()
    assert used_by(model, x) == ["linear"] * 3


def test_real_measurements() -> None:
    plans = sparsetrain.tune(mlp(), torch.randn(6, 24), budget_s=60.0, cache=False, progress=False)
    assert all(row.measured for row in plans.rows)
    directions = [row for row in plans.rows if row.direction != "step"]
    assert all(set(row.seconds) == {"native", "dense"} for row in directions)
    assert all(0 < s < 1 for row in plans.rows for s in row.seconds.values())


@pytest.mark.parametrize(("winner", "used"), [("dense", []), ("native", ["conv2d"])])
def test_convolutions_with_all_their_weights(winner: str, used: list[str]) -> None:
    """The library's own convolution takes the values as they are, or the sparse kernels do."""
    layer = SparseConv2d(8, 9, 3, sparsity=0.0)
    x = torch.randn(2, 8, 7, 7)
    expected = layer.to_dense()(x)
    seconds = {"native": 2.0, "dense": 2.0, winner: 1.0}
    plans = sparsetrain.tune(layer, x, cache=False, progress=False, compare=invented(seconds))
    assert {row.chosen for row in plans.rows} == {winner}
    assert used_by(layer, x) == used
    torch.testing.assert_close(layer(x), expected)
    with deterministic():
        assert used_by(layer, x) == ["conv2d"]


def test_wrong_use_raises_and_leaves_no_hook() -> None:
    with pytest.raises(TypeError, match="model is a list"):
        sparsetrain.tune([], torch.ones(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no sparse layer was computed"):
        sparsetrain.tune(nn.Linear(3, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="budget_s must be a positive number"):
        sparsetrain.tune(mlp(), torch.ones(1, 24), budget_s=0)
    model = mlp()
    with pytest.raises(ValueError, match="input has shape"):
        sparsetrain.tune(model, torch.ones(1, 23))
    assert ops.PLANNER.observer is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --------------------------------------------------------------------------------------------------
# Files


def test_saved_plans_are_used_by_a_process_that_loads_them(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(6, 24)
    plans = sparsetrain.tune(model, x, cache=False, progress=False, compare=DENSE_WINS)
    plans.save(tmp_path / "plans.json")
    _plan_store._KNOWN.entries = None
    ops.PLANNER.forget()
    assert used_by(model, x) == ["linear"] * 3
    loaded = sparsetrain.load_plans(tmp_path / "plans.json")
    assert loaded.entries == plans.entries
    assert used_by(model, x) == ["linear_dense"] * 3


def test_buckets_and_keys_tell_apart_what_matters() -> None:
    assert bucket(100, 100) == "full"
    assert bucket(0, 100) == "none"
    assert bucket(99, 100) == bucket(98, 100) != "full"
    assert len({bucket(round(10_000 * d), 10_000) for d in (0.7, 0.5, 0.2, 0.1, 0.05, 0.01)}) == 6
    base = ("linear", "forward", (8, 64), 32, 200, 2048, torch.float32, 1, ())
    keys = {key_of(*base)}
    for i, other in enumerate(
        ("conv", "grad_input", (9, 64), 33, 900, 9000, torch.float64, 2, ((3, 3), 1))
    ):
        keys.add(key_of(*base[:i], other, *base[i + 1 :]))  # type: ignore[arg-type]
    assert len(keys) == 10


BAD: dict[str, str | bytes] = {
    "empty": "",
    "half": '{"format": 1, "versions": {"sparsetr',
    "no_json": "plans",
    "a_list": "[]",
    "no_plans": '{"format": 1, "versions": {}}',
    "plans_of_a_wrong_kind": '{"format": 1, "versions": {}, "plans": {"k": 3}}',
    "seconds_of_a_wrong_kind": '{"format": 1, "versions": {}, "plans": {"k": '
    '{"family": "dense", "variant": 0, "seconds": {"dense": "soon"}, "noise": 0}}}',
    "deep": "[" * 100_000,
    "bytes": b"\xff\xfe\x00",
    "stale": '{"format": 1, "versions": {"sparsetrain": "0", "torch": "0"}, "plans": {}}',
    "of_the_future": '{"format": 99, "versions": {}, "plans": {}}',
}


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_cache_is_one_warning(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = tmp_path / "plans.json", BAD[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv("SPARSETRAIN_PLANS", str(path))
    model, x = mlp(), torch.randn(6, 24)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert used_by(model, x) == ["linear"] * 3
        assert used_by(model, torch.randn(9, 24)) == ["linear"] * 3
    assert len([w for w in caught if "plans are ignored" in str(w.message)]) == 1
    with pytest.raises(ValueError, match=r"damaged|stale"):
        sparsetrain.load_plans(path)
    sparsetrain.tune(model, x, progress=False, compare=DENSE_WINS)  # writes a good one
    assert len(_plan_store.read(path)) == 6


def test_a_folder_in_place_of_the_cache_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSETRAIN_PLANS", str(tmp_path))
    model, x = mlp(), torch.randn(6, 24)
    with pytest.warns(UserWarning, match="plans are ignored"):
        model(x)
    with pytest.warns(UserWarning, match="plans are not kept"):
        sparsetrain.tune(model, x, progress=False, compare=DENSE_WINS)
    assert used_by(model, x) == ["linear_dense"] * 3  # in this process all the same
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way of a folder")
    with pytest.warns(UserWarning, match="plans are not kept") as caught:
        sparsetrain.tune(
            mlp(),
            torch.randn(6, 24),
            cache=blocked / "plans.json",
            progress=False,
            compare=DENSE_WINS,
        )
    assert len(caught) == 1
    assert blocked.read_text() == "in the way of a folder"


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plans.json"
    _plan_store.write(path, {"k": Entry("dense", 0, {"dense": 1.0}, 0.0)})
    before = path.read_bytes()

    def broken(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        _plan_store.write(path, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plans.json"]


def test_without_platformdirs_tune_says_how_to_keep_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SPARSETRAIN_PLANS")
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.warns(UserWarning, match=r"install sparsetrain\[cli\]"):
        sparsetrain.tune(mlp(), torch.randn(6, 24), progress=False, compare=DENSE_WINS)


def test_an_unknown_family_in_the_cache_is_no_choice(tmp_path: Path) -> None:
    model, x = mlp(), torch.randn(6, 24)
    plans = sparsetrain.tune(model, x, cache=False, progress=False, compare=DENSE_WINS)
    changed = {key: entry._replace(family="magic") for key, entry in plans.entries.items()}
    sparsetrain.Plans(changed).use()
    assert used_by(model, x) == ["linear"] * 3


_CHILD = """
import os, sys, warnings
warnings.simplefilter("error")
from sparsetrain import _plan_store
from sparsetrain._plan_store import Entry
from pathlib import Path
path, me = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for turn in range(40):
    entries = {f"{me} {i}": Entry("dense", 0, {"dense": 1.0}, 0.0) for i in range(200)}
    _plan_store.update(path, entries)
    _plan_store.read(path)
"""


def test_processes_that_write_at_once_never_damage_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(path), str(me)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in range(3)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    assert len(_plan_store.read(path)) >= 200
    assert [p.name for p in tmp_path.iterdir()] == ["plans.json"]


_LATER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from helpers import CountOps
from test_tune import mlp
torch.set_num_threads(int(sys.argv[2]))
with CountOps() as counted, torch.no_grad():
    mlp()(torch.randn(6, 24))
print(*counted.names)
"""


def test_a_later_process_uses_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "plans.json"
    model, x = mlp(), torch.randn(6, 24)
    sparsetrain.tune(model, x, cache=path, progress=False, compare=DENSE_WINS)
    done = subprocess.run(
        [sys.executable, "-c", _LATER, str(Path(__file__).parent), str(torch.get_num_threads())],
        env=os.environ | {"SPARSETRAIN_PLANS": str(path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["linear_dense"] * 3, done.stderr
    content = json.loads(path.read_text())
    assert content["format"] == 1
    assert set(content["versions"]) == {"sparsetrain", "kernels", "torch"}


def test_importing_reads_no_cache_and_no_platformdirs() -> None:
    code = (
        "import sys, sparsetrain\n"
        "from sparsetrain import _plan_store\n"
        "print(_plan_store._KNOWN.entries, 'platformdirs' in sys.modules, 'rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["None", "False", "False"], done.stderr


def test_two_threads_meet_the_cache_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plans.json"
    path.write_text("damaged")
    monkeypatch.setenv("SPARSETRAIN_PLANS", str(path))
    model, x = mlp(), torch.randn(6, 24)
    results: list[torch.Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workers = [threading.Thread(target=lambda: results.append(model(x))) for _ in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
    assert torch.equal(*results)
