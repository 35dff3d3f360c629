"""Reading images: folders and idx files, and one clear line for everything that is wrong."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from sparsetrain.recipes.errors import InputError
from sparsetrain.recipes.image_data import read_idx, read_images
from tiny_images import CLASSES, idx, save_folder, save_idx, stripes


def test_folder(tmp_path: Path) -> None:
    found = read_images(save_folder(tmp_path / "d", count=3))
    assert found.images.shape == (9, 1, 12, 12)
    assert found.images.dtype == torch.uint8
    assert found.classes == list(CLASSES)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert torch.equal(found.images[4, 0], torch.from_numpy(stripes(1, 1)))
    assert (found.test, found.skipped) == (None, [])


def test_one_coloured_image_makes_three_channels_of_all(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "d", count=2)
    red = numpy.zeros((12, 12, 3), numpy.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(folder / "down" / "red.bmp")
    found = read_images(folder)
    assert found.images.shape == (7, 3, 12, 12)
    grey = torch.from_numpy(stripes(0, 0))
    assert torch.equal(found.images[0], grey.expand(3, -1, -1))
    assert found.images[4].flatten(1).float().mean(1).tolist() == [200, 0, 0]


def test_sixteen_bits_palette_and_transparency(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "d", count=2)
    wide = (numpy.arange(144).reshape(12, 12) * 256 + 7).astype(numpy.uint16)
    Image.fromarray(wide).save(folder / "across" / "wide.png")
    found = read_images(folder)
    assert torch.equal(found.images[2, 0], torch.arange(144).view(12, 12).to(torch.uint8))
    Image.new("RGBA", (12, 12), (9, 8, 7, 100)).save(folder / "down" / "clear.png")
    Image.new("P", (12, 12)).save(folder / "down" / "palette.gif")
    found = read_images(folder)
    assert found.images[5, :, 0, 0].tolist() == [9, 8, 7]
    assert len(found.labels) == 9


def test_size_resizes_and_mixed_sizes_need_it(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "d", count=2)
    Image.fromarray(stripes(1, 9, size=20)).save(folder / "down" / "large.png")
    assert read_images(folder, size=10).images.shape == (7, 1, 10, 10)
    with pytest.raises(InputError, match=r"000\.png 12x12, .*large\.png 20x20; give .*--size"):
        read_images(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path: Path, zipped: bool) -> None:
    found = read_images(save_idx(tmp_path / "d", count=2, zipped=zipped, test=1))
    assert found.images.shape == (9, 1, 12, 12)
    assert found.labels.tolist() == [0, 1, 2] * 3
    assert found.test == [6, 7, 8]
    assert torch.equal(found.images[4, 0], torch.from_numpy(stripes(1, 1)))
    assert read_images(tmp_path / "d", size=8).images.shape == (9, 1, 8, 8)


def test_idx_files_without_a_test_set(tmp_path: Path) -> None:
    assert read_images(save_idx(tmp_path / "d", test=0)).test is None


def test_fingerprint_sees_every_change(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "d", count=2)
    before = read_images(folder).fingerprint()
    assert read_images(folder).fingerprint() == before
    (folder / "down").rename(folder / "downward")
    renamed = read_images(folder).fingerprint()
    image = stripes(0, 0)
    image[3, 4] ^= 1
    Image.fromarray(image).save(folder / "across" / "000.png")
    assert len({before, renamed, read_images(folder).fingerprint()}) == 3


# ---- bad input -----------------------------------------------------------------------------------


def _truncated(folder: Path) -> Path:
    file = folder / "down" / "000.png"
    file.write_bytes(file.read_bytes()[:-60])
    return file


def _text(folder: Path) -> Path:
    file = folder / "down" / "readme.jpg"
    file.write_text("no image")
    return file


def _empty(folder: Path) -> Path:
    file = folder / "slanted" / "void.png"
    file.touch()
    return file


@pytest.mark.parametrize("damage", [_truncated, _text, _empty])
def test_corrupt_image_is_named_or_skipped(tmp_path: Path, damage: Callable[[Path], Path]) -> None:
    folder = save_folder(tmp_path / "d", count=3)
    file = damage(folder)
    count = len(list(folder.glob("*/*.*")))
    with pytest.raises(InputError, match=rf"{file.name} cannot be decoded.*--skip-bad"):
        read_images(folder)
    found = read_images(folder, skip_bad=True)
    assert found.skipped == [str(file.relative_to(folder))]
    assert len(found.labels) == count - 1


def test_class_with_one_image_left(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "d", count=2)
    _truncated(folder)
    with pytest.raises(InputError, match=r"class 'down' .* has 1 image"):
        read_images(folder, skip_bad=True)


def test_no_image_can_be_decoded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "x.png").write_text("no")
    with pytest.raises(InputError, match="none of the 2 image files"):
        read_images(tmp_path / "d", skip_bad=True)


def _missing(path: Path) -> None:
    pass


def _file(path: Path) -> None:
    path.write_text("x")


def _nothing(path: Path) -> None:
    path.mkdir()


def _hollow(path: Path) -> None:
    save_folder(path)
    (path / "hollow").mkdir()
    (path / "hollow" / "notes.txt").write_text("x")


def _lonely(path: Path) -> None:
    save_folder(path)
    (path / "lonely").mkdir()
    Image.fromarray(stripes(0, 0)).save(path / "lonely" / "1.png")


def _one_class(path: Path) -> None:
    (path / "only").mkdir(parents=True)
    for number in range(2):
        Image.fromarray(stripes(0, number)).save(path / "only" / f"{number}.png")


def _idx(name: str, change: Callable[[bytes], bytes], zipped: bool = False) -> Callable[..., None]:
    def write(path: Path) -> None:
        save_idx(path, zipped=zipped)
        file = path / (name + (".gz" if zipped else ""))
        content = file.read_bytes()
        file.unlink()
        if changed := change(content):
            file.write_bytes(changed)

    write.__name__ = f"idx_{name}"
    return write


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (_missing, "does not exist"),
        (_file, "is a file; give a folder"),
        (_nothing, "neither class folders nor idx files"),
        (_hollow, "hollow has no image file"),
        (_lonely, "class 'lonely' .* has 1 image"),
        (_one_class, "one class"),
        (_idx(IMAGES, lambda b: b[:-1]), r"images-idx3-ubyte is damaged: it holds \d+ of \d+"),
        (_idx(IMAGES, lambda b: b + b"x"), "is damaged: it holds more than"),
        (_idx(IMAGES, lambda b: b[:9]), "no idx file of bytes in 3 dimension"),
        (_idx(IMAGES, lambda b: b"\x00\x00\x0d\x03" + b[4:]), "begins with 00 00 0d 03"),
        (_idx(IMAGES, lambda b: b[:-40], zipped=True), "gz is damaged or unreadable"),
        (_idx(IMAGES, lambda b: b"PK" + b[2:], zipped=True), "gz is damaged or unreadable"),
        (_idx(IMAGES, lambda b: b[:30] + b"\xff" * 9 + b[39:], zipped=True), "is damaged"),
        (_idx(IMAGES, lambda b: b""), "no train-images-idx3-ubyte"),
        (_idx(LABELS, lambda b: b""), "has no labels beside it; expected train-labels-idx1"),
        (_idx(LABELS, lambda b: idx(numpy.zeros(5))), "72 images, .* 5 labels"),
        (_idx(LABELS, lambda b: idx(numpy.zeros(72))), "class '1' .* has no training image"),
        (_idx(LABELS, lambda b: b"no"), "labels-idx1-ubyte is no idx file"),
    ],
)
def test_bad_data(tmp_path: Path, make: Callable[[Path], None], named: str) -> None:
    make(tmp_path / "d")
    with pytest.raises(InputError, match=named) as caught:
        read_images(tmp_path / "d")
    assert str(caught.value).startswith("data: ")


def test_header_that_promises_too_much_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "huge.gz"
    file.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + b"\x7f\xff\xff\xff" * 3 + b"abc"))
    with pytest.raises(InputError, match="it holds 3 of"):
        read_idx(file, 3)
