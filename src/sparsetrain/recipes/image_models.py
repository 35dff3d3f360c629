"""Convolutional networks for `sparsetrain train image`, and reading weights into them.

Names follow the usual ones (conv1, layer1.0.conv1, ... fc; features.0, ...), so that state_dicts
of the common implementations load.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.recipes.errors import InputError

#: Images at least this large get ResNet's 7x7 stem with stride 2 and pooling; smaller ones 3x3.
LARGE = 96


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016, "Deep Residual Learning")."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        result: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return result


class ResNet18(nn.Module):
    """ResNet-18 with `width` channels in its first stage (64 in the paper) and 8 times at its end.

    size: of the images in pixels; from 96 on the stem is 7x7 with stride 2 and max pooling, below
    it is 3x3 with stride 1, as is common for small images.
    """

    def __init__(self, channels: int, classes: int, width: int, size: int) -> None:
        super().__init__()
        if size >= LARGE:
            self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        inputs = width
        for stage in range(4):
            outputs = width << stage
            first = BasicBlock(inputs, outputs, 1 if stage == 0 else 2)
            setattr(
                self, f"layer{stage + 1}", nn.Sequential(first, BasicBlock(outputs, outputs, 1))
            )
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, size, size) -> logits (N, classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class VGG16(nn.Module):
    """VGG16-BN (Simonyan & Zisserman 2015) to its twelfth convolution, and a classifier.

    Twelve, not thirteen, since that is the trunk that detectors built on it keep. The classifier
    is one linear layer on the mean over all places.
    """

    plan = (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8)  # times width; 0: max pooling

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for factor in self.plan:
            if factor == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            outputs = factor * width
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, size, size) -> logits (N, classes)."""
        logits: Tensor = self.fc(self.features(x).mean((2, 3)))
        return logits


NETWORKS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "resnet18": ResNet18,
    "vgg16": lambda channels, classes, width, _: VGG16(channels, classes, width),
}
SMALLEST = {"resnet18": 8, "vgg16": 16}  # pixels


def build_network(
    name: str, channels: int, classes: int, width: int, size: int, seed: int
) -> nn.Module:
    """A network with He's initialisation ("Delving Deep into Rectifiers", 2015), seeded."""
    torch.manual_seed(seed)
    model = NETWORKS[name](channels, classes, width, size)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def hidden_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The layers to be made sparse, by name: all convolutions but the first, which is small."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return dict(list(found.items())[1:])


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state_dict from a file of torch.save, also inside {"state_dict": ...} or {"model": ...}.

    Names lose the prefix "module."; those of a VGG trunk in slices (`...slice2.14.weight`) become
    `features.14.weight`. Raises InputError if the file is unreadable or holds no tensors; nothing
    in it is executed.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"model: cannot load {path} ({type(error).__name__}); expected a state_dict written "
            "by torch.save"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise InputError(f"model: {path} holds a {type(content).__name__}, expected a state_dict")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise InputError(f"model: {path} holds no tensors, expected a state_dict")
    return {_usual_name(key): value for key, value in tensors.items()}


def _usual_name(key: str) -> str:
    sliced = re.search(r"(?:^|\.)slice[1-4]\.(\d+\.\w+)$", key)
    return f"features.{sliced[1]}" if sliced else key.removeprefix("module.")


def first_convolution(weights: Mapping[str, Tensor], network: str, path: Path) -> Tensor:
    """The first convolution's weight (width, channels, k, k), which says how wide a network is."""
    name = {"resnet18": "conv1.weight", "vgg16": "features.0.weight"}[network]
    weight = weights.get(name)
    if weight is None or weight.ndim != 4:
        raise InputError(
            f"model: {path} is no {network}: it has no convolution {name}; its names begin with "
            f"{', '.join(list(weights)[:3])}"
        )
    return weight


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> list[str]:
    """Copy all weights but the classifier's, which is copied only where it fits.

    Returns the names in the file that the model has no use for. Raises InputError if one is
    missing or has another shape, changing nothing.
    """
    own = model.state_dict()
    chosen: dict[str, Tensor] = {}
    for name, tensor in own.items():
        loaded = weights.get(name)
        fits = loaded is not None and loaded.shape == tensor.shape
        if fits and loaded is not None:
            chosen[name] = loaded
        elif name.endswith("num_batches_tracked") or name.startswith("fc."):
            continue
        elif loaded is None:
            raise InputError(f"model: {path} has no {name}, which the network needs")
        else:
            raise InputError(
                f"model: {name} in {path} has shape {tuple(loaded.shape)}, the network takes "
                f"{tuple(tensor.shape)}; give its --network and --width"
            )
    model.load_state_dict({**own, **chosen})
    return [name for name in weights if name not in own]
