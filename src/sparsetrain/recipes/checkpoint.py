"""Files that are either whole or absent, and packed masks."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrain.recipes.errors import InputError

FORMAT = 1


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it.

    A reader, or a run resumed after a kill at any moment, sees the old file or the new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Save tensors, numbers, strings, lists and dicts; loadable with weights_only=True."""
    content = {"format": FORMAT, **state}
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote. Raises InputError if the file is damaged or foreign."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"checkpoint: {path} cannot be read ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(
            f"checkpoint: {path} is not a checkpoint of this version (format {FORMAT})"
        )
    return state


def pack_mask(mask: Tensor) -> Tensor:
    """Bool tensor of any shape -> uint8 (ceil(n / 8),), first element in the lowest bit."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (bits * weights).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack_mask`."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (packed[:, None] >> shifts) & 1
    return bits.flatten()[: shape.numel()].bool().view(shape)
