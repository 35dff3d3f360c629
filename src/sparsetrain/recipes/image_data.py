"""Reading images and their classes: a folder of image folders, or idx files as of MNIST."""

from __future__ import annotations

import gzip
import hashlib
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from sparsetrain.recipes.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
IDX_IMAGES = re.compile(r"images?[-.]idx3[-.]ubyte(\.gz)?$")


@dataclass(frozen=True)
class ImageSet:
    """Images of one size and their classes.

    images: uint8 (n, channels, height, width), channels 1 or 3; labels: int64 (n,), indices into
    `classes`; test: numbers of the images that are meant for testing, None where the set makes no
    difference; skipped: files that could not be decoded and were left out.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    test: list[int] | None = None
    skipped: list[str] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Hash of images and labels: a resumed run must see the data that it started with."""
        digest = hashlib.sha256(str((tuple(self.images.shape), self.classes, self.test)).encode())
        digest.update(self.labels.numpy().tobytes())
        for part in torch.split(self.images, 4096):
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()


def read_images(
    path: Path,
    size: int | None = None,
    skip_bad: bool = False,
    started: Callable[[int], None] = lambda total: None,
    decoded: Callable[[str], None] = lambda name: None,
) -> ImageSet:
    """Read `path`: one folder of image files per class, or a folder with idx files.

    idx files (gzipped or not) are named as those of MNIST: `*images-idx3-ubyte`, with
    `*labels-idx1-ubyte` beside it; where both a `train` and a `t10k` or `test` pair are there, the
    latter is the test set.

    size: images are resized to `size` x `size` pixels; without it all must have one size. skip_bad:
    leave files out that cannot be decoded, and list them. started, decoded: told the number of
    files and each file, to show progress.

    Raises InputError, naming the file, for anything that cannot be used: no such folder, no images,
    a damaged file, images of several sizes without `size`, fewer than two classes, or a class with
    fewer than two images (one has to go into each side of the split).
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise InputError(f"data: {path} {what}; give a folder of class folders or of idx files")
    listing = _listing(path)
    if any(IDX_IMAGES.search(p.name) for p in listing):
        found = _read_idx_folder(path, listing)
        found = found if size is None else _resized(found, size)
    else:
        found = _read_folder(path, listing, size, skip_bad, started, decoded)
    _check_classes(path, found)
    return found


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith((".", "_")))
    except OSError as error:
        raise InputError(f"data: cannot read {folder}: {error.strerror or error}") from error


def _check_classes(path: Path, found: ImageSet) -> None:
    if len(found.classes) < 2:
        raise InputError(f"data: {path} has one class {found.classes}; training needs at least 2")
    test = set(found.test or ())
    labels = found.labels.tolist()
    counts = Counter(labels)
    held_out = Counter(labels[i] for i in test)
    for index, name in enumerate(found.classes):
        trained = counts[index] - held_out[index]
        if found.test is None and trained < 2:
            raise InputError(
                f"data: class {name!r} in {path} has {trained} image(s); at least 2 are needed, "
                "one to train on and one to test on"
            )
        if found.test is not None and not (trained and held_out[index]):
            side = "test" if trained else "training"
            raise InputError(f"data: class {name!r} in {path} has no {side} image")


# ---- folders of image files ----------------------------------------------------------------------


def _read_folder(
    root: Path,
    listing: Sequence[Path],
    size: int | None,
    skip_bad: bool,
    started: Callable[[int], None],
    decoded: Callable[[str], None],
) -> ImageSet:
    folders = [p for p in listing if p.is_dir()]
    if not folders:
        raise InputError(
            f"data: {root} has neither class folders nor idx files; expected {root}/<class>/*.png "
            "(or jpg, bmp, gif, webp, tif) or *images-idx3-ubyte[.gz]"
        )
    files: list[tuple[Path, int]] = []
    for index, folder in enumerate(folders):
        own = [(p, index) for p in _listing(folder) if p.suffix.lower() in SUFFIXES]
        if not own:
            raise InputError(f"data: class folder {folder} has no image file")
        files += own
    started(len(files))
    kept: list[Any] = []
    labels: list[int] = []
    skipped: list[str] = []
    shape: tuple[int, ...] | None = None
    for file, label in files:
        try:
            image = _decode(file, size)
        except Exception as error:  # Pillow's readers raise whatever they stumble over
            if not skip_bad:
                raise InputError(
                    f"data: {file} cannot be decoded ({_reason(error)}); remove it, or leave such "
                    "files out with --skip-bad"
                ) from error
            skipped.append(str(file.relative_to(root)))
            decoded(f"skipped {file.name}")
            continue
        if shape is None:
            shape, first = image.shape[:2], file
        elif image.shape[:2] != shape:
            raise InputError(
                f"data: images have several sizes: {first} {shape[1]}x{shape[0]}, {file} "
                f"{image.shape[1]}x{image.shape[0]}; give one with --size"
            )
        kept.append(image)
        labels.append(label)
        decoded(folders[label].name)
    classes = [folder.name for folder in folders]
    if not kept:
        raise InputError(f"data: none of the {len(files)} image files in {root} can be decoded")
    return ImageSet(_stacked(kept), torch.tensor(labels), classes, skipped=skipped)


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _decode(file: Path, size: int | None) -> Any:
    """uint8 (height, width) of a grey image, (height, width, 3) of any other, upright."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits per pixel
            wide = numpy.asarray(image).astype(numpy.int64)
            image = Image.fromarray((wide >> 8).clip(0, 255).astype(numpy.uint8))
        grey = image.mode in ("1", "L", "LA", "F")
        image = image.convert("L" if grey else "RGB")
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return numpy.array(image)


