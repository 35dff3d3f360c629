"""How the examples find their data, and what they say where it cannot be had."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module examples/_data.py, in an environment of its own without Fashion-MNIST."""
    spec = importlib.util.spec_from_file_location("_data", ROOT / "examples" / "_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FASHION", Path("usr/share/datasets/not-installed"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    return module


def command(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{script}")
    (folder / name).chmod(0o755)


def test_fashion_mnist_is_unpacked_once(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    command(tools, "apt-get", "import sys; open(sys.argv[2] + '_1.deb', 'w').write('x')")
    made = "os.makedirs('usr/share/datasets/not-installed'); "
    command(
        tools,
        "dpkg",
        f"import os, sys; assert sys.argv[2] == 'dataset-fashion-mnist_1.deb'; {made}"
        "open('usr/share/datasets/not-installed/x-ubyte.gz', 'w').write(sys.argv[1])",
    )
    monkeypatch.setenv("PATH", str(tools))
    folder = data.fashion_mnist()
    assert [path.name for path in folder.iterdir()] == ["x-ubyte.gz"]
    assert [path.name for path in folder.parent.iterdir()] == ["fashion-mnist"]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert data.fashion_mnist() == folder


@pytest.mark.parametrize("script", [None, "import sys; sys.exit('E: Unable to locate package')"])
def test_fashion_mnist_that_cannot_be_had(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None
) -> None:
    if script is not None:
        command(tmp_path / "tools", "apt-get", script)
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    with pytest.raises(SystemExit) as caught:
        data.fashion_mnist()
    message = str(caught.value)
    assert message.startswith("error: cannot get Fashion-MNIST: apt-get download: ")
    assert "dataset-fashion-mnist" in message
    assert "--data FOLDER" in message
    assert script is None or "E: Unable to locate package" in message
    assert not any((tmp_path / "env").rglob("*mnist*"))


def test_solar_cells_are_sorted_into_classes(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "elpv_dataset"
    (package / "data" / "images").mkdir(parents=True)
    (package / "__init__.py").touch()
    rows = ["1.0", "0.3333333333333333", "0.0", "0.6666666666666666"]
    lines = [f"images/cell{i}.png  {p}   mono" for i, p in enumerate(rows)]
    (package / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    for number in range(4):
        (package / "data" / "images" / f"cell{number}.png").write_text(str(number))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    folder = data.solar_cells()
    found = sorted(path.relative_to(folder) for path in folder.glob("*/*"))
    assert [str(path) for path in found] == [
        os.path.join("defective", "cell0.png"),
        os.path.join("defective", "cell3.png"),
        os.path.join("functional", "cell1.png"),
        os.path.join("functional", "cell2.png"),
    ]
    assert (folder / "defective" / "cell3.png").read_text() == "3"


def test_a_missing_package_is_named(data: Any) -> None:
    with pytest.raises(SystemExit, match=r"no-such-thing is not installed; run: pip install"):
        data.package_folder("no_such_thing")
