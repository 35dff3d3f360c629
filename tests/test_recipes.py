"""The text recipe: data, pruning, agreement of sparse and dense, resume after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sparsetrain.recipes import session as session_module
from sparsetrain.recipes import text
from sparsetrain.recipes.checkpoint import (
    load_checkpoint,
    pack_mask,
    save_checkpoint,
    unpack_mask,
    write_atomically,
)
from sparsetrain.recipes.engine import History, Lane, Schedule
from sparsetrain.recipes.errors import InputError
from sparsetrain.recipes.progress import Progress
from sparsetrain.recipes.pruning import RAMP, apply_masks, cubic_sparsity, magnitude_masks
from sparsetrain.recipes.text_data import read_corpus, stratified_split
from tiny_text import save_tiny_model, save_tiny_texts, sentences
from training_kill import Killed, Killer, Recorder, learned


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return save_tiny_model(folder / "model"), save_tiny_texts(folder / "texts")


@pytest.fixture(scope="module", autouse=True)  # before `uninterrupted`, which must run the same way
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(tiny: tuple[Path, Path], out: Path, **changes: Any) -> text.TextOptions:
    small: dict[str, Any] = {
        "steps": 24,
        "prune_steps": 20,
        "batch": 8,
        "seq_length": 12,
        "lr": 3e-3,
        "evaluate_every": 8,
        "checkpoint_every": 8,
        "compare": True,
    }
    return text.TextOptions(model=tiny[0], data=tiny[1], out=out, **{**small, **changes})


@pytest.fixture(scope="module")
def uninterrupted(
    tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, text.run(options(tiny, out), Progress(quiet=True))


def test_run_writes_report_plot_and_model(uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    out, report = uninterrupted
    assert json.loads((out / "report.json").read_text())["lanes"] == report["lanes"]
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "model" / "classes.json").read_text()) == [
        "animals",
        "colours",
        "numbers",
    ]
    assert report["sparsified_layers"] == 12
    assert not list(out.glob(".*.tmp"))


def test_sparse_and_dense_agree(uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    _, report = uninterrupted
    assert report["loss_agreement"]["largest_relative_difference"] < 1e-4
    sparse, dense = report["lanes"]["sparse"], report["lanes"]["dense"]
    assert sparse["losses"][:10] == pytest.approx(dense["losses"][:10], rel=1e-3)
    assert sparse["curve"][0]["accuracy"] == dense["curve"][0]["accuracy"]
    assert sparse["losses"][-1] < sparse["losses"][0]


def test_report_counts_bytes(uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    _, report = uninterrupted
    sparse, dense = report["lanes"]["sparse"], report["lanes"]["dense"]
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    rows = 2 * (5 * 32 + 64)
    assert dense["weight_bytes"] == 4 * (weights + rows)
    kept = round(0.1 * weights)
    assert sparse["weight_bytes"] == pytest.approx(8 * kept + 4 * (2 * rows + 12), abs=200)
    assert sparse["optimizer_bytes"] < dense["optimizer_bytes"] / 2


def test_saved_model_is_the_trained_one(
    tiny: tuple[Path, Path], uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    from safetensors.torch import load_file

    import sparsetrain

    out, _ = uninterrupted
    fresh = sparsetrain.sparsify(
        text.build_model(options(tiny, out), 3), 0.5, include="encoder.encoder"
    )
    fresh.load_state_dict(load_file(out / "model" / "model.safetensors"), strict=True)
    lane = load_checkpoint(out / "checkpoint.pt")["lanes"]["sparse"]["model"]
    for name, tensor in lane.items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


@pytest.mark.parametrize("steps", [5, 13, 21, 27, 43])
def test_resume_is_bitwise_the_same(
    tiny: tuple[Path, Path],
    tmp_path: Path,
    uninterrupted: tuple[Path, dict[str, Any]],
    steps: int,
) -> None:
    with pytest.raises(Killed):
        text.run(options(tiny, tmp_path), Killer(steps))
    recorder = Recorder()
    report = text.run(options(tiny, tmp_path, resume=True), recorder)
    assert learned(report) == learned(uninterrupted[1])
    phase, done = recorder.starts[0]
    redone = steps - done - (20 if phase == "fine-tune" else 0)
    assert 0 <= redone <= 8


def test_resume_of_a_finished_run_trains_no_further(
    tiny: tuple[Path, Path], uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    out, report = uninterrupted
    recorder = Recorder()
    again = text.run(options(tiny, out, resume=True), recorder)
    assert recorder.starts == [("fine-tune", 24)]
    assert again["lanes"] == report["lanes"] | {"sparse": again["lanes"]["sparse"]}
    assert learned(again) == learned(report)


def test_really_killed_process_resumes(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    chosen = {"steps": 4000, "prune_steps": 0, "checkpoint_every": 10, "evaluate_every": 4000}
    command = [sys.executable, "-m", "sparsetrain.cli", "train", "text", "--threads", "1"]
    for name, value in dataclasses.asdict(options(tiny, out, **chosen)).items():
        if value is not None and value is not False and value != "":
            flag = "--" + name.replace("_", "-")
            command += [flag] if value is True else [flag, str(value)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 300
        while not (out / "checkpoint.pt").exists() or _saved_step(out) < 10:
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert not (out / "report.json").exists()
    reached = _saved_step(out)
    saved = load_checkpoint(out / "checkpoint.pt")["lanes"]["sparse"]["history"]["losses"]
    assert len(saved) == reached
    resumed = Killer(3)
    with pytest.raises(Killed):
        text.run(options(tiny, out, resume=True, **chosen), resumed)
    assert resumed.starts[-1] == ("fine-tune", reached)
    whole = tmp_path / "whole"
    with pytest.raises(Killed):
        text.run(options(tiny, whole, **chosen), Killer(reached + 1))
    straight = load_checkpoint(whole / "checkpoint.pt")["lanes"]["sparse"]["history"]["losses"]
    assert straight == saved


def _saved_step(out: Path) -> int:
    return int(load_checkpoint(out / "checkpoint.pt")["step"])


@pytest.mark.parametrize(
    ("change", "named"), [({"sparsity": 0.8}, "sparsity=0.9"), ({"lr": 1e-4}, "lr=0.003")]
)
def test_resume_with_other_options_is_refused(
    tiny: tuple[Path, Path],
    uninterrupted: tuple[Path, dict[str, Any]],
    change: dict[str, Any],
    named: str,
) -> None:
    out, _ = uninterrupted
    before = (out / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=named):
        text.run(options(tiny, out, resume=True, **change), Progress(quiet=True))
    assert (out / "checkpoint.pt").read_bytes() == before


def test_resume_with_other_data_is_refused(
    tiny: tuple[Path, Path], tmp_path: Path, uninterrupted: tuple[Path, dict[str, Any]]
) -> None:
    other = save_tiny_texts(tmp_path / "texts", count=21)
    chosen = dataclasses.replace(options(tiny, uninterrupted[0], resume=True), data=other)
    with pytest.raises(InputError, match="data contents"):
        text.run(chosen, Progress(quiet=True))


def test_damaged_checkpoint_is_refused(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 no checkpoint")
    with pytest.raises(InputError, match=r"checkpoint\.pt cannot be read"):
        text.run(options(tiny, tmp_path, resume=True), Progress(quiet=True))


def test_disagreeing_losses_fail_loudly(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = session_module.Session._lanes

    def corrupted(*args: Any) -> list[Lane]:
        lanes = make(*args)
        values = lanes[0].model.get_submodule("encoder.encoder.layer.0.output.dense").values
        with torch.no_grad():
            values[0] += 10.0
        return lanes

    monkeypatch.setattr(session_module.Session, "_lanes", corrupted)
    with pytest.raises(RuntimeError, match="losses of the first steps differ"):
        text.run(options(tiny, tmp_path), Progress(quiet=True))


@pytest.mark.parametrize(
    ("step", "difference", "noise"),
    [(0, 3e-5, False), (1, 3e-5, False), (1, 3e-6, True), (3, 5e-4, True), (4, 3e-2, False)],
)
def test_later_losses_may_differ_by_more(step: int, difference: float, noise: bool) -> None:
    lanes: Any = [
        SimpleNamespace(name=name, history=SimpleNamespace(losses=[0.5] * 6))
        for name in ("sparse", "dense")
    ]
    lanes[0].history.losses[step] *= 1 + difference
    if noise:
        session_module.check_agreement(lanes)
    else:
        with pytest.raises(RuntimeError, match=f"at step {step + 1} "):
            session_module.check_agreement(lanes)


def test_sparse_alone_one_shot_with_epochs(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    chosen = options(tiny, tmp_path, compare=False, prune_steps=0, epochs=2.0, dropout=0.1)
    report = text.run(chosen, Progress(quiet=True))
    assert list(report["lanes"]) == ["sparse"]
    assert len(report["lanes"]["sparse"]["losses"]) == 2 * (45 // 8)
    assert "speedup" not in report


# ---- data ---------------------------------------------------------------------------------------


def test_folder_and_csv_give_the_same(tmp_path: Path) -> None:
    folder = save_tiny_texts(tmp_path / "texts", count=4)
    table = tmp_path / "texts.csv"
    rows = sentences(4)
    table.write_text("label,text\n" + "".join(f'{label},"{body}"\n' for body, label in rows))
    assert read_corpus(folder) == read_corpus(table)


def test_duplicates_and_conflicts_are_dropped(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("text,label\na,x\na,x\nb,x\nc,x\nc,y\nd,y\ne,y\n")
    corpus = read_corpus(table)
    assert (corpus.texts, corpus.duplicates, corpus.conflicts) == (list("abde"), 1, 2)


def test_text_in_windows_encoding_is_read(tmp_path: Path) -> None:
    folder = save_tiny_texts(tmp_path / "texts", count=2)
    (folder / "animals" / "zz.txt").write_bytes("cat for £5".encode("cp1252"))
    assert "cat for £5" in read_corpus(folder).texts


def test_split_is_stratified_and_seeded() -> None:
    labels = [0] * 40 + [1] * 8 + [2] * 2
    train, test = stratified_split(labels, 0.25, seed=3)
    assert sorted(train + test) == list(range(50))
    assert [sum(labels[i] == k for i in test) for k in range(3)] == [10, 2, 1]
    assert stratified_split(labels, 0.25, seed=3) == (train, test)
    assert stratified_split(labels, 0.25, seed=4) != (train, test)


# ---- parts --------------------------------------------------------------------------------------


def test_cubic_sparsity_end_points() -> None:
    due = [cubic_sparsity(step, 100, 0.9) for step in range(101)]
    assert due[: int(100 * RAMP[0]) + 1] == [0.0] * (int(100 * RAMP[0]) + 1)
    assert due[-1] == due[int(100 * RAMP[1])] == 0.9
    assert due == sorted(due)


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_masks_keep_the_asked_share(distribution: str) -> None:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(40, 30), "b": nn.Linear(30, 20)}
    masks = magnitude_masks(layers, 0.75, distribution)
    assert sum(int(mask.sum()) for mask in masks.values()) == 450
    apply_masks(layers, masks)
    for name, layer in layers.items():
        kept = layer.weight[masks[name]].abs()
        assert torch.equal(layer.weight != 0, masks[name])
        if distribution == "uniform":
            assert kept.numel() == layer.weight.numel() // 4


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (16, 33)])
def test_packed_masks_come_back(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = pack_mask(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: Path) -> None:
        file.write_text("half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"x": torch.ones(3)})
    assert torch.equal(load_checkpoint(path)["x"], torch.ones(3))
    torch.save({"format": 999}, path)
    with pytest.raises(InputError, match="format 1"):
        load_checkpoint(path)


def test_training_time_leaves_out_interruptions() -> None:
    history = History(seconds=[1.0] * 40 + [0.5] * 40)
    history.seconds[20] = 600.0
    passed = history.elapsed()
    assert passed[:3] == [0.0, 1.0, 2.0]
    assert passed[-1] == 60.0


def test_schedule_covers_every_sample_once_per_epoch() -> None:
    schedule = Schedule(steps=12, batch=4, lr=1.0, weight_decay=0.0, seed=5)
    epoch = torch.cat([schedule.indices(step, 12) for step in range(3)])
    assert sorted(epoch.tolist()) == list(range(12))
    assert not torch.equal(epoch, torch.cat([schedule.indices(s, 12) for s in range(3, 6)]))
    rates = [schedule.learning_rate(step) for step in range(12)]
    assert max(rates) == rates[0] == 1.0
    assert 0.0 < rates[-1] < 0.1
