"""Plots of benchmark results. Needs matplotlib; measures nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _harness import Json
from _tables import case_name

STYLES = {"sparsetrain": ("C0", "o"), "sparseprop": ("C1", "s"), "sparselab": ("C2", "^")}
SPEEDUPS = (0.5, 1, 2, 5, 10, 20, 50)


def _place(sparsity: float) -> float:
    """Where a sparsity stands on an axis that is linear in log(density)."""
    return -math.log10(1 - sparsity)


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """Sparsity where the speedup crosses 1, None if it never does.

    points: (sparsity, speedup), sorted. Between two of them log(speedup) is taken as linear in
    log(density), which is a straight line in the plot.
    """
    for (s0, r0), (s1, r1) in itertools.pairwise(points):
        if r0 < 1 <= r1:
            part = math.log(1 / r0) / math.log(r1 / r0)
            return float(1 - 10 ** -(_place(s0) + part * (_place(s1) - _place(s0))))
    return None


def _curve(run: Json, layer: str, name: str) -> list[tuple[float, float]]:
    points = []
    for row in run["rows"]:
        entry = row["contestants"].get(name, {})
        if row["layer"] == layer and "x_dense" in entry:
            points.append((row["sparsity"], entry["x_dense"]["median"]))
    return sorted(points)


def _panel(panel: Any, run: Json, layer: str) -> None:
    """One layer at one thread count: every library, and where each passes dense."""
    for name, (colour, marker) in STYLES.items():
        points = _curve(run, layer, name)
        if points:
            places = [_place(s) for s, _ in points]
            panel.plot(places, [r for _, r in points], color=colour, marker=marker, label=name)
        cross = break_even(points)
        if cross is not None:
            panel.axvline(_place(cross), color=colour, linestyle=":", linewidth=1)
            text = f" {100 * cross:.0f} %"
            panel.annotate(text, (_place(cross), 1), color=colour, fontsize=8, va="top")
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_yscale("log")
    ticks = sorted({row["sparsity"] for row in run["rows"]})
    panel.set_xticks([_place(s) for s in ticks], [f"{100 * s:g}" for s in ticks])
    panel.set_yticks(SPEEDUPS, [f"{s:g}" for s in SPEEDUPS])
    panel.minorticks_off()
    panel.set_xlabel("sparsity, %")
    panel.grid(alpha=0.3)


def plot_speedup(data: Json, path: Path) -> None:
    """Speedup over dense against sparsity as PNG: a row per thread count, a column per layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = data["runs"]
    titles = {row["layer"]: case_name(row) for row in runs[0]["rows"]}
    size = (4.2 * len(titles), 3.6 * len(runs))
    figure, axes = pyplot.subplots(len(runs), len(titles), figsize=size, squeeze=False, sharey=True)
    for run, line in zip(runs, axes, strict=True):
        for (layer, title), panel in zip(titles.items(), line, strict=True):
            _panel(panel, run, layer)
            panel.set_title(f"{title}, {run['threads']} thread(s)", fontsize=9)
        line[0].set_ylabel("forward + backward, x dense")
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        axes[0][0].legend(handles, labels, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