def _stacked(images: Sequence[Any]) -> Tensor:
    """(n, 1 or 3, height, width): grey where all are."""
    coloured = any(image.ndim == 3 for image in images)
    height, width = images[0].shape[:2]
    stacked = numpy.empty((len(images), 3 if coloured else 1, height, width), numpy.uint8)
    for target, image in zip(stacked, images, strict=True):
        target[:] = image.transpose(2, 0, 1) if image.ndim == 3 else image
    return torch.from_numpy(stacked)


# ---- idx files -----------------------------------------------------------------------------------


def _read_idx_folder(root: Path, listing: Sequence[Path]) -> ImageSet:
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for file in listing:
        if IDX_IMAGES.search(file.name):
            side = "test" if re.search("t10k|test", file.name) else "train"
            if side not in pairs:  # the plain file sorts before the gzipped one
                pairs[side] = _read_idx_pair(file)
    if "train" not in pairs:
        raise InputError(f"data: {root} has test images but no train-images-idx3-ubyte[.gz]")
    images, labels = pairs["train"]
    test = None
    if "test" in pairs:
        if pairs["test"][0].shape[1:] != images.shape[1:]:
            raise InputError(
                f"data: training and test images in {root} have different sizes: "
                f"{tuple(images.shape[1:])} and {tuple(pairs['test'][0].shape[1:])}"
            )
        test = list(range(len(images), len(images) + len(pairs["test"][0])))
        images = torch.cat([images, pairs["test"][0]])
        labels = torch.cat([labels, pairs["test"][1]])
    classes, numbers = torch.unique(labels, return_inverse=True)
    return ImageSet(images[:, None], numbers, [str(c) for c in classes.tolist()], test)


def _read_idx_pair(images: Path) -> tuple[Tensor, Tensor]:
    name = images.name.replace("image", "label").replace("idx3", "idx1")
    candidates = [images.with_name(name), images.with_name(name.removesuffix(".gz"))]
    candidates += [images.with_name(name + ".gz")]
    labels = next((p for p in candidates if p.is_file()), None)
    if labels is None:
        raise InputError(f"data: {images} has no labels beside it; expected {candidates[0].name}")
    pixels, numbers = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(numbers):
        raise InputError(
            f"data: {images} holds {len(pixels)} images, {labels} {len(numbers)} labels"
        )
    return pixels, numbers


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 tensor in an idx file, gzipped or not, of so many dimensions.

    Raises InputError, naming the file, if it is damaged or something else.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
                raise InputError(
                    f"data: {path} is no idx file of bytes in {dimensions} dimension(s); it begins "
                    f"with {header[:4].hex(' ') or 'nothing'}, expected 00 00 08 0{dimensions}"
                )
            shape = numpy.frombuffer(header, ">u4", offset=4).astype(int).tolist()
            expected = math.prod(shape)
            content = bytearray()
            while len(content) <= expected and (piece := file.read(1 << 24)):
                content += piece
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"data: {path} is damaged or unreadable ({_reason(error)})") from error
    if len(content) != expected:
        more = "more than " if len(content) > expected else f"{len(content)} of "
        raise InputError(f"data: {path} is damaged: it holds {more}{expected} bytes of {shape}")
    if expected == 0:
        raise InputError(f"data: {path} is empty: its header says {shape}")
    return torch.frombuffer(content, dtype=torch.uint8).view(shape)


def _resized(found: ImageSet, size: int) -> ImageSet:
    """All images at `size` x `size`, bilinear with antialiasing."""
    parts = [
        torch.nn.functional.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        for part in torch.split(found.images, 1024)
    ]
    images = torch.cat([part.round_().clamp_(0, 255).to(torch.uint8) for part in parts])
    return ImageSet(images, found.labels, found.classes, found.test, found.skipped)
