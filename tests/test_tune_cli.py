"""`sparsetrain tune`, as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsetrain import _plan_store
from sparsetrain.cli import app

BUILD = """
import torch
from sparsetrain.nn import SparseLinear

def build():
    return torch.nn.Sequential(SparseLinear(24, 16, sparsity=0.8)), (torch.randn(4, 24),)

def wrong():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mymodel.py").write_text(BUILD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_of_the_users_is_tuned_kept_and_explained(folder: Path) -> None:
    cache, out = folder / "cache.json", folder / "plans.json"
    options = ["--explain", "--budget", "30", "--out", str(out), "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "sparsetrain.cli", "tune", "mymodel:build", *options],
        env=os.environ | {"SPARSETRAIN_PLANS": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for word in ("layer", "forward", "grad_input", "grad_values", "4x24 -> 16", "3 of 3 products"):
        assert word in done.stdout
    assert _plan_store.read(cache) == _plan_store.read(out)
    assert len(_plan_store.read(out)) == 3


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_examples_as_json(name: str) -> None:
    options = ["--json", "--no-keep", "--budget", "0.2", "--batch", "2"]
    result = CliRunner().invoke(app, ["tune", name, *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert len([row for row in rows if row["direction"] != "step"]) == 9
    assert rows[0]["direction"] == "forward"
    assert set(rows[0]) >= {"layers", "density", "chosen", "default", "seconds", "gains"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "MODEL must be MODULE:FUNCTION or one of mlp"),
        ("nowhere:build", "cannot be imported"),
        ("mymodel:missing", "cannot be imported"),
        ("mymodel:wrong", "must return"),
    ],
)
def test_wrong_models_are_one_line(folder: Path, model: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparsetrain.cli", "tune", model],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_has_examples() -> None:
    result = CliRunner().invoke(app, ["tune", "--help"])
    assert result.exit_code == 0
    assert "sparsetrain tune transformer" in result.output
