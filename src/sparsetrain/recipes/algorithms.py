"""The sparse-training algorithm of a recipe and its schedule, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

import sparsetrain
from sparsetrain import schedules
from sparsetrain.recipes.errors import InputError

#: "static" is none of the library's: the recipe prunes first and then keeps the pattern.
ALGORITHMS: dict[str, type[sparsetrain.Sparsifier] | None] = {
    "static": None,
    "gmp": sparsetrain.GMP,
    "rigl": sparsetrain.RigL,
    "set": sparsetrain.SET,
    "mest": sparsetrain.MEST,
    "topkast": sparsetrain.TopKAST,
    "acdc": sparsetrain.ACDC,
}
SCHEDULES = {
    "constant": schedules.Constant,
    "cosine": schedules.Cosine,
    "cubic": schedules.Cubic,
    "periodic": schedules.Periodic,
}
#: Others exchange weights, and take any schedule that gives a share.
OWN_SCHEDULE = {"gmp": "cubic", "acdc": "periodic"}


def parse_schedule(text: str, algorithm: str) -> schedules.Schedule | None:
    """A schedule from NAME or NAME:KEY=NUMBER,..., of `sparsetrain.schedules`; None if empty.

    Raises InputError for what cannot be one, or does not suit the algorithm.
    """
    if not text:
        return None
    name, _, rest = text.partition(":")
    suitable = ["constant", "cosine"]
    if algorithm in OWN_SCHEDULE:
        suitable = [OWN_SCHEDULE[algorithm]]
    if algorithm == "static":
        raise InputError("schedule: static keeps its pattern; give one with another --algorithm")
    if name not in suitable:
        raise InputError(
            f"schedule: got {name!r}, {algorithm} takes {' or '.join(suitable)}, for example "
            f"{suitable[-1]}:every=100,stop=7500"
        )
    kind = SCHEDULES[name]
    known = [field.name for field in dataclasses.fields(kind)]
    values: dict[str, float | int] = {}
    for item in filter(None, rest.split(",")):
        key, _, number = item.partition("=")
        if key not in known:
            raise InputError(f"schedule: {name} has no {key!r}, but {', '.join(known)}")
        try:
            values[key] = float(number) if key == "drop_fraction" else int(number)
        except ValueError as error:
            raise InputError(f"schedule: {key}: got {number!r}, expected a number") from error
    try:
        made: schedules.Schedule = kind(**values)
        return made
    except (TypeError, ValueError) as error:
        raise InputError(f"schedule: {error}") from error


def make_sparsifier(
    algorithm: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    *,
    sparsity: float,
    distribution: str,
    schedule: schedules.Schedule | None,
    steps: int,
    trained: bool,
    seed: int,
) -> sparsetrain.Sparsifier:
    """Hand the layers `names` of a dense model to `algorithm`.

    trained: whether the weights are worth keeping: then the largest stay rather than random ones.
    Raises InputError if the library refuses, the model being as it was.
    """
    kind = ALGORITHMS[algorithm]
    assert kind is not None
    keeps_all = kind.initial == "dense"
    try:
        return kind(
            model,
            optimizer,
            sparsity=sparsity,
            distribution=distribution,
            schedule=schedule,
            total_steps=steps if schedule is None else None,
            include=list(names),
            initial=None if keeps_all else "magnitude" if trained else "random",
            seed=seed,
        )
    except ValueError as error:
        raise InputError(f"algorithm: {algorithm}: {error}") from error
