"""Where the examples find their data: in installed packages, or unpacked beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

FASHION = Path("usr/share/datasets/fashion-mnist")


def package_folder(name: str, distribution: str = "") -> Path:
    """Where the package `name` is installed, without importing it."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        package = distribution or name.replace("_", "-")
        sys.exit(f"error: {package} is not installed; run: pip install --no-deps {package}")
    return Path(spec.origin).parent


def _prepared(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of the environment (`sys.prefix`), filled once: whole, or not there at all."""
    folder = Path(sys.prefix) / "share" / "sparsetrain-examples" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            fill(Path(temporary))
            os.replace(Path(temporary) / name, folder)
    return folder


def fashion_mnist() -> Path:
    """The folder of Fashion-MNIST: of the Debian package, installed or unpacked here without root.

    Exits with an error that says what to do if neither works.
    """
    installed = Path("/") / FASHION
    return installed if installed.is_dir() else _prepared("fashion-mnist", _unpack_fashion)


def king_james() -> str:
    """The King James Bible, one verse a line, without the verses' numbers.

    From the Debian package bible-kjv-text; exits with an error that names it if it is missing.
    """
    try:
        done = subprocess.run(
            ["bible", "-f", "gen1:1-rev22:21"],
            stdin=subprocess.DEVNULL,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(
            f"error: cannot get the King James text: {error}\n"
            "Install it with `apt-get install bible-kjv-text` (Debian or Ubuntu), or hand over any "
            "text file: --data FILE"
        )
    return "".join(f"{line.partition(' ')[2]}\n" for line in done.stdout.splitlines())


def _unpack_fashion(temporary: Path) -> None:
    _call(["apt-get", "download", "dataset-fashion-mnist"], temporary)
    _call(["dpkg", "-x", next(file.name for file in temporary.glob("*.deb")), "."], temporary)
    shutil.move(temporary / FASHION, temporary / "fashion-mnist")


def _call(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        sys.exit(
            f"error: cannot get Fashion-MNIST: {' '.join(command[:2])}: {said[-1]}\n"
            "Install the Debian or Ubuntu package dataset-fashion-mnist, or hand over the folder "
            "of its four *-ubyte.gz files: --data FOLDER"
        )


def solar_cells() -> Path:
    """Photos of solar cells, from the package elpv-dataset: folders `functional`, `defective`.

    Defective are those that experts gave a probability above one half.
    """
    source = package_folder("elpv_dataset", "elpv-dataset") / "data"

    def fill(temporary: Path) -> None:
        target = temporary / "solar-cells"
        for line in (source / "labels.csv").read_text(encoding="ascii").splitlines():
            name, probability, _ = line.split()
            label = "defective" if float(probability) > 0.5 else "functional"
            (target / label).mkdir(parents=True, exist_ok=True)
            os.symlink(source / name, target / label / Path(name).name)

    return _prepared("solar-cells", fill)
