"""From checked options and read data to a folder of results: what every recipe does."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sparsetrain.memory import keep_memory
from sparsetrain.recipes.algorithms import parse_schedule
from sparsetrain.recipes.checkpoint import write_atomically
from sparsetrain.recipes.engine import Prunable, Schedule, Task
from sparsetrain.recipes.errors import InputError
from sparsetrain.recipes.options import CHECKPOINT, RESULTS, RunOptions
from sparsetrain.recipes.progress import Progress
from sparsetrain.recipes.pruning import RATE
from sparsetrain.recipes.report import build_report, timing, write_json, write_plot
from sparsetrain.recipes.session import Session, Settings

_Options = TypeVar("_Options", bound=RunOptions)


@dataclass(frozen=True)
class Recipe:
    """What a run is made of, once its input has been read.

    build: makes the dense model, the same every time; select: its layers to be made sparse, by
    name; optimizer: as in `Schedule`; trained: whether its weights are; identity: what besides the
    options a resumed run must share with the interrupted one; facts: about the data, for the
    report; summary: the same in a line;
    save: writes the trained model into a folder.
    """

    options: RunOptions
    task: Task
    build: Callable[[], nn.Module]
    select: Callable[[nn.Module], Mapping[str, Prunable]]
    optimizer: str
    trained: bool
    identity: Mapping[str, Any]
    facts: Mapping[str, Any]
    name: str
    summary: str
    save: Callable[[Path, nn.Module], None]


def resolve_steps(options: _Options, train_size: int) -> _Options:
    """Batch no larger than the training set; `epochs`, if given, turned into steps."""
    batch = min(options.batch, train_size)
    steps = options.steps
    if options.epochs is not None:
        steps = max(1, round(options.epochs * (train_size // batch)))
    return dataclasses.replace(options, batch=batch, steps=steps, epochs=None)


def launch(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Run the whole recipe; returns the report, which is also in `out`/report.json.

    Raises InputError before anything is written if a checkpoint or the folder is no good.
    """
    options = recipe.options
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.keep_memory:
        keep_memory()
    session = Session(
        recipe.task,
        recipe.build,
        recipe.select,
        _settings(recipe),
        _identity(recipe),
        options.out,
    )
    if options.retime:
        return _retime(session, options, progress)
    if options.resume:
        session.check_resume()
    _make_folder(options.out)
    if options.overwrite:
        _remove_earlier(options.out)
    progress.say(
        f"{recipe.summary}; {len(session.names)} layers to {100 * options.sparsity:g} % sparsity"
    )
    with progress:
        lanes = session.run(options.resume, progress)
    title = f"{options.title or recipe.name}, {100 * options.sparsity:g} % sparse"
    facts = {**dataclasses.asdict(options), **recipe.facts, "title": title}
    report = build_report(lanes, session.names, facts)
    folder = options.out / "model"
    folder.mkdir(exist_ok=True)
    recipe.save(folder, lanes[0].model)
    _write(report, options.out)
    return report


def _write(report: Mapping[str, Any], out: Path) -> None:
    write_plot(report, out / "accuracy.png")
    write_json(report, out / "report.json")


def _retime(session: Session, options: RunOptions, progress: Progress) -> dict[str, Any]:
    """Replace the step times in the report of a finished run."""
    path = options.out / "report.json"
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"retime: {path} cannot be read ({type(error).__name__})") from error
    with progress:
        lanes = session.retime(progress)
    report.update(timing(lanes, report))
    _write(report, options.out)
    return report


def _settings(recipe: Recipe) -> Settings:
    options = recipe.options
    tune = Schedule(
        options.steps,
        options.batch,
        options.lr,
        options.weight_decay,
        seed=2 * options.seed + 1,
        optimizer=recipe.optimizer,
    )
    prune = dataclasses.replace(
        tune, steps=options.prune_steps, lr=RATE * tune.lr, seed=2 * options.seed, decay=False
    )
    return Settings(
        prune=prune,
        tune=tune,
        sparsity=options.sparsity,
        distribution=options.distribution,
        compare=options.compare,
        evaluate_every=options.evaluate_every,
        checkpoint_every=options.checkpoint_every,
        algorithm=options.algorithm,
        topology=parse_schedule(options.schedule, options.algorithm),
        trained=recipe.trained,
    )


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What must not change between an interrupted run and its continuation."""
    free = {"resume", "overwrite", "retime", "out", "data", "title"}
    free |= {"threads", "keep_memory", "checkpoint_every"}
    values = {k: v for k, v in dataclasses.asdict(recipe.options).items() if k not in free}
    model = values.get("model")
    return {**values, "model": model and str(Path(model).resolve()), **recipe.identity}


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out: cannot make {out}: {error.strerror or error}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(f"out: {out} is not writable")


def _remove_earlier(out: Path) -> None:
    for name in (CHECKPOINT, *RESULTS):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def save_weights(model: nn.Module, path: Path) -> None:
    """The state_dict (values and topology of sparse layers) as a safetensors file."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda file: save_file(state, file))


def save_json(content: object, path: Path) -> None:
    """One line of JSON."""
    text = json.dumps(content) + "\n"
    write_atomically(path, lambda file: file.write_text(text, "utf-8"))
