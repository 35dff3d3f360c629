"""Train a convolutional network on images, with sparse weights: from scratch or from given weights.

From scratch the network starts dense and is pruned while it trains; given weights are pruned first
(or keep their zeros, if they are sparse enough) and then fine-tuned on what is left. All
convolutions but the first are made sparse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.recipes.engine import Batch
from sparsetrain.recipes.errors import InputError
from sparsetrain.recipes.image_data import ImageSet, read_images
from sparsetrain.recipes.image_models import (
    NETWORKS,
    SMALLEST,
    build_network,
    first_convolution,
    hidden_convolutions,
    load_weights,
    read_weights,
)
from sparsetrain.recipes.launch import Recipe, launch, resolve_steps, save_json, save_weights
from sparsetrain.recipes.options import RunOptions
from sparsetrain.recipes.progress import Progress
from sparsetrain.recipes.text_data import stratified_split

#: Peak learning rate of SGD from scratch, and from given weights.
RATES = (0.05, 0.01)


@dataclass(frozen=True, kw_only=True)
class ImageOptions(RunOptions):
    """Options of `sparsetrain train image`; the command line's help describes each."""

    model: Path | None = None
    network: str = "resnet18"
    width: int | None = None
    size: int | None = None
    flip: bool = False
    skip_bad: bool = False
    batch: int = 64
    weight_decay: float = 5e-4

    def check(self) -> None:
        """Raise InputError, naming the option, if a value is out of range."""
        super().check()
        for name in ("width", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: got {value}, expected at least 1")
        if self.network not in NETWORKS:
            raise InputError(f"network: got {self.network!r}, expected {' or '.join(NETWORKS)}")
        if self.model is not None and not self.model.is_file():
            raise InputError(f"model: {self.model} is no file; give a state_dict of torch.save")

    @staticmethod
    def with_defaults(model: Path | None, **values: Any) -> ImageOptions:
        """Options whose None stands for what suits training from scratch, or from `model`."""
        scratch = model is None
        usual = {"algorithm": "gmp" if scratch else "static", "lr": RATES[0 if scratch else 1]}
        filled: dict[str, Any] = {
            k: usual[k] if v is None and k in usual else v for k, v in values.items()
        }
        return ImageOptions(model=model, **filled)


class ImageTask:
    """Images of one size, normalised by the mean and deviation of the training images."""

    def __init__(self, found: ImageSet, train: list[int], test: list[int], flip: bool) -> None:
        """train, test: image numbers; flip: mirror every other training image at random."""
        self._images, self._labels = found.images, found.labels
        self._train, self._test = torch.tensor(train), torch.tensor(test)
        self._flip = flip
        self.mean, self.deviation = self._statistics()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (channels, 1, 1) of the training images."""
        levels = torch.arange(256, dtype=torch.float64)
        means, deviations = [], []
        for channel in range(self._images.shape[1]):
            pixels = self._images[self._train, channel].flatten()
            share = torch.bincount(pixels, minlength=256).double() / pixels.numel()
            mean = (share * levels).sum()
            means.append(mean)
            deviations.append((share * (levels - mean) ** 2).sum().sqrt().clamp(min=1.0))
        shape = (-1, 1, 1)
        return torch.stack(means).float().view(shape), torch.stack(deviations).float().view(shape)

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return self._train.numel()

    def _take(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (batch, channels, height, width) and labels (batch,)."""
        images = self._images[numbers].float().sub_(self.mean).div_(self.deviation)
        return images, self._labels[numbers]

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        """Training images `indices`, as inputs and labels."""
        images, labels = self._take(self._train[indices])
        if self._flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return {"x": images}, labels

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy."""
        inputs, labels = batch
        return nn.functional.cross_entropy(model(**inputs), labels)

    def evaluate(self, model: nn.Module) -> float:
        """Share of test images classified right."""
        right = 0
        for numbers in torch.split(self._test, 128):
            images, labels = self._take(numbers)
            right += int((model(images).argmax(1) == labels).sum())
        return right / self._test.numel()


def _given_weights(
    options: ImageOptions, found: ImageSet
) -> tuple[ImageOptions, ImageSet, Mapping[str, Tensor] | None]:
    """Width and channels as the weights want them: grey images are repeated for three channels."""
    if options.model is None:
        return dataclasses.replace(options, width=options.width or 64), found, None
    weights = read_weights(options.model)
    first = first_convolution(weights, options.network, options.model)
    width, channels = first.shape[:2]
    if options.width not in (None, width):
        raise InputError(
            f"width: got {options.width}, but {options.model} holds a network of width {width}"
        )
    own = found.images.shape[1]
    if own == 1 and channels == 3:
        found = dataclasses.replace(found, images=found.images.expand(-1, 3, -1, -1))
    elif own != channels:
        raise InputError(
            f"data: the images have {own} channel(s), but the first convolution in "
            f"{options.model} takes {channels}"
        )
    return dataclasses.replace(options, width=width), found, weights


def _check_size(options: ImageOptions, found: ImageSet) -> int:
    height, width = found.images.shape[2:]
    smallest = SMALLEST[options.network]
    if min(height, width) < smallest:
        raise InputError(
            f"data: images of {width}x{height} pixels are too small for {options.network}, which "
            f"takes {smallest}x{smallest} or more; give --size"
        )
    return int(min(height, width))


def _split(options: ImageOptions, found: ImageSet) -> tuple[list[int], list[int]]:
    if found.test is None:
        return stratified_split(found.labels.tolist(), options.test_fraction, options.seed)
    held_out = set(found.test)
    return [i for i in range(len(found.labels)) if i not in held_out], found.test


def _read(options: ImageOptions, progress: Progress) -> ImageSet:
    with progress:
        return read_images(
            options.data,
            options.size,
            options.skip_bad,
            lambda total: progress.start("read", total),
            progress.advance,
        )


def run(options: ImageOptions, progress: Progress) -> dict[str, Any]:
    """Run the whole recipe; returns the report, which is also in `out`/report.json.

    Raises InputError before anything is written if an option, the data or the weights are no good.
    """
    options.check()
    found = _read(options, progress)
    fingerprint = found.fingerprint()
    options, found, weights = _given_weights(options, found)
    size = _check_size(options, found)
    train, test = _split(options, found)
    task = ImageTask(found, train, test, options.flip)
    options = resolve_steps(options, task.train_size)

    def build() -> nn.Module:
        assert options.width is not None
        channels, classes = found.images.shape[1], len(found.classes)
        model = build_network(options.network, channels, classes, options.width, size, options.seed)
        if weights is not None and options.model is not None:
            load_weights(model, weights, options.model)
        return model

    def save(folder: Path, model: nn.Module) -> None:
        save_json(_description(options, found, task), folder / "config.json")
        save_weights(model, folder / "model.safetensors")

    build()  # weights that do not fit are refused before anything is written
    recipe = Recipe(
        options,
        task,
        build,
        hidden_convolutions,
        optimizer="sgd",
        trained=weights is not None,
        identity={"data contents": fingerprint},
        facts=_facts(found, train, test),
        name=options.network,
        summary=f"{len(found.labels)} images of {tuple(found.images.shape[1:])} in "
        f"{len(found.classes)} classes ({len(found.skipped)} bad ones skipped), {len(train)} to "
        f"train on, {len(test)} to test on",
        save=save,
    )
    return launch(recipe, progress)


def _facts(found: ImageSet, train: list[int], test: list[int]) -> dict[str, Any]:
    return {
        "classes": found.classes,
        "image_shape": list(found.images.shape[1:]),
        "train_images": len(train),
        "test_images": len(test),
        "skipped_images": found.skipped,
    }


def _description(options: ImageOptions, found: ImageSet, task: ImageTask) -> dict[str, Any]:
    """What it takes to build the network again and feed it."""
    return {
        "network": options.network,
        "width": options.width,
        "channels": found.images.shape[1],
        "height": found.images.shape[2],
        "image_width": found.images.shape[3],
        "mean": task.mean.flatten().tolist(),
        "deviation": task.deviation.flatten().tolist(),
        "classes": found.classes,
    }
