"""The command line: help, JSON, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsetrain.cli import app
from tiny_text import save_tiny_model, save_tiny_texts

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "model")


def fails(*arguments: object) -> str:
    """Run, expect exit code 2 and one line on standard error; returns that line."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    return str(result.stderr)


def test_info_as_json() -> None:
    result = runner.invoke(app, ["info", "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert {"isa", "cpu_model", "caches", "threads", "versions"} <= set(facts)


def test_info_as_text() -> None:
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0
    assert "cpu model" in result.stdout


@pytest.mark.parametrize("command", [["info"], ["train", "text"], ["train", "image"]])
def test_help_has_examples(command: list[str]) -> None:
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"sparsetrain {' '.join(command)}" in result.stdout


def test_train_text_prints_json(model: Path, tmp_path: Path) -> None:
    data = save_tiny_texts(tmp_path / "texts", count=4)
    arguments = ["--model", model, "--data", data, "--out", tmp_path / "out", "--json"]
    short = ["--steps", 2, "--prune-steps", 2, "--seq-length", 8, "--batch", 64]
    result = runner.invoke(app, [str(a) for a in ["train", "text", *arguments, *short]])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["lanes"]["sparse"]["accuracy"] >= 0.0
    line = fails("train", "text", *arguments, *short)
    assert "--resume" in line
    assert "--overwrite" in line


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--sparsity", 1.0, "sparsity: got 1.0"),
        ("--sparsity", -0.1, "sparsity: got -0.1"),
        ("--sparsity", math.nan, "sparsity: got nan"),
        ("--batch", 0, "batch: got 0"),
        ("--lr", math.inf, "lr: got inf"),
        ("--steps", 0, "steps: got 0"),
        ("--epochs", -1, "epochs: got -1"),
        ("--test-fraction", 1, "test-fraction: got 1.0"),
        ("--distribution", "magic", "distribution: got 'magic'"),
        ("--seq-length", 64, "seq-length: got 64, the model takes at most 32"),
        ("--seed", -1, "seed"),
        ("--threads", 0, "threads: got 0"),
    ],
)
def test_bad_option(model: Path, tmp_path: Path, option: str, value: object, named: str) -> None:
    data = save_tiny_texts(tmp_path / "texts", count=2)
    out = tmp_path / "out"
    line = fails("train", "text", "--model", model, "--data", data, "--out", out, option, value)
    assert named in line
    assert not out.exists()


def _missing(path: Path) -> None:
    pass


def _no_classes(path: Path) -> None:
    path.mkdir()


def _empty_file(path: Path) -> None:
    save_tiny_texts(path, count=3)
    (path / "animals" / "void.txt").write_text(" \n")


def _one_sample(path: Path) -> None:
    save_tiny_texts(path, count=3)
    (path / "lonely").mkdir()
    (path / "lonely" / "only.txt").write_text("one of a kind")


def _one_sample_twice(path: Path) -> None:
    _one_sample(path)
    (path / "lonely" / "copy.txt").write_text("one of a kind")


def _no_texts(path: Path) -> None:
    save_tiny_texts(path, count=3)
    (path / "hollow").mkdir()


def _one_class(path: Path) -> None:
    (path / "only").mkdir(parents=True)
    (path / "only" / "a.txt").write_text("a")
    (path / "only" / "b.txt").write_text("b")


def _binary(path: Path) -> None:
    save_tiny_texts(path, count=3)
    (path / "animals" / "photo.txt").write_bytes(bytes(range(256)))


def _csv(content: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(content)

    write.__name__ = "csv_" + "".join(c if c.isalnum() else "_" for c in content[:16])
    return write


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (_missing, "does not exist"),
        (_no_classes, "no class folders"),
        (_empty_file, "void.txt is empty"),
        (_one_sample, "class 'lonely'"),
        (_one_sample_twice, "has 1 different document"),
        (_no_texts, "hollow has no .txt file"),
        (_one_class, "one class ('only')"),
        (_binary, "photo.txt is not text"),
        (_csv(""), "is empty"),
        (_csv("text,label\n"), "no rows"),
        (_csv("text,topic\na,x\n"), "no column 'label'"),
        (_csv("text,label\na,x\n,y\n"), "line 3: an empty text or label"),
        (_csv("text,label\na,x,y\n"), "line 2: too many fields"),
        (_csv('text,label\n"a,x\n'), "unexpected end of data"),
    ],
)
def test_bad_data(model: Path, tmp_path: Path, make: Callable[[Path], None], named: str) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    make(data)
    line = fails("train", "text", "--model", model, "--data", data, "--out", out)
    assert named in line
    assert "data: " in line
    assert not out.exists()


def test_unknown_model_folder(tmp_path: Path) -> None:
    data = save_tiny_texts(tmp_path / "texts", count=2)
    line = fails(
        "train", "text", "--model", tmp_path / "no", "--data", data, "--out", tmp_path / "o"
    )
    assert "is not a model folder" in line


def test_broken_model_folder(tmp_path: Path) -> None:
    data = save_tiny_texts(tmp_path / "texts", count=2)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    line = fails(
        "train", "text", "--model", tmp_path / "model", "--data", data, "--out", tmp_path / "o"
    )
    assert "cannot load" in line
    assert not (tmp_path / "o").exists()


def test_out_cannot_be_made(model: Path, tmp_path: Path) -> None:
    data = save_tiny_texts(tmp_path / "texts", count=2)
    (tmp_path / "file").write_text("precious")
    out = tmp_path / "file" / "out"
    arguments = ["--model", model, "--data", data, "--out", out, "--seq-length", 8]
    assert "out: cannot make" in fails("train", "text", *arguments)


def test_out_is_a_file(model: Path, tmp_path: Path) -> None:
    data = save_tiny_texts(tmp_path / "texts", count=2)
    out = tmp_path / "out"
    out.write_text("precious")
    line = fails("train", "text", "--model", model, "--data", data, "--out", out, "--overwrite")
    assert "is a file" in line
    assert out.read_text() == "precious"
