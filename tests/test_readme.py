"""README: its Python runs, its commands and options exist, its tables are those of the results."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from sparsetrain.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    found = blocks("python")
    assert len(found) >= 3
    namespace: dict[str, Any] = {}
    for number, code in enumerate(found):
        exec(compile(code, f"README.md, Python block {number + 1}", "exec"), namespace)
    assert "SparseLinear" in capsys.readouterr().out


def test_first_example_has_ten_lines() -> None:
    first = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(first) <= 10


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)`", README))
    named |= {
        line.split()[1] for b in blocks("sh") for line in b.splitlines() if "make " in line[:5]
    }
    assert named
    assert named <= targets


def test_commands_and_options_exist() -> None:
    lines = [
        line for b in blocks("sh") for line in b.splitlines() if line.startswith("sparsetrain")
    ]
    assert lines
    for line in lines:
        words = shlex.split(line)[1:]
        command: Any = get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tool("readme_tables").generate(README, ROOT / "benchmarks" / "results") == README
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    recipes = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert tool("recipe_tables").generate(recipes, ROOT / "docs" / "recipes") == recipes
