"""The command `sparsetrain tune`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

__all__ = ["EXAMPLES", "HELP", "tune_command"]

HELP = """
Measure how each sparse layer of a model is computed fastest here, and keep the result.

MODEL is MODULE:FUNCTION, a function without arguments that returns a model and the tuple of its
example inputs, or one of the examples mlp, cnn, transformer. Training uses what is found when it
runs with as many threads, on the same shapes.

Examples:

[bold]sparsetrain tune transformer --explain[/bold]

[bold]sparsetrain tune mypackage.models:build --threads 8 --budget 120 --out plans.json[/bold]

[bold]sparsetrain tune cnn --sparsity 0.8 --batch 16 --json[/bold]
"""

# Name to the sizes of some layers: linear (inputs, outputs), or convolutions (channels in and out,
# kernel, size of the plane).
EXAMPLES: dict[str, list[tuple[int, ...]]] = {
    "mlp": [(784, 512), (512, 512), (512, 10)],
    "transformer": [(384, 384), (384, 1536), (1536, 384)],
    "cnn": [(64, 64, 3, 28), (64, 128, 3, 28), (128, 128, 1, 28)],
}


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def _example(name: str, sparsity: float, batch: int) -> tuple[Any, tuple[Any, ...]]:
    import torch

    from sparsetrain.nn import SparseConv2d, SparseLinear

    layers: list[torch.nn.Module] = []
    for sizes in EXAMPLES[name]:
        if len(sizes) == 2:
            layers.append(SparseLinear(*sizes, sparsity=sparsity))
        else:
            channels, out, kernel, _ = sizes
            layers.append(
                SparseConv2d(channels, out, kernel, padding=kernel // 2, sparsity=sparsity)
            )
    first = EXAMPLES[name][0]
    shape = (batch, first[0]) if len(first) == 2 else (batch, first[0], first[3], first[3])
    return torch.nn.Sequential(*layers), (torch.randn(shape),)


def _built(name: str) -> tuple[Any, tuple[Any, ...]]:
    """What MODULE:FUNCTION returns; modules of the current folder are found, too."""
    module, _, function = name.partition(":")
    if not module or not function:
        _fail(f"MODEL must be MODULE:FUNCTION or one of {', '.join(EXAMPLES)}; got {name!r}")
    sys.path.insert(0, os.getcwd())
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        _fail(f"{name} cannot be imported: {error}")
    result = build()
    if not (isinstance(result, tuple) and len(result) == 2):
        _fail(f"{name}() must return (model, example inputs), got {type(result).__name__}")
    model, inputs = result
    return model, inputs if isinstance(inputs, tuple) else (inputs,)


def tune_command(
    model: Annotated[str, typer.Argument(help="MODULE:FUNCTION, or mlp, cnn or transformer.")],
    budget: Annotated[float, typer.Option(help="Seconds that may be spent.", min=0.1)] = 60.0,
    threads: Annotated[
        int | None, typer.Option(help="Threads to tune for (default: torch's).", min=1)
    ] = None,
    sparsity: Annotated[
        float, typer.Option(help="Of an example's layers, in [0, 1).", min=0.0, max=0.999)
    ] = 0.9,
    batch: Annotated[int, typer.Option(help="Samples of an example.", min=1)] = 32,
    out: Annotated[
        Path | None, typer.Option(help="Write the plans to this JSON file as well.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep/--no-keep", help="Keep the result in the user's cache.")
    ] = True,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the table: chosen, what it beat, by how much.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Tune a model (its help is HELP)."""
    import torch

    from sparsetrain.tune import tune

    if threads is not None:
        torch.set_num_threads(threads)
    built, inputs = _example(model, sparsity, batch) if model in EXAMPLES else _built(model)
    try:
        plans = tune(built, *inputs, budget_s=budget, cache=keep, progress=not as_json)
        if out is not None:
            plans.save(out)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps([row._asdict() | {"gains": row.gains} for row in plans.rows]))
        return
    if explain:
        typer.echo(plans.explain())
    products = [row for row in plans.rows if row.direction != "step"]
    changed = sum(row.chosen != row.default for row in products)
    measured = sum(row.measured for row in products)
    typer.echo(
        f"{measured} of {len(products)} products measured; {changed} are computed otherwise than "
        "the cost model would"
    )
