"""Every distinct layer of a network, read off it during one forward pass of one sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsetrain.bench import model_zoo
from sparsetrain.bench.timing import Json


def model_layers(models: list[str], batches: list[int]) -> list[Json]:
    """[[layer]] tables of all linear layers and convolutions, equal ones once, largest batch first.

    Args:
        models: names of model_zoo.NAMES.
        batches: images or texts at a time; each layer appears with each.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a name that is no model's.
    """
    distinct: dict[tuple[Any, ...], Json] = {}
    for name in models:
        for table in layers_of(name):
            key = tuple(sorted((k, v) for k, v in table.items() if k != "name"))
            known = distinct.setdefault(key, {**table, "models": []})
            if name not in known["models"]:
                known["models"].append(name)
    tables = []
    for batch in sorted(batches, reverse=True):
        for table in distinct.values():
            used_by = ", ".join(table["models"])
            fields = {k: v for k, v in table.items() if k != "models"}
            tables.append({**fields, "name": f"{table['name']} ({used_by})", "batch": batch})
    return tables


def layers_of(name: str) -> list[Json]:
    """[[layer]] tables, without a batch, of one network, in the order of their execution."""
    found: list[Json] = []

    def seen(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        found.append(describe(module, inputs[0].shape))

    network = model_zoo.build(name, batch=1)  # not on meta: BERT looks at its mask's values
    for module in network.model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(seen)
    with torch.no_grad():
        network.model.eval()
        network.logits(network.model)
    return found


def describe(module: Any, shape: torch.Size) -> Json:
    """A [[layer]] table without a batch, of a layer whose input has this shape at batch 1."""
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        tokens = shape[1:-1].numel()
        size = {"inputs": module.in_features, "outputs": module.out_features, "tokens": tokens}
        title = f"{module.in_features}->{module.out_features}, {tokens} tokens"
        return {"name": title, "kind": "linear", "bias": bias, **size}
    kernel, stride = module.kernel_size[0], module.stride[0]
    title = f"{kernel}x{kernel} " + (f"stride {stride} " if stride > 1 else "")
    title += f"{module.in_channels}->{module.out_channels}, {shape[2]}x{shape[3]}"
    return {
        "name": title,
        "kind": "conv2d",
        "bias": bias,
        "inputs": module.in_channels,
        "outputs": module.out_channels,
        "size": shape[2],
        "kernel": kernel,
        "stride": stride,
        "padding": module.padding[0],
        "groups": module.groups,
    }
