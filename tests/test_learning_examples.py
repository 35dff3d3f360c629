"""The examples on learning: they run on little data; docs/learning.md shows what they measured."""

from __future__ import annotations

import importlib
import math
import shlex
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsetrain.bench.processes import read_json

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "learning.md"
RESULTS = ROOT / "benchmarks" / "results" / "learning"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the folder examples; `python` in processes of its own does as well."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.fixture
def at_once(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the examples in this process, which is faster than one of its own for each."""

    def child_of(module: str, request: Any, threads: int) -> Any:
        return example(module).child(request, lambda data: None)

    for name in ("_learning", "learning", "learning_text"):
        monkeypatch.setattr(example(name), "child_of", child_of)


def call(module: Any, *words: object) -> str:
    result = CliRunner().invoke(module.app, [str(word) for word in words])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def save_images(folder: Path) -> Path:
    """Idx files of 96 images to learn from and 40 to test."""
    folder.mkdir()
    source = torch.Generator().manual_seed(0)
    for name, count in (("train", 96), ("t10k", 40)):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        images = torch.randint(256, (count, 28, 28), generator=source, dtype=torch.uint8)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head + images.numpy().tobytes())
        head = struct.pack(">II", 2049, count)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.numpy().tobytes())
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("at_once")
def test_images_from_training_to_the_page(example: Any, tmp_path: Path) -> None:
    learning, out = example("learning"), tmp_path / "out"
    words = ["--data", save_images(tmp_path / "data"), "--out", out, "--steps", 4, "--width", 4]
    words += ["--sparsity", 0.8, "--seed", 0]
    names = ["dense", "masks", "Static", "RigL"]
    chosen = [word for name in names for word in ("--algorithm", name)]
    assert call(learning, "train", *words, *chosen).count("seed 0") == 4
    runs = {name: read_json(out / f"fashion-{name}-0.json") for name in names}
    assert runs["RigL"]["updates"] == 2
    assert runs["Static"]["final_sparsity"] == pytest.approx(0.8, abs=0.01)
    # Masks over dense weights are the same training as Static.
    assert runs["masks"]["losses"] == pytest.approx(runs["Static"]["losses"], abs=2e-3)
    assert runs["dense"]["losses"] != pytest.approx(runs["Static"]["losses"], abs=2e-3)
    assert "seed 0" not in call(learning, "train", *words, *chosen)  # all there already
    page = tmp_path / "page.md"
    page.write_text("<!-- measured:begin fashion -->\nold\n<!-- measured:end -->\n")
    assert "| RigL |" in call(learning, "report", "--out", out, "--page", page)
    assert "| RigL |" in page.read_text()
    assert "old" not in page.read_text()
    assert (out / "fashion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.usefixtures("at_once")
def test_text_from_training_to_the_table(example: Any, tmp_path: Path) -> None:
    learning, out, text = example("learning_text"), tmp_path / "out", tmp_path / "text"
    text.write_text("abcdefgh ijkl\n" * 400)
    words = ["--data", text, "--out", out, "--steps", 30, "--width", 32, "--layers", 1]
    names = ["dense", "RigL-80", "small-80"]
    call(learning, "train", *words, *(word for name in names for word in ("--run", name)))
    runs = {name: read_json(out / f"text-{name}-0.json") for name in names}
    assert runs["dense"]["validation_loss"] < math.log(14)  # better than chance
    sparse, small = runs["RigL-80"]["parameters"], runs["small-80"]["parameters"]
    assert small == pytest.approx(sparse, rel=0.02)
    assert runs["small-80"]["width"] < 32
    assert [step for step, _ in runs["dense"]["validation"]] == list(range(0, 30, 3))
    assert "RigL, 80 %" in call(learning, "report", "--out", out)
    assert (out / "text.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("learning", ["--width", 4, "--size", 8, "--batch", 8]),
        ("learning_text", ["--width", 32, "--layers", 1, "--batch", 2]),
    ],
)
def test_costs(example: Any, tmp_path: Path, name: str, words: list[Any]) -> None:
    module = example(name)
    known = torch.get_num_threads()
    words = [*words, "--repeats", 1, "--out", tmp_path]
    call(module, "cost", *words, "--threads", known, "--no-memory")
    call(module, "cost", *words, "--threads", 0)
    (file,) = tmp_path.glob("cost-*.json")
    found = read_json(file)
    assert [run["threads"] for run in found["times"]] == [known]
    assert set(found["times"][0]["milliseconds"]) == {"dense", "masks", "Static", "RigL update"}
    sizes = found["times"][0]["state_bytes"]
    assert sizes["Static"] < sizes["dense"] < sizes["masks"]
    assert set(found["peaks"]) == {"dense", "masks", "Static", "RigL"}
    assert "masks over dense weights" in call(module, "report", "--out", tmp_path)


@pytest.mark.slow
def test_a_process_of_its_own_measures_the_peak(example: Any) -> None:
    request = {"task": "peak", "name": "dense", "width": 8, "size": 8, "batch": 64, "sparsity": 0.9}
    peak = example("_learning").child_of("learning", request, 1)["peak_bytes"]
    images = 64 * 8 * 8 * 4  # of the first stage's activations alone
    assert 8 * images < peak < 1e9


def test_small_networks_have_as_many_parameters_as_sparse_ones(example: Any) -> None:
    text = example("learning_text")
    narrow, inner = text.smaller(192, 3, 70, 0.9)
    model = text.network(70, narrow, 3, inner)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == text.parameters(narrow, inner, 3, 70)
    assert count == pytest.approx(text.kept(192, 3, 70, 0.9), rel=0.005)


def test_a_run_of_another_name_is_refused(example: Any, tmp_path: Path) -> None:
    for name, option in (("learning", "--algorithm"), ("learning_text", "--run")):
        module = example(name)
        result = CliRunner().invoke(module.app, ["train", option, "magic", "--data", str(tmp_path)])
        assert result.exit_code == 2
        assert "magic: choose from" in result.output


def test_the_king_james_text_that_cannot_be_had(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = example("_data")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"apt-get install bible-kjv-text.*--data FILE"):
        data.king_james()
    program = tmp_path / "bible"
    program.write_text("#!/bin/sh\necho 'Ge1:1 In the beginning'\necho 'Ge1:2 And'\n")
    program.chmod(0o755)
    assert data.king_james() == "In the beginning\nAnd\n"


def test_the_page_has_the_tables_of_the_committed_results(example: Any) -> None:
    page = PAGE.read_text(encoding="utf-8")
    report = example("_learning_report")
    assert report.generate(page, RESULTS) == page
    assert set(report.SECTIONS) == {name for _, name, _ in report.BLOCK.findall(page)}
    for plot in ("fashion", "text"):
        assert f"../benchmarks/results/learning/{plot}.png" in page
        assert (RESULTS / f"{plot}.png").stat().st_size < 200_000


def test_the_page_s_commands_exist(example: Any) -> None:
    page = PAGE.read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("python examples/learning")]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        module = example(Path(words[0]).stem)
        result = CliRunner().invoke(module.app, [words[1], "--help"])
        assert result.exit_code == 0
        for option in (word for word in words if word.startswith("--")):
            assert option in result.output
