"""The networks that are timed: built from transformers configurations, with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("resnet18", "resnet50", "vgg16", "minilm", "bert", "vit")
_RESNETS: dict[str, dict[str, Any]] = {
    "resnet18": {
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
    },
    "resnet50": {},  # the default configuration
}
_BERTS: dict[str, dict[str, Any]] = {
    "minilm": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "bert": {},  # the default configuration is BERT-base
}
_VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


@dataclass
class Network:
    """A dense model in training, what it is fed, and which of its layers stay dense."""

    name: str
    title: str
    model: nn.Module
    inputs: Tensor  # (batch, 3, size, size) float32, or (batch, tokens) int64
    labels: Tensor  # (batch,)
    dense_layers: tuple[str, ...]  # the first convolution and the classifier
    # For sparseprop, which feeds random floats: the part of the model to convert, and its input.
    sparse_part: Callable[[nn.Module], nn.Module]
    part_input: tuple[int, ...]

    def logits(self, model: nn.Module) -> Tensor:
        """(batch, classes)"""
        result: Any = model(self.inputs)
        logits: Tensor = result if isinstance(result, Tensor) else result.logits
        return logits

    def loss(self, model: nn.Module) -> Tensor:
        """Cross entropy, a scalar."""
        return nn.functional.cross_entropy(self.logits(model), self.labels)


class Vgg16(nn.Module):
    """The convolutions and batch norms of VGG16-BN, as in CRAFT, with a classifier of ten."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for item in _VGG:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(width, item, 3, padding=1), nn.BatchNorm2d(item), nn.ReLU()]
                width = item
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 10)"""
        return self.classifier(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, batch: int, size: int = 224, tokens: int = 128) -> Network:
    """A network of NAMES with seeded random weights.

    Args:
        name: one of NAMES.
        batch: images or texts per step.
        size: side of the images, pixels.
        tokens: length of the texts.

    Raises:
        ValueError: another name.
    """
    torch.manual_seed(0)
    if name in _BERTS:
        return _bert(name, batch, tokens)
    if name not in NAMES:
        raise ValueError(f"models: got {name!r}, takes {', '.join(NAMES)}")
    images = torch.randn(batch, 3, size, size)
    title = f"{name}, {size}x{size}, batch {batch}"
    model: nn.Module
    if name == "vgg16":
        model, dense = Vgg16(), ("features.0", "classifier")
    elif name == "vit":
        model = _from_transformers("ViT", "ForImageClassification", {})
        dense = ("vit.embeddings.patch_embeddings.projection", "classifier")
    else:
        model = _from_transformers("ResNet", "ForImageClassification", _RESNETS[name])
        dense = ("resnet.embedder.embedder.convolution", "classifier.1")
    labels = torch.randint(10, (batch,))
    shape = tuple(images.shape)
    return Network(name, title, model.train(), images, labels, dense, lambda m: m, shape)


def _from_transformers(family: str, task: str, options: dict[str, Any]) -> nn.Module:
    """A model of ten classes with random weights; nothing is downloaded."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            "the networks come from transformers, which is not installed: "
            "pip install 'sparsetrain[recipes]'"
        ) from error
    config = getattr(transformers, family + "Config")(num_labels=10, **options)
    model: nn.Module = getattr(transformers, family + task)(config)
    return model


def _bert(name: str, batch: int, tokens: int) -> Network:
    model: Any = _from_transformers("Bert", "ForSequenceClassification", _BERTS[name])
    config = model.config
    config.pad_token_id = None  # every text is full: no search for padding in each step
    ids = torch.randint(config.vocab_size, (batch, tokens))
    title = f"{name}, {batch} x {tokens} tokens"
    labels = torch.randint(10, (batch,))
    shape = (batch, tokens, config.hidden_size)
    dense = ("classifier", "bert.pooler.dense")

    def encoder(whole: Any) -> nn.Module:
        part: nn.Module = whole.bert.encoder
        return part

    return Network(name, title, model.train(), ids, labels, dense, encoder, shape)
