"""The result of a run: a dict that goes to JSON, a table and a plot."""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from sparsetrain.recipes.checkpoint import write_atomically
from sparsetrain.recipes.engine import Lane, running_medians, tensor_bytes
from sparsetrain.recipes.session import (
    AGREEMENT_STEPS,
    AGREEMENT_TOLERANCES,
    TIMED_STEPS,
    loss_differences,
)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
        name = models[0] if models else name
    except OSError:
        pass
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def lane_report(lane: Lane, names: list[str], steady: int) -> dict[str, Any]:
    """Speed, accuracy and bytes of one lane.

    names: the layers that were pruned; steady: steps after which no lane's nonzeros changed in
    number, from which the step time is taken.
    """
    history, passed = lane.history, lane.history.elapsed()
    modules = [lane.model.get_submodule(name) for name in names]
    weights = sum(tensor_bytes(module.state_dict()) for module in modules)
    return {
        "seconds_per_step": history.median_seconds(steady),
        "training_seconds": passed[-1],
        "mask_seconds_per_step": statistics.median(history.mask_seconds or [0.0]),
        "accuracy": history.evaluations[-1][2],
        "masked": bool(lane.masks),
        "topology": lane.sparsifier.log() if lane.sparsifier else {},
        "curve": [
            {"step": step, "seconds": passed[step], "accuracy": accuracy}
            for step, _, accuracy in history.evaluations
        ],
        "losses": history.losses,
        "weight_bytes": weights,
        "plan_bytes": sum(_plan_bytes(module) for module in modules),
        "optimizer_bytes": tensor_bytes(lane.optimizer.state_dict()["state"]),
    }


def _plan_bytes(module: nn.Module) -> int:
    """Bytes that the kernels keep beside the weight of a sparse layer."""
    pattern = getattr(module, "pattern", None)
    if pattern is None:
        return 0
    return int(torch.ops.sparsetrain.plan_bytes(pattern.key))


def build_report(lanes: list[Lane], names: list[str], run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about the run; `run` holds the options and the data's description."""
    steady = max(lane.history.steady for lane in lanes)
    by_name = {lane.name: lane_report(lane, names, steady) for lane in lanes}
    report: dict[str, Any] = {"run": dict(run), "machine": machine(), "lanes": by_name}
    report["sparsified_layers"] = len(names)
    if "dense" in by_name:
        dense, sparse = by_name["dense"], by_name["sparse"]
        report["speedup"] = dense["seconds_per_step"] / sparse["seconds_per_step"]
        report["accuracy_difference"] = sparse["accuracy"] - dense["accuracy"]
        report["training_speedup"] = dense["training_seconds"] / sparse["training_seconds"]
        if dense["masked"]:
            report["loss_agreement"] = {
                "steps": AGREEMENT_STEPS,
                "tolerances": list(AGREEMENT_TOLERANCES),
                "largest_relative_difference": max(loss_differences(lanes)),
            }
    return report


def timing(lanes: list[Lane], report: Mapping[str, Any]) -> dict[str, Any]:
    """What changes in `report` when the last TIMED_STEPS steps of `lanes` are its step times.

    The time of the training follows: the last lane, if dense, takes the new time for each step, the
    other as much of it as it took of the dense lane's step beside it when they were trained.
    """
    by_name = {name: dict(lane) for name, lane in report["lanes"].items()}
    timed = [lane.history.seconds[-TIMED_STEPS:] for lane in lanes]
    before = [lane.history.seconds[:-TIMED_STEPS] for lane in lanes]
    seconds = [statistics.median(times[2:]) for times in timed]
    steady = max(lane.history.steady for lane in lanes)
    for lane, own, new in zip(lanes, before, seconds, strict=True):
        if len(lanes) > 1:
            shares = [a / b for a, b in zip(own, before[-1], strict=True)]
            unit = seconds[-1]
        else:
            shares, unit = own, new / statistics.median(own[steady:] or own)
        passed = [0.0, *itertools.accumulate(unit * x for x in running_medians(shares))]
        changes = by_name[lane.name]
        changes["seconds_per_step"] = new
        changes["training_seconds"] = passed[-1]
        changes["curve"] = [p | {"seconds": passed[p["step"]]} for p in changes["curve"]]
    changed: dict[str, Any] = {"lanes": by_name}
    changed["timing"] = {"machine": machine(), "steps": TIMED_STEPS}
    if "dense" in by_name:
        dense, sparse = by_name["dense"], by_name["sparse"]
        changed["speedup"] = dense["seconds_per_step"] / sparse["seconds_per_step"]
        changed["training_speedup"] = dense["training_seconds"] / sparse["training_seconds"]
    return changed


def write_json(report: Mapping[str, Any], path: Path) -> None:
    """Write `report` as indented JSON, whole or not at all."""
    text = json.dumps(report, indent=2, default=str) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_plot(report: Mapping[str, Any], path: Path) -> None:
    """Accuracy against training time of every lane, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, lane in report["lanes"].items():
        seconds = [point["seconds"] for point in lane["curve"]]
        accuracy = [100 * point["accuracy"] for point in lane["curve"]]
        axes.plot(seconds, accuracy, marker="o", markersize=4, label=name)
    axes.set_xlabel("training time [s], evaluation excluded")
    axes.set_ylabel("test accuracy [%]")
    threads = report.get("timing", report)["machine"]["threads"]
    axes.set_title(f"{report['run']['title']}, {threads} thread{'s' if threads > 1 else ''}")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format="png"))


def print_table(report: Mapping[str, Any]) -> None:
    """The table that ends a run, on standard output."""
    import rich.console
    import rich.table

    def megabytes(count: int) -> str:
        return f"{count / 1e6:.1f} MB"

    table = rich.table.Table(title=report["run"]["title"])
    table.add_column("")
    lanes = report["lanes"]
    order = [name for name in ("dense", "sparse") if name in lanes]
    for name in order:
        masked = ", masked" if lanes[name]["masked"] else ""
        table.add_column(name + masked, justify="right")
    rows: list[tuple[str, Any]] = [
        ("seconds per step (median)", lambda lane: f"{lane['seconds_per_step']:.3f}"),
        ("seconds of training", lambda lane: f"{lane['training_seconds']:.0f}"),
        ("test accuracy", lambda lane: f"{lane['accuracy']:.2%}"),
        ("weights of the sparse layers", lambda lane: megabytes(lane["weight_bytes"])),
        ("kernel plans", lambda lane: megabytes(lane["plan_bytes"])),
        ("optimizer state", lambda lane: megabytes(lane["optimizer_bytes"])),
    ]
    if any(lane["masked"] for lane in lanes.values()):
        rows.append(
            (
                "masking per step, not counted",
                lambda lane: f"{lane['mask_seconds_per_step']:.3f} s",
            )
        )
    for title, show in rows:
        table.add_row(title, *(show(lanes[name]) for name in order))
    console = rich.console.Console(highlight=False)
    console.print(table)
    if "speedup" in report:
        line = (
            f"speedup {report['speedup']:.2f}x per step, "
            f"{report['training_speedup']:.2f}x for all of the training; "
            f"accuracy {100 * report['accuracy_difference']:+.2f} points"
        )
        if "loss_agreement" in report:
            agreement = report["loss_agreement"]
            line += (
                f"; losses of the first {agreement['steps']} steps agree to "
                f"{agreement['largest_relative_difference']:.1e}"
            )
        console.print(line)
