"""Small image sets that a small network can learn: stripes of three directions, with noise."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy

CLASSES = ("across", "down", "slanted")


def stripes(label: int, number: int, size: int = 12) -> numpy.ndarray:
    """uint8 (size, size): stripes in direction `label`, shifted and noisy by `number`."""
    rng = numpy.random.default_rng(1000 * label + number)
    rows, columns = numpy.mgrid[:size, :size]
    position = (rows, columns, rows + columns)[label] + rng.integers(4)
    image = 200.0 * (position % 4 < 2) + rng.normal(25, 15, (size, size))
    return image.clip(0, 255).astype(numpy.uint8)


def save_folder(folder: Path, count: int = 6, size: int = 12, colour: bool = False) -> Path:
    """Write `count` PNG files per class as folder/<class>/<number>.png."""
    from PIL import Image

    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = Image.fromarray(stripes(label, number, size))
            image = image.convert("RGB") if colour else image
            image.save(folder / name / f"{number:03}.png")
    return folder


def idx(array: numpy.ndarray) -> bytes:
    """The content of an idx file of bytes."""
    header = bytes([0, 0, 8, array.ndim]) + numpy.array(array.shape, ">u4").tobytes()
    return header + array.astype(numpy.uint8).tobytes()


def save_idx(folder: Path, count: int = 24, zipped: bool = True, test: int = 8) -> Path:
    """Write `count` training and `test` test images per class as idx files, as MNIST has them."""
    folder.mkdir(parents=True, exist_ok=True)
    sides = [("train", 0, count), ("t10k", count, count + test)]
    for side, first, last in sides if test else sides[:1]:
        pairs = [(label, number) for number in range(first, last) for label in range(3)]
        images = numpy.stack([stripes(label, number) for label, number in pairs])
        labels = numpy.array([label for label, _ in pairs])
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            file = folder / f"{side}-{name}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(content) if zipped else content)
    return folder
